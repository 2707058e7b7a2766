"""The results folder: whose run it holds, what is finished, who works in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Self

from msgspec import field

from engine.core.errors import EngineError, UsageError
from engine.core.json_records import Record, from_json, to_builtins, to_json
from engine.core.location import Url
from engine.core.records import PartInfo
from engine.core.settings import Settings
from engine.runs.run_record import RunRecord
from engine.sink.parts import list_parts, part_name, read_part, read_parts
from engine.storage.folders import LOCK_FILE, Folder, StoreError, error_text
from engine.storage.object_folder import LEASE_S
from engine.storage.open_folder import open_folder

RUN_FILE, SUCCESS_FILE, LISTING_FILE = "_run.json", "_SUCCESS", "_manifest.parquet"
EXPLANATIONS_FOLDER, INDEX_FILE, PICTURE_GLOB = (
    "explanations",
    "index.json",
    "row-*.png",
)  # of python -m engine.explain
REPORT_FILE = "report.html"  # of python -m engine.report; every finished run has one
LOCK_POLL_S = 0.05, 1.0  # between two looks whether it is one's turn, on a disk and in an object store
LOCK_NOTICE_S = 2.0
ACTORS_FILE = "_actors.json"  # of a run on Ray: how often the canaries have come well through each


class ActorRecord(Record):
    """An actor of a run on Ray."""

    host: str = ""
    device: str = ""
    rounds: int  # how often the canaries have come well through it


class ActorsRecord(Record):
    """`_actors.json`: which actors gave right scores until when."""

    run_id: str
    actors: dict[str, ActorRecord]  # by id


class ReferenceImages(Record, omit_defaults=True):
    """Images that explained ones are compared with: rows of the run, or the bundle's canaries."""

    rows: tuple[int, ...] = ()
    canaries: int = 0


class ExplainedRow(Record):
    """A row of `explanations/index.json`."""

    row: int
    of_class: str = field(name="class")
    voters: dict[str, str]  # picture by member, and that of the ensemble
    probability: float
    typical: float  # mean probability of the reference images
    shares: dict[str, float]  # of the difference, by member
    scale: float  # largest change of the probability by one place


class ExplanationIndex(Record):
    """`explanations/index.json`, by `engine.explain`."""

    run_id: str
    method: str
    of_class: str = field(name="class")
    compared_with: ReferenceImages
    rows: tuple[ExplainedRow, ...]


def _shorten_hash(value: object) -> str:
    shown = list(value) if isinstance(value, tuple) else value
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(shown)  # a hash


class RunFolder:
    """Locks the folder at `path` for this process while it is open; `shared`, for the shards of one run.

    Created here, it is removed if no run was begun.
    """

    def __init__(self, path: Path | Url, *, overwrite: bool, shared: bool = False) -> None:
        self.path = path
        self.files = open_folder(path)
        self._overwrite, self._shared = overwrite, shared
        self._holds_run_lock = not shared

    @classmethod
    def existing(cls, path: Path | Url) -> Self:
        """Open a folder that holds a run. Raises UsageError for any other."""
        folder = cls(path, overwrite=False)
        if not folder.files.exists(RUN_FILE):
            raise UsageError(f"results {path}: no {RUN_FILE} there; give the output folder of a run")
        return folder

    def __enter__(self) -> Self:
        try:
            self.refuse_foreign()
            self.files.lock(shared=self._shared)
            if self._overwrite:
                self.files.delete(LISTING_FILE)  # the folder is listed again; the rest goes in begin()
        except BlockingIOError:
            why = "another process is writing there"
            if self._shared:
                why += " without --shard"
            why += "; wait for it"
            if isinstance(self.path, Url):
                why += f", or for {LEASE_S:g} s if it was killed"
            raise UsageError(f"output {self.path}: {why}") from None
        except OSError as error:
            raise UsageError(f"output {self.path}: {error_text(error)}") from None
        return self

    def __exit__(self, *_: object) -> None:
        nothing_begun = False
        with suppress(StoreError):
            nothing_begun = not self.files.exists(RUN_FILE)
            if nothing_begun and self._holds_run_lock:
                self.files.delete(LISTING_FILE)
        self.files.unlock(remove_created=nothing_begun)

    def acquire_run_lock(self, say: Callable[[str], None]) -> None:
        """Wait until no other shard begins or ends the run; `say` it when that takes long."""
        began, told = time.monotonic(), False
        while not self.files.acquire_run_lock():
            if not told and time.monotonic() - began > LOCK_NOTICE_S:
                say(f"waiting for another shard, which begins or ends the run in {self.path}")
                told = True
            time.sleep(LOCK_POLL_S[isinstance(self.path, Url)])
        self._holds_run_lock = True

    def release_run_lock(self) -> None:
        if self._shared and self._holds_run_lock:
            self._holds_run_lock = False
            self.files.release_run_lock()

    @contextmanager
    def run_lock(self, say: Callable[[str], None]) -> Iterator[None]:
        self.acquire_run_lock(say)
        try:
            yield
        finally:
            self.release_run_lock()

    def refuse_foreign(self) -> None:
        """Raises UsageError for a file, and for a folder that holds something else."""
        if isinstance(self.path, Path) and self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output {self.path}: this is a file; give a folder with -o")
        names = self.files.names()
        if names and not any(name == RUN_FILE or name.startswith(LOCK_FILE) for name in names):
            raise UsageError(
                f"output {self.path}: it is not empty ({names[0]!r}) and holds no run; give another -o"
            )

    def _clear(self) -> None:
        names = self.files.names()
        self.mark_unfinished()
        clear_explanations(open_folder(self.path / EXPLANATIONS_FOLDER))
        for name in [ACTORS_FILE, *(name for name in names if fnmatch(name, "part-*.parquet")), RUN_FILE]:
            self.files.delete(name)

    def listing(self) -> Path:
        """Return the path of a folder's listing, where it is or can be written for `store_listing`."""
        return self.files.local(LISTING_FILE)

    def store_listing(self) -> None:
        self.files.keep(LISTING_FILE)

    def recorded(self) -> RunRecord | None:
        """Read `_run.json`; None for a new folder. Raises UsageError for one that this version can't read."""
        try:
            return RunRecord.parse(self.files.read(RUN_FILE, lambda opened: opened.read()))
        except FileNotFoundError:
            return None
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            raise UsageError(
                f"output {self.path}: {RUN_FILE} can't be read: {error}; if a newer version of the engine "
                "wrote it, use that version, else give another -o"
            ) from None

    def run(self) -> RunRecord:
        """Read `_run.json` of a folder that holds a run. Raises UsageError."""
        run = self.recorded()
        if run is None:
            raise UsageError(f"results {self.path}: no {RUN_FILE} there; give the output folder of a run")
        return run

    def begin(self, run: RunRecord) -> RunRecord:
        """Record `run`, or check that the recorded one has the same result options and hand it back."""
        if self._overwrite:
            self.mark_unfinished()
            self._clear()
        recorded = self.recorded()
        if recorded is None:
            self._write(RUN_FILE, to_json(run))
            return run
        self.check_same(recorded, run)
        return recorded

    def check_same(self, recorded: RunRecord, run: RunRecord) -> None:
        """Raises UsageError when the run that is recorded has other result options than `run`."""
        old, new = to_builtins(recorded.result_options), to_builtins(run.result_options)
        changed = [
            f"{name} was {_shorten_hash(old.get(name))}, is {_shorten_hash(new.get(name))}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if old["shards"] != new["shards"]:
            raise UsageError(
                f"output {self.path}: the run there is {_describe_shards(old['shards'])}, this one is "
                f"{_describe_shards(new['shards'])}; give the same, or another -o"
            )
        if changed:
            raise UsageError(
                f"output {self.path}: it holds another run: {'; '.join(changed)}; "
                "give another -o, or --overwrite to delete that run"
            )

    def mark_unfinished(self) -> None:
        """Delete the marks of a finished run."""
        for name in (SUCCESS_FILE, REPORT_FILE):
            self.files.delete(name)

    def is_marked_finished(self) -> bool:
        return self.files.exists(SUCCESS_FILE)

    def mark_finished(self, success: Record) -> None:
        self.files.delete(REPORT_FILE)  # of an unfinished run
        self._write(SUCCESS_FILE, to_json(success))

    def _write(self, name: str, text: str) -> None:
        self.files.write(name, lambda temporary: temporary.write_text(text))

    def there(self) -> set[int]:
        """Return the indices of the parts on disk, by their names alone."""
        return list_parts(self.files)

    def finished(self, run: RunRecord, wanted: Container[int] | None = None) -> dict[int, PartInfo]:
        """Return the parts on disk by index, each checked against the manifest; only `wanted` ones, if given.

        A part by an actor on Ray counts once the canaries have come well through the actor after it. Raises
        EngineError that names the wrong one.
        """
        parts, actors = read_parts(self.files, run.run_id, wanted), self.actors(run)
        parts = {index: part for index, part in parts.items() if is_confirmed(part, actors)}
        for index, part in parts.items():
            self._check(index, part.first_row, part.rows, run)
        return parts

    def has(self, index: int, run: RunRecord) -> bool:
        """Return whether this part is on disk. Raises EngineError if it is wrong."""
        if not self.files.exists(part_name(index)):
            return False
        part = read_part(self.files, run.run_id, index)
        self._check(index, part.first_row, part.rows, run)
        return True

    def claimed(self, indices: set[int]) -> set[int]:
        """Return the parts that another process has claimed.

        In an object store a killed one on another machine seems to live for a while, which is waited for.
        """
        found = set(filter(self.files.is_claimed, indices))
        over = time.monotonic() + (LEASE_S if isinstance(self.path, Url) else 0.0)
        while found and time.monotonic() < over:
            time.sleep(LOCK_POLL_S[1])
            found = set(filter(self.files.is_claimed, found))
        return found

    def actors(self, run: RunRecord) -> dict[str, ActorRecord]:
        """Read what is recorded of each actor on Ray, by its id."""
        try:
            recorded = from_json(self.files.read(ACTORS_FILE, lambda opened: opened.read()), ActorsRecord)
        except FileNotFoundError:
            return {}
        except StoreError:
            raise
        except (OSError, ValueError) as error:
            raise EngineError(
                f"{self.path / ACTORS_FILE}: it can't be read ({error}); delete it and run again"
            ) from None
        return recorded.actors if recorded.run_id == run.run_id else {}

    def record_actors(self, run: RunRecord, actors: Mapping[str, ActorRecord]) -> None:
        self._write(ACTORS_FILE, to_json(ActorsRecord(run_id=run.run_id, actors=dict(actors))))

    def complete(self, run: RunRecord, parts: dict[int, PartInfo] | None = None) -> dict[int, PartInfo]:
        """Return all parts of the run; their footers have to add up to the manifest. Raises EngineError.

        `parts`: as `finished` gives them, where that was called just now.
        """
        parts = self.finished(run) if parts is None else parts
        for index in range(run.part_count):
            if index not in parts:
                raise EngineError(f"{self.path / part_name(index)}: it is missing; run again")
        total = sum(part.rows for part in parts.values())
        if total != run.rows:
            raise EngineError(f"{self.path}: {total} rows in the parts, {run.rows} in the manifest")
        return parts

    def _check(self, index: int, first_row: int, rows: int, run: RunRecord) -> None:
        first = index * run.result_options.part_rows
        expected = run.rows_in_part(index)
        if (first_row, rows) != (first, expected):
            raise EngineError(
                f"{self.path / part_name(index)}: {rows} rows from row {first_row}, not {expected} "
                f"from row {first}; delete it and run again"
            )


def clear_explanations(folder: Folder) -> None:
    """Delete the explanations in `folder`, and the folder if it is empty then; not behind a link."""
    if isinstance(folder.location, Path) and folder.location.is_symlink():
        return
    names = folder.names()
    for name in [INDEX_FILE, *(name for name in names if fnmatch(name, PICTURE_GLOB))] if names else []:
        folder.delete(name)
    if names and isinstance(folder.location, Path):
        with suppress(OSError):  # somebody put something else there
            folder.location.rmdir()


def is_confirmed(part: PartInfo, actors: Mapping[str, ActorRecord]) -> bool:
    """Return whether a process wrote the part, or an actor whose canaries passed after it."""
    actor = part.by.actor
    return actor is None or (actor in actors and part.by.round < actors[actor].rounds)


def _describe_shards(count: int | None) -> str:
    return f"cut into {count} shards (--shard K/{count})" if count else "not cut into shards"


def recorded_bundle_path(results: Path | Url) -> Path:
    """Return the recorded path of a run's bundle. Raises UsageError when there is no run."""
    return Path(RunFolder.existing(results).run().bundle or Settings.bundle)
