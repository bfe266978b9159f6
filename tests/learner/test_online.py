"""One stream's learned line: what is announced besides the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from learner.encoders import build_telemetry_encoder
from learner.heads import solve
from learner.online import EncoderShelf, OnlineLearner, StreamPlan
from learner.registry import Registry
from monitoring.metrics import Metrics
from replay.store import LearnerStore, LedgerSlice
from stream.events import utc_now


class Ledger:
    """Rows as the store would give them, without the events they came from."""

    def __init__(self, store: LearnerStore) -> None:
        self._store = store
        self.rows: list[tuple[str, str, int, npt.NDArray[np.int16]]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def follow_ledger(self, stream: str, encoder: str, after_seq: int = 0, limit: int = 20_000) -> LedgerSlice:
        chosen = self.rows[after_seq : after_seq + limit]
        return LedgerSlice(
            seq=after_seq + len(chosen),
            event_ids=tuple(row[0] for row in chosen),
            labels=tuple(row[1] for row in chosen),
            signs=np.array([row[2] for row in chosen], np.int8),
            embeddings=np.stack([row[3] for row in chosen]) if chosen else np.empty((0, 0), np.int16),
        )


@pytest.fixture
def learned(tmp_path: Path) -> Iterator[tuple[OnlineLearner, Ledger]]:
    """A stream of three classes with 40 labels each."""
    store = LearnerStore(f"sqlite:///{tmp_path}/learner.db")
    registry = Registry(str(tmp_path / "registry"))
    plan = StreamPlan(
        "s",
        "telemetry",
        ("x",),
        lambda: build_telemetry_encoder(("x",), 0, window=8, dimension=24, learned=2),
        random_features=32,
    )
    ledger = Ledger(store)
    epoch = store.claim("test", utc_now())
    learner = OnlineLearner(plan, ledger, registry, EncoderShelf(registry, "cpu"), epoch, "versions", Metrics())  # type: ignore[arg-type]
    learner.open(utc_now())
    chance = np.random.default_rng(0)
    centres = chance.normal(0, 2_000, (3, 24))
    for number in range(120):
        point = centres[number % 3] + chance.normal(0, 1_500, 24)
        ledger.rows.append((f"e{number}", f"class {number % 3}", 1, point.astype(np.int16)))
    learner.follow()
    yield learner, ledger
    store.close()


def test_what_is_announced_is_calibrated(learned: tuple[OnlineLearner, Ledger]) -> None:
    """Probabilities and novelty are fitted on left-out labels, and travel with the revision to the workers."""
    learner, _ = learned
    assert learner.announce(utc_now())
    served, closed = learner.serving.head, solve(learner.sums, prior="sqrt")
    assert served is not None
    assert closed is not None
    assert served.lift.width == 32
    assert served.weight.tobytes() == closed.weight.tobytes()
    assert served.usual != 0.0
    assert served.temperature != closed.temperature


def test_a_slow_head_waits_only_while_more_labels_wait(learned: tuple[OnlineLearner, Ledger]) -> None:
    """Else a lone label is answered seconds later than it could be, or a flood of them is learned at half the rate."""
    learner, ledger = learned
    assert learner.announce(utc_now())
    learner._solve_took = 600.0
    event, label, _, embedding = ledger.rows[0]
    ledger.rows.append((f"again {event}", label, 1, embedding))
    learner.follow()
    assert not learner.announce(utc_now(), pause=3_600), "revisions come no faster than they are asked for"
    assert not learner.announce(utc_now(), behind=True)
    assert learner.announce(utc_now(), guard=False)


def test_a_withdrawn_label_calibrates_nothing(learned: tuple[OnlineLearner, Ledger]) -> None:
    """Leaving out what was never in the sums would be an error, or a class that is not there."""
    learner, ledger = learned
    learner.announce(utc_now())
    for event, label, _, embedding in ledger.rows[2:120:3]:
        ledger.rows.append((event, label, -1, embedding))
    learner.follow()
    assert learner.sums.classes == ("class 0", "class 1")
    assert learner.announce(utc_now(), guard=False)
    assert learner.serving.head is not None
    assert learner.serving.head.classes == ("class 0", "class 1")
    assert len(learner._recent) == 80
