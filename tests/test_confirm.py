"""Confirmation on the sealed rows: what is opened, when, how often, what comes of it, and every refusal."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import UNWRITTEN

from ftexp import compare, config, confirm, data, evaluate, experiment, model, report, runs
from ftexp import run as command
from ftexp.errors import ConfigError, DataError, MachineError, TrialsFailed
from ftexp.files import read_json, write_json
from ftexp.metrics import Direction
from ftexp.stats import columns, noise
from ftexp.stats.columns import Interval
from ftexp.sweep import frozen
from ftexp.train import classify, sft

EXECUTE = experiment.execute
SMALL = [*[t for t in UNWRITTEN if not t.startswith(("trainer.", "data.rows"))], "data.rows=80", "data.test=20", "trainer.steps=2",
         "trainer.lr=1e-4", "trainer.report_steps=0", "trainer.checkpoint_minutes=0", "name=s"]  # fmt: skip
"""Two ranks so little trained that they cannot be told apart."""


def launched(folder, *given):
    """Run a sweep in a folder, from the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["ftexp.run", *given, "-m"])
        assert command.main() == 0
    return folder / "outputs" / "sweeps" / "s"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished sweep of two ranks over seeds 0 and 1; confirm a copy of it."""
    folder = tmp_path_factory.mktemp("finished")
    return launched(folder, *SMALL, "lora.r=2,4", "sweep.replicates=2", "track=none", "eval=loss")


@pytest.fixture
def sweep(finished, tmp_path, monkeypatch):
    """Its copy in `outputs/sweeps/s` of a folder of its own."""
    config.register()
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, tmp_path / "outputs" / "sweeps" / "s"))


@pytest.fixture
def cli(monkeypatch, capsys):
    """Return a function that runs `ftexp confirm`; gives exit code, stdout and stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["ftexp confirm", *argv])
        capsys.readouterr()
        code = confirm.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def quick(monkeypatch):
    """Scores out of thin air, for what does not depend on them: a run's own number, spread over its sealed rows."""
    ran = []

    def execute(run, folder, label, parent, opened):
        ran.append((folder.name, run.seed, opened))
        rows = data.load(run.data).test
        nats = [math.log(run.lora.r) + run.seed / 100 + n / 1000 for n in range(len(rows))]
        table = {"prompt": [r.prompt for r in rows], "reference": [r.completion for r in rows], "nats": nats,
                 "tokens": [1] * len(rows), "bytes": [1] * len(rows)}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "test.parquet")
        loss = sum(nats) / len(nats)
        scores = {
            f"{split}/{k}": v
            for split in ("valid", "test")
            for k, v in (("loss", loss), ("perplexity", math.exp(loss)))
        }
        write_json(folder / "trial.json", {"state": "complete", "config": experiment.identity(run), "scores": scores})

    monkeypatch.setattr(experiment, "execute", execute)
    return ran


def edited(path, **keys):
    write_json(path, read_json(path) | keys)


def test_fresh_seeds_are_scored_on_the_sealed_rows(sweep):
    """Everything a confirmation tells, worked out again from the files of its runs."""
    entry = confirm.confirm(sweep, 2)
    result = entry["result"]
    assert [m["role"] for m in result["members"]] == ["winner", "cheapest"]
    assert {m["label"] for m in result["members"]} == {"lora.r=2", "lora.r=4"}
    assert result["members"][1]["label"] == "lora.r=2"
    trials = [read_json(sweep / "confirm" / str(n) / "trial.json") for n in range(4)]
    assert [t["config"]["seed"] for t in trials] == [2, 3, 2, 3]
    assert {t["opened"] for t in trials} == {1}
    ranked = read_json(sweep / str(result["members"][0]["trials"][0]) / "trial.json")
    assert {k for k in ranked["config"] if trials[0]["config"][k] != ranked["config"][k]} == {"seed"}
    run = frozen.load(sweep).run({"lora.r": str(ranked["config"]["lora.r"])}, 0)
    sealed = data.load(run.data).test
    losses = []
    for n, trial in enumerate(trials):
        table = pyarrow.parquet.read_table(sweep / "confirm" / str(n) / "test.parquet").to_pylist()
        assert [row["where"] for row in table] == [row.where for row in sealed]
        losses.append(sum(row["nats"] for row in table) / sum(row["tokens"] for row in table))
        assert losses[-1] == pytest.approx(trial["scores"]["test/loss"], rel=1e-12)
    winner = result["members"][0]
    told = winner["test"]["loss"]
    assert told["value"] == pytest.approx(sum(losses[:2]) / 2) and told["low"] < told["value"] < told["high"]
    assert winner["by_seed"] == pytest.approx(losses[:2])
    valid = sum(read_json(sweep / str(n) / "trial.json")["scores"]["valid/loss"] for n in winner["trials"]) / 2
    assert winner["optimism"]["value"] == pytest.approx(told["value"] - valid)
    assert result["pair"]["difference"] == pytest.approx((losses[0] + losses[1] - losses[2] - losses[3]) / 2)
    assert result["seed_sd"] == pytest.approx(
        math.sqrt(((losses[0] - losses[1]) ** 2 + (losses[2] - losses[3]) ** 2) / 4)
    )
    assert (result["rows"], result["points"], entry["opened"], entry["test"]["rows"]) == (20, 2, 1, 20)
    assert told["value"] == pytest.approx(reloaded(run, sweep / "confirm" / "0", sweep / "confirm" / "1"))


def reloaded(run, *folders):
    """Score saved adapters on the sealed rows, without any of the path of a run."""
    from peft import PeftModel

    rows = experiment.prompts.render(data.load(run.data).test, model.tokenizer(run.model), run.data)
    losses = []
    for folder in folders:
        fresh = model._load(run.model, run.quant, "fresh")
        loaded = PeftModel.from_pretrained(fresh.model, folder / "adapter")
        losses.append(evaluate.score(loaded, fresh.tokenizer, rows, run.eval, "again").scores["loss"])
    return sum(losses) / len(losses)


def test_rows_of_one_unit_count_as_one_in_the_test(sweep, quick, monkeypatch):
    """Twenty sealed rows in four units, whose losses rise from the first to the last: the interval is wider."""

    def width():
        told = confirm.confirm(sweep, 2, again=True)["result"]
        loss = told["members"][0]["test"]["loss"]
        return told["rows"], told["groups"], loss["high"] - loss["low"]

    rows, groups, narrow = width()
    assert (rows, groups) == (20, None)
    execute = experiment.execute

    def unit(run, folder, *more, **keys):
        execute(run, folder, *more, **keys)
        table = pyarrow.parquet.read_table(folder / "test.parquet")
        table = table.append_column("unit", pyarrow.array([n // 5 for n in range(len(table))]))
        pyarrow.parquet.write_table(table, folder / "test.parquet")

    monkeypatch.setattr(experiment, "execute", unit)
    rows, groups, wide = width()
    assert (rows, groups) == (20, 4)
    assert wide > 1.02 * narrow


def test_complete_confirmation_is_kept(sweep, quick, cli):
    code, out, err = cli("s", "--json")
    assert code == 0, err
    assert quick == [(str(n), 2 + n % 3, 1) for n in range(6)]
    first = json.loads(out)
    assert first == read_json(sweep / "confirm.json")["openings"][0]
    code, again, _ = cli("s", "--json")
    assert (code, json.loads(again), len(quick)) == (0, first, 6)
    _, text, _ = cli(str(sweep))
    assert "winner" in text and "cheapest" in text and "sealed rows opened 1 time." in text
    report.show(sweep)


def test_report_shows_one_line(sweep, quick, capsys):
    confirm.confirm(sweep)
    capsys.readouterr()
    report.show(sweep)
    assert capsys.readouterr().out.count("Confirmed on 20 sealed rows and 3 fresh seeds: lora.r=") == 1


def test_page_tells_of_the_opening_from_its_beginning_on(sweep, quick, monkeypatch, capsys):
    """Also where it was killed behind the result; a sweep without a page gets none, and one that fails costs a line."""
    page = sweep / "report.html"
    before = page.read_text(encoding="utf-8")
    assert "Not opened." in before
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "execute", lambda *_, **keys: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            confirm.confirm(sweep, 2)
    begun = page.read_text(encoding="utf-8")
    assert "Not opened." not in begun and "sealed rows opened 1 time: not finished." in begun
    confirm.confirm(sweep)
    done = page.read_text(encoding="utf-8")
    assert "not finished" not in done and "Confirmed on 20 sealed rows and 2 fresh seeds" in done
    page.write_text(begun, encoding="utf-8")
    confirm.confirm(sweep)
    assert page.read_text(encoding="utf-8") == done
    report.show(sweep.relative_to(Path.cwd()))
    assert page.read_text(encoding="utf-8") == done
    page.unlink()
    confirm.confirm(sweep, again=True)
    assert not page.exists()
    page.mkdir()
    assert "result" in confirm.confirm(sweep, again=True)
    assert "warning: report.html does not tell of the sealed rows: " in capsys.readouterr().err


def test_one_seed_is_told_as_one():
    entry = {"plan": [{"label": "lora.r=2"}], "seeds": [1]}
    assert confirm._purpose(entry) == "lora.r=2 on 1 seed, not finished"
    assert confirm._purpose(entry | {"seeds": [1, 2], "result": {}}) == "lora.r=2 on 2 seeds"


def test_second_opening_is_refused_or_marked(sweep, quick, cli):
    confirm.confirm(sweep, 2)
    kept = (sweep / "confirm.json").read_bytes()
    code, _, err = cli("s", "--seeds", "3")
    assert code == 2
    assert "the sealed rows of s were opened 20" in err and "on 2 seeds; --again opens them once more" in err
    assert (sweep / "confirm.json").read_bytes() == kept and len(quick) == 4
    code, out, err = cli("s", "--again", "--seeds", "2")
    assert code == 0
    assert quick[4:] == [("4", 4, 2), ("5", 5, 2), ("6", 4, 2), ("7", 5, 2)]
    for told in (out, read_json(sweep / "confirm.json")["line"], cli("s")[1]):
        assert "sealed rows opened 2 times" in told
    assert "warning: the sealed rows are opened 2 times" in err
    assert len(confirm.openings(sweep)) == 2
    cli("s", "--again")
    assert confirm.openings(sweep)[-1]["opened"] == 3


def test_another_winner_needs_another_opening(sweep, quick):
    confirm.confirm(sweep, 2)
    winner = confirm.openings(sweep)[0]["plan"][0]["trials"][0]
    edited(sweep / str(winner) / "trial.json", state="failed")
    with pytest.raises(ConfigError, match="--again"):
        confirm.confirm(sweep, 2)


def test_winner_by_another_score_is_confirmed_by_that_score(sweep, quick, cli):
    """A plan by another score is another plan, also where it names the same points."""
    ranks = {n: read_json(sweep / str(n) / "trial.json")["config"]["lora.r"] for n in range(2)}
    for n, rank in ranks.items():
        path = sweep / str(n) / "trial.json"
        edited(path, scores=read_json(path)["scores"] | {"valid/perplexity": 100.0 - rank})
    code, out, err = cli("s", "--seeds", "2", "--by", "valid/perplexity", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["by"] == told["result"]["objective"] == "valid/perplexity"
    assert told["plan"][0]["config"]["lora.r"] == max(ranks.values())
    done = len(quick)
    assert json.loads(cli("s", "--by", "valid/perplexity", "--json")[1]) == told and len(quick) == done
    code, _, err = cli("s")
    assert code == 2 and ", first by valid/perplexity, on 2 seeds; --again opens" in err
    assert cli("s", "--again", "--seeds", "1")[0] == 0
    assert "by" not in confirm.openings(sweep)[-1]


def test_sweep_over_tokenizers_has_no_winner_to_confirm(sweep, quick):
    told = read_json(sweep / "1" / "trial.json")["facts"]
    edited(sweep / "1" / "trial.json", facts=told | {"tokenizer_sha256": "another"})
    with pytest.raises(MachineError, match="has no winner to confirm: trials 0 and 1 were scored in tokens"):
        confirm.confirm(sweep, 2)
    assert confirm.openings(sweep) == []


def opened_before_scored(sweep, monkeypatch):
    """Begin a confirmation that ends where sealed rows are first scored; tell whether it was on record by then."""
    told, honest = [], experiment.evaluate.score

    def score(model, tokenizer, rows, how, label, *more):
        if label == "test":
            told.append(bool(confirm.openings(sweep)))
            raise KeyboardInterrupt
        return honest(model, tokenizer, rows, how, label, *more)

    monkeypatch.setattr(experiment.evaluate, "score", score)
    with pytest.raises(KeyboardInterrupt):
        confirm.confirm(sweep, 1)
    return told == [True]


def test_opening_is_on_record_before_a_row_is_scored(sweep, monkeypatch):
    assert opened_before_scored(sweep, monkeypatch)
    assert "not finished" in read_json(sweep / "confirm.json")["line"]


def test_sabotage_opening_that_is_kept_later_is_seen(sweep, monkeypatch):
    monkeypatch.setattr(confirm, "_keep", lambda *_: None)
    assert not opened_before_scored(sweep, monkeypatch)


KILLED = """
import os, signal
from ftexp import confirm, experiment
honest, calls = experiment.{name}, []
def killed(*args, **keys):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args, **keys)
experiment.{name} = killed
import sys
sys.argv = ["ftexp confirm", "s", "--seeds", "2"]
confirm.main()
"""


@pytest.mark.slow
def test_killed_confirmation_goes_on_and_is_one_opening(sweep, tmp_path):
    """Killed between record and first run, then in the third run: the same plan ends as one left alone, to the bit."""
    calm = Path(shutil.copytree(sweep, tmp_path / "outputs" / "sweeps" / "calm"))
    expected = confirm.confirm(calm, 2)
    for name, call in (("execute", 1), ("_execute", 3)):
        code = KILLED.format(name=name, call=call)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        (entry,) = confirm.openings(sweep)
        assert (entry["opened"], "result" in entry) == (1, False)
    stamp = (sweep / "confirm" / "0" / "trial.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="on 2 seeds, not finished; --again"):
        confirm.confirm(sweep, 3)
    found = confirm.confirm(sweep)
    assert len(confirm.openings(sweep)) == 1
    assert (sweep / "confirm" / "0" / "trial.json").stat().st_mtime_ns == stamp
    assert found["result"] == expected["result"]
    assert found["runs"] == expected["runs"]


def test_same_rows_opened_by_another_sweep_are_told(sweep, quick, cli, tmp_path):
    other = Path(shutil.copytree(sweep, tmp_path / "outputs" / "sweeps" / "other"))
    entry = confirm.confirm(other)
    code, out, err = cli("s")
    assert code == 0
    assert f"warning: these sealed rows were opened before, by other, {entry['date']}" in err
    assert f"opened before, by other, {entry['date']}" in out
    assert confirm.openings(sweep)[0]["opened"] == 1


@pytest.mark.parametrize("hashes", [True, False])
def test_sealed_rows_that_another_sweep_opened_in_part_are_counted(sweep, quick, cli, tmp_path, hashes):
    """As of `data.test=11` after `data.test=10`; openings of before rows had hashes are known by their digest alone."""
    other = Path(shutil.copytree(sweep, tmp_path / "outputs" / "sweeps" / "other"))
    entry = confirm.confirm(other)
    ten = " ".join([*entry["test"]["hashes"].split()[:10], "0" * 16])
    test = (
        {"sha256": "another", "rows": 11, "hashes": ten} if hashes else {"sha256": entry["test"]["sha256"], "rows": 20}
    )
    write_json(other / "confirm.json", {"line": "", "openings": [entry | {"test": test}]})
    code, out, err = cli("s", "--seeds", "1")
    assert code == 0
    told = f"sealed rows were opened before, by other, {entry['date']}"
    assert (f"warning: 10 of these 20 {told}" in err) == hashes
    assert f"10 of these 20 {told}." in out if hashes else f"These {told}." in out


@pytest.mark.parametrize("seeds", [(3,), (2, 3, 4)])
def test_seed_that_diverges_is_counted(sweep, cli, monkeypatch, seeds):
    honest = sft.train

    def train(run, *more):
        if run.seed in seeds:
            raise confirm.Diverged(f"seed {run.seed}")
        return honest(run, *more)

    monkeypatch.setitem(experiment.TRAINERS, config.Method.sft, train)
    code, out, err = cli("s", "--json")
    assert code == 5
    if len(seeds) == 3:
        assert "diverged on all of the fresh seeds [2, 3, 4]" in err
        with pytest.raises(TrialsFailed):
            confirm.confirm(sweep)
        return
    winner = json.loads(out)["result"]["members"][0]
    assert (winner["seeds"], winner["failed"]) == ([2, 4], 1)
    assert "2, 1 diverged" in cli("s")[1]


def test_sweep_without_sealed_rows_is_told_what_to_set(sweep, cli, monkeypatch):
    honest = data.load
    monkeypatch.setattr(data, "load", lambda keys: replace(honest(keys), test=()))
    monkeypatch.setattr(
        data.Splits, "digest", lambda _: read_json(sweep / "0" / "trial.json")["facts"]["rows"]["sha256"]
    )
    code, _, err = cli("s")
    assert code == 2
    assert "data.test must be above 0 when a sweep is launched, got 0: s kept no row sealed" in err
    assert not (sweep / "confirm.json").exists()


def test_rows_that_changed_are_refused(sweep):
    for n in range(4):
        told = read_json(sweep / str(n) / "trial.json")
        told["facts"]["rows"]["sha256"] = "another"
        write_json(sweep / str(n) / "trial.json", told)
    with pytest.raises(DataError, match="yoda: the rows changed since trial"):
        confirm.confirm(sweep)
    assert not (sweep / "confirm.json").exists()


def test_config_that_is_not_the_frozen_one_is_refused(sweep):
    for n in range(4):
        told = read_json(sweep / str(n) / "trial.json")
        told["config"]["trainer.lr"] = 0.5
        write_json(sweep / str(n) / "trial.json", told)
    with pytest.raises(ConfigError, match=r"another config than is frozen: trainer\.lr 0\.5 -> 0\.0001"):
        confirm.confirm(sweep)


@pytest.mark.parametrize("objective", ["cost/trainable", "base/loss", "train/loss"])
def test_objective_that_no_held_out_row_tells_is_refused(sweep, objective):
    edited(sweep / "sweep.json", objectives=[objective])
    with pytest.raises(ConfigError, match=f"ranks by {objective}, which no held-out row tells"):
        confirm.confirm(sweep)


@pytest.mark.parametrize("by", [None, "valid/loss"])
def test_points_that_differ_by_the_seed_are_refused_and_open_nothing(tmp_path, cli, quick, monkeypatch, by):
    """The winner would be a seed, and what is confirmed other ones."""
    config.register()
    with monkeypatch.context() as real:
        real.setattr(experiment, "execute", EXECUTE)
        sweep = launched(tmp_path, *SMALL, "seed=0,1", "track=none", "eval=loss")
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("s", *([] if by is None else ["--by", by]))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the points of s must not differ by the seed, which was searched" in err and "sweep.replicates" in err
    assert not quick and not (sweep / "confirm.json").exists()
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert "Not opened." in page and "ftexp confirm" not in page


def test_points_whose_options_set_another_seed_are_refused_and_open_nothing(tmp_path, cli, quick, monkeypatch):
    """As those of a seed that was searched; the seeds of their replicates are no such points."""
    config.register()
    for name, text in (("calm", "trainer:\n  warmup: 0.1\n"), ("wild", "seed: 7\n")):
        (tmp_path / "mine" / "trainer").mkdir(parents=True, exist_ok=True)
        text = f"# @package _global_\ndefaults:\n  - default@trainer\n{text}"
        (tmp_path / "mine" / "trainer" / f"{name}.yaml").write_text(text)
    given = ("--config-dir=mine", *SMALL, "trainer=calm,wild", "sweep.replicates=2", "track=none", "eval=loss")
    with monkeypatch.context() as real:
        real.setattr(experiment, "execute", EXECUTE)
        sweep = launched(tmp_path, *given)
    monkeypatch.chdir(tmp_path)
    assert [read_json(sweep / str(n) / "trial.json")["config"]["seed"] for n in range(4)] == [0, 1, 7, 8]
    code, out, err = cli("s")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the points of s must not differ by the seed, which options of trainer set to 0, 7: fresh" in err
    assert not quick and not (sweep / "confirm.json").exists()
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert "Not opened." in page and "ftexp confirm" not in page


def test_unfinished_sweep_is_refused(sweep, monkeypatch):
    from ftexp.sweep import study, worker

    study.queue(worker.open_study(frozen.load(sweep)), [None] * 6)
    with pytest.raises(
        MachineError, match="must be finished, 2 of 6 trials are not; it goes on with: ftexp sweep resume s"
    ):
        confirm.confirm(sweep)


def test_sweep_without_a_complete_point_is_refused(sweep):
    for n in range(4):
        edited(sweep / str(n) / "trial.json", state="failed")
    with pytest.raises(MachineError, match="no complete point"):
        confirm.confirm(sweep)


def test_sweep_that_runs_is_refused(sweep):
    from ftexp.sweep import plugin

    with plugin.only_supervisor(sweep, "s"), pytest.raises(MachineError, match="is being run by process"):
        confirm.confirm(sweep)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["s", "--seeds", "0"], 2, "--seeds must be between 1 and 100, got 0"),
        (["none"], 4, "none: no sweep of this name"),
        (["s", "--by", "cost/seconds"], 2, "--by must be a score of held-out rows, as valid/chrf, got cost/seconds"),
        (["s", "--by", "scores.py:number"], 2, "--by must be a score of held-out rows, as valid/chrf, got scores.py:"),
        (["s", "--by", "valid/chrf"], 2, "chrf"),
        (["s", "--by", "chrf"], 2, "--by must be a score of held-out rows, as valid/chrf, got chrf"),
    ],
)
def test_mistake_is_told_in_one_line(sweep, cli, argv, code, message):
    found, out, err = cli(*argv)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert message in err


@pytest.fixture(scope="module")
def genres(tmp_path_factory):
    """A finished sweep of a classifier, tracked, ranked by a score that is no mean over rows."""
    folder = tmp_path_factory.mktemp("genres")
    given = [t for t in SMALL if not t.startswith(("data.rows", "data.valid", "data.max", "trainer.lr"))]
    return launched(folder, *given, "lora.r=2,4", "data=genres", "data.rows=160", "data.valid=30", "data.max_length=512",
                    "trainer.kind=classify", "trainer.lr=1e-2", "objectives=[valid/f1_macro]", "data.allow=[leaks]",
                    f"track.uri=sqlite:///{folder}/ml.db")  # fmt: skip


def test_classifier_is_decided_by_thresholds_of_the_held_out_rows(genres):
    config.register()
    entry = confirm.confirm(genres, 2)
    (winner,) = entry["result"]["members"]
    assert entry["result"]["alone"].startswith("points were not tested: ")
    trial = read_json(genres / "confirm" / "0" / "trial.json")
    run = config.rebuild(trial["config"])
    told, rows, known = logits(run, genres / "confirm" / "0")
    by_label = read_json(genres / "confirm" / "0" / "test_labels.json", of=list)
    assert {line["label"]: line["true"] for line in by_label} == {n: sum(n in e.labels for e in rows) for n in known}
    assert {line["label"]: line["threshold"] for line in by_label} == trial["thresholds"]
    honest = classify.score(told, rows, known, True, trial["thresholds"])[0].scores
    assert {k: trial["scores"][f"test/{k}"] for k in honest} == pytest.approx(honest, nan_ok=True)
    fitted = classify.score(told, rows, known, True, experiment.labels.thresholds(
        [e.labels for e in rows], told.sigmoid().tolist(), known))[0].scores  # fmt: skip
    assert fitted["f1_macro"] > honest["f1_macro"] + 0.01  # the twin: thresholds of the sealed rows flatter
    values = [read_json(genres / "confirm" / str(n) / "trial.json")["scores"]["test/f1_macro"] for n in range(2)]
    assert winner["test"]["f1_macro"] == {"value": pytest.approx(sum(values) / 2), "low": None, "high": None}
    assert winner["test"]["f1_samples"]["low"] < winner["test"]["f1_samples"]["high"]
    valid = read_json(genres / str(winner["trials"][0]) / "trial.json")["scores"]["valid/f1_macro"]
    assert winner["optimism"]["value"] == pytest.approx(valid - sum(values) / 2)  # more is better: the other way round


def logits(run, folder):
    """Logits of a saved classifier on the sealed rows."""
    from peft import PeftModel

    splits = data.load(run.data)
    train, valid, known = experiment.classified(run, splits)
    base = model._load(run.model, run.quant, "fresh", len(known))
    loaded = PeftModel.from_pretrained(base.model, folder / "adapter")
    rows = classify.render(splits.test, base.tokenizer, run)
    return classify.logits(loaded, base.tokenizer, rows, run.eval, "again"), rows, known


def test_runs_stand_in_mlflow_below_their_sweep(genres):
    from ftexp import sync, track
    from ftexp.config import Track

    config.register()
    confirm.confirm(genres, 2)
    sweep = frozen.load(genres)
    client, experiment_id = track.store(Track(uri=sweep.track_uri))
    runs = {r.info.run_name: r for r in client.search_runs([experiment_id])}
    retrained = [r for name, r in runs.items() if name.startswith("winner ")]
    assert len(retrained) == 2
    for run in retrained:
        assert run.data.tags["mlflow.parentRunId"] == sweep.mlflow_run
        assert run.data.tags["ftexp.test_opened"] == "1"
        assert 0 <= run.data.metrics["test/f1_macro"] <= 1
    line = read_json(genres / "confirm.json")["line"]
    winner = confirm.openings(genres)[0]["plan"][0]["trials"][0]
    tagged = {name for name, run in runs.items() if run.data.tags.get("ftexp.confirmed") == line}
    assert tagged == {"s", read_json(genres / str(winner) / "trial.json")["label"]}
    assert not any(
        k.startswith("test/") for name, run in runs.items() if run not in retrained for k in run.data.metrics
    )
    elsewhere = f"sqlite:///{genres.parent}/team.db"
    sync.sync([genres], elsewhere)
    client, experiment_id = track.store(Track(uri=elsewhere, experiment=client.get_experiment(experiment_id).name))
    there = client.search_runs([experiment_id])
    assert {r.info.run_name for r in there if r.data.tags.get("ftexp.confirmed") == line} == tagged


def test_optimism_points_the_same_way_for_both_directions():
    better, worse = Interval(0.2, 0.1, 0.3), Interval(0.5, 0.4, 0.6)
    assert confirm.optimism(better, worse, Direction.minimize).value == pytest.approx(0.3)
    assert confirm.optimism(worse, better, Direction.maximize).value == pytest.approx(0.3)
    assert confirm.optimism(worse, better, Direction.minimize).value == pytest.approx(-0.3)


def test_best_of_equals_looks_too_good_and_sealed_rows_say_so():
    """Fifty points, all truly right in 70 of 100 rows: 77 on the 200 rows that chose the best, 70 on 200 sealed ones."""
    rng = np.random.default_rng(0)
    valid = rng.binomial(200, 0.7, (400, 50)).max(axis=1) / 200
    test = rng.binomial(200, 0.7, 400) / 200
    gaps = [confirm.optimism(share(v), share(t), Direction.maximize) for v, t in zip(valid, test, strict=True)]
    assert test.mean() == pytest.approx(0.7, abs=0.005)
    assert np.mean([g.value for g in gaps]) == pytest.approx(noise.expected_best_share(50, 200, 0.7) - 0.7, abs=0.005)
    assert np.mean([g.low > 0 for g in gaps]) > 0.2  # seen in single sweeps, too
    drawn = rng.binomial(200, 0.7, (2000, 2)) / 200  # the twin: a point that nobody chose
    fair = [confirm.optimism(share(v), share(t), Direction.maximize) for v, t in drawn]
    assert np.mean([g.low <= 0 <= g.high for g in fair]) == pytest.approx(0.95, abs=0.015)


def share(value):
    return Interval(value, *columns.wilson(value, 200))


def test_user_without_a_name_has_a_number(monkeypatch):
    def nameless():
        raise KeyError("uid")

    monkeypatch.setattr(confirm.getpass, "getuser", nameless)
    assert confirm._who().startswith(f"{os.getuid()} on ")


def test_confirmed_winner_is_registered(tmp_path, monkeypatch, cli, quick):
    """In a real store: the winner's adapter, with the sealed score and its interval as tags; the same again adds nothing."""
    config.register()
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as real:
        real.setattr(experiment, "execute", EXECUTE)
        sweep = launched(tmp_path, *SMALL, "lora.r=2,4", "eval=loss")
    code, out, err = cli("s", "--register", "yoda", "--json")
    assert code == 0, err
    entry = json.loads(out)
    assert entry["registered"] == {"name": "yoda", "version": "1", "fresh": True}
    winner = entry["result"]["members"][0]
    trial = read_json(sweep / str(winner["trials"][0]) / "trial.json")
    from ftexp import track
    from ftexp.config import Track

    kept = track.store(Track())[0].get_model_version("yoda", "1")
    assert kept.run_id == trial["mlflow_run"]
    assert kept.source.endswith("/adapter")
    tags = kept.tags
    assert (tags["ftexp.sweep"], tags["ftexp.trial"], tags["ftexp.overrides"]) == (
        "s",
        str(winner["trials"][0]),
        winner["label"],
    )
    for key, end in (("", "value"), ("_low", "low"), ("_high", "high")):
        assert float(tags[f"ftexp.test/loss{key}"]) == winner["test"]["loss"][end]
    assert (tags["ftexp.test_rows"], tags["ftexp.test_seeds"], tags["ftexp.test_opened"]) == ("20", "3", "1")
    assert len(tags["ftexp.config_sha256"]) == 64
    assert "this is the adapter of trial" in kept.description
    count = len(quick)
    _, again, _ = cli("s", "--register", "yoda")
    assert "registered before: models:/yoda/1" in again and len(quick) == count
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    for more in (["--again"], ["--register", "yoda"]):  # a store here would be a stray one
        code, _, err = cli(str(sweep), *more)
        assert (code, err.count("\n")) == (4, 1)
        assert f"track.uri=sqlite:///outputs/mlflow.db is not there from {tmp_path}/away; call this from the" in err
    assert cli(str(sweep))[0] == 0 and len(quick) == count and not list((tmp_path / "away").iterdir())


def test_what_cannot_be_registered_is_refused_before_training(sweep, quick, cli):
    code, _, err = cli("s", "--register", "yoda")
    assert code == 2 and "--register=yoda needs a sweep that is in MLflow, s is not" in err.replace("\n", " ")
    code, _, err = cli("s", "--register", "a/b")
    assert code == 2 and "--register must be 1 to 64 letters" in err
    assert not quick and not (sweep / "confirm.json").exists()


def test_winner_without_an_adapter_is_not_to_be_registered_and_opens_nothing(tmp_path, cli, quick, monkeypatch):
    config.register()
    with monkeypatch.context() as real:
        real.setattr(experiment, "execute", EXECUTE)
        sweep = launched(
            tmp_path, *(o for o in SMALL if "trainer.lr" not in o), "lora=none", "trainer.lr=1e-4,1e-3", "eval=loss"
        )
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("s", "--register", "yoda")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--register=yoda needs an adapter, trainer.lr=" in err and "trained the whole model" in err
    assert not quick and not (sweep / "confirm.json").exists()
    assert cli("s", "--seeds", "1")[0] == 0


def test_all_points_are_counted_whose_best_was_chosen(sweep, quick, monkeypatch):
    """Also those that the verdict left out of its tests: the best flatters by all of them."""
    monkeypatch.setattr(compare, "MOST_POINTS", 1)
    monkeypatch.setattr(compare.noise, "expected_maximum", float)
    assert confirm.confirm(sweep, 2)["result"]["points"] == 2


def test_openings_of_sweeps_in_folders_of_their_own_count(tmp_path, monkeypatch):
    """Beside the sweep or launched here: rows are no less opened because a sweep lies elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (
        ("outputs/sweeps/s", "a b"),
        ("outputs/sweeps/beside", "a"),
        ("away/far", "b c"),
        ("away/strange", "a"),
    ):
        write_json(tmp_path / name / "sweep.json", {})
        opening = {"test": {"sha256": name, "hashes": rows}, "date": "today", "plan": [], "runs": [], "seeds": []}
        write_json(tmp_path / name / "confirm.json", {"openings": [opening]})
    runs.keep(tmp_path / "away/far", "far")
    folder = tmp_path / "outputs/sweeps/s"
    assert confirm._elsewhere(folder, "x", ["a", "b", "d"]) == (["far, today", "beside, today"], 2)
    (tmp_path / "outputs/sweeps.json").unlink()
    assert confirm._elsewhere(folder, "x", ["a", "b", "d"]) == (["beside, today"], 1)


def test_sealed_rows_that_could_not_be_scored_stay_unopened(sweep, cli, monkeypatch):
    """A row too long for the sweep: the opening would be on record for good, and the sweep never confirmed."""

    def refuse(run):
        raise DataError("rows.jsonl:7: a row must be at most data.max_length=256 tokens, this one has 900")

    honest = experiment.check_sealed
    monkeypatch.setattr(experiment, "check_sealed", refuse)
    code, _, err = cli(str(sweep), "--seeds", "1")
    assert code == DataError("").exit_code
    assert "rows.jsonl:7: a row must be at most data.max_length=256 tokens" in err
    assert "no sealed row was opened" in err
    assert not (sweep / "confirm.json").exists()
    monkeypatch.setattr(experiment, "check_sealed", honest)
    assert cli(str(sweep), "--seeds", "1")[0] == 0
