"""A worker for which no ticket waits takes half of another's pack, from checkpoints.

It asks by an attribute of the study that is named by whom it asks. That one hears of it between two steps, ends half of
its members at a checkpoint, and queues their tickets for the asking worker, for whom they are kept for a while. Only
workers of one machine that compute alike ask each other: there a checkpoint goes on with the same bytes.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ftexp.model import compute
from ftexp.progress import say
from ftexp.sweep import frozen, study
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import Engine
from ftexp.train import control
from ftexp.train.control import Share

if TYPE_CHECKING:
    from optuna import Study

TOKEN = "FTEXP_WORKER"
"""Environment variable that names this start of a worker, so that its supervisor knows which trial was its."""
STOP = "ftexp:stop"
"""Study attribute: the reason why no further ticket is taken."""
WISH = "ftexp:share"
"""Study attribute, by the token of a worker: who asks it for half of its pack, and how that one computes."""


def how(sweep: Frozen) -> dict[str, Any]:
    """Tell how this process computes, of which the bits of its trials depend."""
    return asdict(compute.policy(sweep.run(frozen.corners(sweep.space)[0], 0).model))


def awaited(sweep: Frozen, record: Study, look: float) -> bool:
    """Ask the largest pack of this machine for half of its trials; tell whether there is a ticket to claim.

    Not where workers are jobs of a cluster, which are not to wait, nor where trials have a time of their own, which
    would begin anew.

    Args:
        sweep: of this worker.
        record: its study.
        look: seconds between two looks at the record.
    """
    me, asked, options = os.environ.get(TOKEN, ""), set(), sweep.options
    if not me or options.pack == 1 or options.engine is not Engine.local or options.timeout_minutes is not None:
        return False
    while not record.user_attrs.get(STOP):
        if study.waiting(record, me):
            return True
        packs = [token for token, _ in _packs(record).most_common() if token not in asked]
        if not packs:
            return False
        other = next((token for token in packs if not record.user_attrs.get(f"{WISH} {token}")), None)
        if other is None:  # others ask them already
            _rest(look)
            continue
        asked.add(other)
        say("no trial waits: another worker is asked for half of its pack")
        _ask(sweep, record, other, look)
    return False


def _ask(sweep: Frozen, record: Study, other: str, look: float) -> None:
    """Put a wish on record until it is answered in full, its pack is over, or something for any worker waits."""
    key, me = f"{WISH} {other}", os.environ[TOKEN]
    wish = {"to": me, "how": how(sweep)}
    record.set_user_attr(key, wish)
    try:
        while record.user_attrs.get(key) == wish and other in _packs(record):
            if any(study.KEPT not in t.user_attrs for t in study.waiting(record, me)):
                return
            if record.user_attrs.get(STOP):
                return
            _rest(look)
    finally:
        if record.user_attrs.get(key) == wish:
            record.set_user_attr(key, None)


def _rest(seconds: float) -> None:
    if control.LEAVE.wait(seconds):
        raise control.left("asked to leave")


def _packs(record: Study) -> Counter[str]:
    """Count the running trials of each worker of this machine that has two or more in its pack, by its token."""
    found = Counter(
        t.user_attrs["ftexp:worker"]["token"]
        for t in study.counted(record)
        if t.state.name == "RUNNING"
        and t.user_attrs.get(study.PACK, 1) > 1
        and _is_here(t.user_attrs)
        and study.alive(t)
    )
    return Counter({token: count for token, count in found.items() if token and count > 1})


def _is_here(attrs: dict[str, Any]) -> bool:
    return attrs.get("ftexp:worker", {}).get("host") == study.HOST


@dataclass
class Wished:
    """What other workers ask of one that has a pack."""

    record: Study
    how: dict[str, Any]
    """How it computes."""
    share: Share
    """Tells its training."""
    to: str = ""
    """Token of the worker that asks."""

    def look(self) -> None:
        """Hear whether a worker asks, and tell it once that is dealt with; one that computes otherwise gets nothing."""
        key = f"{WISH} {os.environ.get(TOKEN, '')}"
        if self.share.dealt.is_set():
            self.record.set_user_attr(key, None)
            self.share.asked.clear()
            self.share.dealt.clear()
        if self.share.asked.is_set():
            return
        told = self.record.user_attrs
        if not (wish := told.get(key)) or told.get(STOP):
            return
        if wish["how"] != self.how:
            self.record.set_user_attr(key, None)
            return
        self.to = wish["to"]
        self.share.asked.set()
