"""Define the options of a training as frozen dataclasses with defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from engine.core.errors import UsageError
from engine.core.settings import Decode

Schedule = Literal["cosine", "plateau"]
Balance = Literal["loss", "sampling"]
Duplicates = Literal["group", "drop", "ignore"]
Normalization = Literal["none", "imagenet"]

MIN_SIDE = 32  # pixels
MAX_SIDE = 4096
MAX_FOLDS = 20
_RUN_ONLY = ("output", "device", "overwrite", "resume", "check_data")  # may differ when a training is resumed


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of one phase: the head alone on cached features, or the whole network."""

    epochs: int  # at most
    patience: int  # epochs without a better validation score
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 1e-2
    schedule: Schedule = "cosine"
    balance: Balance = "loss"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of `python -m training`. Defaults that depend on the weights are None."""

    data: Path
    output: Path
    # data
    classes: Sequence[str] | None = None  # None: those of the data
    path_column: str | None = None
    label_column: str = "label"
    root: Path | None = None
    duplicates: Duplicates = "group"
    allow_leak: bool = False
    check_data: bool = False
    # members
    members: Sequence[str] = ("resnet50", "inception_v3")  # torchvision's names
    weights: Sequence[str] = ("imagenet",)  # one for all members, or one per member
    size: tuple[int, int] = (224, 224)  # height, width
    normalization: Normalization = "none"
    decode: Decode = "exact"  # of JPEG; screening has to do the same
    # recipe
    freeze: bool = False
    copies: int = 4  # augmented copies of each training image whose features are cached
    head_epochs: int = 200
    head_rate: float = 1e-3
    epochs: int | None = None  # of the whole network: 40, or 150 from random weights
    rate: float | None = None  # of the whole network: 1e-4, or 1e-3 from random weights
    patience: int | None = None  # 40 epochs of the head; 10 of the whole network, or 40 from random weights
    batch_size: int = 32
    schedule: Schedule = "cosine"
    balance: Balance = "loss"
    temperature_scaling: bool = False
    folds: int = 0
    seed: int = 0
    # the run
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError with the value and what is allowed."""
        _check_at_least("--copies", self.copies, 0)
        _check_at_least("--seed", self.seed, 0)
        for name in ("head_epochs", "epochs", "patience", "batch_size"):
            _check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        for name, value in (("--head-rate", self.head_rate), ("--rate", self.rate)):
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"{name} {value}: allowed: above 0 and at most 1, usually 1e-5 to 1e-2")
        if not (self.folds == 0 or 2 <= self.folds <= MAX_FOLDS):
            raise UsageError(f"--folds {self.folds}: allowed: 2 to {MAX_FOLDS}, or 0 for none")
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in self.size):
            height, width = self.size
            raise UsageError(f"--size {height} {width}: allowed: {MIN_SIDE} to {MAX_SIDE} for each")
        if len(self.weights) not in (1, len(self.members)):
            raise UsageError(
                f"--weights: {len(self.weights)} values for {len(self.members)} members; "
                "allowed: one for all, or one for each"
            )

    def weights_of(self, member: int) -> str:
        return self.weights[0] if len(self.weights) == 1 else self.weights[member]

    def head(self, seed: int) -> FitOptions:
        """Return the options of the first phase, in which the base is frozen."""
        return self._fitting(self.head_epochs, self.patience or 40, self.head_rate, seed)

    def whole(self, weights: str, seed: int) -> FitOptions:
        """Return the options of the second phase, which trains all layers at a lower rate."""
        epochs, patience, rate = (150, 40, 1e-3) if weights == "none" else (40, 10, 1e-4)
        return self._fitting(self.epochs or epochs, self.patience or patience, self.rate or rate, seed)

    def _fitting(self, epochs: int, patience: int, rate: float, seed: int) -> FitOptions:
        return FitOptions(
            epochs=epochs,
            patience=patience,
            learning_rate=rate,
            batch_size=self.batch_size,
            schedule=self.schedule,
            balance=self.balance,
            seed=seed,
        )

    def recorded(self) -> dict[str, Any]:
        """Return the options that determine the result, JSON-ready; a resumed training must have the same."""
        values = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in _RUN_ONLY
        }
        return {name: _to_json(value) for name, value in values.items()}


def literal_choices(literal: Any) -> tuple[str, ...]:
    """Return the values that a Literal type allows, for argparse."""
    return get_args(literal)


def _check_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UsageError(f"{name} {value}: allowed: at least {least}")


def _to_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return list(value) if isinstance(value, (tuple, list)) else value
