"""The failed rows of a finished run once more; each part takes in its new rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from engine import bundle
from engine.bundle import Bundle
from engine.core.deadline import Deadline
from engine.errors import UsageError
from engine.job import Say, Watch
from engine.ledger import Progress, Summary, summary_of
from engine.manifest import Manifest, open_manifest
from engine.pipeline import Opening, Stages
from engine.privacy import Redaction
from engine.provenance import ResultOptions, RunRecord, scorer_of
from engine.records import Part
from engine.run_folder import RUN, RunFolder
from engine.runners import choose
from engine.settings import Settings
from engine.sink import Done, Layout, Sink, failed_rows
from engine.storage.location import parse


def retry(
    settings: Settings,
    *,
    watch: Watch = lambda _: None,
    say: Say = lambda _: None,
    deadline: Deadline | None = None,
) -> Summary:
    """Try the failed rows of the finished run in the folder `settings.manifest` again, with its options.

    Each part takes in its new rows at once, so a stop loses nothing. `settings.bundle` says where the run's
    bundle is now. Raises UsageError when the folder holds no finished run or the bundle is another.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder.existing(settings.manifest))
        run = folder.run()
        options = run.result_options
        models = same_bundle(settings, folder, run)
        choice = choose(
            options.runner,
            options.device,
            models,
            precision=options.precision,
            batch_size=options.batch_size,
        )
        if choice.plan_hashes != options.plans:
            raise UsageError(
                f"bundle {settings.bundle}: its plans were built anew since that run; run it again"
            )
        done = all_parts(folder, run)
        failed = {index: part.errors for index, part in done.items() if part.errors}
        progress = Progress(sum(failed.values()), finish_by=settings.finish_by)
        if not failed:
            return summary_of(folder.path, run, done.values(), progress, {}, 0)
        settings, manifest = as_in_run(settings, options)
        root = manifest.root if manifest else parse(options.root)
        opening = Opening(
            *(settings, models, choice, say, root),
            batch_size=options.batch_size,
            part_rows=options.part_rows,
            rows=run.rows,
            tuning=run.tuning,
            resumed=True,
        )
        stages = stack.enter_context(Stages(opening))
        layout = Layout.of_part(
            *(models, folder.files, min(failed)),
            uids=options.include_uids,
            with_triage=run.has_triage,
            redaction=settings.redaction,
        )
        folder.withdraw()
        parts = failed_rows(folder.files, sorted(failed), layout.passthrough.names)
        if manifest:
            parts = with_paths(parts, manifest.parts(options.part_rows, failed))
        sink = Sink(folder.files, layout, run.to_metadata(), scorer_of(choice), fold=True)
        stages.run(parts, sink, progress, watch, deadline or Deadline(settings.finish_by))
        return stages.close_ledger(folder, run, progress)


def same_bundle(settings: Settings, folder: RunFolder, run: RunRecord) -> Bundle:
    """The bundle of a run, from where it is now. Raises UsageError when it is another."""
    models = bundle.load(settings.bundle)
    if models.sha256 != run.result_options.bundle_sha256:
        raise UsageError(f"bundle {settings.bundle}: it is not the one that {folder.path / RUN} names")
    return models


def all_parts(folder: RunFolder, run: RunRecord) -> dict[int, Done]:
    """The parts of a finished run. Raises UsageError for one that is not finished."""
    if len(folder.finished(run)) < run.part_count:
        raise UsageError(f"results {folder.path}: the run is not finished; give its own command again")
    return folder.complete(run)


def as_in_run(settings: Settings, options: ResultOptions) -> tuple[Settings, Manifest | None]:
    """Give `settings` the limits, decoder and redaction of a run; of a redacted one, open the manifest.

    Raises UsageError when what was given does not fit the run.
    """
    settings = replace(
        settings,
        max_pixels=options.max_pixels,
        max_file_size=options.max_file_size,
        redaction=_same_redaction(settings, options),
        decoder=options.decoder or settings.decoder,
    )
    return settings, _paths_again(settings, options)


def _same_redaction(settings: Settings, options: ResultOptions) -> Redaction | None:
    given = settings.redaction
    if (given.key if given else None) != options.redacted_by:
        raise UsageError(
            f"results {settings.manifest}: its paths are hashed; give --redact and --paths-from its manifest"
            if options.redacted_by
            else f"results {settings.manifest}: its paths are not hashed; leave --redact out"
        )
    return replace(given, keep=options.kept_columns or ()) if given else None


def _paths_again(settings: Settings, options: ResultOptions) -> Manifest | None:
    """The manifest of a redacted run, whose results don't hold its paths."""
    if not settings.redaction:
        return None
    if not settings.paths_from:
        raise UsageError(f"results {settings.manifest}: its paths are hashed; give --paths-from its manifest")
    manifest = open_manifest(settings.paths_from, path_column=options.path_column, root=settings.root)
    if manifest.sha256 != options.manifest_sha256:
        raise UsageError(f"--paths-from {settings.paths_from}: it is not the manifest of that run")
    if settings.redaction.name(str(manifest.root)) != options.root:
        raise UsageError(f"--paths-from {settings.paths_from}: relative paths started elsewhere; give --root")
    return manifest


def with_paths(parts: Iterator[Part], named: Iterator[Part]) -> Iterator[Part]:
    """Parts of results with the paths of the same rows of the manifest."""
    for part, source in zip(parts, named, strict=True):
        assert part.index == source.index
        first = int(source.row[0])
        yield replace(part, paths=[source.paths[int(row) - first] for row in part.row])
