"""The columns that follow from the scores, and operating points that make no sense."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as entropy_of

from engine import bundle as bundles
from engine.calibration import Asked, Sample, calibrate
from engine.errors import UsageError
from engine.records import FLAGS
from engine.triage import DOUBTFUL, REASONS, ZONES, OperatingPoints, Triage, disagreement, entropy, zones
from tests.helpers.bundles import CLASSES, write_bundle
from tests.helpers.tolerances import ROUNDING

FACTS = {
    "data": {
        "sha256": "a" * 64,
        "manifest_sha256": "b" * 64,
        "bundle_sha256": "c" * 64,
        "precision": "fp32",
        "images": 400,
        "by_class": dict.fromkeys(CLASSES, 100),
        "patients": None,
        "left_out": {"corrupt": 3},
    },
    "made": "2031-05-17T06:00:00+00:00",
}


def probabilities(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).dirichlet([0.5] * 3, shape).astype(np.float32)


@pytest.fixture(scope="module")
def calibrated() -> tuple[float, dict[str, Any]]:
    """Temperature and operating points, as engine.calibrate gives them."""
    members, rng = probabilities(2, 400), np.random.default_rng(1)
    labels = (members.mean(axis=0).cumsum(axis=1) < rng.random((400, 1))).sum(axis=1)
    temperature, points = calibrate(
        Sample(members, labels, np.arange(400)), CLASSES, (0.6, 0.4), Asked(target="osteoporosis")
    )
    return temperature, points | FACTS


def triage_of(points: dict[str, Any] | None, temperature: float = 1.0) -> Triage:
    parsed = OperatingPoints.parse(points, CLASSES, ("one", "two"), temperature) if points else None
    return Triage(CLASSES, (0.6, 0.4), {"bone_loss": (1, 2)}, parsed)


def test_entropy_and_disagreement_are_scipys() -> None:
    members = probabilities(3, 200)
    members[:, 0] = [1, 0, 0]
    members[:, 1] = np.eye(3)
    weights = (0.5, 0.2, 0.3)
    assert np.abs(entropy(members[0]) - entropy_of(members[0], base=2, axis=-1)).max() <= 4 * ROUNDING
    pair = members[:2]
    expected = jensenshannon(pair[0], pair[1], base=2, axis=1) ** 2
    assert np.abs(disagreement(pair, (0.5, 0.5)) - expected).max() <= 4 * ROUNDING
    wide = members.astype(np.float64)
    mean = np.einsum("m,mnc->nc", weights, wide)
    by_hand = entropy_of(mean, base=2, axis=-1) - np.einsum(
        "m,mn->n", weights, entropy_of(wide, base=2, axis=-1)
    )
    found = disagreement(members, weights)
    assert found.dtype == np.float32
    assert np.abs(found - by_hand).max() <= 4 * ROUNDING
    assert found[0] == 0
    assert found[1] == pytest.approx(entropy_of(weights, base=2), abs=1e-6)  # nothing in common
    assert not disagreement(members[:1], (1.0,)).any()
    assert disagreement(np.stack([members[0]] * 2), (0.4, 0.6)).min() >= 0


def test_triage_rises_with_the_probability() -> None:
    scores = np.linspace(0, 1, 101, dtype=np.float32)
    found = zones(scores, 0.2, 0.5)
    assert (np.diff(found) >= 0).all()
    assert [ZONES[zone] for zone in found[[19, 20, 50, 51]]] == [
        "rule_out",
        "gray_zone",
        "gray_zone",
        "refer",
    ]
    once = zones(scores, 0.3, 0.3)
    assert (once == 1).sum() == 1  # what equals both


def test_columns(calibrated: tuple[float, dict[str, Any]]) -> None:
    temperature, points = calibrated
    points = copy.deepcopy(points)
    points["abstain"]["distance"] = {"quantile": 0.99, "images": 400, "above": {"one": 1.5, "two": 1.5}}
    triage = triage_of(points, temperature)
    rows = 2000
    members = probabilities(2, rows, seed=2)
    mixed = 0.6 * members[0] + np.float32(0.4) * members[1]
    failed = np.arange(rows) % 7 == 0
    distances = np.full((2, rows), np.nan, np.float32)
    distances[:, :9] = 1.4
    distances[1, 5] = distances[0, 7] = 1.6
    flags = {1: ["first_frame"], 2: ["first_frame", "window_fallback"], 7: ["inverse_lut"], 8: ["burned_in"]}
    table = pa.table(
        triage.columns(mixed, members, distances, flags, failed), schema=pa.schema(triage.fields)
    )
    assert table.schema.names == [
        *("p_bone_loss", "entropy", "member_disagreement"),
        *("triage", "abstain", "abstain_reasons"),
    ]
    assert table.schema.field("abstain").type == pa.bool_()
    assert all(column.null_count == failed.sum() for column in table.columns)
    assert np.allclose(table["p_bone_loss"].to_pylist()[1], mixed[1, 1:].sum())
    limit = points["abstain"]["disagreement"]["above"]
    for row, (score, apart, found) in enumerate(
        zip(mixed[:, 2], disagreement(members, (0.6, 0.4)), table.to_pylist(), strict=True)
    ):
        if failed[row]:
            assert set(found.values()) == {None}
            continue
        low, high = points["rule_out"]["below"], points["refer"]["above"]
        zone = "rule_out" if score < low else "refer" if score > high else "gray_zone"
        reasons = [
            reason
            for reason, is_so in zip(
                REASONS, (zone == "gray_zone", apart > limit, row == 2, row == 5), strict=True
            )
            if is_so
        ]
        assert (found["triage"], found["abstain_reasons"]) == (zone, reasons)
        assert found["abstain"] == bool(reasons)
    assert {len(reasons) for reasons in table["abstain_reasons"].to_pylist() if reasons is not None} >= {
        0,
        1,
        2,
    }


def test_no_operating_points_no_triage() -> None:
    table = pa.table(
        triage_of(None).columns(
            probabilities(9), probabilities(2, 9), np.zeros((2, 9), np.float32), {}, np.zeros(9, np.bool_)
        ),
        schema=pa.schema(triage_of(None).fields),
    )
    assert [column.null_count for column in table.columns] == [0, 0, 0, 9, 9, 9]


def test_a_row_costs_less_than_a_microsecond(calibrated: tuple[float, dict[str, Any]]) -> None:
    """On an idle core about 0.3; a whole GPU part at once. The limit has room for a busy machine."""
    temperature, points = calibrated
    triage, rows = triage_of(points, temperature), 65_536
    members, failed = probabilities(2, rows), np.zeros(rows, np.bool_)
    distances = np.ones((2, rows), np.float32)
    took = []
    for _ in range(5):
        start = time.thread_time()
        triage.columns(members[0], members, distances, {}, failed)
        took.append(time.thread_time() - start)
    assert min(took) / rows < 3e-6


def test_flags_are_those_that_stages_give() -> None:
    """Every word that a stage puts into `flags` is in the list by which a bundle is checked."""
    source = "".join(path.read_text() for path in Path(bundles.__file__).parent.rglob("*.py"))
    assert set(DOUBTFUL) <= set(FLAGS)
    assert all(source.count(f'"{flag}"') >= 2 for flag in FLAGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, calibrated: tuple[float, dict[str, Any]]) -> Path:
    path = write_bundle(tmp_path_factory.mktemp("calibrated") / "bundle")
    temperature, points = calibrated
    loaded = bundles.revise(bundles.load(path), {"temperature": temperature, "operating_points": points})
    assert bundles.load(path) == loaded
    assert loaded.operating_points
    assert loaded.target == loaded.operating_points.target == "osteoporosis"
    return path


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("target", "osteopetrosis", "none of normal, osteopenia"),
        ("target", None, "none of"),
        ("rule_out below", float("nan"), "nan is not a number from 0 to 1"),
        ("rule_out below", float("-inf"), "-inf is not"),
        ("rule_out below", 10**400, "too large"),
        ("rule_out below", -0.1, "-0.1 is not"),
        ("refer above", 1.5, "1.5 is not"),
        ("refer above", "0.5", "'0.5' is not"),
        ("refer above", True, "True is not"),
        ("refer above", 0.0001, "is over refer above 0.0001"),
        ("rule_out interval", [0.5, 0.1], "not in order"),
        ("rule_out interval", 0.5, "not an interval"),
        ("refer on_data sensitivity low", 1.0, "not in order"),
        ("refer on_data sensitivity hits", -1, "not a count"),
        ("refer cross_fitted ppv", {}, "missing or unknown"),
        ("asked sensitivity", float("inf"), "inf is not"),
        ("level", 95, "95 is not"),
        ("crossed", 0, "crossed"),
        ("temperature value", 3.0, "is not the ensemble's"),
        ("temperature nll after", float("nan"), "nan is not"),
        ("zones refer images", 1.5, "not a count"),
        ("abstain disagreement above", float("nan"), "nan is not"),
        ("abstain disagreement above", -1, "-1 is not"),
        ("abstain image_flags", ["blurred"], "'blurred'.*allowed: first_frame"),
        ("abstain image_flags", "inverse_lut", "allowed"),
        ("abstain image_flags", [["x"]], "allowed"),
        ("abstain distance", {"quantile": 0.99, "images": 9, "above": {}}, "'member0', 'member1' missing"),
        ("abstain surprise", 1, "'surprise' missing or unknown"),
        ("data sha256", "no", "sha256"),
        ("data by_class", {"normal": 1}, "missing or unknown"),
        ("data left_out", [1], "left_out"),
        ("data images", "many", "not a count"),
        ("made", "yesterday", "yesterday"),
        ("made", 5, "made"),
    ],
)
def test_operating_points_that_make_no_sense(folder: Path, place: str, value: Any, complaint: str) -> None:
    description = folder / "ensemble.json"
    good = description.read_bytes()
    data = json.loads(good)
    *keys, last = ["operating_points", *place.split()]
    inside = data
    for key in keys:
        inside = inside[key]
    inside[last] = value
    description.write_text(json.dumps(data))
    try:
        with pytest.raises(UsageError, match=complaint) as caught:
            bundles.load(folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(folder))
    finally:
        description.write_bytes(good)


@pytest.mark.parametrize("section", [[], "x", 7, {}, {"target": "normal"}])
def test_half_a_section(folder: Path, section: Any) -> None:
    description = folder / "ensemble.json"
    good = description.read_bytes()
    description.write_text(json.dumps(json.loads(good) | {"operating_points": section}))
    try:
        with pytest.raises(UsageError, match="operating_points"):
            bundles.load(folder)
    finally:
        description.write_bytes(good)


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([], "not classes by name"),
        ({"bone loss": ["normal"]}, "group name 'bone loss'"),
        ({"normal": ["osteopenia"]}, "group name 'normal'"),
        ({"a": []}, r"group a: \[\]"),
        ({"a": ["osteopetrosis"]}, "allowed: some of normal"),
        ({"a": ["normal", "normal"]}, "allowed: some of"),
        ({"a": "normal"}, "allowed: some of"),
    ],
)
def test_groups_that_make_no_sense(folder: Path, groups: Any, complaint: str) -> None:
    description = folder / "ensemble.json"
    good = description.read_bytes()
    description.write_text(json.dumps(json.loads(good) | {"groups": groups}))
    try:
        with pytest.raises(UsageError, match=complaint):
            bundles.load(folder)
    finally:
        description.write_bytes(good)


def test_a_bundle_that_changed_meanwhile_is_left_alone(folder: Path) -> None:
    loaded = bundles.load(folder)
    description = folder / "ensemble.json"
    good = description.read_bytes()
    description.write_bytes(good + b"\n")
    try:
        with pytest.raises(UsageError, match="changed meanwhile"):
            bundles.revise(loaded, {"temperature": 1.0})
        assert description.read_bytes() == good + b"\n"
    finally:
        description.write_bytes(good)
