"""The columns that follow from the scores, and operating points that make no sense."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from msgspec.structs import replace
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as entropy_of

from engine.bundle import bundle as bundles
from engine.bundle.operating_points import DOUBTFUL, ZONES, DistanceLimits, LabelledData, OperatingPoints
from engine.calibrate.thresholds import CalibrationOptions, LabelledScores, calibrate
from engine.core.errors import UsageError
from engine.core.records import FLAGS
from engine.scoring.ensemble import disagreement, entropy
from engine.sink.triage import ABSTAIN_REASONS, Triage, assign_zones
from tests.helpers.bundles import CLASSES, write_bundle
from tests.helpers.tolerances import ROUNDING

DATA = LabelledData(
    sha256="a" * 64,
    manifest_sha256="b" * 64,
    bundle_sha256="c" * 64,
    precision="fp32",
    images=400,
    by_class=dict.fromkeys(CLASSES, 100),
    patients=None,
    left_out={"corrupt": 3},
)


def probabilities(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).dirichlet([0.5] * 3, shape).astype(np.float32)


@pytest.fixture(scope="module")
def points() -> OperatingPoints:
    """As engine.calibrate finds them."""
    members, rng = probabilities(2, 400), np.random.default_rng(1)
    labels = (members.mean(axis=0).cumsum(axis=1) < rng.random((400, 1))).sum(axis=1)
    sample = LabelledScores(members, labels, np.arange(400))
    return calibrate(sample, CLASSES, (0.6, 0.4), CalibrationOptions(target="osteoporosis"), DATA)


def triage_of(points: OperatingPoints | None) -> Triage:
    limits = tuple(points.distances.values()) if points else ()
    return Triage(CLASSES, (0.6, 0.4), {"bone_loss": (1, 2)}, points, limits)


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
    actual = disagreement(members, weights)
    assert actual.dtype == np.float32
    assert np.abs(actual - by_hand).max() <= 4 * ROUNDING
    assert actual[0] == 0
    assert actual[1] == pytest.approx(entropy_of(weights, base=2), abs=1e-6)  # nothing in common
    assert not disagreement(members[:1], (1.0,)).any()
    assert disagreement(np.stack([members[0]] * 2), (0.4, 0.6)).min() >= 0


def test_triage_rises_with_the_probability() -> None:
    scores = np.linspace(0, 1, 101, dtype=np.float32)
    result = assign_zones(scores, 0.2, 0.5)
    assert (np.diff(result) >= 0).all()
    assert [ZONES[zone] for zone in result[[19, 20, 50, 51]]] == [
        "rule_out",
        "gray_zone",
        "gray_zone",
        "refer",
    ]
    once = assign_zones(scores, 0.3, 0.3)
    assert (once == 1).sum() == 1  # what equals both


def test_columns(points: OperatingPoints) -> None:
    far = DistanceLimits(quantile=0.99, images=400, above={"one": 1.5, "two": 1.5})
    triage = triage_of(replace(points, abstain=replace(points.abstain, distance=far)))
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
    limit = points.abstain.disagreement.above
    assert limit is not None
    for row, (score, apart, result) in enumerate(
        zip(mixed[:, 2], disagreement(members, (0.6, 0.4)), table.to_pylist(), strict=True)
    ):
        if failed[row]:
            assert set(result.values()) == {None}
            continue
        low, high = points.rule_out.below, points.refer.above
        zone = "rule_out" if score < low else "refer" if score > high else "gray_zone"
        reasons = [
            reason
            for reason, is_so in zip(
                ABSTAIN_REASONS, (zone == "gray_zone", apart > limit, row == 2, row == 5), strict=True
            )
            if is_so
        ]
        assert (result["triage"], result["abstain_reasons"]) == (zone, reasons)
        assert result["abstain"] == bool(reasons)
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


def test_a_row_costs_less_than_a_microsecond(points: OperatingPoints) -> None:
    """On an idle core about 0.3; a whole GPU part at once. The limit has room for a busy machine."""
    triage, rows = triage_of(points), 65_536
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
    source = "".join(path.read_text() for path in Path(bundles.__file__).parents[1].rglob("*.py"))
    assert set(DOUBTFUL) <= set(FLAGS)
    assert all(source.count(f'"{flag}"') >= 2 for flag in FLAGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, points: OperatingPoints) -> Path:
    path = write_bundle(tmp_path_factory.mktemp("calibrated") / "bundle")
    loaded = bundles.update_bundle(bundles.load_bundle(path), points)
    assert bundles.load_bundle(path) == loaded
    assert loaded.operating_points == points
    assert loaded.temperature == points.temperature.value
    assert loaded.target == loaded.operating_points.target == "osteoporosis"
    return path


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("target", "osteopetrosis", "target 'osteopetrosis' is not one of normal, osteopenia"),
        ("target", None, "target is null: expected a text"),
        ("rule_out below", float("nan"), "rule_out.below is NaN: expected a finite number"),
        ("rule_out below", float("-inf"), "rule_out.below is -Infinity: expected a finite number"),
        ("rule_out below", 10**400, "rule_out.below is 1000.*out of range"),
        pytest.param("rule_out below", 10**5000, "4300 digits", id="digits without end"),
        ("rule_out below", -0.1, "rule_out.below is -0.1: expected a number >= 0"),
        ("refer above", 1.5, "refer.above is 1.5: expected a number <= 1"),
        ("refer above", "0.5", 'refer.above is "0.5": expected a number'),
        ("refer above", True, "refer.above is true: expected a number"),
        ("refer above", 0.0001, "is over refer.above 0.0001"),
        ("rule_out interval", [0.5, 0.1], r"rule_out: interval \[0.5, 0.1\] is not in order"),
        ("rule_out interval", 0.5, "rule_out.interval is 0.5: expected a list"),
        ("refer on_data sensitivity low", 1.0, "refer.on_data.sensitivity: low, value, high .* not in order"),
        (
            "refer on_data sensitivity low",
            None,
            "low, value and high must be numbers if of is not 0, else null",
        ),
        ("refer on_data sensitivity of", 0, "low, value and high must be numbers if of is not 0, else null"),
        ("refer on_data sensitivity hits", -1, "sensitivity.hits is -1: expected a whole number >= 0"),
        ("refer cross_fitted ppv", {}, "refer.cross_fitted.ppv.hits is missing"),
        ("asked sensitivity", float("inf"), "asked.sensitivity is Infinity"),
        ("level", 95, "level is 95: expected a number <= 1"),
        ("crossed", 0, "crossed is 0: expected true or false"),
        ("temperature value", 3.0, "is not the ensemble's"),
        ("temperature interval", [2.0, 1.0], "temperature: interval .* is not in order"),
        ("temperature nll after", float("nan"), "temperature.nll.after is NaN"),
        ("zones refer images", 1.5, "zones.refer.images is 1.5: expected a whole number"),
        ("abstain disagreement above", float("nan"), "abstain.disagreement.above is NaN"),
        ("abstain disagreement above", -1, "abstain.disagreement.above is -1: expected a number >= 0"),
        ("abstain image_flags", ["blurred"], "'blurred'.*allowed, each once: first_frame"),
        ("abstain image_flags", ["colour", "colour"], "allowed, each once"),
        ("abstain image_flags", "inverse_lut", 'image_flags is "inverse_lut": expected a list'),
        ("abstain image_flags", [["x"]], r'image_flags\[0\] is \["x"\]: expected a text'),
        ("abstain distance", {"quantile": 0.99, "images": 9, "above": {}}, "'member0', 'member1' missing"),
        ("abstain surprise", 1, "abstain.surprise: unknown field"),
        ("data sha256", "no", 'data.sha256 is "no": expected 64 digits of 0-9 and a-f'),
        ("data by_class", {"normal": 1}, "data.by_class: 'osteopenia', 'osteoporosis' missing or unknown"),
        ("data left_out", [1], r"data.left_out is \[1\]: expected an object"),
        ("data left_out", {"corrupt": -1}, "data.left_out.corrupt is -1: expected a whole number >= 0"),
        ("data images", "many", 'data.images is "many": expected a whole number'),
        ("made", "yesterday", "made 'yesterday' is not a date and time"),
        ("made", 5, "made is 5: expected a text"),
    ],
)
def test_invalid_operating_points(folder: Path, place: str, value: Any, complaint: str) -> None:
    description = folder / "ensemble.json"
    good = description.read_bytes()
    data = json.loads(good)
    *keys, last = ["operating_points", *place.split()]
    inside = data
    for key in keys:
        inside = inside[key]
    inside[last] = value
    with without_limit_of_digits():
        description.write_text(json.dumps(data))
    try:
        with pytest.raises(UsageError, match=complaint) as caught:
            bundles.load_bundle(folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(folder))
    finally:
        description.write_bytes(good)


@contextmanager
def without_limit_of_digits() -> Iterator[None]:
    """Let numbers be written that Python refuses to read."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize("section", [[], "x", 7, {}, {"target": "normal"}])
def test_half_a_section(folder: Path, section: Any) -> None:
    description = folder / "ensemble.json"
    good = description.read_bytes()
    description.write_text(json.dumps(json.loads(good) | {"operating_points": section}))
    try:
        with pytest.raises(UsageError, match="operating_points"):
            bundles.load_bundle(folder)
    finally:
        description.write_bytes(good)


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([], r"groups is \[\]: expected an object"),
        ({"bone loss": ["normal"]}, 'groups: key "bone loss": expected a name of a-z, 0-9 and _'),
        ({"normal": ["osteopenia"]}, "group normal has the name of a class"),
        ({"a": []}, r"group a: \[\]"),
        ({"a": ["osteopetrosis"]}, "allowed: some of normal"),
        ({"a": ["normal", "normal"]}, "allowed: some of"),
        ({"a": "normal"}, 'groups.a is "normal": expected a list'),
    ],
)
def test_invalid_groups(folder: Path, groups: Any, complaint: str) -> None:
    description = folder / "ensemble.json"
    good = description.read_bytes()
    description.write_text(json.dumps(json.loads(good) | {"groups": groups}))
    try:
        with pytest.raises(UsageError, match=complaint):
            bundles.load_bundle(folder)
    finally:
        description.write_bytes(good)


def test_a_bundle_that_changed_meanwhile_is_left_alone(folder: Path, points: OperatingPoints) -> None:
    loaded = bundles.load_bundle(folder)
    description = folder / "ensemble.json"
    good = description.read_bytes()
    description.write_bytes(good + b"\n")
    try:
        with pytest.raises(UsageError, match="changed meanwhile"):
            bundles.update_bundle(loaded, points)
        assert description.read_bytes() == good + b"\n"
    finally:
        description.write_bytes(good)
