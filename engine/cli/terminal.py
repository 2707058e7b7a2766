"""End a command: an exit status, an error in one line, a stop on a signal or at a deadline."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable
from types import FrameType

from rich.console import Console

from engine.core.deadline import GIVE_UP_S, Deadline
from engine.core.errors import EngineError, NothingNew, Stopped


def _describe_unexpected(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"internal: {text} (ENGINE_DEBUG=1 shows where)"


def _describe_os_error(error: OSError) -> str:  # such as a full disk or a deleted folder
    path = f"{error.filename}: " if error.filename else ""
    return f"{path}{error.strerror or error}"


def run_command(
    work: Callable[[], int],
    console: Console | None = None,
    *,
    interrupted: tuple[str, int] = ("", 130),
    describe_os_error: Callable[[OSError], str] = _describe_os_error,
    describe_unexpected: Callable[[Exception], str] = _describe_unexpected,
) -> int:
    """Return the exit status of `work`, or print its error in one line on stderr and return its status.

    `interrupted` is the text, if any, and the exit status after Ctrl-C, for work that does not handle it.
    `describe_os_error` and `describe_unexpected` return the text of an error. With ENGINE_DEBUG unexpected
    errors are raised.
    """
    console = console or Console(stderr=True, emoji=False)
    try:
        return work()
    except NothingNew as nothing:
        console.print(str(nothing), markup=False, highlight=False, soft_wrap=True)
        return nothing.exit_status
    except EngineError as error:
        reason, exit_status = str(error), error.exit_status
    except OSError as error:
        reason, exit_status = describe_os_error(error), EngineError.exit_status
    except KeyboardInterrupt:
        reason, exit_status = interrupted
    except Exception as error:
        if "ENGINE_DEBUG" in os.environ:
            raise
        reason, exit_status = describe_unexpected(error), EngineError.exit_status
    if reason:
        console.print(f"error: {reason}", markup=False, highlight=False, soft_wrap=True)
    return exit_status


def hush_libraries() -> None:
    """Silence the messages of libraries about single files, which may contain paths and header values."""
    warnings.simplefilter("ignore")
    logging.lastResort = None


def stop_on_signal(console: Console, deadline: Deadline | None = None) -> Deadline:
    """Return the deadline, which the first signal sets to now; a second signal ends the process.

    If the work has not ended GIVE_UP_S after the deadline, the process ends anyway.
    """
    end = deadline or Deadline()

    def give_up() -> None:
        end.reached()
        console.show_cursor(True)
        console.print(
            f"error: {end.why} while storage or a stage hangs; run the same command again to continue"
        )
        os._exit(Stopped.exit_status)

    def handle(number: int, frame: FrameType | None) -> None:
        if end.stop.is_set():
            console.show_cursor(True)
            os._exit(130)
        # not console.print: the signal may interrupt a print, or an import inside it
        console.file.write("stopping; press Ctrl-C again to stop at once\n")
        console.file.flush()
        end.stop.set()
        _start_timer(GIVE_UP_S, give_up)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handle)
    if end.moment:
        _start_timer(end.left_s + GIVE_UP_S, give_up)
    return end


def _start_timer(seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
