"""Can a labeller be believed? What each one says, held against what the others and the model say.

Pure: claims in, suspicions out. A claim is one labeller's label of one learned event, with the class that a
head which never saw this event is sure of (its *reference*), or that at least two other labellers agree on
where the head is not sure. A claim that differs from its reference is *contradicted*. No share of contradicted
claims is bad by itself, because streams differ in how hard they are and a world that changes contradicts
everybody. So a labeller is compared with the others who label beside it:

- among events that look alike (strata by reference), so that who labels the hard classes is not blamed;
- at the same time (strata by stretches of time), so that a drifting world is not taken for a bad labeller,
  nor the shift that follows a change for worse than the shift before it.

Its excess of contradicted claims is the Mantel-Haenszel risk difference with the variance of Sato (1989, "On
the variance estimator for the Mantel-Haenszel risk difference", Biometrics 45), which holds where strata are
many and small. Only an excess that is beyond the `margin` by `sureness` standard errors in both ways of
comparing makes a suspect, and of several only the worst, since what a bad one taught speaks against the good.
Who labels alone is compared with nobody and never a suspect: nothing tells a changed world from a changed
labeller then.

A *burst* is another thing: many claims by one labeller, close together, that give one class to events of which
the head is sure that they are of several others, while what is said of other classes goes on being borne out.
A class whose meaning moved takes its events from one other class, and a new class has no reference against it
until it was taught to the head, so neither is a burst.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

Flags = npt.NDArray[np.bool_]

PERIODS = 8
"""Stretches of time, of equal numbers of claims, within which labellers are compared."""
MOVED = 0.8
"""Where two classes alone give more than this share of what is contradicted, a boundary moved: no burst."""


class TrustSettings(BaseModel):
    """When labels are set aside because of who sent them. Nothing is, before there is evidence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=True, description="false: every labeller is believed, whatever it says")
    every_labels: int = Field(default=250, ge=1, description="new labels between two reviews")
    window: int = Field(default=2_000, ge=100, le=50_000, description="newest labels that a review looks at")
    confidence: float = Field(
        default=0.8,
        gt=0.5,
        lt=1,
        description="probability from which the head, not knowing a label, may speak against it",
    )
    margin: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of contradicted labels beyond the other labellers' that is let pass",
    )
    sureness: float = Field(
        default=4.5, ge=1, le=20, description="standard errors beyond the margin that make a suspect"
    )
    minimum: int = Field(default=10, ge=3, description="contradicted labels before a labeller can be a suspect")
    burst_labels: int = Field(default=20, ge=5, description="contradicted labels naming one class that are a burst")
    burst_window: int = Field(
        default=200, ge=20, description="of one labeller's newest labels, those in which a burst lies"
    )


@dataclass(frozen=True, slots=True)
class Claim:
    """One labeller's label of one learned event.

    Args:
        reference: the class that the others are sure of; None where nobody is.
        guess: the class that the head thinks likeliest without this event, sure or not; None where it cannot say.
    """

    event_id: str
    labeller: str
    label: str
    labelled_at: datetime
    reference: str | None
    guess: str | None = None

    @property
    def contradicted(self) -> bool:
        """Whether the others are sure of another class."""
        return self.reference is not None and self.reference != self.label


@dataclass(frozen=True, slots=True)
class Standing:
    """How one labeller stands.

    Args:
        labels: claims looked at.
        judged: those with a reference.
        contradicted: those of another class than their reference.
        excess: share contradicted beyond the other labellers', on events alike; None where nobody can be compared.
        surely: standard errors by which the excess is beyond the margin, the lesser of both ways of comparing.
    """

    labels: int
    judged: int
    contradicted: int
    excess: float | None = None
    surely: float | None = None


@dataclass(frozen=True, slots=True)
class Suspect:
    """A labeller not to be believed unseen since a moment (`labelled_at`), and why.

    Args:
        wholly: three in four of its labels are contradicted, so what the head bears out of it is chance.
    """

    labeller: str
    since: datetime
    why: str
    wholly: bool = False

    def covers(self, claim: Claim) -> bool:
        """Whether this claim is one to set aside: it falls into the time, and the head does not bear it out."""
        if claim.labeller != self.labeller or claim.labelled_at < self.since:
            return False
        return self.wholly or claim.contradicted


@dataclass(frozen=True, slots=True)
class Burst:
    """Claims of one labeller that would poison one class, and why they are thought to."""

    labeller: str
    label: str
    event_ids: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Review:
    """What a review found."""

    standings: Mapping[str, Standing] = field(default_factory=dict)
    bursts: tuple[Burst, ...] = ()
    suspect: Suspect | None = None


def review(claims: Iterable[Claim], settings: TrustSettings | None = None, suspects: Iterable[Suspect] = ()) -> Review:
    """Look at the newest claims of a stream, in any order.

    Args:
        suspects: the labellers who are suspects already. Nobody is compared with them.

    Claims that belong to a burst say nothing more about their labeller: one bad hour is not a bad labeller.
    """
    settings = settings or TrustSettings()
    ordered = sorted(claims, key=lambda claim: (claim.labelled_at, claim.event_id, claim.labeller))
    bursts = _bursts(ordered, settings)
    burst = {(one.labeller, event_id) for one in bursts for event_id in one.event_ids}
    known = {suspect.labeller for suspect in suspects}
    rest = [claim for claim in ordered if claim.labeller not in known and (claim.labeller, claim.event_id) not in burst]
    table = _Table(rest)
    standings: dict[str, Standing] = {}
    found: list[tuple[float, Suspect]] = []
    for labeller in sorted({claim.labeller for claim in rest}):
        standing, suspect = table.judge(labeller, settings)
        standings[labeller] = standing
        if suspect is not None and standing.surely is not None:
            found.append((standing.surely, suspect))
    worst = max(found, key=lambda pair: (pair[0], pair[1].labeller), default=None)
    return Review(standings, tuple(bursts), None if worst is None else worst[1])


def excess(
    ours: Sequence[int], strata: Sequence[object], contradicted: Flags, mine: Flags
) -> tuple[float, float] | None:
    """The Mantel-Haenszel risk difference of `mine` against the others, and its standard error; None without overlap.

    Args:
        ours: the rows to take.
        strata: (n,) what makes two claims comparable.
        contradicted: (n,)
        mine: (n,)
    """
    cells: dict[object, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in ours:
        cell = cells[strata[row]]
        side = 0 if mine[row] else 2
        cell[side] += int(contradicted[row])
        cell[side + 1] += 1
    weight = total = p = q = 0.0
    for a, n1, b, n0 in cells.values():
        if not n1 or not n0:
            continue
        n = n1 + n0
        weight += n1 * n0 / n
        total += (a * n0 - b * n1) / n
        p += (n1**2 * b - n0**2 * a + n1 * n0 * (n0 - n1) / 2) / n**2
        q += (a * (n0 - b) + b * (n1 - a)) / (2 * n)
    if not weight:
        return None
    difference = total / weight
    return difference, math.sqrt(max(difference * p + q, 0.0)) / weight


class _Table:
    """The claims that have a reference, in order of time, as columns."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        self._labels = Counter(claim.labeller for claim in claims)
        self._claims = [claim for claim in claims if claim.reference is not None]
        self._who = np.array([claim.labeller for claim in self._claims], dtype=object)
        self._contradicted = np.array([claim.contradicted for claim in self._claims], dtype=bool)
        self._alike = [claim.reference for claim in self._claims]
        self._periods = [row * PERIODS // len(self._claims) for row in range(len(self._claims))]

    def judge(self, labeller: str, settings: TrustSettings) -> tuple[Standing, Suspect | None]:
        """How the labeller stands, and whether it is a suspect.

        Both the whole window and its newest half, quarter and so on are looked at, so that a good past does
        not hide a bad present.
        """
        mine = self._who == labeller
        rows = np.flatnonzero(mine)
        bad = int(self._contradicted[rows].sum())
        plain = Standing(self._labels[labeller], len(rows), bad)
        best: tuple[float, float, int] | None = None
        share = len(rows)
        while share >= settings.minimum:
            first = int(rows[-share])
            if self._contradicted[rows[-share:]].sum() < settings.minimum:
                break
            recent = range(first, len(self._claims))
            found = [excess(recent, strata, self._contradicted, mine) for strata in (self._alike, self._periods)]
            if all(pair is not None and pair[1] > 0 for pair in found):
                surely = min((pair[0] - settings.margin) / pair[1] for pair in found if pair is not None)
                if found[0] is not None and (best is None or surely > best[0]):
                    best = surely, found[0][0], first
            share //= 2
        if best is None:
            return plain, None
        surely, beyond, first = best
        standing = Standing(plain.labels, plain.judged, plain.contradicted, beyond, surely)
        if surely < settings.sureness:
            return standing, None
        turn = self._turn(rows, settings)
        since = [row for row in rows if row >= turn]
        wrong = int(self._contradicted[since].sum())
        why = f"{wrong} of its {len(since)} labels since then are contradicted, {beyond:.0%} more than of the others'"
        return standing, Suspect(labeller, self._claims[turn].labelled_at, why, wholly=4 * wrong > 3 * len(since))

    def _turn(self, rows: npt.NDArray[np.intp], settings: TrustSettings) -> int:
        """Where it turned: the beginning of the stretch up to now that speaks against it most (Page 1954)."""
        others = self._contradicted[self._who != self._claims[int(rows[0])].labeller]
        usual = float(others.mean()) if len(others) else 0.0
        steps = self._contradicted[rows].astype(float) - (usual + settings.margin)
        from_here = np.cumsum(steps[::-1])[::-1]
        return int(rows[int(np.argmax(from_here))])


def _bursts(ordered: Sequence[Claim], settings: TrustSettings) -> list[Burst]:
    by_labeller: dict[str, list[Claim]] = defaultdict(list)
    for claim in ordered:
        by_labeller[claim.labeller].append(claim)
    found = []
    for labeller, claims in sorted(by_labeller.items()):
        # A burst may have begun in the stretch before, so stretches overlap by half.
        against: dict[str, dict[str, str]] = defaultdict(dict)
        taken: dict[str, set[str]] = defaultdict(set)
        for start in range(0, max(len(claims) - settings.burst_window // 2, 1), settings.burst_window // 2):
            stretch = claims[start : start + settings.burst_window]
            for label in sorted({claim.label for claim in stretch}):
                named = [claim for claim in stretch if claim.label == label]
                if _is_burst(named, [claim for claim in stretch if claim.label != label], settings):
                    against[label].update({c.event_id: str(c.reference) for c in named if c.contradicted})
                    taken[label] |= {c.event_id for c in named if c.guess != label}
        for label, event_ids in sorted(taken.items()):
            classes = len(set(against[label].values()))
            why = f"{len(against[label])} labels name it on events that are surely of {classes} other classes"
            found.append(Burst(labeller, label, tuple(sorted(event_ids)), why))
    return found


def _is_burst(named: Sequence[Claim], others: Sequence[Claim], settings: TrustSettings) -> bool:
    wrong = Counter(claim.reference for claim in named if claim.contradicted)
    total = wrong.total()
    most = [count for _, count in wrong.most_common(2)]
    if total < settings.burst_labels or 2 * most[0] > total or sum(most) > MOVED * total:
        return False
    judged = sum(claim.reference is not None for claim in named)
    elsewhere = [claim.contradicted for claim in others if claim.reference is not None]
    usual = sum(elsewhere) / len(elsewhere) if elsewhere else 0.0
    return total / judged - usual >= 0.5
