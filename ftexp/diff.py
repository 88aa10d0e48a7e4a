"""`python -m ftexp.diff RUN RUN`: what differs between two runs in config, data, environment and scores."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ftexp import board, config, metrics, runs, verb
from ftexp.metrics import METRICS
from ftexp.progress import Sheet
from ftexp.runs import Kept

USAGE = """usage: python -m ftexp.diff RUN RUN [--json]

  RUN     folder or name of a run or trial, or its MLflow id or the beginning of it (8 letters at least)
  --json  one JSON object on stdout
"""


@dataclass(frozen=True)
class Score:
    """One metric of two runs."""

    first: float | None
    second: float | None
    p: float | None
    """Of the paired permutation test over the rows both were scored on; None where there are no such rows."""
    low: float | None
    """Lower end of the 95 % interval of second less first."""
    high: float | None
    """Upper end of it."""
    untested: str | None = None
    """Why the two values are no numbers of one kind, so that neither is better."""


@dataclass(frozen=True)
class Difference:
    """What differs between two runs."""

    config: dict[str, tuple[Any, Any]]
    """Key -> both values."""
    facts: dict[str, tuple[Any, Any]]
    """Rows, template, weights, compute, versions, code."""
    scores: dict[str, Score]
    """Every metric that either has, equal ones too."""
    same_rows: bool
    """Whether both were scored on the same rows."""


def difference(first: Kept, second: Kept) -> Difference:
    """Set two runs side by side."""
    from ftexp import compare

    tables = [compare.read_table(kept.folder / "examples.parquet") for kept in (first, second)]
    a, b = tables
    same = a is not None and b is not None and compare.unlike(first.trial, a, second.trial, b) is None
    names = [n for n in METRICS if any(n in kept.trial.get("scores", {}) for kept in (first, second))]
    one, other = first.trial["config"], second.trial["config"]
    return Difference(
        runs.changed(config.filled(one, other), config.filled(other, one)),
        runs.changed(runs.facts(first), runs.facts(second)),
        {name: _score(name, first, second, tables if same else None) for name in names},
        same,
    )


def _score(name: str, first: Kept, second: Kept, tables: list[Any] | None) -> Score:
    from ftexp import compare
    from ftexp.stats import pairs

    values = [kept.trial.get("scores", {}).get(name) for kept in (first, second)]
    if None not in values and (why := board.other_scale(first.trial, second.trial, name)) is not None:
        return Score(values[0], values[1], None, None, None, why)
    found = [compare.column(t, name) for t in tables or () if name.startswith("valid/")]
    known = [c for c in found if c is not None and math.isfinite(c.value)]
    if len(known) != 2 or not all(v is not None and math.isfinite(v) for v in values) or name == "valid/perplexity":
        return Score(values[0], values[1], None, None, None)
    groups = None if tables is None else compare.units(tables[0])
    [pair] = pairs.compare([[c] for c in known], METRICS[name].direction, groups).pairs
    return Score(values[0], values[1], pair.p, -pair.high, -pair.low)


def show(difference: Difference, names: list[str]) -> None:
    """Print what differs."""
    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
    for title, changes in (("config", difference.config), ("facts", difference.facts)):
        if not changes:
            console.print(f"{title}: no difference")
            continue
        table = Sheet(title)
        for column in ("key", *names):
            table.column(column)
        for key, (old, new) in changes.items():
            table.row(key, _told(old), _told(new))
        console.print(table)
    table = Sheet("scores")
    for column in ("metric", *names, "second less first", "95 % interval", "p"):
        table.column(column, right=column != "metric")
    for name, score in difference.scores.items():
        if score.first is None or score.second is None:
            table.row(name, _number(score.first), _number(score.second), "", "", "")
            continue
        less = score.second - score.first
        better = score.untested is None and metrics.better(score.second, score.first, METRICS[name].direction)
        change = _number(less) + (" better" if better and math.isfinite(less) else "")
        ends = "" if score.low is None else f"{_number(score.low)} to {_number(score.high)}"
        table.row(
            name, _number(score.first), _number(score.second), change, ends, "" if score.p is None else f"{score.p:.2g}"
        )
    console.print(table)
    if not difference.same_rows:
        console.print("not tested: the runs were not scored on the same rows")
    for name, score in difference.scores.items():
        if score.untested is not None:
            console.print(f"{name} not compared: {score.untested}", markup=False)


def _told(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


def _number(value: float | None) -> str:
    if value is None:
        return ""
    value += 0.0  # no minus before a zero
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 10_000 or not math.isfinite(value) else f"{value:.4g}"


def main() -> int:
    """Run the command line; return the exit code."""
    words = [word for word in sys.argv[1:] if word != "--json"]
    if len(words) != 2 or any(word.startswith("-") for word in words):
        asked = words in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr, end="")
        return 0 if asked else 2
    return verb.ended(lambda: _main(words, "--json" in sys.argv[1:]))


def _main(words: list[str], plain: bool) -> int:
    first, second = (runs.find(word) for word in words)
    told = difference(first, second)
    if plain:
        print(verb.as_json({**vars(told), "scores": {name: vars(score) for name, score in told.scores.items()}}))
    else:
        show(told, [first.name, second.name] if first.name != second.name else [str(k.folder) for k in (first, second)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
