"""`python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import importlib
import sys
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
Names = Any  # what argparse's add_subparsers gives


def throughput_of(names: Names) -> None:
    one = _add_parser(names, "throughput", "end to end, each stage's ceiling, their ratio, peak memory")
    _add_common_options(one, "throughput")
    one.add("--rows", type=int, help="2048, or 200000 with --null")
    one.add("--rounds", type=int, default=7, help="repetitions (%(default)s)")
    one.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add("--null", action="store_true", help="Python's own cost: nothing decoded, nothing scored")
    one.add("--work", type=Path, help="folder for images and results (a temporary one)")


def damage_of(names: Names) -> None:
    one = _add_parser(names, "damage", "the rate with none, 1 % and 20 % of the images damaged")
    _add_common_options(one, "damage")
    one.add("--rows", type=int, default=800, help="images (%(default)s)")
    one.add("--rounds", type=int, default=3, help="repetitions (%(default)s)")
    one.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add("--radiographs", type=Path, metavar="DIR", help="JPEGs to damage (synthetic ones)")


def decode_of(names: Names) -> None:
    one = _add_parser(names, "decode", "every format and DICOM syntax, beside Pillow, OpenCV and pydicom")
    one.add("--width", type=int, default=2140, help="pixels (%(default)s)")
    one.add("--height", type=int, default=1760, help="pixels (%(default)s)")
    one.add("--seconds", type=float, default=1.0, help="a figure (%(default)s)")
    one.add("--rounds", type=int, default=9, help="of --decode fast and its peers (%(default)s)")
    one.add("--images", type=int, default=16, help="synthetic ones for these (%(default)s)")
    one.add("--radiographs", type=Path, metavar="DIR", help="JPEGs in their place")
    one.add("-b", "--bundle", type=Path, help="whose scores on fast and exact pixels are compared")
    _add_output_option(one, "decode")


def memory_of(names: Names) -> None:
    one = _add_parser(names, "memory", "peak memory of a long run beside that of a short one")
    _add_common_options(one, "memory")
    one.add("--rows", type=int, default=2_000_000, help="images (%(default)s)")


def scaling_of(names: Names) -> None:
    one = _add_parser(
        names, "scaling", "cost against rows, image size, batch, threads, parts and bad files, with a plot"
    )
    _add_common_options(one, "scaling")
    one.add("--rows", type=int, default=2_000_000, help="at most (%(default)s)")
    one.add("--rounds", type=int, default=3, help="repetitions (%(default)s)")
    one.add("--images", type=int, help="of a run with members (64 a core)")
    one.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add("--quick", action="store_true", help="small settings, to see that it works")
    one.add(
        "--series",
        nargs="+",
        choices=SERIES,
        default=list(SERIES),
        metavar="NAME",
        help=f"of {', '.join(SERIES)}",
    )


def restart_of(names: Names) -> None:
    one = _add_parser(names, "restart", "start-up to the first finished batch; rows redone after a kill")
    _add_common_options(one, "restart")
    one.add("--rows", type=int, default=512, help="images (%(default)s)")
    one.add("--part-rows", type=int, default=64, help="rows a part (%(default)s)")
    one.add("--rounds", type=int, default=5, help="starts, and kills (%(default)s)")
    one.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")


def scaling_out_of(names: Names) -> None:
    one = _add_parser(names, "scaling-out", "what Ray costs beside one process, and recovery from a kill")
    _add_common_options(one, "scaling_out")
    one.add("--rows", type=int, default=2048, help="with real members (%(default)s)")
    one.add("--null-rows", type=int, default=400_000, metavar="ROWS", help="with null stages (%(default)s)")
    one.add("--rounds", type=int, default=5, help="repetitions (%(default)s)")
    one.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add("--actors", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="with null stages")


def training_of(names: Names) -> None:
    one = _add_parser(
        names,
        "training",
        "labelled images to a bundle to screened test images, with figures",
        needed="--data DATA --name NAME",
        example="--data demo/images --name demo --arguments=--freeze",
    )
    one.add("--data", type=Path, required=True, help="what python -m training takes")
    one.add("--name", required=True, help="of the JSON: training-NAME.json")
    one.add("--arguments", default="", help="further ones of python -m training, in one string")
    _add_output_option(one, "training")


def peers_of(names: Names) -> None:
    one = _add_parser(names, "peers", "the engine and what people write instead, in turn, on the same work")
    one.add("-b", "--bundle", type=Path, help="(one made for it, blind to rounding)")
    one.add("--archive", choices=("mixed", "uniform"), default="mixed", help="its images (%(default)s)")
    one.add("--rows", type=int, default=256, help="a contender and round (%(default)s)")
    one.add("--rounds", type=int, default=5, help="repetitions (%(default)s)")
    one.add("--seed", type=int, default=1, help="of archive and order (%(default)s)")
    one.add("--only", nargs="+", metavar="NAME", help="these contenders, and the engine")
    one.add("--work", type=Path, help="folder for images, bundle and results (a temporary one)")
    _add_output_option(one, "peers.contest")


def tables_of(names: Names) -> None:
    one = _add_parser(names, "tables", "README's table and the plots, from the JSON files")
    _add_output_option(one, "tables")


def gpu_of(names: Names) -> None:
    one = _add_parser(names, "gpu", "the GPU proof kit: members, decoding, end to end, peers, TensorRT")
    one.add("--device", default="cuda:0", help="cpu runs what can run there (%(default)s)")
    one.add("--rows", type=int, default=100_000, help="of the archive (%(default)s)")
    one.add("--peer-rows", type=int, default=20_000, help="images that the peers get (%(default)s)")
    one.add("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add("--batch-size", type=int, default=128, help="end to end (%(default)s)")
    one.add(
        "--batches",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128, 256, 512, 1024],
        metavar="N",
        help="of the members alone",
    )
    one.add(
        "--compiled-batches",
        type=int,
        nargs="*",
        default=[128, 512],
        metavar="N",
        help="the same, with torch.compile",
    )
    one.add("--timed", type=float, default=1.0, help="seconds a decoding figure (%(default)s)")
    one.add(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="NAME",
        help=f"of {', '.join(SECTIONS)}",
    )
    one.add("--work", type=Path, help="folder for images and results (a temporary one)")
    _add_output_option(one, "gpu.proof")


def bundle_of(names: Names) -> None:
    text = "the bundle of `peers`, which tells right rows from wrong"
    one = _add_parser(names, "bundle", text, needed="FOLDER", example="demo/contest")
    one.add("folder", type=Path, metavar="FOLDER", help="where it goes, if it is not there yet")
    _add_run_options(one, "peers.bundle")


def _add_parser(names: Names, name: str, text: str, *, needed: str = "", example: str = "") -> Parser:
    made: Parser = names.add_parser(
        name,
        help=text.replace("%", "%%"),
        summary=f"{needed} [option ...]".strip(),
        description=f"{text[0].upper()}{text[1:]}.",
        examples=f"example: python -m benchmarks {name} {example}".rstrip(),
    )
    return made


def _add_common_options(one: Parser, module: str) -> None:
    one.add("-b", "--bundle", type=Path, default=Path("demo/bundle"), help="model folder (%(default)s)")
    _add_output_option(one, module)


def _add_output_option(one: Parser, module: str) -> None:
    folder = ROOT / "benchmarks" / "results"
    one.add("-o", "--output", type=Path, default=folder, metavar="FOLDER", help="of the JSON (here)")
    _add_run_options(one, module)


def _add_run_options(one: Parser, module: str) -> None:
    def run(console: Console, options: argparse.Namespace) -> None:
        importlib.import_module(f"benchmarks.{module}").main(console, options)  # each needs its own packages

    one.set_defaults(run=run)


def option_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks",
        "NAME [option ...]",
        description="Measure the engine on this machine, beside what its stages could do alone.",
        examples="example: python -m benchmarks throughput -b demo/bundle\n\n"
        "python -m benchmarks NAME --help shows the options of each.",
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
    def work() -> int:
        options = option_parser().parse_args()
        try:
            options.run(Console(), options)
        except ModuleNotFoundError as error:
            raise UsageError(f"{error}; install what benchmarks need with: {INSTALL}") from None
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
