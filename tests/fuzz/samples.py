"""One small good file of every kind that archives hold, made on the spot; `<format>-<variant>` names each."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.dicom_files import dicom
from tests.helpers.images import encode, png, smooth

_ORIENTATION = 0x0112
# first row, first column, row step, column step: PNG's Adam7 passes
_ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)

Gray = npt.NDArray[np.uint8]


def samples(seed: int, *, smallest: int = 40, largest: int = 140) -> dict[str, bytes]:
    """Name to bytes; each file shows a picture of its own, `smallest` to `largest` pixels a side."""
    rng = np.random.default_rng(seed)
    files = {}
    for index, (name, make) in enumerate(_MAKERS.items()):
        height, width = rng.integers(smallest, largest + 1, 2).tolist()
        files[name] = make(smooth(height, width, seed=1000 * seed + index, channels=3))
    return files


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _pillow(mode: str, kind: str, *, pages: int = 1, **options: object):
    """A maker that saves the picture in `mode` with Pillow, `pages` times with a change each time."""

    def make(colour: Gray) -> bytes:
        picture = Image.fromarray(colour)
        picture = Image.fromarray(_twelve_bits(colour)) if mode == "I;16" else picture.convert(mode)
        if mode == "RGBA":
            picture.putalpha(Image.fromarray(np.ascontiguousarray(colour[:, ::-1, 0])))
        if pages > 1:
            more = [picture.rotate(90 * page) for page in range(1, pages)]
            return encode(picture, kind, save_all=True, append_images=more, **options)
        return encode(picture, kind, **options)

    return make


def _twelve_bits(colour: Gray) -> npt.NDArray[np.uint16]:
    return colour[:, :, 0] * np.uint16(16) + colour[:, :, 1] // np.uint8(16)


def _exif_jpeg(colour: Gray) -> bytes:
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    return encode(Image.fromarray(colour[:, :, 0]), "JPEG", exif=exif)


def _interlaced_png(colour: Gray) -> bytes:
    passes = [colour[row::down, column::right] for row, column, down, right in _ADAM7]
    raw = b"".join(b"\0" + line.tobytes() for each in passes if each.size for line in each)
    header = struct.pack(">IIBBBBB", colour.shape[1], colour.shape[0], 8, 2, 0, 0, 1)
    body = {b"IHDR": header, b"IDAT": zlib.compress(raw), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in body.items())


def _ascii_pgm(colour: Gray) -> bytes:
    lines = "\n".join(" ".join(map(str, row)) for row in colour[:, :, 0].tolist())
    return f"P2\n# ascii\n{colour.shape[1]} {colour.shape[0]}\n255\n{lines}\n".encode()


def _tiled_tiff(colour: Gray) -> bytes:
    """Big-endian, 8-bit gray, deflated tiles of 32 x 32: neither is something that Pillow writes."""
    height, width = colour.shape[:2]
    padded = np.pad(colour[:, :, 0], ((0, -height % 32), (0, -width % 32)), mode="edge")
    rows, columns = range(0, padded.shape[0], 32), range(0, padded.shape[1], 32)
    tiles = [zlib.compress(padded[y : y + 32, x : x + 32].tobytes()) for y in rows for x in columns]
    offsets = np.cumsum([8] + [len(tile) for tile in tiles]).tolist()
    tables = offsets.pop()  # two arrays of longs behind the tiles, then the directory
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8 << 16), (259, 3, 1, 8 << 16)]
    entries += [(262, 3, 1, 1 << 16), (277, 3, 1, 1 << 16), (322, 4, 1, 32), (323, 4, 1, 32)]
    entries += [(324, 4, len(tiles), tables), (325, 4, len(tiles), tables + 4 * len(tiles))]
    sizes = [len(tile) for tile in tiles]
    longs = struct.pack(f">{2 * len(tiles)}I", *offsets, *sizes)
    directory = struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHII", *each) for each in entries)
    return (
        struct.pack(">2sHI", b"MM", 42, tables + len(longs)) + b"".join(tiles) + longs + directory + bytes(4)
    )


def _dicom(syntax: str, **attributes: object):
    """A maker of 12 of 16 bits."""

    def make(colour: Gray) -> bytes:
        return dicom(_twelve_bits(colour), syntax, bits=12, **attributes)

    return make


def _transparent_palette_png(colour: Gray) -> bytes:
    return encode(Image.fromarray(colour).quantize(32), "PNG", transparency=3)


_MAKERS = {
    "jpeg-gray": _pillow("L", "JPEG", quality=90),
    "jpeg-colour": _pillow("RGB", "JPEG", quality=85, subsampling="4:2:0"),
    "jpeg-progressive": _pillow("RGB", "JPEG", progressive=True),
    "jpeg-cmyk": _pillow("CMYK", "JPEG"),
    "jpeg-restart": _pillow("L", "JPEG", restart_marker_blocks=3),
    "jpeg-exif": _exif_jpeg,
    "png-1bit": _pillow("1", "PNG"),
    "png-gray": _pillow("L", "PNG"),
    "png-16bit": lambda colour: png(_twelve_bits(colour)),
    "png-rgb": _pillow("RGB", "PNG"),
    "png-rgba": _pillow("RGBA", "PNG"),
    "png-palette": _transparent_palette_png,
    "png-interlaced": _interlaced_png,
    "png-animated": _pillow("L", "PNG", pages=3),
    "tiff-gray": _pillow("L", "TIFF"),
    "tiff-16bit": _pillow("I;16", "TIFF"),
    "tiff-lzw": _pillow("L", "TIFF", compression="tiff_lzw"),
    "tiff-deflate": _pillow("I;16", "TIFF", compression="tiff_adobe_deflate"),
    "tiff-packbits": _pillow("L", "TIFF", compression="packbits"),
    "tiff-tiled": _tiled_tiff,
    "tiff-pages": _pillow("L", "TIFF", pages=3, compression="tiff_lzw"),
    "tiff-rgb": _pillow("RGB", "TIFF", compression="tiff_lzw"),
    "bmp-gray": _pillow("L", "BMP"),
    "bmp-rgb": _pillow("RGB", "BMP"),
    "pnm-p2": _ascii_pgm,
    "pnm-p4": _pillow("1", "PPM"),
    "pnm-p5": _pillow("L", "PPM"),
    "pnm-p5wide": _pillow("I;16", "PPM"),
    "pnm-p6": _pillow("RGB", "PPM"),
    "webp-lossy": _pillow("RGB", "WEBP", quality=80),
    "webp-lossless": _pillow("RGB", "WEBP", lossless=True),
    "webp-alpha": _pillow("RGBA", "WEBP", quality=80),
    "webp-animated": _pillow("RGB", "WEBP", pages=3),
    "jpeg2000-lossless": _pillow("L", "JPEG2000"),
    "jpeg2000-lossy": _pillow("RGB", "JPEG2000", irreversible=True, quality_layers=[20]),
    "jpeg2000-raw": _pillow("L", "JPEG2000", no_jp2=True),
    "jpeg2000-rawlossy": _pillow("L", "JPEG2000", no_jp2=True, irreversible=True, quality_layers=[20]),
    "gif-palette": _pillow("P", "GIF"),
    "gif-animated": _pillow("P", "GIF", pages=3),
    "dicom-explicit": _dicom("explicit"),
    "dicom-implicit": _dicom("implicit", WindowCenter=2000, WindowWidth=3000),
    "dicom-deflated": _dicom("deflated", PhotometricInterpretation="MONOCHROME1"),
    "dicom-rle": _dicom("rle"),
    "dicom-sv1": _dicom("jpeg-sv1", WindowCenter=2000, WindowWidth=3000, VOILUTFunction="SIGMOID"),
    "dicom-ls": _dicom("jpeg-ls"),
    "dicom-jpeg2000": _dicom("jpeg2000"),
}
