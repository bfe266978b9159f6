"""The learner's tables, and how rows are put into them on any database.

Times are whole microseconds since 1970 in UTC, so that they compare exactly and alike everywhere.
SQLite is the default: WAL, so that readers never wait for the writer, and `synchronous=FULL`, one flush
a commit. `NORMAL` would keep the store whole too, but could forget the last commits when the machine
loses power. For what is learned that is harmless, because the offsets lie in the same database and the
messages would be read again; an epoch or a revision number that was already shown to others and is then
given out twice is not.

`secure_delete` is on, always: what is deleted or replaced is overwritten with zeros. On only while an event is
forgotten it would come too late for the text that was let go a month before, which lies in a free page since.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite

SCHEMA = "1"
"""Kept in `meta`; a store of another schema is refused."""

METADATA = sa.MetaData()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def micros(at: datetime) -> int:
    """The time as the tables hold it."""
    return (at - _EPOCH) // timedelta(microseconds=1)


def moment(at: int) -> datetime:
    """The time as the rest of the program knows it, in UTC."""
    return _EPOCH + timedelta(microseconds=at)


def _text(name: str, *, key: bool = False, null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, primary_key=key, nullable=null)


def _time(name: str, *, null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, nullable=null)


def _int(name: str, *, key: bool = False, null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, primary_key=key, nullable=null, autoincrement=False)


def _serial(name: str) -> sa.Column[Any]:
    """A number that only grows: with AUTOINCREMENT, SQLite does not hand out a deleted one again."""
    return sa.Column(name, _ID, primary_key=True, autoincrement=True)


def _table(name: str, *columns: sa.Column[Any] | sa.Index) -> sa.Table:
    serial = any(isinstance(column, sa.Column) and column.autoincrement is True for column in columns)
    return sa.Table(name, METADATA, *columns, sqlite_autoincrement=serial)


meta = _table("meta", _text("name", key=True), _text("value"))
owners = _table("owners", _text("scope", key=True), _int("epoch"), _text("owner"), _time("claimed_at"))
offsets = _table("offsets", _text("topic", key=True), _int("partition", key=True), _int("next_offset"), _int("epoch"))

served = _table(
    "served",
    _text("stream", key=True),
    _text("event_id", key=True),
    _text("ref_topic"),
    _int("ref_partition"),
    _int("ref_offset"),
    _int("partition"),
    _int("offset"),
    _text("label", null=True),
    _text("model_version"),
    _time("observed_at"),
    _time("predicted_at"),
    sa.Column("too_late", sa.Boolean, nullable=False),
    _time("arrived_at"),
    sa.Index("served_arrived", "arrived_at"),
)
labels = _table(
    "labels",
    _text("stream", key=True),
    _text("event_id", key=True),
    _text("labeller", key=True),
    _text("label", null=True),
    _time("labelled_at"),
    _int("partition"),
    _int("offset"),
    sa.Column("confidence", sa.Float),
    sa.Column("released", sa.Boolean),
    _time("arrived_at"),
    sa.Index("labels_arrived", "arrived_at"),
    sa.Index("labels_recent", "stream", "labelled_at"),
    sa.Index("labels_named", "stream", "label"),
)
classes = _table(
    "classes",
    _text("stream", key=True),
    _text("name", key=True),
    _time("created_at"),
    _int("learned"),
)
aliases = _table("aliases", _text("stream", key=True), _text("name", key=True), _text("into"), _time("at"))
suspects = _table(
    "suspects",
    _text("stream", key=True),
    _text("labeller", key=True),
    _time("since"),
    sa.Column("wholly", sa.Boolean, nullable=False),
    _text("why"),
    _time("at"),
)
examples = _table(
    "examples",
    _text("stream", key=True),
    _text("event_id", key=True),
    _text("label"),
    _text("ref_topic"),
    _int("ref_partition"),
    _int("ref_offset"),
    _time("observed_at"),
    _time("labelled_at"),
    sa.Column("payload", sa.LargeBinary),
    sa.Column("embedding", sa.LargeBinary, nullable=False),
    _text("encoder"),
    _int("priority"),
    sa.Column("eligible", sa.Boolean, nullable=False),
    sa.Column("exam", sa.Boolean, nullable=False),
    _int("trained_in", null=True),
    _time("learned_at"),
    # As far as what a class owes the exam: else every label would look at all examples of its class.
    sa.Index("examples_class", "stream", "label", "exam", "eligible", "trained_in"),
)
encoders = _table("encoders", _text("stream", key=True), _text("encoder"))
ledger = _table(
    "ledger",
    _serial("seq"),
    _text("stream"),
    _text("encoder"),
    _text("event_id"),
    sa.Column("sign", sa.SmallInteger, nullable=False),
    _text("label"),
    sa.Column("embedding", sa.LargeBinary, nullable=False),
    _time("at"),
    sa.Index("ledger_stream", "stream", "encoder", "seq"),
    sa.Index("ledger_event", "stream", "event_id"),
    # What was subtracted is looked for often and is seldom there.
    sa.Index(
        "ledger_removed",
        "stream",
        "encoder",
        "event_id",
        sqlite_where=sa.text("sign < 0"),
        postgresql_where=sa.text("sign < 0"),
    ),
)
sums = _table(
    "sums",
    _text("stream", key=True),
    _text("encoder", key=True),
    _int("seq"),
    sa.Column("blob", sa.LargeBinary, nullable=False),
)
scores = _table(
    "scores",
    _text("stream", key=True),
    _text("event_id", key=True),
    _text("label"),
    _text("predicted", null=True),
    _text("model_version"),
    _time("labelled_at"),
    _time("scored_at"),
    sa.Index("scores_recent", "stream", "labelled_at", "event_id"),
)
best_recall = _table(
    "best_recall",
    _text("stream", key=True),
    _text("class", key=True),
    sa.Column("recall", sa.Float, nullable=False),
    _time("at"),
)
runs = _table(
    "runs",
    _serial("id"),
    _text("stream"),
    _text("cause"),
    _text("state"),
    _time("requested_at"),
    _time("started_at", null=True),
    _time("finished_at", null=True),
    sa.Column("detail", sa.JSON, nullable=False),
)
trained_on = _table(
    "trained_on",
    _int("run", key=True),
    _text("stream"),
    _int("size"),
    sa.Column("marks", sa.LargeBinary, nullable=False),
    sa.Index("trained_on_stream", "stream"),
)
forgotten = _table("forgotten", _text("stream", key=True), _text("digest", key=True), _time("at"))
settled = _table(
    "settled",
    _text("stream", key=True),
    _int("mark", key=True),
    sa.Column("taught", sa.Boolean, nullable=False),
    _time("at"),
    sa.Index("settled_at", "at"),
)
versions = _table(
    "versions",
    _text("stream", key=True),
    _int("number", key=True),
    _text("state"),
    _int("parent", null=True),
    _text("encoder"),
    _text("head"),
    _int("run", null=True),
    _time("created_at"),
    sa.Column("detail", sa.JSON, nullable=False),
)
champions = _table(
    "champions",
    _serial("id"),
    _text("stream"),
    _int("version"),
    _text("cause"),
    _int("epoch"),
    _time("at"),
    sa.Index("champions_stream", "stream", "id"),
)
revisions = _table(
    "revisions",
    _text("stream", key=True),
    _int("version", key=True),
    _int("revision", key=True),
    _text("head"),
    _int("ledger_seq"),
    sa.Column("offsets", sa.JSON, nullable=False),
    _text("state"),
    sa.Column("detail", sa.JSON, nullable=False),
    _time("at"),
)
outbox = _table(
    "outbox",
    _serial("id"),
    _text("topic"),
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary),
    sa.Column("headers", sa.JSON, nullable=False),
)
quarantine = _table(
    "quarantine",
    _serial("id"),
    _text("stream"),
    _text("event_id"),
    _text("labeller"),
    _text("label"),
    _text("reason"),
    _text("detail", null=True),
    _text("topic"),
    _int("partition"),
    _int("offset"),
    sa.Column("message", sa.LargeBinary, nullable=False),
    _time("at"),
    sa.Index("quarantine_place", "topic", "partition", "offset", unique=True),
)

_INSERTS: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def connect(url: str) -> sa.Engine:
    """An engine whose transactions are what they say, with foreign quirks of SQLite switched off."""
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def configure(connection: sqlite3.Connection, _: object) -> None:
            # The driver would begin a transaction by itself, late, and never for a read.
            connection.isolation_level = None
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout=30000")
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
            cursor.execute("PRAGMA secure_delete=ON")
            cursor.close()

        @event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            # A writer takes the lock at once: taken later, it may find that what it read has changed.
            writes = connection.get_execution_options().get("writes", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def put(
    connection: sa.Connection,
    table: sa.Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    update: Iterable[str] | None = None,
    combine: Mapping[str, Any] | None = None,
) -> None:
    """Insert `rows`, in one statement; where a row of the same primary key is there, change it.

    Args:
        update: the columns to overwrite; all but the key when None, none (the old row stays) when empty.
        combine: column to an expression over `excluded(table)` and the table, instead of overwriting.
    """
    if not rows:
        return
    statement = _INSERTS[connection.dialect.name](table)
    keys = [column.name for column in table.primary_key]
    given = [name for name in rows[0] if name not in keys] if update is None else list(update)
    changes = {name: statement.excluded[name] for name in given}
    for name, combined in (combine or {}).items():
        changes[name] = combined(table.c[name], statement.excluded[name])
    if changes:
        statement = statement.on_conflict_do_update(index_elements=keys, set_=changes)
    else:
        statement = statement.on_conflict_do_nothing()
    connection.execute(statement, list(rows))
