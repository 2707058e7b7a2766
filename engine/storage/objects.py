"""Object stores through pyarrow's own file systems: S3, Google Cloud Storage, Azure Blob Storage.

Region, endpoint and credentials come from where each vendor's own tools look for them.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import pyarrow as pa
from pyarrow import fs

from engine.core.location import Url
from engine.core.records import Status
from engine.storage.errors import CUT_SHORT, ReadError

IN_FLIGHT = 256  # requests that a file system may have open
CHUNK_BYTES = 64 << 20  # bytes of one request
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 10  # without an answer, without a byte

_filesystem_lock = threading.Lock()
_ERROR_SOURCE = re.compile(r"AWS Error|google::cloud|Azure|curl")
# what the vendors' libraries say, the first that fits: status, text, transient, denied
_ERROR_KINDS: tuple[tuple[str, Status, str, bool, bool], ...] = (
    (
        r"NO_SUCH_(KEY|BUCKET)|NoSuch(Key|Bucket)|status 404|NOT_FOUND",
        *(Status.MISSING, "no such object", False, False),
    ),
    (
        r"INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|EXPIRED|TOKEN|UNRECOGNIZED_CLIENT|INVALID_SIGNATURE"
        r"|InvalidAccessKeyId|SignatureDoesNotMatch|AuthenticationFailed|InvalidAuthenticationInfo"
        r"|CredentialUnavailable|[Ff]ailed to get token|UNAUTHENTICATED|\b401\b",
        *(Status.UNREADABLE, "the storage does not accept the credentials", False, False),
    ),
    (
        r"ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|AuthorizationPermission|AuthorizationFail|\b403\b",
        *(Status.UNREADABLE, "access denied", False, True),
    ),
    (
        r"PERMANENT_REDIRECT|PermanentRedirect|status 301|AuthorizationHeaderMalformed",
        *(Status.UNREADABLE, "the bucket is in another region; set AWS_REGION", False, False),
    ),
    (
        r"SLOW_DOWN|SlowDown|THROTTL|Throttl|RESOURCE_EXHAUSTED|TooManyRequests|ServerBusy|\b429\b",
        *(Status.UNREADABLE, "the storage is busy and refuses requests", True, False),
    ),
    (r"partial file", Status.UNREADABLE, CUT_SHORT, True, False),
    (
        r"NETWORK_CONNECTION|REQUEST_TIMEOUT|curl|DEADLINE_EXCEEDED|[Cc]onnect|[Tt]imeout|timed out",
        *(Status.UNREADABLE, "the storage does not answer", True, False),
    ),
)


def read_chunks(url: Url, admit: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the bytes of one object, mostly in one chunk. Raises ReadError.

    It takes a HEAD and a GET: pyarrow gives no way to get the size with the bytes.
    """
    with translate_errors():
        opened, left = _open_file(filesystem(url), path_of(url))
    with opened:
        admit(left)
        while left:
            with translate_errors():
                piece = opened.read(min(left, CHUNK_BYTES))
            if not piece:
                raise ReadError(Status.UNREADABLE, CUT_SHORT, transient=True)
            left -= len(piece)
            yield piece


def open_object(url: Url) -> tuple[Any, int]:
    """Open an object as a file; return it and its length. Raises ReadError."""
    with translate_errors():
        file = filesystem(url).open_input_file(path_of(url))
        return file, int(file.size())


def read_chunk(file: Any, count: int, start: int) -> bytes:
    """So many bytes from `start`. Raises ReadError."""
    with translate_errors():
        return bytes(file.read_at(count, start))


def _open_file(files: fs.FileSystem, path: str) -> tuple[pa.NativeFile, int]:
    if not isinstance(files, fs.GcsFileSystem):
        opened = files.open_input_file(path)
        return opened, opened.size()
    # there a file of random access waits for the network with the interpreter lock held
    info = files.get_file_info(path)
    if info.type != fs.FileType.File:
        raise FileNotFoundError
    return files.open_input_stream(path), info.size


def exists(url: Url) -> bool:
    with translate_errors():
        return bool(filesystem(url).get_file_info(path_of(url)).type == fs.FileType.File)


def modified_ns(url: Url) -> int | None:
    """Return when an object was written, in ns since 1970, if the storage knows. Raises ReadError."""
    with translate_errors():
        found = filesystem(url).get_file_info(path_of(url)).mtime_ns
        return None if found is None else int(found)


def probe(url: Url) -> None:
    """Raises ReadError where the bucket can't be listed.

    A listing of nothing: unlike a HEAD, its answer says whether it is the credentials that are wrong.
    """
    below = path_of(Url(url.scheme, url.host, "/.nothing"))
    with translate_errors():
        filesystem(url).get_file_info(fs.FileSelector(below, allow_not_found=True))


def path_of(url: Url) -> str:
    """Return the path for pyarrow's file systems: bucket or container, then the key."""
    bucket = url.host.partition("@")[0]
    return f"{bucket}/{url.path[1:]}" if url.path[1:] else bucket


def filesystem(url: Url) -> fs.FileSystem:
    """Return the file system of a bucket or account, made at its first use."""
    with _filesystem_lock:
        try:
            if url.scheme == "s3":
                return _open_s3(url.host)
            return _open_gs() if url.scheme == "gs" else _open_azure(url.host)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise to_read_error(error) from None


@cache
def _open_s3(bucket: str) -> fs.FileSystem:
    # connections are as many as threads of this pool
    pa.set_io_thread_count(max(IN_FLIGHT, pa.io_thread_count()))
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError:
            region = None  # the first read will say what is wrong
    return fs.S3FileSystem(
        region=region or "us-east-1",
        endpoint_override=endpoint,
        anonymous=_environment_value("AWS_NO_SIGN_REQUEST"),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # retrying() counts
    )


@cache
def _open_gs() -> fs.FileSystem:
    scheme, _, endpoint = os.environ.get("STORAGE_EMULATOR_HOST", "").rpartition("://")
    return fs.GcsFileSystem(
        anonymous=_environment_value("GS_NO_SIGN_REQUEST"),
        scheme=scheme or ("http" if endpoint else "https"),
        endpoint_override=endpoint or None,
        retry_time_limit=timedelta(seconds=1),  # as above
    )


@cache
def _open_azure(host: str) -> fs.FileSystem:
    environment = os.environ
    account = host.partition("@")[2].partition(".")[0] or environment.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise ReadError(
            Status.UNREADABLE,
            "whose container? set AZURE_STORAGE_ACCOUNT, or write abfs://container@account.dfs.core.windows.net/",
        )
    key, token = environment.get("AZURE_STORAGE_KEY"), environment.get("AZURE_STORAGE_SAS_TOKEN")
    return fs.AzureFileSystem(account, account_key=key, sas_token=None if key else token)


def _environment_value(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "yes", "true")


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turns what pyarrow raises into ReadError."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError) as error:
        raise to_read_error(error) from None


def is_storage_error(error: OSError) -> bool:
    """Return whether an error comes from the storage and not from the content, such as bad Parquet."""
    return isinstance(error, FileNotFoundError) or _ERROR_SOURCE.search(str(error)) is not None


def to_read_error(error: Exception) -> ReadError:
    """Translate an error; the text depends on the kind of error alone, since pyarrow's has keys and
    times in it.
    """
    if isinstance(error, FileNotFoundError):
        return ReadError(Status.MISSING, "no such object")
    if not isinstance(error, OSError):
        return ReadError(Status.UNREADABLE, "not a name that an object can have")
    # without names, which may say anything
    said = re.sub(r"'[^']*'", "", str(error).rpartition("AWS Error")[2])
    for pattern, status, text, transient, denied in _ERROR_KINDS:
        if re.search(pattern, said):
            return ReadError(status, text, transient=transient, denied=denied)
    return ReadError(Status.UNREADABLE, "the storage fails", transient=True)
