"""Check that a contender did the work: compare its rows with the engine's rows in float32."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from build_engines.parity import macro_auc

MAX_DIFFERENCE = 5e-3  # of a probability
NEARLY_TIED = 2 * MAX_DIFFERENCE  # between the two best classes: either may win


@dataclass(frozen=True)
class AcceptanceLimits:
    difference: float | None  # of any probability; None: not compared
    agreement: float  # share of the rows, those nearly tied left out, with the same arg max
    auc: float | None = None  # largest difference of the AUC against the reference's classes; None: as above


FLOAT32 = AcceptanceLimits(MAX_DIFFERENCE, 0.999)
INT8 = AcceptanceLimits(None, 0.99, auc=0.002)


@dataclass(frozen=True)
class Verdict:
    why_not: str | None  # one line; None where the figure counts
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
    """Compare rows, in any order, with the reference; `corrupt` are paths that may not carry a score.

    Every path but these has exactly one row with finite scores; these have none, or one without.
    """
    columns = [f"p_{name}" for name in classes]
    found = rows.assign(path=[Path(path).name for path in rows["path"]])
    repeated = found["path"].duplicated().sum()
    if repeated:
        return Verdict(f"{repeated} paths have more than one row")
    absent = [name for name in ("status", *columns) if name not in found]
    if absent:
        return Verdict(f"no rows with the columns {', '.join(absent)}")
    found, wanted = found.set_index("path"), reference.set_index("path")
    foreign = found.index.difference(wanted.index)
    if len(foreign):
        return Verdict(f"{len(foreign)} rows of files that are not in the manifest, such as {foreign[0]}")
    scored = found.index[found[columns].notna().any(axis=1)]
    invented = scored.intersection(list(corrupt))
    if len(invented):
        return Verdict(f"{len(invented)} corrupt files carry a score, such as {invented[0]}")
    sound = wanted.index.difference(list(corrupt))
    missing = sound.difference(scored)
    if len(missing):
        return Verdict(f"{len(missing)} rows are missing or have no score, such as {missing[0]}")
    ours = wanted.loc[sound, columns].to_numpy(np.float64)
    theirs = found.loc[sound, columns].to_numpy(np.float64)
    return _compare_rows(theirs, ours, sound, limits)


def _compare_rows(
    found: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64], paths: pd.Index, limits: AcceptanceLimits
) -> Verdict:
    if not np.isfinite(found).all():
        return Verdict("some scores are not numbers")
    differences = np.abs(found - wanted).max(axis=1)
    best = np.sort(wanted, axis=1)
    clear = best[:, -1] - best[:, -2] > NEARLY_TIED
    agreement = float((found.argmax(axis=1) == wanted.argmax(axis=1))[clear].mean()) if clear.any() else 1.0
    worst = int(differences.argmax())
    why_not = None
    if limits.difference is not None and differences[worst] > limits.difference:
        over = int((differences > limits.difference).sum())
        far = f"{paths[worst]} by {differences[worst]:.3g}"
        why_not = f"{over} rows are off by more than {limits.difference:g}, {far}"
    elif agreement < limits.agreement:
        why_not = f"the same class in {agreement:.4f} of the rows, not in {limits.agreement:g}"
    elif limits.auc is not None:
        theirs, ours = (macro_auc(wanted.argmax(axis=1), scores) for scores in (found, wanted))
        if abs(theirs - ours) > limits.auc:
            why_not = f"an AUC of {theirs:.4f}, not within {limits.auc:g} of {ours:.4f}"
    return Verdict(why_not, float(differences[worst]), agreement)
