"""The cost benchmark must measure what it says it does, and be able to say that something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import learning_cost
from learner.heads import HeadSums


def test_the_store_is_measured_at_each_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flatness can only be read off if each size has its row and its ratio to the smallest."""
    monkeypatch.setattr(learning_cost, "STORES", (40, 80))
    monkeypatch.setattr(learning_cost, "ADDED", 20)
    monkeypatch.setattr(learning_cost, "BATCH", 20)
    file = tmp_path / "cost.json"
    assert learning_cost.main(["--only", "store", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["benchmark"] == "learning_cost"
    rows = {(row["mode"], row["metric"]): row["value"] for row in found["rows"]}
    for metric in ("microseconds_per_add", "microseconds_per_sample", "microseconds_per_member"):
        ratio = rows["80", metric] / rows["40", metric]
        assert rows["80", f"{metric}_ratio_to_40"] == pytest.approx(ratio)


def test_a_head_that_loses_digits_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that is nought whatever the head does would prove nothing."""
    monkeypatch.setattr(learning_cost, "MILLION", 4_000)
    assert learning_cost.error_after_million(8, 16) == 0.0
    exact = HeadSums.add

    def rounding(sums: HeadSums, q: np.ndarray, labels: list[str]) -> None:
        exact(sums, q, labels)
        sums._gram = sums._gram.astype(np.float32).astype(np.float64)

    monkeypatch.setattr(HeadSums, "add", rounding)
    assert learning_cost.error_after_million(8, 16) > 0.0


def test_both_contestants_train_the_same_number_of_samples() -> None:
    """A loop that replays less a batch than the fine-tune does would win by doing less."""
    batches = list(learning_cost._batches(range(40), range(100, 120), 16, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [32, 20, 24]
    assert sorted(row for batch in batches for row in batch if row < 100) == list(range(40))


def test_processor_time_is_of_the_stretch_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the data and embedding it come before the training that is compared."""
    wall, used = iter([1.0, 5.0, 9.0]), iter([0.5, 2.0, 5.0])
    monkeypatch.setattr(learning_cost.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(learning_cost.time, "process_time", lambda: next(used))
    readings = learning_cost.Readings()
    for _ in range(3):
        readings()
    assert readings.cpu(4.0) == 3.0


def test_invented_names_are_bounded_in_head_metrics_and_quarantine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A labeller that makes up a class for every label must not fill memory, and what it costs must be told."""
    monkeypatch.setattr(learning_cost, "DAYS", 8)
    rows = learning_cost.names(lambda line: None, 2_400)
    assert [row.mode for row in rows[::5]] == ["300 names", "1,200 names", "2,400 names"]
    found = {(row.mode, row.metric): row.value for row in rows}
    assert [found[mode, "classes"] for mode in ("300 names", "1,200 names", "2,400 names")] == [200, 800, 1_000]
    assert found["2,400 names", "waiting"] == 1_400
    assert found["2,400 names", "series"] == 21, "the largest classes, and the sum of all others"
    assert found["2,400 names", "bytes_kept"] < 2 * found["1,200 names", "bytes_kept"]
