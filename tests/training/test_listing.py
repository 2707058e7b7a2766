"""Class folders as public sets have them, tables, and what is wrong with either."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.core.errors import UsageError
from training.listing import ImageListing, list_images


def make(root: Path, counts: dict[str, int]) -> Path:
    """Empty files: nothing is opened. Keys are folders below `root`."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / folder / f"{number}.JPEG").touch()
    return root


def by_class(listing: ImageListing) -> dict[str, int]:
    return {name: int((listing.labels == label).sum()) for label, name in enumerate(listing.classes)}


def one_line_error(message: str, *arguments, **options) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        list_images(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_sorted(tmp_path):
    make(tmp_path, {"b": 3, "a": 4, ".hidden": 1})
    (tmp_path / "a" / ".thumbnail.png").touch()
    listing = list_images(tmp_path)
    assert listing.classes == ("a", "b")
    assert listing.labels.tolist() == [0] * 4 + [1] * 3
    assert [path.parent.name for path in listing.paths] == ["a"] * 4 + ["b"] * 3
    assert listing.set_names is None


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (["Normal", "Osteopenia", "Osteoporosis"], ("normal", "osteopenia", "osteoporosis")),
        (["osteoporosis", "NORMAL"], ("normal", "osteoporosis")),
        (
            ["Osteoporosis Knee X-ray/normal", "Osteoporosis Knee X-ray/osteoporosis"],
            ("normal", "osteoporosis"),
        ),
        (["KNEE/normal", "SPINE/Healthy", "KNEE/OS", "SPINE/os"], ("normal", "osteoporosis")),
        (["normal/left", "normal/right/deeper", "op/left"], ("normal", "osteopenia")),
        (["0", "1", "2"], ("normal", "osteopenia", "osteoporosis")),
        (["0", "1", "2", "3", "4"], ("0", "1", "2", "3", "4")),  # grades of something else
        (["0", "1"], ("0", "1")),
        (["all/Left", "all/left ", "all/right"], ("Left", "right")),
        (["a/one", "a/two", "b"], ("a", "b")),
    ],
)
def test_class_folders_as_they_come(tmp_path, folders, found):
    listing = list_images(make(tmp_path, dict.fromkeys(folders, 3)))
    assert listing.classes == found
    assert sum(by_class(listing).values()) == 3 * len(folders)
    assert min(by_class(listing).values()) >= 3


def test_translated_names_are_reported(tmp_path):
    (note,) = list_images(make(tmp_path, {"healthy": 3, "OS": 3})).notes
    assert "OS as osteoporosis, healthy as normal" in note


def test_split_folders_in_any_place(tmp_path):
    folders = {"Train/normal": 3, "TEST/Normal": 2, "train/osteoporosis": 4, "osteoporosis/valid": 1}
    listing = list_images(make(tmp_path, folders))
    result = {
        str(path.relative_to(tmp_path).parent): set_name
        for path, set_name in zip(listing.paths, listing.set_names, strict=True)
    }
    assert result == {
        "Train/normal": "train",
        "TEST/Normal": "test",
        "train/osteoporosis": "train",
        "osteoporosis/valid": "validation",
    }
    assert by_class(listing) == {"normal": 5, "osteoporosis": 5}


def test_classes_can_be_named_in_another_order(tmp_path):
    make(tmp_path, {"a": 3, "B": 3, "c": 3})
    listing = list_images(tmp_path, classes=["c", "b"])
    assert listing.classes == ("c", "b")
    assert by_class(listing) == {"c": 3, "b": 3}
    assert listing.notes == ["skipped 3 files outside the class folders, in: a (3)"]


def test_files_elsewhere_are_counted(tmp_path):
    make(tmp_path, {"x/normal": 3, "x/osteoporosis": 3, "masks": 2})
    (tmp_path / "README.md").touch()
    (note,) = list_images(tmp_path).notes
    assert note == "skipped 3 files outside the class folders, in: . (1), masks (2)"


@pytest.mark.parametrize(
    ("counts", "classes", "message"),
    [
        ({}, None, "at least two class folders"),
        ({"a": 5}, None, "there are: a"),
        ({"a": 5, "b": 2}, None, "class 'b' has 2 images; at least 3"),
        ({"a": 5, "b": 0}, None, "there are: a"),
        ({"a": 5, "b": 5}, ["a", "x"], "no class folder 'x'; its folders are: a, b"),
        ({"a": 5, "b": 5}, ["a", "A"], "distinct"),
        ({"normal": 5, "osteoporosis": 5, "severe": 5}, None, "'severe' is beside.*--classes"),
        ({"a\nb": 5, "c": 5}, None, "printable"),
        ({"a" * 65: 5, "c": 5}, None, "64"),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, counts, classes, message):
    one_line_error(message, make(tmp_path, counts), classes=classes)


def test_missing_folder(tmp_path):
    one_line_error("no such file or folder", tmp_path / "absent")


def write_csv(folder: Path, **columns) -> Path:
    pd.DataFrame(columns).to_csv(folder / "labels.csv", index=False)
    return folder / "labels.csv"


PATHS = [f"{number}.png" for number in range(9)]


def test_a_table(tmp_path):
    source = write_csv(
        tmp_path,
        path=PATHS,
        label=["OS", "normal", " Osteopenia "] * 3,
        patient=["7", "8", None] * 3,
        split=["train"] * 6 + ["Val", "test", "TEST"],
    )
    listing = list_images(source)
    assert listing.classes == ("normal", "osteopenia", "osteoporosis")
    assert listing.labels.tolist() == [2, 0, 1] * 3
    assert listing.paths[0] == tmp_path / "0.png"
    assert listing.patients == ["7", "8", None] * 3
    assert listing.set_names == ["train"] * 6 + ["validation", "test", "test"]


def test_a_table_with_other_columns(tmp_path):
    source = write_csv(tmp_path, file=PATHS, grade=[0, 1, 2] * 3)
    listing = list_images(source, path_column="file", label_column="grade", root=Path("/images"))
    assert listing.paths[4] == Path("/images/4.png")
    assert listing.classes == ("normal", "osteopenia", "osteoporosis")
    assert list_images(source, label_column="grade", classes=["2", "1", "0"]).labels.tolist() == [2, 1, 0] * 3
    assert listing.patients is None
    assert listing.set_names is None


def test_a_parquet_table(tmp_path):
    pd.DataFrame({"path": PATHS, "label": ["x", "y", "y"] * 3}).to_parquet(tmp_path / "labels.parquet")
    assert np.array_equal(list_images(tmp_path / "labels.parquet").labels, [0, 1, 1] * 3)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"class": ["a", "b", "b"] * 3}, {}, "no column 'label'; it has 'class'; name one with"),
        ({"label": ["normal", "osteoporosis", "osteoporsis"] * 3}, {"classes": ["normal", "osteoporosis"]},
         "row 3: label 'osteoporsis' is not one of normal, osteoporosis; did you mean osteoporosis"),
        ({"label": ["a", "b", None] * 3}, {}, "row 3: label '' is not one of a, b"),
        ({"label": ["a"] * 9}, {}, "at least two labels"),
        ({"label": ["a", "b", "b"] * 2 + ["a", "b", "c"]}, {}, "class 'c' has 1 images"),
        ({"label": ["a", "b", "b"] * 3, "split": ["train"] * 8 + ["exam"]}, {}, "row 9: split 'exam'"),
    ],
)  # fmt: skip
def test_bad_tables_are_one_clear_line(tmp_path, columns, options, message):
    one_line_error(message, write_csv(tmp_path, path=PATHS, **columns), **options)


def test_a_list_without_labels(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\n")
    one_line_error("no column 'label'; it has only paths", tmp_path / "list.txt")
