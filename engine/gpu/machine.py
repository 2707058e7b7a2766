"""The GPU that this process would use, or one line that says why there is none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import UsageError
from engine.installed import install_command
from engine.plans import Gpu

if TYPE_CHECKING:
    from types import ModuleType

MIN_DRIVER = 580  # its branch, for CUDA 13
_CPU = "the CPU does it too: --device cpu"


# how PyTorch, Triton, cuBLAS, cuDNN and TensorRT say it
_SHORTAGE = re.compile(r"out ?of ?memory|alloc_failed|unable to find an engine", re.IGNORECASE)


def gpu(index: int = 0, *, without: str = _CPU) -> Gpu:
    """GPU number `index`. Raises UsageError without PyTorch, CUDA, a driver new enough, or the GPU.

    `without` is what can be done without one, for people.
    """
    cuda = _torch(without).cuda
    try:
        cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old, no device
        reason = " ".join(str(error).split(". ")[0].split())[:200]
        raise UsageError(
            f"no GPU: {reason} (driver: {driver() or 'none'}, needed: r{MIN_DRIVER} or newer); {without}"
        ) from None
    count = cuda.device_count()
    if index >= count:
        allowed = ", ".join(f"cuda:{number}" for number in range(count)) or "none is visible"
        raise UsageError(f"--device cuda:{index}: there is no such GPU; allowed: {allowed}")
    found = cuda.get_device_properties(index)
    return Gpu(
        name=found.name,
        uuid=f"GPU-{found.uuid}",
        capability=f"{found.major}.{found.minor}",
        driver=driver() or "unknown",
    )


def count() -> int:
    """How many GPUs are visible. Raises UsageError for none."""
    count = int(_torch(_CPU).cuda.device_count())
    if not count:
        gpu()  # says why
    return count


def is_shortage(error: Exception) -> bool:
    """Whether what failed is out of memory."""
    return bool(_SHORTAGE.search(f"{type(error).__name__}: {error}"))


def present() -> bool:
    """Whether there is a GPU at all: cheap, without importing anything."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def cuda_version() -> str | None:
    """The CUDA release that PyTorch here is built for, None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def driver() -> str | None:
    """The version of NVIDIA's kernel driver, None without it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _torch(without: str) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"a GPU needs PyTorch, which can't be imported ({error}); install it with: "
            f"{install_command('gpu')}; {without}"
        ) from None
    if torch.version.cuda is None:
        raise UsageError(
            f"this PyTorch ({torch.__version__}) is built without CUDA; install it with: "
            f"{install_command('gpu')}; {without}"
        )
    return torch
