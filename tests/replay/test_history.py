"""What is read of the past is what was joined, and no more of it than was asked for."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from replay.history import History
from replay.store import LearnerStore
from tests.replay.steps import NOW, STREAM, Learner, label, prediction


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
