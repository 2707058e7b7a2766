"""mypy stubs of TensorRT's Python API, made from its bindings' own docstrings: no GPU, no TensorRT libraries.

The bindings are small wheels on the package index. The libraries that they load are replaced by empty ones.
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

MARK = "import tensorrt as trt"  # what a source has below `if TYPE_CHECKING:` when it uses TensorRT
TIMEOUT_S = 240

# Third-party imports other than TensorRT are Any: these options complain of what comes of that. A
# `type: ignore` may be needed for one version of TensorRT and not for the next. In the stubs, overloads hide
# one another and defaults are None where the type has none: that is as the docstrings say it.
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
    """The bindings can't be had here; the message says why."""


@dataclass(frozen=True)
class Bindings:
    """One version of TensorRT's bindings: the wheel's name, the import package in it."""

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
    """The folder with the stub package `tensorrt`, for TensorRT for RTX too. Raises NoBindingsError."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / f"{bindings}-{sys.implementation.cache_tag}-{recipe}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = _generate(_package(bindings, cache, Path(scratch)), Path(scratch))
            if not folder.exists():  # a run beside this one
                made.rename(folder)
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
    """What went wrong; asked once, for an index that can't be reached may be slow to say so."""
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--timeout=10", "--retries=1", "--dest", cache)
    try:
        _call(sys.executable, "-m", "pip", "download", *options, f"{bindings.wheel}=={bindings.version}")
    except RuntimeError as error:
        return str(error)
    return None


def _generate(package: Path, scratch: Path) -> Path:
    """The package is imported under the name `tensorrt`, in a process of its own, and written down."""
    libraries, path, made = scratch / "libraries", scratch / "path", scratch / "stubs"
    libraries.mkdir()
    path.mkdir()
    (path / "tensorrt").symlink_to(package)
    _empty_libraries(package, libraries)
    _call(
        *(sys.executable, "-m", "pybind11_stubgen", "tensorrt"),
        *("--print-invalid-expressions-as-is", "--output-dir", made),
        PYTHONPATH=path,
        LD_LIBRARY_PATH=libraries,
    )
    for stub in made.rglob("*.pyi"):
        stub.write_text(_corrected(stub.read_text()))
    return made


def _empty_libraries(package: Path, folder: Path) -> None:
    """Libraries of the names that the bindings load, with all the functions that nothing else here has."""
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
    """What the command prints. Raises RuntimeError where it fails or is late, NoBindingsError without it."""
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
        said = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        raise RuntimeError(f"{Path(command).name} {arguments[-1]}: {said[-1]}") from None


def _corrected(stub: str) -> str:
    """The stub, without what its docstrings have wrong or too loose. Each rule is named below."""
    classes = set(re.findall(r"^class (\w+)", stub, re.MULTILINE))

    def python_name(found: re.Match[str]) -> str:
        name = found[1]
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


# In the prose of the class at most: pybind11 has no signature for either protocol.
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
            # any iterable converts to Dims, says the docstring of Dims
            if argument.annotation and ast.unparse(argument.annotation) == "Dims":
                argument.annotation = _union(argument.annotation, "collections.abc.Sequence[int]")
        node.body = [ast.Expr(ast.Constant(...))]
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        # these let a float through, which the bindings refuse, and forbid `step: int` in a subclass
        exact = {"typing.SupportsInt": "int", "typing.SupportsFloat": "float"}.get(ast.unparse(node))
        return _expression(exact) if exact else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        # the module has a `bool` of its own, a DataType
        own = node.id == "bool" and isinstance(node.ctx, ast.Load)
        return _expression("builtins.bool") if own else node


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _union(left: ast.expr, right: str) -> ast.expr:
    return ast.BinOp(left, ast.BitOr(), _expression(right))


def users(root: Path) -> list[Path]:
    """The sources that use TensorRT."""
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
    """What mypy says of `sources` against the API in `stubs`; other modules come from `root`."""
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
    """mypy's entry: this file is its plugin too."""
    return _ModuleAttributes


class _ModuleAttributes(Plugin):
    """Looks into `backend.trt`: of a module that it reaches through an instance, mypy takes all to be Any."""

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
