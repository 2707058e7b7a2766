"""Split images into train, validation and test by class; groups stay together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.core.errors import UsageError
from training.listing import SETS, Labels

SHARE = 0.15  # of all images, for each of validation and test


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
    set_names: Sequence[str | None] | None = None,
) -> Split:
    """Split every class 70 / 15 / 15, at least one image each; images of one group stay together.

    Sets in `set_names` are kept, and missing ones are cut from the training images. Raises UsageError if a
    class can't be in all three sets.
    """
    sets = np.array([name or "train" for name in set_names or [None] * len(labels)], object)
    missing = [name for name in ("validation", "test") if name not in sets]
    if missing:
        pool = np.flatnonzero(sets == "train")
        share = SHARE / (1 - SHARE * (2 - len(missing)))
        cut = _draw_sets(labels[pool], groups[pool], [share] * len(missing), seed)
        sets[pool] = np.array(["train", *missing], object)[cut]
    split = Split(*(np.flatnonzero(sets == name) for name in SETS))
    _check_sets(split, labels, groups, classes, set_names)
    return split


def make_folds(
    labels: Labels, groups: Labels, count: int, *, classes: Sequence[str], seed: int
) -> Iterator[Split]:
    """Put every image in the test set of one fold; cut validation from the rest. Raises UsageError."""
    fold = _assign_groups(labels, groups, _per_class(labels)[None] * np.full((count, 1), 1 / count), seed)
    for index in range(count):
        rest = np.flatnonzero(fold != index)
        cut = _draw_sets(labels[rest], groups[rest], [SHARE / (1 - 1 / count)], seed + 1 + index)
        split = Split(rest[cut == 0], rest[cut == 1], np.flatnonzero(fold == index))
        _check_sets(split, labels, groups, classes, None)
        yield split


def _draw_sets(labels: Labels, groups: Labels, shares: Sequence[float], seed: int) -> Labels:
    """Draw the set of each image: 0 the rest; 1, 2, ... the shares, with every class in each."""
    counts = _per_class(labels)
    wanted = [np.where(counts > 0, np.maximum(1, np.round(share * counts)), 0) for share in shares]
    return _assign_groups(labels, groups, np.stack([counts - sum(wanted), *wanted]), seed)


def _per_class(labels: Labels) -> npt.NDArray[np.float64]:
    return np.bincount(labels).astype(np.float64)


def _assign_groups(labels: Labels, groups: Labels, wanted: npt.NDArray[np.float64], seed: int) -> Labels:
    """Assign groups to sets, largest first and otherwise in random order.

    `wanted` [S, C] are images per set and class. Each group goes where it lowers the squared error over sets
    and classes most, as in scikit-learn's StratifiedGroupKFold; groups of one image meet `wanted` exactly.
    """
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.zeros((group.max(initial=-1) + 1, wanted.shape[1]))
    np.add.at(sizes, (group, labels), 1)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes.sum(axis=1)[order], kind="stable")]
    lacking = wanted.copy()
    assigned = np.empty(len(sizes), np.int64)
    for number in order:
        change = (sizes[number] * (sizes[number] - 2 * lacking)).sum(axis=1)
        assigned[number] = change.argmin()
        lacking[assigned[number]] -= sizes[number]
    return assigned[group]


def _check_sets(
    split: Split,
    labels: Labels,
    groups: Labels,
    classes: Sequence[str],
    set_names: Sequence[str | None] | None,
) -> None:
    for set_name, chosen in split.named():
        for label, name in enumerate(classes):
            if label in labels[chosen]:
                continue
            if set_names and set_name in set_names:
                raise UsageError(f"the {set_name} set of the data has no image of class {name!r}")
            own = labels == label
            raise UsageError(
                f"class {name!r} has no image in the {set_name} set: its {own.sum()} images count as "
                f"{len(np.unique(groups[own]))}, since copies and images of a patient stay together"
            )
