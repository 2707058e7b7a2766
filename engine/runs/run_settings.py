"""Make the settings of a run from its command line or from keywords, and check them together."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.cli.options import option_parser
from engine.core.errors import UsageError
from engine.core.location import Url
from engine.core.settings import ALL_GPUS, OPTIONS, Settings, parse_location
from engine.runs.run_folder import recorded_bundle_path

AnyLocation = str | os.PathLike[str] | Url


def settings_from(arguments: list[str]) -> Settings:
    """Parse a command line. Raises UsageError, and SystemExit for --help."""
    return settings_of(vars(option_parser().parse_args(arguments)))


def settings_from_keywords(manifest: AnyLocation, keywords: Mapping[str, Any]) -> Settings:
    """Return the settings of the keywords of `engine.screen`. Raises TypeError and UsageError."""
    known = [name for name, option in OPTIONS.items() if option.in_python]
    for name in keywords.keys() - set(known):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
        raise TypeError(f"screen() has no option {name!r}; {hint}")
    values = {name: OPTIONS[name].check(value) for name, value in keywords.items()}
    return settings_of({"manifest": parse_location(manifest), **values})


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Return the settings of parsed values by option name. Raises UsageError for contradicting options."""
    arguments: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    settings = Settings(**arguments)
    if settings.shard and settings.device == ALL_GPUS:
        raise UsageError(
            f"--device {ALL_GPUS} with --shard: give each GPU its own shard, with CUDA_VISIBLE_DEVICES, or "
            "join the machines into a Ray cluster and use --ray HOST:PORT"
        )
    if settings.overwrite and settings.shard:
        raise UsageError(
            f"--overwrite with --shard {settings.shard}: it would delete the parts of other shards; delete "
            f"{settings.output} before they start, or give another -o"
        )
    if settings.only_errors:
        settings = _take_from_run(settings)
    _check_ray(settings)
    if not settings.redact and (settings.keep or settings.salt_file):
        raise UsageError(f"{'--keep' if settings.keep else '--salt-file'} works only with --redact")
    if settings.paths_from and not (settings.redact and settings.only_errors):
        raise UsageError("--paths-from works only with --only-errors and --redact; give all three")
    return settings


def _changed(settings: Settings) -> list[str]:
    return [name for name, option in OPTIONS.items() if getattr(settings, name) != option.default]


def _check_ray(settings: Settings) -> None:
    address = settings.ray
    if address is None:
        if settings.actors:
            raise UsageError("--actors works only with --ray")
        return
    if not re.fullmatch(r"local|auto|[\w.-]+:\d{1,5}", address):
        raise UsageError(
            f"--ray {address}: allowed: nothing (a Ray of its own), auto, or a cluster's HOST:PORT"
        )
    if settings.only_errors or settings.shard:
        option = OPTIONS["only_errors" if settings.only_errors else "shard"]
        raise UsageError(f"{option.flag} works in one process; leave --ray out")
    if settings.device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {settings.device}: each actor on Ray has a GPU of its own; allowed: auto, cpu"
        )


def _take_from_run(settings: Settings) -> Settings:
    """Take the options of the run for --only-errors, except those of operation."""
    changed = _changed(settings)
    not_allowed = {OPTIONS[name].flag for name in changed if not OPTIONS[name].operating}
    if settings.paths_from:
        not_allowed.discard(OPTIONS["root"].flag)
    if not_allowed:
        raise UsageError(
            f"{min(not_allowed)} can't be given with --only-errors, which takes the option from the run"
        )
    return (
        settings if "bundle" in changed else replace(settings, bundle=recorded_bundle_path(settings.manifest))
    )
