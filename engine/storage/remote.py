"""Read files from object stores and web servers by URL."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from engine.core.errors import UsageError
from engine.core.location import HTTP_SCHEMES, Url, parse
from engine.core.records import Status
from engine.storage import http, objects
from engine.storage.errors import ReadError, with_retries

MAX_MANIFEST = 16 << 30  # bytes


def read(url: Url, admit: Callable[[int], None]) -> bytes:
    client = http if url.scheme in HTTP_SCHEMES else objects
    return with_retries(lambda: b"".join(client.read_chunks(url, admit)))


def open_random(text: str) -> tuple[Callable[[int, int], bytes], int, None, Callable[[], None]]:
    """Return a thread-safe random reader of an object, its length and its close function.

    Raises FileNotFoundError, ReadError.
    """
    url = _parse_url(text)
    if url.scheme in HTTP_SCHEMES:
        raise ReadError(
            Status.UNSUPPORTED,
            "it is an archive on a web server; archives can be read from disks and object stores",
        )
    try:
        file, size = with_retries(lambda: objects.open_object(url))
    except ReadError as error:
        if error.status == Status.MISSING:
            raise FileNotFoundError from None
        raise

    def pread(count: int, start: int) -> bytes:
        return with_retries(lambda: objects.read_chunk(file, max(0, min(count, size - start)), start))

    return pread, size, None, file.close


def exists_at(text: str) -> bool:
    return exists(_parse_url(text))


def _parse_url(text: str) -> Url:
    try:
        url = parse(text)
    except ValueError as error:
        raise ReadError(Status.UNREADABLE, str(error)) from None
    assert isinstance(url, Url)
    return url


def fetch_manifest(url: Url, folder: Path) -> Path:
    """Copy the file at `url` into `folder` with its name and, if known, its time of change.

    Raises UsageError.
    """
    client = http if url.scheme in HTTP_SCHEMES else objects
    target = folder / (url.name or "manifest")

    def admit(size: int) -> None:
        if size > MAX_MANIFEST:
            raise ReadError(Status.TOO_LARGE, f"it has {size} bytes; allowed: up to {MAX_MANIFEST}")

    def copy() -> None:
        with target.open("wb") as file:
            for chunk in client.read_chunks(url, admit):
                file.write(chunk)

    try:
        with_retries(copy)
        if client is objects and (modified := with_retries(lambda: objects.modified_ns(url))) is not None:
            os.utime(target, ns=(modified, modified))
    except ReadError as error:
        hint = (
            "; give a list of the images, since only a local folder can be listed"
            if error.status == Status.MISSING
            else ""
        )
        raise UsageError(f"manifest {url}: {error}{hint}") from None
    return target


def exists(url: Url) -> bool:
    """Check without retries whether a file exists; the caller checks several files."""
    try:
        return http.exists(url) if url.scheme in HTTP_SCHEMES else objects.exists(url)
    except ReadError:
        return False


def probe_location(url: Url, *, retry: bool) -> ReadError | None:
    """Return why the storage of `url` cannot be read at all; None if it answers."""
    client = http if url.scheme in HTTP_SCHEMES else objects
    try:
        if retry:
            with_retries(lambda: client.probe(url))
        else:
            client.probe(url)
    except ReadError as error:
        return error if error.status == Status.UNREADABLE else None
    return None
