"""The worker on a real Kafka: one answer an event, nothing skipped, whatever breaks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stream.events import Prediction, Record, Report, encode, utc_now
from tests.kafka import KafkaBroker, free_port
from tests.scrape import Scrape
from tests.waiting import until

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Pipeline:
    """Topics of one test and the worker processes started on them."""

    kafka: KafkaBroker
    prefix: str
    log: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, partitions in (("events", 2), ("predictions", 2), ("dead-letters", 1), ("versions", 1)):
            self.kafka.create_topic(self.prefix + name, partitions)

    def start(self, **config: Any) -> tuple[subprocess.Popen[bytes], int]:
        port = free_port()
        settings = {
            "bootstrap": self.kafka.bootstrap,
            "group": self.prefix + "group",
            "events": self.prefix + "events",
            "predictions": self.prefix + "predictions",
            "dead_letters": self.prefix + "dead-letters",
            "versions": self.prefix + "versions",
            "port": port,
            **config,
        }
        with self.log.open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.stream.worker_process", json.dumps(settings)],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        self.workers.append(worker)
        return worker, port

    def publish(self, first: int, count: int) -> None:
        reports = (report(number) for number in range(first, first + count))
        self.kafka.produce(self.prefix + "events", [(r.event_id.encode(), encode(r), ()) for r in reports])

    def answers(self) -> list[Prediction]:
        found = self.kafka.consume_all(self.prefix + "predictions", isolation="read_committed")
        return [Prediction.model_validate_json(record.value or b"") for record in found]

    def answered(self, count: int) -> bool:
        return len({p.event_id for p in self.answers()}) >= count

    def committed(self) -> int:
        return sum(o for o in self.kafka.committed(self.prefix + "group", self.prefix + "events").values() if o > 0)

    def dead_letters(self) -> list[Record]:
        return self.kafka.consume_all(self.prefix + "dead-letters", isolation="read_committed")


def report(number: int) -> Report:
    return Report(event_id=f"e{number}", stream="notes", source="test", observed_at=utc_now(), text="x" * number)


@pytest.fixture
def pipeline(kafka: KafkaBroker, topics: Callable[[], str], tmp_path: Path) -> Iterator[Pipeline]:
    made = Pipeline(kafka, topics(), tmp_path / "worker.log")
    yield made
    for worker in made.workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
    sys.stdout.write(made.log.read_text() if made.log.exists() else "")


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_every_event_is_answered_once_with_its_place(pipeline: Pipeline, guarantee: str) -> None:
    """The first promise: one prediction an event, naming where the event lies and the revision in service."""
    pipeline.kafka.produce(pipeline.prefix + "versions", [(b"notes/champion", b"v3.7", ())])
    pipeline.publish(0, 100)
    pipeline.start(guarantee=guarantee)
    until(lambda: pipeline.answered(100))
    answers = pipeline.answers()
    assert Counter(p.event_id for p in answers) == Counter(f"e{n}" for n in range(100))
    assert all(p.label == str(int(p.event_id[1:])) for p in answers)
    assert {p.model_version for p in answers} == {"v3.7"}
    places = {(r.topic, r.partition, r.offset): r for r in pipeline.kafka.consume_all(pipeline.prefix + "events")}
    for p in answers:
        event = places[(p.ref.topic, p.ref.partition, p.ref.offset)]
        assert event.key == p.event_id.encode()


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("stage", ["decode", "predict", "produce", "commit"])
def test_a_fault_never_lets_a_later_batch_be_committed(pipeline: Pipeline, stage: str, guarantee: str) -> None:
    """A batch that failed must be answered by the next process; a commit past it would lose its events."""
    if stage == "commit" and guarantee == "exactly_once":
        stage = "produce"  # offsets and answers are one transaction: there is no commit apart from it
    pipeline.publish(0, 100)
    worker, _ = pipeline.start(fault=stage, fault_at=4, guarantee=guarantee)
    assert worker.wait(120) == 1
    assert pipeline.committed() < 100
    pipeline.start(guarantee=guarantee)
    # A model that breaks while batches of one event come may take a few of them for poison first.
    until(lambda: pipeline.answered(100 - len(pipeline.dead_letters())))
    counts = Counter(p.event_id for p in pipeline.answers())
    counts.update(dict(letter.headers)["trimtab-event-id"].decode() for letter in pipeline.dead_letters())
    assert len(counts) == 100
    if guarantee == "exactly_once":
        assert set(counts.values()) == {1}


def test_killed_in_mid_stream_it_goes_on_with_nothing_lost(pipeline: Pipeline) -> None:
    """kill -9 is how processes really end; exactly once must still mean one answer for each event."""
    pipeline.publish(0, 300)
    worker, _ = pipeline.start(guarantee="exactly_once", member_id="w0", seconds=0.02)
    until(lambda: pipeline.answered(30))
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    pipeline.publish(300, 100)
    pipeline.start(guarantee="exactly_once", member_id="w0")
    until(lambda: pipeline.answered(400))
    assert Counter(p.event_id for p in pipeline.answers()) == Counter(f"e{n}" for n in range(400))


def test_sigterm_commits_what_was_answered_and_exits_cleanly(pipeline: Pipeline) -> None:
    """An ordered end repeats nothing, even at least once, so a rolling restart is invisible."""
    pipeline.publish(0, 200)
    worker, _ = pipeline.start(seconds=0.02)
    until(lambda: pipeline.answered(20))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(120) == 0
    assert pipeline.committed() == len(pipeline.answers())
    pipeline.start()
    until(lambda: pipeline.answered(200))
    assert set(Counter(p.event_id for p in pipeline.answers()).values()) == {1}


def test_a_second_sigterm_ends_at_once_and_loses_nothing(pipeline: Pipeline) -> None:
    """Whoever cannot wait for a slow batch must be able to say so, and what was in flight is then the next one's."""
    pipeline.publish(0, 40)
    worker, _ = pipeline.start(guarantee="exactly_once", member_id="w0", seconds=8)
    until(lambda: pipeline.answered(10))
    worker.send_signal(signal.SIGTERM)
    until(lambda: "finishing what is in flight" in pipeline.log.read_text())
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(120) == 128 + signal.SIGTERM
    assert not pipeline.answered(40)
    pipeline.start(guarantee="exactly_once", member_id="w0")
    until(lambda: pipeline.answered(40))
    assert Counter(p.event_id for p in pipeline.answers()) == Counter(f"e{n}" for n in range(40))


def test_a_slow_model_stops_the_reading(pipeline: Pipeline) -> None:
    """What is read ahead lies in memory, so a model that falls behind must leave the rest in the log."""
    pipeline.publish(0, 400)
    _, port = pipeline.start(seconds=1.5)
    until(lambda: pipeline.answered(20))
    read = 400 - Scrape(port).total("trimtab_consumer_lag_events")
    # Two batches of ten are queued, one is answered, one waits for its place in the queue.
    assert read <= pipeline.committed() + 40


def test_an_end_that_goes_wrong_is_still_an_end(pipeline: Pipeline) -> None:
    """A step of the end that raises must not leave a process behind that neither works nor goes away."""
    worker, _ = pipeline.start(fault="close", fault_at=1)
    pipeline.publish(0, 20)
    until(lambda: pipeline.answered(20))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(120) == 1


def test_bad_messages_are_parked_with_their_bytes_and_the_stream_goes_on(pipeline: Pipeline) -> None:
    """A bad producer must not stop a good one, and what it sent must still be there to look at."""
    good = encode(report(5))
    late = "2024-01-01T00:00:00Z"
    window = {"event_id": "t", "stream": "probe", "observed_at": late, "channels": ["a", "b"]}
    bad = {
        "malformed_json": b'{"event_id": "broken',
        "schema_version": good.replace(b'"1.0"', b'"2.0"'),
        "unknown_stream": good.replace(b'"notes"', b'"nowhere"'),
        "invalid_field": b'{"event_id": "x", "stream": "notes", "observed_at": "yesterday", "text": "a"}',
        "not_finite": json.dumps({**window, "values": [[1, float("nan")], [1, 2]]}).encode(),
        "ragged": json.dumps({**window, "values": [[1, 2], [1]]}).encode(),
        "missing_channel": json.dumps({**window, "channels": ["a"], "values": [[1, 2]]}).encode(),
        "text_too_long": encode(report(20_001)),
    }
    headers = (("tenant", b"one"),)
    messages = [(name.encode(), value, headers) for name, value in bad.items()]
    pipeline.kafka.produce(pipeline.prefix + "events", [*messages, (b"e5", good, headers)])
    _, port = pipeline.start()

    def quiet() -> bool:
        try:
            scrape = Scrape(port)
        except OSError:
            return False  # it does not answer yet
        name = "trimtab_consumer_lag_events"
        return name in scrape.names() and scrape.total(name) == 0

    until(quiet)


def test_not_ready_while_the_versions_topic_cannot_be_read(pipeline: Pipeline) -> None:
    """A load balancer or a person must see why a worker does not answer yet."""
    _, port = pipeline.start(versions=pipeline.prefix + "missing")
    until(lambda: "missing" in str(page(port, "/readyz")[1]))
    status, body = page(port, "/readyz")
    assert status == 503
    assert "model-versions" in body["waiting_for"]
    pipeline.publish(0, 5)
    assert pipeline.answers() == []


def page(port: int, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except OSError:
        return 0, {}
