"""`python -m ftexp.sweep.torchrun K FOLDER`: a worker as K processes, one trial over all of them.

torchrun starts them, ends all when one dies, and passes signals on. What is added is the exit code: torchrun's own is 1
however a worker ended, and a supervisor tells a worker that was asked to leave from one that died.
"""

from __future__ import annotations

import logging
import sys

from ftexp.sweep.worker import PREEMPTED

SIGNALS = "SIGTERM,SIGINT,SIGUSR2"


def main() -> int:
    """Run the command line; return the exit code of the first process, or of the one that ended it."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    processes, folder = sys.argv[1:]
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    words = ["--standalone", f"--nproc-per-node={processes}", f"--signals-to-handle={SIGNALS}"]
    try:
        run.run(run.parse_args([*words, "-m", "ftexp.sweep.worker", folder]))
    except SignalException:
        return PREEMPTED
    except ChildFailedError as error:
        first = error.failures.get(0, error.get_first_failure()[1])
        return first.exitcode if first.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
