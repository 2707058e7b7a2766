"""The input of each peer, and the file of rows that it writes."""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from engine.bundle import bundle as bundles
from engine.scoring.ensemble import combine_logits

TIME_MARK = "benchmark mark:"  # prefix of lines for `contest.py` in a peer's output

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PeerJob:
    manifest: Path
    bundle: bundles.Bundle
    output: Path  # a new folder
    threads: int  # number of cores

    @classmethod
    def from_command_line(cls) -> PeerJob:
        parser = argparse.ArgumentParser()
        for name in ("manifest", "bundle", "output"):
            parser.add_argument(name, type=Path)
        parser.add_argument("--threads", type=int, required=True)
        arguments = parser.parse_args()
        return cls(
            arguments.manifest.absolute(),
            bundles.load_bundle(arguments.bundle),
            arguments.output.absolute(),
            arguments.threads,
        )

    @property
    def names(self) -> list[str]:
        """Return the manifest's paths, in order."""
        with self.manifest.open(newline="") as lines:
            return [row["path"] for row in csv.DictReader(lines)]

    @property
    def paths(self) -> list[str]:
        """Return the paths of the files."""
        return [str(self.manifest.parent / name) for name in self.names]

    @property
    def graphs(self) -> list[str]:
        """Return each member's ONNX graph: uint8 [N, 1, H, W] to float32 logits [N, C]."""
        return [str(member.files["onnx"].path) for member in self.bundle.members]

    @property
    def columns(self) -> list[str]:
        return [f"p_{name}" for name in self.bundle.classes]

    def average(self, logits: Sequence[Floats]) -> Floats:
        """Average the softmax of the members' logits [N, C] with the weights: probabilities [N, C]."""
        return combine_logits(
            np.stack(logits),
            weights=self.bundle.weights,
            temperatures=[member.temperature for member in self.bundle.members],
            temperature=self.bundle.temperature,
        )[1]

    def start(self, time_s: float | None = None) -> None:
        """Mark the start of reading, now or at `time_s`, after the members are loaded and warm."""
        print(TIME_MARK, "start", time.monotonic() if time_s is None else time_s, flush=True)

    def finish(self, scores: Floats) -> None:
        """Write the rows to the disk and stop the clock; scores [rows, C] are NaN for failed rows."""
        scored = ~np.isnan(scores).any(axis=1)
        columns: dict[str, pa.Array] = {
            "path": pa.array(self.names),
            "status": pa.array(np.where(scored, "ok", "corrupt")),
        }
        for name, column in zip(self.columns, scores.T, strict=True):
            columns[name] = pa.array(column, mask=~scored)
        self.output.mkdir(parents=True)
        pq.write_table(pa.table(columns), self.output / "rows.parquet")
        self.stop()

    def stop(self) -> None:
        """Sync the output folder and stop the clock."""
        for path in (*self.output.iterdir(), self.output):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        print(TIME_MARK, "stop", time.monotonic(), flush=True)

    def no_scores(self) -> Floats:
        """Return NaN scores [rows, C]."""
        return np.full((len(self.names), len(self.bundle.classes)), np.nan, np.float32)

    def blank(self, batch: int) -> npt.NDArray[np.uint8]:
        """Return pixels for a warm-up."""
        return np.zeros((batch, 1, *self.bundle.size), np.uint8)


def batches(rows: int, size: int) -> Iterator[range]:
    for start in range(0, rows, size):
        yield range(start, min(start + size, rows))
