"""Which events people are asked to label: those that would teach most, a few a day, no two alike.

::

    predictions ▸ interest ▸ waiting, in the store ▸ read back and embedded ▸ ranked anew ▸ choose ▸ label-requests

What a prediction says of itself, its novelty and how close its two best classes are, is enough to notice an event,
and costs nothing. The best that were noticed wait in the learner's database, noted in the transaction that moves the
offsets. Only for the few that are about to be asked about is the event read back and embedded: the head as it is now
ranks them anew, and what is nearly the same as something asked or learned before is let go. A request is noted as
asked in the transaction that puts its message into the outbox, so a crash neither loses one nor asks it again.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from learner.heads import dequantise
from monitoring.metrics import Metrics
from replay.store import LearnerStore, Outgoing, Request, Transaction
from stream.events import Label, LabelRequest, Place, Prediction, encode
from stream.join import EventKey, Known

if TYPE_CHECKING:
    from learner.online import OnlineLearner

logger = logging.getLogger(__name__)

Why = Literal["novel", "uncertain"]
Embedder = Callable[[str, Mapping[str, Place]], dict[str, npt.NDArray[np.int16]]]
"""Reads events of a stream back, by event id and place, and embeds them; those that are gone are left out."""

DAY = timedelta(days=1)
AT_ONCE = 0.25
"""The share of a day's requests that may be made in a row; the rest comes evenly, for events that come later."""
NOTICED = 16
"""Events noticed in one batch, and looked at in one round: they are read back and embedded while learning waits."""
WAITING = 200
"""Events of a stream that wait; the least interesting go first."""
COMPARED = 5_000
"""Labels learned last that a new request must not resemble."""
_CENTRED_FROM = 20


class AskingSettings(BaseModel):
    """How many labels a stream asks for, and for which events."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_day: int = Field(default=50, ge=0, le=10_000, description="most requests in any 24 hours; 0 for none")
    novelty: float = Field(default=0.5, ge=0, le=1, description="an event of this novelty or more is novel")
    margin: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="an event is uncertain where its best class is ahead of the second by this probability or less",
    )
    alike: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="an event is not asked about if its embedding is as like as this (cosine) to one that was",
    )


class Interest(NamedTuple):
    """How much an event's label would teach, in [0, 1], and why."""

    score: float
    why: Why


def interest(novelty: float, best: float, second: float, settings: AskingSettings) -> Interest | None:
    """What an answer says of its event's interest; None where it is neither novel nor uncertain.

    Args:
        best: probability of the likeliest class.
        second: of the one after it; 0 where there is none.
    """
    novelty, margin = min(1.0, max(0.0, novelty)), best - second
    found: list[Interest] = []
    if novelty >= settings.novelty:
        found.append(Interest(novelty, "novel"))
    if margin <= settings.margin:
        found.append(Interest(1.0 - max(0.0, margin), "uncertain"))
    return max(found, default=None)


def allowance(asked: Iterable[datetime], now: datetime, per_day: int) -> int:
    """How many requests may be made now: a bucket that holds a share of the day's and fills evenly.

    Args:
        asked: when the requests of the last 24 hours were made.
    """
    within = sorted(at for at in asked if at > now - DAY)
    depth = max(1.0, AT_ONCE * per_day)
    level, before = depth, now - DAY
    for at in within:
        level = min(depth, level + per_day * ((at - before) / DAY)) - 1.0
        before = at
    level = min(depth, level + per_day * ((now - before) / DAY))
    # A hair of rounding must not cost a request.
    return max(0, min(int(level + 1e-6), per_day - len(within)))


def choose(
    embeddings: npt.NDArray[np.floating], known: npt.NDArray[np.floating], alike: float, count: int
) -> tuple[list[int], list[int]]:
    """The first `count` embeddings that resemble neither a known one nor one chosen before, and the twins passed over.

    Cosines are taken from the mean of what is known, or of all where little is: embeddings of telemetry have most of
    their length in common, and would all be alike from the origin.

    Args:
        embeddings: (n, d), best first.
        known: (m, d), asked about or learned.
        alike: cosine from which two are twins.
    """
    together = np.concatenate([known, embeddings]).astype(np.float64)
    centre = (known if len(known) >= _CENTRED_FROM else together).mean(axis=0)
    # Two alone lie opposite each other about their mean, whatever they are.
    units = _units(together - centre) if len(together) >= _CENTRED_FROM else _units(together)
    fresh = units[len(known) :]
    like = fresh @ fresh.T
    nearest = (fresh @ units[: len(known)].T).max(axis=1, initial=-1.0)
    chosen: list[int] = []
    twins: list[int] = []
    for row in range(len(fresh)):
        if len(chosen) == count:
            break
        if max(nearest[row], like[row, chosen].max(initial=-1.0)) >= alike:
            twins.append(row)
        else:
            chosen.append(row)
    return chosen, twins


def _units(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: npt.NDArray[np.float64] = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return units


class Asker:
    """Notices, ranks and asks. Used by the learning thread alone, but for `page`, which only reads.

    Args:
        store: the learner's database.
        epoch: under which this learner owns it.
        learners: by stream, whose encoder and head rank what waits.
        settings: by stream.
        topic: whole name of the topic that requests leave on.
        metrics: where they are counted.
        clock: the time, in UTC.
    """

    def __init__(
        self,
        store: LearnerStore,
        epoch: int,
        learners: Mapping[str, OnlineLearner],
        settings: Mapping[str, AskingSettings],
        topic: str,
        metrics: Metrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._epoch, self._learners, self._settings = store, epoch, learners, settings
        self._topic, self._metrics, self._clock = topic, metrics, clock

    # With each batch

    def notice(
        self, predictions: Sequence[tuple[Prediction, Place]], labels: Sequence[tuple[Label, Place]], known: Known
    ) -> list[Request]:
        """The events of a batch that would teach most, a few of each stream, without those that have a label."""
        answered = {(label.stream, label.event_id) for label, _ in labels} | known.labels.keys()
        found: dict[str, list[tuple[float, int, Interest]]] = defaultdict(list)
        for number, (prediction, _) in enumerate(predictions):
            settings = self._settings[prediction.stream]
            if not settings.per_day:
                continue
            best, second, *_ = (*sorted(prediction.probabilities.values(), reverse=True), 0.0, 0.0)
            told = interest(prediction.novelty, best, second, settings)
            if told is not None and (prediction.stream, prediction.event_id) not in answered:
                # Of equals, such as all events before the first label, the first.
                found[prediction.stream].append((told.score, -number, told))
        now = self._clock()
        return [
            _request(predictions[-number][0], told, now)
            for rows in found.values()
            for _, number, told in heapq.nlargest(NOTICED, rows)
        ]

    def note(self, tx: Transaction, noticed: Sequence[Request], labels: Sequence[tuple[Label, Place]]) -> Counter[str]:
        """Keep what was noticed, within bounds; returns, by stream, how many requests these labels answer."""
        answered = tx.answer_requests({(one.stream, one.event_id) for one, _ in labels if one.label is not None})
        tx.notice(noticed, WAITING)
        return answered

    def count(self, answered: Mapping[str, int]) -> None:
        """Requests were answered, so many by stream."""
        for stream, number in answered.items():
            self._metrics.label_requests.labels(stream, "answered").inc(number)

    # Now and then

    def ask(self, stream: str, embed: Embedder) -> int:
        """Ask for the labels that the budget allows now; returns for how many.

        Raises:
            RetryLater: the broker or the database is away; nothing was asked.
            Superseded: another learner owns the store.
        """
        now, settings = self._clock(), self._settings[stream]
        asked = self._store.asked_at(stream, now - DAY)
        self._show(stream, settings.per_day - len(asked))
        count = allowance(asked, now, settings.per_day)
        waiting = self._store.requests(stream, "waiting", NOTICED) if count else []
        if not waiting:
            return 0
        embeddings = embed(stream, {row.event_id: row.ref for row in waiting})
        here = [row for row in waiting if row.event_id in embeddings]
        ranked = self._ranked(stream, here, embeddings)
        chosen: list[Request] = []
        twins: list[Request] = []
        if ranked:
            learner = self._learners[stream]
            bound, digest = learner.encoder.spec.bound, learner.encoder_digest
            known = dequantise(self._store.resembled(stream, digest, COMPARED, learner.encoder.spec.dimension), bound)
            fresh = dequantise(np.stack([embeddings[row.event_id] for row in ranked]), bound)
            picked, passed = choose(fresh, known, settings.alike, count)
            chosen = [
                replace(ranked[at], asked_at=now, embedding=embeddings[ranked[at].event_id], encoder=digest)
                for at in picked
            ]
            twins = [ranked[at] for at in passed]
        staying = {row.event_id for row in ranked} - {row.event_id for row in twins}
        dropped: list[EventKey] = [(stream, row.event_id) for row in waiting if row.event_id not in staying]
        with self._store.transaction(self._epoch, now) as tx:
            tx.drop_waiting(dropped)
            tx.ask(chosen)
            tx.send([Outgoing(self._topic, row.event_id.encode(), encode(_message(row))) for row in chosen])
        for outcome, number in (
            ("asked", len(chosen)),
            ("alike", len(twins)),
            ("gone", len(waiting) - len(here)),
            ("known", len(here) - len(ranked)),
        ):
            self._metrics.label_requests.labels(stream, outcome).inc(number)
        if chosen:
            logger.info("stream %s: %d labels are asked for", stream, len(chosen))
            self._show(stream, settings.per_day - len(asked) - len(chosen))
        return len(chosen)

    def page(self, stream: str, limit: int) -> dict[str, Any]:
        """The open requests, best first, and what the budget leaves."""
        now, settings = self._clock(), self._settings[stream]
        asked = self._store.asked_at(stream, now - DAY)
        return {
            "per_day": settings.per_day,
            "left": max(0, settings.per_day - len(asked)),
            "now": allowance(asked, now, settings.per_day),
            **self._store.request_counts(stream),
            "requests": [_message(row).model_dump() for row in self._store.requests(stream, "open", limit)],
        }

    def _show(self, stream: str, left: int) -> None:
        self._metrics.label_requests_left.labels(stream).set(max(0, left))
        self._metrics.label_requests_open.labels(stream).set(self._store.request_counts(stream)["open"])

    def _ranked(
        self, stream: str, rows: Sequence[Request], embeddings: Mapping[str, npt.NDArray[np.int16]]
    ) -> list[Request]:
        """The events by what the head says of them now, without those that it has come to know."""
        learner, serving = self._learners[stream], self._learners[stream].serving
        if serving.head is None or serving.encoder != learner.encoder_digest or not rows:
            return list(rows)
        stacked = np.stack([embeddings[row.event_id] for row in rows])
        answer = serving.head.answer(dequantise(stacked, learner.encoder.spec.bound), 2)
        found: list[tuple[float, str, Request]] = []
        for row, labels, chances, novelty in zip(
            rows, answer.labels, answer.probabilities, answer.novelty, strict=True
        ):
            second = float(chances[1]) if len(chances) > 1 else 0.0
            told = interest(float(novelty), float(chances[0]), second, self._settings[stream])
            if told is not None:
                now = replace(row, score=told.score, why=told.why, answer=labels[0], model_version=serving.name)
                found.append((-told.score, row.event_id, now))
        return [row for _, _, row in sorted(found, key=lambda one: one[:2])]


def _request(prediction: Prediction, told: Interest, now: datetime) -> Request:
    return Request(
        stream=prediction.stream,
        event_id=prediction.event_id,
        ref=prediction.ref,
        observed_at=prediction.observed_at,
        score=told.score,
        why=told.why,
        answer=prediction.label,
        model_version=prediction.model_version,
        noticed_at=now,
    )


def _message(row: Request) -> LabelRequest:
    return LabelRequest(
        event_id=row.event_id,
        stream=row.stream,
        ref=row.ref,
        observed_at=row.observed_at,
        why=row.why,
        score=row.score,
        label=row.answer,
        model_version=row.model_version,
        asked_at=row.asked_at or row.noticed_at,
    )
