"""What a retrain by hand names is what is trained; what it would be is told before; what it leaves out is not lost."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from learner.control import ControlRequest
from learner.finetune import FineTuneSettings, Retrain, Strategy
from replay.store import StoreSettings
from tests.learner.loop import START, STREAM, Loop

EVENING = START + timedelta(hours=12)
LATE = Retrain(observed_from=EVENING)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    """Leaks and calm hours by day; calm hours and surges in the evening."""
    made = Loop(tmp_path, StoreSettings(exam_from=4, exam_one_in=3))
    made.teach(*(f"{kind}{n}" for kind in ("leak", "calm") for n in range(10)))
    made.teach(*(f"{kind}{n}" for kind in ("calm", "surge") for n in range(20, 30)), observed_at=EVENING)
    made.learner.announce(made.now)
    yield made
    made.close()


def trained_on(loop: Loop) -> set[str]:
    """What the run that is going, or the last one, was given to train on."""
    return {row.event_id for row in loop.store.examples(STREAM, exam=False) if row.trained_in is not None}


def observed(loop: Loop, named: Retrain) -> set[str]:
    """The examples of a range that are not in the exam."""
    return {row.event_id for row in loop.store.examples(STREAM, exam=False) if named.covers(row.observed_at)}


def test_a_run_is_given_its_range_and_the_rest_stays_new(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says *from the evening on* means to keep the day out; who asks for the next run still wants the day in."""
    seen: list[set[str]] = []
    assert loop.run(monkeypatch, 1, lambda: seen.append(trained_on(loop)), named=LATE) == "promoted"
    assert seen == [observed(loop, LATE)]
    assert loop.course.labels_since == len(observed(loop, Retrain(observed_to=EVENING)))
    assert loop.run(monkeypatch, 2, lambda: seen.append(trained_on(loop))) in ("promoted", "refused")
    assert seen[1] == observed(loop, Retrain())
    assert loop.course.labels_since == 0


def test_a_range_begins_at_its_start_and_ends_before_its_end() -> None:
    """Two ranges that meet must share no event and lose none."""
    before, after = Retrain(observed_to=EVENING), Retrain(observed_from=EVENING)
    for at in (EVENING - timedelta(microseconds=1), EVENING, EVENING + timedelta(microseconds=1)):
        assert before.covers(at) != after.covers(at)
    assert after.covers(EVENING)


def test_a_plan_counts_what_a_run_is_given(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run that counts otherwise than the run would be worse than none."""
    named = Retrain(strategy="ewc", observed_from=EVENING)
    plan = loop.trainer.plan(STREAM, named)
    given = observed(loop, LATE)
    assert plan.examples == {kind: sum(event_id.startswith(kind) for event_id in given) for kind in ("calm", "surge")}
    assert (plan.strategy, plan.new, plan.memory) == ("ewc", len(given), 0)
    assert plan.left_out == len(observed(loop, Retrain(observed_to=EVENING)))
    assert plan.exam == len(loop.store.examples(STREAM, exam=True)) > 0
    assert (plan.refused, plan.seconds) == ((), None)
    assert "no run tells yet how long" in str(plan)
    assert loop.store.runs(STREAM) == []
    assert loop.course.requested == []
    assert loop.run(monkeypatch, 1, named=named) == "promoted"
    after = loop.trainer.plan(STREAM, named)
    assert (after.new, after.memory) == (0, len(given))
    assert after.seconds is not None
    loop.learner.pause(loop.now)
    assert "paused" in loop.trainer.plan(STREAM).notes[0]


@pytest.mark.parametrize(
    ("named", "why"),
    [
        (Retrain(observed_from=EVENING + timedelta(days=1)), "no example in the range"),
        (Retrain(observed_to=START), "no example in the range"),
        (Retrain(observed_from=START, observed_to=EVENING), "only examples of class 'calm'"),
    ],
)
def test_a_range_that_nothing_can_be_learned_from_is_refused(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, named: Retrain, why: str
) -> None:
    """A wrong day in a date is found before a core is spent on it, and the sentence says which days there are."""
    for number in range(10):
        loop.label(f"leak{number}", "calm")
    (said,) = loop.trainer.plan(STREAM, named).refused
    assert why in said
    assert "observed_from" in said
    assert EVENING.isoformat() in said
    # What was true when it was asked may not be any more when it begins.
    assert loop.run(monkeypatch, 1, named=named) == "failed"
    assert why in loop.store.runs(STREAM)[0].detail["reason"]
    assert trained_on(loop) == set()


def test_with_nothing_learned_or_one_class_any_retrain_is_refused(tmp_path: Path) -> None:
    """Whoever asks on the first day is told why nothing would come of it."""
    loop = Loop(tmp_path)
    assert "nothing to learn from yet" in loop.trainer.plan(STREAM).refused[0]
    loop.teach("leak1", "leak2")
    assert "takes two classes" in loop.trainer.plan(STREAM).refused[0]
    loop.close()


def test_a_strategy_that_cannot_go_with_the_settings_is_refused(loop: Loop) -> None:
    """The settings were checked when they were read; a strategy that comes later must be checked against them."""
    loop.course.finetune = FineTuneSettings(training="lora")
    (why,) = loop.trainer.plan(STREAM, Retrain(strategy="si")).refused
    assert "'lora'" in why
    assert loop.trainer.plan(STREAM, Retrain(strategy="mas")).refused == ()


def test_the_second_of_two_who_ask_for_different_things_is_told(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """One would else wait for a run by a strategy that it never gets."""
    told: list[tuple[str, ...]] = []

    def meanwhile() -> None:
        loop.trainer.request(STREAM, "hand", "looks odd", "first", LATE, "ann")
        assert "folded" in loop.trainer.request(STREAM, "hand", "", "second", LATE, "bob")
        told.append(loop.trainer.plan(STREAM, LATE).refused)
        told.append(loop.trainer.plan(STREAM, Retrain(strategy="mas")).refused)

    assert loop.run(monkeypatch, 1, meanwhile) == "promoted"
    assert told[0] == ()
    assert "ann's" in told[1][0]
    assert EVENING.isoformat() in told[1][0]
    assert loop.trainer._take(STREAM)
    loop.trainer._run(STREAM)
    run = loop.store.runs(STREAM)[0]
    assert run.detail["requests"] == ["first", "second"]
    assert run.detail["retrain"] == LATE.model_dump(mode="json", exclude_none=True)


def test_a_run_that_is_stopped_is_begun_again_as_it_was_asked_for(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgetting ends a run; the next one must not quietly be on all the data."""
    event = min(observed(loop, LATE))
    assert loop.run(monkeypatch, 1, lambda: _forget(loop, event), named=LATE) == "stopped"
    assert [wanted.named for wanted in loop.course.requested] == [LATE]


def _forget(loop: Loop, event_id: str) -> None:
    loop.trainer.forget(STREAM, [event_id], trained=False)


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"strategy": "ewcc"}, "strategy", [f"'{name}'" for name in get_args(Strategy)]),
        ({"observed_from": "last week"}, "observed_from", ["datetime"]),
        ({"observed_from": "2026-03-01T00:00:00"}, "observed_from", ["timezone"]),
        (
            {"observed_from": "2026-03-02T00:00:00Z", "observed_to": "2026-03-01T00:00:00Z"},
            "observed_to",
            ["not after observed_from"],
        ),
        ({"dry_run": "perhaps"}, "dry_run", ["boolean"]),
    ],
)
def test_a_wrong_value_is_told_with_its_field_and_what_is_allowed(
    fields: dict[str, object], field: str, allowed: list[str]
) -> None:
    """A typing error at night is mended by reading one line."""
    with pytest.raises(ValidationError) as refusal:
        ControlRequest.model_validate({"action": "retrain", "stream": STREAM, **fields})
    (error,) = refusal.value.errors()
    assert error["loc"] == (field,)
    assert [what for what in allowed if what not in error["msg"]] == []


@pytest.mark.parametrize(
    ("action", "fields"),
    [("rollback", {"dry_run": True}), ("pause", {"strategy": "ewc"}), ("retrain", {"version": "v3"})],
)
def test_a_field_that_the_action_does_not_have_is_refused(action: str, fields: dict[str, object]) -> None:
    """A rollback that is sent as a dry run must not be done."""
    with pytest.raises(ValidationError, match=f"{action} does not take {next(iter(fields))}"):
        ControlRequest.model_validate({"action": action, "stream": STREAM, **fields})
