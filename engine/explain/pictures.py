"""Write the pictures of explanations and their index."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from engine.core.errors import EngineError, UsageError
from engine.core.json_records import to_json
from engine.core.location import Location
from engine.explain.rows import ENSEMBLE, ExplainedRun, Pixels
from engine.runs.run_folder import (
    INDEX_FILE,
    ExplainedRow,
    ExplanationIndex,
    ReferenceImages,
    clear_explanations,
)
from engine.storage.folders import LOCK_FILE, error_text
from engine.storage.open_folder import open_folder

if TYPE_CHECKING:
    from engine.explain.integrated_gradients import Explanation

OWN_FILES = re.compile(rf"row-\d+-\w+\.png|{re.escape(INDEX_FILE)}|{re.escape(LOCK_FILE)}|\..*\.tmp")
FOOTER_TEXT = (
    "Orange raised the probability, blue lowered it, compared with typical images. "
    "This is what moved the score, not where disease is. Research use only."
)


class PictureFolder:
    """The folder that explanations go to. What an earlier call left goes when the first picture comes."""

    def __init__(self, place: Location, run: ExplainedRun) -> None:
        self._place, self._run = place, run
        self._folder = open_folder(place)
        self._found: dict[int, ExplainedRow] = {}

    def __enter__(self) -> Self:
        place = self._place
        try:
            if isinstance(place, Path) and (place.is_symlink() or (place.exists() and not place.is_dir())):
                raise UsageError(f"output {place}: it is no folder; give another -o")
            if foreign := [name for name in self._folder.names() if not OWN_FILES.fullmatch(name)]:
                raise UsageError(f"output {place}: it holds something else ({foreign[0]!r}); give another -o")
            self._folder.lock()
        except BlockingIOError:
            raise UsageError(f"output {place}: another process is writing there; wait for it") from None
        except OSError as error:
            raise UsageError(f"output {place}: {error_text(error)}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.unlock(remove_created=True)

    @property
    def rows(self) -> int:
        return len(self._found)

    def add(self, row: int, gray: Pixels, explanation: Explanation, about: ReferenceImages) -> None:
        """Write a picture of each member's share and of their sum, in colours of one scale."""
        from engine.explain.drawing import Caption, draw_explanation

        if not self._found:
            clear_explanations(self._folder)
        whole = explanation.maps.sum(axis=0)
        maps = {ENSEMBLE: whole}
        maps |= {one.name: each for one, each in zip(self._run.bundle.members, explanation.maps, strict=True)}
        limit = max(float(np.abs(one).max()) for one in maps.values()) or 1.0
        texts = self._texts(explanation, about)
        heading = f"row {row}: {self._run.name} {format_percent(explanation.probability)}"
        unit = "points of probability per 1 % of the picture"
        for voter, one in maps.items():
            caption = Caption(heading, texts[voter], unit, FOOTER_TEXT)
            write = partial(draw_explanation, gray=gray, change=one, limit=limit, caption=caption)
            self._write(picture_name(row, voter), write)
        self._found[row] = ExplainedRow(
            row=row,
            of_class=self._run.name,
            voters={voter: picture_name(row, voter) for voter in maps},
            probability=explanation.probability,
            typical=explanation.typical,
            shares=dict(zip(list(maps)[1:], explanation.shares, strict=True)),
            scale=limit,
        )

    def _texts(self, explanation: Explanation, about: ReferenceImages) -> dict[str, str]:
        """Return the captions above the pictures of the models."""
        change = 100 * (explanation.probability - explanation.typical)
        others = f"{len(about.rows)} rows of the run" if about.rows else "the bundle's canaries"
        typical = f"{format_percent(explanation.typical)}, the mean of {others}"
        texts = {ENSEMBLE: f"ensemble: {change:+.1f} points beside {typical}"}
        for member, own, share in zip(
            self._run.bundle.members, explanation.own, explanation.shares, strict=True
        ):
            texts[member.name] = (
                f"{member.name}, weight {member.weight:g}, by itself {format_percent(own)}: "
                f"{100 * share:+.1f} of the ensemble's {change:+.1f} points"
            )
        return texts

    def finish(self, rows: Sequence[int], about: ReferenceImages) -> None:
        """Write the index, in the order of `rows`."""
        from engine.explain.integrated_gradients import METHOD

        if not self._found:
            raise EngineError(f"none of the {len(rows)} rows could be explained; nothing was written")
        index = ExplanationIndex(
            run_id=self._run.record.run_id,
            method=METHOD,
            of_class=self._run.name,
            compared_with=about,
            rows=tuple(self._found[row] for row in rows if row in self._found),
        )
        self._write(INDEX_FILE, lambda temporary: temporary.write_text(to_json(index)))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            self._folder.write(name, write)
        except OSError as error:
            raise EngineError(
                f"{self._place / name}: {error_text(error)}; the same command starts again"
            ) from None


def format_percent(probability: float) -> str:
    """Never 0 % or 100 %, which nothing is."""
    if 0.001 <= probability <= 0.999:
        return f"{probability:.1%}"
    return "less than 0.1%" if probability < 0.5 else "more than 99.9%"


def picture_name(row: int, voter: str) -> str:
    return f"row-{row:09d}-{voter}.png"
