"""A learner that does not lead joins its share of the partitions, and leaves to the leader what only one may decide.

::

    its partitions ──▶ Follower.step ──▶ one transaction: join index, inbox, offsets
                                            │
                       the leader ◀── inbox ┘   (labels, and whatever meets something that is known)

What most messages are, predictions of events that nobody has spoken of, goes into the join index at once. All else is
left in the inbox as it was read, in order, and the leader joins it as if it had read it itself: class quotas,
quarantine, exam membership and what is learned stay decisions of one learner, and do not hang on who read a message.

Each partition is owned under an epoch of its own, which whoever it is assigned to raises. A learner that was stopped,
and whose partitions went elsewhere, finds a higher one at its next transaction and keeps nothing of it. A follower's
transaction and the leader's take turns, so that a prediction and its label never miss each other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from learner.joining import JoinTopics
from monitoring.metrics import Metrics
from replay.store import LearnerStore
from stream.batches import Batch, KafkaReader, Partition
from stream.errors import DeadLetter, RetryLater
from stream.events import Decoder, Place, Prediction, Record
from stream.join import Known, join
from stream.service import Health

logger = logging.getLogger(__name__)

MOST_WAITING = 50_000
"""Messages in the inbox beyond which followers wait for the leader; the rest waits in Kafka."""

RETRY_SECONDS = 0.5

Starts = Callable[[Sequence[Partition]], Mapping[Partition, int]]
Assigned = Callable[[Sequence[Partition]], None]


class Follower:
    """Joins what it is assigned, without a model.

    Args:
        store: the database that the learners share.
        member: this learner's name.
        decoder: knows the streams.
        topics: names.
        connect: joins the consumer group; called with where partitions begin, and whom to tell of an assignment.
        metrics: where its lag is shown.
        health: told why it cannot read.
        clock: the time, in UTC.
    """

    def __init__(
        self,
        store: LearnerStore,
        member: str,
        decoder: Decoder,
        topics: JoinTopics,
        connect: Callable[[Starts, Assigned], KafkaReader],
        metrics: Metrics,
        health: Health,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._member, self._decoder, self._topics = store, member, decoder, topics
        self._connect, self._metrics, self._health, self._clock = connect, metrics, health, clock
        self._reader: KafkaReader | None = None
        self._offsets: dict[Partition, int] = {}
        self._claims: dict[Partition, int] = {}

    def follow(self, seconds: float, ending: Callable[[], bool]) -> None:
        """Join for so long, or until the process is ending. Called from one thread, as `close` is.

        Raises:
            Superseded: another learner has partitions that this one still took for its own.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until and not ending():
            try:
                if self._reader is None:
                    self._reader = self._connect(self.starts, self.assigned)
                batch = self._reader.read(0.1)
                if batch is not None and self._reader.current(batch):
                    self.step(batch)
                self._health.ready("source")
            except RetryLater as error:
                logger.warning("following: %s; trying again", error)
                self._health.waiting("source", str(error))
                if self._reader is not None:
                    self._reader.rewind()
                time.sleep(RETRY_SECONDS)
        if self._reader is not None:
            for topic, lag in self._reader.lag().items():
                self._metrics.consumer_lag.labels(topic).set(lag)

    def close(self) -> None:
        """Leave the group, so that others have its partitions at once."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def assigned(self, partitions: Sequence[Partition]) -> None:
        """Partitions were just assigned: whoever had them before may not write of them any more."""
        self._claims.update(self._store.claim_partitions(self._member, partitions, self._clock()))

    def starts(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Where each partition is to be read from."""
        self._offsets = self._store.offsets()
        return {partition: self._offsets[partition] for partition in partitions if partition in self._offsets}

    def step(self, batch: Batch) -> None:
        """Store one batch and its offsets, in one transaction.

        Raises:
            RetryLater: the broker or the database is away, or the leader is behind; read the batch again.
            Superseded: another learner has one of the batch's partitions; nothing was kept.
        """
        if self._store.inbox_span() > MOST_WAITING:
            raise RetryLater(f"more than {MOST_WAITING:,} messages wait for the leader")
        read = [(record, self._prediction(record)) for record in batch.records]
        keys = {(found.stream, found.event_id) for _, found in read if found is not None}
        claims = {partition: self._claims[partition] for partition in batch.ends}
        with self._store.share(claims, self._clock()) as tx:
            # Read within the transaction: the leader writes nothing before its end.
            known, beyond = self._store.known(keys), self._store.beyond(keys)
            met = beyond.keys() | known.served.keys() | known.labels.keys() | known.learned.keys() | known.scores.keys()
            names = {stream: self._store.aliases(stream) for stream in {stream for stream, _ in keys}}
            fresh: list[tuple[Prediction, Place]] = []
            left: list[Record] = []
            for record, found in read:
                if found is None or (found.stream, found.event_id) in met:
                    left.append(record)
                # A correction of what was served changes nothing here, as for the leader.
                elif found.supersedes is None:
                    name = None if found.label is None else names[found.stream].get(found.label, found.label)
                    fresh.append((found.model_copy(update={"label": name}), record.place))
            tx.advance({partition: (self._offsets.get(partition), end) for partition, end in batch.ends.items()})
            tx.record(join(Known(), fresh, []))
            tx.leave_to_leader(left)
        self._offsets.update(batch.ends)

    def _prediction(self, record: Record) -> Prediction | None:
        """The prediction in the record; None for what is none, and for what cannot be read."""
        if record.topic != self._topics.predictions:
            return None
        try:
            return self._decoder.prediction(record)
        except DeadLetter:
            return None
