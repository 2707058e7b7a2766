"""Members of .zip and .tar files, `archive.tar::folder/name.dcm`, read where they lie.

An archive is indexed once, by the standard library, headers only; after that a member costs a few calls of
`pread` on a descriptor that all threads share. Archives are hostile like images: what a header declares is
never allocated, a member yields no more than `admit` allowed, and an index holds hashes, no names.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from engine.core.location import is_url
from engine.core.records import Status
from engine.formats.header import may_be_image
from engine.storage import local
from engine.storage.errors import ReadError

OnAlive = Callable[[], None]
Pread = Callable[[int, int], bytes]  # so many bytes from a place, fewer at the end

MAX_MEMBERS = 10_000_000  # of one archive; 29 bytes each in a .tar, 41 in a .zip
MAX_ZIP_MEMBERS = 1_000_000  # zipfile takes 0.7 kB for each of them while it reads the directory
MAX_ZIP_DIRECTORY = 256 << 20  # bytes
MAX_TAR_HEADERS = 16 << 10  # bytes of one member: tarfile is quadratic in them
MAX_TAR_SETTINGS = 256  # of one member in pax headers, those for all members included, which tarfile copies
TAR_PADDING = 1 << 20  # bytes that may follow the end mark
MAX_CACHED_MEMBERS = 4_000_000  # of all archives that are kept open, the last one aside
MAX_CACHED_ARCHIVES = 256
MEMBERS_PER_ALIVE = 256  # members
SIGNATURE_BYTES = 512  # bytes that tell whether a member is an image

_SPLIT = re.compile(r"\.(?:zip|tar(?:\.(?:gz|bz2|xz|zst|lz4|Z))?|tgz|tbz2?|txz|tzst)::", re.IGNORECASE)
_IMAGE_NAME = re.compile(r"\.(jpe?g|jfif|png|dcm|dicom|tiff?|bmp|webp|jp2|j2k|p[bgnp]m|gif)$", re.IGNORECASE)
_MANY_DIGITS = re.compile(rb"[0-9]{65}")
_LONGEST_PATH = 4096
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08PK")
_KEY = os.urandom(16)  # of this process: nobody can make two names that share a hash

# Kinds of members: the first two can be read.
STORED, DEFLATED, FOLDER, LINK, SPECIAL, SPARSE, ENCRYPTED, METHOD, DAMAGED = range(9)
_REFUSED = {
    FOLDER: (Status.UNREADABLE, "a folder, not a file"),
    LINK: (Status.UNREADABLE, "a link, not a file; name the member that it points to"),
    SPECIAL: (Status.UNREADABLE, "a device or other special member, not a file"),
    SPARSE: (Status.UNSUPPORTED, "a sparse member; make the .tar without --sparse"),
    ENCRYPTED: (Status.UNREADABLE, "the member is encrypted; unpack the archive"),
    METHOD: (Status.UNSUPPORTED, "packed by another method than stored or deflate; pack it again"),
    DAMAGED: (Status.CORRUPT, "its entry in the archive is damaged"),
}


def read(path: str, admit: Callable[[int], None], alive: OnAlive = lambda: None) -> bytes:
    """Return the bytes of a member, else of the plain file `path`. Any thread may call.

    The archive is what is left of the last `.zip::` or `.tar::` where there is such a file; only where there
    is none, a file that has the whole name is looked for. `admit` gets the member's size unpacked. `alive` is
    called now and then while an archive is indexed, which may take longer than any read. Raises ReadError.
    """
    for file, name in _archive_prefixes(path):
        try:
            return _cache.get(file, alive).read(name, admit)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            _cache.drop(file)
            raise local.to_read_error(error) from None
    if is_url(path):
        raise ReadError(Status.MISSING, "no such archive")
    return local.read(path, admit)


def exists(path: str) -> bool:
    """Return whether the archive is there, or a plain file of that name."""
    return any(map(_is_there, (path, *(file for file, _ in _archive_prefixes(path)))))


def _is_there(file: str) -> bool:
    if is_url(file):
        from engine.storage import remote

        return remote.exists_at(file)
    return local.exists(file)


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive, by its content, else by its name."""
    with path.open("rb") as opened:
        start = opened.read(SIGNATURE_BYTES)
    return archive_kind(start) != "" or path.suffix.lower() in (".zip", ".tar")


@contextmanager
def list_images(
    path: Path, spool: Path, wants: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[Iterator[tuple[str, int]], Counter[str]]]:
    """`archive.tar::name` and size of each image, in archive order, and counts of what was left out.

    What counts is the content; a name that promises an image is listed whatever it holds, as is what can't be
    looked into. Hidden members, folders, other files and those that nobody `wants` are left out. Of several
    members with one name, the last is what reading gives, so it alone is listed. Names wait in a temporary
    file in the folder `spool`.
    Raises ReadError where the archive can't be read to its end.
    """
    if not _SPLIT.search(f"{path.name}::"):
        raise ReadError(Status.UNSUPPORTED, "an archive, but its name doesn't end in .zip or .tar; rename it")
    left_out: Counter[str] = Counter()
    listed = array("Q")

    def see(archive: Archive, number: int, member: ArchiveMember) -> None:
        if member.kind == FOLDER:
            return
        if _is_hidden(member.name):
            left_out["hidden"] += 1
        elif not wants(member.name):
            left_out["excluded"] += 1
        elif _IMAGE_NAME.search(member.name) or archive.may_be_image(member):
            listed.append(number)
            names.write(json.dumps([member.name, member.size]) + "\n")
        else:
            left_out["not images"] += 1

    with tempfile.TemporaryFile("w+", encoding="ascii", dir=spool) as names:
        try:
            archive = _cache.index(str(path), see)
        except OSError as error:
            raise local.to_read_error(error) from None
        if archive.trouble[0] != Status.MISSING:
            raise ReadError(*archive.trouble)
        last = archive.last[np.asarray(listed)]
        if replaced := int((~last).sum()):
            left_out["replaced by a later member of the same name"] = replaced
        names.seek(0)
        found = (json.loads(line) for line, keep in zip(names, last, strict=True) if keep)
        yield ((f"{path.name}::{name}", size) for name, size in found), left_out


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or any(part[:1] == "." and part not in (".", "..") for part in parts)


def _archive_prefixes(path: str) -> Iterator[tuple[str, str]]:
    for found in reversed(list(_SPLIT.finditer(path, 0, _LONGEST_PATH))):
        yield path[: found.end() - 2], path[found.end() :]


class ArchiveMember(NamedTuple):
    """An archive's entry of a member. `offset`: of its data in a .tar, of its local header in a .zip."""

    name: str
    kind: int
    offset: int
    size: int  # bytes, unpacked
    packed: int = 0  # bytes in a .zip
    crc: int = 0


class Archive:
    """An archive: an open descriptor and an index by the hash of a member's name."""

    def __init__(
        self, path: str, alive: OnAlive, see: Callable[[Archive, int, ArchiveMember], None] | None
    ) -> None:
        self._path = path
        self._pread, self._size, self._state, close = _open(path)
        # closed when the last thread that reads from it lets go
        weakref.finalize(self, close).atexit = False
        start = self._pread(SIGNATURE_BYTES, 0)
        self._zip = archive_kind(start) == "zip" or (
            not archive_kind(start) and path.lower().endswith(".zip")
        )
        # status and reason for a name that isn't there: the rest may have been cut off
        self.trouble = (Status.MISSING, "the archive has no such member")
        columns = {name: array(code) for name, code in _COLUMNS[: None if self._zip else -2]}
        try:
            for number, member in enumerate(self._members(start)):
                if number == MAX_MEMBERS:
                    raise ReadError(Status.UNSUPPORTED, f"more than {MAX_MEMBERS} members; split the archive")
                member = self._checked(member)
                for column, value in zip(
                    columns.values(), (*_name_hashes(member.name), *member[1:]), strict=False
                ):
                    column.append(value)
                if see:
                    see(self, number, member)
                if number % MEMBERS_PER_ALIVE == 0:
                    alive()
        except ReadError as error:
            self.trouble = (error.status, str(error))
        self._sort(columns)

    def _sort(self, columns: dict[str, array[int]]) -> None:
        order = np.argsort(np.asarray(columns["hash"]), kind="stable")
        self._columns: dict[str, npt.NDArray[Any]] = {}
        for name in list(columns):
            self._columns[name] = np.asarray(columns.pop(name))[order]
        self._hash, self._check = self._columns["hash"], self._columns["check"]
        again = (self._hash[:-1] == self._hash[1:]) & (self._check[:-1] == self._check[1:])
        self.members = len(order)
        self.last = np.ones(self.members, bool)  # [members], in archive order: no later one has the name
        self.last[order[:-1][again]] = False

    def _members(self, start: bytes) -> Iterator[ArchiveMember]:
        if kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None):
            raise ReadError(
                Status.UNSUPPORTED, f"the archive is compressed ({kind}); unpack it or make it a plain .tar"
            )
        if not start:
            raise ReadError(Status.TRUNCATED, "the archive has 0 bytes")
        return (_zip_members if self._zip else _tar_members)(self._pread, self._size)

    def _checked(self, member: ArchiveMember) -> ArchiveMember:
        """Numbers that no archive of this size can hold would not fit the index either."""
        offset, size, packed, _ = member[2:]
        if 0 <= offset <= self._size and 0 <= size < 1 << 62 and 0 <= packed < 1 << 62:
            return member
        damaged = DAMAGED if member.kind in (STORED, DEFLATED) else member.kind
        return ArchiveMember(member.name, damaged, 0, 0)

    def read(self, name: str, admit: Callable[[int], None]) -> bytes:
        """Return the bytes of the last member of that name. Raises ReadError, OSError."""
        if self._state and _file_state(os.stat(self._path)) != self._state:
            raise ReadError(Status.UNREADABLE, "the archive changed during the run")
        member = self._find(name)
        if member.kind in _REFUSED:
            raise ReadError(*_REFUSED[member.kind])
        if not self._zip:
            self._check_end(member.offset + member.size)
            admit(member.size)
            return self._bytes(member.offset, member.size)
        if member.packed > member.size + member.size // 8 + 1024:  # so that `admit` bounds these as well
            raise ReadError(Status.CORRUPT, f"{member.packed} bytes packed for {member.size}")
        offset = self._data_offset(member)
        self._check_end(offset + member.packed)
        admit(member.size)
        data = self._bytes(offset, member.packed)
        if member.kind == DEFLATED:
            data = _inflate(data, member.size)
        if len(data) != member.size:
            raise ReadError(Status.CORRUPT, f"{len(data)} bytes; the archive says {member.size}")
        if zlib.crc32(data) != member.crc:
            raise ReadError(Status.CORRUPT, "its CRC-32 is not the one that the archive gives")
        return data

    def may_be_image(self, member: ArchiveMember) -> bool:
        """Return whether the first bytes are an image's, or cannot be read."""
        if member.kind in _REFUSED:
            return member.kind not in (LINK, SPECIAL)
        try:
            offset = self._data_offset(member) if self._zip else member.offset
            start = self._pread(min(SIGNATURE_BYTES, member.packed if self._zip else member.size), offset)
            return may_be_image(_inflate(start, SIGNATURE_BYTES) if member.kind == DEFLATED else start)
        except ReadError:
            return True

    def _find(self, name: str) -> ArchiveMember:
        wanted, check = _name_hashes(_without_dot_slash(name))
        at = int(np.searchsorted(self._hash, np.uint64(wanted), side="right")) - 1
        while at >= 0 and self._hash[at] == wanted:
            if self._check[at] == check:
                return ArchiveMember(name, *(int(column[at]) for column in list(self._columns.values())[2:]))
            at -= 1
        raise ReadError(*self.trouble)

    def _data_offset(self, member: ArchiveMember) -> int:
        """Return where the data of a zip member begin, behind its local header."""
        header = self._pread(30, member.offset)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise ReadError(Status.CORRUPT, f"no member at byte {member.offset} of the archive")
        name, extra = struct.unpack("<HH", header[26:])
        return member.offset + 30 + int(name + extra)

    def _check_end(self, end: int) -> None:
        if end > self._size:
            raise ReadError(Status.TRUNCATED, f"the archive ends {end - self._size} bytes before the member")

    def _bytes(self, offset: int, size: int) -> bytes:
        data = self._pread(size, offset)
        while len(data) < size:
            more = self._pread(size - len(data), offset + len(data))
            if not more:
                raise ReadError(Status.TRUNCATED, "the archive became shorter during the run")
            data += more
        return data


_COLUMNS = (
    ("hash", "Q"),
    ("check", "I"),
    ("kind", "B"),
    ("offset", "Q"),
    ("size", "Q"),
    ("packed", "Q"),
    ("crc", "I"),
)


def _name_hashes(name: str) -> tuple[int, int]:
    """64 bits to look a name up by and 32 more that have to agree."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12, key=_KEY).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:])


def _without_dot_slash(name: str) -> str:
    return name.removeprefix("./")  # as `tar -c .` begins all names


def _open(path: str) -> tuple[Pread, int, tuple[int, int] | None, Callable[[], None]]:
    """Return a reader of an archive, its length, its state if that can change, and its close function.

    Raises OSError, ReadError.
    """
    if is_url(path):
        from engine.storage import remote

        return remote.open_random(path)
    descriptor, info = local.open_file(path)

    def pread(size: int, offset: int) -> bytes:
        return os.pread(descriptor, size, offset)

    return pread, info.st_size, _file_state(info), partial(os.close, descriptor)


def _file_state(info: os.stat_result) -> tuple[int, int]:
    return info.st_size, info.st_mtime_ns


def archive_kind(start: bytes) -> str:
    """Name what the first bytes of a file say: zip, tar, compressed or nothing."""
    if start.startswith(_ZIP_STARTS):
        return "zip"
    if start[257:262] == b"ustar":
        return "tar"
    return "compressed" if start.startswith(tuple(_COMPRESSED)) else ""


def _inflate(data: bytes, size: int) -> bytes:
    """Inflate at most `size` bytes, and one more if there are more."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ReadError(Status.CORRUPT, f"it does not inflate: {error}") from None


class _ArchiveView(io.RawIOBase):
    """An archive as zipfile and tarfile see it: no more than `spare` bytes, and only what `check` passes."""

    def __init__(self, pread: Pread, size: int, spare: int, check: Callable[[bytes], str | None]) -> None:
        self._pread, self._size, self._position = pread, size, 0
        self.spare, self._check = spare, check

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(22, "before the start")  # what zipfile expects of a file
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if count > self.spare:
            raise ReadError(
                Status.UNSUPPORTED, f"headers of {count} bytes at byte {self._position} of the archive"
            )
        data = self._pread(count, self._position) if count else b""
        self._position += len(data)
        self.spare -= len(data)
        if complaint := self._check(data):
            raise ReadError(Status.UNSUPPORTED, complaint)
        return data


def _zip_members(pread: Pread, size: int) -> Iterator[ArchiveMember]:
    def check(data: bytes) -> str | None:
        many = len(data) > 46 * MAX_ZIP_MEMBERS and data.count(b"PK\x01\x02") > MAX_ZIP_MEMBERS
        return f"more than {MAX_ZIP_MEMBERS} members; split the .zip or make it a .tar" if many else None

    view = cast(IO[bytes], _ArchiveView(pread, size, MAX_ZIP_DIRECTORY, check))
    if not zipfile.is_zipfile(view):
        raise ReadError(Status.TRUNCATED, "the archive has no directory at its end: cut short, or no .zip")
    try:
        with zipfile.ZipFile(view) as opened:
            infos = opened.infolist()
        del opened
    except (ReadError, MemoryError):
        raise
    except NotImplementedError as error:
        raise ReadError(Status.UNSUPPORTED, f"the archive: {error}") from None
    except UnicodeDecodeError:
        raise ReadError(Status.CORRUPT, "a name in the archive is marked as UTF-8 and isn't") from None
    except OSError:
        raise
    except Exception as error:  # no archive may end the run, whatever zipfile makes of it
        raise ReadError(Status.CORRUPT, f"the archive's directory is damaged: {error}") from None
    for info in infos:
        yield ArchiveMember(
            _without_dot_slash(info.filename),
            _zip_kind(info),
            info.header_offset,
            info.file_size,
            info.compress_size,
            info.CRC,
        )


def _zip_kind(info: zipfile.ZipInfo) -> int:
    if info.filename.endswith("/"):
        return FOLDER
    if info.flag_bits & 0x2041:  # plain and strong encryption, encrypted directory
        return ENCRYPTED
    if stat.S_ISLNK(info.external_attr >> 16):
        return LINK
    return {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}.get(info.compress_type, METHOD)


def _tar_members(pread: Pread, size: int) -> Iterator[ArchiveMember]:
    def check(data: bytes) -> str | None:
        return "headers with numbers of more than 64 digits" if _MANY_DIGITS.search(data) else None

    view = _ArchiveView(pread, size, MAX_TAR_HEADERS, check)
    end = 0
    try:
        opened = tarfile.open(  # noqa: SIM115 - it has nothing of its own to close
            fileobj=cast(IO[bytes], view), mode="r:", encoding="utf-8", errors="backslashreplace"
        )
        while (info := opened.next()) is not None:
            cast(Any, opened).members.clear()  # it would keep them all
            if opened.offset <= end:
                raise ReadError(Status.CORRUPT, f"the archive goes back at byte {end}")
            if len(info.pax_headers) > MAX_TAR_SETTINGS:
                reason = f"a member with more than {MAX_TAR_SETTINGS} pax settings in the archive"
                raise ReadError(Status.UNSUPPORTED, reason)
            end, view.spare = opened.offset, MAX_TAR_HEADERS
            yield ArchiveMember(_without_dot_slash(info.name), _tar_kind(info), info.offset_data, info.size)
        end = opened.offset
    except (ReadError, OSError, MemoryError):
        raise
    except (
        Exception
    ):  # no archive may end the run, whatever tarfile makes of it: the place is looked at below
        pass
    tail = pread(tarfile.BLOCKSIZE, end) if end < size else b""
    if len(tail) < tarfile.BLOCKSIZE:  # a block of zeros has to be there
        raise ReadError(Status.TRUNCATED, f"the archive has no end mark; it seems cut short at byte {size}")
    if any(tail):
        raise ReadError(Status.CORRUPT, f"the archive is damaged at byte {end}: no member begins there")
    if size - end > TAR_PADDING:
        raise ReadError(
            Status.TRUNCATED,
            f"the archive ends at byte {end} of {size}: a copy cut short, or archives joined",
        )


def _tar_kind(info: tarfile.TarInfo) -> int:
    if info.issparse():
        return SPARSE
    if info.isreg():
        return STORED
    if info.isdir():
        return FOLDER
    return LINK if info.issym() or info.islnk() else SPECIAL


class _ArchiveCache:
    """The archives read last, open and indexed."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, Archive] = OrderedDict()
        self._lock = threading.Lock()
        self._indexing = threading.Lock()  # one at a time: zipfile needs room
        self._steps = 0  # of whatever is being indexed

    def get(self, path: str, alive: OnAlive) -> Archive:
        """Raises OSError, ReadError where the file is no file."""
        if found := self._look(path):
            return found
        with self._turn(alive):
            return self._look(path) or self._add(path, alive, None)

    def index(self, path: str, see: Callable[[Archive, int, ArchiveMember], None]) -> Archive:
        """Build the same index anew and pass each member to `see`."""
        with self._turn(lambda: None):
            return self._add(path, lambda: None, see)

    def drop(self, path: str) -> None:
        with self._lock:
            self._held.pop(path, None)

    def _look(self, path: str) -> Archive | None:
        with self._lock:
            if path in self._held:
                self._held.move_to_end(path)
            return self._held.get(path)

    def _add(
        self, path: str, alive: OnAlive, see: Callable[[Archive, int, ArchiveMember], None] | None
    ) -> Archive:
        def step() -> None:
            self._steps += 1
            alive()

        archive = Archive(path, step, see)
        with self._lock:
            self._held[path] = archive
            members = sum(held.members for held in self._held.values())
            while len(self._held) > 1 and (
                members > MAX_CACHED_MEMBERS or len(self._held) > MAX_CACHED_ARCHIVES
            ):
                members -= self._held.popitem(last=False)[1].members
        return archive

    @contextmanager
    def _turn(self, alive: OnAlive) -> Iterator[None]:
        """Wait to index. That is not the storage's fault while whoever is at it gets on."""
        seen = -1
        while not self._indexing.acquire(timeout=0.5):
            if self._steps != seen:
                seen = self._steps
                alive()
        try:
            yield
        finally:
            self._indexing.release()


_cache = _ArchiveCache()  # shared by listing and reading, so that an archive is indexed once
