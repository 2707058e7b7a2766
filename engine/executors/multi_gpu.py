"""Run one process for each GPU of this machine (`--device cuda:all`), each with a shard of the run.

A process is `python -m engine.gpu_worker`: `engine.run` that also ends when its parent ends. It reports
its progress in JSON lines (`--log-json`).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.core import hardware
from engine.core.deadline import Deadline
from engine.core.errors import EngineError, Stopped
from engine.core.hardware import available_cpus
from engine.core.json_records import from_builtins
from engine.core.overlap import Meter
from engine.core.records import OnMessage
from engine.core.settings import Settings, Shard
from engine.runs.progress import OnProgress, Progress
from engine.runs.run_folder import RunFolder
from engine.runs.run_record import RunRecord
from engine.runs.run_settings import command_line
from engine.runs.summary import StageTimes, Success, Summary, summarise_run
from engine.sink.parts import part_name

POLL_S = 0.2
KILL_AFTER_S = 20.0  # from the signal to end until a process is killed
MAX_NAMED_PARTS = 5  # missing parts listed in an error
_STATUSES_BY_SEVERITY = (0, 5, 1, 4, 2, 130)  # exit statuses
Command = Callable[[str, Shard], list[str]]  # for a device and a shard


def list_devices() -> list[str]:
    """Return the names of all GPUs. Raises UsageError when there is none."""
    return [f"cuda:{index}" for index in range(hardware.count_gpus())]


def run_on_all_gpus(
    settings: Settings,
    *,
    on_progress: OnProgress,
    say: OnMessage = lambda _: None,
    deadline: Deadline | None = None,
) -> Summary:
    """Screen on all GPUs.

    When one dies, the others finish their parts; then an EngineError lists the missing parts and has the
    most severe exit status. Raises Stopped at `deadline`.
    """
    devices = list_devices()
    shards = local_shards(settings, len(devices))
    deadline = deadline or Deadline(settings.finish_by)
    processes = GpuProcesses(settings, partial(_child_command, settings, len(devices)), shards, say, deadline)
    try:
        processes.screen(devices, on_progress)
    finally:
        processes.end()
    return processes.summarise()


def local_shards(settings: Settings, devices: int) -> list[Shard]:
    """Return the shards of this machine: its share of the run's existing shards, else one for each GPU."""
    own = settings.shard or Shard(1, 1)
    folder = RunFolder(settings.output, overwrite=False)
    run = folder.recorded()
    recorded = run and run.result_options.shards
    count = recorded if recorded and recorded % own.of == 0 else own.of * devices
    shards_here = count // own.of
    return [
        Shard(number, count)
        for number in range((own.number - 1) * shards_here + 1, own.number * shards_here + 1)
    ]


def _child_command(settings: Settings, devices: int, device: str, shard: Shard) -> list[str]:
    """Return the command that screens one shard with `settings`."""
    own = replace(
        settings,
        device=device,
        shard=shard,
        workers=max(1, (settings.workers or available_cpus()) // devices),
        memory=settings.memory // devices,
        max_error_rate=1.0,  # the parent checks the rate of the whole run
        finish_by=None,
        metrics_file=None,
        log_json=True,
    )
    # may be past when the child parses it
    finish_by = settings.finish_by.isoformat() if settings.finish_by else ""
    return [sys.executable, "-m", "engine.gpu_worker", finish_by, *command_line(own)]


@dataclass(eq=False)
class GpuProcess:
    """A process on one device, with the progress that it reported last."""

    device: str
    shard: Shard
    process: subprocess.Popen[str]
    rows_before: int = 0
    rows_done: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    occupancy: dict[str, float] = field(default_factory=dict)
    error: str = ""
    summary: Success | None = None

    @classmethod
    def start(cls, command: list[str], device: str, shard: Shard) -> GpuProcess:
        path = filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closes when this process ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # this process forwards signals
        )
        return cls(device, shard, process)

    def forward_events(self, events: queue.SimpleQueue[tuple[GpuProcess, dict[str, Any] | None]]) -> None:
        """Put the events of the process into `events`, and None when it has ended."""
        assert self.process.stderr
        with self.process.stderr as stderr:
            for line in stderr:
                try:
                    event = json.loads(line)
                    assert isinstance(event["event"], str)
                except (ValueError, KeyError, TypeError, AssertionError):  # output of a library
                    event = {"event": "output", "message": line.strip()[:200]}
                events.put((self, event))
        self.process.wait()
        events.put((self, None))

    def apply_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self.rows_before = event["rows_before"]
            self.rows_done = event["rows_done"] - self.rows_before
            self.by_status, self.occupancy = event["by_status"], event["occupancy"]
        elif event["event"] == "summary":
            fields = {name: value for name, value in event.items() if name not in ("time", "event")}
            self.summary = from_builtins(fields, Success)
            self.by_status, self.rows_done = self.summary.by_status, self.summary.last_start.rows
            self.rows_before = max(0, self.summary.rows - self.rows_done)

    @property
    def exit_status(self) -> int:
        status = self.process.poll() or 0
        return status if status in _STATUSES_BY_SEVERITY else Stopped.exit_status if status < 0 else 1

    @property
    def has_stopped(self) -> bool:
        """Return whether the process stopped early, as at `finish_by`."""
        return self.process.poll() == Stopped.exit_status

    @property
    def problem(self) -> str:
        """Return why the process failed."""
        status = self.process.poll() or 0
        if status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        return self.error or f"it ended with status {status}"


class GpuProcesses:
    def __init__(
        self,
        settings: Settings,
        command: Command,
        shards: Sequence[Shard],
        say: OnMessage,
        deadline: Deadline,
    ) -> None:
        self._settings, self._command, self._say, self._deadline = settings, command, say, deadline
        self._waiting = deque(shards)
        self._shards = tuple(shards)
        self._children: list[GpuProcess] = []
        self._events: queue.SimpleQueue[tuple[GpuProcess, dict[str, Any] | None]] = queue.SimpleQueue()
        self._shown_messages: set[str] = set()
        self._stopped = False
        self.progress = Progress(0, finish_by=settings.finish_by)

    def screen(self, devices: Sequence[str], on_progress: OnProgress) -> None:
        """Run a shard on each device until all are done or the deadline is reached."""
        running = {self._start(device) for device in devices[: len(self._waiting)]}
        while running:
            with suppress(queue.Empty):
                child, event = self._events.get(timeout=POLL_S)
                if event is None:
                    running.discard(child)
                    if self._waiting and child.exit_status == 0 and not self._deadline.reached():
                        running.add(self._start(child.device))
                else:
                    self._take(child, event, on_progress)
            if self._deadline.reached() and not self._stopped:
                self._stopped = True
                self._waiting.clear()
                if self._deadline.left_s > 0:  # a second signal would stop them at once
                    for child in running:
                        child.process.send_signal(signal.SIGTERM)

    def _start(self, device: str) -> GpuProcess:
        shard = self._waiting.popleft()
        child = GpuProcess.start(self._command(device, shard), device, shard)
        self._children.append(child)
        threading.Thread(target=child.forward_events, args=(self._events,), name=device, daemon=True).start()
        return child

    def _take(self, child: GpuProcess, event: dict[str, Any], on_progress: OnProgress) -> None:
        child.apply_event(event)
        if event["event"] in ("progress", "summary"):
            self._sum_progress(event.get("elapsed_s") or 0.0)
            if self.progress.rows_done:
                on_progress(self.progress)
        elif event.get("level") == "error" or event["event"] == "output":
            child.error = event["message"]
        elif (
            event["event"] == "message" and not self._stopped and event["message"] not in self._shown_messages
        ):
            self._shown_messages.add(event["message"])  # most processes send the same message
            self._say(event["message"])

    def _sum_progress(self, elapsed_s: float) -> None:
        progress, children = self.progress, self._children
        if not progress.rows:
            run = RunFolder(self._settings.output, overwrite=False).run()
            progress.rows = sum(map(run.shard_rows, self._shards))
            progress.started = time.monotonic() - elapsed_s
        progress.rows_before = sum(child.rows_before for child in children)
        progress.rows_done = sum(child.rows_done for child in children)
        progress.by_status = sum((Counter(child.by_status) for child in children), Counter())
        occupancies = [child.occupancy for child in children if child.occupancy]
        for name in occupancies[0] if occupancies else ():
            busy = sum(occupancy.get(name, 0.0) for occupancy in occupancies) / len(occupancies)
            progress.meters[name] = Meter(name, busy_s=busy * progress.elapsed_s)

    def _indices(self, run: RunRecord) -> list[int]:
        """Return the indices of this machine's parts."""
        return sorted(index for shard in self._shards for index in run.part_indices(shard))

    def end(self) -> None:
        """End the processes that still run."""
        for child in self._children:
            with suppress(OSError):
                child.process.stdin.close()  # type: ignore[union-attr]
        deadline = time.monotonic() + KILL_AFTER_S
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    def summarise(self) -> Summary:
        folder = RunFolder(self._settings.output, overwrite=False)
        run = folder.recorded()
        indices = self._indices(run) if run else []
        parts = folder.finished(run, frozenset(indices)) if run else {}
        rows = sum(part.rows for part in parts.values())
        missing = [index for index in indices if index not in parts]
        failed = [child for child in self._children if child.exit_status]
        if self._stopped and (missing or not run):
            failed = [child for child in failed if child.exit_status != Stopped.exit_status]
        elif failed and all(child.has_stopped for child in failed):
            failed.clear()
        elif run and not failed:
            self.progress.rows = rows
            summary = summarise_run(folder.path, run, parts.values(), self.progress, {})
            shard = self._settings.shard
            summary = replace(summary, rows=rows, shard=str(shard) if shard else None)
            return _with_stages(summary, self._children)
        if failed:
            raise self._failure(failed, missing)
        total = sum(map(run.rows_in_part, indices)) if run else 0
        raise self._deadline.stopped(f"{rows} of {total} rows are in finished parts")

    def _failure(self, failed: Sequence[GpuProcess], missing: Sequence[int]) -> EngineError:
        problems = {
            child.problem: f"{child.device} (shard {child.shard}): {child.problem}" for child in failed
        }
        is_common = len(problems) == 1 and len(failed) == len(self._children)
        text = "; ".join(problems if is_common else problems.values())
        status = max((child.exit_status for child in failed), key=_STATUSES_BY_SEVERITY.index)
        if status in (1, Stopped.exit_status):
            names = ", ".join(map(part_name, missing[:MAX_NAMED_PARTS]))
            names += ", ..." if len(missing) > MAX_NAMED_PARTS else ""
            if missing:
                text += f"; {len(missing)} parts are missing ({names})"
            text += "; run the same command again to continue"
        error = EngineError(text)
        error.exit_status = status
        return error


def _with_stages(summary: Summary, children: Sequence[GpuProcess]) -> Summary:
    """Add the stage times: the seconds of all processes and their mean occupancy."""
    starts = [child.summary.last_start for child in children if child.summary]
    stages = [start.stages for start in starts if start.stages]
    if not stages:
        return summary
    sums = {name: _sum([times[name] for times in stages]) for name in stages[0]}
    return replace(
        summary,
        stages=sums,
        limited_by=max(sums, key=lambda name: sums[name].occupancy),
        decoder_restarts=sum(start.decoder_restarts for start in starts),
        decoder_refusals=sum(start.decoder_refusals for start in starts),
    )


def _sum(times: Sequence[StageTimes]) -> StageTimes:
    occupancy = round(sum(stage.occupancy for stage in times), 3) / len(times)
    return StageTimes(
        busy_s=round(sum(stage.busy_s for stage in times), 3),
        starved_s=round(sum(stage.starved_s for stage in times), 3),
        blocked_s=round(sum(stage.blocked_s for stage in times), 3),
        occupancy=round(occupancy, 3),
    )
