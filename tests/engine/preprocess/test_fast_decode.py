"""`--decode fast`: JPEG by a scaled DCT, near the full decode, as strict, where the bundle says so."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.dicom_files import dicom
from engine.core.settings import Settings
from engine.formats.common import HeaderError
from engine.formats.header import parse_header
from engine.pipeline.load_pixels import load_pixels
from engine.pipeline.pipeline import screen_in_process
from engine.preprocess.codecs import decode
from engine.preprocess.codecs.jpeg import choose_scale
from engine.preprocess.resize import ResizePipeline
from tests.fuzz.mutations import mutate
from tests.helpers.bundles import write_bundle
from tests.helpers.images import encode, every_format, smooth
from tests.helpers.processes import Command
from tests.helpers.tolerances import FAST_MAX, FAST_MEAN

SIZE = (224, 224)


@pytest.fixture(scope="module")
def graph() -> ResizePipeline:
    return ResizePipeline(size=SIZE, batch_size=2, threads=2)


def both(graph: ResizePipeline, data: bytes) -> np.ndarray:
    """Pixels of the full and of the fast decode, [2, H, W]."""
    header = parse_header(data, 1 << 30)
    ways = [decode.decode(data, header, least=least) for least in (None, SIZE)]
    return graph.run([way.gray for way in ways], [way.margins for way in ways])[:, 0].astype(int)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (1, 3000, 1),
        (223, 5000, 1),
        (447, 900, 1),
        (448, 448, 2),
        (449, 451, 2),
        (895, 2001, 2),
        (897, 903, 4),
        (1024, 1024, 4),
        (6001, 900, 4),
        (2430, 1994, 8),
    ],
)
def test_pixels_are_near_those_of_the_full_decode(
    graph: ResizePipeline, height: int, width: int, scale: int
) -> None:
    data = encode(Image.fromarray(smooth(height, width)), "JPEG", quality=90)
    header = parse_header(data, 1 << 30)
    assert choose_scale(header, SIZE) == scale
    gray = decode.decode(data, header, least=SIZE).gray
    assert gray.shape == (-(-height // scale), -(-width // scale))
    exact, fast = both(graph, data)
    assert np.abs(fast - exact).mean() <= FAST_MEAN
    assert np.abs(fast - exact).max() <= (FAST_MAX if scale > 1 else 0)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": "4:2:0", "progressive": True}]
)
def test_colour_is_scaled_as_its_luma(graph: ResizePipeline, options: dict[str, object]) -> None:
    exact, fast = both(graph, encode(Image.fromarray(smooth(911, 1203, channels=3)), "JPEG", **options))
    assert 0 < np.abs(fast - exact).mean() <= FAST_MEAN


@pytest.mark.parametrize("value", range(1, 9))
def test_the_picture_is_neither_stretched_nor_shifted(graph: ResizePipeline, value: int) -> None:
    """Of 899 pixels a quarter is 224.75; the rest of the last one is no picture, wherever it comes to lie."""
    y, x = np.mgrid[0:899, 0:1797]
    waves = 128 + 60 * np.sin(y / 15) + 60 * np.sin(x / 21)
    exif = Image.Exif()
    exif[0x0112] = value
    exact, fast = both(graph, encode(Image.fromarray(waves.astype(np.uint8)), "JPEG", quality=95, exif=exif))
    assert np.abs(fast - exact).mean() <= 1.0
    for edge in (np.s_[:, :2], np.s_[:, -2:], np.s_[:2], np.s_[-2:]):
        assert np.abs(fast - exact)[edge].mean() <= 1.5


def test_other_sizes_than_square_are_measured_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = parse_header(encode(Image.fromarray(smooth(100, 400)), "JPEG", exif=exif), 1 << 30)
    assert (lying.width, lying.height) == (400, 100)
    assert choose_scale(lying, (200, 50)) == 2
    assert choose_scale(lying, (50, 200)) == 1


def test_other_formats_than_jpeg_are_decoded_in_full() -> None:
    files = {name: data for name, data in every_format(130, 150).items() if not name.startswith("JPEG L")}
    files["CMYK"] = encode(Image.fromarray(smooth(130, 150, channels=3)).convert("CMYK"), "JPEG")
    files["DICOM"] = dicom(smooth(130, 150), "jpeg", bits=8)
    for name, data in files.items():
        header = parse_header(data, 1 << 30)
        full, fast = (decode.decode(data, header, least=least) for least in (None, (16, 16)))
        assert np.array_equal(full.gray, fast.gray), name
        assert fast.margins == ((0, 0), (0, 0)), name


def test_damage_gets_the_same_verdict() -> None:
    """The whole stream is read however little of it is needed."""
    rng = random.Random(7)
    gray, colour = Image.fromarray(smooth(230, 270)), Image.fromarray(smooth(230, 270, channels=3))
    files = [encode(gray, "JPEG"), encode(colour, "JPEG"), encode(gray, "JPEG", progressive=True)]
    verdicts = []
    for _ in range(400):
        data = mutate(rng.choice(files), rng, rng.choice(files))[0]
        try:
            header = parse_header(data, 1_000_000)
        except HeaderError:
            continue
        full, fast = (verdict(data, header, least) for least in (None, (32, 32)))
        assert full == fast
        verdicts.append(full)
    assert any("Corrupt JPEG data" in item for item in verdicts)
    assert [] in verdicts


def verdict(data: bytes, header, least) -> str | list[str]:
    try:
        return decode.decode(data, header, least=least).flags
    except ValueError as error:
        return str(error)


def test_a_file_with_a_harmless_warning_is_decoded_in_full() -> None:
    good = encode(Image.fromarray(smooth(130, 150)), "JPEG")
    version = good.index(b"JFIF\0") + 5
    odd = good[:version] + b"\x07" + good[version + 1 :]
    result = decode.decode(odd, parse_header(odd, 1 << 30), least=(16, 16))
    assert result.flags == ["decoder_warning"]
    assert np.array_equal(result.gray, decode.decode(good, parse_header(good, 1 << 30)).gray)


def test_real_radiographs(graph: ResizePipeline, radiographs: list[Path]) -> None:
    for path in radiographs[::5]:
        exact, fast = both(graph, path.read_bytes())
        assert np.abs(fast - exact).mean() <= FAST_MEAN
        assert np.abs(fast - exact).max() <= FAST_MAX


def test_a_run_decodes_as_its_bundle_was_trained(engine_run: Command, tmp_path: Path) -> None:
    folder, rows = tmp_path / "in", {}
    folder.mkdir()
    for number in range(5):
        picture = Image.fromarray(smooth(300, 277, seed=number))
        (folder / f"{number}.jpg").write_bytes(encode(picture, "JPEG"))
    (folder / "5.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-3000] + b"\xff\xd9")
    for how in ("exact", "fast"):
        output = tmp_path / f"out-{how}"
        settings = Settings(manifest=folder, bundle=write_bundle(tmp_path / how, decode=how), output=output)
        screen_in_process(settings)
        screen_in_process(replace(settings, decode=how))  # it is the same run, which is finished
        assert json.loads((output / "_run.json").read_text())["result_options"]["decode"] == how
        rows[how] = pd.read_parquet(output)
        assert rows[how].status.tolist() == ["ok"] * 5 + ["corrupt"]
        assert set(zip(rows[how].width, rows[how].height, strict=True)) == {(277, 300)}
    apart = (rows["fast"].p_normal - rows["exact"].p_normal).abs()[:5]
    assert 0 < apart.max() < 0.05
    for how, other in (("exact", "fast"), ("fast", "exact")):
        refused = engine_run(folder, "-b", how, "-o", "out", "--decode", other)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert f"--decode {other}: bundle {how} was trained with {how}; leave the option" in refused.stderr
        assert f"python -m training DATA -o BUNDLE --decode {other}" in refused.stderr
        assert not (tmp_path / "out").exists()


def test_loaded_pixels_are_those_of_the_decoder(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.jpg" for seed in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(encode(Image.fromarray(smooth(305, 279, seed=seed)), "JPEG"))
    exact, fast = (load_pixels(paths, size=(64, 64), decode=how).pixels for how in ("exact", "fast"))
    small = ResizePipeline(size=(64, 64), batch_size=1, threads=1)
    for path, result, full in zip(paths, fast, exact, strict=True):
        data = path.read_bytes()
        one = decode.decode(data, parse_header(data, 1 << 30), least=(64, 64))
        assert one.gray.shape == (77, 70)
        assert np.array_equal(small.run([one.gray], [one.margins])[0], result)
        assert not np.array_equal(result, full)
