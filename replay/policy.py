"""Who stays in the replay store: pure functions of the set of labelled examples.

Membership depends on which examples there are, never on the order in which they came, so a label that
is late, repeated or corrected leaves the same store as one that came at once. Chance comes from a hash
of the event id, not from a random number generator: each example draws its priority once and for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

Policy = Literal["reservoir", "class_balanced", "window", "herding"]


class ReplaySettings(BaseModel):
    """How many examples of a stream are kept to train on, and which."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Policy = Field(
        default="class_balanced",
        description="reservoir: a uniform sample; class_balanced: as even over the classes as they allow; "
        "window: the newest; herding: per class, those whose mean is nearest the class's",
    )
    size: int = Field(default=2_000, ge=1, description="how many examples are kept")
    seed: int = Field(default=0, ge=0, description="another seed keeps another sample")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One labelled example that may stay. `embedding` (d,) is needed by herding only."""

    event_id: str
    label: str
    priority: int
    observed_at: datetime
    embedding: npt.NDArray[Any] | None = None


def priority(seed: int, stream: str, event_id: str) -> int:
    """The event's draw, uniform over 63 bits: the smaller, the sooner it is kept."""
    return draw(f"replay\x00{seed}\x00{stream}\x00{event_id}")


def eligible(seed: int, stream: str, event_id: str, one_in: int) -> bool:
    """Whether the event may ever be given to the exam: one in `one_in` may, whatever its label."""
    return draw(f"exam\x00{seed}\x00{stream}\x00{event_id}") % one_in == 0


def draw(text: str) -> int:
    """63 bits of blake2b: they fit a database's signed integer."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def quotas(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """Fill the classes evenly, like water: a class that has fewer than its share gives the rest away.

    Where the share does not divide evenly, the places left over go to the names that sort first.
    """
    left = size
    filled: dict[str, int] = {}
    waiting = sorted((count, name) for name, count in counts.items() if count > 0)
    for index, (count, name) in enumerate(waiting):
        share = left // (len(waiting) - index)
        if count > share:
            level, extra = divmod(left, len(waiting) - index)
            rest = sorted(name for _, name in waiting[index:])
            # Every class left has more than `level`, so one more is always there to take.
            filled.update({name: level + (place < extra) for place, name in enumerate(rest)})
            break
        filled[name] = count
        left -= count
    return filled


def select(settings: ReplaySettings, candidates: Iterable[Candidate]) -> frozenset[str]:
    """The event ids that stay, at most `settings.size`, whatever the order of `candidates`.

    - reservoir: a uniform sample without replacement, as the smallest priorities.
    - class_balanced: `quotas`, and the smallest priorities within each class.
    - window: the newest by `observed_at`.
    - herding: `quotas`, and within each class the greedy choice whose running mean stays nearest the
      class mean (Rebuffi et al., iCaRL, CVPR 2017, algorithm 4).

    Raises:
        ValueError: herding over a candidate without an embedding.
    """
    pool = sorted(candidates, key=lambda candidate: (candidate.priority, candidate.event_id))
    if len(pool) <= settings.size:
        return frozenset(candidate.event_id for candidate in pool)
    if settings.policy == "reservoir":
        return frozenset(candidate.event_id for candidate in pool[: settings.size])
    if settings.policy == "window":
        newest = sorted(pool, key=lambda candidate: candidate.observed_at, reverse=True)
        return frozenset(candidate.event_id for candidate in newest[: settings.size])

    classes: dict[str, list[Candidate]] = {}
    for candidate in pool:
        classes.setdefault(candidate.label, []).append(candidate)
    shares = quotas({name: len(members) for name, members in classes.items()}, settings.size)
    kept: set[str] = set()
    for name, members in classes.items():
        chosen = members[: shares[name]] if settings.policy == "class_balanced" else _herd(members, shares[name])
        kept.update(candidate.event_id for candidate in chosen)
    return frozenset(kept)


def _herd(members: list[Candidate], size: int) -> list[Candidate]:
    """The `size` members whose running mean follows the class mean; ties go to the smaller priority."""
    if size >= len(members):
        return members
    rows = [member.embedding for member in members if member.embedding is not None]
    if len(rows) != len(members):
        raise ValueError("herding needs the embedding of every candidate")
    features = np.stack(rows).astype(np.float64)
    mean = features.mean(axis=0)
    norms = np.einsum("ij,ij->i", features, features)
    total = np.zeros_like(mean)
    free = np.ones(len(members), dtype=bool)
    chosen: list[Candidate] = []
    for count in range(1, size + 1):
        # |mean - (total + x)/count|^2 without what is the same for every x, times count^2.
        distance = norms - 2.0 * (features @ (count * mean - total))
        distance[~free] = np.inf
        best = int(np.argmin(distance))
        free[best] = False
        total += features[best]
        chosen.append(members[best])
    return chosen
