"""Open and lock a results folder; read and write its run, its finished parts and its marks."""

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
EXPLANATIONS_FOLDER, INDEX_FILE, PICTURE_GLOB = "explanations", "index.json", "row-*.png"  # engine.explain
REPORT_FILE = "report.html"  # of engine.report
LOCK_POLL_S = 0.05, 1.0  # between two attempts to get the run lock, on a disk and in an object store
LOCK_NOTICE_S = 2.0
ACTORS_FILE = "_actors.json"  # of a run on Ray


class ActorRecord(Record):
    """An actor of a run on Ray."""

    host: str = ""
    device: str = ""
    rounds: int  # canary checks that it has passed


class ActorsRecord(Record):
    """`_actors.json`: the canary checks that each actor has passed."""

    run_id: str
    actors: dict[str, ActorRecord]  # by id


class ReferenceImages(Record, omit_defaults=True):
    """The images that explanations compare with: rows of the run, or the bundle's canaries."""

    rows: tuple[int, ...] = ()
    canaries: int = 0


class ExplainedRow(Record):
    """A row of `explanations/index.json`."""

    row: int
    of_class: str = field(name="class")
    voters: dict[str, str]  # file name of the picture by member, and of the ensemble
    probability: float
    typical: float  # mean probability of the reference images
    shares: dict[str, float]  # of the difference in probability, by member
    scale: float  # largest change of the probability by one image region


class ExplanationIndex(Record):
    """`explanations/index.json`, by `engine.explain`."""

    run_id: str
    method: str
    of_class: str = field(name="class")
    compared_with: ReferenceImages
    rows: tuple[ExplainedRow, ...]


def _format_option(value: object) -> str:
    if isinstance(value, str) and len(value) == 64:  # a hash
        return f"{value[:12]}..."
    return repr(list(value) if isinstance(value, tuple) else value)


class RunFolder:
    """Locks the folder at `path` for this process while it is open; `shared` among the shards of a run.

    A folder that this object creates is removed if no run begins.
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
                self.files.delete(LISTING_FILE)  # the manifest is listed again; `begin` deletes the rest
        except BlockingIOError:
            unshared = " without --shard" if self._shared else ""
            killed = f", or for {LEASE_S:g} s if it was killed" if isinstance(self.path, Url) else ""
            raise UsageError(
                f"output {self.path}: another process is writing there{unshared}; wait for it{killed}"
            ) from None
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
        """Wait until no other shard begins or ends the run; call `say` if that takes long."""
        start, reported = time.monotonic(), False
        while not self.files.acquire_run_lock():
            if not reported and time.monotonic() - start > LOCK_NOTICE_S:
                say(f"waiting for another shard that begins or ends the run in {self.path}")
                reported = True
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
        """Raise UsageError for a file, and for a folder with other content than a run."""
        if isinstance(self.path, Path) and self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output {self.path}: it is a file; give a folder with -o")
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
        """Return the path at which the listing is read, or written before `store_listing`."""
        return self.files.local(LISTING_FILE)

    def store_listing(self) -> None:
        self.files.keep(LISTING_FILE)

    def recorded(self) -> RunRecord | None:
        """Read `_run.json`; None for a new folder. Raises UsageError if this version cannot read it."""
        try:
            return RunRecord.parse(self.files.read(RUN_FILE, lambda file: file.read()))
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
        """Record `run`, or return the recorded run after checking that its result options are the same."""
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
        """Raise UsageError if the recorded run has other result options than `run`."""
        old, new = to_builtins(recorded.result_options), to_builtins(run.result_options)
        changed = [
            f"{name} was {_format_option(old.get(name))}, is {_format_option(new.get(name))}"
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
        """Delete `_SUCCESS` and the report."""
        for name in (SUCCESS_FILE, REPORT_FILE):
            self.files.delete(name)

    def is_marked_finished(self) -> bool:
        return self.files.exists(SUCCESS_FILE)

    def mark_finished(self, success: Record) -> None:
        self.files.delete(REPORT_FILE)  # of an unfinished run
        self._write(SUCCESS_FILE, to_json(success))

    def _write(self, name: str, text: str) -> None:
        self.files.write(name, lambda temporary: temporary.write_text(text))

    def list_parts(self) -> set[int]:
        """Return the indices of the parts on disk, without reading their footers."""
        return list_parts(self.files)

    def finished(self, run: RunRecord, wanted: Container[int] | None = None) -> dict[int, PartInfo]:
        """Return the parts on disk by index, checked against the manifest; only the `wanted`, if given.

        A part of a Ray actor counts only if the actor has passed a canary check after it. Raises EngineError
        that names the wrong part.
        """
        parts, actors = read_parts(self.files, run.run_id, wanted), self.actors(run)
        parts = {index: part for index, part in parts.items() if is_confirmed(part, actors)}
        for index, part in parts.items():
            self._check(index, part.first_row, part.rows, run)
        return parts

    def has(self, index: int, run: RunRecord) -> bool:
        """Return whether a part is on disk. Raises EngineError if it does not fit the run."""
        if not self.files.exists(part_name(index)):
            return False
        part = read_part(self.files, run.run_id, index)
        self._check(index, part.first_row, part.rows, run)
        return True

    def claimed(self, indices: set[int]) -> set[int]:
        """Return the parts that another process has claimed.

        In an object store, wait for the leases of killed processes on other machines to expire.
        """
        claimed = set(filter(self.files.is_claimed, indices))
        deadline = time.monotonic() + (LEASE_S if isinstance(self.path, Url) else 0.0)
        while claimed and time.monotonic() < deadline:
            time.sleep(LOCK_POLL_S[1])
            claimed = set(filter(self.files.is_claimed, claimed))
        return claimed

    def actors(self, run: RunRecord) -> dict[str, ActorRecord]:
        """Read the records of the actors on Ray, by id."""
        try:
            recorded = from_json(self.files.read(ACTORS_FILE, lambda file: file.read()), ActorsRecord)
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
        """Return all parts of the run. Raises EngineError unless they add up to the manifest.

        `parts`: the result of `finished`, if it has just been called.
        """
        parts = self.finished(run) if parts is None else parts
        for index in range(run.part_count):
            if index not in parts:
                raise EngineError(
                    f"{self.path / part_name(index)}: the part is missing; run the same command again"
                )
        total = sum(part.rows for part in parts.values())
        if total != run.rows:
            raise EngineError(f"{self.path}: the parts have {total} rows, the manifest has {run.rows}")
        return parts

    def _check(self, index: int, first_row: int, rows: int, run: RunRecord) -> None:
        first = index * run.result_options.part_rows
        expected = run.rows_in_part(index)
        if (first_row, rows) != (first, expected):
            raise EngineError(
                f"{self.path / part_name(index)}: it has {rows} rows from row {first_row}, not {expected} "
                f"from row {first}; delete it and run again"
            )


def clear_explanations(folder: Folder) -> None:
    """Delete the explanations in `folder`, and the folder if it is then empty; do not follow a link."""
    if isinstance(folder.location, Path) and folder.location.is_symlink():
        return
    names = folder.names()
    for name in [INDEX_FILE, *(name for name in names if fnmatch(name, PICTURE_GLOB))] if names else []:
        folder.delete(name)
    if names and isinstance(folder.location, Path):
        with suppress(OSError):  # it contains other files
            folder.location.rmdir()


def is_confirmed(part: PartInfo, actors: Mapping[str, ActorRecord]) -> bool:
    """Return whether the part counts: its actor on Ray, if any, passed a canary check after it."""
    actor = part.by.actor
    return actor is None or (actor in actors and part.by.round < actors[actor].rounds)


def _describe_shards(count: int | None) -> str:
    return f"cut into {count} shards (--shard K/{count})" if count else "not cut into shards"


def recorded_bundle_path(results: Path | Url) -> Path:
    """Return the recorded path of a run's bundle. Raises UsageError if there is no run."""
    return Path(RunFolder.existing(results).run().bundle or Settings.bundle)
