"""Access object stores through pyarrow's file systems: S3, Google Cloud Storage, Azure Blob Storage.

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

IN_FLIGHT = 256  # concurrent requests of a file system
CHUNK_BYTES = 64 << 20  # bytes of one request
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 10  # until the connection is made, between two bytes

_filesystem_lock = threading.Lock()
_ERROR_SOURCE = re.compile(r"AWS Error|google::cloud|Azure|curl")
# patterns of the vendors' error texts, of which the first match counts: status, text, transient, denied
_ERROR_KINDS: tuple[tuple[str, Status, str, bool, bool], ...] = (
    (
        r"NO_SUCH_(KEY|BUCKET)|NoSuch(Key|Bucket)|status 404|NOT_FOUND",
        *(Status.MISSING, "the object does not exist", False, False),
    ),
    (
        r"INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|EXPIRED|TOKEN|UNRECOGNIZED_CLIENT|INVALID_SIGNATURE"
        r"|InvalidAccessKeyId|SignatureDoesNotMatch|AuthenticationFailed|InvalidAuthenticationInfo"
        r"|CredentialUnavailable|[Ff]ailed to get token|UNAUTHENTICATED|\b401\b",
        *(Status.UNREADABLE, "the storage does not accept the credentials", False, False),
    ),
    (
        r"ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|AuthorizationPermission|AuthorizationFail|\b403\b",
        *(Status.UNREADABLE, "the storage denies access", False, True),
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

    It takes a HEAD and a GET, since pyarrow cannot return the size with the bytes.
    """
    with translate_errors():
        file, remaining = _open_file(filesystem(url), path_of(url))
    with file:
        admit(remaining)
        while remaining:
            with translate_errors():
                chunk = file.read(min(remaining, CHUNK_BYTES))
            if not chunk:
                raise ReadError(Status.UNREADABLE, CUT_SHORT, transient=True)
            remaining -= len(chunk)
            yield chunk


def open_object(url: Url) -> tuple[Any, int]:
    """Open an object as a file; return it and its length. Raises ReadError."""
    with translate_errors():
        file = filesystem(url).open_input_file(path_of(url))
        return file, int(file.size())


def read_chunk(file: Any, count: int, start: int) -> bytes:
    """Return `count` bytes from `start`. Raises ReadError."""
    with translate_errors():
        return bytes(file.read_at(count, start))


def _open_file(files: fs.FileSystem, path: str) -> tuple[pa.NativeFile, int]:
    if not isinstance(files, fs.GcsFileSystem):
        file = files.open_input_file(path)
        return file, file.size()
    # on GCS, a random access file holds the interpreter lock while it waits for the network
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
        modified = filesystem(url).get_file_info(path_of(url)).mtime_ns
        return None if modified is None else int(modified)


def probe(url: Url) -> None:
    """Raise ReadError if the bucket cannot be listed.

    The listing is empty; unlike the answer to a HEAD, its error tells whether the credentials are wrong.
    """
    empty = path_of(Url(url.scheme, url.host, "/.nothing"))
    with translate_errors():
        filesystem(url).get_file_info(fs.FileSelector(empty, allow_not_found=True))


def path_of(url: Url) -> str:
    """Return the path for pyarrow's file systems: bucket or container, then the key."""
    bucket = url.host.partition("@")[0]
    return f"{bucket}/{url.path[1:]}" if url.path[1:] else bucket


def filesystem(url: Url) -> fs.FileSystem:
    """Return the file system of a bucket or account, created at its first use."""
    with _filesystem_lock:
        try:
            if url.scheme == "s3":
                return _open_s3(url.host)
            return _open_gs() if url.scheme == "gs" else _open_azure(url.host)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise to_read_error(error) from None


@cache
def _open_s3(bucket: str) -> fs.FileSystem:
    # S3 opens as many connections as this pool has threads
    pa.set_io_thread_count(max(IN_FLIGHT, pa.io_thread_count()))
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if not region and not endpoint:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError:
            region = None  # the first read raises the error
    return fs.S3FileSystem(
        region=region or "us-east-1",
        endpoint_override=endpoint,
        anonymous=_environment_value("AWS_NO_SIGN_REQUEST"),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # with_retries() retries
    )


@cache
def _open_gs() -> fs.FileSystem:
    scheme, _, endpoint = os.environ.get("STORAGE_EMULATOR_HOST", "").rpartition("://")
    return fs.GcsFileSystem(
        anonymous=_environment_value("GS_NO_SIGN_REQUEST"),
        scheme=scheme or ("http" if endpoint else "https"),
        endpoint_override=endpoint or None,
        retry_time_limit=timedelta(seconds=1),  # with_retries() retries
    )


@cache
def _open_azure(host: str) -> fs.FileSystem:
    environment = os.environ
    account = host.partition("@")[2].partition(".")[0] or environment.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise ReadError(
            Status.UNREADABLE,
            "the URL names no storage account; set AZURE_STORAGE_ACCOUNT, or write "
            "abfs://container@account.dfs.core.windows.net/",
        )
    key, token = environment.get("AZURE_STORAGE_KEY"), environment.get("AZURE_STORAGE_SAS_TOKEN")
    return fs.AzureFileSystem(account, account_key=key, sas_token=None if key else token)


def _environment_value(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "yes", "true")


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn what pyarrow raises into ReadError."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError) as error:
        raise to_read_error(error) from None


def is_storage_error(error: OSError) -> bool:
    """Return whether an error comes from the storage and not from the content, such as bad Parquet."""
    return isinstance(error, FileNotFoundError) or _ERROR_SOURCE.search(str(error)) is not None


def to_read_error(error: Exception) -> ReadError:
    """Translate an error by its kind, without pyarrow's text, which contains keys and times."""
    if isinstance(error, FileNotFoundError):
        return ReadError(Status.MISSING, "the object does not exist")
    if not isinstance(error, OSError):
        return ReadError(Status.UNREADABLE, "it is not a valid name of an object")
    # names may contain anything, so they are removed
    message = re.sub(r"'[^']*'", "", str(error).rpartition("AWS Error")[2])
    for pattern, status, text, transient, denied in _ERROR_KINDS:
        if re.search(pattern, message):
            return ReadError(status, text, transient=transient, denied=denied)
    return ReadError(Status.UNREADABLE, "the storage fails for an unknown reason", transient=True)
