"""What takes long to make and is the same from one run of the tests to the next, kept in pytest's cache."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

SOURCES = ("training/**/*.py", "engine/**/bundle*.py", "engine/**/network.py", "tests/helpers/bundles.py")


def kept(config: pytest.Config, name: str, write: Callable[[Path], None]) -> Path:
    """The folder that `write` has filled, for these sources and this PyTorch; read-only for tests.

    Its files may name their places, so it is filled where it stays: the file `done` is written last.
    """
    digest = hashlib.sha256(version("torch").encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    cache = config.cache
    assert cache
    place = cache.mkdir(name)
    folder = place / digest.hexdigest()[:16]
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers wait
        if not (folder / "done").exists():
            for older in place.iterdir():
                if older.is_dir():
                    shutil.rmtree(older)
            folder.mkdir()
            write(folder)
            (folder / "done").touch()
    return folder
