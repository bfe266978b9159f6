"""Corrects the answers that a bad version gave: one new answer for each, once, however often it is interrupted.

::

    predictions, read whole from the moment on ──▶ what suspects answered and nobody corrected yet (`survey`)
    ──▶ the events, read back ──▶ the model in service ──▶ one transaction each few hundred: corrected predictions

No state is kept but the topic itself: what was corrected is there, committed or not there at all. A second one under
the same transactional id ends the first, whose open transaction is aborted before the second reads; so the two
together still correct each answer once. Readers must be `read_committed`, like the learner.

A corrected prediction has the `ref` of the one that it stands for, and names its revision in `supersedes`. The learner
scores what was served and does not join it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple, Protocol

from confluent_kafka import KafkaException, Producer

from stream.batches import FENCED, TRANSACTION_TIMEOUT_MS, Outgoing
from stream.errors import DeadLetter, RetryLater, Superseded, TrimtabError
from stream.events import Decoder, Event, Place, Record, encode_prediction, utc_now
from stream.join import EventKey
from stream.model import Answer, Model
from stream.search import Search
from stream.worker import passed_on

logger = logging.getLogger(__name__)

AT_ONCE = 500
"""The most answers in one transaction."""
ROUNDS = 5
"""How often the topic is read again for what suspects still answered meanwhile."""


@dataclass(frozen=True)
class Suspects:
    """The revisions of a stream whose answers are to be corrected.

    Args:
        since: by version, the first revision of it; later ones of the same version are suspects as well.
    """

    stream: str
    since: Mapping[str, int]

    def __contains__(self, name: object) -> bool:
        version, _, revision = str(name).partition(".")
        first = self.since.get(version)
        return first is not None and int(revision or 0) >= first


class Open(NamedTuple):
    """An answer by a suspect that nobody has corrected: the last one of its event's place."""

    event_id: str
    version: str
    label: str | None


@dataclass
class Radius:
    """How far suspects reached.

    Args:
        read: predictions of all streams that were looked at.
        answers: predictions by suspects, by (version, class); a class of None is no class.
        first: when the first of them was made.
        last: when the last was.
        corrections: how many answers were corrected already, by the version that they were of.
        by: the revisions that corrected them.
        open: by where the event lies, what is still to be corrected, in the order of the log.
    """

    read: int = 0
    answers: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    first: datetime | None = None
    last: datetime | None = None
    corrections: Counter[str] = field(default_factory=Counter)
    by: Counter[str] = field(default_factory=Counter)
    open: dict[tuple[str, int, int], Open] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Predictions by suspects."""
        return self.answers.total()

    @property
    def corrected(self) -> int:
        """Answers that were corrected already."""
        return self.corrections.total()


@dataclass
class Reissued:
    """What became of a correction.

    Args:
        corrected: answers sent.
        changed: of them, those of another class than before.
        gone: events that their topic no longer has, or that are not what was answered.
        failed: events on which the model fails.
        forgotten: events that were forgotten on request.
        by: the revisions that answered.
    """

    corrected: int = 0
    changed: int = 0
    gone: int = 0
    failed: int = 0
    forgotten: int = 0
    by: Counter[str] = field(default_factory=Counter)

    def plus(self, more: Reissued) -> Reissued:
        """Both together."""
        return Reissued(
            self.corrected + more.corrected,
            self.changed + more.changed,
            self.gone + more.gone,
            self.failed + more.failed,
            self.forgotten + more.forgotten,
            self.by + more.by,
        )


class EventLog(Protocol):
    """Reads events back; implemented by `stream.lookback.Lookback`."""

    def read(self, places: Iterable[Place]) -> Mapping[Place, Record]:
        """The records at `places`; those that are no longer held are absent."""
        ...


class Sender(Protocol):
    """Writes all of some messages, or none of them."""

    def send(self, messages: Sequence[Outgoing]) -> None:
        """Write them; returns once they can be read."""
        ...


class TransactionalSender:
    """One transaction for each call.

    Args:
        connection: librdkafka connection properties.
        transactional_id: whoever opens it last is the only one that can write; what was left open under it is aborted.

    Raises:
        RetryLater: the broker does not answer, or takes no transactions.
    """

    def __init__(self, connection: Mapping[str, Any], transactional_id: str) -> None:
        self._producer = Producer(
            {
                **connection,
                "partitioner": "murmur2_random",
                "transactional.id": transactional_id,
                "transaction.timeout.ms": TRANSACTION_TIMEOUT_MS,
                "linger.ms": 5,
            }
        )
        self._call(lambda: self._producer.init_transactions(30))

    def send(self, messages: Sequence[Outgoing]) -> None:
        """Write them all, or none.

        Raises:
            RetryLater: the broker is away; nothing of it can be read.
            Superseded: another one has opened this transactional id.
        """

        def write() -> None:
            self._producer.begin_transaction()
            for topic, key, value, headers in messages:
                self._producer.produce(topic, value=value, key=key, headers=list(headers))
            self._producer.commit_transaction(30)

        self._call(write)

    def close(self) -> None:
        """Give up what is open."""
        with suppress(KafkaException):
            self._producer.abort_transaction(5)

    def _call(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except KafkaException as error:
            cause = error.args[0]
            if cause.code() in FENCED or cause.fatal():
                raise Superseded(f"another correction of this stream took over: {cause.str()}") from error
            raise RetryLater(f"the transaction came to nothing: {cause.str()}") from error


def survey(
    records: Iterable[Record], suspects: Suspects, decoder: Decoder, told: Callable[[int], None] = lambda read: None
) -> Radius:
    """What suspects answered, and what of it is still to be corrected. Pure but for `told`.

    An answer is corrected once a later one of the same place, which supersedes it, is by no suspect.

    Args:
        records: of the predictions topic; those of one partition in the order of the log.
        told: called now and then with how many were read.
    """
    radius = Radius()
    for record in records:
        radius.read += 1
        if radius.read % 10_000 == 0:
            told(radius.read)
        try:
            found = decoder.prediction(record)
        except DeadLetter:
            continue  # not ours, or of a stream that is no longer configured
        if found.stream != suspects.stream:
            continue
        where = found.ref.topic, found.ref.partition, found.ref.offset
        if found.model_version in suspects:
            version = found.model_version.partition(".")[0]
            radius.answers[version, found.label] += 1
            made = found.predicted_at
            radius.first, radius.last = min(radius.first or made, made), max(radius.last or made, made)
            # A repeat after a crash, or a correction by one that is a suspect itself by now.
            radius.open[where] = Open(found.event_id, found.model_version, found.label)
        elif found.supersedes is not None and (before := radius.open.pop(where, None)) is not None:
            radius.corrections[before.version.partition(".")[0]] += 1
            radius.by[found.model_version] += 1
    return radius


def since(search: Search, topic: str, at: datetime, most: int | None = None) -> tuple[Iterator[Record], int]:
    """The messages of a topic from a moment on, partition by partition, and how many older ones of them are left out.

    Args:
        most: how many are read in all, the newest of each partition; None reads all.

    Raises:
        RetryLater: the broker does not answer.
    """
    spans = search.starts(topic, int(at.timestamp() * 1000))
    share = None if most is None else most // max(1, len(spans))
    firsts = {part: start if share is None else max(start, end - share) for part, (start, end) in spans.items()}
    records = (
        record
        for part, first in sorted(firsts.items())
        for record in search.between(topic, part, first, spans[part][1])
    )
    return records, sum(first - spans[part][0] for part, first in firsts.items())


class Reissue:
    """Answers again what suspects answered.

    Args:
        suspects: whose answers are corrected.
        predictions: name of the topic.
        model: answers now; none of its answers may be by a suspect.
        decoder: knows the streams.
        log: reads events back.
        sender: writes the corrections.
        rate: the most corrections a second.
        forgotten: which of some events were forgotten on request, and are not answered again.
        clock: seconds that only grow.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        suspects: Suspects,
        predictions: str,
        model: Model,
        decoder: Decoder,
        log: EventLog,
        sender: Sender,
        rate: float,
        *,
        forgotten: Callable[[Collection[EventKey]], Collection[EventKey]] = lambda keys: (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._suspects, self._predictions, self._model, self._decoder = suspects, predictions, model, decoder
        self._log, self._sender, self._rate, self._forgotten = log, sender, rate, forgotten
        self._clock, self._sleep = clock, sleep

    def run(
        self, open_answers: Mapping[tuple[str, int, int], Open], told: Callable[[Reissued], None] = lambda done: None
    ) -> Reissued:
        """Correct these answers, at most so many a second.

        Args:
            told: called after each transaction.

        Raises:
            RetryLater: the broker is away; what was sent by then stays, and a next run goes on from there.
            Superseded: another correction of the stream has begun.
            TrimtabError: the model in service is itself a suspect.
        """
        done, waiting = Reissued(), iter(open_answers.items())
        size = max(1, min(AT_ONCE, int(self._rate)))
        while chunk := dict(islice(waiting, size)):
            began = self._clock()
            self._correct(chunk, done)
            told(done)
            self._sleep(max(0.0, len(chunk) / self._rate - (self._clock() - began)))
        return done

    def _correct(self, chunk: Mapping[tuple[str, int, int], Open], done: Reissued) -> None:
        stream = self._suspects.stream
        buried = set(self._forgotten([(stream, one.event_id) for one in chunk.values()]))
        places = {
            Place(topic=topic, partition=partition, offset=offset): one
            for (topic, partition, offset), one in chunk.items()
            if (stream, one.event_id) not in buried
        }
        done.forgotten += len(chunk) - len(places)
        records = self._log.read(places)
        members: list[tuple[Record, Event, Open]] = []
        for place, one in places.items():
            event = self._event(records.get(place), one.event_id)
            if event is None:
                done.gone += 1
            else:
                members.append((records[place], event, one))
        answers = self._answers([event for _, event, _ in members])
        messages = []
        for (record, event, one), answer in zip(members, answers, strict=True):
            if answer is None:
                done.failed += 1
                continue
            if answer.model_version in self._suspects:
                raise TrimtabError(f"{answer.model_version}, which is in service, is itself to be corrected")
            value = encode_prediction(
                event,
                record,
                label=answer.label,
                probabilities=answer.probabilities,
                novelty=answer.novelty,
                model_version=answer.model_version,
                predicted_at=utc_now(),
                supersedes=one.version,
            )
            messages.append(Outgoing(self._predictions, event.event_id.encode(), value, passed_on(record.headers)))
        if messages:
            self._sender.send(messages)
        # Counted once they are there.
        for (_, _, one), answer in zip(members, answers, strict=True):
            if answer is not None:
                done.corrected += 1
                done.changed += answer.label != one.label
                done.by[answer.model_version] += 1

    def _event(self, record: Record | None, event_id: str) -> Event | None:
        if record is None:
            return None
        try:
            event = self._decoder.event(record)
        except DeadLetter:
            return None
        return event if (event.stream, event.event_id) == (self._suspects.stream, event_id) else None

    def _answers(self, events: Sequence[Event]) -> list[Answer | None]:
        """The model's answers; None for an event on which it fails alone."""
        if not events:
            return []
        try:
            return list(self._model.predict(self._suspects.stream, events))
        except TrimtabError:
            raise
        except Exception as error:
            if len(events) > 1:
                middle = len(events) // 2
                return [*self._answers(events[:middle]), *self._answers(events[middle:])]
            logger.warning("event %s cannot be answered again: %s", events[0].event_id, error)
            return [None]
