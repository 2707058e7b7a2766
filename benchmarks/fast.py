"""Compare speed and pixels of `--decode fast` with `exact`, Pillow and OpenCV on gray JPEGs.

All decoders get the same files in turn, in random order, and are timed by the processor time of one core.
"pillow" is the usual `Image.open(file).convert("RGB").resize((224, 224))` with its bicubic filter; "pillow
bilinear" uses the engine's filter.
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

from benchmarks.intervals import bootstrap_interval
from engine.bundle import bundle as bundles
from engine.bundle.bundle import Bundle
from engine.core.settings import CPU_BATCH, DECODES, Decode
from engine.formats import header
from engine.preprocess.codecs.decode import decode
from engine.preprocess.codecs.jpeg import choose_scale
from engine.preprocess.resize import ResizePipeline
from engine.runners.onnx import OnnxRunner
from engine.scoring import ensemble

SIZE = (224, 224)
TARGET_SPEEDUP = 3.5  # times Pillow's rate
SIDE, SYNTHETIC, REAL = 1024, 16, 64  # pixels; images
MAX_PIXELS = 1 << 30

Pixels = npt.NDArray[np.uint8]
DecodeFunction = Callable[[list[bytes]], object]


def draw_jpeg(index: int) -> bytes:
    """Draw a gray JPEG of 1024 x 1024 pixels, quality 90, as in the other benchmarks."""
    from training.synthetic import draw_sample

    buffer = io.BytesIO()
    pixels = draw_sample(seed=1, index=index, size_range=(SIDE, SIDE)).pixels8
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def load_jpegs(folder: Path | None, count: int) -> tuple[list[bytes], str]:
    """Load JPEGs, spread evenly over `folder` if set, and describe them."""
    if folder is None:
        with ProcessPoolExecutor() as pool:
            images = list(pool.map(draw_jpeg, range(count)))
        return images, f"{count} synthetic radiographs, gray, {SIDE} x {SIDE}, quality 90"
    paths = sorted(path for path in folder.rglob("*.[jJ][pP]*") if path.is_file())
    chosen = [path.read_bytes() for path in paths[:: max(1, len(paths) // REAL)][:REAL]]
    return chosen, f"{len(chosen)} radiographs given"


def engine_decoder(how: Decode, size: tuple[int, int] = SIZE) -> Callable[[list[bytes]], Pixels]:
    """Decode as the decoder process does, but in this process."""
    graph = ResizePipeline(size=size, batch_size=CPU_BATCH, threads=1)
    least = size if how == "fast" else None

    def decode_images(images: list[bytes]) -> Pixels:
        pixels = []
        for start in range(0, len(images), CPU_BATCH):
            batch = [
                decode(data, header.parse_header(data, MAX_PIXELS), least=least)
                for data in images[start : start + CPU_BATCH]
            ]
            pixels.append(graph.run([image.gray for image in batch], [image.margins for image in batch]))
        return np.concatenate(pixels)

    return decode_images


def pillow_decoder(resample: Image.Resampling | None = None) -> DecodeFunction:
    def decode_image(data: bytes) -> object:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(SIZE[::-1], resample))

    return lambda images: [decode_image(data) for data in images]


def opencv_decoders() -> dict[str, DecodeFunction]:
    """Return full and reduced grayscale decoding; none if OpenCV is missing."""
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

    def decode_image(data: bytes, scale: int) -> object:
        gray = cv2.imdecode(np.frombuffer(data, np.uint8), flags[scale])
        return cv2.resize(gray, SIZE[::-1], interpolation=cv2.INTER_AREA)

    def decode_reduced(images: list[bytes]) -> object:
        return [
            decode_image(data, choose_scale(header.parse_header(data, MAX_PIXELS), SIZE)) for data in images
        ]

    return {
        "opencv": lambda images: [decode_image(data, 1) for data in images],
        "opencv reduced": decode_reduced,
    }


def measure_seconds(
    decoders: dict[str, DecodeFunction], images: list[bytes], rounds: int
) -> dict[str, list[float]]:
    """Return processor seconds per image of each round after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for round_ in range(rounds + 1):
        for name in random.sample(list(decoders), len(decoders)):
            start = time.process_time()
            decoders[name](images)
            if round_:
                seconds[name].append((time.process_time() - start) / len(images))
    return seconds


def median_ratio(slow: Sequence[float], quick: Sequence[float]) -> dict[str, float | None]:
    """Return the median of the rounds' ratios and its 95 % bootstrap interval."""
    ratios: list[float] = np.divide(slow, quick).tolist()
    low, high = bootstrap_interval(ratios)
    return {"median": float(np.median(ratios)), "low": low, "high": high}


def compare_pixels(exact: Pixels, fast: Pixels) -> dict[str, float]:
    """Measure the differences in gray levels."""
    difference = np.abs(exact.astype(np.int16) - fast)
    means = difference.mean(axis=(1, 2, 3))
    return {
        "mean": float(means.mean()),
        "mean_of_the_worst_image": float(means.max()),
        "largest": int(difference.max()),
        "share_over_8": float((difference > 8).mean()),
    }


def compare_scores(bundle: Bundle, images: list[bytes]) -> dict[str, Any]:
    """Score the same images decoded in both ways and compare."""
    logits: dict[str, list[npt.NDArray[np.float32]]] = {how: [] for how in DECODES}
    for how in DECODES:
        small = engine_decoder(how, bundle.size)(images)
        for member in bundle.members:
            with OnnxRunner(member, bundle) as runner:
                logits[how].append(runner.infer(small))
    exact, fast = (
        ensemble.combine_logits(
            np.stack(logits[how]),
            weights=bundle.weights,
            temperatures=[member.temperature for member in bundle.members],
            temperature=bundle.temperature,
        )[1]
        for how in DECODES
    )
    difference = np.abs(exact - fast)
    return {
        "trained_with": bundle.decode,
        "images": len(images),
        "largest_difference_in_probability": float(difference.max()),
        "mean_difference_in_probability": float(difference.mean()),
        "same_class": float((exact.argmax(axis=1) == fast.argmax(axis=1)).mean()),
    }


def measure_all(
    folder: Path | None, bundle: Path | None, *, rounds: int, count: int = SYNTHETIC
) -> dict[str, Any]:
    """Measure rates, ratios, pixels and, with a bundle, scores, on synthetic images or JPEGs of `folder`."""
    images, what = load_jpegs(folder, count)
    exact, fast = engine_decoder("exact"), engine_decoder("fast")
    decoders: dict[str, DecodeFunction] = {
        "fast": fast,
        "exact": exact,
        "pillow": pillow_decoder(),
        "pillow bilinear": pillow_decoder(Image.Resampling.BILINEAR),
        **opencv_decoders(),
    }
    seconds = measure_seconds(decoders, images, rounds)
    return {
        "images": what,
        "bytes_of_a_file": sum(map(len, images)) / len(images),
        "rounds": rounds,
        "images_per_s_and_core": {name: 1 / float(np.median(times)) for name, times in seconds.items()},
        "fast_against": {
            name: median_ratio(times, seconds["fast"]) for name, times in seconds.items() if name != "fast"
        },
        "aim": {"pillow": TARGET_SPEEDUP},
        "gray_levels_from_exact": compare_pixels(exact(images), fast(images)),
        "scores_from_exact": compare_scores(bundles.load_bundle(bundle), images) if bundle else None,
    }
