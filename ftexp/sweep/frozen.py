"""A sweep as it was launched: composed configs, space and options, in its folder.

Workers read nothing else, so an edit of `conf/` reaches no trial of a sweep that has begun.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ftexp import config, overrides
from ftexp.config import Run
from ftexp.errors import ConfigError, Damaged, MachineError
from ftexp.files import read_sweep, write_json
from ftexp.sweep.options import Options
from ftexp.sweep.space import Axis, Space

FILE = "sweep.json"


@dataclass(frozen=True)
class Frozen:
    """What every process of a sweep knows about it."""

    folder: Path
    name: str
    space: Space
    options: Options
    objectives: list[str]
    mlflow_run: str | None
    track_uri: str
    rows: dict[str, str]
    """Digest of the data config -> digest of the rows it gave at the launch."""
    rung: int = 1
    """Steps between two held-out losses, where pruners first look."""
    code: str = ""
    """Digest of ftexp's own source at the launch."""
    tickets: int = 0
    """Trials of the whole sweep, for those who read its folder alone; 0 where the launch did not say."""
    config_dir: str | None = None
    """Folder of the launch's `--config-dir`; told in commands that run a trial again, and read by none of them."""
    cwd: str = ""
    """The folder it was launched in, which relative paths of the config begin in."""
    longest: int = 0
    """Steps of the longest trial, where the pruner lays out its brackets by them; 0 where the launch did not say."""

    def save(self) -> None:
        """Write the sweep's file."""
        axes = [axis.__dict__ | {"texts": list(axis.texts)} for axis in self.space.axes]
        write_json(
            self.folder / FILE,
            {"name": self.name, "fixed": list(self.space.fixed), "axes": axes, "options": config.plain(self.options),
             "objectives": self.objectives, "mlflow_run": self.mlflow_run, "track_uri": self.track_uri,
             "rows": self.rows, "rung": self.rung, "code": self.code, "tickets": self.tickets,
             "config_dir": self.config_dir, "cwd": self.cwd, "longest": self.longest},
        )  # fmt: skip

    def run(self, point: dict[str, Any], replicate: int) -> Run:
        """Build the config of a point, checked; replicates count the seed up.

        Raises:
            ConfigError: the point's values are out of range or at odds.
        """
        cfg = _composed(self.folder / "frozen" / f"{variant(self.space, point)}.yaml")
        run = config.build(placed(cfg, self.space, point))
        run.seed += replicate
        return run


def placed(cfg: DictConfig, space: Space, point: dict[str, Any]) -> DictConfig:
    """Copy a composed config and set the keys of a point in it, group options aside: a tenth of what composing costs.

    Raises:
        OmegaConfBaseException: a value is not of the key's type.
    """
    cfg = copy.deepcopy(cfg)
    for axis in space.axes:
        if axis.key in point and not axis.composes:
            key = axis.key.lstrip("+")
            value = OverridesParser.create().parse_override(f"{axis.key}={point[axis.key]}").value()
            OmegaConf.update(cfg, key, value, force_add=key.startswith(overrides.OPEN))
    return cfg


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Say that a config is damaged which cannot be read as it was frozen."""
    try:
        yield
    except (OmegaConfBaseException, YAMLError, ValueError, OSError, AttributeError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Damaged(f"{path}: is damaged, it must be a config as it was frozen ({why}); put it back") from error


@cache
def _composed(path: Path) -> DictConfig:
    """Read a composed config; what was frozen does not change while a process lives."""
    with _whole(path):
        cfg = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.load(path))
    assert isinstance(cfg, DictConfig)
    return cfg


SHARED = ("objectives", "mlflow_run", "track_uri", "rows", "rung", "code")
"""Keys of the file that are handed on as they are."""


def load(folder: Path) -> Frozen:
    """Read a sweep's file.

    Raises:
        MachineError: the folder holds no sweep, or its file is damaged.
    """
    kept = read_sweep(folder, "name", "fixed", "axes", *SHARED)
    if kept is None:
        raise MachineError(f"{folder}: must be the folder of a sweep; there is no {FILE}")
    axes = [
        Axis(**{**a, "texts": tuple(a["texts"]), "when": tuple((k, tuple(v)) for k, v in a["when"])})
        for a in kept["axes"]
    ]
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), kept["options"]))
    assert isinstance(options, Options)
    space = Space(tuple(kept["fixed"]), tuple(axes))
    shared = (kept[key] for key in SHARED)
    later = {key: kept[key] for key in ("tickets", "config_dir", "cwd", "longest") if key in kept}
    return Frozen(folder, kept["name"], space, options, *shared, **later)


def keys(folder: Path) -> set[str]:
    """Return the keys that the config had at the launch, and the groups they are in; an earlier ftexp had fewer.

    All points have the same; empty before the first launch.

    Raises:
        Damaged: what was frozen is no config.
    """
    composed = next((folder / "frozen").glob("*.yaml"), None)
    if composed is None:
        return set()
    with _whole(composed):
        parts = [key.split(".") for key in config.flat(OmegaConf.to_container(OmegaConf.load(composed)))]
    return {".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)}


def variant(space: Space, point: dict[str, Any]) -> str:
    """Name the composed config of a point: one for each combination of chosen group options."""
    return hashlib.sha256("\n".join(_chosen(space, point)).encode()).hexdigest()[:12]


def _chosen(space: Space, point: dict[str, Any]) -> list[str]:
    return [f"{a.sign}{a.key}={point[a.key]}" for a in space.axes if a.composes and a.key in point]


def shared(space: Space, point: dict[str, Any]) -> list[str]:
    """Return the overrides that a point shares with all of its variant: group options and what is fixed."""
    return [*_chosen(space, point), *space.fixed]


def freeze(folder: Path, space: Space, points: list[dict[str, Any]], compose: Any) -> None:
    """Compose and keep one config for each combination of group options, interpolations unresolved.

    Args:
        folder: of the sweep.
        space: what is searched.
        points: every point of a grid, or one for each combination a sampler may choose.
        compose: takes overrides and returns the config without Hydra's own part.
    """
    kept = folder / "frozen"
    kept.mkdir(parents=True, exist_ok=True)
    for point in points:
        path = kept / f"{variant(space, point)}.yaml"
        if not path.exists():
            OmegaConf.save(compose(shared(space, point)), path)


def corners(space: Space) -> list[dict[str, Any]]:
    """List points that together show every value of each axis: what is checked of a space too large to list.

    Each discrete axis runs through its values with the others at their first; continuous ones stand at both ends; all
    combinations of group options are there.
    """
    from itertools import product

    ends: dict[str, list[Any]] = {
        a.key: list(a.texts) if a.discrete else [_value(a, a.low), _value(a, a.high)] for a in space.axes
    }
    first = {key: values[0] for key, values in ends.items()}
    points = [first | {key: value} for key, values in ends.items() for value in values]
    groups = [a.key for a in space.axes if a.composes]
    whens = {a.key: a.when for a in space.axes}

    def reached(point: dict[str, Any], key: str, kept: dict[str, Any]) -> dict[str, Any]:
        """Give a point the values under which a key is searched, those in `kept` aside."""
        for other, wanted in whens[key]:
            if other not in kept:
                point = reached(
                    point | {other: point[other] if str(point[other]) in wanted else wanted[0]}, other, kept
                )
        return point

    for values in product(*(ends[key] for key in groups)):
        chosen = dict(zip(groups, values, strict=True))
        every = first | chosen
        for key in groups:  # two may ask for different values of a third: each has its way once
            every = reached(every, key, chosen)
            points.append(reached(first | chosen, key, chosen))
        points += [first | chosen, every]
    for axis in space.axes:  # at least once with what it depends on
        points += [reached(first | {axis.key: v}, axis.key, {axis.key: v}) for v in ends[axis.key]]
    once = {tuple(trimmed.items()): trimmed for trimmed in map(space.trimmed, points)}
    return list(once.values())


def _value(axis: Axis, end: float) -> Any:
    return int(end) if axis.whole else end


def check_limit(count: int) -> None:
    """Refuse a grid that was surely not meant.

    Raises:
        ConfigError: the grid has more than 10 000 points.
    """
    if count > 10_000:
        raise ConfigError(
            f"the grid must have at most 10000 points, got {count}; use sweep.sampler=tpe with sweep.n_trials"
        )
