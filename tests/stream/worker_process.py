"""A worker process with a small model and faults to order, for tests that kill, break and restart it.

Run as ``python -m tests.stream.worker_process CONFIG_JSON``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from monitoring.metrics import Metrics
from stream.batches import BatchSettings, KafkaReader, KafkaWriter, Outgoing, TopicTail
from stream.events import Decoder, Event, Record, Report, StreamRules
from stream.kafka import KafkaSettings
from stream.model import Answer, Model
from stream.service import Health, HttpSettings, Shell
from stream.worker import Classifier, Parts, Worker


class LengthModel(Model):
    """Answers a report with its length; its version is the last announcement it read."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.version, self.seconds = "v0.0", seconds

    def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
        version = self.version
        if self.seconds:
            threading.Event().wait(self.seconds)
        return [Answer(str(len(e.text) if isinstance(e, Report) else len(e.values)), (), 0.5, version) for e in events]

    def announce(self, key: bytes, value: bytes | None) -> None:
        self.version = (value or b"").decode()

    def catching_up(self) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        pass


class Faulty:
    """Raises at the nth call of the stage that the configuration names, and a model from then on: once is no fault."""

    def __init__(self, stage: str, at: int) -> None:
        self.stage, self.left = stage, at

    def __call__(self, stage: str) -> None:
        if stage == self.stage:
            self.left -= 1
            if self.left == 0 or (self.left < 0 and stage == "predict"):
                raise RuntimeError(f"ordered fault in {stage}")


def main(config: dict[str, Any]) -> int:
    kafka = KafkaSettings(bootstrap_servers=config["bootstrap"])
    fault = Faulty(config.get("fault", ""), config.get("fault_at", 3))
    metrics, health = Metrics(), Health("model-versions", "source")
    shell = Shell(f"worker-{os.getpid()}", None, HttpSettings(port=config.get("port", 0)), health, metrics)
    model = LengthModel(config.get("seconds", 0.0))

    class FaultyDecoder(Decoder):
        def event(self, record: Record) -> Event:
            fault("decode")
            return super().event(record)

    class FaultyModel(LengthModel):
        def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
            fault("predict")
            return model.predict(stream, events)

        def announce(self, key: bytes, value: bytes | None) -> None:
            model.announce(key, value)

    class FaultyWriter(KafkaWriter):
        def _produce(self, messages: Sequence[Outgoing]) -> None:
            fault("produce")
            super()._produce(messages)

        def _call(self, action: Callable[[], Any]) -> None:
            fault("commit")
            super()._call(action)

        def close(self) -> None:
            fault("close")
            super().close()

    def connect() -> Parts:
        reader = KafkaReader(
            kafka.confluent(),
            config["group"],
            [config["events"]],
            BatchSettings(batch_events=config.get("batch_events", 10), session_seconds=6),
            config.get("member_id"),
        )
        writer = FaultyWriter(
            kafka.confluent(), reader, config.get("guarantee", "at_least_once"), config["group"] + "-0", metrics
        )
        rules = [StreamRules("notes", "text"), StreamRules("probe", "telemetry", channels=("a", "b"))]
        classifier = Classifier(
            FaultyModel(), FaultyDecoder(rules), config["predictions"], config["dead_letters"], metrics, time.time
        )
        return Parts(reader, writer, classifier, FaultyModel(), TopicTail(kafka.confluent(), config["versions"]))

    Worker(shell, connect)
    return shell.run()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    sys.exit(main(json.loads(sys.argv[1])))
