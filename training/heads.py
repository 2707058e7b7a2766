"""Heads on frozen features: calibrate the base, extract once, fit, fold the scaling into the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.errors import EngineError
from training.data import Labels, Pixels, Split
from training.metrics import macro_f1
from training.models import PixelsToLogits
from training.settings import Fitting

FEATURE_BATCH = 16  # images at once; larger is not faster on a CPU
Examples = tuple[Tensor, Tensor]  # features [N, F], labels [N]
Progress = Callable[[int], None]  # gets the number of images or epochs just done


@dataclass(frozen=True)
class Fit:
    """How the fit went; the head itself holds the best epoch's weights."""

    epochs: int
    best_epoch: int  # counted from 1
    macro_f1: float  # validation, best epoch
    loss: float  # validation, best epoch, class-balanced


def calibrate_batch_norm(base: nn.Module, pixels: Pixels) -> None:
    """Set every running mean and variance to those of `pixels`, seen as one batch.

    A random base needs this: its statistics are otherwise 0 and 1, and its activations explode or vanish.
    """
    norms = [module for module in base.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average: the first batch replaces what was there
    network = PixelsToLogits(base).to(memory_format=torch.channels_last).train()
    with torch.inference_mode():
        network(torch.from_numpy(pixels))
    network.eval()
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


def _silent(done: int) -> None:
    """No progress wanted."""


def infer(model: nn.Module, pixels: Pixels, progress: Progress = _silent) -> Tensor:
    """What `model`, a network [N, 3, H, W] -> [N, K], gives for uint8 [N, 1, H, W]: float32 [N, K]."""
    network = PixelsToLogits(model).to(memory_format=torch.channels_last).eval()
    outputs = []
    for batch in torch.from_numpy(pixels).split(FEATURE_BATCH):
        with torch.inference_mode():
            outputs.append(network(batch))
        progress(len(batch))
    return torch.cat(outputs).clone()


def fit(
    head: nn.Sequential,
    features: Tensor,
    labels: Labels,
    split: Split,
    fitting: Fitting,
    progress: Progress = _silent,
) -> Fit:
    """Train `head` in place on raw features [N, F] of a frozen base, and keep the best epoch's weights.

    Raises EngineError when the loss is not a number.
    """
    mean, scale = standardisation(features[split.train])
    standard, targets = (features - mean) / scale, torch.from_numpy(labels)
    train = standard[split.train], targets[split.train]
    validation = standard[split.validation], targets[split.validation]
    result = _descend(head, train, validation, fitting, progress)
    fold(head, mean, scale)
    return result


def logits(head: nn.Sequential, features: Tensor) -> npt.NDArray[np.float32]:
    """Logits [N, C] of raw features [N, F]."""
    with torch.inference_mode():
        return np.asarray(head.eval()(features).numpy(), np.float32)


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [F] of features [N, F]; a constant feature keeps the scale 1."""
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    return mean, torch.where(scale > 1e-6 * mean.abs().clamp(min=1e-6), scale, 1.0)


def fold(head: nn.Sequential, mean: Tensor, scale: Tensor) -> None:
    """Rewrite the first layer so that head(raw) = head before((raw - mean) / scale); computed in float64."""
    first = head[0]
    assert isinstance(first, nn.Linear)
    weight = first.weight.detach().double() / scale.double()  # [256, F]
    bias = first.bias.detach().double() - weight @ mean.double()
    with torch.no_grad():
        first.weight.copy_(weight)
        first.bias.copy_(bias)


def balance(labels: Tensor, classes: int) -> Tensor:
    """Weight of each class, inverse to its count, that gives all classes the same say: float32 [C]."""
    return len(labels) / (classes * torch.bincount(labels, minlength=classes).clamp(min=1).float())


def _descend(
    head: nn.Sequential, train: Examples, validation: Examples, fitting: Fitting, progress: Progress
) -> Fit:
    """AdamW with early stopping on validation macro-F1, then loss."""
    last = head[-1]
    assert isinstance(last, nn.Linear)
    torch.manual_seed(fitting.seed)  # order of the examples, dropout
    loss_of = nn.CrossEntropyLoss(weight=balance(train[1], last.out_features))
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=fitting.learning_rate, weight_decay=fitting.weight_decay
    )
    best, best_state, epoch = Fit(0, 0, -1.0, math.inf), head.state_dict(), 0
    for epoch in range(1, fitting.epochs + 1):
        _epoch(head, train, optimizer, loss_of, fitting.batch_size)
        score, loss = _validate(head, validation, loss_of)
        if not math.isfinite(loss):
            raise EngineError(f"epoch {epoch}: the validation loss is {loss}; check images and weights")
        progress(1)
        if (score, -loss) > (best.macro_f1, -best.loss):
            best, best_state = Fit(epoch, epoch, score, loss), copy.deepcopy(head.state_dict())
        elif epoch - best.best_epoch >= fitting.patience:
            break
    head.load_state_dict(best_state)
    return replace(best, epochs=epoch)


def _epoch(
    head: nn.Module, train: Examples, optimizer: torch.optim.Optimizer, loss_of: nn.Module, batch_size: int
) -> None:
    features, labels = train
    head.train()
    for batch in torch.randperm(len(labels)).split(batch_size):
        optimizer.zero_grad()
        loss_of(head(features[batch]), labels[batch]).backward()
        optimizer.step()


def _validate(head: nn.Module, validation: Examples, loss_of: nn.Module) -> tuple[float, float]:
    """Macro-F1 and loss."""
    features, labels = validation
    with torch.inference_mode():
        outputs = head.eval()(features)  # [N, C]
        loss = float(loss_of(outputs, labels))
    predictions = outputs.argmax(dim=1).numpy()
    return macro_f1(labels.numpy(), predictions, classes=outputs.shape[1]), loss
