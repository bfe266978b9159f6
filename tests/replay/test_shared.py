"""What a store shared by several learners promises: one writer a partition, and nobody misses the other's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry

from learner.joining import JoinTopics
from learner.sharing import Assigned, Follower, Starts
from monitoring.metrics import Metrics
from replay.store import LearnerStore
from stream.batches import Batch, KafkaReader
from stream.errors import RetryLater, Superseded
from stream.events import Decoder, Label, Prediction, Record, StreamRules, encode
from stream.service import Health
from tests.replay.steps import NOW, STREAM, Learner, Message, label, prediction

TOPICS = JoinTopics("predictions", "labels", "dead-letters")
FIRST = ("predictions", 0)


@pytest.fixture
def store(where: str) -> Iterator[LearnerStore]:
    made = LearnerStore(where)
    yield made
    made.close()


def records(*messages: Message) -> list[Record]:
    return [
        Record(place.topic, place.partition, place.offset, message.event_id.encode(), encode(message))
        for message, place in messages
        if isinstance(message, Prediction | Label)
    ]


def batch(*messages: Message) -> Batch:
    read = records(*messages)
    return Batch(read, {}, {(one.topic, one.partition): one.offset + 1 for one in read}, 0)


def no_reader(starts: Starts, assigned: Assigned) -> KafkaReader:
    raise AssertionError("batches are handed in")


@pytest.fixture
def follower(store: LearnerStore) -> Callable[[str], Follower]:
    """A follower of this name, to which both topics' first partitions were just assigned."""

    def make(name: str) -> Follower:
        decoder = Decoder([StreamRules(name=STREAM, kind="text")])
        made = Follower(
            store,
            name,
            decoder,
            TOPICS,
            no_reader,
            Metrics(CollectorRegistry()),
            Health(),
            lambda: NOW,
        )
        made.assigned([FIRST, ("labels", 0)])
        made.starts([FIRST, ("labels", 0)])
        return made

    return make


def test_a_prediction_is_indexed_and_a_label_is_left_to_the_leader(
    store: LearnerStore, follower: Callable[[str], Follower]
) -> None:
    """What nobody has spoken of needs no decision; quotas, quarantine and learning are decided by one."""
    Learner(store)
    one = follower("b")
    early = label("e1", "hail", at=0)
    one.step(batch(prediction("e1", "hail", ref=1, at=0), prediction("e2", None, ref=2, at=1), early))
    assert set(store.known([(STREAM, "e1"), (STREAM, "e2")]).served) == {(STREAM, "e1"), (STREAM, "e2")}
    assert [row.record for row in store.inbox()] == records(early)
    assert store.offsets() == {FIRST: 2, ("labels", 0): 1}
    assert store.sizes()["labels"] == 0


def test_a_prediction_whose_label_waits_is_left_to_the_leader(
    store: LearnerStore, follower: Callable[[str], Follower]
) -> None:
    """Put into the index only, it would be there with its label beside it, and nobody would bring them together."""
    leader = Learner(store)
    leader.step([label("e1", "hail", at=0)])
    late = prediction("e1", "hail", ref=1, at=0)
    follower("b").step(batch(late))
    assert not store.known([(STREAM, "e1")]).served
    assert [row.record for row in store.inbox()] == records(late)
    with store.transaction(leader.epoch, NOW) as tx:
        assert tx.served_among([(STREAM, "e1")]) == set()
        tx.clear_inbox([row.id for row in store.inbox()])
    assert store.inbox() == []
    assert store.inbox_span() == 0


def test_who_was_stopped_keeps_nothing_once_its_partition_went_elsewhere(
    store: LearnerStore, follower: Callable[[str], Follower]
) -> None:
    """The new owner has not moved yet, so that the offset alone would let the old one through."""
    Learner(store)
    old = follower("b")
    new = follower("c")
    held = batch(prediction("e1", "hail", ref=1, at=0))
    with pytest.raises(Superseded):
        old.step(held)
    assert store.offsets() == {}
    assert store.sizes()["served"] == 0
    new.step(held)
    assert store.offsets() == {FIRST: 1}


def test_a_batch_that_cannot_be_kept_leaves_no_part_of_it(
    store: LearnerStore, follower: Callable[[str], Follower]
) -> None:
    """Index, inbox and offsets are one transaction: a follower that dies in it has done nothing."""
    Learner(store)
    one = follower("b")
    one.step(batch(prediction("e1", "hail", ref=1, at=0)))
    again = follower("b")
    with pytest.raises(Superseded):
        one.step(batch(prediction("e2", "hail", ref=2, at=1), label("e2", "hail", at=0)))
    assert store.offsets() == {FIRST: 1}
    assert store.inbox() == []
    again.step(batch(prediction("e2", "hail", ref=2, at=1), label("e2", "hail", at=0)))
    assert store.offsets() == {FIRST: 2, ("labels", 0): 1}
    assert len(store.inbox()) == 1


def test_nothing_is_stored_before_anybody_has_led(store: LearnerStore, follower: Callable[[str], Follower]) -> None:
    """Its rows would be under no leader's epoch."""
    with pytest.raises(RetryLater):
        follower("b").step(batch(prediction("e1", "hail", ref=1, at=0)))
    assert store.offsets() == {}


def test_the_leader_holds_its_partitions_too(store: LearnerStore) -> None:
    """It leads whatever is assigned to it, but writes of a partition only while that is its own."""
    leader = Learner(store)
    claims = store.claim_partitions("a", [FIRST], NOW)
    with store.transaction(leader.epoch, NOW) as tx:
        tx.hold(claims)
    store.claim_partitions("b", [FIRST], NOW)
    with pytest.raises(Superseded), store.transaction(leader.epoch, NOW) as tx:
        tx.hold(claims)
