"""Forgetting events on request: done wherever it can be, and said of wherever it cannot.

A label that is withdrawn or corrected is unlearned by the joiner, in the step that reads it, and the event may be
labelled again. To forget is more: the event itself goes, from every table, and does not come back. In order::

    ledger followed to its end ▸ one transaction: rows deleted, sums without it kept, versions marked, tombstone
    ▸ a fine-tune that reads it is stopped ▸ a head without it is announced ▸ the write-ahead log is let go of

Killed after the transaction, the next learner starts from sums without it and sweeps what fine-tunes left; killed
before, nothing happened.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from learner.online import OnlineLearner
from learner.trainer import Cleared, Trainer
from replay.store import Forgotten, LearnerStore
from replay.traces import digest

PLACES = {
    "examples": "replay store and exam",
    "labels": "labels",
    "ledger": "ledger",
    "quarantine": "quarantine",
    "requests": "label requests",
    "scores": "scores",
    "served": "join index",
}
"""What people call a table; one that is not here is called by its own name."""


@dataclass(frozen=True)
class Erasure:
    """What became of a request to forget; no event id is in it, so that it can be kept.

    Args:
        message: one sentence.
        cleaned: every place that was looked through, and what was taken from it.
        not_reached: every place that may still hold something, until when, and what to do about it.
    """

    message: str
    cleaned: tuple[str, ...]
    not_reached: tuple[str, ...]


def forget(
    event_ids: Collection[str], learner: OnlineLearner, trainer: Trainer, store: LearnerStore, now: datetime
) -> Erasure:
    """Forget events of the learner's stream; on the learners' thread. A second time it finds nothing, and says so."""
    stream = learner.plan.name
    found = learner.forget(event_ids, now)
    cleared = trainer.forget(stream, event_ids, trained=bool(found.versions))
    announced = learner.announce(now) if found.labels else False
    shed = store.shed_deleted()
    marks = ", ".join(digest(stream, event_id)[:16] for event_id in sorted(set(event_ids)))
    what = "nothing was known of it" if not any(found.rows.values()) else f"{sum(found.rows.values())} rows deleted"
    if found.before:
        what += f", {found.before} forgotten before"
    return Erasure(
        f"{_count(len(set(event_ids)), 'event is', 'events are')} forgotten ({marks}): {what}",
        tuple(_cleaned(found, cleared, learner, announced, store.erases)),
        tuple(_not_reached(found, learner, announced, store, shed)),
    )


def _cleaned(found: Forgotten, cleared: Cleared, learner: OnlineLearner, announced: bool, erases: bool) -> list[str]:
    lines = [f"{PLACES.get(table, table)}: {_count(rows, 'row', 'rows')}" for table, rows in found.rows.items()]
    lines.append(
        f"instant head: {_count(len(found.labels), 'label', 'labels')} subtracted, exactly"
        + (f"; {learner.serving.name} answers without" if announced else "")
    )
    lines.append(
        f"fine-tunes: run {cleared.stopped} trained on it and is stopped, another is begun"
        if cleared.stopped is not None
        else "fine-tunes: none that runs has it; ended ones leave no snapshot"
    )
    if cleared.state:
        lines.append("strategy's state: dropped, because a version was trained on it")
    if erases:
        lines.append("free space of the database: overwritten with zeros")
    lines.append("tombstone: set; what comes of it later is refused")
    return lines


def _not_reached(
    found: Forgotten, learner: OnlineLearner, announced: bool, store: LearnerStore, shed: bool
) -> list[str]:
    stream = learner.plan.name
    topics = "the event's topic, labels, predictions, dead-letters, label-requests and control"
    lines = [
        f"log: {topics}, each until its retention ends; and whoever has read them",
        "backups of the database and of the registry: forget it again after a restore",
        "heads of earlier revisions, solved with it: in the registry until `trimtab versions prune` removes them",
    ]
    if found.versions:
        names = ", ".join(f"v{number}" for number in sorted(found.versions))
        free = [v.number for v in store.versions(stream) if not v.detail.get("forgotten")]
        lines.append(
            f"encoder weights of {names}, trained on it: marked as not rebuildable"
            + (
                f"; to be rid of them, `trimtab versions rollback {stream} v{max(free)}` and `trimtab retrain {stream}`"
                if free
                else ""
            )
        )
    if found.fixed:
        lines.append(
            f"instant head: the share of {_count(found.fixed, 'event', 'events')} learned before the ledger's "
            "retention cannot be told apart; it leaves with the next change of encoder"
        )
    if found.labels and not announced:
        why = "learning is paused; resume it" if learner.paused else "; ".join(learner.held) or "nothing newer is there"
        lines.append(f"{learner.serving.name}, which was solved with it, still answers: {why}")
    if not store.erases:
        lines.append("dead rows, write-ahead log and replicas of the database: until it is vacuumed, and they expire")
    elif not shed:
        lines.append("write-ahead log of the database: a reader needed it just now; it goes with the next checkpoint")
    return lines


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
