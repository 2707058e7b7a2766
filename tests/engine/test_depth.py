import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from engine.preprocess.depth import full_scale, oriented, to_gray, to_gray_pnm
from tests.images import encode, png, smooth


def gray_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(to_gray_pnm(data)))).astype(int)


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
    assert np.array_equal(oriented(gray, value), np.asarray(upright))
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
        to_gray_pnm(bytes(data))


def test_black_and_8_bit_samples() -> None:
    assert full_scale(np.zeros((2, 2), np.uint16)) == 255
    assert full_scale(np.zeros((2, 2), np.uint8)) == 255
    gray = smooth(5, 6)
    assert np.array_equal(to_gray(gray), gray)
