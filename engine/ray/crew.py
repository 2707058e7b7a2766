"""The actors as the driver sees them: started, called, given up, replaced."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from engine.bundle import Bundle
from engine.core.deadline import Deadline
from engine.core.version import __version__
from engine.errors import EngineError, ParityError, Stopped, UsageError
from engine.job import Say
from engine.provenance import HardwareGroup, versions
from engine.ray.actor import Actor, Brief, Hello, Pulse
from engine.ray.cluster import Post, joined, posts_for
from engine.runners import Choice
from engine.settings import Settings
from engine.storage.location import absolute

PARTS, PULSE = "parts", "pulse"  # concurrency groups: what may be asked of an actor while it is at work
MOST_PARTS = 24  # that an actor may hold
GATHER_S = 20.0  # for actors that the cluster has no room for as yet
REMIND_S = 30.0
LIVES, MOST_LIVES = 3, 10  # actors in a row that die before they take a part: then a pause, then an end


@dataclass(frozen=True)
class Kind:
    """Actors that give the same scores, bit for bit, and are given the same batches."""

    runner: str
    device: str
    precision: str
    plans: tuple[tuple[str, str], ...]
    gpu: str | None

    @classmethod
    def of(cls, choice: Choice) -> Kind:
        plans = tuple(sorted((choice.plan_hashes or {}).items()))
        return cls(
            choice.runner, choice.device, choice.precision, plans, choice.gpu.name if choice.gpu else None
        )

    @classmethod
    def of_record(cls, group: HardwareGroup) -> Kind:
        plans = tuple(sorted((group.plans or {}).items()))
        return cls(group.runner, group.device, group.precision, plans, group.gpu)

    def as_record(self, batch_size: int) -> HardwareGroup:
        return HardwareGroup(
            runner=self.runner,
            device=self.device,
            precision=self.precision,
            plans=dict(self.plans) or None,
            gpu=self.gpu,
            batch_size=batch_size,
        )


@dataclass(eq=False)
class Slot:
    """A place for an actor, and those after it."""

    post: Post
    failures: int = 0  # actors in a row that died before they took a part
    start_at: float | None = None  # when the next is started, after such failures


@dataclass(eq=False)
class Hand:
    """One actor."""

    name: str
    slot: Slot
    handle: Any
    late: bool = False  # it was started when the run had begun
    hello: Hello | None = None
    opening: float | None = None  # when it was asked to open its stages
    opened: bool = False
    ready: bool = False  # to take parts
    gone: bool = False
    beating: bool = False  # a pulse was asked for and has not come
    beat: float = 0.0  # when the last one was asked for
    overdue: bool = False  # at the last look
    checking: bool = False  # the canaries were asked for
    pulse: Pulse | None = None
    began: float | None = None  # when it got its first part
    parts: dict[int, int] = field(default_factory=dict)  # rows of those it has and has not done
    alone: bool = False  # with a part that is suspected
    rows_done: int = 0

    @property
    def kind(self) -> Kind:
        assert self.hello
        return Kind.of(self.hello.choice)

    @property
    def host(self) -> str:
        return self.hello.host if self.hello else "an actor"

    @property
    def pid(self) -> int:
        """Of its process, on its host."""
        assert self.hello
        return self.hello.pid

    @property
    def underway(self) -> int:
        """Rows of parts that it has begun and not done."""
        found = self.pulse.underway if self.pulse else {}
        return sum(sum(found[index].values()) for index in self.parts if index in found)

    @property
    def rows_held(self) -> int:
        """Rows that it has to do still."""
        return sum(self.parts.values()) - self.underway

    @property
    def rate(self) -> float | None:
        """Rows per second; None before there are any."""
        rows = self.rows_done + self.underway
        return rows / (time.monotonic() - self.began) if self.began and rows else None


class Owner(Protocol):
    """Who has to know what becomes of actors."""

    def greeted(self, hand: Hand) -> None: ...

    def lost(self, hand: Hand, *, guilty: bool) -> None: ...


Then = Callable[[Hand, Any], None]


class Crew:
    """All actors. Whatever they answer is handled in `turn`, in the driver's one thread."""

    def __init__(self, settings: Settings, say: Say, deadline: Deadline) -> None:
        self.settings, self.say, self._deadline = settings, say, deadline
        self.slots: list[Slot] = []
        self.hands: list[Hand] = []  # that are not gone
        self.past: list[Hand] = []  # that are
        self.refused: list[str] = []
        self.owner: Owner | None = None
        self.begun = False  # the run: who comes now and is of no use doesn't end it
        self._waiting: dict[Any, tuple[Hand, Then]] = {}
        self._stack = ExitStack()
        self._reminded = time.monotonic()

    def assemble(self, models: Bundle) -> Choice:
        """Start the actors, wait until they are there, and tell what runs the members: a GPU where one is.

        Raises UsageError when one of them can't run this bundle as asked.
        """
        self._models = models
        cluster = self._stack.enter_context(joined(self.settings))
        self.ray = cluster.ray
        self._remote = self.ray.remote(concurrency_groups={PARTS: MOST_PARTS, PULSE: 1})(Actor)
        self.slots = [Slot(post) for post in posts_for(cluster.nodes(), self.settings)]
        for slot in self.slots:
            self._start(slot)
        began = time.monotonic()
        while not all(hand.hello for hand in self.hands):
            found = [hand for hand in self.hands if hand.hello]
            if found and time.monotonic() - began > GATHER_S:
                break
            if self._deadline.reached():
                raise Stopped(f"{self._deadline.why} before it began; the same command starts it")
            self.remind()
            self.turn(0.2)
        first = max((hand for hand in self.hands if hand.hello), key=lambda hand: hand.slot.post.gpu)
        assert first.hello
        choice = first.hello.choice
        gpus = sum(hand.slot.post.gpu for hand in self.hands)
        words = [
            f"{count} on {what}s" for count, what in ((gpus, "GPU"), (len(self.hands) - gpus, "CPU")) if count
        ]
        hosts = f"{len(self.hosts)} machine{'s' * (len(self.hosts) > 1)}"
        return replace(choice, reason=f"{choice.reason}; Ray actors: {', '.join(words)}, {hosts}")

    @property
    def hosts(self) -> set[str]:
        return {hand.hello.host for hand in (*self.hands, *self.past) if hand.hello}

    @property
    def ready(self) -> list[Hand]:
        return [hand for hand in self.hands if hand.ready]

    def remind(self) -> None:
        """Say so while there is nothing but waiting."""
        if not self.ready and time.monotonic() - self._reminded > REMIND_S:
            self._reminded = time.monotonic()
            self.say("waiting for the cluster to have room for an actor")

    def _start(self, slot: Slot) -> None:
        name = uuid.uuid4().hex[:12]
        post = slot.post
        settings = replace(
            self.settings, output=absolute(self.settings.output), bundle=self.settings.bundle.absolute()
        )
        options: dict[str, Any] = {"num_cpus": post.workers, "max_restarts": 0}
        if post.gpu:
            options["num_gpus"] = 1
        handle = self._remote.options(**options).remote(Brief(name, settings, post))
        hand = Hand(name, slot, handle, late=self.begun)
        self.hands.append(hand)
        self.call(hand, "hello", then=self._greeted)

    def call(self, hand: Hand, method: str, *arguments: Any, then: Then, group: str | None = None) -> None:
        """Ask an actor for something; `then` gets its answer, unless the actor is gone by then."""
        bound = getattr(hand.handle, method)
        if group:
            bound = bound.options(concurrency_group=group)
        self._waiting[bound.remote(*arguments)] = hand, then

    def turn(self, wait_s: float) -> None:
        """Handle the answers that are there, or come within `wait_s`. Raises EngineError to end the run."""
        for slot in self.slots:
            if slot.start_at and time.monotonic() > slot.start_at:
                slot.start_at = None
                self._start(slot)
        if not self._waiting:
            time.sleep(wait_s)
            return
        ready, rest = self.ray.wait(list(self._waiting), num_returns=1, timeout=wait_s, fetch_local=False)
        if ready and rest:
            ready += self.ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        for ref in ready:
            hand, then = self._waiting.pop(ref)
            if not hand.gone:
                self._handle(ref, hand, then)

    def _handle(self, ref: Any, hand: Hand, then: Then) -> None:
        exceptions = self.ray.exceptions
        try:
            answer = self.ray.get(ref)
        except exceptions.RayTaskError as error:
            self._failed(hand, error)
        except exceptions.RayError as error:
            self.lose(hand, self._why(error))
        else:
            then(hand, answer)

    def _why(self, error: Any) -> str:
        """Why an actor does not answer, in a few words."""
        died = isinstance(error, self.ray.exceptions.RayActorError)
        if not died or error.actor_init_failed:
            return _last_line(error)
        return "its machine is gone" if "its node has died" in str(error) else "its process has died"

    def _failed(self, hand: Hand, error: Any) -> None:
        """Its code has raised something."""
        cause = error.cause
        where = f"{hand.host}: " if len(self.hosts) > 1 else ""
        if isinstance(cause, Stopped):
            return
        if isinstance(cause, ParityError):
            self.refuse(hand, str(cause))
        elif isinstance(cause, EngineError):
            self._of_no_use(hand, type(cause)(f"{where}{cause}"))
        elif hand.ready:  # a GPU that is broken, say
            self.lose(hand, _last_line(error))
        else:
            raise RuntimeError(f"{where}{_last_line(error)}")

    def _of_no_use(self, hand: Hand, error: EngineError) -> None:
        """Raises `error`, but for an actor that came later and has not done anything yet."""
        if hand.ready or not hand.late:
            raise error
        self.dismiss(hand, str(error))

    def _greeted(self, hand: Hand, hello: Hello) -> None:
        hand.hello = hello
        if problem := self._problem(hello):
            self._of_no_use(hand, UsageError(problem))
        elif self.owner:
            self.owner.greeted(hand)

    def _problem(self, hello: Hello) -> str | None:
        """Why an actor's scores would not be those of the others."""
        if hello.bundle_sha256 != self._models.sha256:
            return (
                f"bundle {self.settings.bundle}: another one on {hello.host}; give the same to all machines"
            )
        ours = {"engine": __version__, **versions()}
        for name in ours.keys() | hello.versions.keys():
            if ours.get(name) != hello.versions.get(name):
                return (
                    f"{hello.host} has {name} {hello.versions.get(name) or 'not'}, here is "
                    f"{ours.get(name) or 'none'}; install the same on every machine (constraints.txt)"
                )
        return None

    def lose(self, hand: Hand, why: str) -> None:
        """Give an actor up, whatever it is doing, and put another in its place.

        Raises EngineError when no actor lives long enough to take a part.
        """
        if hand.gone:
            return
        slot = hand.slot
        slot.failures = 0 if hand.began else slot.failures + 1
        if hand.ready:
            self.say(f"an actor on {hand.host} ({hand.pid}) is lost, another takes its place: {why}")
        self._drop(hand, guilty=True)
        if slot.failures < LIVES:
            self._start(slot)
            return
        hopeless = slot.failures >= MOST_LIVES or not any(one.began for one in (*self.hands, *self.past))
        if hopeless and not self.ready:
            raise EngineError(f"no actor lives long enough to take a part: {why}")
        self.say(f"{slot.failures} actors have died before they took a part, the last since: {why}")
        slot.start_at = time.monotonic() + REMIND_S

    def refuse(self, hand: Hand, why: str) -> None:
        """Its scores are wrong: no actor takes its place. Raises ParityError when no other is left."""
        self.refused.append(f"{hand.host}, {hand.kind.device}: {why}")
        self.say(f"an actor on {hand.host} ({hand.kind.device}) is refused: {why}")
        self._drop(hand, guilty=False)
        if not self.hands:
            raise ParityError(f"no actor is left: {why}")

    def dismiss(self, hand: Hand, why: str) -> None:
        """It is of no use."""
        self.say(f"an actor on {hand.host} is not used: {why}")
        self._drop(hand, guilty=False)
        if not self.hands:
            raise EngineError(f"no actor is left: {why}; the same command goes on where there are others")

    def _drop(self, hand: Hand, *, guilty: bool) -> None:
        hand.gone, hand.ready = True, False
        self.hands.remove(hand)
        self.past.append(hand)
        self.ray.kill(hand.handle)
        if self.owner:
            self.owner.lost(hand, guilty=guilty)

    def close(self) -> None:
        """End all actors, and Ray if it was started here."""
        for hand in self.hands:
            self.ray.kill(hand.handle)
        self.hands, self._waiting = [], {}
        self._stack.close()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
