"""What becomes of labels after they were taken: set aside by a review, released or dropped by hand, renamed.

Joining stays what it is, a pure function of the messages in any order. A *review* looks at what is stored, on
the learning thread, whenever enough new labels were learned: it sets labels aside, into quarantine, and what
they taught is subtracted in the same transaction, exactly. It is a function of the store and not of how the
store came about, so the same messages in any order, reviewed then, end in the same store and the same head; and
as long as nobody is suspected a review changes nothing at all. What does depend on the order of arrival is
which of several reviews, each after some of the messages, was the one to find a suspect.

A renamed or merged class is relabelled in one transaction: labels, examples, ledger, exam, scores, class list.
Later labels of the old name are taken for the new one.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import datetime

import numpy as np

from learner.control import Refused
from learner.joining import Joiner
from learner.names import Alike, alike
from learner.online import HeldOut, OnlineLearner
from learner.trust import Claim, Review, Standing, Suspect, TrustSettings, review
from monitoring.metrics import Metrics
from replay.store import Claimed, Doubt, Held, LearnerStore, Outgoing, Quarantined, Transaction
from stream.errors import DeadLetter
from stream.events import Label, Place, class_name, encode
from stream.join import Known, Labelled, join, settle, touched

logger = logging.getLogger(__name__)

BURST = "label_burst"
UNTRUSTED = "labeller_untrusted"
AT_ONCE = 2_000
"""Labels released by one request: their events are read back and embedded while learning waits."""
PASSES = 3
"""Reviews one after another, each without what the one before set aside."""


class Curator:
    """Sets aside, releases, drops and renames. Used by the learning thread alone.

    Args:
        store: the learner's database.
        joiner: makes what is joined true.
        learners: by stream.
        trust: by stream, when a labeller is a suspect.
        rules: by stream, how labellers who disagree are combined.
        labels: whole name of the topic that labels come from.
        metrics: where labels set aside are counted.
        clock: the time, in UTC.
    """

    def __init__(
        self,
        store: LearnerStore,
        joiner: Joiner,
        learners: Mapping[str, OnlineLearner],
        trust: Mapping[str, TrustSettings],
        rules: Mapping[str, str],
        labels: str,
        metrics: Metrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._joiner, self._learners, self._trust = store, joiner, learners, trust
        self._rules, self._topic, self._metrics, self._clock = rules, labels, metrics, clock
        self._unreviewed: Counter[str] = Counter()
        self._standings: dict[str, Mapping[str, Standing]] = {}
        self._alike: dict[str, tuple[frozenset[str], list[Alike]]] = {}

    # Trust

    def learned(self, counts: Mapping[str, int]) -> None:
        """Labels were learned, so many by stream: review where that is enough."""
        for stream, count in counts.items():
            self._unreviewed[stream] += count
            if self._trust[stream].enabled and self._unreviewed[stream] >= self._trust[stream].every_labels:
                self.review(stream)

    def review(self, stream: str) -> int:
        """Set aside what cannot be believed; returns how many labels that were."""
        self._unreviewed[stream] = 0
        total = 0
        for _ in range(PASSES):
            count = self._review(stream)
            if not count:
                break
            total += count
        return total

    def standings(self, stream: str) -> Mapping[str, Standing]:
        """How the labellers of the newest labels stood at the last review."""
        return self._standings.get(stream, {})

    def _review(self, stream: str) -> int:
        settings, now = self._trust[stream], self._clock()
        claims, places = self._claims(stream, settings)
        doubts = {doubt.labeller: doubt for doubt in self._store.doubts(stream)}
        known = [Suspect(doubt.labeller, doubt.since, doubt.why, doubt.wholly) for doubt in doubts.values()]
        found = review(claims, settings, known)
        self._standings[stream] = found.standings
        aside = {(claim.event_id, claim.labeller): (reason, why) for claim, reason, why in _aside(claims, found, known)}
        new = None
        if found.suspect is not None:
            one = found.suspect
            new = Doubt(one.labeller, one.since, one.wholly, one.why)
            logger.warning(
                "stream %s: labeller %s is not believed since %s: %s", stream, one.labeller, one.since, one.why
            )
        for burst in found.bursts:
            logger.warning("stream %s: %s's labels %r are a burst: %s", stream, burst.labeller, burst.label, burst.why)
        if not aside and new is None:
            return 0
        self._set_aside(stream, [(places[key], reason, why) for key, (reason, why) in aside.items()], new, now)
        return len(aside)

    def _claims(self, stream: str, settings: TrustSettings) -> tuple[list[Claim], dict[tuple[str, str], Labelled]]:
        learner = self._learners[stream]
        rows = self._store.claims(stream, learner.encoder_digest, settings.window)
        events = {row.said.event_id: row for row in rows}
        if not events:
            return [], {}
        said = dict(zip(events, _held_out(learner, list(events.values())), strict=True))
        answers: dict[str, list[Labelled]] = defaultdict(list)
        for row in rows:
            answers[row.said.event_id].append(row.said)
        claims, places = [], {}
        for row in rows:
            # What a person released is no longer asked about.
            if row.said.released or row.said.label is None:
                continue
            one = row.said
            reference = _reference(one, said[one.event_id], answers[one.event_id], settings.confidence)
            claims.append(
                Claim(one.event_id, one.labeller, row.said.label, one.labelled_at, reference, said[one.event_id].label)
            )
            places[one.event_id, one.labeller] = one
        return claims, places

    def _set_aside(
        self, stream: str, rows: list[tuple[Labelled, str, str]], doubt: Doubt | None, now: datetime
    ) -> None:
        quarantined = [Quarantined(_label(row), self._place(row), reason, detail=why) for row, reason, why in rows]
        keys = {row.key for row, _, _ in rows}
        gone = {(row.key, row.labeller) for row, _, _ in rows}
        known = self._store.known(keys)
        after = {
            key: {name: row for name, row in known.labels.get(key, {}).items() if (key, name) not in gone}
            for key in keys
        }

        def also(tx: Transaction) -> None:
            tx.quarantine(quarantined)
            if doubt is not None:
                tx.doubt(stream, doubt)

        self._joiner.apply(settle(known, after, self._rules), now, also)
        self._metrics.labels.labels(stream, "quarantined").inc(len(rows))

    def _place(self, row: Labelled) -> Place:
        return Place(topic=self._topic, partition=row.at[0], offset=row.at[1])

    # By hand

    def label(self, stream: str, event_ids: Collection[str], name: str, labeller: str) -> str:
        """Say what events are, as `labeller`: by messages on the topic of labels, like everybody's.

        So it is learned, corrected and withdrawn like any label, and whoever reads the topic sees it too. What is
        answered names no event, because the audit keeps it for longer than the event.
        """
        now = self._clock()
        try:
            name = self._joiner.name_now(stream, class_name(name))
        except DeadLetter as refusal:
            raise Refused(f"label: {refusal.detail}") from None
        closed = self._joiner.closed_labels(stream)
        if closed is not None and name not in closed:
            raise Refused(f"stream {stream!r} takes only its own labels: {', '.join(sorted(closed))}")
        labels = [
            Label(event_id=event_id, stream=stream, label=name, labeller=labeller, labelled_at=now)
            for event_id in event_ids
        ]
        messages = [Outgoing(self._topic, one.event_id.encode(), encode(one)) for one in labels]
        known = self._store.known({(stream, event_id) for event_id in event_ids})
        self._joiner.apply(settle(Known(), {}), now, lambda tx: tx.send(messages))
        unknown = len({*event_ids} - {event_id for _, event_id in known.served})
        waits = f"; of {unknown} no answer is known yet, and its label waits for it" if unknown else ""
        return f"{len(labels)} event{'' if len(labels) == 1 else 's'} labelled {name!r} by {labeller}{waits}"

    # Quarantine

    def release(self, stream: str, held: Held) -> str:
        """Join labels out of quarantine like new ones; a labeller who is released whole is believed again.

        The day's limit of new classes does not hold what a person lets through; the limit of all classes does.
        """
        now, plan = self._clock(), self._learners[stream].plan
        rows = self._store.quarantined(stream, AT_ONCE, held)
        labels: list[tuple[Label, Place]] = []
        ids: list[int] = []
        names = {self._joiner.name_now(stream, str(row.label.label)) for row in rows}
        known = self._store.known_classes(stream, names) | plan.labels
        room = plan.max_classes - self._store.class_total(stream)
        for row in rows:
            name = self._joiner.name_now(stream, str(row.label.label))
            if name not in known:
                if room <= 0:
                    continue
                room -= 1
                known.add(name)
            labels.append((row.label.model_copy(update={"label": name}), row.place))
            ids.append(row.id)
        _, labels, refused = self._joiner.learnable([], labels)
        whole = held.labeller is not None and replace(held, labeller=None) == Held()
        believed = False

        def also(tx: Transaction) -> None:
            nonlocal believed
            tx.release(ids)
            believed = whole and tx.trust(stream, str(held.labeller))

        spoken_of = touched([], labels)
        found = self._store.known(spoken_of)
        joined = join(found, [], labels, self._rules, released=True)
        self._joiner.apply(joined, now, also, spoken_of - found.served.keys())
        done = [f"{len(ids)} label{'' if len(ids) == 1 else 's'} released"]
        if believed:
            done.append(f"{held.labeller} is believed again")
        if not rows:
            done.append("no such label is in quarantine")
        if refused:
            done.append(f"{refused.total()} of them too late to teach anything")
        if len(ids) < len(rows):
            done.append(f"{len(rows) - len(ids)} stay, the stream has its {plan.max_classes} classes")
        if len(rows) == AT_ONCE:
            done.append("more may wait, ask again")
        if not ids and not believed:
            raise Refused("; ".join(done))
        return "; ".join(done)

    def drop(self, stream: str, held: Held) -> str:
        """Delete labels from quarantine; they are learned only if they are sent again."""
        count = 0

        def also(tx: Transaction) -> None:
            nonlocal count
            count = tx.drop(stream, held)

        self._joiner.apply(settle(Known(), {}), self._clock(), also)
        if not count:
            raise Refused("no such label is in quarantine")
        return f"{count} label{'' if count == 1 else 's'} dropped"

    # Names

    def rename(self, stream: str, old: str, new: str, *, merge: bool) -> str:
        """Name a class otherwise, or make it one with another; returns what was done.

        Args:
            merge: `new` is a class that there is; else it must be none.
        """
        now, learner = self._clock(), self._learners[stream]
        try:
            old, new = class_name(old), class_name(new)
        except DeadLetter as refusal:
            raise Refused(refusal.detail) from None
        there = self._store.known_classes(stream, {old, new}) | (learner.plan.labels & {old, new})
        if old not in there or old == new:
            raise Refused(f"stream {stream!r} has no class {old!r}" if old != new else "both names are the same")
        if merge and new not in there:
            raise Refused(f"stream {stream!r} has no class {new!r} to merge into; rename it instead")
        if not merge and new in there:
            raise Refused(f"stream {stream!r} has a class {new!r}; merge the two instead, which cannot be undone")
        closed = self._joiner.closed_labels(stream)
        if closed is not None and new not in closed:
            raise Refused(
                f"stream {stream!r} is closed and its labels do not name {new!r}; add it to the settings first"
            )
        keys = self._store.events_of(stream, old)
        known = self._store.known(keys)
        after = {key: _named(known.labels.get(key, {}), old, new) for key in keys}
        joined = settle(known, after, self._rules)
        self._joiner.apply(joined, now, lambda tx: tx.name_as(stream, old, new))
        self._joiner.renamed(stream)
        learner.relearned()
        learner.announce(now, guard=False)
        verb = "merged into" if merge else "renamed to"
        return f"{old!r} is {verb} {new!r}: {len(keys)} labelled events; later labels of the old name follow"

    def alike(self, stream: str) -> list[Alike]:
        """Class names of the stream that are nearly the same; computed when its names have changed."""
        names = frozenset(self._store.classes(stream)) | self._learners[stream].plan.labels
        before = self._alike.get(stream)
        if before is not None and before[0] == names:
            return before[1]
        found = alike(names)
        for pair in found:
            if before is not None and pair not in before[1]:
                logger.warning("stream %s: classes %r and %r differ by %s", stream, pair.one, pair.other, pair.why)
        self._alike[stream] = names, found
        return found


def _held_out(learner: OnlineLearner, rows: list[Claimed]) -> list[HeldOut]:
    return learner.held_out(
        [row.said.event_id for row in rows],
        np.stack([row.embedding for row in rows]),
        [None if row.exam else row.learned for row in rows],
    )


def _reference(one: Labelled, said: HeldOut, answers: list[Labelled], confidence: float) -> str | None:
    """The class that the others are sure of: the head, if it knows the class named at all; else two labellers."""
    if one.label in said.known and said.probability >= confidence:
        return said.label
    others = {answer.label for answer in answers if answer.labeller != one.labeller}
    return others.pop() if len(answers) > 2 and len(others) == 1 else None


def _aside(claims: list[Claim], found: Review, known: list[Suspect]) -> list[tuple[Claim, str, str]]:
    """The claims to set aside, with reason and sentence."""
    suspects = {one.labeller: one for one in [*known, *([found.suspect] if found.suspect else [])]}
    bursts = {(one.labeller, event_id): one for one in found.bursts for event_id in one.event_ids}
    aside = []
    for claim in claims:
        burst, suspect = bursts.get((claim.labeller, claim.event_id)), suspects.get(claim.labeller)
        if burst is not None and burst.label == claim.label:
            aside.append((claim, BURST, burst.why))
        elif suspect is not None and suspect.covers(claim):
            aside.append((claim, UNTRUSTED, suspect.why))
    return aside


def _named(rows: Mapping[str, Labelled], old: str, new: str) -> dict[str, Labelled]:
    return {name: row._replace(label=new) if row.label == old else row for name, row in rows.items()}


def _label(row: Labelled) -> Label:
    return Label(
        event_id=row.event_id,
        stream=row.stream,
        label=row.label,
        labeller=row.labeller,
        labelled_at=row.labelled_at,
        confidence=row.confidence,
    )
