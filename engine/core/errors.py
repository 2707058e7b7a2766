"""The errors that users see. Each is one line and has the exit status of the command line."""

from __future__ import annotations


class EngineError(Exception):
    """An error that is shown to the user as one line, without a traceback."""

    exit_status = 1


class UsageError(EngineError):
    """A wrong argument, manifest, bundle or output folder. The text has the value and what is allowed."""

    exit_status = 2


class ParityError(EngineError):
    """Two forms of one model disagree by more than the limit."""

    exit_status = 4


class NothingNew(EngineError):  # noqa: N818 - not a failure
    """There are no new rows since the earlier run."""

    exit_status = 0


class Stopped(EngineError):  # noqa: N818 - not a failure
    """The run was asked to stop; run the same command again to continue."""

    exit_status = 5
