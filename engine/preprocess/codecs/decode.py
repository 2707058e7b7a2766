"""Encoded images of every format to 8-bit gray.

One module per format, each with `decode(data, header)`, which returns gray uint8 [H, W] as stored. DALI's CPU
decoders are not used: they fall back from one library to the next, and a damaged image can come out with the
pixels of the image before it.

Detected damage is an error: wrong checksums in PNG and deflate; too little data in LZW, PackBits and GIF;
libjpeg's warnings in JPEG. WebP and JPEG 2000 have no checksum: most changed bytes in the middle of their
pixels decode, always to the same wrong pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.records import Header
from engine.preprocess.codecs import bmp, gif, jpeg, jpeg2000, png, pnm, tiff, webp
from engine.preprocess.codecs.gray import Gray, Margins, apply_orientation, orient_margins

_DECODE_BY_FORMAT = {
    "png": png.decode,
    "tiff": tiff.decode,
    "jpeg2000": jpeg2000.decode,
    "webp": webp.decode,
    "bmp": bmp.decode,
    "pnm": pnm.decode,
    "gif": gif.decode,
}


@dataclass(frozen=True)
class DecodedImage:
    gray: Gray  # [H, W], upright
    flags: list[str]
    margins: Margins = ((0, 0), (0, 0))


def decode(data: bytes, header: Header, *, least: tuple[int, int] | None = None) -> DecodedImage:
    """Decode an image with its header (`engine.formats.header.parse_header`) to gray, as it is displayed.

    With `least` (height, width), gray and colour JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of
    its size that is no smaller than `least`. For a damaged image, raises ValueError with one printable line
    that depends on the bytes alone.
    """
    scale = 1
    if header.format == "jpeg":
        gray, flags, scale = jpeg.decode(data, header, least)
    elif header.format == "dicom":
        from engine.preprocess.codecs import dicom  # imported here: pydicom is an extra

        gray, flags = dicom.decode(data, header)
    else:
        gray, flags = _DECODE_BY_FORMAT[header.format](data, header), []
    height, width = -(-header.height // scale), -(-header.width // scale)
    if gray.shape != (height, width):
        raise ValueError(f"it has {gray.shape[1]} x {gray.shape[0]} pixels; {width} x {height} expected")
    margins = height - header.height / scale, width - header.width / scale
    return DecodedImage(
        apply_orientation(gray, header.orientation), flags, orient_margins(*margins, header.orientation)
    )
