"""Plans from the real members, by TensorRT for RTX, which needs no GPU to build for one."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from build_engines import compiler, parity
from build_engines.half import half_graph
from build_engines.options import Options, parse_capabilities
from engine import bundle as bundles
from engine import plans
from engine.errors import EngineError, ParityError, UsageError
from engine.gpu import choice
from engine.plans import Gpu
from tests.bundles import REAL_WEIGHTS, write_bundle
from tests.conftest import run_module, write_images

rtx = pytest.importorskip("tensorrt_rtx")
ADA = Gpu(name="NVIDIA L4", uuid="GPU-0", capability="8.9", driver="580.1")
HOPPER = Gpu(name="NVIDIA H100", uuid="GPU-1", capability="9.0", driver="580.1")
TARGET = f"tensorrt_rtx-sm86-sm89-{'.'.join(rtx.__version__.split('.')[:2])}"


def build(bundle: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    texts = [str(argument) for argument in arguments]
    return run_module("build_engines", [bundle, *texts], folder=bundle.parent, timeout_s=300)


@pytest.fixture(scope="module")
def copied(real_bundle, tmp_path_factory) -> Path:
    return Path(shutil.copytree(real_bundle, tmp_path_factory.mktemp("built") / "bundle"))


@pytest.fixture(scope="module")
def built(copied, real_bundle) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Random InceptionV3 is chaotic: FP16 moves its probabilities by some percent, so the limit is wide."""
    run = build(
        copied,
        *("--target", "tensorrt_rtx", "--compute-capability", "sm86,8.9", "--batch-size", 32),
        *("--limit", 0.2, "--optimization-level", 2, "--workspace", "1GiB"),
        *("--calibration", real_bundle.parent / "images", "--calibration-images", 8),
    )
    assert run.returncode == 0, run.stderr
    return copied, run


def test_each_member_has_a_plan_with_a_passport_that_is_true(built):
    bundle, run = built
    assert run.stdout.strip() == str(bundle / "plans" / TARGET)
    assert "not executed here" in run.stderr
    loaded = bundles.load(bundle)
    for member in loaded.members:
        plan = plans.load(bundle / "plans" / TARGET / f"{member.name}.json")
        passport = plan.passport
        assert hashlib.sha256(plan.read()).hexdigest() == passport.plan_sha256
        graph = (bundle / passport.source).read_bytes()
        assert hashlib.sha256(graph).hexdigest() == passport.source_sha256
        assert passport.reference_sha256 == member.files["onnx"].sha256
        assert passport.compute_capabilities == ("8.6", "8.9")
        assert [(one.min, one.opt, one.max) for one in passport.profiles] == [(1, 32, 32), (1, 8, 8)]
        assert passport.version == rtx.__version__
        assert passport.gpu is None
        assert passport.build_s > 0
        assert not passport.parity.executed
        assert 0 < passport.parity.max < 0.2
        assert passport.options["workspace"] == 1 << 30
        weighted = [one for one in passport.layers if one["type"] in ("CONVOLUTION", "MATRIX_MULTIPLY")]
        assert len(weighted) == {"resnet50": 53, "inception_v3": 94}[member.name] + 2
        assert {one["input"] for one in weighted} == {"HALF"}


def test_plans_are_chosen_by_gpu_version_and_batch(built, monkeypatch):
    bundle = bundles.load(built[0])
    found, _ = choice.fitting_plans(bundle, ADA, "fp16", None)
    assert [plan.passport.member for plan in found] == list(REAL_WEIGHTS)
    for gpu, precision, batch, complaint in [
        (HOPPER, "fp16", None, "built for compute capability 8.6, 8.9, this GPU has 9.0"),
        (ADA, "fp32", None, "it is fp16, not fp32"),
        (ADA, "fp16", 64, "takes at most 32 images a batch, not 64"),
    ]:
        found, reason = choice.fitting_plans(bundle, gpu, precision, batch)
        assert not found
        assert complaint in reason
        assert f"python -m build_engines {bundle.path} --target tensorrt_rtx" in reason
    monkeypatch.setattr(choice, "installed_version", lambda backend: "1.6.0.1")
    assert "here is 1.6.0.1" in choice.fitting_plans(bundle, ADA, "fp16", None)[1]
    monkeypatch.setattr(choice, "installed_version", lambda backend: None)
    assert "not installed" in choice.fitting_plans(bundle, ADA, "fp16", None)[1]


def test_a_plan_over_the_limit_is_not_installed_and_the_old_ones_stay(built, real_bundle):
    bundle = built[0]
    before = {path: path.stat().st_mtime_ns for path in (bundle / "plans" / TARGET).iterdir()}
    images = ("--calibration", real_bundle.parent / "images", "--calibration-images", 8)
    run = build(bundle, "--target", "tensorrt_rtx", "--compute-capability", "sm86,sm89", *images)
    assert run.returncode == 4
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: inception_v3: its graph in fp16 differs from float32 by up to 0.")
    assert {path: path.stat().st_mtime_ns for path in (bundle / "plans" / TARGET).iterdir()} == before
    assert [path.name for path in (bundle / "plans").iterdir() if path.name != ".lock"] == [TARGET]


def test_an_altered_plan_or_passport_is_refused(built, tmp_path):
    source = built[0] / "plans" / TARGET
    plan = plans.load(source / "resnet50.json")
    data = json.loads((source / "resnet50.json").read_text())
    (tmp_path / "resnet50.plan").write_bytes(plan.read()[:-1] + b"\0")
    for change, complaint in [
        ({}, "altered"),
        ({"plan": "../../secret"}, "not the name of a file"),
        ({"format": 2}, "format"),
        ({"profiles": []}, "profiles"),
        ({"parity": {}}, "missing"),
        ({"extra": 1}, "extra"),
    ]:
        (tmp_path / "resnet50.json").write_text(json.dumps(data | change))
        with pytest.raises(UsageError, match=complaint) as caught:
            plans.load(tmp_path / "resnet50.json").read()
        assert "\n" not in str(caught.value)


def test_other_weights_make_a_plan_stale(built):
    bundle = bundles.load(built[0])
    plan = plans.load(built[0] / "plans" / TARGET / "resnet50.json")
    other = next(member for member in bundle.members if member.name != "resnet50")
    assert plan.passport.problem(other, ADA, rtx.__version__) == "it was made from another model"


def test_a_version_compatible_plan_runs_under_the_same_and_later_minors(built):
    bundle = bundles.load(built[0])
    member = next(member for member in bundle.members if member.name == "resnet50")
    passport = plans.load(built[0] / "plans" / TARGET / "resnet50.json").passport
    made = replace(passport, backend="tensorrt", version="11.1.0.106", version_compatible=True)
    for version, fits in [
        ("11.1.0.106", True),
        ("11.4.0.99", True),
        ("11.0.2.1", False),
        ("12.1.0.1", False),
    ]:
        assert (made.problem(member, ADA, version) is None) == fits, version
    strict = replace(made, version_compatible=False)
    assert (
        strict.problem(member, ADA, "11.1.0.107") == "it was built by tensorrt 11.1.0.106, here is 11.1.0.107"
    )
    wide = replace(strict, hardware_compatible=True)
    assert wide.problem(member, HOPPER, "11.1.0.106") is None
    turing = replace(ADA, capability="7.5")
    assert "this GPU has 7.5" in wide.problem(member, turing, "11.1.0.106")


def test_small_bundles_build_in_both_precisions(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", weights=(0.5, 0.3, 0.2))
    for precision in ("fp16", "fp32"):
        run = build(
            bundle, "--target", "tensorrt_rtx", "--compute-capability", "sm120", "--precision", precision
        )
        assert run.returncode == 0, run.stderr
    assert len(list((bundle / "plans").glob("*/*.plan"))) == 6
    run = build(bundle, "--target", "onnx")
    assert run.returncode == 0, run.stderr
    assert (bundle / "member0.fp16.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--target", "tensorrt"], "tensorrt can't be imported"),
        (["--compute-capability", "sm86"], "--compute-capability is for --target tensorrt_rtx"),
        (["--target", "tensorrt_rtx", "--hardware-compatible"], "is for --target tensorrt, not"),
        (["--target", "tensorrt_rtx", "--timing-cache", "x"], "is for --target tensorrt, not"),
        (["--target", "tensorrt_rtx", "--compute-capability", "sm90"], "builds for sm75, sm80, sm86"),
        (["--target", "tensorrt_rtx", "--version-compatible"], "is for --target tensorrt, not"),
        (["--target", "tensorrt_rtx", "--frontend", "torch-tensorrt"], "is for --target tensorrt"),
        (["--target", "tensorrt_rtx"], "no GPU"),
        (["--target", "onnx", "--precision", "fp32"], "nothing to build"),
        (["--target", "onnx", "--workspace", "1G"], "--workspace is for"),
        (["--target", "onnx", "--calibration", "nowhere"], "nowhere"),
        (["--batch-size", "0"], "whole number from 1"),
        (["--optimization-level", "9"], "whole number from 0 to 5"),
        (["--limit", "2"], "from 0 to 1"),
        (["--bogus"], "--bogus"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(bundle, arguments, complaint):
    run = build(bundle, *arguments)
    assert run.returncode == 2, run.stderr
    assert complaint in run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert not (bundle / "plans").exists() or not list((bundle / "plans").glob("*/"))


def test_a_bundle_without_its_files_or_a_graph_that_is_none_is_one_line(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    graph = bundle / "member0.onnx"
    graph.write_bytes(b"not a graph")
    run = build(bundle, "--target", "onnx")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "altered" in run.stderr
    for wrong in (b"", b"not a graph", b"\x08\x0a"):
        with pytest.raises(EngineError):
            half_graph(wrong)


def test_calibration_images_are_read_as_screening_reads_them(tmp_path):
    bundle = bundles.load(write_bundle(tmp_path / "bundle"))
    images = write_images(tmp_path / "images", 20)
    (images / "image-03.jpg").write_bytes(b"bad")
    options = Options(bundle=bundle.path, target="onnx", calibration=images, calibration_images=10)
    pixels = parity.calibration_images(bundle, options).pixels
    assert pixels.shape == (10, 1, 64, 64)
    for path in images.iterdir():
        path.write_bytes(b"bad")
    with pytest.raises(UsageError, match="no image can be read"):
        parity.calibration_images(bundle, options)


def test_the_gate_counts_clear_calls_only_and_refuses_what_is_no_number():
    options = Options(bundle=Path(), limit=0.01)
    reference = np.array([[0.9, 0.1], [0.505, 0.495], [0.2, 0.8]], np.float32)
    swapped = np.array([[0.9, 0.1], [0.495, 0.505], [0.2, 0.8]], np.float32)

    def compare(candidate):
        return parity.compare(reference, candidate, executed=True, calibration="", options=options)

    near = compare(swapped)
    assert (near.counted, near.agreement) == (2, 1.0)
    assert near.max == pytest.approx(0.01, abs=1e-6)
    wrong = compare(reference[:, ::-1])
    assert wrong.agreement == 0
    for bad in (wrong, compare(np.full_like(reference, np.nan))):
        assert not bad.passed
        with pytest.raises(ParityError, match="not installed"):
            parity.require(bad, "its plan", "fp16")


def test_a_convolution_in_another_precision_is_refused():
    wide = [{"name": "stem", "type": "CONVOLUTION", "input": "FLOAT"}]
    with pytest.raises(EngineError, match="stem would run in another precision"):
        compiler._refuse_wide(wide, "HALF")
    for kind, tensors in [("CaskConvolution", "Row major linear FP32"), ("gemm", "Float")]:
        with pytest.raises(EngineError, match="stem"):
            compiler._refuse_wide_engine([{"name": "stem", "type": kind, "input": tensors}])
    fine = [
        {"name": "stem", "type": "CaskConvolution", "input": "Channel major FP16 format"},
        {"name": "cast", "type": "Reformat", "input": "Row major linear FP32"},
    ]
    compiler._refuse_wide_engine(fine)


def test_the_half_graph_keeps_the_scaling_and_the_logits_in_float32(real_bundle):
    for name in REAL_WEIGHTS:
        graph = onnx.load_model_from_string(half_graph((real_bundle / f"{name}.onnx").read_bytes())).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert sorted(types.values()) == [onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8]
        inferred = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph)).graph
        kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
        division = next(node for node in graph.node if node.op_type == "Div")
        assert kinds[division.output[0]] == onnx.TensorProto.FLOAT


def test_capabilities_are_read_in_any_spelling():
    assert parse_capabilities("sm86, SM_89,12.0,sm86") == ("8.6", "8.9", "12.0")
