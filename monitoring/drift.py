"""Drift of one stream: plain numbers in; none, warning or drift out.

Three kinds of number are watched, each by itself:

- `input`: any statistic of the embedding, such as its distance from the running mean. It has no scale of
  its own, and a change either way counts.
- `prediction`: novelty, or one minus the confidence: the greater, the stranger. Only a rise counts.
- `error`: 0 for a served prediction that was right, 1 for one that was wrong. Only a rise counts;
  a stream that learns gets better, and that is no drift.

The detector is ADWIN (Bifet and Gavaldà, Learning from Time-Changing Data with Adaptive Windowing, SDM
2007, theorem 3.1): with values in [0, 1] and an unchanged mean it cuts its window at any one check with a
probability of at most `delta`. Values without a scale are first turned into their rank within a reference
of the first values seen, which lies in [0, 1] whatever their distribution; a second ADWIN on the rank's
distance from the middle sees a change of spread that leaves the mean alone. The bound holds for values
that do not depend on each other; a stream whose neighbours are alike alerts more often.
"""

from __future__ import annotations

import bisect
import math
from enum import IntEnum
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from river.drift import ADWIN
from river.stats import Var

Kind = Literal["input", "prediction", "error"]


class State(IntEnum):
    """What a detector says; the number is the value of the `drift_state` metric."""

    NONE = 0
    WARNING = 1
    DRIFT = 2


class DriftSettings(BaseModel):
    """How eager the detectors are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drift_delta: float = Field(
        default=0.002, gt=0, lt=1, description="Bound on the probability of a false drift at one check."
    )
    warning_delta: float = Field(
        default=0.1, gt=0, lt=1, description="The same for a warning; greater than drift_delta."
    )
    clock: int = Field(default=16, ge=1, description="Values between two checks.")
    reference: int = Field(default=200, ge=1, description="How many first values set the ranks of the inputs.")
    hold: int = Field(default=100, ge=1, description="For how many values a warning or a drift stays in force.")
    span: int = Field(default=50, ge=1, description="How many recent values the score looks at, roughly.")

    @model_validator(mode="after")
    def _warning_is_the_looser(self) -> Self:
        if self.drift_delta >= self.warning_delta:
            raise ValueError(f"drift_delta {self.drift_delta} must be below warning_delta {self.warning_delta}")
        return self


class DriftMonitor:
    """Watches one stream. The state is a few kilobytes, whatever the stream's length.

    Args:
        settings: how eager the detectors are.
    """

    def __init__(self, settings: DriftSettings | None = None) -> None:
        self.settings = settings or DriftSettings()
        self._watches: dict[str, _Watch] = {
            "input": _Ranked(self.settings),
            "prediction": _Watch(self.settings),
            "error": _Watch(self.settings),
        }

    def update(self, kind: Kind, value: float) -> State:
        """Take the next value of a kind and say how that kind stands.

        Raises:
            ValueError: the value is NaN or infinite, is outside [0, 1] for `prediction` or `error`, or
                the kind is not known. Nothing has changed then.
        """
        watch = self._watch(kind)
        if not math.isfinite(value):
            raise ValueError(f"drift of {kind}: {value} is not a number to compare")
        if kind != "input" and not 0.0 <= value <= 1.0:
            raise ValueError(f"drift of {kind}: {value} is outside 0 to 1")
        watch.update(float(value))
        return watch.state

    def state(self, kind: Kind) -> State:
        """How the kind stands since its last value."""
        return self._watch(kind).state

    def score(self, kind: Kind) -> float:
        """How far the recent values lie from those before, in standard errors; about 0 to 3 without drift.

        It is for people to look at: the state is not decided by it.
        """
        return self._watch(kind).score

    def drifts(self, kind: Kind) -> int:
        """How many drifts were found so far; the caller acts when this has grown."""
        return self._watch(kind).drifts

    def reset(self) -> None:
        """Forget all values, as after a new encoder, whose statistics are not those of the old one.

        The counts of drifts stay, for they feed a counter.
        """
        fresh = DriftMonitor(self.settings)._watches
        for kind, watch in self._watches.items():
            fresh[kind].drifts = watch.drifts
        self._watches = fresh

    def _watch(self, kind: str) -> _Watch:
        watch = self._watches.get(kind)
        if watch is None:
            raise ValueError(f"kind is one of {', '.join(get_args(Kind))}; found {kind!r}")
        return watch


class _Watch:
    """One series of values in [0, 1], of which only a rise counts."""

    def __init__(self, settings: DriftSettings) -> None:
        self.settings = settings
        self.state = State.NONE
        self.drifts = 0
        self._held = 0
        self._level = _Level(settings)

    @property
    def score(self) -> float:
        return self._level.score

    def update(self, value: float) -> None:
        self._settle(self._level.update(value, both_ways=False))

    def _settle(self, found: State) -> None:
        """Hold what was found for a while; a drift outlasts the warnings that come after it."""
        if found is State.DRIFT:
            self.drifts += 1
        if found >= self.state and found is not State.NONE:
            self.state, self._held = found, self.settings.hold
        elif self._held > 0:
            self._held -= 1
            if self._held == 0:
                self.state = State.NONE


class _Ranked(_Watch):
    """One series without a scale, of which any change of level or spread counts."""

    def __init__(self, settings: DriftSettings) -> None:
        super().__init__(settings)
        self._spread = _Level(settings)
        self._reference: list[float] = []

    @property
    def score(self) -> float:
        return max(self._level.score, self._spread.score)

    def update(self, value: float) -> None:
        if len(self._reference) < self.settings.reference:
            bisect.insort(self._reference, value)
            self._settle(State.NONE)
            return
        below = bisect.bisect_left(self._reference, value)
        equal = bisect.bisect_right(self._reference, value) - below
        rank = (below + equal / 2) / len(self._reference)
        found = max(
            self._level.update(rank, both_ways=True),
            self._spread.update(abs(2 * rank - 1), both_ways=True),
        )
        self._settle(found)
        if found is State.DRIFT:
            # The old ranks say nothing of the new values: most would be 0 or 1.
            self._reference = []
            self._level, self._spread = _Level(self.settings), _Level(self.settings)


class _Level:
    """Two ADWIN windows over values in [0, 1], one that warns early and one that is sure."""

    def __init__(self, settings: DriftSettings) -> None:
        self._sure = ADWIN(delta=settings.drift_delta, clock=settings.clock)
        self._early = ADWIN(delta=settings.warning_delta, clock=settings.clock)
        self._weight = 2.0 / (settings.span + 1.0)
        self._recent: float | None = None
        self._values = Var()

    @property
    def score(self) -> float:
        if self._recent is None:
            return 0.0
        error = math.sqrt(max(float(self._values.get()), 0.0) * self._weight / (2.0 - self._weight))
        distance = abs(self._recent - float(self._sure.estimation))
        # Values that never varied have no standard error: count in hundredths of the scale instead.
        return distance / max(error, 0.01)

    def update(self, value: float, *, both_ways: bool) -> State:
        self._recent = value if self._recent is None else self._recent + self._weight * (value - self._recent)
        self._values.update(value)
        sure = _cut(self._sure, value, both_ways)
        early = _cut(self._early, value, both_ways)
        if self._sure.drift_detected:
            # What was before the cut no longer says how the values vary.
            self._values = Var()
        if sure:
            return State.DRIFT
        return State.WARNING if early else State.NONE


def _cut(window: ADWIN, value: float, both_ways: bool) -> bool:
    """Whether the window was cut by this value, and the cut counts."""
    before = window.estimation
    window.update(value)
    return bool(window.drift_detected) and (both_ways or window.estimation > before)
