"""DICOM frames as on a GPU, with nvImageCodec's CPU decoders in place of the GPU's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.core.records import Status
from engine.formats.header import parse_header
from engine.pipeline.load_pixels import load_pixels
from engine.preprocess.codecs.dicom_windowing import display, display_samples
from engine.preprocess.gpu import DecodeOptions
from engine.preprocess.gpu_dicom import DicomPipeline
from tests.helpers.gpu_pixels import SIZE, decoded
from tests.helpers.images import jpeg, smooth

pytest.importorskip("pydicom")  # a machine that only has a GPU may lack it

from benchmarks.dicom_files import LOSSLESS, dicom

WINDOW = {"WindowCenter": 2000, "WindowWidth": 3000}
TWELVE = smooth(211, 187, seed=3).astype(np.uint16) * 16


@pytest.fixture
def pacs(tmp_path: Path) -> Path:
    """Every lossless syntax, with and without a window, inverted, signed; damaged ones; a JPEG."""
    folder = tmp_path / "pacs"
    folder.mkdir()
    for number, syntax in enumerate(LOSSLESS):
        (folder / f"{syntax}.dcm").write_bytes(dicom(TWELVE + number, syntax, bits=12, **WINDOW))
    more = {
        "no-window": dicom(TWELVE, "jpeg2000", bits=12),
        "inverted": dicom(TWELVE, "jpeg2000", bits=12, PhotometricInterpretation="MONOCHROME1", **WINDOW),
        "signed": dicom(
            TWELVE.astype(np.int16) - 2048, "jpeg2000", bits=12, WindowCenter=0, WindowWidth=3000
        ),
        "eight": dicom(smooth(90, 80), "htj2k", WindowCenter=128, WindowWidth=256),
        "colour": dicom(smooth(90, 80, channels=3), "jpeg2000"),
        "another-size": dicom(TWELVE, "jpeg2000", bits=12, Rows=210),
        "cut": dicom(TWELVE, "jpeg2000", bits=12)[:-3000],
        "picture": jpeg(smooth(120, 100)),
    }
    for name, data in more.items():
        (folder / name).write_bytes(data)
    return folder


def test_the_header_decides(pacs: Path) -> None:
    decoding = DecodeOptions()
    routes = {}
    for path in pacs.iterdir():
        data = path.read_bytes()
        if path.name != "cut":
            routes[path.name] = decoding.on_gpu(data, parse_header(data, 1_000_000))
    assert {name for name, there in routes.items() if there} == {
        *("jpeg2000.dcm", "htj2k.dcm", "htj2k-rpcl.dcm", "jpeg-p14.dcm", "jpeg-sv1.dcm"),
        *("no-window", "inverted", "signed", "eight", "another-size", "picture"),
    }
    every_image_on_the_cpu = DecodeOptions(cpu_share=1.0)
    for name in routes:
        data = (pacs / name).read_bytes()
        assert not every_image_on_the_cpu.on_gpu(data, parse_header(data, 1_000_000)), name


@pytest.mark.parametrize("batch_size", [3, 16])
def test_pixels_are_those_of_the_cpu(pacs: Path, batch_size: int) -> None:
    paths = sorted(pacs.iterdir())
    loaded = load_pixels(paths, size=SIZE)
    expected = {paths[position].name: row for position, row in zip(loaded.index, loaded.pixels, strict=True)}
    actual = decoded(pacs, batch_size=batch_size)
    assert set(actual) == {path.name for path in paths}
    for name, row in actual.items():
        if name in ("cut", "another-size"):
            assert row[0] == (Status.TRUNCATED if name == "cut" else Status.CORRUPT), name
        elif name == "picture":
            assert np.abs(row.astype(int) - expected[name]).mean() < 2
        else:
            assert np.array_equal(row, expected[name]), name


def test_flags_are_those_of_the_cpu(pacs: Path) -> None:
    flags = {}
    for name in ("no-window", "inverted"):
        data = (pacs / name).read_bytes()
        graph = DicomPipeline(size=SIZE, batch_size=2, threads=1, device_id=None)
        result = graph.run({5: (data, parse_header(data, 1_000_000))})
        assert (result.decoded, result.refused) == ([5], [])
        flags[name] = result.flags.get(5, [])
    assert flags == {"no-window": ["window_fallback"], "inverted": []}


@pytest.mark.parametrize("name", ["jpeg2000.dcm", "no-window", "inverted", "eight"])
def test_one_rule_for_arrays_and_tensors(pacs: Path, name: str) -> None:
    """Samples in a tensor are displayed as samples in an array are."""
    header = parse_header((pacs / name).read_bytes(), 1_000_000)
    samples = smooth(90, 80) if name == "eight" else TWELVE
    inverted = name == "inverted"
    cells = torch.from_numpy(samples.astype(np.int32))
    bits = 8 * samples.dtype.itemsize
    shown, flags = display(
        lambda levels: torch.from_numpy(levels)[cells],
        torch.count_nonzero,
        lambda: torch.bincount(cells.reshape(-1), minlength=1 << bits).numpy(),
        samples.dtype,
        header.layout,
        inverted=inverted,
    )
    expected, expected_flags = display_samples(samples, header.layout, inverted=inverted)
    assert np.array_equal(shown.numpy(), expected)
    assert flags == expected_flags == (["window_fallback"] if name == "no-window" else [])


def test_refused_frames_are_decoded_on_the_cpu(pacs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: DicomPipeline, files: object) -> None:
        raise RuntimeError("out of memory")

    before = decoded(pacs)
    monkeypatch.setattr(DicomPipeline, "_decode", fails)
    after = decoded(pacs)
    for name, row in before.items():
        if name != "picture":
            assert np.array_equal(np.asarray(row, object), np.asarray(after[name], object)), name
