"""Run on many GPUs and machines with Ray actors, each of which has the stages of `engine.pipeline.stages`.

Inside this package `ray` is the library. `EnsembleScorer` is for pipelines of Ray Data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.ray.scorer import EnsembleScorer

__all__ = ["EnsembleScorer"]


def __getattr__(name: str) -> Any:
    if name != "EnsembleScorer":
        raise AttributeError(f"module 'engine.ray' has no attribute {name!r}")
    from engine.ray.scorer import EnsembleScorer

    return EnsembleScorer
