"""Finds the messages that speak of one event, within a bound.

A topic is no index: what it says of one event can only be found by reading it. An answer's place is often known, and
what else was said of its event came soon after it or a short while ago. So of each partition two parts are read, from
that place on and the newest, each at most so many messages; and it is said whether that was all of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from kafka.partitioner.default import murmur2

from stream.batches import UNREADABLE, record_of, step_over
from stream.errors import RetryLater
from stream.events import Record
from stream.lookback import UNKNOWN


@dataclass
class Looked:
    """What a search found.

    Args:
        found: the messages wanted, by partition in the order of the log.
        read: how many were looked at.
        whole: every partition asked for was read from its first message to its last.
    """

    found: list[Record] = field(default_factory=list)
    read: int = 0
    whole: bool = True


class Search:
    """Looks through topics. Not for several threads at once.

    Args:
        connection: librdkafka connection properties.
        seconds: how long a partition may give nothing before the broker counts as away.
    """

    def __init__(self, connection: Mapping[str, Any], seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._consumer = Consumer(
            {
                **connection,
                "group.id": "trimtab-search",  # asked for by the client; never joined, nothing is committed
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 20,
            }
        )

    def partitions(self, topic: str) -> list[int]:
        """The topic's partitions; none where it is not there.

        Raises:
            RetryLater: the broker does not answer.
        """
        try:
            found = self._consumer.list_topics(topic, timeout=self._seconds).topics[topic]
        except KafkaException as error:
            raise RetryLater(f"topic {topic!r}: {error.args[0].str()}") from error
        if found.error is not None and found.error.code() not in UNKNOWN:
            raise RetryLater(f"topic {topic!r}: {found.error.str()}")
        return [] if found.error is not None else sorted(found.partitions)

    def look(
        self,
        topic: str,
        wanted: Callable[[Record], bool],
        *,
        partitions: Collection[int] | None = None,
        around: Mapping[int, int] | None = None,
        most: int | None = None,
    ) -> Looked:
        """Look for messages.

        Args:
            partitions: only these; all of them when left out.
            around: by partition, an offset from which on is read as well as the newest.
            most: how many messages a part has at most; None reads all.

        Raises:
            RetryLater: the broker does not answer.
        """
        looked = Looked()
        for partition in self.partitions(topic):
            if partitions is not None and partition not in partitions:
                continue
            low, high = self._ends(topic, partition)
            parts = parts_of(low, high, (around or {}).get(partition), most)
            looked.whole &= parts == [(low, high)] or high <= low
            for start, end in parts:
                for record in self.between(topic, partition, start, end):
                    looked.read += 1
                    if wanted(record):
                        looked.found.append(record)
        return looked

    def between(self, topic: str, partition: int, start: int, end: int) -> Iterator[Record]:
        """The messages of a partition from offset `start` up to before `end`, or up to the log's end.

        Raises:
            RetryLater: the broker does not answer.
        """
        self._consumer.assign([TopicPartition(topic, partition, start)])
        patience, position = time.monotonic() + self._seconds, start
        while position < end:
            messages = self._consumer.consume(min(end - position, 1_000), 0.5)
            for message in messages:
                error = message.error()
                if error is None:
                    position = message.offset() + 1
                    if position <= end:
                        yield record_of(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    return
                elif error.code() in UNREADABLE:
                    position = step_over(self._consumer, message, position).offset + 1
                    break  # what came with it was read before the step
                else:
                    raise RetryLater(f"{topic}[{partition}]: {error.str()}")
            if messages:
                patience = time.monotonic() + self._seconds
            elif time.monotonic() > patience:
                raise RetryLater(f"{topic}[{partition}]: nothing came within {self._seconds:.0f} s")

    def starts(self, topic: str, timestamp_ms: int) -> dict[int, tuple[int, int]]:
        """By partition, the first offset whose Kafka record time is not before this, and the log's end.

        Raises:
            RetryLater: the broker does not answer.
        """
        asked = [TopicPartition(topic, partition, timestamp_ms) for partition in self.partitions(topic)]
        try:
            found = self._consumer.offsets_for_times(asked, timeout=self._seconds)
        except KafkaException as error:
            raise RetryLater(f"topic {topic!r}: {error.args[0].str()}") from error
        ends = {}
        for one in found:
            _, high = self._ends(topic, one.partition)
            ends[one.partition] = (one.offset if one.offset >= 0 else high, high)
        return ends

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()

    def _ends(self, topic: str, partition: int) -> tuple[int, int]:
        try:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=self._seconds)
        except KafkaException as error:
            raise RetryLater(f"{topic}[{partition}]: {error.args[0].str()}") from error
        return low, high


def parts_of(low: int, high: int, around: int | None, most: int | None) -> list[tuple[int, int]]:
    """What is read of the offsets from `low` to before `high`: from `around` on, and the newest; none twice. Pure."""
    if most is None or high - low <= most:
        return [(low, high)]
    newest = (high - most, high)
    if around is None or not low <= around < high:
        return [newest]
    first = (around, min(around + most, high))
    if first[1] >= newest[0]:
        return [(min(first[0], newest[0]), high)]
    return [first, newest]


def partition_of(key: bytes, partitions: int) -> int:
    """On which of so many partitions all of our producers put a key."""
    return (int(murmur2(key)) & 0x7FFFFFFF) % partitions


def speaks_of(event_id: str) -> Callable[[Record], bool]:
    """Whether a message may speak of an event: a quick look at its bytes, before anything is decoded."""
    key = event_id.encode()
    # As JSON has it, where whoever wrote it escapes what is no ASCII.
    escaped = json.dumps(event_id)[1:-1].encode()

    def look(record: Record) -> bool:
        value = record.value or b""
        return record.key == key or key in value or escaped in value

    return look
