"""Members of archives: read where they lie, whatever the archive is made of."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import struct
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

import engine
from engine.core.errors import EngineError, UsageError
from engine.core.overlap import Meter
from engine.core.records import Part, Status
from engine.core.settings import Limits
from engine.manifest.manifest import open_manifest
from engine.reader.reader import Reader
from engine.storage import archive
from engine.storage.errors import ReadError
from tests.helpers.images import encode, smooth
from tests.helpers.pixels import read_batches
from tests.helpers.processes import Command

PNG = encode(Image.fromarray(smooth(30, 40)), "PNG")
Entry = bytes | tarfile.TarInfo


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_cache", archive._ArchiveCache())


def tar(path: Path, members: list[tuple[str, Entry]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as opened:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, content in members:
            opened.writestr(name, content)
    return path


MAKERS: list[Callable[..., Path]] = [tar, zipped]


def outcome(path: Path | str, allowed: int = 1 << 20) -> bytes | Status:
    """What a row gets: the bytes, or the status; its reason is one line that names no place."""

    def admit(size: int) -> None:
        if size > allowed:
            raise ReadError(Status.TOO_LARGE, "refused")

    try:
        return archive.read(str(path), admit)
    except ReadError as error:
        return status_of(error)


def status_of(error: ReadError) -> Status:
    assert re.fullmatch(r"(?!.*/tmp).+", str(error))
    return error.status


def listed(path: Path) -> list[str] | Status:
    try:
        with archive.list_images(path, path.parent) as (images, _):
            return [name for name, _ in images]
    except ReadError as error:
        return status_of(error)


def read(root: Path, paths: list[str], threads: int = 16) -> dict[str, bytes | Status]:
    result: dict[str, bytes | Status] = {}
    for batch in read_batches(root, paths, batch_size=4, threads=threads):
        for position, data in enumerate(batch.encoded):
            path = paths[batch.start + position]
            result[path] = data if batch.status[position] == Status.OK else Status(batch.status[position])
    return result


def test_scores_are_those_of_the_loose_files(
    engine_run: Command, archive: Path, bundle: Path, tmp_path: Path
) -> None:
    """One CSV over a .tar, a .zip and loose files; then the .tar alone, stopped and gone on with."""
    names = sorted(path.name for path in archive.iterdir())[:12]
    with tarfile.open(tmp_path / "a.tar", "w") as as_tar, zipfile.ZipFile(tmp_path / "B.ZIP", "w") as as_zip:
        for name in reversed(names):
            as_tar.add(archive / name, f"./ward 1/{name}")
            as_zip.write(archive / name, f"Ü/{name}")
        as_tar.add(archive / names[0], "./.hidden.png")
    rows = [f"archive/{name}" for name in names] + [f"a.tar::ward 1/{name}" for name in names]
    rows += [f"B.ZIP::Ü/{name}" for name in names] + ["a.tar::nowhere.png", "none.zip::x.png"]
    pd.DataFrame({"path": rows}).to_csv(tmp_path / "m.csv", index=False)
    run = engine_run("m.csv", "-b", bundle, "-o", "out", "--batch-size", 5)
    assert run.returncode == 0, run.stderr
    result = engine.read_results(tmp_path / "out")
    assert result.status.tolist() == ["ok"] * 36 + ["missing"] * 2
    scores = [column for column in result if column.startswith("p_")]
    loose, of_tar, of_zip = (result[scores].to_numpy()[start : start + 12] for start in (0, 12, 24))
    assert np.array_equal(loose, of_tar)
    assert np.array_equal(loose, of_zip)

    for _ in range(2):
        run = engine_run("a.tar", "-b", bundle, "-o", "whole", "--batch-size", 5)
        assert run.returncode == 0, run.stderr
        assert "listed 12 images; skipped 1 hidden" in run.stderr or "finished already" in run.stderr
    whole = engine.read_results(tmp_path / "whole")
    assert whole.path.tolist() == [f"a.tar::ward 1/{name}" for name in reversed(names)]
    assert np.array_equal(whole[scores].to_numpy()[::-1], loose)


@pytest.mark.parametrize("make", MAKERS)
def test_many_threads_read_one_archive(tmp_path: Path, make: Callable[..., Path]) -> None:
    pictures = {f"d/{index}.png": PNG + bytes([index]) * index for index in range(200)}
    position = make(tmp_path / ("x.tar" if make is tar else "x.zip"), list(pictures.items()))
    before = threading.active_count()
    with ThreadPoolExecutor(16) as pool:
        names = random.Random(0).choices(list(pictures), k=3000)
        for name, result in zip(
            names, pool.map(lambda name: outcome(f"{position}::{name}"), names), strict=True
        ):
            assert result == pictures[name]
    assert threading.active_count() == before


def test_each_row_of_a_hostile_tar_has_its_status(tmp_path: Path) -> None:
    def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo()
        info.type, info.linkname = kind, target
        return info

    long = "/".join(["n" * 200] * 18) + "/x.png"
    expected: list[tuple[str, Entry, bytes | Status]] = [
        ("a.png", PNG, PNG),
        ("../up.png", PNG, PNG),
        ("/etc/abs.png", PNG, PNG),
        ("two\nlines.png", PNG, PNG),
        ("b.tar::c.png", PNG, PNG),
        ("骨/Übersicht.png", PNG, PNG),
        (long, PNG, PNG),
        ("twice.png", b"first", b"second"),
        ("twice.png", b"second", b"second"),
        ("empty.png", b"", b""),
        ("folder.png", special(tarfile.DIRTYPE), Status.UNREADABLE),
        ("soft.png", special(tarfile.SYMTYPE, "a.png"), Status.UNREADABLE),
        ("hard.png", special(tarfile.LNKTYPE, "a.png"), Status.UNREADABLE),
        ("pipe.png", special(tarfile.FIFOTYPE), Status.UNREADABLE),
        ("disk.png", special(tarfile.BLKTYPE), Status.UNREADABLE),
        ("sparse.png", special(tarfile.GNUTYPE_SPARSE), Status.UNSUPPORTED),
    ]
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        position = tar(
            tmp_path / f"{number}.tar", [(name, content) for name, content, _ in expected], format=form
        )
        for name, _, status in expected:
            assert outcome(f"{position}::{name}") == status, name
        assert outcome(f"{position}::nowhere.png") == Status.MISSING
        assert outcome(f"{position}::") == Status.MISSING
        names = [name for name, _, _ in expected]
        del names[7], names[names.index("folder.png")]
        assert listed(position) == [f"{position.name}::{name}" for name in names]
        with archive.list_images(position, tmp_path) as (_, left_out):
            assert left_out == {"replaced by a later member of the same name": 1}


def test_a_name_that_is_not_utf8_is_still_a_row(tmp_path: Path) -> None:
    position = tar(
        tmp_path / "x.tar", [("R\udcf6ntgen.png", PNG)], encoding="utf-8", errors="surrogateescape"
    )
    (row,) = listed(position)
    assert row == r"x.tar::R\xf6ntgen.png"
    assert outcome(tmp_path / row) == PNG


def patched(place: Path, offset: int, value: bytes) -> Path:
    """The same archive with other bytes in the directory entry of its only member."""
    data = bytearray(place.read_bytes())
    at = data.rfind(b"PK\x01\x02") + offset
    data[at : at + len(value)] = value
    place.write_bytes(data)
    return place


FLAGS, METHOD, CRC, PACKED, SIZE, LOCAL = 8, 10, 16, 20, 24, 42


@pytest.mark.parametrize(
    ("offset", "value", "status"),
    [
        (FLAGS, b"\1\0", Status.UNREADABLE),
        (METHOD, b"\x0e\0", Status.UNSUPPORTED),
        (METHOD, b"\0\0", Status.CORRUPT),
        (CRC, b"\1\2\3\4", Status.CORRUPT),
        (PACKED, b"\1\0\0\0", Status.CORRUPT),
        (PACKED, b"\0\0\0\x70", Status.CORRUPT),
        (SIZE, b"\1\0\0\0", Status.CORRUPT),
        (SIZE, b"\0\0\x0f\0", Status.CORRUPT),
        (SIZE, b"\0\0\0\x70", Status.TOO_LARGE),
        (LOCAL, b"\1\0\0\0", Status.CORRUPT),
        (LOCAL, b"\0\0\0\x70", Status.CORRUPT),
    ],
)
def test_a_zip_that_lies_about_a_member(tmp_path: Path, offset: int, value: bytes, status: Status) -> None:
    position = patched(zipped(tmp_path / "x.zip", [("a.png", PNG)]), offset, value)
    assert outcome(f"{position}::a.png") == status
    assert listed(position) == ["x.zip::a.png"]


def test_a_bomb_is_refused_or_stops_at_its_declared_size(tmp_path: Path) -> None:
    position = zipped(tmp_path / "x.zip", [("a.png", bytes(64 << 20))])
    tracemalloc.start()
    assert outcome(f"{position}::a.png") == Status.TOO_LARGE
    patched(position, SIZE, struct.pack("<I", 100_000))
    assert outcome(f"{position}::a.png") == Status.UNREADABLE, "it changed"
    archive._cache.drop(str(position))
    assert outcome(f"{position}::a.png") == Status.CORRUPT
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_zip_links_folders_twins_and_wide_fields(tmp_path: Path) -> None:
    position = tmp_path / "x.zip"
    with zipfile.ZipFile(position, "w") as opened:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        opened.writestr(link, "a.png")
        opened.writestr("d.png/", b"")
        with opened.open("wide.png", "w", force_zip64=True) as member:
            member.write(PNG)
        opened.writestr("twice.png", b"first")
        with pytest.warns(UserWarning, match="Duplicate"):
            opened.writestr("twice.png", PNG)
    position.write_bytes(b"#!/bin/sh\n" + position.read_bytes())  # as a self-extracting archive begins
    assert outcome(f"{position}::link.png") == Status.UNREADABLE
    assert outcome(f"{position}::d.png/") == Status.UNREADABLE
    assert outcome(f"{position}::wide.png") == outcome(f"{position}::twice.png") == PNG
    assert listed(position) == ["x.zip::link.png", "x.zip::wide.png", "x.zip::twice.png"]


@pytest.mark.parametrize("make", MAKERS)
def test_cut_anywhere(tmp_path: Path, make: Callable[..., Path]) -> None:
    """A member gives its own bytes or a status, and a shorter archive is never taken for a whole one."""
    noise = random.Random(1)
    contents = {f"{index}.png": PNG + noise.randbytes(900) for index in range(8)}
    whole = make(tmp_path / "whole", list(contents.items())).read_bytes()
    end = len(whole.rstrip(b"\0")) if make is tar else len(whole)
    statuses = set()
    for length in range(0, end, 512):
        position = tmp_path / (f"{length}.tar" if make is tar else f"{length}.zip")
        position.write_bytes(whole[:length])
        for name, content in contents.items():
            result = outcome(f"{position}::{name}")
            statuses.add(result if isinstance(result, Status) else "ok")
            assert result == content or result in (Status.TRUNCATED, Status.CORRUPT, Status.MISSING)
        listing = listed(position)
        if isinstance(listing, list):
            assert make is tar, "which may end where a member does"
            assert all(isinstance(outcome(tmp_path / row), bytes) for row in listing)
        else:
            assert listing in (Status.TRUNCATED, Status.CORRUPT)
    assert Status.TRUNCATED in statuses


@pytest.mark.parametrize("make", MAKERS)
def test_damage_anywhere(tmp_path: Path, make: Callable[..., Path]) -> None:
    rng = random.Random(2)
    contents = {f"{index}.png": PNG[: 60 + index] for index in range(4)}
    whole = make(tmp_path / "whole", list(contents.items())).read_bytes()
    position = tmp_path / ("x.tar" if make is tar else "x.zip")
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4, 30))):
            at = rng.randrange(len(data))
            data[at : at + 4] = rng.choice((rng.randbytes(1), b"\xff\xff\xff\xff", b"\0\0\0\0"))
        position.write_bytes(data)
        archive._cache.drop(str(position))
        for name, content in contents.items():
            result = outcome(f"{position}::{name}")
            if make is zipped:  # which has checksums
                assert isinstance(result, Status) or result == content
        listing = listed(position)
        for row in listing if isinstance(listing, list) else []:
            outcome(tmp_path / row)


def header(kind: bytes, content: bytes, size: bytes | None = None) -> bytes:
    """A block of a .tar with any size field and what follows it."""
    info = tarfile.TarInfo("x.png")
    info.type, info.size = kind, len(content)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size is not None:
        block[124:136] = size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % 512)


def negative(size: int) -> bytes:
    return (size + (1 << 96)).to_bytes(12)


@pytest.mark.parametrize(
    "hostile",
    [
        header(tarfile.REGTYPE, b"", negative(-1024)),
        header(tarfile.XHDTYPE, b"", negative(-1024)),
        header(tarfile.REGTYPE, b"", b"\x80" + b"\xff" * 11),
        header(tarfile.GNUTYPE_LONGNAME, b"", b"\x80" + bytes(3) + b"\xff" * 8),
        header(tarfile.GNUTYPE_LONGNAME, bytes(1 << 20)),
        header(tarfile.XHDTYPE, b"1" * 15_000),
        header(tarfile.XHDTYPE, b"2 " * 5_000 + b"x="),
        header(tarfile.XHDTYPE, b"24 GNU.sparse.major=1\n" * 2),
        header(tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
        + header(tarfile.REGTYPE, b"9999999\n" + b"0\n" * 500_000),
        header(tarfile.XHDTYPE, b"") * 3000,
        b"".join(header(tarfile.XGLTYPE, b"9 k%03d=1\n" % n) + header(b"0", b"") for n in range(999)),
        header(tarfile.XHDTYPE, b"19 path=a\0b/../c.png\n"),
        header(tarfile.XHDTYPE, b"30 size=99999999999999999999\n"),
        header(b"Z", b"abc"),
    ],
)
def test_hostile_headers_of_a_tar(tmp_path: Path, hostile: bytes) -> None:
    good = header(b"0", PNG).replace(b"x.png", b"y.png", 1)
    data = tar(tmp_path / "good", [("y.png", PNG)]).read_bytes()[: 512 + len(PNG) + (-len(PNG)) % 512]
    assert len(good) == len(data)
    position = tmp_path / "x.tar"
    position.write_bytes(data + hostile + header(b"0", PNG) + bytes(1024))
    tracemalloc.start()
    assert outcome(f"{position}::y.png") == PNG, "what comes before is sound"
    outcome(f"{position}::x.png")
    listing = listed(position)
    assert isinstance(listing, list) or listing in (Status.TRUNCATED, Status.CORRUPT, Status.UNSUPPORTED)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_a_directory_of_millions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    position = zipped(tmp_path / "x.zip", [(f"{index}", b"x") for index in range(2000)])
    monkeypatch.setattr(archive, "MAX_ZIP_MEMBERS", 1000)
    assert outcome(f"{position}::1") == Status.UNSUPPORTED
    archive._cache.drop(str(position))
    monkeypatch.setattr(archive, "MAX_ZIP_DIRECTORY", 10_000)
    assert outcome(f"{position}::1") == Status.UNSUPPORTED


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("x.tar", b"", Status.TRUNCATED),
        ("x.tar", b"no archive" * 200, Status.CORRUPT),
        ("x.zip", b"no archive" * 200, Status.TRUNCATED),
        ("x.tar.gz", b"\x1f\x8b\x08\0 and so on", Status.UNSUPPORTED),
        ("x.tar", b"\x28\xb5\x2f\xfd and so on", Status.UNSUPPORTED),
        ("x.tgz", b"\x1f\x8b\x08\0 and so on", Status.UNSUPPORTED),
    ],
)
def test_files_that_are_no_archives(tmp_path: Path, name: str, content: bytes, status: Status) -> None:
    (tmp_path / name).write_bytes(content)
    assert outcome(f"{tmp_path / name}::a.png") == status
    if content:
        with pytest.raises(UsageError, match=rf"{name}: the archive"):
            open_manifest(tmp_path / name, listing=tmp_path / "listing.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    (tmp_path / "y.tar").mkdir()
    assert outcome(f"{tmp_path}/x.tar::a") == outcome(f"{tmp_path}/y.tar::a") == Status.UNREADABLE


def test_a_plain_file_of_that_name_where_there_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x.tar::a.png").write_bytes(PNG)
    (tmp_path / "d.zip::e").mkdir()
    tar(tmp_path / "d.zip::e" / "y.tar", [("a.png", PNG)])
    assert outcome(tmp_path / "x.tar::a.png") == PNG
    assert outcome(f"{tmp_path}/d.zip::e/y.tar::a.png") == PNG
    assert archive.exists(f"{tmp_path}/x.tar::a.png")
    tar(tmp_path / "x.tar", [("b.png", PNG)])
    assert outcome(tmp_path / "x.tar::a.png") == Status.MISSING
    assert archive.exists(f"{tmp_path}/x.tar::no-such-member")
    assert not archive.exists(f"{tmp_path}/z.tar::a.png")


def test_an_archive_that_changes_or_goes_away(tmp_path: Path) -> None:
    position = tar(tmp_path / "x.tar", [(f"{index}.png", PNG) for index in range(8)])
    rows = [f"x.tar::{index}.png" for index in range(8)]
    assert set(read(tmp_path, rows).values()) == {PNG}
    with tarfile.open(position, "a") as opened:
        opened.add(__file__)
    assert set(read(tmp_path, rows).values()) == {Status.UNREADABLE}
    loose = tmp_path / "loose.png"
    loose.write_bytes(PNG)
    position.unlink()
    result = read(tmp_path, ["loose.png", *rows], threads=1)
    assert result.pop("loose.png") == PNG
    assert set(result.values()) == {Status.MISSING}
    position = tar(tmp_path / "y.tar", [(f"{index}.png", PNG) for index in range(8)])
    reader = Reader(tmp_path, batch_size=1, threads=1, limits=Limits(), ahead=False)
    rows = [f"y.tar::{index}.png" for index in range(8)]
    stage = reader.stage([Part(0, np.arange(8), rows, pa.table({}))], Meter("read"))
    next(stage)
    position.unlink()
    with pytest.raises(EngineError, match="disappeared"):
        list(stage)


def test_few_archives_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_CACHED_ARCHIVES", 4)
    monkeypatch.setattr(archive, "MAX_CACHED_MEMBERS", 5)
    first = tar(tmp_path / "0.tar", [("a", b"0"), ("b", b"1")])
    for index in range(1, 12):
        shutil.copy(first, tmp_path / f"{index}.tar")
    before = len(os.listdir("/proc/self/fd"))
    for index in [*range(12), 0]:
        assert outcome(f"{tmp_path}/{index}.tar::b") == b"1"
        assert len(archive._cache._archives) <= 2
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_waiting_for_an_index_is_not_a_hanging_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing takes four times as long as a read may; every row is read all the same."""
    position = tar(tmp_path / "x.tar", [(f"{index}.png", PNG) for index in range(16)])
    members = archive._tar_members

    def slowly(pread: object, size: int):
        for member in members(pread, size):
            threading.Event().wait(0.15)
            yield member

    monkeypatch.setattr(archive, "_tar_members", slowly)
    monkeypatch.setattr(archive, "MEMBERS_PER_ALIVE", 1)
    reader = Reader(tmp_path, batch_size=4, threads=4, limits=Limits(), timeout_s=0.6)
    rows = [f"{position.name}::{index}.png" for index in range(16)]
    stage = reader.stage([Part(0, np.arange(16), rows, pa.table({}))], Meter("read"))
    assert [status for batch in stage for status in batch.status] == [Status.OK] * 16


def test_listing_is_decided_by_content(tmp_path: Path) -> None:
    members = [
        ("b/no extension", PNG),
        ("a/notes.txt", b"not an image"),
        ("a/broken.PNG", b"not an image either"),
        ("__MACOSX/a/._x.png", PNG),
        ("a/.DS_Store", b"x"),
        (".git/x.png", PNG),
        ("./a/y.jpg", b""),
        ("IM000001", bytes(128) + b"DICM" + bytes(20)),
    ]
    images = ["b/no extension", "a/broken.PNG", "a/y.jpg", "IM000001"]
    for make, name in ((tar, "x.tar"), (zipped, "x.zip")):
        position = make(tmp_path / name, members)
        listing = tmp_path / f"{name}.parquet"
        manifest = open_manifest(position, listing=listing)
        (part,) = manifest.parts(100)
        assert part.paths == [f"{name}::{image}" for image in images]
        assert manifest.root == tmp_path
        assert manifest.skipped == {"not images": 1, "hidden": 3}
        position.write_bytes(b"other")
        assert open_manifest(position.rename(tmp_path / f"moved-{name}"), listing=listing).rows == 4


@pytest.mark.parametrize(
    ("name", "make", "complaint"),
    [
        ("images.dat", tar, "rename it"),
        ("sheet.xlsx", zipped, "save it as CSV"),
        ("x.tar", tar, "listed 0 images; skipped 1 not images"),
    ],
)
def test_a_manifest_that_is_no_archive_of_images(
    tmp_path: Path, name: str, make: Callable[..., Path], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        open_manifest(make(tmp_path / name, [("x.xml", b"<x>")]), listing=tmp_path / "listing.parquet")
    assert "\n" not in str(caught.value)


def test_crc_of_a_stored_member(tmp_path: Path) -> None:
    position = zipped(tmp_path / "x.zip", [("a.png", PNG)], zipfile.ZIP_STORED)
    data = position.read_bytes()
    assert zlib.crc32(PNG).to_bytes(4, "little") in data
    position.write_bytes(data.replace(PNG[-20:], bytes(20)))
    assert outcome(f"{position}::a.png") == Status.CORRUPT
