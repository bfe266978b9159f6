"""When a fine-tune begins: each trigger, the rest between two runs, and requests that are folded together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from learner.exam import ExamSettings
from learner.finetune import FineTuneSettings
from learner.registry import Registry
from learner.trainer import Course, Trainer, Triggers
from monitoring.metrics import Metrics
from replay.store import LearnerStore
from stream.events import utc_now
from tests.waiting import until


def at_once(work: Callable[[], Any]) -> Future[Any]:
    done: Future[Any] = Future()
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
    return done


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    store = LearnerStore(f"sqlite:///{tmp_path}/learner.db")
    made: list[Trainer] = []

    def build(**triggers: Any) -> Trainer:
        course = Course("telemetry", FineTuneSettings(), ExamSettings(), Triggers(**triggers))
        epoch = store.claim("test", utc_now())
        trainer = Trainer(
            {"probe": course},
            {},
            store,
            Registry(str(tmp_path / "registry")),
            epoch,
            tmp_path,
            at_once,
            Metrics(),
            utc_now,
        )
        made.append(trainer)
        return trainer

    yield build
    for trainer in made:
        trainer.stop()
    store.close()


def causes(trainer: Trainer) -> list[str]:
    return [cause for wanted in trainer.courses["probe"].requested for cause, _ in wanted.causes]


def test_after_so_many_labels(make: Callable[..., Trainer]) -> None:
    """The plainest trigger: enough was learned since the last run."""
    trainer = make(every_labels=10)
    trainer.learned("probe", 9)
    assert causes(trainer) == []
    trainer.learned("probe", 1)
    assert causes(trainer) == ["labels"]
    trainer.learned("probe", 50)
    assert causes(trainer) == ["labels"], "a run that was asked for is not asked for again at every label"


def test_after_so_long_but_only_with_something_new(make: Callable[..., Trainer]) -> None:
    """A timer that trains on nothing new costs a core for an answer that is known."""
    trainer = make(every_seconds=1e-9, minimum_labels=5)
    trainer.watch("probe", drifting=False, worst_forgetting=0.0, budget=0.1)
    assert causes(trainer) == []
    trainer.learned("probe", 5)
    trainer.watch("probe", drifting=False, worst_forgetting=0.0, budget=0.1)
    assert causes(trainer) == ["timer"]


@pytest.mark.parametrize(
    ("triggers", "seen", "cause"),
    [
        ({"drift": True}, {"drifting": True, "worst_forgetting": 0.0}, "drift"),
        ({"forgetting": True}, {"drifting": False, "worst_forgetting": 0.2}, "forgetting"),
        ({}, {"drifting": True, "worst_forgetting": 0.2}, None),
        ({"forgetting": True}, {"drifting": False, "worst_forgetting": 0.05}, None),
    ],
)
def test_drift_and_forgetting(
    make: Callable[..., Trainer], triggers: dict[str, Any], seen: dict[str, Any], cause: str | None
) -> None:
    """Each trigger acts where it is switched on, and only there."""
    trainer = make(minimum_labels=1, **triggers)
    trainer.learned("probe", 1)
    trainer.watch("probe", budget=0.1, **seen)
    assert causes(trainer) == ([cause] if cause else [])


def test_when_it_is_expected_to_be_worth_its_time(make: Callable[..., Trainer]) -> None:
    """A run is weighed by what is wrong, what is new and what the last runs brought, all from the learner's record."""

    sums = SimpleNamespace(counts={"a": 1_000, "b": 200})

    trainer = make(gain=0.5, minimum_labels=1)
    trainer._learners = {"probe": SimpleNamespace(sums=sums)}  # type: ignore[dict-item]
    trainer.courses["probe"].taught = {"a": 1_000}
    trainer.learned("probe", 200)
    calm = {"drifting": False, "worst_forgetting": 0.0, "budget": 0.1}
    trainer.watch("probe", **calm, recalls={"a": (400, 400), "b": (100, 100)})
    assert causes(trainer) == [], "all is right already"
    with trainer._store.transaction(trainer._epoch, utc_now()) as tx:
        run = tx.add_run("probe", "gain", detail={"exam": {"taught": 0, "since": 9, "champion": 0.5, "candidate": 0.5}})
        tx.update_run(run, state="refused", started=True)
    with trainer._store.transaction(trainer._epoch, utc_now() + timedelta(hours=10)) as tx:
        tx.update_run(run, state="refused", finished=True)
    trainer.watch("probe", **calm, recalls={"a": (400, 400), "b": (20, 100)})
    assert causes(trainer) == [], "ten hours for a few points"
    with trainer._store.transaction(trainer._epoch, utc_now()) as tx:
        tx.update_run(run, state="failed")
    trainer.watch("probe", **calm, recalls={"a": (400, 400), "b": (20, 100)})
    assert causes(trainer) == ["gain"]


def test_a_request_during_a_run_is_folded_into_the_next(make: Callable[..., Trainer]) -> None:
    """Whoever asks must be told what will happen, and ten who ask must not start ten runs."""
    trainer = make()
    assert "begins now" in trainer.request("probe", "hand")
    assert "folded" in trainer.request("probe", "hand")
    trainer.courses["probe"].requested.clear()
    trainer.courses["probe"].running = True
    assert "folded into the next" in trainer.request("probe", "hand")


def test_a_run_with_nothing_to_learn_is_reported_as_failed(make: Callable[..., Trainer]) -> None:
    """A run that cannot begin must end in the record, not in a thread that died."""
    trainer = make()
    course = trainer.courses["probe"]
    trainer._learners = {"probe": None}  # type: ignore[dict-item]
    trainer.start()
    trainer.request("probe", "hand")
    until(lambda: not course.running and not course.requested and bool(trainer._store.runs("probe")))
    until(lambda: trainer._store.runs("probe")[0].state == "failed")
    assert "nothing to learn" in trainer._store.runs("probe")[0].detail["reason"]


def test_a_run_that_a_crash_cut_off_is_reported_at_the_next_start(make: Callable[..., Trainer]) -> None:
    """After a power cut someone will ask what became of the run that was going."""
    trainer = make()
    with trainer._store.transaction(trainer._epoch, utc_now()) as tx:
        tx.update_run(tx.add_run("probe", "labels"), state="running", started=True)
    trainer.start()
    assert [run.state for run in trainer._store.runs("probe")] == ["failed"]
