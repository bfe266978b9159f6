"""The worker: read a batch, decode, predict, write, commit. It holds no state but the model.

::

    Kafka ──▶ KafkaReader (thread) ──▶ bounded channel ──▶ classifying agent ──▶ KafkaWriter ──▶ Kafka
                                                             │ decode ▸ predict ▸ write ▸ commit
    model-versions ──▶ TopicTail (thread) ──▶ Model.announce ┘

Reading begins once `model-versions` has been read whole, so a worker never answers by an older
revision than the one in service. An event that makes the model fail is found and becomes a dead letter.
An error that says `RetryLater` rewinds to the last commit; any other ends the process, and the batch in
question stays uncommitted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256

import mode

from monitoring.metrics import Metrics
from monitoring.tracing import Tracing, replaced, timed
from stream.batches import Batch, Outgoing, Reader, TopicTail, Writer
from stream.errors import DeadLetter, Reason, RetryLater, TrimtabError
from stream.events import Decoder, Event, Headers, Record, dead_letter_headers, encode_prediction
from stream.model import Answer, Model
from stream.service import Shell

logger = logging.getLogger(__name__)

PASSED_ON = frozenset({"ce_id", "ce_type", "ce_source", "ce_time", "traceparent", "tracestate"})
MAX_DEAD_LETTER_BYTES = 900_000
KEPT_BYTES = 65_536
"""What is copied of a message that is too large for a dead letter."""
KEY_KEPT_BYTES = 1_000
MAX_PASSED_ON_BYTES = 12_000
POISON_IN_A_ROW = 10
"""Events that may fail the model one after another, none answered between them, before the model is at fault."""
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)


class Classifier:
    """A batch in, its predictions and dead letters out; no Kafka, no Faust.

    Args:
        model: answers events.
        decoder: knows the streams.
        predictions: topic that answers go to.
        dead_letters: topic that refused messages go to.
        metrics: where the counts go.
        clock: the wall clock in seconds since the epoch.
        tracing: where stages and traced events become spans; None where nothing is traced.
    """

    def __init__(
        self,
        model: Model,
        decoder: Decoder,
        predictions: str,
        dead_letters: str,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self._model, self._decoder, self._metrics, self._clock = model, decoder, metrics, clock
        self._predictions, self._dead_letters = predictions, dead_letters
        self._failed_in_a_row = 0

    def answer(self, records: Sequence[Record]) -> list[Outgoing]:
        """One message for every record: its prediction, or itself as a dead letter."""
        outgoing: list[Outgoing] = []
        streams: dict[str, list[tuple[Record, Event]]] = defaultdict(list)
        with self._stage("decode"):
            for record in records:
                try:
                    event = self._decoder.event(record)
                except DeadLetter as refusal:
                    outgoing.append(self.dead_letter(refusal, record))
                else:
                    streams[event.stream].append((record, event))
        with self._stage("predict"):
            answers_of = self._all_answers({s: [event for _, event in members] for s, members in streams.items()})
        for stream, members in streams.items():
            self._metrics.events.labels(stream).inc(len(members))
            answered: list[tuple[Record, Event]] = []
            answers: list[Answer] = []
            for (record, event), answer in zip(members, answers_of[stream], strict=True):
                if isinstance(answer, Exception):
                    detail = f"the model fails on it alone: {type(answer).__name__}: {answer}"
                    outgoing.append(
                        self.dead_letter(DeadLetter(Reason.MODEL_FAILED, "", detail, event.event_id), record)
                    )
                else:
                    answered.append((record, event))
                    answers.append(answer)
            outgoing.extend(self._predict(stream, answered, answers))
        return outgoing

    def _all_answers(self, streams: Mapping[str, Sequence[Event]]) -> dict[str, list[Answer | Exception]]:
        """Each stream's answers, all streams at once where the model can, else one after another."""
        if len(streams) > 1:
            try:
                found = self._model.predict_all(streams)
            except TrimtabError:
                raise
            except Exception as error:
                logger.info("%d streams at once: %s: %s; one after another", len(streams), type(error).__name__, error)
            else:
                for stream, events in streams.items():
                    _check_count(stream, found[stream], events)
                self._failed_in_a_row = 0
                return {stream: list(answers) for stream, answers in found.items()}
        return {stream: self._answers(stream, events) for stream, events in streams.items()}

    def _answers(self, stream: str, events: Sequence[Event]) -> list[Answer | Exception]:
        """The model's answer to each event, or the error of one that makes the model fail.

        Such events are found by halving: k of them among n cost at most 2 k log2(n) passes over parts of the batch. Two
        halves may be answered by two revisions, where one was swapped in between; each answer names its own.

        Raises:
            Exception: what the model raised, where the model is at fault and not the events: it fails on every one of
                several, or on more than `POISON_IN_A_ROW` of them with no answer in between.
        """
        answers = self._halve(stream, events)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if len(errors) == len(events) > 1:
            raise errors[0]
        return answers

    def _halve(self, stream: str, events: Sequence[Event]) -> list[Answer | Exception]:
        try:
            answers = self._model.predict(stream, events)
        except TrimtabError:
            raise
        except Exception as error:
            if len(events) > 1:
                middle = len(events) // 2
                return [*self._halve(stream, events[:middle]), *self._halve(stream, events[middle:])]
            self._failed_in_a_row += 1
            if self._failed_in_a_row > POISON_IN_A_ROW:
                raise
            return [error]
        _check_count(stream, answers, events)
        self._failed_in_a_row = 0
        return list(answers)

    def _predict(
        self, stream: str, members: Sequence[tuple[Record, Event]], answers: Sequence[Answer]
    ) -> list[Outgoing]:
        now = self._clock()
        predicted_at = datetime.fromtimestamp(now, UTC)
        outgoing = []
        for (record, event), answer in zip(members, answers, strict=True):
            value = encode_prediction(
                event,
                record,
                label=answer.label,
                probabilities=answer.probabilities,
                novelty=answer.novelty,
                model_version=answer.model_version,
                predicted_at=predicted_at,
            )
            key = event.event_id.encode()
            outgoing.append(Outgoing(self._predictions, key, value, passed_on(record.headers)))
        if self._tracing is not None:
            outgoing = [self._traced(*one) for one in zip(outgoing, members, answers, strict=True)]
        waited = [max(0.0, now - record.timestamp_ms / 1000) for record, _ in members]
        self._metrics.prediction_latency.labels(stream).observe_many(waited)
        ages = [max(0.0, now - event.observed_at.timestamp()) for _, event in members]
        self._metrics.event_age.labels(stream).observe_many(ages)
        self._metrics.novelty.labels(stream).observe_many([answer.novelty for answer in answers])
        self._metrics.predictions.labels(stream).inc(len(outgoing))
        for revision, count in Counter(answer.model_version for answer in answers).items():
            self._metrics.answered(stream, revision, count)
        return outgoing

    def _traced(self, message: Outgoing, member: tuple[Record, Event], answer: Answer) -> Outgoing:
        """The prediction under a span of its event's trace, where the event is traced."""
        assert self._tracing is not None
        record, event = member
        about = {"trimtab.stream": event.stream, "trimtab.version": answer.model_version}
        made = self._tracing.event("answer event", record.headers, **record_attributes(record), **about)
        return message if made is None else message._replace(headers=replaced(message.headers, made))

    def dead_letter(self, refusal: DeadLetter, record: Record) -> Outgoing:
        """The record with its bytes untouched and the refusal in added headers."""
        self._metrics.dead_letters.labels(known_stream(self._decoder, record), refusal.reason).inc()
        logger.info("dead letter %s[%d]@%d: %s", record.topic, record.partition, record.offset, refusal)
        return dead_letter(self._dead_letters, refusal, record, datetime.fromtimestamp(self._clock(), UTC))

    def _stage(self, name: str) -> AbstractContextManager[object]:
        return timed(self._metrics.stage_seconds, name, self._tracing)


def _check_count(stream: str, answers: Sequence[Answer], events: Sequence[Event]) -> None:
    if len(answers) != len(events):
        raise RuntimeError(f"stream {stream!r}: {len(answers)} answers for {len(events)} events")


def dead_letter(topic: str, refusal: DeadLetter, record: Record, at: datetime) -> Outgoing:
    """The message for the dead-letters topic; of one too large for it the beginning, its checksum and its place."""
    headers = dead_letter_headers(refusal, record, at)
    value = record.value or b""
    size = len(value) + len(record.key or b"") + sum(_header_bytes(header) for header in headers)
    if size <= MAX_DEAD_LETTER_BYTES:
        return Outgoing(topic, record.key, record.value, tuple(headers))
    whole = {"trimtab-by-reference": "1", "trimtab-bytes": str(len(value)), "trimtab-sha256": sha256(value).hexdigest()}
    added = [*headers[len(record.headers) :], *((name, text.encode()) for name, text in whole.items())]
    key = record.key if len(record.key or b"") <= KEY_KEPT_BYTES else None
    return Outgoing(topic, key, value[:KEPT_BYTES], tuple(added))


def passed_on(headers: Headers) -> Headers:
    """CloudEvents attributes and the trace context of an event, for its prediction; none that would make it large."""
    if not headers:
        return ()
    found = tuple(header for header in headers if header[0] in PASSED_ON)
    if sum(map(_header_bytes, found)) <= MAX_PASSED_ON_BYTES:
        return found
    kept = tuple(header for header in found if _header_bytes(header) <= MAX_PASSED_ON_BYTES // len(PASSED_ON))
    return tuple({name: (name, value) for name, value in kept}.values())


def _header_bytes(header: tuple[str, bytes]) -> int:
    """A header's size in the log, its two lengths with it."""
    name, value = header
    return len(name.encode()) + len(value or b"") + 10


def record_attributes(record: Record) -> dict[str, str | int]:
    """Where a message lies, as spans name it."""
    return {
        "messaging.system": "kafka",
        "messaging.destination.name": record.topic,
        "messaging.destination.partition.id": str(record.partition),
        "messaging.kafka.offset": record.offset,
    }


def known_stream(decoder: Decoder, record: Record) -> str:
    """The stream's name where the record names a configured one, else `unknown`: a bounded metric label."""
    value = record.value or b""
    if len(value) < 1_000_000:
        for name in decoder.rules:
            if b'"' + name.encode() + b'"' in value:
                return name
    return "unknown"


@dataclass(frozen=True, slots=True)
class Parts:
    """What the worker is wired from; each is a small interface with a real and a test form."""

    reader: Reader
    writer: Writer
    classifier: Classifier
    model: Model
    tail: TopicTail
    tracing: Tracing | None = None


class Worker:
    """The Faust app of a worker process.

    Args:
        shell: the app, its pages and its end.
        connect: makes the parts, in a thread, once the app starts; it may raise.
        queued_batches: how many batches may be read ahead of the model.
    """

    def __init__(self, shell: Shell, connect: Callable[[], Parts], queued_batches: int = 2) -> None:
        self.shell, self._connect = shell, connect
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._working = ThreadPoolExecutor(1, thread_name_prefix="work")
        self._ending = threading.Event()
        self._caught_up = asyncio.Event()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._read_ended = asyncio.Event()
        self._parts: Parts | None = None
        self._channel = shell.app.channel(maxsize=queued_batches)
        shell.draining.append(self._drain)
        self._declare()

    @property
    def parts(self) -> Parts:
        """The wired parts; there once the app has started."""
        assert self._parts is not None
        return self._parts

    def _declare(self) -> None:
        worker, app = self, self.shell.app

        @app.service
        class Announcements(mode.Service):  # type: ignore[misc]
            """Reads `model-versions` whole before the first batch, then follows it."""

            @mode.Service.task  # type: ignore[untyped-decorator]
            async def follow(self) -> None:
                await worker._guard(worker._follow_versions)

        @app.service
        class Batches(mode.Service):  # type: ignore[misc]
            """Reads batches and feeds the channel; a full channel stops the reading."""

            @mode.Service.task  # type: ignore[untyped-decorator]
            async def read(self) -> None:
                await worker._guard(worker._read_batches)

        @app.agent(self._channel)  # type: ignore[untyped-decorator]
        async def classify(stream) -> None:  # type: ignore[no-untyped-def]
            async for batch in stream:
                await worker._guard(partial(worker._answer, batch))

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a piece of the worker; whatever leaves it ends the process."""
        try:
            await work()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._ending.set()
            self.shell.fail(error)

    async def _follow_versions(self) -> None:
        loop = asyncio.get_running_loop()
        self._parts = await loop.run_in_executor(self._working, self._connect)
        health, tail, model = self.shell.health, self.parts.tail, self.parts.model

        def announce(record: Record) -> None:
            model.announce(record.key or b"", record.value)

        def catch_up() -> None:
            with model.catching_up():
                tail.catch_up(announce)

        with ThreadPoolExecutor(1, thread_name_prefix="versions") as thread:
            for attempt in range(1_000_000):
                try:
                    await loop.run_in_executor(thread, catch_up)
                    break
                except RetryLater as error:
                    health.waiting("model-versions", str(error))
                    logger.warning("%s; trying again", error)
                    await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            health.ready("model-versions")
            self._caught_up.set()
            while not self._ending.is_set():
                for record in await loop.run_in_executor(thread, tail.poll, 0.1):
                    await loop.run_in_executor(thread, announce, record)
            await loop.run_in_executor(thread, tail.close)

    async def _read_batches(self) -> None:
        try:
            await self._caught_up.wait()
            await self._read_until_ending()
        finally:
            self._read_ended.set()

    async def _read_until_ending(self) -> None:
        loop, reader, health = asyncio.get_running_loop(), self.parts.reader, self.shell.health
        attempt = 0
        while not self._ending.is_set():
            try:
                batch = await loop.run_in_executor(self._reading, reader.read, 0.2)
                attempt = 0
            except RetryLater as error:
                health.waiting("source", str(error))
                logger.warning("reading: %s; trying again", error)
                await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                attempt += 1
                continue
            health.ready("source")
            if batch is not None:
                self._in_flight += 1
                self._idle.clear()
                await self._channel.put(batch)
            for topic, lag in reader.lag().items():
                self.shell.metrics.consumer_lag.labels(topic).set(lag)

    async def _answer(self, batch: Batch) -> None:
        if self.shell.health.failure is not None:
            return  # a batch before this one failed: nothing after it may be committed
        loop, parts = asyncio.get_running_loop(), self.parts
        try:
            await loop.run_in_executor(self._working, self._answer_and_commit, batch)
            self.shell.health.ready("sink")
        except RetryLater as error:
            logger.warning("writing: %s; rewinding to the last commit", error)
            self.shell.health.waiting("sink", str(error))
            parts.reader.rewind()
            await asyncio.sleep(RETRY_SECONDS[0])
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    def _answer_and_commit(self, batch: Batch) -> None:
        parts = self.parts
        if not parts.reader.current(batch):
            return  # its partitions were given up or rewound since it was read
        self.shell.metrics.batch_events.observe(len(batch.records))
        if parts.tracing is None:
            parts.writer.write(batch, parts.classifier.answer(batch.records))
            return
        headers, count = (record.headers for record in batch.records), len(batch.records)
        with parts.tracing.batch("answer", headers, **{"messaging.batch.message_count": count}):
            parts.writer.write(batch, parts.classifier.answer(batch.records))

    async def _finish(self) -> None:
        await self._read_ended.wait()
        await self._idle.wait()

    async def _drain(self) -> None:
        """Stop reading, finish and commit what was read, leave the group."""
        self._ending.set()
        loop = asyncio.get_running_loop()
        if self._parts is None:
            return
        if self.shell.health.failure is None and self._caught_up.is_set():
            try:
                await asyncio.wait_for(self._finish(), timeout=30)
            except TimeoutError:
                logger.warning("a batch was still being answered after 30 s; it will be repeated")
        await loop.run_in_executor(self._working, self.parts.writer.close)
        await loop.run_in_executor(self._reading, self.parts.reader.close)
        self.parts.model.close()
