"""A search reads what it says that it read, on a real Kafka, and its parts by their definition."""

from __future__ import annotations

import json
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from stream.events import Record
from stream.search import Search, partition_of, parts_of, speaks_of
from tests.kafka import KafkaBroker


@given(st.integers(0, 50), st.integers(0, 80), st.none() | st.integers(0, 140), st.none() | st.integers(1, 40))
def test_the_parts_hold_the_newest_and_what_follows_the_place(
    low: int, length: int, around: int | None, most: int | None
) -> None:
    """A message that is said to have been looked for must have been read, once."""
    high = low + length
    read = [offset for start, end in parts_of(low, high, around, most) for offset in range(start, end)]
    assert len(set(read)) == len(read)
    wanted = set(range(low, high)) if most is None else set(range(max(low, high - most), high))
    if around is not None and low <= around < high and most is not None:
        wanted |= set(range(around, min(around + most, high)))
    assert set(read) == wanted


def test_an_event_id_is_found_however_json_was_written() -> None:
    """Labels come from clients that we do not control; some escape what is no ASCII, some have no key."""
    for event_id in ("note-1", "Größe ☺", 'a "quoted" one'):
        speaks = speaks_of(event_id)
        for ascii_only in (True, False):
            value = json.dumps({"event_id": event_id}, ensure_ascii=ascii_only).encode()
            assert speaks(Record("labels", 0, 0, None, value))
        assert speaks(Record("labels", 0, 0, event_id.encode(), None))
        assert not speaks(Record("labels", 0, 0, b"other", b"{}"))


def test_a_bounded_search_on_a_real_broker(kafka: KafkaBroker, topics: Callable[[], str]) -> None:
    """Keys lie where our producers put them, and a bound leaves out only what it says it leaves out."""
    topic = f"{topics()}answers"
    kafka.create_topic(topic, 3)
    kafka.produce(topic, [(f"e{number % 30}", f"v{number}", ()) for number in range(300)])
    search = Search({"bootstrap.servers": kafka.bootstrap})
    try:
        assert search.partitions(topic) == [0, 1, 2]
        assert search.partitions(f"{topic}-not-there") == []
        speaks = speaks_of("e7")
        every = search.look(topic, speaks)
        assert (every.read, every.whole) == (300, True)
        assert [record.value for record in every.found] == [f"v{number}".encode() for number in range(7, 300, 30)]
        home = partition_of(b"e7", 3)
        assert {record.partition for record in every.found} == {home}
        first = every.found[0].offset
        some = search.look(topic, speaks, partitions={home}, around={home: first}, most=5)
        assert not some.whole
        assert some.read == 10
        assert some.found[0].offset == first
        starts = search.starts(topic, every.found[3].timestamp_ms)
        assert starts[home][0] <= every.found[3].offset
        assert sum(end for _, end in starts.values()) == 300
    finally:
        search.close()
