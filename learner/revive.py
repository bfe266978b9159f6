"""A revision whose head was pruned, made again from its line of lineage.

::

    line of lineage: ledger row, examples, prior, calibration ▸ the examples that its head held ▸ sums ▸ solve
    ▸ the checksum of the head that was announced

Sums are whole numbers, so the same examples give the same sums; the same build, on a CPU with as many threads, then
solves them to the same bits, which the checksum in the lineage proves. A version's change of encoder begins the ledger
anew: of a revision before it the examples are embedded again, and rounding may then differ in the last bits. Where the
head that was announced is still stored, its weights are compared within `learner.rebuild.TOLERANCE`; where it is not,
whoever knows what it answered compares that.

What was forgotten, corrected or withdrawn since is not guessed at: such a revision says that it cannot be made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from learner.encoders import load_encoder
from learner.heads import HeadRecipe, HeadSums, LinearHead, quantise, solve
from learner.rebuild import TOLERANCE, CannotRebuild, ReadBack, farthest
from learner.registry import BrokenVersion, Registry, head_bytes
from replay.history import HeldExample, History
from replay.store import LearnerStore, Payload, Revision

EMBED_AT_ONCE = 256


@dataclass(frozen=True)
class Revived:
    """A revision's head, made again.

    Args:
        encoder: digest of the encoder that it goes with.
        head: None where it had learned nothing.
        outcome: `same`, by its checksum; `near` or `other` than the head that is stored, within the tolerance or not;
            `unproven`, where its checksum is another and no head is stored to compare with.
        largest: the largest difference of a weight from the stored one, as a share of the largest of its tensor; None
            where none is stored or the bits are the same.
        examples: how many it was taught.
        notes: what else is to be known.
    """

    name: str
    encoder: str
    head: LinearHead | None
    outcome: Literal["same", "near", "other", "unproven"]
    largest: float | None
    examples: int
    notes: tuple[str, ...]


class Reviver:
    """Makes heads of revisions again. It writes nothing.

    Args:
        store: the learner's database.
        registry: where weights lie.
        read_back: reads events that the store has let go of.
        device: where encoders run.
    """

    def __init__(self, store: LearnerStore, registry: Registry, read_back: ReadBack, device: str = "cpu") -> None:
        self._history, self._registry = History(store), registry
        self._read_back, self._device = read_back, device

    def revive(self, stream: str, name: str) -> Revived:
        """Make a revision such as `v3.214` again.

        Raises:
            CannotRebuild: examples of it are gone, or it left no line of lineage.
            BrokenVersion: its encoder is not whole in the registry.
        """
        version, _, number = name.partition(".")
        if not number.isdecimal() or not version[1:].isdecimal():
            raise CannotRebuild(f"{name} is no revision, such as v3.214")
        manifest = self._registry.version(stream, version)
        line = self._history.revision(stream, int(version[1:]), int(number))
        if line is None:
            raise CannotRebuild(f"the learner's database has no line of lineage of {name} of stream {stream!r}")
        encoder = manifest.encoder_digest
        if not line.head:
            return Revived(name, encoder, None, "same", None, 0, ())
        notes: list[str] = []
        recipe = _recipe(line)
        if recipe is None:
            notes.append("its line of lineage does not say how it was calibrated, so its checksum may differ")
        held = self._history.held_at(stream, encoder, line.ledger_seq, line.at)
        self._complete(stream, name, recipe, held, line.at, notes)
        q = self._embeddings(stream, name, encoder, held, notes)
        head = _solved(q, held, recipe, manifest.encoder.dimension, manifest.encoder.bound)
        outcome, largest = self._compare(line.head, head)
        return Revived(name, encoder, head, outcome, largest, len(held), tuple(notes))

    def _complete(
        self,
        stream: str,
        name: str,
        recipe: HeadRecipe | None,
        held: Sequence[HeldExample],
        at: datetime,
        notes: list[str],
    ) -> None:
        """Refuse where the head held more examples than are known."""
        losses = self._history.losses(stream, at)
        if held and (recipe is None or len(held) >= recipe.examples):
            if recipe is None and losses.forgotten:
                notes.append(f"{losses.forgotten} events of the stream were forgotten on request since")
            return
        why = ["were withdrawn or corrected"]
        if losses.settled:
            why.insert(0, "are past learner.memory.ledger_retention")
        if losses.forgotten:
            why.insert(0, f"were forgotten on request ({losses.forgotten} of the stream were)")
        many = f"{recipe.examples - len(held)} of the {recipe.examples}" if recipe else "all"
        raise CannotRebuild(f"{name} cannot be made again: {many} examples that its head held {' or '.join(why)} since")

    def _embeddings(
        self, stream: str, name: str, encoder: str, held: Sequence[HeldExample], notes: list[str]
    ) -> npt.NDArray[np.int16]:
        """(n, d) under the revision's encoder; what is not kept under it is embedded again."""
        known = {one.event_id: one.embedding for one in held if one.embedding is not None}
        again: dict[str, Payload] = {
            one.event_id: one.payload for one in held if one.embedding is None and one.payload is not None
        }
        places = {
            one.event_id: one.ref
            for one in held
            if one.event_id not in known and one.event_id not in again and one.ref is not None
        }
        if places:
            again.update(self._read_back(stream, places))
            notes.append(f"{len(places)} events were read back from the log")
        gone = len(held) - len(known) - len(again)
        if gone:
            raise CannotRebuild(
                f"{name} cannot be made again: the store and the log have let go of {gone} of the {len(held)} events "
                "that its head was taught"
            )
        if again:
            notes.append(f"{len(again)} examples were embedded again, under the encoder of {name.partition('.')[0]}")
            spec, files = self._registry.encoder(encoder, f"revision {name} of stream {stream!r}")
            model, ids = load_encoder(spec, files, self._device), sorted(again)
            for start in range(0, len(ids), EMBED_AT_ONCE):
                some = ids[start : start + EMBED_AT_ONCE]
                made = quantise(model.embed([again[one] for one in some], repeatable=True), spec.bound)
                known.update(zip(some, made, strict=True))
        return np.stack([known[one.event_id] for one in held])

    def _compare(
        self, digest: str, head: LinearHead
    ) -> tuple[Literal["same", "near", "other", "unproven"], float | None]:
        tensors = head.tensors()
        if hashlib.sha256(head_bytes(tensors)).hexdigest() == digest:
            return "same", None
        try:
            stored = self._registry.head(digest)
        except BrokenVersion:
            return "unproven", None
        if LinearHead.from_tensors(stored).classes != head.classes:
            return "other", float("inf")
        largest, _ = farthest(stored, tensors)
        return ("near" if largest <= TOLERANCE else "other"), largest


def _solved(
    q: npt.NDArray[np.int16], held: Sequence[HeldExample], recipe: HeadRecipe | None, dimension: int, bound: float
) -> LinearHead:
    recipe = recipe or HeadRecipe(examples=len(held), prior="sqrt", width=0)
    sums = HeadSums(dimension, bound, recipe.width)
    sums.add(q, [one.label for one in held])
    if recipe.newest is not None:
        count, weight = recipe.newest
        newest = sorted((one.order, row) for row, one in enumerate(held) if one.order is not None)[-count:]
        rows = [row for _, row in newest]
        for _ in range(weight - 1):
            sums.add(q[rows], [held[row].label for row in rows])
    head = solve(sums, prior=recipe.prior, calibration=recipe.calibration)
    assert head is not None
    return head


def _recipe(line: Revision) -> HeadRecipe | None:
    try:
        return HeadRecipe.model_validate(line.detail)
    except ValidationError:
        return None
