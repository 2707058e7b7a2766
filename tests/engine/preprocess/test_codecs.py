import io
import random
import struct
import time
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageOps

from engine.core.records import Header
from engine.formats.common import HeaderError
from engine.formats.header import parse_header
from engine.preprocess.codecs import decode as codecs
from engine.preprocess.codecs.gray import apply_orientation, to_gray, unpack_bits, white_of
from tests.fuzz.mutations import mutate
from tests.helpers.images import bmp, encode, every_format, png, smooth, tiff

FILES = every_format()


def decode(data: bytes) -> np.ndarray:
    return codecs.decode(data, parse_header(data, 1_000_000)).gray


def gray_of(data: bytes) -> np.ndarray:
    return decode(data).astype(int)


def pillow_gray(data: bytes) -> np.ndarray:
    """Pillow's decoding, luma, what is transparent over black."""
    picture = Image.open(io.BytesIO(data))
    if picture.mode.startswith("I;16"):
        return np.asarray(picture).astype(float) / 257
    if picture.mode in ("P", "LA", "RGBA"):
        rgba = np.asarray(picture.convert("RGBA")).astype(float)
        return rgba[:, :, :3] @ [0.299, 0.587, 0.114] * rgba[:, :, 3] / 255
    return np.asarray(picture.convert("L")).astype(float)


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_pillows(name: str) -> None:
    apart = np.abs(gray_of(FILES[name]) - pillow_gray(FILES[name]))
    assert apart.mean() <= 1
    assert apart.max() <= 8 if "lossy" in name else apart.max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_samples_are_scaled_by_their_significant_bits(bits: int) -> None:
    """A detector of `bits` bits in a 16-bit file keeps its contrast."""
    rng = np.random.default_rng(bits)
    samples = rng.integers(0, 1 << bits, (50, 60)).astype(np.uint16)
    samples[0, 0] = (1 << bits) - 1
    expected = np.rint(samples / ((1 << bits) - 1) * 255)
    assert np.abs(gray_of(png(samples)) - expected).max() == 0


@pytest.mark.parametrize("brightest", [255, 90])
def test_8_bit_samples_stretched_to_16_come_back_exactly(brightest: int) -> None:
    gray = (smooth(50, 60).astype(int) * brightest // 255).astype(np.uint8)
    assert np.array_equal(gray_of(png(gray.astype(np.uint16) * 257)), gray)


def test_colour_of_16_bits_is_luma_not_clipped() -> None:
    colour = (smooth(40, 30, channels=3).astype(np.uint16)) * 16 + 7
    expected = np.asarray(Image.fromarray(smooth(40, 30, channels=3)).convert("L")).astype(int)
    assert np.abs(gray_of(png(colour)) - expected).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_is_laid_over_black(dtype: type, channels: int) -> None:
    gray = smooth(40, 30)
    alpha = smooth(40, 30, seed=1)
    planes = [gray] * (channels - 1) + [alpha]
    samples = np.stack(planes, -1).astype(dtype) * (257 if dtype == np.uint16 else 1)
    expected = gray.astype(float) * alpha / 255
    assert np.abs(gray_of(png(samples)) - expected).max() <= 1


def test_palette_with_transparent_entries() -> None:
    picture = Image.fromarray(smooth(40, 30)).quantize(16)
    data = encode(picture, "PNG", transparency=bytes([0] * 8 + [255] * 8))
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(float)
    expected = rgba[:, :, :3] @ [0.299, 0.587, 0.114] * rgba[:, :, 3] / 255
    assert np.abs(gray_of(data) - expected).max() <= 1


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation(value: int) -> None:
    gray = smooth(20, 30)
    exif = Image.Exif()
    exif[0x0112] = value
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(Image.fromarray(gray), "PNG", exif=exif))))
    assert np.array_equal(apply_orientation(gray, value), np.asarray(upright))
    deep = png(gray.astype(np.uint16) * 257, chunks={b"eXIf": exif.tobytes()[6:]})
    assert np.array_equal(gray_of(deep), np.asarray(upright))


@pytest.mark.parametrize(
    "exif", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\0", b"junk" * 5]
)
def test_hostile_exif_is_ignored(exif: bytes) -> None:
    gray = smooth(20, 30)
    assert np.array_equal(gray_of(png(gray.astype(np.uint16) * 257, chunks={b"eXIf": exif})), gray)


def test_damage_is_a_value_error() -> None:
    data = bytearray(png(np.random.default_rng(0).integers(0, 65536, (50, 60)).astype(np.uint16)))
    data[len(data) // 2] ^= 0x55
    with pytest.raises(ValueError, match=r"."):
        decode(bytes(data))


def test_black_and_8_bit_samples() -> None:
    assert white_of(np.zeros((2, 2), np.uint16)) == 255
    assert white_of(np.zeros((2, 2), np.uint8)) == 255
    gray = smooth(5, 6)
    assert np.array_equal(to_gray(gray), gray)


SAMPLES = {
    "gray": smooth(41, 53),
    "gray 16": smooth(41, 53).astype(np.uint16) * 257,
    "RGB": smooth(41, 53, channels=3),
}


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 32), (64, 64)])
@pytest.mark.parametrize("kind", SAMPLES)
def test_tiff_byte_orders_and_tiles(kind: str, tile: tuple[int, int] | None, order: str, big: bool) -> None:
    rgb = kind == "RGB"
    data = tiff(SAMPLES[kind], photometric=2 if rgb else 1, order=order, big=big, tile=tile)
    if big and order == ">":  # which Pillow doesn't know
        expected = pillow_gray(tiff(SAMPLES[kind], photometric=2 if rgb else 1))
    else:
        expected = pillow_gray(data)
    assert np.abs(gray_of(data) - expected).max() <= 1


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])  # by Pillow itself, by libtiff
def test_other_tiff_tags_are_ignored(compression: str | None) -> None:
    log = {269: "knees.tif", 270: "a knee", 285: "page"}
    options = {"dpi": (300, 300), "software": "a scanner", "tiffinfo": log, "compression": compression}
    data = encode(Image.fromarray(SAMPLES["gray"]), "TIFF", **options)
    assert {269, 270, 282, 283, 285, 296, 305} <= set(Image.open(io.BytesIO(data)).tag_v2)
    assert np.array_equal(gray_of(data), SAMPLES["gray"])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_tiff_planes(dtype: type, tile: tuple[int, int] | None) -> None:
    colour = SAMPLES["RGB"].astype(dtype) * (257 if dtype == np.uint16 else 1)
    expected = np.asarray(Image.fromarray(SAMPLES["RGB"]).convert("L"))
    assert np.abs(gray_of(tiff(colour, photometric=2, planar=True, tile=tile)) - expected).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("inverted", [False, True])
def test_tiff_gray_of_any_depth(bits: int, inverted: bool) -> None:
    white = (1 << bits) - 1
    samples = (
        np.random.default_rng(0).integers(0, white + 1, (41, 53)).astype(np.uint8 if bits <= 8 else np.uint16)
    )
    samples[0, 0] = white
    expected = np.rint(samples / white * 255)
    expected = 255 - expected if inverted else expected
    assert np.array_equal(gray_of(tiff(samples, bits=bits, photometric=0 if inverted else 1)), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_palette_of_any_depth(bits: int) -> None:
    rng = np.random.default_rng(bits)
    colours = rng.integers(0, 256, (3, 1 << bits))
    indexes = rng.integers(0, 1 << bits, (41, 53)).astype(np.uint8)
    data = tiff(
        indexes, bits=bits, photometric=3, tags={320: [int(value) for value in colours.ravel() * 257]}
    )
    expected = ([0.299, 0.587, 0.114] @ colours)[indexes]
    assert np.abs(gray_of(data) - expected).max() <= 1


def test_tiff_palette_of_8_bit_values() -> None:
    indexes = smooth(41, 53) % 16
    palette = [index * 17 for index in range(16)]
    assert np.array_equal(
        gray_of(tiff(indexes, bits=4, photometric=3, tags={320: palette * 3})), indexes * 17
    )


@pytest.mark.parametrize(("extra", "alpha"), [([2], True), ([1], False), ([0], False), (None, False)])
def test_only_declared_tiff_transparency_counts(extra: list[int] | None, alpha: bool) -> None:
    gray, fade = smooth(41, 53), smooth(41, 53, seed=1)
    data = tiff(np.dstack([gray, fade]), tags={338: extra} if extra else None)
    assert np.abs(gray_of(data) - (gray.astype(float) * fade / 255 if alpha else gray)).max() <= 1


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_orientation_of_other_formats(kind: str, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"tiffinfo": {274: value}} if kind == "TIFF" else {"exif": exif, "lossless": True}
    data = encode(Image.fromarray(smooth(20, 30)), kind, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L"))
    assert np.array_equal(gray_of(data), upright)


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8, 24, 32])
def test_bmp(bits: int, top_down: bool) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (9, -(-13 * bits // 8))).astype(np.uint8)
    palette = rng.integers(0, 256, (1 << bits, 3)) if bits <= 8 else None
    for os2 in (False, True)[: 1 if top_down or bits == 32 else 2]:
        data = bmp(rows, 13, bits, top_down=top_down, palette=palette, os2=os2)
        rgb = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)
        assert np.abs(gray_of(data) - rgb @ [0.299, 0.587, 0.114]).max() <= 1


def test_bmp_transparency_is_laid_over_black() -> None:
    data = bmp(np.random.default_rng(0).integers(0, 256, (9, 52)).astype(np.uint8), 13, 32, alpha=True)
    assert np.abs(gray_of(data) - pillow_gray(data)).max() <= 1


@pytest.mark.parametrize("white", [1, 15, 255, 1000, 4095, 65535])
@pytest.mark.parametrize("kind", [2, 3, 5, 6])
def test_pnm(kind: int, white: int) -> None:
    channels = 3 if kind in (3, 6) else 1
    samples = np.random.default_rng(0).integers(0, white + 1, (11, 13, channels))
    samples[0, 0] = white
    header = b"P%d # a comment\n13 11\n# another\n%d\n" % (kind, white)
    if kind <= 3:
        body = b"# one more\n" + b"\n".join(b" ".join(b"%d" % v for v in row.ravel()) for row in samples)
    else:
        body = samples.astype(">u1" if white < 256 else ">u2").tobytes()
    luma = samples @ [0.299, 0.587, 0.114] if channels == 3 else samples[:, :, 0]
    assert np.abs(gray_of(header + body) - luma / white * 255).max() <= 0.51


@pytest.mark.parametrize("body", [b"01101\n10010 1 1 1 1 0", b"01101#x\n1001011110"])
def test_plain_bitmap(body: bytes) -> None:
    bits = np.array([int(chr(c)) for c in body.replace(b"#x", b"") if c in b"01"]).reshape(3, 5)
    assert np.array_equal(gray_of(b"P1\n5 3\n" + body), (1 - bits) * 255)


def test_raw_bitmap() -> None:
    data = encode(Image.fromarray(smooth(11, 13)).convert("1"), "PPM")
    assert data.startswith(b"P4")
    assert np.array_equal(gray_of(data), pillow_gray(data))


def test_large_plain_files_are_read_piece_by_piece() -> None:
    samples = np.random.default_rng(0).integers(0, 256, (700, 900))
    data = b"P2 900 700 255 " + b" ".join(b"%d" % v for v in samples.ravel())
    assert np.array_equal(gray_of(data), samples)


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16])
def test_jpeg_2000_of_any_depth(bits: int) -> None:
    white = (1 << bits) - 1
    samples = np.rint(smooth(41, 53) / 255 * white).astype(np.uint8 if bits <= 8 else np.uint16)
    samples[0, 0] = white
    data = imagecodecs.jpeg2k_encode(samples, level=0, reversible=True, bitspersample=bits)
    assert np.abs(gray_of(data) - samples / white * 255).max() <= 0.51


def test_8_and_16_bit_files_of_one_picture_are_equal() -> None:
    gray = smooth(41, 53)
    sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
    twelve = np.rint(gray / 255 * 4095).astype(np.uint16)
    twelve[0, 0] = 4095
    files = [encode(Image.fromarray(gray), kind) for kind in ("TIFF", "BMP", "PPM", "GIF", "JPEG2000")]
    files += [encode(sixteen, kind) for kind in ("PNG", "TIFF", "JPEG2000")]
    files += [tiff(twelve), tiff(twelve, bits=12), png(twelve)]
    files += [
        b"P5 53 41 65535\n" + twelve.astype(">u2").tobytes(),
        encode(Image.fromarray(gray), "WEBP", lossless=True),
    ]
    gray = gray.astype(int)
    gray[0, 0] = gray_of(files[0])[0, 0]
    for data in files:
        apart = np.abs(gray_of(data) - gray)
        apart[0, 0] = 0
        assert apart.max() <= 1


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "GIF", "PNG"])
def test_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.fromarray(smooth(20, 30, seed=seed)).convert("RGBA") for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    first = encode(frames[0], kind, **options)
    animated = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert parse_header(animated, 1_000).flags == ("first_frame",)
    assert np.abs(gray_of(animated) - gray_of(first)).max() <= 1


def test_a_small_gif_frame_lies_on_a_black_screen() -> None:
    data = encode(Image.fromarray(smooth(20, 30)), "GIF")
    at = data.index(b",\0\0\0\0\x1e\0\x14\0")
    moved = data[:6] + struct.pack("<HH", 40, 50) + data[10:at] + b",\4\0\7\0" + data[at + 5 :]
    expected = np.zeros((50, 40))
    expected[7:27, 4:34] = gray_of(data)
    assert np.array_equal(gray_of(moved), expected)


def test_packed_samples() -> None:
    assert unpack_bits(np.array([[0xE4, 0x1B]], np.uint8), 2).tolist() == [[3, 2, 1, 0, 0, 1, 2, 3]]
    assert unpack_bits(np.array([[0xA5]], np.uint8), 4).tolist() == [[10, 5]]


def broken_lzw() -> bytes:
    """A strip with a code that is not in its table; `imagecodecs.lzw_decode` crashes the process on it."""
    strip = bytes.fromhex("8064205010")  # clear, 400, 258, end
    whole = encode(Image.fromarray(np.zeros((16, 16), np.uint8)), "TIFF", compression="tiff_lzw")
    at = whole.index(b"\x80\0")
    return whole[:at] + strip + whole[at + len(strip) :]


DAMAGED = {
    "PNG pixels": (
        png(smooth(20, 30).astype(np.uint16))[:-20] + bytes(8) + b"\0\0\0\0IEND\xaeB\x60\x82",
        "checksum",
    ),
    "PNG transparency": (encode(Image.fromarray(smooth(20, 30)).quantize(4), "PNG", transparency=1), "tRNS"),
    "TIFF deflate": (tiff(smooth(20, 30)), "strip"),
    "TIFF LZW": (broken_lzw(), "damaged"),
    "PNM sample": (b"P2 2 2 15 1 2 3 16", "over 15, the declared maximum"),
    "PNM raw sample": (b"P5 2 2 15\n\1\2\3\x10", "over 15, the declared maximum"),
    "PNM number": (b"P2 2 2 15 1 2 3 -1", "not a number"),
    "PNM long number": (b"P2 2 2 15 1 2 3 99999999999999999999999", "over 15, the declared maximum"),
    "PNM short": (b"P2 2 2 15 10 11 12 ", "3 of 4"),
    "PNM bits": (b"P1 2 2 0 1 2 0", "0 or 1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str) -> None:
    data, words = DAMAGED[name]
    if name == "PNG transparency":
        at = data.index(b"tRNS") + 4
        data = data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]
    if name == "TIFF deflate":
        data = data[:30] + bytes((data[30] ^ 0x10,)) + data[31:]
    with pytest.raises(ValueError, match=words):
        decode(data)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_short_tiff_strip_is_damage(compression: str) -> None:
    """The strip's bytes are all there, but they hold fewer pixels than the header says."""
    data = encode(Image.fromarray(smooth(20, 30)), "TIFF", compression=compression)
    size = struct.pack("<HHIHH", 257, 3, 1, 20, 0)
    assert size in data
    taller = data.replace(size, struct.pack("<HHIHH", 257, 3, 1, 21, 0))
    taller = taller.replace(struct.pack("<HHIHH", 278, 3, 1, 20, 0), struct.pack("<HHIHH", 278, 3, 1, 21, 0))
    with pytest.raises(ValueError, match=r"damaged|strip"):
        decode(taller)


def test_every_changed_bit_of_a_deflated_tiff_is_noticed() -> None:
    gray = smooth(7, 30)
    data = tiff(gray)
    ((start, end),) = parse_header(data, 1_000).layout.spans
    noticed = 0
    for bit in range(8 * start, 8 * end):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert np.array_equal(gray_of(bytes(changed)), gray)  # what zlib's first bytes say of speed
        except ValueError:
            noticed += 1
    assert noticed >= 8 * (end - start) - 16


def test_a_padded_last_strip_is_cut() -> None:
    gray = smooth(10, 30)
    data = tiff(gray)
    (start, middle), (_, end) = parse_header(data, 1_000).layout.spans
    padded = zlib.compress(np.pad(gray[7:], [(0, 4), (0, 0)]).tobytes())
    offsets, lengths = struct.pack("<HH", start, middle), struct.pack("<HH", middle - start, end - middle)
    assert data.count(offsets) == data.count(lengths) == 1
    moved = data.replace(offsets, struct.pack("<HH", start, len(data)))
    moved = moved.replace(lengths, struct.pack("<HH", middle - start, len(padded))) + padded
    assert np.array_equal(gray_of(moved), gray)


@pytest.mark.parametrize("kind", sorted({name.split()[0] for name in FILES}))
def test_mutations_raise_nothing_but_value_error(kind: str) -> None:
    """The same bytes give the same outcome twice, whatever was decoded between."""
    rng = random.Random(kind)
    files = [FILES[name] for name in FILES if name.split()[0] == kind]
    start = time.perf_counter()
    for _ in range(1_000):
        data = mutate(rng.choice(files), rng, rng.choice(files))[0]
        try:
            header = parse_header(data, 100_000)
        except HeaderError:
            continue
        first = outcome(data, header)
        assert isinstance(first, bytes) or (first.isascii() and first.isprintable())
        decode(rng.choice(files))
        assert outcome(data, header) == first
    assert time.perf_counter() - start < 60


def outcome(data: bytes, header: Header) -> bytes | str:
    try:
        return codecs.decode(data, header).gray.tobytes()
    except ValueError as error:
        return str(error)
