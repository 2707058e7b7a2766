"""What a training is asked to do: frozen dataclasses whose defaults the command line shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How a head is fitted."""

    epochs: int = 200  # at most
    patience: int = 40  # epochs without a better validation score
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m training`."""

    data: Path
    output: Path
    members: Sequence[str] = ("resnet50", "inception_v3")  # architectures
    weights: Sequence[str] = ("imagenet",)  # one for all members, or one per member
    classes: Sequence[str] | None = None  # None: the sorted folder names
    size: tuple[int, int] = (224, 224)  # height, width
    epochs: int = Fitting.epochs
    seed: int = 0
    overwrite: bool = False
