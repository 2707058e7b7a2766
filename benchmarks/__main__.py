"""`python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import damage, decode, memory, restart, scaling, throughput, training
from benchmarks.record import ROOT
from engine.errors import EngineError

SECTIONS = ("members", "decode", "end to end", "peers", "tensorrt")
Names = Any  # what argparse's add_subparsers gives


def throughput_of(names: Names) -> None:
    one = names.add_parser("throughput", help="end to end, each stage's ceiling, their ratio, peak memory")
    _common(one, throughput.main)
    one.add_argument("--rows", type=int, help="1024, or 200000 with --null")
    one.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    one.add_argument("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add_argument("--null", action="store_true", help="Python's own cost: nothing decoded, nothing scored")
    one.add_argument("--work", type=Path, help="folder for images and results (a temporary one)")


def damage_of(names: Names) -> None:
    one = names.add_parser("damage", help="the rate with none, 1 %% and 20 %% of the images damaged")
    _common(one, damage.main)
    one.add_argument("--rows", type=int, default=800, help="(%(default)s)")
    one.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    one.add_argument("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add_argument("--radiographs", type=Path, metavar="DIR", help="JPEGs to damage (synthetic ones)")


def decode_of(names: Names) -> None:
    one = names.add_parser("decode", help="every format and DICOM syntax, beside Pillow, OpenCV and pydicom")
    one.add_argument("--width", type=int, default=2140, help="pixels (%(default)s)")
    one.add_argument("--height", type=int, default=1760, help="pixels (%(default)s)")
    one.add_argument("--seconds", type=float, default=1.0, help="a figure (%(default)s)")
    _output(one, decode.main)


def memory_of(names: Names) -> None:
    one = names.add_parser("memory", help="peak memory of a long run beside that of a short one")
    _common(one, memory.main)
    one.add_argument("--rows", type=int, default=2_000_000, help="(%(default)s)")


def scaling_of(names: Names) -> None:
    one = names.add_parser(
        "scaling", help="cost against rows, image size, batch, threads, parts and bad files, with a plot"
    )
    _common(one, scaling.main)
    one.add_argument("--rows", type=int, default=2_000_000, help="at most (%(default)s)")
    one.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    one.add_argument("--images", type=int, help="of a run with members (64 a core)")
    one.add_argument("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add_argument("--quick", action="store_true", help="small settings, to see that it works")
    names_of = scaling.SERIES
    one.add_argument("--series", nargs="+", choices=names_of, default=list(names_of), metavar="NAME")


def restart_of(names: Names) -> None:
    one = names.add_parser("restart", help="start-up to the first finished batch; rows redone after a kill")
    _common(one, restart.main)
    one.add_argument("--rows", type=int, default=512, help="(%(default)s)")
    one.add_argument("--part-rows", type=int, default=64, help="(%(default)s)")
    one.add_argument("--rounds", type=int, default=5, help="starts, and kills (%(default)s)")
    one.add_argument("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")


def training_of(names: Names) -> None:
    one = names.add_parser(
        "training", help="labelled images to a bundle to screened test images, with figures"
    )
    one.add_argument("--data", type=Path, required=True, help="what python -m training takes")
    one.add_argument("--name", required=True, help="of the JSON: training-NAME.json")
    one.add_argument("--arguments", default="", help="further ones of python -m training, in one string")
    _output(one, training.main)


def gpu_of(names: Names) -> None:
    one = names.add_parser("gpu", help="the GPU proof kit: members, decoding, end to end, peers, TensorRT")
    one.add_argument("--device", default="cuda:0", help="(%(default)s); cpu runs what can run there")
    one.add_argument("--rows", type=int, default=100_000, help="of the archive (%(default)s)")
    one.add_argument("--peer-rows", type=int, default=20_000, help="(%(default)s)")
    one.add_argument("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add_argument("--batch-size", type=int, default=128, help="end to end (%(default)s)")
    one.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    one.add_argument("--compiled-batches", type=int, nargs="*", default=[128, 512])
    one.add_argument("--timed", type=float, default=1.0, help="seconds a decoding figure (%(default)s)")
    one.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    one.add_argument("--work", type=Path, help="folder for images and results (a temporary one)")
    _output(one, _gpu)


def _gpu(console: Console, options: argparse.Namespace) -> None:
    from benchmarks.gpu import proof  # torch: only here

    proof.main(console, options)


def _common(one: argparse.ArgumentParser, run: Callable[[Console, Any], None]) -> None:
    one.add_argument("-b", "--bundle", type=Path, default=Path("demo/bundle"), help="(%(default)s)")
    _output(one, run)


def _output(one: argparse.ArgumentParser, run: Callable[[Console, Any], None]) -> None:
    folder = ROOT / "benchmarks" / "results"
    one.add_argument("-o", "--output", type=Path, default=folder, help="folder of the JSON")
    one.set_defaults(run=run)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the engine on this machine, beside what its stages could do alone.",
        epilog="example: python -m benchmarks throughput -b demo/bundle",
    )
    names = parser.add_subparsers(metavar="NAME", required=True)
    throughput_of(names)
    damage_of(names)
    decode_of(names)
    memory_of(names)
    scaling_of(names)
    restart_of(names)
    training_of(names)
    gpu_of(names)
    options = parser.parse_args()
    try:
        options.run(Console(), options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
