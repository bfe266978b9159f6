"""What a contestant is shown, when its labels come, and when it is asked. Every contestant is shown the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from benchmarks.learning.reading import Examples, Unusable
from benchmarks.learning.scores import (
    accuracy,
    backward_transfer,
    by_class,
    forgetting,
    macro_f1,
    recalls,
)
from learner.encoders import Payload

BLOCKS = 1_000
"""A prequential stream is answered in about so many blocks, where labels are so late that this is not felt."""
BLOCK_OF_DELAY = 10
"""A block is at most a tenth of the labels' delay: with labels that come at once, each event is a block of its own."""
JUDGED_FROM = 5
"""Examples of a class in one part of a prequential stream from which its recall there is compared."""


class Contestant(Protocol):
    """Anything that answers events and may learn from their labels."""

    def serve(self, positions: Sequence[int], payloads: Sequence[Payload]) -> Sequence[str | None]:
        """Answer events whose labels come later under the same positions.

        The list may be filled as late as the next `boundary`, with what would have been answered at once.
        """
        ...

    def take(self, positions: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Events whose labels come later under the same positions; nobody looks at the answers."""
        ...

    def label(self, positions: Sequence[int], labels: Sequence[str]) -> None:
        """Labels of events that were served or taken before."""
        ...

    def ask(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        """Answer examples that are never learned."""
        ...

    def boundary(self) -> None:
        """An experience is over."""
        ...

    def details(self) -> dict[str, Any]:
        """What happened on the way, for the record."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What one contestant reached with one seed: values by metric, and its accuracy after each experience."""

    values: Mapping[str, float]
    curve: Sequence[float] = field(default_factory=tuple)


def class_incremental(
    train: Examples, test: Examples, contestant: Contestant, *, experiences: int, seed: int, in_order: bool = False
) -> Outcome:
    """Experience after experience, each example once; asked after each about all classes seen by then.

    Experiences are the data's own (`Examples.groups`), or classes in as equal parts as they allow, in an order
    drawn from `seed` (of first appearance with `in_order`). Where groups are the data's own, everything in the
    test part whose class was seen is asked, and forgetting is counted by class.
    """
    parts = _experiences(train, experiences, seed, in_order)
    labels = np.array(test.labels)
    first_seen: dict[str, int] = {}
    for number, members in enumerate(parts):
        for place in members:
            first_seen.setdefault(train.labels[place], number)
    came = np.array([first_seen.get(label, len(parts)) for label in test.labels])
    asked: list[tuple[list[str], list[str | None]]] = []
    matrix = np.full((len(parts), len(parts)), np.nan)
    for number, members in enumerate(parts):
        _teach(contestant, train, members)
        contestant.boundary()
        places = np.flatnonzero(came <= number)
        answers = list(contestant.ask([test.payloads[place] for place in places]))
        truth = labels[places].tolist()
        asked.append((truth, answers))
        right = np.array([a == t for a, t in zip(answers, truth, strict=True)])
        for group in range(number + 1):
            chosen = came[places] == group
            if chosen.any():
                matrix[number, group] = 100.0 * right[chosen].mean()
    if train.groups:
        matrix = by_class(asked)
    curve = [accuracy(*pair) for pair in asked if pair[0]]
    return Outcome(
        {
            "final": accuracy(*asked[-1]),
            "average": float(np.mean(curve)),
            "forgetting": forgetting(matrix),
            "backward_transfer": backward_transfer(matrix),
            "worst_class": min(recalls(*asked[-1]).values(), default=np.nan),
            "macro_f1": macro_f1(*asked[-1]),
        },
        curve,
    )


def few_shot(
    train: Examples, test: Examples, contestant: Contestant, *, shots: int, new_classes: int, seed: int
) -> Outcome:
    """All classes but some, then those with `shots` labels each; which, and which labels, is drawn from `seed`."""
    chance = random.Random(f"few shot/{seed}")
    new = drawn_classes(train, new_classes, seed)
    old_places = [p for p, label in enumerate(train.labels) if label not in new]
    chance.shuffle(old_places)
    shown: list[int] = []
    for name in sorted(new):
        members = [p for p, label in enumerate(train.labels) if label == name]
        shown += chance.sample(members, min(shots, len(members)))
    chance.shuffle(shown)
    if not old_places:
        raise Unusable("few-shot learning needs at least two classes")
    old = test.take([p for p, label in enumerate(test.labels) if label not in new])
    fresh = test.take([p for p, label in enumerate(test.labels) if label in new])
    _teach(contestant, train, old_places)
    contestant.boundary()
    before = accuracy(old.labels, contestant.ask(old.payloads))
    _teach(contestant, train, shown)
    contestant.boundary()
    on_old, on_new = contestant.ask(old.payloads), contestant.ask(fresh.payloads)
    truth, answers = [*old.labels, *fresh.labels], [*on_old, *on_new]
    return Outcome(
        {
            "final": accuracy(truth, answers),
            "new_classes": accuracy(fresh.labels, on_new),
            "old_change": accuracy(old.labels, on_old) - before,
            "worst_class": min(recalls(truth, answers).values()),
            "macro_f1": macro_f1(truth, answers),
        },
        [before, accuracy(truth, answers)],
    )


def prequential(
    stream: Examples, test: Examples | None, contestant: Contestant, *, experiences: int, delay: int
) -> Outcome:
    """Each event is answered before its label comes, `delay` events later, or when the data says (`Examples.due`).

    The stream is cut into `experiences` parts. The first is not counted, as everyone begins with nothing. Without
    a test part, `final` is the accuracy within the last part, `average`, `macro_f1` and `worst_class` are over all
    but the first, and forgetting and backward transfer compare each class's recall in one part with that in others.
    With a test part these are of its answers after each part, and `prequential_*` of the stream's.
    """
    n = len(stream)
    if n < 2:
        raise Unusable("a prequential stream needs at least two events")
    due = stream.due or [place + 1 + delay for place in range(n)]
    waiting = sorted(range(n), key=lambda place: (due[place], place))
    parts = max(1, min(experiences, n // 2))
    edges = [n * number // parts for number in range(parts + 1)]
    block = max(1, min(n // BLOCKS, delay // BLOCK_OF_DELAY))
    told = 0
    served: list[list[str | None]] = []
    asked: list[tuple[list[str], list[str | None]]] = []

    def tell(position: int) -> None:
        nonlocal told
        known = told
        while told < n and due[waiting[told]] <= position:
            told += 1
        if told > known:
            places = waiting[known:told]
            contestant.label(places, [stream.labels[place] for place in places])

    for number in range(parts):
        answers: list[Sequence[str | None]] = []
        for start in range(edges[number], edges[number + 1], block):
            places = range(start, min(start + block, edges[number + 1]))
            tell(start)
            answers.append(contestant.serve(list(places), [stream.payloads[place] for place in places]))
        contestant.boundary()
        served.append([answer for part in answers for answer in part])
        if test is not None:
            asked.append((list(test.labels), list(contestant.ask(test.payloads))))
    pairs = [(list(stream.labels[edges[i] : edges[i + 1]]), served[i]) for i in range(parts)]
    counted = pairs[1:] or pairs
    truth = [label for labels, _ in counted for label in labels]
    given = [answer for _, part in counted for answer in part]
    judged = asked or counted
    matrix = by_class(judged, 1 if asked else JUDGED_FROM)
    last_truth, last_answers = asked[-1] if asked else (truth, given)
    values = {
        "final": accuracy(*judged[-1]),
        "average": float(np.mean([accuracy(*pair) for pair in judged])) if asked else accuracy(truth, given),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "worst_class": min(recalls(last_truth, last_answers).values()),
        "macro_f1": macro_f1(last_truth, last_answers),
    }
    if asked:
        values |= {
            "prequential_average": accuracy(truth, given),
            "prequential_macro_f1": macro_f1(truth, given),
        }
    return Outcome(values, [accuracy(*pair) for pair in judged])


def drawn_classes(train: Examples, new_classes: int, seed: int) -> set[str]:
    """The classes that come late in `few_shot`: at most a third of all."""
    count = min(new_classes, max(1, len(train.classes) // 3))
    return set(random.Random(f"new classes/{seed}").sample(train.classes, count))


def first_part(train: Examples, experiences: int, seed: int, in_order: bool) -> int:
    """How many examples the first experience of `class_incremental` has."""
    return len(_experiences(train, experiences, seed, in_order)[0])


def _experiences(train: Examples, experiences: int, seed: int, in_order: bool) -> list[list[int]]:
    chance = random.Random(f"class incremental/{seed}")
    if train.groups:
        names = list(dict.fromkeys(train.groups))
        if not in_order:
            chance.shuffle(names)
        parts = [[p for p, group in enumerate(train.groups) if group == name] for name in names]
    else:
        classes = list(dict.fromkeys(train.labels)) if in_order else train.classes
        if not in_order:
            chance.shuffle(classes)
        count = max(1, min(experiences, len(classes)))
        of = {name: number * count // len(classes) for number, name in enumerate(classes)}
        parts = [[p for p, label in enumerate(train.labels) if of[label] == number] for number in range(count)]
    if not in_order and not train.groups:
        for members in parts:
            chance.shuffle(members)
    return parts


def _teach(contestant: Contestant, train: Examples, places: Sequence[int]) -> None:
    """Each example once: taken, then labelled, some at a time."""
    step = 100
    for start in range(0, len(places), step):
        part = list(places[start : start + step])
        contestant.take(part, [train.payloads[place] for place in part])
        contestant.label(part, [train.labels[place] for place in part])


def shares(labels: Sequence[str]) -> str:
    """How many examples the classes have, in words."""
    counts = sorted(Counter(labels).values())
    return f"{len(counts):,} classes of {counts[0]:,} to {counts[-1]:,} examples" if counts else "no class"
