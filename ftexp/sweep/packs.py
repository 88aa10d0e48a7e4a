"""How many trials a worker trains in one pass: as asked, or as memory allows and a probe shows to pay.

A trial's result is the same in a pack of any size, so this decides about time alone.
"""

from __future__ import annotations

import math
import os
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ftexp import config, data, estimate, experiment, facts, machine, model
from ftexp.config import Engine
from ftexp.errors import ConfigError
from ftexp.model import Base
from ftexp.progress import say
from ftexp.sweep import frozen, study
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import Options
from ftexp.sweep.space import Axis
from ftexp.train import checkpoints
from ftexp.train.control import Control

if TYPE_CHECKING:
    from optuna import Study

    from ftexp.train.lockstep import Member

SIZES = (16, 8, 4, 2)
"""What `sweep.pack=0` chooses from."""
GAIN = 1.1
"""A pack must be this many times faster than its trials one by one."""
FULL = 128
"""Tokens of a trial's step for each core of a CPU from which no pack is tried: on one core packs were measured to gain
1.5 times at 28 tokens, 1.07 at 109 (Zen 2), nothing at 221 (Zen 4), and 1.15 at 228 (AMX), less than a probe costs."""
PASS = 1024
"""Tokens of a pass for each core of a CPU up to which trials join it: beyond, its numbers no longer fit into caches.
Four, eight and sixteen trials of 228 tokens on two cores gained 1.41, 1.44 and 1.29 times (AMX)."""
STEPS, BUDGET_SECONDS = 3, 2.0
"""Steps of a probe, of which none begins after so many seconds."""
BESIDE = timedelta(minutes=1)
"""Time within which the workers of a launch take their first tickets; of what others began earlier none is theirs."""
ROOM = 0.8
"""Share of the free memory that a pack may take."""
GROWTH = 1.6
"""What a process grows by for a planned byte (`estimate.Plan.memory`)."""
CHOSEN = "ftexp:packs"
"""Study attribute, by host: what `sweep.pack=0` measured and chose."""
SHARED = ("cost/memory_gib", "cost/gpu_memory_gib")
"""Metrics that the trials of a pack have in common."""


def check(options: Options, axes: tuple[Axis, ...], runs: list[config.Run]) -> None:
    """Refuse packs of trials that cannot share a pass, or that are compared by what they share.

    Raises:
        ConfigError: names the key.
    """
    if options.pack == 1:
        return
    if any(run.trainer.engine is not Engine.packed for run in runs):
        raise ConfigError(f"sweep.pack must be 1 unless trainer.engine=packed, got {options.pack}")
    for axis in axes:
        if axis.key.lstrip("+").split(".")[0] not in ("lora", "trainer", "seed"):
            raise ConfigError(
                f"sweep.pack must be 1 where {axis.key} is searched, got {options.pack}: trials of a pack share model, "
                "rows and scoring"
            )
    for name in (*runs[0].objectives, *options.at_most):
        if name in SHARED:
            raise ConfigError(f"sweep.pack must be 1 where {name} is compared, got {options.pack}: a pack has one peak")


def size(sweep: Frozen, record: Study, first: bool) -> int:
    """Return how many tickets a worker takes at once: never more than its share of those that wait.

    The `first` time those that others have just taken count too: workers start beside each other, and the second would
    otherwise take half of what the first left.
    """
    from ftexp.sweep import supervisor

    if sweep.options.pack == 1:
        return 1
    beside = os.environ.get(supervisor.COUNT, "")
    workers = int(beside) if beside.isdecimal() and int(beside) else max(1, supervisor.workers(sweep.options))
    trials, since = study.counted(record), datetime.now() - BESIDE
    waiting = sum(t.state.name == "WAITING" for t in trials)
    shared = sum(first and t.state.name == "RUNNING" and (t.datetime_start or since) > since for t in trials)
    most = max(1, min(sweep.options.pack or SIZES[0], waiting, math.ceil((waiting + shared) / workers)))
    if sweep.options.pack or most == 1:
        return most
    return min(most, _chosen(sweep, record, most, workers)["size"])


def _chosen(sweep: Frozen, record: Study, most: int, workers: int) -> dict[str, Any]:
    """Choose by bytes and by a probe, once for a sweep and host, and put the figures on record."""
    key = f"{CHOSEN} {study.HOST}"
    kept = record.user_attrs.get(key)
    if kept is None:
        kept = _measured(sweep, most, workers)
        record.set_user_attr(key, kept)
        say(f"packs of {kept['size']}: {kept['why']}")
    return kept


def _measured(sweep: Frozen, most: int, workers: int) -> dict[str, Any]:
    runs = [sweep.run(point, 0) for point in frozen.corners(sweep.space)]
    run = max(runs, key=lambda r: (r.lora.r, r.trainer.batch))  # the largest stands for all
    train, valid = experiment.tokenised(run, data.load(run.data))
    given = estimate.rows(train, run)
    base = model.load(run.model, run.quant, longest=given.longest)
    plan = estimate.trial(run, given, base.compute)
    if plan.activations is None or plan.optimizer is None:
        return {"size": 1, "why": f"a trial's memory is not known: {', '.join(plan.notes)}"}
    each = GROWTH * (plan.adapter + plan.gradients + plan.optimizer + plan.activations)
    fits = int(ROOM * free_bytes(base, workers) / each)
    if min(most, fits) < SIZES[-1]:
        return {"size": 1, "why": f"{fits} trials of {each / 2**30:.2f} GiB fit into the free memory"}
    tokens, threads = run.trainer.batch * sum(given.lengths) // len(given.lengths), base.compute.threads
    on_cpu = base.compute.device == "cpu"
    if on_cpu and tokens >= FULL * threads:
        return {"size": 1, "why": f"a trial's step has {tokens} tokens, enough for {threads} cores"}
    room = max(SIZES[-1], int(PASS * threads / tokens)) if on_cpu else SIZES[0]
    tried = next(n for n in SIZES if n <= min(most, fits, room))
    seconds(run, base, train, valid, 1, STEPS)  # oneDNN compiles a product for each number of rows that is new to it
    together = seconds(run, base, train, valid, tried, STEPS)
    alone = seconds(run, base, train, valid, 1, len(together))  # of the same rows
    gain = median(tried * a / t for a, t in zip(alone, together, strict=True))
    told = {"size": tried if gain >= GAIN else 1, "tried": tried, "gain": gain, "alone_seconds": alone,
            "together_seconds": together, "trial_gib": each / 2**30}  # fmt: skip
    return told | {"why": f"{tried} trials in one pass are {gain:.2f} times as fast as one by one"}


def seconds(run: config.Run, base: Base, train: Any, valid: Any, count: int, steps: int) -> list[float]:
    """Time optimizer steps of a pack of equal trials."""
    from ftexp.train import lockstep

    with tempfile.TemporaryDirectory() as folder:
        members = [_member(run, base, train, valid, Path(folder))] * count  # each begins with weights of its own
        return lockstep.seconds(members, steps, BUDGET_SECONDS if count > 1 else math.inf)


def _member(run: config.Run, base: Base, train: Any, valid: Any, folder: Path) -> Member:
    from ftexp.model import packed
    from ftexp.train.lockstep import Member

    with model.adapted(base, run.lora, run.seed) as fresh:
        start, scales = packed.taken(fresh)
    kept = checkpoints.store(folder, {})
    return Member(run, base, train, valid, start, scales, kept, lambda *_: None, Control())


def free_bytes(base: Base, workers: int) -> float:
    """Bytes that are free on the device of a base, for one of the workers of a host; GPUs have one each."""
    if base.compute.device == "cuda":
        import torch

        free, share = torch.cuda.mem_get_info()[0], facts.shared_gpu_gib()
        return free if share is None else min(free, share * estimate.GIB)
    return machine.free_memory() / workers
