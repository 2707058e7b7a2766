"""DICOM: what is skipped and why, every transfer syntax, and the way from stored values to what is seen."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pydicom
import pydicom.data
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

import engine
from benchmarks.dicom_files import LOSSLESS, LOSSY, dicom, frame
from engine.core.records import Header
from engine.formats import dicom as dicom_header
from engine.formats import header
from engine.formats.common import HeaderError
from engine.preprocess.codecs import dicom as codec
from engine.preprocess.codecs.decode import decode
from tests.helpers.images import png, smooth
from tests.helpers.processes import Command, run_module

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

FILES = Path(pydicom.data.__file__).parent / "test_files"
VERDICTS = [
    line.split("\t")
    for line in Path(__file__).with_name("dicom_verdicts.tsv").read_text().splitlines()
    if not line.startswith("#")
]
MAX_PIXELS = 1_000_000
TWELVE = smooth(61, 47, seed=3).astype(np.uint16) * 16 + smooth(61, 47, seed=4) // 16
SIGNED = TWELVE.astype(np.int16) - 2048

Gray = npt.NDArray[np.uint8]


def parse(data: bytes) -> Header:
    """Return the header as the process that decodes gets it."""
    sent: Header = pickle.loads(pickle.dumps(header.parse_header(data, MAX_PIXELS)))
    return sent


def gray(data: bytes) -> Gray:
    return decode(data, parse(data)).gray


def flags(data: bytes) -> list[str]:
    result = parse(data)
    return [*result.flags, *decode(data, result).flags]


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(HeaderError) as caught:
        parse(data)
    return caught.value.status.label, str(caught.value)


def verdict(data: bytes) -> str:
    """In words: the status with its reason, or what the image is."""
    try:
        result = parse(data)
        every = [*result.flags, *decode(data, result).flags]
    except HeaderError as error:
        return f"{error.status.label}: {str(error).split(';')[0]}"
    except ValueError as error:
        return f"corrupt: {error}"
    size = f"{result.width} x {result.height}, {result.bits} bits, {result.photometric}"
    return f"ok: {', '.join([size, *every])}"


@pytest.mark.parametrize(("name", "expected"), VERDICTS)
def test_files_of_pydicom(name: str, expected: str) -> None:
    assert verdict((FILES / name).read_bytes()) == expected


def test_every_file_of_pydicom_has_a_verdict() -> None:
    there = {path.relative_to(FILES).as_posix() for path in FILES.rglob("*") if path.is_file()}
    assert {name for name, _ in VERDICTS} == there


def test_samples_are_those_that_pydicom_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompressed, RLE and JPEG 2000 of all modalities, by an implementation of its own."""
    monkeypatch.setattr(
        dicom_header, "MODALITIES", (*dicom_header.MODALITIES, *dicom_header._OTHER_MODALITIES)
    )
    compared = set()
    for path in (FILES / name for name, _ in VERDICTS):
        data = path.read_bytes()
        try:
            result = parse(data)
        except HeaderError:
            continue
        if result.format != "dicom" or result.layout.compression not in ("uncompressed", "RLE"):
            continue
        stored, _ = codec._read_stored(data, result, result.layout)
        reference = pydicom.dcmread(path, force=True)
        reference.pixel_array_options(raw=True, index=0)
        mask = (1 << result.bits) - 1
        assert np.array_equal(reference.pixel_array.view(stored.dtype) & mask, stored & mask), path
        compared.add(result.layout.syntax)
    assert len(compared) == 5


@pytest.mark.parametrize("samples", [TWELVE, SIGNED, smooth(61, 47), smooth(61, 47, channels=3)])
def test_lossless_syntaxes_give_identical_pixels(samples: npt.NDArray[Any]) -> None:
    bits = 12 if samples.dtype.itemsize == 2 else 8
    window = {"WindowCenter": 1900 if samples.dtype.kind == "u" else -100, "WindowWidth": 3000}
    window = window if bits == 12 else {}
    pictures = [gray(dicom(samples, syntax, bits=bits, **window)) for syntax in LOSSLESS]
    assert pictures[0].std() > 10
    for syntax, picture in zip(LOSSLESS, pictures, strict=True):
        assert np.array_equal(picture, pictures[0]), syntax


@pytest.mark.parametrize("syntax", LOSSY)
def test_lossy_syntaxes_come_close(syntax: str) -> None:
    samples, bits = (smooth(61, 47), 8) if syntax == "jpeg" else (TWELVE, 12)
    window = {"WindowCenter": 1 << bits - 1, "WindowWidth": 1 << bits}
    difference = gray(dicom(samples, syntax, bits=bits, **window)) - gray(
        dicom(samples, bits=bits, **window)
    ).astype(float)
    assert 0 < np.abs(difference).mean() < 3


def test_lossy_colour_is_its_luma() -> None:
    colour = smooth(64, 64, channels=3)
    expected = colour @ np.array([0.299, 0.587, 0.114])
    for photometric, syntax in (("YBR_FULL_422", "jpeg"), ("RGB", "explicit"), ("RGB", "rle")):
        actual = gray(dicom(colour, syntax, PhotometricInterpretation=photometric))
        assert np.abs(actual - expected).mean() < 3, (photometric, syntax)
    assert flags(dicom(colour)) == ["colour"]


@pytest.mark.parametrize("syntax", ["explicit", "big-endian"])
@pytest.mark.parametrize(("bits", "depth"), [(8, 8), (8, 16), (12, 8), (12, 16)])
def test_palette_colour(bits: int, depth: int, syntax: str) -> None:
    order = ">" if syntax == "big-endian" else "<"
    ramp = np.arange(1 << bits)[::-1] >> bits - 8
    entries = (ramp * 257).astype(f"{order}u2") if depth == 16 else ramp.astype(np.uint8)
    tables = {}
    for name in ("Red", "Green", "Blue"):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [1 << bits, 0, depth]
        tables[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    samples = smooth(40, 40) if bits == 8 else smooth(40, 40).astype(np.uint16) << 4
    result = gray(dicom(samples, syntax, bits=bits, PhotometricInterpretation="PALETTE COLOR", **tables))
    assert np.abs(result.astype(int) - (255 - smooth(40, 40))).max() <= 1


@pytest.mark.parametrize("syntax", ["explicit", "big-endian"])
def test_a_palette_in_segments(syntax: str) -> None:
    def segmented(*words: int) -> dict[str, Any]:
        order = ">" if syntax == "big-endian" else "<"
        return {
            f"{name}PaletteColorLookupTable{part}": value
            for colour in ("Red", "Green", "Blue")
            for name, part, value in (
                (colour, "Descriptor", [256, 0, 16]),
                (f"Segmented{colour}", "Data", struct.pack(f"{order}{len(words)}H", *words)),
            )
        } | {"PhotometricInterpretation": "PALETTE COLOR"}

    samples = smooth(40, 40)
    # one discrete entry, then 255 on a line; a segment that repeats others, which may repeat others
    result = gray(dicom(samples, syntax, **segmented(0, 1, 0, 1, 255, 65535)))
    assert np.abs(result.astype(int) - samples).max() <= 1
    for bomb in ((0, 1, 0, 2, 60000, 0, 0), (0, 1, 0, *(1, 65535, 9) * 9)):
        assert refusal(dicom(samples, syntax, **segmented(*bomb)))[0] == "unsupported"


def windowed(samples: npt.NDArray[Any], **more: Any) -> npt.NDArray[np.float64]:
    """pydicom's modality and VOI steps on every pixel, scaled to 0..255 by the range they say they have."""
    data = pydicom.dcmread(io.BytesIO(dicom(samples, bits=12, **more)))
    values = apply_modality_lut(samples, data)
    if "VOILUTSequence" in data:
        return apply_voi(values, data) / (2 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1) * 255
    ends = apply_modality_lut(
        np.array([-2048, 2047] if samples.dtype.kind == "i" else [0, 4095], np.float64), data
    )
    return (apply_windowing(values, data) - ends.min()) / np.ptp(ends) * 255


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("samples", [TWELVE, SIGNED])
@pytest.mark.parametrize("rescale", [(None, None), (0.5, 100), (2, -1000.5)])
def test_windows_follow_the_standard(
    samples: npt.NDArray[Any], function: str | None, rescale: tuple[float | None, float | None]
) -> None:
    slope, intercept = rescale
    middle = samples.mean() * (slope or 1) + (intercept or 0)
    more = {
        "WindowCenter": [round(middle, 1), 5],
        "WindowWidth": [1234.5, 7],
        "VOILUTFunction": function,
        "RescaleSlope": slope,
        "RescaleIntercept": intercept,
    }
    result = gray(dicom(samples, bits=12, **more))
    assert np.abs(result - windowed(samples, **more)).max() <= 0.51
    assert flags(dicom(samples, bits=12, **more)) == []


def lut(entries: int, first: int, bits: int, values: npt.NDArray[np.uint16]) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [entries & 0xFFFF, first, bits])
    item.add_new("LUTData", "OW", values.astype("<u2").tobytes())
    return [item]


@pytest.mark.parametrize(("samples", "first"), [(TWELVE, 0), (TWELVE, 300), (SIGNED, -2048)])
def test_voi_lut_before_window(samples: npt.NDArray[Any], first: int) -> None:
    curve = (4095 * (np.arange(3000) / 2999) ** 0.6).astype(np.uint16)
    more = {"VOILUTSequence": lut(3000, first, 12, curve), "WindowCenter": 1, "WindowWidth": 2}
    result = gray(dicom(samples, bits=12, **more))
    position = np.clip(samples.astype(int) - first, 0, 2999)
    assert np.abs(result - curve[position] / 4095 * 255).max() <= 0.51


@pytest.mark.parametrize(
    ("declared", "largest", "white"),
    [(12, 1000, 4095), (14, 8000, 16383), (16, 4095, 4095), (10, 4095, 4095), (0, 255, 255)],
)
def test_white_of_a_voi_lut_is_what_its_bits_declare_where_they_can(
    declared: int, largest: int, white: int
) -> None:
    curve = np.linspace(0, largest, 4096).astype(np.uint16)
    result = gray(dicom(TWELVE, bits=12, VOILUTSequence=lut(4096, 0, declared, curve)))
    assert np.abs(result - curve[TWELVE] / white * 255).max() <= 0.51


def test_an_invalid_voi_lut_is_ignored_for_the_window() -> None:
    window = {"WindowCenter": 2000, "WindowWidth": 3000}
    for broken in ([Dataset()], lut(4096, 0, 12, TWELVE[0][:0])):
        assert np.array_equal(
            gray(dicom(TWELVE, bits=12, VOILUTSequence=broken, **window)),
            gray(dicom(TWELVE, bits=12, **window)),
        )


def test_a_rescale_that_overflows_is_ignored() -> None:
    assert np.array_equal(
        gray(dicom(TWELVE, bits=12, RescaleSlope=1e308, RescaleIntercept=0)), gray(dicom(TWELVE, bits=12))
    )


def test_modality_lut() -> None:
    curve = (60_000 * (np.arange(4096) / 4095) ** 2).astype(np.uint16)
    more = {"ModalityLUTSequence": lut(4096, 0, 16, curve), "WindowCenter": 30_000, "WindowWidth": 60_000}
    actual = gray(dicom(TWELVE, bits=12, **more))
    expected = np.clip((curve[TWELVE] - 29_999.5) / 59_999 + 0.5, 0, 1) * 255
    assert np.abs(actual - expected).max() <= 0.51


def test_monochrome1_is_inverted_once_after_voi() -> None:
    more = {"WindowCenter": 900, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"}
    plain = gray(dicom(TWELVE, bits=12, **more))
    assert np.array_equal(
        255 - plain, gray(dicom(TWELVE, bits=12, PhotometricInterpretation="MONOCHROME1", **more))
    )
    # inverted before VOI, the window would fall on other values
    assert np.abs(gray(dicom(4095 - TWELVE, bits=12, **more)).astype(int) - (255 - plain)).mean() > 20


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 2000, "WindowWidth": 0.5},
        {"WindowCenter": 2000, "WindowWidth": 0},
        {"WindowCenter": 2000, "WindowWidth": -5},
        {"WindowCenter": 60_000, "WindowWidth": 100},
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": 2000},
    ],
)
def test_missing_and_empty_windows(window: dict[str, Any]) -> None:
    data = dicom(TWELVE, bits=12, **window)
    low, high = np.percentile(TWELVE, [0.5, 99.5])
    expected = np.clip((TWELVE - low) / (high - low), 0, 1) * 255
    assert np.abs(gray(data) - expected).mean() < 1
    assert flags(data) == ["window_fallback"]


def test_padding_does_not_count() -> None:
    samples = TWELVE // 2 + 100
    samples[:30] = 4095
    padded = gray(dicom(samples, bits=12, PixelPaddingValue=4095))[30:]
    alone = gray(dicom(samples[30:], bits=12))
    assert np.array_equal(padded, alone)
    assert gray(dicom(samples, bits=12))[30:].mean() < padded.mean() - 30
    ranged = gray(dicom(samples, bits=12, PixelPaddingValue=4000, PixelPaddingRangeLimit=4095))[30:]
    assert np.array_equal(ranged, alone)
    everything = gray(dicom(np.full((9, 9), 7, np.uint16), bits=12, PixelPaddingValue=7))
    assert np.ptp(everything) == 0


def test_unused_bits_do_not_count() -> None:
    more = {"WindowCenter": 2000, "WindowWidth": 4000}
    overlay = TWELVE | np.uint16(0x3000)
    assert np.array_equal(gray(dicom(overlay, bits=12, **more)), gray(dicom(TWELVE, bits=12, **more)))
    high = gray(dicom(TWELVE << 4, bits=12, HighBit=15, **more))
    assert np.array_equal(high, gray(dicom(TWELVE, bits=12, **more)))


@pytest.mark.parametrize("syntax", ["jpeg-sv1", "jpeg2000"])
@pytest.mark.parametrize("offsets", ["basic", "extended", "none"])
def test_the_first_of_several_frames_however_they_are_cut(syntax: str, offsets: str) -> None:
    """Two frames in two fragments each, found by either offset table or by none."""
    frames = [frame(samples, syntax, 12) for samples in (TWELVE, TWELVE // 2)]
    data = pydicom.dcmread(io.BytesIO(dicom(TWELVE, syntax, bits=12, NumberOfFrames=2)))
    if offsets == "extended":
        data.PixelData, data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths = encapsulate_extended(
            frames
        )
    else:
        data.PixelData = encapsulate(frames, fragments_per_frame=2, has_bot=offsets == "basic")
    data["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    pydicom.dcmwrite(file, data)
    assert np.array_equal(gray(file.getvalue()), gray(dicom(TWELVE, bits=12)))


def test_flags() -> None:
    frames = dicom(np.concatenate([TWELVE, TWELVE // 2]), bits=12, Rows=61, NumberOfFrames=2)
    assert flags(frames) == ["first_frame", "window_fallback"]
    assert np.array_equal(gray(frames), gray(dicom(TWELVE, bits=12)))
    more = {"WindowCenter": 2000, "WindowWidth": 4000}
    for expected, attribute in (
        ("for_processing", {"PresentationIntentType": "FOR PROCESSING"}),
        ("inverse_lut", {"PresentationLUTShape": "INVERSE"}),
        ("burned_in", {"BurnedInAnnotation": "YES"}),
    ):
        assert flags(dicom(TWELVE, bits=12, **more, **attribute)) == [expected]
    plain = {"PresentationLUTShape": "IDENTITY", "BurnedInAnnotation": "NO"}
    assert flags(dicom(TWELVE, bits=12, **more, **plain)) == []


def test_what_is_skipped() -> None:
    assert refusal(dicom(TWELVE, Modality="CT"))[:2] == (
        "skipped",
        f"the modality is CT; screened modalities: {', '.join(dicom_header.MODALITIES)}",
    )
    status, text = refusal(dicom(TWELVE, Modality="DOE^JANE"))
    assert (status, "DOE" in text) == ("skipped", False)
    whole = pydicom.dcmread(io.BytesIO(dicom(TWELVE)))
    del whole.PixelData
    bare = io.BytesIO()
    whole.save_as(bare)
    assert refusal(bare.getvalue()) == ("skipped", "the DICOM file contains no image")
    for modality in ("", *dicom_header.MODALITIES):
        assert parse(dicom(TWELVE, Modality=modality)).format == "dicom"


def test_content_decides() -> None:
    assert parse(dicom(TWELVE, preamble=b"II*\0\x10\0\0\0" + bytes(120))).format == "dicom"
    for syntax in ("implicit", "explicit"):
        data = dicom(TWELVE, syntax, bits=12)
        meta_length = struct.unpack_from("<I", data, 140)[0]
        bare, with_meta = data[144 + meta_length :], data[132:]
        for headless in (bare, with_meta):
            assert np.array_equal(gray(headless), gray(data)), syntax
    big = dicom(TWELVE, "big-endian", bits=12)
    bare = big[144 + struct.unpack_from("<I", big, 140)[0] :]
    assert np.array_equal(gray(bare), gray(big))
    assert refusal(b"\x08\0\x10\0" + b"notes" * 50)[0] == "unsupported"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"Rows": 0}, "corrupt"),
    ({"Columns": None}, "corrupt"),
    ({"Rows": 5000, "Columns": 5000}, "too_large"),
    ({"Rows": 62}, "corrupt"),
    ({"BitsAllocated": 32}, "unsupported"),
    ({"BitsStored": 17}, "corrupt"),
    ({"BitsStored": None}, "corrupt"),
    ({"SamplesPerPixel": 3}, "corrupt"),
    ({"PhotometricInterpretation": "ARGB"}, "unsupported"),
    ({"PhotometricInterpretation": None}, "unsupported"),
]


@pytest.mark.parametrize(("attributes", "status"), WRONG)
def test_wrong_attributes(attributes: dict[str, Any], status: str) -> None:
    assert refusal(dicom(TWELVE, **attributes))[0] == status


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_truncated_anywhere(syntax: str) -> None:
    samples = smooth(61, 47) if syntax == "jpeg" else TWELVE
    data = dicom(samples, syntax, bits=12 if samples.dtype.itemsize == 2 else 8)
    whole = gray(data)
    for end in range(0, len(data) - 1, max(1, len(data) // 150)):
        result = verdict(data[:end])
        if result.startswith("ok"):  # what is cut off held no pixels: deflate's end, a delimiter
            assert np.array_equal(gray(data[:end]), whole)
            assert end > len(data) - 20
        assert "DOE" not in result
    assert verdict(data[: len(data) // 2]).startswith(("truncated", "corrupt", "skipped"))


def test_a_frame_of_another_size_is_refused_before_it_is_decoded() -> None:
    for syntax in ("jpeg-sv1", "jpeg-ls", "jpeg2000", "rle"):
        data = dicom(TWELVE, syntax, bits=12, Rows=60)
        assert verdict(data) == "corrupt: the image is damaged", syntax
    file = dicom(TWELVE, "jpeg-sv1", bits=12)
    position = file.index(b"\xff\xc3") + 5
    bomb = file[:position] + b"\xff\xdc\xff\xdc" + file[position + 4 :]  # 65500 x 65500
    assert verdict(bomb) == "corrupt: the image is damaged"


def test_a_deflated_bomb_stops_where_the_image_ends() -> None:
    data = dicom(TWELVE, "deflated", bits=12)
    meta = 144 + struct.unpack_from("<I", data, 140)[0]
    inflated = zlib.decompress(data[meta:], -15)
    deflate = zlib.compressobj(9, wbits=-15)
    bomb = deflate.compress(inflated) + deflate.compress(bytes(200_000_000)) + deflate.flush()
    assert np.array_equal(gray(data[:meta] + bomb), gray(data))
    header_bomb = zlib.compressobj(9, wbits=-15)
    endless = header_bomb.compress(inflated[:100] + bytes(50_000_000)) + header_bomb.flush()
    assert refusal(data[:meta] + endless)[0] == "unsupported"  # of too many elements


@pytest.mark.parametrize("length", ["defined", "undefined"])
@pytest.mark.parametrize("tag", [b"\x09\0\x02\x10", b"\x28\0\x10\x30"])  # a private one, VOILUTSequence
def test_a_header_of_a_million_items(tag: bytes, length: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would become an object; the limits are lowered so that the test is quick."""
    monkeypatch.setattr(dicom_header._LimitedReads, "_reads_left", 2000)
    data = dicom(TWELVE, bits=12)
    items = b"\xfe\xff\0\xe0\0\0\0\0" * 3000
    size = len(items) if length == "defined" else 0xFFFFFFFF
    end = b"" if length == "defined" else b"\xfe\xff\xdd\xe0\0\0\0\0"
    position = data.find(b"\x10\0\x10\0" if tag[0] == 9 else b"\xe0\x7f\x10\0", 132)
    bomb = data[:position] + tag + b"SQ\0\0" + struct.pack("<I", size) + items + end + data[position:]
    if (tag[0], length) == (9, "defined"):  # jumped over
        assert np.array_equal(gray(bomb), gray(data))
    else:
        assert refusal(bomb)[0] in ("unsupported", "corrupt")


def test_no_header_value_in_any_error() -> None:
    """Every element's value replaced, one at a time, by a name."""
    data = dicom(TWELVE, WindowCenter=2000, WindowWidth=4000)
    reference = pydicom.dcmread(io.BytesIO(data))
    for element in reference:
        if element.keyword == "PixelData":
            continue
        start = data.find(struct.pack("<HH", element.tag.group, element.tag.element), 132)
        length = struct.unpack_from("<H", data, start + 6)[0]
        for name in (b"ZZTOP", b"\xff\xfe\x00Z", b"9" * 40):
            value = (name * 20)[:length]
            result = verdict(data[: start + 8] + value + data[start + 8 + length :])
            assert "ZZTOP" not in result, element.keyword


def test_eight_and_sixteen_bits_of_one_picture() -> None:
    picture = smooth(80, 70)
    for wide in (picture * np.uint16(257), picture * np.uint16(256), picture.astype(np.uint16) << 4):
        for chunks in ({}, {b"sBIT": b"\x10"} if wide.max() > 60_000 else {b"sBIT": b"\x0c"}):
            result = gray(png(wide, chunks=chunks))
            assert np.abs(result.astype(int) - picture).max() <= 1
    dark = smooth(80, 70).astype(np.uint16) * 8  # of 16 bits, as its writer says
    assert gray(png(dark, chunks={b"sBIT": b"\x10"})).max() == round(dark.max() / 257)
    assert gray(png(dark)).max() > 100
    window = {"WindowCenter": 128, "WindowWidth": 256, "VOILUTFunction": "LINEAR_EXACT"}
    eight = gray(dicom(picture, **window))
    window = {"WindowCenter": 128 * 257, "WindowWidth": 256 * 257, "VOILUTFunction": "LINEAR_EXACT"}
    assert np.abs(gray(dicom(picture * np.uint16(257), **window)).astype(int) - eight).max() <= 1


def test_through_the_command_line(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pacs"
    folder.mkdir()
    window = {"WindowCenter": 2000, "WindowWidth": 4000}
    files = {
        "a": dicom(TWELVE, "jpeg-sv1", bits=12, **window),
        "b.jpg": dicom(TWELVE, "explicit", bits=12, **window),  # by content, not by name
        "c.dcm": dicom(TWELVE, Modality="SR"),
        "d.dcm": dicom(TWELVE, "jpeg-ls", bits=12, **window)[:-500],
        "e.png": png(gray(dicom(TWELVE, bits=12, **window))),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    pd.DataFrame({"path": sorted(files)}).to_csv(folder / "list.csv", index=False)
    for options, names in (((), ()), (("--include-uids",), ("study_uid", "series_uid", "sop_uid"))):
        results = tmp_path / f"results{len(names)}"
        done = engine_run(folder / "list.csv", "-b", bundle, "-o", results, *options)
        assert done.returncode == 0, done.stderr
        assert "DOE" not in done.stderr + done.stdout
        rows = engine.read_results(results)
        assert list(rows["status"]) == ["ok", "ok", "skipped", "truncated", "ok"]
        assert list(rows["bits"].fillna(0)) == [12, 12, 0, 0, 8]
        assert list(rows["photometric"].fillna("")) == ["MONOCHROME2", "MONOCHROME2", "", "", ""]
        assert rows["p_normal"][0] == rows["p_normal"][1] == rows["p_normal"][4]
        assert {"study_uid", "series_uid", "sop_uid"} & set(rows.columns) == set(names)
    assert list(rows["study_uid"].fillna("")) == ["1.2.3", "1.2.3", "", "", ""]
    assert list(rows["sop_uid"].fillna("")) == ["1.2.3.4", "1.2.3.4", "", "", ""]


def test_without_pydicom(tmp_path: Path, bundle: Path, archive: Path) -> None:
    """One line that names the command, once a DICOM file turns up; other archives don't need it."""
    blocked = tmp_path / "blocked" / "pydicom"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not here')")
    code = (
        f"import sys; sys.path.insert(0, {str(blocked.parent)!r}); from engine.run import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "without.py").write_text(code)
    assert (
        run_module(
            "without", [archive, "-b", bundle, "-o", "first"], folder=tmp_path, timeout_s=60
        ).returncode
        == 0
    )
    (archive / "image-99.dcm").write_bytes(dicom(TWELVE))
    done = run_module("without", [archive, "-b", bundle, "-o", "second"], folder=tmp_path, timeout_s=60)
    assert done.returncode == 2
    assert "pip install -c constraints.txt '.[dicom]'" in done.stderr
    assert "Traceback" not in done.stderr
