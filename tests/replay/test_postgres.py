"""What only a server can do to a learner: two at once, locks, connections that break, a server that goes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa

from replay import schema
from replay.lease import Lease
from replay.schema import StoreUrl, masked
from replay.store import LearnerStore, Outgoing
from stream.errors import Misconfigured, RetryLater, Superseded, TrimtabError
from tests.postgres import PASSWORD, PostgresServer
from tests.replay.steps import NOW, Learner, head_due, head_of
from tests.replay.test_store import SMALL, batch_of
from tests.waiting import until


@pytest.fixture
def stores(postgres: PostgresServer) -> Iterator[tuple[LearnerStore, LearnerStore]]:
    """The same database, opened by two learners."""
    where = postgres.database()
    made = LearnerStore(where, settings=SMALL), LearnerStore(where, settings=SMALL)
    yield made
    for store in made:
        store.close()


def test_a_claim_waits_for_the_transaction_under_way(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """Taken over in the middle of a batch: it is whole and the last of its epoch, or it is not at all."""
    old = Learner(stores[0])
    claimed: list[int] = []
    taker = threading.Thread(target=lambda: claimed.append(stores[1].claim("other", NOW)))
    with stores[0].transaction(old.epoch, NOW) as tx:
        tx.advance({("labels", 0): (None, 5)})
        taker.start()
        until(lambda: waiting_for_locks(stores[0]) == 1)
        assert not claimed
        tx.send([Outgoing("audit", None, b"v")])
    taker.join(30)
    assert claimed == [old.epoch + 1]
    with pytest.raises(Superseded), stores[0].transaction(old.epoch, NOW) as tx:
        tx.advance({("labels", 0): (5, 6)})
    assert stores[1].offsets() == {("labels", 0): 5}


def test_a_transaction_that_waited_for_a_claim_is_superseded(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """It must see the new epoch, and not the one that was in force when it began to wait."""
    old = Learner(stores[0])
    found: list[BaseException] = []

    def learn() -> None:
        try:
            old.step(batch_of(5))
        except TrimtabError as error:
            found.append(error)

    learner = threading.Thread(target=learn)
    with stores[1]._write() as connection:
        put = {"scope": "learner", "owner": "other", "epoch": old.epoch + 1, "claimed_at": 0}
        schema.put(connection, schema.owners, [put])
        learner.start()
        until(lambda: waiting_for_locks(stores[1]) == 1)
    learner.join(30)
    assert [type(error) for error in found] == [Superseded]
    assert stores[1].offsets() == {}
    assert set(stores[1].sizes().values()) == {0}


def test_two_that_both_write_never_both_move_an_offset(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """Each takes over from the other whenever it can; every message is still counted by exactly one."""
    moved: list[list[int]] = [[], []]
    together = threading.Barrier(2)

    def run(number: int) -> None:
        store = stores[number]
        together.wait()
        for _ in range(12):
            epoch = store.claim(f"learner-{number}", NOW)
            at = store.offsets().get(("labels", 0))
            try:
                with store.transaction(epoch, NOW) as tx:
                    tx.advance({("labels", 0): (at, (at or 0) + 1)})
                moved[number].append((at or 0) + 1)
            except Superseded:
                continue

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    steps = sorted(moved[0] + moved[1])
    assert steps == list(range(1, len(steps) + 1))
    assert stores[0].offsets() == {("labels", 0): len(steps)}
    owner = stores[0].owner()
    assert owner is not None
    assert owner[1] == 24


def test_one_who_holds_the_row_for_long_is_alive(
    stores: tuple[LearnerStore, LearnerStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hourly purge may take longer than a lease, and gives no sign of life meanwhile."""
    monkeypatch.setattr("replay.store._BUSY_SECONDS", 0.05)
    epoch = stores[0].claim("one", NOW)
    second = Lease(stores[1], "other", timedelta(seconds=1))
    found: list[object] = []

    def take() -> None:
        try:
            found.append(second.take(NOW))
        except RetryLater as error:
            found.append(error)

    taker = threading.Thread(target=take)
    with stores[0].transaction(epoch, NOW):
        taker.start()
        until(lambda: waiting_for_locks(stores[0]) == 1)
        threading.Event().wait(0.1)
    taker.join(30)
    assert isinstance(found[0], RetryLater)
    assert stores[0].owner() == ("one", epoch)
    assert second.take(NOW) == epoch + 1


def test_a_broken_connection_is_met_like_a_broker_that_is_away(
    postgres: PostgresServer, stores: tuple[LearnerStore, LearnerStore]
) -> None:
    """Half of a batch must be nothing, and the next try begins on a new connection."""
    learner = Learner(stores[0])
    learner.step(batch_of(5))

    def half_a_batch() -> None:
        with stores[0].transaction(learner.epoch, NOW) as tx:
            tx.send([Outgoing("audit", None, b"v")])
            break_connections(postgres, stores[0])
            tx.advance({("labels", 0): (None, 5)})

    with pytest.raises(RetryLater):
        half_a_batch()
    assert stores[0].sizes()["outbox"] == 1
    break_connections(postgres, stores[0])
    with pytest.raises(RetryLater):
        stores[0].sizes()
    learner.step(batch_of(5, first=5))
    assert head_of(stores[0]) == head_due(stores[0])
    assert stores[0].sizes()["examples"] == 10


def test_locks_that_are_not_given_end_in_another_try(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """A deadlock, a lock held by a person's own session, a query cancelled: none of them is the learner's end."""
    learner = Learner(stores[0])

    def run(*statements: str) -> None:
        with stores[0]._write() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    with stores[1]._write() as connection:
        connection.exec_driver_sql("SELECT * FROM owners FOR UPDATE")
        with pytest.raises(RetryLater, match="lock timeout"):
            run("SET LOCAL lock_timeout = '20ms'", "SELECT * FROM owners FOR UPDATE")
    for state in ("40001", "40P01", "57014", "53100"):
        with pytest.raises(RetryLater), stores[0].transaction(learner.epoch, NOW) as tx:
            tx._connection.exec_driver_sql(f"DO $$BEGIN RAISE SQLSTATE '{state}'; END$$")
    with pytest.raises(RetryLater, match="read-only"):
        run("SET TRANSACTION READ ONLY", "DELETE FROM outbox")
    with pytest.raises(sa.exc.ProgrammingError):
        run("DELETE FROM no_such_table")


def test_a_lookup_reads_what_it_asks_for_and_not_the_table(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """Before the server has counted a table that has grown, it takes a batch for half of it and reads it whole."""
    learner = Learner(stores[0])
    for first in range(0, 800, 100):
        learner.step(batch_of(100, first=first))
    query = "EXPLAIN SELECT label FROM examples WHERE stream = 'storm' AND event_id = ANY ('{n1,n2,n3}')"
    with stores[0]._read() as connection:
        plan = "\n".join(connection.exec_driver_sql(query).scalars())
        counted = connection.scalar(sa.text("SELECT n_distinct FROM pg_stats WHERE tablename = 'examples' LIMIT 1"))
    assert counted is not None
    assert "examples_pkey" in plan, plan


def test_a_server_that_is_away_for_a_while() -> None:
    """The learner tries again and says why; what was committed is there afterwards, and nothing else."""
    server = PostgresServer().start()
    try:
        store = LearnerStore(where := server.database(), settings=SMALL)
        learner = Learner(store)
        lease = Lease(store, "one", timedelta(milliseconds=200))
        learner.epoch = lease.take(NOW) or 0
        told: list[str | None] = []
        lost: list[BaseException] = []
        lease.keep(lost.append, told.append)
        learner.step(batch_of(5))
        until(lambda: told[-1:] == [None], every=0.02)
        server.halt()
        until(lambda: bool(told) and told[-1] is not None, every=0.02)
        with pytest.raises(RetryLater):
            learner.step(batch_of(5, first=5))
        with pytest.raises(RetryLater):
            store.offsets()
        with pytest.raises(Misconfigured, match="cannot be opened") as refused:
            LearnerStore(where)
        server.start()
        until(lambda: told[-1] is None, every=0.02)
        learner.step(batch_of(5, first=5))
        assert store.sizes()["examples"] == 10
        assert head_of(store) == head_due(store)
        assert not lost
        lease.leave()
        store.close()
        assert not [why for why in [*told, str(refused.value)] if why and PASSWORD in why]
    finally:
        server.stop()


def test_no_message_shows_the_password(postgres: PostgresServer) -> None:
    """A URL is what people paste into a ticket."""
    where = StoreUrl(postgres.database())
    assert PASSWORD not in f"{where} {where!r} {where!s}"
    wrong = where.replace(PASSWORD, "wrong-and-secret")
    with pytest.raises(Misconfigured, match="cannot be opened") as refused:
        LearnerStore(wrong)
    assert "wrong-and-secret" not in str(refused.value)
    assert masked("postgresql+psycopg://u:p@ss/w@h:5/d?sslmode=require") == (
        "postgresql+psycopg://u:***@h:5/d?sslmode=require"
    )
    assert masked("postgresql://h/d?password=p&user=u") == "postgresql://h/d?password=***&user=u"
    assert masked("sqlite:////var/lib/trimtab/learner.db") == "sqlite:////var/lib/trimtab/learner.db"


def break_connections(server: PostgresServer, store: LearnerStore) -> None:
    name = str(store._engine.url.database)
    server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


def waiting_for_locks(store: LearnerStore) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with store._read() as connection:
        return int(connection.scalar(sa.text(query)) or 0)
