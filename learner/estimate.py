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
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

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
        self._guess = _GUESSES[method]
        self._remembered = remembered
        self._recent: deque[float] = deque(maxlen=window)
        self._waiting: OrderedDict[str, tuple[float, float | None]] = OrderedDict()
        self._labelled: deque[tuple[float, bool]] = deque(maxlen=window)
        self._said: deque[tuple[float, bool]] = deque(maxlen=window)

    def predicted(self, event_id: str, confidence: float) -> None:
        """A prediction was served with this probability of its best class."""
        if event_id in self._waiting:
            return
        self._recent.append(confidence)
        guess = self._guess([confidence], self._labelled) if len(self._labelled) >= _ENOUGH else None
        self._waiting[event_id] = (confidence, guess)
        if len(self._waiting) > self._remembered:
            self._waiting.popitem(last=False)

    def scored(self, event_id: str, right: bool) -> None:
        """The label of a served prediction came."""
        found = self._waiting.pop(event_id, None)
        if found is None:
            return
        confidence, guess = found
        self._labelled.append((confidence, right))
        if guess is not None:
            self._said.append((guess, right))

    def estimate(self) -> float | None:
        """The accuracy of the recent predictions, or None before there are labels enough to judge by."""
        if not self._recent or len(self._labelled) < _ENOUGH:
            return None
        return self._guess(self._recent, self._labelled)

    def error(self) -> float | None:
        """How far off the estimate was for the predictions labelled last; positive where it was too high."""
        if len(self._said) < _ENOUGH:
            return None
        said = np.array(self._said)
        return float(said[:, 0].mean() - said[:, 1].mean())


Labelled = Sequence[tuple[float, bool]]


def _average(recent: Sequence[float], labelled: Labelled) -> float:
    return float(np.mean(recent))


def _difference(recent: Sequence[float], labelled: Labelled) -> float:
    confidence, right = np.array(labelled, dtype=np.float64).T
    return float(np.clip(np.mean(recent) + right.mean() - confidence.mean(), 0.0, 1.0))


def _threshold(recent: Sequence[float], labelled: Labelled) -> float:
    confidence, right = np.array(labelled, dtype=np.float64).T
    return float((np.asarray(recent) > np.quantile(confidence, 1.0 - right.mean())).mean())


def _last_known(recent: Sequence[float], labelled: Labelled) -> float:
    return float(np.array(labelled, dtype=np.float64)[:, 1].mean())


_GUESSES: dict[Method, Callable[[Sequence[float], Labelled], float]] = {
    "average": _average,
    "difference": _difference,
    "threshold": _threshold,
    "last_known": _last_known,
}
METHODS: tuple[Method, ...] = tuple(_GUESSES)
