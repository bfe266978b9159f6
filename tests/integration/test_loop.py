"""The whole loop on a real Kafka: publish, predict, label, learn at once, retrain, exam, swap, roll back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from getpass import getuser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.rollback import blast, correct
from deploy.settings import load_settings
from learner.control import ControlAnswer, ControlRequest, sign
from learner.heads import HeadSums
from learner.registry import Registry
from replay.store import LearnerStore
from stream.events import Event, Report, Telemetry, encode, utc_now
from stream.reissue import Reissued
from tests.deployment import Deployment, label
from tests.kafka import KafkaBroker
from tests.waiting import until

QUICK: dict[str, Any] = {"epochs": 1, "frozen_layers": 5, "batch_size": 16, "threads": 1}
STREAMS: dict[str, Any] = {
    "notes": {"kind": "text", "finetune": QUICK, "triggers": {}},
    "probe": {
        "kind": "telemetry",
        "encoder": {"channels": ["x", "y"], "window": 32, "dimension": 64, "learned": 16},
        "finetune": {**QUICK, "frozen_layers": 0, "training": "full"},
        "triggers": {},
    },
}

SAYINGS = {
    "power": [
        "bus voltage dropped on string {n}",
        "battery {n} discharges too fast",
        "solar array {n} gives no current",
    ],
    "weather": ["clouds over the dome for {n} hours", "humidity rose to {n} percent", "wind of {n} knots at the site"],
    "pointing": ["tracking error of {n} arcseconds", "guider lost star {n}", "mount stalled in axis {n}"],
}
FREQUENCIES = {"power": 1.0, "weather": 3.0, "pointing": 6.0}


def report(name: str, number: int) -> Report:
    sayings = SAYINGS[name]
    text = sayings[number % len(sayings)].format(n=number)
    return Report(event_id=f"{name}-{number}", stream="notes", observed_at=utc_now(), text=text)


def window(name: str, number: int) -> Telemetry:
    phase, frequency = 0.37 * number, FREQUENCIES[name]
    wave = [math.sin(phase + frequency * t / 3) for t in range(32)]
    other = [math.cos(phase * 2 + t / 5) + 0.01 * (number % 40) for t in range(32)]
    return Telemetry(
        event_id=f"{name}-{number}", stream="probe", observed_at=utc_now(), channels=["x", "y"], values=[wave, other]
    )


MAKE: dict[str, Callable[[str, int], Event]] = {"notes": report, "probe": window}


@pytest.fixture
def deployment(kafka: KafkaBroker, topics: Callable[[], str], tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(
        kafka, topics(), tmp_path, STREAMS, {"control": {"secret": "a test's secret"}, "worker": {"batch_events": 64}}
    )
    yield made
    made.stop()


def teach(deployment: Deployment, stream: str, name: str, numbers: range) -> None:
    """Publish events of a class, wait for their answers, label them, and wait until they are learned."""
    before = deployment.status(stream)["labels_learned"]
    events = [MAKE[stream](name, number) for number in numbers]
    deployment.publish(*events)
    until(lambda: {e.event_id for e in events} <= set(deployment.answered()))
    deployment.label(*(label(stream, e.event_id, name) for e in events))
    # One in five of a class is kept for the exam from its tenth label on, and leaves the head.
    wanted = before + len(events) * (1 if len(events) < 10 else 0.6)
    until(lambda: deployment.status(stream)["labels_learned"] >= wanted)


def answer(deployment: Deployment, event: Event) -> tuple[str | None, str, float]:
    deployment.publish(event)
    until(lambda: event.event_id in deployment.answered())
    found = deployment.answered()[event.event_id]
    return found.label, found.model_version, found.novelty


def becomes(deployment: Deployment, stream: str, name: str, first: int, wanted: Callable[[str, str], bool]) -> None:
    """Ask with fresh events until the answer is as wanted."""
    numbers = iter(range(first, first + 10_000))

    def asked() -> bool:
        found, version, _ = answer(deployment, MAKE[stream](name, next(numbers)))
        return found is not None and wanted(found, version)

    until(asked, every=0.2)


@pytest.mark.parametrize("stream", ["notes", "probe"])
@pytest.mark.timeout(600)
def test_the_whole_loop(deployment: Deployment, stream: str) -> None:
    """What a newcomer is promised, from the first event to a rollback, on real parts."""
    deployment.start_both()

    found, _, novelty = answer(deployment, MAKE[stream]("power", 1_000))
    assert (found, novelty) == (None, 1.0)
    unheard = iter(range(1_001, 2_000))
    until(lambda: answer(deployment, MAKE[stream]("power", next(unheard)))[1].startswith("v1."))

    teach(deployment, stream, "power", range(40))
    teach(deployment, stream, "weather", range(40))
    becomes(deployment, stream, "weather", 2_000, lambda found, _: found == "weather")
    becomes(deployment, stream, "power", 2_000, lambda found, _: found == "power")

    # A class never seen before is usable from its first labels on, with no training.
    teach(deployment, stream, "pointing", range(5))
    becomes(deployment, stream, "pointing", 2_000, lambda found, _: found == "pointing")

    code, asked = deployment.ask(stream, "retrain", reason="by hand")
    assert code == 202, asked
    until(lambda: deployment.status(stream)["fine_tune"]["running"])
    code, folded = deployment.ask(stream, "retrain")
    assert code == 202
    assert "folded into the next" in folded["message"]
    until(lambda: "v2" in deployment.versions(stream), seconds=180)
    assert deployment.versions(stream)["v2"]["state"] == "promoted", deployment.versions(stream)
    assert "pointing" in deployment.versions(stream)["v2"]["unjudged"]
    becomes(
        deployment, stream, "weather", 3_000, lambda found, version: version.startswith("v2.") and found == "weather"
    )
    becomes(deployment, stream, "pointing", 3_000, lambda found, _: found == "pointing")
    until(lambda: "v3" in deployment.versions(stream), seconds=180)

    if stream == "probe":
        roll_back_and_correct(deployment, stream)
    else:
        code, rolled = deployment.ask(stream, "rollback", version="v1", reason="test")
        assert code == 202, rolled
    becomes(
        deployment, stream, "pointing", 4_000, lambda found, version: version.startswith("v1.") and found == "pointing"
    )

    code, exact = deployment.ask(stream, "rollback", version="v1.1", reason="exact")
    assert code == 202, exact
    numbers = iter(range(5_000, 6_000))
    until(lambda: answer(deployment, MAKE[stream]("power", next(numbers)))[1] == "v1.1")
    assert deployment.status(stream)["paused"]
    code, refused = deployment.ask(stream, "rollback", version="v99")
    assert code == 409
    assert "v99" in refused["message"]

    request = ControlRequest(action="resume", stream=stream, who="the topic")
    value = encode(request)
    topic = deployment.topics.name("control")
    deployment.kafka.produce(topic, [(b"x", value, ()), (b"x", value, (("trimtab-signature", b"forged"),))])
    deployment.kafka.produce(topic, [(b"x", value, (("trimtab-signature", sign(value, b"a test's secret")),))])
    until(lambda: not deployment.status(stream)["paused"])
    audit = [ControlAnswer.model_validate_json(r.value or b"") for r in deployment.records("audit")]
    assert [a.accepted for a in audit if a.action == "resume"] == [True]
    assert [a.accepted for a in audit if a.action == "retrain"] == [True, True]


def roll_back_and_correct(deployment: Deployment, stream: str) -> None:
    """By the command line, as at night: what is different, how far it reached, back, and its answers corrected."""
    different = cli(deployment, "versions", "diff", stream, "v1", "v2", "--json")
    assert different["n"] == sum(one["n"] for one in different["classes"]) > 0
    changed = [one["kind"] for one in different["changed"]]
    assert changed.count("lost") == sum(one["lost"] for one in different["classes"])
    made = cli(deployment, "versions", "rebuild", stream, "v2", "--json")
    assert (made["outcome"], made["proven"], made["chain"]) == ("same", True, ["v2"])
    command = ("rollback", stream, "--since", "v2", "--json", "--yes", "--reason", "test", "--rate", "5000")
    found = cli(deployment, *command)
    settings = load_settings(deployment.settings)

    def stop(done: Reissued, _: int) -> None:
        raise InterruptedError(done.corrected)

    seen = blast(settings, stream, "v2", None)
    with pytest.raises(InterruptedError):
        correct(settings, seen.way, 1.0, None, stop, who="who was interrupted")
    before = [one for one in deployment.predictions() if one.supersedes is not None]
    assert 0 < len(before) < found["predictions"]
    assert not corrections_told(deployment, stream), "told once it is done"
    resumed = cli(deployment, *command, "--reissue")
    answers = [one for one in deployment.predictions() if one.stream == stream]
    suspect = {one.event_id: one for one in answers if one.model_version.startswith(("v2.", "v3."))}
    assert found["target"] == "v1"
    assert found["predictions"] == len(suspect) > 0
    assert found["in_service"].startswith(("v2.", "v3."))
    assert sum(one["predictions"] for one in found["classes"]) == len(suspect)
    corrections = {one.event_id: one for one in answers if one.supersedes is not None}
    assert sum(one.supersedes is not None for one in answers) == len(corrections)
    assert resumed["reissued"]["corrected"] == len(corrections) - len(before)
    assert {name: one.supersedes for name, one in corrections.items()} == {
        name: one.model_version for name, one in suspect.items()
    }
    assert all(one.model_version.startswith("v1.") for one in corrections.values())
    assert all(one.ref == suspect[name].ref for name, one in corrections.items())
    again = cli(deployment, *command, "--reissue")
    assert (again["corrected"], again["to_correct"], again["reissued"]["corrected"]) == (len(suspect), 0, 0)
    [line] = corrections_told(deployment, stream)
    assert sum(line.corrected.values()) == len(suspect), "with what the interrupted one did, and once"
    assert set(line.corrected) == {one.model_version.partition(".")[0] for one in suspect.values()}
    assert (line.who, line.reason) == (getuser(), "test")
    assert "by v1." in line.message
    name = next(iter(corrections))
    explained = cli(deployment, "explain", name, "--stream", stream, "--json")
    assert [one["supersedes"] for one in explained["predictions"]] == [None, suspect[name].model_version]
    # What is scored is what was served first.
    assert explained["answered"]["version"] == suspect[name].model_version


def corrections_told(deployment: Deployment, stream: str) -> list[ControlAnswer]:
    """The audit's lines of corrections."""
    audit = [ControlAnswer.model_validate_json(record.value or b"") for record in deployment.records("audit")]
    return [one for one in audit if (one.action, one.stream) == ("reissue", stream)]


def cli(deployment: Deployment, *arguments: str) -> dict[str, Any]:
    """What a command of the command line prints as JSON."""
    done = CliRunner().invoke(app, [*arguments, "--config", str(deployment.settings)])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_correction_and_a_withdrawal_change_the_served_answer(deployment: Deployment) -> None:
    """A wrong label must not stay in the model once its labeller takes it back."""
    deployment.start_both()
    teach(deployment, "probe", "power", range(6))
    teach(deployment, "probe", "weather", range(6))
    wrong = [MAKE["probe"]("pointing", n) for n in range(4)]
    deployment.publish(*wrong)
    until(lambda: {e.event_id for e in wrong} <= set(deployment.answered()))
    deployment.label(*(label("probe", e.event_id, "weather") for e in wrong))
    deployment.label(*(label("probe", e.event_id, "pointing") for e in wrong))
    becomes(deployment, "probe", "pointing", 2_000, lambda found, _: found == "pointing")
    deployment.label(*(label("probe", e.event_id, None) for e in wrong))
    until(lambda: deployment.status("probe")["classes"] == 2)
    becomes(deployment, "probe", "pointing", 9_000, lambda found, _: found != "pointing")


def test_a_learner_killed_and_restarted_has_learned_every_label_once(deployment: Deployment) -> None:
    """kill -9 between any two steps must neither lose a label nor learn one twice."""
    _, learner = deployment.start_both()
    events = [MAKE["probe"](name, n) for name in FREQUENCIES for n in range(60)]
    deployment.publish(*events)
    until(lambda: len(deployment.answered()) >= len(events))
    for part in range(6):
        chosen = events[part * 30 : part * 30 + 30]
        deployment.label(*(label("probe", e.event_id, e.event_id.partition("-")[0]) for e in chosen))
        learner.kill()
        learner.wait()
        learner = deployment.start("learner")
        until(lambda: deployment.ready(deployment.learner_port))
    until(lambda: deployment.status("probe")["scored"] == len(events))
    until(lambda: deployment.status("probe")["outbox"] == 0)
    deployment.stop()

    store = LearnerStore(f"sqlite:///{deployment.directory}/learner.db")
    learned = store.examples("probe")
    assert sorted(row.event_id for row in learned) == sorted(e.event_id for e in events)
    assert all(row.label == row.event_id.partition("-")[0] for row in learned)
    sums = HeadSums(64, learned_bound(deployment))
    ledger = store.follow_ledger("probe", learned[0].encoder)
    sums.add(*ledger.added)
    sums.subtract(*ledger.removed)
    wanted = HeadSums(64, sums.bound)
    taught = [row for row in learned if not row.exam]
    wanted.add(np.stack([row.embedding for row in taught]), [row.label for row in taught])
    assert sums == wanted


def learned_bound(deployment: Deployment) -> float:
    registry = Registry(str(deployment.directory / "registry"))
    return registry.version("probe", "v1").encoder.bound
