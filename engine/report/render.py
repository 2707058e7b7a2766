"""Write `report.html`, which shows the results of a run on one page that needs no network."""

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
    location: Location,
    *,
    rows: int = DEFAULT_ROWS,
    thumbnails: int = 0,
    label_column: str | None = None,
    unfinished: bool = False,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
) -> Location:
    """Write the page of the results of a run, or merged ones, into their folder; return its location.

    `rows` is the length of the lists of the riskiest and of the abstained rows, and `thumbnails` the number
    of listed rows with a picture. `label_column` has the true class (default: `label`). `say` gets a line for
    each omission.
    Raises UsageError for an unfinished run (unless `unfinished`), thumbnails of a redacted one, and a label
    column that is missing or contains no class; EngineError if storage fails, and at `deadline`.
    """
    results = open_results_folder(location, unfinished=unfinished)
    if thumbnails and any(run.result_options.redacted_by for run in results.runs.values()):
        raise UsageError(f"results {location}: a run with --redact shows no pictures; leave out --thumbnails")
    try:
        html = render_report(
            results, rows=rows, thumbnails=thumbnails, label_column=label_column, say=say, deadline=deadline
        )
        results.files.write(REPORT_FILE, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"{location / REPORT_FILE}: {error_text(error)}") from None
    return location / REPORT_FILE


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

    schema = ReportSchema.of(results, label_column)
    totals = aggregate(results, schema, listed=rows, deadline=deadline)
    if label_column is not None and totals.rows and not totals.labelled.labels:
        raise UsageError(
            f"--label-column {label_column}: no value is a class; allowed: {', '.join(schema.classes)}"
        )
    if totals.labelled.others and not totals.labelled.labels:
        say(f"the report has no figures of merit: no value of column {schema.label!r} is a class")
    facts = printable(report_facts(results, _read_success(results), schema, totals))
    thumbnail_pictures: dict[int, pictures.Picture] = {}
    method, explained = "", list[pictures.ExplainedRow]()
    if not facts["redacted"]:
        pictured = totals.listed()[:thumbnails]
        thumbnail_pictures = pictures.read_thumbnails(results, pictured, say=say) if pictured else {}
        method, explained = pictures.read_explanations(results, say=say)
    script = (TEMPLATES / "page.js").read_text("utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = make_environment(spoken=display_word).get_template("page.html.j2")
    return template.render(
        **facts,
        thumbnails=thumbnail_pictures,
        method=printable(method),
        explained=explained,
        explained_rows={explanation.row for explanation in explained},
        script=Markup(script),
        script_hash=digest,
    )


def _read_success(results: ResultsFolder) -> Success | None:
    """Read `_SUCCESS` of a finished run. Raises UsageError if this version cannot read it."""
    if not results.finished or isinstance(results.run, MergedRecord):
        return None
    try:
        return Success.parse(results.files.read(SUCCESS_FILE, lambda file: file.read()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(
            f"results {results.place}: {SUCCESS_FILE} cannot be read: {error}; delete it and give the "
            "command of the run again"
        ) from None
