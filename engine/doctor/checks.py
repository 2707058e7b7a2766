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
from importlib import import_module
from pathlib import Path

from engine.bundle import bundle, plans
from engine.bundle.bundle import Bundle
from engine.core import extras, hardware
from engine.core.errors import UsageError
from engine.core.hardware import Gpu, available_cpus, available_memory, processor_name, total_memory
from engine.core.records import OnMessage
from engine.core.settings import ALL_GPUS, Settings
from engine.doctor.diagnosis import Diagnosis, format_bytes
from engine.doctor.manifest_checks import check_manifest
from engine.executors import multi_gpu
from engine.runners import select_gpu as gpu_choice
from engine.runners.base import RunnerChoice
from engine.runs.prepare import select_for_settings
from engine.runs.profile import apply_profile

SHOWN_PACKAGES = (
    "onnxruntime",
    "nvidia-dali-cuda130",
    "torch",
    "torch-tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
)
IMPORT_CHECKED = ("onnxruntime", "nvidia.dali", "imagecodecs")  # metadata say nothing of a broken library
_FALLBACK_OPTIONS = {"--runner": "auto", "--precision": "fp32", "--device": "cpu"}
MODEL_MEMORY_FACTOR = 3  # times the size of their float32 graphs, while they run


def diagnose(
    settings: Settings, *, manifest: bool, say: OnMessage, stop: threading.Event | None = None
) -> Diagnosis:
    """Check what a run with `settings` would do here; without `manifest`, what any run would do. `say`
    gets progress.

    Raises UsageError for settings with `only_errors`.
    """
    if settings.only_errors:
        raise UsageError("--only-errors can't be looked into beforehand; leave it out")
    report = Diagnosis(_first_process_settings(settings))
    _check_machine(report)
    _check_packages(report)
    found = _check_bundle(report)
    if manifest:
        check_manifest(report, found, say, stop or threading.Event())
    return report


def _first_process_settings(settings: Settings) -> Settings:
    """Return the settings of the first process that `--device cuda:all` starts."""
    if settings.device != ALL_GPUS:
        return settings
    first = replace(settings, device="cuda:0")
    with suppress(UsageError):  # the bundle's lines will say so
        count = len(multi_gpu.list_devices())
        memory = settings.memory // count
        workers = max(1, (settings.workers or available_cpus()) // count)
        shard = multi_gpu.local_shards(settings, count)[0]
        return replace(first, memory=memory, workers=workers, shard=shard)
    return first


def _check_machine(report: Diagnosis) -> None:
    report.section("machine")
    usable, there = available_cpus(), os.cpu_count() or 1
    report.line("processor", f"{processor_name()}, {usable} of {there} CPUs usable")
    free = available_memory()
    report.line("memory", f"{format_bytes(total_memory())}, {format_bytes(free)} of it free")
    wanted = report.settings.limits.memory + _estimate_model_bytes(report.settings.bundle)
    if free < wanted:
        fitting = max(1 << 26, (free - _estimate_model_bytes(report.settings.bundle)) // 2)
        report.problem(
            f"{format_bytes(free)} of memory are free, a run takes about {format_bytes(wanted)}",
            f"add to the run: --memory {fitting >> 20}MiB",
            blocking=False,
        )
    gpus = _query_gpus()
    for text in gpus or ["none"]:
        report.line("GPU", text)
    if report.settings.ray:
        _check_ray(report)
    driver = hardware.driver_version()
    if driver and int(driver.split(".")[0]) < hardware.MIN_DRIVER and _wants_gpu(report.settings):
        report.problem(
            f"the GPU's driver is {driver}, needed is r{hardware.MIN_DRIVER} or newer",
            f"sudo apt install nvidia-driver-{hardware.MIN_DRIVER}-server",
        )


def _check_ray(report: Diagnosis) -> None:
    """Describe what --ray would start."""
    from engine.ray import cluster

    try:
        report.line("Ray", cluster.describe_actors(report.settings))
    except UsageError as error:
        fix = extras.install_command("ray") if "install it" in str(error) else "ray start --head"
        report.problem(str(error), fix)


def _wants_gpu(settings: Settings) -> bool:
    return hardware.has_gpu() and settings.device != "cpu"


def _estimate_model_bytes(bundle: Path) -> int:
    with suppress(OSError):
        return MODEL_MEMORY_FACTOR * sum(
            path.stat().st_size for path in bundle.glob("*.onnx") if ".fp16" not in path.name
        )
    return 0


def _query_gpus() -> list[str]:
    """List the GPUs that NVIDIA's driver reports."""
    if not hardware.has_gpu():
        return []
    query = ["nvidia-smi", "--query-gpu=index,name,compute_cap,memory.total,driver_version"]
    try:
        said = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return [
            f"there is one; nvidia-smi tells nothing of it (driver: {hardware.driver_version() or 'none'})"
        ]
    lines = [[word.strip() for word in line.split(",")] for line in said.stdout.splitlines()]
    return [
        f"cuda:{index} {name}, compute capability {capability}, {memory}, driver {driver}"
        for index, name, capability, memory, driver in (line for line in lines if len(line) == 5)
    ]


def _check_packages(report: Diagnosis) -> None:
    """Check the packages: report a misfit as a problem if the run needs it, else as a fact."""
    report.section("packages")
    by_extra = extras.list_packages()
    if not by_extra:
        report.problem(f"{extras.PROJECT} is not installed", extras.install_command(extras.NO_EXTRA))
        return
    report.line("python", ".".join(map(str, sys.version_info[:3])))
    every = {package.name: package for extra in reversed(by_extra.values()) for package in extra}
    for name in (name for name in SHOWN_PACKAGES if name in every):
        one = every[name]
        where = f"extra {one.extra}" if one.extra else "needed"
        state = "fits" if one.fits else "does not fit" if one.found else "not installed"
        report.line(name, f"{one.found or '-'} {state}: {one.wanted} ({where})")
    needed = {extras.NO_EXTRA} | ({"gpu"} if _wants_gpu(report.settings) else set())
    complete = []
    for extra, wanted in by_extra.items():
        problems = [package.problem for package in wanted if package.problem]
        wrong = [package.problem for package in wanted if package.found and package.problem]
        if (extra in needed and problems) or wrong:
            about = f"extra {extra}" if extra else "packages"
            text = f"{about}: {', '.join(map(str, problems if extra in needed else wrong))}"
            report.problem(text, extras.install_command(extra), blocking=extra in needed)
        if extra and not problems:
            complete.append(extra)
    rest = [extra for extra in by_extra if extra and extra not in complete]
    text = f"complete: {', '.join(complete) or 'none'}; not complete: {', '.join(rest) or 'none'}"
    report.line("extras", text)
    for module in IMPORT_CHECKED:
        try:
            import_module(module)
        except Exception as error:  # of a library that is broken, anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            report.problem(f"{module} can't be imported: {reason}", extras.install_command(extras.NO_EXTRA))
    for clash in extras.find_conflicts():
        report.problem(clash, extras.install_command("gpu" if "gpu" in needed else extras.NO_EXTRA))
    if "gpu" in needed:
        _check_cuda(report, every)


def _check_cuda(report: Diagnosis, every: Iterable[str]) -> None:
    torch = hardware.cuda_version()
    dali = next((found[1] for name in every if (found := re.match(r"nvidia-dali-cuda(\d\d)", name))), None)
    if torch and dali and torch.split(".")[0] != dali:
        report.problem(f"PyTorch is built for CUDA {torch}, DALI for {dali}", extras.install_command("gpu"))


def _check_bundle(report: Diagnosis) -> tuple[Bundle, RunnerChoice] | None:
    """Check the bundle, select its runner and find the plans that fit."""
    settings = report.settings
    report.section("bundle")
    where = report.place(settings.bundle, "BUNDLE")
    try:
        models = bundle.load_bundle(settings.bundle)
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
        choice = select_for_settings(settings, models)
    except UsageError as error:
        instead = _FALLBACK_OPTIONS | {"--decode": models.decode}
        option = next((option for option in instead if str(error).startswith(option)), "--device")
        report.problem(str(error), f"add to the run: {option} {instead[option]}")
        return None
    report.line("runs on", choice.reason)
    if _wants_gpu(settings) and not choice.gpu:
        report.problem(
            f"there is a GPU, and the run would be on the CPU ({choice.reason})",
            extras.install_command("gpu"),
        )
    tuned = apply_profile(settings, models, choice, recorded=None)
    report.line("tuned", tuned.line or f"not yet; python -m engine.tune {where} --sample MANIFEST does")
    _check_plans(report, models, choice, where)
    return models, choice


def _check_plans(report: Diagnosis, models: Bundle, choice: RunnerChoice, where: str) -> None:
    gpu = choice.gpu
    if gpu is None and hardware.has_gpu():
        with suppress(UsageError):
            gpu = hardware.require_gpu()
    folder = models.path / plans.PLANS_FOLDER
    targets = dict(plans.list_targets(models))
    for target in sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        if target not in targets:
            report.line(f"plans/{target}", "incomplete: not every member has a plan there")
            report.problem(
                f"plans/{target} is incomplete", f"python -m build_engines {where}", blocking=gpu is not None
            )
            continue
        try:
            found = [plans.load_plan(path) for path in targets[target]]
        except UsageError as error:
            report.line(f"plans/{target}", "damaged")
            report.problem(str(error), f"python -m build_engines {where}", blocking=gpu is not None)
            continue
        _check_plan(report, models, target, found, choice, gpu)
    if not targets and gpu:
        report.line("plans", "none")
        if choice.runner != "tensorrt":
            report.problem("the bundle has no plans", f"python -m build_engines {where}", blocking=False)


def _check_plan(
    report: Diagnosis,
    models: Bundle,
    target: str,
    found: list[plans.Plan],
    choice: RunnerChoice,
    gpu: Gpu | None,
) -> None:
    passport = found[0].passport
    where = Path("BUNDLE") if report.settings.redaction else models.path
    if target == plans.INT8_TARGET:
        made = f"int8, {passport.backend} {passport.version}, for --precision int8 on a CPU"
        members = zip(models.members, found, strict=True)
        problem = next(filter(None, (plan.passport.cpu_problem(member) for member, plan in members)), None)
        report.line(f"plans/{target}", f"{made}: {problem or 'fits'}")
        if problem:
            fix = passport.rebuild(where).partition(": ")[2]
            report.problem(f"plans/{target}: {problem}", fix, blocking=False)
        return
    made = f"{passport.precision}, {passport.backend} {passport.version}, up to {passport.max_batch} a batch"
    if gpu is None:
        capabilities = ", ".join(passport.compute_capabilities)
        report.line(f"plans/{target}", f"{made}: for compute capability {capabilities}, no GPU here")
        return
    problem = gpu_choice.plan_mismatch(models, found, gpu, choice.precision, report.settings.batch_size)
    report.line(f"plans/{target}", f"{made}: {problem or 'fits'}")
    if problem:
        words = gpu_choice.fix_hint(passport, where, gpu, choice.precision, report.settings.batch_size)
        report.problem(f"plans/{target}: {problem}", words.partition(": ")[2], blocking=False)
