"""Decode files to gray pixels as scripts do. Raises OSError if a file can't be decoded completely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [1, H, W]


def load_with_pillow(path: str, size: tuple[int, int]) -> Pixels:
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("L").resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(small)[None]


def load_with_opencv(path: str, size: tuple[int, int]) -> Pixels:
    return decode_with_opencv(Path(path).read_bytes(), size)


def decode_with_opencv(data: bytes, size: tuple[int, int]) -> Pixels:
    """Decode with OpenCV and resize with Pillow, because OpenCV has no antialiased triangle filter.

    OpenCV decodes the upper part of a truncated JPEG without an error, so the end marker is checked.
    """
    import cv2
    from PIL import Image

    if data.startswith(b"\xff\xd8") and not data.endswith(b"\xff\xd9"):
        raise OSError("the JPEG has no end marker")
    gray = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if gray is None:
        raise OSError("OpenCV can't decode the file")
    small = Image.fromarray(gray).resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small)[None]
