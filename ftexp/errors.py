"""The errors a person can cause or meet, each with the exit code it ends in.

Every class also inherits the standard exception a reader would expect, so that code calling ftexp as a library
can catch either. To add one: subclass `FtexpError`, set `exit_code`, and name it in the table of the README.
"""


class FtexpError(Exception):
    """Anything ftexp refuses or reports on purpose; its text is shown without a traceback."""

    exit_code = 1


class ConfigError(FtexpError, ValueError):
    """A key, a group option or a value of the config is unknown, out of range or at odds with another."""

    exit_code = 2


class DataError(FtexpError, ValueError):
    """A data file cannot be used; the message starts with `file:line`."""

    exit_code = 3


class MachineError(FtexpError, RuntimeError):
    """Something outside the config is missing: a model folder, a package, the network, disk space."""

    exit_code = 4


class Unusable(MachineError):
    """What a trial names is there and cannot be used, here or on another machine."""


class Damaged(MachineError):
    """A file of ours holds something else than was written; the message starts with its path."""


class NoRoom(MachineError):
    """A disk was full, or could no longer be written, in the middle of the work; with room the same command goes on."""


class Diverged(FtexpError, ArithmeticError):
    """Training left the finite numbers. A result of the trial, not a fault of the program."""

    exit_code = 5


class OutOfTime(FtexpError, TimeoutError):
    """A trial ran longer than the sweep allows."""

    exit_code = 5


class Pruned(FtexpError):
    """A trial was stopped because others did better. A result, not a fault."""

    exit_code = 0


class Skipped(FtexpError):
    """A trial passes a limit of its sweep, and such trials are to be left out. A result, not a fault."""

    exit_code = 0


class Unfaithful(FtexpError, ArithmeticError):
    """An exported model does not answer as the run it was made from; nothing of it is kept."""

    exit_code = 5


class Preempted(KeyboardInterrupt):
    """The process was asked to leave; what it was at can be gone on with. Passes every `except Exception`."""

    exit_code = 75


class Interrupted(Preempted):
    """The same, asked by ctrl-c: no scheduler is to start it again."""

    exit_code = 130


class HandedOver(Preempted):
    """A trial left its pack at a checkpoint, for another worker to go on with; the process goes on with the others."""


class TrialsFailed(FtexpError, RuntimeError):
    """A sweep ran to its end and some of its trials failed; the others are kept."""

    exit_code = 5


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, on the host or a GPU."""
    import torch

    texts = ("out of memory", "can't allocate memory", "alloc_failed")  # CUDA and MPS, PyTorch on a host, cuBLAS
    told = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)
