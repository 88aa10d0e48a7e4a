"""How many trials a worker trains in one pass: as asked, or as memory allows and their first steps show to pay.

A trial's result is the same in a pack of any size, so this decides about time alone, and the steps that are timed are
those of the trials themselves.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from datetime import datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from ftexp import config, data, estimate, experiment, facts, machine, model
from ftexp.config import Engine
from ftexp.errors import ConfigError
from ftexp.model import Base
from ftexp.progress import say
from ftexp.sweep import frozen, share, study
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import DRAWN, ENTERED, Options
from ftexp.sweep.space import Axis
from ftexp.train.turns import Turns

if TYPE_CHECKING:
    from optuna import Study

MOST = 16
"""Trials of a pack that `sweep.pack=0` takes at most."""
FEW = 4
"""Trials that packs are tried with where a sampler looks at results: it hears of none before all are trained."""
GAIN = 1.1
"""A pack must be this many times faster than its trials one by one, or the next ones are taken one by one: whoever
proposes points then hears of each before the next."""
PASS = 1024
"""Tokens of a pass for each core of a CPU up to which trials join it: beyond, its numbers no longer fit into caches.
Four, eight and sixteen trials of 228 tokens on two cores gained 1.41, 1.44 and 1.29 times (AMX)."""
BESIDE = timedelta(minutes=1)
"""Time within which the workers of a launch take their first tickets; of what others began earlier none is theirs."""
ROOM = 0.8
"""Share of the free memory that a pack may take."""
GROWTH = 1.6
"""What a process grows by for a planned byte (`estimate.Plan.memory`)."""
CHOSEN = "ftexp:packs"
"""Study attribute, by host: the most trials that `sweep.pack=0` tries in a pass, what it measured and what it chose."""
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
    every = max(run.trainer.report_steps for run in runs)
    least = options.pruner_args.get("min_resource", runs[0].trainer.report_steps)
    if options.pruner in ENTERED and not (isinstance(least, int) and least >= every):
        raise ConfigError(
            f"sweep.pruner_args.min_resource must be at least trainer.report_steps={every} with sweep.pack="
            f"{options.pack}, got {least}: trials of a pack would pass two rungs at once, in the order they are asked"
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
    trials, since, me = study.counted(record), datetime.now() - BESIDE, os.environ.get(share.TOKEN, "")
    waits = [t for t in trials if t.state.name == "WAITING"]
    mine = sum(study.KEPT in t.user_attrs and not study.kept(t, me) for t in waits)
    waiting = sum(not study.kept(t, me) for t in waits)
    shared = sum(first and t.state.name == "RUNNING" and (t.datetime_start or since) > since for t in trials)
    most = max(1, min(sweep.options.pack or MOST, waiting, mine + math.ceil((waiting - mine + shared) / workers)))
    if sweep.options.pack or most == 1:
        return most
    kept = _kept(sweep, record, workers)
    if "size" in kept:
        return min(most, kept["size"])
    return min(most, kept["most"], MOST if sweep.options.sampler in DRAWN else FEW)


def turns(sweep: Frozen, record: Study, count: int) -> Turns | None:
    """Say how a pack of so many takes its steps: as is on record, or in turn until it is; None where `pack` is given.

    What is heard goes on record. A record that cannot be reached now ends no trial: the next pack is heard instead.
    """
    key = f"{CHOSEN} {study.HOST}"
    if sweep.options.pack:
        return None
    if "size" in (kept := record.user_attrs.get(key, {})):
        return Turns(None, kept.get("gain", GAIN) <= 1)

    def settle(together: list[float], alone: list[float], fit: int | None) -> bool:
        gain = median(a / t for a, t in zip(alone, together, strict=True)) if together else 0.0
        most = min(n for n in (kept.get("most", count), fit) if n is not None)
        told = {"size": most if gain >= GAIN else 1, "tried": count, "gain": gain, "together_seconds": together,
                "alone_seconds": alone}  # fmt: skip
        with suppress(Exception):
            record.set_user_attr(key, kept | told)
        compared = f"{count} trials in one pass are {gain:.2f} times as fast as one by one"
        say(compared if together else "memory holds one trial a pass")
        return gain > 1

    return Turns(settle)


def _kept(sweep: Frozen, record: Study, workers: int) -> dict[str, Any]:
    """Return what is on record of packs on this host, and put the most that may be tried there where nothing is."""
    key = f"{CHOSEN} {study.HOST}"
    kept = record.user_attrs.get(key)
    if kept is None:
        kept = _most(sweep, workers)
        record.set_user_attr(key, kept)
        say(f"packs of {kept['most']} at most: {kept['why']}")
    return kept


def _most(sweep: Frozen, workers: int) -> dict[str, Any]:
    """Tell how many trials may share a pass, by the bytes of the largest and by the tokens of a step."""
    runs = [sweep.run(point, 0) for point in frozen.corners(sweep.space)]
    run = max(runs, key=lambda r: (r.lora.r, r.trainer.batch))  # the largest stands for all
    train, _ = experiment.tokenised(run, data.load(run.data))
    given = estimate.rows(train, run)
    base = model.load(run.model, run.quant, longest=given.longest)
    plan = estimate.trial(run, given, base.compute)
    if plan.activations is None or plan.optimizer is None:
        return {"most": 1, "why": f"a trial's memory is not known: {', '.join(plan.notes)}"}
    each = GROWTH * (plan.adapter + plan.gradients + plan.optimizer + plan.activations)
    told = {"trial_gib": each / estimate.GIB, "tokens": run.trainer.batch * sum(given.lengths) // len(given.lengths)}
    limits = {MOST: "no more are tried"}
    limits[int(ROOM * free_bytes(base, workers) / each)] = f"{told['trial_gib']:.2f} GiB each, of the free memory"
    if base.compute.device == "cpu":
        threads = base.compute.threads
        limits[int(PASS * threads / told["tokens"])] = f"{told['tokens']} tokens a step each, for {threads} cores"
    most = min(limits)
    return told | {"most": max(1, most), "why": limits[most]}


def free_bytes(base: Base, workers: int) -> float:
    """Bytes that are free on the device of a base, for one of the workers of a host; GPUs have one each."""
    if base.compute.device == "cuda":
        import torch

        free, share = torch.cuda.mem_get_info()[0], facts.shared_gpu_gib()
        return free if share is None else min(free, share * estimate.GIB)
    return machine.free_memory() / workers
