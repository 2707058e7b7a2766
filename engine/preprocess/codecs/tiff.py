"""TIFF: each strip or tile is decoded by its codec and copied into the image.

libtiff (in imagecodecs) does not decode the whole file: it would parse the file again without the checks of
the header, and returns pixels that differ from call to call for damaged deflate strips. Here a short strip is
an error. libtiff decodes only LZW, strip by strip: `imagecodecs.lzw_decode` follows unset pointers for codes
that are not yet in its table.
"""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np

from engine.core.records import Header
from engine.formats.tiff import TiffLayout
from engine.preprocess.codecs import imagecodecs_call
from engine.preprocess.codecs.gray import Gray, Samples, declared_white, palette_gray, to_gray, unpack_bits


def decode(data: bytes, header: Header) -> Gray:
    layout: TiffLayout = header.layout
    samples = _read_samples(data, layout)
    if layout.palette:
        colours = np.array(layout.palette, np.uint16).reshape(3, -1).T
        if colours.max() > 255:  # otherwise the writer stored 8-bit colours
            colours >>= 8
        return palette_gray(samples[:, :, 0].astype(np.uint8), colours.astype(np.uint8))
    if layout.channels in (2, 4) and not layout.alpha:
        samples = samples[:, :, :-1]
    gray = to_gray(samples, white=declared_white(layout.bits))
    return 255 - gray if layout.inverted else gray


def _read_samples(data: bytes, layout: TiffLayout) -> Samples:
    """Read all pieces, [H, W, channels]."""
    samples = np.empty(
        (layout.height, layout.width, layout.channels), np.uint8 if layout.bits <= 8 else np.uint16
    )
    pieces = layout.across * layout.down
    for index, (start, end) in enumerate(layout.spans):
        piece = _decode_piece(data[start:end], layout, layout.rows(index))  # [rows, piece_width, channels]
        channel, number = divmod(index, pieces) if layout.planar else (slice(None), index)
        y, x = number // layout.across * layout.piece_height, number % layout.across * layout.piece_width
        part = samples[y : y + layout.piece_height, x : x + layout.piece_width, channel]
        inside = piece[: part.shape[0], : part.shape[1]]
        part[...] = inside[:, :, 0] if layout.planar else inside
    return samples


def _decode_piece(stored: bytes, layout: TiffLayout, rows: int) -> Samples:
    raw = _decompress(stored, layout, rows * layout.stride)
    channels = 1 if layout.planar else layout.channels
    shape = (rows, layout.piece_width, channels)
    if layout.bits in (8, 16):
        order = ">" if layout.big_endian else "<"
        piece = np.frombuffer(raw, f"{order}u{layout.bits // 8}").reshape(shape)
        piece = piece.astype(piece.dtype.newbyteorder("="), copy=False)
        return np.cumsum(piece, axis=1, dtype=piece.dtype) if layout.differences else piece
    if layout.bits < 8:
        return unpack_bits(np.frombuffer(raw, np.uint8).reshape(rows, -1), layout.bits)[:, : shape[1], None]
    row = shape[1] * channels
    piece = imagecodecs_call.call_codec(imagecodecs.packints_decode, raw, "u2", layout.bits, runlen=row)
    return np.asarray(piece, np.uint16).reshape(shape)


def _decompress(stored: bytes, layout: TiffLayout, size: int) -> bytes:
    """Decompress `size` bytes of a piece. Raises ValueError for fewer bytes or a wrong checksum."""
    if layout.compression == "deflate":
        inflate = zlib.decompressobj()
        try:
            # some writers pad the last strip; with one byte more, zlib reaches the end and its checksum
            raw = inflate.decompress(stored, layout.piece_height * layout.stride + 1)
        except zlib.error:
            raise ValueError("a strip or tile is damaged") from None
        if not inflate.eof:
            raise ValueError("a strip or tile is longer than its size or cut short")
    elif layout.compression == "lzw":
        raw = imagecodecs_call.call_codec(imagecodecs.tiff_decode, _wrap_lzw(stored, size), index=0).tobytes()
    elif layout.compression == "packbits":
        raw = imagecodecs_call.call_codec(imagecodecs.packbits_decode, stored, out=size)
    else:
        raw = stored
    if len(raw) < size:
        raise ValueError(f"a strip or tile has {len(raw)} bytes; {size} expected")
    return raw[:size]


def _wrap_lzw(lzw: bytes, size: int) -> bytes:
    """Wrap LZW bytes in a gray TIFF with one row of `size` bytes."""
    tags = {256: size, 257: 1, 258: 8, 259: 5, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(lzw)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<4sI", b"II*\0", 8 + len(lzw)) + lzw + directory
