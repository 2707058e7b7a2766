"""Shards of one run in processes of their own: side by side, twice at once, killed, refused."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pytest

from engine.core.errors import UsageError
from engine.core.json_records import to_json
from engine.runs.run_folder import RunFolder
from tests.helpers.images import write_images
from tests.helpers.processes import Command, Start
from tests.helpers.records import run_record
from tests.helpers.runs import (
    SHARDED_PART_ROWS,
    SHARDED_ROWS,
    ended,
    list_images,
    only_one_run_is_left,
    parts,
    table,
    wait_for_parts,
)

ROWS, PART_ROWS = SHARDED_ROWS, SHARDED_PART_ROWS


def told(process: subprocess.Popen[str]) -> tuple[str, int]:
    """Its messages as JSON lines, and how many rows it has done itself."""
    events = [json.loads(line) for line in ended(process).splitlines()]
    messages = [event["message"] for event in events if event["event"] == "message"]
    return "\n".join(messages), next(
        item["last_start"]["rows"] for item in events if item["event"] == "summary"
    )


def shard(start: Start, which: str, *options: str) -> subprocess.Popen[str]:
    return start("m.txt", "-o", "out", "--part-rows", str(PART_ROWS), "--shard", which, *options)


def test_three_shards_at_once_give_the_plain_runs_rows(start: Start, tmp_path: Path, whole: pa.Table) -> None:
    list_images(tmp_path, ROWS)
    log = [ended(one) for one in [shard(start, f"{number}/3") for number in (1, 2, 3)]]
    output = tmp_path / "out"
    assert table(output).equals(whole)
    assert only_one_run_is_left(output)
    assert sum(f"and with it all {len(parts(output))} parts" in one for one in log) >= 1
    success = json.loads((output / "_SUCCESS").read_text())
    assert success["rows"] == ROWS
    assert sum(worker["rows"] for worker in success["scored_by"]) == ROWS
    run = json.loads((output / "_run.json").read_text())
    assert run["run_id"] == success["run_id"]
    assert run["result_options"]["shards"] == 3
    assert run["result_options"]["device"] == "cpu"
    assert "is finished already" in ended(shard(start, "2/3"))


@pytest.mark.slow
def test_the_last_shard_writes_success_and_others_report_missing_parts(
    start: Start, tmp_path: Path, whole: pa.Table
) -> None:
    list_images(tmp_path, ROWS)
    output = tmp_path / "out"
    total = -(-ROWS // PART_ROWS)
    for number, done in ((3, total // 3), (1, total // 3 + (total + 2) // 3), (2, total)):
        assert not (output / "_SUCCESS").exists()
        log = ended(shard(start, f"{number}/3"))
        own = len(range(number - 1, total, 3))
        line = f"shard {number}/3 is done: {own} of {total} parts; {done} of {total} parts of the run"
        assert (line in log) == (number != 2), log
    assert f"shard 2/3 is done, and with it all {total} parts of the run" in log
    assert table(output).equals(whole)

    (output / "part-00004.parquet").unlink()  # of shard 2
    changed = (output / "_SUCCESS").stat().st_mtime_ns
    ended(shard(start, "2/3"))
    assert (output / "_SUCCESS").stat().st_mtime_ns != changed
    assert table(output).equals(whole)


@pytest.mark.slow
def test_two_processes_of_one_shard_score_each_part_once(
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


@pytest.mark.slow
def test_killed_shards_resume(start: Start, tmp_path: Path, whole: pa.Table) -> None:
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


@pytest.mark.slow
def test_another_number_of_shards_is_refused(
    start: Start, engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
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
    _, log = process.communicate(timeout=60)
    assert process.returncode == 5, log
    own = sum(min(PART_ROWS, ROWS - first) for first in range(0, ROWS, 3 * PART_ROWS))
    assert f" of {own} rows were processed" in log
    assert f"{other_plan} not cut into shards" in refused()

    plain = start("m.txt", "-o", "plain", "--part-rows", str(PART_ROWS))
    wait_for_parts(plain, tmp_path / "plain", 1)
    plain.send_signal(signal.SIGSTOP)
    log = refused("--shard", "1/3", output=("-o", "plain", "-b", bundle))
    assert "another process is writing there without --shard" in log


@pytest.mark.slow
def test_five_simultaneous_shards_list_a_folder_once(start: Start, bundle: Path, tmp_path: Path) -> None:
    """Three of them have nothing to do."""
    images = write_images(tmp_path / "images", 12)
    (images / "notes").write_text("no image")
    for attempt in range(2):
        processes = [start(images, "-o", f"out{attempt}", "--shard", f"{number}/5") for number in range(1, 6)]
        log = [ended(process) for process in processes]
        output = tmp_path / f"out{attempt}"
        assert table(output).column("row").to_pylist() == list(range(12))
        assert sum("listed 12 images" in one for one in log) == 1
        words = ("shard 5/5 is done: 0 of 2 parts", "with it all 2 parts", "is finished already")
        assert any(one in log[4] for one in words), log[4]
        run = json.loads((output / "_run.json").read_text())
        assert run["result_options"]["part_rows"] == 8, "a batch; 1024 would be one part"
        assert (output / "_SUCCESS").exists()


def test_a_shard_that_fails_before_the_start_leaves_no_folder(
    engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.csv").write_text("path,status\na.png,x\n")
    run = engine_run("m.csv", "-b", bundle, "-o", "out", "--shard", "1/2")
    assert run.returncode == 2
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_older_version_with_a_gpu_index_resumes(tmp_path: Path) -> None:
    (tmp_path / "_run.json").write_text(to_json(run_record(device="cuda:1", runner="torch")))
    folder = RunFolder(tmp_path, overwrite=False)
    recorded = folder.run()
    folder.check_same(recorded, run_record(device="cuda", runner="torch"))
    with pytest.raises(UsageError, match="device was 'cuda', is 'cpu'"):
        folder.check_same(recorded, run_record(device="cpu", runner="torch"))
