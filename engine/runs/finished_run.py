"""Read a finished run again: its bundle, parts, settings and paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engine.bundle import bundle as bundles
from engine.bundle.bundle import Bundle
from engine.core.errors import UsageError
from engine.core.records import Part, PartInfo
from engine.core.redaction import Redaction
from engine.core.settings import Settings
from engine.manifest.manifest import Manifest, open_manifest
from engine.runs.run_folder import RUN_FILE, RunFolder
from engine.runs.run_record import ResultOptions, RunRecord


def load_run_bundle(settings: Settings, folder: RunFolder, run: RunRecord) -> Bundle:
    """Load the bundle of a run from its present location. Raises UsageError for another bundle."""
    bundle = bundles.load_bundle(settings.bundle)
    if bundle.sha256 != run.result_options.bundle_sha256:
        raise UsageError(
            f"bundle {settings.bundle}: it is not the bundle that {folder.path / RUN_FILE} names"
        )
    return bundle


def read_finished_parts(folder: RunFolder, run: RunRecord) -> dict[int, PartInfo]:
    """Read the parts of a finished run. Raises UsageError for an unfinished one."""
    if len(folder.finished(run)) < run.part_count:
        raise UsageError(f"results {folder.path}: the run is not finished; run its own command again")
    return folder.complete(run)


def apply_run_settings(settings: Settings, options: ResultOptions) -> tuple[Settings, Manifest | None]:
    """Return the settings with a run's limits, decoder and redaction, and the manifest of a redacted run.

    Raises UsageError if the settings do not fit the run.
    """
    settings = replace(
        settings,
        max_pixels=options.max_pixels,
        max_file_size=options.max_file_size,
        redaction=_check_redaction(settings, options),
        decoder=options.decoder or settings.decoder,
    )
    return settings, _manifest_with_paths(settings, options)


def _check_redaction(settings: Settings, options: ResultOptions) -> Redaction | None:
    redaction = settings.redaction
    if (redaction.key if redaction else None) != options.redacted_by:
        raise UsageError(
            f"results {settings.manifest}: its paths are hashed; give --redact and --paths-from its manifest"
            if options.redacted_by
            else f"results {settings.manifest}: its paths are not hashed; leave --redact out"
        )
    return replace(redaction, keep=options.kept_columns or ()) if redaction else None


def _manifest_with_paths(settings: Settings, options: ResultOptions) -> Manifest | None:
    """Open the manifest of a redacted run, whose results do not hold its paths."""
    if not settings.redaction:
        return None
    if not settings.paths_from:
        raise UsageError(f"results {settings.manifest}: its paths are hashed; give --paths-from its manifest")
    manifest = open_manifest(settings.paths_from, path_column=options.path_column, root=settings.root)
    if manifest.sha256 != options.manifest_sha256:
        raise UsageError(f"--paths-from {settings.paths_from}: it is not the manifest of this run")
    if settings.redaction.name(str(manifest.root)) != options.root:
        raise UsageError(
            f"--paths-from {settings.paths_from}: its relative paths started in another folder; "
            "give it with --root"
        )
    return manifest


def add_paths(parts: Iterator[Part], manifest_parts: Iterator[Part]) -> Iterator[Part]:
    """Yield parts of the results with the paths of the same rows of the manifest."""
    for part, source in zip(parts, manifest_parts, strict=True):
        assert part.index == source.index
        first = int(source.row[0])
        yield replace(part, paths=[source.paths[int(row) - first] for row in part.row])
