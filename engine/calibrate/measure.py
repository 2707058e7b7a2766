"""`python -m engine.calibrate BUNDLE --on LABELLED`: temperature and operating points, kept in the bundle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from engine.bundle import bundle as bundles
from engine.bundle.bundle import Bundle
from engine.bundle.operating_points import Abstention, DistanceLimits, OperatingPoints
from engine.calibrate import out_of_distribution
from engine.calibrate.labelled import (
    LabelColumns,
    Labels,
    Pixels,
    find_labelled_rows,
    is_results_folder,
    read_labelled_scores,
)
from engine.calibrate.thresholds import CalibrationOptions, calibrate, split_folds
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

MIN_OOD_IMAGES, MAX_OOD_IMAGES, MAX_OOD_BYTES = 50, 2000, 256 << 20  # limits on the feature sample
AS_IN_RUN = ("path_column", "root", "device", "runner", "precision", "batch_size", "workers", "memory")


@dataclass(frozen=True)
class Calibration:
    """The changes to a bundle."""

    bundle: Bundle  # unchanged
    points: OperatingPoints
    distances: dict[str, bytes] | None  # by member, as `update_bundle` takes them


def calibrate_bundle(
    settings: Settings,
    columns: LabelColumns,
    options: CalibrationOptions,
    *,
    ood: bool = False,
    on_progress: OnProgress = lambda _: None,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
) -> Calibration:
    """Calibrate the bundle `settings.bundle` on the labelled images of `settings.manifest`.

    The manifest lists images, which are screened first, or is a results folder of the same bundle. `ood` adds
    the limits for out-of-distribution images, which needs the images and the CPU. Nothing is written.
    Raises UsageError for unknown labels, scores that are not finite and too few images; Stopped.
    """
    bundle = bundles.load_bundle(settings.bundle)
    if options.target not in bundle.classes:
        raise UsageError(f"--target {options.target}: allowed: {', '.join(bundle.classes)}")
    captured: dict[int, Pixels] = {}
    if is_results_folder(settings.manifest):
        if ood:
            raise UsageError(
                f"--ood needs the images, but {settings.manifest} is a results folder; give the manifest"
            )
        sample, rows, data = read_labelled_scores(
            open_results_folder(settings.manifest, unfinished=False), bundle, columns, say
        )
    else:
        check_inputs(settings)
        with TemporaryDirectory(prefix="engine-") as scratch:
            labelled = find_labelled_rows(
                settings, bundle, columns, options, Path(scratch, "listing.parquet")
            )
            drawn = _draw_rows(labelled, bundle, settings, options) if ood else frozenset()
            output = Path(scratch, "results")
            try:
                screen_in_process(
                    replace(settings, output=output),
                    on_progress=on_progress,
                    say=say,
                    deadline=deadline,
                    stages_type=partial(_PixelCaptureStages, rows=drawn, captured=captured),
                )
            except Stopped:
                raise Stopped(
                    "calibration was stopped and nothing was written; for many images, screen them first "
                    "with engine.run, which can be resumed, and give --on RESULTS"
                ) from None
            sample, rows, data = read_labelled_scores(
                open_results_folder(output, unfinished=False), bundle, columns, say
            )
    limits = nodes = None
    if ood:
        usable = np.isin(rows, list(captured))
        if usable.sum() < MIN_OOD_IMAGES:
            raise UsageError(
                f"--ood: only {usable.sum()} images have a label and a score; "
                f"at least {MIN_OOD_IMAGES} are needed"
            )
        pixels = np.stack([captured[row] for row in rows[usable].tolist()])
        limits, nodes = _measure_distances(bundle, pixels, sample.groups[usable], options)
    return Calibration(
        bundle, calibrate(sample, bundle.classes, bundle.weights, options, data, limits), nodes
    )


def _draw_rows(
    labelled: Labels, bundle: Bundle, settings: Settings, options: CalibrationOptions
) -> frozenset[int]:
    """Draw the rows whose pixels are kept for the out-of-distribution limits."""
    if not select_for_settings(settings, bundle).gives_distances:
        raise UsageError("--ood needs the float32 graphs on the CPU; add --device cpu")
    out_of_distribution.check_installed()
    most = max(1, min(MAX_OOD_IMAGES, MAX_OOD_BYTES // (bundle.size[0] * bundle.size[1])))
    return frozenset(np.random.default_rng(options.seed).permutation(labelled)[:most].tolist())


class _PixelCaptureStages(Stages):
    """The stages of a run that copy the pixels [1, H, W] of some rows."""

    def __init__(self, context: StageContext, *, rows: frozenset[int], captured: dict[int, Pixels]) -> None:
        super().__init__(context)
        self._rows, self._captured = rows, captured

    def open(self, stack: ExitStack) -> None:
        super().open(stack)
        self.step = _PixelCapture(self.step, self._rows, self._captured)


@dataclass
class _PixelCapture:
    step: Scorer
    rows: frozenset[int]
    captured: dict[int, Pixels]

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        return self.step.stage(self._copy_pixels(batches), meter)

    def _copy_pixels(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.rows and batch.pixels is not None:
                rows = batch.part.row[batch.start + batch.index].tolist()
                for row, pixels in zip(rows, batch.pixels, strict=True):
                    if row in self.rows:
                        self.captured[row] = pixels.copy()
            yield batch

    def close(self) -> None:
        self.step.close()


def _measure_distances(
    bundle: Bundle, pixels: Pixels, groups: Labels, options: CalibrationOptions
) -> tuple[DistanceLimits, dict[str, bytes]]:
    """Return the distance limits at `options.quantile` of images [N, 1, H, W], and each member's nodes.

    The distance of an image is measured from the images of the other folds. The quantile is taken of the
    largest distance over all members, relative to each member's own quantile, so it holds for the ensemble.
    """
    folds = list(split_folds(np.zeros(len(groups), np.bool_), groups, options.seed))
    distances, nodes = [], {}
    for member in bundle.members:
        graph = member.files["onnx"].path.read_bytes()
        features = out_of_distribution.extract_features(graph, pixels, threads=available_cpus())
        distances.append(out_of_distribution.held_out_distances(features, folds))
        nodes[member.name] = out_of_distribution.distance_subgraph(
            graph, out_of_distribution.fit_gaussian(features)
        )
    quantiles = np.quantile(distances, options.quantile, axis=1)
    factor = float(np.quantile((np.stack(distances) / quantiles[:, None]).max(axis=0), options.quantile))
    limits = quantiles * factor
    above = {member.name: float(limit) for member, limit in zip(bundle.members, limits, strict=True)}
    return DistanceLimits(quantile=options.quantile, images=len(pixels), above=above), nodes


def abstention_reasons(abstain: Abstention) -> Iterator[str]:
    yield "in the gray zone"
    disagreement, distance = abstain.disagreement, abstain.distance
    if disagreement.above is not None:
        yield f"members disagree by over {disagreement.above:.3g} bits (quantile {disagreement.quantile:g})"
    if distance:
        yield f"out of distribution (quantile {distance.quantile:g} of {distance.images} images)"
    if abstain.image_flags:
        yield f"flags {', '.join(abstain.image_flags)}"
