"""A process's metrics are read back as they were counted."""

from __future__ import annotations

import math

import pytest

from monitoring.metrics import Metrics
from monitoring.scraped import Scraped, grown, quantile


def scrape(metrics: Metrics, *only: str) -> Scraped:
    return Scraped(metrics.render()[0].decode(), only)


def test_what_was_counted_is_read_back() -> None:
    """The console's rates and reasons are those of Prometheus, by the same names."""
    metrics = Metrics()
    metrics.predictions.labels("notes").inc(3)
    metrics.predictions.labels("pump").inc(4)
    metrics.dead_letters.labels("notes", "ragged").inc()
    metrics.consumer_lag.labels("reports").set(17)
    found = scrape(metrics, "predictions", "dead_letters", "consumer_lag")
    assert found.total("predictions") == 7
    assert found.total("predictions", stream="pump") == 4
    assert found.by("dead_letters", "reason", stream="notes") == {"ragged": 1}
    assert found.by("consumer_lag", "topic") == {"reports": 17}
    assert scrape(metrics, "predictions").total("consumer_lag") == 0, "what was not asked for is not parsed"


def test_quantiles_lie_in_their_buckets() -> None:
    """p99 is what an operator is woken by."""
    metrics = Metrics()
    metrics.prediction_latency.labels("notes").observe_many([0.02] * 98 + [2.0] * 2)
    buckets = scrape(metrics, "prediction_latency").buckets("prediction_latency")
    half, most = quantile(0.5, buckets), quantile(0.99, buckets)
    assert half is not None
    assert most is not None
    assert 0.01 < half <= 0.025
    assert 1.0 < most <= 2.5
    assert quantile(0.5, {}) is None
    assert quantile(0.99, {1.0: 0.0, math.inf: 5.0}) == 1.0


def test_a_process_that_was_started_anew_is_not_counted_backwards() -> None:
    """A restart sets every count to zero; a negative rate would be drawn."""
    assert grown({1.0: 5.0, math.inf: 9.0}, {1.0: 2.0, math.inf: 4.0}) == {1.0: 3.0, math.inf: 5.0}
    assert grown({1.0: 1.0, math.inf: 2.0}, {1.0: 2.0, math.inf: 4.0}) == {1.0: 1.0, math.inf: 2.0}


def test_what_is_no_exposition_is_refused() -> None:
    """Another server may answer on a worker's old port."""
    with pytest.raises(ValueError, match=r"."):
        Scraped("trimtab_predictions_total{stream=notes} three\n", ["predictions"])
