"""The contestants of `benchmarks.transport`, one a process: ``python -m benchmarks.contestants NAME CONFIG_JSON``.

All decode by `stream.events.Decoder`, answer with the same constant, encode the same full prediction with
`stream.events.encode_prediction`, write with idempotence and the partitioner that trimtab writes with, wait at most
5 ms to fill a request, and commit after as many events. Nothing here imports torch: this module also runs in
an environment that has no more than the contestants need.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from benchmarks.report import versions
from stream.events import Decoder, Event, Record, StreamRules, encode_prediction
from stream.model import Answer, Model

if TYPE_CHECKING:
    from stream.worker import Parts

STREAM = "notes"
RULES = [StreamRules(STREAM, "text")]
ANSWER = Answer(
    label="balance",
    probabilities=(("balance", 0.61), ("transfer", 0.2), ("pin_change", 0.1), ("bill_due", 0.05), ("pay_bill", 0.04)),
    novelty=0.07,
    model_version="v12.3456",
)
PACKAGES = ("confluent-kafka", "faust-streaming", "mode-streaming", "prometheus-client", "pydantic", "quixstreams")


class NullModel(Model):
    """Answers every event alike, at no cost."""

    def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
        return [ANSWER] * len(events)

    def announce(self, key: bytes, value: bytes | None) -> None:
        pass

    def catching_up(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        pass


def run_worker(config: Mapping[str, Any], model: Callable[[], Model] = NullModel) -> int:
    """The worker process, whole: Faust app, pages, metrics, channel, agent; only the model is ours.

    Args:
        config: bootstrap, group, source, predictions, dead_letters, versions, exactly_once, batch, rules?.
        model: makes the model, in the thread that connects.
    """
    from monitoring.metrics import Metrics
    from stream.batches import BatchSettings, Guarantee, KafkaReader, KafkaWriter, TopicTail
    from stream.kafka import KafkaSettings
    from stream.service import Health, HttpSettings, Shell
    from stream.worker import Classifier, Parts, Worker

    connection = KafkaSettings(bootstrap_servers=config["bootstrap"]).confluent()
    metrics, group = Metrics(), config["group"]
    shell = Shell(group, None, HttpSettings(), Health("model-versions", "source"), metrics)
    rules = [StreamRules(*rule) for rule in config.get("rules", [(STREAM, "text")])]

    def connect() -> Parts:
        made = model()
        settings = BatchSettings(batch_events=config["batch"])
        reader = KafkaReader(connection, group, [config["source"]], settings)
        guarantee: Guarantee = "exactly_once" if config["exactly_once"] else "at_least_once"
        writer = KafkaWriter(connection, reader, guarantee, f"{group}-0", metrics)
        classifier = Classifier(made, Decoder(rules), config["predictions"], config["dead_letters"], metrics)
        return Parts(reader, writer, classifier, made, TopicTail(connection, config["versions"]))

    Worker(shell, connect)
    return shell.run()


def run_bare(config: Mapping[str, Any]) -> int:
    """The least that keeps the guarantee: consume a batch, answer it, wait for the acknowledgements, commit."""
    exactly_once, target = config["exactly_once"], config["predictions"]
    consumer = Consumer(
        {
            "bootstrap.servers": config["bootstrap"],
            "group.id": config["group"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    transactional = {"transactional.id": config["group"] + "-0", "transaction.timeout.ms": 10_000}
    failed: list[KafkaError] = []
    producer = Producer(
        {
            **_producing(config),
            "delivery.report.only.error": True,
            "on_delivery": lambda error, message: failed.append(error),
            **(transactional if exactly_once else {}),
        }
    )
    if exactly_once:
        producer.init_transactions(30)
    consumer.subscribe([config["source"]])
    decode, running = Decoder(RULES).event, _until_told()
    while running():
        messages = consumer.consume(config["batch"], 0.02)
        if not messages:
            continue
        if exactly_once:
            producer.begin_transaction()
        ends: dict[tuple[str, int], int] = {}
        now = datetime.now(UTC)
        for message in messages:
            if message.error() is not None:
                raise KafkaException(message.error())
            record = _record(message)
            event = decode(record)
            producer.produce(target, value=encoded(event, record, ANSWER, now), key=event.event_id.encode())
            ends[record.topic, record.partition] = record.offset + 1
        offsets = [TopicPartition(topic, partition, end) for (topic, partition), end in ends.items()]
        if exactly_once:
            producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata(), 30)
            producer.commit_transaction(30)
        else:
            if producer.flush(60) or failed:
                raise RuntimeError(f"not acknowledged: {failed[:1]}")
            consumer.commit(offsets=offsets, asynchronous=False)
    consumer.close()
    return 0


def run_quix(config: Mapping[str, Any]) -> int:
    """A Quix Streams application with one function, bytes in and bytes out, so that it decodes nothing itself."""
    from quixstreams import Application, message_context

    app = Application(
        broker_address=config["bootstrap"],
        consumer_group=config["group"],
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once" if config["exactly_once"] else "at-least-once",
        commit_every=config["batch"],
        commit_interval=1.0,
        auto_create_topics=False,
        use_changelog_topics=False,
        producer_extra_config=_producing(config),
        state_dir=tempfile.mkdtemp(prefix="benchmark-quix-"),
        loglevel="WARNING",
    )
    source = app.topic(config["source"], value_deserializer="bytes", key_deserializer="bytes")
    target = app.topic(config["predictions"], value_serializer="bytes", key_serializer="bytes")
    decode = Decoder(RULES).event

    def answer(value: bytes, key: bytes, timestamp: int, headers: Any) -> bytes:
        place = message_context()
        record = Record(place.topic, place.partition, place.offset, key, value, (), timestamp)
        return encoded(decode(record), record, ANSWER, datetime.now(UTC))

    app.dataframe(source).apply(answer, metadata=True).to_topic(target)
    app.run()
    return 0


def encoded(event: Event, record: Record, answer: Answer, at: datetime) -> bytes:
    """A full prediction, as the worker writes it."""
    return encode_prediction(
        event,
        record,
        label=answer.label,
        probabilities=answer.probabilities,
        novelty=answer.novelty,
        model_version=answer.model_version,
        predicted_at=at,
    )


def _producing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bootstrap.servers": config["bootstrap"],
        "partitioner": "murmur2_random",
        "enable.idempotence": True,
        "linger.ms": 5,
        "queue.buffering.max.messages": 1_000_000,
    }


def _record(message: Message) -> Record:
    return Record(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        (),
        message.timestamp()[1],
    )


def _until_told() -> Callable[[], bool]:
    """True until SIGTERM comes."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    return lambda: not told


def main(name: str, config: Mapping[str, Any]) -> int:
    """Run one contestant until it is told to end, or print what is installed here."""
    if name == "versions":
        sys.stdout.write(json.dumps(versions(PACKAGES)))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    return {"worker": run_worker, "bare": run_bare, "quix": run_quix}[name](config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
