"""The join: every choice between two messages is made by what they carry, not by which came first."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import pytest

from stream.events import Label, Place, Prediction
from stream.join import RULES, Change, EventKey, Joined, Kind, Known, Labelled, Lesson, Served, join, touched

NOW = datetime(2024, 5, 1, tzinfo=UTC)
KEY = ("s", "e")


def prediction(label: str | None = "x", *, ref: int = 10, at: int = 0) -> tuple[Prediction, Place]:
    made = Prediction(
        event_id="e",
        stream="s",
        label=label,
        probabilities={},
        novelty=0,
        model_version="v1.1",
        ref=Place(topic="reports", partition=0, offset=ref),
        observed_at=NOW,
        predicted_at=NOW,
    )
    return made, Place(topic="predictions", partition=0, offset=at)


def label(name: str | None, *, at: int = 0, minute: int = 0, labeller: str = "ann") -> tuple[Label, Place]:
    made = Label(event_id="e", stream="s", label=name, labeller=labeller, labelled_at=NOW + timedelta(minutes=minute))
    return made, Place(topic="labels", partition=0, offset=at)


def after(known: Known, joined: Joined) -> Known:
    """What a store knows once the changes are done, all events being readable."""
    labels: dict[EventKey, dict[str, Labelled]] = {key: dict(rows) for key, rows in known.labels.items()}
    for row in joined.labels:
        labels.setdefault(row.key, {})[row.labeller] = row
    learned = {**known.learned, **{change.key: change.desired for change in joined.changes}}
    scores = {**known.scores, **{score.key: score for score in joined.scores}}
    return Known(
        served={**known.served, **{row.key: row for row in joined.served}},
        labels=labels,
        learned={key: lesson for key, lesson in learned.items() if lesson is not None},
        scores={key: score for key, score in scores.items() if key not in joined.unscored},
    )


def told(*messages: Any, known: Known | None = None, rule: str = "latest") -> Known:
    """The state after these messages, one at a time."""
    known = known or Known()
    for message in messages:
        known = after(known, one(known, message, rule=rule))
    return known


def one(known: Known, *messages: Any, rule: str = "latest") -> Joined:
    predictions = [message for message in messages if isinstance(message[0], Prediction)]
    labels = [message for message in messages if isinstance(message[0], Label)]
    return join(known, predictions, labels, {"s": rule})


CASES: dict[str, tuple[list[Any], str | None]] = {
    "the latest of one labeller": ([label("a", at=0), label("b", at=1, minute=2), label("c", at=2, minute=1)], "b"),
    "equal in time, the last in the log": ([label("a", at=0), label("b", at=2), label("c", at=1)], "b"),
    "withdrawn": ([label("a", at=0), label(None, at=1, minute=1)], None),
    "withdrawn before it was given again": ([label("a", minute=2, at=2), label(None, at=1, minute=1)], "a"),
    "the latest over labellers": ([label("a", minute=1), label("b", minute=2, labeller="bob", at=1)], "b"),
    "equal over labellers, by name": ([label("a"), label("b", labeller="bob", at=1)], "b"),
    "one withdrew, the other stands": (
        [label("a"), label("b", labeller="bob", at=1, minute=1), label(None, labeller="bob", at=2, minute=2)],
        "a",
    ),
    "a repeat": ([label("a", at=0), label("a", at=1), label("a", at=2)], "a"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_permutation_ends_alike(case: str) -> None:
    """The whole point: label first, label twice, corrected, withdrawn, in whatever order."""
    messages, expected = CASES[case]
    messages = [*messages, prediction("x", ref=10, at=0), prediction("y", ref=10, at=1)]
    straight = told(*messages)
    for order in permutations(messages):
        assert told(*order) == straight
        assert after(Known(), one(Known(), *order)) == straight
    lesson = straight.learned.get(KEY)
    assert (lesson.label if lesson else None) == expected
    assert straight.served[KEY].label == "x"


def test_an_event_id_published_twice_is_joined_by_the_first() -> None:
    """Which of two events a label means can only be a convention; it must not depend on the worker's speed."""
    messages = [prediction("x", ref=10, at=1), prediction("y", ref=9, at=2), label("a")]
    states = [told(*order) for order in permutations(messages)]
    assert all(state == states[0] for state in states)
    assert states[0].served[KEY].ref.offset == 9
    assert states[0].learned[KEY].ref.offset == 9
    assert states[0].scores[KEY].predicted == "y"


def test_predictions_are_counted_by_what_they_are() -> None:
    """A worker that repeats itself and a producer that reuses ids are different faults."""
    joined = one(Known(), prediction(at=0), prediction(at=1), prediction(ref=11, at=2))
    assert joined.prediction_outcomes == {("s", "joined"): 1, ("s", "repeated"): 1, ("s", "repeated_event"): 1}
    assert len(joined.served) == 1
    again = one(after(Known(), joined), prediction(at=1))
    assert again.served == ()


@pytest.mark.parametrize(
    ("before", "message", "outcomes", "kind"),
    [
        ([], label("a"), {"waiting": 1}, None),
        ([prediction()], label("a"), {}, "learned"),
        ([prediction(), label("a")], label("a"), {"repeated": 1}, None),
        ([prediction(), label("a")], label("a", at=1, minute=1), {"repeated": 1}, None),
        ([prediction(), label("a", minute=1)], label("b", at=1), {"superseded": 1}, None),
        ([prediction(), label("a")], label("b", at=1, minute=1), {}, "corrected"),
        ([prediction(), label("a")], label(None, at=1, minute=1), {}, "withdrawn"),
        ([prediction(), label("a")], label("b", at=1, minute=1, labeller="bob"), {"disagreed": 1}, "corrected"),
        (
            [prediction(), label("a", minute=1)],
            label("b", at=1, labeller="bob"),
            {"disagreed": 1, "superseded": 1},
            None,
        ),
        ([prediction(), label("a")], label("a", at=1, labeller="bob"), {"repeated": 1}, None),
        ([label("a")], prediction(), {}, "learned"),
    ],
)
def test_each_label_is_counted_as_what_became_of_it(
    before: list[Any], message: Any, outcomes: dict[str, int], kind: str | None
) -> None:
    """Operators read the state of labelling from these counts alone."""
    joined = one(told(*before), message)
    assert joined.label_outcomes == {("s", name): count for name, count in outcomes.items()}
    assert [change.outcome for change in joined.changes if change.outcome] == ([kind] if kind else [])


def test_a_correction_within_one_batch_is_learned_once() -> None:
    """What was corrected before it was learned must not pass through the head."""
    joined = one(told(prediction()), label("a"), label("b", at=1, minute=1))
    assert [change.desired.label for change in joined.changes if change.desired] == ["b"]
    assert joined.label_outcomes == {("s", "superseded"): 1}


def test_scores_follow_the_label_that_counts() -> None:
    """Accuracy is of what was served, against what is known now."""
    state = told(prediction("x"))
    joined = one(state, label("x"))
    assert joined.first_scores == {("s", "right", "v1.1"): 1}
    state = after(state, joined)
    joined = one(state, label("y", at=1, minute=1))
    assert [score.right for score in joined.scores] == [False]
    assert not joined.first_scores, "a corrected score is not another event"
    state = after(state, joined)
    assert one(state, label(None, at=2, minute=2)).unscored == (KEY,)


def test_an_answer_of_no_class_is_wrong() -> None:
    """A stream that learned nothing yet must not look better than one that tries."""
    assert told(prediction(None), label("x")).scores[KEY].right is False


def test_kinds_of_change() -> None:
    """Only what was never read, or read from the wrong place, may cost a read of the log."""
    lesson = Lesson("a", Place(topic="t", partition=0, offset=1), NOW, NOW)
    moved = lesson._replace(ref=Place(topic="t", partition=0, offset=0))
    cases = {
        Kind.LEARN: (lesson, None),
        Kind.FORGET: (None, lesson),
        Kind.REREAD: (moved, lesson),
        Kind.RELABEL: (lesson._replace(label="b"), lesson),
        Kind.REDATE: (lesson._replace(labelled_at=NOW + timedelta(1)), lesson),
    }
    for kind, (desired, learned) in cases.items():
        change = Change("s", "e", desired, learned)
        assert change.kind is kind
        assert change.needs_event is (kind in (Kind.LEARN, Kind.REREAD))


def test_what_was_learned_outlives_the_join_index() -> None:
    """A correction may come after the prediction's row has been purged."""
    state = replace(told(prediction(), label("a")), served={})
    (change,) = one(state, label("b", at=1, minute=1)).changes
    assert (change.kind, change.outcome) == (Kind.RELABEL, "corrected")
    (change,) = one(state, label(None, at=1, minute=1)).changes
    assert change.kind is Kind.FORGET


def test_an_event_too_late_is_not_asked_for_again() -> None:
    """Its log segment is gone for good; each label of it would cost a failed read."""
    state = told(prediction())
    gone = replace(state, served={KEY: state.served[KEY]._replace(too_late=True)})
    joined = one(gone, label("a"))
    assert joined.changes == ()
    assert [score.label for score in joined.scores] == ["a"]
    again = one(gone, prediction(at=-1 + 1))
    assert again.served == (), "a repeat does not bring the event back"


def test_majority_counts_heads_before_dates() -> None:
    """Teams with several labellers may choose the rule by name."""
    votes = [label("a", labeller="ann"), label("a", labeller="bob", at=1), label("b", labeller="cid", at=2, minute=5)]
    for order in permutations([*votes, prediction()]):
        assert told(*order, rule="majority").learned[KEY].label == "a"
    assert told(prediction(), *votes).learned[KEY].label == "b"
    with pytest.raises(KeyError):
        told(*votes, rule="loudest")


def test_touched_names_every_event_once() -> None:
    """What is not asked for is not known, and would be learned twice."""
    assert touched([prediction(), prediction(at=1)], [label("a")]) == {KEY}
    assert touched([], []) == set()


def test_labels_of_several_streams_do_not_meet() -> None:
    """Event ids are unique within a stream only."""
    message, place = label("a")
    other = message.model_copy(update={"stream": "other"})
    joined = join(Known(), [prediction()], [(other, place)])
    assert joined.changes == ()
    assert [row.key for row in joined.served] == [KEY]
    assert isinstance(joined.served[0], Served)


# Confidence, and labels that become others


def said(labeller: str, name: str, minute: int, confidence: float | None = None) -> Labelled:
    return Labelled("storm", "e1", labeller, name, NOW + timedelta(minutes=minute), (0, minute), confidence)


def test_weighted_counts_votes_by_confidence() -> None:
    """Two who guess do not outvote one who knows; who says nothing of it counts in full."""
    rows = [said("ann", "quake", 1, 0.95), said("bob", "flare", 2, 0.4), said("eve", "flare", 3, 0.5)]
    assert RULES["weighted"](rows).label == "quake"
    assert RULES["majority"](rows).label == "flare"
    assert RULES["weighted"]([*rows, said("kim", "flare", 0)]).labeller == "eve"


def test_weighted_does_not_depend_on_the_order_of_labellers() -> None:
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in floating point, and must not decide a tie."""
    rows = [said("a", "x", 1, 0.1), said("b", "x", 2, 0.2), said("c", "x", 3, 0.3), said("d", "y", 0, 0.6)]
    picked = {RULES["weighted"](list(order)).label for order in permutations(rows)}
    assert len(picked) == 1
