"""Object stores by pyarrow's filesystems, web servers by urllib3.

Credentials, region and endpoint come from where these libraries look for them: AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL and so on, GOOGLE_APPLICATION_CREDENTIALS or STORAGE_EMULATOR_HOST, AZURE_STORAGE_ACCOUNT and
AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN. No error text repeats a URL or a server's words: they hold keys.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from engine.errors import UsageError
from engine.records import Status
from engine.storage.common import ReadError, Url, missing_package

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")
TRIES = 4
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
CONNECT_S, ANSWER_S = 10.0, 30.0
_PIECE = 1 << 20  # bytes
_DENIED = re.compile(r"ACCESS_DENIED|PERMISSION|FORBIDDEN|Forbidden|HTTP status 40[13]|code: 40[13]")
_AGAIN = (429, 500, 502, 503, 504)


class _Transient(Exception):  # noqa: N818 - not a failure yet
    """Worth another try."""


def read(url: Url, admit: Callable[[int], None]) -> bytes:
    """The bytes at `url`, after as many tries as are sensible."""
    once = _of_web if url.scheme in ("http", "https") else _of_store
    granted = 0

    def admit_once(size: int) -> None:
        nonlocal granted
        if size > granted or not size:
            admit(size - granted)
            granted = size

    return _patiently(lambda: once(url, admit_once))


def open_random(url: Url) -> tuple[Any, Callable[[int, int], bytes], int]:
    """An object as a file, what reads so many bytes from any place of it in any thread, and its length."""

    def opened() -> Any:
        try:
            return filesystem(url).open_input_file(name_of(url))
        except OSError as error:
            raise _named(error) from None

    file = _patiently(opened)
    size = int(file.size())

    def pread(count: int, start: int) -> bytes:
        def once() -> bytes:
            try:
                return bytes(file.read_at(max(0, min(count, size - start)), start))
            except OSError as error:
                raise _named(error) from None

        return _patiently(once)

    return file, pread, size


def download(url: Url, target: Path) -> None:
    """Write what is at `url` to `target`, however large it is. Raises ReadError."""

    def from_store() -> None:
        try:
            with filesystem(url).open_input_file(name_of(url)) as opened, target.open("wb") as file:
                shutil.copyfileobj(opened, file, _PIECE)
                if file.tell() < opened.size():
                    raise _Transient(f"{file.tell()} of {opened.size()} bytes came")
        except OSError as error:
            raise _named(error) from None

    def from_web() -> None:
        target.write_bytes(_of_web(url, lambda size: None))

    _patiently(from_web if url.scheme in ("http", "https") else from_store)


def exists(url: Url) -> bool:
    """Whether the server answers and has it; one try."""
    try:
        if url.scheme in ("http", "https"):
            return bool(_pool().request("HEAD", url, retries=False, redirect=True).status < 400)
        from pyarrow.fs import FileType

        files = filesystem(url, tries=1)
        return bool(files.get_file_info(name_of(url)).type != FileType.NotFound)
    except Exception:  # of a library, about a server that does not answer
        return False


def reachable(url: Url) -> bool:
    """Whether the bucket or host of `url` is there and takes the credentials.

    A refusal counts as an answer: who may read a bucket need not be allowed to list it.
    """
    try:
        if url.scheme in ("http", "https"):
            _pool().request("HEAD", url.top, retries=False, redirect=False)
            return True
        from pyarrow.fs import FileSelector, FileType

        files, bucket = filesystem(url, tries=1), url.top.rest
        if files.get_file_info(bucket).type == FileType.NotFound:
            return False
        files.get_file_info(FileSelector(f"{bucket}/.nothing-of-this-name", allow_not_found=True))
    except UsageError:
        raise
    except Exception as error:
        return is_denied(error)
    return True


def is_denied(error: Exception) -> bool:
    """Whether a server says that it may not be read, rather than nothing."""
    return bool(_DENIED.search(str(error)))


def name_of(url: Url) -> str:
    """As the filesystem of `url` wants it: bucket/key."""
    return url.rest


def filesystem(url: Url, *, tries: int = TRIES) -> FileSystem:
    """The object store that `url` is in; any thread may use it. Raises UsageError without an account."""
    return _filesystem(url.scheme, tries)


@functools.cache
def _filesystem(scheme: str, tries: int) -> FileSystem:
    from pyarrow import fs

    environment = os.environ
    if scheme == "s3":
        endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        parts = urlsplit(endpoint) if endpoint else None
        return fs.S3FileSystem(
            anonymous=environment.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true"),
            region=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"),
            endpoint_override=parts.netloc if parts else None,
            scheme="http" if parts and parts.scheme == "http" else "https",
            connect_timeout=CONNECT_S,
            request_timeout=ANSWER_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=tries),
        )
    if scheme == "gs":
        emulator = environment.get("STORAGE_EMULATOR_HOST", "")
        parts = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
        if not emulator:
            return fs.GcsFileSystem(retry_time_limit=_seconds(tries))
        return fs.GcsFileSystem(
            anonymous=True,
            endpoint_override=parts.netloc,
            scheme=parts.scheme,
            retry_time_limit=_seconds(tries),
        )
    account = environment.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise UsageError("az:// needs the account's name in AZURE_STORAGE_ACCOUNT")
    return fs.AzureFileSystem(
        account,
        account_key=environment.get("AZURE_STORAGE_KEY"),
        sas_token=environment.get("AZURE_STORAGE_SAS_TOKEN"),
    )


def _seconds(tries: int) -> Any:
    from datetime import timedelta

    return timedelta(seconds=5 * tries)


def _of_store(url: Url, admit: Callable[[int], None]) -> bytes:
    try:
        with filesystem(url).open_input_file(name_of(url)) as opened:
            size = opened.size()
            admit(size)
            data = opened.read(size)
    except OSError as error:
        raise _named(error) from None
    if len(data) < size:
        raise _Transient(f"{len(data)} of {size} bytes came")
    return bytes(data)


def _named(error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError):
        return ReadError(Status.MISSING, "no such object")
    if is_denied(error):
        return ReadError(Status.UNREADABLE, "access denied")
    return _Transient("the object store does not answer")


@functools.cache
def _pool() -> Any:
    try:
        import urllib3
    except ImportError:
        raise missing_package("urllib3, which reads https://,", "https") from None
    timeout = urllib3.Timeout(connect=CONNECT_S, read=ANSWER_S)
    return urllib3.PoolManager(
        maxsize=64, timeout=timeout, retries=urllib3.Retry(5, status=0, read=0, connect=0)
    )


def _of_web(url: Url, admit: Callable[[int], None]) -> bytes:
    pool = _pool()
    from urllib3.exceptions import HTTPError, LocationValueError

    try:
        response = pool.request("GET", url, preload_content=False, headers={"Accept-Encoding": "identity"})
    except LocationValueError:
        raise ReadError(Status.UNREADABLE, "not a URL") from None
    except HTTPError:
        raise _Transient("the server does not answer") from None
    try:
        return _body(response, admit)
    except HTTPError:
        raise _Transient("the answer broke off") from None
    finally:
        response.close()


def _body(response: Any, admit: Callable[[int], None]) -> bytes:
    """Of an answer as long as it says; piece by piece, since some don't say."""
    if response.status in (404, 410):
        raise ReadError(Status.MISSING, f"HTTP status {response.status}")
    if response.status in _AGAIN:
        raise _Transient(f"HTTP status {response.status}")
    if response.status != 200:
        raise ReadError(Status.UNREADABLE, f"HTTP status {response.status}")
    announced = response.headers.get("Content-Length", "")
    size = int(announced) if announced.isdecimal() else None
    if size is not None:
        admit(size)
    data = bytearray()
    while piece := response.read(_PIECE):
        data += piece
        admit(len(data))
    if size is not None and len(data) != size:
        raise _Transient(f"{len(data)} of {size} bytes came")
    if not data:
        admit(0)
    return bytes(data)


def _patiently(action: Callable[[], T]) -> T:
    """What `action` gives, tried again after waits that double, with jitter."""
    for attempt in range(TRIES):
        try:
            return action()
        except _Transient as error:
            last = str(error)
            if attempt < TRIES - 1:
                time.sleep(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1))
    raise ReadError(Status.UNREADABLE, f"{last}, {TRIES} tries")
