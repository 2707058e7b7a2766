"""Find copies of radiographs, also turned, mirrored, zoomed, shifted, brightened, resized or re-encoded.

Candidates come from Fourier-Mellin descriptors (Reddy and Chatterji 1996, "An FFT-based technique for
translation, rotation, and scale-invariant image registration"); each pair is then registered and compared by
the normalised cross-correlation of the common area (Padfield 2012, "Masked object registration in the
Fourier domain"). Both use only fine structure at unit local contrast: trabeculae and noise differ between
exposures, while the outlines of bones are similar in all patients.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage, sparse
from torch import Tensor
from torch.nn import functional

SIDE = 128  # pixels of the longer side of compared images
FINE = 1.5 / 128  # of the side, sigma of the high-pass filter
FAINT = 2.0  # gray levels; weaker structure is noise of the encoding
ANGLES, RADII = 60, 20  # of a descriptor
RING = (0.125, 0.35)  # cycles per pixel, the radii's range
ZOOM_STEP = math.log(RING[1] / RING[0]) / (RADII - 1)
TURNS, ZOOMS = range(-10, 11), range(-3, 4)  # steps of alignment either way: 30 degrees, a factor of 1.18
ALIGNMENTS = list(product((0, 1), TURNS, ZOOMS))  # 1 is mirrored
FINER = torch.tensor(
    [(0, math.radians(t), z) for t, z in product((-0.95, 0, 0.95), (-0.015, 0, 0.015)) if t or z]
)
REACH = 0.25  # of the side, how far a pair may be shifted
TEXTURED = 0.02  # share of the area that must hold structure
NEIGHBOURS = 5  # candidates of an image outside its own group
PROMISING, SAME = (
    0.5,
    0.77,
)  # correlation above which a pair is registered finely, and above which it is one image
DETAILED = 64  # pixels; smaller images have fewer details and need a higher correlation
ROWS, BATCH = 256, 16  # images per block in the search, pairs per comparison

Positions = tuple[int, int]


@dataclass(frozen=True, order=True)
class Pair:
    """Two images that are copies; `similarity` is 1 for identical pixels."""

    first: int
    second: int
    similarity: float


def _no_progress(done: int) -> None:
    """Ignore progress."""


def near_pairs(pixels: npt.NDArray[np.uint8], progress: Callable[[int], None] = _no_progress) -> list[Pair]:
    """Return sorted pairs of uint8 images [N, 1, H, W] that connect all copies of each image."""
    first_copy = _first_identical(pixels)
    distinct = np.unique(first_copy)
    copies = np.flatnonzero(first_copy != np.arange(len(pixels)))
    progress(len(copies))
    scores: dict[Positions, float] = {}
    with _workers() as pool:
        images = _normalise(pixels, distinct)
        descriptors = _describe(images)
        for rows in _blocks(len(distinct)):
            _link(rows, images, descriptors, scores, pool)
            progress(len(rows))
    linked = _linked_pairs(scores, images.shape[-1])
    near = [
        Pair(int(distinct[first]), int(distinct[second]), scores[first, second]) for first, second in linked
    ]
    return sorted(near + [Pair(int(first_copy[copy]), int(copy), 1.0) for copy in copies])


def connected_components(count: int, pairs: Iterable[Positions]) -> npt.NDArray[np.int64]:
    """Return the connected components of `count` images: labels [N], numbered by first appearance."""
    edges = np.array(list(pairs), np.int64).reshape(-1, 2)
    graph = sparse.coo_array((np.ones(len(edges)), tuple(edges.T)), shape=(count, count))
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    return labels.astype(np.int64)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Run torch operations on a thread pool with one thread each, which is faster for many small steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _first_identical(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return the position of the first image with the same pixels, for each image [N]."""
    first: dict[bytes, int] = {}
    keys = (hashlib.sha256(image.tobytes()).digest() for image in pixels)
    return np.array([first.setdefault(key, position) for position, key in enumerate(keys)], np.int64)


def _blocks(count: int) -> Sequence[Tensor]:
    """Yield the positions of `count` images, ROWS at a time."""
    return torch.arange(count).split(ROWS) if count else ()  # torch.fft takes no empty batch


def _normalise(pixels: npt.NDArray[np.uint8], distinct: npt.NDArray[np.int64]) -> Tensor:
    """Return fine structure at unit local contrast, else 0: float16 [K, S, S], padded to squares."""
    height, width = pixels.shape[2:]
    side = min(SIDE, max(height, width))
    size = [max(1, round(length * side / max(height, width))) for length in (height, width)]
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    images = torch.zeros(len(distinct), side, side, dtype=torch.float16)
    sigma = max(0.75, FINE * side)
    for rows in _blocks(len(distinct)):
        gray = torch.from_numpy(pixels[distinct[rows.numpy()]]).float()
        gray = functional.interpolate(gray, size=size, mode="bilinear", antialias=True)[:, 0].numpy()
        fine = gray - ndimage.gaussian_filter(gray, (0, sigma, sigma))
        fine /= np.sqrt(ndimage.gaussian_filter(fine**2, (0, 2 * sigma, 2 * sigma))) + FAINT
        images[rows, top : top + size[0], left : left + size[1]] = torch.from_numpy(fine).half()
    return images


def _describe(images: Tensor) -> Tensor:
    """Return log amplitude spectra in log-polar coordinates, each radius standardised: [K, A, R].

    A shift of the image does not change them; a turn shifts angles, a zoom shifts radii, a mirror reverses
    angles.
    """
    side = images.shape[-1]
    window = torch.hann_window(side, periodic=False)
    angle = (torch.arange(ANGLES) / ANGLES - 0.5)[:, None] * math.pi  # the half plane that a real FFT gives
    radius = RING[0] * torch.exp(torch.arange(RADII) * ZOOM_STEP) * side
    x, y = radius * torch.cos(angle) / (side // 2), (radius * torch.sin(angle) + side // 2) / (side - 1)
    grid = torch.stack([x, y], dim=-1) * 2 - 1
    descriptors = torch.zeros(len(images), ANGLES, RADII)
    for rows in _blocks(len(images)):
        spectrum = torch.fft.rfft2(images[rows].float() * window * window[:, None]).abs().log1p()
        spectrum = torch.fft.fftshift(spectrum, dim=1)[:, None]
        polar = functional.grid_sample(spectrum, grid.expand(len(rows), -1, -1, -1), align_corners=True)[:, 0]
        polar -= polar.mean(dim=1, keepdim=True)
        polar /= polar.std(dim=1, keepdim=True).clamp(min=1e-3)
        descriptors[rows] = polar / polar.norm(dim=(1, 2), keepdim=True).clamp(min=1.0)
    return descriptors


def _align(descriptors: Tensor, mirrored: int, turn: int, zoom: int) -> Tensor:
    """Return descriptors [K, A, R] of images mirrored, turned and zoomed by steps of the two axes."""
    if mirrored:
        descriptors = descriptors[:, -torch.arange(ANGLES) % ANGLES]
    shifted = functional.pad(torch.roll(descriptors, turn, dims=1), (zoom, -zoom))
    return shifted * (RADII / (RADII - abs(zoom)))  # compensates for the radii that were cut


def _best_correlation(rows: Tensor, columns: Tensor) -> Tensor:
    """Correlate descriptors [M, A, R] and [K, A, R] at their best alignment: [M, K], at least 0."""
    best, flat = torch.zeros(len(rows), len(columns)), columns.flatten(1).T
    for alignment in ALIGNMENTS:
        torch.maximum(best, _align(rows, *alignment).flatten(1) @ flat, out=best)
    return best


def _link(
    rows: Tensor,
    images: Tensor,
    descriptors: Tensor,
    scores: dict[Positions, float],
    pool: ThreadPoolExecutor,
) -> None:
    """Score `rows` with their nearest neighbours outside their groups until no group grows.

    With the nearest neighbours alone, tight clusters of copies would stay unconnected.
    """
    parts = pool.map(lambda part: _best_correlation(descriptors[part], descriptors), rows.split(ROWS // 4))
    similarity = torch.cat(list(parts))  # [M, K]
    while len(rows):
        group = torch.from_numpy(connected_components(len(images), _linked_pairs(scores, images.shape[-1])))
        value, column = similarity.masked_fill(group[rows, None] == group, 0).topk(
            min(NEIGHBOURS, len(images))
        )
        pairs = torch.stack([rows[:, None].expand_as(column), column], dim=-1)[value > 0]  # [P, 2]
        unscored = sorted({(min(pair), max(pair)) for pair in pairs.tolist()} - scores.keys())
        batches = [torch.tensor(unscored[start : start + BATCH]) for start in range(0, len(unscored), BATCH)]
        batch_scores = pool.map(lambda batch: _compare(batch, images, descriptors), batches)
        scores.update(zip(unscored, (score for part in batch_scores for score in part), strict=True))
        changed = {
            position for pair in _linked_pairs(scores, images.shape[-1]) & set(unscored) for position in pair
        }
        remaining = torch.tensor([row in changed for row in rows.tolist()])
        rows, similarity = rows[remaining], similarity[remaining]


def _linked_pairs(scores: dict[Positions, float], side: int) -> set[Positions]:
    """Return the pairs of copies. At full size, different knees score at most 0.76, 99 % of copies 0.84."""
    minimum = SAME + (1 - SAME) * max(0.0, 1 - side / DETAILED)
    return {pair for pair, score in scores.items() if score >= minimum}


def _compare(pairs: Tensor, images: Tensor, descriptors: Tensor) -> list[float]:
    """Return the normalised cross-correlation of pairs [P, 2] at their best registration, at most 1."""
    first, second = pairs.T
    moving, fixed = images[first].float(), images[second].float()
    target, warp = (
        _spectra(fixed, torch.ones_like(fixed)),
        _estimate_warp(descriptors[first], descriptors[second]),
    )
    score = _correlation(_spectra(*_apply_warp(moving, warp)), target)
    promising = (score >= PROMISING).nonzero()[:, 0]
    for step in FINER if len(promising) else ():
        finer = _spectra(*_apply_warp(moving[promising], warp[promising] + step))
        score[promising] = score[promising].maximum(_correlation(finer, target[:, promising]))
    return score.clamp(max=1.0).tolist()


def _estimate_warp(moving: Tensor, fixed: Tensor) -> Tensor:
    """Estimate the warp between images with descriptors [P, A, R]: (mirrored, radians, log zoom) [P, 3].

    It is the peak of their correlation over all alignments, refined by a parabola along each axis.
    """
    products = (_align(moving, *alignment) * fixed for alignment in ALIGNMENTS)
    flat = torch.stack([product.sum(dim=(1, 2)) for product in products], dim=1)
    scores = flat.view(-1, 2, len(TURNS), len(ZOOMS))
    padded = functional.pad(scores, (1, 1, 1, 1), mode="reflect")
    more_turn = _vertex(padded[:, :, :-2, 1:-1], scores, padded[:, :, 2:, 1:-1]).flatten(1)
    more_zoom = _vertex(padded[:, :, 1:-1, :-2], scores, padded[:, :, 1:-1, 2:]).flatten(1)
    pair, best = torch.arange(len(flat)), flat.argmax(dim=1)
    mirrored, turn, zoom = torch.tensor(ALIGNMENTS)[best].T
    turn, zoom = turn + more_turn[pair, best], zoom + more_zoom[pair, best]
    return torch.stack([mirrored, -math.pi / ANGLES * turn, ZOOM_STEP * zoom], dim=1)


def _vertex(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """Return where the parabola through values at -1, 0 and 1 peaks, if the middle one is the largest."""
    bend = (before - 2 * middle + after).clamp(max=-1e-6)
    return (0.5 * (before - after) / bend).clamp(-0.5, 0.5)


def _apply_warp(images: Tensor, warp: Tensor) -> tuple[Tensor, Tensor]:
    """Return images [P, S, S] mirrored, turned and zoomed by `warp` [P, 3], and their content masks."""
    mirrored, angle, zoom = warp.unbind(1)
    cos, sin, sign, zero = angle.cos() * zoom.exp(), angle.sin() * zoom.exp(), 1 - 2 * mirrored, 0 * angle
    matrix = torch.stack([sign * cos, -sign * sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    stacked = torch.stack([images, torch.ones_like(images)], dim=1)
    grid = functional.affine_grid(matrix, list(stacked.shape), align_corners=False)
    image, cover = functional.grid_sample(stacked, grid, align_corners=False).unbind(1)
    return image, cover


def _spectra(images: Tensor, cover: Tensor) -> Tensor:
    """Compute spectra of images [P, S, S], their squares and their cover, padded: [3, P, F, F // 2 + 1]."""
    width = images.shape[-1] + int(images.shape[-1] * REACH)
    return torch.fft.rfft2(torch.stack([images, images**2, cover]), s=(width, width))


def _correlation(moving: Tensor, fixed: Tensor) -> Tensor:
    """Return the normalised cross-correlation over the overlap at the best shift, from `_spectra`: [P].

    The images have local mean 0, so no means are subtracted. Too little structure counts as none.
    """
    width = moving.shape[-2]
    side = math.ceil(width / (1 + REACH))
    common, energy, other = torch.fft.irfft2(moving * fixed[[0, 2, 1]].conj(), s=(width, width))
    minimum = TEXTURED * side**2
    # [P, F, F], shifts wrap round
    score = common / (energy.clamp(min=minimum) * other.clamp(min=minimum)).sqrt()
    shift, pair = torch.arange(side - width, width - side + 1), torch.arange(len(score))
    flat_index = score[:, shift][:, :, shift].flatten(1).argmax(dim=1)
    y, x = shift[flat_index // len(shift)], shift[flat_index % len(shift)]
    peak = score[pair, y, x]
    best = peak
    for step in ((1, 0), (0, 1)):
        before, after = score[pair, y - step[0], x - step[1]], score[pair, y + step[0], x + step[1]]
        best = best + 0.25 * (after - before) * _vertex(before, peak, after)
    return best
