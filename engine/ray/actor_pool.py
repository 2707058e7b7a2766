"""Start, call, dismiss and replace the actors of a run, in the driver."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from engine.bundle.bundle import Bundle
from engine.core.deadline import Deadline
from engine.core.errors import EngineError, ParityError, Stopped, UsageError
from engine.core.location import absolute
from engine.core.records import OnMessage
from engine.core.settings import Settings
from engine.core.version import __version__
from engine.ray.actor import Actor, ActorConfig, ActorInfo, Heartbeat
from engine.ray.cluster import ActorResources, connect_cluster, plan_actors
from engine.runners.base import RunnerChoice
from engine.runs.run_record import HardwareGroup, library_versions

PARTS_GROUP, HEARTBEAT_GROUP = (
    "parts",
    "heartbeat",
)  # concurrency groups: calls that run while an actor scores
MAX_PARTS_HELD = 24  # per actor
START_TIMEOUT_S = 20.0  # for actors that wait for resources of the cluster
REMIND_S = 30.0
MAX_ACTOR_RESTARTS, MAX_TOTAL_RESTARTS = (
    3,
    10,
)  # consecutive actors that die before they take a part, until a pause and until the run fails


@dataclass(frozen=True)
class ActorGroup:
    """Actors with bit-identical scores and the same batch size."""

    runner: str
    device: str
    precision: str
    plans: tuple[tuple[str, str], ...]
    gpu: str | None

    @classmethod
    def of(cls, choice: RunnerChoice) -> ActorGroup:
        plans = tuple(sorted((choice.plan_hashes or {}).items()))
        return cls(
            choice.runner, choice.device, choice.precision, plans, choice.gpu.name if choice.gpu else None
        )

    @classmethod
    def of_record(cls, group: HardwareGroup) -> ActorGroup:
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
class Placement:
    """The resources for an actor and its replacements."""

    resources: ActorResources
    failures: int = 0  # consecutive actors that died before they took a part
    start_at: float | None = None  # start time of the next actor after such failures


@dataclass(eq=False)
class ActorHandle:
    """The driver's state of one actor."""

    name: str
    slot: Placement
    handle: Any
    late: bool = False  # it was started after the run began
    hello: ActorInfo | None = None
    opening: float | None = None  # time of the call that opens its stages
    opened: bool = False
    ready: bool = False  # it can take parts
    gone: bool = False
    awaiting_heartbeat: bool = False  # a heartbeat request is pending
    heartbeat_asked_at: float = 0.0  # time of the last request
    overdue: bool = False  # at the last poll
    checking: bool = False  # a canary check is pending
    heartbeat: Heartbeat | None = None
    began: float | None = None  # time of its first part
    parts: dict[int, int] = field(default_factory=dict)  # rows of its unfinished parts
    alone: bool = False  # it has a suspected part and no other
    rows_done: int = 0

    @property
    def kind(self) -> ActorGroup:
        assert self.hello
        return ActorGroup.of(self.hello.choice)

    @property
    def host(self) -> str:
        return self.hello.host if self.hello else "an actor"

    @property
    def pid(self) -> int:
        """Return the process id on the actor's host."""
        assert self.hello
        return self.hello.pid

    @property
    def in_progress(self) -> int:
        """Return the processed rows of its unfinished parts."""
        found = self.heartbeat.in_progress if self.heartbeat else {}
        return sum(sum(found[index].values()) for index in self.parts if index in found)

    @property
    def rows_held(self) -> int:
        """Return the number of its unprocessed rows."""
        return sum(self.parts.values()) - self.in_progress

    @property
    def rate(self) -> float | None:
        """Return the rows per second, None before the first ones."""
        rows = self.rows_done + self.in_progress
        return rows / (time.monotonic() - self.began) if self.began and rows else None


class ActorListener(Protocol):
    """Receives the events of actors."""

    def on_actor_started(self, actor: ActorHandle) -> None: ...

    def on_actor_lost(self, actor: ActorHandle, *, counts_as_failure: bool) -> None: ...


OnResult = Callable[[ActorHandle, Any], None]


class ActorPool:
    """The actors of a run. `handle_answers` handles their answers in the driver's only thread."""

    def __init__(self, settings: Settings, say: OnMessage, deadline: Deadline) -> None:
        self.settings, self.say, self._deadline = settings, say, deadline
        self.slots: list[Placement] = []
        self.actors: list[ActorHandle] = []  # those that are alive
        self.lost_actors: list[ActorHandle] = []  # those that ended
        self.refused: list[str] = []
        self.owner: ActorListener | None = None
        self.begun = False  # the run has begun: an unusable new actor doesn't end it
        self._waiting: dict[Any, tuple[ActorHandle, OnResult]] = {}
        self._stack = ExitStack()
        self._last_report = time.monotonic()

    def start_actors(self, bundle: Bundle) -> RunnerChoice:
        """Start the actors, wait for them and return the runner of the members (on a GPU if any).

        Raises UsageError when an actor can't run this bundle with the settings.
        """
        self._bundle = bundle
        cluster = self._stack.enter_context(connect_cluster(self.settings))
        self.ray = cluster.ray
        self._remote = self.ray.remote(concurrency_groups={PARTS_GROUP: MAX_PARTS_HELD, HEARTBEAT_GROUP: 1})(
            Actor
        )
        self.slots = [Placement(resources) for resources in plan_actors(cluster.nodes(), self.settings)]
        for slot in self.slots:
            self._start(slot)
        began = time.monotonic()
        while not all(actor.hello for actor in self.actors):
            found = [actor for actor in self.actors if actor.hello]
            if found and time.monotonic() - began > START_TIMEOUT_S:
                break
            if self._deadline.reached():
                raise Stopped(f"{self._deadline.why} before it began; the same command starts it")
            self.report_waiting()
            self.handle_answers(0.2)
        first = max(
            (actor for actor in self.actors if actor.hello), key=lambda actor: actor.slot.resources.gpu
        )
        assert first.hello
        choice = first.hello.choice
        gpus = sum(actor.slot.resources.gpu for actor in self.actors)
        words = [
            f"{count} on {what}s"
            for count, what in ((gpus, "GPU"), (len(self.actors) - gpus, "CPU"))
            if count
        ]
        hosts = f"{len(self.hosts)} machine{'s' * (len(self.hosts) > 1)}"
        return replace(choice, reason=f"{choice.reason}; Ray actors: {', '.join(words)}, {hosts}")

    @property
    def hosts(self) -> set[str]:
        return {actor.hello.host for actor in (*self.actors, *self.lost_actors) if actor.hello}

    @property
    def ready(self) -> list[ActorHandle]:
        return [actor for actor in self.actors if actor.ready]

    def report_waiting(self) -> None:
        """Report that the run waits for actors."""
        if not self.ready and time.monotonic() - self._last_report > REMIND_S:
            self._last_report = time.monotonic()
            self.say("waiting for the cluster to have room for an actor")

    def _start(self, slot: Placement) -> None:
        name = uuid.uuid4().hex[:12]
        resources = slot.resources
        settings = replace(
            self.settings, output=absolute(self.settings.output), bundle=self.settings.bundle.absolute()
        )
        options: dict[str, Any] = {"num_cpus": resources.workers, "max_restarts": 0}
        if resources.gpu:
            options["num_gpus"] = 1
        handle = self._remote.options(**options).remote(ActorConfig(name, settings, resources))
        actor = ActorHandle(name, slot, handle, late=self.begun)
        self.actors.append(actor)
        self.call(actor, "hello", then=self._on_hello)

    def call(
        self, actor: ActorHandle, method: str, *arguments: Any, then: OnResult, group: str | None = None
    ) -> None:
        """Call a method of an actor; `then` gets the answer, unless the actor has ended."""
        bound = getattr(actor.handle, method)
        if group:
            bound = bound.options(concurrency_group=group)
        self._waiting[bound.remote(*arguments)] = actor, then

    def handle_answers(self, wait_s: float) -> None:
        """Handle the answers that arrive within `wait_s`. Raises EngineError to end the run."""
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
            actor, then = self._waiting.pop(ref)
            if not actor.gone:
                self._handle(ref, actor, then)

    def _handle(self, ref: Any, actor: ActorHandle, then: OnResult) -> None:
        exceptions = self.ray.exceptions
        try:
            answer = self.ray.get(ref)
        except exceptions.RayTaskError as error:
            self._on_error(actor, error)
        except exceptions.RayError as error:
            self.replace_actor(actor, self._describe_error(error))
        else:
            then(actor, answer)

    def _describe_error(self, error: Any) -> str:
        """Return a short reason why an actor does not answer."""
        died = isinstance(error, self.ray.exceptions.RayActorError)
        if not died or error.actor_init_failed:
            return _last_line(error)
        return "its machine is gone" if "its node has died" in str(error) else "its process has died"

    def _on_error(self, actor: ActorHandle, error: Any) -> None:
        """Handle an exception that the actor's code raised."""
        cause = error.cause
        where = f"{actor.host}: " if len(self.hosts) > 1 else ""
        if isinstance(cause, Stopped):
            return
        if isinstance(cause, ParityError):
            self.refuse_actor(actor, str(cause))
        elif isinstance(cause, EngineError):
            self._dismiss_or_raise(actor, type(cause)(f"{where}{cause}"))
        elif actor.ready:  # for example a broken GPU
            self.replace_actor(actor, _last_line(error))
        else:
            raise RuntimeError(f"{where}{_last_line(error)}")

    def _dismiss_or_raise(self, actor: ActorHandle, error: EngineError) -> None:
        """Dismiss an actor that started late and is not ready; for any other actor raise `error`."""
        if actor.ready or not actor.late:
            raise error
        self.dismiss_actor(actor, str(error))

    def _on_hello(self, actor: ActorHandle, hello: ActorInfo) -> None:
        actor.hello = hello
        if problem := self._find_mismatch(hello):
            self._dismiss_or_raise(actor, UsageError(problem))
        elif self.owner:
            self.owner.on_actor_started(actor)

    def _find_mismatch(self, hello: ActorInfo) -> str | None:
        """Return why an actor's scores would differ from the others', None if they would not."""
        if hello.bundle_sha256 != self._bundle.sha256:
            return (
                f"bundle {self.settings.bundle}: another one on {hello.host}; give the same to all machines"
            )
        ours = {"engine": __version__, **library_versions()}
        for name in ours.keys() | hello.versions.keys():
            if ours.get(name) != hello.versions.get(name):
                return (
                    f"{hello.host} has {name} {hello.versions.get(name) or 'not'}, here is "
                    f"{ours.get(name) or 'none'}; install the same on every machine (constraints.txt)"
                )
        return None

    def replace_actor(self, actor: ActorHandle, why: str) -> None:
        """Kill an actor and start another in its place.

        Raises EngineError when too many consecutive actors die before they take a part.
        """
        if actor.gone:
            return
        slot = actor.slot
        slot.failures = 0 if actor.began else slot.failures + 1
        if actor.ready:
            self.say(f"an actor on {actor.host} ({actor.pid}) is lost, another takes its place: {why}")
        self._remove_actor(actor, counts_as_failure=True)
        if slot.failures < MAX_ACTOR_RESTARTS:
            self._start(slot)
            return
        hopeless = slot.failures >= MAX_TOTAL_RESTARTS or not any(
            one.began for one in (*self.actors, *self.lost_actors)
        )
        if hopeless and not self.ready:
            raise EngineError(f"no actor lives long enough to take a part: {why}")
        self.say(f"{slot.failures} actors have died before they took a part, the last since: {why}")
        slot.start_at = time.monotonic() + REMIND_S

    def refuse_actor(self, actor: ActorHandle, why: str) -> None:
        """Remove an actor with wrong scores, without replacement.

        Raises ParityError when no other is left.
        """
        self.refused.append(f"{actor.host}, {actor.kind.device}: {why}")
        self.say(f"an actor on {actor.host} ({actor.kind.device}) is refused: {why}")
        self._remove_actor(actor, counts_as_failure=False)
        if not self.actors:
            raise ParityError(f"no actor is left: {why}")

    def dismiss_actor(self, actor: ActorHandle, why: str) -> None:
        """Remove an unusable actor."""
        self.say(f"an actor on {actor.host} is not used: {why}")
        self._remove_actor(actor, counts_as_failure=False)
        if not self.actors:
            raise EngineError(f"no actor is left: {why}; run the same command again where there are others")

    def _remove_actor(self, actor: ActorHandle, *, counts_as_failure: bool) -> None:
        actor.gone, actor.ready = True, False
        self.actors.remove(actor)
        self.lost_actors.append(actor)
        self.ray.kill(actor.handle)
        if self.owner:
            self.owner.on_actor_lost(actor, counts_as_failure=counts_as_failure)

    def close(self) -> None:
        """End all actors, and Ray if it was started here."""
        for actor in self.actors:
            self.ray.kill(actor.handle)
        self.actors, self._waiting = [], {}
        self._stack.close()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
