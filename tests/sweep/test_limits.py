"""Limits on plans: a sweep that passes one is refused, or its trials are skipped with their reasons, never silently."""

import json
import sys

import pytest
from conftest import TINY, UNWRITTEN

from ftexp import plan
from ftexp.errors import ConfigError
from ftexp.files import read_json
from ftexp.sweep import __main__ as sweeps
from ftexp.sweep import limits
from ftexp.sweep.options import Options, Over

SWEEP = [*UNWRITTEN, "track=none", "eval=loss", "name=s"]


def trials(folder, count):
    return [read_json(folder / "outputs/sweeps/s" / str(n) / "trial.json") for n in range(count)]


def between(tiny, low, high):
    """Return a number of trainable weights between those of two ranks."""
    a, b = (limits.planned(tiny(f"lora.r={r}"), Options()).trainable for r in (low, high))
    return (a + b) // 2


def test_amounts_by_hand(tiny):
    told = limits.planned(tiny(), Options())
    found = limits.amounts(told, Options(tokens_per_second=told.padded / 7200, usd_per_hour=0.29))
    assert found["hours"] == pytest.approx(2)
    assert found["usd"] == 0.58
    assert found["memory_gib"] == told.memory / 2**30
    assert found["tflop"] == told.flops / 1e12
    assert "usd" not in limits.amounts(told, Options(tokens_per_second=1.0))


def test_a_sweep_beyond_a_limit_is_refused_whole(cli, tiny, tmp_path):
    most = between(tiny, 4, 8)
    code, _, err = cli("lora.r=2,4,8,16", *SWEEP, f"sweep.plan_at_most={{trainable: {most}}}", "-m")
    assert code == 2
    assert "lora.r=8: takes " in err
    assert f" trainable, sweep.plan_at_most.trainable={most}" in err
    assert "sweep.over=skip leaves such trials out" in err
    assert "lora.r=4:" not in err
    assert not (tmp_path / "outputs").exists()


def test_trials_beyond_a_limit_are_skipped_and_on_record_and_run_once_it_is_raised(
    cli, tiny, tmp_path, monkeypatch, capsys
):
    given = ["lora.r=2,8,4", *SWEEP, "sweep.over=skip", "-m"]
    code, out, err = cli(*given, f"sweep.plan_at_most.trainable={between(tiny, 4, 8)}")
    assert code == 0, err
    told = trials(tmp_path, 3)
    assert [t["state"] for t in told] == ["complete", "skipped", "complete"]
    assert told[1]["error"].startswith("takes ")
    assert told[1]["config"]["lora.r"] == 8
    assert "trial 1 skipped takes" in err
    assert "2 complete, 1 skipped" in err
    assert "skipped" in out  # the leaderboard
    assert "trial 1 skipped: takes" in out
    assert (tmp_path / "outputs/sweeps/s/report.html").read_text().count(
        "trainable, sweep.plan_at_most.trainable="
    ) == 1
    monkeypatch.setattr(sys, "argv", ["ftexp.sweep", "ls", "--json"])
    assert sweeps.main() == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["complete"], row["skipped"], row["waiting"], row["failed"]) == (2, 1, 0, 0)
    before = trials(tmp_path, 3)
    code, _, err = cli(*given, f"sweep.plan_at_most.trainable={between(tiny, 4, 8)}")
    assert (code, trials(tmp_path, 3)) == (0, before)  # the same limit skips it again
    code, _, err = cli(*given, f"sweep.plan_at_most.trainable={between(tiny, 8, 16)}")
    assert code == 0, err
    assert [t["state"] for t in trials(tmp_path, 3)] == ["complete"] * 3
    assert trials(tmp_path, 1) == before[:1]  # what was complete stays


def test_sabotage_without_the_check_all_trials_would_run(cli, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "over", lambda *_: [])
    code, *_ = cli("lora.r=2,8", *SWEEP, "sweep.over=skip", f"sweep.plan_at_most.trainable={between(tiny, 4, 8)}", "-m")
    assert (code, [t["state"] for t in trials(tmp_path, 2)]) == (0, ["complete"] * 2)


def test_draws_of_a_search_are_held_to_the_limit_and_its_sampler_goes_elsewhere(cli, tiny, tmp_path):
    most = between(tiny, 8, 9)
    code, _, err = cli("lora.r=range(2,16)", *SWEEP, "sweep.sampler=tpe", "sweep.n_trials=5", "sweep.over=skip",
                       f"sweep.plan_at_most.trainable={most}", "-m")  # fmt: skip
    assert code == 0, err
    states = {(t["config"]["lora.r"] > 8, t["state"]) for t in trials(tmp_path, 5)}
    assert states == {(False, "complete"), (True, "skipped")}


def test_a_plan_names_what_a_sweep_would_refuse(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.chdir(tmp_path)
    given = [*TINY, "lora.r=4,8", f"sweep.plan_at_most.trainable={between(tiny, 4, 8)}", "-m"]
    monkeypatch.setattr(sys, "argv", ["ftexp plan", *given])
    assert plan.main() == plan.OVER
    assert "over the limit: trial 1 (lora.r=8) takes " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plan_at_most": {"ram": 1}}, r"sweep\.plan_at_most must be bounds on memory_gib, .*, got 'ram'"),
        ({"plan_at_most": {"usd": 1}}, r"plan_at_most of hours or usd needs sweep\.tokens_per_second"),
        ({"plan_at_most": {"usd": 1}, "tokens_per_second": 9}, r"plan_at_most of usd needs sweep\.usd_per_hour"),
        (
            {"plan_at_most": {"hours": 0}, "tokens_per_second": 9},
            r"plan_at_most\.hours must be a finite number above 0",
        ),
        ({"tokens_per_second": -1.0}, r"sweep\.tokens_per_second must be null or above 0, got -1\.0"),
        ({"usd_per_hour": float("nan")}, r"sweep\.usd_per_hour must be null or above 0, got nan"),
        ({"over": Over.skip}, r"sweep\.over=skip needs a bound in sweep\.plan_at_most"),
    ],
)
def test_limits_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Options(**given)
