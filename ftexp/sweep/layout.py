"""How a CPU is shared out: in one process with all threads, or as workers with some each, whichever is done sooner.

Threads share out a product of large matrices well, small ones and what lies between them badly: two trials beside each
other with a thread each finish more than two behind each other with both. A probe of some seconds says by how much.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from ftexp import config, data, estimate, experiment, machine
from ftexp.config import Kind, Loss, Method, Run
from ftexp.errors import FtexpError
from ftexp.model import compute
from ftexp.progress import say
from ftexp.sweep import frozen, packs, study, supervisor
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import DRAWN, Engine, Pruner

if TYPE_CHECKING:
    from optuna import Study

CHOSEN = "ftexp:layout"
"""Study attribute, by host: what was measured and chosen. A sweep that goes on keeps it, and with it every bit."""
WORTH_SECONDS = 100.0
"""Sweeps that take less are not worth a probe."""
CORE = 1.5e11
"""Operations a second of a core, rather more than it has: what is short by this is short."""
STARTUP_SECONDS = 10.0
"""What a worker takes to import its libraries and to load the base, while the launch has done both."""
WRITING = 2
"""Passes over the held-out rows that take as long as writing a completion for each (1.4 to 2 measured)."""
ROUNDS = 5
"""Times that each way is tried, in turn. The median counts: a product shared out waits for the core that is disturbed,
two trials beside each other do not, so what disturbs belongs to the figure."""
BESIDE = 1.05
"""What a trial takes longer beside others (measured with two on two cores)."""
TRIAL_SECONDS = 2.0
"""What a trial takes beside its operations, on one core: adapter on and off, hashes of the base, tables, files."""
GAIN = 1.1
"""Workers must finish the sweep this many times as soon (8 trials of 20 steps on two Zen 4 cores: 1.1 to 1.2 foretold,
194 s against 245 measured)."""
LARGEST = 4 * estimate.GIB
"""Bytes of weights above which a probe with a small model says nothing."""
PROCESS = int(0.8 * estimate.GIB)
"""Bytes of a worker without its model."""
TOKENS = 1024
"""Most tokens of a probe's step."""
MOST = 8
"""Most workers that are taken unasked: `BESIDE` was measured with few."""
COSTS = {"cost/seconds", *packs.SHARED}
"""Metrics that a trial beside others has otherwise."""


def workers(sweep: Frozen, record: Study, left: int) -> int:
    """Count the workers of a sweep on this machine; 0 where its trials run in the process of the launch.

    Raises:
        ConfigError: as of `supervisor.workers`.
    """
    count = supervisor.workers(sweep.options)
    if count or not left or sweep.options.engine is not Engine.local:
        return count
    key = f"{CHOSEN} {study.HOST}"
    kept = record.user_attrs.get(key)
    if kept is None:
        try:
            kept = choice(sweep, left)
        except (FtexpError, RuntimeError, MemoryError) as error:  # the trials will tell it, or do without a plan
            kept = {"workers": 0, "why": f"no plan: {error}"}
        record.set_user_attr(key, kept)
    if kept["workers"]:
        say(f"trials {kept['why']}")
    return kept["workers"]


def choice(sweep: Frozen, left: int) -> dict[str, Any]:
    """Choose by what the trials will take, the memory, and a probe where it is worth one."""
    points = [{}] if not sweep.space.axes else frozen.corners(sweep.space)
    runs = [sweep.run(point, 0) for point in points]
    if (reason := _never(sweep, runs, left)) is not None:
        return {"workers": 0, "why": reason}
    run = max(runs, key=lambda r: (r.lora.r, r.trainer.batch))  # the largest stands for all
    given = estimate.rows(experiment.tokenised(run, data.load(run.data))[0], run)
    chosen = compute.policy(run.model, given.longest)
    if chosen.device != "cpu":
        return {"workers": 0, "why": "a GPU that nvidia-smi does not list"}
    plan = estimate.trial(run, given, chosen)
    operations, before = flops(run, plan, given)
    if left * operations / (CORE * machine.cores()) < WORTH_SECONDS:
        return {"workers": 0, "why": "a short sweep"}
    if plan.activations is None or plan.optimizer is None or plan.weights > LARGEST:
        return {"workers": 0, "why": "a model that is large, or whose memory is not known"}
    most = min(left, machine.cores(), room(plan), MOST)
    if most < 2:
        return {"workers": 0, "why": "no memory for two workers"}
    compute.apply(chosen)  # the probe computes as trials do
    length = min(TOKENS, max(1, sum(given.lengths) // len(given.lengths)))
    rows = min(run.trainer.batch, max(1, TOKENS // length))
    made = fastest(left, operations, before, machine.cores(), most, probe(rows, length, chosen.attention, chosen.dtype))
    if made["workers"]:
        _settle(run, given.longest, machine.cores() // made["workers"])
    return made


def _settle(run: Run, longest: int, threads: int) -> None:
    """Choose how workers compute before they start: side by side each would measure it, disturbed, for itself."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compute.policy(run.model, longest)
    finally:
        torch.set_num_threads(before)


def _never(sweep: Frozen, runs: list[Run], left: int) -> str | None:
    """Tell why trials stay in this process whatever a probe would say."""
    options = sweep.options
    rules = (
        (left < 2 or machine.cores() < 2, "one trial, or one core"),
        (options.sampler not in DRAWN, f"sweep.sampler={options.sampler.value} looks at the trials before"),
        (options.pruner is not Pruner.none, f"sweep.pruner={options.pruner.value} looks at the trials beside"),
        (options.pack > 1, "sweep.pack shares one process out"),
        (options.timeout_minutes is not None, "sweep.timeout_minutes is the time of a trial alone"),
        (bool({*runs[0].objectives, *options.at_most} & COSTS), "costs are compared"),
        (bool(options.storage), "sweep.storage is given"),
        (any(run.model.kind is Kind.tiny for run in runs), "a tiny model"),
        (len({config.digest(run.model, run.quant, run.data) for run in runs}) > 1, "trials differ in model or rows"),
        (any(run.trainer.kind is not Method.sft for run in runs), "measured for trainer.kind=sft"),
        (any(run.trainer.loss is Loss.own for run in runs), "trainer.loss=own lives in this process"),
    )
    return next((why for applies, why in rules if applies), None)


def room(plan: estimate.Plan) -> int:
    """Count the workers that fit into the free memory, each with its base and a trial."""
    each = PROCESS + plan.weights + packs.GROWTH * (plan.memory - plan.weights)
    return max(0, int(packs.ROOM * machine.free_memory() / each))


def flops(run: Run, plan: estimate.Plan, given: estimate.Rows) -> tuple[float, float]:
    """Operations of a trial (training over a frozen base, rungs, scores, completions), and of scoring its base."""
    weights = plan.flops / (6 * plan.padded)
    held_out = len(data.load(run.data).valid)
    tokens = held_out * sum(given.lengths) / len(given.lengths)
    every = run.trainer.report_steps
    one, score = 2 * weights * tokens, 1 + WRITING * run.eval.generate
    rungs = (plan.steps - 1) // every if every else 0
    return 4 / 6 * plan.flops + (rungs + score) * one, score * one


def fastest(
    left: int, operations: float, before: float, all_cores: int, most: int, took: Callable[[int], tuple[float, float]]
) -> dict[str, Any]:  # fmt: skip
    """Choose how many workers finish soonest.

    Args:
        left: trials to do.
        operations: of a trial.
        before: operations of scoring the base, once in this process, and once in each worker.
        all_cores: of the machine, shared out among workers.
        most: workers that fit.
        took: takes a number of threads, and returns seconds of a step of the probe and its operations.
    """
    counts = sorted({most, *(2**n for n in range(1, most.bit_length()) if 2**n <= most)})
    threads = {1: all_cores, **{count: max(1, all_cores // count) for count in counts}}
    tried = [{count: took(n) for count, n in threads.items()} for _ in range(ROUNDS)]
    steps = {count: median(turn[count][0] for turn in tried) for count in threads}
    rate = steps[1] / tried[0][1][1]
    alone = left * TRIAL_SECONDS + rate * (before + left * operations)
    told: dict[str, Any] = {"seconds": {"0": round(alone, 1)}}
    for count in counts:
        share = steps[count] / steps[1] * BESIDE
        turns = math.ceil(left / count)
        work = rate * share * (before + turns * operations)
        told["seconds"][str(count)] = round(STARTUP_SECONDS + turns * TRIAL_SECONDS + work, 1)
    best = min(counts, key=lambda n: (told["seconds"][str(n)], n))
    gain = told["seconds"]["0"] / told["seconds"][str(best)]
    told["workers"] = best if gain >= GAIN else 0
    how = f"{best} at a time with {threads[best]} thread{'s' if threads[best] > 1 else ''} each"
    return told | {"why": f"{how} take {1 / gain:.0%} of the time of one by one (probe)"}


def probe(rows: int, length: int, attention: str, dtype: str) -> Callable[[int], tuple[float, float]]:
    """Make a small model with an adapter; the function that is returned times its step with so many threads."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
                            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 4096}  # fmt: skip
    with torch.random.fork_rng():
        made: Any = get_peft_model(
            LlamaForCausalLM._from_config(  # type: ignore
                LlamaConfig(**size), attn_implementation=attention, dtype=getattr(torch, dtype)
            ),
            LoraConfig(r=16, target_modules="all-linear"),
        )
        ids = torch.randint(0, 4096, (rows, length))
    frozen_weights = sum(
        p.numel() for name, p in made.named_parameters() if not p.requires_grad and "embed" not in name
    )

    def took(threads: int) -> tuple[float, float]:
        before, times = torch.get_num_threads(), []
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                began = time.perf_counter()
                made(input_ids=ids, labels=ids).loss.backward()
                made.zero_grad()
                times.append(time.perf_counter() - began)
        finally:
            torch.set_num_threads(before)
        return mean(times[1:]), 4.0 * frozen_weights * ids.numel()

    return took
