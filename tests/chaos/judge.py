"""What came of it: the driver's file against the log, the learner's database and the registry.

`trimtab audit` is asked as a user asks it, in a process of its own. It knows nothing of the driver, so what the driver
remembers is held against the log once more here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from learner.heads import HeadSums, solve
from learner.registry import Registry
from replay.store import Example, LearnerStore
from stream.events import Prediction
from tests.chaos.driver import STREAM
from tests.chaos.field import Field
from tests.deployment import REPOSITORY

MEASURED = ("temperature", "usual")
"""What a head has from how it did on left-out labels, when it was measured last, and not from the labels' sums."""

Spot = tuple[int, int]
"""Partition and offset."""


@dataclass
class Verdict:
    """What is wrong, in numbers, and what was looked at.

    Args:
        events: places that the driver filled, bad messages among them.
        lost: of them, those with neither a prediction nor a dead letter.
        duplicated: answers beyond one for each place.
        labels: label messages that were sent.
        labels_lost: events of which something else is learned than their final label says.
        head_differs: 1 where the instant head is not the one that the final labels alone make.
        audit: what `trimtab audit --json` said.
        audit_code: its exit code.
        notes: sentences for a person.
    """

    events: int = 0
    lost: int = 0
    duplicated: int = 0
    labels: int = 0
    labels_lost: int = 0
    head_differs: int = 0
    audit: dict[str, Any] = field(default_factory=dict)
    audit_code: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sent:
    """What the driver's file says."""

    places: set[Spot]
    labels: int
    final: Mapping[str, str]


def read_journal(field: Field) -> Sent:
    """The driver's file, with the label that counts in the end for each event."""
    places: set[Spot] = set()
    said: dict[str, tuple[tuple[Any, ...], str | None]] = {}
    labels = 0
    lines = [json.loads(line) for line in field.journal.read_text().splitlines()]
    assert lines[-1] == {"kind": "end", "left": 0, "failed": []}, lines[-1]
    for line in lines:
        if line["kind"] in ("event", "bad"):
            places.add((line["partition"], line["offset"]))
        elif line["kind"] == "label":
            labels += 1
            rank = (line["at"], line["offset"])
            if line["event_id"] not in said or said[line["event_id"]][0] <= rank:
                said[line["event_id"]] = rank, line["label"]
    final = {event_id: label for event_id, (_, label) in said.items() if label is not None}
    return Sent(places, labels, final)


def judge(field: Field) -> Verdict:
    """Look at everything, once nothing runs but the broker."""
    sent, verdict = read_journal(field), Verdict()
    _judge_answers(field, sent, verdict)
    _judge_learning(field, sent, verdict)
    command = [sys.executable, "-m", "deploy.cli", "audit", "--json", "--config", str(field.deployment.settings)]
    asked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    verdict.audit_code = asked.returncode
    verdict.audit = json.loads(asked.stdout) if asked.stdout.startswith("{") else {"breaches": [asked.stderr[-2000:]]}
    return verdict


def _judge_answers(field: Field, sent: Sent, verdict: Verdict) -> None:
    answers: Counter[Spot] = Counter()
    for record in field.deployment.records("predictions"):
        prediction = Prediction.model_validate_json(record.value or b"")
        if prediction.supersedes is None:
            answers[prediction.ref.partition, prediction.ref.offset] += 1
    telemetry = field.deployment.topics.name("telemetry").encode()
    for record in field.deployment.records("dead_letters"):
        headers = dict(record.headers)
        if headers["trimtab-topic"] == telemetry:
            answers[int(headers["trimtab-partition"]), int(headers["trimtab-offset"])] += 1
    verdict.events = len(sent.places)
    lost = sorted(place for place in sent.places if not answers[place])
    verdict.lost = len(lost)
    verdict.duplicated = sum(count - 1 for count in answers.values() if count > 1)
    if lost:
        verdict.notes.append(f"places without an answer, partition and offset: {lost[:5]}")
    if strange := sorted(place for place in answers if place not in sent.places):
        verdict.lost += len(strange)
        verdict.notes.append(f"answers to what was never sent: {strange[:5]}")


def _judge_learning(field: Field, sent: Sent, verdict: Verdict) -> None:
    store = LearnerStore(f"sqlite:///{field.directory}/learner.db")
    try:
        examples = store.examples(STREAM)
        encoder = store.encoder(STREAM)
        assert encoder is not None
        ledger = [store.follow_ledger(STREAM, encoder)]
        while len(ledger[-1]):
            ledger.append(store.follow_ledger(STREAM, encoder, ledger[-1].seq))
        reign = store.champion(STREAM)
        assert reign is not None
        last = store.revisions(STREAM, version=reign.version, limit=1)[0]
    finally:
        store.close()
    learned = {row.event_id: row.label for row in examples}
    wrong = sorted(e for e in learned.keys() | sent.final.keys() if learned.get(e) != sent.final.get(e))
    verdict.labels, verdict.labels_lost = sent.labels, len(wrong)
    if wrong:
        told = [f"{e}: learned {learned.get(e)}, to be {sent.final.get(e)}" for e in wrong[:5]]
        verdict.notes.append(f"labels learned otherwise than they were given: {'; '.join(told)}")

    registry = Registry(str(field.directory / "registry"))
    wanted = _sums(examples, sent.final, registry.encoder(encoder)[0].bound)
    followed = HeadSums(wanted.dimension, wanted.bound)
    for rows in ledger:
        if len(rows):
            followed.add(*rows.added)
            followed.subtract(*rows.removed)
    if followed != wanted:
        verdict.head_differs = 1
        verdict.notes.append("what the ledger adds up to is not what the final labels make")
    if field.held:
        verdict.notes.append(f"the guard holds the last revision, so what is served was not compared: {field.held}")
        return
    head, served = solve(wanted), registry.head(last.head) if last.head else {}
    made = head.tensors() if head is not None else {}
    for measured in MEASURED:
        made.pop(measured, None)
        served.pop(measured, None)
    if made.keys() != served.keys() or not all(np.array_equal(made[name], served[name]) for name in made):
        verdict.head_differs = 1
        verdict.notes.append(f"v{last.version}.{last.revision} is not the head that the final labels alone make")


def _sums(examples: list[Example], final: Mapping[str, str], bound: float) -> HeadSums:
    """The head's sums from the final labels and nothing else; examples of the exam teach no head."""
    taught = [row for row in examples if not row.exam and row.event_id in final]
    sums = HeadSums(taught[0].embedding.shape[0], bound)
    sums.add(np.stack([row.embedding for row in taught]), [final[row.event_id] for row in taught])
    return sums
