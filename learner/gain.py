"""Is the next fine-tune worth its time? Pure: what is known of classes and past runs in, an expectation out.

A class that is wrong with a chance e after t labels is expected to be wrong with e * (t / (t + s)) ** slope after
s more: error falls as a power of the examples (Hestness et al., Deep Learning Scaling is Predictable, Empirically,
2017, section 2). The slope is what the stream's own runs showed on their exams, beside a prior that counts as much as
two runs. So a run is expected to bring the more, the more labels no run has seen, the newer their classes and the
more of them the served model gets wrong; and runs that brought nothing make the next one wait for more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLOPE = 0.3
"""Expected before any run: language tasks have shown 0.1 to 0.4 (the same source), small classifiers up to 0.5."""
SLOPE_RUNS = 2.0
STEEPEST = 2.0
RECENT = 5
"""Past runs that are looked at."""
UNKNOWN_SECONDS = 60.0
"""Taken for the first run's length."""


@dataclass(frozen=True)
class Known:
    """One class.

    Args:
        taught: its labels that a fine-tune has trained on.
        since: its labels since.
        wrong: the share of its events that the served model gets wrong, in [0, 1].
    """

    taught: int
    since: int
    wrong: float


@dataclass(frozen=True)
class PastRun:
    """One fine-tune that came to an exam.

    Args:
        taught: labels that runs before it had trained on.
        since: labels that were new to it.
        champion, candidate: accuracy of both on its exam.
        seconds: its length.
    """

    taught: int
    since: int
    champion: float
    candidate: float
    seconds: float


@dataclass(frozen=True)
class Expected:
    """What a run now should bring: a share of all events that turns from wrong to right, and how long it takes."""

    gain: float
    seconds: float

    @property
    def points_a_minute(self) -> float:
        """Percentage points of accuracy for a minute of training."""
        return 100.0 * self.gain / max(self.seconds / 60.0, 1e-9)


def expect(classes: Mapping[str, Known], past: Sequence[PastRun] = (), *, drifted: bool = False) -> Expected:
    """What a fine-tune is expected to bring if it begins now.

    Args:
        classes: by name; a class's share of the events is taken to be its share of the labels.
        past: newest first.
        drifted: the world has changed since the last run, so what was taught before counts for nothing.
    """
    recent = past[:RECENT]
    slope = (SLOPE_RUNS * SLOPE + sum(_slope(run) for run in recent)) / (SLOPE_RUNS + len(recent))
    labels = sum(known.taught + known.since for known in classes.values())
    gain = 0.0
    for known in classes.values():
        taught = 1 + (0 if drifted else known.taught)
        left = (taught / (taught + known.since)) ** slope
        gain += (known.taught + known.since) / labels * known.wrong * (1.0 - left) if labels else 0.0
    seconds = statistics.median(run.seconds for run in recent) if recent else UNKNOWN_SECONDS
    return Expected(gain, seconds)


def _slope(run: PastRun) -> float:
    """The slope with which a run's gain would have been foretold."""
    before, after = 1.0 - run.champion, 1.0 - run.candidate
    if after >= before or run.since <= 0:
        return 0.0
    growth = math.log((1 + run.taught + run.since) / (1 + run.taught))
    return min(STEEPEST, math.log(before / max(after, 1e-3)) / growth)
