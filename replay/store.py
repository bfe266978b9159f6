"""Everything that the learner must not lose, in one database that moves in whole transactions.

The store holds the join index (what was served), the labels, the examples learned from them, the ledger
of what was added to and subtracted from the instant head, the scores, the history of runs, versions and
revisions, the messages still to be sent, and the offsets of the messages that all this came from. The
effects of a batch and its offsets are one transaction, so a learner killed between any two of its steps
has either learned the batch or will read it again.

::

    epoch = store.claim("learner-1", now)
    known = store.known(touched(predictions, labels))
    joined = join(known, predictions, labels)
    contents = ...  # read back and embed the events of `joined.changes` that need it
    with store.transaction(epoch, now) as tx:
        tx.advance({("labels", 0): (10, 20)})
        tx.record(joined)
        tx.reconcile(joined.changes, contents, too_late=unreadable)
        tx.send([Outgoing("model-versions", key, value)])
    ledger = store.follow_ledger("storm", encoder, after_seq)

One owner writes: `claim` gives it an epoch (`replay.lease` says when), every transaction is under that epoch, and
an older one raises `Superseded`. Within a process, transactions wait for each other; reads go on beside them from
any thread, each on one consistent state.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from time import monotonic
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from replay import schema as t
from replay import traces
from replay.policy import Candidate, ReplaySettings, eligible, priority, select
from replay.schema import micros, moment, put
from stream.errors import Misconfigured, RetryLater, Superseded
from stream.events import Headers, Label, Place, Record
from stream.join import Change, EventKey, Joined, Kind, Known, Labelled, Lesson, Score, Served

Payload = str | npt.NDArray[np.float32]
"""What is learned from: a text, or a window float32 (channels, steps) in the stream's channel order."""

Embedding = npt.NDArray[np.int16]
"""(d,), quantised once by the instant head."""

NEWEST_LOOKED_AT = 4
"""Times as many labels as are wanted of the newest examples: some are in the exam, withdrawn, or of one event."""
_CHUNK = 1_000
_BUSY_SECONDS = 1.0
"""Whoever waits longer than this for the owner's row was kept from it by an owner that is alive."""
_READ_ONLY = "25006"
"""PostgreSQL's code for a write to a server that only follows another, as after a switch to the wrong one."""


REQUESTS_KEPT = timedelta(days=7)
"""How long what people asked for is known by its id."""


class StoreSettings(BaseModel):
    """How long and how much the learner remembers, and when a class gives examples to the exam."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    horizon: timedelta = Field(
        default=timedelta(days=7), description="how long a prediction waits for its label, and a label for its event"
    )
    index_size: int = Field(default=2_000_000, ge=1, description="predictions that may wait; the oldest go first")
    correction_horizon: timedelta = Field(
        default=timedelta(days=7), description="how long an example that the replay policy does not keep is kept anyway"
    )
    ledger_retention: timedelta = Field(
        default=timedelta(days=90), description="how long a learned label can still be corrected or withdrawn"
    )
    quarantine_size: int = Field(
        default=100_000, ge=1, description="labels that may wait in quarantine; the oldest go first"
    )
    quarantine_retention: timedelta = Field(
        default=timedelta(days=90), description="how long a label waits in quarantine"
    )
    exam_seed: int = Field(default=0, ge=0, description="another seed gives other events to the exam")
    exam_one_in: int = Field(default=5, ge=2, description="one event in this many may be given to the exam")
    exam_from: int = Field(default=10, ge=1, description="labels of a class before it gives examples to the exam")
    exam_per_class: int = Field(default=200, ge=1, description="exam examples of a class that are kept for good")


_EFFECT: ContextVar[Asked | None] = ContextVar("effect", default=None)
"""What is being done on this thread because somebody asked for it."""


class NotEmbedded(RetryLater):
    """Examples in the store were not embedded under the new encoder; `event_ids` says which."""

    def __init__(self, event_ids: Sequence[str]) -> None:
        self.event_ids = tuple(event_ids)
        super().__init__(f"{len(self.event_ids)} examples have no embedding under the new encoder")


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What was read back from the log for one event: its payload, and its embedding under `encoder`."""

    payload: Payload
    embedding: Embedding
    encoder: str


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One event and the label learned for it. `new` while no run has trained on it."""

    stream: str
    event_id: str
    label: str
    payload: Payload
    observed_at: datetime
    labelled_at: datetime
    ref: Place
    priority: int
    exam: bool
    trained_in: int | None
    embedding: Embedding
    encoder: str

    @property
    def new(self) -> bool:
        """Whether no run has trained on it."""
        return self.trained_in is None


@dataclass(frozen=True, slots=True)
class Foreseen:
    """An example that a fine-tune would see: all but the event. `new` while no run has trained on it."""

    label: str
    new: bool
    observed_at: datetime


@dataclass(frozen=True, slots=True, eq=False)
class LedgerSlice:
    """Consecutive ledger rows of one stream and encoder: what to add to its head, what to subtract.

    Args:
        seq: of the last row, or where the reading began when there is none; go on after it.
        signs: int8 (n,), +1 or -1.
        embeddings: int16 (n, d).
    """

    seq: int
    event_ids: tuple[str, ...]
    labels: tuple[str, ...]
    signs: npt.NDArray[np.int8]
    embeddings: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def added(self) -> tuple[npt.NDArray[np.int16], list[str]]:
        """Embeddings and labels to add; add before subtracting, so that no count falls below zero."""
        return self._of(1)

    @property
    def removed(self) -> tuple[npt.NDArray[np.int16], list[str]]:
        """Embeddings and labels to subtract."""
        return self._of(-1)

    def _of(self, sign: int) -> tuple[npt.NDArray[np.int16], list[str]]:
        rows = np.flatnonzero(self.signs == sign)
        return self.embeddings[rows], [self.labels[row] for row in rows]


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a reconciliation did: outcomes by (stream, outcome), exam moves, and what is no longer learned as it was."""

    outcomes: Counter[tuple[str, str]]
    to_exam: tuple[EventKey, ...] = ()
    from_exam: tuple[EventKey, ...] = ()
    unlearned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Forgotten:
    """What a forgetting found, and what the head must let go of in the same transaction.

    Args:
        rows: by table, how many rows went.
        labels, embeddings: what the head still holds of the events: k class names, int16 (k, d).
        fixed: how many of the events the head holds and nobody can subtract, because the ledger's retention
            has ended for them.
        versions: by version whose weights were trained on one of them, how many examples it has lost in all.
        before: how many of the events had been forgotten before.
    """

    rows: dict[str, int]
    labels: tuple[str, ...]
    embeddings: npt.NDArray[np.int16]
    fixed: int
    versions: dict[int, int]
    before: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message that follows from an effect; `id` is set once it lies in the outbox."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    id: int = 0


@dataclass(frozen=True, slots=True)
class Received:
    """A message that lies in the inbox under `id`."""

    id: int
    record: Record


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A label set aside, such as one whose class name came beyond the day's quota.

    Args:
        reason: one of a few words that a metric can count by.
        detail: a sentence for a person; may be empty.
    """

    label: Label
    place: Place
    reason: str
    at: datetime | None = None
    id: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """Which labels in quarantine are meant: those that fit everything that is given."""

    ids: tuple[int, ...] = ()
    labeller: str | None = None
    label: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Doubt:
    """A labeller whose labels are checked from a moment (`labelled_at`) on, and why; see `learner.trust`."""

    labeller: str
    since: datetime
    wholly: bool
    why: str
    at: datetime | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Claimed:
    """One labeller's label of one learned event, beside what is learned of that event.

    Args:
        learned: the label that counts.
        exam: whether the event is in the exam, so that no head was taught by it.
    """

    said: Labelled
    learned: str
    exam: bool
    embedding: Embedding
    encoder: str


@dataclass(frozen=True, slots=True)
class Run:
    """One fine-tune, from the request on. `state` and `detail` are the learner's own words."""

    id: int
    stream: str
    cause: str
    state: str
    requested_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a stream's model; the registry has its manifest and weights."""

    stream: str
    number: int
    state: str
    parent: int | None
    encoder: str
    head: str
    run: int | None
    created_at: datetime
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reign:
    """From `at` on, `version` was the stream's champion; `epoch` is that of the learner which said so."""

    id: int
    stream: str
    version: int
    cause: str
    epoch: int
    at: datetime


@dataclass(frozen=True, slots=True)
class Revision:
    """One line of lineage: which head was announced or held, and from which labels it came."""

    stream: str
    version: int
    revision: int
    head: str
    ledger_seq: int
    offsets: dict[str, int]
    state: str
    detail: dict[str, Any]
    at: datetime


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """An event that a label is, or may be, asked for.

    Args:
        score: how much its label should teach, in [0, 1].
        why: `novel` or `uncertain`.
        answer: what is answered for it so far; None while the stream has learned nothing.
        asked_at: None while it waits.
        embedding: under `encoder`; there once it was asked about.
    """

    stream: str
    event_id: str
    ref: Place
    observed_at: datetime
    score: float
    why: Literal["novel", "uncertain"]
    answer: str | None
    model_version: str
    noticed_at: datetime
    asked_at: datetime | None = None
    answered_at: datetime | None = None
    embedding: Embedding | None = None
    encoder: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Something that a person asked of the learner, and what became of it.

    Args:
        id: given by whoever asked, or made.
        digest: of what was asked, so that another thing under the same id is noticed.
        state: `accepted` (it waits to be done), `done` or `refused`.
        answer: what was said of it, as JSON, as it went to the audit topic; None where that is still to be said.
        at: when it was taken.
    """

    id: str
    digest: str
    action: str
    stream: str
    state: str
    who: str
    reason: str
    at: datetime
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge removed.

    Args:
        served: join index rows.
        too_late: by stream, events whose labels waited in vain.
        payloads: examples whose event was let go; what was learned of them can still be corrected.
        examples: learned labels that are from now on fixed.
        ledger: ledger rows that a head's sums already hold.
        scores: scores past the retention.
        quarantine: labels that waited in quarantine for too long, or were too many.
        requests: requests whose event's label could not be joined any more, and events noticed a day ago.
        asked: what people asked for, past `REQUESTS_KEPT`.
    """

    served: int = 0
    too_late: Counter[str] = field(default_factory=Counter)
    payloads: int = 0
    examples: int = 0
    ledger: int = 0
    scores: int = 0
    quarantine: int = 0
    requests: int = 0
    asked: int = 0


@dataclass(frozen=True, slots=True)
class Tenure:
    """Who owns the store.

    Args:
        lease: for how long a sign of life counts; None once the owner has left, or never gave one.
        silent: since its last sign of life, by the database's clock.
        mark: another one each time that anything of it has changed.
    """

    owner: str
    epoch: int
    lease: timedelta | None
    silent: timedelta | None
    mark: tuple[object, ...]


class LearnerStore:
    """The learner's database.

    Args:
        url: an SQLAlchemy URL, such as `sqlite:///learner.db` or `postgresql+psycopg://trimtab@db.example.org/trimtab`.
        replay: by stream, which examples are members of its replay store; the defaults where not named.
        settings: how long and how much is remembered.

    Raises:
        Misconfigured: the database cannot be opened, or is of another schema.
    """

    def __init__(
        self, url: str, replay: Mapping[str, ReplaySettings] | None = None, settings: StoreSettings | None = None
    ) -> None:
        self.settings = settings or StoreSettings()
        self._replay = dict(replay or {})
        self._engine = t.connect(url)
        self._writing = threading.Lock()
        self._transactions = 0
        try:
            with self._write() as connection:
                t.create(connection)
                put(connection, t.meta, [{"name": "schema", "value": t.SCHEMA}], update=())
                found = connection.scalar(sa.select(t.meta.c.value).where(t.meta.c.name == "schema"))
                if found == t.SCHEMA:
                    self._draw_again(connection)
        except (RetryLater, sa.exc.DBAPIError) as error:
            why = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            raise Misconfigured(f"the learner's store at {t.masked(url)!r} cannot be opened: {why}") from error
        if found != t.SCHEMA:
            raise Misconfigured(f"the learner's store has schema {found!r}, this version reads {t.SCHEMA!r}")

    def close(self) -> None:
        """Let go of every connection."""
        self._engine.dispose()

    def replay(self, stream: str) -> ReplaySettings:
        """The stream's replay settings."""
        return self._replay.get(stream, ReplaySettings())

    def claim(self, owner: str, now: datetime, scope: str = "learner") -> int:
        """Take over at once: the epoch is higher each time, and the owner before is superseded from now on."""
        row = {"scope": scope, "owner": owner, "claimed_at": micros(now)}
        with self._write() as connection:
            # A row to hold, so that two that claim at the same moment do not both become the first.
            put(connection, t.owners, [{**row, "epoch": 0}], update=())
            epoch = (_epoch(connection, scope) or 0) + 1
            put(connection, t.owners, [{**row, "epoch": epoch, "beat_at": None, "lease": None}])
            return epoch

    def claim_partitions(
        self, owner: str, partitions: Iterable[tuple[str, int]], now: datetime
    ) -> dict[tuple[str, int], int]:
        """Take (topic, partition)s over, each under a higher epoch of its own; see `share` and `Transaction.hold`."""
        return {where: self.claim(owner, now, _scope(where)) for where in sorted(partitions)}

    def owner(self, scope: str = "learner") -> tuple[str, int] | None:
        """Who claimed the store last, and its epoch."""
        with self._read() as connection:
            row = connection.execute(
                sa.select(t.owners.c.owner, t.owners.c.epoch).where(t.owners.c.scope == scope)
            ).first()
            return None if row is None else (row.owner, row.epoch)

    def tenure(self, scope: str = "learner") -> Tenure | None:
        """Who owns the store, and for how long nothing was heard of it; read without waiting for anybody."""
        with self._read() as connection:
            return _tenure(connection, scope)

    def take_over(
        self, owner: str, now: datetime, lease: timedelta, seen: Tenure | None, scope: str = "learner"
    ) -> int:
        """Claim the store from whom it was `seen` with, and hold it for `lease` after each `renew`.

        Raises:
            RetryLater: somebody else was at work in it meanwhile: look again; or the database is away.
        """
        asked = monotonic()
        row = {"scope": scope, "owner": owner, "claimed_at": micros(now)}
        with self._write() as connection:
            put(connection, t.owners, [{**row, "epoch": 0}], update=())
            epoch = _epoch(connection, scope) or 0
            found = _tenure(connection, scope) if epoch else None
            # One who held us up is alive, though it had no time to say so.
            busy = found is not None and monotonic() - asked > _BUSY_SECONDS
            if busy or (found and found.mark) != (seen and seen.mark):
                raise RetryLater("another learner is at work in the store")
            held = {"beat_at": t.clock(connection), "lease": lease // timedelta(microseconds=1)}
            put(connection, t.owners, [{**row, **held, "epoch": epoch + 1}])
            return epoch + 1

    def renew(self, epoch: int, scope: str = "learner") -> None:
        """Say that the owner under `epoch` is alive.

        Raises:
            Superseded: another owner has claimed the store since.
            RetryLater: the database is away.
        """
        self._sign(epoch, scope, leaving=False)

    def leave(self, epoch: int, scope: str = "learner") -> None:
        """The owner under `epoch` goes: whoever stands by need not wait. Raises as `renew`."""
        self._sign(epoch, scope, leaving=True)

    def _sign(self, epoch: int, scope: str, *, leaving: bool) -> None:
        c = t.owners.c
        with self._write() as connection:
            found = _epoch(connection, scope)
            if found != epoch:
                raise Superseded(f"the store is owned under epoch {found}, this learner's is {epoch}")
            beat: dict[str, Any] = {"lease": None} if leaving else {"beat_at": t.clock(connection)}
            connection.execute(sa.update(t.owners).where(c.scope == scope).values(beat))

    @contextmanager
    def transaction(self, epoch: int, now: datetime, scope: str = "learner") -> Iterator[Transaction]:
        """One transaction under `epoch`: all of it is kept, or nothing when the block raises.

        Not to be nested. Effects that lie in it are stamped `now`.

        Raises:
            Superseded: another owner has claimed the store since.
            RetryLater: the database is away or locked; nothing was kept.
        """
        with self._write() as connection:
            found = _epoch(connection, scope)
            if found != epoch:
                raise Superseded(f"the store is owned under epoch {found}, this learner's is {epoch}")
            made = Transaction(self, connection, epoch, now)
            yield made
            effect = _EFFECT.get()
            if effect is not None:
                made.keep_asked(effect)
        self._transactions += 1
        # After 1, 2, 4, 8 ... of them: as often as a table may have doubled since.
        if self._engine.dialect.name == "postgresql" and self._transactions & (self._transactions - 1) == 0:
            # What was asked for is kept by now, so that no failure of this may look like one of that.
            with suppress(RetryLater), self._write() as connection:
                t.analyze(connection)

    @contextmanager
    def effect_of(self, asked: Asked) -> Iterator[None]:
        """Keep `asked` within every transaction of this thread in the block: with its effect, or neither."""
        token = _EFFECT.set(asked)
        try:
            yield
        finally:
            _EFFECT.reset(token)

    def asked(self, request_id: str) -> Asked | None:
        """What was asked under an id within `REQUESTS_KEPT`."""
        with self._read() as connection:
            row = connection.execute(sa.select(t.asked).where(t.asked.c.id == request_id)).one_or_none()
        return None if row is None else _asked(row)

    def last_asked(self, limit: int = 100, *, unsettled: bool = False) -> list[Asked]:
        """What was asked last, the newest first; `unsettled` is what waits to be done, or to be told of."""
        c = t.asked.c
        query = sa.select(t.asked).order_by(c.at.desc(), c.id).limit(limit)
        if unsettled:
            query = query.where(sa.or_(c.state == "accepted", c.answer.is_(None)))
        with self._read() as connection:
            return [_asked(row) for row in connection.execute(query)]

    @contextmanager
    def share(self, claims: Mapping[tuple[str, int], int], now: datetime) -> Iterator[Transaction]:
        """One transaction of a learner that does not lead, under the epochs of the partitions that it joins.

        It takes turns with the leader's transactions: what is read of the store within it is what the leader left.
        Nothing of what only the leader decides may be written in it.

        Raises:
            Superseded: another learner has one of the partitions now.
            RetryLater: nobody has ever led, or the database is away or locked; nothing was kept.
        """
        with self._write() as connection:
            epoch = _epoch(connection, "learner")
            if epoch is None:
                raise RetryLater("no learner has led yet")
            tx = Transaction(self, connection, epoch, now)
            tx.hold(claims)
            yield tx

    def inbox(self, limit: int = 1_000) -> list[Received]:
        """What learners that do not lead have read and left to the leader, in the order in which they left it."""
        with self._read() as connection:
            rows = connection.execute(sa.select(t.inbox).order_by(t.inbox.c.id).limit(limit))
            return [
                Received(
                    row.id,
                    Record(
                        topic=row.topic,
                        partition=row.partition,
                        offset=row.offset,
                        key=row.key,
                        value=row.value,
                        headers=tuple((name, bytes.fromhex(value)) for name, value in row.headers),
                        timestamp_ms=row.timestamp_ms,
                    ),
                )
                for row in rows
            ]

    def inbox_span(self) -> int:
        """How many messages lie in the inbox, at most: ids that were given out in vain count as well."""
        c = t.inbox.c.id
        with self._read() as connection:
            low, high = connection.execute(sa.select(sa.func.min(c), sa.func.max(c))).one()
            return 0 if low is None else int(high - low + 1)

    def offsets(self) -> dict[tuple[str, int], int]:
        """By (topic, partition), the offset of the next message to read."""
        with self._read() as connection:
            return _offsets(connection)

    def known(self, keys: Iterable[EventKey]) -> Known:
        """What `join` must know about these events; all of it as of one moment."""
        streams = _by_stream(keys)
        with self._read() as connection:
            labels: dict[EventKey, dict[str, Labelled]] = {}
            for row in _rows(connection, t.labels, streams):
                labels.setdefault((row.stream, row.event_id), {})[row.labeller] = _labelled(row)
            c = t.examples.c
            return Known(
                served={(row.stream, row.event_id): _served(row) for row in _rows(connection, t.served, streams)},
                labels=labels,
                learned={
                    (row.stream, row.event_id): _lesson(row)
                    for row in _rows(
                        connection,
                        t.examples,
                        streams,
                        (c.label, c.ref_topic, c.ref_partition, c.ref_offset, c.observed_at, c.labelled_at),
                    )
                },
                scores={
                    (row.stream, row.event_id): Score(
                        row.stream,
                        row.event_id,
                        row.label,
                        row.predicted,
                        row.model_version,
                        moment(row.labelled_at),
                    )
                    for row in _rows(connection, t.scores, streams)
                },
            )

    def beyond(self, keys: Iterable[EventKey]) -> dict[EventKey, str]:
        """Events of which nothing may be learned any more: `forgotten`, or past correction (`settled`)."""
        keys = set(keys)
        with self._read() as connection:
            found = dict.fromkeys(traces.settled(connection, keys), "settled")
            return found | dict.fromkeys(traces.buried(connection, keys), "forgotten")

    def present(self, stream: str) -> dict[str, tuple[str, bool]]:
        """Each event that is still there with its label as it is now, and whether it is in the exam."""
        c = t.examples.c
        query = sa.select(c.event_id, c.label, c.exam).where(c.stream == stream, c.payload.is_not(None))
        with self._read() as connection:
            return {row.event_id: (row.label, row.exam) for row in connection.execute(query)}

    def lost_by_run(self, run: int) -> int:
        """How many of the examples that a run trains on were forgotten, withdrawn or corrected since it began."""
        with self._read() as connection:
            return traces.lost_by(connection, "", run, None)

    def encoder(self, stream: str) -> str | None:
        """The digest of the encoder that the stream's examples are embedded under; None before the first."""
        with self._read() as connection:
            return connection.scalar(sa.select(t.encoders.c.encoder).where(t.encoders.c.stream == stream))

    def follow_ledger(self, stream: str, encoder: str, after_seq: int = 0, limit: int = 20_000) -> LedgerSlice:
        """The ledger rows after `after_seq`, in order, at most `limit`; call again until it is empty."""
        c = t.ledger.c
        query = (
            sa.select(c.seq, c.event_id, c.sign, c.label, c.embedding)
            .where(c.stream == stream, c.encoder == encoder, c.seq > after_seq)
            .order_by(c.seq)
            .limit(limit)
        )
        with self._read() as connection:
            rows = connection.execute(query).all()
        return LedgerSlice(
            seq=rows[-1].seq if rows else after_seq,
            event_ids=tuple(row.event_id for row in rows),
            labels=tuple(row.label for row in rows),
            signs=np.array([row.sign for row in rows], dtype=np.int8),
            embeddings=np.stack([_embedding(row.embedding) for row in rows]) if rows else np.empty((0, 0), np.int16),
        )

    def sums(self, stream: str, encoder: str) -> tuple[int, bytes] | None:
        """The last head sums saved, and the ledger row up to which they count; follow on from there."""
        c = t.sums.c
        with self._read() as connection:
            row = connection.execute(sa.select(c.seq, c.blob).where(c.stream == stream, c.encoder == encoder)).first()
            return None if row is None else (row.seq, row.blob)

    def members(self, stream: str) -> frozenset[str]:
        """The event ids that the stream's replay policy keeps; exam examples are never among them."""
        with self._read() as connection:
            return self._members(connection, stream)

    def examples(
        self,
        stream: str,
        *,
        member_only: bool = False,
        exam: bool | None = None,
        since_run: int | None = None,
        event_ids: Collection[str] | None = None,
    ) -> list[Example]:
        """The stream's examples that still have their event, by event id.

        Args:
            member_only: only those that the replay policy keeps.
            exam: only those in the exam, or only those outside; None for both.
            since_run: only those that no run up to and including this one trained on.
            event_ids: only these.
        """
        with self._read() as connection:
            chosen = None if event_ids is None else set(event_ids)
            if member_only:
                members = self._members(connection, stream)
                chosen = set(members) if chosen is None else chosen & members
            return self._examples(connection, stream, chosen, exam, since_run)

    def newest(self, stream: str, encoder: str, count: int) -> dict[str, tuple[Embedding, str]]:
        """Embedding and label of what was labelled last of all that is taught, by event id: at most `count`.

        By the label's time, then the event's place, so the same labels give the same whatever order they came in.
        """
        c, given = t.examples.c, t.labels.c
        order = (c.labelled_at, c.ref_topic, c.ref_partition, c.ref_offset, c.event_id)
        query = (
            sa.select(c.event_id, c.embedding, c.label)
            .where(c.stream == stream, c.encoder == encoder, c.exam.is_(False))
            .order_by(*(column.desc() for column in order))
            .limit(count)
        )
        with self._read() as connection:
            # There is no index on the examples' times; on the labels' there is, and an example has the time of a label.
            floor = connection.scalar(
                sa.select(given.labelled_at)
                .where(given.stream == stream)
                .order_by(given.labelled_at.desc())
                .offset(NEWEST_LOOKED_AT * count)
                .limit(1)
            )
            rows: Sequence[Any] = ()
            if floor is not None:
                late = sa.select(given.event_id).where(given.stream == stream, given.labelled_at >= floor)
                rows = connection.execute(query.where(c.event_id.in_(late), c.labelled_at >= floor)).all()
            if len(rows) < count:
                rows = connection.execute(query).all()
        return {row.event_id: (_embedding(row.embedding), row.label) for row in rows}

    def experience(
        self, stream: str, observed_from: datetime | None = None, observed_to: datetime | None = None
    ) -> list[Example]:
        """What the next fine-tune sees: the replay store's members, and all that no run has trained on.

        Args:
            observed_from, observed_to: of these only what was observed from then on, and before then.
        """
        with self._read() as connection:
            chosen = {row.event_id for row in self._experience(connection, stream, observed_from, observed_to)}
            # Events and embeddings are read of these alone, however many have been trained on and let go.
            return self._examples(connection, stream, chosen, exam=False, since_run=None)

    def foreseen(self, stream: str) -> list[Foreseen]:
        """Of each example that `experience` would return, what can be told without reading it."""
        with self._read() as connection:
            return [
                Foreseen(row.label, row.trained_in is None, moment(row.observed_at))
                for row in self._experience(connection, stream, None, None)
            ]

    def _experience(
        self, connection: sa.Connection, stream: str, observed_from: datetime | None, observed_to: datetime | None
    ) -> list[Any]:
        rows = self._candidates(connection, stream)
        members = self._select(stream, rows)
        least = None if observed_from is None else micros(observed_from)
        most = None if observed_to is None else micros(observed_to)
        return [
            row
            for row in rows
            if (row.trained_in is None or row.event_id in members)
            and (least is None or row.observed_at >= least)
            and (most is None or row.observed_at < most)
        ]

    def class_counts(self, stream: str, *, member_only: bool = False, exam: bool | None = None) -> dict[str, int]:
        """How many examples each class has, of those that `examples` would return."""
        c = t.examples.c
        where = [c.stream == stream, c.payload.is_not(None)]
        if exam is not None:
            where.append(c.exam == exam)
        with self._read() as connection:
            if member_only:
                members = self._members(connection, stream)
                rows = connection.execute(sa.select(c.event_id, c.label).where(*where))
                return dict(Counter(row.label for row in rows if row.event_id in members))
            counts = connection.execute(
                sa.select(c.label, sa.func.count().label("many")).where(*where).group_by(c.label)
            )
            return {row.label: row.many for row in counts}

    def classes(self, stream: str) -> dict[str, datetime]:
        """Every class name that a label of the stream ever brought, and when it first did."""
        c = t.classes.c
        with self._read() as connection:
            rows = connection.execute(sa.select(c.name, c.created_at).where(c.stream == stream).order_by(c.name))
            return {row.name: moment(row.created_at) for row in rows}

    def known_classes(self, stream: str, names: Collection[str]) -> set[str]:
        """Which of these names the stream has; what it costs grows with `names`, not with the stream's classes."""
        c = t.classes.c
        with self._read() as connection:
            return {
                name
                for chunk in _chunks(sorted(names))
                for name in connection.scalars(sa.select(c.name).where(c.stream == stream, c.name.in_(chunk)))
            }

    def class_total(self, stream: str) -> int:
        """How many class names the stream has."""
        query = sa.select(sa.func.count()).where(t.classes.c.stream == stream)
        with self._read() as connection:
            return connection.scalar(query) or 0

    def aliases(self, stream: str) -> dict[str, str]:
        """Names that classes had before they were renamed or merged, and the names that stand for them now."""
        c = t.aliases.c
        with self._read() as connection:
            rows = connection.execute(sa.select(c.name, c.into).where(c.stream == stream).order_by(c.name))
            return {row.name: row.into for row in rows}

    def events_of(self, stream: str, name: str) -> set[EventKey]:
        """The events that a label or what is learned gives this class."""
        with self._read() as connection:
            return {
                (stream, event_id)
                for table in (t.labels, t.examples)
                for event_id in connection.scalars(
                    sa.select(table.c.event_id).where(table.c.stream == stream, table.c.label == name)
                )
            }

    def claims(self, stream: str, encoder: str, limit: int) -> list[Claimed]:
        """The newest labels by `labelled_at` of events that are learned under `encoder`, newest first."""
        c, e = t.labels.c, t.examples.c
        query = (
            sa.select(t.labels, e.label.label("learned"), e.exam, e.embedding, e.encoder)
            .join(t.examples, sa.and_(e.stream == c.stream, e.event_id == c.event_id))
            .where(c.stream == stream, c.label.is_not(None), e.encoder == encoder)
            .order_by(c.labelled_at.desc(), c.event_id.desc(), c.labeller.desc())
            .limit(limit)
        )
        with self._read() as connection:
            return [
                Claimed(_labelled(row), row.learned, row.exam, _embedding(row.embedding), row.encoder)
                for row in connection.execute(query)
            ]

    def doubts(self, stream: str) -> list[Doubt]:
        """The labellers who are suspects, by name."""
        c = t.suspects.c
        with self._read() as connection:
            return [
                Doubt(row.labeller, moment(row.since), row.wholly, row.why, moment(row.at))
                for row in connection.execute(sa.select(t.suspects).where(c.stream == stream).order_by(c.labeller))
            ]

    def classes_created_on(self, stream: str, day: date) -> int:
        """How many class names were new on this day, in UTC."""
        start = micros(datetime.combine(day, time.min, tzinfo=UTC))
        c = t.classes.c
        query = sa.select(sa.func.count()).where(
            c.stream == stream, c.created_at >= start, c.created_at < start + 86_400_000_000
        )
        with self._read() as connection:
            return connection.scalar(query) or 0

    def accuracy(self, stream: str, last: int = 500) -> tuple[int, int]:
        """Of the answers served and labelled, the `last` by `labelled_at`: how many were right, of how many."""
        table = self.recalls(stream, last)
        return sum(right for right, _ in table.values()), sum(total for _, total in table.values())

    def recalls(self, stream: str, last: int | None = None) -> dict[str, tuple[int, int]]:
        """By true class, how many of the served answers were right, of how many; over all, or the `last`."""
        c = t.scores.c
        recent = sa.select(c.label, c.predicted).where(c.stream == stream)
        if last is not None:
            recent = recent.order_by(c.labelled_at.desc(), c.event_id.desc()).limit(last)
        recent_rows = recent.subquery()
        right = sa.func.sum(sa.case((recent_rows.c.label == recent_rows.c.predicted, 1), else_=0))
        query = sa.select(recent_rows.c.label, right, sa.func.count()).group_by(recent_rows.c.label)
        with self._read() as connection:
            return {label: (int(hits), total) for label, hits, total in connection.execute(query)}

    def scores(self, stream: str, last: int | None = None) -> list[Score]:
        """The stream's scores, oldest label first; all, or the `last` by `labelled_at`."""
        query = sa.select(t.scores).where(t.scores.c.stream == stream)
        query = query.order_by(t.scores.c.labelled_at.desc(), t.scores.c.event_id.desc()).limit(last)
        with self._read() as connection:
            rows = connection.execute(query).all()
        return [
            Score(row.stream, row.event_id, row.label, row.predicted, row.model_version, moment(row.labelled_at))
            for row in reversed(rows)
        ]

    def best_recall(self, stream: str) -> dict[str, float]:
        """The best recall that each class ever reached, as told to `Transaction.raise_best_recall`."""
        c = t.best_recall.c
        with self._read() as connection:
            rows = connection.execute(sa.select(c["class"].label("name"), c.recall).where(c.stream == stream))
            return {row.name: row.recall for row in rows}

    def runs(self, stream: str | None = None, states: Collection[str] | None = None, limit: int = 100) -> list[Run]:
        """The last fine-tunes, newest first."""
        query = sa.select(t.runs).order_by(t.runs.c.id.desc()).limit(limit)
        if stream is not None:
            query = query.where(t.runs.c.stream == stream)
        if states is not None:
            query = query.where(t.runs.c.state.in_(sorted(states)))
        with self._read() as connection:
            return [
                Run(
                    id=row.id,
                    stream=row.stream,
                    cause=row.cause,
                    state=row.state,
                    requested_at=moment(row.requested_at),
                    started_at=None if row.started_at is None else moment(row.started_at),
                    finished_at=None if row.finished_at is None else moment(row.finished_at),
                    detail=row.detail,
                )
                for row in connection.execute(query)
            ]

    def versions(self, stream: str) -> list[Version]:
        """The stream's versions, oldest first."""
        query = sa.select(t.versions).where(t.versions.c.stream == stream).order_by(t.versions.c.number)
        with self._read() as connection:
            return [
                Version(
                    stream=row.stream,
                    number=row.number,
                    state=row.state,
                    parent=row.parent,
                    encoder=row.encoder,
                    head=row.head,
                    run=row.run,
                    created_at=moment(row.created_at),
                    detail=row.detail,
                )
                for row in connection.execute(query)
            ]

    def champion(self, stream: str) -> Reign | None:
        """Which version serves, and since when."""
        reigns = self.champions(stream, limit=1)
        return reigns[0] if reigns else None

    def champions(self, stream: str, limit: int = 100) -> list[Reign]:
        """The champions one after another, newest first; a version rolled back to is there again."""
        c = t.champions.c
        query = sa.select(t.champions).where(c.stream == stream).order_by(c.id.desc()).limit(limit)
        with self._read() as connection:
            return [
                Reign(row.id, row.stream, row.version, row.cause, row.epoch, moment(row.at))
                for row in connection.execute(query)
            ]

    def revisions(self, stream: str, version: int | None = None, limit: int = 100) -> list[Revision]:
        """The last lines of lineage, newest first."""
        c = t.revisions.c
        query = sa.select(t.revisions).where(c.stream == stream).order_by(c.version.desc(), c.revision.desc())
        if version is not None:
            query = query.where(c.version == version)
        with self._read() as connection:
            return [
                Revision(
                    stream=row.stream,
                    version=row.version,
                    revision=row.revision,
                    head=row.head,
                    ledger_seq=row.ledger_seq,
                    offsets=row.offsets,
                    state=row.state,
                    detail=row.detail,
                    at=moment(row.at),
                )
                for row in connection.execute(query.limit(limit))
            ]

    def recall(self, name: str) -> str | None:
        """What `Transaction.remember` kept under this name; None if nothing."""
        with self._read() as connection:
            return connection.scalar(sa.select(t.meta.c.value).where(t.meta.c.name == f"note/{name}"))

    def outbox(self, limit: int = 1_000) -> list[Outgoing]:
        """The messages still to be sent, in the order in which they must leave."""
        with self._read() as connection:
            rows = connection.execute(sa.select(t.outbox).order_by(t.outbox.c.id).limit(limit))
            return [
                Outgoing(
                    topic=row.topic,
                    key=row.key,
                    value=row.value,
                    headers=tuple((name, bytes.fromhex(value)) for name, value in row.headers),
                    id=row.id,
                )
                for row in rows
            ]

    def delete_outbox(self, ids: Iterable[int]) -> None:
        """Forget messages that the broker has acknowledged; under any epoch, since they are sent."""
        with self._write() as connection:
            for chunk in _chunks(sorted(ids)):
                connection.execute(sa.delete(t.outbox).where(t.outbox.c.id.in_(chunk)))

    def quarantined(
        self, stream: str | None = None, limit: int = 1_000, held: Held | None = None, after: int = 0
    ) -> list[Quarantined]:
        """The labels set aside, oldest first.

        Args:
            held: only those that it means.
            after: only those with a greater id, to read on where `limit` cut.
        """
        query = sa.select(t.quarantine).where(t.quarantine.c.id > after, *_held(held or Held()))
        query = query.order_by(t.quarantine.c.id).limit(limit)
        if stream is not None:
            query = query.where(t.quarantine.c.stream == stream)
        with self._read() as connection:
            return [
                Quarantined(
                    label=Label.model_validate_json(row.message),
                    place=Place(topic=row.topic, partition=row.partition, offset=row.offset),
                    reason=row.reason,
                    at=moment(row.at),
                    id=row.id,
                    detail=row.detail or "",
                )
                for row in connection.execute(query)
            ]

    def quarantine_counts(self, stream: str) -> dict[str, int]:
        """How many labels of the stream wait in quarantine, by reason."""
        c = t.quarantine.c
        query = sa.select(c.reason, sa.func.count().label("many")).where(c.stream == stream).group_by(c.reason)
        with self._read() as connection:
            return {row.reason: row.many for row in connection.execute(query)}

    def requests(self, stream: str, state: Literal["waiting", "open", "answered"], limit: int) -> list[Request]:
        """Requests in that state, those that would teach most first; without their embeddings."""
        c = t.requests.c
        chosen = [column for column in c if column.name not in ("embedding", "encoder")]
        query = sa.select(*chosen).where(c.stream == stream, _state(state))
        with self._read() as connection:
            return [
                Request(
                    stream=row.stream,
                    event_id=row.event_id,
                    ref=_ref(row),
                    observed_at=moment(row.observed_at),
                    score=row.score,
                    why=row.why,
                    answer=row.answer,
                    model_version=row.model_version,
                    noticed_at=moment(row.noticed_at),
                    asked_at=None if row.asked_at is None else moment(row.asked_at),
                    answered_at=None if row.answered_at is None else moment(row.answered_at),
                )
                for row in connection.execute(query.order_by(c.score.desc(), c.event_id).limit(limit))
            ]

    def request_counts(self, stream: str) -> dict[str, int]:
        """How many events wait to be asked about, and how many requests are open and answered."""
        c = t.requests.c
        query = sa.select(
            *(
                sa.func.count(sa.case((_state(state), 1))).label(state)  # type: ignore[arg-type]
                for state in ("waiting", "open", "answered")
            )
        ).where(c.stream == stream)
        with self._read() as connection:
            return dict(connection.execute(query).one()._mapping)

    def asked_at(self, stream: str, since: datetime) -> list[datetime]:
        """When the requests made since then were made."""
        c = t.requests.c
        query = sa.select(c.asked_at).where(c.stream == stream, c.asked_at > micros(since)).order_by(c.asked_at)
        with self._read() as connection:
            return [moment(at) for at in connection.scalars(query)]

    def resembled(self, stream: str, encoder: str, limit: int, dimension: int) -> npt.NDArray[np.int16]:
        """What a new request must not resemble (n, dimension): what was asked about, and the labels learned last."""
        r, c = t.requests.c, t.ledger.c
        asked = sa.select(r.embedding).where(r.stream == stream, r.encoder == encoder, r.asked_at.is_not(None))
        learned = (
            sa.select(c.event_id, c.sign, c.embedding)
            .where(c.stream == stream, c.encoder == encoder)
            .order_by(c.seq.desc())
            .limit(limit)
        )
        with self._read() as connection:
            found = list(connection.scalars(asked))
            last: set[str] = set()
            for row in connection.execute(learned):
                if row.event_id not in last and row.sign > 0:
                    found.append(row.embedding)
                last.add(row.event_id)
        return np.stack([_embedding(one) for one in found]) if found else np.empty((0, dimension), np.int16)

    def sizes(self) -> dict[str, int]:
        """Rows in each table that a gauge watches: served, labels, examples, ledger, outbox, quarantine."""
        tables = (t.served, t.labels, t.examples, t.ledger, t.outbox, t.quarantine)
        with self._read() as connection:
            return {
                table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in tables
            }

    def shed_deleted(self) -> bool:
        """Let go of the write-ahead log too, which still has pages as they were; False while a reader needs it."""
        if self._engine.dialect.name != "sqlite":
            return False
        with self._writing, _retried_later(), self._engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            busy: int = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return not busy

    @property
    def erases(self) -> bool:
        """Whether deleted content is overwritten by the database itself."""
        return self._engine.dialect.name == "sqlite"

    def _members(self, connection: sa.Connection, stream: str) -> frozenset[str]:
        return self._select(stream, self._candidates(connection, stream))

    def _candidates(self, connection: sa.Connection, stream: str) -> Sequence[Any]:
        """What the policy chooses from, without the events."""
        c = t.examples.c
        columns = [c.event_id, c.label, c.priority, c.observed_at, c.trained_in]
        query = sa.select(*columns, *([c.embedding] if self.replay(stream).policy == "herding" else []))
        return connection.execute(query.where(c.stream == stream, c.exam.is_(False), c.payload.is_not(None))).all()

    def _select(self, stream: str, rows: Sequence[Any]) -> frozenset[str]:
        settings = self.replay(stream)
        herding = settings.policy == "herding"
        return select(
            settings,
            (
                Candidate(
                    event_id=row.event_id,
                    label=row.label,
                    priority=row.priority,
                    observed_at=moment(row.observed_at),
                    embedding=_embedding(row.embedding) if herding else None,
                )
                for row in rows
            ),
        )

    def _examples(
        self,
        connection: sa.Connection,
        stream: str,
        event_ids: set[str] | None,
        exam: bool | None,
        since_run: int | None,
    ) -> list[Example]:
        c = t.examples.c
        query = sa.select(t.examples).where(c.stream == stream, c.payload.is_not(None))
        if exam is not None:
            query = query.where(c.exam == exam)
        if since_run is not None:
            query = query.where(sa.or_(c.trained_in.is_(None), c.trained_in > since_run))
        if event_ids is None:
            rows: Iterable[Any] = connection.execute(query)
        else:
            rows = (
                row
                for chunk in _chunks(sorted(event_ids))
                for row in connection.execute(query.where(c.event_id.in_(chunk)))
            )
        found = [
            Example(
                stream=row.stream,
                event_id=row.event_id,
                label=row.label,
                payload=unpack(row.payload),
                observed_at=moment(row.observed_at),
                labelled_at=moment(row.labelled_at),
                ref=_ref(row),
                priority=row.priority,
                exam=row.exam,
                trained_in=row.trained_in,
                embedding=_embedding(row.embedding),
                encoder=row.encoder,
            )
            for row in rows
        ]
        return sorted(found, key=lambda example: example.event_id)

    def _draw_again(self, connection: sa.Connection) -> None:
        """Give every example of a stream another priority where the stream's seed was changed."""
        for stream, settings in self._replay.items():
            name, seed = f"seed/{stream}", str(settings.seed)
            found = connection.scalar(sa.select(t.meta.c.value).where(t.meta.c.name == name))
            if found == seed:
                continue
            put(connection, t.meta, [{"name": name, "value": seed}])
            ids = connection.scalars(sa.select(t.examples.c.event_id).where(t.examples.c.stream == stream)).all()
            _update_examples(
                connection,
                [
                    {"key_stream": stream, "key_event": event, "priority": priority(settings.seed, stream, event)}
                    for event in ids
                ],
            )

    def read(self) -> AbstractContextManager[sa.Connection]:
        """One state of the whole database, to query; for readers of this room."""
        return self._read()

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with _retried_later(), self._engine.connect() as connection:
            if connection.dialect.name != "sqlite":  # where a transaction is one state anyway
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with (
            self._writing,
            _retried_later(),
            self._engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection


class Transaction:
    """What may change, all of it at once; made by `LearnerStore.transaction`."""

    def __init__(self, store: LearnerStore, connection: sa.Connection, epoch: int, now: datetime) -> None:
        self.epoch = epoch
        self.now = now
        self._store = store
        self._connection = connection
        self._now = micros(now)

    def advance(self, moves: Mapping[tuple[str, int], tuple[int | None, int]]) -> None:
        """Move each (topic, partition) from the offset expected (None: never moved) to the next one.

        Raises:
            Superseded: an offset is not where it was left, so another learner has been at work.
        """
        c = t.offsets.c
        rows = self._connection.execute(
            sa.select(c.topic, c.partition, c.next_offset).where(c.topic.in_(sorted({topic for topic, _ in moves})))
        )
        found = {(row.topic, row.partition): row.next_offset for row in rows}
        for where, (expected, _) in moves.items():
            if found.get(where) != expected:
                raise Superseded(f"{where[0]}/{where[1]} is at offset {found.get(where)}, expected {expected}")
        put(
            self._connection,
            t.offsets,
            [
                {"topic": topic, "partition": partition, "next_offset": after, "epoch": self.epoch}
                for (topic, partition), (_, after) in moves.items()
            ],
        )

    def hold(self, claims: Mapping[tuple[str, int], int]) -> None:
        """Keep (topic, partition)s until the transaction ends.

        Raises:
            Superseded: another learner has claimed one of them since.
        """
        for where, epoch in sorted(claims.items()):
            found = _epoch(self._connection, _scope(where))
            if found != epoch:
                raise Superseded(f"{where[0]}/{where[1]} is owned under epoch {found}, this learner's is {epoch}")

    def leave_to_leader(self, records: Iterable[Record]) -> None:
        """Put messages into the inbox, for the leader to join."""
        rows = [
            {
                "topic": record.topic,
                "partition": record.partition,
                "offset": record.offset,
                "key": record.key,
                "value": record.value,
                "headers": [[name, (value or b"").hex()] for name, value in record.headers],
                "timestamp_ms": record.timestamp_ms,
            }
            for record in records
        ]
        if rows:
            self._connection.execute(sa.insert(t.inbox), rows)

    def clear_inbox(self, ids: Iterable[int]) -> None:
        """Forget messages of the inbox: they are joined in this transaction."""
        for chunk in _chunks(sorted(ids)):
            self._connection.execute(sa.delete(t.inbox).where(t.inbox.c.id.in_(chunk)))

    def served_among(self, keys: Iterable[EventKey]) -> set[EventKey]:
        """Those of the events whose prediction is in the join index as this transaction sees it."""
        return {(row.stream, row.event_id) for row in _rows(self._connection, t.served, _by_stream(keys), ())}

    def record(self, joined: Joined) -> None:
        """Keep what was joined: served rows, label rows, scores, and the class names that are new."""
        put(
            self._connection,
            t.served,
            [
                {
                    "stream": row.stream,
                    "event_id": row.event_id,
                    "ref_topic": row.ref.topic,
                    "ref_partition": row.ref.partition,
                    "ref_offset": row.ref.offset,
                    "partition": row.written[0],
                    "offset": row.written[1],
                    "label": row.label,
                    "model_version": row.model_version,
                    "observed_at": micros(row.observed_at),
                    "predicted_at": micros(row.predicted_at),
                    "too_late": row.too_late,
                    "arrived_at": self._now,
                }
                for row in joined.served
            ],
        )
        put(
            self._connection,
            t.labels,
            [
                {
                    "stream": row.stream,
                    "event_id": row.event_id,
                    "labeller": row.labeller,
                    "label": row.label,
                    "labelled_at": micros(row.labelled_at),
                    "partition": row.at[0],
                    "offset": row.at[1],
                    "confidence": row.confidence,
                    "released": row.released,
                    "arrived_at": self._now,
                }
                for row in joined.labels
            ],
        )
        put(
            self._connection,
            t.scores,
            [
                {
                    "stream": row.stream,
                    "event_id": row.event_id,
                    "label": row.label,
                    "predicted": row.predicted,
                    "model_version": row.model_version,
                    "labelled_at": micros(row.labelled_at),
                    "scored_at": self._now,
                }
                for row in joined.scores
            ],
        )
        _delete(self._connection, t.scores, joined.unscored)
        if joined.unlabelled:
            c = t.labels.c
            self._connection.execute(
                sa.delete(t.labels).where(
                    c.stream == sa.bindparam("key_stream"),
                    c.event_id == sa.bindparam("key_event"),
                    c.labeller == sa.bindparam("key_labeller"),
                ),
                [
                    {"key_stream": stream, "key_event": event_id, "key_labeller": labeller}
                    for (stream, event_id), labeller in joined.unlabelled
                ],
            )
        self._name_classes(dict.fromkeys(joined.class_names, 0))

    def reconcile(
        self,
        changes: Iterable[Change],
        contents: Mapping[EventKey, Content],
        too_late: Collection[EventKey] = (),
    ) -> Reconciled:
        """Make what is learned what it should be: examples, ledger and exam, all exactly.

        Args:
            changes: from `join`.
            contents: for every change with `needs_event`, but for those in `too_late`.
            too_late: events that cannot be read back any more; each is counted once and not asked for again.

        Raises:
            KeyError: a content is missing.
            RetryLater: what is learned, or the encoder, is no longer what the changes were made from.
        """
        changes = list(changes)
        keys = [change.key for change in changes]
        gone = set(too_late)
        self._lock_encoders(keys, contents)
        c = t.examples.c
        held = {
            (row.stream, row.event_id): row
            for row in _rows(self._connection, t.examples, _by_stream(keys), tuple(c[name] for name in _HELD))
        }
        outcomes: Counter[tuple[str, str]] = Counter()
        book = _Book(self._now)
        late: list[dict[str, Any]] = []
        unlearned: dict[str, list[str]] = {}
        for change in changes:
            row = held.get(change.key)
            if (None if row is None else _lesson(row)) != change.learned:
                raise RetryLater(f"event {change.event_id!r} of {change.stream!r} was learned otherwise meanwhile")
            if change.needs_event and change.key in gone:
                late.append({"key_stream": change.stream, "key_event": change.event_id})
                if change.learned is None or change.desired is None:
                    outcomes[change.stream, "too_late"] += 1
                    continue
                change = _without_event(change)
                if change.desired == change.learned:
                    continue
            if change.outcome is not None:
                outcomes[change.stream, change.outcome] += 1
            if change.learned is not None and change.kind is not Kind.REDATE:
                unlearned.setdefault(change.stream, []).append(change.event_id)
            content = contents[change.key] if change.needs_event else None
            self._enter(book, change, row, content)
        if late:
            c = t.served.c
            self._connection.execute(
                sa.update(t.served)
                .where(c.stream == sa.bindparam("key_stream"), c.event_id == sa.bindparam("key_event"))
                .values(too_late=True),
                late,
            )
        _delete(self._connection, t.examples, book.forgotten)
        put(self._connection, t.examples, book.learned)
        _update_examples(self._connection, book.relabelled)
        _update_examples(self._connection, book.redated)
        self._append(book.ledger)
        self._name_classes(book.counts)
        for stream, event_ids in unlearned.items():
            traces.unlearn(self._connection, stream, event_ids)
        to_exam, from_exam = self._assign_exam(book.counts)
        return Reconciled(
            outcomes, to_exam, from_exam, {stream: tuple(event_ids) for stream, event_ids in unlearned.items()}
        )

    def forget(self, stream: str, event_ids: Collection[str]) -> Forgotten:
        """Take every trace of these events out of the database, and keep them from coming back.

        The head's sums are the caller's: within this transaction it subtracts what is returned and keeps them with
        `save_sums` as of the ledger's end, because the rows that would have undone it are gone.
        """
        wanted = sorted(set(event_ids))
        keys = [(stream, event_id) for event_id in wanted]
        c = t.examples.c
        held = list(_rows(self._connection, t.examples, _by_stream(keys), (c.label, c.embedding, c.exam)))
        taught = [row for row in held if not row.exam]
        fixed = {key for key, in_head in traces.settled(self._connection, keys).items() if in_head}
        if fixed:
            # Past correction, but the ledger may still have what was added last.
            c = t.ledger.c
            last: dict[str, Any] = {}
            for row in _rows(self._connection, t.ledger, _by_stream(fixed), (c.seq, c.sign, c.label, c.embedding)):
                last[row.event_id] = max(row, last.get(row.event_id, row), key=lambda row: row.seq)
            known = [row for row in last.values() if row.sign > 0]
            taught += known
            fixed -= {(stream, row.event_id) for row in known}
        before = traces.buried(self._connection, keys)
        versions = traces.unlearn(self._connection, stream, wanted)
        rows: Counter[str] = Counter()
        # By its columns and not by its name, so that a table that is added one day is not left out.
        for table in t.METADATA.sorted_tables:
            if {"stream", "event_id"} <= set(table.c.keys()):
                for chunk in _chunks(wanted):
                    these = (table.c.stream == stream, table.c.event_id.in_(chunk))
                    rows[table.name] += self._connection.execute(sa.delete(table).where(*these)).rowcount
        counts = Counter((stream, row.label) for row in held)
        self._name_classes({key: -count for key, count in counts.items()})
        self._assign_exam(counts)
        traces.bury(self._connection, stream, wanted, self._now)
        embeddings = [_embedding(row.embedding) for row in taught]
        return Forgotten(
            rows=dict(rows),
            labels=tuple(row.label for row in taught),
            embeddings=np.stack(embeddings) if embeddings else np.empty((0, 0), np.int16),
            fixed=len(fixed),
            versions=versions,
            before=len(before),
        )

    def compact_ledger(self, stream: str, encoder: str, seq: int) -> int:
        """Delete what cancels out in the ledger, as far as the row `seq` that saved sums count to.

        What is left of an event is the row that added it last, if the head still has it, so the ledger's sums stay
        what they were, and of a withdrawn label no embedding stays. Returns how many rows went.
        """
        c = t.ledger.c
        # The sign is written out, not bound: else the index of the few rows that subtract is not used.
        these = (c.stream == stream, c.encoder == encoder, sa.text("sign < 0"))
        ids = self._connection.scalars(sa.select(c.event_id).where(*these).distinct()).all()
        gone: list[int] = []
        for chunk in _chunks(sorted(ids)):
            of_event: dict[str, list[Any]] = {}
            query = sa.select(c.seq, c.event_id, c.sign).where(c.stream == stream, c.event_id.in_(chunk))
            for row in self._connection.execute(query.where(c.encoder == encoder).order_by(c.seq)):
                of_event.setdefault(row.event_id, []).append(row)
            for rows in of_event.values():
                if rows[-1].seq <= seq:
                    gone += [row.seq for row in (rows[:-1] if rows[-1].sign > 0 else rows)]
        for numbers in _chunks(gone):
            self._connection.execute(sa.delete(t.ledger).where(c.seq.in_(numbers)))
        return len(gone)

    def mark_trained(self, stream: str, run: int, event_ids: Collection[str]) -> None:
        """Remember, before the run begins, that it trains on these; they can never enter the exam.

        Raises:
            ValueError: one of them is in the exam; a run must never see it.
        """
        c = t.examples.c
        for chunk in _chunks(sorted(event_ids)):
            these = (c.stream == stream, c.event_id.in_(chunk))
            if self._connection.scalar(sa.select(c.event_id).where(*these, c.exam.is_(True)).limit(1)) is not None:
                raise ValueError(f"run {run} of {stream!r} would train on examples of the exam")
            self._connection.execute(sa.update(t.examples).where(*these, c.trained_in.is_(None)).values(trained_in=run))
        traces.note_training(self._connection, stream, run, event_ids)

    def unmark_trained(self, run: int) -> None:
        """The run came to nothing: what it alone trained on is untouched again, and may enter the exam."""
        c = t.examples.c
        rows = self._connection.execute(sa.select(c.stream, c.label).where(c.trained_in == run).distinct()).all()
        self._connection.execute(sa.update(t.examples).where(c.trained_in == run).values(trained_in=None))
        self._assign_exam([(row.stream, row.label) for row in rows])
        traces.drop_training(self._connection, run)

    def rebase(self, stream: str, encoder: str, embeddings: Mapping[str, Embedding]) -> int:
        """Put the stream on another encoder: every example embedded anew, the ledger begun anew.

        Examples whose event was let go cannot be embedded anew and leave the head; from then on the head
        is that of the examples in the store and the labels since. Head sums saved before are dropped.

        Args:
            embeddings: by event id, int16 (d,); those of events that are not in the store are ignored.

        Returns:
            The last `seq` of the new ledger; follow it from 0.

        Raises:
            NotEmbedded: an example in the store has no embedding here; nothing was changed.
        """
        c = t.examples.c
        put(self._connection, t.encoders, [{"stream": stream, "encoder": encoder}])
        rows = self._connection.execute(
            sa.select(c.event_id, c.label, c.exam, c.payload.is_(None).label("gone"))
            .where(c.stream == stream)
            .order_by(c.event_id)
        ).all()
        missing = [row.event_id for row in rows if not row.gone and row.event_id not in embeddings]
        if missing:
            raise NotEmbedded(missing)
        _delete(self._connection, t.examples, [(stream, row.event_id) for row in rows if row.gone])
        kept = [(row, _bytes(embeddings[row.event_id])) for row in rows if not row.gone]
        _update_examples(
            self._connection,
            [
                {"key_stream": stream, "key_event": row.event_id, "embedding": embedding, "encoder": encoder}
                for row, embedding in kept
            ],
        )
        self._connection.execute(sa.delete(t.ledger).where(t.ledger.c.stream == stream))
        self._connection.execute(sa.delete(t.sums).where(t.sums.c.stream == stream))
        self._connection.execute(sa.update(t.settled).where(t.settled.c.stream == stream).values(taught=False))
        book = _Book(self._now)
        for row, embedding in kept:
            if not row.exam:
                book.enter(stream, encoder, row.event_id, 1, row.label, embedding)
        self._append(book.ledger)
        last = self._connection.scalar(sa.select(sa.func.max(t.ledger.c.seq)).where(t.ledger.c.stream == stream))
        return last or 0

    def save_sums(self, stream: str, encoder: str, seq: int, blob: bytes) -> None:
        """Keep the head's sums as of the ledger row `seq`, so that a start does not follow it all again."""
        put(self._connection, t.sums, [{"stream": stream, "encoder": encoder, "seq": seq, "blob": blob}])

    def add_run(
        self, stream: str, cause: str, *, state: str = "requested", detail: Mapping[str, Any] | None = None
    ) -> int:
        """Begin the story of a fine-tune; returns its id."""
        return self._insert(
            t.runs, stream=stream, cause=cause, state=state, requested_at=self._now, detail=dict(detail or {})
        )

    def update_run(
        self,
        run: int,
        *,
        state: str,
        started: bool = False,
        finished: bool = False,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Go on with it; `started` and `finished` stamp it now, `detail` is added to what is there."""
        values: dict[str, Any] = {"state": state}
        values |= {"started_at": self._now} if started else {}
        values |= {"finished_at": self._now} if finished else {}
        if detail is not None:
            before = self._connection.scalar(sa.select(t.runs.c.detail).where(t.runs.c.id == run)) or {}
            values["detail"] = {**before, **detail}
        self._connection.execute(sa.update(t.runs).where(t.runs.c.id == run).values(**values))

    def add_version(
        self,
        stream: str,
        *,
        encoder: str,
        head: str,
        state: str,
        parent: int | None = None,
        run: int | None = None,
        number: int | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> int:
        """Add a version under the next free number (or `number`, replacing what it said); returns it.

        Where examples that its run or its ancestors trained on are gone by now, its detail counts them as `forgotten`.
        """
        c = t.versions.c
        if number is None:
            last = self._connection.scalar(sa.select(sa.func.max(c.number)).where(c.stream == stream))
            number = (last or 0) + 1
        lost = traces.lost_by(self._connection, stream, run, parent)
        row = {
            "stream": stream,
            "number": number,
            "state": state,
            "parent": parent,
            "encoder": encoder,
            "head": head,
            "run": run,
            "created_at": self._now,
            "detail": {**(detail or {}), **({"forgotten": lost} if lost else {})},
        }
        put(self._connection, t.versions, [row])
        return number

    def set_version_state(self, stream: str, number: int, state: str, detail: Mapping[str, Any] | None = None) -> None:
        """Say what has become of a version; `detail` is added to what is there."""
        c = t.versions.c
        this = (c.stream == stream, c.number == number)
        values: dict[str, Any] = {"state": state}
        if detail is not None:
            values["detail"] = {**(self._connection.scalar(sa.select(c.detail).where(*this)) or {}), **detail}
        self._connection.execute(sa.update(t.versions).where(*this).values(**values))

    def set_champion(self, stream: str, version: int, cause: str) -> None:
        """From now on this version serves; the champions before it stay on record."""
        self._insert(t.champions, stream=stream, version=version, cause=cause, epoch=self.epoch, at=self._now)

    def add_revision(
        self,
        stream: str,
        version: int,
        *,
        head: str,
        ledger_seq: int,
        state: str = "announced",
        offsets: Mapping[tuple[str, int], int] | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> int:
        """Add a line of lineage under the version's next revision number, from 1 on; returns it.

        `offsets` are those of the store at this moment when not given.
        """
        c = t.revisions.c
        last = self._connection.scalar(
            sa.select(sa.func.max(c.revision)).where(c.stream == stream, c.version == version)
        )
        if offsets is None:
            offsets = _offsets(self._connection)
        row = {
            "stream": stream,
            "version": version,
            "revision": (last or 0) + 1,
            "head": head,
            "ledger_seq": ledger_seq,
            "offsets": {f"{topic}/{partition}": offset for (topic, partition), offset in sorted(offsets.items())},
            "state": state,
            "detail": dict(detail or {}),
            "at": self._now,
        }
        put(self._connection, t.revisions, [row])
        return (last or 0) + 1

    def raise_best_recall(self, stream: str, recalls: Mapping[str, float]) -> None:
        """Keep each class's recall where it is better than the best so far."""
        rows = [
            {"stream": stream, "class": name, "recall": recall, "at": self._now}
            for name, recall in sorted(recalls.items())
        ]
        put(
            self._connection,
            t.best_recall,
            rows,
            update=(),
            combine={"recall": lambda old, new: sa.case((new > old, new), else_=old)},
        )

    def remember(self, name: str, value: str) -> None:
        """Keep one small fact, such as that learning is paused; it replaces what was kept under the name."""
        put(self._connection, t.meta, [{"name": f"note/{name}", "value": value}])

    def keep_asked(self, asked: Asked) -> None:
        """Keep what was asked, and what has become of it so far."""
        row = {
            "id": asked.id,
            "digest": asked.digest,
            "action": asked.action,
            "stream": asked.stream,
            "state": asked.state,
            "who": asked.who,
            "reason": asked.reason,
            "answer": asked.answer,
            "at": micros(asked.at),
        }
        put(self._connection, t.asked, [row], update=("state", "answer"))

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Put messages into the outbox: they leave once this transaction is kept, at least once, in order."""
        rows = [
            {
                "topic": message.topic,
                "key": message.key,
                "value": message.value,
                "headers": [[name, value.hex()] for name, value in message.headers],
            }
            for message in messages
        ]
        if rows:
            self._connection.execute(sa.insert(t.outbox), rows)

    def notice(self, found: Sequence[Request], bound: int) -> None:
        """Let events wait to be asked about; of each stream's the `bound` that would teach most stay."""
        c = t.requests.c
        put(self._connection, t.requests, [_request_row(row) for row in found], update=())
        for stream in sorted({row.stream for row in found}):
            waiting = (c.stream == stream, _state("waiting"))
            beyond = sa.select(c.event_id).where(*waiting).order_by(c.score.desc(), c.event_id).offset(bound)
            self._connection.execute(sa.delete(t.requests).where(*waiting, c.event_id.in_(beyond)))

    def drop_waiting(self, keys: Iterable[EventKey]) -> None:
        """These events need not be asked about."""
        c = t.requests.c
        for stream, event_id in keys:
            self._connection.execute(
                sa.delete(t.requests).where(c.stream == stream, c.event_id == event_id, _state("waiting"))
            )

    def ask(self, requests: Sequence[Request]) -> None:
        """These are asked now; the caller sends them in the same transaction."""
        put(self._connection, t.requests, [_request_row(row) for row in requests])

    def answer_requests(self, keys: Iterable[EventKey]) -> Counter[str]:
        """These events have a label: what waits goes, what is open is answered; returns how many, by stream."""
        answered: Counter[str] = Counter()
        c = t.requests.c
        streams: dict[str, list[str]] = {}
        for stream, event_id in sorted(set(keys)):
            streams.setdefault(stream, []).append(event_id)
        for stream, event_ids in streams.items():
            for chunk in _chunks(event_ids):
                these = (c.stream == stream, c.event_id.in_(chunk))
                self._connection.execute(sa.delete(t.requests).where(*these, _state("waiting")))
                answered[stream] += self._connection.execute(
                    sa.update(t.requests).where(*these, _state("open")).values(answered_at=self._now)
                ).rowcount
        return answered

    def quarantine(self, labels: Iterable[Quarantined]) -> None:
        """Set labels aside; one from the same place is set aside once."""
        rows = [
            {
                "stream": row.label.stream,
                "event_id": row.label.event_id,
                "labeller": row.label.labeller,
                "label": row.label.label or "",
                "reason": row.reason,
                "topic": row.place.topic,
                "partition": row.place.partition,
                "offset": row.place.offset,
                "detail": row.detail,
                "message": row.label.model_dump_json().encode(),
                "at": self._now,
            }
            for row in labels
        ]
        put(self._connection, t.quarantine, rows, update=())

    def drop(self, stream: str, held: Held) -> int:
        """Delete labels from quarantine for good; returns how many those were."""
        gone = 0
        for part in _chunks(sorted(held.ids)) if held.ids else [()]:
            these = _held(replace(held, ids=tuple(part)))
            gone += self._connection.execute(
                sa.delete(t.quarantine).where(t.quarantine.c.stream == stream, *these)
            ).rowcount
        return gone

    def doubt(self, stream: str, doubt: Doubt) -> None:
        """From now on the labeller is a suspect."""
        row = {"since": micros(doubt.since), "wholly": doubt.wholly, "why": doubt.why, "at": self._now}
        put(self._connection, t.suspects, [{"stream": stream, "labeller": doubt.labeller, **row}])

    def trust(self, stream: str, labeller: str) -> bool:
        """The labeller is no suspect any more; returns whether it was one."""
        c = t.suspects.c
        gone = self._connection.execute(sa.delete(t.suspects).where(c.stream == stream, c.labeller == labeller))
        return gone.rowcount > 0

    def name_as(self, stream: str, old: str, new: str) -> None:
        """Whatever named the class `old` names `new`, but for labels and what is learned: `reconcile` them first.

        Answers that were served, scores, the class list and the names that led to `old` follow. The best recall
        moves with a name that nobody had; two classes made one are measured anew.

        Raises:
            ValueError: something is still learned as `old`.
        """
        c = t.classes.c
        rows = {
            row.name: row
            for row in self._connection.execute(sa.select(t.classes).where(c.stream == stream, c.name.in_([old, new])))
        }
        if old in rows and rows[old].learned:
            raise ValueError(f"{rows[old].learned} examples of {stream!r} are still learned as {old!r}")
        if old in rows:
            first = min(row.created_at for row in rows.values())
            self._connection.execute(sa.delete(t.classes).where(c.stream == stream, c.name == old))
            row = {"stream": stream, "name": new, "created_at": first, "learned": 0}
            put(self._connection, t.classes, [row], update=("created_at",))
        s = t.scores.c
        named = ((t.served, t.served.c.label), (t.scores, s.predicted), (t.scores, s.label))
        for table, column in (*named, (t.requests, t.requests.c.answer)):
            self._connection.execute(
                sa.update(table).where(table.c.stream == stream, column == old).values({column.name: new})
            )
        b = t.best_recall.c
        merged = self._connection.scalar(sa.select(b.recall).where(b.stream == stream, b["class"] == new)) is not None
        these = sa.and_(b.stream == stream, b["class"].in_([old, new]))
        if merged:
            self._connection.execute(sa.delete(t.best_recall).where(these))
        else:
            self._connection.execute(sa.update(t.best_recall).where(these).values({"class": new}))
        a = t.aliases.c
        self._connection.execute(sa.delete(t.aliases).where(a.stream == stream, a.name == new))
        self._connection.execute(sa.update(t.aliases).where(a.stream == stream, a.into == old).values(into=new))
        put(self._connection, t.aliases, [{"stream": stream, "name": old, "into": new, "at": self._now}])

    def release(self, ids: Collection[int]) -> None:
        """Take labels out of quarantine; the caller joins them like new ones in the same transaction."""
        for chunk in _chunks(sorted(ids)):
            self._connection.execute(sa.delete(t.quarantine).where(t.quarantine.c.id.in_(chunk)))

    def purge_index(self, most: int, excess: int = 0) -> int:
        """Let go of the oldest predictions that wait: those past the horizon, and as many as are beyond the bound.

        Args:
            most: how many may go at once.
            excess: how many more wait than may, as `LearnerStore.sizes` says.

        Returns:
            How many went.
        """
        c = t.served.c
        keys = sa.tuple_(c.stream, c.event_id)
        expired = sa.select(c.stream, c.event_id).where(c.arrived_at < micros(self.now - self._store.settings.horizon))
        gone = self._connection.execute(sa.delete(t.served).where(keys.in_(expired.limit(most)))).rowcount
        more = min(most, excess) - gone
        if more > 0:
            oldest = sa.select(c.stream, c.event_id).order_by(c.arrived_at, c.stream, c.event_id).limit(more)
            gone += self._connection.execute(sa.delete(t.served).where(keys.in_(oldest))).rowcount
        return gone

    def purge(self) -> Purged:
        """Let go of what is past its horizon or beyond its bound; see `StoreSettings`."""
        settings = self._store.settings
        horizon = micros(self.now - settings.horizon)
        settled = micros(self.now - settings.correction_horizon)
        retention = micros(self.now - settings.ledger_retention)
        served = self._purge_served(horizon, settings.index_size)
        too_late = self._purge_labels(horizon)
        payloads = self._purge_payloads(settled)

        c = t.examples.c
        past = (c.payload.is_(None), c.learned_at < retention)
        leaving = self._connection.execute(sa.select(c.stream, c.event_id, c.exam).where(*past)).all()
        traces.settle(self._connection, {(row.stream, row.event_id): not row.exam for row in leaving}, self._now)
        fixed = self._connection.execute(sa.delete(t.examples).where(*past)).rowcount
        self._connection.execute(sa.delete(t.settled).where(t.settled.c.at < retention))
        saved = (
            sa.select(t.sums.c.seq)
            .where(t.sums.c.stream == t.ledger.c.stream, t.sums.c.encoder == t.ledger.c.encoder)
            .scalar_subquery()
        )
        ledger = self._connection.execute(
            sa.delete(t.ledger).where(t.ledger.c.at < retention, t.ledger.c.seq <= saved)
        ).rowcount
        scores = self._connection.execute(sa.delete(t.scores).where(t.scores.c.scored_at < retention)).rowcount
        aside = self._purge_quarantine(micros(self.now - settings.quarantine_retention), settings.quarantine_size)
        r, yesterday = t.requests.c, micros(self.now - timedelta(days=1))
        requests = self._connection.execute(
            sa.delete(t.requests).where(
                sa.or_(r.asked_at < min(horizon, yesterday), sa.and_(_state("waiting"), r.noticed_at < yesterday))
            )
        ).rowcount
        asked = self._connection.execute(
            sa.delete(t.asked).where(t.asked.c.at < micros(self.now - REQUESTS_KEPT))
        ).rowcount
        return Purged(served, too_late, payloads, fixed, ledger, scores, aside, requests, asked)

    def _purge_quarantine(self, expired: int, bound: int) -> int:
        c = t.quarantine.c
        beyond = sa.select(c.id).order_by(c.id.desc()).offset(bound).limit(1).scalar_subquery()
        return self._connection.execute(sa.delete(t.quarantine).where(sa.or_(c.at < expired, c.id <= beyond))).rowcount

    def _enter(self, book: _Book, change: Change, row: Any, content: Content | None) -> None:
        """Enter one change into the book."""
        stream, event_id, desired = change.stream, change.event_id, change.desired
        key = {"key_stream": stream, "key_event": event_id}
        if change.kind is Kind.REDATE and desired is not None:
            times = {"observed_at": micros(desired.observed_at), "labelled_at": micros(desired.labelled_at)}
            book.redated.append({**key, **times})
            return
        if row is not None:
            book.counts[stream, row.label] -= 1
            # What is in the exam is not in the head.
            if not row.exam:
                book.enter(stream, row.encoder, event_id, -1, row.label, row.embedding)
        if desired is None:
            book.forgotten.append(change.key)
            return
        book.counts[stream, desired.label] += 1
        if content is None:
            book.enter(stream, row.encoder, event_id, 1, desired.label, row.embedding)
            book.relabelled.append(
                {
                    **key,
                    "label": desired.label,
                    "observed_at": micros(desired.observed_at),
                    "labelled_at": micros(desired.labelled_at),
                    "exam": False,
                    "learned_at": self._now,
                }
            )
            return
        embedding = _bytes(content.embedding)
        book.enter(stream, content.encoder, event_id, 1, desired.label, embedding)
        settings = self._store.settings
        book.learned.append(
            {
                "stream": stream,
                "event_id": event_id,
                "label": desired.label,
                "ref_topic": desired.ref.topic,
                "ref_partition": desired.ref.partition,
                "ref_offset": desired.ref.offset,
                "observed_at": micros(desired.observed_at),
                "labelled_at": micros(desired.labelled_at),
                "payload": pack(content.payload),
                "embedding": embedding,
                "encoder": content.encoder,
                "priority": priority(self._store.replay(stream).seed, stream, event_id),
                "eligible": eligible(settings.exam_seed, stream, event_id, settings.exam_one_in),
                "exam": False,
                "trained_in": None if row is None else row.trained_in,
                "learned_at": self._now,
            }
        )

    def _lock_encoders(self, keys: Iterable[EventKey], contents: Mapping[EventKey, Content]) -> None:
        """See that all was embedded under the encoder in use; hold it, so that ledger rows come in order."""
        new: dict[str, set[str]] = {}
        for (stream, _), content in contents.items():
            new.setdefault(stream, set()).add(content.encoder)
        put(
            self._connection,
            t.encoders,
            [{"stream": stream, "encoder": min(encoders)} for stream, encoders in sorted(new.items())],
            update=(),
        )
        c = t.encoders.c
        streams = sorted({stream for stream, _ in keys} | set(new))
        rows = self._connection.execute(
            sa.select(c.stream, c.encoder).where(c.stream.in_(streams)).order_by(c.stream).with_for_update()
        )
        for row in rows:
            if new.get(row.stream, {row.encoder}) != {row.encoder}:
                raise RetryLater(f"stream {row.stream!r} has another encoder now; the events must be embedded again")

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        put(self._connection, t.ledger, rows, update=())

    def _name_classes(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Know these classes, and by how much their numbers of learned events change."""
        rows = [
            {"stream": stream, "name": name, "created_at": self._now, "learned": count}
            for (stream, name), count in sorted(counts.items())
        ]
        put(self._connection, t.classes, rows, update=(), combine={"learned": lambda old, new: old + new})

    def _assign_exam(self, touched: Iterable[tuple[str, str]]) -> tuple[tuple[EventKey, ...], tuple[EventKey, ...]]:
        """Give the exam what it is due from the touched classes, by (stream, class), and take back the rest.

        A class with labels enough gives its eligible examples that no run has trained on, and its head
        lets go of them. A class that corrections left with too few takes them back, so that the exam is a
        function of what is labelled and not of the order in which it came.
        """
        settings = self._store.settings
        streams: dict[str, list[str]] = {}
        for stream, name in sorted(set(touched)):
            streams.setdefault(stream, []).append(name)
        gone: list[EventKey] = []
        back: list[EventKey] = []
        c = t.examples.c
        columns = (c.event_id, c.label, c.embedding, c.encoder)
        for stream, names in streams.items():
            for chunk in _chunks(names):
                counts = sa.select(t.classes.c.name).where(
                    t.classes.c.stream == stream, t.classes.c.name.in_(chunk), t.classes.c.learned >= settings.exam_from
                )
                rich = set(self._connection.scalars(counts))
                due = sa.select(*columns).where(
                    c.stream == stream,
                    c.label.in_(sorted(rich)),
                    c.exam.is_(False),
                    c.eligible.is_(True),
                    c.trained_in.is_(None),
                    c.payload.is_not(None),
                )
                undue = sa.select(*columns).where(
                    c.stream == stream, c.label.in_([name for name in chunk if name not in rich]), c.exam.is_(True)
                )
                gone += self._move(stream, due, exam=True) if rich else []
                back += self._move(stream, undue, exam=False) if len(rich) < len(chunk) else []
        return tuple(gone), tuple(back)

    def _move(self, stream: str, query: sa.Select[Any], *, exam: bool) -> list[EventKey]:
        # Put in order here: asked to do it, SQLite would walk the whole stream by its key, for a handful of rows.
        rows = sorted(self._connection.execute(query), key=lambda row: str(row.event_id))
        book = _Book(self._now)
        for row in rows:
            book.enter(stream, row.encoder, row.event_id, -1 if exam else 1, row.label, row.embedding)
        _update_examples(
            self._connection,
            [{"key_stream": stream, "key_event": row.event_id, "exam": exam} for row in rows],
        )
        self._append(book.ledger)
        return [(stream, row.event_id) for row in rows]

    def _purge_served(self, horizon: int, bound: int) -> int:
        c = t.served.c
        gone = self._connection.execute(sa.delete(t.served).where(c.arrived_at < horizon)).rowcount
        excess = (self._connection.scalar(sa.select(sa.func.count()).select_from(t.served)) or 0) - bound
        if excess > 0:
            oldest = sa.select(c.stream, c.event_id).order_by(c.arrived_at, c.stream, c.event_id).limit(excess)
            gone += self._connection.execute(
                sa.delete(t.served).where(sa.tuple_(c.stream, c.event_id).in_(oldest))
            ).rowcount
        return gone

    def _purge_labels(self, horizon: int) -> Counter[str]:
        """Let go of labels whose event never came; those of what is learned stay, for corrections."""
        c, e, s = t.labels.c, t.examples.c, t.served.c
        learned = sa.exists().where(e.stream == c.stream, e.event_id == c.event_id)
        served = sa.exists().where(s.stream == c.stream, s.event_id == c.event_id)
        scored = sa.exists().where(t.scores.c.stream == c.stream, t.scores.c.event_id == c.event_id)
        expired = sa.and_(c.arrived_at < horizon, ~learned, ~served)
        in_vain = self._connection.execute(
            sa.select(c.stream, sa.func.count(sa.distinct(c.event_id)).label("many"))
            .where(expired, ~scored, c.label.is_not(None))
            .group_by(c.stream)
        )
        counts = Counter({row.stream: row.many for row in in_vain})
        self._connection.execute(sa.delete(t.labels).where(expired))
        return counts

    def _purge_payloads(self, settled: int) -> int:
        """Let go of the events of settled examples that neither the replay policy nor the exam keeps."""
        c = t.examples.c
        old = (c.learned_at < settled, c.payload.is_not(None))
        gone: list[EventKey] = []
        for stream in self._connection.scalars(sa.select(c.stream).where(*old).distinct()).all():
            members = self._store._members(self._connection, stream)
            ids = self._connection.scalars(sa.select(c.event_id).where(c.stream == stream, c.exam.is_(False), *old))
            gone += [(stream, event_id) for event_id in ids if event_id not in members]
            place = sa.func.row_number().over(partition_by=c.label, order_by=(c.priority, c.event_id)).label("place")
            ranked = (
                sa.select(c.event_id, c.learned_at, place)
                .where(c.stream == stream, c.exam.is_(True), c.payload.is_not(None))
                .subquery()
            )
            beyond = sa.select(ranked.c.event_id).where(
                ranked.c.place > self._store.settings.exam_per_class, ranked.c.learned_at < settled
            )
            gone += [(stream, event_id) for event_id in self._connection.scalars(beyond)]
        _update_examples(
            self._connection,
            [{"key_stream": stream, "key_event": event_id, "payload": None} for stream, event_id in gone],
        )
        return len(gone)

    def _insert(self, table: sa.Table, **values: Any) -> int:
        (number,) = self._connection.execute(sa.insert(table).values(**values)).inserted_primary_key or (0,)
        return int(number)


_HELD = (
    "label",
    "ref_topic",
    "ref_partition",
    "ref_offset",
    "observed_at",
    "labelled_at",
    "embedding",
    "encoder",
    "exam",
    "trained_in",
)


class _Book:
    """The rows that a transaction gathers before it writes them, one statement a table."""

    def __init__(self, now: int) -> None:
        self._now = now
        self.learned: list[dict[str, Any]] = []
        self.relabelled: list[dict[str, Any]] = []
        self.redated: list[dict[str, Any]] = []
        self.forgotten: list[EventKey] = []
        self.ledger: list[dict[str, Any]] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    def enter(self, stream: str, encoder: str, event_id: str, sign: int, label: str, embedding: bytes) -> None:
        """Enter one ledger row."""
        self.ledger.append(
            {
                "stream": stream,
                "encoder": encoder,
                "event_id": event_id,
                "sign": sign,
                "label": label,
                "embedding": embedding,
                "at": self._now,
            }
        )


def pack(payload: Payload) -> bytes:
    """The payload as the database holds it: `t` and UTF-8, or `w`, the shape and little-endian float32."""
    if isinstance(payload, str):
        return b"t" + payload.encode()
    channels, steps = payload.shape
    return b"w" + struct.pack("<II", channels, steps) + np.ascontiguousarray(payload, dtype="<f4").tobytes()


def unpack(packed: bytes) -> Payload:
    """What `pack` was given."""
    if packed[:1] == b"t":
        return packed[1:].decode()
    channels, steps = struct.unpack_from("<II", packed, 1)
    return np.frombuffer(packed, dtype="<f4", offset=9).reshape(channels, steps).astype(np.float32)


def _bytes(embedding: Embedding) -> bytes:
    return np.ascontiguousarray(embedding, dtype="<i2").tobytes()


def _embedding(packed: bytes) -> Embedding:
    return np.frombuffer(packed, dtype="<i2")


def _without_event(change: Change) -> Change:
    """The change that is left when the event at the desired place is gone: learn on from the one known."""
    desired, learned = change.desired, change.learned
    if desired is None or learned is None:
        raise ValueError("nothing is learned of the event, or nothing should be")
    kept = Lesson(desired.label, learned.ref, learned.observed_at, desired.labelled_at)
    return Change(change.stream, change.event_id, kept, learned)


def _scope(where: tuple[str, int]) -> str:
    return f"{where[0]}/{where[1]}"


def _epoch(connection: sa.Connection, scope: str) -> int | None:
    """The epoch in force; its row is held until the transaction ends."""
    return connection.scalar(sa.select(t.owners.c.epoch).where(t.owners.c.scope == scope).with_for_update())


def _tenure(connection: sa.Connection, scope: str) -> Tenure | None:
    c = t.owners.c
    query = sa.select(c.owner, c.epoch, c.beat_at, c.lease).where(c.scope == scope)
    row = connection.execute(query).first()
    if row is None:
        return None
    silent = timedelta(microseconds=t.clock(connection) - row.beat_at) if row.beat_at is not None else None
    lease = None if row.lease is None else timedelta(microseconds=row.lease)
    return Tenure(row.owner, row.epoch, lease, silent, (row.owner, row.epoch, row.beat_at, row.lease))


def _offsets(connection: sa.Connection) -> dict[tuple[str, int], int]:
    c = t.offsets.c
    rows = connection.execute(sa.select(c.topic, c.partition, c.next_offset))
    return {(row.topic, row.partition): row.next_offset for row in rows}


def _ref(row: Any) -> Place:
    return Place(topic=row.ref_topic, partition=row.ref_partition, offset=row.ref_offset)


def _lesson(row: Any) -> Lesson:
    return Lesson(row.label, _ref(row), moment(row.observed_at), moment(row.labelled_at))


def _labelled(row: Any) -> Labelled:
    return Labelled(
        stream=row.stream,
        event_id=row.event_id,
        labeller=row.labeller,
        label=row.label,
        labelled_at=moment(row.labelled_at),
        at=(row.partition, row.offset),
        confidence=row.confidence,
        released=bool(row.released),
    )


def _served(row: Any) -> Served:
    return Served(
        stream=row.stream,
        event_id=row.event_id,
        ref=_ref(row),
        written=(row.partition, row.offset),
        label=row.label,
        model_version=row.model_version,
        observed_at=moment(row.observed_at),
        predicted_at=moment(row.predicted_at),
        too_late=row.too_late,
    )


def _asked(row: Any) -> Asked:
    return Asked(row.id, row.digest, row.action, row.stream, row.state, row.who, row.reason, moment(row.at), row.answer)


def _state(state: Literal["waiting", "open", "answered"]) -> sa.ColumnElement[bool]:
    """The requests in that state; a label that came before it was asked for leaves none."""
    c = t.requests.c
    match state:
        case "waiting":
            return c.asked_at.is_(None)
        case "open":
            return sa.and_(c.asked_at.is_not(None), c.answered_at.is_(None))
    return c.answered_at.is_not(None)


def _request_row(request: Request) -> dict[str, Any]:
    return {
        "stream": request.stream,
        "event_id": request.event_id,
        "ref_topic": request.ref.topic,
        "ref_partition": request.ref.partition,
        "ref_offset": request.ref.offset,
        "observed_at": micros(request.observed_at),
        "score": request.score,
        "why": request.why,
        "answer": request.answer,
        "model_version": request.model_version,
        "embedding": None if request.embedding is None else _bytes(request.embedding),
        "encoder": request.encoder,
        "noticed_at": micros(request.noticed_at),
        "asked_at": None if request.asked_at is None else micros(request.asked_at),
        "answered_at": None if request.answered_at is None else micros(request.answered_at),
    }


def _chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK]


def _by_stream(keys: Iterable[EventKey]) -> dict[str, list[str]]:
    """The ids of these events, each once and in order, by stream."""
    streams: dict[str, list[str]] = {}
    for stream, event_id in sorted(set(keys)):
        streams.setdefault(stream, []).append(event_id)
    return streams


def _rows(
    connection: sa.Connection,
    table: sa.Table,
    streams: Mapping[str, Sequence[str]],
    columns: Sequence[Any] | None = None,
) -> Iterator[Any]:
    """The rows of these events, a statement for each stream; stream and event id come with them."""
    chosen = table.c if columns is None else (table.c.stream, table.c.event_id, *columns)
    for stream, event_ids in streams.items():
        these = t.among(connection, table.c.event_id, event_ids)
        # All at once: asked for one by one, a row costs three times as much.
        yield from connection.execute(sa.select(*chosen).where(table.c.stream == stream, these)).all()


def _held(held: Held) -> list[Any]:
    c = t.quarantine.c
    exact = ((c.labeller, held.labeller), (c.label, held.label), (c.reason, held.reason))
    where: list[Any] = [column == value for column, value in exact if value is not None]
    return [*where, c.id.in_(held.ids)] if held.ids else where


def _delete(connection: sa.Connection, table: sa.Table, keys: Sequence[EventKey]) -> None:
    if keys:
        c = table.c
        connection.execute(
            sa.delete(table).where(c.stream == sa.bindparam("key_stream"), c.event_id == sa.bindparam("key_event")),
            [{"key_stream": stream, "key_event": event_id} for stream, event_id in keys],
        )


def _update_examples(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Change examples, in one statement; each row has `key_stream`, `key_event` and the same columns."""
    if not rows:
        return
    c = t.examples.c
    changed: dict[str, Any] = {name: sa.bindparam(name) for name in rows[0] if name not in ("key_stream", "key_event")}
    connection.execute(
        sa.update(t.examples)
        .where(c.stream == sa.bindparam("key_stream"), c.event_id == sa.bindparam("key_event"))
        .values(changed),
        list(rows),
    )


@contextmanager
def _retried_later() -> Iterator[None]:
    """A database that is away, full, locked or for now read-only is met like a broker that is away."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        passing = isinstance(error, sa.exc.OperationalError) or error.connection_invalidated
        if passing or getattr(error.orig, "sqlstate", None) == _READ_ONLY:
            raise RetryLater(f"the learner's database: {error.orig}") from error
        raise
    except sa.exc.TimeoutError as error:
        raise RetryLater(f"the learner's database: {error}") from error
