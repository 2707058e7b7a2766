"""Runners execute one member: pixels to logits. A back end is imported only when it is chosen."""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from engine.bundle import Bundle, Member
from engine.errors import UsageError

RUNNERS = ("onnx",)


class Runner(Protocol):
    """One member, ready to run. `infer` may be called from several threads at once."""

    name: str
    versions: dict[str, str]

    @property
    def input_shape(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        ...

    def infer(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 [N, 1, H, W] to float32 logits [N, C]."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def choose(runner: str, device: str) -> tuple[str, str]:
    """Names of the runner and the device for what the user asked; "auto" means the best that is here."""
    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: this version screens on the CPU; allowed: auto, cpu")
    if runner not in ("auto", *RUNNERS):
        raise UsageError(f"--runner {runner}: allowed: {', '.join(('auto', *RUNNERS))}")
    return ("onnx" if runner == "auto" else runner), "cpu"


def open_runner(kind: str, bundle: Bundle, member: Member) -> Runner:
    """Load a member for the runner `kind`. Raises UsageError when it can't be loaded."""
    assert kind == "onnx", kind
    from engine.runners.onnx import OnnxRunner

    return OnnxRunner(member, bundle)
