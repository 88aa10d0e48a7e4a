"""A trial over several processes: what they agree on, share out and tell each other. A process alone is all of them.

torchrun starts them on one machine. The first one (rank 0) claims trials, decides, and writes files and records; the
others compute with it. Objects travel over gloo, gradients over NCCL where there are GPUs.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
FOREVER = timedelta(days=30)
"""No process waits for another by the clock: torchrun ends all of them when one dies."""
PATIENCE_SECONDS = 5.0
"""After its own trial failed a process waits so long to hear whether the others' did."""
LOOK_SECONDS = 0.05
_group: Any = None
_store: Store | None = None


class Lost(Exception):
    """Another process of the trial is gone, so what this one met is only an echo."""


def started_by_torchrun() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ


def count() -> int:
    """Count the processes of a trial."""
    return 1 if _group is None else int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """Return the number of this process."""
    return 0 if _group is None else int(os.environ["RANK"])


def join() -> None:
    """Meet the other processes; each takes the GPU of its number, where there are GPUs."""
    global _group, _store
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cuda:nccl,cpu:gloo"
    store, number, size = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=10))))
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=number, world_size=size,
                            timeout=FOREVER)  # fmt: skip
    _store, _group = dist.PrefixStore("told", store), dist.new_group(backend="gloo", timeout=FOREVER)
    _store.set(f"pid {number}", str(os.getpid()))


def per_process(batch: int, accumulation: int, processes: int) -> tuple[int, int] | None:
    """Share an optimizer step out: rows of a forward pass and passes of each process, so that the step keeps its rows.

    Passes are divided before rows are. None where the rows of a step cannot be divided.

    >>> per_process(4, 4, 2), per_process(4, 1, 2), per_process(6, 2, 4), per_process(3, 1, 2)
    ((4, 2), (2, 1), (3, 1), None)
    """
    rows, rest = divmod(batch * accumulation, processes)
    if rest:
        return None
    size = next(n for n in range(min(batch, rows), 0, -1) if rows % n == 0)
    return size, rows // size


def agreed(value: Any) -> Any:
    """Return what the first process holds."""
    if _group is None:
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held, src=0, group=_group)
    return held[0]


def mine(items: list[T]) -> list[T]:
    """Return this process's share of the work."""
    return items[rank() :: count()]


def gathered(found: dict[int, T]) -> dict[int, T]:
    """Put the shares of all processes together."""
    if _group is None:
        return found
    import torch.distributed as dist

    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, found, group=_group)
    return {key: value for part in parts for key, value in part.items()}


def meet() -> None:
    """Wait until every process is here."""
    if _group is not None:
        import torch.distributed as dist

        dist.barrier(group=_group)


def tell(key: str, text: str) -> None:
    """Leave word for the first process, which need not be waiting for it."""
    if _store is not None:
        _store.set(f"{key} {rank()}", text)


def told(key: str, patient: bool) -> list[str] | None:
    """Collect the word of every other process; None where some have none and live, so they are out of step.

    Args:
        key: what about.
        patient: whether to wait for as long as they live, not for `PATIENCE_SECONDS`.

    Raises:
        Lost: one is gone and has left no word.
    """
    import psutil

    if _store is None:
        return []
    until, found = time.monotonic() + PATIENCE_SECONDS, {}
    while len(found) < count() - 1:
        for other in range(1, count()):
            gone = not _lives(int(_store.get(f"pid {other}")), psutil)  # looked at first: a word may be its last act
            if other not in found and _store.check([f"{key} {other}"]):
                found[other] = _store.get(f"{key} {other}").decode()
            if other not in found and gone:
                raise Lost(f"process {other} of the trial is gone")
        if not patient and time.monotonic() > until:
            return None
        time.sleep(LOOK_SECONDS)
    return [found[other] for other in sorted(found)]


def deserted() -> bool:
    """Whether another process is gone that was not asked to leave; torchrun then ends this one with the same signal."""
    import psutil

    if _store is None:
        return False
    others = range(1, count())
    gone = [n for n in others if not _lives(int(_store.get(f"pid {n}")), psutil)]  # first: a word may be its last act
    return any(not _store.check([f"left {n}"]) for n in gone)


def _lives(pid: int, psutil: Any) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leave(code: int) -> NoReturn:
    """End at once: after a failure the usual way out would wait for processes that no longer answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
