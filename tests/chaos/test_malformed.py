"""Whatever comes, every message is answered or in dead letters with its bytes, and nothing crashes."""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
from confluent_kafka import Producer
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.control import ControlSettings, Gate, Refused
from monitoring.metrics import Metrics
from stream.batches import Batch
from stream.errors import DeadLetter, Reason
from stream.events import Decoder, Label, Place, Prediction, Record, Report, Telemetry, encode, utc_now
from stream.worker import MAX_DEAD_LETTER_BYTES, Classifier, Outgoing
from tests.chaos.malformed import RULES, Message, messages
from tests.kafka import KafkaBroker
from tests.learner.loop import CHANNELS, STREAM, Loop
from tests.stream.test_worker import Pipeline
from tests.stream.worker_process import LengthModel
from tests.waiting import until

COUNT = 20_000
BATCH = 500

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
NAMES = ("event_id", "stream", "observed_at", "text", "values", "channels", "schema_version", "source")
fields = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, json_values))


def record(number: int, message: Message) -> Record:
    key, value, headers = message
    return Record("events", 0, number, key, value, headers, 0)


def check_answers(records: Sequence[Record], outgoing: Sequence[Outgoing]) -> Counter[str]:
    """Every record has one answer or one dead letter, with all that it came with; counts the reasons."""
    reasons: Counter[str] = Counter()
    answered: Counter[int] = Counter()
    places = {r.offset: r for r in records}
    for message in outgoing:
        if message.topic == "predictions":
            answered[Prediction.model_validate_json(message.value or b"").ref.offset] += 1
            continue
        headers = dict(message.headers[-11:])
        source = places[int(headers["trimtab-offset"])]
        answered[source.offset] += 1
        reasons[headers["trimtab-reason"].decode()] += 1
        if "trimtab-by-reference" in headers:
            assert headers["trimtab-sha256"].decode() == sha256(source.value or b"").hexdigest()
            assert (source.value or b"").startswith(message.value or b"")
        else:
            assert message.headers[: len(source.headers)] == source.headers
            assert (message.key, message.value) == (source.key, source.value)
        size = len(message.value or b"") + sum(len(name) + len(value or b"") for name, value in message.headers)
        assert size < MAX_DEAD_LETTER_BYTES + 10_000
    assert answered == Counter(dict.fromkeys(places, 1))
    return reasons


def classifier() -> Classifier:
    return Classifier(LengthModel(), Decoder(RULES), "predictions", "dead-letters", Metrics())


def test_twenty_thousand_broken_events_are_each_answered_or_parked() -> None:
    """A producer that goes wrong, or is made to, must cost its own messages and nobody else's."""
    one, reasons, answered = classifier(), Counter[str](), 0
    broken = messages("event", COUNT, seed=1)
    for first in range(0, COUNT, BATCH):
        records = [record(first + n, next(broken)) for n in range(BATCH)]
        found = check_answers(records, one.answer(records))
        reasons += found
        answered += BATCH - found.total()
    # The generator is worth something only if it reaches every way in which an event can be refused.
    assert reasons.keys() >= set(Reason) - {
        "closed_label_set",
        "class_name",
        "class_quota",
        "model_failed",
        "too_large",
    }
    assert answered > COUNT / 20


@settings(max_examples=150)
@given(st.lists(fields, max_size=8))
def test_any_json_is_answered_or_parked(found: list[dict[str, object]]) -> None:
    """What nobody thought of when the list of breaks was written."""
    values = [json.dumps({"stream": "notes", "event_id": f"e{n}", **one}).encode() for n, one in enumerate(found)]
    records = [record(n, (None, value, ())) for n, value in enumerate(values)]
    check_answers(records, classifier().answer(records))


def test_oversized_ones_are_parked_by_reference() -> None:
    """A dead letter that its topic does not take would stop the worker at that place for ever."""
    sizes = (999_999, 1_000_000, 1_000_001, 5_000_000)
    records = [record(n, (b"k", b"[" * size, ())) for n, size in enumerate(sizes)]
    reasons = check_answers(records, classifier().answer(records))
    assert reasons == {"malformed_json": 2, "too_large": 2}


def test_what_is_as_large_as_a_broker_takes_is_answered_or_parked_there(
    kafka: KafkaBroker, topics: Callable[[], str], tmp_path: Path
) -> None:
    """A message is more than its value: what an answer or a dead letter adds to it may be what the broker refuses."""
    good = encode(Report(event_id="good", stream="notes", observed_at=utc_now(), text="fine"))
    broken: list[Message] = [
        (b"k" * 1_040_000, b"{}", ()),
        (b"k", b"{}", (("tenant", b"h" * 1_040_000),)),
        (b"k", b"{}", (("h", b""),) * 85_000),
        (b"k", b"{" * 895_000, (("tenant", b"h" * 90_000),)),
        (b"k", b"{" * 1_040_000, ()),
    ]
    whole: list[Message] = [
        (b"k", good, ()),
        (b"k", good, (("ce_source", b"s" * 1_040_000), ("ce_id", b"1"))),
        (b"k", good, (("traceparent", b"t"),) * 50_000),
        (b"k" * 1_040_000, good, ()),
    ]
    pipeline = Pipeline(kafka, topics(), tmp_path / "worker.log")
    try:
        sent = [message for pair in itertools.zip_longest(broken, whole) for message in pair if message is not None]
        # As much as the broker takes unless told otherwise, and other clients send.
        producer = Producer({**kafka.client(), "message.max.bytes": 1_048_500})
        for key, value, headers in sent:
            producer.produce(pipeline.prefix + "events", value, key, headers=list(headers))
        assert producer.flush(60) == 0
        pipeline.start(batch_events=500, member_id=uuid.uuid4().hex)
        until(lambda: pipeline.committed() == len(sent), every=0.5)
        assert len(pipeline.answers()) == len(whole)
        letters = [dict(one.headers) for one in pipeline.dead_letters()]
        assert len({(one["trimtab-partition"], one["trimtab-offset"]) for one in letters}) == len(broken)
        assert {one["trimtab-bytes"] for one in letters} == {b"2", b"895000", b"1040000"}
        assert ("ce_id", b"1") in [
            header for one in kafka.consume_all(pipeline.prefix + "predictions") for header in one.headers
        ]
    finally:
        for worker in pipeline.workers:
            worker.kill()
            worker.wait()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def loop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    server = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    made = Loop(tmp_path_factory.mktemp("loop"), url=None if server is None else server.database())
    made.teach("calm1", "storm1")
    yield made
    made.close()


def decodes(loop: Loop, record: Record) -> bool:
    try:
        (loop.decoder.label if record.topic == "labels" else loop.decoder.prediction)(record)
    except DeadLetter:
        return False
    return True


def test_broken_predictions_and_labels_together_are_each_kept_or_parked(loop: Loop) -> None:
    """Whoever may write to the topics names places, versions and classes; the learner asks Kafka and its database."""
    at = loop.store.offsets()
    before = len(loop.store.outbox(10**6))
    records = []
    for topic, seed in (("predictions", 5), ("labels", 6)):
        for number, (key, value, headers) in enumerate(messages(topic[:-1], COUNT // 8, seed)):
            told = re.sub(rb'"(notes|probe)"', b'"pump"', value or b"")
            # Of its own event each, so that what comes first is not all that is kept.
            told = re.sub(rb'"([rw])-1"', rb'"\1-%d"' % number, told)
            records.append(Record(topic, 0, at[topic, 0] + number, key, told, headers))
    parked = sum(not decodes(loop, one) for one in records)
    for first in range(0, len(records), BATCH // 10):
        batch = records[first : first + BATCH // 10]
        loop.joiner.step(Batch(batch, {}, {(batch[-1].topic, 0): batch[-1].offset + 1}, 1))
    assert loop.store.offsets() == {where: offset + COUNT // 8 for where, offset in at.items()}
    assert len(loop.store.outbox(10**6)) - before == parked
    assert COUNT / 40 < parked < len(records) - COUNT / 40
    # All of what is asked of the places must be names that Kafka can have.


def test_broken_labels_are_each_learned_or_parked(loop: Loop) -> None:
    """Labels come from clients that nobody controls, and one that ends the learner ends it again at each start."""
    decoder = Decoder(RULES)
    parked = 0
    accepted: list[Label] = []
    for number, message in enumerate(messages("label", COUNT // 4, seed=2)):
        try:
            accepted.append(decoder.label(record(number, message)))
        except DeadLetter:
            parked += 1
    assert parked > COUNT / 20
    assert len(accepted) > COUNT / 80
    # All in one batch, as a learner that was away finds them.
    told = [label.model_copy(update={"stream": STREAM}).model_dump_json().encode() for label in accepted]
    first = loop.store.offsets()["labels", 0]
    records = [Record("labels", 0, first + number, None, value) for number, value in enumerate(told)]
    loop.joiner.step(Batch(records, {}, {("labels", 0): first + len(records)}, 1))
    assert loop.store.offsets()["labels", 0] == first + len(told)


def test_extreme_windows_are_answered_and_learned_without_harm(loop: Loop) -> None:
    """Before a stream has learned a class, its events are answered without being looked at; the learner looks."""
    for number, value in enumerate((1.7e308, -1.7e308, 5e-324, None)):
        event_id = f"extreme{number}"
        loop.predict(event_id)
        place = Place(topic="telemetry", partition=0, offset=int.from_bytes(event_id.encode()[:6], "big"))
        event = Telemetry(
            event_id=event_id, stream=STREAM, observed_at=utc_now(), channels=list(CHANNELS), values=[[value] * 8]
        )
        loop.log.events[place] = Record("telemetry", 0, place.offset, None, encode(event))
        loop.label(event_id, "calm")
    assert loop.learner.announce(loop.now)


def test_broken_control_messages_are_each_let_through_or_refused() -> None:
    """Whoever may write to the control topic must not be able to end the learner with it."""
    gate = Gate(ControlSettings(protected_by_acls=True))
    outcomes: Counter[str] = Counter()
    for _, value, headers in messages("control", COUNT // 4, seed=3):
        try:
            gate.admit(value or b"", dict(headers))
        except Refused:
            outcomes["refused"] += 1
        else:
            outcomes["admitted"] += 1
    assert outcomes["refused"] > COUNT / 20
    assert outcomes["admitted"] > COUNT / 80


def test_thousands_of_broken_messages_through_a_real_kafka(
    kafka: KafkaBroker, topics: Callable[[], str], tmp_path: Path
) -> None:
    """Keys, headers, sizes and compression are the client's and the broker's business, and they differ from ours."""
    pipeline = Pipeline(kafka, topics(), tmp_path / "worker.log")
    try:
        broken = [(key, value, headers) for key, value, headers in messages("event", 3_000, seed=4)]
        kafka.produce(pipeline.prefix + "events", broken)
        pipeline.start(batch_events=500, member_id=uuid.uuid4().hex)
        until(lambda: pipeline.committed() == len(broken), every=0.5)
        sent = {(r.partition, r.offset): r for r in kafka.consume_all(pipeline.prefix + "events")}
        answered = Counter((p.ref.partition, p.ref.offset) for p in pipeline.answers())
        for letter in pipeline.dead_letters():
            headers = dict(letter.headers[-9:])
            place = int(headers["trimtab-partition"]), int(headers["trimtab-offset"])
            answered[place] += 1
            assert (letter.key, letter.value) == (sent[place].key, sent[place].value)
            assert letter.headers[: len(sent[place].headers)] == sent[place].headers
        assert answered == Counter(dict.fromkeys(sent, 1))
    finally:
        for worker in pipeline.workers:
            worker.kill()
            worker.wait()
