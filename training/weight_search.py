"""Choose the members' weights on the validation set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.scoring.ensemble import combine_logits
from engine.stats.classification import accuracy, macro_f1

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

GRID_STEPS = 20  # of 0.05
MAX_CANDIDATES = 20_000
PAPER_WEIGHTS = ((0.5, 0.5), (0.4, 0.6))  # weights of the paper's two members


@dataclass(frozen=True)
class Candidate:
    """A choice of weights and its figures on the validation set."""

    weights: tuple[float, ...]
    accuracy: float
    macro_f1: float
    nll: float  # mean negative log-likelihood of the true class, in nats

    @property
    def rank(self) -> tuple[float, float, float]:
        """Return the sort key, best first: macro-F1, then likelihood, then nearest to equal weights."""
        spread = sum((weight - 1 / len(self.weights)) ** 2 for weight in self.weights)
        return -round(self.macro_f1, 9), round(self.nll, 7), spread


def search_weights(logits: Floats, labels: Labels) -> list[Candidate]:
    """Try all weights on a grid of 0.05 that add up to 1, best first; `logits` [M, N, C], `labels` [N]."""
    members, steps = len(logits), GRID_STEPS
    while math.comb(steps + members - 1, members - 1) > MAX_CANDIDATES and steps > 1:
        steps //= 2  # many members: a coarser grid
    candidates = [evaluate_candidate(logits, labels, weights) for weights in weight_grid(members, steps)]
    return sorted(candidates, key=lambda candidate: candidate.rank)


def reference_candidates(logits: Floats, labels: Labels) -> list[Candidate]:
    """Return the paper's choices for comparison: equal weights; 0.4 / 0.6 for two members."""
    members = len(logits)
    weight_sets = PAPER_WEIGHTS if members == 2 else ((1 / members,) * members,)
    return [evaluate_candidate(logits, labels, weights) for weights in weight_sets]


def evaluate_candidate(
    logits: Floats, labels: Labels, weights: tuple[float, ...], *, temperature: float = 1.0
) -> Candidate:
    _, probabilities = combine_logits(
        logits, weights=weights, temperatures=[1.0] * len(logits), temperature=temperature
    )
    predictions = probabilities.argmax(axis=1)
    likelihood = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return Candidate(
        weights=weights,
        accuracy=accuracy(labels, predictions),
        macro_f1=macro_f1(labels, predictions, classes=probabilities.shape[1]),
        nll=float(-np.log(np.maximum(likelihood, 1e-12)).mean()),
    )


def weight_grid(members: int, steps: int = GRID_STEPS) -> Iterator[tuple[float, ...]]:
    """Yield all weights of `members` members in units of 1 / `steps` that add up to 1."""
    for units in _compositions(members, steps):
        yield tuple(unit / steps for unit in units)


def _compositions(parts: int, total: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(parts - 1, total - first):
            yield first, *rest
