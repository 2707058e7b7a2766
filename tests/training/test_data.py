"""Decoding of what was listed: nothing silently skipped, labels stay with their images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.core.errors import UsageError
from engine.pipeline.load_pixels import load_pixels
from tests.helpers.images import smooth
from training import data
from training.__main__ import _StepProgress
from training.listing import list_images
from training.phases.features import no_progress
from training.recipe import prepare_data
from training.settings import TrainingOptions
from training.state import TrainingState


def make_folders(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (40, 30), number * 10).save(folder / name / f"{number}.png")
    return folder


def load(folder: Path) -> data.Dataset:
    return data.load_dataset(list_images(folder), size=(16, 24), progress=no_progress)


def test_unreadable_files_are_listed_and_the_labels_still_fit(tmp_path):
    make_folders(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "0.png").write_bytes(b"not an image")
    (tmp_path / "b" / "Thumbs.db").write_bytes(b"")
    done = []
    dataset = data.load_dataset(list_images(tmp_path), size=(16, 24), progress=done.append)
    assert dataset.pixels.shape == (7, 1, 16, 24)
    assert dataset.labels.tolist() == [0] * 3 + [1] * 4
    assert dataset.pixels[:3].mean(axis=(1, 2, 3)).round().tolist() == [10, 20, 30]
    assert [(path.name, status) for path, status, _ in dataset.failures] == [
        ("0.png", "unsupported"),
        ("Thumbs.db", "empty"),
    ]
    assert sum(done) == 9


def test_too_few_readable_images(tmp_path):
    make_folders(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "1.png").write_bytes(b"")
    with pytest.raises(UsageError, match="class 'b' has 2 readable images"):
        load(tmp_path)


def test_files_are_described(tmp_path):
    make_folders(tmp_path, {"a": 3, "b": 3})
    Image.new("RGB", (50, 20)).save(tmp_path / "b" / "0.jpg")
    Image.fromarray(np.zeros((20, 60), np.uint16)).save(tmp_path / "b" / "1.png")
    facts = {(fact.width, fact.height, fact.mode, fact.format) for fact in load(tmp_path).facts}
    assert facts == {(40, 30, "L", "png"), (50, 20, "RGB", "jpeg"), (60, 20, "I;16", "png")}


def test_the_fingerprint_follows_files_and_labels(tmp_path):
    dataset = load(make_folders(tmp_path / "one", {"a": 3, "b": 3}))
    assert load(tmp_path / "one").sha256 == dataset.sha256
    (tmp_path / "one" / "a" / "2.png").rename(tmp_path / "one" / "b" / "3.png")
    (tmp_path / "one" / "b" / "0.png").rename(tmp_path / "one" / "a" / "3.png")
    assert load(tmp_path / "one").sha256 != dataset.sha256


def test_take_keeps_rows_together(tmp_path):
    dataset = load(make_folders(tmp_path, {"a": 4, "b": 3}))
    taken = dataset.take(np.array([5, 1]))
    assert [path.relative_to(tmp_path).as_posix() for path in taken.paths] == ["b/1.png", "a/1.png"]
    assert taken.labels.tolist() == [1, 0]
    assert np.array_equal(taken.pixels, dataset.pixels[[5, 1]])
    assert taken.hashes == [dataset.hashes[5], dataset.hashes[1]]
    assert len(taken) == 2


def test_training_uses_the_decoding_of_its_bundle(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(4):
            picture = Image.fromarray(smooth(150, 170, seed=10 * ord(name) + number))
            picture.save(tmp_path / "in" / name / f"{number}.jpg")
    steps = _StepProgress()
    options = TrainingOptions(
        data=tmp_path / "in", output=tmp_path / "b", size=(32, 48), check_data=True, decode="fast"
    )
    with TrainingState(options) as state:
        dataset = prepare_data(options, state, steps.step, steps.note).dataset
    exact, fast = (load_pixels(dataset.paths, size=(32, 48), decode=how).pixels for how in ("exact", "fast"))
    assert np.array_equal(dataset.pixels, fast)
    assert not np.array_equal(dataset.pixels, exact)
