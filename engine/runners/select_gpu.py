"""Select the runner on a GPU: TensorRT if the bundle's plans fit, otherwise PyTorch."""

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
        raise UsageError("--precision int8 needs the CPU: add --device cpu")
    device = f"cuda:{index}"
    fitting, reason = find_fitting_plans(bundle, gpu, precision, batch_size)
    if runner == "tensorrt" and not fitting:
        raise UsageError(f"--runner tensorrt: {reason}")
    if fitting and runner in ("auto", "tensorrt"):
        text = f"TensorRT on {gpu.name}: plans/{fitting[0].passport.target} fits"
        return RunnerChoice(
            runner="tensorrt", device=device, precision=precision, reason=text, gpu=gpu, plans=fitting
        )
    if runner == "onnx":
        text = f"ONNX Runtime on {gpu.name}: requested"
    else:
        runner, text = "torch", f"PyTorch on {gpu.name}: {'requested' if runner == 'torch' else reason}"
    return RunnerChoice(runner=runner, device=device, precision=precision, reason=text, gpu=gpu)


def find_fitting_plans(
    bundle: Bundle, gpu: Gpu, precision: str, batch_size: int | None
) -> tuple[tuple[Plan, ...], str]:
    """Return the plans of the newest target that fits, or no plans and the reason in one line."""
    reason = f"the bundle has no plans; build them with: python -m build_engines {bundle.path}"
    for target, paths in plans.list_targets(bundle):
        try:
            candidates = [plans.load_plan(path) for path in paths]
        except UsageError as error:
            reason = str(error)
            continue
        if any(plan.passport.backend not in _DISTRIBUTIONS for plan in candidates):
            continue  # INT8 graphs for the CPU
        problem = plan_mismatch(bundle, candidates, gpu, precision, batch_size)
        if problem is None:
            return tuple(candidates), ""
        fix = fix_hint(candidates[0].passport, bundle.path, gpu, precision, batch_size)
        reason = f"plans/{target}: {problem}; {fix}"
    return (), reason


def fix_hint(passport: Passport, bundle: Path, gpu: Gpu, precision: str, batch_size: int | None) -> str:
    """Return the fix for a plan that does not fit, with its command."""
    if tensorrt_version(passport.backend) is None:
        return f"install it with: {install_command(EXTRAS[passport.backend])}"
    return passport.rebuild(bundle, precision=precision, batch_size=batch_size, capability=gpu.capability)


def plan_mismatch(
    bundle: Bundle, candidates: list[Plan], gpu: Gpu, precision: str, batch_size: int | None
) -> str | None:
    """Return why plans, one for each member, cannot run on `gpu`; None if they can."""
    for member, plan in zip(bundle.members, candidates, strict=True):
        passport = plan.passport
        if passport.precision != precision:
            return f"its precision is {passport.precision}, not {precision}"
        if problem := passport.problem(member, gpu, tensorrt_version(passport.backend)):
            return problem
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
