"""Garbage collection that waits, or is left to the end of the process."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def postponed() -> Iterator[None]:
    """Collect nothing meanwhile: libraries bring a million objects that stay, and each look through them is long."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def left() -> None:
    """Look through nothing when the interpreter ends, after whatever else is to be done then.

    All memory goes back with the process. Python looks through every object before, some seconds' work where torch,
    transformers and peft are imported.
    """
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
