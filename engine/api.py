"""`engine.screen`: a run from Python, with the options and checks of the command line."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, TypedDict, Unpack

from engine.core.deadline import Deadline
from engine.core.errors import EngineError
from engine.core.records import OnMessage
from engine.core.settings import Decode
from engine.executors import launch
from engine.runs.progress import OnProgress
from engine.runs.run_settings import AnyLocation, settings_from_keywords
from engine.runs.summary import Summary
from engine.storage.folders import error_text


class Options(TypedDict, total=False):
    """The types of `screen`'s options, which `python -m engine.run --help-all` explains.

    A test compares them with `Settings`.
    """

    output: AnyLocation
    bundle: str | os.PathLike[str]
    device: str
    runner: Literal["auto", "tensorrt", "torch", "onnx"]
    precision: str | None
    decode: Decode | None
    batch_size: int | None
    part_rows: int | None
    path_column: str | None
    column_prefix: str
    root: AnyLocation | None
    workers: int | None
    memory: int | str  # bytes, or "2GiB"
    max_pixels: int
    max_file_size: int | str
    read_timeout_s: float
    finish_by: datetime | str | None
    max_error_rate: float
    only_errors: bool
    include: Sequence[str]
    exclude: Sequence[str]
    since: AnyLocation | None
    include_uids: bool
    redact: bool
    keep: Sequence[str]
    salt_file: str | os.PathLike[str] | None
    paths_from: AnyLocation | None
    overwrite: bool
    decoder: Literal["auto", "cpu"]
    slots: int
    streams: int | None
    cuda_graph: bool | None
    metrics_file: str | os.PathLike[str] | None
    ray: str | None
    actors: int | None
    part_timeout_s: float
    serial: bool
    shard: str | None  # "3/16"


def screen(
    manifest: AnyLocation,
    *,
    progress: OnProgress = lambda _: None,
    say: OnMessage = lambda _: None,
    stop: threading.Event | None = None,
    **options: Unpack[Options],
) -> Summary:
    """Screen `manifest` as `python -m engine.run` does; the same call resumes an interrupted run.

    `progress` is called in this thread with a `Progress` after each batch; an exception from it ends the run,
    as do `finish_by` and setting `stop`. `say` is called with each status line.

    Raises UsageError before anything is written, Stopped, NothingNew (for `since`), ErrorRateError if the run
    is finished with more failed rows than `max_error_rate`, EngineError for all other failures, and TypeError
    for an unknown option. Does not end the process and does not handle signals.
    """
    settings = settings_from_keywords(manifest, options)
    try:
        deadline = Deadline(settings.finish_by, stop)
        return launch.launch_run(settings, on_progress=progress, say=say, deadline=deadline)
    except OSError as error:
        file_name = f"{error.filename}: " if error.filename else ""
        raise EngineError(f"{file_name}{error_text(error)}") from error
