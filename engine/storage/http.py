"""Files on web servers, through urllib3."""

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

IN_FLIGHT = 256  # connections that are kept for a host
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 10  # without an answer, without a byte
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20  # bytes that are read at once where a server does not say how many come
MAX_CHUNK_BYTES = 64 << 20  # where it does
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
    whole = False
    try:
        _check(response.status)
        yield from _read_body(response, admit)
        whole = True
    finally:
        if whole:
            response.release_conn()
        else:
            response.close()  # what is left of it is not read


def exists(url: Url) -> bool:
    """Check with a cancelled GET whether a file exists: a presigned URL does not allow HEAD."""
    response = _open("GET", url)
    response.close()
    return response.status == 200


def probe(url: Url) -> None:
    """Raises ReadError where the server doesn't answer, or answers that it is in trouble."""
    response = _open("GET", url)
    response.close()
    if response.status >= 500:
        _check(response.status)


def _open(method: str, url: Url) -> urllib3.BaseHTTPResponse:
    pool = _pool()
    from urllib3 import exceptions

    try:
        return pool.request(method, url.whole, preload_content=False)
    except exceptions.LocationValueError:
        raise ReadError(Status.UNREADABLE, "not a valid URL") from None
    except exceptions.MaxRetryError as error:
        if isinstance(error.reason, exceptions.ResponseError):
            raise ReadError(Status.UNREADABLE, f"more than {MAX_REDIRECTS} redirects") from None
        if isinstance(error.reason, exceptions.SSLError):
            raise ReadError(Status.UNREADABLE, "the server's certificate is not trusted") from None
        raise _no_answer_error() from None
    except (exceptions.HTTPError, OSError):
        raise _no_answer_error() from None
    except ValueError:  # from http.client, of characters that no URL has
        raise ReadError(Status.UNREADABLE, "not a valid URL") from None


def _no_answer_error() -> ReadError:
    return ReadError(Status.UNREADABLE, "the server does not answer", transient=True)


def _check(status: int) -> None:
    if status == 200:
        return
    if status in _GONE:
        raise ReadError(Status.MISSING, f"no such file on the server (HTTP {status})")
    if status in _DENIED:
        raise ReadError(Status.UNREADABLE, f"access denied (HTTP {status})", denied=True)
    transient = status >= 500 or status in _BUSY
    raise ReadError(Status.UNREADABLE, f"the server answers HTTP {status}", transient=transient)


def _read_body(response: urllib3.BaseHTTPResponse, admit: Callable[[int], None]) -> Iterator[bytes]:
    from urllib3 import exceptions

    announced = response.headers.get("Content-Length", "")
    size = int(announced) if announced.isdecimal() else None
    if size is not None:
        admit(size)
    came = 0
    while size is None or came < size:
        if size is None:
            admit(came + CHUNK_BYTES)
        try:
            piece = response.read(
                CHUNK_BYTES if size is None else min(size - came, MAX_CHUNK_BYTES), decode_content=False
            )
        except (exceptions.HTTPError, OSError):
            raise ReadError(Status.UNREADABLE, CUT_SHORT, transient=True) from None
        if not piece:
            break
        came += len(piece)
        yield piece
    if size is None:
        admit(came)
    elif came != size:
        raise ReadError(Status.UNREADABLE, CUT_SHORT, transient=True)
