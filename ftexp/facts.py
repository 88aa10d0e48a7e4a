"""What a result depends on beside its config: versions, code, machine, time and memory."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ftexp.model import compute

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "mlflow",
    "hydra-core",
    "ftexp",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    from importlib.metadata import PackageNotFoundError

    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git(folder: Path) -> dict[str, str]:
    """Commit of the code in a folder and whether files differ from it; empty outside a checkout."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return {"commit": commit, "dirty": str(bool(ask("status", "--porcelain")))} if commit else {}


@cache
def code() -> str:
    """Hash the source of this package as it was when first asked: equal code gives equal digests anywhere."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


SHARE = "FTEXP_SLOTS_PER_GPU"
"""Environment variable: workers that share this one's GPU."""


def shared_gpu_gib() -> float | None:
    """Return this process's part of the memory of a GPU that others share; None where it has one to itself."""
    import torch

    sharing = int(os.environ.get(SHARE, "1"))
    if sharing == 1 or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30 / sharing


def reset_peak_memory() -> None:
    """Start a new high-water mark at what is in use, so that a trial does not inherit the one before it."""
    compute.give_back_pages()  # glibc keeps what an earlier trial freed
    if sys.modules.get("torch") and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def resident_gib() -> float:
    """Resident memory of the process now, what it freed given back first; its peak outside Linux."""
    import gc

    gc.collect()
    compute.give_back_pages()
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory_gib()["memory_gib"]
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**20


def peak_memory_gib() -> dict[str, float]:
    """Peak since `reset_peak_memory`: resident memory of the process, and of the GPU where there is one.

    Outside Linux the process figure is the peak since the process began.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak = {"memory_gib": int(line.split()[1]) / 2**20}
    else:
        scale = 2**30 if sys.platform == "darwin" else 2**20
        peak = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}
    if sys.modules.get("torch") and sys.modules["torch"].cuda.is_available():
        peak["gpu_memory_gib"] = sys.modules["torch"].cuda.max_memory_allocated() / 2**30
    return peak
