"""Finish a run: check that all parts add up and write `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from engine.core.errors import Stopped
from engine.core.overlap import Meter
from engine.core.records import OnMessage, PartInfo
from engine.core.settings import Shard
from engine.runs.progress import Progress
from engine.runs.run_folder import RunFolder
from engine.runs.run_record import RunRecord
from engine.runs.summary import ActorCounts, Summary, summarise_run


def finish_run(
    folder: RunFolder,
    run: RunRecord,
    progress: Progress,
    meters: Mapping[str, Meter],
    *,
    decoder_restarts: int,
    decoder_refusals: int,
    shard: Shard | None = None,
    say: OnMessage = lambda _: None,
    parts: dict[int, PartInfo] | None = None,
    actors: ActorCounts | None = None,
) -> Summary:
    """Re-read the footers of all parts; only when they add up to the manifest does the run succeed.

    `parts`: what the footers say, where they were read just now. A shard does so when no part of the run is
    left to the others; its summary is about its own parts. Raises Stopped when parts of its own are missing
    that nobody has in hand.
    """
    add_up = partial(
        summarise_run,
        folder.path,
        run,
        progress=progress,
        meters=meters,
        decoder_restarts=decoder_restarts,
        decoder_refusals=decoder_refusals,
        actors=actors,
    )
    count, own = run.part_count, run.part_indices(shard)
    with folder.run_lock(say):
        there = folder.there()
        if shard is None or (len(there) == count and not folder.is_marked_finished()):
            summary = add_up(folder.complete(run, parts).values())
            folder.files.delete_leftovers()
            folder.mark_finished(summary.as_record())
        if shard is None:
            return summary
    # before the parts are looked at: who lets go of one has written it
    held = folder.claimed(set(own) - there)
    parts = folder.finished(run, own)
    say(_shard_state(shard, own, held, set(parts), len(there), count))
    rows = sum(part.rows for part in parts.values())
    return replace(add_up(parts.values()), rows=rows, shard=str(shard))


def _shard_state(
    shard: Shard, own: Sequence[int], held: set[int], done: set[int], there: int, count: int
) -> str:
    if left := len(set(own) - done - held):
        raise Stopped(
            f"shard {shard}: {left} of its {len(own)} parts are missing; "
            "run the same command again to continue"
        )
    if there == count:
        return f"shard {shard} is done, and with it all {count} parts of the run"
    state = f"is done: {len(done)} of {count} parts"
    if others := len(held - done):
        state = f"leaves {others} of its {len(own)} parts to another process, which is processing them"
    return f"shard {shard} {state}; {there} of {count} parts of the run are there"
