"""What sharing a pass saves: seconds of a trial's optimizer step, alone and in packs, beside TRL's.

Run by `make bench`. The embedded model and the demo's rows, one, two and four of them a step (about 33, 64 and 138
tokens). Every way takes a few steps in each round, so that a machine that slows down slows all of them; CPU seconds of
one thread, and their ratio to the TRL path of ftexp in the same round. Nothing here is a test.

    python tests/bench/packed.py [--rows 1,2,4] [--sizes 1,2,4,8,16] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from hydra import compose, initialize_config_dir

from ftexp import config, data, experiment, facts, model, overrides
from ftexp.config import Engine, Run
from ftexp.sweep import plugin
from ftexp.train import checkpoints, sft
from ftexp.train.control import Control

RESULT = Path("outputs/bench/packed.json")
STEPS = 4
RANKS = (8, 16, 16, 64)
"""Of the trials of a pack, in turn; the TRL trial has the mean cost of these."""


def trial(engine: Engine, rows: int, number: int) -> Run:
    """Compose a trial of the demo with so many rows a step."""
    given = [f"lora.r={RANKS[number % len(RANKS)]}", f"trainer.engine={engine.value}", f"trainer.batch={rows}",
             f"trainer.steps={STEPS}", "trainer.report_steps=0", "trainer.checkpoint_minutes=null",
             f"trainer.lr={1e-3 / (1 + number)}"]  # fmt: skip
    with initialize_config_dir(str(overrides.CONF), **overrides.BASE):
        return config.build(compose("config", given))


class Stamps:
    """CPU seconds between the steps that a training reports; the first one warms up."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, values: dict[str, float], step: int) -> None:
        """Hear of a step."""
        if "train/loss" in values:
            self.at.append(time.process_time())

    def seconds(self) -> float:
        """Return those of the fastest step."""
        return min(b - a for a, b in zip(self.at, self.at[1:], strict=False))


def by_trl(rows: int) -> float:
    """Seconds of a step of TRL, mean over the ranks."""
    found = []
    for number, rank in enumerate(RANKS):
        if rank in RANKS[:number]:
            found.append(found[RANKS.index(rank)])
            continue
        run, stamps = trial(Engine.trl, rows, number), Stamps()
        train, valid = experiment.tokenised(run, data.load(run.data))
        base = model.load(run.model, run.quant)
        with tempfile.TemporaryDirectory() as folder, model.adapted(base, run.lora, run.seed) as tuned:
            kept = checkpoints.store(Path(folder) / "t", {})
            sft.train(run, base, tuned, train, valid, kept, stamps, Control())
        found.append(stamps.seconds())
    return statistics.mean(found)


def in_pack(rows: int, size: int) -> float:
    """Seconds of a step of one trial among so many; alone the mean over the ranks."""
    from ftexp.model import packed
    from ftexp.train import lockstep

    def member(number: int, report: Callable[..., Any], folder: str) -> lockstep.Member:
        run = trial(Engine.packed, rows, number)
        train, valid = experiment.tokenised(run, data.load(run.data))
        base = model.load(run.model, run.quant)
        with model.adapted(base, run.lora, run.seed) as fresh:
            start, scales = packed.taken(fresh)
        kept = checkpoints.store(Path(folder), {})
        return lockstep.Member(run, base, train, valid, start, scales, kept, report, Control())

    spent = []
    with tempfile.TemporaryDirectory() as folder:
        groups = [[n] for n in range(len(RANKS))] if size == 1 else [list(range(size))]
        for group in groups:
            stamps = Stamps()
            members = [member(n, stamps if n == group[0] else lambda *_: None, folder) for n in group]
            list(lockstep.train(members))
            spent.append(stamps.seconds() / size)
    return statistics.mean(spent)


def main() -> None:
    """Measure, print and keep."""
    import torch

    asked = argparse.ArgumentParser()
    asked.add_argument("--rows", default="1,2,4")
    asked.add_argument("--sizes", default="1,2,4,8,16")
    asked.add_argument("--rounds", type=int, default=3)
    given = asked.parse_args()
    config.register()
    plugin.register()
    torch.set_num_threads(1)
    told: dict[str, Any] = {"torch": facts.versions()["torch"], "steps": STEPS, "ranks": RANKS, "rows": {}}
    for rows in map(int, given.rows.split(",")):
        run = trial(Engine.packed, rows, 0)
        train, _ = experiment.tokenised(run, data.load(run.data))
        order = next(sft.orders(len(train), run.trainer, run.seed))[: rows * STEPS]
        tokens = sum(len(train[n].ids) for n in order) / STEPS
        ways: dict[str, Callable[[], float]] = {"trl": lambda n=rows: by_trl(n)}
        ways |= {f"pack of {k}": lambda n=rows, k=k: in_pack(n, k) for k in map(int, given.sizes.split(","))}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                found[name].append(way())
        compute = model.load(run.model, run.quant).compute
        told |= {"chip": compute.chip, "dtype": compute.dtype}
        print(f"{rows} rows, {tokens:.0f} tokens a step, {compute.dtype}, one thread of {compute.chip}")
        table = {}
        for name, seconds in found.items():
            ratios = sorted(trl / mine for trl, mine in zip(found["trl"], seconds, strict=True))
            table[name] = {
                "seconds": seconds,
                "ratio": statistics.median(ratios),
                "least": ratios[0],
                "most": ratios[-1],
            }
            print(f"  {name:11} {statistics.median(seconds):6.3f} s a trial and step, "
                  f"{table[name]['ratio']:5.2f} x TRL ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip
        told["rows"][rows] = {"tokens": tokens, "ways": table}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    print(f"kept in {RESULT}")


if __name__ == "__main__":
    main()
