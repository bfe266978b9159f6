"""Every Prometheus metric, declared once.

Nothing else in trimtab names a metric: the code uses the attributes of `Metrics`, and a test holds the
alert rules and the dashboard to the names declared here. Units are base units and come last in the
name. A label may only take values from a bounded set, so that a scrape costs the same after a
thousand revisions and a thousand classes as on the first day:

- `stream`, `topic`, `stage`, `kind`, `cause`, `reason`, `outcome`, `action`, `message`: fixed by the
  settings or the code. An event of a stream that is not configured is counted as `UNKNOWN_STREAM`.
- `class`: only through `Metrics.set_bounded`.
- `version` of `revision_info`: only through `Metrics.serving`; elsewhere through `Metrics.answered` and
  `Metrics.scored_by`.
- `place`: what `Metrics.watch_disks` was told.

`python -m monitoring.reference` writes docs/metrics.md from what is declared here.
"""

from __future__ import annotations

import collections
import functools
import math
import shutil
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric

UNKNOWN_STREAM = "unknown"
"""The `stream` label of a message whose stream is not configured or could not be read."""

OTHER = "other"
"""The `class` label of all classes beyond the worst ones."""

VERSIONS_SHOWN = 10
"""How many versions of a stream keep series of their own: those that were used last."""

KINDS = ("input", "prediction", "error")
STAGES = ("decode", "predict", "produce", "commit")
CAUSES = ("labels", "timer", "drift", "forgetting", "gain", "hand")
LABEL_OUTCOMES = (
    "learned",
    "corrected",
    "withdrawn",
    "repeated",
    "waiting",
    "too_late",
    "correction_too_late",
    "forgotten",
    "forwarded",
    "quarantined",
    "disagreed",
    "superseded",
)
QUARANTINE_REASONS = ("class_quota", "labeller_untrusted", "label_burst")
REQUEST_OUTCOMES = ("asked", "answered", "alike", "known", "gone")
SCORED_OUTCOMES = ("right", "wrong")
REVISION_OUTCOMES = ("announced", "held")
VERSION_OUTCOMES = ("promoted", "refused", "rolled_back", "overruled", "failed")

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_STAGE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_AGE = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0, 604800.0)
_LABEL_DELAY = (
    1.0,
    10.0,
    60.0,
    300.0,
    900.0,
    3600.0,
    10800.0,
    21600.0,
    43200.0,
    86400.0,
    172800.0,
    604800.0,
    2592000.0,
)
_FINETUNE = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0)
_BATCH = tuple(float(2**power) for power in range(14))
_SHARE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


class BatchHistogram(Histogram):
    """A histogram that takes a batch of observations at once, at a tenth of the price of one at a time."""

    def observe_many(self, amounts: Sequence[float]) -> None:
        """Observe each of the amounts."""
        bounds = self._upper_bounds
        for bucket, count in collections.Counter(bisect_left(bounds, amount) for amount in amounts).items():
            self._buckets[bucket].inc(count)
        self._sum.inc(math.fsum(amounts))


class Metrics:
    """All metrics of one process, as attributes. Safe to use from any thread.

    Args:
        registry: where the metrics are registered; by default a new registry of their own, so that two
            instances in one interpreter do not meet. The standard process, platform and garbage
            collector metrics are added, unless this is the library's global registry, which has them.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._lock = threading.Lock()
        self._serving: dict[str, str] = {}
        self._classes: dict[tuple[int, str], set[str]] = {}
        self._versions: dict[tuple[int, str], dict[str, None]] = {}
        if self.registry is not REGISTRY:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        self._declare_worker()
        self._declare_learner()

    def _declare_worker(self) -> None:
        into = self.registry
        self.events = Counter("trimtab_events_total", "Events read from Kafka.", ["stream"], registry=into)
        self.predictions = Counter("trimtab_predictions_total", "Predictions written.", ["stream"], registry=into)
        self.version_predictions = Counter(
            "trimtab_version_predictions_total",
            "Predictions written, by the version that answered: those used last.",
            ["stream", "version"],
            registry=into,
        )
        self.dead_letters = Counter(
            "trimtab_dead_letters_total", "Messages parked in dead letters.", ["stream", "reason"], registry=into
        )
        self.unknown_fields = Counter(
            "trimtab_unknown_fields_total",
            "Messages with fields that this version ignores.",
            ["message"],
            registry=into,
        )
        self.prediction_latency = BatchHistogram(
            "trimtab_prediction_latency_seconds",
            "From the event's Kafka record time to its prediction.",
            ["stream"],
            buckets=_LATENCY,
            registry=into,
        )
        self.event_age = BatchHistogram(
            "trimtab_event_age_seconds",
            "From observed_at to the event's prediction.",
            ["stream"],
            buckets=_AGE,
            registry=into,
        )
        self.stage_seconds = Histogram(
            "trimtab_stage_seconds",
            "Time one batch spends in a stage of the worker.",
            ["stage"],
            buckets=_STAGE,
            registry=into,
        )
        self.batch_events = Histogram("trimtab_batch_events", "Events in a batch.", buckets=_BATCH, registry=into)
        self.consumer_lag = Gauge(
            "trimtab_consumer_lag_events", "Messages not yet read, over the partitions held.", ["topic"], registry=into
        )
        self.swaps = Counter("trimtab_swaps_total", "Revisions swapped in.", ["stream"], registry=into)
        self.refused_versions = Counter(
            "trimtab_refused_versions_total",
            "Announced revisions that were not taken.",
            ["stream", "reason"],
            registry=into,
        )
        self.revision_info = Gauge(
            "trimtab_revision_info", "1 for the revision in service.", ["stream", "version"], registry=into
        )
        self.revision_age = Gauge(
            "trimtab_serving_since_timestamp_seconds",
            "When the revision in service was swapped in.",
            ["stream"],
            registry=into,
        )
        self.novelty = BatchHistogram(
            "trimtab_novelty",
            "Novelty of the events: 0 is like what was learned, 1 is like nothing that was.",
            ["stream"],
            buckets=_SHARE,
            registry=into,
        )

    def _declare_learner(self) -> None:
        into = self.registry
        self.labels = Counter(
            "trimtab_labels_total", "Labels read, by what became of them.", ["stream", "outcome"], registry=into
        )
        self.repeated_events = Counter(
            "trimtab_repeated_events_total",
            "Predictions of an event id that was predicted before from another place in the log.",
            ["stream"],
            registry=into,
        )
        self.scored = Counter(
            "trimtab_scored_total",
            "Served predictions scored by their label (prequential).",
            ["stream", "outcome"],
            registry=into,
        )
        self.version_scored = Counter(
            "trimtab_version_scored_total",
            "Served predictions scored by their label, by the version that answered: those used last.",
            ["stream", "version", "outcome"],
            registry=into,
        )
        self.accuracy = Gauge(
            "trimtab_accuracy_ratio",
            "Share right among the last 500 served predictions that were scored.",
            ["stream"],
            registry=into,
        )
        self.accuracy_estimate = Gauge(
            "trimtab_accuracy_estimate_ratio",
            "Estimated accuracy of the last 500 predictions, whether or not they have labels yet.",
            ["stream"],
            registry=into,
        )
        self.accuracy_estimate_error = Gauge(
            "trimtab_accuracy_estimate_error_ratio",
            "Estimated less true accuracy of the 500 predictions labelled last.",
            ["stream"],
            registry=into,
        )
        self.label_delay = Histogram(
            "trimtab_label_delay_seconds",
            "From observed_at to labelled_at.",
            ["stream"],
            buckets=_LABEL_DELAY,
            registry=into,
        )
        self.replay_examples = Gauge(
            "trimtab_replay_examples",
            "Examples in the replay store: the largest classes, and the sum of all others.",
            ["stream", "class"],
            registry=into,
        )
        self.classes = Gauge("trimtab_classes", "Classes that the instant head knows.", ["stream"], registry=into)
        self.alike_classes = Gauge(
            "trimtab_alike_classes", "Pairs of class names that are nearly the same.", ["stream"], registry=into
        )
        self.quarantined = Gauge(
            "trimtab_quarantined_labels", "Labels that wait in quarantine.", ["stream", "reason"], registry=into
        )
        self.suspects = Gauge(
            "trimtab_suspect_labellers", "Labellers who are not believed unseen.", ["stream"], registry=into
        )
        self.label_requests = Counter(
            "trimtab_label_requests_total",
            "Events considered for a label request, by what became of them.",
            ["stream", "outcome"],
            registry=into,
        )
        self.label_requests_open = Gauge(
            "trimtab_open_label_requests", "Label requests that wait for their label.", ["stream"], registry=into
        )
        self.label_requests_left = Gauge(
            "trimtab_label_request_budget",
            "Label requests that the budget of 24 hours leaves.",
            ["stream"],
            registry=into,
        )
        self.revisions = Counter(
            "trimtab_revisions_total",
            "Revisions of the instant head, announced or held.",
            ["stream", "outcome"],
            registry=into,
        )
        self.versions = Counter(
            "trimtab_versions_total", "Versions, by what became of them.", ["stream", "outcome"], registry=into
        )
        self.finetune_seconds = Histogram(
            "trimtab_finetune_seconds", "Time a fine-tune took.", ["stream"], buckets=_FINETUNE, registry=into
        )
        self.finetune_running = Gauge(
            "trimtab_finetune_running", "1 while a fine-tune is running.", ["stream"], registry=into
        )
        self.finetune_progress = Gauge(
            "trimtab_finetune_progress_ratio", "How far the running fine-tune is.", ["stream"], registry=into
        )
        self.triggers = Counter(
            "trimtab_triggers_total", "Fine-tunes asked for, by cause.", ["stream", "cause"], registry=into
        )
        self.forgetting = Gauge(
            "trimtab_forgetting_ratio",
            "A class's best recall so far minus its recall now: the worst classes, and the mean of all others.",
            ["stream", "class"],
            registry=into,
        )
        self.forgetting_budget = Gauge(
            "trimtab_forgetting_budget_ratio",
            "How far a class's recall may fall below its best before someone is told.",
            ["stream"],
            registry=into,
        )
        self.drift_score = Gauge(
            "trimtab_drift_score",
            "How far the recent values are from what is usual; a drift is found at 4.",
            ["stream", "kind"],
            registry=into,
        )
        self.drift_state = Gauge(
            "trimtab_drift_state", "0 none, 1 warning, 2 drift.", ["stream", "kind"], registry=into
        )
        self.drifts = Counter("trimtab_drifts_total", "Drifts found.", ["stream", "kind"], registry=into)
        self.control = Counter(
            "trimtab_control_total", "Control messages and calls.", ["action", "outcome"], registry=into
        )
        self.leading = Gauge(
            "trimtab_learner_leading", "1 while this learner holds the trainer's lease.", registry=into
        )
        self.last_label = Gauge(
            "trimtab_last_label_timestamp_seconds", "When the last label was read.", ["stream"], registry=into
        )
        self.last_promotion = Gauge(
            "trimtab_last_promotion_timestamp_seconds", "When a version was last promoted.", ["stream"], registry=into
        )
        self.outbox = Gauge("trimtab_outbox_messages", "Messages in the outbox, not yet sent.", registry=into)
        self.join_index = Gauge(
            "trimtab_join_index_predictions", "Predictions in the join index, waiting for labels.", registry=into
        )
        self.disk_free = Gauge(
            "trimtab_disk_free_bytes",
            "Free on the disk that holds a place the process writes.",
            ["place"],
            registry=into,
        )
        self.disk_size = Gauge(
            "trimtab_disk_size_bytes",
            "Size of the disk that holds a place the process writes.",
            ["place"],
            registry=into,
        )
        self.build_info = Gauge(
            "trimtab_build_info", "1, with the release and the process's part.", ["version", "process"], registry=into
        )

    def open_worker(self, streams: Iterable[str], *, release: str, reasons: Iterable[str] = ()) -> None:
        """Create the worker's series at zero, so that the first increment of each is an increase.

        Prometheus cannot see a counter rise that it first meets at 1: without this the first dead
        letter of a reason would alert nobody.

        Args:
            streams: the names of the configured streams.
            release: the version of trimtab.
            reasons: every reason for a dead letter.
        """
        self.build_info.labels(release, "worker").set(1)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        reasons = tuple(reasons)
        for stream in (*streams, UNKNOWN_STREAM):
            for reason in reasons:
                self.dead_letters.labels(stream, reason)
            if stream == UNKNOWN_STREAM:
                continue
            for counter in (self.events, self.predictions, self.swaps):
                counter.labels(stream)
            for histogram in (self.prediction_latency, self.event_age, self.novelty):
                histogram.labels(stream)

    def open_learner(self, streams: Iterable[str], *, release: str, reasons: Iterable[str] = ()) -> None:
        """Create the learner's series at zero; see `open_worker`.

        What only a measurement can say (accuracy, forgetting, the last label) is left out until there is one.
        """
        self.build_info.labels(release, "learner").set(1)
        reasons = tuple(reasons)
        for stream in (*streams, UNKNOWN_STREAM):
            for reason in reasons:
                self.dead_letters.labels(stream, reason)
            if stream == UNKNOWN_STREAM:
                continue
            for counter, values in (
                (self.labels, LABEL_OUTCOMES),
                (self.label_requests, REQUEST_OUTCOMES),
                (self.scored, SCORED_OUTCOMES),
                (self.revisions, REVISION_OUTCOMES),
                (self.versions, VERSION_OUTCOMES),
                (self.triggers, CAUSES),
                (self.drifts, KINDS),
            ):
                for value in values:
                    counter.labels(stream, value)
            for kind in KINDS:
                self.drift_score.labels(stream, kind)
                self.drift_state.labels(stream, kind)
            self.repeated_events.labels(stream)
            for gauge in (
                self.classes,
                self.finetune_running,
                self.finetune_progress,
                self.suspects,
                self.alike_classes,
                self.label_requests_open,
                self.label_requests_left,
            ):
                gauge.labels(stream)
            for reason in QUARANTINE_REASONS:
                self.quarantined.labels(stream, reason)
            for histogram in (self.label_delay, self.finetune_seconds):
                histogram.labels(stream)

    def serving(self, stream: str, version: str, since: float | None = None) -> None:
        """Say which revision a stream is answered by; the previous revision's series is dropped.

        Args:
            stream: the stream.
            version: the revision's name, such as `v12.3456`.
            since: when it was swapped in, in seconds since 1970; None leaves that gauge as it is.
        """
        with self._lock:
            before = self._serving.get(stream)
            if before is not None and before != version:
                self.revision_info.remove(stream, before)
            self._serving[stream] = version
            self.revision_info.labels(stream, version).set(1)
            if since is not None:
                self.revision_age.labels(stream).set(since)

    def answered(self, stream: str, revision: str, count: int) -> None:
        """Count predictions under the version of the revision that made them.

        With a count of 0 the series is made ready, so that its first increment is seen as one.
        """
        version = self._use(self.version_predictions, stream, revision, ((),))
        self.version_predictions.labels(stream, version).inc(count)

    def scored_by(self, stream: str, revision: str, outcome: str, count: int) -> None:
        """Count scored predictions under the version of the revision that made them; see `answered`.

        Args:
            outcome: one of `SCORED_OUTCOMES`.
        """
        version = self._use(self.version_scored, stream, revision, tuple((each,) for each in SCORED_OUTCOMES))
        self.version_scored.labels(stream, version, outcome).inc(count)

    def _use(self, counter: Counter, stream: str, revision: str, endings: tuple[tuple[str, ...], ...]) -> str:
        """The version of a revision, as the one used last; the one used longest ago loses its series beyond the limit.

        A version that comes back begins again at 0, which Prometheus takes for a restart.
        """
        version = revision.partition(".")[0]
        with self._lock:
            used = self._versions.setdefault((id(counter), stream), {})
            known = version in used
            used.pop(version, None)
            used[version] = None
            if not known:
                for ending in endings:
                    counter.labels(stream, version, *ending)
            if len(used) > VERSIONS_SHOWN:
                oldest = next(iter(used))
                del used[oldest]
                for ending in endings:
                    counter.remove(stream, oldest, *ending)
        return version

    def watch_disks(self, places: Mapping[str, Path]) -> None:
        """Expose how full the disks are, looked at with each scrape; NaN for one that cannot be seen.

        Args:
            places: by name, a folder or file that the process writes; it need not be there yet.
        """
        for place, path in places.items():
            self.disk_free.labels(place).set_function(functools.partial(_disk, path, 2))
            self.disk_size.labels(place).set_function(functools.partial(_disk, path, 0))

    def set_bounded(self, gauge: Gauge, stream: str, values: Mapping[str, float], worst: int = 20) -> None:
        """Set a gauge of (stream, class) for the `worst` greatest values and one `other` for the rest.

        `other` is the sum of the rest for `replay_examples` and their mean otherwise, and is there only
        when there is a rest. Classes that left the worst, or the stream, lose their series. Ties go to
        the name that sorts first; values that are not numbers are left out.

        Args:
            gauge: `forgetting` or `replay_examples`.
            stream: the stream.
            values: one number a class.
            worst: how many classes keep a series of their own.
        """
        known = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        ranked = sorted(known, key=lambda name: (-known[name], name))
        # A class may truly be called "other"; it must not be taken for the rest.
        shown = {f"{name} (class)" if name == OTHER else name: known[name] for name in ranked[:worst]}
        rest = [known[name] for name in ranked[worst:]]
        if rest:
            shown[OTHER] = math.fsum(rest) / (1 if gauge is self.replay_examples else len(rest))
        with self._lock:
            for left in self._classes.get((id(gauge), stream), set()) - shown.keys():
                gauge.remove(stream, left)
            self._classes[id(gauge), stream] = set(shown)
            for name, value in shown.items():
                gauge.labels(stream, name).set(value)

    def render(self) -> tuple[bytes, str]:
        """The text exposition of all metrics, and its content type."""
        return generate_latest(_WithoutCreated(self.registry)), CONTENT_TYPE_PLAIN_0_0_4


def _disk(path: Path, which: int) -> float:
    """One number of the disk's (size, used, free), by the nearest folder that is there."""
    there = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    try:
        return float(shutil.disk_usage(there)[which])
    except OSError:
        return math.nan


class _WithoutCreated:
    """A registry less the `_created` samples, which would double every counter for a date nobody reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            kept = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            kept.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield kept
