"""What the learner's database tells of the past, for people who look at it.

Nothing here writes, and nothing here is needed to learn. Each call is one read of one state of the database, at most so
many rows as it is told, so that looking costs what is shown and not what is stored. Safe on any thread: it uses the
store's own connections, and a reader never keeps the writer waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from replay import schema as t
from replay import traces
from replay.schema import micros, moment
from replay.store import Example, LearnerStore, Payload, Revision, unpack
from stream.events import Place
from stream.join import At, Score

NEWEST = 5_000
"""Predictions among which the newest of a stream are looked for; without a bound a silent stream would cost a scan."""
AT_ONCE = 4_096
"""Embeddings read at once."""


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
    """An event that was answered, and where it lies.

    Args:
        written: where the answer lies on its own topic, as (partition, offset).
    """

    event_id: str
    label: str | None
    model_version: str
    ref: Place
    observed_at: datetime
    predicted_at: datetime
    written: At


@dataclass(frozen=True, slots=True)
class Said:
    """What one labeller said of an event; None withdraws."""

    labeller: str
    label: str | None
    labelled_at: datetime
    arrived_at: datetime


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one labeller said last of an event; None withdraws.

    Args:
        confidence: as the labeller gave it, in [0, 1].
    """

    event_id: str
    label: str | None
    labeller: str
    labelled_at: datetime
    confidence: float | None


@dataclass(frozen=True, slots=True)
class Aside:
    """A label of an event that waits in quarantine."""

    id: int
    labeller: str
    label: str
    reason: str
    detail: str
    at: datetime


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What is learned of an event.

    Args:
        exam: it is in the exam, so that no head and no run was ever taught by it.
        kept: the event itself is still in the store.
    """

    label: str
    exam: bool
    kept: bool
    labelled_at: datetime
    learned_at: datetime
    encoder: str
    embedding: npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Taught:
    """One time that the instant head was taught an event, or it was taken back.

    Args:
        revision: the first that was announced with it, such as `v3.214`; None while none was.
    """

    label: str
    added: bool
    at: datetime
    revision: str | None


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """A version whose encoder saw an event: in its own run, or in that of an ancestor."""

    version: str
    state: str
    own: bool


@dataclass(frozen=True, slots=True)
class Past:
    """All that the database knows of one event.

    Args:
        said: what each labeller said last, newest first.
        aside: labels of it in quarantine.
        score: the answer that was served against the label that counts.
        taught: what the instant head was taught of it and what was taken back, oldest first, as far as the ledger goes.
        trained: the versions whose encoders saw it, oldest first. One in two million is named wrongly; see
            `replay.traces`.
        asked: why a label of it was asked for, and when.
        forgotten_at: when it was forgotten on request; nothing else is known then.
        settled: its label can no longer be corrected.
    """

    answered: Answered | None = None
    said: tuple[Said, ...] = ()
    aside: tuple[Aside, ...] = ()
    score: Score | None = None
    learned: Learned | None = None
    taught: tuple[Taught, ...] = ()
    trained: tuple[TrainedOn, ...] = ()
    asked: tuple[str, datetime] | None = None
    forgotten_at: datetime | None = None
    settled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Near:
    """An example that a head was taught, and how like an event it is.

    Args:
        similarity: cosine of the two embeddings, in [-1, 1].
        payload: the example itself; None where the store has let go of it.
    """

    event_id: str
    label: str
    similarity: float
    labelled_at: datetime
    payload: Payload | None


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a run was given.

    Args:
        rows: what it trained on, and what was in the exam when it began, by event id; without embeddings. `new` as it
            was then.
        let_go: those whose events the store has let go of; their payload is an empty text.
        trained: how many it trained on, whether they are still here or not.
    """

    rows: tuple[Example, ...]
    let_go: frozenset[str]
    trained: int


@dataclass(frozen=True, slots=True)
class Training:
    """The examples that a run trained on, as they are known now.

    Args:
        size: how many it trained on.
        here: how many of them are still here; what follows is of these.
        first: when the earliest was observed; None where none is here.
        last: when the latest was observed.
        classes: how many there are of each class.
    """

    size: int
    here: int
    first: datetime | None
    last: datetime | None
    classes: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class HeldExample:
    """An example that a head held when a revision was announced.

    Args:
        embedding: as it was learned; None where it is no longer kept under that encoder.
        payload: the example itself, where the embedding is not kept and the store has it.
        ref: where it lies in the log; None where it is not learned any more as it was then.
        order: by which the newest labels are told, the greatest last; None as `ref`.
    """

    event_id: str
    label: str
    embedding: npt.NDArray[np.int16] | None
    payload: Payload | None
    ref: Place | None
    order: tuple[int, str, int, int, str] | None


@dataclass(frozen=True, slots=True)
class Losses:
    """What may be missing of what a head held at some time, because it went since.

    Args:
        forgotten: events of the stream that were forgotten on request.
        settled: its examples that left at the end of the ledger's retention, and that a head held.
    """

    forgotten: int
    settled: int


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

    def labels(self, stream: str) -> Iterator[Spoken]:
        """What labellers said last of every event of a stream, by event id and labeller.

        Read in parts, each of one state of the database: what is said meanwhile may be there or not.
        """
        c = t.labels.c
        place = sa.tuple_(c.event_id, c.labeller)
        query = sa.select(t.labels).where(c.stream == stream).order_by(c.event_id, c.labeller).limit(AT_ONCE)
        after: tuple[str, str] | None = None
        while True:
            with self._store.read() as connection:
                rows = connection.execute(query if after is None else query.where(place > after)).all()
            for row in rows:
                yield Spoken(row.event_id, row.label, row.labeller, moment(row.labelled_at), row.confidence)
            if len(rows) < AT_ONCE:
                return
            after = (rows[-1].event_id, rows[-1].labeller)

    def past(self, stream: str, event_id: str) -> Past:
        """All that is known of one event."""
        key = (stream, event_id)
        answered, said = self.event(stream, event_id)
        with self._store.read() as connection:

            def rows(table: sa.Table, *order: Any) -> list[sa.Row[Any]]:
                where = table.c.stream == stream, table.c.event_id == event_id
                return list(connection.execute(sa.select(table).where(*where).order_by(*order).limit(100)))

            buried = traces.buried(connection, [key])
            score, example, request = (next(iter(rows(table)), None) for table in (t.scores, t.examples, t.requests))
            return Past(
                answered=answered,
                said=tuple(said),
                aside=tuple(
                    Aside(row.id, row.labeller, row.label, row.reason, row.detail or "", moment(row.at))
                    for row in rows(t.quarantine, t.quarantine.c.id)
                ),
                score=None
                if score is None
                else Score(
                    stream, event_id, score.label, score.predicted, score.model_version, moment(score.labelled_at)
                ),
                learned=None
                if example is None
                else Learned(
                    label=example.label,
                    exam=example.exam,
                    kept=example.payload is not None,
                    labelled_at=moment(example.labelled_at),
                    learned_at=moment(example.learned_at),
                    encoder=example.encoder,
                    embedding=np.frombuffer(example.embedding, "<i2"),
                ),
                taught=tuple(
                    Taught(row.label, row.sign > 0, moment(row.at), _first_revision(connection, row))
                    for row in rows(t.ledger, t.ledger.c.seq)
                ),
                trained=tuple(_trained(connection, stream, event_id)),
                asked=None if request is None or request.asked_at is None else (request.why, moment(request.asked_at)),
                forgotten_at=moment(buried[key]) if key in buried else None,
                settled=key in traces.settled(connection, [key]),
            )

    def given(self, stream: str, run: int) -> Given:
        """What a run was given, as far as it is still here."""
        c = t.examples.c
        columns = [column for column in c if column.name not in ("embedding", "encoder")]
        with self._store.read() as connection:
            size, marked = traces.training(connection, run)
            began = connection.scalar(sa.select(t.runs.c.started_at).where(t.runs.c.id == run)) or 0
            found = connection.execute(sa.select(*columns).where(c.stream == stream).order_by(c.event_id)).all()
        trained = marked(stream, [row.event_id for row in found])
        rows = [
            (row, its) for row, its in zip(found, trained, strict=True) if its or (row.exam and row.learned_at <= began)
        ]
        examples = [
            Example(
                stream=stream,
                event_id=row.event_id,
                label=row.label,
                payload="" if row.payload is None else unpack(row.payload),
                observed_at=moment(row.observed_at),
                labelled_at=moment(row.labelled_at),
                ref=Place(topic=row.ref_topic, partition=row.ref_partition, offset=row.ref_offset),
                priority=row.priority,
                exam=not its,
                # It was new to this run where none before had trained on it.
                trained_in=None if row.trained_in is None or row.trained_in >= run else row.trained_in,
                embedding=np.empty(0, np.int16),
                encoder="",
            )
            for row, its in rows
        ]
        return Given(tuple(examples), frozenset(row.event_id for row, _ in rows if row.payload is None), size)

    def training(self, stream: str, version: int) -> Training | None:
        """The examples that a version's own run trained on; None where no run of it is known."""
        c, v = t.examples.c, t.versions.c
        classes: Counter[str] = Counter()
        spans: list[int] = []
        query = sa.select(c.event_id, c.label, c.observed_at).where(c.stream == stream)
        with self._store.read() as connection:
            run = connection.scalar(sa.select(v.run).where(v.stream == stream, v.number == version))
            if run is None:
                return None
            size, marked = traces.training(connection, run)
            for part in connection.execute(query.execution_options(yield_per=AT_ONCE)).partitions():
                known = marked(stream, [row.event_id for row in part])
                own = [row for row, its in zip(part, known, strict=True) if its]
                classes.update(row.label for row in own)
                times = [row.observed_at for row in own] + spans
                spans = [min(times), max(times)] if times else []
        first, last = (moment(at) for at in spans) if spans else (None, None)
        return Training(size, classes.total(), first, last, dict(classes))

    def revision(self, stream: str, version: int, revision: int) -> Revision | None:
        """A revision's line of lineage; None where there is none."""
        c = t.revisions.c
        this = (c.stream == stream, c.version == version, c.revision == revision)
        with self._store.read() as connection:
            row = connection.execute(sa.select(t.revisions).where(*this)).first()
        if row is None:
            return None
        return Revision(
            stream, version, revision, row.head, row.ledger_seq, row.offsets, row.state, row.detail, moment(row.at)
        )

    def held_at(self, stream: str, encoder: str, ledger_seq: int, at: datetime) -> list[HeldExample]:
        """The examples that a head held at a ledger row, as far as they are still known, by event id.

        The ledger tells it of what it still has; of what it has let go of, the examples that were learned by then and
        not otherwise since, but for those that were in the exam.

        Args:
            encoder: under which the head was taught.
            at: when that row was the ledger's last.
        """
        row_of, c = t.ledger.c, t.examples.c
        other = sa.case((c.encoder == encoder, None), else_=c.payload).label("payload")
        columns = [column for column in c if column.name != "payload"]
        with self._store.read() as connection:
            lessons = connection.execute(
                sa.select(row_of.event_id, row_of.sign, row_of.label, row_of.embedding)
                .where(row_of.stream == stream, row_of.encoder == encoder, row_of.seq <= ledger_seq)
                .order_by(row_of.seq)
            ).all()
            examples = connection.execute(sa.select(*columns, other).where(c.stream == stream)).all()
        there = {row.event_id: row for row in examples}
        net = {row.event_id: row if row.sign > 0 else None for row in lessons}
        found = {event_id: (row.label, row.embedding) for event_id, row in net.items() if row is not None}
        known = [row for row in examples if row.learned_at <= micros(at)]
        counts = Counter(label for label, _ in found.values())
        counts.update(row.label for row in known if row.event_id not in found)
        for row in known:
            # From this many labels on a class gave to the exam; before, what is in it now was in the head.
            in_exam = row.exam and counts[row.label] >= self._store.settings.exam_from
            if row.event_id not in net and not in_exam:
                found[row.event_id] = row.label, row.embedding if row.encoder == encoder else None
        return [_held(event_id, *found[event_id], there.get(event_id)) for event_id in sorted(found)]

    def losses(self, stream: str, since: datetime) -> Losses:
        """What may have gone of what was learned by then."""
        f, s = t.forgotten.c, t.settled.c
        count = sa.select(sa.func.count())
        with self._store.read() as connection:
            forgotten = connection.scalar(count.where(f.stream == stream, f.at >= micros(since)))
            settled = connection.scalar(count.where(s.stream == stream, s.at >= micros(since), s.taught.is_(True)))
        return Losses(forgotten or 0, settled or 0)

    def verdicts(self, stream: str) -> list[tuple[str, str | None, bool, int]]:
        """Of the answers whose labels have come: revision, class, whether that was right, and how many."""
        c = t.scores.c
        right = sa.case((c.label == c.predicted, 1), else_=0).label("right")
        query = (
            sa.select(c.model_version, c.predicted, right, sa.func.count().label("many"))
            .where(c.stream == stream)
            .group_by(c.model_version, c.predicted, right)
        )
        with self._store.read() as connection:
            return [(row.model_version, row.predicted, bool(row.right), row.many) for row in connection.execute(query)]

    def streams_of(self, event_id: str, streams: Collection[str]) -> list[str]:
        """Which of these streams know an event of this id."""
        tables = (t.served, t.labels, t.examples)
        with self._store.read() as connection:
            return [
                stream
                for stream in sorted(streams)
                if traces.buried(connection, [(stream, event_id)])
                or any(
                    connection.scalar(
                        sa.select(sa.literal(1)).where(table.c.stream == stream, table.c.event_id == event_id).limit(1)
                    )
                    for table in tables
                )
            ]

    def nearest(
        self, stream: str, encoder: str, embedding: npt.NDArray[np.int16], count: int, *, but: str = ""
    ) -> list[Near]:
        """The examples most like an embedding, most alike first; only those that teach a head, so none of the exam.

        Costs one pass over the stream's embeddings, a few thousand of which are in memory at once.

        Args:
            encoder: under which `embedding` was made.
            but: an event id that is left out: the event itself.
        """
        c = t.examples.c
        query = sa.select(c.event_id, c.embedding).where(
            c.stream == stream, c.encoder == encoder, c.exam.is_(False), c.event_id != but
        )
        wanted = embedding.astype(np.float32)
        wanted /= max(float(np.linalg.norm(wanted)), 1e-9)
        best: list[tuple[float, str]] = []
        with self._store.read() as connection:
            for part in connection.execute(query.execution_options(yield_per=AT_ONCE)).partitions():
                rows = np.stack([np.frombuffer(row.embedding, "<i2") for row in part]).astype(np.float32)
                likeness = rows @ wanted / np.maximum(np.linalg.norm(rows, axis=1), 1e-9)
                best += [(-float(like), row.event_id) for like, row in zip(likeness, part, strict=True)]
                best = sorted(best)[:count]
            found = {
                row.event_id: row
                for row in connection.execute(
                    sa.select(c.event_id, c.label, c.labelled_at, c.payload).where(
                        c.stream == stream, c.event_id.in_([event_id for _, event_id in best])
                    )
                )
            }
        return [
            Near(
                event_id,
                found[event_id].label,
                -unlike,
                moment(found[event_id].labelled_at),
                None if found[event_id].payload is None else unpack(found[event_id].payload),
            )
            for unlike, event_id in best
        ]


def _held(event_id: str, label: str, embedding: bytes | None, row: sa.Row[*tuple[Any, ...]] | None) -> HeldExample:
    same = row is not None and row.label == label
    return HeldExample(
        event_id=event_id,
        label=label,
        embedding=None if embedding is None else np.frombuffer(embedding, "<i2"),
        payload=None if row is None or row.payload is None else unpack(row.payload),
        ref=Place(topic=row.ref_topic, partition=row.ref_partition, offset=row.ref_offset) if same and row else None,
        order=(row.labelled_at, row.ref_topic, row.ref_partition, row.ref_offset, event_id) if same and row else None,
    )


def _first_revision(connection: sa.Connection, lesson: sa.Row[Any]) -> str | None:
    """The first revision, of the versions with this encoder, that was announced with a ledger row."""
    r, v = t.revisions.c, t.versions.c
    query = (
        sa.select(r.version, r.revision)
        .join(t.versions, sa.and_(v.stream == r.stream, v.number == r.version))
        .where(r.stream == lesson.stream, v.encoder == lesson.encoder, r.ledger_seq >= lesson.seq)
        .order_by(r.at, r.version, r.revision)
        .limit(1)
    )
    found = connection.execute(query).first()
    return None if found is None else f"v{found.version}.{found.revision}"


def _trained(connection: sa.Connection, stream: str, event_id: str) -> list[TrainedOn]:
    runs = traces.trained(connection, stream, event_id)
    v = t.versions.c
    query = sa.select(v.number, v.parent, v.run, v.state).where(v.stream == stream).order_by(v.number)
    saw: set[int | None] = set()
    found = []
    for row in connection.execute(query) if runs else ():
        own = row.run in runs
        if own or row.parent in saw:
            saw.add(row.number)
            found.append(TrainedOn(f"v{row.number}", row.state, own))
    return found


def _answered(row: sa.Row[tuple[object, ...]]) -> Answered:
    return Answered(
        event_id=row.event_id,
        label=row.label,
        model_version=row.model_version,
        ref=Place(topic=row.ref_topic, partition=row.ref_partition, offset=row.ref_offset),
        observed_at=moment(row.observed_at),
        predicted_at=moment(row.predicted_at),
        written=(row.partition, row.offset),
    )
