"""Copies of one radiograph, also turned, mirrored, zoomed, shifted, brightened, resized or encoded again.

Candidates come from Fourier-Mellin descriptors (Reddy and Chatterji 1996, "An FFT-based technique for
translation, rotation, and scale-invariant image registration"); each is then registered and judged by the
normalised cross-correlation of what both images show (Padfield 2012, "Masked object registration in the
Fourier domain"). Both see only fine structure at unit local contrast: trabeculae and noise tell one exposure
from the next, where the outlines of bones are alike in everybody.
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

SIDE = 128  # pixels of the longer side when compared
FINE = 1.5 / 128  # of the side, sigma: what is finer counts, relative to its own local contrast
FAINT = 2.0  # gray levels; structure below this is noise of the encoding
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
PROMISING, SAME = 0.5, 0.77  # correlation from which a pair is registered finely, and from which it is one
DETAILED = 64  # pixels; images that are smaller have fewer details, and must agree better
ROWS, BATCH = 256, 16  # images at once in the search, pairs in the comparison

Positions = tuple[int, int]


@dataclass(frozen=True, order=True)
class Pair:
    """Two images that are one; `similarity` is 1 for identical pixels."""

    first: int
    second: int
    similarity: float


def _no_progress(done: int) -> None:
    """Ignore progress."""


def near_pairs(pixels: npt.NDArray[np.uint8], progress: Callable[[int], None] = _no_progress) -> list[Pair]:
    """Sorted pairs of uint8 [N, 1, H, W], enough of them to connect all copies of an image."""
    source = _identical(pixels)
    kept = np.unique(source)
    copies = np.flatnonzero(source != np.arange(len(pixels)))
    progress(len(copies))
    scores: dict[Positions, float] = {}
    with _workers() as pool:
        images = _normalise(pixels, kept)
        descriptors = _describe(images)
        for rows in _blocks(len(kept)):
            _link(rows, images, descriptors, scores, pool)
            progress(len(rows))
    linked = _linked_pairs(scores, images.shape[-1])
    near = [Pair(int(kept[first]), int(kept[second]), scores[first, second]) for first, second in linked]
    return sorted(near + [Pair(int(source[copy]), int(copy), 1.0) for copy in copies])


def connected_components(count: int, pairs: Iterable[Positions]) -> npt.NDArray[np.int64]:
    """Connected components of `count` images: labels [N], numbered by first appearance."""
    edges = np.array(list(pairs), np.int64).reshape(-1, 2)
    graph = sparse.coo_array((np.ones(len(edges)), tuple(edges.T)), shape=(count, count))
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    return labels.astype(np.int64)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Use torch's threads without torch's own threading: thousands of small steps would wait for each
    other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _identical(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Position of the first image with the same pixels [N]."""
    first: dict[bytes, int] = {}
    keys = (hashlib.sha256(image.tobytes()).digest() for image in pixels)
    return np.array([first.setdefault(key, position) for position, key in enumerate(keys)], np.int64)


def _blocks(count: int) -> Sequence[Tensor]:
    """Yield the positions of `count` images, ROWS at a time."""
    return torch.arange(count).split(ROWS) if count else ()  # torch.fft takes no empty batch


def _normalise(pixels: npt.NDArray[np.uint8], kept: npt.NDArray[np.int64]) -> Tensor:
    """Fine structure at unit local contrast, 0 where there is none: float16 [K, S, S], padded to squares."""
    height, width = pixels.shape[2:]
    side = min(SIDE, max(height, width))
    size = [max(1, round(length * side / max(height, width))) for length in (height, width)]
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    images = torch.zeros(len(kept), side, side, dtype=torch.float16)
    sigma = max(0.75, FINE * side)
    for rows in _blocks(len(kept)):
        gray = torch.from_numpy(pixels[kept[rows.numpy()]]).float()
        gray = functional.interpolate(gray, size=size, mode="bilinear", antialias=True)[:, 0].numpy()
        fine = gray - ndimage.gaussian_filter(gray, (0, sigma, sigma))
        fine /= np.sqrt(ndimage.gaussian_filter(fine**2, (0, 2 * sigma, 2 * sigma))) + FAINT
        images[rows, top : top + size[0], left : left + size[1]] = torch.from_numpy(fine).half()
    return images


def _describe(images: Tensor) -> Tensor:
    """Log amplitude spectra in log-polar coordinates, each radius standardised: [K, A, R].

    A shift of the image changes nothing; a turn shifts angles, a zoom shifts radii, a mirror reverses angles.
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
    """Descriptors [K, A, R] of images that are mirrored, turned and zoomed by steps of the two axes."""
    if mirrored:
        descriptors = descriptors[:, -torch.arange(ANGLES) % ANGLES]
    shifted = functional.pad(torch.roll(descriptors, turn, dims=1), (zoom, -zoom))
    return shifted * (RADII / (RADII - abs(zoom)))  # for the radii that fell off


def _best_correlation(some: Tensor, every: Tensor) -> Tensor:
    """Correlation of descriptors [M, A, R] and [K, A, R] at their best alignment: [M, K], at least 0."""
    best, flat = torch.zeros(len(some), len(every)), every.flatten(1).T
    for alignment in ALIGNMENTS:
        torch.maximum(best, _align(some, *alignment).flatten(1) @ flat, out=best)
    return best


def _link(
    rows: Tensor,
    images: Tensor,
    descriptors: Tensor,
    scores: dict[Positions, float],
    pool: ThreadPoolExecutor,
) -> None:
    """Add to `scores` those of `rows` with their nearest neighbours outside their groups, until none grows.

    The nearest neighbours alone would end inside a tight cluster of copies, unconnected to the next.
    """
    parts = pool.map(lambda part: _best_correlation(descriptors[part], descriptors), rows.split(ROWS // 4))
    likeness = torch.cat(list(parts))  # [M, K]
    while len(rows):
        group = torch.from_numpy(connected_components(len(images), _linked_pairs(scores, images.shape[-1])))
        value, column = likeness.masked_fill(group[rows, None] == group, 0).topk(min(NEIGHBOURS, len(images)))
        pairs = torch.stack([rows[:, None].expand_as(column), column], dim=-1)[value > 0]  # [P, 2]
        fresh = sorted({(min(pair), max(pair)) for pair in pairs.tolist()} - scores.keys())
        batches = [torch.tensor(fresh[start : start + BATCH]) for start in range(0, len(fresh), BATCH)]
        found = pool.map(lambda batch: _compare(batch, images, descriptors), batches)
        scores.update(zip(fresh, (score for part in found for score in part), strict=True))
        grown = {
            position for pair in _linked_pairs(scores, images.shape[-1]) & set(fresh) for position in pair
        }
        again = torch.tensor([row in grown for row in rows.tolist()])
        rows, likeness = rows[again], likeness[again]


def _linked_pairs(scores: dict[Positions, float], side: int) -> set[Positions]:
    """Pairs that are one image. At full size, different knees score up to 0.76, 99 % of their copies 0.84."""
    least = SAME + (1 - SAME) * max(0.0, 1 - side / DETAILED)
    return {pair for pair, score in scores.items() if score >= least}


def _compare(pairs: Tensor, images: Tensor, descriptors: Tensor) -> list[float]:
    """Normalised cross-correlation of pairs [P, 2] where they match best, at most 1."""
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

    The peak of their correlation over all alignments, refined by a parabola along either axis.
    """
    flat = torch.stack([(_align(moving, *one) * fixed).sum(dim=(1, 2)) for one in ALIGNMENTS], dim=1)
    scores = flat.view(-1, 2, len(TURNS), len(ZOOMS))
    around = functional.pad(scores, (1, 1, 1, 1), mode="reflect")
    more_turn = _vertex(around[:, :, :-2, 1:-1], scores, around[:, :, 2:, 1:-1]).flatten(1)
    more_zoom = _vertex(around[:, :, 1:-1, :-2], scores, around[:, :, 1:-1, 2:]).flatten(1)
    pair, best = torch.arange(len(flat)), flat.argmax(dim=1)
    mirrored, turn, zoom = torch.tensor(ALIGNMENTS)[best].T
    turn, zoom = turn + more_turn[pair, best], zoom + more_zoom[pair, best]
    return torch.stack([mirrored, -math.pi / ANGLES * turn, ZOOM_STEP * zoom], dim=1)


def _vertex(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """Return where the parabola through values at -1, 0 and 1 peaks, if the middle one is the largest."""
    bend = (before - 2 * middle + after).clamp(max=-1e-6)
    return (0.5 * (before - after) / bend).clamp(-0.5, 0.5)


def _apply_warp(images: Tensor, warp: Tensor) -> tuple[Tensor, Tensor]:
    """Images [P, S, S] mirrored, turned and zoomed by `warp` [P, 3], and where they have content."""
    mirrored, angle, zoom = warp.unbind(1)
    cos, sin, sign, zero = angle.cos() * zoom.exp(), angle.sin() * zoom.exp(), 1 - 2 * mirrored, 0 * angle
    matrix = torch.stack([sign * cos, -sign * sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    both = torch.stack([images, torch.ones_like(images)], dim=1)
    grid = functional.affine_grid(matrix, list(both.shape), align_corners=False)
    image, cover = functional.grid_sample(both, grid, align_corners=False).unbind(1)
    return image, cover


def _spectra(images: Tensor, cover: Tensor) -> Tensor:
    """Compute spectra of images [P, S, S], their squares and their cover, padded: [3, P, F, F // 2 + 1]."""
    room = images.shape[-1] + int(images.shape[-1] * REACH)
    return torch.fft.rfft2(torch.stack([images, images**2, cover]), s=(room, room))


def _correlation(moving: Tensor, fixed: Tensor) -> Tensor:
    """Normalised cross-correlation over the overlap at the best shift, from `_spectra` of either side: [P].

    The images have mean 0 wherever one looks: no means are subtracted. Too little structure counts as none.
    """
    room = moving.shape[-2]
    side = math.ceil(room / (1 + REACH))
    common, energy, other = torch.fft.irfft2(moving * fixed[[0, 2, 1]].conj(), s=(room, room))
    least = TEXTURED * side**2
    score = common / (energy.clamp(min=least) * other.clamp(min=least)).sqrt()  # [P, F, F], shifts wrap round
    shift, pair = torch.arange(side - room, room - side + 1), torch.arange(len(score))
    place = score[:, shift][:, :, shift].flatten(1).argmax(dim=1)
    y, x = shift[place // len(shift)], shift[place % len(shift)]
    peak = score[pair, y, x]
    best = peak
    for step in ((1, 0), (0, 1)):
        before, after = score[pair, y - step[0], x - step[1]], score[pair, y + step[0], x + step[1]]
        best = best + 0.25 * (after - before) * _vertex(before, peak, after)
    return best
