"""Draw synthetic knee radiographs with known labels: `python -m training.synthetic OUT --count N`.

A latent T-score gives the label; a noisy surrogate of it shapes the image, so P(class | surrogate) has an
exact closed form, the ceiling of any classifier. The class changes only structure: cortical thickness, and
the spacing, volume fraction, anisotropy and roughness of the trabeculae. Mean mineral content, exposure,
window and gamma are independent of it, and thin cortices are denser than in reality, so that the gray level
does not predict the class: on 600 balanced images of 256 x 256, logistic regression has an accuracy of 0.34
from mean and spread of the gray level, 0.44 from its histogram, 0.49 from a 16 x 16 thumbnail and 0.85 from
30 texture features; the ceiling is 0.94.

The knee is drawn at about half of life size, in a field of 62-76 mm, while its trabeculae keep their true
spacing: after a resize to 224 x 224 a pixel is 0.28-0.34 mm, and the finest spacing (0.7 mm) still resolved.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage
from scipy.special import expit, ndtr, ndtri

from engine.cli.parser import Parser
from engine.cli.terminal import run_command
from engine.core.errors import UsageError

CLASSES = ("normal", "osteopenia", "osteoporosis")
NORMAL_FROM, OSTEOPOROSIS_TO = -1.0, -2.5  # T-score, WHO 1994: normal T >= -1.0, osteoporosis T <= -2.5
SOFT_PER_MM, BONE_PER_MM, METAL_PER_MM = 0.021, 0.055, 0.9  # linear attenuation near 50 keV
DRAWN_PX = 1024  # anatomy is drawn on at most this many pixels a side; only noise and marks need more
PARALLEL_FROM = 48  # below this many images, starting processes costs more than it saves
SITES = ("north/2019", "north/2021", "south", "walk-in")
GLYPHS = {"L": "10000 10000 10000 10000 10000 10000 11111", "R": "11110 10001 10001 11110 10100 10010 10001"}

Floats = NDArray[Any]  # float32
Side = Literal["L", "R"]
Balance = Literal["balanced", "natural"]


@dataclass(frozen=True)
class Recipe:
    """The ranges of all random draws; pairs are the ends of a uniform draw."""

    t_mean: float = -1.6
    t_sd: float = 1.35
    label_noise_sd: float = 0.15  # T-score; Bayes ceiling 96 % at 0.10, 94 % at 0.15, 88 % at 0.30
    field_mm: tuple[float, float] = (62.0, 76.0)  # along the longer side
    scatter: tuple[float, float] = (0.10, 0.35)
    blur_mm: tuple[float, float] = (0.06, 0.14)
    log10_photons_per_mm2: tuple[float, float] = (5.7, 6.4)
    gamma: tuple[float, float] = (0.7, 1.45)
    collimator_rate: float = 0.4
    metal_rate: float = 0.06
    jpeg_quality: tuple[int, int] = (60, 98)

    def __post_init__(self) -> None:
        if not (self.t_sd > 0 and self.label_noise_sd > 0):
            raise ValueError(f"t_sd, label_noise_sd must be positive, got {self.t_sd}, {self.label_noise_sd}")


@dataclass(frozen=True)
class Structure:
    """The properties by which the class enters an image."""

    cortex_mm: float
    bone_volume: float  # BV/TV, 0.11-0.30
    spacing_mm: float
    anisotropy: float
    slope: float  # of the amplitude spectrum


@dataclass(frozen=True)
class Sample:
    """A radiograph and its ground truth. `posterior` is P(class | image) under the natural prior."""

    pixels: NDArray[np.uint16]  # [H, W], full range
    label: int  # into CLASSES
    t_score: float
    surrogate: float
    posterior: NDArray[np.float64]  # [3]
    metadata: dict[str, float | int | str]

    @property
    def pixels8(self) -> NDArray[np.uint8]:
        """Return the same picture in 8 bits, [H, W]."""
        return ((self.pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def label_of(t_score: float) -> int:
    """Return the index into CLASSES by the WHO thresholds."""
    return 0 if t_score >= NORMAL_FROM else 2 if t_score <= OSTEOPOROSIS_TO else 1


def posterior(
    surrogate: float, label_noise_sd: float, *, t_mean: float = Recipe.t_mean, t_sd: float = Recipe.t_sd
) -> NDArray[np.float64]:
    """Return the exact P(class | surrogate) [3]: T given s is normal, cut at the WHO thresholds.

    The prior is that of natural data. For class-balanced data, divide by `class_priors` and renormalise.
    """
    gain = t_sd**2 / (t_sd**2 + label_noise_sd**2)
    mean, sd = t_mean + gain * (surrogate - t_mean), label_noise_sd * np.sqrt(gain)
    return _class_masses(mean, sd)


def class_priors(recipe: Recipe = Recipe()) -> NDArray[np.float64]:
    """Return P(class) [3] in natural data."""
    return _class_masses(recipe.t_mean, recipe.t_sd)


def _class_masses(mean: float, sd: float) -> NDArray[np.float64]:
    normal = ndtr((mean - NORMAL_FROM) / sd)
    osteoporosis = ndtr((OSTEOPOROSIS_TO - mean) / sd)
    return np.array([normal, 1.0 - normal - osteoporosis, osteoporosis])


def bone_structure(surrogate: float) -> Structure:
    """Return the bone structure at a surrogate T-score, by the quality q = logistic(0.9 (s + 1.75))."""
    q = float(expit(0.9 * (surrogate + 1.75)))
    return Structure(
        cortex_mm=1.2 + 2.6 * q,
        bone_volume=0.11 + 0.19 * q,
        spacing_mm=1.35 - 0.65 * q,
        anisotropy=2.6 - 1.1 * q,
        slope=1.9 - 0.5 * q,
    )


def render(
    rng: np.random.Generator,
    *,
    surrogate: float,
    height: int,
    width: int,
    side: Side = "R",
    field_mm: float = 70.0,
    recipe: Recipe = Recipe(),
) -> NDArray[np.uint16]:
    """Draw one AP knee, [H, W], bone bright, full 16-bit range. `field_mm` spans the longer side."""
    if min(height, width) < 32:
        raise ValueError(f"a radiograph is at least 32 pixels a side, got {width} x {height}")
    scale = min(1.0, DRAWN_PX / max(height, width))
    rows, columns = round(height * scale), round(width * scale)
    step = field_mm / max(rows, columns)  # mm
    bone = bone_structure(surrogate)
    x, y = _plane(rng, rows, columns, step)
    cortical, trabecular, soft = _anatomy(rng, x, y, bone.cortex_mm, side)
    trabecular *= _mineral(rng, (rows, columns), step, bone)
    attenuation = SOFT_PER_MM * soft + BONE_PER_MM * (cortical + trabecular)
    if rng.random() < recipe.metal_rate:
        attenuation += METAL_PER_MM * _metal(rng, x, y)
    exposure = _detector(rng, attenuation, (height, width), field_mm, recipe)
    picture = _to_display_values(rng, exposure, recipe.gamma)
    if rng.random() < recipe.collimator_rate:
        _collimate(rng, picture)
    _burn_in_side(rng, picture, side, field_mm / max(height, width))
    return np.rint(picture * 65535).astype(np.uint16)


def _plane(rng: np.random.Generator, rows: int, columns: int, step: float) -> tuple[Floats, Floats]:
    """Return the coordinates of each pixel in mm from the joint centre, [H, W] each; y points to the foot."""
    x = ((np.arange(columns) - columns / 2) * step - rng.uniform(-3, 3)).astype(np.float32)
    y = ((np.arange(rows) - rows / 2) * step - rng.uniform(-5, 5)).astype(np.float32)
    angle, zoom = rng.uniform(-0.1, 0.1), rng.uniform(0.92, 1.08)
    c, s = math.cos(angle) / zoom, math.sin(angle) / zoom
    return c * x + s * y[:, None], c * y[:, None] - s * x


def _anatomy(
    rng: np.random.Generator, x: Floats, y: Floats, cortex: float, side: Side
) -> tuple[Floats, Floats, Floats]:
    """Return path lengths in mm through cortical bone, trabecular bone and soft tissue, [H, W] each."""
    lateral = x * (-1 if side == "R" else 1)  # an AP view shows the patient's right at the left
    condyle, gap = rng.uniform(19, 21.5), rng.uniform(1.4, 2.6)
    shaft = condyle * rng.uniform(0.38, 0.52)
    parts = [
        _femur(lateral - rng.uniform(-0.08, 0.08) * y, -y - gap / 2, condyle, shaft, cortex),
        _tibia(lateral - rng.uniform(-0.05, 0.05) * y, y - gap / 2, condyle * 0.97, shaft, cortex),
        _fibula(lateral - condyle * rng.uniform(0.76, 0.84), y - rng.uniform(6, 9), 0.6 * cortex),
        _patella(lateral - rng.uniform(-2, 2), y + rng.uniform(10, 14), rng.uniform(8, 10)),
    ]
    cortical = sum((shell for shell, _ in parts), np.zeros_like(x))
    marrow = _smooth((np.abs(y) - 12) / 22)  # shafts hold fat where the ends hold struts
    trabecular = sum((core for _, core in parts), np.zeros_like(x)) * (1 - 0.75 * marrow)
    density = rng.uniform(0.8, 1.2) * math.sqrt(2.5 / cortex)  # makes the gray level independent of the class
    return density * cortical, trabecular, _soft_tissue(rng, x, y, condyle)


def _smooth(t: Floats) -> Floats:
    """Return a cubic step from 0 at t <= 0 to 1 at t >= 1."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _chord(x: Floats, half_width: Floats | float, depth: float) -> Floats:
    """Return the path length through an ellipse `depth` times as deep as it is wide."""
    return 2 * depth * np.sqrt(np.maximum(np.maximum(half_width, 0) ** 2 - x**2, 0))


def _cap(from_end: Floats, rounding: float) -> Floats:
    """Return the share of the path left near a bone's end, rounded off over `rounding` mm."""
    return np.sqrt(1 - (1 - np.clip(from_end / rounding, 0, 1)) ** 2)


def _shell_and_core(
    x: Floats, half_width: Floats, from_end: Floats, wall: Floats, depth: float = 0.8, rounding: float = 8
) -> tuple[Floats, Floats]:
    """Return the paths through a bone's cortical shell, `wall` mm thick, and through its core."""
    total = _chord(x, half_width, depth) * _cap(from_end, rounding)
    core = np.minimum(_chord(x, half_width - wall, depth) * _cap(from_end - wall, rounding), total)
    return total - core, core


def _femur(x: Floats, up: Floats, condyle: float, shaft: float, cortex: float) -> tuple[Floats, Floats]:
    flare = _smooth((30 - up) / 24)
    rim = np.maximum(np.abs(x) / (0.5 * condyle) - 1, 0)
    surface = 5 * np.exp(-((x / 4.5) ** 2)) + 4 * rim**4  # intercondylar notch, rounded condyles
    return _shell_and_core(x, shaft + (condyle - shaft) * flare, up - surface, cortex * (1 - 0.72 * flare))


def _tibia(x: Floats, down: Floats, plateau: float, shaft: float, cortex: float) -> tuple[Floats, Floats]:
    flare = _smooth((32 - down) / 27)
    spines = np.exp(-(((x - 2.4) / 1.3) ** 2)) + np.exp(-(((x + 2.4) / 1.3) ** 2))
    dishes = np.exp(-(((np.abs(x) - 0.5 * plateau) / 5) ** 2))
    surface = 1.2 * dishes - 2.4 * spines + 3 * (x / plateau) ** 8
    width = 0.92 * shaft + (plateau - 0.92 * shaft) * flare
    return _shell_and_core(x, width, down - surface, cortex * (1 - 0.7 * flare), rounding=6)


def _fibula(x: Floats, down: Floats, cortex: float) -> tuple[Floats, Floats]:
    width = 2.6 + 2.2 * np.exp(-(((down - 4) / 5) ** 2))
    return _shell_and_core(x, width, down, np.minimum(cortex, 0.5 * width), depth=0.9, rounding=4)


def _patella(x: Floats, y: Floats, radius: float) -> tuple[Floats, Floats]:
    from_centre = np.hypot(x, y / 1.15)
    outer, inner = _chord(from_centre, radius, 0.5), _chord(from_centre, radius - 0.8, 0.5)
    return outer - inner, 0.35 * inner


def _soft_tissue(rng: np.random.Generator, x: Floats, y: Floats, condyle: float) -> Floats:
    """Return the path through skin, fat and muscle in mm of muscle: fat attenuates a fifth less."""
    bulge = rng.uniform(1, 5) * _smooth(-y / 35) + rng.uniform(1, 4) * _smooth((y - 8) / 25)
    skin = condyle + rng.uniform(5, 8) + bulge
    return _chord(x, skin, 0.8) + 0.25 * _chord(x, skin - rng.uniform(2, 4), 0.8)


def _mineral(rng: np.random.Generator, shape: tuple[int, int], step: float, bone: Structure) -> Floats:
    """Return the mineral fraction, [H, W]; its texture depends on the class, its mean and drift do not."""
    layers = [(0.0, 1.0), (0.0, 1.0), (0.5, 0.7), (1.57, 0.7)]  # tilt in radians, weight: load runs down
    texture = np.zeros(shape, np.float32)
    for tilt, weight in layers:
        plate = _struts(rng, shape, step, bone, tilt + rng.normal(0, 0.15))
        texture += weight * (plate - plate.mean())
    coarse = rng.standard_normal((8, 8), dtype=np.float32)
    drift = ndimage.zoom(coarse, (shape[0] / 8, shape[1] / 8), order=1, mode="nearest", grid_mode=True)
    mean = rng.uniform(0.17, 0.30)
    return np.maximum(mean * (1 + 0.1 * drift) + 0.1 * texture, 0)


def _struts(
    rng: np.random.Generator, shape: tuple[int, int], step: float, bone: Structure, tilt: float
) -> Floats:
    """Draw one layer of trabeculae, [H, W] in 0-1: a power-law field, soft-thresholded to BV/TV."""
    rows, columns = (fft.next_fast_len(n, real=True) for n in shape)
    fy = fft.fftfreq(rows, step).astype(np.float32)[:, None]  # cycles per mm
    fx = fft.rfftfreq(columns, step).astype(np.float32)
    across = math.cos(tilt) * fx + math.sin(tilt) * fy
    along = math.cos(tilt) * fy - math.sin(tilt) * fx
    k2 = (across**2 + (bone.anisotropy * along) ** 2) * np.float32(bone.spacing_mm**2) + np.float32(1e-6)
    # amplitude k^-slope, from 0.7 to 3 cycles per spacing
    gain = np.exp(-0.5 * bone.slope * np.log(k2) - (0.49 / k2) ** 2 - k2 / 9)
    noise = rng.standard_normal((*k2.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    plate = fft.irfft2(gain * noise, s=(rows, columns))[: shape[0], : shape[1]]
    cut = ndtri(1 - bone.bone_volume)
    return expit((plate / plate.std() - np.float32(cut)) * np.float32(4))


def _metal(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Return the path in mm through one screw in the bone."""
    angle, length, radius = rng.uniform(-0.6, 0.6), rng.uniform(8, 18), rng.uniform(0.8, 1.5)
    x, y = x - rng.uniform(-10, 10), y - math.copysign(rng.uniform(10, 22), rng.random() - 0.5)
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    thread = radius * (1 + 0.12 * np.cos(2 * np.pi * along / 1.4))
    return 2 * np.sqrt(np.maximum(thread**2 - across**2, 0)) * (np.abs(along) < length / 2)


def _detector(
    rng: np.random.Generator, attenuation: Floats, shape: tuple[int, int], field_mm: float, recipe: Recipe
) -> Floats:
    """Return the share of the open beam's photons, [H, W]: Beer-Lambert, blur, scatter, Poisson noise."""
    step = field_mm / max(attenuation.shape)
    primary = ndimage.gaussian_filter(np.exp(-attenuation), rng.uniform(*recipe.blur_mm) / step, truncate=3)
    thin = max(1, round(1.5 / step))  # scatter is smooth over centimetres
    veil = ndimage.gaussian_filter(primary[::thin, ::thin], 9 / (thin * step), mode="nearest")
    share = rng.uniform(*recipe.scatter)
    signal = (1 - share) * _resize(primary, shape) + share * _resize(veil, shape)
    photons = 10 ** rng.uniform(*recipe.log10_photons_per_mm2) * (field_mm / max(shape)) ** 2
    noise = rng.standard_normal(shape, dtype=np.float32)
    return np.maximum(signal + noise * np.sqrt(signal / np.float32(photons)), np.float32(1e-4))


def _resize(image: Floats, shape: tuple[int, int]) -> Floats:
    if image.shape == shape:
        return image
    zoom = (shape[0] / image.shape[0], shape[1] / image.shape[1])
    return ndimage.zoom(image, zoom, order=1, mode="nearest", grid_mode=True)


def _to_display_values(rng: np.random.Generator, exposure: Floats, gamma: tuple[float, float]) -> Floats:
    """Apply negative logarithm (bone bright), a random percentile window and gamma; 0-1, in place."""
    film = np.negative(np.log(exposure, out=exposure), out=exposure)
    stride = max(1, max(film.shape) // 256)
    low, high = np.percentile(film[::stride, ::stride], [rng.uniform(1, 12), rng.uniform(98.5, 99.9)])
    film -= np.float32(low)
    film /= np.float32(max(high - low, 1e-3) * rng.uniform(0.95, 1.1))
    np.clip(film, 0, 1, out=film)
    return np.power(film, np.float32(rng.uniform(*gamma)), out=film)


def _collimate(rng: np.random.Generator, picture: Floats) -> None:
    """Black out a border along some of the sides, in place."""
    level = rng.uniform(0, 0.08)
    for view in (picture, picture[::-1], picture.T, picture.T[::-1]):
        if rng.random() < 0.6:
            view[: int(len(view) * rng.uniform(0.01, 0.07))] = level


def _burn_in_side(rng: np.random.Generator, picture: Floats, side: Side, step: float) -> None:
    """Burn in the side's letter, in place: a bright letter, or a dark one on a plaque."""
    letter = np.array([[int(bit) for bit in row] for row in GLYPHS[side].split()], np.float32)
    dot = max(1, round(rng.uniform(0.45, 0.75) / step))
    glyph = np.kron(np.pad(letter, 2), np.ones((dot, dot), np.float32)) > 0
    if glyph.shape[0] >= picture.shape[0] // 2 or glyph.shape[1] >= picture.shape[1] // 2:
        return
    top = int(picture.shape[0] * rng.uniform(0.08, 0.85 - glyph.shape[0] / picture.shape[0]))
    margin = int(picture.shape[1] * rng.uniform(0.01, 0.05))
    left = margin if side == "R" else picture.shape[1] - margin - glyph.shape[1]
    under = picture[top : top + glyph.shape[0], left : left + glyph.shape[1]]
    plaque, level = rng.random() < 0.4, rng.uniform(0.75, 1.0)
    under[glyph != plaque] = level


def draw_sample(
    seed: int,
    index: int,
    *,
    label: int | None = None,
    size_range: tuple[int, int] = (500, 2600),
    recipe: Recipe = Recipe(),
) -> Sample:
    """Draw radiograph `index` of the stream `seed`; it does not depend on other draws.

    With `label`, the T-score is drawn from that class. Sides are within `size_range`, both ends included.
    """
    low, high = size_range
    if not 32 <= low <= high:
        raise ValueError(f"size_range must be 32 <= MIN <= MAX, got {low} {high}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    encoding = _draw_encoding(rng, recipe)  # first: the file name must not depend on size or label
    t_score = _draw_t_score(rng, label, recipe)
    surrogate = t_score + rng.normal(0, recipe.label_noise_sd)
    long = int(rng.integers(low, high, endpoint=True))
    short = max(low, round(long * rng.uniform(0.82, 1.0)))
    height, width = (long, short) if rng.random() < 0.7 else (short, long)
    side: Side = "L" if rng.random() < 0.5 else "R"
    field_mm = rng.uniform(*recipe.field_mm)
    metadata = {"side": side, "field_mm": field_mm, **encoding}
    pixels = render(
        rng, surrogate=surrogate, height=height, width=width, side=side, field_mm=field_mm, recipe=recipe
    )
    truth = posterior(surrogate, recipe.label_noise_sd, t_mean=recipe.t_mean, t_sd=recipe.t_sd)
    return Sample(pixels, label_of(t_score), t_score, surrogate, truth, metadata)


def _draw_t_score(rng: np.random.Generator, label: int | None, recipe: Recipe) -> float:
    cuts = {0: (NORMAL_FROM, np.inf), 1: (OSTEOPOROSIS_TO, NORMAL_FROM), 2: (-np.inf, OSTEOPOROSIS_TO)}
    if label is not None and label not in cuts:
        raise ValueError(f"label must be one of {list(cuts)} ({', '.join(CLASSES)}), got {label!r}")
    low, high = (-np.inf, np.inf) if label is None else cuts[label]
    below, above = ndtr((np.array([low, high]) - recipe.t_mean) / recipe.t_sd)
    return float(recipe.t_mean + recipe.t_sd * ndtri(rng.uniform(below, above)))


def _draw_encoding(rng: np.random.Generator, recipe: Recipe) -> dict[str, float | int | str]:
    """Draw how the file is written, independently of the class."""
    suffix = str(rng.choice([".jpg", ".jpeg", ".png", ".png16"], p=[0.5, 0.1, 0.25, 0.15]))
    low, high = recipe.jpeg_quality
    return {
        "encoding": suffix.removeprefix("."),
        "mode": "RGB" if suffix != ".png16" and rng.random() < 0.15 else "L",
        "quality": int(rng.integers(low, high, endpoint=True)),
    }


def encode_sample(sample: Sample) -> tuple[bytes, str]:
    """Encode a sample; return the bytes of its file and the file's suffix."""
    kind = sample.metadata["encoding"]
    stream = io.BytesIO()
    if kind == "png16":
        Image.fromarray(sample.pixels).save(stream, "PNG", compress_level=1)
        return stream.getvalue(), ".png"
    picture = Image.fromarray(sample.pixels8).convert(str(sample.metadata["mode"]))
    if kind == "png":
        picture.save(stream, "PNG", compress_level=1)
    else:
        picture.save(stream, "JPEG", quality=int(sample.metadata["quality"]))
    return stream.getvalue(), f".{kind}"


def _write_one(
    task: tuple[int, int | None], *, folder: Path, by_class: bool, seed: int, **options: Any
) -> tuple[str, int, float, int]:
    """Draw and write one (index, label); returns its path below the folder, index, T-score and label."""
    index, label = task
    sample = draw_sample(seed, index, label=label, **options)
    content, suffix = encode_sample(sample)
    name = hashlib.blake2s(f"{seed}/{index}".encode(), digest_size=6).hexdigest()  # hides the order
    subfolder = CLASSES[sample.label] if by_class else SITES[int(name, 16) % len(SITES)]
    path = folder / subfolder / (name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, content)
    return f"{subfolder}/{path.name}", index, sample.t_score, sample.label


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _write_all(
    labels: list[int | None], processes: int | None, **shared: Any
) -> list[tuple[str, int, float, int]]:
    """Write an image for every label, in worker processes when there are many; rows sorted by path."""
    if not labels:
        raise ValueError("the number of images must be at least 1")
    if processes is None:
        processes = (os.cpu_count() or 1) if len(labels) >= PARALLEL_FROM else 1
    write = partial(_write_one, **shared)
    if processes == 1:
        return sorted(map(write, enumerate(labels)))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return sorted(pool.map(write, enumerate(labels), chunksize=4))


def write_archive(
    folder: str | Path,
    *,
    count: int,
    seed: int,
    size_range: tuple[int, int] = (500, 2600),
    balance: Balance = "natural",
    processes: int | None = None,
    recipe: Recipe = Recipe(),
) -> Path:
    """Write `count` images in sub-folders and `manifest.csv` beside them; returns the manifest's path.

    The manifest is written last, so it exists only beside a complete archive; a killed call can be repeated.
    """
    if balance not in get_args(Balance):
        raise ValueError(f"balance must be one of {get_args(Balance)}, got {balance!r}")
    folder = Path(folder)
    manifest = folder / "manifest.csv"
    manifest.unlink(missing_ok=True)
    labels: list[int | None] = [None] * count
    if balance == "balanced" and count > 0:  # shuffled, so that the patient's number does not tell the class
        labels = (np.random.default_rng(seed).permutation(count) % len(CLASSES)).tolist()
    written = _write_all(
        labels, processes, folder=folder, by_class=False, seed=seed, size_range=size_range, recipe=recipe
    )
    rows = io.StringIO(newline="")
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["path", "patient", "t_score", "label"])
    for path, index, t_score, label in written:
        table.writerow([path, f"{index:05d}", repr(t_score), CLASSES[label]])
    _write_atomically(manifest, rows.getvalue().encode())
    return manifest


def write_class_folders(
    folder: str | Path,
    *,
    per_class: int,
    seed: int,
    size_range: tuple[int, int] = (500, 2600),
    processes: int | None = None,
    recipe: Recipe = Recipe(),
) -> Path:
    """Write `per_class` images to each of `folder/normal`, `folder/osteopenia`, `folder/osteoporosis`."""
    folder = Path(folder)
    labels: list[int | None] = [*range(len(CLASSES))] * per_class
    _write_all(
        labels, processes, folder=folder, by_class=True, seed=seed, size_range=size_range, recipe=recipe
    )
    return folder


def option_parser() -> Parser:
    parser = Parser(
        "python -m training.synthetic",
        "OUT --count N [option ...]",
        description="Write synthetic knee radiographs with known T-scores.",
        examples="example: python -m training.synthetic archive --count 200 --seed 7 --size 500 1400",
    )
    add = parser.add
    add("out", type=Path, metavar="OUT", help="folder to write to")
    add("--count", type=int, required=True, metavar="N", help="images; with --class-folders, of each class")
    add("--seed", type=int, default=0, metavar="S", help="the same seed draws the same images (%(default)s)")
    add(
        "--size",
        type=int,
        nargs=2,
        default=(500, 2600),
        metavar=("MIN", "MAX"),
        help="range of sides, pixels",
    )
    add("--class-folders", action="store_true", help="write class folders for training, without a manifest")
    add("--balanced", action="store_true", help="draw equally many images of each class")
    add("--processes", type=int, metavar="P", help="number of worker processes (one per core)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Write the images; return the exit status."""

    def write() -> int:
        options = option_parser().parse_args(arguments)
        shared = {"seed": options.seed, "size_range": tuple(options.size), "processes": options.processes}
        try:
            if options.class_folders:
                print(write_class_folders(options.out, per_class=options.count, **shared))
            else:
                balance: Balance = "balanced" if options.balanced else "natural"
                print(write_archive(options.out, count=options.count, balance=balance, **shared))
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from None
        return 0

    return run_command(write)


if __name__ == "__main__":
    sys.exit(main())
