"""Replace paths, which may name people, by keyed hashes in results and logs (--redact)."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine.core.errors import UsageError

MIN_SALT_BYTES = 16  # bytes
_SALT_VARIABLE = "ENGINE_SALT"
_QUOTED = re.compile(r"(?<!\w)('|\").*?\1")
_PATH_LIKE = re.compile(
    r"'[^'\n]*[/.][^'\n]*'|(?<![\w.])(?:\w+:/)?/[^\s'\",;]*[^\s'\",;:.]|\S+\.(?:jpe?g|png|dcm|dicom|tiff?|bmp|webp|jp2)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Redaction:
    """The names that replace paths, and the manifest columns that are kept."""

    salt: bytes = field(repr=False)
    keep: tuple[str, ...] = ()

    def name(self, path: str) -> str:
        """Return the first 128 bits of the HMAC-SHA256 of the path in the manifest, in hexadecimal."""
        return hmac.new(self.salt, path.encode("utf-8", "surrogatepass"), "sha256").hexdigest()[:32]

    @property
    def key(self) -> str:
        """Return an identifier of the salt that does not reveal it."""
        return self.name("\0key")


def read_salt(file: Path | None) -> bytes:
    """Read the salt from `file`, else from ENGINE_SALT, and strip white space. Raises UsageError."""
    if file is None:
        salt, source = os.environ.get(_SALT_VARIABLE, "").strip().encode(), _SALT_VARIABLE
        if not salt:
            raise UsageError(
                f"--redact needs a salt: --salt-file FILE, or {_SALT_VARIABLE} in the environment; keep it, "
                "because two runs have the same names only with the same salt"
            )
    else:
        source = f"--salt-file {file}"
        try:
            with file.open("rb") as opened:
                salt = opened.read(1 << 16).strip()
        except OSError as error:
            raise UsageError(f"{source}: {error.strerror}") from None
    if len(salt) < MIN_SALT_BYTES:
        raise UsageError(
            f"{source}: a salt of {len(salt)} bytes can be guessed; give at least {MIN_SALT_BYTES} bytes"
        )
    return salt


def redact_line(text: str, known: Iterable[tuple[str, str]] = ()) -> str:
    """Replace the paths in a log line: `known` paths by their names, others by [path]."""
    for path, name in sorted(known, key=lambda pair: -len(pair[0])):
        if len(path) > 2:  # "a" may be a word
            text = re.sub(rf"(?<!\w){re.escape(path)}(?!\w)", name, text)
    if "error: " in text or "manifest " in text:  # such lines quote cells, columns or files
        text = _QUOTED.sub("[value]", text)
    return _PATH_LIKE.sub("[path]", text)
