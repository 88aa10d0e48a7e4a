"""The pruners `sweep.pruner=race` and `halving`: a trial keeps its held-out rows at each rung, and is judged by them.

The rows lie in the trials' folders, so workers of any machine see what the others have recorded. The test is that of
`ftexp.stats.racing`.

A race stops who is behind the best by more than chance, at a level that holds over the whole sweep. Halving saves more
and promises less: of the trials at a rung it stops those that are not among the better half, as successive halving
does (arXiv:1810.05934), but for those whom a single test of the same rows does not tell from the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp import board, config, experiment, model
from ftexp.config import Run, require
from ftexp.data import prompts
from ftexp.errors import ConfigError, DataError
from ftexp.files import read_json, write_json
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import Options, Pruner
from ftexp.train.control import Recorded

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from ftexp.stats.columns import Column
    from ftexp.train.control import Judge, Rung

FOLDER = "rungs"
OBJECTIVES = ("valid/loss", "valid/perplexity")
"""Objectives in whose order the rows' losses stand."""


@dataclass(frozen=True)
class Stand:
    """A trial at a rung."""

    rows: Column
    """Nats over tokens of its held-out rows."""
    units: Sequence[int] | None
    """Unit of each row."""
    best: Column
    """The same rows by the best rival that has passed the rung."""
    ahead: int
    """Other trials whose loss is lower there."""
    others: int
    """Other trials that have passed it."""
    trials: int
    """Of the sweep."""
    place: int
    """Number of the rung among those that stop trials, from 1."""

    def p(self) -> float:
        """Return the p-value of being behind the best."""
        from ftexp.stats import racing

        return racing.behind(self.rows, self.best, self.units)


@dataclass(frozen=True)
class Race:
    """Keys of `sweep.pruner_args` with `sweep.pruner=race`."""

    alpha: float = 0.05
    """Share of all sweeps that may stop the trial that is truly best at a rung."""
    warm_up: int = 0
    """Rungs at which nothing is stopped."""
    spared: float = 0.2
    """Share of a trial's steps before which nothing is stopped: early on, curves still cross."""
    min_rows: int = 24
    """Held-out rows that are enough for a test; a sweep with fewer is refused."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        require(self.warm_up >= 0, "sweep.pruner_args.warm_up", self.warm_up, "at least 0")
        require(0 <= self.spared < 1, "sweep.pruner_args.spared", self.spared, "at least 0 and below 1")

    def place(self, rung: int, steps: int, every: int) -> int:
        """Number a rung of a trial of so many steps among those that stop trials, from 1; 0 where it stops none."""
        return max(0, rung - self.passed(steps, every))

    def level(self, stand: Stand) -> float:
        """Return the level of the test of a trial at such a rung."""
        from ftexp.stats import racing

        return racing.level(self.alpha, stand.place, stand.trials)

    def passed(self, steps: int, every: int) -> int:
        """Count the rungs of a trial of so many steps at which nothing is stopped."""
        return max(self.warm_up, math.ceil(round(self.spared * steps / every, 9)) - 1)


@dataclass(frozen=True)
class Halving:
    """Keys of `sweep.pruner_args` with `sweep.pruner=halving`."""

    alpha: float = 0.02
    """Level of each test, of one trial against the best of all: of 16 equals some two are stopped at a rung, of 64 some
    18, for the best of many looks better than it is. In twelve replayed sweeps of the bench 0.1 lost the best in four,
    as blind halving did in five, and 0.02 in none, with a tenth more steps."""
    reduction_factor: int = 2
    """One in so many trials goes on from a rung in any case, and the next rung is at so many times the steps."""
    min_rows: int = 24
    """Held-out rows that are enough for a test; a sweep with fewer is refused."""
    every_rung: bool = True
    """Whether held-out rows are scored at rungs that stop nobody too, for the curves; false saves that time."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        whole = isinstance(self.reduction_factor, int) and self.reduction_factor >= 2
        require(whole, "sweep.pruner_args.reduction_factor", self.reduction_factor, "a whole number of at least 2")
        require(isinstance(self.every_rung, bool), "sweep.pruner_args.every_rung", self.every_rung, "true or false")

    def place(self, rung: int, steps: int = 0, every: int = 1) -> int:
        """Number a rung among those that stop trials, from 1; 0 where it stops none.

        >>> [Halving().place(rung) for rung in range(1, 10)]
        [1, 2, 0, 3, 0, 0, 0, 4, 0]
        """
        number = 1
        while rung > 1:
            rung, rest = divmod(rung, self.reduction_factor)
            if rest:
                return 0
            number += 1
        return number if rung == 1 else 0

    def level(self, stand: Stand) -> float:
        """Return the level of the test of a trial at such a rung; 0 where it goes on in any case."""
        kept = max(1, (stand.others + 1) // self.reduction_factor)
        return self.alpha if stand.ahead >= kept else 0.0


RULES: dict[Pruner, type[Race | Halving]] = {Pruner.race: Race, Pruner.halving: Halving}


def _check_numbers(rule: Race | Halving) -> None:
    for key, value in vars(rule).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(number or key == "every_rung", f"sweep.pruner_args.{key}", value, "a number")
    require(0 < rule.alpha < 1, "sweep.pruner_args.alpha", rule.alpha, "above 0 and below 1")
    require(rule.min_rows >= 2, "sweep.pruner_args.min_rows", rule.min_rows, "at least 2")


def rule(options: Options) -> Race | Halving:
    """Read the pruner's keys.

    Raises:
        ConfigError: a key is unknown or out of range.
    """
    made = RULES[options.pruner]
    unknown = sorted({*options.pruner_args} - {*made.__dataclass_fields__})
    if unknown:
        raise ConfigError(
            f"sweep.pruner_args.{unknown[0]} is not known to sweep.pruner={options.pruner.value}, "
            f"which takes {', '.join(made.__dataclass_fields__)}"
        )
    return made(**options.pruner_args)


def check(options: Options, searched: list[str], objectives: list[str], rows: int) -> None:
    """Refuse a sweep whose trials cannot be judged by their rows.

    Args:
        options: of the sweep.
        searched: keys that differ between trials.
        objectives: of the sweep.
        rows: held-out rows, those of one prompt or group counted once.

    Raises:
        ConfigError: trials are not ranked by their loss, or not scored on the same rows, or on too few.
    """
    least, name = rule(options).min_rows, options.pruner.value
    if objectives[0] not in OBJECTIVES:
        raise ConfigError(f"sweep.pruner={name} needs objectives=[valid/loss], got {objectives[0]}: it tests losses")
    own = next((key for key in searched if key == "data" or key.startswith("data.")), None)
    if own is not None:
        raise ConfigError(f"sweep.pruner={name} needs the same held-out rows in all trials, so {own} must be one value")
    if rows < least:
        raise ConfigError(
            f"sweep.pruner={name} needs at least {least} independent held-out rows (sweep.pruner_args.min_rows), "
            f"got {rows}; more of them with data.valid, or add sweep.pruner=asha, which goes by the loss alone"
        )


def check_alike(options: Options, runs: Sequence[Run]) -> None:
    """Refuse to stop trials by losses that are no numbers of one kind, or one seed of a point by that seed's luck.

    What is true of the report's ranking is true of every pruner: each goes by the held-out loss at a rung.

    Raises:
        ConfigError: names the key that has to be one value.
    """
    name = options.pruner.value
    if options.replicates > 1:
        raise ConfigError(
            f"sweep.pruner={name} needs sweep.replicates=1, got {options.replicates}: it would stop a point by the "
            "luck of one seed; ftexp confirm trains the best again on fresh seeds"
        )
    told = [{"config": experiment.identity(run)} for run in runs]
    models = {config.digest(run.model): run.model for run in runs}
    if len(models) > 1:
        digests = {key: prompts.tokenizer_digest(model.tokenizer(each)) for key, each in models.items()}
        for entry, run in zip(told, runs, strict=True):
            entry["facts"] = {"tokenizer_sha256": digests[config.digest(run.model)]}
    for number, other in enumerate(told[1:], 1):
        if (how := board.other_scale(told[0], other, "valid/loss")) is not None:
            raise ConfigError(
                f"sweep.pruner={name} compares valid/loss between trials, and those of points 0 and {number} would be "
                f"scored {how.partition(':')[0]}; add sweep.pruner=none"
            )


def scored(options: Options, every: int) -> Callable[[int], bool] | None:
    """Return what tells of a rung's step whether a trial is scored there; None where it is at each.

    Args:
        options: of the sweep.
        every: steps between rungs.
    """
    how = rule(options)
    return None if isinstance(how, Race) or how.every_rung else lambda step: how.place(step // every) > 0


def judge(sweep: Frozen, trial: Trial, every: int) -> Judge:
    """Return what a trial asks at each rung.

    Args:
        sweep: the trial's.
        trial: the judged one.
        every: steps between its rungs.
    """
    from ftexp.sweep import study

    how, number = rule(sweep.options), study.ticket(trial._cached_frozen_trial)
    folder = sweep.folder / str(number)

    def record(rung: Rung, step: int) -> None:
        trial.report(rung.loss, step)
        if rung.nats:  # else it was passed before a kill, and its rows are kept already
            keep(folder, rung, step)

    def ask(rung: Rung, step: int) -> str | None:
        steps = (read_json(folder / "trial.json") or {}).get("steps", 0)  # stands there before the first one
        place = how.place(step // every, steps, every)
        if not rung.nats or not place:
            return None
        counted = study.counted(trial.study)
        mine, there = _column(rung.nats, rung.counts), list(others(sweep, counted, number, step))
        rivals = [(n, rows) for n, rows, rival in there if rival]
        if not rivals:
            return None
        other, best = min(rivals, key=lambda pair: (pair[1].value, pair[0]))
        if len(best.num) != len(mine.num):
            raise DataError(f"trial {other} was scored on {len(best.num)} rows, this one on {len(mine.num)}")
        ahead = sum(rows.value < mine.value for _, rows, _ in there)
        stand = Stand(mine, rung.units or None, best, ahead, len(there), len(counted), place)
        level = how.level(stand)
        if level == 0.0 or (p := stand.p()) >= level:
            return None
        return f"pruned at step {step}: valid/loss {rung.loss:.4f}, trial {other} had {best.value:.4f} (p {p:.1e})"

    return Recorded(record, ask)


def keep(folder: Path, rung: Rung, step: int) -> None:
    """Write the rows of a rung into the trial's folder."""
    write_json(folder / FOLDER / f"{step}.json", {"nats": list(rung.nats), "counts": list(rung.counts)})


def others(sweep: Frozen, trials: list[FrozenTrial], number: int, step: int) -> Iterator[tuple[int, Column, bool]]:
    """Yield the other trials that have passed a step, with their rows there, and whether they may stop one.

    One that failed or diverged is left out. Where the sweep bounds metrics, one that broke a bound or may still do so
    stops nobody.
    """
    from ftexp.sweep import study

    at_most = sweep.options.at_most
    for other in trials:
        if study.ticket(other) == number or other.user_attrs.get("ftexp:kind") or other.state.name == "FAIL":
            continue
        kept = read_json(sweep.folder / str(study.ticket(other)) / FOLDER / f"{step}.json", "nats", "counts")
        if kept is not None:
            rival = not at_most or (other.state.name == "COMPLETE" and study.within(other, at_most, sweep.folder))
            yield study.ticket(other), _column(kept["nats"], kept["counts"]), rival


def _column(nats: Any, counts: Any) -> Column:
    from ftexp.stats.columns import ratio

    return ratio(nats, counts)
