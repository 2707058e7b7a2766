"""Build TensorRT plans: compile, compare, execute, write passports."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from build_engines import parity
from build_engines.compiler import CompiledPlan, compile_graph, inspect_layers
from build_engines.options import BuildOptions
from build_engines.session import (
    BuildSession,
    BuiltMember,
    check_graph_parity,
    compare_logits,
    fp16_name,
    replace_folder,
    source_graph,
)
from engine.bundle import plans
from engine.bundle.bundle import Member
from engine.bundle.plans import OptimizationProfile, Parity, Passport, Plan
from engine.core import hardware
from engine.core.errors import EngineError
from engine.core.hardware import Gpu
from engine.runners.tensorrt import TensorRTBackend, TensorRTRunner


def build_plans(
    session: BuildSession, backend: TensorRTBackend, gpu: Gpu | None
) -> tuple[Path, list[BuiltMember]]:
    target = _target_name(session.options, backend, gpu)
    folder = session.bundle.path / plans.PLANS_FOLDER / target
    with replace_folder(folder) as unfinished:
        built = [
            _build_plan(session, member, backend, gpu, unfinished, target)
            for member in session.bundle.members
        ]
        for graph in unfinished.glob("*.onnx"):  # after all members are accepted
            graph.replace(session.bundle.path / graph.name)
    return folder, built


def _target_name(options: BuildOptions, backend: TensorRTBackend, gpu: Gpu | None) -> str:
    """Return the target's name, such as tensorrt-sm90-11.1 or tensorrt_rtx-sm86-sm89-1.7-fp32."""
    version = ".".join(backend.version.split(".")[:2])
    names = [f"sm{capability.replace('.', '')}" for capability in _capabilities(options, gpu)]
    precision = [] if options.precision == "fp16" else [options.precision]
    return "-".join([backend.name, *names, version, *precision])


def _capabilities(options: BuildOptions, gpu: Gpu | None) -> tuple[str, ...]:
    return options.compute_capabilities or ((gpu.capability,) if gpu else ())


def _build_plan(
    session: BuildSession,
    member: Member,
    backend: TensorRTBackend,
    gpu: Gpu | None,
    folder: Path,
    target: str,
) -> BuiltMember:
    """Compile a member into `folder` and compare it with the reference, on this machine's GPU if possible."""
    options = session.options
    graph = source_graph(session, member)
    runs_here = gpu is not None and gpu.capability in _capabilities(options, gpu)
    graph_parity = None if runs_here else check_graph_parity(session, member, graph)
    session.say(f"{member.name}: building the plan for {target}")
    try:
        compiled = _compile_plan(session, member, backend, graph)
        passport = _passport(session, member, backend, gpu, target, graph, compiled, graph_parity)
        plan = Plan(folder / passport.plan, passport)
        plan.path.write_bytes(compiled.plan)
        if runs_here:
            plan = _verify_plan(session, member, backend, plan)
    except (RuntimeError, EngineError) as error:
        if not hardware.is_out_of_memory(error):
            raise
        raise EngineError(
            f"{member.name}: out of GPU memory with batches of {options.batch_size}; free some memory or "
            f"set a smaller --batch-size or --workspace ({' '.join(str(error).split())[:160]})"
        ) from None
    plans.write_passport(folder, plan.passport)
    if passport.source == fp16_name(member):
        (folder / passport.source).write_bytes(graph)
    return BuiltMember(member.name, plan.path, len(compiled.plan), compiled.build_s, plan.passport.parity)


def _compile_plan(
    session: BuildSession, member: Member, backend: TensorRTBackend, graph: bytes
) -> CompiledPlan:
    if session.options.frontend == "torch-tensorrt":
        from build_engines.torch_tensorrt import compile_module

        return compile_module(session.bundle, member, session.options)
    return compile_graph(backend, graph, session.options, session.bundle.size, session.phases)


def _verify_plan(session: BuildSession, member: Member, backend: TensorRTBackend, plan: Plan) -> Plan:
    """Run the plan on this machine's GPU; add its agreement and the inspected layers to the passport.

    Each profile has different kernels; the one with the largest difference counts.
    """
    session.say(f"{member.name}: comparing the plan with float32, on the GPU")
    classes = len(session.bundle.classes)
    with TensorRTRunner(member, session.bundle, plan) as runner:
        outputs = [
            parity.run_on_gpu(runner, session.images.pixels, batch, classes)
            for batch in session.options.batches
        ]
    agreements = [compare_logits(session, member, logits, "its plan", executed=True) for logits in outputs]
    agreement = max(agreements, key=lambda agreement: agreement.max)
    layers = inspect_layers(backend, plan.read(), session.options)
    return plan.with_facts(parity=agreement, layers=layers, layers_from="engine inspector")


def _passport(
    session: BuildSession,
    member: Member,
    backend: TensorRTBackend,
    gpu: Gpu | None,
    target: str,
    graph: bytes,
    compiled: CompiledPlan,
    graph_parity: Parity | None,
) -> Passport:
    options = session.options
    onnx = options.frontend == "onnx"
    file = member.files["onnx" if onnx else "safetensors"]
    converted = onnx and options.precision == "fp16"
    return Passport(
        format=plans.PASSPORT_FORMAT,
        member=member.name,
        target=target,
        backend=backend.name,
        frontend=options.frontend,
        precision=options.precision,
        reference_sha256=member.files["onnx"].sha256,
        source=fp16_name(member) if converted else file.path.name,
        source_sha256=hashlib.sha256(graph).hexdigest() if converted else file.sha256,
        plan=f"{member.name}.plan",
        plan_sha256=hashlib.sha256(compiled.plan).hexdigest(),
        plan_bytes=len(compiled.plan),
        version=backend.version,
        cuda=hardware.cuda_version(),
        gpu=gpu,
        compute_capabilities=_capabilities(options, gpu),
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        profiles=tuple(OptimizationProfile(min=1, opt=batch, max=batch) for batch in options.batches),
        options=_builder_options(options),
        layers=compiled.layers,
        layers_from=compiled.layers_from,
        build_s=round(compiled.build_s, 3),
        built=datetime.now(UTC).isoformat(timespec="seconds"),
        parity=graph_parity or Parity.pending(*options.limits),
    )


def _builder_options(options: BuildOptions) -> dict[str, str | int | float | bool | None]:
    return {
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "max_aux_streams": options.max_aux_streams,
    }
