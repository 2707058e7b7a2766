"""The results folder: whose run it holds, what is finished, who works in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from engine.errors import EngineError, UsageError
from engine.settings import Settings
from engine.sink import Done, finished, part_name, part_of
from engine.storage import Place
from engine.store import LOCK, store_at, write_json

RUN, SUCCESS, LISTING = "_run.json", "_SUCCESS", "_manifest.parquet"


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else repr(value)  # a hash


class RunFolder:
    """Locks a folder for this process while it is open. Created here, it is removed if no run was begun."""

    def __init__(self, place: Place, *, overwrite: bool) -> None:
        self.place, self.store = place, store_at(place)
        self._overwrite = overwrite

    @classmethod
    def existing(cls, place: Place) -> Self:
        """A folder that holds a run. Raises UsageError for any other."""
        folder = cls(place, overwrite=False)
        with folder._trouble():
            if not folder.store.exists(RUN):
                raise UsageError(f"results {place}: no {RUN} there; give the output folder of a run")
        return folder

    def __enter__(self) -> Self:
        with self._trouble():
            self._refuse_foreign()
            self._unlock = self.store.lock()
            for name in self.store.names():
                if name.startswith(".") and name.endswith(".tmp"):
                    self.store.delete(name)
            if self._overwrite:
                self.store.delete(LISTING)  # the folder is listed again; the rest goes in begin()
        return self

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise UsageError(f"output {self.place}: another process is writing there; wait for it") from None
        except OSError as error:
            raise UsageError(f"output {self.place}: {error.strerror or error}") from None

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # it may be what ended the run
            if not self.store.exists(RUN):  # nothing was started: leave no trace
                self.store.delete(LISTING)
                self.store.delete(LOCK)
                self.store.remove()
        self._unlock()

    def _refuse_foreign(self) -> None:
        names = self.store.names()
        if names and RUN not in names and LOCK not in names:
            raise UsageError(
                f"output {self.place}: it is not empty ({names[0]!r}) and holds no run; give another -o"
            )

    def _clear(self) -> None:
        self.store.delete(SUCCESS)
        for name in self.store.names():
            if part_of(name) is not None or name == RUN:
                self.store.delete(name)

    @property
    def listing(self) -> Path:
        """Where a folder's listing is, or is to be made."""
        return self.store.local(LISTING)

    def recorded(self) -> dict[str, Any] | None:
        """What `_run.json` says, None for a new folder."""
        try:
            recorded = json.loads(self.store.read(RUN))
            if not isinstance(recorded["result_options"], dict):
                raise ValueError("no result options")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"output {self.place}: {RUN} can't be read ({error}); give another -o") from None
        return dict(recorded)

    def begin(self, run: dict[str, Any]) -> dict[str, Any]:
        """Record `run`, or check that the recorded one has the same result options and hand it back."""
        if self._overwrite:
            self._clear()
        recorded = self.recorded()
        if recorded is None:
            with self._trouble():
                self._keep_listing()
                write_json(self.store.writing(RUN), run)
            return run
        old, new = recorded["result_options"], run["result_options"]
        changed = [
            f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise UsageError(
                f"output {self.place}: it holds another run: {'; '.join(changed)}; "
                "give another -o, or --overwrite to delete that run"
            )
        return recorded

    def _keep_listing(self) -> None:
        """Put a listing that was made beside an object store there."""
        listing = self.listing
        if listing.exists() and not self.store.exists(LISTING):
            with self.store.writing(LISTING) as file:
                shutil.copyfile(listing, file)

    def withdraw(self) -> None:
        """The run is not finished, or not any more."""
        self.store.delete(SUCCESS)

    def succeeded(self) -> bool:
        return self.store.exists(SUCCESS)

    def succeed(self, summary: dict[str, Any]) -> None:
        write_json(self.store.writing(SUCCESS), summary)

    def finished(self, run: dict[str, Any]) -> dict[int, Done]:
        """The parts on disk, each where the manifest has it. Raises EngineError that names the wrong one."""
        parts = finished(self.store, run["run_id"])
        for index, part in parts.items():
            self._check(index, part.first_row, part.rows, run)
        return parts

    def complete(self, run: dict[str, Any]) -> dict[int, Done]:
        """All parts of the run; their footers have to add up to the manifest. Raises EngineError."""
        parts = self.finished(run)
        rows = run["rows"]
        for index in range(parts_of(run)):
            if index not in parts:
                raise EngineError(f"{self.place / part_name(index)}: it is missing; run again")
        total = sum(part.rows for part in parts.values())
        if total != rows:
            raise EngineError(f"{self.place}: {total} rows in the parts, {rows} in the manifest")
        return parts

    def _check(self, index: int, first_row: int, rows: int, run: dict[str, Any]) -> None:
        part_rows = run["result_options"]["part_rows"]
        first = index * part_rows
        expected = max(0, min(part_rows, run["rows"] - first))
        if (first_row, rows) != (first, expected):
            raise EngineError(
                f"{self.place / part_name(index)}: {rows} rows from row {first_row}, not {expected} "
                f"from row {first}; delete it and run again"
            )


def parts_of(run: dict[str, Any]) -> int:
    """How many parts the run that `_run.json` describes has."""
    return -(-int(run["rows"]) // int(run["result_options"]["part_rows"]))


def recorded_bundle(results: Place) -> Path:
    """Where the bundle of the run in `results` was. Raises UsageError when there is no run."""
    recorded = RunFolder.existing(results).recorded()
    assert recorded is not None
    return Path(recorded["bundle"] or Settings.bundle)
