"""A real Kafka for benchmarks: the broker, events to read, and an observer that times what contestants commit.

The observer is the same for all contestants and runs beside them, in the parent: it asks the broker for the
group's committed offsets. All that is committed has been answered and acknowledged, and under exactly once is
visible to a reader of committed messages. The clock runs from the first commit seen to the last, so the start
of a process and its joining of the group are not part of it, nor are the events of the first commit.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from tests.kafka import FULL_SPEED, KafkaBroker, KafkaFailed, KafkaUnavailable

REPOSITORY = Path(__file__).resolve().parent.parent
PARTITIONS = 4
QUIET = {"log_level": 0}
"""What a client says of a broker that is away comes back from its calls as well."""


class BenchmarkFailed(Exception):
    """A contestant ended, stood still, or lost or repeated something; the message says what to look at."""


@dataclass(frozen=True, slots=True)
class Passage:
    """How a contestant went through the events.

    Args:
        events: those committed within the time measured.
        seconds: from the first commit seen to the last.
        cpu_seconds: processor time of the contestant's process meanwhile, its threads included.
    """

    events: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds

    @property
    def cpu_per_event(self) -> float:
        """Microseconds of processor time an event."""
        return self.cpu_seconds / self.events * 1e6


@contextlib.contextmanager
def running_kafka(bootstrap: str | None) -> Iterator[Kafka]:
    """The broker at `bootstrap`, or one of our own that lives as long as the context.

    Raises:
        BenchmarkFailed: there is none and none can be started.
    """
    with running_broker(bootstrap) as broker:
        yield Kafka(broker.bootstrap)


@contextlib.contextmanager
def running_broker(bootstrap: str | None) -> Iterator[KafkaBroker]:
    """As `running_kafka`, in the form that a whole deployment is made on."""
    if bootstrap is not None:
        yield _Given(bootstrap)
        return
    with tempfile.TemporaryDirectory(prefix="trimtab-benchmark-") as directory:
        # Topics are deleted after each run; their files must not wait a minute on the disk.
        broker = KafkaBroker(Path(directory), java_options=FULL_SPEED, settings={"log.segment.delete.delay.ms": "1000"})
        try:
            broker.start()
        except (KafkaUnavailable, KafkaFailed) as error:
            raise BenchmarkFailed(str(error)) from error
        try:
            yield broker
        finally:
            broker.stop()


class _Given(KafkaBroker):
    """A broker that runs already and goes on running."""

    def __init__(self, bootstrap: str) -> None:
        super().__init__(Path())
        self._given = bootstrap

    @property
    def bootstrap(self) -> str:
        return self._given


class Kafka:
    """What benchmarks ask of a broker; topics and groups get names that nobody else has."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap
        self._admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})

    @contextlib.contextmanager
    def topic(self, purpose: str, partitions: int = PARTITIONS) -> Iterator[str]:
        """A new topic that is deleted at the end."""
        name = f"benchmark-{uuid.uuid4().hex[:8]}-{purpose}"
        try:
            self._admin.create_topics([NewTopic(name, partitions, 1)], request_timeout=10)[name].result(30)
        except KafkaException as error:
            raise BenchmarkFailed(
                f"Kafka at {self.bootstrap} does not answer as it should: {error.args[0].str()}"
            ) from error
        try:
            yield name
        finally:
            self._admin.delete_topics([name])[name].result(30)

    def fill(self, topic: str, messages: Iterable[tuple[bytes, bytes]]) -> int:
        """Publish (key, value) pairs; returns how many."""
        producer = Producer(
            {
                "bootstrap.servers": self.bootstrap,
                **QUIET,
                "partitioner": "murmur2_random",
                "linger.ms": 20,
                "queue.buffering.max.messages": 200_000,
            }
        )
        count = 0
        for key, value in messages:
            while True:
                try:
                    producer.produce(topic, value=value, key=key)
                    break
                except BufferError:
                    producer.poll(0.1)
            count += 1
        if producer.flush(120):
            raise BenchmarkFailed("the broker did not take all events")
        return count

    def count(self, topic: str, enough: int) -> int:
        """How many committed messages the topic holds; stops looking at `enough` and a little."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                **QUIET,
                "group.id": "benchmark-count",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 50,
            }
        )
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        count, patience = 0, 3
        try:
            while patience and count <= enough:
                found = sum(message.error() is None for message in consumer.consume(10_000, 0.5))
                count += found
                # Once all is there, one more look shows whether anything came twice.
                patience = 3 if found else patience - (3 if count >= enough else 1)
        finally:
            consumer.close()
        return count

    def shares(self, group: str) -> list[int]:
        """How many partitions each member of a group has."""
        try:
            found = self._admin.describe_consumer_groups([group], request_timeout=10)[group].result(30)
        except KafkaException:
            return []
        return [len(member.assignment.topic_partitions) for member in found.members]

    def watch(
        self,
        group: str,
        topic: str,
        total: int,
        contestant: Contestant,
        *,
        look: float = 0.01,
        patience: float = 120,
    ) -> Passage:
        """Time a contestant until it has committed `total` events.

        Args:
            look: seconds between two looks; often enough to see most commits, and no more, for it costs both cores.
            patience: seconds.

        Raises:
            BenchmarkFailed: it ended, or committed nothing more for `patience` seconds.
        """
        places = [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
        # A consumer that never joins the group, only asks for its commits.
        asking = Consumer(
            {"bootstrap.servers": self.bootstrap, **QUIET, "group.id": group, "enable.auto.commit": False}
        )

        def committed() -> int:
            try:
                return sum(max(0, place.offset) for place in asking.committed(places, timeout=30))
            except KafkaException:
                # A group's coordinator takes a moment to be found on a broker that has just started.
                return 0

        with contextlib.closing(asking):
            return _passage(committed, total, contestant, look, patience)


def _passage(committed: Callable[[], int], total: int, contestant: Contestant, look: float, patience: float) -> Passage:
    """What `Kafka.watch` gives, from a look at what is committed."""
    pause = threading.Event()
    before, used = time.perf_counter(), contestant.cpu_seconds()
    first: tuple[float, int, float] | None = None
    last, moved = 0, before
    while last < total:
        contestant.check()
        looked = time.perf_counter()
        done = committed()
        now = time.perf_counter()
        if done > last:
            last, moved = done, now
            if first is None:
                # All at once: the time since the last look, when nothing was there, is all that is known.
                first = (now, done, contestant.cpu_seconds()) if done < total else (before, 0, used)
        elif now - moved > patience:
            raise BenchmarkFailed(f"{contestant.name} committed nothing for {patience:.0f} s:\n{contestant.log()}")
        elif first is None:
            before, used = looked, contestant.cpu_seconds()
        if last < total:
            pause.wait(look)
    assert first is not None
    return Passage(total - first[1], moved - first[0], contestant.cpu_seconds() - first[2])


@dataclass
class Contestant:
    """A contestant's process: ``PYTHON -m MODULE NAME CONFIG_JSON``, ended when the context ends.

    Args:
        name: worker, quix or bare.
        module: the module that knows it.
        config: what it is told.
        python: the interpreter to run it with.
    """

    name: str
    module: str
    config: Mapping[str, Any]
    python: str = sys.executable
    _process: psutil.Popen | None = field(default=None, repr=False)
    _log: Any = field(default=None, repr=False)

    def __enter__(self) -> Contestant:
        self._log = tempfile.TemporaryFile()
        self._process = psutil.Popen(
            [self.python, "-m", self.module, self.name, json.dumps(self.config)],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except psutil.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def cpu_seconds(self) -> float:
        """Processor time it has used so far, its threads included."""
        assert self._process is not None
        try:
            times = self._process.cpu_times()
        except psutil.Error:
            self.check()
            raise
        return float(times.user + times.system)

    def check(self) -> None:
        """Raise `BenchmarkFailed` where it has ended."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            raise BenchmarkFailed(f"{self.name} ended with code {code}:\n{self.log()}")

    def log(self) -> str:
        """The end of what it wrote."""
        self._log.seek(0)
        return str(self._log.read().decode(errors="replace"))[-4000:]
