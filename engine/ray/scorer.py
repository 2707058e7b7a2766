"""Score the blocks of a Ray Data dataset with the engine's preprocessing, members and ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.bundle import bundle as bundles
from engine.core.errors import UsageError
from engine.core.overlap import Meter
from engine.core.records import PATH_COLUMN, Batch, Part
from engine.core.settings import Limits, Settings
from engine.formats import header
from engine.formats.common import HeaderError
from engine.pipeline.context import StageContext
from engine.pipeline.stages import Stages
from engine.runners.select import select_runner
from engine.runs.run_record import default_sizes
from engine.sink.columns import ResultSchema
from engine.sink.part_buffer import PartBuffer
from engine.sink.triage import Triage

# columns of the results that don't depend on the scores
_OMITTED_COLUMNS = ("row", PATH_COLUMN, "flags", "width", "height", "bits", "photometric")


class EnsembleScorer:
    """Scores blocks of images for `Dataset.map_batches`.

        dataset.map_batches(
            EnsembleScorer, fn_constructor_kwargs={"bundle": "bundle"}, concurrency=2, batch_format="numpy"
        )

    A block has a column `bytes` with encoded images, or `pixels`, uint8 [N, 1, H, W] of the bundle's size.
    Its other columns are kept. Added columns are those of `engine.run`: `status`, `error`, `prediction`,
    `triage` ("" without one), `confidence`, `p_<class>`, `<member>_p_<class>`, `p_<group>`, `entropy`,
    `member_disagreement`, float32 (NaN when not ok), `abstain` (False when unknown) and `abstain_reasons`,
    joined by commas. The rows keep their order, and a bad image fails only its own row.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        device: str = "auto",
        runner: str = "auto",
        precision: str | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        max_pixels: int = Limits().max_pixels,
    ) -> None:
        """Open the stages. Raises UsageError for a wrong bundle or an unavailable runner or device."""
        self._bundle = bundles.load_bundle(Path(bundle))
        choice = select_runner(runner, device, self._bundle, precision=precision, batch_size=batch_size)
        names = tuple(member.name for member in self._bundle.members)
        triage = Triage.of(self._bundle)
        self._schema = ResultSchema(self._bundle.classes, names, pa.schema([]), "", uids=False, triage=triage)
        limits = Limits(max_pixels=max_pixels)
        settings = Settings(manifest=Path(), bundle=Path(bundle), workers=workers, **vars(limits))
        self._max_pixels = max_pixels
        context = StageContext(
            *(settings, self._bundle, choice, lambda _: None, Path()),
            batch_size=batch_size or default_sizes(choice)[0],
            resumed=False,
        )
        self._stack = ExitStack()
        self._stages = self._stack.enter_context(Stages(context))
        self._batch_size = self._stages.settled.batch_size  # may be halved for lack of GPU memory

    def __call__(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """Score a block. Raises UsageError when it has neither images nor pixels of the right shape."""
        if "pixels" in block:
            batches = self._of_pixels(np.asarray(block["pixels"]))
        elif "bytes" in block:
            batches = self._of_bytes(list(block["bytes"]))
        else:
            raise UsageError(
                f"the block has the columns {', '.join(block)}; it must have a column bytes or pixels"
            )
        rows = sum(batch.rows for batch in batches)
        scored = list(self._stages.step.stage(iter(batches), Meter("members")))
        kept = {name: column for name, column in block.items() if name not in ("bytes", "pixels")}
        return kept | self._columns(rows, scored)

    def close(self) -> None:
        """Close the decoder and the members; later calls fail."""
        self._stack.close()

    def _of_bytes(self, images: Sequence[Any]) -> list[Batch]:
        batches = []
        for batch in _split_rows(len(images), self._batch_size):
            for position in range(batch.rows):
                self._add_image(batch, position, images[batch.start + position])
            batches.append(batch)
        return list(self._stages.preprocess.stage(batches, Meter("preprocess")))

    def _add_image(self, batch: Batch, position: int, image: Any) -> None:
        """Add an image or its failure to the batch, as the reader does for a file."""
        data = b"" if image is None else bytes(image)
        try:
            image_header = header.check(data, self._max_pixels)
        except HeaderError as error:
            batch.fail(position, error.status, str(error))
            return
        on_gpu = self._stages.preprocess.on_gpu
        batch.keep(position, data, image_header, on_gpu=on_gpu is not None and on_gpu(data, image_header))

    def _of_pixels(self, pixels: npt.NDArray[Any]) -> list[Batch]:
        height, width = self._bundle.size
        if pixels.ndim != 4 or pixels.shape[1:] != (1, height, width) or pixels.dtype != np.uint8:
            raise UsageError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; allowed: uint8 [N, 1, {height}, {width}]"
            )
        batches = list(_split_rows(len(pixels), self._batch_size))
        for batch in batches:
            batch.index = np.arange(batch.rows)
            batch.pixels = np.ascontiguousarray(pixels[batch.start : batch.start + batch.rows])
        return batches

    def _columns(self, rows: int, batches: Sequence[Batch]) -> dict[str, npt.NDArray[Any]]:
        """Return the columns of the results that follow from the scores, as NumPy arrays without nulls."""
        buffer = PartBuffer(_part(rows), self._schema)
        for batch in batches:
            buffer.add(batch)
        table = buffer.table(self._schema)
        return {
            name: _without_nulls(table[name]) for name in table.column_names if name not in _OMITTED_COLUMNS
        }


def _without_nulls(column: pa.ChunkedArray[Any]) -> npt.NDArray[Any]:
    """Return a column with NaN, False or "" in place of null; lists of texts are joined by commas."""
    if pa.types.is_floating(column.type):
        return column.to_numpy()
    if pa.types.is_boolean(column.type):
        return np.array([bool(value) for value in column.to_pylist()], bool)
    texts = (value if isinstance(value, str) else ",".join(value or ()) for value in column.to_pylist())
    return np.array(list(texts), str)


def _part(rows: int) -> Part:
    return Part(0, np.arange(rows), [None] * rows, pa.table({}))


def _split_rows(rows: int, size: int) -> list[Batch]:
    part, batches = _part(rows), []
    for start in range(0, rows, size):
        count = min(size, rows - start)
        batches.append(
            Batch(
                part,
                start,
                np.zeros(count, np.uint8),
                np.zeros(count, np.int32),
                np.zeros(count, np.int32),
                encoded=[b""] * count,
                headers=[None] * count,
                on_gpu=[False] * count,
            )
        )
    return batches
