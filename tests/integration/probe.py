"""A telemetry stream small enough that a whole deployment learns it in seconds."""

from __future__ import annotations

import math
import signal
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from learner.heads import HeadSums
from learner.registry import Registry
from replay.store import LearnerStore
from stream.events import Telemetry, utc_now
from tests.deployment import Deployment
from tests.kafka import KafkaBroker
from tests.waiting import until

DIMENSION = 32
STREAM: dict[str, Any] = {
    "kind": "telemetry",
    "encoder": {"channels": ["x", "y"], "window": 32, "dimension": DIMENSION, "learned": 8},
    "finetune": {"epochs": 1, "batch_size": 16, "frozen_layers": 0, "training": "full", "threads": 1},
    "triggers": {},
}
FREQUENCIES = {"slow": 1.0, "middle": 3.0, "fast": 6.0}


def window(stream: str, name: str, number: int, observed_at: datetime | None = None) -> Telemetry:
    """An event of a class that can be told by its frequency; its id is `name-number`. It is of now, unless told."""
    phase, frequency = 0.37 * number, FREQUENCIES[name]
    wave: list[float | None] = [math.sin(phase + frequency * t / 3) for t in range(32)]
    other: list[float | None] = [math.cos(phase * 2 + t / 5) + 0.01 * number for t in range(32)]
    return Telemetry(
        event_id=f"{name}-{number}",
        stream=stream,
        observed_at=observed_at or utc_now(),
        channels=["x", "y"],
        values=[wave, other],
    )


@contextmanager
def deployed(
    kafka: KafkaBroker,
    directory: Path,
    streams: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Deployment]:
    """A deployment on topics of its own, for a test or for all tests of a module."""
    made = Deployment(kafka, f"t{uuid.uuid4().hex[:8]}-", directory, streams, overrides)
    try:
        yield made
    finally:
        made.stop()


def publish(deployment: Deployment, events: Iterable[Telemetry]) -> list[str]:
    """Publish events and wait until every one of them is answered; returns their ids."""
    events = list(events)
    deployment.publish(*events)
    ids = [event.event_id for event in events]
    until(lambda: set(ids) <= set(deployment.answered()), every=0.3)
    return ids


def end(process: subprocess.Popen[bytes]) -> int:
    """End a process in good order; returns its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    return process.wait(120)


def logged(deployment: Deployment, process: str) -> str:
    """What all processes of this command logged."""
    return (deployment.directory / f"{process}.log").read_text()


@contextmanager
def store_of(deployment: Deployment) -> Iterator[LearnerStore]:
    """The learner's database, to read."""
    store = LearnerStore(deployment.store_url)
    try:
        yield store
    finally:
        store.close()


def check_head(deployment: Deployment, stream: str, final: Mapping[str, str]) -> None:
    """The store's examples are the final labels, and the ledger adds up to the head of those alone, to the bit.

    Args:
        final: by event id, the label that counts in the end.
    """
    with store_of(deployment) as store:
        examples = store.examples(stream)
        assert {row.event_id: row.label for row in examples} == dict(final)
        encoder = store.encoder(stream)
        assert encoder is not None
        ledger = store.follow_ledger(stream, encoder)
    bound = Registry(str(deployment.directory / "registry")).encoder(encoder)[0].bound
    followed, wanted = HeadSums(DIMENSION, bound), HeadSums(DIMENSION, bound)
    followed.add(*ledger.added)
    followed.subtract(*ledger.removed)
    taught = [row for row in examples if not row.exam]
    if taught:
        wanted.add(np.stack([row.embedding for row in taught]), [final[row.event_id] for row in taught])
    assert followed == wanted
