"""From a bundle to installed plans: compile, gate, inspect, write the passports, rename into place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from build_engines import parity
from build_engines.compiler import Compiled, compile_graph, inspect
from build_engines.half import half_graph
from build_engines.options import Options
from build_engines.progress import Phases
from engine import bundle as bundles
from engine import plans
from engine.bundle import Bundle, Member
from engine.ensemble import softmax
from engine.errors import EngineError, UsageError
from engine.gpu import machine
from engine.lock import hold
from engine.plans import Gpu, Parity, Passport, Plan, Profile
from engine.runners.onnx import OnnxRunner
from engine.runners.tensorrt import Backend, TensorRTRunner
from engine.store import atomic

Floats = npt.NDArray[np.float32]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """One member, built and accepted."""

    member: str
    file: Path
    size: int  # bytes
    build_s: float
    parity: Parity


@dataclass(frozen=True)
class _Session:
    """What the builds of all members share."""

    bundle: Bundle
    options: Options
    say: Say
    phases: Phases
    pixels: npt.NDArray[np.uint8]  # [N, 1, H, W], to compare on
    calibration: str  # where they are from
    references: dict[str, Floats] = field(default_factory=dict)  # float32 logits [N, C], by member


def build(options: Options, phases: Phases, say: Say = lambda _: None) -> tuple[Path, list[Built]]:
    """Build all members for the target; returns the folder of the results and what was built.

    Raises UsageError, EngineError (a build failed) or ParityError; then nothing is replaced.
    """
    bundle = bundles.load(options.bundle)
    gpu = None if options.target == "onnx" else _gpu_for(options)
    backend = None if options.target == "onnx" else Backend(options.target)
    folder = bundle.path / plans.PLANS
    folder.mkdir(exist_ok=True)
    try:
        lock = hold(folder / ".lock")
    except BlockingIOError:
        raise UsageError(f"{folder}: another process builds there; wait for it") from None
    try:
        session = _Session(bundle, options, say, phases, *parity.calibration_pixels(bundle, options))
        if backend is None:
            return bundle.path, _build_graphs(session)
        return _build_plans(session, backend, gpu)
    finally:
        os.close(lock)


def _gpu_for(options: Options) -> Gpu | None:
    """The GPU here. There may be none where TensorRT for RTX builds ahead of time for others."""
    if options.target == "tensorrt_rtx":
        without = "without one, name the GPUs to build for: --compute-capability sm86,sm89"
    else:
        without = "without one: --target tensorrt_rtx --compute-capability sm86,sm89, for RTX GPUs"
    try:
        return machine.gpu(without=without)
    except UsageError:
        if options.compute_capabilities:
            return None
        raise


def _build_graphs(session: _Session) -> list[Built]:
    """FP16 graphs of all members, written once all are accepted."""
    made = []
    for member in session.bundle.members:
        graph = _graph(session, member)
        made.append((member, graph, _gate_graph(session, member, graph)))
    return [
        Built(member.name, _install_graph(session, member, graph), len(graph), 0.0, found)
        for member, graph, found in made
    ]


def _graph(session: _Session, member: Member) -> bytes:
    """What is compiled: the float32 graph, or its FP16 form."""
    _reference(session, member)  # first: ONNX Runtime says best what is wrong with a graph
    reference = member.files["onnx"].path.read_bytes()
    if session.options.precision == "fp32":
        return reference
    session.say(f"{member.name}: converting to FP16")
    return half_graph(reference)


def _half_name(member: Member) -> str:
    return f"{member.name}.fp16.onnx"


def _install_graph(session: _Session, member: Member, graph: bytes) -> Path:
    file = session.bundle.path / _half_name(member)
    with atomic(file) as temporary:
        temporary.write_bytes(graph)
    return file


def _build_plans(session: _Session, backend: Backend, gpu: Gpu | None) -> tuple[Path, list[Built]]:
    target = _target_name(session.options, backend, gpu)
    folder = session.bundle.path / plans.PLANS / target
    unfinished = folder.with_name(f".{target}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        built = [
            _build_plan(session, member, backend, gpu, unfinished, target)
            for member in session.bundle.members
        ]
        for graph in unfinished.glob("*.onnx"):  # all members are accepted
            graph.replace(session.bundle.path / graph.name)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder, built


def _target_name(options: Options, backend: Backend, gpu: Gpu | None) -> str:
    """Such as tensorrt-sm90-11.1 or tensorrt_rtx-sm86-sm89-1.7-fp32."""
    version = ".".join(backend.version.split(".")[:2])
    names = [f"sm{capability.replace('.', '')}" for capability in _capabilities(options, gpu)]
    kind = [] if options.precision == "fp16" else [options.precision]
    return "-".join([backend.name, *names, version, *kind])


def _capabilities(options: Options, gpu: Gpu | None) -> tuple[str, ...]:
    return options.compute_capabilities or ((gpu.capability,) if gpu else ())


def _build_plan(
    session: _Session, member: Member, backend: Backend, gpu: Gpu | None, folder: Path, target: str
) -> Built:
    """Compile a member into `folder` and hold it against the reference: executed where the GPU here can."""
    options = session.options
    graph = _graph(session, member)
    runs_here = gpu is not None and gpu.capability in _capabilities(options, gpu)
    found = None if runs_here else _gate_graph(session, member, graph)
    session.say(f"{member.name}: building the plan for {target}")
    try:
        compiled = _compiled(session, member, backend, graph)
        passport = _passport(session, member, backend, gpu, target, graph, compiled, found)
        plan = Plan(folder / passport.plan, passport)
        plan.path.write_bytes(compiled.plan)
        if runs_here:
            plan = _executed(session, member, backend, plan)
    except (RuntimeError, EngineError) as error:
        if not machine.is_shortage(error):
            raise
        raise EngineError(
            f"{member.name}: out of GPU memory with batches of {options.batch_size}; free some, or give a "
            f"smaller --batch-size or --workspace ({' '.join(str(error).split())[:160]})"
        ) from None
    plans.write(folder, plan.passport)
    if passport.source == _half_name(member):
        (folder / passport.source).write_bytes(graph)
    return Built(member.name, plan.path, len(compiled.plan), compiled.build_s, plan.passport.parity)


def _compiled(session: _Session, member: Member, backend: Backend, graph: bytes) -> Compiled:
    if session.options.frontend == "torch-tensorrt":
        from build_engines.torch_tensorrt import compile_module

        return compile_module(session.bundle, member, session.options)
    return compile_graph(backend, graph, session.options, session.bundle.size, session.phases)


def _gate_graph(session: _Session, member: Member, graph: bytes) -> Parity:
    """Compare the graph on ONNX Runtime; an unconverted one is the reference itself."""
    options = session.options
    if options.precision == "fp16":
        session.say(f"{member.name}: comparing the FP16 graph with float32, on ONNX Runtime")
        with OnnxRunner(member, session.bundle, graph=graph) as runner:
            found = parity.in_batches(runner.infer, session.pixels)
    else:
        found = _reference(session, member)
    return _compared(session, member, found, "its graph", executed=False)


def _executed(session: _Session, member: Member, backend: Backend, plan: Plan) -> Plan:
    """Run the plan on the GPU here: its passport says how it agrees, and what the inspector sees.

    Each profile has kernels of its own: the one that agrees least counts.
    """
    session.say(f"{member.name}: comparing the plan with float32, on the GPU")
    classes = len(session.bundle.classes)
    with TensorRTRunner(member, session.bundle, plan) as runner:
        found = [parity.on_gpu(runner, session.pixels, batch, classes) for batch in session.options.batches]
    agreements = [_compared(session, member, logits, "its plan", executed=True) for logits in found]
    agreement = max(agreements, key=lambda one: one.max)
    layers = inspect(backend, plan.read(), session.options)
    return plan.with_facts(parity=agreement, layers=layers, layers_from="engine inspector")


def _reference(session: _Session, member: Member) -> Floats:
    if member.name not in session.references:
        with OnnxRunner(member, session.bundle) as runner:
            session.references[member.name] = parity.in_batches(runner.infer, session.pixels)
    return session.references[member.name]


def _compared(session: _Session, member: Member, logits: Floats, what: str, *, executed: bool) -> Parity:
    temperature = np.float32(member.temperature)
    found = parity.compare(
        softmax(_reference(session, member) / temperature),
        softmax(logits / temperature),
        executed=executed,
        calibration=session.calibration,
        options=session.options,
    )
    parity.require(found, f"{member.name}: {what} in {session.options.precision}")
    return found


def _passport(
    session: _Session,
    member: Member,
    backend: Backend,
    gpu: Gpu | None,
    target: str,
    graph: bytes,
    compiled: Compiled,
    found: Parity | None,
) -> Passport:
    options = session.options
    onnx = options.frontend == "onnx"
    file = member.files["onnx" if onnx else "safetensors"]
    converted = onnx and options.precision == "fp16"
    return Passport(
        format=plans.FORMAT,
        member=member.name,
        target=target,
        backend=backend.name,
        frontend=options.frontend,
        precision=options.precision,
        reference_sha256=member.files["onnx"].sha256,
        source=_half_name(member) if converted else file.path.name,
        source_sha256=hashlib.sha256(graph).hexdigest() if converted else file.sha256,
        plan=f"{member.name}.plan",
        plan_sha256=hashlib.sha256(compiled.plan).hexdigest(),
        plan_bytes=len(compiled.plan),
        version=backend.version,
        cuda=machine.cuda_version(),
        gpu=gpu,
        compute_capabilities=_capabilities(options, gpu),
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        profiles=tuple(Profile(min=1, opt=batch, max=batch) for batch in options.batches),
        options=_builder_options(options),
        layers=compiled.layers,
        layers_from=compiled.layers_from,
        build_s=round(compiled.build_s, 3),
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        parity=found or Parity.pending(options.limit, options.agreement),
    )


def _builder_options(options: Options) -> dict[str, Any]:
    return {
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "max_aux_streams": options.max_aux_streams,
    }
