"""What the instant head is worth: accuracy, new classes, late labels, novelty and calibration, on frozen MiniLM.

Every row stands beside what a user would pick instead on the same embeddings: the nearest class mean, a textbook
discriminant, logistic regression fitted again on everything; and beside a dummy. Data that is not there is
said and left out. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from benchmarks.report import Result, Row, machine, options, publish, versions
from deploy.wiring import text_model
from learner.encoders import build_text_encoder
from learner.estimate import METHODS, AccuracyEstimator
from learner.heads import DEFAULT_WIDTH, Calibration, HeadSums, LinearHead, calibrate, quantise, solve

ROOT = Path(__file__).resolve().parent.parent
BOUND = 1.0
LATE = 100
REFIT_EVERY = 500
Labels = npt.NDArray[np.str_]
Floats = npt.NDArray[np.float32]
Predictor = Callable[[Floats], Sequence[str]]


def embedded(name: str, texts: Sequence[str], cache: Path) -> Floats:
    """MiniLM's embeddings of texts, computed once."""
    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    file = cache / f"{name}-{key}.npy"
    if file.is_file():
        found: Floats = np.load(file)
        return found
    cache.mkdir(parents=True, exist_ok=True)
    made: Floats = build_text_encoder(text_model("minilm")).embed(texts)
    np.save(file, made)
    return made


# Contestants: examples in, a predictor out


def head_of(x: Floats, y: Labels, width: int = 0, pooled: bool = True, **options: object) -> LinearHead:
    """trimtab's head of these examples."""
    sums = HeadSums(x.shape[1], BOUND, width)
    sums.add(quantise(x, BOUND), y.tolist())
    head = solve(sums, pooled=pooled, **options)  # type: ignore[arg-type]
    assert head is not None
    return head


def nearest_mean(x: Floats, y: Labels) -> Predictor:
    """Nearest class mean by cosine."""
    classes = np.unique(y)
    means = np.stack([x[y == name].mean(axis=0) for name in classes])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return lambda asked: classes[(asked @ means.T).argmax(axis=1)].tolist()


def regression(x: Floats, y: Labels) -> Predictor:
    """Logistic regression at the strength that was best for it on both data sets, of 1, 3, 10, 30 and 100."""
    fitted = LogisticRegression(C=100.0, max_iter=300, tol=1e-3).fit(x, y)
    return lambda asked: fitted.predict(asked).tolist()


def majority(x: Floats, y: Labels) -> Predictor:
    """Always the most frequent class."""
    classes, counts = np.unique(y, return_counts=True)
    return lambda asked: [str(classes[counts.argmax()])] * len(asked)


CONTESTANTS: dict[str, Callable[[Floats, Labels], Predictor]] = {
    "trimtab": lambda x, y: head_of(x, y, DEFAULT_WIDTH).predict,
    "trimtab_narrow": lambda x, y: head_of(x, y).predict,
    "lda": lambda x, y: head_of(x, y, pooled=False).predict,
    "lda_wide": lambda x, y: head_of(x, y, DEFAULT_WIDTH, pooled=False).predict,
    "nearest_mean": nearest_mean,
    "logistic_regression": regression,
    "majority": majority,
}


class Clinc:
    """CLINC150, embedded."""

    def __init__(self, file: Path, cache: Path) -> None:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        self._x = embedded("clinc150", [row["text"] for row in rows], cache)
        self._split = np.array([row["split"] for row in rows])
        self._y = np.array([row["label"] for row in rows])

    def part(self, split: str) -> tuple[Floats, Labels]:
        """The embeddings and labels of one split."""
        chosen = self._split == split
        return self._x[chosen], self._y[chosen]


def everything(data: Clinc) -> Iterator[Row]:
    """All labels seen once; the order of experiences makes no difference to any of these."""
    (x, y), (asked, expected) = data.part("train"), data.part("test")
    for name, fit in CONTESTANTS.items():
        start = time.perf_counter()
        predict = fit(x, y)
        seconds = time.perf_counter() - start
        yield Row(
            name=name, mode="clinc150", metric="final", value=100 * accuracy_score(expected, predict(asked)), unit="%"
        )
        yield Row(name=name, mode="clinc150", metric="seconds", value=seconds, unit="s")


def new_classes(data: Clinc, draws: int, shots: int = 5) -> Iterator[Row]:
    """Ten classes of a few labels each, on top of 140 of a hundred."""
    (x, y), (asked, expected) = data.part("train"), data.part("test")
    names = np.unique(y)
    mode = f"clinc150_{shots}_shots"
    for name, fit in CONTESTANTS.items():
        chance = np.random.default_rng(0)
        found: list[tuple[float, float, float]] = []
        for _ in range(draws):
            new = chance.choice(names, 10, replace=False)
            rows = np.concatenate([chance.choice(np.flatnonzero(y == c), shots, replace=False) for c in new])
            before = ~np.isin(y, new)
            old = ~np.isin(expected, new)
            first = accuracy_score(expected[old], fit(x[before], y[before])(asked[old]))
            taught = np.concatenate([np.flatnonzero(before), rows])
            right = np.asarray(fit(x[taught], y[taught])(asked)) == expected
            found.append((right[~old].mean(), right[old].mean(), right[old].mean() - first))
        mean, deviation = 100 * np.mean(found, axis=0), 100 * np.std(found, axis=0)
        for metric, value in zip(("new_classes", "old_classes", "old_change"), mean, strict=True):
            yield Row(name=name, mode=mode, metric=metric, value=float(value), unit="%")
        yield Row(name=name, mode=mode, metric="new_classes_deviation", value=float(deviation[0]), unit="%")


def novelty(data: Clinc) -> Iterator[Row]:
    """Texts of no class among texts of known ones."""
    x, y = data.part("train")
    known, _ = data.part("test")
    unknown, _ = data.part("oos_test")
    truth = np.concatenate([np.zeros(len(known)), np.ones(len(unknown))])
    asked = np.concatenate([known, unknown])
    means = np.stack([x[y == name].mean(axis=0) for name in np.unique(y)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    scores: dict[str, npt.NDArray[np.floating]] = {"max_cosine": -(asked @ means.T).max(axis=1)}
    for name, width in (("trimtab", DEFAULT_WIDTH), ("trimtab_narrow", 0)):
        head = calibrated(x, y, width)
        answer = head.answer(asked, 1)
        scores[name] = answer.novelty
        prefix = "" if width else "narrow_"
        scores[f"{prefix}max_softmax"] = -answer.probabilities[:, 0]
        scores[f"{prefix}energy"] = -logsumexp(head.scores(asked), axis=1)
        for metric, chosen in (("known_above_half", truth == 0), ("unknown_above_half", truth == 1)):
            share = 100 * float((answer.novelty[chosen] > 0.5).mean())
            yield Row(name=name, mode="oos_test", metric=metric, value=share, unit="%")
    for name, score in scores.items():
        yield Row(name=name, mode="oos_test", metric="auroc", value=float(roc_auc_score(truth, score)), unit="area")
    yield Row(name="constant", mode="oos_test", metric="auroc", value=0.5, unit="area")


def calibrated(x: Floats, y: Labels, width: int, examples: int = 300) -> LinearHead:
    """The head with its probabilities and novelty fitted on left-out examples, as the learner does it."""
    sums = HeadSums(x.shape[1], BOUND, width)
    q = quantise(x, BOUND)
    sums.add(q, y.tolist())
    rows = np.random.default_rng(0).permutation(len(y))[:examples]
    head = solve(sums, calibration=calibrate(sums, q[rows], y[rows].tolist()))
    assert head is not None
    return head


def honesty(data: Clinc, quick: bool) -> Iterator[Row]:
    """Expected calibration error, and the likelihood that a wrong temperature costs, from few labels to many."""
    (x, y), (asked, expected) = data.part("train"), data.part("test")
    for shots in (20,) if quick else (5, 20, 100):
        chance = np.random.default_rng(0)
        rows = np.concatenate([chance.choice(np.flatnonzero(y == c), shots, replace=False) for c in np.unique(y)])
        fitted = calibrated(x[rows], y[rows], DEFAULT_WIDTH)
        closed = head_of(x[rows], y[rows], DEFAULT_WIDTH)
        raw = head_of(x[rows], y[rows], DEFAULT_WIDTH, calibration=Calibration(1.0, 0.0))
        for name, head in (("trimtab", fitted), ("closed_form", closed), ("raw", raw)):
            p = softmax(head.scores(asked), axis=1)
            right = np.asarray(head.classes)[p.argmax(axis=1)] == expected
            error = calibration_error(p.max(axis=1), right)
            yield Row(name=name, mode=f"clinc150_{shots}_a_class", metric="ece", value=error, unit="share")


def calibration_error(confidence: npt.NDArray[np.floating], right: npt.NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error in bins of equal width (Guo et al. 2017, section 2)."""
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(float(confidence[places == b].mean() - right[places == b].mean())) * (places == b).sum()
        for b in set(places)
    ]
    return float(sum(gaps) / len(confidence))


class Preceding:
    """GCN's subjects in order of time: each asked of a head that knows the labels of all but the last hundred."""

    def __init__(self, file: Path, cache: Path, rows: int | None) -> None:
        table = pd.read_csv(file).sort_values("time_utc", kind="stable")[:rows]
        self.y = table["label"].astype(str).to_numpy(dtype=str)
        self.x = embedded("gcn", table["subject"].fillna("").tolist(), cache)
        self.classes = np.unique(self.y)
        self.trimtab: tuple[list[str], list[float]] = ([], [])

    def rows(self) -> Iterator[Row]:
        """Macro-F1 and accuracy of every contestant."""
        found: dict[str, Sequence[str]] = {
            "trimtab": self._online(DEFAULT_WIDTH, keep=True),
            "trimtab_narrow": self._online(0),
            "lda": self._online(0, pooled=False),
            "logistic_regression": self._refitted(),
            "no_change": [""] * LATE + self.y[:-LATE].tolist(),
            "majority": [str(self.classes[np.argmax([np.sum(self.y == c) for c in self.classes])])] * len(self.y),
        }
        for name, answers in found.items():
            macro = f1_score(self.y, answers, average="macro", labels=self.classes, zero_division=0)
            yield Row(name=name, mode="gcn_labels_100_late", metric="macro_f1", value=float(macro), unit="share")
            accuracy = float(accuracy_score(self.y, answers))
            yield Row(name=name, mode="gcn_labels_100_late", metric="accuracy", value=accuracy, unit="share")

    def _online(self, width: int, *, pooled: bool = True, keep: bool = False) -> list[str]:
        sums = HeadSums(self.x.shape[1], BOUND, width)
        q = quantise(self.x, BOUND)
        answers: list[str] = []
        recent = 300
        calibration, fitted_at = None, 0
        for start in range(0, len(self.y), LATE):
            head = None
            known = max(0, start - LATE)
            if known > sums.total:
                sums.add(q[sums.total : known], self.y[sums.total : known].tolist())
            if keep and known > 1.1 * fitted_at + 20:
                tail = slice(max(0, known - recent), known)
                calibration, fitted_at = calibrate(sums, q[tail], self.y[tail].tolist()), known
            head = solve(sums, pooled=pooled, calibration=calibration)
            asked = self.x[start : start + LATE]
            if head is None:
                answers += [""] * len(asked)
                confidence = [0.0] * len(asked)
            else:
                answer = head.answer(asked, 1)
                answers += [best for (best,) in answer.labels]
                confidence = answer.probabilities[:, 0].tolist()
            if keep:
                self.trimtab[0].extend(answers[start:])
                self.trimtab[1].extend(confidence)
        return answers

    def _refitted(self) -> list[str]:
        answers: list[str] = []
        predict: Predictor | None = None
        for start in range(0, len(self.y), LATE):
            if start % REFIT_EVERY == 0 and start > LATE and len(np.unique(self.y[: start - LATE])) > 1:
                predict = regression(self.x[: start - LATE], self.y[: start - LATE])
            asked = self.x[start : start + LATE]
            answers += [""] * len(asked) if predict is None else list(predict(asked))
        return answers

    def estimates(self, delay: int = 2_000, window: int = 500) -> Iterator[Row]:
        """How far each estimate of the accuracy of the last predictions is off, their labels `delay` reports late."""
        answers, confidence = self.trimtab
        right = np.array(answers) == self.y
        for method in METHODS:
            estimator = AccuracyEstimator(method=method, window=window, remembered=delay + window)
            gaps = []
            for i in range(len(right)):
                estimator.predicted(str(i), confidence[i])
                if i >= delay:
                    estimator.scored(str(i - delay), bool(right[i - delay]))
                if i % window == window - 1 and i >= delay + window and (said := estimator.estimate()) is not None:
                    gaps.append(abs(said - right[i + 1 - window : i + 1].mean()))
            if gaps:
                mode = f"gcn_labels_{delay}_late"
                yield Row(name=method, mode=mode, metric="error_of_estimate", value=float(np.mean(gaps)), unit="share")


def cost(quick: bool) -> Iterator[Row]:
    """Time and bytes of the head alone, on random embeddings of 384 dimensions."""
    for width in (0, 1_000, DEFAULT_WIDTH):
        for classes in (150,) if quick else (10, 150, 1_000):
            for metric, (value, unit) in _costs(width, classes).items():
                yield Row(name=f"width_{width}", mode=f"{classes}_classes", metric=metric, value=value, unit=unit)


def _costs(width: int, classes: int) -> dict[str, tuple[float, str]]:
    x = np.random.default_rng(0).normal(0, 0.05, (max(3_000, 3 * classes), 384)).astype(np.float32)
    q, labels = quantise(x, BOUND), [f"class {i % classes}" for i in range(len(x))]
    sums = HeadSums(384, BOUND, width)
    sums.add(q, labels)
    head = solve(sums)
    assert head is not None
    return {
        "solve": (1e3 * fastest(lambda: solve(sums)), "ms"),
        "add_one_label": (1e3 * fastest(lambda: sums.add(q[:1], labels[:1])), "ms"),
        "answer": (1e6 * fastest(lambda: head.answer(x[:500], 5)) / 500, "microseconds/event"),
        "sums": (sums.nbytes / 2**20, "MiB"),
        "announced": (sum(part.nbytes for part in head.tensors().values()) / 2**20, "MiB"),
    }


def fastest(work: Callable[[], object], runs: int = 5) -> float:
    """Seconds of the fastest of some runs: what others do on the machine only ever adds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what there is data for; returns the exit code."""
    chosen = _arguments(arguments)
    console = Console()
    rows: list[Row] = []
    before = machine()
    clinc, gcn = chosen.data / "clinc150.jsonl.gz", chosen.data / "gcn_subjects_1997_2018.csv.gz"
    if clinc.is_file():
        data = Clinc(clinc, chosen.cache)
        rows += everything(data)
        rows += new_classes(data, 1 if chosen.quick else 10)
        rows += novelty(data)
        rows += honesty(data, chosen.quick)
    else:
        console.print(f"not run: CLINC150 is not in {chosen.data}")
    if gcn.is_file():
        stream = Preceding(gcn, chosen.cache, 4_000 if chosen.quick else None)
        rows += stream.rows()
        rows += stream.estimates()
    else:
        console.print(f"not run: GCN subjects are not in {chosen.data}")
    rows += cost(chosen.quick)
    result = Result(
        benchmark="heads",
        machine=before,
        versions=versions(("numpy", "scipy", "scikit-learn", "torch", "transformers")),
        rows=rows,
    )
    publish(result, chosen.json, console)
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.heads"
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", metavar="DIR", help="where the data files are"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".cache" / "heads", metavar="DIR", help="where embeddings are kept"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
