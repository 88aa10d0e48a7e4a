"""Options of a user's own beside ours: `--config-dir`."""

import json
import os
import re
import sys

import pytest
import yaml
from conftest import TINY, UNWRITTEN

from ftexp import api, completion, config, overrides, report
from ftexp.errors import ConfigError
from ftexp.sweep import plugin


def test_folder_of_one_thread_is_not_that_of_another(mine, monkeypatch):
    """Options of `--config-dir` are one for the process: another thread must wait until they have been read."""
    import threading

    folder = mine(experiment__ours="# @package _global_\nseed: 5\n")
    prepare, chosen = overrides.prepare, threading.Event()

    def slow(given, **how):
        made = prepare(given, **how)
        if not chosen.is_set():
            chosen.set()
            other.join(1)
        return made

    monkeypatch.setattr(overrides, "prepare", slow)
    other = threading.Thread(target=lambda: (chosen.wait(), api.compose(["model=tiny"])))
    other.start()
    assert api.compose([f"--config-dir={folder}", "experiment=ours"]).seed == 5
    other.join()


RECIPE = "# @package _global_\ndefaults:\n  - override /lora: wide\ntrainer:\n  neftune: 3\n"


def test_recipe_of_ones_own_composes_with_our_groups_and_ones_own(mine):
    folder = mine(experiment__ours=RECIPE, lora__wide="r: 48\n")
    run = api.compose([f"--config-dir={folder}", "experiment=ours", "trainer.steps=7"])
    assert (run.lora.r, run.trainer.neftune, run.trainer.steps, run.lora.targets) == (48, 3, 7, config.Lora().targets)
    with pytest.raises(ConfigError, match="experiment must be one of .*got 'ours'"):
        api.compose(["experiment=ours"])  # the folder of one command is not that of the next


def test_run_and_sweep_of_ones_own_options(cli, mine, tmp_path):
    sweep = "hydra:\n  sweeper:\n    params:\n      lora.r: 2,4\n"
    folder = mine(experiment__ours=RECIPE, lora__wide="r: 3\n", sweeps__ranks=sweep)
    code, out, err = cli(*TINY, "--config-dir", "mine", "experiment=ours", "name=one")
    assert code == 0, err
    told = json.loads((tmp_path / "outputs/runs/one/trial.json").read_text())["config"]
    assert (told["lora.r"], told["trainer.neftune"]) == (3, 3)
    code, out, err = cli("--config-dir=mine", *TINY, "experiment=ours", "lora=default,wide", "-m", "name=groups")
    assert code == 0, err
    trials = [json.loads((tmp_path / f"outputs/sweeps/groups/{n}/trial.json").read_text()) for n in (0, 1)]
    assert [t["config"]["lora.r"] for t in trials] == [config.Lora().r, 3]
    assert "--config-dir mine" in (tmp_path / "outputs/sweeps/groups/report.html").read_text()
    code, out, err = cli("-cd", "mine", *TINY, "sweep=ranks", "name=file")
    assert code == 0, err
    assert sorted(p.parent.name for p in (tmp_path / "outputs/sweeps/file").glob("*/trial.json")) == ["0", "1"]
    one = tmp_path / "outputs/runs/one"
    words = report.command(one, json.loads((one / "trial.json").read_text()))
    assert words[3:5] == ("--config-dir", os.path.relpath(folder))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "--config-dir mine: there is no such folder"),
        ({"notes.txt": "x"}, "--config-dir mine: no option is in it; folders it may have are data, eval, experiment"),
        ({"lora__dora": "r: 1"}, "lora/dora.yaml: ftexp has an option of this name, "),
        ({"sweeps__rank": "x: 1"}, "sweeps/rank.yaml: ftexp has an option of this name, "),
        ({"experiments__a": "x: 1"}, "experiments: there is no group of this name; did you mean experiment/?"),
        ({"lora__a.yml": "r: 1"}, "lora/a.yml: must end in .yaml"),
        ({"config": "x: 1", "lora__a": "r: 1"}, "config.yaml is not read"),
        (
            {"lora__a": "rank: 1"},
            "mine/lora/a.yaml: unknown key lora.rank; ftexp calls it lora.r",
        ),
        (
            {"lora__a": "r: eight"},
            "mine/lora/a.yaml: lora.r: Value 'eight' of type 'str' could not be converted to Integer",
        ),
        ({"lora__a": "targets: q_proj"}, "mine/lora/a.yaml: lora.targets: a list is wanted"),
        ({"lora__a": "r: 8\n alpha: 3"}, "mine/lora/a.yaml:2: must be YAML, mapping values are not allowed here"),
        (
            {"lora__a": "targets: [q_proj"},
            "mine/lora/a.yaml:1: must be YAML, expected ',' or ']', but got '<stream end>'",
        ),
        (
            {"lora__a": "# @package _global_\ntrainer: 5"},
            "mine/lora/a.yaml: trainer: must hold keys and their values, got 5",
        ),
        ({"lora__a": "# @package _global_\nlora.r: 5"}, "mine/lora/a.yaml: lora.r must be written as lora: {r: ...}"),
        (
            {"lora__a": "r: 1", "sweeps__b": "hydra: {\n"},
            "mine/sweeps/b.yaml:2: must be YAML, expected the node content",
        ),
        ({"lora__a": "r: -1"}, "lora.r must be"),
        ({"lora__a": "# @package _global_\nhydra:\n  job:\n    env_set:\n      A: b\n"}, "must not be set"),
        ({"lora__a": "# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: os.getcwd\n"}, "run no code"),
        ({"lora__a": "extra: {a: '${oc.env:HF_TOKEN}'}\n"}, "HF_TOKEN"),
        ({"lora__a": "# @package _global_\nhydra:\n  sweeper:\n    _target_: subprocess.call\n"}, "run no code"),
        ({"lora__a": "# @package _global_\nhydra:\n  launcher:\n    _target_: subprocess.call\n"}, "run no code"),
        ({"lora__a": "r: 1\n", "lora__deep__b": "r: 2\n"}, "deep/b.yaml: an option must lie in lora/ itself"),
    ],
)
def test_folder_that_is_not_as_meant_is_refused_and_told(cli, mine, monkeypatch, files, told):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    mine(**files)
    code, _, err = cli(*TINY, "--config-dir", "mine", "lora=a", "name=m")
    assert code == 2
    assert told in err
    assert "Traceback" not in err


def test_completion_knows_them(mine):
    folder = mine(lora__wide="r: 48\n", sweeps__wider="lora:\n  r: 1\n")
    assert completion.candidates(["run", "--config-dir", str(folder), "lora=w"]) == ["lora=wide"]
    assert completion.candidates(["run", f"--config-dir={folder}", "sweep=w"]) == ["sweep=wider"]
    assert completion.candidates(["run", "lora=w"]) == []


def test_show_and_plan_take_the_folder(mine):
    from ftexp import plan

    folder = mine(experiment__ours=RECIPE, lora__wide="r: 48\n")
    plugin.register()
    config.register()
    argv = overrides.prepare([f"--config-dir={folder}", "model=tiny", "experiment=ours", "lora.alpha=1,2", "-m"])
    _, _, runs = plan.launched(argv)
    assert [(run.lora.r, run.lora.alpha) for run in runs] == [(48, 1), (48, 2)]


@pytest.mark.parametrize(
    ("files", "given", "told"),
    [
        ({"sweeps__a": "hydra: {sweeper: [\n"}, ["lora.r=2"], "sweeps/a.yaml:2: must be YAML, expected the node content"),
        ({"sweeps__a": "# @package _global_\nhydra: {sweeper: {sampler: tpee, params: {lora.r: '2,4'}}}\n"}, ["sweep=a"],
         "mine/sweeps/a.yaml: hydra.sweeper.sampler: Invalid value 'tpee', expected one of [grid, random, tpe"),
        ({"sweeps__b": "# @package _global_\nhydra: {sweeper: {samplr: tpe}}\n"}, ["sweep=b"],
         "mine/sweeps/b.yaml: unknown key hydra.sweeper.samplr; did you mean hydra.sweeper.sampler?"),
        ({"experiment__a": "# @package _global_\ndefaults: [{override /data: jsonll}]\n"}, ["experiment=a"],
         "yoda, got 'jsonll'; did you mean data=jsonl?"),
        ({"sweeps__c": "# @package _global_\nlora.r: '2,4'\n"}, ["sweep=c"],
         "c.yaml: lora.r must be written as lora: {r: ...} in a file; in one of sweeps/ several values of a key go below "
         "hydra: sweeper: params:"),
        ({"experiment__a": "trainer:\n  neftune: 3\n"}, ["experiment=a"],
         "unknown key experiment, for its file does not begin with the line # @package _global_"),
        ({"scale__smoke__latex_gpt2": "trainer: {steps: 1}", "lora__a": "r: 1"}, ["lora.r=2"],
         "scale/smoke/latex_gpt2.yaml: ftexp has an option of this name"),
        ({"lora__a": "r: 1"}, ["--config-dir=mine", "lora=a"], "--config-dir takes one folder, got several"),
    ],
)  # fmt: skip
def test_mistake_in_a_folder_is_told_with_its_place(cli, mine, files, given, told):
    mine(**files)
    code, _, err = cli(*TINY, "--config-dir", "mine", *given, "name=m")
    assert code == 2
    assert told in err
    assert "Traceback" not in err


def test_file_in_another_encoding_is_named(cli, mine):
    (mine(lora__a="") / "lora" / "a.yaml").write_bytes("variant: \xe9".encode("latin-1"))
    assert "mine/lora/a.yaml: must be text in UTF-8, byte 9 is not" in cli(*TINY, "--config-dir", "mine", "lora=a")[2]


@pytest.mark.parametrize("verb", ["plan", "doctor", "api"])
@pytest.mark.parametrize(("text", "told"), [("r: eight", "lora.r: Value 'eight'"), ("r: [", "a.yaml:1: must be YAML")])
def test_every_verb_tells_a_mistake_in_a_file(mine, monkeypatch, capsys, verb, text, told):
    from importlib import import_module

    given = [f"--config-dir={mine(lora__a=text)}", "model=tiny", "lora=a"]
    if verb == "api":
        with pytest.raises(ConfigError, match=re.escape(told)):
            api.compose(given)
        return
    for more in ([], ["seed=1,2", "-m"]):
        monkeypatch.setattr(sys, "argv", [verb, *given, *more])
        assert import_module(f"ftexp.{verb}").main() == 2
        assert told in capsys.readouterr().err


SEARCHES = "# @package _global_\nlora: {r: 4}\nhydra:\n  sweeper:\n    sampler: tpe\n    params:\n      lora.r: 2,4\n"


def test_one_run_of_a_file_that_searches_says_so(cli, mine, tmp_path):
    """As for users of Hydra, `-m` decides; the part of the file on a sweep was passed over without a word."""
    mine(experiment__ours=SEARCHES, experiment__plain="# @package _global_\nlora: {r: 4}\n")
    told = "warning: hydra.sweeper.params holds lora.r, and this is one run; add -m for a sweep over them"
    for name, lines in (("ours", [told]), ("plain", [])):
        code, _, err = cli(*UNWRITTEN, "--config-dir=mine", "track=none", f"experiment={name}", f"name={name}")
        assert code == 0, err
        assert [line for line in err.splitlines() if "hydra.sweeper" in line] == lines


def test_search_over_files_that_say_how_to_sweep_is_refused(mine):
    folder = mine(experiment__ours=SEARCHES, experiment__plain="# @package _global_\nlora: {r: 4}\n")
    rule = r"experiment=plain,ours: .*experiment/ours.yaml sets hydra.sweeper \(sampler, params\), which is of a whole"
    with pytest.raises(ConfigError, match=rule):
        overrides.prepare([f"--config-dir={folder}", "experiment=plain,ours", "-m"])
    overrides.prepare([f"--config-dir={folder}", "experiment=ours", "lora=default,dora", "-m"])


def test_folder_of_a_project_may_hold_others(mine, tmp_path):
    folder = mine(experiment__ours=RECIPE, lora__wide="r: 48\n")
    (folder / "models").mkdir()  # weights, near the name of a group
    assert api.compose([f"--config-dir={folder}", "experiment=ours"]).lora.r == 48


def test_command_of_a_trial_runs_it_alone_with_what_its_sweep_chose_for_all(cli, mine, tmp_path):
    """`sweep=` among its words would search again, and the file holds more than the search."""
    params = "hydra:\n  sweeper:\n    params:\n      lora.r: 2,4\n"
    more = "objectives: [valid/loss, cost/seconds]\ntrainer:\n  neftune: 5\n  extra: {adam_beta1: 0.8}\n"
    mine(sweeps__ours=f"{more}{params}")
    code, _, err = cli("--config-dir=mine", *UNWRITTEN, "track=none", "eval=loss", "sweep=ours", "name=s")
    assert code == 0, err
    trial = json.loads((tmp_path / "outputs/sweeps/s/1/trial.json").read_text())
    words = report.command(tmp_path / "outputs/sweeps/s/1", trial)
    assert {"objectives=[valid/loss,cost/seconds]", "trainer.neftune=5.0", "++trainer.extra.adam_beta1=0.8"} <= set(
        words
    )
    assert not any(word.startswith("sweep=") for word in words)
    code, _, err = cli(*words[3:], "track=none", "name=again")
    assert code == 0, err
    again = json.loads((tmp_path / "outputs/runs/again/trial.json").read_text())
    assert again["config"] == trial["config"]
    assert again["scores"]["valid/loss"] == trial["scores"]["valid/loss"]


@pytest.mark.parametrize("path", sorted(overrides.SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_a_shipped_sweep_chooses_for_all_can_be_an_override(path):
    """Composed as a single run, it has the values of the file."""
    told = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "hydra"}
    plain = config.flat(api.compose(["trainer.steps=3"]))
    words = report._beside_the_search(path.stem, None, {"config": plain | config.flat(told)}, [])
    found = config.flat(api.compose(["trainer.steps=3", *words]))
    assert {key: found[key] for key in config.flat(told)} == config.flat(told)


@pytest.mark.parametrize("text", ["Yoda:\n{prompt}", "C:\\x {prompt}\\", """say \\"{prompt}" or '{prompt}'"""])
def test_text_of_a_file_of_sweeps_is_itself_as_an_override(text):
    made = api.compose([f"data.prompt={report._spelled(text)}", f"lora.targets={report._spelled([text])}"])
    assert (made.data.prompt, made.lora.targets) == (text, [text])


@pytest.mark.parametrize(
    ("text", "key"),
    [("seed: 1\n", "experiment"), ("defaults:\n  - override /model: tiny\nseed: 1\n", "experiment"),
     ("# mine\n# @package _global_\nseed: 1\n", "experiment"), ("# @package _global\nseed: 1\n", "_global")],
    ids=["none", "with defaults", "in the second line", "misspelt"],
)  # fmt: skip
def test_experiment_without_its_first_line_is_told_what_it_lacks(cli, mine, text, key):
    mine(experiment__b=text)
    code, _, err = cli(*TINY, "--config-dir", "mine", "experiment=b", "name=m")
    told = f"mine/experiment/b.yaml: unknown key {key}, for its file does not begin with the line # @package _global_\n"
    assert (code, err.endswith(told)) == (2, True), err
