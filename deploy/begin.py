"""The first settings: written for a stream and an example file, and checked against that file.

Pure but for reading the example file: what is found comes back, and the command says it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from deploy.messages import BadLine
from deploy.settings import InvalidSettings, Settings, TelemetryStream, load_settings, rules
from deploy.tables import NAMES, Entry, Row, columns_of, match_columns, read_events, read_rows
from stream.errors import DeadLetter
from stream.events import Decoder, Record, encode, utc_now
from stream.kafka import KafkaSettings

Kind = Literal["text", "telemetry"]

LOOKED_AT = 1_000
"""Rows by which a column is taken to hold numbers or not."""
TEXT_WORDS = 2.0
"""Mean number of words from which a column is prose rather than a code or a name."""
JUDGED_FROM = 10
"""Labels from which a class gives examples to the exam (see `replay.store`)."""


@dataclass(frozen=True)
class Wish:
    """What the settings are to be written for.

    Args:
        stream: its name on the wire.
        topic: of its own for its events, without the prefix; None for the usual one.
        prefix: put before every topic.
        channels: of a telemetry stream.
        classes: that are known to come; more than a day may bring by default raise that bound.
    """

    kind: Kind
    stream: str
    bootstrap: str = KafkaSettings().bootstrap_servers
    topic: str | None = None
    prefix: str = ""
    channels: tuple[str, ...] = ()
    classes: int = 0


@dataclass
class Checked:
    """What the example file holds, by the settings that were written.

    Args:
        events: that would be published.
        classes: labels by class.
        bad: rows that would be held back.
        columns: which column holds what.
    """

    columns: Mapping[str, str]
    events: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    bad: list[BadLine] = field(default_factory=list)

    @property
    def few(self) -> list[str]:
        """Classes that no exam judges yet, by name."""
        return sorted(name for name, count in self.classes.items() if count < JUDGED_FROM)


@dataclass(frozen=True)
class Guess:
    """What a file looks like.

    Args:
        columns: which column holds what.
        channels: columns of numbers.
    """

    kind: Kind
    stream: str
    columns: Mapping[str, str]
    channels: tuple[str, ...]


def guess(path: Path, given: Mapping[str, str]) -> Guess:
    """What a file looks like: text where a column is called so or holds prose, else windows of numbers.

    Raises:
        Misconfigured: it cannot be read, or lacks a column that was given.
    """
    rows: list[Row] = []
    for row in read_rows(path):
        rows.append(row)
        if len(rows) == LOOKED_AT:
            break
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    matched = match_columns(columns, given)
    known = {name for names in NAMES.values() for name in names} | set(matched.values())
    free = [name for name in columns if name.strip().lower() not in known]
    numbers = tuple(name for name in free if _are_numbers([row.values.get(name) for row in rows]))
    if "text" not in matched and not numbers:
        prose = [name for name in free if _words([row.values.get(name) for row in rows]) >= TEXT_WORDS]
        if len(prose) == 1:
            matched["text"] = prose[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._").lower()[:100] or "events"
    return Guess("text" if "text" in matched or not numbers else "telemetry", name, matched, numbers)


def written(wish: Wish) -> str:
    """The settings file, with a comment for each key that a newcomer may want.

    Raises:
        InvalidSettings: a name or an address cannot be used.
    """
    lines = [
        "# Settings of trimtab. All keys with their bounds and defaults: `trimtab config schema`.",
        "# Check this file: `trimtab config check`. Check what it names, too: `trimtab doctor`.",
        "",
        "kafka:",
        f"  bootstrap_servers: {_text(wish.bootstrap)}   # several: host:port,host:port",
        "  # security_protocol: SASL_SSL             # with sasl_mechanism, sasl_username, sasl_password_file, ca_file",
        "",
        "topics:",
        f"  prefix: {_text(wish.prefix)}   # put before every topic, so that several installations share a cluster",
        "  # partitions: 4        # the most workers that can share the work; read when topics are created",
        "  # replication: 3       # left out: the brokers' default",
        "  # retention_days: 14   # longer than your labels are late: an event is read back when its label comes",
        "",
        "streams:",
        f"  {_text(wish.stream)}:",
        f"    kind: {wish.kind}",
    ]
    if wish.topic is not None:
        lines.append(f"    topic: {_text(wish.topic)}   # of this stream's events, without the prefix")
    if wish.kind == "telemetry":
        lines += [
            "    encoder:",
            f"      channels: {json.dumps(list(wish.channels), ensure_ascii=False)}",
            "      # commands: []     # those of the channels that say what was done, and mostly rest at 0",
            "      # window: 64       # the usual number of time steps of an event",
            "    # missing_channels: fill   # an event may lack some of the channels; else it is a dead letter",
        ]
    else:
        lines.append("    # max_characters: 20000   # a longer text is a dead letter")
    if wish.classes > 150:
        total = 2 * wish.classes
        lines += [
            "    new_classes:",
            f"      per_day: {total}   # your file names {wish.classes} classes; labels beyond this wait in quarantine",
            f"      total: {max(1_000, total)}",
        ]
    lines += [
        "    # labels: [one, two]   # known at the start; others are learned as they come",
        "    # closed: true         # no label beyond those is taken",
        "    # triggers:",
        "    #   every_labels: 1000   # a fine-tune after so many new labels; null for never",
        "",
        "# Where state lies, relative to the folder in which a process is started:",
        "# registry:",
        "#   url: trimtab-data/registry                  # weights; workers must reach it",
        "# learner:",
        "#   store: sqlite:///trimtab-data/learner.db    # or postgresql+psycopg://USER@HOST/NAME",
        "#   http:",
        "#     port: 6070                                # the console and control calls, on 127.0.0.1",
        "",
    ]
    text = "\n".join(lines)
    parsed(text)
    return text


def parsed(text: str, name: str = "trimtab.yaml") -> Settings:
    """The settings that a file of this text would be, without any environment.

    Raises:
        InvalidSettings: it cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text, encoding="utf-8")
        try:
            return load_settings(path, {})
        except InvalidSettings as refusal:
            raise InvalidSettings("what was answered", refusal.problems) from None


def check_file(path: Path, settings: Settings, stream: str, columns: Mapping[str, str], now: datetime) -> Checked:
    """Read the whole file as `trimtab publish` would, and count.

    Raises:
        Misconfigured: it cannot be read, or has no column that the stream needs.
    """
    (own,) = (rule for rule in rules(settings) if rule.name == stream)
    decoder, found = Decoder([own]), Checked(columns)
    for entry in read_events(read_rows(path), own, columns, now, window_of(settings, stream)):
        why = entry.why
        try:
            if entry.event is not None:
                decoder.event(Record("", 0, entry.number, None, encode(entry.event)))
            if entry.label is not None:
                decoder.label(Record("", 0, entry.number, None, encode(entry.label)))
        except DeadLetter as refusal:
            why = f"{refusal.field}: {refusal.detail}" if refusal.field else refusal.detail
        if why:
            found.bad.append(BadLine(entry.number, why))
            continue
        found.events += 1
        if entry.label is not None and entry.label.label is not None:
            found.classes[entry.label.label] += 1
    return found


def table_entries(
    path: Path, settings: Settings, stream: str, given: Mapping[str, str]
) -> tuple[Iterator[Entry], tuple[str, str]]:
    """What a file's rows come to as events and labels of a stream, and the topics that take them.

    Raises:
        Misconfigured: it cannot be read, or has no column that the stream needs.
    """
    (own,) = (rule for rule in rules(settings) if rule.name == stream)
    columns = dict(match_columns(columns_of(path), given))
    if own.kind == "text" and "text" not in columns:
        columns = dict(guess(path, given).columns)
    entries = read_events(read_rows(path), own, columns, utc_now(), window_of(settings, stream))
    return entries, (settings.topic_of(stream), settings.topics.name("labels"))


def window_of(settings: Settings, stream: str) -> int:
    """Rows of one event where a file does not say which belong together."""
    found = settings.streams[stream]
    return found.encoder.window if isinstance(found, TelemetryStream) else 1


def _text(value: str) -> str:
    """A value as YAML writes it: plain where that is read back as it is, else in quotes."""
    return (
        value
        if re.fullmatch(r"[A-Za-z][A-Za-z_-]*|[A-Za-z0-9.-]+:\d+", value) and value not in _WORDS
        else (json.dumps(value, ensure_ascii=False))
    )


_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n", "Yes", "No", "On", "Off"})


def _are_numbers(cells: Sequence[object]) -> bool:
    """Whether every cell that is not empty is a number, and there is one."""
    found = False
    for cell in cells:
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            continue
        if isinstance(cell, bool):
            return False
        try:
            float(str(cell))
        except ValueError:
            return False
        found = True
    return found


def _words(cells: Sequence[object]) -> float:
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    return sum(len(text.split()) for text in texts) / max(1, len(texts))
