import struct

import numpy as np
import pytest
from PIL import Image

from engine.header import HeaderError, parse
from engine.records import Status
from tests.images import encode

MOST = 100_000_000  # pixels
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(mode: str, progressive: bool) -> None:
    header = parse(encode(PICTURE.convert(mode), "JPEG", progressive=progressive), MOST)
    assert (header.format, header.width, header.height, header.deep) == ("jpeg", 40, 30, False)


@pytest.mark.parametrize(
    ("mode", "deep"), [("L", False), ("RGB", False), ("P", False), ("1", False), ("LA", True), ("RGBA", True)]
)
def test_png(mode: str, deep: bool) -> None:
    header = parse(encode(PICTURE.convert(mode), "PNG"), MOST)
    assert (header.format, header.width, header.height, header.deep) == ("png", 40, 30, deep)


def test_png_of_16_bits_or_with_transparent_colours_is_deep() -> None:
    assert parse(encode(Image.fromarray(np.zeros((3, 3), np.uint16)), "PNG"), MOST).deep
    assert parse(encode(PICTURE.convert("P"), "PNG", transparency=0), MOST).deep


def test_animated_png_gives_its_first_frame() -> None:
    animated = encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)])
    assert parse(animated, MOST).flags == ("first_frame",)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_truncation_is_noticed(kind: str) -> None:
    data = encode(PICTURE, kind)
    for length in range(9, len(data) - 1, 7):
        with pytest.raises(HeaderError) as caught:
            parse(data[:length], MOST)
        assert caught.value.status is Status.TRUNCATED, length


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"hello", Status.UNSUPPORTED, "not an image"),
        (encode(PICTURE, "TIFF"), Status.UNSUPPORTED, "a TIFF file"),
        (encode(PICTURE, "BMP"), Status.UNSUPPORTED, "a BMP file"),
        (bytes(128) + b"DICM" + bytes(50), Status.UNSUPPORTED, "a DICOM file"),
        (b"\xff\xd8\xff\xd9" + bytes(20), Status.CORRUPT, "without a frame"),
        (b"\xff\xd8\0\0\0\0\0\0", Status.CORRUPT, "marker expected"),
        (b"\xff\xd8\xff\xc3\0\x0b\x08\0\x10\0\x10\1\1\x11\0", Status.UNSUPPORTED, "SOF3"),
        (b"\xff\xd8\xff\xc1\0\x0b\x0c\0\x10\0\x10\1\1\x11\0", Status.UNSUPPORTED, "12 bits"),
        (encode(PICTURE, "PNG").replace(b"\0\0\0\x28", b"\0\0\0\0", 1), Status.CORRUPT, "0 x 30"),
        (encode(PICTURE, "PNG")[:24] + b"\x07" + encode(PICTURE, "PNG")[25:], Status.CORRUPT, "depth 7"),
    ],
)
def test_what_cannot_be_scored_says_why(data: bytes, status: Status, words: str) -> None:
    with pytest.raises(HeaderError, match=words) as caught:
        parse(data, MOST)
    assert caught.value.status is status


def test_bombs_of_tiny_chunks_end() -> None:
    start = encode(PICTURE, "PNG")[:33]
    empty = struct.pack(">I4sI", 0, b"teXt", 0)
    with pytest.raises(HeaderError, match="chunks"):
        parse(start + empty * 300_000, MOST)
