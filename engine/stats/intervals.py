"""Intervals of what was measured on images, of which those of one patient are not independent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine.core.json_records import Count, Fraction, Record, check_order

LEVEL = 0.95
_BLOCK = 2_000_000  # image counts that are held at once

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]


class Proportion(Record):
    """`hits` of `of` images, with an interval; no value of no images."""

    hits: Count
    of: Count
    value: Fraction | None = None
    low: Fraction | None = None
    high: Fraction | None = None

    def __post_init__(self) -> None:
        known = [number for number in (self.low, self.value, self.high) if number is not None]
        if len(known) != (3 if self.of else 0):
            raise ValueError(
                f"of is {self.of}: low, value and high are numbers where there are images, else null"
            )
        check_order("low, value, high", *known)


def proportion(hits: npt.NDArray[np.bool_], groups: Labels) -> Proportion:
    """Return how often `hits` [N] is true, with the interval of Clopper and Pearson (1934) at LEVEL.

    Where several images are of one group [N], it is that of the effective number of images (Korn and Graubard
    1998, "Confidence intervals for proportions with small expected number of positive counts").
    """
    from scipy.special import betaincinv

    count, found = len(hits), int(hits.sum())
    if not count:
        return Proportion(hits=0, of=0)
    value = found / count
    effective = _effective_size(hits, value, groups)
    yes, no, tail = value * effective, (1 - value) * effective, (1 - LEVEL) / 2
    low = float(betaincinv(yes, no + 1, tail)) if found else 0.0
    high = float(betaincinv(yes + 1, no, 1 - tail)) if found < count else 1.0
    return Proportion(hits=found, of=count, value=value, low=min(low, value), high=max(high, value))


def _effective_size(hits: npt.NDArray[np.bool_], value: float, groups: Labels) -> float:
    """Return the number of independent images with the same information."""
    _, group = np.unique(groups, return_inverse=True)
    clusters = int(group.max()) + 1
    if clusters == len(hits):
        return clusters
    if value in (0, 1) or clusters == 1:
        return clusters  # their variance can't be seen
    sums = np.bincount(group, weights=hits - value)
    variance = clusters / (clusters - 1) * float((sums**2).sum()) / len(hits) ** 2
    return len(hits) if variance == 0 else min(len(hits), value * (1 - value) / variance)


def cluster_bootstrap(groups: Labels, *, seed: int, resamples: int) -> Iterator[Floats]:
    """Blocks [b, N] of how often each image was drawn, whole groups [N] at a time with replacement.

    One group alone has no resamples.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        resamples = 0
    rng = np.random.default_rng(seed)
    share = np.full(len(sizes), 1 / len(sizes))
    block = max(1, _BLOCK // len(groups))
    for start in range(0, max(resamples, 1), block):
        drawn = rng.multinomial(len(sizes), share, size=min(block, resamples - start))  # [b, G]
        yield drawn[:, group].astype(np.float64)


def percentile_interval(drawn: Floats) -> tuple[float, float]:
    """Return the ends of the percentile interval of resamples [B]."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
