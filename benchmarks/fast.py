"""`--decode fast` beside `exact`, Pillow and OpenCV: gray JPEG to 224 x 224, its speed and its pixels.

Every way takes the same files in turns, in random order, and is timed by the processor time of one core.
"pillow" is what is usually written, `Image.open(file).convert("RGB").resize((224, 224))`, whose filter is
bicubic; "pillow bilinear" the same with the engine's filter.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.intervals import interval
from engine import bundle, ensemble, header
from engine.bundle import Bundle
from engine.preprocess.codecs import decode
from engine.preprocess.codecs.jpeg import scale_for
from engine.preprocess.graph import Graph
from engine.runners.onnx import OnnxRunner
from engine.settings import CPU_BATCH, DECODES, Decode

SIZE = (224, 224)
AIM = 3.5  # times Pillow's rate
SIDE, SYNTHETIC, REAL = 1024, 16, 64  # pixels; images
MAX_PIXELS = 1 << 30

Pixels = npt.NDArray[np.uint8]
Way = Callable[[list[bytes]], object]


def synthetic(index: int) -> bytes:
    """A gray JPEG of 1024 x 1024 pixels, quality 90, as the other benchmarks have them."""
    from training.synthetic import sample

    buffer = io.BytesIO()
    pixels = sample(seed=1, index=index, size_range=(SIDE, SIDE)).pixels8
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def images_of(folder: Path | None, count: int) -> tuple[list[bytes], str]:
    """Gray and colour JPEGs, evenly from `folder` if there is one, and what they are."""
    if folder is None:
        with ProcessPoolExecutor() as pool:
            made = list(pool.map(synthetic, range(count)))
        return made, f"{count} synthetic radiographs, gray, {SIDE} x {SIDE}, quality 90"
    paths = sorted(path for path in folder.rglob("*.[jJ][pP]*") if path.is_file())
    chosen = [path.read_bytes() for path in paths[:: max(1, len(paths) // REAL)][:REAL]]
    return chosen, f"{len(chosen)} radiographs given"


def engine_way(how: Decode, size: tuple[int, int] = SIZE) -> Callable[[list[bytes]], Pixels]:
    """As the decoder process does it, but in this one."""
    graph = Graph(size=size, batch_size=CPU_BATCH, threads=1)
    least = size if how == "fast" else None

    def way(images: list[bytes]) -> Pixels:
        found = []
        for start in range(0, len(images), CPU_BATCH):
            batch = [
                decode(data, header.parse(data, MAX_PIXELS), least=least)
                for data in images[start : start + CPU_BATCH]
            ]
            found.append(graph.run([one.gray for one in batch], [one.margins for one in batch]))
        return np.concatenate(found)

    return way


def pillow_way(resample: Image.Resampling | None = None) -> Way:
    def one(data: bytes) -> object:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(SIZE[::-1], resample))

    return lambda images: [one(data) for data in images]


def opencv_ways() -> dict[str, Way]:
    """Full and reduced grayscale decoding; nothing where OpenCV is missing."""
    try:
        import cv2
    except ImportError:
        return {}
    cv2.setNumThreads(1)
    flags = {
        1: cv2.IMREAD_GRAYSCALE,
        2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
        4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
        8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    }

    def one(data: bytes, scale: int) -> object:
        gray = cv2.imdecode(np.frombuffer(data, np.uint8), flags[scale])
        return cv2.resize(gray, SIZE[::-1], interpolation=cv2.INTER_AREA)

    def reduced(images: list[bytes]) -> object:
        return [one(data, scale_for(header.parse(data, MAX_PIXELS), SIZE)) for data in images]

    return {"opencv": lambda images: [one(data, 1) for data in images], "opencv reduced": reduced}


def seconds(ways: dict[str, Way], images: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Processor seconds an image, of each round; the first, which warms up, is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name in random.sample(list(ways), len(ways)):
            start = time.process_time()
            ways[name](images)
            if round_:
                found[name].append((time.process_time() - start) / len(images))
    return found


def ratio(slow: Sequence[float], quick: Sequence[float]) -> dict[str, float | None]:
    """The median of the rounds' ratios, and its 95 % bootstrap interval."""
    ratios: list[float] = np.divide(slow, quick).tolist()
    low, high = interval(ratios)
    return {"median": float(np.median(ratios)), "low": low, "high": high}


def pixels(exact: Pixels, fast: Pixels) -> dict[str, float]:
    """How far apart they are, in gray levels."""
    apart = np.abs(exact.astype(np.int16) - fast)
    means = apart.mean(axis=(1, 2, 3))
    return {
        "mean": float(means.mean()),
        "mean_of_the_worst_image": float(means.max()),
        "largest": int(apart.max()),
        "share_over_8": float((apart > 8).mean()),
    }


def scores(models: Bundle, images: list[bytes]) -> dict[str, Any]:
    """What the bundle makes of the same images decoded in both ways."""
    logits: dict[str, list[npt.NDArray[np.float32]]] = {how: [] for how in DECODES}
    for how in DECODES:
        small = engine_way(how, models.size)(images)
        for member in models.members:
            with OnnxRunner(member, models) as runner:
                logits[how].append(runner.infer(small))
    exact, fast = (
        ensemble.fuse(
            np.stack(logits[how]),
            weights=models.weights,
            temperatures=[member.temperature for member in models.members],
            temperature=models.temperature,
        )[1]
        for how in DECODES
    )
    apart = np.abs(exact - fast)
    return {
        "trained_with": models.decode,
        "images": len(images),
        "largest_difference_in_probability": float(apart.max()),
        "mean_difference_in_probability": float(apart.mean()),
        "same_class": float((exact.argmax(axis=1) == fast.argmax(axis=1)).mean()),
    }


def figures(
    folder: Path | None, models: Path | None, *, rounds: int, count: int = SYNTHETIC
) -> dict[str, Any]:
    """Rates, ratios, pixels and, with a bundle, scores; of synthetic images or JPEGs in `folder`."""
    images, what = images_of(folder, count)
    exact, fast = engine_way("exact"), engine_way("fast")
    ways: dict[str, Way] = {
        "fast": fast,
        "exact": exact,
        "pillow": pillow_way(),
        "pillow bilinear": pillow_way(Image.Resampling.BILINEAR),
        **opencv_ways(),
    }
    taken = seconds(ways, images, rounds)
    return {
        "images": what,
        "bytes_of_a_file": sum(map(len, images)) / len(images),
        "rounds": rounds,
        "images_per_s_and_core": {name: 1 / float(np.median(times)) for name, times in taken.items()},
        "fast_against": {
            name: ratio(times, taken["fast"]) for name, times in taken.items() if name != "fast"
        },
        "aim": {"pillow": AIM},
        "gray_levels_from_exact": pixels(exact(images), fast(images)),
        "scores_from_exact": scores(bundle.load(models), images) if models else None,
    }
