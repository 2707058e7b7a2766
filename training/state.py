"""The folder beside a bundle that holds its training: lists for people, checkpoints to go on from."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from engine.core.errors import UsageError
from engine.storage.locks import lock_file
from training.settings import TrainingOptions

RECORD_FILE, WORK_FOLDER, LOCK_FILE = "training.json", "work", ".lock"


class TrainingState:
    """`BUNDLE.training`, locked for this process while it is open.

    Its tables name files, so they stay out of the bundle, which is passed on. `work/` goes when the bundle is
    written.
    """

    def __init__(self, options: TrainingOptions) -> None:
        self.folder = options.output.absolute().with_name(options.output.absolute().name + ".training")
        self._options = options

    @property
    def work(self) -> Path:
        """Return the folder of checkpoints and features."""
        return self.folder / WORK_FOLDER

    def __enter__(self) -> Self:
        try:
            self._refuse_foreign()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.folder / LOCK_FILE)
        except BlockingIOError:
            raise UsageError(f"{self.folder}: another training is under way there") from None
        except OSError as error:
            raise UsageError(f"{self.folder}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if [entry.name for entry in self.folder.iterdir()] == [
            LOCK_FILE
        ]:  # nothing was begun: leave no trace
            (self.folder / LOCK_FILE).unlink()
            self.folder.rmdir()
        os.close(self._lock)

    def _refuse_foreign(self) -> None:
        if self.folder.is_dir():
            names = {entry.name for entry in self.folder.iterdir()}
            if names and LOCK_FILE not in names:
                raise UsageError(f"{self.folder}: it is needed, but holds something that is no training's")
        elif self.folder.exists():
            raise UsageError(f"{self.folder}: it is needed, but is a file")

    def check(self) -> None:
        """Before the long part: raise UsageError if an earlier training was left unfinished here."""
        recorded = self._recorded()
        if recorded is None or recorded.get("finished") or self._options.resume or self._options.overwrite:
            return
        raise UsageError(
            f"{self.folder} holds an unfinished training: continue with --resume, or start again "
            "with --overwrite"
        )

    def begin(self, data_sha256: str) -> None:
        """Record this training, or check that the one to resume has the same options and data."""
        now = {"options": self._options.recorded(), "data_sha256": data_sha256}
        recorded = self._recorded()
        if self._options.resume and recorded is not None and not recorded.get("finished"):
            old, new = recorded["options"], now["options"]
            changed = [
                f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
                for name in {**old, **new}
                if old.get(name) != new.get(name)
            ]
            if recorded["data_sha256"] != data_sha256:
                changed.append("images, labels or patients have changed")
            if changed:
                raise UsageError(
                    f"{self.folder} holds another training: {'; '.join(changed)}; "
                    "start again with --overwrite"
                )
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self._write(RECORD_FILE, json.dumps(now | {"finished": False}, indent=2) + "\n")

    def finish(self) -> None:
        """Delete what was needed to resume, once the bundle is in place."""
        recorded = self._recorded()
        assert recorded is not None
        self._write(RECORD_FILE, json.dumps(recorded | {"finished": True}, indent=2) + "\n")
        shutil.rmtree(self.work, ignore_errors=True)

    def write_table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
        """Write a CSV for people, atomically. Bytes of names that are not UTF-8 are escaped."""
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
        return self._write(name, text.getvalue())

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        temporary.rename(path)
        return path

    def _recorded(self) -> dict[str, Any] | None:
        try:
            recorded = json.loads((self.folder / RECORD_FILE).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.folder}: {RECORD_FILE} can't be read ({error}); delete the folder"
            ) from None
        if not isinstance(recorded, dict) or not {"options", "data_sha256"} <= recorded.keys():
            raise UsageError(f"{self.folder}: {RECORD_FILE} makes no sense; delete the folder")
        return recorded
