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
    """The folder of the explanations. The first picture replaces the files of an earlier call."""

    def __init__(self, location: Location, run: ExplainedRun) -> None:
        self._location, self._run = location, run
        self._folder = open_folder(location)
        self._rows: dict[int, ExplainedRow] = {}

    def __enter__(self) -> Self:
        path = self._location
        try:
            if isinstance(path, Path) and (path.is_symlink() or (path.exists() and not path.is_dir())):
                raise UsageError(f"output {path} is not a folder; give another -o")
            if foreign := [name for name in self._folder.names() if not OWN_FILES.fullmatch(name)]:
                raise UsageError(f"output {path} contains a foreign file ({foreign[0]!r}); give another -o")
            self._folder.lock()
        except BlockingIOError:
            raise UsageError(f"output {path}: another process writes to it; wait until it ends") from None
        except OSError as error:
            raise UsageError(f"output {path}: {error_text(error)}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.unlock(remove_created=True)

    @property
    def rows(self) -> int:
        return len(self._rows)

    def add(self, row: int, gray: Pixels, explanation: Explanation, source: ReferenceImages) -> None:
        """Write a picture of each member's map and one of their sum, with the same colour scale."""
        from engine.explain.drawing import Caption, draw_explanation

        if not self._rows:
            clear_explanations(self._folder)
        names = (ENSEMBLE, *(member.name for member in self._run.bundle.members))
        maps = dict(zip(names, (explanation.maps.sum(axis=0), *explanation.maps), strict=True))
        limit = max(float(np.abs(change).max()) for change in maps.values()) or 1.0
        texts = self._caption_texts(explanation, source)
        heading = f"row {row}: {self._run.name} {format_percent(explanation.probability)}"
        unit = "points of probability per 1 % of the picture"
        for voter, change in maps.items():
            caption = Caption(heading, texts[voter], unit, FOOTER_TEXT)
            write = partial(draw_explanation, gray=gray, change=change, limit=limit, caption=caption)
            self._write(picture_name(row, voter), write)
        self._rows[row] = ExplainedRow(
            row=row,
            of_class=self._run.name,
            voters={voter: picture_name(row, voter) for voter in maps},
            probability=explanation.probability,
            typical=explanation.typical,
            shares=dict(zip(names[1:], explanation.shares, strict=True)),
            scale=limit,
        )

    def _caption_texts(self, explanation: Explanation, source: ReferenceImages) -> dict[str, str]:
        """Return the caption of the ensemble's picture and of each member's."""
        change = 100 * (explanation.probability - explanation.typical)
        references = f"{len(source.rows)} rows of the run" if source.rows else "the bundle's canaries"
        typical = f"{format_percent(explanation.typical)}, the mean of {references}"
        texts = {ENSEMBLE: f"ensemble: {change:+.1f} points from {typical}"}
        members, alone = self._run.bundle.members, explanation.member_probabilities
        for member, probability, share in zip(members, alone, explanation.shares, strict=True):
            texts[member.name] = (
                f"{member.name}, weight {member.weight:g}, alone {format_percent(probability)}: "
                f"{100 * share:+.1f} of the ensemble's {change:+.1f} points"
            )
        return texts

    def finish(self, rows: Sequence[int], source: ReferenceImages) -> None:
        """Write the index, in the order of `rows`."""
        from engine.explain.integrated_gradients import METHOD

        if not self._rows:
            raise EngineError(f"none of the {len(rows)} rows could be explained; nothing was written")
        index = ExplanationIndex(
            run_id=self._run.record.run_id,
            method=METHOD,
            of_class=self._run.name,
            compared_with=source,
            rows=tuple(self._rows[row] for row in rows if row in self._rows),
        )
        self._write(INDEX_FILE, lambda temporary: temporary.write_text(to_json(index)))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            self._folder.write(name, write)
        except OSError as error:
            text = f"{self._location / name}: {error_text(error)}; run the same command again"
            raise EngineError(text) from None


def format_percent(probability: float) -> str:
    """Format a probability, never as 0 % or 100 %."""
    if 0.001 <= probability <= 0.999:
        return f"{probability:.1%}"
    return "less than 0.1%" if probability < 0.5 else "more than 99.9%"


def picture_name(row: int, voter: str) -> str:
    return f"row-{row:09d}-{voter}.png"
