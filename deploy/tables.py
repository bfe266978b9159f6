"""Files that people have already, as messages and back: CSV, JSON lines and Parquet, one row at a time.

A row of a text stream is an event, and where it names a class, a label too. Of a telemetry stream a row is one time
step: rows that follow one another under one event id are a window; where the file has no such column, every
`window` rows are one, labelled as its last row is.

An event without an id is named by its content, so that a file that is published again brings no new events.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stream.errors import Misconfigured
from stream.events import MAX_MESSAGE_BYTES, Event, Label, Report, StreamRules, Telemetry

KINDS_OF_FILE = {".csv": "csv", ".tsv": "csv", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
NAMES: Mapping[str, tuple[str, ...]] = {
    "event_id": ("event_id", "eventid", "event", "id", "uuid"),
    "text": ("text", "report", "message", "utterance", "sentence", "description", "body", "title"),
    "label": ("label", "class", "category", "target", "intent", "subject"),
    "observed_at": ("observed_at", "timestamp", "time", "datetime", "date", "created_at"),
    "source": ("source", "sensor", "device"),
    "labeller": ("labeller", "labeler", "annotator"),
    "labelled_at": ("labelled_at", "labeled_at"),
    "confidence": ("confidence",),
    "withdrawn": ("withdrawn",),
}
"""Columns that are recognised by their names, in any case; the first that is there counts."""

_TRUE, _FALSE = frozenset({"true", "yes", "1"}), frozenset({"false", "no", "0", ""})


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file.

    Args:
        number: its line; in Parquet its number, from 1 on.
        values: by column.
        why: why it cannot be read; empty for one that can.
    """

    number: int
    values: Mapping[str, Any]
    why: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one row, or the rows of one window, came to.

    Args:
        number: of the first row.
        event: None where the rows make none.
        label: None where none was given.
        why: what is wrong, in a sentence; empty where nothing is.
    """

    number: int
    event: Event | None = None
    label: Label | None = None
    why: str = ""


class BadCell(ValueError):
    """A cell cannot be used; the message begins with its column."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, by the ending of its name.

    Raises:
        Misconfigured: there is no such file, it has no header, or it is none of the kinds.
    """
    kind = KINDS_OF_FILE.get(path.suffix.lower())
    if kind is None:
        raise Misconfigured(f"{path}: the name must end in one of {', '.join(KINDS_OF_FILE)}")
    if not path.is_file():
        raise Misconfigured(f"there is no file {path}")
    try:
        yield from {"csv": _csv, "lines": _lines, "parquet": _parquet}[kind](path)
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from None


def columns_of(path: Path) -> list[str]:
    """The columns that a file has: of its header, or of its first hundred rows.

    Raises:
        Misconfigured: as `read_rows`, or the file has no rows.
    """
    found: dict[str, None] = {}
    for count, row in enumerate(read_rows(path)):
        found |= dict.fromkeys(row.values)
        if count == 100:
            break
    if not found:
        raise Misconfigured(f"{path} has no rows that can be read")
    return list(found)


def match_columns(columns: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Which column holds what: as given, else by its name.

    Args:
        columns: of the file.
        given: columns by what they hold, such as `{"text": "Body of the mail"}`.

    Raises:
        Misconfigured: something was given that is not there.
    """
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise Misconfigured(f"--column {unknown[0]}=...: columns hold {', '.join(NAMES)}")
    missing = sorted(set(given.values()) - set(columns))
    if missing:
        raise Misconfigured(f"there is no column {missing[0]!r}; there are: {', '.join(map(repr, columns))}")
    found = dict(given)
    for what, names in NAMES.items():
        free = {column.strip().lower(): column for column in reversed(columns) if column not in found.values()}
        name = next((free[name] for name in names if name in free), None)
        if what not in found and name is not None:
            found[what] = name
    return found


def read_events(
    rows: Iterable[Row], rules: StreamRules, columns: Mapping[str, str], now: datetime, window: int = 64
) -> Iterator[Entry]:
    """The events of a stream, with the labels that stand beside them.

    Args:
        rows: of a file.
        rules: of the stream.
        columns: see `match_columns`.
        now: for events and labels whose time is not in the file.
        window: rows of a telemetry event where no column names its event.

    Raises:
        Misconfigured: the file has no column that the stream needs.
    """
    if rules.kind == "text" and "text" not in columns:
        raise Misconfigured(
            "no column is called text: name it with --column text=NAME; messages as they are on the wire take --topic"
        )
    seen: Counter[str] = Counter()
    for numbers, group in _grouped(rows, rules, columns, window):
        bad = next((row for row in group if row.why), None)
        if bad is not None:
            yield Entry(bad.number, why=bad.why)
            continue
        try:
            event = (_report if rules.kind == "text" else _telemetry)(group, rules, columns, now, seen)
            label = _label(group[-1], rules.name, event.event_id, columns, now)
        except BadCell as wrong:
            yield Entry(numbers, why=str(wrong))
        except ValidationError as error:
            yield Entry(numbers, why=_first(error))
        else:
            yield Entry(numbers, event, label)


def read_labels(rows: Iterable[Row], stream: str, columns: Mapping[str, str], now: datetime) -> Iterator[Entry]:
    """The labels of a file, for events that were published before.

    Names are taken as they stand, blanks at their ends too: they must be those of the store. Only a column `withdrawn`
    withdraws: an empty class is refused, for in a half-filled sheet it means that nobody has looked yet.

    Args:
        rows: of a file.
        columns: see `match_columns`.
        now: for labels whose time is not in the file.

    Raises:
        Misconfigured: the file names no events or no classes.
    """
    for what in ("event_id", "label"):
        if what not in columns:
            raise Misconfigured(f"no column is called {what}: name it with --column {what}=NAME")
    for row in rows:
        try:
            if row.why:
                yield Entry(row.number, why=row.why)
                continue
            yield Entry(row.number, label=_late_label(row, stream, columns, now))
        except BadCell as wrong:
            yield Entry(row.number, why=str(wrong))
        except ValidationError as error:
            yield Entry(row.number, why=_first(error))


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a file by the ending of its name, whole or not at all; returns the number of rows.

    Args:
        columns: their names, in order; every value is text, a number, a truth value or None.

    Raises:
        Misconfigured: the name is of none of the kinds.
    """
    kind = KINDS_OF_FILE.get(path.suffix.lower())
    if kind is None:
        raise Misconfigured(f"{path}: the name must end in one of {', '.join(KINDS_OF_FILE)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".building-{path.name}")
    try:
        count = {"csv": _write_csv, "lines": _write_lines, "parquet": _write_parquet}[kind](building, columns, rows)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)
    return count


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_MESSAGE_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        mark = max(",;\t|", key=lambda mark: len(next(csv.reader([header], delimiter=mark), ())))
        file.seek(0)
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else mark)
        try:
            names = next(reader, [])
        except csv.Error as error:
            raise Misconfigured(f"{path}: the header cannot be read: {error}") from None
        if not any(name.strip() for name in names):
            raise Misconfigured(f"{path} has no header: its first line must name the columns")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise Misconfigured(f"{path}: the column {twice[0]!r} is there twice")
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Row(number, {}, str(error))
                continue
            if cells is None:
                return
            if not cells:
                continue
            wrong = "" if len(cells) == len(names) else f"{len(cells)} cells for {len(names)} columns"
            yield Row(number, dict(zip(names, cells, strict=False)), wrong)


def _lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            yield Row(number, found) if isinstance(found, dict) else Row(number, {}, "no JSON object")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1_000):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)
    except pa.ArrowException as error:
        raise Misconfigured(f"{path} cannot be read as Parquet: {error}") from None


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        # Both ends of a line are named, so that a carriage return within a cell is quoted as well.
        writer = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", lineterminator="\r\n")
        writer.writerow(columns)
        for count, row in enumerate(rows, 1):  # noqa: B007
            writer.writerow(["" if row[name] is None else row[name] for name in columns])
    return count


def _write_lines(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n")
    return count


def _write_parquet(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"confidence": pa.float64(), "withdrawn": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        for part in _parts(rows, 10_000):
            count += len(part)
            writer.write_table(pa.Table.from_pylist([dict(row) for row in part], schema=schema))
    return count


def _parts(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    part: list[Mapping[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _grouped(
    rows: Iterable[Row], rules: StreamRules, columns: Mapping[str, str], window: int
) -> Iterator[tuple[int, list[Row]]]:
    """The rows of each event, and the number of the first; no more than one row beyond an event's bound is held."""
    if rules.kind == "text":
        yield from ((row.number, [row]) for row in rows)
        return
    name = columns.get("event_id")
    numbered = enumerate(rows)
    groups = groupby(numbered, lambda pair: pair[1].values.get(name) if name else pair[0] // window)
    for _, pairs in groups:
        group = [row for count, (_, row) in enumerate(pairs) if count <= rules.max_steps]
        if len(group) > rules.max_steps:
            first = group[0].number
            yield first, [Row(first, {}, f"more than {rules.max_steps} rows are of one event")]
        else:
            yield group[0].number, group


def _report(
    group: Sequence[Row], rules: StreamRules, columns: Mapping[str, str], now: datetime, seen: Counter[str]
) -> Event:
    (row,) = group
    text, at = _text(row, columns, "text"), _text(row, columns, "observed_at")
    if not text:
        raise BadCell(f"{columns['text']}: is empty")
    return Report(
        event_id=_text(row, columns, "event_id") or _named((rules.name, at, text), seen),
        stream=rules.name,
        source=_text(row, columns, "source"),
        observed_at=_time(row, columns, "observed_at") or now,
        text=text,
    )


def _telemetry(
    group: Sequence[Row], rules: StreamRules, columns: Mapping[str, str], now: datetime, seen: Counter[str]
) -> Event:
    first = group[0]
    channels = [channel for channel in rules.channels if channel in first.values]
    values = [[_number(row, channel) for row in group] for channel in channels]
    at = _text(first, columns, "observed_at")
    return Telemetry(
        event_id=_text(first, columns, "event_id") or _named((rules.name, at, repr(values)), seen),
        stream=rules.name,
        source=_text(first, columns, "source"),
        observed_at=_time(first, columns, "observed_at") or now,
        channels=channels,
        values=values,
    )


def _label(row: Row, stream: str, event_id: str, columns: Mapping[str, str], now: datetime) -> Label | None:
    name = _text(row, columns, "label")
    if not name:
        return None
    return Label(
        event_id=event_id,
        stream=stream,
        label=name,
        labeller=_text(row, columns, "labeller") or "default",
        labelled_at=_time(row, columns, "labelled_at") or now,
        confidence=_number(row, columns["confidence"]) if "confidence" in columns else None,
    )


def _late_label(row: Row, stream: str, columns: Mapping[str, str], now: datetime) -> Label:
    event_id, name = _verbatim(row, columns, "event_id"), _verbatim(row, columns, "label")
    withdrawn = _flag(row, columns["withdrawn"]) if "withdrawn" in columns else False
    if not event_id:
        raise BadCell(f"{columns['event_id']}: is empty")
    if not name and not withdrawn:
        raise BadCell(f"{columns['label']}: is empty")
    if name and withdrawn:
        raise BadCell(f"{columns['withdrawn']}: is true beside a class")
    return Label(
        event_id=event_id,
        stream=stream,
        label=name or None,
        labeller=_verbatim(row, columns, "labeller") or "default",
        labelled_at=_time(row, columns, "labelled_at") or now,
        confidence=_number(row, columns["confidence"]) if "confidence" in columns else None,
    )


def _text(row: Row, columns: Mapping[str, str], what: str) -> str:
    """A cell as text, without blanks around it; empty where it is not there."""
    return _verbatim(row, columns, what).strip()


def _verbatim(row: Row, columns: Mapping[str, str], what: str) -> str:
    """A cell as text; empty where it is not there, or holds nothing but blanks."""
    found = row.values.get(columns[what]) if what in columns else None
    if found is None or (isinstance(found, float) and math.isnan(found)):
        return ""
    if isinstance(found, datetime):
        return found.isoformat()
    if isinstance(found, dict | list | bytes):
        raise BadCell(f"{columns[what]}: {type(found).__name__} where text is wanted")
    text = str(found)
    return text if text.strip() else ""


def _flag(row: Row, column: str) -> bool:
    """A cell as a truth value; empty is false."""
    found = row.values.get(column)
    word = "" if found is None else str(found).strip().lower()
    if word not in _TRUE | _FALSE:
        raise BadCell(f"{column}: {word[:40]!r} is neither true nor false")
    return word in _TRUE


def _time(row: Row, columns: Mapping[str, str], what: str) -> datetime | None:
    """A cell as a time; one without a zone is in UTC."""
    text = _text(row, columns, what)
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise BadCell(f"{columns[what]}: {text[:40]!r} is no time such as 2026-03-01T08:00:00Z") from None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _number(row: Row, column: str) -> float | None:
    found = row.values.get(column)
    if found is None or (isinstance(found, str) and not found.strip()):
        return None
    try:
        value = float(found)
    except (TypeError, ValueError):
        raise BadCell(f"{column}: {str(found)[:40]!r} is no number") from None
    if math.isinf(value):
        raise BadCell(f"{column}: an infinite value is not taken")
    return None if math.isnan(value) else value


def _named(content: Sequence[str], seen: Counter[str]) -> str:
    """A name made of the content; the second event of the same content is another event."""
    name = sha256("\0".join(content).encode()).hexdigest()[:16]
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}-{seen[name]}"


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
