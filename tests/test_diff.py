"""Two runs side by side: what differs, and whether it is chance."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from ftexp import diff, experiment, runs
from ftexp.files import read_json, write_json


def test_differences_of_real_runs_are_told(tiny, tmp_path, capsys, monkeypatch):
    experiment.execute(tiny("lora.r=2"), tmp_path / "a", "x")
    experiment.execute(tiny("lora.r=4", "trainer.steps=12"), tmp_path / "b", "x")
    told = diff.difference(runs.find(str(tmp_path / "a")), runs.find(str(tmp_path / "b")))
    assert set(told.config) == {"lora.r", "lora.alpha", "trainer.steps"}
    assert told.facts == {}
    assert told.same_rows
    loss = told.scores["valid/loss"]
    assert loss.low <= loss.second - loss.first <= loss.high < 0  # more steps are better, and it is no chance
    assert loss.p < 0.05
    assert told.scores["cost/trainable"].p is None
    monkeypatch.setattr(sys, "argv", ["ftexp.diff", str(tmp_path / "a"), str(tmp_path / "b")])
    assert diff.main() == 0
    out = capsys.readouterr().out
    assert "trainer.steps" in out
    assert "better" in out
    monkeypatch.setattr(sys, "argv", ["ftexp.diff", "--json", str(tmp_path / "a"), str(tmp_path / "b")])
    assert diff.main() == 0
    assert json.loads(capsys.readouterr().out)["config"]["lora.r"] == [2, 4]


def made(folder, right, prompts=("p",) * 40, **facts):
    write_json(folder / "trial.json", {
        "state": "complete", "config": {"seed": 0}, "facts": facts, "scores": {"valid/exact_match": sum(right) / len(right)},
    })  # fmt: skip
    rows = [
        {"prompt": f"{p}{n}", "reference": "r", "exact_match": r}
        for n, (p, r) in enumerate(zip(prompts, right, strict=True))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "examples.parquet")
    return runs.Kept(folder, read_json(folder / "trial.json"))


def test_keys_that_an_earlier_ftexp_had_not_are_no_difference_at_their_defaults(tmp_path):
    """011d5ae had no `data.packing` and no `trainer.beta`."""
    one, two = (made(tmp_path / n, [1.0, 0.0] * 20) for n in "ab")
    two.trial["config"] |= {"data.packing": "none", "trainer.beta": 0.5}
    assert diff.difference(one, two).config == {"trainer.beta": (None, 0.5)}
    assert diff.difference(two, one).config == {"trainer.beta": (0.5, None)}


def test_equal_runs_are_no_difference(tmp_path):
    one, two = (made(tmp_path / n, [1.0, 0.0] * 20) for n in "ab")
    told = diff.difference(one, two)
    assert (told.config, told.facts) == ({}, {})
    assert told.scores["valid/exact_match"].p == 1


def test_environment_is_told_and_other_rows_are_not_tested(tmp_path):
    one = made(tmp_path / "a", [1.0, 0.0] * 20, versions={"torch": "1"}, parameters={"trainable": 3})
    two = made(
        tmp_path / "b", [0.0, 0.0] * 20, prompts=("q",) * 40, versions={"torch": "2"}, parameters={"trainable": 4}
    )
    told = diff.difference(one, two)
    assert told.facts == {"versions.torch": ("1", "2")}
    assert not told.same_rows
    assert told.scores["valid/exact_match"].p is None


@pytest.mark.parametrize(("words", "code"), [([], 2), (["a"], 2), (["--help"], 0), (["none", "none"], 4)])
def test_wrong_command_line_ends_in_usage_or_one_line(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ftexp.diff", *words])
    assert diff.main() == code
    out, err = capsys.readouterr()
    assert (err if code else out).startswith("ftexp: " if code == 4 else "usage: ")
    assert not (out if code else err)


def test_what_the_report_does_not_compare_is_not_compared_here(tmp_path, capsys):
    """Rows in units, losses of other tokenizers, and scores that are no number."""
    right = [1.0] * 20 + [0.0] * 20
    one, two = (made(tmp_path / n, values) for n, values in (("a", right), ("b", [1.0] * 12 + [0.0] * 28)))
    alone = diff.difference(one, two).scores["valid/exact_match"].p
    for kept in (one, two):
        path = kept.folder / "examples.parquet"
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.append_column("unit", pyarrow.array([n // 8 for n in range(40)])), path)
    assert diff.difference(one, two).scores["valid/exact_match"].p > 10 * alone
    for n, kept in enumerate((one, two)):
        kept.trial["scores"]["valid/loss"] = 1.0 + n
        kept.trial["facts"]["tokenizer_sha256"] = str(n)
    told = diff.difference(one, two)
    assert (told.scores["valid/loss"].p, told.scores["valid/loss"].low) == (None, None)
    assert "different tokenizers" in told.scores["valid/loss"].untested
    diff.show(told, ["a", "b"])
    out = capsys.readouterr().out
    assert "valid/loss not compared: in tokens of different tokenizers" in " ".join(out.split())
    assert "better" not in next(line for line in out.splitlines() if "valid/loss" in line)
    two.trial["scores"]["valid/exact_match"] = float("nan")
    assert diff.difference(one, two).scores["valid/exact_match"].p is None
    diff.show(diff.difference(two, one), ["b", "a"])
    assert "better" not in next(line for line in capsys.readouterr().out.splitlines() if "valid/exact_match" in line)


def test_scores_of_the_base_by_another_method_are_not_compared(tmp_path, capsys):
    """A loss of pairs below one of tokens is no better base."""
    one, two = (made(tmp_path / n, [1.0, 0.0] * 20) for n in "ab")
    for kept, kind, loss in ((one, "sft", 2.0), (two, "dpo", 0.7)):
        kept.trial["config"]["trainer.kind"] = kind
        kept.trial["scores"] |= {"base/loss": loss, "train/loss": loss}
    diff.show(diff.difference(one, two), ["a", "b"])
    out = capsys.readouterr().out
    assert "better" not in out
    for name in ("base/loss", "train/loss"):
        assert f"{name} not compared: by different trainer.kind" in " ".join(out.split())


def test_zero_has_no_sign():
    assert (diff._number(-0.0), diff._number(0.0), diff._number(-0.5)) == ("0.0000", "0.0000", "-0.5000")
