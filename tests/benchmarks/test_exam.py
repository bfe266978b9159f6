"""The exam's benchmark: candidates must be what their kind says, or its counts say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.exam import MAKERS, TAUGHT, UNTAUGHT, Candidate, World, judge, no_less_accurate, seen
from learner.exam import ExamSettings

NAMES = [f"class-{number}" for number in range(8)]


def made(kind: str, seed: int = 0) -> Candidate:
    """A candidate among eight classes that lie apart but for a tenth of their examples."""
    chance = np.random.default_rng(seed)
    centres = chance.normal(size=(8, 1, 24)) * 0.5
    embeddings = np.clip(centres + 0.4 * chance.normal(size=(8, TAUGHT + UNTAUGHT, 24)), -4, 4)
    few = 12 if kind == "better: more components" else None
    return MAKERS[kind](World(embeddings, 4.0, NAMES, chance, components=few), chance)


@pytest.mark.parametrize(
    ("kind", "fall"),
    [
        ("class unlearned", 0.5),
        ("class down 10 points", 0.1),
        ("classes swapped", 0.5),
        ("labels flipped", 0.3),
        ("numbers broken", 1.0),
        ("wrong head order", 0.5),
    ],
)
def test_what_is_called_harmful_does_harm_and_is_refused(kind: str, fall: float) -> None:
    """Harm is measured on what nobody was taught, not taken from the name of the kind."""
    candidate = made(kind)
    assert candidate.harmful
    assert candidate.worst_fall >= fall - 1e-9
    assert not judge(candidate, UNTAUGHT, ExamSettings()).promote


@pytest.mark.parametrize("kind", ["better: more components", "equal: 5 % changed"])
def test_what_is_called_good_is_no_worse_and_promoted(kind: str) -> None:
    """An exam that refuses everything would promote nothing harmful either."""
    candidate = made(kind)
    before = World.answers(candidate.world, candidate.world.champion)
    assert sum(a == b for a, b in zip(candidate.answers, candidate.world.labels, strict=True)) >= sum(
        a == b for a, b in zip(before, candidate.world.labels, strict=True)
    )
    assert judge(candidate, UNTAUGHT, ExamSettings()).promote
    assert no_less_accurate(candidate, UNTAUGHT)


def test_what_chance_hides_is_measured() -> None:
    """A fall of ten points is as good as invisible on five examples, one of forty on a hundred is not."""
    assert seen(5, 0.10, 0.0, 3, ExamSettings()) == 0.0
    assert seen(100, 0.40, 0.0, 3, ExamSettings()) == 1.0
