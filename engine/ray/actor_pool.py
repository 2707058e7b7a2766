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
    placement: Placement
    handle: Any
    late: bool = False  # it was started after the run began
    info: ActorInfo | None = None
    opening_since: float | None = None  # time of the call that opens its stages
    opened: bool = False
    ready: bool = False  # it can take parts
    ended: bool = False
    awaiting_heartbeat: bool = False  # a heartbeat request is pending
    heartbeat_asked_at: float = 0.0  # time of the last request
    overdue: bool = False  # at the last poll
    checking: bool = False  # a canary check is pending
    heartbeat: Heartbeat | None = None
    began: float | None = None  # time of its first part
    parts: dict[int, int] = field(default_factory=dict)  # rows of its unfinished parts
    exclusive: bool = False  # it has a suspected part and no other
    rows_done: int = 0

    @property
    def group(self) -> ActorGroup:
        assert self.info
        return ActorGroup.of(self.info.choice)

    @property
    def host(self) -> str:
        return self.info.host if self.info else "an actor"

    @property
    def pid(self) -> int:
        """Return the process id on the actor's host."""
        assert self.info
        return self.info.pid

    @property
    def in_progress(self) -> int:
        """Return the processed rows of its unfinished parts."""
        rows = self.heartbeat.in_progress if self.heartbeat else {}
        return sum(sum(rows[index].values()) for index in self.parts if index in rows)

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
        self.placements: list[Placement] = []
        self.actors: list[ActorHandle] = []  # those that are alive
        self.lost_actors: list[ActorHandle] = []  # those that ended
        self.refused: list[str] = []
        self.listener: ActorListener | None = None
        self.run_began = False  # the run has begun: an unusable new actor doesn't end it
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
        self.placements = [Placement(resources) for resources in plan_actors(cluster.nodes(), self.settings)]
        for placement in self.placements:
            self._start(placement)
        began = time.monotonic()
        while not all(actor.info for actor in self.actors):
            loaded = [actor for actor in self.actors if actor.info]
            if loaded and time.monotonic() - began > START_TIMEOUT_S:
                break
            if self._deadline.reached():
                raise Stopped(
                    f"{self._deadline.why} before the run began; run the same command again to start it"
                )
            self.report_waiting()
            self.handle_answers(0.2)
        first = max(
            (actor for actor in self.actors if actor.info), key=lambda actor: actor.placement.resources.gpu
        )
        assert first.info
        choice = first.info.choice
        gpus = sum(actor.placement.resources.gpu for actor in self.actors)
        counts = [
            f"{count} on {device}s"
            for count, device in ((gpus, "GPU"), (len(self.actors) - gpus, "CPU"))
            if count
        ]
        hosts = f"{len(self.hosts)} machine{'s' * (len(self.hosts) > 1)}"
        return replace(choice, reason=f"{choice.reason}; Ray actors: {', '.join(counts)}, {hosts}")

    @property
    def hosts(self) -> set[str]:
        return {actor.info.host for actor in (*self.actors, *self.lost_actors) if actor.info}

    @property
    def ready(self) -> list[ActorHandle]:
        return [actor for actor in self.actors if actor.ready]

    def report_waiting(self) -> None:
        """Report that the run waits for actors."""
        if not self.ready and time.monotonic() - self._last_report > REMIND_S:
            self._last_report = time.monotonic()
            self.say("waiting until the cluster has free resources for an actor")

    def _start(self, placement: Placement) -> None:
        name = uuid.uuid4().hex[:12]
        resources = placement.resources
        settings = replace(
            self.settings, output=absolute(self.settings.output), bundle=self.settings.bundle.absolute()
        )
        options: dict[str, Any] = {"num_cpus": resources.workers, "max_restarts": 0}
        if resources.gpu:
            options["num_gpus"] = 1
        handle = self._remote.options(**options).remote(ActorConfig(name, settings, resources))
        actor = ActorHandle(name, placement, handle, late=self.run_began)
        self.actors.append(actor)
        self.call(actor, "load_bundle", then=self._on_info)

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
        for placement in self.placements:
            if placement.start_at and time.monotonic() > placement.start_at:
                placement.start_at = None
                self._start(placement)
        if not self._waiting:
            time.sleep(wait_s)
            return
        ready, rest = self.ray.wait(list(self._waiting), num_returns=1, timeout=wait_s, fetch_local=False)
        if ready and rest:
            ready += self.ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        for ref in ready:
            actor, then = self._waiting.pop(ref)
            if not actor.ended:
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
        return "its machine left the cluster" if "its node has died" in str(error) else "its process ended"

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

    def _on_info(self, actor: ActorHandle, info: ActorInfo) -> None:
        actor.info = info
        if problem := self._find_mismatch(info):
            self._dismiss_or_raise(actor, UsageError(problem))
        elif self.listener:
            self.listener.on_actor_started(actor)

    def _find_mismatch(self, info: ActorInfo) -> str | None:
        """Return why an actor's scores would differ from the others', None if they would not."""
        if info.bundle_sha256 != self._bundle.sha256:
            return (
                f"bundle {self.settings.bundle}: {info.host} has another one; copy this one to all machines"
            )
        own = {"engine": __version__, **library_versions()}
        for name in own.keys() | info.versions.keys():
            if own.get(name) != info.versions.get(name):
                return (
                    f"{info.host} has {name} {info.versions.get(name) or '(missing)'}, this machine has "
                    f"{own.get(name) or '(missing)'}; install the same version everywhere (constraints.txt)"
                )
        return None

    def replace_actor(self, actor: ActorHandle, why: str) -> None:
        """Kill an actor and start another in its place.

        Raises EngineError when too many consecutive actors die before they take a part.
        """
        if actor.ended:
            return
        placement = actor.placement
        placement.failures = 0 if actor.began else placement.failures + 1
        if actor.ready:
            self.say(f"an actor on {actor.host} ({actor.pid}) was lost and is replaced: {why}")
        self._remove_actor(actor, counts_as_failure=True)
        if placement.failures < MAX_ACTOR_RESTARTS:
            self._start(placement)
            return
        is_hopeless = placement.failures >= MAX_TOTAL_RESTARTS or not any(
            other.began for other in (*self.actors, *self.lost_actors)
        )
        if is_hopeless and not self.ready:
            raise EngineError(f"every actor ended before it took a part: {why}")
        self.say(f"{placement.failures} actors in a row ended before they took a part, the last one: {why}")
        placement.start_at = time.monotonic() + REMIND_S

    def refuse_actor(self, actor: ActorHandle, why: str) -> None:
        """Remove an actor with wrong scores, without replacement.

        Raises ParityError when no other is left.
        """
        self.refused.append(f"{actor.host}, {actor.group.device}: {why}")
        self.say(f"an actor on {actor.host} ({actor.group.device}) is refused: {why}")
        self._remove_actor(actor, counts_as_failure=False)
        if not self.actors:
            raise ParityError(f"no actor is left: {why}")

    def dismiss_actor(self, actor: ActorHandle, why: str) -> None:
        """Remove an unusable actor."""
        self.say(f"an actor on {actor.host} is not used: {why}")
        self._remove_actor(actor, counts_as_failure=False)
        if not self.actors:
            raise EngineError(
                f"no actor is left: {why}; run the same command again on a cluster with suitable machines"
            )

    def _remove_actor(self, actor: ActorHandle, *, counts_as_failure: bool) -> None:
        actor.ended, actor.ready = True, False
        self.actors.remove(actor)
        self.lost_actors.append(actor)
        self.ray.kill(actor.handle)
        if self.listener:
            self.listener.on_actor_lost(actor, counts_as_failure=counts_as_failure)

    def close(self) -> None:
        """End all actors, and Ray if it was started here."""
        for actor in self.actors:
            self.ray.kill(actor.handle)
        self.actors, self._waiting = [], {}
        self._stack.close()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
