"""Processor time and memory of a process with all its descendants, from /proc."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY_S = 0.05


@dataclass(frozen=True)
class Process:
    resident_bytes: int
    core_s: float  # of processor time


def tree(leader: int) -> dict[int, Process]:
    """`leader`, the living processes of its session, and whatever they have started, by process id."""
    found: dict[int, tuple[int, int, Process]] = {}
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                process = Process(int(fields[21]) * page, (int(fields[11]) + int(fields[12])) / tick)
                found[int(path.parent.name)] = int(fields[1]), int(fields[3]), process
    ours = {pid for pid, (_, session, _) in found.items() if leader in (pid, session)}
    while more := {pid for pid, (parent, *_) in found.items() if parent in ours} - ours:
        ours |= more
    return {pid: found[pid][2] for pid in ours}


def core_seconds(leader: int) -> float:
    """Processor time that the living processes of the tree have used."""
    return sum(process.core_s for process in tree(leader).values())


def resident_bytes(leader: int) -> int:
    """Memory of the tree; pages that two of its processes share count twice."""
    return sum(process.resident_bytes for process in tree(leader).values())


@dataclass
class Peak:
    bytes: int = 0


@contextmanager
def peak_memory(process: subprocess.Popen[bytes]) -> Iterator[Peak]:
    """Samples the tree of `process` while the block runs."""
    peak, stop = Peak(), threading.Event()

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
