"""What tests of every room share: a real Kafka, plain or with TLS and passwords, fresh topic names, a PostgreSQL."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from typing import NoReturn

import hypothesis
import pytest

from tests.kafka import KafkaBroker, KafkaUnavailable, Sasl
from tests.postgres import PostgresServer, PostgresUnavailable

# A slow machine is no reason to fail.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def missing(what: str) -> NoReturn:
    """Skip a test that needs what this machine lacks, or fail it in CI, where nothing may be lacking."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{what} (in CI this is a failure)")
    pytest.skip(what)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the tests, those that mostly wait for processes go first and the others fill gaps."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent.name not in ("integration", "chaos"))


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """One real Kafka for the whole run, or for each of its workers; a test that kills one starts its own."""
    broker = KafkaBroker(tmp_path_factory.mktemp("kafka"))
    try:
        broker.start()
    except KafkaUnavailable as lack:
        missing(str(lack))
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def kafka_sasl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """A real Kafka whose only listener is SASL_SSL; `.sasl` has `ca_file`, `username`, `password`, `mechanism`."""
    directory = tmp_path_factory.mktemp("kafka-sasl")
    try:
        broker = KafkaBroker(directory, sasl=Sasl.create(directory / "tls")).start()
    except KafkaUnavailable as lack:
        missing(str(lack))
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One real PostgreSQL for the whole run; a test that halts a server starts its own with `PostgresServer`."""
    try:
        server = PostgresServer()
    except PostgresUnavailable as lack:
        missing(str(lack))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def topics() -> Callable[[], str]:
    """Each call gives a fresh topic prefix, such as `t3f9a1c02-`, so that no two tests share a topic."""
    return lambda: f"t{uuid.uuid4().hex[:8]}-"
