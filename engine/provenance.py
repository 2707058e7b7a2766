"""Where results come from: what `_run.json` and every part say of options, models, versions and machine."""

from __future__ import annotations

import platform
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.bundle import Bundle
from engine.core.version import __version__
from engine.manifest import Manifest
from engine.runners import Choice
from engine.settings import CPU_BATCH, CPU_PART_ROWS, GPU_BATCH, GPU_PART_ROWS, Settings
from engine.storage.location import absolute

PARTS_A_SHARD = 8  # about, if there are the rows


def describe(
    settings: Settings,
    recorded: dict[str, Any] | None,
    manifest: Manifest,
    models: Bundle,
    choice: Choice,
    since: str | None,
) -> dict[str, Any]:
    """`_run.json`: result options, which may not change on resume, and facts.

    What `settings` leave open is as in `recorded`, the run that is resumed. `since`: an earlier run's id.
    """
    before = recorded["result_options"] if recorded else {}
    tuning = dict(recorded.get("tuning", {})) if recorded else {}
    batch_size = settings.batch_size
    if batch_size is not None and batch_size == tuning.get("batch_size_asked"):
        batch_size = None  # as it was halved for want of memory
    default_batch, default_rows = defaults(choice)
    if settings.shard:  # none of them has much more to do than another
        share = -(-manifest.rows // (PARTS_A_SHARD * settings.shard.of))
        default_rows = min(default_rows, max(share, default_batch))
    hidden = settings.redaction
    return {
        "format": 1,
        "run_id": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "result_options": {
            "manifest_sha256": manifest.sha256,
            "root": hidden.name(str(manifest.root)) if hidden else str(manifest.root),
            "path_column": manifest.path_column,
            "include": list(settings.include),
            "exclude": list(settings.exclude),
            "since": since,
            "column_prefix": settings.column_prefix,
            "bundle_sha256": models.sha256,
            "runner": choice.runner,
            "device": choice.kind,  # GPUs of one kind may share a run
            "precision": choice.precision,
            "plans": choice.plan_hashes,
            "decode": models.decode,
            "decoder": settings.decoder if choice.gpu else None,  # on the CPU there is but one
            "batch_size": batch_size or before.get("batch_size") or default_batch,
            "part_rows": settings.part_rows or before.get("part_rows") or default_rows,
            "shards": settings.shard.of if settings.shard else None,
            "max_pixels": settings.limits.max_pixels,
            "max_file_size": settings.limits.max_file_size,
            "include_uids": settings.include_uids,
            "redacted_by": hidden.key if hidden else None,
            "kept_columns": list(hidden.keep) if hidden else None,
        },
        "manifest": None if hidden else str(absolute(manifest.source)),
        "rows": manifest.rows,
        "not_listed": manifest.skipped,
        "since": str(absolute(settings.since)) if settings.since else None,
        "bundle": None if hidden else str(models.path.absolute()),
        "classes": list(models.classes),
        "target": models.target,
        "groups": {name: list(classes) for name, classes in models.groups.items()},
        "operating_points": models.operating_points and models.operating_points.recorded,
        "out_of_distribution": _out_of_distribution(models, choice),
        "weights": {member.name: member.weight for member in models.members},
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "processor": processor_name(),
            "gpu": asdict(choice.gpu) if choice.gpu else None,
        },
        "chosen": choice.reason,
        "tuning": tuning,
        "versions": versions(),
    }


def _out_of_distribution(models: Bundle, choice: Choice) -> str | None:
    """Whether that is looked at, where the bundle has limits for it."""
    if models.operating_points is None or not models.operating_points.distances:
        return None
    return "looked at" if choice.gives_distances else f"not looked at: {choice.runner} in {choice.precision}"


def defaults(choice: Choice) -> tuple[int, int]:
    """Batch size and rows a part where the user names none."""
    if choice.device == "cpu":
        return CPU_BATCH, CPU_PART_ROWS
    largest = [plan.passport.max_batch for plan in choice.plans]
    return min(largest, default=GPU_BATCH), GPU_PART_ROWS


def worker(choice: Choice) -> dict[str, Any]:
    """Who scores a part, as its footer and `_SUCCESS` name it."""
    return {
        "host": platform.node(),
        "device": choice.device,
        "gpu": choice.gpu.name if choice.gpu else None,
        "runner": choice.runner,
        "precision": choice.precision,
    }


def processor_name() -> str:
    """The processor's marketing name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def versions() -> dict[str, str]:
    """Of the engine and of what decides the pixels and the files."""
    found = {"engine": __version__, "python": platform.python_version()}
    for package in ("nvidia-dali-cuda130", "imagecodecs", "simplejpeg", "numpy", "pyarrow", "pydicom"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
