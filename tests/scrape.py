"""What a process exposes on `/metrics`, read back as numbers."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """The samples of one scrape of the process on `port` of this machine."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            self._samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that carry these labels; 0 where there is none."""
        return sum(value for _, value in self._chosen(name, labels))

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The samples of this name, those that are not 0, by the values of one label."""
        found: dict[str, float] = {}
        for its, value in self._chosen(name, labels):
            if value:
                found[its[label]] = found.get(its[label], 0.0) + value
        return found

    def names(self) -> set[str]:
        """Every sample's name."""
        return {sample.name for sample in self._samples}

    def _chosen(self, name: str, labels: dict[str, str]) -> Iterator[tuple[dict[str, str], float]]:
        for sample in self._samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample.labels, sample.value
