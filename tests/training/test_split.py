"""Splits are stratified, keep groups together and respect existing sets."""

import numpy as np
import pytest

from engine.core.errors import UsageError
from training import split

CLASSES = ("a", "b", "c")


def cut(labels, groups=None, **options) -> split.Split:
    groups = np.arange(len(labels)) if groups is None else groups
    return split.split_dataset(labels, groups, classes=CLASSES, **{"seed": 0, **options})


def test_disjoint_complete_and_stratified():
    labels = np.repeat([0, 1, 2], [100, 40, 20])
    parts = cut(labels, seed=3)
    assert np.array_equal(np.sort(np.concatenate([chosen for _, chosen in parts.named()])), np.arange(160))
    for chosen, share in ((parts.train, 0.7), (parts.validation, 0.15), (parts.test, 0.15)):
        assert np.bincount(labels[chosen]).tolist() == [100 * share, 40 * share, 20 * share]
    names = parts.names()
    assert [names[position] for position in parts.test] == ["test"] * len(parts.test)


def test_it_follows_the_seed():
    labels = np.repeat([0, 1, 2], 50)
    first, again, other = (cut(labels, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_even_the_smallest_class_is_in_every_set(count):
    labels = np.repeat([0, 1, 2], [count, 30, 30])
    for _, chosen in cut(labels).named():
        assert set(labels[chosen]) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_shares_stay_near(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 150, 600)  # of 1 to about 10 images, with mixed labels
    labels = np.where(rng.random(600) < 0.9, groups % 3, rng.integers(0, 3, 600))
    parts = cut(labels, groups, seed=seed)
    owners = [set(groups[chosen]) for _, chosen in parts.named()]
    assert sum(map(len, owners)) == len(set.union(*owners))
    for chosen, share in ((parts.train, 0.7), (parts.validation, 0.15), (parts.test, 0.15)):
        result = np.bincount(labels[chosen]) / np.bincount(labels)
        assert np.abs(result - share).max() < 0.03


def test_a_class_in_too_few_groups_is_one_line():
    labels, groups = np.repeat([0, 1, 2], 10), np.arange(30)
    groups[:10] = [0] * 5 + [1] * 5
    with pytest.raises(UsageError, match=r"class 'a'.*its 10 images count as 2,"):
        cut(labels, groups)


def test_a_given_split_is_kept_and_completed():
    labels = np.tile([0, 1, 2], 40)
    set_names = ["test" if position < 30 else None for position in range(120)]
    parts = cut(labels, set_names=set_names)
    assert parts.test.tolist() == list(range(30))
    assert np.bincount(labels[parts.validation]).tolist() == [5, 5, 5]  # 15 of the 85 % that are left
    both = cut(labels, set_names=["train"] * 60 + ["validation"] * 30 + ["test"] * 30)
    assert (len(both.train), len(both.validation), len(both.test)) == (60, 30, 30)


def test_an_empty_set_is_one_line():
    labels = np.tile([0, 1, 2], 20)
    with pytest.raises(UsageError, match="the test set of the data has no image of class 'b'"):
        cut(
            labels,
            set_names=["test" if position < 30 and position % 3 != 1 else "train" for position in range(60)],
        )
    with pytest.raises(UsageError, match="class 'a' has no image in the train set"):
        cut(labels, set_names=["test"] * 60)


def test_folds_cover_every_image_once():
    labels, groups = np.tile([0, 1, 2], 40), np.arange(120) // 2
    result = list(split.make_folds(labels, groups, 5, classes=CLASSES, seed=1))
    assert np.array_equal(np.sort(np.concatenate([parts.test for parts in result])), np.arange(120))
    for parts in result:
        assert sorted(len(chosen) for _, chosen in parts.named()) == [18, 24, 78]
        assert not set(groups[parts.test]) & set(groups[parts.train])
        assert not set(groups[parts.validation]) & set(groups[parts.train])


def test_more_folds_than_images_of_a_class():
    with pytest.raises(UsageError, match="class 'c' has no image in the test set"):
        list(split.make_folds(np.repeat([0, 1, 2], [9, 9, 3]), np.arange(21), 5, classes=CLASSES, seed=0))
