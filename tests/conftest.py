"""Shared fixtures: images and bundles made on the spot, real radiographs where a folder of them is named."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU

import training  # noqa: F401 before torch: it sets how torch's threads wait
from tests.helpers.bundles import write_bundle, write_real_bundle
from tests.helpers.images import write_images
from tests.helpers.processes import Command, run_module


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-member bundle of 64 x 64 pixels; read-only for tests."""
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="session")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both real networks at 224 x 224; read-only for tests."""
    folder = tmp_path_factory.mktemp("real")
    images = sorted(write_images(folder / "images", 24).iterdir())
    return write_real_bundle(folder / "bundle", images)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """40 images, each with scores of its own: `image-00.png` ... and `image-01.jpg` ..., gray and colour."""
    return write_images(tmp_path / "archive", 40)


@pytest.fixture
def radiographs() -> list[Path]:
    """Real radiographs from the folder that the environment names; skips without."""
    folder = os.environ.get("RADIOGRAPHS")
    files = sorted(path for path in Path(folder).rglob("*.[jJ][pP]*") if path.is_file()) if folder else []
    if not files:
        pytest.skip("RADIOGRAPHS names no folder with radiographs")
    return files


@pytest.fixture
def engine_run(tmp_path: Path) -> Command:
    """`python -m engine.run ARGUMENTS` in a process of its own, in `tmp_path`."""

    def run(*arguments: str | Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return run_module("engine.run", arguments, folder=tmp_path, timeout_s=timeout_s)

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` and `browser` tests skip where there is none; with REQUIRE_GPU=1, REQUIRE_BROWSER=1 they fail."""
    there = {
        "gpu": Path("/dev/nvidiactl").exists(),
        "browser": bool(shutil.which("chromium") and shutil.which("chromedriver")),
    }
    for name, found in there.items():
        if found or os.environ.get(f"REQUIRE_{name.upper()}") == "1":
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"no {name}"))
