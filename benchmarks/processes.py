"""Measure processor time and memory of a process and its descendants from /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

SAMPLE_EVERY_S = 0.05


@dataclass(frozen=True)
class Process:
    resident_bytes: int
    core_s: float  # of processor time


def process_tree(leader: int) -> dict[int, Process]:
    """Return `leader`, the processes of its session and their descendants, by process id."""
    processes: dict[int, tuple[int, int, Process]] = {}
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                process = Process(int(fields[21]) * page, (int(fields[11]) + int(fields[12])) / tick)
                processes[int(path.parent.name)] = int(fields[1]), int(fields[3]), process
    tree = {pid for pid, (_, session, _) in processes.items() if leader in (pid, session)}
    while children := {pid for pid, (parent, *_) in processes.items() if parent in tree} - tree:
        tree |= children
    return {pid: processes[pid][2] for pid in tree}


def core_seconds(leader: int) -> float:
    """Return the processor time of the living processes of the tree."""
    return sum(process.core_s for process in process_tree(leader).values())


def resident_bytes(leader: int) -> int:
    """Return the memory of the tree; pages shared by two processes count twice."""
    return sum(process.resident_bytes for process in process_tree(leader).values())


@dataclass
class PeakMemory:
    bytes: int = 0


@contextmanager
def peak_memory(process: subprocess.Popen[bytes]) -> Iterator[PeakMemory]:
    """Sample the tree of `process` while the block runs."""
    peak, stop = PeakMemory(), threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_EVERY_S):
            peak.bytes = max(peak.bytes, resident_bytes(process.pid))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class FinishedProcess:
    """The result of a finished command."""

    status: int
    output: str
    errors: str
    wall_s: float
    core_s: float  # of the process and the children it waited for
    peak_memory_mb: float  # of its process tree


def run_command(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> FinishedProcess:
    """Run a command in a new session and measure it; kill its process tree after `timeout_s`."""
    start = time.perf_counter()
    with TemporaryFile() as output, TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
        alarm = threading.Timer(timeout_s or threading.TIMEOUT_MAX, _kill, [process.pid])
        alarm.daemon = True
        alarm.start()
        try:
            with peak_memory(process) as peak:
                _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            _kill(process.pid)
            raise
        finally:
            alarm.cancel()
        wall_s = time.perf_counter() - start
        _kill(process.pid)  # processes that it left running
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    core_s = usage.ru_utime + usage.ru_stime
    return FinishedProcess(process.returncode, *texts, wall_s, core_s, peak.bytes / 2**20)


def _kill(leader: int) -> None:
    for pid in process_tree(leader):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
