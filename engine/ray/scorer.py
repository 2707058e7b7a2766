"""For Ray Data: the engine's pixels, members and ensemble on the blocks of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine import bundle as bundles
from engine import header
from engine.errors import UsageError
from engine.header import HeaderError
from engine.overlap import Meter
from engine.pipeline import Opening, Stages
from engine.provenance import defaults
from engine.records import Batch, Part, Status
from engine.runners import choose
from engine.settings import Limits, Settings
from engine.triage import Floats, Triage


class EnsembleScorer:
    """Scores blocks of images, for `Dataset.map_batches`:

        dataset.map_batches(
            EnsembleScorer, fn_constructor_kwargs={"bundle": "bundle"}, concurrency=2, batch_format="numpy"
        )

    A block has a column `bytes` with encoded images, or `pixels`, uint8 [N, 1, H, W] of the bundle's size.
    Its other columns are kept. Added are, as `engine.run` has them: `status`, `error`, `prediction`, `triage`
    ("" where there is none), `confidence`, `p_<class>`, `<member>_p_<class>`, `p_<group>`, `entropy`,
    `member_disagreement`, float32 (NaN when not ok), `abstain` (False when not known) and `abstain_reasons`,
    joined by commas. The rows keep their order, and a bad image costs its own row only.
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
        """Raises UsageError as `engine.run` does: for a bundle that is wrong, or what can't be had here."""
        self._models = bundles.load(Path(bundle))
        choice = choose(runner, device, self._models, precision=precision, batch_size=batch_size)
        limits = Limits(max_pixels=max_pixels)
        settings = Settings(manifest=Path(), bundle=Path(bundle), workers=workers, **vars(limits))
        self._batch_size = batch_size or defaults(choice)[0]
        self._max_pixels = max_pixels
        options: dict[str, Any] = {"batch_size": self._batch_size, "decoder": "auto"}
        run: dict[str, Any] = {"result_options": options, "tuning": {}, "versions": {}, "rows": 0}
        opening = Opening(settings, self._models, run, choice, lambda _: None, Path(), resumed=False)
        self._stack = ExitStack()
        self._stages = self._stack.enter_context(Stages(opening))
        self._batch_size = options["batch_size"]  # halved where a GPU's memory is short

    def __call__(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """Raises UsageError for a block that has neither images nor pixels of the right shape."""
        if "pixels" in block:
            batches = self._of_pixels(np.asarray(block["pixels"]))
        elif "bytes" in block:
            batches = self._of_bytes(list(block["bytes"]))
        else:
            raise UsageError(f"a block with {', '.join(block)}; it has to have a column bytes or pixels")
        scored = list(self._stages.step.stage(iter(batches), Meter("members")))
        kept = {name: column for name, column in block.items() if name not in ("bytes", "pixels")}
        return kept | self._columns(scored)

    def close(self) -> None:
        """End the decoder and the members; what is scored afterwards fails."""
        self._stack.close()

    def _of_bytes(self, images: Sequence[Any]) -> list[Batch]:
        batches = []
        for batch in _batches(len(images), self._batch_size):
            for position in range(batch.rows):
                self._look_at(batch, position, images[batch.start + position])
            batches.append(batch)
        return list(self._stages.preprocess.stage(batches, Meter("preprocess")))

    def _look_at(self, batch: Batch, position: int, image: Any) -> None:
        """As the reader does it with what is in a file."""
        data = b"" if image is None else bytes(image)
        if not data:
            batch.fail(position, Status.EMPTY, "the file has 0 bytes")
            return
        try:
            found = header.parse(data, self._max_pixels)
        except HeaderError as error:
            batch.fail(position, error.status, str(error))
            return
        except Exception as error:  # no image may fail the block
            batch.fail(position, Status.CORRUPT, f"its header can't be read: {type(error).__name__}")
            return
        batch.encoded[position], batch.headers[position] = data, found
        if self._stages.preprocess.on_gpu:
            batch.on_gpu[position] = self._stages.preprocess.on_gpu(data, found)

    def _of_pixels(self, pixels: npt.NDArray[Any]) -> list[Batch]:
        height, width = self._models.size
        if pixels.ndim != 4 or pixels.shape[1:] != (1, height, width) or pixels.dtype != np.uint8:
            raise UsageError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; allowed: uint8 [N, 1, {height}, {width}]"
            )
        batches = list(_batches(len(pixels), self._batch_size))
        for batch in batches:
            found = np.ascontiguousarray(pixels[batch.start : batch.start + batch.rows])
            batch.index = np.arange(batch.rows)
            batch.pixels = found
        return batches

    def _columns(self, batches: Sequence[Batch]) -> dict[str, npt.NDArray[Any]]:
        rows = sum(batch.rows for batch in batches)
        models = self._models
        status = np.full(rows, "", object)
        error, prediction = np.full(rows, "", object), np.full(rows, "", object)
        confidence = np.full(rows, np.nan, np.float32)
        scores = np.full((1 + len(models.members), rows, len(models.classes)), np.nan, np.float32)
        distances = np.full((len(models.members), rows), np.nan, np.float32)
        flags: dict[int, list[str]] = {}
        for batch in batches:
            assert batch.probabilities is not None
            assert batch.members is not None
            status[batch.start : batch.start + batch.rows] = [Status(one).label for one in batch.status]
            for position, text in batch.errors.items():
                error[batch.start + position] = text
            where = batch.start + batch.index
            prediction[where] = np.array(models.classes, object)[batch.prediction]
            confidence[where] = batch.confidence
            scores[0, where], scores[1:, where] = batch.probabilities, batch.members
            if batch.distances is not None:
                distances[:, where] = batch.distances
            flags.update((batch.start + position, names) for position, names in batch.flags.items())
        voters = ["", *(f"{member.name}_" for member in models.members)]
        columns = {
            f"{voter}p_{name}": scores[place, :, number]
            for place, voter in enumerate(voters)
            for number, name in enumerate(models.classes)
        }
        named = {
            "status": status.astype(str),
            "error": error.astype(str),
            "prediction": prediction.astype(str),
        }
        return named | {"confidence": confidence} | columns | self._triage(scores, distances, flags)

    def _triage(
        self, scores: Floats, distances: Floats, flags: Mapping[int, Sequence[str]]
    ) -> dict[str, npt.NDArray[Any]]:
        """What follows from scores [1 + M, N, C], NaN where a row has none."""
        triage, failed = Triage.of(self._models), np.isnan(scores[0, :, 0])
        known = np.where(failed[:, None], np.float32(0), scores)
        found = triage.columns(known[0], known[1:], distances, flags, failed)
        columns = dict(zip((field.name for field in triage.fields), found, strict=True))
        reasons = [",".join(names or ()) for names in columns.pop("abstain_reasons").to_pylist()]
        words = [name or "" for name in columns.pop("triage").to_pylist()]
        abstain = [bool(answer) for answer in columns.pop("abstain").to_pylist()]
        numbers = {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items()}
        return numbers | {
            "triage": np.array(words, str),
            "abstain": np.array(abstain, bool),
            "abstain_reasons": np.array(reasons, str),
        }


def _batches(rows: int, size: int) -> list[Batch]:
    part = Part(0, np.arange(rows), [None] * rows, pa.table({}))
    found = []
    for start in range(0, rows, size):
        count = min(size, rows - start)
        found.append(
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
    return found
