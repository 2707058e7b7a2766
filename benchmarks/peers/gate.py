"""Check that a contender did the work: compare its rows with the engine's rows in float32."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from build_engines.parity import macro_auc

Scores = npt.NDArray[np.float64]
MAX_DIFFERENCE = 5e-3  # of a probability
NEARLY_TIED = 2 * MAX_DIFFERENCE  # between the two best classes: either may win


@dataclass(frozen=True)
class AcceptanceLimits:
    difference: float | None  # of any probability; None: not compared
    agreement: float  # share of the rows, those nearly tied left out, with the same arg max
    auc: float | None = None  # largest difference of AUC on the reference's classes; None: not compared


FLOAT32 = AcceptanceLimits(MAX_DIFFERENCE, 0.999)
INT8 = AcceptanceLimits(None, 0.99, auc=0.002)


@dataclass(frozen=True)
class Verdict:
    why_not: str | None  # one line; None if the figure counts
    difference: float | None = None
    agreement: float | None = None


def read_rows(folder: Path) -> pd.DataFrame:
    """Read a contender's Parquet files: path, as in the manifest or absolute, status, `p_<class>`."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        return pd.DataFrame({"path": pd.Series(dtype=str)})
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def judge_rows(
    rows: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    corrupt: Collection[str],
    classes: Collection[str],
    limits: AcceptanceLimits = FLOAT32,
) -> Verdict:
    """Compare rows, in any order, with the reference; the rows of `corrupt` paths must have no score.

    Each other path needs exactly one row with finite scores.
    """
    columns = [f"p_{name}" for name in classes]
    actual = rows.assign(path=[Path(path).name for path in rows["path"]])
    repeated = actual["path"].duplicated().sum()
    if repeated:
        return Verdict(f"{repeated} paths have more than one row")
    missing_columns = [name for name in ("status", *columns) if name not in actual]
    if missing_columns:
        return Verdict(f"no rows with the columns {', '.join(missing_columns)}")
    actual, expected = actual.set_index("path"), reference.set_index("path")
    foreign = actual.index.difference(expected.index)
    if len(foreign):
        return Verdict(f"{len(foreign)} rows of files that are not in the manifest, such as {foreign[0]}")
    scored = actual.index[actual[columns].notna().any(axis=1)]
    wrong = scored.intersection(list(corrupt))
    if len(wrong):
        return Verdict(f"{len(wrong)} corrupt files carry a score, such as {wrong[0]}")
    sound = expected.index.difference(list(corrupt))
    missing = sound.difference(scored)
    if len(missing):
        return Verdict(f"{len(missing)} rows are missing or have no score, such as {missing[0]}")
    scores = (rows.loc[sound, columns].to_numpy(np.float64) for rows in (actual, expected))
    return _compare_rows(*scores, sound, limits)


def _compare_rows(actual: Scores, expected: Scores, paths: pd.Index, limits: AcceptanceLimits) -> Verdict:
    if not np.isfinite(actual).all():
        return Verdict("some scores are not numbers")
    differences = np.abs(actual - expected).max(axis=1)
    best = np.sort(expected, axis=1)
    clear = best[:, -1] - best[:, -2] > NEARLY_TIED
    same = actual.argmax(axis=1) == expected.argmax(axis=1)
    agreement = float(same[clear].mean()) if clear.any() else 1.0
    worst = int(differences.argmax())
    why_not = None
    if limits.difference is not None and differences[worst] > limits.difference:
        count = int((differences > limits.difference).sum())
        example = f"{paths[worst]} by {differences[worst]:.3g}"
        why_not = f"{count} rows differ by more than {limits.difference:g}, such as {example}"
    elif agreement < limits.agreement:
        why_not = f"the same class in {agreement:.4f} of the rows; allowed: at least {limits.agreement:g}"
    elif limits.auc is not None:
        auc, auc_expected = (macro_auc(expected.argmax(axis=1), scores) for scores in (actual, expected))
        if abs(auc - auc_expected) > limits.auc:
            why_not = f"an AUC of {auc:.4f}; allowed: within {limits.auc:g} of {auc_expected:.4f}"
    return Verdict(why_not, float(differences[worst]), agreement)
