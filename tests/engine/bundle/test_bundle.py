import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET

from engine.bundle.bundle import EnsembleDescription, load_bundle, serialize
from engine.core.errors import UsageError
from engine.core.json_records import from_builtins, from_json
from engine.runners.onnx import OnnxRunner
from tests.helpers.bundles import CLASSES, write_bundle


def test_a_written_bundle_is_loaded(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.classes == CLASSES
    assert loaded.size == (64, 64)
    assert loaded.weights == (0.6, 0.4)
    assert [member.name for member in loaded.members] == ["member0", "member1"]


def test_any_number_of_members_classes_and_any_size(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", classes=("a", "b"), size=(48, 96), weights=(0.2, 0.3, 0.5))
    loaded = load_bundle(path)
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
        (_set("format", value=7), "format is 7: allowed: 1"),
        (_set("members", value=[]), "members is empty"),
        (_set("members", 0, "weight", value=0.9), "add up to 1.3"),
        (
            _set("members", 0, "weight", value=float("nan")),
            r"members\[0\].weight is NaN: expected a finite number",
        ),
        (_set("members", 0, "weight", value="0.6"), r'members\[0\].weight is "0.6": expected a number'),
        (
            _set("members", 0, "name", value="../x"),
            r'members\[0\].name is "../x": expected a name of a-z, 0-9 and _',
        ),
        (_set("members", 1, "name", value="member0"), "same name"),
        (_set("members", 0, "temperature", value=0), r"members\[0\].temperature is 0: expected a number > 0"),
        (_set("members", 0, "files", value={}), "no onnx"),
        (_set("members", 0, "files", "onnx", "path", value="/etc/passwd"), "outside the bundle"),
        (_set("members", 0, "files", "onnx", "path", value="a/../../x"), "outside the bundle"),
        (
            _set("members", 0, "files", "onnx", "sha256", value="00"),
            r'members\[0\].files.onnx.sha256 is "00": expected 64 digits of 0-9',
        ),
        (_set("members", 0, "files", "onnx", "sha256", value="0" * 64), "altered"),
        (_set("members", 0, "files", "onnx", "path", value="nowhere.onnx"), "incomplete"),
        (_set("classes", value=["a"]), "two or more"),
        (_set("classes", value=["a", "a", "b"]), "two or more"),
        (_set("classes", value=["a", "b\n", "c"]), "two or more"),
        (_set("classes", value=7), "ensemble.json: classes is 7: expected a list"),
        (_set("input", "height", value=0), "input.height is 0: expected a whole number >= 1"),
        (_set("input", "dtype", value="float32"), 'input.dtype is "float32": allowed: uint8'),
        (_set("decode", value="sloppy"), 'decode is "sloppy": allowed: exact, fast'),
        (_set("canaries", value=None), "ensemble.json: canaries is null: expected an object"),
        (_set("surprise", value=1), "ensemble.json: surprise: unknown field"),
        (_set("members", 1, "wieght", value=1), r"members\[1\].wieght: unknown field"),
        (_set("members", 0, "files", "onnx", "path", value="a\0b"), "outside the bundle"),
        (_set("members", 0, "weight", value=10**400), "out of range"),
        (_set("temperature", value=float("inf")), "temperature is Infinity: expected a finite number"),
        (_set("input", "width", value=True), "input.width is true: expected a whole number"),
        (_set("input", "normalization", value={"mean": [0, 0, 0], "std": [1, 1, 1]}), "allowed: .0.485"),
        (_set("training", value=[]), r"training is \[\]: expected an object"),
    ],
)
def test_an_inconsistent_bundle_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    path = write_bundle(tmp_path / "b")
    data = json.loads((path / "ensemble.json").read_text())
    change(data)
    (path / "ensemble.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=complaint) as caught:
        load_bundle(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000, "\x00\xff"])
def test_a_half_written_description(tmp_path: Path, content: str) -> None:
    path = write_bundle(tmp_path / "b")
    (path / "ensemble.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError) as caught:
        load_bundle(path)
    assert "\n" not in str(caught.value)


def test_altered_and_missing_files(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b")
    model = path / "member1.onnx"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    with pytest.raises(UsageError, match=r"member1.onnx: altered"):
        load_bundle(path)
    model.unlink()
    with pytest.raises(UsageError, match=r"member1.onnx: No such file"):
        load_bundle(path)
    with pytest.raises(UsageError, match="make one with: python -m training"):
        load_bundle(tmp_path / "nowhere")


def test_a_graph_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b")
    data = json.loads((path / "ensemble.json").read_text())
    data["classes"].append("fourth")
    (path / "ensemble.json").write_text(json.dumps(data))
    loaded = load_bundle(path)
    with pytest.raises(UsageError, match=r"expected uint8 \[N, 1, 64, 64\] to float32 \[N, 4\]"):
        OnnxRunner(loaded.members[0], loaded)


@pytest.mark.parametrize("name", ["trained", "calibrated"])
def test_files_of_version_0_1_0_are_read_and_rewritten_identically(name: str) -> None:
    """`trained` by the training, `calibrated` after it with distances."""
    raw = (Path(__file__).parent / "written_by_0_1_0" / f"{name}.json").read_bytes()
    result = from_json(raw, EnsembleDescription)
    assert serialize(result) == raw
    assert (result.operating_points is UNSET) == (name == "trained")
    assert result.training["recipe"] == "whole network"


def test_fields_missing_in_older_versions_have_defaults() -> None:
    raw = (Path(__file__).parent / "written_by_0_1_0" / "small.json").read_bytes()
    older = {name: value for name, value in json.loads(raw).items() if name not in ("groups", "training")}
    result = from_builtins(older, EnsembleDescription)
    assert (result.groups, result.documents, result.training, result.operating_points) == ({}, (), {}, UNSET)
    assert result.input.normalization is None
    assert from_builtins(older | {"operating_points": None}, EnsembleDescription).operating_points is None
