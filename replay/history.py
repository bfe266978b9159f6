"""What the learner's database tells of the past, for people who look at it.

Nothing here writes, and nothing here is needed to learn. Each call is one read of one state of the database, at most so
many rows as it is told, so that looking costs what is shown and not what is stored. Safe on any thread: it uses the
store's own connections, and a reader never keeps the writer waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from replay import schema as t
from replay.schema import moment
from replay.store import LearnerStore
from stream.events import Place

NEWEST = 5_000
"""Predictions among which the newest of a stream are looked for; without a bound a silent stream would cost a scan."""


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer that was served, and the label that came for it.

    Args:
        model_version: the revision that answered, such as `v3.214`.
        observed_at: of the event; None once the join index has let go of it.
        predicted_at: when it was answered; None as above.
        scored_at: when the label arrived here.
    """

    event_id: str
    label: str
    predicted: str | None
    model_version: str
    observed_at: datetime | None
    predicted_at: datetime | None
    labelled_at: datetime
    scored_at: datetime


@dataclass(frozen=True, slots=True)
class Answered:
    """An event that was answered, and where it lies."""

    event_id: str
    label: str | None
    model_version: str
    ref: Place
    observed_at: datetime
    predicted_at: datetime


@dataclass(frozen=True, slots=True)
class Said:
    """What one labeller said of an event; None withdraws."""

    labeller: str
    label: str | None
    labelled_at: datetime
    arrived_at: datetime


class History:
    """Reads of a store.

    Args:
        store: the learner's database.
    """

    def __init__(self, store: LearnerStore) -> None:
        self._store = store

    def judged(self, stream: str, last: int) -> list[Judged]:
        """The `last` answers by `labelled_at` whose labels have come, in the order in which the labels arrived."""
        c = t.scores.c
        recent = (
            sa.select(t.scores)
            .where(c.stream == stream)
            .order_by(c.labelled_at.desc(), c.event_id.desc())
            .limit(last)
            .subquery()
        )
        s = t.served.c
        query = sa.select(recent, s.observed_at, s.predicted_at).select_from(
            recent.outerjoin(t.served, sa.and_(s.stream == recent.c.stream, s.event_id == recent.c.event_id))
        )
        with self._store.read() as connection:
            rows = connection.execute(query).all()
        return [
            Judged(
                event_id=row.event_id,
                label=row.label,
                predicted=row.predicted,
                model_version=row.model_version,
                observed_at=None if row.observed_at is None else moment(row.observed_at),
                predicted_at=None if row.predicted_at is None else moment(row.predicted_at),
                labelled_at=moment(row.labelled_at),
                scored_at=moment(row.scored_at),
            )
            for row in sorted(rows, key=lambda row: (row.scored_at, row.labelled_at, row.event_id))
        ]

    def newest(self) -> dict[str, datetime]:
        """By stream, when its newest prediction arrived, if it is among the newest of all."""
        c = t.served.c
        recent = sa.select(c.stream, c.arrived_at).order_by(c.arrived_at.desc()).limit(NEWEST).subquery()
        query = sa.select(recent.c.stream, sa.func.max(recent.c.arrived_at).label("at")).group_by(recent.c.stream)
        with self._store.read() as connection:
            return {row.stream: moment(row.at) for row in connection.execute(query)}

    def unlabelled(self, stream: str, limit: int) -> list[Answered]:
        """Newest answers of a stream that nobody has labelled, among the newest of all, newest first."""
        c, said = t.served.c, t.labels.c
        recent = sa.select(t.served).order_by(c.arrived_at.desc()).limit(NEWEST).subquery()
        there = sa.exists().where(said.stream == recent.c.stream, said.event_id == recent.c.event_id)
        query = (
            sa.select(recent)
            .where(recent.c.stream == stream, ~there)
            .order_by(recent.c.arrived_at.desc(), recent.c.event_id.desc())
            .limit(limit)
        )
        with self._store.read() as connection:
            return [_answered(row) for row in connection.execute(query)]

    def event(self, stream: str, event_id: str) -> tuple[Answered | None, list[Said]]:
        """What is known of one event: how it was answered, and what was said of it, newest first."""
        c, said = t.served.c, t.labels.c
        with self._store.read() as connection:
            row = connection.execute(sa.select(t.served).where(c.stream == stream, c.event_id == event_id)).first()
            rows = connection.execute(
                sa.select(t.labels)
                .where(said.stream == stream, said.event_id == event_id)
                .order_by(said.labelled_at.desc(), said.labeller)
                .limit(100)
            ).all()
        labels = [Said(one.labeller, one.label, moment(one.labelled_at), moment(one.arrived_at)) for one in rows]
        return (None if row is None else _answered(row)), labels


def _answered(row: sa.Row[tuple[object, ...]]) -> Answered:
    return Answered(
        event_id=row.event_id,
        label=row.label,
        model_version=row.model_version,
        ref=Place(topic=row.ref_topic, partition=row.ref_partition, offset=row.ref_offset),
        observed_at=moment(row.observed_at),
        predicted_at=moment(row.predicted_at),
    )
