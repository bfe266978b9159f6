"""How many labels are needed where the learner says which ones it would like, beside labels of events at random.

CLINC150's questions come in a random order, a day's worth at a time, to a head that knows nothing. Each day a few are
labelled: at random, the least certain, the most novel, or those that `learner.asking` chooses, with its settings as
they come. After each day the head that ships is solved again and asked the test questions. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from sklearn.metrics import accuracy_score

from benchmarks.heads import BOUND, ROOT, Clinc, Floats, Labels
from benchmarks.report import Result, Row, machine, options, publish, versions
from learner.asking import COMPARED, AskingSettings, Interest, choose, interest
from learner.heads import DEFAULT_WIDTH, HeadAnswer, HeadSums, LinearHead, calibrate, quantise, solve

REACH = 0.9
PER_DAY = 100
DAY = 600
"""Events of a day, one in six of which gets a label."""
RECENT = 300
Chooser = Callable[[Floats, HeadAnswer | None, Floats, np.random.Generator], npt.NDArray[np.intp]]


def margins(answer: HeadAnswer) -> Floats:
    """How far the best class is ahead of the second."""
    p = answer.probabilities
    return p[:, 0] - (p[:, 1] if p.shape[1] > 1 else 0.0)


def at_random(x: Floats, answer: HeadAnswer | None, known: Floats, chance: np.random.Generator) -> npt.NDArray[np.intp]:
    """Any of the day's events."""
    return chance.permutation(len(x))[:PER_DAY]


def uncertain(x: Floats, answer: HeadAnswer | None, known: Floats, chance: np.random.Generator) -> npt.NDArray[np.intp]:
    """The smallest margins."""
    return at_random(x, answer, known, chance) if answer is None else np.argsort(margins(answer))[:PER_DAY]


def novel(x: Floats, answer: HeadAnswer | None, known: Floats, chance: np.random.Generator) -> npt.NDArray[np.intp]:
    """The most novel."""
    return at_random(x, answer, known, chance) if answer is None else np.argsort(-answer.novelty)[:PER_DAY]


def asked(settings: AskingSettings) -> Chooser:
    """What `learner.asking` would ask for: of interest, ranked, no two alike."""

    def choice(
        x: Floats, answer: HeadAnswer | None, known: Floats, chance: np.random.Generator
    ) -> npt.NDArray[np.intp]:
        found: list[tuple[int, Interest]] = []
        for i in range(len(x)):
            told = Interest(1.0, "novel")
            if answer is not None:
                best, second = (*answer.probabilities[i].tolist(), 0.0)[:2]
                of_interest = interest(float(answer.novelty[i]), best, second, settings)
                if of_interest is None:
                    continue
                told = of_interest
            found.append((i, told))
        ranked = [i for i, _ in sorted(found, key=lambda one: -one[1].score)]
        if not ranked:
            return np.empty(0, np.intp)
        picked, _ = choose(x[ranked], known[-COMPARED:], settings.alike, PER_DAY)
        return np.array(ranked, dtype=np.intp)[picked]

    return choice


CHOOSERS: dict[str, Chooser] = {
    "trimtab": asked(AskingSettings()),
    "trimtab_with_twins": asked(AskingSettings(alike=1.0)),
    "uncertain": uncertain,
    "novel": novel,
    "random": at_random,
}


def curve(
    x: Floats, y: Labels, asked_of: tuple[Floats, Labels], choose_from: Chooser, seed: int, most: int, width: int
) -> list[tuple[int, float]]:
    """Labels given so far and the accuracy with them, day by day until `REACH`, the data or `most` labels end."""
    chance = np.random.default_rng(seed)
    order = chance.permutation(len(y))
    q = quantise(x, BOUND)
    sums = HeadSums(x.shape[1], BOUND, width)
    taught: list[int] = []
    head: LinearHead | None = None
    calibration, fitted = None, 0
    found: list[tuple[int, float]] = []
    for start in range(0, len(order), DAY):
        day = order[start : start + DAY]
        answer = None if head is None else head.answer(x[day], 2)
        chosen = day[choose_from(x[day], answer, x[taught], chance)]
        if len(chosen):
            sums.add(q[chosen], y[chosen].tolist())
            taught += chosen.tolist()
        if len(taught) > 1.1 * fitted + 20:
            tail = taught[-RECENT:]
            calibration, fitted = calibrate(sums, q[tail], y[tail].tolist()), len(taught)
        head = solve(sums, calibration=calibration)
        if head is None:
            continue
        found.append((len(taught), float(accuracy_score(asked_of[1], head.predict(asked_of[0])))))
        if found[-1][1] >= REACH or len(taught) >= most:
            break
    return found


def needed(found: Sequence[tuple[int, float]]) -> float:
    """Labels at which `REACH` is crossed, between two days in proportion; not a number where it is not."""
    before = (0, 0.0)
    for labels, accuracy in found:
        if accuracy >= REACH:
            share = (REACH - before[1]) / (accuracy - before[1])
            return before[0] + share * (labels - before[0])
        before = labels, accuracy
    return float("nan")


def rows(data: Clinc, seeds: int, most: int, width: int, console: Console) -> list[Row]:
    """Every chooser on the same orders."""
    (x, y), test = data.part("train"), data.part("test")
    found: list[Row] = []
    for name, chooser in CHOOSERS.items():
        curves = [curve(x, y, test, chooser, seed, most, width) for seed in range(seeds)]
        labels = [needed(one) for one in curves]
        console.print(f"{name}: {labels}, {[one[-1] for one in curves]}")
        if not np.isnan(labels).any():
            found.append(
                Row(name=name, mode="clinc150", metric="labels_to_90", value=float(np.mean(labels)), unit="labels")
            )
            found.append(
                Row(
                    name=name,
                    mode="clinc150",
                    metric="labels_to_90_deviation",
                    value=float(np.std(labels)),
                    unit="labels",
                )
            )
        for size in (500, 1_000, 1_500):
            there = [next((a for n, a in one if n >= size), None) for one in curves]
            if None not in there:
                value = 100 * float(np.mean([a for a in there if a is not None]))
                found.append(Row(name=name, mode="clinc150", metric=f"accuracy_at_{size}", value=value, unit="%"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run where the data is there; returns the exit code."""
    chosen = _arguments(arguments)
    console = Console()
    before = machine()
    clinc = chosen.data / "clinc150.jsonl.gz"
    if not clinc.is_file():
        console.print(f"not run: CLINC150 is not in {chosen.data}")
        return 0
    data = Clinc(clinc, chosen.cache)
    found = rows(
        data, 1 if chosen.quick else 5, 400 if chosen.quick else 15_000, 0 if chosen.quick else DEFAULT_WIDTH, console
    )
    result = Result(benchmark="asking", machine=before, versions=versions(("numpy", "scipy", "torch")), rows=found)
    publish(result, chosen.json, console)
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.asking"
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", metavar="DIR", help="where the data files are"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache" / "heads", metavar="DIR", help="where embeddings are kept"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
