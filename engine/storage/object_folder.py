"""Write a results folder in an object store and lock it with leases."""

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
from typing import Any

import pyarrow as pa
from pyarrow import fs

from engine.core.location import Url
from engine.core.records import Status
from engine.storage import objects
from engine.storage.errors import ReadError, with_retries
from engine.storage.folders import LOCK_FILE, StoreError, T

RENEW_S, LEASE_S = 20.0, 90.0
_CLAIM_NAME = re.compile(r"\.part-\d{5,}\.lock")


class ObjectFolder:
    """A prefix of an object store.

    The lock is a lease: an object that its owner rewrites every RENEW_S seconds. It expires LEASE_S seconds
    after the last write, or at once if its owner was a process of this machine that has ended. Processes that
    share the folder have one lease each, `.lock-ID`; the claim of a part is an object that names a lease.
    pyarrow has no conditional writes, so two processes may get the lock or a part at the same moment. That is
    harmless, since both write the same part. Only one process gets the run lock.
    """

    def __init__(self, location: Url) -> None:
        self.location = location
        self._lease: Lease | None = None
        self._shared = False
        self._ticket = 0
        self._tickets_before: list[str] | None = None  # leases that may get the run lock before this one
        self._claimed: set[int] = set()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def names(self) -> list[str]:
        def list_names(files: fs.FileSystem, path: str) -> list[str]:
            infos = files.get_file_info(fs.FileSelector(path, allow_not_found=True))
            return [info.base_name for info in infos]

        return self._call("", list_names)

    def exists(self, name: str) -> bool:
        return self._call(name, lambda files, path: files.get_file_info(path).type == fs.FileType.File)

    def read(self, name: str, parse: Callable[[pa.NativeFile], T]) -> T:
        def open_and_parse(files: fs.FileSystem, path: str) -> T:
            with files.open_input_file(path) as file:
                return parse(file)

        return self._call(name, open_and_parse)

    def _read_bytes(self, name: str) -> bytes:
        return self.read(name, lambda file: file.read())

    def write(self, name: str, write_to: Callable[[Path], object]) -> None:
        with tempfile.TemporaryDirectory(prefix="engine-") as folder:
            temporary = Path(folder) / name
            write_to(temporary)
            data = temporary.read_bytes()
        self._put(name, data)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._call(name, lambda files, path: files.delete_file(path))

    def local(self, name: str) -> Path:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="engine-")
        target = Path(self._temporary.name) / name
        with suppress(FileNotFoundError):
            target.write_bytes(self._read_bytes(name))
        return target

    def keep(self, name: str) -> None:
        assert self._temporary is not None
        written = Path(self._temporary.name) / name
        if written.exists() and not self.exists(name):
            self._put(name, written.read_bytes())

    def lock(self, *, shared: bool = False) -> None:
        name = f"{LOCK_FILE}-{uuid.uuid4().hex}" if shared else LOCK_FILE
        self._refuse_other_holders(shared)
        lease = Lease(name, lambda record: self._put(name, record))
        record = lease.renew()
        try:
            self._refuse_other_holders(shared, except_for=name)  # of two at once, at least one sees the other
            if self._read_bytes(name) != record:
                raise BlockingIOError
        except BlockingIOError:
            with suppress(FileNotFoundError):
                if self._read_bytes(name) == record:  # else another process holds it
                    self.delete(name)
            raise
        self._lease, self._shared = lease, shared
        lease.keep_renewing()

    def delete_leftovers(self) -> None:
        """Delete leases and claims of ended processes; an interrupted upload leaves no object."""
        for name in self.names():
            lease = name.startswith(f"{LOCK_FILE}-")
            if (lease or _CLAIM_NAME.fullmatch(name)) and not self._read_live_lease(
                name if lease else self._owner(name)
            ):
                self.delete(name)

    def _refuse_other_holders(self, shared: bool, *, except_for: str = "") -> None:
        """Raise BlockingIOError if another process holds a lock that excludes this one."""
        names = [LOCK_FILE] if shared else [name for name in self.names() if name.startswith(LOCK_FILE)]
        if any(self._read_live_lease(name) for name in names if name != except_for):
            raise BlockingIOError

    def unlock(self, *, remove_created: bool) -> None:
        if self._temporary:
            self._temporary.cleanup()
        if self._lease:
            self._lease.stop_renewing()
            for index in tuple(self._claimed):
                self.release(index)
            with suppress(StoreError):  # it expires soon
                self.delete(self._lease.name)

    def acquire_run_lock(self) -> bool:
        """Acquire the run lock by Lamport's bakery algorithm; return False while another process has it.

        Each process publishes a ticket in its lease, and the lowest ticket holds the lock. While a process
        chooses its ticket it publishes 0, so that others wait; a later process sees this ticket.
        """
        if not self._shared:
            return True
        assert self._lease
        if self._tickets_before is None:
            self._lease.renew(ticket=0)
            self._ticket = 1 + max(self._tickets().values(), default=0)
            self._lease.renew(ticket=self._ticket)
            self._tickets_before = [name for name in self._tickets() if name != self._lease.name]
        while self._tickets_before:
            other = self._tickets_before[-1]
            ticket = self._ticket_of(other)
            if ticket is not None and (ticket, other) < (self._ticket, self._lease.name):
                return False
            self._tickets_before.pop()
        return True

    def release_run_lock(self) -> None:
        if self._shared and self._lease:
            self._tickets_before = None
            self._lease.renew(ticket=None)

    def _tickets(self) -> dict[str, int]:
        """Return the tickets in all live leases by the lease's name; 0 for one that is being chosen."""
        leases = [name for name in self.names() if name.startswith(f"{LOCK_FILE}-")]
        tickets = {name: self._ticket_of(name) for name in leases}
        return {name: ticket for name, ticket in tickets.items() if ticket is not None}

    def _ticket_of(self, lease: str) -> int | None:
        return (self._read_live_lease(lease) or {}).get("ticket")

    def claim(self, index: int) -> bool:
        if not self._shared:
            return True
        assert self._lease
        if self.is_claimed(index):
            return False
        name, owner = _claim_name(index), self._lease.name.encode()
        self._put(name, owner)
        if self._read_bytes(name) != owner:
            return False
        self._claimed.add(index)
        return True

    def release(self, index: int) -> None:
        if index in self._claimed:
            self._claimed.discard(index)
            with suppress(StoreError):  # it expires with its lease
                self.delete(_claim_name(index))

    def is_claimed(self, index: int) -> bool:
        owner = self._owner(_claim_name(index))
        return owner != (self._lease and self._lease.name) and self._read_live_lease(owner) is not None

    def _owner(self, claim: str) -> str | None:
        """Return the lease that a claim names."""
        try:
            owner = self._read_bytes(claim).decode()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return owner if owner.startswith(f"{LOCK_FILE}-") and "/" not in owner else None

    def _put(self, name: str, data: bytes) -> None:
        self._call(name, lambda files, path: _upload(files, path, data))

    def _read_live_lease(self, lease: str | None) -> dict[str, Any] | None:
        """Read a lease; None if it has expired or its owner has ended."""
        if lease is None:
            return None
        try:
            facts: dict[str, Any] = json.loads(self._read_bytes(lease))
            renewed_ns = self._call(lease, lambda files, path: files.get_file_info(path).mtime_ns or 0)
        except (FileNotFoundError, ValueError):
            return None
        if time.time() - renewed_ns / 1e9 > LEASE_S:
            return None
        local = facts.get("machine") == _boot_id()
        return None if local and facts.get("began") != _process_start(facts.get("pid")) else facts

    def _call(self, name: str, action: Callable[[fs.FileSystem, str], T]) -> T:
        """Call `action` with the file system and the path of `name`, with retries. Raises StoreError."""
        url = self.location / name if name else self.location

        def attempt() -> T:
            files = objects.filesystem(url)
            try:
                return action(files, objects.path_of(url))
            except OSError as error:
                if objects.is_storage_error(error):
                    raise objects.to_read_error(error) from None
                raise

        try:
            return with_retries(attempt)
        except ReadError as error:
            if error.status == Status.MISSING:
                raise FileNotFoundError(errno.ENOENT, "the object does not exist", str(url)) from None
            raise StoreError(error, url) from None


class Lease:
    """An object that a process rewrites while it runs; it expires when the process ends."""

    def __init__(self, name: str, put: Callable[[bytes], object]) -> None:
        pid = os.getpid()
        self.name, self._put = name, put
        self._facts: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "machine": _boot_id(),
            "pid": pid,
            "began": _process_start(pid),
        }
        self._lock, self._done = threading.Lock(), threading.Event()

    def renew(self, **facts: int | None) -> bytes:
        """Write the lease, with new `facts` if given; return what was written."""
        with self._lock:  # an older record must not replace a newer one
            self._facts |= facts
            record = json.dumps(self._facts).encode()
            if not self._done.is_set():
                self._put(record)
            return record

    def keep_renewing(self) -> None:
        threading.Thread(target=self._renew_until_stopped, name="lock", daemon=True).start()

    def _renew_until_stopped(self) -> None:
        while not self._done.wait(RENEW_S):
            with suppress(StoreError):  # if the storage is lost, writing the next part fails
                self.renew()

    def stop_renewing(self) -> None:
        self._done.set()
        with self._lock:  # wait for a write in progress, which would create the object again
            pass


def _claim_name(index: int) -> str:
    return f".part-{index:05d}.lock"


def _upload(files: fs.FileSystem, path: str, data: bytes) -> None:
    """Upload with one write and one close: pyarrow would complete a stream that is dropped half-way.

    When all bytes are written at once, an upload that fails has failed pieces and is never completed.
    """
    stream = files.open_output_stream(path)
    stream.write(data)
    stream.close()
    size = files.get_file_info(path).size
    if size != len(data):
        raise ReadError(Status.UNREADABLE, f"{size} of {len(data)} bytes arrived", transient=True)


def _boot_id() -> str:
    """Return an identifier of this boot of the machine and of its process number space."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return uuid.uuid4().hex


def _process_start(pid: object) -> str | None:
    """Return the start time of the process `pid` in ticks; None if it does not exist."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return re.sub(r".*\)", "", stat, flags=re.DOTALL).split()[
        19
    ]  # after the name, which may contain anything
