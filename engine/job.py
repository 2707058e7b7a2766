"""A run before its stages and after them: checked, described, its folder locked; at the end the sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from engine import bundle
from engine.bundle import Bundle
from engine.core.tuning import Settled
from engine.errors import NothingNew, Stopped, UsageError
from engine.ledger import ActorCounts, Progress, Summary, summary_of
from engine.listing import in_words
from engine.manifest import Manifest, open_manifest
from engine.overlap import Meter
from engine.provenance import RunRecord, scorer_of
from engine.records import Part
from engine.run_folder import RunFolder
from engine.runners import Choice, choose
from engine.settings import Settings, Shard
from engine.since import Earlier, ScoreOptions, write_new
from engine.sink import Done, Layout, Sink
from engine.storage import Url
from engine.storage.location import absolute
from engine.tuned import Advice, advise

Watch = Callable[[Progress], None]
Say = Callable[[str], None]
Chosen = Callable[[Bundle], Choice]


@dataclass
class Job:
    """One run. Nothing is written before `begin`, which records `run` or takes up what is recorded."""

    settings: Settings  # with what the machine's profile adds
    models: Bundle
    choice: Choice
    folder: RunFolder  # locked
    manifest: Manifest
    layout: Layout
    run: RunRecord
    resumed: bool
    say: Say
    opening_lines: list[str]
    done: dict[int, Done] = field(default_factory=dict)  # its parts on disk, when it began

    def begin(self, settled: Settled | None = None) -> None:
        """Record the run with what the stages have settled, or take up the one that is recorded.

        Raises UsageError when the folder holds a run with other result options.
        """
        self.run = self.folder.begin(self.run.with_settled(settled) if settled else self.run)
        self.folder.give_turn()
        self.done = self.folder.finished(self.run, self.indices)
        if self.is_finished:
            return
        for line in self.opening_lines:
            self.say(line)
        if self.folder.succeeded():
            with self.folder.turn(self.say):  # it may be finished since the parts were looked at
                # a part may be there and not count: see `RunFolder.finished`
                if not self.settings.shard or not self.folder.there() >= set(self.indices):
                    self.folder.withdraw()

    @property
    def indices(self) -> Sequence[int]:
        """Of the parts that are its to do."""
        return self.run.part_indices(self.settings.shard)

    @property
    def is_finished(self) -> bool:
        return self.folder.succeeded() and len(self.done) == len(self.indices)

    @property
    def part_rows(self) -> int:
        return self.run.result_options.part_rows

    def progress(self) -> Progress:
        """At the start: what earlier starts have finished."""
        rows = self.run.shard_rows(self.settings.shard)
        progress = Progress(rows, finish_by=self.settings.finish_by)
        for part in self.done.values():
            progress.rows_before += part.rows
            progress.by_status.update(part.by_status)
        return progress

    def parts(self, progress: Progress) -> Iterator[Part]:
        """Those that are not on disk yet, in order; of a shard, those that nobody else has in hand."""
        todo = set(self.indices) - set(self.done)
        return self._claimed(todo, progress) if self.settings.shard else self._of_manifest(todo)

    def _of_manifest(self, indices: set[int]) -> Iterator[Part]:
        return self.manifest.parts(self.part_rows, indices)

    def _claimed(self, todo: set[int], progress: Progress) -> Iterator[Part]:
        """The same shard may have been started twice: what the other has in hand is asked for again at last.

        What the other does leaves `progress`.
        """
        files = self.folder.files
        while todo:
            held = set()
            for part in self._of_manifest(todo):
                if not files.claim(part.index):
                    held.add(part.index)
                elif self.folder.has(part.index, self.run):
                    files.release(part.index)
                    progress.rows -= part.rows
                else:
                    yield part
            if held == todo:
                progress.rows -= sum(map(self.run.rows_in_part, held))
                return
            todo = held

    def sink(self) -> Sink:
        written = self.folder.files.release
        by = scorer_of(self.choice)
        return Sink(self.folder.files, self.layout, self.run.to_metadata(), by, written=written)

    def summary(self) -> Summary:
        """Of a run that was finished already."""
        shard = self.settings.shard
        if shard:
            self.say(f"{self.folder.path} is finished already")
        rows = sum(part.rows for part in self.done.values())
        summary = summary_of(self.folder.path, self.run, self.done.values(), Progress(rows), {}, 0)
        return replace(summary, rows=rows, shard=str(shard) if shard else None)


@contextmanager
def prepare(settings: Settings, say: Say, *, chosen: Chosen | None = None) -> Iterator[Job]:
    """Check everything that can be checked before the stages are opened, and lock the folder.

    `chosen` tells what runs the members where that is not this process.
    Raises UsageError when the manifest, bundle or output folder is wrong, NothingNew for `since`.
    """
    models = bundle.load(settings.bundle)
    check_paths(settings)
    _check_decode(settings, models)
    choice = chosen(models) if chosen else choice_of(settings, models)
    with ExitStack() as stack:
        shared = settings.shard is not None
        folder = stack.enter_context(RunFolder(settings.output, overwrite=settings.overwrite, shared=shared))
        folder.take_turn(say)
        recorded = None if settings.overwrite else folder.recorded()
        if recorded:
            folder.give_turn()  # else when the run is begun: the others take its listing and tuning from it
        earlier = Earlier(settings.since) if settings.since else None
        manifest = _listed(settings, folder, earlier, models, choice, say)
        layout, advice, choice, run = describe(
            *(settings, recorded, manifest, models, choice), earlier=earlier, tuned=chosen is None
        )
        lines = [choice.reason, *_about_triage(models, choice, run), *([advice.line] if advice.line else [])]
        if recorded is None and manifest.skipped:
            lines.append(in_words(manifest.rows, manifest.skipped))
        resumed = recorded is not None
        yield Job(advice.settings, models, choice, folder, manifest, layout, run, resumed, say, lines)


def describe(
    settings: Settings,
    recorded: RunRecord | None,
    manifest: Manifest,
    models: Bundle,
    choice: Choice,
    *,
    earlier: Earlier | None,
    tuned: bool = True,
) -> tuple[Layout, Advice, Choice, RunRecord]:
    """Describe a run that begins, or goes on with a `recorded` one; writes nothing.

    With `tuned`, this machine's profile adds to the settings. Raises UsageError.
    """
    layout = Layout.of(models, manifest, settings, with_triage=recorded is None or recorded.has_triage)
    advice = advise(settings, models, choice, recorded=recorded) if tuned else Advice(settings)
    if advice.settings != settings:
        choice = choice_of(advice.settings, models)
    run = RunRecord.create(
        *(advice.settings, recorded, manifest, models, choice),
        since=f"{earlier.run_id} of {absolute(settings.manifest)}" if earlier else None,
        profile=advice.recorded,
        tuning=advice.tuning,
    )
    return layout, advice, choice, run


def _about_triage(models: Bundle, choice: Choice, run: RunRecord) -> Iterator[str]:
    """What the rows are sorted by, and what is not looked at."""
    if models.operating_points:
        measured = models.operating_points.data.precision
        other = f"; this run is in {choice.precision}" if choice.precision != measured else ""
        yield f"triage: {models.operating_points}{other}"
    if (run.out_of_distribution or "").startswith("not"):
        yield f"out of distribution is {run.out_of_distribution} gives no distances"


def _listed(
    settings: Settings, folder: RunFolder, earlier: Earlier | None, models: Bundle, choice: Choice, say: Say
) -> Manifest:
    """The manifest; a folder's listing is frozen at the first start."""
    listing = folder.listing()
    if earlier and not listing.exists():
        list_new(settings, earlier, models, choice, listing, say)
    manifest = manifest_of(settings, listing, since=earlier is not None)
    folder.keep_listing()
    return manifest.only(settings.redaction.keep) if settings.redaction else manifest


def choice_of(settings: Settings, models: Bundle) -> Choice:
    """What runs the members. Raises UsageError for what can't be had here, or not of this bundle."""
    _check_decode(settings, models)
    return choose(
        settings.runner,
        settings.device,
        models,
        precision=settings.precision,
        batch_size=settings.batch_size,
    )


def manifest_of(settings: Settings, listing: Path, *, since: bool) -> Manifest:
    return open_manifest(
        settings.manifest,
        path_column=settings.path_column,
        root=settings.root,
        listing=None if settings.redaction else listing,  # which names paths
        include=settings.include,
        exclude=settings.exclude,
        since=since,
    )


def list_new(
    settings: Settings, earlier: Earlier, models: Bundle, choice: Choice, listing: Path, say: Say
) -> None:
    """Freeze what is to be screened since an earlier run. Raises NothingNew."""
    with TemporaryDirectory(prefix="engine-") as scratch:
        whole = manifest_of(settings, Path(scratch, listing.name), since=False)
        options = ScoreOptions.create(models, choice)
        if changed := earlier.differs(options):
            say(f"{changed} has changed since {earlier.place}: all {whole.rows} rows are screened")
            rows = whole.copy_to(listing)
        else:
            rows = write_new(whole, earlier, options, listing)
            say(f"{rows} of {whole.rows} rows are new or changed since {earlier.place}")
    if not rows:
        listing.unlink()
        raise NothingNew(f"nothing is new since {earlier.place}; nothing was written")


def _check_decode(settings: Settings, models: Bundle) -> None:
    """Scores are for pixels like those that the bundle was trained on."""
    if settings.decode not in (None, models.decode):
        raise UsageError(
            f"--decode {settings.decode}: bundle {models.path} was trained with {models.decode}; leave the "
            f"option out, or train one with: python -m training DATA -o BUNDLE --decode {settings.decode}"
        )


def check_paths(settings: Settings) -> None:
    """A wrong manifest or root must not leave an output folder behind."""
    manifest, root = settings.manifest, settings.root
    if settings.redaction and settings.since:
        raise UsageError("--since with --redact: the list of what is new would put paths into the results")
    if isinstance(root, Url) and root.query:
        raise UsageError(f"--root {root}?...: a folder has no query; give it without")
    if isinstance(manifest, Url):
        if manifest.path.endswith("/") or not manifest.key:
            raise UsageError(
                f"manifest {manifest}: a folder there can't be listed; give a list of its images"
            )
        return
    if not manifest.exists():
        raise UsageError(f"manifest {manifest}: no such file or folder")
    if not (manifest.is_file() or manifest.is_dir()):
        raise UsageError(f"manifest {manifest}: neither a file nor a folder")
    if isinstance(root, Path) and not root.is_dir():
        raise UsageError(f"--root {root}: no such folder; relative paths of the manifest start there")


def close_ledger(
    folder: RunFolder,
    run: RunRecord,
    progress: Progress,
    meters: Mapping[str, Meter],
    *,
    decoder_restarts: int,
    decoder_refusals: int,
    shard: Shard | None = None,
    say: Say = lambda _: None,
    parts: dict[int, Done] | None = None,
    actors: ActorCounts | None = None,
) -> Summary:
    """Re-read the footers of all parts; only when they add up to the manifest does the run succeed.

    `parts`: what the footers say, where they were read just now. A shard does so when no part of the run is
    left to the others; its summary is about its own parts. Raises Stopped when parts of its own are missing
    that nobody has in hand.
    """
    add_up = partial(
        summary_of,
        folder.path,
        run,
        progress=progress,
        meters=meters,
        decoder_restarts=decoder_restarts,
        decoder_refusals=decoder_refusals,
        actors=actors,
    )
    count, own = run.part_count, run.part_indices(shard)
    with folder.turn(say):
        there = folder.there()
        if shard is None or (len(there) == count and not folder.succeeded()):
            summary = add_up(folder.complete(run, parts).values())
            folder.files.sweep()
            folder.succeed(summary.as_record())
        if shard is None:
            return summary
    # before the parts are looked at: who lets go of one has written it
    held = folder.claimed(set(own) - there)
    parts = folder.finished(run, own)
    say(_how_far(shard, own, held, set(parts), len(there), count))
    rows = sum(part.rows for part in parts.values())
    return replace(add_up(parts.values()), rows=rows, shard=str(shard))


def _how_far(shard: Shard, own: Sequence[int], held: set[int], done: set[int], there: int, count: int) -> str:
    if left := len(set(own) - done - held):
        raise Stopped(f"shard {shard}: {left} of its {len(own)} parts are missing; the same command goes on")
    if there == count:
        return f"shard {shard} is done, and with it all {count} parts of the run"
    state = f"is done: {len(done)} of {count} parts"
    if others := len(held - done):
        state = f"leaves {others} of its {len(own)} parts to another process, which has them in hand"
    return f"shard {shard} {state}; {there} of {count} parts of the run are there"
