"""The same trials by a shell loop over a TRL script, as it comes and tuned, and as sweeps: time, side by side.

    python tests/bench/loop.py [one] [work] [answer] [memory] [--task short]

Run whole by `make bench`, for the steps of the demo, for shorter ones, and for rows with a system prompt (`TASKS`). Each
part goes on where it was left: what was measured is kept in `outputs/bench/loop-TASK.json` (delete it to begin anew), so
a part can be run in pieces. `--rounds 3` measures each way of `one` three times in turn, `--of 2` measures two trials of
a loop and takes their mean for the others, which the output says.

Same model, rows, steps, points and scoring; ways take turns, so that a machine that slows down slows all of them. Wall
time and CPU time are kept for each: on a machine with other work the second is the steadier. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from ftexp import config, data
from ftexp.config import Data, Source, Template
from ftexp.facts import versions
from ftexp.files import cache, read_json, write_json
from ftexp.model import embedded
from ftexp.page import style, svg

FOLDER = Path("outputs/bench")
SCRIPT = Path(__file__).with_name("trl_trial.py").absolute()
EVERY, KEYS = 5, {"r": "lora.r", "alpha": "lora.alpha", "lr": "trainer.lr", "neftune": "trainer.neftune"}
POINTS = [
    {"r": r, "alpha": alpha, "lr": lr, "neftune": neftune}
    for r, alpha, lr, neftune in (
        (8, 16, 1e-3, 0.0), (16, 32, 2e-3, 5.0), (64, 16, 5e-4, 0.0), (8, 64, 2e-3, 0.0), (16, 16, 2e-4, 5.0),
        (64, 128, 1e-3, 0.0), (32, 32, 5e-3, 0.0), (32, 64, 5e-4, 10.0), (8, 32, 2e-4, 0.0), (16, 64, 5e-3, 0.0),
        (64, 32, 2e-3, 5.0), (32, 16, 1e-4, 0.0), (8, 128, 1e-3, 10.0), (16, 128, 2e-4, 0.0), (64, 64, 1e-4, 5.0),
        (32, 128, 3e-3, 0.0),
    )
]  # fmt: skip
"""Drawn once over the ranges of `sweeps/rank_alpha_lr_neftune.yaml`; the first eight are those of `work`."""


@dataclass(frozen=True)
class Task:
    """What every way does."""

    name: str
    steps: int
    batch: int
    """Rows of a step."""
    valid: int
    """Held-out rows, whose loss is taken each `EVERY` steps, and whose completions are written at the end."""
    longest: int
    """Tokens of a row."""
    template: Template = Template.chatml

    def keys(self) -> list[str]:
        """Return the overrides of ftexp."""
        return [f"trainer.batch={self.batch}", f"data.valid={self.valid}", f"data.max_length={self.longest}",
                f"data.template={self.template.value}"]  # fmt: skip


TASKS = {
    task.name: task
    for task in (
        Task("demo", 20, 8, 48, 128), Task("short", 40, 4, 32, 64), Task("system", 40, 4, 32, 128, Template.model),
    )
}  # fmt: skip
"""Some 230, 115 and 200 tokens a step; of the last 84 are the model's own system prompt, in front of each row."""
PACKED = ("trainer.engine=packed", "sweep.pack=0")
BESIDE = (*PACKED, "sweep.workers=2")
PRUNED = {
    "ftexp raced": ("sweep.pruner=race",),
    **{f"ftexp two workers, {p}": (f"sweep.pruner={p}", *BESIDE) for p in ("race", "halving", "asha")},
    "ftexp two workers, halving alone": ("sweep.pruner=halving", "sweep.pruner_args.every_rung=false", *BESIDE),
}
"""Ways to the best of sixteen that stop trials; `asha` halves blindly, whatever the rows say, and `halving alone` takes no
held-out loss where it stops nobody."""
Kept = dict[str, Any]
"""What was measured: part -> way -> a list of {wall, cpu, ...}."""


def machine() -> dict[str, Any]:
    """Tell what figures were measured on."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {"cpu": names[0] if names else platform.processor(), "cores": len(os.sched_getaffinity(0)),
            "threads": os.environ.get("OMP_NUM_THREADS", "all"), "load": os.getloadavg()[0],
            **{name: versions()[name] for name in ("python", "torch", "transformers", "trl", "peft", "ftexp")}}  # fmt: skip


def rows(folder: Path, task: Task) -> Path:
    """Write the demo's rows with their split, for the script."""
    splits = data.load(Data(kind=Source.yoda, template=task.template, valid=task.valid, max_length=task.longest))
    path = folder / "rows.jsonl"
    told = [{"split": name, "prompt": r.prompt, "completion": r.completion}
            for name, part in (("train", splits.train), ("valid", splits.valid)) for r in part]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in told))
    return path


def timed(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a command to its end; return its wall and CPU seconds, and the machine's load when it began."""
    load, began, before = os.getloadavg()[0], time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.monotonic() - began, "cpu": cpu, "load": load}


def scripted(task: Task, point: dict[str, Any], *more: str) -> dict[str, Any]:
    """Run one trial of the loop, in a process of its own as a shell does."""
    with tempfile.TemporaryDirectory(prefix="bench") as work:
        own = task.template is Template.model
        told = json.dumps({**point, "steps": task.steps, "every": EVERY, "batch": task.batch, "own_template": own})
        out = Path(work, "trial")
        took = timed([sys.executable, str(SCRIPT), str(embedded.folder()), str(rows(Path(work), task)), told, str(out), *more],
                     Path(work))  # fmt: skip
        found = json.loads((out / "result.json").read_text())
    return {**took, "loss": found["loss"], "dtype": found["dtype"].removeprefix("torch."), "seconds": found["seconds"]}


def forget() -> None:
    """Remove what earlier runs kept of the base's scores: the loop scores it each time."""
    shutil.rmtree(cache() / "base", ignore_errors=True)


def single(task: Task, point: dict[str, Any]) -> dict[str, Any]:
    """Run one trial as a run of ftexp."""
    forget()
    with tempfile.TemporaryDirectory(prefix="bench") as work:
        given = [f"{KEYS[k]}={v}" for k, v in point.items()]
        took = timed([sys.executable, "-m", "ftexp.run", *given, "track=none", "name=bench", f"trainer.steps={task.steps}",
                      f"trainer.report_steps={EVERY}", *task.keys()], Path(work))  # fmt: skip
        trial = json.loads(Path(work, "outputs/runs/bench/trial.json").read_text())
    return {**took, "loss": trial["scores"]["valid/loss"], "dtype": trial["facts"]["compute"]["dtype"]}


def swept(task: Task, points: list[dict[str, Any]], *more: str, every: int = EVERY) -> dict[str, Any]:
    """Run points as one sweep of ftexp; return its time, and the loss and last step of each trial."""
    searched = [k for k in KEYS if len({p[k] for p in points}) > 1]
    baselines = ",".join("{" + ",".join(f"{KEYS[k]}:{p[k]}" for k in searched) + "}" for p in points)
    forget()
    params = [f"{KEYS[k]}={','.join(str(v) for v in sorted({p[k] for p in points}))}" for k in KEYS]
    with tempfile.TemporaryDirectory(prefix="bench") as work:
        took = timed([sys.executable, "-m", "ftexp.run", *params, "track=none", "name=bench", f"trainer.steps={task.steps}", *task.keys(),
                      f"trainer.report_steps={every}", "sweep.sampler=random", f"sweep.n_trials={len(points)}",
                      f"sweep.baselines=[{baselines}]", *more, "-m"], Path(work))  # fmt: skip
        folder = Path(work, "outputs/sweeps/bench")
        trials = [json.loads((folder / str(n) / "trial.json").read_text()) for n in range(len(points))]
        curves = [_curve(folder / str(n) / "metrics.jsonl") for n in range(len(points))]
    assert all(t["config"][KEYS[k]] == v for t, p in zip(trials, points, strict=True) for k, v in p.items())
    return {
        **took, "dtype": trials[0]["facts"]["compute"]["dtype"],
        "steps": [last for last, _ in curves], "rungs": [rungs for _, rungs in curves],
        "losses": [t["scores"]["valid/loss"] if t["state"] == "complete" else None for t in trials],
        "memory": [t["scores"]["cost/memory_gib"] if t["state"] == "complete" else None for t in trials],
    }  # fmt: skip


def _curve(path: Path) -> tuple[int, int]:
    """Read the last step of a trial, and how many held-out losses it took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return max(told["step"] for told in lines), sum("valid/loss" in told for told in lines)


def measure(kept: Kept, part: str, way: str, count: int, run: Callable[[int], dict[str, Any]]) -> None:
    """Measure a way until it has been measured `count` times; each time is kept as it comes."""
    done = kept.setdefault(part, {}).setdefault(way, [])
    if len(done) < count:
        print(f"{part}: {way}, {len(done) + 1} of {count}", file=sys.stderr, flush=True)
        done.append(run(len(done)))
        write_json(FOLDER / f"loop-{kept['task']}.json", kept)


def one(kept: Kept, task: Task, rounds: int) -> None:
    """A single trial: ftexp, and the same computation without it."""
    for turn in range(1, rounds + 1):
        measure(kept, "one", "ftexp", turn, lambda _: single(task, POINTS[0]))
        measure(kept, "one", "tuned loop", turn, lambda _: scripted(task, POINTS[0], "tuned"))
        measure(kept, "one", "loop", turn, lambda _: scripted(task, POINTS[0]))


def loops(kept: Kept, task: Task, of: int) -> None:
    """Measure some trials of the loop, evenly chosen, as it comes and tuned in turn: for `work` and `answer` alike."""
    chosen = [POINTS[n * len(POINTS) // of] for n in range(of)]
    for turn in range(1, of + 1):
        measure(kept, "loops", "tuned loop", turn, lambda n: scripted(task, chosen[n], "tuned"))
        measure(kept, "loops", "loop", turn, lambda n: scripted(task, chosen[n]))


def work(kept: Kept, task: Task, of: int) -> None:
    """Eight trials to their end."""
    measure(kept, "work", "ftexp", 1, lambda _: swept(task, POINTS[:8]))
    measure(kept, "work", "ftexp packed", 1, lambda _: swept(task, POINTS[:8], *PACKED))
    measure(kept, "work", "ftexp two workers, packed", 1, lambda _: swept(task, POINTS[:8], *BESIDE))
    loops(kept, task, of)


def answer(kept: Kept, task: Task, of: int) -> None:
    """The best of sixteen trials: by ways that stop some, and all to their end, to know which is best."""
    for way, more in PRUNED.items():
        measure(kept, "answer", way, 1, lambda _, more=more: swept(task, POINTS, *more))
    measure(kept, "answer", "ftexp packed", 1, lambda _: swept(task, POINTS, *PACKED))
    loops(kept, task, of)


def memory(kept: Kept, task: Task) -> None:
    """Twenty short trials in one process: is the twentieth's peak the first's?"""
    points = [{**POINTS[0], "neftune": n / 10} for n in range(20)]
    few = replace(task, steps=2)
    measure(kept, "memory", "ftexp", 1, lambda _: swept(few, points, "eval=loss", every=0))


def ratios(kept: Kept, task: Task) -> list[tuple[str, float, float, float, str]]:
    """Sum up: what is compared, its ratio with the lowest and highest that was measured, and how it was come by."""
    found: list[tuple[str, float, float, float, str]] = []
    ways = kept.get("one", {})
    for clock in ("wall", "cpu"):
        for other in ("tuned loop", "loop"):
            pairs = list(zip(ways.get("ftexp", []), ways.get(other, []), strict=False))
            if pairs:
                all_of = [a[clock] / b[clock] for a, b in pairs]
                found.append((f"one trial: ftexp / {other}, {clock}", median(all_of), min(all_of), max(all_of),
                              f"median of {len(pairs)} in turn; formats {pairs[0][0]['dtype']} and {pairs[0][1]['dtype']}"))  # fmt: skip
    for part, count, ours in (
        ("work", 8, "ftexp"), ("work", 8, "ftexp packed"), ("work", 8, "ftexp two workers, packed"),
        *(("answer", 16, way) for way in PRUNED), ("answer", 16, "ftexp packed"),
    ):  # fmt: skip
        ways = kept.get(part, {}) | kept.get("loops", {})
        for clock in ("wall", "cpu"):
            for other in ("loop", "tuned loop"):
                if ways.get(ours) and ways.get(other):
                    single, base = [t[clock] for t in ways[other]], ways[ours][0][clock]
                    how = f"{len(single)} of {count} trials of the loop measured, their mean taken for the others"
                    spread = [count * s / base for s in (mean(single), min(single), max(single))]
                    found.append((f"{count} trials: {other} / {ours}, {clock}", *spread, how))
    for way, tuned in ((way, kept.get("loops", {}).get("tuned loop")) for way in PRUNED):
        if tuned and (raced := kept.get("answer", {}).get(way)):
            found.append(_same_pruner(way, raced[0], tuned, task.steps))
    return found


def _same_pruner(
    way: str, raced: dict[str, Any], tuned: list[dict[str, Any]], steps: int
) -> tuple[str, float, float, float, str]:
    """Price the tuned loop with a sweep's stops: as many steps and held-out losses, no completions of who stopped."""
    totals = []
    for trial in tuned:
        at = trial["seconds"]
        fixed, step, rung = at["load"] + at["base"] + at["make"], at["steps"] / steps, at["rungs"] / (steps // EVERY)
        counts = zip(raced["steps"], raced["rungs"], strict=True)
        totals.append(sum(fixed + step * s + rung * r + (at["after"] if s == steps else 0.0) for s, r in counts))
    told = [total / raced["wall"] for total in (mean(totals), min(totals), max(totals))]
    how = "computed: each stop where the sweep had it, seconds of the tuned trials measured"
    return (f"16 trials: tuned loop, same pruner / {way}, wall", *told, how)


def show(kept: Kept, task: Task) -> None:
    """Print the ratios and draw them."""
    told = kept["machine"]
    print(f"{told['cpu']}, {told['cores']} cores, OMP_NUM_THREADS {told['threads']}, torch {told['torch']}, "
          f"trl {told['trl']}; {task.steps} steps of {task.batch} rows, held-out loss every {EVERY}, {task.valid} completions")  # fmt: skip
    found = ratios(kept, task)
    for name, value, low, high, how in found:
        print(f"{name:56} {value:6.2f}  ({low:.2f} to {high:.2f})  {how}")
    loads = [m["load"] for ways in kept.values() for way in _lists(ways) for m in way if "load" in m]
    if loads:
        print(f"other work on the machine: load {min(loads):.1f} to {max(loads):.1f} where each measurement began")
    whole = kept.get("answer", {})
    if whole.get("ftexp packed"):
        full = min(whole["ftexp packed"][0]["losses"])
        for way in (way for way in PRUNED if whole.get(way)):
            best = min(v for v in whole[way][0]["losses"] if v is not None)
            share = sum(whole[way][0]["steps"]) / (16 * task.steps)
            print(f"{way}: winner's loss {best:.4f}, best of the full sweep {full:.4f} ({best - full:+.4f} nats), "
                  f"{share:.0%} of the steps taken")  # fmt: skip
    if kept.get("memory", {}).get("ftexp"):
        peaks = kept["memory"]["ftexp"][0]["memory"]
        print(
            f"peak of 20 trials in one process, GiB: first {peaks[0]:.3f}, tenth {peaks[9]:.3f}, last {peaks[-1]:.3f}"
        )
    if found:
        drawn = svg.ladder([(f"{n}", v, low, high, "plain") for n, v, low, high, _ in found], "ratio", "Ratios")
        plot = FOLDER / f"loop-{task.name}.svg"
        plot.write_text(drawn.replace(">", f"><style>{style.LIGHT}{style.PLOT}</style>", 1), encoding="utf-8")
        print(f"kept in {FOLDER}/loop-{task.name}.json, drawn in {plot}")


def _lists(ways: Any) -> list[list[dict[str, Any]]]:
    return [way for way in ways.values() if isinstance(way, list)] if isinstance(ways, dict) else []


def main() -> None:
    """Measure what is missing of the parts asked for, then show everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["one", "work", "answer", "memory", "show"], default=[])
    parser.add_argument("--rounds", type=int, default=3, help="times each way of `one` is measured")
    parser.add_argument("--of", type=int, default=3, help="trials of a loop that are measured")
    parser.add_argument("--task", choices=list(TASKS), default="demo", help="what a trial does")
    args = parser.parse_args()
    task = TASKS[args.task]
    config.register()
    parts = args.parts or ["one", "work", "answer", "memory"]
    kept = read_json(FOLDER / f"loop-{task.name}.json") or {"task": task.name}
    kept.setdefault("machine", machine())
    ways = {"one": lambda: one(kept, task, args.rounds), "work": lambda: work(kept, task, args.of),
            "answer": lambda: answer(kept, task, args.of), "memory": lambda: memory(kept, task),
            "show": lambda: None}  # fmt: skip
    for part in parts:
        ways[part]()
    show(kept, task)


if __name__ == "__main__":
    main()
