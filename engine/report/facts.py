"""Collect the numbers and words of a run's page from the totals and from the run's records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
from msgspec.structs import asdict

from engine.core.json_records import to_builtins
from engine.core.records import PartInfo, Status
from engine.core.redaction import redact_line
from engine.report.aggregate import BINS, SAMPLE_ROWS, LabelledSample, ReportSchema, ReportTotals
from engine.report.bars import draw_bars
from engine.report.page import count_noun, format_count, format_number, format_option, format_percent
from engine.results import MergedRecord, ResultsFolder
from engine.runs.run_record import RunRecord
from engine.runs.summary import LastStart, Success

MAX_TEXT = 240  # characters of a path, error or label
MAX_EXAMPLES = 3  # reasons of each status
MAX_CHARTS = 24  # histograms
MAX_MATRIX_CLASSES = 20  # a larger matrix is not readable
MAX_MATRICES = 6  # of pairs of members; also the number of members beside the ensemble
PAUSE_S = 60.0  # minimum time without a finished part that counts as a pause of the run
CHART_PARTS = 4  # minimum of parts for a chart of throughput over time
RESAMPLES = 1000, 200  # of the bootstrap, for few and for many rows
TRIAGE = ("refer", "gray_zone", "rule_out")
STAGES = {
    "read": "reading files",
    "preprocess": "decoding and resizing",
    "members": "the networks",
    "write": "writing results",
}


def report_facts(
    results: ResultsFolder, success: Success | None, schema: ReportSchema, totals: ReportTotals
) -> dict[str, Any]:
    """Return all values of the page except pictures, for the template. Names in them are not escaped."""
    run = results.first
    redacted = any(each.result_options.redacted_by for each in results.runs.values())
    points = _points(run)
    return {
        "title": "Merged screening results" if isinstance(results.run, MergedRecord) else "Screening report",
        "lede": _lead_text(results, success),
        "unfinished": None
        if results.finished
        else f"{format_count(totals.rows)} of {format_count(results.run.rows)} rows are done",
        "redacted": redacted,
        "classes": list(schema.classes),
        "members": list(schema.members),
        "target": schema.target,
        "groups": {name: list(parts) for name, parts in schema.groups.items()},
        "cards": _cards(totals),
        "statuses": _statuses(totals, hide=redacted),
        "flags": _shares(totals.flags, totals.rows),
        "predicted": _shares({name: totals.by_class[name] for name in schema.classes}, totals.scored),
        "triage": _triage(totals, points),
        "labels": _label_figures(schema, totals),
        "charts": [_chart(name, totals, points) for name in schema.scores[:MAX_CHARTS]],
        "more_charts": schema.scores[MAX_CHARTS:],
        "agreement": _agreement(schema, totals),
        "disagreement": _disagreement(totals),
        "work": _work_list(schema, totals),
        "throughput": throughput(run.began, results.done) if results.run is run else None,
        "stages": _stages(success.last_start) if success else None,
        "runs": [_provenance(each, hide=redacted) for each in results.runs.values()],
        "made": _format_time(datetime.now(UTC)),
    }


def _lead_text(results: ResultsFolder, success: Success | None) -> str:
    run = results.run
    if isinstance(run, MergedRecord):
        return f"{count_noun(len(run.runs), 'run')}, joined {_format_time(run.merged)}"
    ended = f", finished {_format_time(success.finished)}" if success else ""
    return f"Run {run.run_id[:8]}, started {_format_time(run.started)}{ended}"


def _format_time(when: str | datetime) -> str:
    moment = datetime.fromisoformat(when) if isinstance(when, str) else when
    return f"{moment.astimezone(UTC):%-d %B %Y, %H:%M} UTC"


def shorten(text: str | None) -> str | None:
    """Replace the middle of a text that is too long for a page."""
    if text is None or len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT // 2]} … {text[-MAX_TEXT // 3 :]}"


def _cards(totals: ReportTotals) -> list[tuple[str, int, str]]:
    """Return the name, number and CSS class of each card."""
    skipped = totals.by_status[Status.SKIPPED.label]
    failed = totals.rows - totals.scored - skipped
    return [
        ("rows", totals.rows, ""),
        ("scored", totals.scored, ""),
        ("skipped", skipped, "soft" if not skipped else ""),
        ("failed", failed, "alert" if failed else "soft"),
    ]


def _shares(counts: Mapping[str, int], total: int) -> list[dict[str, Any]]:
    return [{"name": name, "count": count, "share": count / max(1, total)} for name, count in counts.items()]


def _statuses(totals: ReportTotals, *, hide: bool) -> list[dict[str, Any]]:
    """List each status except `ok` with its most frequent reasons, the most frequent first."""
    statuses = []
    for status in _shares(dict(totals.by_status.most_common()), totals.rows):
        if status["name"] == Status.OK.label:
            continue
        reasons = sorted(totals.reasons.get(status["name"], {}).items(), key=lambda pair: -pair[1].rows)
        status["reasons"] = [
            {
                "text": shorten(redact_line(error) if hide else error),
                "count": reason.rows,
                "row": reason.row,
                "path": shorten(reason.path),
            }
            for error, reason in reasons[:MAX_EXAMPLES]
        ]
        status["others"] = status["count"] - sum(reason["count"] for reason in status["reasons"])
        statuses.append(status)
    return statuses


def display_word(word: str) -> str:
    """Return a value of the results as words."""
    return word.replace("_", " ")


def _points(run: RunRecord) -> dict[str, Any]:
    """Return the thresholds of the bundle's operating points, if it has any."""
    points = run.operating_points
    if not points:
        return {"target": None, "marks": []}
    return {"target": points.target, "marks": [points.rule_out.below, points.refer.above]}


def _triage(totals: ReportTotals, points: Mapping[str, Any]) -> dict[str, Any] | None:
    if not totals.triage and not totals.abstained:
        return None
    order = [*TRIAGE, *sorted(set(totals.triage) - set(TRIAGE))]
    return {
        "zones": _shares({name: totals.triage[name] for name in order}, totals.scored),
        "marks": points["marks"],
        "abstained": totals.abstained,
        "share": totals.abstained / max(1, totals.scored),
        "reasons": _shares(dict(totals.abstain_reasons.most_common()), totals.scored),
    }


def _chart(name: str, totals: ReportTotals, points: Mapping[str, Any]) -> dict[str, Any]:
    counts = totals.histograms[name]
    edges = np.linspace(0, 1, BINS + 1)
    titles = [
        f"{low:.2f} to {high:.2f}: {count_noun(int(count), 'row')}"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    marks = points["marks"] if name == points["target"] else []
    ticks = {0.0: "0", 0.5: "0.5", 1.0: "1"}
    chart = draw_bars(counts.tolist(), titles, ticks=ticks, top=format_count(int(counts.max())), marks=marks)
    return {"name": name, "above": int(counts[BINS // 2 :].sum()), "chart": chart, "marks": marks}


def _agreement(schema: ReportSchema, totals: ReportTotals) -> list[dict[str, Any]]:
    """Return for each pair of members how often they agree, and the counts of their classes."""
    show = len(schema.classes) <= MAX_MATRIX_CLASSES
    return [
        {
            "members": list(pair),
            "share": float(np.trace(counts) / max(1, counts.sum())),
            "counts": counts.tolist() if show and index < MAX_MATRICES else None,
        }
        for index, (pair, counts) in enumerate(totals.agreement.items())
        if counts.sum()
    ]


def _disagreement(totals: ReportTotals) -> dict[str, Any] | None:
    """Draw the histogram of disagreement up to a limit that includes nearly all rows."""
    if totals.disagreement is None:
        return None
    counts = totals.disagreement
    step = totals.max_disagreement / len(counts)
    below = np.searchsorted(counts.cumsum(), 0.995 * counts.sum()) + 1
    fine_bins = max(1, math.ceil(below / BINS))  # in a bar
    bar_count = math.ceil(below / fine_bins)
    padded = np.zeros(bar_count * fine_bins, np.int64)
    padded[: min(len(counts), len(padded))] = counts[: len(padded)]
    heights = padded.reshape(bar_count, fine_bins).sum(axis=1)
    width = fine_bins * step
    top = bar_count * width
    titles = [
        f"{bar * width:.3f} to {(bar + 1) * width:.3f} bits: {count_noun(int(height), 'row')}"
        for bar, height in enumerate(heights)
    ]
    ticks = {0.0: "0", 0.5: f"{top / 2:.2g}", 1.0: f"{top:.2g} bits"}
    return {
        "chart": draw_bars(heights.tolist(), titles, ticks=ticks, top=format_count(int(heights.max()))),
        "beyond": int(counts.sum() - heights.sum()),
    }


def _work_list(schema: ReportSchema, totals: ReportTotals) -> dict[str, Any]:
    scores = list(dict.fromkeys((schema.target, *schema.groups)))
    risky = {row["row"] for row in totals.risk.rows()}
    abstained = {row["row"] for row in totals.abstaining.rows()}
    rows = totals.listed()
    for row in rows:
        row["lists"] = ["risk"] * (row["row"] in risky) + ["abstained"] * (row["row"] in abstained)
        row |= {"path": shorten(row["path"])} | {
            name: row.get(name) for name in ("triage", "abstain_reasons", "flags", "member_disagreement")
        }
        row["scores"] = [row[f"p_{name}"] for name in scores]
        row["label"] = shorten(_format_value(row.get(schema.label))) if schema.label else None
    return {
        "rows": rows,
        "risk": len(risky),
        "abstained": len(abstained),
        "scores": scores,
        "has": {
            "triage": bool(totals.triage),
            "abstain": bool(totals.abstained),
            "member_disagreement": "member_disagreement" in totals.risk.columns,
        },
        "label": schema.label,
        "choices": {
            "prediction": sorted({row["prediction"] for row in rows} - {None}),
            "triage": sorted({row.get("triage") for row in rows} - {None}),
            "flags": sorted({flag for row in rows for flag in row.get("flags") or ()}),
        },
    }


def _format_value(value: Any) -> str | None:
    return None if value is None else str(value)


# Against the labels


def _label_figures(schema: ReportSchema, totals: ReportTotals) -> dict[str, Any] | None:
    """Return the figures of ensemble and members on the rows with a known label; None without such rows."""
    labelled = totals.labelled
    if not labelled.rows:
        return None
    from engine.report.curves import draw_reliability, draw_roc, plot_svg
    from engine.stats.metrics import evaluate  # scikit-learn takes a second to import

    truth, votes = labelled.sample()
    resamples = RESAMPLES[len(truth) > SAMPLE_ROWS // 4]
    names = ["ensemble", *schema.members]
    rows = np.arange(len(truth))
    voters = {
        name: evaluate(
            votes[:, index], truth, classes=schema.classes, groups=rows, seed=0, resamples=resamples
        )
        for index, name in enumerate(names[: 1 + MAX_MATRICES])
    }
    ensemble = voters["ensemble"]
    return {
        "column": schema.label,
        "voters": voters,
        "rows": len(truth),
        "all_rows": labelled.rows,
        "notes": _notes(labelled, totals.names.aliases_used(), ensemble["per_class"]),
        "show_matrix": len(schema.classes) <= MAX_MATRIX_CLASSES,
        "roc": plot_svg("roc", "ROC curves", lambda figure: draw_roc(figure, ensemble["roc"])),
        "reliability": plot_svg(
            "reliability",
            "Reliability diagram",
            lambda figure: draw_reliability(figure, ensemble["reliability"], len(schema.classes)),
        ),
    }


def _notes(labelled: LabelledSample, aliases_used: list[str], per_class: Mapping[str, Any]) -> list[str]:
    notes = []
    if absent := [name for name, figures in per_class.items() if not figures["images"]]:
        notes.append(f"No row has the label {' or '.join(absent)}, which counts as 0 in the means.")
    if aliases_used:
        notes.append(f"Other names of labels: {', '.join(aliases_used)}.")
    scored, labels, others, unknown = labelled.rows, labelled.labels, labelled.others, labelled.unknown
    if labels > scored:
        notes.append(f"Not counted: {count_noun(labels - scored, 'row')} with a label but without a score.")
    if others:
        words = ", ".join(str(shorten(word)) for word, _ in unknown.most_common(MAX_EXAMPLES))
        notes.append(f"{count_noun(others, 'row')} with a label that is not a class, such as: {words}.")
    return notes


# Time


def format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{format_count(hours)} h {minutes:02} min"


def _format_rate(value: float) -> str:
    return format_count(round(value)) if value >= 100 else f"{value:.3g}"


def throughput(began: datetime, done: Iterable[PartInfo]) -> dict[str, Any] | None:
    """Return the rows per second without pauses, from the times at which the parts were written.

    None for runs of versions that did not record these times.
    """
    written = sorted((part.written, part.rows) for part in done if part.written)
    if not written:
        return None
    times = np.array([(moment - began).total_seconds() for moment, _ in written])
    gaps = np.maximum(np.diff(times, prepend=0.0), 1e-3)
    typical = float(statistics.median(gaps))
    paused = gaps > max(PAUSE_S, 10 * typical)
    paused[0] = False  # the first part has no other time
    clock = np.where(paused, typical, gaps).cumsum()
    rows = np.cumsum([count for _, count in written])
    rate = _format_rate(rows[-1] / clock[-1])
    row_count, duration = count_noun(int(rows[-1]), "row"), format_duration(clock[-1])
    text = f"{row_count} in {duration}, including start-up: {rate} per second"
    if pauses := int(paused.sum()):
        total = format_duration(float(gaps[paused].sum()))
        text += f"; without {count_noun(pauses, 'pause')} of {total} in total"
    if len(written) < CHART_PARTS:
        return {"text": f"{text}.", "chart": None}
    edges = np.linspace(0, clock[-1], min(60, len(written)) + 1)
    rates = np.diff(np.interp(edges, [0, *clock], [0, *rows])) / np.diff(edges)
    titles = [
        f"{format_duration(low)} to {format_duration(high)}: {_format_rate(rate)} rows/s"
        for low, high, rate in zip(edges, edges[1:], rates, strict=False)
    ]
    ticks = {0.0: "0", 0.5: format_duration(edges[-1] / 2), 1.0: format_duration(edges[-1])}
    chart = draw_bars(
        rates.tolist(), titles, ticks=ticks, top=f"{_format_rate(max(rates))} rows/s", width=420
    )
    return {"text": f"{text}.", "chart": chart}


def _stages(last: LastStart) -> dict[str, Any] | None:
    """Return the times of the stages in the last start, and which stage limited it."""
    if not last.stages:
        return None
    stages = last.stages
    order = sorted(stages, key=lambda name: -stages[name].occupancy)
    first, share = order[0], stages[order[0]].occupancy
    busiest = f"{STAGES.get(first, first)} ({first})"
    text = f"{busiest} limited the run: busy for {format_percent(share)} of the time"
    if share < 0.6:
        text = f"no stage was busy most of the time; the busiest was {busiest} with {format_percent(share)}"
    if len(order) > 1:
        text += f". The next, {order[1]}, was busy for {format_percent(stages[order[1]].occupancy)}"
    return {
        "text": f"{text[0].upper()}{text[1:]}.",
        "rows": last.rows,
        "elapsed": format_duration(last.elapsed_s),
        "table": [
            {"name": name, "about": STAGES.get(name, ""), **asdict(times)} for name, times in stages.items()
        ],
        "restarts": last.decoder_restarts,
    }


# Where the rows come from


def _provenance(run: RunRecord, *, hide: bool) -> dict[str, Any]:
    """Return names and values of `_run.json`; for a redacted run without values that may contain a path."""
    options = {
        name: value
        for name, value in to_builtins(run.result_options).items()
        if not (hide and name in ("root", "include", "exclude"))
    }
    plans = options.pop("plans", None) or {}
    machine, chosen = run.machine, run.chosen
    basics = {
        "run": run.run_id,
        "started": _format_time(run.started),
        "manifest": shorten(run.manifest),
        "rows": format_count(run.rows),
        "bundle": shorten(run.bundle),
        "bundle, sha256": options.pop("bundle_sha256", None),
        "weights": ", ".join(f"{name} {format_number(weight, 2)}" for name, weight in run.weights.items()),
        **{f"plan of {name}, sha256": digest for name, digest in plans.items()},
        "runner": redact_line(chosen) if hide and chosen else chosen,
        "system": machine and machine.system,
        "processor": machine and machine.processor,
        "GPU": machine and machine.gpu and machine.gpu.name,
    }
    return {
        "run": run.run_id,
        "basics": {name: value for name, value in basics.items() if value not in (None, "")},
        "operating_points": _flatten(to_builtins(run.operating_points or {})),
        "versions": run.versions,
        "options": options | {f"tuned {name}": value for name, value in to_builtins(run.tuning).items()},
    }


def _round_digits(value: Any) -> Any:
    """Round to three digits."""
    if isinstance(value, list | tuple):
        return [_round_digits(entry) for entry in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested values; join their names by dots."""
    if not isinstance(tree, Mapping):
        return {name: _round_digits(tree)}
    if {"value", "low", "high"} <= tree.keys():
        value, low, high = (format_option(_round_digits(tree[key])) for key in ("value", "low", "high"))
        return {name: f"{value} ({low} to {high})"}
    branches = [_flatten(value, f"{name}.{key}" if name else str(key)) for key, value in tree.items()]
    return {key: value for branch in branches for key, value in branch.items()}
