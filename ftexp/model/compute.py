"""The compute policy: which number format, matrix kernel and attention the device runs fastest with the same result.

Chosen by a probe of about a second and kept in the cache, so that the same command on the same machine makes the
same choice and gives the same bits. Everything chosen is recorded with the run.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ftexp import machine
from ftexp.config import Attention, Dtype, Model
from ftexp.errors import MachineError
from ftexp.files import cache, read_json, write_json

if TYPE_CHECKING:
    import torch

CLEARLY = 1.15
"""A choice must be this many times faster than PyTorch's default to be taken."""
EXACT = 3e-6
"""Largest relative error a float32 product may have against float64 (64 terms of rounding at 6e-8)."""


@dataclass(frozen=True)
class Compute:
    """How a run computes."""

    device: str
    """`cuda` or `cpu`."""
    dtype: str
    """Format of the base weights: float32, bfloat16 or float16."""
    kernel: str
    """Float32 matrix products on CPUs: `default` (PyTorch's BLAS) or `onednn`."""
    attention: str
    """Name of the attention implementation in transformers."""
    chip: str
    """What it was chosen for."""
    threads: int
    """Threads of a matrix product on a CPU; on some chips another number rounds otherwise."""


GPUS = re.compile(r"\s*(\d|GPU-|MIG-)")
"""Begins a list of GPUs; -1 and nothing mean none."""
LONG = 1024
"""Tokens from which plain attention on a CPU is no faster than a fused one, whose memory does not grow with the square.

Forward and backward, bfloat16 on a Zen 4 core, plain over fused: 0.35 at 64 tokens, 0.6 at 128 to 512, 1.05 at 1024."""


def policy(model: Model, longest: int = 0) -> Compute:
    """Choose how to compute, respecting what `model.dtype` and `model.attention` say.

    Args:
        model: the model's config.
        longest: tokens of the longest row, or pack, that it is to train on; 0 where it only answers.

    Raises:
        MachineError: the environment names GPUs, and PyTorch sees none.
    """
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if GPUS.match(named) and not torch.cuda.is_available():
        raise MachineError(
            f"CUDA_VISIBLE_DEVICES={named} names GPUs and PyTorch {torch.__version__} sees none: is the driver there, "
            "and PyTorch built for CUDA? Without the variable it computes on the CPU"
        )
    if torch.cuda.is_available():
        chip, device, kernel = torch.cuda.get_device_name(), "cuda", "default"
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        attention = "sdpa"
    else:
        keep_to_quota()
        chip, device = _chip(), "cpu"
        dtype, kernel = _cpu_choice(chip)
        attention = "sdpa" if longest >= LONG else "eager"
    if model.dtype is not Dtype.auto:
        dtype = model.dtype.value
    if model.attention is not Attention.auto:
        attention = model.attention.value
    return Compute(device, dtype, kernel, attention, chip, torch.get_num_threads())


def has_gpu() -> bool:
    """Whether PyTorch computes on a GPU here."""
    import torch

    return torch.cuda.is_available()


def keep_to_quota() -> None:
    """Compute with no more threads than a container has cores' time for; what a person set stays.

    PyTorch counts the cores of the host. Threads beyond the quota wait for each other while the container is stopped.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and machine.cores() < torch.get_num_threads():
        torch.set_num_threads(machine.cores())


def is_lost() -> bool:
    """Whether an error on the GPU has left this process without it: CUDA answers each further call with that error."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def apply(compute: Compute) -> None:
    """Set what the policy chose for the whole process."""
    import torch

    if compute.device == "cpu":
        # Sends float32 products to oneDNN. On chips with bfloat16 units this flag would also round; the probe
        # has measured that it does not here.
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if compute.kernel == "onednn" else "none"  # type: ignore
        keep_pages()


MMAP_THRESHOLD, TRIM_THRESHOLD, LARGE = -3, -1, 2**30
"""Parameters of glibc's `mallopt`, and the size in bytes from which memory goes back to the system when it is freed."""


def keep_pages() -> None:
    """Have freed memory used again, instead of handed to the system and taken anew, page by page and zeroed.

    By itself glibc hands back blocks of 32 MiB and more, and what is free at the end of its heap. A pass over a model
    allocates and frees some GB, and a fault of a page costs up to 3 microseconds on a virtual machine. Measured on two
    Zen 4 cores: 8 to 12 % of a training step. The peak stays as it is. Settings of a person (`MALLOC_*_`) stay.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(MMAP_THRESHOLD, LARGE)
        mallopt(TRIM_THRESHOLD, -1)


def give_back_pages() -> None:
    """Hand free memory to the system: a model was dropped, or memory is to be measured."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _chip() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; where it does not, PyTorch is some hundred times slower."""
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _cpu_choice(chip: str) -> tuple[str, str]:
    """Return dtype and kernel for this CPU, probing on first use."""
    import torch

    key = sha256(f"{chip} {torch.__version__} {torch.get_num_threads()} {has_bfloat16()}".encode()).hexdigest()[:16]
    kept = cache() / "compute" / f"{key}.json"
    choice = read_json(kept)
    if choice is None:
        choice = {"chip": chip, "torch": torch.__version__, **asdict(measure())}
        write_json(kept, choice)
    return choice["dtype"], choice["kernel"]


@dataclass(frozen=True)
class Probe:
    """What a probe measured: seconds for the same products, and what follows."""

    seconds: dict[str, float]
    """Seconds by way of computing."""
    onednn_error: float
    """Largest relative error of float32 through oneDNN against float64."""
    dtype: str
    kernel: str


def measure() -> Probe:
    """Time the layers of a small model (256 tokens, 576 x 1536) in each way this CPU has.

    The 24 matrices together are larger than a CPU's caches, as a model's are: kernels that look equal on one matrix
    differ once it has to come from memory.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, w = torch.randn(256, 576), [torch.randn(1536, 576) for _ in range(24)]
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore
        seconds = {"default": _fastest(x, w)}
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore
        seconds["onednn"] = _fastest(x, w)
        error = _error(x, w[0])
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore
    if has_bfloat16():
        seconds["bfloat16"] = _fastest(x.bfloat16(), [m.bfloat16() for m in w])
    return choose(seconds, error)


def choose(seconds: dict[str, float], error: float) -> Probe:
    """Take a faster way only where it is clearly faster, and oneDNN only where float32 stays float32."""
    onednn = error < EXACT and seconds["onednn"] * CLEARLY < seconds["default"]
    kernel = "onednn" if onednn else "default"
    half = seconds.get("bfloat16", float("inf")) * CLEARLY < seconds[kernel]
    return Probe(seconds, error, "bfloat16" if half else "float32", kernel)


def _fastest(x: torch.Tensor, matrices: list[torch.Tensor]) -> float:
    """Seconds of the fastest of several passes: whatever else the machine does only ever adds time."""
    import torch

    times = []
    for _ in range(6):
        start = time.perf_counter()
        for w in matrices:
            torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - start)
    return min(times)


def _error(x: torch.Tensor, w: torch.Tensor) -> float:
    true = x.double() @ w.double().T
    return float(((x @ w.T).double() - true).abs().max() / true.abs().max())
