"""The recipe "frozen-features": heads on frozen bases, from class folders to a bundle."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from engine.ensemble import fuse
from engine.errors import UsageError
from training import ensemble, export, heads, models
from training.data import Dataset, Labels, Listing, Split, counts, load, scan, split
from training.ensemble import Candidate
from training.metrics import accuracy, macro_f1
from training.settings import Fitting, Options

CALIBRATION_IMAGES = 64  # enough for the running statistics of a random base
PARITY_IMAGES = 32  # of the validation set, besides the canaries
TABLE_ROWS = 21  # of the weights search that are kept: all of them for two members
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy")

Floats = npt.NDArray[np.float32]
Scores = dict[str, dict[str, float]]  # set -> figure -> value
Note = Callable[[str], None]
# `with step("features of resnet50", 450) as progress:` shows one; progress(16) tells that 16 more are done
Step = Callable[[str, int], AbstractContextManager[heads.Progress]]


@dataclass(frozen=True)
class Member:
    """One member on its way: built, then trained in place."""

    name: str
    architecture: str
    weights: str
    seed: int
    model: nn.Module  # [N, 3, H, W] -> logits [N, C]


@dataclass(frozen=True)
class Report:
    """What came out, for the person who waits."""

    members: tuple[str, ...]
    scores: dict[str, Scores]  # by member, and "ensemble"
    searched: list[Candidate]  # best first
    beside: list[Candidate]

    @property
    def chosen(self) -> Candidate:
        return self.searched[0]


def train(options: Options, *, step: Step, note: Note) -> Report:
    """Train all members, choose their weights, write the bundle. `note` takes lines for the user.

    Raises UsageError for what the user got wrong, ParityError when an exported graph differs.
    """
    export.check_target(options.output, overwrite=options.overwrite)
    listing = scan(options.data, classes=options.classes)
    members = build_members(options, classes=len(listing.classes))  # wrong weights fail before the long part
    dataset = decode(listing, options.size, step, note)
    parts = split(dataset.labels, seed=options.seed)
    fits = {}
    outputs = []
    for member in members:
        fits[member.name], logits = train_member(member, dataset, parts, epochs=options.epochs, step=step)
        outputs.append(logits)
    report = assess(members, np.stack(outputs), dataset, parts)
    facts = _facts(options, members, dataset, parts, fits, report)
    write(options, members, dataset, parts, report, facts, step)
    return report


def build_members(options: Options, *, classes: int) -> list[Member]:
    """Networks with new heads. Members of one architecture get numbered names and seeds of their own."""
    weights = list(options.weights)
    if len(weights) == 1:
        weights *= len(options.members)
    if len(weights) != len(options.members):
        raise UsageError(
            f"--weights: {len(weights)} given for {len(options.members)} members; "
            "allowed: one for all, or one each"
        )
    seen: Counter[str] = Counter()
    members = []
    for index, (architecture, source) in enumerate(zip(options.members, weights, strict=True)):
        seen[architecture] += 1
        name = architecture if seen[architecture] == 1 else f"{architecture}_{seen[architecture]}"
        seed = options.seed + index
        model = models.build(architecture, classes=classes, weights=source, seed=seed)
        members.append(Member(name, architecture, source, seed, model))
    return members


def decode(listing: Listing, size: tuple[int, int], step: Step, note: Note) -> Dataset:
    """All pixels; every file that can't be used is named."""
    with step("decode images", len(listing.paths)) as progress:
        dataset = load(listing, size=size)
        progress(len(listing.paths))
    for path, reason in dataset.failures:
        note(f"left out: {path}: {reason}")
    if dataset.failures:
        note(f"{len(dataset.failures)} of {len(listing.paths)} files left out, {len(dataset.paths)} used")
    return dataset


def train_member(
    member: Member, dataset: Dataset, parts: Split, *, epochs: int, step: Step
) -> tuple[heads.Fit, Floats]:
    """Fit the head of one member in place. Returns how it went and the logits [N, C] of the whole dataset."""
    base, head = models.split_head(member.model)
    if member.weights == "none":
        random = np.random.default_rng(member.seed)
        some = random.permutation(parts.train)[:CALIBRATION_IMAGES]
        with step(f"{member.name}: statistics of images", len(some)) as progress:
            heads.calibrate_batch_norm(base, dataset.pixels[some])
            progress(len(some))
    with step(f"{member.name}: features of images", len(dataset.pixels)) as progress:
        features = heads.infer(base, dataset.pixels, progress)
    fitting = Fitting(epochs=epochs, seed=member.seed)
    with step(f"{member.name}: head, epochs", epochs) as progress:
        fitted = heads.fit(head, features, dataset.labels, parts, fitting, progress)
    models.join_head(base, head)
    return fitted, heads.logits(head, features)


def assess(members: Sequence[Member], logits: Floats, dataset: Dataset, parts: Split) -> Report:
    """Choose the weights on the validation set and score members and ensemble; `logits` is [M, N, C]."""
    validation = logits[:, parts.validation], dataset.labels[parts.validation]
    searched = ensemble.search(*validation)
    by_member, fused = fuse(logits, weights=searched[0].weights, temperatures=[1.0] * len(logits))
    names = tuple(member.name for member in members)
    voters = dict(zip(names, by_member, strict=True)) | {"ensemble": fused}
    return Report(
        members=names,
        scores={
            name: _scores(probabilities, dataset.labels, parts) for name, probabilities in voters.items()
        },
        searched=searched,
        beside=ensemble.beside(*validation),
    )


def write(
    options: Options,
    members: Sequence[Member],
    dataset: Dataset,
    parts: Split,
    report: Report,
    facts: dict[str, Any],
    step: Step,
) -> None:
    """Export, check and put the bundle in its place."""
    with step("export and check members", len(members)) as progress:
        export.write_bundle(
            options.output,
            [
                export.Member(name=one.name, architecture=one.architecture, weight=weight, model=one.model)
                for one, weight in zip(members, report.chosen.weights, strict=True)
            ],
            classes=dataset.classes,
            canaries=export.canary_pixels(size=options.size),
            check=dataset.pixels[_spread(parts.validation, PARITY_IMAGES)],
            training=facts,
            overwrite=options.overwrite,
        )
        progress(len(members))


def _spread(positions: Labels, count: int) -> Labels:
    """At most `count` of `positions`, evenly: files are in the order of their classes."""
    return positions[np.unique(np.linspace(0, len(positions) - 1, count).round().astype(np.int64))]


def _scores(probabilities: Floats, labels: Labels, parts: Split) -> Scores:
    predictions = probabilities.argmax(axis=1)
    return {
        name: {
            "accuracy": accuracy(labels[chosen], predictions[chosen]),
            "macro_f1": macro_f1(labels[chosen], predictions[chosen], classes=probabilities.shape[1]),
        }
        for name, chosen in parts.named()
    }


def _facts(
    options: Options,
    members: Sequence[Member],
    dataset: Dataset,
    parts: Split,
    fits: dict[str, heads.Fit],
    report: Report,
) -> dict[str, Any]:
    """How the bundle came to be: kept in ensemble.json, read by people."""
    return {
        "recipe": "frozen-features",
        "demo": any(member.weights == "none" for member in members),
        "seed": options.seed,
        "images": {name: counts(dataset.labels[chosen], dataset.classes) for name, chosen in parts.named()},
        "left_out": len(dataset.failures),
        "members": {
            member.name: {
                "weights": Path(member.weights).name,
                "seed": member.seed,
                "fit": asdict(fits[member.name]),
                **report.scores[member.name],
            }
            for member in members
        },
        "ensemble": report.scores["ensemble"],
        "weights_search": {
            "set": "validation",
            "chosen": asdict(report.chosen),
            "beside": [asdict(candidate) for candidate in report.beside],
            "table": [asdict(candidate) for candidate in report.searched[:TABLE_ROWS]],
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
