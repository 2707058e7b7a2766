"""The folder beside the bundle: whose it is, when it may go on, what it holds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core.errors import UsageError
from training.settings import TrainingOptions
from training.state import TrainingState


@pytest.fixture
def options(tmp_path: Path) -> TrainingOptions:
    return TrainingOptions(data=tmp_path / "data", output=tmp_path / "bundle")


def begin(options: TrainingOptions, data: str = "abc") -> TrainingState:
    with TrainingState(options) as state:
        state.check()
        state.begin(data)
        (state.work / "checkpoint").touch()
    return state


def test_a_training_that_did_not_begin_leaves_no_folder(tmp_path, options):
    with TrainingState(options) as state:
        assert state.folder == tmp_path / "bundle.training"
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_training_is_kept_without_overwrite(options):
    begin(options)
    with (
        TrainingState(options) as state,
        pytest.raises(UsageError, match=r"unfinished training.*--resume.*--overwrite"),
    ):
        state.check()


def test_resume_keeps_the_checkpoints_and_overwrite_drops_them(options):
    state = begin(options)
    again = replace(options, resume=True, overwrite=True)  # there may be an older bundle to replace
    with TrainingState(again) as resumed:
        resumed.check()
        resumed.begin("abc")
        assert (state.work / "checkpoint").exists()
    with TrainingState(replace(options, overwrite=True)) as anew:
        anew.check()
        anew.begin("abc")
        assert not (state.work / "checkpoint").exists()


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"seed": 1}, "abc", "seed was 0, is 1"),
        ({"decode": "fast"}, "abc", "decode was 'exact', is 'fast'"),
        ({"members": ["resnet50"]}, "abc", "members was .*is"),
        ({}, "other", "images, labels or patients have changed"),
    ],
)
def test_another_training_is_not_resumed(options, change, data, message):
    begin(options)
    with (
        TrainingState(replace(options, resume=True, **change)) as state,
        pytest.raises(UsageError, match=message),
    ):
        state.begin(data)


def test_options_that_may_differ_on_resume(options):
    begin(options)
    with TrainingState(replace(options, resume=True, device="cpu")) as state:
        state.begin("abc")


def test_a_finished_training_can_be_followed_by_another(options):
    with TrainingState(options) as state:
        state.begin("abc")
        state.finish()
        assert not state.work.exists()
    with TrainingState(options) as state:
        state.check()
        state.begin("other")


def test_two_trainings_do_not_share_a_folder(options):
    with (
        TrainingState(options),
        pytest.raises(UsageError, match="another training is running"),
        TrainingState(options),
    ):
        pass


def test_a_foreign_folder_is_left_alone(tmp_path, options):
    (tmp_path / "bundle.training").mkdir()
    (tmp_path / "bundle.training" / "holiday.jpg").touch()
    with pytest.raises(UsageError, match="holds other files"), TrainingState(options):
        pass
    assert [path.name for path in (tmp_path / "bundle.training").iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize("content", ["", "[]", '{"options": {}}'])
def test_a_damaged_record_is_one_line(tmp_path, options, content):
    begin(options)
    (tmp_path / "bundle.training" / "training.json").write_text(content)
    with (
        TrainingState(options) as state,
        pytest.raises(UsageError, match=r"training\.json .*delete the folder"),
    ):
        state.check()


def test_tables_quote_unusual_names(options):
    with TrainingState(options) as state:
        path = state.write_table("split.csv", ("path", "label"), [("a,b\udcff.png", "normal")])
        assert path.read_text() == 'path,label\n"a,b\\udcff.png",normal\n'
        state.begin("abc")
        assert json.loads((state.folder / "training.json").read_text())["finished"] is False
