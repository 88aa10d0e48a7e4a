"""How a verb ends: what a person caused is told in one line on stderr, and the exit code says what kind it was."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftexp import garbage
from ftexp.errors import FtexpError, Preempted
from ftexp.files import finite, no_room

INTERRUPTED = 130
PIPE = 128 + signal.SIGPIPE
"""Exit code where the reader of our output left early, as `| head` does."""


def ended(work: Callable[[], int]) -> int:
    """Do the work of a verb and return its exit code; a fault of ours keeps its traceback."""
    garbage.left()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has not every letter ends no work
    try:
        code = work()
        sys.stdout.flush()
    except (FtexpError, Preempted) as error:
        goes_on = "; the same command goes on" if isinstance(error, Preempted) else ""
        print(f"ftexp: {error}{goes_on}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except KeyboardInterrupt:
        print("ftexp: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if (full := no_room(error, Path.cwd())) is None:
            raise
        print(f"ftexp: {full}", file=sys.stderr)
        return full.exit_code
    return code


def as_json(value: Any, indent: int | None = 1) -> str:
    """Write JSON that any reader takes: null for the numbers that JSON does not have.

    >>> as_json({"loss": float("nan"), "p": [0.5, float("inf")]}, None)
    '{"loss": null, "p": [0.5, null]}'
    """
    return json.dumps(finite(value), indent=indent)
