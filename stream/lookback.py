"""Reads events back from the log by their place, many at a time.

A label may come days after its event. The event is not copied anywhere in the meantime; its prediction
says where it lies, and it is read from there. One seek for each event costs 10 to 25 ms, so places of
one partition that lie close together are read in one run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from stream.batches import UNREADABLE, record_of, step_over
from stream.errors import DeadLetter, RetryLater
from stream.events import Decoder, Event, Place, Record, is_topic

RUN_GAP = 2_000
"""Places at most this many offsets apart are read in one run: reading on is cheaper than another seek."""

UNKNOWN = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})
NOT_THERE = frozenset({KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})


class Lookback:
    """Events by place.

    Args:
        connection: librdkafka connection properties.
        seconds: how long one partition may give nothing before the broker counts as away.
    """

    def __init__(self, connection: Mapping[str, Any], seconds: float = 30.0) -> None:
        self._seconds = seconds
        self._consumer = Consumer(
            {
                **connection,
                "group.id": "trimtab-lookback",  # asked for by the client; never joined, nothing is committed
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 20,
            }
        )

    def read(self, places: Iterable[Place]) -> dict[Place, Record]:
        """The records at `places`; those that the log no longer holds are absent.

        Raises:
            RetryLater: the broker does not answer.
        """
        wanted: dict[tuple[str, int], set[int]] = defaultdict(set)
        for place in places:
            wanted[place.topic, place.partition].add(place.offset)
        found: dict[Place, Record] = {}
        for (topic, partition), offsets in wanted.items():
            held = self._held(topic, partition)
            present = sorted(offset for offset in offsets if held is not None and held[0] <= offset < held[1])
            for run in _runs(present):
                for record in self._read_run(topic, partition, run):
                    found[record.place] = record
        return found

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close()

    def _held(self, topic: str, partition: int) -> tuple[int, int] | None:
        """First and end offset of the partition; None where it does not exist any more."""
        if not is_topic(topic):
            return None
        try:
            low, _ = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=self._seconds)
        except KafkaException as error:
            # The client says so as well while it cannot reach a broker, and what is taken for gone is never learned.
            if error.args[0].code() in UNKNOWN and not self._exists(topic, partition):
                return None
            raise RetryLater(f"{topic}[{partition}]: {error.args[0].str()}") from error
        # Not every broker tells the true end here; a place came from a prediction, so it was below the end once.
        return low, 2**63 - 1

    def _exists(self, topic: str, partition: int) -> bool:
        """Whether a broker knows the partition.

        Raises:
            RetryLater: none answers.
        """
        try:
            found = self._consumer.list_topics(topic, timeout=self._seconds).topics[topic]
        except KafkaException as error:
            raise RetryLater(f"{topic}[{partition}]: {error.args[0].str()}") from error
        if found.error is not None and found.error.code() not in UNKNOWN:
            raise RetryLater(f"{topic}[{partition}]: {found.error.str()}")
        return partition in found.partitions

    def _read_run(self, topic: str, partition: int, offsets: list[int]) -> list[Record]:
        wanted, last = set(offsets), offsets[-1]
        found: list[Record] = []
        self._consumer.assign([TopicPartition(topic, partition, offsets[0])])
        patience = time.monotonic() + self._seconds
        position = offsets[0]
        while position <= last:
            messages = self._consumer.consume(min(last - position + 1, 1_000), 0.5)
            for message in messages:
                error = message.error()
                if error is None:
                    position = message.offset() + 1
                    if message.offset() in wanted:
                        found.append(record_of(message))
                elif error.code() in NOT_THERE:
                    self._exists(topic, partition)  # a broker has said it, and not a client that lost them all
                    return found
                elif error.code() in UNREADABLE:
                    position = step_over(self._consumer, message, position).offset + 1
                    break  # what came with it was read before the step
                else:
                    raise RetryLater(f"{topic}[{partition}]: {error.str()}")
            if messages:
                patience = time.monotonic() + self._seconds
            elif time.monotonic() > patience:
                raise RetryLater(f"{topic}[{partition}]: nothing came within {self._seconds:.0f} s")
        return found


def events_at(
    read: Callable[[Iterable[Place]], Mapping[Place, Record]], decoder: Decoder, wanted: Mapping[tuple[str, str], Place]
) -> dict[tuple[str, str], Event]:
    """The events wanted, by stream and event id; those that do not lie at their place any more are absent.

    Raises:
        RetryLater: the broker does not answer.
    """
    records, found = read(wanted.values()), {}
    for key, place in wanted.items():
        record = records.get(place)
        if record is None:
            continue
        try:
            event = decoder.event(record)
        except DeadLetter:
            continue
        # A topic that was deleted and made again has other events at the same places.
        if (event.stream, event.event_id) == key:
            found[key] = event
    return found


def _runs(offsets: list[int]) -> list[list[int]]:
    """Sorted offsets, split where reading on would cost more than another seek."""
    runs: list[list[int]] = []
    for offset in offsets:
        if runs and offset - runs[-1][-1] <= RUN_GAP:
            runs[-1].append(offset)
        else:
            runs.append([offset])
    return runs
