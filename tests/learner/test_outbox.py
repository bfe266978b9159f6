"""What follows from a transaction leaves for Kafka, whatever else is waiting beside it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from learner.app import Outbox
from replay.store import LearnerStore, Outgoing
from tests.kafka import KafkaBroker

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def test_a_message_that_its_topic_does_not_take_holds_up_no_other(
    kafka: KafkaBroker, topics: Callable[[], str], tmp_path: Path
) -> None:
    """A dead letter that is sent again may be larger than its topic takes by now; no announcement would leave."""
    wide, narrow = kafka.create_topic(topics() + "wide", 1), kafka.create_topic(topics() + "narrow", 1)
    entry = ConfigEntry("max.message.bytes", "10000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, narrow, incremental_configs=[entry])
    admin = AdminClient(kafka.client())
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(30)
    store = LearnerStore(f"sqlite:///{tmp_path}/learner.db")
    epoch = store.claim("one", NOW)
    with store.transaction(epoch, NOW) as tx:
        tx.send([Outgoing(narrow, b"k", b"first"), Outgoing(narrow, b"k", bytes(20_000))])
        tx.send([Outgoing(wide, b"k", bytes(1_020_000)), Outgoing(narrow, b"k", b"last")])
    Outbox(store, epoch, kafka.client()).send()
    assert store.outbox() == []
    store.close()
    assert [len(record.value or b"") for record in kafka.consume_all(wide)] == [1_020_000]
    assert [record.value for record in kafka.consume_all(narrow)] == [b"first", b"last"]
