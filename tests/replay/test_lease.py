"""Whose turn it is: one leads, and another takes over when it has died, however the clocks stand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from replay.lease import Lease
from replay.store import LearnerStore
from stream.errors import RetryLater, Superseded, TrimtabError
from tests.replay.steps import NOW
from tests.waiting import until

LONG = timedelta(hours=1)
SHORT = timedelta(milliseconds=40)


class Watch:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def stores(where: str) -> Iterator[tuple[LearnerStore, LearnerStore]]:
    """The same database, opened by two learners."""
    made = LearnerStore(where), LearnerStore(where)
    yield made
    for store in made:
        store.close()


def test_a_second_learner_waits_until_the_first_one_leaves(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """Under one supervisor, two that take the store from each other would take turns for ever."""
    first, second = Lease(stores[0], "one", LONG), Lease(stores[1], "other", LONG)
    assert first.take(NOW) == 1
    assert second.take(NOW) is None
    assert second.holder is not None
    assert (second.holder.owner, second.holder.epoch, second.holder.lease) == ("one", 1, LONG)
    stores[0].renew(1)
    assert second.take(NOW) is None
    first.leave()
    assert second.take(NOW) == 2
    with pytest.raises(Superseded), stores[0].transaction(1, NOW):
        pass


def test_a_leader_that_is_silent_for_its_lease_is_replaced(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """kill -9, a lost machine, SIGSTOP: none of them says goodbye, and the next epoch must be higher."""
    assert Lease(stores[0], "one", SHORT).take(NOW) == 1
    second = Lease(stores[1], "other", LONG)
    until(lambda: second.take(NOW) == 2, every=0.02)
    with pytest.raises(Superseded):
        stores[0].renew(1)
    assert stores[1].owner() == ("other", 2)


def test_no_step_of_a_clock_makes_a_dead_leader_live(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """After the database's clock went back an hour a dead leader's last sign seems to come from the future."""
    assert Lease(stores[0], "one", LONG).take(NOW) == 1
    watch = Watch()
    second = Lease(stores[1], "other", LONG, watch)
    assert second.take(NOW) is None
    watch.seconds = 3_599
    assert second.take(NOW) is None
    stores[0].renew(1)
    watch.seconds = 3_601
    assert second.take(NOW) is None, "a sign of life was seen meanwhile"
    watch.seconds = 2 * 3_601
    assert second.take(NOW) == 2


def test_the_same_learner_started_again_need_not_wait(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """A learner with a lasting name that was killed knows that it is dead."""
    assert Lease(stores[0], "one", LONG).take(NOW) == 1
    assert Lease(stores[1], "one", LONG).take(NOW) == 2


def test_of_two_that_see_a_dead_leader_one_takes_over(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """Both would lead under the same epoch, or the second would throw out the first that has just begun."""
    first = stores[0].take_over("one", NOW, LONG, None)
    seen = stores[1].tenure()
    assert stores[0].take_over("other", NOW, LONG, seen) == first + 1
    with pytest.raises(RetryLater):
        stores[1].take_over("third", NOW, LONG, seen)
    with pytest.raises(RetryLater):
        stores[1].take_over("third", NOW, LONG, None)
    assert stores[0].owner() == ("other", first + 1)


def test_of_many_that_start_at_once_one_leads(fresh: Callable[[], str]) -> None:
    """Each of them finds an empty database, makes the tables and wants to be the first."""
    where, count = fresh(), 4
    together = threading.Barrier(count)
    led: list[int | None] = []

    def start(name: str) -> None:
        together.wait()
        store = LearnerStore(where)
        lease = Lease(store, name, LONG)
        try:
            led.append(lease.take(NOW))
        except RetryLater:
            led.append(lease.take(NOW))
        store.close()

    threads = [threading.Thread(target=start, args=(f"learner-{number}",)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(led, key=str) == [1, None, None, None]


def test_a_new_database_is_opened_by_all_who_want_it(tmp_path: Path) -> None:
    """SQLite waits for every lock but one that a new database is made under; one in ten starts ended by it."""
    opened: list[LearnerStore | TrimtabError] = []

    def start(where: str, together: threading.Barrier) -> None:
        together.wait()
        try:
            opened.append(LearnerStore(where))
        except TrimtabError as error:
            opened.append(error)

    for number in range(30):
        to_start = (f"sqlite:///{tmp_path}/{number}.db", threading.Barrier(4))
        openers = [threading.Thread(target=start, args=to_start) for _ in range(4)]
        for opener in openers:
            opener.start()
        for opener in openers:
            opener.join(60)
    for store in opened:
        assert isinstance(store, LearnerStore), store
        store.close()
    assert len(opened) == 120


def test_signs_of_life_keep_the_lead_and_end_with_it(stores: tuple[LearnerStore, LearnerStore]) -> None:
    """A leader that is busy for an hour leads on; one that was replaced must hear of it without a label to learn."""
    lease = Lease(stores[0], "one", timedelta(milliseconds=200))
    assert lease.take(NOW) == 1
    lost: list[BaseException] = []
    told: list[str | None] = []
    lease.keep(lost.append, told.append)
    mark = stores[1].tenure()
    until(lambda: stores[1].tenure() != mark and len(told) > 2, every=0.02)
    assert set(told) == {None}
    assert stores[1].claim("other", NOW) == 2
    until(lambda: bool(lost), every=0.02)
    assert isinstance(lost[0], Superseded)
    lease.leave()
    assert stores[1].owner() == ("other", 2)
    # What was claimed without a lease is not held by anybody's.
    assert Lease(stores[0], "third", LONG).take(NOW) == 3
