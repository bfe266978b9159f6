"""The learner that ships, without Kafka: the same messages, join, store, head, fine-tunes and exams.

::

    serve ──▶ events in a log held in memory ──▶ answered by the revision in service ──▶ predictions ─┐
    label ──▶ labels ───────────────────────────────────────────────────────────────────────────────┤
                                                                  Joiner.step ◀───────────────────────┘
                                                     follow ▸ announce ▸ Trainer.learned ▸ fine-tune ▸ exam

What differs from a process on Kafka: time is that of the events and not of the wall, so a fine-tune is over
before the next label comes and no rest is kept between two; and after each fine-tune the store lets go of all
that its replay policy does not keep, where it would wait for a correction for days.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deploy.settings import Settings
from deploy.wiring import build_learning
from learner.app import RECALL_WINDOW
from learner.encoders import Encoder, Payload
from learner.online import EncoderShelf
from learner.registry import Registry
from monitoring.metrics import Metrics
from replay.store import pack
from stream.batches import Batch
from stream.errors import Reason
from stream.events import Label, Place, Prediction, Record, Report, Telemetry, encode

STREAM = "benchmark"
START = datetime(2024, 1, 1, tzinfo=UTC)
LABELS_A_STEP = 100
"""Labels joined at once where nobody asks meanwhile, and so between two revisions and two looks at the triggers."""

ROOM = 4 * 2**30
"""Free bytes with which a folder in memory is used: a fine-tune of MiniLM leaves 100 MB a version."""


class EmbeddingCache:
    """Embeddings by encoder and payload: in memory, and on disk for encoders that come again in another run.

    Args:
        folder: where they are kept; None keeps nothing on disk.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, dict[bytes, npt.NDArray[np.float32]]] = {}
        self._fresh: dict[str, list[bytes]] = {}

    def embed(self, digest: str, encoder: Encoder, payloads: Sequence[Payload]) -> npt.NDArray[np.float32]:
        """Embeddings (n, d), computed where they are not known."""
        known = self._of(digest)
        keys = [sha256(pack(payload)).digest() for payload in payloads]
        missing = {key: row for row, key in enumerate(keys) if key not in known}
        if missing:
            fresh = encoder.embed([payloads[row] for row in missing.values()])
            known.update(zip(missing, fresh, strict=True))
            self._fresh.setdefault(digest, []).extend(missing)
        return np.stack([known[key] for key in keys]) if keys else np.empty((0, encoder.spec.dimension), np.float32)

    def keep(self, digest: str) -> None:
        """Write what is new under this encoder to disk."""
        fresh = self._fresh.pop(digest, [])
        if not fresh or self._folder is None:
            return
        folder = self._folder / digest[:32]
        folder.mkdir(parents=True, exist_ok=True)
        rows = np.stack([self._known[digest][key] for key in fresh])
        keys = np.frombuffer(b"".join(fresh), dtype=np.uint8).reshape(len(fresh), 32)
        name = sha256(keys.tobytes()).hexdigest()[:16]
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            np.savez(file, keys=keys, rows=rows)
        Path(file.name).replace(folder / f"{name}.npz")

    def forget(self, digest: str) -> None:
        """Let go of an encoder that will not come again."""
        self._known.pop(digest, None)
        self._fresh.pop(digest, None)

    def _of(self, digest: str) -> dict[bytes, npt.NDArray[np.float32]]:
        known = self._known.get(digest)
        if known is None:
            known = self._known[digest] = {}
            folder = None if self._folder is None else self._folder / digest[:32]
            for file in sorted(folder.glob("*.npz")) if folder is not None and folder.is_dir() else ():
                with np.load(file) as stored:
                    known.update(zip((bytes(key) for key in stored["keys"]), stored["rows"], strict=True))
        return known


class CachedEncoder:
    """An encoder that embeds each payload once; see `learner.encoders.Encoder`."""

    def __init__(self, encoder: Encoder, digest: str, cache: EmbeddingCache) -> None:
        self._encoder, self.digest, self._cache = encoder, digest, cache

    def embed(self, payloads: Sequence[Payload], *, repeatable: bool = False) -> npt.NDArray[np.float32]:
        """Embeddings (n, d), from the cache where it has them."""
        if repeatable:
            return self._encoder.embed(payloads, repeatable=True)
        return self._cache.embed(self.digest, self._encoder, payloads)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


class CachedShelf(EncoderShelf):
    """A shelf whose encoders embed each payload once; it keeps the base encoder and the one in service."""

    def __init__(self, registry: Registry, device: str, cache: EmbeddingCache) -> None:
        super().__init__(registry, device)
        self._cache = cache
        self._ready: dict[str, CachedEncoder] = {}
        self.base: str | None = None

    def get(self, digest: str) -> Encoder:
        if digest not in self._ready:
            self.base = self.base or digest
            for other in set(self._ready) - {self.base, digest}:
                del self._ready[other]
                self._cache.forget(other)
            self._ready[digest] = CachedEncoder(super().get(digest), digest, self._cache)
        return self._ready[digest]  # type: ignore[return-value]


class EventsInMemory:
    """A log of events that nothing expires from; see `learner.joining.EventLog`."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self._values: list[bytes] = []

    def append(self, value: bytes) -> Place:
        """Write one event; returns where it lies."""
        self._values.append(value)
        return Place(topic=self.topic, partition=0, offset=len(self._values) - 1)

    def read(self, places: Iterable[Place]) -> dict[Place, Record]:
        """The records at `places`."""
        return {place: Record(self.topic, 0, place.offset, None, self._values[place.offset]) for place in places}


def at_once(work: Callable[[], Any]) -> Future[Any]:
    """Run `work` here and now; its future is done."""
    done: Future[Any] = Future()
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
    return done


class Live:
    """One stream, from its base encoder on: answers, learns from labels, fine-tunes, examines, promotes.

    Args:
        kind: `text` or `telemetry`.
        channels: telemetry channels; none for text.
        steps: the usual number of time steps of a window.
        commands: the channels among them that say what was done.
        overrides: the stream's settings where they are not the defaults, nested as in the YAML.
        seed: of the replay store, the exam's draw, the fine-tunes and, for telemetry, the encoder.
        finetune: False never fine-tunes: the instant head alone.
        revise_after: labels between two revisions, as half a second is for a learner on Kafka.
        cache: of embeddings.
        device: where embeddings and fine-tunes compute.
    """

    def __init__(
        self,
        kind: Literal["text", "telemetry"],
        channels: Sequence[str] = (),
        steps: int = 1,
        *,
        commands: Sequence[str] = (),
        overrides: Mapping[str, Any] | None = None,
        seed: int = 0,
        finetune: bool = True,
        revise_after: int = LABELS_A_STEP,
        cache: EmbeddingCache | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        self.kind, self.channels, self._commands = kind, tuple(channels), tuple(commands)
        self._folder = Path(tempfile.mkdtemp(prefix="trimtab-learning-", dir=_in_memory()))
        self._finetune = finetune
        self._revise_after, self._unrevised = revise_after, 0
        self._pending: list[tuple[str, bytes]] = []
        self._cache = cache or EmbeddingCache(None)
        self._now = START
        self._offsets: Counter[str] = Counter()
        self._ids: dict[int, tuple[str, Place]] = {}
        self.held = 0
        self.quarantined = 0
        settings = self._settings(steps, overrides or {}, seed, device)
        self.settings = settings.streams[STREAM]
        self._topics = settings.topics
        self._log = EventsInMemory(settings.topic_of(STREAM))
        metrics = Metrics()
        metrics.open_learner(settings.streams, release="benchmark", reasons=list(Reason))
        self.learning = build_learning(
            settings,
            metrics,
            at_once,
            self._log,
            shelf=lambda registry, on: CachedShelf(registry, on, self._cache),
            clock=lambda: self._now,
        )
        self._learner = self.learning.learners[STREAM]
        self._base = self._learner.encoder_digest

    def _settings(self, steps: int, overrides: Mapping[str, Any], seed: int, device: str) -> Settings:
        stream: dict[str, Any] = {"kind": self.kind}
        if self.kind == "telemetry":
            channels = {"channels": list(self.channels), "commands": list(self._commands)}
            stream["encoder"] = {**channels, "window": steps, "seed": seed}
        seeds = {"replay": {"seed": seed}, "finetune": {"seed": seed}, "triggers": {"rest_seconds": 0}}
        return Settings(
            registry={"url": str(self._folder / "registry"), "cache_dir": self._folder / "cache"},
            learner={
                "store": f"sqlite:///{self._folder / 'learner.db'}",
                "memory": {"correction_horizon": timedelta(0), "exam_seed": seed},
                "jobs": self._folder / "jobs",
                "device": device,
            },
            streams={STREAM: merged(merged(stream, seeds), overrides)},
        )

    # What a protocol calls

    def serve(self, positions: Sequence[int], payloads: Sequence[Payload]) -> list[str | None]:
        """Answer events that will be labelled later, as a worker does; each position once."""
        serving = self._learner.serving
        answers: list[str | None] = [None] * len(payloads)
        novelty: Sequence[float] = [0.0] * len(payloads)
        if serving.head is not None and len(payloads):
            found = serving.head.answer(self._encoder(serving.encoder).embed(payloads), 1)
            answers, novelty = [labels[0] for labels in found.labels], found.novelty.tolist()
        records = []
        for position, payload, label, new in zip(positions, payloads, answers, novelty, strict=True):
            self._now += timedelta(seconds=1)
            event = self._event(position, payload)
            place = self._log.append(encode(event))
            self._ids[position] = event.event_id, place
            prediction = Prediction(
                event_id=event.event_id,
                stream=STREAM,
                label=label,
                probabilities={},
                novelty=new,
                model_version=serving.name,
                ref=place,
                observed_at=event.observed_at,
                predicted_at=self._now,
            )
            records.append((self._topics.name("predictions"), encode(prediction)))
        self._pending += records
        return answers

    def take(self, positions: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Events are served, whoever looks at the answers."""
        self.serve(positions, payloads)

    def label(self, positions: Sequence[int], labels: Sequence[str], labellers: Sequence[str] | None = None) -> None:
        """Labels come, of events served before; what follows from them happens before the next.

        They are joined in one batch with what was served meanwhile, once there are enough for a revision: until
        then they could change no answer.

        Args:
            labellers: who gives each of them; always the same one when not given.
        """
        who = ["default"] * len(positions) if labellers is None else labellers
        for position, label, labeller in zip(positions, labels, who, strict=True):
            event_id, _ = self._ids[position]
            message = Label(event_id=event_id, stream=STREAM, label=label, labeller=labeller, labelled_at=self._now)
            self._pending.append((self._topics.name("labels"), encode(message)))
            self._unrevised += 1
            if self._unrevised >= self._revise_after:
                self._revise()
        for position in set(positions):
            del self._ids[position]

    def ask(self, payloads: Sequence[Payload]) -> list[str | None]:
        """Answers that leave no trace."""
        if self._unrevised:
            self._revise()
        serving = self._learner.serving
        if serving.head is None or not len(payloads):
            return [None] * len(payloads)
        return list(serving.head.predict(self._encoder(serving.encoder).embed(payloads)))

    def boundary(self) -> None:
        """An experience is over: the next one comes on another day."""
        if self._unrevised:
            self._revise()
        self._sent()
        self._now = (self._now + timedelta(days=1)).replace(hour=0, minute=0, second=0)

    def request(self) -> None:
        """Fine-tune now, as when asked for by hand."""
        self.learning.trainer.request(STREAM, "hand")
        self._fine_tune()

    def details(self) -> dict[str, Any]:
        """What happened on the way: fine-tunes by what became of them, revisions held, labels set aside."""
        runs = self.learning.store.runs(STREAM, limit=100_000)
        states = Counter(run.state for run in runs)
        reasons = [f"run {run.id} {run.state}: {run.detail.get('reason')}" for run in runs if run.state == "failed"]
        summaries = [
            self.learning.registry.version(STREAM, f"v{row.number}").lineage.settings.get("summary", {})
            for row in self.learning.store.versions(STREAM)[1:]
        ]
        return {
            "fine_tunes": len(runs),
            **{f"fine_tunes_{state}": count for state, count in sorted(states.items())},
            "cut_short": sum(summary.get("ended") == "max_seconds" for summary in summaries),
            "epochs": round(float(np.mean([summary["epochs"] for summary in summaries])), 1) if summaries else 0,
            "updates": sum(summary.get("updates", 0) for summary in summaries),
            "training_seconds": round(sum(summary.get("train_seconds", 0.0) for summary in summaries), 1),
            "steps_with_a_revision_held": self.held,
            "quarantined": len(self.learning.store.quarantined(STREAM, limit=1_000_000)),
            "failures": reasons[:3],
        }

    def close(self) -> None:
        """Keep what the base encoder embedded, and let go of everything else."""
        if self.kind == "text":
            self._cache.keep(self._base)
        else:
            self._cache.forget(self._base)
        self.learning.store.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # Behind it

    def _revise(self) -> None:
        self._unrevised = 0
        pending, self._pending = self._pending, []
        learned = self._step(pending)
        self.learning.curator.learned(learned)
        self._learner.announce(self._now)
        self._learner.save(self._now)
        self.held += bool(self._learner.held)
        if self._finetune:
            for stream, count in learned.items():
                self.learning.trainer.learned(stream, count)
            if self.settings.triggers.gain is not None:
                self.learning.trainer.watch(
                    STREAM,
                    drifting=False,
                    worst_forgetting=0.0,
                    budget=1.0,
                    recalls=self.learning.store.recalls(STREAM, last=RECALL_WINDOW),
                )
            self._fine_tune()

    def _encoder(self, digest: str) -> Encoder:
        # The learning line may be on another encoder than the served one, after a rollback.
        if digest == self._learner.encoder_digest:
            return self._learner.encoder
        return self._learner._shelf.get(digest)

    def _event(self, position: int, payload: Payload) -> Report | Telemetry:
        event_id = f"{position:08d}"
        if isinstance(payload, str):
            return Report(event_id=event_id, stream=STREAM, observed_at=self._now, text=payload)
        values = [[None if np.isnan(v) else float(v) for v in row] for row in payload]
        return Telemetry(
            event_id=event_id, stream=STREAM, observed_at=self._now, channels=list(self.channels), values=values
        )

    def _step(self, records: Sequence[tuple[str, bytes]]) -> Counter[str]:
        if not records:
            return Counter()
        read, ends = [], {}
        for topic, value in records:
            read.append(Record(topic, 0, self._offsets[topic], None, value))
            self._offsets[topic] += 1
            ends[topic, 0] = self._offsets[topic]
        return self.learning.joiner.step(Batch(read, {}, ends, 0))

    def _fine_tune(self) -> None:
        if not self.learning.trainer.courses[STREAM].requested:
            return
        self.learning.trainer.run_requested()
        with self.learning.store.transaction(self.learning.epoch, self._now + timedelta(seconds=1)) as tx:
            tx.purge()

    def _sent(self) -> None:
        """Announcements have no reader here."""
        self.learning.store.delete_outbox(message.id for message in self.learning.store.outbox())


def _in_memory() -> Path | None:
    """A folder that no disk is behind, where there is room: waiting for a disk would be most of a short run."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > ROOM:
        return memory
    return None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says otherwise, block by block."""
    found = dict(base)
    for key, value in over.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found
