"""Write finished parts to Parquet, each atomically and with its provenance."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial

import nvtx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.core.errors import EngineError
from engine.core.json_records import from_json, to_builtins
from engine.core.overlap import Meter
from engine.core.records import Batch, PartInfo, Scorer
from engine.sink.columns import ResultSchema
from engine.sink.part_buffer import PartBuffer
from engine.sink.parts import _PART_KEY, METADATA_KEY, ROW_GROUP, PartFooter, _read_table, part_name
from engine.storage.folders import Folder, error_text


class Sink:
    """Writes the parts of one run into `folder`; each file holds the JSON `provenance` and its scorer.

    With `fold` the rows replace those with the same numbers in a part that is on disk. `on_written` is called
    with the index of each part after it is written.
    """

    def __init__(
        self,
        folder: Folder,
        layout: ResultSchema,
        provenance: bytes,
        by: Scorer,
        *,
        fold: bool = False,
        on_written: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._on_written = on_written
        self._folder, self._layout, self._provenance, self._fold = folder, layout, provenance, fold
        self.by = by  # may change between two parts

    def stage(self, batches: Iterable[Batch], meter: Meter) -> Iterator[Batch | PartInfo]:
        """Yield each batch when its rows are stored, and a PartInfo when a part is written.

        Batches may come in any order; only the parts they belong to are held in memory.
        """
        buffers: dict[int, PartBuffer] = {}
        with meter.upstream(batches) as source:
            for batch in source:
                start = time.perf_counter()
                index = batch.part.index
                part = buffers.get(index) or buffers.setdefault(index, PartBuffer(batch.part, self._layout))
                part.add(batch)
                done = self._write(buffers.pop(index)) if part.filled == part.part.rows else None
                meter.add(time.perf_counter() - start)
                yield batch
                if done:
                    yield done

    @nvtx.annotate("write")  # type: ignore[untyped-decorator,unused-ignore]
    def _write(self, part: PartBuffer) -> PartInfo:
        """Write a part. This is the only function that does."""
        index = part.part.index
        name = part_name(index)
        try:
            table = part.table(self._layout)
            written: datetime | None = datetime.now(UTC)
            if self._fold:
                old = self._folder.read(name, _read_table)
                table = _replace_rows(old, table)
                written = from_json(old.schema.metadata[_PART_KEY], PartFooter).written_at
            done = PartInfo(
                index,
                table.column("row")[0].as_py(),
                table.num_rows,
                _count_values(table, "status"),
                _count_values(table, "prediction"),
                self.by,
                written,
            )
            footer = PartFooter(
                part=index,
                by_status=done.by_status,
                by_class=done.by_class,
                by=done.by,
                written=written.isoformat(timespec="milliseconds") if written else None,
            )
            facts = json.dumps(to_builtins(footer)).encode()
            table = table.replace_schema_metadata({METADATA_KEY: self._provenance, _PART_KEY: facts})
            self._folder.write(
                name, partial(pq.write_table, table, compression="zstd", row_group_size=ROW_GROUP)
            )
        except OSError as error:
            raise EngineError(
                f"{self._folder.location / name}: {error_text(error)}; "
                "the written parts are complete; run the same command again to continue"
            ) from None
        self._on_written(index)
        return done


def _replace_rows(old: pa.Table, new: pa.Table) -> pa.Table:
    """Return `old`, where rows of `new` replace those with the same number."""
    kept = old.filter(pc.invert(pc.is_in(old.column("row"), value_set=new.column("row"))))
    return pa.concat_tables([kept.cast(new.schema), new]).sort_by("row")


def _count_values(table: pa.Table, column: str) -> dict[str, int]:
    return dict(Counter(filter(None, table.column(column).to_pylist())))
