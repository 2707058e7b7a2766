"""Train, validation and test: stratified by class, whole groups on one side, a given split respected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.core.errors import UsageError
from training.listing import SETS, Labels

SHARE = 0.15  # of all images, for validation and for test each


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of positions in a dataset, sorted."""

    train: Labels
    validation: Labels
    test: Labels

    def named(self) -> Sequence[tuple[str, Labels]]:
        return ("train", self.train), ("validation", self.validation), ("test", self.test)

    def names(self) -> list[str]:
        """Return the set of each image, by position."""
        names = np.empty(sum(len(chosen) for _, chosen in self.named()), object)
        for name, chosen in self.named():
            names[chosen] = name
        return names.tolist()


def split_dataset(
    labels: Labels,
    groups: Labels,
    *,
    classes: Sequence[str],
    seed: int,
    given: Sequence[str | None] | None = None,
) -> Split:
    """70 / 15 / 15 of every class, at least one image each; images of one group stay together.

    `given` names sets that exist already: they stay, and those that are missing are cut from the training
    images. Raises UsageError when a class can't be in all three sets.
    """
    sets = np.array([name or "train" for name in given or [None] * len(labels)], object)
    missing = [name for name in ("validation", "test") if name not in sets]
    if missing:
        pool = np.flatnonzero(sets == "train")
        share = SHARE / (1 - SHARE * (2 - len(missing)))
        cut = _draw_sets(labels[pool], groups[pool], [share] * len(missing), seed)
        sets[pool] = np.array(["train", *missing], object)[cut]
    found = Split(*(np.flatnonzero(sets == name) for name in SETS))
    _check_sets(found, labels, groups, classes, given)
    return found


def make_folds(
    labels: Labels, groups: Labels, count: int, *, classes: Sequence[str], seed: int
) -> Iterator[Split]:
    """Put every image in the test set of one fold; cut validation from the rest. Raises UsageError."""
    fold = _assign_groups(labels, groups, _per_class(labels)[None] * np.full((count, 1), 1 / count), seed)
    for index in range(count):
        rest = np.flatnonzero(fold != index)
        cut = _draw_sets(labels[rest], groups[rest], [SHARE / (1 - 1 / count)], seed + 1 + index)
        found = Split(rest[cut == 0], rest[cut == 1], np.flatnonzero(fold == index))
        _check_sets(found, labels, groups, classes, None)
        yield found


def _draw_sets(labels: Labels, groups: Labels, shares: Sequence[float], seed: int) -> Labels:
    """Draw the set of each image: 0 the rest, 1, 2, ... the shares, each with at least one image of
    every class.
    """
    every = _per_class(labels)
    wanted = [np.where(every > 0, np.maximum(1, np.round(share * every)), 0) for share in shares]
    return _assign_groups(labels, groups, np.stack([every - sum(wanted), *wanted]), seed)


def _per_class(labels: Labels) -> npt.NDArray[np.float64]:
    return np.bincount(labels).astype(np.float64)


def _assign_groups(labels: Labels, groups: Labels, wanted: npt.NDArray[np.float64], seed: int) -> Labels:
    """Put groups, the largest first and otherwise in random order, where they are missed most.

    `wanted` [S, C] are images per set and class. The squared error over all sets and classes is lowered
    greedily, as scikit-learn's StratifiedGroupKFold does; singletons end up exactly as wanted.
    """
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.zeros((group.max(initial=-1) + 1, wanted.shape[1]))
    np.add.at(sizes, (group, labels), 1)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes.sum(axis=1)[order], kind="stable")]
    lacking = wanted.copy()
    place = np.empty(len(sizes), np.int64)
    for one in order:
        change = (sizes[one] * (sizes[one] - 2 * lacking)).sum(axis=1)
        place[one] = change.argmin()
        lacking[place[one]] -= sizes[one]
    return place[group]


def _check_sets(
    found: Split,
    labels: Labels,
    groups: Labels,
    classes: Sequence[str],
    given: Sequence[str | None] | None,
) -> None:
    for set_name, chosen in found.named():
        for label, name in enumerate(classes):
            if label in labels[chosen]:
                continue
            if given and set_name in given:
                raise UsageError(f"the given {set_name} set has no image of class {name!r}")
            own = labels == label
            raise UsageError(
                f"class {name!r} does not reach the {set_name} set: its {own.sum()} images count as "
                f"{len(np.unique(groups[own]))}, since copies and images of a patient stay together"
            )
