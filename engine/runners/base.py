"""A runner executes one member: pixels to logits. A back end is imported only when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from engine.bundle.plans import Plan
    from engine.core.hardware import Gpu


class Runner(Protocol):
    """A loaded member."""

    name: str
    versions: dict[str, str]

    @property
    def input_shape(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        ...

    def enqueue(self, pixels: Any, logits: Any, stream: Any) -> npt.NDArray[np.float32] | None:
        """Compute logits, float32 [N, C], of pixels, uint8 [N, 1, H, W], into the given buffer.

        Returns the distances [N] of the features to those of the calibration images, if the graph has them.
        On a GPU both are tensors there, and the work is done in the order of the CUDA stream. On the CPU both
        are NumPy arrays, `stream` is None, the work is done on return, and any thread may call this.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RunnerChoice:
    """The runner of the members and the reason for it."""

    runner: str
    device: str  # "cpu" or "cuda:0"
    precision: str
    reason: str  # one line, for the log
    gpu: Gpu | None = None
    plans: tuple[Plan, ...] = ()  # one for each member: of TensorRT, or INT8 graphs on the CPU

    @property
    def plan_hashes(self) -> dict[str, str] | None:
        """Return the sha256 of each member's plan, None without plans."""
        return {plan.passport.member: plan.passport.plan_sha256 for plan in self.plans} or None

    @property
    def kind(self) -> str:
        """Return the device without its number: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    @property
    def index(self) -> int:
        """Return the number of the GPU."""
        return int(self.device.split(":")[1])

    @property
    def gives_distances(self) -> bool:
        """Return whether the runner computes distances: only the float32 graphs on the CPU do."""
        return self.device == "cpu" and not self.plans
