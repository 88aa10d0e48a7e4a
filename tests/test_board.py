"""Lines of the leaderboard; `test_report` and `page/test_html` read them as people do."""

import math

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
