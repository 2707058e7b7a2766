"""Encoded images of every format to 8-bit gray.

One module per format, each with `decode(data, header)`: gray uint8 [H, W] as stored. Not by DALI, whose
CPU decoders fall back from one library to the next: a damaged image can come out as the one before it.

Damage that a format can show is an error: PNG and deflate by their checksums; LZW, PackBits and GIF by
running short; JPEG by what libjpeg warns of. WebP and JPEG 2000 carry no checksum: a changed byte in the
middle of their pixels mostly decodes, to the same wrong pixels each time.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.header import Header
from engine.preprocess.codecs import bmp, gif, jpeg, jpeg2000, png, pnm, tiff, webp
from engine.preprocess.codecs.gray import Gray, oriented

_DECODERS = {
    "png": png.decode,
    "tiff": tiff.decode,
    "jpeg2000": jpeg2000.decode,
    "webp": webp.decode,
    "bmp": bmp.decode,
    "pnm": pnm.decode,
    "gif": gif.decode,
}


@dataclass(frozen=True)
class Decoded:
    gray: Gray  # [H, W], upright
    flags: list[str]


def decode(data: bytes, header: Header) -> Decoded:
    """An encoded image and its header (`engine.header.parse`) as it should be seen.

    Raises ValueError, one printable line that depends on the bytes alone, when the image is damaged.
    """
    if header.format == "jpeg":
        gray, flags = jpeg.decode(data, header)
    elif header.format == "dicom":
        from engine.preprocess.codecs import dicom  # here, since pydicom is an extra

        gray, flags = dicom.decode(data, header)
    else:
        gray, flags = _DECODERS[header.format](data, header), []
    if gray.shape != (header.height, header.width):
        raise ValueError(
            f"decoded to {gray.shape[1]} x {gray.shape[0]}, not {header.width} x {header.height}"
        )
    return Decoded(oriented(gray, header.orientation), flags)
