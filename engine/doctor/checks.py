"""`python -m engine.doctor [MANIFEST]`: check what a run would do on this machine, and find its problems.

The checks call the same code as a run, and write nothing. `python -m engine.run MANIFEST --dry-run` prints
the same.
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

from engine.bundle import bundle as bundles
from engine.bundle import plans
from engine.bundle.bundle import Bundle
from engine.core import extras, hardware
from engine.core.errors import UsageError
from engine.core.hardware import Gpu, available_cpus, available_memory, processor_name, total_memory
from engine.core.records import OnMessage
from engine.core.settings import ALL_GPUS, Settings
from engine.doctor.diagnosis import Diagnosis, format_bytes
from engine.doctor.manifest_checks import check_manifest
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
IMPORT_CHECKED = ("onnxruntime", "nvidia.dali", "imagecodecs")  # metadata do not show a broken library
_FALLBACK_OPTIONS = {"--runner": "auto", "--precision": "fp32", "--device": "cpu"}
MODEL_MEMORY_FACTOR = 3  # memory of the running members / size of their float32 graphs


def diagnose(
    settings: Settings, *, manifest: bool, say: OnMessage, stop: threading.Event | None = None
) -> Diagnosis:
    """Check what a run with `settings` would do here; without `manifest`, check the setup only.

    `say` gets progress. Raises UsageError for settings with `only_errors`.
    """
    if settings.only_errors:
        raise UsageError("--only-errors cannot be checked before a run; leave it out")
    if settings.device == ALL_GPUS:
        settings = replace(settings, device="cuda:0", ray="local")
    diagnosis = Diagnosis(settings)
    _check_machine(diagnosis)
    _check_packages(diagnosis)
    bundle_and_choice = _check_bundle(diagnosis)
    if manifest:
        check_manifest(diagnosis, bundle_and_choice, say, stop or threading.Event())
    return diagnosis


def _check_machine(diagnosis: Diagnosis) -> None:
    diagnosis.add_section("machine")
    usable, total = available_cpus(), os.cpu_count() or 1
    diagnosis.add_line("processor", f"{processor_name()}, {usable} of {total} CPUs usable")
    free = available_memory()
    diagnosis.add_line("memory", f"{format_bytes(total_memory())}, {format_bytes(free)} of it free")
    member_bytes = _estimate_member_bytes(diagnosis.settings.bundle)
    needed = diagnosis.settings.limits.memory + member_bytes
    if free < needed:
        fitting = max(1 << 26, (free - member_bytes) // 2)
        diagnosis.add_problem(
            f"only {format_bytes(free)} of memory is free, but a run needs about {format_bytes(needed)}",
            f"add to the run: --memory {fitting >> 20}MiB",
            blocking=False,
        )
    gpus = _query_gpus()
    for text in gpus or ["none"]:
        diagnosis.add_line("GPU", text)
    if diagnosis.settings.ray:
        _check_ray(diagnosis)
    driver = hardware.driver_version()
    if driver and int(driver.split(".")[0]) < hardware.MIN_DRIVER and _wants_gpu(diagnosis.settings):
        diagnosis.add_problem(
            f"the GPU driver is {driver}, but a run needs r{hardware.MIN_DRIVER} or newer",
            f"sudo apt install nvidia-driver-{hardware.MIN_DRIVER}-server",
        )


def _check_ray(diagnosis: Diagnosis) -> None:
    """Describe the actors that --ray would start."""
    from engine.ray import cluster

    try:
        diagnosis.add_line("Ray", cluster.describe_actors(diagnosis.settings))
    except UsageError as error:
        fix = extras.install_command("ray") if "install it" in str(error) else "ray start --head"
        diagnosis.add_problem(str(error), fix)


def _wants_gpu(settings: Settings) -> bool:
    return hardware.has_gpu() and settings.device != "cpu"


def _estimate_member_bytes(bundle: Path) -> int:
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
        output = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return [f"present, but nvidia-smi failed (driver: {hardware.driver_version() or 'none'})"]
    lines = [[word.strip() for word in line.split(",")] for line in output.splitlines()]
    return [
        f"cuda:{index} {name}, compute capability {capability}, {memory}, driver {driver}"
        for index, name, capability, memory, driver in (line for line in lines if len(line) == 5)
    ]


def _check_packages(diagnosis: Diagnosis) -> None:
    """Check the installed versions. A wrong version blocks a run only if the run needs the package."""
    diagnosis.add_section("packages")
    by_extra = extras.list_packages()
    if not by_extra:
        diagnosis.add_problem(f"{extras.PROJECT} is not installed", extras.install_command(extras.NO_EXTRA))
        return
    diagnosis.add_line("python", ".".join(map(str, sys.version_info[:3])))
    by_name = {package.name: package for extra in reversed(by_extra.values()) for package in extra}
    for name in (name for name in SHOWN_PACKAGES if name in by_name):
        package = by_name[name]
        source = f"extra {package.extra}" if package.extra else "needed"
        state = "fits" if package.fits else "does not fit" if package.found else "not installed"
        diagnosis.add_line(name, f"{package.found or '-'} {state}: {package.wanted} ({source})")
    needed = {extras.NO_EXTRA} | ({"gpu"} if _wants_gpu(diagnosis.settings) else set())
    complete = []
    for extra, packages in by_extra.items():
        problems = [package.problem for package in packages if package.problem]
        wrong = [package.problem for package in packages if package.found and package.problem]
        if (extra in needed and problems) or wrong:
            title = f"extra {extra}" if extra else "packages"
            text = f"{title}: {', '.join(map(str, problems if extra in needed else wrong))}"
            diagnosis.add_problem(text, extras.install_command(extra), blocking=extra in needed)
        if extra and not problems:
            complete.append(extra)
    incomplete = [extra for extra in by_extra if extra and extra not in complete]
    text = f"complete: {', '.join(complete) or 'none'}; not complete: {', '.join(incomplete) or 'none'}"
    diagnosis.add_line("extras", text)
    for module in IMPORT_CHECKED:
        try:
            import_module(module)
        except Exception as error:  # a broken library may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            text = f"{module} cannot be imported: {reason}"
            diagnosis.add_problem(text, extras.install_command(extras.NO_EXTRA))
    for clash in extras.find_conflicts():
        diagnosis.add_problem(clash, extras.install_command("gpu" if "gpu" in needed else extras.NO_EXTRA))
    if "gpu" in needed:
        _check_cuda(diagnosis, by_name)


def _check_cuda(diagnosis: Diagnosis, packages: Iterable[str]) -> None:
    torch = hardware.cuda_version()
    versions = (re.match(r"nvidia-dali-cuda(\d\d)", name) for name in packages)
    dali = next((version[1] for version in versions if version), None)
    if torch and dali and torch.split(".")[0] != dali:
        text = f"PyTorch is built for CUDA {torch}, but DALI is built for CUDA {dali}"
        diagnosis.add_problem(text, extras.install_command("gpu"))


def _check_bundle(diagnosis: Diagnosis) -> tuple[Bundle, RunnerChoice] | None:
    """Check the bundle, select its runner and find the plans that fit."""
    settings = diagnosis.settings
    diagnosis.add_section("bundle")
    path = diagnosis.quote(settings.bundle, "BUNDLE")
    try:
        bundle = bundles.load_bundle(settings.bundle)
    except UsageError as error:
        diagnosis.add_problem(str(error), f"python -m training DATA -o {path}")
        return None
    diagnosis.add_line("classes", ", ".join(bundle.classes))
    members = (f"{member.name} ({member.architecture}) x {member.weight:g}" for member in bundle.members)
    diagnosis.add_line("members", ", ".join(members))
    height, width = bundle.size
    diagnosis.add_line("input", f"{width} x {height}, decoded {bundle.decode}")
    points = bundle.operating_points
    diagnosis.add_line(
        "triage", str(points or f"none; calibrate with: python -m engine.calibrate {path} --on labelled.csv")
    )
    try:
        choice = select_for_settings(settings, bundle)
    except UsageError as error:
        fallbacks = _FALLBACK_OPTIONS | {"--decode": bundle.decode}
        option = next((option for option in fallbacks if str(error).startswith(option)), "--device")
        diagnosis.add_problem(str(error), f"add to the run: {option} {fallbacks[option]}")
        return None
    diagnosis.add_line("runs on", choice.reason)
    if _wants_gpu(settings) and not choice.gpu:
        diagnosis.add_problem(
            f"this machine has a GPU, but the run would be on the CPU ({choice.reason})",
            extras.install_command("gpu"),
        )
    tuned = apply_profile(settings, bundle, choice, recorded=None)
    diagnosis.add_line("tuned", tuned.line or f"no; use: python -m engine.tune {path} --sample MANIFEST")
    _check_plans(diagnosis, bundle, choice, f"python -m build_engines {path}")
    return bundle, choice


def _check_plans(diagnosis: Diagnosis, bundle: Bundle, choice: RunnerChoice, build: str) -> None:
    """Check the compiled plans of each target; `build` is the command that makes them."""
    gpu = choice.gpu
    if gpu is None and hardware.has_gpu():
        with suppress(UsageError):
            gpu = hardware.require_gpu()
    folder = bundle.path / plans.PLANS_FOLDER
    targets = dict(plans.list_targets(bundle))
    for target in sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        if target not in targets:
            diagnosis.add_line(f"plans/{target}", "incomplete: some members have no plan")
            diagnosis.add_problem(f"plans/{target} is incomplete", build, blocking=gpu is not None)
            continue
        try:
            target_plans = [plans.load_plan(path) for path in targets[target]]
        except UsageError as error:
            diagnosis.add_line(f"plans/{target}", "damaged")
            diagnosis.add_problem(str(error), build, blocking=gpu is not None)
            continue
        _check_plan(diagnosis, bundle, target, target_plans, choice, gpu)
    if not targets and gpu:
        diagnosis.add_line("plans", "none")
        if choice.runner != "tensorrt":
            diagnosis.add_problem("the bundle has no compiled plans", build, blocking=False)


def _check_plan(
    diagnosis: Diagnosis,
    bundle: Bundle,
    target: str,
    target_plans: list[plans.Plan],
    choice: RunnerChoice,
    gpu: Gpu | None,
) -> None:
    passport = target_plans[0].passport
    path = Path("BUNDLE") if diagnosis.settings.redaction else bundle.path
    if target == plans.INT8_TARGET:
        description = f"int8, {passport.backend} {passport.version}, for --precision int8 on a CPU"
        members = zip(bundle.members, target_plans, strict=True)
        problem = next(filter(None, (plan.passport.cpu_problem(member) for member, plan in members)), None)
        diagnosis.add_line(f"plans/{target}", f"{description}: {problem or 'fits'}")
        if problem:
            fix = passport.rebuild(path).partition(": ")[2]
            diagnosis.add_problem(f"plans/{target}: {problem}", fix, blocking=False)
        return
    description = (
        f"{passport.precision}, {passport.backend} {passport.version}, up to {passport.max_batch} a batch"
    )
    if gpu is None:
        capabilities = ", ".join(passport.compute_capabilities)
        text = f"{description}: for compute capability {capabilities}; this machine has no GPU"
        diagnosis.add_line(f"plans/{target}", text)
        return
    batch_size = diagnosis.settings.batch_size
    problem = gpu_choice.plan_mismatch(bundle, target_plans, gpu, choice.precision, batch_size)
    diagnosis.add_line(f"plans/{target}", f"{description}: {problem or 'fits'}")
    if problem:
        hint = gpu_choice.fix_hint(passport, path, gpu, choice.precision, batch_size)
        diagnosis.add_problem(f"plans/{target}: {problem}", hint.partition(": ")[2], blocking=False)
