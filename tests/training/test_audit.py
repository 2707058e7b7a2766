"""Families of images, leaks between given sets, shortcuts: on sets made by hand."""

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
    given = {
        "classes": ("a", "b", "c"),
        "paths": [Path(f"{number}.png") for number in range(count)],
        "labels": np.array(labels),
        "pixels": rng.integers(0, 256, (count, 1, 64, 64), dtype=np.uint8),
        "facts": [FileFacts(100, 80, 5000, "L", "png")] * count,
        "hashes": [str(number) for number in range(count)],
        "patients": None,
        "given": None,
        "failures": [],
    }
    return Dataset(**(given | changes))


def test_families_grow_from_files_to_copies_to_patients():
    dataset = make([0] * 6, patients=["x", None, None, "y", "x", "y"])
    dataset.hashes[1] = dataset.hashes[0]
    dataset.pixels[2] = dataset.pixels[1][:, :, ::-1]  # mirrored
    found = audit.group_images(dataset, no_progress)
    assert found.exact.tolist() == [0, 0, 1, 2, 3, 4]
    assert found.near.tolist() == [0, 0, 0, 1, 2, 3]
    assert found.together.tolist() == [0, 0, 0, 1, 0, 1]


def test_a_given_split_may_not_separate_a_family():
    found = audit.ImageGroups(*(np.array(groups) for groups in ([0, 1, 2, 3], [0, 0, 2, 3], [0, 0, 2, 2])))
    audit.check_given_split(["train", None, "test", "test"], found, allow_leak=False)
    audit.check_given_split(None, found, allow_leak=False)
    given = ["train", "test", "validation", "test"]
    with pytest.raises(
        UsageError, match=r"4 of 4 images are in 2 groups .*0 with identical.*1 with copies.*1 by"
    ):
        audit.check_given_split(given, found, allow_leak=False)
    audit.check_given_split(given, found, allow_leak=True)


def test_copies_go_and_contradictions_go_whole():
    dataset = make([0, 0, 1, 1, 2, 2])
    near = np.array([0, 0, 1, 2, 2, 3])
    assert audit.drop_copies(dataset, audit.ImageGroups(near, near, near)).tolist() == [0, 2, 5]


def test_the_report_counts():
    dataset = make(
        [0, 0, 1, 1, 2, 2], failures=[(Path("x"), "corrupt", "why"), (Path("y"), "corrupt", "why")]
    )
    groups = np.array([0, 0, 1, 2, 2, 3])
    found = audit.audit_findings(
        dataset, audit.ImageGroups(np.arange(6), groups, groups), ["train", "test", *["train"] * 4], seed=0
    )
    assert found["left_out"] == {"corrupt": 2}
    assert found["exact"] == {"groups": 0, "images": 0}
    assert found["near"] == {"groups": 2, "images": 4}
    assert found["near_conflicts"] == {"groups": 1, "images": 2}
    assert found["across"] == {"groups": 1, "images": 2}


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
    found = audit.find_shortcuts(make(labels, facts=facts), np.arange(36), seed=0)
    assert found["suspicious"]
    assert found["balanced_accuracy"] == pytest.approx(1.0)


def test_sizes_that_tell_nothing_are_no_shortcut():
    rng = np.random.default_rng(0)
    facts = [FileFacts(*rng.integers(50, 500, 3).tolist(), "L", "png") for _ in range(90)]
    found = audit.find_shortcuts(make([0, 1, 2] * 30, facts=facts), np.arange(90), seed=0)
    assert not found["suspicious"]
    assert found["balanced_accuracy"] < 0.5


def test_copies_do_not_count_as_evidence_of_a_shortcut():
    """Thirty copies of one image per class: its size tells nothing that one image wouldn't."""
    labels = [0, 1, 2] * 30
    facts = [FileFacts(100 + 40 * label, 80, 5000, "L", "png") for label in labels]
    found = audit.find_shortcuts(make(labels, facts=facts), np.array(labels), seed=0)
    assert found["balanced_accuracy"] is None
    assert not found["suspicious"]
