"""README and the pages in docs/: their blocks run, their commands, options and links are there, and the
errors that README explains are printed as they stand there.

A block that can't run here has a mark before it: `<!-- not run: why -->`. Its commands are parsed, though.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

import engine
from engine.bundle import bundle as bundles
from engine.bundle import plans
from engine.core import hardware
from engine.core.errors import ParityError
from engine.formats import dicom
from engine.runners import select_gpu
from engine.runners.onnx import OnnxRunner
from engine.runners.select import select_runner
from engine.runs.run_folder import RunFolder
from engine.scoring.canaries import Canaries, verify_canaries
from engine.scoring.cpu import CpuScorer
from tests.helpers.commands import benchmark_names, check_lines, commands, parser_of
from tests.helpers.images import write_images
from tests.helpers.processes import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- not run: (.+) -->")
NOT_OURS = {"--extra-index-url", "--array", "--gpus", "--requeue", "--signal"}  # of pip and Slurm


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    why_not_run: str | None
    line: int


def blocks(page: Path) -> Iterator[Block]:
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    for before, token in zip([None, *tokens], tokens, strict=False):
        assert token.type != "code_block", f"{page.name}:{token.map}: an indented block; fence it"
        if token.type == "fence":
            mark = MARK.fullmatch(before.content.strip()) if before else None
            assert token.map is not None
            yield Block(token.info, token.content, mark[1] if mark else None, token.map[0] + 1)


def each(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(function)


@each
def test_code_blocks_are_parsed(page: Path) -> None:
    result = list(blocks(page))
    assert {block.language for block in result} <= {"sh", "python", "text"}
    marks = [block for block in result if block.why_not_run]
    assert len(marks) == page.read_text().count("<!-- not run"), "a mark without a block behind it"


@pytest.fixture
def prepared(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the pages speak of it, the working directory."""
    (tmp_path / "bundle").symlink_to(bundle)
    write_images(tmp_path / "archive", 6)
    paths = [f"archive/{path.name}" for path in sorted((tmp_path / "archive").iterdir())]
    table = pd.DataFrame({"path": [*paths, "archive/gone.png"], "patient": range(7)})
    for name in ("manifest", "monday", "tuesday"):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page.name == "README.md" else pytest.mark.slow, id=page.name)
        for page in PAGES
    ],
)
def test_blocks_run(page: Path, prepared: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.why_not_run or block.language == "text":
            continue
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            exec(compile(block.code, where, "exec"), names)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{where}: {done.stderr}"


@each
def test_commands_and_options_are_there(page: Path) -> None:
    text = page.read_text()
    inline = [code for code in re.findall(r"`([^`\n]+)`", text) if code.startswith("python -m ")]
    check_lines("\n".join(code for code in inline if "NAME" not in code.split()))
    for block in blocks(page):
        if block.language == "sh":
            check_lines(block.code)
    known = {"--help", *NOT_OURS}
    for command in commands():
        known |= set(parser_of(command).names)
    known |= benchmark_options()
    named = set(re.findall(r"(?<![\w<!-])--[a-z][\w-]*", text))
    named = {name.replace("--no-", "--") for name in named}
    assert named <= known, named - known
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`(?:RADIOGRAPHS=\S+ )?make ([a-z-]+)", text)) <= targets


def benchmark_options() -> set[str]:
    source = (ROOT / "benchmarks" / "__main__.py").read_text()
    assert benchmark_names()
    return set(re.findall(r'\.add\(\s*"(--[\w-]+)"', source))


@each
def test_links_have_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], (
                target
            )


# The errors of "When it says ...", each provoked in a folder as the reader has it


def no_bundle(here: Path) -> str:
    (here / "bundle").unlink()
    return said(bundle="bundle")


def not_one_file(here: Path) -> str:
    (here / "lists").mkdir()
    (here / "manifest.csv").rename(here / "lists" / "manifest.csv")
    return printed("lists/manifest.csv")


def no_paths(here: Path) -> str:
    (here / "list.csv").write_text("id,file\n1,archive/image-00.png\n")
    return said("list.csv")


def another_run(here: Path) -> str:
    engine.screen("manifest.csv")
    return said(batch_size=4)


def another_process(here: Path) -> str:
    with RunFolder(Path("results"), overwrite=False):
        return said()


def no_pydicom(here: Path) -> str:
    (here / "archive" / "image-00.png").write_bytes(bytes(128) + b"DICM" + bytes(64))
    dicom.import_pydicom.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pydicom", None)
        return said()


def half_on_a_cpu(here: Path) -> str:
    if hardware.has_gpu():
        pytest.skip("there is a GPU")
    return said(precision="fp16")


def past(here: Path) -> str:
    return said(finish_by="2020-01-01")


def full_disk(here: Path) -> str:
    """A file can't get larger than that: what a full disk is to the code, with another name of the error."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limit[1]))
    try:
        return said().replace("File too large", "No space left on device")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def plan_of_another_gpu(here: Path) -> str:
    models = bundles.load_bundle(Path("bundle"))
    there = hardware.Gpu(name="NVIDIA L4", uuid="GPU-0", capability="8.9", driver="580")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "has_gpu", lambda: True)
        patch.setattr(hardware, "require_gpu", lambda index=0: there)
        patch.setattr(select_gpu, "tensorrt_version", lambda backend: "11.1.0.106")
        patch.setattr(plans, "list_targets", lambda bundle: [("tensorrt-sm90-11.1", [Path("x")] * 2)])
        result = iter(models.members)
        patch.setattr(plans, "load_plan", lambda path: plan_of(next(result)))
        return select_runner("auto", "auto", models, precision=None, batch_size=None).reason


def plan_of(member: bundles.Member) -> plans.Plan:
    passport = plans.Passport(
        format=plans.PASSPORT_FORMAT,
        member=member.name,
        target="tensorrt-sm90-11.1",
        backend="tensorrt",
        frontend="onnx",
        precision="fp16",
        reference_sha256=member.files["onnx"].sha256,
        source="",
        source_sha256="",
        plan="",
        plan_sha256="",
        plan_bytes=0,
        version="11.1.0.106",
        cuda=None,
        gpu=None,
        compute_capabilities=("9.0",),
        hardware_compatible=False,
        version_compatible=False,
        profiles=(plans.OptimizationProfile(min=1, opt=64, max=128),),
        options={},
        layers=[],
        layers_from="graph",
        build_s=0.0,
        built="",
        parity=plans.Parity.pending(0.005, 0.999),
    )
    return plans.Plan(Path("x"), passport)


def canaries(here: Path) -> str:
    """A member that is not what it was when the bundle was made."""
    models = bundles.load_bundle(here / "bundle")
    runners = [OnnxRunner(member, models) for member in models.members]
    step = CpuScorer(models, runners, threads=0)
    result = Canaries.of(models)
    with pytest.raises(ParityError) as caught:
        verify_canaries(replace(result, expected=result.expected + np.float32(0.03)), step, 8)
    return f"error: {caught.value}"


def said(manifest: str = "manifest.csv", **options: object) -> str:
    with pytest.raises(engine.EngineError) as caught:
        engine.screen(manifest, **options)  # type: ignore[arg-type]
    return f"error: {caught.value}"


def printed(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "engine.run", *arguments], capture_output=True, text=True, check=False
    )
    return done.stderr.splitlines()[-1]


PROVOKED: dict[str, Callable[[Path], str]] = {
    "it has no ensemble.json": no_bundle,
    "none of the files exists": not_one_file,
    "not paths": no_paths,
    "holds another run": another_run,
    "another process": another_process,
    "pydicom": no_pydicom,
    "needs a GPU": half_on_a_cpu,
    "this GPU has": plan_of_another_gpu,
    "canaries": canaries,
    "No space left": full_disk,
    "in the past": past,
}


def faq() -> list[str]:
    section = (ROOT / "README.md").read_text().split("\n## When it says ...\n")[1].split("\n## ")[0]
    return re.findall(r"^```text\n(.+)\n```$", section, re.MULTILINE)


@pytest.mark.parametrize("line", faq())
def test_errors_match_the_readme(line: str, prepared: Path) -> None:
    (provoke,) = [function for words, function in PROVOKED.items() if words in line]
    assert provoke(prepared) == line


def test_the_readme_explains_each_of_these_errors() -> None:
    assert len(faq()) == len(PROVOKED)
