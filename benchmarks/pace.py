"""Events at a steady rate, whatever becomes of them, and an ear on their answers: what latency is measured with.

Both live in the parent, outside the process that is measured. Events come at random (a Poisson process) and their clock
starts when they were due, not when they could be sent, so a stall is felt by all that would have come meanwhile.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from benchmarks.kafka import QUIET, BenchmarkFailed

Message = tuple[bytes, bytes]
"""Key, which is the event's id, and value."""


class Heard(NamedTuple):
    """One message of the topic that is listened to."""

    at: float
    """When it was read, by `time.perf_counter`."""
    key: bytes
    value: bytes


class Ear:
    """Reads a topic from now on, committed messages alone, and remembers when each came; a context.

    Args:
        bootstrap: the broker.
        topic: what is listened to.
        wanted: called with every message, in the ear's thread; by default all are remembered in `heard`.
    """

    def __init__(self, bootstrap: str, topic: str, wanted: Callable[[Heard], None] | None = None) -> None:
        self.heard: list[Heard] = []
        self._wanted = wanted or self.heard.append
        self._over = threading.Event()
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                **QUIET,
                "group.id": f"benchmark-ear-{uuid.uuid4().hex[:8]}",  # asked for by the client; never joined
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
            }
        )
        places = [
            TopicPartition(topic, p) for p in self._consumer.list_topics(topic, timeout=10).topics[topic].partitions
        ]
        for place in places:
            place.offset = self._consumer.get_watermark_offsets(place, timeout=10)[1]
        self._consumer.assign(places)
        self._thread = threading.Thread(target=self._listen, name="ear", daemon=True)

    def __enter__(self) -> Ear:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        self._consumer.close()

    def _listen(self) -> None:
        while not self._over.is_set():
            message = self._consumer.poll(0.1)
            if message is not None and message.error() is None:
                self._wanted(Heard(time.perf_counter(), message.key() or b"", message.value() or b""))


@dataclass
class Pace:
    """Publishes messages at a mean rate.

    Args:
        bootstrap: the broker.
        topic: where to.
        rate: messages a second.
        seed: of the gaps between them.
    """

    bootstrap: str
    topic: str
    rate: float
    seed: int = 0
    due: dict[bytes, float] = field(default_factory=dict)
    """When each was to be sent, by key and `time.perf_counter`."""
    late: float = 0.0
    """The most seconds that one was sent after it was due: the driver's own part in what is measured."""

    def run(self, messages: Iterator[Message], seconds: float, over: threading.Event | None = None) -> int:
        """Publish for so long, or until `over` is set; returns how many.

        Raises:
            BenchmarkFailed: the broker did not take them.
        """
        producer = Producer(
            {"bootstrap.servers": self.bootstrap, **QUIET, "partitioner": "murmur2_random", "linger.ms": 0}
        )
        gaps = np.random.default_rng(self.seed)
        over, count = over or threading.Event(), 0
        begun = due = time.perf_counter()
        while due < begun + seconds and not over.is_set():
            key, value = next(messages)
            wait = due - time.perf_counter()
            if wait > 0:
                over.wait(wait)
            self.late = max(self.late, time.perf_counter() - due)
            self.due[key] = due
            try:
                producer.produce(self.topic, value=value, key=key)
            except (BufferError, KafkaException) as error:
                raise BenchmarkFailed(f"the broker does not take events: {error}") from error
            producer.poll(0)
            count += 1
            due += float(gaps.exponential(1 / self.rate))
        if producer.flush(60):
            raise BenchmarkFailed("the broker did not take all events")
        return count


def latencies(due: dict[bytes, float], heard: Sequence[Heard]) -> np.ndarray:
    """Seconds from when each event was due to its first answer, in the order of the events.

    Raises:
        BenchmarkFailed: an event was not answered.
    """
    first: dict[bytes, float] = {}
    for one in heard:
        first.setdefault(one.key, one.at)
    missing = [key for key in due if key not in first]
    if missing:
        raise BenchmarkFailed(f"{len(missing)} of {len(due)} events were not answered, such as {missing[0].decode()}")
    return np.array([first[key] - at for key, at in due.items()])


def wait_for(
    condition: Callable[[], bool],
    seconds: float,
    what: str,
    check: Callable[[], None] = lambda: None,
    *,
    every: float = 0.02,
) -> None:
    """Return once `condition()` holds.

    Args:
        check: raises where there is nothing to wait for any more.
        every: seconds between two looks.

    Raises:
        BenchmarkFailed: it does not within `seconds`.
    """
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while not condition():
        check()
        if time.monotonic() > deadline:
            raise BenchmarkFailed(f"{what} took more than {seconds:.0f} s")
        pause.wait(every)
