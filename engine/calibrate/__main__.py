"""Calibrate a bundle: `python -m engine.calibrate BUNDLE --on DATA`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.bundle import bundle
from engine.bundle.operating_points import DOUBTFUL, OperatingPoints
from engine.calibrate.labelled import LABEL_COLUMN, PATIENT_COLUMN, LabelColumns
from engine.calibrate.measure import AS_IN_RUN, calibrate_bundle, reasons
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
    for rate, word in (("sensitivity", ""), ("specificity", ""), ("ppv", "PPV"), ("npv", "NPV")):
        rates = (low.on_data, low.cross_fitted, high.on_data, high.cross_fitted)
        cells = (_format_rate(getattr(one, rate)) for one in rates)
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
    yield f"abstains: {'; '.join(reasons(points.abstain))}"


def _format_interval(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""


def _format_rate(share: Proportion) -> str:
    return f"{share.value:.3f} ({share.low:.3f}-{share.high:.3f})" if share.of else "-"


def option_parser() -> Parser:
    parser = Parser(
        "python -m engine.calibrate",
        "BUNDLE --on LABELLED [options]",
        description="Fit a temperature and a triage's thresholds to labelled images; the bundle keeps them.",
        examples="example: python -m engine.calibrate bundle --on labelled.csv",
    )
    usual, add = CalibrationOptions(target=""), parser.add
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
    add("--label-column", metavar="NAME", help=f"({LABEL_COLUMN}, else the names of the folders)")
    add(
        "--group-column",
        metavar="NAME",
        help=f"whose images are not independent ({PATIENT_COLUMN}, if there is one)",
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
    add_options(parser, *AS_IN_RUN)
    return parser


def _calibration_options(given: dict[str, Any], classes: tuple[str, ...]) -> CalibrationOptions:
    words = given["image_flags"].replace(",", " ").split()
    flags = () if words == ["none"] else tuple(dict.fromkeys(words))
    if unknown := [flag for flag in flags if flag not in FLAGS]:
        raise UsageError(f"--image-flags {unknown[0]}: allowed: {', '.join(FLAGS)}, or none")
    usual = next((name for name in classes if name.casefold() == "osteoporosis"), classes[-1])
    return CalibrationOptions(
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
        models = bundle.load_bundle(given["bundle"])
        again = f"python -m engine.calibrate {given['bundle']} --on labelled.csv"
        if given["show"]:
            if not models.operating_points:
                raise UsageError(f"bundle {models.path}: it has no operating points; find them with: {again}")
            print("\n".join(format_points(models.operating_points)))
            return 0
        if given["manifest"] is None:
            raise UsageError(f"--on is missing: {again}")
        settings = Settings(**{name: given[name] for name in ("manifest", "bundle", *AS_IN_RUN)})
        with ProgressBar(console) as display:
            found = calibrate_bundle(
                settings,
                LabelColumns(given["label_column"], given["group_column"]),
                _calibration_options(given, models.classes),
                ood=given["ood"],
                on_progress=display,
                say=say,
                deadline=stop_on_signal(console),
            )
        print("\n".join(format_points(found.points)))
        if found.points.temperature.interval is None:
            say("no temperature is the likeliest (the classes are told apart without error?): it stays 1")
        if given["dry_run"]:
            say(f"not written: {models.path} is as it was")
            return 0
        bundle.update_bundle(found.bundle, found.points, found.distances)
        say(
            f"written to {models.path / bundle.DESCRIPTION_FILE}; runs that began earlier "
            "cannot continue with it"
        )
        if profile.profiles_folder(models.path).is_dir():
            say(f"for its tuning: python -m engine.tune {models.path} --sample MANIFEST")
        return 0

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
