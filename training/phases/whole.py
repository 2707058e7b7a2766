"""Train the whole network on augmented pixels (second phase)."""

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

STATISTICS_IMAGES = 512  # training images for the statistics of batch normalisation


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
    """Train base and head in place on uint8 pixels [N, 1, H, W]; keep the best epoch.

    Each epoch augments the training images anew. After each epoch, batch normalisation gets its statistics
    from unchanged training images. Raises EngineError if the loss is not finite.
    """
    images, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    size = (pixels.shape[2], pixels.shape[3])
    sample = np.random.default_rng(fitting.seed).permutation(split.train)[:STATISTICS_IMAGES]
    unchanged = pixels[np.sort(sample)]

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
        before_validation=lambda: calibrate_batch_norm(network, unchanged, device=device),
    )
