"""From a bundle to installed plans: compile, gate, inspect, write the passports, rename into place."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from build_engines import parity
from build_engines.compiler import Compiled, compile_graph, inspect
from build_engines.half import half_graph
from build_engines.options import Options
from build_engines.parity import Images
from build_engines.progress import Phases
from build_engines.quantize import RECIPE, Quantized, int8_graph
from engine import bundle as bundles
from engine import plans
from engine.bundle import Bundle, Member
from engine.ensemble import fuse, softmax
from engine.errors import EngineError, UsageError
from engine.gpu import machine
from engine.lock import hold
from engine.plans import Gpu, Parity, Passport, Plan, Profile
from engine.provenance import processor_name
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
    images: Images  # to compare on
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
        session = _Session(bundle, options, say, phases, parity.calibration_images(bundle, options))
        if options.precision == "int8":
            return _build_quantized(session)
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
    with _replacing(folder) as unfinished:
        built = [
            _build_plan(session, member, backend, gpu, unfinished, target)
            for member in session.bundle.members
        ]
        for graph in unfinished.glob("*.onnx"):  # all members are accepted
            graph.replace(session.bundle.path / graph.name)
    return folder, built


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` at the end, if there is no error."""
    unfinished = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _build_quantized(session: _Session) -> tuple[Path, list[Built]]:
    """The INT8 graph of each member, held against float32 alone and as an ensemble."""
    bundle, folder = session.bundle, session.bundle.path / plans.PLANS / plans.INT8
    calibrating, comparing = session.images.split()
    session.say(
        f"calibrating on {len(calibrating.pixels)}, comparing on {len(comparing.pixels)} images: "
        f"{comparing.origin}, {'with' if comparing.labels is not None else 'without'} labels"
    )
    session = replace(session, images=comparing, references={})
    bits = 8 if plans.has_vnni() else 7
    made, references, candidates = [], [], []
    for member in bundle.members:
        start = time.perf_counter()
        session.say(f"{member.name}: quantizing, weights in {bits} bits")
        graph = _int8_graph(session, member, calibrating.pixels, bits)
        build_s = time.perf_counter() - start
        kept = sum(layer.precision == "FLOAT" for layer in graph.layers)
        session.say(
            f"{member.name}: {kept} of {len(graph.layers)} layers stay in float32; "
            "comparing it with float32, on ONNX Runtime"
        )
        references.append(_reference(session, member))
        candidates.append(_logits(session, member, graph.graph))
        found = _compared(session, member, candidates[-1], "its graph", executed=True)
        made.append((member, graph, found, build_s))
    together = _gate(
        session, _fused(bundle, references), _fused(bundle, candidates), "the ensemble", executed=True
    )
    facts: dict[str, str | int | float | bool | None] = {
        "recipe": RECIPE,
        "weight_bits": bits,
        "calibration_images": len(calibrating.pixels),
        "calibration_sha256": hashlib.sha256(calibrating.pixels.tobytes()).hexdigest(),
        "onnx": metadata.version("onnx"),
        "processor": processor_name(),
    }
    built = []
    with _replacing(folder) as unfinished:
        for member, graph, found, build_s in made:
            passport = _int8_passport(member, graph, found, together, build_s, facts)
            (unfinished / passport.plan).write_bytes(graph.graph)
            plans.write(unfinished, passport)
            built.append(Built(member.name, folder / passport.plan, len(graph.graph), build_s, found))
    size, build_s = sum(one.size for one in built), sum(one.build_s for one in built)
    return folder, [*built, Built("ensemble", folder, size, build_s, together)]


def _int8_graph(session: _Session, member: Member, pixels: parity.Pixels, bits: int) -> Quantized:
    """Fine is what agrees twice as well as it has to on the images it is calibrated on."""
    reference = softmax(_logits(session, member, None, pixels))
    enough = (1 + session.options.limits[1]) / 2

    def fine(graph: bytes) -> bool:
        candidate = softmax(_logits(session, member, graph, pixels))
        found = parity.compare(reference, candidate, executed=True, calibration="", options=session.options)
        return found.agreement >= enough

    try:
        return int8_graph(member.files["onnx"].path.read_bytes(), pixels, fine, bits=bits)
    except EngineError as error:
        raise type(error)(f"{member.name}: {error}") from None


def _fused(bundle: Bundle, logits: list[Floats]) -> Floats:
    temperatures = [member.temperature for member in bundle.members]
    _, probabilities = fuse(
        np.stack(logits), weights=bundle.weights, temperatures=temperatures, temperature=bundle.temperature
    )
    return probabilities


def _int8_passport(
    member: Member,
    graph: Quantized,
    found: Parity,
    together: Parity,
    build_s: float,
    facts: dict[str, str | int | float | bool | None],
) -> Passport:
    reference = member.files["onnx"]
    return Passport(
        format=plans.FORMAT,
        member=member.name,
        target=plans.INT8,
        backend="onnx",
        frontend="onnx",
        precision="int8",
        reference_sha256=reference.sha256,
        source=reference.path.name,
        source_sha256=reference.sha256,
        plan=f"{member.name}.onnx",
        plan_sha256=hashlib.sha256(graph.graph).hexdigest(),
        plan_bytes=len(graph.graph),
        version=metadata.version("onnxruntime"),
        cuda=None,
        gpu=None,
        compute_capabilities=(),
        hardware_compatible=False,
        version_compatible=True,
        profiles=(),
        options=facts,
        layers=graph.layers,
        layers_from="graph",
        build_s=round(build_s, 3),
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        parity=found,
        ensemble=together,
    )


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
        found = _logits(session, member, graph)
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
        found = [
            parity.on_gpu(runner, session.images.pixels, batch, classes) for batch in session.options.batches
        ]
    agreements = [_compared(session, member, logits, "its plan", executed=True) for logits in found]
    agreement = max(agreements, key=lambda one: one.max)
    layers = inspect(backend, plan.read(), session.options)
    return plan.with_facts(parity=agreement, layers=layers, layers_from="engine inspector")


def _reference(session: _Session, member: Member) -> Floats:
    if member.name not in session.references:
        session.references[member.name] = _logits(session, member, None)
    return session.references[member.name]


def _logits(
    session: _Session, member: Member, graph: bytes | None, pixels: parity.Pixels | None = None
) -> Floats:
    """Of `graph` in place of the member's own, on ONNX Runtime."""
    with OnnxRunner(member, session.bundle, graph=graph) as runner:
        return parity.in_batches(runner.infer, session.images.pixels if pixels is None else pixels)


def _compared(session: _Session, member: Member, logits: Floats, what: str, *, executed: bool) -> Parity:
    temperature = np.float32(member.temperature)
    reference, candidate = softmax(_reference(session, member) / temperature), softmax(logits / temperature)
    return _gate(session, reference, candidate, f"{member.name}: {what}", executed=executed)


def _gate(session: _Session, reference: Floats, candidate: Floats, what: str, *, executed: bool) -> Parity:
    """Compare probabilities [N, C]. Raises ParityError."""
    found = parity.compare(
        reference,
        candidate,
        executed=executed,
        calibration=session.images.origin,
        options=session.options,
        labels=session.images.labels,
    )
    parity.require(found, what, session.options.precision)
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
        parity=found or Parity.pending(*options.limits),
    )


def _builder_options(options: Options) -> dict[str, str | int | float | bool | None]:
    return {
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "max_aux_streams": options.max_aux_streams,
    }
