"""`python -m ftexp.report <folder>`: the leaderboard of a sweep, or of a single run, from its files alone."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ftexp import metrics
from ftexp.errors import FtexpError, MachineError
from ftexp.files import read_json
from ftexp.metrics import METRICS, Direction

SCORES = {  # column title -> metric without its split, format
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "exact match": ("exact_match", ".3f"),
    "Jaccard": ("jaccard", ".3f"),
    "F1": ("f1", ".3f"),
    "labels F1": ("f1_macro", ".3f"),
    "ROC-AUC": ("roc_auc_macro", ".3f"),
}
WIDTH = 132
"""Columns of the table where the output is not a terminal."""


@dataclass(frozen=True)
class Point:
    """A point of the search space and the trials that ran it, one for each seed."""

    trials: list[dict[str, Any]]
    """Contents of each `trial.json`, `number` added."""
    complete: bool
    """Whether every replicate is; only then can the point be ranked."""
    scores: dict[str, float]
    """Means over the replicates; empty where not complete."""
    spread: float | None
    """Standard deviation of the objective between the replicates (n - 1); None for a single one."""

    @property
    def numbers(self) -> str:
        """The trials, as `3` or `3-5`."""
        first, last = self.trials[0]["number"], self.trials[-1]["number"]
        return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class Board:
    """The trials of a sweep in their order, and which of them is best."""

    trials: list[dict[str, Any]]
    """Contents of each `trial.json`, `number` added."""
    points: list[Point]
    """The same by point: what is ranked."""
    objective: str
    """The metric that ranks."""
    best: int | None
    """Index of the best point; None where none is complete."""


def read(folder: Path) -> Board:
    """Read a sweep's folder, or a single run's.

    Raises:
        MachineError: the folder holds neither.
    """
    sweep = read_json(folder / "sweep.json")
    if sweep is None and not (folder / "trial.json").exists():
        raise MachineError(f"{folder}: must be the folder of a sweep or a run; there is no sweep.json or trial.json")
    if sweep is None:
        trials = [{"number": 0, **(read_json(folder / "trial.json") or {})}]
    else:
        there = sorted(int(p.parent.name) for p in folder.glob("[0-9]*/trial.json"))
        trials = [{"number": n, **(read_json(folder / str(n) / "trial.json") or {})} for n in there]
    config = next((t["config"] for t in trials if "config" in t), {"objectives": ["valid/loss"]})
    objective = (sweep or config)["objectives"][0]
    size = (sweep or {}).get("options", {}).get("replicates", 1)
    groups: dict[int, list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(trial["number"] // size, []).append(trial)
    points = [_point(members, size, objective) for members in groups.values()]
    bounds = (sweep or {}).get("options", {}).get("at_most", {})
    values = [point.scores[objective] if point.complete and _within(point, bounds) else None for point in points]
    return Board(trials, points, objective, metrics.best(values, METRICS[objective].direction))


def _within(point: Point, bounds: dict[str, float]) -> bool:
    """Whether every trial of a point keeps the bounds of `sweep.at_most`."""
    return all(t["scores"].get(name, math.inf) <= bound for t in point.trials for name, bound in bounds.items())


def _point(trials: list[dict[str, Any]], size: int, objective: str) -> Point:
    if len(trials) < size or any(t["state"] != "complete" for t in trials):
        return Point(trials, False, {}, None)
    names = [name for name in trials[0]["scores"] if all(name in t["scores"] for t in trials)]
    means = {name: math.fsum(t["scores"][name] for t in trials) / size for name in names}
    off = [t["scores"][objective] - means[objective] for t in trials]
    spread = math.sqrt(math.fsum(d * d for d in off) / (size - 1)) if size > 1 else None
    return Point(trials, True, means, spread)


def leaderboard(board: Board) -> Table:
    """Lay the points out best first; those that are not complete stand last with their state.

    Replicates are one row with the means of their scores and the standard deviation of the objective between seeds.
    Above them stands the base model: a row for each set of its scores, where trials differ in model or rows.
    """
    replicated = any(point.spread is not None for point in board.points)
    title = f"ranked by {board.objective}" + (", means over seeds" if replicated else "")
    table = Table(title=title, title_justify="left")
    titles = [title for title, (name, _) in SCORES.items() if any(f"valid/{name}" in _scores(t) for t in board.trials)]
    table.add_column("trials" if replicated else "trial")
    table.add_column("overrides")
    for title in ("rank", "trainable", *titles, *(["between seeds"] if replicated else []), "seconds", "GiB"):
        table.add_column(title, justify="right")
    gap = [""] if replicated else []
    done = [point for point in board.points if point.complete]
    bases: dict[tuple[str, ...], list[str]] = {}
    for point in done:
        rival = "base" if "base/loss" in point.scores else "tfidf"  # a classifier's base has no head
        bases.setdefault((rival, *_shown(point.scores, rival, titles)), []).append(point.numbers)
    for n, ((rival, *cells), numbers) in enumerate(bases.items(), start=1):
        name = rival if len(bases) == 1 else f"{rival} of {','.join(numbers)}"
        table.add_row(name, "", "", "", *cells, *gap, "", "", style="dim", end_section=n == len(bases))
    sign = 1 if METRICS[board.objective].direction is Direction.minimize else -1
    winner = None if board.best is None else board.points[board.best]
    for point in sorted(done, key=lambda p: _rankable(sign * p.scores[board.objective])):
        scores, trial = point.scores, point.trials[0]
        memory = scores.get("cost/gpu_memory_gib", scores["cost/memory_gib"])
        name = f"{point.numbers} best" if point is winner else point.numbers
        table.add_row(
            name, _label(point), str(trial["config"]["lora.r"]),
            f"{scores['cost/trainable'] / 1e6:.2f} M", *_shown(scores, "valid", titles),
            *([f"{point.spread:.4f}"] if replicated else []), f"{scores['cost/seconds']:.0f}",
            f"{memory:.1f}", style="bold" if point is winner else "",
        )  # fmt: skip
    for point in board.points:
        if not point.complete:
            states = Counter(t["state"] for t in point.trials)
            told = ", ".join(f"{count} {state}" for state, count in states.items())
            table.add_row(point.numbers, _label(point), told if replicated else point.trials[0]["state"], style="dim")
    return table


def _label(point: Point) -> str:
    """Name a point by its overrides; its replicates add their seed to them."""
    return point.trials[0]["label"].removesuffix(" seed+0")


def _rankable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _scores(trial: dict[str, Any]) -> dict[str, float]:
    return trial.get("scores", {})


def _shown(scores: dict[str, float], split: str, titles: list[str]) -> list[str]:
    values = [(scores.get(f"{split}/{SCORES[title][0]}"), SCORES[title][1]) for title in titles]
    return ["" if value is None else format(value, style) for value, style in values]


def show(folder: Path) -> None:
    """Print the leaderboard, and below it what the ranking is worth."""
    from ftexp import compare  # numpy and scipy, after the command line is checked

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    board = read(folder)
    console.print(leaderboard(board))
    for line in compare.lines(compare.read(folder, board.trials, board.objective)):
        console.print(line, markup=False, highlight=False)
    for trial in board.trials:
        if "error" in trial:
            console.print(f"trial {trial['number']} {trial['state']}: {trial['error']}", markup=False)


def main() -> int:
    """Run the command line; return the exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m ftexp.report FOLDER    (of a sweep or a run, below outputs/)", file=sys.stderr)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    try:
        show(Path(sys.argv[1]))
    except FtexpError as error:
        print(f"ftexp: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
