"""Read files from web servers, through urllib3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from engine.core.errors import UsageError
from engine.core.extras import install_command
from engine.core.location import Url
from engine.core.records import Status
from engine.storage.errors import CUT_SHORT, ReadError

if TYPE_CHECKING:
    import urllib3

IN_FLIGHT = 256  # connections kept open to a host
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 10  # until the connection is made, between two bytes
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20  # bytes of one read if the server sends no Content-Length
MAX_CHUNK_BYTES = 64 << 20  # of one read otherwise
_GONE, _BUSY, _DENIED = (404, 410), (408, 425, 429), (401, 403, 407)


@lru_cache(maxsize=1)
def _pool() -> urllib3.PoolManager:
    try:
        import urllib3
    except ImportError:
        raise UsageError(
            "https:// needs the package urllib3, which is missing; install it with: "
            + install_command("remote")
        ) from None
    return urllib3.PoolManager(
        num_pools=64,
        maxsize=IN_FLIGHT,
        timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
        retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=MAX_REDIRECTS),
        headers={"Accept-Encoding": "identity", "User-Agent": "bone-radiograph-screening"},
    )


def read_chunks(url: Url, admit: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the bytes of one file. Raises ReadError; its text contains nothing of the URL."""
    response = _open("GET", url)
    complete = False
    try:
        _check(response.status)
        yield from _read_body(response, admit)
        complete = True
    finally:
        if complete:
            response.release_conn()
        else:
            response.close()  # the rest is not read


def exists(url: Url) -> bool:
    """Check with a cancelled GET whether a file exists: a presigned URL does not allow HEAD."""
    response = _open("GET", url)
    response.close()
    return response.status == 200


def probe(url: Url) -> None:
    """Raise ReadError if the server does not answer or answers HTTP 5xx."""
    response = _open("GET", url)
    response.close()
    if response.status >= 500:
        _check(response.status)


def _open(method: str, url: Url) -> urllib3.BaseHTTPResponse:
    pool = _pool()
    from urllib3 import exceptions

    try:
        return pool.request(method, url.with_query, preload_content=False)
    except exceptions.LocationValueError:
        raise ReadError(Status.UNREADABLE, "it is not a valid URL") from None
    except exceptions.MaxRetryError as error:
        if isinstance(error.reason, exceptions.ResponseError):
            raise ReadError(
                Status.UNREADABLE, f"the server redirects more than {MAX_REDIRECTS} times"
            ) from None
        if isinstance(error.reason, exceptions.SSLError):
            raise ReadError(Status.UNREADABLE, "the server's certificate is not trusted") from None
        raise _no_answer_error() from None
    except (exceptions.HTTPError, OSError):
        raise _no_answer_error() from None
    except ValueError:  # from http.client, for characters that no URL may contain
        raise ReadError(Status.UNREADABLE, "it is not a valid URL") from None


def _no_answer_error() -> ReadError:
    return ReadError(Status.UNREADABLE, "the server does not answer", transient=True)


def _check(status: int) -> None:
    if status == 200:
        return
    if status in _GONE:
        raise ReadError(Status.MISSING, f"the file does not exist on the server (HTTP {status})")
    if status in _DENIED:
        raise ReadError(Status.UNREADABLE, f"the server denies access (HTTP {status})", denied=True)
    transient = status >= 500 or status in _BUSY
    raise ReadError(Status.UNREADABLE, f"the server answers HTTP {status}", transient=transient)


def _read_body(response: urllib3.BaseHTTPResponse, admit: Callable[[int], None]) -> Iterator[bytes]:
    from urllib3 import exceptions

    length = response.headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() else None
    if size is not None:
        admit(size)
    received = 0
    while size is None or received < size:
        if size is None:
            admit(received + CHUNK_BYTES)
        try:
            chunk = response.read(
                CHUNK_BYTES if size is None else min(size - received, MAX_CHUNK_BYTES), decode_content=False
            )
        except (exceptions.HTTPError, OSError):
            raise ReadError(Status.UNREADABLE, CUT_SHORT, transient=True) from None
        if not chunk:
            break
        received += len(chunk)
        yield chunk
    if size is None:
        admit(received)
    elif received != size:
        raise ReadError(Status.UNREADABLE, CUT_SHORT, transient=True)
