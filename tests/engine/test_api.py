"""A whole run from Python: options and errors of the command line, nothing of the process touched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import pandas as pd
import pytest

import engine
from engine.api import Options
from engine.core.settings import OPTIONS, Settings
from engine.runs.progress import Progress
from engine.runs.run_settings import settings_from, settings_from_keywords
from tests.helpers.processes import ROOT
from tests.helpers.runs import list_images, parts


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


def members(kind: object) -> frozenset[object]:
    union = get_origin(kind) in (Union, UnionType)
    return frozenset(get_args(kind) if union else (kind,))


def test_the_static_types_are_those_of_the_options() -> None:
    stated = {
        name: members(option.keyword_type) | (set() if option.default is not None else {NoneType})
        for name, option in OPTIONS.items()
        if option.in_python
    }
    assert {name: members(kind) for name, kind in get_type_hints(Options).items()} == stated


@pytest.mark.slow
def test_a_type_checker_knows_the_types(tmp_path: Path) -> None:
    lines = ("batch_size=8, memory='2GiB'", "batch_size='x'", "batchsize=3", "runner='tpu'", "keep=3")
    code = "\n".join(f"engine.screen('m.csv', {line})" for line in lines)
    (tmp_path / "use.py").write_text(f"import engine\n{code}\n")
    options = ["--follow-imports=silent", "--cache-dir", str(tmp_path / "cache"), "--config-file="]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--ignore-missing-imports", "use.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.findall(r"^use\.py:(\d+): error", done.stdout, re.MULTILINE) == ["3", "4", "5", "6"], (
        done.stdout
    )


def test_a_command_line_asks_for_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "salt").write_text("0123456789abcdef")
    settings = settings_from_keywords(
        "-m.csv",
        {
            "root": "s3://bucket/a b",
            "include": ["*.png", "--x"],
            "shard": "2/3",
            "memory": "2GiB",
            "cuda_graph": False,
            "serial": True,
            "finish_by": datetime.now().astimezone() + timedelta(hours=1),
            "redact": True,
            "salt_file": tmp_path / "salt",
            "keep": ("b", "a"),
            "max_error_rate": 1e-7,
            "overwrite": False,
        },
    )
    assert settings.limits.memory == 2 << 30
    assert settings.redaction is not None
    assert settings.redaction.keep == ("a", "b")
    moment = settings.finish_by
    assert moment is not None
    arguments = [
        *("--root=s3://bucket/a b", "--include=*.png", "--include=--x", "--shard=2/3", "--memory=2GiB"),
        *(
            "--no-cuda-graph",
            "--serial",
            f"--finish-by={moment.isoformat()}",
            "--redact",
            "--keep=b",
            "--keep=a",
        ),
        *(f"--salt-file={tmp_path / 'salt'}", "--max-error-rate=1e-7", "--", "-m.csv"),
    ]
    assert settings_from(arguments) == settings
    assert settings_from(["m"]) == Settings(manifest=Path("m"))


def test_a_run_from_a_thread(archive: Path, bundle: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    seen, log, outcome = list[int](), list[str](), []

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
                say=log.append,
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (summary,) = outcome
    assert (summary.rows, summary.by_status) == (20, {"ok": 20})
    assert seen[-1] == 20
    assert "ONNX Runtime on the CPU" in log[0]
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


def test_the_deadline_stops_a_run_inside_a_part(bundle: Path, tmp_path: Path) -> None:
    list_images(tmp_path, 100_000)
    moment = datetime.now().astimezone() + timedelta(seconds=3)
    with pytest.raises(engine.Stopped, match=rf"^stopped for --finish-by {moment:%H:%M}, \d+ of 100000 rows"):
        engine.screen(
            tmp_path / "m.txt", output=tmp_path / "out", bundle=bundle, finish_by=moment, part_rows=99_999
        )
    assert 0 <= (datetime.now().astimezone() - moment).total_seconds() < 5
    assert not parts(tmp_path / "out")


def test_wrong_options_and_runs(archive: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no option 'batchsize'; did you mean 'batch_size'"):
        engine.screen(archive, batchsize=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="overwrite is 1"):
        engine.screen(archive, overwrite=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="include is"):
        engine.screen(archive, include="*.png")
    with pytest.raises(engine.UsageError, match=r"^batch_size: 0 is not a whole number from 1 to 4096$"):
        engine.screen(archive, batch_size=0)
    with pytest.raises(TypeError, match=r"^batch_size is 'x'; allowed: a whole number$"):
        engine.screen(archive, batch_size="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^slots is True; allowed: a whole number$"):
        engine.screen(archive, slots=True)
    with pytest.raises(engine.UsageError, match=r"^decode is 'some'; allowed: exact, fast$"):
        engine.screen(archive, decode="some")  # type: ignore[arg-type]
    with pytest.raises(engine.UsageError, match="--finish-by '25:00' is not a time"):
        engine.screen(archive, finish_by="25:00")
    with pytest.raises(engine.UsageError, match="no such file"):
        engine.screen("-nowhere.csv", bundle=bundle, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (archive / "list.txt").write_text("image-00.png\ngone.png\n")
    with pytest.raises(engine.ErrorRateError) as caught:
        engine.screen(archive / "list.txt", bundle=bundle, output=tmp_path / "out", max_error_rate=0.4)
    assert caught.value.summary.by_status == {"ok": 1, "missing": 1}
    with pytest.raises(AttributeError, match="no attribute 'scren'"):
        engine.scren  # noqa: B018
