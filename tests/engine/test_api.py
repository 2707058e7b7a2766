"""A whole run from Python: options and errors of the command line, nothing of the process touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

import engine
from engine.api import NOT_HERE, Options
from engine.ledger import Progress
from engine.options import OPTIONS
from tests.helpers.processes import ROOT


def test_importing_is_light() -> None:
    code = (
        "import sys, engine; assert 'screen' in dir(engine); "
        "print([name for name in ('numpy', 'pyarrow', 'torch', 'rich', 'pandas') if name in sys.modules]); "
        "engine.UsageError; engine.read_results; print('pyarrow' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


def test_options_are_those_of_the_command_line() -> None:
    assert set(Options.__annotations__) == OPTIONS.keys() - NOT_HERE


def test_a_run_from_a_thread(archive: Path, bundle: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    seen, said, outcome = list[int](), list[str](), []

    def progress(now: Progress) -> None:
        seen.append(now.rows_done)

    def work() -> None:
        outcome.append(
            engine.screen(
                archive,
                output=tmp_path / "out",
                bundle=bundle,
                part_rows=16,
                batch_size=4,
                memory=1 << 28,
                include=["*.png"],
                finish_by=pd.Timestamp.now(tz="UTC") + pd.Timedelta(hours=1),
                metrics_file=tmp_path / "a.prom",
                device="cpu",
                cuda_graph=False,
                progress=progress,
                say=said.append,
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (summary,) = outcome
    assert (summary.rows, summary.by_status) == (20, {"ok": 20})
    assert seen[-1] == 20
    assert "ONNX Runtime on the CPU" in said[0]
    assert (tmp_path / "a.prom").exists()
    assert len(list((tmp_path / "out").glob("part-*"))) == 2
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_stopping_and_going_on(archive: Path, bundle: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def progress(now: Progress) -> None:
        stop.set()

    options = Options(output=tmp_path / "out", bundle=bundle, part_rows=8, batch_size=4, serial=True)
    with pytest.raises(engine.Stopped):
        engine.screen(archive, progress=progress, stop=stop, **options, read_timeout_s=0.1)
    summary = engine.screen(archive, **options)
    assert 0 < summary.rows_done <= summary.rows == 40


def test_wrong_options_and_runs(archive: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no option 'batchsize'; did you mean 'batch_size'"):
        engine.screen(archive, batchsize=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="overwrite is 1"):
        engine.screen(archive, overwrite=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="include is"):
        engine.screen(archive, include="*.png")
    with pytest.raises(engine.UsageError, match="'0' is not a whole number from 1"):
        engine.screen(archive, batch_size=0)
    with pytest.raises(engine.UsageError, match="no such file"):
        engine.screen("-nowhere.csv", bundle=bundle, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (archive / "list.txt").write_text("image-00.png\ngone.png\n")
    with pytest.raises(engine.ErrorRateError) as caught:
        engine.screen(archive / "list.txt", bundle=bundle, output=tmp_path / "out", max_error_rate=0.4)
    assert caught.value.summary.by_status == {"ok": 1, "missing": 1}
    with pytest.raises(AttributeError, match="no attribute 'scren'"):
        engine.scren  # noqa: B018
