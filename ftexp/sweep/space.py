"""Hydra's override grammar as a search space: which points a sweep visits."""

from __future__ import annotations

from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser

from ftexp.errors import ConfigError


def grid(overrides: list[str]) -> list[list[str]]:
    """List every combination of the values of discrete overrides, the last one varying fastest; repeats once.

    >>> grid(["lora.r=8,16", "seed=0"])
    [['lora.r=8', 'seed=0'], ['lora.r=16', 'seed=0']]

    Raises:
        ConfigError: an override asks for a continuous range.
    """
    axes: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.get_key_element()
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{override.input_line}: a grid needs single values, choice() or range()")
        if override.is_sweep_override():
            values = [str(value) for value in override.sweep_string_iterator()]
        else:
            values = [override.get_value_element_as_str()]
        axes[key] = [f"{key}={value}" for value in dict.fromkeys(values)]
    return [list(point) for point in product(*axes.values())]


def swept(points: list[list[str]]) -> list[str]:
    """Label each point by the overrides that differ between points.

    >>> swept([["lora.r=8", "seed=0"], ["lora.r=16", "seed=0"]])
    ['lora.r=8', 'lora.r=16']
    """
    shared = set(points[0]).intersection(*points[1:]) if len(points) > 1 else set()
    return [" ".join(text for text in point if text not in shared) for point in points]
