"""What a run's page says: the numbers of `gather` and of the run's own records, in order and in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
from msgspec.structs import asdict

from engine.core.json_records import to_builtins
from engine.ledger import LastStart, Success
from engine.privacy import scrubbed
from engine.provenance import RunRecord
from engine.records import Status
from engine.report.bars import bars
from engine.report.gather import BINS, SAMPLE, Labelled, Shape, Tally
from engine.report.page import count, counted, number, percent, shown
from engine.results import MergedRecord, Results
from engine.sink import Done

LONGEST = 240  # characters of a path, error or label that are shown
EXAMPLES = 3  # reasons of each status
CHARTS = 24  # histograms
MATRIX_CLASSES = 20  # more make no readable matrix
MATRICES = 6  # of pairs of members; as many members stand beside the ensemble, too
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


def facts_of(results: Results, success: Success | None, shape: Shape, tally: Tally) -> dict[str, Any]:
    """Everything on the page but its pictures, for the template. Names in it may hold anything."""
    run = results.first
    redacted = any(one.result_options.redacted_by for one in results.runs.values())
    wanted = results.run.rows
    points = _points(run)
    return {
        "title": "Merged screening results" if isinstance(results.run, MergedRecord) else "Screening report",
        "lede": _lede(results, success),
        "unfinished": None if results.finished else f"{count(tally.rows)} of {count(wanted)} rows are there",
        "redacted": redacted,
        "classes": list(shape.classes),
        "members": list(shape.members),
        "target": shape.target,
        "groups": {name: list(parts) for name, parts in shape.groups.items()},
        "cards": _cards(tally),
        "statuses": _statuses(tally, hide=redacted),
        "flags": _shares(tally.flags, tally.rows),
        "predicted": _shares({name: tally.by_class[name] for name in shape.classes}, tally.scored),
        "triage": _triage(tally, points),
        "labels": _labels(shape, tally),
        "charts": [_chart(name, tally, points) for name in shape.scores[:CHARTS]],
        "more_charts": shape.scores[CHARTS:],
        "agreement": _agreement(shape, tally),
        "disagreement": _disagreement(tally),
        "work": _work(shape, tally),
        "throughput": throughput(run.began, results.done) if results.run is run else None,
        "stages": _stages(success.last_start) if success else None,
        "runs": [_provenance(one, hide=redacted) for one in results.runs.values()],
        "made": _moment(datetime.now(UTC)),
    }


def _lede(results: Results, success: Success | None) -> str:
    run = results.run
    if isinstance(run, MergedRecord):
        return f"{counted(len(run.runs), 'run')}, joined {_moment(run.merged)}"
    ended = f", finished {_moment(success.finished)}" if success else ""
    return f"Run {run.run_id[:8]}, begun {_moment(run.started)}{ended}"


def _moment(when: str | datetime) -> str:
    moment = datetime.fromisoformat(when) if isinstance(when, str) else when
    return f"{moment.astimezone(UTC):%-d %B %Y, %H:%M} UTC"


def shortened(text: str | None) -> str | None:
    """Its middle is left out where it is too long for a page."""
    if text is None or len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} … {text[-LONGEST // 3 :]}"


def _cards(tally: Tally) -> list[tuple[str, int, str]]:
    """Name, number, kind."""
    skipped = tally.by_status[Status.SKIPPED.label]
    failed = tally.rows - tally.scored - skipped
    return [
        ("rows", tally.rows, ""),
        ("scored", tally.scored, ""),
        ("skipped", skipped, "soft" if not skipped else ""),
        ("failed", failed, "alert" if failed else "soft"),
    ]


def _shares(counts: Mapping[str, int], whole: int) -> list[dict[str, Any]]:
    return [{"name": name, "count": found, "share": found / max(1, whole)} for name, found in counts.items()]


def _statuses(tally: Tally, *, hide: bool) -> list[dict[str, Any]]:
    """Each status but `ok`, the commonest first, with its commonest reasons."""
    found = []
    for one in _shares(dict(tally.by_status.most_common()), tally.rows):
        if one["name"] == Status.OK.label:
            continue
        reasons = sorted(tally.reasons.get(one["name"], {}).items(), key=lambda pair: -pair[1].rows)
        one["reasons"] = [
            {
                "text": shortened(scrubbed(error) if hide else error),
                "count": reason.rows,
                "row": reason.row,
                "path": shortened(reason.path),
            }
            for error, reason in reasons[:EXAMPLES]
        ]
        one["others"] = one["count"] - sum(reason["count"] for reason in one["reasons"])
        found.append(one)
    return found


def spoken(word: str) -> str:
    """A value of the results as people say it."""
    return word.replace("_", " ")


def _points(run: RunRecord) -> dict[str, Any]:
    """The thresholds of the bundle's operating points, where it has some."""
    points = run.operating_points or {}
    rule_out, refer = (
        (points.get(name) or {}).get(side) for name, side in (("rule_out", "below"), ("refer", "above"))
    )
    return {"target": points.get("target"), "marks": [one for one in (rule_out, refer) if one is not None]}


def _triage(tally: Tally, points: Mapping[str, Any]) -> dict[str, Any] | None:
    if not tally.triage and not tally.abstained:
        return None
    order = [*TRIAGE, *sorted(set(tally.triage) - set(TRIAGE))]
    return {
        "zones": _shares({name: tally.triage[name] for name in order}, tally.scored),
        "marks": points["marks"],
        "abstained": tally.abstained,
        "share": tally.abstained / max(1, tally.scored),
        "reasons": _shares(dict(tally.abstain_reasons.most_common()), tally.scored),
    }


def _chart(name: str, tally: Tally, points: Mapping[str, Any]) -> dict[str, Any]:
    counts = tally.histograms[name]
    edges = np.linspace(0, 1, BINS + 1)
    titles = [
        f"{low:.2f} to {high:.2f}: {counted(int(found), 'row')}"
        for low, high, found in zip(edges, edges[1:], counts, strict=False)
    ]
    marks = points["marks"] if name == points["target"] else []
    ticks = {0.0: "0", 0.5: "0.5", 1.0: "1"}
    chart = bars(counts.tolist(), titles, ticks=ticks, top=count(int(counts.max())), marks=marks)
    return {"name": name, "above": int(counts[BINS // 2 :].sum()), "chart": chart, "marks": marks}


def _agreement(shape: Shape, tally: Tally) -> list[dict[str, Any]]:
    """Of each pair of members: how often both name the same class, and which they name."""
    show = len(shape.classes) <= MATRIX_CLASSES
    return [
        {
            "members": list(pair),
            "share": float(np.trace(counts) / max(1, counts.sum())),
            "counts": counts.tolist() if show and place < MATRICES else None,
        }
        for place, (pair, counts) in enumerate(tally.agreement.items())
        if counts.sum()
    ]


def _disagreement(tally: Tally) -> dict[str, Any] | None:
    """Its histogram, cut where nearly all rows are below."""
    if tally.disagreement is None:
        return None
    counts = tally.disagreement
    step = tally.most_disagreement / len(counts)
    below = np.searchsorted(counts.cumsum(), 0.995 * counts.sum()) + 1
    joined = max(1, math.ceil(below / BINS))  # fine bins a bar
    bars_shown = math.ceil(below / joined)
    padded = np.zeros(bars_shown * joined, np.int64)
    padded[: min(len(counts), len(padded))] = counts[: len(padded)]
    shown = padded.reshape(bars_shown, joined).sum(axis=1)
    top = bars_shown * joined * step
    titles = [
        f"{place * joined * step:.3f} to {(place + 1) * joined * step:.3f} bits: {counted(int(found), 'row')}"
        for place, found in enumerate(shown)
    ]
    ticks = {0.0: "0", 0.5: f"{top / 2:.2g}", 1.0: f"{top:.2g} bits"}
    beyond = int(counts.sum() - shown.sum())
    return {"chart": bars(shown.tolist(), titles, ticks=ticks, top=count(int(shown.max()))), "beyond": beyond}


def _work(shape: Shape, tally: Tally) -> dict[str, Any]:
    scores = list(dict.fromkeys((shape.target, *shape.groups)))
    risky = {row["row"] for row in tally.risk.rows()}
    abstained = {row["row"] for row in tally.abstaining.rows()}
    rows = tally.listed()
    for row in rows:
        row["lists"] = ["risk"] * (row["row"] in risky) + ["abstained"] * (row["row"] in abstained)
        row |= {"path": shortened(row["path"])} | {
            name: row.get(name) for name in ("triage", "abstain_reasons", "flags", "member_disagreement")
        }
        row["scores"] = [row[f"p_{name}"] for name in scores]
        row["label"] = shortened(_text(row.get(shape.label))) if shape.label else None
    return {
        "rows": rows,
        "risk": len(risky),
        "abstained": len(abstained),
        "scores": scores,
        "has": {
            "triage": bool(tally.triage),
            "abstain": bool(tally.abstained),
            "member_disagreement": "member_disagreement" in tally.risk.columns,
        },
        "label": shape.label,
        "choices": {
            "prediction": sorted({row["prediction"] for row in rows} - {None}),
            "triage": sorted({row.get("triage") for row in rows} - {None}),
            "flags": sorted({flag for row in rows for flag in row.get("flags") or ()}),
        },
    }


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


# Against the labels


def _labels(shape: Shape, tally: Tally) -> dict[str, Any] | None:
    """Figures of ensemble and members on the rows whose label is a class; None where there are none."""
    labelled = tally.labelled
    if not labelled.rows:
        return None
    from engine.evaluate import evaluate  # scikit-learn takes a second to import
    from engine.report.curves import draw_reliability, draw_roc, plot

    truth, votes = labelled.sample()
    resamples = RESAMPLES[len(truth) > SAMPLE // 4]
    names = ["ensemble", *shape.members]
    rows = np.arange(len(truth))
    voters = {
        name: evaluate(
            votes[:, place], truth, classes=shape.classes, groups=rows, seed=0, resamples=resamples
        )
        for place, name in enumerate(names[: 1 + MATRICES])
    }
    ensemble = voters["ensemble"]
    return {
        "column": shape.label,
        "voters": voters,
        "rows": len(truth),
        "all_rows": labelled.rows,
        "notes": _notes(labelled, tally.names.read_as(), ensemble["per_class"]),
        "show_matrix": len(shape.classes) <= MATRIX_CLASSES,
        "roc": plot("roc", "ROC curves", lambda drawn: draw_roc(drawn, ensemble["roc"])),
        "reliability": plot(
            "reliability",
            "Reliability diagram",
            lambda drawn: draw_reliability(drawn, ensemble["reliability"], len(shape.classes)),
        ),
    }


def _notes(labelled: Labelled, read_as: list[str], per_class: Mapping[str, Any]) -> list[str]:
    notes = []
    if absent := [name for name, found in per_class.items() if not found["images"]]:
        notes.append(f"No row here has the label {' or '.join(absent)}, which counts as 0 in the means.")
    if read_as:
        notes.append(f"Labels were read so: {', '.join(read_as)}.")
    scored, labels, others, unknown = labelled.rows, labelled.labels, labelled.others, labelled.unknown
    if labels > scored:
        notes.append(
            f"Not counted, since they have no score: {counted(labels - scored, 'row')} with a label."
        )
    if others:
        words = ", ".join(str(shortened(word)) for word, _ in unknown.most_common(EXAMPLES))
        notes.append(f"Labels that are no class, of {counted(others, 'row')}, such as: {words}.")
    return notes


# Time


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{count(hours)} h {minutes:02} min"


def _rate(value: float) -> str:
    return count(round(value)) if value >= 100 else f"{value:.3g}"


def throughput(began: datetime, done: Iterable[Done]) -> dict[str, Any] | None:
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
    rate = _rate(rows[-1] / clock[-1])
    pauses = int(stopped.sum())
    text = f"{counted(int(rows[-1]), 'row')} in {duration(clock[-1])}, start-up included: {rate} a second"
    if pauses:
        text += f"; {counted(pauses, 'pause')} of {duration(float(gaps[stopped].sum()))} in all left out"
    if len(written) < CHART_PARTS:
        return {"text": f"{text}.", "chart": None}
    edges = np.linspace(0, clock[-1], min(60, len(written)) + 1)
    rates = np.diff(np.interp(edges, [0, *clock], [0, *rows])) / np.diff(edges)
    titles = [
        f"{duration(low)} to {duration(high)}: {_rate(rate)} rows/s"
        for low, high, rate in zip(edges, edges[1:], rates, strict=False)
    ]
    ticks = {0.0: "0", 0.5: duration(edges[-1] / 2), 1.0: duration(edges[-1])}
    chart = bars(rates.tolist(), titles, ticks=ticks, top=f"{_rate(max(rates))} rows/s", width=420)
    return {"text": f"{text}.", "chart": chart}


def _stages(last: LastStart) -> dict[str, Any] | None:
    """Where the time of the last start went, and which stage limited it."""
    if not last.stages:
        return None
    stages = last.stages
    order = sorted(stages, key=lambda name: -stages[name].occupancy)
    first, share = order[0], stages[order[0]].occupancy
    busiest = f"{STAGES.get(first, first)} ({first})"
    text = f"{busiest} limited the run: at work {percent(share)} of the time"
    if share < 0.6:
        text = f"no stage was at work most of the time; the busiest was {busiest}, {percent(share)} of it"
    if len(order) > 1:
        text += f". The next, {order[1]}, was for {percent(stages[order[1]].occupancy)}"
    return {
        "text": f"{text[0].upper()}{text[1:]}.",
        "rows": last.rows,
        "elapsed": duration(last.elapsed_s),
        "table": [
            {"name": name, "about": STAGES.get(name, ""), **asdict(times)} for name, times in stages.items()
        ],
        "restarts": last.decoder_restarts,
    }


# Where the rows come from


def _provenance(run: RunRecord, *, hide: bool) -> dict[str, Any]:
    """What `_run.json` says, as names and values; of a redacted run nothing that could be a path."""
    options = {
        name: value
        for name, value in to_builtins(run.result_options).items()
        if not (hide and name in ("root", "include", "exclude"))
    }
    plans = options.pop("plans", None) or {}
    machine, chosen = run.machine, run.chosen
    basics = {
        "run": run.run_id,
        "begun": _moment(run.started),
        "manifest": shortened(run.manifest),
        "rows": count(run.rows),
        "bundle": shortened(run.bundle),
        "bundle, sha256": options.pop("bundle_sha256", None),
        "weights": ", ".join(f"{name} {number(weight, 2)}" for name, weight in run.weights.items()),
        **{f"plan of {name}, sha256": digest for name, digest in plans.items()},
        "runner": scrubbed(chosen) if hide and chosen else chosen,
        "system": machine and machine.system,
        "processor": machine and machine.processor,
        "GPU": machine and machine.gpu and machine.gpu.name,
    }
    return {
        "run": run.run_id,
        "basics": {name: value for name, value in basics.items() if value not in (None, "")},
        "operating_points": _flat(run.operating_points or {}),
        "versions": run.versions,
        "options": options | {f"tuned {name}": value for name, value in to_builtins(run.tuning).items()},
    }


def _rounded(value: Any) -> Any:
    """To three digits."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _flat(found: Any, name: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    if not isinstance(found, Mapping):
        return {name: _rounded(found)}
    if {"value", "low", "high"} <= found.keys():
        value, low, high = (shown(_rounded(found[key])) for key in ("value", "low", "high"))
        return {name: f"{value} ({low} to {high})"}
    joined = [_flat(value, f"{name}.{key}" if name else str(key)) for key, value in found.items()]
    return {key: value for one in joined for key, value in one.items()}
