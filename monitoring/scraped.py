"""What another process of trimtab exposes on `/metrics`, by the names that `Metrics` has for it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from functools import cache

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from monitoring.metrics import Metrics

Buckets = Mapping[float, float]
"""By upper bound, how many observations were at most that; as Prometheus has it."""


class Scraped:
    """The samples of one scrape.

    Args:
        text: the exposition of a process.
        only: attributes of `Metrics` that are asked for; the lines of all others are not parsed, which is most of them.

    Raises:
        ValueError: it is no exposition.
    """

    def __init__(self, text: str, only: Collection[str]) -> None:
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        wanted = tuple(_names()[attribute] for attribute in only)
        lines = [line for line in text.splitlines() if line.startswith(wanted)]
        for family in text_string_to_metric_families("\n".join([*lines, ""])):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def total(self, metric: str, **labels: str) -> float:
        """The sum of a counter or a gauge over the samples with these labels.

        Args:
            metric: an attribute of `Metrics`, such as `predictions`.
        """
        return math.fsum(value for its, value in self._of(metric, ("", "_total")) if labels.items() <= its.items())

    def by(self, metric: str, label: str, **labels: str) -> dict[str, float]:
        """The same, by the values of one label."""
        found: dict[str, float] = defaultdict(float)
        for its, value in self._of(metric, ("", "_total")):
            if labels.items() <= its.items():
                found[its.get(label, "")] += value
        return dict(found)

    def buckets(self, metric: str, **labels: str) -> dict[float, float]:
        """A histogram, over the samples with these labels."""
        found: dict[float, float] = defaultdict(float)
        for its, value in self._of(metric, ("_bucket",)):
            if labels.items() <= its.items():
                found[float(its["le"])] += value
        return dict(found)

    def _of(self, metric: str, ends: tuple[str, ...]) -> list[tuple[Mapping[str, str], float]]:
        name = _names()[metric]
        return [sample for end in ends for sample in self._samples.get(name + end, ())]


def quantile(share: float, buckets: Buckets) -> float | None:
    """The value below which `share` of the observations lie, straight within a bucket; None where there are none.

    Prometheus' `histogram_quantile`: beyond the last finite bound that bound is the answer.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    wanted, below, low = share * total, 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= wanted:
            if math.isinf(bound):
                return low
            inside = buckets[bound] - below
            return low + (bound - low) * ((wanted - below) / inside if inside else 1.0)
        below, low = buckets[bound], bound
    return low


def grown(now: Buckets, before: Buckets) -> dict[float, float]:
    """What a histogram observed between two scrapes; all of it where its process was started anew meanwhile."""
    if any(now.get(bound, 0.0) < count for bound, count in before.items()):
        return dict(now)
    return {bound: count - before.get(bound, 0.0) for bound, count in now.items()}


@cache
def _names() -> dict[str, str]:
    """By attribute of `Metrics`, the name without its ending that the exposition has."""
    declared = vars(Metrics(CollectorRegistry()))
    return {
        attribute: next(iter(metric.collect())).name
        for attribute, metric in declared.items()
        if isinstance(metric, MetricWrapperBase)
    }
