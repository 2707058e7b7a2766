"""Bar charts as numbers for the template: small, and without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEIGHT, MIN_BAR = 78.0, 0.8  # height of the highest bar and of the lowest non-empty one
WIDTH = 245  # as wide as the figures of matplotlib, for the same text size


def draw_bars(
    values: Sequence[float],
    titles: Sequence[str],
    *,
    ticks: Mapping[float, str],
    top: str,
    marks: Sequence[float] = (),
    width: int = WIDTH,
) -> dict[str, Any]:
    """Draw bars of `values`; `ticks` and `marks` are at positions 0 to 1, and `top` labels the maximum."""
    highest = max(values) or 1
    step = width / len(values)
    return {
        "width": width,
        "height": HEIGHT,
        "bars": [
            {
                "x": round(index * step, 2),
                "width": round(step * 0.88, 2),
                "height": round(max(MIN_BAR, HEIGHT * value / highest), 2),
                "title": title,
            }
            for index, (value, title) in enumerate(zip(values, titles, strict=True))
            if value
        ],
        "ticks": [{"x": round(position * width, 2), "text": text} for position, text in ticks.items()],
        "marks": [round(position * width, 2) for position in marks],
        "top": top,
    }
