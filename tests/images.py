"""Encoders that Pillow lacks, and the Pillow reference that the preprocess graph is held against."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int, width: int, *, seed: int = 0, channels: int = 1) -> npt.NDArray[np.uint8]:
    """A radiograph-like field [H, W] or [H, W, C]: large shapes, fine texture, some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 235, (8, 8, channels)).astype(np.uint8)
    planes = []
    for channel in range(channels):
        plane = Image.fromarray(coarse[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 6, (height, width))
        planes.append(np.clip(np.asarray(plane) + noise, 0, 255).astype(np.uint8))
    return np.stack(planes, -1) if channels > 1 else planes[0]


def png(samples: npt.NDArray[np.generic], *, chunks: dict[bytes, bytes] | None = None) -> bytes:
    """8 or 16 bit PNG of [H, W] or [H, W, 2 | 3 | 4] with extra chunks before the pixels."""
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
    """Full decode, upright, luma, antialiased bilinear: what the graph has to give."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L")
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
