"""The second phase: the whole network, on augmented pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from engine.runners.network import Network
from training import augment
from training.data import Pixels
from training.listing import Labels
from training.phases.features import calibrate_batch_norm
from training.phases.fit import Batch, Epoch, FitResult, epoch_batches, fit_module
from training.phases.heads import class_weights_of
from training.settings import FitOptions
from training.split import Split

STATISTICS_IMAGES = 512  # training images that batch normalisation's statistics are taken from


def fit_whole(
    network: Network,
    pixels: Pixels,
    labels: Labels,
    split: Split,
    fitting: FitOptions,
    *,
    classes: int,
    checkpoint: Path,
    device: torch.device,
    progress: Callable[[Epoch], None],
) -> FitResult:
    """Train base and head in place on uint8 pixels [N, 1, H, W]; the best epoch's weights stay.

    Every epoch changes the training images anew; validation images stay as they are. Batch normalisation gets
    its statistics from unchanged training images after each epoch. Raises EngineError when the loss is not a
    number.
    """
    images, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    size = (pixels.shape[2], pixels.shape[3])

    some = np.random.default_rng(fitting.seed).permutation(split.train)[:STATISTICS_IMAGES]
    seen = pixels[np.sort(some)]

    def batches(epoch: int) -> Iterator[Batch]:
        changes = augment.draw_changes(len(split.train), size=size, seed=(fitting.seed, 2, epoch))
        for positions, _ in epoch_batches(labels[split.train], fitting, epoch):
            chosen = split.train[positions]
            yield (
                augment.apply_changes(images[chosen].to(device), changes, positions),
                targets[chosen].to(device),
            )

    return fit_module(
        network,
        batches,
        (images[split.validation], targets[split.validation]),
        fitting,
        class_weights=class_weights_of(targets[split.train], classes) if fitting.balance == "loss" else None,
        checkpoint=checkpoint,
        device=device,
        progress=progress,
        before_validation=lambda: calibrate_batch_norm(network, seen, device=device),
    )
