"""Class folders, their errors and the split."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import UsageError
from training import data


def make_folders(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (40, 30), number * 10).save(folder / name / f"{number}.png")
    return folder


def test_classes_are_the_sorted_folder_names(tmp_path):
    make_folders(tmp_path, {"b": 3, "a": 4, ".hidden": 1})
    (tmp_path / "a" / ".thumbnail.png").touch()
    listing = data.scan(tmp_path)
    assert listing.classes == ("a", "b")
    assert listing.labels.tolist() == [0] * 4 + [1] * 3
    assert all(
        path.parent.name == listing.classes[label]
        for path, label in zip(listing.paths, listing.labels, strict=True)
    )


def test_classes_can_be_named_in_another_order(tmp_path):
    make_folders(tmp_path, {"a": 3, "b": 3, "c": 3})
    listing = data.scan(tmp_path, classes=["c", "a"])
    assert listing.classes == ("c", "a")
    assert {path.parent.name for path in listing.paths} == {"a", "c"}


@pytest.mark.parametrize(
    ("counts", "classes", "message"),
    [
        ({}, None, "two or more"),
        ({"a": 5}, None, "found: a"),
        ({"a": 5, "b": 2}, None, "class 'b' has 2 images; at least 3"),
        ({"a": 5, "b": 5}, ["a", "x"], "no class folder 'x'; it has: a, b"),
        ({"a": 5, "b": 5}, ["a", "a"], "distinct"),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, counts, classes, message):
    make_folders(tmp_path, counts)
    with pytest.raises(UsageError, match=message) as caught:
        data.scan(tmp_path, classes=classes)
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        data.scan(tmp_path / "absent")


def test_unreadable_files_are_named_and_the_labels_still_fit(tmp_path):
    make_folders(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "0.png").write_bytes(b"not an image")
    dataset = data.load(data.scan(tmp_path), size=(16, 24))
    assert dataset.pixels.shape == (7, 1, 16, 24)
    assert dataset.labels.tolist() == [0] * 3 + [1] * 4
    assert [path for path, _ in dataset.failures] == [tmp_path / "a" / "0.png"]
    assert dataset.pixels[:3].mean(axis=(1, 2, 3)).round().tolist() == [10, 20, 30]


def test_too_few_readable_images(tmp_path):
    make_folders(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "1.png").write_bytes(b"")
    with pytest.raises(UsageError, match="class 'b' has 2 readable images"):
        data.load(data.scan(tmp_path), size=(16, 16))


def test_split_is_disjoint_complete_and_stratified():
    labels = np.repeat([0, 1, 2], [100, 40, 20])
    parts = data.split(labels, seed=3)
    assert np.array_equal(np.sort(np.concatenate([chosen for _, chosen in parts.named()])), np.arange(160))
    for chosen, share in ((parts.train, 0.7), (parts.validation, 0.15), (parts.test, 0.15)):
        assert np.bincount(labels[chosen]).tolist() == [100 * share, 40 * share, 20 * share]


def test_split_follows_the_seed():
    labels = np.repeat([0, 1], 50)
    first, again, other = (data.split(labels, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_even_the_smallest_class_is_in_every_set(count):
    labels = np.repeat([0, 1], [count, 30])
    for _, chosen in data.split(labels, seed=0).named():
        assert set(labels[chosen]) == {0, 1}
