"""What is asked for, how often and of what: on the real store, log in memory, encoder and head."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.asking import DAY, NOTICED, WAITING, AskingSettings, allowance, choose, interest
from replay.store import Transaction
from stream.errors import RetryLater
from stream.events import LabelRequest, Place, Prediction
from tests.learner.desk import STREAM, Desk

NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)
SETTINGS = AskingSettings(per_day=8, alike=0.999)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, asking=SETTINGS)
    yield made
    made.close()


def ask(desk: Desk) -> list[LabelRequest]:
    """Ask once; returns the requests in the outbox, all of them."""
    desk.asker.ask(STREAM, desk.joiner.embedded)
    return sent(desk)


def sent(desk: Desk) -> list[LabelRequest]:
    found = [message for message in desk.store.outbox() if message.topic == "label-requests"]
    requests = [LabelRequest.model_validate_json(message.value or b"") for message in found]
    assert [message.key for message in found] == [one.event_id.encode() for one in requests]
    return requests


def counted(desk: Desk, outcome: str) -> float:
    labels = {"stream": STREAM, "outcome": outcome}
    return desk.metrics.registry.get_sample_value("trimtab_label_requests_total", labels) or 0.0


def far(desk: Desk, count: int, novelty: float = 0.9) -> list[Prediction]:
    """Events no two of which are alike."""
    return [desk.event(f"strange {number}", "calm", novelty + number / 1_000) for number in range(count)]


# How many


@given(
    per_day=st.integers(1, 60),
    steps=st.lists(st.floats(0.0, 8.0), min_size=1, max_size=60),
)
def test_no_day_has_more_requests_than_its_budget(per_day: int, steps: list[float]) -> None:
    """People are promised so many a day; whenever the day is taken to begin."""
    asked: list[datetime] = []
    now = NOW
    for hours in steps:
        now += timedelta(hours=hours)
        asked += [now] * allowance(asked, now, per_day)
    assert max(sum(at - DAY < other <= at for other in asked) for at in asked) <= per_day


def test_a_quarter_at_once_and_the_rest_over_the_day() -> None:
    """Spent in the first minute, nothing would be left for what happens at noon."""
    assert allowance([], NOW, 40) == 10
    asked = [NOW] * 10
    assert allowance(asked, NOW, 40) == 0
    assert allowance(asked, NOW + timedelta(hours=3, seconds=1), 40) == 5
    assert allowance(asked, NOW + timedelta(hours=20), 40) == 10
    assert allowance([], NOW, 0) == 0
    assert allowance([], NOW, 1) == 1


# Of what


def test_novel_and_close_calls_are_of_interest_and_nothing_else() -> None:
    """What the model knows well teaches nothing; a label costs a person's time."""
    settings = AskingSettings(novelty=0.5, margin=0.3)
    assert interest(0.1, 0.9, 0.05, settings) is None
    assert interest(0.8, 0.9, 0.05, settings) == (0.8, "novel")
    assert interest(0.1, 0.4, 0.35, settings) == (pytest.approx(0.95), "uncertain")
    assert interest(0.99, 0.4, 0.35, settings) == (0.99, "novel")
    assert interest(float(np.float32(1.0000001)), 0.9, 0.0, settings) == (1.0, "novel")


def test_twins_are_passed_over_for_the_next_best() -> None:
    """Twice the same question is half the budget."""
    rows = np.eye(4)[[0, 0, 1, 2, 3]]
    chosen, twins = choose(rows, np.eye(4)[[2]], 0.9, 2)
    assert (chosen, twins) == ([0, 2], [1])
    assert choose(rows, np.eye(4)[[2]], 0.9, 9) == ([0, 2, 4], [1, 3])


def test_what_all_embeddings_share_makes_no_twins() -> None:
    """Windows of one machine have most of their embedding in common, and are not all the same for that."""
    chance = np.random.default_rng(0)
    rows = 100 + chance.normal(size=(8, 16))
    known = 100 + chance.normal(size=(40, 16))
    assert choose(rows, known, 0.9, 8)[0] == list(range(8))
    assert choose(known[:3], known, 0.9, 3) == ([], [0, 1, 2])


# The loop


def test_the_best_are_asked_within_the_budget_and_answered_by_a_label(desk: Desk) -> None:
    """The whole way: noticed, ranked, asked once with where the event lies, answered by an ordinary label."""
    dull = [desk.event("calm", "calm", 0.1) for _ in range(5)]
    desk.step([*dull, *far(desk, 6)])
    asked = ask(desk)
    assert [one.event_id for one in asked] == ["e10", "e9"], "a quarter of eight, the most novel first"
    assert (asked[0].why, asked[0].label, asked[0].ref.offset) == ("novel", "calm", 10)
    assert asked[0].score == pytest.approx(0.905)
    assert ask(desk) == asked, "the budget is spent"
    desk.now += timedelta(hours=3, minutes=1)
    assert [one.event_id for one in ask(desk)] == ["e10", "e9", "e8"]
    desk.step([desk.label("e10", "flare"), desk.label("e0", "calm")])
    assert desk.store.request_counts(STREAM) == {"waiting": 3, "open": 2, "answered": 1}
    assert (counted(desk, "asked"), counted(desk, "answered")) == (3, 1)
    desk.step([desk.label("e10", "flare", labeller="bob")])
    assert counted(desk, "answered") == 1, "answered once"
    page = desk.asker.page(STREAM, 10)
    assert (page["left"], page["open"], [row["event_id"] for row in page["requests"]]) == (5, 2, ["e9", "e8"])


def test_before_the_first_label_different_events_are_asked_about(desk: Desk) -> None:
    """A new stream knows nothing: everything is novel, and ten of the same would teach one class."""
    events = [desk.event(name, None, 1.0) for name in ("calm", "storm", "flare", "quake") for _ in range(3)]
    desk.log.events[1] = desk.log.events[1]._replace(
        value=(desk.log.events[0].value or b"").replace(b'"event_id":"e0"', b'"event_id":"e1"')
    )
    desk.step(events)
    assert [one.event_id for one in ask(desk)] == ["e0", "e10"]
    assert counted(desk, "alike") == 1


def test_what_has_a_label_is_not_asked_about(desk: Desk) -> None:
    """Before, in the same batch, and while it waited."""
    first, second, third = far(desk, 3)
    desk.step([desk.label(first.event_id, "a")])
    desk.step([first, second, desk.label(second.event_id, "b"), third])
    assert desk.store.request_counts(STREAM)["waiting"] == 1
    desk.step([desk.label(third.event_id, "c")])
    assert desk.store.request_counts(STREAM)["waiting"] == 0
    assert ask(desk) == []


def test_what_was_learned_meanwhile_is_not_asked_about(desk: Desk) -> None:
    """What waited was noticed by an older head; the newest one must still find it of interest."""
    desk.say([(name, name, "ann") for name in ("calm", "storm") for _ in range(30)])
    assert desk.learner.announce(desk.now)
    known, strange = desk.event("calm", "calm", 0.99), desk.event("never seen", "calm", 0.9)
    desk.step([known, strange])
    answer = desk.learner.serving.head
    assert answer is not None
    asked = ask(desk)
    assert known.event_id not in [one.event_id for one in asked]
    assert counted(desk, "known") + counted(desk, "alike") >= 1
    assert all(one.model_version == desk.learner.serving.name for one in asked)


def test_an_event_that_the_log_lost_is_not_asked_about(desk: Desk) -> None:
    """Nobody could look at it, and its label would come too late."""
    lost, kept = far(desk, 2)
    desk.log.gone.add(lost.ref)
    desk.step([lost, kept])
    assert [one.event_id for one in ask(desk)] == [kept.event_id]
    assert counted(desk, "gone") == 1


def test_what_waits_is_bounded_and_the_best_stay(desk: Desk) -> None:
    """A storm of novel events must not fill the database, nor push out what is worth most."""
    for start in range(0, 300, 20):
        chance = np.random.default_rng(start).permutation(20)
        desk.step([desk.event("odd", "calm", 0.5 + (start + int(i)) / 1_000) for i in chance])
    waiting = desk.store.requests(STREAM, "waiting", 1_000)
    assert len(waiting) == WAITING
    # Of each batch of twenty the best sixteen were noticed, of those the best 200 wait.
    best = sorted(
        (0.5 + (start + i) / 1_000 for start in range(0, 300, 20) for i in range(20 - NOTICED, 20)), reverse=True
    )
    assert [row.score for row in waiting] == pytest.approx(best[:WAITING])


def test_a_crash_neither_loses_a_request_nor_asks_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note that it was asked and the message are one transaction; what waits survives the process."""
    desk.step(far(desk, 2))

    def full(self: Transaction, messages: object) -> None:
        raise RetryLater("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "send", full)
        with pytest.raises(RetryLater):
            ask(desk)
    assert sent(desk) == []
    assert desk.store.request_counts(STREAM) == {"waiting": 2, "open": 0, "answered": 0}
    assert len(ask(desk)) == 2
    again = Desk(Path(str(desk.store._engine.url.database)).parent, asking=SETTINGS)
    again.log.events = desk.log.events
    assert len(ask(again)) == 2, "a learner that starts anew knows what was asked"
    again.close()


def test_a_repeated_prediction_is_not_asked_about_again(desk: Desk) -> None:
    """After a worker's crash predictions come twice."""
    events = far(desk, 1)
    desk.step(events)
    assert len(ask(desk)) == 1
    desk.step(events)
    assert desk.store.request_counts(STREAM) == {"waiting": 0, "open": 1, "answered": 0}


def test_forgotten_events_leave_no_request(desk: Desk) -> None:
    """What was asked about a person's message is a trace of it."""
    desk.step(far(desk, 3))
    ask(desk)
    desk.learner.forget(["e0", "e1", "e2"], desk.now)
    assert desk.store.request_counts(STREAM) == {"waiting": 0, "open": 0, "answered": 0}


def test_old_requests_are_let_go(desk: Desk) -> None:
    """What can no longer be joined is no open question, and the table must not grow for ever."""
    desk.step(far(desk, 3))
    ask(desk)
    for days, left in ((0.9, (1, 2)), (1.1, (0, 2)), (7.1, (0, 0))):
        with desk.store.transaction(desk.epoch, desk.now + timedelta(days=days)) as tx:
            tx.purge()
        counts = desk.store.request_counts(STREAM)
        assert (counts["waiting"], counts["open"]) == left


def test_a_renamed_class_is_renamed_in_what_is_asked(desk: Desk) -> None:
    """An open request must not show a class that is no more."""
    desk.say([("calm", "calm", "ann")])
    desk.step(far(desk, 1))
    desk.asker.ask(STREAM, desk.joiner.embedded)
    desk.curator.rename(STREAM, "calm", "quiet", merge=False)
    assert {row.answer for row in desk.store.requests(STREAM, "open", 9)} == {"quiet"}


def test_a_place_is_part_of_the_request(desk: Desk) -> None:
    """The event is not copied: whoever is to label it reads it there."""
    (event,) = far(desk, 1)
    desk.step([event])
    assert ask(desk)[0].ref == Place(topic="telemetry", partition=0, offset=0)
