"""Temperature, thresholds and their intervals, against the generator's true posteriors and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from engine.bundle.operating_points import LabelledData, OperatingPoints
from engine.calibrate.thresholds import (
    FOLDS,
    CalibrationOptions,
    LabelledScores,
    calibrate,
    fit_temperature,
    fit_thresholds,
    min_images,
    split_folds,
)
from engine.core.errors import UsageError
from engine.scoring.ensemble import apply_temperature
from engine.stats.intervals import proportion
from training.synthetic import CLASSES, Recipe, posterior

NOISE_SD = 0.8  # T-score; far more than images have, so that the classes overlap
ASKED = CalibrationOptions(target="osteoporosis")
TARGET = CLASSES.index("osteoporosis")
Array = np.ndarray[Any, Any]


def truth(count: int, seed: int) -> tuple[Array, Array]:
    """P(class | image) [N, C] of the generator, and classes [N] drawn by it."""
    rng = np.random.default_rng(seed)
    t_score = rng.normal(Recipe.t_mean, Recipe.t_sd, count)
    surrogate = t_score + rng.normal(0, NOISE_SD, count)
    # the closed form takes arrays
    likely = posterior(surrogate, NOISE_SD).T  # type: ignore[arg-type]
    return likely, (likely.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)


def said(likely: Array, confidence: float) -> Array:
    """What a model says whose confidence is not right: over 1, too sure. Float32 [N, C]."""
    return apply_temperature(likely.astype(np.float32), 1 / confidence)


def sample_of(likely: Array, labels: Array, groups: Array | None = None) -> LabelledScores:
    """Two members that agree."""
    return LabelledScores(
        np.stack([likely, likely]), labels, np.arange(len(labels)) if groups is None else groups
    )


def points_of(sample: LabelledScores, asked: CalibrationOptions = ASKED) -> OperatingPoints:
    data = LabelledData(
        sha256="a" * 64,
        manifest_sha256=None,
        bundle_sha256="b" * 64,
        precision="fp32",
        images=len(sample.labels),
        by_class={},
        patients=None,
        left_out={},
    )
    return calibrate(sample, CLASSES, (0.5, 0.5), asked, data)


@pytest.mark.parametrize("confidence", [0.5, 1.0, 3.0])
def test_the_temperature_corrects_wrong_confidence(confidence: float) -> None:
    likely, labels = truth(20_000, 0)
    sure = said(likely, confidence)
    result = fit_temperature(sure, labels)
    assert result == pytest.approx(confidence, rel=0.05)
    assert np.abs(apply_temperature(sure, result) - likely).mean() < 0.01


def test_a_temperature_never_makes_the_likelihood_worse() -> None:
    labels = np.array([0, 1, 2] * 20)
    right, wrong = np.eye(3, dtype=np.float32)[labels], np.eye(3, dtype=np.float32)[(labels + 1) % 3]
    mixed = (0.6 * right + 0.3 * wrong + 0.1 / 3).astype(np.float32)
    result = fit_temperature(mixed, labels)
    before, after = (apply_temperature(mixed, one)[np.arange(60), labels] for one in (1.0, result))
    assert np.log(after).mean() > np.log(before).mean()


@pytest.mark.slow
def test_guarantees_hold_on_new_images() -> None:
    """300 of an over-confident model's images calibrate, 50,000 others judge; 40 times."""
    fresh, fresh_labels = truth(50_000, 1)
    sure = said(fresh, 2.0)
    positive = fresh_labels == TARGET
    covered = {"rule_out": 0, "refer": 0, "threshold": 0, "temperature": 0}
    kept: list[float] = []
    optimistic, honest = [], []
    for seed in range(40):
        likely, labels = truth(300, 100 + seed)
        points = points_of(sample_of(said(likely, 2.0), labels))
        temperature = points.temperature
        scores = apply_temperature(sure, temperature.value)[:, TARGET]
        low, high = points.rule_out.below, points.refer.above
        on_data = points.rule_out.on_data.sensitivity
        true = float((scores[positive] >= low).mean())
        kept.append(true)
        optimistic.append(on_data.value)
        honest.append(points.rule_out.cross_fitted.sensitivity.value)
        specific = points.refer.on_data.specificity
        covered["rule_out"] += on_data.low <= true <= on_data.high
        covered["refer"] += specific.low <= (scores[~positive] <= high).mean() <= specific.high
        ideal = np.quantile(scores[positive], 0.1)
        covered["threshold"] += points.rule_out.interval[0] <= ideal <= points.rule_out.interval[1]
        covered["temperature"] += temperature.interval[0] <= 2.0 <= temperature.interval[1]
        assert min(optimistic) >= 0.9
    assert min(covered.values()) >= 35, covered  # 38 on average
    assert np.mean(kept) == pytest.approx(0.9, abs=0.015)
    # the estimate on the data is too good, the cross-fitted one is not
    assert np.mean(honest) == pytest.approx(np.mean(kept), abs=0.015)
    assert np.mean(optimistic) > np.mean(kept)


def test_thresholds_are_the_widest_that_meet_the_shares() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        scores = rng.integers(0, 12, 80).astype(np.float32) / 16  # ties
        positive = rng.random(80) < 0.2 + 0.6 * scores
        asked = CalibrationOptions(
            target="", sensitivity=rng.uniform(0.6, 0.99), specificity=rng.uniform(0.6, 0.99)
        )
        low, high, crossed = fit_thresholds(scores, positive, asked)
        keeps = [one for one in np.unique(scores) if (scores[positive] >= one).mean() >= asked.sensitivity]
        tells = [one for one in np.unique(scores) if (scores[~positive] <= one).mean() >= asked.specificity]
        assert crossed == (max(keeps) > min(tells))
        if not crossed:
            assert (low, high) == (max(keeps), min(tells))
        else:
            assert low == high == (max(keeps) + min(tells)) / 2
        assert (scores[positive] >= low).mean() >= asked.sensitivity
        assert (scores[~positive] <= high).mean() >= asked.specificity


def test_nine_of_ten_are_90_percent() -> None:
    """(1 - 0.9) * 10 is a little less than 1: one of ten may be below the threshold, and one above."""
    scores = np.arange(20, dtype=np.float32) / 20
    ends = fit_thresholds(scores, scores >= 0.5, CalibrationOptions(target=""))
    assert ends == (pytest.approx((0.55 + 0.40) / 2), pytest.approx((0.55 + 0.40) / 2), True)


def test_shares_have_exact_intervals() -> None:
    for hits in (0, 1, 17, 39, 40):
        result = proportion(np.arange(40) < hits, np.arange(40))
        wanted = binomtest(hits, 40).proportion_ci(0.95, "exact")
        assert (result.low, result.high) == pytest.approx((wanted.low, wanted.high))
        assert (result.hits, result.of, result.value) == (hits, 40, hits / 40)
    nothing = proportion(np.zeros(0, np.bool_), np.zeros(0, np.int64))
    assert (nothing.value, nothing.low, nothing.high) == (None, None, None)


def test_images_of_one_patient_count_once() -> None:
    """Every image four times, as its patient's: intervals are those of the images alone."""
    hits = np.random.default_rng(0).random(60) < 0.8
    alone, copied = (
        proportion(hits, np.arange(60)),
        proportion(np.repeat(hits, 4), np.repeat(np.arange(60), 4)),
    )
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=0.005)
    all_right = proportion(np.ones(240, np.bool_), np.repeat(np.arange(60), 4))
    assert all_right.low == pytest.approx(binomtest(60, 60).proportion_ci(0.95, "exact").low)


def test_patients_are_in_one_fold_and_widen_the_intervals() -> None:
    likely, labels = truth(200, 7)
    alone = points_of(sample_of(said(likely, 1.0), labels))
    likely, labels = np.repeat(likely, 3, axis=0), np.repeat(labels, 3)
    groups = np.repeat(np.arange(200), 3)
    for held in split_folds(labels == TARGET, groups, 0):
        assert np.isin(groups[held], groups[~held]).sum() == 0
        assert len(labels) / FOLDS * 0.7 < held.sum() < len(labels) / FOLDS * 1.3
    grouped = points_of(sample_of(said(likely, 1.0), labels, groups))
    assert grouped.rule_out.below == alone.rule_out.below
    assert grouped.rule_out.interval == pytest.approx(alone.rule_out.interval, abs=0.02)
    assert grouped.temperature.interval == pytest.approx(alone.temperature.interval, rel=0.1)


def test_perfectly_separated_classes() -> None:
    labels = np.array([0, 1, 2] * 40)
    sure = (0.9 * np.eye(3)[labels] + 0.1 / 3).astype(np.float32)
    points = points_of(sample_of(sure, labels))
    assert points.temperature.value == 1.0
    assert points.temperature.interval is None
    assert points.crossed
    assert points.rule_out.below == points.refer.above == pytest.approx((0.9 + 0.2 / 3) / 2)
    assert points.zones.gray_zone.images == 0


def test_too_few_images_are_refused() -> None:
    assert (min_images(0.9), min_images(0.95), min_images(0.5)) == (29, 59, 5)
    likely, labels = truth(400, 3)
    few = np.flatnonzero(labels == TARGET)[:28]
    chosen = np.concatenate([few, np.flatnonzero(labels != TARGET)])
    with pytest.raises(UsageError, match=r"28 images of class osteoporosis .* at least 29, or lower"):
        points_of(sample_of(said(likely[chosen], 1.0), labels[chosen]))
    only = labels == TARGET
    with pytest.raises(UsageError, match="0 images of other classes than osteoporosis"):
        points_of(sample_of(said(likely[only], 1.0), labels[only]))
    with pytest.raises(UsageError, match="4 patients with images of class osteoporosis"):
        points_of(sample_of(said(likely, 1.0), labels, np.arange(400) % 4))
