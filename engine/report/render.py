"""`report.html`: a run's results on one page that needs nothing but a browser; every run writes one."""

from __future__ import annotations

import base64
import hashlib

from engine.core.deadline import Deadline
from engine.core.errors import EngineError, UsageError
from engine.core.location import Location
from engine.core.records import OnMessage
from engine.results import MergedRecord, ResultsFolder, open_results_folder
from engine.runs.run_folder import REPORT_FILE, SUCCESS_FILE
from engine.runs.summary import Success
from engine.storage.folders import error_text

DEFAULT_ROWS = 200  # of each list


def write_report(
    place: Location,
    *,
    rows: int = DEFAULT_ROWS,
    thumbnails: int = 0,
    label_column: str | None = None,
    unfinished: bool = False,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
) -> Location:
    """Make the page of the results in `place`, a run's or merged ones, and put it there; returns its place.

    `rows` is how many of the riskiest and of the abstained rows are listed, `thumbnails` how many of these
    get a picture. `label_column` has the true class (a column `label` is found by itself). `say` gets what
    had to be left out.
    Raises UsageError for an unfinished run (unless `unfinished`), thumbnails of a redacted one, and a label
    column that is not there or names no class; EngineError when storage fails, and at `deadline`.
    """
    results = open_results_folder(place, unfinished=unfinished)
    if thumbnails and any(run.result_options.redacted_by for run in results.runs.values()):
        raise UsageError(f"results {place}: a run with --redact shows no pictures; leave --thumbnails out")
    try:
        html = render_report(
            results, rows=rows, thumbnails=thumbnails, label_column=label_column, say=say, deadline=deadline
        )
        results.files.write(REPORT_FILE, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"{place / REPORT_FILE}: {error_text(error)}") from None
    return place / REPORT_FILE


def render_report(
    results: ResultsFolder,
    *,
    rows: int,
    thumbnails: int,
    label_column: str | None,
    say: OnMessage,
    deadline: Deadline | None,
) -> str:
    from markupsafe import Markup

    from engine.report import pictures
    from engine.report.aggregate import ReportSchema, aggregate
    from engine.report.facts import display_word, report_facts
    from engine.report.page import TEMPLATES, make_environment, printable

    shape = ReportSchema.of(results, label_column)
    totals = aggregate(results, shape, listed=rows, deadline=deadline)
    if label_column is not None and totals.rows and not totals.labelled.labels:
        raise UsageError(
            f"--label-column {label_column}: no value is a class; allowed: {', '.join(shape.classes)}"
        )
    if totals.labelled.others and not totals.labelled.labels:
        say(f"no figures of merit: no value of column {shape.label!r} is a class")
    facts = printable(report_facts(results, _read_success(results), shape, totals))
    thumbs: dict[int, pictures.Picture] = {}
    method, explained = "", list[pictures.ExplainedRow]()
    if not facts["redacted"]:
        wanted = totals.listed()[:thumbnails]
        thumbs = pictures.read_thumbnails(results, wanted, say=say) if wanted else {}
        method, explained = pictures.read_explanations(results, say=say)
    script = (TEMPLATES / "page.js").read_text("utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = make_environment(spoken=display_word).get_template("page.html.j2")
    return template.render(
        **facts,
        thumbnails=thumbs,
        method=printable(method),
        explained=explained,
        explained_rows={one.row for one in explained},
        script=Markup(script),
        script_hash=digest,
    )


def _read_success(results: ResultsFolder) -> Success | None:
    """Read `_SUCCESS` of a finished run. Raises UsageError for one that this version can't read."""
    if not results.finished or isinstance(results.run, MergedRecord):
        return None
    try:
        return Success.parse(results.files.read(SUCCESS_FILE, lambda file: file.read()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(
            f"results {results.place}: {SUCCESS_FILE} can't be read: {error}; delete it and give the "
            "run's own "
            "command again"
        ) from None
