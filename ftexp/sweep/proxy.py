"""Optuna's proxy in front of a database, for the workers of a sweep: `sweep.proxy`.

Each worker would hold connections of its own; PostgreSQL takes 100 by default. `python -m ftexp.sweep.proxy FOLDER HOST
PORT` serves; the launch starts it, ends it, and starts it again where it dies.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ftexp.progress import say
from ftexp.sweep import frozen, study
from ftexp.sweep.frozen import Frozen
from ftexp.sweep.options import Engine
from ftexp.sweep.worker import RECORD

LOOPBACK = "127.0.0.1"


@contextmanager
def serving(sweep: Frozen) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """Serve the record while the block runs, where `sweep.proxy` says so.

    Yields:
        What the environment of workers must hold, and a function that puts a proxy that died back in its place.
    """
    options = sweep.options
    if options.proxy is None:
        yield {}, lambda: None
        return
    local = options.engine is Engine.local
    port = options.proxy or _free()
    where = LOOPBACK if local else "0.0.0.0"
    running = [_started(sweep.folder, where, port)]

    def look() -> None:
        if running[0].poll() is not None:
            say(f"the proxy of the record died (exit {running[0].poll()}) and is started again", always=True)
            running[0] = _started(sweep.folder, where, port)

    host = LOOPBACK if local else socket.gethostname()
    say(f"the record is served at grpc://{host}:{port}" + ("" if local else ", to everyone who reaches this machine"))
    try:
        yield {RECORD: f"grpc://{host}:{port}"}, look
    finally:
        running[0].kill()
        running[0].wait()


def _started(folder: Path, host: str, port: int) -> subprocess.Popen[bytes]:
    def prepared() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # the proxy ends with the launch

    with (folder / "workers" / "proxy.log").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "ftexp.sweep.proxy", str(folder), host, str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=prepared,
            start_new_session=True,
        )


def _free() -> int:
    with socket.socket() as held:
        held.bind(("", 0))
        return held.getsockname()[1]


def main() -> int:
    """Run the command line: serve until ended."""
    import warnings

    from optuna.storages import run_grpc_proxy_server

    folder, host, port = sys.argv[1:]
    sweep = frozen.load(Path(folder))
    store = study.storage(sweep.folder, sweep.options.storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls it experimental since 4.2
        run_grpc_proxy_server(store, host=host, port=int(port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
