"""Hydra's override grammar as a search space: fixed overrides, axes, and the points of a grid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from ftexp import config
from ftexp.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Axis:
    """One key that is searched."""

    key: str
    """Dotted key, or a group."""
    texts: tuple[str, ...] = ()
    """The values of a discrete axis as override text, in order, each once."""
    low: float = 0
    """Lower end of a continuous axis."""
    high: float = 0
    """Upper end of a continuous axis, which may be drawn too."""
    whole: bool = False
    """Whether a continuous axis takes whole numbers only."""
    log: bool = False
    """Whether a continuous axis is drawn uniformly in its logarithm."""

    @property
    def discrete(self) -> bool:
        """Whether the axis lists its values."""
        return bool(self.texts)

    def distribution(self) -> BaseDistribution:
        """Return Optuna's form of the axis; a discrete one is over its texts."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.discrete:
            return CategoricalDistribution(self.texts)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Space:
    """A search space."""

    fixed: tuple[str, ...]
    """Overrides shared by all points, as given."""
    axes: tuple[Axis, ...]
    """What is searched, in the order given."""

    def point(self, values: dict[str, Any]) -> list[str]:
        """Return the overrides of a point."""
        return [f"{axis.key}={values[axis.key]}" for axis in self.axes] + list(self.fixed)

    def grid(self) -> list[dict[str, Any]]:
        """List every combination, the last axis varying fastest.

        Raises:
            ConfigError: an axis is a continuous range.
        """
        for axis in self.axes:
            if not axis.discrete:
                raise ConfigError(
                    f"{axis.key}: a grid needs single values, choice() or range(); a continuous range needs "
                    "sweep.sampler=tpe and sweep.n_trials"
                )
        return [
            dict(zip((a.key for a in self.axes), values, strict=True))
            for values in product(*(a.texts for a in self.axes))
        ]

    def told(self) -> dict[str, str]:
        """Describe each axis in a word, for comparison and for people."""
        return {a.key: ",".join(a.texts) if a.discrete else _interval(a) for a in self.axes}


def _interval(axis: Axis) -> str:
    ends = f"interval({axis.low:g}, {axis.high:g})"
    return f"log {ends}" if axis.log else ends


def parse(overrides: Sequence[str]) -> Space:
    """Read overrides as a space; of two for the same key the later one counts.

    >>> parse(["lora.r=8,16,8", "seed=0"]).grid()
    [{'lora.r': '8'}, {'lora.r': '16'}]

    Raises:
        ConfigError: a range is empty or has no logarithm.
    """
    last: dict[str, Override] = {
        o.get_key_element(): o for o in OverridesParser.create().parse_overrides(list(overrides))
    }
    fixed = [str(o.input_line) for o in last.values() if not o.is_sweep_override()]
    axes = [_axis(key, o) for key, o in last.items() if o.is_sweep_override()]
    return Space(tuple(fixed), tuple(axes))


def _axis(key: str, override: Override) -> Axis:
    if override.is_discrete_sweep():
        texts = tuple(dict.fromkeys(override.sweep_string_iterator()))
        if not texts:
            raise ConfigError(f"{override.input_line}: must have at least one value, got none")
        return Axis(key, texts)
    value: Any = override.value()
    low, high, log = value.start, value.end, "log" in value.tags
    if not low < high:
        raise ConfigError(f"{override.input_line}: the lower end must be below the upper, got {low} and {high}")
    if log and low <= 0:
        raise ConfigError(f"{override.input_line}: a log range must be above 0, got {low}")
    whole = (
        config.is_whole(key) or re.search(r"interval\(\s*-?\d+\s*,\s*-?\d+\s*\)", str(override.input_line)) is not None
    )
    return Axis(key, low=low, high=high, whole=whole, log=log)
