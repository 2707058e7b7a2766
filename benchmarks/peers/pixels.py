"""Files to gray pixels as scripts do it. Each raises OSError for a file that can't be decoded whole."""

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
    """Decoded by OpenCV; resized by Pillow, since none of OpenCV's own filters is the antialiased triangle.

    OpenCV gives the upper half of a truncated JPEG as an image, gray below: it is known by the missing end.
    """
    import cv2
    from PIL import Image

    if data.startswith(b"\xff\xd8") and not data.endswith(b"\xff\xd9"):
        raise OSError("a JPEG that does not end")
    gray = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if gray is None:
        raise OSError("no image")
    small = Image.fromarray(gray).resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small)[None]
