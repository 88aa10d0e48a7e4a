"""The record of a sweep: exact totals, atomic claims, the dead and the slow, and proposals that resume alike."""

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from ftexp.errors import ConfigError, MachineError
from ftexp.sweep import space, study
from ftexp.sweep.options import Options, Pruner, Sampler

optuna.logging.set_verbosity(optuna.logging.ERROR)
SPACE = space.parse(["lr=tag(log,interval(1e-5,1e-1))", "r=4,8,16", "noise=interval(0.0,15.0)"])


@pytest.fixture
def record(tmp_path):
    return optuna.create_study(study_name="s", storage=study.storage(tmp_path, None))


def states(record):
    return Counter(t.state.name for t in record.get_trials())


def test_queue_adds_only_what_is_missing(record):
    study.queue(record, [{"r": 1}, {"r": 2}])
    study.queue(record, [{"r": 1}, {"r": 2}, {"r": 3}])
    assert [study.ticket(t) for t in study.counted(record)] == [0, 1, 2]


def test_claims_go_by_ticket_and_end(record):
    study.queue(record, [None, None])
    claimed = [study.claim(record) for _ in range(3)]
    assert [None if t is None else t.number for t in claimed] == [0, 1, None]
    assert claimed[0].user_attrs["ftexp:worker"]["pid"] == os.getpid()


def test_ticket_of_a_dead_worker_is_queued_again_with_its_point(record):
    study.queue(record, [{"r": 5}])
    trial = study.claim(record)
    trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0})
    assert study.reap(record, max_retries=2) == [0]
    assert study.reap(record, max_retries=2) == []
    again = study.claim(record)
    assert again._cached_frozen_trial.system_attrs["fixed_params"] == {"r": 5}
    assert [study.ticket(t) for t in study.counted(record)] == [0]
    assert states(record) == {"FAIL": 1, "RUNNING": 1}


def test_ticket_whose_worker_is_killed_between_giving_it_back_and_queueing_it_keeps_its_point(record, monkeypatch):
    """The sampler would draw another, at odds with the checkpoint that the first one left."""
    study.queue(record, [None])
    trial = study.claim(record)
    record._storage.set_trial_system_attr(trial._trial_id, "fixed_params", {"r": 5})
    trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(study, "requeue", lambda *_, **__: None)  # the kill
        study.reap(record, 2)
    assert study.counted(record) == []
    study.settle(record, [None], 2)
    (again,) = study.counted(record)
    assert again.state is TrialState.WAITING and again.system_attrs["fixed_params"] == {"r": 5}
    assert again.user_attrs["ftexp:ticket"] == 0
    study.settle(record, [None], 2)
    assert states(record) == {"FAIL": 1, "WAITING": 1}


def test_ticket_that_nobody_queued_again_is_queued_once_it_is_sure(record, monkeypatch):
    """A worker was killed while it gave a ticket back; another one may be at that very act, so some seconds pass."""
    study.queue(record, [None, None])
    gone, other = study.claim(record), study.claim(record)
    record._storage.set_trial_system_attr(gone._trial_id, "fixed_params", {"r": 5})
    assert study.mend(record) == 0
    gone.set_user_attr("ftexp:lost", True)
    assert study.mend(record) == 0  # it runs: its worker may be dead, which is for `reap` to see
    record._storage.set_trial_state_values(gone._trial_id, TrialState.FAIL)
    assert study.mend(record) == 1
    assert states(record) == {"FAIL": 1, "RUNNING": 1}
    monkeypatch.setattr(study, "MEND_SECONDS", -1.0)
    assert study.mend(record) == 1
    assert states(record) == {"FAIL": 1, "RUNNING": 1, "WAITING": 1}
    assert study.mend(record) == 0
    again = study.claim(record)
    assert again._cached_frozen_trial.system_attrs["fixed_params"] == {"r": 5}
    record.tell(other, 0.5)


def test_launch_that_is_killed_again_and_again_fails_no_trial_that_comes_forward(record, tmp_path):
    """Its checkpoint is beyond the one the attempt went on from; one that stays where it was is counted."""
    from ftexp.files import write_json
    from ftexp.train.checkpoints import SEAL

    study.queue(record, [{"r": 5}])
    for attempt, (began, newest) in enumerate([([], 10), ([10], 20), ([10, 20], 30), ([10, 20, 30], 30)]):
        trial = study.claim(record)
        trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0})
        write_json(tmp_path / "0" / "trial.json", {"resumed_at": began})
        (tmp_path / "0" / f"checkpoints/checkpoint-{newest}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "0" / f"checkpoints/checkpoint-{newest}" / SEAL).touch()
        study.settle(record, [{"r": 5}], 0, tmp_path)  # as the next launch does
        assert study.counted(record)[0].state is (TrialState.WAITING if attempt < 3 else TrialState.FAIL)


def test_launch_that_is_killed_before_its_trial_goes_on_is_no_progress(record, tmp_path):
    """The model does not fit: each launch dies at loading it, beside a checkpoint of a larger machine."""
    from ftexp.train.checkpoints import SEAL

    (tmp_path / "0" / "checkpoints/checkpoint-5").mkdir(parents=True)
    (tmp_path / "0" / "checkpoints/checkpoint-5" / SEAL).touch()
    study.queue(record, [{"r": 5}])
    states = []
    for _ in range(3):
        study.claim(record).set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0})
        study.settle(record, [{"r": 5}], 1, tmp_path)
        states.append(study.counted(record)[0].state.name)
    assert states == ["WAITING", "WAITING", "FAIL"]  # the first left a checkpoint that was not there before


def test_more_retries_run_again_what_failed_with_its_worker_and_nothing_else(record):
    study.queue(record, [{"r": 5}, {"r": 6}])
    study.claim(record).set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0})
    study.settle(record, [{"r": 5}, {"r": 6}], 0)
    broken = study.claim(record)
    broken.set_user_attr("ftexp:kind", "crash")
    record.tell(broken, state=TrialState.FAIL)
    for retries, waiting in ((0, []), (1, [0])):
        study.settle(record, [{"r": 5}, {"r": 6}], retries)
        assert [study.ticket(t) for t in study.counted(record) if t.state is TrialState.WAITING] == waiting
    assert study.counted(record)[0].user_attrs["ftexp:retries"] == 1


def test_ticket_that_no_machine_could_run_is_tried_again_by_the_next_launch(record):
    study.queue(record, [{"r": 5}])
    for _ in range(study.MOST_FAULTS + 1):
        trial = study.claim(record)
        trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0})
        trial.set_user_attr(study.FAULT, "no model folder at /mnt/m")
        study.reap(record, 0)
    assert study.counted(record)[0].state is TrialState.FAIL
    study.settle(record, [{"r": 5}], 0)
    (again,) = study.counted(record)
    assert (again.state, again.user_attrs[study.FAULTS]) == (TrialState.WAITING, 0)


def test_ticket_that_kills_every_worker_fails_for_good(record):
    study.queue(record, [{"r": 5}])
    for attempt in range(3):
        trial = study.claim(record)
        trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0})
        assert bool(study.reap(record, max_retries=2)) == (attempt < 2)
    assert study.claim(record) is None
    last = study.counted(record)[0]
    assert last.state is TrialState.FAIL
    assert last.user_attrs["ftexp:reason"] == "crash: worker died"


def test_zombie_counts_as_dead():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    time.sleep(1)  # has ended, and nobody has collected it
    assert study.started(child.pid) is None
    child.wait()


def test_pid_taken_by_another_process_counts_as_dead(record):
    study.queue(record, [None])
    trial = study.claim(record)
    trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": os.getpid(), "start": 1.0})
    assert study.reap(record, 1) == [0]


def test_living_worker_is_left_alone(record):
    study.queue(record, [None])
    study.claim(record)
    assert study.reap(record, 1) == []


def test_claim_without_signature_is_waited_for(record, monkeypatch):
    study.queue(record, [None])
    record._storage.set_trial_state_values(record.get_trials()[0]._trial_id, state=TrialState.RUNNING)
    assert study.reap(record, 1) == []
    monkeypatch.setattr(study, "UNSIGNED_SECONDS", 0.0)
    assert study.reap(record, 1) == [0]


@pytest.mark.parametrize(("silent", "reaped"), [(100.0, []), (200.0, [0])])
def test_worker_elsewhere_is_honoured_while_it_beats(record, silent, reaped, monkeypatch):
    study.queue(record, [None])
    trial = study.claim(record)
    trial.set_user_attr("ftexp:worker", {"host": "elsewhere", "pid": 1, "start": 1.0})
    assert study.reap(record, 1) == []
    now = time.monotonic()
    monkeypatch.setattr(study.time, "monotonic", lambda: now + silent)
    assert study.reap(record, 1) == reaped


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_clock_that_jumps_takes_no_trial_from_a_worker_elsewhere(record, monkeypatch, jump):
    study.queue(record, [None])
    trial = study.claim(record)
    trial.set_user_attr("ftexp:worker", {"host": "elsewhere", "pid": 1, "start": 1.0})
    now = time.time()
    monkeypatch.setattr(study.time, "time", lambda: now + jump)
    assert study.reap(record, 1) == []


def test_clock_put_back_after_a_claim_keeps_nobody_waiting(record, monkeypatch):
    """A worker killed between claim and signature, then a clock an hour back: its ticket is not held for an hour."""
    study.queue(record, [None])
    record._storage.set_trial_state_values(record.get_trials()[0]._trial_id, state=TrialState.RUNNING)
    now = time.time()
    monkeypatch.setattr(study.time, "time", lambda: now - 3600)
    assert study.reap(record, 1) == [0]


def test_torn_journal_is_cut_back_to_its_last_whole_line(tmp_path, record):
    study.queue(record, [{"r": 1}, {"r": 2}])
    path = tmp_path / study.JOURNAL
    path.write_bytes(path.read_bytes() + b'{"op_code": 5, "trial_')
    again = optuna.load_study(study_name="s", storage=study.storage(tmp_path, None))
    study.queue(again, [{"r": 1}, {"r": 2}, {"r": 3}])
    fresh = optuna.load_study(study_name="s", storage=study.storage(tmp_path, None))
    assert len(study.counted(fresh)) == 3


def test_sabotage_torn_journal_without_repair_is_lost(tmp_path, record, monkeypatch):
    study.queue(record, [{"r": 1}])
    path = tmp_path / study.JOURNAL
    path.write_bytes(path.read_bytes() + b'{"op_code": 5, "trial_')
    monkeypatch.setattr(study, "cut_torn", lambda path: None)
    monkeypatch.setattr(study, "_check_end", lambda path: None)
    with pytest.raises(Exception):  # noqa: B017 - whatever Optuna meets there
        again = optuna.load_study(study_name="s", storage=study.storage(tmp_path, None))
        study.queue(again, [{"r": 1}, {"r": 2}])
        fresh = optuna.load_study(study_name="s", storage=study.storage(tmp_path, None))
        assert len(study.counted(fresh)) == 2


def test_entry_that_another_process_tore_is_cut_off_before_the_next(tmp_path, record):
    """A full disk tears the last entry while the sweep runs; the next writer has had the record open all along."""
    path = tmp_path / study.JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 5, "trial_')
    study.queue(record, [{"r": 1}])
    assert path.read_bytes().startswith(whole)
    assert [study._is_entry(line) for line in path.read_bytes().splitlines()] == [True] * path.read_bytes().count(b"\n")
    assert len(study.counted(record)) == 1


CLAIMS = """
import sys, optuna
from pathlib import Path
from ftexp.sweep import study
optuna.logging.set_verbosity(40)
record = optuna.load_study(study_name="s", storage=study.storage(Path(sys.argv[1]), None))
print("ready", flush=True)
sys.stdin.readline()
while (t := study.claim(record)) is not None:
    print(study.ticket(t._cached_frozen_trial), flush=True)
    record.tell(t, 0.0)
"""


def test_many_processes_never_claim_one_ticket_twice(tmp_path, record):
    study.queue(record, [{"r": n} for n in range(80)])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for c in children:
        assert c.stdout.readline() == "ready\n"
    for c in children:
        c.stdin.write("go\n")
        c.stdin.flush()
    claimed = [int(line) for c in children for line in c.communicate()[0].split()]
    assert sorted(claimed) == list(range(80))


def test_lock_of_a_killed_process_is_free_at_once(tmp_path, record):
    code = "import sys, time; from ftexp.sweep.study import _Lock; _Lock(sys.argv[1]).acquire(); print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / study.JOURNAL)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    began = time.monotonic()
    study.queue(record, [None])
    assert time.monotonic() - began < 5  # Optuna's own lock would be honoured for 30 s


def objective(point):
    return (math.log10(point["lr"]) + 3) ** 2 + (0.2 if point["r"] == "8" else 0.5) + point["noise"] / 50


def searched(tmp_path, options, total, stop_at=None, name="a"):
    """Run a search of a formula; with `stop_at` lose that ticket's worker once and go on in a fresh study."""
    from ftexp.sweep import frozen, worker

    folder = tmp_path / name
    folder.mkdir()
    sweep = frozen.Frozen(folder, "s", SPACE, options, ["valid/loss"], None, "", {})
    record = worker.open_study(sweep)
    study.settle(record, [None] * total, 2)
    while (trial := study.claim(record)) is not None:
        number = study.ticket(trial._cached_frozen_trial)
        point = worker.choose(sweep, record, trial, number)
        if number == stop_at:
            stop_at = None
            trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0})
            record = worker.open_study(sweep)
            study.settle(record, [None] * total, 2)
            continue
        record.tell(trial, objective(point))
    return [t.params for t in study.counted(record)]


@pytest.mark.parametrize("sampler", [Sampler.tpe, Sampler.gp, Sampler.random, Sampler.qmc, Sampler.nsga2])
def test_killed_search_proposes_what_an_undisturbed_one_does(tmp_path, sampler):
    args = {"population_size": 6} if sampler is Sampler.nsga2 else {}
    options = Options(sampler=sampler, n_trials=18, sampler_args=args)
    calm = searched(tmp_path, options, 18, name="calm")
    assert len(calm) == 18
    if sampler is not Sampler.nsga2:  # children inherit
        assert len({p["lr"] for p in calm}) == 18
    assert searched(tmp_path, options, 18, stop_at=13, name="killed") == calm


@pytest.mark.parametrize("stop_at", [2, 7])
def test_generations_are_those_of_an_undisturbed_search(tmp_path, stop_at):
    """An attempt that is queued again keeps its generation, or it would be no parent of the next one."""
    options = Options(sampler=Sampler.nsga2, n_trials=18, sampler_args={"population_size": 5})
    calm = searched(tmp_path, options, 18, name="calm")
    assert searched(tmp_path, options, 18, stop_at=stop_at, name="killed") == calm


def test_worker_that_is_there_and_silent_is_left_alone(record):
    """A job that a cluster has suspended, or that cannot reach the record for some minutes."""
    study.queue(record, [{"r": 5}])
    trial = study.claim(record)
    trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": 1.0, "token": "t"})
    assert study.reap(record, 2, there={"t"}) == []
    assert study.reap(record, 2, ended={"t"}, there={"t"}) == [0]


def test_sabotage_one_seed_for_all_proposals_repeats_them(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "seed_of", lambda seed, number: 7)
    points = searched(tmp_path, Options(sampler=Sampler.random, n_trials=5), 5)
    assert len({p["lr"] for p in points}) == 1


def test_search_learns_from_results(tmp_path):
    points = searched(tmp_path, Options(sampler=Sampler.tpe, n_trials=40), 40)
    first, last = ([objective(p) for p in part] for part in (points[:10], points[-10:]))
    assert sum(last) / 10 < sum(first) / 10 - 0.3


BAD = {
    "pruned": (TrialState.PRUNED, {}),
    "diverged": (TrialState.PRUNED, {"ftexp:kind": "diverged"}),
    "timeout": (TrialState.FAIL, {"ftexp:kind": "timeout"}),
    "crash": (TrialState.FAIL, {"ftexp:kind": "crash"}),
}


def _bad_ones(tmp_path, sampler, end, total=24):
    """Search a rate of which all above 0.01 end badly, though just below is best; return whether each point did."""
    from ftexp.sweep import frozen, worker

    axis = space.parse(["lr=tag(log,interval(1e-5,1))"])
    made = frozen.Frozen(tmp_path, "s", axis, Options(sampler=sampler, n_trials=total), ["valid/loss"], None, "", {})
    record = worker.open_study(made)
    study.settle(record, [None] * total, 2)
    while (trial := study.claim(record)) is not None:
        rate = worker.choose(made, record, trial, study.ticket(trial._cached_frozen_trial))["lr"]
        state, attrs = BAD[end] if rate > 1e-2 else (TrialState.COMPLETE, {})
        for name, value in attrs.items():
            trial.set_user_attr(name, value)
        record.tell(trial, None if rate > 1e-2 else -math.log(rate), state=state)
    return [t.params["lr"] > 1e-2 for t in study.counted(record)]


@pytest.mark.parametrize("end", BAD)
@pytest.mark.parametrize("sampler", [Sampler.gp, Sampler.tpe])
def test_search_leaves_a_region_that_ends_badly(tmp_path, sampler, end):
    """A Gaussian process reads complete trials alone, and no sampler those that failed: both asked there for good."""
    bad = _bad_ones(tmp_path, sampler, end)
    assert sum(bad[10:]) <= 7  # of 14 that are no random ones; all of them where the sampler is not told


def test_what_failed_by_the_machine_says_nothing_of_its_point(tmp_path):
    from ftexp.sweep import frozen, worker

    made = frozen.Frozen(tmp_path, "s", SPACE, Options(sampler=Sampler.tpe, n_trials=3), ["valid/loss"], None, "", {})
    record = worker.open_study(made)
    study.settle(record, [None] * 3, 2)
    for attrs in (
        {"ftexp:kind": study.MACHINE},
        {"ftexp:kind": "crash", study.FAULT: "no GPU"},
        {"ftexp:kind": "data"},
    ):
        trial = study.claim(record)
        worker.choose(made, record, trial, study.ticket(trial._cached_frozen_trial))
        trial.report(1.0, 5)
        for name, value in attrs.items():
            trial.set_user_attr(name, value)
        record.tell(trial, state=TrialState.FAIL)
    told = [(study.ticket(t), t.state, t.intermediate_values) for t in worker.history(made, record)]
    assert told == [(2, TrialState.PRUNED, {})]


def test_gaussian_process_has_the_worst_value_for_what_has_none():
    def made(state, values=None, over=None):
        trial = optuna.trial.create_trial(state=state, values=values, params={}, distributions={})
        return trial if over is None else study.constrained(trial, {"size": over})

    history = [
        made(TrialState.COMPLETE, [1.0, 0.2], -1.0), made(TrialState.COMPLETE, [3.0, 0.9], 2.0),
        made(TrialState.PRUNED), made(TrialState.RUNNING),
    ]  # fmt: skip
    told = study.scored_worst(history, ["minimize", "maximize"])
    assert [t.state.name for t in told] == ["COMPLETE", "COMPLETE", "COMPLETE", "RUNNING"]
    assert (told[2].values, told[2].constraints) == ([3.0, 0.2], {"size": 2.0})
    assert history[2].state is TrialState.PRUNED
    assert study.scored_worst([made(TrialState.PRUNED)], ["minimize"])[0].values == [0.0]


@pytest.mark.parametrize(("trials", "size"), [(24, 8), (99, 8), (100, 50)])
def test_genetic_search_has_generations_in_a_sweep_of_usual_size(trials, size):
    """Optuna's first generation has 50 points, all drawn at random: sweeps of 24 trials never got beyond it."""
    given = Options(sampler=Sampler.nsga2, n_trials=trials)
    assert study.sampler(given, 0)._population_size == size
    assert study.sampler(replace(given, sampler_args={"population_size": 5}), 0)._population_size == 5


@pytest.mark.parametrize("kind", [Sampler.random, Sampler.tpe, Sampler.qmc, Sampler.nsga2])
def test_search_draws_a_dependent_axis_only_where_its_condition_holds(tmp_path, kind, monkeypatch):
    dependent = space.parse(["lora=default,dora", "lr=interval(0.0,1.0)"], {"lr": {"lora": "dora"}})
    points = [
        study.propose(dependent, Options(sampler=kind, n_trials=40), ["minimize"], [], n).params for n in range(40)
    ]
    drawn = {p["lora"]: [q.get("lr") for q in points if q["lora"] == p["lora"]] for p in points}
    assert set(drawn["default"]) == {None}
    assert len(set(drawn["dora"])) == len(drawn["dora"]) > 5


def test_tpe_learns_within_the_branch_of_a_dependent_axis():
    """Only `dora` with a small lr is good; the last proposals are there."""
    from optuna.trial import TrialState, create_trial

    dependent = space.parse(["lora=default,dora", "lr=interval(0.0,1.0)"], {"lr": {"lora": "dora"}})
    options, history = Options(sampler=Sampler.tpe, n_trials=60), []
    for n in range(60):
        asked = study.propose(dependent, options, ["minimize"], history, n)
        value = asked.params.get("lr", 2.0)
        history.append(create_trial(state=TrialState.COMPLETE, value=value, params=asked.params,
                                    distributions=asked.distributions))  # fmt: skip
    last = [t.params for t in history[-15:]]
    assert sum(p["lora"] == "dora" for p in last) >= 12
    assert sorted(p["lr"] for p in last if "lr" in p)[5] < 0.3


def test_sobol_reaches_the_upper_end_of_whole_numbers():
    made = space.parse(["lora.r=tag(log,interval(2,8))", "trainer.batch=interval(1,4)"])
    drawn = [study._sobol(made, Options(sampler=Sampler.qmc), n) for n in range(64)]
    assert {p["lora.r"] for p in drawn} == {2, 3, 4, 5, 6, 7, 8}
    assert {p["trainer.batch"] for p in drawn} == {1, 2, 3, 4}


def test_points_that_qmc_draws_after_baselines_are_balanced():
    """One of 16 in each sixteenth of the range (Sobol, 1967): so the first 2^n of the sequence are, and no others."""
    given = Options(sampler=Sampler.qmc, n_trials=18, baselines=[{"x": 0.5}, {"x": 0.25}])
    made = space.parse(["x=interval(0.0,1.0)"])
    drawn = [study._sobol(made, given, n)["x"] for n in range(2, 18)]
    assert sorted(int(16 * x) for x in drawn) == list(range(16))


def test_sobol_covers_every_axis():
    points = [study._sobol(SPACE, Options(sampler=Sampler.qmc, n_trials=32), n) for n in range(32)]
    assert Counter(p["r"] for p in points).most_common()[-1][1] >= 9
    decades = Counter(math.floor(math.log10(p["lr"])) for p in points)
    assert set(decades) == {-5, -4, -3, -2}
    assert all(0 <= p["noise"] <= 15 for p in points)


def test_first_rung_of_halving_is_the_first_report(tmp_path):
    """With a rung of 1 a report at step 10 would climb three rungs at once, and the trial be judged against none."""
    assert study.pruner(Options(pruner=Pruner.asha), 10)._min_resource == 10
    record = optuna.create_study(pruner=study.pruner(Options(pruner=Pruner.asha), 10))
    for value in (1.0, 0.9, 5.0):
        trial = record.ask()
        trial.report(value, 10)
        told = trial.should_prune()
    assert told
    assert [k for k in record.trials[0].system_attrs if "rung" in k] == ["completed_rung_0"]


@pytest.mark.parametrize("kind", list(Pruner))
def test_every_pruner_is_made(kind):
    assert study.pruner(Options(pruner=kind), 10) is not None


def test_brackets_of_hyperband_are_those_of_the_launch_whatever_has_ended():
    """Optuna lays them out by the longest trial that is complete when a process first asks."""

    def laid_out(longest, *ended):
        made = optuna.create_study(pruner=study.pruner(Options(pruner=Pruner.hyperband), 1, longest))
        for steps in ended:
            trial = made.ask()
            trial.report(1.0, steps - 1)
            made.tell(trial, 1.0)
        trial = made.ask()
        trial.report(1.0, 1)
        trial.should_prune()
        return len(made.pruner._pruners)

    assert laid_out(12) == laid_out(12, 3) == laid_out(12, 3, 12) == 3
    assert [laid_out(0), laid_out(0, 3), laid_out(0, 3, 12)] == [0, 2, 3]  # a launch that did not keep it


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: study.sampler(Options(sampler=Sampler.tpe, sampler_args={"nope": 1}), 0),
            "sweep.sampler_args is refused by TPESampler",
        ),
        (
            lambda: study.pruner(Options(pruner=Pruner.asha, pruner_args={"nope": 1}), 1),
            "sweep.pruner_args is refused by Succ",
        ),
    ],
)
def test_unknown_keyword_is_refused(made, message):
    with pytest.raises(ConfigError, match=message):
        made()


CONDITIONAL = space.parse(["lora=none,default", "lora.r=2,4", "lr=tag(log,interval(1e-4,1e-2))"])


@pytest.mark.parametrize(
    ("kind", "args", "searched", "message"),
    [
        ("tpe", {"multivariate": False}, CONDITIONAL, "sweep.sampler_args is refused by TPESampler"),
        ("tpe", {"n_ei_candidates": 0}, SPACE, "TPESampler can work with, got {n_ei_candidates: 0}: "),
        ("tpe", {"n_startup_trials": "a"}, SPACE, "got {n_startup_trials: a}: .*not supported between"),
        ("tpe", {"n_startup_trials": 30, "n_ei_candidates": 0}, SPACE, "n_ei_candidates: 0}: "),
        ("gp", {"n_startup_trials": "a"}, SPACE, "got {n_startup_trials: a}: "),
        ("nsga2", {"mutation_prob": "x"}, SPACE, "sweep.sampler_args is refused by NSGAIISampler"),
    ],
)
def test_keywords_that_break_the_sampler_when_it_is_asked_are_refused(kind, args, searched, message):
    options = Options(sampler=Sampler[kind], sampler_args=args, n_trials=20)
    with pytest.raises(ConfigError, match=message):
        study.try_sampler(searched, options, ["minimize"])


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("tpe", {"n_startup_trials": 2}), ("tpe", {"n_startup_trials": 10**6}), ("tpe", {"multivariate": False}),
        ("gp", {"n_startup_trials": 2}), ("nsga2", {"population_size": 4}), ("nsga2", {"population_size": 500}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("directions", [["minimize"], ["minimize", "maximize"]])
def test_keywords_that_work_pass(kind, args, directions):
    study.try_sampler(SPACE, Options(sampler=Sampler[kind], sampler_args=args, n_trials=20), directions)


@pytest.mark.parametrize(
    ("kind", "args", "told"),
    [
        ("hyperband", {"reduction_factor": 1}, "got {reduction_factor: 1}"),
        ("hyperband", {"min_resource": 0}, "got {min_resource: 0}"),
        ("median", {"n_startup_trials": "x"}, "is refused by MedianPruner"),
        ("asha", {"reduction_factor": 1}, "is refused by SuccessiveHalvingPruner"),
    ],
)
def test_keywords_that_break_the_pruner_when_it_is_asked_are_refused(kind, args, told):
    with pytest.raises(ConfigError, match=f"sweep.pruner_args .*{told}"):
        study.try_pruner(Options(pruner=Pruner[kind], pruner_args=args), 2, 12)


@pytest.mark.parametrize(
    ("kind", "args"),
    [("hyperband", {"bootstrap_count": 1}), ("hyperband", {"reduction_factor": 4}), ("median", {"n_warmup_steps": 5}),
     ("patient", {"n_min_trials": 2}), ("asha", {"min_early_stopping_rate": 1})],
)  # fmt: skip
def test_keywords_of_pruners_that_work_pass(kind, args):
    study.try_pruner(Options(pruner=Pruner[kind], pruner_args=args), 2, 12)


def test_storage_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(MachineError, match=r"sweep\.storage=nonsense://x cannot be opened"):
        study.storage(tmp_path, "nonsense://x")


def test_changed_space_is_refused_with_the_difference():
    old = study.Identity.of(SPACE, Options(), ["valid/loss"], {"seed": 0}, {"alpha": [8, 16, 32]})
    new = study.Identity.of(space.parse(["r=4,8"]), Options(), ["valid/loss"], {"seed": 1}, {"alpha": [8, 16]})
    old.check(old.told, "x")
    old.check(None, "x")
    with pytest.raises(
        ConfigError, match=r"config seed: 0 -> 1; space lr: log interval.*-> absent.*space r: 4,8,16 -> 4,8"
    ):
        new.check(old.told, "x")


def test_changed_rule_of_a_dependent_key_is_refused_where_it_was_kept():
    old, new = (study.Identity.of(SPACE, Options(), ["valid/loss"], {}, {"alpha": a}) for a in ([8, 16], [16, 32]))
    with pytest.raises(ConfigError, match=r"search space: depending alpha: \[8, 16\] -> \[16, 32\]; choose"):
        new.known_to(old.told).check(old.told, "x")
    before = {k: v for k, v in old.told.items() if not k.startswith(study.DEPENDING)}  # a launch that did not keep it
    new.known_to(before).check(before, "x")


def test_changed_keywords_of_the_sampler_are_refused_where_they_were_kept():
    """Points drawn with others would stand in one study; `name` says one way of drawing."""
    old, new = (study.Identity.of(SPACE, Options(sampler_args=args), [], {}, {}) for args in ({}, {"gamma": 3}))
    with pytest.raises(ConfigError, match=r'sweep\.sampler_args: \{\} -> \{"gamma": 3\}; choose'):
        new.known_to(old.told).check(old.told, "x")
    before = {k: v for k, v in old.told.items() if k != study.ARGS}  # a launch that did not keep them
    new.known_to(before).check(before, "x")


def test_private_names_of_optuna_are_there(record):
    """What `claim` and `choose` reach for; a new Optuna that moved them must fail here."""
    study.queue(record, [None])
    trial = study.claim(record)
    for owner, name in ((record, "_storage"), (record, "_study_id"), (record, "_thread_local"), (trial, "_suggest"),
                        (trial, "_trial_id"), (trial, "_cached_frozen_trial")):  # fmt: skip
        assert hasattr(owner, name)


def test_worker_killed_between_two_keys_of_its_point_loses_neither(record, monkeypatch):
    from optuna.distributions import CategoricalDistribution

    study.queue(record, [{"a": "1", "b": "2"}])
    trial = study.claim(record)
    trial._suggest("a", CategoricalDistribution(("1",)))
    monkeypatch.setattr(study, "alive", lambda trial: False)
    assert study.reap(record, 2) == [0]
    assert study.counted(record)[0].system_attrs["fixed_params"] == {"a": "1", "b": "2"}


@pytest.mark.parametrize("line", [b"garbage\n", b"\xff\xfe\n", b"\0\0\0\n", b"[1]\n", b'{"a": 1}\n', b"{\n"])
def test_garbage_in_the_journal_is_named_by_file_and_line(tmp_path, record, line):
    path = tmp_path / study.JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], line, *lines[1:]]))
    with pytest.raises(MachineError, match=rf"{study.JOURNAL}:2: must be one entry of the sweep's record"):
        study.storage(tmp_path, None)


def test_database_that_does_not_answer_is_told_within_its_time(tmp_path, monkeypatch):
    """A server that takes the connection and says nothing, as one that was stopped (SIGSTOP) or hangs on its disk."""
    import socket

    monkeypatch.setenv("PGCONNECT_TIMEOUT", "2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://someone@127.0.0.1:{silent.getsockname()[1]}/there"
        began = time.monotonic()
        with pytest.raises(MachineError, match=r"sweep\.storage=postgresql.*cannot be opened: .*timeout"):
            study.storage(tmp_path, url)
    assert time.monotonic() - began < 30
    monkeypatch.delenv("PGCONNECT_TIMEOUT")
    with pytest.raises(MachineError):
        study.storage(tmp_path, "postgresql+psycopg://someone@127.0.0.1:9/there")
    assert os.environ["PGCONNECT_TIMEOUT"] == "10"
    monkeypatch.delenv("PGCONNECT_TIMEOUT")


def test_tickets_above_a_lower_number_of_trials_are_taken_back(record):
    study.settle(record, [None] * 5, 2)
    record.tell(study.claim(record), 0.5)
    study.settle(record, [None] * 2, 2)
    assert [study.ticket(t) for t in study.counted(record)] == [0, 1]
    study.settle(record, [None] * 3, 2)  # and raised again
    assert [(study.ticket(t), t.state.name) for t in study.counted(record)][1:] == [(1, "WAITING"), (2, "WAITING")]


def test_tickets_that_were_taken_back_are_not_mended(record, monkeypatch):
    """Whoever looks for tickets that a killed worker left out of the queue found these, and ran them after all."""
    study.settle(record, [None] * 5, 2)
    study.settle(record, [None] * 2, 2)
    monkeypatch.setattr(study, "MEND_SECONDS", -1.0)
    assert study.mend(record) == 0
    assert [study.ticket(t) for t in study.counted(record)] == [0, 1]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_holds_no_ticket_back(record, monkeypatch, hours):
    study.queue(record, [None])
    gone = study.claim(record)
    gone.set_user_attr("ftexp:lost", True)
    record._storage.set_trial_state_values(gone._trial_id, TrialState.FAIL)

    class Clock(study.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + study.timedelta(hours=hours)

    monkeypatch.setattr(study, "datetime", Clock)
    study.mend(record)
    assert states(record) == {"FAIL": 1, "WAITING": 1}


def test_a_pack_that_dies_is_no_retry_of_its_tickets_and_each_is_run_alone_then(record):
    """One of them has killed the worker: together they would do so again until all had failed."""
    study.queue(record, [{"r": n} for n in range(4)])
    for _ in range(3):
        study.claim(record, "w").set_user_attr(study.PACK, 3)
    assert study.reap(record, 0, ended={"w"}) == [0, 1, 2]
    told = [(study.ticket(t), study.alone(t), t.user_attrs.get("ftexp:retries", 0)) for t in study.waiting(record)]
    assert sorted(told) == [(0, True, 0), (1, True, 0), (2, True, 0), (3, False, 0)]
    assert study.ticket(study.claim(record, "w", beside=True)._cached_frozen_trial) == 3
    first = study.claim(record, "w")
    assert study.ticket(first._cached_frozen_trial) == 0
    study.requeue(record, record._storage.get_trial(first._trial_id))  # given back: it stays alone
    assert study.alone(record.trials[-1])
    assert study.reap(record, 0, ended={"w"}) == []  # now it counts: 0 and 3 have failed


def test_a_pack_that_a_power_cut_ended_goes_on_as_a_pack(record, tmp_path):
    """Nobody is to blame for the first; where the launch dies with it again, one of them may be."""
    from ftexp.train.checkpoints import SEAL

    points = [{"r": n} for n in range(2)]
    study.queue(record, points)
    alone = []
    for newest in (0, 0, 10, 20):
        for _ in range(2):
            trial = study.claim(record, "w")
            trial.set_user_attr(study.PACK, 2)
            trial.set_user_attr("ftexp:worker", {"host": study.HOST, "pid": 2**22 + 1, "start": "1.0"})
            if newest:
                folder = tmp_path / str(study.ticket(trial._cached_frozen_trial)) / f"checkpoints/checkpoint-{newest}"
                folder.mkdir(parents=True)
                (folder / SEAL).touch()
        study.settle(record, points, 1, tmp_path)
        waits = study.waiting(record)
        assert len(waits) == 2
        alone.append([study.alone(t) for t in waits])
    assert alone == [[False, False], [True, True], [True, True], [True, True]]


def test_a_pack_that_comes_forward_stays_one(record, tmp_path):
    from ftexp.train.checkpoints import SEAL

    study.queue(record, [{"r": n} for n in range(2)])
    for number in range(2):
        study.claim(record, "w").set_user_attr(study.PACK, 2)
        (tmp_path / str(number) / "checkpoints/checkpoint-5").mkdir(parents=True)
        (tmp_path / str(number) / "checkpoints/checkpoint-5" / SEAL).touch()
    study.reap(record, 0, {"w"}, folder=tmp_path)
    assert [study.alone(t) for t in study.waiting(record)] == [False, False]


def test_one_that_died_is_tried_alone_again(record):
    study.queue(record, [{"r": 1}, {"r": 2}])
    study.claim(record, "w")
    study.reap(record, 1, ended={"w"})
    (again,) = [t for t in study.waiting(record) if study.ticket(t) == 0]
    assert study.alone(again) and again.user_attrs["ftexp:retries"] == 1


def test_a_worker_that_we_killed_ourselves_is_no_retry(record):
    study.queue(record, [{"r": 1}, {"r": 2}])
    for token in ("ours", "its own"):
        study.claim(record, token)
    assert study.reap(record, 0, ended={"ours", "its own"}, excused={"ours"}) == [0]
    (again,) = study.waiting(record)
    assert again.user_attrs["ftexp:retries"] == 0 and not study.alone(again)


def test_of_two_attempts_of_a_ticket_the_first_alone_is_run(record):
    """Two processes may queue it again at one moment; the second would train into the folder of the first."""
    study.queue(record, [{"r": 1}, {"r": 2}])
    study.requeue(record, record.trials[0])
    claimed = [study.claim(record, token) for token in ("a", "b", "c")]
    assert [None if t is None else t.number for t in claimed] == [0, 1, None]
    assert record.trials[2].state is TrialState.FAIL and record.trials[2].user_attrs["ftexp:lost"]
    assert [study.ticket(t) for t in study.counted(record)] == [0, 1]


def test_setting_the_wall_clock_kills_no_worker(record, monkeypatch):
    """psutil gives a process's start by the wall clock: one step, and everyone looked dead to everyone."""
    import psutil

    study.queue(record, [None])
    study.claim(record, "w")
    honest = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: honest(self) + 2)
    assert study.reap(record, 2) == []


def test_start_tells_a_process_from_a_later_one_of_its_number():
    with subprocess.Popen(["sleep", "60"]) as process:
        mine, its = study.started(os.getpid()), study.started(process.pid)
        assert mine != its and its == study.started(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert study.started(process.pid) is None  # a zombie
    assert study.started(process.pid) is None
