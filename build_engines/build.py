"""Build a bundle's plans: compile, gate, inspect, write the passports, rename into place."""

from __future__ import annotations

import os
from pathlib import Path

from build_engines import parity
from build_engines.int8_build import build_quantized
from build_engines.options import BuildOptions
from build_engines.plans import build_plans
from build_engines.progress import Phases
from build_engines.session import (
    BuiltMember,
    OnMessage,
    _BuildSession,
    _check_graph_parity,
    _fp16_name,
    _source_graph,
)
from engine.bundle import bundle as bundles
from engine.bundle import plans
from engine.bundle.bundle import Member
from engine.core import hardware
from engine.core.errors import UsageError
from engine.core.hardware import Gpu
from engine.runners.tensorrt import TensorRTBackend
from engine.storage.atomic import atomic
from engine.storage.locks import lock_file


def build(
    options: BuildOptions, phases: Phases, say: OnMessage = lambda _: None
) -> tuple[Path, list[BuiltMember]]:
    """Build all members for the target; returns the folder of the results and what was built.

    Raises UsageError, EngineError (a build failed) or ParityError; then nothing is replaced.
    """
    bundle = bundles.load_bundle(options.bundle)
    gpu = None if options.target == "onnx" else _require_gpu(options)
    backend = None if options.target == "onnx" else TensorRTBackend(options.target)
    folder = bundle.path / plans.PLANS_FOLDER
    folder.mkdir(exist_ok=True)
    try:
        lock = lock_file(folder / ".lock")
    except BlockingIOError:
        raise UsageError(f"{folder}: another process builds there; wait for it") from None
    try:
        session = _BuildSession(bundle, options, say, phases, parity.load_images(bundle, options))
        if options.precision == "int8":
            return build_quantized(session)
        if backend is None:
            return bundle.path, _build_graphs(session)
        return build_plans(session, backend, gpu)
    finally:
        os.close(lock)


def _require_gpu(options: BuildOptions) -> Gpu | None:
    """Return the GPU, None where TensorRT for RTX builds ahead of time for others."""
    if options.target == "tensorrt_rtx":
        without = "without one, name the GPUs to build for: --compute-capability sm86,sm89"
    else:
        without = "without one: --target tensorrt_rtx --compute-capability sm86,sm89, for RTX GPUs"
    try:
        return hardware.require_gpu(without=without)
    except UsageError:
        if options.compute_capabilities:
            return None
        raise


def _build_graphs(session: _BuildSession) -> list[BuiltMember]:
    """FP16 graphs of all members, written once all are accepted."""
    made = []
    for member in session.bundle.members:
        graph = _source_graph(session, member)
        made.append((member, graph, _check_graph_parity(session, member, graph)))
    return [
        BuiltMember(member.name, _install_graph(session, member, graph), len(graph), 0.0, found)
        for member, graph, found in made
    ]


def _install_graph(session: _BuildSession, member: Member, graph: bytes) -> Path:
    file = session.bundle.path / _fp16_name(member)
    with atomic(file) as temporary:
        temporary.write_bytes(graph)
    return file
