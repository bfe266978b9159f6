"""What do labels that one cannot trust cost? ``python -m benchmarks.labels``.

Two labellers, ann and bob, teach CLINC150's 150 classes from nothing, 20 labels a class, in a random order; then
the head answers the test questions. The learner that ships is run, without Kafka and without fine-tunes: the
same messages, join, store, head and review, with the default settings. Where bob misleads, three are compared:

- `trimtab`: as it comes, `trust` on;
- `no_defence`: the same with `trust: {enabled: false}`;
- `oracle`: the same, and nobody ever sends the wrong labels.

Then come worlds in which nobody lies, to see whom trimtab suspects all the same: labellers who take turns, who
know half of the classes each, a class of odds and ends (CLINC150's out-of-scope questions) that bob alone gives
and that comes late, classes that change their names with each other half-way, classes that come one after another.

`quarantined` counts labels set aside at the end, `honest_quarantined` those of them that were right; both are
sums over the seeds, `accuracy` is the mean.
"""

from __future__ import annotations

import gzip
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.learning.live import STREAM, EmbeddingCache, Live
from benchmarks.report import Result, Row, machine, options, publish, versions

DATA = Path("../shared/data/clinc150.jsonl.gz")
CACHE = Path(".cache") / "learning" / "embeddings"
EACH = 20
FLIPPED = 0.2
BURST = 200
OUT_OF_SCOPE = "oos"

Chance = np.random.Generator
Names = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Questions:
    """Texts and labels, and which of them teach and which test."""

    texts: list[str]
    labels: Names
    taught: npt.NDArray[np.intp]
    tested: npt.NDArray[np.intp]

    @property
    def classes(self) -> Names:
        """The classes, sorted, without the out-of-scope one."""
        return np.unique(self.labels[self.tested])


@dataclass
class Said:
    """Labels in the order in which they are given.

    Args:
        rows: of the questions; a question that two answer is there twice.
        labels: what is said.
        who: by whom.
        wrong: whether it is a lie.
    """

    rows: npt.NDArray[np.intp]
    labels: Names
    who: Names
    wrong: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    accuracy: float
    quarantined: int
    honest_quarantined: int
    suspects: int


World = Callable[[Questions, Chance], Said]


def honest(questions: Questions, chance: Chance, each: int = EACH) -> Said:
    """Either labeller, by chance, and always right."""
    rows = np.concatenate(
        [
            chance.permutation(questions.taught[questions.labels[questions.taught] == name])[:each]
            for name in questions.classes
        ]
    )
    rows = chance.permutation(rows)
    who = np.where(chance.random(len(rows)) < 0.5, "ann", "bob")
    return Said(rows, questions.labels[rows].astype("<U100"), who, np.zeros(len(rows), dtype=bool))


def flipped(questions: Questions, chance: Chance, since: float = 0.0) -> Said:
    """Every fifth label of bob's names any other class."""
    said = honest(questions, chance)
    lies = (said.who == "bob") & (chance.random(len(said.rows)) < FLIPPED)
    lies[: int(since * len(lies))] = False
    return _lie(said, lies, lambda true: str(chance.choice(questions.classes[questions.classes != true])))


def turned(questions: Questions, chance: Chance) -> Said:
    """From half-way on bob takes every class for its neighbour in the alphabet."""
    said = honest(questions, chance)
    lies = said.who == "bob"
    lies[: len(lies) // 2] = False
    after = dict(zip(questions.classes, np.roll(questions.classes, -1), strict=True))
    return _lie(said, lies, lambda true: str(after[np.str_(true)]))


def burst(questions: Questions, chance: Chance) -> Said:
    """From half-way on 200 labels of bob's in a row all name one class."""
    said = honest(questions, chance)
    name = str(chance.choice(questions.classes))
    bobs = np.flatnonzero((said.who == "bob") & (said.labels != name))
    lies = np.zeros(len(said.rows), dtype=bool)
    lies[bobs[bobs >= len(said.rows) // 2][:BURST]] = True
    return _lie(said, lies, lambda true: name)


def disagreeing(questions: Questions, chance: Chance) -> Said:
    """Both label every question, bob after ann, so that his label counts; every fifth of his names any other class."""
    said = honest(questions, chance)
    twice = Said(
        np.repeat(said.rows, 2),
        np.repeat(said.labels, 2),
        np.tile(np.array(["ann", "bob"]), len(said.rows)),
        np.zeros(2 * len(said.rows), dtype=bool),
    )
    lies = (twice.who == "bob") & (chance.random(len(twice.rows)) < FLIPPED)
    return _lie(twice, lies, lambda true: str(chance.choice(questions.classes[questions.classes != true])))


def _lie(said: Said, lies: npt.NDArray[np.bool_], name: Callable[[str], str]) -> Said:
    for row in np.flatnonzero(lies):
        said.labels[row] = name(str(said.labels[row]))
    said.wrong = lies
    return said


def taking_turns(questions: Questions, chance: Chance) -> Said:
    """One labels 300 questions, then the other."""
    said = honest(questions, chance)
    said.who = np.where(np.arange(len(said.rows)) // 300 % 2, "bob", "ann")
    return said


def experts(questions: Questions, chance: Chance) -> Said:
    """Each gives the labels of half of the classes, but for one label in seven."""
    said = honest(questions, chance)
    anns = set(chance.permutation(questions.classes)[: len(questions.classes) // 2])
    mine = np.array([name in anns for name in said.labels]) ^ (chance.random(len(said.rows)) < 1 / 7)
    said.who = np.where(mine, "ann", "bob")
    return said


def odds_and_ends(questions: Questions, chance: Chance) -> Said:
    """From half-way on bob alone also labels questions of no class, and rightly so."""
    said = honest(questions, chance)
    half = len(said.rows) // 2
    extra = chance.permutation(np.flatnonzero(questions.labels == OUT_OF_SCOPE))[:300]
    at = np.sort(chance.integers(half, len(said.rows), len(extra)))
    return Said(
        np.insert(said.rows, at, extra),
        np.insert(said.labels, at, OUT_OF_SCOPE),
        np.insert(said.who, at, "bob"),
        np.zeros(len(said.rows) + len(extra), dtype=bool),
    )


def names_change(questions: Questions, chance: Chance) -> Said:
    """From half-way on twenty classes go by each other's names, for both labellers."""
    said = honest(questions, chance)
    moved = chance.permutation(questions.classes)[:20]
    after = dict(zip(moved, np.roll(moved, 1), strict=True))
    for row in range(len(said.rows) // 2, len(said.rows)):
        said.labels[row] = after.get(said.labels[row], said.labels[row])
    return said


def one_after_another(questions: Questions, chance: Chance) -> Said:
    """Ten times fifteen new classes."""
    said = honest(questions, chance)
    wave = dict(zip(chance.permutation(questions.classes), np.arange(len(questions.classes)) // 15, strict=True))
    order = np.argsort([wave[name] for name in said.labels], kind="stable")
    return Said(said.rows[order], said.labels[order], said.who[order], said.wrong)


MISLED: dict[str, World] = {
    "bob flips a fifth": flipped,
    "bob flips a fifth since half-way": lambda questions, chance: flipped(questions, chance, since=0.5),
    "both label all, bob flips a fifth": disagreeing,
    "bob takes each class for another since half-way": turned,
    "200 labels in a row poison one class": burst,
}
HONEST: dict[str, World] = {
    "honest": honest,
    "honest, taking turns": taking_turns,
    "honest, each with classes of its own": experts,
    "honest, a late class of odds and ends": odds_and_ends,
    "honest, twenty names change": names_change,
    "honest, classes one after another": one_after_another,
}


@dataclass
class Trial:
    """Runs worlds through the learner.

    Args:
        cache: of embeddings.
    """

    questions: Questions
    cache: EmbeddingCache
    outcomes: dict[tuple[str, str], list[Outcome]] = field(default_factory=lambda: defaultdict(list))

    def run(self, name: str, world: str, said: Said, *, trust: bool = True, lies: bool = True) -> None:
        """Teach one learner from nothing, ask it, and keep what came of it."""
        kept = np.ones(len(said.rows), dtype=bool) if lies else ~said.wrong
        rows, labels, who = said.rows[kept], said.labels[kept], said.who[kept]
        live = Live("text", overrides={"trust": {"enabled": trust}}, finetune=False, cache=self.cache)
        try:
            for start in range(0, len(rows), 100):
                part = range(start, min(start + 100, len(rows)))
                first = {int(rows[at]): None for at in part}
                live.serve(list(first), [self.questions.texts[row] for row in first])
                live.label(
                    [int(rows[at]) for at in part], [str(labels[at]) for at in part], [str(who[at]) for at in part]
                )
            tested = self.questions.tested
            answers = live.ask([self.questions.texts[row] for row in tested])
            right = [answer == label for answer, label in zip(answers, self.questions.labels[tested], strict=True)]
            store = live.learning.store
            aside = {(row.label.event_id, row.label.labeller) for row in store.quarantined(STREAM, limit=1_000_000)}
            wrong = {
                (f"{int(row):08d}", str(labeller))
                for row, labeller, lie in zip(said.rows, said.who, said.wrong, strict=True)
                if lie
            }
            outcome = Outcome(statistics.fmean(right), len(aside), len(aside - wrong), len(store.doubts(STREAM)))
        finally:
            live.close()
        self.outcomes[name, world].append(outcome)

    def rows(self) -> list[Row]:
        """A row for each number."""
        found = []
        for (name, world), runs in self.outcomes.items():
            accuracy = [run.accuracy for run in runs]
            found.append(
                Row(name=name, mode=world, metric="accuracy", value=100 * statistics.fmean(accuracy), unit="%")
            )
            if len(accuracy) > 1:
                spread = 100 * statistics.stdev(accuracy)
                found.append(Row(name=name, mode=world, metric="deviation", value=spread, unit="points"))
            if name == "trimtab":
                for metric in ("quarantined", "honest_quarantined"):
                    total = sum(getattr(run, metric) for run in runs)
                    found.append(Row(name=name, mode=world, metric=metric, value=total, unit="labels"))
                found.append(
                    Row(
                        name=name,
                        mode=world,
                        metric="suspects",
                        value=sum(run.suspects for run in runs),
                        unit="labellers",
                    )
                )
        return found


def load(data: Path) -> Questions:
    """CLINC150 as the file has it.

    Raises:
        OSError: there is no such file.
    """
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    labels = np.array([row["label"] for row in found])
    splits = np.array([row["split"] for row in found])
    known = labels != OUT_OF_SCOPE
    return Questions(
        [row["text"] for row in found],
        labels,
        np.flatnonzero((splits == "train") & known),
        np.flatnonzero((splits == "test") & known),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = options(__doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE", help=f"CLINC150 as JSON lines ({DATA})")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="where embeddings are kept")
    asked = parser.parse_args(argv)
    console = Console()
    try:
        questions = load(asked.data)
    except OSError as error:
        parser.exit(1, f"{asked.data}: {error.strerror}; give --data FILE\n")
    trial = Trial(questions, EmbeddingCache(asked.cache))
    for world, make in MISLED.items():
        for seed in range(1 if asked.quick else asked.runs):
            said = make(questions, np.random.default_rng(seed))
            trial.run("trimtab", world, said)
            trial.run("no_defence", world, said, trust=False)
            trial.run("oracle", world, said, trust=False, lies=False)
            console.print(f"{world}, seed {seed}", style="dim")
    for world, make in list(HONEST.items())[: 1 if asked.quick else None]:
        for seed in range(1 if asked.quick else asked.runs):
            trial.run("trimtab", world, make(questions, np.random.default_rng(seed)))
            console.print(f"{world}, seed {seed}", style="dim")
    result = Result(
        benchmark="labels", machine=machine(), versions=versions(["numpy", "scipy", "trimtab"]), rows=trial.rows()
    )
    publish(result, asked.json, console)


if __name__ == "__main__":
    main()
