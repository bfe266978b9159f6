"""A rollback with its blast radius: how far a bad version reached, and its answers corrected.

The radius is counted on the topic of predictions, from the moment on at which the version came; whether answers were
wrong is told by the labels that have met them, where the learner's database can be read. Corrections go by
`stream.reissue`, under one transactional id for each stream; the topic `audit` has a line of every one, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from deploy.settings import Settings, rules
from deploy.wiring import TOP_K, device_of, open_registry
from learner.control import ControlAnswer, Refused
from learner.registry import BrokenVersion, Pointer
from learner.retreat import Retreat, leaving, retreat
from learner.slot import Slot
from monitoring.metrics import Metrics
from replay.history import History
from replay.store import LearnerStore
from stream.batches import Outgoing, TopicTail
from stream.events import Decoder, Record, encode
from stream.join import EventKey
from stream.lookback import Lookback
from stream.reissue import ROUNDS, Radius, Reissue, Reissued, TransactionalSender, since, survey
from stream.search import Search

REISSUE = "reissue"
"""The action that the audit names a correction by."""


@dataclass(frozen=True)
class Blast:
    """What a bad version did.

    Args:
        serving: what is in service; None before anything was announced.
        judged: of the answers whose labels have come, by class: right and wrong; None without the database.
        left_out: how many older messages of the topic were not read; 0 where everything was.
    """

    way: Retreat
    serving: str | None
    radius: Radius
    judged: dict[str, tuple[int, int]] | None
    left_out: int = 0

    @property
    def over(self) -> bool:
        """Whether no suspect is in service any more."""
        return self.serving is not None and self.serving not in self.way.suspects

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        radius = self.radius
        return {
            "stream": self.way.suspects.stream,
            "target": self.way.target,
            "why": self.way.why,
            "suspects": {name: f"{name}.{first}" for name, first in self.way.suspects.since.items()},
            "in_service": self.serving,
            "since": self.way.began.isoformat(),
            "left_out": self.left_out,
            "predictions": radius.total,
            "corrected": radius.corrected,
            "to_correct": len(radius.open),
            "first": None if radius.first is None else radius.first.isoformat(),
            "last": None if radius.last is None else radius.last.isoformat(),
            "versions": dict(self.by_version),
            "classes": [
                {"class": name, "predictions": count, "right": right, "wrong": wrong}
                for name, count, right, wrong in self.by_class
            ],
        }

    @property
    def by_version(self) -> Counter[str]:
        """Predictions by version."""
        found: Counter[str] = Counter()
        for (version, _), count in self.radius.answers.items():
            found[version] += count
        return found

    @property
    def by_class(self) -> list[tuple[str | None, int, int | None, int | None]]:
        """Class, predictions, and of those labelled by now right and wrong; most predictions first."""
        found: Counter[str | None] = Counter()
        for (_, name), count in self.radius.answers.items():
            found[name] += count
        rows: list[tuple[str | None, int, int | None, int | None]] = []
        for name, count in sorted(found.items(), key=lambda item: (-item[1], item[0] or "")):
            right, wrong = (None, None) if self.judged is None else self.judged.get(name or "", (0, 0))
            rows.append((name, count, right, wrong))
        return rows


def blast(
    settings: Settings,
    stream: str,
    moment: datetime | str,
    store: LearnerStore | None,
    told: Callable[[int], None] = lambda read: None,
) -> Blast:
    """How far it reached, and where to go back to; writes nothing.

    Args:
        moment: a time, a version or a revision; see `learner.retreat`.
        store: the learner's database, where it can be read.
        told: called now and then with how many predictions were read.

    Raises:
        Refused: there is nothing to go back from or to.
        RetryLater: the broker does not answer.
    """
    registry = open_registry(settings)
    refs = []
    for name in registry.revisions(stream):
        try:
            refs.append(registry.revision(stream, name))
        except BrokenVersion:
            continue  # pruned since it was listed
    way = retreat(stream, registry.champions(stream), refs, moment)
    return _blast(settings, way, in_service(settings, stream), store, told)


def blast_of_leaving(
    settings: Settings, stream: str, target: str | None, serving: str, store: LearnerStore, most: int
) -> Blast:
    """How far all that served since a version last did has reached; writes nothing.

    Args:
        target: the version to go back to; None is the one that served before the present one.
        serving: what is in service.
        most: how many predictions of all streams are read, the newest.

    Raises:
        Refused: there is nothing to go back to.
        RetryLater: the broker does not answer.
    """
    way = leaving(stream, open_registry(settings).champions(stream), target)
    return _blast(settings, way, serving, store, most=most)


def _blast(
    settings: Settings,
    way: Retreat,
    serving: str | None,
    store: LearnerStore | None,
    told: Callable[[int], None] = lambda read: None,
    most: int | None = None,
) -> Blast:
    search = Search(settings.kafka.confluent())
    try:
        radius, left_out = _surveyed(settings, search, way, told, most)
    finally:
        search.close()
    judged: dict[str, tuple[int, int]] | None = None
    if store is not None:
        judged = {}
        for version, predicted, right, count in History(store).verdicts(way.suspects.stream):
            if version in way.suspects:
                good, bad = judged.get(predicted or "", (0, 0))
                judged[predicted or ""] = (good + count, bad) if right else (good, bad + count)
    return Blast(way, serving, radius, judged, left_out)


def in_service(settings: Settings, stream: str) -> str | None:
    """The revision that was announced last for a stream, as workers see it.

    Raises:
        RetryLater: the broker does not answer.
    """
    newest: list[Pointer] = []

    def take(record: Record) -> None:
        if record.key != f"{stream}/champion".encode() or record.value is None:
            return
        try:
            pointer = Pointer.decode(record.key, record.value)
        except BrokenVersion:
            return  # as a worker does
        if pointer.after(newest[0] if newest else None):
            newest[:] = [pointer]

    tail = TopicTail(settings.kafka.confluent(), settings.topics.name("model_versions"))
    try:
        tail.catch_up(take)
    finally:
        tail.close()
    return newest[0].name if newest else None


def correct(
    settings: Settings,
    way: Retreat,
    rate: float,
    store: LearnerStore | None,
    told: Callable[[Reissued, int], None] = lambda done, left: None,
    who: str = "",
    why: str = "",
) -> Reissued:
    """Correct what suspects answered and nobody corrected yet, by the model in service now.

    Interrupted anywhere, the next call goes on where this one ended. What suspects still answered meanwhile is
    corrected too. At the end the topic `audit` is told what no line there has told yet.

    Args:
        rate: the most corrections a second.
        who: who asks, for the audit.
        why: for the audit too.
        told: called after each transaction with what was done so far and how much was to do in all.

    Raises:
        Refused: a suspect is in service.
        RetryLater: the broker is away.
        Superseded: another correction of the stream has begun.
    """
    stream, connection, done = way.suspects.stream, settings.kafka.confluent(), Reissued()
    stream_rules = {rule.name: rule for rule in rules(settings)}
    # Before the topic is read: so nobody else can write corrections that are not seen.
    sender = TransactionalSender(connection, f"{settings.topics.prefix}trimtab-reissue-{stream}")
    search, log = Search(connection), Lookback(connection)
    model = Slot(
        open_registry(settings),
        {stream: stream_rules[stream].channels},
        Metrics(),
        device=device_of(settings.worker.device),
        precision=settings.worker.precision,
        top_k=TOP_K,
    )
    try:
        _catch_up(settings, model)
        if model.revision(stream) in way.suspects:
            raise Refused(f"{model.revision(stream)} is in service, whose answers are to be corrected: roll back first")
        decoder = Decoder(stream_rules.values())
        tried: set[tuple[str, int, int]] = set()
        radius, _ = _surveyed(settings, search, way)
        lines, _ = since(search, settings.topics.name("audit"), way.since)
        # What an interrupted one has corrected, and could no longer tell.
        untold, at_first = radius.corrections - told_of(lines, stream), radius.corrections
        for _ in range(ROUNDS):
            left = {where: one for where, one in radius.open.items() if where not in tried}
            if not left:
                break
            tried |= left.keys()
            before, total = done, done.corrected + len(left)

            def tell(now: Reissued, before: Reissued = before, total: int = total) -> None:
                told(before.plus(now), total)

            reissue = Reissue(
                way.suspects,
                settings.topics.name("predictions"),
                model,
                decoder,
                log,
                sender,
                rate,
                forgotten=_forgotten_in(store),
            )
            done = before.plus(reissue.run(left, tell))
            radius, _ = _surveyed(settings, search, way)
        untold += radius.corrections - at_first
        if untold:
            answer = told_as(stream, untold, radius, who, why)
            sender.send([Outgoing(settings.topics.name("audit"), stream.encode(), encode(answer), ())])
        return done
    finally:
        model.close()
        sender.close()
        search.close()
        log.close()


def told_of(lines: Iterable[Record], stream: str) -> Counter[str]:
    """By version, how many corrected answers of a stream the audit has told. Pure."""
    found: Counter[str] = Counter()
    for record in lines:
        try:
            line = ControlAnswer.model_validate_json(record.value or b"")
        except ValidationError:
            continue  # not ours
        if (line.action, line.stream) == (REISSUE, stream):
            found.update(line.corrected)
    return found


def told_as(stream: str, corrected: Counter[str], radius: Radius, who: str, why: str) -> ControlAnswer:
    """The audit's line of a correction. Pure.

    Args:
        corrected: by version, how many answers no line has told yet.
        radius: what the topic has now.
    """
    of = ", ".join(f"{count:,} of {version}" for version, count in sorted(corrected.items()))
    by = ", ".join(sorted(radius.by))
    return ControlAnswer(
        id=uuid4().hex,
        action=REISSUE,
        stream=stream,
        accepted=True,
        message=f"corrected {corrected.total():,} predictions ({of}), by {by}",
        corrected=dict(corrected),
        who=who[:200],
        reason=why[:1000],
    )


def _surveyed(
    settings: Settings,
    search: Search,
    way: Retreat,
    told: Callable[[int], None] = lambda read: None,
    most: int | None = None,
) -> tuple[Radius, int]:
    """What suspects answered, and how many older messages were not read."""
    records, left_out = since(search, settings.topics.name("predictions"), way.since, most)
    return survey(records, way.suspects, Decoder(rules(settings)), told), left_out


def _catch_up(settings: Settings, model: Slot) -> None:
    """Load what is in service, as a worker does at its start."""
    tail = TopicTail(settings.kafka.confluent(), settings.topics.name("model_versions"))
    try:
        with model.catching_up():
            tail.catch_up(lambda record: model.announce(record.key or b"", record.value))
    finally:
        tail.close()


def _forgotten_in(store: LearnerStore | None) -> Callable[[Collection[EventKey]], Collection[EventKey]]:
    def forgotten(keys: Collection[EventKey]) -> Collection[EventKey]:
        if store is None:
            return ()
        return [key for key, why in store.beyond(keys).items() if why == "forgotten"]

    return forgotten
