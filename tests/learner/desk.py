"""A learner's joiner and curator over a log held in memory: the real store, registry, encoder and head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from learner.asking import Asker, AskingSettings
from learner.curation import Curator
from learner.encoders import build_telemetry_encoder
from learner.joining import Joiner, JoinTopics
from learner.online import EncoderShelf, OnlineLearner, StreamPlan
from learner.registry import Registry
from learner.trust import TrustSettings
from monitoring.drift import DriftMonitor, DriftSettings
from monitoring.metrics import Metrics
from replay.store import LearnerStore, StoreSettings
from stream.batches import Batch
from stream.events import Decoder, Label, Place, Prediction, Record, StreamRules, Telemetry, encode

NOW = datetime(2024, 5, 1, tzinfo=UTC)
STREAM = "pump"
CHANNELS = ("a", "b", "c", "d")


class Log:
    """Events by place."""

    def __init__(self) -> None:
        self.events: list[Record] = []
        self.gone: set[Place] = set()

    def read(self, places: Iterable[Place]) -> dict[Place, Record]:
        return {place: self.events[place.offset] for place in places if place not in self.gone}


class Desk:
    """Publishes windows of classes and labels of them, and joins both."""

    def __init__(
        self,
        path: Path,
        *,
        trust: TrustSettings | None = None,
        rule: str = "latest",
        seed: int = 0,
        asking: AskingSettings | None = None,
        **plan: Any,
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.now = NOW
        self.store = LearnerStore(f"sqlite:///{path}/learner.db", settings=StoreSettings(quarantine_size=1_000))
        self.epoch = self.store.claim("test", NOW)
        registry = Registry(str(path / "registry"))
        self.metrics = Metrics()

        def base() -> Any:
            return build_telemetry_encoder(CHANNELS, 0, window=8, dimension=32, learned=4)

        self.learner = OnlineLearner(
            StreamPlan(STREAM, "telemetry", CHANNELS, base, **plan),
            self.store,
            registry,
            EncoderShelf(registry, "cpu"),
            self.epoch,
            "model-versions",
            self.metrics,
        )
        self.learner.open(NOW)
        self.log = Log()
        learners = {STREAM: self.learner}
        asking = asking or AskingSettings(per_day=0)
        self.asker = Asker(
            self.store, self.epoch, learners, {STREAM: asking}, "label-requests", self.metrics, lambda: self.now
        )
        self.joiner = Joiner(
            self.store,
            self.epoch,
            Decoder([StreamRules(STREAM, "telemetry", channels=CHANNELS)]),
            self.log,  # type: ignore[arg-type]
            {STREAM: self.learner},
            {STREAM: DriftMonitor(DriftSettings())},
            JoinTopics("predictions", "labels", "dead-letters"),
            {STREAM: rule},
            self.metrics,
            lambda: self.now,
            self.asker,
        )
        self.joiner.starts([("labels", 0), ("predictions", 0)])
        self.curator = Curator(
            self.store,
            self.joiner,
            {STREAM: self.learner},
            {STREAM: trust or TrustSettings(enabled=False)},
            {STREAM: rule},
            "labels",
            self.metrics,
            lambda: self.now,
        )
        self._chance = np.random.default_rng(seed)
        self._centres: dict[str, np.ndarray] = {}
        self.truth: dict[str, str] = {}
        self._next = {"labels": 0, "predictions": 0}

    def close(self) -> None:
        self.store.close()

    def event(self, name: str, served: str | None = None, novelty: float = 0.5, lead: float = 1.0) -> Prediction:
        """An event that truly is of class `name`; what was answered for it is `served`, ahead by `lead`."""
        if name not in self._centres:
            self._centres[name] = np.random.default_rng(len(self._centres)).normal(0, 3, (len(CHANNELS), 1))
        values = self._centres[name] + self._chance.normal(0, 0.5, (len(CHANNELS), 8))
        offset = len(self.log.events)
        event = Telemetry(
            event_id=f"e{offset}",
            stream=STREAM,
            observed_at=NOW + timedelta(seconds=offset),
            channels=list(CHANNELS),
            values=values.tolist(),
        )
        self.log.events.append(Record("telemetry", 0, offset, None, encode(event)))
        self.truth[event.event_id] = name
        return Prediction(
            event_id=event.event_id,
            stream=STREAM,
            label=served,
            probabilities={} if served is None else {served: (1 + lead) / 2, "another": (1 - lead) / 2},
            novelty=novelty,
            model_version="v1.1",
            ref=Place(topic="telemetry", partition=0, offset=offset),
            observed_at=event.observed_at,
            predicted_at=event.observed_at,
        )

    def label(self, event_id: str, name: str | None, labeller: str = "ann", second: int | None = None) -> Label:
        at = int(event_id[1:]) if second is None else second
        return Label(
            event_id=event_id,
            stream=STREAM,
            label=name,
            labeller=labeller,
            labelled_at=NOW + timedelta(hours=1, seconds=at),
        )

    def record(self, message: Prediction | Label) -> Record:
        """The message at the next place of its topic."""
        topic = "labels" if isinstance(message, Label) else "predictions"
        self._next[topic] += 1
        return Record(topic, 0, self._next[topic] - 1, None, encode(message))

    def step(self, messages: Sequence[Prediction | Label | Record]) -> None:
        """Join them as one batch, and review where that is due."""
        records = [m if isinstance(m, Record) else self.record(m) for m in messages]
        ends = {(topic, 0): count for topic, count in self._next.items()}
        self.curator.learned(self.joiner.step(Batch(records, {}, ends, 1)))

    def say(self, names: Iterable[tuple[str, str, str]], batch: int = 50) -> list[str]:
        """Events and labels, (true class, class said, labeller) each; returns the event ids."""
        ids, messages = [], []
        for true, said, labeller in names:
            answer = self.event(true)
            ids.append(answer.event_id)
            messages += [answer, self.label(answer.event_id, said, labeller)]
        for start in range(0, len(messages), 2 * batch):
            self.step(messages[start : start + 2 * batch])
        return ids

    def learned(self) -> dict[str, str]:
        """By event id the class learned of it."""
        return {example.event_id: example.label for example in self.store.examples(STREAM)}

    def head_due(self) -> bool:
        """Whether the head's sums are exactly those of the examples outside the exam, taught from nothing."""
        fresh = type(self.learner.sums)(self.learner.sums.dimension, self.learner.sums.bound)
        rows = self.store.examples(STREAM, exam=False)
        if rows:
            fresh.add(np.stack([row.embedding for row in rows]), [row.label for row in rows])
        return fresh == self.learner.sums
