"""Make mypy stubs of TensorRT's Python API from the docstrings of its bindings, without a GPU.

The bindings are small wheels on the package index; the libraries that they load are replaced by empty ones.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mypy.errorcodes import ATTR_DEFINED
from mypy.plugin import AttributeContext, Plugin
from mypy.types import Instance, Type

MARK = "import tensorrt as trt"  # line of the sources that use TensorRT
TIMEOUT_S = 240

# Third-party imports other than TensorRT are Any, so the options that report Any are off. A `type: ignore`
# may be needed for only some versions of TensorRT. In the stubs, overloads overlap and some defaults are
# None against their type, as in the docstrings.
_MYPY_INI = """\
[mypy]
plugins = {plugin}
strict = true
python_version = {python.major}.{python.minor}
ignore_missing_imports = true
follow_imports = skip
disallow_subclassing_any = false
disallow_untyped_decorators = false
warn_return_any = false
warn_unused_ignores = false

[mypy-tensorrt.*]
ignore_errors = true

[mypy-build_engines.*,engine.*,training.*]
follow_imports = silent
"""


class NoBindingsError(Exception):
    """The bindings are not available; the message has the reason."""


@dataclass(frozen=True)
class Bindings:
    """A version of TensorRT's bindings: name of the wheel and of its import package."""

    wheel: str
    version: str
    module: str = "tensorrt_bindings"

    def __str__(self) -> str:
        return f"{self.module.removesuffix('_bindings')}-{self.version}"


def _installed(wheel: str) -> str | None:
    try:
        return metadata.version(wheel)
    except metadata.PackageNotFoundError:
        return None


TRT_10_16 = Bindings("tensorrt-cu13-bindings", "10.16.1.11")
TRT_11_1 = Bindings("tensorrt-cu13-bindings", "11.1.0.106")
TRT_11_4 = Bindings("tensorrt-cu13-bindings", "11.4.0.106")
_RTX = "tensorrt-rtx-cu13-bindings"
TRT_RTX = Bindings(_RTX, _installed(_RTX) or "1.7.1.116", "tensorrt_rtx_bindings")
ALL = (TRT_10_16, TRT_11_1, TRT_11_4, TRT_RTX)


def stubs(bindings: Bindings, cache: Path) -> Path:
    """Return the folder with the stub package `tensorrt`. Raises NoBindingsError."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / f"{bindings}-{sys.implementation.cache_tag}-{recipe}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            stub_folder = _generate(_package(bindings, cache, Path(scratch)), Path(scratch))
            if not folder.exists():  # another process may have made it
                stub_folder.rename(folder)
    return folder


def _package(bindings: Bindings, cache: Path, scratch: Path) -> Path:
    if _installed(bindings.wheel) == bindings.version:
        return Path(str(metadata.distribution(bindings.wheel).locate_file(bindings.module)))
    name = f"{bindings.wheel.replace('-', '_')}-{bindings.version}-"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if not list(cache.glob(f"{name}{tag}-*.whl")) and (problem := _download(bindings, cache)):
        raise NoBindingsError(f"no wheel of {bindings}: {problem}")
    (wheel,) = cache.glob(f"{name}{tag}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "wheel")
    return scratch / "wheel" / bindings.module


@functools.cache
def _download(bindings: Bindings, cache: Path) -> str | None:
    """Download the wheel once; return the error, None for success."""
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--timeout=10", "--retries=1", "--dest", cache)
    try:
        _call(sys.executable, "-m", "pip", "download", *options, f"{bindings.wheel}=={bindings.version}")
    except RuntimeError as error:
        return str(error)
    return None


def _generate(package: Path, scratch: Path) -> Path:
    """Import the package as `tensorrt` in a separate process and write its stubs."""
    libraries, path, stub_folder = scratch / "libraries", scratch / "path", scratch / "stubs"
    libraries.mkdir()
    path.mkdir()
    (path / "tensorrt").symlink_to(package)
    _empty_libraries(package, libraries)
    _call(
        *(sys.executable, "-m", "pybind11_stubgen", "tensorrt"),
        *("--print-invalid-expressions-as-is", "--output-dir", stub_folder),
        PYTHONPATH=path,
        LD_LIBRARY_PATH=libraries,
    )
    for stub in stub_folder.rglob("*.pyi"):
        stub.write_text(_corrected(stub.read_text()))
    return stub_folder


def _empty_libraries(package: Path, folder: Path) -> None:
    """Make the libraries that the bindings load, with empty versions of all missing functions."""
    (extension,) = package.glob("*.so")
    needed = re.findall(r"\(NEEDED\).*\[(lib(?:nv|tensorrt).*)\]", _call("readelf", "-dW", extension))
    undefined = re.findall(r" U (\w+)$", _call("nm", "-D", "--undefined-only", extension), re.MULTILINE)
    python = ctypes.CDLL(None)
    missing = [name for name in undefined if not hasattr(python, name)]
    source = folder / "empty.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in missing))
    for name in needed:
        _call("gcc", "-w", "-shared", "-fPIC", "-o", folder / name, source)


def _call(command: str, *arguments: str | Path, **environment: Path) -> str:
    """Return the command's output. Raises RuntimeError if it fails, NoBindingsError if it is missing."""
    if not shutil.which(command):
        raise NoBindingsError(f"there is no {command}")
    try:
        return subprocess.run(
            [command, *map(str, arguments)],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        ).stdout
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command} {arguments[-1]} takes more than {TIMEOUT_S} s") from None
    except subprocess.CalledProcessError as error:
        log = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        raise RuntimeError(f"{Path(command).name} {arguments[-1]}: {log[-1]}") from None


def _corrected(stub: str) -> str:
    """Correct wrong and loose types of a stub."""
    classes = set(re.findall(r"^class (\w+)", stub, re.MULTILINE))

    def python_name(match: re.Match[str]) -> str:
        name = match[1]
        return next((known for known in (name, name[1:]) if known in classes), "typing.Any")

    # C++ names, where a class was not bound yet: nvinfer1::IBuilder is Builder
    stub = re.sub(r"\bnv(?:infer1|onnxparser)::(?:v_\d+_\d+::)?(\w+)", python_name, stub)
    stub = re.sub(r"-> [^\n]*::[^\n]*:$", "-> typing.Any:", stub, flags=re.MULTILINE)  # and pybind11's own
    stub = re.sub(r"= <\w+\.\w+: \d+>", "= ...", stub)  # defaults that are enum members
    stub = re.sub(r"(?<=[ (])in(?=: )", "in_", stub)  # an argument by the name of a keyword
    # a default before an argument that has none
    stub = re.sub(r" = None(?=[^()]*, \w+: [\w.]+[,)])", "", stub)
    tree = _Corrections().visit(ast.parse(stub))
    return ast.unparse(ast.fix_missing_locations(tree)) + "\nimport builtins\n"


# pybind11 has no signatures for these protocols
_PROTOCOLS = {
    "Dims": "def __iter__(self) -> typing.Iterator[int]: ...",
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
}


class _Corrections(ast.NodeTransformer):
    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        if addition := _PROTOCOLS.get(node.name):
            node.body.extend(ast.parse(addition).body)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        returns_none = re.search(r":returns:.*\bNone\b", ast.get_docstring(node) or "")
        self.generic_visit(node)
        if node.returns and returns_none:
            node.returns = _union(node.returns, "None")
        for argument in node.args.args:
            # any iterable converts to Dims (docstring of Dims)
            if argument.annotation and ast.unparse(argument.annotation) == "Dims":
                argument.annotation = _union(argument.annotation, "collections.abc.Sequence[int]")
        node.body = [ast.Expr(ast.Constant(...))]
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        # these accept a float, which the bindings refuse, and forbid `step: int` in a subclass
        exact = {"typing.SupportsInt": "int", "typing.SupportsFloat": "float"}.get(ast.unparse(node))
        return _expression(exact) if exact else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        # the module's `bool` is a DataType
        own = node.id == "bool" and isinstance(node.ctx, ast.Load)
        return _expression("builtins.bool") if own else node


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _union(left: ast.expr, right: str) -> ast.expr:
    return ast.BinOp(left, ast.BitOr(), _expression(right))


def users(root: Path) -> list[Path]:
    """List the sources that use TensorRT."""
    sources = [*sorted((root / "build_engines").rglob("*.py")), root / "engine" / "runners" / "tensorrt.py"]
    return [source for source in sources if source.exists() and MARK in _lines(source)]


def _lines(source: Path) -> list[str]:
    return [line.strip() for line in source.read_text().splitlines()]


@functools.cache
def _configuration(cache: Path) -> Path:
    file = cache / "mypy.ini"
    file.write_text(_MYPY_INI.format(plugin=Path(__file__).resolve(), python=sys.version_info))
    return file


def mypy_errors(sources: Sequence[Path], *, root: Path, stubs: Path, cache: Path) -> list[str]:
    """Return mypy's errors of `sources` with the API in `stubs`; other modules come from `root`."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--no-error-summary", "--show-error-codes", "--no-pretty"),
            *("--config-file", str(_configuration(cache)), "--cache-dir", str(cache / f"mypy-{stubs.name}")),
            *map(str, sources),
        ],
        cwd=root,
        env=os.environ | {"MYPYPATH": os.pathsep.join(map(str, (stubs, root)))},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return run.stdout.splitlines()


def plugin(version: str) -> type[Plugin]:
    """Return the plugin of this file; mypy calls it."""
    return _ModuleAttributes


class _ModuleAttributes(Plugin):
    """Gives types to attributes of `backend.trt`, which mypy treats as Any."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        owner, _, name = fullname.rpartition(".")
        return functools.partial(_attribute, name) if owner == "types.ModuleType" else None


def _attribute(name: str, context: AttributeContext) -> Type:
    module = context.type.extra_attrs if isinstance(context.type, Instance) else None
    if not module or module.mod_name != "tensorrt":
        return context.default_attr_type
    if name not in module.attrs:
        context.api.fail(f'Module "tensorrt" has no attribute "{name}"', context.context, code=ATTR_DEFINED)
        return context.default_attr_type
    return module.attrs[name]
