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


def _unexpected(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"internal: {text} (ENGINE_DEBUG=1 shows where)"


def _of_system(error: OSError) -> str:  # a full disk, a folder that went away
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def run_command(
    work: Callable[[], int],
    console: Console | None = None,
    *,
    interrupted: tuple[str, int] = ("", 130),
    of_system: Callable[[OSError], str] = _of_system,
    unexpected: Callable[[Exception], str] = _unexpected,
) -> int:
    """Return the exit status of `work`, or that of its error, which is told in one line on stderr.

    `interrupted` is the text, if any, and the exit status after Ctrl-C, for work that has no way of its own
    to stop. `of_system` and `unexpected` put errors into words. With ENGINE_DEBUG unexpected ones are raised.
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
        reason, exit_status = of_system(error), EngineError.exit_status
    except KeyboardInterrupt:
        reason, exit_status = interrupted
    except Exception as error:
        if "ENGINE_DEBUG" in os.environ:
            raise
        reason, exit_status = unexpected(error), EngineError.exit_status
    if reason:
        console.print(f"error: {reason}", markup=False, highlight=False, soft_wrap=True)
    return exit_status


def hush_libraries() -> None:
    """Silence what libraries say of single files, which may hold paths and header values."""
    warnings.simplefilter("ignore")
    logging.lastResort = None


def stop_on_signal(console: Console, deadline: Deadline | None = None) -> Deadline:
    """Return the deadline, which the first signal brings about; a second signal ends the process.

    If work has not ended GIVE_UP_S after the deadline, the process ends all the same.
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
        # not console.print: the signal may have come in the middle of one, or of what it imports
        console.file.write("stopping; once more to stop at once\n")
        console.file.flush()
        end.stop.set()
        _in_background(GIVE_UP_S, give_up)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, handle)
    if end.moment:
        _in_background(end.left_s + GIVE_UP_S, give_up)
    return end


def _in_background(seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
