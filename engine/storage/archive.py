"""Members of zip and tar archives, read where they lie: `archive.tar::folder/name`.

An archive's index is made once, of 128-bit hashes of the names, and kept for the archives used last. Of
several members of one name the last counts, as it does when the archive is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import tarfile
import threading
import weakref
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.records import Status
from engine.storage.common import ReadError
from engine.storage.location import Url

MAX_MEMBERS = 1_000_000  # of a zip file, whose directory is held while it is indexed; a tar has no limit
KEPT = 4  # archives
_MEMBER = re.compile(r"(.+?\.(?:zip|tar))::(.+)", re.IGNORECASE | re.DOTALL)
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1
_TAR_MAGIC = 257
_ROW = np.dtype(
    [("name", "S16"), ("start", "i8"), ("stored", "i8"), ("size", "i8"), ("crc", "u4"), ("kind", "u1")]
)
_KINDS = ("tar", "stored", "deflated", "encrypted", "method", "special")

Pread = Callable[[int, int], bytes]  # bytes, from byte


class Member(NamedTuple):
    """One file in an archive, as its directory or header describes it."""

    name: str
    start: int  # tar: first byte; zip: of its local header
    stored: int  # bytes in the archive
    size: int  # bytes when it is unpacked
    crc: int
    kind: str  # one of _KINDS
    modified: datetime | None


def split(path: str) -> tuple[str, str] | None:
    """The archive and the member that a path names, or None where it names no member."""
    found = _MEMBER.fullmatch(path) if "::" in path else None
    return (found[1], found[2]) if found else None


def is_archive(start: bytes) -> bool:
    """Whether a file that begins so is a zip or tar."""
    return start[:4] in (b"PK\x03\x04", b"PK\x05\x06") or start[_TAR_MAGIC : _TAR_MAGIC + 5] == b"ustar"


def members(place: str | Url) -> Iterator[tuple[Member, bool, Callable[[int], bytes]]]:
    """All members in the archive's order: whether it is the last of its name, what reads its first bytes.

    Raises ReadError for what is no archive, or is cut off.
    """
    opened = _ARCHIVES.of(place)
    for member in opened.listed():
        yield member, opened.is_last(member), partial(opened.begin, member)


def warm(place: str | Url) -> None:
    """Make the index now, which takes its time for millions of members. Raises ReadError."""
    _ARCHIVES.of(place)


def read(place: str | Url, name: str, admit: Callable[[int], None]) -> bytes:
    """One member's bytes. Raises ReadError."""
    return _ARCHIVES.of(place).read(name, admit)


class _Archives:
    """The archives used last."""

    def __init__(self) -> None:
        self._opened: OrderedDict[str | Url, _Archive] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, place: str | Url) -> _Archive:
        with self._lock:  # while one thread makes the index, the others wait for it
            found = self._opened.get(place)
            if found is None:
                found = _Archive(place)
                found.make_index()
                self._opened[place] = found
                if len(self._opened) > KEPT:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(place)
            return found


class _Archive:
    def __init__(self, place: str | Url) -> None:
        self._file, self._pread, self._bytes = _open(place)
        weakref.finalize(self, self._file.close)  # when no thread reads it any more
        self._index: npt.NDArray[Any] = np.empty(0, _ROW)
        self._damage: ReadError | None = None
        self.is_zip = self._pread(4, 0)[:2] == b"PK"

    def listed(self) -> Iterator[Member]:
        """All members, up to the first damage, which raises ReadError."""
        self._file.seek(0)
        try:
            yield from _of_zip(self._file) if self.is_zip else _of_tar(self._file)
        except (ReadError, MemoryError):
            raise
        except OSError as error:
            raise ReadError(Status.UNREADABLE, f"the archive: {error.strerror or 'read error'}") from None
        except Exception:  # whatever the modules make of bytes that are something else
            kind = "zip" if self.is_zip else "tar"
            raise ReadError(Status.CORRUPT, f"a damaged {kind} archive, or none") from None

    def make_index(self) -> None:
        """Of all members up to the first damage; `_damage` is what it was."""
        index = np.fromiter(self._rows(), _ROW)
        if not len(index) and self._damage:
            raise self._damage
        self._index = index[np.argsort(index["name"], kind="stable")]

    def _rows(self) -> Iterator[tuple[bytes, int, int, int, int, int]]:
        try:
            for member in self.listed():
                yield _hash(member.name), *member[1:5], _KINDS.index(member.kind)
        except ReadError as error:
            self._damage = error

    def read(self, name: str, admit: Callable[[int], None]) -> bytes:
        place = self._place(name)
        if place is None:
            raise self._damage or ReadError(Status.MISSING, "the archive has no such member")
        _, start, stored, size, crc, kind = self._index[place].tolist()
        member = Member(name, start, stored, size, crc, _KINDS[kind], None)
        self._check(member)
        admit(size)
        return self._whole(member)

    def is_last(self, member: Member) -> bool:
        """Whether no later member has its name."""
        place = self._place(member.name)
        return place is not None and int(self._index["start"][place]) == member.start

    def _place(self, name: str) -> int | None:
        """Of the last member of this name in the index."""
        wanted = _hash(name)
        place = int(np.searchsorted(self._index["name"], wanted, side="right")) - 1
        return place if place >= 0 and self._index["name"][place] == wanted else None

    def _check(self, member: Member) -> None:
        if member.kind == "special":
            raise ReadError(Status.UNREADABLE, "a link, folder or device in the archive, not a file")
        if member.kind == "encrypted":
            raise ReadError(Status.UNREADABLE, "encrypted in the archive")
        if member.kind == "method":
            raise ReadError(Status.UNSUPPORTED, "compression of the archive; supported: none, deflate")
        if member.start < 0 or member.stored < 0 or member.stored > self._bytes:
            raise ReadError(Status.CORRUPT, "a damaged archive")
        if member.stored > member.size + member.size // 100 + 65_536:
            raise ReadError(Status.CORRUPT, "longer in the archive than it says to be")

    def _whole(self, member: Member) -> bytes:
        raw = self._raw(member, member.stored)
        if len(raw) < member.stored:
            raise ReadError(Status.TRUNCATED, "the archive ends inside it")
        if member.kind == "deflated":
            raw = _inflated(raw, member.size)
        if len(raw) != member.size or (self.is_zip and zlib.crc32(raw) != member.crc):
            raise ReadError(Status.CORRUPT, "damaged in the archive")
        return raw

    def begin(self, member: Member, most: int) -> bytes:
        """Its first bytes, `most` of them at most; fewer where it is damaged."""
        try:
            self._check(member)
            if member.kind == "deflated":
                return zlib.decompressobj(-15).decompress(self._raw(member, min(member.stored, 4096)), most)
            return self._raw(member, min(member.stored, most))
        except (ReadError, zlib.error):
            return b""

    def _raw(self, member: Member, most: int) -> bytes:
        start = member.start
        if self.is_zip:
            head = self._pread(30, start)
            if len(head) < 30 or head[:4] != b"PK\x03\x04":
                raise ReadError(Status.CORRUPT, "a damaged archive")
            start += 30 + sum(struct.unpack_from("<HH", head, 26))
        return self._pread(most, start)


def _open(place: str | Url) -> tuple[Any, Pread, int]:
    """The archive as a file, what reads any part of it in any thread, and its length."""
    if isinstance(place, Url):
        from engine.storage import remote

        return remote.open_random(place)
    file = _plain(place)
    size = os.fstat(file.fileno()).st_size
    return file, lambda count, start: os.pread(file.fileno(), min(count, max(0, size - start)), start), size


def _plain(path: str) -> io.BufferedReader:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ReadError(Status.MISSING, "no such archive") from None
    except OSError as error:
        raise ReadError(Status.UNREADABLE, f"the archive: {error.strerror}") from None
    except ValueError:
        raise ReadError(Status.UNREADABLE, "the path holds a NUL character") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ReadError(Status.UNREADABLE, "the archive: not a file")
    return open(descriptor, "rb")


def _of_zip(file: Any) -> Iterator[Member]:
    with zipfile.ZipFile(file) as opened:
        infos = opened.infolist()
        if len(infos) > MAX_MEMBERS:
            raise ReadError(
                Status.TOO_LARGE, f"a zip of {len(infos)} members; at most {MAX_MEMBERS}, a tar any"
            )
        for info in infos:
            kind = {_STORED: "stored", _DEFLATED: "deflated"}.get(info.compress_type, "method")
            if info.flag_bits & _ENCRYPTED:
                kind = "encrypted"
            if info.is_dir():
                kind = "special"
            facts = (info.header_offset, info.compress_size, info.file_size, info.CRC, kind)
            yield Member(info.orig_filename, *facts, _moment(*info.date_time))


def _of_tar(file: Any) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as opened:
        while (info := opened.next()) is not None:
            kind = "tar" if info.isreg() and not info.issparse() else "special"
            yield Member(info.name, info.offset_data, info.size, info.size, 0, kind, _since_1970(info.mtime))
            opened.members = []  # type: ignore[attr-defined] # which it would keep
        file.seek(opened.offset)
        if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:  # a block of zeros has to be there
            raise ReadError(Status.TRUNCATED, "the archive has no end; was it cut off?")


def _inflated(raw: bytes, size: int) -> bytes:
    inflate = zlib.decompressobj(-15)
    try:
        return inflate.decompress(raw, size + 1)
    except zlib.error:
        raise ReadError(Status.CORRUPT, "damaged in the archive") from None


def _hash(name: str) -> bytes:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return digest[:-1] + bytes([digest[-1] | 1])  # NumPy's byte strings don't end in zeros


def _moment(*numbers: int) -> datetime | None:
    try:
        return datetime(*numbers, tzinfo=UTC)  # type: ignore[arg-type,misc]
    except ValueError:
        return None


def _since_1970(seconds: float) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


_ARCHIVES = _Archives()
