"""Every way in which a label can come, on a real Kafka through a real learner, and what is left of it in the end.

One learner lives through all of it; each test looks at one promise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from confluent_kafka import Producer

from replay.store import Example, Quarantined
from stream.events import Record, utc_now
from stream.join import Score
from tests.deployment import Deployment, label
from tests.integration.probe import STREAM, check_head, deployed, end, publish, store_of, window
from tests.kafka import KafkaBroker
from tests.scrape import Scrape
from tests.waiting import until

STREAMS: dict[str, Any] = {
    "probe": {**STREAM, "new_classes": {"per_day": 4}},
    "valve": {**STREAM, "labels": ["open", "shut"], "closed": True},
    "crowd": {**STREAM, "labellers": "majority"},
}
SAID = 34
"""Labels of the stream `probe` that can be used, each time that one is counted."""
HEADERS = (("tenant", b"one"), ("traceparent", b"00-1-2-01"))


@dataclass
class Outcome:
    """What was published, and what the learner made of it."""

    final: dict[str, str]
    """Of the stream `probe`, the label that must count in the end, by event id."""
    bad: dict[str, tuple[str, bytes | None]]
    """By message key: why it must be refused, and its bytes."""
    deployment: Deployment
    labels: dict[str, float]
    refusals: dict[str, float]
    scored: float
    examples: dict[str, Example]
    scores: dict[str, Score]
    quarantined: list[Quarantined]
    letters: dict[str, Record]


@pytest.fixture(scope="module")
def outcome(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Play every case once, end the learner, and read what it left."""
    with deployed(kafka, tmp_path_factory.mktemp("labels"), STREAMS) as deployment:
        yield play(deployment)


def play(deployment: Deployment) -> Outcome:
    """The story; see the tests for what each part of it is to show."""
    learner = deployment.start("learner")
    deployment.start("worker")
    now = utc_now()

    def says(event: str, name: str | None, seconds: int = 0, who: str = "ops", stream: str = "probe") -> None:
        deployment.label(label(stream, event, name, now + timedelta(seconds=seconds), who))

    def counted(outcome: str, stream: str = "probe") -> float:
        return Scrape(deployment.learner_port).total("trimtab_labels_total", stream=stream, outcome=outcome)

    until(lambda: deployment.ready(deployment.learner_port) and deployment.ready(deployment.worker_port), seconds=180)

    # Labels that come before their event, and one whose event never comes.
    for number in range(3):
        says(f"fast-{number}", "fast")
    says("fast-999", "fast")
    until(lambda: counted("waiting") == 4)
    publish(deployment, [window("probe", name, number) for name in ("slow", "middle", "fast") for number in range(8)])
    publish(deployment, [window("valve", "slow", 100), window("crowd", "slow", 200)])

    for number in range(4):
        says(f"slow-{number}", "slow")
        says(f"middle-{number}", "middle")
    until(lambda: counted("learned") == 11)
    says("slow-0", "slow")  # the same message again
    says("slow-1", "slow", seconds=5)  # said again later
    says("middle-0", "slow")  # a mistake of the same moment, lying later in the log ...
    until(lambda: counted("corrected") == 1)
    says("middle-0", "middle", seconds=9)  # ... and its correction
    says("middle-1", "fast", seconds=-60)  # an older opinion that arrives late
    says("middle-2", "slow", seconds=3)
    says("middle-3", None, seconds=3)  # withdrawn
    says("slow-2", "fast", seconds=3, who="qa")  # another labeller disagrees, later
    says("slow-3", "middle", seconds=-3, who="qa")  # and one disagreed earlier
    for who, name in (("a", "open"), ("b", "open"), ("c", "shut")):
        says("slow-200", name, seconds=ord(who), who=who, stream="crowd")
    says("slow-100", "open", stream="valve")
    until(lambda: counted("withdrawn") == 1 and counted("disagreed") == 2 and counted("learned", "valve") == 1)
    until(lambda: counted("disagreed", "crowd") == 1)

    # Three classes so far; a day may bring four.
    for number, name in ((4, "fourth"), (5, "fifth"), (6, "sixth"), (7, "fourth")):
        says(f"slow-{number}", name)
        until(lambda: counted("learned") + counted("quarantined") == 12 + number - 4, every=0.2)  # noqa: B023

    bad = bad_labels()
    producer = Producer({**deployment.kafka.client(), "message.max.bytes": 1_040_000})
    for key, (_, value) in bad.items():
        producer.produce(deployment.topics.name("labels"), value, key, headers=list(HEADERS))
    assert producer.flush(120) == 0

    # The log lets go of all events.
    events = deployment.topics.name("telemetry")
    for partition, after in deployment.kafka.end_offsets(events).items():
        deployment.kafka.delete_records(events, partition, after)
    for number in (4, 5):
        says(f"middle-{number}", "middle")
    until(lambda: counted("too_late") == 2)
    says("middle-4", "middle", seconds=7)  # it is not asked for again
    says("slow-7", "slow", seconds=7)  # what was learned before can still be corrected
    until(lambda: counted("corrected") == 5)
    until(lambda: len(deployment.records("dead_letters")) >= len(bad))
    # The lag is of what was read; each message is counted once it was kept.
    until(lambda: Scrape(deployment.learner_port).total("trimtab_dead_letters_total") >= len(bad))
    until(lambda: Scrape(deployment.learner_port).total("trimtab_labels_total", stream="probe") >= SAID)

    scrape = Scrape(deployment.learner_port)
    assert end(learner) == 0
    with store_of(deployment) as store:
        examples = {row.event_id: row for row in store.examples("probe")}
        scores = {row.event_id: row for row in store.scores("probe")}
        quarantined = store.quarantined("probe")
    return Outcome(
        final={
            **{f"fast-{number}": "fast" for number in range(3)},
            "slow-0": "slow",
            "slow-1": "slow",
            "slow-2": "fast",
            "slow-3": "slow",
            "slow-4": "fourth",
            "slow-7": "slow",
            "middle-0": "middle",
            "middle-1": "middle",
            "middle-2": "slow",
        },
        bad=bad,
        deployment=deployment,
        labels=scrape.by("trimtab_labels_total", "outcome", stream="probe"),
        refusals=scrape.by("trimtab_dead_letters_total", "reason"),
        scored=scrape.total("trimtab_scored_total", stream="probe"),
        examples=examples,
        scores=scores,
        quarantined=quarantined,
        letters={(record.key or b"").decode(): record for record in deployment.records("dead_letters")},
    )


def bad_labels() -> dict[str, tuple[str, bytes | None]]:
    """Labels that cannot be used, by the key under which they are published: why not, and their bytes."""
    good = {
        "event_id": "slow-0",
        "stream": "probe",
        "label": "slow",
        "labeller": "ops",
        "labelled_at": "2026-01-01T00:00:00Z",
    }

    def made(**changed: object) -> bytes:
        return json.dumps({**good, **changed}).encode()

    return {
        "torn": ("malformed_json", b'{"event_id": "slow-0", "stre'),
        "not an object": ("invalid_field", b'["slow-0", "slow"]'),
        "binary": ("malformed_json", b"\xff\xfe\x00\x01"),
        "no value": ("malformed_json", None),
        "another major": ("schema_version", made(schema_version="2.0")),
        "unknown stream": ("unknown_stream", made(stream="nowhere")),
        "no label": ("invalid_field", json.dumps({k: v for k, v in good.items() if k != "label"}).encode()),
        "number": ("invalid_field", made(label=7)),
        "no zone": ("invalid_field", made(labelled_at="2026-01-01T00:00:00")),
        "certain": ("invalid_field", made(confidence=1.5)),
        "not a number": ("not_finite", made(confidence=float("nan"))),
        "no event": ("invalid_field", made(event_id="")),
        "empty name": ("class_name", made(label="  ")),
        "long name": ("class_name", made(label="x" * 129)),
        "control character": ("class_name", made(label="slow\u0007")),
        "not in the closed set": ("closed_label_set", made(stream="valve", label="ajar")),
        "large": ("too_large", made(label="x" * 1_000_001)),
    }


def test_a_label_that_comes_before_its_event_is_learned_when_the_event_comes(outcome: Outcome) -> None:
    """Labels and predictions travel on different topics; nobody keeps their order."""
    assert {outcome.examples[f"fast-{number}"].label for number in range(3)} == {"fast"}
    assert outcome.labels["waiting"] == 4


def test_a_label_for_an_unknown_event_waits_and_teaches_nothing(outcome: Outcome) -> None:
    """A typing error in an event id must neither be learned nor stop anything."""
    assert "fast-999" not in outcome.examples
    assert "fast-999" not in outcome.scores
    with store_of(outcome.deployment) as store:
        assert store.known({("probe", "fast-999")}).labels[("probe", "fast-999")]["ops"].label == "fast"


def test_what_counts_in_the_end_is_what_is_learned(outcome: Outcome) -> None:
    """Twice, corrected, withdrawn, overruled, too late: the store holds the labels that count, and no other."""
    assert {event: row.label for event, row in outcome.examples.items()} == outcome.final


def test_the_head_is_that_of_the_final_labels_alone(outcome: Outcome) -> None:
    """After any number of corrections nothing of the mistakes may be left in the model."""
    check_head(outcome.deployment, "probe", outcome.final)
    check_head(outcome.deployment, "valve", {"slow-100": "open"})
    check_head(outcome.deployment, "crowd", {"slow-200": "open"})


def test_every_label_is_counted_by_what_became_of_it(outcome: Outcome) -> None:
    """The sum of the outcomes is what an operator compares with what the labellers say they sent."""
    assert outcome.labels == {
        "learned": 13,
        "corrected": 5,
        "withdrawn": 1,
        "repeated": 3,
        "superseded": 2,
        "waiting": 4,
        "disagreed": 2,
        "quarantined": 2,
        "too_late": 2,
    }


def test_new_class_names_beyond_the_quota_are_set_aside(outcome: Outcome) -> None:
    """A labeller that sends an id for a class name would otherwise make ten thousand classes in a night."""
    assert [(row.label.event_id, row.label.label) for row in outcome.quarantined] == [
        ("slow-5", "fifth"),
        ("slow-6", "sixth"),
    ]
    assert {row.reason for row in outcome.quarantined} == {"class_quota"}
    assert outcome.quarantined[0].place.topic == outcome.deployment.topics.name("labels")
    with store_of(outcome.deployment) as store:
        assert set(store.classes("probe")) == {"slow", "middle", "fast", "fourth"}


def test_a_label_whose_event_has_left_the_log_is_counted_once_and_not_learned(outcome: Outcome) -> None:
    """Silence here would look like a labeller who stopped."""
    assert outcome.labels["too_late"] == 2
    assert not {"middle-4", "middle-5"} & outcome.examples.keys()
    assert {"middle-4", "middle-5"} <= outcome.scores.keys()


def test_what_was_served_is_scored_by_the_label_that_counts(outcome: Outcome) -> None:
    """Accuracy is of what users saw, against what is now known to be true, each event once."""
    wanted = {**outcome.final, "middle-4": "middle", "middle-5": "middle"}
    assert {event: row.label for event, row in outcome.scores.items()} == wanted
    # One was scored and then withdrawn.
    assert outcome.scored == len(wanted) + 1
    served = outcome.deployment.answered()
    assert all(row.predicted == served[event].label for event, row in outcome.scores.items())


def test_a_bad_label_is_parked_with_its_bytes_and_headers(outcome: Outcome) -> None:
    """Whoever mends the labeller needs to see exactly what it sent, and to send it again."""
    assert set(outcome.letters) == set(outcome.bad)
    for key, (reason, value) in outcome.bad.items():
        record = outcome.letters[key]
        added = dict(record.headers)
        assert added["trimtab-reason"].decode() == reason, key
        assert added["trimtab-topic"].decode() == outcome.deployment.topics.name("labels")
        if key == "large":
            assert added["trimtab-by-reference"] == b"1"
            first = int(added["trimtab-partition"]), int(added["trimtab-offset"])
            there = {(r.partition, r.offset): r for r in outcome.deployment.records("labels")}
            assert there[first].value == value
            assert added["trimtab-bytes"] == b"%d" % len(value)
            assert record.value == value[: len(record.value or b"")]
        else:
            assert record.value == value, key
            assert record.headers[: len(HEADERS)] == HEADERS


def test_bad_labels_are_counted_by_reason(outcome: Outcome) -> None:
    """The alert on dead letters goes by this."""
    wanted: dict[str, float] = {}
    for reason, _ in outcome.bad.values():
        wanted[reason] = wanted.get(reason, 0) + 1
    assert outcome.refusals == wanted


def test_labellers_who_disagree_are_combined_by_the_streams_rule(outcome: Outcome) -> None:
    """`latest` takes the last word, `majority` the most voices; the setting must reach the join."""
    assert outcome.examples["slow-2"].label == "fast"
    assert outcome.examples["slow-3"].label == "slow"
    with store_of(outcome.deployment) as store:
        assert [row.label for row in store.examples("crowd")] == ["open"]
