"""Write files so that they appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class atomic:
    """`with atomic(path) as temporary:` the block writes `temporary`, which then replaces `path`."""

    def __init__(self, target: Path, suffix: str = "") -> None:
        """`suffix` distinguishes the temporary files of several writers."""
        self._target = target
        self._temporary = target.with_name(f".{target.name}{suffix}.tmp")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        _fsync(self._temporary)
        self._temporary.replace(self._target)
        _fsync(self._target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(target: Path, data: dict[str, Any]) -> None:
    with atomic(target) as temporary:
        temporary.write_text(as_json(data))


def as_json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str) + "\n"
