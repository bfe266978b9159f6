"""When a stream is fine-tuned, and what becomes of the candidate.

::

    trigger ──▶ snapshot ──▶ fine-tune (its own process) ──▶ exam ──▶ version ──▶ promoted, or refused
       ▲            learning goes on meanwhile                              │
       └── a trigger during a run is folded into the next one ◀─────────────┘

One run at a time: the machine's cores belong to the stream first. Whatever happens to the child process,
the served model is not touched; the run is kept with its reason.

Labels go on arriving while a run trains, are corrected and are withdrawn. What it trained on is what was true when
it began; everything after that (the head that is examined, the exam's own labels, the head that goes into service)
is made from the store as it is by then. So nothing taught meanwhile is lost, and no wrong label comes back by the
head; that the encoder saw one is said with the version. A run that trains on an event to be forgotten is stopped.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from learner.encoders import load_encoder
from learner.exam import ExamSettings, LeftOut, Verdict, examine, recent
from learner.finetune import (
    AS_SET,
    FineTuneFailed,
    FineTuneJob,
    FineTuneResult,
    FineTuneSettings,
    FineTuneStopped,
    Plan,
    Progress,
    Retrain,
    run_finetune,
)
from learner.gain import RECENT, Expected, Known, PastRun, expect
from learner.heads import HeadSums, LinearHead, calibrate, dequantise, leave_one_out, quantise, solve
from learner.online import CALIBRATION_EXAMPLES, InService, OnlineLearner, installed
from learner.registry import Lineage, Registry, VersionManifest
from monitoring.metrics import Metrics
from monitoring.tracing import Tracing
from replay.snapshot import write_snapshot
from replay.store import Foreseen, LearnerStore, Transaction
from stream.errors import RetryLater, TrimtabError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
EMBED_AT_ONCE = 256
"""Examples embedded between two looks at whether the run is still wanted."""
KEPT_OF_A_JOB = frozenset({"log.txt"})
"""What stays of a run that ended; it has no example in it."""

T = TypeVar("T")
Cause = Literal["labels", "timer", "drift", "forgetting", "gain", "hand"]


@dataclass(frozen=True)
class Triggers:
    """What sets off a fine-tune, beside a request by hand.

    Args:
        every_labels: after this many labels; None for never.
        every_seconds: after this long; None for never.
        drift: when the errors, the answers or the inputs drift.
        forgetting: when a class falls below its best by more than the stream's budget.
        gain: when a run is expected to bring so many points of accuracy a minute of training; None for never.
        minimum_labels: labels since the last run that a run by timer, drift, forgetting or gain needs.
        rest_seconds: shortest time between two runs.
    """

    every_labels: int | None = None
    every_seconds: float | None = None
    drift: bool = False
    forgetting: bool = False
    gain: float | None = None
    minimum_labels: int = 50
    rest_seconds: float = 60.0


@dataclass
class Wanted:
    """A fine-tune that waits to begin: what it is to be, why, and for whom."""

    named: Retrain
    causes: list[tuple[Cause, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Ids of the requests by hand that it answers."""
    who: str = ""
    """Who asked for it first."""


@dataclass
class Course:
    """What the trainer knows of one stream."""

    kind: Literal["text", "telemetry"]
    finetune: FineTuneSettings
    exam: ExamSettings
    triggers: Triggers
    requested: list[Wanted] = field(default_factory=list)
    """What waits, in the order in which it is done."""
    doing: Wanted = field(default_factory=lambda: Wanted(AS_SET))
    """What the run that is going is, or the last one was."""
    labels_since: int = 0
    taught: dict[str, int] = field(default_factory=dict)
    """Labels of each class when the last run began; none are known after a restart, until a run begins."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Labels that runs before the one that is going had trained on, and those new to it."""
    drifted: bool = False
    """A drift was found since the last run began."""
    ended_at: float = float("-inf")
    begun_at: float = 0.0
    running: bool = False
    run: int | None = None
    progress: Progress | None = None
    cause: Cause = "hand"
    base: str = ""
    reading: frozenset[str] = frozenset()
    cancelled: str | None = None
    drop_state: bool = False


LEFT_OUT_EXAMPLES = 2_000
"""Examples of classes too young for the exam that are judged left out one by one: a second's work."""


@dataclass(frozen=True)
class Candidate:
    """A fine-tuned model with its head, before it is judged.

    Args:
        head: taught by all the examples that are in the store now, as the one that goes into service will be.
        sums: what that head is solved from.
        taught: the labels of those examples, by event id.
        embeddings: by event id, of the same examples and of the exam's, under the candidate.
    """

    result: FineTuneResult
    head: LinearHead
    sums: HeadSums
    taught: dict[str, str]
    embeddings: dict[str, npt.NDArray[np.int16]]
    snapshot: str
    offsets: dict[str, int]


@dataclass(frozen=True)
class Cleared:
    """What a forgetting did to fine-tunes: the run that is stopped, and whether the kept state was dropped."""

    stopped: int | None = None
    state: bool = False


class Trainer:
    """Runs fine-tunes one after another in a thread of its own.

    Args:
        courses: by stream.
        learners: by stream.
        store: the learner's database.
        registry: where candidates are committed.
        epoch: under which the store is owned.
        directory: where jobs are worked on; kept small.
        learn: runs a function on the thread that owns the learners, and waits for it.
        metrics: where progress and outcomes are counted.
        clock: the time, in UTC.
        device: `auto`, `cpu` or `cuda`.
        tracing: where runs and their parts become spans; None where nothing is traced.
    """

    def __init__(
        self,
        courses: Mapping[str, Course],
        learners: Mapping[str, OnlineLearner],
        store: LearnerStore,
        registry: Registry,
        epoch: int,
        directory: Path,
        learn: Callable[[Callable[[], Any]], Future[Any]],
        metrics: Metrics,
        clock: Callable[[], datetime],
        device: Literal["auto", "cpu", "cuda"] = "auto",
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        self.courses, self._learners = courses, learners
        self._store, self._registry, self._epoch = store, registry, epoch
        self._directory, self._learn, self._metrics, self._clock = directory, learn, metrics, clock
        self._device = device
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="train", daemon=True)
        started = time.monotonic()
        for course in courses.values():
            course.begun_at = started

    def start(self) -> None:
        """Report runs that a crash cut off, and begin to listen for triggers."""
        now = self._clock()
        for run in self._store.runs(states={"running"}):
            with self._store.transaction(self._epoch, now) as tx:
                tx.unmark_trained(run.id)
                tx.update_run(run.id, state="failed", finished=True, detail={"reason": "the learner ended meanwhile"})
            self._metrics.versions.labels(run.stream, "failed").inc()
        for job in self._directory.glob("*/run-*"):
            _sweep(job)
        self._thread.start()

    def stop(self) -> None:
        """End the run that is going, if any, and the thread."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def forget(self, stream: str, event_ids: Collection[str], *, trained: bool) -> Cleared:
        """Stop a run that has one of these events in its snapshot; another is begun without it, when it has ended.

        Called on the learners' thread, so that no candidate is concluded meanwhile.

        Args:
            trained: whether a version was trained on one of them: the strategy's state goes as well, and the next run
                begins with a fresh one.
        """
        course = self.courses[stream]
        stopped = None
        if not course.reading.isdisjoint(event_ids):
            course.cancelled = "an example that it trained on was forgotten"
            stopped = course.run
            if stopped is not None:
                why = "the run before was stopped, as one of its examples was forgotten"
                self.request(stream, course.cause, why, named=course.doing.named, who=course.doing.who)
        state = self._directory / stream / "state"
        dropped = trained and state.exists()
        if trained:
            if course.running:  # the process may be reading it, or be about to replace it
                course.drop_state = True
            else:
                shutil.rmtree(state, ignore_errors=True)
        return Cleared(stopped, dropped)

    # Triggers

    def request(
        self,
        stream: str,
        cause: Cause,
        why: str = "",
        request_id: str = "",
        named: Retrain = AS_SET,
        who: str = "",
    ) -> str:
        """Ask for a fine-tune; the answer says when it will begin.

        Args:
            request_id: the run's detail names it, under `requests`.
            named: what it is to be; one that waits and is to be the same is done for both.
            who: who asks.
        """
        begins, course = self.begins(stream), self.courses[stream]
        with self._lock:
            wanted = next((one for one in course.requested if one.named == named), None)
            if wanted is None:
                wanted = Wanted(named, who=who)
                course.requested.append(wanted)
            wanted.causes.append((cause, why))
            if request_id:
                wanted.asked.append(request_id)
        self._metrics.triggers.labels(stream, cause).inc()
        self._wake.set()
        return begins

    def begins(self, stream: str) -> str:
        """When a fine-tune that is asked for now would begin."""
        course = self.courses[stream]
        with self._lock:
            folded, running = bool(course.requested), course.running
        if running:
            return "a fine-tune is running; this request is folded into the next one, which begins when it has ended"
        if folded:
            return "a fine-tune was asked for already; this request is folded into it"
        others = [name for name, other in self.courses.items() if other.running]
        if others:
            return f"it begins when the fine-tune of stream {others[0]!r} has ended"
        return "it begins now"

    def plan(self, stream: str, named: Retrain = AS_SET) -> Plan:
        """What a fine-tune by hand would do if it were asked for now, and why it would be refused."""
        course = self.courses[stream]
        refused: list[str] = []
        strategy = named.strategy or course.finetune.strategy
        with self._lock:
            waiting = course.requested[0] if course.requested else None
        if waiting is not None and waiting.named != named:
            whose = f"{waiting.who}'s" if waiting.who else f"one by {waiting.causes[0][0]}"
            refused.append(f"another retrain waits already ({whose}: {waiting.named}); ask again when it has begun")
        try:
            named.settings(course.finetune)
        except ValidationError as error:
            refused.append(str(error.errors(include_url=False)[0]["msg"]).removeprefix("Value error, "))
        whole = self._store.foreseen(stream)
        given = [row for row in whole if named.covers(row.observed_at)]
        if why := _too_little(given, whole, named):
            refused.append(why)
        exam = sum(self._store.class_counts(stream, exam=True).values())
        notes = [] if exam else ["no example is in the exam yet, so nothing that it makes could be promoted"]
        if self._learners[stream].paused:
            notes.append("learning is paused, so what passes its exam waits to be promoted by hand")
        past = self._past(stream)
        new = sum(row.new for row in given)
        return Plan(
            strategy=strategy,
            observed_from=named.observed_from,
            observed_to=named.observed_to,
            examples=dict(Counter(row.label for row in given).most_common()),
            new=new,
            memory=len(given) - new,
            left_out=sum(row.new for row in whole) - new,
            exam=exam,
            seconds=statistics.median(run.seconds for run in past) if past else None,
            begins=self.begins(stream),
            notes=tuple(notes),
            refused=tuple(refused),
        )

    def learned(self, stream: str, labels: int) -> None:
        """Count what was learned, and request a fine-tune once it is enough."""
        course = self.courses[stream]
        course.labels_since += labels
        every = course.triggers.every_labels
        if every is not None and course.labels_since >= every:
            self._trigger(stream, "labels", f"{course.labels_since} labels")

    def watch(
        self,
        stream: str,
        *,
        drifting: bool,
        worst_forgetting: float,
        budget: float,
        recalls: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Look at the clock, at drift, at forgetting and at what a run would bring; called every few seconds.

        Args:
            recalls: by class, how many of the last served answers were right, of how many.
        """
        course = self.courses[stream]
        triggers = course.triggers
        course.drifted = course.drifted or drifting
        if course.labels_since < triggers.minimum_labels:
            return
        since = time.monotonic() - max(course.ended_at, course.begun_at)
        if triggers.every_seconds is not None and since >= triggers.every_seconds:
            self._trigger(stream, "timer", f"{since:.0f} s since the last")
        elif triggers.drift and drifting:
            self._trigger(stream, "drift", "drift was found")
        elif triggers.forgetting and worst_forgetting > budget:
            self._trigger(stream, "forgetting", f"a class is {worst_forgetting:.2f} below its best")
        elif triggers.gain is not None and not (course.running or course.requested):
            expected = self._expect(stream, recalls or {})
            if expected.points_a_minute >= triggers.gain:
                why = f"{100 * expected.gain:.1f} points are expected from {expected.seconds:.0f} s"
                self._trigger(stream, "gain", why)

    def _expect(self, stream: str, recalls: Mapping[str, tuple[int, int]]) -> Expected:
        """What a run now should bring, from the classes' labels and recalls and from the last runs."""
        course, past = self.courses[stream], self._past(stream)
        right, total = (sum(column) for column in zip(*recalls.values(), strict=True)) if recalls else (0, 0)
        overall = 1.0 - right / total if total else 1.0
        classes = {}
        for name, count in self._learners[stream].sums.counts.items():
            hits, asked = recalls.get(name, (0, 0))
            taught = min(course.taught.get(name, 0), count)
            # A class that was hardly asked for is taken to be as wrong as all are.
            classes[name] = Known(taught, count - taught, (asked - hits + 5.0 * overall) / (asked + 5.0))
        return expect(classes, past, drifted=course.drifted)

    def _past(self, stream: str) -> list[PastRun]:
        """The last runs that came to an exam, newest first."""
        past = []
        for run in self._store.runs(stream, states={"promoted", "refused"}, limit=RECENT):
            exam = run.detail.get("exam")
            if exam and run.started_at and run.finished_at:
                lasted = (run.finished_at - run.started_at).total_seconds()
                past.append(PastRun(**{"seconds": lasted, **exam}))
        return past

    def _trigger(self, stream: str, cause: Cause, why: str) -> None:
        course = self.courses[stream]
        resting = time.monotonic() - course.ended_at < course.triggers.rest_seconds
        if course.running or course.requested or resting:
            return
        self.request(stream, cause, why)

    # Runs

    def _loop(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(1.0)
            self._wake.clear()
            self.run_requested()

    def run_requested(self) -> None:
        """Carry out, one after another, the fine-tunes asked for; on a thread other than the one that learns."""
        for stream in list(self.courses):
            if not self._stop.is_set() and self._take(stream):
                with self._span("fine-tune", stream=stream):
                    self._run(stream)

    def _span(self, name: str, **about: str) -> AbstractContextManager[None]:
        if self._tracing is None:
            return nullcontext()
        return self._tracing.span(name, **{f"trimtab.{key}": value for key, value in about.items()})

    def _take(self, stream: str) -> bool:
        course = self.courses[stream]
        with self._lock:
            course.running = bool(course.requested)
        return course.running

    def _run(self, stream: str) -> None:
        course = self.courses[stream]
        with self._lock:
            wanted = course.doing = course.requested.pop(0)
        causes = wanted.causes
        cause = course.cause = causes[0][0]
        why = "; ".join(f"{c}: {w}" if w else c for c, w in causes)
        if wanted.named != AS_SET:
            why += f" ({wanted.named})"
        began = time.monotonic()
        self._metrics.finetune_running.labels(stream).set(1)
        self._metrics.finetune_progress.labels(stream).set(0)
        outcome = "failed"
        try:
            outcome = self._fine_tune(stream, course, cause, why)
        except FineTuneStopped:
            outcome, reason = "stopped", course.cancelled or "the learner is ending"
            logger.info("stream %s: the fine-tune was stopped: %s", stream, reason)
            self._end_run(course, "stopped", reason)
        except (TrimtabError, OSError, ValueError) as error:
            logger.error("stream %s: the fine-tune came to nothing: %s", stream, error)
            self._metrics.versions.labels(stream, "failed").inc()
            self._end_run(course, "failed", str(error))
        except Exception as error:
            logger.exception("stream %s: the fine-tune came to nothing", stream)
            self._metrics.versions.labels(stream, "failed").inc()
            self._end_run(course, "failed", f"{type(error).__name__}: {error}")
        finally:
            seconds = time.monotonic() - began
            if self._tracing is not None:
                about = {"trimtab.cause": cause, "trimtab.outcome": outcome}
                self._tracing.note(failed=outcome == "failed", **about)
            for job in (self._directory / stream).glob("run-*"):
                _sweep(job)
            if course.drop_state:
                shutil.rmtree(self._directory / stream / "state", ignore_errors=True)
            course.reading, course.drop_state = frozenset(), False
            course.ended_at, course.running, course.progress, course.run = time.monotonic(), False, None, None
            self._metrics.finetune_running.labels(stream).set(0)
            self._metrics.finetune_seconds.labels(stream).observe(seconds)
            logger.info("stream %s: fine-tune (%s) ended as %s after %.0f s", stream, why, outcome, seconds)

    def _end_run(self, course: Course, state: str, reason: str) -> None:
        run = course.run
        if run is None:
            return

        def write() -> None:
            with self._store.transaction(self._epoch, self._clock()) as tx:
                tx.unmark_trained(run)
                tx.update_run(run, state=state, finished=True, detail={"reason": reason})

        try:
            while True:
                try:
                    self._learn(write).result()
                    return
                except RetryLater as error:
                    logger.warning("the end of run %s cannot be written yet: %s", run, error)
                    if self._stop.wait(RETRY_SECONDS):
                        return  # the next start sees a run that was cut off
        except Exception:
            logger.exception("the end of run %s could not be written", run)

    def _fine_tune(self, stream: str, course: Course, cause: Cause, why: str) -> str:
        learner = self._learners[stream]
        with self._span("prepare"):
            job, digest, offsets = self._learn(lambda: self._prepare(stream, course, cause, why)).result()
        with self._span("train"):
            result = run_finetune(
                job,
                lambda progress: self._on_progress(stream, course, progress),
                lambda: self._unwanted(course),
            )
        with self._span("embed"):
            embeddings = self._embed_rest(stream, course, result)
        # In this order, so that no class that the champion knows is missing from what the candidate is taught.
        serving = learner.serving
        head, sums, taught = self._candidate_head(result, embeddings, learner)
        candidate = Candidate(result, head, sums, taught, embeddings, digest, offsets)
        with self._span("examine"):
            verdict = self._examine(learner, serving, candidate, course)
        with self._span("conclude"):
            outcome: str = self._learn(lambda: self._conclude(stream, course, candidate, verdict, cause)).result()
        if outcome == "promoted" and not course.drop_state:
            self._keep_state(stream, result)
        shutil.rmtree(job.directory, ignore_errors=True)
        return outcome

    def _unwanted(self, course: Course) -> bool:
        return self._stop.is_set() or course.cancelled is not None

    def _prepare(self, stream: str, course: Course, cause: Cause, why: str) -> tuple[FineTuneJob, str, dict[str, int]]:
        """Freeze what there is to learn from; on the learners' thread, so that nothing moves meanwhile."""
        learner, now, wanted = self._learners[stream], self._clock(), course.doing
        detail: dict[str, Any] = {"why": why}
        if wanted.asked:
            detail["requests"] = wanted.asked
        if wanted.named != AS_SET:
            detail["retrain"] = wanted.named.model_dump(mode="json", exclude_none=True)
        with self._store.transaction(self._epoch, now) as tx:
            run = tx.add_run(stream, cause, state="running", detail=detail)
            tx.update_run(run, state="running", started=True)
        course.run, course.cancelled = run, None
        course.labels_since = 0
        training = self._store.experience(stream, wanted.named.observed_from, wanted.named.observed_to)
        exam = self._store.examples(stream, exam=True)
        left: Counter[str] = Counter()
        if not training or wanted.named.ranged:
            whole = self._store.foreseen(stream)
            given = [row for row in whole if wanted.named.covers(row.observed_at)]
            if why_not := _too_little(given, whole, wanted.named):
                raise FineTuneFailed(why_not)
            # What is outside the range stays new, and still calls for a run.
            left = Counter(row.label for row in whole if row.new and not wanted.named.covers(row.observed_at))
            course.labels_since = left.total()
        counts = {name: max(0, count - left[name]) for name, count in learner.sums.counts.items()}
        known = sum(min(course.taught.get(name, 0), count) for name, count in counts.items())
        course.sizes = {"taught": known, "since": sum(counts.values()) - known}
        course.taught, course.drifted = counts, False
        with self._store.transaction(self._epoch, now) as tx:
            tx.mark_trained(stream, run, [row.event_id for row in training])
        directory = self._directory / stream / f"run-{run}"
        shutil.rmtree(directory, ignore_errors=True)
        rows = [*training, *exam]
        course.base = learner.version
        course.reading = frozenset(row.event_id for row in rows)
        digest = write_snapshot(rows, directory / "snapshot", course.kind)
        spec, files = self._registry.encoder(learner.encoder_digest)
        state = self._directory / stream / "state"
        job = FineTuneJob(
            stream=stream,
            directory=directory,
            snapshot=directory / "snapshot",
            encoder=spec,
            encoder_files=files,
            state=state if state.exists() else None,
            settings=wanted.named.settings(course.finetune),
            device=self._device,
        )
        offsets = {f"{topic}/{partition}": offset for (topic, partition), offset in self._store.offsets().items()}
        return job, digest, offsets

    def _on_progress(self, stream: str, course: Course, progress: Progress) -> None:
        course.progress = progress
        if progress.total:
            self._metrics.finetune_progress.labels(stream).set(progress.done / progress.total)

    def _embed_rest(self, stream: str, course: Course, result: FineTuneResult) -> dict[str, npt.NDArray[np.int16]]:
        """Every example of the store under the candidate: those of the snapshot, and those that it did not have.

        Here and not at the promotion, which would keep the learners' thread from learning meanwhile.

        Raises:
            FineTuneStopped: the run is not wanted any more.
        """
        embeddings = result.by_event()
        missing = sorted(self._store.present(stream).keys() - embeddings.keys())
        if missing:
            encoder = load_encoder(result.encoder, result.files, self._learners[stream].device)
            for start in range(0, len(missing), EMBED_AT_ONCE):
                if self._unwanted(course):
                    raise FineTuneStopped("the fine-tune was stopped on request")
                rows = self._store.examples(stream, event_ids=missing[start : start + EMBED_AT_ONCE])
                fresh = quantise(encoder.embed([row.payload for row in rows]), encoder.spec.bound)
                embeddings.update({row.event_id: embedding for row, embedding in zip(rows, fresh, strict=True)})
        return embeddings

    def _candidate_head(
        self, result: FineTuneResult, embeddings: Mapping[str, npt.NDArray[np.int16]], learner: OnlineLearner
    ) -> tuple[LinearHead, HeadSums, dict[str, str]]:
        present = self._store.present(learner.plan.name)
        taught = {event_id: label for event_id, (label, exam) in present.items() if not exam and event_id in embeddings}
        sums = HeadSums(result.encoder.dimension, result.encoder.bound, learner.plan.random_features)
        if taught:
            sums.add(np.stack([embeddings[event_id] for event_id in taught]), list(taught.values()))
        some = sorted(taught, key=lambda event_id: crc32(event_id.encode()))[:CALIBRATION_EXAMPLES]
        calibration = None
        if some:
            left_out = np.stack([embeddings[event_id] for event_id in some])
            labels = [taught[event_id] for event_id in some]
            calibration = calibrate(sums, left_out, labels, prior=learner.plan.prior)
        head = solve(sums, prior=learner.plan.prior, calibration=calibration)
        if head is None:
            raise FineTuneFailed("no class is left to learn")
        return head, sums, taught

    def _examine(self, learner: OnlineLearner, serving: InService, candidate: Candidate, course: Course) -> Verdict:
        """Both models answer the exam as it is labelled now; the champion with the head it served a moment ago."""
        exam = [
            row for row in self._store.examples(learner.plan.name, exam=True) if row.event_id in candidate.embeddings
        ]
        kept = recent([row.label for row in exam], [row.observed_at for row in exam], course.exam)
        exam = [exam[place] for place in kept]
        labels = [row.label for row in exam]
        if not exam:
            return examine([], [], [], settings=course.exam)
        encoder = learner.encoder if serving.encoder == learner.encoder_digest else None
        champion: list[str | None] = [None] * len(exam)
        if serving.head is not None and encoder is not None:
            # The rows were read under the encoder in service; a promotion meanwhile cannot be, runs go one by one,
            # but a rollback by hand can.
            if {row.encoder for row in exam} == {serving.encoder}:
                stacked = np.stack([row.embedding for row in exam])
                champion = list(serving.head.predict(dequantise(stacked, encoder.spec.bound).astype(np.float32)))
            else:
                champion = list(serving.head.predict(encoder.embed([row.payload for row in exam])))
        stacked = np.stack([candidate.embeddings[row.event_id] for row in exam])
        answers = candidate.head.predict(dequantise(stacked, candidate.result.encoder.bound).astype(np.float32))
        # A class that is left in the champion's head alone, all its events let go, is not the candidate's to know.
        asked = {label for label, _ in self._store.present(learner.plan.name).values()}
        return examine(
            labels,
            champion,
            list(answers),
            champion_classes=sorted(asked & set(serving.head.classes)) if serving.head else (),
            candidate_classes=candidate.head.classes,
            left_out=self._left_out(learner, candidate, set(labels)),
            settings=course.exam,
        )

    def _left_out(self, learner: OnlineLearner, candidate: Candidate, examined: set[str]) -> LeftOut:
        """Both heads' answers to examples of classes too young for the exam, each left out of the head it asks."""
        found = self._learn(lambda: learner.left_out(examined, LEFT_OUT_EXAMPLES)).result()
        # What was corrected since the candidate was taught is no longer what it was taught.
        asked = sorted(event_id for event_id, (label, _) in found.items() if candidate.taught.get(event_id) == label)
        if not asked:
            return LeftOut()
        labels = [found[event_id][0] for event_id in asked]
        q = np.stack([candidate.embeddings[event_id] for event_id in asked])
        answers = leave_one_out(candidate.sums, q, labels, prior=learner.plan.prior)
        return LeftOut(labels=labels, champion=[found[event_id][1] for event_id in asked], candidate=answers)

    def _keep_state(self, stream: str, result: FineTuneResult) -> None:
        """Keep the strategy's state for the next run, which goes on from the version that was promoted."""
        target = self._directory / stream / "state"
        fresh = target.with_name("state.new")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(result.state, fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)

    def _conclude(self, stream: str, course: Course, candidate: Candidate, verdict: Verdict, cause: Cause) -> str:
        """Commit the candidate as a version, and put it into service if its exam says so."""
        learner, now, run = self._learners[stream], self._clock(), course.run
        named = course.doing.named
        finetune = named.settings(course.finetune)
        assert run is not None
        if course.cancelled is not None:
            raise FineTuneStopped(course.cancelled)
        changed = self._store.lost_by_run(run)
        result = candidate.result
        files = {name: path.read_bytes() for name, path in result.files.items()}
        encoder = self._registry.put_encoder(result.encoder, files)
        head = self._registry.put_head(candidate.head.tensors())
        manifest = VersionManifest(
            stream=stream,
            parent=course.base,
            created_at=now,
            encoder=result.encoder,
            head=head,
            classes=candidate.head.classes,
            lineage=Lineage(
                snapshot=candidate.snapshot,
                label_offsets=candidate.offsets,
                strategy=finetune.strategy,
                seed=finetune.seed,
                packages=installed(),
                settings={
                    "cause": cause,
                    "finetune": finetune.model_dump(mode="json"),
                    "retrain": named.model_dump(mode="json", exclude_none=True),
                    "summary": result.summary.model_dump(mode="json"),
                    "labels_changed_meanwhile": changed,
                },
            ),
            verdict=verdict,
        )
        name = self._registry.commit(manifest)
        manifest = self._registry.version(stream, name)
        state = "promoted" if verdict.promote and not learner.paused else "refused"
        reasons = list(verdict.reasons)
        if changed:
            reasons.append(
                f"its encoder was trained on {changed} labels that were corrected or withdrawn meanwhile; "
                "its head was not"
            )
        if verdict.promote and learner.paused:
            state = "waiting"
            reasons.append("learning is paused; promote it by hand, or resume")

        def record(tx: Transaction) -> None:
            tx.add_version(
                stream,
                encoder=encoder,
                head=head,
                state=state,
                parent=int(course.base.removeprefix("v")),
                run=run,
                number=manifest.number,
                detail={"reasons": reasons, "unjudged": verdict.unjudged},
            )
            detail: dict[str, Any] = {"version": name, "reasons": reasons}
            if verdict.n:
                accuracies = {"champion": verdict.champion_accuracy, "candidate": verdict.candidate_accuracy}
                seconds = round(time.monotonic() - course.begun_at, 3)
                detail["exam"] = {**course.sizes, **accuracies, "seconds": seconds}
            tx.update_run(run, state=state, finished=True, detail=detail)
            if state == "refused":
                tx.unmark_trained(run)  # no version that may serve has seen them: the next run takes them as new

        if state == "promoted":
            why = f"exam passed, asked for by {cause}"
            learner.put_in_service(manifest, candidate.embeddings, why, now, record, shadow=True)
            self._metrics.last_promotion.labels(stream).set(now.timestamp())
        else:
            with self._store.transaction(self._epoch, now) as tx:
                record(tx)
        logger.info("stream %s: %s is %s: %s", stream, name, state, "; ".join(reasons))
        self._metrics.versions.labels(stream, "promoted" if state == "promoted" else "refused").inc()
        course.run = None  # concluded: whatever goes wrong from here on, the run has not come to nothing
        return state


def _too_little(given: Sequence[Foreseen], whole: Sequence[Foreseen], named: Retrain) -> str | None:
    """Why no fine-tune can be made of these examples, in a sentence; None where one can.

    Args:
        given: those of `whole` that the range covers.
    """
    if not whole:
        return "there is nothing to learn from yet"
    classes = {row.label for row in given}
    if len(classes) > 1:
        return None
    what = f"only examples of class {classes.pop()!r}" if classes else "no example"
    if not named.ranged:
        return f"there are {what} to learn from, and it takes two classes"
    start, end = (f(row.observed_at for row in whole) for f in (min, max))
    return (
        f"observed_from, observed_to: {what} in the range, and it takes two classes; what there is to learn from was "
        f"observed from {start.isoformat()} to {end.isoformat()}"
    )


def _sweep(job: Path) -> None:
    """Remove what a run left in its directory but its log; the snapshot in it holds examples."""
    for path in job.iterdir() if job.is_dir() else ():
        if path.name not in KEPT_OF_A_JOB:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
