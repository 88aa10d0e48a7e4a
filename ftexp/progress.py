"""Progress on long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False)
QUIET_SECONDS = 10.0
"""Without a terminal: seconds between two lines about the same work."""
QUIET = "FTEXP_QUIET"
"""Environment variable; set to anything but 0, warnings and errors alone are told on stderr. Workers inherit it."""


class Sheet(Table):
    """A table that shows titles and cells as they are.

    Rich takes a string for markup: `[/INST]` in a prompt is an error to it, and `[q_proj]` is nothing. Where the
    terminal is narrow, words go on in the next line and numbers stay whole as long as they can.
    """

    def __init__(self, title: str | None = None) -> None:
        super().__init__(title=None if title is None else Text(title, "table.title"), title_justify="left")

    def column(self, title: str, right: bool = False, whole: bool = False) -> None:
        """Add a column: of numbers, which end at the right, or of texts that are to stay `whole`, or of other texts."""
        one = right or whole
        self.add_column(
            Text(title), justify="right" if right else "left", no_wrap=one, overflow="ellipsis" if one else "fold"
        )

    def row(self, *cells: str, **how: Any) -> None:
        """Add a row of one text for each column."""
        self.add_row(*map(Text, cells), **how)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[..., None]]:
    """Show work of `total` units.

    Yields:
        A function `advance(units, note="")` to call as units get done; `note` is shown behind the count.
    """
    show = _nothing if quiet() else _bar if console.is_terminal else _lines
    with show(label, total) as advance:
        yield advance


@contextmanager
def _nothing(label: str, total: int) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[..., None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(units: int = 1, note: str = "") -> None:
            if note:
                bar.update(task, note=note)
            bar.advance(task, units)

        yield advance


@contextmanager
def _lines(label: str, total: int) -> Iterator[Callable[..., None]]:
    done, said = 0, time.monotonic()

    def advance(units: int = 1, note: str = "") -> None:
        nonlocal done, said
        done += units
        if done < total and time.monotonic() - said >= QUIET_SECONDS:
            said = time.monotonic()
            say(f"{label} {done}/{total} {note}".rstrip())

    yield advance


LOUD = {"bitsandbytes": logging.ERROR, "datasets": logging.WARNING, "urllib3.connectionpool": logging.ERROR}
"""Loggers and the level from which they are heard: `datasets` names the frameworks it finds, and a server that is dead
is told in a line of ours."""


def quiet_libraries() -> None:
    """Silence what libraries tell their own callers: deprecations of theirs, and kernels they could do without."""
    import sys
    import warnings

    for name, level in LOUD.items():
        logging.getLogger(name).setLevel(level)
    if not sys.warnoptions:
        for library in ("transformers", "trl", "peft", "torch", "mlflow"):
            warnings.filterwarnings("ignore", module=library)


def quiet() -> bool:
    """Whether progress and notes are left out."""
    return os.environ.get(QUIET, "") not in ("", "0")


def say(text: str, always: bool = False) -> None:
    """Print one line on stderr, above any bar.

    Args:
        text: what to tell.
        always: told in quiet too, because something went wrong or was left out.
    """
    if always or not quiet():
        console.print(text, soft_wrap=True, markup=False)


def warn(text: str) -> None:
    """Print a warning in one line on stderr, quiet or not."""
    say(f"warning: {text}", always=True)
