"""A score of one's own: a function in a file, over the completions that the trials of a sweep have written.

It ranks a sweep afterwards (`ftexp report SWEEP --by scores.py:number`), with the same tests as any other score, and
nothing is trained or written anew. Only a file that is named on the command line is ever run.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftexp.errors import ConfigError, DataError
from ftexp.metrics import OWN

COLUMNS = {"completion": "prediction", "reference": "reference", "prompt": "prompt"}
"""What a function may ask for, by the name of its parameter -> column of a trial's table of rows."""
RIVALS = ("base", "tfidf")
"""What is scored beside a trial, where the table has its completions."""


@dataclass(frozen=True)
class Own:
    """A function of a file that scores one completion."""

    name: str
    """As it was given: `scores.py:number`."""
    function: Callable[..., Any]
    asks: tuple[str, ...]
    """Its parameters: some of `COLUMNS`."""

    def values(self, content: dict[str, list[Any]], column: str = "prediction") -> list[float]:
        """Score each row of a trial's table.

        Args:
            content: columns of the table.
            column: where the completions are.

        Raises:
            DataError: the table holds no completions, or the function fails or gives no finite number; names the row.
        """
        if column not in content:
            raise DataError(f"{self.name} needs completions, this table has none: eval.generate was off")
        given = [content[column if name == "completion" else COLUMNS[name]] for name in self.asks]
        return [self._value(where, *row) for where, *row in zip(content["where"], *given, strict=True)]

    def _value(self, where: str, *row: Any) -> float:
        told = dict(zip(self.asks, row, strict=True))
        try:
            with redirect_stdout(sys.stderr):  # data may go to stdout
                value = self.function(**told)
        except (Exception, SystemExit) as error:
            raise DataError(f"{where}: {self.name} failed ({type(error).__name__}: {error}) on {told}") from error
        number = math.nan
        with suppress(TypeError, ValueError, OverflowError):  # numpy's and torch's scalars are numbers too
            number = math.nan if isinstance(value, str | bytes) else float(value)
        if not math.isfinite(number):
            raise DataError(f"{where}: {self.name} must return a finite number, got {value!r} on {told}")
        return number

    def scores(self, content: dict[str, list[Any]]) -> dict[str, float]:
        """Return the mean over the rows of a trial's table, and its rival's, by their names as metrics.

        Raises:
            DataError: as of `values`.
        """
        told = {OWN: self.values(content)}
        for rival in RIVALS:
            if f"{rival}_prediction" in content:
                told[OWN.replace("valid/", f"{rival}/")] = self.values(content, f"{rival}_prediction")
        return {name: math.fsum(values) / len(values) for name, values in told.items()}


def load(text: str) -> Own:
    """Load a function from a file, which is run for it; modules beside the file can be imported by it.

    Args:
        text: `<file>.py:<function>`.

    Raises:
        ConfigError: there is no such file or function, the file cannot be run, or the function asks for something else
            than completion, reference and prompt.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not file:
        raise ConfigError(f"{text}: must be a function of a file, as scores.py:number; it names no function")
    if not path.is_file():
        raise ConfigError(f"{text}: must be a function of a file, as scores.py:number; there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"ftexp_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{text}: must be a function of a file of Python, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[spec.name] = module  # where dataclasses look their module up
    try:
        with redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else _line(error, path)
        where = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"{where}: cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function) or isinstance(function, type):
        there = ", ".join(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise ConfigError(f"{text}: must name a function of {path}, which has {there or 'none'}")
    return Own(text, function, _asks(text, function))


def _line(error: BaseException, path: Path) -> int | None:
    """Return the last line of a file that an error came by."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path.resolve() or trace.tb_frame.f_code.co_filename == str(path):
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


def _asks(text: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameters of a function; one with a default that is none of ours keeps it."""
    try:
        known = inspect.signature(function).parameters.values()
    except ValueError as error:  # of some functions of C
        raise ConfigError(f"{text}: must tell its parameters: {error}") from error
    asks = tuple(p.name for p in known if p.name in COLUMNS)
    usual = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    stray = [p.name for p in known if p.name not in COLUMNS and p.default is p.empty and p.kind not in usual]
    stray += [p.name for p in known if p.name in COLUMNS and p.kind is p.POSITIONAL_ONLY]
    if stray or "completion" not in asks:
        raise ConfigError(
            f"{text}: must take completion, and may take reference and prompt, by these names; "
            + (f"it takes {', '.join(stray)}" if stray else "it takes no completion")
        )
    return asks
