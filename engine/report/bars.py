"""Bar charts as numbers for the template: small, and without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEIGHT, MIN_BAR = 78.0, 0.8  # of the highest bar, and of one that is not empty
WIDTH = 245  # as wide as a figure of matplotlib, whose text is as large


def draw_bars(
    values: Sequence[float],
    titles: Sequence[str],
    *,
    ticks: Mapping[float, str],
    top: str,
    marks: Sequence[float] = (),
    width: int = WIDTH,
) -> dict[str, Any]:
    """`values` side by side, 0 at the bottom; `ticks` and `marks` by place, 0 to 1; `top` names the most."""
    most = max(values) or 1
    step = width / len(values)
    return {
        "width": width,
        "height": HEIGHT,
        "bars": [
            {
                "x": round(place * step, 2),
                "width": round(step * 0.88, 2),
                "height": round(max(MIN_BAR, HEIGHT * value / most), 2),
                "title": title,
            }
            for place, (value, title) in enumerate(zip(values, titles, strict=True))
            if value
        ],
        "ticks": [{"x": round(place * width, 2), "text": text} for place, text in ticks.items()],
        "marks": [round(place * width, 2) for place in marks],
        "top": top,
    }
