"""Where a rollback goes and whom it suspects, in every way in which versions have followed each other."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from learner.control import Refused
from learner.registry import Champion, HeadRef
from learner.retreat import SKEW, leaving, retreat

START = datetime(2026, 3, 1, tzinfo=UTC)
DIGEST = "0" * 64


def hour(number: float) -> datetime:
    return START + timedelta(hours=number)


def reigns(*versions: str) -> list[Champion]:
    """One after another, an hour each."""
    return [Champion(version=name, since=hour(at)) for at, name in enumerate(versions)]


def stored(version: str, *at: float) -> list[HeadRef]:
    """Revisions 1, 2, ... of a version, stored at these hours."""
    return [
        HeadRef(stream="s", version=version, revision=number, encoder=DIGEST, head=DIGEST, stored_at=hour(when))
        for number, when in enumerate(at, 1)
    ]


def test_a_version_is_left_for_the_one_before_it() -> None:
    """And all that came out of it is suspect with it."""
    found = retreat("s", reigns("v1", "v2", "v3"), [], "v2")
    assert found.target == "v1"
    assert found.since == hour(1) - SKEW
    assert [name for name in ("v1.9", "v2.0", "v2.400", "v3.1", "v30.1") if name in found.suspects] == [
        "v2.0",
        "v2.400",
        "v3.1",
    ]


def test_a_version_that_was_put_back_is_no_suspect() -> None:
    """After a first rollback somebody counts what the bad version did; the good one answers on by then."""
    history = reigns("v1", "v2", "v1", "v3")
    found = retreat("s", history, [], "v2")
    assert (found.target, dict(found.suspects.since)) == ("v1", {"v2": 0, "v3": 0})
    found = retreat("s", history, [], hour(0.5))
    assert (found.target, dict(found.suspects.since)) == ("v1", {"v2": 0, "v3": 0})
    found = retreat("s", history, [], hour(1.5))
    # v1 went into service again since then, and is new to nobody.
    assert (found.target, dict(found.suspects.since)) == ("v1", {"v3": 0})


def test_a_moment_within_one_version_goes_back_to_the_revision_before_it() -> None:
    """Labels that went wrong at noon must not take the morning with them, nor leave the version."""
    refs = stored("v1", 0.1, 0.2, 0.6, 0.8)
    found = retreat("s", reigns("v1"), refs, hour(0.5))
    assert found.target == "v1.2"
    assert found.since == hour(0.6) - SKEW
    assert "v1.2" not in found.suspects
    assert "v1.3" in found.suspects
    assert retreat("s", reigns("v1"), refs, "v1.3") == found


def test_a_moment_before_a_promotion_suspects_the_promoted() -> None:
    """The version that served at that moment is the way back; its later revisions were not the change."""
    found = retreat("s", reigns("v1", "v2"), stored("v1", 0.1, 0.7), hour(0.5))
    assert (found.target, dict(found.suspects.since)) == ("v1", {"v2": 0})


@pytest.mark.parametrize(
    ("versions", "since", "why"),
    [
        ([], "v1", "no version in service yet"),
        (["v1"], "v1", "the first version"),
        (["v1", "v2"], "v7", "never in service; there were: v1, v2"),
        (["v1"], "v1.1", "no revision of v1 before v1.1"),
        (["v1"], "v3.1", "never in service"),
        (["v1"], hour(-1), "nothing was in service before"),
        (["v1"], hour(5), "nothing was announced since"),
    ],
)
def test_what_cannot_be_is_refused_in_words(versions: list[str], since: str | datetime, why: str) -> None:
    """Whoever typed it at three in the morning must see what to type instead."""
    with pytest.raises(Refused, match=why):
        retreat("s", reigns(*versions), stored("v1", 0.1, 0.2), since)


@pytest.mark.parametrize(
    ("history", "target", "found", "left", "since"),
    [
        (("v1", "v2"), None, "v1", ["v2"], 1),
        (("v1", "v2", "v3"), None, "v2", ["v3"], 2),
        (("v1", "v2", "v3"), "v1", "v1", ["v2", "v3"], 1),
        # What was put back by hand is left once more, and only what it did since then counts.
        (("v1", "v2", "v1", "v2"), None, "v1", ["v2"], 3),
        # One that never served, refused by its exam: only the present one is left for it.
        (("v1", "v3"), "v2", "v2", ["v3"], 1),
    ],
)
def test_going_back_leaves_all_that_served_since(
    history: tuple[str, ...], target: str | None, found: str, left: list[str], since: int
) -> None:
    """Who is about to roll back is told of these and no others, before it is asked."""
    way = leaving("s", reigns(*history), target)
    assert (way.target, list(way.suspects.since), way.began) == (found, left, hour(since))
    assert way.since == (hour(since) if history[:since].count(left[0]) else hour(since) - SKEW)


@pytest.mark.parametrize(
    ("history", "target", "says"),
    [
        ((), None, "no version in service yet"),
        (("v1",), None, "first version"),
        (("v1", "v2"), "v2", "is in service"),
    ],
)
def test_there_may_be_nothing_to_leave(history: tuple[str, ...], target: str | None, says: str) -> None:
    """The first version cannot be rolled back past."""
    with pytest.raises(Refused, match=says):
        leaving("s", reigns(*history), target)
