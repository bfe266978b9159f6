"""The learner's step over a log held in memory and an encoder that is a hash: small, real, no mocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b

import numpy as np

from replay.store import Content, Embedding, LearnerStore, Outgoing, Reconciled, Transaction
from stream.events import Label, Place, Prediction
from stream.join import EventKey, Joined, join, touched

NOW = datetime(2024, 5, 1, tzinfo=UTC)
ENCODER = "sha-of-encoder"
STREAM = "storm"

Message = tuple[Prediction | Label, Place]


def embed(text: str, encoder: str = ENCODER) -> Embedding:
    """Eight int16 numbers that only this text under this encoder has."""
    return np.frombuffer(blake2b(f"{encoder}/{text}".encode(), digest_size=16).digest(), dtype="<i2").astype(np.int16)


def prediction(
    event_id: str, label: str | None, *, ref: int, at: int, version: str = "v1.1", stream: str = STREAM
) -> Message:
    """A prediction at offset `at` for the event at offset `ref`."""
    made = Prediction(
        event_id=event_id,
        stream=stream,
        label=label,
        probabilities={} if label is None else {label: 1.0},
        novelty=0.5,
        model_version=version,
        ref=Place(topic="reports", partition=0, offset=ref),
        observed_at=NOW + timedelta(seconds=ref),
        predicted_at=NOW + timedelta(seconds=ref + 1),
    )
    return made, Place(topic="predictions", partition=0, offset=at)


def label(
    event_id: str, name: str | None, *, at: int, minute: int = 0, labeller: str = "ann", stream: str = STREAM
) -> Message:
    """A label at offset `at`, given `minute` minutes in."""
    made = Label(
        event_id=event_id, stream=stream, label=name, labeller=labeller, labelled_at=NOW + timedelta(minutes=minute)
    )
    return made, Place(topic="labels", partition=0, offset=at)


@dataclass
class Learner:
    """A learner that owns a store and can read back any event whose offset is not in `gone`."""

    store: LearnerStore
    gone: set[int] = field(default_factory=set)
    read: list[int] = field(default_factory=list)
    now: datetime = NOW
    encoder: str = ENCODER

    def __post_init__(self) -> None:
        self.epoch = self.store.claim("test", self.now)
        self.position = self.store.offsets().get(("inbox", 0))

    def step(self, batch: Iterable[Message]) -> tuple[Joined, Reconciled]:
        """One batch through join, log and one transaction."""
        batch = list(batch)
        predictions = [(message, place) for message, place in batch if isinstance(message, Prediction)]
        labels = [(message, place) for message, place in batch if isinstance(message, Label)]
        joined = join(self.store.known(touched(predictions, labels)), predictions, labels)
        contents, too_late = self.fetch(joined)
        with self.store.transaction(self.epoch, self.now) as tx:
            reconciled = self.apply(tx, joined, contents, too_late, len(batch))
        self.position = (self.position or 0) + len(batch)
        return joined, reconciled

    def fetch(self, joined: Joined) -> tuple[dict[EventKey, Content], set[EventKey]]:
        """What the log still has of the events that are needed, and the events that it has no more."""
        contents: dict[EventKey, Content] = {}
        too_late: set[EventKey] = set()
        for change in joined.changes:
            if change.needs_event:
                assert change.desired is not None
                offset = change.desired.ref.offset
                self.read.append(offset)
                if offset in self.gone:
                    too_late.add(change.key)
                else:
                    text = f"{change.event_id} at {offset}"
                    contents[change.key] = Content(text, embed(text, self.encoder), self.encoder)
        return contents, too_late

    def apply(
        self,
        tx: Transaction,
        joined: Joined,
        contents: Mapping[EventKey, Content],
        too_late: Collection[EventKey],
        count: int,
    ) -> Reconciled:
        """The transaction's sentence."""
        tx.advance({("inbox", 0): (self.position, (self.position or 0) + count)})
        tx.record(joined)
        reconciled = tx.reconcile(joined.changes, contents, too_late)
        tx.send([Outgoing("audit", b"key", b"value", (("count", str(count).encode()),))])
        return reconciled


def head_of(store: LearnerStore, stream: str = STREAM, encoder: str = ENCODER) -> dict[tuple[str, bytes], int]:
    """What following the ledger from the start leaves in the head: how often each labelled embedding."""
    counts: dict[tuple[str, bytes], int] = {}
    seq = 0
    while len(part := store.follow_ledger(stream, encoder, seq, limit=7)):
        seq = part.seq
        for name, sign, row in zip(part.labels, part.signs, part.embeddings, strict=True):
            key = (name, row.tobytes())
            counts[key] = counts.get(key, 0) + int(sign)
    assert all(count >= 0 for count in counts.values())
    return {key: count for key, count in counts.items() if count}


def head_due(store: LearnerStore, stream: str = STREAM) -> dict[tuple[str, bytes], int]:
    """What the head should hold: every example with its event that is not in the exam, once."""
    counts: dict[tuple[str, bytes], int] = {}
    for example in store.examples(stream, exam=False):
        key = (example.label, example.embedding.tobytes())
        counts[key] = counts.get(key, 0) + 1
    return counts
