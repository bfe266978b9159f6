"""The newest labels count more, exactly; and a race that a head which is no better hardly ever wins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.heads import HeadSums, quantise, solve
from learner.online import EncoderShelf, OnlineLearner
from learner.recency import MOST, STAKES, Heat, Newest, Race, RecencySettings
from tests.learner.desk import STREAM, Desk

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


# In the learner


FEW = RecencySettings(labels=10, weight=8, odds=2.0)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, recency=FEW)
    yield made
    made.close()


def newest_of(one: Desk) -> list[str]:
    """The ten taught labels with the latest times, found the slow way."""
    rows = one.store.examples(STREAM, exam=False)
    return [row.event_id for row in sorted(rows, key=lambda row: (row.labelled_at, int(row.event_id[1:])))[-10:]]


def due(one: Desk) -> HeadSums:
    """The second head's sums, taught from nothing: each example once, the newest as often as they count."""
    sums, newest = HeadSums(one.learner.sums.dimension, one.learner.sums.bound), newest_of(one)
    for row in one.store.examples(STREAM, exam=False):
        times = FEW.weight if row.event_id in newest else 1
        sums.add(np.stack([row.embedding] * times), [row.label] * times)
    return sums


def test_a_label_taken_back_leaves_both_heads_as_if_it_had_never_come(one: Desk) -> None:
    """Unlearning and corrections are exact in the second head too, and the label before moves up among the newest."""
    ids = one.say([(name, name, "ann") for _ in range(20) for name in ("class a", "class b")])
    assert one.learner._emphasised() == due(one)
    assert list(one.store.newest(STREAM, one.learner.encoder_digest, 10)) == newest_of(one)[::-1]
    withdrawn, corrected, forgotten = newest_of(one)[-3:]
    one.step([one.label(withdrawn, None, second=1_000)])
    one.step([one.label(corrected, "class c", second=1_001)])
    one.learner.forget([forgotten], one.now)
    assert not {withdrawn, forgotten} & set(one.store.newest(STREAM, one.learner.encoder_digest, 10))
    assert one.head_due()
    assert one.learner._emphasised() == due(one)
    assert len(ids) == 40


def test_the_head_that_leads_is_the_one_that_answers(one: Desk) -> None:
    """What the race decides must reach the workers, and nothing else of the race may change an answer."""
    one.say([(name, name, "ann") for _ in range(20) for name in ("class a", "class b")])
    for leader, sums in (("plain", one.learner.sums), ("newest", due(one))):
        one.learner.settle_race(Race(leader=leader))  # type: ignore[arg-type]
        one.learner._changed = True
        assert one.learner.announce(one.now, guard=False)
        expected, served = solve(sums, prior=one.learner.plan.prior), one.learner.serving.head
        assert expected is not None
        assert served is not None
        assert served.weight.tobytes() == expected.weight.tobytes()
        assert served.bias.tobytes() == expected.bias.tobytes()


def test_a_restart_goes_on_with_the_same_race_and_the_same_head(one: Desk) -> None:
    """Kept with the batch that it came of: no label counts twice or not at all, and the head has the same bits."""
    one.say([(name, name, "ann") for _ in range(20) for name in ("class a", "class b")], batch=5)
    one.say(
        [(name, other, "ann") for _ in range(20) for name, other in (("class a", "class b"), ("class b", "class a"))]
    )
    race, sums = one.learner.race, one.learner._emphasised()
    assert sum(race.seen.values()) == 80
    epoch = one.store.claim("again", one.now)
    shelf = EncoderShelf(one.learner._registry, "cpu")
    again = OnlineLearner(one.learner.plan, one.store, one.learner._registry, shelf, epoch, "versions", one.metrics)
    again.open(one.now)
    assert again.race == race
    assert again._emphasised() == sums
    unwanted = replace(one.learner.plan, recency=None)
    plain = OnlineLearner(unwanted, one.store, one.learner._registry, shelf, epoch, "versions", one.metrics)
    plain.open(one.now)
    assert plain.race == Race(), "who no longer wants a race has the plain head"


def test_the_world_that_turns_round_is_followed(one: Desk) -> None:
    """Two classes that change places: the newest labels are right where all labels together are still wrong."""
    one.say([(name, name, "ann") for _ in range(40) for name in ("class a", "class b")], batch=10)
    one.say(
        [(name, other, "ann") for _ in range(30) for name, other in (("class a", "class b"), ("class b", "class a"))],
        batch=4,
    )
    assert one.learner.race.changes > 0
