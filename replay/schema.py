"""The learner's tables, and how rows are put into them on any database.

Times are whole microseconds since 1970 in UTC, so that they compare exactly and alike everywhere; text is put
in order by its code points, whatever the database's own language.

SQLite is the default: WAL, so that readers never wait for the writer, and `synchronous=FULL`, one flush
a commit. `NORMAL` would keep the store whole too, but could forget the last commits when the machine
loses power. For what is learned that is harmless, because the offsets lie in the same database and the
messages would be read again; an epoch or a revision number that was already shown to others and is then
given out twice is not.

On PostgreSQL the same, by the server's own settings; see `connect` for what is asked of a session.

In SQLite `secure_delete` is on, always: what is deleted or replaced is overwritten with zeros. On only while an
event is forgotten it would come too late for the text that was let go a month before, which lies in a free page since.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, Self

import sqlalchemy as sa
from pydantic_core import PydanticCustomError, core_schema
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite

from stream.errors import Misconfigured

SCHEMA = "1"
"""Kept in `meta`; a store of another schema is refused."""

METADATA = sa.MetaData()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def micros(at: datetime) -> int:
    """The time as the tables hold it."""
    since = at - _EPOCH
    # A division by a timedelta is exact as well, and takes five times as long.
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def moment(at: int) -> datetime:
    """The time as the rest of the program knows it, in UTC."""
    return _EPOCH + timedelta(microseconds=at)


def _text(name: str, *, key: bool = False, null: bool = False) -> sa.Column[Any]:
    return sa.Column(name, _TEXT, primary_key=key, nullable=null)


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
owners = _table(
    "owners",
    _text("scope", key=True),
    _int("epoch"),
    _text("owner"),
    _time("claimed_at"),
    # The last sign of life by the database's clock, and for how long it is one; without, the owner has gone.
    _time("beat_at", null=True),
    _int("lease", null=True),
)
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
requests = _table(
    "requests",
    _text("stream", key=True),
    _text("event_id", key=True),
    _text("ref_topic"),
    _int("ref_partition"),
    _int("ref_offset"),
    _time("observed_at"),
    sa.Column("score", sa.Float, nullable=False),
    _text("why"),
    _text("answer", null=True),
    _text("model_version"),
    sa.Column("embedding", sa.LargeBinary),
    _text("encoder", null=True),
    _time("noticed_at"),
    _time("asked_at", null=True),
    _time("answered_at", null=True),
    sa.Index("requests_ranked", "stream", "asked_at", "score"),
)
asked = _table(
    "asked",
    _text("id", key=True),
    _text("digest"),
    _text("action"),
    _text("stream"),
    _text("state"),
    _text("who"),
    _text("reason"),
    _text("answer", null=True),
    _time("at"),
    sa.Index("asked_at", "at"),
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
inbox = _table(
    "inbox",
    _serial("id"),
    _text("topic"),
    _int("partition"),
    _int("offset"),
    sa.Column("key", sa.LargeBinary),
    sa.Column("value", sa.LargeBinary),
    sa.Column("headers", sa.JSON, nullable=False),
    _int("timestamp_ms"),
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


_POSTGRES = "postgresql+psycopg"
_KNOWN = f"sqlite, {_POSTGRES}"

_CONNECTION = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""What libpq is told, so that a server that has vanished is noticed within half a minute."""

_SESSION = "-c lock_timeout=30s -c idle_in_transaction_session_timeout=30s"
"""As long as SQLite waits for a lock; and the locks of a learner that was stopped within a transaction are let go."""

_CREATING = 7_462_137_001
"""The advisory lock under which tables are made, so that two learners that start at once do not both make them."""


class StoreUrl(str):
    """A database's URL that names its password to a driver, and shows it to nobody: not as text, not in a message."""

    def __repr__(self) -> str:
        return repr(masked(self))

    def __str__(self) -> str:
        return masked(self)

    def __format__(self, spec: str) -> str:
        return format(masked(self), spec)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls._checked,
            core_schema.str_schema(min_length=1),
            serialization=core_schema.plain_serializer_function_ser_schema(masked, when_used="json"),
        )

    @classmethod
    def _checked(cls, text: str) -> Self:
        try:
            parsed(text)
        except Misconfigured as error:
            raise PydanticCustomError("store", "{why}", {"why": str(error)}) from None
        return cls(text)


def masked(url: str) -> str:
    """The URL without its passwords, also where it is no good URL."""
    shown = re.sub(r"(://[^:@/?]*):.*@", r"\1:***@", url[:], flags=re.DOTALL)
    return re.sub(r"([?&](?:ssl)?password=)[^&]*", r"\1***", shown)


def parsed(url: str) -> sa.URL:
    """The URL's parts.

    Raises:
        Misconfigured: not the URL of a database that is known here; its password is not shown.
    """
    try:
        found = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise Misconfigured(f"{masked(url)!r} is not an SQLAlchemy URL, such as sqlite:///learner.db") from None
    if found.get_backend_name() not in _INSERTS:
        raise Misconfigured(f"{found.drivername!r} is not among the databases that a store can lie in: {_KNOWN}")
    return found.set(drivername=_POSTGRES) if found.get_backend_name() == "postgresql" else found


def connect(url: str) -> sa.Engine:
    """An engine whose transactions are what they say, with foreign quirks of SQLite switched off.

    On PostgreSQL a transaction that writes sees what was committed before each of its statements (READ COMMITTED), and
    begins by locking the owner's row, so that one writes after the other; a read is one snapshot. What the URL says of
    a connection wins over what is said here.

    Raises:
        Misconfigured: as `parsed`.
    """
    where = parsed(url)
    arguments: dict[str, Any] = {}
    if where.drivername == _POSTGRES:
        arguments = {name: value for name, value in _CONNECTION.items() if name not in where.query}
        arguments["options"] = f"{_SESSION} {where.query.get('options', '')}".strip()
    engine = sa.create_engine(where, connect_args=arguments)
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


def create(connection: sa.Connection) -> None:
    """Make the tables that are missing."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATING)))
        encoding = connection.scalar(sa.text("SHOW server_encoding"))
        if encoding != "UTF8":
            raise Misconfigured(f"the learner's database has the encoding {encoding}; create it with UTF8")
    METADATA.create_all(connection)


def analyze(connection: sa.Connection) -> None:
    """Have PostgreSQL count what its tables hold now.

    It does so by itself, a minute or more after they have grown; until then it takes a lookup of a thousand events
    for one of half the table, and reads all of it.
    """
    connection.exec_driver_sql(f"ANALYZE {', '.join(table.name for table in METADATA.sorted_tables)}")


def clock(connection: sa.Connection) -> int:
    """The time by the clock that all learners of this database share, in microseconds."""
    if connection.dialect.name == "postgresql":
        return int(connection.scalar(sa.text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")) or 0)
    return time.time_ns() // 1_000


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
    statement, names, processors = _insert(connection.dialect, table, tuple(rows[0]), update, combine)
    take = itemgetter(*names) if len(names) > 1 else lambda row: (row[names[0]],)
    values = [take(row) for row in rows]
    if processors:
        columns: list[Iterable[Any]] = list(zip(*values, strict=True))
        for place, process in processors:
            columns[place] = map(process, columns[place])
        values = list(zip(*columns, strict=True))
    # Past SQLAlchemy's own way from a row to a driver's, which costs as much as the database itself.
    connection.exec_driver_sql(statement, values)


_Process = Callable[[Any], Any]
_Insert = tuple[str, tuple[str, ...], tuple[tuple[int, _Process], ...]]


def _insert(
    dialect: sa.Dialect,
    table: sa.Table,
    given: tuple[str, ...],
    update: Iterable[str] | None,
    combine: Mapping[str, Any] | None,
) -> _Insert:
    """The statement in the driver's own words, the columns in its order, and what some of them go through."""
    changed = None if update is None else tuple(update)
    key = (dialect.name, table.name, given, changed, tuple(combine or ()))
    if key in _COMPILED:
        return _COMPILED[key]
    statement = _INSERTS[dialect.name](table).values({name: sa.bindparam(name) for name in given}).inline()
    keys = [column.name for column in table.primary_key]
    changes = {
        name: statement.excluded[name]
        for name in ([name for name in given if name not in keys] if changed is None else changed)
    }
    for name, combined in (combine or {}).items():
        changes[name] = combined(table.c[name], statement.excluded[name])
    if changes:
        statement = statement.on_conflict_do_update(index_elements=keys, set_=changes)
    else:
        statement = statement.on_conflict_do_nothing()
    # Parameters by their places, which both drivers take.
    made_for: Any = type(dialect)
    compiled: Any = statement.compile(
        dialect=made_for(paramstyle="format" if dialect.name == "postgresql" else "qmark")
    )
    names = tuple(compiled.positiontup)
    types = [table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names]
    made = str(compiled), names, tuple((place, process) for place, process in enumerate(types) if process is not None)
    _COMPILED[key] = made
    return made


_COMPILED: dict[tuple[Any, ...], _Insert] = {}


def among(connection: sa.Connection, column: sa.Column[Any], values: Collection[Any]) -> sa.ColumnElement[bool]:
    """Whether the column has one of `values`: one parameter for all of them, however many there are."""
    if connection.dialect.name == "postgresql":
        return column == sa.any_(sa.bindparam(None, list(values), type_=postgresql.ARRAY(column.type)))
    listed = sa.func.json_each(json.dumps(list(values))).table_valued("value")
    return column.in_(sa.select(listed.c.value))
