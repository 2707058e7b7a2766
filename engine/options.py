"""The options of `engine.run`, a table from which its parser, doctor, tune and `engine.screen` are made."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.bundle import DECODES
from engine.command import Parser, number, size, whole
from engine.provenance import CPU_BATCH, CPU_PART_ROWS, GPU_BATCH, GPU_PART_ROWS
from engine.runners import PRECISIONS, RUNNERS
from engine.settings import Settings, parse_location, parse_shard

NOTICE = "Research use only; not a medical device. The output is a work list for people, not a diagnosis."
EXAMPLES = """\
examples:
  python -m engine.run manifest.csv -b bundle -o results
  python -m engine.run archive.zip -b bundle -o results --finish-by 06:00"""
MAX_BATCH, MAX_PART_ROWS, MAX_WORKERS = 4096, 1_000_000, 1024
Takes = Literal["value", "values", "nothing", "yes or no"]


@dataclass(frozen=True)
class Option:
    """One of them: `rest` is what argparse wants to know besides."""

    names: tuple[str, ...]
    text: str  # what --help says
    first: bool  # in --help, and not in --help-all alone
    operating: bool  # how a run is operated and not what it is: --only-errors does not take it from the run
    rest: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the value, in Python."""
        return str(self.rest.get("dest", self.names[-1].removeprefix("--").replace("-", "_")))

    @property
    def default(self) -> Any:
        return self.rest.get("default", False if self.takes == "nothing" else None)

    @property
    def takes(self) -> Takes:
        action = self.rest.get("action", "store")
        if action is argparse.BooleanOptionalAction:
            return "yes or no"
        return {"store": "value", "append": "values", "store_true": "nothing"}[action]  # type: ignore[return-value]

    def add_to(self, parser: Parser, *, more: bool, group: Any = None) -> None:
        """`more`: it is in --help-all only."""
        parser.add(*self.names, help=self.text, more=more, group=group, **self.rest)


def _first(name: str, text: str, *, short: str = "", operating: bool = False, **rest: Any) -> Option:
    return Option((short, name) if short else (name,), text, True, operating, rest)


def _more(name: str, text: str, *, operating: bool = False, **rest: Any) -> Option:
    return Option((name,), text, False, operating, rest)


_PLAIN = Settings(manifest=Path())
GROUPS: dict[str, tuple[Option, ...]] = {
    "what is screened": (
        _first(
            "--bundle",
            "model folder (%(default)s)",
            short="-b",
            operating=True,
            type=Path,
            default=_PLAIN.bundle,
            metavar="BUNDLE",
        ),
        _first("--path-column", "manifest column with the paths (path, else the first)", metavar="NAME"),
        _first(
            "--root",
            "where relative paths start (the manifest's own folder)",
            type=parse_location,
            metavar="FOLDER",
        ),
        _more(
            "--include",
            "of a folder or archive: only these files",
            action="append",
            default=[],
            metavar="GLOB",
        ),
        _more(
            "--exclude",
            "of a folder or archive: not these files",
            action="append",
            default=[],
            metavar="GLOB",
        ),
        _first(
            "--since",
            "only what is new or changed since that run (all if the bundle is)",
            type=parse_location,
            metavar="RESULTS",
        ),
        _first(
            "--only-errors",
            "MANIFEST is a results folder: try its failed rows again",
            operating=True,
            action="store_true",
        ),
    ),
    "where the results go": (
        _first(
            "--output",
            "folder, or s3://, gs://, az:// (%(default)s)",
            short="-o",
            type=parse_location,
            default=_PLAIN.output,
            metavar="RESULTS",
        ),
        _first("--overwrite", "delete the run that RESULTS holds and start again", action="store_true"),
        _more(
            "--part-rows",
            f"rows a part, the unit of resume ({CPU_PART_ROWS} on a CPU, {GPU_PART_ROWS} on a GPU)",
            type=whole(1, MAX_PART_ROWS),
            metavar="N",
        ),
        _more(
            "--column-prefix",
            "put before the names of manifest columns",
            default=_PLAIN.column_prefix,
            metavar="TEXT",
        ),
        _more("--include-uids", "DICOM's study, series and SOP UIDs as columns", action="store_true"),
    ),
    "how fast": (
        _first(
            "--device",
            "auto, cpu, cuda:N, or cuda:all: a process for each GPU (%(default)s)",
            default=_PLAIN.device,
        ),
        _more(
            "--shard",
            "every Nth part; other processes do the others, into RESULTS too",
            type=parse_shard,
            metavar="K/N",
        ),
        _more("--runner", f"auto, {', '.join(RUNNERS)} (%(default)s)", default=_PLAIN.runner),
        _more(
            "--precision",
            "of the members (fp16 on a GPU, fp32 on a CPU; int8: on a CPU, by build_engines)",
            choices=PRECISIONS,
        ),
        _more(
            "--workers",
            "CPU threads (as tuned; else all that this process may use)",
            operating=True,
            type=whole(1, MAX_WORKERS),
            metavar="N",
        ),
        _first(
            "--memory",
            f"for images in flight ({_PLAIN.limits.memory >> 30}GiB)",
            operating=True,
            type=size,
            default=_PLAIN.limits.memory,
            metavar="SIZE",
        ),
        _more(
            "--batch-size",
            f"images a batch (as tuned; else {CPU_BATCH} on a CPU, {GPU_BATCH} or the plan's on a GPU)",
            type=whole(1, MAX_BATCH),
            metavar="N",
        ),
        _more(
            "--slots",
            "batches on the GPU (%(default)s)",
            operating=True,
            type=whole(1, 16),
            default=_PLAIN.slots,
            metavar="N",
        ),
        _more(
            "--streams",
            "1: members in turn, 2: at once (the faster)",
            operating=True,
            type=whole(1, 2),
            metavar="N",
        ),
        _more(
            "--cuda-graph",
            "replay each batch's step as one graph",
            operating=True,
            action=argparse.BooleanOptionalAction,
            default=_PLAIN.cuda_graph,
        ),
        _more(
            "--serial",
            "one stage after the other; for checks, the results are the same",
            operating=True,
            action="store_true",
        ),
    ),
    "on several actors": (
        _more(
            "--ray",
            "actors on Ray do it: one started here, or the cluster at HOST:PORT or auto",
            operating=True,
            nargs="?",
            const="local",
            metavar="ADDRESS",
        ),
        _more(
            "--actors",
            "with --ray: on CPUs (none beside GPUs, else as many as fit)",
            operating=True,
            type=whole(1, MAX_WORKERS),
            metavar="N",
        ),
        _more(
            "--part-timeout",
            "with --ray: seconds without a finished batch after which an actor is replaced (%(default)g)",
            operating=True,
            dest="part_timeout_s",
            type=number(0.1, 86_400),
            default=_PLAIN.part_timeout_s,
            metavar="S",
        ),
    ),
    "how strict": (
        _first(
            "--finish-by",
            "stop at a clean point in time for 06:00, or an ISO date and time",
            operating=True,
            metavar="TIME",
        ),
        _first(
            "--max-error-rate",
            "share of failed rows that still counts as success (%(default)g)",
            operating=True,
            type=number(0, 1),
            default=_PLAIN.max_error_rate,
            metavar="F",
        ),
        _more(
            "--read-timeout",
            "seconds that reading one file may take (%(default)g)",
            operating=True,
            dest="read_timeout_s",
            type=number(0.1, 86_400),
            default=_PLAIN.read_timeout_s,
            metavar="S",
        ),
        _more(
            "--max-pixels",
            "of an image (%(default)s)",
            type=whole(),
            default=_PLAIN.limits.max_pixels,
            metavar="N",
        ),
        _more(
            "--max-file-size",
            f"of an image ({_PLAIN.limits.max_file_size >> 20}MiB)",
            type=size,
            default=_PLAIN.limits.max_file_size,
            metavar="SIZE",
        ),
        _more(
            "--decode", "of JPEG, as the bundle was trained (its own); another is refused", choices=DECODES
        ),
        _more(
            "--decoder",
            "cpu: each image decoded strictly there, for a GPU too (%(default)s)",
            choices=("auto", "cpu"),
            default=_PLAIN.decoder,
        ),
    ),
    "privacy": (
        _first(
            "--redact",
            "a keyed hash in place of each path, no other manifest columns",
            operating=True,
            action="store_true",
        ),
        _more(
            "--salt-file", "key of --redact's hashes (ENGINE_SALT)", operating=True, type=Path, metavar="FILE"
        ),
        _more(
            "--keep",
            "with --redact: a manifest column that stays",
            action="append",
            default=[],
            metavar="COLUMN",
        ),
        _more(
            "--paths-from",
            "with --only-errors: manifest of a run with --redact, whose results name no path",
            operating=True,
            type=parse_location,
            metavar="MANIFEST",
        ),
    ),
    "watching": (
        _first(
            "--dry-run",
            "only say what the run would do, as python -m engine.doctor",
            operating=True,
            action="store_true",
        ),
        _more(
            "--metrics-file",
            "Prometheus text, written anew every few seconds",
            operating=True,
            type=Path,
            metavar="FILE",
        ),
        _more("--log-json", "one JSON object a line on stderr", operating=True, action="store_true"),
    ),
}
OPTIONS = {option.name: option for group in GROUPS.values() for option in group}


def option_parser(
    prog: str = "python -m engine.run",
    description: str = "Screen a list of bone radiographs: one row of class probabilities per image.",
    examples: str = EXAMPLES,
    *,
    needs_manifest: bool = True,
) -> Parser:
    manifest = "MANIFEST" if needs_manifest else "[MANIFEST]"
    parser = Parser(
        prog,
        f"{manifest} [-b BUNDLE] [-o RESULTS] [option ...]",
        description=description,
        examples=f"{examples}\n\n{NOTICE}",
        help_all=True,
    )
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        if title == "what is screened":
            parser.add(
                "manifest",
                group=group,
                help="CSV, Parquet, text list, folder, zip or tar",
                type=parse_location,
                nargs=None if needs_manifest else "?",
                metavar="MANIFEST",
            )
        for option in options:
            option.add_to(parser, more=not option.first, group=group)
    return parser
