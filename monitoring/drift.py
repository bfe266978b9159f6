"""Drift of one stream: plain numbers in; none, warning or drift out.

Three kinds are watched, each by itself:

- `input`: the embedding, or any other vector or number. It needs no scale, and a change either way counts.
- `prediction`: the novelty of an answer, of which only a rise counts, and the class answered, whose shares count.
- `error`: 0 for a served prediction that was right, 1 for one that was wrong. Only a rise counts;
  a stream that learns gets better, and that is no drift.

Values are summed in cells of `clock`. After every cell the last 16, 32 and 64 cells are compared with all those
remembered before them: short windows see a sudden change, long ones a slight one. What counts only upwards and has
fallen is compared with the lower level from then on. After a drift a detector begins anew.

How large a statistic may become by chance is learned from the stream's own past, for neighbours in a stream are
alike and theory's bounds are for values that are not. Blocks of the remembered cells are drawn with replacement
(the circular block bootstrap: Politis and Romano, A circular block-resampling procedure for stationary data, 1992)
into a long stream without drift, all statistics are brought to one scale by their upper tail there, and a Gumbel
law fitted to the maxima of its stretches (Coles, An Introduction to Statistical Modeling of Extreme Values, 2001,
section 3.1) tells the height that is passed once in `false_alarms_every` events. What the blocks are too short to
show is taken from the past itself: where its windows lie further apart than the drawn ones, or its stretches rose
higher, the height rises too.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Protocol, Self, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["input", "prediction", "error"]
Doubles = npt.NDArray[np.float64]

ALARM = 4.0
"""The score at which a drift is found."""
SCALES = (16, 32, 64)
"""Cells in the windows that are compared with what was before them. Shorter ones find what 40 alike neighbours do."""
LEAST = 3 * SCALES[0]
"""Cells with which the shortest window can be compared."""
COMPONENTS = 24
"""Principal components of an embedding that are watched; with 10 or 48 of them fewer drifts were found."""
BUCKETS = 64
"""Into so many buckets are the names of classes hashed, so that a thousand classes cost no more than these."""
CLIP = 4.0
"""A component further from the middle than this, in deviations, counts as this: one event must not be a drift."""
FALL = 10.0
"""Squared standard errors from which a fall is no chance."""
CAUTION = 3.0
"""A remembered past has not shown all that can happen: with 1.0, alarms on real streams without drift came 1.7 times
as often as asked for (`benchmarks/drift.py`)."""

SIMULATED = 8_192
"""Cells of the stream that is drawn from the past."""
BLOCKS = 16
"""Into so many blocks is the past divided for it."""
STRETCH = 32
"""Cells of which one maximum is taken."""
STRETCHES = 64
"""How many real stretches' maxima are remembered."""
PRIOR = 8.0
"""As many windows or stretches of the real past weigh as much as all that were drawn."""


class State(IntEnum):
    """What a detector says; the number is the value of the `drift_state` metric."""

    NONE = 0
    WARNING = 1
    DRIFT = 2


class DriftSettings(BaseModel):
    """How eager the detectors are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    false_alarms_every: int = Field(
        default=10_000,
        ge=1_000,
        description="In so many events a stream that does not drift is said to drift about once.",
    )
    warnings_every: int = Field(
        default=1_000, ge=100, description="The same for a warning; fewer than false_alarms_every."
    )
    warm_up: int = Field(
        default=500,
        ge=100,
        description="Values from which a detector learns what is usual, and is silent; of inputs half as many more.",
    )
    memory: int = Field(default=4_096, ge=512, le=65_536, description="Past values that are compared with, at most.")
    clock: int = Field(default=8, ge=1, le=256, description="Values between two checks.")
    hold: int = Field(default=100, ge=1, description="For how many values a warning or a drift stays in force.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warnings_every >= self.false_alarms_every:
            raise ValueError(
                f"warnings_every {self.warnings_every} must be below false_alarms_every {self.false_alarms_every}"
            )
        if not LEAST * self.clock <= self.warm_up <= self.memory:
            raise ValueError(
                f"warm_up {self.warm_up} is not from {LEAST} clocks ({LEAST * self.clock}) to memory ({self.memory})"
            )
        return self


class DriftMonitor:
    """Watches one stream. The state is bounded, at most a few megabytes, whatever the stream's length.

    Args:
        settings: how eager the detectors are.
    """

    def __init__(self, settings: DriftSettings | None = None) -> None:
        self.settings = settings or DriftSettings()
        self._kinds: dict[str, _Kind] = {
            "input": _Kind(self.settings, _Vectors(self.settings.warm_up // 2)),
            "prediction": _Kind(self.settings, _Rising(), _Shares()),
            "error": _Kind(self.settings, _Errors()),
        }

    def update(
        self, kind: Kind, value: float | npt.ArrayLike, *, answer: str | None = None, space: str | None = None
    ) -> State:
        """Take the next value of a kind and say how that kind stands.

        Args:
            kind: which one.
            value: a number, or for `input` a vector (d,).
            answer: for `prediction`, the class that was answered; none is not counted.
            space: what gives the values their meaning, such as the encoder that embedded an input. Under another
                one, or with vectors of another length, the kind begins anew: the old values say nothing of the new.

        Raises:
            ValueError: a value is NaN or infinite, is outside [0, 1] for `prediction` or `error`, or the kind is
                not known. Nothing has changed then.
        """
        watched = self._kind(kind)
        row = np.atleast_1d(np.asarray(value, dtype=np.float64))
        if not math.isfinite(float(row @ row)):
            raise ValueError(f"drift of {kind}: {value!r} is not a number to compare")
        if kind != "input" and not 0.0 <= row[0] <= 1.0:
            raise ValueError(f"drift of {kind}: {value!r} is outside 0 to 1")
        watched.enter((space, len(row)))
        watched.update(*((row, answer) if kind == "prediction" else (row,)))
        return watched.state

    def state(self, kind: Kind) -> State:
        """How the kind stands since its last value."""
        return self._kind(kind).state

    def score(self, kind: Kind) -> float:
        """How far the kind is from what is usual: a drift is found at 4. 0 while what is usual is learned."""
        return self._kind(kind).score

    def drifts(self, kind: Kind) -> int:
        """How many drifts were found so far; the caller acts when this has grown."""
        return self._kind(kind).drifts

    def reset(self) -> None:
        """Forget all values. The counts of drifts stay, for they feed a counter."""
        for watched in self._kinds.values():
            watched.forget()

    def _kind(self, kind: str) -> _Kind:
        watched = self._kinds.get(kind)
        if watched is None:
            raise ValueError(f"kind is one of {', '.join(get_args(Kind))}; found {kind!r}")
        return watched


class _Kind:
    """What is watched of one kind, and how it stands."""

    def __init__(self, settings: DriftSettings, *features: _Features) -> None:
        self.state = State.NONE
        self.drifts = 0
        self._hold = settings.hold
        self._held = 0
        self._space: tuple[str | None, int] | None = None
        self._watches = [_Watch(settings, each) for each in features]

    @property
    def score(self) -> float:
        return max(watch.score for watch in self._watches)

    def enter(self, space: tuple[str | None, int]) -> None:
        if space != self._space:
            if self._space is not None:
                self.forget()
            self._space = space

    def forget(self) -> None:
        for watch in self._watches:
            watch.forget()

    def update(self, *values: Any) -> None:
        """One value for each watch; None where there is none."""
        found = [watch.update(value) for watch, value in zip(self._watches, values, strict=True) if value is not None]
        self._settle(max(found))

    def _settle(self, found: State) -> None:
        """Hold what was found for a while; a drift outlasts the warnings that come after it."""
        if found is State.DRIFT:
            self.drifts += 1
        if found >= self.state and found is not State.NONE:
            self.state, self._held = found, self._hold
        elif self._held > 0:
            self._held -= 1
            if self._held == 0:
                self.state = State.NONE


# What a value becomes: a cell of values is a row of columns, and a window's rows are statistics.


class _Features(Protocol):
    """Columns of a cell, and how far those of a window lie from those before it."""

    def fresh(self) -> _Features:
        """One that has seen nothing."""
        ...

    def rows(self, values: list[Any]) -> list[Doubles]:
        """The cells' rows (F,) that are ready now that this cell has come; none while it learns to make them."""
        ...

    def fit(self, cells: Doubles, clock: int) -> None:
        """Learn the columns' spread from remembered cells (n, F)."""
        ...

    def distances(self, recent: Doubles, before: Doubles, size: Doubles) -> Doubles:
        """Statistics (..., S) of windows' means (..., F) from those before, in squared standard errors or the like.

        Args:
            size: (...) values in both together, as half the harmonic mean of both counts.
        """
        ...

    def fell(self, recent: Doubles, before: Doubles, size: Doubles) -> bool:
        """Whether what counts only upwards is surely lower than before."""
        ...


class _Errors:
    """Right and wrong; the arcsine makes a rate's deviation the same wherever it lies."""

    def fresh(self) -> _Errors:
        return _Errors()

    def rows(self, values: list[Any]) -> list[Doubles]:
        return [np.mean(values, axis=0)]

    def fit(self, cells: Doubles, clock: int) -> None:
        pass

    def distances(self, recent: Doubles, before: Doubles, size: Doubles) -> Doubles:
        rise = np.maximum(np.arcsin(np.sqrt(recent)) - np.arcsin(np.sqrt(before)), 0.0)
        square: Doubles = 4.0 * size[..., None] * rise**2
        return square

    def fell(self, recent: Doubles, before: Doubles, size: Doubles) -> bool:
        return bool((self.distances(before, recent, size) > FALL).any())


class _Rising:
    """A number of which only a rise counts."""

    def __init__(self) -> None:
        self._deviation = 1.0

    def fresh(self) -> _Rising:
        return _Rising()

    def rows(self, values: list[Any]) -> list[Doubles]:
        return [np.mean(values, axis=0)]

    def fit(self, cells: Doubles, clock: int) -> None:
        self._deviation = max(float(cells.std()) * math.sqrt(clock), 0.01)

    def distances(self, recent: Doubles, before: Doubles, size: Doubles) -> Doubles:
        rise = np.maximum(recent - before, 0.0) / self._deviation
        square: Doubles = size[..., None] * rise**2
        return square

    def fell(self, recent: Doubles, before: Doubles, size: Doubles) -> bool:
        return bool((self.distances(before, recent, size) > FALL).any())


class _Shares:
    """The shares of the classes answered."""

    def fresh(self) -> _Shares:
        return _Shares()

    def rows(self, values: list[Any]) -> list[Doubles]:
        buckets = [zlib.crc32(answer.encode()) % BUCKETS for answer in values]
        return [np.bincount(buckets, minlength=BUCKETS) / len(values)]

    def fit(self, cells: Doubles, clock: int) -> None:
        pass

    def distances(self, recent: Doubles, before: Doubles, size: Doubles) -> Doubles:
        # Hellinger's distance: unlike chi-square's, a class never seen before is worth no more than its share.
        square = (np.sqrt(np.maximum(recent, 0.0)) - np.sqrt(np.maximum(before, 0.0))) ** 2
        distance: Doubles = 4.0 * size[..., None] * square.sum(axis=-1, keepdims=True)
        return distance

    def fell(self, recent: Doubles, before: Doubles, size: Doubles) -> bool:
        return False


class _Vectors:
    """The principal components of the first vectors, and how far a vector lies from their mean and their span."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._raw: list[Doubles] = []
        self._mean: Doubles = np.empty(0)

    def fresh(self) -> _Vectors:
        return _Vectors(self._first)

    def rows(self, values: list[Any]) -> list[Doubles]:
        cell = np.stack(values)
        if self._mean.size:
            return [self._columns(cell).mean(axis=0)]
        self._raw.append(cell)
        if sum(map(len, self._raw)) >= self._first:
            cells, self._raw = self._raw, []
            self._learn(np.concatenate(cells))
            # Many directions fit the vectors that they were learned from better than those to come.
            if 16 * cell.shape[1] <= self._first:
                return [self._columns(each).mean(axis=0) for each in cells]
        return []

    def _learn(self, rows: Doubles) -> None:
        self._mean = rows.mean(axis=0)
        _, lengths, directions = np.linalg.svd(rows - self._mean, full_matrices=False)
        count = min(COMPONENTS, rows.shape[1], len(rows) // 8)
        self._basis = np.ascontiguousarray(directions[:count].T)
        # What never varied has no deviation: any change of it is one, but rounding is not.
        tiny = 1e-6 * float(np.abs(self._mean).max()) + 1e-150
        self._scale = np.maximum(lengths[:count] / math.sqrt(len(rows)), tiny)
        self._floor = tiny**2 + 1e-6 * float(self._scale @ self._scale)
        self._middle, self._spread = np.zeros(2), np.ones(2)
        distances = self._columns(rows)[:, count:]
        self._middle, self._spread = np.median(distances, axis=0), np.maximum(distances.std(axis=0), 0.01)

    def _columns(self, rows: Doubles) -> Doubles:
        centred = rows - self._mean
        inside = centred @ self._basis
        whole = np.einsum("nd,nd->n", centred, centred)
        rest = np.maximum(whole - np.einsum("nk,nk->n", inside, inside), 0.0)
        logs = 0.5 * np.log(np.stack([whole, rest], axis=1) + self._floor)
        columns = np.concatenate([inside / self._scale, (logs - self._middle) / self._spread], axis=1)
        clipped: Doubles = np.clip(columns, -CLIP, CLIP)
        return clipped

    def fit(self, cells: Doubles, clock: int) -> None:
        self._deviation = np.maximum(cells.std(axis=0) * math.sqrt(clock), 0.05)

    def distances(self, recent: Doubles, before: Doubles, size: Doubles) -> Doubles:
        square = size[..., None] * ((recent - before) / self._deviation) ** 2
        return np.stack([square.sum(axis=-1), square.max(axis=-1)], axis=-1)

    def fell(self, recent: Doubles, before: Doubles, size: Doubles) -> bool:
        return False


# How far is far


class _Memory:
    """The last cells, as running sums, so that the mean of any stretch is one difference."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._sums = np.zeros((2 * capacity + 1, 0))
        self._start = self._end = 0

    def __len__(self) -> int:
        return min(self._end - self._start, self.capacity)

    def add(self, row: Doubles) -> None:
        if self._end == 0:
            self._sums = np.zeros((2 * self.capacity + 1, len(row)))
        if self._end == 2 * self.capacity:
            self._sums[: self.capacity + 1] = self._sums[self.capacity :] - self._sums[self.capacity]
            self._start, self._end = max(0, self._start - self.capacity), self.capacity
        self._sums[self._end + 1] = self._sums[self._end] + row
        self._end += 1

    def keep(self, count: int) -> None:
        """Forget all but the last cells."""
        self._start = self._end - count

    def cells(self) -> Doubles:
        """The remembered cells (n, F), oldest first."""
        return np.diff(self._sums[self._end - len(self) : self._end + 1], axis=0)

    def compare(self, scales: Sequence[int], clock: int) -> tuple[Doubles, Doubles, Doubles]:
        """Means (W, F) of the last cells, as many as each scale says, and of those before them; their size (W,)."""
        return _compare(self._sums, np.array(self._end), len(self), np.array(scales), clock)


def _compare(
    sums: Doubles, ends: npt.NDArray[np.intp], count: int, scales: npt.NDArray[np.intp], clock: int
) -> tuple[Doubles, Doubles, Doubles]:
    """Windows that end at `ends` against what was before them, among the last `count` cells."""
    split = sums[ends - scales]
    recent, before = (
        (sums[ends] - split) / scales[..., None],
        (split - sums[ends - count]) / (count - scales)[..., None],
    )
    size = clock / (1.0 / scales + 1.0 / (count - scales))
    return recent, before, np.broadcast_to(size, recent.shape[:-1])


class _Usual(NamedTuple):
    """What a watch's statistics are by chance.

    Args:
        level: (W, S) what one in ten passes, by window and statistic.
        fold: (W, S) how much further one in e of those goes. A height is counted in folds above the level.
        middle, deviation: of the greatest height of a stretch.
    """

    level: Doubles
    fold: Doubles
    middle: float
    deviation: float

    def passed_once_in(self, events: float, clock: int, seen: Sequence[float]) -> float:
        """The height that is passed once in so many events, from what was drawn and from real stretches' maxima."""
        # Were every check by itself and every tail exponential, it would be no less than the last of these.
        found = [_gumbel(self.middle, self.deviation, events, clock), math.log(0.1 * events / clock)]
        if seen:
            weight = len(seen) + PRIOR
            middle = (sum(seen) + PRIOR * self.middle) / weight
            square = sum((height - middle) ** 2 for height in seen) + PRIOR * self.deviation**2
            found.append(_gumbel(middle, math.sqrt(square / weight), events, clock))
        return max(found)


def _gumbel(middle: float, deviation: float, events: float, clock: int) -> float:
    """What a stretch's maximum passes so seldom that it happens once in so many events."""
    slope = deviation * math.sqrt(6.0) / math.pi
    return middle - 0.5772 * slope - slope * math.log(STRETCH * clock / events)


class _Watch:
    """One series: its memory, and what is usual in it."""

    def __init__(self, settings: DriftSettings, features: _Features) -> None:
        self._settings, self._features = settings, features
        # What was usual before the last drift, and how high its stretches rose.
        self._before: _Usual | None = None
        self._maxima: deque[float] = deque(maxlen=STRETCHES)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        settings = self._settings
        self._features = self._features.fresh()
        self._memory = _Memory(settings.memory // settings.clock)
        self._pending: list[Any] = []
        self._usual: _Usual | None = None
        self._alarm = self._warning = math.inf
        self._seen = 0
        self._learn_at = -(-settings.warm_up // settings.clock)
        self._heights: list[float] = []
        self.score = 0.0

    def update(self, value: Any) -> State:
        self._pending.append(value)
        if len(self._pending) < self._settings.clock:
            return State.NONE
        values, self._pending = self._pending, []
        for row in self._features.rows(values):
            self._memory.add(row)
            self._seen += 1
        return self._look()

    def _look(self) -> State:
        if self._seen % 8 == 0:
            self._let_go()
        if self._seen >= self._learn_at and len(self._memory) >= LEAST:
            self._learn()
        if self._usual is None:
            self.score = 0.0
            return State.NONE
        scales = [s for s in SCALES[: len(self._usual.level)] if 3 * s <= len(self._memory)] or SCALES[:1]
        found = self._features.distances(*self._memory.compare(scales, self._settings.clock))
        count = len(scales)
        height = float(((found - self._usual.level[:count]) / self._usual.fold[:count]).max())
        if height >= self._alarm:
            score = ALARM * height / self._alarm
            self.forget()
            self.score = score
            return State.DRIFT
        self.score = max(0.0, ALARM * height / self._alarm)
        self._heights.append(height)
        if len(self._heights) == STRETCH:
            self._maxima.append(max(self._heights))
            self._heights = []
            self._set_heights()
        return State.WARNING if height >= self._warning else State.NONE

    def _let_go(self) -> None:
        """Forget the older half if what counts only upwards has fallen since."""
        count = len(self._memory)
        if count >= 2 * LEAST and self._features.fell(*self._memory.compare([count // 2], self._settings.clock)):
            self._memory.keep(count // 2)

    def _learn(self) -> None:
        """Learn what is usual from what is remembered; again when that has doubled or is all new."""
        cells = self._memory.cells()
        self._features.fit(cells, self._settings.clock)
        usual, before = learn_usual(self._features, cells, self._settings.clock), self._before
        if before is not None and len(cells) < self._memory.capacity // 2:
            # So short a past knows too little: what was usual before the drift counts as well.
            both = min(len(usual.level), len(before.level))
            usual.level[:both] = np.maximum(usual.level[:both], before.level[:both])
            usual.fold[:both] = np.maximum(usual.fold[:both], before.fold[:both])
        else:
            self._before = usual
        self._usual = usual
        self._learn_at = self._seen + min(self._seen, self._memory.capacity)
        self._set_heights()

    def _set_heights(self) -> None:
        assert self._usual is not None
        settings, usual = self._settings, self._usual
        # Four watches a stream; and a short past has shown less than a long one.
        share = 4 * CAUTION * self._memory.capacity / len(self._memory)
        self._alarm = usual.passed_once_in(share * settings.false_alarms_every, settings.clock, self._maxima)
        self._warning = usual.passed_once_in(share * settings.warnings_every, settings.clock, self._maxima)


def learn_usual(features: _Features, cells: Doubles, clock: int) -> _Usual:
    """What the statistics of windows are by chance in a stream like these cells (n, F)."""
    count = len(cells)
    length = max(2, count // BLOCKS)
    rng = np.random.default_rng(count)
    starts = rng.integers(0, count, size=-(-(SIMULATED + count) // length))
    order = ((starts[:, None] + np.arange(length)) % count).ravel()[: SIMULATED + count]
    sums = np.concatenate([np.zeros((1, cells.shape[1])), np.cumsum(cells[order], axis=0)])
    ends = np.arange(count, SIMULATED + count)
    levels, folds, heights = [], [], np.full(SIMULATED, -np.inf)
    for scale in (scale for scale in SCALES if 3 * scale <= count):
        chance = features.distances(*_compare(sums, ends, count, np.full(SIMULATED, scale), clock))
        # No less than for a single normal number, lest what never varied has no height at all.
        level = np.maximum(np.quantile(chance, 0.9, axis=0), 1.64**2)
        above = chance > level
        fold = np.where(above, chance - level, 0.0).sum(axis=0) / np.maximum(above.sum(axis=0), 1)
        fold = np.maximum(fold, 2.0)
        heights = np.maximum(heights, ((chance - level) / fold).max(axis=1))
        wider = _wider(features, cells, scale, clock, chance.mean(axis=0))
        levels.append(level * wider)
        folds.append(fold * wider)
    maxima = heights.reshape(-1, STRETCH).max(axis=1)
    return _Usual(np.stack(levels), np.stack(folds), float(maxima.mean()), float(maxima.std()))


def _wider(features: _Features, cells: Doubles, scale: int, clock: int, drawn: Doubles) -> Doubles:
    """How much further the past's own windows lie from the rest of it than drawn ones (S,), at least 1."""
    count = len(cells) // scale
    if count < 4:
        return np.ones_like(drawn)
    past = cells[-count * scale :]
    windows = past.reshape(count, scale, -1).mean(axis=1)
    rest = (past.sum(axis=0) - windows * scale) / ((count - 1) * scale)
    size = np.full(count, clock / (1.0 / scale + 1.0 / ((count - 1) * scale)))
    found = features.distances(windows, rest, size).mean(axis=0)
    wider: Doubles = np.maximum(1.0, (count * found + PRIOR * drawn) / ((count + PRIOR) * np.maximum(drawn, 1e-12)))
    return wider
