"""Any prediction explained: one event, from the log to the answer and to what was learned of it.

The database tells what it knows in an instant (`glance`). What it does not keep is looked for in the topics, each
within a bound (`explain`): every answer with its probabilities, every label as it was sent, dead letters. What speaks
for an answer is found by the event's embedding: the examples that are most like it, what is answered for it now, and
whether the revision that answered it would again: its head as it is stored or, where that was pruned, as it is made
again from its line of lineage.

Nothing here writes. The learner's console and the command line show the same answer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deploy.messages import Letter, letter, read_at
from learner.heads import LinearHead, dequantise
from replay.history import Answered, History, Learned, Past
from replay.store import LearnerStore, Payload
from stream.errors import DeadLetter, RetryLater
from stream.events import Decoder, Label, Place, Prediction, Record
from stream.kafka import KafkaSettings
from stream.search import Looked, Search, partition_of, speaks_of

if TYPE_CHECKING:
    from learner.registry import Registry
    from learner.revive import Reviver

SHOWN_TEXT = 20_000
EXCERPT = 300
"""Characters of an example that is shown beside others."""
NEAREST = 8
ASKED_AGAIN = 3
"""Revisions that are asked again: one that was pruned costs as much as a stream's head is solved in."""
TOLERANCE = 0.01
"""Of a probability, where the same head gives it again: a worker embeds many events at once, and rounds otherwise."""
LOOKED_AT = 50_000
"""Messages that a part of a topic has at most; see `stream.search`."""


@dataclass(frozen=True)
class Answering:
    """What answers a stream, for one event more.

    Args:
        name: the revision in service.
        encoder: digest of its encoder.
        bound: of that encoder's embeddings.
        head: None while nothing was learned.
        embed: an event under that encoder, as the ledger keeps it.
    """

    name: str
    encoder: str
    bound: float
    head: LinearHead | None
    embed: Callable[[Payload], npt.NDArray[np.int16]]


class _Found(NamedTuple):
    """What topics say of one event, each message with its place; and how far they were looked through."""

    answers: list[tuple[Prediction, Place]]
    labels: list[tuple[Label, Place]]
    letters: list[Letter]
    looked: list[str]


class _Subject(NamedTuple):
    """The event that is explained, as far as it can be read, and what answers its stream now."""

    stream: str
    event_id: str
    event: Payload | None
    why: str
    learned: Learned | None
    answering: Answering


class _Again(NamedTuple):
    """What a revision's head says of an event once more, and where that head is from."""

    how: str
    told: str
    probabilities: Mapping[str, float] | None = None


class Explainer:
    """Explains events of any stream.

    Args:
        store: the learner's database.
        kafka: where the topics are.
        topics: whole names of `predictions`, `labels` and `dead_letters`.
        decoder: knows the streams.
        answering: what answers a stream now.
        registry: where weights lie.
        reviver: makes heads again that were pruned.
    """

    def __init__(
        self,
        store: LearnerStore,
        kafka: KafkaSettings,
        topics: Mapping[str, str],
        decoder: Decoder,
        answering: Callable[[str], Answering],
        registry: Registry,
        reviver: Reviver,
    ) -> None:
        self._history, self._kafka, self._topics = History(store), kafka, topics
        self._decoder, self._answering, self._registry, self._reviver = decoder, answering, registry, reviver

    def glance(
        self, stream: str, event_id: str, seen: Callable[[bytes | None], Any] = lambda content: None
    ) -> dict[str, Any]:
        """What the event says, and all that the database knows of it.

        Args:
            seen: what of its bytes a page draws.
        """
        past = self._history.past(stream, event_id)
        record, why = self._event(past)
        return {
            "event_id": event_id,
            "stream": stream,
            "content": None if record is None else readable(record.value),
            "seen": None if record is None else seen(record.value),
            "why": why,
            **told_past(past),
        }

    def explain(self, stream: str, event_id: str, most: int | None = LOOKED_AT) -> dict[str, Any]:
        """All that can be found of an event.

        Args:
            most: how many messages of a topic are looked through, twice; None for all.

        Raises:
            RetryLater: the broker or the database does not answer.
        """
        past = self._history.past(stream, event_id)
        found: dict[str, Any] = {"event_id": event_id, "stream": stream, "content": None, **told_past(past)}
        if past.forgotten_at is not None:
            # What topics still have of it is not brought back by looking at it.
            nothing: dict[str, Any] = {
                "predictions": [],
                "labels": [],
                "letters": [],
                "nearest": [],
                "now": None,
                "looked": [],
            }
            return {**found, **nothing, "why": FORGOTTEN, "unlike": FORGOTTEN}
        record, why = self._event(past)
        in_log = self._search(stream, event_id, past, most)
        if record is None and in_log.answers:
            # The database has let go of it, or has not joined it yet; its answer says where it lies.
            record, why = self._read(in_log.answers[0][0].ref)
        subject = self._subject(stream, event_id, past.learned, record)
        return {
            **found,
            "content": None if record is None else readable(record.value),
            "why": why,
            "predictions": [
                {**told_prediction(one, place), "again": again}
                for (one, place), again in zip(in_log.answers, self._again(subject, in_log.answers), strict=True)
            ],
            "labels": [told_label(one, place) for one, place in in_log.labels],
            "letters": [told_letter(one) for one in in_log.letters],
            "looked": in_log.looked,
            **self._likeness(subject),
        }

    # What lies in the log

    def _event(self, past: Past) -> tuple[Record | None, str]:
        if past.forgotten_at is not None:
            return None, FORGOTTEN
        if past.answered is None:
            return None, "no answer of it is known here: it was not answered, or longer ago than learner.memory.horizon"
        return self._read(past.answered.ref)

    def _read(self, place: Place) -> tuple[Record | None, str]:
        try:
            record = read_at(self._kafka, place)
        except RetryLater as error:
            return None, str(error)
        gone = "its topic's retention has ended: it can still be labelled, and teaches nothing"
        return record, "" if record is not None else gone

    def _search(self, stream: str, event_id: str, past: Past, most: int | None) -> _Found:
        speaks, topics = speaks_of(event_id), self._topics
        search = Search(self._kafka.confluent())
        try:
            there = search.partitions(topics["predictions"])
            # Where its answers lie by their key, and where the first one does, should partitions have been added since.
            keyed = {partition_of(event_id.encode(), len(there))} if there else set()
            around = {} if past.answered is None else dict([past.answered.written])
            answers = search.look(topics["predictions"], speaks, partitions={*keyed, *around}, around=around, most=most)
            labels = search.look(topics["labels"], speaks, most=most)
            letters = search.look(topics["dead_letters"], speaks, most=most)
        finally:
            search.close()
        return _Found(
            self._own(answers, self._decoder.prediction, stream, event_id),
            self._own(labels, self._decoder.label, stream, event_id),
            [one for record in letters.found if (one := letter(record)).event_id in ("", event_id)],
            [_looked("predictions", answers), _looked("labels", labels), _looked("dead letters", letters)],
        )

    @staticmethod
    def _own(looked: Looked, decode: Callable[[Record], Any], stream: str, event_id: str) -> list[tuple[Any, Place]]:
        found = []
        for record in looked.found:
            with contextlib.suppress(DeadLetter):  # not ours; the learner parks it
                message = decode(record)
                if (message.stream, message.event_id) == (stream, event_id):
                    found.append((message, record.place))
        return found

    # What speaks for an answer

    def _subject(self, stream: str, event_id: str, learned: Learned | None, record: Record | None) -> _Subject:
        event: Payload | None = None
        why = ""
        if record is None:
            why = "the event cannot be read any more, so nothing can be compared with it"
        else:
            try:
                its = self._decoder.event(record)
            except DeadLetter as refusal:
                why = f"a dead letter: {refusal}"
            else:
                if (its.stream, its.event_id) != (stream, event_id):
                    why = "another event lies at its place by now: its topic was made again"
                else:
                    from learner.encoders import payload

                    event = payload(its, self._decoder.rules[stream].channels)
        return _Subject(stream, event_id, event, why, learned, self._answering(stream))

    def _likeness(self, subject: _Subject) -> dict[str, Any]:
        """What is answered for the event now, and the examples most like it."""
        stream, event_id, answering = subject.stream, subject.event_id, subject.answering
        nothing: dict[str, Any] = {"now": None, "nearest": []}
        embedding = self._embedding(subject, answering.encoder)
        if embedding is None:
            return {**nothing, "unlike": subject.why}
        if answering.head is None:
            return {**nothing, "unlike": f"{answering.name} has learned nothing yet"}
        row = dequantise(embedding[None, :], answering.bound).astype(np.float32)
        labels, probabilities, novelty = answering.head.answer(row, 5)
        near = self._history.nearest(stream, answering.encoder, embedding, NEAREST, but=event_id)
        return {
            "now": {
                "version": answering.name,
                "label": labels[0][0],
                "probabilities": dict(
                    zip(labels[0], np.round(probabilities[0].astype(float), 6).tolist(), strict=True)
                ),
                "novelty": round(float(novelty[0]), 6),
            },
            "nearest": [
                {
                    "event_id": one.event_id,
                    "label": one.label,
                    "similarity": round(one.similarity, 4),
                    "for": one.label == labels[0][0],
                    "labelled_at": one.labelled_at.timestamp(),
                    "content": excerpt(one.payload),
                }
                for one in near
            ],
            "unlike": "" if near else "no example teaches this encoder's head yet",
        }

    def _embedding(self, subject: _Subject, encoder: str) -> npt.NDArray[np.int16] | None:
        """The event under an encoder; None where it cannot be read."""
        if subject.learned is not None and subject.learned.encoder == encoder:
            return subject.learned.embedding
        if subject.event is None:
            return None
        if encoder == subject.answering.encoder:
            return subject.answering.embed(subject.event)
        from learner.encoders import load_encoder
        from learner.heads import quantise

        spec, files = self._registry.encoder(encoder)
        made: npt.NDArray[np.int16] = quantise(load_encoder(spec, files).embed([subject.event]), spec.bound)[0]
        return made

    # What the revision that answered says again

    def _again(self, subject: _Subject, answers: Sequence[tuple[Prediction, Place]]) -> list[dict[str, Any]]:
        """For each answer what its revision says now, and how that head was come by."""
        asked: dict[str, _Again] = {}
        for one, _ in answers:
            if one.label is not None and one.model_version not in asked and len(asked) < ASKED_AGAIN:
                asked[one.model_version] = self._ask_again(subject, one.model_version)
        return [_told_again(one, asked.get(one.model_version)) for one, _ in answers]

    def _ask_again(self, subject: _Subject, name: str) -> _Again:
        from learner.rebuild import CannotRebuild
        from learner.registry import BrokenVersion

        stream, registry = subject.stream, self._registry
        try:
            try:
                ref = registry.revision(stream, name)
                head = None if ref.head is None else LinearHead.from_tensors(registry.head(ref.head))
                encoder, how, told = ref.encoder, "stored", "its head as it is stored"
            except BrokenVersion:
                made = self._reviver.revive(stream, name)
                head, encoder, how = made.head, made.encoder, made.outcome
                told = f"its head was pruned, and made again of {made.examples} examples"
                told += ", the same by its checksum" if how == "same" else ", but by its checksum it is another"
                told += "".join(f"; {note}" for note in made.notes)
            if head is None:
                return _Again("none", "it had learned nothing")
            embedding = self._embedding(subject, encoder)
            if embedding is None:
                return _Again("none", subject.why)
            bound = registry.encoder(encoder)[0].bound
        except (CannotRebuild, BrokenVersion) as error:
            return _Again("none", str(error))
        labels, probabilities, _ = head.answer(
            dequantise(embedding[None, :], bound).astype(np.float32), len(head.classes)
        )
        return _Again(how, told, dict(zip(labels[0], probabilities[0].astype(float).tolist(), strict=True)))


FORGOTTEN = "it was forgotten on request: nothing of it is kept, and nothing is looked for"


def answering_from(store: LearnerStore, registry: Registry, stream: str, device: str = "cpu") -> Answering:
    """What answers a stream as the database and the registry say, for whoever is not the learner.

    Raises:
        BrokenVersion: the registry does not have it whole.
        RetryLater: the learner has never started.
    """
    from learner.encoders import load_encoder
    from learner.heads import quantise

    name = json.loads(store.recall(f"pinned/{stream}") or "null")
    if name is None:
        reign = store.champion(stream)
        if reign is None:
            raise RetryLater(f"stream {stream!r} has no version yet: no learner has led on this database")
        last = store.revisions(stream, reign.version, limit=1)
        name = f"v{reign.version}.{last[0].revision}" if last else f"v{reign.version}"
    ref = registry.revision(stream, name)
    spec, files = registry.encoder(ref.encoder)
    head = None if ref.head is None else LinearHead.from_tensors(registry.head(ref.head))

    def embed(payload: Payload) -> npt.NDArray[np.int16]:
        made: npt.NDArray[np.int16] = quantise(load_encoder(spec, files, device).embed([payload]), spec.bound)[0]
        return made

    return Answering(ref.name, ref.encoder, spec.bound, head, embed)


# As JSON; times are seconds since 1970


def told_past(past: Past) -> dict[str, Any]:
    """What the database knows."""
    score, learned = past.score, past.learned
    return {
        "answered": None if past.answered is None else _answered(past.answered),
        "said": [
            {"labeller": one.labeller, "label": one.label, "at": one.labelled_at.timestamp()} for one in past.said
        ],
        "aside": [
            {
                "id": one.id,
                "labeller": one.labeller,
                "label": one.label,
                "reason": one.reason,
                "detail": one.detail,
                "at": one.at.timestamp(),
            }
            for one in past.aside
        ],
        "scored": None if score is None else {"label": score.label, "predicted": score.predicted, "right": score.right},
        "learned": None
        if learned is None
        else {
            "label": learned.label,
            "exam": learned.exam,
            "kept": learned.kept,
            "at": learned.learned_at.timestamp(),
        },
        "taught": [
            {"label": one.label, "added": one.added, "at": one.at.timestamp(), "revision": one.revision}
            for one in past.taught
        ],
        "trained": [{"version": one.version, "state": one.state, "own": one.own} for one in past.trained],
        "asked": None if past.asked is None else {"why": past.asked[0], "at": past.asked[1].timestamp()},
        "forgotten_at": None if past.forgotten_at is None else past.forgotten_at.timestamp(),
        "settled": past.settled,
    }


def _answered(one: Answered) -> dict[str, Any]:
    return {
        "label": one.label,
        "version": one.model_version,
        "at": one.predicted_at.timestamp(),
        "observed_at": one.observed_at.timestamp(),
        "place": _place(one.ref),
    }


def told_prediction(one: Prediction, place: Place) -> dict[str, Any]:
    """One answer, as it was sent."""
    return {
        "label": one.label,
        "probabilities": one.probabilities,
        "novelty": one.novelty,
        "version": one.model_version,
        "at": one.predicted_at.timestamp(),
        "supersedes": one.supersedes,
        "ref": _place(one.ref),
        "place": _place(place),
    }


def _told_again(one: Prediction, again: _Again | None) -> dict[str, Any]:
    if again is None:
        why = "nothing was learned yet" if one.label is None else f"only {ASKED_AGAIN} revisions are asked again"
        again = _Again("none", why)
    if again.probabilities is None:
        return {"how": again.how, "told": again.told, "off": None}
    off = max((abs(share - again.probabilities.get(name, 0.0)) for name, share in one.probabilities.items()), default=0)
    within = "the same answer" if off <= TOLERANCE else "NOT what was sent"
    told = f"{again.told}: {within}, {off:.2g} off at most, {TOLERANCE:g} is allowed"
    return {"how": again.how, "told": told, "off": off}


def told_label(one: Label, place: Place) -> dict[str, Any]:
    """One label, as it was sent."""
    return {
        "labeller": one.labeller,
        "label": one.label,
        "at": one.labelled_at.timestamp(),
        "confidence": one.confidence,
        "place": _place(place),
    }


def told_letter(one: Letter) -> dict[str, Any]:
    """One dead letter, without what is in it."""
    return {
        "place": f"{one.place.partition}:{one.place.offset}",
        "reason": one.reason or "unknown",
        "field": one.field,
        "detail": one.detail,
        "event_id": one.event_id,
        "at": one.at,
        "first": f"{one.original.topic} {one.original.partition}:{one.original.offset}" if one.original.topic else "",
        "by_reference": one.by_reference,
    }


def readable(content: bytes | None) -> str:
    """Bytes for a reader: JSON indented, plain text as it is, the rest as Python writes it; cut where it is long."""
    if content is None:
        return "(no value)"
    try:
        text = content.decode()
        with contextlib.suppress(ValueError, RecursionError):
            text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except UnicodeDecodeError:
        text = repr(content[:SHOWN_TEXT])
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}\n… {len(text) - SHOWN_TEXT} more characters"


def excerpt(payload: Payload | None) -> str | None:
    """An example in a line: the beginning of a text, or a window's shape."""
    if payload is None:
        return None
    if isinstance(payload, str):
        line = " ".join(payload[: 2 * EXCERPT].split())
        return line if len(line) <= EXCERPT else f"{line[:EXCERPT]}…"
    return f"{payload.shape[0]} channels, {payload.shape[1]} steps"


def _place(place: Place) -> str:
    return f"{place.topic} {place.partition}:{place.offset}"


def _looked(name: str, looked: Looked) -> str:
    how = "all of them" if looked.whole else "the newest, and those from its answer on"
    return f"{name}: {looked.read:,} looked at, {how}"


def lines(found: Mapping[str, Any], clock: Callable[[float], str]) -> list[tuple[str, Sequence[str]]]:
    """An explanation for a terminal: titles, each with its lines. Pure.

    Args:
        clock: a time in words.
    """

    said: list[tuple[str, Sequence[str]]] = []
    answered = found["answered"]
    where = [f"at {answered['place']}, observed {clock(answered['observed_at'])}"] if answered else []
    said.append(("Event", [*where, *([found["why"]] if found["why"] else []), *(found["content"] or "").splitlines()]))
    said.append(
        (
            "Answers",
            [line for one in found["predictions"] for line in _answer_lines(one, clock)] or ["none was found"],
        )
    )
    if found["now"]:
        now = found["now"]
        said.append(
            ("Now", [f"{now['version']} would say {_sure(now['probabilities'])}; novelty {now['novelty']:.2f}"])
        )
    said.append(
        (
            "Most like it",
            [
                f"{one['similarity']:+.3f}  {one['label']} ({'for' if one['for'] else 'against'})  {one['event_id']}"
                + (f"  {one['content']}" if one["content"] else "  (let go of by the store)")
                for one in found["nearest"]
            ]
            or [found["unlike"]],
        )
    )
    said.append(("Labels", _label_lines(found, clock) or ["none"]))
    said.append(("Learned", _learned_lines(found, clock)))
    if found["letters"]:
        said.append(
            (
                "Dead letters",
                [
                    f"{one['place']}  {one['at'][:19]}  {one['reason']} {one['field']}: {one['detail']}"
                    for one in found["letters"]
                ],
            )
        )
    if found["looked"]:
        said.append(("Looked through", found["looked"]))
    return said


def _sure(probabilities: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in probabilities.items()) or "no class"


def _answer_lines(one: Mapping[str, Any], clock: Callable[[float], str]) -> list[str]:
    corrects = f"; corrects the answer of {one['supersedes']}" if one["supersedes"] else ""
    return [
        f"{clock(one['at'])}  {one['label'] or '(nothing learned yet)'} by {one['version']}: "
        + _sure(one["probabilities"])
        + f"; novelty {one['novelty']:.2f}; at {one['place']}{corrects}",
        f"  asked again: {one['again']['told']}",
    ]


def _label_lines(found: Mapping[str, Any], clock: Callable[[float], str]) -> list[str]:
    said = [
        f"{clock(one['at'])}  {one['labeller']}: {one['label'] or '(withdrawn)'}  at {one['place']}"
        for one in found["labels"]
    ]
    if not said:
        said = [f"{clock(one['at'])}  {one['labeller']}: {one['label'] or '(withdrawn)'}" for one in found["said"]]
    for one in found["aside"]:
        detail = f" ({one['detail']})" if one["detail"] else ""
        said.append(f"in quarantine as {one['id']}: {one['label']} by {one['labeller']}, {one['reason']}{detail}")
    if found["scored"]:
        score = found["scored"]
        served = score["predicted"] or "no class"
        said.append(f"counts: {score['label']}; {served} was served, {'right' if score['right'] else 'wrong'}")
    if found["asked"]:
        said.append(f"asked for at {clock(found['asked']['at'])}: {found['asked']['why']}")
    return said


def _learned_lines(found: Mapping[str, Any], clock: Callable[[float], str]) -> list[str]:
    if found["forgotten_at"]:
        return [f"forgotten at {clock(found['forgotten_at'])}"]
    said = []
    learned = found["learned"]
    if learned is None:
        said.append("nothing is learned of it")
    elif learned["exam"]:
        said.append(f"{learned['label']}, in the exam: no head and no fine-tune is taught by it")
    else:
        kept = "the store has the event" if learned["kept"] else "the store has let go of the event"
        said.append(f"{learned['label']}, since {clock(learned['at'])}; {kept}")
    for one in found["taught"]:
        first = f", first in {one['revision']}" if one["revision"] else ""
        said.append(f"{clock(one['at'])}  head: {'+' if one['added'] else '−'} {one['label']}{first}")
    for one in found["trained"]:
        how = "was trained on it" if one["own"] else "comes from a version that was trained on it"
        said.append(f"{one['version']} ({one['state']}) {how}")
    if found["settled"]:
        said.append("its label can no longer be corrected: learner.memory.ledger_retention has ended")
    return said
