"""A tiny model through the same export: the files, their hashes, the parity gate and atomicity."""

import hashlib
import json

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from engine.bundle import bundle as bundles
from engine.core.errors import ParityError, UsageError
from engine.scoring import canaries as scoring_canaries
from engine.scoring.ensemble import combine_logits
from tests.helpers.networks import random_pixels, tiny_network
from training import export
from training.phases.features import infer

CLASSES = ["left", "right"]
SIZE = (20, 28)


def members() -> list[export.ExportedMember]:
    return [
        export.ExportedMember(name=name, architecture="tiny", weight=weight, network=tiny_network(2, seed))
        for seed, (name, weight) in enumerate({"one": 0.4, "two": 0.6}.items())
    ]


def write(target, **changes):
    arguments = {
        "classes": CLASSES,
        "documents": {"report.html": "<p>ümlaut"},
        "canaries": random_pixels(32, SIZE),
        "check": random_pixels(3, SIZE, 1),
        "training": {"a": 1},
    }
    export.write_bundle(target, members(), **{**arguments, **changes})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    target = tmp_path_factory.mktemp("bundles") / "deep" / "bundle"
    write(target)
    return target


def test_the_engine_loads_it(bundle):
    loaded = bundles.load_bundle(bundle)
    assert (loaded.classes, loaded.size, loaded.weights) == (tuple(CLASSES), SIZE, (0.4, 0.6))
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_every_hash_matches(bundle):
    description = json.loads((bundle / "ensemble.json").read_text())
    files = [file for member in description["members"] for file in member["files"].values()]
    files += description["documents"]
    for file in [*files, description["canaries"]]:
        assert hashlib.sha256((bundle / file["path"]).read_bytes()).hexdigest() == file["sha256"]
    on_disk = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert on_disk == {"ensemble.json", description["canaries"]["path"], *(file["path"] for file in files)}


@pytest.mark.parametrize("count", [1, 5])
def test_graph_equals_torch_for_any_batch(bundle, count):
    session = onnxruntime.InferenceSession(bundle / "one.onnx", providers=["CPUExecutionProvider"])
    (graph_input,), (graph_output,) = session.get_inputs(), session.get_outputs()
    assert (graph_input.name, graph_input.type, graph_input.shape[1:]) == (
        "pixels",
        "tensor(uint8)",
        [1, *SIZE],
    )
    assert (graph_output.name, graph_output.type) == ("logits", "tensor(float)")
    pixels = random_pixels(count, SIZE, 7)
    (logits,) = session.run(None, {"pixels": pixels})
    assert np.allclose(logits, infer(tiny_network(2), torch.from_numpy(pixels)).numpy(), atol=1e-5)


def test_graph_does_not_name_the_machine_that_trained(bundle):
    assert b"export.py" not in (bundle / "one.onnx").read_bytes()
    assert b"models.py" not in (bundle / "one.onnx").read_bytes()


def test_safetensors_hold_the_module(bundle):
    states = load_file(bundle / "two.safetensors")
    expected = tiny_network(2, 1).state_dict()
    assert states.keys() == expected.keys()
    assert all(np.array_equal(states[name], value) for name, value in expected.items())


def test_canaries_equal_torch_and_the_ensemble(bundle):
    canaries = load_file(bundle / "canaries" / "canaries.safetensors")
    assert np.array_equal(canaries["pixels"], random_pixels(32, SIZE))
    assert canaries["logits"].shape == (2, 32, 2)
    _, expected = combine_logits(canaries["logits"], weights=[0.4, 0.6], temperatures=[1.0, 1.0])
    pixels, actual = scoring_canaries.load_canaries(bundles.load_bundle(bundle))
    assert np.array_equal(pixels, canaries["pixels"])
    assert np.array_equal(actual, expected)
    assert actual.dtype == canaries["logits"].dtype == np.float32


def test_a_temperature_is_recorded_and_used(tmp_path, quick_export):
    write(tmp_path / "bundle", temperature=2.0)
    loaded = bundles.load_bundle(tmp_path / "bundle")
    assert loaded.temperature == 2.0
    canaries = load_file(tmp_path / "bundle" / "canaries" / "canaries.safetensors")
    options = {"weights": [0.4, 0.6], "temperatures": [1.0, 1.0]}
    expected = combine_logits(canaries["logits"], **options, temperature=2.0)[1]
    assert np.array_equal(scoring_canaries.load_canaries(loaded)[1], expected)


@pytest.mark.parametrize("normalization", ["none", "imagenet"])
def test_normalization_is_recorded_and_baked_in(tmp_path, normalization):
    member = export.ExportedMember(
        name="one", architecture="tiny", weight=1.0, network=tiny_network(2, normalization=normalization)
    )
    export.write_bundle(
        tmp_path / "bundle",
        [member],
        classes=CLASSES,
        canaries=random_pixels(4, SIZE),
        check=random_pixels(4, SIZE, 1),  # the gate compares the graph with the network
        training={},
    )
    described = json.loads((tmp_path / "bundle" / "ensemble.json").read_text())["input"]["normalization"]
    assert described == (
        None if normalization == "none" else {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    )


def test_an_existing_target_is_refused(tmp_path):
    (tmp_path / "bundle").mkdir()
    with pytest.raises(UsageError, match="--overwrite"):
        write(tmp_path / "bundle")


def test_only_a_bundle_is_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(UsageError, match="not a bundle"):
        write(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "holiday.jpg").exists()


@pytest.fixture
def quick_export(monkeypatch, bundle):
    """The module's graphs again, without exporting: for tests of everything around the export."""
    graphs = {name: (bundle / name).read_bytes() for name in ("one.onnx", "two.onnx")}
    monkeypatch.setattr(
        export, "export_onnx", lambda network, file, size: file.write_bytes(graphs[file.name])
    )


def test_overwrite_replaces_a_bundle_completely(tmp_path, quick_export):
    write(tmp_path / "bundle")
    (tmp_path / "bundle" / "plans").mkdir()
    write(tmp_path / "bundle", overwrite=True, training={"a": 2})
    assert json.loads((tmp_path / "bundle" / "ensemble.json").read_text())["training"] == {"a": 2}
    assert not (tmp_path / "bundle" / "plans").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("there_before", [False, True])
def test_leftovers_of_a_killed_training_are_deleted(tmp_path, quick_export, there_before):
    if there_before:
        write(tmp_path / "bundle")
    for name in (".bundle.training-new", ".bundle.training-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.onnx").touch()
    write(tmp_path / "bundle", overwrite=True)
    assert bundles.load_bundle(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_failed_export_keeps_the_old_bundle(tmp_path, quick_export, monkeypatch, there_before):
    if there_before:
        write(tmp_path / "bundle", training={"a": 1})
    monkeypatch.setattr(export, "_fsync_folder", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "bundle", overwrite=True, training={"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] * there_before
    if there_before:
        assert bundles.load_bundle(tmp_path / "bundle")
        assert json.loads((tmp_path / "bundle" / "ensemble.json").read_text())["training"] == {"a": 1}


def test_a_graph_that_differs_is_refused(tmp_path, quick_export, monkeypatch):
    monkeypatch.setattr(export, "infer", lambda network, pixels: infer(tiny_network(2, 9), pixels))
    with pytest.raises(ParityError, match="one: the exported graph differs"):
        write(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
