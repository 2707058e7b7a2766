"""Copies of a radiograph are found however they were changed; different ones and blank ones are not."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from engine.pipeline.load_pixels import load_pixels
from training.audit import duplicates
from training.synthetic import draw_sample

SIZE = 160


@pytest.fixture(scope="module")
def distinct() -> np.ndarray:
    """24 different synthetic knees, [N, 1, H, W]."""
    return np.stack([draw_sample(5, index, size_range=(SIZE, SIZE)).pixels8[None] for index in range(24)])


def moved(image: np.ndarray, *, degrees=0.0, zoom=1.0, shift=(0.0, 0.0), mirrored=False) -> np.ndarray:
    """[1, H, W] turned and zoomed about its centre, then shifted by shares of its sides; black moves in."""
    height, width = image.shape[1:]
    cos, sin = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    x, y = width * (0.5 + shift[0]), height * (0.5 + shift[1])
    matrix = (cos, sin, width / 2 - cos * x - sin * y, -sin, cos, height / 2 + sin * x - cos * y)
    picture = Image.fromarray(image[0, :, ::-1] if mirrored else image[0])
    picture = picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(picture)[None]


def encoded(image: np.ndarray, quality: int = 50) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image[0]).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))[None]


def resized(image: np.ndarray) -> np.ndarray:
    """To 60 % and back."""
    small = Image.fromarray(image[0]).resize((SIZE * 6 // 10,) * 2, Image.Resampling.BICUBIC)
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BILINEAR))[None]


def darker(image: np.ndarray) -> np.ndarray:
    return (0.8 * image.astype(np.float32) + 10).astype(np.uint8)


def augmented(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    turned = moved(
        image,
        degrees=rng.uniform(-15, 15),
        zoom=rng.uniform(0.9, 1.1),
        shift=rng.uniform(-0.1, 0.1, 2),
        mirrored=rng.random() < 0.5,
    )
    return darker(turned) if rng.random() < 0.5 else turned


def grouped(pixels: np.ndarray) -> list[int]:
    pairs = duplicates.near_pairs(pixels)
    return duplicates.connected_components(
        len(pixels), [(pair.first, pair.second) for pair in pairs]
    ).tolist()


CHANGES = {
    "mirrored": lambda image: moved(image, mirrored=True),
    "turned": lambda image: moved(image, degrees=15),
    "turned back": lambda image: moved(image, degrees=-11),
    "shifted": lambda image: moved(image, shift=(0.1, -0.07)),
    "smaller and shifted": lambda image: moved(image, zoom=0.9, shift=(-0.05, 0.05)),
    "larger": lambda image: moved(image, zoom=1.1),
    "darker": darker,
    "encoded": encoded,
    "resized": resized,
    "all": lambda image: encoded(
        darker(moved(image, degrees=-9, zoom=1.05, shift=(0.05, 0.03), mirrored=True)), 80
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found_and_nothing_else(distinct, change):
    copies = np.stack([CHANGES[change](image) for image in distinct[:8]])
    assert grouped(np.concatenate([distinct, copies])) == [*range(24), *range(8)]


def test_distinct_radiographs_are_no_pairs(distinct):
    assert duplicates.near_pairs(distinct) == []


def test_identical_pixels_are_similar_by_1_and_cost_nothing(distinct, monkeypatch):
    compared = []
    compare = duplicates._compare
    monkeypatch.setattr(
        duplicates, "_compare", lambda *arguments: compared.append(len(arguments[0])) or compare(*arguments)
    )
    pairs = duplicates.near_pairs(np.concatenate([distinct[:2], distinct[[1] * 300], distinct[[0]]]))
    expected = [(0, 302), *((1, copy) for copy in range(2, 302))]
    assert pairs == [duplicates.Pair(first, second, 1.0) for first, second in expected]
    assert sum(compared) == 1


def test_pairs_are_ordered_and_have_a_similarity(distinct):
    pixels = np.stack([encoded(distinct[3], 40), distinct[0], distinct[3], encoded(distinct[3], 95)])
    pairs = duplicates.near_pairs(pixels)
    assert pairs == sorted(pairs)
    assert all(pair.first < pair.second and type(pair.first) is int for pair in pairs)
    similarity = {(pair.first, pair.second): pair.similarity for pair in pairs}
    assert duplicates.SAME < similarity[0, 2] < similarity[2, 3] <= 1


@pytest.mark.slow
def test_copies_are_connected_without_their_original(distinct):
    rng = np.random.default_rng(0)
    family = [augmented(distinct[0], rng) for _ in range(20)]
    assert grouped(np.stack([*distinct[1:9], *family])) == [*range(8), *[8] * 20]


@pytest.mark.slow
def test_tight_clusters_of_copies_are_connected(distinct):
    """Each image has more near-identical neighbours than are looked at."""
    turned = moved(distinct[0], degrees=13, zoom=0.92)
    clusters = [encoded(image, quality) for image in (distinct[0], turned) for quality in range(70, 94, 2)]
    assert len(clusters) > 2 * duplicates.NEIGHBOURS
    assert set(grouped(np.stack(clusters))) == {0}


def test_blank_images_are_copies_of_identical_ones_only():
    gray = np.array([0, 0, 1, 127, 128, 255, 255], np.uint8)
    assert grouped(np.tile(gray[:, None, None, None], (1, 1, 64, 64))) == [0, 0, 1, 2, 3, 4, 4]


def test_almost_blank_images_are_no_copies():
    pixels = np.full((6, 1, 96, 96), 30, np.uint8)
    pixels[0, 0, 10:14, 10:14] = 200
    pixels[1, 0, 40:44, 60:64] = 200  # the same mark elsewhere
    pixels[2, 0] = np.linspace(20, 90, 96)  # a slope
    pixels[3, 0] = np.linspace(20, 91, 96)
    pixels[4:, 0] += np.random.default_rng(0).integers(0, 2, (2, 96, 96), np.uint8)
    assert duplicates.near_pairs(pixels) == []


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (97, 131), (32, 32), (40, 33)])
def test_any_size(distinct, size):
    """Below 64 pixels only slight changes are recognised."""
    picture = [Image.fromarray(image[0]).resize(size[::-1], Image.Resampling.BILINEAR) for image in distinct]
    pixels = np.stack([np.asarray(one)[None] for one in picture])
    changed = {"degrees": 12, "zoom": 1.06} if min(size) >= 64 else {"degrees": 3, "mirrored": True}
    copies = np.stack([moved(image, **changed) for image in pixels[:6]])
    assert grouped(np.concatenate([pixels, copies])) == [*range(24), *range(6)]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_sets(distinct, count):
    done = []
    assert duplicates.near_pairs(distinct[:count], done.append) == []
    assert sum(done) == count


def test_progress_counts_every_image_once(distinct, monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS", 8)
    done = []
    duplicates.near_pairs(distinct[[*range(9), *[0] * 4]], done.append)
    assert done == [4, 8, 1]


def test_blocks_and_threads_change_nothing(distinct, monkeypatch):
    rng = np.random.default_rng(1)
    pixels = np.stack([*distinct[:9], *(augmented(image, rng) for image in distinct[:4])])
    pixels.flags.writeable = False
    pairs = duplicates.near_pairs(pixels)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert duplicates.near_pairs(pixels) == pairs
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    result = grouped(pixels)
    assert result == [*range(9), *range(4)]
    monkeypatch.setattr(duplicates, "ROWS", 4)  # the last block is a single image
    monkeypatch.setattr(duplicates, "BATCH", 1)
    assert grouped(pixels) == result


@pytest.mark.parametrize(
    ("count", "pairs", "expected"),
    [
        (0, [], []),
        (3, [], [0, 1, 2]),
        (5, [(3, 4), (1, 3)], [0, 1, 2, 1, 1]),
        (6, [(4, 5), (0, 2), (2, 5)], [0, 1, 0, 2, 0, 0]),
        (4, [(0, 3), (0, 3), (3, 0)], [0, 1, 2, 0]),
    ],
)
def test_groups_are_numbered_by_first_appearance(count, pairs, expected):
    labels = duplicates.connected_components(count, iter(pairs))
    assert labels.dtype == np.int64
    assert labels.tolist() == expected


@pytest.mark.slow
def test_real_radiographs(radiographs):
    """Copies of radiographs are found, other radiographs are not taken for copies."""
    pixels = load_pixels(radiographs[:40], size=(224, 224)).pixels
    originals = pixels[np.sort(np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)[1])]
    rng = np.random.default_rng(0)
    copies = np.stack([augmented(image, rng) for image in originals])
    labels = np.array(grouped(np.concatenate([originals, copies])))
    assert labels[: len(originals)].tolist() == list(range(len(originals)))
    assert np.mean(labels[len(originals) :] == np.arange(len(originals))) >= 0.95
    assert np.isin(labels, np.arange(2 * len(originals))).all()
