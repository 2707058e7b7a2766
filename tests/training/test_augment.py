"""Each change alone against what it should do, its range, and that it belongs to its image."""

import numpy as np
import pytest
import torch
from PIL import Image

from training import augment
from training.augment import AugmentRanges

NONE = {"rotation": 0.0, "flip": 0.0, "zoom": 0.0, "shift": 0.0, "contrast": 0.0}
SIZE = (60, 84)


def picture(size: tuple[int, int] = SIZE) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (6, 8)).astype(np.uint8)
    return np.asarray(Image.fromarray(blocks).resize(size[::-1], Image.Resampling.BICUBIC))


def change(count: int = 1, seed: int = 1, **ranges: float) -> tuple[np.ndarray, augment.AugmentPlan]:
    changes = augment.draw_changes(count, size=SIZE, seed=(seed,), ranges=AugmentRanges(**(NONE | ranges)))
    pixels = torch.from_numpy(np.repeat(picture()[None, None], count, axis=0))
    return augment.apply_changes(pixels, changes, np.arange(count)).numpy()[:, 0], changes


def test_no_change_is_no_change():
    assert np.allclose(change()[0][0], picture(), atol=1e-2)


def test_flip():
    result, _ = change(flip=1.0)
    assert np.allclose(result[0], picture()[:, ::-1], atol=1e-2)
    share = np.mean([np.allclose(one, picture(), atol=1) for one in change(200, flip=0.5)[0]])
    assert 0.4 < share < 0.6


def test_rotation_keeps_shapes_and_its_range():
    actual, changes = change(50, rotation=15.0)
    height, width = SIZE
    angles = np.degrees(np.arctan2(changes.matrix[:, 1, 0] * height / width, changes.matrix[:, 0, 0]))
    assert -15 <= angles.min() < -10 < 10 < angles.max() <= 15
    expected = Image.fromarray(picture()).rotate(angles[0], Image.Resampling.BILINEAR)
    inner = slice(20, 40), slice(28, 56)
    assert np.abs(actual[0][inner] - np.asarray(expected, float)[inner]).mean() < 1.5


def test_zoom_and_shift_keep_their_ranges():
    _, changes = change(300, zoom=0.1)
    magnified = 1 / changes.matrix[:, 0, 0]
    assert 0.9 <= magnified.min() < 0.91 < 1.09 < magnified.max() <= 1.1
    assert np.array_equal(changes.matrix[:, 0, 0], changes.matrix[:, 1, 1])
    _, changes = change(300, shift=0.1)
    moved = changes.matrix[:, :, 2] / 2  # of a side
    assert -0.1 <= moved.min() < -0.09 < 0.09 < moved.max() <= 0.1


def test_shift_repeats_the_border():
    result, changes = change(shift=0.1)
    down = round(float(-changes.matrix[0, 1, 2]) / 2 * SIZE[0])
    assert down != 0
    edge = result[0][0] if down > 0 else result[0][-1]
    assert np.allclose(edge, result[0][1 if down > 0 else -2], atol=1e-3)


def test_contrast_keeps_the_mean():
    actual, changes = change(40, contrast=0.2)
    assert 0.8 <= changes.contrast.min() < 0.83 < 1.17 < changes.contrast.max() <= 1.2
    gray = picture().astype(float)
    expected = (gray.mean() + changes.contrast[0] * (gray - gray.mean())).clip(0, 255)
    assert np.allclose(actual[0], expected, atol=1e-2)


@pytest.mark.parametrize("batch", [1, 7])
def test_an_image_keeps_its_change_in_any_batch(batch):
    changes = augment.draw_changes(20, size=SIZE, seed=(4, 2))
    pixels = torch.from_numpy(np.repeat(picture()[None, None], 20, axis=0))
    together = augment.apply_changes(pixels, changes, np.arange(20))
    order = np.random.default_rng(0).permutation(20)
    parts = [augment.apply_changes(pixels[:1].repeat(len(some), 1, 1, 1), changes, some)
             for some in np.array_split(order, 20 // batch)]  # fmt: skip
    assert torch.allclose(torch.cat(parts), together[order], atol=1e-3)
    assert together.dtype == torch.float32
    assert not torch.allclose(together[0], together[1], atol=5)


def test_other_seeds_give_other_changes():
    first, again, other = (augment.draw_changes(5, size=SIZE, seed=(0, 0, epoch)) for epoch in (1, 1, 2))
    assert np.array_equal(first.matrix, again.matrix)
    assert not np.array_equal(first.matrix, other.matrix)
