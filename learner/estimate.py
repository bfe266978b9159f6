"""The accuracy now, where labels are late: what the confidence of recent predictions says of it.

Confidence alone is an estimate (a calibrated head is right as often as it says), but not on a stream that has
moved since it was calibrated. What labelled predictions showed corrects it:

- `average`: the mean confidence;
- `difference`: that, moved by how far confidence was off on predictions whose labels came (Guillory et al. 2021,
  "Predicting with Confidence on Unseen Distributions");
- `threshold`: the share of predictions above the confidence that, among labelled ones, as many exceed as were right
  (Garg et al. 2022, "Leveraging Unlabeled Data to Predict Out-of-Distribution Performance");
- `last_known`: the accuracy of labelled predictions, which needs no confidence: what the others have to beat.

`python -m benchmarks.heads` prints how far each is off.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

Method = Literal["average", "difference", "threshold", "last_known"]
DEFAULT_METHOD: Method = "difference"
_ENOUGH = 50


class AccuracyEstimator:
    """One stream's estimate, and how far it was off where labels came.

    Args:
        method: see the module.
        window: recent predictions that are spoken of, and labelled ones that are learned from.
        remembered: predictions that wait for their label; the oldest is dropped.
    """

    def __init__(self, method: Method = DEFAULT_METHOD, window: int = 500, remembered: int = 20_000) -> None:
        self._fit = _FITS[method]
        self._remembered = remembered
        self._recent: deque[float] = deque(maxlen=window)
        self._waiting: OrderedDict[str, tuple[float, float | None]] = OrderedDict()
        self._labelled: deque[tuple[float, bool]] = deque(maxlen=window)
        self._said: deque[tuple[float, bool]] = deque(maxlen=window)
        self._guess: Guess | None = None
        self._stale = False

    def predicted(self, event_id: str, confidence: float) -> None:
        """A prediction was served with this probability of its best class."""
        if event_id in self._waiting:
            return
        self._recent.append(confidence)
        guess = self._fitted()
        self._waiting[event_id] = (confidence, None if guess is None else guess(confidence))
        if len(self._waiting) > self._remembered:
            self._waiting.popitem(last=False)

    def scored(self, event_id: str, right: bool) -> None:
        """The label of a served prediction came."""
        found = self._waiting.pop(event_id, None)
        if found is None:
            return
        confidence, said = found
        self._labelled.append((confidence, right))
        self._stale = True
        if said is not None:
            self._said.append((said, right))

    def estimate(self) -> float | None:
        """The accuracy of the recent predictions, or None before there are labels enough to judge by."""
        guess = self._fitted()
        if guess is None or not self._recent:
            return None
        return min(1.0, max(0.0, float(np.mean([guess(confidence) for confidence in self._recent]))))

    def error(self) -> float | None:
        """How far off the estimate was for the predictions labelled last; positive where it was too high."""
        if len(self._said) < _ENOUGH:
            return None
        said = np.array(self._said)
        return float(said[:, 0].mean() - said[:, 1].mean())

    def _fitted(self) -> Guess | None:
        if self._stale and len(self._labelled) >= _ENOUGH:
            confidence, right = np.array(self._labelled, dtype=np.float64).T
            self._guess, self._stale = self._fit(confidence, right), False
        return self._guess


Guess = Callable[[float], float]
Doubles = npt.NDArray[np.float64]


def _average(confidence: Doubles, right: Doubles) -> Guess:
    return lambda asked: asked


def _difference(confidence: Doubles, right: Doubles) -> Guess:
    shift = float(right.mean() - confidence.mean())
    return lambda asked: asked + shift


def _threshold(confidence: Doubles, right: Doubles) -> Guess:
    least = float(np.quantile(confidence, 1.0 - right.mean()))
    return lambda asked: float(asked > least)


def _last_known(confidence: Doubles, right: Doubles) -> Guess:
    known = float(right.mean())
    return lambda asked: known


_FITS: dict[Method, Callable[[Doubles, Doubles], Guess]] = {
    "average": _average,
    "difference": _difference,
    "threshold": _threshold,
    "last_known": _last_known,
}
METHODS: tuple[Method, ...] = tuple(_FITS)
