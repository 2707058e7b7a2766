"""Facts about GPUs, memory and processors of this machine."""

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
_CPU_HINT = "to run on the CPU: --device cpu"
# messages of PyTorch, Triton, cuBLAS, cuDNN and TensorRT
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|alloc_failed|unable to find an engine", re.IGNORECASE)


def require_gpu(index: int = 0, *, without: str = _CPU_HINT) -> Gpu:
    """Return GPU number `index`. Raises UsageError without PyTorch, CUDA, a recent driver, or the GPU.

    `without` is the end of the message: how to proceed without a GPU.
    """
    cuda = _import_torch(without).cuda
    try:
        cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old, no device
        reason = " ".join(str(error).split(". ")[0].split())[:200]
        raise UsageError(
            f"no usable GPU: {reason} (driver: {driver_version() or 'none'}; needed: r{MIN_DRIVER} or newer)"
            f"; {without}"
        ) from None
    count = cuda.device_count()
    if index >= count:
        allowed = ", ".join(f"cuda:{number}" for number in range(count)) or "none is visible"
        raise UsageError(f"--device cuda:{index}: there is no such GPU; allowed: {allowed}")
    properties = cuda.get_device_properties(index)
    return Gpu(
        name=properties.name,
        uuid=f"GPU-{properties.uuid}",
        capability=f"{properties.major}.{properties.minor}",
        driver=driver_version() or "unknown",
    )


def count_gpus() -> int:
    """Count the visible GPUs. Raises UsageError for none."""
    count = int(_import_torch(_CPU_HINT).cuda.device_count())
    if not count:
        require_gpu()  # raises the error with the reason
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
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else None


def _import_torch(without: str) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"a GPU needs PyTorch, which cannot be imported ({error}); install it with: "
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
    """Return the bytes that the kernel and the control group still allow."""
    free = _read_meminfo("MemAvailable")
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(free, max(0, limit - used))
    return free


def _read_meminfo(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


class Gpu(Record):
    """The facts that decide whether a plan fits a GPU, by NVIDIA's names."""

    name: str
    uuid: str
    capability: str  # "9.0"
    driver: str


def has_vnni() -> bool:
    """Return whether this CPU sums products of 8-bit numbers without overflow: on x86 only with VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_vnni", "avx_vnni"})


def processor_name() -> str:
    """Return the processor's marketing name, or its architecture where Linux does not know it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def available_cpus() -> int:
    """Return the CPUs that this process may use, by its affinity and the quota of its control group."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cpus if quota == "max" else max(1, min(cpus, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cpus
