"""Hold one build's bundle, options and reference logits; compare built graphs with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from build_engines import parity
from build_engines.fp16 import convert_to_fp16
from build_engines.options import BuildOptions
from build_engines.parity import CalibrationImages
from build_engines.progress import Phases
from engine.bundle.bundle import Bundle, Member
from engine.bundle.plans import Parity
from engine.runners.onnx import OnnxRunner
from engine.scoring.ensemble import softmax

Floats = npt.NDArray[np.float32]
OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class BuiltMember:
    """A member that was built and accepted."""

    member: str
    file: Path
    size: int  # bytes
    build_s: float
    parity: Parity


@dataclass(frozen=True)
class BuildSession:
    """The state that the builds of all members share."""

    bundle: Bundle
    options: BuildOptions
    say: OnMessage
    phases: Phases
    images: CalibrationImages  # to compare on
    references: dict[str, Floats] = field(default_factory=dict)  # float32 logits [N, C], by member


def source_graph(session: BuildSession, member: Member) -> bytes:
    """Return the graph to compile: the float32 graph, or its FP16 form."""
    reference_logits(session, member)  # first, because ONNX Runtime reports errors of a graph best
    reference = member.files["onnx"].path.read_bytes()
    if session.options.precision == "fp32":
        return reference
    session.say(f"{member.name}: converting to FP16")
    return convert_to_fp16(reference)


def fp16_name(member: Member) -> str:
    return f"{member.name}.fp16.onnx"


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to, which replaces `folder` at the end if there is no error."""
    unfinished = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_graph_parity(session: BuildSession, member: Member, graph: bytes) -> Parity:
    """Compare the graph on ONNX Runtime; an unconverted graph is the reference itself."""
    options = session.options
    if options.precision == "fp16":
        session.say(f"{member.name}: comparing the FP16 graph with float32, on ONNX Runtime")
        logits = run_graph(session, member, graph)
    else:
        logits = reference_logits(session, member)
    return compare_logits(session, member, logits, "its graph", executed=False)


def reference_logits(session: BuildSession, member: Member) -> Floats:
    if member.name not in session.references:
        session.references[member.name] = run_graph(session, member, None)
    return session.references[member.name]


def run_graph(
    session: BuildSession, member: Member, graph: bytes | None, pixels: parity.Pixels | None = None
) -> Floats:
    """Run `graph` in place of the member's own on ONNX Runtime."""
    with OnnxRunner(member, session.bundle, graph=graph) as runner:
        return parity.run_in_batches(runner.infer, session.images.pixels if pixels is None else pixels)


def compare_logits(
    session: BuildSession, member: Member, logits: Floats, what: str, *, executed: bool
) -> Parity:
    temperature = np.float32(member.temperature)
    reference, candidate = (
        softmax(reference_logits(session, member) / temperature),
        softmax(logits / temperature),
    )
    return check_parity(session, reference, candidate, f"{member.name}: {what}", executed=executed)


def check_parity(
    session: BuildSession, reference: Floats, candidate: Floats, what: str, *, executed: bool
) -> Parity:
    """Compare probabilities [N, C]. Raises ParityError if they differ too much."""
    agreement = parity.compare_probabilities(
        reference,
        candidate,
        executed=executed,
        calibration=session.images.origin,
        options=session.options,
        labels=session.images.labels,
    )
    parity.require_parity(agreement, what, session.options.precision)
    return agreement
