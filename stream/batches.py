"""Batches out of Kafka, answers into Kafka, and offsets that never run ahead of the answers.

A batch carries, per partition, where the one before it ended and where it ends itself. A commit is
refused (`OffsetGap`) unless it follows the last one, so a batch that failed can be retried or end the
process, but can never be skipped. Two guarantees:

- ``at_least_once``: answers are acknowledged by the broker, then the offsets are committed.
- ``exactly_once``: answers and offsets are one Kafka transaction that carries the group's metadata, so
  that a worker that lost its partitions while it was paused is fenced (KIP-447).

The reader's calls belong to one thread; the writer's to another. Both use librdkafka, whose objects
may be shared between threads.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from pydantic import BaseModel, ConfigDict, Field

from monitoring.metrics import Metrics
from monitoring.tracing import Tracing, timed
from stream.errors import OffsetGap, RetryLater, Superseded
from stream.events import Headers, Record

logger = logging.getLogger(__name__)

Partition = tuple[str, int]
Guarantee = Literal["at_least_once", "exactly_once"]

FENCED = frozenset(
    {
        KafkaError._FENCED,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.PRODUCER_FENCED,
    }
)
UNREADABLE = frozenset({KafkaError._BAD_COMPRESSION, KafkaError._BAD_MSG})
"""What the client says of a message that it cannot unpack: one that would be too large (100 MB), or is damaged."""

COMMIT_SECONDS = 40.0
"""After so long the end of a transaction is no longer waited for."""
TRANSACTION_TIMEOUT_MS = 10_000
"""How long a worker killed in mid-transaction can hide what others commit after it on its partitions."""


class BatchSettings(BaseModel):
    """How batches fill: by size or by waiting time, whichever comes first."""

    model_config = ConfigDict(extra="forbid")

    batch_events: int = Field(default=512, ge=1, le=100_000, description="Most events in one batch.")
    batch_seconds: float = Field(
        default=0.02, ge=0, le=10, description="Longest wait for a batch to fill after its first event, in seconds."
    )
    queued_batches: int = Field(default=2, ge=1, le=64, description="Batches read ahead of the model.")
    session_seconds: float = Field(
        default=10.0, ge=1, le=300, description="A worker silent for this long loses its partitions, in seconds."
    )
    max_pause_seconds: float = Field(
        default=300.0, ge=10, le=3600, description="Longest time one batch may take before the group gives up on it."
    )


class Outgoing(NamedTuple):
    """One message to be written."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """Records read together, with the place in each partition that they begin after and end at.

    Args:
        records: in the order in which they were read.
        follows: per partition, the end of the batch before; absent for the first one since assignment.
        ends: per partition, the offset to commit once every record is answered.
        generation: the assignment the batch was read under; batches of an older one are dropped.
        member: who the reader was in the group under that assignment, for the broker to check; None without a group.
        full: as many records as a batch may have, so more of them are likely to wait.
    """

    records: Sequence[Record]
    follows: Mapping[Partition, int]
    ends: Mapping[Partition, int]
    generation: int
    read_at: float = field(default_factory=time.time)
    member: Any = None
    full: bool = False


class Reader(Protocol):
    """Where batches come from."""

    def read(self, timeout: float) -> Batch | None:
        """The next batch, or None when nothing came within `timeout` seconds."""
        ...

    def rewind(self) -> None:
        """Go back to the last offset commit; batches already handed out become stale."""
        ...

    def current(self, batch: Batch) -> bool:
        """Whether the batch's partitions are still held under the assignment that read it."""
        ...

    def lag(self) -> dict[str, int]:
        """Messages not read yet, per topic, over the partitions held."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class Writer(Protocol):
    """Where answers go."""

    def write(self, batch: Batch, messages: Sequence[Outgoing]) -> None:
        """Write all messages and commit the batch, or raise and leave the batch uncommitted."""
        ...

    def close(self) -> None:
        """Let go of the broker."""
        ...


class KafkaReader:
    """Whole batches from a consumer group, by librdkafka.

    Args:
        connection: librdkafka connection properties.
        group: the consumer group, not the one of any Faust app.
        topics: what to read.
        settings: how batches fill.
        member_id: static group membership; a worker that restarts under its old id gets its partitions
            back at once instead of after the session timeout. None for a dynamic member.
        starts: where to begin on partitions that were just assigned, for a reader whose offsets are kept elsewhere
            than in Kafka; partitions it does not name begin at their beginning.
        assigned: told of partitions that were just assigned, before `starts` is asked.
    """

    def __init__(
        self,
        connection: Mapping[str, Any],
        group: str,
        topics: Sequence[str],
        settings: BatchSettings,
        member_id: str | None = None,
        starts: Callable[[Sequence[Partition]], Mapping[Partition, int]] | None = None,
        assigned: Callable[[Sequence[Partition]], None] | None = None,
    ) -> None:
        self.settings = settings
        self._starts, self._assigned = starts, assigned
        self._next: dict[Partition, int] = {}
        self._begun: dict[Partition, int] = {}
        self._held: set[Partition] = set()
        self._generation = 0
        self._member: Any = None
        self._topic = topics[0]
        self._away = False
        self._fatal: KafkaError | None = None
        self._rewind = threading.Event()
        properties = {
            **connection,
            "group.id": group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "isolation.level": "read_committed",
            "partition.assignment.strategy": "range",
            "session.timeout.ms": int(settings.session_seconds * 1000),
            "heartbeat.interval.ms": int(settings.session_seconds * 1000 / 5),
            "max.poll.interval.ms": int(max(settings.max_pause_seconds, settings.session_seconds) * 1000),
            "fetch.wait.max.ms": 50,
            # A reader that is ahead of the model pauses its fetching; the client's own pause of a second then starves a
            # fast model on a log that it reads from behind.
            "fetch.queue.backoff.ms": 10,
            "queued.min.messages": max(10_000, settings.batch_events * 4),
            "error_cb": self._on_error,
            **({"group.instance.id": member_id} if member_id else {}),
        }
        self.consumer = Consumer(properties)
        self.consumer.subscribe(
            list(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def read(self, timeout: float) -> Batch | None:
        if self._rewind.is_set():
            self._seek_to_commits()
        first = self.consumer.consume(1, timeout)
        generation = self._generation
        if not first:
            self._check_client()
            return None
        rest = []
        if self.settings.batch_events > 1:
            rest = self.consumer.consume(self.settings.batch_events - 1, self.settings.batch_seconds)
        if generation != self._generation:
            # A rebalance in between: what was read before it is someone else's now, or comes again.
            first = []
        return self._batch([*first, *rest])

    def _batch(self, messages: list[Message]) -> Batch | None:
        records: list[Record] = []
        follows: dict[Partition, int] = {}
        ends: dict[Partition, int] = {}
        unreadable: set[Partition] = set()
        for message in messages:
            error = message.error()
            if error is not None and error.code() in UNREADABLE:
                partition = (message.topic(), message.partition())
                if partition in unreadable:
                    continue  # said twice before the seek
                unreadable.add(partition)
                record = step_over(self.consumer, message, ends.get(partition, self._next.get(partition)))
            elif error is not None:
                if error.fatal() or not (error.retriable() or error.code() == KafkaError._PARTITION_EOF):
                    _reraise(KafkaException(error))
                continue
            else:
                record = record_of(message)
            partition = (record.topic, record.partition)
            if partition not in ends and partition in self._next:
                follows[partition] = self._next[partition]
            ends[partition] = record.offset + 1
            records.append(record)
        if not records:
            return None
        self._next.update(ends)
        full = len(messages) >= self.settings.batch_events
        return Batch(records, follows, ends, self._generation, member=self._member, full=full)

    def _on_error(self, error: KafkaError) -> None:
        _log_client_error(error)
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._away = True
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = error

    def _check_client(self) -> None:
        """Return where nothing was read because nothing is there.

        The client itself gives an empty answer as well while no broker can be reached, and when it is fenced.

        Raises:
            RetryLater: no broker answers.
            Superseded: another member with the same id took over, or the client cannot go on.
        """
        if self._fatal is not None:
            raise Superseded(f"another member took over, or the client cannot go on: {self._fatal.str()}")
        if self._away:
            try:
                self.consumer.list_topics(self._topic, timeout=1)
            except KafkaException as error:
                raise RetryLater(f"no broker answers: {error.args[0].str()}") from error
            self._away = False

    def rewind(self) -> None:
        self._generation += 1
        self._rewind.set()

    def current(self, batch: Batch) -> bool:
        return batch.generation == self._generation and not self._rewind.is_set()

    def lag(self) -> dict[str, int]:
        lag: dict[str, int] = {}
        for partition in list(self._held):
            topic, number = partition
            try:
                low, high = self.consumer.get_watermark_offsets(TopicPartition(topic, number), cached=True)
            except KafkaException:
                continue
            if high >= 0:
                # Before its first message a partition is read up to where it was left, and not from its beginning.
                read = self._next.get(partition, self._begun.get(partition, max(low, 0)))
                # The end counts the markers of transactions, which are never read: only the client's position passes
                # them. Until the first message it has none.
                (at,) = self.consumer.position([TopicPartition(topic, number)])
                lag[topic] = lag.get(topic, 0) + max(0, high - max(read, at.offset))
        return lag

    def holds(self) -> bool:
        """Whether any partition is assigned."""
        return bool(self._held)

    def close(self) -> None:
        self.consumer.close()

    def _seek_to_commits(self) -> None:
        held = [TopicPartition(topic, partition) for topic, partition in self._held]
        try:
            if self._starts is not None:
                starts = self._starts(list(self._held))
                for p in held:
                    p.offset = starts.get((p.topic, p.partition), OFFSET_BEGINNING)
            elif held:
                held = self.consumer.committed(held, timeout=10)
            for p in held:
                if p.offset < 0:
                    p.offset = OFFSET_BEGINNING
                self.consumer.seek(p)
        except KafkaException as error:
            _reraise(error)
        self._next.clear()
        self._generation += 1
        self._rewind.clear()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._generation += 1
        # Asked for when the batch is committed, it would name an assignment that the batch was not read under, and the
        # broker would take answers to events that someone else has answered meanwhile.
        self._member = consumer.consumer_group_metadata()
        self._held.update((p.topic, p.partition) for p in partitions)
        for p in partitions:
            self._next.pop((p.topic, p.partition), None)
        if self._assigned is not None:
            self._assigned([(p.topic, p.partition) for p in partitions])
        if self._starts is not None:
            starts = self._starts([(p.topic, p.partition) for p in partitions])
            for p in partitions:
                p.offset = starts.get((p.topic, p.partition), OFFSET_BEGINNING)
            consumer.assign(partitions)
            self._begun.update({p: offset for p, offset in starts.items() if p in self._held})
        else:
            self._note_commits(consumer, partitions)
        logger.info("partitions assigned: %s", _names(partitions))

    def _note_commits(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Where the group left these partitions, for the lag; without an answer it is counted from their beginning."""
        try:
            found = consumer.committed(partitions, timeout=5)
        except KafkaException as error:
            logger.warning("the lag is not known yet: %s", error)
            return
        self._begun.update({(p.topic, p.partition): p.offset for p in found if p.offset >= 0})

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._generation += 1
        self._release(partitions)
        logger.info("partitions given up: %s", _names(partitions))

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._generation += 1
        self._release(partitions)
        logger.warning("partitions lost to another member: %s", _names(partitions))

    def _release(self, partitions: list[TopicPartition]) -> None:
        for p in partitions:
            self._held.discard((p.topic, p.partition))
            self._next.pop((p.topic, p.partition), None)
            self._begun.pop((p.topic, p.partition), None)


class KafkaWriter:
    """Answers and offsets through one librdkafka producer.

    Args:
        connection: librdkafka connection properties.
        reader: whose offsets are committed.
        guarantee: at least once, or exactly once by transactions.
        transactional_id: this member's own name; needed for exactly once.
        metrics: where the time to produce and to commit is counted.
        tracing: where both become spans; None where nothing is traced.
    """

    def __init__(
        self,
        connection: Mapping[str, Any],
        reader: KafkaReader,
        guarantee: Guarantee,
        transactional_id: str,
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._reader = reader
        self._seconds = metrics.stage_seconds
        self._transactions = guarantee == "exactly_once"
        self._committed: dict[Partition, int] = {}
        self._generation = -1
        self._failed: list[str] = []
        self._properties = {
            **connection,
            "partitioner": "murmur2_random",
            "enable.idempotence": True,
            "linger.ms": 5,
            "queue.buffering.max.messages": 1_000_000,
            "error_cb": _log_client_error,
            # One call into Python for each message that failed, none for the many that did not.
            "delivery.report.only.error": True,
            "on_delivery": self._on_delivery,
            **(
                {"transactional.id": transactional_id, "transaction.timeout.ms": TRANSACTION_TIMEOUT_MS}
                if self._transactions
                else {"delivery.timeout.ms": 60_000}
            ),
        }
        self._broken = False
        self._open()

    def _open(self) -> None:
        self._producer = Producer(self._properties)
        if self._transactions:
            # Whatever transaction was left open under this id is aborted by it.
            self._call(lambda: self._producer.init_transactions(30))
        self._broken = False

    def write(self, batch: Batch, messages: Sequence[Outgoing]) -> None:
        """Write all messages and commit the batch; on any error nothing of it is committed.

        Raises:
            RetryLater: the broker is away or the transaction was aborted; rewind and repeat.
            Superseded: another member owns these partitions or this transactional id.
            OffsetGap: the batch does not follow the last one committed.
        """
        self._check_follows(batch)
        if self._broken:
            self._open()
        offsets = [TopicPartition(topic, partition, end) for (topic, partition), end in batch.ends.items()]
        if self._transactions:
            self._write_transaction(messages, offsets, batch.member)
        else:
            with timed(self._seconds, "produce", self._tracing):
                self._produce(messages)
                self._flush()
            with timed(self._seconds, "commit", self._tracing):
                self._call(lambda: self._reader.consumer.commit(offsets=offsets, asynchronous=False))
        self._committed.update(batch.ends)

    def close(self) -> None:
        self._producer.flush(5)

    def _check_follows(self, batch: Batch) -> None:
        if batch.generation != self._generation:
            # A new assignment begins where the group's commits say; nothing from before counts.
            self._committed = {p: end for p, end in self._committed.items() if p in batch.follows}
            self._generation = batch.generation
        for partition, start in batch.follows.items():
            last = self._committed.get(partition)
            if last != start:
                raise OffsetGap(
                    f"{partition[0]}[{partition[1]}]: the batch follows offset {start}, the last commit was {last}; "
                    "a batch in between was not answered"
                )

    def _write_transaction(self, messages: Sequence[Outgoing], offsets: list[TopicPartition], member: Any) -> None:
        producer = self._producer
        try:
            with timed(self._seconds, "produce", self._tracing):
                producer.begin_transaction()
                self._produce(messages)
            with timed(self._seconds, "commit", self._tracing):
                self._end(
                    lambda: (producer.send_offsets_to_transaction(offsets, member, 30), producer.commit_transaction(30))
                )
        except KafkaException as error:
            self._abort(error)
            if self._broken:
                raise RetryLater(f"the transaction's end is not known: {error.args[0].str()}") from error
            _reraise(error)
        except BaseException:
            if not self._broken:
                self._abort(None)
            raise

    def _end(self, action: Callable[[], Any]) -> None:
        """Do what ends a transaction, and give the producer up where that never comes back.

        The client (2.16) may wait without end for its coordinator after the network was cut, whatever timeout it is
        given. Its thread is left behind then, with the old producer, whose transaction the next one aborts.

        Raises:
            RetryLater: it did not come back in time.
        """
        done: Future[Any] = Future()

        def act() -> None:
            try:
                done.set_result(action())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=act, name="transaction", daemon=True).start()
        try:
            done.result(COMMIT_SECONDS)
        except TimeoutError as error:
            logger.error("a transaction did not end within %.0f s; its producer is given up", COMMIT_SECONDS)
            self._broken = True
            raise RetryLater(f"the transaction did not end within {COMMIT_SECONDS:.0f} s") from error

    def _abort(self, cause: KafkaException | None) -> None:
        """Give the transaction up; where that fails, the producer is given up with it, and the next one aborts it."""
        failed = cause
        if cause is None or not cause.args[0].fatal():
            try:
                self._producer.abort_transaction(30)
                return
            except KafkaException as error:
                failed = error
        assert failed is not None
        if failed.args[0].code() not in FENCED:
            logger.warning("the producer is made anew, which aborts its transaction: %s", failed)
            self._broken = True

    def _produce(self, messages: Sequence[Outgoing]) -> None:
        produce = self._producer.produce
        self._failed.clear()
        for topic, key, value, headers in messages:
            while True:
                try:
                    if headers:
                        produce(topic, value=value, key=key, headers=list(headers))
                    else:
                        produce(topic, value=value, key=key)
                    break
                except BufferError:
                    self._producer.poll(0.1)
        self._producer.poll(0)

    def _flush(self) -> None:
        left = self._producer.flush(60)
        if left or self._failed:
            why = self._failed[0] if self._failed else "no acknowledgement within 60 s"
            self._producer.purge()
            self._producer.flush(1)
            raise RetryLater(f"{left + len(self._failed)} messages were not acknowledged by the broker: {why}")

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failed.append(str(error))

    def _call(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except KafkaException as error:
            _reraise(error)


def record_of(message: Message) -> Record:
    """The message without its client library; check `message.error()` first."""
    return Record(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        _headers_of(message),
        message.timestamp()[1],
    )


def _headers_of(message: Message) -> Headers:
    """The headers; none of them where a name is not UTF-8, which Kafka takes and the client makes a mess of."""
    try:
        found = message.headers()
        if not found:
            return ()
        # In place of such a name the client (2.16) may leave a null pointer, and to look at it ends the process. The
        # garbage collector's view of a pair passes over it. It may leave its error pending as well, for whichever call
        # comes next to raise.
        if any(len(gc.get_referents(pair)) != 2 for pair in found):
            return ()
    except (SystemError, UnicodeDecodeError):
        return ()
    return tuple(found)


def step_over(consumer: Consumer, message: Message, position: int | None) -> Record:
    """The place of a message that the client cannot unpack, without key and value, and the reading goes on after it.

    Args:
        message: the client's complaint, which names the first offset of the compressed batch that it lies in.
        position: the next offset to read, where it is known.
    """
    topic, partition, first = message.topic(), message.partition(), message.offset()
    offset = first if position is None else max(first, position)
    logger.error("%s[%d]@%d cannot be read and is stepped over: %s", topic, partition, offset, message.error())
    consumer.seek(TopicPartition(topic, partition, offset + 1))
    return Record(topic, partition, offset, None, None)


class TopicTail:
    """All messages of a topic, from its beginning, to one reader: no group, no offset commits."""

    def __init__(self, connection: Mapping[str, Any], topic: str) -> None:
        self.topic = topic
        self._consumer = Consumer(
            {
                **connection,
                "group.id": "trimtab-tail",  # asked for by the client; never joined, nothing is committed
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 50,
                "error_cb": _log_client_error,
            }
        )
        self._at_end: set[int] = set()
        self._next: dict[int, int] = {}

    def catch_up(self, deliver: Callable[[Record], None], timeout: float = 60.0) -> int:
        """Deliver everything up to the end of every partition; returns how many records that were.

        Raises:
            RetryLater: the broker or the topic could not be read within `timeout` seconds without progress.
        """
        partitions = self._partitions(timeout)
        self._consumer.assign([TopicPartition(self.topic, p, 0) for p in partitions])
        count, patience = 0, time.monotonic() + timeout
        while self._at_end != set(partitions):
            records = self.poll(0.2)
            for record in records:
                deliver(record)
            count += len(records)
            if records:
                patience = time.monotonic() + timeout
            elif time.monotonic() > patience:
                raise RetryLater(f"topic {self.topic!r} could not be read to its end within {timeout:.0f} s")
        return count

    def begin(self, newest: int, timeout: float = 5.0) -> None:
        """Read on from `newest` records before the end of each partition; nothing is waited for.

        Raises:
            RetryLater: the broker or the topic could not be asked within `timeout` seconds.
        """
        starts = []
        for partition in self._partitions(timeout):
            where = TopicPartition(self.topic, partition)
            try:
                low, high = self._consumer.get_watermark_offsets(where, timeout=timeout)
            except KafkaException as error:
                raise RetryLater(f"topic {self.topic!r}: {error.args[0].str()}") from error
            # Not every broker tells the true end here: one that is too high is out of range, and the log's beginning
            # is taken then.
            starts.append(TopicPartition(self.topic, partition, max(low, high - newest)))
        self._consumer.assign(starts)

    def poll(self, timeout: float) -> list[Record]:
        """Records that came within `timeout` seconds."""
        records = []
        unreadable: set[int] = set()
        # Asked for many at once, the client waits for that many until the time is over.
        first = self._consumer.consume(1, timeout)
        for message in [*first, *(self._consumer.consume(999, 0) if first else ())]:
            error = message.error()
            if error is None:
                records.append(record_of(message))
                self._next[message.partition()] = message.offset() + 1
            elif error.code() == KafkaError._PARTITION_EOF:
                self._at_end.add(message.partition())
            elif error.code() in UNREADABLE:
                if message.partition() not in unreadable:
                    unreadable.add(message.partition())
                    records.append(step_over(self._consumer, message, self._next.get(message.partition())))
                    self._next[message.partition()] = records[-1].offset + 1
            elif error.fatal():
                _reraise(KafkaException(error))
        return records

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()

    def _partitions(self, timeout: float) -> list[int]:
        try:
            found = self._consumer.list_topics(self.topic, timeout=timeout).topics[self.topic]
        except KafkaException as error:
            raise RetryLater(f"topic {self.topic!r}: {error.args[0].str()}") from error
        if found.error is not None or not found.partitions:
            raise RetryLater(f"topic {self.topic!r} is not there; create it with `trimtab topics create`")
        return sorted(found.partitions)


def _reraise(error: KafkaException) -> None:
    """Turn a client error into the reaction it calls for."""
    cause = error.args[0]
    if cause.code() in FENCED:
        raise Superseded(f"another member with the same id took over: {cause.str()}") from error
    # What a consumer that was fenced gives back is not said to be fatal, only called so.
    if cause.fatal() or cause.code() == KafkaError._FATAL:
        raise Superseded(f"the client cannot go on: {cause.str()}") from error
    raise RetryLater(cause.str()) from error


def _log_client_error(error: KafkaError) -> None:
    logger.warning("kafka client: %s", error.str())


def _names(partitions: Sequence[TopicPartition]) -> str:
    return ", ".join(f"{p.topic}[{p.partition}]" for p in partitions) or "none"
