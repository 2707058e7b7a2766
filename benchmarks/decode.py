"""`python -m benchmarks decode`: bytes to 224 x 224 gray on one core, every format and transfer syntax.

Beside the engine: Pillow, OpenCV and plain pydicom (with Pillow), each as its documentation suggests, where
it opens the file at all. The image is one synthetic 12-bit radiograph-like field, or its upper 8 bits.
`benchmarks.fast` adds what `--decode fast` gains and changes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import fast, record
from benchmarks.dicom_files import LOSSLESS, LOSSY, dicom
from engine.formats import header
from engine.preprocess.codecs.decode import decode
from engine.preprocess.resize import ResizePipeline

SIZE = (224, 224)
LIMIT = 25.0  # images/s and core, of uncompressed and SV1 DICOM
LIMITED = ("DICOM explicit", "DICOM jpeg-sv1")
WINDOW = {"WindowCenter": 2000, "WindowWidth": 3600}

DecodeFunction = Callable[[bytes], object]


def draw_picture(height: int, width: int) -> npt.NDArray[np.uint16]:
    """12 bits, [H, W]: large shapes, trabecula-like texture, detector noise."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((4, 1.0), (16, 0.5), (96, 0.15)):
        coarse = Image.fromarray(rng.normal(0, weight, (cells, cells)).astype(np.float32))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    total = (total - total.min()) / np.ptp(total) * 3500 + 200
    return np.clip(total + rng.normal(0, 12, total.shape), 0, 4095).astype(np.uint16)


def encode_formats(height: int, width: int) -> dict[str, bytes]:
    """Name to bytes."""
    wide = draw_picture(height, width)
    narrow = (wide >> 4).astype(np.uint8)
    gray = Image.fromarray(narrow)
    colour = Image.merge("RGB", (gray, gray.transpose(Image.Transpose.FLIP_TOP_BOTTOM), gray))
    deep = Image.fromarray(wide << np.uint16(4))
    made = {
        "JPEG gray": _encode(gray, "JPEG", quality=90),
        "JPEG colour": _encode(colour, "JPEG", quality=90),
        "JPEG progressive": _encode(gray, "JPEG", quality=90, progressive=True),
        "JPEG CMYK": _encode(colour.convert("CMYK"), "JPEG", quality=90),
        "PNG 8 bits": _encode(gray, "PNG", compress_level=6),
        "PNG 16 bits": _encode(deep, "PNG", compress_level=6),
        "TIFF uncompressed, 16 bits": _encode(deep, "TIFF"),
        "TIFF LZW": _encode(gray, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": _encode(gray, "TIFF", compression="tiff_adobe_deflate"),
        "BMP": _encode(gray, "BMP"),
        "PGM": _encode(gray, "PPM"),
        "WebP": _encode(gray, "WEBP", quality=90),
        "WebP lossless": _encode(gray, "WEBP", lossless=True, method=0),
        "JPEG 2000": _encode(gray, "JPEG2000"),
        "GIF": _encode(gray, "GIF"),
    }
    for syntax in (*LOSSLESS, *LOSSY):
        samples, bits = (narrow, 8) if syntax == "jpeg" else (wide, 12)
        window = {name: value >> 4 if bits == 8 else value for name, value in WINDOW.items()}
        made[f"DICOM {syntax}"] = dicom(samples, syntax, bits=bits, **window)
    return made


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def engine_decoder() -> DecodeFunction:
    graph = ResizePipeline(size=SIZE, batch_size=1, threads=1)
    return lambda data: graph.run([decode(data, header.parse_header(data, 1 << 30)).gray])


def pillow_decoder() -> DecodeFunction:
    return lambda data: np.asarray(
        Image.open(io.BytesIO(data)).convert("L").resize(SIZE, Image.Resampling.BILINEAR)
    )


def opencv_decoder() -> DecodeFunction | None:
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)

    def way(data: bytes) -> object:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
        return cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA)

    return way


def pydicom_decoder() -> DecodeFunction:
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    def way(data: bytes) -> object:
        dataset = pydicom.dcmread(io.BytesIO(data))
        shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
        shown = (shown / shown.max() * 255).astype(np.uint8)
        return np.asarray(Image.fromarray(shown).resize(SIZE, Image.Resampling.BILINEAR))

    return way


def pydicom_rates(made: dict[str, bytes], seconds: float) -> dict[str, float | None]:
    return {name: measure_rate(pydicom_decoder(), data, seconds) for name, data in made.items()}


def measure_rate(way: DecodeFunction | None, data: bytes, seconds: float) -> float | None:
    """Images per second of one core: by processor time, all threads counted. None where it can't."""
    if way is None:
        return None
    try:
        way(data)
    except Exception:  # a peer that doesn't know the format
        return None
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        way(data)
        count += 1
    return count / (time.process_time() - start)


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    height, width = options.height, options.width
    ways = {
        "engine": engine_decoder(),
        "pillow": pillow_decoder(),
        "opencv": opencv_decoder(),
    }
    table = Table("images/s and core", "MB", "MP/s", *ways, "pydicom", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    found = {}
    made = encode_formats(height, width)
    # apart, since the engine adds decoders to pydicom
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        plain = fresh.submit(pydicom_rates, made, options.seconds).result()
    for name, data in made.items():
        rates = {way: measure_rate(call, data, options.seconds) for way, call in ways.items()} | {
            "pydicom": plain[name]
        }
        megapixels = (rates["engine"] or 0) * height * width / 1e6
        found[name] = {
            "bytes": len(data),
            "images_per_s_and_core": rates,
            "megapixels_per_s_and_core": megapixels,
        }
        cells = ["-" if value is None else f"{value:.1f}" for value in rates.values()]
        table.add_row(name, f"{len(data) / 1e6:.1f}", f"{megapixels:.0f}", *cells)
    console.print(table)
    limited = {name: found[name]["images_per_s_and_core"]["engine"] for name in LIMITED}
    console.print(f"aim: {LIMIT:g} images/s and core of {', '.join(LIMITED)}\n", highlight=False)
    beside = fast.measure_all(
        options.radiographs, options.bundle, rounds=options.rounds, count=options.images
    )
    _show(console, beside)
    figures = {
        "work": {"image": f"{width} x {height}, 12 bits or their upper 8, to {SIZE[0]} x {SIZE[1]} gray"},
        "formats": found,
        "aim": {"images_per_s_and_core": LIMIT, "of": limited},
        "fast": beside,
    }
    target = options.output / "decode-cpu.json"
    command = f"decode --width {width} --height {height} --seconds {options.seconds:g}"
    record.write_record(target, command, figures, before=before)
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)


def _show(console: Console, found: dict[str, Any]) -> None:
    """Print what `--decode fast` gains and changes."""
    table = Table("images/s and core", *found["images_per_s_and_core"], box=None, pad_edge=False)
    table.add_row(found["images"], *(f"{value:.0f}" for value in found["images_per_s_and_core"].values()))
    against = (f"{ratio['median']:.2f}" for ratio in found["fast_against"].values())
    table.add_row("fast is so much faster", "", *against)
    console.print(table)
    for name in ("gray_levels_from_exact", "scores_from_exact"):
        for key, value in (found[name] or {}).items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            console.print(f"{name}, {key}: {shown}".replace("_", " "), highlight=False)
    console.print(f"aim: {fast.TARGET_SPEEDUP:g} x pillow", highlight=False)
