import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import load
from engine.errors import UsageError
from engine.runners.onnx import OnnxRunner
from tests.helpers.bundles import CLASSES, write_bundle


def test_what_was_written_is_loaded(bundle: Path) -> None:
    loaded = load(bundle)
    assert loaded.classes == CLASSES
    assert loaded.size == (64, 64)
    assert loaded.weights == (0.6, 0.4)
    assert [member.name for member in loaded.members] == ["member0", "member1"]


def test_any_number_of_members_classes_and_any_size(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", classes=("a", "b"), size=(48, 96), weights=(0.2, 0.3, 0.5))
    loaded = load(path)
    for member in loaded.members:
        with OnnxRunner(member, loaded) as runner:
            assert runner.input_shape == (48, 96)


def _set(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_set("format", value=7), "format 1"),
        (_set("members", value=[]), "members is empty"),
        (_set("members", 0, "weight", value=0.9), "add up to 1.3"),
        (_set("members", 0, "weight", value=float("nan")), "weight nan"),
        (_set("members", 0, "weight", value="0.6"), "weight '0.6'"),
        (_set("members", 0, "name", value="../x"), "member name '../x'"),
        (_set("members", 1, "name", value="member0"), "same name"),
        (_set("members", 0, "temperature", value=0), "temperature 0 is not a positive"),
        (_set("members", 0, "files", value={}), "no onnx"),
        (_set("members", 0, "files", "onnx", "path", value="/etc/passwd"), "outside the bundle"),
        (_set("members", 0, "files", "onnx", "path", value="a/../../x"), "outside the bundle"),
        (_set("members", 0, "files", "onnx", "sha256", value="00"), "sha256 '00'"),
        (_set("members", 0, "files", "onnx", "sha256", value="0" * 64), "altered"),
        (_set("members", 0, "files", "onnx", "path", value="nowhere.onnx"), "incomplete"),
        (_set("classes", value=["a"]), "two or more"),
        (_set("classes", value=["a", "a", "b"]), "two or more"),
        (_set("classes", value=["a", "b\n", "c"]), "two or more"),
        (_set("classes", value=7), "ensemble.json"),
        (_set("input", "height", value=0), "input of size"),
        (_set("input", "dtype", value="float32"), "not uint8"),
        (_set("decode", value="sloppy"), "allowed: exact, fast"),
        (_set("canaries", value=None), "ensemble.json"),
    ],
)
def test_a_bundle_that_makes_no_sense_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    path = write_bundle(tmp_path / "b")
    data = json.loads((path / "ensemble.json").read_text())
    change(data)
    (path / "ensemble.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=complaint) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000, "\x00\xff"])
def test_a_half_written_description(tmp_path: Path, content: str) -> None:
    path = write_bundle(tmp_path / "b")
    (path / "ensemble.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_altered_and_missing_files(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b")
    model = path / "member1.onnx"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    with pytest.raises(UsageError, match=r"member1.onnx: altered"):
        load(path)
    model.unlink()
    with pytest.raises(UsageError, match=r"member1.onnx: No such file"):
        load(path)
    with pytest.raises(UsageError, match="make one with: python -m training"):
        load(tmp_path / "nowhere")


def test_a_graph_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b")
    data = json.loads((path / "ensemble.json").read_text())
    data["classes"].append("fourth")
    (path / "ensemble.json").write_text(json.dumps(data))
    loaded = load(path)
    with pytest.raises(UsageError, match=r"expected uint8 \[N, 1, 64, 64\] to float32 \[N, 4\]"):
        OnnxRunner(loaded.members[0], loaded)
