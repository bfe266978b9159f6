"""Answers are corrected once each, whatever interrupts, on a real Kafka with its transactions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.batches import Outgoing
from stream.errors import Superseded, TrimtabError
from stream.events import Decoder, Event, Place, Prediction, Record, Report, StreamRules, encode
from stream.lookback import Lookback
from stream.model import Answer
from stream.reissue import Reissue, Suspects, TransactionalSender, since, survey
from stream.search import Search
from tests.kafka import KafkaBroker

AT = datetime(2026, 3, 1, tzinfo=UTC)
SUSPECTS = Suspects("notes", {"v2": 5})
DECODER = Decoder([StreamRules("notes", "text"), StreamRules("other", "text")])
TRACE = (("traceparent", b"00-trace"),)


def answer(number: int, version: str, *, stream: str = "notes", supersedes: str | None = None) -> Prediction:
    """An answer to event `number`."""
    return Prediction(
        event_id=f"e{number}",
        stream=stream,
        label=f"by {version}",
        probabilities={},
        novelty=0.5,
        model_version=version,
        ref=Place(topic="reports", partition=number % 2, offset=number // 2),
        observed_at=AT,
        predicted_at=AT + timedelta(seconds=number),
        supersedes=supersedes,
    )


def records(answers: Sequence[Prediction]) -> list[Record]:
    return [Record("predictions", 0, at, one.event_id.encode(), encode(one)) for at, one in enumerate(answers)]


VERSIONS = st.sampled_from(["v1.9", "v2.4", "v2.5", "v2.77", "v3.1"])


@given(st.lists(st.tuples(st.integers(0, 6), VERSIONS, st.booleans()), max_size=40))
def test_what_is_open_is_what_was_answered_last_by_a_suspect(steps: list[tuple[int, str, bool]]) -> None:
    """One that was corrected must not be corrected again, and one whose correction went bad must be."""
    made = [answer(number, name, supersedes="v0.1" if again else None) for number, name, again in steps]
    found = survey(records(made), SUSPECTS, DECODER)
    bad = {"v2.5", "v2.77"}
    wanted: dict[str, str] = {}
    for number, name, again in steps:
        if name in bad:
            wanted[f"e{number}"] = name
        elif again:
            wanted.pop(f"e{number}", None)
    assert {one.event_id: one.version for one in found.open.values()} == wanted
    assert found.total == sum(name in bad for _, name, _ in steps)
    assert found.read == len(steps)


def test_other_streams_and_foreign_messages_are_passed_over() -> None:
    """A topic is shared; another stream's v2 is another model."""
    found = survey(
        [*records([answer(1, "v2.9", stream="other")]), Record("predictions", 0, 9, None, b"{")], SUSPECTS, DECODER
    )
    assert (found.total, found.open, found.read) == (0, {}, 2)


class Mended:
    """Answers with the text, as v3.1; raises where it is told to."""

    def __init__(self, poison: str = "", version: str = "v3.1") -> None:
        self.poison, self.version = poison, version

    def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
        if self.poison in [event.event_id for event in events]:
            raise ValueError("not a number")
        return [Answer(event.text, ((event.text, 1.0),), 0.1, self.version) for event in events]  # type: ignore[union-attr]

    def announce(self, key: bytes, value: bytes | None) -> None: ...

    def catching_up(self) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None: ...


class Interrupted(Exception):
    """What a kill looks like to the code that it stops."""


class Dying:
    """Sends, and dies at the nth call: before it, or after what it wrote was committed."""

    def __init__(self, inner: TransactionalSender, at: int, *, committed: bool) -> None:
        self.inner, self.left, self.committed = inner, at, committed

    def send(self, messages: Sequence[Outgoing]) -> None:
        self.left -= 1
        if self.left == 0 and not self.committed:
            # Written and not committed, as when the process is killed in between.
            producer = self.inner._producer
            producer.begin_transaction()
            for topic, key, value, headers in messages:
                producer.produce(topic, value=value, key=key, headers=list(headers))
            producer.flush(30)
            raise Interrupted
        self.inner.send(messages)
        if self.left == 0:
            raise Interrupted


class Field:
    """A broker with events, and answers to them by good and bad revisions."""

    def __init__(self, kafka: KafkaBroker, prefix: str) -> None:
        self.kafka, self.prefix = kafka, prefix
        self.reports, self.predictions = f"{prefix}reports", f"{prefix}predictions"
        kafka.create_topic(self.reports, 1)
        kafka.create_topic(self.predictions, 2)
        events = [Report(event_id=f"e{n}", stream="notes", observed_at=AT, text=f"text {n}") for n in range(40)]
        kafka.produce(self.reports, [(one.event_id, encode(one), TRACE) for one in events])
        self.bad = {number for number in range(40) if number % 4}
        answers = [self.answer(n, "v2.7" if n in self.bad else "v1.3") for n in range(40)]
        # One was written twice by a worker that crashed.
        answers.append(self.answer(5, "v2.7"))
        kafka.produce(self.predictions, [(one.event_id, encode(one), ()) for one in answers])
        self.search, self.log = Search(self.client), Lookback(self.client)

    @property
    def client(self) -> dict[str, str]:
        return {"bootstrap.servers": self.kafka.bootstrap}

    def answer(self, number: int, version: str) -> Prediction:
        made = answer(number, version)
        return made.model_copy(update={"ref": Place(topic=self.reports, partition=0, offset=number)})

    def sender(self) -> TransactionalSender:
        return TransactionalSender(self.client, f"{self.prefix}reissue")

    def open(self) -> Mapping[tuple[str, int, int], object]:
        return survey(since(self.search, self.predictions, AT)[0], SUSPECTS, DECODER).open

    def run(self, sender: object, model: Mended | None = None, **options: object) -> object:
        reissue = Reissue(
            SUSPECTS,
            self.predictions,
            model or Mended(),
            DECODER,
            self.log,
            sender,
            7,
            **options,  # type: ignore[arg-type]
        )
        return reissue.run(self.open())  # type: ignore[arg-type]

    def corrections(self) -> list[tuple[Record, Prediction]]:
        found = self.kafka.consume_all(self.predictions, isolation="read_committed")
        pairs = [(record, Prediction.model_validate_json(record.value or b"")) for record in found]
        return [(record, one) for record, one in pairs if one.supersedes is not None]


@pytest.fixture
def field(kafka: KafkaBroker, topics: Callable[[], str]) -> Iterator[Field]:
    made = Field(kafka, topics())
    yield made
    made.search.close()
    made.log.close()


def test_each_is_corrected_once_whatever_interrupts(field: Field) -> None:
    """Killed while it writes, killed after a commit, overtaken by another: nobody gets two corrections, or none."""
    assert len(field.open()) == len(field.bad)
    quick = {"sleep": lambda seconds: None}
    for at, committed in ((2, False), (1, True), (1, False)):
        with pytest.raises(Interrupted):
            field.run(Dying(field.sender(), at, committed=committed), **quick)
    old = field.sender()
    new = field.sender()
    with pytest.raises(Superseded):
        field.run(old, **quick)
    done = field.run(new, **quick)
    assert field.open() == {}
    found = field.corrections()
    assert Counter(one.ref.offset for _, one in found) == Counter(dict.fromkeys(field.bad, 1))
    assert done.corrected == len(field.bad) - 14, "two transactions of seven were there already"  # type: ignore[attr-defined]
    for record, one in found:
        assert (one.supersedes, one.model_version) == ("v2.7", "v3.1")
        assert one.label == f"text {one.ref.offset}"
        assert one.event_id == f"e{one.ref.offset}"
        assert record.key == one.event_id.encode()
        assert record.headers == TRACE
    assert field.run(new, **quick).corrected == 0  # type: ignore[attr-defined]


def test_what_cannot_be_corrected_is_counted_and_keeps_nobody_waiting(field: Field) -> None:
    """One event that the model chokes on, one that has expired, one that was forgotten; all others are corrected."""
    field.kafka.delete_records(field.reports, 0, 2)  # takes e1, a suspect's, with it
    slept: list[float] = []
    done = field.run(
        field.sender(),
        Mended(poison="e7"),
        forgotten=lambda keys: [key for key in keys if key[1] == "e9"],
        clock=lambda: 0.0,
        sleep=slept.append,
    )
    assert (done.gone, done.failed, done.forgotten) == (1, 1, 1)  # type: ignore[attr-defined]
    assert done.corrected == len(field.bad) - 3 == len(field.corrections())  # type: ignore[attr-defined]
    # Seven a second, in transactions of seven: a second each, but for the last.
    assert slept[:-1] == [1.0] * (len(slept) - 1)
    assert sum(slept) == pytest.approx(len(field.bad) / 7)


def test_a_suspect_corrects_nobody(field: Field) -> None:
    """Asked for before the rollback, it would replace wrong answers by wrong answers."""
    with pytest.raises(TrimtabError, match="is itself to be corrected"):
        field.run(field.sender(), Mended(version="v2.8"))
    assert field.corrections() == []
