"""Whatever comes, every message is answered or in dead letters with its bytes, and nothing crashes."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.control import ControlSettings, Gate, Refused
from monitoring.metrics import Metrics
from stream.batches import Batch
from stream.errors import DeadLetter, Reason
from stream.events import Decoder, Label, Place, Prediction, Record, Telemetry, encode, utc_now
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
        headers = dict(message.headers[-9:])
        source = places[int(headers["trimtab-offset"])]
        answered[source.offset] += 1
        reasons[headers["trimtab-reason"].decode()] += 1
        assert message.headers[: len(source.headers)] == source.headers
        if "trimtab-by-reference" not in headers:
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


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    made = Loop(tmp_path_factory.mktemp("loop"))
    made.teach("calm1", "storm1")
    yield made
    made.close()


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
