"""What a run promises when it is killed, stopped, starved of disk or deserted by its storage."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.decoder_faults import FAULTS
from tests.helpers.images import smooth_jpeg
from tests.helpers.processes import ROOT, Command, Start
from tests.helpers.runs import list_images, only_results_are_left, parts, table, wait_for_parts

HANGING_READ = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
ssize_t read(int file, void *buffer, size_t count) {
    static ssize_t (*real)(int, void *, size_t);
    char link[64], path[4096];
    if (!real) real = dlsym(RTLD_NEXT, "read");
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0) {
        path[length] = 0;
        if (strstr(path, "/stuck-")) for (;;) pause();
    }
    return real(file, buffer, count);
}
"""


@pytest.mark.parametrize(("kills", "rows"), [(2, 1600), pytest.param(30, 8000, marks=pytest.mark.slow)])
def test_kills_do_not_change_the_results(
    start: Start, engine_run: Command, bundle: Path, tmp_path: Path, kills: int, rows: int
) -> None:
    list_images(tmp_path, rows)
    arguments = ("m.txt", "--part-rows", "16", "-b", bundle)
    assert engine_run(*arguments, "-o", "whole").returncode == 0
    rng = random.Random(30)
    output = tmp_path / "out"
    for _ in range(kills):
        before = {path.name: path.stat().st_ino for path in parts(output)}
        process = start("m.txt", "--part-rows", "16", "-o", "out")
        if rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.5))  # while it starts
        else:
            wait_for_parts(process, output, len(before) + rng.choice((1, 1, 2, 3)))
            time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed: use more rows"
        kept = {path.name: path.stat().st_ino for path in parts(output) if path.name in before}
        assert kept == before, "what was finished is never done again"
    assert engine_run(*arguments, "-o", "out").returncode == 0
    assert table(output).equals(table(tmp_path / "whole"))
    assert table(output).column("row").to_pylist() == list(range(rows))
    assert only_results_are_left(output)


@pytest.mark.slow
def test_the_decoder_ends_with_a_killed_engine(start: Start, tmp_path: Path) -> None:
    list_images(tmp_path, 20_000)
    process = start("m.txt", "-o", "out", "--part-rows", "64")
    wait_for_parts(process, tmp_path / "out", 1)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [child for thread in threads for child in thread.read_text().split()]
    assert children
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "the decoder outlives the engine"
        time.sleep(0.02)


def test_a_second_process_on_one_folder_stops(
    start: Start, engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
    list_images(tmp_path, 20_000)
    process = start("m.txt", "-o", "out", "--part-rows", "64")
    wait_for_parts(process, tmp_path / "out", 1)
    second = engine_run("m.txt", "-o", "out", "--part-rows", "64", "-b", bundle)
    assert second.returncode == 2
    assert "another process is writing there" in second.stderr
    assert process.poll() is None


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(
    start: Start, engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
    list_images(tmp_path, 3_000)
    process = start("m.txt", "-o", "out", "--part-rows", "16")
    wait_for_parts(process, tmp_path / "out", 2)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode in (130, 5)  # 5: it had stopped before the second came
    run = engine_run("m.txt", "-o", "out", "-b", bundle)
    assert run.returncode == 0, run.stderr
    assert table(tmp_path / "out").num_rows == 3_000


@pytest.mark.slow
def test_finish_by_stops_between_parts(
    start: Start, engine_process: Command, bundle: Path, tmp_path: Path
) -> None:
    list_images(tmp_path, 100_000)
    moment = datetime.now() + timedelta(seconds=12)
    process = start("m.txt", "-o", "out", "--part-rows", "128", "--finish-by", moment.isoformat())
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 5, errors
    assert abs((datetime.now() - moment).total_seconds()) < 3
    assert "stopped for --finish-by" in errors
    assert f"done by {moment:%H:%M}" in errors  # the forecast
    result = len(parts(tmp_path / "out"))
    assert result > 2
    assert f"{128 * result} of 100000 rows" in errors
    # tonight's deadline may differ from yesterday's
    moment = datetime.now() + timedelta(seconds=10)
    again = engine_process("m.txt", "-o", "out", "--finish-by", moment.isoformat(), "-b", bundle)
    assert again.returncode == 5, again.stderr
    assert len(parts(tmp_path / "out")) > result


@pytest.mark.slow
def test_finish_by_stops_inside_a_part(start: Start, tmp_path: Path) -> None:
    list_images(tmp_path, 100_000)
    moment = datetime.now() + timedelta(seconds=5)
    process = start("m.txt", "-o", "out", "--part-rows", "100000", "--finish-by", moment.isoformat())
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 5, errors
    assert 0 <= (datetime.now() - moment).total_seconds() < 4
    assert f"error: stopped for --finish-by {moment:%H:%M}, " in errors
    assert "of 100000 rows were processed; run the same command again to continue" in errors
    assert not parts(tmp_path / "out")


def with_mounts(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount what no other process sees; status 77 where that isn't allowed."""
    run = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip("no right to mount")
    return run


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_free_space_lets_it_resume(bundle: Path, tmp_path: Path) -> None:
    list_images(tmp_path, 4_000)
    (tmp_path / "out").mkdir()
    script = f"""
        mount -t tmpfs -o size=100k none out || exit 77
        run() {{ {sys.executable} -m engine.run m.txt -o out/results -b {bundle} --part-rows 256; }}
        run; echo status $?
        ls -A out/results
        mount -o remount,size=10m out
        run; echo status $?
        cp -r out/results kept
    """
    run = with_mounts(script, tmp_path)
    _, second = run.stdout.split("status 1\n", 1)
    assert "No space left on device" in run.stderr
    assert "run the same command again to continue" in run.stderr
    assert "Traceback" not in run.stderr
    assert "part-00000.parquet" in second
    assert ".tmp" not in second
    assert "status 0" in second
    assert table(tmp_path / "kept").column("row").to_pylist() == list(range(4_000))


def test_a_read_only_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    list_images(tmp_path, 10)
    (tmp_path / "out").mkdir()
    command = f"{sys.executable} -m engine.run m.txt -o out/r -b {bundle}"
    run = with_mounts(f"mount -t tmpfs -o ro none out || exit 77; {command}", tmp_path)
    assert run.returncode == 2
    assert run.stderr == "error: output out/r: Read-only file system\n"


@pytest.mark.slow
def test_an_output_folder_deleted_half_way(
    start: Start, engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
    list_images(tmp_path, 20_000)
    process = start("m.txt", "-o", "out", "--part-rows", "64")
    wait_for_parts(process, tmp_path / "out", 3)
    shutil.move(tmp_path / "out", tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "No such file or directory" in errors
    assert "Traceback" not in errors
    list_images(tmp_path, 100)
    run = engine_run("m.txt", "-o", "out", "-b", bundle)
    assert run.returncode == 0, run.stderr
    assert table(tmp_path / "out").num_rows == 100


@pytest.mark.slow
def test_images_that_disappear_are_not_called_missing(
    start: Start, engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
    list_images(tmp_path, 4_000)
    process = start("m.txt", "-o", "out", "--part-rows", "64")
    wait_for_parts(process, tmp_path / "out", 3)
    (tmp_path / "images").rename(tmp_path / "unmounted")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the images have disappeared" in errors
    assert "Traceback" not in errors
    assert 3 <= len(parts(tmp_path / "out")) < 63
    (tmp_path / "unmounted").rename(tmp_path / "images")
    assert engine_run("m.txt", "-o", "out", "-b", bundle).returncode == 0
    assert engine_run("m.txt", "-o", "whole", "-b", bundle, "--part-rows", 64).returncode == 0
    assert table(tmp_path / "out").equals(table(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_a_read_that_hangs_costs_its_row_and_no_time_of_others(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hang.c").write_text(HANGING_READ)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "hang.so", "hang.c", "-ldl"], cwd=tmp_path, check=True)
    manifest = list_images(tmp_path, 2_000)
    lines = manifest.read_text().splitlines()
    hanging = [5, 6, 700, 701, 1_990]
    for row in hanging:
        (tmp_path / "images" / f"stuck-{row}").write_bytes(b"anything")
        lines[row] = f"images/stuck-{row}"
    manifest.write_text("\n".join(lines))
    began = time.monotonic()
    process = start(
        "m.txt", "-o", "out", "--part-rows", "64", "--read-timeout", "9", LD_PRELOAD=str(tmp_path / "hang.so")
    )
    wait_for_parts(process, tmp_path / "out", 12)
    assert time.monotonic() - began < 9, "the others wait for the read that hangs"
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    result = table(tmp_path / "out").to_pandas().set_index("row")
    assert sorted(result[result.status == "timeout"].index) == hanging
    assert result.error[5] == "the storage did not answer within 9 s (--read-timeout)"
    rest = result.drop(hanging)
    assert set(rest.status) == {"ok", "missing", "corrupt"}
    assert rest.path.tolist() == [line for row, line in enumerate(lines) if row not in hanging]
    assert rest.groupby("path").p_normal.nunique(dropna=False).eq(1).all()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_storage_that_hangs_as_a_whole_stops_the_run(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hang.c").write_text(HANGING_READ)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "hang.so", "hang.c", "-ldl"], cwd=tmp_path, check=True)
    names = [f"stuck-{row}" for row in range(1_000)]
    for name in names:
        (tmp_path / name).write_bytes(b"anything")
    (tmp_path / "m.txt").write_text("\n".join(names))
    hanging = {"LD_PRELOAD": str(tmp_path / "hang.so")}
    process = start("m.txt", "-o", "out", "--read-timeout", "0.3", **hanging)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "does not answer" in errors
    assert "Traceback" not in errors
    process = start("m.txt", "-o", "other", **hanging)
    while not (tmp_path / "other" / "_run.json").exists():
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 5, errors


def test_only_errors_rescores_repaired_images(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    manifest = list_images(tmp_path, 200)
    frame = pd.DataFrame({"path": manifest.read_text().splitlines()})
    frame["patient"] = [f"{row:03}" for row in range(200)]
    frame.loc[20:29, "path"] = "images/image-00.png"  # a part without errors
    frame.to_csv(tmp_path / "m.csv", index=False)
    arguments = ("m.csv", "-b", bundle, "--part-rows", 10)
    assert engine_run(*arguments, "-o", "out").returncode == 0
    before, files = table(tmp_path / "out"), {path: path.stat().st_ino for path in parts(tmp_path / "out")}
    failed = before.to_pandas().status != "ok"
    assert failed.sum() > 20

    good = tmp_path / "images" / "image-03.jpg"
    shutil.copy(good, tmp_path / "images" / "nowhere")
    run = engine_run("--only-errors", "out")
    assert run.returncode == 0, run.stderr
    half = table(tmp_path / "out").to_pandas()
    assert set(half.status) == {"ok", "corrupt"}
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["errors"] == (half.status != "ok").sum()
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["last_start"]["rows"] == failed.sum()

    shutil.copy(good, tmp_path / "images" / "bad.jpg")
    assert engine_run("--only-errors", "out").returncode == 0
    assert engine_run(*arguments, "-o", "whole").returncode == 0
    mended = table(tmp_path / "out")
    assert mended.equals(table(tmp_path / "whole"))
    assert mended.schema.equals(before.schema)
    untouched = tmp_path / "out" / "part-00002.parquet"
    assert untouched.stat().st_ino == files[untouched]
    assert only_results_are_left(tmp_path / "out")
    again = engine_run("--only-errors", "out")
    assert again.returncode == 0
    assert "no row failed" in again.stderr


def test_only_errors_keeps_to_the_options_of_the_run(
    engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
    list_images(tmp_path, 20)
    assert engine_run("m.txt", "-b", bundle, "-o", "out").returncode == 0
    for option in (("--max-pixels", 5), ("-o", "other"), ("--part-rows", 5), ("--overwrite",)):
        run = engine_run("--only-errors", "out", *option)
        assert run.returncode == 2
        assert "can't be given with --only-errors" in run.stderr
    (tmp_path / "out" / "part-00000.parquet").unlink()
    run = engine_run("--only-errors", "out")
    assert run.returncode == 2
    assert "the run is not finished" in run.stderr


@pytest.mark.slow
def test_a_log_that_can_not_be_written_does_not_end_a_run(bundle: Path, tmp_path: Path) -> None:
    list_images(tmp_path, 50)
    command = f"{sys.executable} -m engine.run m.txt -b {bundle}"
    for redirection in ("2>/dev/full >/dev/full", "2>&- >&-", "2>&1 | true; test ${PIPESTATUS[0]} = 0"):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        status = subprocess.run(
            ["bash", "-c", f"{command} {redirection}"], cwd=tmp_path, env=environment, check=False
        ).returncode
        assert status == 0
        assert (tmp_path / "results" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        ("swap", "it is part 1"),
        ("cut", "not a part of this run"),
        ("foreign", "it belongs to run"),
        ("shorter", "8 of 7 rows have a status"),
        ("rescored", "have scores"),
    ],
)
def test_the_ledger_names_the_part_that_is_wrong(
    engine_run: Command, bundle: Path, tmp_path: Path, tamper: str, complaint: str
) -> None:
    list_images(tmp_path, 40)
    for name in ("out", "other"):
        assert engine_run("m.txt", "-b", bundle, "-o", name, "--part-rows", 8).returncode == 0
    part = tmp_path / "out" / "part-00002.parquet"
    if tamper == "swap":
        shutil.copy(tmp_path / "out" / "part-00001.parquet", part)
    elif tamper == "cut":
        part.write_bytes(part.read_bytes()[:-10])
    elif tamper == "foreign":
        shutil.copy(tmp_path / "other" / part.name, part)
    else:
        rows = pq.read_table(part)
        if tamper == "shorter":
            rows = rows.slice(0, 7)
        else:
            empty = pa.nulls(rows.num_rows, pa.string())
            rows = rows.set_column(rows.schema.get_field_index("prediction"), "prediction", empty)
        pq.write_table(rows, part)
    (tmp_path / "out" / "_SUCCESS").unlink()
    run = engine_run("m.txt", "-b", bundle, "-o", "out", "--part-rows", 8)
    assert run.returncode == 1
    assert part.name in run.stderr
    assert run.stderr.count("\n") == 1
    assert complaint in run.stderr
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_crash_of_the_decoder_is_reported(start: Start, tmp_path: Path) -> None:
    list_images(tmp_path, 30)
    (tmp_path / "images" / "nowhere").write_bytes(smooth_jpeg(1, b"CRASH"))
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULTS)
    process = start("m.txt", "-o", "out", PYTHONPATH=f"{ROOT}:{tmp_path / 'faults'}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    result = table(tmp_path / "out").to_pandas()
    crashed = result[result.status == "crashed"]
    assert set(crashed.path) == {"images/nowhere"}
    assert set(crashed.error) == {"decoding the jpeg image failed: the decoder process was ended by SIGSEGV"}
    success = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert success["last_start"]["decoder_restarts"] >= 3
