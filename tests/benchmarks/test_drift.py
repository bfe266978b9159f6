"""The drift benchmark's rules, on a small made-up world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import drift
from benchmarks.drift import Chance, Contestant, Run, Trimtab, judge, rows, tell, tune
from benchmarks.drift_streams import DELAY, KINDS, Learner, Pool, Story, Told, World
from learner.heads import quantise


def pool(count: int, centres: Sequence[float], seed: int) -> Pool:
    rng = np.random.default_rng(seed)
    classes = rng.integers(len(centres), size=count)
    points = rng.normal(size=(count, 6)) + np.array(centres)[classes][:, None]
    return Pool(quantise(points, 16.0), [f"class {number}" for number in classes])


@pytest.fixture(scope="module")
def world() -> World:
    """Two classes far apart, a third that is new, and a sensor that sticks on half of the events."""
    base = pool(2_000, (-3.0, 3.0), 1)
    on = np.arange(2_000) % 2 == 0
    return World(
        name="made-up",
        bound=16.0,
        base=base,
        block=10,
        other=pool(100, (-1.0, 1.0), 2),
        novel=Pool(pool(100, (9.0,), 3).embeddings, ["class 9"] * 100),
        broken={"dead_channel": (np.zeros_like(base.embeddings), on), "sensor_offset": (base.embeddings + 500, on)},
    )


def test_labels_come_late_and_speak_of_the_event_they_belong_to(world: World) -> None:
    """A label that came at once would let every detector see errors sooner than it can in life."""
    events = Story(world, 0).calm(0, 700)
    told = list(Learner(world).watch(events))
    assert [each.embedding is None for each in told] == [True] * DELAY + [False] * (700 - DELAY)
    for at in (DELAY, 350, 699):
        assert told[at].embedding is events[at - DELAY].embedding
    # Once taught, two classes that lie far apart are told apart.
    assert told[DELAY].wrong
    assert not any(each.wrong for each in told[2 * DELAY + 200 :])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_drift_changes_what_it_says(world: World, kind: str) -> None:
    """A drift that is not there cannot be found, and recall would be that of chance."""
    story = Story(world, 0)
    calm = story.calm(500, 1_500)
    for variant in (0, 1):
        drifting = story.drifting(kind, 500, 1_000, variant)
        assert len(drifting) == 1_000
        moved = sum(not np.array_equal(a.embedding, b.embedding) for a, b in zip(calm, drifting, strict=True))
        renamed = sum(a.label != b.label for a, b in zip(calm, drifting, strict=True))
        assert moved > 30 if variant == 0 or kind not in ("abrupt", "gradual", "recurring") else renamed > 30
    if kind == "recurring":
        assert all(np.array_equal(a.embedding, b.embedding) for a, b in zip(calm[500:], drifting[500:], strict=True))
    if kind == "new_class":
        assert {event.label for event in drifting} - set(world.base.labels) == {"class 9"}


def steady(length: int) -> list[Told]:
    return [Told("a", 0.1, np.zeros(2, np.int16), False)] * length


def test_tuning_takes_the_most_eager_setting_within_the_budget() -> None:
    """A rival with a shy setting would be beaten for the wrong reason."""
    tried = []

    def make(every: float, run: int) -> Chance:
        tried.append(every)
        return Chance(0.0 if every > 2 else 1.0, run)

    runs = [Run(6_000, steady(5_000), {})] * 2
    assert tune(Contestant("x", make, [1.0, 2.0, 3.0, 4.0]), runs) == 3.0
    assert 4.0 not in tried


def test_dummies_have_the_rows_that_they_must_have(world: World) -> None:
    """Whoever always cries finds everything; the table must show what that is worth beside it."""
    runs = [tell(world, 0, prefix=1_000, end=2_000, window=300)]
    outcomes = {
        name: {world.name: judge(Contestant(name, Chance, [chance]), chance, runs, prefix=1_000)}  # type: ignore[arg-type]
        for name, chance in (("always", 1.0), ("never", 0.0))
    }
    found = {(row.name, row.mode, row.metric): row.value for row in rows(outcomes)}
    for kind in (*KINDS, "all"):
        assert found["always", kind, "recall"] == found["always", kind, "delay"] == 1.0
        assert found["never", kind, "recall"] == 0.0
        assert ("never", kind, "delay") not in found
    assert found["always", "none", "false_alarms"] == 10_000
    assert found["never", "none", "false_alarms"] == 0


def test_the_monitor_is_told_what_the_joiner_tells_it(world: World) -> None:
    """It finds a plain drift through this door, and a twin of it does not disturb the run without drift."""
    runs = [tell(world, 0, prefix=1_000, end=2_000, window=600)]
    outcome = judge(Contestant("trimtab", lambda every, run: Trimtab(int(every)), [10_000]), 10_000, runs, prefix=1_000)
    assert outcome.found["dead_channel"][0] is not None
    assert outcome.false == 0


def test_without_data_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data sets are not part of the project."""
    assert drift.main(["--quick", "--data", str(tmp_path)]) == 2
    assert "--data" in capsys.readouterr().out
