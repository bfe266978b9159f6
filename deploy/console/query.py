"""What the console shows, as JSON: made of the learner's parts, its database's past and what the watcher kept.

Nothing here changes anything. Every answer is bounded, whatever there is: so many classes, versions, letters, points.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from deploy.console import curves
from deploy.console.watch import Neighbour, Watcher, gauge
from deploy.explain import Explainer, readable, told_letter
from deploy.messages import letter, read_at
from deploy.rollback import Blast
from learner.app import DRIFT_KINDS, Parts
from learner.control import Refused
from learner.finetune import Strategy
from learner.registry import BrokenVersion
from monitoring.drift import Kind
from monitoring.metrics import Metrics
from replay.history import History
from replay.store import Reign, Run
from stream.errors import RetryLater
from stream.events import Place, Report, Telemetry
from stream.kafka import KafkaSettings
from stream.service import Health

JUDGED = 6_000
"""Answers with their labels that curves and heat map are made of."""
SHOWN_VERSIONS = 60
SHOWN_RUNS = 20
SHOWN_LETTERS = 200
SHOWN_TEXT = 20_000
SHOWN_REQUESTS = 100
SHOWN_CHANNELS = 32
SHOWN_POINTS = 400
LOOKED_AT = 10_000
"""Messages of a part of a topic that an explanation looks through: a page is not waited for."""
COUNTED = 20_000
"""Predictions that are read to say how far versions reached."""
COUNT_KEPT_SECONDS = 15.0
"""How long that holds for whoever asks next."""
SHOWN_CLASSES = 12
SILENT_SECONDS = 60.0
KEPT_SECONDS = 2.0
ENOUGH = 100
"""Scored answers from which the model is compared with its rivals."""

Level = Literal["good", "look", "bad", "none"]


class Missing(Exception):
    """There is no such thing; the message says what."""


class Check(BaseModel):
    """One of the five questions, answered for a stream.

    Args:
        question: the question's key.
        level: `good`, `look` (someone should), `bad` (it stands still), `none` (nothing is known yet).
        says: the answer in a sentence.
    """

    question: Literal["right", "moving", "forgetting", "running", "keeping_up"]
    level: Level
    says: str


class Query:
    """Answers the page's questions.

    Args:
        parts: the learner's parts, or None as long as there are none.
        watcher: what passes by.
        health: the learner's.
        kafka: where dead letters and events are read.
        topics: whole names by what they hold.
        kinds: by stream, `text` or `telemetry`.
        guarded: whether a token is asked for.
        metrics: the learner's.
        explainer: made of the learner's parts; explains events.
        leaving: how far what is left by going back has reached: of the parts, a stream, the version to go back to
            (None: the one before) and how many predictions may be read.
    """

    def __init__(
        self,
        parts: Callable[[], Parts | None],
        watcher: Watcher,
        health: Health,
        kafka: KafkaSettings,
        topics: Mapping[str, str],
        kinds: Mapping[str, str],
        guarded: bool,
        metrics: Metrics,
        explainer: Callable[[Parts], Explainer],
        leaving: Callable[[Parts, str, str | None, int], Blast],
    ) -> None:
        self._explainer, self._leaving = explainer, leaving
        self._counted: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}
        self._parts, self._watcher, self._health, self._kafka = parts, watcher, health, kafka
        self._topics, self._kinds, self._guarded = topics, kinds, guarded
        self._kept: dict[str, tuple[float, dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._metrics = metrics
        self._release = version("trimtab")

    def state(self) -> dict[str, Any]:
        """Everything at a glance."""
        parts, now = self._parts(), time.time()
        with self._watcher.lock:
            workers = [_worker(one) for one in self._watcher.workers.values()]
            answers = [one.model_dump(mode="json", exclude={"cleaned", "not_reached"}) for one in self._watcher.answers]
            pace = self._watcher.pace.columns()
        failure = self._health.failure
        return {
            "at": now,
            "release": self._release,
            "guarded": self._guarded,
            "ready": not self._health.reasons,
            "waiting_for": self._health.reasons,
            "failure": None if failure is None else str(failure),
            "starting": parts is None,
            "streams": [self._glance(parts, name, now) for name in sorted(self._kinds)] if parts else [],
            "workers": workers,
            "pace": pace,
            "outbox": parts.store.sizes()["outbox"] if parts else 0,
            "answers": answers[:-31:-1],
            "troubles": dict(self._watcher.troubles),
        }

    def stream(self, name: str) -> dict[str, Any]:
        """All of one stream."""
        parts = self._opened(name)
        numbers, now = self._numbers(parts, name), time.time()
        store, learner = parts.store, parts.learners[name]
        with self._watcher.lock:
            drift = self._watcher.moving[name].columns()
            alarms = [asdict(one) for one in self._watcher.alarms[name]]
            pace = self._watcher.pace.columns()
            workers = [_worker(one) for one in self._watcher.workers.values()]
        reigns, runs = store.champions(name, SHOWN_VERSIONS), store.runs(name, limit=SHOWN_RUNS)
        classes = store.classes(name)
        newest = sorted(classes.items(), key=lambda item: item[1], reverse=True)[:10]
        return {
            **self._glance(parts, name, now),
            "accuracy": numbers["accuracy"],
            "heat": numbers["heat"],
            "delays": numbers["delays"],
            "drift": {
                "curve": drift,
                "states": {kind: parts.drift[name].state(kind).name.lower() for kind in DRIFT_KINDS},
                "scores": {kind: parts.drift[name].score(kind) for kind in DRIFT_KINDS},
            },
            "new_classes": [{"class": one, "at": at.timestamp()} for one, at in newest],
            "class_names": sorted({*classes, *learner.plan.labels})[:2_000],
            "closed": parts.joiner.closed_labels(name) is not None,
            "versions": self._versions(parts, name),
            "runs": [_run(one) for one in runs],
            "marks": sorted([*alarms, *_marks(reigns, runs)], key=lambda mark: mark["at"])[-300:],
            "pace": pace,
            "workers": workers,
            "quarantine": store.quarantine_counts(name),
            "label_requests": store.request_counts(name)["open"],
            "suspects": [{"labeller": one.labeller, "why": one.why} for one in store.doubts(name)],
        }

    def version(self, name: str, wanted: str) -> dict[str, Any]:
        """Where a version comes from, and what its exam found."""
        parts = self._opened(name)
        try:
            manifest = parts.registry.version(name, wanted)
        except BrokenVersion as error:
            raise Missing(str(error)) from None
        found = manifest.model_dump(mode="json", exclude={"encoder", "blobs"})
        found["classes"] = len(manifest.classes)
        if found["verdict"]:
            found["verdict"]["classes"] = sorted(
                found["verdict"]["classes"], key=lambda one: (one["outcome"] != "worse", one["label"])
            )[:200]
        return found

    def radius(self, name: str, target: str) -> dict[str, Any]:
        """How far the versions reached that a rollback would leave; not for several threads at once.

        Args:
            target: the version to go back to, or `previous`.
        """
        parts, key, now = self._opened(name), (name, target), time.monotonic()
        if not re.fullmatch(r"v[0-9]{1,9}|previous", target):
            raise Missing(f"{target[:100]!r} is no version such as v12")
        self._counted = {one: kept for one, kept in self._counted.items() if now < kept[0]}
        kept = self._counted.get(key)
        if kept is not None and kept[1]["in_service"] == parts.learners[name].serving.name:
            return kept[1]
        try:
            found = self._leaving(parts, name, None if target == "previous" else target, COUNTED).as_json()
        except Refused as error:
            raise Missing(str(error)) from None
        found["more_classes"] = max(0, len(found["classes"]) - SHOWN_CLASSES)
        found["classes"] = found["classes"][:SHOWN_CLASSES]
        self._counted[key] = time.monotonic() + COUNT_KEPT_SECONDS, found
        return found

    def unlabelled(self, name: str) -> list[dict[str, Any]]:
        """Newest events that nobody has labelled."""
        parts = self._opened(name)
        return [
            {
                "event_id": one.event_id,
                "label": one.label,
                "version": one.model_version,
                "at": one.predicted_at.timestamp(),
            }
            for one in History(parts.store).unlabelled(name, 20)
        ]

    def requests(self, name: str) -> dict[str, Any]:
        """Labels that the learner asks for and has not got, best first, and what its budget leaves."""
        return self._opened(name).asker.page(name, SHOWN_REQUESTS)

    def event(self, name: str, event_id: str) -> dict[str, Any]:
        """One event: what it says, how it was answered, and what was said and learned of it."""
        return self._explainer(self._opened(name)).glance(name, event_id, seen)

    def explain(self, name: str, event_id: str) -> dict[str, Any]:
        """The same, with what only the topics know, and what speaks for its answer."""
        return self._explainer(self._opened(name)).explain(name, event_id, LOOKED_AT)

    def letters(self, reason: str | None) -> dict[str, Any]:
        """The newest dead letters, without what is in them."""
        with self._watcher.lock:
            kept = [one for one in self._watcher.letters if reason in (None, one.reason)]
            reasons: dict[str, int] = {}
            for one in self._watcher.letters:
                reasons[one.reason or "unknown"] = reasons.get(one.reason or "unknown", 0) + 1
        return {
            "reasons": reasons,
            "letters": [told_letter(one) for one in kept[: -SHOWN_LETTERS - 1 : -1]],
            "trouble": self._watcher.troubles.get("dead_letters"),
        }

    def letter(self, place: str) -> dict[str, Any]:
        """One dead letter with what is in it."""
        partition, _, offset = place.partition(":")
        if not (partition.isdecimal() and offset.isdecimal() and len(place) < 30):
            raise Missing(f"{place[:40]!r} is no place of a dead letter")
        where = Place(topic=self._topics["dead_letters"], partition=int(partition), offset=int(offset))
        record = read_at(self._kafka, where)
        if record is None:
            raise Missing(f"there is no dead letter at {place}, or its retention has ended")
        one = letter(record)
        return {**told_letter(one), "content": None if one.by_reference else readable(one.original.value)}

    # Parts of answers

    def _opened(self, name: str) -> Parts:
        parts = self._parts()
        if parts is None:
            raise RetryLater("the learner is starting")
        if name not in parts.learners:
            raise Missing(f"stream {name[:100]!r} is not configured (known: {', '.join(sorted(parts.learners))})")
        return parts

    def _numbers(self, parts: Parts, name: str) -> dict[str, Any]:
        """Curves of a stream, made so seldom that all streams together take a tenth of a core, however many look."""
        with self._lock:
            began = time.monotonic()
            made = self._kept.get(name)
            if made is not None and began < made[0]:
                return made[1]
            judged = History(parts.store).judged(name, JUDGED)
            with self._watcher.lock:
                frozen = dict(self._watcher.twin[name])
            numbers = {
                "accuracy": curves.accuracy(judged, frozen),
                "heat": curves.heat(judged, parts.store.best_recall(name), parts.budgets[name]),
                "delays": curves.delays(judged),
            }
            now = time.monotonic()
            self._kept[name] = (now + max(KEPT_SECONDS, 10 * len(self._kinds) * (now - began)), numbers)
            return numbers

    def _glance(self, parts: Parts, name: str, now: float) -> dict[str, Any]:
        learner, course = parts.learners[name], parts.trainer.courses[name]
        numbers = self._numbers(parts, name)
        reign = parts.store.champion(name)
        duel = learner.duel
        progress = course.progress
        with self._watcher.lock:
            newest = self._watcher.newest.get(name)
            letters: dict[str, int] = {}
            for worker in self._watcher.workers.values():
                for reason, count in worker.dead_letters.get(name, {}).items():
                    letters[reason] = letters.get(reason, 0) + count
        glance: dict[str, Any] = {
            "stream": name,
            "kind": self._kinds[name],
            "serving": learner.serving.name,
            "version": learner.version,
            "since": reign.at.timestamp() if reign else None,
            "because": reign.cause if reign else "",
            "paused": learner.paused,
            "held": learner.held,
            "classes": len(learner.sums.counts),
            "labels_learned": learner.sums.total,
            "now": numbers["accuracy"]["now"],
            "last_prediction": newest,
            "last_label": gauge(self._metrics.last_label, name),
            "estimate": gauge(self._metrics.accuracy_estimate, name),
            "estimate_error": gauge(self._metrics.accuracy_estimate_error, name),
            "shadow": {"version": duel.loser, "won": duel.total.won, "lost": duel.total.lost, "seen": duel.total.seen}
            if duel
            else None,
            "dead_letters": letters,
            "fine_tune": {
                "running": course.running,
                "requested": len(course.requested),
                "cause": course.cause,
                "strategy": course.finetune.strategy,
                "strategies": get_args(Strategy),
                "labels_since": course.labels_since,
                "progress": progress.model_dump() if progress else None,
            },
        }
        glance["checks"] = [one.model_dump() for one in self._checks(parts, name, glance, numbers, now)]
        return glance

    def _checks(
        self, parts: Parts, name: str, glance: Mapping[str, Any], numbers: Mapping[str, Any], now: float
    ) -> list[Check]:
        runs = parts.store.runs(name, limit=1)
        with self._watcher.lock:
            workers = list(self._watcher.workers.values())
        states = {kind: parts.drift[name].state(kind).name.lower() for kind in DRIFT_KINDS}
        return [
            right(numbers["accuracy"]["now"]),
            moving(states),
            forgetting(numbers["heat"], numbers["accuracy"]["now"]["n"]),
            running(glance, runs[0] if runs else None),
            keeping_up(glance["last_prediction"], workers, self._health.reasons, now),
        ]

    def _versions(self, parts: Parts, name: str) -> list[dict[str, Any]]:
        return [
            {
                "version": f"v{row.number}",
                "state": row.state,
                "parent": None if row.parent is None else f"v{row.parent}",
                "at": row.created_at.timestamp(),
                "run": row.run,
                "reasons": list(row.detail.get("reasons", []))[:20],
                "unjudged": list(row.detail.get("unjudged", []))[:50],
                "in_service": f"v{row.number}" == parts.learners[name].version,
            }
            for row in reversed(parts.store.versions(name)[-SHOWN_VERSIONS:])
        ]


# The five questions


def right(now: Mapping[str, Any]) -> Check:
    """Is it right?"""
    served, n = now["served"], now["n"]
    if served is None:
        return Check(question="right", level="none", says=_few(n))
    said = f"{served:.0%} of the last {n} labelled answers"
    rivals = {"frozen": "its frozen twin", "no_change": "no change", "majority": "the majority class"}
    ahead = [words for key, words in rivals.items() if now[key] is not None and now[key] > served]
    if ahead:
        # Of few answers it is no finding yet; but "good" it is not either.
        level: Level = "look" if n >= ENOUGH else "none"
        return Check(question="right", level=level, says=f"{said}; {' and '.join(ahead)} would be right more often")
    return Check(question="right", level="good", says=said)


def moving(states: Mapping[Kind, str]) -> Check:
    """Is the world moving?"""
    words: dict[Kind, str] = {"input": "the events", "prediction": "the answers", "error": "the errors"}
    for state, says in (("drift", "drift of"), ("warning", "a first sign of drift of")):
        found = [words[kind] for kind, its in states.items() if its == state]
        if found:
            return Check(question="moving", level="look", says=f"{says} {' and '.join(found)}")
    return Check(question="moving", level="good", says="no drift")


def forgetting(heat: Mapping[str, Any], n: int) -> Check:
    """Is anything being forgotten?"""
    if n < curves.FEWEST:
        return Check(question="forgetting", level="none", says=_few(n))
    gone = [row["class"] for row in heat["classes"] if row["forgotten"]]
    budget = f"{heat['budget']:.0%}"
    if gone:
        more = f" and {heat['forgotten'] - 3} more" if heat["forgotten"] > 3 else ""
        said = f"{', '.join(gone[:3])}{more} fell more than {budget} below the best"
        return Check(question="forgetting", level="look", says=said)
    return Check(question="forgetting", level="good", says=f"no class fell more than {budget} below its best")


def running(glance: Mapping[str, Any], last: Run | None) -> Check:
    """What is running?"""
    serving, tune = glance["serving"], glance["fine_tune"]
    if glance["paused"]:
        return Check(question="running", level="look", says=f"{serving}, and learning is paused")
    if glance["held"]:
        return Check(question="running", level="look", says=f"{serving}; newer revisions are held by the guard")
    if tune["running"]:
        return Check(question="running", level="good", says=f"{serving}; a fine-tune is running ({tune['cause']})")
    if last is not None and last.state == "failed":
        return Check(question="running", level="look", says=f"{serving}; the last fine-tune failed")
    if not glance["labels_learned"]:
        return Check(question="running", level="none", says=f"{serving}, which has learned nothing yet")
    return Check(question="running", level="good", says=serving)


def keeping_up(last: float | None, workers: list[Neighbour], waiting: Mapping[str, str], now: float) -> Check:
    """Is it keeping up?"""
    if waiting:
        part, why = next(iter(waiting.items()))
        return Check(question="keeping_up", level="bad", says=f"the learner waits for its {part}: {why}")
    stopped = [one.url for one in workers if one.why is not None]
    there = [one for one in workers if one.why is None and one.at is not None]
    if stopped and not there:
        return Check(question="keeping_up", level="bad", says=f"no worker answers ({len(stopped)} asked)")
    lag = sum(sum(one.lag.values()) for one in there)
    if stopped:
        said = f"{len(stopped)} of {len(workers)} workers do not answer"
        return Check(question="keeping_up", level="look", says=said)
    if last is None:
        return Check(question="keeping_up", level="none", says="no prediction yet: publish events, start a worker")
    silent = now - last
    if silent > SILENT_SECONDS:
        level: Level = "bad" if lag else "none"
        waits = f" while {lag:.0f} events wait" if lag else ""
        return Check(question="keeping_up", level=level, says=f"no prediction for {_span(silent)}{waits}")
    slow = [one.p99 for one in there if one.p99 is not None]
    if slow and max(slow) > 2:
        return Check(
            question="keeping_up", level="look", says=f"one answer in a hundred takes {max(slow):.1f} s or more"
        )
    return Check(question="keeping_up", level="good", says=f"{lag:.0f} events wait" if there else "answers come in")


# Rows


def _few(n: int) -> str:
    return f"{n} of the {curves.FEWEST} labelled answers that a share needs" if n else "no label has met its answer yet"


def _worker(one: Neighbour) -> dict[str, Any]:
    return {
        "url": one.url,
        "at": one.at,
        "why": one.why,
        "serving": one.serving,
        "lag": sum(one.lag.values()),
        "rate": one.rate,
        "p50": one.p50,
        "p99": one.p99,
    }


def _run(one: Run) -> dict[str, Any]:
    return {
        "id": one.id,
        "cause": one.cause,
        "state": one.state,
        "requested_at": _seconds(one.requested_at),
        "started_at": _seconds(one.started_at),
        "finished_at": _seconds(one.finished_at),
        "why": str(one.detail.get("why", ""))[:500],
        "reason": str(one.detail.get("reason", ""))[:1000],
        "version": one.detail.get("version"),
    }


def _marks(reigns: list[Reign], runs: list[Run]) -> list[dict[str, Any]]:
    marks = []
    for reign in reigns:
        kind = "rollback" if reign.cause.startswith(("rollback", "rolled back")) else "swap"
        marks.append({"at": reign.at.timestamp(), "kind": kind, "says": f"v{reign.version}: {reign.cause}"})
    for run in runs:
        if run.started_at is not None:
            marks.append({"at": run.started_at.timestamp(), "kind": "retrain", "says": f"fine-tune: {run.cause}"})
        if run.finished_at is not None and run.state not in ("promoted",):
            marks.append({"at": run.finished_at.timestamp(), "kind": "retrain", "says": f"fine-tune {run.state}"})
    return marks


def seen(content: bytes | None) -> dict[str, Any] | None:
    """What of an event a person labels by: its text, or its channels; None where the bytes are no event."""
    with contextlib.suppress(ValidationError):
        text = Report.model_validate_json(content or b"").text
        return {"text": text[:SHOWN_TEXT], "more": max(0, len(text) - SHOWN_TEXT)}
    with contextlib.suppress(ValidationError):
        window = Telemetry.model_validate_json(content or b"")
        channels = [
            {"name": channel[:200], "values": curves.thinned(row, SHOWN_POINTS)}
            for channel, row in zip(window.channels[:SHOWN_CHANNELS], window.values, strict=False)
        ]
        return {"channels": channels, "more": max(0, len(window.channels) - SHOWN_CHANNELS)}
    return None


def _seconds(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
