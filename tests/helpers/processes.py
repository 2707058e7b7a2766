"""Run commands of this project."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


def run_module(
    module: str, arguments: Sequence[str | Path], *, folder: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_here(
    module: str, arguments: Sequence[str | Path], *, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` in `folder`, in this process, which saves the start-up.

    Not for runs that end by a signal or `--finish-by`.
    """
    imported = import_module(module)
    main = (import_module(f"{module}.__main__") if hasattr(imported, "__path__") else imported).main
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    last_resort = logging.lastResort
    out, err = io.StringIO(), io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.chdir(folder)
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setenv("COLUMNS", "200")
            with redirect_stdout(out), redirect_stderr(err):
                status = main([str(argument) for argument in arguments])
    finally:
        logging.lastResort = last_resort
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def in_background(arguments: Sequence[str | Path], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS` in `folder`, in a new session, with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextmanager
def starting(folder: Path) -> Iterator[Start]:
    """Yield a function that starts `python ARGUMENTS` in `folder`; kill the processes at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        started.append(in_background(arguments, folder, **environment))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe
                pipe.close()
