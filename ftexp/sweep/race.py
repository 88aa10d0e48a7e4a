"""The pruner `sweep.pruner=race`: each trial keeps its held-out rows at each rung, and is judged by the others'.

The rows lie in the trials' folders, so workers of any machine see what the others have recorded. What counts is
`ftexp.stats.racing`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftexp import board, config, experiment, model
from ftexp.config import Run, require
from ftexp.data import prompts
from ftexp.errors import ConfigError, DataError
from ftexp.files import read_json, write_json
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import Options
from ftexp.train.control import Recorded

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from ftexp.stats.columns import Column
    from ftexp.train.control import Judge, Rung

FOLDER = "rungs"
OBJECTIVES = ("valid/loss", "valid/perplexity")
"""Objectives in whose order the rows' losses stand."""


@dataclass(frozen=True)
class Rule:
    """Keys of `sweep.pruner_args`."""

    alpha: float = 0.05
    """Share of all sweeps that may stop the trial that is truly best at a rung."""
    warm_up: int = 0
    """Rungs at which nothing is stopped."""
    spared: float = 0.2
    """Share of a trial's steps before which nothing is stopped: early on, curves still cross."""
    min_rows: int = 24
    """Held-out rows that are enough for a test; a sweep with fewer is refused."""

    def __post_init__(self) -> None:
        numbers = (isinstance(v, int | float) and not isinstance(v, bool) for v in vars(self).values())
        require(all(numbers), "sweep.pruner_args", vars(self), "numbers")
        require(0 < self.alpha < 1, "sweep.pruner_args.alpha", self.alpha, "above 0 and below 1")
        require(self.warm_up >= 0, "sweep.pruner_args.warm_up", self.warm_up, "at least 0")
        require(0 <= self.spared < 1, "sweep.pruner_args.spared", self.spared, "at least 0 and below 1")
        require(self.min_rows >= 2, "sweep.pruner_args.min_rows", self.min_rows, "at least 2")


def rule(options: Options) -> Rule:
    """Read the pruner's keys.

    Raises:
        ConfigError: a key is unknown or out of range.
    """
    unknown = sorted({*options.pruner_args} - {*Rule.__dataclass_fields__})
    if unknown:
        raise ConfigError(
            f"sweep.pruner_args.{unknown[0]} is not known to sweep.pruner=race, "
            f"which takes {', '.join(Rule.__dataclass_fields__)}"
        )
    return Rule(**options.pruner_args)


def check(options: Options, searched: list[str], objectives: list[str], rows: int) -> None:
    """Refuse a sweep that cannot be raced.

    Args:
        options: of the sweep.
        searched: keys that differ between trials.
        objectives: of the sweep.
        rows: held-out rows, those of one prompt or group counted once.

    Raises:
        ConfigError: trials are not ranked by their loss, or not scored on the same rows, or on too few.
    """
    least = rule(options).min_rows
    if objectives[0] not in OBJECTIVES:
        raise ConfigError(f"sweep.pruner=race needs objectives=[valid/loss], got {objectives[0]}: it tests losses")
    own = next((key for key in searched if key == "data" or key.startswith("data.")), None)
    if own is not None:
        raise ConfigError(f"sweep.pruner=race needs the same held-out rows in all trials, so {own} must be one value")
    if rows < least:
        raise ConfigError(
            f"sweep.pruner=race needs at least {least} independent held-out rows (sweep.pruner_args.min_rows), "
            f"got {rows}"
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


def judge(sweep: Frozen, trial: Trial, every: int) -> Judge:
    """Return what a trial asks at each rung.

    Args:
        sweep: the trial's.
        trial: the judged one.
        every: steps between its rungs.
    """
    from ftexp.sweep import study

    how, number = rule(sweep.options), study.ticket(trial._cached_frozen_trial)

    def record(rung: Rung, step: int) -> None:
        trial.report(rung.loss, step)
        if rung.nats:  # else it was passed before a kill, and its rows are kept already
            keep(sweep.folder / str(number), rung, step)

    def ask(rung: Rung, step: int) -> str | None:
        from ftexp.stats import racing

        if not rung.nats:
            return None
        mine, place = _column(rung.nats, rung.counts), step // every - _spared(sweep.folder / str(number), how, every)
        rivals = list(others(sweep, study.counted(trial.study), number, step))
        if place < 1 or not rivals:
            return None
        other, best = min(rivals, key=lambda pair: (pair[1].value, pair[0]))
        if len(best.num) != len(mine.num):
            raise DataError(f"trial {other} was scored on {len(best.num)} rows, this one on {len(mine.num)}")
        p = racing.behind(mine, best, rung.units or None)
        if p >= racing.level(how.alpha, place, len(study.counted(trial.study))):
            return None
        return f"pruned at step {step}: valid/loss {rung.loss:.4f}, trial {other} had {best.value:.4f} (p {p:.1e})"

    return Recorded(record, ask)


def _spared(folder: Path, how: Rule, every: int) -> int:
    """Count the rungs of the trial in a folder at which nothing is stopped."""
    steps = (read_json(folder / "trial.json") or {}).get("steps", 0)  # stands there before the first one
    return max(how.warm_up, math.ceil(round(how.spared * steps / every, 9)) - 1)


def keep(folder: Path, rung: Rung, step: int) -> None:
    """Write the rows of a rung into the trial's folder."""
    write_json(folder / FOLDER / f"{step}.json", {"nats": list(rung.nats), "counts": list(rung.counts)})


def others(sweep: Frozen, trials: list[FrozenTrial], number: int, step: int) -> Iterator[tuple[int, Column]]:
    """Yield the other trials that have passed a step, with their rows there.

    One that failed or diverged is no rival. Where the sweep bounds metrics, neither is one that broke a bound or may
    still do so.
    """
    from ftexp.sweep import study

    for other in trials:
        if study.ticket(other) == number or other.user_attrs.get("ftexp:kind") or other.state.name == "FAIL":
            continue
        at_most = sweep.options.at_most
        if at_most and not (other.state.name == "COMPLETE" and study.within(other, at_most, sweep.folder)):
            continue
        kept = read_json(sweep.folder / str(study.ticket(other)) / FOLDER / f"{step}.json")
        if kept is not None:
            yield study.ticket(other), _column(kept["nats"], kept["counts"])


def _column(nats: Any, counts: Any) -> Column:
    from ftexp.stats.columns import ratio

    return ratio(nats, counts)
