"""Start or join Ray, plan actors for its resources and keep its messages out of the log."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.core import hardware
from engine.core.errors import UsageError
from engine.core.extras import install_command
from engine.core.hardware import available_cpus
from engine.core.settings import Settings

CONNECT_TIMEOUT_S = 5.0
SHUTDOWN_S = 20.0
CHECK_S = 60.0  # for a process that imports Ray and asks for the cluster
CHECK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
STORE_BYTES = 256 << 20  # of a Ray started here: it only holds the paths of a few parts


@dataclass(frozen=True)
class Node:
    """The resources of a machine of the cluster."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class ActorResources:
    """The resources of one actor: a GPU or none, and CPU threads."""

    gpu: bool
    workers: int

    def __str__(self) -> str:
        threads = f"{self.workers} CPU thread{'s' * (self.workers > 1)}"
        return f"a GPU and {threads}" if self.gpu else threads


def import_ray() -> Any:
    """Return the module `ray`. Raises UsageError when it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"--ray and --device cuda:all need Ray, which can't be imported ({error}); install it with: "
            + install_command("ray")
        ) from None
    return ray


def plan_actors(nodes: Sequence[Node], settings: Settings) -> list[ActorResources]:
    """Plan one actor for each GPU and `settings.actors` on CPUs; without a GPU, as many as fit.

    Without `settings.workers` the actors use all CPUs of their machines.
    """
    gpus = 0 if settings.device == "cpu" else sum(node.gpus for node in nodes)
    shared = settings.actors and gpus and all(node.gpus for node in nodes)
    actors: list[ActorResources] = []
    if gpus:
        threads = min(node.cpus // node.gpus for node in nodes if node.gpus)
        actors = [
            ActorResources(True, settings.workers or max(1, threads // 2 if shared else threads))
        ] * gpus
        if not settings.actors:
            return actors
    free = [
        node.cpus - node.gpus * actors[0].workers if shared else node.cpus
        for node in nodes
        if shared or not (gpus and node.gpus)
    ]
    workers = settings.workers or _threads_per_actor(free, settings.actors)
    fitting = sum(max(0, cpus) // workers for cpus in free)
    return actors + [ActorResources(False, workers)] * (settings.actors or max(1, fitting))


def _threads_per_actor(cpus: Sequence[int], actors: int | None) -> int:
    """Return the most threads with which `actors` fit; without a number, those of the smallest machine."""
    if not actors:
        return max(1, min((count for count in cpus if count > 0), default=1))
    most = max([1, *cpus])
    return next((size for size in range(most, 0, -1) if sum(count // size for count in cpus) >= actors), 1)


def local_node() -> Node:
    """Return the resources of this machine."""
    gpus = 0
    if hardware.has_gpu():
        import torch

        gpus = torch.cuda.device_count()
    return Node(available_cpus(), gpus)


def describe_actors(settings: Settings) -> str:
    """Describe the actors of these settings. Raises UsageError when Ray is missing or none fits."""
    version = import_ray().__version__
    if settings.ray == "local":
        placements, where = plan_actors([local_node()], settings), "a local Ray on this machine"
    else:
        with connect_cluster(settings) as cluster:
            nodes = cluster.nodes()
        placements, where = (
            plan_actors(nodes, settings),
            f"the Ray cluster of {len(nodes)} nodes at {settings.ray}",
        )
    counts = [f"{placements.count(kind)} with {kind}" for kind in dict.fromkeys(placements)]
    return f"{version}: {where}; actors: {', '.join(counts)}"


class Cluster:
    """The Ray cluster that this process is connected to."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    def nodes(self) -> list[Node]:
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [Node(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in resources]


@contextmanager
def connect_cluster(settings: Settings) -> Iterator[Cluster]:
    """Start or join Ray; a Ray started here ends with this context. Raises UsageError when it fails.

    An existing connection of this process is used and left open.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield Cluster(ray)
        return
    _silence_ray()
    scratch = None
    try:
        with _keep_signal_handlers():
            if settings.ray == "local":
                scratch = tempfile.mkdtemp(prefix="engine-ray-", dir="/tmp")  # sockets need a short path
                _start(ray, settings, scratch)
            else:
                _join(ray, str(settings.ray))
        yield Cluster(ray)
    finally:
        _disconnect(ray, scratch)
        for _ in range(5 if scratch else 0):  # Ray's processes write files until they end
            shutil.rmtree(str(scratch), ignore_errors=True)
            if not os.path.exists(str(scratch)):
                break
            time.sleep(0.2)


def _disconnect(ray: Any, scratch: str | None) -> None:
    """Disconnect; kill a Ray started here that does not end in time."""
    shutdown = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    shutdown.start()
    shutdown.join(SHUTDOWN_S)
    if not (shutdown.is_alive() and scratch):
        return
    from ray._private import worker

    if worker._global_node:  # processes started by `ray.init`; workers end with them
        worker._global_node.kill_all_processes(check_alive=False)
    shutdown.join(SHUTDOWN_S)


def _start(ray: Any, settings: Settings, scratch: str) -> None:
    machine = local_node()
    placements = plan_actors([machine], settings)
    ray.init(
        address="local",
        # may exceed the real number when the user sets more: Ray only uses it to place actors
        num_cpus=max(machine.cpus, sum(actor.workers for actor in placements)),
        num_gpus=machine.gpus,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=False,
        _temp_dir=scratch,
    )


def _join(ray: Any, address: str) -> None:
    from ray._private.services import canonicalize_bootstrap_address

    try:
        host_port = canonicalize_bootstrap_address(address) or "nowhere:0"
        _check(host_port)
        ray.init(address=host_port, configure_logging=False, log_to_driver=False)
    except Exception as error:  # Ray raises many types
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--ray {address}: can't join a cluster at this address ({reason}); allowed: the address "
            "HOST:PORT that `ray start` has printed, or auto, on a machine of the cluster"
        ) from None


def _check(address: str) -> None:
    """Raise OSError when no Ray answers at `address`.

    Ray's client runs in a separate process: it can't be interrupted, and it writes to standard error.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    environment = os.environ | {"RAY_py_gcs_connect_timeout_s": f"{CONNECT_TIMEOUT_S:.0f}"}
    check = [sys.executable, "-c", CHECK, address]
    try:
        subprocess.run(check, env=environment, capture_output=True, timeout=CHECK_S, check=True)
    except subprocess.SubprocessError:
        raise ConnectionError("the server at this address is not Ray") from None


def _silence_ray() -> None:
    """Disable Ray's messages about single processes; the engine reports the relevant ones itself."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage report is sent
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    from ray._private import worker

    worker._worker_logs_enabled = False  # prints on the death of any worker, whatever `log_to_driver` is


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers of the run, because Ray replaces that of SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
