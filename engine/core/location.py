"""Locations: a local path, or a URL of one of the schemes below."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

OBJECT_SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
HTTP_SCHEMES = ("https", "http")
ALLOWED = "a local path, file://, s3://, gs://, az://, abfs://, https:// or http://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class SchemeError(ValueError):
    """The scheme of a URL is not supported."""


@dataclass(frozen=True, repr=False)
class Url:
    """A remote location. Its text form has no query, which may contain a signature.

    The key of an object is used unchanged; the path of an http URL is percent-encoded.
    """

    scheme: str
    host: str  # bucket, container, or host with port
    path: str  # after the host, with its leading slash unless empty
    query: str = ""  # of http URLs, with its question mark

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}{self.path}"

    __repr__ = __str__

    @property
    def with_query(self) -> str:
        """Return the URL with its query, for requests only; never log or store it."""
        return f"{self}{self.query}"

    @property
    def key(self) -> str:
        return self.path.strip("/")

    @property
    def name(self) -> str:
        # unquoted first: the name may become a file name, which must not contain a slash
        return posixpath.basename(unquote(self.path) if self.scheme in HTTP_SCHEMES else self.path)

    @property
    def parent(self) -> Url:
        return Url(self.scheme, self.host, posixpath.dirname(self.path))

    def __truediv__(self, name: str) -> Url:
        """Resolve a relative path below this location; "." and ".." work as in a folder.

        The name of an archive's member follows "::" and is used unchanged.
        """
        name, mark, member = name.partition("::")
        if self.scheme in HTTP_SCHEMES:
            name = quote(name)
        path = f"{self.path.rstrip('/')}/{name}"
        if {".", ".."} & set(name.split("/")):
            path = posixpath.normpath(path)
        return Url(self.scheme, self.host, path + mark + member)


Location = Path | Url


def is_url(text: str) -> bool:
    return "://" in text and _SCHEME.match(text) is not None


def parse(text: str) -> Location:
    """Parse a local path or a URL. Raises ValueError, whose text does not contain `text`."""
    match = _SCHEME.match(text)
    if not match:
        return Path(text)
    scheme, rest = match[1].lower(), text[match.end() :]
    host, slash, path = rest.partition("/")
    if scheme == "file":
        if host not in ("", "localhost"):
            raise ValueError("a file URL must not have a host; write file:///folder/name for a local file")
        return Path(unquote(slash + path))
    if scheme not in OBJECT_SCHEMES + HTTP_SCHEMES:
        raise SchemeError(f"URLs of this scheme are not supported; allowed: {ALLOWED}")
    query = ""
    if scheme in HTTP_SCHEMES:
        without_query = re.split(r"[?#]", rest, maxsplit=1)[0]
        query = rest[len(without_query) :].partition("#")[0]
        host, slash, path = without_query.partition("/")
    container, at, host_only = host.rpartition("@")
    if at and not (scheme in ("abfs", "abfss") and container and ":" not in container):
        raise ValueError(
            "a URL is logged, so it must not contain a user or password; set them in the environment"
        )
    if not host_only:
        raise ValueError(f"there is no {'host' if scheme in HTTP_SCHEMES else 'bucket'} after {scheme}://")
    return Url(scheme, host, slash + path, query)


def absolute(location: Location) -> Location:
    return location.absolute() if isinstance(location, Path) else location
