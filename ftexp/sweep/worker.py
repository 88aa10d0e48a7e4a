"""`python -m ftexp.sweep.worker FOLDER`: takes tickets of a sweep until none is left.

The process keeps base model, tokens and base scores from trial to trial. Under torchrun it is one of several with
one trial over all of them: the first does all that is here, the others `follow` it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ftexp import config, data, experiment, facts, garbage, metrics, model, ranks, track
from ftexp.errors import (
    ConfigError,
    DataError,
    Diverged,
    FtexpError,
    HandedOver,
    MachineError,
    NoRoom,
    OutOfTime,
    Pruned,
    Skipped,
    Unusable,
)
from ftexp.files import no_room, read_json, read_trial, write_json
from ftexp.model import compute
from ftexp.progress import console, quiet_libraries, say
from ftexp.sweep import frozen, limits, packs, race, share, study
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import BY_ROWS, ENTERED, Sampler
from ftexp.sweep.share import STOP, TOKEN
from ftexp.train import control
from ftexp.train.control import Control, Judge, Recorded, Rung, Share

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

T = TypeVar("T")
RECORD = "FTEXP_RECORD"
"""Environment variable: address of the proxy that workers reach the record through."""
BEAT, BEAT_SECONDS = "beat", 60.0
LOOK_SECONDS = 2.0
"""A worker looks this often whether its sweep was told to leave; with more than 100 workers less often."""
LOOKS_A_SECOND = 50
"""Of all workers together: at one every two seconds each, a thousand would keep a database busy with nothing else."""
LAUNCH = "ftexp:launch"
"""Study attribute: which launch brought the record in order last, as its lock names it."""
PREEMPTED = 75
"""Exit code of a worker that was asked to leave and did."""
FULL = "ftexp:no room"
"""Study attribute: true where the reason to stop is a disk that takes no more, which is no trial's fault."""
LARGE = 1 << 20
"""Bytes from which a file that two trials share is linked."""
RENEWED = 76
"""Exit code of a worker whose processes fell out of step over a trial that failed, and which has told so."""
LEAVE = "ftexp:leave"
"""Study attribute: true where running trials, too, are to save a checkpoint and end."""


@dataclass(frozen=True)
class Outcome:
    """What came of a ticket."""

    state: str
    """complete, pruned, skipped or failed."""
    kind: str = ""
    """Of a failure: diverged, oom, data, crash, timeout, machine, or undefined for an objective without a value."""
    reason: str = ""
    """In words."""

    @property
    def common(self) -> bool:
        """Whether all processes of a trial end so together; anything else may have met one of them alone."""
        return self.kind in ("", "diverged", "timeout")


LOST = Outcome("failed", "crash", "another process of the trial is gone")
"""Of a trial whose first process was ended with another one that left no word."""


def work(sweep: Frozen, record: Study) -> None:
    """Take and run tickets until none waits, or the sweep is told to stop."""
    first = True
    while not stop_after_failures(sweep, record):
        trials = _claimed(record, packs.size(sweep, record, first))
        first = False
        if not trials and not share.awaited(sweep, record, look_seconds(sweep.options.workers)):
            break
        if len(trials) == 1:
            run_ticket(sweep, record, trials[0])
        elif trials:
            run_pack(sweep, record, trials)
        if compute.is_lost():  # every further trial would fail here at once
            raise MachineError("the GPU cannot be used by this process any more")
    ranks.agreed(None)


def _claimed(record: Study, most: int) -> list[Trial]:
    """Claim up to so many tickets."""
    trials: list[Trial] = []
    token = os.environ.get(TOKEN, "")
    while len(trials) < most and (trial := study.claim(record, token, beside=bool(trials))) is not None:
        trials.append(trial)
        if study.alone(trial._cached_frozen_trial):
            break
    return trials


def follow(sweep: Frozen) -> None:
    """Compute with the first process whatever ticket it has taken, until it takes none."""
    while (ticket := ranks.agreed(None)) is not None:
        number, point, attempt = ticket

        def execute(run: config.Run, folder: Path) -> None:
            same_rows(sweep, run)
            if reason := limits.passed(run, sweep.options):
                raise Skipped(reason)
            experiment.follow(run, folder)

        outcome, _ = _ended(sweep, number, point, execute)
        ranks.tell(f"end of {attempt}", json.dumps(asdict(outcome)))
        if not outcome.common:
            time.sleep(2 * ranks.PATIENCE_SECONDS)  # the first one ends us where it met the same
            ranks.leave(RENEWED)


def together(outcome: Outcome, attempt: int) -> tuple[Outcome, bool]:
    """Hear how a trial ended in the other processes.

    Returns:
        How it ended: what failed in one shows as a lost connection in the others. And whether all go on together.

    Raises:
        ranks.Lost: one of them is gone.
    """
    if ranks.count() == 1:
        return outcome, True
    words = ranks.told(f"end of {attempt}", outcome.common)
    others = [Outcome(**json.loads(word)) for word in words or ()]
    failed = [other for other in others if not other.common]
    in_step = outcome.common and all(other.state == outcome.state for other in others)
    return failed[0] if failed and outcome.kind == "crash" else outcome, in_step


def run_ticket(sweep: Frozen, record: Study, trial: Trial) -> None:
    """Choose the point of a claimed ticket, run it, and tell the storage what came of it."""
    number = study.ticket(trial._cached_frozen_trial)
    try:
        with _beating(record, look_seconds(sweep.options.workers), trial):
            point = choose(sweep, record, trial, number)
            ranks.agreed((number, point, trial._trial_id))
            outcome, values = _run(sweep, trial, point, number)
        with control.at_work():  # torchrun ends the others by a signal when one ends, and the ticket is not told yet
            outcome, in_step = together(outcome, trial._trial_id)
    except (KeyboardInterrupt, NoRoom):
        if not ranks.deserted():
            give_back(record, trial)
            raise
        with control.at_work():  # one that failed alone has left its word, also where this one had not come so far
            outcome, in_step = together(LOST, trial._trial_id)
        if outcome is LOST:
            raise ranks.Lost(LOST.reason) from None
        values = None
    except MachineError as error:
        _blame(trial, error)
        raise
    _tell(sweep, record, trial, outcome, values)
    if not in_step:
        stop_after_failures(sweep, record)
        ranks.leave(RENEWED)


def run_pack(sweep: Frozen, record: Study, trials: list[Trial]) -> None:
    """Do with several claimed tickets what `run_ticket` does with one, in one training.

    Their points are chosen before any is trained, as those of so many workers would be. Each is told the moment it is
    over, so a kill after that costs the others alone. Half of those that train are queued again where a worker without
    any asks for them.
    """
    ready: list[tuple[Trial, dict[str, Any], experiment.Asked]] = []
    untold, left = list(trials), []

    def over(place: int, end: dict[str, float] | BaseException) -> None:
        trial, point, _ = ready[place]

        def told(run: config.Run, folder: Path) -> dict[str, float]:
            if isinstance(end, BaseException):
                raise end
            return end

        try:
            outcome, values = _valued(sweep, trial, point, study.ticket(trial._cached_frozen_trial), told)
        except HandedOver as error:
            untold.remove(trial)
            say(f"trial {study.ticket(trial._cached_frozen_trial)} {error}")
            with control.at_work():  # a signal between its two acts would leave the ticket out of the queue
                give_back(record, trial, wished.to)
            return
        except (KeyboardInterrupt, MachineError) as error:
            left.append(error)
            return
        untold.remove(trial)
        _tell(sweep, record, trial, outcome, values)

    try:
        wished = share.Wished(record, share.how(sweep), Share())
        with _beating(record, look_seconds(sweep.options.workers), *trials, hear=wished.look):
            for trial in trials:
                number = study.ticket(trial._cached_frozen_trial)
                trial.set_user_attr(study.PACK, len(trials))
                point = choose(sweep, record, trial, number)
                outcome, asked = _ended(sweep, number, point, partial(_asked, sweep, trial, point, number, len(trials)))
                if asked is not None:
                    ready.append((trial, point, asked))
                    continue
                untold.remove(trial)
                _tell(sweep, record, trial, outcome, None)
            turns = packs.turns(sweep, record, len(ready))
            experiment.together([asked for _, _, asked in ready], over, turns, wished.share)
        if left:
            raise left[0]
    except (KeyboardInterrupt, NoRoom):
        for trial in untold:
            give_back(record, trial)
        raise
    except MachineError as error:
        for trial in untold:
            _blame(trial, error)
        raise


def _blame(trial: Trial, fault: MachineError) -> None:
    """Note with a ticket what was amiss with the machine; whoever starts workers queues it again."""
    from optuna.exceptions import UpdateFinishedTrialError

    with suppress(UpdateFinishedTrialError):  # this process was taken for dead, and the ticket has been queued
        trial.set_user_attr(study.FAULT, str(fault))


def _tell(sweep: Frozen, record: Study, trial: Trial, outcome: Outcome, values: list[float] | None) -> None:
    """Tell the storage what came of a ticket."""
    import optuna
    from optuna.trial import TrialState

    number = study.ticket(trial._cached_frozen_trial)
    say(f"trial {number} {outcome.state} {outcome.reason}".rstrip(), always=outcome.state in ("failed", "skipped"))
    states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
    states |= dict.fromkeys(("pruned", "skipped"), TrialState.PRUNED)
    state = states[outcome.state]
    if outcome.kind in ("diverged", "oom"):
        state = TrialState.PRUNED  # a sampler ignores what failed and would ask there again; it avoids what was pruned
    try:
        trial.set_user_attr("ftexp:reason", outcome.reason)
        trial.set_user_attr("ftexp:kind", outcome.kind)
        if outcome.state == "skipped":
            trial.set_user_attr("ftexp:skipped", limits.mark(sweep.options))
        record.tell(trial, values if state is TrialState.COMPLETE else None, state=state)
    except optuna.exceptions.UpdateFinishedTrialError:
        say(f"trial {number}: this process was taken for dead meanwhile; its result stands in the folder")


def choose(sweep: Frozen, record: Study, trial: Trial, number: int) -> dict[str, Any]:
    """Return the ticket's point: the one it was queued with, its replicate's, or a new proposal.

    Proposals are made one at a time, so that each sees the ones before it.
    """
    import optuna

    with study.locked(sweep.folder / "propose.lock"):
        given = trial._cached_frozen_trial.system_attrs.get("fixed_params")
        if given is None:
            given = _replicated(sweep, record, number)
        if given is None:
            made = study.propose(sweep.space, sweep.options, [d.name.lower() for d in record.directions],
                                 history(sweep, record), _place(sweep, number))  # fmt: skip
            given = made.params
            for key, value in made.system_attrs.items():
                record._storage.set_trial_system_attr(trial._trial_id, key, value)
        record._storage.set_trial_system_attr(trial._trial_id, "fixed_params", given)
        fixed = optuna.trial.Trial(record, trial._trial_id)
        active = [axis for axis in sweep.space.axes if axis.key in given]
        return {axis.key: fixed._suggest(axis.key, axis.distribution()) for axis in active}


def _place(sweep: Frozen, number: int) -> int:
    """Return the number of a ticket's point; sweeps of older versions skipped as many points of qmc as baselines."""
    point = number // sweep.options.replicates
    if sweep.options.sampler is not Sampler.qmc or not sweep.options.baselines:
        return point
    kept = read_json(sweep.folder / "identity.json")
    return point + len(sweep.options.baselines) if kept and study.ARGS not in kept else point


def _replicated(sweep: Frozen, record: Study, number: int) -> dict[str, Any] | None:
    """Return the point that an attempt of a ticket, or of another replicate, has been given, whatever came of it."""
    size = sweep.options.replicates
    for other in record.get_trials(deepcopy=False) if size > 1 else ():
        if "ftexp:ticket" not in other.user_attrs or study.ticket(other) // size != number // size:
            continue
        if told := other.system_attrs.get("fixed_params") or other.params:  # a kill may have left half the params
            return told
    return None


def history(sweep: Frozen, record: Study) -> list[FrozenTrial]:
    """List one attempt for each point that has been chosen: replicates as their mean, pending while one is.

    Each has the bounds of now as its constraints, and replicates those of the one that passes most, as in the report.
    A point that a sampler must avoid with one seed, as one that diverges, is to be avoided: it ranks nowhere. What the
    sampler keeps with it, as NSGA-II the generation, is with the replicate that asked for the point.
    """
    from optuna.trial import TrialState, create_trial

    bounds, where = sweep.options.at_most, sweep.folder
    known = [study.bounded(t, bounds, where) if t.state is TrialState.COMPLETE else t for t in study.counted(record)]
    known = [study.avoided(t) if study.by_its_point(t) else t for t in known if t.params]
    if sweep.options.replicates == 1:
        return [t for t in known if t.state is not TrialState.FAIL]
    points: dict[int, list[FrozenTrial]] = {}
    for t in known:
        points.setdefault(study.ticket(t) // sweep.options.replicates, []).append(t)
    told = []
    for members in points.values():
        first, done = members[0], [t for t in members if t.state is TrialState.COMPLETE]
        pending = any(not t.state.is_finished() for t in members)
        avoided = next((t for t in members if t.state is TrialState.PRUNED), None)
        scored = TrialState.COMPLETE if done and avoided is None else TrialState.PRUNED
        state = TrialState.RUNNING if pending else scored
        if first.state is TrialState.FAIL and not done and not pending:
            continue
        columns = zip(*(t.values for t in done), strict=True) if state is TrialState.COMPLETE else []
        values = [metrics.mean(n, column) for n, column in zip(sweep.objectives, columns, strict=False)] or None
        drawn = {
            k: v for t in reversed(members) for k, v in t.system_attrs.items() if not k.startswith(study.OF_ATTEMPT)
        }
        made = create_trial(state=state, values=values, params=first.params, distributions=first.distributions,
                            system_attrs=drawn,
                            intermediate_values=(avoided or first).intermediate_values)  # fmt: skip
        passed = [t.constraints for t in done] if state is TrialState.COMPLETE else []
        told.append(study.constrained(made, {name: max(o[name] for o in passed) for name in (passed or [{}])[0]}))
    return told


def _run(sweep: Frozen, trial: Trial, point: dict[str, Any], number: int) -> tuple[Outcome, list[float] | None]:
    def execute(run: config.Run, folder: Path) -> dict[str, float]:
        asked = _asked(sweep, trial, point, number, 1, run, folder)
        return experiment.execute(asked.run, asked.folder, asked.label, asked.parent, asked.control)

    return _valued(sweep, trial, point, number, execute)


def _asked(
    sweep: Frozen, trial: Trial, point: dict[str, Any], number: int, pack: int, run: config.Run, folder: Path
) -> experiment.Asked:
    """Prepare the trial of a ticket, which shares its time with the others of a pack.

    Raises:
        Skipped: its plan passes a limit.
    """
    label = " ".join(f"{k}={_short(v)}" for k, v in point.items()) or sweep.name
    if sweep.options.replicates > 1:
        label += f" seed+{number % sweep.options.replicates}"
    same_rows(sweep, run)
    keep_hydra_files(sweep, run, point, folder)
    take_over(sweep, trial, point, run, folder)
    if reason := limits.passed(run, sweep.options):
        limits.keep(run, label, folder, reason)
        raise Skipped(reason)
    by_rows = sweep.options.pruner in BY_ROWS
    scored = race.scored(sweep.options, run.trainer.report_steps) if by_rows else None
    control = Control(judge(sweep, trial, run), scored, deadline(sweep, pack), same_model(trial, run))
    return experiment.Asked(run, folder, label, sweep.mlflow_run, control)


def _valued(
    sweep: Frozen, trial: Trial, point: dict[str, Any], number: int,
    execute: Callable[[config.Run, Path], dict[str, float]],
) -> tuple[Outcome, list[float] | None]:  # fmt: skip
    """Run a ticket; tell how it ended and the values of its objectives."""

    def scored(run: config.Run, folder: Path) -> tuple[dict[str, float], list[float]]:
        scores = execute(run, folder)
        return scores, [scores.get(name, math.nan) for name in sweep.objectives]

    outcome, told = _ended(sweep, number, point, scored)
    if told is None:
        return outcome, None
    scores, values = told
    for name, bound in sweep.options.at_most.items():
        over = scores.get(name, math.inf) - bound
        trial.set_constraint(f"{name} at most {bound!r}", math.inf if math.isnan(over) else over)
    unknown = [name for name, value in zip(sweep.objectives, values, strict=True) if not math.isfinite(value)]
    if unknown:  # Optuna takes no NaN, and files have no infinity
        return Outcome("failed", "undefined", f"{unknown[0]} {metrics.why_not(unknown[0], scores)}"), None
    return outcome, values


def _ended(
    sweep: Frozen, number: int, point: dict[str, Any], execute: Callable[[config.Run, Path], T]
) -> tuple[Outcome, T | None]:
    """Build the config of a ticket and run it; tell how it ended, and what it returned.

    Raises:
        NoRoom: a disk is full, which is no trial's fault.
        MachineError: something else of the machine is amiss, and other workers may do without it.
    """
    folder = sweep.folder / str(number)
    try:
        told = execute(sweep.run(point, number % sweep.options.replicates), folder)
    except NoRoom:
        raise
    except MachineError as error:
        if os.environ.get(TOKEN) and ranks.count() == 1 and not isinstance(error, Unusable):
            raise
        return Outcome("failed", "crash" if isinstance(error, Unusable) else study.MACHINE, str(error)), None
    except Skipped as error:
        return Outcome("skipped", "", str(error)), None
    except Pruned as error:
        return Outcome("pruned", "", str(error)), None
    except Diverged as error:
        return Outcome("failed", "diverged", str(error)), None
    except OutOfTime as error:
        return Outcome("failed", "timeout", str(error)), None
    except (ConfigError, DataError) as error:
        return Outcome("failed", "data", str(error)), None
    except FtexpError as error:
        return Outcome("failed", "crash", str(error)), None
    except Exception as error:
        if (full := no_room(error, folder)) is not None:
            raise full from error
        if experiment.out_of_memory(error):
            return Outcome("failed", "oom", f"out of memory: {str(error).splitlines()[0]}"), None
        if compute.is_lost() and "device-side assert" not in str(error):  # which the trial's own numbers make
            raise MachineError(f"the GPU failed: {str(error).splitlines()[0]}") from error
        traceback.print_exc()
        return Outcome("failed", "crash", f"{type(error).__name__}: {error}".splitlines()[0]), None
    return Outcome("complete"), told


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def take_over(sweep: Frozen, trial: Trial, point: dict[str, Any], run: config.Run, folder: Path) -> None:
    """Give a trial the result of an earlier one of the same point and seed, which a sampler has drawn again.

    To train it again would give the same numbers. What was made with other versions, or other code, is trained again.
    """
    if ranks.count() > 1 or experiment.complete(run, folder) is not None:
        return
    size, number = sweep.options.replicates, int(folder.name)
    for other in study.counted(trial.study):
        there = study.ticket(other)
        if other.state.name != "COMPLETE" or other.params != point or there % size != number % size or there == number:
            continue
        source = sweep.folder / str(there)
        if experiment.complete(run, source) is None or experiment.stale(source):
            continue
        left = shutil.ignore_patterns("trial.json", ".hydra")
        shutil.copytree(source, folder, ignore=left, copy_function=_copied, dirs_exist_ok=True)
        told, begun = read_trial(source) or {}, (read_trial(folder) or {}).get("mlflow_run")
        write_json(folder / "trial.json", told | {"folder": str(folder), "repeats": there})
        if begun not in (None, told.get("mlflow_run")):  # by an attempt that was killed
            track.end(run.track, begun, {"ftexp.repeats": there}, {}, "KILLED")
        say(f"trial {number} is trial {there} again: its result is taken", always=True)
        return


def _copied(source: str, target: str) -> None:
    """Copy a file; a large one, as of weights, stands on the disk once where that can be."""
    Path(target).unlink(missing_ok=True)
    if Path(source).stat().st_size >= LARGE:
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def same_rows(sweep: Frozen, run: config.Run) -> None:
    """Refuse rows that are no longer those of the launch.

    Raises:
        DataError: the file was edited.
    """
    kept = sweep.rows.get(config.digest(run.data))
    if kept is not None and data.load(run.data).digest() != kept:
        raise DataError(f"{run.data.path or run.data.kind.value}: the rows changed after the sweep was launched")


def same_model(trial: Trial, run: config.Run) -> Callable[[dict[str, Any]], None]:
    """Return what refuses weights, a tokenizer or a template that are not those of the sweep's first such trial.

    A folder of a model can be written to while a sweep pauses; its trials would then be ranked over two models.
    """
    names = {"weights_sha256": "weights", "tokenizer_sha256": "tokenizer", "template_sha256": "template"}
    names |= {"reward": "reward model"} if run.trainer.reward else {}

    def check(told: dict[str, Any]) -> None:
        where = {k: v for k, v in told["compute"].items() if k != "threads"}  # other chips may quantize otherwise
        made = config.digest(run.model, run.quant, run.data), run.trainer.kind.value, json.dumps(where, sort_keys=True)
        made = (*made, run.trainer.reward) if run.trainer.reward else made
        key = f"ftexp:model {hashlib.sha256(' '.join(made).encode()).hexdigest()[:16]}"
        mine = {k: told[k] for k in names}
        kept = trial.study.user_attrs.get(key)
        if kept is None:
            trial.study.set_user_attr(key, mine)
        elif changed := [names[k] for k in names if kept[k] != mine[k]]:
            source = run.model.path or run.model.kind.value
            raise DataError(f"{source}: {' and '.join(changed)} changed after the sweep was launched")

    return check


def keep_hydra_files(sweep: Frozen, run: config.Run, point: dict[str, Any], folder: Path) -> None:
    """Write the files Hydra keeps of a job, so that tools that read them find them."""
    import yaml

    kept = folder / ".hydra"
    kept.mkdir(parents=True, exist_ok=True)
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the one in C where libyaml is there, ten times as fast
    for name, content in (("config", config.plain(run)), ("overrides", sweep.space.point(point))):
        (kept / f"{name}.yaml").write_text(
            yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def judge(sweep: Frozen, trial: Trial, run: config.Run) -> Judge | None:
    """Return what a trial asks at each rung: a reason to stop, or None to go on."""
    if sweep.options.pruner in BY_ROWS:
        return race.judge(sweep, trial, run.trainer.report_steps)
    if len(sweep.objectives) > 1 or isinstance(trial.study.pruner, _nop()):
        return None

    maximised = metrics.METRICS[sweep.objectives[0]].direction is metrics.Direction.maximize
    marks: set[str] | None = None

    def record(rung: Rung, step: int) -> None:
        nonlocal marks
        marks = None
        trial.report(-rung.loss if maximised else rung.loss, step)  # pruners go by the objective's sense

    def enter() -> None:
        nonlocal marks
        if sweep.options.pruner in ENTERED:
            view, told = study.judged(trial.study, trial._trial_id)
            view.pruner.prune(view, told)  # what it says to that is asked below, when all who stand there are in
            marks = {*study.judged(trial.study, trial._trial_id)[1].system_attrs} - {*told.system_attrs}

    def ask(rung: Rung, step: int) -> str | None:
        if marks is not None and not marks:  # between its rungs
            return None
        stops = trial.study.pruner.prune(*study.judged(trial.study, trial._trial_id, marks or ()))
        return f"pruned at step {step}: valid/loss {rung.loss:.4f}" if stops else None

    return Recorded(record, ask, enter)


def _nop() -> type:
    from optuna.pruners import NopPruner

    return NopPruner


def deadline(sweep: Frozen, pack: int = 1) -> float | None:
    """Return when the trial that begins now must have ended, on the monotonic clock.

    In a pack of several it has its own minutes and those of the others: they share the clock.
    """
    minutes = sweep.options.timeout_minutes
    return None if minutes is None else time.monotonic() + 60 * minutes * pack


def give_back(record: Study, trial: Trial, to: str = "") -> None:
    """Queue a ticket again that its worker was asked to leave, for another worker or any; this counts as no retry.

    Where this process was taken for dead, somebody has queued it.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    kept = trial._cached_frozen_trial
    try:
        trial.set_user_attr("ftexp:lost", True)
        trial.set_user_attr("ftexp:reason", "preempted")
        told = record._storage.get_trial(trial._trial_id)
        record._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return
    counts = (kept.user_attrs.get(name, 0) for name in ("ftexp:retries", study.FAULTS))
    study.requeue(record, told, *counts, to=to)


def look_seconds(workers: int) -> float:
    """Return how long a worker waits between two looks at whether the sweep is to be left.

    >>> look_seconds(2), look_seconds(1000)
    (2.0, 20.0)
    """
    return max(LOOK_SECONDS, workers / LOOKS_A_SECOND)


@contextmanager
def _beating(
    record: Study, look: float, *trials: Trial, hear: Callable[[], None] = lambda: None
) -> Iterator[None]:  # fmt: skip
    """Tell other machines once a minute that this worker is alive, and hear whether the sweep is to be left.

    What else there is to `hear` is looked for as often.
    """
    done = threading.Event()

    def beat() -> None:
        told = time.monotonic()
        while not done.wait(look):
            with suppress(Exception):  # a record that cannot be reached now is asked again
                if record.user_attrs.get(LEAVE):
                    control.LEAVE.set()
                hear()
            if time.monotonic() - told >= BEAT_SECONDS:
                told = time.monotonic()
                for trial in trials:
                    with suppress(Exception):  # here too
                        _tell_alive(record, trial)

    thread = threading.Thread(target=beat, name=BEAT, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tell_alive(record: Study, trial: Trial) -> None:
    """Put a sign of life on record; of a pack some trials are over before the others."""
    from optuna.exceptions import UpdateFinishedTrialError

    try:
        record._storage.set_trial_user_attr(trial._trial_id, "ftexp:beat", time.time())
    except UpdateFinishedTrialError:
        if study.was_reaped(record, trial):
            _abandon(trial)


def _abandon(trial: Trial) -> None:
    """End at once where this process was taken for dead: its ticket is another's now, and so is the trial's folder.

    A launch that runs trials itself ends as asked to leave, for others may wait for it.
    """
    say(
        f"trial {study.ticket(trial._cached_frozen_trial)}: taken for dead by another process, which has it now",
        always=True,
    )
    if TOKEN in os.environ:
        os._exit(PREEMPTED)
    control.LEAVE.set()


def stop_after_failures(sweep: Frozen, record: Study) -> bool:
    """Stop the sweep where `max_failures` trials have failed; tell whether it is stopped, by that or before."""
    limit = sweep.options.max_failures
    if record.user_attrs.get(STOP):
        return True
    if limit is None:  # the supervisor asks several times a second
        return False
    failed = [t for t in study.counted(record) if t.user_attrs.get("ftexp:kind")]
    if len(failed) >= limit:
        record.set_user_attr(STOP, f"{len(failed)} trials failed, sweep.max_failures={limit}")
    return len(failed) >= limit


def open_study(sweep: Frozen) -> Study:
    """Open the record of a sweep that was launched."""
    import optuna

    directions: Any = [metrics.METRICS[name].direction.value for name in sweep.objectives]
    return optuna.create_study(
        study_name=sweep.name,
        storage=study.storage(sweep.folder, os.environ.get(RECORD, sweep.options.storage)),
        load_if_exists=True,
        directions=directions,
        sampler=optuna.samplers.RandomSampler(seed=0),  # proposals are made in `study.propose`
        pruner=study.pruner(sweep.options, sweep.rung, sweep.longest),
    )


def main() -> int:
    """Run the command line; return the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    garbage.left()
    config.register()
    model.libraries()
    with control.listening():
        sweep = frozen.load(Path(sys.argv[1]))
        return _several(sweep) if ranks.started_by_torchrun() else _main(sweep)


def _several(sweep: Frozen) -> int:
    """Be one process of a worker, and end with it."""
    ended_with_parent()
    try:
        ranks.join()
        if ranks.rank() == 0:
            ranks.leave(_main(sweep))
        console.quiet = True
        follow(sweep)
    except KeyboardInterrupt:
        ranks.tell("left", "")
        ranks.leave(PREEMPTED)
    except BaseException:
        traceback.print_exc()
        ranks.leave(1)
    ranks.leave(0)


def ended_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() == 1:
        ranks.leave(1)


def _main(sweep: Frozen) -> int:
    record = open_study(sweep)
    if sweep.code != facts.code():
        record.set_user_attr(STOP, "the code of ftexp was edited while the sweep ran; the same command goes on with it")
        return 4
    try:
        work(sweep, record)
    except KeyboardInterrupt:
        return PREEMPTED
    except NoRoom as error:
        say(str(error), always=True)
        record.set_user_attr(FULL, True)
        record.set_user_attr(STOP, str(error))
        return error.exit_code
    except MachineError as error:
        say(str(error), always=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
