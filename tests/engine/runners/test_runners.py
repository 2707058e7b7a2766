"""Runners beside each other: PyTorch against ONNX Runtime; what TensorRT's refusals become; who is chosen."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bundle import bundle as bundles
from engine.core import hardware
from engine.core.errors import EngineError, UsageError
from engine.runners.onnx import OnnxRunner
from engine.runners.select import select_runner
from engine.runners.tensorrt import TensorRTBackend, tensor_names
from engine.runners.torch import TorchRunner
from tests.helpers.processes import Command
from tests.helpers.tolerances import PARITY

NO_GPU = not torch.cuda.is_available()


@pytest.mark.parametrize("half", [False, True])
def test_the_torch_runner_gives_what_the_reference_gives(real_bundle, half):
    """On the CPU; half precision there is slow and rounds as on a GPU."""
    models = bundles.load_bundle(real_bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 224, 224), np.uint8)
    member = models.members[0]
    with (
        OnnxRunner(member, models) as reference,
        TorchRunner(member, models, device="cpu", half=half, compiled=False) as runner,
    ):
        logits = torch.full((1, 3), float("nan"))
        runner.enqueue(torch.from_numpy(pixels), logits, None)
        expected = reference.infer(pixels)
        assert runner.input_shape == models.size
    assert np.abs(logits.numpy() - expected).max() < (0.05 if half else PARITY)


def test_weights_of_another_network_are_one_line(real_bundle):
    models = bundles.load_bundle(real_bundle)
    first, second = models.members
    mixed = bundles.Member(first.name, second.architecture, 1.0, 1.0, first.files)
    with pytest.raises(UsageError, match="weights do not fit"):
        TorchRunner(mixed, models, device="cpu", half=False, compiled=False)
    bare = bundles.Member("x", "resnet50", 1.0, 1.0, {"onnx": first.files["onnx"]})
    with pytest.raises(UsageError, match="needs its safetensors"):
        TorchRunner(bare, models, device="cpu", half=False, compiled=False)


@pytest.fixture
def rtx() -> TensorRTBackend:
    pytest.importorskip("tensorrt_rtx")
    backend = TensorRTBackend("tensorrt_rtx")
    backend.logger.errors.clear()  # the process has one logger, which other tests use too
    return backend


def test_each_failure_raises_with_the_message_of_tensorrt(rtx):
    for failed in (None, False, -1):
        with pytest.raises(EngineError, match="doing it failed: no reason given"):
            rtx.checked(failed, "doing it")
    assert [rtx.checked(fine, "doing it") for fine in (True, 0, 3, "x")] == [True, 0, 3, "x"]
    builder = rtx.trt.Builder(rtx.logger)
    network = builder.create_network(1)  # must live as long as its parser
    parser = rtx.trt.OnnxParser(network, rtx.logger)
    assert not parser.parse(b"not a graph")
    with pytest.raises(EngineError, match=r"parsing failed: .*(onnx|parse|Model)"):
        rtx.checked(None, "parsing")


def test_tensors_are_found_by_their_mode(rtx):
    mode = rtx.trt.TensorIOMode

    def engine(modes: dict[str, object]) -> types.SimpleNamespace:
        names = list(modes)
        return types.SimpleNamespace(
            num_io_tensors=len(names), get_tensor_name=names.__getitem__, get_tensor_mode=modes.__getitem__
        )

    assert tensor_names(rtx, engine({"b": mode.OUTPUT, "a": mode.INPUT})) == ("a", "b")
    for wrong in ({"a": mode.INPUT}, {"a": mode.INPUT, "b": mode.OUTPUT, "c": mode.OUTPUT}):
        with pytest.raises(EngineError, match="expected one of each"):
            tensor_names(rtx, engine(wrong))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "cuda:0"], "no usable GPU: "),
        (["--device", "cuda"], "no usable GPU: "),
        (["--device", "cuda:x"], "--device cuda:x: allowed"),
        (["--runner", "tensorrt"], "needs a GPU (there is no GPU)"),
        (["--runner", "torch", "--device", "cuda:3"], "no usable GPU: "),
    ],
)
def test_requesting_a_missing_gpu_is_a_one_line_error(
    engine_run: Command, archive: Path, bundle: Path, arguments: list[str], complaint: str
) -> None:
    run = engine_run(archive, "-b", bundle, "-o", "out", *arguments)
    assert run.returncode == 2
    assert complaint in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (archive.parent / "out").exists()


def test_an_unusable_gpu_is_reported(bundle, monkeypatch):
    def broken(index: int = 0) -> None:
        raise UsageError("no usable GPU: the driver is too old")

    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    monkeypatch.setattr(hardware, "require_gpu", broken)
    chosen = select_runner("auto", "auto", bundles.load_bundle(bundle), precision=None, batch_size=None)
    assert (chosen.runner, chosen.device) == ("onnx", "cpu")
    assert "the GPU cannot be used: no usable GPU: the driver is too old" in chosen.reason


def test_out_of_memory_is_distinguished_from_other_errors():
    for error in (
        torch.OutOfMemoryError("no room"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        EngineError("tensorrt 11.1: making an execution context failed: Error Code 2: OutOfMemory"),
    ):
        assert hardware.is_out_of_memory(error)
    assert not hardware.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_auto_reports_why_no_plan_fits(bundle, monkeypatch):
    result = hardware.Gpu(name="NVIDIA H100", uuid="GPU-0", capability="9.0", driver="580")
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    monkeypatch.setattr(hardware, "require_gpu", lambda index=0: result)
    models = bundles.load_bundle(bundle)
    chosen = select_runner("auto", "auto", models, precision=None, batch_size=None)
    assert (chosen.runner, chosen.device, chosen.precision) == ("torch", "cuda:0", "fp16")
    assert "the bundle has no plans; build them with: python -m build_engines" in chosen.reason
    with pytest.raises(UsageError, match="--runner tensorrt: the bundle has no plans"):
        select_runner("tensorrt", "cuda:0", models, precision=None, batch_size=None)
