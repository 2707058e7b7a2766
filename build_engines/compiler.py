"""Compile an ONNX graph into a serialized plan with TensorRT 10, 11 or TensorRT for RTX."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build_engines.options import BuildOptions
from build_engines.progress import Phases, monitor_for
from engine.bundle.plans import Layer
from engine.core.errors import EngineError
from engine.runners.tensorrt import TensorRTBackend, deserialize_engine
from engine.storage.atomic import atomic

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True)
class CompiledPlan:
    """A plan in memory and its layers."""

    plan: bytes
    layers: tuple[Layer, ...]
    layers_from: str  # "network" or "engine inspector"
    build_s: float


def compile_graph(
    backend: TensorRTBackend, graph: bytes, options: BuildOptions, size: tuple[int, int], phases: Phases
) -> CompiledPlan:
    """Build a plan for `options` and report the builder's phases to `phases`.

    TensorRT 11 accepts only strongly typed networks, so the graph's types set the precision. Raises
    EngineError with TensorRT's message, also if a convolution or matrix product of an FP16 plan is not FP16.
    """
    checked, api = backend.checked, backend.trt
    builder = checked(api.Builder(backend.logger), "starting the builder")
    flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = checked(builder.create_network(flags), "creating the network")
    parser = api.OnnxParser(network, backend.logger)
    if not parser.parse(graph):
        problems = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise EngineError(f"{backend.name} {backend.version} can't parse the graph: {problems[:1]}")
    config = _make_config(backend, builder, network, options, size)
    start = time.perf_counter()
    serialized = _build_in_thread(backend, builder, network, config, phases)
    plan = bytes(checked(serialized, "building the plan"))
    build_s = time.perf_counter() - start
    _save_timing_cache(config, options)
    layers = tuple(_network_layers(backend, network))
    if options.precision == "fp16":
        _refuse_float32(layers, api.DataType.HALF.name)
    return CompiledPlan(plan, layers, "network", build_s)


def _build_in_thread(
    backend: TensorRTBackend,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    phases: Phases,
) -> trt.IHostMemory | None:
    """Build in a separate thread, so that Ctrl-C can stop a build of minutes.

    TensorRT's bindings discard a KeyboardInterrupt that is raised in their callbacks.
    """
    stop = threading.Event()
    config.progress_monitor = monitor_for(backend, phases, stop)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="build") as worker:
            try:
                return worker.submit(builder.build_serialized_network, network, config).result()
            except KeyboardInterrupt:
                stop.set()  # the builder ends at its next step
                raise
    except KeyboardInterrupt:
        backend.logger.errors.clear()  # its errors do not explain later failures
        raise


def _make_config(
    backend: TensorRTBackend,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    options: BuildOptions,
    size: tuple[int, int],
) -> trt.IBuilderConfig:
    checked, api = backend.checked, backend.trt
    config = checked(builder.create_builder_config(), "creating the configuration")
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if options.precision == "fp32":
        config.clear_flag(api.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.version_compatible:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = api.HardwareCompatibilityLevel.AMPERE_PLUS
    if backend.name == "tensorrt_rtx":
        _configure_rtx(backend, config, options)
    if options.timing_cache:
        _load_timing_cache(backend, config, options)
    pixels = checked(network.get_input(0), "reading the graph's input")
    for batch in options.batches:
        profile = checked(builder.create_optimization_profile(), "creating a profile")
        largest = (batch, 1, *size)
        profile.set_shape(pixels.name, (1, 1, *size), largest, largest)
        checked(config.add_optimization_profile(profile), f"the profile of {batch} images")
    return config


def _configure_rtx(backend: TensorRTBackend, config: Any, options: BuildOptions) -> None:
    """Set the GPUs to build for, which need not be in this machine, and allow capture by CUDA graphs."""
    capability = backend.trt.ComputeCapability  # type: ignore[attr-defined,unused-ignore]
    names = ["SM" + text.replace(".", "") for text in options.compute_capabilities] or ["CURRENT"]
    config.num_compute_capabilities = len(names)
    flags = backend.trt.BuilderFlag
    config.set_flag(flags.REQUIRE_USER_ALLOCATION)  # type: ignore[attr-defined,unused-ignore]
    for index, name in enumerate(names):
        backend.checked(config.set_compute_capability(getattr(capability, name), index), f"target {name}")


def _load_timing_cache(backend: TensorRTBackend, config: trt.IBuilderConfig, options: BuildOptions) -> None:
    assert options.timing_cache
    data = b""
    with suppress(FileNotFoundError):
        data = options.timing_cache.read_bytes()
    cache = backend.checked(config.create_timing_cache(data), f"reading {options.timing_cache}")
    backend.checked(config.set_timing_cache(cache, ignore_mismatch=False), "using the timing cache")


def _save_timing_cache(config: trt.IBuilderConfig, options: BuildOptions) -> None:
    if options.timing_cache and (cache := config.get_timing_cache()):
        with atomic(options.timing_cache) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))


def _network_layers(backend: TensorRTBackend, network: trt.INetworkDefinition) -> Iterator[Layer]:
    """List the layers of a strongly typed network; the builder keeps their types."""
    for index in range(network.num_layers):
        layer = backend.checked(network.get_layer(index), "reading a layer")
        tensor = layer.get_input(0) or layer.get_output(0)
        output = layer.get_output(0)
        assert tensor is not None
        yield Layer(
            name=layer.name,
            type=layer.type.name,
            input=tensor.dtype.name,
            output=output.dtype.name if output is not None else None,
        )


def _refuse_float32(layers: Sequence[Layer], half: str) -> None:
    weighted = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM")
    float32 = [str(layer.name) for layer in layers if layer.type in weighted and layer.input != half]
    if float32:
        raise EngineError(f"FP16 was requested, but {', '.join(float32[:5])} would run in another precision")


def inspect_layers(backend: TensorRTBackend, plan: bytes, options: BuildOptions) -> tuple[Layer, ...]:
    """List the layers of a plan as the engine inspector reports them on this GPU.

    Raises EngineError if it can't be loaded, or if FP16 was requested and a convolution or matrix
    product is not in FP16.
    """
    api = backend.trt
    engine = deserialize_engine(backend, plan, version_compatible=options.version_compatible)
    inspector = backend.checked(engine.create_engine_inspector(), "starting the engine inspector")
    text = inspector.get_engine_information(api.LayerInformationFormat.JSON)
    layers = []
    for layer in json.loads(text)["Layers"]:
        if isinstance(layer, str):  # only the name is known
            layers.append(Layer(name=layer))
            continue
        tensors = {
            side: [tensor.get("Format/Datatype", tensor.get("Format", "")) for tensor in layer.get(side, [])]
            for side in ("Inputs", "Outputs")
        }
        weights = layer.get("Weights")
        layers.append(
            Layer(
                name=layer.get("Name"),
                type=layer.get("LayerType"),
                input=", ".join(map(str, tensors["Inputs"])),
                output=", ".join(map(str, tensors["Outputs"])),
                weights=weights.get("Type") if isinstance(weights, dict) else None,
            )
        )
    if options.precision == "fp16":
        _refuse_float32_kernels(layers)
    return tuple(layers)


def _refuse_float32_kernels(layers: Sequence[Layer]) -> None:
    """Refuse float32 kernels by the tensor formats of the inspector, such as "Row major linear FP16".

    A kernel with FP16 weights computes in FP16, even if it reads float32, because it includes a cast.
    """
    kinds = ("conv", "gemm", "matrix_multiply", "matmul")
    float32 = [
        str(layer.name)
        for layer in layers
        if any(kind in str(layer.type).lower() for kind in kinds)
        and not re.search("fp16|half", f"{layer.input} {layer.weights}", re.IGNORECASE)
    ]
    if float32:
        raise EngineError(
            f"FP16 was requested, but the plan runs {', '.join(float32[:5])} in another precision"
        )
