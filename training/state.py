"""Manage the folder of a training beside its bundle: tables and checkpoints."""

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

    Its tables contain file names, so they are not part of the bundle. `work/` is deleted when the bundle is
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
            self._check_folder()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.folder / LOCK_FILE)
        except BlockingIOError:
            raise UsageError(
                f"{self.folder}: another training is running in this folder; wait until it ends"
            ) from None
        except OSError as error:
            raise UsageError(f"{self.folder}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if [entry.name for entry in self.folder.iterdir()] == [LOCK_FILE]:  # nothing was begun
            (self.folder / LOCK_FILE).unlink()
            self.folder.rmdir()
        os.close(self._lock)

    def _check_folder(self) -> None:
        if self.folder.is_dir():
            names = {entry.name for entry in self.folder.iterdir()}
            if names and LOCK_FILE not in names:
                raise UsageError(
                    f"{self.folder}: the training needs this folder, but it holds other files; delete it or "
                    "choose another --output"
                )
        elif self.folder.exists():
            raise UsageError(
                f"{self.folder}: the training needs a folder here, but this is a file; delete it or choose "
                "another --output"
            )

    def check(self) -> None:
        """Raise UsageError if an earlier training is unfinished here."""
        recorded = self._recorded()
        if recorded is None or recorded.get("finished") or self._options.resume or self._options.overwrite:
            return
        raise UsageError(
            f"{self.folder} holds an unfinished training: to continue, set --resume; to start again, "
            "set --overwrite"
        )

    def begin(self, data_sha256: str) -> None:
        """Record this training, or check that the one to resume has the same options and data."""
        current = {"options": self._options.recorded(), "data_sha256": data_sha256}
        recorded = self._recorded()
        if self._options.resume and recorded is not None and not recorded.get("finished"):
            old, new = recorded["options"], current["options"]
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
                    "to start again, set --overwrite"
                )
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self._write(RECORD_FILE, json.dumps(current | {"finished": False}, indent=2) + "\n")

    def finish(self) -> None:
        """Delete the checkpoints after the bundle is written."""
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
            raise UsageError(f"{self.folder}: {RECORD_FILE} has a wrong format; delete the folder")
        return recorded
