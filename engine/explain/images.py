"""Read the images of explained rows again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from engine.core.hardware import available_cpus
from engine.core.overlap import Meter, prefetch
from engine.core.records import Batch, OnMessage, Status
from engine.explain.rows import MAX_REFERENCES, MIN_REFERENCES, ExplainedRun, Pixels, Rows
from engine.pipeline.context import READ_THREADS
from engine.preprocess.stage import Preprocess
from engine.reader.reader import Reader
from engine.runs.run_folder import ReferenceImages
from engine.scoring import canaries

if TYPE_CHECKING:
    from engine.explain.integrated_gradients import Explainer, FeatureMaps

BATCH = 8


class RereadImages:
    """The images of rows, read and decoded again like in the run, with the members' feature maps."""

    def __init__(self, run: ExplainedRun, explainer: Explainer) -> None:
        self._run, self.explainer = run, explainer
        settings = run.settings
        self._preprocess = Preprocess(
            size=run.bundle.size,
            batch_size=BATCH,
            threads=settings.workers or available_cpus(),
            decoding_bytes=settings.limits.decoding_bytes,
            decode=run.bundle.decode,
        )
        self._reader = Reader(
            run.root,
            batch_size=BATCH,
            threads=READ_THREADS,
            limits=settings.limits,
            timeout_s=settings.read_timeout_s,
        )

    def __enter__(self) -> Self:
        self._preprocess.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._preprocess.close()

    def load(self, rows: Sequence[int], say: OnMessage) -> Iterator[tuple[Rows, Pixels, FeatureMaps]]:
        """Yield the numbers [n], pixels [n, 1, H, W] and feature maps of rows with unchanged images.

        `say` gets a line for each changed or unreadable image.
        """
        meter = Meter("explain")
        batches = self._reader.stage(self._run.parts_of(rows), meter)
        with closing(prefetch(self._preprocess.stage(batches, meter), 2)) as decoded:  # type: ignore[type-var]
            for batch in decoded:
                assert batch.pixels is not None
                numbers = batch.part.row[batch.start : batch.start + batch.rows]
                for position, error in sorted(batch.errors.items()):
                    status = Status(batch.status[position]).label
                    say(f"row {numbers[position]}: its image cannot be read as in the run: {status}, {error}")
                if not len(batch.index):
                    continue
                features = self.explainer.extract_features(batch.pixels)
                same = self._find_unchanged(batch, numbers, features, say)
                if same.any():
                    yield numbers[batch.index[same]], batch.pixels[same], features.only(same)

    def _find_unchanged(
        self, batch: Batch, numbers: Rows, features: FeatureMaps, say: OnMessage
    ) -> npt.NDArray[np.bool_]:
        """Return which images of a batch have the size and the probabilities stored in the results."""
        stored = batch.part.columns.take(batch.start + batch.index)
        bundle = self._run.bundle
        shape = (len(bundle.members), len(bundle.classes), len(batch.index))
        expected = np.reshape([stored.column(name).to_numpy() for name in self._run.scores], shape)
        members, _ = self.explainer.probabilities(features)  # [M, k, C]
        differences = np.abs(members.transpose(0, 2, 1) - expected).max(axis=(0, 1))
        sizes = [stored.column(name).to_numpy() for name in ("width", "height")]
        resized = (sizes[0] != batch.width[batch.index]) | (sizes[1] != batch.height[batch.index])
        same = (differences <= self._run.tolerance) & ~resized
        for position in np.flatnonzero(~same):
            change = f"a probability differs by {differences[position]:.2g}"
            if resized[position]:
                change = "it has another size"
            say(f"row {numbers[batch.index[position]]}: its image has changed since the run ({change})")
        return np.asarray(same)


def choose_references(
    run: ExplainedRun, images: RereadImages, rows: Sequence[int]
) -> tuple[FeatureMaps, ReferenceImages]:
    """Choose the reference images: rows of the run, else the bundle's canaries."""
    from engine.explain.integrated_gradients import FeatureMaps

    batches = list(images.load(rows, lambda _: None)) if rows else []
    numbers = sorted(int(row) for batch_rows, _, _ in batches for row in batch_rows)
    if len(numbers) >= MIN_REFERENCES:
        features = FeatureMaps.concatenate([features for _, _, features in batches])
        return features, ReferenceImages(rows=tuple(numbers))
    pixels, _ = canaries.load_canaries(run.bundle)
    blocks = [pixels[start : start + BATCH] for start in range(0, min(MAX_REFERENCES, len(pixels)), BATCH)]
    features = FeatureMaps.concatenate(list(map(images.explainer.extract_features, blocks)))
    return features, ReferenceImages(canaries=sum(map(len, blocks)))
