"""Draw curves with matplotlib as SVG in the page's colours. They contain no names: legends are HTML."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure
from scipy.stats import binomtest

from engine.report.page import DASHES, SERIES

# Placeholders for the page's CSS variables (light or dark), which matplotlib does not support.
INK, FAINT = "#000001", "#000002"
LINES = tuple(f"#0001{number:02x}" for number in range(SERIES))
_COLOURS = {INK: "currentColor", FAINT: "var(--faint)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(LINES)
}
_STYLE = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.4,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


def plot_svg(name: str, label: str, draw: Callable[[Figure], None], *, height: float = 3.0) -> Markup:
    """Draw a figure 3.4 inches wide with `draw` and return it as SVG for a page."""
    svg = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=(3.4, height))
        draw(figure)
        figure.savefig(svg, format="svg")
    return _inline_svg(svg.getvalue(), name, label)


def _inline_svg(svg: bytes, name: str, label: str) -> Markup:
    """Remove size, fonts, style sheet and namespace, make ids unique and use the page's colours."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        if element.tag == "g":
            attributes.pop("id", None)  # nothing refers to it
        element.attrib.clear()
        for key, value in attributes.items():
            element.set(key, _adapt_attribute(key, value, name))
    for key in ("width", "height", "version"):
        del root.attrib[key]
    root.attrib |= {"class": "plot", "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # built here, from numbers


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _adapt_attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        return re.sub("#[0-9a-f]{6}", lambda match: _COLOURS.get(match[0], match[0]), value)
    return value


def draw_roc(figure: Figure, curves: dict[str, dict[str, list[float]]]) -> None:
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for number, curve in enumerate(curves.values()):
        axes.plot(curve["fpr"], curve["tpr"], **line_style(number))
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")


def line_style(colour: int, dash: int | None = None) -> dict[str, Any]:
    """Return the colour and dash of a line; the legend in the page uses the same."""
    pattern = DASHES[(colour if dash is None else dash) % len(DASHES)]
    style = "solid" if pattern == "none" else (0, tuple(map(float, pattern.split())))
    return {"color": LINES[colour % SERIES], "linestyle": style}


def draw_reliability(figure: Figure, bins: Sequence[dict[str, Any]], classes: int) -> None:
    """Draw accuracy by confidence with 95 % Wilson intervals, which are wide for small bins."""
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    confidence, accuracy = ([entry[name] for entry in bins] for name in ("confidence", "accuracy"))
    for x, y, entry in zip(confidence, accuracy, bins, strict=True):
        interval = binomtest(round(y * entry["count"]), entry["count"]).proportion_ci(method="wilson")
        axes.plot([x, x], [interval.low, interval.high], color=LINES[0], alpha=0.45, linewidth=1.2)
    axes.plot(confidence, accuracy, "o", color=LINES[0], markersize=4)
    lowest = min([1 / classes, *confidence])
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(lowest - 0.03, 1.03), ylim=(-0.02, 1.02))
