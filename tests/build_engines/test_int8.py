"""INT8 graphs for the CPU: small convolutional members through the real quantizer, gate and engine."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper
from PIL import Image

import engine
from build_engines import parity
from build_engines.int8 import quantize_to_int8
from build_engines.options import BuildOptions
from engine.bundle import bundle as bundles
from engine.bundle import plans
from engine.calibrate import __main__ as calibrate
from engine.core import hardware
from engine.core.errors import EngineError, ParityError, UsageError
from engine.runners.select import open_runner, select_runner
from tests.helpers.bundles import CLASSES, write_bundle
from tests.helpers.images import write_images
from tests.helpers.processes import run_module

INT8 = ("--target", "onnx", "--precision", "int8")


# channels in and out, groups
LAYERS = [(1, 8, 1), (8, 16, 1), (16, 16, 4), (16, 24, 1), (24, 32, 1)]


def write_labelled(folder: Path, count: int) -> Path:
    """Dark, striped and bright noise, in class folders."""
    rng = np.random.default_rng(5)
    for index in range(count):
        level, contrast = [(20, 0), (20, 120), (140, 0)][index % 3]
        samples = level + rng.integers(0, 60, (64, 64)) + contrast * (np.arange(64) // 4 % 2)
        target = folder / CLASSES[index % 3] / f"{index:02}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(samples.astype(np.uint8)).save(target)
    return folder


def write_network(path: Path, images: parity.CalibrationImages, seed: int) -> None:
    """Five convolutions, each pooled, one grouped, and a pooled head, fitted to the labels of `images`."""
    rng = np.random.default_rng(seed)
    arrays = {
        "scale": np.array(255, np.float32),
        "axes": np.array([2, 3]),
        "hidden": rng.normal(0, 0.3, (32, 16)).astype(np.float32),
        "out": np.zeros((16, len(CLASSES)), np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["samples"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["samples", "scale"], ["x0"]),
    ]
    pool = {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}
    for index, (inside, out, groups) in enumerate(LAYERS):
        spread = np.sqrt(2 * groups / (9 * inside))
        arrays[f"w{index}"] = rng.normal(0, spread, (out, inside // groups, 3, 3)).astype(np.float32)
        arrays[f"b{index}"] = rng.normal(0, 0.1, out).astype(np.float32)
        names = [f"x{index}", f"w{index}", f"b{index}"]
        sizes = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2], "group": groups}
        nodes += [
            helper.make_node("Conv", names, [f"c{index}"], **sizes),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"]),
            helper.make_node("AveragePool", [f"r{index}"], [f"x{index + 1}"], **pool),
        ]
    nodes += [
        helper.make_node("ReduceMean", [f"x{len(LAYERS)}", "axes"], ["features"], keepdims=0),
        helper.make_node("Gemm", ["features", "hidden"], ["h"]),
        helper.make_node("Relu", ["h"], ["positive"]),
        helper.make_node("Gemm", ["positive", "out"], ["logits"]),
    ]

    def save(output: str, width: int) -> None:
        graph = helper.make_graph(
            nodes,
            "network",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 1, 64, 64])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", width])],
            [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()],
        )
        opsets = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)

    save("positive", 16)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"pixels": images.pixels})
    wanted = 8 * np.eye(len(CLASSES), dtype=np.float32)[images.labels]
    arrays["out"] = np.linalg.lstsq(result, wanted, rcond=None)[0]
    save("logits", len(CLASSES))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A bundle as tests have it, its members replaced by small convolutional networks."""
    folder = write_bundle(tmp_path_factory.mktemp("int8") / "bundle")
    options = BuildOptions(bundle=folder, calibration=write_labelled(folder.parent / "images", 72))
    images = parity.load_images(bundles.load_bundle(folder), options)
    description = json.loads((folder / "ensemble.json").read_text())
    for seed, member in enumerate(description["members"]):
        file = folder / member["files"]["onnx"]["path"]
        write_network(file, images, seed)
        member["files"]["onnx"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "ensemble.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def built(small) -> Path:
    images = ("--calibration", small.parent / "images")
    run = run_module("build_engines", [small, *INT8, *images], folder=small.parent, timeout_s=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(small / "plans" / "onnx-int8")
    assert "calibrating on 36, comparing on 36 images: images given, with labels" in run.stderr
    assert "ensemble" in run.stderr
    return small


def test_each_graph_has_a_correct_passport(built):
    bundle = bundles.load_bundle(built)
    for member, plan in zip(bundle.members, plans.load_int8_graphs(bundle), strict=True):
        passport = plan.passport
        assert hashlib.sha256(plan.read()).hexdigest() == passport.plan_sha256
        assert passport.reference_sha256 == member.files["onnx"].sha256
        assert passport.version == onnxruntime.__version__
        assert passport.options["calibration_images"] == 36
        assert passport.options["weight_bits"] == (8 if hardware.has_vnni() else 7)
        assert len(passport.options["calibration_sha256"]) == 64
        for result in (passport.parity, passport.ensemble):
            assert result.passed
            assert (result.images, result.counted) == (36, 36)
            assert result.max > 0
            assert abs(result.auc - result.auc_reference) <= 0.002
            assert result.labels == "labels of the images"
        graph = onnx.load_model_from_string(plan.read()).graph
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        made_by = {output: node for node in graph.node for output in node.output}
        layers = {node.name: node for node in graph.node}
        assert [layer.type for layer in passport.layers] == ["Conv"] * 5 + ["Gemm"] * 2
        assert "AveragePool" not in {node.op_type for node in graph.node}
        assert passport.layers[0].precision == passport.layers[-1].precision == "FLOAT"
        assert "INT8" in {layer.precision for layer in passport.layers}
        for layer in passport.layers:
            source = made_by.get(layers[layer.name].input[1])
            quantized = source is not None and kinds[source.input[0]] == onnx.TensorProto.INT8
            assert quantized == (layer.precision == "INT8"), layer


def test_seven_bits_never_overflow_where_there_is_no_vnni(small):
    pixels = np.random.default_rng(3).integers(0, 256, (8, 1, 64, 64), np.uint8)
    data = (small / "member0.onnx").read_bytes()
    graph = quantize_to_int8(data, pixels, lambda _: True, bits=7).graph
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load_model_from_string(graph).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    assert weights
    assert max(int(np.abs(tensor.astype(int)).max()) for tensor in weights) == 64


def test_first_layers_stay_in_float32_until_the_graph_is_accurate(small):
    pixels = np.random.default_rng(3).integers(0, 256, (8, 1, 64, 64), np.uint8)
    data = (small / "member0.onnx").read_bytes()
    for answers, kept in [([True], 1), ([False, True], 2), ([False, False, False], 4)]:
        left = iter(answers)
        layers = quantize_to_int8(data, pixels, lambda _: next(left), bits=8).layers  # noqa: B023
        assert [layer.precision for layer in layers] == ["FLOAT"] * kept + ["INT8"] * (5 - kept) + [
            "FLOAT"
        ] * 2


def test_the_engine_runs_int8_graphs_and_records_them(built, archive, engine_run):
    arguments = [archive, "-b", built, "-o", "results", "--device", "cpu", "--precision", "int8"]
    run = engine_run(*arguments)
    assert run.returncode == 0, run.stderr
    assert "INT8" in run.stderr
    results = archive.parent / "results"
    recorded = json.loads((results / "_run.json").read_text())
    options = recorded["result_options"]
    result = plans.load_int8_graphs(bundles.load_bundle(built))
    hashes = {plan.passport.member: plan.passport.plan_sha256 for plan in result}
    assert (options["precision"], options["plans"]) == ("int8", hashes)
    part = pq.read_metadata(results / "part-00000.parquet").metadata
    assert json.loads(part[b"engine"])["result_options"]["plans"] == hashes
    assert engine_run(*arguments[:-2], "--precision", "fp32").returncode == 2
    run = engine_run(*arguments[:3], "-o", "float", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    read = [engine.read_results(archive.parent / name) for name in ("results", "float")]
    difference = np.abs(read[0]["p_normal"] - read[1]["p_normal"])
    assert 0 < difference.max() < 0.2


def test_missing_altered_or_foreign_graphs_are_refused_with_the_build_command(built, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(built, tmp_path / "bundle"))
    bundle = bundles.load_bundle(folder)
    command = f"python -m build_engines {folder} --target onnx --precision int8"

    def opened() -> None:
        choice = select_runner("auto", "cpu", bundle, precision="int8", batch_size=None)
        for member in bundle.members:
            open_runner(choice, bundle, member).close()

    def refused(why: str) -> None:
        with pytest.raises(UsageError) as caught:
            opened()
        assert why in str(caught.value)
        assert command in str(caught.value)
        assert "\n" not in str(caught.value)

    opened()
    with monkeypatch.context() as patched:
        patched.setattr(plans, "has_vnni", lambda: False)
        if plans.load_plan(folder / "plans/onnx-int8/member0.json").passport.options["weight_bits"] == 8:
            refused("built for a CPU with VNNI")
    graph = folder / "plans" / "onnx-int8" / "member1.onnx"
    passport = graph.with_suffix(".json")
    text = passport.read_text()
    for changed, why in (
        ({"precision": "fp16"}, "not an INT8 graph"),
        ({"parity": json.loads(text)["parity"] | {"agreement": 0.5}}, "did not pass the comparison"),
        ({"ensemble": None}, "did not pass the comparison"),
        ({"options": []}, "options is []: expected an object"),
    ):
        passport.write_text(json.dumps(json.loads(text) | changed))
        refused(why)
    passport.write_text(text)
    graph.write_bytes(graph.read_bytes() + b"\0")
    refused("altered")
    passport.write_text(passport.read_text().replace(bundle.members[1].files["onnx"].sha256, "0" * 64))
    refused("made from another model")
    passport.unlink()
    refused("has no INT8 graphs")


def test_a_graph_that_fails_the_parity_check_is_not_installed(built):
    before = {path.name: path.stat().st_mtime_ns for path in (built / "plans" / "onnx-int8").iterdir()}
    run = run_module("build_engines", [built, *INT8, "--limit", "1e-9"], folder=built.parent, timeout_s=300)
    assert run.returncode == 4
    assert "synthetic canaries" in run.stderr
    assert "error: member0: its graph in int8 differs from float32" in run.stderr.splitlines()[-1]
    after = {path.name: path.stat().st_mtime_ns for path in (built / "plans" / "onnx-int8").iterdir()}
    assert after == before


def test_a_graph_without_a_layer_to_quantize_is_an_error(bundle):
    with pytest.raises(EngineError, match="layers is between"):
        quantize_to_int8(
            (bundle / "member0.onnx").read_bytes(), np.zeros((1, 1, 64, 64), np.uint8), bool, bits=8
        )
    for wrong in (b"", b"not a graph"):
        with pytest.raises(EngineError, match=r"quantized|layers is between"):
            quantize_to_int8(wrong, np.zeros((1, 1, 64, 64), np.uint8), bool, bits=8)
    with pytest.raises(UsageError, match="--target onnx"):
        BuildOptions(bundle=bundle, target="tensorrt", precision="int8")


def test_labels_are_read_as_in_training_and_images_are_split(bundle, tmp_path):
    write_images(tmp_path / "plain", 66)
    write_labelled(tmp_path / "labelled", 66)
    result = {}
    for folder in (tmp_path / "plain", tmp_path / "labelled"):
        options = BuildOptions(bundle=bundle, target="onnx", precision="int8", calibration=folder)
        result[folder.name] = parity.load_images(bundles.load_bundle(bundle), options)
    assert result["plain"].labels is None
    images = result["labelled"]
    assert np.bincount(images.labels).tolist() == [22, 22, 22]
    first, second = images.split()
    assert (len(first.pixels), len(second.pixels)) == (33, 33)
    both = {image.tobytes() for image in first.pixels} & {image.tobytes() for image in second.pixels}
    assert not both
    few = parity.CalibrationImages(images.pixels[:20], "images given").split()
    assert few[0].pixels is few[1].pixels
    assert few[1].origin == "images given, calibrated on too"


def test_int8_is_compared_by_class_and_auc():
    labels = np.array([0, 0, 0, 1, 1, 1])
    reference = np.array([0.9, 0.8, 0.52, 0.48, 0.3, 0.1], np.float32)
    reference = np.stack([reference, 1 - reference], axis=1)
    options = BuildOptions(bundle=Path(), target="onnx", precision="int8", agreement=0.8)

    def judged(candidate, truth):
        result = parity.compare_probabilities(
            reference, candidate, executed=True, calibration="", options=options, labels=truth
        )
        assert result.counted == 6
        return result

    assert judged(reference, labels).auc == 1
    swapped = reference[[0, 1, 3, 2, 4, 5]]
    result = judged(swapped, labels)
    assert result.agreement == pytest.approx(4 / 6)
    assert result.auc == pytest.approx(8 / 9)
    assert judged(swapped, None).auc == pytest.approx(8 / 9)
    near = reference.copy()
    near[2] = 0.5
    assert judged(near, labels).passed
    worse = reference.copy()
    worse[1] = [0.45, 0.55]  # one class of six changes, but the order too
    result = judged(worse, labels)
    assert result.agreement >= 0.8
    assert not result.passed
    with pytest.raises(ParityError, match=r"AUC 0\.8889 against 1\.0000"):
        parity.require_parity(result, "its graph", "int8")
    reference[2] = [0.504, 0.496]  # a close call
    other = reference.copy()
    other[2] = [0.496, 0.504]
    result = parity.compare_probabilities(
        reference, other, executed=True, calibration="", options=options, labels=labels
    )
    assert (result.counted, result.agreement) == (5, 1.0)


def test_graphs_stay_valid_when_the_bundle_is_calibrated(built, tmp_path, capsys):
    """They give no distances, and a run says so."""
    folder = shutil.copytree(built, tmp_path / "bundle")
    images = built.parent / "images"
    asked = ("--on", str(images), "--sensitivity", "0.8")
    assert calibrate.main([str(folder), *asked, "--ood", "--precision", "int8"]) == 2
    assert "--ood needs the float32 graphs on the CPU" in capsys.readouterr().err
    assert calibrate.main([str(folder), *asked, "--ood"]) == 0
    log = []
    engine.screen(images, output=tmp_path / "out", bundle=folder, precision="int8", say=log.append)
    assert "out of distribution is not looked at: onnx in int8 gives no distances" in log
    assert any("in fp32); this run is in int8" in line for line in log)
    rows = engine.read_results(tmp_path / "out")
    assert rows.attrs["provenance"]["out_of_distribution"] == "not looked at: onnx in int8"
    assert set(rows.triage) <= {"rule_out", "gray_zone", "refer"}
    assert not rows.abstain_reasons.map(lambda reasons: "out_of_distribution" in reasons).any()
