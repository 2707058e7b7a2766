"""`engine.screen`: a whole run from Python, with the options of the command line and its checks."""

from __future__ import annotations

import argparse
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
from engine.storage import Url
from engine.store import reason

NOT_HERE = frozenset(("help", "log_json", "dry_run"))  # of the command line alone
AnyPlace = str | os.PathLike[str] | Url


class Options(TypedDict, total=False):
    """What `python -m engine.run --help` explains, by the same names; what is left out is as it is there."""

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
    settings = run.settings_from([*_arguments(dict(options)), "--", _text(manifest)])
    try:
        return watching.run(settings, watch=progress, say=say, stop=stop)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise EngineError(f"{where}{reason(error)}") from error


def _arguments(options: dict[str, Any]) -> Iterator[str]:
    """The command line that says the same."""
    known = {action.dest: action for action in run.option_parser()._actions if action.option_strings}
    for name in NOT_HERE:
        del known[name]
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
            raise TypeError(f"screen() has no option {name!r}{hint}")
        yield from _argument(known[name], value)


def _argument(action: argparse.Action, value: Any) -> Iterator[str]:
    names = action.option_strings
    if value is None:
        return
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TypeError(f"{action.dest} is {value!r}; allowed: True, False")
        if isinstance(action, argparse.BooleanOptionalAction):
            yield names[0] if value else names[1]
        elif value:
            yield names[0]
        return
    several = isinstance(action.default, list)
    if several and isinstance(value, str):
        raise TypeError(f"{action.dest} is {value!r}; allowed: a list of texts")
    values: Iterable[Any] = value if several else (value,)
    yield from (f"{names[-1]}={_text(one)}" for one in values)


def _text(value: Any) -> str:
    if isinstance(value, Url):
        return value.whole
    return value.isoformat() if isinstance(value, datetime) else str(value)
