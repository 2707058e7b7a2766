"""A pydicom plugin that decodes frames of DICOM files with imagecodecs.

Libraries: libjpeg-turbo for JPEG (8 to 16 bits, also lossless), CharLS for JPEG-LS, OpenJPEG for JPEG 2000. A
frame whose size differs from the data set's is refused before its decoder allocates anything.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from pydicom.pixels.decoders.base import get_decoder

from engine.formats import jpeg, jpeg2000
from engine.formats.common import SizeLimit
from engine.formats.dicom import SYNTAXES
from engine.preprocess.codecs import imagecodecs_call
from engine.preprocess.codecs.gray import Samples

PLUGIN = "imagecodecs"
Shape = tuple[int, int, int]  # height, width, samples a pixel


def is_available(syntax: str) -> bool:
    """Return whether frames of this transfer syntax are decoded here (pydicom's plugin protocol)."""
    return syntax in _DECODERS


def decode_frame(frame: bytes, runner: Any) -> Samples:
    """Decode a frame to samples [H, W] or [H, W, 3] (pydicom's plugin protocol).

    Raises ValueError when it is damaged or differs from the data set.
    """
    shape = (runner.rows, runner.columns, runner.samples_per_pixel)
    samples = _DECODERS[runner.transfer_syntax](frame, runner, shape)
    if samples.shape not in (shape, shape[:2] if shape[2] == 1 else shape) or samples.dtype.itemsize > 2:
        raise ValueError("the image is damaged")
    runner.set_option("bits_allocated", 8 * samples.dtype.itemsize)
    if shape[2] == 3:
        runner.set_option("planar_configuration", 0)
    return samples if samples.flags.c_contiguous else samples.copy()  # pydicom reads its buffer


def _decode_jpeg(frame: bytes, runner: Any, shape: Shape) -> Samples:
    """Decode any JPEG process; an 8-bit frame that decodes only with a warning is damaged."""
    marker, precision, *size = jpeg.frame_header(frame)
    if tuple(size) != shape:
        raise ValueError("the frame's size is not the header's")
    if shape[2] == 1:
        if precision == 8 and marker != 0xC3:
            return np.asarray(simplejpeg.decode_jpeg(frame, "GRAY", strict=True))
        return np.asarray(imagecodecs_call.call_codec(imagecodecs.jpeg8_decode, frame))
    untransformed = runner.photometric_interpretation == "RGB"  # libjpeg would guess it
    if marker != 0xC3:
        samples = np.asarray(simplejpeg.decode_jpeg(frame, "RGB", strict=True))
        if not untransformed:
            runner.set_option("photometric_interpretation", "RGB")
            return samples
    return np.asarray(
        imagecodecs_call.call_codec(imagecodecs.jpeg8_decode, frame, colorspace="RGB", outcolorspace="RGB")
    )


def _decode_jpeg_ls(frame: bytes, runner: Any, shape: Shape) -> Samples:
    _, _, *size = jpeg.frame_header(frame)
    if tuple(size) != shape:
        raise ValueError("the frame's size is not the header's")
    return np.asarray(imagecodecs_call.call_codec(imagecodecs.jpegls_decode, frame))


def _decode_jpeg2000(frame: bytes, runner: Any, shape: Shape) -> Samples:
    layout = jpeg2000.parse(frame, limit := SizeLimit(sys.maxsize), frame=True).layout
    if (limit.size, layout.channels) != ((shape[1], shape[0]), shape[2]):
        raise ValueError("the frame's size is not the header's")
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
        runner.set_option("photometric_interpretation", "RGB")
    return np.asarray(
        imagecodecs_call.call_codec(imagecodecs.jpeg2k_decode, frame[slice(*layout.codestream)], numthreads=1)
    )


def _decode_rle(frame: bytes, runner: Any, shape: Shape) -> Samples:
    """Decode PS3.5 annex G: a PackBits segment for each byte of a sample, the highest first.

    imagecodecs' own RLE decoder is not used: it leaves the missing bytes of a damaged segment uninitialized.
    """
    height, width, channels = shape
    depth = runner.bits_allocated // 8
    count, *starts = struct.unpack_from("<16I", frame)
    if count != channels * depth:
        raise ValueError(f"the frame has {count} segments; {channels * depth} expected")
    ends = [*starts[1:count], len(frame)]
    planes = [
        _unpack_bits(frame[start:end], height * width) for start, end in zip(starts, ends, strict=False)
    ]
    stacked = np.stack(planes).reshape(channels, depth, height, width)
    samples = np.ascontiguousarray(stacked.transpose(2, 3, 0, 1)).view(">u2" if depth == 2 else np.uint8)
    return samples[..., 0].astype(f"=u{depth}")


def _unpack_bits(segment: bytes, size: int) -> Samples:
    plane = np.frombuffer(
        imagecodecs_call.call_codec(imagecodecs.packbits_decode, segment, out=size), np.uint8
    )
    if len(plane) < size:
        raise ValueError("a segment is too short")
    return plane[:size]


_BY_COMPRESSION: dict[str, Callable[[bytes, Any, Shape], Samples]] = {
    "RLE": _decode_rle,
    "JPEG": _decode_jpeg,
    "JPEG-LS": _decode_jpeg_ls,
    "JPEG 2000": _decode_jpeg2000,
}
_DECODERS = {syntax: _BY_COMPRESSION[name] for syntax, name in SYNTAXES.items() if name in _BY_COMPRESSION}
DECODER_DEPENDENCIES = dict.fromkeys(_DECODERS, ("imagecodecs",))

for _syntax in _DECODERS:
    get_decoder(_syntax).add_plugin(PLUGIN, (__name__, "decode_frame"))
