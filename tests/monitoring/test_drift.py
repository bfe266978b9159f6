"""Drift: found when it comes, not found when it does not."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest

from monitoring.drift import DriftMonitor, DriftSettings, Kind, State

KINDS: tuple[Kind, ...] = ("input", "prediction", "error")


def feed(monitor: DriftMonitor, kind: Kind, draw: Callable[[], float], count: int) -> list[State]:
    """`count` values of one kind; the state after each."""
    return [monitor.update(kind, draw()) for _ in range(count)]


def test_errors_that_rise_are_a_drift_within_a_few_hundred() -> None:
    """An accuracy that falls from 90 to 60 % must be known before users tell us."""
    rng = random.Random(1)
    monitor = DriftMonitor()
    assert set(feed(monitor, "error", lambda: float(rng.random() < 0.1), 1000)) == {State.NONE}
    states = feed(monitor, "error", lambda: float(rng.random() < 0.4), 200)
    assert State.DRIFT in states
    assert monitor.drifts("error") >= 1


def test_a_warning_comes_before_the_drift() -> None:
    """The early detector is the looser one; without an order the word would mean nothing."""
    rng = random.Random(1)
    monitor = DriftMonitor()
    feed(monitor, "error", lambda: float(rng.random() < 0.05), 1000)
    states = feed(monitor, "error", lambda: float(rng.random() < 0.15), 1000)
    assert states.index(State.WARNING) < states.index(State.DRIFT)


def test_a_stream_that_learns_does_not_drift() -> None:
    """Errors that fall are why the stream is there; a retrain for them would be work for nothing."""
    rng = random.Random(2)
    monitor = DriftMonitor()
    for chance in (0.8, 0.5, 0.2, 0.05):
        feed(monitor, "error", lambda chance=chance: float(rng.random() < chance), 500)  # type: ignore[misc]
        feed(monitor, "prediction", lambda chance=chance: chance * rng.random(), 500)  # type: ignore[misc]
    assert monitor.drifts("error") == monitor.drifts("prediction") == 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
@pytest.mark.parametrize("shift", [2.0, -2.0])
def test_an_input_that_moves_is_a_drift_at_any_scale(scale: float, shift: float) -> None:
    """Embedding statistics have no unit that a threshold could be written in."""
    rng = random.Random(3)
    monitor = DriftMonitor()
    feed(monitor, "input", lambda: scale * rng.gauss(0, 1), 1000)
    assert monitor.drifts("input") == 0
    feed(monitor, "input", lambda: scale * rng.gauss(shift, 1), 200)
    assert monitor.drifts("input") >= 1


def test_an_input_that_spreads_is_a_drift() -> None:
    """A sensor that grows noisy keeps its mean."""
    rng = random.Random(4)
    monitor = DriftMonitor()
    feed(monitor, "input", lambda: rng.gauss(0, 1), 1000)
    feed(monitor, "input", lambda: rng.gauss(0, 4), 300)
    assert monitor.drifts("input") >= 1


def test_a_rising_novelty_is_a_drift() -> None:
    """Events like nothing that was learned are seen before their labels come."""
    rng = random.Random(5)
    monitor = DriftMonitor()
    feed(monitor, "prediction", lambda: rng.betavariate(1, 9), 1000)
    assert monitor.drifts("prediction") == 0
    feed(monitor, "prediction", lambda: rng.betavariate(4, 4), 200)
    assert monitor.drifts("prediction") >= 1


def test_false_drifts_are_rare() -> None:
    """At most one false drift in 10,000 values, over five distributions: what the setting promises by default."""
    values = 20_000
    found = 0
    for seed in range(1):
        rng = random.Random(seed)
        monitor = DriftMonitor()
        feed(monitor, "error", lambda: float(rng.random() < 0.1), values)  # noqa: B023
        feed(monitor, "prediction", lambda: rng.betavariate(1, 9), values)  # noqa: B023
        feed(monitor, "input", lambda: rng.lognormvariate(0, 2), values)  # noqa: B023
        other = DriftMonitor()
        feed(other, "error", lambda: float(rng.random() < 0.5), values)  # noqa: B023
        feed(other, "input", lambda: rng.gauss(0, 1) / max(abs(rng.gauss(0, 1)), 1e-9), values)  # noqa: B023
        found += sum(each.drifts(kind) for each in (monitor, other) for kind in KINDS)
    assert found <= 100_000 / 10_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_stream_has_neither_drift_nor_score(kind: Kind, value: float) -> None:
    """A variance of zero divides nothing."""
    monitor = DriftMonitor()
    assert set(feed(monitor, kind, lambda: value, 2000)) == {State.NONE}
    assert monitor.score(kind) == pytest.approx(0.0, abs=1e-6)


def test_a_constant_input_that_steps_is_a_drift() -> None:
    """A sensor that sticks at another value is the plainest change of all."""
    monitor = DriftMonitor()
    feed(monitor, "input", lambda: 7.0, 500)
    feed(monitor, "input", lambda: 7.5, 200)
    assert monitor.drifts("input") >= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_is_refused_and_changes_nothing(kind: Kind, value: float) -> None:
    """One NaN would silence a running mean for ever."""
    rng = random.Random(6)
    monitor, clean = DriftMonitor(), DriftMonitor()
    for index in range(600):
        draw = rng.random()
        if index % 100 == 0:
            with pytest.raises(ValueError, match=kind):
                monitor.update(kind, value)
        assert monitor.update(kind, draw) == clean.update(kind, draw)
        assert monitor.score(kind) == clean.score(kind)


def test_values_out_of_their_bounds_and_unknown_kinds_are_refused() -> None:
    """The guarantee holds for values from 0 to 1 only, so a wrong unit must not pass in silence."""
    monitor = DriftMonitor()
    for kind, value in (("error", 2.0), ("prediction", -0.1)):
        with pytest.raises(ValueError, match="outside 0 to 1"):
            monitor.update(kind, value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input, prediction, error"):
        monitor.update("latency", 0.5)  # type: ignore[arg-type]


def test_a_drift_is_held_for_a_while_and_then_over() -> None:
    """A gauge that is 2 for one value would never be scraped; one that stays 2 would cry for ever."""
    rng = random.Random(7)
    monitor = DriftMonitor(DriftSettings(hold=50))
    feed(monitor, "error", lambda: float(rng.random() < 0.1), 1000)
    while monitor.state("error") is not State.DRIFT:
        monitor.update("error", float(rng.random() < 0.5))
    states = feed(monitor, "error", lambda: 0.0, 60)
    assert states[:49] == [State.DRIFT] * 49
    assert states[-1] is State.NONE


def test_the_score_rises_with_the_change() -> None:
    """People look at the score while the state still says none."""
    rng = random.Random(8)
    monitor = DriftMonitor()
    feed(monitor, "prediction", lambda: 0.2 + 0.1 * rng.random(), 1000)
    calm = monitor.score("prediction")
    changed = []
    while monitor.state("prediction") is not State.DRIFT:
        monitor.update("prediction", 0.6 + 0.1 * rng.random())
        changed.append(monitor.score("prediction"))
    assert max(changed) > 4 > calm


def test_the_kinds_do_not_touch_each_other() -> None:
    """A drift of the inputs must not be told as one of the errors."""
    rng = random.Random(9)
    monitor = DriftMonitor()
    feed(monitor, "error", lambda: 0.0, 500)
    feed(monitor, "input", lambda: rng.gauss(0, 1), 500)
    feed(monitor, "input", lambda: rng.gauss(9, 1), 500)
    assert monitor.drifts("input") >= 1
    assert monitor.drifts("error") == monitor.drifts("prediction") == 0
    assert monitor.state("error") is State.NONE


def test_a_reset_forgets_values_and_keeps_counts() -> None:
    """After a new encoder the old statistics would be a drift for certain; a counter must not fall."""
    rng = random.Random(10)
    monitor = DriftMonitor()
    feed(monitor, "input", lambda: rng.gauss(0, 1), 500)
    feed(monitor, "input", lambda: rng.gauss(5, 1), 300)
    before = monitor.drifts("input")
    monitor.reset()
    feed(monitor, "input", lambda: rng.gauss(-80, 9), 1000)
    assert monitor.drifts("input") == before >= 1


def test_neighbours_that_are_alike_are_no_drift() -> None:
    """A sensor's values wander; a bound for values that do not depend on each other would cry hundreds of times.

    Values come in runs of 40. Two false drifts in 20,000 events are asked for; chance makes it six once in sixty times.
    """
    rng = np.random.default_rng(12)
    monitor = DriftMonitor()
    levels = np.repeat(rng.normal(size=(500, 4)), 40, axis=0)
    for vector in levels + 0.3 * rng.normal(size=levels.shape):
        monitor.update("input", vector)
    for rate in np.repeat(rng.choice([0.02, 0.3], size=500), 40):
        monitor.update("error", float(rng.random() < rate))
    assert monitor.drifts("input") + monitor.drifts("error") <= 5


def test_one_component_of_many_is_enough() -> None:
    """A dead channel leaves most of an embedding as it was, and its length too."""
    rng = np.random.default_rng(13)
    monitor = DriftMonitor()
    for row in range(2_600):
        vector = rng.normal(size=64)
        vector[5] = vector[5] if row < 2_000 else 1.0
        monitor.update("input", vector)
        assert row >= 2_000 or monitor.drifts("input") == 0
    assert monitor.drifts("input") >= 1


def test_other_shares_of_the_classes_answered_are_a_drift() -> None:
    """Answers are seen for every event and at once; labels come late and for few."""
    rng = random.Random(14)
    names = [f"class {number}" for number in range(30)]
    monitor = DriftMonitor()
    for _ in range(2_000):
        monitor.update("prediction", 0.1, answer=rng.choice(names))
    assert monitor.drifts("prediction") == 0
    for _ in range(400):
        monitor.update("prediction", 0.1, answer=rng.choice(names[:10]))
    assert monitor.drifts("prediction") >= 1


def test_another_encoder_begins_anew() -> None:
    """After a promotion every embedding differs, which is the learner's doing and no drift."""
    rng = np.random.default_rng(15)
    monitor = DriftMonitor()
    for space, dimension in (("one", 8), ("two", 8), ("two", 12)):
        for vector in rng.normal(size=(1_000, dimension)) + (5.0 if space == "two" else 0.0):
            monitor.update("input", vector, space=space)
    assert monitor.drifts("input") == 0


def test_a_setting_says_how_often() -> None:
    """What is asked for in plain events must move the height that a change has to reach."""
    found = []
    for every in (1_100, 1_000_000):
        rng = random.Random(16)
        monitor = DriftMonitor(DriftSettings(false_alarms_every=every))
        feed(monitor, "error", lambda: float(rng.random() < 0.1), 1_000)  # noqa: B023
        states = feed(monitor, "error", lambda: float(rng.random() < 0.25), 1_000)  # noqa: B023
        found.append(states.index(State.DRIFT) if State.DRIFT in states else 1_000)
    assert found[0] < found[1]


def test_the_state_stays_small() -> None:
    """A monitor a stream is kept for as long as the process runs."""
    rng = np.random.default_rng(11)
    monitor = DriftMonitor(DriftSettings(memory=512))
    sizes = []
    for _ in range(2):
        for vector in rng.normal(size=(2_000, 16)):
            monitor.update("input", vector)
            monitor.update("prediction", 0.1, answer="a class")
            monitor.update("error", 0.0)
        sizes.append(len(pickle.dumps(monitor._kinds)))
    assert sizes[1] <= 1.01 * sizes[0] < 1_000_000


@pytest.mark.parametrize(
    "settings",
    [{"false_alarms_every": 1_000, "warnings_every": 1_000}, {"warm_up": 100}, {"clock": 0}, {"memory": 100}],
)
def test_settings_without_sense_are_refused(settings: dict[str, int]) -> None:
    """A warning that is rarer than a drift would never be seen; a past too short to compare with says nothing."""
    with pytest.raises(ValueError):
        DriftSettings(**settings)
