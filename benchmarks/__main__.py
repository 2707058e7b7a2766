"""`python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import throughput
from benchmarks.record import ROOT
from engine.errors import EngineError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the engine on this machine, beside what its stages could do alone.",
        epilog="example: python -m benchmarks throughput -b demo/bundle",
    )
    names = parser.add_subparsers(metavar="NAME", required=True)
    one = names.add_parser("throughput", help="end to end, each stage's ceiling, their ratio, peak memory")
    one.add_argument("-b", "--bundle", type=Path, default=Path("demo/bundle"), help="(%(default)s)")
    one.add_argument("--rows", type=int, help="1024, or 200000 with --null")
    one.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    one.add_argument("--side", type=int, default=1024, help="pixels of the square images (%(default)s)")
    one.add_argument("--null", action="store_true", help="Python's own cost: nothing decoded, nothing scored")
    one.add_argument("--work", type=Path, help="folder for images and results (a temporary one)")
    one.add_argument(
        "-o", "--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON"
    )
    one.set_defaults(run=throughput.main)
    options = parser.parse_args()
    try:
        options.run(Console(), options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
