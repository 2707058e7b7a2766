"""`python -m engine.calibrate BUNDLE --on LABELLED`: temperature and operating points, kept in the bundle."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from engine import bundle, distance, tuned
from engine.bundle import Bundle
from engine.calibration import Asked, Sample, calibrate, check_counts, folds
from engine.canaries import Step
from engine.cli.terminal import hush_libraries, run_command, stop_on_signal
from engine.command import Parser
from engine.core.deadline import Deadline
from engine.core.option import number
from engine.errors import Stopped, UsageError
from engine.intervals import Share
from engine.job import Say, Watch, check_paths, choice_of, manifest_of
from engine.labels import Names
from engine.listing import PATH
from engine.operating_points import DOUBTFUL, Abstention, DistanceLimits, LabelledData, OperatingPoints
from engine.options import add_options
from engine.overlap import Meter
from engine.pipeline import Opening, Stages, screen
from engine.progress import Display
from engine.provenance import RunRecord
from engine.records import FLAGS, Batch, Status
from engine.results import MERGED, Results, opened
from engine.run_folder import RUN
from engine.settings import Settings, available_cpus, parse_location
from engine.storage import Url
from engine.storage.location import HTTP_SCHEMES, Place
from engine.store import open_folder

Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

OOD_IMAGES, OOD_BYTES, LEAST_OOD = 2000, 256 << 20, 50  # whose features are looked at, at most and at least
LABEL, PATIENT = "label", "patient"
_AS_IN_RUN = ("path_column", "root", "device", "runner", "precision", "batch_size", "workers", "memory")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None: `label`, else the folders' names, and `patient` where there is one."""

    label: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Found:
    """What to change in a bundle."""

    models: Bundle  # as it is
    points: OperatingPoints
    distances: dict[str, bytes] | None  # by member, as `bundle.revise` takes them


def measure(
    settings: Settings,
    columns: Columns,
    asked: Asked,
    *,
    ood: bool = False,
    watch: Watch = lambda _: None,
    say: Say = lambda _: None,
    deadline: Deadline | None = None,
) -> Found:
    """Calibrate the bundle that `settings` name.

    `settings.manifest` lists labelled images, which are screened for this, or is a results folder of the very
    bundle. With `ood` what is out of distribution is found too, which takes the images, and the CPU.
    Nothing is written. Raises UsageError for labels that are none of the bundle's classes, scores that are no
    numbers, and too few images; Stopped.
    """
    models = bundle.load(settings.bundle)
    if asked.target not in models.classes:
        raise UsageError(f"--target {asked.target}: allowed: {', '.join(models.classes)}")
    kept: dict[int, Pixels] = {}
    if _is_results(settings.manifest):
        if ood:
            raise UsageError(
                f"--ood needs the images themselves, and {settings.manifest} holds their results"
            )
        sample, rows, data = _read(opened(settings.manifest, unfinished=False), models, columns, say)
    else:
        check_paths(settings)
        with TemporaryDirectory(prefix="engine-") as scratch:
            labelled = _look_through(settings, models, columns, asked, Path(scratch, "listing.parquet"))
            wanted = _some(labelled, models, settings, asked) if ood else frozenset()
            output = Path(scratch, "results")
            try:
                screen(
                    replace(settings, output=output),
                    watch=watch,
                    say=say,
                    deadline=deadline,
                    stages_of=partial(_Keeping, wanted=wanted, kept=kept),
                )
            except Stopped:
                raise Stopped(
                    "stopped, and nothing was written; what takes long is better screened by engine.run "
                    "first, which goes on where it was stopped: --on RESULTS"
                ) from None
            sample, rows, data = _read(opened(output, unfinished=False), models, columns, say)
    limits = nodes = None
    if ood:
        here = np.isin(rows, list(kept))
        if here.sum() < LEAST_OOD:
            raise UsageError(
                f"--ood: {here.sum()} images could be looked at; at least {LEAST_OOD} are needed"
            )
        pixels = np.stack([kept[row] for row in rows[here].tolist()])
        limits, nodes = _distances(models, pixels, sample.groups[here], asked)
    return Found(models, calibrate(sample, models.classes, models.weights, asked, data, limits), nodes)


def _some(labelled: Labels, models: Bundle, settings: Settings, asked: Asked) -> frozenset[int]:
    """Rows, drawn at random, whose pixels are kept for what takes more than scores."""
    if not choice_of(settings, models).gives_distances:
        raise UsageError("--ood is worked out by the float32 graphs on the CPU: add --device cpu")
    distance.check_installed()
    most = max(1, min(OOD_IMAGES, OOD_BYTES // (models.size[0] * models.size[1])))
    return frozenset(np.random.default_rng(asked.seed).permutation(labelled)[:most].tolist())


class _Keeping(Stages):
    """The stages of a run, with a copy of the pixels [1, H, W] of some rows."""

    def __init__(self, opening: Opening, *, wanted: frozenset[int], kept: dict[int, Pixels]) -> None:
        super().__init__(opening)
        self._wanted, self._kept = wanted, kept

    def open(self, stack: ExitStack) -> None:
        super().open(stack)
        self.step = _Copying(self.step, self._wanted, self._kept)


@dataclass
class _Copying:
    step: Step
    wanted: frozenset[int]
    kept: dict[int, Pixels]

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch]:
        return self.step.stage(self._copied(batches), meter)

    def _copied(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.wanted and batch.pixels is not None:
                rows = batch.part.row[batch.start + batch.index].tolist()
                for row, pixels in zip(rows, batch.pixels, strict=True):
                    if row in self.wanted:
                        self.kept[row] = pixels.copy()
            yield batch

    def close(self) -> None:
        self.step.close()


def _distances(
    models: Bundle, pixels: Pixels, groups: Labels, asked: Asked
) -> tuple[DistanceLimits, dict[str, bytes]]:
    """The limits that the share `asked.quantile` of images [N, 1, H, W] keeps, and each member's nodes.

    An image is judged by what was fitted to the images of other folds, and by the member for which it is the
    oddest: the share holds for all members together.
    """
    held = list(folds(np.zeros(len(groups), np.bool_), groups, asked.seed))
    odd, nodes = [], {}
    for member in models.members:
        graph = member.files["onnx"].path.read_bytes()
        features = distance.features_of(graph, pixels, threads=available_cpus())
        odd.append(distance.held_out(features, held))
        nodes[member.name] = distance.nodes_of(graph, distance.fit(features))
    usual = np.quantile(odd, asked.quantile, axis=1)
    oddest = float(np.quantile((np.stack(odd) / usual[:, None]).max(axis=0), asked.quantile))
    above = {member.name: float(limit) for member, limit in zip(models.members, usual * oddest, strict=True)}
    return DistanceLimits(quantile=asked.quantile, images=len(pixels), above=above), nodes


def _look_through(
    settings: Settings, models: Bundle, columns: Columns, asked: Asked, listing: Path
) -> Labels:
    """Numbers of the rows with a label. What is wrong with labels is said before hours of screening."""
    manifest = manifest_of(settings, listing, since=False)
    label, group = _columns(manifest.columns.names, "", columns)
    tables = [
        pa.table(
            {"row": part.row, PATH: pa.array(part.paths, pa.string())}
            | {name: part.columns.column(name) for name in dict.fromkeys(filter(None, (label, group)))}
        )
        for part in manifest.parts(65_536)
    ]
    table = pa.concat_tables(tables, promote_options="permissive")
    labels = _labels(table, label, models, lambda _: None)
    groups = _groups(table.column(group)) if group else np.arange(len(labels))
    there = labels >= 0
    check_counts(labels[there] == models.classes.index(asked.target), groups[there], asked)
    return np.flatnonzero(there)


def _is_results(place: Place) -> bool:
    if isinstance(place, Url) and place.scheme in HTTP_SCHEMES:
        return False
    folder = open_folder(place)
    return folder.exists(RUN) or folder.exists(MERGED)


def _read(
    results: Results, models: Bundle, columns: Columns, say: Say
) -> tuple[Sample, Labels, LabelledData]:
    """What was scored and has a label, the numbers of these rows, and `data` of the operating points."""
    if not results.parts:
        raise UsageError(f"results {results.place}: they have no rows")
    before = models.operating_points
    trained = before.data.bundle_sha256 if before else models.sha256
    for run in results.runs.values():
        if _as_trained(run) != trained:
            raise UsageError(f"results {results.place}: they are of another bundle than {models.path}")
    (one, *others) = results.runs.values()
    options = one.result_options
    dataset = results.dataset()
    there = dataset.schema.names
    label, group = _columns(there, options.column_prefix, columns)
    scores = [f"{member.name}_p_{name}" for member in models.members for name in models.classes]
    wanted = dict.fromkeys(["row", PATH, "status", *filter(None, (label, group)), *scores])
    table = dataset.to_table(columns=list(wanted))
    scored = pc.is_in(table.column("status"), value_set=pa.array([Status.OK.label]))
    left_out = Counter(map(str, table.filter(pc.invert(scored)).column("status").to_pylist()))
    table = table.filter(scored)
    labels = _labels(table, label, models, say)
    left_out["unlabelled"] = int((labels < 0).sum())
    table, labels = table.filter(pa.array(labels >= 0)), labels[labels >= 0]
    if not len(labels):
        why = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        raise UsageError(f"not one row has a score and a label ({why})")
    shape = (len(models.members), len(models.classes), len(labels))
    members = np.stack([table.column(name).to_numpy() for name in scores]).reshape(shape)
    members = np.ascontiguousarray(members.transpose(0, 2, 1), np.float32)
    odd = ~np.isfinite(members).all(axis=(0, 2))
    if odd.any():
        row = table.column("row")[int(odd.argmax())]
        raise UsageError(f"row {row}: its scores are no numbers")
    groups = _groups(table.column(group)) if group else np.arange(len(labels))
    digest = hashlib.sha256(labels.tobytes() + members.tobytes() + groups.tobytes())
    counts = np.bincount(labels, minlength=len(models.classes))
    return (
        Sample(members, labels, groups),
        table.column("row").to_numpy(),
        LabelledData(
            sha256=digest.hexdigest(),
            manifest_sha256=None if others else options.manifest_sha256,
            bundle_sha256=trained,
            precision=options.precision,
            images=len(labels),
            by_class=dict(zip(models.classes, counts.tolist(), strict=True)),
            patients=len(np.unique(groups)) if group else None,
            left_out={name: count for name, count in left_out.items() if count},
        ),
    )


def _as_trained(run: RunRecord) -> str:
    """The hash of a run's bundle before it was calibrated, which changes no member and no weight."""
    points = run.operating_points
    return str(points["data"]["bundle_sha256"]) if points else run.result_options.bundle_sha256


def _columns(there: list[str], prefix: str, columns: Columns) -> tuple[str | None, str | None]:
    """Of the label, and of what makes a group."""
    return (
        _column(there, prefix, columns.label, LABEL, "--label-column"),
        _column(there, prefix, columns.group, PATIENT, "--group-column"),
    )


def _column(there: list[str], prefix: str, asked: str | None, usual: str, option: str) -> str | None:
    """The column of that name, with the prefix that the run gave it or without."""
    found = next((name for name in (asked or usual, prefix + (asked or usual)) if name in there), None)
    if asked and not found:
        raise UsageError(f"{option} {asked}: no such column; there are {', '.join(there[:20])}")
    return found


def _labels(table: pa.Table, column: str | None, models: Bundle, say: Say) -> Labels:
    """Class of each row, -1 where it has none. Raises UsageError."""
    names = Names.of(models.classes)
    if column is None:
        texts = [_folder_of(path or "", names) for path in table.column(PATH).to_pylist()]
        if not any(texts):
            raise UsageError(
                f"no column {LABEL!r}, and no folder is named like {' or '.join(models.classes)}: give a CSV "
                "with path and label, or --label-column"
            )
        say("labels: by the names of the folders")
    else:
        cells = table.column(column).to_pylist()
        texts = ["" if cell is None else str(cell).strip() for cell in cells]
    known: dict[str, int] = {"": -1}
    for row, text in zip(table.column("row").to_pylist(), texts, strict=True):
        if text not in known:
            position = names.find(text)
            if position is None:
                raise UsageError(f"row {row}: {names.complaint(text)}")
            known[text] = position
    if names.aliases:
        say(f"labels: read {', '.join(names.read_as())}")
    return np.array([known[text] for text in texts], np.int64)


def _folder_of(path: str, names: Names) -> str:
    """The deepest folder with a class's name."""
    folders = PurePosixPath(path.replace("::", "/")).parts[:-1]
    return next((name for name in reversed(folders) if names.find(name) is not None), "")


def _groups(column: pa.ChunkedArray[Any]) -> Labels:
    """The same number for the same text; rows without are by themselves."""
    cells = ["" if cell is None else str(cell).strip() for cell in column.to_pylist()]
    numbers: dict[str, int] = {}
    return np.array(
        [numbers.setdefault(cell, row) if cell else row for row, cell in enumerate(cells)], np.int64
    )


def table_of(points: OperatingPoints) -> Iterator[str]:
    """Operating points in lines for people."""
    data, target = points.data, points.target
    patients = f" of {data.patients} patients" if data.patients is not None else ""
    left_out = ", ".join(f"{count} {name}" for name, count in data.left_out.items())
    yield (
        f"{target}: {data.by_class[target]} of {data.images} images{patients}, {data.precision}, "
        f"{points.made[:10]}" + (f"; left out: {left_out}" if left_out else "")
    )
    temperature = points.temperature
    yield (
        f"temperature {temperature.value:.3g}{_range(temperature.interval)}, negative log-likelihood "
        f"{temperature.nll.before:.4f} without, {temperature.nll.after:.4f} with it"
    )
    low, high = points.rule_out, points.refer
    yield (
        f"rule_out below {low.below:.3g}{_range(low.interval)}, "
        f"refer above {high.above:.3g}{_range(high.interval)}"
    )
    heads = ("not ruled out", "cross-fitted", "referred", "cross-fitted")
    yield (f"{'':13}" + "".join(f"{head:21}" for head in heads)).rstrip()
    for rate, word in (("sensitivity", ""), ("specificity", ""), ("ppv", "PPV"), ("npv", "NPV")):
        rates = (low.on_data, low.cross_fitted, high.on_data, high.cross_fitted)
        cells = (_rate(getattr(one, rate)) for one in rates)
        yield (f"{word or rate:13}" + "".join(f"{cell:21}" for cell in cells)).rstrip()
    yield (
        f"({points.level:.0%} intervals; "
        "cross-fitted: by thresholds found without the images they are judged on)"
    )
    if points.crossed:
        yield "the thresholds had crossed: all between keep both shares, and the middle one stands for both"
    zones = points.zones
    yield (
        f"images: rule_out {zones.rule_out.images}, gray_zone {zones.gray_zone.images}, "
        f"refer {zones.refer.images}; {zones.rule_out.positives} of {target} ruled out"
    )
    yield f"abstains: {'; '.join(_reasons(points.abstain))}"


def _reasons(abstain: Abstention) -> Iterator[str]:
    yield "in the gray zone"
    apart, far = abstain.disagreement, abstain.distance
    if apart.above is not None:
        yield f"members disagree by over {apart.above:.3g} bits (quantile {apart.quantile:g})"
    if far:
        yield f"out of distribution (quantile {far.quantile:g} of {far.images} images)"
    if abstain.image_flags:
        yield f"flags {', '.join(abstain.image_flags)}"


def _range(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""


def _rate(share: Share) -> str:
    return f"{share.value:.3f} ({share.low:.3f}-{share.high:.3f})" if share.of else "-"


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.calibrate",
        "BUNDLE --on LABELLED [options]",
        description="Fit a temperature and a triage's thresholds to labelled images; the bundle keeps them.",
        examples="example: python -m engine.calibrate bundle --on labelled.csv",
    )
    usual, add = Asked(target=""), parser.add
    add("bundle", type=Path, metavar="BUNDLE", help="model folder")
    add(
        "--on",
        dest="manifest",
        type=parse_location,
        metavar="LABELLED",
        help="CSV with path and label, class folders, or the results of this bundle on such",
    )
    add("--show", action="store_true", help="only print the operating points that the bundle has")
    add("--dry-run", action="store_true", help="print them, and leave the bundle as it is")
    add("--target", metavar="CLASS", help="what is looked for (osteoporosis, else the last class)")
    for name, words in (("sensitivity", "not ruled out"), ("specificity", "not referred")):
        whom = "images of it" if name == "sensitivity" else "the others"
        add(
            f"--{name}",
            type=number(0.5, 0.999),
            default=getattr(usual, name),
            metavar="F",
            help=f"share of {whom} that is {words} (%(default)g)",
        )
    add("--label-column", metavar="NAME", help=f"({LABEL}, else the names of the folders)")
    add(
        "--group-column",
        metavar="NAME",
        help=f"whose images are not independent ({PATIENT}, if there is one)",
    )
    add(
        "--quantile",
        type=number(0.5, 1),
        default=usual.quantile,
        metavar="F",
        help="beyond it members disagree too much, and images are too odd for --ood (%(default)g)",
    )
    add(
        "--image-flags",
        default=",".join(DOUBTFUL),
        metavar="A,B",
        help="of images to abstain from, or none (those whose pixels are in doubt)",
    )
    add(
        "--ood",
        action="store_true",
        help="abstain from what looks unlike these images, too (on a CPU, float32)",
    )
    add_options(parser, *_AS_IN_RUN)
    return parser


def _asked(given: dict[str, Any], classes: tuple[str, ...]) -> Asked:
    words = given["image_flags"].replace(",", " ").split()
    flags = () if words == ["none"] else tuple(dict.fromkeys(words))
    if unknown := [flag for flag in flags if flag not in FLAGS]:
        raise UsageError(f"--image-flags {unknown[0]}: allowed: {', '.join(FLAGS)}, or none")
    usual = next((name for name in classes if name.casefold() == "osteoporosis"), classes[-1])
    return Asked(
        target=given["target"] or usual,
        sensitivity=given["sensitivity"],
        specificity=given["specificity"],
        quantile=given["quantile"],
        flags=flags,
    )


def main(arguments: list[str] | None = None) -> int:
    console = Console(stderr=True, emoji=False)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    hush_libraries()

    def work() -> int:
        given: dict[str, Any] = vars(option_parser().parse_args(arguments))
        models = bundle.load(given["bundle"])
        again = f"python -m engine.calibrate {given['bundle']} --on labelled.csv"
        if given["show"]:
            if not models.operating_points:
                raise UsageError(f"bundle {models.path}: it has no operating points; find them with: {again}")
            print("\n".join(table_of(models.operating_points)))
            return 0
        if given["manifest"] is None:
            raise UsageError(f"--on is missing: {again}")
        settings = Settings(**{name: given[name] for name in ("manifest", "bundle", *_AS_IN_RUN)})
        with Display(console) as display:
            found = measure(
                settings,
                Columns(given["label_column"], given["group_column"]),
                _asked(given, models.classes),
                ood=given["ood"],
                watch=display,
                say=say,
                deadline=stop_on_signal(console),
            )
        print("\n".join(table_of(found.points)))
        if found.points.temperature.interval is None:
            say("no temperature is the likeliest (the classes are told apart without error?): it stays 1")
        if given["dry_run"]:
            say(f"not written: {models.path} is as it was")
            return 0
        bundle.revise(found.models, found.points, found.distances)
        say(f"written to {models.path / bundle.DESCRIPTION}; runs that were begun before can't go on with it")
        if tuned.folder_of(models.path).is_dir():
            say(f"for its tuning: python -m engine.tune {models.path} --sample MANIFEST")
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
