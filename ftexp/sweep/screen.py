"""A sweep at a glance: how many trials stand where, which is best, what runs now, and how long it will take."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live

from ftexp import board, metrics
from ftexp.files import read_trial
from ftexp.progress import Sheet, console, quiet, say
from ftexp.sweep import study
from ftexp.sweep.frozen import Frozen
from ftexp.train import checkpoints

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

STATES = ("complete", "pruned", "skipped", "failed", "running", "waiting")
FRESH_SECONDS = 1.0
"""Time between two looks at the record for the screen."""


@dataclass(frozen=True)
class Glance:
    """Where a sweep stands."""

    counts: dict[str, int]
    """State -> trials."""
    best: tuple[list[int], float] | None
    """Trials of the best point, one for each replicate, and the mean of its first objective."""
    seconds_left: float | None
    """Estimate from the trials that have ended; None before the first."""


def state_of(trial: FrozenTrial) -> str:
    """Return the state in the words of the leaderboard; what a sampler must avoid is `PRUNED` to Optuna alone."""
    if trial.user_attrs.get("ftexp:kind"):
        return "failed"
    if trial.user_attrs.get("ftexp:skipped"):
        return "skipped"
    return {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}.get(
        trial.state.name, trial.state.name.lower()
    )


def glance(sweep: Frozen, record: Study) -> Glance:
    """Sum a sweep up."""
    trials = study.counted(record)
    found = Counter(state_of(t) for t in trials)
    return Glance({s: found[s] for s in STATES if found[s]}, best_point(sweep, trials), _left(trials))


def best_point(sweep: Frozen, trials: list[FrozenTrial]) -> tuple[list[int], float] | None:
    """Find the best point among those whose replicates are all complete, by the mean of the first objective.

    Points that break a bound of `sweep.at_most` are left out. None is best where scores are of different kinds.
    """
    points: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        points.setdefault(study.ticket(trial) // sweep.options.replicates, []).append(trial)
    at_most = sweep.options.at_most
    whole = [
        p for p in points.values()
        if all(t.state.name == "COMPLETE" and study.within(t, at_most, sweep.folder) for t in p)
    ]  # fmt: skip
    if _unlike(sweep, [study.ticket(t) for p in whole for t in p]):
        return None
    means = [metrics.mean(sweep.objectives[0], [t.values[0] for t in p]) for p in whole]
    found = metrics.best(means, metrics.METRICS[sweep.objectives[0]].direction)
    return None if found is None else ([study.ticket(t) for t in whole[found]], means[found])


@dataclass
class _Kinds:
    """What is known of the kinds of a sweep's scores: the line of progress asks at each end of thousands of trials."""

    sweep: Frozen
    kinds: board.Kinds
    """The first complete trial of each kind, the only ones that are kept."""
    seen: set[int]
    """Trials that were compared with them."""
    unlike: bool = False
    """Whether one of them is of another kind."""


_kinds: _Kinds | None = None


def _unlike(sweep: Frozen, numbers: list[int]) -> bool:
    """Whether scores of complete trials are of different kinds; each is read once, unless one is left out again."""
    global _kinds
    if not numbers:
        return False
    if _kinds is None or _kinds.sweep is not sweep or not _kinds.seen <= set(numbers):
        _kinds = _Kinds(sweep, board.Kinds(sweep.objectives[0]), set())
    for number in numbers:
        if number not in _kinds.seen:
            _kinds.seen.add(number)
            _kinds.unlike |= _kinds.kinds.add(_told(sweep.folder, number)) is not None
    return _kinds.unlike


def _told(folder: Path, number: int) -> dict[str, Any]:
    return {"number": number, **(read_trial(folder / str(number)) or {})}


def _left(trials: list[FrozenTrial]) -> float | None:
    took = [(t.datetime_complete - t.datetime_start).total_seconds() for t in trials
            if t.datetime_complete and t.datetime_start and state_of(t) in ("complete", "pruned")]  # fmt: skip
    running, waiting = (sum(t.state.name == s for t in trials) for s in ("RUNNING", "WAITING"))
    if not took:
        return None
    return sum(took) / len(took) * (waiting + running / 2) / max(1, running)


def line(sweep: Frozen, record: Study) -> str:
    """Tell where a sweep stands in one line."""
    at = glance(sweep, record)
    told = ", ".join(f"{count} {state}" for state, count in at.counts.items()) or "no trials"
    if at.best is not None:
        trials, value = at.best
        told += f"; best trial {','.join(map(str, trials))}, {sweep.objectives[0]} {metrics.written(value)}"
    unfinished = at.counts.get("waiting", 0) + at.counts.get("running", 0)
    return told + (f"; about {_span(at.seconds_left)} left" if unfinished and at.seconds_left is not None else "")


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(sweep: Frozen, record: Study, rows: int | None = None) -> Sheet:
    """Lay the trials out by number; where there are too many rows, running ones and those that ended last are shown."""
    trials = study.counted(record)
    if rows is not None and len(trials) > rows:
        waiting = [t for t in trials if t.state.name == "WAITING"]
        begun = sorted((t for t in trials if t.state.name != "WAITING"), key=_shown_last)
        trials = sorted([*begun[-rows:], *waiting[: max(0, rows - len(begun))]], key=study.ticket)
    laid = Sheet(f"{sweep.name}: {line(sweep, record)}")
    for title in ("trial", "overrides", "state", "step", *sweep.objectives, "time", "worker"):
        laid.column(title, right=title in ("trial", "step", "time", *sweep.objectives))
    for trial in trials:
        laid.row(*_cells(sweep, trial), style="" if trial.state.name == "RUNNING" else "dim")
    return laid


def _shown_last(trial: FrozenTrial) -> tuple[bool, datetime]:
    return trial.state.name == "RUNNING", trial.datetime_complete or trial.datetime_start or datetime.min


def _cells(sweep: Frozen, trial: FrozenTrial) -> list[str]:
    number, state, worker = study.ticket(trial), state_of(trial), trial.user_attrs.get("ftexp:worker")
    point = trial.params or trial.system_attrs.get("fixed_params") or {}
    kind = trial.user_attrs.get("ftexp:kind")
    values = [metrics.written(v) for v in trial.values or ()] if state == "complete" else [""] * len(sweep.objectives)
    began, ended = trial.datetime_start, trial.datetime_complete
    if state == "running":
        step, loss = _step(sweep.folder / str(number))
        values[0] = loss and f"train {loss}"
    else:
        step = ""
    done = checkpoints.newest(sweep.folder / str(number) / "checkpoints") if state == "waiting" else 0
    state += f", goes on from step {done}" if done else ""
    took = "" if began is None else _span(((ended or datetime.now()) - began).total_seconds())
    return [
        str(number), label(point), f"failed: {kind}" if kind else state, step, *values, took,
        f"{worker['host']}:{worker['pid']}" if worker and state == "running" else "",
    ]  # fmt: skip


def label(point: dict[str, Any]) -> str:
    """Name a point by its overrides, numbers in three digits."""
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in point.items())


def _step(folder: Path) -> tuple[str, str]:
    """Return how far a running trial is, as step of steps, and its last training loss."""
    try:
        last = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)[-3:]
    except FileNotFoundError:
        return "", ""
    points = [json.loads(text) for text in last if text.endswith(b"\n")]
    losses = [p for p in points if p.get("train/loss") is not None]
    if not losses:
        return "", ""
    steps = (read_trial(folder) or {}).get("steps")
    return f"{losses[-1]['step']}/{steps}" if steps else str(losses[-1]["step"]), f"{losses[-1]['train/loss']:.3f}"


@contextmanager
def live(sweep: Frozen, record: Study) -> Iterator[Callable[[], None]]:
    """Keep the screen up to date on a terminal; elsewhere print a line whenever a trial has ended.

    Yields:
        A function to call often.
    """
    looked, ended = 0.0, _ended(record)
    screen = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal and not quiet() else None

    def show() -> None:
        nonlocal looked, ended
        if time.monotonic() - looked < FRESH_SECONDS:
            return
        looked = time.monotonic()
        if screen is not None:
            screen.update(Group(table(sweep, record, max(4, console.height - 8))), refresh=True)
        elif (now := _ended(record)) != ended:
            ended = now
            say(f"{sweep.name}: {line(sweep, record)}")

    if screen is None:
        yield show
        return
    with screen:
        yield show


def _ended(record: Study) -> int:
    return sum(t.state.is_finished() for t in study.counted(record))
