"""Fifty trials that diverge in one sweep: each is flagged at its step, and none is best."""

import json
import math

import optuna
import pytest
from conftest import UNWRITTEN

from ftexp import report
from ftexp.files import read_json
from ftexp.sweep import study, worker
from ftexp.train import sft

COUNT, HEALTHY, STEPS = 50, 3, 6
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.chaos
def test_none_of_fifty_diverged_trials_is_best(cli, tmp_path, monkeypatch):
    honest, at, calls = sft.token_mean, [COUNT], []  # the probes of the launch train, too

    def run_ticket(sweep, record, trial, real=worker.run_ticket):
        at[0] = study.ticket(trial._cached_frozen_trial)
        calls.clear()
        real(sweep, record, trial)

    def poisoned(*args):
        calls.append(1)
        number = at[0]
        planted = number < COUNT and len(calls) == 1 + number % STEPS
        return honest(*args) * (BAD[number % len(BAD)] if planted else 1)

    monkeypatch.setattr(worker, "run_ticket", run_ticket)
    monkeypatch.setattr(sft, "token_mean", poisoned)
    small = [t for t in UNWRITTEN if not t.startswith(("trainer.steps", "trainer.report"))]
    code, _, err = cli(*small, f"trainer.steps={STEPS}", "trainer.report_steps=1", "eval=loss", "track=none", "name=k",
                       f"seed={','.join(map(str, range(COUNT + HEALTHY)))}", "-m")  # fmt: skip
    assert code == 5, err[-2000:]
    sweep = tmp_path / "outputs" / "sweeps" / "k"
    trials = {int(p.parent.name): read_json(p) for p in sweep.glob("*/trial.json")}
    late = [n for n in range(COUNT) if not trials[n]["error"].startswith(f"diverged at step {1 + n % STEPS}: ")]
    assert late == []
    assert [trials[n]["state"] for n in range(COUNT, COUNT + HEALTHY)] == ["complete"] * HEALTHY
    record = optuna.load_study(study_name="k", storage=study.storage(sweep, None))
    assert study.ticket(record.best_trial) >= COUNT
    points = json.loads(report.export(sweep, "json"))["points"]
    (best,) = [p for p in points if p["best"]]
    assert min(best["trials"]) >= COUNT
