"""Folders that a run writes, on a disk or in an object store: each file is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from engine.errors import UsageError
from engine.lock import hold
from engine.storage.common import OBJECT_STORES, Place, Url

LOCK = ".lock"
BEAT_S = 10.0  # an object store's lock is renewed so often
STALE_S = 60.0  # and is nobody's after so long without


class Store(Protocol):
    """Files of one folder, by name. Trouble is an OSError, as with files."""

    place: Place

    def names(self) -> list[str]: ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def opened(self, name: str) -> AbstractContextManager[Any]:
        """What pyarrow can read from, anywhere in the file."""
        ...

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A file to write; at the end of the block it becomes `name`, unless the block raised."""
        ...

    def delete(self, name: str) -> None:
        """Nothing happens when it is not there."""
        ...

    def local(self, name: str) -> Path:
        """A file of this machine that holds `name`, or may be made to be put there by `writing`."""
        ...

    def lock(self) -> Callable[[], None]:
        """Make the folder and keep others out until what this returns is called. Raises BlockingIOError."""
        ...

    def remove(self) -> None:
        """The folder itself, if this made it and nothing is left in it."""
        ...


def store_at(place: Place) -> Store:
    """Raises UsageError for a place that can't be written."""
    if not isinstance(place, Url):
        return LocalFolder(place)
    if place.scheme not in OBJECT_STORES:
        known = ", ".join(f"{scheme}://" for scheme in OBJECT_STORES)
        raise UsageError(f"output {place.shown}: {place.scheme}:// can't be written; a folder, {known} can")
    return ObjectFolder(place)


class LocalFolder:
    def __init__(self, path: Path) -> None:
        self.place: Place = path
        self._path = path
        self._made = False

    def names(self) -> list[str]:
        return os.listdir(self._path) if self._path.is_dir() else []

    def exists(self, name: str) -> bool:
        return (self._path / name).exists()

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def opened(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext(self._path / name)

    def writing(self, name: str) -> AbstractContextManager[Path]:
        return atomic(self._path / name)

    def delete(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        return self._path / name

    def lock(self) -> Callable[[], None]:
        if self._path.exists() and not self._path.is_dir():
            raise UsageError(f"output {self._path}: this is a file; give a folder with -o")
        self._made = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.mkdir(mode=0o700, exist_ok=True)  # rows name people
        held = hold(self._path / LOCK)
        return lambda: os.close(held)

    def remove(self) -> None:
        if self._made:
            with suppress(OSError):  # somebody else put something there, or deleted it
                self._path.rmdir()


class ObjectFolder:
    """Below a prefix of a bucket. An object is uploaded from a local file and seen when it is complete."""

    def __init__(self, url: Url) -> None:
        from engine.storage import remote

        self.place: Place = url
        self._base, self._files = url.rest, remote.filesystem(url)
        self._scratch = tempfile.TemporaryDirectory(prefix="engine-")

    def names(self) -> list[str]:
        from pyarrow.fs import FileSelector

        with _plainly():
            found = self._files.get_file_info(FileSelector(self._base, allow_not_found=True))
        return [info.base_name for info in found if info.is_file]

    def exists(self, name: str) -> bool:
        with _plainly():
            return bool(self._files.get_file_info(self._key(name)).is_file)

    def read(self, name: str) -> bytes:
        with _plainly(), self._files.open_input_file(self._key(name)) as opened:
            return bytes(opened.read())

    def opened(self, name: str) -> AbstractContextManager[Any]:
        with _plainly():
            return self._files.open_input_file(self._key(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        file = Path(self._scratch.name, name)
        try:
            yield file
            with _plainly():
                self._upload(file, name)
        finally:
            if file != self.local(name):
                file.unlink(missing_ok=True)

    def _upload(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        with file.open("rb") as source, self._files.open_output_stream(self._key(name)) as target:
            shutil.copyfileobj(source, target, 8 << 20)
        if self._files.get_file_info(self._key(name)).size != size:
            self.delete(name)
            raise OSError("the upload broke off")

    def delete(self, name: str) -> None:
        with _plainly(), suppress(FileNotFoundError):
            self._files.delete_file(self._key(name))

    def local(self, name: str) -> Path:
        copy = Path(self._scratch.name, f"local-{name}")
        if not copy.exists() and self.exists(name):
            copy.write_bytes(self.read(name))
        return copy

    def lock(self) -> Callable[[], None]:
        """By an object that is renewed, and goes stale when its owner dies.

        Two processes that start in the same second may both get it; a part that is written twice is the same.
        """
        with suppress(FileNotFoundError):
            if self._is_held():
                raise BlockingIOError
        self._beat()
        ended = threading.Event()
        threading.Thread(target=self._keep_beating, args=(ended,), name="lock", daemon=True).start()

        def unlock() -> None:
            ended.set()
            with suppress(OSError):
                self.delete(LOCK)
            self._scratch.cleanup()

        return unlock

    def _is_held(self) -> bool:
        info = self._files.get_file_info(self._key(LOCK))
        if not info.is_file or (info.mtime and time.time() - info.mtime.timestamp() > STALE_S):
            return False
        owner = json.loads(self.read(LOCK))
        return owner["host"] != socket.gethostname() or Path("/proc", str(owner["process"])).exists()

    def _beat(self) -> None:
        owner = {"host": socket.gethostname(), "process": os.getpid()}
        with self.writing(LOCK) as file:
            file.write_text(json.dumps(owner))

    def _keep_beating(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            with suppress(OSError):
                self._beat()

    def remove(self) -> None:
        """Prefixes are not made, and so not removed."""

    def _key(self, name: str) -> str:
        return f"{self._base}/{name}"


@contextmanager
def _plainly() -> Iterator[None]:
    """What a library says of an object store, without keys and names."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        from engine.storage import remote

        denied = remote.is_denied(error)
        raise OSError("access denied" if denied else "the object store does not answer") from None


class atomic:
    """`with atomic(path) as temporary:` write `temporary`; then it is synced and renamed to `path`."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._temporary = target.with_name(f".{target.name}.tmp")

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


def write_json(file: AbstractContextManager[Path], data: dict[str, Any]) -> None:
    """Into what `atomic` or `Store.writing` gives."""
    with file as temporary:
        temporary.write_text(json.dumps(data, indent=2, default=str) + "\n")
