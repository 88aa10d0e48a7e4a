"""What becomes of a ticket: every outcome has its state and reason, and the others go on."""

import errno
import math
import threading
import time
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from ftexp import experiment, facts, model
from ftexp.errors import DataError, Diverged, MachineError, OutOfTime, Pruned, Unusable
from ftexp.files import write_json
from ftexp.model import compute
from ftexp.sweep import frozen, space, study, worker
from ftexp.sweep.options import Options, Pruner, Sampler
from ftexp.train import control
from ftexp.train.control import Rung


@pytest.fixture
def sweep(tmp_path, composed, monkeypatch):
    """Return a function that makes a sweep whose trials are a formula, and its record."""

    def make(*given, objectives=("valid/loss",), **options):
        run = composed("model=tiny")
        searched = space.parse(given)
        made = frozen.Frozen(tmp_path, "s", searched, Options(**options), list(objectives), None, "", {})
        made.save()
        monkeypatch.setattr(frozen.Frozen, "run", lambda self, point, replicate: run)
        record = worker.open_study(made)
        settle(made, record)
        return made, record

    return make


def settle(made, record):
    """Do what a launch does with the record first."""
    from ftexp.sweep.plugin import tickets

    grid = [] if made.options.sampler is not Sampler.grid else made.space.grid()
    study.settle(record, tickets(grid, made.options, made.space), made.options.max_retries)


def trials(monkeypatch, outcomes):
    """Replace a run by the next of some outcomes: scores, or an exception to raise."""
    left = iter(outcomes)

    def execute(run, folder, label, parent, control):
        outcome = next(left)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(experiment, "execute", execute)


def told(record):
    return [
        (t.state.name, t.user_attrs.get("ftexp:kind", ""), t.user_attrs.get("ftexp:reason", ""))
        for t in study.counted(record)
    ]


def test_qmc_with_baselines_goes_on_in_the_sequence_as_it_was_begun(sweep):
    """c229c32 gave ticket n the point n, baselines or not, and kept no `sweep.sampler_args` in identity.json."""
    made, record = sweep("lr=interval(0.0,1.0)", sampler=Sampler.qmc, n_trials=4, baselines=[{"lr": 0.5}])
    drawn = [study._sobol(made.space, replace(made.options, baselines=[]), n) for n in range(4)]

    def chosen(number):
        return worker.choose(made, record, optuna.trial.Trial(record, record.trials[number]._trial_id), number)

    write_json(made.folder / "identity.json", {"sweep.sampler": "qmc"})
    assert [chosen(0), chosen(2), chosen(3)] == [{"lr": 0.5}, drawn[2], drawn[3]]
    write_json(made.folder / "identity.json", {"sweep.sampler": "qmc", study.ARGS: "{}"})
    assert chosen(1) == drawn[0]


def test_every_outcome_has_its_state_and_reason(sweep, monkeypatch):
    made, record = sweep("a=1,2,3,4,5,6,7,8")
    trials(monkeypatch, [
        {"valid/loss": 0.5}, Diverged("diverged at step 3: train/loss is nan"), MemoryError("no room"),
        RuntimeError("CUDA out of memory. Tried"), KeyError("bug"), OutOfTime("ran out of time"), Pruned("pruned at step 2"),
        DataError("rows changed"),
    ])  # fmt: skip
    worker.work(made, record)
    assert told(record) == [
        ("COMPLETE", "", ""),
        ("PRUNED", "diverged", "diverged at step 3: train/loss is nan"),
        ("PRUNED", "oom", "out of memory: no room"),
        ("PRUNED", "oom", "out of memory: CUDA out of memory. Tried"),
        ("FAIL", "crash", "KeyError: 'bug'"),
        ("FAIL", "timeout", "ran out of time"),
        ("PRUNED", "", "pruned at step 2"),
        ("FAIL", "data", "rows changed"),
    ]
    assert record.best_trial.number == 0


def test_fault_of_the_machine_ends_its_worker_and_fails_no_trial(sweep, monkeypatch):
    """The mount of one node is gone: whoever starts workers tries the ticket elsewhere, a few times."""
    monkeypatch.setenv(worker.TOKEN, "bad")
    made, record = sweep("a=1,2,3")
    trials(monkeypatch, [MachineError("no model folder at /mnt/m"), {"valid/loss": 0.5}])
    assert worker._main(replace(made, code=facts.code())) == 4
    assert [t.state.name for t in study.counted(record)] == ["RUNNING", "WAITING", "WAITING"]
    study.reap(record, 2, ended={"bad"})
    trials(monkeypatch, [{"valid/loss": 0.5}] * 3)
    worker.work(made, record)
    assert [t.state.name for t in study.counted(record)] == ["COMPLETE"] * 3


def test_ticket_that_no_machine_can_run_fails_with_what_was_amiss(sweep, monkeypatch):
    monkeypatch.setenv(worker.TOKEN, "bad")
    made, record = sweep("a=1", max_retries=0)
    for _ in range(3):
        trials(monkeypatch, [MachineError("no model folder at /mnt/m")])
        assert [t.state.name for t in study.counted(record)] == ["WAITING"]  # faults are no retries
        assert worker._main(replace(made, code=facts.code())) == 4
        study.reap(record, 0, ended={"bad"})
    assert [(t.state.name, t.user_attrs["ftexp:reason"]) for t in study.counted(record)] == [
        ("FAIL", "crash: no model folder at /mnt/m")
    ]
    worker.stop_after_failures(replace(made, options=replace(made.options, max_failures=1)), record)
    assert record.user_attrs[worker.STOP] == "1 trials failed, sweep.max_failures=1"


def test_model_that_is_there_and_cannot_be_loaded_fails_its_trial_at_once(sweep, monkeypatch, tmp_path):
    """Another machine would not load it either; a folder that is gone may be a mount."""
    (tmp_path / "bad").mkdir()
    for path, error in ((tmp_path / "bad", Unusable), (tmp_path / "gone", MachineError)):
        with pytest.raises(MachineError) as caught, model.loading(str(path), "model.path="):
            raise OSError(f"no file named model.safetensors in {path}")
        assert type(caught.value) is error
    with pytest.raises(MachineError) as caught, model.loading(str(tmp_path / "bad")):
        raise OSError(errno.ESTALE, "stale file handle")
    assert type(caught.value) is MachineError
    monkeypatch.setenv(worker.TOKEN, "a")
    made, record = sweep("a=1,2")
    trials(monkeypatch, [Unusable("m/bad cannot be loaded"), {"valid/loss": 0.5}])
    worker.work(made, record)
    assert told(record) == [("FAIL", "crash", "m/bad cannot be loaded"), ("COMPLETE", "", "")]


@pytest.mark.parametrize(("end", "code"), [(MachineError("no GPU"), 4), (KeyboardInterrupt(), worker.PREEMPTED)])
def test_worker_that_was_taken_for_dead_queues_its_ticket_no_second_time(sweep, monkeypatch, end, code):
    """It was stopped for minutes by its machine; what it says at its end is of an attempt that is over."""
    monkeypatch.setenv(worker.TOKEN, "slow")
    made, record = sweep("a=1")

    def taken_for_dead(*_):
        study.reap(record, 2, ended={"slow"})
        raise end

    monkeypatch.setattr(worker, "_run", taken_for_dead)
    assert worker._main(replace(made, code=facts.code())) == code
    assert [t.state.name for t in record.get_trials()] == ["FAIL", "WAITING"]


@pytest.mark.parametrize("pruner", [Pruner.asha, Pruner.hyperband])
def test_rungs_of_an_attempt_that_was_lost_judge_nobody(sweep, monkeypatch, pruner):
    """Sixteen losses at three rungs; every third trial is preempted twice after its first rung, which changes no end."""
    losses = [4.0, 3.0, 1.0, 2.0, *np.random.default_rng(0).uniform(1, 5, 12)]
    args = {"reduction_factor": 2} | ({"min_resource": 1} if pruner is Pruner.asha else {"max_resource": 4})
    ends = []
    for preempted in (0, 2):
        made, record = sweep(f"a={','.join(map(str, range(16)))}", pruner=pruner, pruner_args=args)
        record = optuna.create_study(study_name=f"s{preempted}", pruner=study.pruner(made.options, 1))
        study.queue(record, made.space.grid())
        for n, loss in enumerate(losses):
            for attempt in range(1 + preempted * (n % 3 == 2)):
                trial, reason = study.claim(record), None
                for step in (1, 2, 4):
                    reason = reason or worker.judge(made, trial, made.run({}, 0))(Rung(loss), step)
                    if attempt < preempted * (n % 3 == 2):
                        worker.give_back(record, trial)
                        break
            ends.append(reason is not None)
            record.tell(trial, loss if reason is None else None, state=None if reason is None else TrialState.PRUNED)
    assert ends[:16] == ends[16:]
    assert 0 < sum(ends[:16]) < 16


@pytest.mark.parametrize("pruner", [Pruner.asha, Pruner.hyperband])
@pytest.mark.parametrize("losses", [[3.0, 5.0, 1.0, 2.5, 8.0, 4.0, 1.5, 7.0], [3.0, 5.0, 1.0, 2.5, 8.0, 4.0, 1.5]])
def test_halving_of_who_stand_at_a_rung_together_keeps_the_better_half(sweep, pruner, losses):
    """Whoever is asked first, as in a pack: judged as each comes, the first would go on as the best so far."""
    args = {"reduction_factor": 2} | ({"min_resource": 1} if pruner is Pruner.asha else {"max_resource": 4})
    made, record = sweep(f"a={','.join(map(str, range(len(losses))))}", pruner=pruner, pruner_args=args)
    kept = []
    for number, order in enumerate([(0, 1, 2, 3, 4, 5, 6, 7), (7, 6, 5, 4, 3, 2, 1, 0), (2, 6, 3, 0, 5, 1, 7, 4)]):
        record = optuna.create_study(study_name=f"s{number}", pruner=study.pruner(made.options, 1))
        study.queue(record, made.space.grid())
        judges = {n: worker.judge(made, study.claim(record), made.run({}, 0)) for n in range(len(losses))}
        left = [n for n in order if n < len(losses)]
        for step in (1, 2, 3, 4):
            rungs = {n: Rung(losses[n] / step) for n in left}
            for n in left:
                judges[n].tell(rungs[n], step)
            left = [n for n in left if judges[n].ask(rungs[n], step) is None]
            kept.append({*left})
        if pruner is Pruner.asha:  # Hyperband's brackets are drawn
            marks = [t.system_attrs for t in study.counted(record)]
            assert marks[2] == marks[2] | {f"completed_rung_{n}": losses[2] / step for n, step in enumerate((1, 2, 4))}
            assert [len(m.keys() & {f"completed_rung_{n}" for n in range(9)}) for m in marks][4] == 1
    assert kept[:4] == kept[4:8] == kept[8:]
    if pruner is Pruner.asha:
        better = [{0, 2, 3, 6}, {2, 6}, {2, 6}, {2}] if len(losses) == 8 else [{2, 3, 6}, {2}, {2}, {2}]
        assert kept[:4] == better


def test_a_trial_by_itself_is_judged_as_it_comes(sweep):
    """Nothing is entered ahead of what is asked, and the record is asked no more than once a rung."""
    made, record = sweep("a=1,2", pruner=Pruner.asha, pruner_args={"min_resource": 1, "reduction_factor": 2})
    asked, prune = [], record.pruner.prune
    record.pruner.prune = lambda *given: asked.append(given) or prune(*given)
    judge = worker.judge(made, study.claim(record), made.run({}, 0))
    assert [judge(Rung(1.0), step) for step in (1, 2, 3)] == [None] * 3
    assert len(asked) == 3
    judge.tell(Rung(1.0), 3.5)  # beside others, between two rungs
    assert judge.ask(Rung(1.0), 3.5) is None
    assert len(asked) == 4
    assert judge(Rung(1.0), 4) is None
    assert len(asked) == 5


def test_fault_of_the_machine_fails_its_trial_where_there_is_no_other_worker(sweep, monkeypatch):
    made, record = sweep("a=1,2")
    trials(monkeypatch, [MachineError("no network"), {"valid/loss": 0.5}])
    worker.work(made, record)
    assert told(record) == [("FAIL", "machine", "no network"), ("COMPLETE", "", "")]
    settle(made, record)  # the next launch tries it again: what was amiss may have been mended
    trials(monkeypatch, [{"valid/loss": 0.25}])
    worker.work(made, record)
    assert told(record) == [("COMPLETE", "", "")] * 2


def test_what_no_machine_can_use_is_not_tried_again(sweep, monkeypatch):
    made, record = sweep("a=1")
    trials(monkeypatch, [Unusable("model.path=/m: its weights are damaged")])
    worker.work(made, record)
    settle(made, record)
    assert told(record) == [("FAIL", "crash", "model.path=/m: its weights are damaged")]


@pytest.mark.parametrize(
    ("error", "state"),
    [("CUDA error: device-side assert triggered", "FAIL"), ("CUDA error: launch failure", "RUNNING")],
)
def test_process_that_has_lost_its_gpu_takes_no_further_ticket(sweep, monkeypatch, error, state):
    """All of its trials would fail at once; an assertion is made by the trial's own numbers, so that one has failed."""
    made, record = sweep("a=1,2,3")
    trials(monkeypatch, [RuntimeError(error)])
    monkeypatch.setattr(compute, "is_lost", lambda: True)
    with pytest.raises(MachineError, match="GPU"):
        worker.work(made, record)
    assert [t.state.name for t in study.counted(record)] == [state, "WAITING", "WAITING"]


def test_worker_tells_that_it_lives_after_a_record_that_failed(sweep, monkeypatch):
    made, record = sweep("a=1")
    trial, store, heard = study.claim(record), record._storage, []
    monkeypatch.setattr(worker, "BEAT_SECONDS", 0.0)

    def flaky(number, key, value):
        heard.append(key)
        if len(heard) < 3:
            raise OSError("stale file handle")

    monkeypatch.setattr(store, "set_trial_user_attr", flaky)
    until = time.monotonic() + 10
    with worker._beating(record, 0.01, trial):
        while len(heard) < 5 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(heard) >= 5


@pytest.mark.parametrize("started", [True, False])
def test_worker_that_hears_that_it_was_taken_for_dead_leaves_the_folder_alone(sweep, monkeypatch, started, capfd):
    """A supervisor's worker ends where it stands: a checkpoint of its would lie in the other one's folder."""
    made, record = sweep("a=1,2")
    trial, ended = study.claim(record, "w"), []
    if started:
        monkeypatch.setenv(worker.TOKEN, "w")
    monkeypatch.setattr(worker, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(worker.os, "_exit", ended.append)
    monkeypatch.setattr(control, "LEAVE", leave := threading.Event())
    with worker._beating(record, 0.01, trial):
        time.sleep(0.1)
        assert not ended and not leave.is_set()
        study.reap(record, 2, ended={"w"})
        until = time.monotonic() + 10
        while not (ended or leave.is_set()) and time.monotonic() < until:
            time.sleep(0.01)
    assert bool(ended) == started
    assert started or leave.is_set()
    assert "trial 0: taken for dead by another process" in capfd.readouterr().err


def test_worker_goes_on_telling_after_a_record_that_failed_at_a_trial_that_is_over(sweep, monkeypatch):
    """Whether it was taken for dead is asked of the record, which may be away at that moment too."""
    made, record = sweep("a=1,2")
    both, asked = [study.claim(record, "w") for _ in range(2)], []
    monkeypatch.setattr(worker, "BEAT_SECONDS", 0.0)
    worker._tell(made, record, both[0], worker.Outcome("failed", "diverged", "nan"), None)

    def away(record, trial):
        asked.append(trial)
        raise OSError("stale file handle")

    monkeypatch.setattr(study, "was_reaped", away)
    until = time.monotonic() + 10
    with worker._beating(record, 0.01, *both):
        while len(asked) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(asked) >= 3


def test_end_of_one_of_a_pack_ends_no_other(sweep, monkeypatch):
    made, record = sweep("a=1,2")
    both = [study.claim(record, "w") for _ in range(2)]
    monkeypatch.setenv(worker.TOKEN, "w")
    monkeypatch.setattr(worker, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(worker.os, "_exit", lambda code: pytest.fail("ended"))
    monkeypatch.setattr(worker, "_abandon", lambda trial: beats.append("abandoned"))
    beats = []
    with worker._beating(record, 0.01, *both):
        worker._tell(made, record, both[0], worker.Outcome("failed", "diverged", "nan"), None)
        worker.give_back(record, both[1])
        time.sleep(0.2)
    assert not beats


def test_a_ticket_that_is_to_be_alone_is_claimed_alone(sweep):
    made, record = sweep("a=1,2,3,4")
    for _ in range(2):
        study.claim(record, "w").set_user_attr(study.PACK, 2)
    study.reap(record, 2, ended={"w"})
    claims = [[study.ticket(t._cached_frozen_trial) for t in worker._claimed(record, 4)] for _ in range(4)]
    assert claims == [[0], [1], [2, 3], []]


@pytest.mark.parametrize("lost", [True, False])
def test_replicates_share_the_point_of_an_attempt_that_waits_again(sweep, lost):
    """One that met a fault, or was given back, has its point in what it was queued with alone, and is run later."""
    made, record = sweep("a=interval(0.0,1.0)", sampler=Sampler.random, n_trials=2, replicates=2)
    first = study.claim(record, "w")
    point = worker.choose(made, record, first, 0)
    if lost:  # between the two acts of giving it back
        first.set_user_attr("ftexp:lost", True)
        record._storage.set_trial_state_values(first._trial_id, TrialState.FAIL)
    else:
        worker.give_back(record, first)
    second = next(t for t in iter(lambda: study.claim(record, "w"), None) if study.ticket(t._cached_frozen_trial) == 1)
    assert worker.choose(made, record, second, 1) == point


@pytest.mark.parametrize("turned", [False, True])
def test_generation_is_known_whichever_replicate_asked_for_the_point(sweep, turned):
    """Two workers claim two replicates, and the second may be the one that proposes; the point was no parent then."""
    given = {"n_trials": 6, "replicates": 2, "sampler_args": {"population_size": 2}}
    made, record = sweep("a=interval(0.0,1.0)", sampler=Sampler.nsga2, **given)
    for _ in range(6):
        both = [study.claim(record), study.claim(record)]
        for trial in both[::-1] if turned else both:
            worker.choose(made, record, trial, study.ticket(trial._cached_frozen_trial))
        for trial in both:
            record.tell(trial, [1.0])
    told = [t.system_attrs.get("NSGAIISampler:generation") for t in worker.history(made, record)]
    assert told == [0, 0, 1, 1, 2, 2]


def test_worker_that_was_taken_for_dead_ends_in_one_line(sweep, monkeypatch, capfd):
    made, record = sweep("a=1")
    trial = study.claim(record)
    study.reap(record, 2, ended={""})
    worker._tell(made, record, trial, worker.Outcome("complete"), [0.5])
    assert "this process was taken for dead meanwhile" in capfd.readouterr().err


def test_max_failures_stops_and_keeps_the_rest_waiting(sweep, monkeypatch):
    made, record = sweep("a=1,2,3,4,5", max_failures=2)
    trials(monkeypatch, [{"valid/loss": 1.0}, KeyError("a"), Diverged("b"), {"valid/loss": 1.0}])
    worker.work(made, record)
    assert [t.state.name for t in study.counted(record)] == ["COMPLETE", "FAIL", "PRUNED", "WAITING", "WAITING"]
    assert record.user_attrs[worker.STOP] == "2 trials failed, sweep.max_failures=2"


def test_max_failures_that_were_reached_let_nobody_claim(sweep, monkeypatch):
    """A launch takes back what stopped the one before; each further one trained a trial beyond the limit."""
    made, record = sweep("a=1,2,3,4,5", max_failures=1)
    trials(monkeypatch, [KeyError("a"), {"valid/loss": 1.0}])
    for _ in range(2):
        worker.work(made, record)
        assert [t.state.name for t in study.counted(record)] == ["FAIL"] + ["WAITING"] * 4
        record.set_user_attr(worker.STOP, None)
    trials(monkeypatch, [{"valid/loss": 1.0}] * 4)
    worker.work(replace(made, options=replace(made.options, max_failures=2)), record)
    assert [t.state.name for t in study.counted(record)] == ["FAIL"] + ["COMPLETE"] * 4


def test_interrupted_ticket_goes_back_with_its_point_and_no_retry_counted(sweep, monkeypatch):
    made, record = sweep("a=interval(0.0,1.0)", sampler=Sampler.random, n_trials=2)
    trials(monkeypatch, [KeyboardInterrupt(), {"valid/loss": 1.0}, {"valid/loss": 1.0}])
    with pytest.raises(KeyboardInterrupt):
        worker.work(made, record)
    first = record.get_trials()[0].system_attrs["fixed_params"]
    worker.work(made, record)
    done = study.counted(record)
    assert [t.state for t in done] == [TrialState.COMPLETE] * 2
    assert done[0].params == first
    assert done[0].user_attrs["ftexp:retries"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pack", [1, 2])
def test_score_that_is_undefined_fails_its_trial_and_ends_no_sweep(sweep, monkeypatch, pack, value):
    """ROC-AUC of held-out rows that all have one label; Optuna takes no NaN, neither as value nor as bound.

    An infinite perplexity is null in `trial.json`, where readers take it for undefined too.
    """
    made, record = sweep("a=1,2", objectives=("valid/roc_auc_macro",), at_most={"valid/f1_macro": 0.5}, pack=pack)
    ends = [
        {"valid/roc_auc_macro": value, "valid/f1_macro": 0.1},
        {"valid/roc_auc_macro": 0.5, "valid/f1_macro": math.nan},
    ]
    trials(monkeypatch, ends)
    monkeypatch.setattr(experiment, "together", lambda asked, over, *_: [over(n, end) for n, end in enumerate(ends)])
    worker.work(made, record)
    why = "valid/roc_auc_macro cannot be told of these held-out rows"
    assert told(record) == [("FAIL", "undefined", why), ("COMPLETE", "", "")]
    assert study.counted(record)[1].constraints == {"valid/f1_macro at most 0.5": math.inf}
    assert not study.within(study.counted(record)[1], {"valid/f1_macro": 0.5}, made.folder)


def test_point_that_diverges_with_one_seed_is_avoided(sweep, monkeypatch):
    """Its other seed is no score of the point: the sampler went on around it, and no such point can be ranked."""
    made, record = sweep("a=interval(0.0,1.0)", sampler=Sampler.tpe, n_trials=2, replicates=2)
    bad = Diverged("diverged at step 3")
    trials(monkeypatch, [{"valid/loss": 0.5}, bad, {"valid/loss": 2.0}, {"valid/loss": 4.0}])
    worker.work(made, record)
    points = [(t.state.name, t.values) for t in worker.history(made, record)]
    assert points == [("PRUNED", None), ("COMPLETE", [3.0])]


def test_replicates_share_their_point_and_count_as_their_mean(sweep, monkeypatch):
    made, record = sweep("a=interval(0.0,1.0)", sampler=Sampler.tpe, n_trials=2, replicates=3)
    trials(monkeypatch, [{"valid/loss": v} for v in (1.0, 2.0, 6.0, 4.0, 4.0, 4.0)])
    worker.work(made, record)
    points = [t.params["a"] for t in study.counted(record)]
    assert len(points) == 6
    assert len(set(points[:3])) == len(set(points[3:])) == 1
    assert points[0] != points[3]
    assert [t.values for t in worker.history(made, record)] == [[3.0], [4.0]]
    named = replace(made, objectives=["valid/perplexity"])  # whose mean over seeds is the leaderboard's, geometric
    assert worker.history(named, record)[0].values == [pytest.approx(12 ** (1 / 3))]


def test_bound_makes_a_trial_infeasible(sweep, monkeypatch):
    made, record = sweep("a=1,2", at_most={"cost/memory_gib": 2.0})
    trials(monkeypatch, [{"valid/loss": 0.1, "cost/memory_gib": 3.0}, {"valid/loss": 0.9, "cost/memory_gib": 1.0}])
    worker.work(made, record)
    assert record.best_trial.number == 1


def test_sampler_knows_the_bounds_of_now_and_the_worst_of_replicates(sweep, monkeypatch):
    """A sweep may be launched again with other bounds, or with bounds for the first time."""
    given = {"sampler": Sampler.tpe, "n_trials": 2, "replicates": 2}
    made, record = sweep("a=interval(0.0,1.0)", at_most={"cost/memory_gib": 2.0}, **given)
    sizes = (1.0, 3.0, 1.5, 1.0)
    trials(monkeypatch, [{"valid/loss": 0.5, "cost/memory_gib": gib} for gib in sizes])
    worker.work(made, record)
    for n, gib in enumerate(sizes):
        write_json(made.folder / str(n) / "trial.json",
                   {"state": "complete", "config": {}, "scores": {"cost/seconds": 10 * gib}})  # fmt: skip

    def told(**bounds):
        now = replace(made, options=replace(made.options, at_most={f"cost/{k}": v for k, v in bounds.items()}))
        return [t.constraints for t in worker.history(now, record)]

    assert told(memory_gib=2.0) == [{"cost/memory_gib at most 2.0": 1.0}, {"cost/memory_gib at most 2.0": -0.5}]
    assert told(memory_gib=4.0) == [{"cost/memory_gib at most 4.0": -1.0}, {"cost/memory_gib at most 4.0": -2.5}]
    assert told(seconds=20) == [{"cost/seconds at most 20": 10.0}, {"cost/seconds at most 20": -5.0}]
    assert told() == [{}, {}]


def test_pruner_hears_of_every_rung_and_stops_the_laggard(sweep, monkeypatch):
    made, record = sweep("a=1,2,3,4,5,6", pruner=Pruner.median)
    reasons = []

    def execute(run, folder, label, parent, control):
        slow = len(study.counted(record)) and folder.name == "5"
        for step in (1, 2, 3):
            if reason := control.judge(Rung(9.0 if slow else 1.0 / step), step):
                reasons.append(reason)
                raise Pruned(reason)
        return {"valid/loss": 0.3}

    monkeypatch.setattr(experiment, "execute", execute)
    worker.work(made, record)
    assert [t.state.name for t in study.counted(record)] == ["COMPLETE"] * 5 + ["PRUNED"]
    assert reasons == ["pruned at step 1: valid/loss 9.0000"]


def test_several_objectives_are_not_pruned(sweep, monkeypatch):
    made, record = sweep("a=1,2", objectives=("valid/loss", "cost/memory_gib"), pruner=Pruner.median)
    monkeypatch.setattr(
        experiment,
        "execute",
        lambda *a: {"valid/loss": 1.0, "cost/memory_gib": 1.0} if a[4].judge is None else pytest.fail("has a judge"),
    )
    worker.work(made, record)
    assert len(record.best_trials) == 2


def test_rows_edited_after_the_launch_fail_the_trial(sweep, monkeypatch, composed, tmp_path):
    from ftexp import config

    made, record = sweep("a=1,2")
    run = composed("model=tiny")
    made.rows[config.digest(run.data)] = "another digest"
    monkeypatch.setattr(experiment, "execute", lambda *a: pytest.fail("was run"))
    worker.work(made, record)
    assert {t.user_attrs["ftexp:kind"] for t in study.counted(record)} == {"data"}
    assert "the rows changed after the sweep was launched" in study.counted(record)[0].user_attrs["ftexp:reason"]


def test_pruner_stops_the_laggard_where_the_objective_is_to_be_large(sweep, monkeypatch):
    """Rungs are losses, where less is better whatever the objective's direction is."""
    made, record = sweep("a=1,2,3,4,5,6", objectives=("valid/exact_match",), pruner=Pruner.median)
    stopped = []

    def execute(run, folder, label, parent, control):
        for step in (1, 2, 3):
            loss = {"3": 0.01, "5": 9.0}.get(folder.name, 1.0 / step)
            if reason := control.judge(Rung(loss), step):
                stopped.append(folder.name)
                raise Pruned(reason)
        return {"valid/exact_match": 0.3}

    monkeypatch.setattr(experiment, "execute", execute)
    worker.work(made, record)
    assert stopped == ["5"]


def test_metric_that_a_trial_lacks_breaks_its_bound(sweep, monkeypatch):
    made, record = sweep("a=1,2", at_most={"cost/gpu_memory_gib": 2.0})
    trials(monkeypatch, [{"valid/loss": 0.1}, {"valid/loss": 0.9, "cost/gpu_memory_gib": 1.0}])
    worker.work(made, record)
    assert record.best_trial.number == 1


def test_baseline_is_run_as_its_axis_spells_it(sweep, monkeypatch):
    made, record = sweep("a=1,2", sampler=Sampler.random, n_trials=1, baselines=[{"a": 2}])
    trials(monkeypatch, [{"valid/loss": 0.1}])
    worker.work(made, record)
    assert study.counted(record)[0].params == {"a": "2"}


def test_reward_model_that_was_trained_again_fails_the_trial(composed):
    from types import SimpleNamespace

    kept = {}
    trial = SimpleNamespace(study=SimpleNamespace(user_attrs=kept, set_user_attr=kept.__setitem__))
    facts = {"weights_sha256": "w", "tokenizer_sha256": "t", "template_sha256": "c", "compute": {"dtype": "float32"}}
    judged = facts | {"reward": {"run": "judge", "trained_sha256": "a"}}
    check = worker.same_model(trial, composed("trainer=rloo", "trainer.reward=judge"))
    check(judged)
    check(judged)
    worker.same_model(trial, composed("trainer=rloo", "trainer.reward=other"))(judged | {"reward": {"run": "other"}})
    worker.same_model(trial, composed())(facts)
    with pytest.raises(DataError, match="reward model changed after the sweep was launched"):
        check(judged | {"reward": {"run": "judge", "trained_sha256": "b"}})


def test_machine_without_its_gpu_is_blamed_for_the_whole_pack(sweep, monkeypatch):
    """It is seen before any trial is prepared; without a word the tickets would count as killed by their trials."""
    made, record = sweep("a=1,2,3")
    monkeypatch.setenv(worker.TOKEN, "bad")

    def no_gpu(model, longest=0):
        raise MachineError("CUDA_VISIBLE_DEVICES=7 names GPUs and PyTorch sees none")

    monkeypatch.setattr(worker.compute, "policy", no_gpu)
    with pytest.raises(MachineError, match="PyTorch sees none"):
        worker.run_pack(made, record, [study.claim(record, "bad") for _ in range(3)])
    assert all("PyTorch sees none" in t.user_attrs[study.FAULT] for t in study.counted(record))


def test_fault_of_the_machine_in_a_pack_is_tried_elsewhere_and_who_is_complete_stays_so(sweep, monkeypatch):
    made, record = sweep("a=1,2,3")
    monkeypatch.setenv(worker.TOKEN, "bad")

    def together(asked, over, seen, share):
        over(0, {"valid/loss": 0.5})
        over(1, MachineError("no model folder at /mnt/m"))
        over(2, {"valid/loss": 0.4})

    monkeypatch.setattr(experiment, "together", together)
    with pytest.raises(MachineError, match="no model folder"):
        worker.run_pack(made, record, [study.claim(record, "bad") for _ in range(3)])
    assert [t.state.name for t in study.counted(record)] == ["COMPLETE", "RUNNING", "COMPLETE"]
    assert study.reap(record, 2, ended={"bad"}) == [1]
