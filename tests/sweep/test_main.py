"""`ftexp sweep ls|show|stop|resume|export` on sweeps of the tiny model."""

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import UNWRITTEN

from ftexp import runs
from ftexp.files import read_json
from ftexp.sweep import __main__ as verbs


def adapters(folder):
    return {p.parts[-3]: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*/adapter/*.safetensors")}


SWEEP = [*UNWRITTEN, "track=none", "eval=loss", "name=s"]


@pytest.fixture
def verb(cli, monkeypatch, capsys):
    """Return a function that runs `ftexp sweep ...` in this process."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["ftexp sweep", *argv])
        try:
            code = verbs.main()
        except SystemExit as left:
            code = left.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_list_show_and_export_tell_what_ran(cli, verb):
    assert cli("lora.r=2,4", *SWEEP, "-m")[0] == 0
    code, out, _ = verb("ls")
    assert code == 0
    assert "2/2" in out
    assert "ended" in out
    [row] = json.loads(verb("ls", "--json")[1])
    trials = json.loads(verb("show", "s", "--json")[1])
    best = min(trials, key=lambda t: t["valid/loss"])
    assert (row["name"], row["complete"], row["best_trials"]) == ("s", 2, [best["trial"]])
    assert row["best"] == pytest.approx(best["valid/loss"])
    assert "lora.r=2" in verb("show", "s")[1]
    exported = list(csv.DictReader(io.StringIO(verb("export", "s")[1])))
    assert [e["lora.r"] for e in exported] == ["2", "4"]
    assert [t["lora.r"] for t in trials] == [2, 4]
    assert float(exported[0]["valid/loss"]) == read_json_scores("s", 0)["valid/loss"]
    assert json.loads(verb("export", "outputs/sweeps/s", "--format", "json")[1]) == trials
    assert json.loads(verb("export", "s", "--json")[1]) == trials
    assert verbs._cell(["q_proj"]) == '["q_proj"]' and verbs._cell(0.5) == 0.5
    for name in ("stop", "resume"):
        assert json.loads(verb(name, "s", "--json")[1])["best_trials"] == row["best_trials"]


def test_a_sweep_in_a_folder_of_its_own_is_listed_and_found_by_name(cli, verb, tmp_path):
    for name, where in (("s", []), ("t", [f"hydra.sweep.dir={tmp_path}/away/here"])):
        assert cli("lora.r=2", *SWEEP[:-1], f"name={name}", *where, "-m")[0] == 0
    assert [row["name"] for row in json.loads(verb("ls", "--json")[1])] == ["s", "t"]
    titles = [line.split("│")[1].strip() for line in verb("ls")[1].splitlines() if "1/1" in line]
    assert titles == ["s", "t in away/here"]
    assert json.loads(verb("show", "t", "--json")[1])[0]["folder"] == "away/here/0"
    assert verb("stop", "t")[1].startswith("t is not running: 1 complete")
    assert verb("resume", "t")[0] == 0
    assert verb("show", "nope")[2].endswith("there are: s, t\n")
    shutil.rmtree(tmp_path / "away")
    assert [row["name"] for row in json.loads(verb("ls", "--json")[1])] == ["s"]
    assert verb("show", "t")[0] == 4


def test_a_sweep_whose_name_leads_nowhere_is_told_by_its_folder(cli, verb, tmp_path, monkeypatch):
    away = f"hydra.sweep.dir={tmp_path}/away/my sweep"
    assert cli("lora.r=2", *SWEEP, away, "-m")[0] == 0
    folder = tmp_path / "away/my sweep"
    assert runs.called(folder, "s") == "s"
    assert "resume s\n" in cli("lora.r=4", *SWEEP, away, "-m")[2]
    assert cli("lora.r=2", *SWEEP, "-m")[0] == 0  # another of the name: it leads to both
    assert "resume 'away/my sweep'\n" in cli("lora.r=4", *SWEEP, away, "-m")[2]
    holders = iter(["1 on here", None, None, None])
    monkeypatch.setattr(verbs, "run_by", lambda *_: next(holders))
    assert verb("stop", str(folder))[1].endswith("goes on with: ftexp sweep resume 'away/my sweep'\n")
    runs.LIST.unlink()
    assert runs.called(folder, "s") == "'away/my sweep'"
    shutil.rmtree(tmp_path / "outputs")
    assert runs.called(folder, "s") == "'away/my sweep'"


def test_a_sweep_whose_database_is_down_does_not_hide_the_others(cli, verb, tmp_path):
    for name in ("s", "down"):
        assert cli("lora.r=2", *SWEEP[:-1], f"name={name}", "-m")[0] == 0
    frozen = tmp_path / "outputs/sweeps/down/sweep.json"
    kept = read_json(frozen)
    kept["options"]["storage"] = "postgresql://someone@127.0.0.1:9/there"
    frozen.write_text(json.dumps(kept))
    code, out, err = verb("ls", "--json")
    assert (code, [row["name"] for row in json.loads(out)]) == (0, ["s"])
    assert "warning: down is not listed: sweep.storage=postgresql://someone@127.0.0.1:9/there cannot be opened" in err


def read_json_scores(name, number):
    from pathlib import Path

    return read_json(Path(f"outputs/sweeps/{name}/{number}/trial.json"))["scores"]


def test_unknown_name_lists_what_is_there(cli, verb):
    assert verb("show", "nope")[::2] == (4, "ftexp: nope: no sweep of this name in outputs/sweeps, and no folder of "
                                            "one; there are: none\n")  # fmt: skip
    assert verb("ls")[1].strip() == "no sweeps in outputs/sweeps"
    told = "ftexp: sweep must be followed by one of ls, show, stop, resume, export, got"
    assert verb("nope") == (2, "", f"{told} 'nope'\n")
    assert verb("lss") == (2, "", f"{told} 'lss'; did you mean ls?\n")
    assert verb("ls", "a") == (2, "", "ftexp: ls takes no name, got a; ftexp sweep show a shows one sweep\n")
    assert verb()[0] == 2 and verb("--help")[0] == 0


def test_resume_runs_what_was_frozen_and_nothing_else(cli, verb, tmp_path, monkeypatch):
    """Two of three trials are forgotten; `conf/` and the command are not looked at again."""
    from ftexp import overrides
    from ftexp.sweep import frozen, study, worker

    assert cli("lora.r=2,4,8", *SWEEP, "-m")[0] == 0
    folder = tmp_path / "outputs" / "sweeps" / "s"
    before = read_json(folder / "0" / "trial.json")["scores"]
    sweep = frozen.load(folder)
    (folder / study.JOURNAL).unlink()
    (folder / "1" / "trial.json").unlink()
    worker.open_study(sweep)
    monkeypatch.setattr(overrides, "CONF", tmp_path / "gone")
    code, out, err = verb("resume", "s")
    assert code == 0, err
    assert "3 of 3 trials to do" in err
    assert "lora.r=2: complete already" in err  # its folder has it; the record is written anew
    assert read_json(folder / "0" / "trial.json")["scores"] == before
    assert read_json(folder / "1" / "trial.json")["state"] == "complete"
    assert "best" in out
    assert "0 of 3 trials to do" in verb("resume", "s")[2]


def test_resume_refuses_rows_that_were_edited(cli, verb, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"say {n}", "completion": f"I say {n}"}) for n in range(40)]
    rows.write_text("\n".join(lines))
    given = [t for t in SWEEP if not t.startswith("data.rows")]
    assert cli("lora.r=2,4", *given, "data=jsonl", f"data.path={rows}", "data.template=plain", "-m")[0] == 0
    rows.write_text("\n".join(reversed(lines)))
    code, _, err = verb("resume", "s")
    assert code == 2
    assert "the rows changed since the sweep was launched" in err


def test_stop_of_a_sweep_that_does_not_run_changes_nothing(cli, verb):
    assert cli("lora.r=2", *SWEEP, "-m")[0] == 0
    code, out, _ = verb("stop", "s")
    assert code == 0
    assert out.startswith("s is not running: 1 complete")


def test_helper_that_outlives_the_launch_is_told_and_stopped(cli, verb, tmp_path, monkeypatch):
    """It is at a trial, and nobody holds the lock of the launch: `ls` said "stopped", and `stop` did nothing."""
    from ftexp.sweep import study, worker

    assert cli("lora.r=2", *SWEEP, "-m")[0] == 0
    _, record = verbs.opened(tmp_path / "outputs" / "sweeps" / "s")
    study.queue(record, [None, {"lora.r": "4"}])
    study.claim(record)
    me = f"{os.getpid()} on {study.HOST}"
    assert json.loads(verb("ls", "--json")[1])[0]["run_by"] == me
    monkeypatch.setattr(verbs, "STOP_SECONDS", 0)
    code, _, err = verb("stop", "s")
    assert code == 4 and f"s: process {me} still runs" in err
    assert record.user_attrs[worker.LEAVE] and record.user_attrs[worker.STOP]
    monkeypatch.setattr(study, "started", lambda pid: None)
    assert json.loads(verb("ls", "--json")[1])[0]["run_by"] is None
    assert verb("stop", "s")[1].startswith("s is not running: 1 complete, 1 running")


@pytest.mark.parametrize("again", ["the same command", "resume"])
def test_order_to_stop_reaches_a_launch_that_still_gets_ready(cli, verb, tmp_path, monkeypatch, again):
    """It was taken back with what had stopped the launch before, and 300 trials ran on."""
    from ftexp.sweep import plugin, study, worker

    assert cli("lora.r=2,4", *SWEEP, "-m")[0] == 0
    folder = tmp_path / "outputs" / "sweeps" / "s"
    shutil.rmtree(folder / "1")
    _, record = verbs.opened(folder)
    for mark in (worker.STOP, worker.LEAVE):
        record.set_user_attr(mark, "of the launch before")
    honest, seen = plugin._rows, []

    def rows(*given):
        seen.append(record.user_attrs.get(worker.LEAVE))
        verbs._ask_to_stop(record)
        return honest(*given)

    monkeypatch.setattr(plugin, "_rows", rows)
    code, _, err = verb("resume", "s") if again == "resume" else cli("lora.r=2,4", *SWEEP, "-m")
    assert (code, seen) == (75, [None]) and "sweep s was stopped: " in err
    assert [t.state.name for t in study.counted(record)] == ["COMPLETE", "WAITING"]
    monkeypatch.setattr(plugin, "_rows", honest)
    assert cli("lora.r=2,4", *SWEEP, "-m")[0] == 0


def test_order_to_stop_that_a_launch_took_back_is_given_again(cli, verb, tmp_path, monkeypatch):
    """Between the lock of a launch and its look at the record; one to a later launch is not for that."""
    from ftexp.sweep import worker

    assert cli("lora.r=2", *SWEEP, "-m")[0] == 0
    _, record = verbs.opened(tmp_path / "outputs" / "sweeps" / "s")
    holders, seen = iter(["1 on here", "1 on here", "1 on here", "2 on here", None, None, None]), []

    def taken_back(seconds):
        seen.append(record.user_attrs.get(worker.LEAVE))
        record.set_user_attr(worker.LEAVE, None)

    monkeypatch.setattr(verbs, "run_by", lambda *_: next(holders))
    monkeypatch.setattr(verbs.time, "sleep", taken_back)
    assert verb("stop", "s")[0] == 0
    assert seen == [True, True, None]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_sweep_keeps_checkpoints_and_goes_on_to_the_same_bits(cli, verb, tmp_path, workers):
    """A long trial is stopped in its middle by name; `resume` ends it with the bits of an undisturbed sweep.

    The undisturbed one runs in this process: where a trial runs changes no bit.
    """
    long = [t for t in SWEEP if ".steps" not in t] + ["trainer.steps=150", "trainer.report_steps=0"]
    calm = [t if t != "name=s" else "name=calm" for t in long]
    assert cli("lora.r=2", *calm, "-m")[0] == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "ftexp.run", "lora.r=2", *long, f"sweep.workers={workers}", "-m"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = tmp_path / "outputs" / "sweeps" / "s"
    until = time.monotonic() + 120
    while not (folder / "0" / "metrics.jsonl").exists() or not (folder / "0" / "metrics.jsonl").read_text():
        assert time.monotonic() < until
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    code, out, err = verb("stop", "s")
    assert code == 0, err
    assert "s stopped: 1 waiting" in out
    assert process.wait(60) == 75
    assert "sweep s was stopped" in process.stderr.read() or workers == 0
    assert read_json(folder / "0" / "trial.json")["state"] == "preempted"
    shown = verb("show", "s")[1]
    assert verb("resume", "s")[0] == 0
    [step] = read_json(folder / "0" / "trial.json")["resumed_at"]
    assert f"waiting, goes on from step {step} " in shown
    assert 1 <= step < 150
    assert adapters(folder) == adapters(tmp_path / "outputs" / "sweeps" / "calm")


def test_resume_from_elsewhere_finds_what_is_named_from_the_folder_of_the_launch(cli, verb, tmp_path, monkeypatch):
    """Rows and tracking store are relative: from another folder the rows were missing, and the store a new one."""
    lines = [json.dumps({"prompt": f"say {n}", "completion": f"I say {n}"}) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    given = [t for t in UNWRITTEN if not t.startswith("data.")]
    given += ["data=jsonl", "data.path=rows.jsonl", "data.template=plain", "data.valid=8", "eval=loss", "name=s"]
    assert cli("lora.r=2,4", *given, "track.uri=sqlite:///my.db", "-m")[0] == 0
    folder = tmp_path / "outputs" / "sweeps" / "s"
    (folder / "1" / "trial.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    code, _, err = verb("resume", str(link / "outputs" / "sweeps" / "s"))
    assert code == 0, err
    assert f"goes on in {tmp_path}, where it was launched" in err
    assert read_json(folder / "1" / "trial.json")["state"] == "complete"
    assert not list((tmp_path / "elsewhere").iterdir())
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-copy")  # a copy goes on in its own folder
    copy = tmp_path.parent / f"{tmp_path.name}-copy"
    monkeypatch.chdir(copy)
    code, _, err = verb("resume", "s")
    assert (code, "goes on in" in err) == (0, False), err
