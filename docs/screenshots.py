"""README's pictures, of a real run and its report: `python -m docs.screenshots MANIFEST -b BUNDLE`."""

from __future__ import annotations

import io
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from engine.cli.parser import Parser
from engine.core.errors import EngineError
from engine.core.settings import Settings
from engine.monitoring.progress_bar import ProgressBar, show_summary
from engine.runs.progress import Progress

COMMAND = "python -m engine.run manifest.parquet -b bundle -o results"
HERE = Path(__file__).parent
BROWSER = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
WINDOW = 1150, 1100  # pixels
# without the fonts that rich would have it fetch from elsewhere
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def option_parser() -> Parser:
    parser = Parser(
        "python -m docs.screenshots",
        "MANIFEST -b BUNDLE",
        description="Draw docs/run.svg and docs/report.png from a run of the engine. Needs Chromium.",
        examples="example: python -m docs.screenshots demo/archive/manifest.csv -b demo/bundle",
    )
    parser.add("manifest", type=Path, metavar="MANIFEST", help="as engine.run")
    parser.add("-b", "--bundle", type=Path, default=Path("demo/bundle"), help="model folder (%(default)s)")
    return parser


def draw(manifest: Path, bundle: Path, results: Path) -> str:
    """An SVG of what a terminal shows of a run: the bar when two thirds are done, and the end."""
    from engine.pipeline.pipeline import screen_in_process  # seconds of imports: after --help

    paper, screen_now = (
        Console(record=True, width=100, file=io.StringIO(), force_terminal=True, emoji=False)
        for _ in range(2)
    )
    say = partial(paper.print, markup=False, highlight=False, soft_wrap=True)
    with ProgressBar(screen_now) as display:
        drawn = False

        def watch(progress: Progress) -> None:
            nonlocal drawn
            display(progress)
            if not drawn and 3 * progress.rows_done >= 2 * progress.rows:
                paper.print(display.bar)
                drawn = True

        say(f"$ {COMMAND}", style="bold")
        summary = screen_in_process(
            Settings(manifest=manifest, bundle=bundle, output=results), watch=watch, say=say
        )
    show_summary(paper, summary)
    return paper.export_svg(title="engine.run", code_format=FORMAT)


def photograph(results: Path) -> bytes:
    """A PNG of the top of the report, and of the work list's."""
    from PIL import Image
    from selenium import webdriver

    from engine.report.render import write_report

    write_report(results, thumbnails=8)
    options = webdriver.ChromeOptions()
    for option in BROWSER:
        options.add_argument(option)
    # named, so that selenium looks for neither elsewhere
    options.binary_location = shutil.which("chromium") or ""
    service = webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
    browser = webdriver.Chrome(options=options, service=service)
    try:
        browser.set_window_size(*WINDOW)
        browser.get((results / "report.html").absolute().as_uri())
        top = browser.get_screenshot_as_png()
        browser.execute_script("document.getElementById('work').closest('section').scrollIntoView()")
        below = browser.get_screenshot_as_png()
    finally:
        browser.quit()
    shots = [Image.open(io.BytesIO(shot)) for shot in (top, below)]
    both = Image.new("RGB", (sum(shot.width for shot in shots), shots[0].height))
    for shot, left in zip(shots, (0, shots[0].width), strict=True):
        both.paste(shot, (left, 0))
    written = io.BytesIO()
    both.quantize(128).save(written, "png", optimize=True)
    return written.getvalue()


def main() -> int:
    try:
        given = option_parser().parse_args()
        with TemporaryDirectory() as scratch:
            results = Path(scratch, "results")
            (HERE / "run.svg").write_text(draw(given.manifest, given.bundle, results))
            (HERE / "report.png").write_bytes(photograph(results))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
