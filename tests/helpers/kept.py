"""Keep files that take long to make in pytest's cache."""

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
    """Return the folder that `write` filled for these sources and this PyTorch; tests must not change it.

    Its files may contain paths, so it is filled in place; the file `done` is written last.
    """
    digest = hashlib.sha256(version("torch").encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    cache = config.cache
    assert cache
    position = cache.mkdir(name)
    folder = position / digest.hexdigest()[:16]
    with (position / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait
        if not (folder / "done").exists():
            for stale in position.iterdir():
                if stale.is_dir():
                    shutil.rmtree(stale)
            folder.mkdir()
            write(folder)
            (folder / "done").touch()
    return folder
