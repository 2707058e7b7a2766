"""What happens to files in archives, and what a hostile file would hold: bytes in, damaged bytes out.

Every mutation takes the bytes (never none), a random source, and the bytes of another good file.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

Mutation = Callable[[bytes, random.Random, bytes], bytes]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
INTERESTING = (0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 65535, 65536)
_END_MARKERS = {b"\x89PNG": b"\0\0\0\0IEND\xae\x42\x60\x82", b"GIF8": b"\x3b"}


def mutate(data: bytes, choices: random.Random, other: bytes) -> tuple[bytes, tuple[str, ...]]:
    """One to three mutations, and their names; half of all PNG files get their checksums put right."""
    names = choices.choices(list(MUTATIONS), _WEIGHTS, k=choices.choice((1, 1, 1, 2, 2, 3)))
    steps = []
    for name in names:
        if data:
            data = MUTATIONS[name](data, choices, other)
            steps.append(name)
    if data.startswith(PNG_SIGNATURE) and choices.random() < 0.5:
        data = with_checksums(data)
        steps.append("checksums")
    return data, tuple(steps)


def with_checksums(png: bytes) -> bytes:
    """`png` with the CRC of each chunk recomputed, so that a decoder looks at what the chunks hold."""
    fixed, position = bytearray(png), 8
    while position + 12 <= len(png):
        end = position + 8 + int.from_bytes(png[position : position + 4], "big")
        if end + 4 > len(png):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(png[position + 4 : end]))
        position = end + 4
    return bytes(fixed)


def _anywhere(data: bytes, choices: random.Random) -> int:
    """A position, two times of three among the first 64 or 256 bytes."""
    return choices.randrange(min(len(data), choices.choice((64, 256, len(data)))))


def _block(data: bytes, choices: random.Random) -> slice:
    start = choices.randrange(len(data))
    return slice(start, min(len(data), start + choices.choice((1, 4, 16, 64, 512, 4096))))


def _flip_bits(data: bytes, choices: random.Random, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(choices.randint(1, 8)):
        changed[choices.randrange(len(data))] ^= 1 << choices.randrange(8)
    return bytes(changed)


def _edit_header(data: bytes, choices: random.Random, other: bytes) -> bytes:
    changed, reach = bytearray(data), min(len(data), choices.choice((64, 256)))
    for _ in range(choices.randint(1, 4)):
        changed[choices.randrange(reach)] = choices.choice((0, 1, 0x7F, 0x80, 0xFF, choices.randrange(256)))
    return bytes(changed)


def _set_integer(data: bytes, choices: random.Random, other: bytes) -> bytes:
    at, order = _anywhere(data, choices), choices.choice("<>")
    return data[:at] + struct.pack(order + "I", choices.choice(INTERESTING)) + data[at + 4 :]


def _truncate(data: bytes, choices: random.Random, other: bytes) -> bytes:
    return data[: choices.randrange(len(data))]


def _cut_and_end(data: bytes, choices: random.Random, other: bytes) -> bytes:
    return _truncate(data, choices, other) + _END_MARKERS.get(data[:4], b"\xff\xd9")


def _insert(data: bytes, choices: random.Random, other: bytes) -> bytes:
    at = _anywhere(data, choices)
    return data[:at] + choices.randbytes(choices.choice((1, 2, 4, 16, 300))) + data[at:]


def _delete(data: bytes, choices: random.Random, other: bytes) -> bytes:
    gone = _block(data, choices)
    return data[: gone.start] + data[gone.stop :]


def _splice(data: bytes, choices: random.Random, other: bytes) -> bytes:
    """The start of one file, the end of another; half the time cut at the same place."""
    at = choices.randrange(len(data))
    return data[:at] + other[at if choices.random() < 0.5 else choices.randrange(len(other)) :]


def _overwrite(data: bytes, choices: random.Random, other: bytes) -> bytes:
    where = _block(data, choices)
    size = where.stop - where.start
    filling = choices.choice((bytes(size), b"\xff" * size, choices.randbytes(size)))
    return data[: where.start] + filling + data[where.stop :]


def _repeat(data: bytes, choices: random.Random, other: bytes) -> bytes:
    where = _block(data, choices)
    return data[: where.stop] + data[where] * choices.randint(1, 8) + data[where.stop :]


def _concatenate(data: bytes, choices: random.Random, other: bytes) -> bytes:
    return data + other


def _empty(data: bytes, choices: random.Random, other: bytes) -> bytes:
    return b""


MUTATIONS: dict[str, Mutation] = {
    "flip": _flip_bits,
    "header": _edit_header,
    "integer": _set_integer,
    "truncate": _truncate,
    "cut": _cut_and_end,
    "insert": _insert,
    "delete": _delete,
    "splice": _splice,
    "overwrite": _overwrite,
    "repeat": _repeat,
    "concatenate": _concatenate,
    "empty": _empty,
}
_WEIGHTS = (8, 8, 8, 4, 6, 4, 4, 4, 6, 4, 2, 0.3)
