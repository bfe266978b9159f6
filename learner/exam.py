"""The exam: may a candidate take the champion's place, class by class, on examples never trained on?

Both models answer the same examples, so only the answers that changed carry evidence. For one class, let
`lost` be the examples that only the champion has right and `gained` those that only the candidate has.
Were the two equally good, each changed answer would be lost or gained with probability 1/2, and the chance
of `lost` or more of them is an exact one-sided sign test (McNemar 1947). Each class comes out as one of

- *worse*: the test is significant after correction for the number of classes, and recall fell by more than
  the budget; or the class collapsed: the candidate has none of it right where the champion had most.
- *not worse*: with the stated confidence recall fell by less than the budget (Newcombe 1998, "Improved
  confidence intervals for the difference between binomial proportions based on paired data",
  Statistics in Medicine 17, method 10, one-sided).
- *not enough*: the examples tell neither. With a budget of 0.05, fewer than 52 show at best that recall rose.

The correction is the exact distribution of the smallest p value of all classes, step by step (Westfall and
Wolfinger 1997, "Multiple tests with discrete distributions", The American Statistician 51): with ten changed
answers a class has eleven p values to choose from, with three it has four, and none that counts where even all
three lost would lie within the budget. How many changed says nothing of their direction, so to use it is free,
and it is what lets one class that fell by ten points be seen among 150. Classes too small to be judged alone are
judged together as well, as a pooled group. Which classes those are depends on their number of examples alone;
choosing them by their result would bias it.

Accuracy counts each example alike, balanced accuracy each class. Both are tested, the second by turning the
direction of every changed answer at random (Phipson and Smyth 2010, "Permutation p-values should never be
zero", Statistical Applications in Genetics and Molecular Biology 9), with a fixed seed.

A class too young to give examples to the exam may be judged on examples that its head was taught, each answered
by a head that leaves it out. Encoders may have been trained on them, which flatters the candidate: so such a
class can be found worse, never cleared.

The chance that a candidate as good as the champion is refused is `alpha` at most: half of it is spent on the
classes, an eighth each on accuracy and balanced accuracy, a quarter on the pooled group. It holds over all times
that one candidate is examined again as labels arrive, because each look spends a part of it only; see `spent`.
Collapsed classes come on top, on purpose.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import betainc, ndtri

Outcome = Literal["worse", "not_worse", "not_enough"]
STILL = 10
"""A class's change counts as if it had so many more examples whose answers stayed: one example is no evidence."""
BETTER = 0.05
"""From this one-sided p on a revision counts as better than the best so far."""
NAMED = 10
"""How many classes a reason names before it counts the rest."""
FIRST_LOOK = 0.9
"""The first look's part of alpha: nearly every candidate is examined once."""
TURNS = 9_999
"""Random turns behind the p value of balanced accuracy, which so is 0.0001 at best."""


class ExamSettings(BaseModel):
    """What a candidate must show."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(default=0.05, ge=0, le=1, description="largest fall of a class's recall that is allowed")
    pooled_budget: float = Field(
        default=0.02, ge=0, le=1, description="largest fall of the recall of all small classes together"
    )
    alpha: float = Field(
        default=0.05, gt=0, le=0.5, description="chance at most that a candidate as good as the champion is refused"
    )
    confidence: float = Field(default=0.95, ge=0.5, lt=1, description="one-sided confidence of every stated bound")
    collapse_examples: int = Field(
        default=3,
        ge=1,
        description="a class with as many examples may be found collapsed: the candidate has none right",
    )
    collapse_always: int = Field(
        default=5, ge=1, description="... with as many it always is, with fewer unless losses are common in all classes"
    )
    collapse_recall: float = Field(default=0.5, ge=0, lt=1, description="... and the champion more than this share")
    minimum_examples: int = Field(default=1, ge=1, description="fewer examples in all, and nothing is promoted")
    require_improvement: bool = Field(
        default=False, description="promote only what is significantly better, not what is as good"
    )
    recent: timedelta | None = Field(
        default=None,
        gt=timedelta(0),
        description="examine on examples observed within this time of the newest, so that the world as it was does "
        "not speak against right adaptation; all of them when left out",
    )
    recent_least: int = Field(
        default=20, ge=1, description="... but never on fewer of a class than its newest this many, old or not"
    )

    @property
    def judged_from(self) -> int:
        """The fewest examples with which a class whose answers are all as they were comes out as not worse."""
        if self.budget in (0.0, 1.0):
            return 1 if self.budget else 10**9
        z2 = float(ndtri(self.confidence)) ** 2
        return math.ceil(z2 * (1 - self.budget) / self.budget)


class ClassOutcome(BaseModel):
    """One class in an exam.

    Args:
        label: the class.
        n: its examples.
        left_out: its examples are ones that both heads were taught, each answered by heads that left it out.
        lost: those that only the champion has right.
        gained: those that only the candidate has right.
        p_value: exact one-sided p of "the candidate is no worse", not corrected for the number of classes.
        fall: champion's recall minus the candidate's.
        fall_bound: the fall is below this with the settings' confidence.
    """

    model_config = ConfigDict(frozen=True)

    label: str
    n: int
    lost: int
    gained: int
    champion_recall: float
    candidate_recall: float
    p_value: float
    fall_bound: float
    outcome: Outcome
    left_out: bool = False

    @property
    def fall(self) -> float:
        """How far recall fell; negative where it rose."""
        return self.champion_recall - self.candidate_recall


class PooledOutcome(BaseModel):
    """All classes with fewer than `ExamSettings.judged_from` examples, together; fields as in `ClassOutcome`.

    Args:
        classes: how many classes are in it.
    """

    model_config = ConfigDict(frozen=True)

    classes: int
    n: int
    lost: int
    gained: int
    champion_recall: float
    candidate_recall: float
    p_value: float
    fall_bound: float
    outcome: Outcome

    @property
    def fall(self) -> float:
        """How far the recall of all its examples fell; negative where it rose."""
        return self.champion_recall - self.candidate_recall


class Verdict(BaseModel):
    """The outcome of an exam, with all its numbers; kept in the version's manifest.

    Args:
        reasons: in words, what decided first.
        n: examples.
        accuracy_p_value: exact one-sided p of "the candidate is no worse".
        accuracy_fall_bound: accuracy fell by less than this with the settings' confidence.
        balanced_p_value: the same of balanced accuracy, the mean of the classes' recalls.
        look: how often this candidate has been examined against this champion.
        classes: every class of the exam, sorted.
        judged: the classes that came out as worse or not worse.
        unjudged: the classes whose examples were not enough, and known classes without any.
    """

    model_config = ConfigDict(frozen=True)

    promote: bool
    reasons: list[str]
    n: int
    champion_accuracy: float
    candidate_accuracy: float
    accuracy_p_value: float
    accuracy_fall_bound: float
    champion_balanced: float = 0.0
    candidate_balanced: float = 0.0
    balanced_p_value: float = 1.0
    look: int = 1
    classes: list[ClassOutcome]
    pooled: PooledOutcome | None
    judged: list[str]
    unjudged: list[str]
    settings: ExamSettings


class LeftOut(BaseModel):
    """Both models' answers to examples that their heads were taught, each by a head that leaves it out.

    See `heads.leave_one_out`; None where the example is all that was ever taught.
    """

    model_config = ConfigDict(frozen=True)

    labels: list[str] = []
    champion: list[str | None] = []
    candidate: list[str | None] = []


def recent(labels: Sequence[str], observed_at: Sequence[datetime], settings: ExamSettings) -> list[int]:
    """Which examples the exam is to be held on: positions, in order. Pure.

    A class that has become rare keeps its newest few however old they are, so that it stays protected.
    """
    if settings.recent is None or not labels:
        return list(range(len(labels)))
    since = max(observed_at) - settings.recent
    newest = sorted(range(len(labels)), key=lambda row: (observed_at[row], row), reverse=True)
    seen: Counter[str] = Counter()
    kept = []
    for row in newest:
        seen[labels[row]] += 1
        if observed_at[row] >= since or seen[labels[row]] <= settings.recent_least:
            kept.append(row)
    return sorted(kept)


def spent(alpha: float, look: int) -> float:
    """The part of alpha that the `look`-th examination of one candidate may spend; over all looks it is alpha.

    However often it is looked at, and whatever made someone look again, the chances add up to no more.
    """
    if look < 1:
        raise ValueError(f"looks are counted from 1, found {look}")
    if look == 1:
        return FIRST_LOOK * alpha
    return (1 - FIRST_LOOK) * alpha * 6 / (math.pi * (look - 1)) ** 2


def examine(
    labels: Sequence[str],
    champion: Sequence[str | None],
    candidate: Sequence[str | None],
    *,
    champion_classes: Collection[str] = (),
    candidate_classes: Collection[str] | None = None,
    left_out: LeftOut | None = None,
    look: int = 1,
    settings: ExamSettings | None = None,
) -> Verdict:
    """Judge a candidate by both models' answers to the same examples. Pure.

    Args:
        labels: the n true classes.
        champion: the champion's n answers; None where it had none.
        candidate: the candidate's n answers; None where it had none, or where a number in it was not finite,
            which refuses it.
        champion_classes: the classes that the champion can answer.
        candidate_classes: the classes that the candidate can answer; one that lacks a class of the champion is
            refused. None where they are not known.
        left_out: examples of classes that have none in the exam; of the others they are left aside.
        look: the how manieth time this candidate is examined against this champion, from 1.

    Raises:
        ValueError: the three sequences differ in length.
    """
    rules = settings or ExamSettings()
    alpha = spent(rules.alpha, look)
    pairs = _pairs_by_class(labels, champion, candidate)
    young = left_out or LeftOut()
    beside = _pairs_by_class(young.labels, young.champion, young.candidate)
    beside = {name: pair for name, pair in beside.items() if name not in pairs}
    overall = _together(pairs.values())
    classes = _judge_classes(pairs, rules, alpha, beside)
    pooled = _judge_pool([pair for pair in pairs.values() if pair.n < rules.judged_from], rules, alpha)
    was, now = _balanced(pairs.values())
    balanced_p_value = _turned(pairs)

    refusals = _unusable(overall, candidate, champion_classes, candidate_classes, rules)
    refusals += _class_refusals(classes)
    if overall.p_value <= alpha / 8:
        refusals.append(
            f"accuracy fell significantly, from {overall.was:.1%} to {overall.now:.1%} on {overall.n} examples "
            f"({overall.lost} lost, {overall.gained} gained, p = {overall.p_value:.2g})"
        )
    if pooled is not None and pooled.outcome == "worse":
        refusals.append(
            f"the {_count(pooled.classes, 'small class', 'small classes')} together fell from "
            f"{pooled.champion_recall:.1%} to {pooled.candidate_recall:.1%} on {pooled.n} examples, beyond the "
            f"budget of {rules.pooled_budget:.1%} (p = {pooled.p_value:.2g})"
        )
    if balanced_p_value <= alpha / 8:
        refusals.append(
            f"the mean of the {_count(len(pairs), 'class', 'classes')}' recalls fell significantly, from {was:.1%} "
            f"to {now:.1%} (p = {balanced_p_value:.2g})"
        )
    if rules.require_improvement and overall.n and overall.p_value_better > rules.alpha:
        refusals.append(
            f"accuracy did not improve significantly: from {overall.was:.1%} to {overall.now:.1%} "
            f"(p = {overall.p_value_better:.2g}), and the settings require it"
        )
    silent = sorted((set(champion_classes) | set(candidate_classes or ())) - set(pairs))
    unjudged = sorted({outcome.label for outcome in classes if outcome.outcome == "not_enough"} | set(silent))
    bound = overall.bound(rules.confidence)
    return Verdict(
        promote=not refusals,
        reasons=refusals or _grounds(overall, bound, classes, pooled, unjudged, rules),
        n=overall.n,
        champion_accuracy=overall.was,
        candidate_accuracy=overall.now,
        accuracy_p_value=overall.p_value,
        accuracy_fall_bound=bound,
        champion_balanced=was,
        candidate_balanced=now,
        balanced_p_value=balanced_p_value,
        look=look,
        classes=classes,
        pooled=pooled,
        judged=[outcome.label for outcome in classes if outcome.outcome != "not_enough"],
        unjudged=unjudged,
        settings=rules,
    )


class GuardSettings(BaseModel):
    """When a revision is held instead of announced."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(default=0.05, ge=0, le=1, description="largest fall of a class's recall that is allowed")
    alpha: float = Field(
        default=0.001, gt=0, le=0.5, description="chance at most that a revision as good as the last one is held"
    )
    collapse_examples: int = Field(
        default=5, ge=1, description="a class with as many examples holds the revision when none is right any more"
    )
    share_jump: float = Field(
        default=0.2, gt=0, le=1, description="largest rise of a class's share of the answers that is not borne out"
    )
    share_examples: int = Field(default=30, ge=1, description="shares are compared from as many examples on")
    decline: bool = Field(
        default=True, description="compare with the best revision so far too, and not only with the one before"
    )


def guard_revision(
    labels: Sequence[str | None],
    previous: Sequence[str | None],
    new: Sequence[str | None],
    *,
    new_classes: Collection[str] = (),
    settings: GuardSettings | None = None,
) -> list[str]:
    """Why a revision is to be held back; empty where it may be announced. Pure, and cheap enough for each one.

    `previous` are the answers of the revision announced last: what broke just now is found here, what slips away
    in many small steps by `guard_decline`. A class that fell but is not gone is a reason only where more was lost than
    gained, as there: a stream that is shown one class after another would else be held at the first of them for ever.

    Args:
        labels: the true class of each example of a small held set, or None for recent events without a label,
            which only count towards the shares.
        previous: the earlier head's answers.
        new: the new head's answers; None where a number in it was not finite.
        new_classes: classes that are only now being learned, whose share may rise.

    Raises:
        ValueError: the three sequences differ in length.
    """
    rules = settings or GuardSettings()
    if not len(labels) == len(previous) == len(new):
        raise ValueError(f"{len(labels)} labels, {len(previous)} and {len(new)} answers: all must be as many")
    held = []
    if (unanswered := sum(answer is None for answer in new)) > sum(answer is None for answer in previous):
        held.append(f"{_count(unanswered, 'answer is', 'answers are')} missing or not finite")

    known = [row for row in zip(labels, previous, new, strict=True) if row[0] is not None]
    truth = [label for label, _, _ in known if label is not None]
    pairs = _pairs_by_class(truth, [old for _, old, _ in known], [now for _, _, now in known])
    exam = ExamSettings(budget=rules.budget, alpha=min(0.5, 2 * rules.alpha), collapse_examples=rules.collapse_examples)
    # A class that is gone is held whatever was gained for it; one that gave way to others, where it was not worth it.
    lower = _lower(pairs.values())
    held += _class_refusals([c for c in _judge_classes(pairs, exam, exam.alpha) if lower or c.candidate_recall == 0])

    if len(labels) >= rules.share_examples:
        before, after = Counter(previous), Counter(new)
        for name in sorted(answer for answer in after if answer is not None and answer not in new_classes):
            borne_out = max(0, pairs[name].gained - pairs[name].lost) if name in pairs else 0
            rise = (after[name] - before[name] - borne_out) / len(labels)
            if rise > rules.share_jump:
                held.append(
                    f"class {name!r} jumped from {before[name] / len(labels):.0%} to {after[name] / len(labels):.0%} "
                    f"of the answers to {len(labels)} events, which their labels do not bear out"
                )
    return held


def _lower(pairs: Collection[_Pairs]) -> bool:
    """Whether more was lost than gained, over all examples and averaged over the classes."""
    overall = _together(pairs)
    by_class = sum((pair.lost - pair.gained) / (pair.n + STILL) for pair in pairs)
    return overall.lost > overall.gained and by_class > 0


def guard_decline(
    labels: Sequence[str],
    best: Sequence[str | None],
    new: Sequence[str | None],
    *,
    settings: GuardSettings | None = None,
) -> tuple[list[str], bool]:
    """What slipped away in many small steps since the best revision so far. Pure.

    A class that fell beyond the budget, significantly, is a reason only where more was lost than was gained, over all
    examples and over all classes alike. Where the world changed, or a new class took its share from an old one, as much
    is gained on the newer examples as is lost on the older. And where rare classes come to be answered at the cost of
    the commonest, more examples are lost than gained and recall, averaged over the classes, rises. Neither is held.
    What is not seen is a class that is unlearned while others gain as much.

    Args:
        labels: the true class of each example of a small held set, the same for both heads.
        best: the answers of the best revision so far.
        new: the new head's.

    Returns:
        Why the new head is to be held, empty where it may be announced; and whether it is significantly better
        than the best so far, and so the next to compare with. One that only looks better is not: the best of many
        noisy numbers is too high.

    Raises:
        ValueError: the three sequences differ in length.
    """
    rules = settings or GuardSettings()
    pairs = _pairs_by_class(labels, best, new)
    overall = _together(pairs.values())
    exam = ExamSettings(budget=rules.budget, alpha=min(0.5, 2 * rules.alpha), collapse_examples=rules.collapse_examples)
    held = _class_refusals(_judge_classes(pairs, exam, exam.alpha)) if _lower(pairs.values()) else []
    if overall.p_value <= rules.alpha and overall.fall > rules.budget:
        held.append(f"accuracy fell from {overall.was:.1%} to {overall.now:.1%} of {overall.n} examples")
    return [f"{reason}, since the best revision so far" for reason in held], overall.p_value_better <= BETTER


class ForgettingTable(BaseModel):
    """Each class's best recall so far and its recall now, both in [0, 1].

    Forgetting is their difference (Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", section 3).

    Args:
        minimum: a recall from fewer examples than this is not noted: the best of many noisy numbers is too high.
    """

    best: dict[str, float] = {}
    now: dict[str, float] = {}
    minimum: int = 5

    def note(self, right: Mapping[str, int], examples: Mapping[str, int]) -> None:
        """Take one measurement: how many of each class's examples were answered right."""
        for name, n in examples.items():
            if n >= self.minimum:
                self.now[name] = right.get(name, 0) / n
                self.best[name] = max(self.best.get(name, 0.0), self.now[name])

    def note_verdict(self, verdict: Verdict, promoted: bool) -> None:
        """Take the recalls of an exam: the candidate's where it was promoted, else the champion's."""
        recall = {c.label: (c.candidate_recall if promoted else c.champion_recall, c.n) for c in verdict.classes}
        self.note({name: round(r * n) for name, (r, n) in recall.items()}, {name: n for name, (_, n) in recall.items()})

    def forgetting(self) -> dict[str, float]:
        """Best minus now of every class, never negative."""
        return {name: max(0.0, best - self.now.get(name, 0.0)) for name, best in sorted(self.best.items())}

    def worst(self, count: int = 20) -> tuple[dict[str, float], float]:
        """The most forgotten classes, worst first, and the mean of all others (0 where there are none)."""
        ranked = sorted(self.forgetting().items(), key=lambda item: (-item[1], item[0]))
        rest = [value for _, value in ranked[count:]]
        return dict(ranked[:count]), sum(rest) / len(rest) if rest else 0.0


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Paired answers to n examples: both right, only the champion, only the candidate, neither."""

    both: int
    lost: int
    gained: int
    neither: int

    def __add__(self, other: _Pairs) -> _Pairs:
        return _Pairs(
            self.both + other.both, self.lost + other.lost, self.gained + other.gained, self.neither + other.neither
        )

    @property
    def n(self) -> int:
        return self.both + self.lost + self.gained + self.neither

    @property
    def was(self) -> float:
        return (self.both + self.lost) / self.n if self.n else 0.0

    @property
    def now(self) -> float:
        return (self.both + self.gained) / self.n if self.n else 0.0

    @property
    def fall(self) -> float:
        return (self.lost - self.gained) / self.n if self.n else 0.0

    @property
    def changed(self) -> int:
        return self.lost + self.gained

    @property
    def p_value(self) -> float:
        return _at_least(self.lost, self.changed)

    @property
    def p_value_better(self) -> float:
        return _at_least(self.gained, self.changed)

    def beyond(self, budget: float) -> int:
        """The fewest of the changed answers that must be lost for recall to fall by more than the budget."""
        allowed = math.floor(budget * self.n + 1e-9)
        return (self.changed + allowed) // 2 + 1

    def bound(self, confidence: float) -> float:
        """Upper bound of the fall: Newcombe's method 10, score intervals joined by the pairs' correlation."""
        n = self.n
        if not n:
            return 1.0
        z = float(ndtri(confidence))
        _, upper = _wilson(self.both + self.lost, n, z)
        lower, _ = _wilson(self.both + self.gained, n, z)
        up, down = upper - self.was, self.now - lower
        squares = up * up - 2 * self._correlation() * up * down + down * down
        return min(1.0, self.fall + math.sqrt(max(0.0, squares)))

    def _correlation(self) -> float:
        margins = (
            (self.both + self.lost)
            * (self.gained + self.neither)
            * (self.both + self.gained)
            * (self.lost + self.neither)
        )
        if not margins:
            return 0.0
        cross = float(self.both * self.neither - self.lost * self.gained)
        return (max(0.0, cross - self.n / 2) if cross > 0 else cross) / math.sqrt(margins)


def _pairs_by_class(
    labels: Sequence[str], champion: Sequence[str | None], candidate: Sequence[str | None]
) -> dict[str, _Pairs]:
    if not len(labels) == len(champion) == len(candidate):
        raise ValueError(f"{len(labels)} labels, {len(champion)} and {len(candidate)} answers: all must be as many")
    counts = Counter(
        (label, old == label, now == label) for label, old, now in zip(labels, champion, candidate, strict=True)
    )
    cells = ((True, True), (True, False), (False, True), (False, False))
    return {name: _Pairs(*(counts[name, old, now] for old, now in cells)) for name in sorted(set(labels))}


def _together(pairs: Iterable[_Pairs]) -> _Pairs:
    return sum(pairs, start=_Pairs(0, 0, 0, 0))


def _judge_classes(
    pairs: Mapping[str, _Pairs], rules: ExamSettings, alpha: float, left_out: Mapping[str, _Pairs] | None = None
) -> list[ClassOutcome]:
    """Every class of the exam, and after them those whose examples were left out, all as one family of tests."""
    beside = left_out or {}
    every = {**pairs, **beside}
    overall = _together(every.values())
    significant = _significant(every, rules.budget, alpha / 2)
    outcomes = []
    for name, pair in every.items():
        bound = pair.bound(rules.confidence)
        outcome: Outcome = "not_enough"
        if _collapsed(pair, overall, len(every), rules) or name in significant:
            outcome = "worse"
        elif bound <= rules.budget and name not in beside:
            outcome = "not_worse"
        outcomes.append(
            ClassOutcome(
                label=name,
                n=pair.n,
                lost=pair.lost,
                gained=pair.gained,
                champion_recall=pair.was,
                candidate_recall=pair.now,
                p_value=pair.p_value,
                fall_bound=bound,
                outcome=outcome,
                left_out=name in beside,
            )
        )
    return outcomes


def _collapsed(pair: _Pairs, overall: _Pairs, classes: int, rules: ExamSettings) -> bool:
    """Whether the champion had most of a class right and the candidate has none.

    Of three examples two or three go wrong by chance in one of 150 classes, if one answer in ten changes. So
    with few examples the chance is asked for, at the rate at which right answers were lost in the other classes.
    """
    if pair.n < rules.collapse_examples or pair.now > 0 or pair.was <= rules.collapse_recall:
        return False
    if pair.n >= rules.collapse_always:
        return True
    lost, held = overall.lost - pair.lost, overall.lost + overall.both - pair.lost - pair.both
    return classes * ((lost / held) ** pair.lost if held else 0.0) <= rules.alpha


def _judge_pool(small: Sequence[_Pairs], rules: ExamSettings, alpha: float) -> PooledOutcome | None:
    if not small:
        return None
    pool = _together(small)
    bound = pool.bound(rules.confidence)
    outcome: Outcome = "not_enough"
    if pool.p_value <= alpha / 4 and pool.fall > rules.pooled_budget:
        outcome = "worse"
    elif bound <= rules.pooled_budget:
        outcome = "not_worse"
    return PooledOutcome(
        classes=len(small),
        n=pool.n,
        lost=pool.lost,
        gained=pool.gained,
        champion_recall=pool.was,
        candidate_recall=pool.now,
        p_value=pool.p_value,
        fall_bound=bound,
        outcome=outcome,
    )


def _significant(pairs: Mapping[str, _Pairs], budget: float, alpha: float) -> set[str]:
    """The classes that are worse beyond the budget, at a chance of alpha at most that one is named wrongly.

    Given how many answers changed, each class's chance of a p value this small *and* a fall beyond the budget is
    known exactly. One after another, smallest p first, each must be smaller than chance gives the smallest of all
    that are left.
    """
    tails = {changed: _tail(changed) for changed in {pair.changed for pair in pairs.values()}}
    fewest = {name: pair.beyond(budget) for name, pair in pairs.items()}
    left = Counter((pair.changed, fewest[name]) for name, pair in pairs.items() if fewest[name] <= pair.changed)
    fallen = sorted((pair.p_value, name) for name, pair in pairs.items() if pair.lost >= fewest[name])
    significant = set()
    for p, name in fallen:
        spared = 1.0
        for (changed, least), many in left.items():
            tail = tails[changed]
            # Tails fall with k; the slack lets a class's own p count as reached.
            k = max(least, int(np.searchsorted(-tail, -p * (1 + 1e-12))))
            if k <= changed:
                spared *= (1.0 - float(tail[k])) ** many
        if 1.0 - spared > alpha:
            break
        significant.add(name)
        pair = pairs[name]
        left[pair.changed, fewest[name]] -= 1
    return significant


def _tail(n: int) -> npt.NDArray[np.float64]:
    """P(X >= k) for X of Bin(n, 1/2), for k from 0 to n."""
    return np.array([_at_least(k, n) for k in range(n + 1)])


def _balanced(pairs: Collection[_Pairs]) -> tuple[float, float]:
    """The mean of the classes' recalls, before and now."""
    if not pairs:
        return 0.0, 0.0
    return sum(pair.was for pair in pairs) / len(pairs), sum(pair.now for pair in pairs) / len(pairs)


def _turned(pairs: Mapping[str, _Pairs]) -> float:
    """One-sided p of a fall of balanced accuracy: how often it falls as far when each change is turned at random."""
    changed = [pair for _, pair in sorted(pairs.items()) if pair.changed]
    if not changed:
        return 1.0
    many = np.array([pair.changed for pair in changed])
    weight = np.array([1.0 / pair.n for pair in changed])
    fall = float(np.sum(weight * np.array([pair.lost - pair.gained for pair in changed])))
    if fall <= 0:
        return 1.0
    draws = np.random.default_rng(0)
    as_far = 0
    for start in range(0, TURNS, 1_000):
        lost = draws.binomial(many, 0.5, size=(min(1_000, TURNS - start), len(many)))
        as_far += int(((2 * lost - many) @ weight >= fall - 1e-9).sum())
    return (1 + as_far) / (1 + TURNS)


def _at_least(k: int, n: int) -> float:
    """P(X >= k) for X of Bin(n, 1/2), exact to the last bits of a float."""
    return float(betainc(k, n - k + 1, 0.5)) if k else 1.0


def _wilson(k: int, n: int, z: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion k/n."""
    z2 = z * z
    middle = (k + z2 / 2) / (n + z2)
    half = z / (n + z2) * math.sqrt(k * (n - k) / n + z2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def _unusable(
    overall: _Pairs,
    candidate: Sequence[str | None],
    champion_classes: Collection[str],
    candidate_classes: Collection[str] | None,
    rules: ExamSettings,
) -> list[str]:
    reasons = []
    if overall.n < rules.minimum_examples:
        reasons.append(f"the exam has {overall.n} examples, at least {rules.minimum_examples} are needed")
    if (silent := sum(answer is None for answer in candidate)) > 0:
        reasons.append(f"the candidate gave no finite answer to {silent} of {overall.n} examples")
    if candidate_classes is not None and (missing := sorted(set(champion_classes) - set(candidate_classes))):
        reasons.append(f"the candidate cannot answer {_names(missing)}, which the champion knows")
    return reasons


def _class_refusals(classes: Sequence[ClassOutcome]) -> list[str]:
    worse = sorted((c for c in classes if c.outcome == "worse"), key=lambda c: (-c.fall, c.label))
    reasons = []
    for c in worse[:NAMED]:
        fell = f"from {round(c.champion_recall * c.n)} to {round(c.candidate_recall * c.n)} right of {c.n}"
        if c.left_out:
            fell += ", each left out of the heads that answered it"
        if c.candidate_recall == 0:
            reasons.append(f"class {c.label!r} is forgotten: {fell}")
        else:
            reasons.append(f"class {c.label!r} is worse: {fell} (p = {c.p_value:.2g}, significant among all classes)")
    if len(worse) > NAMED:
        reasons.append(f"and {len(worse) - NAMED} more classes are worse")
    return reasons


def _grounds(
    overall: _Pairs,
    bound: float,
    classes: Sequence[ClassOutcome],
    pooled: PooledOutcome | None,
    unjudged: Sequence[str],
    rules: ExamSettings,
) -> list[str]:
    sure = f"{rules.confidence:.0%} sure"
    first = f"accuracy went from {overall.was:.1%} to {overall.now:.1%} on {overall.n} examples"
    changed = f"({overall.lost} lost, {overall.gained} gained)"
    reasons = [f"{first} {changed}; {sure} that it fell by no more than {max(0.0, bound):.1%}"]
    if cleared := sum(c.outcome == "not_worse" for c in classes):
        reasons.append(f"{_count(cleared, 'class is', 'classes are')} not worse within {rules.budget:.1%}, each {sure}")
    if pooled is not None:
        reasons.append(
            f"{_count(pooled.classes, 'class', 'classes')} with fewer than {rules.judged_from} examples, together "
            f"{pooled.n}, went from {pooled.champion_recall:.1%} to {pooled.candidate_recall:.1%}; {sure} that they "
            f"fell by no more than {max(0.0, pooled.fall_bound):.1%} on average"
        )
    if unjudged:
        reasons.append(f"could not be judged one by one: {_names(unjudged)}")
    return reasons


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
