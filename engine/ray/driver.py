"""Run on Ray: assign parts to actors, repeat lost parts and finish the run."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.core.deadline import GRACE_S, Deadline
from engine.core.errors import EngineError, ParityError, Stopped
from engine.core.json_records import to_builtins
from engine.core.overlap import Meter
from engine.core.records import OnMessage, Part, PartInfo
from engine.core.settings import Settings
from engine.core.tuning import Settled, Tuning
from engine.pipeline.stages import Stages
from engine.ray.actor import Heartbeat, OpenedStages, RunSpec
from engine.ray.actor_pool import (
    HEARTBEAT_GROUP,
    MAX_PARTS_HELD,
    PARTS_GROUP,
    ActorGroup,
    ActorHandle,
    ActorPool,
)
from engine.ray.part_queue import PartQueue
from engine.ray.poison_rows import PoisonRowSearch
from engine.runs.finish import finish_run
from engine.runs.prepare import PreparedRun, prepare_run
from engine.runs.progress import OnProgress
from engine.runs.run_folder import ActorRecord, is_confirmed
from engine.runs.run_record import HardwareGroup, default_sizes
from engine.runs.summary import ActorCounts, Summary
from engine.storage.images import ImageStorage

POLL_S = 0.2
HEARTBEAT_S = 1.0
RECORD_S = 5.0  # between two records of the changes in a run
OPEN_TIMEOUT_S = 900.0  # for opening an actor, which may tune a GPU and compile graphs
MAX_PART_FAILURES = 3  # actors that die with a part before its poison rows are searched
MAX_POISON_ROWS = 16  # per part; with more, the rows are not the cause
BATCHES_IN_STAGES = 32  # approximate number of batches in an actor's stages
CHECK_S = 2.5  # for the canary check before a stop
CHECKED_FILES = MAX_SHOWN_ROWS = 8
TOKEN_FILE = ".actors.tmp"


def screen_on_ray(
    settings: Settings,
    *,
    on_progress: OnProgress = lambda _: None,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
    stages_type: type[Stages] | None = None,
) -> Summary:
    """Screen as `screen_in_process` does, with actors on the Ray that `settings.ray` names."""
    deadline = deadline or Deadline(settings.finish_by)
    pool = ActorPool(settings, say, deadline)
    with (
        closing(pool),
        prepare_run(settings, say, chosen=pool.start_actors) as prepared,
        closing(pool),  # before the folder is unlocked
        write_token(prepared) as token,
    ):
        return RayRun(pool, prepared, token, on_progress, deadline, stages_type or Stages).screen()


@contextmanager
def write_token(prepared: PreparedRun) -> Iterator[tuple[str, str] | None]:
    """Write a file to a local results folder, by which actors recognize the folder."""
    if not isinstance(prepared.folder.path, Path):
        yield None
        return
    file, content = prepared.folder.path / TOKEN_FILE, uuid.uuid4().hex
    file.write_text(content)
    try:
        yield TOKEN_FILE, content
    finally:
        file.unlink(missing_ok=True)


class RayRun:
    """A run on Ray, from the opening of the actors to `_SUCCESS`.

    A part is done when it is written, and confirmed when its actor passes a later canary check. If the actor
    dies before that, the part is assigned again.
    """

    def __init__(
        self,
        pool: ActorPool,
        prepared: PreparedRun,
        token: tuple[str, str] | None,
        on_progress: OnProgress,
        deadline: Deadline,
        stages_type: type[Stages],
    ) -> None:
        self.pool, self.prepared, self._token, self._on_progress, self._deadline = (
            pool,
            prepared,
            token,
            on_progress,
            deadline,
        )
        self._stages_type = stages_type
        self._leaders: dict[ActorGroup, OpenedStages] = {}
        self._batch_sizes: dict[ActorGroup, int] = {}
        self.done: dict[int, PartInfo] = {}  # parts done since this start
        self._unconfirmed: dict[str, set[int]] = {}  # done parts, by the actor's name
        self._actors: dict[str, ActorRecord] = {}
        self._recorded, self._changed = time.monotonic(), False
        self._failures: Counter[int] = Counter()
        self._crashed: dict[int, frozenset[int]] = {}  # row positions by part, found by the search
        self._searches: list[PoisonRowSearch] = []
        self.repeated_parts = 0  # parts that were assigned again

    def screen(self) -> Summary:
        prepared, pool = self.prepared, self.pool
        pool.listener = self
        self._settle_options()
        prepared.begin()
        if prepared.is_finished:
            return prepared.summary()
        self.progress = prepared.progress()
        self._by_status = self.progress.by_status.copy()  # of done parts
        self._actors = prepared.folder.actors(prepared.run)
        self.part_queue = PartQueue(self._parts_of, set(range(prepared.run.part_count)) - set(prepared.done))
        pool.run_began = True
        try:
            for actor in list(pool.actors):
                self.on_actor_started(actor)
            parts = self._work()
        finally:
            self.part_queue.close()
        prepared.folder.files.delete_leftovers()
        heartbeats = self._heartbeats()
        return finish_run(
            prepared.folder,
            prepared.run,
            self.progress,
            self._meters(),
            parts=parts,
            decoder_restarts=sum(heartbeat.crashes for heartbeat in heartbeats),
            decoder_refusals=sum(heartbeat.refusals for heartbeat in heartbeats),
            actors=ActorCounts(
                started=len(pool.actors) + len(pool.lost_actors),
                lost=len(pool.lost_actors) - len(pool.refused),
                refused=tuple(pool.refused),
                parts_done_again=self.repeated_parts,
                rows_crashed=sum(map(len, self._crashed.values())),
            ),
        )

    def _parts_of(self, wanted: set[int]) -> Iterator[Part]:
        return self.prepared.manifest.parts(self.prepared.part_rows, wanted)

    def _settle_options(self) -> None:
        """Let one actor of each group tune its options, and record them in the run."""
        prepared, settings = self.prepared, self.prepared.settings
        recorded = None if settings.overwrite else prepared.folder.recorded()
        choices = {actor.group: actor.info.choice for actor in self.pool.actors if actor.info}
        records = recorded.result_options.kinds or () if recorded else ()
        recorded_sizes = {ActorGroup.of_record(record): record.batch_size for record in records}
        for group, choice in choices.items():
            default = settings.batch_size or default_sizes(choice)[0]
            size = recorded_sizes.get(group, default)
            self._batch_sizes[group] = size if len(choices) > 1 else prepared.run.result_options.batch_size
        for group in choices:
            self._open_leader(group)
        if len(choices) > 1:
            groups = [group.as_record(size) for group, size in self._batch_sizes.items()]
            prepared.run = prepared.run.with_options(kinds=tuple(sorted(groups, key=_group_key)))
            if settings.part_rows is None and recorded is None:
                part_rows = min(default_sizes(choice)[1] for choice in choices.values())
                prepared.run = prepared.run.with_options(part_rows=part_rows)

    def _open_leader(self, group: ActorGroup) -> None:
        """Open one actor of a group, or another if it is lost. Raises ParityError when all are refused."""
        leader: ActorHandle | None = None
        while group not in self._leaders:
            if not any(
                actor.placement.resources.gpu == (group.gpu is not None) for actor in self.pool.actors
            ):
                raise ParityError(f"no actor is left of one hardware group: {self.pool.refused[-1]}")
            if leader is None or leader.ended:
                candidates = (actor for actor in self.pool.actors if actor.info and actor.group == group)
                if leader := next(candidates, None):
                    self._open(leader)
            self._handle_answers()
            if self._deadline.reached():
                raise Stopped(
                    f"{self._deadline.why} before the run began; run the same command again to start it"
                )

    def on_actor_started(self, actor: ActorHandle) -> None:
        """Open, begin or dismiss an actor that started after the run began; ignore an earlier one."""
        if not self.pool.run_began or not actor.info:
            return
        if actor.group not in self._batch_sizes:
            self.pool.dismiss_actor(actor, "the run has begun without such actors")
        elif actor.opened:
            self._begin(actor)
        elif actor.opening_since is None:
            self._open(actor)

    def _open(self, actor: ActorHandle) -> None:
        prepared, group = self.prepared, actor.group
        assert actor.info
        choice, leader = actor.info.choice, self._leaders.get(group)
        tuning = leader.settled.tuning if leader else prepared.run.tuning if choice.gpu else Tuning()
        spec = RunSpec(
            self._batch_sizes[group],
            prepared.part_rows,
            prepared.run.rows,
            tuning,
            prepared.layout,
            prepared.manifest.root,
            prepared.resumed or leader is not None,
            self._stages_type,
            self._token,
            self._checked_files,
            leader.expected if leader else None,
        )
        actor.opening_since = time.monotonic()
        self.pool.call(actor, "open", spec, then=self._on_opened)

    def _on_opened(self, actor: ActorHandle, opened: OpenedStages) -> None:
        prepared, group = self.prepared, actor.group
        actor.opened = True
        if group not in self._leaders:
            self._leaders[group] = opened
            self._batch_sizes[group] = opened.settled.batch_size
            prepared.start_messages += opened.lines
            settled = opened.settled
            if group.device != prepared.run.result_options.device:  # only its versions are recorded
                unchanged = prepared.run.result_options.batch_size, prepared.run.tuning
                settled = Settled(*unchanged, settled.versions)
            prepared.run = prepared.run.with_settled(settled)
        if self.pool.run_began:
            self._begin(actor)

    def _begin(self, actor: ActorHandle) -> None:
        def set_ready(actor: ActorHandle, answer: None) -> None:
            actor.ready = True

        self.pool.call(actor, "begin", self.prepared.run.to_metadata(), then=set_ready)

    @cached_property
    def _checked_files(self) -> tuple[str, ...]:
        """List some local files of the manifest that exist."""
        manifest = self.prepared.manifest
        column = next(manifest.tables()).column(manifest.path_column).slice(0, CHECKED_FILES)
        paths = [str(path) for path in column.to_pylist() if path]
        storage = ImageStorage(manifest.root)
        if storage.any_remote(paths):
            return ()
        files = [os.path.join(storage.root, path.partition("::")[0]) for path in paths]
        return tuple(filter(os.path.exists, files))

    def _handle_answers(self) -> None:
        """Handle the answers that have arrived and check the actors that send none."""
        self.pool.handle_answers(POLL_S)
        now = time.monotonic()
        for actor in list(self.pool.actors):
            if actor.opening_since and not actor.opened and now - actor.opening_since > OPEN_TIMEOUT_S:
                self.pool.replace_actor(actor, f"its stages did not open within {OPEN_TIMEOUT_S:g} s")
        self.pool.report_waiting()

    def _work(self) -> dict[int, PartInfo]:
        """Assign parts until each is confirmed; return the contents of their footers."""
        total = self.prepared.run.part_count - len(self.prepared.done)
        while True:
            while len(self.done) < total or any(self._unconfirmed.values()):
                self._handle_answers()
                self._poll_heartbeats()
                self._search_poison_rows()
                self._assign_parts()
                if len(self.done) == total:
                    self._check_all()
                self._record()
                self._publish_progress()
                self._check_stop(total)
            self._record(now=True)
            parts = self.prepared.folder.finished(self.prepared.run)
            # a lost actor may have written a part after the actor that repeated it
            if not (overwritten := self.done.keys() - parts.keys()):
                return parts
            for index in overwritten:
                self._repeat_part(index)

    # parts

    def _assign_parts(self) -> None:
        while (part := self.part_queue.peek()) is not None:
            actor = self._choose_actor_for(part)
            if actor is None:
                return
            self.part_queue.take()
            part.crashed = self._crashed.get(part.index, frozenset())
            actor.parts[part.index] = part.rows
            actor.exclusive = self._is_suspected(part)
            actor.began = actor.began or time.monotonic()

            def on_done(actor: ActorHandle, done: PartInfo) -> None:
                self._on_part_done(actor, done)

            self.pool.call(actor, "score_part", part, then=on_done, group=PARTS_GROUP)

    def _choose_actor_for(self, part: Part) -> ActorHandle | None:
        """Choose the actor that finishes a part soonest, None if none should get it now.

        An actor gets no other part together with a suspected one.
        """
        alone, ready = self._is_suspected(part), self.pool.ready
        free = [
            actor for actor in ready if self._has_room(actor, alone=alone) and self._is_in_time(actor, part)
        ]
        return choose_actor(free, ready, part.rows, self.part_queue.left * self.prepared.part_rows)

    def _is_suspected(self, part: Part) -> bool:
        """Return whether an actor died with this part; the next actor then gets it alone."""
        return self._failures[part.index] > 0 or part.index in self._crashed

    def _has_room(self, actor: ActorHandle, *, alone: bool) -> bool:
        if actor.exclusive or any(search.actor is actor for search in self._searches):
            return False
        if alone or (actor.rate is None and len(self._batch_sizes) > 1):
            return not actor.parts
        rows = BATCHES_IN_STAGES * self._batch_sizes[actor.group]
        return len(actor.parts) < min(MAX_PARTS_HELD, 2 + rows // self.prepared.part_rows)

    def _is_in_time(self, actor: ActorHandle, part: Part) -> bool:
        """Return whether an actor can finish a part, and the canaries after it, before the deadline."""
        rows = actor.rows_held + part.rows
        return not actor.rate or self._deadline.fits(rows / actor.rate + CHECK_S)

    def _on_part_done(self, actor: ActorHandle, done: PartInfo) -> None:
        index = done.index
        actor.rows_done += actor.parts.pop(index)
        actor.exclusive = False
        self.done[index] = done
        self._by_status.update(done.by_status)
        self._failures.pop(index, None)
        self._unconfirmed.setdefault(actor.name, set()).add(index)
        self.progress.by_class.update(done.by_class)

    def _repeat_part(self, index: int) -> None:
        done = self.done.pop(index)
        self._by_status.subtract(done.by_status)
        self.progress.by_class.subtract(done.by_class)
        self.repeated_parts += 1
        self.part_queue.put_back(index)

    def on_actor_lost(self, actor: ActorHandle, *, counts_as_failure: bool) -> None:
        """Assign the parts of a lost actor again, and those that no canaries confirmed."""
        for search in self._searches:
            if search.actor is actor:
                search.on_actor_lost()
        for index in actor.parts:
            self.repeated_parts += 1
            self._failures[index] += counts_as_failure
            self.part_queue.put_back(index)
        for index in self._unconfirmed.pop(actor.name, set()):
            self._repeat_part(index)

    def _search_poison_rows(self) -> None:
        """Search the parts that ended actors for poison rows; each search needs an actor without parts."""
        part = self.part_queue.peek()
        if part is not None and self._failures[part.index] >= MAX_PART_FAILURES:
            if part.index in self._crashed:
                raise EngineError(
                    f"part {part.index} (from row {part.row[0]}) ends every actor that scores it, but no "
                    "single row does; run the same command again to continue"
                )
            self.part_queue.take()
            self.pool.say(
                f"part {part.index} ended {MAX_PART_FAILURES} actors; searching for the row that causes it"
            )
            batch_size = min(self._batch_sizes.values())
            self._searches.append(PoisonRowSearch(self.pool, part, batch_size))
        for search in list(self._searches):
            if search.is_done:
                self._searches.remove(search)
                self._crashed[search.index] = frozenset(search.crashed)
                self._failures[search.index] = 0
                first = search.index * self.prepared.part_rows
                rows = ", ".join(
                    str(first + position) for position in sorted(search.crashed)[:MAX_SHOWN_ROWS]
                )
                count = len(search.crashed)
                text = (
                    f"rows that end an actor alone: {count} ({rows})"
                    if count
                    else "no row ends an actor alone"
                )
                self.pool.say(f"part {search.index}: {text}")
                if count > MAX_POISON_ROWS:
                    raise EngineError(
                        f"part {search.index}: {count} rows crash the process that scores them, so the cause "
                        "is not the images; fix it and run the same command again"
                    )
                self.part_queue.put_back(search.index)
            elif search.actor is None:
                free = (actor for actor in self.pool.ready if self._has_room(actor, alone=True))
                if actor := next(free, None):
                    search.probe_next(actor)

    # canaries

    def _poll_heartbeats(self) -> None:
        """Ask the actors for their progress and detect those that hang."""
        now, limit_s = time.monotonic(), self.prepared.settings.part_timeout_s
        for actor in self.pool.ready:
            if not actor.awaiting_heartbeat and now - actor.heartbeat_asked_at > HEARTBEAT_S:
                actor.awaiting_heartbeat, actor.heartbeat_asked_at = True, now
                self.pool.call(actor, "heartbeat", then=self._on_heartbeat, group=HEARTBEAT_GROUP)
            overdue = actor.awaiting_heartbeat and now - actor.heartbeat_asked_at > limit_s
            if overdue and actor.overdue:  # twice in a row, as this process may have been paused
                self.pool.replace_actor(actor, f"no answer for {limit_s:g} s (--part-timeout)")
            actor.overdue = overdue

    def _on_heartbeat(self, actor: ActorHandle, heartbeat: Heartbeat) -> None:
        actor.awaiting_heartbeat, actor.heartbeat = False, heartbeat
        self._confirm(actor, heartbeat.rounds)
        limit_s = self.prepared.settings.part_timeout_s
        if heartbeat.idle_s > limit_s:
            self.pool.replace_actor(actor, f"no finished batch for {limit_s:g} s (--part-timeout)")

    def _confirm(self, actor: ActorHandle, rounds: int) -> None:
        """Count what an actor wrote before its canaries passed."""
        previous = self._actors.get(actor.name)
        if rounds <= (previous.rounds if previous else 0):
            return
        assert actor.info
        device = actor.info.choice.device
        self._actors[actor.name] = ActorRecord(host=actor.host, device=device, rounds=rounds)
        self._changed = True
        unconfirmed = self._unconfirmed.get(actor.name, set())
        self._unconfirmed[actor.name] = {
            index for index in unconfirmed if not is_confirmed(self.done[index], self._actors)
        }

    def _check_all(self) -> None:
        """Check the canaries in each actor that has written parts since its last check."""
        for actor in self.pool.ready:
            if self._unconfirmed.get(actor.name) and not actor.checking:
                actor.checking = True
                self.pool.call(actor, "check", then=self._on_checked)

    def _on_checked(self, actor: ActorHandle, heartbeat: Heartbeat) -> None:
        actor.checking = False
        self._on_heartbeat(actor, heartbeat)

    def _record(self, *, now: bool = False) -> None:
        if self._changed and (now or time.monotonic() - self._recorded > RECORD_S):
            self.prepared.folder.record_actors(self.prepared.run, self._actors)
            self._recorded, self._changed = time.monotonic(), False

    # progress

    def _heartbeats(self) -> list[Heartbeat]:
        return [actor.heartbeat for actor in (*self.pool.actors, *self.pool.lost_actors) if actor.heartbeat]

    def _meters(self) -> dict[str, Meter]:
        """Sum the stage meters of all actors."""
        meters: dict[str, Meter] = {}
        for actor in (*self.pool.actors, *self.pool.lost_actors):
            for name, (threads, busy_s, starved_s, blocked_s) in (
                actor.heartbeat.meters if actor.heartbeat else {}
            ).items():
                meter = meters.setdefault(name, Meter(name, 0))
                meter.lanes += 0 if actor.ended else threads
                meter.busy_s += busy_s
                meter.starved_s += starved_s
                meter.blocked_s += blocked_s
        for meter in meters.values():
            meter.lanes = meter.lanes or 1
        return meters

    def _publish_progress(self) -> None:
        by_status = self._by_status.copy()
        for actor in self.pool.ready:
            for index, counts in (actor.heartbeat.in_progress if actor.heartbeat else {}).items():
                if index in actor.parts:
                    by_status.update(counts)
        progress = self.progress
        progress.by_status = by_status
        rows_done = by_status.total() - self.progress.rows_before
        if rows_done != progress.rows_done:
            progress.rows_done, progress.meters = rows_done, self._meters()
            self._on_progress(progress)

    # stopping

    def _check_stop(self, total: int) -> None:
        """Raise Stopped when the run has to stop."""
        if self._deadline.reached() or (len(self.done) < total and self._is_too_late()):
            self._stop(min(GRACE_S, self._deadline.grace_s))

    def _is_too_late(self) -> bool:
        """Return whether all actors idle because no part would be done in time."""
        part, ready = self.part_queue.peek(), self.pool.ready
        if part is None or not ready or self._searches or any(actor.parts for actor in self.pool.actors):
            return False
        return not any(self._is_in_time(actor, part) for actor in ready)

    def _stop(self, grace_s: float) -> None:
        answers = 0

        def on_stopped(actor: ActorHandle, heartbeat: Heartbeat) -> None:
            nonlocal answers
            answers += 1
            self._on_heartbeat(actor, heartbeat)

        actors = self.pool.ready
        for actor in actors:
            self.pool.call(actor, "stop", grace_s, then=on_stopped)
        deadline = time.monotonic() + grace_s + CHECK_S
        while answers < len([actor for actor in actors if not actor.ended]) and time.monotonic() < deadline:
            self.pool.handle_answers(POLL_S)
        self._record(now=True)
        self._publish_progress()
        rows = self.progress.rows_before + sum(part.rows for part in self.done.values())
        raise self._deadline.stopped(f"{rows} of {self.progress.rows} rows were processed")


@dataclass(frozen=True)
class ActorLoad:
    """The remaining rows and the rate of an actor."""

    rows: int
    rate: float | None  # rows per second; None if unknown


def choose_actor(
    free: Sequence[ActorHandle], ready: Sequence[ActorHandle], rows: int, left: int
) -> ActorHandle | None:
    """Choose which of the `free` actors gets a part of `rows`, if any, of `left` unassigned rows."""
    loads = {actor: ActorLoad(actor.rows_held, actor.rate) for actor in ready} if free else {}
    for actor in sorted(free, key=lambda actor: (len(actor.parts), loads[actor].rows)):
        others = [load for other, load in loads.items() if other is not actor]
        if not others_finish_first(rows, loads[actor], others, left):
            return actor
    return None


def others_finish_first(rows: int, own: ActorLoad, others: Sequence[ActorLoad], left: int) -> bool:
    """Return whether `others` finish all `left` rows before an actor with the load `own` finishes one part.

    `left` counts the unassigned rows, including the `rows` of that part.
    """
    rates = [other.rate for other in others if other.rate]
    if not rates or not own.rate:
        return False
    held = sum(other.rows for other in others if other.rate)
    others_s = (held + left - rows) / sum(rates) + rows / max(rates)
    return others_s < (own.rows + rows) / own.rate


def _group_key(group: HardwareGroup) -> str:
    return json.dumps(to_builtins(group) | {"batch_size": None}, sort_keys=True)
