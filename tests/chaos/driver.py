"""Publishes events and labels, in a process of its own, and remembers in a file what was sent and where it lies.

Run as ``python -m tests.chaos.driver CONFIG_JSON``. On SIGTERM it publishes the labels that are still to come, waits
until the broker has everything, and ends with 0; with 1 where something could not be sent, which makes the run void.

The file holds one JSON object a line: `event` and `bad` with their place once the broker has them, `label` when it is
sent and its number once the broker has it.
"""

from __future__ import annotations

import heapq
import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaError, Message, Producer

from stream.events import Label, Telemetry, encode
from tests.integration.probe import FREQUENCIES, window

STREAM = "probe"
BAD = (b"{", b"\xff\xfe{}", b'{"event_id": "x"}', b"[" * 5_000, b"", b'{"event_id": 1e400}')


@dataclass(order=True)
class Due:
    """A label and when it is to be sent, in seconds since the start."""

    at: float
    number: int
    label: Label = field(compare=False)


class Plan:
    """What is sent, drawn from a seed.

    Of 100 events 85 are labelled: of 100 of those 12 wrongly at first, 8 for a time only, 10 twice. One label in ten
    comes before its event, one in ten late.
    """

    def __init__(self, seed: int, late_seconds: float) -> None:
        self._chance = random.Random(seed)
        self._late = late_seconds
        self._number = 0
        self._labels = 0

    def event(self) -> tuple[Telemetry, str]:
        """The next event and its true class."""
        name = self._chance.choice(sorted(FREQUENCIES))
        self._number += 1
        return window(STREAM, name, self._number), name

    def bad(self) -> bytes | None:
        """Once in 40, something that is no event."""
        return self._chance.choice(BAD) if self._chance.random() < 0.025 else None

    def labels(self, event: Telemetry, true: str, now: float) -> Iterator[Due]:
        """The labels of one event, each with its time; one that is due before `now` comes before the event."""
        chance, at = self._chance, datetime.now(UTC)
        if chance.random() > 0.85:
            return
        when = chance.random()
        first = now - 1 if when < 0.1 else now + chance.uniform(0, self._late) if when < 0.2 else now + chance.random()
        fate = chance.random()
        wrong = chance.choice(sorted(FREQUENCIES.keys() - {true}))
        names: list[str | None] = [wrong, true] if fate < 0.12 else [true, None] if fate < 0.2 else [true]
        for step, name in enumerate(names):
            said = Label(
                event_id=event.event_id,
                stream=STREAM,
                label=name,
                labeller="ops",
                labelled_at=at + timedelta(seconds=step),
            )
            due = first + step * chance.uniform(0, 3)
            yield self._due(due, said)
            if 0.2 <= fate < 0.3:
                yield self._due(due + chance.uniform(0, 3), said)

    def _due(self, at: float, label: Label) -> Due:
        self._labels += 1
        return Due(at, self._labels, label)


def main(config: dict[str, Any]) -> int:
    ending: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ending.append(number))
    plan = Plan(config["seed"], config["late_seconds"])
    failed: list[str] = []
    producer = Producer(
        {
            "bootstrap.servers": config["bootstrap"],
            "partitioner": "murmur2_random",
            "enable.idempotence": True,
            "linger.ms": 5,
            "delivery.timeout.ms": 600_000,
            "log_level": 0,
        }
    )
    with Path(config["journal"]).open("a") as file:

        def note(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        def send(topic: str, key: str, value: bytes, **line: Any) -> None:
            def delivered(error: KafkaError | None, message: Message) -> None:
                if error is not None:
                    failed.append(str(error))
                else:
                    note(**line, partition=message.partition(), offset=message.offset())

            producer.produce(topic, value, key, on_delivery=delivered)
            producer.poll(0)

        def say(due: Due) -> None:
            said = due.label
            note(kind="said", number=due.number, event_id=said.event_id, label=said.label)
            send(
                config["labels"],
                said.event_id,
                encode(said),
                kind="label",
                number=due.number,
                event_id=said.event_id,
                label=said.label,
                at=said.labelled_at.isoformat(),
            )

        waiting: list[Due] = []
        began, turn = time.monotonic(), 0
        while not ending and not failed:
            now = time.monotonic() - began
            while waiting and waiting[0].at <= now:
                say(heapq.heappop(waiting))
            event, true = plan.event()
            for due in plan.labels(event, true, now):
                if due.at < now:
                    say(due)
                else:
                    heapq.heappush(waiting, due)
            send(config["events"], event.event_id, encode(event), kind="event", event_id=event.event_id)
            if (bad := plan.bad()) is not None:
                send(config["events"], "bad", bad, kind="bad")
            turn += 1
            while (left := turn / config["rate"] - (time.monotonic() - began)) > 0 and not ending:
                producer.poll(left)
        while waiting:
            say(heapq.heappop(waiting))
        unsent = producer.flush(300)
        note(kind="end", left=unsent, failed=failed[:3])
    return 1 if unsent or failed else 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
