"""Fit temperature and triage thresholds to scores of labelled images, and measure their rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from engine.bundle.operating_points import (
    DOUBTFUL,
    ZONES,
    Abstention,
    AskedRates,
    DisagreementLimit,
    DistanceLimits,
    FittedTemperature,
    LabelledData,
    LogLikelihoods,
    OperatingPoints,
    Rates,
    Refer,
    RuleOut,
    ZoneCounts,
    Zones,
)
from engine.core.errors import UsageError
from engine.scoring.ensemble import apply_temperature, average_members, disagreement
from engine.sink.triage import assign_zones
from engine.stats.intervals import LEVEL, Proportion, cluster_bootstrap, percentile_interval, proportion

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Ends = tuple[float, float]  # low and high end of an interval

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
FOLDS, RESAMPLES = 5, 1000
_GRID = 121  # temperatures of the bootstrap, 5 % apart
_SLACK = 1e-9  # of a count: 0.9 of 10 images are 9


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The rates that the thresholds must reach, and the grounds to abstain."""

    target: str
    sensitivity: float = 0.90  # share of the target class that is not ruled out
    specificity: float = 0.90  # share of the other classes that is not referred
    quantile: float = 0.99  # of the members' disagreement; the ensemble abstains above it
    flags: tuple[str, ...] = DOUBTFUL  # the ensemble abstains from images with one of these
    seed: int = 0


@dataclass(frozen=True)
class LabelledScores:
    """Scored images with a known class."""

    members: Floats  # [M, N, C], probabilities of each member
    labels: Labels  # [N]
    groups: Labels  # [N], the same for images of one patient

    def only(self, chosen: Bools) -> LabelledScores:
        return LabelledScores(self.members[:, chosen], self.labels[chosen], self.groups[chosen])


def fit_temperature(probabilities: Floats, labels: Labels) -> float:
    """Return the maximum-likelihood temperature for averaged `probabilities` [N, C] and `labels` [N].

    It divides their logarithms (Guo et al. 2017, "On calibration of modern neural networks") and is between
    MIN_TEMPERATURE and MAX_TEMPERATURE. It reaches an end if the images are classified without error or are
    too few.
    """
    from scipy.optimize import minimize_scalar

    logs = _log_probabilities(probabilities)
    minimum = minimize_scalar(
        lambda log_temperature: float(
            _negative_log_likelihoods(logs, labels, math.exp(log_temperature)).mean()
        ),
        bounds=(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)),
        method="bounded",
    )
    return float(math.exp(minimum.x))


def _log_probabilities(probabilities: Floats) -> npt.NDArray[np.float64]:
    logs: npt.NDArray[np.float64] = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny, dtype=float))
    return logs


def _negative_log_likelihoods(
    logs: npt.NDArray[np.float64], labels: Labels, temperature: float
) -> npt.NDArray[np.float64]:
    """Return the negative log-likelihood [N] of each image's class, in nats."""
    scaled = logs / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    losses: npt.NDArray[np.float64] = (
        np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(labels)), labels]
    )
    return losses


def calibrate(
    sample: LabelledScores,
    classes: Sequence[str],
    weights: Sequence[float],
    options: CalibrationOptions,
    data: LabelledData,
    distance: DistanceLimits | None = None,
) -> OperatingPoints:
    """Find the ensemble's temperature and operating points; `data` describes `sample`.

    Raises UsageError if there are too few images for the requested rates.
    """
    target = classes.index(options.target)
    positive = sample.labels == target
    check_counts(positive, sample.groups, options)
    mean = average_members(sample.members, weights)
    temperature, converged = _fit_bounded_temperature(mean, sample.labels)
    scores = apply_temperature(mean, temperature)[:, target]
    low, high, crossed = fit_thresholds(scores, positive, options)
    low_ends, high_ends = _threshold_intervals(scores, positive, sample.groups, options)
    fitted = _cross_fit(sample, weights, target, options)

    def rates(called: Bools) -> Rates:
        return _rates(called, positive, sample.groups)

    return OperatingPoints(
        target=options.target,
        asked=AskedRates(sensitivity=options.sensitivity, specificity=options.specificity),
        level=LEVEL,
        rule_out=RuleOut(
            below=low, interval=low_ends, on_data=rates(scores >= low), cross_fitted=rates(fitted["rule_out"])
        ),
        refer=Refer(
            above=high, interval=high_ends, on_data=rates(scores > high), cross_fitted=rates(fitted["refer"])
        ),
        crossed=crossed,
        temperature=FittedTemperature(
            value=temperature,
            interval=_temperature_interval(mean, sample, options.seed) if converged else None,
            nll=LogLikelihoods(
                before=_mean_loss(mean, sample.labels, 1.0),
                after=_mean_loss(mean, sample.labels, temperature),
            ),
        ),
        zones=_zone_counts(assign_zones(scores, low, high), positive),
        abstain=Abstention(
            disagreement=_disagreement_limit(sample, weights, options.quantile),
            image_flags=options.flags,
            distance=distance,
        ),
        data=data,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _mean_loss(mean: Floats, labels: Labels, temperature: float) -> float:
    return float(_negative_log_likelihoods(_log_probabilities(mean), labels, temperature).mean())


def _zone_counts(zone: npt.NDArray[np.int8], positive: Bools) -> Zones:
    return Zones(
        **{
            name: ZoneCounts(images=int(mask.sum()), positives=int((positive & mask).sum()))
            for name, mask in zip(ZONES, (zone == code for code in range(len(ZONES))), strict=True)
        }
    )


def _disagreement_limit(
    sample: LabelledScores, weights: Sequence[float], quantile: float
) -> DisagreementLimit:
    """Return the quantile of the members' disagreement, None for a single member."""
    above = float(np.quantile(disagreement(sample.members, weights), quantile)) if len(weights) > 1 else None
    return DisagreementLimit(quantile=quantile, above=above)


def check_counts(positive: Bools, groups: Labels, options: CalibrationOptions) -> None:
    """Raise UsageError if a class has too few images [N], or patients, for its requested rate.

    n hits of n images show a rate s at LEVEL only if s^n <= 1 - LEVEL (Wilks 1941).
    """
    unit = "patients with images" if len(np.unique(groups)) < len(groups) else "images"
    for name, rate, mask, source in (
        ("sensitivity", options.sensitivity, positive, f"of class {options.target}"),
        ("specificity", options.specificity, ~positive, f"of other classes than {options.target}"),
    ):
        count, needed = len(np.unique(groups[mask])), min_images(rate)
        if count < needed:
            raise UsageError(
                f"{count} {unit} {source} are too few for a {name} of {rate:g}; add images until there are "
                f"at least {needed}, or lower --{name}"
            )


def min_images(rate: float) -> int:
    """Return the smallest number of images that can show `rate` at LEVEL."""
    return math.ceil(math.log(1 - LEVEL) / math.log(rate))


def _fit_bounded_temperature(mean: Floats, labels: Labels) -> tuple[float, bool]:
    """Fit the temperature; return 1 if the likelihood has no maximum within the limits."""
    fitted = fit_temperature(mean, labels)
    has_errors = bool((mean.argmax(axis=1) != labels).any())
    converged = has_errors and MIN_TEMPERATURE * 1.01 < fitted < MAX_TEMPERATURE / 1.01
    return (fitted if converged else 1.0), converged


def fit_thresholds(scores: Floats, positive: Bools, options: CalibrationOptions) -> tuple[float, float, bool]:
    """Return the rule-out threshold, the refer threshold, and whether they had crossed.

    The first is the largest that reaches the requested sensitivity on `scores` [N], the second the smallest
    that reaches the specificity. If the first is above the second, every threshold between them reaches both:
    both become the middle, and the gray zone is empty.
    """
    low, high, crossed = _threshold_pairs(scores, positive, np.ones((1, len(scores))), options)
    return float(low[0]), float(high[0]), bool(crossed[0])


def _threshold_pairs(
    scores: Floats, positive: Bools, times: npt.NDArray[np.floating], options: CalibrationOptions
) -> tuple[Floats, Floats, Bools]:
    """Return the thresholds [b] of resamples that hold each image `times` [b, N]."""
    low = _weighted_quantile(scores[positive], times[:, positive], 1 - options.sensitivity, beyond=True)
    high = _weighted_quantile(scores[~positive], times[:, ~positive], options.specificity, beyond=False)
    crossed = low > high
    middle = (low + high) / np.float32(2)
    return np.where(crossed, middle, low), np.where(crossed, middle, high), crossed


def _weighted_quantile(
    scores: Floats, times: npt.NDArray[np.floating], share: float, *, beyond: bool
) -> Floats:
    """Return the first score with more than (`beyond`), or at least, `share` of all weight at or below it."""
    order = scores.argsort(kind="stable")
    counts = times[:, order].cumsum(axis=1)
    limit = counts[:, -1:] * share
    reached = counts > np.floor(limit + _SLACK) if beyond else counts >= np.ceil(limit - _SLACK)
    return np.asarray(scores[order][reached.argmax(axis=1)], np.float32)


def _threshold_intervals(
    scores: Floats, positive: Bools, groups: Labels, options: CalibrationOptions
) -> tuple[Ends, Ends]:
    """Return the intervals of both thresholds at this temperature, by a bootstrap over groups."""
    blocks = []
    for times in cluster_bootstrap(groups, seed=options.seed, resamples=RESAMPLES):
        times = times[(times[:, positive].sum(axis=1) > 0) & (times[:, ~positive].sum(axis=1) > 0)]
        blocks.append(np.stack(_threshold_pairs(scores, positive, times, options)[:2]))
    low, high = np.concatenate(blocks, axis=1)
    return percentile_interval(low), percentile_interval(high)


def _temperature_interval(mean: Floats, sample: LabelledScores, seed: int) -> Ends:
    """Bootstrap the temperature: take the best of a grid and the parabola through its neighbours."""
    grid = np.linspace(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE), _GRID)
    logs = _log_probabilities(mean)
    losses = np.stack(
        [_negative_log_likelihoods(logs, sample.labels, math.exp(point)) for point in grid], axis=1
    )  # [N, grid]
    blocks = []
    for times in cluster_bootstrap(sample.groups, seed=seed, resamples=RESAMPLES):
        total = times @ losses  # [b, grid]
        best = total.argmin(axis=1).clip(1, _GRID - 2)
        left, middle, right = (total[np.arange(len(best)), best + step] for step in (-1, 0, 1))
        bend = left - 2 * middle + right
        shift = np.where(bend > 0, (left - right) / (2 * np.where(bend > 0, bend, 1)), 0).clip(-1, 1)
        blocks.append(np.exp(grid[best] + shift * (grid[1] - grid[0])))
    return percentile_interval(np.concatenate(blocks))


def _cross_fit(
    sample: LabelledScores, weights: Sequence[float], target: int, options: CalibrationOptions
) -> Mapping[str, Bools]:
    """Apply to each image [N] the temperature and thresholds that were fitted without its fold."""
    positive = sample.labels == target
    called = {name: np.zeros(len(positive), np.bool_) for name in ("rule_out", "refer")}
    for held in split_folds(positive, sample.groups, options.seed):
        rest = sample.only(~held)
        mean = average_members(rest.members, weights)
        temperature, _ = _fit_bounded_temperature(mean, rest.labels)
        low, high, _ = fit_thresholds(
            apply_temperature(mean, temperature)[:, target], rest.labels == target, options
        )
        scores = apply_temperature(average_members(sample.members[:, held], weights), temperature)[:, target]
        called["rule_out"][held], called["refer"][held] = scores >= low, scores > high
    return called


def split_folds(positive: Bools, groups: Labels, seed: int) -> Iterator[Bools]:
    """Yield the masks [N] of FOLDS folds of whole groups, stratified by groups with a positive image."""
    _, group = np.unique(groups, return_inverse=True)
    any_positive = np.bincount(group, weights=positive) > 0
    fold = np.empty(len(any_positive), np.int64)
    rng = np.random.default_rng(seed)
    for side in (any_positive, ~any_positive):
        fold[side] = rng.permutation(int(side.sum())) % FOLDS
    for number in range(FOLDS):
        held: Bools = fold[group] == number
        yield held


def _rates(called: Bools, positive: Bools, groups: Labels) -> Rates:
    """Return the rates of a test that calls some images [N] positive."""
    correct = called == positive

    def among(mask: Bools) -> Proportion:
        return proportion(correct[mask], groups[mask])

    return Rates(
        sensitivity=among(positive), specificity=among(~positive), ppv=among(called), npv=among(~called)
    )
