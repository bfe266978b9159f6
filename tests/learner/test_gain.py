"""When a fine-tune is worth its time."""

from __future__ import annotations

import pytest

from learner.gain import Known, PastRun, expect


def test_more_that_no_run_has_seen_promises_more() -> None:
    """The plainest sign that a run is due."""
    gains = [expect({"a": Known(1_000, since, 0.2)}).gain for since in (0, 100, 1_000, 10_000)]
    assert gains[0] == 0.0
    assert gains == sorted(set(gains))
    assert gains[-1] < 0.2, "no run can bring more than all that is wrong now"


def test_a_new_class_promises_more_than_an_old_one() -> None:
    """A hundred labels of a class that no run has seen teach more than a hundred on top of a thousand."""
    old = expect({"a": Known(1_000, 100, 0.3), "b": Known(100, 0, 0.3)})
    new = expect({"a": Known(1_000, 0, 0.3), "b": Known(0, 200, 0.3)})
    assert new.gain > 2 * old.gain


def test_what_is_right_already_promises_nothing() -> None:
    """A class that the instant head has learned is no reason to train."""
    assert expect({"a": Known(0, 500, 0.0), "b": Known(0, 500, 0.0)}).gain == 0.0


def test_a_drift_makes_old_labels_count_for_nothing() -> None:
    """Else a stream with many labels would never be trained anew."""
    classes = {"a": Known(100_000, 500, 0.4)}
    assert expect(classes, drifted=True).gain > 10 * expect(classes).gain


def test_runs_that_brought_nothing_make_the_next_one_wait() -> None:
    """An hour a day for candidates that the exam refuses is the cost that this is to save."""
    classes = {"a": Known(2_000, 500, 0.2)}
    useless = [PastRun(1_000, 500, 0.8, 0.79, 60.0)] * 5
    useful = [PastRun(1_000, 500, 0.7, 0.8, 60.0)] * 5
    assert expect(classes, useless).gain < 0.5 * expect(classes).gain < expect(classes, useful).gain
    assert expect({"a": Known(2_000, 50_000, 0.2)}, useless).gain > expect(classes, useless).gain > 0.0


def test_a_longer_run_must_bring_more() -> None:
    """Gain is weighed against time, and the time is what the stream's own runs took."""
    classes = {"a": Known(1_000, 1_000, 0.2)}
    quick, slow = ([PastRun(500, 500, 0.7, 0.75, seconds)] for seconds in (10.0, 1_000.0))
    assert expect(classes, quick).points_a_minute == pytest.approx(100 * expect(classes, slow).points_a_minute)


def test_nothing_known_promises_nothing() -> None:
    """A stream without a label, or a past run without an exam that could tell, must divide nothing."""
    assert expect({}).gain == 0.0
    assert expect({"a": Known(0, 10, 0.5)}, [PastRun(0, 0, 0.0, 0.0, 0.0)]).points_a_minute > 0
    assert expect({"a": Known(0, 10, 0.5)}, [PastRun(0, 10, 0.5, 1.0, 5.0)]).gain < 0.5


@pytest.mark.parametrize("slope", [0.15, 0.3, 0.5])
def test_as_good_as_a_fixed_period_in_less_time(slope: float) -> None:
    """A simulated stream: error falls as a power of what was trained on; the world changes halfway.

    Not a measurement of real learning, but a policy that fails here would fail there. It takes 0.75, 0.62 and 0.42 of
    the fixed period's time, at 0.2 points less and 0.1 and 0.2 more.
    """

    def live(by_gain: bool) -> tuple[float, float]:
        right = seconds = 0.0
        taught = since = forgotten = 0
        past: list[PastRun] = []
        drifted = False
        for step in range(600):
            if step == 300:
                forgotten, drifted = taught + since, True
            useful = max(taught - forgotten, 0)
            wrong = 0.8 * (1 + useful / 50) ** -slope
            right += 1 - wrong
            since += 100
            now = expect({"a": Known(taught, since, wrong)}, past, drifted=drifted)
            if now.points_a_minute >= 0.5 if by_gain else since >= 1_000:
                seconds += 120.0
                after = 0.8 * (1 + max(taught + since - forgotten, 0) / 50) ** -slope
                past.insert(0, PastRun(0 if drifted else taught, since, 1 - wrong, 1 - after, 120.0))
                taught, since, drifted = taught + since, 0, False
        return right / 600, seconds

    fixed, gain = live(by_gain=False), live(by_gain=True)
    assert gain[1] <= 0.8 * fixed[1]
    assert gain[0] >= fixed[0] - 0.003
