"""`--device cuda:all` without GPUs: two processes on the CPU, started, watched and ended as on GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import engine
from engine.core.errors import EngineError
from engine.core.settings import Settings, Shard
from engine.executors import multi_gpu
from engine.runs.progress import Progress
from tests.helpers.processes import Start, starting
from tests.helpers.runs import SHARDED_PART_ROWS as PART_ROWS
from tests.helpers.runs import SHARDED_ROWS as ROWS
from tests.helpers.runs import list_images, only_one_run_is_left, parts, table, wait_for_parts

SCRIPT = """
import sys
from engine.executors import multi_gpu
from engine.run import main
multi_gpu.list_devices = lambda: ["cpu", "cpu"]
sys.exit(main())
"""


@pytest.fixture
def start(tmp_path: Path, bundle: Path) -> Iterator[Start]:
    """The command line, for which two CPUs are the GPUs."""
    (tmp_path / "two.py").write_text(SCRIPT)
    with starting(tmp_path) as start_process:
        last = ("-b", bundle, "-o", "out", "--device", "cuda:all", "--part-rows", str(PART_ROWS))
        yield lambda *arguments: start_process("two.py", *arguments, *last)


def children(process: subprocess.Popen[str]) -> dict[str, int]:
    """The engines that it has started: their pids by their shards."""
    result = {}
    for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for child in task.read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            shards = [word.removeprefix("--shard=") for word in words if word.startswith("--shard=")]
            result |= dict.fromkeys(shards, int(child))
    return result


def gone(pids: dict[str, int]) -> bool:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids.values()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_all_devices_report_as_one_run(start: Start, tmp_path: Path, whole: object) -> None:
    list_images(tmp_path, ROWS)
    printed, log = (process := start("m.txt", "--log-json", "--metrics-file", "all.prom")).communicate()
    assert (process.returncode, printed) == (0, "out\n"), log
    assert table(tmp_path / "out").equals(whole)
    assert only_one_run_is_left(tmp_path / "out")
    events = [json.loads(line) for line in log.splitlines()]
    messages = [event["message"] for event in events if event["event"] == "message"]
    assert sum("ONNX Runtime on the CPU" in message for message in messages) == 1
    assert sum(f"with it all {-(-ROWS // PART_ROWS)} parts" in message for message in messages) >= 1
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["rows"], last["rows_done"]) == (ROWS, ROWS)
    (summary,) = [event for event in events if event["event"] == "summary"]
    assert (summary["rows"], summary["last_start"]["rows"]) == (ROWS, ROWS)
    assert summary["last_start"]["stages"]["read"]["busy_s"] > 0
    assert f'screening_rows{{run="all"}} {float(ROWS)}' in (tmp_path / "all.prom").read_text()

    printed, log = (process := start("m.txt")).communicate()
    assert (process.returncode, printed) == (0, "out\n")
    assert log.count("is finished already") == 1


@pytest.mark.slow
def test_a_dead_process_loses_only_its_parts_and_the_command_resumes(
    start: Start, tmp_path: Path, whole: object
) -> None:
    list_images(tmp_path, ROWS)
    process = start("m.txt")
    wait_for_parts(process, tmp_path / "out", 8)
    os.kill(children(process)["2/2"], signal.SIGKILL)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 5
    *_, last = log.splitlines()
    missing = -(-ROWS // PART_ROWS) - len(parts(tmp_path / "out"))
    assert last.startswith("error: cpu (shard 2/2): it was ended by SIGKILL; "), last
    assert f"; {missing} parts are missing (part-0" in last
    assert last.endswith("run the same command again to continue")
    process = start("m.txt")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert table(tmp_path / "out").equals(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_end_with_the_command(start: Start, tmp_path: Path, number: int) -> None:
    list_images(tmp_path, 40_000)
    process = start("m.txt")
    wait_for_parts(process, tmp_path / "out", 4)
    started = children(process)
    assert set(started) == {"1/2", "2/2"}
    process.send_signal(number)
    _, log = process.communicate(timeout=30)
    assert gone(started)
    if number == signal.SIGTERM:
        assert process.returncode == 5, log
        assert " of 40000 rows are in finished parts; run the same command again to continue" in log
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.slow
def test_the_deadline_stops_all(start: Start, tmp_path: Path) -> None:
    list_images(tmp_path, 40_000)
    moment = datetime.now() + timedelta(seconds=6)
    _, log = (process := start("m.txt", "--finish-by", moment.isoformat())).communicate(timeout=30)
    assert process.returncode == 5, log
    assert -3 < (datetime.now() - moment).total_seconds() < 9, "as soon as a part allows"
    *_, last = log.splitlines()
    assert last.startswith(f"error: stopped for --finish-by {moment:%H:%M}, "), last
    assert last.endswith(" of 40000 rows are in finished parts; run the same command again to continue")


def test_an_error_of_all_processes_is_reported_once(start: Start, tmp_path: Path) -> None:
    _, log = (process := start("nowhere.csv")).communicate(timeout=60)
    assert (process.returncode, log) == (2, "error: manifest nowhere.csv: no such file or folder\n")
    _, log = (process := start("nowhere.csv", "--overwrite")).communicate(timeout=60)
    assert (process.returncode, log.count("\n")) == (2, 1)
    assert "--overwrite with --device cuda:all" in log


@pytest.mark.slow
def test_two_machines_share_a_run_and_resume_with_fewer_devices(
    archive: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()

    def progress(now: Progress) -> None:
        seen.append(now.rows_done)

    def screen(which: str) -> engine.Summary:
        output = tmp_path / "out"
        return engine.screen(
            archive,
            output=output,
            bundle=bundle,
            device="cuda:all",
            shard=which,
            part_rows=4,
            workers=2,
            progress=progress,
        )

    monkeypatch.setattr(multi_gpu, "list_devices", lambda: ["cpu", "cpu"])
    summary = screen("2/2")
    assert (summary.rows, summary.shard) == (16, "2/2")
    assert seen[-1] == 16
    assert len(parts(tmp_path / "out")) == 4
    monkeypatch.setattr(multi_gpu, "list_devices", lambda: ["cpu"])
    assert screen("1/2").rows == 24
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert table(tmp_path / "out").column("row").to_pylist() == list(range(40))
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["result_options"]["shards"] == 4
    monkeypatch.setattr(multi_gpu, "list_devices", lambda: ["cpu"] * 3)
    with pytest.raises(EngineError, match="cut into 4 shards") as caught:
        screen("1/3")
    assert caught.value.exit_status == 2


def test_shards_of_a_machine(tmp_path: Path) -> None:
    settings = Settings(manifest=Path("m.csv"), output=tmp_path / "none", shard=Shard(2, 3))
    assert list(map(str, multi_gpu.local_shards(settings, 2))) == ["3/6", "4/6"]
    assert list(map(str, multi_gpu.local_shards(Settings(manifest=Path("m.csv")), 3))) == [
        "1/3",
        "2/3",
        "3/3",
    ]
