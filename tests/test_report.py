"""The leaderboard from files alone."""

import math
import sys

import pytest
from rich.console import Console

from ftexp import report
from ftexp.errors import MachineError
from ftexp.files import write_json


def trial(r, loss, exact=0.5, **keys):
    scores = {f"{split}/{n}": v for split in ("valid", "base") for n, v in
              {"loss": loss, "perplexity": math.exp(loss), "exact_match": exact, "jaccard": 0.5, "f1": 0.5}.items()}  # fmt: skip
    scores |= {k: 3.0 for k in scores if k.startswith("base/")}
    scores |= {"cost/trainable": r * 1e6, "cost/seconds": 60.0, "cost/memory_gib": 2.0}
    return {
        "label": f"lora.r={r}",
        "state": "complete",
        "config": {"lora.r": r, "objectives": ["valid/loss"]},
        "scores": scores,
    } | keys


@pytest.fixture
def sweep(tmp_path):
    def make(*trials, objectives=("valid/loss",), replicates=1, **options):
        nonlocal tmp_path
        tmp_path = tmp_path / "next"
        options = {"replicates": replicates, **options}
        write_json(tmp_path / "sweep.json", {"name": "s", "objectives": list(objectives), "options": options})
        for n, t in enumerate(trials):
            if t is not None:
                write_json(tmp_path / str(n) / "trial.json", t)
        return tmp_path

    return make


def printed(folder):
    console = Console(width=report.WIDTH, record=True, quiet=False, file=sys.stderr)
    console.print(report.leaderboard(report.read(folder)))
    return console.export_text()


def test_best_stands_first_below_the_base(sweep):
    text = printed(sweep(trial(8, 0.3), trial(64, 0.1), trial(16, 0.2)))
    order = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert order == ["base", "1 best", "2", "0"]


def test_objective_and_its_direction_decide(sweep):
    folder = sweep(trial(8, 0.1, exact=0.2), trial(16, 0.9, exact=0.8), objectives=["valid/exact_match"])
    assert report.read(folder).best == 1


def test_nan_never_wins(sweep):
    assert report.read(sweep(trial(8, math.nan), trial(16, 5.0), trial(4, math.nan))).best == 1
    assert report.read(sweep(trial(8, math.nan))).best is None


def test_replicates_are_ranked_as_one_by_their_mean(sweep):
    """Trial 0 is the best of all, and its point the worst: 0.1 and 0.7 against 0.3 and 0.3."""
    folder = sweep(trial(8, 0.1), trial(8, 0.7), trial(16, 0.3), trial(16, 0.3), trial(4, 0.2), replicates=2)
    board = report.read(folder)
    assert board.points[board.best].numbers == "2-3"
    assert board.points[0].spread == pytest.approx(0.6 / math.sqrt(2))
    text = printed(folder)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["base", "2-3 best", "0-1", "4"]
    assert "means over seeds" in text
    assert "0.4243" in rows[2]
    assert rows[3][2] == "1 complete"  # of two: not ranked


def test_trials_of_two_bases_show_two(sweep):
    other = trial(16, 0.2)
    other["scores"]["base/loss"] = 9.0
    text = printed(sweep(trial(8, 0.3), other, trial(4, 0.3)))
    assert "base of 0,2" in text
    assert "base of 1" in text


def test_trial_without_completions_stands_beside_one_with(sweep):
    bare = trial(16, 0.2)
    bare["scores"] = {k: v for k, v in bare["scores"].items() if "exact" not in k}
    assert "1 best" in printed(sweep(trial(8, 0.3), bare))


def test_classifier_stands_below_tfidf(sweep):
    told = trial(8, 0.3)
    told["scores"] = {k.replace("base/", "tfidf/"): v for k, v in told["scores"].items()} | {"valid/f1_macro": 0.625}
    text = printed(sweep(told))
    assert "tfidf" in text and "base" not in text
    assert "labels F1" in text and "0.625" in text


def test_failed_and_waiting_trials_are_shown(sweep, capsys):
    failed = {"label": "lora.r=16", "state": "failed", "error": "diverged at step 3: train/loss is nan", "config": {}}
    folder = sweep(trial(8, 0.3), failed, {"label": "lora.r=32", "state": "running", "config": {}})
    report.show(folder)
    out = capsys.readouterr().out
    assert "trial 1 failed: diverged at step 3: train/loss is nan" in out
    assert "running" in out


def test_sweep_without_a_result_has_no_best(sweep):
    assert report.read(sweep(None, None)).best is None
    assert "ranked by valid/loss" in printed(sweep(None, None))


def test_single_run_is_shown_too(tmp_path):
    write_json(tmp_path / "trial.json", trial(8, 0.3))
    assert report.read(tmp_path).best == 0


def test_folder_without_runs_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(MachineError, match=r"must be the folder of a sweep or a run"):
        report.read(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    assert report.main() == 4
    assert "must be the folder" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0)])
def test_usage(argv, code, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", *argv])
    assert report.main() == code


def test_point_above_a_bound_is_never_best(sweep):
    assert report.read(sweep(trial(8, 0.3), trial(64, 0.1), at_most={"cost/trainable": 9e6})).best == 0


def test_damaged_file_is_named_in_one_line(sweep, monkeypatch, capsys):
    folder = sweep(trial(8, 0.3))
    (folder / "0" / "trial.json").write_text('{"a":')
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    assert report.main() == 4
    err = capsys.readouterr().err
    assert err.startswith(f"ftexp: {folder}/0/trial.json: is damaged, it must be JSON")
    assert len(err.splitlines()) == 1
