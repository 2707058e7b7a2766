"""Augment batches of training images on any device, as the method describes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AugmentRanges:
    """The ranges of augmentation; the method names all but the contrast."""

    rotation: float = 15.0  # degrees, either way
    flip: float = 0.5  # share of images mirrored left to right
    zoom: float = 0.1  # magnified to 90-110 %
    shift: float = 0.1  # of width and of height, either way
    contrast: float = 0.2  # distances from the mean gray level to 80-120 %


@dataclass(frozen=True)
class AugmentPlan:
    """The augmentation of each of N images; draw once, then index by position."""

    matrix: Floats  # [N, 2, 3], output to input coordinates, as torch's affine_grid has them
    contrast: Floats  # [N]


def draw_changes(
    count: int, *, size: tuple[int, int], seed: tuple[int, ...], ranges: AugmentRanges = AugmentRanges()
) -> AugmentPlan:
    """Draw changes for `count` images of `size` = (height, width).

    They depend only on `seed`, not on batches or devices, so a resumed training repeats an uninterrupted one.
    """
    rng = np.random.default_rng(seed)
    angle = np.radians(rng.uniform(-ranges.rotation, ranges.rotation, count))
    mirror = np.where(rng.random(count) < ranges.flip, -1.0, 1.0)
    zoom = rng.uniform(1 - ranges.zoom, 1 + ranges.zoom, count)
    shift = rng.uniform(-ranges.shift, ranges.shift, (count, 2)) * 2  # coordinates go from -1 to 1
    contrast = rng.uniform(1 - ranges.contrast, 1 + ranges.contrast, count)
    cos, sin, aspect = np.cos(angle) / zoom, np.sin(angle) / zoom, size[0] / size[1]
    # rotation in pixels, written in coordinates that run from -1 to 1 along sides of different length
    turn = np.stack(
        [np.stack([cos * mirror, -sin * aspect], 1), np.stack([sin / aspect * mirror, cos], 1)], 1
    )
    matrix = np.concatenate([turn, shift[:, :, None]], axis=2)
    return AugmentPlan(matrix.astype(np.float32), contrast.astype(np.float32))


def apply_changes(pixels: Tensor, changes: AugmentPlan, positions: npt.NDArray[np.int64]) -> Tensor:
    """Change image i of uint8 [N, 1, H, W] by `changes` at `positions[i]`: float32 gray levels 0-255.

    Areas outside the image repeat its border.
    """
    gray = pixels.to(torch.float32)
    matrix = torch.from_numpy(changes.matrix[positions]).to(gray.device)
    grid = functional.affine_grid(matrix, list(gray.shape), align_corners=False)
    moved = functional.grid_sample(gray, grid, mode="bilinear", padding_mode="border", align_corners=False)
    contrast = torch.from_numpy(changes.contrast[positions]).to(gray.device).view(-1, 1, 1, 1)
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + contrast * (moved - mean)).clamp(0, 255)
