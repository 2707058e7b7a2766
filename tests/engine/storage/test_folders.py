"""Locks, claims and turns of processes that write into one folder: on a disk and in an object store."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.core.location import Url
from engine.runs.run_folder import RunFolder
from engine.storage import errors
from engine.storage.folders import StoreError
from engine.storage.local_folder import LocalFolder
from engine.storage.locks import NumberedLocks, lock_file
from engine.storage.object_folder import ObjectFolder
from tests.helpers.runs import (
    keys,
)
from tests.helpers.servers import Proxy


def test_locks_on_a_disk(tmp_path: Path) -> None:
    first, second = (NumberedLocks(tmp_path / "locks") for _ in range(2))
    assert first.acquire(3)
    assert not second.acquire(3)
    assert second.acquire(4)
    assert second.is_locked(3)
    assert not second.is_locked(4)
    first.close()
    assert second.acquire(3)
    second.close()

    shards = [LocalFolder(tmp_path / "out") for _ in range(2)]
    for folder in shards:
        folder.lock(shared=True)
    with pytest.raises(BlockingIOError):
        lock_file(tmp_path / "out" / ".lock")
    shards[0].unlock(remove_created=True)
    assert (tmp_path / "out" / ".lock").exists(), "the other is still there"
    shards[1].unlock(remove_created=True)
    assert not (tmp_path / "out" / ".lock").exists()


@pytest.mark.slow
def test_the_lock_in_an_object_store_is_held_by_one_process(proxy: Any, client: Any) -> None:
    """Five that want it at once, over and over; none is ever inside with another."""
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def come_and_go(number: int) -> None:
        nonlocal inside, most, entered
        folder = ObjectFolder(Url("s3", "archive", "/turns"))
        folder.lock(shared=True)
        for _ in range(3):
            while not folder.acquire_run_lock():
                time.sleep(0.002)
            with guard:
                inside, entered = inside + 1, entered + 1
                most = max(most, inside)
            time.sleep(0.005)
            with guard:
                inside -= 1
            folder.release_run_lock()
        folder.unlock(remove_created=False)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(come_and_go, range(5)))
    assert (most, entered) == (1, 15)
    assert keys(client, "turns/") == []


def test_a_lock_waits_for_processes_that_draw_a_ticket(
    proxy: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (ObjectFolder(Url("s3", "archive", "/drawing")) for _ in range(2))
    for folder in (one, two):
        folder.lock(shared=True)
    tickets, meanwhile = one._tickets, list[bool]()

    def interrupted() -> dict[str, int]:
        result = tickets()
        if not meanwhile:
            meanwhile.append(two.acquire_run_lock())
        return result

    monkeypatch.setattr(one, "_tickets", interrupted)
    got = [one.acquire_run_lock(), two.acquire_run_lock()]
    assert meanwhile == [False]
    assert sorted(got) == [False, True]
    winner, loser = (one, two) if got[0] else (two, one)
    winner.release_run_lock()
    assert loser.acquire_run_lock()
    assert not winner.acquire_run_lock()
    for folder in (one, two):
        folder.unlock(remove_created=False)


def test_a_shared_lock_excludes_an_exclusive_lock(
    proxy: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, alone = (ObjectFolder(Url("s3", "archive", "/shared")) for _ in range(3))
    one.lock(shared=True)
    two.lock(shared=True)
    with pytest.raises(BlockingIOError):
        alone.lock()
    assert one.claim(7)
    assert not two.claim(7)
    assert two.is_claimed(7)
    assert not one.is_claimed(7)
    one.release(7)
    assert two.claim(7)
    one.unlock(remove_created=False)
    monkeypatch.setattr("engine.storage.object_folder.LEASE_S", -1.0)  # as if `two` had been silent for long
    alone.lock()
    assert not alone.is_claimed(7)
    monkeypatch.undo()
    with pytest.raises(BlockingIOError):
        one.lock(shared=True)
    for folder in (alone, two):
        folder.unlock(remove_created=False)
    assert keys(client, "shared/") == []


def test_leftovers_of_killed_writers_are_deleted(
    proxy: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, living = (ObjectFolder(Url("s3", "archive", "/swept")) for _ in range(2))
    dead.lock(shared=True)
    assert dead.claim(1)
    monkeypatch.setattr(
        "engine.storage.object_folder._process_start", lambda pid: "later"
    )  # its process is gone, another has its number
    living.lock(shared=True)
    assert not living.is_claimed(1)
    assert living.claim(2)
    living.delete_leftovers()
    mine, claim = sorted(keys(client, "swept/"))
    assert (mine[:6], claim) == (".lock-", ".part-00002.lock")
    for folder in (living, dead):
        folder.unlock(remove_created=False)
    assert keys(client, "swept/") == []


def test_a_killed_process_on_another_machine_is_detected(
    proxy: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    position = Url("s3", "archive", "/elsewhere")
    dead, alone, living = (
        ObjectFolder(position),
        ObjectFolder(position),
        RunFolder(position, overwrite=False, shared=True),
    )
    dead.lock(shared=True)
    assert dead.claim(1)
    assert dead._lease
    dead._lease.stop_renewing()
    monkeypatch.setattr("engine.storage.object_folder._boot_id", lambda: "another")
    for module in ("storage.object_folder", "runs.run_folder"):
        monkeypatch.setattr(f"engine.{module}.LEASE_S", 2.5)
    with living:
        assert not living.files.claim(1)
        assert living.claimed({1, 2}) == set()
        assert living.files.claim(1)
        monkeypatch.setattr("engine.storage.object_folder.LEASE_S", 90.0)
        again = alone._refuse_other_holders  # as if the other came between the first look and the second
        monkeypatch.setattr(
            alone, "_refuse_other_holders", lambda *_, **except_for: except_for and again(*_, **except_for)
        )
        with pytest.raises(BlockingIOError):
            alone.lock()
        assert ".lock" not in keys(client, "elsewhere/")
    dead.unlock(remove_created=False)


@pytest.mark.parametrize("size", [1000, 12_000_000])
@pytest.mark.parametrize("broken", ["POST", "PUT"])
def test_a_failed_upload_keeps_the_old_object(
    proxy: Proxy, client: Any, monkeypatch: pytest.MonkeyPatch, size: int, broken: str
) -> None:
    monkeypatch.setattr(errors, "BACKOFF_S", 0.01)
    folder = ObjectFolder(Url("s3", "archive", f"/upload-{size}-{broken}"))
    folder.write("x", lambda path: path.write_bytes(b"old"))
    calls = iter(range(1000))
    # of the requests that a large upload makes, one in two: some pieces arrive, it is never whole
    proxy.refuse = lambda method, path: (500, {}, b"") if method == broken and next(calls) % 2 == 0 else None
    if broken == "PUT" and size < 10_000_000:
        proxy.refuse = lambda method, path: (500, {}, b"") if method == "PUT" else None
    with pytest.raises(StoreError, match="the storage fails"):
        folder.write("x", lambda path: path.write_bytes(bytes(size)))
    proxy.refuse = lambda method, path: None
    assert folder.read("x", lambda opened: opened.read()) == b"old"


def test_the_lock_of_a_dead_or_silent_process_is_ignored(
    proxy: Proxy, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = (ObjectFolder(Url("s3", "archive", "/locked")) for _ in range(2))
    folder.lock()
    with pytest.raises(BlockingIOError):
        other.lock()
    monkeypatch.setattr("engine.storage.object_folder.LEASE_S", -1.0)
    other.lock()
    other.unlock(remove_created=True)
    folder.unlock(remove_created=True)
    assert keys(client, "locked/") == []
