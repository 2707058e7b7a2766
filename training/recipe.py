"""Train a bundle from labelled images: check the data, fit the members, assess, export."""

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
    """Train all members, choose their weights, write the bundle. `note` gets lines for the user.

    Raises UsageError for wrong options or data, EngineError if a loss is not finite, ParityError if an
    exported graph differs.
    """
    device = choose_device(options.device)
    if options.output.resolve().is_relative_to(options.data.resolve()):
        raise UsageError(
            f"-o {options.output} is inside DATA, where it would be read as images; choose another folder"
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
    """List, decode, audit and split the images; list the files that can't be used."""
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
            f"{len(dataset.failures)} of {len(listing.paths)} files are left out, see "
            f"{state.folder / 'left_out.csv'}"
        )
    with step("find copies", len(dataset)) as progress:
        image_groups = audit.group_images(dataset, progress)
    state.write_table(
        "copies.csv", ("path", "label", "identical", "copies"), _copies_table(dataset, image_groups)
    )
    audit.check_data_split(dataset.set_names, image_groups, allow_leak=options.allow_leak)
    images = len(dataset)
    if options.duplicates == "drop":
        kept = audit.drop_copies(dataset, image_groups)
        dataset, image_groups = dataset.take(kept), image_groups.take(kept)
    groups = np.arange(len(dataset)) if options.duplicates == "ignore" else image_groups.together
    shared = {"classes": dataset.classes, "seed": options.seed}
    parts = split.split_dataset(dataset.labels, groups, set_names=dataset.set_names, **shared)
    folds = list(split.make_folds(dataset.labels, groups, options.folds, **shared)) if options.folds else []
    sets = parts.names()
    state.write_table(
        "split.csv", ("path", "label", "split", "group"), _split_table(dataset, image_groups, sets)
    )
    findings = audit.audit_findings(dataset, image_groups, sets, seed=options.seed)
    findings |= {"duplicates": options.duplicates, "dropped": images - len(dataset)}
    for line in audit.describe_findings(findings):
        note(line)
    return PreparedData(dataset, image_groups, parts, folds, findings)


def _split_table(
    dataset: Dataset, image_groups: audit.ImageGroups, sets: Sequence[str]
) -> Iterator[tuple[object, ...]]:
    for path, label, name, group in zip(
        dataset.paths, dataset.labels, sets, image_groups.together.tolist(), strict=True
    ):
        yield path, dataset.classes[label], name, group


def _copies_table(dataset: Dataset, image_groups: audit.ImageGroups) -> list[tuple[object, ...]]:
    """Return the images with copies: path, label, group of identical files, group of near copies."""
    _, inverse, sizes = np.unique(image_groups.near, return_inverse=True, return_counts=True)
    positions = np.flatnonzero(sizes[inverse] > 1)
    order = positions[np.argsort(image_groups.near[positions], kind="stable")]
    return [
        (
            dataset.paths[position],
            dataset.classes[dataset.labels[position]],
            int(image_groups.exact[position]),
            int(image_groups.near[position]),
        )
        for position in order
    ]


def write_trained_bundle(
    options: TrainingOptions,
    trained: Sequence[TrainedMember],
    mix: ChosenWeights,
    prepared: PreparedData,
    evaluation: dict[str, Any],
    step: StartStep,
) -> None:
    """Export the members, check them and write the bundle."""
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
    """Take at most `count` of `positions`, evenly, because they are sorted by class."""
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
