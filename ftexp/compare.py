"""What a sweep's scores are worth, from its files: which points differ, which is cheapest of the best, and how sure.

A point is what was swept; its replicates differ in the seed alone and count as one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftexp import board as boards
from ftexp import metrics, sealed
from ftexp.errors import Damaged
from ftexp.files import read_sweep
from ftexp.metrics import METRICS, Direction
from ftexp.stats import columns, explain, noise, pairs
from ftexp.stats.columns import Column, Interval

ALPHA = noise.ALPHA
MOST_POINTS = 64
"""Points that are compared, which takes some 3 seconds; of more, the best are."""
RATIOS = {
    "valid/loss": ("nats", "tokens", 1.0),
    "valid/perplexity": ("nats", "tokens", 1.0),
    "valid/bits_per_byte": ("nats", "bytes", math.log(2)),
    "valid/chosen_loss": ("chosen_nats", "chosen_tokens", 1.0),
    "valid/kl": ("kl_nats", "written", 1.0),
}
"""Scores that are nats over something: which, over which, and nats in a unit. Others are means of a column."""
UNITS = ("decisions", "pairs", "completions", "tokens")
"""What a loss may be a mean over; a table of rows has one of these columns."""
COSTS = {"cost/trainable": "weights", "cost/gpu_memory_gib": "GiB", "cost/memory_gib": "GiB"}
"""What "cheapest" goes by: the first in which points differ. Seconds differ by chance and are not among them."""
CHANCE = 1.02
"""Ratio of costs that chance may bring: memory of equal trials differs by 2 %."""


@dataclass(frozen=True)
class Point:
    """One point of a sweep with all its replicates complete."""

    trials: tuple[int, ...]
    """Numbers of its trials."""
    label: str
    """Its overrides."""
    score: Interval
    """The objective with its 95 % interval, mean over the trials."""
    p: float
    """Largest error rate at which it is not told apart from the best; NaN where nothing was tested."""


@dataclass(frozen=True)
class Verdict:
    """What can be said about a sweep's objective."""

    objective: str
    """The metric that ranks."""
    points: tuple[Point, ...]
    """Points that can be compared, in the sweep's order."""
    behind: int
    """Points that score below the best `MOST_POINTS` and are not among `points`."""
    left_out: int
    """Points with a trial that is not complete, not finite or above a bound of `sweep.at_most`."""
    untested: str | None
    """Why there is no test; None where there is one."""
    best: int | None
    """Index of the best point; None where there is none, or where scores are of different kinds."""
    same: tuple[int, ...]
    """Indices of the points that cannot be told from the best, the best included; empty where nothing was tested."""
    cheapest: int | None
    """Index of the cheapest of them, the best where none is cheaper; None where all cost the same, or nothing was
    tested."""
    cost: str | None
    """The metric that says what is cheap."""
    comparison: pairs.Comparison | None
    """All pairs and what was measured about noise; for perplexity in units of loss."""
    detectable: float
    """Smallest difference such a sweep finds in four of five cases, in the unit of `comparison`; NaN where unknown."""
    rows: int
    """Held-out rows; 0 where nothing was tested."""
    importance: dict[str, Interval]
    """Share of each searched key in what sets the best points apart; empty for few points or one key, and without a
    best."""
    front: tuple[str, ...]
    """Labels of the points no other beats in all objectives; empty for one objective."""
    rate: explain.Together | None = None
    """Where alpha and learning rate were both searched: how far their product explains the objective."""
    repeated: int = 0
    """Points that a sampler drew again: they are the first one's bits, and count once."""
    bounded: bool = False
    """Whether the sweep has bounds in `sweep.at_most`."""
    unknown: tuple[int, str] = (0, "")
    """Points among those left out that are complete and whose score is no finite number, and why it is none."""
    groups: int | None = None
    """Groups of rows with one prompt or `data.group_by`, each one unit of the test; None where each row is one."""

    @property
    def units(self) -> int:
        """What the test counts: groups of rows, or rows."""
        return self.rows if self.groups is None else self.groups

    @property
    def alike(self) -> str | None:
        """Say that differences are the same in every row, so that the noise of rows is rounding; None where not."""
        if not self.detectable <= pairs.NOTHING:
            return None
        which = "points" if len(self.points) == 2 else "most pairs of points"
        return f"{which} differ by the same in every row, or not at all"

    @property
    def nothing(self) -> str:
        """Say that there is no point to compare."""
        within = " and within the bounds of sweep.at_most" if self.bounded else ""
        if self.unknown[0]:
            return f"No point that is complete{within} can be ranked, {self.objective} {self.unknown[1]}."
        return f"No point is complete{within}: there is nothing to choose from."


Rows = Callable[[dict[str, list[Any]]], list[float]]
"""Gives each row of a trial's table its score by a function of one's own."""


def read(folder: Path, trials: list[dict[str, Any]], objective: str, own: Rows | None = None) -> Verdict:
    """Compare the trials of a sweep's folder, or show the interval of a single run.

    Args:
        folder: of the sweep or the run.
        trials: contents of each `trial.json`, with its `number`.
        objective: the metric that ranks.
        own: what scores the rows where it is `metrics.OWN`.
    """
    sweep = read_sweep(folder) or {}
    options, direction = sweep.get("options", {}), METRICS[objective].direction
    grouped: dict[int, list[dict[str, Any]]] = {}
    for trial in trials:
        grouped.setdefault(trial["number"] // options.get("replicates", 1), []).append(trial)
    ended = [members for members in grouped.values() if len(members) == options.get("replicates", 1)]
    whole = [members for members in ended if all(_counts(t, objective, options) for t in members)]
    bare = [told for members in ended if (told := _bare(members, objective)) is not None]
    whole, repeated = once(whole, objective)
    ranked = sorted(whole, key=lambda m: _mean(m, objective), reverse=direction is Direction.maximize)[:MOST_POINTS]
    kept = [members for members in whole if any(members is one for one in ranked)]
    means = [_mean(m, objective) for m in kept]
    why = boards.unlike([t for members in whole for t in members], objective)
    found = _columns(folder, kept, objective, not sweep, own) if why is None else Unlike(why)
    found = found if kept else "no point is complete"
    verdict = Verdict(
        objective, tuple(Point(_numbers(m), _label(m), Interval(v, math.nan, math.nan), math.nan)
                         for m, v in zip(kept, means, strict=True)),
        len(whole) - len(kept), len(grouped) - len(whole) - repeated, found if isinstance(found, str) else None,
        metrics.best(means, direction), (), None, None, None, math.nan, 0, _importance(whole, sweep, objective),
        _front(whole, sweep), _rate(whole, sweep, objective), repeated, bool(options.get("at_most")),
        (len(bare), bare[0] if bare else ""),
    )  # fmt: skip
    if isinstance(found, Unlike):
        return replace(verdict, best=None, importance={}, rate=None)
    return verdict if isinstance(found, str) else _tested(verdict, kept, *found)


def once(points: list[list[dict[str, Any]]], objective: str) -> tuple[list[list[dict[str, Any]]], int]:
    """Leave out points of the same config and score as an earlier one; return how many there are."""
    kept: dict[str, list[dict[str, Any]]] = {}
    for members in points:
        told = [(t["config"], t["scores"][objective]) for t in members]
        kept.setdefault(json.dumps(told, sort_keys=True), members)
    return list(kept.values()), len(points) - len(kept)


def _tested(
    verdict: Verdict, kept: list[list[dict[str, Any]]], table: list[list[Column]], groups: list[Any] | None
) -> Verdict:
    """Add what the rows of the points tell."""
    comparison = pairs.compare(table, METRICS[verdict.objective].direction, groups)
    same = pairs.indistinguishable(comparison, None, ALPHA).members
    best = verdict.best if verdict.best in same else comparison.best  # of equals the leaderboard's
    cost = _cost([kept[n] for n in same])
    costs = None if cost is None else [_mean(m, cost) if n in same else math.inf for n, m in enumerate(kept)]
    cheapest = pairs.indistinguishable(comparison, costs, ALPHA).cheapest
    if costs is None or best is None or costs[best] <= CHANCE * costs[cheapest]:
        cheapest = best
    shown = _exp if verdict.objective == "valid/perplexity" else lambda interval: interval
    rows, grouped = len(table[0][0].num), None if groups is None else len(set(groups))
    units, seeds = rows if grouped is None else grouped, len(kept[0])
    return replace(
        verdict,
        points=tuple(
            replace(point, score=shown(score), p=p)
            for point, score, p in zip(verdict.points, comparison.scores, comparison.p_best, strict=True)
        ),
        best=best,
        same=same,
        cheapest=None if cost is None else cheapest,
        cost=cost,
        comparison=_of_all(comparison, len(kept), verdict.behind),
        detectable=noise.detectable(units, comparison.spread, seeds, len(kept), ALPHA) if len(kept) > 1 else math.nan,
        rows=rows,
        groups=grouped,
    )


def _of_all(comparison: pairs.Comparison, kept: int, behind: int) -> pairs.Comparison:
    """Have optimism count the points that were not compared too: the best was the best of them all."""
    if not behind:
        return comparison
    more = noise.expected_maximum(kept + behind) / noise.expected_maximum(kept)
    return replace(comparison, optimism=more * comparison.optimism)


def _mean(members: list[dict[str, Any]], name: str) -> float:
    return metrics.mean(name, [t["scores"][name] for t in members])


def _counts(trial: dict[str, Any], objective: str, options: dict[str, Any]) -> bool:
    """Whether a trial is complete, scored and within the sweep's bounds."""
    if trial["state"] != "complete" or not math.isfinite(trial["scores"].get(objective, math.nan)):
        return False
    return all(trial["scores"].get(name, math.inf) <= bound for name, bound in options.get("at_most", {}).items())


def _bare(members: list[dict[str, Any]], objective: str) -> str | None:
    """Say why the score of complete trials is no finite number; None where it is one, or a trial is not complete."""
    if any(t["state"] != "complete" for t in members):
        return None
    of = (t["scores"] for t in members if not math.isfinite(t["scores"].get(objective, math.nan)))
    return next((metrics.why_not(objective, scores) for scores in of), None)


def _numbers(members: list[dict[str, Any]]) -> tuple[int, ...]:
    return tuple(t["number"] for t in members)


def _label(members: list[dict[str, Any]]) -> str:
    return members[0]["label"].removesuffix(" seed+0")


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(min(v, 700)) for v in (interval.value, interval.low, interval.high)))


def _columns(
    folder: Path, points: list[list[dict[str, Any]]], objective: str, single: bool, own: Rows | None
) -> tuple[list[list[Column]], list[Any] | None] | str:
    """Read the objective row by row, with the group of each row; or say why it cannot be tested."""
    if objective.startswith("cost/"):
        return f"{objective} is one number a trial, not one a row: nothing to test"
    table, first, unit = [], None, None
    for members in points:
        table.append([])
        for trial in members:
            path = (folder if single else folder / str(trial["number"])) / "examples.parquet"
            content = read_table(path)
            if content is None:
                return f"trial {trial['number']} has no {path.name} that can be read"
            found = columns.mean(own(content)) if own is not None else column(content, objective)
            if found is None:
                return f"{path.name} of trial {trial['number']} has no rows of {objective}"
            told = trial["scores"][objective]
            recomputed = math.exp(found.value) if objective == "valid/perplexity" else found.value
            if not math.isclose(recomputed, told, rel_tol=1e-6, abs_tol=1e-9):
                if own is not None:
                    return Unlike(f"trial {trial['number']} got {told:.6g}, then {recomputed:.6g} by the same function")
                return (
                    f"{path.name} of trial {trial['number']} gives {objective} {recomputed:.6g}, trial.json {told:.6g}"
                )
            first, unit = ((trial, content), units(content)) if first is None else (first, unit)
            if (how := unlike(*first, trial, content)) is not None:
                return Unlike(f"trials {first[0]['number']} and {trial['number']} were scored {how}")
            table[-1].append(found)
    return table, unit


class Unlike(str):
    """Why scores of trials are numbers of different kinds, or of different rows."""


def unlike(
    trial: dict[str, Any], content: dict[str, list[Any]], other: dict[str, Any], its: dict[str, list[Any]]
) -> str | None:
    """Tell how the rows of two trials' tables are apart; None where they were scored on the same.

    Text that `data.long=cut` left out counts where both have one tokenizer: another may see the first token of a text.
    """
    if any(content[name] != its[name] for name in ("prompt", "reference")):
        return "on other rows"
    if not boards.tokenizers_differ(trial, other) and content.get("bytes") != its.get("bytes"):
        return boards.PARTS
    return None


def units(content: dict[str, list[Any]]) -> list[Any] | None:
    """Tell the unit of each row of a table; None where each row is one of its own.

    Tables of older versions do not hold it: there rows of one prompt are one, and those without a prompt stand alone.

    >>> units({"unit": [0, 0, 1], "prompt": ["a", "a", "b"]}), units({"prompt": ["", ""]})
    ([0, 0, 1], None)
    """
    named = content.get("unit") or [prompt or n for n, prompt in enumerate(content["prompt"])]
    return named if len(set(named)) < len(named) else None


def read_table(path: Path) -> dict[str, list[Any]] | None:
    """Read an `examples.parquet` as columns; None where there is none, or it is torn.

    Raises:
        Damaged: it lacks a column that every such table has.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        told = pyarrow.parquet.read_table(path).to_pydict()
    except (FileNotFoundError, pyarrow.ArrowInvalid):
        return None
    if lacking := [name for name in ("prompt", "reference") if name not in told]:
        raise Damaged(f"{path}: is damaged, it lacks {', '.join(lacking)}; put it back or remove it")
    return told


def column(content: dict[str, list[Any]], objective: str) -> Column | None:
    """Take the objective's column out of a table of rows; None where the table does not hold it.

    >>> rows = {"nats": [2.0, 0.4], "tokens": [1, 3]}
    >>> column(rows, "valid/loss").value
    0.6
    """
    if objective in RATIOS:
        of, over, nats = RATIOS[objective]
        over = next((u for u in UNITS if u in content), over) if objective == "valid/loss" else over
        if over not in content:
            return None
        found = columns.ratio([n / nats for n in content[of]], content[over])
        return replace(found, least=0.0) if (found.num >= 0).all() else found  # rewards may be in it
    name = objective.removeprefix("valid/")
    least, most = metrics.ends(name)
    return replace(columns.mean(content[name]), least=least, most=most) if name in content else None


def _cost(points: list[list[dict[str, Any]]]) -> str | None:
    """Name the first cost that differs by more than chance moves memory."""
    for name in COSTS:
        known = [t["scores"].get(name) for members in points for t in members]
        if None not in known and max(known) > CHANCE * min(known):
            return name
    return None


def _importance(points: list[list[dict[str, Any]]], sweep: dict[str, Any], objective: str) -> dict[str, Interval]:
    """Importance of the searched keys, choices of whole files among them."""
    keys = [axis["key"].lstrip("+") for axis in sweep.get("axes", [])]
    if len(keys) < 2 or len(points) < explain.FEWEST:
        return {}
    params = {key: [value_of(m[0], key, keys) for m in points] for key in keys}
    return explain.importance(params, [_mean(m, objective) for m in points], METRICS[objective].direction)


def value_of(trial: dict[str, Any], key: str, axes: Sequence[str]) -> Any:
    """Return a searched key's value in a trial: of the config, or of its overrides for a choice of files.

    None where a condition left it out of the search: the config's value there is one that nobody chose. A list or
    mapping, as `lora.targets` has, is given as text.
    """
    others = "|".join(re.escape(axis) for axis in axes)
    told = re.search(rf"(?:^| )\+*{re.escape(key)}=(.*?)(?= \+*(?:{others})=| seed\+\d+$|$)", trial["label"])
    if told is None:
        return None
    found = trial["config"].get(key, told[1])
    return found if isinstance(found, int | float | str) else str(found)


def _rate(points: list[list[dict[str, Any]]], sweep: dict[str, Any], objective: str) -> explain.Together | None:
    """Tell alpha times learning rate from the two apart, where both were searched; in the unit of loss."""
    if not {"lora.alpha", "trainer.lr"} <= {axis["key"] for axis in sweep.get("axes", [])}:
        return None
    keys = [axis["key"].lstrip("+") for axis in sweep["axes"]]
    both = [m for m in points if all(value_of(m[0], key, keys) is not None for key in ("lora.alpha", "trainer.lr"))]
    alpha, lr = ([float(m[0]["config"][key]) for m in both] for key in ("lora.alpha", "trainer.lr"))
    told = [_mean(m, objective) for m in both]
    logs = [math.log(v) if objective == "valid/perplexity" else v for v in told]
    return explain.together(alpha, lr, logs)


LEAST, MARGIN = 0.3, 0.05
"""R2 below which nothing is advised, and a difference of two that says nothing."""


def rate_line(rate: explain.Together) -> str:
    """Tell in one sentence how far alpha times learning rate explains the objective."""
    product, apart, alpha, lr = (max(0.0, v) for v in (rate.product, rate.apart, rate.first, rate.second))
    advice = ""
    if product >= LEAST and product >= max(alpha, lr) + MARGIN and product >= apart - MARGIN:
        advice = " They act through their product: sweep=effective_rate searches one key less."
    return (
        f"alpha and learning rate were both searched: their product predicts {100 * product:.0f} % of the differences "
        f"(R2, each point by the others), the two apart {100 * apart:.0f} %, alpha alone {100 * alpha:.0f} %, learning "
        f"rate alone {100 * lr:.0f} %.{advice}"
    )


def _front(points: list[list[dict[str, Any]]], sweep: dict[str, Any]) -> tuple[str, ...]:
    names = sweep.get("objectives", [])
    trials = [t for members in points for t in members]
    if len(names) < 2 or not all(name in t["scores"] for t in trials for name in names):
        return ()
    if any(boards.unlike(trials, name) for name in names):
        return ()
    on = explain.pareto([[_mean(m, name) for name in names] for m in points], [METRICS[n].direction for n in names])
    return tuple(_label(members) for members, kept in zip(points, on, strict=True) if kept)


def lines(verdict: Verdict) -> list[str]:
    """Tell a verdict in a few plain lines, for below the leaderboard."""
    told = []
    if verdict.best is not None and verdict.untested is None:
        told += _ranking(verdict)
        told += _noise(verdict)
    elif len(verdict.points) > 1:
        told.append(f"not tested: {verdict.untested}")
        if isinstance(verdict.untested, Unlike):
            told.append("So the leaderboard's order is no ranking, and no point is best.")
    if verdict.importance:
        shares = [f"{k} {_percent(i)}" for k, i in verdict.importance.items()]
        told.append(f"What sets the best points apart (share, 95 % interval): {', '.join(shares)}.")
    if verdict.rate is not None:
        told.append(rate_line(verdict.rate))
    if len(verdict.front) > 1:
        told.append(f"On the Pareto front: {'; '.join(verdict.front)}.")
    if verdict.behind:
        told.append(f"Compared are the best {len(verdict.points)} points; {verdict.behind} score below them.")
    if verdict.repeated:
        points = "1 point was" if verdict.repeated == 1 else f"{verdict.repeated} points were"
        told.append(f"{points} drawn again, with the same config and seed: such a point counts once.")
    if verdict.left_out and not verdict.points:
        told.append(verdict.nothing)
    elif verdict.left_out:
        told.append(f"Left out of the comparison: {_left_out(verdict)}.")
    return told


def _left_out(verdict: Verdict) -> str:
    """Say what is not compared, and why."""
    unknown, why = verdict.unknown
    or_bound = " or above a bound" if verdict.bounded else ""
    reasons = ((verdict.left_out - unknown, f"not complete{or_bound}"), (unknown, f"whose {verdict.objective} {why}"))
    return "; ".join(f"{count} point{'s' * (count != 1)}, {reason}" for count, reason in reasons if count)


def _ranking(verdict: Verdict) -> list[str]:
    best = verdict.points[verdict.best or 0]
    name = verdict.objective.split("/")[1].replace("_", " ")
    score = f"{name} {_number(best.score.value)}"
    if math.isfinite(best.score.low):  # some scores have no interval over rows
        score += f", 95 % interval {_number(best.score.low)} to {_number(best.score.high)}"
    runs = f", mean of {len(best.trials)} seeds" if len(best.trials) > 1 else ""
    if len(verdict.points) == 1:
        return [f"{best.label}: {score}{runs}."]
    others = [n for n in verdict.same if n != verdict.best]
    if not others:
        closest = max(p.p for n, p in enumerate(verdict.points) if n != verdict.best)
        told = _p(closest) if closest < 0.001 else f"at most {_p(closest)}"
        rest = f"the {len(verdict.points) - 1} others compared" if verdict.behind else "all others"
        return [f"{best.label} is best ({score}{runs}), told apart from {rest} (p {told})."]
    listed = ", ".join(f"{verdict.points[n].label} (p={_p(verdict.points[n].p)})" for n in others[:8])
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    told = [f"{best.label} is best ({score}{runs}); not told apart from it: {listed}{more}."]
    if verdict.cheapest is not None:
        what = (verdict.cost or "").removeprefix("cost/").replace("_", " ").removesuffix(" gib")
        told.append(f"Cheapest of these {len(verdict.same)} by {what}: {verdict.points[verdict.cheapest].label}.")
    return told


def _noise(verdict: Verdict) -> list[str]:
    comparison = verdict.comparison
    if comparison is None or len(verdict.points) == 1:
        return []
    unit = " nats" if verdict.objective == "valid/perplexity" else ""
    finds = f"too few {'rows' if verdict.groups is None else 'groups'} to tell any difference"
    if verdict.alike is not None:
        finds = f"{verdict.alike}, so that no smallest difference can be told"
    elif not math.isnan(verdict.detectable):
        finds = f"this sweep finds a difference of {_number(verdict.detectable)}{unit} in four of five cases"
    ahead = f"; were all points equal, the best would look {_number(comparison.optimism)}{unit} too good"
    ahead = ahead if comparison.optimism > pairs.NOTHING else ""  # NaN neither
    told = [f"{sealed.counted(verdict.rows, verdict.groups)}: {finds}{ahead}."]
    if comparison.seeds is None:
        told.append("One run a point: p is about these adapters, not about training again (sweep.replicates=3).")
    elif comparison.seeds.sd <= pairs.NOTHING:
        told.append("Between seeds: no difference.")
    else:
        told.append(f"Between seeds: standard deviation {_number(comparison.seeds.sd)}{unit}, 95 % interval "
                    f"{_number(comparison.seeds.low)} to {_number(comparison.seeds.high)}.")  # fmt: skip
    return told + ([line] if (line := noisier(verdict)) else [])


def noisier(verdict: Verdict) -> str:
    """Name the points whose seeds scatter more than those of the others can explain; "" where there are none."""
    numbers = () if verdict.comparison is None else verdict.comparison.noisier
    if not numbers:
        return ""
    listed = "; ".join(verdict.points[n].label for n in numbers)
    which = "it is" if len(numbers) == 1 else "each is"
    return f"Seeds of {listed} scatter more than those of the others: {which} judged by noise of its own."


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.2g}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "<0.001"


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"
