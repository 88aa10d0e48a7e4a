"""`python -m ftexp.report <folder>`: the leaderboard of a sweep, or of a single run, from its files alone."""

from __future__ import annotations

import math
import sys
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
class Board:
    """The trials of a sweep in their order, and which of them is best."""

    trials: list[dict[str, Any]]
    """Contents of each `trial.json`, `number` added."""
    objective: str
    """The metric that ranks."""
    best: int | None
    """Number of the best complete trial; None where none is complete."""


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
    values = [t["scores"][objective] if t["state"] == "complete" else None for t in trials]
    return Board(trials, objective, metrics.best(values, METRICS[objective].direction))


def leaderboard(board: Board) -> Table:
    """Lay the trials out best first; the others stand last with their state.

    Above them stands the base model: a row for each set of its scores, where trials differ in model or rows.
    """
    table = Table(title=f"ranked by {board.objective}", title_justify="left")
    titles = [title for title, (name, _) in SCORES.items() if any(f"valid/{name}" in _scores(t) for t in board.trials)]
    table.add_column("trial")
    table.add_column("overrides")
    for title in ("rank", "trainable", *titles, "seconds", "GiB"):
        table.add_column(title, justify="right")
    done = [t for t in board.trials if t["state"] == "complete"]
    bases: dict[tuple[str, ...], list[str]] = {}
    for trial in done:
        rival = "base" if "base/loss" in trial["scores"] else "tfidf"  # a classifier's base has no head
        bases.setdefault((rival, *_shown(trial, rival, titles)), []).append(str(trial["number"]))
    for n, ((rival, *cells), numbers) in enumerate(bases.items(), start=1):
        name = rival if len(bases) == 1 else f"{rival} of {','.join(numbers)}"
        table.add_row(name, "", "", "", *cells, "", "", style="dim", end_section=n == len(bases))
    sign = 1 if METRICS[board.objective].direction is Direction.minimize else -1
    for trial in sorted(done, key=lambda t: _rankable(sign * t["scores"][board.objective])):
        scores, best = trial["scores"], trial["number"] == board.best
        memory = scores.get("cost/gpu_memory_gib", scores["cost/memory_gib"])
        table.add_row(
            f"{trial['number']} best" if best else str(trial["number"]), trial["label"], str(trial["config"]["lora.r"]),
            f"{scores['cost/trainable'] / 1e6:.2f} M", *_shown(trial, "valid", titles), f"{scores['cost/seconds']:.0f}",
            f"{memory:.1f}", style="bold" if best else "",
        )  # fmt: skip
    for trial in board.trials:
        if trial["state"] != "complete":
            table.add_row(str(trial["number"]), trial["label"], trial["state"], style="dim")
    return table


def _rankable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _scores(trial: dict[str, Any]) -> dict[str, float]:
    return trial.get("scores", {})


def _shown(trial: dict[str, Any], split: str, titles: list[str]) -> list[str]:
    values = [(trial["scores"].get(f"{split}/{SCORES[title][0]}"), SCORES[title][1]) for title in titles]
    return ["" if value is None else format(value, style) for value, style in values]


def show(folder: Path) -> None:
    """Print the leaderboard."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    board = read(folder)
    console.print(leaderboard(board))
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
