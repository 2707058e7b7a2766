"""`report.html`: a run's results on one page that needs nothing but a browser; every run writes one."""

from __future__ import annotations

import base64
import hashlib

from engine.core.deadline import Deadline
from engine.errors import EngineError, UsageError
from engine.job import Say
from engine.ledger import Success
from engine.results import MergedRecord, Results, opened
from engine.run_folder import REPORT, SUCCESS
from engine.storage.location import Place
from engine.store import reason

ROWS = 200  # of each list


def write(
    place: Place,
    *,
    rows: int = ROWS,
    thumbnails: int = 0,
    label_column: str | None = None,
    unfinished: bool = False,
    say: Say = lambda _: None,
    deadline: Deadline | None = None,
) -> Place:
    """Make the page of the results in `place`, a run's or merged ones, and put it there; returns its place.

    `rows` is how many of the riskiest and of the abstained rows are listed, `thumbnails` how many of these
    get a picture. `label_column` has the true class (a column `label` is found by itself). `say` gets what
    had to be left out.
    Raises UsageError for an unfinished run (unless `unfinished`), thumbnails of a redacted one, and a label
    column that is not there or names no class; EngineError when storage fails, and at `deadline`.
    """
    results = opened(place, unfinished=unfinished)
    if thumbnails and any(run.result_options.redacted_by for run in results.runs.values()):
        raise UsageError(f"results {place}: a run with --redact shows no pictures; leave --thumbnails out")
    try:
        html = render(
            results, rows=rows, thumbnails=thumbnails, label_column=label_column, say=say, deadline=deadline
        )
        results.files.write(REPORT, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"{place / REPORT}: {reason(error)}") from None
    return place / REPORT


def render(
    results: Results,
    *,
    rows: int,
    thumbnails: int,
    label_column: str | None,
    say: Say,
    deadline: Deadline | None,
) -> str:
    from markupsafe import Markup

    from engine.report import pictures
    from engine.report.facts import facts_of, spoken
    from engine.report.gather import Shape, gather
    from engine.report.page import HERE, environment, printable

    shape = Shape.of(results, label_column)
    tally = gather(results, shape, listed=rows, deadline=deadline)
    if label_column is not None and tally.rows and not tally.labelled.labels:
        raise UsageError(
            f"--label-column {label_column}: no value is a class; allowed: {', '.join(shape.classes)}"
        )
    if tally.labelled.others and not tally.labelled.labels:
        say(f"no figures of merit: no value of column {shape.label!r} is a class")
    facts = printable(facts_of(results, _success(results), shape, tally))
    thumbs: dict[int, pictures.Picture] = {}
    method, explained = "", list[pictures.Explained]()
    if not facts["redacted"]:
        wanted = tally.listed()[:thumbnails]
        thumbs = pictures.thumbnails(results, wanted, say=say) if wanted else {}
        method, explained = pictures.explanations(results, say=say)
    script = (HERE / "page.js").read_text("utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment(spoken=spoken).get_template("page.html.j2")
    return template.render(
        **facts,
        thumbnails=thumbs,
        method=printable(method),
        explained=explained,
        explained_rows={one.row for one in explained},
        script=Markup(script),
        script_hash=digest,
    )


def _success(results: Results) -> Success | None:
    """Read `_SUCCESS` of a finished run. Raises UsageError for one that this version can't read."""
    if not results.finished or isinstance(results.run, MergedRecord):
        return None
    try:
        return Success.parse(results.files.read(SUCCESS, lambda file: file.read()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(
            f"results {results.place}: {SUCCESS} can't be read: {error}; delete it and give the run's own "
            "command again"
        ) from None
