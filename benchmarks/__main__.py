"""Command line: `python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.record import ROOT
from engine.cli.parser import Parser
from engine.cli.terminal import run_command
from engine.core.errors import UsageError
from engine.core.extras import install_command

INSTALL = f"{install_command('training,dev')}, or on a GPU machine {install_command('gpu,training,proof')}"
SECTIONS = ("members", "decode", "end to end", "peers", "tensorrt")
SERIES = ("rows", "image_size", "batch_size", "threads", "part_size", "bad_files")
Names = Any  # the result of argparse's add_subparsers


def throughput_of(names: Names) -> None:
    parser = _add_parser(
        names, "throughput", "end-to-end rate, ceiling of the stages, their ratio, peak memory"
    )
    _add_common_options(parser, "throughput")
    parser.add("--rows", type=int, help="images (2048, or 200000 with --null)")
    _add_rounds_and_side(parser, 7)
    parser.add("--null", action="store_true", help="measure only Python's cost, without decoding and scoring")
    parser.add("--work", type=Path, help="folder for images and results (a temporary folder)")


def damage_of(names: Names) -> None:
    parser = _add_parser(names, "damage", "rate with 0 %, 1 % and 20 % of the images damaged")
    _add_common_options(parser, "damage")
    parser.add("--rows", type=int, default=800, help="images (%(default)s)")
    _add_rounds_and_side(parser, 3)
    parser.add("--radiographs", type=Path, metavar="DIR", help="JPEGs to damage (synthetic images)")


def decode_of(names: Names) -> None:
    parser = _add_parser(
        names, "decode", "rate of each format and DICOM syntax, beside Pillow, OpenCV and pydicom"
    )
    parser.add("--width", type=int, default=2140, help="width in pixels (%(default)s)")
    parser.add("--height", type=int, default=1760, help="height in pixels (%(default)s)")
    parser.add("--seconds", type=float, default=1.0, help="seconds per figure (%(default)s)")
    parser.add("--rounds", type=int, default=9, help="repetitions for --decode fast (%(default)s)")
    parser.add("--images", type=int, default=16, help="synthetic images for --decode fast (%(default)s)")
    parser.add("--radiographs", type=Path, metavar="DIR", help="JPEGs to use instead of synthetic images")
    parser.add("-b", "--bundle", type=Path, help="bundle whose scores on fast and exact pixels are compared")
    _add_output_option(parser, "decode")


def memory_of(names: Names) -> None:
    parser = _add_parser(names, "memory", "peak memory of a long run compared with a short one")
    _add_common_options(parser, "memory")
    parser.add("--rows", type=int, default=2_000_000, help="images (%(default)s)")


def scaling_of(names: Names) -> None:
    parser = _add_parser(
        names, "scaling", "cost by rows, image size, batch, threads, parts and bad files, with a plot"
    )
    _add_common_options(parser, "scaling")
    parser.add("--rows", type=int, default=2_000_000, help="most rows of a run (%(default)s)")
    parser.add("--rounds", type=int, default=3, help="repetitions (%(default)s)")
    parser.add("--images", type=int, help="images of a run with members (64 per core)")
    parser.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    parser.add("--quick", action="store_true", help="small settings, for a test of the benchmark")
    _add_choices(parser, "--series", SERIES)


def restart_of(names: Names) -> None:
    parser = _add_parser(names, "restart", "time to the first finished batch; rows scored again after a kill")
    _add_common_options(parser, "restart")
    parser.add("--rows", type=int, default=512, help="images (%(default)s)")
    parser.add("--part-rows", type=int, default=64, help="rows per part (%(default)s)")
    _add_rounds_and_side(parser, 5)


def scaling_out_of(names: Names) -> None:
    parser = _add_parser(names, "scaling-out", "cost of Ray over one process, and recovery from a kill")
    _add_common_options(parser, "scaling_out")
    parser.add("--rows", type=int, default=2048, help="rows with members (%(default)s)")
    parser.add(
        "--null-rows",
        type=int,
        default=400_000,
        metavar="ROWS",
        help="rows with null stages (%(default)s)",
    )
    _add_rounds_and_side(parser, 5)
    parser.add(
        "--actors",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        metavar="N",
        help="actors with null stages",
    )


def training_of(names: Names) -> None:
    parser = _add_parser(
        names,
        "training",
        "train a bundle on labelled images, screen the test images, compare the figures",
        needed="--data DATA --name NAME",
        example="--data demo/images --name demo --arguments=--freeze",
    )
    parser.add("--data", type=Path, required=True, help="DATA of python -m training")
    parser.add("--name", required=True, help="name of the JSON file, training-NAME.json")
    parser.add("--arguments", default="", help="more arguments of python -m training, in one string")
    _add_output_option(parser, "training")


def peers_of(names: Names) -> None:
    parser = _add_parser(names, "peers", "run the engine and other tools in turn on the same work")
    parser.add("-b", "--bundle", type=Path, help="model folder (one that is made for the contest)")
    parser.add(
        "--archive", choices=("mixed", "uniform"), default="mixed", help="kind of images (%(default)s)"
    )
    parser.add("--rows", type=int, default=256, help="images per contender and round (%(default)s)")
    parser.add("--rounds", type=int, default=5, help="repetitions (%(default)s)")
    parser.add("--seed", type=int, default=1, help="seed of the archive and the order (%(default)s)")
    parser.add("--only", nargs="+", metavar="NAME", help="run only the engine and these contenders")
    parser.add("--work", type=Path, help="folder for images, bundle and results (a temporary folder)")
    _add_output_option(parser, "peers.contest")


def tables_of(names: Names) -> None:
    parser = _add_parser(names, "tables", "write README's table and the plots from the JSON files")
    _add_output_option(parser, "tables")


def gpu_of(names: Names) -> None:
    parser = _add_parser(names, "gpu", "GPU benchmarks: members, decoding, end to end, peers, TensorRT")
    parser.add("--device", default="cuda:0", help="device; cpu runs the parts that need no GPU (%(default)s)")
    parser.add("--rows", type=int, default=100_000, help="rows of the archive (%(default)s)")
    parser.add("--peer-rows", type=int, default=20_000, help="rows for the peers (%(default)s)")
    parser.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    parser.add("--batch-size", type=int, default=128, help="images per batch, end to end (%(default)s)")
    parser.add(
        "--batches",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128, 256, 512, 1024],
        metavar="N",
        help="batch sizes of the members alone",
    )
    parser.add(
        "--compiled-batches",
        type=int,
        nargs="*",
        default=[128, 512],
        metavar="N",
        help="batch sizes of the compiled members",
    )
    parser.add("--timed", type=float, default=1.0, help="seconds per decoding figure (%(default)s)")
    _add_choices(parser, "--sections", SECTIONS)
    parser.add("--work", type=Path, help="folder for images and results (a temporary folder)")
    _add_output_option(parser, "gpu.proof")


def bundle_of(names: Names) -> None:
    text = "write the bundle of `peers`, whose scores differ between images"
    parser = _add_parser(names, "bundle", text, needed="FOLDER", example="demo/contest")
    parser.add("folder", type=Path, metavar="FOLDER", help="folder of the bundle; kept if it exists")
    _add_run_options(parser, "peers.bundle")


def _add_parser(names: Names, name: str, text: str, *, needed: str = "", example: str = "") -> Parser:
    parser: Parser = names.add_parser(
        name,
        help=text.replace("%", "%%"),
        summary=f"{needed} [option ...]".strip(),
        description=f"{text[0].upper()}{text[1:]}.",
        examples=f"example: python -m benchmarks {name} {example}".rstrip(),
    )
    return parser


def _add_common_options(parser: Parser, module: str) -> None:
    parser.add("-b", "--bundle", type=Path, default=Path("demo/bundle"), help="model folder (%(default)s)")
    _add_output_option(parser, module)


def _add_rounds_and_side(parser: Parser, rounds: int) -> None:
    parser.add("--rounds", type=int, default=rounds, help="repetitions (%(default)s)")
    parser.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")


def _add_choices(parser: Parser, flag: str, names: Sequence[str]) -> None:
    text = f"some of {', '.join(names)} (all)"
    parser.add(flag, nargs="+", choices=names, default=list(names), metavar="NAME", help=text)


def _add_output_option(parser: Parser, module: str) -> None:
    folder = ROOT / "benchmarks" / "results"
    parser.add(
        "-o",
        "--output",
        type=Path,
        default=folder,
        metavar="FOLDER",
        help="of the JSON (benchmarks/results)",
    )
    _add_run_options(parser, module)


def _add_run_options(parser: Parser, module: str) -> None:
    def run(console: Console, options: argparse.Namespace) -> None:
        # imported late, because each benchmark needs other packages
        importlib.import_module(f"benchmarks.{module}").main(console, options)

    parser.set_defaults(run=run)


def option_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks",
        "NAME [option ...]",
        description="Measure the engine and its limits on this machine.",
        examples="example: python -m benchmarks throughput -b demo/bundle\n\n"
        "python -m benchmarks NAME --help shows the options of a benchmark.",
    )
    names = parser.add_subparsers(metavar="NAME", required=True, prog="python -m benchmarks")
    throughput_of(names)
    damage_of(names)
    decode_of(names)
    memory_of(names)
    scaling_of(names)
    restart_of(names)
    scaling_out_of(names)
    training_of(names)
    peers_of(names)
    gpu_of(names)
    bundle_of(names)
    tables_of(names)
    return parser


def main() -> int:
    def run() -> int:
        options = option_parser().parse_args()
        try:
            options.run(Console(), options)
        except ModuleNotFoundError as error:
            raise UsageError(f"{error}; install the requirements of the benchmarks with: {INSTALL}") from None
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
