"""The structural scan for decoders that give no warnings: sound files pass, broken structure does not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from engine.formats.jpeg import looks_damaged
from tests.helpers.images import encode, smooth

PICTURE = Image.fromarray(smooth(300, 400))
KINDS = {
    "baseline": {"quality": 90},
    "optimized": {"quality": 90, "optimize": True},
    "progressive": {"quality": 90, "progressive": True},
    "restarts": {"quality": 90, "restart_marker_blocks": 7},
    "restart rows": {"quality": 50, "restart_marker_rows": 1},
    "comment": {"quality": 90, "comment": b"\xff\xd9\xff\xd0" * 5},
}


@pytest.mark.parametrize("colour", ["L", "RGB"])
@pytest.mark.parametrize("kind", KINDS)
def test_intact_files_do_not_look_damaged(kind, colour):
    for picture in (PICTURE, PICTURE.resize((17, 9)), PICTURE.resize((1, 1))):
        assert not looks_damaged(encode(picture.convert(colour), "JPEG", **KINDS[kind]))


def test_bytes_after_the_end_marker_are_ignored():
    assert not looks_damaged(encode(PICTURE, "JPEG") + b"\xff\xd0\xff\x01 more" * 9)


@pytest.mark.parametrize("kind", ["baseline", "restarts"])
def test_zeros_and_foreign_markers_look_damaged(kind):
    data = encode(PICTURE, "JPEG", **KINDS[kind])
    middle = len(data) // 2
    for damage in (bytes(512), b"\xff\x01", b"\xff\xd8", b"\xff\xd3\xff\xd3"):
        assert looks_damaged(data[:middle] + damage + data[middle + len(damage) :])


def test_wrong_restart_markers_look_damaged():
    data = encode(PICTURE, "JPEG", **KINDS["restarts"])
    codes = range(0xD0, 0xD8)
    marks = [position for position, pair in enumerate(pairwise(data)) if pair[0] == 0xFF and pair[1] in codes]
    swapped = bytearray(data)
    swapped[marks[3] + 1], swapped[marks[4] + 1] = data[marks[4] + 1], data[marks[3] + 1]
    assert looks_damaged(bytes(swapped))
    assert looks_damaged(data[: marks[-8]] + b"\xff\xd9"), "eight markers fewer: in turn, but too few"
    assert looks_damaged(data[: marks[0]] + data[marks[8] :]), "a piece of the middle is gone"


def test_random_bytes_raise_no_error():
    data = encode(PICTURE, "JPEG", **KINDS["restarts"])
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), 20):
            broken[position] = rng.integers(0, 256)
        assert looks_damaged(bytes(broken[: rng.integers(2, len(data))])) in (True, False)
