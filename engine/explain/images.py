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
    """The images of rows, once more: read and decoded as in the run, and seen by the members."""

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

    def seen(self, rows: Sequence[int], say: OnMessage) -> Iterator[tuple[Rows, Pixels, FeatureMaps]]:
        """Numbers [n], pixels [n, 1, H, W] and feature maps of rows whose images are as they were.

        `say` gets a line for each of the others.
        """
        meter = Meter("explain")
        batches = self._reader.stage(self._run.parts_of(rows), meter)
        with closing(prefetch(self._preprocess.stage(batches, meter), 2)) as decoded:  # type: ignore[type-var]
            for batch in decoded:
                assert batch.pixels is not None
                numbers = batch.part.row[batch.start : batch.start + batch.rows]
                for position, error in sorted(batch.errors.items()):
                    status = Status(batch.status[position]).label
                    say(f"row {numbers[position]}: its image is not as it was: {status}, {error}")
                if not len(batch.index):
                    continue
                seen = self.explainer.see(batch.pixels)
                same = self._same(batch, numbers, seen, say)
                if same.any():
                    yield numbers[batch.index[same]], batch.pixels[same], seen.only(same)

    def _same(self, batch: Batch, numbers: Rows, seen: FeatureMaps, say: OnMessage) -> npt.NDArray[np.bool_]:
        """Return which images of a batch have the size and the probabilities stored in the results."""
        stored = batch.part.columns.take(batch.start + batch.index)
        bundle = self._run.bundle
        shape = (len(bundle.members), len(bundle.classes), len(batch.index))
        wanted = np.reshape([stored.column(name).to_numpy() for name in self._run.scores], shape)
        found, _ = self.explainer.probabilities(seen)  # [M, k, C]
        far = np.abs(found.transpose(0, 2, 1) - wanted).max(axis=(0, 1))
        sizes = [stored.column(name).to_numpy() for name in ("width", "height")]
        resized = (sizes[0] != batch.width[batch.index]) | (sizes[1] != batch.height[batch.index])
        same = (far <= self._run.tolerance) & ~resized
        for place in np.flatnonzero(~same):
            how = "its size is another" if resized[place] else f"a probability is {far[place]:.2g} off"
            say(f"row {numbers[batch.index[place]]}: its image has changed since the run ({how})")
        return np.asarray(same)


def choose_references(
    run: ExplainedRun, images: RereadImages, rows: Sequence[int]
) -> tuple[FeatureMaps, ReferenceImages]:
    """Choose typical images: rows of the run, else the bundle's canaries."""
    from engine.explain.integrated_gradients import FeatureMaps

    found = list(images.seen(rows, lambda _: None)) if rows else []
    numbers = sorted(int(row) for some, _, _ in found for row in some)
    if len(numbers) >= MIN_REFERENCES:
        return FeatureMaps.joined([seen for _, _, seen in found]), ReferenceImages(rows=tuple(numbers))
    pixels, _ = canaries.load_canaries(run.bundle)
    some = [pixels[start : start + BATCH] for start in range(0, min(MAX_REFERENCES, len(pixels)), BATCH)]
    return FeatureMaps.joined(list(map(images.explainer.see, some))), ReferenceImages(
        canaries=sum(map(len, some))
    )
