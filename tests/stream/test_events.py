"""The wire contract: what goes out comes back the same, and what is wrong is named."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import DeadLetter, Reason
from stream.events import (
    MAX_MESSAGE_BYTES,
    Decoder,
    Label,
    Place,
    Prediction,
    Record,
    Report,
    StreamRules,
    Telemetry,
    class_name,
    dead_letter_headers,
    encode,
    encode_prediction,
)

RULES = [
    StreamRules("notes", "text"),
    StreamRules("probe", "telemetry", channels=("a", "b"), closed_labels=frozenset({"calm", "storm"})),
]
AT = datetime(2024, 5, 1, tzinfo=UTC)
ids = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)
times = st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001
numbers = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))


def record(value: bytes | None, key: bytes | None = None) -> Record:
    return Record("topic", 1, 2, key, value, (("h", b"1"),), 0)


def window(**changes: object) -> bytes:
    fields = {
        "event_id": "w1",
        "stream": "probe",
        "observed_at": "2024-05-01T00:00:00Z",
        "channels": ["a", "b"],
        "values": [[1, 2], [3, 4]],
    }
    return json.dumps({**fields, **changes}).encode()


@given(ids, ids, times, st.text(st.characters(codec="utf-8"), max_size=200))
def test_a_report_comes_back_as_it_went_out(event_id: str, source: str, at: datetime, text: str) -> None:
    """Decode after encode is the identity, whatever the characters."""
    report = Report(event_id=event_id, stream="notes", source=source, observed_at=at, text=text)
    assert Decoder(RULES).event(record(encode(report))) == report


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=2, max_size=2)))
def test_a_window_comes_back_as_it_went_out(values: list[list[float | None]]) -> None:
    """Numbers and missing values survive the wire bit for bit."""
    event = Telemetry(event_id="w", stream="probe", observed_at=AT, channels=["b", "a"], values=values)
    assert Decoder(RULES).event(record(encode(event))) == event


@given(ids, st.one_of(st.none(), st.sampled_from(["calm", "storm"])), st.one_of(st.none(), st.floats(0, 1)))
def test_labels_and_predictions_come_back_as_they_went_out(
    event_id: str, label: str | None, confidence: float | None
) -> None:
    """The join relies on both sides reading the same thing."""
    answer = Label(event_id=event_id, stream="probe", label=label, labelled_at=AT, confidence=confidence)
    assert Decoder(RULES).label(record(encode(answer))) == answer
    prediction = Prediction(
        event_id=event_id,
        stream="probe",
        label=label,
        probabilities={"calm": 0.5},
        novelty=0.25,
        model_version="v1.2",
        ref=Place(topic="t", partition=0, offset=7),
        observed_at=AT,
        predicted_at=AT,
    )
    assert Decoder(RULES).prediction(record(encode(prediction))) == prediction


@given(
    ids,
    st.one_of(st.none(), ids),
    st.lists(st.tuples(ids, st.floats(0, 1)), max_size=5, unique_by=lambda pair: pair[0]),
    times,
    times,
)
def test_a_prediction_written_without_its_model_has_the_models_bytes(
    event_id: str, label: str | None, probabilities: list[tuple[str, float]], observed_at: datetime, now: datetime
) -> None:
    """The hot path writes predictions without building them; a field that only one way knows would be lost."""
    report = Report(event_id=event_id, stream="notes", observed_at=observed_at, text="x")
    written = encode_prediction(
        report,
        record(b"x"),
        label=label,
        probabilities=probabilities,
        novelty=0.25,
        model_version="v1.2",
        predicted_at=now,
    )
    built = Prediction(
        event_id=event_id,
        stream="notes",
        label=label,
        probabilities=dict(probabilities),
        novelty=0.25,
        model_version="v1.2",
        ref=record(b"x").place,
        observed_at=observed_at,
        predicted_at=now,
    )
    assert written == encode(built)


def test_a_stream_may_take_windows_that_lack_channels_but_not_all() -> None:
    """A sensor that fell silent must not silence the others; a window of another device is still refused."""
    decoder = Decoder([StreamRules("probe", "telemetry", channels=("a", "b", "c"), fill_channels=True)])
    event = decoder.event(record(window()))
    assert isinstance(event, Telemetry)
    assert event.channels == ["a", "b"]
    with pytest.raises(DeadLetter) as refused:
        decoder.event(record(window(channels=["x", "y"])))
    assert refused.value.reason == Reason.MISSING_CHANNEL


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_refused(value: bytes) -> None:
    """No input may raise anything but `DeadLetter`, or one bad message would stop a stream."""
    for decode in (Decoder(RULES).event, Decoder(RULES).label, Decoder(RULES).prediction):
        try:
            decode(record(value))
        except DeadLetter:
            continue


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        (None, Reason.MALFORMED_JSON, ""),
        (b"", Reason.MALFORMED_JSON, ""),
        (b"[" * 100_000, Reason.MALFORMED_JSON, ""),
        (b'"' + b"x" * MAX_MESSAGE_BYTES + b'"', Reason.TOO_LARGE, ""),
        (window(stream="other"), Reason.UNKNOWN_STREAM, "stream"),
        (window(schema_version="2.1"), Reason.SCHEMA_VERSION, "schema_version"),
        (window(observed_at="2024-05-01T00:00:00"), Reason.INVALID_FIELD, "observed_at"),
        (window(values=[[1, float("nan")], [1, 2]]), Reason.NOT_FINITE, "values.0.1"),
        (window(values=[[1, 2], [float("inf"), 2]]), Reason.NOT_FINITE, "values.1.0"),
        (window(values=[[1, 2], [1]]), Reason.RAGGED, "values"),
        (window(values=[[], []]), Reason.RAGGED, "values"),
        (window(values=[[1, 2]]), Reason.RAGGED, "values"),
        (window(channels=["a", "c"]), Reason.MISSING_CHANNEL, "channels"),
        (window(channels=["a", "b", "a"], values=[[1], [1], [1]]), Reason.INVALID_FIELD, "channels"),
        (window(values=[[1] * 10_001] * 2), Reason.TOO_LARGE, "values"),
        (window(values="many"), Reason.INVALID_FIELD, "values"),
        (window(event_id=""), Reason.INVALID_FIELD, "event_id"),
        (window(stream="notes"), Reason.INVALID_FIELD, "values"),
    ],
)
def test_a_refusal_names_reason_field_and_event(value: bytes | None, reason: Reason, field: str) -> None:
    """A person who looks into dead letters must see at once what to mend, and where."""
    with pytest.raises(DeadLetter) as refusal:
        Decoder(RULES).event(record(value))
    assert (refusal.value.reason, refusal.value.field) == (reason, field)
    if value and b'"w1"' in value:
        assert refusal.value.event_id == "w1"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", Reason.CLASS_NAME),
        ("  ", Reason.CLASS_NAME),
        ("x" * 129, Reason.CLASS_NAME),
        ("a\x00b", Reason.CLASS_NAME),
        ("a\u202eb", Reason.CLASS_NAME),
        ("flood", Reason.CLOSED_LABEL_SET),
    ],
)
def test_a_label_outside_its_bounds_is_refused(name: str, reason: Reason) -> None:
    """Class names become metric labels, table rows and columns of plots."""
    value = json.dumps({"event_id": "e", "stream": "probe", "label": name, "labelled_at": AT.isoformat()}).encode()
    with pytest.raises(DeadLetter) as refusal:
        Decoder(RULES).label(record(value))
    assert refusal.value.reason == reason


def test_two_spellings_of_one_name_are_one_class() -> None:
    """A composed and a decomposed accent look alike and must not become two classes."""
    assert class_name("caf\u00e9") == class_name("cafe\u0301")


def test_unknown_fields_are_ignored_and_counted() -> None:
    """A producer that is ahead of us must not break us, and we want to know of it."""
    seen: list[tuple[str, int]] = []
    Decoder(RULES, lambda kind, count: seen.append((kind, count))).event(record(window(colour="red", size=1)))
    assert seen == [("telemetry", 2)]


def test_dead_letter_headers_come_after_the_original_ones() -> None:
    """Whoever replays a dead letter needs the original headers first and unchanged."""
    headers = dead_letter_headers(DeadLetter(Reason.RAGGED, "values", "rows differ", "e1"), record(b"x"), AT)
    assert headers[0] == ("h", b"1")
    assert dict(headers[1:])["trimtab-reason"] == b"ragged"


@pytest.mark.parametrize("at", ["9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"])
def test_a_time_that_is_none_in_utc_is_refused(at: str) -> None:
    """Let through, one such label or event ended every learner that read it, again at each start."""
    with pytest.raises(DeadLetter, match="year"):
        Decoder(RULES).event(record(window(observed_at=at)))
    label = {"event_id": "e", "stream": "notes", "label": "storm", "labelled_at": at}
    with pytest.raises(DeadLetter, match="year"):
        Decoder(RULES).label(record(json.dumps(label).encode()))


def test_what_no_database_keeps_is_refused() -> None:
    """PostgreSQL has no text with NUL and no whole number beyond 64 bits; the message would be read for ever."""
    said = {"event_id": "e", "stream": "notes", "label": "storm", "labelled_at": "2024-05-01T00:00:00Z"}
    for field in ("event_id", "labeller"):
        with pytest.raises(DeadLetter, match=r"U\+0000"):
            Decoder(RULES).label(record(json.dumps({**said, field: "a\0b"}).encode()))
    answer = encode(
        Prediction(
            event_id="e",
            stream="notes",
            label=None,
            probabilities={},
            novelty=1.0,
            model_version="v1.0",
            ref=Place(topic="reports", partition=0, offset=7),
            observed_at=AT,
            predicted_at=AT,
        )
    )
    with pytest.raises(DeadLetter, match="offset"):
        Decoder(RULES).prediction(record(answer.replace(b'"offset":7', b'"offset":%d' % 2**63)))
