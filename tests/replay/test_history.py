"""What is read of the past is what was joined, and no more of it than was asked for."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from replay.history import History, Training
from replay.store import LearnerStore
from tests.replay.steps import ENCODER, NOW, STREAM, Learner, embed, label, prediction


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    made = Learner(LearnerStore(f"sqlite:///{tmp_path}/learner.db"))
    made.step([prediction(f"e{n}", "calm" if n % 2 else "storm", ref=n, at=n) for n in range(6)])
    for n in (3, 1, 0):
        made.now = NOW + timedelta(hours=10 - n)
        made.step([label(f"e{n}", "calm", at=10 + n, minute=n)])
    return made


def test_answers_come_in_the_order_of_their_labels(learner: Learner) -> None:
    """A curve over time must not have yesterday's labels after today's."""
    found = History(learner.store).judged(STREAM, 10)
    assert [(one.event_id, one.predicted, one.label) for one in found] == [
        ("e3", "calm", "calm"),
        ("e1", "calm", "calm"),
        ("e0", "storm", "calm"),
    ]
    assert found[0].predicted_at == NOW + timedelta(seconds=4)
    assert found[0].scored_at == NOW + timedelta(hours=7)
    assert len(History(learner.store).judged(STREAM, 2)) == 2
    assert History(learner.store).judged("elsewhere", 10) == []


def test_events_without_a_label_are_found(learner: Learner) -> None:
    """Who labels by hand is shown what nobody has labelled, and nothing twice."""
    history = History(learner.store)
    assert [one.event_id for one in history.unlabelled(STREAM, 10)] == ["e5", "e4", "e2"]
    assert [one.event_id for one in history.unlabelled(STREAM, 1)] == ["e5"]
    assert history.unlabelled("elsewhere", 10) == []
    assert set(history.newest()) == {STREAM}


def test_an_event_is_told_with_all_that_was_said_of_it(learner: Learner) -> None:
    """Before someone corrects a label they see who gave it."""
    learner.step([label("e3", None, at=20, minute=30), label("e3", "storm", at=21, minute=20, labeller="bob")])
    answered, said = History(learner.store).event(STREAM, "e3")
    assert answered is not None
    assert (answered.label, answered.ref.offset) == ("calm", 3)
    assert [(one.labeller, one.label) for one in said] == [("ann", None), ("bob", "storm")]
    assert History(learner.store).event(STREAM, "never") == (None, [])


def test_the_past_of_an_event_names_who_learned_it(learner: Learner) -> None:
    """What an answer was made from, and what a wrong label has reached, is asked at night."""
    store, epoch = learner.store, learner.epoch
    with store.transaction(epoch, NOW) as tx:
        run = tx.add_run(STREAM, "hand", state="running")
        tx.mark_trained(STREAM, run, ["e3", "e0"])
        for number, parent, by in ((1, None, None), (2, 1, run), (3, 2, None), (4, 1, None)):
            tx.add_version(STREAM, encoder=ENCODER, head="", state="promoted", number=number, parent=parent, run=by)
        tx.add_revision(STREAM, 1, head="a", ledger_seq=1)
        tx.add_revision(STREAM, 1, head="b", ledger_seq=3)
    learner.step([label("e3", "storm", at=30, minute=40)])
    past = History(store).past(STREAM, "e3")
    assert past.learned is not None
    assert (past.learned.label, past.learned.exam, past.learned.kept) == ("storm", False, True)
    assert [(one.label, one.added, one.revision) for one in past.taught] == [
        ("calm", True, "v1.1"),
        ("calm", False, None),
        ("storm", True, None),
    ]
    assert past.score is not None
    assert not past.score.right
    # A label that was corrected is out of what the versions can be made again from; e0's was not.
    trained = History(store).past(STREAM, "e0").trained
    assert [(one.version, one.own) for one in trained] == [("v2", True), ("v3", False)]
    assert History(store).past(STREAM, "e5").learned is None
    assert History(store).past(STREAM, "never").answered is None
    assert History(store).streams_of("e3", ["elsewhere", STREAM]) == [STREAM]


def test_a_version_s_training_is_told_from_what_is_still_here(learner: Learner) -> None:
    """A model card says from when to when its data is; an example that was corrected is no longer of it."""
    store = learner.store
    with store.transaction(learner.epoch, NOW) as tx:
        run = tx.add_run(STREAM, "hand", state="running")
        tx.mark_trained(STREAM, run, ["e3", "e0"])
        for number, by in ((1, None), (2, run)):
            tx.add_version(STREAM, encoder=ENCODER, head="", state="promoted", number=number, parent=None, run=by)
    history = History(store)
    second = NOW + timedelta(seconds=3)
    assert history.training(STREAM, 2) == Training(2, 2, NOW, second, {"calm": 2})
    learner.step([label("e0", "storm", at=30, minute=40)])
    assert history.training(STREAM, 2) == Training(2, 1, second, second, {"calm": 1})
    assert history.training(STREAM, 1) is None
    assert history.training("elsewhere", 2) is None


def test_what_was_forgotten_is_said_to_be_so_and_nothing_else(learner: Learner) -> None:
    """An explanation must not be where a forgotten event lives on."""
    with learner.store.transaction(learner.epoch, NOW) as tx:
        tx.forget(STREAM, ["e3"])
    past = History(learner.store).past(STREAM, "e3")
    assert past.forgotten_at == NOW
    assert (past.answered, past.said, past.learned, past.taught, past.score) == (None, (), None, (), None)


def test_the_nearest_examples_are_those_of_the_greatest_cosine(learner: Learner) -> None:
    """What is shown as speaking for an answer must be what is most like the event, not what is listed first."""
    names = [f"n{number}" for number in range(40)]
    learner.step([prediction(name, "calm", ref=100 + at, at=100 + at) for at, name in enumerate(names)])
    learner.step([label(name, "calm", at=200 + at) for at, name in enumerate(names)])
    rows = {row.event_id: row for row in learner.store.examples(STREAM, exam=False)}
    wanted = embed("anything")

    def cosine(event_id: str) -> float:
        row = rows[event_id].embedding.astype(float)
        return float(row @ wanted / np.linalg.norm(row) / np.linalg.norm(wanted.astype(float)))

    ranked = sorted(rows, key=cosine, reverse=True)
    found = History(learner.store).nearest(STREAM, ENCODER, wanted, 5)
    assert [one.event_id for one in found] == ranked[:5]
    assert found[0].similarity == pytest.approx(cosine(ranked[0]), abs=1e-5)
    assert found[0].payload is not None
    assert [one.event_id for one in History(learner.store).nearest(STREAM, ENCODER, wanted, 4, but=ranked[0])] == (
        ranked[1:5]
    )
    assert History(learner.store).nearest(STREAM, "another encoder", wanted, 5) == []
