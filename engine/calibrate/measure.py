"""`python -m engine.calibrate BUNDLE --on LABELLED`: temperature and operating points, kept in the bundle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from engine.bundle import bundle
from engine.bundle.bundle import Bundle
from engine.bundle.operating_points import Abstention, DistanceLimits, OperatingPoints
from engine.calibrate import out_of_distribution
from engine.calibrate.labelled import (
    LabelColumns,
    Labels,
    Pixels,
    _find_labelled_rows,
    _is_results_folder,
    _read_labelled_scores,
)
from engine.calibrate.thresholds import (
    CalibrationOptions,
    calibrate,
    split_folds,
)
from engine.core.deadline import Deadline
from engine.core.errors import Stopped, UsageError
from engine.core.hardware import available_cpus
from engine.core.overlap import Meter
from engine.core.records import Batch, OnMessage
from engine.core.settings import Settings
from engine.pipeline.context import StageContext
from engine.pipeline.pipeline import screen_in_process
from engine.pipeline.stages import Stages
from engine.results import open_results_folder
from engine.runs.prepare import check_inputs, select_for_settings
from engine.runs.progress import OnProgress
from engine.scoring.stage import Scorer

MAX_OOD_IMAGES, MAX_OOD_BYTES, MIN_OOD_IMAGES = (
    2000,
    256 << 20,
    50,
)  # whose features are looked at, at most and at least
AS_IN_RUN = ("path_column", "root", "device", "runner", "precision", "batch_size", "workers", "memory")


@dataclass(frozen=True)
class Calibration:
    """The changes to a bundle."""

    bundle: Bundle  # as it is
    points: OperatingPoints
    distances: dict[str, bytes] | None  # by member, as `bundle.revise` takes them


def calibrate_bundle(
    settings: Settings,
    columns: LabelColumns,
    asked: CalibrationOptions,
    *,
    ood: bool = False,
    on_progress: OnProgress = lambda _: None,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
) -> Calibration:
    """Calibrate the bundle that `settings` name.

    `settings.manifest` lists labelled images, which are screened for this, or is a results folder of the very
    bundle. With `ood` what is out of distribution is found too, which takes the images, and the CPU.
    Nothing is written. Raises UsageError for labels that are none of the bundle's classes, scores that are no
    numbers, and too few images; Stopped.
    """
    models = bundle.load_bundle(settings.bundle)
    if asked.target not in models.classes:
        raise UsageError(f"--target {asked.target}: allowed: {', '.join(models.classes)}")
    kept: dict[int, Pixels] = {}
    if _is_results_folder(settings.manifest):
        if ood:
            raise UsageError(
                f"--ood needs the images themselves, and {settings.manifest} holds their results"
            )
        sample, rows, data = _read_labelled_scores(
            open_results_folder(settings.manifest, unfinished=False), models, columns, say
        )
    else:
        check_inputs(settings)
        with TemporaryDirectory(prefix="engine-") as scratch:
            labelled = _find_labelled_rows(settings, models, columns, asked, Path(scratch, "listing.parquet"))
            wanted = _draw_rows(labelled, models, settings, asked) if ood else frozenset()
            output = Path(scratch, "results")
            try:
                screen_in_process(
                    replace(settings, output=output),
                    on_progress=on_progress,
                    say=say,
                    deadline=deadline,
                    stages_type=partial(_PixelCaptureStages, wanted=wanted, kept=kept),
                )
            except Stopped:
                raise Stopped(
                    "stopped, and nothing was written; for many images, screen them first with engine.run, "
                    "which can be resumed, and give --on RESULTS"
                ) from None
            sample, rows, data = _read_labelled_scores(
                open_results_folder(output, unfinished=False), models, columns, say
            )
    limits = nodes = None
    if ood:
        here = np.isin(rows, list(kept))
        if here.sum() < MIN_OOD_IMAGES:
            raise UsageError(
                f"--ood: {here.sum()} images could be looked at; at least {MIN_OOD_IMAGES} are needed"
            )
        pixels = np.stack([kept[row] for row in rows[here].tolist()])
        limits, nodes = _measure_distances(models, pixels, sample.groups[here], asked)
    return Calibration(models, calibrate(sample, models.classes, models.weights, asked, data, limits), nodes)


def _draw_rows(
    labelled: Labels, models: Bundle, settings: Settings, asked: CalibrationOptions
) -> frozenset[int]:
    """Rows, drawn at random, whose pixels are kept for what takes more than scores."""
    if not select_for_settings(settings, models).gives_distances:
        raise UsageError("--ood is worked out by the float32 graphs on the CPU: add --device cpu")
    out_of_distribution.check_installed()
    most = max(1, min(MAX_OOD_IMAGES, MAX_OOD_BYTES // (models.size[0] * models.size[1])))
    return frozenset(np.random.default_rng(asked.seed).permutation(labelled)[:most].tolist())


class _PixelCaptureStages(Stages):
    """The stages of a run, with a copy of the pixels [1, H, W] of some rows."""

    def __init__(self, context: StageContext, *, wanted: frozenset[int], kept: dict[int, Pixels]) -> None:
        super().__init__(context)
        self._wanted, self._kept = wanted, kept

    def open(self, stack: ExitStack) -> None:
        super().open(stack)
        self.step = _PixelCapture(self.step, self._wanted, self._kept)


@dataclass
class _PixelCapture:
    step: Scorer
    wanted: frozenset[int]
    kept: dict[int, Pixels]

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        return self.step.stage(self._copied(batches), meter)

    def _copied(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.wanted and batch.pixels is not None:
                rows = batch.part.row[batch.start + batch.index].tolist()
                for row, pixels in zip(rows, batch.pixels, strict=True):
                    if row in self.wanted:
                        self.kept[row] = pixels.copy()
            yield batch

    def close(self) -> None:
        self.step.close()


def _measure_distances(
    models: Bundle, pixels: Pixels, groups: Labels, asked: CalibrationOptions
) -> tuple[DistanceLimits, dict[str, bytes]]:
    """Return the limits that the share `asked.quantile` of images [N, 1, H, W] keeps, and each member's
    nodes.

    An image is judged by what was fitted to the images of other folds, and by the member for which it is the
    oddest: the share holds for all members together.
    """
    held = list(split_folds(np.zeros(len(groups), np.bool_), groups, asked.seed))
    odd, nodes = [], {}
    for member in models.members:
        graph = member.files["onnx"].path.read_bytes()
        features = out_of_distribution.extract_features(graph, pixels, threads=available_cpus())
        odd.append(out_of_distribution.held_out_distances(features, held))
        nodes[member.name] = out_of_distribution.distance_subgraph(
            graph, out_of_distribution.fit_gaussian(features)
        )
    usual = np.quantile(odd, asked.quantile, axis=1)
    oddest = float(np.quantile((np.stack(odd) / usual[:, None]).max(axis=0), asked.quantile))
    above = {member.name: float(limit) for member, limit in zip(models.members, usual * oddest, strict=True)}
    return DistanceLimits(quantile=asked.quantile, images=len(pixels), above=above), nodes


def reasons(abstain: Abstention) -> Iterator[str]:
    yield "in the gray zone"
    apart, far = abstain.disagreement, abstain.distance
    if apart.above is not None:
        yield f"members disagree by over {apart.above:.3g} bits (quantile {apart.quantile:g})"
    if far:
        yield f"out of distribution (quantile {far.quantile:g} of {far.images} images)"
    if abstain.image_flags:
        yield f"flags {', '.join(abstain.image_flags)}"
