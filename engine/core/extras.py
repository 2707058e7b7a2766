"""The command that installs an extra, and the check of the installed packages by their metadata."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "bone-radiograph-screening"
NO_EXTRA = ""  # the extra of the packages that are always needed


@dataclass(frozen=True)
class Package:
    """A package that an extra requires, and its installed version."""

    name: str
    extra: str
    wanted: str  # version specifiers
    found: str | None  # version, None where it is not installed
    fits: bool

    @property
    def problem(self) -> str | None:
        if self.found is None:
            return f"{self.name} is missing"
        return None if self.fits else f"{self.name} {self.found} does not fit {self.wanted}"


def list_packages() -> dict[str, list[Package]]:
    """List the required packages by extra, with the installed versions."""
    packages = defaultdict[str, list[Package]](list)
    for extra, requirement in _requirements():
        version = package_version(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        name = canonicalize_name(requirement.name)
        packages[extra].append(Package(name, extra, str(requirement.specifier), version, fits))
    return dict(packages)


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def install_command(extras: str = NO_EXTRA, *, packages: str = "") -> str:
    """Return the command that installs the project with `extras`, such as "gpu,proof", or just `packages`."""
    names = extras.split(",")
    files = ["constraints-gpu.txt"] * ("gpu" in names) + ["constraints.txt"] * (names != ["gpu"])
    constraints = " ".join(f"-c {file}" for file in files)
    index = " --extra-index-url https://pypi.nvidia.com" if "gpu" in names else ""
    what = packages or (f"'.[{extras}]'" if extras else ".")
    return f"pip install {constraints} {what}{index}"


def find_conflicts() -> list[str]:
    """Return a line for each package of the project that requires another version of an installed package."""
    conflicts = []
    for name in sorted({canonicalize_name(requirement.name) for _, requirement in _requirements()}):
        installed = package_version(name)
        for wanted in map(Requirement, (metadata.requires(name) or []) if installed else []):
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": NO_EXTRA})
            other = package_version(wanted.name) if applies else None
            if other and not wanted.specifier.contains(other, prereleases=True):
                conflicts.append(
                    f"{name} {installed} requires {wanted.name}{wanted.specifier}; installed: {other}"
                )
    return conflicts


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield each requirement with its extra, from the distribution or from pyproject.toml."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        yield from _checkout_requirements()
        return
    extras = [NO_EXTRA, *(metadata.metadata(PROJECT).get_all("Provides-Extra") or [])]
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        for extra in [extra for extra in extras if marker is None or marker.evaluate({"extra": extra})][:1]:
            yield extra, requirement


def _checkout_requirements() -> Iterator[tuple[str, Requirement]]:
    try:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    except OSError:
        return
    project = tomllib.loads(text)["project"]
    for extra, lines in {NO_EXTRA: project["dependencies"], **project["optional-dependencies"]}.items():
        yield from ((extra, requirement) for requirement in map(Requirement, lines))
