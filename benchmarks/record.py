"""Write the JSON file of a benchmark: figures, command, machine and versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.core.hardware import available_cpus, processor_name
from engine.runs.run_record import library_versions

ROOT = Path(__file__).parent.parent


def describe_machine() -> dict[str, Any]:
    """Describe the machine and its present load."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor_name(),
        "cores": available_cpus(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "load_average": os.getloadavg()[0],
    }


def current_commit() -> str:
    """Return the commit of the figures; "-dirty" when the source differs from it, "unknown" outside git."""
    try:
        head = _run_git("rev-parse", "--short=12", "HEAD")
        changed = _run_git("status", "--porcelain", "--", "engine", "training", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _run_git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def write_record(path: Path, command: str, figures: dict[str, Any], *, before: dict[str, Any]) -> None:
    """Write the figures of `command`; `before` is the result of `describe_machine` at the start."""
    record = {
        "command": f"python -m benchmarks {command}",
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "machine": before | {"load_average_after": os.getloadavg()[0]},
        "versions": library_versions(),
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
