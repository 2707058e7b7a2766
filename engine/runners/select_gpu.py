"""Select the runner of a GPU: plans when they fit, else PyTorch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.bundle import plans
from engine.bundle.bundle import Bundle
from engine.bundle.plans import Passport, Plan
from engine.core import hardware
from engine.core.errors import UsageError
from engine.core.extras import install_command
from engine.core.hardware import Gpu
from engine.runners.base import RunnerChoice
from engine.runners.tensorrt import EXTRAS

_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
}


def select_on_gpu(
    runner: str, index: int, bundle: Bundle, precision: str | None, batch_size: int | None
) -> RunnerChoice:
    """Select the runner on GPU number `index`. Raises UsageError when the request cannot be met there."""
    gpu = hardware.require_gpu(index)
    precision = precision or "fp16"
    if precision == "int8":
        raise UsageError("--precision int8 is for the CPU: give --device cpu too")
    device = f"cuda:{index}"
    found, reason = find_fitting_plans(bundle, gpu, precision, batch_size)
    if runner == "tensorrt" and not found:
        raise UsageError(f"--runner tensorrt: {reason}")
    if found and runner in ("auto", "tensorrt"):
        text = f"TensorRT on {gpu.name}: plans/{found[0].passport.target} fits"
        return RunnerChoice(
            runner="tensorrt", device=device, precision=precision, reason=text, gpu=gpu, plans=found
        )
    if runner == "onnx":
        text = f"ONNX Runtime on {gpu.name}: requested"
    else:
        runner, text = "torch", f"PyTorch on {gpu.name}: {'requested' if runner == 'torch' else reason}"
    return RunnerChoice(runner=runner, device=device, precision=precision, reason=text, gpu=gpu)


def find_fitting_plans(
    bundle: Bundle, gpu: Gpu, precision: str, batch_size: int | None
) -> tuple[tuple[Plan, ...], str]:
    """Find the newest target whose plans all fit, or return one line that says why none does."""
    reason = f"the bundle has no plans; build them with: python -m build_engines {bundle.path}"
    for target, paths in plans.list_targets(bundle):
        try:
            found = [plans.load_plan(path) for path in paths]
        except UsageError as error:
            reason = str(error)
            continue
        if any(plan.passport.backend not in _DISTRIBUTIONS for plan in found):
            continue  # INT8 graphs for the CPU
        why_not = plan_mismatch(bundle, found, gpu, precision, batch_size)
        if why_not is None:
            return tuple(found), ""
        fix = fix_hint(found[0].passport, bundle.path, gpu, precision, batch_size)
        reason = f"plans/{target}: {why_not}; {fix}"
    return (), reason


def fix_hint(passport: Passport, bundle: Path, gpu: Gpu, precision: str, batch_size: int | None) -> str:
    """Return what to do about a plan that does not fit, ending in a command."""
    if tensorrt_version(passport.backend) is None:
        return f"install it with: {install_command(EXTRAS[passport.backend])}"
    return passport.rebuild(bundle, precision=precision, batch_size=batch_size, capability=gpu.capability)


def plan_mismatch(
    bundle: Bundle, found: list[Plan], gpu: Gpu, precision: str, batch_size: int | None
) -> str | None:
    """Why plans, one a member, can't run there; None when they can."""
    for member, plan in zip(bundle.members, found, strict=True):
        passport = plan.passport
        if passport.precision != precision:
            return f"it is {passport.precision}, not {precision}"
        if why_not := passport.problem(member, gpu, tensorrt_version(passport.backend)):
            return why_not
        if batch_size and batch_size > passport.max_batch:
            return f"it takes at most {passport.max_batch} images a batch, not {batch_size}"
    return None


def tensorrt_version(backend: str) -> str | None:
    """Return the installed version of TensorRT or TensorRT for RTX, without importing it."""
    for name in _DISTRIBUTIONS[backend]:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
