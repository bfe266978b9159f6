"""The wire contract: what every message looks like, how it is decoded, and how it is refused.

One JSON object a message, keyed by event id, times in UTC as RFC 3339. A message of another major
`schema_version` is refused; fields that this version does not know are ignored and counted. Nothing
here knows of Kafka clients, Faust or torch: bytes in, models out.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from stream.errors import DeadLetter, Reason

SCHEMA_VERSION = "1.0"
MAX_MESSAGE_BYTES = 1_000_000
MAX_CLASS_NAME = 128
MAX_MODEL_VERSION = 100
NUL = "character U+0000 is not allowed: PostgreSQL has no text with it"

Headers = tuple[tuple[str, bytes], ...]
EventId = Annotated[str, Field(min_length=1, max_length=200)]
StreamName = Annotated[str, Field(min_length=1, max_length=100)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(NamedTuple):
    """One Kafka message, free of any client library. `timestamp_ms` is Kafka's own record time."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    timestamp_ms: int = 0

    @property
    def place(self) -> Place:
        """Where the message lies in the log."""
        return Place(topic=self.topic, partition=self.partition, offset=self.offset)


class Wire(BaseModel):
    """Base of every message; unknown fields are kept so that they can be counted."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="constants")


class Place(Wire):
    """A place in the log: it names one message for as long as the topic's retention keeps it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    topic: str
    partition: int = Field(ge=0, lt=2**31)
    offset: int = Field(ge=0, lt=2**63)


class Report(Wire):
    """A text event, such as a log line, an alert or an observation report."""

    schema_version: str = SCHEMA_VERSION
    event_id: EventId
    stream: StreamName
    source: str = Field(default="", max_length=200)
    observed_at: AwareDatetime
    text: str


class Telemetry(Wire):
    """A window of numbers: `values[channel][time]`, every row of one length; null is a missing value."""

    schema_version: str = SCHEMA_VERSION
    event_id: EventId
    stream: StreamName
    source: str = Field(default="", max_length=200)
    observed_at: AwareDatetime
    channels: list[str]
    values: list[list[Finite | None]]
    unit: str | None = None


Event = Report | Telemetry


class Label(Wire):
    """A late answer to an event, by one labeller; `label` null withdraws that labeller's earlier one."""

    schema_version: str = SCHEMA_VERSION
    event_id: EventId
    stream: StreamName
    label: str | None
    labeller: str = Field(default="default", min_length=1, max_length=200)
    labelled_at: AwareDatetime
    confidence: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)


class Prediction(Wire):
    """What a worker answered for the event at `ref`, and by which revision."""

    schema_version: str = SCHEMA_VERSION
    event_id: EventId
    stream: StreamName
    label: str | None
    probabilities: dict[str, Finite]
    novelty: Finite
    model_version: str
    ref: Place
    observed_at: AwareDatetime
    predicted_at: AwareDatetime
    supersedes: str | None = None


class LabelRequest(Wire):
    """A label that the learner asks for: of the event at `ref`, why, and what is answered so far."""

    schema_version: str = SCHEMA_VERSION
    event_id: EventId
    stream: StreamName
    ref: Place
    observed_at: AwareDatetime
    why: Literal["novel", "uncertain"]
    score: float = Field(ge=0, le=1, allow_inf_nan=False)
    label: str | None
    model_version: str
    asked_at: AwareDatetime


_TOPIC_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")

M = TypeVar("M", Report, Telemetry, Label, Prediction)


@dataclass(frozen=True, slots=True)
class StreamRules:
    """What one stream accepts; see the `streams` section of the settings.

    Args:
        name: the stream's name on the wire.
        kind: `text` streams take `Report`, `telemetry` streams take `Telemetry`.
        channels: the telemetry channels an event must carry, in the model's order.
        closed_labels: the only labels allowed, or None where the label set grows.
        max_text_characters: the longest text taken.
        max_steps: the most time steps a window may have.
        fill_channels: take a window that lacks some of `channels`, but not one that lacks them all.
    """

    name: str
    kind: Literal["text", "telemetry"]
    channels: tuple[str, ...] = ()
    closed_labels: frozenset[str] | None = None
    max_text_characters: int = 20_000
    max_steps: int = 10_000
    fill_channels: bool = False


def utc_now() -> datetime:
    """The wall clock as the wire writes it."""
    return datetime.now(UTC)


@lru_cache(maxsize=256)
def is_topic(name: str) -> bool:
    """Whether Kafka could have a topic of that name; asked for another one, its clients wait without an end."""
    return _TOPIC_NAME.fullmatch(name) is not None and name not in (".", "..")


def encode(message: BaseModel) -> bytes:
    """The message as one JSON object in UTF-8; fields that are not set are left out."""
    return message.model_dump_json(exclude_none=False).encode()


def encode_prediction(
    event: Event,
    record: Record,
    *,
    label: str | None,
    probabilities: Iterable[tuple[str, float]],
    novelty: float,
    model_version: str,
    predicted_at: datetime,
    supersedes: str | None = None,
) -> bytes:
    """The bytes that `encode` gives for the `Prediction` of these fields.

    Every field was checked when it came in or is ours, so the model, at three quarters of the cost of an answer, is
    not built.

    Args:
        event: what is answered.
        record: where it came from; its place is the prediction's `ref`.
        probabilities: (class, probability), best first.
        supersedes: the revision whose answer to the same event this one corrects.
    """
    return to_json(
        {
            "schema_version": SCHEMA_VERSION,
            "event_id": event.event_id,
            "stream": event.stream,
            "label": label,
            "probabilities": dict(probabilities),
            "novelty": novelty,
            "model_version": model_version,
            "ref": {"topic": record.topic, "partition": record.partition, "offset": record.offset},
            "observed_at": event.observed_at,
            "predicted_at": predicted_at,
            "supersedes": supersedes,
        },
        inf_nan_mode="constants",
    )


class Decoder:
    """Turns records into messages, or raises `DeadLetter` with the field and the event at fault.

    Args:
        rules: the streams this process knows.
        on_unknown_field: told of every message that carried fields this version ignores, as
            (message type, number of fields).
    """

    def __init__(
        self,
        rules: Iterable[StreamRules],
        on_unknown_field: Callable[[str, int], None] = lambda kind, count: None,
    ) -> None:
        self.rules: Mapping[str, StreamRules] = {rule.name: rule for rule in rules}
        self._on_unknown_field = on_unknown_field

    def event(self, record: Record) -> Event:
        """Decode a report or a telemetry window and check it against its stream's rules."""
        value = _bounded(record)
        event: Event = self._parse(Telemetry, value) if b'"values"' in value else self._parse(Report, value)
        rules = self._rules(event.stream, event.event_id)
        if isinstance(event, Report):
            if rules.kind != "text":
                raise DeadLetter(
                    Reason.INVALID_FIELD, "text", f"stream {rules.name!r} takes telemetry, not text", event.event_id
                )
            if len(event.text) > rules.max_text_characters:
                raise DeadLetter(
                    Reason.TEXT_TOO_LONG,
                    "text",
                    f"{len(event.text)} characters, at most {rules.max_text_characters} are taken",
                    event.event_id,
                )
            return event
        _check_window(event, rules)
        return event

    def label(self, record: Record) -> Label:
        """Decode a label; its name comes back NFC-normalised and within its bounds."""
        label = self._parse(Label, _bounded(record))
        rules = self._rules(label.stream, label.event_id)
        if label.label is None:
            return label
        name = class_name(label.label, label.event_id)
        if rules.closed_labels is not None and name not in rules.closed_labels:
            raise DeadLetter(
                Reason.CLOSED_LABEL_SET,
                "label",
                f"{name!r} is not one of the labels that stream {rules.name!r} allows",
                label.event_id,
            )
        return label if name == label.label else label.model_copy(update={"label": name})

    def prediction(self, record: Record) -> Prediction:
        """Decode what a worker wrote."""
        prediction = self._parse(Prediction, _bounded(record))
        self._rules(prediction.stream, prediction.event_id)
        return prediction

    def _rules(self, stream: str, event_id: str) -> StreamRules:
        rules = self.rules.get(stream)
        if rules is None:
            known = ", ".join(sorted(self.rules)) or "none"
            detail = f"{stream!r} is not configured (known: {known})"
            raise DeadLetter(Reason.UNKNOWN_STREAM, "stream", detail, event_id)
        return rules

    def _parse(self, wire: type[M], value: bytes) -> M:
        try:
            message = wire.model_validate_json(value)
        except ValidationError as error:
            raise _refusal(error, value) from None
        if message.schema_version != SCHEMA_VERSION and _major(message.schema_version) != _major(SCHEMA_VERSION):
            raise DeadLetter(
                Reason.SCHEMA_VERSION,
                "schema_version",
                f"found {message.schema_version!r}, this version reads {_major(SCHEMA_VERSION)}.x",
                message.event_id,
            )
        _check_storable(message)
        if message.model_extra:
            self._on_unknown_field(wire.__name__.lower(), len(message.model_extra))
        return message


def class_name(name: str, event_id: str | None = None) -> str:
    """The class name in NFC, or `DeadLetter` where it is empty, too long or has control characters."""
    normal = unicodedata.normalize("NFC", name).strip()
    if not normal or len(normal) > MAX_CLASS_NAME:
        detail = f"a class name has 1 to {MAX_CLASS_NAME} characters, found {len(normal)}"
        raise DeadLetter(Reason.CLASS_NAME, "label", detail, event_id)
    bad = next((c for c in normal if unicodedata.category(c).startswith("C")), None)
    if bad is not None:
        detail = f"character U+{ord(bad):04X} is not allowed in a class name"
        raise DeadLetter(Reason.CLASS_NAME, "label", detail, event_id)
    return normal


def _major(version: str) -> str:
    return version.partition(".")[0]


def _bounded(record: Record) -> bytes:
    if record.value is None:
        raise DeadLetter(Reason.MALFORMED_JSON, "", "the message has no value")
    if len(record.value) > MAX_MESSAGE_BYTES:
        raise DeadLetter(Reason.TOO_LARGE, "", f"{len(record.value)} bytes, at most {MAX_MESSAGE_BYTES} are taken")
    return record.value


def _check_storable(message: Report | Telemetry | Label | Prediction) -> None:
    """Refuse what is a value of its type and yet cannot be kept: it would end every learner that reads it.

    Checked here, because as constraints of the models they would cost a fifth of a decode.
    """
    if isinstance(message, Label):
        _check_year("labelled_at", message.labelled_at, message.event_id)
        if "\0" in message.labeller:
            raise DeadLetter(Reason.INVALID_FIELD, "labeller", NUL, message.event_id)
    else:
        _check_year("observed_at", message.observed_at, message.event_id)
        if isinstance(message, Prediction):
            _check_answer(message)
    if "\0" in message.event_id:
        raise DeadLetter(Reason.INVALID_FIELD, "event_id", NUL, message.event_id)


def _check_answer(message: Prediction) -> None:
    _check_year("predicted_at", message.predicted_at, message.event_id)
    for field, text, most in (
        ("label", message.label, MAX_CLASS_NAME),
        ("model_version", message.model_version, MAX_MODEL_VERSION),
    ):
        if text and len(text) > most:
            detail = f"{len(text)} characters, at most {most} are taken"
            raise DeadLetter(Reason.INVALID_FIELD, field, detail, message.event_id)
        if text and "\0" in text:
            raise DeadLetter(Reason.INVALID_FIELD, field, NUL, message.event_id)
    if not is_topic(message.ref.topic):
        raise DeadLetter(Reason.INVALID_FIELD, "ref.topic", "no topic can have that name", message.event_id)


def _check_year(field: str, at: datetime, event_id: str) -> None:
    # In another time zone the first and the last day there is are no dates any more.
    if not 1 < at.year < 9999:
        raise DeadLetter(Reason.INVALID_FIELD, field, f"the year must be between 2 and 9998, found {at.year}", event_id)


def _check_window(event: Telemetry, rules: StreamRules) -> None:
    def refuse(reason: Reason, field: str, detail: str) -> DeadLetter:
        return DeadLetter(reason, field, detail, event.event_id)

    if rules.kind != "telemetry":
        raise refuse(Reason.INVALID_FIELD, "values", f"stream {rules.name!r} takes text, not telemetry")
    missing = [channel for channel in rules.channels if channel not in event.channels]
    if missing and (not rules.fill_channels or len(missing) == len(rules.channels)):
        raise refuse(Reason.MISSING_CHANNEL, "channels", f"missing {', '.join(missing)}")
    if len(set(event.channels)) != len(event.channels):
        raise refuse(Reason.INVALID_FIELD, "channels", "a channel is named twice")
    if len(event.values) != len(event.channels):
        raise refuse(Reason.RAGGED, "values", f"{len(event.values)} rows for {len(event.channels)} channels")
    lengths = {len(row) for row in event.values}
    if len(lengths) != 1 or 0 in lengths:
        raise refuse(Reason.RAGGED, "values", f"rows of lengths {sorted(lengths)}, all must be equal and not empty")
    if max(lengths) > rules.max_steps:
        raise refuse(Reason.TOO_LARGE, "values", f"{max(lengths)} steps, at most {rules.max_steps} are taken")


def _refusal(error: ValidationError, value: bytes) -> DeadLetter:
    """The first thing that pydantic found wrong, in our words."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("float", "nullable", "none"))
    event_id = _peek_event_id(value)
    match first["type"]:
        case "json_invalid":
            return DeadLetter(Reason.MALFORMED_JSON, "", first["msg"], event_id)
        case "finite_number":
            detail = "NaN and infinite values are not taken; null is a missing value"
            return DeadLetter(Reason.NOT_FINITE, field, detail, event_id)
        case _:
            return DeadLetter(Reason.INVALID_FIELD, field, first["msg"], event_id)


def _peek_event_id(value: bytes) -> str | None:
    """The event id of a message that failed to decode, if it can still be read."""
    try:
        found: Any = json.loads(value)
    except (ValueError, RecursionError):
        return None
    event_id = found.get("event_id") if isinstance(found, dict) else None
    return event_id if isinstance(event_id, str) and len(event_id) <= 200 else None


def dead_letter_headers(error: DeadLetter, record: Record, at: datetime) -> list[tuple[str, bytes]]:
    """The original headers, then why, where and when the message was refused."""
    added = {
        "trimtab-reason": str(error.reason),
        "trimtab-field": error.field[:200],
        "trimtab-detail": error.detail[:1000],
        "trimtab-event-id": error.event_id or "",
        "trimtab-topic": record.topic,
        "trimtab-partition": str(record.partition),
        "trimtab-offset": str(record.offset),
        "trimtab-at": at.isoformat(),
    }
    return [*record.headers, *((name, text.encode(errors="replace")) for name, text in added.items())]
