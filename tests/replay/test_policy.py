"""Who stays in the replay store: fair, even over classes, and never a matter of order."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from replay.policy import Candidate, Policy, ReplaySettings, draw, eligible, priority, quotas, select

START = datetime(2024, 1, 1, tzinfo=UTC)
POLICIES: tuple[Policy, ...] = ("reservoir", "class_balanced", "window", "herding")


def candidate(event_id: str, label: str = "x", seed: int = 0, second: int = 0, point: object = None) -> Candidate:
    embedding = np.asarray([len(event_id), second] if point is None else point, dtype=np.int16)
    return Candidate(event_id, label, priority(seed, "s", event_id), START + timedelta(seconds=second), embedding)


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.text("abcdefgh", min_size=1, max_size=4),
        st.sampled_from("xyz"),
        st.just(0),
        st.integers(0, 3),
        st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    ),
    max_size=25,
    unique_by=lambda made: made.event_id,
)


@given(CANDIDATES, st.sampled_from(POLICIES), st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_changes_nothing(
    made: list[Candidate], policy: Policy, size: int, rng: random.Random
) -> None:
    """Labels come in any order; the store must not remember which."""
    shuffled = rng.sample(made, len(made))
    chosen = select(ReplaySettings(policy=policy, size=size), made)
    assert chosen == select(ReplaySettings(policy=policy, size=size), shuffled)
    assert len(chosen) == min(size, len(made))
    assert chosen <= {one.event_id for one in made}


@given(CANDIDATES, st.sampled_from(POLICIES[:3]), st.integers(1, 12))
def test_dropping_who_does_not_stay_changes_nothing(made: list[Candidate], policy: Policy, size: int) -> None:
    """Purging what is not kept must not move the choice; herding moves its mean, and is left out."""
    chosen = select(ReplaySettings(policy=policy, size=size), made)
    assert select(ReplaySettings(policy=policy, size=size), [one for one in made if one.event_id in chosen]) == chosen


def inclusions(trials: int, rank: int = 0) -> list[int]:
    """How often each of 20 positions is kept by a reservoir of 10, over seeds.

    `rank` spoils it on purpose, as a reservoir that draws from `count` instead of `count + 1` would.
    """
    kept = [0] * 20
    names = [f"event {position}" for position in range(20)]
    for seed in range(trials):
        made = [candidate(name, seed=seed) for name in names]
        if rank:
            # One early item in `rank` draws gives its place to a late one.
            made = made[:-1] if seed % rank else made[1:]
        for name in select(ReplaySettings(policy="reservoir", size=10, seed=seed), made):
            kept[names.index(name)] += 1
    return kept


def test_every_position_is_kept_equally_often() -> None:
    """A mean over positions hides an early bias; each position must be kept size/n of the time."""
    kept = inclusions(4_000)
    assert chisquare(kept).pvalue > 1e-3
    assert sum(kept) == 4_000 * 10


def test_the_test_of_fairness_can_fail() -> None:
    """A test that a biased reservoir passes would prove nothing."""
    assert chisquare(inclusions(4_000, rank=10)).pvalue < 1e-6


def test_every_position_of_a_class_is_kept_equally_often() -> None:
    """Balance over classes must not bring favour within them."""
    names = [f"event {position}" for position in range(24)]
    kept: Counter[str] = Counter()
    for seed in range(3_000):
        made = [candidate(name, "big" if index < 18 else "small", seed) for index, name in enumerate(names)]
        kept.update(select(ReplaySettings(policy="class_balanced", size=12, seed=seed), made))
    assert chisquare([kept[name] for name in names[:18]]).pvalue > 1e-3
    assert all(kept[name] == 3_000 for name in names[18:]), "a small class stays whole"


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 40), max_size=8), st.integers(1, 100))
def test_quotas_fill_like_water(counts: dict[str, int], size: int) -> None:
    """No class gets more than it has, no place is wasted, and no class is short while another has two more."""
    filled = quotas(counts, size)
    assert filled.keys() == {name for name, count in counts.items() if count}
    assert sum(filled.values()) == min(size, sum(counts.values()))
    assert all(0 <= filled[name] <= counts[name] for name in filled)
    short = [filled[name] for name in filled if filled[name] < counts[name]]
    assert not short or max(filled.values()) - min(short) <= 1


def test_quotas_of_a_small_class_go_to_the_others() -> None:
    """The ten labels of a rare class all stay, whatever the large ones have."""
    assert quotas({"rare": 10, "a": 500, "b": 500}, 100) == {"rare": 10, "a": 45, "b": 45}


def test_the_window_keeps_the_newest() -> None:
    """For a world that moves, what was observed last counts, not what was labelled last."""
    made = [candidate(f"e{second}", second=second) for second in range(10)]
    assert select(ReplaySettings(policy="window", size=3), made) == {"e7", "e8", "e9"}


def test_herding_stays_nearer_the_class_mean_than_chance() -> None:
    """The point of herding: a few examples whose mean stands for the class."""
    rng = np.random.default_rng(3)
    points = rng.normal(0, 1_000, (200, 8)).astype(np.int16)
    made = [candidate(f"e{index}", point=point) for index, point in enumerate(points)]

    def miss(policy: Policy) -> float:
        kept = select(ReplaySettings(policy=policy, size=10), made)
        rows = [index for index, one in enumerate(made) if one.event_id in kept]
        return float(np.linalg.norm(points[rows].mean(axis=0) - points.mean(axis=0)))

    assert miss("herding") < 0.2 * miss("class_balanced")


def test_herding_is_the_greedy_choice() -> None:
    """The shortened distance must choose what the paper's formula chooses."""
    rng = np.random.default_rng(4)
    points = rng.integers(-50, 50, (30, 3)).astype(np.int16)
    made = [candidate(f"e{index}", point=point) for index, point in enumerate(points)]
    mean, total, left, expected = points.mean(axis=0), np.zeros(3), set(range(30)), set()
    for count in range(1, 8):
        best = min(
            left,
            key=lambda index: (np.linalg.norm(mean - (total + points[index]) / count).round(9), made[index].priority),
        )
        left.remove(best)
        total = total + points[best]
        expected.add(f"e{best}")
    assert select(ReplaySettings(policy="herding", size=7), made) == expected


def test_herding_without_embeddings_says_so() -> None:
    """A silent fallback to another policy would be found only in the accuracy."""
    made = [Candidate(f"e{index}", "x", index, START) for index in range(3)]
    with pytest.raises(ValueError, match="embedding"):
        select(ReplaySettings(policy="herding", size=2), made)


@settings(max_examples=30)
@given(st.text(max_size=20))
def test_draws_fit_a_signed_column_and_never_change(text: str) -> None:
    """Stored draws are compared with new ones, by another process, years later."""
    assert 0 <= draw(text) < 2**63
    assert draw(text) == draw(text)


def test_draws_are_pinned() -> None:
    """Another hash would draw the whole store again, and move events between exam and training."""
    assert priority(0, "storm", "e1") == priority(0, "storm", "e1") != priority(1, "storm", "e1")
    assert priority(0, "storm", "e1") == 88912116608917796
    assert sum(eligible(0, "storm", f"e{n}", 5) for n in range(5_000)) == pytest.approx(1_000, abs=120)
