"""Launches that cost a fork: a process that has imported everything once starts commands as children of its own.

A child is a process like any other, with its own signals and files, and so are the workers it starts; only the seven
seconds of imports are saved, so that hundreds of faults fit in minutes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

for name, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false"),
                    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")):  # fmt: skip
    os.environ.setdefault(name, value)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlflow.server  # noqa: F401
import optuna.storages.journal  # noqa: F401
import psutil
import pyarrow.parquet  # noqa: F401
import sqlalchemy.dialects.sqlite  # noqa: F401
import torch
import trl
from disks import Disk, disk  # noqa: F401
from trl import SFTTrainer  # noqa: F401

from ftexp import probe, run, sync  # noqa: F401
from ftexp.model import tiny  # noqa: F401
from ftexp.sweep import engines, supervisor, worker  # noqa: F401

assert trl
torch.set_num_threads(1)


class Child:
    """A process that was forked here; has what `subprocess.Popen` has."""

    def __init__(self, work: Callable[[], int], out: Path, own_group: bool = True) -> None:
        self.returncode: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                if own_group:
                    os.setsid()
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the process that started it
                if os.getppid() != parent:
                    os._exit(71)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                handle = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                code = work()
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError):
                        stream.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        import subprocess

        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("child", timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def wrong_clock(file: Path) -> None:
    """Have `time.time` and Optuna's `datetime.now` tell a time that is wrong by what a file says."""
    real = time.time

    def wrong() -> float:
        try:
            return real() + float(file.read_text() or 0)
        except (FileNotFoundError, ValueError):
            return real()

    class Wrong(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(wrong(), tz)

    time.time = wrong
    for module in [m for name, m in sys.modules.items() if name.startswith("optuna")]:
        if getattr(module, "datetime", None) is datetime:
            module.datetime = Wrong


def launch(argv: list[str], folder: Path, out: Path, clock: Path, main: Callable[[], int] = run.main) -> Child:
    """Run a command line of ftexp in a folder; its workers are forked from it.

    Args:
        argv: overrides.
        folder: to run in.
        out: what it prints is added to.
        clock: file that says by how many seconds its clock is wrong, from one moment to the next.
        main: of which verb.
    """

    def work() -> int:
        os.chdir(folder)
        sys.argv = ["ftexp", *argv]
        wrong_clock(clock)
        probe.LEAST = probe.LOW = 1  # the disk of a storm is small
        probe.quick = lambda run, place: [probe.disk(place), probe.folders(place)]  # of the libraries nothing changes
        engines.launched = worker_of(folder)
        return main()

    return Child(work, out)


def worker_of(folder: Path) -> Callable[..., Child]:
    def launched(
        sweep: Path, processes: int, env: dict[str, str], number: int, token: str, cores: set[int] | None = None,
        own_group: bool = True,
    ) -> Child:  # fmt: skip
        assert processes == 1

        def work() -> int:
            os.environ.update(env)
            os.environ[worker.TOKEN] = token
            if cores:
                os.sched_setaffinity(0, cores)
            sys.argv = ["worker", str(sweep)]
            return worker.main()

        return Child(work, sweep / "workers" / f"{number}.log", own_group)

    return launched


def workers(process: Child) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
