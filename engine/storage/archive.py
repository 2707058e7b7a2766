"""Read members of .zip and .tar files, `archive.tar::folder/name.dcm`, without unpacking the archive.

The standard library indexes an archive once, headers only. After that, reading a member takes a few `pread`
calls on a descriptor that all threads share. Archives are untrusted: no declared size is allocated, a member
yields no more bytes than `admit` allowed, and the index holds hashes instead of names.
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
Pread = Callable[[int, int], bytes]  # (size, offset) -> bytes, fewer at the end of the archive

MAX_MEMBERS = 10_000_000  # of one archive; 29 bytes each in a .tar, 41 in a .zip
MAX_ZIP_MEMBERS = 1_000_000  # zipfile allocates 0.7 kB for each while it reads the directory
MAX_ZIP_DIRECTORY = 256 << 20  # bytes
MAX_TAR_HEADERS = 16 << 10  # header bytes of one member; tarfile takes quadratic time
MAX_TAR_SETTINGS = 256  # pax settings of one member, with the global ones, which tarfile copies
TAR_PADDING = 1 << 20  # bytes that may follow the end mark
MAX_CACHED_MEMBERS = 4_000_000  # in all open archives, except the one opened last
MAX_CACHED_ARCHIVES = 256
MEMBERS_PER_ALIVE = 256  # indexed between two calls of `alive`
SIGNATURE_BYTES = 512  # leading bytes that identify an image

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
_KEY = os.urandom(16)  # random, so that nobody can craft two names with the same hash

# Kinds of members; only the first two can be read.
STORED, DEFLATED, FOLDER, LINK, SPECIAL, SPARSE, ENCRYPTED, METHOD, DAMAGED = range(9)
_REFUSED = {
    FOLDER: (Status.UNREADABLE, "the member is a folder, not a file"),
    LINK: (Status.UNREADABLE, "the member is a link; name the member that it points to"),
    SPECIAL: (Status.UNREADABLE, "the member is a device or another special file"),
    SPARSE: (Status.UNSUPPORTED, "the member is sparse; make the .tar without --sparse"),
    ENCRYPTED: (Status.UNREADABLE, "the member is encrypted; unpack the archive"),
    METHOD: (Status.UNSUPPORTED, "the member is compressed by an unsupported method; use stored or deflate"),
    DAMAGED: (Status.CORRUPT, "the member's entry in the archive is damaged"),
}


def read(path: str, admit: Callable[[int], None], alive: OnAlive = lambda: None) -> bytes:
    """Return the bytes of a member, else of the plain file `path`. Any thread may call.

    The archive is the path up to the last `.zip::` or `.tar::` that names a file; if there is no such file,
    `path` itself is read. `admit` gets the member's unpacked size. `alive` is called from time to time while
    an archive is indexed, which may take longer than any read. Raises ReadError.
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
        raise ReadError(Status.MISSING, "the archive does not exist")
    return local.read(path, admit)


def exists(path: str) -> bool:
    """Return whether the archive, or a plain file of that name, exists."""
    return any(map(_file_exists, (path, *(file for file, _ in _archive_prefixes(path)))))


def _file_exists(file: str) -> bool:
    if is_url(file):
        from engine.storage import remote

        return remote.exists_at(file)
    return local.exists(file)


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive, by its content, else by its name."""
    with path.open("rb") as file:
        start = file.read(SIGNATURE_BYTES)
    return archive_kind(start) != "" or path.suffix.lower() in (".zip", ".tar")


@contextmanager
def list_images(
    path: Path, spool: Path, accept: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[Iterator[tuple[str, int]], Counter[str]]]:
    """Yield `archive.tar::name` and size of each image, in archive order, and counts of skipped members.

    A member is an image by its content or by its name; one that cannot be read is listed too. Hidden members,
    folders, other files and names that `accept` refuses are skipped. Of several members with one name only
    the last is listed, which is the one that `read` returns. Names are kept in a temporary file in `spool`.
    Raises ReadError if the archive cannot be read to its end.
    """
    if not _SPLIT.search(f"{path.name}::"):
        raise ReadError(Status.UNSUPPORTED, "it is an archive, but not named .zip or .tar; rename it")
    left_out: Counter[str] = Counter()
    numbers = array("Q")

    def collect(archive: Archive, number: int, member: ArchiveMember) -> None:
        if member.kind == FOLDER:
            return
        if _is_hidden(member.name):
            left_out["hidden"] += 1
        elif not accept(member.name):
            left_out["excluded"] += 1
        elif _IMAGE_NAME.search(member.name) or archive.may_be_image(member):
            numbers.append(number)
            names.write(json.dumps([member.name, member.size]) + "\n")
        else:
            left_out["not images"] += 1

    with tempfile.TemporaryFile("w+", encoding="ascii", dir=spool) as names:
        try:
            archive = _cache.index(str(path), collect)
        except OSError as error:
            raise local.to_read_error(error) from None
        if archive.missing_error[0] != Status.MISSING:
            raise ReadError(*archive.missing_error)
        last = archive.last[np.asarray(numbers)]
        if replaced := int((~last).sum()):
            left_out["replaced by a later member of the same name"] = replaced
        names.seek(0)
        images = (json.loads(line) for line, keep in zip(names, last, strict=True) if keep)
        yield ((f"{path.name}::{name}", size) for name, size in images), left_out


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or any(part[:1] == "." and part not in (".", "..") for part in parts)


def _archive_prefixes(path: str) -> Iterator[tuple[str, str]]:
    for match in reversed(list(_SPLIT.finditer(path, 0, _LONGEST_PATH))):
        yield path[: match.end() - 2], path[match.end() :]


class ArchiveMember(NamedTuple):
    """A member's entry in the index. `offset`: of its data in a .tar, of its local header in a .zip."""

    name: str
    kind: int
    offset: int
    size: int  # bytes, unpacked
    packed: int = 0  # compressed bytes in a .zip
    crc: int = 0


OnMember = Callable[["Archive", int, ArchiveMember], None]  # (archive, number, member)


class Archive:
    """An archive: an open descriptor and an index by the hash of a member's name."""

    def __init__(self, path: str, alive: OnAlive, on_member: OnMember | None) -> None:
        self._path = path
        self._pread, self._size, self._state, close = _open(path)
        # the descriptor is closed when the last thread that reads from it drops the archive
        weakref.finalize(self, close).atexit = False
        start = self._pread(SIGNATURE_BYTES, 0)
        self._zip = archive_kind(start) == "zip" or (
            not archive_kind(start) and path.lower().endswith(".zip")
        )
        # error for a name that is not in the index: the archive may be cut short
        self.missing_error = (Status.MISSING, "the archive has no such member")
        columns = {name: array(code) for name, code in _COLUMNS[: None if self._zip else -2]}
        try:
            for number, member in enumerate(self._members(start)):
                if number == MAX_MEMBERS:
                    raise ReadError(Status.UNSUPPORTED, f"it has more than {MAX_MEMBERS} members; split it")
                member = self._validate(member)
                for column, value in zip(
                    columns.values(), (*_name_hashes(member.name), *member[1:]), strict=False
                ):
                    column.append(value)
                if on_member:
                    on_member(self, number, member)
                if number % MEMBERS_PER_ALIVE == 0:
                    alive()
        except ReadError as error:
            self.missing_error = (error.status, str(error))
        self._sort(columns)

    def _sort(self, columns: dict[str, array[int]]) -> None:
        order = np.argsort(np.asarray(columns["hash"]), kind="stable")
        self._columns: dict[str, npt.NDArray[Any]] = {}
        for name in list(columns):
            self._columns[name] = np.asarray(columns.pop(name))[order]
        self._hash, self._check = self._columns["hash"], self._columns["check"]
        duplicate = (self._hash[:-1] == self._hash[1:]) & (self._check[:-1] == self._check[1:])
        self.members = len(order)
        self.last = np.ones(self.members, bool)  # [members], in archive order: no later member has the name
        self.last[order[:-1][duplicate]] = False

    def _members(self, start: bytes) -> Iterator[ArchiveMember]:
        if kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None):
            raise ReadError(
                Status.UNSUPPORTED, f"the archive is compressed ({kind}); unpack it or make it a plain .tar"
            )
        if not start:
            raise ReadError(Status.TRUNCATED, "the archive has 0 bytes")
        return (_zip_members if self._zip else _tar_members)(self._pread, self._size)

    def _validate(self, member: ArchiveMember) -> ArchiveMember:
        """Return the member, as damaged if its numbers are impossible, which would not fit the index."""
        offset, size, packed, _ = member[2:]
        if 0 <= offset <= self._size and 0 <= size < 1 << 62 and 0 <= packed < 1 << 62:
            return member
        kind = DAMAGED if member.kind in (STORED, DEFLATED) else member.kind
        return ArchiveMember(member.name, kind, 0, 0)

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
            return self._read_bytes(member.offset, member.size)
        # so `admit` bounds the compressed bytes too
        if member.packed > member.size + member.size // 8 + 1024:
            raise ReadError(Status.CORRUPT, f"it has {member.packed} compressed bytes for {member.size}")
        offset = self._data_offset(member)
        self._check_end(offset + member.packed)
        admit(member.size)
        data = self._read_bytes(offset, member.packed)
        if member.kind == DEFLATED:
            data = _inflate(data, member.size)
        if len(data) != member.size:
            raise ReadError(Status.CORRUPT, f"the member has {len(data)} bytes, not {member.size}")
        if zlib.crc32(data) != member.crc:
            raise ReadError(Status.CORRUPT, "the member's CRC-32 does not match its content")
        return data

    def may_be_image(self, member: ArchiveMember) -> bool:
        """Return whether the first bytes are those of an image or cannot be read."""
        if member.kind in _REFUSED:
            return member.kind not in (LINK, SPECIAL)
        try:
            offset = self._data_offset(member) if self._zip else member.offset
            start = self._pread(min(SIGNATURE_BYTES, member.packed if self._zip else member.size), offset)
            return may_be_image(_inflate(start, SIGNATURE_BYTES) if member.kind == DEFLATED else start)
        except ReadError:
            return True

    def _find(self, name: str) -> ArchiveMember:
        name_hash, check = _name_hashes(_without_dot_slash(name))
        position = int(np.searchsorted(self._hash, np.uint64(name_hash), side="right")) - 1
        while position >= 0 and self._hash[position] == name_hash:
            if self._check[position] == check:
                return ArchiveMember(
                    name, *(int(column[position]) for column in list(self._columns.values())[2:])
                )
            position -= 1
        raise ReadError(*self.missing_error)

    def _data_offset(self, member: ArchiveMember) -> int:
        """Return the offset of a zip member's data, which follow its local header."""
        header = self._pread(30, member.offset)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise ReadError(Status.CORRUPT, f"no member begins at byte {member.offset} of the archive")
        name, extra = struct.unpack("<HH", header[26:])
        return member.offset + 30 + int(name + extra)

    def _check_end(self, end: int) -> None:
        if end > self._size:
            raise ReadError(Status.TRUNCATED, f"the archive ends {end - self._size} bytes before the member")

    def _read_bytes(self, offset: int, size: int) -> bytes:
        data = self._pread(size, offset)
        while len(data) < size:
            chunk = self._pread(size - len(data), offset + len(data))
            if not chunk:
                raise ReadError(Status.TRUNCATED, "the archive became shorter during the run")
            data += chunk
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
    """Return 64 bits to search a name by and 32 more to confirm it."""
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
    """Return the kind of archive by its first bytes: zip, tar, compressed, or empty for none."""
    if start.startswith(_ZIP_STARTS):
        return "zip"
    if start[257:262] == b"ustar":
        return "tar"
    return "compressed" if start.startswith(tuple(_COMPRESSED)) else ""


def _inflate(data: bytes, size: int) -> bytes:
    """Inflate at most `size` bytes, and one more if the data are longer."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ReadError(Status.CORRUPT, f"the member cannot be inflated: {error}") from None


class _ArchiveView(io.RawIOBase):
    """A file for zipfile and tarfile that reads at most `spare` bytes and passes each read to `check`."""

    def __init__(self, pread: Pread, size: int, spare: int, check: Callable[[bytes], str | None]) -> None:
        self._pread, self._size, self._position = pread, size, 0
        self.spare, self._check = spare, check

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(22, "before the start")  # as zipfile expects
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        remaining = max(0, self._size - self._position)
        count = remaining if size is None or size < 0 else min(size, remaining)
        if count > self.spare:
            raise ReadError(
                Status.UNSUPPORTED, f"the headers at byte {self._position} of the archive have {count} bytes"
            )
        data = self._pread(count, self._position) if count else b""
        self._position += len(data)
        self.spare -= len(data)
        if problem := self._check(data):
            raise ReadError(Status.UNSUPPORTED, problem)
        return data


def _zip_members(pread: Pread, size: int) -> Iterator[ArchiveMember]:
    def check(data: bytes) -> str | None:
        if len(data) <= 46 * MAX_ZIP_MEMBERS or data.count(b"PK\x01\x02") <= MAX_ZIP_MEMBERS:
            return None
        return f"the archive has more than {MAX_ZIP_MEMBERS} members; split it or make it a .tar"

    view = cast(IO[bytes], _ArchiveView(pread, size, MAX_ZIP_DIRECTORY, check))
    if not zipfile.is_zipfile(view):
        raise ReadError(Status.TRUNCATED, "the archive has no directory: it is cut short or not a .zip")
    try:
        with zipfile.ZipFile(view) as directory:
            infos = directory.infolist()
        del directory
    except (ReadError, MemoryError):
        raise
    except NotImplementedError as error:
        raise ReadError(Status.UNSUPPORTED, f"the archive cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise ReadError(Status.CORRUPT, "a name in the archive is marked as UTF-8, but is not") from None
    except OSError:
        raise
    except Exception as error:  # zipfile may raise anything; no archive may end the run
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
        return (
            "the archive's headers have a number of more than 64 digits"
            if _MANY_DIGITS.search(data)
            else None
        )

    view = _ArchiveView(pread, size, MAX_TAR_HEADERS, check)
    end = 0
    try:
        tar = tarfile.open(  # noqa: SIM115 - there is nothing to close
            fileobj=cast(IO[bytes], view), mode="r:", encoding="utf-8", errors="backslashreplace"
        )
        while (info := tar.next()) is not None:
            cast(Any, tar).members.clear()  # else tarfile keeps all of them
            if tar.offset <= end:
                raise ReadError(
                    Status.CORRUPT, f"the archive is damaged at byte {end}: it goes backward there"
                )
            if len(info.pax_headers) > MAX_TAR_SETTINGS:
                reason = f"a member of the archive has more than {MAX_TAR_SETTINGS} pax settings"
                raise ReadError(Status.UNSUPPORTED, reason)
            end, view.spare = tar.offset, MAX_TAR_HEADERS
            yield ArchiveMember(_without_dot_slash(info.name), _tar_kind(info), info.offset_data, info.size)
        end = tar.offset
    except (ReadError, OSError, MemoryError):
        raise
    except Exception:  # tarfile may raise anything; the checks below find the damage at `end`
        pass
    tail = pread(tarfile.BLOCKSIZE, end) if end < size else b""
    if len(tail) < tarfile.BLOCKSIZE:  # the end mark, a block of zeros, is missing
        raise ReadError(Status.TRUNCATED, f"the archive has no end mark; is it cut short at byte {size}?")
    if any(tail):
        raise ReadError(Status.CORRUPT, f"the archive is damaged at byte {end}: no member begins there")
    if size - end > TAR_PADDING:
        raise ReadError(
            Status.TRUNCATED,
            f"the archive ends at byte {end} of {size}: it was cut short, or several archives were joined",
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
    """Keeps the archives that were read last open and indexed."""

    def __init__(self) -> None:
        self._archives: OrderedDict[str, Archive] = OrderedDict()
        self._lock = threading.Lock()
        self._index_lock = threading.Lock()  # one archive at a time: zipfile needs much memory
        self._steps = 0  # progress of the archive that is being indexed

    def get(self, path: str, alive: OnAlive) -> Archive:
        """Return the archive, indexed. Raises OSError, and ReadError if `path` is not a file."""
        if archive := self._lookup(path):
            return archive
        with self._wait_for_index_lock(alive):
            return self._lookup(path) or self._add(path, alive, None)

    def index(self, path: str, on_member: OnMember) -> Archive:
        """Index the archive again and pass each member to `on_member`."""
        with self._wait_for_index_lock(lambda: None):
            return self._add(path, lambda: None, on_member)

    def drop(self, path: str) -> None:
        with self._lock:
            self._archives.pop(path, None)

    def _lookup(self, path: str) -> Archive | None:
        with self._lock:
            if path in self._archives:
                self._archives.move_to_end(path)
            return self._archives.get(path)

    def _add(self, path: str, alive: OnAlive, on_member: OnMember | None) -> Archive:
        def step() -> None:
            self._steps += 1
            alive()

        archive = Archive(path, step, on_member)
        with self._lock:
            self._archives[path] = archive
            members = sum(cached.members for cached in self._archives.values())
            while len(self._archives) > 1 and (
                members > MAX_CACHED_MEMBERS or len(self._archives) > MAX_CACHED_ARCHIVES
            ):
                members -= self._archives.popitem(last=False)[1].members
        return archive

    @contextmanager
    def _wait_for_index_lock(self, alive: OnAlive) -> Iterator[None]:
        """Hold the lock; while waiting, call `alive` whenever the thread that indexes has made progress."""
        last_steps = -1
        while not self._index_lock.acquire(timeout=0.5):
            if self._steps != last_steps:
                last_steps = self._steps
                alive()
        try:
            yield
        finally:
            self._index_lock.release()


_cache = _ArchiveCache()  # for listing and reading, so that an archive is indexed once
