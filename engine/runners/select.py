"""Select the runner, the device and the precision, and open the runner of a member."""

from __future__ import annotations

from engine.bundle.bundle import Bundle, Member
from engine.bundle.plans import load_int8_graphs
from engine.core import hardware
from engine.core.errors import UsageError
from engine.core.settings import RUNNERS
from engine.runners.base import Runner, RunnerChoice
from engine.runners.select_gpu import select_on_gpu


def select_runner(
    runner: str, device: str, bundle: Bundle, *, precision: str | None, batch_size: int | None
) -> RunnerChoice:
    """Choose what the user left open ("auto", None). Raises UsageError if the request cannot be met here.

    With "auto", a GPU that cannot be used does not fail; the reason is in the choice.
    """
    if runner not in ("auto", *RUNNERS):
        raise UsageError(f"--runner {runner}: allowed: {', '.join(('auto', *RUNNERS))}")
    if device == "cpu":
        return _select_on_cpu(runner, precision, bundle, "requested")
    if device == "auto":
        return _select_anywhere(runner, bundle, precision, batch_size)
    prefix, _, number = device.partition(":")
    if prefix != "cuda" or not (number or "0").isdecimal():
        raise UsageError(f"--device {device}: allowed: auto, cpu, cuda:N, and cuda:all for a run")
    return select_on_gpu(runner, int(number or 0), bundle, precision, batch_size)


def _select_anywhere(
    runner: str, bundle: Bundle, precision: str | None, batch_size: int | None
) -> RunnerChoice:
    if not hardware.has_gpu():
        return _select_on_cpu(runner, precision, bundle, "there is no GPU")
    try:
        hardware.require_gpu()
    except UsageError as error:
        return _select_on_cpu(runner, precision, bundle, f"the GPU cannot be used: {error}")
    return select_on_gpu(runner, 0, bundle, precision, batch_size)


def _select_on_cpu(runner: str, precision: str | None, bundle: Bundle, reason: str) -> RunnerChoice:
    if runner not in ("auto", "onnx"):
        raise UsageError(f"--runner {runner} needs a GPU ({reason}); on the CPU: --runner onnx")
    if precision == "int8":
        text = f"ONNX Runtime on the CPU, INT8: {reason}"
        return RunnerChoice(
            runner="onnx", device="cpu", precision="int8", reason=text, plans=load_int8_graphs(bundle)
        )
    if precision not in (None, "fp32"):
        raise UsageError(f"--precision {precision} needs a GPU ({reason}); on the CPU: fp32 or int8")
    return RunnerChoice(
        runner="onnx", device="cpu", precision="fp32", reason=f"ONNX Runtime on the CPU: {reason}"
    )


def open_runner(choice: RunnerChoice, bundle: Bundle, member: Member, *, compiled: bool = False) -> Runner:
    """Load a member with the chosen runner. Raises UsageError when it cannot be loaded.

    With `compiled`, the runner "torch" compiles the module for each batch size.
    """
    plan = next((plan for plan in choice.plans if plan.passport.member == member.name), None)
    if choice.runner == "tensorrt":
        from engine.runners.tensorrt import TensorRTRunner

        assert plan
        return TensorRTRunner(member, bundle, plan)
    if choice.runner == "torch":
        from engine.runners.torch import TorchRunner

        return TorchRunner(
            member, bundle, device=choice.device, half=choice.precision == "fp16", compiled=compiled
        )
    if choice.device != "cpu":
        from engine.runners.onnx import CudaOnnxRunner

        return CudaOnnxRunner(member, bundle, device=choice.device, half=choice.precision == "fp16")
    from engine.runners.onnx import OnnxRunner

    return OnnxRunner(member, bundle, graph=plan.usable(bundle.path) if plan else None)
