"""What the driver decides, without Ray."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from engine.bundle import bundle as bundles
from engine.core.errors import EngineError, ParityError, UsageError
from engine.core.overlap import Meter
from engine.core.records import Batch, Part, Status
from engine.core.settings import Settings
from engine.core.tuning import Tuning
from engine.manifest.manifest import open_manifest
from engine.pipeline.stages import Stages
from engine.ray.actor import Actor, ActorConfig, RunSpec
from engine.ray.cluster import ActorResources, Node, connect_cluster, plan_actors
from engine.ray.driver import ActorLoad, others_finish_first
from engine.ray.part_queue import PartQueue
from engine.ray.poison_rows import PoisonRowSearch
from engine.runners.onnx import OnnxRunner
from engine.runs.run_folder import RunFolder
from engine.runs.run_record import RunRecord
from engine.scoring import canaries as scoring_canaries
from engine.scoring.canaries import CANARY_SHARE, Canaries, CanaryMonitor, verify_canaries
from engine.scoring.cpu import CpuScorer
from engine.sink.columns import ResultSchema
from tests.helpers.images import write_images
from tests.helpers.pixels import part_of
from tests.helpers.records import run_record


@pytest.mark.parametrize("recorded", ["[]", "{}", '{"a": 7}', '{"a": {}}', '{"a": {"rounds": "2"}}'])
def test_an_invalid_record_of_actors_is_named(tmp_path: Path, recorded: str) -> None:
    (tmp_path / "_actors.json").write_text(f'{{"run_id": "r", "actors": {recorded}}}')
    folder, run = RunFolder(tmp_path, overwrite=False), structs.replace(run_record(), run_id="r")
    if recorded == "{}":
        assert folder.actors(run) == {}
        return
    with pytest.raises(EngineError, match=r"_actors\.json: it can't be read .*; delete it and run again"):
        folder.actors(run)


@pytest.mark.slow
def test_joining_a_server_that_is_not_ray_fails_at_once() -> None:
    with socket.create_server(("", 0)) as server:

        def answer() -> None:
            with suppress(OSError):  # the server is shut down
                while True:
                    with server.accept()[0] as connection:
                        connection.recv(1000)
                        connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        settings = Settings(manifest=Path(), ray=f"localhost:{server.getsockname()[1]}")
        with (
            pytest.raises(UsageError, match="the server at this address is not Ray"),
            connect_cluster(settings),
        ):
            pass
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([Node(8, 0)], {}, [ActorResources(False, 8)]),
        ([Node(8, 0)], {"actors": 3}, [ActorResources(False, 2)] * 3),
        ([Node(2, 0)], {"actors": 4}, [ActorResources(False, 1)] * 4),
        ([Node(8, 0)], {"workers": 3}, [ActorResources(False, 3)] * 2),
        ([Node(0, 0), Node(4, 0), Node(8, 0)], {}, [ActorResources(False, 4)] * 3),
        ([Node(32, 4)], {}, [ActorResources(True, 8)] * 4),
        ([Node(32, 4)], {"device": "cpu"}, [ActorResources(False, 32)]),
        ([Node(32, 4), Node(16, 0)], {}, [ActorResources(True, 8)] * 4),
        (
            [Node(32, 4), Node(16, 0)],
            {"actors": 2},
            [ActorResources(True, 8)] * 4 + [ActorResources(False, 8)] * 2,
        ),
        ([Node(16, 2)], {"actors": 1}, [ActorResources(True, 4)] * 2 + [ActorResources(False, 8)]),
    ],
)
def test_planned_actors_use_all_resources(
    nodes: list[Node], options: dict, expected: list[ActorResources]
) -> None:
    assert plan_actors(nodes, Settings(manifest=Path("m"), **options)) == expected


def test_a_slow_actor_gets_no_part_that_faster_actors_finish_first() -> None:
    fast, slow = ActorLoad(0, 100.0), ActorLoad(0, 1.0)
    assert others_finish_first(100, slow, [fast], left=100)
    assert not others_finish_first(100, slow, [fast], left=100_000)  # it helps
    assert not others_finish_first(100, fast, [slow, fast], left=100)
    assert not others_finish_first(100, ActorLoad(0, None), [fast], left=100)  # its rate is unknown
    assert not others_finish_first(100, slow, [ActorLoad(0, None)], left=100)
    assert others_finish_first(100, ActorLoad(1000, 1.0), [replace(slow, rows=500)], left=100)


def take_parts(part_queue: PartQueue, count: int) -> list[int]:
    indices: list[int] = []
    deadline = time.monotonic() + 10
    while len(indices) < count and time.monotonic() < deadline:
        if part := part_queue.peek():
            part_queue.take()
            indices.append(part.index)
    return indices


def test_lost_parts_are_queued_again_and_few_parts_are_held() -> None:
    read: list[int] = []

    def parts_of(wanted: set[int]) -> Iterator[Part]:
        for index in sorted(wanted):
            read.append(index)
            yield part_of(["0"], index)

    part_queue = PartQueue(parts_of, set(range(100)))
    assert part_queue.left == 100
    assert take_parts(part_queue, 3) == [0, 1, 2]
    assert len(read) < 10
    part_queue.put_back(1)
    assert take_parts(part_queue, 98) == [*range(3, 100), 1]
    time.sleep(0.05)
    assert part_queue.peek() is None
    assert part_queue.left == 0
    part_queue.put_back(7)
    assert take_parts(part_queue, 1) == [7]


def test_an_error_of_the_manifest_is_raised() -> None:
    def parts_of(wanted: set[int]) -> Iterator[Part]:
        yield part_of(["0"])
        raise OSError("gone")

    part_queue = PartQueue(parts_of, {0, 1})
    assert take_parts(part_queue, 1) == [0]
    with pytest.raises(OSError, match="gone"):
        take_parts(part_queue, 1)


class RecordingPool:
    """A pool that only records the last call."""

    ray = property(lambda self: self)

    def put(self, part: Part) -> Part:
        return part

    def call(self, actor, method, part, start, stop, then) -> None:
        self.last = (start, stop, lambda: then(actor, None))


@pytest.mark.parametrize("deadly", [set(), {0}, {13}, {9, 10, 40}])
def test_the_search_finds_the_poison_rows(deadly: set[int]) -> None:
    pool, deaths = RecordingPool(), 0
    search = PoisonRowSearch(pool, part_of([None] * 41), 8)
    while not search.is_done:
        if search.actor is None:
            search.probe_next("actor")
        start, stop, succeed = pool.last
        if deadly & set(range(start, stop)):
            search.on_actor_lost()
            deaths += 1
        else:
            succeed()
    assert search.crashed == deadly
    assert deaths <= 3 * len(deadly)


def blank_batches(count: int, rows: int, size: tuple[int, int]) -> Iterator[Batch]:
    part = part_of([None] * (count * rows))
    for start in range(0, count * rows, rows):
        zeros = np.zeros(rows, np.int32)
        batch = Batch(part, start, np.zeros(rows, np.uint8), zeros, zeros, index=np.arange(rows))
        batch.pixels = np.zeros((rows, 1, *size), np.uint8)
        yield batch


def test_the_canary_monitor_scores_canaries_and_passes_on_only_images(bundle: Path) -> None:
    models = bundles.load_bundle(bundle)
    runners = [OnnxRunner(member, models) for member in models.members]
    step, canaries = CpuScorer(models, runners, threads=2), Canaries.of(models)
    assert verify_canaries(canaries, step, 8) < 1e-5
    monitor = CanaryMonitor(step, canaries, 8)
    monitor.check()
    per_round = int(canaries.rows / CANARY_SHARE) // 80
    passed: list[int] = []
    monitor.on_round_passed = passed.append
    batches = list(monitor.stage(blank_batches(3 * per_round + 1, 80, models.size), Meter("members")))
    assert [batch.start for batch in batches] == [80 * number for number in range(3 * per_round + 1)]
    assert passed == [2, 3, 4]

    def add_error(pixels, logits, stream):
        OnnxRunner.enqueue(runners[0], pixels, logits, stream)
        logits += np.array([1, 0, 0], np.float32)

    runners[0].enqueue = add_error
    with pytest.raises(ParityError, match="differ during the run from their reference"):
        list(monitor.stage(blank_batches(per_round + 1, 80, models.size), Meter("members")))
    step.close()


@pytest.fixture
def opened(tmp_path: Path, bundle: Path):
    """An actor in this process, and the RunSpec that it opens."""
    images = write_images(tmp_path / "images", 8)
    settings = Settings(manifest=images, bundle=bundle, output=tmp_path / "out")
    settings.output.mkdir()
    actor = Actor(ActorConfig("one", settings, ActorResources(False, 1)))
    info = actor.load_bundle()
    models = bundles.load_bundle(bundle)
    manifest = open_manifest(images, listing=tmp_path / "listing.parquet")
    run = RunRecord.create(settings, None, manifest, models, info.choice)
    schema = ResultSchema.of(models, manifest, settings)
    spec = RunSpec(8, 3, run.rows, Tuning(), schema, manifest.root, False, Stages, None, (), None)
    yield actor, spec, manifest, run
    actor._resources.close()


def test_an_actor_holds_several_parts_and_writes_each(opened) -> None:
    actor, spec, manifest, run = opened
    actor.open(spec)
    actor.begin(run.to_metadata())
    done, threads = {}, []
    for part in manifest.parts(3):
        part.crashed = frozenset({1}) if part.index == 1 else frozenset()

        def score(part: Part = part) -> None:
            done[part.index] = actor.score_part(part)

        threads.append(threading.Thread(target=score))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert {index: part.rows for index, part in done.items()} == {0: 3, 1: 3, 2: 2}
    assert done[1].by_status == {"ok": 2, Status.CRASHED.label: 1}
    assert {part.by.round for part in done.values()} == {1}
    heartbeat = actor.check()
    assert (heartbeat.rounds, heartbeat.idle_s, heartbeat.in_progress) == (2, 0.0, {})
    actor.probe(next(manifest.parts(8)), 2, 5)


def test_int8_canaries_are_compared_with_the_first_actor(opened, bundle: Path) -> None:
    actor, spec, *_ = opened
    actor._choice = replace(actor._choice, precision="int8")
    expected = actor.open(spec).expected
    _, float32 = scoring_canaries.load_canaries(bundles.load_bundle(bundle))
    assert np.abs(expected - float32).max() < 1e-5
    with pytest.raises(ParityError, match="differ"):
        actor.open(replace(spec, expected=expected + np.float32(0.01)))


def test_an_actor_with_another_results_folder_is_refused(opened, tmp_path: Path) -> None:
    actor, spec, manifest, _ = opened
    with pytest.raises(UsageError, match="not the same folder on every machine"):
        actor.open(replace(spec, token=("token", "mine")))
    with pytest.raises(EngineError, match="not the same folder"):  # later calls fail with the same error
        actor.score_part(next(manifest.parts(8)))


def test_an_actor_that_cannot_read_the_images_is_refused(opened, tmp_path: Path) -> None:
    actor, spec, *_ = opened
    with pytest.raises(UsageError, match=r"nowhere\.png exists on the driver's machine"):
        actor.open(replace(spec, checked_files=(str(tmp_path / "nowhere.png"),)))
