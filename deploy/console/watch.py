"""What only passes by, kept for the console: rates and latencies over time, alarms, and the ends of some topics.

One thread looks every two seconds. All of it is bounded, and all of it is gone when the learner ends: what must last is
in the learner's database, and the console says which is which.
"""

from __future__ import annotations

import logging
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Gauge
from pydantic import ValidationError

from deploy.messages import Letter, letter
from learner.app import Parts
from learner.control import ControlAnswer
from monitoring.drift import Kind
from monitoring.metrics import Metrics
from monitoring.scraped import Scraped, grown, quantile
from replay.history import History
from stream.batches import TopicTail
from stream.errors import TrimtabError
from stream.events import Prediction, Record

logger = logging.getLogger(__name__)

EVERY_SECONDS = 2.0
POINTS = 600
KEPT_LETTERS = 500
KEPT_ANSWERS = 200
KEPT_TWIN = 50_000
KEPT_ALARMS = 200
SCRAPE_SECONDS = 1.0
MOST_SCRAPED = 8 * 2**20
RETRY_SECONDS = 15.0
DRIFT_KINDS: tuple[Kind, ...] = ("input", "prediction", "error")
SCRAPED = ("predictions", "prediction_latency", "consumer_lag", "dead_letters", "revision_info")


class Ring:
    """Points of equal spacing over a whole life in bounded memory.

    When it is full every second point goes, and from then on only every second sample is taken.

    Args:
        names: of the columns.
        size: most points; even.
    """

    def __init__(self, names: Sequence[str], size: int = POINTS) -> None:
        self._names, self._size = tuple(names), size
        self._times: list[float] = []
        self._columns: dict[str, list[float | None]] = {name: [] for name in names}
        self._every, self._skipped = 1, 0

    def add(self, at: float, values: Mapping[str, float | None]) -> None:
        """Take a sample; columns without a value have a gap.

        Args:
            at: seconds since 1970.
        """
        self._skipped += 1
        if self._skipped < self._every:
            return
        self._skipped = 0
        self._times.append(at)
        for name in self._names:
            self._columns[name].append(values.get(name))
        if len(self._times) >= self._size:
            self._every *= 2
            self._times = self._times[1::2]
            self._columns = {name: column[1::2] for name, column in self._columns.items()}

    def columns(self) -> dict[str, list[float | None]]:
        """The columns, with `t`."""
        return {"t": list(self._times), **{name: list(column) for name, column in self._columns.items()}}


@dataclass
class Neighbour:
    """A worker as it was last seen.

    Args:
        url: its address.
        at: when it last answered, in seconds since 1970; None if it never did.
        why: why it does not answer; None while it does.
        lag: by topic.
        dead_letters: by stream and reason, since it was started.
        buckets: latencies between the last two looks.
        whole: latencies since it was started.
    """

    url: str
    at: float | None = None
    why: str | None = None
    serving: dict[str, str] = field(default_factory=dict)
    lag: dict[str, float] = field(default_factory=dict)
    dead_letters: dict[str, dict[str, int]] = field(default_factory=dict)
    rate: float | None = None
    p50: float | None = None
    p99: float | None = None
    buckets: dict[float, float] = field(default_factory=dict)
    whole: dict[float, float] = field(default_factory=dict)
    predictions: float = 0.0


@dataclass(frozen=True)
class Alarm:
    """Something that happened at a moment, for the time axes."""

    at: float
    kind: str
    says: str


class Watcher:
    """Keeps what passes by. `start` and `stop` are called once each; everything else is safe on any thread.

    Args:
        parts: the learner's parts, or None as long as there are none.
        connection: librdkafka connection properties.
        topics: whole names by what they hold: `dead_letters`, `audit`, and `twin` where there is a frozen twin.
        predictions: whole name of the topic that the learner joins.
        workers: addresses of workers whose `/metrics` are read.
        streams: their names.
        metrics: the learner's.
    """

    def __init__(
        self,
        parts: Callable[[], Parts | None],
        connection: Mapping[str, Any],
        topics: Mapping[str, str],
        predictions: str,
        workers: Sequence[str],
        streams: Sequence[str],
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._parts, self._connection, self._topics = parts, dict(connection), dict(topics)
        self._predictions_topic = predictions
        self._thread = threading.Thread(target=self._loop, name="console", daemon=True)
        self._ending = threading.Event()
        self.lock = threading.Lock()
        self.workers = {url: Neighbour(url) for url in workers}
        self.pace = Ring(["rate", "p50", "p99", "worker_lag", "joined", "learner_lag"])
        self.moving = {name: Ring([*DRIFT_KINDS, "estimate"]) for name in streams}
        self.alarms: dict[str, deque[Alarm]] = {name: deque(maxlen=KEPT_ALARMS) for name in streams}
        self.letters: deque[Letter] = deque(maxlen=KEPT_LETTERS)
        self.answers: deque[ControlAnswer] = deque(maxlen=KEPT_ANSWERS)
        self.twin: dict[str, OrderedDict[str, str | None]] = {name: OrderedDict() for name in streams}
        self.newest: dict[str, float] = {}
        self.troubles: dict[str, str] = {}
        self._tails: dict[str, TopicTail] = {}
        self._retry_at: dict[str, float] = {}
        self._drifts: dict[tuple[str, str], int] = {}
        self._joined: tuple[float, int] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def _loop(self) -> None:
        try:
            while not self._ending.is_set():
                began = time.monotonic()
                try:
                    self.look(time.time())
                except TrimtabError as error:
                    logger.warning("the console could not look: %s", error)
                except Exception:
                    # It only watches: the learner goes on without it.
                    logger.exception("the console could not look")
                self._ending.wait(max(0.1, EVERY_SECONDS - (time.monotonic() - began)))
        finally:
            for tail in self._tails.values():
                tail.close()

    def look(self, now: float) -> None:
        """One look at everything."""
        for what in self._topics:
            self._follow(what, now)
        scraped = {url: _scrape(url) for url in self.workers}
        with self.lock:
            for url, found in scraped.items():
                _note(self.workers[url], found, now)
        parts = self._parts()
        if parts is not None:
            self._look_at(parts, now)

    def _look_at(self, parts: Parts, now: float) -> None:
        newest = History(parts.store).newest()
        read = sum(after for (topic, _), after in parts.store.offsets().items() if topic == self._predictions_topic)
        before, self._joined = self._joined, (now, read)
        joined = max(0, read - before[1]) / (now - before[0]) if before and now > before[0] else None
        with self.lock:
            self.newest.update({stream: at.timestamp() for stream, at in newest.items()})
            for stream, monitor in parts.drift.items():
                scores: dict[str, float | None] = {kind: monitor.score(kind) for kind in DRIFT_KINDS}
                self.moving[stream].add(now, {**scores, "estimate": gauge(self._metrics.accuracy_estimate, stream)})
                for kind in DRIFT_KINDS:
                    found = monitor.drifts(kind)
                    if found > self._drifts.get((stream, kind), 0):
                        self.alarms[stream].append(Alarm(now, "alarm", f"drift of the {kind}s"))
                    self._drifts[stream, kind] = found
            there = [one for one in self.workers.values() if one.why is None and one.at is not None]
            together: dict[float, float] = {}
            for one in there:
                for bound, count in one.buckets.items():
                    together[bound] = together.get(bound, 0.0) + count
            rates = [one.rate for one in there if one.rate is not None]
            lag = parts.reader.lag()
            self.pace.add(
                now,
                {
                    "rate": sum(rates) if rates else None,
                    "p50": quantile(0.5, together),
                    "p99": quantile(0.99, together),
                    "worker_lag": sum(sum(one.lag.values()) for one in there) if there else None,
                    "joined": joined,
                    "learner_lag": sum(lag.values()) if lag else None,
                },
            )

    # Topics

    def _follow(self, what: str, now: float) -> None:
        """Take what came onto a topic; one that cannot be read is tried again later, and said."""
        if self._retry_at.get(what, 0.0) > now:
            return
        try:
            tail = self._tails.get(what)
            if tail is None:
                tail = TopicTail(self._connection, self._topics[what])
                try:
                    tail.begin(KEPT_TWIN if what == "twin" else KEPT_LETTERS)
                except TrimtabError:
                    tail.close()
                    raise
                self._tails[what] = tail
            for _ in range(20):
                records = tail.poll(0.02)
                with self.lock:
                    for record in records:
                        self._take(what, record)
                if not records or self._ending.is_set():
                    break
            self.troubles.pop(what, None)
        except TrimtabError as error:
            self.troubles[what] = str(error)
            self._retry_at[what] = now + RETRY_SECONDS

    def _take(self, what: str, record: Record) -> None:
        try:
            if what == "dead_letters":
                # Its bytes stay where they are, and are read when someone wants to see them.
                one = letter(record)
                self.letters.append(without_bytes(one))
            elif what == "audit":
                self.answers.append(ControlAnswer.model_validate_json(record.value or b""))
            else:
                answer = Prediction.model_validate_json(record.value or b"")
                kept = self.twin.get(answer.stream)
                if kept is not None:
                    kept.setdefault(answer.event_id, answer.label)
                    if len(kept) > KEPT_TWIN:
                        kept.popitem(last=False)
        except (ValidationError, ValueError):
            logger.debug("a message on %s is none of ours", record.topic)


def without_bytes(one: Letter) -> Letter:
    """A letter without its bytes."""
    return Letter(
        place=one.place,
        original=one.original._replace(value=None, key=None, headers=()),
        reason=one.reason[:100],
        field=one.field[:200],
        detail=one.detail[:500],
        event_id=one.event_id[:200],
        at=one.at[:40],
        by_reference=one.by_reference,
    )


def gauge(metric: Gauge, stream: str) -> float | None:
    """What a gauge says of a stream; None where nothing was measured. Asking by `labels` would make it say 0."""
    samples = next(iter(metric.collect())).samples
    return next((sample.value for sample in samples if sample.labels.get("stream") == stream), None)


def _scrape(url: str) -> Scraped | str:
    """A worker's metrics, or why there are none."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=SCRAPE_SECONDS) as answer:
            return Scraped(answer.read(MOST_SCRAPED).decode(), SCRAPED)
    except urllib.error.HTTPError as error:
        return f"it answers {error.code}"
    except (OSError, ValueError) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        return str(getattr(why, "strerror", None) or why)


def _note(worker: Neighbour, found: Scraped | str, now: float) -> None:
    if isinstance(found, str):
        worker.why, worker.rate, worker.p50, worker.p99, worker.buckets = found, None, None, None, {}
        return
    whole, predictions = found.buckets("prediction_latency"), found.total("predictions")
    if worker.at is not None and worker.why is None and now > worker.at:
        worker.buckets = grown(whole, worker.whole)
        worker.rate = max(0.0, predictions - worker.predictions) / (now - worker.at)
        worker.p50, worker.p99 = quantile(0.5, worker.buckets), quantile(0.99, worker.buckets)
    worker.whole, worker.predictions, worker.at, worker.why = whole, predictions, now, None
    worker.lag = found.by("consumer_lag", "topic")
    for stream in found.by("revision_info", "stream"):
        worker.serving[stream] = next(iter(found.by("revision_info", "version", stream=stream)), "")
    for stream in found.by("dead_letters", "stream"):
        reasons = found.by("dead_letters", "reason", stream=stream)
        worker.dead_letters[stream] = {reason: int(count) for reason, count in reasons.items() if count}
