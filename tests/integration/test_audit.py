"""The audit on a real Kafka: it finds nothing where all went well, and each promise once it is broken by hand."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import Consumer, TopicPartition
from typer.testing import CliRunner

from deploy.audit import Audit, run_audit
from deploy.cli import app
from deploy.settings import load_settings
from deploy.wiring import open_registry
from stream.events import encode
from tests.deployment import REPOSITORY, Deployment, label
from tests.integration.probe import STREAM, deployed, end, publish, window
from tests.kafka import KafkaBroker
from tests.scrape import Scrape
from tests.waiting import until


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Events, bad ones among them, and labels: early, corrected, withdrawn, for an event that never came."""
    overrides = {"worker": {"guarantee": "exactly_once"}}
    with deployed(kafka, tmp_path_factory.mktemp("audit"), {"probe": STREAM}, overrides) as made:
        worker, learner = made.start_both()
        made.label(label("probe", "slow-0", "slow"), label("probe", "nobody-1", "slow"))
        publish(made, [window("probe", name, number) for name in ("slow", "fast") for number in range(6)])
        kafka.produce(made.topics.name("telemetry"), [(b"bad", b"{", ())])
        for number in range(1, 6):
            made.label(label("probe", f"slow-{number}", "slow"), label("probe", f"fast-{number}", "fast"))
        # Read together, a label and its correction teach only what is right in the end.
        until(lambda: made.status("probe")["labels_learned"] == 11)
        made.label(label("probe", "slow-1", "fast"), label("probe", "slow-2", None))
        until(lambda: labels(made).get("corrected") == 1 and labels(made).get("withdrawn") == 1)
        until(lambda: made.status("probe")["labels_learned"] == 10 and made.status("probe")["scored"] == 10)
        until(lambda: len(made.records("dead_letters")) == 1)
        publish(made, [window("probe", "slow", 6), window("probe", "middle", 0)])
        before = made.status("probe")["serving"]
        made.label(label("probe", "middle-0", "middle"))
        until(lambda: made.status("probe")["scored"] == 11 and made.status("probe")["serving"] != before)
        # Behind the last prediction lies a marker of its transaction, which nobody reads.
        until(lambda: Scrape(made.learner_port).total("trimtab_consumer_lag_events") == 0)
        end(worker)
        end(learner)
        yield made


def labels(deployment: Deployment) -> dict[str, float]:
    """Labels by what became of them."""
    return Scrape(deployment.learner_port).by("trimtab_labels_total", "outcome", stream="probe")


def audit(deployment: Deployment, **blocks: Any) -> Audit:
    settings = load_settings(deployment.settings)
    if blocks:
        settings = settings.model_copy(update=blocks)
    return run_audit(settings, open_registry(settings), None, None)


def broken_store(deployment: Deployment, directory: Path, statement: str) -> Audit:
    """The audit of a copy of the learner's database in which one thing was changed."""
    copy = directory / "learner.db"
    with (
        closing(sqlite3.connect(deployment.directory / "learner.db")) as whole,
        closing(sqlite3.connect(copy)) as other,
    ):
        whole.backup(other)
        other.execute(statement)
        other.commit()
    learner = load_settings(deployment.settings).learner.model_copy(update={"store": f"sqlite:///{copy}"})
    return audit(deployment, learner=learner)


def test_where_all_went_well_it_finds_nothing(deployment: Deployment) -> None:
    """Every kind of label and a dead letter went by, and none of them is a broken promise."""
    found = audit(deployment)
    assert found.breaches == []
    assert (found.places, found.answered, found.parked, found.waiting) == (15, 14, 1, 0)
    assert (found.labels, found.labels_waiting) == (15, 1)
    assert found.dead_letters == {"malformed_json": 1}
    assert found.versions == 1


def test_a_label_that_was_never_learned_is_found(deployment: Deployment, tmp_path: Path) -> None:
    """The promise that a label is learned is worth what would notice that it was not."""
    found = broken_store(deployment, tmp_path, "DELETE FROM examples WHERE event_id = 'fast-3'")
    assert found.labels_not_learned == 1
    assert "fast-3" in found.breaches[0]


def test_a_label_that_was_read_and_dropped_is_found(deployment: Deployment, tmp_path: Path) -> None:
    """The offsets say that it was joined; the database knows nothing of it."""
    found = broken_store(deployment, tmp_path, "DELETE FROM labels WHERE event_id = 'fast-4'")
    assert found.labels_not_learned == 1


def test_a_wrong_label_that_was_learned_is_found(deployment: Deployment, tmp_path: Path) -> None:
    """A correction that came to nothing is a label not learned."""
    found = broken_store(deployment, tmp_path, "UPDATE examples SET label = 'slow' WHERE event_id = 'slow-1'")
    assert found.labels_not_learned == 2  # the first label of the event and its correction both speak against it


def test_an_event_taught_twice_is_found(deployment: Deployment, tmp_path: Path) -> None:
    """A ledger row twice is a head that no labels explain."""
    again = (
        "INSERT INTO ledger (stream, encoder, event_id, sign, label, embedding, at) "
        "SELECT stream, encoder, event_id, sign, label, embedding, at FROM ledger WHERE event_id = 'fast-5'"
    )
    found = broken_store(deployment, tmp_path, again)
    assert found.learned_twice == 1
    assert "fast-5" in found.breaches[0]


def test_a_version_that_nobody_has_is_found(deployment: Deployment, tmp_path: Path) -> None:
    """A prediction whose model cannot be found cannot be explained."""
    registry = tmp_path / "registry"
    shutil.copytree(deployment.directory / "registry", registry)
    next(registry.rglob("versions/v1.json")).unlink()
    settings = load_settings(deployment.settings)
    there = settings.registry.model_copy(update={"url": str(registry)})
    found = audit(deployment, registry=there)
    assert found.versions_missing == 1


def test_an_event_is_explained_from_the_log_and_the_database(deployment: Deployment) -> None:
    """At night the question is one answer: what was it made from, and what has it taught since?"""
    found = explained(deployment, "slow-1", "--json")
    assert json.loads(found["content"])["event_id"] == "slow-1"
    (answer,) = found["predictions"]
    assert answer["ref"] == found["answered"]["place"]
    assert answer["version"] == found["answered"]["version"]
    assert [one["label"] for one in found["labels"]] == ["slow", "fast"]
    assert found["learned"]["label"] == "fast"
    taught = [(one["label"], one["added"]) for one in found["taught"]]
    assert taught == [("slow", True), ("slow", False), ("fast", True)]
    assert found["nearest"]
    assert all(one["event_id"] != "slow-1" for one in found["nearest"])
    assert found["now"]["version"].startswith("v1.")
    assert 0.99 < sum(found["now"]["probabilities"].values()) <= 1.001
    assert all("all of them" in line for line in found["looked"])
    withdrawn = explained(deployment, "slow-2", "--stream", "probe", "--json")
    assert [one["label"] for one in withdrawn["labels"]] == ["slow", None]
    assert withdrawn["learned"] is None
    assert withdrawn["now"] is not None, "the event is read back and embedded again"
    letter = explained(deployment, "bad", "--json")
    assert letter["answered"] is None
    assert [one["reason"] for one in letter["letters"]] == ["malformed_json"]
    text = command(deployment, "explain", "slow-1")
    assert "head: − slow" in text
    assert "(against)" in text or "(for)" in text


def test_a_revision_that_answered_is_asked_again_also_where_its_head_was_pruned(
    deployment: Deployment, tmp_path: Path
) -> None:
    """Whether an answer is what its model says, and not what a defect made of it, is asked long after heads go."""
    settings = yaml.safe_load(deployment.settings.read_text())
    shutil.copytree(deployment.directory / "registry", tmp_path / "registry")
    settings["registry"]["url"] = str(tmp_path / "registry")
    other = tmp_path / "trimtab.yaml"
    other.write_text(yaml.safe_dump(settings))

    def again(event_id: str) -> tuple[str, dict[str, Any]]:
        done = CliRunner().invoke(app, ["explain", event_id, "--json", "--config", str(other)])
        assert done.exit_code == 0, done.output
        (answer,) = json.loads(done.stdout)["predictions"]
        return answer["version"], answer["again"]

    name, before = again("slow-6")
    assert before["how"] == "stored"
    assert before["off"] < 1e-3
    registry = open_registry(load_settings(other))
    assert name in registry.prune("probe", revisions=1, grace=timedelta(0)).revisions
    _, after = again("slow-6")
    assert (after["how"], after["off"]) == ("same", before["off"])
    assert "made again of 10 examples, the same by its checksum: the same answer" in after["told"]
    done = CliRunner().invoke(app, ["versions", "rebuild", "probe", name, "--config", str(other)])
    assert (done.exit_code, "the same head by its checksum" in done.stdout) == (0, True), done.output
    assert again("slow-1")[1]["told"] == "nothing was learned yet"


def explained(deployment: Deployment, *arguments: str) -> Any:
    return json.loads(command(deployment, "explain", *arguments))


def command(deployment: Deployment, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--config", str(deployment.settings)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_second_answer_and_an_event_passed_over_are_found(deployment: Deployment) -> None:
    """Last, because the log cannot be mended: a prediction written again, and a commit past an event."""
    topic = deployment.topics.name("telemetry")
    deployment.kafka.produce(topic, [(b"late-1", encode(window("probe", "slow", 77)), ())])
    waiting = audit(deployment)
    assert waiting.kept
    assert waiting.waiting == 1
    once = deployment.records("predictions")[0]
    deployment.kafka.produce(deployment.topics.name("predictions"), [(once.key, once.value, ())])
    group = load_settings(deployment.settings).worker.group
    client = Consumer({**deployment.kafka.client(), "group.id": deployment.topics.prefix + group})
    ends = [client.get_watermark_offsets(TopicPartition(topic, p), timeout=30)[1] for p in range(2)]
    client.commit(offsets=[TopicPartition(topic, p, end) for p, end in enumerate(ends)], asynchronous=False)
    client.close()
    command = [sys.executable, "-m", "deploy.cli", "audit", "--json", "--config", str(deployment.settings)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert (found["unanswered"], found["answered_twice"], found["kept"]) == (1, 1, False)
