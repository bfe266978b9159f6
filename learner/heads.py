"""The instant head: linear discriminant analysis on embeddings, learned by exact integer sums.

An embedding is quantised once, to 16-bit integers, and everything kept of it is a sum of integers held
in float64 below 2^53, where addition and multiplication are exact. So any order of the same additions
and subtractions leaves the same bits, a subtraction is the exact undoing of an addition, and a million
of both leave no error at all.

A head of some *width* does not sum the embedding but that many random features of it, the positive parts
of random projections (McDonnell et al. 2023, "RanPAC"), because classes that no line separates in the
embedding are separated there. `Lift` computes them from the quantised embedding in whole numbers, so
they too are the same bits in any batch, and a ledger of embeddings is enough to subtract them.
What is kept for f features (the width, or the d dimensions themselves) and C classes is the Gram matrix
(f * f), one sum a class (C * f) and one count a class, in 8 bytes each: 1.6 MB for 384 dimensions and
150 classes, 34 MB for 2,000 features of them.

From the sums, `solve` gives a linear classifier: one covariance shared by all classes, shrunk, because
then a class of five examples borrows the spread of the others (Hastie, Tibshirani and Friedman, The
Elements of Statistical Learning, 2nd edition, section 4.3). It borrows their places too: the mean of five
examples in f dimensions is mostly noise, so all class means are shrunk together towards what they have
in common, each by as much as its number of examples leaves in doubt (Efron and Morris 1972, "Empirical
Bayes on vector observations: an extension of Stein's method", Biometrika 59). `python -m
benchmarks.heads` prints what each of this is worth.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import dgemm
from scipy.special import expit

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Quantised = npt.NDArray[np.int16]
Prior = Literal["uniform", "sqrt", "empirical"]

LEVELS = 32767
EXACT = 2.0**53
DEFAULT_SHRINKAGE = 1.0
"""Against 0.1, CLINC150 loses 0.1 points of accuracy with 100 examples a class and gains 1.8 with 5."""
DEFAULT_PRIOR: Prior = "sqrt"
"""On 24,738 days of geomagnetic levels, 1 to 3 points of accuracy above uniform, macro-F1 no more than half a
point below; empirical gains 0.6 to 1.6 more, but at one of four thresholds its macro-F1 is below no-change."""
DEFAULT_WIDTH = 2_000
"""For texts: on CLINC150 1.3 points above none. What it costs is in benchmarks/README.md."""
KNOWN_ABOVE_HALF = 0.05
"""The share of events of known classes whose novelty is above 0.5, once it is calibrated."""
_ENOUGH_TO_LEAVE_ONE_OUT = 5
_ENOUGH_FOR_NOVELTY = 20
_LEAST_OF_A_MEAN = 0.1
"""No mean is shrunk further: where the first few labels tell nothing apart, the nearest one is still the best guess."""
_ROWS_AT_A_TIME = 1024


def quantise(embedding: npt.ArrayLike, bound: float) -> Quantised:
    """Round embeddings (n, d) within [-bound, bound] to int16, the form in which they are learned.

    Raises:
        ValueError: a component is not a number; infinite ones are clipped like any other.
    """
    scaled = np.asarray(embedding, dtype=np.float64) * (LEVELS / bound)
    if np.isnan(scaled).any():
        raise ValueError("an embedding has a component that is not a number")
    return np.clip(np.rint(scaled), -LEVELS, LEVELS).astype(np.int16)


def dequantise(q: Quantised, bound: float) -> Floats:
    """The embeddings (n, d) that `quantise` stands for, within half a step of bound / 32767."""
    return (np.asarray(q, dtype=np.float64) * (bound / LEVELS)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Lift:
    """From an embedding of d dimensions to the f features that a head is linear in.

    Args:
        dimension: d.
        bound: the largest absolute component of an embedding, and of a feature.
        width: number of random features; 0 takes the embedding as it is.
    """

    dimension: int
    bound: float
    width: int

    @property
    def features(self) -> int:
        """f, the width or else d."""
        return self.width or self.dimension

    def integers(self, q: Quantised) -> Doubles:
        """Features (n, f) of quantised embeddings: whole numbers within 32767, the same bits in any batch."""
        x = q.astype(np.float64)
        if not self.width:
            return x
        # Products of whole numbers below 2^53 are exact, in whatever order a matrix kernel adds them up.
        lifted: Doubles = x @ _projection(self.dimension, self.width, "float64")
        lifted *= 1.0 / _divisor(self.dimension)
        np.rint(lifted, out=lifted)
        np.clip(lifted, 0.0, LEVELS, out=lifted)
        return lifted

    def floats(self, embeddings: Floats) -> Floats:
        """Features (n, f) of embeddings as they come, for asking and not for learning."""
        if not self.width:
            return embeddings
        lifted: Floats = embeddings @ _projection(self.dimension, self.width, "float32")
        lifted *= np.float32(1.0 / _divisor(self.dimension))
        np.clip(lifted, np.float32(0.0), np.float32(self.bound), out=lifted)
        return lifted

    def projection(self) -> Floats | None:
        """What `floats` multiplies embeddings by, (d, width); None where it takes them as they are."""
        if not self.width:
            return None
        matrix: Floats = _projection(self.dimension, self.width, "float32") * np.float32(1.0 / _divisor(self.dimension))
        return matrix


def _divisor(dimension: int) -> float:
    # 74 is the root mean square of int8: a feature is then about as large as the embedding is long.
    return float(2.0 ** round(math.log2(74.0 * math.sqrt(dimension))))


@lru_cache(maxsize=8)
def _projection(dimension: int, width: int, dtype: str) -> npt.NDArray[Any]:
    """The random projection (d, width), whole numbers of 8 bits: the same in every process, for ever."""
    raw = hashlib.shake_256(f"trimtab head {dimension} x {width}".encode()).digest(dimension * width)
    matrix = np.frombuffer(raw, dtype=np.int8).reshape(dimension, width).astype(dtype)
    matrix.flags.writeable = False
    return matrix


class HeadSums:
    """Exact sums over the examples that a head was taught; equal sums mean equal heads.

    Args:
        dimension: d, the length of an embedding.
        bound: the largest absolute component that the encoder gives.
        width: number of random features that are summed instead of the embedding; 0 for none.
    """

    def __init__(self, dimension: int, bound: float, width: int = 0) -> None:
        if dimension < 1 or not bound > 0 or not math.isfinite(bound) or width < 0:
            raise ValueError(f"dimension and bound must be positive, found {dimension} and {bound}, width {width}")
        self.lift = Lift(dimension, float(bound), width)
        self._gram = np.zeros((self.lift.features, self.lift.features))
        self._sums: dict[str, Doubles] = {}
        self._counts: dict[str, int] = {}

    @property
    def dimension(self) -> int:
        """d, the length of an embedding."""
        return self.lift.dimension

    @property
    def bound(self) -> float:
        """The largest absolute component of an embedding."""
        return self.lift.bound

    @property
    def counts(self) -> dict[str, int]:
        """Examples of each class, by class in sorted order."""
        return {name: self._counts[name] for name in sorted(self._counts)}

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes with at least one example, sorted."""
        return tuple(sorted(self._counts))

    @property
    def total(self) -> int:
        """Examples of all classes together."""
        return sum(self._counts.values())

    @property
    def gram(self) -> Doubles:
        """The Gram matrix (f, f) in quantisation steps squared; a view of what changes, not to be written."""
        view = self._gram.view()
        view.flags.writeable = False
        return view

    @property
    def nbytes(self) -> int:
        """Bytes held by the arrays."""
        return self._gram.nbytes + sum(row.nbytes for row in self._sums.values()) + 8 * len(self._counts)

    def class_sums(self) -> Doubles:
        """The sum of each class's features (C, f), in the order of `classes`."""
        if not self._counts:
            return np.zeros((0, self.lift.features))
        return np.stack([self._sums[name] for name in self.classes])

    def add(self, q: Quantised, labels: Sequence[str]) -> None:
        """Learn quantised embeddings (n, d) with their labels.

        Raises:
            ValueError: shapes do not match.
            OverflowError: a sum would leave the range in which it is exact; nothing is changed.
        """
        self._move(q, labels, +1)

    def subtract(self, q: Quantised, labels: Sequence[str]) -> None:
        """Unlearn what was added before, exactly.

        Raises:
            ValueError: shapes do not match, or more is taken than was ever added; nothing is changed.
        """
        self._move(q, labels, -1)

    def merge(self, other: HeadSums) -> None:
        """Add all that `other` learned; the same as adding its examples here."""
        if other.lift != self.lift:
            raise ValueError(f"sums of {other.lift} cannot join sums of {self.lift}")
        moved = self._check(other._gram.diagonal(), other._sums, other._counts, +1)
        self._gram += other._gram
        self._take(*moved)

    def copy(self) -> HeadSums:
        """An independent copy."""
        twin = HeadSums(self.dimension, self.bound, self.lift.width)
        twin.merge(self)
        return twin

    def tensors(self) -> dict[str, np.ndarray]:
        """Arrays that rebuild these sums; class names travel as JSON bytes, so safetensors can hold them."""
        return {
            "gram": self._gram.copy(),
            "sums": self.class_sums(),
            "counts": np.array(list(self.counts.values()), dtype=np.int64),
            "lift": _lift_to_array(self.lift),
            "classes": _names_to_bytes(self.classes),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> HeadSums:
        """Rebuild what `tensors` gave, bit for bit.

        Raises:
            ValueError: arrays are missing or their shapes do not match.
        """
        gram, rows, counts = (_tensor(tensors, name) for name in ("gram", "sums", "counts"))
        names = _names_from_bytes(_tensor(tensors, "classes"))
        lift = _lift_from_array(_tensor(tensors, "lift"))
        features = lift.features
        shapes = (gram.shape, rows.shape, counts.shape)
        if shapes != ((features, features), (len(names), features), (len(names),)):
            raise ValueError(f"sums of {len(names)} classes do not fit arrays of shapes {shapes}")
        sums = cls(lift.dimension, lift.bound, lift.width)
        sums._gram = gram.astype(np.float64)
        sums._sums = {name: row.astype(np.float64) for name, row in zip(names, rows, strict=True)}
        sums._counts = {name: int(count) for name, count in zip(names, counts, strict=True)}
        return sums

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadSums):
            return NotImplemented
        return (
            self.lift == other.lift
            and self._counts == other._counts
            and np.array_equal(self._gram, other._gram)
            and all(np.array_equal(row, other._sums[name]) for name, row in self._sums.items())
        )

    __hash__ = None  # type: ignore[assignment]  # sums are changed in place

    def __repr__(self) -> str:
        return f"HeadSums({self.lift}, classes={len(self._counts)}, examples={self.total})"

    def _move(self, q: Quantised, labels: Sequence[str], sign: int) -> None:
        """Add or subtract examples, all or nothing."""
        if q.dtype != np.int16 or q.ndim != 2 or q.shape != (len(labels), self.dimension):
            raise ValueError(
                f"expected int16 of shape ({len(labels)}, {self.dimension}), found {q.dtype} of shape {q.shape}"
            )
        diagonal = np.zeros(self.lift.features)
        sums: dict[str, Doubles] = {}
        counts: dict[str, int] = {}
        starts = range(0, len(q), _ROWS_AT_A_TIME)
        for start in starts:
            x = self.lift.integers(q[start : start + _ROWS_AT_A_TIME])
            diagonal += np.einsum("nf,nf->f", x, x)
            positions: dict[str, list[int]] = {}
            for position, label in enumerate(labels[start : start + _ROWS_AT_A_TIME]):
                positions.setdefault(label, []).append(position)
            for label, rows in positions.items():
                sums[label] = sums.get(label, 0.0) + x[rows].sum(axis=0)
                counts[label] = counts.get(label, 0) + len(rows)
        moved = self._check(diagonal, sums, counts, sign)
        # A few examples change a wide head's tens of megabytes in place; its features are cheaper made twice than kept.
        gram = self._gram if self.total + sign * len(labels) else self._gram.copy()
        for start in starts:
            if len(starts) > 1:
                x = self.lift.integers(q[start : start + _ROWS_AT_A_TIME])
            # The matrix is symmetric, so its transpose is itself in the order that BLAS writes.
            dgemm(float(sign), x, x, 1.0, gram.T, trans_a=True, overwrite_c=True)
        if gram is not self._gram and gram.any():
            raise ValueError("the sums would lose an example that they were never given")
        self._gram = gram
        self._take(*moved)

    def _check(
        self, diagonal: Doubles, sums: Mapping[str, Doubles], counts: Mapping[str, int], sign: int
    ) -> tuple[dict[str, Doubles], dict[str, int]]:
        """The changed classes' sums and counts after this move, if it may be made."""
        after = self._gram.diagonal() + sign * diagonal
        # By Cauchy-Schwarz no entry of a Gram matrix, and no partial sum on the way to it, exceeds its
        # largest diagonal entry; class sums are smaller still. One test covers every array.
        if after.max() >= EXACT:
            raise OverflowError(f"{self.total} examples are too many to be summed exactly at bound {self.bound}")
        rows, left = {}, {}
        for name, count in counts.items():
            left[name] = self._counts.get(name, 0) + sign * count
            rows[name] = self._sums.get(name, 0.0) + sign * sums[name]
            if left[name] < 0 or (left[name] == 0 and rows[name].any()):
                raise ValueError(f"class {name!r} would lose an example that it was never given")
        if after.min() < 0:
            raise ValueError("the sums would lose an example that they were never given")
        return rows, left

    def _take(self, rows: Mapping[str, Doubles], counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            if count:
                self._counts[name] = count
                self._sums[name] = rows[name]
            else:
                self._counts.pop(name, None)
                self._sums.pop(name, None)


class HeadAnswer(NamedTuple):
    """A head's answer for n embeddings.

    Args:
        labels: for each embedding its `top_k` most probable classes, best first.
        probabilities: (n, k) of those classes, of all classes' total 1.
        novelty: (n,) in [0, 1]; 0 is like what was learned, 1 like nothing that was.
    """

    labels: list[tuple[str, ...]]
    probabilities: Floats
    novelty: Floats


class LinearHead:
    """A solved head: class scores are linear in the features. Immutable.

    Args:
        classes: C class names, sorted.
        weight: (C, f) float32.
        bias: (C,) float32, without the prior.
        log_prior: (C,) float32.
        background: (f + 1,) float32, weight and bias of a pseudo-class at the mean of everything learned.
        separation: (C,) float32, half the squared Mahalanobis distance of each class mean to that mean:
            how far the class stands out.
        temperature: divides the scores, so that probabilities are neither too sure nor too shy.
        lift: from embeddings to features; None takes embeddings as they are.
        usual: how much rather the background than its class the strangest 5 % of known examples look, in
            scores: where novelty is 0.5.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        weight: Floats,
        bias: Floats,
        log_prior: Floats,
        background: Floats,
        separation: Floats,
        temperature: float,
        lift: Lift | None = None,
        usual: float = 0.0,
    ) -> None:
        n, f = len(classes), weight.shape[-1]
        shapes = (weight.shape, bias.shape, log_prior.shape, background.shape, separation.shape)
        if n == 0 or shapes != ((n, f), (n,), (n,), (f + 1,), (n,)):
            raise ValueError(f"a head of {n} classes does not fit arrays of shapes {shapes}")
        if not all(np.isfinite(part).all() for part in (weight, bias, log_prior, background, separation)):
            raise ValueError("a head has a weight that is not finite")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"a temperature is positive, found {temperature}")
        if not math.isfinite(usual):
            raise ValueError(f"what is usual must be finite, found {usual}")
        self.lift = lift or Lift(f, 1.0, 0)
        if self.lift.features != f:
            raise ValueError(f"weights of {f} features do not fit {self.lift}")
        self.classes = classes
        self.weight = weight
        self.bias = bias
        self.log_prior = log_prior
        self.background = background
        self.separation = separation
        self.temperature = temperature
        self.usual = usual

    @property
    def dimension(self) -> int:
        """d, the length of the embeddings it takes."""
        return self.lift.dimension

    def scores(self, embeddings: Floats) -> Floats:
        """Unnormalised log-probabilities (n, C)."""
        likelihood, _ = self._likelihood(embeddings)
        scores: Floats = (likelihood + self.log_prior) / np.float32(self.temperature)
        return scores

    def predict(self, embeddings: Floats) -> list[str]:
        """The most probable class of each embedding."""
        return [self.classes[best] for best in self.scores(embeddings).argmax(axis=1)]

    def answer(self, embeddings: Floats, top_k: int) -> HeadAnswer:
        """Classes, probabilities and novelty of embeddings (n, d)."""
        likelihood, background = self._likelihood(embeddings)
        scores = (likelihood + self.log_prior) / np.float32(self.temperature)
        k = min(top_k, len(self.classes))
        top = _best(scores, k)
        exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = exponents / exponents.sum(axis=1, keepdims=True)
        labels = [tuple(self.classes[c] for c in row) for row in top]
        novelty = self._novelty(likelihood[np.arange(len(top)), top[:, 0]], background)
        return HeadAnswer(labels, np.take_along_axis(probabilities, top, axis=1), novelty)

    def _likelihood(self, embeddings: Floats) -> tuple[Floats, Floats]:
        """Scores without the prior (n, C), and those of the background (n,)."""
        likelihood = np.empty((len(embeddings), len(self.classes)), dtype=np.float32)
        background = np.empty(len(embeddings), dtype=np.float32)
        step = _ROWS_AT_A_TIME if self.lift.width else max(len(embeddings), 1)
        for start in range(0, len(embeddings), step):
            rows = slice(start, start + step)
            features = self.lift.floats(embeddings[rows])
            likelihood[rows] = features @ self.weight.T + self.bias
            background[rows] = features @ self.background[:-1] + self.background[-1]
        return likelihood, background

    def _novelty(self, likelihood: Floats, background: Floats) -> Floats:
        """How much rather the background than the best class: the relative Mahalanobis distance as a probability.

        Ren et al. 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection"; linear
        here, because both share one covariance. Calibrated, 0.5 is as strange as the strangest 5 % of
        known examples; without that it is where background and class are equally like it. Being a difference of
        squared distances in the metric of what was learned, it is 0.5 for a first and only class, and it
        does not see an oddity in a direction in which no classes differ.
        """
        strange = (background - likelihood - np.float32(self.usual)) / np.float32(self.temperature)
        novelty: Floats = expit(strange).astype(np.float32)
        return novelty

    def tensors(self) -> dict[str, np.ndarray]:
        """Arrays that rebuild this head, in a form that safetensors can hold."""
        return {
            "classes": _names_to_bytes(self.classes),
            "weight": self.weight,
            "bias": self.bias,
            "log_prior": self.log_prior,
            "background": self.background,
            "separation": self.separation,
            "temperature": np.array([self.temperature], dtype=np.float64),
            "usual": np.array([self.usual], dtype=np.float64),
            "lift": _lift_to_array(self.lift),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> LinearHead:
        """Rebuild what `tensors` gave, bit for bit.

        Raises:
            ValueError: arrays are missing, do not fit together or are not finite.
        """
        parts = [_tensor(tensors, name) for name in ("weight", "bias", "log_prior", "background", "separation")]
        if any(part.dtype != np.float32 for part in parts) or parts[0].ndim != 2:
            raise ValueError("a head's arrays are float32 and its weight has two axes")
        weight, bias, log_prior, background, separation = parts
        names = _names_from_bytes(_tensor(tensors, "classes"))
        temperature, usual = (float(_tensor(tensors, name)[0]) for name in ("temperature", "usual"))
        lift = _lift_from_array(_tensor(tensors, "lift"))
        return cls(names, weight, bias, log_prior, background, separation, temperature, lift, usual)


def _best(scores: Floats, k: int) -> npt.NDArray[np.intp]:
    """Columns (n, k) of the k highest scores (n, C) in falling order; of equal ones the first.

    Sorting all classes would cost more than the head's arithmetic where there are many.
    """
    chosen = np.argpartition(scores, -k, axis=1)[:, -k:]
    chosen.sort(axis=1)
    values = np.take_along_axis(scores, chosen, axis=1)
    best = np.take_along_axis(chosen, np.argsort(-values, axis=1, kind="stable"), axis=1)
    # Which of several equal ones a partition keeps is left to chance.
    for row in np.flatnonzero((scores >= values.min(axis=1, keepdims=True)).sum(axis=1) > k):
        best[row] = np.argsort(-scores[row], kind="stable")[:k]
    return best


class Calibration(NamedTuple):
    """What turns scores into honest numbers; see `calibrate`.

    Args:
        temperature: divides the scores.
        usual: the lead of the background over the answered class, in scores before the temperature, that 5 % of
            known examples exceed.
    """

    temperature: float
    usual: float


class HeadRecipe(BaseModel):
    """What a revision's head was made of besides its examples; kept with its line of lineage.

    Args:
        examples: how many it was taught.
        prior: how a class's frequency counted.
        width: number of random features.
        calibration: None for the closed form.
        newest: how many labels, the newest, counted how often; None where all counted alike.
    """

    model_config = ConfigDict(frozen=True)

    examples: int
    prior: Prior
    width: int
    calibration: Calibration | None = None
    newest: tuple[int, int] | None = None


def solve(
    sums: HeadSums,
    *,
    prior: Prior = DEFAULT_PRIOR,
    shrinkage: float = DEFAULT_SHRINKAGE,
    calibration: Calibration | None = None,
    calibrate_on: tuple[Quantised, Sequence[str]] | None = None,
    temperature: float | None = None,
    pooled: bool = True,
) -> LinearHead | None:
    """The head of these sums, or None while they hold no class.

    On one core with 2,000 features this takes 0.3 s for 150 classes and 1.5 s for 1,000; without random features
    and 384 dimensions 0.02 s and 0.3 s.

    Args:
        prior: how much a class's share counts: not at all, by its square root, or as it is.
        shrinkage: strength of the prior covariance, in units of d examples.
        calibration: as measured by `calibrate`; None takes the closed form of the temperature.
        calibrate_on: learned examples (n, d) and their labels, for what `calibrate` measures without factoring twice.
        temperature: as measured by `fit_temperature`, where the calibration does not say.
        pooled: whether class means are shrunk together; without it this is the textbook's discriminant.
    """
    if not sums.total:
        return None
    moments = _Moments(sums, shrinkage, pooled)
    # Scores are measured from the overall mean, which changes none of their differences and keeps
    # float32 from cancelling large numbers.
    weight = moments.mix @ moments.whitened
    bias = -moments.separation - weight @ moments.overall
    if calibrate_on is not None:
        calibration = _calibration(moments, sums, *calibrate_on, prior)
    if calibration is None:
        closed = _closed_temperature(moments.separation, moments.counts)
        calibration = Calibration(closed if temperature is None else temperature, 0.0)
    return LinearHead(
        classes=sums.classes,
        weight=weight.astype(np.float32),
        bias=bias.astype(np.float32),
        log_prior=_log_prior(moments.counts, prior).astype(np.float32),
        background=np.zeros(sums.lift.features + 1, dtype=np.float32),
        separation=moments.separation.astype(np.float32),
        temperature=calibration.temperature,
        lift=sums.lift,
        usual=calibration.usual,
    )


def leave_one_out(
    sums: HeadSums,
    q: Quantised,
    labels: Sequence[str],
    *,
    prior: Prior = DEFAULT_PRIOR,
    shrinkage: float = DEFAULT_SHRINKAGE,
    temperature: float | None = None,
    pooled: bool = True,
) -> list[str | None]:
    """What the head would say of each of these learned examples had it never learned that one.

    Closed form: one rank-1 downdate (Sherman and Morrison 1950) an example, for all classes at once. Held
    fixed are the shrinkage target, the overall mean, and by how much class means are shrunk: with five
    examples that is a little less than it were with four. None where the example is all that was ever learned.

    Args:
        q: (n, d) examples that are in `sums`.
        labels: their n labels, as they were added.
    """
    if not labels:
        return []
    moments = _Moments(sums, shrinkage, pooled)
    scores = _leave_one_out_scores(moments, sums, q, labels, prior).scores
    best = scores.argmax(axis=1)
    classes = sums.classes
    return [classes[b] if np.isfinite(scores[row, b]) else None for row, b in enumerate(best)]


def fit_temperature(
    sums: HeadSums,
    q: Quantised,
    labels: Sequence[str],
    *,
    prior: Prior = DEFAULT_PRIOR,
    shrinkage: float = DEFAULT_SHRINKAGE,
) -> float:
    """The temperature that makes left-out examples most probable; the closed form where none can tell."""
    return calibrate(sums, q, labels, prior=prior, shrinkage=shrinkage).temperature


def calibrate(
    sums: HeadSums,
    q: Quantised,
    labels: Sequence[str],
    *,
    prior: Prior = DEFAULT_PRIOR,
    shrinkage: float = DEFAULT_SHRINKAGE,
) -> Calibration:
    """The temperature that makes left-out examples most probable, and how strange the strangest of them look.

    Where no example can tell, the closed form of the temperature, and 0.

    Args:
        q: (n, d) examples that are in `sums`; a few hundred are enough.
        labels: their n labels, as they were added.
    """
    if not sums.total:
        return Calibration(1.0, 0.0)
    return _calibration(_Moments(sums, shrinkage, pooled=True), sums, q, labels, prior)


def _calibration(moments: _Moments, sums: HeadSums, q: Quantised, labels: Sequence[str], prior: Prior) -> Calibration:
    expected = _closed_temperature(moments.separation, moments.counts)
    if not labels:
        return Calibration(expected, 0.0)
    scores, lead, own = _leave_one_out_scores(moments, sums, q, labels, prior)
    # Leaving one of two examples out shows a head that is much worse than the one in use.
    usable = (moments.counts[own] >= _ENOUGH_TO_LEAVE_ONE_OUT) & (np.isfinite(scores).sum(axis=1) > 1)
    if not usable.any():
        return Calibration(expected, 0.0)
    scores, lead, own = scores[usable], lead[usable], own[usable]
    rows = np.arange(len(own))

    def loss(temperature: float) -> float:
        tempered = scores / temperature
        peak = tempered.max(axis=1)
        surprise = np.log(np.exp(tempered - peak[:, None]).sum(axis=1)) + peak - tempered[rows, own]
        # The closed form counts as much as a few examples, so that three lucky ones do not decide.
        return float(surprise.sum()) + 2.0 * math.log(temperature / expected) ** 2

    # Never surer than the normal model itself, however well a handful of examples lies apart.
    grid = np.geomspace(1.0, 64.0, 41)
    best = int(np.argmin([loss(t) for t in grid]))
    fine = np.geomspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 11)
    temperature = float(fine[int(np.argmin([loss(t) for t in fine]))])
    enough = len(lead) >= _ENOUGH_FOR_NOVELTY
    return Calibration(temperature, float(np.quantile(lead, 1.0 - KNOWN_ABOVE_HALF)) if enough else 0.0)


class _Moments:
    """Shrunk means and the shrunk, factored within-class scatter, in embedding units.

    Everything between classes is a (C, C) matrix in the metric of the inverse covariance: `between` holds the products
    of class means, measured from the overall mean, and the shrunk mean of class c is row c of `mix` times those means.
    """

    def __init__(self, sums: HeadSums, shrinkage: float, pooled: bool) -> None:
        features = sums.lift.features
        step = sums.bound / LEVELS
        self.counts = np.array(list(sums.counts.values()), dtype=np.float64)
        self.total = float(self.counts.sum())
        rows = sums.class_sums()
        within = sums.gram - (rows / self.counts[:, None]).T @ rows
        whole = rows.sum(axis=0)
        spread = np.maximum(sums.gram.diagonal() - whole * whole / self.total, 0.0)
        self.overall = whole / self.total * step
        self.means = rows / self.counts[:, None] * step - self.overall
        self.freedom = max(self.total - len(self.counts), 0.0)
        # In units of the embedding's length however wide the head is: it is what the labels can tell that counts.
        self.strength = max(shrinkage, 1e-6) * sums.dimension
        inside = np.maximum(within.diagonal(), 0.0)
        variance = (inside.sum() + spread.sum()) / (self.freedom + max(self.total - 1.0, 0.0) or 1.0) / features
        # One twelfth of a step squared is the variance of rounding itself, so nothing is known better.
        target = max(variance, 1.0 / 12.0) * step * step
        within *= step * step
        within[np.diag_indices(features)] += self.strength * target
        self.denominator = self.freedom + self.strength
        self._factor: Any = cho_factor(within, lower=True, overwrite_a=True, check_finite=False)
        self.whitened = self.whiten(self.means)
        between = self.whitened @ self.means.T
        self.between = 0.5 * (between + between.T)
        self.mix = self._shrinkage(features) if pooled else np.eye(len(self.counts))
        self.separation = 0.5 * np.einsum("cd,cd->c", self.mix @ self.between, self.mix)

    def whiten(self, rows: Doubles) -> Doubles:
        """rows @ inverse covariance."""
        solved: Doubles = cho_solve(self._factor, rows.T, check_finite=False).T * self.denominator
        return solved

    def _shrinkage(self, features: int) -> Doubles:
        """How the shrunk means (C, C) are made of the means: Efron and Morris's estimator, in its positive part.

        With unit noise, a combination of class means of squared length l holds noise of squared length f in f
        dimensions, so 1 - f / l of it is signal.
        """
        root = np.sqrt(self.counts)
        lengths, basis = np.linalg.eigh(self.between * root[:, None] * root)
        kept = np.maximum(1.0 - features / np.maximum(lengths, 1e-9), _LEAST_OF_A_MEAN)
        mix: Doubles = ((basis * kept) @ basis.T) / root[:, None] * root
        return mix


class _LeftOut(NamedTuple):
    """Examples under the head without them: scores (n, C), the background's lead (n,), own classes' columns (n,)."""

    scores: Doubles
    lead: Doubles
    own: npt.NDArray[np.intp]


def _leave_one_out_scores(
    moments: _Moments, sums: HeadSums, q: Quantised, labels: Sequence[str], prior: Prior
) -> _LeftOut:
    index = {name: position for position, name in enumerate(sums.classes)}
    try:
        own = np.array([index[label] for label in labels], dtype=np.intp)
    except KeyError as error:
        raise ValueError(f"class {error.args[0]!r} is not in the sums") from None
    x = sums.lift.integers(q) * (sums.bound / LEVELS) - moments.overall
    rows = np.arange(len(own))
    n = moments.counts[own]
    alone = n <= 1
    solved = moments.whiten(x)
    cross = solved @ moments.means.T
    square = np.einsum("nf,nf->n", solved, x)
    mixed = moments.mix @ moments.between
    cross_mixed = cross @ moments.mix.T
    # Every product is in the metric of the full scatter. u = x - mean of its class, g = x - shrunk mean of each class;
    # without x its class's mean moves by -u / (n - 1), and each shrunk mean by its share of that.
    length = square - 2.0 * cross[rows, own] + moments.between[own, own]
    distance = square[:, None] - 2.0 * cross_mixed + 2.0 * moments.separation
    along = (square - cross[rows, own])[:, None] - cross_mixed + mixed[:, own].T
    share = moments.mix[:, own].T
    moved = share / np.maximum(n - 1.0, 1.0)[:, None]
    distance += np.where(
        alone[:, None],
        # A class of one is gone without it, and with it what it lent to the others.
        2.0 * share * (square[:, None] - cross_mixed) + share**2 * square[:, None],
        2.0 * moved * along + moved**2 * length[:, None],
    )
    along += moved * length[:, None]
    alpha = np.where(alone, 0.0, n / np.maximum(n - 1.0, 1.0)) / moments.denominator
    gain = alpha / np.maximum(1.0 - alpha * length, 1e-9)
    distance += gain[:, None] * along**2
    to_all = square + gain * (square - cross[rows, own]) ** 2
    fewer = ((moments.denominator - 1.0) / moments.denominator) if moments.denominator > 1.0 else 1.0
    likelihood = -0.5 * fewer * distance
    reduced = np.broadcast_to(moments.counts, distance.shape).copy()
    reduced[rows, own] = n - 1.0
    scores: Doubles = likelihood + _log_prior(reduced, prior)
    scores[rows[alone], own[alone]] = -np.inf
    lead = -0.5 * fewer * to_all - likelihood[rows, scores.argmax(axis=1)]
    return _LeftOut(scores, lead, own)


def _closed_temperature(separation: Doubles, counts: Doubles) -> float:
    """How far the normal model is too sure of itself, from the sums alone.

    Were every class normal, the best class's lead over the background would have mean m and variance
    2m, with m the class's separation. Examples are also more and less typical of their class: where
    each stands at a share of the way from the background that varies with variance v, the variance
    becomes 2m + v (2m)^2, and scores are that much, 1 + 2vm, too large. v = 1/18 was chosen on CLINC150,
    where the expected calibration error is then 0.01 to 0.02 from 2 to 100 examples a class (0.05 with
    1, and 0.07 to 0.33 at temperature 1). Where classes hardly separate it says 1.0 and
    `fit_temperature`, which sees examples, up to 1.8.
    """
    return 1.0 + float(separation @ counts / counts.sum()) / 9.0


def _log_prior(counts: Doubles, prior: Prior) -> Doubles:
    power = {"uniform": 0.0, "sqrt": 0.5, "empirical": 1.0}[prior]
    shares = np.maximum(counts, 1e-9) ** power
    logs: Doubles = np.log(shares / shares.sum(axis=-1, keepdims=True))
    return logs


def _names_to_bytes(names: Iterable[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8).copy()


def _names_from_bytes(raw: np.ndarray) -> tuple[str, ...]:
    return tuple(json.loads(raw.astype(np.uint8).tobytes()))


def _lift_to_array(lift: Lift) -> Doubles:
    return np.array([lift.dimension, lift.bound, lift.width], dtype=np.float64)


def _lift_from_array(array: np.ndarray) -> Lift:
    dimension, bound, width = (float(value) for value in array)
    return Lift(int(dimension), bound, int(width))


def _tensor(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"array {name!r} is missing")
    return tensors[name]
