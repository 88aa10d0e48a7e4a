"""Defaults lists of one's own files: what leads nowhere is told with file, line and what there is."""

import pytest


@pytest.mark.parametrize(
    ("lines", "line", "told"),
    [
        ("  - override /modle: tiny", 3, "there is no group /modle; did you mean /model?; groups are data, eval, experiment, "),
        ("  - override /model: tinny", 3, "model must be one of distilbert, "),
        ("  - override /lora: dora\n  - override /model: 3", 4, "model must be one of distilbert, "),
        ("  - override /model: [gpt2, x]", 3, "model must be one of distilbert, "),
        ("  - override /model gpt2", 3, "override /model gpt2 must have a colon after the group, as - override /model: "),
        ("  - /model: gpt2", 3, "/model is chosen already, write - override /model: gpt2"),
        ("  - overide /model: gpt2", 3, "overide /model must be a group, after override or optional or nothing; did you mean"),
        ("  - override model: gpt2", 3, "model must be written /model: without a slash it is a group below experiment/"),
        ("  override /model: gpt2", 3, "defaults must be a list, as - override /model: tiny"),
        ("  - override /quant: none\n    override /lora: dora", 3, "a line of defaults must be one group and its option"),
        ("  - 7", 3, "a line of defaults must be one group and its option"),
        ("  - lost", 3, "experiment must be one of a, anime_genres, "),
        ("  - a", 3, "defaults lead back to "),
        ("  - override /sweep: rank", 3, "/sweep must be chosen on the command line, as sweep=..."),
        ("  - override /hydra/launcher: joblib", 3, "/hydra/launcher must be left out: ftexp brings its own workers"),
    ],
)  # fmt: skip
def test_defaults_that_lead_nowhere_are_told_with_their_line(cli, mine, lines, line, told):
    """Hydra named neither the line nor what there is, or ended in a traceback."""
    mine(experiment__a=f"# @package _global_\ndefaults:\n{lines}\n", experiment__b="defaults:\n  - a\n")
    for name in "ab":
        code, out, err = cli("--config-dir", "mine", f"experiment={name}", "name=m")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"mine/experiment/a.yaml:{line}: {told}" in err


@pytest.mark.parametrize(
    "line",
    ["override /model: tiny", "override optional /lora: dora", "override /model: tiny.yaml", "base.yaml", "override /lora: null",
     "override /model@_global_.model: tiny", "override /model: ${oc.env:WHICH,tiny}", "override /hydra/job_logging: disabled",
     "override /hydra/launcher: basic"],
)  # fmt: skip
def test_what_hydra_takes_is_taken(cli, mine, line):
    mine(
        experiment__a=f"# @package _global_\ndefaults:\n  - {line}\n", experiment__base="# @package _global_\nseed: 5\n"
    )
    code, _, err = cli("--config-dir", "mine", "experiment=a", "name=m", "--cfg", "job")
    assert (code, err) == (0, "")


def test_defaults_that_lead_to_options_are_taken(cli, mine):
    mine(experiment__b="# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /hydra/sweeper: ftexp\n",
         lora__wide="defaults:\n  - default\nr: 48\n")  # fmt: skip
    code, out, err = cli("--config-dir", "mine", "experiment=b", "lora=wide", "name=m", "--cfg", "job")
    assert (code, err) == (0, "") and "kind: tiny" in out and "r: 48" in out
