"""Shared fixtures: images and bundles made on the spot, real radiographs where a folder of them is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU

import training  # before torch: it sets how torch's threads wait
from tests.bundles import write_bundle, write_real_bundle

ROOT = Path(training.__file__).parents[1]


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


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        blocks = rng.integers(0, 256, (4, 4)).astype(np.uint8)
        picture = Image.fromarray(blocks).resize((96 + index, 80 + 2 * index), Image.Resampling.BICUBIC)
        if index % 5 == 0:
            picture = picture.convert("RGB")
        picture.save(folder / f"image-{index:02}{('.png', '.jpg')[index % 2]}", quality=92)
    return folder


@pytest.fixture
def radiographs() -> list[Path]:
    """Real radiographs from the folder that the environment names; skips without."""
    folder = os.environ.get("RADIOGRAPHS")
    files = sorted(path for path in Path(folder).rglob("*.[jJ][pP]*") if path.is_file()) if folder else []
    if not files:
        pytest.skip("RADIOGRAPHS names no folder with radiographs")
    return files


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def engine_run(tmp_path: Path) -> Command:
    """`python -m engine.run ARGUMENTS` in a process of its own, in `tmp_path`."""

    def run(*arguments: str | Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return run_module("engine.run", arguments, folder=tmp_path, timeout_s=timeout_s)

    return run


def run_module(
    module: str, arguments: Sequence[str | Path], *, folder: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def in_background(arguments: Sequence[str | Path], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """`python ARGUMENTS` in `folder`, in a session of its own, with its standard error to be read."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


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
