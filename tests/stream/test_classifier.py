"""The classifier without Kafka: one message for every record, whatever the record is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.metrics import Metrics
from stream.errors import DeadLetter, Reason
from stream.events import Decoder, Event, Prediction, Record, Report, StreamRules, encode, utc_now
from stream.model import Answer
from stream.worker import KEPT_BYTES, MAX_DEAD_LETTER_BYTES, POISON_IN_A_ROW, Classifier, dead_letter
from tests.stream.worker_process import LengthModel


def classifier(model: LengthModel | None = None) -> Classifier:
    decoder = Decoder([StreamRules("notes", "text")])
    return Classifier(model or LengthModel(), decoder, "predictions", "dead-letters", Metrics())


def record(value: bytes, offset: int = 0) -> Record:
    return Record("reports", 3, offset, b"key", value, (("tenant", b"a"), ("traceparent", b"00-1")), 0)


@given(st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda t: encode_report(t))), max_size=20))
def test_every_record_leaves_exactly_one_message(values: list[bytes]) -> None:
    """Nothing may vanish between the decoder and the producer."""
    outgoing = classifier().answer([record(value, offset) for offset, value in enumerate(values)])
    assert len(outgoing) == len(values)
    for message in outgoing:
        if message.topic == "dead-letters":
            assert message.value in values
            assert message.headers[0] == ("tenant", b"a")
        else:
            prediction = Prediction.model_validate_json(message.value or b"")
            assert message.key == prediction.event_id.encode()
            assert message.headers == (("traceparent", b"00-1"),)
            assert values[prediction.ref.offset]


def encode_report(text: str) -> bytes:
    return encode(Report(event_id="e1", stream="notes", observed_at=utc_now(), text=text))


def test_a_field_name_that_is_a_message_of_its_own_is_cut() -> None:
    """The keys of an object are the sender's, and one of them may be as long as a message."""
    name = "n" * (MAX_DEAD_LETTER_BYTES + 90_000)
    value = b'{"probabilities": {"%s": "x"}}' % name.encode()
    decoder = Decoder([StreamRules("notes", "text")])
    with pytest.raises(DeadLetter) as refusal:
        decoder.prediction(record(b'{"event_id":"e","stream":"notes","label":null,' + value[1:]))
    assert "n" * 1000 in refusal.value.field
    message = dead_letter("dead-letters", refusal.value, record(value), utc_now())
    assert sum(len(found) for _, found in message.headers) + len(message.value or b"") < MAX_DEAD_LETTER_BYTES


def test_a_dead_letter_too_large_for_its_topic_is_kept_by_reference() -> None:
    """The broker would refuse it, and refusing it again at every retry would stop the stream."""
    large = record(b"x" * MAX_DEAD_LETTER_BYTES, offset=7)
    message = dead_letter("dead-letters", DeadLetter(Reason.TOO_LARGE, "", "too large"), large, utc_now())
    assert message.value == (large.value or b"")[:KEPT_BYTES]
    headers = dict(message.headers)
    assert headers["trimtab-by-reference"] == b"1"
    assert headers["trimtab-bytes"] == b"%d" % MAX_DEAD_LETTER_BYTES
    assert headers["trimtab-sha256"].decode() == sha256(large.value or b"").hexdigest()
    assert (headers["trimtab-topic"], headers["trimtab-partition"], headers["trimtab-offset"]) == (
        b"reports",
        b"3",
        b"7",
    )


def test_a_model_that_loses_an_answer_stops_the_worker() -> None:
    """An answer too few would give every later event of the batch another event's answer."""

    class Forgetful(LengthModel):
        def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
            return super().predict(stream, events)[1:]

    with pytest.raises(RuntimeError, match="0 answers for 1 events"):
        classifier(Forgetful()).answer([record(encode_report("a"))])


class Poisoned(LengthModel):
    """Fails on every batch that holds a text with `!` in it, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
        self.passes += 1
        if any("!" in event.text for event in events if isinstance(event, Report)):
            raise IndexError("index out of range in self")
        return super().predict(stream, events)


@settings(max_examples=15)
@given(st.sets(st.integers(0, 999), max_size=3))
def test_poison_events_cost_themselves_alone(poison: set[int]) -> None:
    """An event on which the network itself fails would end every worker that reads it, one after another, for ever."""
    model = Poisoned()
    records = [record(encode_report("!" if n in poison else "fine"), n) for n in range(1_000)]
    outgoing = classifier(model).answer(records)
    parked = [dict(message.headers) for message in outgoing if message.topic == "dead-letters"]
    assert {int(headers["trimtab-offset"]) for headers in parked} == poison
    assert all(
        headers["trimtab-reason"] == b"model_failed" and b"IndexError" in headers["trimtab-detail"]
        for headers in parked
    )
    assert len(outgoing) == 1_000
    assert model.passes <= 1 + 20 * len(poison)


@pytest.mark.parametrize("size", [2, 1_000])
def test_a_model_that_fails_on_everything_is_not_the_events_fault(size: int) -> None:
    """A broken model must stop the worker with nothing committed, not empty the stream into dead letters."""
    model = Poisoned()
    with pytest.raises(IndexError):
        classifier(model).answer([record(encode_report("!"), n) for n in range(size)])
    assert model.passes <= 40


def test_a_broken_model_shows_through_batches_of_one() -> None:
    """On a slow stream every batch is one event, and a broken model must be told from poison all the same."""
    one = classifier(Poisoned())
    for n in range(POISON_IN_A_ROW):
        assert one.answer([record(encode_report("!"), n)])[0].topic == "dead-letters"
    with pytest.raises(IndexError):
        one.answer([record(encode_report("!"))])


class Shared(Poisoned):
    """Answers all streams at once, as a model does whose streams share a network, and fails on `!` in any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = 0

    def predict_all(self, parts: Mapping[str, Sequence[Event]]) -> Mapping[str, list[Answer]]:
        self.at_once += 1
        return super().predict_all(parts)


def from_streams(texts: Sequence[str], names: Sequence[str]) -> list[Record]:
    """A record of each text, of one stream after another."""
    return [
        record(encode(Report(event_id="e", stream=names[n % len(names)], observed_at=utc_now(), text=text)), n)
        for n, text in enumerate(texts)
    ]


def test_the_streams_of_a_batch_are_answered_in_one_call() -> None:
    """A hundred streams with five events each would otherwise cost a hundred passes of the network."""
    names = [f"s{n}" for n in range(4)]
    model = Shared()
    several = Classifier(model, Decoder([StreamRules(n, "text") for n in names]), "predictions", "dead", Metrics())
    texts = ["a" * (n + 1) for n in range(12)]
    outgoing = several.answer(from_streams(texts, names))
    assert model.at_once == 1
    answers = [Prediction.model_validate_json(message.value or b"") for message in outgoing]
    assert {a.ref.offset: (a.stream, a.label) for a in answers} == {
        n: (names[n % 4], str(len(text))) for n, text in enumerate(texts)
    }


def test_poison_in_one_stream_costs_the_others_nothing() -> None:
    """Answered at once they fail at once, and a stream must not lose its events to another's poison."""
    names = ["s0", "s1", "s2"]
    model = Shared()
    several = Classifier(model, Decoder([StreamRules(n, "text") for n in names]), "predictions", "dead", Metrics())
    outgoing = several.answer(from_streams(["fine", "!", "fine", "fine", "fine", "fine"], names))
    assert [dict(m.headers)["trimtab-offset"] for m in outgoing if m.topic == "dead"] == [b"1"]
    assert sum(message.topic == "predictions" for message in outgoing) == 5
