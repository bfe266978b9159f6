"""Three learners on one PostgreSQL: each joins its own partitions, one of them learns, and any of them may go."""

from __future__ import annotations

import signal
import subprocess
import uuid
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from deploy.audit import run_audit
from deploy.settings import load_settings
from deploy.wiring import open_registry
from replay import schema
from tests.deployment import Deployment
from tests.integration.probe import STREAM, check_head, end
from tests.integration.test_failover import Pair, contents, epoch_of, is_learner, looked
from tests.kafka import KafkaBroker
from tests.postgres import PostgresServer
from tests.scrape import Scrape
from tests.waiting import until

PARTITIONS = 6


class Group(Pair):
    """Learners that share the partitions, by port."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment)
        self.members: dict[int, subprocess.Popen[bytes]] = {}

    def add(self) -> int:
        """Start another one; returns its port."""
        process, port = self.start()
        self.members[port] = process
        return port

    def divided(self, count: int) -> None:
        """Wait until so many learners own partitions of predictions, and of labels."""
        until(lambda: sorted(map(len, self.owners().values())) == [2 * PARTITIONS // count] * count, seconds=120)

    def owners(self) -> dict[str, set[str]]:
        """By learner, the partitions that it claimed last, of those that were claimed."""
        engine = schema.connect(self.deployment.store_url)
        c = schema.owners.c
        found: dict[str, set[str]] = {}
        with engine.connect() as connection:
            for row in connection.execute(sa.select(c.scope, c.owner).where(c.scope != "learner")):
                found.setdefault(row.owner, set()).add(row.scope)
        engine.dispose()
        return found

    def followers(self) -> list[int]:
        """Ports of those that live and do not lead."""
        return [p for p, one in self.members.items() if one.poll() is None and p != self.deployment.learner_port]

    def inbox(self) -> int:
        """Messages that wait for the leader."""
        engine = schema.connect(self.deployment.store_url)
        with engine.connect() as connection:
            found = connection.scalar(sa.select(sa.func.count()).select_from(schema.inbox))
        engine.dispose()
        return int(found or 0)

    def check(self) -> None:
        """Every label was learned exactly once, and no promise is broken."""
        self.learned()
        until(lambda: self.inbox() == 0)
        check_head(self.deployment, "handed", self.final)
        settings = load_settings(self.deployment.settings)
        found = run_audit(settings, open_registry(settings), None, None)
        assert not found.breaches, found


@pytest.fixture(scope="module")
def group(kafka: KafkaBroker, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    learner = {
        "store": postgres.database(),
        "sharing": True,
        "lease_seconds": 5,
        "batches": {"session_seconds": 6},
    }
    made = Deployment(
        kafka,
        f"t{uuid.uuid4().hex[:8]}-",
        tmp_path_factory.mktemp("sharing"),
        {"handed": STREAM},
        {"learner": learner},
        PARTITIONS,
    )
    try:
        made.start("worker")
        yield Group(made)
    finally:
        made.stop()


def test_partitions_are_divided_and_every_label_is_learned_once(group: Group) -> None:
    """Labels lie on whatever partition their client chose, so most meet a prediction that another learner read."""
    deployment = group.deployment
    group.leads(group.add())
    until(lambda: deployment.ready(deployment.worker_port), seconds=120)
    for _ in range(2):
        group.add()
    group.divided(3)
    group.teach(*range(10))
    for port in group.followers():
        assert "following" in group.waits_for(port)["lease"]
        assert Scrape(port).total("trimtab_learner_leading") == 0
    group.check()


def test_a_follower_that_is_killed_loses_nothing(group: Group) -> None:
    """What it had read and not kept is read again by whoever has its partitions then."""
    port = group.followers()[0]
    group.labelled(group.published(range(100, 105)))
    group.members[port].kill()
    group.labelled(group.published(range(110, 115)))
    group.check()
    group.add()
    group.teach(120)
    group.check()


def test_a_follower_that_was_stopped_past_its_session_does_nothing_twice(group: Group) -> None:
    """Its partitions went elsewhere while it hung; it wakes up and believes that it has them still."""
    deployment = group.deployment
    port = group.followers()[0]
    ids = group.published(range(200, 205))
    group.members[port].send_signal(signal.SIGSTOP)
    try:
        group.labelled(ids)
        group.labelled(group.published(range(210, 215)))
        group.check()
        until(lambda: looked(deployment))
        before = contents(deployment)
    finally:
        group.members[port].send_signal(signal.SIGCONT)
    # It is in the group again, or it has ended and somebody starts it anew.
    until(
        lambda: group.members[port].poll() is not None or claims_made(contents(group.deployment)) > claims_made(before),
        seconds=120,
    )
    after = contents(deployment)
    for table in before.keys() - {"owners"}:
        assert after[table] == before[table], table
    group.teach(220)
    group.check()


def test_another_leads_when_the_leader_is_killed(group: Group) -> None:
    """The followers' rows wait in the inbox for it, and it learns them under a higher epoch."""
    deployment = group.deployment
    epoch = epoch_of(deployment)
    group.members[deployment.learner_port].kill()
    group.labelled(group.published(range(300, 305)))
    ports = group.followers()
    until(lambda: any(deployment.ready(port) for port in ports), seconds=180)
    deployment.learner_port = next(port for port in ports if deployment.ready(port))
    group.check()
    assert epoch_of(deployment) == epoch + 1


def test_followers_end_in_good_order(group: Group) -> None:
    """One after the other, as in a rolling restart: the leader last, and nothing waits for a session to run out."""
    deployment = group.deployment
    for port in group.followers():
        assert end(group.members[port]) == 0
    group.teach(400)
    group.check()
    assert end(group.members[deployment.learner_port]) == 0
    assert not [one for one in deployment.processes if is_learner(one) and one.poll() is None]


def claims_made(found: dict[str, list[tuple[object, ...]]]) -> int:
    """The sum of all epochs: it grows with every claim."""
    at = [column.name for column in schema.owners.c if column.name not in ("beat_at", "claimed_at")].index("epoch")
    return sum(int(str(row[at])) for row in found["owners"])
