"""What the stream room needs of a model, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from stream.events import Event


@dataclass(frozen=True, slots=True)
class Answer:
    """One event's answer by one revision.

    Args:
        label: the most probable class, or None while the stream has learned none.
        probabilities: (class, probability) pairs of the most probable classes, best first.
        novelty: 0 (like what was learned) to 1 (like nothing that was learned).
        model_version: the revision that answered, such as `v12.3456`.
    """

    label: str | None
    probabilities: tuple[tuple[str, float], ...]
    novelty: float
    model_version: str


UNTAUGHT = Answer(label=None, probabilities=(), novelty=1.0, model_version="v0.0")
"""The answer of a stream that no version was ever announced for."""


class Model(Protocol):
    """A reference to whatever revision is in service, for every stream."""

    def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
        """Answer `events` of one stream, in order, all by one and the same revision.

        The revision is read once at the call, so a swap during the call changes nothing in it.
        May raise anything when an event makes the network itself fail.
        """
        ...

    def predict_all(self, parts: Mapping[str, Sequence[Event]]) -> Mapping[str, list[Answer]]:
        """As `predict`, for the events of several streams at once; a model may be cheaper for being asked so."""
        return {stream: self.predict(stream, events) for stream, events in parts.items()}

    def announce(self, key: bytes, value: bytes | None) -> None:
        """Take one message of the `model-versions` topic; old, foreign or broken ones change nothing."""
        ...

    def catching_up(self) -> AbstractContextManager[object]:
        """Around the announcements of the past: only what is the newest at the end need be loaded."""
        ...

    def close(self) -> None:
        """Let go of threads and weights."""
        ...
