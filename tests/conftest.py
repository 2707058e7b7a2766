"""Shared fixtures: images and bundles made on the spot, real radiographs where a folder of them is named."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.storage import objects

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch: each worker has its own core

import training  # noqa: F401 before torch: it sets how torch's threads wait
from tests.helpers.bundles import write_bundle, write_real_bundle
from tests.helpers.images import write_images
from tests.helpers.kept import kept
from tests.helpers.processes import Command, Start, run_here, run_module, starting
from tests.helpers.runs import SHARDED_PART_ROWS, SHARDED_ROWS, csv, list_images, local_rows, table
from tests.helpers.servers import CREDENTIALS, Proxy

# what shares a server or a cluster runs in one worker; those that take longest begin first
TOGETHER = {
    "tests/training/test_training.py": 5,
    "tests/engine/ray/": 4,
    "tests/system/test_object_store_runs.py tests/engine/storage/test_folders.py": 3,
    "tests/system/test_interruptions.py": 2,
    "tests/system/test_run.py": 1,
    "tests/engine/executors/": 0,
}

WHOLE_NETWORKS = {"real_bundle", "frozen"}  # fixtures that take a minute to make


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-member bundle of 64 x 64 pixels; read-only for tests."""
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="session")
def real_bundle(pytestconfig: pytest.Config) -> Path:
    """Both real networks at 224 x 224; read-only for tests."""

    def write(folder: Path) -> None:
        images = sorted(write_images(folder / "images", 24).iterdir())
        write_real_bundle(folder / "bundle", images)

    return kept(pytestconfig, "real", write) / "bundle"


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
    """`python -m engine.run ARGUMENTS` in `tmp_path`, within this process."""
    return lambda *arguments: run_here("engine.run", arguments, folder=tmp_path)


@pytest.fixture
def engine_process(tmp_path: Path) -> Command:
    """`python -m engine.run ARGUMENTS` in a process of its own, in `tmp_path`."""

    def run(*arguments: str | Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return run_module("engine.run", arguments, folder=tmp_path, timeout_s=timeout_s)

    return run


@pytest.fixture
def start(tmp_path: Path, bundle: Path) -> Iterator[Start]:
    """`python -m engine.run ARGUMENTS -b BUNDLE` in the background, in `tmp_path`."""
    with starting(tmp_path) as start_process:
        yield lambda *arguments, **environment: start_process(
            "-m", "engine.run", *arguments, "-b", bundle, **environment
        )


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> pa.Table:
    """The rows of the plain run of `list_images(..., SHARDED_ROWS)`."""
    folder = tmp_path_factory.mktemp("plain")
    list_images(folder, SHARDED_ROWS)
    arguments = ["m.txt", "-b", bundle, "-o", "out", "--part-rows", str(SHARDED_PART_ROWS)]
    run = run_module("engine.run", arguments, folder=folder, timeout_s=60)
    assert run.returncode == 0, run.stderr
    return table(folder / "out")


@pytest.fixture(scope="session")
def moto() -> Iterator[int]:
    """The port of an S3 server."""
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    WSGIRequestHandler.disable_nagle_algorithm = True  # 40 ms for each answer otherwise
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good images and a damaged one."""
    folder = write_images(tmp_path_factory.mktemp("remote") / "images", 40)
    (folder / "broken.jpg").write_bytes((folder / "image-01.jpg").read_bytes()[:-300])
    return folder


@pytest.fixture(scope="session")
def names(images: Path) -> list[str]:
    return sorted(path.name for path in images.iterdir())


@pytest.fixture(scope="session")
def client(moto: int, images: Path, names: list[str]) -> Any:
    """boto3's, on a server whose bucket `archive` has the images below `knees/`."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{moto}",
        region_name=CREDENTIALS["AWS_REGION"],
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        config=Config(request_checksum_calculation="when_required"),
    )
    client.create_bucket(Bucket="archive")
    for name in names:
        client.put_object(Bucket="archive", Key=f"knees/{name}", Body=(images / name).read_bytes())
    client.put_object(Bucket="archive", Key="knees/empty.png", Body=b"")
    client.put_object(Bucket="archive", Key="lists/all.csv", Body=csv([f"../knees/{name}" for name in names]))
    return client


@pytest.fixture
def proxy(moto: int, client: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What this process and those it starts take for S3."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    proxy = Proxy(moto)
    with proxy.serving() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        objects._open_s3.cache_clear()
        yield proxy
    objects._open_s3.cache_clear()


@pytest.fixture(scope="session")
def local(images: Path, names: list[str], bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The rows of `names`, read from disk."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "m.csv").write_bytes(csv(names))
    arguments = ["m.csv", "--root", images, "-b", bundle]
    run_module("engine.run", arguments, folder=folder, timeout_s=60).check_returncode()
    return local_rows(folder / "results")


def group_of(nodeid: str) -> str:
    """What goes to one worker of pytest-xdist: a module, or modules that share what takes long to make."""
    module = nodeid.partition("::")[0]
    return next((group for group in TOGETHER if any(map(module.startswith, group.split()))), module)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on whole networks are slow.

    `gpu` and `browser` tests skip where there is none; with REQUIRE_GPU=1, REQUIRE_BROWSER=1 they fail.
    """
    items.sort(key=lambda item: TOGETHER.get(group_of(item.nodeid), 0), reverse=True)
    there = {
        "gpu": Path("/dev/nvidiactl").exists(),
        "browser": bool(shutil.which("chromium") and shutil.which("chromedriver")),
    }
    for item in items:
        if WHOLE_NETWORKS & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    for name, found in there.items():
        if found or os.environ.get(f"REQUIRE_{name.upper()}") == "1":
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"no {name}"))
