"""A version accounted for: what its exam asked and found, rule by rule, and how two versions answer differently.

A verdict keeps every number of its exam, so each rule can be told again with what it allowed: `checks`. It is what
`learner.exam` decided by, and a test holds the two together.

Two versions are compared on the exam's examples, which neither was ever taught (`Examiner.compare`). A version `v12` is
taken as a rollback to it would bring it: its encoder, and a head taught by what the store holds now, so that both sides
know the same labels. A revision `v12.34` is taken exactly as it was served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from learner.encoders import load_encoder
from learner.exam import ExamSettings, Verdict, examine, spent
from learner.heads import HeadSums, LinearHead, dequantise, quantise, solve
from learner.registry import Registry, VersionManifest
from replay.store import Example, LearnerStore

EMBED_AT_ONCE = 256
NAMED = 5


@dataclass(frozen=True)
class Check:
    """One rule of the exam.

    Args:
        rule: what was asked.
        found: what was found, with its numbers.
        allowed: the bound that it was held against.
        passed: whether it speaks for the candidate.
    """

    rule: str
    found: str
    allowed: str
    passed: bool


@dataclass(frozen=True)
class Changed:
    """An exam example that two models answer differently."""

    event_id: str
    label: str
    before: str | None
    after: str | None

    @property
    def kind(self) -> Literal["lost", "gained", "wrong"]:
        """Whether only the first was right, only the second, or neither."""
        if self.before == self.label:
            return "lost"
        return "gained" if self.after == self.label else "wrong"


@dataclass(frozen=True)
class ClassChange:
    """One class under two models; the outcome is that of the second, and is a finding only where it is no `unclear`."""

    label: str
    n: int
    before: float
    after: float
    lost: int
    gained: int
    outcome: Literal["better", "worse", "not_worse", "unclear"]


@dataclass(frozen=True)
class Difference:
    """How two models of a stream answer the exam.

    Args:
        n: examples.
        accuracy: of the first and of the second.
        classes: those that fell most first.
        changed: examples whose answer changed, lost ones first.
        same_encoder: both have one encoder, so that versions cannot differ but in their heads.
    """

    before: str
    after: str
    n: int
    accuracy: tuple[float, float]
    classes: tuple[ClassChange, ...]
    changed: tuple[Changed, ...]
    same_encoder: bool

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "before": self.before,
            "after": self.after,
            "n": self.n,
            "accuracy": {"before": self.accuracy[0], "after": self.accuracy[1]},
            "same_encoder": self.same_encoder,
            "classes": [vars(one) for one in self.classes],
            "changed": [{**vars(one), "kind": one.kind} for one in self.changed],
        }


def checks(verdict: Verdict) -> list[Check]:
    """Each rule of an exam, in the order in which they are asked. Pure."""
    rules = verdict.settings
    alpha = spent(rules.alpha, verdict.look)
    missing = next((reason for reason in verdict.reasons if "cannot answer" in reason), None)
    silent = next((reason for reason in verdict.reasons if "gave no finite answer" in reason), None)
    worse = [one for one in verdict.classes if one.outcome == "worse"]
    cleared = sum(one.outcome == "not_worse" for one in verdict.classes)
    lost, gained = (
        sum(getattr(one, side) for one in verdict.classes if not one.left_out) for side in ("lost", "gained")
    )
    fell = ", ".join(
        f"{one.label} from {one.champion_recall:.1%} to {one.candidate_recall:.1%} of {one.n}" for one in worse[:NAMED]
    ) + (f" and {len(worse) - NAMED} more" if len(worse) > NAMED else "")
    found = [
        Check(
            "enough examples", f"{verdict.n}", f"at least {rules.minimum_examples}", verdict.n >= rules.minimum_examples
        ),
        Check("a finite answer to each", silent or "yes", "all", silent is None),
        Check("every class of the champion", missing or "yes", "all", missing is None),
        Check(
            "no class is worse",
            fell
            or f"none of {len(verdict.classes)}; {cleared} shown to be no worse, {len(verdict.unjudged)} not judged",
            f"a fall of {rules.budget:.1%}, or not significant among all classes (p > {alpha / 2:.3g} together)",
            not worse,
        ),
        Check(
            "accuracy has not fallen",
            f"from {verdict.champion_accuracy:.1%} to {verdict.candidate_accuracy:.1%}, {lost} lost, {gained} gained, "
            f"p = {verdict.accuracy_p_value:.2g}; by at most {max(0.0, verdict.accuracy_fall_bound):.1%}, "
            f"{rules.confidence:.0%} sure",
            f"p > {alpha / 8:.3g}",
            verdict.accuracy_p_value > alpha / 8,
        ),
    ]
    if verdict.pooled is not None:
        pool = verdict.pooled
        found.append(
            Check(
                f"{pool.classes} small classes together",
                f"from {pool.champion_recall:.1%} to {pool.candidate_recall:.1%} of {pool.n}, p = {pool.p_value:.2g}",
                f"a fall of {rules.pooled_budget:.1%}, or p > {alpha / 4:.3g}",
                pool.outcome != "worse",
            )
        )
    found.append(
        Check(
            "the mean of recalls has not fallen",
            f"from {verdict.champion_balanced:.1%} to {verdict.candidate_balanced:.1%}, "
            f"p = {verdict.balanced_p_value:.2g}",
            f"p > {alpha / 8:.3g}",
            verdict.balanced_p_value > alpha / 8,
        )
    )
    if rules.require_improvement:
        lacking = next((reason for reason in verdict.reasons if "did not improve" in reason), None)
        found.append(
            Check("accuracy has improved", lacking or "yes", f"p of chance at most {rules.alpha:.3g}", lacking is None)
        )
    return found


def difference(
    before: str,
    after: str,
    examples: Sequence[tuple[str, str]],
    first: Sequence[str | None],
    second: Sequence[str | None],
    *,
    same_encoder: bool = False,
    settings: ExamSettings | None = None,
) -> Difference:
    """What changes from one model's answers to another's. Pure.

    Args:
        examples: event id and label of each.
        first: the answers of `before`.
        second: the answers of `after`.
    """
    labels = [label for _, label in examples]
    there, back = examine(labels, first, second, settings=settings), examine(labels, second, first, settings=settings)
    better = {one.label for one in back.classes if one.outcome == "worse"}
    classes = []
    for one in there.classes:
        outcome: Literal["better", "worse", "not_worse", "unclear"] = "unclear"
        if one.label in better:
            outcome = "better"
        elif one.outcome != "not_enough":
            outcome = one.outcome
        recalls = one.champion_recall, one.candidate_recall
        classes.append(ClassChange(one.label, one.n, *recalls, one.lost, one.gained, outcome))
    changed = [
        Changed(event_id, label, old, new)
        for (event_id, label), old, new in zip(examples, first, second, strict=True)
        if old != new
    ]
    order = {"lost": 0, "gained": 1, "wrong": 2}
    return Difference(
        before,
        after,
        len(labels),
        (there.champion_accuracy, there.candidate_accuracy),
        tuple(sorted(classes, key=lambda one: (one.after - one.before, one.label))),
        tuple(sorted(changed, key=lambda one: (order[one.kind], one.label, one.event_id))),
        same_encoder,
    )


class Examiner:
    """Puts the exam's questions to versions and revisions again, for whoever wants to compare them.

    Args:
        store: the learner's database.
        registry: where weights lie.
        prior: of the stream's heads.
        random_features: width of the stream's heads.
        device: where encoders run.
        told: what is being done, in a sentence.
    """

    def __init__(
        self,
        store: LearnerStore,
        registry: Registry,
        *,
        prior: Literal["uniform", "sqrt", "empirical"] = "sqrt",
        random_features: int = 0,
        device: str = "cpu",
        told: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._store, self._registry, self._device, self._told = store, registry, device, told
        self._prior, self._random_features = prior, random_features
        self._embedded: dict[str, dict[str, npt.NDArray[np.int16]]] = {}

    def compare(self, stream: str, before: str, after: str, settings: ExamSettings | None = None) -> Difference:
        """How `after` answers otherwise than `before`, each a version or a revision.

        Raises:
            BrokenVersion: one of them is not whole any more, or there is none.
        """
        manifests = [self._registry.version(stream, name.partition(".")[0]) for name in (before, after)]
        for name, manifest in zip((before, after), manifests, strict=True):
            if "." not in name:
                self._registry.verify(stream, manifest.name)
        exam = self._store.examples(stream, exam=True)
        answers = [
            self._answers(stream, name, manifest, exam)
            for name, manifest in zip((before, after), manifests, strict=True)
        ]
        return difference(
            before,
            after,
            [(row.event_id, row.label) for row in exam],
            *answers,
            same_encoder=manifests[0].encoder_digest == manifests[1].encoder_digest,
            settings=settings,
        )

    def _answers(
        self, stream: str, name: str, manifest: VersionManifest, exam: Sequence[Example]
    ) -> Sequence[str | None]:
        if not exam:
            return []
        if "." in name:
            ref = self._registry.revision(stream, name)
            head = None if ref.head is None else LinearHead.from_tensors(self._registry.head(ref.head))
        else:
            head = self._taught(stream, manifest)
        if head is None:
            return [None] * len(exam)
        q = self._embed(manifest, exam, f"{len(exam)} exam examples")
        return head.predict(dequantise(q, manifest.encoder.bound).astype(np.float32))

    def _taught(self, stream: str, manifest: VersionManifest) -> LinearHead | None:
        """The head that the store's examples make under a version's encoder, as a rollback to it would."""
        rows = self._store.examples(stream, exam=False)
        sums = HeadSums(manifest.encoder.dimension, manifest.encoder.bound, self._random_features)
        if rows:
            q = self._embed(manifest, rows, f"{len(rows)} examples that teach its head")
            sums.add(q, [row.label for row in rows])
        return solve(sums, prior=self._prior)

    def _embed(self, manifest: VersionManifest, rows: Sequence[Example], what: str) -> npt.NDArray[np.int16]:
        """(n, d) under a version's encoder; those that the store has under it already cost nothing."""
        digest = manifest.encoder_digest
        known = self._embedded.setdefault(digest, {})
        known.update({row.event_id: row.embedding for row in rows if row.encoder == digest})
        missing = [row for row in rows if row.event_id not in known]
        if missing:
            self._told(f"embedding {what} under {manifest.name}")
            spec, files = self._registry.encoder(digest)
            encoder = load_encoder(spec, files, self._device)
            for start in range(0, len(missing), EMBED_AT_ONCE):
                some = missing[start : start + EMBED_AT_ONCE]
                q = quantise(encoder.embed([row.payload for row in some]), spec.bound)
                known.update({row.event_id: one for row, one in zip(some, q, strict=True)})
        return np.stack([known[row.event_id] for row in rows])
