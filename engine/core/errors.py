"""The errors a user can meet. Each is one line and carries the exit status of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class EngineError(Exception):
    """Something went wrong that the user should read as one line, not as a traceback."""

    exit_status = 1


class UsageError(EngineError):
    """A wrong argument, manifest, bundle or output folder: the value, what is allowed, the likely mistake."""

    exit_status = 2


class ParityError(EngineError):
    """Two forms of one model disagree by more than the limit."""

    exit_status = 4


class NothingNew(EngineError):  # noqa: N818 - not a failure
    """There is no row to screen since an earlier run."""

    exit_status = 0


class Stopped(EngineError):  # noqa: N818 - not a failure
    """The run was asked to stop; run the same command again to continue."""

    exit_status = 5
