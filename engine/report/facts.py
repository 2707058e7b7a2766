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

MAX_TEXT = 240  # characters of a path, error or label that are shown
MAX_EXAMPLES = 3  # reasons of each status
MAX_CHARTS = 24  # histograms
MAX_MATRIX_CLASSES = 20  # more make no readable matrix
MAX_MATRICES = 6  # of pairs of members; as many members stand beside the ensemble, too
PAUSE_S = 60.0  # without a finished part, and longer than usual: the run was stopped
CHART_PARTS = 4  # fewer say nothing of throughput over time
RESAMPLES = 1000, 200  # of the bootstrap, for few and for many rows
TRIAGE = ("refer", "gray_zone", "rule_out")
STAGES = {
    "read": "reading files",
    "preprocess": "decoding and resizing",
    "members": "the networks",
    "write": "writing results",
}


def report_facts(
    results: ResultsFolder, success: Success | None, shape: ReportSchema, totals: ReportTotals
) -> dict[str, Any]:
    """Everything on the page but its pictures, for the template. Names in it may hold anything."""
    run = results.first
    redacted = any(one.result_options.redacted_by for one in results.runs.values())
    wanted = results.run.rows
    points = _points(run)
    return {
        "title": "Merged screening results" if isinstance(results.run, MergedRecord) else "Screening report",
        "lede": _lead_text(results, success),
        "unfinished": None
        if results.finished
        else f"{format_count(totals.rows)} of {format_count(wanted)} rows are there",
        "redacted": redacted,
        "classes": list(shape.classes),
        "members": list(shape.members),
        "target": shape.target,
        "groups": {name: list(parts) for name, parts in shape.groups.items()},
        "cards": _cards(totals),
        "statuses": _statuses(totals, hide=redacted),
        "flags": _percentages(totals.flags, totals.rows),
        "predicted": _percentages({name: totals.by_class[name] for name in shape.classes}, totals.scored),
        "triage": _triage(totals, points),
        "labels": _label_figures(shape, totals),
        "charts": [_chart(name, totals, points) for name in shape.scores[:MAX_CHARTS]],
        "more_charts": shape.scores[MAX_CHARTS:],
        "agreement": _agreement(shape, totals),
        "disagreement": _disagreement(totals),
        "work": _progress_facts(shape, totals),
        "throughput": throughput(run.began, results.done) if results.run is run else None,
        "stages": _stages(success.last_start) if success else None,
        "runs": [_provenance(one, hide=redacted) for one in results.runs.values()],
        "made": _format_time(datetime.now(UTC)),
    }


def _lead_text(results: ResultsFolder, success: Success | None) -> str:
    run = results.run
    if isinstance(run, MergedRecord):
        return f"{count_noun(len(run.runs), 'run')}, joined {_format_time(run.merged)}"
    ended = f", finished {_format_time(success.finished)}" if success else ""
    return f"Run {run.run_id[:8]}, begun {_format_time(run.started)}{ended}"


def _format_time(when: str | datetime) -> str:
    moment = datetime.fromisoformat(when) if isinstance(when, str) else when
    return f"{moment.astimezone(UTC):%-d %B %Y, %H:%M} UTC"


def shorten(text: str | None) -> str | None:
    """Replace the middle of a text that is too long for a page."""
    if text is None or len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT // 2]} … {text[-MAX_TEXT // 3 :]}"


def _cards(totals: ReportTotals) -> list[tuple[str, int, str]]:
    """Name, number, kind."""
    skipped = totals.by_status[Status.SKIPPED.label]
    failed = totals.rows - totals.scored - skipped
    return [
        ("rows", totals.rows, ""),
        ("scored", totals.scored, ""),
        ("skipped", skipped, "soft" if not skipped else ""),
        ("failed", failed, "alert" if failed else "soft"),
    ]


def _percentages(counts: Mapping[str, int], whole: int) -> list[dict[str, Any]]:
    return [{"name": name, "count": found, "share": found / max(1, whole)} for name, found in counts.items()]


def _statuses(totals: ReportTotals, *, hide: bool) -> list[dict[str, Any]]:
    """List each status but `ok`, the commonest first, with its commonest reasons."""
    found = []
    for one in _percentages(dict(totals.by_status.most_common()), totals.rows):
        if one["name"] == Status.OK.label:
            continue
        reasons = sorted(totals.reasons.get(one["name"], {}).items(), key=lambda pair: -pair[1].rows)
        one["reasons"] = [
            {
                "text": shorten(redact_line(error) if hide else error),
                "count": reason.rows,
                "row": reason.row,
                "path": shorten(reason.path),
            }
            for error, reason in reasons[:MAX_EXAMPLES]
        ]
        one["others"] = one["count"] - sum(reason["count"] for reason in one["reasons"])
        found.append(one)
    return found


def display_word(word: str) -> str:
    """Return a value of the results in words for people."""
    return word.replace("_", " ")


def _points(run: RunRecord) -> dict[str, Any]:
    """Return the thresholds of the bundle's operating points, if it has any."""
    points = run.operating_points or {}
    rule_out, refer = (
        (points.get(name) or {}).get(side) for name, side in (("rule_out", "below"), ("refer", "above"))
    )
    return {"target": points.get("target"), "marks": [one for one in (rule_out, refer) if one is not None]}


def _triage(totals: ReportTotals, points: Mapping[str, Any]) -> dict[str, Any] | None:
    if not totals.triage and not totals.abstained:
        return None
    order = [*TRIAGE, *sorted(set(totals.triage) - set(TRIAGE))]
    return {
        "zones": _percentages({name: totals.triage[name] for name in order}, totals.scored),
        "marks": points["marks"],
        "abstained": totals.abstained,
        "share": totals.abstained / max(1, totals.scored),
        "reasons": _percentages(dict(totals.abstain_reasons.most_common()), totals.scored),
    }


def _chart(name: str, totals: ReportTotals, points: Mapping[str, Any]) -> dict[str, Any]:
    counts = totals.histograms[name]
    edges = np.linspace(0, 1, BINS + 1)
    titles = [
        f"{low:.2f} to {high:.2f}: {count_noun(int(found), 'row')}"
        for low, high, found in zip(edges, edges[1:], counts, strict=False)
    ]
    marks = points["marks"] if name == points["target"] else []
    ticks = {0.0: "0", 0.5: "0.5", 1.0: "1"}
    chart = draw_bars(counts.tolist(), titles, ticks=ticks, top=format_count(int(counts.max())), marks=marks)
    return {"name": name, "above": int(counts[BINS // 2 :].sum()), "chart": chart, "marks": marks}


def _agreement(shape: ReportSchema, totals: ReportTotals) -> list[dict[str, Any]]:
    """Count for each pair of members how often both name the same class, and which classes they name."""
    show = len(shape.classes) <= MAX_MATRIX_CLASSES
    return [
        {
            "members": list(pair),
            "share": float(np.trace(counts) / max(1, counts.sum())),
            "counts": counts.tolist() if show and place < MAX_MATRICES else None,
        }
        for place, (pair, counts) in enumerate(totals.agreement.items())
        if counts.sum()
    ]


def _disagreement(totals: ReportTotals) -> dict[str, Any] | None:
    """Draw the histogram of disagreement, cut where nearly all rows are below."""
    if totals.disagreement is None:
        return None
    counts = totals.disagreement
    step = totals.most_disagreement / len(counts)
    below = np.searchsorted(counts.cumsum(), 0.995 * counts.sum()) + 1
    joined = max(1, math.ceil(below / BINS))  # fine bins a bar
    bars_shown = math.ceil(below / joined)
    padded = np.zeros(bars_shown * joined, np.int64)
    padded[: min(len(counts), len(padded))] = counts[: len(padded)]
    shown = padded.reshape(bars_shown, joined).sum(axis=1)
    top = bars_shown * joined * step
    titles = [
        f"{place * joined * step:.3f} to {(place + 1) * joined * step:.3f} bits: "
        f"{count_noun(int(found), 'row')}"
        for place, found in enumerate(shown)
    ]
    ticks = {0.0: "0", 0.5: f"{top / 2:.2g}", 1.0: f"{top:.2g} bits"}
    beyond = int(counts.sum() - shown.sum())
    return {
        "chart": draw_bars(shown.tolist(), titles, ticks=ticks, top=format_count(int(shown.max()))),
        "beyond": beyond,
    }


def _progress_facts(shape: ReportSchema, totals: ReportTotals) -> dict[str, Any]:
    scores = list(dict.fromkeys((shape.target, *shape.groups)))
    risky = {row["row"] for row in totals.risk.rows()}
    abstained = {row["row"] for row in totals.abstaining.rows()}
    rows = totals.listed()
    for row in rows:
        row["lists"] = ["risk"] * (row["row"] in risky) + ["abstained"] * (row["row"] in abstained)
        row |= {"path": shorten(row["path"])} | {
            name: row.get(name) for name in ("triage", "abstain_reasons", "flags", "member_disagreement")
        }
        row["scores"] = [row[f"p_{name}"] for name in scores]
        row["label"] = shorten(_format_value(row.get(shape.label))) if shape.label else None
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
        "label": shape.label,
        "choices": {
            "prediction": sorted({row["prediction"] for row in rows} - {None}),
            "triage": sorted({row.get("triage") for row in rows} - {None}),
            "flags": sorted({flag for row in rows for flag in row.get("flags") or ()}),
        },
    }


def _format_value(value: Any) -> str | None:
    return None if value is None else str(value)


# Against the labels


def _label_figures(shape: ReportSchema, totals: ReportTotals) -> dict[str, Any] | None:
    """Figures of ensemble and members on the rows whose label is a class; None where there are none."""
    labelled = totals.labelled
    if not labelled.rows:
        return None
    from engine.report.curves import draw_reliability, draw_roc, plot_svg
    from engine.stats.metrics import evaluate  # scikit-learn takes a second to import

    truth, votes = labelled.sample()
    resamples = RESAMPLES[len(truth) > SAMPLE_ROWS // 4]
    names = ["ensemble", *shape.members]
    rows = np.arange(len(truth))
    voters = {
        name: evaluate(
            votes[:, place], truth, classes=shape.classes, groups=rows, seed=0, resamples=resamples
        )
        for place, name in enumerate(names[: 1 + MAX_MATRICES])
    }
    ensemble = voters["ensemble"]
    return {
        "column": shape.label,
        "voters": voters,
        "rows": len(truth),
        "all_rows": labelled.rows,
        "notes": _notes(labelled, totals.names.aliases_used(), ensemble["per_class"]),
        "show_matrix": len(shape.classes) <= MAX_MATRIX_CLASSES,
        "roc": plot_svg("roc", "ROC curves", lambda drawn: draw_roc(drawn, ensemble["roc"])),
        "reliability": plot_svg(
            "reliability",
            "Reliability diagram",
            lambda drawn: draw_reliability(drawn, ensemble["reliability"], len(shape.classes)),
        ),
    }


def _notes(labelled: LabelledSample, aliases_used: list[str], per_class: Mapping[str, Any]) -> list[str]:
    notes = []
    if absent := [name for name, found in per_class.items() if not found["images"]]:
        notes.append(f"No row here has the label {' or '.join(absent)}, which counts as 0 in the means.")
    if aliases_used:
        notes.append(f"Labels were read so: {', '.join(aliases_used)}.")
    scored, labels, others, unknown = labelled.rows, labelled.labels, labelled.others, labelled.unknown
    if labels > scored:
        notes.append(
            f"Not counted, since they have no score: {count_noun(labels - scored, 'row')} with a label."
        )
    if others:
        words = ", ".join(str(shorten(word)) for word, _ in unknown.most_common(MAX_EXAMPLES))
        notes.append(f"Labels that are no class, of {count_noun(others, 'row')}, such as: {words}.")
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
    """Rows a second while the run was at work, from the times at which its parts were written.

    None for runs of versions that kept no times.
    """
    written = sorted((one.written, one.rows) for one in done if one.written)
    if not written:
        return None
    at = np.array([(moment - began).total_seconds() for moment, _ in written])
    gaps = np.maximum(np.diff(at, prepend=0.0), 1e-3)
    usual = float(statistics.median(gaps))
    stopped = gaps > max(PAUSE_S, 10 * usual)
    stopped[0] = False  # its own time is all that the first part has
    clock = np.where(stopped, usual, gaps).cumsum()
    rows = np.cumsum([found for _, found in written])
    rate = _format_rate(rows[-1] / clock[-1])
    pauses = int(stopped.sum())
    text = (
        f"{count_noun(int(rows[-1]), 'row')} in {format_duration(clock[-1])}, start-up included: {rate} a "
        "second"
    )
    if pauses:
        text += (
            f"; {count_noun(pauses, 'pause')} of {format_duration(float(gaps[stopped].sum()))} in all "
            "left out"
        )
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
    """Return how the last start spent its time and which stage limited it."""
    if not last.stages:
        return None
    stages = last.stages
    order = sorted(stages, key=lambda name: -stages[name].occupancy)
    first, share = order[0], stages[order[0]].occupancy
    busiest = f"{STAGES.get(first, first)} ({first})"
    text = f"{busiest} limited the run: at work {format_percent(share)} of the time"
    if share < 0.6:
        text = (
            f"no stage was at work most of the time; the busiest was {busiest}, {format_percent(share)} of it"
        )
    if len(order) > 1:
        text += f". The next, {order[1]}, was for {format_percent(stages[order[1]].occupancy)}"
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
    """Return names and values of `_run.json`, for a redacted run without anything that could be a path."""
    options = {
        name: value
        for name, value in to_builtins(run.result_options).items()
        if not (hide and name in ("root", "include", "exclude"))
    }
    plans = options.pop("plans", None) or {}
    machine, chosen = run.machine, run.chosen
    basics = {
        "run": run.run_id,
        "begun": _format_time(run.started),
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
        "operating_points": _flatten(run.operating_points or {}),
        "versions": run.versions,
        "options": options | {f"tuned {name}": value for name, value in to_builtins(run.tuning).items()},
    }


def _round_digits(value: Any) -> Any:
    """Round to three digits."""
    if isinstance(value, list):
        return [_round_digits(one) for one in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _flatten(found: Any, name: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    if not isinstance(found, Mapping):
        return {name: _round_digits(found)}
    if {"value", "low", "high"} <= found.keys():
        value, low, high = (format_option(_round_digits(found[key])) for key in ("value", "low", "high"))
        return {name: f"{value} ({low} to {high})"}
    joined = [_flatten(value, f"{name}.{key}" if name else str(key)) for key, value in found.items()]
    return {key: value for one in joined for key, value in one.items()}
