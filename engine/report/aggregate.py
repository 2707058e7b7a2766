"""Aggregate results of any length in one pass and bounded memory: counts, histograms, top rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from engine.bundle.class_names import ClassNames
from engine.core.deadline import Deadline
from engine.core.errors import EngineError, UsageError
from engine.core.records import PATH_COLUMN, Status
from engine.results import ResultsFolder
from engine.stats.top_k import TopK
from engine.storage.folders import error_text

BINS = 50  # of a probability's histogram
FINE_BINS = 400  # of the members' disagreement, most of which is near 0
MAX_REASONS = 100  # distinct reasons that are counted, per status
SAMPLE_ROWS = 10_000  # maximum of labelled rows for the figures of merit
LABEL = "label"
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# the columns of the work list, each shown if it exists with this type
_LISTED_TYPES: dict[str, Callable[[Any], bool]] = {
    "row": pa.types.is_integer,
    PATH_COLUMN: pa.types.is_string,
    "run_id": pa.types.is_string,
    "prediction": pa.types.is_dictionary,
    "confidence": pa.types.is_floating,
    "member_disagreement": pa.types.is_floating,
    "triage": pa.types.is_dictionary,
    "abstain": pa.types.is_boolean,
    "abstain_reasons": pa.types.is_list,
    "flags": pa.types.is_list,
}
_WORDS = ("status", "prediction", "triage")


@dataclass(frozen=True)
class ReportSchema:
    """The columns of a results folder. Older ones have fewer."""

    classes: tuple[str, ...]
    members: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    target: str  # the class whose probability ranks the rows
    label: str | None  # the column with the truth
    words: tuple[str, ...]  # columns with few distinct values

    @classmethod
    def of(cls, results: ResultsFolder, label_column: str | None) -> ReportSchema:
        """Find the columns of `results`. Raises UsageError if `label_column` is not one of them."""
        run = results.first
        classes, members = run.classes, tuple(run.weights)
        names = results.schema().names if results.parts else []
        if label_column is not None and results.parts and label_column not in names:
            raise UsageError(
                f"--label-column {label_column}: results {results.place} have no such column; allowed: "
                f"{', '.join(names)}"
            )
        prefix = run.result_options.column_prefix
        default_label = next((name for name in (LABEL, prefix + LABEL) if name in names), None)
        groups = {name: parts for name, parts in run.groups.items() if f"p_{name}" in names}
        return cls(
            classes,
            members,
            groups,
            run.target if run.target in classes or run.target in groups else classes[-1],
            label_column or default_label,
            tuple(name for name in _WORDS if name in names),
        )

    @property
    def scores(self) -> list[str]:
        """Return the columns of the scores, the target's first."""
        return sorted((*self.groups, *self.classes), key=lambda name: name != self.target)

    @property
    def columns(self) -> list[str]:
        members = [f"{member}_p_{name}" for member in self.members for name in self.classes]
        listed = [*_LISTED_TYPES, "status", "error", "width", "height"]
        label = [self.label] if self.label else []
        return list(dict.fromkeys([*listed, *(f"p_{name}" for name in self.scores), *members, *label]))


@dataclass
class LabelledSample:
    """A uniform random sample of the rows with a known label and a score."""

    rows: int = 0  # all rows with a known label and a score
    labels: int = 0  # all rows with a known label
    unknown: Counter[str] = field(default_factory=Counter)  # the first labels that are not a class
    others: int = 0  # rows with such a label
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _keys: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    _truth: Counts = field(default_factory=lambda: np.empty(0, np.int64))
    _votes: list[Floats] = field(default_factory=list)  # [n, V, C]

    def add(self, truth: Counts, votes: Floats) -> None:
        """Add `truth` [n] and the probabilities of ensemble and members, [n, V, C]."""
        self.rows += len(truth)
        self._keys = np.concatenate([self._keys, self._rng.random(len(truth))])
        self._truth = np.concatenate([self._truth, truth])
        self._votes.append(votes)
        if len(self._keys) > 2 * SAMPLE_ROWS:
            self._limit(SAMPLE_ROWS)

    def _limit(self, count: int) -> None:
        chosen = np.sort(np.argsort(self._keys)[:count])
        self._votes = [np.concatenate(self._votes)[chosen]]
        self._keys, self._truth = self._keys[chosen], self._truth[chosen]

    def sample(self) -> tuple[Counts, Floats]:
        """Return labels [n] and probabilities [n, V, C] of at most SAMPLE_ROWS rows, in order."""
        self._limit(SAMPLE_ROWS)
        return self._truth, self._votes[0]


@dataclass
class FailureReason:
    rows: int
    row: int  # the first of them
    path: str | None


class ReportTotals:
    """The totals over the rows that were added."""

    def __init__(self, schema: ReportSchema, *, listed: int) -> None:
        self.schema = schema
        self.rows = 0
        self.by_status, self.by_class = Counter[str](), Counter[str]()
        self.flags, self.triage, self.abstain_reasons = Counter[str](), Counter[str](), Counter[str]()
        self.abstained = 0
        self.reasons: dict[str, dict[str, FailureReason]] = {}  # by status and error
        self.histograms = {name: np.zeros(BINS, np.int64) for name in schema.scores}
        self.disagreement: Counts | None = None  # [FINE_BINS], 0 to `max_disagreement`
        size = len(schema.classes)
        self.agreement = {
            pair: np.zeros((size, size), np.int64) for pair in itertools.combinations(schema.members, 2)
        }
        self.risk, self.abstaining = TopK(listed), TopK(listed)
        self.labelled = LabelledSample()
        self.names = ClassNames.of(schema.classes)

    @property
    def scored(self) -> int:
        return self.by_status[Status.OK.label]

    @property
    def max_disagreement(self) -> float:
        """Return the maximum of the members' Jensen-Shannon divergence, in bits."""
        return math.log2(max(2, len(self.schema.members)))

    def listed(self) -> list[dict[str, Any]]:
        """Return the rows of both lists, each once, the riskiest first."""
        rows = {row["row"]: row for top in (self.risk, self.abstaining) for row in top.rows()}
        return sorted(rows.values(), key=lambda row: -row[f"p_{self.schema.target}"])

    def add(self, table: pa.Table) -> None:
        """Add any number of rows, in order."""
        self.rows += table.num_rows
        status = _count_values(table, "status")
        self.by_status.update(status)
        self._add_flags(table)
        scored = table
        if status.keys() - {Status.OK.label}:
            ok = pc.equal(table.column("status"), pa.scalar(Status.OK.label))
            scored = table.filter(ok)
            self._add_failures(table.filter(pc.invert(ok)))
        truth = self._truth(table, scored)
        if not scored.num_rows:
            return
        votes = self._votes(scored)  # [n, V, C]
        self.by_class.update(_count_values(scored, "prediction"))
        for name, counts in self.histograms.items():
            counts += _histogram(_to_floats(scored, f"p_{name}"), BINS, 1.0)
        if "member_disagreement" in scored.column_names:
            counts = _histogram(_to_floats(scored, "member_disagreement"), FINE_BINS, self.max_disagreement)
            self.disagreement = counts if self.disagreement is None else self.disagreement + counts
        self._add_agreement(votes)
        self._add_to_lists(scored)
        if truth is not None:
            labelled = truth >= 0
            self.labelled.add(truth[labelled], votes[labelled])

    def _add_flags(self, table: pa.Table) -> None:
        if pa.types.is_list(table.schema.field("flags").type):
            self.flags.update(_count_list_words(table.column("flags")))

    def _add_failures(self, failed: pa.Table) -> None:
        for status in _count_values(failed, "status"):
            rows = failed.filter(pc.equal(failed.column("status"), pa.scalar(status)))
            reasons = self.reasons.setdefault(status, {})
            errors = rows.column("error")
            for error, count in _count_values(rows, "error").items():
                if error in reasons:
                    reasons[error].rows += count
                elif len(reasons) < MAX_REASONS:
                    first = pc.index(errors, error).as_py()
                    reasons[error] = FailureReason(
                        count, rows.column("row")[first].as_py(), rows.column(PATH_COLUMN)[first].as_py()
                    )

    def _votes(self, scored: pa.Table) -> Floats:
        voters = ["", *(f"{member}_" for member in self.schema.members)]
        columns = [_to_floats(scored, f"{voter}p_{name}") for voter in voters for name in self.schema.classes]
        return np.stack(columns, axis=1).reshape(scored.num_rows, len(voters), len(self.schema.classes))

    def _add_agreement(self, votes: Floats) -> None:
        winners = votes[:, 1:].argmax(axis=2)  # [n, M]
        size = len(self.schema.classes)
        for (first, second), counts in zip(
            itertools.combinations(range(len(self.schema.members)), 2), self.agreement.values(), strict=True
        ):
            cells = winners[:, first] * size + winners[:, second]
            counts += np.bincount(cells, minlength=size * size).reshape(size, size)

    def _add_to_lists(self, scored: pa.Table) -> None:
        scores = [f"p_{name}" for name in self.schema.scores]
        label = [self.schema.label] if self.schema.label else []
        listed = [
            name
            for name in scored.column_names
            if name in label
            or name in scores
            or (name in _LISTED_TYPES and _LISTED_TYPES[name](scored.schema.field(name).type))
        ]
        shown = scored.select(listed)
        risk = _to_floats(scored, f"p_{self.schema.target}")
        self.risk.add(shown, risk)
        if "triage" in listed:
            self.triage.update(_count_values(scored, "triage"))
        if "abstain" in listed:
            abstains = np.flatnonzero(scored.column("abstain").fill_null(pa.scalar(False)).to_numpy())
            self.abstained += len(abstains)
            if len(abstains):
                chosen = shown.take(abstains)
                self.abstaining.add(chosen, risk[abstains])
                if "abstain_reasons" in listed:
                    self.abstain_reasons.update(_count_list_words(chosen.column("abstain_reasons")))

    def _truth(self, table: pa.Table, scored: pa.Table) -> Counts | None:
        """Return the class [n] of each scored row's label, -1 for a label that is not a class."""
        label = self.schema.label
        if label is None or label not in table.column_names:
            return None
        words = _to_words(table.column(label))
        if words is None:
            return None
        classes = self._find_classes(words)
        self.labelled.labels += int((classes >= 0).sum())
        unknown = words.filter(pa.array(classes < 0)).drop_null()
        self.labelled.others += len(unknown)
        if len(unknown) and len(self.labelled.unknown) < MAX_REASONS:
            self.labelled.unknown.update(dict(_value_counts(unknown)[:MAX_REASONS]))
        return classes if scored is table else self._find_classes(cast(Any, _to_words(scored.column(label))))

    def _find_classes(self, words: Any) -> Counts:
        """Return the class [n] of each word, -1 for a word that is not a class."""
        encoded = words.dictionary_encode()
        classes = [
            -1 if word is None or (index := self.names.find(word)) is None else index
            for word in [*encoded.dictionary.to_pylist(), None]
        ]
        return cast(Counts, np.array(classes)[encoded.indices.fill_null(len(classes) - 1).to_numpy()])


def aggregate(
    results: ResultsFolder, schema: ReportSchema, *, listed: int, deadline: Deadline | None = None
) -> ReportTotals:
    """Read all rows once. Raises EngineError at `deadline` and for unreadable parts."""
    totals = ReportTotals(schema, listed=listed)
    try:
        for table in results.tables(schema.columns, words=schema.words):
            if deadline and deadline.reached():
                raise EngineError("stopped")
            totals.add(table)
    except (OSError, pa.ArrowException, KeyError) as error:
        why = error_text(error) if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise EngineError(f"results {results.place}: a part cannot be read: {why}") from None
    return totals


def _value_counts(column: Any) -> list[tuple[str, int]]:
    pairs = pc.value_counts(column).to_pylist()
    return [(pair["values"], pair["counts"]) for pair in pairs if pair["values"] is not None]


def _count_values(table: pa.Table, name: str) -> dict[str, int]:
    counts = Counter[str]()
    for word, count in _value_counts(table.column(name)):
        counts[word] += count  # a dictionary may contain a word twice
    return counts


def _count_list_words(lists: Any) -> dict[str, int]:
    return dict(_value_counts(pc.list_flatten(lists)))


def _to_words(column: Any) -> Any:
    """Cast to text; return None for a type that cannot be cast."""
    try:
        return column.cast(pa.string()).combine_chunks()
    except pa.ArrowException:
        return None


def _to_floats(table: pa.Table, name: str) -> Floats:
    return np.nan_to_num(table.column(name).to_numpy().astype(np.float32, copy=False))


def _histogram(values: Floats, bins: int, top: float) -> Counts:
    indices = (values * (bins / top)).astype(np.int64)
    return np.bincount(np.clip(indices, 0, bins - 1), minlength=bins)
