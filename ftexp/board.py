"""The points of a sweep, or of a single run, in order of merit, as every report shows them; from its files alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftexp import metrics
from ftexp.errors import ConfigError, Damaged, MachineError
from ftexp.files import read_sweep, read_trial
from ftexp.metrics import METRICS, Direction

SCORES = {  # column title -> metric without its split, format
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "exact match": ("exact_match", ".3f"),
    "Jaccard": ("jaccard", ".3f"),
    "F1": ("f1", ".3f"),
    "labels F1": ("f1_macro", ".3f"),
    "ROC-AUC": ("roc_auc_macro", ".3f"),
    "accuracy": ("accuracy", ".3f"),
    "margin": ("margin", ".3f"),
    "reward": ("reward", ".3f"),
    "win rate": ("win_rate", ".3f"),
    "KL": ("kl", ".4f"),
}
COSTS = {"cost/trainable", "cost/seconds", "cost/memory_gib", "cost/gpu_memory_gib"}
"""Metrics with columns of their own."""
BLIND = ("grid", "random", "qmc")
"""Samplers that draw points without a look at any score, `sweep.options.DRAWN`."""


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
    within: bool
    """Whether it is complete and every trial keeps the bounds of `sweep.at_most`; only then can it be the best."""

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
    objectives: tuple[str, ...]
    """All that the sweep wants better, `objective` first; each has a column."""
    best: int | None
    """Index of the best point within the bounds of `sweep.at_most`; None where none is complete, or `unlike` tells."""
    absent: int = 0
    """Trials of the sweep that have not begun."""
    unlike: str | None = None
    """Why scores of points within the bounds are of different kinds or of other rows, so that none is the best."""
    asked: str | None = None
    """What the sweep itself ranks by, where the reader chose another metric."""
    own: str | None = None
    """Names the function of one's own that ranks, as `scores.py:number`."""
    sampler: str = "grid"
    """What chose the sweep's points."""
    size: int = 1
    """Runs of a point, which differ in the seed alone: `sweep.replicates`."""

    @property
    def seeds(self) -> list[int]:
        """The first seed of each point, each once: several where a key or an option that was searched sets it."""
        told = ((trial["number"], trial.get("config", {}).get("seed")) for trial in self.trials)
        return sorted({seed - number % self.size for number, seed in told if seed is not None})

    @property
    def ranking(self) -> str:
        """What ranks, in full."""
        return self.objective if self.own is None else f"{self.objective}, {self.own}"

    def line(self) -> str:
        """Tell that the ranking is not of the whole sweep, or not its own; empty where it is both."""
        whole, told = len(self.trials) + self.absent, []
        if self.absent:
            told.append(f"{self.absent} of {whole} trials have not begun: this is a ranking of the others.")
        if self.asked is not None:
            drawn = "" if self.sampler in BLIND else f", by which {self.sampler} drew its points"
            told.append(f"Ranked by {self.ranking}, chosen afterwards; the sweep's own is {self.asked}{drawn}.")
            if pruned := sum(trial.get("state") == "pruned" for trial in self.trials):
                trials = "1 trial was" if pruned == 1 else f"{pruned} trials were"
                told.append(f"{trials} stopped early by the held-out loss.")
        return " ".join(told)

    @property
    def first(self) -> Point | None:
        """The point that scores best, bounds or not: the first row of the leaderboard."""
        values = [point.scores[self.objective] if point.complete else None for point in self.points]
        found = metrics.best(values, METRICS[self.objective].direction)
        return None if found is None else self.points[found]


def tokenizers_differ(*trials: dict[str, Any]) -> bool:
    """Whether trials count other tokens; where older versions kept no hash of the tokenizer, the model tells."""
    told = {t.get("facts", {}).get("tokenizer_sha256") for t in trials}
    if None in told:
        told = {tuple(t.get("config", {}).get(f"model.{key}") for key in ("kind", "path")) for t in trials}
    return len(told) > 1


SCALED = ("loss", "perplexity", "margin")
"""Scores that mean something else with another method of training."""
BY_BETA = {"dpo": ("loss", "margin"), "rloo": ("loss",)}
"""Method -> its scores that grow with `trainer.beta`."""
BY_TOKEN = ("perplexity", "chosen_loss", "kl", "length")
"""Scores that are means over tokens, or a number of them; so is the loss of supervised training."""
LEARNED = {"trainer.loss": "nll", "trainer.loss_strength": None, "trainer.loss_sha256": ""}
"""Keys that say what is learned from a token, and their defaults, which runs of before them had."""
PARTS = "on other parts of the rows: data.long=cut leaves more of them at a larger data.max_length"
TOKENS = "over other supervised tokens, as another chat template has: objectives=[valid/bits_per_byte] compares them"


def other_scale(trial: dict[str, Any], other: dict[str, Any], objective: str) -> str | None:
    """Tell why an objective of two trials is no number of one kind; None where it is.

    What holds of a score on held-out rows holds of a rival's, of that on sealed rows, and of the last step's loss.
    """
    (split, name), config, its = objective.split("/"), trial.get("config", {}), other.get("config", {})
    kind, general = config.get("trainer.kind", "sft"), split == "forgetting"
    texts = {t.get("facts", {}).get("general_sha256") for t in (trial, other)}
    if general and len(texts) > 1:
        return "on other general text"
    by_token = general or name in BY_TOKEN or (name == "loss" and kind == "sft")
    if by_token and tokenizers_differ(trial, other):
        advice = ": objectives=[valid/bits_per_byte] compares them" if kind == "sft" and not general else ""
        return f"in tokens of different tokenizers{advice}"
    if general:
        return None
    if name in SCALED and its.get("trainer.kind", "sft") != kind:
        return f"by different trainer.kind, whose {objective} is of another kind"
    if objective == "train/loss" and any(
        config.get(key, usual) != its.get(key, usual) for key, usual in LEARNED.items()
    ):
        return "with different trainer.loss, whose unit train/loss has: objectives=[valid/loss] compares them"
    if name in BY_BETA.get(kind, ()) and its.get("trainer.beta") != config.get("trainer.beta"):
        better = "valid/reward" if kind == "rloo" else "valid/accuracy"
        return f"with different trainer.beta, which {objective} grows with: objectives=[{better}] compares them"
    return None


def _held_out(trial: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """Return digest and number of the held-out rows of a trial; empty where it does not note them."""
    return tuple((s["sha256"], s["rows"]) for s in trial.get("inputs", ()) if s["context"] == "validation")


def _other_rows(trial: dict[str, Any], other: dict[str, Any], name: str) -> str | None:
    """Tell how the held-out rows of two trials are apart, of those that note them, or what a score is a mean over."""
    first, second = _held_out(trial), _held_out(other)
    if first and second and first != second:
        return "on other rows"
    if tokenizers_differ(trial, other):
        return None
    both = [t.get("scores", {}) for t in (trial, other)]
    cut, tokens = ({scores.get(key) for scores in both} for key in ("valid/tokens_cut", "valid/tokens"))
    if len(cut) > 1 and None not in cut:
        return PARTS
    counts = name in ("loss", "perplexity") and trial.get("config", {}).get("trainer.kind", "sft") == "sft"
    return TOKENS if counts and len(tokens) > 1 and None not in tokens else None


def _compared(trial: dict[str, Any], objective: str) -> tuple[Any, ...]:
    """Return all that `other_scale` and `_other_rows` read of a trial for an objective: equals are alike."""
    (split, name), config, noted = objective.split("/"), trial.get("config", {}), trial.get("facts", {})
    kind, scores = config.get("trainer.kind", "sft"), trial.get("scores", {})
    told = [kind, noted.get("tokenizer_sha256"), *(config.get(f"model.{key}") for key in ("kind", "path"))]
    if split == "forgetting":
        told.append(noted.get("general_sha256"))
    if objective == "train/loss":
        told += [config.get(key, usual) for key, usual in LEARNED.items()]
    if name in BY_BETA.get(kind, ()):
        told.append(config.get("trainer.beta"))
    if split == "valid":
        told.append(_held_out(trial))
        told += [scores.get("valid/tokens_cut"), scores.get("valid/tokens") if name in ("loss", "perplexity") else None]
    return tuple(told)


class Kinds:
    """Trials of an objective, of those alike in all that counts the first: each new one is compared with these alone.

    An older trial that notes less is like two that are unlike each other, so the first of all is not enough.
    """

    def __init__(self, objective: str) -> None:
        self.objective = objective
        self.kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        """What counts of a trial -> the first one of it."""

    def add(self, trial: dict[str, Any]) -> str | None:
        """Take a trial up; tell why its objective is of another kind, or of other rows, than that of one before."""
        key = _compared(trial, self.objective)
        if key in self.kept:
            return None
        for other in self.kept.values():
            how = other_scale(other, trial, self.objective)
            if how is None and self.objective.startswith("valid/"):
                how = _other_rows(other, trial, self.objective.removeprefix("valid/"))
            if how is not None:
                return f"trials {other['number']} and {trial['number']} were scored {how}"
        self.kept[key] = trial
        return None


def unlike(trials: Sequence[dict[str, Any]], objective: str) -> str | None:
    """Tell why an objective of trials is of different kinds, or of other rows; None where they can be ranked."""
    kinds = Kinds(objective)
    return next((why for trial in trials if (why := kinds.add(trial)) is not None), None)


Scores = Callable[[Path], dict[str, float]]
"""Scores that a trial's folder holds and its `trial.json` does not."""


def read(folder: Path, by: str | None = None, own: tuple[str, Scores] | None = None) -> Board:
    """Read a sweep's folder, or a single run's.

    Args:
        folder: of the sweep or the run.
        by: the metric that ranks; None takes the first of its objectives.
        own: name of a function of one's own, and what reads its scores from a trial's folder.

    Raises:
        MachineError: the folder holds neither.
        ConfigError: a complete trial has no score of `by`.
    """
    trials: list[dict[str, Any]]
    sweep = read_sweep(folder)
    if sweep is None and not (folder / "trial.json").exists():
        raise MachineError(f"{folder}: must be the folder of a sweep or a run; there is no sweep.json or trial.json")
    if sweep is None:
        trials = [{"number": 0, **(read_trial(folder) or {})}]
    else:
        there = sorted(int(p.parent.name) for p in folder.glob("[0-9]*/trial.json"))
        trials = [{"number": n, **(read_trial(folder / str(n)) or {})} for n in there]
    config = next((t["config"] for t in trials if "config" in t), {"objectives": ["valid/loss"]})
    objectives = tuple((sweep or config)["objectives"])
    for trial in trials:
        bare = [name for name in objectives if name not in trial.get("scores", {})]  # of a run alone NaN is a score
        trial |= undefined(trial, bare if sweep is None else objectives)
    scored = [trial for trial in trials if trial.get("state") == "complete"]
    if bare := [trial["number"] for trial in scored if "scores" not in trial]:
        raise Damaged(f"{folder}: trial.json of trial {bare[0]} is damaged, it lacks scores; put it back or remove it")
    if own is not None:
        for trial in scored:
            place = folder if sweep is None else folder / str(trial["number"])
            trial["scores"] = {**trial["scores"], **own[1](place)}
    if bare := [trial["number"] for trial in scored if by is not None and by not in trial["scores"]]:
        raise ConfigError(f"--by {by}: trial {bare[0]} has no such score")
    objective, asked = by or objectives[0], objectives[0]
    objectives = (objective, *(name for name in objectives if name != objective))
    options = (sweep or {}).get("options", {})
    size, bounds = options.get("replicates", 1), options.get("at_most", {})
    groups: dict[int, list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(trial["number"] // size, []).append(trial)
    points = [_point(members, size, objective, bounds) for members in groups.values()]
    why = unlike([trial for point in points if point.within for trial in point.trials], objective)
    values = [point.scores[objective] if point.within and why is None else None for point in points]
    absent = max(0, (sweep or {}).get("tickets", 0) - len(trials))
    best = metrics.best(values, METRICS[objective].direction)
    asked = None if objective == asked else asked
    return Board(trials, points, objective, objectives, best, absent, why, asked, own and own[0],
                 options.get("sampler", "grid"), size)  # fmt: skip


def undefined(trial: dict[str, Any], objectives: Iterable[str]) -> dict[str, str]:
    """Return state and error of a trial that was scored, and has no value of an objective; else nothing.

    The sweep's record has it as failed, since no sampler can use it; its other scores are in its folder.
    """
    scores = trial.get("scores", {}) if trial.get("state") == "complete" else {}
    unknown = next((name for name in objectives if math.isnan(scores.get(name, math.nan))), None)
    if unknown is None or not scores:
        return {}
    return {"state": "failed", "error": f"{unknown} {metrics.why_not(unknown, scores)}"}


def _point(trials: list[dict[str, Any]], size: int, objective: str, bounds: dict[str, float]) -> Point:
    if len(trials) < size or any(t["state"] != "complete" for t in trials):
        return Point(trials, False, {}, None, False)
    names = [name for name in trials[0]["scores"] if all(name in t["scores"] for t in trials)]
    means = {name: metrics.mean(name, [t["scores"][name] for t in trials]) for name in names}
    told = [t["scores"][objective] for t in trials]
    off = [score - math.fsum(told) / size for score in told]  # of perplexities, too, around the arithmetic mean
    spread = math.sqrt(math.fsum(d * d for d in off) / (size - 1)) if size > 1 else None
    within = all(t["scores"].get(name, math.inf) <= bound for t in trials for name, bound in bounds.items())
    return Point(trials, True, means, spread, within)


@dataclass(frozen=True)
class Line:
    """A row of the leaderboard, each cell as text."""

    kind: str
    """`base`, `best`, `complete` or `unfinished`."""
    cells: list[str]
    """One for each of `titles`."""
    ends: bool = False
    """Whether it is the last of the base's rows, below which a rule is drawn."""


def titles(board: Board) -> list[str]:
    """Name the columns that this sweep fills; the first two are text, the others numbers."""
    replicated = _replicated(board)
    seeds = ["between seeds"] if replicated else []
    return ["trials" if replicated else "trial", "overrides", "rank", "trainable", *_columns(board), *seeds,
            "seconds", "GiB"]  # fmt: skip


def lines(board: Board) -> list[Line]:
    """Lay the points out best first; those that are not complete stand last, their state beside the overrides.

    Replicates are one row with the means of their scores and the standard deviation of the objective between seeds.
    Above them stands the base model: a row for each set of its scores, where trials differ in model or rows.
    """
    sign = 1 if METRICS[board.objective].direction is Direction.minimize else -1
    done = sorted((p for p in board.points if p.complete), key=lambda p: _rankable(sign * p.scores[board.objective]))
    winner = None if board.best is None else board.points[board.best]
    told = [Line("best" if p is winner else "complete", _cells(board, p, p is winner)) for p in done]
    return [*_bases(board), *told, *(_unfinished(board, p) for p in board.points if not p.complete)]


def _bases(board: Board) -> list[Line]:
    bases: dict[tuple[str, ...], list[str]] = {}
    for point in board.points:
        if point.complete:
            rival = "base" if "base/loss" in point.scores else "tfidf"  # a classifier's base has no head
            shown = _shown(point.scores, rival, _columns(board))
            bases.setdefault((rival, *shown), []).append(point.numbers)
    gap, told = [""] if _replicated(board) else [], []
    for n, ((rival, *cells), numbers) in enumerate(bases.items(), start=1):
        name = rival if len(bases) == 1 else f"{rival} of {','.join(numbers)}"
        told.append(Line("base", [name, "", "", "", *cells, *gap, "", ""], n == len(bases)))
    return told


def _cells(board: Board, point: Point, best: bool) -> list[str]:
    scores = point.scores
    memory = scores.get("cost/gpu_memory_gib", scores["cost/memory_gib"])
    spread = [] if point.spread is None else [metrics.written(point.spread)]
    return [
        f"{point.numbers} best" if best else point.numbers, label(point), _rank(point),
        millions(scores["cost/trainable"]), *_shown(scores, "valid", _columns(board)), *spread,
        f"{scores['cost/seconds']:.0f}", f"{memory:.1f}",
    ]  # fmt: skip


def _rank(point: Point) -> str:
    """Tell the rank; none where base weights were trained without an adapter."""
    told = point.trials[0]["config"]
    return "none" if told.get("lora.variant") == "none" else str(told["lora.r"])


def _unfinished(board: Board, point: Point) -> Line:
    states = Counter(t["state"] for t in point.trials)
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    known = "lora.r" in point.trials[0].get("config", {})  # not of a trial that was never prepared
    state = told if _replicated(board) else point.trials[0]["state"]
    cells = [point.numbers, f"{label(point)} ({state})", _rank(point) if known else ""]
    return Line("unfinished", cells + [""] * (len(titles(board)) - len(cells)))


def _replicated(board: Board) -> bool:
    return any(point.spread is not None for point in board.points)


def _columns(board: Board) -> dict[str, tuple[str, str]]:
    """Title -> metric and format: what trials have of `SCORES`, and each objective that is not among them."""
    found = {
        title: (f"valid/{name}", style) for title, (name, style) in SCORES.items()
        if any(f"valid/{name}" in t.get("scores", {}) for t in board.trials)
    }  # fmt: skip
    there = {name for name, _ in found.values()} | COSTS
    more = {name.removeprefix("valid/").replace("_", " "): (name, ".4f") for name in board.objectives}
    return found | {title: column for title, column in more.items() if column[0] not in there}


def millions(weights: float) -> str:
    """Write a number of weights in one unit, so that a column of them sorts.

    >>> millions(4_884_480), millions(4096)
    ('4.88 M', '0.0041 M')
    """
    return f"{weights / 1e6:.{2 if weights >= 1e5 else 4}f} M"


def point_of(board: Board, trials: tuple[int, ...]) -> Point:
    """Return the point that these trials ran."""
    return next(point for point in board.points if tuple(t["number"] for t in point.trials) == trials)


def label(point: Point) -> str:
    """Name a point by its overrides; its replicates add their seed to them."""
    return point.trials[0]["label"].removesuffix(" seed+0")


def _rankable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _shown(scores: dict[str, float], split: str, columns: dict[str, tuple[str, str]]) -> list[str]:
    """Fill the columns for `valid`, or for `base` or `tfidf`, which have those of `valid/` alone."""
    cells = []
    for name, style in columns.values():
        there = split == "valid" or name.startswith("valid/")
        name = name.replace("valid/", f"{split}/")
        value = scores.get(name) if there else None
        value = math.inf if metrics.overflows(name, scores) else value  # files have null for it
        cells.append("" if value is None else metrics.written(value, style))
    return cells
