"""Where a worker runs: in a process of this machine, as a Slurm job, or as a Ray task.

The record hands out the trials in each case, so an engine starts the same command and tells whether it still runs;
nothing else passes between supervisor and worker. The sweep's folder has to be there on every machine, under its path.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ftexp.errors import ConfigError, MachineError
from ftexp.sweep.options import Engine, Options
from ftexp.sweep.worker import PREEMPTED, TOKEN

if TYPE_CHECKING:
    from submitit import Job  # type: ignore

GRACE_SECONDS = 30.0
"""Time a worker gets to leave before it is killed."""
LOOK_SECONDS = 0.2
MINUTES = 240
"""Time limit of a Slurm job where `engine_args.timeout_min` gives none; the worker is started again after it."""
SQUEUE_SECONDS = 5.0
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
         "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")  # fmt: skip
"""States in which a Slurm job still runs or will."""
EXTRAS = {Engine.slurm: "submitit", Engine.ray: "ray"}


class Worker(Protocol):
    """A worker that was started; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs or waits for its machine."""

    def terminate(self) -> None:
        """Ask it to keep a checkpoint and end."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises `subprocess.TimeoutExpired`."""
        ...


def check(options: Options) -> None:
    """Refuse an engine that cannot start workers, before anything is written.

    Raises:
        ConfigError: its extra is not installed, or a keyword is not known.
    """
    if options.engine is Engine.local:
        if options.engine_args:
            given = ", ".join(options.engine_args)
            raise ConfigError(f"sweep.engine_args are for sweep.engine=slurm or ray, got {given} with engine=local")
        return
    gpus = options.engine_args.get("gpus_per_node", options.engine_args.get("num_gpus"))
    if gpus is not None and gpus < options.gpus_per_trial and options.gpus_per_trial > 1:
        raise ConfigError(
            f"sweep.gpus_per_trial={options.gpus_per_trial} needs as many GPUs in a job, sweep.engine_args gives {gpus}"
        )
    if options.slots_per_gpu > 1 and options.engine is Engine.slurm:
        raise ConfigError(
            f"sweep.slots_per_gpu={options.slots_per_gpu} is for sweep.engine=local or ray: a Slurm job has whole GPUs"
        )
    if not options.workers:
        raise ConfigError(f"sweep.workers must be set with sweep.engine={options.engine.value}, got 0")
    import importlib.util

    if importlib.util.find_spec(EXTRAS[options.engine]) is None:
        name = options.engine.value
        raise ConfigError(f"sweep.engine={name} needs a package that is not installed; pip install 'ftexp[{name}]'")


def starter(
    options: Options, folder: Path, shared: dict[str, str]
) -> Callable[[str, str, dict[str, str], set[int] | None], Worker]:
    """Return what starts a worker of a sweep: it takes the slot's name, a token, environment and cores.

    `shared` is environment of every worker, wherever it runs.

    Raises:
        MachineError: Slurm or Ray cannot be reached.
        ConfigError: `engine_args` holds a keyword that the engine refuses.
    """
    match options.engine:
        case Engine.slurm:
            executor = _executor(options, folder)
            given = (folder, options.gpus_per_trial, shared)
            return lambda name, token, *_: SlurmJob(executor.submit(Attended(*given, name, token)))
        case Engine.ray:
            remote = _remote(options)
            given = (folder, options.gpus_per_trial, shared)
            return lambda name, token, *_: RayTask(remote.remote(*given, name, token))
        case Engine.local:
            each = options.gpus_per_trial
            return lambda name, token, env, cores: launched(folder, each, shared | env, name, token, cores)


def launched(
    folder: Path, processes: int, env: dict[str, str], name: str, token: str, cores: set[int] | None = None,
    own_group: bool = True,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a worker in a process that ends with this one and has its output in `workers/<name>.log`.

    Args:
        folder: of the sweep.
        processes: that share each trial; with more than one torchrun starts them.
        env: further environment.
        name: of the slot.
        token: names this start of the worker in the record.
        cores: what it is pinned to; None leaves it to the system.
        own_group: whether signals to our process group stay away from it: ctrl-c goes to the supervisor alone, which
            asks the workers to leave; a Slurm job's SIGTERM is to reach the worker itself.
    """

    def prepared() -> None:
        if own_group:
            os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    module = ["ftexp.sweep.worker"] if processes == 1 else ["ftexp.sweep.torchrun", str(processes)]
    with (folder / "workers" / f"{name}.log").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", *module, str(folder)],
            env={**os.environ, **env, TOKEN: token},
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=prepared,
        )


def leave(process: subprocess.Popen[bytes]) -> None:
    """Have a worker keep a checkpoint and end, and kill it where it takes too long.

    By SIGUSR2, of which a second one says nothing new: Slurm may have sent it to the worker already. Looks again and
    again instead of waiting, for this may run in a signal handler on top of a `wait`, which holds the process's lock.
    """
    process.send_signal(signal.SIGUSR2)
    until = time.monotonic() + GRACE_SECONDS
    while process.poll() is None and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    if process.poll() is None:
        process.kill()


def watched(process: subprocess.Popen[bytes]) -> int:
    """Wait for a worker's end without holding its lock; return its exit code."""
    while (code := process.poll()) is None:
        time.sleep(LOOK_SECONDS)
    return code


class Attended:
    """What a Slurm job does: runs a worker, and has it leave before the job is taken away.

    submitit pickles it for the job, and calls `checkpoint` on the signal that comes before a time limit or a
    preemption; the job is then queued again and takes the next ticket, the interrupted one first.
    """

    def __init__(self, folder: Path, processes: int, env: dict[str, str], name: str, token: str) -> None:
        self.given = (folder, processes, env, name, token)
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the worker; return its exit code."""
        folder, processes, env, name, token = self.given
        if threads := os.environ.get("SLURM_CPUS_PER_TASK"):
            env = env | {"OMP_NUM_THREADS": str(max(1, int(threads) // processes))}
        self.process = launched(folder, processes, env, name, token, own_group=False)
        return watched(self.process)

    def checkpoint(self) -> Any:
        """End the worker with its checkpoint kept, and hand over what the job does when it comes back."""
        from submitit.helpers import DelayedSubmission  # type: ignore

        if self.process is not None:
            leave(self.process)
        return DelayedSubmission(Attended(*self.given))


def _executor(options: Options, folder: Path) -> Any:
    import submitit  # type: ignore

    args = {"name": "ftexp", "timeout_min": MINUTES, **options.engine_args}
    cluster = args.pop("cluster", "slurm")
    (folder / "workers" / "slurm").mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=folder / "workers" / "slurm", cluster=cluster)
        executor.update_parameters(tasks_per_node=1, **args)
    except RuntimeError as error:
        raise MachineError(f"sweep.engine=slurm: {str(error).splitlines()[0]}") from error
    except (TypeError, ValueError, NameError, AssertionError) as error:
        raise ConfigError(f"sweep.engine_args is refused by submitit: {str(error).splitlines()[0]}") from error
    return executor


@dataclass
class SlurmJob:
    """A worker in a job of submitit's, on Slurm or (`cluster: local`) a process here."""

    job: Job[int]
    missed: int = 0
    """Times in a row that Slurm did not know the job any more and there was no result."""
    looked: float = 0.0

    def poll(self) -> int | None:
        """Return the worker's exit code; a job that waits, runs or is queued again has none yet."""
        if self.job.paths.result_pickle.exists() or (not self._on_slurm() and self.job.done()):
            try:
                return self.job.result()
            except Exception:  # whatever ended the job, its worker is gone
                return 1
        return self._lost() if self._on_slurm() else None

    def _on_slurm(self) -> bool:
        from submitit.slurm.slurm import SlurmJob as OnSlurm  # type: ignore

        return isinstance(self.job, OnSlurm)

    def _lost(self) -> int | None:
        """Ask Slurm now and then whether the job is there: of one that was cancelled or lost its node nothing comes.

        By `squeue`; submitit asks `sacct`, which clusters without accounting do not answer. Twice, since a result may
        be late on a shared folder.
        """
        if time.monotonic() - self.looked < SQUEUE_SECONDS:
            return None
        self.looked = time.monotonic()
        asked = subprocess.run(["squeue", "-h", "-j", self.job.job_id, "-o", "%T"], capture_output=True, text=True)
        unreachable = asked.returncode != 0 and "Invalid job id" not in asked.stderr
        self.missed = 0 if unreachable or asked.stdout.strip() in ALIVE else self.missed + 1
        return 1 if self.missed > 1 else None

    def terminate(self) -> None:
        """Ask the worker to leave: Slurm signals the processes of the job's step."""
        if self._on_slurm():
            subprocess.run(["scancel", "--signal=TERM", self.job.job_id], capture_output=True)
        else:
            self.kill()

    def kill(self) -> None:
        """Cancel the job."""
        self.job.cancel(check=False)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the job's end."""
        return _waited(self, timeout)


def _remote(options: Options) -> Any:
    """Connect to Ray and return the task that runs a worker."""
    import ray  # type: ignore

    args = dict(options.engine_args)
    try:
        if not ray.is_initialized():
            ray.init(address=args.pop("address", "auto"), log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise MachineError(
            "sweep.engine=ray: no Ray cluster answers; `ray start --head` starts one, or give "
            f"sweep.engine_args.address ({str(error).splitlines()[0]})"
        ) from error
    args.pop("address", None)
    each = options.gpus_per_trial
    gpus = each / options.slots_per_gpu if ray.cluster_resources().get("GPU", 0) else 0
    try:
        return ray.remote(**{"num_cpus": each, "num_gpus": gpus, **args, "max_retries": 0})(_attended)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sweep.engine_args is refused by Ray: {str(error).splitlines()[0]}") from error


def _attended(folder: Path, processes: int, env: dict[str, str], name: str, token: str) -> int:
    """Run a worker from a Ray task; where the task is cancelled the worker leaves."""
    process = launched(folder, processes, env, name, token)
    try:
        return watched(process)  # Ray cancels by an exception between two lines of Python
    except BaseException:
        leave(process)
        raise


@dataclass
class RayTask:
    """A worker in a Ray task."""

    ref: Any

    def poll(self) -> int | None:
        """Return the worker's exit code."""
        import ray  # type: ignore
        from ray.exceptions import RayError, TaskCancelledError  # type: ignore

        if not ray.wait([self.ref], timeout=0)[0]:
            return None
        try:
            return ray.get(self.ref)
        except TaskCancelledError:
            return PREEMPTED
        except RayError:
            return 1  # its node or its process is gone

    def terminate(self) -> None:
        """Cancel the task, which has the worker leave."""
        import ray  # type: ignore

        ray.cancel(self.ref, force=False)

    def kill(self) -> None:
        """Kill the task's process, and with it the worker."""
        import ray  # type: ignore

        ray.cancel(self.ref, force=True)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the task's end."""
        return _waited(self, timeout)


def _waited(worker: SlurmJob | RayTask, timeout: float | None) -> int:
    until = None if timeout is None else time.monotonic() + timeout
    while (code := worker.poll()) is None:
        if until is not None and time.monotonic() > until:
            raise subprocess.TimeoutExpired(type(worker).__name__, timeout or 0.0)
        time.sleep(LOOK_SECONDS)
    return code
