"""The peers' archive, the check of their rows, and the figures of the contest."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks import archive, processes
from benchmarks.peers import contest, gate
from engine.bundle import bundle as bundles
from tests.helpers.bundles import CLASSES
from tests.helpers.processes import run_module

COLUMNS = [f"p_{name}" for name in CLASSES]


def test_the_archive_has_the_promised_shares() -> None:
    files = archive.plan_files(archive.MIXED, 3003, seed=1)
    corrupt = [file for file in files if file.damage]
    assert [file.row for file in files] == list(range(3003))
    assert Counter(file.damage for file in corrupt) == {"truncated": 1, "empty": 1, "an HTML page": 1}
    assert Counter(file.kind.name for file in files if not file.damage) == {
        "gray 1024 x 1024": 1800,
        "gray 2048 x 1700 to 2500": 600,
        "gray 512 x 512": 300,
        "RGB 4:2:0": 150,
        "gray progressive": 90,
        "gray PNG": 60,
    }
    assert len({file.kind.name for file in files[:100]}) > 3, "they are mixed"
    assert sum(bool(file.damage) for file in archive.plan_files(archive.UNIFORM, 224, seed=1)) == 1


@pytest.mark.parametrize("kind", archive.MIXED, ids=lambda kind: kind.name)
def test_files_have_the_properties_of_their_kind(kind: archive.FileKind) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    data = kind.encoded(archive.vary_picture(np.random.default_rng(1), drawn, kind))
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == {".jpg": "JPEG", ".png": "PNG"}[kind.suffix]
        assert image.mode == ("RGB" if kind.colour else "L")
        assert image.width == kind.width
        assert kind.height[0] <= image.height <= kind.height[1]
        assert bool(image.info.get("progressive")) == kind.progressive
        if image.format == "JPEG":
            quality90 = io.BytesIO()
            Image.new("L", (8, 8)).save(quality90, "JPEG", quality=90)
            assert image.quantization[0] == Image.open(quality90).quantization[0]
        if kind.colour:
            assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)], "4:2:0"


def test_a_seed_gives_the_same_files_and_all_differ(tmp_path: Path) -> None:
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        manifest = archive.make_archive(folder, "mixed", 5, seed=3)
        rows = pd.read_csv(manifest, keep_default_na=False)
        assert (rows["damage"] == "truncated").sum() == 1
        contents.append([(manifest.parent / path).read_bytes() for path in rows["path"]])
    assert contents[0] == contents[1]
    assert len(set(contents[0])) == 5


@pytest.fixture
def reference() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    scores = rng.dirichlet((2, 2, 2), 40).astype(np.float32)
    scores[7] = np.nan
    rows = pd.DataFrame(scores, columns=COLUMNS)
    paths = [f"{row:06}.jpg" for row in range(40)]
    return rows.assign(path=paths, status=np.where(rows[COLUMNS[0]].isna(), "truncated", "ok"))


def why_not(
    rows: pd.DataFrame, reference: pd.DataFrame, limits: gate.AcceptanceLimits = gate.FLOAT32
) -> str | None:
    return gate.judge_rows(rows, reference, corrupt=["000007.jpg"], classes=CLASSES, limits=limits).why_not


def test_correct_rows_count_in_any_order_with_or_without_the_corrupt_row(
    reference: pd.DataFrame,
) -> None:
    near = reference.assign(**{COLUMNS[0]: reference[COLUMNS[0]] + 0.004}).sample(frac=1, random_state=1)
    assert why_not(near, reference) is None
    assert why_not(reference.drop(index=7), reference) is None
    absolute = reference.assign(path="/somewhere/" + reference["path"])
    assert why_not(absolute, reference) is None


def test_wrong_rows_do_not_count(reference: pd.DataFrame) -> None:
    off = reference.copy()
    off.loc[3, COLUMNS[0]] += 0.006
    assert "000003.jpg by 0.006" in (why_not(off, reference) or "")
    shifted = reference.assign(**{name: reference[name].shift(1) for name in COLUMNS})
    shifted.loc[0] = reference.loc[0]
    shifted.loc[7:8, COLUMNS] = reference.loc[7:8, COLUMNS]
    assert "rows differ" in (why_not(shifted, reference) or "")
    neighbour = reference.copy()
    neighbour.loc[7, COLUMNS] = reference.loc[8, COLUMNS]
    assert "corrupt files carry a score" in (why_not(neighbour, reference) or "")
    assert "1 rows are missing" in (why_not(reference.drop(index=5), reference) or "")
    unscored = reference.copy()
    unscored.loc[5, COLUMNS] = np.nan
    assert "have no score" in (why_not(unscored, reference) or "")
    assert "more than one row" in (why_not(pd.concat([reference, reference[:1]]), reference) or "")
    renamed = reference.replace({"path": {"000001.jpg": "other.jpg"}})
    assert "not in the manifest" in (why_not(renamed, reference) or "")
    assert "no rows" in (why_not(pd.DataFrame({"path": []}), reference) or "")


def test_classes_must_agree_unless_nearly_tied(reference: pd.DataFrame) -> None:
    turned = reference.rename(columns=dict(zip(COLUMNS, COLUMNS[1:] + COLUMNS[:1], strict=True)))
    assert "the same class in" in (why_not(turned, reference, gate.INT8) or "")
    tied = reference.copy()
    tied.loc[5, COLUMNS] = [0.4, 0.396, 0.204]
    other = tied.copy()
    other.loc[5, COLUMNS] = [0.396, 0.4, 0.204]
    assert why_not(other, tied) is None


def test_the_score_of_another_file_is_counted(reference: pd.DataFrame) -> None:
    assert contest.count_wrong_rows(reference, ["000007.jpg"], COLUMNS) == {
        "rows_with_anothers_score": 0,
        "sound_rows_lost": 0,
    }
    rows = reference.copy()
    rows.loc[7, COLUMNS] = reference.loc[8, COLUMNS]
    rows.loc[20, COLUMNS] = np.nan
    assert contest.count_wrong_rows(rows, ["000007.jpg"], COLUMNS) == {
        "rows_with_anothers_score": 1,
        "sound_rows_lost": 1,
    }


def test_ratios_are_computed_within_rounds() -> None:
    accepted, refused = gate.Verdict(None, 0.001, 1.0), gate.Verdict("2 rows are off")

    def runs(rates: list[float], verdict: gate.Verdict = accepted) -> list[contest.ContenderRun | str]:
        return [contest.ContenderRun(rate, 1.0, 100.0, verdict) for rate in rates]

    results = {
        "engine": runs([20.0, 10.0, 30.0]),
        "onnx-loop": runs([10.0, 5.0, 20.0]),
        "openvino": [*runs([10.0, 10.0]), *runs([10.0], refused)],
        "spdl": ["failed: no wheel"] * 3,
    }
    figures = contest.contender_figures(results)
    assert figures["onnx-loop"]["engine_beside_it"]["rounds"] == [2.0, 2.0, 1.5]
    assert figures["onnx-loop"]["engine_beside_it"]["median"] == 2.0
    low, high = figures["onnx-loop"]["engine_beside_it"]["interval"]
    assert 1.5 <= low < high <= 2.0
    assert figures["openvino"]["not_counted"] == "2 rows are off"
    assert "engine_beside_it" not in figures["openvino"]
    assert figures["spdl"] == {
        "title": contest.CONTENDERS["spdl"].title,
        "precision": "fp32",
        "not_counted": "failed: no wheel",
    }


def test_a_hanging_command_is_killed_with_its_children() -> None:
    done = processes.run_command(["sh", "-c", "echo begun; sleep 60 & sleep 60"], timeout_s=2)
    assert (done.status, done.output) == (-9, "begun\n")
    assert done.wall_s < 20


@pytest.mark.slow
def test_a_contest_writes_its_json(tmp_path: Path, bundle: Path) -> None:
    small = ["--rows", "6", "--rounds", "1", "--only", "onnx-loop", "-b", str(bundle), "-o", str(tmp_path)]
    done = run_module("benchmarks", ["peers", *small], folder=tmp_path, timeout_s=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "peers-cpu.json").read_text())
    assert figures["work"]["corrupt"] == 1
    assert list(figures["contenders"]) == ["engine", "onnx-loop"]
    for row in figures["contenders"].values():
        assert row["not_counted"] is None
        assert row["images_per_s"]["median"] > 0
        assert row["start_up_s"] > 0
        assert row["peak_memory_mb"] > 50
    assert len(figures["contenders"]["onnx-loop"]["engine_beside_it"]["rounds"]) == 1
    assert {"onnxruntime", "pillow", "numpy"} <= figures["versions"].keys()


def test_contenders_that_are_not_installed_are_left_out(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "_version", lambda name: None if name in ("ray", "openvino") else "1")
    names, left_out = contest.choose_contenders(None, bundles.load_bundle(bundle))
    assert names == ["engine", "torch-loader", "torch-compiled", "onnx-loop", "onnx-prefetch", "spdl"]
    assert left_out == {
        "engine-int8": "the bundle has no INT8 graphs",
        "openvino": "not installed: openvino",
        "ray-data": "not installed: ray",
    }
    assert contest.choose_contenders(["openvino", "spdl"], bundles.load_bundle(bundle))[0] == [
        "engine",
        "spdl",
    ]


def test_an_unknown_contender_is_a_one_line_error(tmp_path: Path) -> None:
    done = run_module("benchmarks", ["peers", "--only", "nobody"], folder=tmp_path, timeout_s=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --only nobody: no such contender; allowed: engine,")
    assert done.stderr.count("\n") == 1
