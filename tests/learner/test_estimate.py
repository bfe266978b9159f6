"""The accuracy before labels come: no number without evidence, and an error that is shown once they are there."""

from __future__ import annotations

import numpy as np
import pytest

from learner.estimate import METHODS, AccuracyEstimator, Method


def stream(estimator: AccuracyEstimator, right: float, count: int, *, labelled: bool, seed: int) -> None:
    """Predictions right so often, and surer where they are; labelled at once or never."""
    chance = np.random.default_rng(seed)
    for number in range(count):
        event = f"{seed}/{number}"
        hit = bool(chance.random() < right)
        estimator.predicted(event, float((0.9 if hit else 0.55) + chance.normal(0, 0.03)))
        if labelled:
            estimator.scored(event, hit)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_said_before_there_are_labels(method: Method) -> None:
    """A gauge that shows a guess without evidence would be believed."""
    estimator = AccuracyEstimator(method)
    stream(estimator, 0.8, 200, labelled=False, seed=0)
    assert estimator.estimate() is None
    assert estimator.error() is None


@pytest.mark.parametrize("method", METHODS)
def test_on_a_steady_stream_every_method_is_near(method: Method) -> None:
    """Where nothing moved, and confidence is honest, each must find the accuracy that labels will show."""
    estimator = AccuracyEstimator(method)
    stream(estimator, 0.7, 600, labelled=True, seed=1)
    stream(estimator, 0.7, 500, labelled=False, seed=2)
    said, error = estimator.estimate(), estimator.error()
    assert said is not None
    assert error is not None
    assert said == pytest.approx(0.7, abs=0.12)
    assert abs(error) < 0.12


@pytest.mark.parametrize("method", ["average", "difference", "threshold"])
def test_a_fall_is_seen_before_its_labels_come(method: Method) -> None:
    """That is what the estimate is for; the last known accuracy cannot see it."""
    estimator, blind = AccuracyEstimator(method), AccuracyEstimator("last_known")
    for one in (estimator, blind):
        stream(one, 0.9, 600, labelled=True, seed=1)
        stream(one, 0.4, 500, labelled=False, seed=2)
    seen, believed = estimator.estimate(), blind.estimate()
    assert seen is not None
    assert believed is not None
    assert abs(seen - 0.4) < abs(believed - 0.4) - 0.1


def test_the_error_is_that_of_what_was_said_then() -> None:
    """Estimates must be judged by what they said before the labels, not by what they would say with them."""
    estimator = AccuracyEstimator("average")
    stream(estimator, 0.9, 100, labelled=True, seed=1)
    for number in range(100):
        estimator.predicted(f"late/{number}", 0.9)
    for number in range(100):
        estimator.scored(f"late/{number}", number % 2 == 0)
    error = estimator.error()
    assert error is not None
    assert error > 0.1


def test_what_waits_is_bounded_and_repeats_count_once() -> None:
    """Most events never get a label; their predictions must not pile up, nor may a repeated one count twice."""
    estimator = AccuracyEstimator("average", window=50, remembered=60)
    for number in range(500):
        estimator.predicted(str(number), 0.5)
        estimator.predicted(str(number), 0.9)
    estimator.scored("0", True)
    assert len(estimator._waiting) == 60
    for number in range(440, 500):
        estimator.scored(str(number), True)
    assert estimator.estimate() == pytest.approx(0.5)
