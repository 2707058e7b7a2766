"""Calibrate a bundle: `python -m engine.calibrate BUNDLE --on DATA`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.bundle import bundle as bundles
from engine.bundle.operating_points import DOUBTFUL, OperatingPoints
from engine.calibrate.labelled import LABEL_COLUMN, PATIENT_COLUMN, LabelColumns
from engine.calibrate.measure import AS_IN_RUN, abstention_reasons, calibrate_bundle
from engine.calibrate.thresholds import CalibrationOptions
from engine.cli.options import add_options
from engine.cli.parser import Parser
from engine.cli.terminal import hush_libraries, run_command, stop_on_signal
from engine.core.errors import UsageError
from engine.core.option import number
from engine.core.records import FLAGS
from engine.core.settings import Settings, parse_location
from engine.monitoring.progress_bar import ProgressBar
from engine.runs import profile
from engine.stats.intervals import Proportion


def format_points(points: OperatingPoints) -> Iterator[str]:
    """Yield the operating points as lines of text."""
    data, target = points.data, points.target
    patients = f" of {data.patients} patients" if data.patients is not None else ""
    left_out = ", ".join(f"{count} {name}" for name, count in data.left_out.items())
    yield (
        f"{target}: {data.by_class[target]} of {data.images} images{patients}, {data.precision}, "
        f"{points.made[:10]}" + (f"; left out: {left_out}" if left_out else "")
    )
    temperature = points.temperature
    yield (
        f"temperature {temperature.value:.3g}{_format_interval(temperature.interval)}, negative "
        "log-likelihood "
        f"{temperature.nll.before:.4f} without, {temperature.nll.after:.4f} with it"
    )
    low, high = points.rule_out, points.refer
    yield (
        f"rule_out below {low.below:.3g}{_format_interval(low.interval)}, "
        f"refer above {high.above:.3g}{_format_interval(high.interval)}"
    )
    heads = ("not ruled out", "cross-fitted", "referred", "cross-fitted")
    yield (f"{'':13}" + "".join(f"{head:21}" for head in heads)).rstrip()
    for rate, heading in (("sensitivity", ""), ("specificity", ""), ("ppv", "PPV"), ("npv", "NPV")):
        rates = (low.on_data, low.cross_fitted, high.on_data, high.cross_fitted)
        cells = (_format_rate(getattr(measured, rate)) for measured in rates)
        yield (f"{heading or rate:13}" + "".join(f"{cell:21}" for cell in cells)).rstrip()
    yield (
        f"({points.level:.0%} intervals; "
        "cross-fitted: each image is judged by thresholds that were fitted without it)"
    )
    if points.crossed:
        yield "the thresholds had crossed: all between them reach both rates, so both are set to the middle"
    zones = points.zones
    yield (
        f"images: rule_out {zones.rule_out.images}, gray_zone {zones.gray_zone.images}, "
        f"refer {zones.refer.images}; {zones.rule_out.positives} of {target} ruled out"
    )
    yield f"abstains: {'; '.join(abstention_reasons(points.abstain))}"


def _format_interval(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""


def _format_rate(share: Proportion) -> str:
    return f"{share.value:.3f} ({share.low:.3f}-{share.high:.3f})" if share.of else "-"


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.calibrate",
        "BUNDLE --on LABELLED [options]",
        description="Fit a temperature and triage thresholds to labelled images; store them in the bundle.",
        examples="example: python -m engine.calibrate bundle --on labelled.csv",
    )
    defaults, add = CalibrationOptions(target=""), parser.add
    add("bundle", type=Path, metavar="BUNDLE", help="model folder")
    add(
        "--on",
        dest="manifest",
        type=parse_location,
        metavar="LABELLED",
        help="CSV with path and label, folders named by class, or results of this bundle on such images",
    )
    add("--show", action="store_true", help="only print the operating points of the bundle")
    add("--dry-run", action="store_true", help="print the operating points without changing the bundle")
    add("--target", metavar="CLASS", help="the class to detect (osteoporosis, else the last class)")
    for name, images, outcome in (
        ("sensitivity", "images of the target", "not ruled out"),
        ("specificity", "the other images", "not referred"),
    ):
        add(
            f"--{name}",
            type=number(0.5, 0.999),
            default=getattr(defaults, name),
            metavar="F",
            help=f"share of {images} that is {outcome} (%(default)g)",
        )
    add("--label-column", metavar="NAME", help=f"the true class ({LABEL_COLUMN}, else the folder names)")
    add(
        "--group-column",
        metavar="NAME",
        help=f"column of the patient ({PATIENT_COLUMN}, if it exists)",
    )
    add(
        "--quantile",
        type=number(0.5, 1),
        default=defaults.quantile,
        metavar="F",
        help="abstain above this quantile of disagreement, and of distance with --ood (%(default)g)",
    )
    add(
        "--image-flags",
        default=",".join(DOUBTFUL),
        metavar="A,B",
        help="abstain from images with these flags, or none (the flags of doubtful pixels)",
    )
    add(
        "--ood",
        action="store_true",
        help="also abstain from images that are unlike the labelled ones (on a CPU, float32)",
    )
    add_options(parser, *AS_IN_RUN)
    return parser


def _calibration_options(options: dict[str, Any], classes: tuple[str, ...]) -> CalibrationOptions:
    words = options["image_flags"].replace(",", " ").split()
    flags = () if words == ["none"] else tuple(dict.fromkeys(words))
    if unknown := [flag for flag in flags if flag not in FLAGS]:
        raise UsageError(f"--image-flags {unknown[0]}: allowed: {', '.join(FLAGS)}, or none")
    default_target = next((name for name in classes if name.casefold() == "osteoporosis"), classes[-1])
    return CalibrationOptions(
        target=options["target"] or default_target,
        sensitivity=options["sensitivity"],
        specificity=options["specificity"],
        quantile=options["quantile"],
        flags=flags,
    )


def main(arguments: list[str] | None = None) -> int:
    console = Console(stderr=True, emoji=False)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    hush_libraries()

    def work() -> int:
        options: dict[str, Any] = vars(option_parser().parse_args(arguments))
        bundle = bundles.load_bundle(options["bundle"])
        command = f"python -m engine.calibrate {options['bundle']} --on labelled.csv"
        if options["show"]:
            if not bundle.operating_points:
                raise UsageError(f"bundle {bundle.path} has no operating points; find them with: {command}")
            print("\n".join(format_points(bundle.operating_points)))
            return 0
        if options["manifest"] is None:
            raise UsageError(f"--on is missing: {command}")
        settings = Settings(**{name: options[name] for name in ("manifest", "bundle", *AS_IN_RUN)})
        with ProgressBar(console) as progress_bar:
            calibration = calibrate_bundle(
                settings,
                LabelColumns(options["label_column"], options["group_column"]),
                _calibration_options(options, bundle.classes),
                ood=options["ood"],
                on_progress=progress_bar,
                say=say,
                deadline=stop_on_signal(console),
            )
        print("\n".join(format_points(calibration.points)))
        if calibration.points.temperature.interval is None:
            say("the temperature stays 1: its likelihood has no maximum (all images classified correctly?)")
        if options["dry_run"]:
            say(f"nothing was written; {bundle.path} is unchanged")
            return 0
        bundles.update_bundle(calibration.bundle, calibration.points, calibration.distances)
        say(
            f"the operating points were written to {bundle.path / bundles.DESCRIPTION_FILE}; earlier runs "
            "cannot be resumed with this bundle"
        )
        if profile.profiles_folder(bundle.path).is_dir():
            say(f"tune the bundle again with: python -m engine.tune {bundle.path} --sample MANIFEST")
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
