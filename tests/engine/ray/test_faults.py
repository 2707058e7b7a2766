"""Runs on Ray whose actors, nodes and driver are killed, hang, or give wrong scores."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from engine.core.errors import Stopped
from tests.helpers.hurt.sitecustomize import DEADLY
from tests.helpers.images import write_images
from tests.helpers.nodes import Nodes
from tests.helpers.processes import Start, in_background, run_module, starting
from tests.helpers.runs import ended, list_images, only_results_are_left, parts, table, wait_for_parts

ROWS, PART_ROWS = 4000, 64

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """A folder with images, the list m.txt of ROWS of them, and the results `plain` of one process."""
    folder = tmp_path_factory.mktemp("plain")
    list_images(folder, ROWS)
    arguments = ["m.txt", "-b", bundle, "-o", "plain", "--part-rows", str(PART_ROWS)]
    run_module("engine.run", arguments, folder=folder, timeout_s=120).check_returncode()
    return folder


@pytest.fixture
def start(plain: Path, bundle: Path, nodes: Nodes) -> Iterator[Start]:
    """A run on the cluster in the background, in the folder `plain`."""
    with starting(plain) as start_process:

        def run(
            *arguments: str | Path, ray: str | None = None, rows: int = PART_ROWS
        ) -> subprocess.Popen[str]:
            command = ["-m", "engine.run", *arguments, "-b", bundle]
            return start_process(*command, "--ray", ray or nodes.address, "--part-rows", str(rows))

        yield run
    for order in nodes.hurt.iterdir():
        order.unlink()


def success(output: Path) -> dict:
    return json.loads((output / "_SUCCESS").read_text())


def check_results(output: Path, plain: Path) -> dict:
    """Assert that the rows equal those of one undisturbed process and that no other file is left."""
    assert table(output).equals(table(plain / "plain"))
    assert table(output).column("row").to_pylist() == list(range(ROWS))
    (output / "_actors.json").rename(output.parent / f"{output.name}.json")
    assert only_results_are_left(output)
    summary = success(output)
    assert summary["rows"] == ROWS
    assert sum(scorer["rows"] for scorer in summary["scored_by"]) == ROWS
    return summary["last_start"]["actors"]


def test_killed_actors_do_not_change_the_results(start: Start, nodes: Nodes, plain: Path) -> None:
    rng, output = random.Random(1), plain / "killed"
    process = start("m.txt", "-o", output)
    for count in (1, 10, 30):
        wait_for_parts(process, output, count)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(rng.choice(nodes.wait_for_actors(1)), signal.SIGKILL)
    assert ") was lost and is replaced: its process ended" in ended(process)
    counts = check_results(output, plain)
    assert counts["lost"] == 3
    assert counts["parts_done_again"] > 0


def test_a_node_is_lost_and_another_joins(start: Start, nodes: Nodes, plain: Path) -> None:
    output = plain / "node"
    process = start("m.txt", "-o", output, "--actors", "2")
    wait_for_parts(process, output, 5)
    nodes.tell("remove")
    wait_for_parts(process, output, len(parts(output)) + 5)  # the other goes on
    nodes.tell("add")
    ended(process)
    assert check_results(output, plain)["lost"] == 1


def test_actors_that_hang_are_replaced(start: Start, nodes: Nodes, plain: Path) -> None:
    output = plain / "hanging"
    process = start("m.txt", "-o", output, "--part-timeout", "2")
    wait_for_parts(process, output, 5)
    os.kill(nodes.wait_for_actors(1)[0], signal.SIGSTOP)  # the whole process
    wait_for_parts(process, output, len(parts(output)) + 2)
    nodes.order("hang")  # a member
    log = ended(process)
    # a stopped process may first be missed for its answers or its batches; the other may be through by then
    assert 1 <= log.count("for 2 s (--part-timeout)") == check_results(output, plain)["lost"] <= 2


def test_one_process_continues_the_run_of_a_killed_driver(start: Start, plain: Path, bundle: Path) -> None:
    output = plain / "driver"
    alone = ["-m", "engine.run", "m.txt", "-b", bundle, "-o", output, "--part-rows", str(PART_ROWS)]

    def one_process() -> subprocess.Popen[str]:
        return in_background(alone, plain)

    for begin in (one_process, lambda: start("m.txt", "-o", output), lambda: start("m.txt", "-o", output)):
        process = begin()
        wait_for_parts(process, output, len(parts(output)) + 5)
        process.kill()
        process.communicate()
        assert not (output / "_SUCCESS").exists()
    ended(one_process())
    assert success(output)["rows"] == ROWS
    assert table(output).equals(table(plain / "plain"))


def test_a_row_that_ends_its_actor_is_marked_crashed(start: Start, plain: Path) -> None:
    lines = (plain / "m.txt").read_text().splitlines()[:1000]
    lines[437] = "images/deadly.png"
    (plain / "deadly.txt").write_text("\n".join(lines))
    image = next((plain / "images").glob("*.png"))
    (plain / "images" / "deadly.png").write_bytes(image.read_bytes() + DEADLY)
    output = plain / "deadly"
    log = ended(start("deadly.txt", "-o", output))
    assert "part 6: rows that end an actor alone: 1 (437)" in log
    frame = table(output).to_pandas()
    expected = table(plain / "plain").to_pandas()[:1000]
    assert frame.status[437] == "crashed"
    assert "crashes the worker process" in frame.error[437]
    pd.testing.assert_frame_equal(frame.drop(437), expected.drop(437))
    assert success(output)["last_start"]["actors"]["rows_crashed"] == 1


def test_an_actor_with_wrong_scores_is_refused(start: Start, nodes: Nodes, plain: Path) -> None:
    output = plain / "noise"
    process = start("m.txt", "-o", output)
    wait_for_parts(process, output, 10)
    nodes.order("noise")
    log = ended(process)
    assert "is refused: the bundle's canaries differ during the run from their reference" in log
    assert "actors refused" in log
    counts = check_results(output, plain)
    assert len(counts["refused"]) == 1
    assert counts["parts_done_again"] > 0


def test_a_run_ends_when_all_actors_have_wrong_scores(start: Start, nodes: Nodes, plain: Path) -> None:
    nodes.order("noise")
    log = ended(start("m.txt", "-o", plain / "wrong", "--actors", "1"), status=4)
    assert "no actor is left: the bundle's canaries differ from their float32 reference" in log
    assert not (plain / "wrong").exists()


def test_two_kinds_of_actors_share_the_work(start: Start, nodes: Nodes, plain: Path) -> None:
    nodes.order("other")
    output = plain / "kinds"
    ended(start("m.txt", "-o", output, "--actors", "2"))
    check_results(output, plain)
    by = {scorer["precision"]: scorer["rows"] for scorer in success(output)["scored_by"]}
    assert by.keys() == {"fp32", "slow"}
    assert 0 < by["slow"] < ROWS / 4
    recorded = json.loads((output / "_run.json").read_text())["result_options"]
    assert [kind["precision"] for kind in recorded["kinds"]] == ["fp32", "slow"]
    log = ended(start("m.txt", "-o", output, "--actors", "2"), status=2)  # without the slow one
    assert "kinds was" in log


def test_an_interrupted_run_continues(start: Start, plain: Path) -> None:
    output = plain / "interrupted"
    process = start("m.txt", "-o", output)
    wait_for_parts(process, output, 10)
    os.killpg(process.pid, signal.SIGINT)
    log = ended(process, status=5)
    assert "run the same command again to continue" in log
    kept = {path.name: path.stat().st_ino for path in parts(output)}
    process = start("m.txt", "-o", output)
    ended(process)
    again = {path.name: path.stat().st_ino for path in parts(output)}
    assert {name: again[name] for name in kept} == kept, "confirmed parts are kept"
    check_results(output, plain)


def test_finish_by_stops_the_run_inside_a_part(start: Start, plain: Path) -> None:
    list_images(plain, 100_000, name="long.txt")
    moment = datetime.now() + timedelta(seconds=20)
    log = ended(
        start("long.txt", "-o", "late", "--finish-by", moment.isoformat(), rows=50_000), Stopped.exit_status
    )
    assert 0 <= (datetime.now() - moment).total_seconds() < 10
    assert f"error: stopped for --finish-by {moment:%H:%M}" in log
    if "before the run began" not in log:  # as on a machine that is busy
        assert "of 100000 rows were processed; run the same command again to continue" in log


def test_a_local_ray_leaves_no_process_behind(start: Start, plain: Path) -> None:
    output = plain / "own"
    before = set(Path("/tmp").glob("engine-ray-*"))
    process = start("m.txt", "-o", output, "--actors", "2", ray="local")
    wait_for_parts(process, output, 5)
    (scratch,) = set(Path("/tmp").glob("engine-ray-*")) - before
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode in (130, 5)
    deadline = time.monotonic() + 15
    while left := processes_of(scratch):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    shutil.rmtree(scratch, ignore_errors=True)


def processes_of(scratch: Path) -> list[str]:
    commands = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if str(scratch) in command:
            commands.append(command)
    return commands


def test_lost_storage_is_one_error_line(start: Start, plain: Path) -> None:
    folder = plain / "away"
    write_images(folder / "images", 8)
    lines = [f"images/image-{row % 8:02}{('.png', '.jpg')[row % 2]}" for row in range(ROWS)]
    (folder / "m.txt").write_text("\n".join(lines))
    output = plain / "away-results"
    process = start(folder / "m.txt", "-o", output)
    wait_for_parts(process, output, 5)
    shutil.rmtree(folder / "images")
    log = ended(process, status=1)
    assert "error: the images have disappeared" in log.replace(f"{platform.node()}: ", "")
    assert log.count("error: ") == 1
