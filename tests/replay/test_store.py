"""The learner's store: exact in any order, atomic under kill -9, owned by one learner at a time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay import schema
from replay.policy import ReplaySettings
from replay.store import (
    REQUESTS_KEPT,
    Asked,
    LearnerStore,
    NotEmbedded,
    Outgoing,
    Payload,
    Quarantined,
    StoreSettings,
    pack,
    unpack,
)
from stream.errors import Misconfigured, RetryLater, Superseded
from stream.events import Label
from stream.join import join, touched
from tests.replay.steps import ENCODER, NOW, STREAM, Learner, Message, embed, head_due, head_of, label, prediction

SMALL = StoreSettings(exam_from=2, exam_one_in=2)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(where: str) -> Iterator[LearnerStore]:
    made = LearnerStore(where, settings=SMALL)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pair(fresh: Callable[[], str]) -> Iterator[tuple[LearnerStore, LearnerStore]]:
    """Two stores that the property tests empty and use again: making one costs as much as ten batches."""
    made = (LearnerStore(fresh(), settings=SMALL), LearnerStore(fresh(), settings=SMALL))
    yield made[0], made[1]
    for store in made:
        store.close()


def emptied(store: LearnerStore) -> Learner:
    """A learner over the store with nothing in it."""
    with store._write() as connection:
        for table in schema.METADATA.sorted_tables:
            if table is not schema.meta:
                connection.execute(sa.delete(table))
    return Learner(store)


def everything(store: LearnerStore, keys: set[tuple[str, str]]) -> dict[str, Any]:
    """The whole state that must not depend on any order."""
    known = store.known(keys)
    return {
        "served": dict(known.served),
        "labels": {key: dict(rows) for key, rows in known.labels.items() if rows},
        "learned": dict(known.learned),
        "scores": dict(known.scores),
        "examples": [
            (e.event_id, e.label, e.payload, e.observed_at, e.labelled_at, e.ref, e.exam, e.embedding.tobytes())
            for e in store.examples(STREAM)
        ],
        "members": store.members(STREAM),
        "head": head_of(store),
        "accuracy": store.accuracy(STREAM),
        "recalls": store.recalls(STREAM),
        "classes": sorted(store.classes(STREAM)),
    }


EVENTS = st.sampled_from(["e1", "e2", "e3"])
TOLD = st.tuples(EVENTS, st.sampled_from(["x", "x", "y", None]), st.integers(0, 2), st.sampled_from(["ann", "bob", ""]))


def message(offset: int, told: tuple[str, str | None, int, str]) -> Message:
    """A label by one of two labellers, or where nobody speaks, a prediction; some event ids lie twice in the log."""
    event, name, number, labeller = told
    if labeller:
        return label(event, name, at=offset, minute=number, labeller=labeller)
    return prediction(event, name, ref=int(event[1]) * 10 + number, at=offset)


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[Message], list[list[Message]]]:
    """The messages in log order, and the same ones shuffled and cut into batches."""
    straight = [message(offset, told) for offset, told in enumerate(draw(st.lists(TOLD, min_size=8, max_size=20)))]
    shuffled = draw(st.permutations(straight))
    cuts = sorted(draw(st.sets(st.integers(1, len(straight)), min_size=3, max_size=8)) | {0, len(straight)})
    return straight, [shuffled[a:b] for a, b in pairwise(cuts)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=orders())
def test_any_order_and_any_batching_end_in_the_same_state(
    pair: tuple[LearnerStore, LearnerStore], case: tuple[list[Message], list[list[Message]]]
) -> None:
    """Labels come late, twice and corrected: the head must not depend on the network's mood."""
    straight, batches = case
    keys = {(message.stream, message.event_id) for message, _ in straight}
    one, other = emptied(pair[0]), emptied(pair[1])
    one.step(straight)
    for batch in batches:
        other.step(batch)
    assert everything(one.store, keys) == everything(other.store, keys)
    assert head_of(one.store) == head_due(one.store)
    assert head_of(other.store) == head_due(other.store)


@settings(max_examples=20, deadline=None)
@given(case=orders())
def test_reading_the_same_messages_again_changes_nothing(
    pair: tuple[LearnerStore, LearnerStore], case: tuple[list[Message], list[list[Message]]]
) -> None:
    """Labels and predictions are delivered at least once; learned they must be exactly once."""
    straight, batches = case
    keys = {(message.stream, message.event_id) for message, _ in straight}
    learner = emptied(pair[0])
    learner.step(straight)
    before = everything(learner.store, keys)
    ledger = learner.store.sizes()["ledger"]
    for batch in batches:
        learner.step(batch)
    assert everything(learner.store, keys) == before
    assert learner.store.sizes()["ledger"] == ledger


def test_label_before_prediction_waits_and_is_learned_when_it_comes(store: LearnerStore) -> None:
    """Nothing says that a label is slower than the worker."""
    learner = Learner(store)
    joined, _ = learner.step([label("e1", "x", at=0)])
    assert joined.label_outcomes == {(STREAM, "waiting"): 1}
    assert learner.read == []
    _, reconciled = learner.step([prediction("e1", "y", ref=10, at=0)])
    assert reconciled.outcomes == {(STREAM, "learned"): 1}
    assert learner.read == [10]
    assert store.accuracy(STREAM) == (0, 1)


def test_a_correction_subtracts_exactly_without_reading_the_log(store: LearnerStore) -> None:
    """The log may have expired by then; the ledger's embedding is enough."""
    learner = Learner(store)
    learner.step([prediction("e1", "x", ref=10, at=0), label("e1", "x", at=0)])
    learner.gone = {10}
    _, reconciled = learner.step([label("e1", "y", at=1, minute=1)])
    assert reconciled.outcomes == {(STREAM, "corrected"): 1}
    assert learner.read == [10]
    assert head_of(store) == {("y", embed("e1 at 10").tobytes()): 1}
    assert store.accuracy(STREAM) == (0, 1)
    _, reconciled = learner.step([label("e1", None, at=2, minute=2)])
    assert reconciled.outcomes == {(STREAM, "withdrawn"): 1}
    assert head_of(store) == {}
    assert store.examples(STREAM) == []
    assert store.accuracy(STREAM) == (0, 0)


def test_an_event_gone_from_the_log_is_counted_once(store: LearnerStore) -> None:
    """Silence would look like a label that never came."""
    learner = Learner(store, gone={10})
    _, reconciled = learner.step([prediction("e1", "x", ref=10, at=0), label("e1", "x", at=0)])
    assert reconciled.outcomes == {(STREAM, "too_late"): 1}
    _, reconciled = learner.step([label("e1", "y", at=1, minute=1)])
    assert reconciled.outcomes == {}
    assert learner.read == [10]
    assert store.accuracy(STREAM) == (0, 1), "what was served is scored all the same"


def test_an_earlier_event_that_is_gone_leaves_what_was_learned(store: LearnerStore) -> None:
    """An event id published twice must not cost the example that could be read."""
    learner = Learner(store, gone={10})
    learner.step([prediction("e1", "x", ref=11, at=1), label("e1", "x", at=0)])
    _, reconciled = learner.step([prediction("e1", "x", ref=10, at=0), label("e1", "y", at=1, minute=1)])
    assert reconciled.outcomes == {(STREAM, "corrected"): 1}
    assert head_of(store) == {("y", embed("e1 at 11").tobytes()): 1}
    joined, _ = learner.step([label("e1", "y", at=2, minute=1)])
    assert joined.changes == ()


def test_an_older_learner_is_superseded(store: LearnerStore) -> None:
    """Two learners writing one store would learn labels twice."""
    old = Learner(store)
    old.step([label("e1", "x", at=0)])
    new = Learner(store)
    assert new.epoch > old.epoch
    with pytest.raises(Superseded):
        old.step([label("e2", "x", at=1)])
    new.step([label("e2", "x", at=1)])
    assert store.offsets() == {("inbox", 0): 2}
    assert store.owner() == ("test", new.epoch)


def test_an_offset_moved_by_another_stops_the_learner(store: LearnerStore) -> None:
    """The same messages must not be learned from two positions."""
    learner = Learner(store)
    learner.step([label("e1", "x", at=0)])
    learner.position = 0
    with pytest.raises(Superseded, match="expected 0"):
        learner.step([label("e2", "x", at=1)])
    assert store.known({(STREAM, "e2")}).labels == {}


def test_a_transaction_that_fails_keeps_nothing(store: LearnerStore) -> None:
    """Half a batch would be learned twice when the batch is read again."""
    learner = Learner(store)
    batch = [prediction("e1", "x", ref=10, at=0), label("e1", "x", at=0)]
    predictions, labels = [batch[0]], [batch[1]]
    joined = join(store.known(touched(predictions, labels)), predictions, labels)  # type: ignore[arg-type]
    with pytest.raises(KeyError), store.transaction(learner.epoch, NOW) as tx:
        learner.apply(tx, joined, {}, (), 2)
    assert store.sizes() == dict.fromkeys(store.sizes(), 0)
    assert store.offsets() == {}
    learner.step(batch)
    assert store.sizes()["examples"] == 1


def test_what_was_asked_is_kept_with_its_effect_or_not_at_all(store: LearnerStore) -> None:
    """A request that looks done and is not is never done; one that is done and does not look so is done twice."""
    now = datetime(2026, 1, 2, tzinfo=UTC)
    asked = Asked("night-1", "digest", "pause", STREAM, "done", "ann", "noise", now)
    epoch = store.claim("test", now)

    def fail() -> None:
        with store.effect_of(asked), store.transaction(epoch, now) as tx:
            tx.remember("pinned", "v1.1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (store.asked("night-1"), store.recall("pinned")) == (None, None)
    with store.effect_of(asked), store.transaction(epoch, now) as tx:
        tx.remember("pinned", "v1.1")
    assert (store.asked("night-1"), store.recall("pinned")) == (asked, "v1.1")
    assert store.last_asked(unsettled=True) == [asked]
    with store.transaction(epoch, now + REQUESTS_KEPT + timedelta(seconds=1)) as tx:
        assert tx.purge().asked == 1
    assert store.last_asked() == []


def test_changes_made_from_an_old_state_are_refused(store: LearnerStore) -> None:
    """A correction subtracted twice would leave a head that no set of labels explains."""
    learner = Learner(store)
    learner.step([prediction("e1", "x", ref=10, at=0), label("e1", "x", at=0)])
    late: Any = [label("e1", "y", at=1, minute=1)]
    joined = join(store.known(touched([], late)), [], late)
    learner.step(late)
    with pytest.raises(RetryLater), store.transaction(learner.epoch, NOW) as tx:
        tx.reconcile(joined.changes, {})
    assert head_of(store) == head_due(store)


def test_an_embedding_of_another_encoder_is_refused(store: LearnerStore) -> None:
    """Embeddings of two encoders in one head mean nothing."""
    learner = Learner(store)
    learner.step([prediction("e1", "x", ref=10, at=0), label("e1", "x", at=0)])
    learner.encoder = "another"
    with pytest.raises(RetryLater):
        learner.step([prediction("e2", "x", ref=20, at=1), label("e2", "x", at=1)])
    assert store.encoder(STREAM) == ENCODER


def batch_of(count: int, classes: int = 10, first: int = 0) -> list[Message]:
    """`count` events predicted and labelled."""
    made = [prediction(f"n{n}", f"c{n % classes}", ref=n, at=n) for n in range(first, first + count)]
    return made + [label(f"n{n}", f"c{n % classes}", at=n) for n in range(first, first + count)]


def test_a_batch_costs_few_statements(store: LearnerStore) -> None:
    """One statement a message would make the database the slowest part of the loop."""
    learner = Learner(store)
    seen: list[str] = []

    def count(*args: Any) -> None:
        seen.append(args[2])

    sa.event.listen(store._engine, "before_cursor_execute", count)
    learner.step(batch_of(1_000))
    assert store.sizes()["examples"] == 1_000
    assert len(seen) < 60, len(seen)


def test_a_rich_class_gives_its_share_to_the_exam_and_the_head_lets_go(store: LearnerStore) -> None:
    """An example that is both learned and examined would flatter every candidate."""
    learner = Learner(store)
    _, reconciled = learner.step(batch_of(60, classes=3))
    exam = {example.event_id for example in store.examples(STREAM, exam=True)}
    assert 10 < len(exam) < 50
    assert {event_id for _, event_id in reconciled.to_exam} == exam
    assert head_of(store) == head_due(store)
    assert sum(head_of(store).values()) == 60 - len(exam)
    assert not exam & store.members(STREAM)


def test_what_a_run_trained_on_never_enters_the_exam(store: LearnerStore) -> None:
    """A class that becomes rich later must not be examined on what it was taught from."""
    learner = Learner(store)
    learner.step([prediction("n0", "x", ref=0, at=0), label("n0", "c0", at=0)])
    with store.transaction(learner.epoch, NOW) as tx:
        run = tx.add_run(STREAM, "hand")
        tx.mark_trained(STREAM, run, ["n0"])
    learner.step(batch_of(40, classes=1, first=1))
    trained = store.examples(STREAM, event_ids=["n0"])
    assert [(example.exam, example.trained_in) for example in trained] == [(False, run)]
    exam = [example.event_id for example in store.examples(STREAM, exam=True)]
    with pytest.raises(ValueError, match="exam"), store.transaction(learner.epoch, NOW) as tx:
        tx.mark_trained(STREAM, run, exam)


def test_a_run_that_failed_leaves_its_examples_untouched(
    store: LearnerStore, pair: tuple[LearnerStore, LearnerStore]
) -> None:
    """Otherwise every crash would eat the exam's supply."""
    learner, twin = Learner(store), emptied(pair[0])
    learner.step([prediction("n1", "x", ref=1, at=1), label("n1", "c0", at=1)])
    with store.transaction(learner.epoch, NOW) as tx:
        run = tx.add_run(STREAM, "timer")
        tx.mark_trained(STREAM, run, ["n1"])
    learner.step(batch_of(30, classes=1, first=2))
    with store.transaction(learner.epoch, NOW) as tx:
        tx.unmark_trained(run)
    twin.step(batch_of(31, classes=1, first=1))
    expected = [(e.event_id, e.exam) for e in twin.store.examples(STREAM)]
    assert [(e.event_id, e.exam) for e in store.examples(STREAM)] == expected
    assert head_of(store) == head_due(store)


def test_experience_is_the_members_and_what_is_new(where: str) -> None:
    """A fine-tune that only saw the replay store would miss what it was called for."""
    store = LearnerStore(where, {STREAM: ReplaySettings(policy="reservoir", size=5)}, SMALL)
    learner = Learner(store)
    learner.step(batch_of(30))
    first = store.experience(STREAM)
    assert len(first) == len(store.examples(STREAM, exam=False))
    with store.transaction(learner.epoch, NOW) as tx:
        run = tx.add_run(STREAM, "labels")
        tx.mark_trained(STREAM, run, [example.event_id for example in first])
    learner.step(batch_of(6, first=30))
    second = store.experience(STREAM)
    new = {example.event_id for example in second if example.new}
    assert {example.event_id for example in second} == new | store.members(STREAM)
    assert new == {example.event_id for example in store.examples(STREAM, exam=False, since_run=run)}
    assert len(store.members(STREAM)) == 5
    assert store.class_counts(STREAM, member_only=True).keys() <= set(store.classes(STREAM))
    assert sum(store.class_counts(STREAM).values()) == 36
    store.close()


def test_rebase_puts_the_head_on_another_encoder(store: LearnerStore) -> None:
    """After a new version the old embeddings must be gone from head and ledger, all at once."""
    learner = Learner(store)
    learner.step(batch_of(20, classes=2))
    with store.transaction(learner.epoch, NOW) as tx:
        tx.save_sums(STREAM, ENCODER, 5, b"sums")
    assert store.sums(STREAM, ENCODER) == (5, b"sums")
    embeddings = {e.event_id: embed(str(e.payload), "new") for e in store.examples(STREAM)}
    some = dict(list(embeddings.items())[1:])
    with pytest.raises(NotEmbedded) as caught, store.transaction(learner.epoch, NOW) as tx:
        tx.rebase(STREAM, "new", some)
    assert caught.value.event_ids == (next(iter(embeddings)),)
    assert store.encoder(STREAM) == ENCODER
    with store.transaction(learner.epoch, NOW) as tx:
        last = tx.rebase(STREAM, "new", embeddings)
    assert head_of(store) == {}
    assert head_of(store, encoder="new") == head_due(store)
    assert store.follow_ledger(STREAM, "new").seq == last
    assert store.sums(STREAM, ENCODER) is None
    learner.encoder = "new"
    learner.step([label("n3", "c0", at=50, minute=5)])
    assert head_of(store, encoder="new") == head_due(store)


def test_purge_keeps_members_and_late_corrections_exact(where: str) -> None:
    """Disk is bounded, but a correction must subtract what was added however old it is."""
    remembered = StoreSettings(exam_from=1_000)
    store = LearnerStore(where, {STREAM: ReplaySettings(policy="reservoir", size=5)}, remembered)
    learner = Learner(store)
    learner.step([*batch_of(20), label("lost", "c0", at=99), prediction("unlabelled", "c0", ref=99, at=99)])
    members = store.members(STREAM)
    head = head_of(store)
    learner.now += timedelta(days=8)
    with store.transaction(learner.epoch, learner.now) as tx:
        purged = tx.purge()
    assert (purged.served, purged.payloads, purged.too_late) == (21, 15, {STREAM: 1})
    assert {example.event_id for example in store.examples(STREAM)} == members == store.members(STREAM)
    assert head_of(store) == head
    gone = next(f"n{n}" for n in range(20) if f"n{n}" not in members)
    _, reconciled = learner.step([label(gone, "other", at=200, minute=9)])
    assert reconciled.outcomes == {(STREAM, "corrected"): 1}
    assert ("other", embed(f"{gone} at {gone[1:]}").tobytes()) in head_of(store)
    assert sum(head_of(store).values()) == 20
    assert store.recalls(STREAM)["other"] == (0, 1)
    seq = store.follow_ledger(STREAM, ENCODER).seq
    with store.transaction(learner.epoch, learner.now) as tx:
        tx.save_sums(STREAM, ENCODER, seq - 2, b"")
    learner.now += timedelta(days=91)
    with store.transaction(learner.epoch, learner.now) as tx:
        purged = tx.purge()
    assert (purged.examples, purged.ledger, purged.scores) == (15, 20, 20)
    assert store.sizes()["examples"] == 5
    store.close()


def test_the_join_index_is_bounded(where: str) -> None:
    """A stream that nobody labels must not fill the disk within the horizon."""
    store = LearnerStore(where, settings=StoreSettings(index_size=7))
    learner = Learner(store)
    for start in range(0, 20, 5):
        learner.now += timedelta(seconds=1)
        learner.step([prediction(f"n{n}", None, ref=n, at=n) for n in range(start, start + 5)])
    with store.transaction(learner.epoch, learner.now) as tx:
        assert tx.purge().served == 13
    left = store.known({(STREAM, f"n{n}") for n in range(20)}).served
    assert {event_id for _, event_id in left} >= {f"n{n}" for n in range(15, 20)}
    assert len(left) == 7
    store.close()


def test_the_join_index_is_let_go_of_in_small_steps(where: str) -> None:
    """Joining waits while rows are deleted, and within an hour an index may outgrow its bound by millions."""
    store = LearnerStore(where, settings=StoreSettings(index_size=7, horizon=timedelta(minutes=1)))
    learner = Learner(store)
    for start in range(0, 20, 5):
        learner.now += timedelta(seconds=1)
        learner.step([prediction(f"n{n}", None, ref=n, at=n) for n in range(start, start + 5)])

    def step() -> int:
        with store.transaction(learner.epoch, learner.now) as tx:
            return tx.purge_index(6, store.sizes()["served"] - 7)

    assert [step() for _ in range(4)] == [6, 6, 1, 0]
    left = {event_id for _, event_id in store.known({(STREAM, f"n{n}") for n in range(20)}).served}
    assert len(left) == 7
    assert left >= {f"n{n}" for n in range(15, 20)}
    learner.now += timedelta(minutes=1)
    assert [step() for _ in range(3)] == [2, 0, 0]
    learner.now += timedelta(seconds=1)
    assert [step() for _ in range(2)] == [5, 0]
    store.close()


def test_history_and_outbox(store: LearnerStore) -> None:
    """What follows from an effect is kept with it, in the order in which it must leave."""
    epoch = store.claim("one", NOW)
    with store.transaction(epoch, NOW) as tx:
        run = tx.add_run(STREAM, "hand", detail={"by": "ops"})
        tx.update_run(run, state="running", started=True)
        first = tx.add_version(STREAM, encoder="e", head="h", state="champion")
        second = tx.add_version(STREAM, encoder="e2", head="h2", state="candidate", parent=first, run=run)
        tx.set_champion(STREAM, first, "start")
        tx.set_champion(STREAM, second, "promoted")
        tx.set_version_state(STREAM, first, "retired")
        tx.advance({("labels", 1): (None, 12)})
        assert [tx.add_revision(STREAM, second, head=f"h{n}", ledger_seq=n) for n in range(2)] == [1, 2]
        tx.raise_best_recall(STREAM, {"x": 0.5, "y": 0.9})
        tx.raise_best_recall(STREAM, {"x": 0.75, "y": 0.1})
        tx.send([Outgoing("model-versions", b"k", None, (("a", b"\x00\xff"),)), Outgoing("audit", None, b"v")])
    with store.transaction(epoch, NOW + timedelta(hours=1)) as tx:
        tx.update_run(run, state="promoted", finished=True, detail={"seconds": 3})
    assert [(r.state, r.detail, r.finished_at) for r in store.runs(STREAM)] == [
        ("promoted", {"by": "ops", "seconds": 3}, NOW + timedelta(hours=1))
    ]
    assert store.runs(states=["running"]) == []
    assert [(v.number, v.state, v.parent) for v in store.versions(STREAM)] == [
        (1, "retired", None),
        (2, "candidate", 1),
    ]
    champion = store.champion(STREAM)
    assert champion is not None
    assert (champion.version, champion.epoch) == (2, epoch)
    assert [reign.version for reign in store.champions(STREAM)] == [2, 1]
    latest = store.revisions(STREAM, second)[0]
    assert (latest.revision, latest.head, latest.offsets) == (2, "h1", {"labels/1": 12})
    assert store.best_recall(STREAM) == {"x": 0.75, "y": 0.9}
    waiting = store.outbox()
    assert [(m.topic, m.key, m.value, m.headers) for m in waiting] == [
        ("model-versions", b"k", None, (("a", b"\x00\xff"),)),
        ("audit", None, b"v", ()),
    ]
    store.delete_outbox([waiting[0].id])
    assert [message.topic for message in store.outbox()] == ["audit"]


def test_classes_and_quarantine(store: LearnerStore) -> None:
    """A labeller gone wild may not fill the model with class names, and may be forgiven later."""
    learner = Learner(store)
    learner.step([label("e1", "x", at=0), label("e2", "y", at=1), label("e2", None, at=2, minute=1)])
    assert set(store.classes(STREAM)) == {"x", "y"}, "a name counts once it was named, even if withdrawn"
    assert store.classes_created_on(STREAM, NOW.date()) == 2
    assert store.classes_created_on(STREAM, NOW.date() + timedelta(days=1)) == 0
    message, place = label("e3", "z", at=9)
    assert isinstance(message, Label)
    for _ in range(2):
        with store.transaction(learner.epoch, NOW) as tx:
            tx.quarantine([Quarantined(message, place, "class_quota")])
    (held,) = store.quarantined(STREAM)
    assert (held.label, held.place, held.reason) == (message, place, "class_quota")
    with store.transaction(learner.epoch, NOW) as tx:
        tx.release([held.id])
    assert store.quarantined() == []


def test_another_seed_draws_another_sample(where: str) -> None:
    """A changed seed must not leave half the store drawn by the old one."""
    for seed in (1, 2):
        store = LearnerStore(where, {STREAM: ReplaySettings(policy="reservoir", size=5, seed=seed)})
        if seed == 1:
            Learner(store).step(batch_of(30))
            before = store.members(STREAM)
        else:
            after = store.members(STREAM)
            learner = Learner(store)
            learner.step(batch_of(30))
            assert store.members(STREAM) == after
        store.close()
    assert before != after


@pytest.mark.parametrize(
    "payload", ["", "köln ☀", np.array([[1.5, np.nan, -0.0]], np.float32), np.zeros((3, 0), np.float32)]
)
def test_a_payload_comes_back_as_it_was(payload: Payload) -> None:
    """A fine-tune must train on what was observed, missing values and all."""
    back = unpack(pack(payload))
    if isinstance(payload, str):
        assert back == payload
    else:
        assert isinstance(back, np.ndarray)
        np.testing.assert_array_equal(back, payload)
        assert back.dtype == np.float32


def test_a_store_of_another_schema_is_refused(where: str) -> None:
    """Writing into a schema that one does not know destroys it slowly."""
    store = LearnerStore(where)
    with store._write() as connection:
        connection.exec_driver_sql("UPDATE meta SET value = '99' WHERE name = 'schema'")
    store.close()
    with pytest.raises(Misconfigured, match="99"):
        LearnerStore(where)
    with pytest.raises(Misconfigured, match="cannot be opened"):
        LearnerStore(f"{where.rpartition('/')[0]}/no/such/folder/learner.db")


def test_reads_go_on_beside_a_transaction(store: LearnerStore) -> None:
    """The HTTP page must not wait for a batch, nor see half of one."""
    learner = Learner(store)
    learner.step(batch_of(20))
    found: list[dict[str, int]] = []
    with store.transaction(learner.epoch, NOW) as tx:
        tx.send([Outgoing("audit", None, b"v")])
        reader = threading.Thread(target=lambda: found.append(store.sizes()))
        reader.start()
        reader.join(timeout=10)
        assert not reader.is_alive()
    assert found[0]["outbox"] == 1
    assert store.sizes()["outbox"] == 2


CHILD = """
import sys
from replay.store import LearnerStore
from tests.replay.steps import Learner
from tests.replay.test_store import SMALL, batch_of
where, stop_after = sys.argv[1], int(sys.argv[2])
learner = Learner(LearnerStore(where, settings=SMALL))
class Stuck(Exception): pass
while True:
    first = (learner.position or 0) // 2
    if first == stop_after:
        apply = learner.apply
        def stuck(*args):
            apply(*args)
            print("inside", flush=True)
            sys.stdin.read()
        learner.apply = stuck
    learner.step(batch_of(5, classes=2, first=first))
    print(first, flush=True)
"""


def child(where: str, stop_after: int) -> subprocess.Popen[str]:
    """A learner in a process of its own, which stops inside its transaction at this event."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, where, str(stop_after)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def learned_whole_batches(store: LearnerStore) -> int:
    """Events learned; fails unless offsets, examples, ledger and outbox speak of the same batches."""
    position = store.offsets().get(("inbox", 0), 0)
    assert position % 10 == 0
    assert store.sizes()["examples"] == store.sizes()["served"] == store.sizes()["labels"] == position // 2
    assert store.sizes()["outbox"] == position // 10
    assert head_of(store) == head_due(store)
    return position // 2


def test_killed_inside_a_transaction_nothing_of_it_is_kept(where: str) -> None:
    """kill -9 at the worst moment: the batch is read again, and learned once."""
    process = child(where, stop_after=10)
    assert process.stdout is not None
    while process.stdout.readline() != "inside\n":
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = LearnerStore(where, settings=SMALL)
    assert learned_whole_batches(store) == 10
    Learner(store).step(batch_of(5, classes=2, first=10))
    assert learned_whole_batches(store) == 15
    store.close()


def test_killed_at_any_moment_the_store_is_whole(where: str) -> None:
    """Whatever instruction was running, offsets and effects agree; each life goes on from the last."""
    rng = random.Random(7)
    done = 0
    for _ in range(3):
        process = child(where, stop_after=-1)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = LearnerStore(where, settings=SMALL)
        now = learned_whole_batches(store)
        assert now > done
        done = now
        store.close()
