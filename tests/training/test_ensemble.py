"""The search for the members' weights, on constructed logits."""

import math

import numpy as np
import pytest

from training import weight_search

LABELS = np.array([0, 1, 2] * 20)


def confident(predictions: np.ndarray, *, margin: float = 4.0) -> np.ndarray:
    """Logits [N, 3] of a member that is sure of `predictions`."""
    return margin * np.eye(3, dtype=np.float32)[predictions]


def test_a_member_that_is_always_right_beats_one_that_is_always_wrong():
    logits = np.stack([confident((LABELS + 1) % 3), confident(LABELS)])
    best = weight_search.search_weights(logits, LABELS)[0]
    assert best.weights == (0.0, 1.0)
    assert best.macro_f1 == best.accuracy == 1.0


def test_members_that_err_on_different_images_are_mixed():
    first, second = confident(LABELS), confident(LABELS)
    first[:15] = confident((LABELS[:15] + 1) % 3, margin=0.5)
    second[15:30] = confident((LABELS[15:30] + 1) % 3, margin=0.5)
    best = weight_search.search_weights(np.stack([first, second]), LABELS)[0]
    assert best.macro_f1 == 1.0
    assert 0.2 <= best.weights[0] <= 0.8


@pytest.mark.parametrize("members", [2, 4])
def test_ties_go_to_equal_weights(members):
    logits = np.stack([confident(LABELS)] * members)
    assert weight_search.search_weights(logits, LABELS)[0].weights == (1 / members,) * members


def test_equal_f1_goes_to_the_better_likelihood():
    logits = np.stack([confident(LABELS, margin=1.0), confident(LABELS, margin=6.0)])
    assert weight_search.search_weights(logits, LABELS)[0].weights == (0.0, 1.0)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_grid_is_complete_and_adds_up(members):
    result = list(weight_search.weight_grid(members))
    assert len(set(result)) == len(result) == math.comb(20 + members - 1, members - 1)
    assert all(sum(weights) == pytest.approx(1) and min(weights) >= 0 for weights in result)


@pytest.mark.slow
def test_many_members_stay_cheap():
    logits = np.stack([confident(LABELS)] * 8)
    assert len(weight_search.search_weights(logits, LABELS)) <= weight_search.MAX_CANDIDATES


def test_the_weights_of_the_paper_are_reported():
    logits = np.stack([confident(LABELS)] * 3)
    assert [candidate.weights for candidate in weight_search.reference_candidates(logits[:2], LABELS)] == [
        (0.5, 0.5),
        (0.4, 0.6),
    ]
    assert [candidate.weights for candidate in weight_search.reference_candidates(logits, LABELS)] == [
        (1 / 3, 1 / 3, 1 / 3)
    ]
