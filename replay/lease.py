"""Whose turn it is to write the learner's store: one learner leads, others stand by.

::

    lease = Lease(store, "learner-2", timedelta(seconds=10))
    while lease.take(now()) is None:   # lease.holder says who leads
        ...
    lease.keep(lost, told)             # a sign of life every quarter of the lease, from a thread
    ...                                # transactions under lease.epoch
    lease.leave()                      # in good order: who stands by need not wait

The leader gives signs of life in the database. Another learner takes over, under the next epoch, when the leader has
left, when it has the leader's own name (the same learner, started again), or when no sign came for the whole lease: by
the database's clock, which all share, or by the waiting learner's own, which no step of that clock can mislead. It is
the way of Kubernetes' leader election (client-go, package leaderelection).

The lease only says when to take over. What keeps two from writing is the epoch: a leader that was stopped for longer
than its lease finds another one at its next transaction, and nothing that it still holds is written.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from time import monotonic

from replay.store import LearnerStore, Tenure
from stream.errors import RetryLater, Superseded

logger = logging.getLogger(__name__)

BEATS = 4
"""Signs of life within one lease: all but one may be late or lost."""


class Lease:
    """One learner's wish to lead.

    Args:
        store: the learner's database.
        owner: this learner's name.
        duration: without a sign of life for so long, a leader is taken for dead.
        now: seconds that only grow, for tests.
    """

    def __init__(
        self, store: LearnerStore, owner: str, duration: timedelta, now: Callable[[], float] = monotonic
    ) -> None:
        self.store, self.owner, self.duration = store, owner, duration
        self.holder: Tenure | None = None
        self.epoch = 0
        self._now = now
        self._seen: tuple[object, ...] | None = None
        self._seen_at = now()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def pause(self) -> float:
        """Seconds from one look, or one sign of life, to the next."""
        return self.duration.total_seconds() / BEATS

    def take(self, at: datetime) -> int | None:
        """The epoch under which this learner leads from now on, or None while another one does: `holder`.

        Raises:
            RetryLater: the database is away, or another learner was faster; look again.
        """
        found = self.holder = self.store.tenure()
        mark = None if found is None else found.mark
        if mark != self._seen:
            self._seen, self._seen_at = mark, self._now()
        if found is not None and not self._free(found):
            return None
        self.epoch = self.store.take_over(self.owner, at, self.duration, found)
        logger.info("leading under epoch %d", self.epoch)
        return self.epoch

    def _free(self, found: Tenure) -> bool:
        if found.owner == self.owner or found.lease is None:
            return True
        watched = timedelta(seconds=self._now() - self._seen_at)
        return watched > found.lease or (found.silent is not None and found.silent > found.lease)

    def keep(self, lost: Callable[[BaseException], None], told: Callable[[str | None], None]) -> None:
        """Give signs of life from a thread until `leave`.

        Args:
            lost: called with `Superseded` when another learner leads, or with whatever else ended the thread.
            told: called with why the database cannot be reached, and with None when it can be again.
        """
        self._thread = threading.Thread(target=self._beat, args=(lost, told), name="lease", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Give the lead away, if it is still had; an owner that is gone already, or a database, changes nothing."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout=30)
        if self.epoch:
            with contextlib.suppress(Superseded, RetryLater):
                self.store.leave(self.epoch)

    def _beat(self, lost: Callable[[BaseException], None], told: Callable[[str | None], None]) -> None:
        away = False
        try:
            while not self._ending.wait(min(self.pause, 1.0) if away else self.pause):
                try:
                    self.store.renew(self.epoch)
                    told(None)
                    away = False
                except RetryLater as error:
                    if not away:
                        logger.warning("%s; trying again", error)
                    told(str(error))
                    away = True
        except BaseException as error:
            lost(error)
