"""A pruned revision comes back from its line of lineage, bit for bit, or says what of it is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from learner.encoders import payload
from learner.heads import LinearHead
from learner.online import COMPACT_EVERY
from learner.rebuild import CannotRebuild
from learner.recency import Race, RecencySettings
from learner.registry import BrokenVersion
from learner.revive import Reviver
from learner.unlearning import forget
from replay import schema
from replay.policy import ReplaySettings
from replay.store import Payload, StoreSettings
from stream.events import Decoder, Place, StreamRules
from stream.lookback import events_at
from tests.learner.loop import CHANNELS, STREAM, Loop

KINDS = ("leak", "calm", "surge")
NAMES = [f"{kind}{number}" for number in range(14) for kind in KINDS]
KEPT = 20


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """Classes give to the exam from their sixth label on; the store's policy keeps 20 events."""
    made = Loop(tmp_path, StoreSettings(exam_from=6, exam_one_in=3), ReplaySettings(size=KEPT))
    yield made
    made.close()


def announced(loop: Loop, *event_ids: str) -> str:
    """Teach these and announce what is learned."""
    loop.teach(*event_ids)
    assert loop.learner.announce(loop.now, guard=False)
    return loop.learner.serving.name


def pruned(loop: Loop, *names: str) -> dict[str, LinearHead]:
    """The heads of these revisions, before they were pruned."""
    heads = {name: loop.registry.head(loop.registry.revision(STREAM, name).head or "") for name in names}
    loop.now += timedelta(hours=2)
    loop.registry.prune(STREAM, revisions=0, grace=timedelta(0))
    for name in names:
        with pytest.raises(BrokenVersion, match="pruned"):
            loop.registry.revision(STREAM, name)
    return {name: LinearHead.from_tensors(tensors) for name, tensors in heads.items()}


def reviver(loop: Loop) -> Reviver:
    def read_back(stream: str, places: Mapping[str, Place]) -> dict[str, Payload]:
        decoder = Decoder([StreamRules(STREAM, "telemetry", CHANNELS)])
        found = events_at(loop.log.read, decoder, {(stream, event_id): place for event_id, place in places.items()})
        return {event_id: payload(event, CHANNELS) for (_, event_id), event in found.items()}

    return Reviver(loop.store, loop.registry, read_back)


def same(one: LinearHead | None, other: LinearHead) -> bool:
    assert one is not None
    tensors, others = one.tensors(), other.tensors()
    return tensors.keys() == others.keys() and all(np.array_equal(tensors[key], others[key]) for key in tensors)


def test_a_pruned_revision_comes_back_bit_for_bit(loop: Loop) -> None:
    """Heads go after minutes, questions about an answer come after weeks: lineage is kept so that both may be."""
    young = announced(loop, *NAMES[:9])
    older = announced(loop, *NAMES[9:24])
    newer = announced(loop, *NAMES[24:])
    exam = [row.event_id for row in loop.store.examples(STREAM, exam=True)]
    assert set(exam) & set(NAMES[:9]), "some were taught before their class gave them to the exam"
    loop.now += 2 * COMPACT_EVERY
    loop.learner.save(loop.now)
    loop.now += 2 * COMPACT_EVERY
    loop.learner.save(loop.now)
    with loop.store.read() as connection:
        signs = set(connection.scalars(sa.select(schema.ledger.c.sign)))
    assert signs == {1}, "the ledger has let go of what cancels out"
    heads = pruned(loop, young, older, newer)
    for name, head in heads.items():
        found = reviver(loop).revive(STREAM, name)
        assert (found.outcome, found.largest, found.notes) == ("same", None, ())
        assert same(found.head, head)
    assert not same(heads[young], heads[newer])


def test_a_revision_of_an_encoder_that_was_replaced_is_embedded_again(loop: Loop) -> None:
    """A change of encoder begins the ledger anew; what was served the week before is asked about all the same."""
    name = announced(loop, *NAMES[:30])
    loop.rebase(1)
    loop.evict(next(row.event_id for row in loop.store.examples(STREAM, exam=False)))
    loop.teach(*NAMES[30:])
    head = pruned(loop, name)[name]
    found = reviver(loop).revive(STREAM, name)
    assert found.outcome == "same"
    assert same(found.head, head)
    assert found.notes[0] == "1 events were read back from the log"
    assert found.notes[1].endswith("embedded again, under the encoder of v1")
    loop.log.events.clear()
    with pytest.raises(CannotRebuild, match="the store and the log have let go of 1 of"):
        reviver(loop).revive(STREAM, name)


def test_a_head_in_which_the_newest_labels_count_more_comes_back_too(loop: Loop) -> None:
    """Which labels were the newest is part of what it was made of."""
    loop.teach(*NAMES[:20])
    learner = loop.learner
    learner.plan = replace(learner.plan, recency=RecencySettings(labels=5, weight=3))
    learner._load_sums()
    learner.race = Race(leader="newest")
    name = announced(loop, *NAMES[20:30])
    loop.teach(*NAMES[30:])
    head = pruned(loop, name)[name]
    found = reviver(loop).revive(STREAM, name)
    assert (found.outcome, same(found.head, head)) == ("same", True)


def test_what_was_forgotten_or_corrected_since_is_said(loop: Loop) -> None:
    """Another head under the same name would explain an answer by what never gave it."""
    name = announced(loop, *NAMES[:15])
    taught = [row.event_id for row in loop.store.examples(STREAM, exam=False)]
    loop.label(taught[0], "another")
    loop.now += 2 * COMPACT_EVERY
    loop.learner.save(loop.now)
    loop.now += 2 * COMPACT_EVERY
    loop.learner.save(loop.now)
    pruned(loop, name)
    with pytest.raises(CannotRebuild, match="1 of the 15 examples that its head held were withdrawn or corrected"):
        reviver(loop).revive(STREAM, name)
    forget([taught[1]], loop.learner, loop.trainer, loop.store, loop.now)
    with pytest.raises(CannotRebuild, match=r"2 of the 15 .* were forgotten on request \(1 of the stream were\)"):
        reviver(loop).revive(STREAM, name)


def test_the_ledger_may_be_past_its_retention(loop: Loop) -> None:
    """What the store's policy keeps outlasts the ledger; what it does not is gone, and that is said."""
    first = announced(loop, *NAMES[: KEPT - 2])
    second = announced(loop, *NAMES[KEPT - 2 :])
    with loop.store.transaction(loop.epoch, loop.now) as tx:
        tx.save_sums(STREAM, loop.learner.encoder_digest, loop.learner._seq, b"")
    heads = pruned(loop, first, second)
    whole = reviver(loop).revive(STREAM, first)
    assert (whole.outcome, same(whole.head, heads[first])) == ("same", True)
    members = loop.store.members(STREAM)
    assert {row.event_id for row in loop.store.examples(STREAM, exam=False)} - members
    loop.now += loop.store.settings.ledger_retention + timedelta(days=1)
    with loop.store.transaction(loop.epoch, loop.now) as tx:
        tx.purge()
    assert not len(loop.store.follow_ledger(STREAM, loop.learner.encoder_digest))
    with pytest.raises(CannotRebuild, match=r"past learner\.memory\.ledger_retention"):
        reviver(loop).revive(STREAM, second)


def test_the_store_alone_is_enough_where_the_ledger_is_past_its_retention(loop: Loop) -> None:
    """Every example that a small stream ever had is in the store: its heads can be made again for good."""
    name = announced(loop, *NAMES[: KEPT - 4])
    with loop.store.transaction(loop.epoch, loop.now) as tx:
        tx.save_sums(STREAM, loop.learner.encoder_digest, loop.learner._seq, b"")
    head = pruned(loop, name)[name]
    loop.now += loop.store.settings.ledger_retention + timedelta(days=1)
    with loop.store.transaction(loop.epoch, loop.now) as tx:
        tx.purge()
    assert not len(loop.store.follow_ledger(STREAM, loop.learner.encoder_digest))
    found = reviver(loop).revive(STREAM, name)
    assert (found.outcome, same(found.head, head)) == ("same", True)


def test_a_head_that_is_still_stored_is_compared_within_the_tolerance(loop: Loop) -> None:
    """Another build rounds otherwise: near is not the same, and far is not near."""
    name = announced(loop, *NAMES[:12])
    line = loop.store.revisions(STREAM, limit=1)[0]
    tensors = loop.registry.head(line.head)
    for factor, outcome in ((1 + 1e-5, "near"), (1.5, "other")):
        digest = loop.registry.put_head({**tensors, "weight": (tensors["weight"] * factor).astype(np.float32)})
        with loop.store._write() as connection:
            connection.execute(
                sa.update(schema.revisions).where(schema.revisions.c.revision == line.revision).values(head=digest)
            )
        found = reviver(loop).revive(STREAM, name)
        assert found.outcome == outcome
        assert found.largest == pytest.approx(abs(1 - 1 / factor), rel=0.1)
    loop.registry.prune(STREAM, revisions=0, grace=timedelta(0))
    loop.registry._remove(loop.registry._blob(digest))
    assert reviver(loop).revive(STREAM, name).outcome == "unproven"


def test_what_has_no_line_of_lineage_is_no_revision(loop: Loop) -> None:
    """A name that was mistyped must not be answered with some head."""
    for name, why in (("v1", "no revision"), ("v1.99", "no line of lineage")):
        with pytest.raises(CannotRebuild, match=why):
            reviver(loop).revive(STREAM, name)
