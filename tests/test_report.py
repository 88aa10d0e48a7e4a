"""The leaderboard from files alone."""

import csv
import io
import json
import math
import re
import subprocess
import sys

import made
import pytest
from rich.console import Console

from ftexp import board as boards
from ftexp import report, track
from ftexp.config import Track
from ftexp.errors import MachineError
from ftexp.files import read_json, write_json
from ftexp.page import html


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


@pytest.mark.parametrize(
    ("name", "title", "base"), [("valid/chrf", "chrf", "0.1000"), ("forgetting/loss", "forgetting/loss", "")]
)
def test_every_objective_has_a_column(sweep, name, title, base):
    told = [trial(8, 0.3), trial(16, 0.2)]
    for n, t in enumerate(told):
        t["scores"] |= {name: 0.25 + n, "base/chrf": 0.1}
    text = printed(sweep(*told, objectives=["valid/loss", name, "cost/trainable", "valid/exact_match"]))
    head, rows = (
        [[c.strip() for c in line.strip("┃│").split(bar)] for line in text.splitlines() if line.startswith(bar)]
        for bar in "┃│"
    )
    (titles,), at = head, head[0].index(title)
    assert [row[at] for row in rows] == [base, "1.2500", "0.2500"]
    assert len(titles) == len(set(titles)) and titles.count("trainable") == 1


def test_nan_never_wins(sweep):
    assert report.read(sweep(trial(8, math.nan), trial(16, 5.0), trial(4, math.nan))).best == 1
    assert report.read(sweep(trial(8, math.nan))).best is None


def test_spread_of_a_perplexity_is_around_the_arithmetic_mean(sweep):
    folder = sweep(trial(8, 0.1), trial(8, 0.7), replicates=2)
    for number, perplexity in enumerate((2.0, 8.0)):
        told = read_json(folder / str(number) / "trial.json")
        told["scores"]["valid/perplexity"] = perplexity
        write_json(folder / str(number) / "trial.json", told)
    point = report.read(folder, "valid/perplexity").points[0]
    assert (point.scores["valid/perplexity"], point.spread) == (pytest.approx(4.0), pytest.approx(18**0.5))


def test_nothing_tested_is_neither_the_same_as_the_best_nor_apart(sweep):
    told = report.data(report.gather(sweep(trial(8, 0.1), trial(16, 0.7))))
    assert told["untested"] is not None
    assert [(p["best"], p["same_as_best"]) for p in told["points"]] == [(True, None), (False, None)]


def test_an_objective_that_was_not_measured_is_told_and_ranks_nowhere(sweep, tmp_path):
    """Memory of the GPU, of a sweep that ran on machines with one and without."""
    folder = sweep(trial(8, 0.1), trial(16, 0.3), objectives=["cost/gpu_memory_gib"])
    told = read_json(folder / "1" / "trial.json")
    told["scores"]["cost/gpu_memory_gib"] = 3.0
    write_json(folder / "1" / "trial.json", told)
    board = report.read(folder)
    assert board.points[board.best].numbers == "1"
    assert board.trials[0]["error"] == "cost/gpu_memory_gib was not measured where it ran"
    alone = tmp_path / "alone"
    told["scores"].pop("cost/gpu_memory_gib")
    write_json(
        alone / "trial.json", told | {"config": told.get("config", {}) | {"objectives": ["cost/gpu_memory_gib"]}}
    )
    assert "failed" in printed(alone)
    assert report.read(alone).trials[0]["error"] == "cost/gpu_memory_gib was not measured where it ran"


def test_replicates_are_ranked_as_one_by_their_mean(sweep):
    """Trial 0 is the best of all, and its point the worst: 0.1 and 0.7 against 0.3 and 0.3."""
    folder = sweep(trial(8, 0.1), trial(8, 0.7), trial(16, 0.3), trial(16, 0.3), trial(4, 0.2), replicates=2)
    board = report.read(folder)
    assert board.points[board.best].numbers == "2-3"
    assert board.points[0].spread == pytest.approx(0.6 / math.sqrt(2))
    text = printed(folder)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    rows = [row for row in rows if row[0]]  # long overrides go on in the next line
    assert [row[0] for row in rows] == ["base", "2-3 best", "0-1", "4"]
    assert "means over seeds" in text
    assert "0.4243" in rows[2]
    assert rows[3][2:5] == ["4", "", ""] and boards.lines(board)[-1].cells[1] == "lora.r=4 (1 complete)"  # of two


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


def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, argv)])
    return report.main(), *capsys.readouterr()


def test_page_is_written_beside_the_sweep_and_told(tmp_path, monkeypatch, capsys):
    folder = made.sweep(tmp_path / "s")
    code, out, _ = run(monkeypatch, capsys, folder)
    assert code == 0
    assert out.endswith(f"page: {folder / 'report.html'}\n")
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_page_goes_where_it_is_asked_to_or_nowhere(tmp_path, monkeypatch, capsys):
    folder = made.sweep(tmp_path / "s")
    run(monkeypatch, capsys, folder, "--html", tmp_path / "p.html")
    assert (tmp_path / "p.html").exists() and not (folder / "report.html").exists()
    code, out, _ = run(monkeypatch, capsys, folder, "--no-html")
    assert code == 0 and "page:" not in out and not (folder / "report.html").exists()
    code, _, err = run(monkeypatch, capsys, folder, "--html", tmp_path / "no" / "p.html")
    assert code == 4 and "cannot be written" in err


def test_json_holds_the_numbers_in_full(tmp_path, monkeypatch, capsys):
    folder = made.sweep(tmp_path / "s", 4, failed=1)
    code, out, _ = run(monkeypatch, capsys, folder, "--json")
    told = json.loads(out, parse_constant=pytest.fail)  # no NaN, which is no JSON
    assert code == 0 and not (folder / "report.html").exists()
    for n, point in enumerate(told["points"][:3]):
        assert point["scores"] == read_json(folder / str(n) / "trial.json")["scores"]
        assert point["low"] < point["scores"]["valid/loss"] < point["high"]
    best = min(range(3), key=lambda n: told["points"][n]["scores"]["valid/loss"])
    assert [p["best"] for p in told["points"]] == [n == best for n in range(4)]
    assert told["points"][3]["states"] == ["failed"] and told["points"][3]["reasons"] == [
        "failed at step 4: valid/loss 9.0"
    ]


def test_csv_has_a_line_a_point(tmp_path, monkeypatch, capsys):
    folder = made.sweep(tmp_path / "s", 6, replicates=2, hostile='a"b,\nc')
    _, out, _ = run(monkeypatch, capsys, folder, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["trials"] for row in rows] == ["0 1", "2 3", "4 5"]
    assert 'a"b,\nc' in rows[0]["overrides"]
    assert float(rows[0]["valid/loss"]) == report.read(folder).points[0].scores["valid/loss"]


def test_markdown_is_the_leaderboard(tmp_path, monkeypatch, capsys):
    folder = made.sweep(tmp_path / "s", hostile="a|b<c>")
    _, out, _ = run(monkeypatch, capsys, folder, "--format", "md")
    lines = out.splitlines()
    assert lines[0].startswith("| trial | overrides | rank |") and lines[1].startswith("|---|---|---:|")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert "<c>" not in out


def test_brackets_of_overrides_are_no_markup(sweep):
    assert "lora.targets=[q_proj]" in printed(sweep(trial(8, 0.3, label="lora.targets=[q_proj]")))


def test_hostile_labels_reach_the_terminal(tmp_path, capfd):
    folder = made.sweep(tmp_path / "s", hostile=made.HOSTILE)
    done = subprocess.run([sys.executable, "-m", "ftexp.report", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\ud800" in done.stdout


def test_page_stands_with_the_sweep_in_mlflow(tmp_path, capsys):
    where = Track(uri=f"sqlite:///{tmp_path}/ml.db")
    folder = made.sweep(tmp_path / "s")
    parent = track.open_parent(where, "s", folder, {})
    write_json(folder / "sweep.json", read_json(folder / "sweep.json") | {"mlflow_run": parent, "track_uri": where.uri})
    report.show(folder)
    client, _ = track.store(where)
    assert [a.path for a in client.list_artifacts(parent)] == ["report.html"]
    kept = next((tmp_path / "mlartifacts").rglob("report.html"))
    assert kept.read_text() == (folder / "report.html").read_text()
    stamp = kept.stat().st_mtime_ns
    report.show(folder)  # the same page is not sent again
    assert kept.stat().st_mtime_ns == stamp


def test_a_store_that_is_gone_costs_a_line(tmp_path, capsys):
    folder = made.sweep(tmp_path / "s", mlflow_run="abc", track_uri=f"sqlite:///{tmp_path}/gone.db")
    report.show(folder)
    assert "is not here" in capsys.readouterr().err
    assert not (tmp_path / "gone.db").exists() and (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (200.0, "above a bound of sweep.at_most"),
        (1.0, "complete and within the bounds of sweep.at_most: there is nothing"),
    ],
)
def test_point_above_a_bound_is_not_the_winner(tmp_path, bound, said):
    folder = made.sweep(tmp_path / "s")
    best = report.read(folder).best
    path = folder / str(best) / "trial.json"
    told = read_json(path)
    told["scores"]["cost/seconds"] = 500.0
    write_json(path, told)
    kept = read_json(folder / "sweep.json")
    write_json(folder / "sweep.json", kept | {"options": {"replicates": 1, "at_most": {"cost/seconds": bound}}})
    found = report.gather(folder)
    assert found.winner is not found.board.points[best]
    assert said in html.page(found)


def test_point_above_a_bound_is_never_best(sweep):
    assert report.read(sweep(trial(8, 0.3), trial(64, 0.1), at_most={"cost/trainable": 9e6})).best == 0


@pytest.mark.parametrize(
    ("name", "held", "told"),
    [
        ("0/trial.json", '{"a":', "it must be JSON"),
        ("0/trial.json", "{}", "it lacks state, config; put it back or remove it"),
        ("0/trial.json", "[]", "it must hold an object in braces"),
        ("sweep.json", "[]", "it must hold an object in braces"),
        ("sweep.json", '{"name": "s", "axes": []}', "it lacks options, objectives; put it back"),
        ("confirm.json", "{}", "it lacks openings"),
    ],
)
def test_damaged_file_is_named_in_one_line(name, held, told, sweep, monkeypatch, capsys):
    folder = sweep(trial(8, 0.3))
    (folder / name).write_text(held)
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    assert report.main() == 4
    err = capsys.readouterr().err
    assert err.startswith(f"ftexp: {folder}/{name}: is damaged, {told}")
    assert len(err.splitlines()) == 1


OWN = """
def vowels(completion, reference):
    return -abs(sum(c in "aeiou" for c in completion) - sum(c in "aeiou" for c in reference))
"""


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """A sweep of three with completions, and a file that scores them; as seen from the folder of both."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    folder = made.sweep(tmp_path / "s", 3)
    (tmp_path / "scores.py").write_text(OWN)
    means = []
    for n in range(3):
        path = folder / str(n) / "examples.parquet"
        rows = pyarrow.parquet.read_table(path).to_pydict()
        rows["prediction"] = [reference + "aeiou"[: (n + 1 + i) % 3] for i, reference in enumerate(rows["reference"])]
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
        means.append(-sum((n + 1 + i) % 3 for i in range(made.ROWS)) / made.ROWS)
    return folder, means


def run_report(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["ftexp report", *map(str, words)])
    code = report.main()
    return code, *capsys.readouterr()


def test_another_metric_ranks_afterwards_with_tests_of_its_own(scored, monkeypatch, capsys):
    folder, _ = scored
    asked = json.loads(run_report(monkeypatch, capsys, folder, "--json", "--by", "valid/exact_match")[1])
    sweep = read_json(folder / "sweep.json")
    write_json(folder / "sweep.json", sweep | {"objectives": ["valid/exact_match"]})
    assert json.loads(run_report(monkeypatch, capsys, folder, "--json")[1]) == asked  # as if it had been the objective
    write_json(folder / "sweep.json", sweep)
    code, out, err = run_report(monkeypatch, capsys, folder, "--by", "valid/exact_match")
    assert (code, err) == (0, "")
    told = " ".join(out.split())
    assert "ranked by valid/exact_match" in told
    assert "Ranked by valid/exact_match, chosen afterwards; the sweep's own is valid/loss" in told
    assert not (folder / "report.html").exists()  # which is of the sweep's own objective
    assert "chosen afterwards" not in run_report(monkeypatch, capsys, folder, "--by", "valid/loss", "--no-html")[1]


def test_function_of_ones_own_ranks_a_sweep_that_is_there(scored, monkeypatch, capsys):
    folder, means = scored
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    told = json.loads(run_report(monkeypatch, capsys, folder, "--json", "--by", "scores.py:vowels")[1])
    assert [p["scores"]["valid/own"] for p in told["points"]] == pytest.approx(means)
    assert told["objective"] == "valid/own" and told["rows"] == made.ROWS
    best = next(p for p in told["points"] if p["best"])
    assert best["low"] < best["scores"]["valid/own"] < best["high"]
    code, out, _ = run_report(monkeypatch, capsys, folder, "--by", "scores.py:vowels", "--html", "own.html")
    assert code == 0 and "ranked by valid/own, scores.py:vowels" in " ".join(out.split())
    page = (folder.parent / "own.html").read_text()
    assert (
        "Ranked by valid/own, scores.py:vowels (by a function of one&#x27;s own, mean over rows; higher is better)"
        in page
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_format_that_there_is_not_is_told_with_how_the_page_is_written(monkeypatch, capsys):
    told = "ftexp: --format must be one of md, csv, json, got"
    page = "; the page is written with --html PATH, and without --format"
    assert run_report(monkeypatch, capsys, "none", "--format", "html") == (2, "", f"{told} 'html'{page}\n")
    assert run_report(monkeypatch, capsys, "none", "--format", "xml") == (2, "", f"{told} 'xml'\n")


@pytest.mark.parametrize(
    ("by", "rule"),
    [
        ("valid/chr", r"--by must be among .*did you mean valid/chrf\?"),
        ("loss", r"--by must be among .*did you mean valid/loss\?"),
        ("test/loss", "--by: test/loss is of sealed rows"),
        ("valid/own", r"--by: valid/own ranks a sweep that is there: ftexp report SWEEP --by scores\.py:number"),
        ("valid/kl", "--by valid/kl: trial 0 has no such score"),
        ("scores.py:none", r"scores\.py:none: must name a function of scores\.py, which has vowels"),
        ("scores.py", "must be a function of a file"),
    ],
)
def test_what_cannot_rank_is_refused(scored, monkeypatch, capsys, by, rule):
    for form in ([], ["--json"], ["--format", "md"]):
        code, out, err = run_report(monkeypatch, capsys, scored[0], "--by", by, *form)
        assert (code, out) == (2, "") and re.search(rule, err), err


def test_function_that_gives_other_numbers_each_time_ranks_nothing(scored, monkeypatch, capsys):
    folder, _ = scored
    (folder.parent / "scores.py").write_text(
        "import itertools\nN = itertools.count()\ndef f(completion):\n    return next(N)\n"
    )
    _, out, _ = run_report(monkeypatch, capsys, folder, "--by", "scores.py:f")
    told = " ".join(out.split())
    assert re.search(r"trial 0 got [\d.]+, then [\d.]+ by the same function", told), told
    assert "no point is best" in told and "2 best" not in told


def test_torn_table_is_named_by_a_function_of_ones_own(scored, monkeypatch, capsys):
    folder, _ = scored
    (folder / "1" / "examples.parquet").write_bytes(b"torn")
    code, _, err = run_report(monkeypatch, capsys, folder, "--by", "scores.py:vowels")
    assert code == 4 and "s/1/examples.parquet: must be the table of a trial's rows, it cannot be read" in err
