"""Find copies, label conflicts, leaks and shortcuts in labelled images before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedKFold, permutation_test_score
from sklearn.tree import DecisionTreeClassifier

from engine.core.errors import UsageError
from training.audit.duplicates import connected_components, near_pairs
from training.data import Dataset, FileFacts, Progress
from training.listing import Labels

PERMUTATIONS = 100
MAX_SHORTCUT_P = 0.1  # largest balanced accuracy above chance of a model of file properties
_NUMERIC_FACTS = ("width", "height", "bytes")
_TEXT_FACTS = ("mode", "format")


@dataclass(frozen=True)
class ImageGroups:
    """The groups of related images: group numbers [N], each partition coarser than the one before."""

    exact: Labels  # identical files
    near: Labels  # also copies that were re-encoded, turned, mirrored, shifted, zoomed or brightened
    together: Labels  # also images of one patient

    def take(self, positions: Labels) -> ImageGroups:
        return ImageGroups(self.exact[positions], self.near[positions], self.together[positions])


def group_images(dataset: Dataset, progress: Progress) -> ImageGroups:
    """Group identical files, near duplicates and patients; `progress` counts images."""
    count = len(dataset)
    exact = connected_components(count, _link_equal_keys(dataset.hashes))
    pairs = [(pair.first, pair.second) for pair in near_pairs(dataset.pixels, progress)]
    near = connected_components(count, [*_link_equal_keys(exact.tolist()), *pairs])
    patients = _link_equal_keys(dataset.patients or ())
    return ImageGroups(
        exact, near, connected_components(count, [*_link_equal_keys(near.tolist()), *patients])
    )


def _link_equal_keys(keys: Iterable[Any]) -> list[tuple[int, int]]:
    """Return pairs that connect all positions with the same key; None is not a key."""
    first: dict[Any, int] = {}
    return [
        (first.setdefault(key, position), position) for position, key in enumerate(keys) if key is not None
    ]


def check_data_split(
    set_names: Sequence[str | None] | None, groups: ImageGroups, *, allow_leak: bool
) -> None:
    """Raise UsageError if the data's split has copies of an image, or one patient, on several sides."""
    if set_names is None or allow_leak:
        return
    sides = [name or "train" for name in set_names]
    leaks, images = _count_spanning(groups.together, sides)
    if leaks:
        exact, _ = _count_spanning(groups.exact, sides)
        near, _ = _count_spanning(groups.near, sides)
        raise UsageError(
            f"the split of the data leaks: {images} of {len(sides)} images are in {_count_groups(leaks)} "
            f"on more than one side ({exact} with identical files, {near} with copies of any kind, "
            f"{leaks - near} by patient alone); fix the split, or continue with --allow-leak"
        )


def _count_spanning(groups: Labels, values: Sequence[Any]) -> tuple[int, int]:
    """Count the groups that hold more than one value, and their images."""
    distinct: dict[int, set[Any]] = {}
    for group, value in zip(groups.tolist(), values, strict=True):
        distinct.setdefault(group, set()).add(value)
    mixed = {group for group, values in distinct.items() if len(values) > 1}
    return len(mixed), sum(group in mixed for group in groups.tolist())


def _count_repeated(groups: Labels) -> tuple[int, int]:
    """Count the groups that hold more than one image, and their images."""
    _, sizes = np.unique(groups, return_counts=True)
    return int((sizes > 1).sum()), int(sizes[sizes > 1].sum())


def drop_copies(dataset: Dataset, groups: ImageGroups) -> Labels:
    """Return the positions to keep: the first of each near group, none of a group with two labels."""
    labels: dict[int, set[int]] = {}
    for group, label in zip(groups.near.tolist(), dataset.labels.tolist(), strict=True):
        labels.setdefault(group, set()).add(label)
    _, first = np.unique(groups.near, return_index=True)
    return np.sort([position for position in first if len(labels[int(groups.near[position])]) == 1])


def audit_findings(
    dataset: Dataset, groups: ImageGroups, sets: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """Return the findings, JSON-ready, without file names; `sets` [N] is the split in use."""
    labels = dataset.labels.tolist()
    pairs = {
        "exact": _count_repeated(groups.exact),
        "near": _count_repeated(groups.near),
        "conflicts": _count_spanning(groups.exact, labels),
        "near_conflicts": _count_spanning(groups.near, labels),
        "across": _count_spanning(groups.together, sets),
    }
    return {
        "images": len(dataset),
        "left_out": dict(Counter(status for _, status, _ in dataset.failures)),
        **{name: {"groups": count, "images": images} for name, (count, images) in pairs.items()},
        "patients": len(set(dataset.patients) - {None}) if dataset.patients else None,
        "given_split": dataset.set_names is not None,
        "shortcuts": find_shortcuts(dataset, groups.together, seed=seed),
    }


def find_shortcuts(dataset: Dataset, groups: Labels, *, seed: int) -> dict[str, Any]:
    """Test whether width, height, bytes, mode and format of the files predict the class.

    A small decision tree is cross-validated on one image of each group and compared with shuffled labels
    (Ojala and Garriga 2010, "Permutation tests for studying classifier performance"). If the accuracy is
    well above chance, a network can learn the scanner instead of the bone.
    """
    _, first = np.unique(groups, return_index=True)
    labels = dataset.labels[first]
    chance = 1 / len(dataset.classes)
    result = {"chance": chance, "attributes": _attributes(dataset)}
    smallest = int(np.bincount(labels, minlength=len(dataset.classes)).min())
    if smallest < 2:
        return {"balanced_accuracy": None, "p_value": None, "suspicious": False, **result}
    tree = DecisionTreeClassifier(max_depth=3, min_samples_leaf=3, class_weight="balanced", random_state=seed)
    score, _, p_value = permutation_test_score(
        tree,
        _file_features([dataset.facts[position] for position in first]),
        labels,
        cv=StratifiedKFold(min(5, smallest), shuffle=True, random_state=seed),
        scoring="balanced_accuracy",
        n_permutations=PERMUTATIONS,
        random_state=seed,
    )
    suspicious = bool(p_value < 0.02 and score > chance + MAX_SHORTCUT_P)
    return {
        "balanced_accuracy": float(score),
        "p_value": float(p_value),
        "suspicious": suspicious,
        **result,
    }


def _file_features(facts: Sequence[FileFacts]) -> npt.NDArray[np.float64]:
    """Return one row per file: sizes, aspect ratio, bytes per pixel, mode and format as numbers."""
    texts = {name: sorted({getattr(file, name) for file in facts}) for name in _TEXT_FACTS}
    rows = [
        [
            *(getattr(file, name) for name in _NUMERIC_FACTS),
            file.width / file.height,
            file.bytes / (file.width * file.height),
            *(texts[name].index(getattr(file, name)) for name in _TEXT_FACTS),
        ]
        for file in facts
    ]
    return np.array(rows, np.float64)


def _attributes(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Return quartiles of numbers and counts of texts, by attribute and class."""
    by_class = {
        name: [file for file, label in zip(dataset.facts, dataset.labels, strict=True) if label == position]
        for position, name in enumerate(dataset.classes)
    }
    quartiles = {
        attribute: {
            name: np.quantile([getattr(file, attribute) for file in facts], [0.25, 0.5, 0.75]).tolist()
            for name, facts in by_class.items()
        }
        for attribute in _NUMERIC_FACTS
    }
    counts = {
        attribute: {
            name: dict(Counter(getattr(file, attribute) for file in facts))
            for name, facts in by_class.items()
        }
        for attribute in _TEXT_FACTS
    }
    return quartiles | counts


def describe_findings(findings: dict[str, Any]) -> list[str]:
    """Describe the findings in one line each; no findings give no lines."""
    lines = []
    if findings["near"]["groups"]:
        identical = _count_groups(findings["exact"]["groups"])
        lines.append(
            f"{findings['near']['images']} images are in {_count_groups(findings['near']['groups'])} "
            f"of copies, identical or changed; {identical} of identical files"
        )
    if findings["near_conflicts"]["groups"]:
        identical = _count_groups(findings["conflicts"]["groups"])
        lines.append(
            f"warning: {_count_groups(findings['near_conflicts']['groups'])} of copies with "
            f"contradicting labels; {identical} of identical files"
        )
    if findings["dropped"]:
        lines.append(
            f"{findings['dropped']} images were left out as copies or for their contradicting labels"
        )
    if findings["across"]["groups"]:
        lines.append(
            f"warning: the split leaks: {findings['across']['images']} images are in "
            f"{_count_groups(findings['across']['groups'])} on more than one side of it"
        )
    shortcut = findings["shortcuts"]
    if shortcut["suspicious"]:
        lines.append(
            "warning: size, bytes, mode and format of the files alone predict the class with "
            f"a balanced accuracy of {shortcut['balanced_accuracy']:.2f} (chance {shortcut['chance']:.2f}); "
            "a network may learn this shortcut"
        )
    return lines


def _count_groups(count: int) -> str:
    return f"{count} group" if count == 1 else f"{count} groups"
