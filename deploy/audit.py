"""Were the promises kept? The log, the learner's database and the registry, held against each other.

What is asked, and how it is answered without trusting the code that is audited more than need be:

- *Every event has one answer.* Every place of the event topics is looked up among the places that predictions and
  dead letters name.
- *Every label is learned, once.* The labels are joined again, by the same pure function, with what the database knows
  now. Nothing may change: whatever would is a label that was not learned, or learned wrongly. The ledger, summed by
  event, shows one that was learned twice.
- *Every version named can be found.* In the registry, by its manifest.

Places that the workers have not committed yet, and messages that the learner has not joined yet, are counted as
waiting. Nothing is written. It takes about 150 bytes of memory for each event in the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from confluent_kafka import Consumer, KafkaException, TopicPartition

from deploy.messages import letter
from deploy.settings import Settings, rules
from learner.registry import BrokenVersion, Registry
from replay import schema
from replay.store import LearnerStore
from stream.batches import TopicTail
from stream.errors import DeadLetter, Misconfigured, RetryLater
from stream.events import Decoder, Label, Place, Record, utc_now
from stream.join import EventKey, join, touched

NAMED = 10
"""How many examples of a breach are named."""
_CHUNK = 2_000

Partition = tuple[str, int]


@dataclass
class Audit:
    """What was found. Every number is a count of messages, places, events or versions.

    Args:
        places: event messages in the log.
        answered: of them, those with a prediction.
        parked: of them, those in dead letters.
        waiting: of them, those that no worker has committed yet.
        unanswered: of them, those with neither though a worker committed them. A breach.
        answered_twice: of them, those with more than one answer. A breach under `exactly_once` only.
        superseding: predictions that correct an earlier one; they are no second answers.
        expired_places: predictions of events that the log no longer has.
        repeated_events: event ids that were published more than once.
        dead_letters: by reason.
        labels: label messages.
        labels_waiting: of them, those that the learner has not joined yet, or whose event has no prediction yet.
        labels_expired: of them, those whose event, or themselves, had gone before the other came.
        labels_aside: of them, those in quarantine or in dead letters.
        labels_refused: of them, those of events that were forgotten on request, or can no longer be corrected.
        labels_not_learned: of them, those that should have changed what is learned and did not. A breach.
        learned_twice: events that the head was taught more than once. A breach.
        versions: versions that predictions name.
        versions_missing: of them, those that the registry does not have. A breach.
        breaches: in words, with the first few places or names.
    """

    guarantee: str
    places: int = 0
    answered: int = 0
    parked: int = 0
    waiting: int = 0
    unanswered: int = 0
    answered_twice: int = 0
    superseding: int = 0
    expired_places: int = 0
    repeated_events: int = 0
    dead_letters: dict[str, int] = field(default_factory=dict)
    labels: int = 0
    labels_waiting: int = 0
    labels_expired: int = 0
    labels_aside: int = 0
    labels_refused: int = 0
    labels_not_learned: int = 0
    learned_twice: int = 0
    versions: int = 0
    versions_missing: int = 0
    breaches: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not self.breaches

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {**asdict(self), "kept": self.kept}

    def breach(self, what: str, examples: Sequence[object]) -> None:
        """Note a broken promise, naming the first examples of it."""
        more = f" and {len(examples) - NAMED} more" if len(examples) > NAMED else ""
        self.breaches.append(f"{what}: {', '.join(map(str, examples[:NAMED]))}{more}")


class Answers:
    """How often each place in the log was answered. Pure."""

    def __init__(self) -> None:
        self._events: dict[Partition, dict[int, int]] = {}
        self._parked: set[Place] = set()
        self._refs: dict[EventKey, Place] = {}
        self._repeated: set[EventKey] = set()
        self.superseding = 0
        self.outside = 0

    def event(self, place: Place) -> None:
        """A message of an event topic lies here."""
        self._events.setdefault((place.topic, place.partition), {})[place.offset] = 0

    def prediction(self, key: EventKey, ref: Place, supersedes: str | None) -> None:
        """An answer to the event at `ref`."""
        if supersedes is not None:
            self.superseding += 1
            return
        if self._refs.setdefault(key, ref) != ref:
            self._repeated.add(key)
        offsets = self._events.get((ref.topic, ref.partition), {})
        if ref.offset in offsets:
            offsets[ref.offset] += 1
        else:
            self.outside += 1

    def parked(self, place: Place) -> None:
        """The message at `place` is in dead letters."""
        if place.offset in self._events.get((place.topic, place.partition), {}):
            self._parked.add(place)

    def knows(self, key: EventKey) -> bool:
        """Whether a prediction of this event was seen."""
        return key in self._refs

    def judge(self, audit: Audit, committed: Mapping[Partition, int]) -> None:
        """Count what was seen.

        Args:
            committed: by partition, the offset that the workers' group reads next.
        """
        unanswered: list[str] = []
        twice: list[str] = []
        for (topic, partition), offsets in sorted(self._events.items()):
            done = committed.get((topic, partition), 0)
            for offset, count in offsets.items():
                parked = Place(topic=topic, partition=partition, offset=offset) in self._parked
                audit.answered += count > 0
                audit.parked += parked
                if count + parked > 1:
                    twice.append(f"{topic}[{partition}]@{offset}")
                elif count + parked == 0 and offset < done:
                    unanswered.append(f"{topic}[{partition}]@{offset}")
                elif count + parked == 0:
                    audit.waiting += 1
            audit.places += len(offsets)
        audit.unanswered, audit.answered_twice = len(unanswered), len(twice)
        audit.superseding, audit.expired_places = self.superseding, self.outside
        audit.repeated_events = len(self._repeated)
        if unanswered:
            audit.breach("events without an answer", unanswered)
        if twice and audit.guarantee == "exactly_once":
            audit.breach("events with more than one answer", twice)


def run_audit(settings: Settings, registry: Registry, since: datetime | None, until: datetime | None) -> Audit:
    """Read everything and judge it.

    Args:
        since: only events and labels whose Kafka record time is not before this.
        until: likewise, before this.

    Raises:
        Misconfigured: the learner's database is not here, or a topic is missing.
        RetryLater: the broker does not answer.
    """
    store = _open_store(settings)
    try:
        audit, answers = Audit(settings.worker.guarantee), Answers()
        topics, decoder = settings.topics, Decoder(rules(settings))
        within = _window(since, until)
        versions: set[tuple[str, str]] = set()
        parked: set[Place] = set()
        reasons: Counter[str] = Counter()

        def take_event(record: Record) -> None:
            if within(record):
                answers.event(record.place)

        def take_prediction(record: Record) -> None:
            try:
                found = decoder.prediction(record)
            except DeadLetter:
                return  # not ours; the learner parks it
            answers.prediction((found.stream, found.event_id), found.ref, found.supersedes)
            versions.add((found.stream, found.model_version.partition(".")[0]))

        def take_letter(record: Record) -> None:
            found = letter(record)
            reasons[found.reason] += 1
            answers.parked(found.original.place)
            parked.add(found.original.place)

        # What is committed is asked first: an event that a worker answers meanwhile is then not taken for one it left.
        committed = _committed(settings)
        for topic in settings.event_topics:
            _read(settings, topic, take_event)
        _read(settings, topics.name("predictions"), take_prediction)
        _read(settings, topics.name("dead_letters"), take_letter)
        audit.dead_letters = dict(sorted(reasons.items()))
        answers.judge(audit, committed)
        _judge_labels(audit, settings, store, answers, decoder, parked, within)
        _judge_ledger(audit, settings)
        _judge_versions(audit, registry, versions)
        return audit
    finally:
        store.close()


def _judge_labels(
    audit: Audit,
    settings: Settings,
    store: LearnerStore,
    answers: Answers,
    decoder: Decoder,
    parked: set[Place],
    within: Callable[[Record], bool],
) -> None:
    """Join every label again with what the database knows: nothing may change."""
    topic, offsets = settings.topics.name("labels"), store.offsets()
    aside = {row.place for row in store.quarantined(limit=1_000_000)} | parked
    left_to_leader = {one.record.place for one in store.inbox(limit=1_000_000)}
    horizon = settings.learner.memory.horizon
    aliases = {name: store.aliases(name) for name in settings.streams}
    combine = {name: stream.labellers for name, stream in settings.streams.items()}
    all_joined = _joined_all(settings, store) and not left_to_leader
    lost: list[str] = []
    chunk: list[tuple[Label, Place, bool]] = []

    def judge() -> None:
        keys = touched((), ((label, place) for label, place, _ in chunk))
        known, beyond = store.known(keys), store.beyond(keys)
        for label, place, past in chunk:
            key = (label.stream, label.event_id)
            if key in beyond:
                audit.labels_refused += 1
                continue
            joined = join(known, (), [(label, place)], combine)
            served, learned = known.served.get(key), known.learned.get(key)
            if joined.labels and past:
                audit.labels_expired += 1
            elif joined.labels:
                lost.append(f"{label.event_id} by {label.labeller} at {place.partition}:{place.offset}")
            elif joined.changes:
                now = "nothing" if learned is None else repr(learned.label)
                lost.append(f"{label.event_id}, of which {now} is learned")
            elif learned is None and served is not None and served.too_late:
                audit.labels_expired += 1
            elif learned is None and served is None and label.label is not None:
                if answers.knows(key) and all_joined and not past:
                    lost.append(f"{label.event_id}, whose prediction was not joined")
                else:
                    audit.labels_waiting += 1
        chunk.clear()

    def take_label(record: Record) -> None:
        if not within(record):
            return
        audit.labels += 1
        if record.place in aside:
            audit.labels_aside += 1
        elif record.place in left_to_leader or record.offset >= offsets.get((topic, record.partition), 0):
            audit.labels_waiting += 1
        else:
            try:
                found = decoder.label(record)
                name = aliases.get(found.stream, {}).get(found.label or "", found.label)
                renamed = found if name == found.label else found.model_copy(update={"label": name})
                chunk.append((renamed, record.place, _past(record.timestamp_ms, horizon)))
            except DeadLetter:
                lost.append(f"the malformed one at {record.partition}:{record.offset}, which is not in dead letters")
        if len(chunk) == _CHUNK:
            judge()

    _read(settings, topic, take_label)
    judge()
    audit.labels_not_learned = len(lost)
    if lost:
        audit.breach("labels that were not learned as they should be", lost)


def _joined_all(settings: Settings, store: LearnerStore) -> bool:
    """Whether the learner has joined every prediction that is on the topic now."""
    topic, offsets = settings.topics.name("predictions"), store.offsets()
    client = _client(settings)
    try:
        partitions = client.list_topics(topic, timeout=30).topics[topic].partitions
        ends = {p: client.get_watermark_offsets(TopicPartition(topic, p), timeout=30)[1] for p in partitions}
    except KafkaException as error:
        raise RetryLater(f"Kafka at {settings.kafka.bootstrap_servers}: {error.args[0].str()}") from error
    finally:
        client.close()
    # A transaction's marker takes the last offset of a partition, and is never joined.
    return all(offsets.get((topic, p), 0) >= end - 1 for p, end in ends.items() if end)


def _judge_ledger(audit: Audit, settings: Settings) -> None:
    """No event may have been added to the head more often than it was subtracted, plus once."""
    c = schema.ledger.c
    balance = sa.func.sum(c.sign)
    query = (
        sa.select(c.stream, c.event_id, balance)
        .group_by(c.stream, c.encoder, c.event_id)
        .having(balance > 1)
        .order_by(c.stream, c.event_id)
    )
    engine = schema.connect(settings.learner.store)
    try:
        with engine.connect() as connection:
            twice = [f"{event_id} of {stream} ({count} times)" for stream, event_id, count in connection.execute(query)]
    finally:
        engine.dispose()
    audit.learned_twice = len(twice)
    if twice:
        audit.breach("events that the head was taught more than once", twice)


def _judge_versions(audit: Audit, registry: Registry, named: set[tuple[str, str]]) -> None:
    missing = []
    # Before anything was announced a prediction names v0, which is no version.
    for stream, version in sorted(pair for pair in named if pair[1] != "v0"):
        audit.versions += 1
        try:
            registry.version(stream, version)
        except BrokenVersion:
            missing.append(f"{version} of {stream}")
    audit.versions_missing = len(missing)
    if missing:
        audit.breach("versions that predictions name and the registry lacks", missing)


def _open_store(settings: Settings) -> LearnerStore:
    url = settings.learner.store
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        raise Misconfigured(f"learner.store {url} is not here: run the audit where the learner's database can be read")
    replay = {name: stream.replay for name, stream in settings.streams.items()}
    return LearnerStore(url, replay, settings.learner.memory)


def _read(settings: Settings, topic: str, take: Callable[[Record], None]) -> None:
    """Hand on everything that lies on a topic now, as a reader of committed messages sees it."""
    tail = TopicTail(settings.kafka.confluent(), topic)
    try:
        tail.catch_up(take)
    finally:
        tail.close()


def _committed(settings: Settings) -> dict[Partition, int]:
    """Where the workers' group goes on, by partition of the event topics."""
    client = _client(settings)
    try:
        partitions = [
            TopicPartition(topic, number)
            for topic in settings.event_topics
            for number in client.list_topics(topic, timeout=30).topics[topic].partitions
        ]
        return {(p.topic, p.partition): max(0, p.offset) for p in client.committed(partitions, timeout=30)}
    except KafkaException as error:
        raise RetryLater(f"Kafka at {settings.kafka.bootstrap_servers}: {error.args[0].str()}") from error
    finally:
        client.close()


def _client(settings: Settings) -> Consumer:
    group = settings.topics.prefix + settings.worker.group
    # It only asks about the group; it never joins it.
    return Consumer({**settings.kafka.confluent(), "group.id": group, "enable.auto.commit": False})


def _window(since: datetime | None, until: datetime | None) -> Callable[[Record], bool]:
    low = since.timestamp() * 1000 if since else float("-inf")
    high = until.timestamp() * 1000 if until else float("inf")
    return lambda record: low <= record.timestamp_ms < high


def _past(timestamp_ms: int, horizon: timedelta) -> bool:
    return timestamp_ms / 1000 < utc_now().timestamp() - horizon.total_seconds()
