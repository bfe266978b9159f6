"""What a user could pick instead, and the dummies: everything that trimtab is measured beside.

The ceiling and the floor are the same classifiers from scikit-learn on the same features as trimtab's (or
cheaper ones, whichever come out better): `Refit` fits anew on all that is known, `Once` never after the first
part. River's learners see each label once, as it comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.learning.reading import Examples
from learner.encoders import Payload

Featurise = Callable[[Sequence[Payload]], Any]
"""Payloads in, a matrix with a row each out."""

FEW_CLASSES = 30
"""With more, what keeps or visits every feature of every class is left out: a weight for each of 262,144 hashed words
in scikit-learn, each component of an embedding one by one in River."""


class Classifier(Protocol):
    """What scikit-learn calls a classifier."""

    def fit(self, x: Any, y: Sequence[str]) -> Any:
        """Learn from scratch."""
        ...

    def predict(self, x: Any) -> npt.NDArray[np.str_]:
        """One class a row."""
        ...


class Rival(ABC):
    """A contestant that needs no more than payloads and labels; see `protocols.Contestant`."""

    def __init__(self) -> None:
        self._waiting: dict[int, Payload] = {}

    def serve(self, positions: Sequence[int], payloads: Sequence[Payload]) -> Sequence[str | None]:
        """Answer, and keep the payloads until their labels come."""
        answers = self.ask(payloads)
        self.take(positions, payloads)
        return answers

    def take(self, positions: Sequence[int], payloads: Sequence[Payload]) -> None:
        """Keep the payloads until their labels come."""
        self._waiting.update(zip(positions, payloads, strict=True))

    def label(self, positions: Sequence[int], labels: Sequence[str]) -> None:
        """Learn what was waiting."""
        self.learn(positions, [self._waiting.pop(position) for position in positions], labels)

    @abstractmethod
    def ask(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        """Answers that leave no trace."""

    @abstractmethod
    def learn(self, positions: Sequence[int], payloads: Sequence[Payload], labels: Sequence[str]) -> None:
        """Labelled examples, in the order of their labels."""

    def boundary(self) -> None:
        """Nothing is done between experiences."""
        return

    def details(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def close(self) -> None:
        """Nothing to let go of."""
        return


class Majority(Rival):
    """The class with the most labels so far."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def ask(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        return [max(self._counts, key=lambda name: (self._counts[name], name), default=None)] * len(payloads)

    def learn(self, positions: Sequence[int], payloads: Sequence[Payload], labels: Sequence[str]) -> None:
        self._counts.update(labels)


class NoChange(Rival):
    """The label of the newest event that is labelled: persistence, at the labels' own delay."""

    def __init__(self) -> None:
        super().__init__()
        self._newest: tuple[int, str] | None = None

    def ask(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        return [None if self._newest is None else self._newest[1]] * len(payloads)

    def learn(self, positions: Sequence[int], payloads: Sequence[Payload], labels: Sequence[str]) -> None:
        newest = max(zip(positions, labels, strict=True))
        self._newest = newest if self._newest is None else max(self._newest, newest)


class Refit(Rival):
    """A batch classifier on everything known, fitted anew when it is asked after `every` more labels.

    Args:
        make: a fresh classifier.
        featurise: what it is given of a payload.
        every: labels between two fits.
        until: no fit with more labels than this: it is trained once, and then left as it is.
    """

    def __init__(
        self, make: Callable[[], Classifier], featurise: Featurise, every: int = 1, until: int | None = None
    ) -> None:
        super().__init__()
        self._make, self._featurise, self._every, self._until = make, featurise, every, until
        self._payloads: list[Payload] = []
        self._labels: list[str] = []
        self._fitted = 0
        self._model: Classifier | None = None
        self._unanswered: list[tuple[list[str | None], Sequence[Payload]]] = []
        self.fits = 0

    def serve(self, positions: Sequence[int], payloads: Sequence[Payload]) -> Sequence[str | None]:
        """Answered together, before the next fit: one at a time, a forest's answers cost more than its fits."""
        self._refit()
        self.take(positions, payloads)
        answers: list[str | None] = [None] * len(payloads)
        self._unanswered.append((answers, payloads))
        return answers

    def boundary(self) -> None:
        """What was served is answered by now."""
        unanswered, self._unanswered = self._unanswered, []
        found = iter(self._answers([payload for _, payloads in unanswered for payload in payloads]))
        for answers, payloads in unanswered:
            answers[:] = [next(found) for _ in payloads]

    def ask(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        self._refit()
        return self._answers(payloads)

    def _answers(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        if not len(payloads) or not self._labels:
            return [None] * len(payloads)
        if self._model is None:  # one class, which no classifier would be fitted to
            return [self._labels[0]] * len(payloads)
        return [str(answer) for answer in self._model.predict(self._featurise(payloads))]

    def learn(self, positions: Sequence[int], payloads: Sequence[Payload], labels: Sequence[str]) -> None:
        if self._until is not None:
            room = max(0, self._until - len(self._labels))
            payloads, labels = payloads[:room], labels[:room]
        self._payloads += payloads
        self._labels += labels

    def _refit(self) -> None:
        new = len(self._labels) - self._fitted
        full = self._until is not None and len(self._labels) >= self._until and new
        if (new >= self._every or full) and len(set(self._labels)) > 1:
            self.boundary()
            self._model = self._make()
            self._model.fit(self._featurise(self._payloads), self._labels)
            self._fitted = len(self._labels)
            self.fits += 1

    def details(self) -> dict[str, Any]:
        """How often it was fitted."""
        return {"fits": self.fits}


class River(Rival):
    """A learner of River, which sees each label once.

    Args:
        model: a river classifier.
        describe: a payload as it takes it.
    """

    def __init__(self, model: Any, describe: Callable[[Sequence[Payload]], Sequence[Any]]) -> None:
        super().__init__()
        self._model, self._describe = model, describe

    def ask(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        return [self._model.predict_one(x) for x in self._describe(payloads)]

    def learn(self, positions: Sequence[int], payloads: Sequence[Payload], labels: Sequence[str]) -> None:
        for x, label in zip(self._describe(payloads), labels, strict=True):
            self._model.learn_one(x, label)


def classifiers(
    examples: Examples, embed: Featurise, seed: int
) -> dict[str, tuple[Callable[[], Classifier], Featurise]]:
    """The batch classifiers that stand for the ceiling and the floor, by name."""
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression, SGDClassifier

    if examples.kind == "text":
        from sklearn.feature_extraction.text import HashingVectorizer

        found: dict[str, tuple[Callable[[], Classifier], Featurise]] = {
            # scikit-learn's default tolerance ends 2 points early on embeddings of length 1.
            "logistic regression on embeddings": (lambda: LogisticRegression(C=20.0, max_iter=1000, tol=1e-4), embed)
        }
        if len(examples.classes) <= FEW_CLASSES:
            words = HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False)
            found["logistic regression on hashed words"] = (
                lambda: SGDClassifier(loss="log_loss", alpha=1e-6, random_state=seed),
                words.transform,
            )
        return found
    return {
        "random forest": (lambda: RandomForestClassifier(200, random_state=seed), statistics),
        "boosted trees": (lambda: HistGradientBoostingClassifier(random_state=seed), statistics),
    }


def river_models(examples: Examples, embed: Featurise, seed: int) -> dict[str, Callable[[], River]]:
    """River's classifiers that suit the data, by name."""
    from river import (
        compose,
        feature_extraction,
        forest,
        linear_model,
        naive_bayes,
        neighbors,
        optim,
        preprocessing,
        stats,
        tree,
    )

    def numbers(payloads: Sequence[Payload]) -> list[dict[int, float]]:
        return [{i: float(v) for i, v in enumerate(row) if not np.isnan(v)} for row in statistics(payloads)]

    def or_none(payloads: Sequence[Payload]) -> list[dict[int, float | None]]:
        return [{i: None if np.isnan(v) else float(v) for i, v in enumerate(row)} for row in statistics(payloads)]

    def embedded(payloads: Sequence[Payload]) -> list[dict[int, float]]:
        return [dict(enumerate(map(float, row))) for row in embed(payloads)]

    def filled(model: Any) -> Any:
        # Trees cannot be asked about a value that is missing.
        imputer = preprocessing.StatImputer(
            *((i, stats.Mean()) for i in range(statistics(examples.payloads[:1]).shape[1]))
        )
        return compose.Pipeline(imputer, model)

    if examples.kind == "text":
        bag = feature_extraction.BagOfWords
        found: dict[str, Callable[[], River]] = {
            "multinomial naive Bayes on words": lambda: River(
                compose.Pipeline(bag(ngram_range=(1, 2)), naive_bayes.MultinomialNB(alpha=0.1)), list
            ),
            "complement naive Bayes on words": lambda: River(
                compose.Pipeline(bag(ngram_range=(1, 2)), naive_bayes.ComplementNB(alpha=0.1)), list
            ),
        }
        if len(examples.classes) <= FEW_CLASSES:
            found["softmax regression on embeddings"] = lambda: River(
                linear_model.SoftmaxRegression(optim.SGD(1.0), l2=0.0), embedded
            )
        return found
    return {
        "adaptive random forest": lambda: River(filled(forest.ARFClassifier(seed=seed)), or_none),
        "Hoeffding adaptive tree": lambda: River(filled(tree.HoeffdingAdaptiveTreeClassifier(seed=seed)), or_none),
        "Gaussian naive Bayes": lambda: River(filled(naive_bayes.GaussianNB()), or_none),
        "nearest neighbours": lambda: River(
            compose.Pipeline(preprocessing.StandardScaler(), neighbors.KNNClassifier()), numbers
        ),
        "softmax regression": lambda: River(
            compose.Pipeline(preprocessing.StandardScaler(), linear_model.SoftmaxRegression()), numbers
        ),
    }


def statistics(payloads: Sequence[Payload]) -> npt.NDArray[np.float64]:
    """Per channel: last value, and over the window mean, deviation, least, greatest, slope; one step is only itself."""
    rows = []
    with np.errstate(all="ignore"):
        for payload in payloads:
            window = np.asarray(payload, dtype=np.float64)
            if window.shape[1] == 1:
                rows.append(window[:, 0])
                continue
            seen = ~np.isnan(window)
            count = seen.sum(axis=1)
            filled = np.where(seen, window, 0.0)
            mean = filled.sum(axis=1) / count
            deviation = np.sqrt((np.where(seen, window - mean[:, None], 0.0) ** 2).sum(axis=1) / count)
            least = np.where(seen, window, np.inf).min(axis=1)
            greatest = np.where(seen, window, -np.inf).max(axis=1)
            steps = np.linspace(-1.0, 1.0, window.shape[1])
            slope = np.where(seen, (window - mean[:, None]) * steps, 0.0).sum(axis=1) / count
            parts = [window[:, -1], mean, deviation, least, greatest, slope]
            rows.append(np.concatenate([np.where(np.isfinite(part), part, np.nan) for part in parts]))
    return np.stack(rows) if rows else np.empty((0, 0))
