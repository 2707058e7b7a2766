"""Select the runner, the device and the precision, and open the runner of a member."""

from __future__ import annotations

from engine.bundle.bundle import Bundle, Member
from engine.core.errors import UsageError
from engine.core.settings import RUNNERS
from engine.runners.base import Runner, RunnerChoice


def select_runner(
    runner: str, device: str, bundle: Bundle, *, precision: str | None, batch_size: int | None
) -> RunnerChoice:
    """Settle what the user left open ("auto", None). Raises UsageError for what can't be had here.

    A GPU that is there but can't be used is no reason to fail with "auto"; the reason is in the choice.
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
    from engine.runners import select_gpu as choice

    return choice.select_on_gpu(runner, int(number or 0), bundle, precision, batch_size)


def _select_anywhere(
    runner: str, bundle: Bundle, precision: str | None, batch_size: int | None
) -> RunnerChoice:
    from engine.core import hardware as machine
    from engine.runners import select_gpu as choice

    if not machine.has_gpu():
        return _select_on_cpu(runner, precision, bundle, "there is no GPU")
    try:
        machine.require_gpu()
    except UsageError as error:
        return _select_on_cpu(runner, precision, bundle, f"the GPU can't be used: {error}")
    return choice.select_on_gpu(runner, 0, bundle, precision, batch_size)


def _select_on_cpu(runner: str, precision: str | None, bundle: Bundle, reason: str) -> RunnerChoice:
    if runner not in ("auto", "onnx"):
        raise UsageError(f"--runner {runner} needs a GPU ({reason}); on the CPU: --runner onnx")
    if precision == "int8":
        from engine.bundle.plans import load_int8_graphs

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
    """Load a member as chosen. Raises UsageError when it can't be loaded.

    `compiled` is for the runner "torch": compile the module for its batch size.
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
