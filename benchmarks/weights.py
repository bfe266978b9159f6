"""Versions and revisions of a small telemetry stream, made as fast as a disk takes them: what is swapped and announced.

Every seed gives an encoder and a head of other bytes; two dimensions give two architectures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from learner.encoders import Encoder, build_telemetry_encoder, payload
from learner.heads import HeadSums, LinearHead, quantise, solve
from learner.registry import Pointer, Registry, VersionManifest
from stream.events import Telemetry, utc_now

CHANNELS = ("x", "y")
STEPS = 32
DIMENSIONS = (32, 64)
CLASSES = {"slow": 1.0, "middle": 3.0, "fast": 6.0}
TAUGHT = 20
"""Windows of each class that a head is solved from."""


def window(stream: str, event_id: str, number: int) -> Telemetry:
    """A window of one of three classes, `number` modulo 3 by frequency; alike for alike numbers."""
    phase, frequency = 0.37 * number, list(CLASSES.values())[number % len(CLASSES)]
    wave: list[float | None] = [math.sin(phase + frequency * t / 3) for t in range(STEPS)]
    other: list[float | None] = [math.cos(phase * 2 + t / 5) for t in range(STEPS)]
    return Telemetry(
        event_id=event_id, stream=stream, observed_at=utc_now(), channels=list(CHANNELS), values=[wave, other]
    )


@dataclass(frozen=True)
class Made:
    """A version in a registry."""

    name: str
    encoder: str
    head: str


class Maker:
    """Puts versions and revisions into a registry, and says how they are announced.

    Args:
        registry: where to.
        stream: whose.
        epoch: of the announcements.
    """

    def __init__(self, registry: Registry, stream: str, epoch: int = 1) -> None:
        self.registry, self.stream, self._epoch = registry, stream, epoch
        self._sequence = 0
        self._taught = [window(stream, f"taught-{n}", n) for n in range(TAUGHT * len(CLASSES))]
        self._labels = [list(CLASSES)[n % len(CLASSES)] for n in range(len(self._taught))]

    def version(self, seed: int, dimension: int, parent: str | None = None) -> Made:
        """A whole version: an encoder drawn from `seed`, a head that fits it, a manifest."""
        encoder = build_telemetry_encoder(CHANNELS, seed, window=STEPS, dimension=dimension, learned=8)
        spec = encoder.sealed()
        digest = self.registry.put_encoder(spec, encoder.files())
        head = self.head(encoder, 0)
        manifest = VersionManifest(
            stream=self.stream,
            parent=parent,
            created_at=utc_now(),
            encoder=spec,
            head=head,
            classes=tuple(CLASSES),
        )
        return Made(self.registry.commit(manifest), digest, head)

    def head(self, encoder: Encoder, number: int) -> str:
        """The digest of a head over this encoder; every number is taught a little otherwise, so has other bytes."""
        chosen = [n for n in range(len(self._taught)) if (n * 31 + number) % 7]
        embeddings = encoder.embed([payload(self._taught[n], CHANNELS) for n in chosen])
        chance = np.random.default_rng(number)
        embeddings = embeddings + chance.normal(0, 1e-3, embeddings.shape).astype(embeddings.dtype)
        sums = HeadSums(encoder.spec.dimension, encoder.spec.bound)
        sums.add(quantise(embeddings, encoder.spec.bound), [self._labels[n] for n in chosen])
        solved = solve(sums)
        assert isinstance(solved, LinearHead)
        return self.registry.put_head(solved.tensors())

    def pointer(self, version: str, encoder: str, head: str, revision: int = 0) -> Pointer:
        """The next announcement of the stream."""
        self._sequence += 1
        return Pointer(
            kind="revision" if revision else "champion",
            stream=self.stream,
            version=version,
            revision=revision,
            encoder=encoder,
            head=head,
            epoch=self._epoch,
            sequence=self._sequence,
            announced_at=utc_now(),
        )


def announcements(made: Made, maker: Maker, count: int) -> Iterator[tuple[bytes, bytes]]:
    """`count` revisions of one version in a row, all of the same weights, as (key, value)."""
    for number in range(count):
        pointer = maker.pointer(made.name, made.encoder, made.head, number)
        yield pointer.key, pointer.encode()
