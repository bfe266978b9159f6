"""A version's account says what the exam decided, and a comparison of two is what their answers are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.account import Examiner, checks, difference
from learner.exam import ExamSettings, examine
from replay.store import StoreSettings
from tests.learner.loop import STREAM, Loop

ANSWERS = st.sampled_from(["a", "b", "c", None])


@given(
    st.lists(st.tuples(st.sampled_from("abc"), ANSWERS, ANSWERS), max_size=60),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 20),
)
def test_the_account_and_the_verdict_never_disagree(
    rows: list[tuple[str, str | None, str | None]], look: int, improve: bool, least: int
) -> None:
    """A version refused while every rule reads \"yes\" would send its reader after the wrong thing."""
    labels, champion, candidate = ([row[at] for row in rows] for at in range(3))
    settings = ExamSettings(require_improvement=improve, minimum_examples=max(1, least))
    verdict = examine(
        labels,  # type: ignore[arg-type]
        champion,
        candidate,
        champion_classes=["a", "b"],
        candidate_classes=["a", "c"] if least % 3 == 0 else ["a", "b", "c"],
        look=look,
        settings=settings,
    )
    found = checks(verdict)
    assert all(check.passed for check in found) == verdict.promote
    assert sum(not check.passed for check in found) <= len(verdict.reasons)


def test_a_class_that_fell_is_named_with_its_numbers() -> None:
    """The words are read at night; they must have the class and how far it fell."""
    labels = ["a"] * 60 + ["b"] * 60
    candidate = ["b"] * 40 + ["a"] * 20 + ["b"] * 60
    (failed,) = [check for check in checks(examine(labels, labels, candidate)) if check.rule == "no class is worse"]
    assert not failed.passed
    assert "a from 100.0% to 33.3% of 60" in failed.found


@given(st.lists(st.tuples(st.sampled_from("abc"), ANSWERS, ANSWERS), max_size=60))
def test_every_changed_answer_is_listed_once_and_as_what_it_is(rows: list[tuple[str, str | None, str | None]]) -> None:
    """Lost and gained decide between two versions; a change of one wrong answer for another does not."""
    examples = [(f"e{number}", row[0]) for number, row in enumerate(rows)]
    found = difference("v1", "v2", examples, [row[1] for row in rows], [row[2] for row in rows])
    for kind, wanted in (
        ("lost", [row for row in rows if row[1] == row[0] != row[2]]),
        ("gained", [row for row in rows if row[2] == row[0] != row[1]]),
        ("wrong", [row for row in rows if row[0] not in row[1:] and row[1] != row[2]]),
    ):
        assert sum(one.kind == kind for one in found.changed) == len(wanted)
    assert sum(one.lost for one in found.classes) == sum(one.kind == "lost" for one in found.changed)
    assert sum(one.gained for one in found.classes) == sum(one.kind == "gained" for one in found.changed)
    assert found.n == len(rows)
    falls = [one.after - one.before for one in found.classes]
    assert falls == sorted(falls)


def test_better_and_worse_are_each_other_s_mirror() -> None:
    """Whoever turns A and B round must read the same of the same classes."""
    chance = random.Random(0)
    labels = [chance.choice("ab") for _ in range(300)]
    weak = [label if label == "a" or chance.random() < 0.5 else "a" for label in labels]
    examples = [(str(number), label) for number, label in enumerate(labels)]
    there, back = difference("A", "B", examples, labels, weak), difference("B", "A", examples, weak, labels)
    assert {one.label: one.outcome for one in there.classes} == {"b": "worse", "a": "not_worse"}
    assert {one.label: one.outcome for one in back.classes} == {"b": "better", "a": "not_worse"}


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path, StoreSettings(exam_from=2, exam_one_in=2))
    made.teach(*(f"{kind}{number}" for kind in ("leak", "calm", "surge") for number in range(12)))
    made.learner.announce(made.now)
    yield made
    made.close()


def test_two_versions_are_compared_as_a_rollback_would_bring_them(loop: Loop) -> None:
    """The question at night is what would be answered by the other version now, with all that was learned since."""
    first = loop.learner.serving.name
    loop.rebase(1)
    loop.learner.announce(loop.now)
    told: list[str] = []
    examiner = Examiner(loop.store, loop.registry, told=told.append)
    found = examiner.compare(STREAM, "v1", "v2")
    exam = loop.store.examples(STREAM, exam=True)
    assert found.n == len(exam) > 5
    # v2 is in service with just that head.
    served = loop.learner.serving.head
    assert served is not None
    embeddings = loop.learner.encoder.embed([row.payload for row in exam])
    right = sum(answer == row.label for answer, row in zip(served.predict(embeddings), exam, strict=True))
    assert found.accuracy[1] == right / len(exam)
    assert not found.same_encoder
    assert any("under v1" in line for line in told), "v1's embeddings are made again"
    assert not any("under v2" in line for line in told), "the store has those of v2"
    # A revision is taken as it was: it does not know what was taught after it.
    loop.teach(*(f"storm{number}" for number in range(12)))
    loop.learner.announce(loop.now)
    exact = examiner.compare(STREAM, first, "v2")
    storms = [one for one in exact.classes if one.label == "storm"]
    assert storms
    assert storms[0].before == 0.0
    assert {one.before for one in exact.changed} <= {"leak", "calm", "surge"}
