"""The folder that results are written to: on this machine, or in an object store.

Files appear whole or not at all.
"""

from __future__ import annotations

import errno
import fcntl
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
from engine.lock import NumberedLocks, hold
from engine.records import Status
from engine.storage import objects
from engine.storage.common import ReadError, retrying
from engine.storage.location import HTTP_SCHEMES, Url

LOCK = ".lock"  # names of all that locks a folder begin with it
_NUMBERED = ".locks"
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

    def lock(self, *, shared: bool = False) -> None:
        """Make the folder and keep other processes out; if `shared`, only those that do not share it.

        Raises BlockingIOError while one that can't be shared with is in there.
        """
        ...

    def sweep(self) -> None:
        """Delete what writers that were killed have left, when nobody else writes."""
        ...

    def unlock(self, *, leave_no_trace: bool) -> None: ...

    def take_turn(self) -> bool:
        """One at a time of those that share the folder has the turn. False while another has it."""
        ...

    def give_turn(self) -> None: ...

    def claim(self, index: int) -> bool:
        """Take a part in hand among those that share the folder. False while another has it."""
        ...

    def release(self, index: int) -> None: ...

    def is_claimed(self, index: int) -> bool:
        """Whether another has this part in hand."""
        ...


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
        self._numbered: NumberedLocks | None = None  # 0: the turn, from 1: parts; None unless shared
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

    def lock(self, *, shared: bool = False) -> None:
        self._created = not self.location.exists()
        try:
            self._lock = self._held(shared)
        except FileNotFoundError:  # another that began nothing has just removed the folder
            self._lock = self._held(shared)
        if shared:  # temporary files may be in use, and vanish with the file that they become
            self._numbered = NumberedLocks(self.location / _NUMBERED)
            return
        self.sweep()

    def sweep(self) -> None:
        for leftover in self.location.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def _held(self, shared: bool) -> int:
        self.location.parent.mkdir(parents=True, exist_ok=True)
        self.location.mkdir(mode=0o700, exist_ok=True)  # rows name people
        return hold(self.location / LOCK, shared=shared)

    def unlock(self, *, leave_no_trace: bool) -> None:
        if leave_no_trace and self._alone():
            self.delete(_NUMBERED)
            self.delete(LOCK)
            if self._created:
                with suppress(OSError):  # somebody else put something there, or deleted it
                    self.location.rmdir()
        if self._numbered:
            self._numbered.close()
        os.close(self._lock)

    def _alone(self) -> bool:
        if self._numbered:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    def take_turn(self) -> bool:
        return self._numbered is None or self._numbered.take(0)

    def give_turn(self) -> None:
        if self._numbered:
            self._numbered.give(0)

    def claim(self, index: int) -> bool:
        return self._numbered is None or self._numbered.take(1 + index)

    def release(self, index: int) -> None:
        if self._numbered:
            self._numbered.give(1 + index)

    def is_claimed(self, index: int) -> bool:
        return self._numbered is not None and self._numbered.is_taken(1 + index)


class ObjectFolder:
    """A prefix of an object store.

    The lock is an object that its owner writes anew every BEAT_S seconds. It counts for nothing STALE_S
    seconds after the last time, at once if the owner was a process of this machine that is gone. Those that
    share the folder have one each, `.lock-ID`, and a part in hand is an object that names its owner's.
    pyarrow has no conditional writes: two that ask in the same instant may both get the lock, or the same
    part, which is harmless, since parts are the same whoever writes them. Only one gets the turn.
    """

    def __init__(self, location: Url) -> None:
        self.location = location
        self._sign: _Sign | None = None
        self._shared = False
        self._ticket = 0
        self._ahead: list[str] | None = None  # signs of those that may have the turn before this one
        self._claimed: set[int] = set()
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

    def lock(self, *, shared: bool = False) -> None:
        name = f"{LOCK}-{uuid.uuid4().hex}" if shared else LOCK
        self._refuse_company(shared)
        sign = _Sign(name, lambda record: self._put(name, record))
        record = sign.show()
        try:
            self._refuse_company(shared, but_for=name)  # of two at once one at least sees the other
            if self.read(name, lambda opened: opened.read()) != record:
                raise BlockingIOError
        except BlockingIOError:
            with suppress(FileNotFoundError):
                if self.read(name, lambda opened: opened.read()) == record:  # else it is the other's
                    self.delete(name)
            raise
        self._sign, self._shared = sign, shared
        sign.keep_showing()

    def sweep(self) -> None:
        """An upload that was cut off is not there; signs and claims of the dead are."""
        for name in self.names():
            sign = name.startswith(f"{LOCK}-")
            if (sign or _CLAIM.fullmatch(name)) and not self._living(name if sign else self._owner(name)):
                self.delete(name)

    def _refuse_company(self, shared: bool, *, but_for: str = "") -> None:
        """Raises BlockingIOError when one is there that this one can't share with."""
        names = [LOCK] if shared else [name for name in self.names() if name.startswith(LOCK)]
        if any(self._living(name) for name in names if name != but_for):
            raise BlockingIOError

    def unlock(self, *, leave_no_trace: bool) -> None:
        if self._temporary:
            self._temporary.cleanup()
        if self._sign:
            self._sign.cease()
            for index in tuple(self._claimed):
                self.release(index)
            with suppress(StoreError):  # it will be stale soon
                self.delete(self._sign.name)

    def take_turn(self) -> bool:
        """Lamport's bakery: tickets are drawn in the sight of all, and the lowest is served.

        Who draws at the same time shows ticket 0 and is waited for; who draws later sees this one's.
        """
        if not self._shared:
            return True
        assert self._sign
        if self._ahead is None:
            self._sign.show(ticket=0)
            self._ticket = 1 + max(self._tickets().values(), default=0)
            self._sign.show(ticket=self._ticket)
            self._ahead = [name for name in self._tickets() if name != self._sign.name]
        while self._ahead:
            theirs = self._ticket_of(self._ahead[-1])
            if theirs is not None and (theirs, self._ahead[-1]) < (self._ticket, self._sign.name):
                return False
            self._ahead.pop()
        return True

    def give_turn(self) -> None:
        if self._shared and self._sign:
            self._ahead = None
            self._sign.show(ticket=None)

    def _tickets(self) -> dict[str, int]:
        """Of all that are drawing one, or hold one, by their signs."""
        signs = [name for name in self.names() if name.startswith(f"{LOCK}-")]
        tickets = {name: self._ticket_of(name) for name in signs}
        return {name: ticket for name, ticket in tickets.items() if ticket is not None}

    def _ticket_of(self, sign: str) -> int | None:
        return (self._living(sign) or {}).get("ticket")

    def claim(self, index: int) -> bool:
        if not self._shared:
            return True
        assert self._sign
        if self.is_claimed(index):
            return False
        name, mine = _claim_name(index), self._sign.name.encode()
        self._put(name, mine)
        if self.read(name, lambda opened: opened.read()) != mine:
            return False
        self._claimed.add(index)
        return True

    def release(self, index: int) -> None:
        if index in self._claimed:
            self._claimed.discard(index)
            with suppress(StoreError):  # it counts for nothing once its owner has gone
                self.delete(_claim_name(index))

    def is_claimed(self, index: int) -> bool:
        owner = self._owner(_claim_name(index))
        return owner != (self._sign and self._sign.name) and self._living(owner) is not None

    def _owner(self, claim: str) -> str | None:
        """The sign that a claim names."""
        try:
            owner = self.read(claim, lambda opened: opened.read()).decode()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return owner if owner.startswith(f"{LOCK}-") and "/" not in owner else None

    def _put(self, name: str, data: bytes) -> None:
        self._call(name, lambda files, path: _upload(files, path, data))

    def _living(self, sign: str | None) -> dict[str, Any] | None:
        """What the owner of a sign says, None if it is gone."""
        if sign is None:
            return None
        try:
            facts: dict[str, Any] = json.loads(self.read(sign, lambda opened: opened.read()))
            shown: float = self._call(sign, lambda files, path: files.get_file_info(path).mtime_ns or 0) / 1e9
        except (FileNotFoundError, ValueError):
            return None
        if time.time() - shown > STALE_S:
            return None
        here = facts.get("machine") == _machine()
        return None if here and facts.get("began") != _began(facts.get("pid")) else facts

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


class _Sign:
    """What a process shows of itself in an object, again and again, while it lives."""

    def __init__(self, name: str, put: Callable[[bytes], object]) -> None:
        pid = os.getpid()
        self.name, self._put = name, put
        self._facts: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "machine": _machine(),
            "pid": pid,
            "began": _began(pid),
        }
        self._lock, self._done = threading.Lock(), threading.Event()

    def show(self, **facts: int | None) -> bytes:
        """Write it, with new `facts` if there are some; returns what was written."""
        with self._lock:  # an old one must not follow a new one
            self._facts |= facts
            record = json.dumps(self._facts).encode()
            if not self._done.is_set():
                self._put(record)
            return record

    def keep_showing(self) -> None:
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            with suppress(StoreError):  # the parts will tell
                self.show()

    def cease(self) -> None:
        self._done.set()
        with self._lock:  # a write that is under way must not come after the object is deleted
            pass


_CLAIM = re.compile(r"\.part-\d{5,}\.lock")


def _claim_name(index: int) -> str:
    return f".part-{index:05d}.lock"


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
