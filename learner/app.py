"""The learner's Faust app: it joins, learns, announces, trains, and does what people ask of it.

::

    predictions, labels ──▶ KafkaReader (thread) ──▶ Joiner.step ──▶ store ──▶ follow ▸ announce ──▶ outbox ──▶ Kafka
    control topic, HTTP  ──▶ Gate ──▶ act ────────────────┘ (one thread owns all that learns)
    Trainer (thread) ──▶ fine-tune process ──▶ exam ──▶ act

It does nothing of this before it leads (`replay.lease`): until then it stands by, or joins its share of the
partitions (`learner.sharing`).

Everything that changes what is learned runs on one thread, in whole steps. What follows from a step leaves
through the outbox, which is part of the step's transaction.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

import mode
from confluent_kafka import KafkaError, Message, Producer
from faust.web import View
from pydantic import ValidationError

from learner.asking import Asker
from learner.control import AskedRequest, ControlAnswer, ControlRequest, Gate, Malformed, Refused, first_wrong
from learner.curation import Curator
from learner.finetune import AS_SET, Plan
from learner.joining import Joiner
from learner.online import OnlineLearner
from learner.registry import BrokenVersion, Registry
from learner.shadow import Duel
from learner.sharing import Follower
from learner.trainer import Trainer
from learner.unlearning import Erasure, forget
from monitoring.drift import DriftMonitor, Kind
from monitoring.metrics import QUARANTINE_REASONS, Metrics
from replay.lease import Lease
from replay.store import REQUESTS_KEPT, Asked, Held, LearnerStore, Outgoing, Run
from stream.batches import Batch, Reader
from stream.errors import RetryLater, Superseded, TrimtabError
from stream.events import Label, Record, encode
from stream.service import MOST_BODY, Shell

logger = logging.getLogger(__name__)

WATCH_SECONDS = 5.0
PURGE_SECONDS = 3600.0
PURGED_AT_ONCE = 5_000
"""Predictions let go of in one transaction, for which joining waits."""
PURGE_SHARE = 0.1
"""Of the time from one look to the next, what letting go of predictions may take."""
RECALL_WINDOW = 2_000
RECALL_MINIMUM = 10
RETRY_SECONDS = 0.5
REQUESTS_SHOWN = 1_000
MOST_RESUMED = 1_000
"""Requests that one start does or tells of because the process before it ended too early."""
DONE_BEFORE = "done; the learner ended before it could say more"
NEVER_TAKEN = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_RECORD})
DRIFT_KINDS: tuple[Kind, ...] = ("input", "prediction", "error")


class Outbox:
    """Sends what the store's transactions left to be sent, in order, at least once.

    Args:
        store: whose outbox it empties.
        epoch: under which the store is owned.
        connection: librdkafka connection properties.
    """

    def __init__(self, store: LearnerStore, epoch: int, connection: Mapping[str, Any]) -> None:
        self._store, self._epoch = store, epoch
        self._producer = Producer(
            {
                **connection,
                "partitioner": "murmur2_random",
                "enable.idempotence": True,
                "linger.ms": 0,
                "delivery.timeout.ms": 30_000,
                # How large a message may be is the topic's to say: what is sent again was on one before.
                "message.max.bytes": 100_000_000,
            }
        )

    def send(self) -> int:
        """Send what is waiting; returns how many messages that were.

        Raises:
            RetryLater: the broker did not acknowledge them; they wait on.
            Superseded: another learner owns the store, and sends them.
        """
        messages = self._store.outbox()
        if not messages:
            return 0
        check_owner(self._store, self._epoch)
        refused = self._write(messages)
        # The broker refuses all that came together with one that it does not take.
        for message in refused:
            if self._write([message]):
                size = len(message.value or b"")
                logger.error("topic %s does not take a message of %d bytes, which is let go", message.topic, size)
        self._store.delete_outbox(message.id for message in messages)
        return len(messages)

    def _write(self, messages: Sequence[Outgoing]) -> list[Outgoing]:
        """Write messages and wait for the broker; returns those that it will never take."""
        failed: list[str] = []
        refused: list[Outgoing] = []

        def tell(message: Outgoing, error: KafkaError | None, _: Message) -> None:
            if error is not None and error.code() in NEVER_TAKEN:
                refused.append(message)
            elif error is not None:
                failed.append(str(error))

        for message in messages:
            self._producer.produce(
                message.topic,
                value=message.value,
                key=message.key,
                headers=list(message.headers),
                on_delivery=partial(tell, message),
            )
        if self._producer.flush(35) or failed:
            self._producer.purge()
            self._producer.flush(1)
            raise RetryLater(f"announcements are not acknowledged: {(failed or ['no answer'])[0]}")
        return refused


def _answer(
    request: ControlRequest, accepted: bool, message: str, erasure: Erasure | None = None, plan: Plan | None = None
) -> ControlAnswer:
    return ControlAnswer(
        id=request.id,
        action=request.action,
        stream=request.stream,
        accepted=accepted,
        message=message,
        cleaned=erasure.cleaned if erasure else (),
        not_reached=erasure.not_reached if erasure else (),
        retrain=None if request.named == AS_SET else request.named,
        plan=plan,
        who=request.who,
        reason=request.reason,
    )


def _standing(asked: Asked, run: Run | None) -> AskedRequest:
    message = ControlAnswer.model_validate_json(asked.answer).message if asked.answer else DONE_BEFORE
    state: Any = asked.state
    if run is not None:
        state = "running" if run.state == "running" else "done"
        why = run.detail.get("reason") or "; ".join(run.detail.get("reasons", ()))
        message = f"run {run.id} is {run.state}{': ' + str(why) if why else ''}"
    return AskedRequest(
        id=asked.id,
        action=asked.action,
        stream=asked.stream,
        state=state,
        message=message,
        who=asked.who,
        reason=asked.reason,
        run=None if run is None else run.id,
        run_state=None if run is None else run.state,
        at=asked.at,
    )


def check_owner(store: LearnerStore, epoch: int) -> None:
    """Return if the store is still owned under `epoch`.

    Raises:
        Superseded: another learner claimed it since.
    """
    owner = store.owner()
    if owner is not None and owner[1] != epoch:
        raise Superseded(f"learner {owner[0]!r} owns the store under epoch {owner[1]}, this learner's is {epoch}")


def _shadow(duel: Duel) -> dict[str, Any]:
    return {"version": duel.loser, "labels": duel.total.seen, "won": duel.total.won, "lost": duel.total.lost}


def close_duel(learner: OnlineLearner, audit: str, metrics: Metrics, now: datetime) -> None:
    """Where the loser of a promotion has answered long enough, let it go, or give it its place back.

    Args:
        audit: name of the audit topic, which is told of a champion that is rolled back.
    """
    stream, duel = learner.plan.name, learner.duel
    if duel is None or not duel.over(learner.plan.shadow):
        return
    if not duel.reason:
        logger.info("stream %s: %s is no worse than %s on live labels", stream, duel.champion, duel.loser)
        learner.end_shadow(now)
    if learner.overruled is None:
        return
    answer = ControlAnswer(
        id=f"shadow-{stream}-{duel.champion}",
        action="rollback",
        stream=stream,
        accepted=True,
        message=f"{duel.loser} is in service again: {duel.champion} was rolled back by itself",
        who="shadow",
        reason=duel.reason,
        at=now,
    )
    try:
        learner.overrule(now, lambda tx: tx.send([Outgoing(audit, stream.encode(), encode(answer))]))
    except BrokenVersion as error:
        logger.error("stream %s: %s; but %s cannot be served again: %s", stream, duel.reason, duel.loser, error)
        learner.end_shadow(now)
        return
    logger.warning("stream %s: %s is rolled back by itself: %s", stream, duel.champion, duel.reason)
    metrics.versions.labels(stream, "overruled").inc()


@dataclass(frozen=True)
class Parts:
    """What the learner is wired from.

    Args:
        originals: reads what dead letters were, by their places; it raises `Refused` where one is gone.
    """

    reader: Reader
    joiner: Joiner
    asker: Asker
    curator: Curator
    learners: Mapping[str, OnlineLearner]
    trainer: Trainer
    drift: Mapping[str, DriftMonitor]
    store: LearnerStore
    registry: Registry
    outbox: Outbox
    epoch: int
    budgets: Mapping[str, float]
    originals: Callable[[Sequence[str]], Sequence[Record]] | None = None


class LearnerApp:
    """The Faust app of a learner process.

    Args:
        shell: the app, its pages and its end.
        connect: makes the parts once the app starts, on the learning thread; it is given a way to run functions there.
        control: name of the control topic.
        audit: name of the audit topic.
        gate: decides which control messages are let through.
        clock: the time, in UTC.
        lease: by which this learner comes to lead, and goes on leading.
        revision_seconds: shortest time between two revisions of a stream.
        follower: joins this learner's share of the partitions until it leads; None where it only stands by.
    """

    def __init__(
        self,
        shell: Shell,
        connect: Callable[[Callable[[Callable[[], Any]], Future[Any]]], Parts],
        control: str,
        audit: str,
        gate: Gate,
        clock: Callable[[], datetime],
        lease: Lease,
        revision_seconds: float = 0.5,
        follower: Follower | None = None,
    ) -> None:
        self._follower = follower
        self._revision_seconds, self._lease = revision_seconds, lease
        self.shell, self._connect, self._audit, self._gate, self._clock = shell, connect, audit, gate, clock
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._learning = ThreadPoolExecutor(1, thread_name_prefix="learn")
        self._sending = ThreadPoolExecutor(1, thread_name_prefix="send")
        self._ending = threading.Event()
        self._opened = asyncio.Event()
        self._joining_ended = asyncio.Event()
        self._parts: Parts | None = None
        self._connecting: Future[Parts] | None = None
        self._left_to_send = asyncio.Event()
        self._drifts: dict[tuple[str, str], int] = {}
        shell.turn = self._stand_by
        shell.draining.append(self._drain)
        self._declare(control)
        self._add_pages()

    @property
    def parts(self) -> Parts:
        """The wired parts; there once the app has started."""
        assert self._parts is not None
        return self._parts

    @property
    def opened(self) -> bool:
        """Whether the parts are there."""
        return self._opened.is_set()

    @property
    def metrics(self) -> Metrics:
        """Where everything is counted."""
        return self.shell.metrics

    def _declare(self, control: str) -> None:
        learner, app = self, self.shell.app

        @app.service
        class Joining(mode.Service):  # type: ignore[misc]
            """Reads predictions and labels, and learns."""

            @mode.Service.task  # type: ignore[untyped-decorator]
            async def join(self) -> None:
                await learner._guard(learner._join_batches)

        @app.service
        class Sending(mode.Service):  # type: ignore[misc]
            """Empties the outbox."""

            @mode.Service.task  # type: ignore[untyped-decorator]
            async def send(self) -> None:
                await learner._guard(learner._send_outbox)

        @app.service
        class Watching(mode.Service):  # type: ignore[misc]
            """Counts, compares with the best so far, and pulls triggers."""

            @mode.Service.task  # type: ignore[untyped-decorator]
            async def watch(self) -> None:
                await learner._guard(learner._watch)

        topic = app.topic(control, key_serializer="raw", value_serializer="raw")

        @app.agent(topic)  # type: ignore[untyped-decorator]
        async def take_control(stream) -> None:  # type: ignore[no-untyped-def]
            async for event in stream.events():
                headers = event.message.headers or {}
                pairs = headers.items() if isinstance(headers, Mapping) else headers
                await learner._take(event.value or b"", {str(name): bytes(value or b"") for name, value in pairs})

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a piece of the learner; whatever leaves it ends the process."""
        try:
            await work()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._ending.set()
            self.shell.fail(error)

    # Leading

    async def _stand_by(self) -> None:
        """Return once this learner leads."""
        loop, health = asyncio.get_running_loop(), self.shell.health
        self.metrics.leading.set(0)
        said = ""
        while True:
            try:
                leads = await loop.run_in_executor(self._learning, self._lease.take, self._clock()) is not None
                holder = self._lease.holder
                why = f"learner {holder.owner!r} leads under epoch {holder.epoch}" if holder else ""
            except RetryLater as error:
                leads, why = False, str(error)
            if leads:
                break
            if why != said:
                logger.info("standing by: %s", why)
            said = why
            health.waiting("lease", f"{'standing by' if self._follower is None else 'following'}: {why}")
            if self._follower is None:
                await asyncio.sleep(self._lease.pause)
            else:
                follow = self._follower.follow
                await loop.run_in_executor(self._reading, follow, self._lease.pause, self._ending.is_set)
        if self._follower is not None:
            # It reads on as the leader, once its models are there.
            await loop.run_in_executor(self._reading, self._follower.close)
        health.ready("lease")
        self._lease.keep(self.shell.fail, self._note_database)
        # Models are loaded while the control topic's group comes together, which takes seconds as well.
        self._connecting = self._learning.submit(self._connect, self.learn)

    def _note_database(self, why: str | None) -> None:
        if why is None:
            self.shell.health.ready("database")
        else:
            self.shell.health.waiting("database", why)

    # Joining

    def learn(self, work: Callable[[], Any]) -> Future[Any]:
        """Run `work` on the thread that owns all that learns."""
        return self._learning.submit(work)

    async def _join_batches(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            assert self._connecting is not None
            self._parts = await asyncio.wrap_future(self._connecting)
            self.parts.trainer.start()
            await loop.run_in_executor(self._learning, self._resume_asked)
            for stream, budget in self.parts.budgets.items():
                self.metrics.forgetting_budget.labels(stream).set(budget)
            self._opened.set()
            self.shell.health.ready("models")
            while not self._ending.is_set():
                try:
                    batch = await loop.run_in_executor(self._reading, self.parts.reader.read, 0.1)
                    if batch is not None and self.parts.reader.current(batch):
                        await loop.run_in_executor(self._learning, self._learn_from, self.parts.joiner.step, batch)
                    await loop.run_in_executor(self._learning, self._learn_from, self.parts.joiner.take_in)
                    behind = batch is not None and batch.full
                    if await loop.run_in_executor(self._learning, self._announce, behind):
                        self._left_to_send.set()
                    self.shell.health.ready("source")
                except RetryLater as error:
                    logger.warning("joining: %s; trying again", error)
                    self.shell.health.waiting("source", str(error))
                    self.parts.reader.rewind()
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            self._joining_ended.set()

    def _learn_from(self, step: Callable[..., Counter[str]], *batch: Batch) -> None:
        learned = step(*batch)
        for stream, count in learned.items():
            self.parts.trainer.learned(stream, count)
        if batch or learned:
            self.parts.curator.learned(learned)

    def _announce(self, behind: bool) -> bool:
        """Announce what was learned; returns whether there was anything to announce."""
        now = self._clock()
        announced = False
        for learner in self.parts.learners.values():
            close_duel(learner, self._audit, self.metrics, now)
            announced |= learner.announce(now, pause=self._revision_seconds, behind=behind)
            learner.save(now)
        return announced

    async def _send_outbox(self) -> None:
        await self._opened.wait()
        loop = asyncio.get_running_loop()
        while not self._ending.is_set():
            try:
                sent = await loop.run_in_executor(self._sending, self.parts.outbox.send)
                self.shell.health.ready("outbox")
            except RetryLater as error:
                logger.warning("%s; trying again", error)
                self.shell.health.waiting("outbox", str(error))
                sent = 0
            if not sent:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._left_to_send.wait(), 0.05)
                self._left_to_send.clear()

    # Watching

    async def _watch(self) -> None:
        await self._opened.wait()
        loop, purged_at = asyncio.get_running_loop(), time.monotonic()
        while not self._ending.is_set():
            try:
                await loop.run_in_executor(self._learning, self._look)
                await loop.run_in_executor(self._learning, self._ask_for_labels)
                until = time.monotonic() + PURGE_SHARE * WATCH_SECONDS
                while await loop.run_in_executor(self._learning, self._purge_index) and time.monotonic() < until:
                    pass
                if time.monotonic() - purged_at > PURGE_SECONDS:
                    purged_at = time.monotonic()
                    await loop.run_in_executor(self._learning, self._purge)
            except RetryLater as error:
                logger.warning("watching: %s; trying again", error)
            await asyncio.sleep(WATCH_SECONDS)

    def _ask_for_labels(self) -> None:
        for stream in self.parts.learners:
            self.parts.asker.ask(stream, self.parts.joiner.embedded)

    def _purge_index(self) -> bool:
        """Let go of some predictions that have waited for too long or are too many; whether more may have to go."""
        store = self.parts.store
        with store.transaction(self.parts.epoch, self._clock()) as tx:
            gone = tx.purge_index(PURGED_AT_ONCE, self._indexed - store.settings.index_size)
        self._indexed -= gone
        return gone == PURGED_AT_ONCE

    def _purge(self) -> None:
        with self.parts.store.transaction(self.parts.epoch, self._clock()) as tx:
            purged = tx.purge()
        for stream, count in purged.too_late.items():
            self.metrics.labels.labels(stream, "too_late").inc(count)

    def _look(self) -> None:
        parts, metrics = self.parts, self.metrics
        # Without a label to learn, nothing else would tell a learner that another one took over.
        check_owner(parts.store, parts.epoch)
        sizes = parts.store.sizes()
        metrics.outbox.set(sizes["outbox"])
        metrics.join_index.set(sizes["served"])
        self._indexed = sizes["served"]
        metrics.leading.set(1)
        for topic, lag in parts.reader.lag().items():
            metrics.consumer_lag.labels(topic).set(lag)
        for stream, learner in parts.learners.items():
            right, total = parts.store.accuracy(stream)
            if total:
                metrics.accuracy.labels(stream).set(right / total)
            estimator = parts.joiner.estimators[stream]
            if (estimate := estimator.estimate()) is not None:
                metrics.accuracy_estimate.labels(stream).set(estimate)
            if (error := estimator.error()) is not None:
                metrics.accuracy_estimate_error.labels(stream).set(error)
            counts = parts.store.class_counts(stream, member_only=True)
            metrics.set_bounded(metrics.replay_examples, stream, {name: float(n) for name, n in counts.items()})
            metrics.classes.labels(stream).set(len(learner.sums.counts))
            metrics.serving(stream, learner.serving.name)
            metrics.scored_by(stream, learner.serving.name, "right", 0)
            waiting = parts.store.quarantine_counts(stream)
            for reason in QUARANTINE_REASONS:
                metrics.quarantined.labels(stream, reason).set(waiting.get(reason, 0))
            metrics.suspects.labels(stream).set(len(parts.store.doubts(stream)))
            metrics.alike_classes.labels(stream).set(len(parts.curator.alike(stream)))
            forgetting = self._forgetting(stream)
            metrics.set_bounded(metrics.forgetting, stream, forgetting)
            drifting = self._look_at_drift(stream, parts.drift[stream])
            parts.trainer.watch(
                stream,
                drifting=drifting,
                worst_forgetting=max(forgetting.values(), default=0.0),
                budget=parts.budgets[stream],
                recalls=parts.store.recalls(stream, last=RECALL_WINDOW),
            )

    def _forgetting(self, stream: str) -> dict[str, float]:
        """Best recall so far minus recall now, by class, of what was served."""
        store = self.parts.store
        now = {
            name: right / total
            for name, (right, total) in store.recalls(stream, last=RECALL_WINDOW).items()
            if total >= RECALL_MINIMUM
        }
        best = store.best_recall(stream)
        better = {name: recall for name, recall in now.items() if recall > best.get(name, 0.0)}
        if better:
            with store.transaction(self.parts.epoch, self._clock()) as tx:
                tx.raise_best_recall(stream, better)
        return {name: max(0.0, max(best.get(name, 0.0), recall) - recall) for name, recall in now.items()}

    def _look_at_drift(self, stream: str, monitor: DriftMonitor) -> bool:
        """Whether a drift was found since the last look."""
        found = False
        for kind in DRIFT_KINDS:
            self.metrics.drift_score.labels(stream, kind).set(monitor.score(kind))
            self.metrics.drift_state.labels(stream, kind).set(int(monitor.state(kind)))
            new = monitor.drifts(kind) - self._drifts.get((stream, kind), 0)
            if new > 0:
                self._drifts[stream, kind] = monitor.drifts(kind)
                self.metrics.drifts.labels(stream, kind).inc(new)
                found = True
        return found

    # Control

    async def _take(self, value: bytes, headers: Mapping[str, bytes]) -> None:
        """One message of the control topic."""
        await self._opened.wait()
        answer: Callable[[], Awaitable[object]]
        try:
            request = self._gate.admit(value, headers)
            answer = partial(self.act, request)
        except Refused as refusal:
            logger.warning("a control message is refused: %s", refusal)
            self.metrics.control.labels("unknown", "refused").inc()
            if not isinstance(refusal, Malformed):
                return
            loop = asyncio.get_running_loop()
            answer = partial(loop.run_in_executor, self._learning, self._tell_malformed, refusal)
        while not self._ending.is_set():
            try:
                await answer()
                return
            except RetryLater as error:
                # The topic will not bring it again.
                logger.warning("control: a message waits: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    def _tell_malformed(self, refusal: Malformed) -> None:
        """Tell whoever sent it what is wrong with it; once, however often the same message comes."""
        if self.parts.store.asked(refusal.id) is not None:
            return
        answer = ControlAnswer(
            id=refusal.id,
            action=refusal.action,
            stream=refusal.stream,
            accepted=False,
            message=str(refusal),
            who=refusal.who,
            reason=refusal.reason,
            at=self._clock(),
        )
        asked = Asked(
            refusal.id,
            "",
            refusal.action,
            refusal.stream,
            "refused",
            refusal.who,
            refusal.reason,
            answer.at,
            answer.model_dump_json(),
        )
        self._settle(asked, answer)

    async def act(self, request: ControlRequest) -> ControlAnswer:
        """Do what is asked, or say why not; either way the audit topic is told.

        Raises:
            RetryLater: the database is away, so that nothing can be told.
        """
        await self._opened.wait()
        loop = asyncio.get_running_loop()
        # Read while learning goes on; what is then sent again leaves like everything, through the outbox.
        again = await loop.run_in_executor(None, self._letters, request)
        answer: ControlAnswer = await loop.run_in_executor(self._learning, self._act, request, again)
        return answer

    def _letters(self, request: ControlRequest) -> Sequence[Record] | Refused:
        if request.action != "replay":
            return ()
        if self.parts.originals is None:
            return Refused("this learner cannot read dead letters")
        try:
            return self.parts.originals(request.letters)
        except Refused as refusal:
            return refusal
        except TrimtabError as error:
            return Refused(str(error))

    def _act(self, request: ControlRequest, again: Sequence[Record] | Refused) -> ControlAnswer:
        store, now = self.parts.store, self._clock()
        before = store.asked(request.id)
        if before is not None and before.answer is not None and before.digest == request.digest:
            return ControlAnswer.model_validate_json(before.answer)
        if before is not None and before.digest != request.digest:
            message = (
                f"request {request.id} was another one, {before.action} of {before.stream}; give this one its own id"
            )
            return _answer(request, False, message)
        asked = Asked(
            request.id, request.digest, request.action, request.stream, "done", request.who, request.reason, now
        )
        erasure, plan = Erasure("", (), ()), None
        try:
            if before is not None:
                message = DONE_BEFORE
            elif request.action == "retrain":
                self._learner(request.stream)
                foreseen = self.parts.trainer.plan(request.stream, request.named)
                plan = foreseen if request.dry_run else None
                if foreseen.refused:
                    raise Refused(str(foreseen) if request.dry_run else "; ".join(foreseen.refused))
                message = str(foreseen) if request.dry_run else foreseen.begins
                asked = replace(asked, state="done" if request.dry_run else "accepted")
            elif request.action == "forget":
                with store.effect_of(asked):
                    erasure = self._forget(request)
                message = erasure.message
            elif request.action == "replay":
                with store.effect_of(asked):
                    message = self._send_again(again)
            else:
                message = self._do(request, asked)
            accepted = True
        except (Refused, BrokenVersion) as refusal:
            accepted, message = False, str(refusal)
            asked = replace(asked, state="refused")
        answer = _answer(request, accepted, message, erasure, plan)
        asked = replace(asked, answer=answer.model_dump_json())
        self.metrics.control.labels(request.action, "accepted" if accepted else "refused").inc()
        logger.info("control: %s %s by %s: %s", request.action, request.stream, request.who or "unnamed", message)
        while True:
            try:
                self._settle(asked, answer)
                break
            except RetryLater as error:
                # It is done, so it must not be asked for again because of this.
                logger.warning("control: the audit topic is told later of %s: %s", request.id, error)
                if self._ending.wait(RETRY_SECONDS):
                    return answer
        if asked.state == "accepted":
            trainer = self.parts.trainer
            trainer.request(request.stream, "hand", request.reason, request.id, request.named, request.who)
        return answer

    def _resume_asked(self) -> None:
        """Do what was accepted by a learner that ended before it was done, and tell what it could not tell."""
        store = self.parts.store
        left = [one for one in store.last_asked(MOST_RESUMED, unsettled=True) if one.stream in self.parts.learners]
        runs = self._runs(left)
        for asked in reversed(left):
            if asked.answer is None:
                answer = ControlAnswer(
                    id=asked.id,
                    action=asked.action,
                    stream=asked.stream,
                    accepted=True,
                    message=DONE_BEFORE,
                    who=asked.who,
                    reason=asked.reason,
                )
                self._settle(replace(asked, answer=answer.model_dump_json()), answer)
            elif asked.id in runs:
                self._settle(replace(asked, state="done"))
            else:
                named = ControlAnswer.model_validate_json(asked.answer).retrain or AS_SET
                self.parts.trainer.request(asked.stream, "hand", asked.reason, asked.id, named, asked.who)

    def _settle(self, asked: Asked, answer: ControlAnswer | None = None) -> None:
        with self.parts.store.transaction(self.parts.epoch, self._clock()) as tx:
            tx.keep_asked(asked)
            tx.send([Outgoing(self._audit, asked.stream.encode(), encode(answer))] if answer else [])

    def _runs(self, asked: Sequence[Asked]) -> dict[str, Run]:
        """By request, the fine-tune that it became."""
        streams = {one.stream for one in asked if one.action == "retrain"}
        return {
            request_id: run
            for stream in sorted(streams)
            for run in reversed(self.parts.store.runs(stream, limit=MOST_RESUMED))
            for request_id in run.detail.get("requests", ())
        }

    def _asked(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """How requests stand."""
        runs = self._runs(asked)
        return [_standing(one, runs.get(one.id)).model_dump(mode="json") for one in asked]

    def _learner(self, stream: str) -> OnlineLearner:
        learner = self.parts.learners.get(stream)
        if learner is None:
            raise Refused(f"stream {stream!r} is not configured (known: {', '.join(sorted(self.parts.learners))})")
        return learner

    def _send_again(self, again: Sequence[Record] | Refused) -> str:
        if isinstance(again, Refused):
            raise again
        messages = [Outgoing(one.topic, one.key, one.value, tuple(one.headers)) for one in again]
        with self.parts.store.transaction(self.parts.epoch, self._clock()) as tx:
            tx.send(messages)
        where = ", ".join(sorted({one.topic for one in again}))
        return f"{len(messages)} message{'' if len(messages) == 1 else 's'} sent again, to {where}"

    def _forget(self, request: ControlRequest) -> Erasure:
        learner = self._learner(request.stream)
        return forget(request.event_ids, learner, self.parts.trainer, self.parts.store, self._clock())

    def _do(self, request: ControlRequest, asked: Asked) -> str:
        learner = self._learner(request.stream)
        if request.action in ("promote", "rollback"):
            return self._put_in_service(request, learner, self._clock(), asked)
        with self.parts.store.effect_of(asked):
            return self._change(request, learner, self._clock())

    def _change(self, request: ControlRequest, learner: OnlineLearner, now: datetime) -> str:
        parts = self.parts
        match request.action:
            case "pause":
                learner.pause(now)
                return f"{learner.serving.name} stays in service until learning is resumed"
            case "resume":
                learner.resume(now)
                return f"{learner.serving.name} is in service and follows the labels"
            case "label":
                said, by = str(request.label), request.who or "by hand"
                return parts.curator.label(request.stream, dict.fromkeys(request.event_ids), said, by)
            case "release" | "drop":
                assert request.held is not None
                held = Held(**request.held.model_dump(exclude={"all"}))
                change = parts.curator.release if request.action == "release" else parts.curator.drop
                return change(request.stream, held)
            case "rename" | "merge":
                if parts.trainer.courses[request.stream].running:
                    raise Refused("a fine-tune of the stream is running and knows the old name; ask when it has ended")
                merge = request.action == "merge"
                return parts.curator.rename(request.stream, str(request.old), str(request.new), merge=merge)
        raise AssertionError(request.action)

    def _put_in_service(self, request: ControlRequest, learner: OnlineLearner, now: datetime, asked: Asked) -> str:
        parts = self.parts
        self._nothing_changed(request, learner)
        name = request.version or self._predecessor(request.stream, learner)
        if "." in name:
            if request.action == "promote":
                raise Refused(f"{name} is a revision; roll back to it, or promote its version {name.partition('.')[0]}")
            with parts.store.effect_of(asked):
                learner.serve_revision(name, now)
            self.metrics.versions.labels(request.stream, "rolled_back").inc()
            return f"{name} is in service again; learning is paused until it is resumed"
        manifest = parts.registry.verify(request.stream, name)
        known: Mapping[str, Any] = {}
        if request.action == "promote" and manifest.verdict and not manifest.verdict.promote and not request.force:
            verdict, known = learner.examine_again(manifest, parts.trainer.courses[request.stream].exam, now)
            if not verdict.promote:
                why = f"examined again on the {verdict.n} examples there are now: {'; '.join(verdict.reasons)}"
                raise Refused(f"{name} did not pass its exam ({why}); force it with --force, which the audit records")
        cause = f"{request.action} by {request.who or 'hand'}{': ' + request.reason if request.reason else ''}"
        # What was forced is not put to the test again.
        shadow = request.action == "promote" and not request.force
        with parts.store.effect_of(asked):
            learner.put_in_service(manifest, known, cause, now, shadow=shadow)
        outcome = "rolled_back" if request.action == "rollback" else "promoted"
        self.metrics.versions.labels(request.stream, outcome).inc()
        if outcome == "promoted":
            self.metrics.last_promotion.labels(request.stream).set(now.timestamp())
        return f"{learner.serving.name} is in service"

    def _nothing_changed(self, request: ControlRequest, learner: OnlineLearner) -> None:
        if request.seen is None or request.seen.partition(".")[0] == learner.version:
            return
        reign = self.parts.store.champion(request.stream)
        since = f" since {reign.at:%H:%M:%S} UTC ({reign.cause})" if reign else ""
        raise Refused(f"{learner.version} is in service{since}, and no longer {request.seen}; look again, then ask")

    def _predecessor(self, stream: str, learner: OnlineLearner) -> str:
        for reign in self.parts.store.champions(stream):
            if f"v{reign.version}" != learner.version:
                return f"v{reign.version}"
        raise Refused(f"{learner.version} is the first version of stream {stream!r}; there is none to roll back to")

    # Pages

    def _status(self, stream: str) -> dict[str, Any]:
        parts = self.parts
        learner, course = parts.learners[stream], parts.trainer.courses[stream]
        right, total = parts.store.accuracy(stream)
        progress = course.progress
        return {
            "stream": stream,
            "serving": learner.serving.name,
            "version": learner.version,
            "paused": learner.paused,
            "shadow": None if learner.duel is None else _shadow(learner.duel),
            "held": learner.held,
            "outbox": parts.store.sizes()["outbox"],
            "classes": len(learner.sums.counts),
            "labels_learned": learner.sums.total,
            "accuracy": right / total if total else None,
            "scored": total,
            "accuracy_estimate": parts.joiner.estimators[stream].estimate(),
            "accuracy_estimate_error": parts.joiner.estimators[stream].error(),
            "drift": {k: parts.drift[stream].state(k).name.lower() for k in DRIFT_KINDS},
            "fine_tune": {
                "running": course.running,
                "requested": len(course.requested),
                "labels_since": course.labels_since,
                "progress": progress.model_dump() if progress else None,
            },
        }

    def _versions(self, stream: str) -> list[dict[str, Any]]:
        return [
            {
                "version": f"v{row.number}",
                "state": row.state,
                "parent": None if row.parent is None else f"v{row.parent}",
                "created_at": row.created_at,
                **row.detail,
            }
            for row in self.parts.store.versions(stream)
        ]

    def _quarantine(self, stream: str, query: Mapping[str, str]) -> dict[str, Any]:
        """What waits in quarantine, at most 1,000 labels a page, and how the labellers stand.

        Args:
            query: `labeller`, `label` and `reason` to choose by, `after` an id to read on from, `limit`.
        """
        parts = self.parts
        held = Held(labeller=query.get("labeller"), label=query.get("label"), reason=query.get("reason"))
        numbers = [query.get(name, default) for name, default in (("after", "0"), ("limit", "100"))]
        if not all(number.isdecimal() for number in numbers):
            raise Refused("after and limit are whole numbers")
        after, limit = (min(int(number), 2**53) for number in numbers)
        doubts = {doubt.labeller: doubt for doubt in parts.store.doubts(stream)}
        standings = parts.curator.standings(stream)
        return {
            "waiting": parts.store.quarantine_counts(stream),
            "labels": [
                {
                    # A field that this version does not know may have any name, and any number.
                    **row.label.model_dump(include=set(Label.model_fields)),
                    "id": row.id,
                    "reason": row.reason,
                    "detail": row.detail,
                    "set_aside_at": row.at,
                    "place": row.place,
                }
                for row in parts.store.quarantined(stream, min(limit, 1_000), held, after)
            ],
            "labellers": [
                {
                    "labeller": name,
                    "believed": name not in doubts,
                    "since": doubts[name].since if name in doubts else None,
                    "why": doubts[name].why if name in doubts else "",
                    **(asdict(standings[name]) if name in standings else {}),
                }
                for name in sorted({*doubts, *standings})
            ],
        }

    def _classes(self, stream: str) -> list[dict[str, Any]]:
        store = self.parts.store
        near: dict[str, list[str]] = defaultdict(list)
        for pair in self.parts.curator.alike(stream):
            near[pair.one].append(pair.other)
            near[pair.other].append(pair.one)
        once: dict[str, list[str]] = defaultdict(list)
        for name, into in store.aliases(stream).items():
            once[into].append(name)
        best, counts = store.best_recall(stream), self.parts.learners[stream].sums.counts
        recalls = store.recalls(stream, last=RECALL_WINDOW)
        return [
            {
                "class": name,
                "labels_learned": counts.get(name, 0),
                "recall": recalls[name][0] / recalls[name][1] if name in recalls else None,
                "scored": recalls[name][1] if name in recalls else 0,
                "best_recall": best.get(name),
                "first_seen": first,
                "alike": near.get(name, []),
                "was": once.get(name, []),
            }
            for name, first in store.classes(stream).items()
        ]

    def _requests(self, stream: str) -> dict[str, Any]:
        return self.parts.asker.page(stream, REQUESTS_SHOWN)

    def _add_pages(self) -> None:
        learner, app, shell = self, self.shell.app, self.shell
        readers: dict[str, Callable[[str], Any]] = {
            "status": self._status,
            "versions": self._versions,
            "classes": self._classes,
            "requests": self._requests,
        }

        async def ask(view: Any, find: Callable[[], Any], none: str = "") -> Any:
            try:
                found = await asyncio.get_running_loop().run_in_executor(learner._learning, find)
            except Refused as refusal:
                return shell.json(view, {"error": str(refusal)}, 400)
            except RetryLater as error:
                return shell.json(view, {"error": str(error)}, 503)
            return shell.json(view, {"error": none}, 404) if found is None else shell.json(view, found)

        async def read(view: Any, request: Any, stream: str, what: str) -> Any:
            foreign = shell.foreign(request)
            if foreign:
                return shell.json(view, {"error": foreign}, 403)
            if not learner._opened.is_set():
                return shell.json(view, {"error": "starting"}, 503)
            if stream not in learner.parts.learners:
                return shell.json(view, {"error": f"stream {stream!r} is not configured"}, 404)
            if what not in (*readers, "quarantine"):
                return shell.json(view, {"error": f"there is no page {what!r}"}, 404)
            return await ask(
                view,
                lambda: (
                    learner._quarantine(stream, dict(request.query)) if what == "quarantine" else readers[what](stream)
                ),
            )

        @app.page("/streams")  # type: ignore[untyped-decorator]
        async def streams(view: Any, request: Any) -> Any:
            foreign = shell.foreign(request)
            if foreign:
                return shell.json(view, {"error": foreign}, 403)
            if not learner._opened.is_set():
                return shell.json(view, {"error": "starting"}, 503)
            names: Sequence[str] = sorted(learner.parts.learners)
            return await ask(view, lambda: [learner._status(name) for name in names])

        @app.page("/requests")  # type: ignore[untyped-decorator]
        async def requests(view: Any, request: Any) -> Any:
            if not learner._opened.is_set():
                return shell.json(view, {"error": "starting"}, 503)
            return await ask(view, lambda: learner._asked(learner.parts.store.last_asked()))

        @app.page("/requests/{request_id}")  # type: ignore[untyped-decorator]
        async def asked(view: Any, request: Any, request_id: str) -> Any:
            if not learner._opened.is_set():
                return shell.json(view, {"error": "starting"}, 503)

            def find() -> Any:
                one = learner.parts.store.asked(request_id)
                return None if one is None else learner._asked([one])[0]

            none = f"no request {request_id[:100]!r} was taken in {REQUESTS_KEPT.days} days; `trimtab asked` lists them"
            return await ask(view, find, none)

        @app.page("/streams/{stream}")  # type: ignore[untyped-decorator]
        async def one(view: Any, request: Any, stream: str) -> Any:
            return await read(view, request, stream, "status")

        @app.page("/streams/{stream}/{what}")  # type: ignore[untyped-decorator]
        class Page(View):  # type: ignore[misc]
            async def get(self, request: Any, stream: str, what: str) -> Any:
                return await read(self, request, stream, what)

            async def post(self, request: Any, stream: str, what: str) -> Any:
                # A browser sends no such type across sites without asking first, so a foreign page cannot act.
                if request.content_type != "application/json":
                    return shell.json(self, {"error": "send application/json"}, 415)
                foreign = shell.foreign(request)
                if foreign:
                    return shell.json(self, {"error": foreign}, 403)
                if not shell.authorised(request):
                    return shell.json(self, {"error": "the bearer token is missing or wrong"}, 401)
                sent = await shell.body(request)
                if sent is None:
                    most = f"more than {MOST_BODY // 1024} KiB were sent; nothing that is asked for is so long"
                    return shell.json(self, {"error": most}, 413)
                try:
                    body = json.loads(sent or "{}")
                    asked = ControlRequest.model_validate({**body, "action": what, "stream": stream})
                except ValidationError as error:
                    return shell.json(self, {"error": first_wrong(error)}, 400)
                except (ValueError, TypeError, RecursionError) as error:
                    return shell.json(self, {"error": str(error)}, 400)
                try:
                    answer = await learner.act(asked)
                except RetryLater as error:
                    return shell.json(self, {"error": f"not done, ask again: {error}"}, 503)
                return shell.json(self, answer.model_dump(mode="json"), 202 if answer.accepted else 409)

    async def _drain(self) -> None:
        """Finish the step, stop training, send what is still to be sent, leave the group."""
        self._ending.set()
        loop = asyncio.get_running_loop()
        connecting: Future[Parts] | None = self._connecting
        if self._parts is None and (connecting is None or connecting.cancel()):
            if self._follower is not None:
                await loop.run_in_executor(self._reading, self._follower.close)
            await loop.run_in_executor(None, self._lease.leave)
            return
        if self._parts is None and connecting is not None:
            self._joining_ended.set()
            try:
                self._parts = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(connecting)), timeout=30)
            except Exception:
                # Whoever waited for the parts has said why there are none.
                await loop.run_in_executor(None, self._lease.leave)
                return
        try:
            await asyncio.wait_for(self._joining_ended.wait(), timeout=30)
        except TimeoutError:
            logger.warning("a batch was still being joined after 30 s; it will be joined again")
        await loop.run_in_executor(None, self.parts.trainer.stop)
        try:
            await loop.run_in_executor(self._sending, self.parts.outbox.send)
        except TrimtabError as error:
            logger.warning("%s; it is sent by the next learner", error)
        await loop.run_in_executor(self._reading, self.parts.reader.close)
        await loop.run_in_executor(None, self._lease.leave)
        self.parts.store.close()
