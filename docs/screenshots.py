"""The picture of a run in README, from a real one: `python -m docs.screenshots MANIFEST -b BUNDLE`."""

from __future__ import annotations

import io
import re
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from engine.command import Parser
from engine.errors import EngineError
from engine.ledger import Progress
from engine.progress import Display, show_summary
from engine.settings import Settings

COMMAND = "python -m engine.run manifest.parquet -b bundle -o results"
HERE = Path(__file__).parent
# without the fonts that rich would have it fetch from elsewhere
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def option_parser() -> Parser:
    parser = Parser(
        "python -m docs.screenshots",
        "MANIFEST -b BUNDLE",
        description="Draw docs/run.svg from a run of the engine.",
        examples="example: python -m docs.screenshots demo/archive/manifest.csv -b demo/bundle",
    )
    parser.add("manifest", type=Path, metavar="MANIFEST", help="as engine.run")
    parser.add("-b", "--bundle", type=Path, default=Path("demo/bundle"), help="model folder (%(default)s)")
    return parser


def draw(manifest: Path, bundle: Path) -> str:
    """An SVG of what a terminal shows: the bar when two thirds are done, and the end."""
    from engine.pipeline import screen  # seconds of imports: after --help

    paper, screen_now = (
        Console(record=True, width=100, file=io.StringIO(), force_terminal=True, emoji=False)
        for _ in range(2)
    )
    say = partial(paper.print, markup=False, highlight=False, soft_wrap=True)
    with TemporaryDirectory() as scratch, Display(screen_now) as display:
        drawn = False

        def watch(progress: Progress) -> None:
            nonlocal drawn
            display(progress)
            if not drawn and 3 * progress.rows_done >= 2 * progress.rows:
                paper.print(display.bar)
                drawn = True

        say(f"$ {COMMAND}", style="bold")
        summary = screen(
            Settings(manifest=manifest, bundle=bundle, output=Path(scratch, "results")), watch=watch, say=say
        )
    show_summary(paper, summary)
    return paper.export_svg(title="engine.run", code_format=FORMAT)


def main() -> int:
    try:
        given = option_parser().parse_args()
        (HERE / "run.svg").write_text(draw(given.manifest, given.bundle))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
