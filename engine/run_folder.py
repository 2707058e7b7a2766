"""The results folder: whose run it holds, what is finished, who works in it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from engine.errors import EngineError, UsageError
from engine.lock import hold
from engine.settings import Settings
from engine.sink import Done, finished, part_name, write_json

RUN, SUCCESS, LISTING, LOCK = "_run.json", "_SUCCESS", "_manifest.parquet", ".lock"


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else repr(value)  # a hash


class RunFolder:
    """Locks `path` for this process while it is open. Created here, it is removed if no run was begun."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path = path
        self._overwrite = overwrite

    @classmethod
    def existing(cls, path: Path) -> Self:
        """A folder that holds a run. Raises UsageError for any other."""
        if not (path / RUN).is_file():
            raise UsageError(f"results {path}: no {RUN} there; give the output folder of a run")
        return cls(path, overwrite=False)

    def __enter__(self) -> Self:
        try:
            self._refuse_foreign()
            self._created = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)  # rows name people
            self._lock = hold(self.path / LOCK)
        except BlockingIOError:
            reason = "another process is writing there; wait for it"
            raise UsageError(f"output {self.path}: {reason}") from None
        except OSError as error:
            raise UsageError(f"output {self.path}: {error.strerror}") from None
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        if self._overwrite:
            self.listing.unlink(missing_ok=True)  # the folder is listed again; the rest goes in begin()
        return self

    def __exit__(self, *_: object) -> None:
        if not (self.path / RUN).exists():  # nothing was started: leave no trace
            (self.path / LISTING).unlink(missing_ok=True)
            (self.path / LOCK).unlink(missing_ok=True)
            if self._created:
                with suppress(OSError):  # somebody else put something there, or deleted it
                    self.path.rmdir()
        os.close(self._lock)

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output {self.path}: this is a file; give a folder with -o")
        ours = (RUN, LOCK)
        if self.path.is_dir() and not any((self.path / name).exists() for name in ours):
            others = [entry.name for entry in self.path.iterdir()]
            if others:
                raise UsageError(
                    f"output {self.path}: it is not empty ({others[0]!r}) and holds no run; give another -o"
                )

    def _clear(self) -> None:
        (self.path / SUCCESS).unlink(missing_ok=True)
        for path in [*self.path.glob("part-*.parquet"), self.path / RUN]:
            path.unlink(missing_ok=True)

    @property
    def listing(self) -> Path:
        return self.path / LISTING

    def recorded(self) -> dict[str, Any] | None:
        """What `_run.json` says, None for a new folder."""
        try:
            recorded = json.loads((self.path / RUN).read_text())
            if not isinstance(recorded["result_options"], dict):
                raise ValueError("no result options")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"output {self.path}: {RUN} can't be read ({error}); give another -o") from None
        return dict(recorded)

    def begin(self, run: dict[str, Any]) -> dict[str, Any]:
        """Record `run`, or check that the recorded one has the same result options and hand it back."""
        if self._overwrite:
            self._clear()
        recorded = self.recorded()
        if recorded is None:
            write_json(self.path / RUN, run)
            return run
        old, new = recorded["result_options"], run["result_options"]
        changed = [
            f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise UsageError(
                f"output {self.path}: it holds another run: {'; '.join(changed)}; "
                "give another -o, or --overwrite to delete that run"
            )
        return recorded

    def withdraw(self) -> None:
        """The run is not finished, or not any more."""
        (self.path / SUCCESS).unlink(missing_ok=True)

    def succeeded(self) -> bool:
        return (self.path / SUCCESS).exists()

    def succeed(self, summary: dict[str, Any]) -> None:
        write_json(self.path / SUCCESS, summary)

    def finished(self, run: dict[str, Any]) -> dict[int, Done]:
        """The parts on disk, each where the manifest has it. Raises EngineError that names the wrong one."""
        parts = finished(self.path, run["run_id"])
        for index, part in parts.items():
            self._check(index, part.first_row, part.rows, run)
        return parts

    def complete(self, run: dict[str, Any]) -> dict[int, Done]:
        """All parts of the run; their footers have to add up to the manifest. Raises EngineError."""
        parts = self.finished(run)
        rows = run["rows"]
        for index in range(parts_of(run)):
            if index not in parts:
                raise EngineError(f"{self.path / part_name(index)}: it is missing; run again")
        total = sum(part.rows for part in parts.values())
        if total != rows:
            raise EngineError(f"{self.path}: {total} rows in the parts, {rows} in the manifest")
        return parts

    def _check(self, index: int, first_row: int, rows: int, run: dict[str, Any]) -> None:
        part_rows = run["result_options"]["part_rows"]
        first = index * part_rows
        expected = max(0, min(part_rows, run["rows"] - first))
        if (first_row, rows) != (first, expected):
            raise EngineError(
                f"{self.path / part_name(index)}: {rows} rows from row {first_row}, not {expected} "
                f"from row {first}; delete it and run again"
            )


def parts_of(run: dict[str, Any]) -> int:
    """How many parts the run that `_run.json` describes has."""
    return -(-int(run["rows"]) // int(run["result_options"]["part_rows"]))


def recorded_bundle(results: Path) -> Path:
    """Where the bundle of the run in `results` was. Raises UsageError when there is no run."""
    recorded = RunFolder.existing(results).recorded()
    assert recorded is not None
    return Path(recorded["bundle"] or Settings.bundle)
