"""Real Ray: a cluster of two nodes with a CPU each, in which things can be made to go wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

HERE = Path(__file__).parent


@dataclass
class Nodes:
    """The cluster, and the folder where what goes wrong is ordered."""

    process: subprocess.Popen[str]
    hurt: Path
    address: str = ""

    def tell(self, command: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the cluster is gone"

    def order(self, name: str) -> None:
        (self.hurt / name).touch()

    def actors(self) -> list[int]:
        """The processes of actors that hold an engine."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_text()
                environment = (folder / "environ").read_text()
            except OSError:
                continue
            if words.startswith("ray::Actor") and f"HURT={self.hurt}" in environment:
                found.append(int(folder.name))
        return found

    def wait_for_actors(self, count: int) -> list[int]:
        deadline = time.monotonic() + 60
        while len(found := self.actors()) < count:
            assert time.monotonic() < deadline, f"{len(found)} actors"
            time.sleep(0.02)
        return found


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need a short path
    hurt = scratch / "hurt"
    hurt.mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{HERE / 'hurt'}:{ROOT}",
        "HURT": str(hurt),
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
    }
    process = subprocess.Popen(
        [sys.executable, str(HERE / "nodes.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    cluster = Nodes(process, hurt)
    try:
        cluster.tell("add")
        cluster.tell("add")
        yield cluster
        process.communicate(timeout=30)  # its input ends
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        shutil.rmtree(scratch, ignore_errors=True)
