"""Batches on a real Kafka, across a rebalance: what was read before it is answered by whoever holds it after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import Message

from monitoring.metrics import Metrics
from stream.batches import Batch, BatchSettings, KafkaReader, KafkaWriter, Outgoing
from stream.errors import RetryLater
from tests.kafka import KafkaBroker
from tests.waiting import until

PARTITIONS = 2


class Group:
    """Readers of one group on one topic of two partitions, eight messages in each."""

    def __init__(self, kafka: KafkaBroker, prefix: str) -> None:
        self.kafka, self.prefix = kafka, prefix
        self.events = kafka.create_topic(prefix + "events", PARTITIONS)
        self.answers = kafka.create_topic(prefix + "answers", 1)
        self.readers: list[KafkaReader] = []
        for partition in range(PARTITIONS):
            kafka.produce(self.events, [(b"k", b"%d" % n, ()) for n in range(8)], partition=partition)

    def reader(self, batch_events: int = 4) -> KafkaReader:
        settings = BatchSettings(batch_events=batch_events, session_seconds=6, batch_seconds=0.2)
        self.readers.append(KafkaReader(self.kafka.client(), self.prefix + "group", [self.events], settings))
        return self.readers[-1]

    def first_batch(self, reader: KafkaReader) -> Batch:
        found: list[Batch] = []
        until(lambda: (batch := reader.read(0.2)) is not None and found.append(batch) is None, seconds=30, every=0)
        return found[0]

    def share(self, one: KafkaReader, other: KafkaReader) -> None:
        """Poll both until each holds a partition."""

        def shared() -> bool:
            one.read(0.05)
            other.read(0.05)
            return len(one._held) == len(other._held) == 1

        until(shared, seconds=30, every=0)


@pytest.fixture
def group(kafka: KafkaBroker, topics: Callable[[], str]) -> Iterator[Group]:
    made = Group(kafka, topics())
    yield made
    for reader in made.readers:
        reader.close()


def test_answers_to_what_was_read_before_a_rebalance_are_refused(group: Group) -> None:
    """The reader is a member in good standing again, so only the assignment that the batch was read under tells."""
    one = group.reader()
    batch = group.first_batch(one)
    writer = KafkaWriter(group.kafka.client(), one, "exactly_once", group.prefix + "one", Metrics())
    group.share(one, group.reader())
    with pytest.raises(RetryLater):
        writer.write(batch, [Outgoing(group.answers, b"k", record.value) for record in batch.records])
    writer.close()
    assert group.kafka.consume_all(group.answers) == []
    assert group.kafka.committed(group.prefix + "group", group.events) == {}


def test_a_message_read_just_before_a_rebalance_is_not_twice_in_a_batch(group: Group) -> None:
    """The first message of a batch may be older than the rebalance; after it, reading begins at the last commit."""
    reader = group.reader()
    group.first_batch(reader)
    real = reader.consumer

    class Rebalanced:
        """The consumer, given the same partitions anew between the two halves of a read."""

        def __init__(self) -> None:
            self.read: list[Message] = []

        def consume(self, count: int, timeout: float) -> list[Message]:
            if not self.read:
                self.read = real.consume(1, 10)
                return self.read
            reader._on_assign(real, real.assignment())
            return [*self.read, *real.consume(count - 1, timeout)]

    reader.consumer = Rebalanced()  # type: ignore[assignment]
    batch = reader.read(1)
    reader.consumer = real
    assert batch is not None
    places = [record.place for record in batch.records]
    assert len(places) == len(set(places))
