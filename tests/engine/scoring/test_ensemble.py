import numpy as np

from engine.scoring.ensemble import combine_logits
from tests.helpers.tolerances import ROUNDING


def by_hand(logits: np.ndarray, weights: list[float]) -> np.ndarray:
    wide = logits.astype(np.float64)
    exps = np.exp(wide - wide.max(-1, keepdims=True))
    members = exps / exps.sum(-1, keepdims=True)
    return np.einsum("m,mnc->nc", np.array(weights), members)


def test_weighted_average_of_softmaxes() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (3, 50, 4)).astype(np.float32)
    weights = [0.5, 0.2, 0.3]
    members, probabilities = combine_logits(logits, weights=weights, temperatures=[1, 1, 1])
    assert members.dtype == probabilities.dtype == np.float32
    assert np.abs(probabilities - by_hand(logits, weights)).max() <= ROUNDING
    assert np.abs(members.sum(-1) - 1).max() <= ROUNDING


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[[1e30, -1e30, 0.0]]], np.float32)
    _, probabilities = combine_logits(logits, weights=[1.0], temperatures=[1.0])
    assert probabilities.tolist() == [[1.0, 0.0, 0.0]]


def test_member_temperatures_divide_logits() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (1, 20, 3)).astype(np.float32)
    _, halved = combine_logits(logits, weights=[1.0], temperatures=[2.0])
    assert np.abs(halved - by_hand(logits / 2, [1.0])).max() <= ROUNDING


def test_the_ensemble_temperature_sharpens_the_average() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (2, 20, 3)).astype(np.float32)
    _, plain = combine_logits(logits, weights=[0.5, 0.5], temperatures=[1, 1])
    _, sharp = combine_logits(logits, weights=[0.5, 0.5], temperatures=[1, 1], temperature=0.5)
    squared = plain.astype(np.float64) ** 2
    assert np.abs(sharp - squared / squared.sum(-1, keepdims=True)).max() <= ROUNDING


def test_no_rows() -> None:
    members, probabilities = combine_logits(
        np.empty((2, 0, 3), np.float32), weights=[0.5, 0.5], temperatures=[1, 1]
    )
    assert members.shape == (2, 0, 3)
    assert probabilities.shape == (0, 3)
