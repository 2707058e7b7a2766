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
    """Read the footers of all parts again and write `_SUCCESS` if they add up to the manifest.

    `parts`: the footers, if they have just been read. A shard writes `_SUCCESS` if all parts of the run are
    on disk; its summary covers its own parts. Raises Stopped if some of these are missing and not claimed by
    another process.
    """
    summarise = partial(
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
        on_disk = folder.list_parts()
        if shard is None or (len(on_disk) == count and not folder.is_marked_finished()):
            summary = summarise(folder.complete(run, parts).values())
            folder.files.delete_leftovers()
            folder.mark_finished(summary.as_record())
        if shard is None:
            return summary
    # claims first: a process that releases a part has written it
    claimed = folder.claimed(set(own) - on_disk)
    parts = folder.finished(run, own)
    say(_shard_state(shard, own, claimed, set(parts), len(on_disk), count))
    rows = sum(part.rows for part in parts.values())
    return replace(summarise(parts.values()), rows=rows, shard=str(shard))


def _shard_state(
    shard: Shard, own: Sequence[int], claimed: set[int], done: set[int], on_disk: int, count: int
) -> str:
    if missing := len(set(own) - done - claimed):
        raise Stopped(
            f"shard {shard}: {missing} of its {len(own)} parts are missing; "
            "run the same command again to continue"
        )
    if on_disk == count:
        return f"shard {shard} is done, and with it all {count} parts of the run"
    state = f"is done: {len(done)} of {count} parts"
    if others := len(claimed - done):
        state = f"leaves {others} of its {len(own)} parts to another process, which is processing them"
    return f"shard {shard} {state}; {on_disk} of {count} parts of the run are written"
