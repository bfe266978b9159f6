"""Examples from anyone's files: CSV, JSON lines (plain or gzip), Parquet; errors name the file, row and column.

What a stream would refuse is refused here, in the same words where there are any; what can be read but not
used (no label, no text, no numbers) is left out and counted in `Examples.notes`, never in silence.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from learner.encoders import Payload
from replay.store import pack
from stream.errors import DeadLetter
from stream.events import StreamRules, class_name

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "nil", "?", "-"})
"""How files write that a number is not there, in lower case."""
HELD_OUT = 5
"""Where there is no test file, one example in so many of each class is held out."""
MAX_CHARACTERS = StreamRules("", "text").max_text_characters

Row = Mapping[str, Any]


class Unusable(Exception):
    """The files cannot be used as they are; the message says where and why."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled events in the order of the stream.

    Args:
        kind: of the payloads.
        payloads: texts, or windows float32 (channels, steps) with NaN where a value is missing.
        labels: one each.
        channels: names of a window's rows; none for texts.
        commands: those of them that say what was done, as a stream's settings name them.
        groups: which experience each belongs to, where the data says so; else empty.
        due: before which event (by position) each label becomes known, where the data says so; else empty.
        notes: what was left out or changed in reading, a sentence each.
    """

    kind: Literal["text", "telemetry"]
    payloads: Sequence[Payload]
    labels: Sequence[str]
    channels: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    groups: Sequence[str] = ()
    due: Sequence[int] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[str]:
        """The classes there are, sorted."""
        return sorted(set(self.labels))

    @property
    def steps(self) -> int:
        """The usual number of time steps of a window; 1 for texts."""
        lengths = sorted(payload.shape[1] for payload in self.payloads if not isinstance(payload, str))
        return lengths[len(lengths) // 2] if lengths else 1

    @property
    def digest(self) -> str:
        """sha256 over all that a result can depend on."""
        described = (self.kind, self.channels, *([self.commands] if self.commands else ()))
        digest = sha256(repr(described).encode())
        for values in (self.labels, self.groups, self.due):
            digest.update(json.dumps(list(values)).encode())
        for payload in self.payloads:
            content = pack(payload)
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()

    def take(self, positions: Sequence[int]) -> Examples:
        """Only these, in this order; what is due by position is lost."""
        return replace(
            self,
            payloads=[self.payloads[p] for p in positions],
            labels=[self.labels[p] for p in positions],
            groups=[self.groups[p] for p in positions] if self.groups else (),
            due=(),
        )


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. Either `text` or `features` is given.

    Args:
        text: of the text.
        features: of the numbers, one channel each; `*` alone stands for every column that is nothing else.
        label: of the class.
        time: what the rows are put in order by; None leaves them as they are.
        experience: whose values, in order of appearance, are the experiences.
    """

    label: str
    text: str | None = None
    features: tuple[str, ...] = ()
    time: str | None = None
    experience: str | None = None


def read(path: Path, columns: Columns) -> Examples:
    """Read one file.

    Raises:
        Unusable: it cannot be read, lacks a column, or a row holds what cannot be.
    """
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise Unusable(f"{path} has no rows")
    names = list(first[1])
    features = _features(columns, names, path)
    wanted = [columns.label, columns.text, columns.time, columns.experience, *features]
    for name in wanted:
        if name is not None and name not in names:
            raise Unusable(f"{path} has no column {name!r}; it has {', '.join(map(repr, names[:30]))}")
    payloads: list[Payload] = []
    labels: list[str] = []
    times: list[float] = []
    groups: list[str] = []
    left: Counter[str] = Counter()

    def all_rows() -> Iterator[tuple[str, Row]]:
        yield first
        yield from rows

    for where, row in all_rows():
        label = _label(row.get(columns.label), f"{path}, {where}, column {columns.label!r}")
        if label is None:
            left["rows without a label are left out"] += 1
            continue
        payload = (
            _text(row.get(columns.text), left)
            if columns.text is not None
            else _numbers(row, features, f"{path}, {where}", left)
        )
        if payload is None:
            left[f"rows without {'a text' if columns.text is not None else 'any number'} are left out"] += 1
            continue
        if columns.time is not None:
            times.append(_time(row.get(columns.time), f"{path}, {where}, column {columns.time!r}"))
        if columns.experience is not None:
            groups.append(str(row.get(columns.experience)))
        payloads.append(payload)
        labels.append(label)
    if not labels:
        raise Unusable(f"{path} has no row with a label and something to learn it from")
    order = sorted(range(len(labels)), key=times.__getitem__) if times else range(len(labels))
    found = Examples(
        kind="text" if columns.text is not None else "telemetry",
        payloads=[payloads[p] for p in order],
        labels=[labels[p] for p in order],
        channels=features,
        groups=[groups[p] for p in order] if groups else (),
        notes=tuple(f"{path.name}: {count:,} {what}" for what, count in sorted(left.items())),
    )
    if times and columns.experience is None and list(order) != list(range(len(labels))):
        return replace(found, notes=(*found.notes, f"{path.name}: rows put in order by {columns.time!r}"))
    return found


def hold_out(examples: Examples, seed: int = 0) -> tuple[Examples, Examples]:
    """A train and a test part where there is only one file: one in five of each class, and no class's only example."""
    chance = random.Random(f"held out/{seed}")
    places: dict[str, list[int]] = {}
    for place, label in enumerate(examples.labels):
        places.setdefault(label, []).append(place)
    out: set[int] = set()
    for name in sorted(places):
        members = places[name]
        if len(members) > 1:
            out.update(chance.sample(members, max(1, len(members) // HELD_OUT)))
    note = f"no test file: one example in {HELD_OUT} of each class ({len(out):,} in all) is held out and never learned"
    train = examples.take([p for p in range(len(examples)) if p not in out])
    return replace(train, notes=(*examples.notes, note)), examples.take(sorted(out))


def _features(columns: Columns, names: Sequence[str], path: Path) -> tuple[str, ...]:
    if columns.text is not None:
        return ()
    found: list[str] = []
    for given in columns.features:
        if given == "*":
            others = {columns.label, columns.time, columns.experience}
            found += [name for name in names if name not in others]
        elif given in names:
            found.append(given)
        else:
            found += [part.strip() for part in given.split(",") if part.strip()]
    if not found:
        raise Unusable(f"{path}: no feature column is named")
    twice = sorted(name for name, count in Counter(found).items() if count > 1)
    if twice:
        raise Unusable(f"{path}: feature column {twice[0]!r} is named twice")
    if columns.label in found:
        raise Unusable(f"{path}: {columns.label!r} is the label, it cannot be a feature as well")
    return tuple(found)


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Every row, with the place that an error names."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}") from None
    if start == b"PAR1":
        return _parquet_rows(path)
    name = path.name.removesuffix(".gz").lower()
    opened = gzip.open(path, "rb") if start[:2] == b"\x1f\x8b" else path.open("rb")  # noqa: SIM115 - closed with the text
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")  # type: ignore[type-var]
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return _json_rows(path, text)
    return _csv_rows(path, text, "\t" if name.endswith((".tsv", ".tab")) else None)


def _json_rows(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, Row]]:
    with text:
        for number, line in enumerate(_decoded(path, text), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise Unusable(f"{path}, line {number}: not a JSON object a line: {error}") from None
            if not isinstance(row, dict):
                raise Unusable(f"{path}, line {number}: a JSON object is expected, found {type(row).__name__}")
            yield f"line {number}", row


def _csv_rows(path: Path, text: io.TextIOWrapper, delimiter: str | None) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(100_000_000)
    with text:
        lines = _decoded(path, text)
        header = next(lines, "")
        if delimiter is None:
            delimiter = max(",;\t|", key=header.count)
        reader = csv.reader(_chain(header, lines), delimiter=delimiter)
        try:
            names = [name.strip() for name in next(reader, [])]
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            if twice:
                raise Unusable(f"{path} has two columns named {twice[0]!r}")
            for number, values in enumerate(reader, start=1):
                if not values:
                    continue
                if len(values) != len(names):
                    raise Unusable(
                        f"{path}, row {number} (line {reader.line_num}): {len(values)} values for {len(names)} columns"
                    )
                yield f"row {number} (line {reader.line_num})", dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise Unusable(f"{path}, line {reader.line_num}: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(10_000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise Unusable(f"{path} cannot be read as Parquet: {error}") from None


def _decoded(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    try:
        yield from text
    except UnicodeDecodeError as error:
        raise Unusable(f"{path} is not UTF-8 text: {error.reason}") from None
    except (OSError, EOFError) as error:
        raise Unusable(f"{path} cannot be read to its end: {error}") from None


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _label(value: Any, where: str) -> str | None:
    """The class as the stream would know it; None where there is none. 3.0 and 3 are one class."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if not text or text.lower() in ("nan", "null"):
        return None
    if re.fullmatch(r"-?\d+\.0+", text):
        text = text.partition(".")[0]
    try:
        return class_name(text)
    except DeadLetter as refusal:
        raise Unusable(f"{where}: {refusal.detail}") from None


def _text(value: Any, left: Counter[str]) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = str(value)
    if not text.strip():
        return None
    if len(text) > MAX_CHARACTERS:
        left[f"texts are cut to the {MAX_CHARACTERS:,} characters that a stream takes"] += 1
        return text[:MAX_CHARACTERS]
    return text


def _numbers(row: Row, features: Sequence[str], where: str, left: Counter[str]) -> Payload | None:
    window = np.array([[_number(row.get(name), f"{where}, column {name!r}", left)] for name in features], np.float32)
    return None if np.isnan(window).all() else window


def _number(value: Any, where: str, left: Counter[str]) -> float:
    if value is None:
        return math.nan
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in MISSING:
            return math.nan
        if text.lower() in ("true", "false"):
            return float(text.lower() == "true")
        value = text
    elif isinstance(value, datetime):
        raise Unusable(f"{where}: a number is expected, found the time {value}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Unusable(f"{where}: a number is expected, found {str(value)[:40]!r}") from None
    if math.isinf(number):
        left["infinite values count as missing"] += 1
        return math.nan
    limit = float(np.finfo(np.float32).max)
    return max(-limit, min(limit, number))


def _time(value: Any, where: str) -> float:
    """A place on one time line: numbers as they are, dates as seconds since 1970; no zone is UTC."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if value is not None and not isinstance(value, str):
        number = float(value) if not hasattr(value, "toordinal") else float(value.toordinal()) * 86_400
        if math.isfinite(number):
            return number
    text = str(value).strip()
    readers: tuple[Callable[[str], float], ...] = (
        float,
        lambda t: _time(datetime.fromisoformat(t), where),
        lambda t: _time(datetime.strptime(t, "%d/%m/%Y").replace(tzinfo=UTC), where),
        lambda t: _time(datetime.strptime(t, "%m/%d/%Y").replace(tzinfo=UTC), where),
    )
    for reader in readers:
        try:
            number = reader(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    raise Unusable(f"{where}: a time is expected (RFC 3339, or a number), found {text[:40]!r}")
