"""The numbers of a continual-learning benchmark, from what was answered and what was right. Pure.

Shares are given in percent, macro-F1 between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
"""(k, g): the share of group g's examples that was right after experience k; NaN where it was not asked."""

UNITS: Mapping[str, str] = {
    "final": "%",
    "average": "%",
    "forgetting": "points",
    "backward_transfer": "points",
    "worst_class": "%",
    "macro_f1": "0 to 1",
    "new_classes": "%",
    "old_change": "points",
    "seconds": "s",
    "peak_memory": "MiB",
}


def accuracy(truth: Sequence[str], answers: Sequence[str | None]) -> float:
    """The share of right answers in percent; no answer is a wrong one. NaN where nothing was asked."""
    if not truth:
        return math.nan
    return 100.0 * sum(a == t for a, t in zip(answers, truth, strict=True)) / len(truth)


def recalls(truth: Sequence[str], answers: Sequence[str | None]) -> dict[str, float]:
    """By class, the share of its examples that was answered right, in percent."""
    asked: dict[str, int] = {}
    right: dict[str, int] = {}
    for label, answer in zip(truth, answers, strict=True):
        asked[label] = asked.get(label, 0) + 1
        right[label] = right.get(label, 0) + (answer == label)
    return {label: 100.0 * right[label] / count for label, count in sorted(asked.items())}


def macro_f1(truth: Sequence[str], answers: Sequence[str | None]) -> float:
    """The mean over the classes in `truth` of each class's F1; a class that is only ever answered counts as none.

    An answer that is not a class in `truth` is a miss of the class it was asked of.
    """
    classes = sorted(set(truth))
    if not classes:
        return math.nan
    hits = dict.fromkeys(classes, 0)
    given = dict.fromkeys(classes, 0)
    asked = dict.fromkeys(classes, 0)
    for label, answer in zip(truth, answers, strict=True):
        asked[label] += 1
        if answer in given:
            given[answer] += 1
            hits[label] += answer == label
    return float(np.mean([2.0 * hits[name] / (asked[name] + given[name]) for name in classes]))


def forgetting(matrix: Matrix) -> float:
    """How far each group fell below its best, on average, in points.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", section 4: for every group but the one
    learned last, the best share after any earlier experience less the share after the last one. Negative where
    groups are better at the end than ever before.
    """
    falls = []
    for column in matrix.T:
        seen = np.flatnonzero(~np.isnan(column))
        if len(seen) > 1 and seen[-1] == len(column) - 1:
            falls.append(float(column[seen[:-1]].max() - column[-1]))
    return float(np.mean(falls)) if falls else math.nan


def backward_transfer(matrix: Matrix) -> float:
    """What later experiences did to a group, on average, in points: its share at the end less that at first.

    Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", equation 3.
    """
    changes = []
    for column in matrix.T:
        seen = np.flatnonzero(~np.isnan(column))
        if len(seen) > 1 and seen[-1] == len(column) - 1:
            changes.append(float(column[-1] - column[seen[0]]))
    return float(np.mean(changes)) if changes else math.nan


def by_class(parts: Sequence[tuple[Sequence[str], Sequence[str | None]]], minimum: int = 1) -> Matrix:
    """The matrix whose groups are classes, from each part's truth and answers.

    Args:
        parts: what was asked after (or during) each experience.
        minimum: a class with fewer examples in a part is not judged there.
    """
    names = sorted({label for truth, _ in parts for label in truth})
    matrix = np.full((len(parts), len(names)), math.nan)
    for row, (truth, answers) in enumerate(parts):
        found = recalls(truth, answers)
        counts = dict.fromkeys(found, 0)
        for label in truth:
            counts[label] += 1
        for column, name in enumerate(names):
            if counts.get(name, 0) >= minimum:
                matrix[row, column] = found[name]
    return matrix


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the sample standard deviation (n - 1); 0 for a single value. NaNs are left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, 0.0
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
