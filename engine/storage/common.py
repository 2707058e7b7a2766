"""What all kinds of storage share."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.errors import UsageError
from engine.records import Status

OBJECT_STORES = ("s3", "gs", "az")
SCHEMES = (*OBJECT_STORES, "https", "http")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


class ReadError(Exception):
    """A file can't be had; `status` says why in the ledger's words."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class Url(str):
    """A place that is not on this machine: s3://bucket/key, gs://, az://container/name, https://."""

    @property
    def scheme(self) -> str:
        return self.split("://", 1)[0].lower()

    @property
    def rest(self) -> str:
        """All behind the scheme: bucket or host, then the name, as it is written, nothing decoded."""
        return self.split("://", 1)[1]

    @property
    def top(self) -> Url:
        """Its bucket or host."""
        return Url(f"{self.scheme}://{self.rest.split('/', 1)[0]}")

    @property
    def parent(self) -> Url:
        return Url(self.rsplit("/", 1)[0]) if "/" in self.rest else self

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.rstrip('/')}/{name}")

    @property
    def shown(self) -> str:
        """Without what may be a key: user, password and query."""
        host, slash, name = self.rest.partition("/")
        name = name.partition("?")[0] if self.scheme.startswith("http") else name
        return f"{self.scheme}://{host.rpartition('@')[2]}{slash}{name}"


Place = Path | Url


def shown(place: Place) -> str:
    """For logs and records."""
    return place.shown if isinstance(place, Url) else str(place.absolute())


def place(text: str) -> Place:
    """What the user names: a path, or a URL. Raises ValueError for a URL that nothing here reads."""
    found = _SCHEME.match(text)
    if not found:
        return Path(text)
    scheme = found[1].lower()
    if scheme == "file":
        return Path(local_path(text))
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme}:// is not known; known are file, {', '.join(SCHEMES)}")
    if not text[found.end() :].strip("/"):
        raise ValueError(f"{text} names no {'host' if scheme.startswith('http') else 'bucket'}")
    return Url(text.rstrip("/"))


def local_path(url: str) -> str:
    """Of a file:// URL. Raises ValueError for one of another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError("a file:// URL of another machine; three slashes name a path of this one")
    return unquote(url.split("://", 1)[1].removeprefix(parts.netloc))


def missing_package(package: str, extra: str) -> UsageError:
    return UsageError(f"{package} is missing; install it with: pip install '.[{extra}]'")
