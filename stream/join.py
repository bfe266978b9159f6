"""Predictions and labels meet by event id, in whatever order they arrive.

Pure: what is known of the touched events goes in beside the new messages, and what must change comes
out. Every choice between two messages is made by something the messages carry (a time, a place in the
log, a name), never by which came first, so that any order and any batching of the same messages ends
in the same state:

- Of several predictions of one event id, the one whose event lies first in the log counts; of several
  predictions of that one event, the one written first.
- Of several labels by one labeller, the one with the greatest `labelled_at` counts, then the one that
  lies last in the log. Null withdraws.
- The labellers of one event are combined by a named rule.

::

    keys = touched(predictions, labels)
    joined = join(store.known(keys), predictions, labels)
    # joined.served, joined.labels, joined.scores: rows to write
    # joined.changes: what was learned of an event, and what should be
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from stream.events import Label, Place, Prediction

EventKey = tuple[str, str]
"""(stream, event id): what a prediction and a label have in common."""

At = tuple[int, int]
"""(partition, offset) of a message in its own topic."""


class Served(NamedTuple):
    """What was answered for one event: a row of the join index.

    Args:
        ref: where the event lies in the log.
        written: where the prediction lies in its own topic.
        label: the class served, None while the stream had learned none.
        too_late: the event was wanted after its log segment had gone; it is not asked for again.
    """

    stream: str
    event_id: str
    ref: Place
    written: At
    label: str | None
    model_version: str
    observed_at: datetime
    predicted_at: datetime
    too_late: bool = False

    @property
    def key(self) -> EventKey:
        """The event answered."""
        return self.stream, self.event_id

    @property
    def order(self) -> tuple[str, int, int, At]:
        """The smallest of one event id counts."""
        return self.ref.topic, self.ref.partition, self.ref.offset, self.written


class Labelled(NamedTuple):
    """What one labeller says of one event; `label` None when it was withdrawn.

    Args:
        released: a person took it out of quarantine, so no review sets it aside again.
    """

    stream: str
    event_id: str
    labeller: str
    label: str | None
    labelled_at: datetime
    at: At
    confidence: float | None = None
    released: bool = False

    @property
    def key(self) -> EventKey:
        """The event labelled."""
        return self.stream, self.event_id

    @property
    def order(self) -> tuple[datetime, At]:
        """The greatest of one labeller counts."""
        return self.labelled_at, self.at


class Score(NamedTuple):
    """Was the answer that was served right? Prequential: the model had not seen this label then."""

    stream: str
    event_id: str
    label: str
    predicted: str | None
    model_version: str
    labelled_at: datetime

    @property
    def key(self) -> EventKey:
        """The event scored."""
        return self.stream, self.event_id

    @property
    def right(self) -> bool:
        """An answer of no class at all is wrong."""
        return self.predicted == self.label


class Lesson(NamedTuple):
    """What is, or should be, learned of one event: the label, and which event it is learned from."""

    label: str
    ref: Place
    observed_at: datetime
    labelled_at: datetime


class Kind(StrEnum):
    """What must be done for an event to be learned as it should be."""

    LEARN = "learn"
    """Nothing is learned of it yet: fetch the event, embed it, add it."""
    REREAD = "reread"
    """It was learned from a later event of the same id: fetch, embed, subtract the old, add the new."""
    RELABEL = "relabel"
    """Only the label differs: subtract the old, add the new, with the embedding kept."""
    REDATE = "redate"
    """Only a time differs: nothing to subtract or add."""
    FORGET = "forget"
    """No label is left: subtract."""


class Change(NamedTuple):
    """One event whose learned state differs from the desired one."""

    stream: str
    event_id: str
    desired: Lesson | None
    learned: Lesson | None

    @property
    def key(self) -> EventKey:
        """The event that changes."""
        return self.stream, self.event_id

    @property
    def kind(self) -> Kind:
        """What must be done."""
        if self.desired is None:
            return Kind.FORGET
        if self.learned is None:
            return Kind.LEARN
        if self.desired.ref != self.learned.ref:
            return Kind.REREAD
        return Kind.RELABEL if self.desired.label != self.learned.label else Kind.REDATE

    @property
    def needs_event(self) -> bool:
        """Whether the event itself must be read back from the log, at `desired.ref`."""
        return self.kind in (Kind.LEARN, Kind.REREAD)

    @property
    def outcome(self) -> str | None:
        """The label outcome to count once this is done: learned, corrected, withdrawn, or None."""
        if self.learned is None:
            return "learned"
        if self.desired is None:
            return "withdrawn"
        return "corrected" if self.desired.label != self.learned.label else None


@dataclass(frozen=True, slots=True)
class Known:
    """What the store holds of the touched events; an event that it does not know is absent."""

    served: Mapping[EventKey, Served] = field(default_factory=dict)
    labels: Mapping[EventKey, Mapping[str, Labelled]] = field(default_factory=dict)
    """By event, then by labeller."""
    learned: Mapping[EventKey, Lesson] = field(default_factory=dict)
    scores: Mapping[EventKey, Score] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Joined:
    """What must change, and what to count. Only rows that differ from the known ones are here.

    Args:
        served: join index rows to insert or replace.
        labels: label rows to insert or replace.
        unlabelled: (event, labeller) of label rows that go; only `settle` has any.
        scores: score rows to insert or replace.
        unscored: events whose score goes, because no label of theirs is left.
        changes: events whose learned state must change.
        class_names: (stream, class) that a label named, though it may not be the one that counts.
        label_outcomes: by (stream, outcome): repeated, superseded, waiting, disagreed. The outcomes of
            `changes` are counted once they are done; see `Change.outcome`.
        prediction_outcomes: by (stream, outcome): joined, repeated, repeated_event.
        first_scores: by (stream, `right` or `wrong`, revision), the events scored for the first time.
    """

    served: tuple[Served, ...]
    labels: tuple[Labelled, ...]
    scores: tuple[Score, ...]
    unscored: tuple[EventKey, ...]
    changes: tuple[Change, ...]
    class_names: frozenset[tuple[str, str]]
    label_outcomes: Counter[tuple[str, str]]
    prediction_outcomes: Counter[tuple[str, str]]
    first_scores: Counter[tuple[str, str, str]]
    unlabelled: tuple[tuple[EventKey, str], ...] = ()


Rule = Callable[[Sequence[Labelled]], Labelled]
"""Picks the label that counts from one event's labels that are not withdrawn; there is at least one."""


def latest(labels: Sequence[Labelled]) -> Labelled:
    """The label with the greatest `labelled_at`; of equals, the labeller whose name sorts last."""
    return max(labels, key=lambda label: (label.labelled_at, label.labeller))


def majority(labels: Sequence[Labelled]) -> Labelled:
    """The class that most labellers name; of equals, the one named latest. Its latest label counts."""
    votes = Counter(label.label for label in labels)
    most = max(votes.values())
    return latest([label for label in labels if votes[label.label] == most])


def weighted(labels: Sequence[Labelled]) -> Labelled:
    """Like `majority`, each vote counting as much as its `confidence`; a label that gives none counts in full."""
    votes: dict[str | None, list[float]] = {}
    for label in labels:
        votes.setdefault(label.label, []).append(1.0 if label.confidence is None else label.confidence)
    # fsum is exact, so the order of the labellers cannot decide between two near sums.
    weights = {name: math.fsum(confidences) for name, confidences in votes.items()}
    most = max(weights.values())
    return latest([label for label in labels if weights[label.label] == most])


RULES: Mapping[str, Rule] = {"latest": latest, "majority": majority, "weighted": weighted}
"""How labellers who disagree are combined, by the name that the settings use."""


def touched(predictions: Iterable[tuple[Prediction, Place]], labels: Iterable[tuple[Label, Place]]) -> set[EventKey]:
    """The events that these messages speak of: what `join` must know about."""
    keys = {(prediction.stream, prediction.event_id) for prediction, _ in predictions}
    return keys | {(label.stream, label.event_id) for label, _ in labels}


def join(
    known: Known,
    predictions: Iterable[tuple[Prediction, Place]],
    labels: Iterable[tuple[Label, Place]],
    rules: Mapping[str, str] | None = None,
    *,
    released: bool = False,
) -> Joined:
    """Bring new messages, each with its place in its own topic, together with what is known.

    Args:
        known: the store's rows for every event in `touched(predictions, labels)`.
        rules: the name in `RULES` by stream; `latest` for a stream not named.
        released: the labels come out of quarantine.

    Raises:
        KeyError: a rule that `RULES` does not have.
    """
    labels = list(labels)
    served, prediction_outcomes = _join_predictions(known, predictions)
    spoken, label_outcomes, accepted = _join_labels(known, labels, released)

    changes: list[Change] = []
    scores: list[Score] = []
    unscored: list[EventKey] = []
    first_scores: Counter[tuple[str, str, str]] = Counter()
    # An event that nobody has spoken of, as are most of those just answered, has nothing to learn, score or count.
    told = spoken.keys() | served.keys() & (known.labels.keys() | known.learned.keys() | known.scores.keys())
    for key in sorted(told):
        stream, event_id = key
        rule = RULES[(rules or {}).get(stream, "latest")]
        before = known.labels.get(key, {})
        after = {**before, **spoken.get(key, {})}
        live = [label for label in after.values() if label.label is not None]
        effective = rule(live) if live else None
        answer = served.get(key, known.served.get(key))

        lesson = known.learned.get(key)
        desired = _desired(effective, answer, lesson)
        change = None if desired == lesson else Change(stream, event_id, desired, lesson)
        if change is not None:
            changes.append(change)
        if _disagree(after) and not _disagree(before):
            label_outcomes[stream, "disagreed"] += 1
        for label in accepted.get(key, ()):
            if answer is None and lesson is None:
                label_outcomes[stream, "waiting"] += 1
            elif change is None or change.outcome is None:
                same = effective is not None and label.label == effective.label
                label_outcomes[stream, "repeated" if same else "superseded"] += 1

        old = known.scores.get(key)
        new = _score(effective, answer, old)
        if new is None and old is not None:
            unscored.append(key)
        elif new is not None and new != old:
            scores.append(new)
            if old is None:
                first_scores[stream, "right" if new.right else "wrong", new.model_version] += 1

    return Joined(
        served=tuple(row for key, row in served.items() if row != known.served.get(key)),
        labels=tuple(row for rows in spoken.values() for row in rows.values()),
        scores=tuple(scores),
        unscored=tuple(unscored),
        changes=tuple(changes),
        class_names=frozenset((label.stream, label.label) for label, _ in labels if label.label is not None),
        label_outcomes=label_outcomes,
        prediction_outcomes=prediction_outcomes,
        first_scores=first_scores,
    )


def settle(
    known: Known, labels: Mapping[EventKey, Mapping[str, Labelled]], rules: Mapping[str, str] | None = None
) -> Joined:
    """What must change where the label rows of some events become others: some are set aside, or renamed.

    Args:
        known: the store's rows for every event in `labels`.
        labels: by event, all of its label rows as they are to be, by labeller; a labeller left out goes.
        rules: as for `join`.
    """
    changes: list[Change] = []
    scores: list[Score] = []
    unscored: list[EventKey] = []
    for key in sorted(labels):
        stream, event_id = key
        live = [label for label in labels[key].values() if label.label is not None]
        effective = RULES[(rules or {}).get(stream, "latest")](live) if live else None
        answer, lesson, old = known.served.get(key), known.learned.get(key), known.scores.get(key)
        change = Change(stream, event_id, _desired(effective, answer, lesson), lesson)
        if change.desired != change.learned:
            changes.append(change)
        new = _score(effective, answer, old)
        if new is None and old is not None:
            unscored.append(key)
        elif new is not None and new != old:
            scores.append(new)
    rows = [(key, name, row) for key, after in labels.items() for name, row in after.items()]
    return Joined(
        served=(),
        labels=tuple(row for key, name, row in rows if known.labels.get(key, {}).get(name) != row),
        scores=tuple(scores),
        unscored=tuple(unscored),
        changes=tuple(changes),
        class_names=frozenset(),
        label_outcomes=Counter(),
        prediction_outcomes=Counter(),
        first_scores=Counter(),
        unlabelled=tuple(
            (key, name) for key, after in labels.items() for name in known.labels.get(key, {}) if name not in after
        ),
    )


def _join_predictions(
    known: Known, predictions: Iterable[tuple[Prediction, Place]]
) -> tuple[dict[EventKey, Served], Counter[tuple[str, str]]]:
    """The row that counts for every event predicted here."""
    rows: dict[EventKey, Served] = {}
    outcomes: Counter[tuple[str, str]] = Counter()
    for message, place in predictions:
        new = Served(
            stream=message.stream,
            event_id=message.event_id,
            ref=message.ref,
            written=(place.partition, place.offset),
            label=message.label,
            model_version=message.model_version,
            observed_at=message.observed_at,
            predicted_at=message.predicted_at,
        )
        old = rows.get(new.key, known.served.get(new.key))
        if old is None:
            outcomes[new.stream, "joined"] += 1
            rows[new.key] = new
            continue
        outcomes[new.stream, "repeated" if new.ref == old.ref else "repeated_event"] += 1
        first = min(old, new, key=lambda row: row.order)
        # That an event can no longer be read is known of the place, not of the prediction.
        rows[new.key] = first._replace(too_late=old.too_late) if first.ref == old.ref else first
    return rows, outcomes


def _join_labels(
    known: Known, labels: Iterable[tuple[Label, Place]], released: bool
) -> tuple[dict[EventKey, dict[str, Labelled]], Counter[tuple[str, str]], dict[EventKey, list[Labelled]]]:
    """The rows that change, what to count, and of the rows those that say something new."""
    rows: dict[EventKey, dict[str, Labelled]] = {}
    outcomes: Counter[tuple[str, str]] = Counter()
    accepted: dict[EventKey, dict[str, Labelled]] = {}
    for message, place in labels:
        new = Labelled(
            stream=message.stream,
            event_id=message.event_id,
            labeller=message.labeller,
            label=message.label,
            labelled_at=message.labelled_at,
            at=(place.partition, place.offset),
            confidence=message.confidence,
            released=released,
        )
        spoken = rows.setdefault(new.key, {})
        fresh = accepted.setdefault(new.key, {})
        old = spoken.get(new.labeller) or known.labels.get(new.key, {}).get(new.labeller)
        if old is not None and new.order <= old.order:
            same = (new.label, new.labelled_at) == (old.label, old.labelled_at)
            outcomes[new.stream, "repeated" if same else "superseded"] += 1
            continue
        spoken[new.labeller] = new
        if old is not None and new.label == old.label:
            outcomes[new.stream, "repeated"] += 1
            if new.labeller in fresh:
                fresh[new.labeller] = new
            continue
        if new.labeller in fresh:
            outcomes[new.stream, "superseded"] += 1
        fresh[new.labeller] = new
    return rows, outcomes, {key: list(fresh.values()) for key, fresh in accepted.items()}


def _desired(effective: Labelled | None, answer: Served | None, learned: Lesson | None) -> Lesson | None:
    """What should be learned; nothing while no label counts or the event was never seen.

    Where the join index has let go of the event, or the log has, what was learned of it stands for it:
    its label can still be corrected or withdrawn.
    """
    if effective is None or effective.label is None:
        return None
    if answer is not None and not answer.too_late:
        return Lesson(effective.label, answer.ref, answer.observed_at, effective.labelled_at)
    if learned is not None:
        return Lesson(effective.label, learned.ref, learned.observed_at, effective.labelled_at)
    return None


def _score(effective: Labelled | None, answer: Served | None, old: Score | None) -> Score | None:
    """The served answer against the label that counts; the old row stands for an index row long gone."""
    if effective is None or effective.label is None:
        return None
    if answer is not None:
        predicted, version = answer.label, answer.model_version
    elif old is not None:
        predicted, version = old.predicted, old.model_version
    else:
        return None
    return Score(effective.stream, effective.event_id, effective.label, predicted, version, effective.labelled_at)


def _disagree(labels: Mapping[str, Labelled]) -> bool:
    return len(labels) > 1 and len({label.label for label in labels.values() if label.label is not None}) > 1
