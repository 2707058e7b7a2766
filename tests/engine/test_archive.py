"""Members of zip and tar files: read in place, each its own bytes or a status, whatever the archive holds."""

from __future__ import annotations

import io
import os
import random
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from engine.records import Status
from engine.storage import ReadError, Storage, archive
from tests.conftest import Command, write_images
from tests.images import encode, smooth

PNG = encode(Image.fromarray(smooth(30, 40)), "PNG")
FILES = {f"site/{index:02}.png": PNG + bytes([index]) * index for index in range(20)}
MEGABYTE = 1 << 20


def tar_of(files: dict[str, bytes], **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as opened:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return buffer.getvalue()


def read(file: Path, name: str, *, most: int = MEGABYTE) -> bytes:
    def admit(size: int) -> None:
        if size > most:
            raise ReadError(Status.TOO_LARGE, f"{size} bytes")

    archive._ARCHIVES.__init__()  # nothing kept from the test before
    return Storage(file.parent).read(f"{file.name}::{name}", admit)


def refusal(file: Path, name: str) -> tuple[Status, str]:
    with pytest.raises(ReadError) as caught:
        read(file, name)
    assert "\n" not in str(caught.value)
    return caught.value.status, str(caught.value)


def saved(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


KINDS = {
    "a.tar": tar_of(FILES),
    "gnu.tar": tar_of(FILES, format=tarfile.GNU_FORMAT),
    "a.zip": zip_of(FILES),
    "STORED.ZIP": zip_of(FILES, zipfile.ZIP_STORED),
    "prefix.zip": b"#!/bin/sh\n" + zip_of(FILES),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_member_in_any_thread(tmp_path: Path, name: str) -> None:
    saved(tmp_path, name, KINDS[name])
    if name == "prefix.zip":  # begins like none
        assert refusal(tmp_path / name, "site/00.png")[0] is Status.CORRUPT
        return
    storage = Storage(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        wanted = list(FILES) * 5
        found = pool.map(lambda member: storage.read(f"{name}::{member}", lambda size: None), wanted)
        assert list(found) == [FILES[member] for member in wanted]
    assert storage.exists(f"{name}::site/00.png")
    assert not storage.exists(f"no-{name}::site/00.png")


def test_long_and_strange_names(tmp_path: Path) -> None:
    names = [
        "a/" * 120 + "x.png",
        "ü" * 90 + ".png",
        "new\nline.png",
        "../up.png",
        "/root.png",
        "a::b.tar::c.png",
    ]
    files = {name: name.encode() for name in names}
    for file in (saved(tmp_path, "n.tar", tar_of(files)), saved(tmp_path, "n.zip", zip_of(files))):
        for name in names:
            assert read(file, name) == files[name], (file, name)


def test_the_last_of_several_counts(tmp_path: Path) -> None:
    twice = tar_of({"a": b"old"})[:1024] + tar_of({"a": b"newer", "b": b"b"})
    assert read(saved(tmp_path, "t.tar", twice), "a") == b"newer"


def test_what_is_no_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("dev", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info)
    file = saved(tmp_path, "l.tar", buffer.getvalue())
    for name in ("link", "hard", "dev"):
        assert refusal(file, name)[0] is Status.UNREADABLE
    assert refusal(file, "none") == (Status.MISSING, "the archive has no such member")
    assert refusal(tmp_path / "no.tar", "a")[0] is Status.MISSING
    os.mkfifo(tmp_path / "fifo.tar")
    assert refusal(tmp_path / "fifo.tar", "a")[0] in (Status.UNREADABLE, Status.CORRUPT)
    (tmp_path / "folder.tar").mkdir()
    assert refusal(tmp_path / "folder.tar", "a")[0] is Status.UNREADABLE


def test_zip_members_that_can_not_be_had(tmp_path: Path) -> None:
    data = bytearray(zip_of({"a": b"a" * 5000}))
    entry = data.index(b"PK\x01\x02")
    for change, status in (
        (("<H", 8, 1), Status.UNREADABLE),  # encrypted
        (("<H", 10, 12), Status.UNSUPPORTED),  # bzip2
        (("<I", 16, 12345), Status.CORRUPT),  # another checksum
        (("<I", 24, 4999), Status.CORRUPT),  # shorter than it is
        (("<I", 24, 5001), Status.CORRUPT),  # longer
        (("<I", 24, 0xFFFFFFF0), Status.TOO_LARGE),
        (("<I", 42, 7), Status.CORRUPT),  # a header that is elsewhere
    ):
        form, place, value = change
        wrong = bytearray(data)
        struct.pack_into(form, wrong, entry + place, value)
        assert refusal(saved(tmp_path, "w.zip", bytes(wrong)), "a")[0] is status, change
    flipped = bytearray(data)
    flipped[40] ^= 0x55
    assert refusal(saved(tmp_path, "f.zip", bytes(flipped)), "a")[0] is Status.CORRUPT


def test_a_bomb_is_never_inflated(tmp_path: Path) -> None:
    file = saved(tmp_path, "bomb.zip", zip_of({"a": bytes(300 * MEGABYTE)}))
    assert refusal(file, "a") == (Status.TOO_LARGE, f"{300 * MEGABYTE} bytes")
    lying = bytearray(file.read_bytes())
    struct.pack_into("<I", lying, lying.index(b"PK\x01\x02") + 24, 1000)
    assert refusal(saved(tmp_path, "lying.zip", bytes(lying)), "a")[0] is Status.CORRUPT


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_cut_anywhere(tmp_path: Path, name: str) -> None:
    """Each member is itself or has a reason; a tar gives what lies before the cut."""
    whole = KINDS[name]
    for end in range(0, len(whole), 3 * 512):
        file = saved(tmp_path, name, whole[:end])
        given, statuses = 0, set()
        for member in FILES:
            try:
                given += read(file, member) == FILES[member]
            except ReadError as error:
                statuses.add(error.status)
        assert statuses <= {Status.CORRUPT, Status.TRUNCATED, Status.MISSING}, end
        assert given == 0 if name.endswith("zip") else given <= end // 512


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    rng = random.Random(0)
    for name in ("a.tar", "a.zip"):
        for _ in range(150):
            data = bytearray(KINDS[name])
            for _ in range(rng.randrange(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            file = saved(tmp_path, name, bytes(data))
            for member in ("site/03.png", "site/19.png"):
                with suppress(ReadError):
                    found = read(file, member)
                    assert name == "a.tar" or found == FILES[member]


def test_an_archive_as_manifest(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 6)
    loose = engine_run(folder, "-b", bundle, "-o", "loose")
    assert loose.returncode == 0
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir(), reverse=True)}
    extra = {"__MACOSX/x.png": PNG, ".hidden.png": PNG, "notes.txt": b"hello", "broken.png": b""}
    expected = pd.read_parquet(tmp_path / "loose").set_index("path")
    for name, make in (("a.tar", tar_of), ("a.zip", zip_of)):
        file = saved(tmp_path, name, make(files | extra))
        done = engine_run(file, "-b", bundle, "-o", f"out-{name}", "--part-rows", 4)
        assert done.returncode == 0, done.stderr
        assert "listed 7 images; skipped 2 hidden, 1 not images" in done.stderr
        rows = pd.read_parquet(tmp_path / f"out-{name}")
        assert list(rows["path"]) == [f"{name}::{member}" for member in [*files, "broken.png"]]
        assert list(rows["status"]) == ["ok"] * 6 + ["empty"]
        for path, score in zip(rows["path"][:6], rows["p_normal"], strict=False):
            assert score == expected["p_normal"][path.split("::")[1]]
        again = engine_run(file, "-b", bundle, "-o", f"out-{name}", "--part-rows", 4)
        assert (again.returncode, "finished already" in again.stderr) == (0, True)


def test_archives_that_are_none(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    saved(tmp_path, "cut.tar", KINDS["a.tar"][:5000])
    saved(tmp_path, "cut.zip", KINDS["a.zip"][:5000])
    for name in ("cut.tar", "cut.zip"):
        done = engine_run(tmp_path / name, "-b", bundle, "-o", "out")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert not (tmp_path / "out").exists()


def test_members_in_a_list(engine_run: Command, bundle: Path, tmp_path: Path) -> None:
    saved(tmp_path, "a.tar", KINDS["a.tar"])
    (tmp_path / "list.csv").write_text("path\na.tar::site/03.png\na.tar::none\nb.zip::x\n")
    done = engine_run(tmp_path / "list.csv", "-b", bundle, "-o", "out")
    assert done.returncode == 0, done.stderr
    assert list(pd.read_parquet(tmp_path / "out")["status"]) == ["ok", "missing", "missing"]
