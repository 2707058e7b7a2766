"""Draw an explanation as PNG: the picture as the network receives it, and the same with the map over it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

PICTURE_SIDE = 448  # pixels of the picture's longer side
# Perceptually uniform on both sides of zero (Crameri et al. 2020), in blue and orange, which most
# colour-blind people distinguish. The dark middle is skipped, so that unchanged regions are not darkened.
_COLOURS, _MIDDLE = colormaps["managua_r"], 0.35
_OPACITY = 0.85  # at the largest change; 0 at no change
_DIMMED = 0.85  # brightness of the picture under the colours
_MARGIN, _HEADING, _FOOT, _BAR, _NUMBERS = 16, 66, 34, 18, 78  # pixels
_DPI = 100
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Caption:
    heading: str
    text: str
    unit: str  # of the colour bar
    foot: str


def draw_explanation(
    target: Path,
    gray: npt.NDArray[np.uint8],
    change: npt.NDArray[np.float32],
    *,
    limit: float,
    caption: Caption,
) -> None:
    """Write a PNG of `gray` [H, W] without and with `change` [H, W] over it, in colours for -limit to limit.

    The same arguments give the same bytes.
    """
    scale = PICTURE_SIDE / max(gray.shape)
    height, width = (round(side * scale) for side in gray.shape)
    picture = np.asarray(Image.fromarray(gray).resize((width, height), Image.Resampling.BICUBIC)) / 255
    large = Image.fromarray(change.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    strength = np.asarray(large, np.float64) / limit
    right = 2 * _MARGIN + width
    bar = right + width + _MARGIN
    total = (bar + _BAR + _NUMBERS, _HEADING + height + _FOOT)
    figure = Figure((total[0] / _DPI, total[1] / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.figimage(_to_rgb(picture), _MARGIN, _FOOT, origin="upper")
    figure.figimage(_to_rgb(_blend(picture, strength)), right, _FOOT, origin="upper")

    lines = (
        (caption.heading, 28, 13, "bold"),
        (caption.text, 52, 10.5, "normal"),
        (caption.foot, total[1] - 12, 8.5, "normal"),
    )
    for text, y, size, weight in lines:  # a class may be called $x$
        figure.text(
            _MARGIN / total[0], 1 - y / total[1], text, fontsize=size, fontweight=weight, parse_math=False
        )
    axes = figure.add_axes((bar / total[0], _FOOT / total[1], _BAR / total[0], height / total[1]))
    ramp = np.linspace(1, -1, height)[:, None]
    axes.imshow(_blend(np.full_like(ramp, 0.5), ramp), aspect="auto", extent=(0, 1, -limit, limit))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.tick_params(labelsize=8.5)
    axes.set_ylabel(caption.unit, fontsize=9)
    figure.savefig(target, format="png", dpi=_DPI, metadata={"Software": None})


def _blend(picture: Floats, strength: Floats) -> Floats:
    """Blend gray [H, W], 0 to 1, with colours for strengths -1 to 1, which set the opacity: [H, W, 3]."""
    size = np.minimum(np.abs(strength), 1)
    colours = _COLOURS((1 + np.sign(strength) * (_MIDDLE + (1 - _MIDDLE) * size)) / 2)[..., :3]
    opacity = _OPACITY * size[..., None]
    picture = _DIMMED * picture
    return np.asarray(picture[..., None] * (1 - opacity) + colours * opacity)


def _to_rgb(picture: Floats) -> npt.NDArray[np.uint8]:
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    return np.asarray(np.rint(picture.clip(0, 1) * 255), np.uint8)
