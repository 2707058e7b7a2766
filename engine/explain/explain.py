"""Draw which image regions moved the scores of some rows of a run.

`integrated_gradients.py` describes the maps. The images of the rows are read, decoded and resized again like
in the run. A row whose probabilities differ from those in the results is not explained.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from engine.bundle.bundle import Bundle
from engine.core.errors import UsageError
from engine.core.extras import install_command
from engine.core.hardware import available_cpus
from engine.core.location import Location
from engine.core.records import OnMessage
from engine.core.settings import Settings
from engine.explain.images import RereadImages, choose_references
from engine.explain.pictures import PictureFolder
from engine.explain.rows import ExplainedRun, RowSelection
from engine.runs.run_folder import EXPLANATIONS_FOLDER

if TYPE_CHECKING:
    from engine.explain.integrated_gradients import Explainer


REQUIRED_PACKAGES = ("captum", "matplotlib", "PIL", "safetensors", "torch", "torchvision")


@dataclass(frozen=True)
class ExplainResult:
    output: Location
    explained: int  # rows
    requested: int  # rows


def explain(
    settings: Settings,
    selection: RowSelection,
    *,
    output: Location | None = None,
    say: OnMessage = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, rows: None,
) -> ExplainResult:
    """Write PNGs and `index.json` for rows of the finished run in the folder `settings.manifest`.

    The files go to its folder `explanations`, or to `output`, and replace those of an earlier call. Only
    bundle, device ("cpu", "cuda:N"), workers and the options of a redacted run are used of `settings`.
    `say` gets a line for each row that cannot be explained, `on_progress` the rows done and their total.
    Raises UsageError for wrong results, rows, class, bundle or output. Raises EngineError, and writes
    nothing, if storage fails or no row can be explained.
    """
    open_explainer = _explainer_factory(settings)
    run = ExplainedRun.of(settings, selection.of_class)
    rows, reference_rows = run.choose(selection, say)
    location = output or settings.manifest / EXPLANATIONS_FOLDER
    explainer = open_explainer(run.bundle)
    with ExitStack() as stack:
        folder = stack.enter_context(PictureFolder(location, run))
        images = stack.enter_context(RereadImages(run, explainer))
        references, source = choose_references(run, images, reference_rows)
        explainer.set_references(references)
        for numbers, pixels, features in images.load(rows, say):
            explanations = explainer.explain(features, run.index)
            for row, gray, explanation in zip(map(int, numbers), pixels[:, 0], explanations, strict=True):
                folder.add(row, gray, explanation, source)
            on_progress(folder.rows, len(rows))
        folder.finish(rows, source)
        return ExplainResult(location, folder.rows, len(rows))


def _explainer_factory(settings: Settings) -> Callable[[Bundle], Explainer]:
    """Return a function that opens the members. Raises UsageError for a missing package or device."""
    if missing := [name for name in REQUIRED_PACKAGES if find_spec(name) is None]:
        raise UsageError(
            f"explanations need {', '.join(missing)}; install with: {install_command('explain')}"
        )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see training/__init__.py
    import torch

    from engine.explain.integrated_gradients import Explainer

    device = settings.device
    if not re.fullmatch(r"cpu|cuda:[0-9]{1,3}", device):
        raise UsageError(f"--device {device}: allowed: cpu, cuda:N")
    if device != "cpu" and int(device[5:]) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: PyTorch finds {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    torch.set_num_threads(settings.workers or available_cpus())
    return partial(Explainer.of, device=device)
