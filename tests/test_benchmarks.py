"""The benchmarks of the CPU run to their end, on next to nothing."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import run_module
from tests.tolerances import FAST_MEAN


def figures(folder: Path, name: str, *arguments: str | Path) -> dict:
    done = run_module("benchmarks", [*arguments, "-o", folder], folder=folder, timeout_s=120)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{name}.json").read_text())


def test_decode_knows_every_format(tmp_path: Path, bundle: Path) -> None:
    small = ("--width", "96", "--height", "80", "--seconds", "0.01")
    few = ("--rounds", "3", "--images", "2", "-b", bundle)
    written = figures(tmp_path, "decode-cpu", "decode", *small, *few)
    found, fast = written["formats"], written["fast"]
    rates = {name: one["images_per_s_and_core"] for name, one in found.items()}
    assert len([name for name in rates if name.startswith("DICOM")]) == 16
    assert all(one["engine"] > 0 for one in rates.values())
    assert rates["DICOM explicit"]["pydicom"] > 0
    assert rates["DICOM jpeg-sv1"]["pydicom"] is None, "what the engine adds to pydicom is not plain pydicom"
    assert fast["fast_against"]["pillow"]["median"] > 1
    assert 0 < fast["gray_levels_from_exact"]["mean"] <= FAST_MEAN
    assert 0 < fast["scores_from_exact"]["largest_difference_in_probability"] < 0.1


def test_host_cost(tmp_path: Path, bundle: Path) -> None:
    found = figures(tmp_path, "throughput-null-cpu", "throughput", "--null", "--rows", "2000", "-b", bundle)
    assert found
