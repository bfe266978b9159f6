"""The newest labels count more, exactly; and a race that a head which is no better hardly ever wins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.heads import HeadSums, quantise
from learner.recency import MOST, STAKES, Heat, Newest, Race, RecencySettings

DIMENSION, BOUND = 6, 4.0
ROWS = quantise(np.random.default_rng(0).normal(0, 1, (40, DIMENSION)), BOUND)
ODDS = RecencySettings().odds


def sums_of(examples: list[tuple[int, str]], times: int = 1) -> HeadSums:
    sums = HeadSums(DIMENSION, BOUND)
    for _ in range(times):
        sums.add(ROWS[[row for row, _ in examples]].reshape(-1, DIMENSION), [label for _, label in examples])
    return sums


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 39), st.sampled_from(["a", "b", "c"]), max_size=20), min_size=1))
def test_what_is_held_last_is_all_that_counts(history: list[dict[int, str]]) -> None:
    """Unlearning: whatever was among the newest before, withdrawn or corrected since, leaves no bit behind."""
    newest = Newest(DIMENSION, BOUND)
    for held in history:
        newest.hold({str(row): (ROWS[row], label) for row, label in held.items()})
    assert newest.sums == sums_of(list(history[-1].items()))


def test_the_newest_count_as_if_they_had_been_taught_so_often() -> None:
    """A weight is no approximation: the sums are those of the same examples taught again, to the bit."""
    old, new = [(0, "a"), (1, "b"), (2, "a")], [(3, "b"), (4, "c")]
    newest = Newest(DIMENSION, BOUND)
    newest.hold({str(row): (ROWS[row], label) for row, label in new})
    plain = sums_of([*old, *new])
    expected = sums_of(new, 4)
    expected.merge(sums_of(old))
    assert newest.emphasised(plain, 4) == expected
    assert plain == sums_of([*old, *new]), "the plain head's own sums are left alone"


@pytest.mark.parametrize("seed", range(5))
def test_heads_that_are_alike_stay_as_they_are(seed: int) -> None:
    """Where neither head is better, the plain one stays: chance alone must not win the race."""
    chance = np.random.default_rng(seed)
    heats = [
        Heat("rare" if r < 0.05 else "usual", bool(p), not p)
        for r, p in zip(chance.random(3_000), chance.random(3_000) < 0.5, strict=True)
    ]
    assert Race().after(heats, ODDS).leader == "plain"


def test_a_fair_bet_gains_nothing() -> None:
    """Why the odds mean what they say: from any wealth of 1 or more, the mean of the next is the present."""
    start = Race(wealth=tuple(2.0 + stake for stake in STAKES), seen={"a": 90, "b": 10})
    for label in ("a", "b", "new"):
        won, lost = (start.after([Heat(label, not right, right)], ODDS).wealth for right in (True, False))
        assert np.allclose((np.array(won) + np.array(lost)) / 2, start.wealth)


def test_the_better_head_is_taken_early_or_late_and_given_up_again() -> None:
    """A world that begins to change after a long rest is noticed as fast as one that changes at once, both ways."""
    newest, plain = Heat("a", False, True), Heat("a", True, False)
    at_once = next(n for n in range(1, 1_000) if Race().after([newest] * n, ODDS).leader == "newest")
    rested = Race().after([plain] * 5_000, ODDS)
    assert rested.leader == "plain"
    late = rested.after([newest] * at_once, ODDS)
    assert late.leader == "newest"
    assert late.changes == 1
    assert late.after([plain] * at_once, ODDS).leader == "plain"


def test_a_rare_class_counts_as_much_as_a_frequent_one() -> None:
    """Else a head that finds the one anomaly in twenty loses to one that never says anomaly."""
    heats = [Heat("usual", True, False)] + [Heat("usual", True, True)] * 18 + [Heat("rare", False, True)]
    assert Race().after(heats * 60, ODDS).leader == "newest"
    alike = [Heat("usual", True, False), Heat("usual", False, True)] + [Heat("usual", True, True)] * 18
    assert Race().after(alike * 60, ODDS).leader == "plain"


def test_a_batch_is_worth_what_its_labels_are_one_by_one() -> None:
    """How labels fall into batches depends on the clock; a restart re-reads them otherwise, and must decide alike."""
    chance = np.random.default_rng(1)
    heats = [
        Heat(str(c), bool(p), bool(n))
        for c, p, n in zip(chance.integers(0, 3, 400), chance.random(400) < 0.5, chance.random(400) < 0.8, strict=True)
    ]
    whole = Race().after(heats, 50.0)
    parts = Race()
    for heat in heats:
        parts = Race.model_validate_json(parts.after([heat], 50.0).model_dump_json())
    assert parts == whole
    assert whole.changes > 0


def test_no_single_label_decides() -> None:
    """The first label of a new class weighs `MOST` at most, however many labels came before it."""
    after = Race(seen={"usual": 100_000}).after([Heat("new", False, True)], ODDS)
    assert np.allclose(after.wealth, 1.0 + np.array(STAKES))
    assert MOST < ODDS
