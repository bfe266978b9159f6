"""Metrics: declared once, bounded in number, rendered so that Prometheus reads them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from monitoring.metrics import UNKNOWN_STREAM, VERSIONS_SHOWN, Metrics


def series(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """What a scrape would read of one metric: labels to value."""
    text = metrics.render()[0].decode()
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def classes(metrics: Metrics, name: str, stream: str) -> dict[str, float]:
    """Class to value of one stream."""
    return {
        dict(labels)["class"]: value for labels, value in series(metrics, name).items() if ("stream", stream) in labels
    }


def test_two_instances_in_one_interpreter_do_not_meet() -> None:
    """Tests and tools make several; with a shared registry the second would raise, or count for the first."""
    one, two = Metrics(), Metrics()
    one.events.labels("a").inc()
    assert series(one, "trimtab_events_total")
    assert not series(two, "trimtab_events_total")


def test_a_given_registry_is_used_and_the_global_one_left_alone() -> None:
    """An application with a registry of its own must find our metrics there, and nowhere else."""
    registry = CollectorRegistry()
    Metrics(registry).outbox.set(3)
    assert registry.get_sample_value("trimtab_outbox_messages") == 3
    assert REGISTRY.get_sample_value("trimtab_outbox_messages") is None


def test_process_and_platform_are_exposed_too() -> None:
    """Memory that grows at each swap is seen by the process's own metrics."""
    text = Metrics().render()[0].decode()
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"):
        assert f"\n{name}" in text


def test_names_follow_the_rules() -> None:
    """One prefix and base units last: a query can be guessed, and no graph is a thousand times off."""
    declared = [value for value in vars(Metrics()).values() if isinstance(value, MetricWrapperBase)]
    assert declared
    for metric in declared:
        family = next(iter(metric.describe()))
        assert family.name.startswith("trimtab_")
        assert not family.name.endswith(("_ms", "_millis", "_percent", "_count", "_sum")), family.name
        assert family.documentation.endswith("."), family.name


def test_a_scrape_has_no_created_series() -> None:
    """They would double the cost of every counter in Prometheus for dates that nobody reads."""
    metrics = Metrics()
    metrics.events.labels("a").inc()
    body, kind = metrics.render()
    assert b"_created" not in body
    assert kind.startswith("text/plain; version=0.0.4")


def test_counters_are_there_before_their_first_increment() -> None:
    """Prometheus sees no increase in a counter that it first meets at 1: the first dead letter would alert nobody."""
    metrics = Metrics()
    metrics.open_worker(["a"], release="0.1.0", reasons=["ragged"])
    metrics.open_learner(["a"], release="0.1.0", reasons=["ragged"])
    assert series(metrics, "trimtab_dead_letters_total") == {
        (("reason", "ragged"), ("stream", "a")): 0,
        (("reason", "ragged"), ("stream", UNKNOWN_STREAM)): 0,
    }
    assert series(metrics, "trimtab_versions_total")[(("outcome", "failed"), ("stream", "a"))] == 0
    assert series(metrics, "trimtab_prediction_latency_seconds_count")[(("stream", "a"),)] == 0
    assert not series(metrics, "trimtab_accuracy_ratio"), "an accuracy of 0 that nobody measured would alert"


@given(st.lists(st.floats(0, 1000, allow_subnormal=False), max_size=50))
def test_observing_a_batch_is_observing_each(amounts: list[float]) -> None:
    """The hot path counts whole batches; dashboards and alerts must read the same numbers."""
    one, batch = Metrics(), Metrics()
    one.prediction_latency.labels("a")
    for amount in amounts:
        one.prediction_latency.labels("a").observe(amount)
    batch.prediction_latency.labels("a").observe_many(amounts)
    name = "trimtab_prediction_latency_seconds"
    assert series(one, f"{name}_bucket") == series(batch, f"{name}_bucket")
    assert series(one, f"{name}_sum") == pytest.approx(series(batch, f"{name}_sum"))


def test_a_thousand_revisions_leave_one_series() -> None:
    """A label that takes every revision's name would fill Prometheus in a day of half-second revisions."""
    metrics = Metrics()
    for revision in range(1000):
        metrics.serving("a", f"v1.{revision}", since=float(revision))
        metrics.serving("b", "v1.0")
    assert series(metrics, "trimtab_revision_info") == {
        (("stream", "a"), ("version", "v1.999")): 1,
        (("stream", "b"), ("version", "v1.0")): 1,
    }
    assert series(metrics, "trimtab_serving_since_timestamp_seconds") == {(("stream", "a"),): 999.0}


def test_the_versions_used_last_are_counted_and_the_others_let_go() -> None:
    """A label that keeps every version would fill Prometheus; one that a rollback brings back must be seen again."""
    metrics = Metrics()
    for number in range(1, 13):
        metrics.answered("a", f"v{number}.7", number)
        metrics.scored_by("a", f"v{number}.8", "wrong", 1)
    kept = {f"v{number}" for number in range(3, 13)}
    assert len(kept) == VERSIONS_SHOWN
    assert {dict(labels)["version"] for labels in series(metrics, "trimtab_version_predictions_total")} == kept
    metrics.answered("a", "v3.9", 5)
    metrics.answered("a", "v13.0", 0)
    shown = series(metrics, "trimtab_version_predictions_total")
    assert shown[(("stream", "a"), ("version", "v3"))] == 8
    assert (("stream", "a"), ("version", "v4")) not in shown
    assert shown[(("stream", "a"), ("version", "v13"))] == 0, "its first prediction would not be seen as an increase"
    scored = series(metrics, "trimtab_version_scored_total")
    assert scored[(("outcome", "right"), ("stream", "a"), ("version", "v12"))] == 0
    assert len(scored) == 2 * VERSIONS_SHOWN


def test_a_thousand_classes_and_ten_thousand_versions_cost_no_more_than_a_few() -> None:
    """What a scrape costs is decided by the settings, not by how long the process has run or what users name."""

    def run(classes: int, versions: int) -> Metrics:
        metrics = Metrics()
        metrics.open_worker(["a"], release="0.1.0", reasons=["ragged"])
        metrics.open_learner(["a"], release="0.1.0", reasons=["ragged"])
        values = {f"class {number}": number / classes for number in range(classes)}
        for gauge in (metrics.forgetting, metrics.replay_examples):
            metrics.set_bounded(gauge, "a", values)
        for number in range(versions):
            metrics.serving("a", f"v{number}.0", since=float(number))
            metrics.answered("a", f"v{number}.0", 1)
            metrics.scored_by("a", f"v{number}.0", "right", 1)
        return metrics

    def size(metrics: Metrics) -> int:
        return sum(line.startswith("trimtab_") for line in metrics.render()[0].decode().splitlines())

    assert size(run(1_000, 10_000)) == size(run(21, VERSIONS_SHOWN)) < 400


def test_disks_are_looked_at_with_each_scrape(tmp_path: Path) -> None:
    """A disk that fills between two steps of the learner must still be seen; a folder yet to be made has a disk too."""
    metrics = Metrics()
    metrics.watch_disks({"jobs": tmp_path / "not" / "yet", "database": tmp_path})
    free, size = (series(metrics, f"trimtab_disk_{name}_bytes") for name in ("free", "size"))
    assert set(free) == set(size) == {(("place", "jobs"),), (("place", "database"),)}
    assert size[(("place", "jobs"),)] == shutil.disk_usage(tmp_path).total
    assert all(0 <= value <= size[place] for place, value in free.items())


def test_the_worst_classes_are_named_and_the_rest_averaged() -> None:
    """The dashboard must name what is forgotten most, at a cost that does not grow with the classes."""
    metrics = Metrics()
    metrics.set_bounded(metrics.forgetting, "a", {"x": 0.5, "y": 0.3, "z": 0.2, "w": 0.0}, worst=2)
    metrics.set_bounded(metrics.replay_examples, "a", {"x": 5, "y": 30, "z": 20, "w": 1}, worst=2)
    assert classes(metrics, "trimtab_forgetting_ratio", "a") == {"x": 0.5, "y": 0.3, "other": pytest.approx(0.1)}
    assert classes(metrics, "trimtab_replay_examples", "a") == {"y": 30, "z": 20, "other": 6}


def test_a_class_that_left_loses_its_series() -> None:
    """A stale series would alert for a class that was withdrawn, until the process ends."""
    metrics = Metrics()
    metrics.set_bounded(metrics.forgetting, "a", {"x": 0.5, "y": 0.3, "z": 0.2}, worst=2)
    metrics.set_bounded(metrics.forgetting, "b", {"x": 0.4})
    metrics.set_bounded(metrics.forgetting, "a", {"y": 0.3})
    assert classes(metrics, "trimtab_forgetting_ratio", "a") == {"y": 0.3}
    assert classes(metrics, "trimtab_forgetting_ratio", "b") == {"x": 0.4}


def test_a_class_called_other_is_not_the_rest() -> None:
    """Class names come from users; one of them would otherwise be shown as the mean of many."""
    metrics = Metrics()
    metrics.set_bounded(metrics.forgetting, "a", {"other": 0.9, "x": 0.1}, worst=1)
    assert classes(metrics, "trimtab_forgetting_ratio", "a") == {"other (class)": 0.9, "other": 0.1}


def test_any_class_name_can_be_scraped() -> None:
    """Names with quotes, line ends or other alphabets must not break the whole scrape."""
    metrics = Metrics()
    names = {'say "hi"': 0.3, "a\\b": 0.2, "zwei\nZeilen": 0.1, "магнитная буря": 0.05}
    metrics.set_bounded(metrics.forgetting, "a", names)
    assert classes(metrics, "trimtab_forgetting_ratio", "a") == names


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.text("abcdefgh", min_size=1, max_size=2), st.floats(0, 1) | st.just(float("nan")), max_size=40
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 5),
)
def test_what_is_shown_depends_on_the_last_values_only(history: list[dict[str, float]], worst: int) -> None:
    """However classes came and went before, a scrape shows the present, and never more than worst + 1 series."""
    metrics, fresh = Metrics(), Metrics()
    for values in history:
        metrics.set_bounded(metrics.forgetting, "a", values, worst=worst)
    fresh.set_bounded(fresh.forgetting, "a", dict(reversed(history[-1].items())), worst=worst)
    shown = classes(metrics, "trimtab_forgetting_ratio", "a")
    assert shown == classes(fresh, "trimtab_forgetting_ratio", "a")
    assert len(shown) <= worst + 1


def test_threads_may_swap_and_scrape_at_once() -> None:
    """The swap happens in one thread and the scrape in another; neither may raise or leave two revisions."""
    metrics = Metrics()
    failed: list[Exception] = []

    def swap(start: int) -> None:
        try:
            for revision in range(start, start + 200):
                metrics.serving("a", f"v1.{revision}")
                metrics.set_bounded(metrics.forgetting, "a", {f"c{revision}": 0.1})
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=swap, args=(1000 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        metrics.render()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(series(metrics, "trimtab_revision_info")) == 1
    assert len(classes(metrics, "trimtab_forgetting_ratio", "a")) == 1


def test_latency_has_a_bucket_at_each_alert_threshold_or_beside_it() -> None:
    """A threshold far from a bucket's edge is a guess: the p99 alert stands at 2 s, between 1 and 2.5."""
    metrics = Metrics()
    metrics.prediction_latency.labels("a").observe(0.2)
    edges = {dict(labels)["le"] for labels in series(metrics, "trimtab_prediction_latency_seconds_bucket")}
    assert {"0.001", "1.0", "2.5", "60.0", "+Inf"} <= edges
