"""Figures of merit: against scikit-learn, by hand, and where they are undefined."""

import json
import math
import time

import numpy as np
import pytest
from sklearn import metrics as library

from engine.stats import classification, intervals
from engine.stats import metrics as evaluate
from engine.stats.intervals import cluster_bootstrap
from training import weight_search

CLASSES = ("normal", "osteopenia", "osteoporosis")


def voter(labels: np.ndarray, *, classes: int = 3, skill: float = 1.5, seed: int = 0) -> np.ndarray:
    """Probabilities [N, C] of a voter that is often right; rounded, so that scores tie."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(len(labels), classes)) + skill * np.eye(classes)[labels]
    likely = np.exp(scores.round(1))
    return (likely / likely.sum(axis=1, keepdims=True)).astype(np.float32)


def some_labels(count: int, *, classes: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(classes, size=count)


def judge(probabilities, labels, *, classes=CLASSES, groups=None, **options):
    groups = np.arange(len(labels)) if groups is None else groups
    return evaluate.evaluate(
        probabilities, labels, classes=classes, groups=groups, **{"seed": 0, "resamples": 200, **options}
    )


def width(interval: dict) -> float:
    return interval["high"] - interval["low"]


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_metrics_equal_scikit_learn(classes):
    labels = some_labels(300, classes=classes)
    probabilities = voter(labels, classes=classes)
    predictions = probabilities.argmax(axis=1)
    names = [f"grade {one}" for one in range(classes)]
    result = judge(probabilities, labels, classes=names)
    scores = probabilities if classes > 2 else probabilities[:, 1]
    averaged = {"average": "macro", "zero_division": 0}
    wanted = {
        "accuracy": library.accuracy_score(labels, predictions),
        "macro_precision": library.precision_score(labels, predictions, **averaged),
        "macro_recall": library.recall_score(labels, predictions, **averaged),
        "macro_f1": library.f1_score(labels, predictions, **averaged),
        "auc": library.roc_auc_score(labels, scores, multi_class="ovr"),
        "balanced_accuracy": library.balanced_accuracy_score(labels, predictions),
        "kappa": library.cohen_kappa_score(labels, predictions, weights="quadratic"),
    }
    assert {name: result[name]["value"] for name in wanted} == pytest.approx(wanted)
    assert result["confusion"] == library.confusion_matrix(labels, predictions).tolist()
    for one, name in enumerate(names):
        mine = result["per_class"][name]
        against_rest = library.confusion_matrix(labels == one, predictions == one)
        assert mine["images"] == (labels == one).sum()
        assert mine["sensitivity"]["value"] == against_rest[1, 1] / against_rest[1].sum()
        assert mine["specificity"]["value"] == against_rest[0, 0] / against_rest[0].sum()
        assert mine["precision"] == library.precision_score(labels == one, predictions == one)
        assert mine["f1"] == pytest.approx(library.f1_score(labels == one, predictions == one))
        assert mine["auc"] == library.roc_auc_score(labels == one, probabilities[:, one])


def test_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    predictions = np.array([0, 0, 1, 1, 2, 2])
    result = judge(np.full((6, 3), 0.1) + 0.7 * np.eye(3)[predictions], labels)
    assert result["images"] == 6
    assert result["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert result["accuracy"]["value"] == pytest.approx(4 / 6)
    assert result["macro_recall"]["value"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert result["macro_precision"]["value"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert result["per_class"]["normal"]["specificity"]["value"] == 1
    assert result["per_class"]["osteopenia"]["specificity"]["value"] == 3 / 4
    # two errors by one grade each; by chance (3 (2 + 8) + 2 (2 + 2) + 1 (8 + 2)) / 6 squared grades
    assert result["kappa"]["value"] == pytest.approx(1 - 2 / (48 / 6))
    assert result["nll"] == pytest.approx(-(4 * math.log(0.8) + 2 * math.log(0.1)) / 6)
    right, wrong = 0.2**2 + 2 * 0.1**2, 0.8**2 + 0.9**2 + 0.1**2
    assert result["brier"] == pytest.approx((4 * right + 2 * wrong) / 6)
    assert result["ece"]["value"] == pytest.approx(0.8 - 4 / 6)
    assert result["reliability"] == [
        {"confidence": pytest.approx(0.8), "accuracy": pytest.approx(4 / 6), "count": 6}
    ]


def test_it_agrees_with_the_rest_of_training():
    labels = some_labels(200)
    logits = np.log(voter(labels)) * 40  # so sure that likelihoods have to be clipped
    candidate = weight_search.evaluate_candidate(logits[None], labels, (1.0,))
    likely = np.exp(logits - logits.max(axis=1, keepdims=True))
    likely = (likely / likely.sum(axis=1, keepdims=True)).astype(np.float32)
    result = judge(likely, labels)
    assert result["nll"] == pytest.approx(candidate.nll, rel=1e-4)
    assert result["accuracy"]["value"] == pytest.approx(candidate.accuracy)
    assert result["macro_f1"]["value"] == pytest.approx(
        classification.macro_f1(labels, likely.argmax(axis=1), classes=3)
    )


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_each_resample_equals_scikit_learn(classes):
    labels = some_labels(60, classes=classes)
    probabilities = voter(labels, classes=classes)
    groups = np.arange(60) // 2
    names = [str(one) for one in range(classes)]
    drawn = evaluate._bootstrap_metrics(probabilities, labels, groups, seed=3, resamples=25)
    times = np.concatenate(list(cluster_bootstrap(groups, seed=3, resamples=25))).astype(int)
    assert len(times) == 25
    for position, chosen in enumerate(times):
        again = np.repeat(np.arange(60), chosen)
        wanted = evaluate.point_metrics(probabilities[again], labels[again], classes=names)
        assert set(labels[again]) == set(labels)
        assert {name: drawn[name][position] for name in wanted} == pytest.approx(wanted)


def test_a_resample_draws_whole_groups():
    groups = np.array([7, 7, 3, 5, 3, 7])
    times = np.concatenate(list(cluster_bootstrap(groups, seed=0, resamples=500)))
    assert times.shape == (500, 6)
    assert (times[:, [0, 2]] == times[:, [1, 4]]).all()
    assert (times[:, [0, 2, 3]].sum(axis=1) == 3).all()  # as many groups as there are
    assert times.mean(axis=0) == pytest.approx(np.ones(6), abs=0.15)


def test_groups_widen_the_intervals():
    labels = np.repeat(some_labels(40), 10)
    probabilities = np.repeat(voter(labels[::10]), 10, axis=0)  # ten copies of every image
    alone = judge(probabilities, labels)
    together = judge(probabilities, labels, groups=np.arange(400) // 10)
    singles = judge(probabilities[::10], labels[::10])
    for name in ("accuracy", "macro_f1", "auc", "kappa"):
        assert together[name]["value"] == alone[name]["value"]
        assert width(together[name]) > 2 * width(alone[name])
        assert width(together[name]) == pytest.approx(width(singles[name]), rel=0.2)


def test_intervals_have_the_width_of_the_binomial():
    labels = some_labels(400)
    result = judge(voter(labels), labels, resamples=2000)
    for one in (result["accuracy"], result["per_class"]["osteopenia"]["specificity"]):
        assert one["low"] < one["value"] < one["high"]
    value = result["accuracy"]["value"]
    assert width(result["accuracy"]) == pytest.approx(
        2 * 1.96 * math.sqrt(value * (1 - value) / 400), rel=0.1
    )


def test_the_seed_decides_and_blocks_do_not(monkeypatch):
    labels = some_labels(90)
    probabilities = voter(labels)
    first = judge(probabilities, labels)
    assert judge(probabilities, labels) == first
    assert judge(probabilities, labels, seed=1)["auc"] != first["auc"]
    monkeypatch.setattr(intervals, "_BLOCK", 90 * 7)
    assert judge(probabilities, labels) == first


@pytest.mark.parametrize(
    ("labels", "predictions", "undefined"),
    [
        ([0, 1, 0, 1, 0, 1], [0, 1, 2, 1, 0, 0], {"auc"}),  # no image of class 2
        ([0, 1, 2, 0, 1, 2], [0, 1, 1, 0, 1, 1], set()),  # class 2 is never predicted
        ([0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], {"auc"}),  # both
        ([1, 1, 1, 1], [1, 1, 1, 1], {"auc", "kappa"}),
        ([1, 1, 1, 1], [0, 2, 0, 2], {"auc"}),
        ([1], [1], {"auc", "kappa"}),
        ([1], [0], {"auc"}),
    ],
)
def test_degenerate_sets(labels, predictions, undefined):
    labels = np.array(labels)
    probabilities = (np.full((len(labels), 3), 0.2) + 0.4 * np.eye(3)[predictions]).astype(np.float32)
    result = judge(probabilities, labels)
    json.dumps(result, allow_nan=False)
    figures = evaluate.point_metrics(probabilities, labels, classes=CLASSES)
    assert {name for name in figures if result[name]["value"] is None} == undefined
    assert all(result[name]["low"] is None for name in undefined)
    for one, name in enumerate(CLASSES):
        mine = result["per_class"][name]
        seen, predicted = one in labels, one in predictions
        assert (mine["sensitivity"]["value"] is None) == (not seen)
        assert (mine["precision"] is None) == (not predicted)
        assert (mine["f1"] is None) == (not seen and not predicted)
        assert (result["roc"][name]["fpr"] == []) == (mine["auc"] is None)


def test_one_group_has_no_interval():
    labels = some_labels(30)
    result = judge(voter(labels), labels, groups=np.zeros(30, int))
    assert result["accuracy"]["value"] is not None
    assert result["accuracy"]["low"] is result["accuracy"]["high"] is None


def test_mostly_undefined_is_undefined():
    labels = np.array([0, 1, 2])  # 78 % of the resamples lack a class
    result = judge(voter(labels), labels)
    assert result["macro_f1"]["value"] is not None
    assert result["macro_f1"]["low"] is None
    assert result["accuracy"]["low"] is not None


def test_calibration_error_of_confident_and_correct_predictions():
    labels = np.array([0] * 8 + [1] * 2)
    honest = np.tile([0.8, 0.2], (10, 1))
    assert evaluate.calibration_metrics(honest, labels)["ece"] == pytest.approx(0)
    assert evaluate.calibration_metrics(np.tile([1.0, 0.0], (10, 1)), labels)["ece"] == pytest.approx(0.2)
    assert evaluate.calibration_metrics(np.tile([0.5, 0.5], (10, 1)), labels)["ece"] == pytest.approx(0.3)


def test_bins_have_equal_mass_and_ignore_the_order():
    labels = some_labels(150)
    probabilities = np.random.default_rng(0).dirichlet((1, 1, 1), 150)
    bins = evaluate.reliability_bins(probabilities, labels)
    assert [item["count"] for item in bins] == [10] * 15
    confidence = np.sort(probabilities.max(axis=1)).reshape(15, 10).mean(axis=1)
    assert [item["confidence"] for item in bins] == pytest.approx(confidence)
    tied = probabilities.round(1)
    order = np.random.default_rng(1).permutation(150)
    assert evaluate.reliability_bins(tied, labels) == [
        pytest.approx(item) for item in evaluate.reliability_bins(tied[order], labels[order])
    ]
    assert sum(item["count"] for item in evaluate.reliability_bins(tied, labels)) == 150


def test_roc_is_thinned_but_whole():
    labels = some_labels(3000)
    probabilities = np.random.default_rng(0).dirichlet((1, 1, 1), 3000) + 0.3 * np.eye(3)[labels]
    result = judge(probabilities / 1.3, labels, resamples=5)
    for name in CLASSES:
        fpr, tpr = result["roc"][name]["fpr"], result["roc"][name]["tpr"]
        assert 100 < len(fpr) == len(tpr) <= 200
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        assert fpr == sorted(fpr)
        assert tpr == sorted(tpr)
        assert np.trapezoid(tpr, fpr) == pytest.approx(result["per_class"][name]["auc"], abs=0.005)


def test_compare_is_signed():
    labels = some_labels(300)
    good, bad = voter(labels, skill=2.5), voter(labels, skill=1, seed=1)
    options = {"groups": np.arange(300), "seed": 0, "resamples": 300}
    gain, loss = (evaluate.compare(*pair, labels, **options) for pair in ((good, bad), (bad, good)))
    for name in ("accuracy", "macro_f1"):
        assert 0 < gain[name]["low"] < gain[name]["value"] < gain[name]["high"]
        assert loss[name]["value"] == -gain[name]["value"]
        assert loss[name]["high"] == pytest.approx(-gain[name]["low"])
    assert evaluate.compare(good, good, labels, **options)["macro_f1"] == {"value": 0, "low": 0, "high": 0}


def test_compare_is_paired():
    labels = some_labels(300)
    good = voter(labels)
    almost = good.copy()
    almost[:6] = voter((labels[:6] + 1) % 3, skill=9)
    result = evaluate.compare(good, almost, labels, groups=np.arange(300), seed=0, resamples=300)
    assert width(result["accuracy"]) < 0.5 * width(judge(good, labels)["accuracy"])


def test_it_is_fast():
    labels = some_labels(400)
    probabilities = voter(labels)
    start = time.process_time()
    judge(probabilities, labels, resamples=1000)
    assert time.process_time() - start < 4
