"""Starts the workers of a sweep, one for each slot, and replaces those that die."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftexp import facts, machine
from ftexp.errors import ConfigError, MachineError
from ftexp.progress import say
from ftexp.sweep import engines, proxy, screen, study
from ftexp.sweep.engines import GRACE_SECONDS, Worker
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import Engine, Options
from ftexp.sweep.worker import PREEMPTED, RENEWED, STOP, stop_after_failures

if TYPE_CHECKING:
    from optuna import Study

POLL_SECONDS = 0.2
SILENT_SECONDS = 60.0
"""Time that a database may take to come back."""
REST_SECONDS, LONGEST_REST = 10.0, 60.0
"""Rest of a place after a fault of the machine; after each further one in a row twice as long, up to the second."""
IDLE_SECONDS = 30.0
"""After which a job of a cluster is cancelled that has no trial while none waits."""


COUNT = "FTEXP_WORKERS"
"""Environment variable: workers of the sweep on this machine, which one that sees its own GPU alone cannot count."""


@dataclass
class Slot:
    """A place for one worker: a GPU, or a share of the CPU's cores."""

    name: str
    """Names its log: a number, in a helper with machine and process in front."""
    env: dict[str, str]
    cores: set[int] | None = None
    """Cores the worker is pinned to; None leaves it to the system."""
    process: Worker | None = None
    token: str = ""
    """Names the worker in the record."""
    deaths: int = 0
    """Workers of this slot that died since one saw a trial to its end."""
    faults: int = 0
    """Workers of this slot in a row that left for a fault of the machine."""
    rests: float = 0.0
    """Until when it starts no worker, on the monotonic clock: a mount or a server may be back by then."""
    shut: bool = False
    """Whether it starts no further worker: what kills them is in the place, or in every trial."""
    cancelled: bool = False
    """Whether its worker, which had nothing to do, was ended by us."""


def gpus() -> list[str]:
    """List the GPUs this process may use, without touching CUDA: the environment's list, or every one there is."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return []
    return asked.stdout.split() if asked.returncode == 0 else []


def grouped(devices: list[str], each: int, sharing: int = 1) -> list[str]:
    """Deal GPUs out to slots: neighbours together, a second worker for a GPU after each has one; a rest stays idle.

    >>> grouped(["0", "1", "2", "3", "4"], 2), grouped(["0", "1"], 1, sharing=2)
    (['0,1', '2,3'], ['0', '1', '0', '1'])

    Args:
        devices: that may be used.
        each: GPUs of a trial.
        sharing: workers of a GPU.
    """
    whole = [",".join(devices[n : n + each]) for n in range(0, len(devices) - each + 1, each)]
    return whole * sharing


def workers(options: Options) -> int:
    """Count the workers of a sweep; 0 where its trials run in the process of the launch.

    Raises:
        ConfigError: a trial is to have more GPUs than there are, or workers are to share a GPU that is not there.
    """
    devices, each = gpus(), options.gpus_per_trial
    if options.engine is Engine.local and options.slots_per_gpu > 1 and not devices:
        raise ConfigError(f"sweep.slots_per_gpu={options.slots_per_gpu} needs a GPU, this process may use none")
    if options.engine is Engine.local and devices and len(devices) < each:
        raise ConfigError(
            f"sweep.gpus_per_trial={each} must be at most the {len(devices)} GPUs that this process may use"
        )
    return options.workers or len(grouped(devices, each, options.slots_per_gpu)) or int(each > 1)


def slots(count: int, each: int = 1, sharing: int = 1) -> list[Slot]:
    """Lay out slots: GPUs in turn where there are any, else equal shares of the cores.

    Args:
        count: of slots.
        each: GPUs of a trial, or processes that share the slot's cores.
        sharing: workers of a GPU, who are told their part of its memory.
    """
    devices, more = grouped(gpus(), each, sharing), {COUNT: str(count)}
    if devices:
        more |= {} if sharing == 1 else {facts.SHARE: str(sharing)}
        return [Slot(str(n), {"CUDA_VISIBLE_DEVICES": devices[n % len(devices)], **more}) for n in range(count)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = max(1, len(cores) // count)
    made = []
    for n in range(count):
        mine = {cores[(n * share + k) % len(cores)] for k in range(share)}
        threads = str(max(1, min(share, machine.cores() // count) // each))
        made.append(Slot(str(n), {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **more}, mine))
    return made


def supervise(sweep: Frozen, record: Study, count: int, left: int, helps: bool = False) -> None:
    """Run the sweep with `count` workers, or fewer where fewer tickets are left, until none is or it is stopped.

    The machine is shared out among `count` of them in either case: a trial that is run after a kill gets the threads
    it would have had before.

    On ctrl-c or SIGTERM the workers are asked to leave, and killed where they do not. One that `helps` the launch of
    another process leaves where its own workers die, and stops nothing.
    """
    options = sweep.options
    from optuna.exceptions import StorageInternalError

    places = slots(count, options.gpus_per_trial, options.slots_per_gpu)[:left]
    for place in places if helps else ():
        place.name = f"{study.HOST}-{os.getpid()}-{place.name}"
    (sweep.folder / "workers").mkdir(exist_ok=True)
    ended: set[str] = set()
    began: dict[int, float] = {}
    idle: float | None = None

    def tend() -> bool:
        """Look after all workers once; tell whether that was the last time."""
        nonlocal idle
        if not (_waiting(record) or any(s.process for s in places) or _running(record)):
            return bool(record.user_attrs.get(STOP)) or not study.mend(record)
        for slot in places:
            _tend(sweep, record, slot, places, start, ended)
        if _given_up(record, places, helps):
            return True
        look()
        there = {s.token for s in places if s.process is not None}
        study.reap(record, options.max_retries, ended, there, sweep.folder)
        stop_after_failures(sweep, record)
        if options.engine is not Engine.local:
            idle = _end_idle(record, places, idle)
        _end_overdue(sweep, record, places, began)
        show()
        return bool(record.user_attrs.get(STOP)) and not any(s.process for s in places)

    with proxy.serving(sweep) as (shared, look), screen.live(sweep, record) as show:
        start = engines.starter(options, sweep.folder, shared)
        try:
            _repeat(tend, f"the record of sweep {sweep.name}")
        except BaseException:
            killed = _leave(places)
            with suppress(StorageInternalError):  # which may be why we are here
                study.reap(record, sweep.options.max_retries, folder=sweep.folder, excused=killed)
            raise


def _repeat(work: Callable[[], bool], name: str) -> None:
    """Do work again and again until it says that it is over, also over a database that is being restarted.

    Raises:
        MachineError: the database has not answered for `SILENT_SECONDS`.
    """
    from optuna.exceptions import StorageInternalError

    silent: float | None = None
    while True:
        try:
            if work():
                return
            silent = None
        except StorageInternalError as error:
            silent = time.monotonic() if silent is None else silent
            if time.monotonic() - silent >= SILENT_SECONDS:
                told = str(error).strip().splitlines()[0]
                raise MachineError(f"{name} cannot be reached: {told:.200}; the same command goes on") from error
        time.sleep(POLL_SECONDS)


def _waiting(record: Study) -> int:
    from optuna.trial import TrialState

    return len(record.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _running(record: Study) -> int:
    from optuna.trial import TrialState

    return len(record.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def _tend(
    sweep: Frozen, record: Study, slot: Slot, places: list[Slot], start: Callable[..., Worker], ended: set[str]
) -> None:
    """Collect a worker that ended, and start one where tickets wait."""
    if slot.process is not None:
        code = slot.process.poll()
        if code is None:
            return
        slot.process = None
        ended.add(slot.token)
        died = code not in (0, PREEMPTED, RENEWED) and not slot.cancelled
        fresh = not died or _saw_an_end(record, slot.token)
        slot.deaths = int(died) + (0 if fresh else slot.deaths)
        faulty = died and _met_a_fault(record, slot.token)
        slot.faults = int(faulty) + (0 if fresh else slot.faults)
        rest = min(REST_SECONDS * 2 ** (slot.faults - 1), LONGEST_REST) if faulty else 0.0
        slot.rests = time.monotonic() + rest
        if died:
            log, rests = f"{sweep.folder}/workers/{slot.name}.log", f"; it rests {rest:.0f} s" if rest else ""
            say(f"worker {slot.name} died (exit {code}); see {log}{rests}", always=True)
    if slot.shut or record.user_attrs.get(STOP) or not study.waiting(record):
        return
    others = [other for other in places if other is not slot and not other.shut]
    alone = any(not other.faults for other in others)  # what all places meet is in none of them
    if slot.deaths > 3 + sweep.options.max_retries or (slot.faults > 1 and alone):
        slot.shut = True
        if others:
            say(f"worker {slot.name} died {slot.deaths} times in a row; the others go on without it", always=True)
        return
    if time.monotonic() < slot.rests:
        return
    slot.token, slot.cancelled = uuid.uuid4().hex, False
    slot.process = start(slot.name, slot.token, slot.env, slot.cores)


def _saw_an_end(record: Study, token: str) -> bool:
    """Whether a worker told how a trial ended before it ended itself."""
    told = (t.user_attrs for t in record.get_trials(deepcopy=False) if t.state.is_finished())
    return any((a.get("ftexp:worker") or {}).get("token") == token and "ftexp:lost" not in a for a in told)


def _met_a_fault(record: Study, token: str) -> bool:
    """Whether a worker left because of a fault of the machine, with a trial that it could not end."""
    told = (t.user_attrs for t in record.get_trials(deepcopy=False))
    return any((a.get("ftexp:worker") or {}).get("token") == token and study.FAULT in a for a in told)


def _given_up(record: Study, places: list[Slot], helps: bool) -> bool:
    """Whether to leave because none of the places starts a worker any more.

    A helper leaves the rest to the launch. A launch stops the sweep, unless trials run: those are of another machine.
    """
    if not all(s.shut for s in places) or not _waiting(record):
        return False
    told = f"worker {places[-1].name} died {places[-1].deaths} times in a row"
    if helps:
        say(f"{told}; this machine helps no further", always=True)
    elif not _running(record):
        record.set_user_attr(STOP, told)
    return helps


def _end_idle(record: Study, places: list[Slot], since: float | None) -> float | None:
    """Cancel the jobs that have nothing to do any more, above all those that a cluster has not begun yet.

    Workers that see their last trial off have some seconds for it. Returns since when there has been nothing to do.
    """
    if not record.user_attrs.get(STOP) and _waiting(record):
        return None
    since = time.monotonic() if since is None else since
    if time.monotonic() - since >= IDLE_SECONDS:
        from optuna.trial import TrialState

        running = record.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        busy = {(t.user_attrs.get("ftexp:worker") or {}).get("token") for t in running}
        for slot in places:
            if slot.process is not None and slot.token not in busy and not slot.cancelled:
                slot.cancelled = True
                slot.process.kill()
    return since


def _end_overdue(sweep: Frozen, record: Study, places: list[Slot], began: dict[int, float]) -> None:
    """Kill the worker of a trial that is well past its time and so no longer looks at the clock itself.

    `began` keeps when each attempt was first seen running, on the monotonic clock: the record's times are the wall
    clock's, which may be put forward by an hour.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    minutes = sweep.options.timeout_minutes
    if minutes is None:
        return
    for trial in record.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("ftexp:worker")
        ran = time.monotonic() - began.setdefault(trial._trial_id, time.monotonic())
        if worker is None or ran < 60 * minutes * trial.user_attrs.get(study.PACK, 1) + GRACE_SECONDS:
            continue
        for slot in places:
            if slot.process is not None and slot.token == worker["token"]:
                told = {"ftexp:kind": "timeout", "ftexp:reason": f"ran longer than {minutes:g} minutes"}
                with suppress(UpdateFinishedTrialError):  # it has come to its end at last
                    for name, value in told.items():
                        record._storage.set_trial_user_attr(trial._trial_id, name, value)
                    record._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
                    slot.process.kill()


def _leave(places: list[Slot]) -> set[str]:
    """Have the workers keep a checkpoint and end; a second ctrl-c, or too long a wait, kills them.

    Returns:
        The tokens of those that were killed.
    """
    started = [s.process for s in places if s.process is not None]
    if started:
        say(f"asking {len(started)} workers to leave; ctrl-c again kills them")
    for process in started:
        process.terminate()
    until = time.monotonic() + GRACE_SECONDS
    try:
        for process in started:
            process.wait(max(0.1, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        killed = {s.token for s in places if s.process is not None and s.process.poll() is None}
        for process in started:
            process.kill()
        for process in started:
            with suppress(subprocess.TimeoutExpired):  # a cluster that does not answer does not hold us
                process.wait(GRACE_SECONDS)
        return killed
    return set()
