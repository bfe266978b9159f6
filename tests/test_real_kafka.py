"""The test broker itself: what every other integration test leans on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Producer

from tests.kafka import KafkaBroker, Outgoing


def test_round_trip_keeps_everything(kafka: KafkaBroker, topics: Callable[[], str]) -> None:
    """Keys, values, headers and null values must come back as they went in, or tests would assert on fiction."""
    topic = kafka.create_topic(topics() + "reports", partitions=3)
    messages: list[Outgoing] = [("a", b"1", [("h", b"x"), ("h", b"y")]), ("b", None), (None, "three")]
    hour_ago = int(time.time() * 1000) - 3_600_000
    sent = kafka.produce(topic, messages, timestamp_ms=hour_ago)
    found = kafka.consume_all(topic)
    assert sorted(sent, key=lambda r: (r.partition, r.offset)) == found
    assert {r.timestamp_ms for r in found} == {hour_ago}
    assert sum(kafka.end_offsets(topic).values()) == 3
    assert kafka.consume(topic, 3) == found
    with pytest.raises(TimeoutError, match="waiting for 4 messages"):
        kafka.consume(topic, 4, timeout=0.3)


def test_isolation_and_retention(kafka: KafkaBroker, topics: Callable[[], str]) -> None:
    """Delivery tests read as a careful consumer does, and can let old messages expire."""
    topic = kafka.create_topic(topics() + "predictions")
    writer = Producer({**kafka.client(), "transactional.id": topic})
    writer.init_transactions(30)
    for end in (writer.abort_transaction, writer.commit_transaction):
        writer.begin_transaction()
        writer.produce(topic, end.__name__)
        writer.flush(30)
        end(30)
    assert [r.value for r in kafka.consume_all(topic)] == [b"commit_transaction"]
    assert len(kafka.consume_all(topic, "read_uncommitted")) == 2
    kafka.delete_records(topic, 0, 3)
    assert kafka.begin_offsets(topic) == {0: 3}
    assert kafka.consume_all(topic) == []


def test_survives_a_kill(tmp_path: Path, kafka: KafkaBroker) -> None:
    """A chaos test needs the same broker, with its data, at the same address after `kill`."""
    with KafkaBroker(tmp_path / "own") as broker:
        topic, address = broker.create_topic("kept"), broker.bootstrap
        broker.produce(topic, [("k", "v")])
        broker.kill()
        assert not broker.running
        broker.start()
        assert broker.bootstrap == address
        assert [r.value for r in broker.consume_all(topic)] == [b"v"]
    assert not broker.running


def test_the_secured_broker_wants_the_password(kafka_sasl: KafkaBroker, topics: Callable[[], str]) -> None:
    """The TLS fixture must refuse strangers, or a test of the credentials proves nothing."""
    topic = kafka_sasl.create_topic(topics() + "labels")
    kafka_sasl.produce(topic, [("k", "v")])
    assert len(kafka_sasl.consume_all(topic)) == 1
    stranger = Producer({**kafka_sasl.client(), "sasl.password": "wrong", "log_level": 0})
    stranger.produce(topic, b"x")
    assert stranger.flush(2) == 1
