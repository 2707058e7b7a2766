"""Compute figures of merit with bootstrap intervals as JSON values; None if a figure is undefined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from engine.stats.intervals import cluster_bootstrap, percentile_interval

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]

BINS = 15  # of equal mass, for reliability and ECE
CURVE_POINTS = 200  # maximum for a ROC curve
MIN_LIKELIHOOD = 1e-12  # as in the weights search, for the same nll


def evaluate(
    probabilities: Floats,
    labels: Labels,
    *,
    classes: Sequence[str],
    groups: Labels,
    seed: int,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Return all figures of `probabilities` [N, C] of images with `labels` and `groups` [N].

    Intervals are 95 % percentile bootstrap over whole groups (Field and Welsh 2007, "Bootstrapping
    clustered data"), since images of one patient are not independent.
    """
    predictions = probabilities.argmax(axis=1)
    counts = confusion_matrix(labels, predictions, labels=range(len(classes)))  # [C, C], rows are the truth
    drawn = _bootstrap_metrics(probabilities, labels, groups, seed=seed, resamples=resamples)
    calibrated = calibration_metrics(probabilities, labels)
    single = point_metrics(probabilities, labels, classes=classes) | {"ece": calibrated["ece"]}
    return {
        "images": len(labels),
        **calibrated,
        **{name: _with_interval(value, drawn[name]) for name, value in single.items()},
        "per_class": _per_class_metrics(probabilities, labels, classes, counts, drawn),
        "confusion": counts.tolist(),
        "roc": {name: _roc_curve(labels == i, probabilities[:, i]) for i, name in enumerate(classes)},
        "reliability": reliability_bins(probabilities, labels),
    }


def compare(
    ensemble: Floats,
    member: Floats,
    labels: Labels,
    *,
    groups: Labels,
    seed: int,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Compare the ensemble with a member, both [N, C], by a paired bootstrap over groups."""
    names = [str(index) for index in range(ensemble.shape[1])]
    voters = (ensemble, member)
    point: list[dict[str, Any]] = [point_metrics(voter, labels, classes=names) for voter in voters]
    drawn = [
        _bootstrap_metrics(probabilities, labels, groups, seed=seed, resamples=resamples)
        for probabilities in voters
    ]  # the same seed and groups: the same images
    return {
        name: _with_interval(point[0][name] - point[1][name], drawn[0][name] - drawn[1][name])
        for name in ("accuracy", "macro_f1")
    }


def point_metrics(
    probabilities: Floats, labels: Labels, *, classes: Sequence[str]
) -> dict[str, float | None]:
    """Compute the figures of the paper, balanced accuracy and kappa, without intervals.

    A class that is never predicted has a precision of 0, as in scikit-learn; AUC needs every class, and
    kappa two of them.
    """
    every = range(len(classes))
    predictions = probabilities.argmax(axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=every, average="macro", zero_division=0
    )
    present = np.unique(labels)
    aucs = [_auc(labels == index, probabilities[:, index]) for index in every]
    defined = [auc for auc in aucs if auc is not None]
    kappa = None  # undefined for a single class, where chance agrees fully
    if len(np.union1d(labels, predictions)) > 1:
        kappa = cohen_kappa_score(labels, predictions, labels=every, weights="quadratic")
    figures = {
        "accuracy": accuracy_score(labels, predictions),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "auc": np.mean(defined) if len(defined) == len(aucs) else None,
        # balanced_accuracy_score warns about predicted classes without labels
        "balanced_accuracy": recall_score(labels, predictions, labels=present, average="macro"),
        "kappa": kappa,
    }
    return {name: _to_python(value) for name, value in figures.items()}


def calibration_metrics(probabilities: Floats, labels: Labels) -> dict[str, float]:
    """Return negative log-likelihood in nats, Brier score summed over classes, expected calibration error."""
    classes = range(probabilities.shape[1])
    likely = np.maximum(probabilities.astype(np.float64), MIN_LIKELIHOOD)
    likely /= likely.sum(axis=1, keepdims=True)  # scikit-learn is strict about float32 sums
    gaps = [
        entry["count"] * abs(entry["accuracy"] - entry["confidence"])
        for entry in reliability_bins(probabilities, labels)
    ]
    return {
        "nll": float(log_loss(labels, likely, labels=classes)),
        "brier": float(brier_score_loss(labels, likely, labels=classes, scale_by_half=False)),
        "ece": sum(gaps) / len(labels),
    }


def reliability_bins(probabilities: Floats, labels: Labels) -> list[dict[str, Any]]:
    """Return confidence and accuracy in bins of equal mass; equal confidences share a bin."""
    confidence, correct, bins = _bin_by_confidence(probabilities, labels)
    return [
        {
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(correct[bins == number].mean()),
            "count": int((bins == number).sum()),
        }
        for number in np.unique(bins)
    ]


def _bin_by_confidence(probabilities: Floats, labels: Labels) -> tuple[Floats, npt.NDArray[np.bool_], Labels]:
    """Return confidence, whether it is correct, and the bin of equal mass, each [N]."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    edges = np.quantile(confidence, np.arange(1, BINS) / BINS)
    return confidence, correct, np.searchsorted(edges, confidence)


def _per_class_metrics(
    probabilities: Floats, labels: Labels, classes: Sequence[str], counts: Counts, drawn: dict[str, Floats]
) -> dict[str, Any]:
    precision, _, f1, images = precision_recall_fscore_support(
        labels, probabilities.argmax(axis=1), labels=range(len(classes)), zero_division=np.nan
    )
    rates = _confusion_rates(counts, images > 0)
    return {
        name: {
            "images": int(images[index]),
            "precision": _to_python(precision[index]),
            "f1": _to_python(f1[index]),
            "auc": _auc(labels == index, probabilities[:, index]),
            **{
                rate: _with_interval(_to_python(rates[rate][index]), drawn[rate][:, index])
                for rate in ("sensitivity", "specificity")
            },
        }
        for index, name in enumerate(classes)
    }


def _auc(positive: npt.NDArray[np.bool_], scores: Floats) -> float | None:
    """Compute the AUC of one class against the rest; None if one side has no images."""
    return float(roc_auc_score(positive, scores)) if 0 < positive.sum() < len(positive) else None


def _roc_curve(positive: npt.NDArray[np.bool_], scores: Floats) -> dict[str, list[float]]:
    """Return at most CURVE_POINTS corners of the curve, from (0, 0) to (1, 1); none if it is undefined."""
    if not 0 < positive.sum() < len(positive):
        return {"fpr": [], "tpr": []}
    fpr, tpr, _ = roc_curve(positive, scores)
    keep = np.unique(np.linspace(0, len(fpr) - 1, CURVE_POINTS).round().astype(np.int64))
    return {"fpr": fpr[keep].round(4).tolist(), "tpr": tpr[keep].round(4).tolist()}


def _with_interval(value: float | None, drawn: Floats) -> dict[str, float | None]:
    """Return `value` and its interval from the resamples in which the figure is defined.

    If these are not the majority, the interval would reflect which images are rare: None.
    """
    defined = drawn[np.isfinite(drawn)]
    if value is None or len(defined) <= len(drawn) / 2:
        return {"value": value, "low": None, "high": None}
    low, high = percentile_interval(defined)
    return {"value": value, "low": low, "high": high}


def _to_python(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _bootstrap_metrics(
    probabilities: Floats, labels: Labels, groups: Labels, *, seed: int, resamples: int
) -> dict[str, Floats]:
    """Compute all figures of each resample, [B] or [B, C] by name; NaN for undefined ones.

    A resample without images of a class has no macro figures. A single group has no resamples.
    """
    classes = probabilities.shape[1]
    cells = np.eye(classes**2)[labels * classes + probabilities.argmax(axis=1)]  # [N, C * C]
    present = np.bincount(labels, minlength=classes) > 0
    confidence, correct, bins = _bin_by_confidence(probabilities, labels)
    gaps = np.eye(BINS)[bins] * (correct - confidence)[:, None]  # [N, BINS]
    blocks = []
    for drawn in cluster_bootstrap(groups, seed=seed, resamples=resamples):  # [b, N]
        figures = _confusion_rates((drawn @ cells).reshape(-1, classes, classes), present)
        aucs = [_bootstrap_auc(drawn, labels == index, probabilities[:, index]) for index in range(classes)]
        ece = np.abs(drawn @ gaps).sum(axis=1) / drawn.sum(axis=1)
        blocks.append(figures | {"auc": np.mean(aucs, axis=0), "ece": ece})
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _confusion_rates(counts: Floats | Counts, present: npt.NDArray[np.bool_]) -> dict[str, Floats]:
    """Compute the figures of many confusion matrices [..., C, C]; `present` [C] marks the expected classes.

    They equal those of scikit-learn, which needs about a millisecond per matrix.
    """
    truth, predicted = counts.sum(axis=-1), counts.sum(axis=-2)  # [..., C]
    total = truth.sum(axis=-1)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    classes = counts.shape[-1]
    distance = (np.arange(classes)[:, None] - np.arange(classes)) ** 2
    lost = np.where((present & (truth == 0)).any(axis=-1), np.nan, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity = hits / truth
        specificity = (total[..., None] - truth - predicted + hits) / (total[..., None] - truth)
        chance = np.einsum("...i,ij,...j->...", truth, distance, predicted) / total
        return {
            "accuracy": hits.sum(axis=-1) / total,
            "macro_precision": (hits / np.maximum(predicted, 1)).mean(axis=-1) + lost,
            "macro_recall": (hits / np.maximum(truth, 1)).mean(axis=-1) + lost,
            "macro_f1": (2 * hits / np.maximum(truth + predicted, 1)).mean(axis=-1) + lost,
            "balanced_accuracy": sensitivity[..., present].mean(axis=-1),
            "kappa": 1 - (counts * distance).sum(axis=(-2, -1)) / chance,
            "sensitivity": sensitivity,
            "specificity": specificity,
        }


def _bootstrap_auc(drawn: Floats, positive: npt.NDArray[np.bool_], scores: Floats) -> Floats:
    """Return the AUC [b] of each resample: the share of pairs whose positive image has the higher score."""
    _, tied = np.unique(scores, return_inverse=True)
    order = tied.argsort(kind="stable")
    starts = np.flatnonzero(np.diff(tied[order], prepend=-1))
    above, below = (
        np.add.reduceat((drawn * side)[:, order], starts, axis=1) for side in (positive, ~positive)
    )  # [b, scores that differ]
    wins = (above * (below.cumsum(axis=1) - below / 2)).sum(axis=1)  # a tie counts half
    with np.errstate(invalid="ignore"):
        areas: Floats = wins / (above.sum(axis=1) * below.sum(axis=1))
    return areas
