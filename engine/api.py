"""`engine.screen`: a whole run from Python, with the options of the command line and its checks."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, TypedDict, Unpack

from engine import watching
from engine.core.deadline import Deadline
from engine.errors import EngineError
from engine.job import Say, Watch
from engine.ledger import Summary
from engine.options import AnyPlace, settings_from_keywords
from engine.settings import Decode
from engine.store import reason


class Options(TypedDict, total=False):
    """The static types of `screen`'s options, which `python -m engine.run --help-all` explains.

    `Settings` states the options; a test compares every line here with it.
    """

    output: AnyPlace
    bundle: str | os.PathLike[str]
    device: str
    runner: Literal["auto", "tensorrt", "torch", "onnx"]
    precision: str | None
    decode: Decode | None
    batch_size: int | None
    part_rows: int | None
    path_column: str | None
    column_prefix: str
    root: AnyPlace | None
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
    since: AnyPlace | None
    include_uids: bool
    redact: bool
    keep: Sequence[str]
    salt_file: str | os.PathLike[str] | None
    paths_from: AnyPlace | None
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
    manifest: AnyPlace,
    *,
    progress: Watch = lambda _: None,
    say: Say = lambda _: None,
    stop: threading.Event | None = None,
    **options: Unpack[Options],
) -> Summary:
    """Screen `manifest`, as `python -m engine.run` does; the same call goes on where an earlier one stopped.

    `progress` is called after each batch with a `Progress`, in the thread that called this; what it raises
    ends the run, and so do `finish_by` and setting `stop`. `say` gets the lines for people: what runs where,
    and why.

    Raises UsageError before anything is written, Stopped, NothingNew (for `since`), ErrorRateError when it is
    finished with more failed rows than `max_error_rate`, and EngineError for what else goes wrong; TypeError
    for an option that there is not. Never ends the process and leaves signals alone.
    """
    settings = settings_from_keywords(manifest, options)
    try:
        deadline = Deadline(settings.finish_by, stop)
        return watching.run(settings, watch=progress, say=say, deadline=deadline)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise EngineError(f"{where}{reason(error)}") from error
