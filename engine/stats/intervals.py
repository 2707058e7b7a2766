"""Compute confidence intervals for figures on images; the images of one patient are not independent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine.core.json_records import Count, Fraction, Record, check_order

LEVEL = 0.95
_BLOCK = 2_000_000  # elements of a block of resamples

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]


class Proportion(Record):
    """A share of images with its interval; the values are null without images."""

    hits: Count
    of: Count
    value: Fraction | None = None
    low: Fraction | None = None
    high: Fraction | None = None

    def __post_init__(self) -> None:
        numbers = [number for number in (self.low, self.value, self.high) if number is not None]
        if len(numbers) != (3 if self.of else 0):
            raise ValueError(
                f"of is {self.of}: low, value and high must be numbers if of is not 0, else null"
            )
        check_order("low, value, high", *numbers)


def proportion(hits: npt.NDArray[np.bool_], groups: Labels) -> Proportion:
    """Return the share of true `hits` [N], with the interval of Clopper and Pearson (1934) at LEVEL.

    If groups [N] have several images, the interval is that of the effective number of images (Korn and
    Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts").
    """
    from scipy.special import betaincinv

    count, positives = len(hits), int(hits.sum())
    if not count:
        return Proportion(hits=0, of=0)
    value = positives / count
    effective = _effective_size(hits, value, groups)
    successes, failures, tail = value * effective, (1 - value) * effective, (1 - LEVEL) / 2
    low = float(betaincinv(successes, failures + 1, tail)) if positives else 0.0
    high = float(betaincinv(successes + 1, failures, 1 - tail)) if positives < count else 1.0
    return Proportion(hits=positives, of=count, value=value, low=min(low, value), high=max(high, value))


def _effective_size(hits: npt.NDArray[np.bool_], value: float, groups: Labels) -> float:
    """Return the number of independent images with the same information."""
    _, group = np.unique(groups, return_inverse=True)
    clusters = int(group.max()) + 1
    if clusters == len(hits):
        return clusters
    if value in (0, 1) or clusters == 1:
        return clusters  # the variance cannot be estimated
    sums = np.bincount(group, weights=hits - value)
    variance = clusters / (clusters - 1) * float((sums**2).sum()) / len(hits) ** 2
    return len(hits) if variance == 0 else min(len(hits), value * (1 - value) / variance)


def cluster_bootstrap(groups: Labels, *, seed: int, resamples: int) -> Iterator[Floats]:
    """Yield blocks [b, N] of the number of times each image was drawn; groups [N] are drawn as a whole.

    A single group has no resamples.
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
