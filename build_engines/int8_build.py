"""Build INT8 graphs for the CPU: quantize, compare, write passports."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from build_engines import parity
from build_engines.int8 import RECIPE, QuantizedGraph, quantize_to_int8
from build_engines.session import (
    BuildSession,
    BuiltMember,
    Floats,
    check_parity,
    compare_logits,
    reference_logits,
    replace_folder,
    run_graph,
)
from engine.bundle import plans
from engine.bundle.bundle import Bundle, Member
from engine.bundle.plans import Parity, Passport
from engine.core import hardware
from engine.core.errors import EngineError
from engine.core.hardware import processor_name
from engine.scoring.ensemble import combine_logits, softmax


def build_quantized(session: BuildSession) -> tuple[Path, list[BuiltMember]]:
    """Build the INT8 graph of each member and compare members and ensemble with float32."""
    bundle, folder = session.bundle, session.bundle.path / plans.PLANS_FOLDER / plans.INT8_TARGET
    calibration, comparison = session.images.split()
    session.say(
        f"calibrating on {len(calibration.pixels)}, comparing on {len(comparison.pixels)} images: "
        f"{comparison.origin}, {'with' if comparison.labels is not None else 'without'} labels"
    )
    session = replace(session, images=comparison, references={})
    bits = 8 if hardware.has_vnni() else 7
    quantized, references, candidates = [], [], []
    for member in bundle.members:
        start = time.perf_counter()
        session.say(f"{member.name}: quantizing, weights in {bits} bits")
        graph = _int8_graph(session, member, calibration.pixels, bits)
        build_s = time.perf_counter() - start
        float32_layers = sum(layer.precision == "FLOAT" for layer in graph.layers)
        session.say(
            f"{member.name}: {float32_layers} of {len(graph.layers)} layers stay in float32; "
            "comparing it with float32, on ONNX Runtime"
        )
        references.append(reference_logits(session, member))
        candidates.append(run_graph(session, member, graph.graph))
        agreement = compare_logits(session, member, candidates[-1], "its graph", executed=True)
        quantized.append((member, graph, agreement, build_s))
    ensemble = check_parity(
        session,
        _combined_probabilities(bundle, references),
        _combined_probabilities(bundle, candidates),
        "the ensemble",
        executed=True,
    )
    facts: dict[str, str | int | float | bool | None] = {
        "recipe": RECIPE,
        "weight_bits": bits,
        "calibration_images": len(calibration.pixels),
        "calibration_sha256": hashlib.sha256(calibration.pixels.tobytes()).hexdigest(),
        "onnx": metadata.version("onnx"),
        "processor": processor_name(),
    }
    built = []
    with replace_folder(folder) as unfinished:
        for member, graph, agreement, build_s in quantized:
            passport = _int8_passport(member, graph, agreement, ensemble, build_s, facts)
            (unfinished / passport.plan).write_bytes(graph.graph)
            plans.write_passport(unfinished, passport)
            built.append(
                BuiltMember(member.name, folder / passport.plan, len(graph.graph), build_s, agreement)
            )
    size, build_s = sum(member.size for member in built), sum(member.build_s for member in built)
    return folder, [*built, BuiltMember("ensemble", folder, size, build_s, ensemble)]


def _int8_graph(session: BuildSession, member: Member, pixels: parity.Pixels, bits: int) -> QuantizedGraph:
    """Quantize until the disagreement on the calibration images is at most half of the limit."""
    reference = softmax(run_graph(session, member, None, pixels))
    min_agreement = (1 + session.options.limits[1]) / 2

    def is_accurate(graph: bytes) -> bool:
        candidate = softmax(run_graph(session, member, graph, pixels))
        agreement = parity.compare_probabilities(
            reference, candidate, executed=True, calibration="", options=session.options
        )
        return agreement.agreement >= min_agreement

    try:
        return quantize_to_int8(member.files["onnx"].path.read_bytes(), pixels, is_accurate, bits=bits)
    except EngineError as error:
        raise type(error)(f"{member.name}: {error}") from None


def _combined_probabilities(bundle: Bundle, logits: list[Floats]) -> Floats:
    temperatures = [member.temperature for member in bundle.members]
    _, probabilities = combine_logits(
        np.stack(logits), weights=bundle.weights, temperatures=temperatures, temperature=bundle.temperature
    )
    return probabilities


def _int8_passport(
    member: Member,
    graph: QuantizedGraph,
    agreement: Parity,
    ensemble: Parity,
    build_s: float,
    facts: dict[str, str | int | float | bool | None],
) -> Passport:
    reference = member.files["onnx"]
    return Passport(
        format=plans.PASSPORT_FORMAT,
        member=member.name,
        target=plans.INT8_TARGET,
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
        parity=agreement,
        ensemble=ensemble,
    )
