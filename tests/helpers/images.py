"""Encoders that Pillow lacks, and the Pillow reference of preprocessing."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int, width: int, *, seed: int = 0, channels: int = 1) -> npt.NDArray[np.uint8]:
    """Draw a radiograph-like field [H, W] or [H, W, C]: large shapes, fine texture, some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 235, (8, 8, channels)).astype(np.uint8)
    planes = []
    for channel in range(channels):
        plane = Image.fromarray(coarse[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 6, (height, width))
        planes.append(np.clip(np.asarray(plane) + noise, 0, 255).astype(np.uint8))
    return np.stack(planes, -1) if channels > 1 else planes[0]


def png(samples: npt.NDArray[np.generic], *, chunks: dict[bytes, bytes] | None = None) -> bytes:
    """Encode an 8 or 16 bit PNG of [H, W] or [H, W, 2 | 3 | 4] with extra chunks before the pixels."""
    if samples.ndim == 2:
        samples = samples[:, :, None]
    height, width, channels = samples.shape
    depth = samples.dtype.itemsize * 8
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = samples.astype(f">u{samples.dtype.itemsize}").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = {b"IHDR": header} | (chunks or {}) | {b"IDAT": zlib.compress(raw), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in body.items())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pillow_reference(data: bytes, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return the expected pixels: full decode, upright, luma, antialiased bilinear."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L")
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def tiff(
    samples: npt.NDArray[np.generic],
    *,
    photometric: int = 1,
    order: str = "<",
    big: bool = False,
    bits: int | None = None,
    tile: tuple[int, int] | None = None,
    planar: bool = False,
    tags: dict[int, list[int]] | None = None,
) -> bytes:
    """Encode a deflated TIFF of [H, W] or [H, W, C] in strips of 7 rows or tiles (height, width)."""
    samples = samples if samples.ndim == 3 else samples[:, :, None]
    height, width, channels = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    rows, columns = tile or (7, width)
    planes = [samples[:, :, [c]] for c in range(channels)] if planar else [samples]
    pieces = []
    for plane in planes:
        for y in range(0, height, rows):
            for x in range(0, width, columns):
                piece = plane[y : y + rows, x : x + columns]
                if tile:
                    missing = [(0, rows - piece.shape[0]), (0, columns - piece.shape[1]), (0, 0)]
                    piece = np.pad(piece, missing)
                pieces.append(zlib.compress(_packed(piece, bits, order)))
    start = 16 if big else 8
    offsets = np.cumsum([start] + [len(piece) for piece in pieces])
    all_tags = {
        256: [width],
        257: [height],
        258: [bits] * channels,
        259: [8],
        262: [photometric],
        277: [channels],
    }
    all_tags |= {284: [2 if planar else 1]} | ({322: [columns], 323: [rows]} if tile else {278: [rows]})
    spans = [list(offsets[:-1]), [len(piece) for piece in pieces]]
    all_tags |= dict(zip((324, 325) if tile else (273, 279), spans, strict=True)) | (tags or {})
    return _tiff_file(b"".join(pieces), all_tags, order, big)


def _packed(piece: npt.NDArray[np.generic], bits: int, order: str) -> bytes:
    """Pack rows of `bits`-bit samples, each padded to whole bytes."""
    if bits in (8, 16):
        return piece.astype(f"{order}u{bits // 8}").tobytes()
    flat = piece.reshape(len(piece), -1)
    unpacked = flat[:, :, None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(unpacked.reshape(len(flat), -1).astype(np.uint8), axis=1).tobytes()


def _tiff_file(pixels: bytes, tags: dict[int, list[int]], order: str, big: bool) -> bytes:
    start, word, inline = (16, "Q", 8) if big else (8, "I", 4)
    values = b""
    directory = struct.pack(order + ("Q" if big else "H"), len(tags))
    for tag, numbers in sorted(tags.items()):
        kind, code = (3, "H") if max(numbers) < 1 << 16 else (4, "I")
        packed = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(packed) > inline:
            field = struct.pack(order + word, start + len(pixels) + len(values))
            values += packed
        else:
            field = packed.ljust(inline, b"\0")
        directory += struct.pack(order + "HH" + word, tag, kind, len(numbers)) + field
    directory += struct.pack(order + word, 0)
    magic = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    magic += struct.pack(order + "HH", 8, 0) if big else b""
    return magic + struct.pack(order + word, start + len(pixels) + len(values)) + pixels + values + directory


def bmp(
    rows: npt.NDArray[np.uint8], width: int, bits: int, *, top_down: bool = False, os2: bool = False,
    palette: npt.NDArray[np.uint8] | None = None, alpha: bool = False,
) -> bytes:  # fmt: skip
    """Encode a BMP of packed rows [H, bytes], top row first; palette [n, 3] in blue, green, red."""
    height = len(rows)
    rows = np.pad(rows, [(0, 0), (0, -rows.shape[1] % 4)])
    pixels = (rows if top_down else rows[::-1]).tobytes()
    if os2:
        header = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        signed = -height if top_down else height
        size, compression = (56, 3) if alpha else (40, 0)
        header = struct.pack(
            "<IiiHHIIiiII", size, width, signed, 1, bits, compression, len(pixels), 0, 0, 0, 0
        )
        header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) if alpha else b""
    if palette is not None:
        entry = palette if os2 else np.pad(palette, [(0, 0), (0, 1)])
        header += entry.astype(np.uint8).tobytes()
    start = 14 + len(header)
    return struct.pack("<2sIII", b"BM", start + len(pixels), 0, start) + header + pixels


def every_format(height: int = 41, width: int = 53) -> dict[str, bytes]:
    """Encode a picture in each format and kind that Pillow writes."""
    gray, colour = smooth(height, width), smooth(height, width, channels=3)
    pictures = {
        "1": Image.fromarray(gray).convert("1"),
        "L": Image.fromarray(gray),
        "P": Image.fromarray(colour).quantize(64),
        "RGB": Image.fromarray(colour),
        "LA": Image.fromarray(np.dstack([gray, gray[::-1]]), "LA"),
        "RGBA": Image.fromarray(np.dstack([colour, gray])),
        "I;16": Image.fromarray(gray.astype(np.uint16) * 257),
    }
    files = {"JPEG L": encode(pictures["L"], "JPEG")}
    kinds = {"PNG": ("1", "P", "LA", "RGBA", "I;16"), "BMP": ("1", "L", "P", "RGB"), "PPM": ("1", "L", "RGB")}
    kinds |= {"JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"), "GIF": ("1", "L", "P", "RGBA")}
    for kind, modes in kinds.items():
        files |= {f"{kind} {mode}": encode(pictures[mode], kind) for mode in modes}
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        for mode, picture in pictures.items():
            file = encode(picture, "TIFF", compression=compression, tiffinfo={278: 13})
            files[f"TIFF {mode} {compression}"] = file
    for mode in ("L", "RGB", "I;16"):
        files[f"TIFF {mode} predictor"] = encode(
            pictures[mode], "TIFF", compression="tiff_lzw", tiffinfo={317: 2}
        )
    files["TIFF big"] = encode(pictures["L"], "TIFF", compression="tiff_lzw", big_tiff=True)
    for mode in ("L", "RGB", "RGBA"):
        files[f"WEBP {mode} lossless"] = encode(pictures[mode], "WEBP", lossless=True)
        files[f"WEBP {mode} lossy"] = encode(pictures[mode], "WEBP", quality=90)
        files[f"JPEG2000 {mode} codestream"] = encode(
            pictures[mode], "JPEG2000", no_jp2=True, tile_size=(32, 32), num_resolutions=3
        )
    files["GIF interlaced"] = encode(pictures["L"], "GIF", interlace=1)
    for kind in ("TIFF", "WEBP", "GIF"):
        more = [pictures["RGB"].rotate(90), pictures["RGB"].rotate(180)]
        files[f"{kind} frames"] = encode(pictures["RGB"], kind, save_all=True, append_images=more)
    return files


def image_names(count: int, start: int = 0) -> list[str]:
    """Return the names of `write_images`, from number `start` on."""
    return [f"image-{row:02}{('.png', '.jpg')[row % 2]}" for row in range(start, start + count)]


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for index, name in enumerate(image_names(count)):
        rng = np.random.default_rng(index)
        blocks = rng.integers(0, 256, (4, 4)).astype(np.uint8)
        picture = Image.fromarray(blocks).resize((96 + index, 80 + 2 * index), Image.Resampling.BICUBIC)
        if index % 5 == 0:
            picture = picture.convert("RGB")
        picture.save(folder / name, quality=92)
    return folder


def jpeg(picture: npt.NDArray[np.uint8] | Image.Image, **options: object) -> bytes:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return encode(picture, "JPEG", **options)


def smooth_jpeg(seed: int, comment: bytes = b"") -> bytes:
    return encode(Image.fromarray(smooth(80, 90, seed=seed)), "JPEG", comment=comment)
