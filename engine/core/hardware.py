"""The GPU that this process would use, or one line that says why there is none."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engine.core.errors import UsageError
from engine.core.extras import install_command
from engine.core.json_records import Record

if TYPE_CHECKING:
    from types import ModuleType


MIN_DRIVER = 580  # its branch, for CUDA 13
_CPU_HINT = "the CPU does it too: --device cpu"


# how PyTorch, Triton, cuBLAS, cuDNN and TensorRT say it
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|alloc_failed|unable to find an engine", re.IGNORECASE)


def require_gpu(index: int = 0, *, without: str = _CPU_HINT) -> Gpu:
    """GPU number `index`. Raises UsageError without PyTorch, CUDA, a driver new enough, or the GPU.

    `without` is what can be done without one, for people.
    """
    cuda = _import_torch(without).cuda
    try:
        cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old, no device
        reason = " ".join(str(error).split(". ")[0].split())[:200]
        raise UsageError(
            f"no GPU: {reason} (driver: {driver_version() or 'none'}, needed: r{MIN_DRIVER} or "
            f"newer); {without}"
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
        driver=driver_version() or "unknown",
    )


def count_gpus() -> int:
    """Count the visible GPUs. Raises UsageError for none."""
    count = int(_import_torch(_CPU_HINT).cuda.device_count())
    if not count:
        require_gpu()  # says why
    return count


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out."""
    return bool(_OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"))


def has_gpu() -> bool:
    """Return whether the machine has an NVIDIA GPU, without importing anything."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def cuda_version() -> str | None:
    """Return the CUDA release that PyTorch is built for, None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def driver_version() -> str | None:
    """Return the version of NVIDIA's kernel driver, None without it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _import_torch(without: str) -> ModuleType:
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


def total_memory() -> int:
    return _read_meminfo("MemTotal")


def available_memory() -> int:
    """Return the bytes still available by the kernel and by the control group."""
    free = _read_meminfo("MemAvailable")
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(free, max(0, most - used))
    return free


def _read_meminfo(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


class Gpu(Record):
    """The facts that decide whether a plan fits a GPU, by NVIDIA's names."""

    name: str
    uuid: str
    capability: str  # "9.0"
    driver: str


def has_vnni() -> bool:
    """Return whether products of 8-bit numbers can be summed here without overflow: on x86 only with VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_vnni", "avx_vnni"})


def processor_name() -> str:
    """Return the processor's marketing name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def available_cpus() -> int:
    """CPUs this process may use: its affinity, and the quota of its control group where there is one."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cpus if quota == "max" else max(1, min(cpus, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cpus
