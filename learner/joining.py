"""One step of the learner: a batch of predictions and labels becomes one database transaction.

::

    decode ▸ what is known ▸ join ▸ read events back ▸ embed ▸ one transaction ▸ follow the ledger

The batch's offsets move in that same transaction, from their expected old value, so the learner can be
killed between any two of these steps: the batch is then joined again as if nothing had happened.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from learner.asking import Asker
from learner.encoders import Payload, payload
from learner.estimate import AccuracyEstimator
from learner.online import OnlineLearner
from learner.shadow import Event
from monitoring.drift import DriftMonitor
from monitoring.metrics import Metrics
from monitoring.tracing import Tracing
from replay.store import Content, LearnerStore, Outgoing, Quarantined, Reconciled, Transaction
from stream.batches import Batch, Partition
from stream.errors import DeadLetter, Reason, RetryLater
from stream.events import Decoder, Label, Place, Prediction, Record
from stream.join import Change, EventKey, Joined, Kind, join, touched
from stream.lookback import events_at
from stream.worker import dead_letter, known_stream, record_attributes

logger = logging.getLogger(__name__)

M = TypeVar("M", Label, Prediction)


@dataclass(frozen=True)
class JoinTopics:
    """The full names of the topics that joining reads and writes."""

    predictions: str
    labels: str
    dead_letters: str


class EventLog(Protocol):
    """Where events are read back from; `stream.lookback.Lookback` is the one over Kafka."""

    def read(self, places: Iterable[Place]) -> dict[Place, Record]:
        """The records at `places`; those that are no longer held are absent."""
        ...


class Joiner:
    """Joins batches into the store.

    Args:
        store: the learner's database.
        epoch: under which this learner owns it.
        decoder: knows the streams.
        lookback: reads events back from the log.
        learners: by stream, whose encoder embeds what is learned and who follows the ledger.
        drift: by stream, told of every answer and every score.
        topics: names.
        rules: by stream, how labellers who disagree are combined; see `stream.join.RULES`.
        metrics: where outcomes are counted.
        clock: the time, in UTC.
        asker: notices which events are worth a label; None where nobody is asked.
        tracing: where batches, and traced predictions and labels, become spans; None where nothing is traced.
        member: this learner's name where others join partitions of their own beside it (`learner.sharing`); None
            where one learner joins them all.
    """

    def __init__(
        self,
        store: LearnerStore,
        epoch: int,
        decoder: Decoder,
        lookback: EventLog,
        learners: Mapping[str, OnlineLearner],
        drift: Mapping[str, DriftMonitor],
        topics: JoinTopics,
        rules: Mapping[str, str],
        metrics: Metrics,
        clock: Callable[[], datetime],
        asker: Asker | None = None,
        tracing: Tracing | None = None,
        member: str | None = None,
    ) -> None:
        self._tracing, self._member = tracing, member
        self._claims: dict[Partition, int] = {}
        self._asker = asker
        self._store, self._epoch, self._decoder, self._lookback = store, epoch, decoder, lookback
        self._learners, self._drift, self._topics, self._rules = learners, drift, topics, rules
        self._metrics, self._clock = metrics, clock
        self._offsets: dict[Partition, int] = {}
        self._aliases: dict[str, dict[str, str]] = {}
        self.estimators = {stream: AccuracyEstimator() for stream in learners}

    def starts(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Where the store's offsets say that each partition is to be read from; told to the reader."""
        self._offsets = self._store.offsets()
        return {partition: self._offsets[partition] for partition in partitions if partition in self._offsets}

    def assigned(self, partitions: Sequence[Partition]) -> None:
        """Partitions were just assigned: whoever had them before may not write of them any more."""
        if self._member is not None:
            self._claims.update(self._store.claim_partitions(self._member, partitions, self._clock()))

    def take_in(self) -> Counter[str]:
        """Join what the others left for the leader; returns and raises as `step`, which then changed nothing."""
        if self._member is None:
            return Counter()
        received = self._store.inbox()
        if not received:
            return Counter()
        return self._step(Batch([one.record for one in received], {}, {}, 0), [one.id for one in received])

    def step(self, batch: Batch) -> Counter[str]:
        """Join one batch; returns, by stream, how many label outcomes changed what is learned.

        Raises:
            RetryLater: the broker or the database is away; nothing was kept, read the batch again.
            Superseded: another learner owns the store.
        """
        if self._tracing is None:
            return self._step(batch)
        headers, count = (record.headers for record in batch.records), len(batch.records)
        with self._tracing.batch("join", headers, **{"messaging.batch.message_count": count}):
            learned = self._step(batch)
            # Once it is kept: a batch that is read again would have its events twice in their traces.
            for record in batch.records:
                name = "learn event" if record.topic == self._topics.labels else "join event"
                self._tracing.event(name, record.headers, **record_attributes(record))
            return learned

    def _step(self, batch: Batch, taken: Sequence[int] = ()) -> Counter[str]:
        now = self._clock()
        predictions, labels, outgoing = self._decode(batch.records, now)
        predictions, labels, refused = self.learnable(predictions, labels)
        labels, quarantined = self._within_quota(labels, now)
        known = self._store.known(touched(predictions, labels))
        joined = join(known, predictions, labels, self._rules)
        moves = {p: (self._offsets.get(p), end) for p, end in batch.ends.items()}
        noticed = self._asker.notice(predictions, labels, known) if self._asker else []
        answered: Counter[str] = Counter()

        def also(tx: Transaction) -> None:
            if self._member is not None:
                tx.hold({partition: self._claims[partition] for partition in batch.ends})
                tx.clear_inbox(taken)
            tx.advance(moves)
            if self._asker:
                answered.update(self._asker.note(tx, noticed, labels))
            tx.quarantine(quarantined)
            tx.send(outgoing)

        with self._tracing.span("learn", changes=len(joined.changes)) if self._tracing else nullcontext():
            reconciled = self.apply(joined, now, also, touched(predictions, labels) - known.served.keys())
        self._offsets.update(batch.ends)
        for (stream, outcome), count in refused.items():
            self._metrics.labels.labels(stream, outcome).inc(count)
        self._count(joined, predictions, labels, quarantined, now)
        if self._asker:
            self._asker.count(answered)
        learned: Counter[str] = Counter()
        for (stream, outcome), count in reconciled.outcomes.items():
            self._metrics.labels.labels(stream, outcome).inc(count)
            if outcome in ("learned", "corrected", "withdrawn"):
                learned[stream] += count
        return learned

    def apply(
        self, joined: Joined, now: datetime, also: Callable[[Transaction], None], unserved: Collection[EventKey] = ()
    ) -> Reconciled:
        """Make what was joined true, and what `also` writes, in one transaction; then follow the ledger.

        Args:
            unserved: events that were joined as having no prediction yet.

        Raises:
            RetryLater: the broker or the database is away, or another learner stored such a prediction meanwhile;
                nothing was kept.
            Superseded: another learner owns the store.
        """
        contents, too_late = self._contents(joined.changes)
        events = _first_labelled(joined.changes, contents)
        trials = {
            stream: trial
            for stream, rows in events.items()
            if (trial := self._learners[stream].attempt(rows)) is not None
        }
        races = {
            stream: race
            for stream, rows in events.items()
            if (race := self._learners[stream].race_on(rows)) is not None
        }
        with self._store.transaction(self._epoch, now) as tx:
            if self._member is not None and tx.served_among(unserved):
                raise RetryLater("another learner has stored a prediction of the same events meanwhile")
            tx.record(joined)
            reconciled = tx.reconcile(joined.changes, contents, too_late)
            for stream, trial in trials.items():
                self._learners[stream].record_trial(tx, trial)
            for stream, race in races.items():
                self._learners[stream].record_race(tx, race)
            also(tx)
        for stream, trial in trials.items():
            self._learners[stream].settle_trial(trial)
        for stream, race in races.items():
            self._learners[stream].settle_race(race)
        for learner in self._learners.values():
            learner.follow()
        for stream in reconciled.unlearned:
            self._learners[stream].relearned()
        return reconciled

    def name_now(self, stream: str, name: str) -> str:
        """The name of a class since it was renamed or merged."""
        if stream not in self._aliases:
            self._aliases[stream] = self._store.aliases(stream)
        return self._aliases[stream].get(name, name)

    def closed_labels(self, stream: str) -> frozenset[str] | None:
        """The only names that labels of the stream may have; None where they are free."""
        return self._decoder.rules[stream].closed_labels

    def renamed(self, stream: str) -> None:
        """Names of the stream's classes have changed: know them anew."""
        self._aliases.pop(stream, None)

    def _decode(
        self, records: Sequence[Record], now: datetime
    ) -> tuple[list[tuple[Prediction, Place]], list[tuple[Label, Place]], list[Outgoing]]:
        predictions: list[tuple[Prediction, Place]] = []
        labels: list[tuple[Label, Place]] = []
        outgoing: list[Outgoing] = []
        for record in records:
            try:
                if record.topic == self._topics.labels:
                    labels.append((self._renamed(self._decoder.label(record)), record.place))
                else:
                    found = self._decoder.prediction(record)
                    # What is scored is what was served first; a correction of it changes nothing here.
                    if found.supersedes is None:
                        # A worker may not have heard of the new name yet.
                        predictions.append((self._renamed(found), record.place))
            except DeadLetter as refusal:
                self._metrics.dead_letters.labels(known_stream(self._decoder, record), refusal.reason).inc()
                logger.info("dead letter %s[%d]@%d: %s", record.topic, record.partition, record.offset, refusal)
                message = dead_letter(self._topics.dead_letters, refusal, record, now)
                outgoing.append(Outgoing(message.topic, message.key, message.value, message.headers))
        return predictions, labels, outgoing

    def learnable(
        self, predictions: list[tuple[Prediction, Place]], labels: list[tuple[Label, Place]]
    ) -> tuple[list[tuple[Prediction, Place]], list[tuple[Label, Place]], Counter[tuple[str, str]]]:
        """Without what speaks of a forgotten event, and without labels of what can no longer be corrected."""
        beyond = self._store.beyond(touched(predictions, labels))
        if not beyond:
            return predictions, labels, Counter()
        outcomes = {"forgotten": "forgotten", "settled": "correction_too_late"}
        refused = Counter(
            (label.stream, outcomes[beyond[label.stream, label.event_id]])
            for label, _ in labels
            if (label.stream, label.event_id) in beyond
        )
        return (
            [row for row in predictions if beyond.get((row[0].stream, row[0].event_id)) != "forgotten"],
            [row for row in labels if (row[0].stream, row[0].event_id) not in beyond],
            refused,
        )

    def _renamed(self, message: M) -> M:
        if message.label is None:
            return message
        name = self.name_now(message.stream, message.label)
        return message if name == message.label else message.model_copy(update={"label": name})

    def _within_quota(
        self, labels: list[tuple[Label, Place]], now: datetime
    ) -> tuple[list[tuple[Label, Place]], list[Quarantined]]:
        """The labels to join, and those set aside because their class name is beyond the stream's bounds."""
        kept: list[tuple[Label, Place]] = []
        aside: list[Quarantined] = []
        named: dict[str, set[str]] = defaultdict(set)
        for label, _ in labels:
            if label.label is not None:
                named[label.stream].add(label.label)
        known: dict[str, set[str]] = {}
        total: dict[str, int] = {}
        made_today: dict[str, int] = {}
        # Asked by name: what a batch costs must not grow with the classes that there are, or were invented.
        for stream, names in named.items():
            configured = self._learners[stream].plan.labels
            known[stream] = self._store.known_classes(stream, names | configured)
            total[stream] = self._store.class_total(stream) + len(configured - known[stream])
            known[stream] |= configured
            made_today[stream] = self._store.classes_created_on(stream, now.date())
        for label, place in labels:
            if label.label is None:
                kept.append((label, place))
                continue
            stream = label.stream
            if label.label not in known[stream]:
                plan = self._learners[stream].plan
                if total[stream] >= plan.max_classes or made_today[stream] >= plan.max_new_classes_a_day:
                    aside.append(Quarantined(label, place, str(Reason.CLASS_QUOTA)))
                    continue
                known[stream].add(label.label)
                total[stream] += 1
                made_today[stream] += 1
            kept.append((label, place))
        return kept, aside

    def _contents(self, changes: Sequence[Change]) -> tuple[dict[EventKey, Content], set[EventKey]]:
        """What was read back and embedded, by event; and the events that the log no longer holds."""
        wanted = {change.key: change.desired.ref for change in changes if change.needs_event and change.desired}
        contents: dict[EventKey, Content] = {}
        for stream, found in self._read_back(wanted).items():
            learner = self._learners[stream]
            embeddings = learner.embed(list(found.values()))
            for (key, content), embedding in zip(found.items(), embeddings, strict=True):
                self._drift[stream].update("input", embedding, space=learner.encoder_digest)
                contents[key] = Content(content, embedding, learner.encoder_digest)
        too_late = wanted.keys() - contents.keys()
        return contents, too_late

    def embedded(self, stream: str, places: Mapping[str, Place]) -> dict[str, npt.NDArray[np.int16]]:
        """Events of a stream, by id and place, as the ledger keeps them; those that the log lost are left out.

        Raises:
            RetryLater: the broker is away.
        """
        found = self._read_back({(stream, event_id): place for event_id, place in places.items()})
        members = found.get(stream, {})
        embeddings = self._learners[stream].embed(list(members.values())) if members else ()
        return {event_id: embedding for (_, event_id), embedding in zip(members, embeddings, strict=True)}

    def _read_back(self, wanted: Mapping[EventKey, Place]) -> dict[str, dict[EventKey, Payload]]:
        """By stream, what the encoder takes of the events that are still there."""
        found: dict[str, dict[EventKey, Payload]] = defaultdict(dict)
        if wanted:
            for key, event in events_at(self._lookback.read, self._decoder, wanted).items():
                found[key[0]][key] = payload(event, self._learners[key[0]].plan.channels)
        return found

    def _count(
        self,
        joined: Joined,
        predictions: Sequence[tuple[Prediction, Place]],
        labels: Sequence[tuple[Label, Place]],
        quarantined: Sequence[Quarantined],
        now: datetime,
    ) -> None:
        metrics = self._metrics
        for (stream, outcome), count in joined.label_outcomes.items():
            metrics.labels.labels(stream, outcome).inc(count)
        for (stream, outcome), count in joined.prediction_outcomes.items():
            if outcome == "repeated_event":
                metrics.repeated_events.labels(stream).inc(count)
        for row in quarantined:
            metrics.labels.labels(row.label.stream, "quarantined").inc()
        for (stream, outcome, revision), count in joined.first_scores.items():
            metrics.scored.labels(stream, outcome).inc(count)
            metrics.scored_by(stream, revision, outcome, count)
        for prediction, _ in predictions:
            estimator = self.estimators.get(prediction.stream)
            if estimator is not None and prediction.probabilities:
                estimator.predicted(prediction.event_id, max(prediction.probabilities.values()))
        for score in joined.scores:
            drift = self._drift.get(score.stream)
            if drift is not None:
                drift.update("error", 0.0 if score.right else 1.0)
            estimator = self.estimators.get(score.stream)
            if estimator is not None:
                estimator.scored(score.event_id, score.right)
        for prediction, _ in predictions:
            drift = self._drift.get(prediction.stream)
            if drift is not None and prediction.label is not None:
                novelty, version = min(1.0, max(0.0, prediction.novelty)), prediction.model_version.partition(".")[0]
                drift.update("prediction", novelty, answer=prediction.label, space=version)
        for label, _ in labels:
            metrics.last_label.labels(label.stream).set(now.timestamp())
        for change in joined.changes:
            if change.desired is not None and change.learned is None:
                delay = (change.desired.labelled_at - change.desired.observed_at).total_seconds()
                metrics.label_delay.labels(change.stream).observe(max(0.0, delay))


def _first_labelled(changes: Sequence[Change], contents: Mapping[EventKey, Content]) -> dict[str, list[Event]]:
    """By stream, the events that are labelled for the first time, as heads that were not taught them may answer."""
    events: dict[str, list[Event]] = defaultdict(list)
    for change in changes:
        content = contents.get(change.key)
        if change.kind is Kind.LEARN and change.desired is not None and content is not None:
            labelled = Event(change.event_id, content.payload, content.embedding, change.desired.label)
            events[change.stream].append(labelled)
    return events
