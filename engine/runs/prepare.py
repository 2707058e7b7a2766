"""Prepare a run before its stages open: check its inputs, describe it and lock its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.bundle import bundle as bundles
from engine.bundle.bundle import Bundle
from engine.core.errors import NothingNew, UsageError
from engine.core.location import Url, absolute
from engine.core.records import OnMessage, Part, PartInfo
from engine.core.settings import Settings
from engine.core.tuning import Settled
from engine.manifest.listing import describe_list
from engine.manifest.manifest import Manifest, open_manifest
from engine.runners.base import RunnerChoice
from engine.runners.select import select_runner
from engine.runs.incremental import PreviousRun, ScoreOptions, write_changed
from engine.runs.profile import AppliedProfile, apply_profile
from engine.runs.progress import Progress
from engine.runs.run_folder import RunFolder
from engine.runs.run_record import RunRecord, scorer_of
from engine.runs.summary import Summary, summarise_run
from engine.sink.columns import ResultSchema
from engine.sink.sink import Sink

SelectRunner = Callable[[Bundle], RunnerChoice]


@dataclass
class PreparedRun:
    """A prepared run. Nothing is written before `begin`, which writes `run` or resumes the recorded one."""

    settings: Settings  # with the options of this machine's tuning profile
    bundle: Bundle
    choice: RunnerChoice
    folder: RunFolder  # locked
    manifest: Manifest
    layout: ResultSchema
    run: RunRecord
    resumed: bool
    say: OnMessage
    start_messages: list[str]
    done: dict[int, PartInfo] = field(default_factory=dict)  # parts on disk when the run began

    def begin(self, settled: Settled | None = None) -> None:
        """Record the run with the values that the stages have settled, or resume the recorded run.

        Raises UsageError if the folder holds a run with other result options.
        """
        self.run = self.folder.begin(self.run.with_settled(settled) if settled else self.run)
        self.folder.release_run_lock()
        self.done = self.folder.finished(self.run, self.indices)
        if self.is_finished:
            return
        for line in self.start_messages:
            self.say(line)
        if self.folder.is_marked_finished():
            with self.folder.run_lock(self.say):  # another shard may just have finished it
                # a part on disk may be unconfirmed, see `RunFolder.finished`
                if not self.settings.shard or not self.folder.list_parts() >= set(self.indices):
                    self.folder.mark_unfinished()

    @property
    def indices(self) -> Sequence[int]:
        """Return the indices of the parts that this process has to do."""
        return self.run.part_indices(self.settings.shard)

    @property
    def is_finished(self) -> bool:
        return self.folder.is_marked_finished() and len(self.done) == len(self.indices)

    @property
    def part_rows(self) -> int:
        return self.run.result_options.part_rows

    def progress(self) -> Progress:
        """Return the progress at the start, with the parts of earlier starts."""
        rows = self.run.shard_rows(self.settings.shard)
        progress = Progress(rows, finish_by=self.settings.finish_by)
        for part in self.done.values():
            progress.rows_before += part.rows
            progress.by_status.update(part.by_status)
        return progress

    def parts(self, progress: Progress) -> Iterator[Part]:
        """Yield the parts that are not on disk yet, in order; for a shard, those that no other process
        has claimed.
        """
        todo = set(self.indices) - set(self.done)
        return self._claim_parts(todo, progress) if self.settings.shard else self._manifest_parts(todo)

    def _manifest_parts(self, indices: set[int]) -> Iterator[Part]:
        return self.manifest.parts(self.part_rows, indices)

    def _claim_parts(self, todo: set[int], progress: Progress) -> Iterator[Part]:
        """Claim and yield parts; those that another process has claimed are tried again at the end.

        Rows that another process scores are subtracted from `progress`.
        """
        files = self.folder.files
        while todo:
            claimed = set()
            for part in self._manifest_parts(todo):
                if not files.claim(part.index):
                    claimed.add(part.index)
                elif self.folder.has(part.index, self.run):
                    files.release(part.index)
                    progress.rows -= part.rows
                else:
                    yield part
            if claimed == todo:
                progress.rows -= sum(map(self.run.rows_in_part, claimed))
                return
            todo = claimed

    def sink(self) -> Sink:
        files, by = self.folder.files, scorer_of(self.choice)
        return Sink(files, self.layout, self.run.to_metadata(), by, on_written=files.release)

    def summary(self) -> Summary:
        """Return the summary of a run that an earlier start finished."""
        shard = self.settings.shard
        if shard:
            self.say(f"{self.folder.path} is finished already")
        rows = sum(part.rows for part in self.done.values())
        summary = summarise_run(self.folder.path, self.run, self.done.values(), Progress(rows), {}, 0)
        return replace(summary, rows=rows, shard=str(shard) if shard else None)


@contextmanager
def prepare_run(
    settings: Settings, say: OnMessage, *, chosen: SelectRunner | None = None
) -> Iterator[PreparedRun]:
    """Check everything that can be checked before the stages open, and lock the folder.

    `chosen` selects the runner if the members run in another process.
    Raises UsageError if the manifest, bundle or output folder is wrong, and NothingNew for `since`.
    """
    bundle = bundles.load_bundle(settings.bundle)
    check_inputs(settings)
    _check_decode(settings, bundle)
    choice = chosen(bundle) if chosen else select_for_settings(settings, bundle)
    with ExitStack() as stack:
        shared = settings.shard is not None
        folder = stack.enter_context(RunFolder(settings.output, overwrite=settings.overwrite, shared=shared))
        folder.acquire_run_lock(say)
        recorded = None if settings.overwrite else folder.recorded()
        if recorded:
            # for a new run `begin` releases it: other shards use the listing and the tuning of the first
            folder.release_run_lock()
        earlier = PreviousRun(settings.since) if settings.since else None
        manifest = _open_frozen_manifest(settings, folder, earlier, bundle, choice, say)
        layout, advice, choice, run = describe(
            *(settings, recorded, manifest, bundle, choice), earlier=earlier, tuned=chosen is None
        )
        lines = [choice.reason, *_triage_lines(bundle, choice, run), *([advice.line] if advice.line else [])]
        if recorded is None and manifest.skipped:
            lines.append(describe_list(manifest.rows, manifest.skipped))
        resumed = recorded is not None
        yield PreparedRun(advice.settings, bundle, choice, folder, manifest, layout, run, resumed, say, lines)


def describe(
    settings: Settings,
    recorded: RunRecord | None,
    manifest: Manifest,
    bundle: Bundle,
    choice: RunnerChoice,
    *,
    earlier: PreviousRun | None,
    tuned: bool = True,
) -> tuple[ResultSchema, AppliedProfile, RunnerChoice, RunRecord]:
    """Describe a new run, or a resumed one that is `recorded`, without writing anything.

    With `tuned`, this machine's profile is applied to the settings. Raises UsageError.
    """
    layout = ResultSchema.of(bundle, manifest, settings, with_triage=recorded is None or recorded.has_triage)
    advice = apply_profile(settings, bundle, choice, recorded=recorded) if tuned else AppliedProfile(settings)
    if advice.settings != settings:
        choice = select_for_settings(advice.settings, bundle)
    run = RunRecord.create(
        *(advice.settings, recorded, manifest, bundle, choice),
        since=f"{earlier.run_id} of {absolute(settings.manifest)}" if earlier else None,
        profile=advice.recorded,
        tuning=advice.tuning,
    )
    return layout, advice, choice, run


def _triage_lines(bundle: Bundle, choice: RunnerChoice, run: RunRecord) -> Iterator[str]:
    """Yield the status lines about triage and out-of-distribution detection."""
    if bundle.operating_points:
        calibrated = bundle.operating_points.data.precision
        other = f"; this run is in {choice.precision}" if choice.precision != calibrated else ""
        yield f"triage: {bundle.operating_points}{other}"
    if (run.out_of_distribution or "").startswith("not"):
        yield f"out of distribution is {run.out_of_distribution} gives no distances"


def _open_frozen_manifest(
    settings: Settings,
    folder: RunFolder,
    earlier: PreviousRun | None,
    bundle: Bundle,
    choice: RunnerChoice,
    say: OnMessage,
) -> Manifest:
    """Open the manifest; the listing of a folder is frozen at the first start."""
    listing = folder.listing()
    if earlier and not listing.exists():
        list_incremental(settings, earlier, bundle, choice, listing, say)
    manifest = open_run_manifest(settings, listing, since=earlier is not None)
    folder.store_listing()
    return manifest.only(settings.redaction.keep) if settings.redaction else manifest


def select_for_settings(settings: Settings, bundle: Bundle) -> RunnerChoice:
    """Select the runner for the settings. Raises UsageError for what this machine or bundle lacks."""
    _check_decode(settings, bundle)
    return select_runner(
        settings.runner,
        settings.device,
        bundle,
        precision=settings.precision,
        batch_size=settings.batch_size,
    )


def open_run_manifest(settings: Settings, listing: Path, *, since: bool) -> Manifest:
    return open_manifest(
        settings.manifest,
        path_column=settings.path_column,
        root=settings.root,
        listing=None if settings.redaction else listing,  # a listing stores paths
        include=settings.include,
        exclude=settings.exclude,
        since=since,
    )


def list_incremental(
    settings: Settings,
    earlier: PreviousRun,
    bundle: Bundle,
    choice: RunnerChoice,
    listing: Path,
    say: OnMessage,
) -> None:
    """Write the listing of the rows that are new since an earlier run. Raises NothingNew."""
    with TemporaryDirectory(prefix="engine-") as scratch:
        manifest = open_run_manifest(settings, Path(scratch, listing.name), since=False)
        options = ScoreOptions.create(bundle, choice)
        if changed := earlier.changed_option(options):
            say(f"{changed} has changed since {earlier.location}: all {manifest.rows} rows are screened")
            rows = manifest.copy_to(listing)
        else:
            rows = write_changed(manifest, earlier, options, listing)
            say(f"{rows} of {manifest.rows} rows are new or changed since {earlier.location}")
    if not rows:
        listing.unlink()
        raise NothingNew(f"no row is new or changed since {earlier.location}; nothing was written")


def _check_decode(settings: Settings, bundle: Bundle) -> None:
    """Raise UsageError unless images are decoded as for the training of the bundle."""
    if settings.decode not in (None, bundle.decode):
        raise UsageError(
            f"--decode {settings.decode}: bundle {bundle.path} was trained with {bundle.decode}; leave the "
            f"option out, or train one with: python -m training DATA -o BUNDLE --decode {settings.decode}"
        )


def check_inputs(settings: Settings) -> None:
    """Check manifest and root before an output folder is created."""
    manifest, root = settings.manifest, settings.root
    if settings.redaction and settings.since:
        raise UsageError(
            "--since cannot be given with --redact: the list of new rows would store paths in the results"
        )
    if isinstance(root, Url) and root.query:
        raise UsageError(f"--root {root}?...: a folder has no query; give --root without it")
    if isinstance(manifest, Url):
        if manifest.path.endswith("/") or not manifest.key:
            raise UsageError(
                f"manifest {manifest}: a remote folder can't be listed; give a list of its images"
            )
        return
    if not manifest.exists():
        raise UsageError(f"manifest {manifest}: no such file or folder")
    if not (manifest.is_file() or manifest.is_dir()):
        raise UsageError(f"manifest {manifest}: it is neither a file nor a folder")
    if isinstance(root, Path) and not root.is_dir():
        raise UsageError(f"--root {root}: no such folder; relative paths of the manifest start there")
