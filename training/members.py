"""Train one member after the other: build it, fit its head on the frozen base, then fit every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.core.errors import UsageError
from engine.runners.network import Network
from training import models
from training.data import Dataset, Progress
from training.phases import features
from training.phases.features import Floats
from training.phases.fit import Epoch, FitResult
from training.phases.heads import fit_head
from training.phases.whole import fit_whole
from training.settings import TrainingOptions
from training.split import Split

CALIBRATION_IMAGES = 64  # enough for the running statistics of a random base

OnNote = Callable[[str], None]
# `with step("features of resnet50", 450) as progress:` shows a step; progress(16) adds 16 to it
StartStep = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class MemberPlan:
    """A member before it is built."""

    name: str
    architecture: str
    weights: str
    seed: int

    def build(self, options: TrainingOptions, classes: int) -> Network:
        return models.build_network(
            self.architecture,
            classes=classes,
            weights=self.weights,
            seed=self.seed,
            size=options.size,
            normalization=options.normalization,
        )


@dataclass(frozen=True)
class TrainedMember:
    """A member after its training."""

    plan: MemberPlan
    network: Network  # on the CPU
    phases: dict[str, FitResult]  # "head", "whole", in their order
    logits: Floats  # [N, C]


def plan_members(options: TrainingOptions) -> list[MemberPlan]:
    """Plan the members; those of one architecture get numbered names, each its own seed."""
    seen: Counter[str] = Counter()
    plans = []
    for index, architecture in enumerate(options.members):
        seen[architecture] += 1
        name = architecture if seen[architecture] == 1 else f"{architecture}_{seen[architecture]}"
        plans.append(MemberPlan(name, architecture, options.weights_of(index), options.seed + index))
    return plans


def choose_device(name: str) -> torch.device:
    """Return the device; "auto" is the first GPU, else the CPU. Raises UsageError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"--device {name}: {reason}; allowed: auto, cpu, cuda, cuda:N") from None
    return device


@dataclass(frozen=True)
class Trainer:
    """Fits members on splits of one dataset; checkpoints and features go to `work`."""

    options: TrainingOptions
    dataset: Dataset
    device: torch.device
    work: Path
    step: StartStep
    note: OnNote

    def fit(self, parts: Split, *, fold: int | None = None) -> list[TrainedMember]:
        """Fit all members on one split."""
        return [_MemberTraining(self, plan, parts, fold).fit() for plan in plan_members(self.options)]


class _MemberTraining:
    def __init__(self, trainer: Trainer, plan: MemberPlan, parts: Split, fold: int | None) -> None:
        self.trainer, self.plan, self.parts = trainer, plan, parts
        self.title = plan.name if fold is None else f"fold {fold}: {plan.name}"
        self.work = trainer.work / ("main" if fold is None else f"fold-{fold}")

    def fit(self) -> TrainedMember:
        """Fit the head on the frozen base first, then every layer at a lower rate.

        Every layer of a random base is trained at once, except with --freeze, which makes a demonstration.
        """
        options, dataset, device = self.trainer.options, self.trainer.dataset, self.trainer.device
        network = self.plan.build(options, len(dataset.classes)).to(device)
        if self.plan.weights == "none":
            random = np.random.default_rng(self.plan.seed)
            sample = random.permutation(self.parts.train)[:CALIBRATION_IMAGES]
            features.calibrate_batch_norm(network, dataset.pixels[sample], device=device)
        phases: dict[str, FitResult] = {}
        inputs = torch.from_numpy(dataset.pixels)
        module: torch.nn.Module = network
        if options.freeze or self.plan.weights != "none":
            raw_features = self._features(network)
            phases["head"] = self._fit_head(network, raw_features)
            if options.freeze:
                inputs, module = torch.from_numpy(raw_features[0]), network.head
        if not options.freeze:
            phases["whole"] = self._fit_whole(network)
        logits = features.infer(module, inputs, device=device).numpy()
        return TrainedMember(self.plan, network.cpu(), phases, logits)

    def _features(self, network: Network) -> Floats:
        trainer, copies = self.trainer, self.trainer.options.copies
        total = len(trainer.dataset) + copies * len(self.parts.train)
        with trainer.step(f"{self.title}: features", total) as progress:
            return features.cached_features(
                network,
                trainer.dataset.pixels,
                self.parts.train,
                copies=copies,
                seed=self.plan.seed,
                folder=trainer.work / "features",
                device=trainer.device,
                progress=progress,
            )

    def _fit_head(self, network: Network, raw_features: Floats) -> FitResult:
        trainer = self.trainer
        fitting = trainer.options.head(self.plan.seed)
        with trainer.step(f"{self.title}: head, epochs", fitting.epochs) as progress:
            return fit_head(
                network,
                raw_features,
                trainer.dataset.labels,
                self.parts,
                fitting,
                checkpoint=self.work / f"{self.plan.name}-head.pt",
                device=trainer.device,
                progress=progress,
            )

    def _fit_whole(self, network: Network) -> FitResult:
        trainer = self.trainer
        fitting = trainer.options.whole(self.plan.weights, self.plan.seed)
        with trainer.step(f"{self.title}: whole network, epochs", fitting.epochs) as progress:

            def report(epoch: Epoch) -> None:
                progress(1)
                trainer.note(
                    f"{self.title}: epoch {epoch.epoch}: loss {epoch.train_loss:.3f}, validation loss "
                    f"{epoch.validation_loss:.3f}, macro-F1 {epoch.validation_macro_f1:.3f}"
                )

            return fit_whole(
                network,
                trainer.dataset.pixels,
                trainer.dataset.labels,
                self.parts,
                fitting,
                classes=len(trainer.dataset.classes),
                checkpoint=self.work / f"{self.plan.name}-whole.pt",
                device=trainer.device,
                progress=report,
            )
