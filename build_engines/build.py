"""Build a bundle's plans: compile, compare, inspect, write the passports, install."""

from __future__ import annotations

import os
from pathlib import Path

from build_engines import parity
from build_engines.int8_build import build_quantized
from build_engines.options import BuildOptions
from build_engines.plans import build_plans
from build_engines.progress import Phases
from build_engines.session import (
    BuildSession,
    BuiltMember,
    OnMessage,
    check_graph_parity,
    fp16_name,
    source_graph,
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
    """Build all members for the target; return the folder of the plans and the built members.

    Raises UsageError, EngineError (a build failed) or ParityError, and then replaces nothing.
    """
    bundle = bundles.load_bundle(options.bundle)
    gpu = None if options.target == "onnx" else _require_gpu(options)
    backend = None if options.target == "onnx" else TensorRTBackend(options.target)
    folder = bundle.path / plans.PLANS_FOLDER
    folder.mkdir(exist_ok=True)
    try:
        lock = lock_file(folder / ".lock")
    except BlockingIOError:
        raise UsageError(
            f"{folder}: another process is building in this folder; wait until it ends"
        ) from None
    try:
        session = BuildSession(bundle, options, say, phases, parity.load_images(bundle, options))
        if options.precision == "int8":
            return build_quantized(session)
        if backend is None:
            return bundle.path, _build_graphs(session)
        return build_plans(session, backend, gpu)
    finally:
        os.close(lock)


def _require_gpu(options: BuildOptions) -> Gpu | None:
    """Return this machine's GPU, or None if TensorRT for RTX builds for other GPUs."""
    if options.target == "tensorrt_rtx":
        hint = "without a GPU, name the GPUs to build for: --compute-capability sm86,sm89"
    else:
        hint = "without a GPU: --target tensorrt_rtx --compute-capability sm86,sm89, for RTX GPUs"
    try:
        return hardware.require_gpu(without=hint)
    except UsageError:
        if options.compute_capabilities:
            return None
        raise


def _build_graphs(session: BuildSession) -> list[BuiltMember]:
    """Build the FP16 graphs of all members; write them after all are accepted."""
    accepted = []
    for member in session.bundle.members:
        graph = source_graph(session, member)
        accepted.append((member, graph, check_graph_parity(session, member, graph)))
    return [
        BuiltMember(member.name, _install_graph(session, member, graph), len(graph), 0.0, agreement)
        for member, graph, agreement in accepted
    ]


def _install_graph(session: BuildSession, member: Member, graph: bytes) -> Path:
    file = session.bundle.path / fp16_name(member)
    with atomic(file) as temporary:
        temporary.write_bytes(graph)
    return file
