"""Hydra's override grammar as a search space: fixed overrides, axes, and the points of a grid."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString

from ftexp import config, overrides
from ftexp.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


WHOLE = re.compile(r"interval\(\s*-?\d+\s*,\s*-?\d+\s*\)")
"""A range between whole numbers, as written."""
CAST = re.compile(r"=.*\bfloat\(")
"""A cast to `float` in an override."""
ADAPTER, WITHOUT = ("lora", "lora.variant"), ("lora.variant", "lora.train")
"""What decides whether there is an adapter, and keys of `lora` that have an effect without one."""


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
    when: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Axes before this one and the values they must have; elsewhere the key keeps its value of the config."""
    composes: bool = False
    """Whether it chooses files of `conf/`, which only Hydra can put together."""
    sign: str = ""
    """What stands before the key in an override: `++` for keys that exist only once given, as of `trainer.extra`."""

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
        given = [f"{axis.sign}{axis.key}={values[axis.key]}" for axis in self.axes if axis.key in values]
        return given + list(self.fixed)

    def active(self, axis: Axis, values: dict[str, Any]) -> bool:
        """Tell whether an axis is searched where the axes before it have these values."""
        return all(str(values.get(key)) in wanted for key, wanted in axis.when)

    def trimmed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out the keys that are not searched at a point."""
        kept: dict[str, Any] = {}
        for axis in self.axes:
            if self.active(axis, kept):
                kept[axis.key] = values[axis.key]
        return kept

    def baseline(self, given: Any) -> dict[str, Any]:
        """Read a point that is to be tried first: a value for each key that is searched there.

        >>> parse(["lora.r=2,4", "trainer.lr=interval(0.1,0.2)"]).baseline({"lora.r": 4, "trainer.lr": 0.1})
        {'lora.r': '4', 'trainer.lr': 0.1}

        Raises:
            ConfigError: a key is not searched or left out, or a value is outside of its axis.
        """
        told = {str(key): value for key, value in dict(given).items()}
        point: dict[str, Any] = {}
        for axis in self.axes:
            if not self.active(axis, point):
                continue
            if axis.key not in told:
                raise ConfigError(f"sweep.baselines: {axis.key} must have a value in {told}")
            value = told[axis.key]
            found = next(iter(_texts(axis, value)), None)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            within = number and axis.low <= value <= axis.high and (not axis.whole or value == int(value))
            if not (found if axis.discrete else within):
                wanted = ",".join(axis.texts) if axis.discrete else _interval(axis)
                raise ConfigError(f"sweep.baselines: {axis.key} must be among {wanted}, got {value!r}")
            point[axis.key] = found if axis.discrete else value
        if stray := told.keys() - point.keys():
            raise ConfigError(f"sweep.baselines: {', '.join(sorted(stray))} is not searched at {told}")
        return point

    def grid(self) -> list[dict[str, Any]]:
        """List every combination once, the last axis varying fastest.

        Raises:
            ConfigError: an axis is a continuous range.
        """
        for axis in self.axes:
            if not axis.discrete:
                raise ConfigError(
                    f"{axis.key}: a grid needs single values, choice() or range(); a continuous range needs "
                    "sweep.sampler=tpe and sweep.n_trials"
                )
        keys, combinations = [axis.key for axis in self.axes], math.prod(len(a.texts) for a in self.axes)
        if combinations > 1_000_000:
            raise ConfigError(f"the grid must have at most 10000 points, got {combinations} combinations")
        points = (self.trimmed(dict(zip(keys, v, strict=True))) for v in product(*(a.texts for a in self.axes)))
        return [dict(point) for point in dict.fromkeys(tuple(point.items()) for point in points)]

    def told(self) -> dict[str, str]:
        """Describe each axis in a word, for comparison and for people."""
        return {a.key: (",".join(a.texts) if a.discrete else _interval(a)) + _condition(a) for a in self.axes}


def _value(axis: Axis, text: str) -> Any:
    return OverridesParser.create().parse_override(f"{axis.key}={text}").value()


def _meant(key: str, text: str) -> tuple[str, str]:
    """Return the kind and spelling of a value that equal ones share, however they are written.

    >>> _meant("trainer.lr", "1e-3") == _meant("trainer.lr", "0.001"), _meant("seed", "1") == _meant("seed", "1.0")
    (True, False)
    """
    value = _value(Axis(key), text)
    value = value.text if isinstance(value, QuotedString) else value
    if config.is_real(key) and type(value) is int:
        value = float(value)
    return type(value).__name__, repr(value + 0.0 if type(value) is float else value)  # there is no -0.0 beside 0.0


def _texts(axis: Axis, value: Any) -> list[str]:
    """List the texts of a discrete axis that stand for a value."""
    return [text for text in axis.texts if text == str(value) or _value(axis, text) == value]


def _interval(axis: Axis) -> str:
    ends = f"interval({axis.low:g}, {axis.high:g})"
    return f"log {ends}" if axis.log else ends


def _condition(axis: Axis) -> str:
    told = " and ".join(f"{key} is {'|'.join(wanted)}" for key, wanted in axis.when)
    return f" when {told}" if told else ""


def parse(given: Sequence[str], conditions: dict[str, dict[str, Any]] | None = None) -> Space:
    """Read overrides as a space; of two for the same key the later one counts.

    Args:
        given: overrides in Hydra's grammar.
        conditions: key -> the axes its own axis depends on, each with the value or values it must have.

    >>> parse(["lora.r=8,16,8", "seed=0"]).grid()
    [{'lora.r': '8'}, {'lora.r': '16'}]
    >>> parse(["lora=default,dora", "lora.r=2,4"], {"lora.r": {"lora": "dora"}}).grid()
    [{'lora': 'default'}, {'lora': 'dora', 'lora.r': '2'}, {'lora': 'dora', 'lora.r': '4'}]
    >>> parse(["lora.r=2,4", "lora=none,dora"]).grid()  # there is no rank without an adapter
    [{'lora': 'none'}, {'lora': 'dora', 'lora.r': '2'}, {'lora': 'dora', 'lora.r': '4'}]

    Raises:
        ConfigError: a range is empty or has no logarithm, or a condition names no axis before its own.
    """
    told = OverridesParser.create().parse_overrides(list(given))
    last: dict[str, Override] = {o.get_key_element().lstrip("+"): o for o in told}
    last, conditions = _with_adapter(last, conditions or {})
    fixed = [str(o.input_line) for o in last.values() if not o.is_sweep_override()]
    axes: list[Axis] = []
    never: set[str] = set()
    for key, override in last.items():
        if override.is_sweep_override():
            condition = conditions.get(key, {})
            _check_fixed(key, condition, told, last)
            if not all(other not in never and _holds(last.get(other), given) for other, given in condition.items()):
                never.add(key)
                continue
            ruled = {other for other in condition if other in last and not last[other].is_sweep_override()}
            when = _when(key, {o: given for o, given in condition.items() if o not in ruled}, axes)
            element = override.get_key_element()
            sign, group = element.removesuffix(element.lstrip("+")), key.split("@")[0] in overrides.groups()
            axes.append(replace(_axis(key, override), when=when, composes=group, sign=sign))
    return Space(tuple(fixed), tuple(axes))


def _with_adapter(
    last: dict[str, Override], conditions: dict[str, dict[str, Any]]
) -> tuple[dict[str, Override], dict[str, dict[str, Any]]]:
    """Search keys of an adapter only where there is one: without it trials that differ in them would be the same.

    What decides it is searched before them, wherever it was given.
    """
    kinds = (k for k in ADAPTER if k in last and last[k].is_discrete_sweep())
    if (kind := next(kinds, None)) is None:
        return last, conditions
    texts = list(dict.fromkeys(last[kind].sweep_string_iterator()))
    theirs = [key for key in last if key.startswith("lora.") and key not in WITHOUT and last[key].is_sweep_override()]
    others = [text for text in texts if text != "none"]
    if not theirs or not others or len(others) == len(texts):
        return last, conditions
    late = list(last).index(kind) > list(last).index(theirs[0])
    ordered = {kind: last[kind]} | last if late else last
    return ordered, conditions | {key: {kind: others} | conditions.get(key, {}) for key in theirs}


def _holds(override: Override | None, given: Any) -> bool:
    """Whether a condition may hold: of a key that has one value, whether it has a wanted one."""
    if override is None or override.is_sweep_override():
        return True
    axis = Axis(override.get_key_element().lstrip("+"), (str(override.input_line).partition("=")[2],))
    return any(_texts(axis, value) for value in (given if isinstance(given, list) else [given]))


def _check_fixed(key: str, condition: dict[str, Any], told: Sequence[Override], last: dict[str, Override]) -> None:
    """Refuse a value in a condition on a key that is fixed, where a file searches that key or it is a group.

    It would not be met, as one that another value of the key meets.
    """
    options = overrides.groups()
    for other, given in condition.items():
        if other not in last or last[other].is_sweep_override():
            continue
        values = given if isinstance(given, list) else [given]
        searched = [o for o in told if o.get_key_element().lstrip("+") == other and o.is_discrete_sweep()]
        axis = _axis(other, searched[-1]) if searched else Axis(other, tuple(options.get(other, ())))
        known = [_texts(axis, value) or (value is None and not searched) for value in values]  # experiment=null
        if axis.discrete and not (known and all(known)):
            raise ConfigError(f"sweep.params.{key}.when.{other} must be among {','.join(axis.texts)}, got {given!r}")


def _when(key: str, condition: dict[str, Any], before: list[Axis]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    known = {axis.key: axis for axis in before}
    made = []
    for other, given in condition.items():
        if other not in known:
            raise ConfigError(f"sweep.params.{key}.when: {other} must be searched, in a line before {key}")
        axis, values = known[other], given if isinstance(given, list) else [given]
        if not axis.discrete:
            raise ConfigError(f"sweep.params.{key}.when: {other} must have single values, it has {_interval(axis)}")
        wanted = [_texts(axis, value) for value in values]
        if not all(wanted) or not wanted:
            raise ConfigError(f"sweep.params.{key}.when.{other} must be among {','.join(axis.texts)}, got {given!r}")
        made.append((other, tuple(text for texts in wanted for text in texts)))
    return tuple(made)


def _whole(key: str, value: Any, text: str) -> bool:
    """Whether a range is of whole numbers: as it is cast, else as its ends are written where the key takes any.

    Hydra makes floats of both ends, so that only a cast to `int` shows in their types.
    """
    if isinstance(value.start, int) and isinstance(value.end, int):
        return True
    return not (config.is_real(key) or CAST.search(text)) and WHOLE.search(text) is not None


def _axis(key: str, override: Override) -> Axis:
    value: Any = override.value()
    if getattr(value, "shuffle", False):
        raise ConfigError(
            f"{override.input_line}: shuffle() draws another order at each launch, and trials are numbered by it; list "
            "the values in the order you want"
        )
    if override.is_discrete_sweep():
        texts = tuple(dict.fromkeys(override.sweep_string_iterator()))
        if not texts:
            raise ConfigError(f"{override.input_line}: must have at least one value, got none")
        first = {_meant(key, text): text for text in reversed(texts)}  # of equal values the one that was written first
        return Axis(key, tuple(text for text in texts if text in first.values()))
    low, high, log = value.start, value.end, "log" in value.tags
    whole = config.is_whole(key) or _whole(key, value, str(override.input_line))
    if not low < high:
        told = f"{low:.12g} and {high:.12g}"
        raise ConfigError(f"{override.input_line}: the lower end must be below the upper, got {told}")
    if whole and not math.ceil(low) < math.floor(high):
        raise ConfigError(f"{override.input_line}: must hold two whole numbers or more, as {key} takes no others")
    low, high = (math.ceil(low), math.floor(high)) if whole else (low, high)
    if log and low <= 0:
        raise ConfigError(f"{override.input_line}: a log range must be above 0, got {low}")
    return Axis(key, low=low, high=high, whole=whole, log=log)
