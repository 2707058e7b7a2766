"""The folder that results are written to: on this machine, or in an object store.

Files appear whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from pyarrow import fs

from engine.errors import UsageError
from engine.lock import hold
from engine.records import Status
from engine.storage import objects
from engine.storage.common import ReadError, retrying
from engine.storage.location import HTTP_SCHEMES, Url

LOCK = ".lock"
BEAT_S, STALE_S = 20.0, 90.0
T = TypeVar("T")


class StoreError(OSError):
    """An object store fails, for good or for longer than is waited."""

    def __init__(self, error: ReadError, place: Url) -> None:
        code = errno.ENOENT if error.status == Status.MISSING else errno.EIO
        super().__init__(code, str(error), str(place))


def reason(error: OSError) -> str:
    """One line, without the place."""
    if isinstance(error, StoreError) or not error.errno:
        return " ".join(str(error.strerror or error).split())[:200]
    return os.strerror(error.errno)


class Folder(Protocol):
    """Where the files of one run are. Names have no folders in them; all but `location` may raise OSError."""

    @property
    def location(self) -> Path | Url: ...

    def names(self) -> list[str]:
        """Empty when there is no such folder."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str, take: Callable[[pa.NativeFile], T]) -> T:
        """What `take` makes of a file. Raises FileNotFoundError."""
        ...

    def write(self, name: str, write_to: Callable[[Path], object]) -> None:
        """Make or replace a file by what `write_to` writes to a temporary one."""
        ...

    def delete(self, name: str) -> None:
        """Nothing happens where there is none."""
        ...

    def local(self, name: str) -> Path:
        """A file's place on this machine, for those that need one; `keep` takes what was written there."""
        ...

    def keep(self, name: str) -> None: ...

    def lock(self) -> None:
        """Make the folder and keep other processes out. Raises BlockingIOError while one is in there."""
        ...

    def sweep(self) -> None:
        """Delete what writers that were killed have left half-written."""
        ...

    def unlock(self, *, leave_no_trace: bool) -> None: ...


def open_folder(location: Path | Url) -> Folder:
    """Raises UsageError where nothing can be written by such a URL."""
    if isinstance(location, Path):
        return LocalFolder(location)
    if location.scheme in HTTP_SCHEMES:
        raise UsageError(
            f"results {location}: a web server takes no files; give a folder, s3://, gs:// or az://"
        )
    return ObjectFolder(location)


class LocalFolder:
    def __init__(self, location: Path) -> None:
        self.location = location
        self._created = False
        self._lock = -1
        self._mine = f".{uuid.uuid4().hex[:8]}"  # several processes may write one part at once

    def names(self) -> list[str]:
        try:
            return os.listdir(self.location)
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        return (self.location / name).exists()

    def read(self, name: str, take: Callable[[pa.NativeFile], T]) -> T:
        with pa.OSFile(str(self.location / name), "rb") as opened:
            return take(opened)

    def write(self, name: str, write_to: Callable[[Path], object]) -> None:
        with atomic(self.location / name, self._mine) as temporary:
            write_to(temporary)

    def delete(self, name: str) -> None:
        (self.location / name).unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        return self.location / name

    def keep(self, name: str) -> None:
        """It is there."""

    def lock(self) -> None:
        self._created = not self.location.exists()
        self.location.parent.mkdir(parents=True, exist_ok=True)
        self.location.mkdir(mode=0o700, exist_ok=True)  # rows name people
        self._lock = hold(self.location / LOCK)
        self.sweep()

    def sweep(self) -> None:
        for leftover in self.location.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def unlock(self, *, leave_no_trace: bool) -> None:
        if leave_no_trace:
            self.delete(LOCK)
            if self._created:
                with suppress(OSError):  # somebody else put something there, or deleted it
                    self.location.rmdir()
        os.close(self._lock)


class ObjectFolder:
    """A prefix of an object store.

    The lock is an object that its owner writes anew every BEAT_S seconds. It counts for nothing STALE_S
    seconds after the last time, at once if the owner was a process of this machine that is gone. Two that
    start in the same instant may both get it: harmless, since parts are the same whoever writes them.
    """

    def __init__(self, location: Url) -> None:
        self.location = location
        self._done = threading.Event()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def names(self) -> list[str]:
        def listed(files: fs.FileSystem, path: str) -> list[str]:
            found = files.get_file_info(fs.FileSelector(path, allow_not_found=True))
            return [info.base_name for info in found]

        return self._call("", listed)

    def exists(self, name: str) -> bool:
        return self._call(name, lambda files, path: files.get_file_info(path).type == fs.FileType.File)

    def read(self, name: str, take: Callable[[pa.NativeFile], T]) -> T:
        def taken(files: fs.FileSystem, path: str) -> T:
            with files.open_input_file(path) as opened:
                return take(opened)

        return self._call(name, taken)

    def write(self, name: str, write_to: Callable[[Path], object]) -> None:
        with tempfile.TemporaryDirectory(prefix="engine-") as folder:
            temporary = Path(folder) / name
            write_to(temporary)
            data = temporary.read_bytes()
        self._call(name, lambda files, path: _upload(files, path, data))

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._call(name, lambda files, path: files.delete_file(path))

    def local(self, name: str) -> Path:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="engine-")
        target = Path(self._temporary.name) / name
        with suppress(FileNotFoundError):
            target.write_bytes(self.read(name, lambda opened: opened.read()))
        return target

    def keep(self, name: str) -> None:
        assert self._temporary is not None
        written = Path(self._temporary.name) / name
        if written.exists() and not self.exists(name):
            self._call(name, lambda files, path: _upload(files, path, written.read_bytes()))

    def lock(self) -> None:
        if self._owner_lives():
            raise BlockingIOError
        pid = os.getpid()
        mine = {"id": uuid.uuid4().hex, "machine": _machine(), "pid": pid, "began": _began(pid)}
        record = json.dumps(mine).encode()
        self._call(LOCK, lambda files, path: _upload(files, path, record))
        if self.read(LOCK, lambda opened: opened.read()) != record:
            raise BlockingIOError
        threading.Thread(target=self._beat, args=(record,), name="lock", daemon=True).start()

    def sweep(self) -> None:
        """An upload that was cut off is not there."""

    def unlock(self, *, leave_no_trace: bool) -> None:
        self._done.set()
        if self._temporary:
            self._temporary.cleanup()
        with suppress(StoreError):  # it will be stale soon
            self.delete(LOCK)

    def _beat(self, record: bytes) -> None:
        def again(files: fs.FileSystem, path: str) -> None:
            if not self._done.is_set():
                _upload(files, path, record)

        while not self._done.wait(BEAT_S):
            with suppress(StoreError):  # the parts will tell
                self._call(LOCK, again)

    def _owner_lives(self) -> bool:
        try:
            owner: dict[str, Any] = json.loads(self.read(LOCK, lambda opened: opened.read()))
            beat: float = self._call(LOCK, lambda files, path: files.get_file_info(path).mtime_ns or 0) / 1e9
        except (FileNotFoundError, ValueError):
            return False
        if time.time() - beat > STALE_S:
            return False
        return owner.get("machine") != _machine() or owner.get("began") == _began(owner.get("pid"))

    def _call(self, name: str, action: Callable[[fs.FileSystem, str], T]) -> T:
        """`action` with the file system and the path of `name`, tried again; raises StoreError."""
        place = self.location / name if name else self.location

        def tried() -> T:
            files = objects.filesystem(place)
            try:
                return action(files, objects.path_of(place))
            except OSError as error:
                if objects.of_storage(error):
                    raise objects.named(error) from None
                raise

        try:
            return retrying(tried)
        except ReadError as error:
            if error.status == Status.MISSING:
                raise FileNotFoundError(errno.ENOENT, "no such object", str(place)) from None
            raise StoreError(error, place) from None


def _upload(files: fs.FileSystem, path: str, data: bytes) -> None:
    """One write and one close: pyarrow completes what it can when a stream is dropped half-way.

    With all bytes handed over at once an upload that fails has failed pieces, and these are never completed.
    """
    stream = files.open_output_stream(path)
    stream.write(data)
    stream.close()
    size = files.get_file_info(path).size
    if size != len(data):
        raise ReadError(Status.UNREADABLE, f"{size} of {len(data)} bytes arrived", transient=True)


def _machine() -> str:
    """This boot of this machine, and the space of process numbers."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return uuid.uuid4().hex


def _began(pid: object) -> str | None:
    """When the process `pid` began, in ticks; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return re.sub(r".*\)", "", stat, flags=re.DOTALL).split()[19]  # behind the name, which may hold anything


class atomic:
    """`with atomic(path) as temporary:` write `temporary`; then it is synced and renamed to `path`."""

    def __init__(self, target: Path, mark: str = "") -> None:
        """`mark` tells the temporary files of several writers apart."""
        self._target = target
        self._temporary = target.with_name(f".{target.name}{mark}.tmp")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        _sync(self._temporary)
        self._temporary.replace(self._target)
        _sync(self._target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(target: Path, data: dict[str, Any]) -> None:
    with atomic(target) as temporary:
        temporary.write_text(as_json(data))


def as_json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str) + "\n"
