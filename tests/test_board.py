"""Lines of the leaderboard; `test_report` and `page/test_html` read them as people do."""

import itertools
import math
import random

import pytest
from made import sweep

from ftexp import board
from ftexp.board import Line
from ftexp.files import read_json, read_trial, write_json
from ftexp.sweep.options import DRAWN


def test_a_line_has_a_cell_for_each_title(tmp_path):
    found = board.read(sweep(tmp_path / "s", 6, replicates=2, failed=1))
    lines = board.lines(found)
    assert {len(line.cells) for line in lines} == {len(board.titles(found))}
    assert [line.kind for line in lines] == ["base", "best", "complete", "unfinished"]
    assert "between seeds" in board.titles(found)
    assert isinstance(lines[0], Line) and lines[-1].cells[1].endswith(" (1 complete, 1 failed)")


def test_a_state_stands_beside_the_overrides_and_the_rank_in_its_column(tmp_path):
    found = board.read(sweep(tmp_path / "s", 3, failed=1))
    assert board.lines(found)[-1].cells[:3] == ["2", f"{found.trials[2]['label']} (failed)", "16"]
    found.trials[2]["config"] = {}
    assert board.lines(found)[-1].cells[:3] == ["2", f"{found.trials[2]['label']} (failed)", ""]


def test_point_of_its_trials(tmp_path):
    found = board.read(sweep(tmp_path / "s", 6, replicates=2))
    assert board.point_of(found, (2, 3)) is found.points[1]


def test_trial_whose_objective_has_no_value_failed_as_the_record_says(tmp_path):
    """A second objective that is undefined left a trial complete, and best, on the leaderboard, and failed in the record."""
    folder = sweep(tmp_path / "s", 3, objectives=["valid/loss", "valid/roc_auc_macro"])
    for n, value in enumerate((math.nan, 0.5, 0.6)):
        told = read_trial(folder / str(n))
        scores = told["scores"] | {"valid/loss": float(n), "valid/roc_auc_macro": value}
        config = told["config"] | {"objectives": ["valid/loss", "valid/roc_auc_macro"]}
        write_json(folder / str(n) / "trial.json", told | {"scores": scores, "config": config})
    found = board.read(folder)
    assert [t["state"] for t in found.trials] == ["failed", "complete", "complete"]
    assert found.trials[0]["error"] == "valid/roc_auc_macro cannot be told of these held-out rows"
    assert found.points[found.best].numbers == "1"
    one = tmp_path / "one"  # alone it is a run as any other: nothing ranks it
    one.mkdir()
    (folder / "0").rename(one / "r")
    assert board.read(one / "r").trials[0]["state"] == "complete"


@pytest.mark.parametrize(("sampler", "pruned", "told"), [
    (None, 0, "."), ("grid", 0, "."), ("random", 1, ". 1 trial was stopped early by the held-out loss."),
    ("qmc", 0, "."), ("tpe", 0, ", by which tpe drew its points."),
    ("gp", 2, ", by which gp drew its points. 2 trials were stopped early by the held-out loss."),
])  # fmt: skip
def test_what_the_sweep_did_by_its_own_objective_is_told_where_it_did(tmp_path, sampler, pruned, told):
    """Of a plain grid, too, it said that points were drawn, and trials stopped early."""
    folder = sweep(tmp_path / "s", 5, pruned=pruned)
    kept = read_json(folder / "sweep.json")
    kept.setdefault("options", {}).update({} if sampler is None else {"sampler": sampler})
    write_json(folder / "sweep.json", kept)
    own = kept["objectives"][0]
    found = board.read(folder, next(name for name in ("valid/loss", "valid/perplexity") if name != own))
    assert found.line() == f"Ranked by {found.objective}, chosen afterwards; the sweep's own is {own}{told}"
    assert board.read(folder).line() == ""
    assert tuple(one.value for one in DRAWN) == board.BLIND


def test_no_two_unlike_trials_are_ranked_whichever_comes_first():
    """One of an older version, which notes less, is like two that are unlike each other."""
    old = {"config": {"model.path": "m"}}
    new = [old | {"facts": {"tokenizer_sha256": digest}} for digest in ("ab", "cd")]
    trials = [{"number": n, **told} for n, told in enumerate([old, *new])]
    assert not board.unlike(trials[:2], "valid/loss") and not board.unlike([trials[0], trials[2]], "valid/loss")
    assert board.unlike(trials, "valid/loss").startswith("trials 1 and 2 were scored in tokens of different tokenizers")
    rows = [{"inputs": [{"context": "validation", "sha256": digest, "rows": 3}]} for digest in "ab"]
    assert board.unlike([{"number": 0}, *({"number": n, **told} for n, told in enumerate(rows, 1))], "valid/accuracy")


@pytest.mark.parametrize("objective", ["valid/loss", "valid/accuracy", "valid/perplexity", "valid/margin", "train/loss",
                                       "forgetting/loss", "valid/bits_per_byte", "cost/seconds", "valid/kl"])  # fmt: skip
def test_unlike_is_what_some_pair_says(objective):
    """Of trials that lack some of the facts, or differ in them, in any order."""
    draw = random.Random(objective)
    found = set()
    for _ in range(400):
        alike = draw.choice([0.5, 0.9, 0.97])
        trials = [{"number": n, **_noted(draw, alike)} for n in range(draw.randint(2, 5))]
        some = any(board.unlike([a, b], objective) for a, b in itertools.combinations(trials, 2))
        assert (board.unlike(trials, objective) is not None) == some
        found.add(some)
    assert found == ({False} if objective == "cost/seconds" else {False, True})


def _noted(draw, alike):
    """Return a trial whose facts are mostly the usual ones, and else others or none."""

    def one_of(usual, *others):
        return usual if draw.random() < alike else draw.choice([*others, None])

    told = {
        "config": {"trainer.kind": one_of("sft", "dpo", "rloo"), "trainer.beta": one_of(0.1, 0.2), "model.path": one_of("m", "n"),
                   "trainer.loss": one_of("nll", "dft")},
        "facts": {"tokenizer_sha256": one_of("a", "b"), "general_sha256": one_of("a", "b")},
        "scores": {"valid/tokens": one_of(10.0, 11.0), "valid/tokens_cut": one_of(0.0, 1.0)},
    }  # fmt: skip
    told = {part: {k: v for k, v in values.items() if v is not None} for part, values in told.items()}
    rows = one_of("a", "b")
    return told | ({} if rows is None else {"inputs": [{"context": "validation", "sha256": rows, "rows": 3}]})


def test_thousands_of_trials_are_compared_in_no_time(monkeypatch):
    asked = []
    honest = board.other_scale
    monkeypatch.setattr(board, "other_scale", lambda *given: asked.append(1) or honest(*given))
    told = [{"number": n, "config": {"trainer.kind": "dpo", "trainer.beta": n / 7, "lora.r": n}} for n in range(2000)]
    assert board.unlike(told, "valid/accuracy") is None and not asked


def test_trials_of_a_version_that_kept_no_hash_of_the_tokenizer_are_ranked_with_later_ones(tmp_path):
    """Sweeps that were begun before 24 November 2026 and went on after it had no best point."""
    folder = sweep(tmp_path / "s", 3)
    for n, (path, digest) in enumerate([("m", None), ("m", "ab"), ("m", "ab")]):
        told = read_trial(folder / str(n))
        told["facts"] |= {} if digest is None else {"tokenizer_sha256": digest}
        write_json(folder / str(n) / "trial.json", told | {"config": told["config"] | {"model.path": path}})
    assert board.read(folder).unlike is None
    told = read_trial(folder / "1")
    write_json(folder / "1" / "trial.json", told | {"config": told["config"] | {"model.path": "other"}})
    assert "trials 0 and 1 were scored in tokens of different tokenizers" in board.read(folder).unlike
