"""On a real GPU: whole runs beside the CPU's, graphs beside plain launches, DALI's pixels, resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.gpu.bundle import proof_bundle
from benchmarks.gpu.members import measure_overlap
from engine.bundle import bundle as bundles
from engine.core.overlap import Meter
from engine.core.records import Part
from engine.core.settings import Limits
from engine.formats.header import parse_header
from engine.pipeline.load_pixels import load_pixels
from engine.pipeline.open_gpu import check_canaries
from engine.preprocess.gpu import DecodeOptions, GpuPreprocess
from engine.preprocess.gpu_dicom import DicomPipeline
from engine.preprocess.stage import Preprocess
from engine.reader.reader import Reader
from engine.runners.select import open_runner, select_runner
from engine.scoring.gpu import GpuScorer
from tests.helpers.images import smooth, write_images
from tests.helpers.processes import Command
from tests.helpers.runs import read_frame

pytestmark = pytest.mark.gpu
LIMIT = 5e-3  # of a probability, FP16 against float32


@pytest.fixture(scope="module")
def proof(tmp_path_factory) -> Path:
    return proof_bundle(tmp_path_factory.mktemp("proof") / "bundle")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Gray and colour JPEG and PNG, and four that are no images."""
    folder = write_images(tmp_path_factory.mktemp("archive") / "images", 60)
    (folder / "image-11-cut.jpg").write_bytes((folder / "image-11.jpg").read_bytes()[:500])
    (folder / "image-13-text.jpg").write_text("no image")
    (folder / "image-15-empty.png").write_bytes(b"")
    data = bytearray((folder / "image-17.jpg").read_bytes())
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    (folder / "image-17-table.jpg").write_bytes(data)
    return folder


def screen(engine_process: Command, archive: Path, bundle: Path, name: str, *options: object) -> pd.DataFrame:
    run = engine_process(archive, "-b", bundle, "-o", name, *map(str, options), timeout_s=300)
    assert run.returncode == 0, run.stderr
    return read_frame(Path(run.stdout.strip()))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where `engine_process` runs


def test_a_whole_run_gives_the_rows_of_the_cpu(engine_process, archive, proof):
    expected = screen(engine_process, archive, proof, "cpu", "--device", "cpu")
    actual = screen(engine_process, archive, proof, "gpu", "--device", "cuda:0", "--batch-size", 16)
    exact = ["row", "path", "status", "width", "height"]
    pd.testing.assert_frame_equal(actual[exact], expected[exact])
    scores = [name for name in expected if "p_" in name] + ["confidence"]
    assert np.allclose(actual[scores], expected[scores], atol=2 * LIMIT, equal_nan=True)
    assert (actual.status != "ok").sum() == 4
    assert actual[actual.status != "ok"][scores].isna().all().all()


def test_graphs_streams_and_slots_change_no_score(engine_process, archive, proof):
    fixed = ("--device", "cuda:0", "--batch-size", 16)
    bare = ("--no-cuda-graph", "--streams", 1, "--slots", 1)
    plain = screen(engine_process, archive, proof, "plain", *fixed, *bare)
    for name, options in {
        "graph": ["--streams", 1],
        "two": ["--streams", 2],
        "slots": ["--streams", 2, "--slots", 5],
        "serial": ["--serial"],
    }.items():
        result = screen(engine_process, archive, proof, name, *fixed, *options)
        pd.testing.assert_frame_equal(result, plain, obj=name)


def test_a_stopped_run_resumes_and_failed_rows_are_retried(engine_process, archive, proof, tmp_path):
    fixed = ("--device", "cuda:0", "--batch-size", 8, "--part-rows", 16)
    whole = screen(engine_process, archive, proof, "out", *fixed)
    (tmp_path / "out" / "_SUCCESS").unlink()
    (tmp_path / "out" / "part-00001.parquet").unlink()
    pd.testing.assert_frame_equal(screen(engine_process, archive, proof, "out", *fixed), whole)
    tuning = json.loads((tmp_path / "out" / "_run.json").read_text())["tuning"]
    assert DecodeOptions(**tuning["decoding"])
    run = engine_process("out", "--only-errors", timeout_s=300)
    assert run.returncode == 0, run.stderr
    pd.testing.assert_frame_equal(read_frame(tmp_path / "out"), whole)


def test_dali_pixels_are_within_two_gray_levels_of_the_cpu(tmp_path):
    folder = write_images(tmp_path / "images", 40)
    paths = sorted(folder.glob("*.jpg"))
    expected = load_pixels(paths, size=(224, 224)).pixels
    part = Part(0, np.arange(len(paths)), [str(path) for path in paths], None)
    decoding = DecodeOptions()
    reader = Reader(Path(), 8, 2, limits=Limits(), on_gpu=decoding.on_gpu)
    with (
        Preprocess(size=(224, 224), batch_size=8, threads=2, decoding_bytes=1 << 28) as cpu,
        GpuPreprocess(cpu, size=(224, 224), batch_size=8, threads=4, device_id=0, decoding=decoding) as stage,
    ):
        for batch in stage.stage(reader.stage([part], Meter("read")), Meter("preprocess")):
            assert batch.device_pixels is not None
            assert not len(batch.device_pixels.host), "all of them by DALI"
            (tensor,) = batch.device_pixels.decoded
            actual = torch.from_dlpack(tensor).cpu().numpy()
            rows = expected[batch.start + batch.index]
            assert np.abs(actual.astype(int) - rows).mean(axis=(1, 2, 3)).max() <= 2


@pytest.mark.parametrize("graphs", [False, True])
def test_the_canaries_pass_in_fp16_and_members_overlap(proof, graphs):
    models = bundles.load_bundle(proof)
    choice = select_runner("torch", "cuda:0", models, precision=None, batch_size=None)
    members = [open_runner(choice, models, member) for member in models.members]
    step = GpuScorer(models, members, batch_size=16, device="cuda:0", graphs=graphs)
    assert check_canaries(models, step) < LIMIT
    timed = step.choose_streams()
    assert timed.gain > 0.9
    step.close()
    if not graphs:
        result = measure_overlap(proof, choice, 16)
        assert result["streams"] >= 2
        assert result["overlapping_share"] > 0


def test_out_of_memory_is_a_one_line_error(engine_process, archive, proof):
    """4,096 images of a batch fit an 80 GB card; what does not is halved once, then said."""
    large = ("--device", "cuda:0", "--batch-size", "4096", "--slots", "16")
    run = engine_process(archive, "-b", proof, "-o", "out", *large, timeout_s=300)
    assert run.returncode in (0, 1)
    if run.returncode:
        assert "is out of memory with batches of 2048" in run.stderr
    assert "Traceback" not in run.stderr


def test_dicom_frames_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Lossless syntaxes: what nvImageCodec decodes differs by DALI's two resizers alone."""
    pytest.importorskip("pydicom")
    from benchmarks.dicom_files import dicom

    samples = smooth(600, 500, seed=1).astype(np.uint16) * 16
    files = {}
    for number, syntax in enumerate(("jpeg2000", "htj2k", "jpeg-sv1", "jpeg-p14")):
        window = {"WindowCenter": 2000, "WindowWidth": 3000} if number % 2 else {}
        data = dicom(samples, syntax, bits=12, **window)
        (tmp_path / f"{number}.dcm").write_bytes(data)
        files[number] = (data, parse_header(data, 1_000_000))
    expected = load_pixels([tmp_path / f"{number}.dcm" for number in files]).pixels
    graph = DicomPipeline(size=(224, 224), batch_size=8, threads=4, device_id=0)
    actual = graph.run(files)
    print("nvImageCodec decodes", actual.decoded, "and refuses", actual.refused)
    assert 0 in actual.decoded, "JPEG 2000"
    assert actual.flags.get(0) == ["window_fallback"]
    pixels = np.asarray(actual.tensors[0].as_cpu())
    difference = np.abs(pixels.astype(int) - expected[actual.decoded])
    assert difference.max() <= 2
