"""Train in both phases: schedule, mixed precision, early stopping, a checkpoint per epoch."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.errors import EngineError
from engine.stats.classification import macro_f1
from training.listing import Labels
from training.phases.features import infer
from training.settings import FitOptions

WARM_UP_EPOCHS = 3  # epochs in which the rate rises
MAX_GRADIENT_NORM = 1.0  # norm over all parameters
Batch = tuple[Tensor, Tensor]  # inputs [n, ...], labels [n], on the device


@dataclass(frozen=True)
class Epoch:
    epoch: int  # from 1
    train_loss: float
    validation_loss: float
    validation_macro_f1: float
    learning_rate: float

    @property
    def rank(self) -> tuple[float, float]:
        """Return the rank; larger is better."""
        return self.score, -self.validation_loss

    @property
    def score(self) -> float:
        return round(self.validation_macro_f1, 9)


@dataclass
class FitResult:
    """The result of a fit; the module itself holds the best epoch's weights."""

    history: list[Epoch] = field(default_factory=list)

    @property
    def best(self) -> Epoch:
        return max(self.history, key=lambda epoch: epoch.rank)  # the first of equals

    def epochs_without_gain(self) -> int:
        """Return the number of epochs since macro-F1 last rose; a falling loss doesn't count."""
        return self.history[-1].epoch - max(self.history, key=lambda epoch: epoch.score).epoch


def epoch_batches(
    labels: Labels, fitting: FitOptions, epoch: int
) -> Iterator[tuple[Labels, np.random.Generator]]:
    """Yield the positions of each batch of an epoch; --balance sampling draws classes equally often."""
    rng = np.random.default_rng((fitting.seed, 1, epoch))
    order = rng.permutation(len(labels))
    if fitting.balance == "sampling":
        share = 1 / np.bincount(labels)[labels]
        order = rng.choice(len(labels), len(labels), p=share / share.sum())
    for positions in np.array_split(order, -(-len(order) // fitting.batch_size)):
        yield positions, rng


def fit_module(
    module: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    validation: Batch,
    fitting: FitOptions,
    *,
    class_weights: Tensor | None,
    checkpoint: Path,
    device: torch.device,
    progress: Callable[[Epoch], None],
    before_validation: Callable[[], None] = lambda: None,
) -> FitResult:
    """Train `module` in place on `batches(epoch)` with AdamW; the best epoch on `validation` stays.

    The best epoch has the highest macro-F1, then the lowest loss; training ends after `patience` epochs
    without a higher macro-F1. An existing `checkpoint` is continued. Random draws depend only on seed and
    epoch, so on a CPU a resumed training gives the result of an uninterrupted one. Raises
    EngineError if a loss is not finite.
    """
    state = _FitState(module, fitting, device)
    result = state.resume(checkpoint)
    for epoch in result.history:
        progress(epoch)
    loss_of = nn.CrossEntropyLoss(weight=None if class_weights is None else class_weights.to(device))
    while not _is_finished(result, fitting):
        number = len(result.history) + 1
        rate = state.optimizer.param_groups[0]["lr"]
        train_loss = state.epoch(batches(number), loss_of, number)
        before_validation()
        score, loss = _validate(module, validation, class_weights, device)
        for name, value in (("training", train_loss), ("validation", loss)):
            if not math.isfinite(value):
                raise EngineError(
                    f"epoch {number}: the {name} loss is {value}; set a lower learning rate than {rate:.3g}"
                )
        result.history.append(Epoch(number, train_loss, loss, score, rate))
        state.step(result)
        state.save(checkpoint, result)
        progress(result.history[-1])
    module.load_state_dict(state.best)
    return result


def _is_finished(result: FitResult, fitting: FitOptions) -> bool:
    return len(result.history) >= fitting.epochs or bool(
        result.history and result.epochs_without_gain() >= fitting.patience
    )


class _FitState:
    """The content of a checkpoint: current and best weights, optimizer, schedule, loss scale."""

    def __init__(self, module: nn.Module, fitting: FitOptions, device: torch.device) -> None:
        self.module, self.fitting, self.device = module, fitting, device
        self.best = copy.deepcopy(module.state_dict())
        self.optimizer = torch.optim.AdamW(_parameter_groups(module, fitting), lr=fitting.learning_rate)
        self.schedule = _schedule(self.optimizer, fitting)
        self.half = torch.bfloat16
        if device.type == "cuda" and not torch.cuda.is_bf16_supported():
            self.half = torch.float16
        self.scaler = torch.GradScaler(
            device.type, enabled=device.type == "cuda" and self.half == torch.float16
        )

    def epoch(self, batches: Iterable[Batch], loss_of: nn.Module, number: int) -> float:
        """Train on all training images once; return the mean loss."""
        torch.manual_seed(self.fitting.seed * 100_003 + number)  # dropout
        self.module.train()
        total = torch.zeros((), device=self.device)
        images = 0
        for inputs, labels in batches:
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, self.half, enabled=self.device.type == "cuda"):
                logits = self.module(inputs)
            loss = loss_of(logits.float(), labels)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), MAX_GRADIENT_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss.detach() * len(labels)  # stays on the device, so steps do not synchronize
            images += len(labels)
        return float(total) / images

    def step(self, result: FitResult) -> None:
        """Set the next learning rate after an epoch, and store the weights if they are the best."""
        if result.best is result.history[-1]:
            self.best = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(result.history[-1].validation_macro_f1)
        else:
            self.schedule.step()

    def save(self, path: Path, result: FitResult) -> None:
        """Save atomically, so that an interrupted save leaves the previous checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        content = io.BytesIO()  # torch.save hides errors of a file
        torch.save(self._parts() | {"history": [asdict(epoch) for epoch in result.history]}, content)
        with temporary.open("wb") as opened:
            opened.write(content.getbuffer())
            opened.flush()
            os.fsync(opened.fileno())
        temporary.rename(path)

    def resume(self, path: Path) -> FitResult:
        if not path.exists():
            return FitResult()
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            self.module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.scaler.load_state_dict(saved["scaler"])
            self.best = saved["best"]
            return FitResult([Epoch(**epoch) for epoch in saved["history"]])
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError):
            raise EngineError(f"checkpoint {path} can't be read; to start again, set --overwrite") from None

    def _parts(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


def _parameter_groups(module: nn.Module, fitting: FitOptions) -> list[dict[str, Any]]:
    """Return parameter groups: weight decay for matrices and filters, none for biases and norms."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": fitting.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _schedule(optimizer: torch.optim.Optimizer, fitting: FitOptions) -> Any:
    schedulers = torch.optim.lr_scheduler
    if fitting.schedule == "plateau":
        patience = max(1, fitting.patience // 3)
        return schedulers.ReduceLROnPlateau(optimizer, mode="max", factor=0.3, patience=patience)
    warm_up = min(WARM_UP_EPOCHS, max(1, fitting.epochs // 10))
    return schedulers.SequentialLR(
        optimizer,
        [
            schedulers.LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up),
            schedulers.CosineAnnealingLR(
                optimizer, max(1, fitting.epochs - warm_up), fitting.learning_rate / 100
            ),
        ],
        [warm_up],
    )


def _validate(
    module: nn.Module, validation: Batch, class_weights: Tensor | None, device: torch.device
) -> tuple[float, float]:
    """Return macro-F1 and loss."""
    inputs, labels = validation
    logits = infer(module, inputs, device=device)  # [N, C]
    loss = nn.functional.cross_entropy(logits, labels, class_weights)
    return macro_f1(labels.numpy(), logits.argmax(dim=1).numpy(), classes=logits.shape[1]), float(loss)
