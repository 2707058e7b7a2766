"""Whether the packages here fit what this project asks for, and each other: by their own metadata."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engine.gpu.machine import INSTALL

PROJECT = "bone-radiograph-screening"
CORE = ""  # the extra of what is needed in any case


@dataclass(frozen=True)
class Package:
    """What one extra asks for, and what is here."""

    name: str
    extra: str
    wanted: str  # version specifiers
    found: str | None  # version, None where it is not installed
    fits: bool

    @property
    def problem(self) -> str | None:
        if self.found is None:
            return f"{self.name} is missing"
        return None if self.fits else f"{self.name} {self.found} is none of {self.wanted}"


def packages() -> dict[str, list[Package]]:
    """What the project requires, by extra, with what is installed."""
    found = defaultdict[str, list[Package]](list)
    for extra, requirement in _requirements():
        version = installed(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        name = canonicalize_name(requirement.name)
        found[extra].append(Package(name, extra, str(requirement.specifier), version, fits))
    return dict(found)


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def command(extra: str) -> str:
    """What installs an extra."""
    if extra == "gpu":
        return INSTALL
    what = f"'.[{extra}]'" if extra else "."
    return f"pip install -c constraints.txt {what}"


def clashes() -> list[str]:
    """Where an installed package that the project names asks for another version of one that is installed."""
    names = {canonicalize_name(requirement.name) for _, requirement in _requirements()}
    return [clash for name in sorted(names) for clash in _clashes_of(name)]


def _clashes_of(name: str) -> Iterator[str]:
    here = installed(name)
    for text in (metadata.requires(name) or []) if here else []:
        wanted = Requirement(text)
        other = installed(wanted.name)
        if other is None or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        if not wanted.specifier.contains(other, prereleases=True):
            yield f"{name} {here} asks for {wanted.name}{wanted.specifier}, here is {other}"


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """Each requirement with its extra: of the distribution, or of pyproject.toml in a bare checkout."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        yield from _of_checkout()
        return
    extras = [CORE, *(metadata.metadata(PROJECT).get_all("Provides-Extra") or [])]
    for requirement in map(Requirement, lines):
        if requirement.marker is None:
            yield CORE, requirement
            continue
        for extra in extras:
            if requirement.marker.evaluate({"extra": extra}):
                yield extra, requirement
                if extra == CORE:
                    break


def _of_checkout() -> Iterator[tuple[str, Requirement]]:
    try:
        text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    except OSError:
        return
    project = tomllib.loads(text)["project"]
    for extra, lines in {CORE: project["dependencies"], **project["optional-dependencies"]}.items():
        yield from ((extra, requirement) for requirement in map(Requirement, lines))
