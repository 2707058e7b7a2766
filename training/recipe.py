"""The recipe, from labelled images to a bundle: look at the data, fit the members, weigh, judge, export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.errors import UsageError
from training import export, report, split
from training.assess import ChosenWeights, PreparedData, assess, choose_weights, cross_validate
from training.audit import audit
from training.data import Dataset, load_dataset
from training.listing import Labels, list_images
from training.members import OnNote, StartStep, TrainedMember, Trainer, choose_device, plan_members
from training.settings import TrainingOptions
from training.state import TrainingState

PARITY_IMAGES = 32  # of the validation set, besides the canaries
EVALUATION, REPORT = "evaluation.json", "report.html"


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training; `evaluation` is None if only the data were checked."""

    findings: dict[str, Any]
    evaluation: dict[str, Any] | None = None


def train(options: TrainingOptions, *, step: StartStep, note: OnNote) -> TrainingResult:
    """Train all members, choose their weights, write the bundle. `note` takes lines for the user.

    Raises UsageError for what the user got wrong, EngineError for a loss that is not a number, ParityError
    when an exported graph differs.
    """
    device = choose_device(options.device)
    if options.output.resolve().is_relative_to(options.data.resolve()):
        raise UsageError(
            f"-o {options.output} is inside DATA, and would be taken for images; choose another place"
        )
    if not options.check_data:
        export.check_target(options.output, overwrite=options.overwrite)
    with TrainingState(options) as state:
        state.check()
        prepared = prepare_data(options, state, step, note)
        if options.check_data:
            return TrainingResult(prepared.findings)
        state.begin(prepared.dataset.sha256)
        trainer = Trainer(options, prepared.dataset, device, state.work, step, note)
        trained = trainer.fit(prepared.parts)
        mix = choose_weights(trained, prepared.dataset.labels, prepared.parts, options)
        evaluation = assess(trained, mix, prepared, options)
        evaluation["folds"] = cross_validate(trainer, prepared.folds)
        write_trained_bundle(options, trained, mix, prepared, evaluation, step)
        state.finish()
    return TrainingResult(prepared.findings, evaluation)


def prepare_data(
    options: TrainingOptions, state: TrainingState, step: StartStep, note: OnNote
) -> PreparedData:
    """List, decode, look for copies and leaks, split; every file that can't be used is counted and listed."""
    listing = list_images(
        options.data,
        classes=options.classes,
        path_column=options.path_column,
        label_column=options.label_column,
        root=options.root,
    )
    for line in listing.notes:
        note(line)
    if not options.check_data:
        for plan in plan_members(options):  # wrong weights fail before the long part
            plan.build(options, len(listing.classes))
    with step("decode images", len(listing.paths)) as progress:
        dataset = load_dataset(listing, size=options.size, decode=options.decode, progress=progress)
    state.write_table("left_out.csv", ("path", "status", "error"), dataset.failures)
    if dataset.failures:
        note(
            f"{len(dataset.failures)} of {len(listing.paths)} files left out: {state.folder / 'left_out.csv'}"
        )
    with step("look for copies", len(dataset)) as progress:
        families = audit.group_images(dataset, progress)
    state.write_table(
        "copies.csv", ("path", "label", "identical", "copies"), _copies_table(dataset, families)
    )
    audit.check_given_split(dataset.given, families, allow_leak=options.allow_leak)
    images = len(dataset)
    if options.duplicates == "drop":
        stay = audit.drop_copies(dataset, families)
        dataset, families = dataset.take(stay), families.take(stay)
    groups = np.arange(len(dataset)) if options.duplicates == "ignore" else families.together
    cut = {"classes": dataset.classes, "seed": options.seed}
    parts = split.split_dataset(dataset.labels, groups, given=dataset.given, **cut)
    folds = list(split.make_folds(dataset.labels, groups, options.folds, **cut)) if options.folds else []
    sets = parts.names()
    state.write_table("split.csv", ("path", "label", "split", "group"), _split_table(dataset, families, sets))
    findings = audit.audit_findings(dataset, families, sets, seed=options.seed)
    findings |= {"duplicates": options.duplicates, "dropped": images - len(dataset)}
    for line in audit.describe_findings(findings):
        note(line)
    return PreparedData(dataset, families, parts, folds, findings)


def _split_table(
    dataset: Dataset, families: audit.ImageGroups, sets: Sequence[str]
) -> Iterator[tuple[object, ...]]:
    for path, label, name, group in zip(
        dataset.paths, dataset.labels, sets, families.together.tolist(), strict=True
    ):
        yield path, dataset.classes[label], name, group


def _copies_table(dataset: Dataset, families: audit.ImageGroups) -> list[tuple[object, ...]]:
    """Return every image that has a copy: path, label, group of identical files, group of near copies."""
    _, inverse, sizes = np.unique(families.near, return_inverse=True, return_counts=True)
    positions = np.flatnonzero(sizes[inverse] > 1)
    order = positions[np.argsort(families.near[positions], kind="stable")]
    return [
        (
            dataset.paths[one],
            dataset.classes[dataset.labels[one]],
            int(families.exact[one]),
            int(families.near[one]),
        )
        for one in order
    ]


def write_trained_bundle(
    options: TrainingOptions,
    trained: Sequence[TrainedMember],
    mix: ChosenWeights,
    prepared: PreparedData,
    evaluation: dict[str, Any],
    step: StartStep,
) -> None:
    """Export, check and put the bundle in its place."""
    dataset = prepared.dataset
    with step("export and check members", len(trained)) as progress:
        export.write_bundle(
            options.output,
            [
                export.ExportedMember(
                    name=member.plan.name,
                    architecture=member.plan.architecture,
                    weight=weight,
                    network=member.network,
                )
                for member, weight in zip(trained, mix.weights, strict=True)
            ],
            classes=dataset.classes,
            canaries=export.canary_pixels(size=options.size, decode=options.decode),
            decode=options.decode,
            check=dataset.pixels[_take_evenly(prepared.parts.validation, PARITY_IMAGES)],
            training=_training_facts(options, trained, evaluation),
            temperature=mix.temperature,
            documents={
                EVALUATION: json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
                REPORT: report.render(evaluation),
            },
            overwrite=options.overwrite,
        )
        progress(len(trained))


def _take_evenly(positions: Labels, count: int) -> Labels:
    """Take at most `count` of `positions`, evenly: files are in the order of their classes."""
    return positions[np.unique(np.linspace(0, len(positions) - 1, count).round().astype(np.int64))]


def _training_facts(
    options: TrainingOptions, trained: Sequence[TrainedMember], evaluation: dict[str, Any]
) -> dict[str, Any]:
    """Summarize the training for ensemble.json; evaluation.json has the rest."""
    return {
        "recipe": "frozen base" if options.freeze else "whole network",
        "demo": evaluation["demo"],
        "options": evaluation["recipe"],
        "images": evaluation["images"],
        "members": {
            member.plan.name: {
                "weights": Path(member.plan.weights).name,
                "seed": member.plan.seed,
                "best": evaluation["best"][member.plan.name],
            }
            for member in trained
        },
        "weights_search": {"set": "validation", "chosen": evaluation["weights_search"]["chosen"]},
        "versions": evaluation["versions"],
    }
