"""`python -m benchmarks decode`: decode each format and transfer syntax to 224 x 224 gray on one core.

The engine is compared with Pillow, OpenCV and pydicom (with Pillow), each used as its documentation suggests,
if it can open the file. The image is one synthetic 12-bit radiograph-like field, or its upper 8 bits.
`benchmarks.fast` adds the gain and the differences of `--decode fast`.
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
    """Draw 12 bits, [H, W]: large shapes, trabecula-like texture, detector noise."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((4, 1.0), (16, 0.5), (96, 0.15)):
        coarse = Image.fromarray(rng.normal(0, weight, (cells, cells)).astype(np.float32))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    total = (total - total.min()) / np.ptp(total) * 3500 + 200
    return np.clip(total + rng.normal(0, 12, total.shape), 0, 4095).astype(np.uint16)


def encode_formats(height: int, width: int) -> dict[str, bytes]:
    """Return the encoded image by name of the format."""
    wide = draw_picture(height, width)
    narrow = (wide >> 4).astype(np.uint8)
    gray = Image.fromarray(narrow)
    colour = Image.merge("RGB", (gray, gray.transpose(Image.Transpose.FLIP_TOP_BOTTOM), gray))
    deep = Image.fromarray(wide << np.uint16(4))
    encoded = {
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
        encoded[f"DICOM {syntax}"] = dicom(samples, syntax, bits=bits, **window)
    return encoded


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

    def decode_image(data: bytes) -> object:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
        return cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA)

    return decode_image


def pydicom_decoder() -> DecodeFunction:
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    def decode_image(data: bytes) -> object:
        dataset = pydicom.dcmread(io.BytesIO(data))
        shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
        shown = (shown / shown.max() * 255).astype(np.uint8)
        return np.asarray(Image.fromarray(shown).resize(SIZE, Image.Resampling.BILINEAR))

    return decode_image


def pydicom_rates(encoded: dict[str, bytes], seconds: float) -> dict[str, float | None]:
    return {name: measure_rate(pydicom_decoder(), data, seconds) for name, data in encoded.items()}


def measure_rate(decode_image: DecodeFunction | None, data: bytes, seconds: float) -> float | None:
    """Return the images per second of one core by processor time of all threads, None if it fails."""
    if decode_image is None:
        return None
    try:
        decode_image(data)
    except Exception:  # the peer does not support the format
        return None
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        decode_image(data)
        count += 1
    return count / (time.process_time() - start)


def main(console: Console, options: Any) -> None:
    before = record.describe_machine()
    height, width = options.height, options.width
    decoders = {
        "engine": engine_decoder(),
        "pillow": pillow_decoder(),
        "opencv": opencv_decoder(),
    }
    table = Table("images/s and core", "MB", "MP/s", *decoders, "pydicom", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    formats = {}
    encoded = encode_formats(height, width)
    # in another process, because the engine adds decoders to pydicom
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pydicom_alone = pool.submit(pydicom_rates, encoded, options.seconds).result()
    for name, data in encoded.items():
        rates = {tool: measure_rate(decoder, data, options.seconds) for tool, decoder in decoders.items()} | {
            "pydicom": pydicom_alone[name]
        }
        megapixels = (rates["engine"] or 0) * height * width / 1e6
        formats[name] = {
            "bytes": len(data),
            "images_per_s_and_core": rates,
            "megapixels_per_s_and_core": megapixels,
        }
        cells = ["-" if value is None else f"{value:.1f}" for value in rates.values()]
        table.add_row(name, f"{len(data) / 1e6:.1f}", f"{megapixels:.0f}", *cells)
    console.print(table)
    limited = {name: formats[name]["images_per_s_and_core"]["engine"] for name in LIMITED}
    console.print(f"target: {LIMIT:g} images/s and core for {', '.join(LIMITED)}\n", highlight=False)
    fast_figures = fast.measure_all(
        options.radiographs, options.bundle, rounds=options.rounds, count=options.images
    )
    _show(console, fast_figures)
    figures = {
        "work": {"image": f"{width} x {height}, 12 bits or their upper 8, to {SIZE[0]} x {SIZE[1]} gray"},
        "formats": formats,
        "aim": {"images_per_s_and_core": LIMIT, "of": limited},
        "fast": fast_figures,
    }
    target = options.output / "decode-cpu.json"
    command = f"decode --width {width} --height {height} --seconds {options.seconds:g}"
    record.write_record(target, command, figures, before=before)
    console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)


def _show(console: Console, figures: dict[str, Any]) -> None:
    """Print the gain and the differences of `--decode fast`."""
    table = Table("images/s and core", *figures["images_per_s_and_core"], box=None, pad_edge=False)
    table.add_row(figures["images"], *(f"{value:.0f}" for value in figures["images_per_s_and_core"].values()))
    speedups = (f"{ratio['median']:.2f}" for ratio in figures["fast_against"].values())
    table.add_row("speed-up of fast", "", *speedups)
    console.print(table)
    for name in ("gray_levels_from_exact", "scores_from_exact"):
        for key, value in (figures[name] or {}).items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            console.print(f"{name}, {key}: {shown}".replace("_", " "), highlight=False)
    console.print(f"target: {fast.TARGET_SPEEDUP:g} x pillow", highlight=False)
