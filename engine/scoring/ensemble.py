"""Logits of all members to probabilities: softmax, weighted average, arg max, on NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from engine.core.records import Batch, Status

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Scores of k images."""

    members: Floats  # [M, k, C]
    probabilities: Floats  # [k, C]
    prediction: npt.NDArray[np.intp]  # [k]; on a GPU -1 where a logit was not finite
    confidence: Floats  # [k]

    @classmethod
    def of(cls, members: Floats, probabilities: Floats) -> Self:
        """Return scores whose prediction is the class of the highest probability."""
        return cls(members, probabilities, probabilities.argmax(axis=1), probabilities.max(axis=1))

    def rows(self, selected: npt.NDArray[np.bool_]) -> Scores:
        """Return the scores of the `selected` [k] images."""
        return Scores(
            self.members[:, selected],
            self.probabilities[selected],
            self.prediction[selected],
            self.confidence[selected],
        )


def record(
    batch: Batch, finite: npt.NDArray[np.bool_], scores: Scores, distances: Floats | None = None
) -> None:
    """Fill the score fields of a batch; the images whose logits are not `finite` [k] fail.

    `scores` and `distances` [M, f] are those of the f images with finite logits.
    """
    for position in batch.index[~finite]:
        batch.fail(int(position), Status.CRASHED, "a member returned a score that is not a finite number")
    batch.index = batch.index[finite]
    batch.members, batch.probabilities = scores.members, scores.probabilities
    batch.prediction, batch.confidence = scores.prediction, scores.confidence
    batch.distances = distances


def softmax(logits: Floats) -> Floats:
    """Compute the softmax over the last axis in float32, shifted by the maximum to avoid overflow."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def combine_logits(
    logits: Floats,
    *,
    weights: Sequence[float],
    temperatures: Sequence[float],
    temperature: float = 1.0,
) -> tuple[Floats, Floats]:
    """Compute P(c) = sum over members m of w_m softmax(z_m / T_m)_c, with the ensemble's temperature.

    `logits` is float32 [M, N, C]. Returns the members' probabilities [M, N, C] and the ensemble's [N, C],
    both float32. Members are added in order, in float32, so that a GPU can compute the same numbers.
    A temperature T other than 1 gives P(c)^(1/T), normalised (Guo et al. 2017, on log P).
    """
    scale = np.asarray(temperatures, np.float32)[:, None, None]
    members = softmax(logits / scale)
    return members, apply_temperature(average_members(members, weights), temperature)


def average_members(members: Floats, weights: Sequence[float]) -> Floats:
    """Average the members' probabilities [M, N, C] with their weights; return [N, C]."""
    probabilities = np.zeros(members.shape[1:], np.float32)
    for weight, member in zip(weights, members, strict=True):
        probabilities += np.float32(weight) * member
    return probabilities


def apply_temperature(probabilities: Floats, temperature: float) -> Floats:
    """Return P(c)^(1/T), normalised, of averaged probabilities [N, C]."""
    if temperature == 1.0:
        return probabilities
    tiny = np.finfo(np.float32).tiny
    logs: Floats = np.log(np.maximum(probabilities, tiny))
    return softmax(logs / np.float32(temperature))


def entropy(probabilities: Floats) -> Floats:
    """Compute the entropy of each row of [..., C] in bits (Shannon 1948)."""
    logs = np.log2(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return np.asarray(np.maximum(-(probabilities * logs).sum(axis=-1), 0), np.float32)


def disagreement(members: Floats, weights: Sequence[float]) -> Floats:
    """Compute the Jensen-Shannon divergence [N] of the members' probabilities [M, N, C], in bits.

    The entropy of their weighted mean minus the weighted mean of their entropies: 0 if all are equal, at most
    1 for two members (Lin 1991, "Divergence measures based on the Shannon entropy").
    """
    divergence = entropy(average_members(members, weights))
    for weight, member in zip(weights, members, strict=True):
        divergence -= np.float32(weight) * entropy(member)
    return np.asarray(np.maximum(divergence, 0), np.float32)
