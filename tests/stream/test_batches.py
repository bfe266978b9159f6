"""Batches on a real Kafka, across a rebalance: what was read before it is answered by whoever holds it after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import Consumer, Message, Producer
from kafka import KafkaProducer

from monitoring.metrics import Metrics
from stream.batches import Batch, BatchSettings, KafkaReader, KafkaWriter, Outgoing, TopicTail
from stream.errors import RetryLater, Superseded
from stream.events import Place, Record
from stream.lookback import Lookback
from tests.kafka import KafkaBroker
from tests.waiting import until

PARTITIONS = 2


class Group:
    """Readers of one group on one topic of two partitions, eight messages in each."""

    def __init__(self, kafka: KafkaBroker, prefix: str) -> None:
        self.kafka, self.prefix = kafka, prefix
        self.events = kafka.create_topic(prefix + "events", PARTITIONS)
        self.answers = kafka.create_topic(prefix + "answers", 1)
        self.odd = kafka.create_topic(prefix + "odd", 1)
        self.readers: list[KafkaReader] = []
        for partition in range(PARTITIONS):
            kafka.produce(self.events, [(b"k", b"%d" % n, ()) for n in range(8)], partition=partition)

    def reader(self, batch_events: int = 4, topic: str = "", member_id: str | None = None) -> KafkaReader:
        settings = BatchSettings(batch_events=batch_events, session_seconds=6, batch_seconds=0.2)
        topics = [topic or self.events]
        self.readers.append(KafkaReader(self.kafka.client(), self.prefix + "group", topics, settings, member_id))
        return self.readers[-1]

    def first_batch(self, reader: KafkaReader) -> Batch:
        found: list[Batch] = []
        until(lambda: (batch := reader.read(0.2)) is not None and found.append(batch) is None, every=0)
        return found[0]

    def share(self, one: KafkaReader, other: KafkaReader) -> None:
        """Poll both until each holds a partition."""

        def shared() -> bool:
            one.read(0.05)
            other.read(0.05)
            return len(one._held) == len(other._held) == 1

        until(shared, every=0)


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


def test_a_commit_that_never_comes_back_is_given_up_and_done_again(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a network cut the client may wait for ever, whatever its timeout; the worker would stop answering."""

    class Stuck:
        """A producer whose offsets are never acknowledged."""

        def __init__(self, real: Producer) -> None:
            self._real = real

        def send_offsets_to_transaction(self, *_: object) -> None:
            threading.Event().wait()

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

    reader = group.reader()
    batch = group.first_batch(reader)
    answers = [Outgoing(group.answers, b"k", record.value) for record in batch.records]
    writer = KafkaWriter(group.kafka.client(), reader, "exactly_once", group.prefix + "one", Metrics())
    writer._producer = Stuck(writer._producer)  # type: ignore[assignment]
    monkeypatch.setattr("stream.batches.COMMIT_SECONDS", 1.0)
    with pytest.raises(RetryLater):
        writer.write(batch, answers)
    monkeypatch.undo()
    writer.write(batch, answers)
    writer.close()
    assert [record.value for record in group.kafka.consume_all(group.answers)] == [m.value for m in answers]


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


def test_what_was_read_before_a_complaint_of_the_client_is_not_lost(group: Group) -> None:
    """The client tells of a topic that went away among the messages of another one, which it will not give again."""
    other = Consumer({**group.kafka.client(), "group.id": group.prefix + "other"})
    other.subscribe([group.prefix + "missing"])
    complaints: list[Message] = []
    until(lambda: complaints.extend(m for m in other.consume(1, 1) if m.error()) or bool(complaints), every=0)
    other.close()
    reader = group.reader()
    real = reader.consumer

    class Complaining:
        """The consumer, which complains once in the middle of what it gives."""

        def consume(self, count: int, timeout: float) -> list[Message]:
            found = real.consume(count, timeout)
            return [*found[:2], complaints.pop(), *found[2:]] if complaints and len(found) > 2 else found

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    reader.consumer = Complaining()  # type: ignore[assignment]
    writer = KafkaWriter(group.kafka.client(), reader, "at_least_once", "", Metrics())
    values: list[tuple[int, int]] = []
    told: list[RetryLater] = []

    def all_read() -> bool:
        try:
            batch = reader.read(0.2)
        except RetryLater as error:
            told.append(error)
            return False
        if batch is not None:
            writer.write(batch, [])
            values.extend((record.partition, record.offset) for record in batch.records)
        return group.kafka.committed(group.prefix + "group", group.events) == dict.fromkeys(range(PARTITIONS), 8)

    until(all_read, every=0)
    writer.close()
    assert len(told) == 1
    assert sorted(values) == [(partition, offset) for partition in range(PARTITIONS) for offset in range(8)]


def test_a_header_name_that_is_no_text_does_not_end_the_reader(group: Group) -> None:
    """Kafka takes any bytes as a name, and a client that gives up on them gives up on the partition for ever."""

    class Bytes(str):
        """A name whose bytes are no UTF-8."""

        def encode(self, *_: object) -> bytes:  # type: ignore[override]
            return b"\xff\xfe"

    producer = KafkaProducer(bootstrap_servers=group.kafka.bootstrap)
    odd, good = (Bytes("x"), b"1"), ("tenant", b"a")
    for headers in ([odd], [odd, good], [good, odd], [good]):
        producer.send(group.odd, b"value", headers=headers).get(30)
    producer.close()
    records: list[Record] = []
    reader = group.reader(topic=group.odd)
    until(lambda: records.extend(group.first_batch(reader).records) or len(records) == 4, every=0)
    assert [record.value for record in records] == [b"value"] * 4
    assert [record.headers for record in records] == [(), (), (), (good,)]


def test_a_compression_bomb_costs_its_own_place_alone(group: Group) -> None:
    """110 MB in four kilobytes pass the broker's limit, and the client asks for them again and again without end."""
    group.kafka.produce(group.odd, [(b"k", b"before", ())])
    large = {"message.max.bytes": 200_000_000, "queue.buffering.max.kbytes": 200_000, "compression.type": "zstd"}
    bomber = Producer({**group.kafka.client(), **large})
    bomber.produce(group.odd, bytes(110_000_000))
    assert bomber.flush(60) == 0
    group.kafka.produce(group.odd, [(b"k", b"after", ())])
    reader = group.reader(topic=group.odd)
    found: dict[int, bytes | None] = {}

    def whole() -> bool:
        batch = reader.read(0.2)
        if batch is not None:
            found.update({record.offset: record.value for record in batch.records})
        return len(found) == 3

    until(whole, every=0)
    assert found == {0: b"before", 1: None, 2: b"after"}
    places = [Place(topic=group.odd, partition=0, offset=offset) for offset in range(3)]
    lookback = Lookback(group.kafka.client())
    assert {place.offset: record.value for place, record in lookback.read(places).items()} == {
        0: b"before",
        2: b"after",
    }
    lookback.close()
    tail = TopicTail(group.kafka.client(), group.odd)
    read: list[Record] = []
    tail.catch_up(read.append)
    tail.close()
    assert {record.offset: record.value for record in read} == found


def test_places_that_no_log_can_have_are_not_waited_for(group: Group) -> None:
    """Whoever may write predictions names them; the client asks a broker for such a topic for ever."""
    lookback = Lookback(group.kafka.client(), seconds=5)
    names = ("bad topic!", "", ".", "..", "x" * 250, "\u00fcn\u00ef", "a\0b", group.prefix + "missing")
    places = [Place(topic=name, partition=0, offset=0) for name in names]
    places += [
        Place(topic=group.odd, partition=partition, offset=offset)
        for partition in (0, 77, 2**31 - 1)
        for offset in (99, 2**62, 2**63 - 1)
    ]
    assert lookback.read(places) == {}
    lookback.close()


def test_a_member_whose_name_another_one_has_says_so(group: Group) -> None:
    """Without anything in flight it would hold no partition, do nothing, and call itself ready for ever."""
    one = group.reader(member_id="a")
    group.first_batch(one)
    two = group.reader(member_id="a")

    def fenced() -> bool:
        two.read(0.05)
        try:
            one.read(0.05)
        except Superseded:
            return True
        return False

    until(fenced, every=0)


def test_a_topic_of_transactions_is_read_to_a_lag_of_nothing(group: Group) -> None:
    """Each commit and abort leaves a marker that nobody reads; an alert on the lag would ring for ever."""
    writer = Producer({**group.kafka.client(), "transactional.id": group.prefix + "writer"})
    writer.init_transactions(60)
    for number in range(6):
        writer.begin_transaction()
        writer.produce(group.odd, b"%d" % number)
        writer.flush(60)
        if number in (2, 5):
            writer.abort_transaction(60)
        else:
            writer.commit_transaction(60)
    ends = group.kafka.end_offsets(group.odd)
    assert ends == {0: 12}
    reader = group.reader(batch_events=2, topic=group.odd)
    values: list[bytes | None] = []
    lags: list[int] = []

    def caught_up() -> bool:
        batch = reader.read(0.2)
        values.extend(record.value for record in (batch.records if batch is not None else ()))
        lags.append(reader.lag().get(group.odd, -1))
        return lags[-1] == 0

    until(caught_up, every=0)
    assert values == [b"0", b"1", b"3", b"4"]
    assert max(lags) > 0
