"""What a run of the demo bought: numbers from what was consumed, beside those of three rivals.

Nothing here asks the worker or the learner how they think they did. Every number comes from the messages of
the topics `predictions` and `labels`, and from the predictions of a frozen twin on a topic of its own; but for
the verdicts of the exams, which are the learner's and are shown as such.

All are prequential: an event counts with the first prediction made for it, before its label was known.
The rivals answer the same events at the same moments:

- *frozen*: the revision in service when the first wave ended, which learned nothing since;
- *no change*: the last label that had arrived when the prediction was made;
- *majority*: the most frequent of the labels that had arrived by then.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from learner.exam import Verdict
from stream.events import Label, LabelRequest, Prediction
from stream.model import UNTAUGHT

WINDOW = 200
"""Scored events that each point of a curve looks back on."""

POINTS = 240
"""Points of a curve, at most."""

BLOCK, BLOCKS = 15, 8
"""Fewest scored events in each block of a class, and most blocks, between which its recall is compared."""

SHOWN_CLASSES = 25

RIVALS = {
    "frozen": "the frozen model",
    "no_change": "no change",
    "no_change_at_once": "no change that is told each label at once",
    "majority": "the majority class",
}


@dataclass(frozen=True, slots=True)
class Arrived:
    """A label and when it came: the time of its Kafka record."""

    label: Label
    at: datetime


class Examined(BaseModel):
    """What the exam of one fine-tuned version said, as the learner wrote it into the version's manifest.

    Args:
        passed: whether it might be promoted.
        examples: how many were asked, none of which either model was taught.
        champion_accuracy: of the version that was in service then; `candidate_accuracy` of this one.
        worse: classes on which it was worse, beyond the budget and beyond chance.
        judged: how many classes had examples enough to tell, and `unjudged`, how many had not.
        reasons: in words, what decided first.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    passed: bool
    examples: int
    champion_accuracy: float
    candidate_accuracy: float
    worse: list[str]
    judged: int
    unjudged: int
    reasons: list[str]

    @classmethod
    def of(cls, version: str, verdict: Verdict) -> Self:
        """From the verdict in a manifest."""
        return cls(
            version=version,
            passed=verdict.promote,
            examples=verdict.n,
            champion_accuracy=round(verdict.champion_accuracy, 4),
            candidate_accuracy=round(verdict.candidate_accuracy, 4),
            worse=[outcome.label for outcome in verdict.classes if outcome.outcome == "worse"],
            judged=len(verdict.judged),
            unjudged=len(verdict.unjudged),
            reasons=list(verdict.reasons),
        )


@dataclass(frozen=True, slots=True)
class StreamRun:
    """One stream's messages, as they were consumed.

    Args:
        name: of the stream.
        question: what is asked of each event.
        source: where the events are from.
        events: ids of the events that were published, in that order.
        predictions: from the topic `predictions`, repeats included, in any order.
        labels: every message of the topic `labels` that is of this stream, repeats and corrections included.
        frozen: the pinned twin's predictions, from its own topic; empty where there was none.
        waves: how many events came before each wave of new classes; the first is 0.
        requests: labels that the learner asked for, repeats included.
        verdicts: what the exams of its fine-tunes said, oldest first.
    """

    name: str
    question: str
    source: str
    events: Sequence[str]
    predictions: Sequence[Prediction]
    labels: Sequence[Arrived]
    frozen: Sequence[Prediction] = ()
    waves: Sequence[int] = (0,)
    requests: Sequence[LabelRequest] = ()
    verdicts: Sequence[Examined] = ()


class Point(BaseModel):
    """Accuracies over the scored events before and at one event.

    Args:
        event: the event's number in the order of publishing, from 1 on.
        observed_at: its time.
    """

    model_config = ConfigDict(frozen=True)

    event: int
    observed_at: datetime
    served: float
    frozen: float | None
    no_change: float
    majority: float


class Swap(BaseModel):
    """Where another version begins to answer."""

    model_config = ConfigDict(frozen=True)

    event: int
    version: str


class StreamReport(BaseModel):
    """One stream in numbers. Accuracies and F1 are None where no event has both prediction and label.

    Args:
        events: how many were published.
        predictions: how many messages came, repeats included.
        labels: how many label messages came, repeats and corrections included.
        scored: events that have a prediction and a label that stands.
        lost: events without a prediction.
        duplicated: predictions beyond the first for one place in the log.
        accuracy_frozen_on_its_own_classes: the frozen model, on events of classes that it knows.
        accuracy_no_change_at_once: the label of the event before, had it been there at once: a baseline that no
            live system can be, and one that the demo's hurried clock does not hold back.
        accuracy_on_frozen_classes: the served model on those same events.
        macro_f1: mean F1 of all classes that occur or were answered; a null answer is a miss, not a class.
        forgetting: mean over the classes of `forgetting_by_class`, None where none has enough events.
        forgetting_by_class: a class's scored events are cut into up to `BLOCKS` blocks of `BLOCK` or more, and this is
            the recall in the best earlier block less that in the last, never below 0. The best of several blocks is
            high by chance too: blocks of 15 with a recall of 0.8 that never moves come out near 0.12.
        versions: how many versions answered; `swaps` is how often the answering version changed.
        revisions: how many revisions answered.
        requested: events that a label was asked for, and `requests_answered`, those whose label came after that.
        verdicts: the exams of its fine-tunes, oldest first: the one thing here that is the learner's own word.
        words: what the numbers say, in sentences.
    """

    model_config = ConfigDict(frozen=True)

    question: str
    source: str
    events: int
    predictions: int
    labels: int
    scored: int
    classes: int
    lost: int
    duplicated: int
    accuracy: float | None
    accuracy_frozen: float | None
    accuracy_frozen_on_its_own_classes: float | None
    accuracy_on_frozen_classes: float | None
    accuracy_no_change: float | None
    accuracy_no_change_at_once: float | None
    accuracy_majority: float | None
    macro_f1: float | None
    macro_f1_frozen: float | None
    macro_f1_frozen_on_its_own_classes: float | None
    macro_f1_on_frozen_classes: float | None
    macro_f1_no_change: float | None
    macro_f1_no_change_at_once: float | None
    macro_f1_majority: float | None
    forgetting: float | None
    forgetting_by_class: dict[str, float]
    versions: int
    version_names: list[str]
    revisions: int
    swaps: int
    swapped: list[Swap]
    waves: list[int]
    requested: int
    requests_answered: int
    verdicts: list[Examined]
    words: list[str]
    timeline: list[Point]


class DemoReport(BaseModel):
    """A whole run.

    Args:
        broker: which broker carried it, so that nobody takes `lost` for a claim about another.
        seconds: from the first event published to the last prediction and label consumed.
        dead_letters: messages that could not be used.
        words: which rival won where, in a sentence or two.
    """

    model_config = ConfigDict(frozen=True)

    generated_at: datetime
    broker: str
    seconds: float
    lost: int
    duplicated: int
    dead_letters: int
    words: list[str]
    streams: dict[str, StreamReport]


def assemble(
    runs: Sequence[StreamRun], *, seconds: float, dead_letters: int, broker: str, generated_at: datetime
) -> DemoReport:
    """The report of several streams' runs."""
    streams = {run.name: summarise(run) for run in runs}
    return DemoReport(
        generated_at=generated_at,
        broker=broker,
        seconds=round(seconds, 1),
        lost=sum(stream.lost for stream in streams.values()),
        duplicated=sum(stream.duplicated for stream in streams.values()),
        dead_letters=dead_letters,
        words=verdict(streams),
        streams=streams,
    )


def summarise(run: StreamRun) -> StreamReport:
    """One stream's report; see the module for what is compared with what."""
    served = first_predictions(run.predictions)
    truth = standing_labels(run.labels)
    order = {event_id: number for number, event_id in enumerate(run.events, 1)}
    scored = [one for one in served if truth.get(one.event_id) is not None and one.event_id in order]
    right = [truth[one.event_id] or "" for one in scored]

    answers: dict[str, list[str | None]] = {"served": [one.label for one in scored]}
    answers |= naive_answers(scored, run.labels)
    before = dict(zip(run.events[1:], run.events, strict=False))
    answers["no_change_at_once"] = [truth.get(before.get(one.event_id, "")) for one in scored]
    twin = frozen_answers(scored, run.frozen)
    if twin is not None:
        answers["frozen"] = twin
    known = {name for one in run.frozen for name in (*one.probabilities, one.label) if name}
    own = [i for i, name in enumerate(right) if name in known]

    numbers: dict[str, float | None] = {}
    for whose, suffix in (
        ("served", ""),
        ("frozen", "_frozen"),
        ("no_change", "_no_change"),
        ("no_change_at_once", "_no_change_at_once"),
        ("majority", "_majority"),
    ):
        numbers[f"accuracy{suffix}"] = accuracy(right, answers[whose]) if whose in answers else None
        numbers[f"macro_f1{suffix}"] = macro_f1(right, answers[whose]) if whose in answers else None
    for whose, suffix in (("frozen", "_frozen_on_its_own_classes"), ("served", "_on_frozen_classes")):
        part = [answers[whose][i] for i in own] if "frozen" in answers else []
        of = [right[i] for i in own]
        numbers[f"accuracy{suffix}"] = accuracy(of, part) if part else None
        # Over the classes that occur here: an answer of another class is a miss, and has no recall of its own.
        numbers[f"macro_f1{suffix}"] = macro_f1(of, part, set(of)) if part else None

    by_class = forgetting(right, answers["served"])
    swapped = swaps(served, order)
    names = [one.model_version for one in served if one.model_version != UNTAUGHT.model_version]
    versions = list(dict.fromkeys(name.partition(".")[0] for name in names))
    places = Counter((one.ref.topic, one.ref.partition, one.ref.offset) for one in run.predictions)
    return StreamReport(
        question=run.question,
        source=run.source,
        events=len(run.events),
        predictions=len(run.predictions),
        labels=len(run.labels),
        scored=len(scored),
        classes=len(set(right)),
        lost=len(set(run.events) - {one.event_id for one in served}),
        duplicated=sum(places.values()) - len(places),
        **numbers,
        forgetting=_mean(by_class.values()),
        forgetting_by_class=by_class,
        versions=len(versions),
        version_names=versions,
        revisions=len(set(names)),
        swaps=len(swapped),
        swapped=swapped,
        waves=list(run.waves),
        requested=len({one.event_id for one in run.requests}),
        requests_answered=answered(run.requests, run.labels),
        verdicts=list(run.verdicts),
        words=words(right, answers, numbers, len(own)),
        timeline=timeline(scored, right, answers, order),
    )


def first_predictions(predictions: Collection[Prediction]) -> list[Prediction]:
    """The first prediction of each event, by the time it was made and then by place, in that order."""
    found: dict[str, Prediction] = {}
    for one in sorted(
        predictions, key=lambda one: (one.predicted_at, one.ref.topic, one.ref.partition, one.ref.offset)
    ):
        found.setdefault(one.event_id, one)
    return list(found.values())


def standing_labels(labels: Collection[Arrived]) -> dict[str, str | None]:
    """The label of each event that stands at the end: the last by `labelled_at`, None where it was withdrawn."""
    standing: dict[str, str | None] = {}
    for one in sorted(labels, key=lambda one: (one.label.labelled_at, one.at)):
        standing[one.label.event_id] = one.label.label
    return standing


def answered(requests: Collection[LabelRequest], labels: Collection[Arrived]) -> int:
    """Of how many events a label was asked for and came afterwards, from anyone."""
    asked: dict[str, datetime] = {}
    for one in sorted(requests, key=lambda one: one.asked_at):
        asked.setdefault(one.event_id, one.asked_at)
    return len(
        {
            one.label.event_id
            for one in labels
            if one.label.label is not None and one.label.event_id in asked and one.at >= asked[one.label.event_id]
        }
    )


def naive_answers(scored: Sequence[Prediction], labels: Collection[Arrived]) -> dict[str, list[str | None]]:
    """What `no_change` and `majority` would have answered, each from the labels that had arrived by then.

    A repeat of a label is no new label, and an event's own label is never used to answer it.

    Args:
        scored: in the order in which they were made.
        labels: in any order.
    """
    arriving = sorted(labels, key=lambda one: (one.at, one.label.labelled_at))
    seen: set[tuple[str, str, datetime]] = set()
    standing: dict[str, Label] = {}
    counts: Counter[str] = Counter()
    last: list[tuple[str, str]] = []
    no_change: list[str | None] = []
    majority: list[str | None] = []
    place = 0
    for prediction in scored:
        while place < len(arriving) and arriving[place].at <= prediction.predicted_at:
            label = arriving[place].label
            place += 1
            identity = (label.event_id, label.labeller, label.labelled_at)
            if identity in seen:
                continue
            seen.add(identity)
            old = standing.get(label.event_id)
            if old is not None and old.labelled_at > label.labelled_at:
                continue
            if old is not None and old.label is not None:
                counts[old.label] -= 1
            standing[label.event_id] = label
            if label.label is not None:
                counts[label.label] += 1
                last = [*last[-1:], (label.event_id, label.label)]
        own = standing.get(prediction.event_id)
        others = counts if own is None or own.label is None else counts - Counter([own.label])
        majority.append(min(others, key=lambda name: (-others[name], name)) if others.total() else None)
        before = [name for event_id, name in last if event_id != prediction.event_id]
        no_change.append(before[-1] if before else None)
    return {"no_change": no_change, "majority": majority}


def frozen_answers(scored: Sequence[Prediction], frozen: Collection[Prediction]) -> list[str | None] | None:
    """What the frozen model answered, or None where there is none.

    Until the revision at which the twin is pinned was served, both are one and the same model, so the served
    answer counts for both: the twin must not know on the first wave's events what it learned from them. An
    event after that which the twin did not answer is one that it has wrong.
    """
    if not frozen:
        return None
    answers = {one.event_id: one.label for one in first_predictions(frozen)}
    pinned = max(_revision(one.model_version) for one in frozen)
    found: list[str | None] = []
    parted = False
    for one in scored:
        parted = parted or _revision(one.model_version) >= pinned
        found.append(answers.get(one.event_id) if parted else one.label)
    return found


def accuracy(truth: Sequence[str], answers: Sequence[str | None]) -> float | None:
    """Share of the answers that are right, or None where there is none."""
    return sum(a == b for a, b in zip(truth, answers, strict=True)) / len(truth) if truth else None


def macro_f1(
    truth: Sequence[str], answers: Sequence[str | None], classes: Collection[str] | None = None
) -> float | None:
    """Mean F1 over `classes`, by default those that occur or were answered; None where there is no answer."""
    if not truth:
        return None
    hits = Counter(a for a, b in zip(truth, answers, strict=True) if a == b)
    occurred, answered = Counter(truth), Counter(answer for answer in answers if answer is not None)
    counted = sorted({*occurred, *answered} if classes is None else classes)
    return sum(2 * hits[name] / max(1, occurred[name] + answered[name]) for name in counted) / len(counted)


def forgetting(truth: Sequence[str], answers: Sequence[str | None]) -> dict[str, float]:
    """How far each class fell below its best: see `StreamReport.forgetting_by_class`. Needs two blocks of a class."""
    right: dict[str, list[bool]] = {}
    for name, answer in zip(truth, answers, strict=True):
        right.setdefault(name, []).append(name == answer)
    fallen = {}
    for name, outcomes in sorted(right.items()):
        size = max(BLOCK, len(outcomes) // BLOCKS)
        # Blocks are cut from the end, so that the last one is whole; what is left over begins the record.
        blocks = [sum(outcomes[end - size : end]) / size for end in range(len(outcomes), size - 1, -size)]
        if len(blocks) >= 2:
            fallen[name] = round(max(0.0, max(blocks[1:]) - blocks[0]), 4)
    return fallen


def swaps(served: Sequence[Prediction], order: Mapping[str, int]) -> list[Swap]:
    """Every change of the answering version, as one worker makes them; the first version is no swap."""
    found: list[Swap] = []
    before: str | None = None
    for one in served:
        version = one.model_version.partition(".")[0]
        if one.model_version == UNTAUGHT.model_version:
            continue
        if before is not None and version != before:
            found.append(Swap(event=order.get(one.event_id, 0), version=version))
        before = version
    return found


def timeline(
    scored: Sequence[Prediction],
    truth: Sequence[str],
    answers: Mapping[str, Sequence[str | None]],
    order: Mapping[str, int],
) -> list[Point]:
    """Accuracy over the last `WINDOW` scored events, at `POINTS` events or fewer, evenly spread."""
    sums: dict[str, list[int]] = {}
    for whose, given in answers.items():
        sums[whose] = [0]
        for name, answer in zip(truth, given, strict=True):
            sums[whose].append(sums[whose][-1] + (name == answer))
    first = min(WINDOW // 4, len(scored))
    step = max(1, math.ceil((len(scored) - first) / POINTS))
    ends = sorted({*range(first, len(scored) + 1, step), len(scored)} - {0})
    points = []
    for end in ends:
        begin = max(0, end - WINDOW)
        share = {whose: round((total[end] - total[begin]) / (end - begin), 4) for whose, total in sums.items()}
        one = scored[end - 1]
        points.append(
            Point(
                event=order[one.event_id],
                observed_at=one.observed_at,
                served=share["served"],
                frozen=share.get("frozen"),
                no_change=share["no_change"],
                majority=share["majority"],
            )
        )
    return points


def words(
    truth: Sequence[str], answers: Mapping[str, Sequence[str | None]], numbers: Mapping[str, float | None], own: int
) -> list[str]:
    """What the numbers say, plainly: against each rival who was right more often, and whether chance explains it."""
    if not truth:
        return ["No event has both a prediction and a label, so there is nothing to say."]
    served = answers["served"]
    found = []
    for rival, name in RIVALS.items():
        if rival not in answers:
            continue
        other = answers[rival]
        differences = [(a == t) - (b == t) for t, a, b in zip(truth, served, other, strict=True)]
        gap, error = _paired(differences)
        ours, theirs = numbers["accuracy"], numbers[f"accuracy_{rival}"]
        against = f"{100 * (ours or 0):.1f} % of its answers right against {100 * (theirs or 0):.1f} %"
        spread = f"({100 * gap:+.1f} points, give or take {100 * 1.96 * error:.1f})"
        chance = "" if abs(gap) > 1.96 * error else ", though by no more than chance explains"
        if gap > 0:
            found.append(f"The served model beats {name}{chance}: {against} {spread}.")
        elif gap < 0:
            found.append(f"{_capital(name)} beats the served model{chance}, which has {against} {spread}.")
        else:
            found.append(f"The served model and {name} are even: {against} {spread}.")
        ours, theirs = numbers["macro_f1"] or 0.0, numbers[f"macro_f1_{rival}"] or 0.0
        if (ours - theirs) * gap < 0 and round(ours, 3) != round(theirs, 3):
            ahead, behind = ("the served model", name) if ours > theirs else (name, "the served model")
            found.append(
                f"By macro F1, which counts every class alike, it is the other way round: {ahead} is ahead of "
                f"{behind}, {max(ours, theirs):.3f} to {min(ours, theirs):.3f}."
            )
    on_own, beside = numbers["accuracy_frozen_on_its_own_classes"], numbers["accuracy_on_frozen_classes"]
    if on_own is not None and beside is not None and own < len(truth):
        found.append(
            f"On the {own} events of classes that the frozen model knows, it has {100 * on_own:.1f} % right and the "
            f"served model, which has more classes to choose from, {100 * beside:.1f} %."
        )
    return found


def verdict(streams: Mapping[str, StreamReport]) -> list[str]:
    """On which streams the served model was right most often, and which rival was where it was not."""
    won, found = [], []
    for name, stream in streams.items():
        if stream.accuracy is None:
            continue
        rivals = {rival: getattr(stream, f"accuracy_{rival}") for rival in RIVALS}
        ahead = [RIVALS[rival] for rival, share in rivals.items() if share is not None and share > stream.accuracy]
        if ahead:
            were = "was" if len(ahead) == 1 else "were"
            found.append(f"On {name}, {' and '.join(ahead)} {were} right more often than the served model.")
        else:
            won.append(name)
    if won:
        found.insert(0, f"On {' and '.join(won)}, no rival was right more often than the served model.")
    return found


def write_report(report: DemoReport, folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into a folder, which is made where it is missing; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "report.json", folder / "report.html"
    data.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    page.write_text(render(report), encoding="utf-8")
    return data, page


def render(report: DemoReport) -> str:
    """The report as one page that needs nothing else: no network, no script; light or dark as the screen is."""
    streams = "".join(_section(name, stream) for name, stream in report.streams.items())
    events = sum(stream.events for stream in report.streams.values())
    labels = sum(stream.labels for stream in report.streams.values())
    tiles = {
        "events": f"{events:,}",
        "labels": f"{labels:,}",
        "lost": f"{report.lost:,}",
        "duplicated": f"{report.duplicated:,}",
        "dead letters": f"{report.dead_letters:,}",
        "seconds": f"{report.seconds:,.0f}",
    }
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>trimtab demo report</title><style>{_STYLE}</style></head><body><main>"
        "<h1>What learning bought</h1>"
        f'<p class="lead">Every number comes from what was consumed from the predictions and labels topics, on '
        f"{html.escape(report.broker)}. Each event counts with the first answer given to it, before its label was "
        f'known.</p><div class="tiles">{shown}</div><p>{html.escape(" ".join(report.words))}</p>{streams}'
        f"<footer>Made {report.generated_at:%Y-%m-%d %H:%M} UTC. The same numbers are in report.json.</footer>"
        "</main></body></html>\n"
    )


_SERIES = {
    "served": ("served model", ""),
    "frozen": ("frozen after the first wave", "7 4"),
    "no_change": ("no change", "2 4"),
    "majority": ("majority class", "10 3 2 3"),
}

_STYLE = """
:root{--paper:#fff;--ink:#1b1f24;--soft:#5b6470;--rule:#d9dee4;--tile:#f4f6f8;
--served:#0b5fd6;--frozen:#c2570c;--no_change:#0f7f6b;--majority:#7a7f87;--swap:#8a3ffc;--bar:#c2570c}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e8ebee;--soft:#9aa4af;--rule:#333a42;--tile:#1d2228;
--served:#6aa8ff;--frozen:#ff9d57;--no_change:#4fd1b5;--majority:#a5acb5;--swap:#c19bff;--bar:#ff9d57}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:980px;margin:0 auto;padding:32px 20px 48px}h1{font-size:1.9rem;margin:0 0 .3em}
h2{font-size:1.35rem;margin:2.4em 0 .1em}h3{font-size:1rem;margin:1.6em 0 .3em}p{margin:.4em 0}
.lead,.note,footer{color:var(--soft)}.note{font-size:.86rem}footer{margin-top:3em;font-size:.86rem}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:1.2em 0}
.tiles div{background:var(--tile);border-radius:8px;padding:10px 16px;min-width:104px}
.tiles b{display:block;font-size:1.25rem}.tiles span{color:var(--soft);font-size:.86rem}
ul{margin:.6em 0;padding-left:1.2em}svg{width:100%;height:auto;display:block;margin:.4em 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6em 0}
th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:var(--soft)}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:1.8}.line.served{stroke-width:2.8}
.served{stroke:var(--served)}.frozen{stroke:var(--frozen)}.no_change{stroke:var(--no_change)}
.majority{stroke:var(--majority)}.swap{stroke:var(--swap);stroke-width:1.5}
.wave{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:2 4}
svg text.swapped{fill:var(--swap)}.bar{fill:var(--bar)}
.key{display:inline-flex;align-items:center;gap:6px;margin-right:18px;font-size:.9rem}.key svg{width:34px;margin:0}
"""


def _section(name: str, stream: StreamReport) -> str:
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in stream.words)
    counts = (
        f"{stream.events:,} events, {stream.predictions:,} predictions, {stream.labels:,} label messages, "
        f"{stream.scored:,} events scored, {stream.classes} classes. {_count(stream.versions, 'version')} and "
        f"{_count(stream.revisions, 'revision')} answered, with {_count(stream.swaps, 'swap')}. "
        f"{stream.lost:,} lost, {stream.duplicated:,} duplicated. "
        f"{_count(stream.requested, 'label')} asked for, {stream.requests_answered:,} of these answered."
    )
    return (
        f"<section><h2>{html.escape(name)}</h2><p>{html.escape(stream.question)}</p><ul>{said}</ul>"
        f"<h3>Accuracy over the last {WINDOW} scored events</h3>{_legend(stream)}{_curves(name, stream)}"
        f"{_table(stream)}<p class='note'>{counts}</p>"
        f"<h3>Forgetting by class</h3>{_forgetting(name, stream)}"
        f"<h3>Verdicts of the exams</h3>{_verdicts(stream)}"
        f"<p class='note'>{html.escape(stream.source)}</p></section>"
    )


def _drawn(stream: StreamReport) -> list[str]:
    return [key for key in _SERIES if key != "frozen" or stream.accuracy_frozen is not None]


def _legend(stream: StreamReport) -> str:
    keys = "".join(
        f"<span class='key'><svg viewBox='0 0 34 8' aria-hidden='true'>"
        f"<line class='line {key}' x1='1' x2='33' y1='4' y2='4' stroke-dasharray='{_SERIES[key][1]}'/></svg>"
        f"{_SERIES[key][0]}</span>"
        for key in _drawn(stream)
    )
    if stream.swapped:
        line = "<line class='swap' x1='17' x2='17' y1='0' y2='8'/>"
        keys += f"<span class='key'><svg viewBox='0 0 34 8' aria-hidden='true'>{line}</svg>swap</span>"
    if len(stream.waves) > 1:
        line = "<line class='wave' x1='17' x2='17' y1='0' y2='8'/>"
        keys += f"<span class='key'><svg viewBox='0 0 34 8' aria-hidden='true'>{line}</svg>new classes</span>"
    return f"<p>{keys}</p>"


def _curves(name: str, stream: StreamReport) -> str:
    """Accuracy against the number of events, as an SVG of 940 x 340."""
    if len(stream.timeline) < 2:
        return "<p class='note'>There are too few scored events for a curve.</p>"
    left, right, top, bottom = 44, 926, 22, 300
    last = max(stream.events, 1)

    def x(event: float) -> float:
        return round(left + (right - left) * event / last, 1)

    def y(share: float) -> float:
        return round(bottom - (bottom - top) * share, 1)

    parts = [f"<title>Accuracy of the served model and its rivals on {html.escape(name)}</title>"]
    for tenth in range(0, 11, 2):
        height = y(tenth / 10)
        parts.append(f"<line class='grid' x1='{left}' x2='{right}' y1='{height}' y2='{height}'/>")
        parts.append(f"<text x='{left - 8}' y='{height + 4}' text-anchor='end'>{tenth * 10} %</text>")
    for tick in _ticks(last):
        anchor = "end" if x(tick) > right - 20 else "middle"
        parts.append(f"<text x='{x(tick)}' y='{bottom + 18}' text-anchor='{anchor}'>{tick:,}</text>")
    first, end = stream.timeline[0].observed_at, stream.timeline[-1].observed_at
    span = f" ({first:%Y-%m-%d} to {end:%Y-%m-%d})" if (end - first).days > 1 else ""
    parts.append(f"<text x='{right}' y='{bottom + 36}' text-anchor='end'>events{span}</text>")
    for wave in stream.waves[1:]:
        parts.append(f"<line class='wave' x1='{x(wave)}' x2='{x(wave)}' y1='{top}' y2='{bottom}'/>")
    for swap in stream.swapped:
        parts.append(
            f"<g><title>{html.escape(swap.version)} from event {swap.event:,} on</title>"
            f"<line class='swap' x1='{x(swap.event)}' x2='{x(swap.event)}' y1='{top}' y2='{bottom}'/>"
            f"<text class='swapped' x='{x(swap.event)}' y='{top - 7}' text-anchor='middle'>"
            f"{html.escape(swap.version)}</text></g>"
        )
    for key in reversed(_drawn(stream)):
        points = [(one.event, getattr(one, key)) for one in stream.timeline if getattr(one, key) is not None]
        path = " ".join(f"{x(event)},{y(share)}" for event, share in points)
        title = f"<title>{_SERIES[key][0]}: {100 * points[-1][1]:.1f} % at the end</title>"
        parts.append(
            f"<polyline class='line {key}' stroke-dasharray='{_SERIES[key][1]}' points='{path}'>{title}</polyline>"
        )
    return f"<svg viewBox='0 0 940 342' role='img'>{''.join(parts)}</svg>"


def _ticks(last: int) -> list[int]:
    rough = last / 6
    unit = 10 ** max(0, math.floor(math.log10(max(rough, 1))))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    return list(range(0, last + 1, step))


def _table(stream: StreamReport) -> str:
    rows = [
        ("served model", stream.accuracy, stream.macro_f1),
        ("frozen after the first wave", stream.accuracy_frozen, stream.macro_f1_frozen),
        ("no change: the last label that had arrived", stream.accuracy_no_change, stream.macro_f1_no_change),
        (
            "no change, were each label there at once",
            stream.accuracy_no_change_at_once,
            stream.macro_f1_no_change_at_once,
        ),
        ("majority of the labels that had arrived", stream.accuracy_majority, stream.macro_f1_majority),
    ]
    if stream.accuracy_frozen_on_its_own_classes != stream.accuracy_frozen:
        rows += [
            (
                "frozen, on the classes it knows",
                stream.accuracy_frozen_on_its_own_classes,
                stream.macro_f1_frozen_on_its_own_classes,
            ),
            (
                "served model, on those same events",
                stream.accuracy_on_frozen_classes,
                stream.macro_f1_on_frozen_classes,
            ),
        ]
    body = "".join(
        f"<tr><td>{name}</td><td>{100 * share:.1f} %</td><td>{f1:.3f}</td></tr>"
        for name, share, f1 in rows
        if share is not None and f1 is not None
    )
    head = "<tr><th>over all scored events</th><th>accuracy</th><th>macro F1</th></tr>"
    return f"<div class='scroll'><table>{head}{body}</table></div>"


def _forgetting(name: str, stream: StreamReport) -> str:
    """A bar for each of the classes that fell furthest below their best."""
    if not stream.forgetting_by_class:
        return f"<p class='note'>No class has the {2 * BLOCK} scored events that a comparison needs.</p>"
    worst = sorted(stream.forgetting_by_class.items(), key=lambda item: (-item[1], item[0]))
    fallen = [(label, fall) for label, fall in worst if fall > 0][:SHOWN_CLASSES]
    note = (
        f"<p class='note'>Recall in a class's best earlier block of {BLOCK} events or more, less that in its last. "
        f"Over all {_count(len(worst), 'class', 'classes')} with enough events its mean is "
        f"{stream.forgetting or 0:.3f}; "
        f"{len(worst) - sum(fall > 0 for _, fall in worst)} did not fall at all. The best of several blocks is high by "
        "chance too, so small bars mean little.</p>"
    )
    row, left, wide = 20, 230, 640
    parts = [f"<title>Forgetting by class on {html.escape(name)}</title>"]
    for number, (label, fall) in enumerate(fallen):
        middle = number * row + 14
        shown = label if len(label) <= 30 else f"{label[:29]}…"
        parts.append(f"<text x='{left - 8}' y='{middle}' text-anchor='end'>{html.escape(shown)}</text>")
        parts.append(
            f"<rect class='bar' x='{left}' y='{middle - 11}' width='{max(1.0, wide * fall):.1f}' height='13' rx='2'/>"
        )
        parts.append(f"<text x='{left + wide * fall + 6:.1f}' y='{middle}'>{fall:.2f}</text>")
    chart = f"<svg viewBox='0 0 940 {len(fallen) * row + 6}' role='img'>{''.join(parts)}</svg>" if fallen else ""
    return chart + note


def _verdicts(stream: StreamReport) -> str:
    """A row for each fine-tuned version that was examined."""
    if not stream.verdicts:
        return "<p class='note'>No fine-tune came to its exam; what moved is the head alone.</p>"
    heads = ("version", "verdict", "examples", "in service", "candidate", "worse", "judged", "not judged")
    body = ""
    for one in stream.verdicts:
        cells = (
            f"{one.examples:,}",
            f"{100 * one.champion_accuracy:.1f} %",
            f"{100 * one.candidate_accuracy:.1f} %",
            _count(len(one.worse), "class", "classes"),
            _count(one.judged, "class", "classes"),
            _count(one.unjudged, "class", "classes"),
        )
        body += f"<tr><td>{html.escape(one.version)}</td><td>{'passed' if one.passed else 'refused'}</td>"
        body += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th>{name}</th>" for name in heads)
    why = "".join(f"<li>{html.escape(f'{one.version}: ' + '; '.join(one.reasons))}</li>" for one in stream.verdicts)
    return (
        f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div><ul>{why}</ul>"
        "<p class='note'>These are the learner's own words: the exam asks a candidate and the version in service the "
        "same examples, which neither was taught. A class with too few of them is not judged.</p>"
    )


def _paired(differences: Sequence[int]) -> tuple[float, float]:
    """Mean of paired differences and its standard error, taking the events as independent."""
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / max(1, n - 1)
    return mean, math.sqrt(variance / n)


def _revision(name: str) -> tuple[int, int]:
    """`v12.3456` as numbers that can be compared."""
    version, _, revision = name.removeprefix("v").partition(".")
    return int(version) if version.isdecimal() else 0, int(revision) if revision.isdecimal() else 0


def _mean(values: Collection[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
