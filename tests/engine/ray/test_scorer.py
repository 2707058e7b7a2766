"""`EnsembleScorer`: the engine's numbers on the blocks of a dataset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from engine.bundle import bundle as bundles
from engine.core.errors import UsageError
from engine.core.overlap import Meter
from engine.core.records import Part
from engine.core.settings import Limits, Settings
from engine.pipeline.pipeline import screen_in_process
from engine.ray.scorer import EnsembleScorer
from engine.reader.reader import Reader
from engine.scoring import canaries
from tests.helpers.images import encode, smooth
from tests.helpers.nodes import Nodes
from tests.helpers.processes import ROOT
from tests.helpers.runs import table

DATA = """
import json, sys
import ray
from engine.ray import EnsembleScorer
address, bundle, folder = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
rows = ray.data.read_binary_files(folder, include_paths=True).map_batches(
    EnsembleScorer,
    fn_constructor_kwargs={"bundle": bundle, "workers": 1},
    concurrency=1,
    batch_size=16,
    batch_format="numpy",
).take_all()
names = [row["path"].rpartition("/")[2] for row in rows]
print(json.dumps({name: [row["status"], float(row["p_osteopenia"])] for name, row in zip(names, rows)}))
"""


@pytest.fixture
def expected(archive: Path, bundle: Path, tmp_path: Path) -> pd.DataFrame:
    """The results of a run on `archive`, with two damaged files."""
    (archive / "image-03.jpg").write_bytes(b"")
    damaged = archive / "image-06.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    screen_in_process(Settings(manifest=archive, bundle=bundle, output=tmp_path / "out"))
    return table(tmp_path / "out").to_pandas()


def test_a_block_gets_the_scores_of_a_run(archive: Path, bundle: Path, expected: pd.DataFrame) -> None:
    scorer = EnsembleScorer(bundle, workers=1)
    images = np.array([(archive / path).read_bytes() for path in expected.path], object)
    scored = pd.DataFrame(scorer({"bytes": images, "number": np.arange(len(images))}))
    assert scored.number.tolist() == list(range(len(images)))
    for name in ("status", "error", "prediction"):
        assert scored[name].tolist() == expected[name].fillna("").tolist()
    scores = [name for name in expected if "p_" in name]
    scores += ["confidence", "entropy", "member_disagreement"]
    pd.testing.assert_frame_equal(scored[scores], expected[scores], check_exact=True)
    assert scored.triage.tolist() == expected.triage.fillna("").tolist()
    assert scored.abstain.tolist() == [value is True for value in expected.abstain]
    assert scored.abstain_reasons.tolist() == [",".join(names or ()) for names in expected.abstain_reasons]
    assert scored.status[3] == "empty"
    assert scored.status[6] == "truncated"
    scorer.close()


def test_a_block_is_checked_as_files_are(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from benchmarks.dicom_files import dicom

    images = [
        encode(Image.fromarray(smooth(60, 50)), "JPEG"),
        b"",
        b"no image",
        encode(Image.fromarray(smooth(60, 50)), "PNG")[:300],
        encode(Image.fromarray(smooth(200, 200)), "PNG"),  # of too many pixels
        dicom(smooth(90, 80, channels=3), "jpeg2000"),  # with a flag
    ]
    for number, data in enumerate(images):
        (tmp_path / str(number)).write_bytes(data)
    scorer = EnsembleScorer(bundle, workers=1, max_pixels=20_000)
    part = Part(0, np.arange(len(images)), [str(number) for number in range(len(images))], pa.table({}))
    reader = Reader(tmp_path, len(images), 1, limits=Limits(max_pixels=20_000))
    stage = scorer._stages.preprocess.stage
    (of_files,) = stage(reader.stage([part], Meter("read")), Meter("preprocess"))
    (of_block,) = scorer._of_bytes(images)
    assert of_block.status.tolist() == of_files.status.tolist()
    assert of_block.errors == of_files.errors
    assert set(of_files.errors) == {1, 2, 3, 4}
    assert of_block.flags == of_files.flags == {5: ["colour"]}
    assert np.array_equal(of_block.pixels, of_files.pixels)
    scorer.close()


def test_pixels_are_scored_without_preprocessing(bundle: Path) -> None:
    pixels, probabilities = canaries.load_canaries(bundles.load_bundle(bundle))
    scorer = EnsembleScorer(bundle, workers=1)
    scored = scorer({"pixels": pixels})
    names = [name for name in scored if name.startswith("p_") and name != "p_bone_loss"]
    assert np.abs(np.stack([scored[name] for name in names], 1) - probabilities).max() < 1e-5
    assert set(scored["status"]) == {"ok"}
    assert len(scorer({"bytes": np.array([], object)})["status"]) == 0
    with pytest.raises(UsageError, match=r"allowed: uint8 \[N, 1, 64, 64\]"):
        scorer({"pixels": pixels[:, 0]})
    with pytest.raises(UsageError, match="it must have a column bytes or pixels"):
        scorer({"image": pixels})
    scorer.close()


@pytest.mark.slow
def test_in_a_pipeline_of_ray_data(archive: Path, bundle: Path, expected: pd.DataFrame, nodes: Nodes) -> None:
    command = [sys.executable, "-c", DATA, nodes.address, str(bundle), str(archive)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    scored = json.loads(run.stdout.splitlines()[-1])
    assert len(scored) == len(expected)
    for row in expected.itertuples():
        status, score = scored[row.path]
        assert status == row.status
        assert score == pytest.approx(row.p_osteopenia, abs=1e-6, nan_ok=True)
