"""Render one self-contained HTML page about a training from evaluation.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.report.curves import FAINT, LINES, draw_reliability, draw_roc, line_style, plot_svg
from engine.report.page import (
    DASH,
    count_noun,
    format_count,
    format_interval,
    format_number,
    format_percent,
    make_environment,
    printable,
)

TEMPLATE = "report.html.j2"
PHASES = {"head": "head alone", "whole": "whole network"}
FEW_IMAGES = 20  # test images of a class, below which the report says so
MAX_ROWS = 10  # of the weights search that are shown
CURVES = {"train_loss": (1, 1), "validation_loss": (0, 0), "validation_macro_f1": (2, 0)}  # colour, dash
SEARCHED = {"macro_f1": 2, "nll": 0}  # colour


def render(evaluation: dict[str, Any]) -> str:
    """Render the page; the same input gives the same text. Names may contain any character."""
    facts = printable(evaluation)
    template = make_environment(Path(__file__).parent, attribute=attribute_text).get_template(TEMPLATE)
    return template.render(
        **facts,
        members=[name for name in facts["voters"] if name != "ensemble"],
        verdict=verdict_text(facts),
        findings=describe_data_findings(facts["data"]),
        temperature_text=temperature_text(facts["temperature"]),
        plots=_plots(facts),
        second_phase=any(len({row["phase"] for row in rows}) > 1 for rows in facts["history"].values()),
        phases=PHASES,
        rows=MAX_ROWS,
    )


def verdict_text(facts: dict[str, Any]) -> list[str]:
    """Summarise in two or three sentences: accuracy, gain of averaging, doubts about the figures."""
    test = facts["voters"]["ensemble"]["test"]
    accuracy, f1 = test["accuracy"], test["macro_f1"]
    first = (
        f"On {format_count(test['images'])} test images the ensemble is correct for "
        f"{format_percent(accuracy['value'])}"
    )
    if accuracy["low"] is not None:
        first += f" (95 % interval {format_percent(accuracy['low'])} to {format_percent(accuracy['high'])})"
    first += f"; its macro-F1 is {format_number(f1['value'])}{_interval_text(f1)}."
    warnings = list_caveats(facts)
    last = "The checks of the data interval no reason to doubt these figures."
    if warnings:
        last = f"Caveats: {'; '.join(warnings)}."
    return [first, _difference_text(facts["difference"]), last]


def _difference_text(difference: dict[str, Any]) -> str:
    member, gain = difference["from"], difference["test"]["macro_f1"]
    start = f"Against {member}, the better member on the validation set, the macro-F1 "
    if gain["value"] == gain["low"] == gain["high"] == 0:
        return f"{start}is the same."
    start += f"differs by {format_number(gain['value'], signed=True)}"
    if gain["low"] is None:
        return f"{start}; there are too few images for an interval."
    start += f" ({format_interval(gain, signed=True)})"
    if gain["low"] > 0:
        return f"{start}: the interval excludes zero, averaging was better."
    if gain["high"] < 0:
        return f"{start}: the interval excludes zero, averaging was worse."
    return f"{start}: the interval includes zero, so this test set does not show whether averaging is better."


def list_caveats(facts: dict[str, Any]) -> list[str]:
    """List the reasons to doubt the figures, most serious first."""
    data, test = facts["data"], facts["images"]["test"]
    caveats = []
    if facts["demo"]:
        caveats.append("the bases are random, so the figures say nothing about radiographs")
    if data["across"]["groups"]:
        caveats.append(
            f"the split leaks ({format_count(data['across']['images'])} images have a copy, or the same "
            "patient, on another side), so these figures are too good"
        )
    if data["shortcuts"]["suspicious"]:
        caveats.append(
            "the files' properties predict the class without the picture; the network may have learned these"
        )
    if data["conflicts"]["groups"]:
        caveats.append(
            f"{count_noun(data['conflicts']['groups'], 'group')} of identical files with contradicting labels"
        )
    rare = min(test, key=lambda name: test[name])
    if test[rare] < FEW_IMAGES:
        caveats.append(f"the smallest class, {rare}, has only {count_noun(test[rare], 'test image')}")
    if data["patients"] is None:
        caveats.append(
            "the data have no patient identifiers, so images of one patient may be on several sides"
        )
    return caveats


def describe_data_findings(data: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return the checks of the data: heading, text, whether it is a warning."""
    left_out, dropped = data["left_out"], data["dropped"]
    unused = ", ".join(f"{format_count(number)} {status}" for status, number in left_out.items())
    return [
        (
            "Files",
            f"{format_count(data['images'])} images are used. "
            + (f"Left out: {unused}." if left_out else "Every file could be read."),
            bool(left_out),
        ),
        (
            "Copies",
            _copies_finding(data) + (f" {format_count(dropped)} images were dropped." if dropped else ""),
            False,
        ),
        ("Contradicting labels", _conflicts_finding(data), bool(data["conflicts"]["groups"])),
        ("Split", _split_finding(data), bool(data["across"]["groups"])),
        ("Shortcuts", _shortcut_finding(data["shortcuts"]), bool(data["shortcuts"]["suspicious"])),
    ]


def _copies_finding(data: dict[str, Any]) -> str:
    exact, near = data["exact"], data["near"]
    treatment = {
        "group": "Copies of one image stay on one side of the split.",
        "drop": "One image of each group of copies was kept, and none with contradicting labels.",
        "ignore": "Copies were ignored when the split was made, as the paper does.",
    }[data["duplicates"]]
    if not near["groups"]:
        return f"No image has a copy among the images used. {treatment}"
    identical = "none of them are identical files"
    if exact["groups"]:
        identical = (
            f"{format_count(exact['images'])} of them are identical files "
            f"({count_noun(exact['groups'], 'group')})"
        )
    return (
        f"{format_count(near['images'])} images are in {count_noun(near['groups'], 'group')} of "
        f"copies, identical or slightly changed; {identical}. {treatment}"
    )


def _conflicts_finding(data: dict[str, Any]) -> str:
    exact, near = data["conflicts"], data.get("near_conflicts", data["conflicts"])
    if not exact["groups"] and not near["groups"]:
        return "No two copies of an image have different labels."
    return (
        f"{count_noun(exact['groups'], 'group')} of identical files ({format_count(exact['images'])} "
        "images) with "
        f"several labels; {format_count(near['groups'])} if near copies count. No model can be correct "
        "for all of them."
    )


def _split_finding(data: dict[str, Any]) -> str:
    origin = "The data came with a split." if data["given_split"] else "The split was figure, class by class."
    patients = (
        "The data have no patient identifiers, so images of one patient may be on several sides."
        if data["patients"] is None
        else f"{format_count(data['patients'])} patients are identified."
    )
    across = data["across"]
    if not across["groups"]:
        return f"{origin} No group of copies or images of one patient is on more than one side. {patients}"
    return (
        f"{origin} It leaks: copies, or images of one patient, are on more than one side "
        f"({count_noun(across['groups'], 'group')}, {format_count(across['images'])} images), so the "
        f"figures are too good. {patients}"
    )


def _shortcut_finding(shortcuts: dict[str, Any]) -> str:
    score, chance = shortcuts["balanced_accuracy"], shortcuts["chance"]
    if score is None:
        return "There are too few images of a class to test whether size and format of the files predict it."
    measured = (
        "From size and format of the files alone, without the picture, a small decision tree predicts the "
        f"class with a balanced accuracy of {format_number(score, 2)}; chance is {format_number(chance, 2)}"
    )
    if shortcuts.get("p_value") is not None:
        measured += f" (p = {format_number(shortcuts['p_value'], 2)}, against shuffled labels)"
    if shortcuts["suspicious"]:
        return f"{measured}. A network can learn this instead of the bone, and then fails on other data."
    return f"{measured}. This is not a shortcut."


def temperature_text(temperature: dict[str, Any]) -> str:
    """Describe the temperature scaling of the ensemble's probabilities."""
    if temperature["fitted"] is None:
        return (
            "No temperature was fitted: the probabilities are the weighted average as it is (temperature "
            f"{format_number(temperature['applied'], 2)})."
        )
    fitted = temperature["fitted"]
    direction = "softer" if fitted > 1 else "sharper"
    text = f"The temperature fitted on the validation set is {format_number(fitted, 2)}"
    if temperature["applied"] == fitted:
        return f"{text}: it makes the probabilities {direction} and does not change the predicted classes."
    return f"{text}; the bundle applies {format_number(temperature['applied'], 2)}."


def _interval_text(interval: dict[str, Any]) -> str:
    return (
        ""
        if interval["low"] is None
        else f" ({format_number(interval['low'])} to {format_number(interval['high'])})"
    )


def attribute_text(values: Sequence[float] | dict[str, int], name: str) -> str:
    """Format one class's files: median and quartiles of numbers, or counts of words."""
    if isinstance(values, dict):
        return ", ".join(f"{word} {format_count(number)}" for word, number in values.items()) or DASH
    if not all(np.isfinite(values)):
        return DASH
    scale, unit = (1000, " kB") if name == "bytes" else (1, "")
    low, middle, high = (format_count(round(value / scale)) for value in values)
    return f"{middle}{unit} ({low}{DASH}{high})"


# Plots contain no names of classes or members; legends and captions are HTML


def _plots(facts: dict[str, Any]) -> dict[str, Any]:
    ensemble = facts["voters"]["ensemble"]["test"]
    plots = {
        "roc": plot_svg("roc", "ROC curves", lambda figure: draw_roc(figure, ensemble["roc"])),
        "reliability": plot_svg(
            "reliability",
            "Reliability diagram",
            lambda figure: draw_reliability(figure, ensemble["reliability"], len(facts["classes"])),
        ),
        "history": {
            member: _history(f"history-{number}", rows, facts["best"][member])
            for number, (member, rows) in enumerate(facts["history"].items())
        },
        "weights": None,
    }
    search = facts["weights_search"]
    if len(search["chosen"]["weights"]) == 2:
        plots["weights"] = plot_svg(
            "weights", "Weights search", lambda figure: _draw_weights(figure, search), height=3.2
        )
    return plots


def _history(name: str, rows: Sequence[dict[str, Any]], best: dict[str, Any]) -> Markup:
    return plot_svg(name, "Learning curves", lambda figure: _draw_history(figure, rows, best), height=3.6)


def _draw_history(figure: Figure, rows: Sequence[dict[str, Any]], best: dict[str, Any]) -> None:
    """Draw losses above and macro-F1 below, the second phase after the first."""
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    start = 0
    for phase in dict.fromkeys(row["phase"] for row in rows):
        part = [row for row in rows if row["phase"] == phase]
        if start:
            for axes in (above, below):
                axes.axvline(start + 0.5, color=FAINT, linewidth=1, linestyle=(0, (3, 2)))
        for axes, series in (
            (above, ("train_loss", "validation_loss")),
            (below, ("validation_macro_f1",)),
        ):
            _draw_epochs(axes, start, part, series, best["epoch"] if phase == best["phase"] else None)
        start += len(part)
    above.set(ylabel="loss")
    above.set_ylim(bottom=0)
    below.set(xlabel="epoch", ylabel="macro-F1", ylim=(-0.02, 1.02))
    below.set_xlim(left=0.5)
    below.xaxis.get_major_locator().set_params(integer=True)


def _draw_epochs(
    axes: Axes, start: int, rows: Sequence[dict[str, Any]], series: Sequence[str], best: int | None
) -> None:
    epochs = [row["epoch"] for row in rows]
    x = np.array(epochs) + start
    for name in series:
        values = np.array([row[name] for row in rows], float)
        style = line_style(*CURVES[name])
        axes.plot(x, values, marker="." if len(rows) < 4 else "", **style)
        if best is not None and name != "train_loss":
            index = epochs.index(best)
            axes.plot(x[index], values[index], "o", color=style["color"], markersize=5)


def _draw_weights(figure: Figure, search: dict[str, Any]) -> None:
    """Draw both figures of the search over the first member's weight, with a dot at the chosen weight."""
    table = sorted(search["table"], key=lambda row: row["weights"][0])
    first = [row["weights"][0] for row in table]
    for axes, (name, colour) in zip(figure.subplots(2, sharex=True), SEARCHED.items(), strict=True):
        axes.plot(first, [row[name] for row in table], ".-", color=LINES[colour], markersize=3.5)
        weight = search["chosen"]["weights"][0]
        axes.plot(weight, search["chosen"][name], "o", color=LINES[colour], markersize=6)
        axes.set(ylabel=name.replace("macro_f1", "macro-F1"))
    axes.set(xlabel="weight of the first member", xlim=(-0.03, 1.03))
