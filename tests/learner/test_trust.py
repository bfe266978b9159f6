"""Who is suspected, and above all who is not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from learner.trust import Claim, TrustSettings, excess, review

NOW = datetime(2024, 5, 1, tzinfo=UTC)
CLASSES = list("abcdefgh")


def claims(
    count: int, *, rates: dict[str, float], seed: int = 0, hard: dict[str, set[str]] | None = None, start: int = 0
) -> list[Claim]:
    """Claims by labellers who are contradicted at these rates.

    Args:
        hard: by labeller, the classes that it alone labels.
    """
    chance = np.random.default_rng(seed)
    made = []
    for at in range(count):
        who = str(chance.choice(sorted(rates)))
        of = sorted((hard or {}).get(who, CLASSES))
        reference = str(chance.choice(of))
        other = str(chance.choice([name for name in CLASSES if name != reference]))
        label = other if chance.random() < rates[who] else reference
        made.append(Claim(f"e{start + at}", who, label, NOW + timedelta(seconds=start + at), reference, reference))
    return made


def test_the_risk_difference_is_mantel_s_and_haenszel_s() -> None:
    """Two strata worked out by hand: 3 of 10 against 1 of 10, and 2 of 5 against 5 of 20."""
    mine, bad, strata = [], [], []
    for stratum, a, n1, b, n0 in (("x", 3, 10, 1, 10), ("y", 2, 5, 5, 20)):
        for who, wrong, total in ((True, a, n1), (False, b, n0)):
            mine += [who] * total
            strata += [stratum] * total
            bad += [True] * wrong + [False] * (total - wrong)
    found = excess(range(len(mine)), strata, np.array(bad), np.array(mine))
    assert found is not None
    weights = 10 * 10 / 20 + 5 * 20 / 25
    assert found[0] == pytest.approx((5 * 0.2 + 4 * 0.15) / weights)
    # In one stratum this is the variance of Sato by his formula (his equation for D = 1).
    one = excess(range(20), strata[:20], np.array(bad[:20]), np.array(mine[:20]))
    assert one is not None
    p, q = (100 * 1 - 100 * 3 + 0) / 400, (3 * 9 + 1 * 7) / 40
    assert one[1] == pytest.approx((0.2 * p + q) ** 0.5 / 5)


def test_nobody_is_compared_without_overlap() -> None:
    """Labellers of different classes have nothing in common that one of them could be worse at."""
    apart = claims(2_000, rates={"ann": 0.0, "bob": 0.5}, hard={"ann": {"a", "b"}, "bob": {"c", "d"}})
    assert review(apart).suspect is None


def test_a_drifting_world_makes_no_suspect() -> None:
    """Whoever labels after a change is contradicted more than whoever labelled before it."""
    before = claims(1_000, rates={"ann": 0.01}, seed=1)
    after = claims(1_000, rates={"bob": 0.3}, seed=2, start=1_000)
    assert review(before + after).suspect is None


def test_a_hard_stream_makes_no_suspect() -> None:
    """Where everybody is contradicted often, being so is nothing to be blamed for."""
    for seed in range(8):
        assert review(claims(2_000, rates={"ann": 0.3, "bob": 0.3, "eve": 0.33}, seed=seed)).suspect is None


def test_a_lone_labeller_is_never_a_suspect() -> None:
    """Nothing tells a changed labeller from a changed world then."""
    assert review(claims(1_000, rates={"ann": 0.01}) + claims(500, rates={"ann": 0.5}, start=1_000)).suspect is None


def test_the_turn_is_found() -> None:
    """What was right before stays: the suspicion begins about where the labels went bad."""
    good = claims(1_000, rates={"ann": 0.02, "bob": 0.02})
    bad = claims(600, rates={"ann": 0.02, "bob": 0.4}, seed=3, start=1_000)
    suspect = review(good + bad).suspect
    assert suspect is not None
    assert suspect.labeller == "bob"
    assert abs((suspect.since - NOW).total_seconds() - 1_000) < 60
    assert not suspect.wholly
    covered = [claim for claim in good + bad if suspect.covers(claim)]
    assert {claim.labeller for claim in covered} == {"bob"}
    assert all(claim.contradicted for claim in covered)


def test_who_is_nearly_always_contradicted_is_set_aside_wholly() -> None:
    """What the head bears out of one who is mostly wrong is chance."""
    suspect = review(claims(800, rates={"ann": 0.02, "bob": 0.9})).suspect
    assert suspect is not None
    assert suspect.wholly


def test_nobody_is_compared_with_a_known_suspect() -> None:
    """What is left of a bad labeller is what was borne out, beside which an honest one looks bad."""
    rows = claims(1_000, rates={"ann": 0.25, "bob": 0.0}, seed=4)
    suspect = review(rows).suspect
    assert suspect is not None
    assert suspect.labeller == "ann"
    assert review(rows, suspects=[type(suspect)("bob", NOW, "")]).suspect is None


def test_order_does_not_matter() -> None:
    """The review is of what is stored, not of how it came."""
    rows = claims(1_200, rates={"ann": 0.02, "bob": 0.2})
    shuffled = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
    assert review(rows) == review(shuffled)


# Bursts


def poison(count: int, references: list[str], start: int = 1_000) -> list[Claim]:
    return [
        Claim(f"e{start + at}", "bob", "h", NOW + timedelta(seconds=start + at), reference, reference)
        for at, reference in zip(range(count), references * count, strict=False)
    ]


def test_a_burst_names_its_events_and_spares_its_labeller() -> None:
    """One bad hour is not a bad labeller; and of the class's labels those that are borne out stay."""
    good = claims(1_000, rates={"ann": 0.02, "bob": 0.02})
    found = review(good + poison(60, ["a", "b", "c", "d", "h"]))
    (burst,) = found.bursts
    assert (burst.labeller, burst.label) == ("bob", "h")
    assert len(set(burst.event_ids) & {f"e{1_000 + at}" for at in range(60) if at % 5 != 4}) == 48
    assert found.suspect is None


@pytest.mark.parametrize("references", [["a"], ["a", "b"], ["a", "a", "a", "b", "c"]])
def test_a_class_whose_meaning_moved_is_no_burst(references: list[str]) -> None:
    """It takes its events from one class, or two, and not from everywhere."""
    assert review(claims(1_000, rates={"ann": 0.02, "bob": 0.02}) + poison(60, references)).bursts == ()


def test_a_broken_sensor_is_no_burst() -> None:
    """Where everything is contradicted, one class's labels are no worse than the rest."""
    late = claims(400, rates={"ann": 0.9, "bob": 0.9}, start=2_000, seed=8)
    assert review(claims(1_000, rates={"ann": 0.02, "bob": 0.02}) + late).bursts == ()


def test_honest_labellers_are_left_alone_at_the_shipped_sureness() -> None:
    """A review every 250 labels for years must not accuse the innocent: none in 60 windows of two labellers."""
    settings = TrustSettings()
    for seed in range(60):
        found = review(claims(400, rates={"ann": 0.04, "bob": 0.04}, seed=seed), settings)
        assert found.suspect is None
        assert found.bursts == ()
