"""`python -m engine.calibrate`: a bundle with operating points, what runs make of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import engine
import engine.api
from engine.bundle import bundle as bundles
from engine.bundle.operating_points import ZONES
from engine.calibrate import __main__ as calibrate
from engine.merge import merge
from engine.scoring import canaries as scoring_canaries
from engine.scoring.ensemble import apply_temperature, average_members, disagreement
from engine.sink.triage import assign_zones
from tests.helpers.bundles import CLASSES, write_bundle
from tests.helpers.images import write_images
from tests.helpers.processes import Command

NEW = ["p_bone_loss", "entropy", "member_disagreement", "triage", "abstain", "abstain_reasons"]
ROWS, TRUE_TEMPERATURE = 240, 2.0
ODD = {"normal": "Healthy", "osteopenia": " OSTEOPENIA ", "osteoporosis": "os"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of images with labels drawn from what the bundle says of them at half its confidence.

    Three more rows: one without a file, one without a label, one that is damaged.
    """
    folder = write_images(tmp_path_factory.mktemp("labelled") / "images", ROWS)
    bundle = write_bundle(folder.parent / "bundle")
    names = sorted(path.name for path in folder.iterdir())
    pd.DataFrame({"path": names}).to_csv(folder / "first.csv", index=False)
    engine.screen(folder / "first.csv", output=folder.parent / "first", bundle=bundle)
    rows = engine.read_results(folder.parent / "first")
    scores = rows[[f"p_{name}" for name in CLASSES]].to_numpy(np.float32)
    likely = apply_temperature(scores, TRUE_TEMPERATURE)
    drawn = (likely.cumsum(axis=1) < np.random.default_rng(0).random((ROWS, 1))).sum(axis=1)
    labels = [ODD[CLASSES[one]] if row % 3 else CLASSES[one] for row, one in enumerate(drawn)]
    (folder / "broken.jpg").write_bytes((folder / "image-01.jpg").read_bytes()[:-400])
    frame = pd.DataFrame(
        {
            "path": [*names, "gone.png", names[0], "broken.jpg"],
            "label": [*labels, "normal", None, "normal"],
            "person": [f"p{row // 2}" for row in range(ROWS + 3)],
        }
    )
    frame.to_csv(folder / "labelled.csv", index=False)
    return folder / "labelled.csv"


@pytest.fixture
def fresh(labelled: Path, tmp_path: Path) -> Path:
    """The bundle as it was trained."""
    return Path(shutil.copytree(labelled.parents[1] / "bundle", tmp_path / "bundle"))


@pytest.fixture
def run(capfd: Any) -> Callable[..., tuple[int, str, str]]:
    """Exit status, standard output, standard error of engine.calibrate."""

    def called(*arguments: object) -> tuple[int, str, str]:
        status = calibrate.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return called


def section(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / "ensemble.json").read_text())["operating_points"])


def test_a_bundle_is_calibrated_and_runs_use_it(
    engine_run: Command, run: Callable[..., tuple[int, str, str]], labelled: Path, fresh: Path, tmp_path: Path
) -> None:
    before = (fresh / "ensemble.json").read_bytes()
    engine.screen(labelled, output=tmp_path / "before", bundle=fresh, part_rows=100)

    status, shown, log = run(fresh, "--on", labelled, "--dry-run")
    assert status == 0, log
    assert "labels: read Healthy as normal, os as osteoporosis" in log
    assert (fresh / "ensemble.json").read_bytes() == before
    status, out, log = run(fresh, "--on", labelled)
    assert status == 0, log
    assert out == shown
    points = section(fresh)
    models = bundles.load_bundle(fresh)
    assert models.temperature == points["temperature"]["value"] == pytest.approx(TRUE_TEMPERATURE, rel=0.25)
    low, high = points["temperature"]["interval"]
    assert low < TRUE_TEMPERATURE < high
    assert points["data"]["images"] == ROWS
    assert points["data"]["left_out"] == {"missing": 1, "truncated": 1, "unlabelled": 1}
    assert points["data"]["patients"] is None
    assert points["rule_out"]["on_data"]["sensitivity"]["value"] >= 0.9
    assert points["refer"]["on_data"]["specificity"]["value"] >= 0.9
    assert "path" not in json.dumps(points)
    assert [path.name for path in fresh.iterdir() if path.name.startswith(".")] == []
    status, out, _ = run(fresh, "--show")
    assert (status, out) == (0, shown)

    # canaries are compared at the new temperature
    canaries, _ = scoring_canaries.load_canaries(models)
    assert len(canaries) == 12

    # the run that was begun before can't go on, a new one has the columns
    done = engine_run(labelled, "-b", fresh, "-o", "before", "--part-rows", 100)
    assert done.returncode == 2
    assert "bundle_sha256 was" in done.stderr
    done = engine_run(labelled, "-b", fresh, "-o", "after", "--part-rows", 100)
    assert done.returncode == 0, done.stderr
    assert f"triage: {models.operating_points}" in done.stderr
    rows = engine.read_results(tmp_path / "after")
    facts = rows.attrs["provenance"]
    assert (facts["target"], facts["operating_points"]) == ("osteoporosis", points)
    assert facts["groups"] == {"bone_loss": ["osteopenia", "osteoporosis"]}
    ok = rows[rows.status == "ok"]
    assert len(ok) == ROWS + 1
    assert rows.columns.tolist()[-6:] == NEW
    assert rows[rows.status != "ok"][NEW].isna().all(axis=None)
    members = np.stack(
        [ok[[f"member{one}_p_{name}" for name in CLASSES]].to_numpy(np.float32) for one in range(2)]
    )
    likely = apply_temperature(average_members(members, models.weights), models.temperature)
    assert np.array_equal(ok[[f"p_{name}" for name in CLASSES]].to_numpy(), likely)
    zone = assign_zones(likely[:, 2], points["rule_out"]["below"], points["refer"]["above"])
    assert ok.triage.tolist() == [ZONES[one] for one in zone]
    counted = ok[ok.label.fillna("") != ""].triage.value_counts().to_dict()
    assert counted == {name: one["images"] for name, one in points["zones"].items() if one["images"]}
    assert np.array_equal(ok.member_disagreement, disagreement(members, models.weights))
    assert (ok.abstain == ok.abstain_reasons.map(len).gt(0)).all()
    assert ok[ok.triage == "gray_zone"].abstain.all()

    # once more, from the results of either bundle: the same, and not tempered twice
    for results in ("after", "before"):
        status, _, log = run(fresh, "--on", tmp_path / results)
        assert status == 0, log
        again = section(fresh)
        for name in ("rule_out", "refer", "temperature", "zones", "abstain"):
            assert again[name] == points[name]
        assert again["data"]["sha256"] == points["data"]["sha256"]


def test_results_of_a_bundle_without_points(labelled: Path, fresh: Path, tmp_path: Path) -> None:
    """Null, but for what needs none; a bundle without groups has no columns of them."""
    description = fresh / "ensemble.json"
    data = json.loads(description.read_text())
    del data["groups"]
    description.write_text(json.dumps(data))
    engine.screen(labelled, output=tmp_path / "out", bundle=fresh)
    rows = engine.read_results(tmp_path / "out")
    assert "p_bone_loss" not in rows
    assert rows[["triage", "abstain", "abstain_reasons"]].isna().all(axis=None)
    assert rows.entropy.notna().sum() == rows.member_disagreement.notna().sum() == ROWS + 1
    facts = rows.attrs["provenance"]
    assert (facts["target"], facts["groups"], facts["operating_points"]) == ("osteoporosis", {}, None)
    # calibrating gives it the group that training would have
    assert calibrate.main([str(fresh), "--on", str(tmp_path / "out")]) == 0
    assert json.loads(description.read_text())["groups"] == {"bone_loss": ["osteopenia", "osteoporosis"]}


def test_patients_folders_and_options(
    run: Callable[..., tuple[int, str, str]], labelled: Path, fresh: Path, tmp_path: Path
) -> None:
    status, out, log = run(
        fresh,
        "--on",
        labelled,
        "--group-column",
        "person",
        "--sensitivity",
        "0.8",
        "--image-flags",
        "burned_in",
    )
    assert status == 0, log
    points = section(fresh)
    assert points["data"]["patients"] == ROWS // 2
    assert f"images of {ROWS // 2} patients" in out
    assert points["abstain"]["image_flags"] == ["burned_in"]
    assert points["asked"] == {"sensitivity": 0.8, "specificity": 0.9}
    frame = pd.read_csv(labelled)
    for row in frame[frame.label.notna()].itertuples():
        position = tmp_path / "folders" / str(row.label).strip()
        position.mkdir(parents=True, exist_ok=True)
        if (labelled.parent / str(row.path)).exists():
            shutil.copy(labelled.parent / str(row.path), position)
    status, _, log = run(fresh, "--on", tmp_path / "folders", "--sensitivity", "0.8", "--image-flags", "none")
    assert status == 0, log
    assert "labels: the names of the folders" in log
    assert section(fresh)["rule_out"]["below"] == points["rule_out"]["below"]
    assert section(fresh)["abstain"]["image_flags"] == []


def test_what_is_refused(
    run: Callable[..., tuple[int, str, str]], labelled: Path, fresh: Path, tmp_path: Path
) -> None:
    before = (fresh / "ensemble.json").read_bytes()
    frame = pd.read_csv(labelled)

    def refused(complaint: str, *options: object, **columns: object) -> None:
        changed = labelled.parent / "changed.csv"
        frame.assign(**columns).to_csv(changed, index=False)
        status, out, log = run(fresh, *(options or ("--on", changed)))
        assert status == 2, log
        assert out == ""
        (line,) = (line for line in log.splitlines() if line.startswith("error: "))
        assert complaint in line, line
        assert (fresh / "ensemble.json").read_bytes() == before

    refused("0 images of class osteoporosis are too few", label="normal")
    refused("0 images of other classes than osteoporosis", label="OS")
    refused(
        "label 'osteoporos' is not one of normal, osteopenia, osteoporosis; did you mean osteoporosis?",
        label="osteoporos",
    )
    refused("label '7' is not one of", label=7)
    refused("no row has both a score and a label (243 missing)", path="gone.png")
    refused("0 images of class osteoporosis are too few", label="")
    refused("--on is missing: python -m engine.calibrate", "--dry-run")
    refused("no such file", "--on", tmp_path / "gone.csv")
    refused(
        "--label-column klass: there is no such column; allowed: label, person",
        "--on",
        labelled,
        "--label-column",
        "klass",
    )
    refused("--target osteo: allowed: normal", "--on", labelled, "--target", "osteo")
    refused("'1' is not a number between 0.5 and 0.999", "--on", labelled, "--sensitivity", "1")
    refused("too few for a sensitivity of 0.999", "--on", labelled, "--sensitivity", "0.999")
    refused("--image-flags blurred: allowed: first_frame", "--on", labelled, "--image-flags", "blurred")
    refused("no column 'label', and no folder is named normal", "--on", labelled.parent)
    refused("has no operating points; find them with: python -m", "--show")
    other = write_bundle(tmp_path / "other", weights=(0.3, 0.7))
    engine.screen(labelled, output=tmp_path / "out", bundle=other)
    refused("they come from another bundle", "--on", tmp_path / "out")
    (tmp_path / "out" / "_SUCCESS").unlink()
    refused("the run is not finished", "--on", tmp_path / "out")


def test_scores_that_are_no_numbers(
    run: Callable[..., tuple[int, str, str]], labelled: Path, fresh: Path, tmp_path: Path
) -> None:
    engine.screen(labelled, output=tmp_path / "out", bundle=fresh)
    part = tmp_path / "out" / "part-00000.parquet"
    table = pq.read_table(part)
    position = table.schema.names.index("member1_p_normal")
    values = table.column(position).to_numpy().copy()
    values[3] = np.nan
    pq.write_table(table.set_column(position, table.schema.field(position), [values]), part)
    status, _, log = run(fresh, "--on", tmp_path / "out")
    assert status == 2
    assert "row 3: its scores are not finite numbers" in log


@pytest.mark.slow
def test_runs_of_older_versions_go_on_without_the_columns(
    labelled: Path, fresh: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    options = engine.api.Options(bundle=fresh, part_rows=100)
    engine.screen(labelled, output=older, **options)
    as_by_an_older_version(older)
    (older / "part-00001.parquet").unlink()
    (older / "_SUCCESS").unlink()
    summary = engine.screen(labelled, output=older, **options)
    assert summary.rows_done == 100
    rows = engine.read_results(older)
    assert "entropy" not in rows
    assert rows.status.value_counts().to_dict() == {"ok": ROWS + 1, "missing": 1, "truncated": 1}
    with found_again(labelled):
        engine.screen(older, only_errors=True)
    rows = engine.read_results(older)
    assert rows.status.value_counts().to_dict() == {"ok": ROWS + 2, "truncated": 1}
    assert "entropy" not in rows
    assert calibrate.main([str(fresh), "--on", str(older), "--dry-run"]) == 0

    engine.screen(labelled, output=tmp_path / "newer", **options)
    merge([older, tmp_path / "newer"], tmp_path / "merged")
    merged = engine.read_results(tmp_path / "merged")
    assert merged.entropy.isna().sum() == 2  # what only the older run has scored, and what failed in both


def as_by_an_older_version(results: Path) -> None:
    """Without the columns, and without their mention in `_run.json`."""
    file = results / "_run.json"
    run = json.loads(file.read_text())
    for name in ("target", "groups", "operating_points"):
        del run[name]
    file.write_text(json.dumps(run))
    for part in results.glob("part-*"):
        table = pq.read_table(part)
        pq.write_table(table.drop_columns(NEW), part)


@contextmanager
def found_again(labelled: Path) -> Iterator[None]:
    """The file that is missing."""
    position = labelled.parent / "gone.png"
    shutil.copy(labelled.parent / "image-00.png", position)
    try:
        yield
    finally:
        position.unlink()


def test_failed_rows_get_the_columns_in_a_retry(labelled: Path, fresh: Path, tmp_path: Path) -> None:
    assert calibrate.main([str(fresh), "--on", str(labelled)]) == 0
    engine.screen(labelled, output=tmp_path / "out", bundle=fresh, part_rows=100)
    before = engine.read_results(tmp_path / "out")
    with found_again(labelled):
        engine.screen(tmp_path / "out", only_errors=True)
    after = engine.read_results(tmp_path / "out")
    assert after.columns.tolist() == before.columns.tolist()
    assert after.triage.notna().sum() == before.triage.notna().sum() + 1
    assert after.triage[ROWS] == before.triage[0]  # the same picture
