"""The classifier without Kafka: one message for every record, whatever the record is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.metrics import Metrics
from stream.errors import DeadLetter, Reason
from stream.events import Decoder, Event, Prediction, Record, Report, StreamRules, encode, utc_now
from stream.model import Answer
from stream.worker import MAX_DEAD_LETTER_BYTES, Classifier, dead_letter
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


def test_a_dead_letter_too_large_for_its_topic_is_kept_by_reference() -> None:
    """The broker would refuse it, and refusing it again at every retry would stop the stream."""
    large = record(b"x" * MAX_DEAD_LETTER_BYTES, offset=7)
    message = dead_letter("dead-letters", DeadLetter(Reason.TOO_LARGE, "", "too large"), large, utc_now())
    assert message.value is None
    headers = dict(message.headers)
    assert headers["trimtab-by-reference"] == b"1"
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
