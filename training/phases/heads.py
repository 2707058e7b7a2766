"""Train the head alone, on cached features of a frozen base (first phase)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.runners.network import Network
from training.data import Progress
from training.listing import Labels
from training.phases.features import Floats, no_progress
from training.phases.fit import Batch, FitResult, epoch_batches, fit_module
from training.settings import FitOptions
from training.split import Split


def fit_head(
    network: Network,
    features: Floats,
    labels: Labels,
    split: Split,
    fitting: FitOptions,
    *,
    checkpoint: Path,
    device: torch.device,
    progress: Progress = no_progress,
) -> FitResult:
    """Train the head in place on raw features [copies + 1, N, F] of its base; keep the best epoch.

    Each epoch takes a random copy of each training image. Raises EngineError if the loss is not finite.
    """
    mean, scale = feature_statistics(torch.from_numpy(features[0][split.train]))
    train = (torch.from_numpy(features[:, split.train]) - mean) / scale  # [copies + 1, n, F]
    validation = (torch.from_numpy(features[0][split.validation]) - mean) / scale
    targets = torch.from_numpy(labels[split.train])

    def batches(epoch: int) -> Iterator[Batch]:
        for positions, rng in epoch_batches(labels[split.train], fitting, epoch):
            copies = rng.integers(len(train), size=len(positions))
            yield train[copies, positions].to(device), targets[positions].to(device)

    head = network.head.to(device)
    result = fit_module(
        head,
        batches,
        (validation, torch.from_numpy(labels[split.validation])),
        fitting,
        class_weights=class_weights_of(targets, _classes(head)) if fitting.balance == "loss" else None,
        checkpoint=checkpoint,
        device=device,
        progress=lambda epoch: progress(1),
    )
    fold_standardisation(head, mean.to(device), scale.to(device))
    return result


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [F] of features [N, F]; a constant feature keeps the scale 1."""
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    return mean, torch.where(scale > 1e-6 * mean.abs().clamp(min=1e-6), scale, 1.0)


def fold_standardisation(head: nn.Sequential, mean: Tensor, scale: Tensor) -> None:
    """Rewrite the first layer so that head(raw) = head before((raw - mean) / scale); computed in float64."""
    first = head[0]
    assert isinstance(first, nn.Linear)
    weight = first.weight.detach().double() / scale.double()  # [256, F]
    bias = first.bias.detach().double() - weight @ mean.double()
    with torch.no_grad():
        first.weight.copy_(weight)
        first.bias.copy_(bias)


def class_weights_of(labels: Tensor, classes: int) -> Tensor:
    """Return the weights of the classes, inverse to their counts: float32 [C]."""
    return len(labels) / (classes * torch.bincount(labels, minlength=classes).clamp(min=1).float())


def _classes(head: nn.Sequential) -> int:
    last = head[-1]
    assert isinstance(last, nn.Linear)
    return last.out_features
