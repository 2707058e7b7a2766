"""Confidence intervals of ratios of runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap


def bootstrap_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % percentile bootstrap interval of the median of `values`, None for one value."""
    if len(values) < 2:
        return None, None
    if min(values) == max(values):
        return values[0], values[0]
    interval = bootstrap((np.asarray(values),), np.median, method="percentile", rng=0).confidence_interval
    return float(interval.low), float(interval.high)
