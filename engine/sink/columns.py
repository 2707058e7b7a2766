"""Define the columns of the results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.bundle.bundle import Bundle
from engine.core.errors import UsageError
from engine.core.records import PATH_COLUMN
from engine.core.redaction import Redaction
from engine.core.settings import Settings
from engine.manifest.manifest import Manifest
from engine.sink.parts import part_name
from engine.sink.triage import Triage
from engine.storage.folders import Folder

UID_COLUMNS = ("study_uid", "series_uid", "sop_uid")


@dataclass(frozen=True)
class ResultSchema:
    """The columns of the results, in order."""

    classes: tuple[str, ...]
    members: tuple[str, ...]
    passthrough: pa.Schema  # as in the manifest
    column_prefix: str
    uids: bool  # whether DICOM UIDs are included
    redaction: Redaction | None = None  # replaces paths
    triage: Triage | None = None  # None for runs of older versions

    @classmethod
    def of(
        cls, bundle: Bundle, manifest: Manifest, settings: Settings, *, with_triage: bool = True
    ) -> ResultSchema:
        """Return the schema of a run. Raises UsageError for a manifest column with a result's name.

        `with_triage`: False to resume a run of an older version, which has no such columns.
        """
        names = tuple(member.name for member in bundle.members)
        column_prefix = settings.column_prefix
        uids, redaction = settings.include_uids, settings.redaction
        triage = Triage.of(bundle) if with_triage else None
        layout = cls(bundle.classes, names, manifest.columns, column_prefix, uids, redaction, triage)
        own = [field.name for field in layout._head() + layout._tail()]
        if len(set(own)) < len(own):
            raise UsageError(f"bundle {bundle.path}: members and classes give two columns the same name")
        clashes = sorted(set(own) & {column_prefix + name for name in manifest.columns.names})
        if clashes:
            raise UsageError(
                f"manifest {manifest.source}: columns {', '.join(map(repr, clashes))} are names of result "
                "columns; rename them or give --column-prefix manifest_"
            )
        return layout

    @classmethod
    def of_part(
        cls,
        bundle: Bundle,
        folder: Folder,
        index: int,
        *,
        uids: bool,
        with_triage: bool,
        redaction: Redaction | None,
    ) -> ResultSchema:
        """Return the schema of a part on disk; its manifest columns have their prefix already."""
        names = tuple(member.name for member in bundle.members)
        triage = Triage.of(bundle) if with_triage else None
        bare = cls(bundle.classes, names, pa.schema([]), "", uids, redaction, triage)
        own = set(bare.schema.names)
        stored = folder.read(part_name(index), pq.read_schema)
        return replace(bare, passthrough=pa.schema([field for field in stored if field.name not in own]))

    @property
    def schema(self) -> pa.Schema:
        kept = [field.with_name(self.column_prefix + field.name) for field in self.passthrough]
        return pa.schema([*self._head(), *kept, *self._tail()])

    def paths(self, paths: list[str | None]) -> list[str | None]:
        """Return the paths as they are written to the results, hashed if redacted."""
        name = self.redaction.name if self.redaction else None
        return [path and name(path) for path in paths] if name else paths

    @staticmethod
    def _head() -> list[pa.Field[Any]]:
        return [pa.field("row", pa.int64()), pa.field(PATH_COLUMN, pa.string())]

    def _tail(self) -> list[pa.Field[Any]]:
        scores = [f"p_{name}" for name in self.classes]
        scores += [f"{member}_p_{name}" for member in self.members for name in self.classes]
        return [
            pa.field("status", pa.string()),
            pa.field("error", pa.string()),
            pa.field("flags", pa.list_(pa.string())),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("bits", pa.int32()),
            pa.field("photometric", pa.string()),
            *(pa.field(name, pa.string()) for name in UID_COLUMNS if self.uids),
            pa.field("prediction", pa.string()),
            pa.field("confidence", pa.float32()),
            *(pa.field(name, pa.float32()) for name in scores),
            *(self.triage.fields if self.triage else ()),
        ]
