"""The packages of a GPU machine fit together: pyproject.toml, constraints-gpu.txt and the Dockerfile.

Metadata comes from the packages installed here where they are the pinned ones; of the others, all small, from
the package index, once.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.helpers.processes import ROOT

pytestmark = pytest.mark.slow

PYTHON = "3.12"
LINUX = {
    **default_environment(),
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": f"{PYTHON}.0",
    "python_version": PYTHON,
    "sys_platform": "linux",
}
SOURCE_ONLY = {"tensorrt-cu13"}  # no wheel on PyPI
# A wheel of gigabytes on NVIDIA's index; constraints-gpu.txt says how it is known to require nothing.
REQUIRES_NOTHING = {"tensorrt-cu13-libs"}
Pins = Mapping[str, Version]  # by canonical name


def pins_of(file: str) -> dict[str, Version]:
    lines = ((ROOT / file).read_text()).splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): exact(pin) for pin in pins}


def exact(pin: Requirement) -> Version:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} is no exact pin"
    return Version(specifier.version)


def wanted(*extras: str) -> list[Requirement]:
    """What pyproject.toml requires: the core's packages, and those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


def names(requirements: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def misfits(pins: Pins, roots: Iterable[Requirement], metadata: Mapping[str, Metadata]) -> list[str]:
    """Why the pins are not what pip resolves the roots to.

    Empty where every requirement of every package that the roots lead to is pinned within its range, and
    nothing else is pinned.
    """
    result = []
    todo = [("pyproject.toml", root) for root in roots]
    done: set[tuple[str, str]] = set()  # package and extra
    while todo:
        asking, requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins:
            result.append(f"{asking} wants {requirement}: not pinned")
            continue
        if not requirement.specifier.contains(pins[name], prereleases=True):
            result.append(f"{asking} wants {requirement}: pinned is {pins[name]}")
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) not in done:
                done.add((name, extra))
                todo += [(f"{name} {pins[name]}", each) for each in requirements(metadata[name], extra)]
    reached = {name for name, _ in done}
    for name in sorted(reached):
        python = metadata[name].requires_python
        if python is not None and not python.contains(LINUX["python_full_version"]):
            result.append(f"{name} {pins[name]} wants Python {python}")
    return result + [f"{name} is pinned and nothing wants it" for name in sorted(pins.keys() - reached)]


def requirements(metadata: Metadata, extra: str) -> Iterator[Requirement]:
    for requirement in metadata.requires_dist or []:
        if requirement.marker is None or requirement.marker.evaluate(LINUX | {"extra": extra}):
            yield requirement


def parsed(text: str) -> Metadata:
    return Metadata.from_email(text, validate=False)


@pytest.fixture(scope="module")
def metadata(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Metadata]:
    """Of every package of constraints-gpu.txt. Skips where the index can't be reached."""
    result = {}
    for name, version in pins_of("constraints-gpu.txt").items():
        key = f"installing/{name}-{version}"
        text = installed(name, version) or pytestconfig.cache.get(key, "")
        if not text and name in REQUIRES_NOTHING:
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        if not text:
            text = downloaded(name, version, tmp_path_factory.mktemp(name))
            pytestconfig.cache.set(key, text)
        result[name] = parsed(text)
    return result


def installed(name: str, version: Version) -> str:
    """The METADATA of the pinned version where this environment has it, else nothing."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return (distribution.read_text("METADATA") or "") if Version(distribution.version) == version else ""


def downloaded(name: str, version: Version, folder: Path) -> str:
    form = f"--no-binary={name}" if name in SOURCE_ONLY else "--only-binary=:all:"
    target = [
        f"--python-version={PYTHON}",
        "--platform=manylinux_2_28_x86_64",
        "--platform=manylinux2014_x86_64",
    ]
    quick = ["--no-input", "--disable-pip-version-check", "--retries=1", "--timeout=20"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *quick, "--no-deps", form, *target, f"{name}=={version}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        log = done.stderr.strip()
        if "(from versions: none)" in log or "connection" in log.lower():
            pytest.skip(f"the package index can't be reached, or has no {name}: {log.splitlines()[-1]}")
        pytest.fail(f"{name} {version} can't be downloaded: {log}")
    (file,) = folder.iterdir()
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            (member,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
            return wheel.read(member).decode()
    with tarfile.open(file) as source:
        (top,) = (each for each in source.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", each))
        opened = source.extractfile(top)
        assert opened is not None
        return opened.read().decode()


def test_the_gpu_packages_fit_together(metadata: Mapping[str, Metadata]) -> None:
    assert misfits(pins_of("constraints-gpu.txt"), wanted("gpu"), metadata) == []


@pytest.mark.parametrize(
    ("name", "version", "complaint"),
    [
        (
            "tensorrt-cu13",
            "11.4.0.106",
            "torch-tensorrt 2.14.0 wants tensorrt-cu13<11.2.0,>=11.1.0: pinned is 11.4.0.106",
        ),
        ("torch", "2.15.0", "torch-tensorrt 2.14.0 wants torch<2.15.0,>=2.14.0: pinned is 2.15.0"),
        ("triton", "3.9.0", "torch 2.14.1 wants triton~=3.8.0"),
        ("nvidia-libnvcomp-cu13", "6.0", "nvidia-dali-cuda130 2.4.0 wants nvidia-libnvcomp-cu13==5.3.0.16"),
    ],
)
def test_a_pin_that_does_not_fit_is_reported(
    metadata: Mapping[str, Metadata], name: str, version: str, complaint: str
) -> None:
    pins = pins_of("constraints-gpu.txt") | {name: Version(version)}
    assert complaint in "\n".join(misfits(pins, wanted("gpu"), metadata))


def test_misfits_reports_wrong_pins() -> None:
    metadata = {
        "a": parsed(
            "Metadata-Version: 2.1\nName: a\nVersion: 1\nRequires-Python: >=3.13\n"
            "Requires-Dist: b[fast]>=2\n"
            "Requires-Dist: windows-only; sys_platform == 'win32'\n"
            "Requires-Dist: old; python_version < '3.12'\n"
        ),
        "b": parsed("Metadata-Version: 2.1\nName: b\nVersion: 1\nRequires-Dist: c; extra == 'fast'\n"),
    }
    pins = {"a": Version("1"), "b": Version("1"), "spare": Version("1")}
    assert misfits(pins, [Requirement("A")], metadata) == [
        "a 1 wants b[fast]>=2: pinned is 1",
        'b 1 wants c; extra == "fast": not pinned',
        "a 1 wants Python >=3.13",
        "spare is pinned and nothing wants it",
    ]


def test_both_constraint_files_agree() -> None:
    here, gpu = pins_of("constraints.txt"), pins_of("constraints-gpu.txt")
    assert {name: gpu[name] for name in here.keys() & gpu} == {name: here[name] for name in here.keys() & gpu}
    assert {"torch", "torchvision", "triton", "nvidia-dali-cuda130"} <= here.keys() & gpu


def test_the_ranges_of_pyproject_hold_the_pins() -> None:
    pins = pins_of("constraints.txt") | pins_of("constraints-gpu.txt")  # as the proof kit is installed
    for requirement in wanted("gpu", "training", "proof"):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_pyproject_names_every_package_of_the_design() -> None:
    named = names(wanted("gpu"))
    assert {"numpy", "pandas", "pyarrow", "torch", "torch-tensorrt"} <= named
    assert any(name.startswith("nvidia-dali-") for name in named)
    assert any(re.fullmatch(r"tensorrt(-cu\d+)?", name) for name in named)


def test_only_extras_need_torch_or_tensorrt() -> None:
    heavy = re.compile(r"torch|triton|tensorrt(?!-rtx)")
    assert not [name for name in names(wanted()) if heavy.match(name) or name.startswith("tensorrt")]
    assert not [name for name in names(wanted("build")) if heavy.match(name)]


def test_the_dockerfile_agrees_with_the_pins() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    pins = pins_of("constraints-gpu.txt")
    tensorrt = str(pins["tensorrt-cu13"])
    assert re.findall(r"\b1\d\.\d+\.\d+\.\d+\b", dockerfile) == [tensorrt, tensorrt]  # the comment, the check
    assert set(re.findall(r"python ?(3\.\d+)", dockerfile, re.IGNORECASE)) == {PYTHON}
    # TensorRT is the image's: the line that leaves it out leaves out nothing else
    (pattern,) = re.findall(r"grep -v '(.+)' constraints-gpu.txt", dockerfile)
    left_out = {name for name in pins if re.search(pattern, name)}
    assert left_out == {"tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu13-libs"}


def test_docker_sees_all_that_the_dockerfile_copies() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    files = {file for line in copied for file in line.split()}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert files == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / file).exists() for file in files)


def test_make_installs_from_the_indexes_that_pip_is_configured_to_use(tmp_path: Path) -> None:
    for file in ("pyproject.toml", "constraints.txt"):
        (tmp_path / file).touch()
    configured = [  # as `pip config list` prints them
        ":env:.index-url='https://environment.example/simple'",
        "download.index-url='https://download.example/simple'",
        "global.cert='/etc/hospital.pem'",
        "global.extra-index-url='https://one.example/simple\\nhttps://two.example/simple'",
        "global.find-links='/wheels  /more'",
        "global.index-url='https://file.example/simple'",
        "global.timeout='60'",
        "install.no-index='true'",
        "install.trusted-host='one.example'",
    ]
    (tmp_path / "configured").write_text("\n".join(configured) + "\n")
    (tmp_path / ".venv").mkdir()
    for name, script in {"pip": "cat configured", "uv": 'echo "$@" > arguments; env > environment'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "SSL_", "MAKE"))}
    subprocess.run(
        ["make", "-f", ROOT / "Makefile", "BIN=.", ".venv/training.stamp"],
        cwd=tmp_path,
        env=kept | {"UV_INSECURE_HOST": "own.example"},
        check=True,
        timeout=60,
    )
    assert "--no-index -e .[training]" in (tmp_path / "arguments").read_text()
    assert {
        line
        for line in (tmp_path / "environment").read_text().splitlines()
        if line.startswith(("UV_", "SSL_"))
    } == {
        "UV_DEFAULT_INDEX=https://environment.example/simple",
        "UV_INDEX=https://one.example/simple https://two.example/simple",
        "UV_FIND_LINKS=/wheels,/more",
        "UV_INSECURE_HOST=own.example",
        "SSL_CERT_FILE=/etc/hospital.pem",
    }
