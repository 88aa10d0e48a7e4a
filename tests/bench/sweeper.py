"""What the sweeper costs: CPU time of a trivial trial, its growth with the record, and how busy workers are kept.

Run by `make bench`. Everything is measured in one run on one machine and printed as ratios; nothing here is a test.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import hydra
from hydra import compose, initialize_config_dir

from ftexp import config, experiment, overrides
from ftexp.sweep import frozen, plugin, screen, space, study, worker
from ftexp.sweep.options import Options, Pruner, Sampler
from ftexp.train.control import Rung

RESULT = Path("outputs/bench/sweeper.json")
SEARCH = ["lora.r=8,16,32,64", "trainer.lr=tag(log,interval(1e-4,1e-2))", "trainer.neftune=interval(0.0,15.0)"]
RUNGS = 5


def make(kind: str, total: int) -> tuple[frozen.Frozen, object]:
    """Launch a sweep of trivial trials into a temporary folder; return it and its record."""
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    given = [f"seed=range(0,{total})"] if kind == "grid" else SEARCH
    searched = space.parse(given)
    searching = {"sampler": Sampler[kind], "n_trials": total, "pruner": Pruner.asha}
    options = Options(**({} if kind == "grid" else searching))
    made = frozen.Frozen(folder, "bench", searched, options, ["valid/loss"], None, "", {})
    made.save()

    def composed(point: list[str]):
        with initialize_config_dir(str(overrides.CONF), **overrides.BASE):
            return compose("config", ["model=tiny", *point])

    grid = searched.grid() if kind == "grid" else []
    frozen.freeze(folder, searched, grid or frozen.corners(searched), composed)
    record = worker.open_study(made)
    study.settle(record, plugin.tickets(grid, options, searched), 2)
    return made, record


def ours(kind: str, total: int, marks: tuple[int, ...]) -> dict[int, float]:
    """Run trivial trials; return the CPU seconds this process had used when a trial began."""
    used: dict[int, float] = {}

    def trivial(run, folder, label, parent, control):
        if int(folder.name) in marks:
            used[int(folder.name)] = time.process_time()
        for rung in range(RUNGS if control.judge else 0):
            control.judge(Rung(1.0 / (rung + 1)), rung + 1)
        return {"valid/loss": abs(run.trainer.lr - 1e-3)}

    experiment.execute, worker.same_rows, worker.say = trivial, lambda *_: None, lambda *_, **__: None
    sweep, record = make(kind, total)
    worker.work(sweep, record)
    states = {screen.state_of(t) for t in study.counted(record)}
    if not states <= {"complete", "pruned"}:
        raise SystemExit(f"trials must end well for a measurement, got {states}: {study.counted(record)[0].user_attrs}")
    return used


def in_child(*words: str) -> float:
    """Run this file in a process of its own; return the CPU seconds of it and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, cwd=tempfile.mkdtemp())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def a_trial(*words: str) -> float:
    """CPU milliseconds of one more trial: a sweep of 34 against one of 2, the best of three."""
    return min(1000 * (in_child(*words, "34") - in_child(*words, "2")) / 32 for _ in range(3))


def hydra_basic(total: int) -> None:
    """Compose and call a function that does nothing, under Hydra's own basic sweeper."""
    sys.argv[1:] = ["-m", "model=tiny", f"seed=range(0,{total})", "hydra/sweeper=basic"]
    hydra.main(**overrides.BASE, config_path=str(overrides.CONF), config_name="config")(lambda cfg: 0.0)()


def growth(kind: str, total: int) -> tuple[float, float]:
    """CPU milliseconds of a trial after 10 finished ones, and at the end of a long sweep."""
    used = ours(kind, total, (10, 30, total - 21, total - 1))
    return 50 * (used[30] - used[10]), 50 * (used[total - 1] - used[total - 21])


def _claim(folder: Path, durations: list[float], begun) -> None:
    record = worker.open_study(frozen.load(folder))
    begun.wait()
    while (trial := study.claim(record)) is not None:
        time.sleep(durations[study.ticket(trial._cached_frozen_trial)])
        record.tell(trial, 0.0)


def busy(workers: int = 4, trials: int = 32) -> tuple[float, float]:
    """Share of the time that workers are busy, and what waiting for whole batches would leave of it.

    Durations are log-normal (sigma 0.6), as trials of different rank and luck are; workers sleep, claims are real.
    """
    dice = random.Random(0)
    durations = [0.5 * dice.lognormvariate(0, 0.6) for _ in range(trials)]
    made, _ = make("grid", trials)
    begun = multiprocessing.Barrier(workers + 1)
    ours = [multiprocessing.Process(target=_claim, args=(made.folder, durations, begun)) for _ in range(workers)]
    for process in ours:
        process.start()
    begun.wait()
    began = time.monotonic()
    for process in ours:
        process.join()
    took = time.monotonic() - began
    batches = sum(max(durations[n : n + workers]) for n in range(0, trials, workers))
    return sum(durations) / workers / took, sum(durations) / workers / batches


def main() -> None:
    """Measure, print and keep."""
    config.register()
    plugin.register()
    match sys.argv[1:]:
        case ["basic", total]:
            return hydra_basic(int(total))
        case [kind, total]:
            ours(kind, int(total), ())
            return None
    told = {"machine": {"cpu": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}}
    told["ms_a_trial"] = {name: a_trial(name) for name in ("basic", "grid", "tpe")}
    told["ms_after_10_and_2000"] = {kind: growth(kind, 2000) for kind in ("grid", "tpe")}
    told["busy"] = dict(zip(("ftexp", "batches"), busy(), strict=True))
    costs = told["ms_a_trial"]
    print(f"CPU of a trivial trial: Hydra's basic sweeper {costs['basic']:.0f} ms, ours {costs['grid']:.0f} ms "
          f"({costs['grid'] / costs['basic']:.2f} x), TPE with ASHA and {RUNGS} rungs {costs['tpe']:.0f} ms "
          f"({costs['tpe'] / costs['basic']:.2f} x)")  # fmt: skip
    for kind, (early, late) in told["ms_after_10_and_2000"].items():
        print(f"{kind}: {early:.0f} ms after 10 trials, {late:.0f} ms after 2000 ({late / early:.1f} x)")
    print(f"4 workers, 32 trials of log-normal length: {told['busy']['ftexp']:.0%} busy; in batches "
          f"{told['busy']['batches']:.0%}")  # fmt: skip
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    print(f"kept in {RESULT}")


if __name__ == "__main__":
    main()
