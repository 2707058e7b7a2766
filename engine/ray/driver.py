"""A run on Ray: which actor gets which part, what is done again, when it is over."""

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
from engine.core.json_records import to_builtins
from engine.core.tuning import Settled, Tuning
from engine.errors import EngineError, ParityError, Stopped
from engine.job import Job, Say, Watch, close_ledger, prepare
from engine.ledger import ActorCounts, Summary
from engine.overlap import Meter
from engine.pipeline import Stages
from engine.provenance import HardwareGroup, defaults
from engine.ray.actor import Opened, Pulse, Work
from engine.ray.crew import MOST_PARTS, PARTS, PULSE, Crew, Hand, Kind
from engine.ray.isolation import Isolation
from engine.ray.supply import Supply
from engine.records import Part
from engine.run_folder import ActorRecord, is_vouched
from engine.settings import Settings
from engine.sink import Done
from engine.storage import Storage

TURN_S = 0.2
PULSE_S = 1.0
RECORD_S = 5.0  # between two looks at which actors were right
OPEN_S = 900.0  # that opening may take: a GPU is tuned, graphs are compiled
STRIKES = 3  # actors that die over a part before it is looked into
MOST_CRASHED = 16  # rows of a part; more, and it is not the rows' fault
IN_STAGES = 32  # batches that are in an actor's stages at once, about
CHECK_S = 2.5  # that the canaries may take before a stop
WITNESSES = SHOWN = 8
TOKEN = ".actors.tmp"


def screen(
    settings: Settings,
    *,
    watch: Watch = lambda _: None,
    say: Say = lambda _: None,
    deadline: Deadline | None = None,
    stages_of: type[Stages] | None = None,
) -> Summary:
    """As `engine.pipeline.screen`, by actors on the Ray that `settings.ray` names."""
    deadline = deadline or Deadline(settings.finish_by)
    crew = Crew(settings, say, deadline)
    with (
        closing(crew),
        prepare(settings, say, chosen=crew.assemble) as job,
        closing(crew),  # before the folder is unlocked
        token_of(job) as token,
    ):
        return Run(crew, job, token, watch, deadline, stages_of or Stages).screen()


@contextmanager
def token_of(job: Job) -> Iterator[tuple[str, str] | None]:
    """A file in a local results folder by which actors know it again."""
    if not isinstance(job.folder.path, Path):
        yield None
        return
    file, content = job.folder.path / TOKEN, uuid.uuid4().hex
    file.write_text(content)
    try:
        yield TOKEN, content
    finally:
        file.unlink(missing_ok=True)


class Run:
    """One run, from the opening of the actors to `_SUCCESS`.

    A part is done when it is written, and done for good when the canaries have come well through its actor
    after that. If the actor dies before, the part is given out again.
    """

    def __init__(
        self,
        crew: Crew,
        job: Job,
        token: tuple[str, str] | None,
        watch: Watch,
        deadline: Deadline,
        stages_of: type[Stages],
    ) -> None:
        self.crew, self.job, self._token, self._watch, self._deadline = crew, job, token, watch, deadline
        self._stages_of = stages_of
        self._leaders: dict[Kind, Opened] = {}
        self._batch_sizes: dict[Kind, int] = {}
        self.done: dict[int, Done] = {}  # by this start
        self._unvouched: dict[str, set[int]] = {}  # parts that are done, by the actor's name
        self._actors: dict[str, ActorRecord] = {}
        self._recorded, self._changed = time.monotonic(), False
        self._strikes: Counter[int] = Counter()
        self._crashed: dict[int, frozenset[int]] = {}  # positions, of parts that were looked into
        self._isolations: list[Isolation] = []
        self.parts_again = 0  # parts that were given out once more

    def screen(self) -> Summary:
        job, crew = self.job, self.crew
        crew.owner = self
        self._settle()
        job.begin()
        if job.is_finished:
            return job.summary()
        self.progress = job.progress()
        self._by_status = self.progress.by_status.copy()  # of parts that are done
        self._actors = job.folder.actors(job.run)
        self.supply = Supply(self._parts_of, set(range(job.run.part_count)) - set(job.done))
        crew.begun = True
        try:
            for hand in list(crew.hands):
                self.greeted(hand)
            parts = self._work()
        finally:
            self.supply.close()
        job.folder.files.sweep()
        pulses = self._pulses()
        return close_ledger(
            job.folder,
            job.run,
            self.progress,
            self._meters(),
            parts=parts,
            decoder_restarts=sum(pulse.crashes for pulse in pulses),
            decoder_refusals=sum(pulse.refusals for pulse in pulses),
            actors=ActorCounts(
                started=len(crew.hands) + len(crew.past),
                lost=len(crew.past) - len(crew.refused),
                refused=tuple(crew.refused),
                parts_done_again=self.parts_again,
                rows_crashed=sum(map(len, self._crashed.values())),
            ),
        )

    def _parts_of(self, wanted: set[int]) -> Iterator[Part]:
        return self.job.manifest.parts(self.job.part_rows, wanted)

    def _settle(self) -> None:
        """One actor of each kind settles what is tuned; the run's options say which kinds there are."""
        job, settings = self.job, self.job.settings
        recorded = None if settings.overwrite else job.folder.recorded()
        choices = {hand.kind: hand.hello.choice for hand in self.crew.hands if hand.hello}
        groups = recorded.result_options.kinds or () if recorded else ()
        before = {Kind.of_record(group): group.batch_size for group in groups}
        for kind, choice in choices.items():
            default = settings.batch_size or defaults(choice)[0]
            known = before.get(kind, default)
            self._batch_sizes[kind] = known if len(choices) > 1 else job.run.result_options.batch_size
        for kind in choices:
            self._lead(kind)
        if len(choices) > 1:
            kinds = [kind.as_record(size) for kind, size in self._batch_sizes.items()]
            job.run = job.run.with_options(kinds=tuple(sorted(kinds, key=_key)))
            if settings.part_rows is None and recorded is None:
                part_rows = min(defaults(choice)[1] for choice in choices.values())
                job.run = job.run.with_options(part_rows=part_rows)

    def _lead(self, kind: Kind) -> None:
        """Open one actor of a kind; another when it is lost. Raises ParityError when all are refused."""
        asked: Hand | None = None
        while kind not in self._leaders:
            if not any(hand.slot.post.gpu == (kind.gpu is not None) for hand in self.crew.hands):
                raise ParityError(f"no actor is left of a kind: {self.crew.refused[-1]}")
            if asked is None or asked.gone:
                there = (hand for hand in self.crew.hands if hand.hello and hand.kind == kind)
                if asked := next(there, None):
                    self._open(asked)
            self._turn()
            if self._deadline.reached():
                raise Stopped(f"{self._deadline.why} before it began; the same command starts it")

    def greeted(self, hand: Hand) -> None:
        """An actor is there, now or since before the run began."""
        if not self.crew.begun or not hand.hello:
            return
        if hand.kind not in self._batch_sizes:
            self.crew.dismiss(hand, "the run has begun without such actors")
        elif hand.opened:
            self._begin(hand)
        elif hand.opening is None:
            self._open(hand)

    def _open(self, hand: Hand) -> None:
        job, kind = self.job, hand.kind
        assert hand.hello
        choice, leader = hand.hello.choice, self._leaders.get(kind)
        tuning = leader.settled.tuning if leader else job.run.tuning if choice.gpu else Tuning()
        work = Work(
            self._batch_sizes[kind],
            job.part_rows,
            job.run.rows,
            tuning,
            job.layout,
            job.manifest.root,
            job.resumed or leader is not None,
            self._stages_of,
            self._token,
            self._witnesses,
            leader.expected if leader else None,
        )
        hand.opening = time.monotonic()
        self.crew.call(hand, "open", work, then=self._opened)

    def _opened(self, hand: Hand, opened: Opened) -> None:
        job, kind = self.job, hand.kind
        hand.opened = True
        if kind not in self._leaders:
            self._leaders[kind] = opened
            self._batch_sizes[kind] = opened.settled.batch_size
            job.opening_lines += opened.lines
            settled = opened.settled
            if kind.device != job.run.result_options.device:  # only the versions are of interest
                known = job.run.result_options.batch_size, job.run.tuning
                settled = Settled(*known, settled.versions)
            job.run = job.run.with_settled(settled)
        if self.crew.begun:
            self._begin(hand)

    def _begin(self, hand: Hand) -> None:
        def begun(hand: Hand, answer: None) -> None:
            hand.ready = True

        self.crew.call(hand, "begin", self.job.run.to_metadata(), then=begun)

    @cached_property
    def _witnesses(self) -> tuple[str, ...]:
        """Some of the local files that the manifest names and that are there."""
        manifest = self.job.manifest
        column = next(manifest.tables()).column(manifest.path_column).slice(0, WITNESSES)
        paths = [str(path) for path in column.to_pylist() if path]
        storage = Storage(manifest.root)
        if storage.any_remote(paths):
            return ()
        files = [os.path.join(storage.root, path.partition("::")[0]) for path in paths]
        return tuple(filter(os.path.exists, files))

    def _turn(self) -> None:
        """What has come in meanwhile, and a look at those from whom nothing comes."""
        self.crew.turn(TURN_S)
        now = time.monotonic()
        for hand in list(self.crew.hands):
            if hand.opening and not hand.opened and now - hand.opening > OPEN_S:
                self.crew.lose(hand, f"its stages did not open within {OPEN_S:g} s")
        self.crew.remind()

    def _work(self) -> dict[int, Done]:
        """Until each part is done for good; returns what their footers say."""
        total = self.job.run.part_count - len(self.job.done)
        while True:
            while len(self.done) < total or any(self._unvouched.values()):
                self._turn()
                self._feel_pulses()
                self._isolate()
                self._give_out()
                if len(self.done) == total:
                    self._check_all()
                self._record()
                self._show()
                self._heed(total)
            self._record(now=True)
            parts = self.job.folder.finished(self.job.run)
            # an actor that was given up may have written one after the actor that did it again
            if not (overwritten := self.done.keys() - parts.keys()):
                return parts
            for index in overwritten:
                self._do_again(index)

    # parts

    def _give_out(self) -> None:
        while (part := self.supply.peek()) is not None:
            hand = self._taker(part)
            if hand is None:
                return
            self.supply.take()
            part.crashed = self._crashed.get(part.index, frozenset())
            hand.parts[part.index] = part.rows
            hand.alone = self._is_suspected(part)
            hand.began = hand.began or time.monotonic()

            def done(hand: Hand, done: Done) -> None:
                self._done(hand, done)

            self.crew.call(hand, "take", part, then=done, group=PARTS)

    def _taker(self, part: Part) -> Hand | None:
        """Who does it soonest, if anybody is to have it now. One that may end its actor goes to it alone."""
        alone, ready = self._is_suspected(part), self.crew.ready
        free = [hand for hand in ready if self._has_room(hand, alone=alone) and self._is_in_time(hand, part)]
        return soonest(free, ready, part.rows, self.supply.left * self.job.part_rows)

    def _is_suspected(self, part: Part) -> bool:
        """Whether an actor that had it has died: the next has it alone, so that the culprit is known."""
        return self._strikes[part.index] > 0 or part.index in self._crashed

    def _has_room(self, hand: Hand, *, alone: bool) -> bool:
        if hand.alone or any(one.hand is hand for one in self._isolations):
            return False
        if alone or (hand.rate is None and len(self._batch_sizes) > 1):
            return not hand.parts
        rows = IN_STAGES * self._batch_sizes[hand.kind]
        return len(hand.parts) < min(MOST_PARTS, 2 + rows // self.job.part_rows)

    def _is_in_time(self, hand: Hand, part: Part) -> bool:
        """Whether an actor would end a part before the deadline, and the canaries after it."""
        rows = hand.rows_held + part.rows
        return not hand.rate or self._deadline.fits(rows / hand.rate + CHECK_S)

    def _done(self, hand: Hand, done: Done) -> None:
        index = done.index
        hand.rows_done += hand.parts.pop(index)
        hand.alone = False
        self.done[index] = done
        self._by_status.update(done.by_status)
        self._strikes.pop(index, None)
        self._unvouched.setdefault(hand.name, set()).add(index)
        self.progress.by_class.update(done.by_class)

    def _do_again(self, index: int) -> None:
        done = self.done.pop(index)
        self._by_status.subtract(done.by_status)
        self.progress.by_class.subtract(done.by_class)
        self.parts_again += 1
        self.supply.again(index)

    def lost(self, hand: Hand, *, guilty: bool) -> None:
        """An actor is gone: what it had, and what nobody vouches for, is done again."""
        for isolation in self._isolations:
            if isolation.hand is hand:
                isolation.died()
        for index in hand.parts:
            self.parts_again += 1
            self._strikes[index] += guilty
            self.supply.again(index)
        for index in self._unvouched.pop(hand.name, set()):
            self._do_again(index)

    def _isolate(self) -> None:
        """Look into parts that actors have died over; each needs an actor that does nothing else."""
        part = self.supply.peek()
        if part is not None and self._strikes[part.index] >= STRIKES:
            if part.index in self._crashed:
                raise EngineError(
                    f"part {part.index} (from row {part.row[0]}) ends one actor after the other, and no row "
                    "of it does alone; the same command goes on"
                )
            self.supply.take()
            self.crew.say(f"part {part.index} has ended {STRIKES} actors: looking for the row that does")
            batch_size = min(self._batch_sizes.values())
            self._isolations.append(Isolation(self.crew, part, batch_size))
        for isolation in list(self._isolations):
            if isolation.is_over:
                self._isolations.remove(isolation)
                self._crashed[isolation.index] = frozenset(isolation.crashed)
                self._strikes[isolation.index] = 0
                first = isolation.index * self.job.part_rows
                rows = ", ".join(str(first + position) for position in sorted(isolation.crashed)[:SHOWN])
                many = len(isolation.crashed)
                found = f"rows that end it alone too: {many} ({rows})" if many else "no row ends it alone"
                self.crew.say(f"part {isolation.index}: {found}")
                if many > MOST_CRASHED:
                    raise EngineError(
                        f"part {isolation.index}: {many} rows end the process that scores them, so something "
                        "else is wrong; the same command goes on when it is mended"
                    )
                self.supply.again(isolation.index)
            elif isolation.hand is None:
                free = (hand for hand in self.crew.ready if self._has_room(hand, alone=True))
                if hand := next(free, None):
                    isolation.go_on(hand)

    # canaries

    def _feel_pulses(self) -> None:
        """How far the actors are, and whether they hang."""
        now, limit_s = time.monotonic(), self.job.settings.part_timeout_s
        for hand in self.crew.ready:
            if not hand.beating and now - hand.beat > PULSE_S:
                hand.beating, hand.beat = True, now
                self.crew.call(hand, "pulse", then=self._felt, group=PULSE)
            overdue = hand.beating and now - hand.beat > limit_s
            if overdue and hand.overdue:  # not at the first look: this process may have been paused
                self.crew.lose(hand, f"no answer for {limit_s:g} s (--part-timeout)")
            hand.overdue = overdue

    def _felt(self, hand: Hand, pulse: Pulse) -> None:
        hand.beating, hand.pulse = False, pulse
        self._vouch(hand, pulse.rounds)
        limit_s = self.job.settings.part_timeout_s
        if pulse.idle_s > limit_s:
            self.crew.lose(hand, f"no finished batch for {limit_s:g} s (--part-timeout)")

    def _vouch(self, hand: Hand, rounds: int) -> None:
        """The canaries came well through an actor: what it wrote before that counts."""
        known = self._actors.get(hand.name)
        if rounds <= (known.rounds if known else 0):
            return
        assert hand.hello
        device = hand.hello.choice.device
        self._actors[hand.name] = ActorRecord(host=hand.host, device=device, rounds=rounds)
        self._changed = True
        left = self._unvouched.get(hand.name, set())
        self._unvouched[hand.name] = {one for one in left if not is_vouched(self.done[one], self._actors)}

    def _check_all(self) -> None:
        """All parts are there: the canaries once more, through those who have written since the last time."""
        for hand in self.crew.ready:
            if self._unvouched.get(hand.name) and not hand.checking:
                hand.checking = True
                self.crew.call(hand, "check", then=self._checked)

    def _checked(self, hand: Hand, pulse: Pulse) -> None:
        hand.checking = False
        self._felt(hand, pulse)

    def _record(self, *, now: bool = False) -> None:
        if self._changed and (now or time.monotonic() - self._recorded > RECORD_S):
            self.job.folder.record_actors(self.job.run, self._actors)
            self._recorded, self._changed = time.monotonic(), False

    # what people see

    def _pulses(self) -> list[Pulse]:
        return [hand.pulse for hand in (*self.crew.hands, *self.crew.past) if hand.pulse]

    def _meters(self) -> dict[str, Meter]:
        """The stages of all actors together."""
        meters: dict[str, Meter] = {}
        for hand in (*self.crew.hands, *self.crew.past):
            for name, (lanes, busy_s, starved_s, blocked_s) in (
                hand.pulse.meters if hand.pulse else {}
            ).items():
                meter = meters.setdefault(name, Meter(name, 0))
                meter.lanes += 0 if hand.gone else lanes
                meter.busy_s += busy_s
                meter.starved_s += starved_s
                meter.blocked_s += blocked_s
        for meter in meters.values():
            meter.lanes = meter.lanes or 1
        return meters

    def _show(self) -> None:
        by_status = self._by_status.copy()
        for hand in self.crew.ready:
            for index, found in (hand.pulse.underway if hand.pulse else {}).items():
                if index in hand.parts:
                    by_status.update(found)
        progress = self.progress
        progress.by_status = by_status
        rows_done = by_status.total() - self.progress.rows_before
        if rows_done != progress.rows_done:
            progress.rows_done, progress.meters = rows_done, self._meters()
            self._watch(progress)

    # stopping

    def _heed(self, total: int) -> None:
        """Raises Stopped when it is time to."""
        if self._deadline.reached() or (len(self.done) < total and self._is_too_late()):
            self._stop(min(GRACE_S, self._deadline.grace_s))

    def _is_too_late(self) -> bool:
        """Whether everybody rests since no part would be done in time."""
        part, ready = self.supply.peek(), self.crew.ready
        if part is None or not ready or self._isolations or any(hand.parts for hand in self.crew.hands):
            return False
        return not any(self._is_in_time(hand, part) for hand in ready)

    def _stop(self, grace_s: float) -> None:
        answers = 0

        def stopped(hand: Hand, pulse: Pulse) -> None:
            nonlocal answers
            answers += 1
            self._felt(hand, pulse)

        asked = self.crew.ready
        for hand in asked:
            self.crew.call(hand, "stop", grace_s, then=stopped)
        deadline = time.monotonic() + grace_s + CHECK_S
        while answers < len([hand for hand in asked if not hand.gone]) and time.monotonic() < deadline:
            self.crew.turn(TURN_S)
        self._record(now=True)
        self._show()
        rows = self.progress.rows_before + sum(part.rows for part in self.done.values())
        raise self._deadline.stopped(f"{rows} of {self.progress.rows} rows were through")


@dataclass(frozen=True)
class Load:
    """What an actor has to do still, and how fast it is."""

    rows: int
    rate: float | None  # rows per second; None: not known yet


def soonest(free: Sequence[Hand], ready: Sequence[Hand], rows: int, left: int) -> Hand | None:
    """Which of the actors that are `free` gets a part of `rows`, if any should, of `left` not given out."""
    loads = {hand: Load(hand.rows_held, hand.rate) for hand in ready} if free else {}
    for hand in sorted(free, key=lambda hand: (len(hand.parts), loads[hand].rows)):
        others = [load for other, load in loads.items() if other is not hand]
        if not is_sooner_elsewhere(rows, loads[hand], others, left):
            return hand
    return None


def is_sooner_elsewhere(rows: int, mine: Load, others: Sequence[Load], left: int) -> bool:
    """Whether `others` would be done with all that is `left` (rows not given out, a part's `rows` among them)
    before the actor with the load `mine` was done with that one part."""
    rates = [other.rate for other in others if other.rate]
    if not rates or not mine.rate:
        return False
    held = sum(other.rows for other in others if other.rate)
    theirs_s = (held + left - rows) / sum(rates) + rows / max(rates)
    return theirs_s < (mine.rows + rows) / mine.rate


def _key(group: HardwareGroup) -> str:
    return json.dumps(to_builtins(group) | {"batch_size": None}, sort_keys=True)
