"""Two learners on one PostgreSQL: one leads, the other stands by, and the server itself may go for a while."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from confluent_kafka import Producer

from replay import schema
from stream.events import encode
from tests.conftest import missing
from tests.deployment import Deployment, label
from tests.integration.probe import FREQUENCIES, STREAM, check_head, deployed, end, logged, publish, store_of, window
from tests.kafka import KafkaBroker, free_port
from tests.postgres import PASSWORD, PostgresServer, PostgresUnavailable
from tests.scrape import Scrape
from tests.waiting import until


class Pair:
    """Learners that were started one after another, on ports of their own."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.final: dict[str, str] = {}

    def start(self) -> tuple[subprocess.Popen[bytes], int]:
        """Another learner, and its port."""
        port = free_port()
        return self.deployment.start("learner", "--port", str(port)), port

    def leads(self, port: int) -> None:
        """Wait until the learner on this port leads, and ask it from now on."""
        until(lambda: self.deployment.ready(port), seconds=180)
        self.deployment.learner_port = port

    def waits_for(self, port: int) -> dict[str, str]:
        """Why the learner on this port is not ready; empty where it does not answer, or is."""
        code, body = self.deployment.get(port, "/readyz")
        return dict(body["waiting_for"]) if code else {}

    def published(self, numbers: Sequence[int]) -> list[str]:
        """Events of each class, answered by the worker."""
        return publish(self.deployment, [window("handed", name, n) for name in FREQUENCIES for n in numbers])

    def labelled(self, ids: Sequence[str]) -> None:
        """Labels for them, by a client with librdkafka's own partitioner (CRC32), and not with Java's."""
        producer = Producer(self.deployment.kafka.client())
        for event in ids:
            message = label("handed", event, event.partition("-")[0])
            producer.produce(self.deployment.topics.name("labels"), encode(message), event.encode())
        assert producer.flush(60) == 0
        self.final |= {event: event.partition("-")[0] for event in ids}

    def learned(self) -> None:
        """Wait until all that was labelled is learned and announced."""
        until(lambda: self.deployment.status("handed")["scored"] == len(self.final))
        until(lambda: self.deployment.status("handed")["outbox"] == 0)

    def teach(self, *numbers: int) -> None:
        """Fresh events of each class, labelled and learned."""
        self.labelled(self.published(numbers))
        self.learned()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL that may be halted."""
    try:
        made = PostgresServer()
    except PostgresUnavailable as lack:
        missing(str(lack))
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def pair(kafka: KafkaBroker, server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    learner = {"store": server.database(), "lease_seconds": 5, "batches": {"session_seconds": 5}}
    with deployed(kafka, tmp_path_factory.mktemp("failover"), {"handed": STREAM}, {"learner": learner}) as made:
        made.start("worker")
        yield Pair(made)


def epoch_of(deployment: Deployment) -> int:
    with store_of(deployment) as store:
        owner = store.owner()
        assert owner is not None
        return owner[1]


def contents(deployment: Deployment) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the learner's database but its owner's signs of life, and every message that followed from them."""
    engine = schema.connect(deployment.store_url)
    found: dict[str, list[tuple[Any, ...]]] = {}
    with engine.connect() as connection:
        for table in schema.METADATA.sorted_tables:
            columns = [column for column in table.c if column.name not in ("beat_at", "claimed_at")]
            found[table.name] = sorted((tuple(row) for row in connection.execute(sa.select(*columns))), key=repr)
    engine.dispose()
    for kind in ("model_versions", "dead_letters", "audit"):
        found[kind] = [(record.key, record.value) for record in deployment.records(kind)]
    return found


def test_a_learner_stands_by_and_takes_over_when_the_leader_is_killed(pair: Pair) -> None:
    """Training and announcing pass on under a higher epoch, and not a label is lost or learned twice."""
    deployment = pair.deployment
    leader, port = pair.start()
    pair.leads(port)
    until(lambda: deployment.ready(deployment.worker_port))
    second, other = pair.start()
    pair.teach(*range(4))
    epoch = epoch_of(deployment)
    until(lambda: "lease" in pair.waits_for(other))
    assert f"epoch {epoch}" in pair.waits_for(other)["lease"]
    assert deployment.get(other, "/livez")[0] == 200
    assert deployment.get(other, "/streams")[0] == 503
    assert Scrape(other).total("trimtab_learner_leading") == 0

    leader.kill()
    leader.wait()
    # Nobody leads for a moment, and what comes then waits in Kafka.
    pair.labelled(pair.published(range(100, 104)))
    pair.leads(other)
    pair.learned()
    assert epoch_of(deployment) == epoch + 1
    check_head(deployment, "handed", pair.final)
    # Workers follow the new leader's announcements.
    serving = deployment.status("handed")["serving"]
    until(lambda: Scrape(other).total("trimtab_learner_leading") == 1)

    def answering() -> str:
        (event,) = publish(deployment, [window("handed", "slow", 1_000)])
        return deployment.answered()[event].model_version

    until(lambda: answering() == serving)
    assert second.poll() is None


def test_a_label_is_learned_once_on_whatever_partition_its_client_puts_it(pair: Pair) -> None:
    """A client of another language hashes the key otherwise; the learner reads all partitions and joins regardless."""
    deployment = pair.deployment
    answered = {record.key: record.partition for record in deployment.records("predictions")}
    apart = [
        record.key.decode()
        for record in deployment.records("labels")
        if record.key is not None and record.partition != answered[record.key]
    ]
    assert apart
    with store_of(deployment) as store:
        before = store.sizes()["ledger"]
    # The same again from a client that hashes as trimtab does: now it lies on both partitions.
    deployment.label(*(label("handed", event, event.partition("-")[0]) for event in apart))
    until(lambda: Scrape(deployment.learner_port).total("trimtab_labels_total", outcome="repeated") >= len(apart))
    check_head(deployment, "handed", pair.final)
    with store_of(deployment) as store:
        assert store.sizes()["ledger"] == before
    assert deployment.status("handed")["scored"] == len(pair.final)


def test_a_leader_that_was_stopped_changes_nothing_when_it_goes_on(pair: Pair) -> None:
    """A machine that hung for longer than the lease wakes up with batches in its hands, and believes that it leads."""
    deployment = pair.deployment
    stopped = next(process for process in deployment.processes if is_learner(process) and process.poll() is None)
    epoch = epoch_of(deployment)
    ids = pair.published(range(200, 204))
    stopped.send_signal(signal.SIGSTOP)
    pair.labelled(ids)
    _, port = pair.start()
    pair.leads(port)
    pair.learned()
    assert epoch_of(deployment) == epoch + 1
    # The new leader's own look at how well each class was answered, every few seconds, ends in its database too.
    until(lambda: looked(deployment))
    before = contents(deployment)
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(120) == 1
    assert "Superseded" in logged(deployment, "learner")
    assert contents(deployment) == before
    pair.teach(300)
    check_head(deployment, "handed", pair.final)


def test_a_database_that_is_away_for_a_while_is_waited_for(pair: Pair, server: PostgresServer) -> None:
    """The learner says what it waits for, lives on, and learns what came meanwhile."""
    deployment = pair.deployment
    leader = next(process for process in deployment.processes if is_learner(process) and process.poll() is None)
    port = deployment.learner_port
    ids = pair.published(range(400, 404))
    server.halt()
    pair.labelled(ids)
    until(lambda: "database" in pair.waits_for(port))
    why = pair.waits_for(port)["database"]
    assert "the learner's database" in why
    assert deployment.get(port, "/streams/handed")[0] == 503
    assert deployment.ask("handed", "pause")[0] == 503
    assert deployment.get(port, "/livez")[0] == 200
    server.start()
    pair.leads(port)
    pair.learned()
    assert leader.poll() is None
    check_head(deployment, "handed", pair.final)
    assert PASSWORD not in logged(deployment, "learner")
    assert end(leader) == 0
    with store_of(deployment) as store:
        tenure = store.tenure()
        assert tenure is not None
        assert tenure.lease is None, "whoever comes next need not wait"


def looked(deployment: Deployment) -> bool:
    """Whether the best recalls are those of all that was scored by now."""
    with store_of(deployment) as store:
        best = store.best_recall("handed")
        now = {name: right / total for name, (right, total) in store.recalls("handed").items()}
    return best.keys() == now.keys() and all(best[name] >= recall for name, recall in now.items())


def is_learner(process: subprocess.Popen[bytes]) -> bool:
    return "learner" in process.args  # type: ignore[operator]
