"""`python -m engine.doctor [MANIFEST]`: what a run would do on this machine, and what stands in its way.

Everything is asked of the code that a run itself uses, and nothing is written. `python -m engine.run MANIFEST
--dry-run` gives the same.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine import bundle, fleet, installed, options, plans
from engine.bundle import Bundle
from engine.cli.terminal import hush_libraries, run_command
from engine.command import Parser
from engine.errors import UsageError
from engine.findings import Report, size
from engine.gpu import choice as gpu_choice
from engine.gpu import machine
from engine.job import Say, choice_of
from engine.log import Log
from engine.plans import Gpu
from engine.provenance import processor_name
from engine.run import places
from engine.runners import Choice
from engine.settings import ALL_GPUS, Settings, available_cpus
from engine.survey import survey
from engine.tuned import advise

SHOWN = (
    "onnxruntime",
    "nvidia-dali-cuda130",
    "torch",
    "torch-tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
)
IMPORTED = ("onnxruntime", "nvidia.dali", "imagecodecs")  # metadata say nothing of a broken library
_INSTEAD = {"--runner": "auto", "--precision": "fp32", "--device": "cpu"}
MODELS_TAKE = 3  # times the size of their float32 graphs, while they run


def examine(settings: Settings, *, manifest: bool, say: Say, stop: threading.Event | None = None) -> Report:
    """What a run by `settings` would do here; without `manifest`, what any run would. `say` gets progress.

    Raises UsageError for settings with `only_errors`.
    """
    if settings.only_errors:
        raise UsageError("--only-errors can't be looked into beforehand; leave it out")
    report = Report(_one_process(settings))
    _machine(report)
    _packages(report)
    found = _models(report)
    if manifest:
        survey(report, found, say, stop or threading.Event())
    return report


def _one_process(settings: Settings) -> Settings:
    """Of all that `--device cuda:all` starts, the first."""
    if settings.device != ALL_GPUS:
        return settings
    first = replace(settings, device="cuda:0")
    with suppress(UsageError):  # the bundle's lines will say so
        count = len(fleet.devices_here())
        memory = settings.memory // count
        workers = max(1, (settings.workers or available_cpus()) // count)
        shard = fleet.shards_here(settings, count)[0]
        return replace(first, memory=memory, workers=workers, shard=shard)
    return first


def _machine(report: Report) -> None:
    report.section("machine")
    usable, there = available_cpus(), os.cpu_count() or 1
    report.line("processor", f"{processor_name()}, {usable} of {there} CPUs usable")
    free = memory_free()
    report.line("memory", f"{size(memory_there())}, {size(free)} of it free")
    wanted = report.settings.limits.memory + _models_take(report.settings.bundle)
    if free < wanted:
        fitting = max(1 << 26, (free - _models_take(report.settings.bundle)) // 2)
        report.problem(
            f"{size(free)} of memory are free, a run takes about {size(wanted)}",
            f"add to the run: --memory {fitting >> 20}MiB",
            grave=False,
        )
    gpus = _gpus()
    for text in gpus or ["none"]:
        report.line("GPU", text)
    if report.settings.ray:
        _ray(report)
    driver = machine.driver()
    if driver and int(driver.split(".")[0]) < machine.MIN_DRIVER and _gpu_wanted(report.settings):
        report.problem(
            f"the GPU's driver is {driver}, needed is r{machine.MIN_DRIVER} or newer",
            f"sudo apt install nvidia-driver-{machine.MIN_DRIVER}-server",
        )


def _ray(report: Report) -> None:
    """What --ray would start."""
    from engine.ray import cluster

    try:
        report.line("Ray", cluster.outlook(report.settings))
    except UsageError as error:
        mend = installed.install_command("ray") if "install it" in str(error) else "ray start --head"
        report.problem(str(error), mend)


def _gpu_wanted(settings: Settings) -> bool:
    return machine.present() and settings.device != "cpu"


def memory_there() -> int:
    return _meminfo("MemTotal")


def memory_free() -> int:
    """Bytes that can still be had, by the kernel and by the control group."""
    free = _meminfo("MemAvailable")
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(free, max(0, most - used))
    return free


def _meminfo(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _models_take(bundle: Path) -> int:
    with suppress(OSError):
        return MODELS_TAKE * sum(
            path.stat().st_size for path in bundle.glob("*.onnx") if ".fp16" not in path.name
        )
    return 0


def _gpus() -> list[str]:
    """As NVIDIA's driver sees them."""
    if not machine.present():
        return []
    query = ["nvidia-smi", "--query-gpu=index,name,compute_cap,memory.total,driver_version"]
    try:
        said = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return [f"there is one; nvidia-smi tells nothing of it (driver: {machine.driver() or 'none'})"]
    lines = [[word.strip() for word in line.split(",")] for line in said.stdout.splitlines()]
    return [
        f"cuda:{index} {name}, compute capability {capability}, {memory}, driver {driver}"
        for index, name, capability, memory, driver in (line for line in lines if len(line) == 5)
    ]


def _packages(report: Report) -> None:
    """What has to fit for a run here is a problem when it does not; of the rest it is said."""
    report.section("packages")
    by_extra = installed.packages()
    if not by_extra:
        report.problem(f"{installed.PROJECT} is not installed", installed.install_command(installed.CORE))
        return
    report.line("python", ".".join(map(str, sys.version_info[:3])))
    every = {package.name: package for extra in reversed(by_extra.values()) for package in extra}
    for name in (name for name in SHOWN if name in every):
        one = every[name]
        where = f"extra {one.extra}" if one.extra else "needed"
        state = "fits" if one.fits else "does not fit" if one.found else "not installed"
        report.line(name, f"{one.found or '-'} {state}: {one.wanted} ({where})")
    needed = {installed.CORE} | ({"gpu"} if _gpu_wanted(report.settings) else set())
    complete = []
    for extra, wanted in by_extra.items():
        problems = [package.problem for package in wanted if package.problem]
        wrong = [package.problem for package in wanted if package.found and package.problem]
        if (extra in needed and problems) or wrong:
            about = f"extra {extra}" if extra else "packages"
            text = f"{about}: {', '.join(map(str, problems if extra in needed else wrong))}"
            report.problem(text, installed.install_command(extra), grave=extra in needed)
        if extra and not problems:
            complete.append(extra)
    rest = [extra for extra in by_extra if extra and extra not in complete]
    text = f"complete: {', '.join(complete) or 'none'}; not complete: {', '.join(rest) or 'none'}"
    report.line("extras", text)
    for module in IMPORTED:
        try:
            import_module(module)
        except Exception as error:  # of a library that is broken, anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            report.problem(f"{module} can't be imported: {reason}", installed.install_command(installed.CORE))
    for clash in installed.clashes():
        report.problem(clash, installed.install_command("gpu" if "gpu" in needed else installed.CORE))
    if "gpu" in needed:
        _cuda(report, every)


def _cuda(report: Report, every: Iterable[str]) -> None:
    torch = machine.cuda_version()
    dali = next((found[1] for name in every if (found := re.match(r"nvidia-dali-cuda(\d\d)", name))), None)
    if torch and dali and torch.split(".")[0] != dali:
        report.problem(
            f"PyTorch is built for CUDA {torch}, DALI for {dali}", installed.install_command("gpu")
        )


def _models(report: Report) -> tuple[Bundle, Choice] | None:
    """The bundle, what would run it, and which of its plans fit."""
    settings = report.settings
    report.section("bundle")
    where = report.place(settings.bundle, "BUNDLE")
    try:
        models = bundle.load(settings.bundle)
    except UsageError as error:
        report.problem(str(error), f"python -m training DATA -o {where}")
        return None
    report.line("classes", ", ".join(models.classes))
    members = (f"{member.name} ({member.architecture}) x {member.weight:g}" for member in models.members)
    report.line("members", ", ".join(members))
    height, width = models.size
    report.line("input", f"{width} x {height}, decoded {models.decode}")
    points = models.operating_points
    report.line(
        "triage", str(points or f"none; python -m engine.calibrate {where} --on labelled.csv finds one")
    )
    try:
        choice = choice_of(settings, models)
    except UsageError as error:
        instead = _INSTEAD | {"--decode": models.decode}
        option = next((option for option in instead if str(error).startswith(option)), "--device")
        report.problem(str(error), f"add to the run: {option} {instead[option]}")
        return None
    report.line("runs on", choice.reason)
    if _gpu_wanted(settings) and not choice.gpu:
        report.problem(
            f"there is a GPU, and the run would be on the CPU ({choice.reason})",
            installed.install_command("gpu"),
        )
    tuned = advise(settings, models, choice, recorded=None)
    report.line("tuned", tuned.line or f"not yet; python -m engine.tune {where} --sample MANIFEST does")
    _plans(report, models, choice, where)
    return models, choice


def _plans(report: Report, models: Bundle, choice: Choice, where: str) -> None:
    gpu = choice.gpu
    if gpu is None and machine.present():
        with suppress(UsageError):
            gpu = machine.gpu()
    folder = models.path / plans.PLANS
    targets = dict(plans.passports(models))
    for target in sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        if target not in targets:
            report.line(f"plans/{target}", "incomplete: not every member has a plan there")
            report.problem(
                f"plans/{target} is incomplete", f"python -m build_engines {where}", grave=gpu is not None
            )
            continue
        try:
            found = [plans.load(path) for path in targets[target]]
        except UsageError as error:
            report.line(f"plans/{target}", "damaged")
            report.problem(str(error), f"python -m build_engines {where}", grave=gpu is not None)
            continue
        _plan(report, models, target, found, choice, gpu)
    if not targets and gpu:
        report.line("plans", "none")
        if choice.runner != "tensorrt":
            report.problem("the bundle has no plans", f"python -m build_engines {where}", grave=False)


def _plan(
    report: Report, models: Bundle, target: str, found: list[plans.Plan], choice: Choice, gpu: Gpu | None
) -> None:
    passport = found[0].passport
    where = Path("BUNDLE") if report.settings.redaction else models.path
    if target == plans.INT8:
        made = f"int8, {passport.backend} {passport.version}, for --precision int8 on a CPU"
        members = zip(models.members, found, strict=True)
        problem = next(filter(None, (plan.passport.cpu_problem(member) for member, plan in members)), None)
        report.line(f"plans/{target}", f"{made}: {problem or 'fits'}")
        if problem:
            mend = passport.rebuild(where).partition(": ")[2]
            report.problem(f"plans/{target}: {problem}", mend, grave=False)
        return
    made = f"{passport.precision}, {passport.backend} {passport.version}, up to {passport.max_batch} a batch"
    if gpu is None:
        capabilities = ", ".join(passport.compute_capabilities)
        report.line(f"plans/{target}", f"{made}: for compute capability {capabilities}, no GPU here")
        return
    problem = gpu_choice.problem(models, found, gpu, choice.precision, report.settings.batch_size)
    report.line(f"plans/{target}", f"{made}: {problem or 'fits'}")
    if problem:
        words = gpu_choice.way_out(passport, where, gpu, choice.precision, report.settings.batch_size)
        report.problem(f"plans/{target}: {problem}", words.partition(": ")[2], grave=False)


def show(report: Report, console: Console) -> None:
    """A few short tables, and the problems with their commands unbroken, to be copied."""
    width = max((len(label) for _, lines in report.sections for label, _ in lines), default=0)
    narrow, say = console.width < 3 * width, partial(console.print, soft_wrap=True)
    for title, lines in report.sections:
        if not lines:
            continue
        say(Text(title, "bold"))
        if not console.is_terminal:  # to be searched and stored
            for label, text in lines:
                say(Text(f"  {label:{width}}  {text}"))
            continue
        table = Table.grid(padding=(0, 2))
        if not narrow:
            table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in lines:
            cells = [Text(label), Text(text)]
            table.add_row(*([Text(": ").join(cells)] if narrow else cells))
        console.print(table)
    for problem in report.problems:
        word, style = ("problem: ", "bold red") if problem.grave else ("note: ", "bold yellow")
        say(Text.assemble((word, style), problem.text))
        say(Text(f"    {problem.mend}"))
    if not report.problems:
        say(Text("no problem found", "bold green"))


def report_to(stream: TextIO, settings: Settings, *, manifest: bool, say: Say, stop: threading.Event) -> int:
    """Examine, show, and give the exit status."""
    report = examine(settings, manifest=manifest, say=say, stop=stop)
    show(report, Console(file=stream))
    return report.exit_status


def option_parser() -> Parser:
    return options.option_parser(
        "python -m engine.doctor",
        "What a run with these options would do on this machine, and what stands in its way.",
        "examples:\n  python -m engine.doctor -b bundle\n  python -m engine.doctor manifest.csv -b bundle",
        needs_manifest=False,
    )


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    hush_libraries()
    log = Log(redact="--redact" in given)
    console = Console(file=cast(TextIO, log))
    say: Say = partial(console.print, markup=False, highlight=False, soft_wrap=True)

    def work() -> int:
        asked = vars(option_parser().parse_args(given))
        manifest = asked["manifest"] is not None
        settings = options.settings_of(asked | {"manifest": asked["manifest"] or Path()})
        log.known = places(settings)
        return report_to(sys.stdout, settings, manifest=manifest, say=say, stop=threading.Event())

    return run_command(work, console)


if __name__ == "__main__":
    sys.exit(main())
