"""Folders to lists: what is listed, in which order, what is left out and counted."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

import engine
from engine.core.errors import UsageError
from engine.manifest.listing import FileLister, list_location, read_skipped
from engine.storage import local
from tests.helpers.images import encode, smooth, write_images
from tests.helpers.processes import Command, run_module

PNG = encode(Image.fromarray(smooth(30, 40)), "PNG")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def listed(folder: Path, **globs: list[str]) -> tuple[list[str], dict[str, int]]:
    listing = FileLister(**globs)
    return [entry.path for entry in listing.folder(folder)], dict(listing.skipped)


def test_order_is_by_folder_and_name(tmp_path: Path) -> None:
    names = ["b.png", "a/z.png", "a/b/x.png", "a/A.png", "a.png", "c/1.png", "B.png", "a b.png"]
    write(tmp_path, dict.fromkeys(names, PNG))
    expected = ["B.png", "a b.png", "a.png", "b.png", "a/A.png", "a/z.png", "a/b/x.png", "c/1.png"]
    assert listed(tmp_path) == (expected, {})


def test_content_decides_and_names_like_images_stay(tmp_path: Path) -> None:
    files = {
        "scan": PNG,  # an image without an extension
        "dicom": bytes(128) + b"DICM",
        "IM0001": b"\x08\x00\x05\x00CS\x0a\x00",
        "empty.png": b"",
        "text.jpg": b"hello",
        "notes.txt": b"hello",
        "empty": b"",
        ".hidden.png": PNG,
        ".cache/x.png": PNG,
        "more.zip": b"PK\x03\x04",
    }
    paths, skipped = listed(write(tmp_path, files))
    assert paths == ["IM0001", "dicom", "empty.png", "scan", "text.jpg"]
    assert skipped == {"hidden": 2, "not images": 2, "archives": 1}


def test_links_fifos_and_strange_names(tmp_path: Path) -> None:
    write(
        tmp_path, {"real/a.png": PNG, "new\nline.png": PNG, "a::b.png": PNG, "100%.png": PNG, "[x].png": PNG}
    )
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / os.fsdecode(b"\xff\xfe.png")).write_bytes(PNG)
    paths, skipped = listed(tmp_path)
    assert set(paths) == {
        *("100%.png", "[x].png", "a::b.png", "broken", "broken.png", "fifo.png", "link.png"),
        *("new\nline.png", "??.png", "real/a.png"),
    }
    assert skipped == {"links to folders": 1, "neither files nor folders": 1}


def test_globs(tmp_path: Path) -> None:
    names = ["a.png", "b.dcm", "x/a.png", "x/y/a.png", "x/y/b.dcm", "backup/a.png", "x/backup/a.png"]
    write(tmp_path, dict.fromkeys(names, PNG))
    assert listed(tmp_path, include=["*.dcm"]) == (["b.dcm", "x/y/b.dcm"], {"excluded": 5})
    assert listed(tmp_path, exclude=["/backup/"])[0] == [
        "a.png",
        "b.dcm",
        "x/a.png",
        "x/backup/a.png",
        *names[3:5],
    ]
    assert listed(tmp_path, exclude=["backup/"])[0] == ["a.png", "b.dcm", "x/a.png", "x/y/a.png", "x/y/b.dcm"]
    assert listed(tmp_path, include=["x/**"], exclude=["**/y/*.dcm"])[0] == [
        "x/a.png",
        "x/backup/a.png",
        "x/y/a.png",
    ]
    assert listed(tmp_path, include=["*.PNG"])[0] == []


@pytest.mark.parametrize("glob", ["!", "", "#1/*"])
@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_an_invalid_glob(tmp_path: Path, glob: str, kind: str) -> None:
    with pytest.raises(UsageError, match="not globs"):
        listed(write(tmp_path, {"a.png": PNG}), **{kind: ["*.png", glob]})


def test_a_folder_that_can_not_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a/a.png": PNG, "b/b.png": PNG})
    scandir = os.scandir

    def denied(path: Path) -> object:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("engine.manifest.listing.os.scandir", denied)
    assert listed(tmp_path) == (["b/b.png"], {"folders that can't be read": 1})


def test_the_list_holds_size_time_and_counts(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.png": PNG, "note": b"x"})
    os.utime(folder / "a.png", ns=(0, 1_700_000_000_123_456_789))
    target = tmp_path / "list.parquet"
    assert list_location(folder, target, include=[], exclude=[], own=None) == 1
    (row,) = pq.read_table(target).to_pylist()
    moment = datetime.fromtimestamp(1_700_000_000, UTC).replace(microsecond=123_456)
    assert row == {"path": "a.png", "file_size": len(PNG), "file_mtime": moment}
    assert read_skipped(target) == {"not images": 1}


def test_a_run_over_a_folder_reports_skipped_files(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 4)
    write(folder, {"notes.txt": b"hello", ".DS_Store": b"x", "old/a.png": PNG})
    options = ("-b", bundle, "-o", folder / "results", "--exclude", "old/")
    done = engine_run(folder, *options)
    assert done.returncode == 0, done.stderr
    assert "listed 4 images; skipped 1 excluded, 1 hidden, 1 not images" in done.stderr
    run = json.loads((folder / "results" / "_run.json").read_text())
    assert run["not_listed"] == {"excluded": 1, "hidden": 1, "not images": 1}
    rows = engine.read_results(folder / "results")
    assert list(rows["file_size"]) == [(folder / path).stat().st_size for path in rows["path"]]
    again = engine_run(folder, "-b", bundle, "-o", folder / "results")
    assert (again.returncode, "exclude was ['old/'], is []" in again.stderr) == (2, True), again.stderr
    wrong = engine_run(tmp_path / "list.csv", "-b", bundle, "--include", "*.png")
    assert wrong.returncode == 2
    (tmp_path / "list.csv").write_text("path\nin/image-00.png\n")
    wrong = engine_run(tmp_path / "list.csv", "-b", bundle, "--include", "*.png")
    assert (wrong.returncode, "are for folders and archives" in wrong.stderr) == (2, True)
    nothing = engine_run(folder, "-b", bundle, "-o", "none", "--include", "*.gif")
    assert (nothing.returncode, "listed 0 images; skipped" in nothing.stderr) == (2, True)
    assert not (tmp_path / "none").exists()


def test_the_list_as_a_manifest(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 4)

    def manifest(*arguments: str | Path) -> tuple[int, str]:
        done = run_module("engine.manifest", arguments, folder=tmp_path, timeout_s=60)
        return done.returncode, done.stderr

    assert manifest(folder, "-o", folder / "list.parquet") == (0, "listed 4 images\n")
    assert manifest(folder, "-o", "list.parquet", "--include", "*.jpg")[0] == 0
    assert manifest(folder, "-o", "list.parquet")[0] == 2
    assert manifest(folder, "-o", "list.parquet", "--overwrite")[0] == 0
    assert manifest(tmp_path / "nowhere")[0] == 2
    assert manifest(folder, "-o", "no/where.parquet")[0] == 1
    assert list(pd.read_parquet(folder / "list.parquet")["path"]) == sorted(local_names(folder))
    assert list(pd.read_parquet(tmp_path / "list.parquet")["path"]) == sorted(
        str(folder / name) for name in local_names(folder)
    )
    for index, source in enumerate((folder / "list.parquet", tmp_path / "list.parquet")):
        done = engine_run(source, "-b", bundle, "-o", f"out{index}")
        assert done.returncode == 0, done.stderr
        assert set(engine.read_results(tmp_path / f"out{index}")["status"]) == {"ok"}


def local_names(folder: Path) -> list[str]:
    assert local.exists(str(folder))
    return [path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg")]


def changed(folder: Path) -> None:
    """One image is new, one changed, one only touched, one gone."""
    images = sorted(folder.glob("image-*"))
    (folder / "new.png").write_bytes(PNG)
    images[0].write_bytes(images[2].read_bytes())
    os.utime(images[1], ns=(0, 1))
    images[3].unlink()


def test_since_screens_what_is_new_or_changed(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 6)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xd9")
    first = engine_run(folder, "-b", bundle, "-o", "monday", "--part-rows", 4)
    assert first.returncode == 0, first.stderr
    changed(folder)
    done = engine_run(folder, "-b", bundle, "-o", "tuesday", "--since", "monday")
    assert done.returncode == 0, done.stderr
    assert "4 of 7 rows are new or changed since" in done.stderr
    rows = engine.read_results(tmp_path / "tuesday")
    # what failed on Monday is tried again
    assert list(rows["path"]) == ["broken.jpg", "image-00.png", "image-01.jpg", "new.png"]
    again = engine_run(folder, "-b", bundle, "-o", "tuesday", "--since", "monday")
    assert (again.returncode, "finished already" in again.stderr) == (0, True)
    (folder / "broken.jpg").unlink()
    (folder / "newer.png").write_bytes(PNG)
    # what Tuesday left out because of Monday is not new on Wednesday
    done = engine_run(folder, "-b", bundle, "-o", "wednesday", "--since", "tuesday")
    assert "1 of 7 rows are new or changed since" in done.stderr, done.stderr
    nothing = engine_run(folder, "-b", bundle, "-o", "thursday", "--since", "wednesday")
    assert (nothing.returncode, "no row is new or changed" in nothing.stderr) == (0, True), nothing.stderr
    assert not (tmp_path / "thursday").exists()
    shutil.rmtree(tmp_path / "monday")
    done = engine_run(folder, "-b", bundle, "-o", "friday", "--since", "wednesday")
    assert "3 of 7 rows are new or changed since" in done.stderr, done.stderr


def test_since_another_bundle_screens_all(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    from tests.helpers.bundles import write_bundle

    folder = write_images(tmp_path / "in", 3)
    assert engine_run(folder, "-b", bundle, "-o", "one").returncode == 0
    other = write_bundle(tmp_path / "other", weights=(0.5, 0.5))
    done = engine_run(folder, "-b", other, "-o", "two", "--since", "one")
    assert done.returncode == 0, done.stderr
    assert "the bundle has changed since" in done.stderr
    assert len(engine.read_results(tmp_path / "two")) == 3


def test_since_with_incomparable_runs_is_refused(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 2)
    (tmp_path / "list.txt").write_text("in/image-00.png\n")
    assert engine_run(tmp_path / "list.txt", "-b", bundle, "-o", "plain").returncode == 0
    assert engine_run(folder, "-b", bundle, "-o", "whole").returncode == 0
    (tmp_path / "whole" / "_SUCCESS").rename(tmp_path / "kept")
    for source, old, words in (
        (folder, "nowhere", "no _run.json there"),
        (folder, "plain", "its results have no column 'file_"),
        (folder, "whole", "that run is not finished"),
    ):
        done = engine_run(source, "-b", bundle, "-o", "out", "--since", old)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    (tmp_path / "kept").rename(tmp_path / "whole" / "_SUCCESS")
    done = engine_run(tmp_path / "list.txt", "-b", bundle, "-o", "out", "--since", "whole")
    assert (done.returncode, "needs columns file_size and file_mtime" in done.stderr) == (2, True), (
        done.stderr
    )
    assert not (tmp_path / "out").exists()
