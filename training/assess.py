"""Assess the members and the ensemble: weights on validation, figures on test, folds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from engine.calibrate.thresholds import fit_temperature
from engine.scoring.ensemble import combine_logits, softmax
from engine.stats import metrics
from training import weight_search
from training.audit import audit
from training.data import Dataset
from training.listing import Labels, count_per_class
from training.members import TrainedMember, Trainer
from training.phases.features import Floats
from training.settings import TrainingOptions
from training.split import Split

TABLE_ROWS = 21  # of the weights search; enough for all weights of two members
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy", "scikit-learn")
FOLD_FIGURES = ("accuracy", "macro_f1", "auc", "balanced_accuracy")
ENSEMBLE = "ensemble"

# Table 2 of Kaur, Vivekanandam and Whig
PAPER_FIGURES = {
    "resnet50": {
        "accuracy": 0.904,
        "macro_precision": 0.91,
        "macro_recall": 0.89,
        "macro_f1": 0.90,
        "auc": 0.94,
    },
    "inception_v3": {
        "accuracy": 0.912,
        "macro_precision": 0.92,
        "macro_recall": 0.90,
        "macro_f1": 0.91,
        "auc": 0.95,
    },
    "ensemble": {
        "accuracy": 0.931,
        "macro_precision": 0.94,
        "macro_recall": 0.92,
        "macro_f1": 0.93,
        "auc": 0.97,
    },
}


@dataclass(frozen=True)
class PreparedData:
    """The images in use, their groups, splits and audit findings."""

    dataset: Dataset
    groups: audit.ImageGroups
    parts: Split
    folds: list[Split]
    findings: dict[str, Any]


@dataclass(frozen=True)
class ChosenWeights:
    """The weights of the members, chosen on the validation set."""

    searched: list[weight_search.Candidate]  # best first
    beside: list[weight_search.Candidate]
    temperature: float  # applied
    fitted: float | None

    @property
    def weights(self) -> tuple[float, ...]:
        return self.searched[0].weights

    def voters(self, trained: Sequence[TrainedMember]) -> dict[str, Floats]:
        """Return probabilities [N, C] of each member and of the ensemble."""
        logits = np.stack([member.logits for member in trained])
        names = [member.plan.name for member in trained]
        return dict(zip(names, softmax(logits), strict=True)) | {
            ENSEMBLE: _combine_logits(logits, self.weights, self.temperature)
        }


def _combine_logits(logits: Floats, weights: Sequence[float], temperature: float) -> Floats:
    """Return the ensemble's probabilities [N, C] for logits [M, N, C]."""
    return combine_logits(logits, weights=weights, temperatures=[1.0] * len(logits), temperature=temperature)[
        1
    ]


def choose_weights(
    trained: Sequence[TrainedMember], labels: Labels, parts: Split, options: TrainingOptions
) -> ChosenWeights:
    """Search the weights on the validation set, and fit a temperature if requested."""
    logits = np.stack([member.logits for member in trained])[:, parts.validation]
    truth = labels[parts.validation]
    searched = weight_search.search_weights(logits, truth)
    fitted = None
    if options.temperature_scaling:
        fitted = fit_temperature(_combine_logits(logits, searched[0].weights, 1.0), truth)
    return ChosenWeights(searched, weight_search.reference_candidates(logits, truth), fitted or 1.0, fitted)


def assess(
    trained: Sequence[TrainedMember], mix: ChosenWeights, prepared: PreparedData, options: TrainingOptions
) -> dict[str, Any]:
    """Return the content of evaluation.json and the report, without file names."""
    dataset, parts = prepared.dataset, prepared.parts
    voters = mix.voters(trained)
    members = [name for name in voters if name != ENSEMBLE]
    sets = {"validation": parts.validation, "test": parts.test}
    figures = {
        voter: {name: _figures(probabilities, prepared, chosen, options) for name, chosen in sets.items()}
        for voter, probabilities in voters.items()
    }
    best = max(members, key=lambda name: figures[name]["validation"]["macro_f1"]["value"])
    return {
        "classes": list(dataset.classes),
        "demo": options.freeze and "none" in options.weights,  # the convolutions are untrained
        "images": {
            name: count_per_class(dataset.labels[chosen], dataset.classes) for name, chosen in parts.named()
        },
        "voters": figures,
        "difference": {
            "from": best,
            **{
                name: metrics.compare(
                    voters[ENSEMBLE][chosen],
                    voters[best][chosen],
                    dataset.labels[chosen],
                    groups=prepared.groups.together[chosen],
                    seed=options.seed,
                )
                for name, chosen in sets.items()
            },
        },
        "paper": PAPER_FIGURES,
        "weights_search": {
            "chosen": asdict(mix.searched[0]),
            "beside": [asdict(candidate) for candidate in mix.beside],
            "table": [asdict(candidate) for candidate in mix.searched[:TABLE_ROWS]],
        },
        "temperature": _temperature(mix, trained, prepared),
        "data": prepared.findings,
        "history": {
            member.plan.name: [
                {"phase": phase, **asdict(epoch)}
                for phase, fit in member.phases.items()
                for epoch in fit.history
            ]
            for member in trained
        },
        "best": {
            member.plan.name: {"phase": phase, "epoch": fit.best.epoch}
            for member in trained
            for phase, fit in member.phases.items()
        },
        "recipe": _recipe(options),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _figures(
    probabilities: Floats, prepared: PreparedData, chosen: Labels, options: TrainingOptions
) -> dict[str, Any]:
    return metrics.evaluate(
        probabilities[chosen],
        prepared.dataset.labels[chosen],
        classes=prepared.dataset.classes,
        groups=prepared.groups.together[chosen],
        seed=options.seed,
    )


def _temperature(
    mix: ChosenWeights, trained: Sequence[TrainedMember], prepared: PreparedData
) -> dict[str, Any]:
    """Measure the effect of temperature scaling on the validation set."""
    facts: dict[str, Any] = {"applied": mix.temperature, "fitted": mix.fitted}
    if mix.fitted is None:
        return facts | {"validation_nll": None, "validation_ece": None}
    validation = prepared.parts.validation
    logits = np.stack([member.logits[validation] for member in trained])
    truth = prepared.dataset.labels[validation]
    before, after = (
        metrics.calibration_metrics(_combine_logits(logits, mix.weights, temperature), truth)
        for temperature in (1.0, mix.fitted)
    )
    return facts | {
        f"validation_{name}": {"before": before[name], "after": after[name]} for name in ("nll", "ece")
    }


def _recipe(options: TrainingOptions) -> dict[str, Any]:
    """Return the options without the user's paths."""
    facts = options.recorded()
    for name in ("data", "root", "path_column", "label_column"):
        del facts[name]
    facts["weights"] = [Path(weights).name for weights in options.weights]
    return facts


def cross_validate(trainer: Trainer, folds: Sequence[Split]) -> dict[str, Any] | None:
    """Run the recipe once per fold; return mean and deviation of each model's figures."""
    if not folds:
        return None
    dataset = trainer.dataset
    values: dict[str, dict[str, list[float | None]]] = {}
    for number, parts in enumerate(folds, start=1):
        trained = trainer.fit(parts, fold=number)
        mix = choose_weights(trained, dataset.labels, parts, trainer.options)
        for voter, probabilities in mix.voters(trained).items():
            scores = metrics.point_metrics(
                probabilities[parts.test], dataset.labels[parts.test], classes=dataset.classes
            )
            for figure in FOLD_FIGURES:
                values.setdefault(voter, {}).setdefault(figure, []).append(scores[figure])
    return {
        "count": len(folds),
        "voters": {
            voter: {figure: _mean_and_deviation(scores) for figure, scores in figures.items()}
            for voter, figures in values.items()
        },
    }


def _mean_and_deviation(values: Sequence[float | None]) -> dict[str, Any]:
    assert None not in values, "every fold has every class"
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    return {"mean": mean, "deviation": deviation, "values": list(values)}
