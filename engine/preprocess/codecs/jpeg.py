"""JPEG by libjpeg-turbo, strictly: an image that it decodes with a warning is damaged."""

from __future__ import annotations

import imagecodecs
import numpy as np
import simplejpeg

from engine.core.records import Header
from engine.formats.jpeg import JpegLayout
from engine.preprocess.codecs import imagecodecs_call
from engine.preprocess.codecs.gray import Gray, to_gray

# warnings about valid pixels; only the first warning of an image is reported, so it may hide another one
_HARMLESS_WARNINGS = (
    "tjDecompressHeader3(): Could not determine subsampling level",  # it is decoded correctly
    "Corrupt JPEG data: bad ICC marker",
    "Invalid SOS parameters for sequential JPEG",
    "Unknown Adobe color transform code",
    "Warning: unknown JFIF revision number",
)

# the scaled DCTs with SIMD code: 3/8 or 5/8 of the size take as long as 1/2 or 1/1
_SCALES = (8, 4, 2)


def decode(data: bytes, header: Header, least: tuple[int, int] | None) -> tuple[Gray, list[str], int]:
    """Return gray uint8 [H, W] as stored, flags ("decoder_warning": damage may be undetected), and scale.

    With a scale of 2, 4 or 8, gray is [ceil(H / scale), ceil(W / scale)].
    """
    layout: JpegLayout = header.layout
    space, flags = ("CMYK" if layout.channels == 4 else "GRAY"), []
    scale = choose_scale(header, least) if least else 1
    height, width = -(-header.height // scale), -(-header.width // scale)
    try:
        samples = simplejpeg.decode_jpeg(data, space, strict=True, min_height=height, min_width=width)
    except ValueError as error:
        if not str(error).startswith(_HARMLESS_WARNINGS):
            raise
        space, scale = "GRAYSCALE" if space == "GRAY" else space, 1
        samples = imagecodecs_call.call_codec(imagecodecs.jpeg8_decode, data, outcolorspace=space)
        flags = ["decoder_warning"]
    if layout.channels == 4:
        return _from_cmyk(samples, inverted=layout.adobe), flags, scale
    return samples.reshape(samples.shape[:2]), flags, scale


def choose_scale(header: Header, least: tuple[int, int]) -> int:
    """Choose the reduction, 1, 2, 4 or 8, for a JPEG that must have `least` (height, width) when upright.

    CMYK is not scaled: its gray is not a sum of its channels.
    """
    height, width = least if header.orientation < 5 else least[::-1]
    if header.layout.channels == 4:
        return 1
    return next(
        (scale for scale in _SCALES if header.height >= scale * height and header.width >= scale * width), 1
    )


def _from_cmyk(samples: Gray, *, inverted: bool) -> Gray:
    """Convert [H, W, 4] to gray; red is the light that neither cyan nor black absorbs, and so on."""
    light = samples if inverted else 255 - samples
    colour = (light[:, :, :3].astype(np.uint16) * light[:, :, 3:] + 127) // 255
    return to_gray(colour.astype(np.uint8))
