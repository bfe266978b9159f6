"""What is kept of an example once it is gone: no content, and no id that could be read back.

- *Which runs trained on it*, in 4 bytes an example and run: `trained_on` holds, for each run, 32 bits of a
  hash of every event id. One is never missed; one that the run did not see is taken for one of its 2,000 in
  one case of two million. Unlearning an example takes its 4 bytes out, so that what is missing from a run's
  size is what its versions can no longer be made again without.
- *That it was forgotten* (`forgotten`): a hash of stream and event id, so that a label which comes later, or
  a message that is read again, does not bring it back. Kept for good, some 60 bytes each.
- *That its label can no longer be changed* (`settled`): 63 bits of such a hash for each example that left at the
  end of the ledger's retention while a head still holds its share. Kept as long again.

Every function works within the transaction of the connection it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from replay import schema as t
from replay.policy import draw
from replay.schema import among, put
from stream.join import EventKey

_MARK = "<u4"


def digest(stream: str, event_id: str) -> str:
    """The tombstone of an event: 128 bits of blake2b, in hexadecimal."""
    return blake2b(f"forgotten\x00{stream}\x00{event_id}".encode(), digest_size=16).hexdigest()


def note_training(connection: sa.Connection, stream: str, run: int, event_ids: Collection[str]) -> None:
    """Remember that a run trains on these."""
    marks = _marks(stream, event_ids)
    put(connection, t.trained_on, [{"run": run, "stream": stream, "size": len(marks), "marks": marks.tobytes()}])


def drop_training(connection: sa.Connection, run: int) -> None:
    """The run came to nothing: where no version has its weights, it trained on nothing."""
    kept = sa.exists().where(t.versions.c.run == t.trained_on.c.run)
    connection.execute(sa.delete(t.trained_on).where(t.trained_on.c.run == run, ~kept))


def trained(connection: sa.Connection, stream: str, event_id: str) -> set[int]:
    """The runs that trained on this example, as it is learned now."""
    c, mark = t.trained_on.c, _marks(stream, [event_id])
    rows = connection.execute(sa.select(c.run, c.marks).where(c.stream == stream))
    return {row.run for row in rows if np.isin(mark, np.frombuffer(row.marks, _MARK)).any()}


def training(
    connection: sa.Connection, run: int
) -> tuple[int, Callable[[str, Collection[str]], npt.NDArray[np.bool_]]]:
    """How many examples a run trained on, and which of some it did, as they are learned now."""
    c = t.trained_on.c
    row = connection.execute(sa.select(c.size, c.marks).where(c.run == run)).first()
    marks = np.frombuffer(b"" if row is None else row.marks, _MARK)

    def marked(stream: str, event_ids: Collection[str]) -> npt.NDArray[np.bool_]:
        return np.isin(np.array([_mark(stream, event_id) for event_id in event_ids], dtype=_MARK), marks)

    return 0 if row is None else row.size, marked


def lost_by(connection: sa.Connection, stream: str, run: int | None, parent: int | None) -> int:
    """How many of the examples that a new version of this run and parent was trained on are gone by now."""
    c = t.trained_on.c
    row = connection.execute(sa.select(c.size, c.marks).where(c.run == run)).first()
    own: int = 0 if row is None else row.size - len(row.marks) // 4
    v = t.versions.c
    detail = connection.scalar(sa.select(v.detail).where(v.stream == stream, v.number == parent)) or {}
    return own + int(detail.get("forgotten", 0))


def unlearn(connection: sa.Connection, stream: str, event_ids: Collection[str]) -> dict[int, int]:
    """These examples are gone, or have another label: mark every version whose weights saw them.

    A version saw what its own run trained on and what its ancestors did. An example counts once, at the first
    unlearning after it was trained on.

    Returns:
        By version that is marked now, how many examples it has lost in all.
    """
    wanted = np.unique(_marks(stream, event_ids))
    c = t.trained_on.c
    lost: dict[int, frozenset[int]] = {}
    for run, packed in connection.execute(sa.select(c.run, c.marks).where(c.stream == stream)).all():
        marks = np.frombuffer(packed, _MARK)
        gone = np.isin(marks, wanted)
        if gone.any():
            lost[run] = frozenset(marks[gone].tolist())
            connection.execute(sa.update(t.trained_on).where(c.run == run).values(marks=marks[~gone].tobytes()))
    if not lost:
        return {}
    v = t.versions.c
    seen: dict[int, frozenset[int]] = {}
    totals: dict[int, int] = {}
    query = sa.select(v.number, v.parent, v.run, v.detail).where(v.stream == stream).order_by(v.number)
    for row in connection.execute(query).all():
        seen[row.number] = lost.get(row.run, frozenset()) | seen.get(row.parent, frozenset())
        if seen[row.number]:
            totals[row.number] = row.detail.get("forgotten", 0) + len(seen[row.number])
            detail = {**row.detail, "forgotten": totals[row.number]}
            connection.execute(
                sa.update(t.versions).where(v.stream == stream, v.number == row.number).values(detail=detail)
            )
    return totals


def bury(connection: sa.Connection, stream: str, event_ids: Iterable[str], now: int) -> None:
    """From now on these events are never learned again; the first burial's time stays."""
    rows = [{"stream": stream, "digest": digest(stream, event_id), "at": now} for event_id in sorted(event_ids)]
    put(connection, t.forgotten, rows, update=())


def buried(connection: sa.Connection, keys: Iterable[EventKey]) -> dict[EventKey, int]:
    """Which of these events were forgotten, and when (microseconds)."""
    c = t.forgotten.c
    return _found(connection, c.digest, c.at, digest, keys)


def settle(connection: sa.Connection, taught: Mapping[EventKey, bool], now: int) -> None:
    """These examples leave for good; `taught` where a head holds their share and will go on holding it."""
    rows = [
        {"stream": stream, "mark": _settled(stream, event_id), "taught": held, "at": now}
        for (stream, event_id), held in taught.items()
    ]
    put(connection, t.settled, rows)


def settled(connection: sa.Connection, keys: Iterable[EventKey]) -> dict[EventKey, bool]:
    """Which of these events are settled, and whether a head still holds their share."""
    c = t.settled.c
    return _found(connection, c.mark, c.taught, _settled, keys)


def _found(
    connection: sa.Connection,
    column: sa.Column[Any],
    value: sa.Column[Any],
    mark: Callable[[str, str], Any],
    keys: Iterable[EventKey],
) -> dict[EventKey, Any]:
    table = column.table
    # These tables are empty in most installations, and are asked at every batch.
    if connection.scalar(sa.select(sa.literal(1)).select_from(table).limit(1)) is None:
        return {}
    streams: dict[str, dict[Any, EventKey]] = {}
    for key in keys:
        streams.setdefault(key[0], {})[mark(*key)] = key
    found: dict[EventKey, Any] = {}
    for stream, owners in streams.items():
        query = sa.select(column, value).where(table.c.stream == stream, among(connection, column, sorted(owners)))
        found.update({owners[one]: held for one, held in connection.execute(query)})
    return found


def _marks(stream: str, event_ids: Iterable[str]) -> npt.NDArray[np.uint32]:
    return np.sort(np.array([_mark(stream, event_id) for event_id in event_ids], dtype=_MARK))


def _mark(stream: str, event_id: str) -> int:
    return draw(f"trained\x00{stream}\x00{event_id}") & 0xFFFFFFFF


def _settled(stream: str, event_id: str) -> int:
    return draw(f"settled\x00{stream}\x00{event_id}")
