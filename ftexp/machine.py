"""What the machine gives this process: cores and memory, of a container no more than its limits."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where the limits of a container are."""


def limit(name: str) -> str:
    """Read a limit of the container; empty where there is none."""
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""


def cores() -> int:
    """Count the cores this process may use, where a container has a quota of their time no more than that."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for told in (limit("cpu.max").split(), [limit("cpu/cpu.cfs_quota_us"), limit("cpu/cpu.cfs_period_us")]):
        if len(told) == 2 and all(value.isdecimal() for value in told):
            return max(1, min(seen, int(told[0]) // int(told[1])))
    return seen


def free_memory() -> int:
    """Bytes of the host's memory that are free, where a container has a limit what is left of it."""
    import psutil

    free = psutil.virtual_memory().available
    for most, used in (("memory.max", "memory.current"),
                       ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):  # fmt: skip
        if limit(most).isdecimal() and limit(used).isdecimal():
            free = min(free, int(limit(most)) - int(limit(used)))
    return max(0, free)
