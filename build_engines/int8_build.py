"""Build INT8 graphs for the CPU: quantize, gate, write passports."""

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
    BuiltMember,
    Floats,
    _BuildSession,
    _check_parity,
    _compare_logits,
    _reference_logits,
    _replace_folder,
    _run_graph,
)
from engine.bundle import plans
from engine.bundle.bundle import Bundle, Member
from engine.bundle.plans import Parity, Passport
from engine.core import hardware
from engine.core.errors import EngineError
from engine.core.hardware import processor_name
from engine.scoring.ensemble import combine_logits, softmax


def build_quantized(session: _BuildSession) -> tuple[Path, list[BuiltMember]]:
    """Build the INT8 graph of each member and compare members and ensemble with float32."""
    bundle, folder = session.bundle, session.bundle.path / plans.PLANS_FOLDER / plans.INT8_TARGET
    calibrating, comparing = session.images.split()
    session.say(
        f"calibrating on {len(calibrating.pixels)}, comparing on {len(comparing.pixels)} images: "
        f"{comparing.origin}, {'with' if comparing.labels is not None else 'without'} labels"
    )
    session = replace(session, images=comparing, references={})
    bits = 8 if hardware.has_vnni() else 7
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
        references.append(_reference_logits(session, member))
        candidates.append(_run_graph(session, member, graph.graph))
        found = _compare_logits(session, member, candidates[-1], "its graph", executed=True)
        made.append((member, graph, found, build_s))
    together = _check_parity(
        session,
        _combined_probabilities(bundle, references),
        _combined_probabilities(bundle, candidates),
        "the ensemble",
        executed=True,
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
    with _replace_folder(folder) as unfinished:
        for member, graph, found, build_s in made:
            passport = _int8_passport(member, graph, found, together, build_s, facts)
            (unfinished / passport.plan).write_bytes(graph.graph)
            plans.write_passport(unfinished, passport)
            built.append(BuiltMember(member.name, folder / passport.plan, len(graph.graph), build_s, found))
    size, build_s = sum(one.size for one in built), sum(one.build_s for one in built)
    return folder, [*built, BuiltMember("ensemble", folder, size, build_s, together)]


def _int8_graph(session: _BuildSession, member: Member, pixels: parity.Pixels, bits: int) -> QuantizedGraph:
    """Fine is what agrees twice as well as it has to on the images it is calibrated on."""
    reference = softmax(_run_graph(session, member, None, pixels))
    enough = (1 + session.options.limits[1]) / 2

    def fine(graph: bytes) -> bool:
        candidate = softmax(_run_graph(session, member, graph, pixels))
        found = parity.compare_probabilities(
            reference, candidate, executed=True, calibration="", options=session.options
        )
        return found.agreement >= enough

    try:
        return quantize_to_int8(member.files["onnx"].path.read_bytes(), pixels, fine, bits=bits)
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
    found: Parity,
    together: Parity,
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
        parity=found,
        ensemble=together,
    )
