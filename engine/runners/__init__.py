"""Runners execute one member: pixels to logits. A back end is imported only when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from engine.bundle import Bundle, Member
from engine.errors import UsageError
from engine.settings import RUNNERS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from engine.plans import Gpu, Plan


class Runner(Protocol):
    """One member, ready to run."""

    name: str
    versions: dict[str, str]

    @property
    def input_shape(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        ...

    def enqueue(self, pixels: Any, logits: Any, stream: Any) -> npt.NDArray[np.float32] | None:
        """uint8 [N, 1, H, W] to float32 [N, C], into the buffer given.

        Returns how far the features are from the usual ones [N], where the back end says (`engine.distance`).

        On a GPU both are tensors there, and the work is done in the order of the CUDA stream. On the CPU both
        are NumPy arrays, `stream` is None, the work is done on return, and any thread may call.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs the members, and why."""

    runner: str
    device: str  # "cpu" or "cuda:0"
    precision: str
    reason: str  # one line, for the log
    gpu: Gpu | None = None
    plans: tuple[Plan, ...] = ()  # one a member: TensorRT's, or INT8 graphs on the CPU

    @property
    def plan_hashes(self) -> dict[str, str] | None:
        """sha256 of each member's plan, None where there are no plans."""
        return {plan.passport.member: plan.passport.plan_sha256 for plan in self.plans} or None

    @property
    def kind(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    @property
    def index(self) -> int:
        """The number of the GPU."""
        return int(self.device.split(":")[1])

    @property
    def gives_distances(self) -> bool:
        """Whether it tells what is out of distribution: only the float32 graphs on the CPU do."""
        return self.device == "cpu" and not self.plans


def choose(
    runner: str, device: str, bundle: Bundle, *, precision: str | None, batch_size: int | None
) -> Choice:
    """Settle what the user left open ("auto", None). Raises UsageError for what can't be had here.

    A GPU that is there but can't be used is no reason to fail with "auto"; the reason is in the choice.
    """
    if runner not in ("auto", *RUNNERS):
        raise UsageError(f"--runner {runner}: allowed: {', '.join(('auto', *RUNNERS))}")
    if device == "cpu":
        return _on_cpu(runner, precision, bundle, "asked for")
    if device == "auto":
        return _wherever(runner, bundle, precision, batch_size)
    prefix, _, number = device.partition(":")
    if prefix != "cuda" or not (number or "0").isdecimal():
        raise UsageError(f"--device {device}: allowed: auto, cpu, cuda:N, and cuda:all for a run")
    from engine.gpu import choice

    return choice.on_gpu(runner, int(number or 0), bundle, precision, batch_size)


def _wherever(runner: str, bundle: Bundle, precision: str | None, batch_size: int | None) -> Choice:
    from engine.gpu import choice, machine

    if not machine.present():
        return _on_cpu(runner, precision, bundle, "there is no GPU")
    try:
        machine.gpu()
    except UsageError as error:
        return _on_cpu(runner, precision, bundle, f"the GPU can't be used: {error}")
    return choice.on_gpu(runner, 0, bundle, precision, batch_size)


def _on_cpu(runner: str, precision: str | None, bundle: Bundle, reason: str) -> Choice:
    if runner not in ("auto", "onnx"):
        raise UsageError(f"--runner {runner} needs a GPU ({reason}); on the CPU: --runner onnx")
    if precision == "int8":
        from engine.plans import quantized

        text = f"ONNX Runtime on the CPU, INT8: {reason}"
        return Choice(runner="onnx", device="cpu", precision="int8", reason=text, plans=quantized(bundle))
    if precision not in (None, "fp32"):
        raise UsageError(f"--precision {precision} needs a GPU ({reason}); on the CPU: fp32 or int8")
    return Choice(runner="onnx", device="cpu", precision="fp32", reason=f"ONNX Runtime on the CPU: {reason}")


def open_runner(choice: Choice, bundle: Bundle, member: Member, *, compiled: bool = False) -> Runner:
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
