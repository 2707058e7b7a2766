"""List the images of a folder or archive: `python -m engine.manifest FOLDER -o MANIFEST`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.cli.options import add_options
from engine.cli.parser import Parser
from engine.cli.terminal import run_command
from engine.core.errors import EngineError, UsageError
from engine.core.location import HTTP_SCHEMES, Url
from engine.core.settings import parse_location
from engine.manifest.listing import FileLister, describe_list, write_list
from engine.storage import archive
from engine.storage.errors import ReadError


def option_parser() -> Parser:
    """Build the parser of `python -m engine.manifest`."""
    parser = Parser(
        "python -m engine.manifest",
        "FOLDER [-o MANIFEST] [option ...]",
        description="List the images of a folder or archive, with size and time of change, as a manifest.",
        examples="example: python -m engine.manifest /archive -o manifest.parquet --exclude 'backup/**'",
    )
    parser.add(
        "folder",
        type=parse_location,
        metavar="FOLDER",
        help="a folder; or a .zip or .tar, here or in an object store",
    )
    parser.add(
        *("-o", "--output"),
        type=Path,
        default=Path("manifest.parquet"),
        metavar="MANIFEST",
        help="the list to write (%(default)s)",
    )
    add_options(parser, "include", "exclude")
    parser.add("--overwrite", action="store_true", help="replace MANIFEST")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m engine.manifest FOLDER -o list.parquet`; return the exit status."""

    def run() -> int:
        options = option_parser().parse_args(arguments)
        try:
            print(_write_list_for(options), file=sys.stderr)
        except OSError as error:
            raise EngineError(f"{error.filename or options.output}: {error.strerror or error}") from None
        print(options.output)
        return 0

    return run_command(run)


def _write_list_for(options: argparse.Namespace) -> str:
    """Write the list. Its paths are relative if it is written to the folder itself, else absolute."""
    source, output = options.folder, options.output
    if output.exists() and not options.overwrite:
        raise UsageError(f"{output}: it exists; give --overwrite, or another -o")
    if isinstance(source, Url):
        from engine.storage import remote

        if source.scheme in HTTP_SCHEMES or not source.name:
            raise UsageError(
                f"{source}: it can't be listed; give a local folder, or an archive in an object store"
            )
        with TemporaryDirectory(prefix="engine-") as scratch:
            copy = remote.fetch_manifest(source, Path(scratch))
            return _list_source(copy, f"{source}".removesuffix(source.name), options)
    if not source.is_dir() and not source.is_file():
        raise UsageError(f"{source}: no such folder or archive")
    base = source if source.is_dir() else source.parent
    return _list_source(
        source, "" if output.parent.resolve() == base.resolve() else f"{base.absolute()}/", options
    )


def _list_source(source: Path, prefix: str, options: argparse.Namespace) -> str:
    if not source.is_dir() and not archive.is_archive(source):
        raise UsageError(f"{options.folder}: it is neither a folder nor an archive")
    listing, output = FileLister(options.include, options.exclude), options.output
    entries = listing.folder(source, output) if source.is_dir() else listing.archive(source, output.parent)
    try:
        rows = write_list((entry._replace(path=prefix + entry.path) for entry in entries), listing, output)
    except ReadError as error:
        raise UsageError(f"{options.folder}: {error}") from None
    return describe_list(rows, listing.skipped)


if __name__ == "__main__":
    sys.exit(main())
