"""Export the progress of a run as Prometheus text in a file and as JSON lines in the log."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from engine.cli.log import RedactingLog
from engine.core.errors import EngineError, UsageError
from engine.core.records import Status
from engine.monitoring.progress_bar import LINE_EVERY_S
from engine.runs.progress import Progress
from engine.storage.atomic import atomic

if TYPE_CHECKING:
    from prometheus_client import Metric

WRITE_EVERY_S = 5.0
MAX_FORECAST_S = 1e9  # a longer forecast is not reported


def progress_snapshot(progress: Progress) -> dict[str, Any]:
    """Return a run's progress as JSON values; null before the first forecast."""
    left_s = progress.seconds_for(progress.rows_left)
    has_forecast = left_s < MAX_FORECAST_S
    deadline = progress.finish_by
    elapsed_s = progress.elapsed_s
    return {
        "rows": progress.rows,
        "rows_done": progress.rows_before + progress.rows_done,
        "rows_before": progress.rows_before,  # done by earlier starts
        "by_status": dict(progress.by_status),
        "rows_per_second": round(progress.rate, 3),
        "elapsed_s": round(elapsed_s, 3),
        "remaining_s": round(left_s, 1) if has_forecast else None,
        "forecast_end": _format_time(left_s) if has_forecast else None,
        "finish_by": deadline.isoformat() if deadline else None,
        "share_done_by_then": round(progress.share_by(deadline), 4) if deadline else None,
        "occupancy": {name: round(meter.occupancy(elapsed_s), 3) for name, meter in progress.meters.items()},
    }


def _format_time(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="seconds")


class JsonProgress:
    """Writes the progress of a run to the log, as a JSON object every few seconds."""

    def __init__(self, log: RedactingLog) -> None:
        self._log, self._last_s = log, -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last_s >= LINE_EVERY_S or not progress.rows_left:
            self._last_s = now
            self._log.event("progress", **progress_snapshot(progress))


class MetricsFile:
    """Writes `file` every few seconds as Prometheus text, for the textfile collector of node_exporter.

    The label `run` is the file's name without its suffix, which distinguishes simultaneous runs. Raises
    UsageError on entry if the file cannot be written; a later failure leaves the file unchanged.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._run = file, file.stem
        self._progress: Progress | None = None
        self._started = time.time()
        self._exit_status: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        if self._file.suffix != ".prom":
            raise UsageError(f"--metrics-file {self._file}: the collector requires a name that ends in .prom")
        try:
            self._write()
        except OSError as error:
            raise UsageError(f"--metrics-file {self._file}: {error.strerror or error}") from None
        self._thread.start()
        return self

    def __call__(self, progress: Progress) -> None:
        self._progress = progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        expected = isinstance(error, EngineError)
        self._exit_status = error.exit_status if expected else int(error is not None)  # type: ignore[union-attr]
        with suppress(OSError):
            self._write()

    def _keep_writing(self) -> None:
        while not self._done.wait(WRITE_EVERY_S):
            with suppress(OSError):
                self._write()

    def _write(self) -> None:
        from prometheus_client import generate_latest

        text = generate_latest(self)  # type: ignore[arg-type,unused-ignore]
        with atomic(self._file) as temporary:
            temporary.write_bytes(text)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics for prometheus_client."""
        yield self._gauge("running", "1 while the run is active.", int(self._exit_status is None))
        yield self._gauge("started_timestamp_seconds", "Start of the run.", self._started)
        yield self._gauge("updated_timestamp_seconds", "Time of this file.", time.time())
        if self._exit_status is not None:
            yield self._gauge("exit_status", "Exit status, once it has ended.", self._exit_status)
        if self._progress:
            yield from self._progress_metrics(progress_snapshot(self._progress))

    def _progress_metrics(self, snapshot: dict[str, Any]) -> Iterator[Metric]:
        yield self._gauge("rows", "Rows of the run.", snapshot["rows"])
        by_status = {status.label: snapshot["by_status"].get(status.label, 0) for status in Status}
        yield self._family("counter", "processed_rows", "Rows done, by status.", "status", by_status)
        yield self._gauge("rows_per_second", "Rate since the start.", snapshot["rows_per_second"])
        text = "Share of the time that a stage was busy; the stage with the highest share limits the run."
        yield self._family("gauge", "stage_occupancy_ratio", text, "stage", snapshot["occupancy"])
        if snapshot["remaining_s"] is not None:
            yield self._gauge("remaining_seconds", "Forecast of the remaining time.", snapshot["remaining_s"])
            end = time.time() + snapshot["remaining_s"]
            yield self._gauge("forecast_end_timestamp_seconds", "Forecast of the end.", end)
        if self._progress and self._progress.finish_by:
            deadline = self._progress.finish_by.timestamp()
            yield self._gauge("deadline_timestamp_seconds", "Deadline of --finish-by.", deadline)
            share = snapshot["share_done_by_then"]
            yield self._gauge("deadline_rows_ratio", "Forecast of the share done by then.", share)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return self._family("gauge", name, text, None, {"": value})

    def _family(self, kind: str, name: str, text: str, label: str | None, values: dict[str, float]) -> Metric:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        family = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}[kind]
        metric = family(f"screening_{name}", text, labels=["run", *([label] if label else [])])
        for word, value in values.items():
            metric.add_metric([self._run, *([word] if label else [])], value)
        return cast("Metric", metric)
