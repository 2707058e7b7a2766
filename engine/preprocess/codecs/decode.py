"""Encoded images of every format to 8-bit gray.

One module per format, each with `decode(data, header)`: gray uint8 [H, W] as stored. Not by DALI, whose
CPU decoders fall back from one library to the next: a damaged image can come out as the one before it.

Damage that a format can show is an error: PNG and deflate by their checksums; LZW, PackBits and GIF by
running short; JPEG by what libjpeg warns of. WebP and JPEG 2000 carry no checksum: a changed byte in the
middle of their pixels mostly decodes, to the same wrong pixels each time.
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

    With `least`, the height and width that it is needed at, gray and colour JPEG is decoded at the smallest
    of 1/1, 1/2, 1/4 and 1/8 of its size that is no smaller.
    Raises ValueError, one printable line that depends on the bytes alone, when the image is damaged.
    """
    scale = 1
    if header.format == "jpeg":
        gray, flags, scale = jpeg.decode(data, header, least)
    elif header.format == "dicom":
        from engine.preprocess.codecs import dicom  # here, since pydicom is an extra

        gray, flags = dicom.decode(data, header)
    else:
        gray, flags = _DECODE_BY_FORMAT[header.format](data, header), []
    height, width = -(-header.height // scale), -(-header.width // scale)
    if gray.shape != (height, width):
        raise ValueError(f"decoded to {gray.shape[1]} x {gray.shape[0]}, not {width} x {height}")
    beyond = height - header.height / scale, width - header.width / scale
    return DecodedImage(
        apply_orientation(gray, header.orientation), flags, orient_margins(*beyond, header.orientation)
    )
