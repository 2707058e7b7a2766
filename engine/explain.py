"""`python -m engine.explain RESULTS --top 50`: pictures of what moved the scores of some rows of a run.

What the maps are, and why these: engine/saliency.py. The rows' images are read, decoded and resized again as
in the run; a row whose probabilities come out otherwise than they are in the results is not explained.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from engine import bundle
from engine.bundle import Bundle
from engine.cli.terminal import hush_libraries, run_command
from engine.command import Parser
from engine.core.json_records import to_json
from engine.core.option import whole
from engine.errors import EngineError, UsageError
from engine.installed import install_command
from engine.job import Say
from engine.log import Log
from engine.manifest import Manifest
from engine.overlap import Meter, prefetch
from engine.pipeline import READ_THREADS
from engine.preprocess.stage import Preprocess
from engine.provenance import RunRecord
from engine.reader import Reader
from engine.records import Batch, Part, Status
from engine.retry import all_parts, as_in_run, same_bundle, with_paths
from engine.run import places
from engine.run_folder import (
    EXPLANATIONS,
    INDEX,
    RUN,
    ExplainedRow,
    ExplanationIndex,
    ReferenceImages,
    RunFolder,
    clear_explanations,
    recorded_bundle,
)
from engine.settings import MAX_WORKERS, Settings, available_cpus, parse_location
from engine.sink import Done, part_name, rows_again
from engine.stats.top_k import TopK
from engine.storage.location import Place, parse
from engine.store import LOCK, open_folder, reason

if TYPE_CHECKING:
    from engine.saliency import Explainer, Explanation, Seen

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

TOP = 50
MAX_ROWS = 10_000
BATCH = 8
REFERENCES = 16  # rows that stand for what is typical
FEW = 4  # with fewer, the bundle's canaries do
ENSEMBLE = "ensemble"
NEEDED = ("captum", "matplotlib", "PIL", "safetensors", "torch", "torchvision")
# How far a probability may be from the results': here the members run in torch, in float32, on pixels of the
# CPU's decoder. In INT8 the run itself may be as far from float32 as a small change of an image is.
TOLERANCE = {"fp32": 2e-3, "fp16": 0.02, "int8": 0.15}
TOLERANCE_GPU = 0.02  # DALI's pixels are within 2 gray levels, on average, of the CPU's
_OWN = re.compile(rf"row-\d+-\w+\.png|{re.escape(INDEX)}|{re.escape(LOCK)}|\..*\.tmp")
_NO_POINTS = "; only runs with operating points abstain"
_OF_REDACTED = ("salt_file", "paths_from", "root")
FOOT = (
    "Orange raised the probability, blue lowered it, compared with typical images. "
    "This is what moved the score, not where disease is. Research use only."
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which rows are explained, and the probability of which class."""

    top: int = 0  # so many with the highest probability
    rows: Sequence[int] = ()
    abstained: bool = False
    of_class: str | None = None  # None: the one that the run's rows are ranked by


@dataclass(frozen=True)
class Outcome:
    output: Place
    explained: int
    asked: int


def explain(
    settings: Settings,
    asked: Asked,
    *,
    output: Place | None = None,
    say: Say = lambda _: None,
    watch: Callable[[int, int], None] = lambda done, rows: None,
) -> Outcome:
    """Write PNGs and `index.json` for rows of the finished run in the folder `settings.manifest`.

    They go to its folder `explanations`, or to `output`, and replace those of an earlier call. Of `settings`
    only bundle, device ("cpu", "cuda:N"), workers, and what a redacted run needs matter. `say` gets a line
    for each row that can't be explained, `watch` the rows done and those there are. Raises UsageError for
    results, rows, class, bundle or output that won't do; EngineError when storage fails, or when no row could
    be explained: then nothing is written.
    """
    open_explainer = _explainers(settings)
    run = _Run.of(settings, asked.of_class)
    rows, typical = run.choose(asked, say)
    place = output or settings.manifest / EXPLANATIONS
    explainer = open_explainer(run.models)
    with ExitStack() as stack:
        folder = stack.enter_context(_Pictures(place, run))
        images = stack.enter_context(_Images(run, explainer))
        references, about = _references(run, images, typical)
        explainer.refer_to(references)
        for numbers, pixels, seen in images.seen(rows, say):
            explanations = explainer.explain(seen, run.index)
            for row, gray, explanation in zip(map(int, numbers), pixels[:, 0], explanations, strict=True):
                folder.add(row, gray, explanation, about)
            watch(folder.rows, len(rows))
        folder.finish(rows, about)
        return Outcome(place, folder.rows, len(rows))


def _explainers(settings: Settings) -> Callable[[Bundle], Explainer]:
    """What opens the members. Raises UsageError for a package or device that is not here."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UsageError(
            f"explanations need {', '.join(missing)}; install with: {install_command('explain')}"
        )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see training/__init__.py
    import torch

    from engine.saliency import Explainer

    device = settings.device
    if not re.fullmatch(r"cpu|cuda:[0-9]{1,3}", device):
        raise UsageError(f"--device {device}: allowed: cpu, cuda:N")
    if device != "cpu" and int(device[5:]) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here; allowed: cpu")
    torch.set_num_threads(settings.workers or available_cpus())
    return partial(Explainer.of, device=device)


@dataclass(frozen=True)
class _Run:
    """A finished run whose bundle is here, and the class that is asked about."""

    settings: Settings  # with the run's limits
    folder: RunFolder
    record: RunRecord
    models: Bundle
    parts: dict[int, Done]
    manifest: Manifest | None  # of a redacted run
    root: Place
    index: int  # of the class

    @classmethod
    def of(cls, settings: Settings, of_class: str | None) -> Self:
        place = settings.manifest
        folder = RunFolder.existing(place)
        run = folder.run()
        options = run.result_options
        models = same_bundle(settings, folder, run)
        parts = all_parts(folder, run)
        settings, manifest = as_in_run(settings, options)
        root = manifest.root if manifest else parse(options.root)
        if options.precision not in TOLERANCE:
            raise UsageError(
                f"results {place}: {RUN} names the precision {options.precision!r}; allowed: "
                f"{', '.join(TOLERANCE)}"
            )
        if ENSEMBLE in (member.name for member in models.members):
            raise UsageError(
                f"bundle {models.path}: a member named {ENSEMBLE!r} can't be told from the whole"
            )
        wanted = of_class or run.target or models.classes[-1]
        if wanted not in models.classes:
            raise UsageError(f"--class {wanted}: allowed: {', '.join(models.classes)}")
        return cls(settings, folder, run, models, parts, manifest, root, models.classes.index(wanted))

    @property
    def name(self) -> str:
        """Of the class."""
        return self.models.classes[self.index]

    @property
    def part_rows(self) -> int:
        return self.record.result_options.part_rows

    @property
    def tolerance(self) -> float:
        options = self.record.result_options
        gpu = TOLERANCE_GPU if options.device != "cpu" else 0.0
        return max(TOLERANCE[options.precision], gpu)

    @property
    def scores(self) -> list[str]:
        """Columns of the members' probabilities, member by member."""
        return [f"{member.name}_p_{name}" for member in self.models.members for name in self.models.classes]

    def choose(self, asked: Asked, say: Say) -> tuple[list[int], list[int]]:
        """The rows to be explained, in the order asked for, and those that stand for what is typical."""
        best, abstained, named = TopK(asked.top), list[int](), dict[int, str]()
        spread = _Spread(sum(part.by_status.get("ok", 0) for part in self.parts.values()))
        probability = f"p_{self.name}"
        for index in sorted(self.parts):
            columns = ["row", "status", probability, *(["abstain"] if asked.abstained else [])]
            table = self._read(index, columns)
            row, status = table.column("row").to_numpy(), table.column("status").to_numpy()
            ok = status == Status.OK.label
            spread.see(row[ok])
            best.add(pa.table({"row": row[ok]}), table.column(probability).to_numpy()[ok])
            if asked.abstained:
                chose = np.array([value is True for value in table.column("abstain").to_pylist()], bool)
                abstained += row[ok & chose].tolist()
            if len(abstained) > MAX_ROWS:
                raise UsageError(f"the run abstained on more than {MAX_ROWS} rows; give --rows")
            for one in (one for one in asked.rows if len(row) and row[0] <= one <= row[-1]):
                named[one] = str(status[one - row[0]])
        for one in asked.rows:
            if one not in named:
                say(f"row {one}: there is none; the run has rows 0 to {self.record.rows - 1}")
            elif named[one] != Status.OK.label:
                say(f"row {one}: {named[one]}, it has no score to be explained")
        fine = [one for one in asked.rows if named.get(one) == Status.OK.label]
        rows = list(dict.fromkeys([*fine, *(one["row"] for one in best.rows()), *abstained]))
        if not rows:
            hint = _NO_POINTS if asked.abstained and not self.record.operating_points else ""
            raise UsageError(f"results {self.folder.path}: none of its rows with a score was asked for{hint}")
        if len(rows) > MAX_ROWS:
            raise UsageError(f"{len(rows)} rows; allowed: up to {MAX_ROWS} at once")
        return rows, spread.rows

    def _read(self, index: int, columns: list[str]) -> pa.Table:
        """Columns of a part. Raises UsageError where they are not there."""
        self._check(index, columns)
        return self.folder.files.read(part_name(index), partial(pq.read_table, columns=columns))

    def _check(self, index: int, columns: list[str]) -> None:
        known = self.folder.files.read(part_name(index), pq.read_schema).names
        if missing := [column for column in columns if column not in known]:
            hint = _NO_POINTS if missing[0] == "abstain" else ""
            raise UsageError(f"results {self.folder.path}: no column {missing[0]!r}{hint}")

    def parts_of(self, rows: Iterable[int]) -> Iterator[Part]:
        """Some rows, with their paths and the members' probabilities."""
        wanted = {
            index: pc.is_in(pc.field("row"), pa.array(list(group), pa.int64()))
            for index, group in groupby(sorted(rows), lambda row: row // self.part_rows)
        }
        columns = [*self.scores, "width", "height"]
        for index in wanted:
            self._check(index, columns)
        parts = rows_again(self.folder.files, wanted, columns)
        if self.manifest:
            return with_paths(parts, self.manifest.parts(self.part_rows, wanted))
        return parts


class _Spread:
    """Some rows of all, evenly spread; none where there are few."""

    def __init__(self, total: int) -> None:
        count = min(total, REFERENCES) if total >= FEW else 0
        self._places = np.rint(np.linspace(0, total - 1, count)).astype(np.int64)
        self._before = 0
        self.rows: list[int] = []

    def see(self, rows: Rows) -> None:
        places = self._places - self._before
        self.rows += rows[places[(places >= 0) & (places < len(rows))]].tolist()
        self._before += len(rows)


class _Images:
    """The images of rows, once more: read and decoded as in the run, and seen by the members."""

    def __init__(self, run: _Run, explainer: Explainer) -> None:
        self._run, self.explainer = run, explainer
        settings = run.settings
        self._preprocess = Preprocess(
            size=run.models.size,
            batch_size=BATCH,
            threads=settings.workers or available_cpus(),
            decoding_bytes=settings.limits.decoding_bytes,
            decode=run.models.decode,
        )
        self._reader = Reader(
            run.root,
            batch_size=BATCH,
            threads=READ_THREADS,
            limits=settings.limits,
            timeout_s=settings.read_timeout_s,
        )

    def __enter__(self) -> Self:
        self._preprocess.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._preprocess.close()

    def seen(self, rows: Sequence[int], say: Say) -> Iterator[tuple[Rows, Pixels, Seen]]:
        """Numbers [n], pixels [n, 1, H, W] and feature maps of rows whose images are as they were.

        `say` gets a line for each of the others.
        """
        meter = Meter("explain")
        batches = self._reader.stage(self._run.parts_of(rows), meter)
        with closing(prefetch(self._preprocess.stage(batches, meter), 2)) as decoded:  # type: ignore[type-var]
            for batch in decoded:
                assert batch.pixels is not None
                numbers = batch.part.row[batch.start : batch.start + batch.rows]
                for position, error in sorted(batch.errors.items()):
                    status = Status(batch.status[position]).label
                    say(f"row {numbers[position]}: its image is not as it was: {status}, {error}")
                if not len(batch.index):
                    continue
                seen = self.explainer.see(batch.pixels)
                same = self._same(batch, numbers, seen, say)
                if same.any():
                    yield numbers[batch.index[same]], batch.pixels[same], seen.only(same)

    def _same(self, batch: Batch, numbers: Rows, seen: Seen, say: Say) -> npt.NDArray[np.bool_]:
        """Which images of a batch have the size and the probabilities that the results give them."""
        stored = batch.part.columns.take(batch.start + batch.index)
        models = self._run.models
        shape = (len(models.members), len(models.classes), len(batch.index))
        wanted = np.reshape([stored.column(name).to_numpy() for name in self._run.scores], shape)
        found, _ = self.explainer.probabilities(seen)  # [M, k, C]
        far = np.abs(found.transpose(0, 2, 1) - wanted).max(axis=(0, 1))
        sizes = [stored.column(name).to_numpy() for name in ("width", "height")]
        resized = (sizes[0] != batch.width[batch.index]) | (sizes[1] != batch.height[batch.index])
        same = (far <= self._run.tolerance) & ~resized
        for place in np.flatnonzero(~same):
            how = "its size is another" if resized[place] else f"a probability is {far[place]:.2g} off"
            say(f"row {numbers[batch.index[place]]}: its image has changed since the run ({how})")
        return np.asarray(same)


def _references(run: _Run, images: _Images, rows: Sequence[int]) -> tuple[Seen, ReferenceImages]:
    """What is typical: rows of the run, else the bundle's canaries."""
    from engine.saliency import Seen

    found = list(images.seen(rows, lambda _: None)) if rows else []
    numbers = sorted(int(row) for some, _, _ in found for row in some)
    if len(numbers) >= FEW:
        return Seen.joined([seen for _, _, seen in found]), ReferenceImages(rows=tuple(numbers))
    pixels, _ = bundle.load_canaries(run.models)
    some = [pixels[start : start + BATCH] for start in range(0, min(REFERENCES, len(pixels)), BATCH)]
    return Seen.joined(list(map(images.explainer.see, some))), ReferenceImages(canaries=sum(map(len, some)))


class _Pictures:
    """The folder that explanations go to. What an earlier call left goes when the first picture comes."""

    def __init__(self, place: Place, run: _Run) -> None:
        self._place, self._run = place, run
        self._folder = open_folder(place)
        self._found: dict[int, ExplainedRow] = {}

    def __enter__(self) -> Self:
        place = self._place
        try:
            if isinstance(place, Path) and (place.is_symlink() or (place.exists() and not place.is_dir())):
                raise UsageError(f"output {place}: it is no folder; give another -o")
            if foreign := [name for name in self._folder.names() if not _OWN.fullmatch(name)]:
                raise UsageError(f"output {place}: it holds something else ({foreign[0]!r}); give another -o")
            self._folder.lock()
        except BlockingIOError:
            raise UsageError(f"output {place}: another process is writing there; wait for it") from None
        except OSError as error:
            raise UsageError(f"output {place}: {reason(error)}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.unlock(leave_no_trace=True)

    @property
    def rows(self) -> int:
        return len(self._found)

    def add(self, row: int, gray: Pixels, explanation: Explanation, about: ReferenceImages) -> None:
        """A picture of each member's share and of all together, in colours of one scale."""
        from engine.overlay import Caption, draw

        if not self._found:
            clear_explanations(self._folder)
        whole = explanation.maps.sum(axis=0)
        maps = {ENSEMBLE: whole}
        maps |= {one.name: each for one, each in zip(self._run.models.members, explanation.maps, strict=True)}
        limit = max(float(np.abs(one).max()) for one in maps.values()) or 1.0
        texts = self._texts(explanation, about)
        heading = f"row {row}: {self._run.name} {_percent(explanation.probability)}"
        unit = "points of probability per 1 % of the picture"
        for voter, one in maps.items():
            caption = Caption(heading, texts[voter], unit, FOOT)
            write = partial(draw, gray=gray, change=one, limit=limit, caption=caption)
            self._write(_picture(row, voter), write)
        self._found[row] = ExplainedRow(
            row=row,
            of_class=self._run.name,
            voters={voter: _picture(row, voter) for voter in maps},
            probability=explanation.probability,
            typical=explanation.typical,
            shares=dict(zip(list(maps)[1:], explanation.shares, strict=True)),
            scale=limit,
        )

    def _texts(self, explanation: Explanation, about: ReferenceImages) -> dict[str, str]:
        """What stands over the picture of each voter."""
        change = 100 * (explanation.probability - explanation.typical)
        others = f"{len(about.rows)} rows of the run" if about.rows else "the bundle's canaries"
        typical = f"{_percent(explanation.typical)}, the mean of {others}"
        texts = {ENSEMBLE: f"ensemble: {change:+.1f} points beside {typical}"}
        for member, own, share in zip(
            self._run.models.members, explanation.own, explanation.shares, strict=True
        ):
            texts[member.name] = (
                f"{member.name}, weight {member.weight:g}, by itself {_percent(own)}: "
                f"{100 * share:+.1f} of the ensemble's {change:+.1f} points"
            )
        return texts

    def finish(self, rows: Sequence[int], about: ReferenceImages) -> None:
        """Write the index, in the order of `rows`."""
        from engine.saliency import METHOD

        if not self._found:
            raise EngineError(f"none of the {len(rows)} rows could be explained; nothing was written")
        index = ExplanationIndex(
            run_id=self._run.record.run_id,
            method=METHOD,
            of_class=self._run.name,
            compared_with=about,
            rows=tuple(self._found[row] for row in rows if row in self._found),
        )
        self._write(INDEX, lambda temporary: temporary.write_text(to_json(index)))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            self._folder.write(name, write)
        except OSError as error:
            raise EngineError(
                f"{self._place / name}: {reason(error)}; the same command starts again"
            ) from None


def _percent(probability: float) -> str:
    """Never 0 % or 100 %, which nothing is."""
    if 0.001 <= probability <= 0.999:
        return f"{probability:.1%}"
    return "less than 0.1%" if probability < 0.5 else "more than 99.9%"


def _picture(row: int, voter: str) -> str:
    return f"row-{row:09d}-{voter}.png"


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.explain",
        "RESULTS [options]",
        description="Pictures of what moved the scores of some rows of a finished run.",
        examples="example: python -m engine.explain results --top 50",
    )
    add = parser.add
    add("manifest", type=parse_location, metavar="RESULTS", help="folder of a run, s3://, gs:// or az://")
    add(
        "--top",
        type=whole(1, MAX_ROWS),
        metavar="N",
        help=f"rows of the highest probability ({TOP})",
    )
    add("--rows", type=_ranges, default=[], metavar="ROWS", help="these, such as 3,17,40-45")
    add("--abstained", action="store_true", help="rows on which the run abstained")
    add(
        "--class", dest="of_class", metavar="NAME", help="whose probability (the run's target, else the last)"
    )
    add("-o", "--output", type=parse_location, help=f"folder for the pictures (RESULTS/{EXPLANATIONS})")
    add("-b", "--bundle", type=Path, help="where the run's bundle is now (where it was)")
    add("--device", default="cpu", help="cpu or cuda:N (%(default)s)")
    add(
        "--workers",
        type=whole(1, MAX_WORKERS),
        metavar="N",
        help="CPU threads (all that this process may use)",
    )
    add("--redact", action="store_true", help="of a run with --redact: no line names a path")
    add("--salt-file", type=Path, metavar="FILE", help="key of that run's hashes (ENGINE_SALT)")
    add("--paths-from", type=parse_location, metavar="MANIFEST", help="the manifest of that run")
    add("--root", type=parse_location, help="folder of that manifest's relative paths (its own)")
    return parser


def _ranges(text: str) -> list[int]:
    """'3,17,40-45' as row numbers, each once."""
    rows: dict[int, None] = {}
    for word in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first:
            raise argparse.ArgumentTypeError(f"{word!r} is no row; allowed: such as 3,17,40-45")
        if last - first + len(rows) >= MAX_ROWS:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is more than {MAX_ROWS} rows")
        rows |= dict.fromkeys(range(first, last + 1))
    return list(rows)


def _settings(given: dict[str, Any]) -> tuple[Settings, Asked]:
    rows, abstained, top = given["rows"], given["abstained"], given["top"]
    if top is None and not rows and not abstained:
        top = TOP
    if not given["redact"] and (option := next((one for one in _OF_REDACTED if given[one]), None)):
        raise UsageError(f"--{option.replace('_', '-')} is of use with --redact only")
    settings = Settings(
        manifest=given["manifest"],
        bundle=given["bundle"] or recorded_bundle(given["manifest"]),
        device=given["device"],
        workers=given["workers"],
        root=given["root"],
        paths_from=given["paths_from"],
        redact=given["redact"],
        salt_file=given["salt_file"],
    )
    return settings, Asked(top=top or 0, rows=rows, abstained=abstained, of_class=given["of_class"])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    hush_libraries()
    log = Log(redact="--redact" in arguments)
    console = Console(file=cast(TextIO, log), emoji=False)
    say: Say = partial(console.print, markup=False, highlight=False, soft_wrap=True)

    def work() -> int:
        given = vars(option_parser().parse_args(arguments))
        settings, asked = _settings(given)
        log.known = places(settings)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("explain", total=None)
            done = explain(
                settings,
                asked,
                output=given["output"],
                say=say,
                watch=lambda done, rows: bar.update(task, completed=done, total=rows),
            )
        say(f"{done.explained} of {done.asked} rows explained; research use only")
        if not given["output"] and not given["redact"]:
            say(f"on the page, too: python -m engine.report {given['manifest']}")
        print(done.output)
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
