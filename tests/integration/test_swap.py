"""Revisions reach every worker, none is half served, and a broken one is not served at all."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.encoders import build_telemetry_encoder
from learner.registry import Pointer, Registry, VersionManifest
from stream.events import utc_now
from tests.deployment import Deployment, label
from tests.integration.probe import DIMENSION, FREQUENCIES, STREAM, deployed, end, logged, publish, window
from tests.kafka import KafkaBroker, free_port
from tests.scrape import Scrape
from tests.waiting import until

STREAMS: dict[str, Any] = {"probe": STREAM}


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A learner, and no worker yet."""
    with deployed(kafka, tmp_path_factory.mktemp("swap"), STREAMS, {"worker": {"batch_events": 8}}) as made:
        made.start("learner")
        yield made


Workers = dict[int, subprocess.Popen[bytes]]
"""By port."""


@pytest.fixture(scope="module")
def workers(deployment: Deployment) -> Workers:
    """Three of them, ready."""
    made = {port: deployment.start("worker", "--port", str(port)) for port in (free_port(), free_port(), free_port())}
    until(lambda: deployment.ready(deployment.learner_port), seconds=180)
    until(lambda: all(deployment.ready(port) for port in made), seconds=180)
    return made


def announced(deployment: Deployment) -> list[str]:
    """Every revision that was put into service, in order."""
    pointers = [Pointer.decode(r.key or b"", r.value or b"") for r in deployment.records("model_versions")]
    return [pointer.name for pointer in pointers if pointer.kind != "version"]


def serving(port: int) -> str:
    """The revision that a worker says it answers with; nothing before the first one came."""
    return "".join(Scrape(port).by("trimtab_revision_info", "version", stream="probe"))


def followed(deployment: Deployment, workers: Workers) -> bool:
    """Whether every worker serves what was announced last."""
    return announced(deployment)[-1:] * len(workers) == [serving(port) for port in workers]


def teach(deployment: Deployment, first: int, count: int) -> None:
    """Label fresh events a few at a time, so that each few makes a revision of its own."""
    for number in range(first, first + count):
        ids = publish(deployment, [window("probe", name, number) for name in FREQUENCIES])
        before = deployment.status("probe")["serving"]
        deployment.label(*(label("probe", event, event.partition("-")[0]) for event in ids))
        until(lambda: deployment.status("probe")["serving"] != before)  # noqa: B023


def test_three_workers_all_follow_every_announcement(deployment: Deployment, workers: Workers) -> None:
    """A consumer group would give each announcement to one of them, and two thirds of the answers would be old."""
    until(lambda: followed(deployment, workers))
    before = len(announced(deployment))
    swaps = {port: Scrape(port).total("trimtab_swaps_total", stream="probe") for port in workers}
    teach(deployment, 0, 6)
    made: list[int] = []

    def all_counted() -> bool:
        """Labels on two partitions may make one revision more, after the first is followed."""
        made.append(len(announced(deployment)) - before)
        now = {port: Scrape(port).total("trimtab_swaps_total", stream="probe") for port in workers}
        return {port: now[port] - count for port, count in swaps.items()} == dict.fromkeys(swaps, made[-1])

    until(all_counted)
    assert made[-1] >= 6
    assert all(Scrape(port).total("trimtab_refused_versions_total") == 0 for port in workers)


def test_through_many_swaps_every_event_is_answered_once_by_an_announced_revision(
    deployment: Deployment, workers: Workers
) -> None:
    """No batch may be dropped, repeated or answered by half a swap."""
    before = set(announced(deployment))
    sent: list[str] = []
    known = publish(deployment, [window("probe", name, number) for name in FREQUENCIES for number in range(100, 120)])
    for step in range(0, len(known), 5):
        batch = [window("probe", name, 1_000 + number) for name in FREQUENCIES for number in range(step, step + 5)]
        deployment.publish(*batch)
        sent += [event.event_id for event in batch]
        revision = deployment.status("probe")["serving"]
        deployment.label(*(label("probe", event, event.partition("-")[0]) for event in known[step : step + 5]))
        until(lambda: deployment.status("probe")["serving"] != revision)  # noqa: B023
    sent += known
    until(lambda: set(sent) <= set(deployment.answered()), every=0.3)
    wanted = set(sent)
    answers = [answer for answer in deployment.predictions() if answer.event_id in wanted]
    assert Counter(answer.event_id for answer in answers) == Counter(sent)
    names = announced(deployment)
    used = {answer.model_version for answer in answers}
    assert used <= set(names)
    assert len(used - before) >= 3
    events = {(r.topic, r.partition, r.offset): r for r in deployment.records("telemetry")}
    assert all(events[a.ref.topic, a.ref.partition, a.ref.offset].key == a.event_id.encode() for a in answers)


def test_a_worker_that_comes_back_serves_the_current_revision_with_nothing_newly_announced(
    deployment: Deployment, workers: Workers
) -> None:
    """Waiting for the next announcement, it would answer with nothing, perhaps for days."""
    until(lambda: followed(deployment, workers))
    current = announced(deployment)[-1]
    port = next(iter(workers))
    assert end(workers[port]) == 0
    workers[port] = deployment.start("worker", "--port", str(port))
    until(lambda: deployment.ready(port), seconds=180)
    assert serving(port) == current
    assert announced(deployment)[-1] == current


def test_a_corrupted_encoder_is_refused_by_name_and_the_old_version_stays(
    deployment: Deployment, workers: Workers
) -> None:
    """A torn upload or a failing disk must cost the new version, not the service."""
    registry = Registry(str(deployment.directory / "registry"))
    made = build_telemetry_encoder(("x", "y"), 7, "cpu", window=32, dimension=DIMENSION, learned=8)
    registry.put_encoder(made.sealed(), made.files())
    head = registry.revision("probe", announced(deployment)[-1]).head
    name = registry.commit(
        VersionManifest(stream="probe", parent="v1", created_at=utc_now(), encoder=made.sealed(), head=head)
    )
    blob = Path(registry._blob(made.sealed().files["weights.safetensors"]))
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(bytes(content))

    # The learner does not announce it ...
    code, answer = deployment.ask("probe", "promote", version=name)
    assert code == 409
    assert name in answer["message"]
    # ... and workers do not take it, should it be announced: it may break after it was examined.
    current = announced(deployment)[-1]
    newest = [Pointer.decode(r.key or b"", r.value or b"") for r in deployment.records("model_versions")][-1]
    pointer = newest.model_copy(
        update={"version": name, "revision": 1, "encoder": registry.version("probe", name).encoder_digest, "head": head}
    )
    pointer = pointer.model_copy(update={"sequence": newest.sequence + 1, "kind": "champion"})
    deployment.kafka.produce(deployment.topics.name("model_versions"), [(pointer.key, pointer.encode(), ())])

    def refusals(port: int) -> dict[str, float]:
        return Scrape(port).by("trimtab_refused_versions_total", "reason", stream="probe")

    until(lambda: all(sum(refusals(port).values()) == 1 for port in workers))
    assert all(serving(port) == current for port in workers)
    assert f"{name}.1" in logged(deployment, "worker")
    ids = publish(deployment, [window("probe", "slow", number) for number in range(9_000, 9_012)])
    assert {deployment.answered()[event].model_version for event in ids} == {current}

    # What is learned next is served as if nothing had been.
    teach(deployment, 200, 2)
    until(lambda: followed(deployment, workers))
    assert announced(deployment)[-1].startswith("v1.")
