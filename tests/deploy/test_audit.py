"""The judge of answers, without Kafka: every way in which an event can be answered, once and otherwise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deploy.audit import NAMED, Answers, Audit
from stream.events import Place


def place(offset: int) -> Place:
    return Place(topic="reports", partition=0, offset=offset)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=30), st.integers(0, 30), st.booleans())
def test_every_place_is_judged_by_its_answers(events: list[tuple[int, bool]], committed: int, exactly: bool) -> None:
    """Neither a lost event nor a second answer may escape the audit, or hide behind the other."""
    answers, audit = Answers(), Audit("exactly_once" if exactly else "at_least_once")
    for offset, (predictions, parked) in enumerate(events):
        answers.event(place(offset))
        for _ in range(predictions):
            answers.prediction(("notes", f"e{offset}"), place(offset), None)
        if parked:
            answers.parked(place(offset))
    answers.judge(audit, {("reports", 0): committed})
    found = [count + parked for count, parked in events]
    assert audit.places == len(events)
    assert audit.unanswered == sum(count == 0 for count in found[:committed])
    assert audit.waiting == sum(count == 0 for count in found[committed:])
    assert audit.answered_twice == sum(count > 1 for count in found)
    assert audit.kept == (audit.unanswered == 0 and not (exactly and audit.answered_twice))


def test_a_correction_and_an_event_that_has_gone_are_no_second_answers() -> None:
    """A reissued answer and one whose event expired are rightly there; as breaches they would hide real ones."""
    answers, audit = Answers(), Audit("exactly_once")
    answers.event(place(5))
    answers.prediction(("notes", "e5"), place(5), None)
    answers.prediction(("notes", "e5"), place(5), "v1.2")
    answers.prediction(("notes", "e1"), place(1), None)
    answers.judge(audit, {("reports", 0): 6})
    assert audit.kept
    assert (audit.superseding, audit.expired_places, audit.answered) == (1, 1, 1)


def test_an_event_id_published_twice_is_counted_and_is_no_breach() -> None:
    """Two places, two answers: the producer repeated itself, trimtab did not."""
    answers, audit = Answers(), Audit("exactly_once")
    for offset in (1, 2):
        answers.event(place(offset))
        answers.prediction(("notes", "e"), place(offset), None)
    answers.judge(audit, {})
    assert audit.kept
    assert audit.repeated_events == 1


def test_a_breach_names_a_few_and_counts_the_rest() -> None:
    """A million lost events must not print a million lines, and one must be found without a search."""
    audit = Audit("exactly_once")
    audit.breach("lost", list(range(NAMED + 5)))
    assert audit.breaches[0].startswith("lost: 0, 1, ")
    assert audit.breaches[0].endswith("and 5 more")
