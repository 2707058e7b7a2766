"""Run one shard of a run on one GPU. `engine.executors.multi_gpu` starts this process, which ends with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from datetime import datetime

from engine.core.deadline import Deadline


def exit_with_parent() -> None:
    os.read(0, 1)  # returns when the parent closes the pipe or ends
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    from engine.run import main as run_main

    threading.Thread(target=exit_with_parent, name="parent", daemon=True).start()
    finish_by, *arguments = sys.argv[1:]
    return run_main(arguments, Deadline(datetime.fromisoformat(finish_by) if finish_by else None))


if __name__ == "__main__":
    sys.exit(main())
