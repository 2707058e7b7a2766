"""Ratios of runs that were taken in turn, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap


def bootstrap_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % of the median of the rounds' values, by a percentile bootstrap over the rounds; None for one."""
    if len(values) < 2:
        return None, None
    if min(values) == max(values):
        return values[0], values[0]
    found = bootstrap((np.asarray(values),), np.median, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)
