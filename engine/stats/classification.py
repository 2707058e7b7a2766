"""Figures of merit, from labels and predictions [N]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]


def accuracy(labels: Integers, predictions: Integers) -> float:
    """Return the share of correct predictions."""
    return float(np.mean(labels == predictions))


def macro_f1(labels: Integers, predictions: Integers, *, classes: int) -> float:
    """Mean over all classes of 2 TP / (2 TP + FP + FN); a class that is never seen nor predicted gives 0."""
    hits = np.bincount(labels[labels == predictions], minlength=classes)
    either = np.bincount(labels, minlength=classes) + np.bincount(predictions, minlength=classes)
    return float(np.mean(2 * hits / np.maximum(either, 1)))
