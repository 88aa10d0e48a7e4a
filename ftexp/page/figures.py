"""The drawings of a sweep: held-out curves, cost against quality, and what each searched key did."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftexp import board as boards
from ftexp import compare, sealed
from ftexp.board import Board, Point
from ftexp.compare import Verdict
from ftexp.examples import Example
from ftexp.metrics import METRICS, Direction, written
from ftexp.page import svg
from ftexp.page.svg import Dot, Series, Svg
from ftexp.stats import explain
from ftexp.stats.explain import Bin

FEW = 7
"""So many trials have colours of their own beside the best; of more, all but the best are grey."""
COSTS = {"cost/trainable": "trainable parameters", "cost/seconds": "seconds of training and scoring"}
NOT = "(not searched)"
"""Name of the points at which a condition left a key out of the search."""


@dataclass(frozen=True)
class Sweep:
    """All that a page or a notebook shows of a sweep, or of a single run; `report.gather` reads it."""

    name: str
    """Of its folder."""
    board: Board
    verdict: Verdict
    winner: Point | None
    """The verdict's best point: complete, and within the sweep's bounds."""
    axes: tuple[str, ...]
    """Keys that were searched."""
    curves: Mapping[int, Sequence[tuple[float, int]]]
    """Trial -> its held-out losses as (value, step)."""
    rows: Sequence[Example]
    """Held-out rows of the winner's first trial beside the base."""
    command: tuple[str, ...]
    """Words that run the winner again; empty where they were not kept."""
    openings: Sequence[Mapping[str, Any]] = ()
    """Of the sealed rows by `ftexp confirm`, oldest first."""
    labels: Sequence[Mapping[str, Any]] = ()
    """What the winner's first trial says of each label on the held-out rows; empty where rows have none."""
    sealed_labels: Sequence[Mapping[str, Any]] = ()
    """The same of the confirmed point on the sealed rows, means over its fresh seeds."""

    @property
    def complete(self) -> list[Point]:
        """Points with a finite objective; one that a sampler drew again counts once."""
        name = self.board.objective
        known = [p for p in self.board.points if p.complete and math.isfinite(p.scores[name])]
        kept, _ = compare.once([p.trials for p in known], name)
        return [p for p in known if any(p.trials is one for one in kept)]


def curves(sweep: Sweep) -> Svg | None:
    """Draw the held-out loss of all trials by step; a cross ends a pruned one, a square a failed one."""
    best = _numbers(sweep.winner)
    shown = [t for t in sweep.board.trials if sweep.curves.get(t["number"])]
    if not shown:
        return None
    looks = look(sweep)
    order = {"plain": 0, "failed": 1, "pruned": 2}
    series = [
        Series(
            _told(trial, sweep.curves[trial["number"]]),
            [(float(step), value) for value, step in sweep.curves[trial["number"]]],
            looks[trial["number"]],
            str(trial["number"]) if len(shown) <= FEW + 1 or trial["number"] in best else "",
            {"pruned": "cross", "failed": "square"}.get(trial["state"], ""),
        )
        for trial in sorted(shown, key=lambda t: (t["number"] in best, order.get(looks[t["number"]], 3)))
    ]
    level = next(
        ((f"{s} {written(sweep.winner.scores[f'{s}/loss'])}", sweep.winner.scores[f"{s}/loss"])
         for s in ("base", "tfidf") if f"{s}/loss" in sweep.winner.scores), None,
    ) if sweep.winner else None  # fmt: skip
    return svg.lines(series, "step", "valid/loss", f"Held-out loss of {len(shown)} trials by step", level)


def look(sweep: Sweep) -> dict[int, str]:
    """Choose the look of each trial's curve; it is the same wherever the trial is drawn."""
    best, few = _numbers(sweep.winner), len(sweep.board.trials) <= FEW + 1
    found, used = {}, 0
    for trial in sweep.board.trials:
        number, state = trial["number"], trial["state"]
        if number in best:
            found[number] = "best"
        elif state in ("pruned", "failed", "skipped"):
            found[number] = state
        else:
            used += few
            found[number] = f"s{used}" if few else "plain"
    return found


def _told(trial: dict[str, Any], points: Sequence[tuple[float, int]]) -> str:
    value, step = points[-1]
    state = "" if trial["state"] == "complete" else f", {trial['state']}"
    return f"trial {trial['number']} {trial['label']}: {written(value)} at step {step}{state}"


def _numbers(point: Point | None) -> set[int]:
    return set() if point is None else {t["number"] for t in point.trials}


def against(sweep: Sweep) -> dict[str, str]:
    """Name what the objective is drawn against: costs, and each further objective of the sweep."""
    return COSTS | {name: COSTS.get(name, name) for name in sweep.board.objectives[1:]}


def front(sweep: Sweep, other: str) -> list[Point]:
    """Return the points that none beats in both the objective and another score, the best by that first.

    As on the terminal, a point above a bound of `sweep.at_most` is not on it and beats none, and scores of different
    kinds have no front.
    """
    name, known = sweep.board.objective, [p for p in _known(sweep, other) if p.within]
    trials = [t for p in known for t in p.trials]
    if any(boards.unlike(trials, score) for score in (name, other)):
        return []
    ways = [METRICS[other].direction, METRICS[name].direction]
    on = explain.pareto([[p.scores[other], p.scores[name]] for p in known], ways) if known else []
    found = sorted((p for p, kept in zip(known, on, strict=True) if kept), key=lambda p: p.scores[other])
    return found if METRICS[other].direction is Direction.minimize else found[::-1]


def pareto(sweep: Sweep, other: str) -> Svg | None:
    """Draw the objective against another score, with the front; None where that is the same or the objective itself."""
    name, known = sweep.board.objective, _known(sweep, other)
    if name == other or len({p.scores[other] for p in known}) < 2:
        return None
    on = front(sweep, other)
    marks = []
    for point in sorted(known, key=lambda p: (p is sweep.winner, p in on)):
        kind = "best" if point is sweep.winner else "front" if point in on else "plain"
        told = (
            f"{point.numbers} {boards.label(point)}: {written(point.scores[name])} at {svg.short(point.scores[other])}"
        )
        tag = point.numbers if (kind != "plain" and len(on) <= 12) or len(known) <= FEW + 1 else ""
        marks.append(Dot(told, point.scores[other], point.scores[name], kind, tag))
    steps = [(p.scores[other], p.scores[name]) for p in on]
    what = against(sweep).get(other, other)
    return svg.dots(marks, what, name, f"{name} against {what}, {len(known)} points", steps)


def _known(sweep: Sweep, other: str) -> list[Point]:
    return [p for p in sweep.complete if math.isfinite(p.scores.get(other, math.nan))]


def values(sweep: Sweep, key: str) -> list[Any]:
    """Return a key's value in each complete point; None where a condition left it out of the search."""
    return [compare.value_of(point.trials[0], key, sweep.axes) for point in sweep.complete]


def unlike(sweep: Sweep) -> str | None:
    """Tell why the complete points, above a bound or not, have no mean: scores of different kinds, or of other rows."""
    return boards.unlike([t for p in sweep.complete for t in p.trials], sweep.board.objective)


def effects(sweep: Sweep) -> dict[str, list[Bin]]:
    """Mean objective by value of each searched key, over whatever the other keys were; keys with one value are out.

    Points at which a key is not searched are its last bin, `NOT`. Scores that are `unlike` have no means.
    """
    if unlike(sweep):
        return {}
    scores = [p.scores[sweep.board.objective] for p in sweep.complete]
    found = {}
    for key in sweep.axes:
        told = list(zip(values(sweep, key), scores, strict=True))
        bins = explain.marginal([v for v, _ in told if v is not None], [s for v, s in told if v is not None])
        if len(bins) > 1:
            rest = [s for v, s in told if v is None]
            found[key] = bins + explain.marginal([NOT] * len(rest), rest)
    return found


def spread(sweep: Sweep, key: str) -> Svg | None:
    """Draw the objective against a key of many numbers where it is searched; None for few values or names."""
    name = sweep.board.objective
    known = [(v, p) for v, p in zip(values(sweep, key), sweep.complete, strict=True) if v is not None]
    if len({v for v, _ in known}) <= explain.FEW_VALUES or not all(isinstance(v, int | float) for v, _ in known):
        return None
    marks = [
        Dot(f"{p.numbers} {boards.label(p)}: {written(p.scores[name])}", float(v), p.scores[name],
            "best" if p is sweep.winner else "plain")
        for v, p in sorted(known, key=lambda pair: pair[1] is sweep.winner)
    ]  # fmt: skip
    return svg.dots(marks, key, name, f"{name} against {key}, {len(marks)} points")


def sure(sweep: Sweep, most: int = 20) -> Svg | None:
    """Draw the compared points' scores with their intervals, best first; None where nothing was tested."""
    verdict = sweep.verdict
    if verdict.comparison is None:
        return None
    sign = 1 if METRICS[verdict.objective].direction is Direction.minimize else -1
    order = sorted(range(len(verdict.points)), key=lambda n: sign * verdict.points[n].score.value)[:most]
    looks = {n: "best" if n == verdict.best else "same" if n in verdict.same else "plain" for n in order}
    told = [(n, verdict.points[n]) for n in order]
    rows = [(brief(p.label), p.score.value, p.score.low, p.score.high, looks[n]) for n, p in told]
    return svg.ladder(rows, verdict.objective, f"{verdict.objective} of {len(rows)} points with 95 % intervals")


def ranges(bins: Sequence[Bin], x: str, title: str) -> Svg:
    """Draw the means of bins with their intervals."""
    return svg.ladder([(named(b), b.mean, *b.ends, "plain") for b in bins], x, title)


def named(found: Bin) -> str:
    """Name a bin by its value or its range, and say how many points it holds."""
    low, high = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in (found.low, found.high))
    return f"{low if found.low == found.high else f'{low} to {high}'} ({found.trials})"


def confirmed(sweep: Sweep) -> list[str]:
    """Tell what the last opening of the sealed rows came to; nothing where they are sealed."""
    if not sweep.openings:
        return []
    last, winner = dict(sweep.openings[-1]), sweep.winner
    trials = [] if winner is None else [t["number"] for t in winner.trials]
    moved = None if winner is None else sealed.moved(last, trials, boards.label(winner), sweep.board.ranking)
    return [*sealed.lines(last), *([] if moved is None else [moved])]


def brief(label: str) -> str:
    """Leave the groups out of the overrides of a point, for a drawing.

    >>> brief("lora.r=8 trainer.lr=0.001 lora=dora")
    'r=8 lr=0.001 lora=dora'
    """
    return re.sub(r"(^| )\+?(?:\w+\.)+(?=\w+=)", r"\1", label)
