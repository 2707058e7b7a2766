"""Real Ray: a cluster of two nodes with a CPU each, with faults on demand."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.nodes import Nodes
from tests.helpers.processes import ROOT


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need a short path
    hurt = scratch / "hurt"
    hurt.mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'tests/helpers/hurt'}:{ROOT}",
        "HURT": str(hurt),
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.nodes"],
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
