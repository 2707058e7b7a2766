"""Open a results folder by its location."""

from __future__ import annotations

from pathlib import Path

from engine.core.errors import UsageError
from engine.core.location import HTTP_SCHEMES, Url
from engine.storage.folders import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.object_folder import ObjectFolder


def open_folder(location: Path | Url) -> Folder:
    """Open the folder. Raises UsageError for a URL that cannot be written to."""
    if isinstance(location, Path):
        return LocalFolder(location)
    if location.scheme in HTTP_SCHEMES:
        raise UsageError(
            f"results {location}: a web server takes no files; give a folder, s3://, gs:// or az://"
        )
    return ObjectFolder(location)
