"""The real members end to end: `engine.run` against a plain PyTorch script, serial against overlapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import engine
from engine.pipeline.load_pixels import load_pixels
from tests.helpers.bundles import CLASSES, REAL_WEIGHTS
from tests.helpers.processes import Command
from tests.helpers.tolerances import PARITY


def plain_pytorch(bundle: Path, paths: list[Path]) -> np.ndarray:
    """What a user would write: torchvision's networks, the trained weights, softmax, weighted average."""
    pixels = torch.from_numpy(load_pixels(paths).pixels)
    images = (pixels.float() / 255).repeat(1, 3, 1, 1)
    total = torch.zeros(len(paths), len(CLASSES))
    for name, weight in REAL_WEIGHTS.items():
        if name == "resnet50":
            model = torchvision.models.resnet50()
        else:
            model = torchvision.models.inception_v3(
                aux_logits=False, transform_input=False, init_weights=False
            )
        model.fc = nn.Sequential(
            nn.Linear(2048, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, len(CLASSES))
        )
        states = load_file(bundle / f"{name}.safetensors")
        model.load_state_dict(
            {key.removeprefix("base.").replace("head.", "fc."): value for key, value in states.items()}
        )
        model.eval()
        with torch.inference_mode():
            total += weight * torch.softmax(model(images), dim=1)
    return total.numpy()


def assert_parity(engine_run: Command, bundle: Path, folder: Path, paths: list[Path]) -> None:
    manifest = folder / "manifest.csv"
    pd.DataFrame({"path": [str(path) for path in paths]}).to_csv(manifest, index=False)
    run = engine_run(manifest, "-b", bundle, "-o", "parity")
    assert run.returncode == 0, run.stderr
    actual = engine.read_results(folder / "parity")
    assert (actual.status == "ok").all()
    scores = actual[[f"p_{name}" for name in CLASSES]].to_numpy()
    expected = plain_pytorch(bundle, paths)
    assert np.abs(scores - expected).max() <= PARITY
    assert expected.std(axis=0).max() > 10 * PARITY, "scores that hardly differ would prove nothing"


def test_the_engine_agrees_with_plain_pytorch(engine_run: Command, real_bundle: Path, archive: Path) -> None:
    assert_parity(engine_run, real_bundle, archive.parent, sorted(archive.iterdir()))


def test_the_engine_agrees_on_real_radiographs(
    engine_run: Command, real_bundle: Path, radiographs: list[Path], tmp_path: Path
) -> None:
    assert_parity(engine_run, real_bundle, tmp_path, [path.resolve() for path in radiographs[::4]])


def test_serial_and_overlapped_are_equal_bit_for_bit(
    engine_run: Command, real_bundle: Path, archive: Path
) -> None:
    tables = []
    for name, options in {"serial": ["--serial"], "overlapped": []}.items():
        run = engine_run(archive, "-b", real_bundle, "-o", name, *options)
        assert run.returncode == 0, run.stderr
        table = pq.read_table(archive.parent / name / "part-00000.parquet")
        tables.append(table.replace_schema_metadata(None))
    assert tables[0].equals(tables[1])
