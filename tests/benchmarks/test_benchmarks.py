"""The benchmarks of the CPU run on small inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling import fit_line
from benchmarks.scaling_out import uniform_bundle
from engine.bundle import bundle as bundles
from engine.scoring import canaries
from tests.helpers.processes import run_module
from tests.helpers.tolerances import FAST_MEAN


def figures(folder: Path, name: str, *arguments: str | Path) -> dict:
    done = run_module("benchmarks", [*arguments, "-o", folder], folder=folder, timeout_s=120)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_decode_measures_every_format(tmp_path: Path, bundle: Path) -> None:
    small = ("--width", "96", "--height", "80", "--seconds", "0.01")
    few = ("--rounds", "3", "--images", "2", "-b", bundle)
    written = figures(tmp_path, "decode-cpu", "decode", *small, *few)
    formats, fast = written["formats"], written["fast"]
    rates = {name: figure["images_per_s_and_core"] for name, figure in formats.items()}
    assert len([name for name in rates if name.startswith("DICOM")]) == 16
    assert all(rate["engine"] > 0 for rate in rates.values())
    assert rates["DICOM explicit"]["pydicom"] > 0
    assert rates["DICOM jpeg-sv1"]["pydicom"] is None, "pydicom without the decoders of the engine"
    assert fast["fast_against"]["pillow"]["median"] > 1
    assert 0 < fast["gray_levels_from_exact"]["mean"] <= FAST_MEAN
    assert 0 < fast["scores_from_exact"]["largest_difference_in_probability"] < 0.1


@pytest.mark.slow
def test_scaling_fits_lines_and_draws_them(tmp_path: Path, bundle: Path) -> None:
    quick = ("--quick", "--series", "rows", "bad_files")
    record = figures(tmp_path, "scaling-cpu", "scaling", *quick, "-b", bundle)["series"]
    assert [point["x"] for point in record["rows"]["points"]] == [1000, 10_000]
    assert record["rows"]["line"] is None, "two points always fit a line"
    assert len(record["bad_files"]["points"]) == 5
    assert record["bad_files"]["line"]["r2"] <= 1
    assert "<svg" in (tmp_path / "scaling-cpu.svg").read_text()


def test_fit_line() -> None:
    line = fit_line([(x, 3 + 2 * x) for x in (5, 1, 2)])
    assert line == pytest.approx({"slope": 2, "intercept": 3, "r2": 1})
    bent = fit_line([(x, x**2) for x in range(10)])
    assert bent is not None
    assert bent["r2"] < 0.95


@pytest.mark.slow
def test_a_kill_costs_at_most_the_open_parts(tmp_path: Path, bundle: Path) -> None:
    small = ("--rows", "3000", "--part-rows", "256", "--rounds", "1", "--side", "64")
    record = figures(tmp_path, "restart-cpu", "restart", *small, "-b", bundle)
    (kill,) = record["kills"]
    assert 0 < record["first_batch_s"]["median"] < 60
    assert 600 <= kill["scored_before_the_kill"] < 3000
    assert kill["rows_kept"] + kill["rows_after_it"] == 3000
    assert 0 <= kill["rows_scored_twice"] <= 2 * 256, "one part open, and at most the start of the next"


def test_host_cost(tmp_path: Path, bundle: Path) -> None:
    record = figures(tmp_path, "throughput-null-cpu", "throughput", "--null", "--rows", "2000", "-b", bundle)
    assert record


def test_null_stages_pass_the_canaries_of_their_bundle(tmp_path: Path, bundle: Path) -> None:
    uniform = bundles.load_bundle(uniform_bundle(bundle, tmp_path / "bundle"))
    _, expected = canaries.load_canaries(uniform)
    assert np.abs(expected - 1 / 3).max() < 1e-6
    assert uniform.members[0].files == bundles.load_bundle(tmp_path / "bundle").members[0].files
    assert bundles.load_bundle(bundle).sha256 != uniform.sha256
