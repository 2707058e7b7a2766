"""Our calls of TensorRT against the real API of each version we speak to: mypy, and no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import bindings
from tests.helpers.bindings import ALL, TRT_10_16, TRT_11_4, Bindings
from tests.helpers.processes import ROOT

pytestmark = pytest.mark.slow

HEADER = """\
from __future__ import annotations

from typing import TYPE_CHECKING

from engine.runners.tensorrt import TensorRTBackend

if TYPE_CHECKING:
    import tensorrt as trt
"""

# Every step from a graph to a running engine, all in one, so that the stubs are known to let good code pass.
GOOD = """
def build(backend: TensorRTBackend, graph: bytes) -> bytes:
    api, checked = backend.trt, backend.checked
    builder = api.Builder(backend.logger)
    network = checked(builder.create_network(flags(backend)), "creating the network")
    parser = api.OnnxParser(network, backend.logger)
    if not parser.parse(graph):
        raise ValueError([parser.get_error(index).desc() for index in range(parser.num_errors)])
    config = builder.create_builder_config()
    config.progress_monitor = monitor(backend)
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, 1 << 30)
    config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = api.HardwareCompatibilityLevel.AMPERE_PLUS
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    pixels = checked(network.get_input(0), "the input")
    profile = builder.create_optimization_profile()
    profile.set_shape(pixels.name, (1, 1, 8, 8), min_shape(), (4, 1, 8, 8))
    config.add_optimization_profile(profile)
    return bytes(checked(builder.build_serialized_network(network, config), "building the plan"))


def monitor(backend: TensorRTBackend) -> trt.IProgressMonitor:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = backend.trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            return step >= 0

        def phase_finish(self, phase_name: str) -> None: ...

    return Monitor()


def flags(backend: TensorRTBackend) -> int:
    return 1 << int(backend.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def min_shape() -> list[int]:
    return [2, 1, 8, 8]


def run(backend: TensorRTBackend, plan: bytes, stream: int, address: int) -> tuple[str, tuple[int, ...]]:
    api = backend.trt
    engine: trt.ICudaEngine | None = api.Runtime(backend.logger).deserialize_cuda_engine(plan)
    assert engine is not None
    inspector = engine.create_engine_inspector()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == api.TensorIOMode.INPUT]
    context: trt.IExecutionContext = engine.create_execution_context()
    assert context.set_optimization_profile_async(0, stream)
    assert context.set_input_shape(inputs[0], (1, 1, 8, 8))
    assert context.set_tensor_address(inputs[0], address)
    assert context.execute_async_v3(stream_handle=stream)
    layers: str = inspector.get_engine_information(api.LayerInformationFormat.JSON)
    return layers, tuple(context.get_tensor_shape(names[-1]))
"""

FP16 = """
def flag(backend: TensorRTBackend, config: trt.IBuilderConfig) -> None:
    config.set_flag(backend.trt.BuilderFlag.FP16)
"""

FP16_BY_NAME = """
def flag(backend: TensorRTBackend) -> object:
    api = backend.trt
    return api.BuilderFlag.FP16
"""

NO_SUCH_CLASS = """
def builder(backend: TensorRTBackend) -> object:
    return backend.trt.Bilder
"""

MISSPELT_METHOD = """
def profile(backend: TensorRTBackend) -> object:
    return backend.trt.Builder(backend.logger).create_optimisation_profile()
"""

WRONG_KEYWORD = """
def run(context: trt.IExecutionContext) -> bool:
    return context.execute_async_v3(stream=0)
"""

WRONG_TYPE = """
def limit(config: trt.IBuilderConfig, level: str) -> None:
    config.builder_optimization_level = level
"""

FLOAT = """
def name(engine: trt.ICudaEngine) -> str:
    return engine.get_tensor_name(1.0)
"""

NONE_NOT_LOOKED_AT = """
def layers(runtime: trt.Runtime, plan: bytes) -> int:
    return runtime.deserialize_cuda_engine(plan).num_layers
"""

WRONG_OVERRIDE = """
class Monitor(trt.IProgressMonitor):
    def step_complete(self, step: int) -> bool:
        return True
"""


@dataclass(frozen=True)
class Checker:
    """mypy with one version of TensorRT."""

    stubs: Path
    cache: Path

    def __call__(self, *sources: Path) -> list[str]:
        return bindings.mypy_errors(sources, root=ROOT, stubs=self.stubs, cache=self.cache)


def _checker(version: Bindings, cache: Path) -> Checker:
    pytest.importorskip("pybind11_stubgen")
    try:
        return Checker(bindings.stubs(version, cache), cache)
    except bindings.NoBindingsError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept: pytest.Cache | None = getattr(request.config, "cache", None)  # without -p no:cacheprovider
    return kept.mkdir("bindings") if kept else tmp_path_factory.mktemp("bindings")


@pytest.fixture(scope="session", params=ALL, ids=str)
def check(request: pytest.FixtureRequest, cache: Path) -> Checker:
    return _checker(request.param, cache)


def test_calls_match_the_api(check: Checker) -> None:
    sources = bindings.users(ROOT)
    assert sources
    _none(check(*sources))


def test_correct_code_passes(check: Checker, tmp_path: Path) -> None:
    _none(check(_source(tmp_path, GOOD)))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        pytest.param(FP16, "attr-defined", id="a flag that 11 removed"),
        pytest.param(FP16_BY_NAME, "attr-defined", id="the same, by another name of the module"),
        pytest.param(NO_SUCH_CLASS, "attr-defined", id="a class that never was"),
        pytest.param(MISSPELT_METHOD, "attr-defined", id="a misspelt method"),
        pytest.param(WRONG_KEYWORD, "call-arg", id="a wrong keyword"),
        pytest.param(WRONG_TYPE, "assignment", id="a wrong type"),
        pytest.param(FLOAT, "arg-type", id="a float for an integer"),
        pytest.param(NONE_NOT_LOOKED_AT, "union-attr", id="a failure not looked at"),
        pytest.param(WRONG_OVERRIDE, "override", id="a monitor that can't be called"),
    ],
)
def test_mypy_reports_mistakes(code: str, kind: str, cache: Path, tmp_path: Path) -> None:
    errors = _checker(TRT_11_4, cache)(_source(tmp_path, code))
    assert [error for error in errors if error.endswith(f"[{kind}]")], errors


def test_fp16_flag_passes_where_it_exists(cache: Path, tmp_path: Path) -> None:
    _none(_checker(TRT_10_16, cache)(_source(tmp_path, FP16)))


def _none(errors: list[str]) -> None:
    if errors:
        pytest.fail("\n".join(["mypy says", *errors]), pytrace=False)


def _source(folder: Path, code: str) -> Path:
    file = folder / "sample.py"
    file.write_text(f"{HEADER}\n{code}\n")
    return file
