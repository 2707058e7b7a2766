"""The second phase: the whole network, on augmented pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from training import augment
from training.data import Pixels
from training.fit import Batch, Epoch, Fit, descend, epoch_batches
from training.heads import balance
from training.listing import Labels
from training.models import Network
from training.settings import Fitting
from training.split import Split


def fit_whole(
    network: Network,
    pixels: Pixels,
    labels: Labels,
    split: Split,
    fitting: Fitting,
    *,
    classes: int,
    checkpoint: Path,
    device: torch.device,
    progress: Callable[[Epoch], None],
) -> Fit:
    """Train base and head in place on uint8 pixels [N, 1, H, W]; the best epoch's weights stay.

    Every epoch changes the training images anew; validation images stay as they are. Raises EngineError when
    the loss is not a number.
    """
    images, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    size = (pixels.shape[2], pixels.shape[3])

    def batches(epoch: int) -> Iterator[Batch]:
        changes = augment.draw(len(split.train), size=size, seed=(fitting.seed, 2, epoch))
        for positions, _ in epoch_batches(labels[split.train], fitting, epoch):
            chosen = split.train[positions]
            yield augment.apply(images[chosen].to(device), changes, positions), targets[chosen].to(device)

    return descend(
        network,
        batches,
        (images[split.validation], targets[split.validation]),
        fitting,
        class_weights=balance(targets[split.train], classes) if fitting.balance == "loss" else None,
        checkpoint=checkpoint,
        device=device,
        progress=progress,
    )
