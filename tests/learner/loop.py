"""A learner over a log held in memory: the real store, registry, joiner, head and trainer, and no Kafka."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sqlalchemy as sa

from learner import trainer as trainer_module
from learner.encoders import Encoder, build_telemetry_encoder
from learner.exam import ExamSettings
from learner.finetune import (
    AS_SET,
    FineTuneJob,
    FineTuneResult,
    FineTuneSettings,
    FineTuneStopped,
    FineTuneSummary,
    Retrain,
)
from learner.heads import HeadSums, quantise
from learner.joining import Joiner, JoinTopics
from learner.online import EncoderShelf, OnlineLearner, StreamPlan
from learner.registry import Registry, VersionManifest
from learner.trainer import Course, Trainer, Triggers
from monitoring.drift import DriftMonitor
from monitoring.metrics import Metrics
from replay import schema
from replay.policy import ReplaySettings
from replay.snapshot import read_snapshot
from replay.store import LearnerStore, StoreSettings
from stream.batches import Batch
from stream.events import Decoder, Label, Place, Prediction, Record, StreamRules, Telemetry, encode

START = datetime(2026, 1, 2, tzinfo=UTC)
STREAM = "pump"
CHANNELS = ("flow",)
TOPICS = JoinTopics("predictions", "labels", "dead-letters")


@lru_cache
def encoder(seed: int) -> Encoder:
    """One of any number of tiny encoders; no two give the same embedding."""
    return build_telemetry_encoder(CHANNELS, seed, window=8, dimension=12, learned=2)


@lru_cache
def window(event_id: str) -> npt.NDArray[np.float32]:
    """(1, 8) numbers that only this event has; those of one kind, the letters of its name, lie together."""
    kind, chance = (
        np.random.default_rng(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big"))
        for text in (event_id.rstrip("0123456789"), event_id)
    )
    made: npt.NDArray[np.float32] = (3 * kind.normal(size=(1, 8)) + chance.normal(size=(1, 8))).astype(np.float32)
    return made


@lru_cache(maxsize=10_000)
def embedding(event_id: str, seed: int) -> npt.NDArray[np.int16]:
    """The event under an encoder, embedded by itself, so that its bits do not depend on its neighbours."""
    made: npt.NDArray[np.int16] = quantise(encoder(seed).embed([window(event_id)]), encoder(seed).spec.bound)[0]
    return made


def at_once(work: Callable[[], Any]) -> Future[Any]:
    """Run `work` here and now, as the learners' thread would."""
    done: Future[Any] = Future()
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
    return done


class Log:
    """Events by place, as `stream.lookback.Lookback` reads them back."""

    def __init__(self) -> None:
        self.events: dict[Place, Record] = {}
        self.asked: set[Place] = set()

    def read(self, places: Iterable[Place]) -> dict[Place, Record]:
        """Those that are there."""
        places = set(places)
        self.asked |= places
        return {place: self.events[place] for place in places if place in self.events}


class Loop:
    """One stream, learned from the labels that it is told."""

    def __init__(
        self,
        directory: Path,
        settings: StoreSettings | None = None,
        replay: ReplaySettings | None = None,
        exam: ExamSettings | None = None,
        url: str | None = None,
    ) -> None:
        self.directory = directory
        self.metrics = Metrics()
        self.decoder = Decoder([StreamRules(STREAM, "telemetry", CHANNELS)])
        self.now = START
        where = url or f"sqlite:///{directory}/learner.db"
        self.store = LearnerStore(where, {STREAM: replay or ReplaySettings()}, settings)
        self.registry = Registry(str(directory / "registry"))
        self.log = Log()
        self.course = Course("telemetry", FineTuneSettings(), exam or ExamSettings(), Triggers())
        self.start()

    def start(self) -> None:
        """A process that begins, or takes over after another one was killed."""
        self.epoch = self.store.claim("test", self.now)
        plan = StreamPlan(STREAM, "telemetry", CHANNELS, lambda: encoder(0))
        shelf = EncoderShelf(self.registry, "cpu")
        self.learner = OnlineLearner(plan, self.store, self.registry, shelf, self.epoch, "model-versions", self.metrics)
        self.learner.open(self.now)
        self.joiner = Joiner(
            self.store,
            self.epoch,
            self.decoder,
            self.log,  # type: ignore[arg-type]
            {STREAM: self.learner},
            {STREAM: DriftMonitor()},
            TOPICS,
            {},
            self.metrics,
            lambda: self.now,
        )
        self.joiner.starts([("predictions", 0), ("labels", 0)])
        self.trainer = Trainer(
            {STREAM: self.course},
            {STREAM: self.learner},
            self.store,
            self.registry,
            self.epoch,
            self.directory / "jobs",
            at_once,
            self.metrics,
            lambda: self.now,
        )

    def empty(self) -> None:
        """Begin again with nothing learned: making a loop costs as much as ten labels."""
        with self.store._write() as connection:
            for table in schema.METADATA.sorted_tables:
                where = schema.meta.c.name.like("note/%") if table is schema.meta else sa.true()
                connection.execute(sa.delete(table).where(where))
        self.log.events.clear()
        self.now = START
        self.start()

    def close(self) -> None:
        """Let go of the database."""
        self.store.close()

    # What comes in

    def predict(self, event_id: str, observed_at: datetime = START) -> None:
        """A worker answers an event, which lies in the log."""
        place = Place(topic="telemetry", partition=0, offset=int.from_bytes(event_id.encode()[:6], "big"))
        event = Telemetry(
            event_id=event_id,
            stream=STREAM,
            observed_at=observed_at,
            channels=list(CHANNELS),
            values=window(event_id).tolist(),
        )
        self.log.events[place] = Record(place.topic, 0, place.offset, None, encode(event))
        answer = Prediction(
            event_id=event_id,
            stream=STREAM,
            label=None,
            probabilities={},
            novelty=0.5,
            model_version="v1.1",
            ref=place,
            observed_at=observed_at,
            predicted_at=START,
        )
        self._step(TOPICS.predictions, encode(answer))

    def label(self, event_id: str, name: str | None, labeller: str = "ann") -> None:
        """A labeller says what an event was, later than all that was said before."""
        self.now += timedelta(seconds=1)
        told = Label(event_id=event_id, stream=STREAM, label=name, labeller=labeller, labelled_at=self.now)
        self._step(TOPICS.labels, encode(told))

    def teach(self, *event_ids: str, label: str | None = None, observed_at: datetime = START) -> None:
        """Events and their labels: the letters of the event's name, unless another is given."""
        for event_id in event_ids:
            self.predict(event_id, observed_at)
            self.label(event_id, label or event_id.rstrip("0123456789"))

    def _step(self, topic: str, value: bytes) -> None:
        offset = self.store.offsets().get((topic, 0), 0)
        record = Record(topic, 0, offset, None, value)
        self.joiner.step(Batch([record], {}, {(topic, 0): offset + 1}, 1))

    # What is done to it

    def evict(self, event_id: str) -> None:
        """The replay policy lets go of the event itself."""
        with self.store._write() as connection:
            c = schema.examples.c
            connection.execute(sa.update(schema.examples).where(c.event_id == event_id).values(payload=None))

    def rebase(self, seed: int) -> None:
        """A version with another encoder goes into service."""
        made = encoder(seed)
        self.registry.put_encoder(made.sealed(), made.files())
        name = self.registry.commit(VersionManifest(stream=STREAM, created_at=self.now, encoder=made.sealed()))
        known = {event_id: embedding(event_id, seed) for event_id in self.store.present(STREAM)}
        self.learner.put_in_service(self.registry.version(STREAM, name), known, "test", self.now)

    def run(
        self,
        monkeypatch: pytest.MonkeyPatch,
        seed: int,
        meanwhile: Callable[[], None] = lambda: None,
        named: Retrain = AS_SET,
    ) -> str | None:
        """One fine-tune whose process gives the encoder `seed`, and what happens while it trains; its last state."""

        def trained(job: FineTuneJob, on_progress: object, should_stop: Callable[[], bool]) -> FineTuneResult:
            rows = read_snapshot(job.snapshot)
            meanwhile()
            if should_stop():
                raise FineTuneStopped("the fine-tune was stopped on request")
            files = {}
            job.out.mkdir(parents=True)
            for name, content in encoder(seed).files().items():
                files[name] = job.out / name
                files[name].write_bytes(content)
            state = job.out / "state"
            state.mkdir()
            (state / "state.json").write_text("{}")
            ids = tuple(row["event_id"] for row in rows.dataset)
            return FineTuneResult(
                encoder=encoder(seed).sealed(),
                files=files,
                event_ids=ids,
                embeddings=np.stack([embedding(event_id, seed) for event_id in ids]),
                classes=tuple(sorted(set(rows.dataset["label"]))),
                state=state,
                summary=SUMMARY,
                seconds=0.0,
            )

        monkeypatch.setattr(trainer_module, "run_finetune", trained)
        self.trainer.request(STREAM, "hand", named=named)
        assert self.trainer._take(STREAM)
        self.trainer._run(STREAM)
        return self.store.runs(STREAM)[0].state

    # What is found

    def rebuilt(self, seed: int) -> HeadSums:
        """The head that the examples in the store make, and nothing else."""
        sums = HeadSums(encoder(seed).spec.dimension, encoder(seed).spec.bound)
        for event_id, (label, exam) in self.store.present(STREAM).items():
            if not exam:
                sums.add(embedding(event_id, seed)[None, :], [label])
        return sums

    def followed(self) -> HeadSums:
        """The sums of the ledger, from its first row on."""
        sums = HeadSums(self.learner.sums.dimension, self.learner.sums.bound)
        rows = self.store.follow_ledger(STREAM, self.learner.encoder_digest)
        if len(rows):
            sums.add(*rows.added)
            sums.subtract(*rows.removed)
        return sums

    def counted(self, outcome: str) -> float:
        """Labels that came out so."""
        return (
            self.metrics.registry.get_sample_value("trimtab_labels_total", {"stream": STREAM, "outcome": outcome})
            or 0.0
        )

    def bytes(self) -> bytes:
        """Every byte of the database's files."""
        return b"".join(path.read_bytes() for path in sorted(self.directory.glob("learner.db*")))


SUMMARY = FineTuneSummary(
    run=1,
    new=1,
    replayed=0,
    held_out=0,
    exam=0,
    epochs=1,
    updates=1,
    loss=None,
    penalty=0.0,
    held_out_loss=None,
    held_out_accuracy=None,
    ended="all_epochs",
    device="cpu",
    mixed_precision=False,
    train_seconds=0.0,
    embed_seconds=0.0,
)
