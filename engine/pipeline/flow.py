"""Chain the stages, overlapped or serial, and stop them cleanly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from engine.core.deadline import Deadline
from engine.core.overlap import Meter, prefetch
from engine.core.records import Batch, Part, PartInfo
from engine.pipeline.context import PixelStage, ReadStage
from engine.runs.progress import OnProgress, Progress
from engine.scoring.stage import Scorer
from engine.sink.sink import Sink


def chain_stages(
    parts: Iterator[Part],
    reader: ReadStage,
    preprocess: PixelStage,
    step: Scorer,
    sink: Sink,
    meters: dict[str, Meter],
    *,
    overlap: bool,
) -> Iterator[Batch | PartInfo]:
    """Chain the stages. Without `overlap` they run serially; the results are the same.

    The reader and the scorer start their own threads; this function adds one for preprocessing.
    """
    batches = reader.stage(parts, meters["read"])
    pixels = preprocess.stage(batches, meters["preprocess"])
    ready = prefetch(pixels, 2 if overlap else 0, meters["preprocess"])
    return sink.stage(step.stage(ready, meters["members"]), meters["write"])


def run_until_stopped(
    items: Iterator[Batch | PartInfo],
    progress: Progress,
    on_progress: OnProgress,
    deadline: Deadline,
    *,
    part_rows: int,
) -> None:
    """Run the flow to its end. Raises Stopped when the run has to stop earlier."""
    with closing(items):  # type: ignore[type-var]
        for item in items:
            if isinstance(item, PartInfo):
                progress.by_class.update(item.by_class)
                next_s = progress.seconds_for(min(part_rows, progress.rows_left))
                can_continue = deadline.fits(next_s)
            else:
                progress.add(item)
                on_progress(progress)
                left_s = progress.seconds_for(item.part.rows - item.start - item.rows)
                can_continue = left_s <= deadline.grace_s
            if progress.rows_left and not can_continue:
                processed = progress.rows_before + progress.rows_done
                raise deadline.stopped(f"{processed} of {progress.rows} rows were processed")
