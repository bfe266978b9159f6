"""The console's numbers: curves, heat map and delays, from answers whose labels have come. Pure.

The baselines answer the same events at the same moments as the model did, from the labels that had arrived here by
then: *no change* says the last of them, *majority* the most frequent. So they are as late as the model's labels are.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from replay.history import Judged

WINDOW = 200
"""Answers that each point of a curve looks back on."""
FEWEST = 20
"""Answers before which a share says nothing."""
POINTS = 160
RECENT = 500
"""Answers that the headline's share is of, as in `trimtab_accuracy_ratio`."""
CLASSES = 60
VERSIONS = 30

Hits = npt.NDArray[np.float64]


def accuracy(judged: Sequence[Judged], frozen: Mapping[str, str | None]) -> dict[str, Any]:
    """Share right over time and of the latest, for what was served and for its rivals.

    Args:
        judged: in the order in which the labels arrived.
        frozen: by event id, what a frozen twin answered.

    Returns:
        `curve`: columns `t` (seconds since 1970), `served`, `frozen`, `no_change`, `majority`, each a share over
        `WINDOW` answers, or None; `now`: the same over the last `RECENT`, with `n`.
    """
    n = len(judged)
    no_change, majority = _baselines(judged)
    truth = [one.label for one in judged]
    hits = {
        "served": _hits(truth, [one.predicted for one in judged], range(n)),
        "frozen": _hits(truth, [frozen.get(one.event_id) for one in judged], _in(judged, frozen)),
        "no_change": _hits(truth, no_change, range(n)),
        "majority": _hits(truth, majority, range(n)),
    }
    at = np.unique(np.linspace(min(FEWEST, n), n, min(POINTS, n), dtype=np.int64)) if n >= FEWEST else np.zeros(0, int)
    curve: dict[str, list[float | None]] = {"t": [judged[k - 1].scored_at.timestamp() for k in at]}
    for name, series in hits.items():
        curve[name] = [_share(series, max(0, k - WINDOW), k) for k in at]
    now = {name: _share(series, max(0, n - RECENT), n) for name, series in hits.items()}
    return {"curve": curve, "now": {**now, "n": min(n, RECENT)}}


def heat(judged: Sequence[Judged], best: Mapping[str, float], budget: float) -> dict[str, Any]:
    """How often each class was recognised by each version, the most forgotten class first.

    Args:
        best: by class, its best recall so far.
        budget: how far below it a recall may fall.

    Returns:
        `versions`, oldest first; `classes`, each with `cells` ([right, total] or None by version), `now` (recall of its
        last `WINDOW` answers), `best`, `n`, and `forgotten`; `more`: classes left out.
    """
    cells: dict[str, dict[int, list[int]]] = defaultdict(dict)
    recent: dict[str, list[int]] = defaultdict(list)
    for one in judged:
        right = int(one.label == one.predicted)
        cell = cells[one.label].setdefault(_version(one.model_version), [0, 0])
        cell[0] += right
        cell[1] += 1
        recent[one.label].append(right)
    versions = sorted({version for row in cells.values() for version in row})[-VERSIONS:]
    rows = []
    for name, row in cells.items():
        last = recent[name][-WINDOW:]
        now, top = sum(last) / len(last), best.get(name)
        fallen = 0.0 if top is None else max(0.0, top - now)
        rows.append(
            {
                "class": name,
                "cells": [row.get(version) for version in versions],
                "now": now,
                "best": top,
                "n": len(recent[name]),
                "fallen": fallen,
                "forgotten": fallen > budget and len(last) >= 10,
            }
        )
    rows.sort(key=lambda row: (-row["forgotten"], -row["fallen"], -row["n"], row["class"]))  # type: ignore[operator]
    return {
        "budget": budget,
        "versions": [f"v{version}" for version in versions],
        "classes": rows[:CLASSES],
        "more": max(0, len(rows) - CLASSES),
        "forgotten": sum(bool(row["forgotten"]) for row in rows),
    }


def delays(judged: Sequence[Judged], points: int = 40) -> dict[str, Any]:
    """How long labels take, from the event's time to the label's, in seconds: median and 90 % over time and now."""
    pairs = [
        (one.scored_at.timestamp(), (one.labelled_at - one.observed_at).total_seconds())
        for one in judged
        if one.observed_at is not None
    ]
    curve: dict[str, list[float]] = {"t": [], "p50": [], "p90": []}
    for part in np.array_split(np.array(pairs), min(points, max(1, len(pairs) // FEWEST))) if pairs else ():
        curve["t"].append(float(part[-1, 0]))
        curve["p50"].append(float(np.quantile(part[:, 1], 0.5)))
        curve["p90"].append(float(np.quantile(part[:, 1], 0.9)))
    last = [seconds for _, seconds in pairs[-RECENT:]]
    now = {
        "p50": float(np.quantile(last, 0.5)) if last else None,
        "p90": float(np.quantile(last, 0.9)) if last else None,
    }
    return {"curve": curve, "now": now}


def thinned(row: Sequence[float | None], points: int) -> list[float | None]:
    """At most so many values of a series: of each stretch the lowest and the highest, in their order.

    So no peak is lost, however short. A stretch without any value stays a gap.

    Args:
        points: even.
    """
    if len(row) <= points:
        return list(row)
    kept: list[float | None] = []
    size = math.ceil(2 * len(row) / points)
    for start in range(0, len(row), size):
        there = [(value, at) for at, value in enumerate(row[start : start + size]) if value is not None]
        ends = sorted({min(there), max(there)}, key=lambda one: one[1]) if there else []
        kept.extend(value for value, _ in ends)
        if not ends:
            kept.append(None)
    return kept


def _baselines(judged: Sequence[Judged]) -> tuple[list[str | None], list[str | None]]:
    no_change: list[str | None] = [None] * len(judged)
    majority: list[str | None] = [None] * len(judged)
    counts: Counter[str] = Counter()
    leader: str | None = None
    arrived = 0
    # An answer whose time is not known any more is taken to have been made when its label arrived.
    asked = sorted(range(len(judged)), key=lambda i: judged[i].predicted_at or judged[i].scored_at)
    for i in asked:
        moment = judged[i].predicted_at or judged[i].scored_at
        while arrived < len(judged) and judged[arrived].scored_at < moment:
            label = judged[arrived].label
            counts[label] += 1
            if leader is None or counts[label] > counts[leader]:
                leader = label
            arrived += 1
        no_change[i] = judged[arrived - 1].label if arrived else None
        majority[i] = leader
    return no_change, majority


def _in(judged: Sequence[Judged], frozen: Mapping[str, str | None]) -> list[int]:
    return [i for i, one in enumerate(judged) if one.event_id in frozen]


def _hits(truth: Sequence[str], said: Sequence[str | None], asked: Sequence[int]) -> Hits:
    """Running sums, one row each: how many were asked, and how many of them were right."""
    sums = np.zeros((2, len(truth) + 1))
    for i in asked:
        sums[0, i + 1] = 1
        sums[1, i + 1] = truth[i] == said[i]
    return np.cumsum(sums, axis=1)


def _share(sums: Hits, start: int, end: int) -> float | None:
    asked, right = sums[:, end] - sums[:, start]
    return round(float(right / asked), 4) if asked >= FEWEST else None


def _version(revision: str) -> int:
    number = revision.removeprefix("v").partition(".")[0]
    return int(number) if number.isdecimal() else 0
