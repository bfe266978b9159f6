"""The shadow: after a promotion the loser goes on answering what gets a label, and may turn out the better one.

Both heads answer an event before either is taught its label (prequential), each under its own encoder, and both
are taught it then. Only answers of which one is right and the other wrong carry evidence. Were the champion no
worse, each of those would speak for the loser with probability 1/2 at most, whatever came before. Betting on
more than that, with the stake spread evenly over all probabilities from 1/2 to 1, multiplies one's capital by

    E = 2^(n + 1) * integral from 1/2 to 1 of p^lost * (1 - p)^won dp,    n = lost + won,

which under that assumption is a supermartingale from 1. So the chance that it ever reaches 1/alpha is alpha at
most, however often one looks (Ville 1939; the mixture is that of Robbins 1970, "Statistical methods related to
the law of the iterated logarithm", Annals of Mathematical Statistics 41; as a bet, Waudby-Smith and Ramdas 2023,
"Estimating means of bounded random variables by betting", JRSS B 86). Half of alpha is for all labels together,
half for single classes: the capital is divided among them before the first label, and what they have in all
counts, which needs no assumption on how they hang together.

The state is a handful of counts. Everything here is pure but for the encoder's arithmetic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import betainc, betaln

from learner.heads import HeadSums, LinearHead, Prior, dequantise, quantise, solve

if TYPE_CHECKING:
    from learner.encoders import Encoder, Payload

LOG2 = math.log(2.0)
SLOW_SOLVE = 0.05
"""Seconds: heads that take longer to solve are solved so seldom that learning keeps most of its thread."""
SOLVE_SHARE = 0.2
"""The most of its thread's time that solving slow heads may take."""


class ShadowSettings(BaseModel):
    """How long the version before a promotion goes on answering, and when it gets its place back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: int = Field(
        default=1_000, ge=0, description="labels for which the loser of a promotion answers along; 0 for none"
    )
    alpha: float = Field(
        default=0.01, gt=0, le=0.5, description="chance at most that a champion that is no worse is rolled back"
    )


class Tally(BaseModel):
    """Labels of one class, or of all: `won` by the champion alone, `lost` to the loser alone."""

    model_config = ConfigDict(frozen=True)

    seen: int = 0
    won: int = 0
    lost: int = 0

    def plus(self, champion: bool, loser: bool) -> Tally:
        """With one more label: who was right."""
        return Tally(
            seen=self.seen + 1,
            won=self.won + (champion and not loser),
            lost=self.lost + (loser and not champion),
        )

    @property
    def fall(self) -> float:
        """By how much the champion was right less often."""
        return (self.lost - self.won) / self.seen if self.seen else 0.0

    @property
    def log_capital(self) -> float:
        """The logarithm of E above."""
        upper = float(betainc(self.won + 1, self.lost + 1, 0.5))
        if upper <= 0.0:
            return -math.inf
        whole = float(betaln(self.lost + 1, self.won + 1))
        return (self.lost + self.won + 1) * LOG2 + whole + math.log(upper)


class Duel(BaseModel):
    """One champion against the version it replaced, label by label. What a learner keeps of it over a restart.

    Args:
        champion: the version promoted.
        loser: the version it replaced.
        encoder: digest of the loser's encoder.
        classes: the classes known at the promotion, among which the stakes on single classes are divided.
        began_at: when the champion was promoted.
        total: all labels together.
        by_class: by class, in the order of their first labels.
        tried: the events answered so far, which the loser's head was taught since.
        reason: why the champion is to go, in words; empty while it stays.
    """

    model_config = ConfigDict(frozen=True)

    champion: str
    loser: str
    encoder: str
    classes: list[str]
    began_at: datetime
    total: Tally = Tally()
    by_class: dict[str, Tally] = {}
    tried: list[str] = []
    reason: str = ""

    def over(self, settings: ShadowSettings) -> bool:
        """Whether it is decided, either way."""
        return bool(self.reason) or self.total.seen >= settings.labels

    def after(self, outcomes: Sequence[Outcome], settings: ShadowSettings, budget: float) -> Duel:
        """The duel after these labels, in order; nothing is added to one that is over.

        Args:
            budget: the largest fall of a class's recall that is allowed.
        """
        if self.over(settings):
            return self
        total, by_class, tried, reason = self.total, dict(self.by_class), list(self.tried), ""
        for outcome in outcomes[: settings.labels - total.seen]:
            total = total.plus(outcome.champion, outcome.loser)
            by_class[outcome.label] = by_class.get(outcome.label, Tally()).plus(outcome.champion, outcome.loser)
            tried.append(outcome.event_id)
            if outcome.loser and not outcome.champion:
                reason = self._verdict(total, by_class, settings.alpha, budget)
            if reason:
                break
        changed = {"total": total, "by_class": by_class, "tried": tried, "reason": reason}
        return self.model_copy(update=changed)

    def _verdict(self, total: Tally, by_class: Mapping[str, Tally], alpha: float, budget: float) -> str:
        versus = f"{self.champion} is worse than {self.loser} on"
        if total.log_capital >= math.log(2.0 / alpha):
            return f"{versus} the labels since: {_words(total)}"
        stakes = self.stakes(by_class)
        capital = {name: stakes[name] * math.exp(min(tally.log_capital, 700.0)) for name, tally in by_class.items()}
        if sum(capital.values()) + (1.0 - sum(stakes.values())) >= 2.0 / alpha:
            for name in sorted(capital, key=lambda name: -capital[name]):
                if by_class[name].fall > budget:
                    return f"{versus} labels of class {name!r}: {_words(by_class[name])}"
        return ""

    def stakes(self, names: Iterable[str]) -> dict[str, float]:
        """The share put on each class: alike on those known at the start, and one share divided among later ones.

        Args:
            names: classes in the order of their first labels; what is on the others is 1 minus the sum.
        """
        known, share, later = set(self.classes), 1.0 / (len(self.classes) + 1), 0
        found = {}
        for name in names:
            later += name not in known
            found[name] = share if name in known else share / (later * (later + 1))
        return found


@dataclass(frozen=True, slots=True)
class Event:
    """One labelled event before either head is taught it; `embedding` (d,) is the champion's."""

    event_id: str
    payload: Payload
    embedding: npt.NDArray[np.int16]
    label: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Who was right about one event."""

    event_id: str
    label: str
    champion: bool
    loser: bool


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """What came of one batch: the duel after it, and the loser's embeddings by event id."""

    duel: Duel
    embeddings: Mapping[str, npt.NDArray[np.int16]]


class Shadow:
    """The loser of a promotion: its encoder, and a head that goes on learning.

    Args:
        duel: what has been found so far.
        encoder: the loser's.
        sums: what the loser's head had learned at the promotion, under its encoder; changed here.
        prior: how a class's frequency counts in the heads.
    """

    def __init__(self, duel: Duel, encoder: Encoder, sums: HeadSums, prior: Prior) -> None:
        self.duel, self._encoder, self._sums, self._prior = duel, encoder, sums, prior
        self._embeddings: dict[str, npt.NDArray[np.int16]] = {}
        self._taught: dict[str, str] = {}
        self._heads: tuple[LinearHead | None, LinearHead | None] | None = None
        self._rest_until = 0.0

    @property
    def sums(self) -> HeadSums:
        """What the loser's head has learned."""
        return self._sums

    def relearn(self, events: Sequence[tuple[str, Payload, str]]) -> None:
        """After a restart: be taught (event id, payload, label) of what was tried and is learned."""
        if not events:
            return
        q = quantise(self._encoder.embed([payload for _, payload, _ in events]), self._encoder.spec.bound)
        self._embeddings.update({event_id: row for (event_id, _, _), row in zip(events, q, strict=True)})
        self._sums.add(q, [label for _, _, label in events])
        self._taught.update({event_id: label for event_id, _, label in events})

    def attempt(
        self, events: Sequence[Event], champion: HeadSums, settings: ShadowSettings, budget: float
    ) -> Trial | None:
        """Both heads answer; neither is taught yet. None where there is nothing to answer.

        Both are solved from their sums at one moment. The champion's revision in service may be older, or held by
        the guard, and that would not be the version's fault.
        """
        tried = set(self.duel.tried)
        events = [event for event in events if event.event_id not in tried][: settings.labels - self.duel.total.seen]
        if not events or self.duel.over(settings):
            return None
        bound = self._encoder.spec.bound
        q = quantise(self._encoder.embed([event.payload for event in events]), bound)
        own, other = self._solved(champion)
        mine = _answers(own, dequantise(q, bound))
        theirs = _answers(other, dequantise(np.stack([event.embedding for event in events]), champion.bound))
        outcomes = [
            Outcome(event.event_id, event.label, their == event.label, my == event.label)
            for event, their, my in zip(events, theirs, mine, strict=True)
        ]
        after = self.duel.after(outcomes, settings, budget)
        return Trial(after, {event.event_id: row for event, row in zip(events, q, strict=True)})

    def _solved(self, champion: HeadSums) -> tuple[LinearHead | None, LinearHead | None]:
        """The loser's head and the champion's; where they take long to solve they serve for several batches."""
        began = time.monotonic()
        if self._heads is None or began >= self._rest_until:
            self._heads = solve(self._sums, prior=self._prior), solve(champion, prior=self._prior)
            took = time.monotonic() - began
            self._rest_until = began + (took / SOLVE_SHARE if took > SLOW_SOLVE else 0.0)
        return self._heads

    def settle(self, trial: Trial) -> None:
        """The batch was kept: so is what came of it."""
        self.duel = trial.duel
        self._embeddings.update(trial.embeddings)

    def follow(self, event_ids: Sequence[str], labels: Sequence[str], signs: Sequence[int]) -> None:
        """Be taught, and made to forget, what the champion's ledger says, of the events tried here.

        Of what was learned before the promotion the ledger's corrections are not followed: the loser's embedding
        is not kept, and it would take the event to make it again.
        """
        wanted = dict(self._taught)
        touched: dict[str, None] = {}
        for event_id, label, sign in zip(event_ids, labels, signs, strict=True):
            if event_id not in self._embeddings:
                continue
            touched[event_id] = None
            if sign > 0:
                wanted[event_id] = label
            elif wanted.get(event_id) == label:
                del wanted[event_id]
        changed = [event_id for event_id in touched if wanted.get(event_id) != self._taught.get(event_id)]
        new = [event_id for event_id in changed if event_id in wanted]
        old = [event_id for event_id in changed if event_id in self._taught]
        if new:
            self._sums.add(np.stack([self._embeddings[e] for e in new]), [wanted[e] for e in new])
        if old:
            self._sums.subtract(np.stack([self._embeddings[e] for e in old]), [self._taught[e] for e in old])
        self._taught = wanted


def _answers(head: LinearHead | None, embeddings: npt.NDArray[np.float32]) -> Sequence[str | None]:
    return [None] * len(embeddings) if head is None else head.predict(embeddings)


def _words(tally: Tally) -> str:
    return (
        f"of {tally.seen} it alone had {tally.won} right and the other alone {tally.lost}, "
        f"evidence {math.exp(min(tally.log_capital, 700.0)):.3g} to 1"
    )
