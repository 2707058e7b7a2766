"""Plans from the real members, by TensorRT for RTX, which needs no GPU to build for one."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs
from safetensors.numpy import save

from build_engines import compiler, parity
from build_engines.fp16 import convert_to_fp16
from build_engines.options import BuildOptions, parse_capabilities
from build_engines.progress import NoProgress
from engine.bundle import bundle as bundles
from engine.bundle import plans
from engine.bundle.plans import Layer
from engine.core import hardware
from engine.core.errors import EngineError, ParityError, UsageError
from engine.core.hardware import Gpu
from engine.core.settings import Settings
from engine.doctor.checks import diagnose
from engine.pipeline.load_pixels import load_pixels
from engine.runners import select_gpu
from engine.runners.base import RunnerChoice
from engine.runners.tensorrt import TensorRTBackend
from engine.runs.run_record import default_sizes
from engine.scoring import canaries
from tests.helpers.bundles import REAL_WEIGHTS, write_bundle
from tests.helpers.images import write_images
from tests.helpers.processes import run_here, run_module

rtx = pytest.importorskip("tensorrt_rtx")
ADA = Gpu(name="NVIDIA L4", uuid="GPU-0", capability="8.9", driver="580.1")
HOPPER = Gpu(name="NVIDIA H100", uuid="GPU-1", capability="9.0", driver="580.1")
TARGET = f"tensorrt_rtx-sm86-sm89-{'.'.join(rtx.__version__.split('.')[:2])}"


def build(bundle: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_here("build_engines", [bundle, *map(str, arguments)], folder=bundle.parent)


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


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """A small bundle with plans for two GPUs; read-only for tests."""
    bundle = write_bundle(tmp_path_factory.mktemp("planned") / "bundle")
    arguments = ("--target", "tensorrt_rtx", "--compute-capability", "sm86,8.9", "--batch-size", 32)
    run = build(bundle, *arguments)
    assert run.returncode == 0, run.stderr
    return bundle


@pytest.mark.slow
def test_each_member_has_a_plan_with_a_correct_passport(built):
    bundle, run = built
    assert run.stdout.strip() == str(bundle / "plans" / TARGET)
    assert "not executed here" in run.stderr
    loaded = bundles.load_bundle(bundle)
    for member in loaded.members:
        plan = plans.load_plan(bundle / "plans" / TARGET / f"{member.name}.json")
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
        weighted = [one for one in passport.layers if one.type in ("CONVOLUTION", "MATRIX_MULTIPLY")]
        assert len(weighted) == {"resnet50": 53, "inception_v3": 94}[member.name] + 2
        assert {one.input for one in weighted} == {"HALF"}


def test_plans_are_chosen_by_gpu_version_and_batch(planned, monkeypatch):
    bundle = bundles.load_bundle(planned)
    result, _ = select_gpu.find_fitting_plans(bundle, ADA, "fp16", None)
    assert [plan.passport.member for plan in result] == ["member0", "member1"]
    for gpu, precision, batch, complaint, rebuild in [
        (
            *(HOPPER, "fp16", None, "built for compute capability 8.6, 8.9, this GPU has 9.0"),
            "--target tensorrt --precision fp16 --batch-size 32",  # TensorRT for RTX does not know Hopper
        ),
        (
            *(ADA, "fp32", None, "its precision is fp16, not fp32"),
            "--target tensorrt_rtx --precision fp32 --batch-size 32",
        ),
        (
            *(ADA, "fp16", 64, "takes at most 32 images a batch, not 64"),
            "--target tensorrt_rtx --precision fp16 --batch-size 64",
        ),
    ]:
        result, reason = select_gpu.find_fitting_plans(bundle, gpu, precision, batch)
        assert not result
        assert complaint in reason
        assert reason.endswith(f"python -m build_engines {bundle.path} {rebuild}")
    monkeypatch.setattr(select_gpu, "tensorrt_version", lambda backend: "1.6.0.1")
    assert "installed: 1.6.0.1" in select_gpu.find_fitting_plans(bundle, ADA, "fp16", None)[1]
    monkeypatch.setattr(select_gpu, "tensorrt_version", lambda backend: None)
    reason = select_gpu.find_fitting_plans(bundle, ADA, "fp16", None)[1]
    assert "tensorrt_rtx is not installed; install it with: pip install" in reason


def test_batch_sizes_are_those_of_the_plans(planned):
    plan = plans.load_plan(planned / "plans" / TARGET / "member0.json")
    large = plan.with_facts(profiles=(plans.OptimizationProfile(min=1, opt=256, max=256),))
    for made, batch in [((plan,), 32), ((large,), 256), ((plan, large), 32), ((), 128)]:
        chosen = RunnerChoice(runner="tensorrt", device="cuda:0", precision="fp16", reason="", plans=made)
        assert default_sizes(chosen)[0] == batch


def test_the_doctor_reports_which_plans_fit(planned, monkeypatch):
    settings = Settings(manifest=Path(), bundle=planned)

    def told() -> tuple[dict[str, str], list[str]]:
        diagnosis = diagnose(settings, manifest=False, say=lambda _: None)
        lines = {label: text for _, lines in diagnosis.sections for label, text in lines}
        return lines, [problem.fix for problem in diagnosis.problems if TARGET in problem.text]

    lines, commands = told()
    assert lines[f"plans/{TARGET}"].endswith("for compute capability 8.6, 8.9; this machine has no GPU")
    assert not commands
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    monkeypatch.setattr(hardware, "require_gpu", lambda index=0: ADA)
    lines, commands = told()
    assert lines["runs on"] == f"TensorRT on NVIDIA L4: plans/{TARGET} fits"
    assert lines[f"plans/{TARGET}"].endswith("up to 32 a batch: fits")
    assert not commands
    monkeypatch.setattr(hardware, "require_gpu", lambda index=0: HOPPER)
    lines, commands = told()
    assert "this GPU has 9.0" in lines[f"plans/{TARGET}"]
    assert commands == [
        f"python -m build_engines {planned} --target tensorrt --precision fp16 --batch-size 32"
    ], "TensorRT for RTX has no plans for Hopper"
    (planned / "plans" / "tensorrt-old").mkdir()
    lines, _ = told()
    assert lines["plans/tensorrt-old"].startswith("incomplete")
    (planned / "plans" / "tensorrt-old").rmdir()


@pytest.mark.slow
def test_a_plan_over_the_limit_does_not_replace_the_old_plans(built, real_bundle):
    bundle = built[0]

    def installed() -> dict[Path, int]:
        files = [*(bundle / "plans" / TARGET).iterdir(), *bundle.glob("*.fp16.onnx")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = installed()
    assert len(before) == 6
    images = ("--calibration", real_bundle.parent / "images", "--calibration-images", 8)
    run = build(bundle, "--target", "tensorrt_rtx", "--compute-capability", "sm86,sm89", *images)
    assert run.returncode == 4
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: inception_v3: its graph in fp16 differs from float32 by up to 0.")
    assert installed() == before
    assert [path.name for path in (bundle / "plans").iterdir() if path.name != ".lock"] == [TARGET]


def test_an_altered_plan_or_passport_is_refused(planned, tmp_path):
    source = planned / "plans" / TARGET
    plan = plans.load_plan(source / "member0.json")
    data = json.loads((source / "member0.json").read_text())
    (tmp_path / "member0.plan").write_bytes(plan.read()[:-1] + b"\0")
    for change, complaint in [
        ({}, "altered"),
        ({"plan": "../../secret"}, "not the name of a file"),
        ({"format": 2}, "format is 2: allowed: 1"),
        ({"profiles": []}, "profiles: 0; a compiled plan has some"),
        ({"parity": {}}, "parity.executed is missing"),
        ({"extra": 1}, "extra: unknown field"),
        (
            {"compute_capabilities": ["x.y"], "hardware_compatible": True},
            r'compute_capabilities\[0\] is "x.y": expected a compute capability such as 9.0',
        ),
        ({"hardware_compatible": "no"}, 'hardware_compatible is "no": expected true or false'),
        ({"frontend": "pickle"}, 'frontend is "pickle": allowed: onnx, torch-tensorrt'),
    ]:
        (tmp_path / "member0.json").write_text(json.dumps(data | change))
        with pytest.raises(UsageError, match=complaint) as caught:
            plans.load_plan(tmp_path / "member0.json").read()
        assert "\n" not in str(caught.value)


def test_other_weights_make_a_plan_stale(planned):
    bundle = bundles.load_bundle(planned)
    plan = plans.load_plan(planned / "plans" / TARGET / "member0.json")
    other = next(member for member in bundle.members if member.name != "member0")
    assert plan.passport.problem(other, ADA, rtx.__version__) == "it was made from another model"
    renamed = structs.replace(plan.passport, member=other.name)
    member = next(member for member in bundle.members if member.name == "member0")
    assert renamed.problem(member, ADA, rtx.__version__) == "it was made from another model"


def test_a_version_compatible_plan_runs_under_the_same_and_later_minors(planned):
    bundle = bundles.load_bundle(planned)
    member = next(member for member in bundle.members if member.name == "member0")
    passport = plans.load_plan(planned / "plans" / TARGET / "member0.json").passport
    made = structs.replace(passport, backend="tensorrt", version="11.1.0.106", version_compatible=True)
    for version, fits in [
        ("11.1.0.106", True),
        ("11.4.0.99", True),
        ("11.0.2.1", False),
        ("12.1.0.1", False),
    ]:
        assert (made.problem(member, ADA, version) is None) == fits, version
    strict = structs.replace(made, version_compatible=False)
    assert (
        strict.problem(member, ADA, "11.1.0.107")
        == "it was built by tensorrt 11.1.0.106; installed: 11.1.0.107"
    )
    wide = structs.replace(strict, hardware_compatible=True)
    assert wide.problem(member, HOPPER, "11.1.0.106") is None
    turing = structs.replace(ADA, capability="7.5")
    assert "this GPU has 7.5" in wide.problem(member, turing, "11.1.0.106")


def test_small_bundles_build_in_both_precisions(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", weights=(0.5, 0.3, 0.2))
    for precision in ("fp16", "fp32"):
        run = build(
            bundle, "--target", "tensorrt_rtx", "--compute-capability", "sm120", "--precision", precision
        )
        assert run.returncode == 0, run.stderr
    assert len(list((bundle / "plans").glob("*/*.plan"))) == 6
    run = run_module("build_engines", [bundle, "--target", "onnx"], folder=tmp_path, timeout_s=300)
    assert run.returncode == 0, run.stderr
    assert (bundle / "member0.fp16.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--target", "tensorrt"], "without a GPU: --target tensorrt_rtx --compute-capability"),
        (["--compute-capability", "sm86"], "--compute-capability is for --target tensorrt_rtx"),
        (["--target", "tensorrt_rtx", "--hardware-compatible"], "is for --target tensorrt, not"),
        (["--target", "tensorrt_rtx", "--timing-cache", "x"], "is for --target tensorrt, not"),
        (["--target", "tensorrt_rtx", "--compute-capability", "sm90"], "builds for sm75, sm80, sm86"),
        (["--target", "tensorrt_rtx", "--version-compatible"], "is for --target tensorrt, not"),
        (["--target", "tensorrt_rtx", "--frontend", "torch-tensorrt"], "is for --target tensorrt"),
        (["--target", "tensorrt_rtx"], "without a GPU, name the GPUs to build for: --compute-capability"),
        (["--target", "onnx", "--max-aux-streams", "0"], "--max-aux-streams is for"),
        (["--timing-cache", "nowhere/cache"], "its folder does not exist"),
        (["--frontend", "torch-tensorrt", "--batch-size", "1"], "--batch-size 2 or more"),
        (["--target", "onnx", "--precision", "fp32"], "nothing to build"),
        (["--target", "onnx", "--workspace", "1G"], "--workspace is for"),
        (["--target", "onnx", "--calibration", "nowhere"], "nowhere"),
        (["--batch-size", "0"], "whole number from 1"),
        (["--optimization-level", "9"], "whole number from 0 to 5"),
        (["--limit", "2"], "between 0 and 1"),
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


def test_ctrl_c_ends_a_build_at_its_next_step(bundle):
    """TensorRT's bindings discard a KeyboardInterrupt inside their callbacks."""
    backend = TensorRTBackend("tensorrt_rtx")
    graph = convert_to_fp16((bundle / "member0.onnx").read_bytes())
    options = BuildOptions(bundle=bundle, target="tensorrt_rtx", compute_capabilities=("8.6",))

    class Watching(NoProgress):
        def __init__(self, *, interrupts: bool) -> None:
            self.interrupts, self.phases = interrupts, set[str]()

        def start(self, name: str, steps: int) -> None:
            self.phases.add(name)

        def step(self, name: str, done: int) -> None:
            if self.interrupts:
                self.interrupts = False
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.5)  # until it is heard

    stopped, complete = Watching(interrupts=True), Watching(interrupts=False)
    with pytest.raises(KeyboardInterrupt):
        compiler.compile_graph(backend, graph, options, (64, 64), stopped)
    compiler.compile_graph(backend, graph, options, (64, 64), complete)
    assert stopped.phases < complete.phases


@pytest.mark.slow
def test_the_program_for_torch_tensorrt_has_only_supported_operators(real_bundle):
    """Torch-TensorRT needs a GPU to import; it can't convert as_strided with a dynamic N."""
    from build_engines.torch_tensorrt import export_member

    bundle = bundles.load_bundle(real_bundle)
    for member in bundle.members:
        program = export_member(bundle, member, BuildOptions(bundle=real_bundle, batch_size=16), "cpu")
        called = [str(node.target) for node in program.run_decompositions().graph.nodes]
        assert not [name for name in called if "as_strided" in name]
        assert called.count("aten.convolution.default") == {"resnet50": 53, "inception_v3": 94}[member.name]


def test_missing_files_and_invalid_graphs_are_one_line_errors(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    graph = bundle / "member0.onnx"
    good = graph.read_bytes()
    graph.write_bytes(b"not a graph")
    run = build(bundle, "--target", "onnx")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "altered" in run.stderr
    graph.write_bytes(good)
    _replace(bundle, "member0.onnx", b"not a graph")
    run = build(bundle, "--target", "onnx")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "member0: ONNX Runtime refuses the graph" in run.stderr
    for wrong in (b"", b"not a graph", b"\x08\x0a"):
        with pytest.raises(EngineError):
            convert_to_fp16(wrong)


def test_invalid_canaries_are_one_line_errors(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    pixels, logits = np.zeros((4, 1, 64, 64), np.uint8), np.zeros((2, 4, 3), np.float32)
    for wrong, complaint in [
        (b"nothing", "cannot be read"),
        (save({"pixels": pixels}), "cannot be read ('logits')"),
        (save({"pixels": pixels[:0], "logits": logits[:, :0]}), "its canaries are"),
        (save({"pixels": pixels[..., :32], "logits": logits}), "its canaries are"),
        (save({"pixels": pixels, "logits": logits[:1]}), "its canaries are"),
    ]:
        _replace(bundle, "canaries/canaries.safetensors", wrong)
        with pytest.raises(UsageError) as caught:
            canaries.load_canaries(bundles.load_bundle(bundle))
        assert complaint in str(caught.value)


def _replace(bundle: Path, name: str, data: bytes) -> None:
    """A file of a bundle, and its hash."""
    before = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / name).write_bytes(data)
    description = bundle / "ensemble.json"
    after = hashlib.sha256(data).hexdigest()
    description.write_text(description.read_text().replace(before, after))


def test_calibration_images_are_read_as_screening_reads_them(tmp_path):
    bundle = bundles.load_bundle(write_bundle(tmp_path / "bundle"))
    images = write_images(tmp_path / "images", 20)
    (images / "image-03.jpg").write_bytes(b"bad")
    options = BuildOptions(bundle=bundle.path, target="onnx", calibration=images, calibration_images=10)
    pixels = parity.load_images(bundle, options).pixels
    assert pixels.shape == (10, 1, 64, 64)
    fast = bundles.load_bundle(write_bundle(tmp_path / "fast", size=(16, 16), decode="fast"))
    pixels = parity.load_images(fast, replace(options, calibration_images=100)).pixels
    expected = load_pixels(sorted(images.iterdir()), size=(16, 16), decode="fast").pixels
    assert np.array_equal(pixels, expected)
    for path in images.iterdir():
        path.write_bytes(b"bad")
    with pytest.raises(UsageError, match="no image can be read"):
        parity.load_images(bundle, options)


def test_parity_counts_only_clear_cases_and_refuses_nan():
    options = BuildOptions(bundle=Path(), limit=0.01)
    reference = np.array([[0.9, 0.1], [0.505, 0.495], [0.2, 0.8]], np.float32)
    swapped = np.array([[0.9, 0.1], [0.495, 0.505], [0.2, 0.8]], np.float32)

    def compare(candidate):
        return parity.compare_probabilities(
            reference, candidate, executed=True, calibration="", options=options
        )

    near = compare(swapped)
    assert (near.counted, near.agreement) == (2, 1.0)
    assert near.max == pytest.approx(0.01, abs=1e-6)
    wrong = compare(reference[:, ::-1])
    assert wrong.agreement == 0
    for bad in (wrong, compare(np.full_like(reference, np.nan))):
        assert not bad.passed
        with pytest.raises(ParityError, match="not installed"):
            parity.require_parity(bad, "its plan", "fp16")


def test_a_convolution_in_another_precision_is_refused():
    wide = [Layer(name="stem", type="CONVOLUTION", input="FLOAT")]
    with pytest.raises(EngineError, match="stem would run in another precision"):
        compiler._refuse_float32(wide, "HALF")
    for kind, tensors in [("CaskConvolution", "Row major linear FP32"), ("gemm", "Float")]:
        with pytest.raises(EngineError, match="stem"):
            compiler._refuse_float32_kernels([Layer(name="stem", type=kind, input=tensors, weights="Float")])
    fine = [
        Layer(name="stem", type="CaskConvolution", input="Channel major FP16 format"),
        Layer(name="cast", type="Reformat", input="Row major linear FP32"),
        Layer(name="both", type="CaskConvolution", input="Row major linear FP32", weights="Half"),
    ]
    compiler._refuse_float32_kernels(fine)


def test_the_fp16_graph_keeps_scaling_and_logits_in_float32(real_bundle):
    for name in REAL_WEIGHTS:
        graph = onnx.load_model_from_string(
            convert_to_fp16((real_bundle / f"{name}.onnx").read_bytes())
        ).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert sorted(types.values()) == [onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8]
        inferred = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph)).graph
        kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
        division = next(node for node in graph.node if node.op_type == "Div")
        assert kinds[division.output[0]] == onnx.TensorProto.FLOAT


def test_parse_capabilities_accepts_all_spellings():
    assert parse_capabilities("sm86, SM_89,12.0,sm86") == ("8.6", "8.9", "12.0")
