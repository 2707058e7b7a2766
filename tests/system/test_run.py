"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import engine
from engine.bundle.bundle import load_bundle
from engine.scoring.ensemble import combine_logits
from tests.helpers.bundles import CLASSES, write_bundle
from tests.helpers.images import write_images
from tests.helpers.pixels import pixels_alone
from tests.helpers.processes import ROOT, Command
from tests.helpers.runs import table
from tests.helpers.tolerances import ROUNDING


def expected_scores(bundle: Path, paths: list[Path]) -> np.ndarray:
    """Each image scored by itself, with ONNX Runtime called directly."""
    loaded = load_bundle(bundle)
    sessions = [onnxruntime.InferenceSession(member.files["onnx"].path) for member in loaded.members]
    rows = []
    for pixels in pixels_alone(paths, loaded.size):
        assert pixels is not None
        logits = np.stack([session.run(None, {"pixels": pixels[None]})[0] for session in sessions])
        rows.append(combine_logits(logits, weights=loaded.weights, temperatures=[1.0, 1.0])[1][0])
    return np.array(rows)


def assert_scores(frame: pd.DataFrame, bundle: Path, folder: Path) -> None:
    ok = frame[frame.status == "ok"]
    scores = ok[[f"p_{name}" for name in CLASSES]].to_numpy()
    expected = expected_scores(bundle, [folder / path for path in ok.path])
    assert np.abs(scores - expected).max() <= ROUNDING
    assert np.unique(expected.round(4), axis=0).shape[0] == len(ok), "each image needs scores of its own"
    assert (ok.prediction == np.array(CLASSES)[scores.argmax(1)]).all()
    assert np.abs(ok.confidence - scores.max(1)).max() == 0


def test_every_row_gets_its_own_scores(engine_process: Command, archive: Path, bundle: Path) -> None:
    frame = pd.DataFrame({"path": sorted(path.name for path in archive.iterdir())})
    frame["patient"] = [f"{row:04}" for row in range(len(frame))]
    frame["t_score"] = np.linspace(-4, 1, len(frame))
    frame.loc[7, "path"] = "nowhere.png"
    (archive / "broken.jpg").write_bytes((archive / "image-01.jpg").read_bytes()[:-400])
    frame.loc[20, "path"] = "broken.jpg"
    frame.to_csv(archive / "manifest.csv", index=False)

    run = engine_process(
        archive / "manifest.csv", "-b", bundle, "-o", "out", "--part-rows", 16, "--batch-size", 3
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "out"
    output = archive.parent / "out"
    result = engine.read_results(output)
    assert sorted(path.name for path in output.glob("part-*")) == [f"part-0000{k}.parquet" for k in range(3)]
    assert result.row.tolist() == list(range(40))
    assert result.path.tolist() == frame.path.tolist()
    assert result.patient.tolist() == frame.patient.tolist()
    assert np.allclose(result.t_score, frame.t_score)
    assert result.status[7] == "missing"
    assert result.status[20] == "truncated"
    assert (result.status == "ok").sum() == 38
    assert_scores(result, bundle, archive)

    failed = result[result.status != "ok"]
    assert failed[["prediction", "confidence", "p_normal", "member1_p_normal"]].isna().all(axis=None)
    assert failed.error.notna().all()
    assert result[result.status == "ok"].error.isna().all()


def test_files_record_their_provenance(engine_run: Command, archive: Path, bundle: Path) -> None:
    engine_run(archive, "-b", bundle, "-o", "out")
    output = archive.parent / "out"
    run = json.loads((output / "_run.json").read_text())
    success = json.loads((output / "_SUCCESS").read_text())
    [worker] = success["scored_by"]
    assert (worker["device"], worker["runner"], worker["rows"]) == ("cpu", "onnx", success["rows"])
    part = pq.read_schema(output / "part-00000.parquet")
    inside = json.loads(part.metadata[b"engine"])
    assert inside["run_id"] == run["run_id"] == success["run_id"]
    assert inside["result_options"]["bundle_sha256"] == load_bundle(bundle).sha256
    assert inside["weights"] == {"member0": 0.6, "member1": 0.4}
    assert {"engine", "onnxruntime", "nvidia-dali-cuda130"} <= set(inside["versions"])
    assert success["rows"] == success["ok"] + success["errors"] + success["skipped"] == 40
    assert part.field("row").type == pa.int64()
    assert part.field("width").type == pa.int32()
    assert part.field("flags").type == pa.list_(pa.string())
    assert all(part.field(f"p_{name}").type == pa.float32() for name in CLASSES)


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt", "folder"])
def test_all_kinds_of_manifest_give_the_same_rows(
    engine_run: Command, archive: Path, bundle: Path, kind: str
) -> None:
    names = sorted(path.name for path in archive.iterdir())
    manifest = archive / f"manifest.{kind}"
    frame = pd.DataFrame({"path": names})
    if kind == "csv":
        frame.to_csv(manifest, index=False)
    elif kind == "parquet":
        frame.to_parquet(manifest)
    elif kind == "txt":
        manifest.write_text("\n".join(names))
    else:
        manifest = archive
    run = engine_run(manifest, "-b", bundle, "-o", "out", "--root", archive)
    assert run.returncode == 0, run.stderr
    result = engine.read_results(archive.parent / "out")
    assert result.path.tolist() == names
    assert_scores(result, bundle, archive)


def test_serial_overlapped_and_other_worker_counts_are_equal_bit_for_bit(
    engine_run: Command, archive: Path, bundle: Path
) -> None:
    (archive / "bad.png").write_bytes(b"\x89PNG")
    tables = []
    for name, options in {"a": ["--serial"], "b": [], "c": ["--workers", "5"]}.items():
        run = engine_run(archive, "-b", bundle, "-o", name, "--part-rows", 16, *options)
        assert run.returncode == 0, run.stderr
        tables.append(table(archive.parent / name))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_a_finished_run_is_reported_and_unchanged(engine_run: Command, archive: Path, bundle: Path) -> None:
    engine_run(archive, "-b", bundle)
    output = archive.parent / "results"
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in output.iterdir()}
    again = engine_run(archive, "-b", bundle)
    assert again.returncode == 0
    assert "finished already" in again.stderr
    assert before == {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in output.iterdir()}


def test_only_missing_parts_are_made(engine_run: Command, archive: Path, bundle: Path) -> None:
    engine_run(archive, "-b", bundle, "-o", "out", "--part-rows", 8)
    output = archive.parent / "out"
    whole = table(output)
    (output / "_SUCCESS").unlink()
    (output / "part-00002.parquet").unlink()
    (output / ".part-00003.parquet.tmp").write_bytes(b"half")
    kept = (output / "part-00001.parquet").stat().st_ino
    run = engine_run(archive, "-b", bundle, "-o", "out")  # part rows as recorded
    assert run.returncode == 0, run.stderr
    assert json.loads((output / "_SUCCESS").read_text())["last_start"]["rows"] == 8
    assert (output / "part-00001.parquet").stat().st_ino == kept
    assert not list(output.glob(".*.tmp"))
    assert table(output).equals(whole)


def test_a_folder_that_grew_is_resumed_from_its_listing(
    engine_run: Command, archive: Path, bundle: Path
) -> None:
    engine_run(archive, "-b", bundle, "-o", "out", "--part-rows", 8)
    output = archive.parent / "out"
    whole = table(output)
    (output / "_SUCCESS").unlink()
    (output / "part-00001.parquet").unlink()
    (archive / "a-new-one.png").write_bytes((archive / "image-00.png").read_bytes())
    run = engine_run(archive, "-b", bundle, "-o", "out")
    assert run.returncode == 0, run.stderr
    assert table(output).equals(whole)


def test_an_output_folder_with_another_run_is_left_alone(
    engine_run: Command, archive: Path, bundle: Path, tmp_path: Path
) -> None:
    engine_run(archive, "-b", bundle, "-o", "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other_bundle = write_bundle(tmp_path / "other", weights=(0.5, 0.5))
    (tmp_path / "list.txt").write_text("a.png\n")
    for arguments, complaint in [
        ((archive, "-b", other_bundle), "bundle_sha256 was"),
        ((tmp_path / "list.txt", "-b", bundle), "manifest_sha256 was"),
        ((archive, "-b", bundle, "--part-rows", 7), "part_rows was 1024, is 7"),
        ((archive, "-b", bundle, "--root", tmp_path), "root was"),
    ]:
        run = engine_run(*arguments, "-o", "out")
        assert run.returncode == 2
        assert complaint in run.stderr
        assert run.stderr.count("\n") == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run = engine_run(archive, "-b", other_bundle, "-o", "out", "--overwrite")
    assert run.returncode == 0, run.stderr
    assert engine.read_results(tmp_path / "out").shape[0] == 40


def test_a_folder_with_other_files_is_not_written_to(
    engine_run: Command, archive: Path, bundle: Path, tmp_path: Path
) -> None:
    for options in ([], ["--overwrite"]):
        run = engine_run(archive, "-b", bundle, "-o", archive, *options)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1)
        assert "holds no run" in run.stderr
    run = engine_run(archive, "-b", bundle, "-o", archive / "image-00.png")
    assert run.returncode == 2
    assert len(list(archive.iterdir())) == 40


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.csv"], "no such file"),
        (["empty.csv"], "0 bytes"),
        (["header.csv"], "no rows"),
        (["numbers.csv"], "not paths"),
        (["fine.csv", "-b", "nowhere"], "it has no ensemble.json; give a model folder"),
        (["clash.csv"], "'status' are names of result columns"),
        (["fine.csv", "--batch-size", "0"], "'0' is not a whole number from 1 to 4096"),
        (["fine.csv", "--batch-size", "1000000000"], "from 1 to 4096"),
        (["fine.csv", "--batch-size", "1e9"], "'1e9' is not a whole number"),
        (["fine.csv", "--read-timeout", "0"], "not a number between"),
        (["fine.csv", "--finish-by", "25:00"], "'25:00' is not a time"),
        (["fine.csv", "--finish-by", "2020-01-01T06:00"], "in the past"),
        (["fine.csv", "--root", "nowhere"], "no such folder"),
        (["fifo"], "neither a file nor a folder"),
        (["/dev/zero"], "neither a file nor a folder"),
        (["bundle", "--only-errors"], "the output folder of a run"),
        (["fine.csv", "--device", "gpu"], "allowed: auto, cpu, cuda:N"),
        (["fine.csv", "--device", "cuda:-1"], "allowed: auto, cpu, cuda:N"),
        (["fine.csv", "--runner", "torch", "--device", "cpu"], "needs a GPU"),
        (["fine.csv", "--precision", "fp16", "--device", "cpu"], "needs a GPU"),
        (["fine.csv", "--precision", "int4"], "invalid choice"),
        (["fine.csv", "--slots", "99"], "from 1 to 16"),
        (["fine.csv", "--runner", "tensorflow"], "allowed: auto, tensorrt, torch, onnx"),
        (["fine.csv", "--memory", "lots"], "argument --memory: 'lots' is not a size"),
        (["fine.csv", "--max-error-rate", "2"], "between 0 and 1"),
        (["fine.csv", "--shard", "5/4"], "--shard 5/4: allowed: K/N, with K from 1 to N"),
        (["fine.csv", "--shard", "1/4", "--overwrite"], "delete out before they start"),
        (["fine.csv", "--bogus"], "--bogus"),
        ([], "MANIFEST"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    engine_run: Command, tmp_path: Path, bundle: Path, arguments: list[str], complaint: str
) -> None:
    for name, text in {
        "empty.csv": "",
        "header.csv": "path\n",
        "numbers.csv": "id\n1\n",
        "fine.csv": "path\na.png\n",
        "clash.csv": "path,status\na.png,x\n",
    }.items():
        (tmp_path / name).write_text(text)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bundle").symlink_to(bundle)
    output = [] if "--only-errors" in arguments else ["-o", "out"]
    run = engine_run(*arguments, *output)
    assert run.returncode == 2
    assert complaint in run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
    assert not (tmp_path / "out").exists()


def test_column_prefix_lets_clashing_columns_through(
    engine_run: Command, archive: Path, bundle: Path
) -> None:
    (archive / "m.csv").write_text("path,status\nimage-00.png,scanned\n")
    run = engine_run(archive / "m.csv", "-b", bundle, "-o", "out", "--column-prefix", "manifest_")
    assert run.returncode == 0, run.stderr
    result = engine.read_results(archive.parent / "out")
    assert (result.manifest_status[0], result.status[0]) == ("scanned", "ok")


def test_error_rate_over_the_limit_is_status_3(engine_process: Command, archive: Path, bundle: Path) -> None:
    (archive / "m.csv").write_text("path\nimage-00.png\nnowhere.png\n")
    run = engine_process(archive / "m.csv", "-b", bundle, "-o", "out", "--max-error-rate", "0.4")
    assert run.returncode == 3
    assert "1 of 2 rows failed" in run.stderr
    assert (archive.parent / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    "signal_number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_the_run_and_the_same_command_goes_on(
    engine_run: Command, bundle: Path, tmp_path: Path, signal_number: int
) -> None:
    folder = write_images(tmp_path / "images", 8)
    lines = [f"images/image-{row % 8:02}{('.png', '.jpg')[row % 2]}" for row in range(6_000)]
    (tmp_path / "m.txt").write_text("\n".join(lines))
    assert folder.exists()
    command = [sys.executable, "-m", "engine.run", "m.txt", "-b", bundle, "-o", "out", "--part-rows", "100"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "out").glob("part-*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 5, errors
    assert "run the same command again to continue" in errors
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) < 60
    run = engine_run("m.txt", "-b", bundle, "-o", "out", "--part-rows", "100")
    assert run.returncode == 0, run.stderr
    assert engine.read_results(tmp_path / "out").row.tolist() == list(range(6_000))


def test_two_processes_never_share_a_folder(
    engine_process: Command, archive: Path, bundle: Path, tmp_path: Path
) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = engine_process(archive, "-b", bundle, "-o", "out")
    assert run.returncode == 2
    assert "another process" in run.stderr


def test_progress_is_plain_lines_and_the_table_adds_up(
    engine_process: Command, archive: Path, bundle: Path
) -> None:
    run = engine_process(archive, "-b", bundle, "-o", "out")
    assert re.search(r"40/40 rows, [\d.]+ images/s, 0 errors, ETA", run.stderr)
    assert re.search(r"rows\s+40\n.*ok\s+40\n", run.stderr)
    assert "limited by:" in run.stderr
    assert "\x1b" not in run.stderr


def test_missing_packages_are_reported_before_anything_is_written(
    tmp_path: Path, archive: Path, bundle: Path
) -> None:
    blocked = tmp_path / "blocked" / "nvidia"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not here')")
    run = subprocess.run(
        [sys.executable, "-m", "engine.run", archive, "-b", bundle, "-o", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": f"{blocked.parent}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "install it with: pip install -c constraints.txt ." in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_it_works_without_torch(tmp_path: Path, archive: Path, bundle: Path) -> None:
    """An interpreter in which torch can't be imported screens all the same."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "torchvision", "pandas", "scipy", "sklearn", "PIL", "tensorrt", "ray"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not to be imported')")
    run = subprocess.run(
        [sys.executable, "-m", "engine.run", archive, "-b", bundle, "-o", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": f"{blocked}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "_SUCCESS").exists()
