"""A learner that is killed: at any moment, or in the middle of a fine-tune. Another that takes over: test_failover."""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import pytest

from stream.events import Label, utc_now
from tests.deployment import Deployment, label
from tests.integration.probe import FREQUENCIES, STREAM, check_head, deployed, logged, publish, store_of, window
from tests.kafka import KafkaBroker
from tests.scrape import Scrape
from tests.waiting import until

LONG = {**STREAM["finetune"], "epochs": 500, "early_stopping_patience": 0}
STREAMS: dict[str, Any] = {
    "busy": {**STREAM, "finetune": LONG},
    "tuned": {**STREAM, "finetune": LONG},
}
KILLS = 5
SEED = 20_260_101


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A worker for all tests; each goes on with the learner that it finds, or starts one."""
    small_steps = {"batches": {"batch_events": 8, "session_seconds": 3}}
    with deployed(kafka, tmp_path_factory.mktemp("crash"), STREAMS, {"learner": small_steps}) as made:
        made.start("worker")
        yield made


def running(deployment: Deployment) -> subprocess.Popen[bytes]:
    """The learner that runs, or a new one, ready."""
    for process in deployment.processes:
        if "learner" in process.args and process.poll() is None:  # type: ignore[operator]
            return process
    return started(deployment)


def started(deployment: Deployment) -> subprocess.Popen[bytes]:
    process = deployment.start("learner")
    until(lambda: deployment.ready(deployment.learner_port) and deployment.ready(deployment.worker_port), seconds=180)
    return process


def test_labels_are_learned_once_though_the_learner_is_killed_again_and_again(deployment: Deployment) -> None:
    """kill -9 comes between any two steps: in a start, a join, an announcement, with a fine-tune under way."""
    chance = random.Random(SEED)
    learner = running(deployment)
    events = [window("busy", name, number) for name in FREQUENCIES for number in range(50)]
    ids = publish(deployment, events)
    messages, final = story(ids, chance)
    sent = threading.Event()

    def send() -> None:
        for first in range(0, len(messages), 4):
            deployment.label(*messages[first : first + 4])
            threading.Event().wait(0.15)
        sent.set()

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    for kill in range(KILLS):
        if kill % 2:
            # While it starts: the imports, the claim, the first batches that were left undone.
            threading.Event().wait(chance.uniform(0.5, 12))
        else:
            until(lambda: deployment.ready(deployment.learner_port), seconds=180)
            deployment.ask("busy", "retrain")
            threading.Event().wait(chance.uniform(0, 4))
        learner.kill()
        learner.wait()
        learner = deployment.start("learner")
    sender.join(120)
    assert sent.is_set()

    until(lambda: deployment.ready(deployment.learner_port), seconds=180)
    until(lambda: scored(deployment, "busy") == len(final))
    until(lambda: deployment.status("busy")["outbox"] == 0)
    ends = {
        (deployment.topics.name(kind), partition): after
        for kind in ("labels", "predictions")
        for partition, after in deployment.kafka.end_offsets(deployment.topics.name(kind)).items()
        if after
    }
    # Labels that are said again, or taken back, come after the last that is scored.
    until(lambda: offsets(deployment) == ends)

    check_head(deployment, "busy", final)
    with store_of(deployment) as store:
        assert {run.state for run in store.runs("busy")} == {"failed"}
    assert set(deployment.versions("busy")) == {"v1"}


def offsets(deployment: Deployment) -> dict[tuple[str, int], int]:
    """How far the learner has joined each partition."""
    with store_of(deployment) as store:
        return dict(store.offsets())


def story(ids: list[str], chance: random.Random) -> tuple[list[Label], dict[str, str]]:
    """A label for every event, some mistaken, corrected, repeated or withdrawn, in disorder; and what counts."""
    now = utc_now()
    messages: list[tuple[float, Label]] = []
    final: dict[str, str] = {}
    for event in ids:
        true = event.partition("-")[0]
        at = chance.random()
        fate = chance.random()
        final[event] = true
        if fate < 0.15:
            wrong = chance.choice(sorted(FREQUENCIES.keys() - {true}))
            messages.append((at, label("busy", event, wrong, now)))
            messages.append((at + chance.random() / 2, label("busy", event, true, now + timedelta(seconds=5))))
        elif fate < 0.25:
            messages.append((at, label("busy", event, true, now)))
            messages.append((at + chance.random() / 2, label("busy", event, None, now + timedelta(seconds=5))))
            del final[event]
        else:
            said = label("busy", event, true, now)
            messages += [(at, said)] + ([(at + chance.random() / 2, said)] if fate > 0.85 else [])
    return [message for _, message in sorted(messages, key=lambda pair: pair[0])], final


def scored(deployment: Deployment, stream: str) -> int:
    found: int = deployment.status(stream)["scored"]
    return found


def teach(deployment: Deployment, stream: str, first: int, count: int) -> None:
    """Learn `count` fresh events of each class."""
    before = scored(deployment, stream)
    events = [window(stream, name, number) for name in FREQUENCIES for number in range(first, first + count)]
    ids = publish(deployment, events)
    deployment.label(*(label(stream, event, event.partition("-")[0]) for event in ids))
    until(lambda: scored(deployment, stream) == before + len(ids))


def training(deployment: Deployment, stream: str, learner: subprocess.Popen[bytes]) -> psutil.Process:
    """Ask for a fine-tune and return its process once it trains."""
    code, answer = deployment.ask(stream, "retrain", reason="to be killed")
    assert code == 202, answer

    def phase() -> str:
        progress = deployment.status(stream)["fine_tune"]["progress"]
        return str(progress["phase"]) if progress else ""

    until(lambda: phase() == "training", seconds=180)
    (child,) = [child for child in psutil.Process(learner.pid).children() if "learner.training" in child.cmdline()]
    return child


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def failures(deployment: Deployment) -> float:
    """Failed fine-tunes since the learner started."""
    return Scrape(deployment.learner_port).total("trimtab_versions_total", stream="tuned", outcome="failed")


def answering_version(deployment: Deployment, stream: str, number: int) -> str:
    """The revision that answers an event published now."""
    (event,) = publish(deployment, [window(stream, "slow", number)])
    return deployment.answered()[event].model_version


def test_a_killed_fine_tune_leaves_the_served_model_alone_and_is_reported(deployment: Deployment) -> None:
    """Memory runs out in the training process first; nothing but the candidate may be lost."""
    learner = running(deployment)
    teach(deployment, "tuned", 1_000, 12)
    failed = failures(deployment)
    child = training(deployment, "tuned", learner)
    serving = deployment.status("tuned")["serving"]
    child.kill()
    until(lambda: not deployment.status("tuned")["fine_tune"]["running"])
    assert learner.poll() is None
    assert deployment.status("tuned")["serving"] == serving
    assert set(deployment.versions("tuned")) == {"v1"}
    assert failures(deployment) == failed + 1
    assert answering_version(deployment, "tuned", 2_000) == serving
    with store_of(deployment) as store:
        run = store.runs("tuned")[0]
        assert (run.state, run.cause) == ("failed", "hand")
        assert "SIGKILL" in run.detail["reason"]
        # What it trained on is as untouched as before: it may still enter the exam.
        assert not [row for row in store.examples("tuned") if row.trained_in == run.id]
    assert "SIGKILL" in logged(deployment, "learner")
    teach(deployment, "tuned", 3_000, 2)


def test_a_learner_killed_in_a_fine_tune_reports_it_when_it_is_back(deployment: Deployment) -> None:
    """The run must not stay `running` for ever, its process must not train on alone, and v1 stays in service."""
    learner = running(deployment)
    teach(deployment, "tuned", 5_000, 12)
    child = training(deployment, "tuned", learner)
    serving = deployment.status("tuned")["serving"]
    learner.kill()
    learner.wait()
    until(lambda: ended(child))
    # Workers do not notice: they go on with what they have.
    assert answering_version(deployment, "tuned", 6_000) == serving
    started(deployment)
    until(lambda: deployment.status("tuned")["serving"] != serving)
    assert deployment.status("tuned")["version"] == "v1"
    assert failures(deployment) == 1
    with store_of(deployment) as store:
        run = store.runs("tuned")[0]
        assert run.state == "failed"
        assert "ended meanwhile" in run.detail["reason"]
        assert not store.runs("tuned", states={"running"})
    teach(deployment, "tuned", 7_000, 2)
