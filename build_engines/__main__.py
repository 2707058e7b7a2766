"""Command line: `python -m build_engines BUNDLE`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from build_engines.options import (
    FRONTENDS,
    INT8_MIN_AGREEMENT,
    MAX_DIFFERENCE,
    MIN_AGREEMENT,
    PRECISIONS,
    TARGETS,
    BuildOptions,
    parse_capabilities,
)
from engine.cli.parser import Parser
from engine.cli.terminal import run_command
from engine.core.option import byte_size, integer, number

if TYPE_CHECKING:
    from build_engines.session import BuiltMember

_EXAMPLES = """\
examples:
  python -m build_engines bundle --calibration images    FP16 plans for this machine's GPU
  python -m build_engines bundle --target tensorrt_rtx --compute-capability sm86,sm89
                                                         the same for GPUs of other machines
  python -m build_engines bundle --target onnx --precision int8 --calibration images
                                                         INT8 graphs for the CPU

A plan that differs from the float32 reference by more than --limit is not installed: exit status 4.
INT8 is calibrated on some of the images and compared on the others, each member and the ensemble.
Labels come from class folders or a label column; without them, float32's classes are the labels."""


def option_parser() -> Parser:
    defaults = BuildOptions(bundle=Path())
    parser = Parser(
        "python -m build_engines",
        "BUNDLE [option ...]",
        description="Compile a bundle's members into TensorRT plans, or quantize them for the CPU.",
        examples=_EXAMPLES,
        help_all=True,
    )
    add = parser.add
    add("bundle", type=Path, metavar="BUNDLE", help="model folder; the plans go into BUNDLE/plans")
    add("--target", choices=TARGETS, default=defaults.target, help="runtime of the plans (%(default)s)")
    add(
        "--frontend",
        choices=FRONTENDS,
        default=defaults.frontend,
        help="the parser of the members (%(default)s)",
        more=True,
    )
    add("--precision", choices=PRECISIONS, default=defaults.precision, help="of the members (%(default)s)")
    add(
        "--batch-size",
        type=integer(1, 4096),
        default=defaults.batch_size,
        metavar="N",
        help="largest batch, in images (%(default)s)",
    )
    add(
        "--compute-capability",
        dest="compute_capabilities",
        type=parse_capabilities,
        default=(),
        metavar="SM",
        help="tensorrt_rtx: GPUs to build for, such as sm86,sm89 (this machine's)",
    )
    add(
        "--hardware-compatible",
        action="store_true",
        help="tensorrt: build one plan for Ampere and newer GPUs",
        more=True,
    )
    add(
        "--version-compatible",
        action="store_true",
        help="tensorrt: build plans that later minor versions can run",
        more=True,
    )
    add(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="tensorrt: file with kernel timings; makes rebuilds faster",
        more=True,
    )
    add("--workspace", type=byte_size, metavar="SIZE", help="largest scratch memory, such as 2GiB", more=True)
    add("--optimization-level", type=integer(0, 5), metavar="0..5", help="effort of the builder", more=True)
    add("--max-aux-streams", type=integer(0, 16), metavar="N", help="streams inside one member", more=True)
    add("--calibration", type=Path, metavar="DIR", help="images to calibrate and compare on (synthetic)")
    add(
        "--calibration-images",
        type=integer(1, 100_000),
        default=defaults.calibration_images,
        metavar="N",
        help="largest number of these images (%(default)s)",
    )
    add(
        "--limit",
        type=number(0, 1),
        metavar="P",
        help=f"largest difference in probability ({MAX_DIFFERENCE:g}; int8: any)",
    )
    add(
        "--agreement",
        type=number(0, 1),
        metavar="F",
        help=f"least share of images with the same class ({MIN_AGREEMENT:g}; int8: {INT8_MIN_AGREEMENT:g})",
    )
    add(
        "--auc-limit",
        type=number(0, 1),
        default=defaults.auc_limit,
        metavar="D",
        help="int8: largest loss of AUC (%(default)g)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and report. Returns the exit status."""
    console = Console(stderr=True, emoji=False)

    def build_and_report() -> int:
        options = BuildOptions(**vars(option_parser().parse_args(arguments)))
        from build_engines.build import build  # seconds of imports: after --help and wrong arguments
        from build_engines.progress import show_phases

        with show_phases(console) as phases:
            folder, built = build(options, phases, lambda line: console.print(line, markup=False))
        _show(console, options, built)
        print(folder)
        return 0

    def describe_os_error(error: OSError) -> str:  # such as a full disk or a read-only bundle
        return f"{error.filename or 'writing the plans'}: {error.strerror or error}"

    return run_command(
        build_and_report,
        console,
        interrupted=("stopped; nothing was installed", 130),
        describe_os_error=describe_os_error,
    )


def _show(console: Console, options: BuildOptions, built: list[BuiltMember]) -> None:
    int8 = options.precision == "int8"
    table = Table(
        "member", "built in", "size", "largest difference", "same class", "AUC" if int8 else "compared"
    )
    for result in built:
        agreement = result.parity
        compared = "on the GPU" if agreement.executed else "its graph, on ONNX Runtime"
        table.add_row(
            result.member,
            f"{result.build_s:.1f} s",
            f"{result.size / 1e6:.1f} MB",
            f"{agreement.max:.2g}",
            f"{agreement.agreement:.2%} of {agreement.counted}" if agreement.counted else "no clear case",
            f"{agreement.auc:.4f} (float32: {agreement.auc_reference:.4f})" if int8 else compared,
        )
    console.print(table)
    if not all(result.parity.executed for result in built) and options.target != "onnx":
        console.print("the plans were not executed here; the engine checks them when it first loads them")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
