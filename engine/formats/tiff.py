"""TIFF 6.0 and BigTIFF, the first image of the file: gray, palette or RGB, in strips or tiles."""

from __future__ import annotations

import struct
from typing import NamedTuple

from engine.core.records import Header
from engine.formats.common import SizeLimit, corrupt, truncated, unsupported

MAX_ENTRIES = 65_535
MAX_PIECES = 100_000  # strips or tiles
_FREE_TILE = 1 << 22  # pixels a tile may have however small the image is
_VALUES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 274, 277, 278, 279
_PLANAR, _PREDICTOR, _COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 284, 317, 320, 322, 323, 324
_TILE_BYTES, _EXTRA, _SAMPLE_FORMAT = 325, 338, 339
# fmt: off
_TAGS = frozenset((  # other tags, such as resolutions, may have types that are not read here
    _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS, _ORIENTATION, _SAMPLES,
    _ROWS_PER_STRIP, _STRIP_BYTES, _PLANAR, _PREDICTOR, _COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILES,
    _TILE_BYTES, _EXTRA, _SAMPLE_FORMAT,
))
# fmt: on
_SUPPORTED = {1: "none", 5: "lzw", 8: "deflate", 32946: "deflate", 32773: "packbits"}
_NAMES = {2: "CCITT", 3: "CCITT", 4: "CCITT", 6: "JPEG", 7: "JPEG", 34712: "JPEG 2000", 50000: "Zstandard"}
_COLOURED = {5: "CMYK", 6: "YCbCr", 8: "CIELAB"}
_DEPTHS = (1, 2, 4, 8, 10, 12, 14, 16)
_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}

Tags = dict[int, tuple[int, ...]]


class TiffLayout(NamedTuple):
    width: int
    height: int
    big_endian: bool
    bits: int  # of a sample: 1, 2, 4, 8, 10, 12, 14 or 16
    channels: int  # stored samples of a pixel: 1 or 3, and at most one extra
    alpha: bool  # the extra sample is transparency, not multiplied in
    inverted: bool  # 0 is white
    palette: tuple[int, ...]  # 16-bit red, then green, then blue of all indexes; () where there is none
    planar: bool  # each channel has pieces of its own
    compression: str  # none, lzw, deflate or packbits
    differences: bool  # samples are stored as differences from their left neighbours
    tiled: bool  # tiles are padded to full size; the last strip is not
    piece_width: int  # of a strip or tile
    piece_height: int
    spans: tuple[tuple[int, int], ...] = ()  # first byte and end of each piece: by rows, then by channels

    @property
    def across(self) -> int:
        return -(-self.width // self.piece_width)

    @property
    def down(self) -> int:
        return -(-self.height // self.piece_height)

    def rows(self, index: int) -> int:
        """Return the number of stored rows of piece `index`."""
        if self.tiled:
            return self.piece_height
        return min(self.piece_height, self.height - index % self.down * self.piece_height)

    @property
    def stride(self) -> int:
        """Return the bytes of a stored row of a piece."""
        return (self.piece_width * (1 if self.planar else self.channels) * self.bits + 7) // 8


def matches(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def parse(data: bytes, limit: SizeLimit) -> Header:
    order = "<" if data[:2] == b"II" else ">"
    tags, has_next = _directory(data, order, big=b"+" in data[:4])
    width, height = _single_value(tags, _WIDTH, 0), _single_value(tags, _HEIGHT, 0)
    limit.check("TIFF", width, height)
    photometric = _photometric(tags)
    bits, channels, alpha = _samples(tags, photometric)
    palette = _palette(tags, photometric, bits, channels)
    compression = _compression(tags, bits)
    piece_width, piece_height = _piece(tags, width, height)
    layout = TiffLayout(
        width=width,
        height=height,
        big_endian=order == ">",
        bits=bits,
        channels=channels,
        alpha=alpha,
        inverted=photometric == 0,
        palette=palette,
        planar=_single_value(tags, _PLANAR, 1) == 2 and channels > 1,
        compression=compression,
        differences=_single_value(tags, _PREDICTOR, 1) == 2 and compression in ("lzw", "deflate"),
        tiled=_TILES in tags,
        piece_width=piece_width,
        piece_height=piece_height,
    )
    layout = layout._replace(spans=_piece_spans(tags, layout, len(data)))
    orientation = _single_value(tags, _ORIENTATION, 1)
    flags = ("first_frame",) if has_next else ()
    return Header("tiff", width, height, flags, orientation if 1 <= orientation <= 8 else 1, layout, bits)


def _directory(data: bytes, order: str, *, big: bool) -> tuple[Tags, bool]:
    """Read the used tags of the first directory, and whether another directory follows."""
    (position,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    if position >= len(data):
        raise truncated(f"the TIFF file ends at byte {len(data)}, but its directory is at {position}")
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, position)
    if entries > MAX_ENTRIES:
        raise corrupt(f"the TIFF directory has {entries} entries; at most {MAX_ENTRIES} are allowed")
    position += 8 if big else 2
    size, inline, entry = (20, 8, order + "HHQ") if big else (12, 4, order + "HHI")
    tags: Tags = {}
    for _ in range(entries):
        tag, kind, count = struct.unpack_from(entry, data, position)
        if tag in _TAGS and tag not in tags and count > 0:
            if kind not in _VALUES or count > MAX_PIECES:
                raise corrupt(f"the TIFF tag {tag} declares {count} values of type {kind}")
            values = f"{order}{count}{_VALUES[kind]}"
            start = position + size - inline
            if struct.calcsize(values) > inline:
                (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, start)
            if start + struct.calcsize(values) > len(data):
                raise truncated(f"the TIFF file ends at byte {len(data)}, inside its tag {tag}")
            tags[tag] = struct.unpack_from(values, data, start)
        position += size
    (following,) = struct.unpack_from(order + ("Q" if big else "I"), data, position)
    return tags, following != 0


def _single_value(tags: Tags, tag: int, default: int) -> int:
    return tags.get(tag, (default,))[0]


def _photometric(tags: Tags) -> int:
    if _PHOTOMETRIC not in tags:
        raise corrupt("the TIFF file declares no colour space")
    photometric = tags[_PHOTOMETRIC][0]
    if photometric not in (0, 1, 2, 3):
        name = _COLOURED.get(photometric, photometric)
        raise unsupported(f"TIFF colour space {name}", "gray, palette, RGB")
    return photometric


def _samples(tags: Tags, photometric: int) -> tuple[int, int, bool]:
    """Return bits, channels and whether the last channel is transparency."""
    channels = _single_value(tags, _SAMPLES, 1)
    depths = tags.get(_BITS, (1,))[: max(1, channels)]
    formats = {value for value in tags.get(_SAMPLE_FORMAT, (1,)) if value not in (1, 4)}
    if formats:
        value = min(formats)
        raise unsupported(f"TIFF with {_FORMATS.get(value, f'format {value}')} samples", "unsigned")
    if len(set(depths)) > 1 or depths[0] not in _DEPTHS:
        raise unsupported(
            f"TIFF with samples of {', '.join(map(str, depths[:5]))} bits", ", ".join(map(str, _DEPTHS))
        )
    colours = 3 if photometric == 2 else 1
    if channels not in (colours, colours + 1) or (depths[0] < 8 and channels > 1):
        raise unsupported(f"TIFF with {channels} samples of {depths[0]} bits in a pixel")
    return depths[0], channels, channels > colours and _single_value(tags, _EXTRA, 0) == 2


def _palette(tags: Tags, photometric: int, bits: int, channels: int) -> tuple[int, ...]:
    if photometric != 3:
        return ()
    palette = tags.get(_COLOURS, ())
    if bits > 8 or channels != 1 or len(palette) != 3 << bits:
        raise corrupt(f"the TIFF file has a palette of {len(palette)} values for {bits} bits")
    return palette


def _compression(tags: Tags, bits: int) -> str:
    value = _single_value(tags, _COMPRESSION, 1)
    if value not in _SUPPORTED:
        raise unsupported(f"TIFF compression {_NAMES.get(value, value)}", "none, LZW, deflate, PackBits")
    predictor = _single_value(tags, _PREDICTOR, 1)
    if predictor not in (1, 2) or (predictor == 2 and bits not in (8, 16)):
        raise unsupported(f"TIFF predictor {predictor} on {bits} bits")
    if _single_value(tags, _FILL_ORDER, 1) != 1:
        raise unsupported("TIFF with reversed bit order")
    return _SUPPORTED[value]


def _piece(tags: Tags, width: int, height: int) -> tuple[int, int]:
    """Return width and height of a strip or tile; a tile may be larger than the image, within a limit."""
    if _TILES not in tags:
        rows = min(_single_value(tags, _ROWS_PER_STRIP, height), height)
        if rows == 0:
            raise corrupt("the TIFF file declares strips of 0 rows")
        return width, rows
    tile = _single_value(tags, _TILE_WIDTH, 0), _single_value(tags, _TILE_HEIGHT, 0)
    if not all(side > 0 and side % 16 == 0 for side in tile):
        raise corrupt(
            f"the TIFF file has tiles of {tile[0]} x {tile[1]} pixels; only multiples of 16 are allowed"
        )
    if tile[0] * tile[1] > max(4 * width * height, _FREE_TILE):
        raise corrupt(
            f"the TIFF file has tiles of {tile[0]} x {tile[1]} pixels for an image of {width} x {height}"
        )
    return tile


def _piece_spans(tags: Tags, layout: TiffLayout, size: int) -> tuple[tuple[int, int], ...]:
    """Return first byte and end of each piece; all pieces together are no longer than the file (`size`)."""
    pieces = layout.across * layout.down * (layout.channels if layout.planar else 1)
    offsets = tags.get(_TILES if layout.tiled else _STRIPS, ())
    lengths = tags.get(_TILE_BYTES if layout.tiled else _STRIP_BYTES, ())
    if pieces > MAX_PIECES or len(offsets) < pieces:
        raise corrupt(
            f"the TIFF file needs {pieces} strips or tiles and lists {len(offsets)}; allowed: {MAX_PIECES}"
        )
    if layout.compression == "none":  # the lengths follow from the size; some writers store wrong ones
        lengths = tuple(layout.stride * layout.rows(index) for index in range(pieces))
    if len(lengths) < pieces:
        raise corrupt(f"the TIFF file lists the lengths of {len(lengths)} of its {pieces} strips or tiles")
    spans = tuple((start, start + length) for start, length in zip(offsets, lengths[:pieces], strict=False))
    end = max(end for _, end in spans)
    if end > size:
        raise truncated(f"the TIFF file ends at byte {size} of {end}")
    if sum(end - start for start, end in spans) > size:
        raise corrupt("the TIFF strips or tiles share their bytes")
    return spans
