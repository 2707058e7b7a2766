"""Run inference on a set of images, and cache the features of a frozen base on disk."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.runners.network import Network
from training import augment
from training.data import Pixels, Progress
from training.listing import Labels

Floats = npt.NDArray[np.float32]
FLUSH_EVERY = 64  # batches


def no_progress(done: int) -> None:
    """Ignore progress."""


def batch_size_for(device: torch.device) -> int:
    """Return the images per batch; larger batches are not faster on a CPU."""
    return 16 if device.type == "cpu" else 128


def infer(
    module: nn.Module, inputs: Tensor, *, device: torch.device | None = None, progress: Progress = no_progress
) -> Tensor:
    """Run `module` in evaluation mode on `inputs` [N, ...] by batches: float32 [N, K] on the CPU."""
    device = device or torch.device("cpu")
    module.eval()
    outputs = []
    for batch in inputs.split(batch_size_for(device)):
        with torch.inference_mode():
            outputs.append(module(batch.to(device)).float().cpu())
        progress(len(batch))
    return torch.cat(outputs).clone()


def calibrate_batch_norm(
    network: Network, pixels: Pixels, *, batch_size: int = 64, device: torch.device | None = None
) -> None:
    """Set every running mean and variance to the average of those of batches of `pixels`.

    With the initial statistics 0 and 1, the activations of a random base explode or vanish. In training with
    few batches per epoch, running averages lag behind the weights ("precise BN", Wu and Johnson 2021,
    "Rethinking 'Batch' in BatchNorm").
    """
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    images = torch.from_numpy(pixels)
    with torch.no_grad():
        for batch in images.tensor_split(-(-len(images) // batch_size)) if norms else ():
            network.features(batch.to(device or "cpu"))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def cached_features(
    network: Network,
    pixels: Pixels,
    train: Labels,
    *,
    copies: int,
    seed: int,
    folder: Path,
    device: torch.device,
    progress: Progress = no_progress,
) -> Floats:
    """Return features of all images and of `copies` augmented training images: [copies + 1, N, F].

    The name of the cache file is a hash of all inputs, so an interrupted extraction continues and folds with
    the same base share it. Features of copies of other images may be NaN. `progress` counts images.
    """
    size = (pixels.shape[2], pixels.shape[3])
    cache = _open_cache(network, pixels, copies=copies, seed=seed, folder=folder)
    for copy in range(copies + 1):
        wanted = np.arange(len(pixels)) if copy == 0 else train
        missing = wanted[np.isnan(cache[copy, wanted]).any(axis=1)]
        progress(len(wanted) - len(missing))
        changes = augment.draw_changes(len(pixels), size=size, seed=(seed, copy))
        for start in range(0, len(missing), batch_size_for(device)):
            positions = missing[start : start + batch_size_for(device)]
            batch = torch.from_numpy(pixels[positions]).to(device)
            network.eval()
            with torch.inference_mode():
                inputs = batch if copy == 0 else augment.apply_changes(batch, changes, positions)
                cache[copy, positions] = network.features(inputs).float().cpu().numpy()
            if start // batch_size_for(device) % FLUSH_EVERY == 0:
                cache.flush()
            progress(len(positions))
        cache.flush()
    return cache


def _open_cache(
    network: Network, pixels: Pixels, *, copies: int, seed: int, folder: Path
) -> npt.NDArray[np.float32]:
    """Open the file as an array, NaN where nothing is computed yet; replace a damaged file."""
    digest = hashlib.sha256(
        repr((network.normalization, copies, seed, augment.AugmentRanges(), pixels.shape)).encode()
    )
    for name, value in sorted(network.base.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    digest.update(pixels.tobytes())
    path = folder / f"features-{digest.hexdigest()[:16]}.f32"
    first = network.head[0]
    assert isinstance(first, nn.Linear)
    shape = (copies + 1, len(pixels), first.in_features)
    if path.exists() and path.stat().st_size == 4 * math.prod(shape):
        return np.memmap(path, np.float32, "r+", shape=shape)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as opened:
        # a full disk raises now instead of SIGBUS later
        os.posix_fallocate(opened.fileno(), 0, 4 * math.prod(shape))
    features = np.memmap(temporary, np.float32, "r+", shape=shape)
    features[:] = np.nan
    features.flush()
    temporary.rename(path)
    return features
