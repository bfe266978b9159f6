"""One stream's model as it is learned: the encoder in service, the head's sums, the revision announced last.

Two lines move here. The *learning line* follows the ledger: every label changes the sums, and the head is
solved from them. The *served line* is what was announced: usually the newest state of the learning line, but
after a rollback to an exact revision it stays where it was put until learning is resumed.

Nothing here commits offsets or joins; `learner.joining` writes the ledger that this follows.
"""

from __future__ import annotations

import json
import logging
import math
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from learner.encoders import Encoder, Payload, load_encoder
from learner.exam import (
    ExamSettings,
    GuardSettings,
    Verdict,
    examine,
    guard_decline,
    guard_revision,
    recent,
)
from learner.heads import (
    Calibration,
    HeadRecipe,
    HeadSums,
    LinearHead,
    calibrate,
    dequantise,
    leave_one_out,
    quantise,
    solve,
)
from learner.recency import Heat, Newest, Race, RecencySettings
from learner.registry import BrokenVersion, Lineage, Pointer, Registry, VersionManifest
from learner.shadow import SLOW_SOLVE, SOLVE_SHARE, Duel, Event, Shadow, ShadowSettings, Trial
from monitoring.metrics import Metrics
from replay.policy import quotas
from replay.store import Example, Forgotten, LearnerStore, LedgerSlice, NotEmbedded, Outgoing, Transaction

logger = logging.getLogger(__name__)

GUARD_EXAMPLES = 1_000
"""Exam examples that a revision is checked on: enough to see a class fall, few enough for every half second."""
YOUNG_LABELS = 20
"""A class with fewer labels may still rise quickly in its share of the answers."""
REFERENCE_EXAMPLES = 200
"""Examples whose mean the input's drift is measured from."""
CALIBRATION_EXAMPLES = 300
"""Labels learned last that the head's probabilities and novelty are fitted on, each left out of the head."""
TAIL = 2 * CALIBRATION_EXAMPLES
SAVE_SUMS_EVERY = 20_000
"""Ledger rows between two saved copies of the sums, which bound how many are followed at a start."""

COMPACT_EVERY = timedelta(minutes=1)
"""How long a withdrawn label's embedding may stay in the ledger beside the row that cancels it."""
FOLDS = 4
HELD_OUT_FROM = 3
"""Examples of a class without which a head cannot be said to know it."""

PACKAGES = ("torch", "transformers", "avalanche-lib", "numpy", "trimtab")


@dataclass(frozen=True)
class StreamPlan:
    """What the learner must know of one stream.

    Args:
        name: the stream's name on the wire.
        kind: `text` or `telemetry`.
        channels: telemetry channels in the model's order.
        base: builds the encoder that the first version has; called once in the stream's life.
        prior: how a class's frequency counts in the head.
        random_features: the head's width; 0 for none. Counts from the next encoder on.
        guard: what a revision must not do.
        shadow: how long the loser of a promotion answers along.
        recency: whether the newest labels may count more, where live labels say so; None for no race.
        budget: the largest fall of a class's recall that is allowed, in the shadow as in the exam.
        labels: class names known from the start, which count towards no quota.
        max_classes: the most class names the stream may ever have.
        max_new_classes_a_day: the most class names that may be new on one day (UTC).
    """

    name: str
    kind: Literal["text", "telemetry"]
    channels: tuple[str, ...]
    base: Callable[[], Encoder]
    prior: Literal["uniform", "sqrt", "empirical"] = "sqrt"
    random_features: int = 0
    guard: GuardSettings = field(default_factory=GuardSettings)
    shadow: ShadowSettings = field(default_factory=ShadowSettings)
    recency: RecencySettings | None = None
    budget: float = 0.05
    labels: frozenset[str] = frozenset()
    max_classes: int = 1_000
    max_new_classes_a_day: int = 200


class EncoderShelf:
    """Encoders by digest, loaded once however many streams and versions share one, freed when none does."""

    def __init__(self, registry: Registry, device: str) -> None:
        self._registry, self.device = registry, device
        self._loaded: weakref.WeakValueDictionary[str, Encoder] = weakref.WeakValueDictionary()

    def get(self, digest: str) -> Encoder:
        """The encoder that a spec's digest names.

        Raises:
            BrokenVersion: the registry does not have it whole.
        """
        encoder = self._loaded.get(digest)
        if encoder is None:
            spec, files = self._registry.encoder(digest)
            encoder = load_encoder(spec, files, self.device)
            self._loaded[digest] = encoder
        return encoder


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a head says of an example that did not teach it.

    Args:
        label: the likeliest class; None while there is none.
        probability: of that class.
        known: the classes that this head was taught enough of.
    """

    label: str | None
    probability: float
    known: frozenset[str]


@dataclass(frozen=True)
class InService:
    """Which revision answers a stream."""

    version: str
    revision: int
    encoder: str
    head: LinearHead | None

    @property
    def name(self) -> str:
        """Such as `v12.3456`."""
        return f"{self.version}.{self.revision}"


class OnlineLearner:
    """One stream's learning line and served line. Used by one thread; `serving` may be read from any.

    Args:
        plan: the stream.
        store: the learner's database.
        registry: where weights lie.
        shelf: encoders already loaded.
        epoch: under which this learner owns the store.
        topic: the name of the `model-versions` topic.
        metrics: where revisions and versions are counted.
    """

    def __init__(
        self,
        plan: StreamPlan,
        store: LearnerStore,
        registry: Registry,
        shelf: EncoderShelf,
        epoch: int,
        topic: str,
        metrics: Metrics,
    ) -> None:
        self.plan = plan
        self._store, self._registry, self._shelf = store, registry, shelf
        self._epoch, self._topic, self._metrics = epoch, topic, metrics
        self._sequence = 0
        self._seq = 0
        self._saved_seq = 0
        self._changed = False
        self._held: list[str] = []
        self._guard_set: tuple[npt.NDArray[np.float32], list[str]] | None = None
        self._guarded_by = -1
        self._best: tuple[str, LinearHead] | None = None
        self._removed = True
        self._compacted_at: datetime | None = None
        self.version = ""
        self.encoder_digest = ""
        self.encoder: Encoder
        self.sums: HeadSums
        self.serving = InService("v0", 0, "", None)
        self.paused = False
        self._shadow: Shadow | None = None
        self._newest: Newest | None = None
        self._racers: tuple[LinearHead | None, LinearHead | None] | None = None
        self._racers_until = 0.0
        self.race = Race()
        self._recent: OrderedDict[str, tuple[npt.NDArray[np.int16], str]] = OrderedDict()
        self._calibration: Calibration | None = None
        self._calibrated_by = 0
        self._solved_at, self._solve_took = -math.inf, 0.0

    # Opening

    def open(self, now: datetime) -> None:
        """Go on from the store: its champion, its sums, its ledger. A new stream gets its first version."""
        reign = self._store.champion(self.plan.name)
        if reign is None:
            self._found(now)
        else:
            self.version = f"v{reign.version}"
            digest = self._store.encoder(self.plan.name)
            if digest is None:
                digest = self._registry.version(self.plan.name, self.version).encoder_digest
            self._note_champion()
            self._use(digest)
        self._load_sums()
        self._open_race()
        self.follow()
        self._open_shadow()
        pinned = json.loads(self._store.recall(f"pinned/{self.plan.name}") or "null")
        last = pinned or self._last_announced()
        if last:
            # First what was served before, under this learner's own epoch; what was learned since must pass the guard.
            try:
                self.serve_revision(last, now, pause=False)
            except BrokenVersion as error:
                logger.error("stream %s: %s cannot be served again: %s", self.plan.name, last, error)
                self.announce(now, kind="champion", guard=False)
            self.paused = bool(pinned)
        else:
            self.announce(now, kind="champion", guard=False)
        self._recall_best()
        self._changed = True

    def _recall_best(self) -> None:
        """Go on comparing with the revision that was the best before the start, where its head is still stored."""
        name = self._store.recall(f"best/{self.plan.name}")
        if name is not None and name.partition(".")[0] == self.version:
            try:
                ref = self._registry.revision(self.plan.name, name)
                if ref.head is not None and ref.encoder == self.encoder_digest:
                    self._best = name, LinearHead.from_tensors(self._registry.head(ref.head))
            except BrokenVersion as error:
                logger.info("stream %s: the best revision is not stored any more: %s", self.plan.name, error)
        if self._best is None and self.serving.head is not None and self.serving.encoder == self.encoder_digest:
            self._best = self.serving.name, self.serving.head

    def _last_announced(self) -> str | None:
        """The revision of the champion that was announced last, under whatever learner."""
        number = int(self.version.removeprefix("v"))
        rows = self._store.revisions(self.plan.name, version=number, limit=1)
        return f"{self.version}.{rows[0].revision}" if rows else None

    def _found(self, now: datetime) -> None:
        encoder = self.plan.base()
        spec = encoder.sealed()
        digest = self._registry.put_encoder(spec, encoder.files())
        name = self._registry.commit(
            VersionManifest(
                stream=self.plan.name,
                created_at=now,
                encoder=spec,
                lineage=Lineage(strategy="base", packages=installed()),
            )
        )
        with self._store.transaction(self._epoch, now) as tx:
            number = tx.add_version(
                self.plan.name, encoder=digest, head="", state="champion", number=int(name.removeprefix("v"))
            )
            tx.rebase(self.plan.name, digest, {})
            tx.set_champion(self.plan.name, number, "base")
        self._registry.set_champion(self.plan.name, name)
        self.version = name
        self._use(digest)

    def _note_champion(self) -> None:
        """Tell the registry, where the learner ended between its decision and the note of it."""
        try:
            if self._registry.champion(self.plan.name) != self.version:
                self._registry.set_champion(self.plan.name, self.version)
        except BrokenVersion as error:
            logger.warning("stream %s: %s", self.plan.name, error)

    def _use(self, digest: str) -> None:
        self.encoder = self._shelf.get(digest)
        self.encoder_digest = digest
        self._guard_set, self._best = None, None

    def _load_sums(self) -> None:
        spec = self.encoder.spec
        saved = self._store.sums(self.plan.name, self.encoder_digest)
        if saved is None:
            self._seq, self.sums = 0, HeadSums(spec.dimension, spec.bound, self.plan.random_features)
        else:
            self._seq, self.sums = saved[0], HeadSums.from_tensors(load_tensors(saved[1]))
            if self.sums.lift.width != self.plan.random_features:
                # The ledger may no longer hold every label that the sums know.
                logger.info(
                    "stream %s: its head keeps %d random features until its encoder changes",
                    self.plan.name,
                    self.sums.lift.width,
                )
        self._saved_seq = self._seq
        self._newest = Newest(spec.dimension, spec.bound, self.sums.lift.width) if self.plan.recency else None
        self._racers = None
        self._recent.clear()
        self._calibration, self._calibrated_by = None, 0
        self._note(self._store.follow_ledger(self.plan.name, self.encoder_digest, max(0, self._seq - TAIL), TAIL))

    @property
    def device(self) -> str:
        """Where its encoders run."""
        return self._shelf.device

    # Learning

    def embed(self, payloads: Sequence[Payload]) -> npt.NDArray[np.int16]:
        """Embeddings (n, d) as the ledger keeps them, under the encoder of the learning line."""
        return quantise(self.encoder.embed(payloads), self.encoder.spec.bound)

    def held_out(
        self, event_ids: Sequence[str], embeddings: npt.NDArray[np.int16], taught: Sequence[str | None]
    ) -> list[HeldOut]:
        """What heads that were not taught by these examples say of them.

        In folds: the sums are exact, so a head without a fold is a subtraction away, whatever a head is made of.

        Args:
            embeddings: (n, d), learned under the encoder of the learning line.
            taught: for each the class that the sums hold it under; None where they do not hold it.
        """
        fold = np.array([crc32(event_id.encode()) % FOLDS for event_id in event_ids])
        found = [HeldOut(None, 0.0, frozenset())] * len(event_ids)
        for number in range(FOLDS):
            rows = np.flatnonzero(fold == number).tolist()
            inside = [row for row in rows if taught[row] is not None]
            sums = self.sums.copy()
            sums.subtract(embeddings[inside], [str(taught[row]) for row in inside])
            head = solve(sums, prior=self.plan.prior)
            if head is None or not len(rows):
                continue
            known = frozenset(name for name, count in sums.counts.items() if count >= HELD_OUT_FROM)
            answer = head.answer(dequantise(embeddings[rows], self.encoder.spec.bound), 1)
            for row, labels, best in zip(rows, answer.labels, answer.probabilities, strict=True):
                found[row] = HeldOut(labels[0], float(best[0]), known)
        return found

    def follow(self) -> int:
        """Take in what the ledger gained; returns how many rows that were."""
        count = 0
        while True:
            rows = self._store.follow_ledger(self.plan.name, self.encoder_digest, self._seq)
            if not len(rows):
                break
            self.sums.add(*rows.added)
            self.sums.subtract(*rows.removed)
            self._removed = self._removed or bool((rows.signs < 0).any())
            if self._shadow is not None:
                self._shadow.follow(rows.event_ids, rows.labels, rows.signs.tolist())
            self._note(rows)
            self._seq = rows.seq
            count += len(rows)
        self._changed = self._changed or count > 0
        return count

    def _note(self, rows: LedgerSlice) -> None:
        """Remember the labels learned last."""
        for event_id, label, sign, embedding in zip(
            rows.event_ids, rows.labels, rows.signs, rows.embeddings, strict=True
        ):
            self._recent.pop(event_id, None)
            if sign > 0:
                self._recent[event_id] = embedding, label
                if len(self._recent) > CALIBRATION_EXAMPLES:
                    self._recent.popitem(last=False)

    def save(self, now: datetime) -> None:
        """Keep the sums where many ledger rows were followed since they were kept last, or some cancel out."""
        if self._compacted_at is None:
            self._compacted_at = now
        compact = self._removed and now - self._compacted_at >= COMPACT_EVERY
        if compact or self._seq - self._saved_seq >= SAVE_SUMS_EVERY:
            with self._store.transaction(self._epoch, now) as tx:
                tx.save_sums(self.plan.name, self.encoder_digest, self._seq, _packed(self.sums))
                tx.compact_ledger(self.plan.name, self.encoder_digest, self._seq)
            self._saved_seq, self._removed, self._compacted_at = self._seq, False, now

    def relearned(self) -> None:
        """Some labels were corrected, withdrawn or renamed: examples held to guard by may be among them."""
        self._guard_set = None

    def forget(self, event_ids: Collection[str], now: datetime) -> Forgotten:
        """Forget events for good: out of the sums and out of the store, in one transaction.

        Their ledger rows go as well, so the sums without them are kept with it: a start that went on from older ones
        would miss the rows that undo them.
        """
        self.follow()
        with self._store.transaction(self._epoch, now) as tx:
            found = tx.forget(self.plan.name, event_ids)
            sums = self.sums.copy()
            if found.labels:
                sums.subtract(found.embeddings, found.labels)
            tx.save_sums(self.plan.name, self.encoder_digest, self._seq, _packed(sums))
            # The loser's head may know them too, and their embeddings under its encoder are not kept.
            self._keep_duel(tx, None)
        self.sums, self._saved_seq, self._shadow = sums, self._seq, None
        for event_id in event_ids:
            self._recent.pop(event_id, None)
        if self._newest is not None:
            self._newest.hold({})
        self._racers = None
        self._changed = self._changed or bool(found.labels)
        self.relearned()
        self.follow()
        return found

    # Announcing

    def announce(
        self,
        now: datetime,
        *,
        kind: Literal["champion", "revision"] = "revision",
        guard: bool = True,
        pause: float = 0.0,
        behind: bool = False,
    ) -> bool:
        """Solve the head and announce it, unless nothing changed, learning is paused, or the guard holds it.

        Args:
            pause: shortest time between two solutions for a revision, in seconds.
            behind: there is more to learn already, so heads that take long to solve leave it most of the thread.

        Returns:
            Whether a new revision was announced.
        """
        if self.paused or not (self._changed or kind == "champion"):
            return False
        if behind and self._solve_took > SLOW_SOLVE:
            pause = max(pause, self._solve_took / SOLVE_SHARE)
        if kind == "revision" and time.monotonic() < self._solved_at + pause:
            return False
        self._solved_at = time.monotonic()
        head = self._solve()
        self._solve_took = time.monotonic() - self._solved_at
        if guard and (reasons := self._guard(head)):
            if reasons != self._held:
                logger.warning("stream %s: a revision is held: %s", self.plan.name, "; ".join(reasons))
                self._metrics.revisions.labels(self.plan.name, "held").inc()
                self._held = reasons
            return False
        self._held = []
        tensors = None if head is None else head.tensors()
        digest = "" if tensors is None else self._registry.put_head(tensors)
        with self._store.transaction(self._epoch, now) as tx:
            revision = tx.add_revision(
                self.plan.name,
                int(self.version.removeprefix("v")),
                head=digest,
                ledger_seq=self._seq,
                detail=self._recipe().model_dump(exclude_none=True),
            )
            self._registry.put_revision(self.plan.name, self.version, revision, self.encoder_digest, tensors)
            self._send(tx, kind, self.version, revision, self.encoder_digest, digest or None, now)
            if better := head is not None and self._is_best(head):
                tx.remember(f"best/{self.plan.name}", f"{self.version}.{revision}")
        if better and head is not None:
            self._best = f"{self.version}.{revision}", head
        self.serving = InService(self.version, revision, self.encoder_digest, head)
        self._changed = False
        self._metrics.revisions.labels(self.plan.name, "announced").inc()
        return True

    def _solve(self) -> LinearHead | None:
        """The head of the sums, calibrated again when their examples became a tenth more or fewer."""
        prior = self.plan.prior
        due = self._recent and not 0.9 * self._calibrated_by - 20 < self.sums.total < 1.1 * self._calibrated_by + 20
        newest = self.race.leader == "newest"
        if not due:
            return solve(self._emphasised() if newest else self.sums, prior=prior, calibration=self._calibration)
        q = np.stack([embedding for embedding, _ in self._recent.values()])
        labels = [label for _, label in self._recent.values()]
        if newest:
            self._calibration, self._calibrated_by = calibrate(self.sums, q, labels, prior=prior), self.sums.total
            return solve(self._emphasised(), prior=prior, calibration=self._calibration)
        head = solve(self.sums, prior=prior, calibrate_on=(q, labels))
        if head is not None:
            self._calibration, self._calibrated_by = Calibration(head.temperature, head.usual), self.sums.total
        return head

    def _recipe(self) -> HeadRecipe:
        recency = self.plan.recency if self.race.leader == "newest" else None
        return HeadRecipe(
            examples=self.sums.total,
            prior=self.plan.prior,
            width=self.sums.lift.width,
            calibration=self._calibration,
            newest=(recency.labels, recency.weight) if recency else None,
        )

    @property
    def held(self) -> list[str]:
        """Why the newest revision is held back; empty where it is not."""
        return list(self._held)

    def _guard(self, head: LinearHead | None) -> list[str]:
        before = self.serving.head
        if head is None or before is None or self.serving.encoder != self.encoder_digest:
            return []
        embeddings, labels = self._guarding()
        if not len(embeddings):
            return []
        young = {name for name, count in self.sums.counts.items() if count < YOUNG_LABELS}
        new = sorted(young | set(head.classes) - set(before.classes))
        reasons = guard_revision(
            labels,
            before.predict(embeddings),
            head.predict(embeddings),
            new_classes=new,
            settings=self.plan.guard,
        )
        return reasons + (self._compare_with_best(head)[0] if self.plan.guard.decline else [])

    def _is_best(self, head: LinearHead) -> bool:
        """Whether later revisions of this version are to be compared with this one."""
        return self._best is None or self._compare_with_best(head)[1]

    def _compare_with_best(self, head: LinearHead) -> tuple[list[str], bool]:
        embeddings, labels = self._guarding()
        if self._best is None or not len(embeddings):
            return [], self._best is None
        return guard_decline(
            labels, self._best[1].predict(embeddings), head.predict(embeddings), settings=self.plan.guard
        )

    def _guarding(self) -> tuple[npt.NDArray[np.float32], list[str]]:
        """Exam examples under the learning line's encoder, as even over the classes as they allow, the newest of each.

        Read again when many were added, or when a label was taken back.
        """
        total = self.sums.total
        if self._guard_set is None or total > self._guarded_by * 1.1 + 20:
            rows = _newest(self._store.examples(self.plan.name, exam=True), GUARD_EXAMPLES)
            self._guarded_by = total
            embeddings = np.empty((0, self.encoder.spec.dimension), np.float32)
            if rows:
                stacked = np.stack([row.embedding for row in rows])
                embeddings = dequantise(stacked, self.encoder.spec.bound).astype(np.float32)
            self._guard_set = embeddings, [row.label for row in rows]
        return self._guard_set

    def _send(
        self,
        tx: Transaction,
        kind: Literal["champion", "version", "revision"],
        version: str,
        revision: int,
        encoder: str,
        head: str | None,
        now: datetime,
    ) -> None:
        if kind != "version":
            self._sequence += 1
        pointer = Pointer(
            kind=kind,
            stream=self.plan.name,
            version=version,
            revision=revision,
            encoder=encoder,
            head=head,
            epoch=self._epoch,
            sequence=self._sequence,
            announced_at=now,
        )
        tx.send([Outgoing(self._topic, pointer.key, pointer.encode())])

    # Versions

    def put_in_service(
        self,
        manifest: VersionManifest,
        embeddings: Mapping[str, npt.NDArray[np.int16]],
        cause: str,
        now: datetime,
        record: Callable[[Transaction], None] = lambda tx: None,
        *,
        shadow: bool = False,
        why: str = "",
    ) -> None:
        """Make a committed version the champion: its encoder, and the head of the store under it.

        Labels that came while the version was made are in the store, so the head knows them too.

        Args:
            embeddings: by event id, under the version's encoder, as far as they are there already.
            record: writes, in the same transaction, what else becomes true with it.
            shadow: let the version it replaces answer along; see `learner.shadow`.
            why: for the registry's list of promotions, where the version before it did not simply lose to it.
        """
        number = manifest.number
        encoder = self._shelf.get(manifest.encoder_digest)
        known = dict(embeddings)
        duel = self._duel(manifest, now) if shadow else None
        loser, learned = self.encoder, self.sums
        while True:
            try:
                with self._store.transaction(self._epoch, now) as tx:
                    if manifest.encoder_digest != self._store.encoder(self.plan.name):
                        tx.rebase(self.plan.name, manifest.encoder_digest, known)
                    record(tx)
                    tx.set_champion(self.plan.name, number, cause)
                    tx.remember(f"pinned/{self.plan.name}", "null")
                    self._keep_duel(tx, duel, learned)
                    self._send(tx, "version", manifest.name, 0, manifest.encoder_digest, manifest.head, now)
                break
            except NotEmbedded as error:
                rows = self._store.examples(self.plan.name, event_ids=error.event_ids)
                fresh = quantise(encoder.embed([row.payload for row in rows]), encoder.spec.bound)
                known.update({row.event_id: embedding for row, embedding in zip(rows, fresh, strict=True)})
        self._registry.set_champion(self.plan.name, manifest.name, why)
        self.version = manifest.name
        self.paused = False
        self._use(manifest.encoder_digest)
        self._load_sums()
        self._shadow = None
        self.follow()
        if duel is not None:
            self._shadow = Shadow(duel, loser, learned, self.plan.prior)
        self._changed = True
        self.announce(now, kind="champion", guard=False)

    def left_out(self, examined: Collection[str], count: int) -> dict[str, tuple[str, str | None]]:
        """What the head says of examples of classes that are not in the exam, each left out of it.

        Args:
            examined: the classes that are.
            count: the most examples.

        Returns:
            Label and answer by event id.
        """
        present = self._store.present(self.plan.name)
        young = [event_id for event_id, (label, exam) in present.items() if not exam and label not in examined]
        if not young:
            return {}
        rows = self._store.examples(self.plan.name, event_ids=sorted(young)[:count])
        answers = leave_one_out(
            self.sums, np.stack([row.embedding for row in rows]), [row.label for row in rows], prior=self.plan.prior
        )
        return {row.event_id: (row.label, answer) for row, answer in zip(rows, answers, strict=True)}

    def examine_again(
        self, manifest: VersionManifest, settings: ExamSettings, now: datetime
    ) -> tuple[Verdict, dict[str, npt.NDArray[np.int16]]]:
        """Examine a version that was refused on the labels there are now, its head taught what the store holds.

        Each time counts as another look at it; see `exam.spent`. Costs what a promotion does: every example in the
        store is embedded, and the embeddings (by event id) are returned for it.
        """
        encoder, bound = self._shelf.get(manifest.encoder_digest), manifest.encoder.bound
        rows = self._store.examples(self.plan.name)
        q = quantise(encoder.embed([row.payload for row in rows]), bound) if rows else np.empty((0, 0), np.int16)
        known = {row.event_id: embedding for row, embedding in zip(rows, q, strict=True)}
        taught, exam = [row for row in rows if not row.exam], [row for row in rows if row.exam]
        exam = [exam[at] for at in recent([row.label for row in exam], [row.observed_at for row in exam], settings)]
        sums = HeadSums(manifest.encoder.dimension, bound, self.plan.random_features)
        if taught:
            sums.add(np.stack([known[row.event_id] for row in taught]), [row.label for row in taught])
        heads = (solve(self.sums, prior=self.plan.prior), solve(sums, prior=self.plan.prior))
        own = [row.embedding for row in exam], self.encoder.spec.bound
        new = [known[row.event_id] for row in exam], bound
        champion, candidate = (
            [None] * len(exam) if head is None or not exam else head.predict(dequantise(np.stack(stack), scale))
            for head, (stack, scale) in zip(heads, (own, new), strict=True)
        )
        note = f"looks/{self.plan.name}/{manifest.name}/{self.version}"
        look = int(self._store.recall(note) or "1") + 1
        with self._store.transaction(self._epoch, now) as tx:
            tx.remember(note, str(look))
        verdict = examine(
            [row.label for row in exam],
            champion,
            candidate,
            champion_classes=set(heads[0].classes) & {row.label for row in rows} if heads[0] else (),
            candidate_classes=heads[1].classes if heads[1] else (),
            look=look,
            settings=settings,
        )
        return verdict, known

    # Whether the newest labels count more

    def _open_race(self) -> None:
        """Go on with the race where it was; one that is no longer wanted leaves the plain head."""
        note = self._store.recall(f"race/{self.plan.name}") if self.plan.recency else None
        self.race = Race() if note is None else Race.model_validate_json(note)

    def _emphasised(self) -> HeadSums:
        """The sums of the head in which the newest labels count more: of what the store holds now, and nothing else."""
        if self._newest is None or self.plan.recency is None:
            return self.sums
        self._newest.hold(self._store.newest(self.plan.name, self.encoder_digest, self.plan.recency.labels))
        return self._newest.emphasised(self.sums, self.plan.recency.weight)

    def race_on(self, events: Sequence[Event]) -> Race | None:
        """Both heads answer events whose labels neither has been taught; what that comes to, to be kept with the batch.

        None where there is no race. Heads that take long to solve serve for several batches.
        """
        if self.plan.recency is None or not events:
            return None
        began = time.monotonic()
        if self._racers is None or began >= self._racers_until:
            prior = self.plan.prior
            self._racers = solve(self.sums, prior=prior), solve(self._emphasised(), prior=prior)
            took = time.monotonic() - began
            self._racers_until = began + (took / SOLVE_SHARE if took > SLOW_SOLVE else 0.0)
        asked = dequantise(np.stack([event.embedding for event in events]), self.encoder.spec.bound)
        plain, newest = ([None] * len(events) if head is None else head.predict(asked) for head in self._racers)
        heats = [
            Heat(event.label, one == event.label, other == event.label)
            for event, one, other in zip(events, plain, newest, strict=True)
        ]
        return self.race.after(heats, self.plan.recency.odds)

    def record_race(self, tx: Transaction, race: Race) -> None:
        """Keep what a batch's answers came to, with the batch."""
        tx.remember(f"race/{self.plan.name}", race.model_dump_json())

    def settle_race(self, race: Race) -> None:
        """The batch was kept."""
        if race.leader != self.race.leader:
            which = "in which the newest labels count more" if race.leader == "newest" else "of all labels alike"
            logger.info("stream %s: the head %s answers from now on", self.plan.name, which)
            self._changed = True
        self.race = race

    # The shadow of the version before

    def _duel(self, manifest: VersionManifest, now: datetime) -> Duel | None:
        """A new duel, where there is a loser that could answer otherwise: another encoder, and something learned."""
        if not self.plan.shadow.labels or manifest.encoder_digest == self.encoder_digest or not self.sums.total:
            return None
        classes = list(self.sums.classes)
        return Duel(
            champion=manifest.name, loser=self.version, encoder=self.encoder_digest, classes=classes, began_at=now
        )

    def _keep_duel(self, tx: Transaction, duel: Duel | None, learned: HeadSums | None = None) -> None:
        tx.remember(f"shadow/{self.plan.name}", "null" if duel is None else duel.model_dump_json())
        if duel is None and self._shadow is not None:
            gone = self._shadow
            nothing = HeadSums(gone.sums.dimension, gone.sums.bound, gone.sums.lift.width)
            tx.save_sums(self.plan.name, gone.duel.encoder, 0, _packed(nothing))
        if duel is not None and learned is not None:
            tx.save_sums(self.plan.name, duel.encoder, 0, _packed(learned))

    def _open_shadow(self) -> None:
        """Go on with a duel that a restart cut off: the head as of the promotion, and what it was taught since."""
        note = json.loads(self._store.recall(f"shadow/{self.plan.name}") or "null")
        if note is None:
            return
        duel = Duel.model_validate(note)
        saved = self._store.sums(self.plan.name, duel.encoder)
        if duel.champion != self.version or saved is None:
            return
        try:
            encoder = self._shelf.get(duel.encoder)
        except BrokenVersion as error:
            logger.warning("stream %s: %s no longer answers in shadow: %s", self.plan.name, duel.loser, error)
            return
        self._shadow = Shadow(duel, encoder, HeadSums.from_tensors(load_tensors(saved[1])), self.plan.prior)
        rows = self._store.examples(self.plan.name, exam=False, event_ids=duel.tried)
        self._shadow.relearn([(row.event_id, row.payload, row.label) for row in rows])

    @property
    def duel(self) -> Duel | None:
        """The champion against the version it replaced, while that answers along."""
        return None if self._shadow is None else self._shadow.duel

    @property
    def overruled(self) -> Duel | None:
        """The duel by which the champion is to be rolled back; None while it stays, or while learning is paused."""
        return self.duel if self.duel is not None and self.duel.reason and not self.paused else None

    def attempt(self, events: Sequence[Event]) -> Trial | None:
        """Let the champion and its shadow answer events whose labels neither has been taught."""
        if self._shadow is None or self.paused:
            return None
        return self._shadow.attempt(events, self.sums, self.plan.shadow, self.plan.budget)

    def record_trial(self, tx: Transaction, trial: Trial) -> None:
        """Keep what a batch's answers in shadow came to, with the batch."""
        self._keep_duel(tx, trial.duel)

    def settle_trial(self, trial: Trial) -> None:
        """The batch was kept. Called before its ledger rows are followed."""
        if self._shadow is not None:
            self._shadow.settle(trial)

    def end_shadow(self, now: datetime) -> None:
        """Let go of the loser once the duel is over and the champion stays, or where it cannot be served."""
        if self._shadow is not None:
            with self._store.transaction(self._epoch, now) as tx:
                self._keep_duel(tx, None)
            self._shadow = None

    def overrule(self, now: datetime, record: Callable[[Transaction], None] = lambda tx: None) -> str:
        """Put the version before back into service, because the champion is worse on live labels; returns why.

        The examples that only the champion was trained on are new again: the version in service never saw them.

        Raises:
            BrokenVersion: it cannot be served any more; the champion stays.
        """
        duel = self.overruled
        assert duel is not None
        number = int(duel.champion.removeprefix("v"))
        runs = [row.run for row in self._store.versions(self.plan.name) if row.number == number]

        def write(tx: Transaction) -> None:
            tx.set_version_state(self.plan.name, number, "rolled_back", {"rolled_back": duel.reason})
            for run in runs:
                if run is not None:
                    tx.unmark_trained(run)
            record(tx)

        manifest = self._registry.verify(self.plan.name, duel.loser)
        self.put_in_service(manifest, {}, f"rolled back by itself: {duel.reason}", now, write, why=duel.reason)
        return duel.reason

    def serve_revision(self, name: str, now: datetime, *, pause: bool = True) -> None:
        """Serve one exact earlier revision, and keep it there until learning is resumed.

        Raises:
            BrokenVersion: the revision's head was pruned or is not whole.
        """
        ref = self._registry.revision(self.plan.name, name)
        head = None if ref.head is None else LinearHead.from_tensors(self._registry.head(ref.head))
        with self._store.transaction(self._epoch, now) as tx:
            self._send(tx, "champion", ref.version, ref.revision, ref.encoder, ref.head, now)
            if pause:
                tx.remember(f"pinned/{self.plan.name}", json.dumps(name))
        self.paused = True
        self.serving = InService(ref.version, ref.revision, ref.encoder, head)

    def pause(self, now: datetime) -> None:
        """Keep serving what is served now, whatever is learned."""
        if not self.paused:
            with self._store.transaction(self._epoch, now) as tx:
                tx.remember(f"pinned/{self.plan.name}", json.dumps(self.serving.name))
            self.paused = True

    def resume(self, now: datetime) -> None:
        """Serve the newest state of the learning line again."""
        with self._store.transaction(self._epoch, now) as tx:
            tx.remember(f"pinned/{self.plan.name}", "null")
        self.paused = False
        self._changed = True
        self.announce(now, kind="champion", guard=False)


def _packed(sums: HeadSums) -> bytes:
    packed: bytes = save_tensors({name: np.ascontiguousarray(array) for name, array in sums.tensors().items()})
    return packed


def _newest(rows: Iterable[Example], count: int) -> list[Example]:
    """At most `count`, as even over the classes as they allow, those of a class that were observed last."""
    classes: dict[str, list[Example]] = {}
    for row in sorted(rows, key=lambda row: (row.observed_at, row.event_id), reverse=True):
        classes.setdefault(row.label, []).append(row)
    shares = quotas({name: len(members) for name, members in classes.items()}, count)
    return [row for name, members in sorted(classes.items()) for row in members[: shares[name]]]


def installed() -> dict[str, str]:
    """The versions of the packages that a model's numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
