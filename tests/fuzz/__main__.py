"""Thousands of damaged images through the real command line; what must hold for every run is checked.

python -m tests.fuzz --count 20000 --seed 1

A quarter of the files is untouched: their rows have to be those of a run over good files alone, whatever
their neighbours are. The rest is mutated. All have to give the same results twice, and once more in reverse
order, bit for bit: a picture that depends on what was decoded before it is another one's picture.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from engine.cli.parser import Parser
from engine.core.errors import UsageError
from engine.core.option import integer
from engine.core.records import Status
from tests.fuzz.mutations import mutate
from tests.fuzz.samples import samples
from tests.fuzz.watched import Row, Run, culprits, screen
from tests.helpers.tolerances import ROUNDING

PICTURES = 3  # base files of each kind
SHOWN = 50  # problems; the JSON has all
STATUSES = frozenset(status.label for status in Status)
IMPOSSIBLE = frozenset(("missing", "unreadable", "skipped"))  # every file is there and can be read
LEFT = re.compile(r"part-\d{5,}\.parquet|_run\.json|_SUCCESS|report\.html|\.lock")


@dataclass(frozen=True)
class File:
    """One row of the manifest: its path there, the good file it was made from, what was done to that."""

    path: str
    base: str
    steps: tuple[str, ...]  # empty for an untouched file
    size: int

    @property
    def format(self) -> str:
        return self.base.split("-")[0]


@dataclass(frozen=True)
class Problem:
    """What must not be, and the file that shows it where one does."""

    text: str
    path: str | None = None


@dataclass
class Outcome:
    """Everything that a fuzzing run found."""

    files: list[File]
    sha256: str  # of all files in order
    reference: dict[str, Row]  # base file -> its row in a run over good files alone
    runs: list[Run]  # over `files`: the same command twice, then in reverse order
    problems: list[Problem]


def fuzz(
    folder: Path,
    *,
    count: int,
    seed: int,
    memory_mb: float,
    timeout_s: float,
    formats: Sequence[str] = (),
) -> Outcome:
    """Make `count` files in `folder`, screen them thrice, check the runs. Equal seeds, equal files.

    `formats` keeps the base files to some formats; all when empty.
    """
    from tests.helpers.bundles import write_bundle  # seconds of imports: after --help

    bundle = write_bundle(folder / "bundle")
    bases = {
        f"{name}.{picture}": data
        for picture in range(PICTURES)
        for name, data in samples(seed * PICTURES + picture).items()
        if not formats or name.split("-")[0] in formats
    }
    (folder / "bases").mkdir()
    for name, data in bases.items():
        (folder / "bases" / name).write_bytes(data)
    clean = screen(folder, "clean", [f"bases/{name}" for name in bases], bundle, timeout_s)
    reference = {row["path"].removeprefix("bases/"): row for row in clean.rows}
    files, sha256 = write_files(folder, bases, count, seed)
    orders = {"first": files, "second": files, "reversed": files[::-1]}
    runs = {
        name: screen(folder, name, [file.path for file in order], bundle, timeout_s)
        for name, order in orders.items()
    }
    problems = [] if "ok" in {row["status"] for row in clean.rows} else [Problem("no good file is ok")]
    for run in (clean, *runs.values()):
        problems += check_run(run, memory_mb=memory_mb)
    for name, run in runs.items():
        problems += [Problem("it ends the run", path) for path in culprits(folder, run, bundle)]
        problems += check_rows(run.rows, orders[name], reference, folder)
    problems += compare(runs["first"].rows, runs["second"].rows, "a second time")
    problems += compare(runs["first"].rows, runs["reversed"].rows, "in reverse order")
    return Outcome(files, sha256, reference, list(runs.values()), list(dict.fromkeys(problems)))


def write_files(folder: Path, bases: dict[str, bytes], count: int, seed: int) -> tuple[list[File], str]:
    """`count` files, every fourth untouched, and the hash of all. File k doesn't depend on `count`."""
    (folder / "files").mkdir()
    names, digest, files = list(bases), hashlib.sha256(), []
    for index in range(count):
        choices = random.Random(f"{seed} {index}")
        base = choices.choice(names)
        data, steps = bases[base], ()
        if index % 4:
            data, steps = mutate(data, choices, bases[choices.choice(names)])
        path = f"files/{index:06}-{base}-{'-'.join(steps) or 'good'}"
        (folder / path).write_bytes(data)
        digest.update(b"%d %d " % (index, len(data)) + data)
        files.append(File(path, base, steps, len(data)))
    return files, digest.hexdigest()


def check_run(run: Run, *, memory_mb: float) -> Iterator[Problem]:
    """What must hold for a run as a whole."""
    if run.exit_status is None:
        yield Problem(f"killed at the time limit, after {run.elapsed_s:.0f} s and {len(run.rows)} rows")
    elif run.exit_status != 0:
        yield Problem(f"exit status {run.exit_status}: {run.complaint}")
    if "_SUCCESS" not in run.left:
        yield Problem("no _SUCCESS")
    if strange := sorted(name for name in run.left if not LEFT.fullmatch(name)):
        yield Problem(f"left in the output folder: {', '.join(strange)}")
    if run.orphans:
        yield Problem(f"{run.orphans} processes outlived the run")
    if run.peak_mb > memory_mb:
        yield Problem(f"{run.peak_mb:.0f} MB at the peak, more than {memory_mb:.0f}")
    if run.restarts:
        yield Problem(f"the decoder crashed {run.restarts} times")


def check_rows(
    rows: Sequence[Row], files: Sequence[File], reference: dict[str, Row], folder: Path
) -> Iterator[Problem]:
    """What must hold for each row: one a file, in order, with scores if and only if it is ok."""
    wanted, result = [file.path for file in files], [row["path"] for row in rows]
    if result != wanted:
        yield Problem(f"{len(rows)} rows for {len(files)} files, or in another order")
    surplus = Counter(result) - Counter(wanted)
    lost = Counter(wanted) - Counter(result)
    yield from (Problem("a row too many", path) for path in surplus)
    yield from (Problem("no row", path) for path in list(lost)[:10])  # all the rest where a run died
    by_path = {file.path: file for file in files}
    for position, row in enumerate(rows):
        if row["row"] != position:
            yield Problem(f"row {position} has the number {row['row']}", row["path"])
        if row["path"] in by_path:
            file = by_path[row["path"]]
            texts = itertools.chain(check_row(row, file, folder), check_untouched(row, file, reference))
            yield from (Problem(text, file.path) for text in texts)


def _possible(file: File) -> set[str]:
    """A changed byte can make a DICOM file one of another modality."""
    return {"skipped"} if file.format == "dicom" else set()


def check_row(row: Row, file: File, folder: Path) -> Iterator[str]:
    status, error, ok = row["status"], row["error"], row["status"] == "ok"
    if (
        status not in STATUSES
        or status in IMPOSSIBLE - _possible(file)
        or (status == "empty") != (file.size == 0)
    ):
        yield f"status {status!r} of a file of {file.size} bytes"
    if status == "crashed":
        yield "a decoder crashed"
    if error and "the header cannot be read" in error:
        yield f"a parser failed: {error}"
    if ok != (error is None):
        yield f"status {status!r} with the error {error!r}"
    if error is not None and not (error.strip() and error.isprintable()):
        yield f"an error that is not one printable line: {error!r}"
    if error is not None and str(folder) in error:
        yield "an error that names the folder"
    scores = [value for name, value in row.items() if _is_score(name)]
    if any((value is None) == ok for value in [*scores, row["prediction"]]):
        yield f"status {status!r} with the scores {scores}"
    elif ok and not all(0 <= value <= 1 for value in scores):
        yield f"scores that are no probabilities: {scores}"


def check_untouched(row: Row, file: File, reference: dict[str, Row]) -> Iterator[str]:
    """A good file's row is that of its base file in a run over good files alone."""
    if file.steps or file.base not in reference:
        return
    for name, expected in reference[file.base].items():
        value = row[name]
        near = _is_score(name) and None not in (value, expected) and abs(value - expected) <= ROUNDING
        if value != expected and not near and name not in ("row", "path"):
            yield f"{name} of a good file is {value!r}, alone {expected!r}"


def _is_score(column: str) -> bool:
    return column == "confidence" or re.search("(^|_)p_", column) is not None


def compare(first: Sequence[Row], second: Sequence[Row], when: str) -> Iterator[Problem]:
    """What both runs have rows for differs in nothing, not even in one bit or in the text of an error."""
    by_path = {row["path"]: row for row in second}
    for one in first:
        two = by_path.get(one["path"], one)
        if changed := [name for name in one if name != "row" and one[name] != two[name]]:
            values = f"{changed[0]} was {one[changed[0]]!r}, is {two[changed[0]]!r}"
            yield Problem(f"it differs {when} in {len(changed)} columns: {values}", one["path"])


def figures(outcome: Outcome, limits: dict[str, float]) -> dict[str, Any]:
    by_path = {file.path: file for file in outcome.files}
    mutated: dict[str, Counter[str]] = {}
    for row in outcome.runs[0].rows:
        file = by_path.get(row["path"])
        if file and file.steps:
            mutated.setdefault(file.format, Counter())[row["status"]] += 1
    return {
        "files": len(outcome.files),
        "untouched": sum(not file.steps for file in outcome.files),
        "sha256": outcome.sha256,
        "base_files_not_ok": {  # the kind; every picture of a kind has the same status, or it shows here
            f"{name.split('.')[0]}: {row['status']}": row["error"]
            for name, row in outcome.reference.items()
            if row["status"] != "ok"
        },
        "by_status": Counter(row["status"] for row in outcome.runs[0].rows),
        "mutated_by_format_and_status": mutated,
        "runs": [run.figures() for run in outcome.runs],
        "limits": limits,
        "problems": [f"{each.path or 'run'}: {each.text}" for each in outcome.problems],
        "passed": not outcome.problems,
    }


def show(console: Console, facts: dict[str, Any]) -> None:
    statuses = [status.label for status in Status if status.label in facts["by_status"]]
    table = Table("mutated files", *statuses, box=None, pad_edge=False)
    for name, counts in sorted(facts["mutated_by_format_and_status"].items()):
        table.add_row(name, *(str(counts[status]) for status in statuses))
    table.add_row("all, with untouched", *(str(facts["by_status"][status]) for status in statuses))
    console.print(table)
    for run in facts["runs"]:
        console.print(
            f"{facts['files']} files, {run['elapsed_s']:.1f} s, {run['files_per_s']:.0f} files/s, "
            f"{run['cpu_s']:.0f} core-s, peak {run['peak_memory_mb']:.0f} MB, "
            f"decoder restarts {run['decoder_restarts']}"
        )
    for text in facts["problems"][:SHOWN]:
        console.print(text, markup=False, soft_wrap=True)
    console.print("passed" if facts["passed"] else f"FAILED: {len(facts['problems'])} problems")


def keep(problems: Iterable[Problem], work: Path, target: Path) -> None:
    """Copy the files that show a problem."""
    target.mkdir(parents=True, exist_ok=True)
    for path in {problem.path for problem in problems} - {None}:
        shutil.copy(work / str(path), target)


def option_parser() -> Parser:
    parser = Parser(
        "python -m tests.fuzz",
        "[option ...]",
        description="Thousands of damaged images through the real command line, each row checked, thrice.",
        examples="example: python -m tests.fuzz --count 20000 --seed 1",
    )
    add = parser.add
    add("--count", type=integer(), default=2000, metavar="N", help="files (%(default)s)")
    add("--seed", type=integer(0), default=1, metavar="S", help="the same seed, the same files (%(default)s)")
    add("--formats", nargs="+", default=(), metavar="NAME", help="such as jpeg png (all)")
    add("--memory", type=float, default=1000, metavar="MB", help="allowed at the peak (%(default)s)")
    add("--timeout", type=float, metavar="S", help="seconds a run (60 and 0.05 for each file)")
    add("--output", type=Path, metavar="FILE", help="JSON of what was found")
    add("--keep", type=Path, metavar="FOLDER", help="for the files that show a problem")
    return parser


def main() -> int:
    try:
        options = option_parser().parse_args()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    before = record.describe_machine()
    limits = {"memory_mb": options.memory, "timeout_s": options.timeout or 60 + 0.05 * options.count}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        outcome = fuzz(Path(work), count=options.count, seed=options.seed, formats=options.formats, **limits)
        if options.keep and outcome.problems:
            keep(outcome.problems, Path(work), options.keep)
    facts = figures(outcome, limits)
    show(Console(width=120), facts)
    if options.output:
        chosen = " --formats " + " ".join(options.formats) if options.formats else ""
        command = f"python -m tests.fuzz --count {options.count} --seed {options.seed}{chosen}"
        record.write_record(options.output, "", {"command": command, **facts}, before=before)
    return 0 if facts["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
