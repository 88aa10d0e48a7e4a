"""The sweep's record in an Optuna storage: tickets, who holds them, what came of them.

At the start exactly as many tickets are queued as trials are wanted. A worker claims one, runs it and tells the
result; one whose worker died is queued again with the same point. The ticket's number names its folder, so neither
ever changes hands, whatever number Optuna gives an attempt.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from copy import deepcopy as copied
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftexp import experiment
from ftexp.errors import ConfigError, MachineError
from ftexp.files import read_trial
from ftexp.sweep import race
from ftexp.sweep.options import BY_ROWS, Options, Pruner, Sampler
from ftexp.sweep.space import Space
from ftexp.train import checkpoints

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial, TrialState

HOST = socket.gethostname()
JOURNAL = "study.journal"
UNSIGNED_SECONDS = 15.0
"""A ticket claimed and not signed for this long lost its worker in between."""
SILENT_SECONDS = 180.0
"""A worker of another machine is taken for dead after this long without a new heartbeat."""


class _Lock:
    """Lock for Optuna's journal that the kernel frees when its holder is killed; Optuna's own then waits 30 s.

    Whoever takes it cuts off what a kill or a full disk left of the last entry: the next one would be written behind
    that, and both would be lost.
    """

    def __init__(self, path: str) -> None:
        self.path = f"{path}.lock"

    def acquire(self) -> bool:
        self.held = open(self.path, "w")  # noqa: PTH123, SIM115
        fcntl.flock(self.held, fcntl.LOCK_EX)
        cut_torn(Path(self.path.removesuffix(".lock")))
        return True

    def release(self) -> None:
        self.held.close()


CONNECT = "10"
"""Seconds that PostgreSQL's library waits for a server that does not answer; it would wait for minutes, or for good."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file for as long as the block runs."""
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def storage(folder: Path, url: str | None) -> BaseStorage:
    """Open the storage of a sweep: an Optuna address, or a journal file in its folder.

    A journal whose last line was torn by a full disk or a power cut is cut back to its last whole line; Optuna would
    otherwise append to the torn one and lose both.

    Raises:
        MachineError: the storage cannot be opened.
    """
    import optuna
    from optuna.storages import JournalStorage, get_storage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is not None:
        os.environ.setdefault("PGCONNECT_TIMEOUT", CONNECT)
        try:
            return _proxy(url) if url.startswith("grpc://") else get_storage(url)
        except ImportError as error:
            extra = "grpc" if url.startswith("grpc://") else "postgres"
            raise MachineError(
                f"sweep.storage={url} needs a package that is not installed; pip install 'ftexp[{extra}]'"
            ) from error
        except Exception as error:  # drivers raise whatever they like; all of it means the same to a person
            raise MachineError(f"sweep.storage={url} cannot be opened: {str(error).splitlines()[0]}") from error
    path = folder / JOURNAL
    lock = _Lock(str(path))
    lock.acquire()
    try:
        _check_end(path)
    finally:
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_entry(path, _bad_line(path)) from error


def _no_entry(path: Path, number: int) -> MachineError:
    return MachineError(
        f"{path}:{number}: must be one entry of the sweep's record; put the file back, or remove the line"
    )


def _bad_line(path: Path) -> int:
    """Count to the first line of a journal that is no entry; to the last where all look like one."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return next((number for number, line in enumerate(lines, 1) if not _is_entry(line)), len(lines))


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and "op_code" in entry


def _proxy(url: str) -> BaseStorage:
    """Connect to Optuna's proxy, which holds the connection to a database for many workers."""
    import warnings
    from urllib.parse import urlsplit

    from optuna.storages import GrpcStorageProxy
    from optuna.storages._grpc import client

    client.create_insecure_channel = _channel

    at = urlsplit(url)
    if not at.hostname or not at.port:
        raise ValueError("must be grpc://host:port")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls it experimental since 4.2
        made = GrpcStorageProxy(host=at.hostname, port=at.port)
    made.wait_server_ready(timeout=60)
    return made


PATIENT = {
    "name": [{}],
    "waitForReady": True,
    "retryPolicy": {"maxAttempts": 5, "initialBackoff": "1s", "maxBackoff": "8s", "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"]},
}  # fmt: skip
"""Calls of the proxy: they wait for one that is started again; Optuna's own fail, and the worker with them."""


def _channel(host: str, port: int) -> Any:
    import grpc

    settings = json.dumps({"methodConfig": [PATIENT]})
    return grpc.insecure_channel(
        f"{host}:{port}", [("grpc.max_receive_message_length", -1), ("grpc.service_config", settings)]
    )


def cut_torn(path: Path) -> None:
    """Cut a torn last line off a file of lines; only while nobody writes to it."""
    with suppress(FileNotFoundError), path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _check_end(path: Path) -> None:
    """Refuse a whole last line that is no entry, which Optuna would pass over until the next."""
    content = path.read_bytes() if path.exists() else b""
    if content and not _is_entry(content[content.rfind(b"\n", 0, -1) + 1 :]):
        raise _no_entry(path, content.count(b"\n"))


POPULATION, OPTUNAS_POPULATION = 8, 50
"""Points of a generation of NSGA-II, the first of which is drawn at random, in sweeps of less than two of Optuna's."""


def sampler(options: Options, seed: int, conditional: bool = False) -> BaseSampler:
    """Make Optuna's sampler; a TPE models the axes of each branch together where some depend on others.

    Raises:
        ConfigError: `sampler_args` holds a keyword the sampler does not know.
    """
    import optuna.samplers as known

    made: dict[Sampler, Any] = {
        Sampler.grid: known.RandomSampler,  # never asked: a grid's points are fixed
        Sampler.random: known.RandomSampler,
        Sampler.qmc: known.RandomSampler,  # replaced by `_sobol`
        Sampler.tpe: known.TPESampler,
        Sampler.gp: known.GPSampler,
        Sampler.nsga2: known.NSGAIISampler,
    }
    own: dict[str, Any] = {"group": True} if conditional and options.sampler is Sampler.tpe else {}
    if options.sampler is Sampler.nsga2 and (options.n_trials or 0) < 2 * OPTUNAS_POPULATION:
        own = {"population_size": POPULATION}
    return _accept(made[options.sampler], "sweep.sampler_args", {**own, **options.sampler_args}, seed=seed)


def pruner(options: Options, rung: int, longest: int = 0) -> BasePruner:
    """Make Optuna's pruner.

    Args:
        options: of the sweep.
        rung: steps between two reports; the first rung of successive halving.
        longest: steps of the longest trial, by which Hyperband lays out its brackets; 0 for a sweep whose launch did
            not keep it. Optuna would take the longest one that is complete when a process first asks, so that each
            process, and each launch, has other brackets.

    Raises:
        ConfigError: `pruner_args` holds a keyword the pruner does not know.
    """
    import optuna.pruners as known

    args = options.pruner_args
    match options.pruner:
        case Pruner.none:
            return known.NopPruner()
        case Pruner.race | Pruner.halving:
            race.rule(options)
            return known.NopPruner()  # it judges by rows, which are not in the record
        case Pruner.asha:
            given = {"min_resource": max(1, rung), "reduction_factor": 2, **args}
            return _accept(known.SuccessiveHalvingPruner, "sweep.pruner_args", given)
        case Pruner.hyperband:
            given = {"min_resource": max(1, rung), "max_resource": longest or "auto", **args}
            return _accept(known.HyperbandPruner, "sweep.pruner_args", given)
        case Pruner.median:
            return _accept(known.MedianPruner, "sweep.pruner_args", {"n_startup_trials": 3, **args})
        case Pruner.patient:
            inner = _accept(known.MedianPruner, "sweep.pruner_args", {"n_startup_trials": 3, **args})
            return _accept(known.PatientPruner, "sweep.pruner_args", {"wrapped_pruner": inner, "patience": 2})


def _accept(made: Any, key: str, args: dict[str, Any], **own: Any) -> Any:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made(**own, **args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} is refused by {made.__name__}: {error}") from error


FAKES, MOST_FAKES = 12, 64
"""Made-up trials that keywords are tried over: more than samplers draw at random first, or than a keyword says."""


def try_sampler(space: Space, options: Options, directions: list[str]) -> None:
    """Propose a point over made-up trials, in memory: most keywords are looked at only when a sampler is asked.

    Raises:
        ConfigError: `sampler_args` make Optuna's sampler fail.
    """
    import warnings

    from optuna.trial import TrialState

    conditional = any(axis.when for axis in space.axes)
    made = sampler(options, 0, conditional)
    if not options.sampler_args:
        return
    asked = [options.sampler_args.get(key) for key in ("n_startup_trials", "population_size")]
    count = max(FAKES, *(min(n + 1, MOST_FAKES) for n in asked if isinstance(n, int)), 0)
    history, drawn = [], copied(options)
    drawn.sampler, drawn.sampler_args = Sampler.random, {}
    with _told("sweep.sampler_args", made, options.sampler_args), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            trial = propose(space, drawn, directions, [], number)
            trial.state, trial.values = TrialState.COMPLETE, [float(number % 5)] * len(directions)
            trial.system_attrs = {"NSGAIISampler:generation": 0}
            history.append(trial)
        propose(space, options, directions, history, count)


def try_pruner(options: Options, rung: int, longest: int) -> None:
    """Ask the pruner about made-up trials, in memory.

    Raises:
        ConfigError: `pruner_args` make Optuna's pruner fail.
    """
    import optuna
    from optuna.trial import TrialState

    made = pruner(options, rung, longest)
    if not options.pruner_args or options.pruner in BY_ROWS:
        return
    with _told("sweep.pruner_args", made, options.pruner_args):
        record = optuna.create_study(study_name="ftexp", pruner=made)
        for number in range(FAKES):
            trial = record.ask()
            for step in range(1, 7):
                trial.report(float(number), step * max(1, rung))
                if trial.should_prune():
                    break
            record.tell(trial, float(number), state=TrialState.COMPLETE)


@contextmanager
def _told(key: str, made: Any, args: dict[str, Any]) -> Iterator[None]:
    """Tell in one line, and quietly, what Optuna makes of keywords; it raises whatever comes of them."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    except Exception as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        told = ", ".join(f"{name}: {value}" for name, value in args.items())
        raise ConfigError(
            f"{key} must be keywords that {type(made).__name__} can work with, got {{{told}}}: {why}"
        ) from error
    finally:
        optuna.logging.set_verbosity(before)


def ticket(trial: FrozenTrial) -> int:
    """Return the number of the ticket an attempt belongs to."""
    return trial.user_attrs["ftexp:ticket"]


def within(trial: FrozenTrial, at_most: dict[str, float], folder: Path) -> bool:
    """Whether a trial keeps the bounds of `sweep.at_most` as they are now."""
    return all(over <= 0 for over in excess(trial, at_most, folder).values())


def excess(trial: FrozenTrial, at_most: dict[str, float], folder: Path) -> dict[str, float]:
    """Tell by how much a trial passes each bound of `sweep.at_most` as it is now, by the name of its constraint.

    What it recorded is by how much it passed those of its day; a sweep may be launched again with others.

    Args:
        trial: with its constraints, named `<metric> at most <bound>`.
        at_most: the bounds.
        folder: of the sweep, whose trials' files have the metrics that no bound was on.
    """
    over = {name: value for name, value in trial.constraints.items() if " at most " in name}
    known = {name.rpartition(" at most ")[0]: (float(name.rpartition(" at most ")[2]), over[name]) for name in over}
    told = {}
    for name, bound in at_most.items():
        if name in known:
            then, value = known[name]
            over = value if then == bound else value + then - bound
        else:
            over = _score(folder / str(ticket(trial)), name) - bound
        told[f"{name} at most {bound!r}"] = math.inf if math.isnan(over) else over
    return told


_bounded: dict[int, tuple[FrozenTrial, dict[str, float], FrozenTrial]] = {}


def bounded(trial: FrozenTrial, at_most: dict[str, float], folder: Path) -> FrozenTrial:
    """Return a complete trial with the bounds of now as its constraints; made once in a process: it never changes."""
    kept, bounds, made = _bounded.get(id(trial), (None, None, trial))
    if kept is not trial or bounds != at_most:
        made = constrained(trial, excess(trial, at_most, folder))
        _bounded[id(trial)] = trial, at_most, made
    return made


def constrained(trial: FrozenTrial, over: dict[str, float]) -> FrozenTrial:
    """Return a trial with these constraints and no others."""
    if trial.constraints == over:
        return trial
    made = copy(trial)
    made.system_attrs = {k: v for k, v in trial.system_attrs.items() if not k.startswith("constraint")}
    for name, value in over.items():
        made.set_constraint(name, value)
    return made


def _score(folder: Path, name: str) -> float:
    return (read_trial(folder) or {}).get("scores", {}).get(name, math.inf)


def judged(study: Study, trial_id: int, fresh: Container[str] = ()) -> tuple[Study, FrozenTrial]:
    """Return what a pruner is to judge by, and the trial.

    Attempts that were lost are left out: their rungs would compete with those of their repetition. Hyperband draws a
    bracket from the study's name and the trial's number: trials are numbered by their tickets, for a repetition has
    another number, and the name is one for all sweeps, so that two of one seed are the same.

    Args:
        study: of the sweep.
        trial_id: the judged trial's.
        fresh: marks of that trial which the pruner is to take for not yet made.
    """
    view = copy(study)
    view.study_name = "ftexp"
    view._storage = cast(Any, _Counting(study, trial_id, fresh))
    return view, _without(_numbered(study._storage.get_trial(trial_id)), fresh)


class _Counting:
    """A storage that tells of the attempts that count alone."""

    def __init__(self, study: Study, trial_id: int, fresh: Container[str]) -> None:
        self._study, self._judged, self._fresh = study, trial_id, fresh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study._storage, name)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the study, by whatever name a pruner knows it."""
        return self._study._study_id

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """List the attempts, by ticket."""
        found = (t for t in counted(self._study) if states is None or t.state in states)
        told = [_without(_numbered(t), self._fresh if t._trial_id == self._judged else ()) for t in found]
        return [copied(t) for t in told] if deepcopy else told


def _numbered(trial: FrozenTrial) -> FrozenTrial:
    if trial.number == ticket(trial):  # of all but those that were queued again
        return trial
    made = copy(trial)
    made.number = ticket(trial)
    return made


def _without(trial: FrozenTrial, marks: Container[str]) -> FrozenTrial:
    """Return a trial without some of its marks."""
    if not any(key in marks for key in trial.system_attrs):
        return trial
    made = copy(trial)
    made.system_attrs = {key: value for key, value in trial.system_attrs.items() if key not in marks}
    return made


def counted(study: Study) -> list[FrozenTrial]:
    """List the attempts that count, by ticket: the last of each, and none that was lost with its worker."""
    last: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        attrs = trial.user_attrs
        if "ftexp:ticket" in attrs and not attrs.get("ftexp:lost"):
            last[attrs["ftexp:ticket"]] = trial
    return [last[number] for number in sorted(last)]


def unfinished(study: Study) -> int:
    """Count the tickets that wait or run."""
    return sum(not t.state.is_finished() for t in counted(study))


def queue(study: Study, points: list[dict[str, Any] | None]) -> None:
    """Queue the tickets that are not there; None leaves the point to the sampler.

    One whose attempts were all lost keeps the point that it was given: somebody was killed before queueing it again,
    and what its checkpoint holds is of that point.
    """
    from optuna.trial import TrialState, create_trial

    present, gone = {ticket(t) for t in counted(study)}, lost(study)
    for number, point in enumerate(points):
        if number in present:
            continue
        if number in gone:
            _again(study, gone[number])
        else:
            attrs = {} if point is None else {"fixed_params": point}
            study.add_trial(
                create_trial(state=TrialState.WAITING, system_attrs=attrs, user_attrs={"ftexp:ticket": number})
            )


def lost(study: Study) -> dict[int, FrozenTrial]:
    """Return the last attempt of each ticket of which no attempt counts."""
    present = {ticket(t) for t in counted(study)}
    found = {ticket(t): t for t in study.get_trials(deepcopy=False) if "ftexp:ticket" in t.user_attrs}
    return {number: t for number, t in found.items() if number not in present}


def _again(study: Study, gone: FrozenTrial) -> None:
    told = gone.user_attrs
    requeue(study, gone, told.get("ftexp:retries", 0), told.get(FAULTS, 0))


DROPPED = "ftexp:dropped"
"""Trial attribute: true of a ticket that waited when a launch with fewer trials took it back."""
MEND_SECONDS = 5.0
"""Age of an end after which whoever was to queue the ticket again was killed before."""


def mend(study: Study) -> int:
    """Queue again what nobody has queued, once that is sure; return how many tickets that is, or may soon be."""
    gone = [a for a in lost(study).values() if a.datetime_complete is not None and DROPPED not in a.user_attrs]
    for attempt in gone:
        if abs(datetime.now() - cast(datetime, attempt.datetime_complete)) > timedelta(seconds=MEND_SECONDS):
            _again(study, attempt)
    return len(gone)


def claim(study: Study, token: str = "", beside: bool = False) -> Trial | None:
    """Take the waiting ticket with the lowest number, sign it, and return it; None where none waits.

    One that met a fault of the machine comes after the others, so that the place where it did meets another first; one
    that is kept for another worker is passed over, and `beside` other tickets one that is to be alone. Of two attempts
    of one ticket, which two processes may have queued, the first alone is run. `token` is what a supervisor named this
    worker.

    Taking is atomic in a journal and in PostgreSQL. Two private names of Optuna are used: `study.ask()` would make a
    new trial where the queue is empty.
    """
    import optuna
    from optuna.trial import TrialState

    store = study._storage
    for waits in sorted(waiting(study, token), key=_place):
        if beside and alone(waits):
            continue
        try:
            if not store.set_trial_state_values(waits._trial_id, state=TrialState.RUNNING):
                continue
        except optuna.exceptions.UpdateFinishedTrialError:
            continue
        study._thread_local.cached_all_trials = None
        trial = optuna.trial.Trial(study, waits._trial_id)
        try:
            signature = {"host": HOST, "pid": os.getpid(), "start": started(os.getpid()), "token": token}
            trial.set_user_attr("ftexp:worker", signature)
            if _queued_before(study, waits):
                store.set_trial_user_attr(waits._trial_id, "ftexp:lost", True)
                store.set_trial_state_values(waits._trial_id, state=TrialState.FAIL)
                continue
        except optuna.exceptions.UpdateFinishedTrialError:
            continue  # so slow that somebody took this process for dead
        return trial
    return None


def _queued_before(study: Study, trial: FrozenTrial) -> bool:
    """Whether an earlier attempt of a ticket waits or runs."""
    others = (t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("ftexp:ticket") == ticket(trial))
    return any(t.number < trial.number and not t.state.is_finished() for t in others)


PACK = "ftexp:pack"
"""Trial attribute: how many share its training."""
ALONE = "ftexp:alone"
"""Trial attribute: true of a ticket that is to be run without others beside it."""


def alone(trial: FrozenTrial) -> bool:
    """Whether a ticket is to be run without others beside it, for one of its attempts may have killed its worker."""
    return bool(trial.user_attrs.get(ALONE))


KEPT, KEPT_SECONDS = "ftexp:kept", 60.0
"""Trial attribute: the worker that a ticket was given back for, and until when it is for that one alone."""


def kept(trial: FrozenTrial, token: str) -> bool:
    """Tell whether a waiting ticket is kept for another worker than this, by the wall clock."""
    told = trial.user_attrs.get(KEPT)
    return told is not None and told["for"] != token and 0 < told["until"] - time.time() <= KEPT_SECONDS


def waiting(study: Study, token: str = "") -> list[FrozenTrial]:
    """List the tickets that a worker may take."""
    from optuna.trial import TrialState

    found = study._storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.WAITING,))
    return [t for t in found if "ftexp:ticket" in t.user_attrs and not kept(t, token)]


def _place(trial: FrozenTrial) -> tuple[int, int]:
    return trial.user_attrs.get(FAULTS, 0), ticket(trial)


BOOT = Path("/proc/sys/kernel/random/boot_id")


def started(pid: int) -> str | None:
    """Tell when a process started, which with its number names it for good; None for a dead one or a zombie.

    On Linux in ticks since the machine's, which is named too: its wall clock may be set.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if not BOOT.exists():
            return str(process.create_time())
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5), field 22
        return f"{ticks} of {BOOT.read_text().strip()}"
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


def alive(trial: FrozenTrial) -> bool:
    """Tell whether a running attempt's worker may still be at it; in doubt it is."""
    worker = trial.user_attrs.get("ftexp:worker")
    began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    if worker is None:  # one that looks begun long ahead of now was begun before a clock was put back
        return abs(time.time() - began) < UNSIGNED_SECONDS
    if worker["host"] == HOST:
        return started(worker["pid"]) == worker["start"]
    # A clock may jump, and another machine's may be wrong: what counts is how long no new heartbeat was seen here.
    key, beat = (trial._trial_id, worker["pid"], worker["start"]), trial.user_attrs.get("ftexp:beat")
    now = time.monotonic()
    if key not in _beats or _beats[key][0] != beat:
        _beats[key] = beat, now
    return now - _beats[key][1] < SILENT_SECONDS


_beats: dict[tuple[int, int, str], tuple[float | None, float]] = {}
"""Attempt on another machine -> its last heartbeat, and when this process first saw that one, on its own clock."""


FAULT = "ftexp:fault"
"""Trial attribute: what was amiss with the machine that its worker left."""
MACHINE = "machine"
"""Kind of failure of a trial that met something amiss with the machine where no worker else could be asked."""
FAULTS, MOST_FAULTS = "ftexp:faults", 2
"""Trial attribute: earlier attempts of its ticket that met such a fault; and how many a ticket may meet."""
REACHED = "ftexp:reached"
"""Trial attribute: step of the checkpoint that was there when a launch queued the ticket again."""
DIED = "crash:"
"""Begins the reason of an attempt whose worker was found dead."""
OF_ATTEMPT = ("completed_rung", "constraint")
"""Begin the names of what an attempt's own course left in its system attributes."""


def reap(
    study: Study, max_retries: int, ended: Container[str] = (), there: Container[str] = (), folder: Path | None = None,
    excused: Container[str] = (), with_launch: bool = False,
) -> list[int]:  # fmt: skip
    """Queue the tickets of dead workers again, each with the point it had; return their numbers.

    After `max_retries` further attempts a ticket has failed: whatever kills its worker is in the trial. A fault of the
    machine is no retry; a ticket that meets more than `MOST_FAULTS` has failed too. Nor is it a retry where there is a
    checkpoint beyond the one that was there the last time.

    A ticket whose worker died without one is run alone from then on, which is no retry of a pack: which of them killed
    it shows when each is alone. Where the launch died too, as at a power cut, it is blamed the second time only.

    Args:
        study: the record.
        max_retries: of a ticket.
        ended: tokens of workers that are known to be gone, wherever they ran.
        there: tokens of workers that are known not to be: a suspended job, or one that cannot reach the record for a
            while, tells no sign of life.
        folder: of the sweep, with the checkpoints; without, each attempt counts.
        excused: tokens of workers that we killed ourselves.
        with_launch: whether the launch that started them is gone too.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    store, again = study._storage, []
    for trial in store.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.RUNNING,)):
        token = (trial.user_attrs.get("ftexp:worker") or {}).get("token", "")
        if token not in ended and (token in there or alive(trial)):
            continue
        faulty, before = FAULT in trial.user_attrs, trial.user_attrs
        reached = 0 if folder is None else checkpoints.newest(folder / str(ticket(trial)) / "checkpoints")
        stuck = not faulty and token not in excused and reached <= before.get(REACHED, 0)
        blamed = stuck and not (with_launch and not before.get("ftexp:retries", 0))
        counts = stuck and not (blamed and before.get(PACK, 1) > 1)
        retries = before.get("ftexp:retries", 0) + counts
        faults = before.get(FAULTS, 0) + faulty
        lost = retries <= max_retries and faults <= MOST_FAULTS
        try:
            store.set_trial_user_attr(trial._trial_id, "ftexp:lost", lost)
            if not lost:
                store.set_trial_user_attr(trial._trial_id, "ftexp:kind", "crash")  # `max_failures` counts it
            store.set_trial_user_attr(
                trial._trial_id, "ftexp:reason", f"{DIED} {trial.user_attrs.get(FAULT, 'worker died')}"
            )
            store.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        except UpdateFinishedTrialError:
            continue  # another process was first
        if lost:
            requeue(study, trial, retries, faults, reached, single=blamed)
            again.append(ticket(trial))
    return again


def was_reaped(study: Study, trial: Trial) -> bool:
    """Whether another process took this one for dead, and has queued its ticket again."""
    told = study._storage.get_trial(trial._trial_id).user_attrs
    return bool(told.get("ftexp:lost")) and str(told.get("ftexp:reason", "")).startswith(DIED)


def requeue(
    study: Study, trial: FrozenTrial, retries: int = 0, faults: int = 0, reached: int = 0, to: str = "",
    single: bool = False,
) -> None:  # fmt: skip
    """Queue the ticket of an attempt again, with the point it had and what the sampler keeps with that.

    NSGA-II keeps the generation with the point: an attempt without it belongs to none, and is no parent.

    Args:
        study: the record.
        trial: the attempt.
        retries: further attempts so far.
        faults: those of them that met a fault of the machine.
        reached: step of the checkpoint that it goes on from, where that is known.
        to: token of a worker that it is kept for.
        single: whether it is to be run alone from now on.
    """
    from optuna.trial import TrialState, create_trial

    point = trial.system_attrs.get("fixed_params") or trial.params or None  # a kill may have left half the params
    kept = {k: v for k, v in trial.system_attrs.items() if not k.startswith(OF_ATTEMPT)}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            system_attrs={} if point is None else kept | {"fixed_params": point},
            user_attrs={
                "ftexp:ticket": ticket(trial),
                "ftexp:retries": retries,
                FAULTS: faults,
                REACHED: max(reached, trial.user_attrs.get(REACHED, 0)),
                **({ALONE: True} if single or trial.user_attrs.get(ALONE) else {}),
                **({KEPT: {"for": to, "until": time.time() + KEPT_SECONDS}} if to else {}),
            },
        )
    )


def settle(
    study: Study, points: list[dict[str, Any] | None], max_retries: int, folder: Path | None = None
) -> list[int]:
    """Bring the record in order after whatever ended the last launch: reap, then queue what is missing.

    Args:
        study: the record.
        points: of all tickets.
        max_retries: further attempts at a ticket whose worker died.
        folder: of the sweep; tickets that are complete and whose files are not all there are queued again.

    Returns:
        The tickets whose files are gone.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    reap(study, max_retries, folder=folder, with_launch=True)
    for trial in counted(study):
        attrs = trial.user_attrs
        if attrs.get("ftexp:kind") == MACHINE:
            requeue(study, trial, attrs.get("ftexp:retries", 0))
        if attrs.get("ftexp:lost") is not False:
            continue
        retries = attrs.get("ftexp:retries", 0) + (FAULT not in attrs)
        if retries <= max_retries:  # the machine may have been mended, or `max_retries` was smaller
            requeue(study, trial, retries)
    queue(study, points)
    for trial in counted(study):  # of a launch with more trials
        if ticket(trial) >= len(points) and trial.state is TrialState.WAITING:
            with suppress(UpdateFinishedTrialError):  # a helper has taken it, and come to its end
                study._storage.set_trial_user_attr(trial._trial_id, DROPPED, True)
                study._storage.set_trial_user_attr(trial._trial_id, "ftexp:lost", True)
                study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
    done = [t for t in counted(study) if t.state is TrialState.COMPLETE] if folder is not None else []
    gone = [t for t in done if folder is not None and not experiment.has_results(folder / str(ticket(t)))]
    for trial in gone:
        requeue(study, trial)
    return [ticket(t) for t in gone]


def skipped_again(study: Study, mark: str) -> None:
    """Queue tickets again that were skipped under other limits than these; they are planned anew."""
    for trial in counted(study):
        if trial.user_attrs.get("ftexp:skipped", mark) != mark:
            requeue(study, trial)


def seed_of(seed: int, number: int) -> int:
    """Derive the seed of one proposal, so that it depends on nothing but the sweep's seed and the ticket."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big") % 2**31


def propose(space: Space, options: Options, directions: Any, history: list[FrozenTrial], number: int) -> Any:
    """Choose the point of a ticket from what is known, in memory and from scratch.

    The sampler sees the attempts that count in the order of their tickets and is seeded for this ticket alone, so a
    proposal depends on the results it saw and on nothing else: not on how often the sweep was killed before.

    Returns:
        A frozen trial with the point in `params`.
    """
    import optuna
    from optuna.trial import TrialState

    distributions = {axis.key: axis.distribution() for axis in space.axes}
    if options.sampler is Sampler.qmc:
        drawn = space.trimmed(_sobol(space, options, number))
        return optuna.trial.create_trial(
            state=TrialState.RUNNING, params=drawn, distributions={key: distributions[key] for key in drawn}
        )
    conditional = any(axis.when for axis in space.axes)
    made = sampler(options, seed_of(options.seed, number), conditional)
    if options.sampler is Sampler.gp:
        history = scored_worst(history, directions)
    if not conditional:
        _tell_space(made, distributions, history)
    mirror = _mirror(directions, made, history)
    asked = mirror.ask({} if conditional else distributions)
    point: dict[str, Any] = {}
    for axis in space.axes if conditional else ():
        if space.active(axis, point):
            point[axis.key] = asked._suggest(axis.key, distributions[axis.key])
    return mirror._storage.get_trial(asked._trial_id)


def avoided(trial: FrozenTrial) -> FrozenTrial:
    """Return what a sampler is to know of an attempt that failed by its point: pruned, and behind all that were.

    TPE ranks pruned attempts by their last rung, and those without one last; it reads none that failed.
    """
    from optuna.trial import TrialState

    made = copy(trial)
    made.state, made.intermediate_values = TrialState.PRUNED, {}
    return made


THEIRS = ("diverged", "oom", "timeout", "undefined", "data", "crash")
"""Kinds of failure that a point has brought about; what was amiss with the machine says nothing of it."""


def by_its_point(trial: FrozenTrial) -> bool:
    """Whether an attempt failed by what its point asks for.

    One whose workers died each time did, as whatever kills them is in the trial; one that met faults of the machine did
    not.
    """
    attrs = trial.user_attrs
    return trial.state.is_finished() and attrs.get("ftexp:kind") in THEIRS and FAULT not in attrs


def scored_worst(history: list[FrozenTrial], directions: Any) -> list[FrozenTrial]:
    """Return a history with the worst known value, and the largest excess, for what was pruned, skipped or failed.

    A Gaussian process reads complete and running attempts alone: it would propose such a point again and again, and
    draw at random where nothing else has ended. The other samplers need no score: TPE ranks what was pruned behind what
    is complete, NSGA-II takes it for no parent, and random and Sobol points look at nothing.
    """
    from optuna.trial import TrialState

    done = [t for t in history if t.state is TrialState.COMPLETE]
    columns = zip(*(t.values for t in done), strict=True) if done else [(0.0,) for _ in directions]
    values = [(min if d == "maximize" else max)(column) for d, column in zip(directions, columns, strict=True)]
    bounds = {name: max(t.constraints[name] for t in done) for name in (done[0].constraints if done else ())}

    def scored(trial: FrozenTrial) -> FrozenTrial:
        if trial.state is not TrialState.PRUNED:
            return trial
        made = copy(trial)
        made.state, made.values = TrialState.COMPLETE, values
        return constrained(made, bounds)

    return [scored(trial) for trial in history]


def _mirror(directions: Any, made: BaseSampler, history: list[FrozenTrial]) -> Study:
    """Put a history into a study in memory; `add_trial` would copy and check each trial anew, at each proposal."""
    import optuna

    store = optuna.storages.InMemoryStorage()
    mirror = optuna.create_study(directions=directions, sampler=made, storage=store)
    trials = store._studies[mirror._study_id].trials
    for number, trial in enumerate(_copied(history)):
        trial.number = trial._trial_id = store._max_trial_id = number
        store._trial_id_to_study_id_and_number[number] = (mirror._study_id, number)
        trials.append(trial)
    return mirror


_copies: dict[int, tuple[FrozenTrial, FrozenTrial]] = {}


def _copied(history: list[FrozenTrial]) -> list[FrozenTrial]:
    """Copy attempts for a sampler, which reads through all attributes of each at every proposal.

    Queued points and rungs, which are the pruner's, are left out. What has ended never changes, and is copied once in a
    process.
    """
    global _copies
    import copy

    before, _copies = _copies, {}
    made = []
    for known in history:
        kept, trial = before.get(id(known), (None, None))
        if trial is None or kept is not known or not known.state.is_finished():
            trial = copy.copy(known)
            trial.system_attrs = {
                k: v
                for k, v in known.system_attrs.items()
                if k != "fixed_params" and not k.startswith("completed_rung")
            }
        _copies[id(known)] = known, trial
        made.append(trial)
    return made


def _tell_space(made: BaseSampler, distributions: dict[str, Any], history: list[FrozenTrial]) -> None:
    """Give a sampler the search space, which it would find by comparing the distributions of all trials, each time.

    Every attempt of a sweep has the same ones, unless some depend on others.
    """
    inferred = getattr(made, "_search_space", None) or getattr(made, "_intersection_search_space", None)
    told = {"COMPLETE", "PRUNED"} if inferred is not None and inferred._include_pruned else {"COMPLETE"}
    if inferred is not None and any(t.state.name in told for t in history):
        inferred._search_space, inferred._cached_trial_number = dict(distributions), len(history)


def _sobol(space: Space, options: Options, number: int) -> dict[str, Any]:
    """Return the ticket's point of a scrambled Sobol sequence, spread over the axes.

    The first ticket after the baselines has the first point: its first 2^n points are balanced, others are not.
    """
    import math
    import warnings

    from scipy.stats.qmc import Sobol

    number -= len(options.baselines)
    points = Sobol(len(space.axes), scramble=True, rng=options.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if number:
            points.fast_forward(number)
        unit = points.random(1)[0]
    values: dict[str, Any] = {}
    for axis, u in zip(space.axes, unit, strict=True):
        if axis.discrete:
            values[axis.key] = axis.texts[min(int(u * len(axis.texts)), len(axis.texts) - 1)]
            continue
        low, high = axis.low, axis.high + axis.whole  # a whole number stands for all from it up to the next
        low, high = (math.log(low), math.log(high)) if axis.log else (low, high)
        value = low + float(u) * (high - low)
        value = math.exp(value) if axis.log else value
        values[axis.key] = min(int(value), int(axis.high)) if axis.whole else min(value, axis.high)
    return values


DEPENDING = "depending"
"""Begins the names of keys that follow from searched ones."""
ARGS = "sweep.sampler_args"


def _listed(values: list[Any]) -> str:
    """Tell a key's values at all points; many by the first ones and a hash."""
    told = json.dumps(values)
    return told if len(told) <= 80 else f"{told[:60]}... ({hashlib.sha256(told.encode()).hexdigest()[:12]})"


@dataclass(frozen=True)
class Identity:
    """What makes two launches the same sweep."""

    told: dict[str, str]
    """Key -> value, for the comparison and for people."""

    @staticmethod
    def of(
        space: Space, options: Options, objectives: list[str], configs: dict[str, Any], depending: dict[str, list[Any]]
    ) -> Identity:
        """Collect the identity of a sweep: space, fixed config, objectives, sampler with its keywords and replicates.

        `depending` has the values of keys that follow from searched ones, at each point that was checked.

        How many trials, workers and retries there are, and the pruner, may change between launches.
        """
        told = {f"space {k}": v for k, v in space.told().items()}
        told |= {f"config {k}": json.dumps(v) for k, v in configs.items()}
        told |= {f"{DEPENDING} {k}": _listed(v) for k, v in depending.items()}
        told["objectives"] = ", ".join(objectives)
        told |= {f"sweep.{k}": str(getattr(options, k)) for k in ("seed", "replicates", "baselines")}
        told["sweep.sampler"] = options.sampler.value
        told[ARGS] = json.dumps(options.sampler_args, sort_keys=True)
        return Identity(told)

    def known_to(self, kept: dict[str, str] | None) -> Identity:
        """Leave out what a launch of before 2026-12 did not keep."""
        later = () if kept is None else tuple(p for p in (DEPENDING, ARGS) if not any(k.startswith(p) for k in kept))
        return Identity({k: v for k, v in self.told.items() if not k.startswith(later)})

    def check(self, kept: dict[str, str] | None, name: str, called: str | None = None) -> None:
        """Refuse a launch under the name of another sweep.

        Args:
            kept: identity of the sweep that has the name.
            name: of both.
            called: what leads to that sweep; None for the name.

        Raises:
            ConfigError: names what changed.
        """
        if kept is None or kept == self.told:
            return
        other = sorted(k for k in {*kept, *self.told} if kept.get(k) != self.told.get(k))
        other = [k for k in other if not k.startswith(DEPENDING)] or other  # what follows from the space is other too
        changed = [f"{k}: {kept.get(k, 'absent')} -> {self.told.get(k, 'absent')}" for k in other]
        raise ConfigError(
            f"name={name} is a sweep begun with another search space: {'; '.join(changed[:8])}; choose another name, "
            f"or go on as it was begun: python -m ftexp.sweep resume {called or name}"
        )
