"""The newest labels count more, where that turns out right: a second head, and a race on live labels between the two.

A world that changes is learned faster by a head in which the newest labels weigh more; one that does not is learned
better, as a rule, by all labels alike. Which of the two is better on a stream is not known beforehand, so both heads
answer each event before either is taught its label, and a bet is kept on which of them is right more often.

The second head is of the same exact sums: those of the newest labels are added some times more. `Newest` keeps them,
and what leaves the newest is subtracted, so that they are those of the labels held, whatever came and went before.

Only events of which one head is right and the other wrong carry evidence. A rare class counts as much as a frequent
one: an event weighs as much as its class is rarer than the mean class, up to `MOST`, as of the labels before it. Were
the head not in use no better in that measure, each bet's wealth

    W = max(W, 1) * (1 + stake * weight / MOST * (+1 where it alone was right, -1 where it alone was wrong))

would grow no faster than one for each such event, so its mean over stakes first reaches `odds` after that many on
average, or later (an e-detector: Shin, Ramdas and Rinaldo 2024, "E-detectors: a nonparametric framework for sequential
change detection", New England Journal of Statistics in Data Science 2). It may be looked at after every label. Wealth
never stays below 1, so a change that comes late is found as fast as an early one. Once the other head is in use, the
bets begin again, on the one that was given up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from learner.heads import HeadSums

MOST = 5.0
"""The most that an event of a rare class weighs: a class's first labels would else decide alone."""
STAKES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
"""Shares of its wealth that each bet stakes; small ones find small differences."""


class RecencySettings(BaseModel):
    """Whether, and how much more, the newest labels may count."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: int = Field(default=300, ge=1, le=10_000, description="how many labels are the newest")
    weight: int = Field(default=4, ge=2, le=100, description="how often each of them counts")
    odds: float = Field(
        default=10_000.0,
        gt=1,
        allow_inf_nan=False,
        description="labels that tell the heads apart, on average, until a head that is no better is taken over",
    )


class Newest:
    """The sums of the newest labels, under one encoder.

    Args:
        dimension: d, the length of an embedding.
        bound: the largest absolute component that the encoder gives.
        width: number of random features that are summed; see `HeadSums`.
    """

    def __init__(self, dimension: int, bound: float, width: int = 0) -> None:
        self._sums = HeadSums(dimension, bound, width)
        self._held: dict[str, tuple[npt.NDArray[np.int16], str]] = {}

    @property
    def sums(self) -> HeadSums:
        """What is held, each once; not to be changed."""
        return self._sums

    def hold(self, newest: Mapping[str, tuple[npt.NDArray[np.int16], str]]) -> None:
        """Hold these and no others.

        Args:
            newest: embedding (d,) and label by event id.
        """
        gone = [held for event_id, held in self._held.items() if not _same(held, newest.get(event_id))]
        new = [wanted for event_id, wanted in newest.items() if not _same(wanted, self._held.get(event_id))]
        for rows, move in ((new, self._sums.add), (gone, self._sums.subtract)):
            if rows:
                move(np.stack([embedding for embedding, _ in rows]), [label for _, label in rows])
        self._held = dict(newest)

    def emphasised(self, sums: HeadSums, weight: int) -> HeadSums:
        """These sums with the newest in them counted `weight` times.

        Raises:
            OverflowError: they would leave the range in which they are exact.
        """
        more = sums.copy()
        for _ in range(weight - 1):
            more.merge(self._sums)
        return more


def _same(one: tuple[npt.NDArray[np.int16], str] | None, other: tuple[npt.NDArray[np.int16], str] | None) -> bool:
    return one is not None and other is not None and one[1] == other[1] and np.array_equal(one[0], other[0])


class Heat(NamedTuple):
    """One label, and which head had the event right before either was taught it."""

    label: str
    plain: bool
    newest: bool


class Race(BaseModel):
    """What the heads' answers to live labels have come to. Begins with the plain head.

    Args:
        leader: the head in use.
        wealth: of the bets on the other, one a stake.
        seen: labels so far, by class.
        changes: how often the leader changed.
    """

    model_config = ConfigDict(frozen=True)

    leader: Literal["plain", "newest"] = "plain"
    wealth: tuple[float, ...] = (1.0,) * len(STAKES)
    seen: dict[str, int] = {}
    changes: int = 0

    def after(self, heats: Sequence[Heat], odds: float) -> Race:
        """The race after these labels, in order.

        Args:
            odds: the mean wealth at which the other head is taken.
        """
        leader, wealth, seen, changes = self.leader, np.array(self.wealth), dict(self.seen), self.changes
        total = sum(seen.values())
        for heat in heats:
            before = seen.get(heat.label, 0)
            weight = min(MOST, (total + 1) / (max(1, len(seen)) * (before + 1)))
            seen[heat.label], total = before + 1, total + 1
            if heat.plain == heat.newest:
                continue
            won = heat.newest if leader == "plain" else heat.plain
            wealth = np.maximum(wealth, 1.0) * (1.0 + np.array(STAKES) * (weight / MOST * (1 if won else -1)))
            if wealth.mean() >= odds:
                leader = "newest" if leader == "plain" else "plain"
                wealth, changes = np.ones(len(STAKES)), changes + 1
        return Race(leader=leader, wealth=tuple(wealth.tolist()), seen=seen, changes=changes)
