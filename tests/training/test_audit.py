"""Groups of images, leaks of a data split and shortcuts, on constructed data."""

from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import UsageError
from training.audit import audit
from training.data import Dataset, FileFacts
from training.phases.features import no_progress


def make(labels: list[int], **changes) -> Dataset:
    """Every image a random texture of its own."""
    count = len(labels)
    rng = np.random.default_rng(0)
    fields = {
        "classes": ("a", "b", "c"),
        "paths": [Path(f"{number}.png") for number in range(count)],
        "labels": np.array(labels),
        "pixels": rng.integers(0, 256, (count, 1, 64, 64), dtype=np.uint8),
        "facts": [FileFacts(100, 80, 5000, "L", "png")] * count,
        "hashes": [str(number) for number in range(count)],
        "patients": None,
        "set_names": None,
        "failures": [],
    }
    return Dataset(**(fields | changes))


def test_groups_grow_from_files_to_copies_to_patients():
    dataset = make([0] * 6, patients=["x", None, None, "y", "x", "y"])
    dataset.hashes[1] = dataset.hashes[0]
    dataset.pixels[2] = dataset.pixels[1][:, :, ::-1]  # mirrored
    result = audit.group_images(dataset, no_progress)
    assert result.exact.tolist() == [0, 0, 1, 2, 3, 4]
    assert result.near.tolist() == [0, 0, 0, 1, 2, 3]
    assert result.together.tolist() == [0, 0, 0, 1, 0, 1]


def test_a_given_split_must_not_separate_a_group():
    result = audit.ImageGroups(*(np.array(groups) for groups in ([0, 1, 2, 3], [0, 0, 2, 3], [0, 0, 2, 2])))
    audit.check_data_split(["train", None, "test", "test"], result, allow_leak=False)
    audit.check_data_split(None, result, allow_leak=False)
    set_names = ["train", "test", "validation", "test"]
    with pytest.raises(
        UsageError, match=r"4 of 4 images are in 2 groups .*0 with identical.*1 with copies.*1 by"
    ):
        audit.check_data_split(set_names, result, allow_leak=False)
    audit.check_data_split(set_names, result, allow_leak=True)


def test_drop_copies_keeps_one_copy_and_none_with_two_labels():
    dataset = make([0, 0, 1, 1, 2, 2])
    near = np.array([0, 0, 1, 2, 2, 3])
    assert audit.drop_copies(dataset, audit.ImageGroups(near, near, near)).tolist() == [0, 2, 5]


def test_findings_are_counted():
    dataset = make(
        [0, 0, 1, 1, 2, 2], failures=[(Path("x"), "corrupt", "why"), (Path("y"), "corrupt", "why")]
    )
    groups = np.array([0, 0, 1, 2, 2, 3])
    result = audit.audit_findings(
        dataset, audit.ImageGroups(np.arange(6), groups, groups), ["train", "test", *["train"] * 4], seed=0
    )
    assert result["left_out"] == {"corrupt": 2}
    assert result["exact"] == {"groups": 0, "images": 0}
    assert result["near"] == {"groups": 2, "images": 4}
    assert result["near_conflicts"] == {"groups": 1, "images": 2}
    assert result["across"] == {"groups": 1, "images": 2}


@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("width", (100, 140, 180)),
        ("bytes", (5000, 9000, 14000)),
        ("mode", ("L", "RGB", "P")),
        ("format", ("png", "jpeg", "tiff")),
    ],
)
def test_shortcuts_are_found(attribute, values):
    labels = [0, 1, 2] * 12
    base = {"width": 100, "height": 80, "bytes": 5000, "mode": "L", "format": "png"}
    facts = [FileFacts(**(base | {attribute: values[label]})) for label in labels]
    result = audit.find_shortcuts(make(labels, facts=facts), np.arange(36), seed=0)
    assert result["suspicious"]
    assert result["balanced_accuracy"] == pytest.approx(1.0)


@pytest.mark.slow
def test_uninformative_sizes_are_no_shortcut():
    rng = np.random.default_rng(0)
    facts = [FileFacts(*rng.integers(50, 500, 3).tolist(), "L", "png") for _ in range(90)]
    result = audit.find_shortcuts(make([0, 1, 2] * 30, facts=facts), np.arange(90), seed=0)
    assert not result["suspicious"]
    assert result["balanced_accuracy"] < 0.5


def test_copies_do_not_count_as_evidence_of_a_shortcut():
    """Thirty copies of one image per class: its size tells nothing that one image wouldn't."""
    labels = [0, 1, 2] * 30
    facts = [FileFacts(100 + 40 * label, 80, 5000, "L", "png") for label in labels]
    result = audit.find_shortcuts(make(labels, facts=facts), np.array(labels), seed=0)
    assert result["balanced_accuracy"] is None
    assert not result["suspicious"]
