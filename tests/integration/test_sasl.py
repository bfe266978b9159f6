"""The whole loop against a Kafka that takes nobody without TLS and a password."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.events import Telemetry, encode
from tests.deployment import REPOSITORY, Deployment, label
from tests.integration.probe import FREQUENCIES, STREAM, deployed, logged, window
from tests.kafka import KafkaBroker
from tests.waiting import until


@pytest.fixture(scope="module")
def deployment(kafka_sasl: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A worker and a learner whose password lies in a file, as an operator would mount a secret."""
    directory = tmp_path_factory.mktemp("sasl")
    sasl = kafka_sasl.sasl
    assert sasl is not None
    (directory / "password").write_text(sasl.password + "\n")
    block = {
        "security_protocol": "SASL_SSL",
        "ca_file": str(sasl.ca_file),
        "sasl_mechanism": sasl.mechanism,
        "sasl_username": sasl.username,
        "sasl_password_file": str(directory / "password"),
    }
    with deployed(
        kafka_sasl, directory, {"probe": STREAM}, {"kafka": block, "control": {"secret": "a secret"}}
    ) as made:
        yield made


def trimtab(deployment: Deployment, *command: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *command, "--config", str(deployment.settings)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def lines(directory: Path, name: str, messages: list[bytes]) -> str:
    """A file of JSON lines."""
    path = directory / f"{name}.jsonl"
    path.write_bytes(b"\n".join(messages) + b"\n")
    return str(path)


def test_the_loop_runs_behind_tls_and_a_password(deployment: Deployment) -> None:
    """One `kafka:` block must drive librdkafka, kafka-python and Faust's client alike."""
    deployment.start_both()
    events = [window("probe", name, number) for name in FREQUENCIES for number in range(4)]
    messages = [encode(event) for event in events]
    done = trimtab(deployment, "publish", lines(deployment.directory, "events", messages), "--topic", "telemetry")
    assert done.returncode == 0, done.stderr
    until(lambda: {event.event_id for event in events} <= set(deployment.answered()))

    labels = [encode(label("probe", e.event_id, e.event_id.partition("-")[0])) for e in events]
    done = trimtab(deployment, "publish", lines(deployment.directory, "labels", labels), "--topic", "labels")
    assert done.returncode == 0, done.stderr
    until(lambda: deployment.status("probe")["labels_learned"] == len(events))
    # What was learned is announced a little later than it is counted, and the first revisions may hold one class only.
    asked: list[Telemetry] = []

    def told() -> bool:
        asked.append(window("probe", "fast", 77 + len(asked)))
        deployment.publish(asked[-1])
        until(lambda: asked[-1].event_id in deployment.answered())
        return deployment.answered()[asked[-1].event_id].label in FREQUENCIES

    until(told, every=0.2)

    done = trimtab(deployment, "predictions", "--format", "json", "--stream", "probe")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert {one["event_id"] for one in printed} == {event.event_id for event in [*events, *asked]}
    (newest,) = [one for one in printed if one["event_id"] == asked[-1].event_id]
    assert newest["label"] in FREQUENCIES
    assert newest["model_version"].startswith("v1.")

    # Faust's own consumer is behind the control topic.
    done = trimtab(deployment, "versions", "rollback", "probe", "v1.1", "--by-topic")
    assert done.returncode == 0, done.stderr
    until(lambda: bool(deployment.status("probe")["paused"]))
    for process in ("worker", "learner"):
        assert secret(deployment) not in logged(deployment, process)


def secret(deployment: Deployment) -> str:
    """The password, which no log may show."""
    assert deployment.kafka.sasl is not None
    return deployment.kafka.sasl.password


def test_a_wrong_password_is_one_clear_sentence(deployment: Deployment) -> None:
    """Who mistypes a secret must learn that it is the secret, not read a client's stack."""
    path = deployment.directory / "password"
    right = path.read_text()
    path.write_text("not the password\n")
    try:
        for command in (["worker", "--port", "0"], ["predictions"]):
            done = trimtab(deployment, *command)
            assert done.returncode == 2, done.stderr
            assert "Traceback" not in done.stderr
            assert "not the password" not in done.stderr
            assert "sasl" in done.stderr.lower()
    finally:
        path.write_text(right)
