"""Shards of one run in processes of their own: side by side, twice at once, killed, refused."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.core.json_records import to_json
from engine.errors import UsageError
from engine.lock import NumberedLocks, hold
from engine.run_folder import RunFolder
from engine.storage.location import Url
from engine.store import LocalFolder, ObjectFolder
from tests.helpers.images import write_images
from tests.helpers.processes import Command, run_module
from tests.helpers.records import run_record
from tests.system.test_interruptions import Start, list_images, parts, start, table, wait_for_parts
from tests.system.test_object_store_runs import client, images, keys, moto, names, proxy, stored_rows
from tests.system.test_object_store_runs import csv as as_csv
from tests.system.test_object_store_runs import local as local_rows

__all__ = ["client", "images", "local_rows", "moto", "names", "proxy", "start"]  # fixtures

ROWS, PART_ROWS = 2000, 16


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> pa.Table:
    """The rows of the plain run of `list_images(..., ROWS)`."""
    folder = tmp_path_factory.mktemp("plain")
    list_images(folder, ROWS)
    arguments = ["m.txt", "-b", bundle, "-o", "out", "--part-rows", str(PART_ROWS)]
    run = run_module("engine.run", arguments, folder=folder, timeout_s=60)
    assert run.returncode == 0, run.stderr
    return table(folder / "out")


def ended(process: subprocess.Popen[str]) -> str:
    """What it said on standard error."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def told(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Its messages as JSON lines, and how many rows it has done itself."""
    events = [json.loads(line) for line in ended(process).splitlines()]
    messages = [event["message"] for event in events if event["event"] == "message"]
    return "\n".join(messages), next(one["last_start"]["rows"] for one in events if one["event"] == "summary")


def shard(start: Start, which: str, *options: str) -> subprocess.Popen[str]:
    return start("m.txt", "-o", "out", "--part-rows", str(PART_ROWS), "--shard", which, *options)


def only_one_run_is_left(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()} - {path.name for path in parts(folder)}
    return names == {"_run.json", "_SUCCESS", "report.html", ".lock", ".locks"}


def test_three_shards_at_once_give_the_plain_runs_rows(start: Start, tmp_path: Path, whole: pa.Table) -> None:
    list_images(tmp_path, ROWS)
    said = [ended(one) for one in [shard(start, f"{number}/3") for number in (1, 2, 3)]]
    output = tmp_path / "out"
    assert table(output).equals(whole)
    assert only_one_run_is_left(output)
    assert sum(f"and with it all {len(parts(output))} parts" in one for one in said) >= 1
    success = json.loads((output / "_SUCCESS").read_text())
    assert success["rows"] == ROWS
    assert sum(worker["rows"] for worker in success["scored_by"]) == ROWS
    run = json.loads((output / "_run.json").read_text())
    assert run["run_id"] == success["run_id"]
    assert run["result_options"]["shards"] == 3
    assert run["result_options"]["device"] == "cpu"
    assert "is finished already" in ended(shard(start, "2/3"))


def test_whoever_is_last_writes_success_and_others_say_what_is_left(
    start: Start, tmp_path: Path, whole: pa.Table
) -> None:
    list_images(tmp_path, ROWS)
    output = tmp_path / "out"
    total = -(-ROWS // PART_ROWS)
    for number, done in ((3, total // 3), (1, total // 3 + (total + 2) // 3), (2, total)):
        assert not (output / "_SUCCESS").exists()
        said = ended(shard(start, f"{number}/3"))
        own = len(range(number - 1, total, 3))
        line = (
            f"shard {number}/3 is done: {own} of {total} parts; {done} of {total} parts of the run are there"
        )
        assert (line in said) == (number != 2), said
    assert f"shard 2/3 is done, and with it all {total} parts of the run" in said
    assert table(output).equals(whole)

    (output / "part-00004.parquet").unlink()  # of shard 2
    changed = (output / "_SUCCESS").stat().st_mtime_ns
    ended(shard(start, "2/3"))
    assert (output / "_SUCCESS").stat().st_mtime_ns != changed
    assert table(output).equals(whole)


def test_the_same_shard_twice_at_once_does_each_part_once(
    start: Start, tmp_path: Path, whole: pa.Table
) -> None:
    list_images(tmp_path, ROWS)
    output = tmp_path / "out"
    first = shard(start, "1/2", "--log-json")
    wait_for_parts(first, output, 2)
    first.send_signal(signal.SIGSTOP)  # with some parts in hand
    second = shard(start, "1/2", "--log-json")
    messages, rows = told(second)
    assert re.search(r"shard 1/2 leaves \d+ of its 63 parts to another process", messages), messages
    first.send_signal(signal.SIGCONT)
    done = [rows, told(first)[1]]
    own = sum(min(PART_ROWS, ROWS - at) for at in range(0, ROWS, 2 * PART_ROWS))
    assert sum(done) == own, done
    assert len(parts(output)) == len(range(0, -(-ROWS // PART_ROWS), 2))
    assert not (output / "_SUCCESS").exists()
    ended(shard(start, "2/2"))
    assert table(output).equals(whole)


def test_killed_shards_are_started_again(start: Start, tmp_path: Path, whole: pa.Table) -> None:
    list_images(tmp_path, ROWS)
    output, rng = tmp_path / "out", random.Random(5)
    running = {number: shard(start, f"{number}/3") for number in (1, 2, 3)}
    for kill in range(4):
        wait_for_parts(running[1 + kill % 3], output, 15 * (kill + 1))
        victim = running[1 + kill % 3]
        time.sleep(rng.uniform(0, 0.05))
        victim.kill()
        victim.wait()
        running[1 + kill % 3] = shard(start, f"{1 + kill % 3}/3")
    for process in running.values():
        ended(process)
    assert table(output).equals(whole)
    assert only_one_run_is_left(output)


def test_other_plans_are_refused(start: Start, engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    list_images(tmp_path, ROWS)
    output = ("-o", "out", "--part-rows", PART_ROWS, "-b", bundle)

    def refused(*options: str, output: tuple[object, ...] = output) -> str:
        run = engine_run("m.txt", *output, *options)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        return run.stderr

    process = shard(start, "1/3")
    wait_for_parts(process, tmp_path / "out", 2)
    process.send_signal(signal.SIGSTOP)
    other_plan = "cut into 3 shards (--shard K/3), this one is"
    assert f"{other_plan} cut into 4 shards" in refused("--shard", "2/4")
    assert "another process is writing there" in refused()
    process.terminate()
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5, said
    own = sum(min(PART_ROWS, ROWS - first) for first in range(0, ROWS, 3 * PART_ROWS))
    assert f" of {own} rows were through" in said
    assert f"{other_plan} not cut into shards" in refused()

    plain = start("m.txt", "-o", "plain", "--part-rows", str(PART_ROWS))
    wait_for_parts(plain, tmp_path / "plain", 1)
    plain.send_signal(signal.SIGSTOP)
    said = refused("--shard", "1/3", output=("-o", "plain", "-b", bundle))
    assert "another process is writing there without --shard" in said


def test_five_start_in_the_same_instant_on_a_folder_that_is_listed_once(
    start: Start, bundle: Path, tmp_path: Path
) -> None:
    """Three of them have nothing to do."""
    images = write_images(tmp_path / "images", 12)
    (images / "notes").write_text("no image")
    for attempt in range(2):
        processes = [start(images, "-o", f"out{attempt}", "--shard", f"{number}/5") for number in range(1, 6)]
        said = [ended(process) for process in processes]
        output = tmp_path / f"out{attempt}"
        assert table(output).column("row").to_pylist() == list(range(12))
        assert sum("listed 12 images" in one for one in said) == 1
        words = ("shard 5/5 is done: 0 of 2 parts", "with it all 2 parts", "is finished already")
        assert any(one in said[4] for one in words), said[4]
        run = json.loads((output / "_run.json").read_text())
        assert run["result_options"]["part_rows"] == 8, "a batch; 1024 would be one part"
        assert (output / "_SUCCESS").exists()


def test_a_run_that_no_shard_began_leaves_no_folder(
    engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.csv").write_text("path,status\na.png,x\n")
    run = engine_run("m.csv", "-b", bundle, "-o", "out", "--shard", "1/2")
    assert run.returncode == 2
    assert not (tmp_path / "out").exists()


def test_locks_on_a_disk(tmp_path: Path) -> None:
    first, second = (NumberedLocks(tmp_path / "locks") for _ in range(2))
    assert first.take(3)
    assert not second.take(3)
    assert second.take(4)
    assert second.is_taken(3)
    assert not second.is_taken(4)
    first.close()
    assert second.take(3)
    second.close()

    shards = [LocalFolder(tmp_path / "out") for _ in range(2)]
    for folder in shards:
        folder.lock(shared=True)
    with pytest.raises(BlockingIOError):
        hold(tmp_path / "out" / ".lock")
    shards[0].unlock(leave_no_trace=True)
    assert (tmp_path / "out" / ".lock").exists(), "the other is still there"
    shards[1].unlock(leave_no_trace=True)
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_turn_in_an_object_store_is_one_ones_at_a_time(proxy: Any, client: Any) -> None:
    """Five that want it at once, over and over; none is ever inside with another."""
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def come_and_go(number: int) -> None:
        nonlocal inside, most, entered
        folder = ObjectFolder(Url("s3", "archive", "/turns"))
        folder.lock(shared=True)
        for _ in range(3):
            while not folder.take_turn():
                time.sleep(0.002)
            with guard:
                inside, entered = inside + 1, entered + 1
                most = max(most, inside)
            time.sleep(0.005)
            with guard:
                inside -= 1
            folder.give_turn()
        folder.unlock(leave_no_trace=False)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(come_and_go, range(5)))
    assert (most, entered) == (1, 15)
    assert keys(client, "turns/") == []


def test_who_is_drawing_a_ticket_is_waited_for(
    proxy: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (ObjectFolder(Url("s3", "archive", "/drawing")) for _ in range(2))
    for folder in (one, two):
        folder.lock(shared=True)
    tickets, meanwhile = one._tickets, list[bool]()

    def interrupted() -> dict[str, int]:
        found = tickets()
        if not meanwhile:
            meanwhile.append(two.take_turn())
        return found

    monkeypatch.setattr(one, "_tickets", interrupted)
    got = [one.take_turn(), two.take_turn()]
    assert meanwhile == [False]
    assert sorted(got) == [False, True]
    winner, loser = (one, two) if got[0] else (two, one)
    winner.give_turn()
    assert loser.take_turn()
    assert not winner.take_turn()
    for folder in (one, two):
        folder.unlock(leave_no_trace=False)


def test_who_shares_an_object_store_keeps_out_who_does_not(
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
    one.unlock(leave_no_trace=False)
    monkeypatch.setattr("engine.store.STALE_S", -1.0)  # as if `two` had been silent for long
    alone.lock()
    assert not alone.is_claimed(7)
    monkeypatch.undo()
    with pytest.raises(BlockingIOError):
        one.lock(shared=True)
    for folder in (alone, two):
        folder.unlock(leave_no_trace=False)
    assert keys(client, "shared/") == []


def test_what_the_dead_have_left_in_an_object_store_is_swept(
    proxy: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, living = (ObjectFolder(Url("s3", "archive", "/swept")) for _ in range(2))
    dead.lock(shared=True)
    assert dead.claim(1)
    monkeypatch.setattr(
        "engine.store._began", lambda pid: "later"
    )  # its process is gone, another has its number
    living.lock(shared=True)
    assert not living.is_claimed(1)
    assert living.claim(2)
    living.sweep()
    mine, claim = sorted(keys(client, "swept/"))
    assert (mine[:6], claim) == (".lock-", ".part-00002.lock")
    for folder in (living, dead):
        folder.unlock(leave_no_trace=False)
    assert keys(client, "swept/") == []


def test_who_was_killed_on_another_machine_is_found_out(
    proxy: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Url("s3", "archive", "/elsewhere")
    dead, alone, living = (
        ObjectFolder(place),
        ObjectFolder(place),
        RunFolder(place, overwrite=False, shared=True),
    )
    dead.lock(shared=True)
    assert dead.claim(1)
    assert dead._sign
    dead._sign.cease()
    monkeypatch.setattr("engine.store._machine", lambda: "another")
    for module in ("store", "run_folder"):
        monkeypatch.setattr(f"engine.{module}.STALE_S", 2.5)
    with living:
        assert not living.files.claim(1)
        assert living.claimed({1, 2}) == set()
        assert living.files.claim(1)
        monkeypatch.setattr("engine.store.STALE_S", 90.0)
        again = alone._refuse_company  # as if the other came between the first look and the second
        monkeypatch.setattr(alone, "_refuse_company", lambda *_, **but_for: but_for and again(*_, **but_for))
        with pytest.raises(BlockingIOError):
            alone.lock()
        assert ".lock" not in keys(client, "elsewhere/")
    dead.unlock(leave_no_trace=False)


def test_a_run_of_an_older_version_that_names_the_gpus_number_goes_on(tmp_path: Path) -> None:
    (tmp_path / "_run.json").write_text(to_json(run_record(device="cuda:1", runner="torch")))
    folder = RunFolder(tmp_path, overwrite=False)
    recorded = folder.run()
    folder.check_same(recorded, run_record(device="cuda", runner="torch"))
    with pytest.raises(UsageError, match="device was 'cuda', is 'cpu'"):
        folder.check_same(recorded, run_record(device="cpu", runner="torch"))


def test_two_shards_into_an_object_store(
    start: Start, proxy: Any, client: Any, names: list[str], local_rows: pa.Table, tmp_path: Path
) -> None:
    (tmp_path / "m.csv").write_bytes(as_csv([f"s3://archive/knees/{name}" for name in names]))
    output = ("m.csv", "-o", "s3://archive/shards", "--part-rows", "8")
    processes = [start(*output, "--shard", f"{number}/2") for number in (1, 2)]
    said = [ended(process) for process in processes]
    assert stored_rows(client, "shards/").equals(local_rows)
    others = {key for key in keys(client, "shards/") if not key.startswith("part-")}
    assert others == {"_run.json", "_SUCCESS", "report.html"}
    assert any("and with it all 6 parts" in one for one in said)
