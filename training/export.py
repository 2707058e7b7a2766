"""Write trained members as a bundle: to a temporary folder, checked, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save as arrays_to_bytes
from safetensors.torch import save as tensors_to_bytes

from engine.bundle import bundle as bundles
from engine.bundle.bundle import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FileEntry,
    InputEntry,
    MemberEntry,
    Normalization,
)
from engine.bundle.class_names import class_groups
from engine.core.errors import ParityError, UsageError
from engine.core.settings import Decode
from engine.runners.network import Network, fold_channels
from engine.runners.onnx import OnnxRunner
from engine.scoring.ensemble import softmax
from training.data import Pixels
from training.phases.features import infer

Floats = npt.NDArray[np.float32]

OPSET = 20
CANARY_COUNT = 32
CANARY_SEED = 871_236_455  # differs from the seeds of synthetic training sets
CANARY_SIDES = (256, 640)  # pixels; height and width of the radiographs they are made from
PROBABILITY_LIMIT = 1e-4  # largest difference between the exported graph and the torch module


@dataclass(frozen=True, kw_only=True)
class ExportedMember:
    """A trained member, ready to be written."""

    name: str  # [a-z0-9_]+
    architecture: str
    weight: float
    network: Network


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless a bundle may be written to `target`. Only bundles are overwritten."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UsageError(f"{target} exists; choose another folder or set --overwrite")
    if not (target / bundles.DESCRIPTION_FILE).is_file():
        raise UsageError(
            f"{target} is not a bundle (no {bundles.DESCRIPTION_FILE}): --overwrite only replaces bundles"
        )


def canary_pixels(*, size: tuple[int, int], decode: Decode = "exact") -> Pixels:
    """Return synthetic radiographs, preprocessed by the engine: uint8 [32, 1, H, W]."""
    from engine.pipeline.load_pixels import load_pixels
    from training.synthetic import write_archive

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifest = write_archive(
            folder,
            count=CANARY_COUNT,
            seed=CANARY_SEED,
            size_range=CANARY_SIDES,
            balance="balanced",
            processes=1,
        )
        images = sorted(path for path in folder.rglob("*.*") if path != manifest)
        loaded = load_pixels(images, size=size, decode=decode)
    assert len(loaded.pixels) == CANARY_COUNT, loaded.failures
    return loaded.pixels


def write_bundle(
    target: Path,
    members: Sequence[ExportedMember],
    *,
    classes: Sequence[str],
    canaries: Pixels,
    check: Pixels,
    training: dict[str, Any],
    decode: Decode = "exact",
    temperature: float = 1.0,
    documents: Mapping[str, str] = MappingProxyType({}),
    overwrite: bool = False,
) -> None:
    """Write a bundle to `target` atomically.

    `canaries` and `check` are uint8 [N, 1, H, W], decoded with `decode`; each exported graph is compared
    with its network on both. `documents` are texts for people, by file name. Raises UsageError if the target
    exists, ParityError if a graph differs.
    """
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.training-new")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a training that was killed
    unfinished.mkdir()
    try:
        for name, text in documents.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        logits = _write_members(unfinished, members, canaries)
        _write_canaries(unfinished / "canaries", canaries, logits)
        description = bundles.EnsembleDescription(
            format=bundles.FORMAT_VERSION,
            classes=tuple(classes),
            groups=class_groups(classes),
            input=_describe_input(canaries, members),
            decode=decode,
            temperature=temperature,
            members=tuple(_describe_member(unfinished, member) for member in members),
            canaries=_describe_file(unfinished, "canaries/canaries.safetensors"),
            documents=tuple(_describe_file(unfinished, name) for name in documents),
            training=training,
        )
        (unfinished / bundles.DESCRIPTION_FILE).write_bytes(bundles.serialize(description))
        _check_parity(unfinished, members, canaries, logits, check)
        _fsync_folder(unfinished)
        _move_into_place(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def export_onnx(network: Network, file: Path, *, size: tuple[int, int]) -> None:
    """Export `network` as a float32 graph, `pixels` uint8 [N, 1, H, W] -> `logits` [N, C] with dynamic N."""
    example = torch.zeros(2, 1, *size, dtype=torch.uint8)
    with _silence_exporter():
        program = torch.onnx.export(
            fold_channels(network).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with the paths of the machine that trained
        program.save(file, external_data=False)


def _write_members(folder: Path, members: Sequence[ExportedMember], canaries: Pixels) -> Floats:
    """Write graphs and weights; return PyTorch's logits [M, N, C] of the canaries."""
    size = (canaries.shape[2], canaries.shape[3])
    for member in members:
        export_onnx(member.network, folder / f"{member.name}.onnx", size=size)
        states = {name: value.contiguous() for name, value in member.network.state_dict().items()}
        (folder / f"{member.name}.safetensors").write_bytes(tensors_to_bytes(states))
    return np.stack([infer(member.network, torch.from_numpy(canaries)).numpy() for member in members])


def _describe_input(pixels: Pixels, members: Sequence[ExportedMember]) -> InputEntry:
    """Describe the input of the graphs; it names the normalization, which is inside them."""
    (normalization,) = {member.network.normalization for member in members}
    return InputEntry(
        height=pixels.shape[2],
        width=pixels.shape[3],
        channels=1,
        dtype="uint8",
        normalization=None
        if normalization == "none"
        else Normalization(mean=IMAGENET_MEAN, std=IMAGENET_STD),
    )


def _write_canaries(folder: Path, pixels: Pixels, logits: Floats) -> None:
    folder.mkdir()
    arrays: dict[str, npt.NDArray[Any]] = {"pixels": pixels, "logits": logits}
    (folder / "canaries.safetensors").write_bytes(arrays_to_bytes(arrays))


def _describe_member(folder: Path, member: ExportedMember) -> MemberEntry:
    return MemberEntry(
        name=member.name,
        architecture=member.architecture,
        weight=member.weight,
        temperature=1.0,
        files={kind: _describe_file(folder, f"{member.name}.{kind}") for kind in ("onnx", "safetensors")},
    )


def _describe_file(folder: Path, path: str) -> FileEntry:
    with (folder / path).open("rb") as opened:
        return FileEntry(path=path, sha256=hashlib.file_digest(opened, "sha256").hexdigest())


def _check_parity(
    folder: Path, members: Sequence[ExportedMember], canaries: Pixels, canary_logits: Floats, check: Pixels
) -> None:
    """Load the bundle as the engine will and compare every member with its network."""
    bundle = bundles.load_bundle(folder)
    pixels = np.concatenate([canaries, check])
    for member, entry, logits in zip(members, bundle.members, canary_logits, strict=True):
        expected = softmax(np.concatenate([logits, infer(member.network, torch.from_numpy(check)).numpy()]))
        with OnnxRunner(entry, bundle) as runner:
            probabilities = softmax(runner.infer(pixels))
        difference = float(np.abs(probabilities - expected).max())
        if not difference <= PROBABILITY_LIMIT:  # also when it is not a number
            raise ParityError(
                f"{member.name}: the exported graph differs from the network by {difference:.2g} in "
                f"probability on {len(pixels)} images; allowed: {PROBABILITY_LIMIT:g}"
            )


def _fsync_folder(folder: Path) -> None:
    """Flush `folder` to the disk, files before the folders that list them."""
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target` and delete the previous bundle."""
    old = target.with_name(f".{target.name}.training-old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _fsync(target.parent)


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Keep the exporter's progress, warnings and log lines off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
