"""Topics as the command line sees them: published from lines, read in the order of the log.

All with kafka-python: nothing here is hot. Readers belong to no consumer group, so whoever watches takes
nothing from a worker.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors

from deploy.tables import Entry
from learner.control import Refused
from stream.errors import DeadLetter, Misconfigured, RetryLater
from stream.events import Decoder, Event, Headers, Place, Record, encode
from stream.kafka import KafkaSettings, admin_client

IDLE_SECONDS = 3.0
"""A reader that met no end, as behind a transaction that is open, gives up after this long without a message."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that was not published.

    Args:
        number: its number in the file, from 1 on.
        why: what is wrong with it, in a sentence.
    """

    number: int
    why: str


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, apart from the message that it was.

    Args:
        place: where it lies on the topic of dead letters.
        original: the message as it was: its topic, place, key, value and own headers.
        reason: see `stream.errors.Reason`.
        field: dotted path of the field at fault, may be empty.
        detail: a sentence.
        event_id: may be empty.
        at: when it was refused, as RFC 3339.
        by_reference: true where the message was too large for this topic; its bytes lie at their first place only.
    """

    place: Place
    original: Record
    reason: str
    field: str
    detail: str
    event_id: str
    at: str
    by_reference: bool


def check_topic(kafka: KafkaSettings, *topics: str) -> None:
    """Return if the broker answers and has the topics.

    Raises:
        Misconfigured: a topic is missing, or the broker refuses us.
        RetryLater: no broker answers.
    """
    with admin_client(kafka) as client:
        there = set(client.list_topics())
    missing = [topic for topic in topics if topic not in there]
    if missing:
        known = ", ".join(sorted(name for name in there if not name.startswith("_"))) or "none"
        raise Misconfigured(
            f"Kafka at {kafka.bootstrap_servers} has no topic {', '.join(missing)}: create it with "
            f"`trimtab topics create`, or mend the name (there are: {known})"
        )


def read(
    kafka: KafkaSettings,
    topic: str,
    *,
    follow: bool = False,
    latest: bool = False,
    idle_seconds: float = IDLE_SECONDS,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Record]:
    """The messages of a topic, by partition in the order of the log.

    Args:
        kafka: where.
        topic: its whole name.
        follow: go on when the end is reached, and wait for more.
        latest: begin with what comes from now on.
        idle_seconds: see `IDLE_SECONDS`.
        stop: asked about between two polls; the end once it is true.

    Raises:
        Misconfigured: the topic is missing, or the broker refuses us.
        RetryLater: no broker answers.
    """
    check_topic(kafka, topic)
    consumer = _reader(kafka)
    try:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(partitions)
        (consumer.seek_to_end if latest else consumer.seek_to_beginning)(*partitions)
        quiet_since = time.monotonic()
        while stop is None or not stop():
            batches = consumer.poll(timeout_ms=200)
            for messages in batches.values():
                yield from map(record_of, messages)
            if batches:
                quiet_since = time.monotonic()
            elif not follow and (_at_the_end(consumer, partitions) or time.monotonic() - quiet_since > idle_seconds):
                return
    except kafka_errors.KafkaError as error:
        raise RetryLater(f"Kafka at {kafka.bootstrap_servers} stopped answering: {error}") from error
    finally:
        consumer.close(autocommit=False)


def read_at(kafka: KafkaSettings, place: Place) -> Record | None:
    """The message at a place, or None where the log no longer has it.

    Raises:
        RetryLater: the broker does not answer.
    """
    consumer = KafkaConsumer(
        **kafka.kafka_python(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        allow_auto_create_topics=False,
        max_poll_records=1,
    )
    partition = TopicPartition(place.topic, place.partition)
    try:
        consumer.assign([partition])
        consumer.seek(partition, place.offset)
        deadline = time.monotonic() + IDLE_SECONDS
        while time.monotonic() < deadline:
            for message in consumer.poll(timeout_ms=200).get(partition, []):
                return record_of(message) if message.offset == place.offset else None
    except kafka_errors.OffsetOutOfRangeError:
        return None
    except kafka_errors.KafkaError as error:
        raise RetryLater(f"Kafka at {kafka.bootstrap_servers} did not give {place}: {error}") from error
    finally:
        consumer.close(autocommit=False)
    return None


def record_of(message: Any) -> Record:
    """A message of kafka-python, free of it."""
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        key=message.key,
        value=message.value,
        headers=tuple(message.headers or ()),
        timestamp_ms=message.timestamp or 0,
    )


class Publisher:
    """Sends messages in order and keeps what the broker refused. A context manager: the end waits for all.

    Raises:
        RetryLater: the broker did not take everything; the message says how much was lost and why.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._producer = KafkaProducer(
            **kafka.kafka_python(),
            acks="all",
            linger_ms=20,
            batch_size=256 * 1024,
            max_request_size=2 * 2**20,
            allow_auto_create_topics=False,
            delivery_timeout_ms=int(max(30.0, kafka.timeout_seconds) * 1000),
            request_timeout_ms=int(max(10.0, kafka.timeout_seconds) * 1000),
        )
        self._refused: deque[str] = deque(maxlen=1)
        self.failed = 0
        self.sent = 0

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> None:
        """Send one message; kafka-python's default partitioner is Java's murmur2, as all of ours are."""
        try:
            future = self._producer.send(topic, key=key, value=value, headers=list(headers))
        except kafka_errors.KafkaError as error:
            self._fail(error)
            return
        self.sent += 1
        future.add_errback(self._fail)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._producer.flush()
        except kafka_errors.KafkaError as late:
            self._fail(late)
        finally:
            self._producer.close()
        if kind is None and self.failed:
            raise RetryLater(
                f"Kafka at {self._kafka.bootstrap_servers} did not take {self.failed} of {self.sent} messages: "
                f"{self._refused[0]}"
            )

    def _fail(self, error: BaseException) -> None:
        self.failed += 1
        self._refused.append(str(error) or type(error).__name__)


def publish_lines(
    lines: Iterable[bytes], topic: str, publisher: Publisher, decoder: Decoder | None, labels: bool
) -> Iterator[BadLine | None]:
    """Publish JSON lines keyed by event id; yields after each line what is wrong with it, or None.

    Args:
        lines: one JSON object a line; an empty line is passed over.
        topic: whole name.
        publisher: where they go.
        decoder: refuses here what a worker or a learner would make a dead letter; None sends every line as it is.
        labels: whether they are labels.
    """
    for number, line in enumerate(lines, 1):
        value = line.strip()
        if not value:
            yield None
            continue
        if decoder is None:
            event_id = _event_id(value)
            publisher.send(topic, event_id.encode() if event_id else None, value)
            yield None
            continue
        record = Record(topic, 0, number, None, value)
        try:
            message = decoder.label(record) if labels else decoder.event(record)
        except DeadLetter as refusal:
            where = f"{refusal.field}: " if refusal.field else ""
            yield BadLine(number, f"{where}{refusal.detail}")
            continue
        publisher.send(topic, message.event_id.encode(), value)
        yield None


def publish_entries(
    entries: Iterable[Entry], topics: tuple[str, str], publisher: Publisher | None, decoder: Decoder
) -> Iterator[BadLine | None]:
    """Publish what a file's rows came to; yields after each what is wrong with it, or None.

    A row whose label is refused is held back whole: its event alone would teach nothing.

    Args:
        topics: whole names, of the events and of the labels.
        publisher: None checks and sends nothing.
        decoder: refuses here what a worker or a learner would make a dead letter.
    """
    for entry in entries:
        if entry.why:
            yield BadLine(entry.number, entry.why)
            continue
        try:
            event = None if entry.event is None else encode(entry.event)
            label = None if entry.label is None else encode(entry.label)
            if event is not None:
                decoder.event(Record(topics[0], 0, entry.number, None, event))
            if label is not None:
                decoder.label(Record(topics[1], 0, entry.number, None, label))
        except DeadLetter as refusal:
            where = f"{refusal.field}: " if refusal.field else ""
            yield BadLine(entry.number, f"{where}{refusal.detail}")
            continue
        if publisher is not None and entry.event is not None:
            publisher.send(topics[0], entry.event.event_id.encode(), event)
        if publisher is not None and entry.label is not None:
            publisher.send(topics[1], entry.label.event_id.encode(), label)
        yield None


def ask(kafka: KafkaSettings, topics: tuple[str, str], event: Event, seconds: float) -> Record | None:
    """Publish one event and wait for what is answered; None where nothing is within so many seconds.

    Args:
        topics: whole names, of the events and of the predictions.

    Raises:
        Misconfigured: a topic is missing, or the broker refuses us.
        RetryLater: no broker answers.
    """
    check_topic(kafka, *topics)
    consumer = _reader(kafka)
    try:
        partitions = [
            TopicPartition(topics[1], number) for number in sorted(consumer.partitions_for_topic(topics[1]) or ())
        ]
        consumer.assign(partitions)
        consumer.seek_to_end(*partitions)
        for partition in partitions:
            # The end is looked up only when it is asked for, and it is that of now that is meant.
            consumer.position(partition)
        with Publisher(kafka) as publisher:
            publisher.send(topics[0], event.event_id.encode(), encode(event))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for messages in consumer.poll(timeout_ms=200).values():
                for message in messages:
                    if message.key == event.event_id.encode():
                        return record_of(message)
    except kafka_errors.KafkaError as error:
        raise RetryLater(f"Kafka at {kafka.bootstrap_servers} stopped answering: {error}") from error
    finally:
        consumer.close(autocommit=False)
    return None


def letter(record: Record) -> Letter:
    """A message of the topic of dead letters, taken apart. One that was put there by others has empty fields."""
    names = [name for name, _ in record.headers]
    # The message may itself have been a dead letter once: what counts is what was added last.
    added_from = len(names) - 1 - names[::-1].index("trimtab-reason") if "trimtab-reason" in names else len(names)
    own = record.headers[:added_from]
    added = {name: value.decode(errors="replace") for name, value in record.headers[added_from:]}
    original = Record(
        topic=added.get("trimtab-topic", ""),
        partition=_number(added.get("trimtab-partition", ""), 2**31),
        offset=_number(added.get("trimtab-offset", ""), 2**63),
        key=record.key,
        value=record.value,
        headers=own,
    )
    return Letter(
        place=record.place,
        original=original,
        reason=added.get("trimtab-reason", ""),
        field=added.get("trimtab-field", ""),
        detail=added.get("trimtab-detail", ""),
        event_id=added.get("trimtab-event-id", ""),
        at=added.get("trimtab-at", ""),
        by_reference="trimtab-by-reference" in added,
    )


def _number(text: str, below: int) -> int:
    """A number of a header that anyone may have written; 0 where it is none."""
    found = int(text) if text.isdecimal() and len(text) < 20 else 0
    return found if found < below else 0


def originals(kafka: KafkaSettings, topic: str, ours: Collection[str], places: Iterable[str]) -> list[Record]:
    """What dead letters were, to be sent again as they were.

    Args:
        kafka: where.
        topic: whole name of the topic of dead letters.
        ours: the topics that they may have come from.
        places: `PARTITION:OFFSET` each.

    Raises:
        Refused: one is gone, or came from elsewhere.
        RetryLater: the broker does not answer.
    """
    found = []
    for place in places:
        partition, _, offset = place.partition(":")
        record = read_at(kafka, Place(topic=topic, partition=int(partition), offset=int(offset)))
        if record is None:
            raise Refused(f"there is no dead letter at {place}, or its retention has ended")
        one = letter(record)
        if one.original.topic not in ours:
            raise Refused(f"{place} came from {one.original.topic or 'no topic'!r}, which these settings do not read")
        original = read_at(kafka, one.original.place) if one.by_reference else one.original
        if original is None:
            raise Refused(f"{place} was too large to be copied, and its first place no longer has it")
        found.append(original)
    return found


def _reader(kafka: KafkaSettings) -> Any:
    return KafkaConsumer(
        **kafka.kafka_python(),
        group_id=None,
        enable_auto_commit=False,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        allow_auto_create_topics=False,
        fetch_max_wait_ms=100,
    )


def _event_id(value: bytes) -> str | None:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    event_id = found.get("event_id") if isinstance(found, dict) else None
    return event_id if isinstance(event_id, str) else None


def _at_the_end(consumer: Any, partitions: Iterable[TopicPartition]) -> bool:
    """Whether everything up to the high watermark, which comes with a fetch, was read."""
    for partition in partitions:
        end = consumer.highwater(partition)
        if end is None or consumer.position(partition) < end:
            return False
    return True
