"""Small networks and data sets for tests of training."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from engine.runners.network import Network
from training import models, split


def tiny_network(classes: int = 3, seed: int = 0, *, padding: int = 1, normalization="none") -> Network:
    torch.manual_seed(seed)
    base = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=padding, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Network(base, models.make_head(16, classes), normalization).eval()


def random_pixels(count: int, size: tuple[int, int] = (16, 12), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, *size), dtype=np.uint8)


def stripes(count: int, size: tuple[int, int] = (32, 32)) -> tuple[np.ndarray, np.ndarray, split.Split]:
    """Return pixels, labels, split: vertical stripes of three widths with random gray level and contrast."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    x = np.arange(size[1])[None, :] + rng.uniform(0, 20, (count, 1))
    wave = np.sin(2 * np.pi * x / np.array([3, 6, 12])[labels][:, None])
    gray = rng.uniform(90, 160, (count, 1)) + rng.uniform(30, 60, (count, 1)) * wave
    pixels = gray[:, None, None, :] + rng.normal(0, 10, (count, 1, *size))
    parts = split.split_dataset(labels, np.arange(count), classes=("a", "b", "c"), seed=0)
    return pixels.clip(0, 255).astype(np.uint8), labels, parts
