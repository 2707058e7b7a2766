"""`engine.screen`: a whole run from Python, with the options of the command line and its checks."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Literal, TypedDict, Unpack

from engine import run, watching
from engine.bundle import Decode
from engine.errors import EngineError
from engine.job import Say, Watch
from engine.ledger import Summary
from engine.options import OPTIONS, Option
from engine.storage import Url
from engine.store import reason

NOT_HERE = frozenset(("log_json", "dry_run"))  # of the command line alone
AnyPlace = str | os.PathLike[str] | Url


class Options(TypedDict, total=False):
    """What `python -m engine.run --help-all` explains, by its names; what is left out is as it is there."""

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
    ends the run, and so does setting `stop`. `say` gets the lines for people: what runs where, and why.

    Raises UsageError before anything is written, Stopped, NothingNew (for `since`), ErrorRateError when it is
    finished with more failed rows than `max_error_rate`, and EngineError for what else goes wrong; TypeError
    for an option that there is not. Never ends the process and leaves signals alone.
    """
    arguments = command_line(manifest, dict(options))
    settings = run.settings_from(arguments)
    try:
        return watching.run(settings, arguments, watch=progress, say=say, stop=stop)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise EngineError(f"{where}{reason(error)}") from error


def command_line(manifest: AnyPlace, given: dict[str, Any]) -> list[str]:
    """Of `engine.run`, that says the same."""
    return [*_arguments(given), "--", _text(manifest)]


def _arguments(given: dict[str, Any]) -> Iterator[str]:
    known = {name: option for name, option in OPTIONS.items() if name not in NOT_HERE}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
            raise TypeError(f"screen() has no option {name!r}{hint}")
        yield from _argument(known[name], value)


def _argument(option: Option, value: Any) -> Iterator[str]:
    flag, takes = option.names[-1], option.takes
    if value is None:
        return
    if takes in ("nothing", "yes or no"):
        if not isinstance(value, bool):
            raise TypeError(f"{option.name} is {value!r}; allowed: True, False")
        if value:
            yield flag
        elif takes == "yes or no":
            yield flag.replace("--", "--no-", 1)
        return
    if takes == "values" and isinstance(value, str):
        raise TypeError(f"{option.name} is {value!r}; allowed: a list of texts")
    values: Iterable[Any] = value if takes == "values" else (value,)
    yield from (f"{flag}={_text(one)}" for one in values)


def _text(value: Any) -> str:
    if isinstance(value, Url):
        return value.whole
    return value.isoformat() if isinstance(value, datetime) else str(value)
