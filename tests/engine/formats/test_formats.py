import random
import re
import struct
import time

import numpy as np
import pytest
from PIL import Image

from engine.core.records import Header, Status
from engine.formats import header
from engine.formats.common import HeaderError
from engine.formats.jpeg import JpegLayout
from tests.fuzz.mutations import mutate
from tests.helpers.images import bmp, encode, every_format, png, tiff

MAX_PIXELS = 1_000_000
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.uint8))
FILES = every_format()
BIG = struct.pack(">II", 60_000, 60_000)
LITTLE = struct.pack("<HH", 60_000, 60_000)


def parse(data: bytes) -> Header:
    return header.parse_header(data, MAX_PIXELS)


def outcome(data: bytes) -> Header | HeaderError:
    try:
        return parse(data)
    except HeaderError as error:
        return error


def refused(data: bytes) -> HeaderError:
    with pytest.raises(HeaderError) as caught:
        parse(data)
    return caught.value


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(mode: str, progressive: bool) -> None:
    result = parse(encode(PICTURE.convert(mode), "JPEG", progressive=progressive))
    layout = JpegLayout(len(PICTURE.convert(mode).getbands()), adobe=mode == "CMYK")
    assert result == Header("jpeg", 40, 30, layout=layout)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "LA", "RGBA"])
def test_png(mode: str) -> None:
    bits = 1 if mode == "1" else 8
    assert parse(encode(PICTURE.convert(mode), "PNG")) == Header("png", 40, 30, bits=bits)


@pytest.mark.parametrize("name", FILES)
def test_every_format(name: str) -> None:
    result = parse(FILES[name])
    kind = {"ppm": "pnm"}.get(name.split()[0].lower(), name.split()[0].lower())
    assert (result.format, result.width, result.height) == (kind, 53, 41)
    assert result.flags == (("first_frame",) if "frames" in name else ())


def test_animated_png_gives_its_first_frame() -> None:
    animated = encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)])
    assert parse(animated).flags == ("first_frame",)


@pytest.mark.parametrize("name", FILES)
def test_every_prefix_is_truncated(name: str) -> None:
    """Only what follows the first frame, or an empty end marker, may be missing from what is accepted."""
    data = FILES[name]
    start = time.perf_counter()
    for length in range(len(data)):
        result = outcome(data[:length])
        if isinstance(result, Header):
            assert result.width == 53
            assert "frames" in name or length >= len(data) - 2
        else:
            assert result.status is Status.TRUNCATED or length < 16
    assert time.perf_counter() - start < 5


BOMBS = {
    "JPEG": b"\xff\xd8\xff\xc0\0\x0b\x08\xea\x60\xea\x60\1\1\x11\0",
    "JPEG of an unsupported process": b"\xff\xd8\xff\xc3\0\x0b\x08\xea\x60\xea\x60\1\1\x11\0",
    "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + BIG + b"\x10\6\0\0\0abcd",
    "TIFF": tiff(np.zeros((1, 1), np.uint8), tags={256: [60_000], 257: [60_000], 259: [7]}),
    "BMP": b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 60_000, -60_000, 1, 32, 0) + bytes(20),
    "PNM": b"P5\n60000 60000 255\n",
    "plain PNM": b"P1 60000 60000\n",
    "WebP": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (59_999).to_bytes(3, "little") * 2,
    "GIF": b"GIF89a" + LITTLE + b"\0\0\0,",
    "JP2": b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x1ejp2h\0\0\0\x16ihdr" + BIG + b"\0\1\7\7\0\0" + bytes(8),
    "codestream": b"\xff\x4f\xff\x51\0\x29\0\0" + BIG + bytes(8) + BIG + bytes(8) + b"\0\1\x07\1\1",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_too_large(name: str) -> None:
    error = refused(BOMBS[name])
    assert str(error) == f"the image has 60000 x 60000 pixels; --max-pixels allows {MAX_PIXELS}"
    assert (error.status, error.size) == (Status.TOO_LARGE, (60_000, 60_000))


def test_a_size_beyond_int32_is_not_reported() -> None:
    data = tiff(np.zeros((1, 1), np.uint8), tags={256: [0xFFFF_FFFF], 257: [0xFFFF_FFFF]})
    assert (refused(data).status, refused(data).size) == (Status.TOO_LARGE, None)


def test_a_known_size_comes_with_every_error() -> None:
    cut = encode(PICTURE, "JPEG")[:-2]
    lossless = b"\xff\xd8\xff\xc3\0\x0b\x08\0\x10\0\x20\1\1\x11\0"
    assert (refused(cut).status, refused(cut).size) == (Status.TRUNCATED, (40, 30))
    assert (refused(lossless).status, refused(lossless).size) == (Status.UNSUPPORTED, (32, 16))
    assert refused(b"hello").size is None


def many_scans(count: int, marker: int = 0xC2) -> bytes:
    return (
        b"\xff\xd8\xff"
        + bytes((marker,))
        + b"\0\x0b\x08\0\x10\0\x10\1\1\x11\0"
        + b"\xff\xda" * count
        + b"\xff\xd9"
    )


def bmp_header(bits: int = 8, compression: int = 0) -> bytes:
    return b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 9, 9, 1, bits, compression) + bytes(20)


SMALL = np.zeros((20, 20), np.uint8)


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"hello", Status.UNSUPPORTED, "not an image"),
        (bytes(128) + b"DICM" + bytes(50), Status.SKIPPED, "the DICOM file contains no image"),
        (b"II*\0" + bytes(124) + b"DICM" + bytes(50), Status.SKIPPED, "the DICOM file"),
        (b"%PDF-1.7", Status.UNSUPPORTED, "a PDF file"),
        (b"PK\3\4", Status.UNSUPPORTED, "a ZIP file"),
        (b"\xff\xd8\xff\xd9" + bytes(20), Status.CORRUPT, "no frame header"),
        (b"\xff\xd8\0\0\0\0\0\0", Status.CORRUPT, "no marker"),
        (b"\xff\xd8" + b"\xff" * 1_000_000, Status.TRUNCATED, "inside its header"),
        (b"\xff\xd8" + b"\xff\xe0\0\2" * 20_000, Status.CORRUPT, "10000 segments"),
        (b"\xff\xd8\xff\xc3\0\x0b\x08\0\x10\0\x10\1\1\x11\0", Status.UNSUPPORTED, "SOF3"),
        (b"\xff\xd8\xff\xc1\0\x0b\x0c\0\x10\0\x10\1\1\x11\0", Status.UNSUPPORTED, "12 bits"),
        (many_scans(101), Status.CORRUPT, "101 scans; at most 100"),
        (encode(PICTURE, "PNG").replace(b"\0\0\0\x28", b"\0\0\0\0", 1), Status.CORRUPT, "0 x 30"),
        (encode(PICTURE, "PNG")[:24] + b"\x07" + encode(PICTURE, "PNG")[25:], Status.CORRUPT, "depth 7"),
        (encode(PICTURE, "PNG").replace(b"IHDR", b"JUNK"), Status.CORRUPT, "no valid header chunk"),
        (encode(PICTURE.convert("CMYK"), "TIFF"), Status.UNSUPPORTED, "CMYK"),
        (encode(PICTURE.convert("F"), "TIFF"), Status.UNSUPPORTED, "floating-point"),
        (encode(PICTURE.convert("I"), "TIFF"), Status.UNSUPPORTED, "signed|32 bits"),
        (encode(PICTURE, "TIFF", compression="jpeg"), Status.UNSUPPORTED, "compression JPEG"),
        (tiff(SMALL, tags={339: [3]}), Status.UNSUPPORTED, "floating-point"),
        (tiff(SMALL, tags={258: [32]}), Status.UNSUPPORTED, "32 bits"),
        (tiff(SMALL, tags={317: [3]}), Status.UNSUPPORTED, "predictor 3"),
        (tiff(SMALL, tags={266: [2]}), Status.UNSUPPORTED, "bit order"),
        (tiff(SMALL, tags={277: [70]}), Status.UNSUPPORTED, "70 samples"),
        (tiff(SMALL, tags={278: [0]}), Status.CORRUPT, "strips of 0 rows"),
        (tiff(SMALL, tags={278: [1]}), Status.CORRUPT, "20 strips or tiles and lists 3"),
        (tiff(SMALL, tags={279: [1 << 20] * 3}), Status.TRUNCATED, "TIFF file ends at byte"),
        (tiff(SMALL, tags={273: [8] * 3, 279: [100] * 3}), Status.CORRUPT, "share their bytes"),
        (tiff(SMALL, tile=(16, 16), tags={322: [8208], 323: [8208]}), Status.CORRUPT, "tiles of 8208 x 8208"),
        (tiff(SMALL, tile=(16, 16), tags={322: [1], 323: [1]}), Status.CORRUPT, "multiples of 16"),
        (tiff(SMALL, photometric=3), Status.CORRUPT, "palette of 0 values"),
        (b"II*\0\xff\xff\xff\xff", Status.TRUNCATED, "its directory is at 4294967295"),
        (b"II+\0\x08\0\0\0" + b"\xff" * 8, Status.TRUNCATED, "its directory is at"),
        (b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 8, Status.CORRUPT, "entries"),
        (b"II*\0\x08\0\0\0\1\0\0\1\4\0" + b"\xff" * 8, Status.CORRUPT, "4294967295 values"),
        (bmp(np.zeros((2, 4), np.uint8), 4, 8, palette=np.zeros((2, 3)))[:-1], Status.TRUNCATED, "BMP"),
        (b"BM" + bytes(8) + struct.pack("<II", 54, 41) + bytes(40), Status.CORRUPT, "BMP header of 41 bytes"),
        (bmp_header(compression=1), Status.UNSUPPORTED, "RLE8"),
        (bmp_header(bits=16), Status.UNSUPPORTED, "16 bits"),
        (b"P5 4 4 255\n123456789012345", Status.TRUNCATED, "byte 26 of 27"),
        (b"P2 4 4 255\n1 2 3", Status.TRUNCATED, "or more"),
        (b"P5 4 4 70000\n" + bytes(40), Status.CORRUPT, "largest sample"),
        (b"P5 4 x 255\n" + bytes(40), Status.CORRUPT, "no valid header"),
        (b"P5 4", Status.TRUNCATED, "inside its header"),
        (b"P5 0 4 255\n", Status.CORRUPT, "0 x 4"),
        (FILES["WEBP L lossy"][:-10], Status.TRUNCATED, "WebP file ends"),
        (b"RIFF\x20\0\0\0WEBPVP8 \xff\xff\xff\x7f" + bytes(24), Status.CORRUPT, "valid image chunk"),
        (b"GIF89a\1\0\1\0\0\0\0;", Status.CORRUPT, "no image"),
        (b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\2\0\2\0\0", Status.CORRUPT, "outside of its screen"),
        (b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * 1_000_001, Status.CORRUPT, "blocks"),
        (FILES["JPEG2000 L"][:-200], Status.TRUNCATED, "JPEG 2000"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * 2_000, Status.CORRUPT, "1000 boxes"),
        (b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\2free", Status.CORRUPT, "box of 2 bytes"),
        (b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\1free" + b"\xff" * 8, Status.TRUNCATED, "without a codestream"),
    ],
)  # fmt: skip
def test_unsupported_images_have_a_reason(data: bytes, status: Status, words: str) -> None:
    start = time.perf_counter()
    error = refused(data)
    assert time.perf_counter() - start < 1
    assert error.status is status
    assert re.search(words, str(error)), str(error)


def test_scans_of_one_baseline_component_are_not_counted() -> None:
    assert parse(many_scans(101, 0xC0)) == Header("jpeg", 16, 16, layout=JpegLayout(1, adobe=False))
    assert parse(many_scans(100)) == Header("jpeg", 16, 16, layout=JpegLayout(1, adobe=False))


def codestream(
    size: int = 512, tile: int = 512, layers: int = 1, style: bytes = b"\5\4\4\0\1", scheme: int = 0
) -> bytes:
    """The main header of a gray JPEG 2000 codestream and one empty tile part."""
    siz = struct.pack(">HHH8IH3B", 0xFF51, 41, 0, size, size, 0, 0, tile, tile, 0, 0, 1, 7, 1, 1)
    cod = struct.pack(">HHBBHB", 0xFF52, 7 + len(style), scheme, 0, layers, 0) + style
    return b"\xff\x4f" + siz + cod + struct.pack(">HHHIBB", 0xFF90, 10, 0, 14, 0, 1) + b"\xff\x93\xff\xd9"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (codestream(tile=1), "262144 tiles"),
        (codestream(layers=65_535), "65535 quality layers"),
        (codestream(scheme=1, style=b"\5\4\4\0\1" + b"\x11" * 6), "precincts in a tile"),
        (codestream(style=b"\5\0\0\0\1"), "code-blocks of 4 x 4"),
        (codestream(style=b"\x40\4\4\0\1"), "64 resolution levels"),
    ],
)
def test_jpeg_2000_structures_beyond_the_pixels_are_refused(data: bytes, words: str) -> None:
    assert parse(codestream()).width == 512
    assert words in str(refused(data))


def test_bombs_of_tiny_chunks_end() -> None:
    start = encode(PICTURE, "PNG")[:33]
    empty = struct.pack(">I4sI", 0, b"teXt", 0)
    assert "chunks" in str(refused(start + empty * 300_000))


@pytest.mark.parametrize("value", [1, 6, 8, 0, 9])
def test_orientation_is_read(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    expected = value if 1 <= value <= 8 else 1
    assert parse(encode(PICTURE, "TIFF", tiffinfo={274: value})).orientation == expected
    assert parse(encode(PICTURE, "WEBP", exif=exif)).orientation == expected
    assert parse(png(SMALL.astype(np.uint16), chunks={b"eXIf": exif.tobytes()[6:]})).orientation == expected
    for kind in ("PNG", "JPEG"):
        assert parse(encode(PICTURE, kind, exif=exif)).orientation == expected


@pytest.mark.parametrize("kind", sorted({name.split()[0] for name in FILES}))
def test_mutated_headers_raise_nothing_else(kind: str) -> None:
    rng = random.Random(kind)
    files = [data for name, data in FILES.items() if name.split()[0] == kind]
    start = time.perf_counter()
    for _ in range(3_000):
        result = outcome(mutate(rng.choice(files), rng, rng.choice(files))[0])
        if isinstance(result, Header):
            assert 0 < result.width * result.height <= MAX_PIXELS
        else:
            assert str(result).isprintable()
            assert result.size is None or 0 < max(result.size) < 1 << 31
    assert time.perf_counter() - start < 20
