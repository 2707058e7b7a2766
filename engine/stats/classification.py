"""Figures of merit, from labels and predictions [N]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]


def accuracy(labels: Integers, predictions: Integers) -> float:
    """Return the share of correct predictions."""
    return float(np.mean(labels == predictions))


def macro_f1(labels: Integers, predictions: Integers, *, classes: int) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN); 0 for a class that does not occur."""
    hits = np.bincount(labels[labels == predictions], minlength=classes)
    totals = np.bincount(labels, minlength=classes) + np.bincount(predictions, minlength=classes)
    return float(np.mean(2 * hits / np.maximum(totals, 1)))
