"""What a sweep, a clock or a signal asks of a trial while it trains."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ftexp.errors import Interrupted, Preempted
from ftexp.progress import say

Report = Callable[[dict[str, float], int], None]
"""Takes metrics by name and the optimizer step they belong to."""


@dataclass(frozen=True)
class Rung:
    """The held-out loss at a step, with the rows it is made of."""

    loss: float
    """Sum of `nats` over sum of `counts`."""
    nats: Sequence[float] = ()
    """Nats of each held-out row; empty where a kill has left the loss alone."""
    counts: Sequence[int] = ()
    """Tokens, decisions or pairs of each row."""
    units: Sequence[int] = ()
    """Unit of each row (`data.splits.units`)."""


Judge = Callable[[Rung, int], str | None]
"""Takes a held-out loss and its step; returns a reason to stop the trial, or None."""


@dataclass
class Recorded:
    """A judge in two acts, so that trials that stand at a rung together are judged by what all of them are there."""

    record: Callable[[Rung, int], None]
    """Puts a rung on record, for the judges of other trials."""
    ask: Judge
    """Judges a rung that is on record."""
    enter: Callable[[], None] = lambda: None
    """Enters the trial among those that are judged together."""
    _told: int = -1

    def tell(self, rung: Rung, step: int) -> None:
        """Put a rung on record before others are judged there."""
        self._record(rung, step)
        self.enter()

    def _record(self, rung: Rung, step: int) -> None:
        if step != self._told:
            self.record(rung, step)
            self._told = step

    def __call__(self, rung: Rung, step: int) -> str | None:
        """Put a rung on record, where it is not yet, and judge it."""
        self._record(rung, step)
        return self.ask(rung, step)


LEAVE = threading.Event()
"""Set when this process was asked to leave: the step under way is the last, and its checkpoint is kept."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
_training = False
_by_hand = False
"""Whether ctrl-c asked to leave."""


@dataclass(frozen=True)
class Control:
    """What may end a training before its last step."""

    judge: Judge | None = None
    """Asked at each rung of the held-out loss whether to go on."""
    scored: Callable[[int], bool] | None = None
    """Tells of a step that is a rung whether held-out rows are scored there; None where they are at each."""
    deadline: float | None = None
    """When to stop at the latest, on the monotonic clock."""
    known: Callable[[dict[str, Any]], None] | None = None
    """Told the facts of the run before it trains; raises where its model is not that of the sweep's other trials."""
    leave: threading.Event = field(default_factory=lambda: LEAVE)
    """Set to make the training save a checkpoint and end."""

    def due(self, step: int, every: int, steps: int) -> bool:
        """Tell whether held-out rows are scored after a step: each `every` of them, the last one left to the scores.

        >>> [step for step in range(1, 11) if Control().due(step, 5, 10)], Control().due(5, 0, 10)
        ([5], False)
        """
        rung = bool(every) and step % every == 0 and step < steps
        return rung and (self.scored is None or self.scored(step))


@dataclass(frozen=True)
class Share:
    """Asks a pack for half of its trials, on behalf of a worker that has none."""

    asked: threading.Event = field(default_factory=threading.Event)
    """Set by who asks, and cleared once it was dealt with."""
    dealt: threading.Event = field(default_factory=threading.Event)
    """Set by the training, once those trials have ended with `HandedOver`, or none where too little is left to do."""

    @property
    def wished(self) -> bool:
        """Whether it is to be dealt with."""
        return self.asked.is_set() and not self.dealt.is_set()


@contextmanager
def at_work() -> Iterator[None]:
    """Mark the block that looks at `LEAVE` after each of its steps; a signal outside it ends what runs at once."""
    global _training
    _training = True
    try:
        yield
    finally:
        _training = False


def listen() -> None:
    """Turn ctrl-c, SIGTERM, SIGUSR2 and SIGHUP into a checkpoint after the step under way.

    Schedulers send them before they take a machine away (Kubernetes and spot instances SIGTERM, submitit's jobs on
    Slurm SIGUSR2), a terminal that is closed sends SIGHUP; under nohup that one stays unheard. A second ctrl-c or
    SIGTERM ends at once.
    """
    global _by_hand
    LEAVE.clear()
    _by_hand = False
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _asked)


@contextmanager
def listening() -> Iterator[None]:
    """Listen while the block runs, then put the handlers back; threads other than the main one hear no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def left(told: str) -> Preempted:
    """Return the error of work that was asked to leave: by ctrl-c, or by a signal or a word of a machine."""
    return (Interrupted if _by_hand else Preempted)(told)


def _without_terminal() -> None:
    """Write to nowhere from now on what would go to a terminal that is closed: each write there fails."""
    for stream in (1, 2):
        with suppress(OSError):  # one that a daemon has closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _asked(number: int, frame: Any) -> None:
    global _by_hand
    if number == signal.SIGHUP:
        _without_terminal()
    first = not LEAVE.is_set()
    LEAVE.set()
    _by_hand = number == signal.SIGINT
    if first and _training:
        say("leaving after the step under way; once more to leave at once")
        return
    if number in (signal.SIGUSR2, signal.SIGHUP) and not first:
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Preempted(f"asked to leave by {signal.Signals(number).name}")
