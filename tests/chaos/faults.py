"""What is broken, and by which real means; a fault heals itself before it returns, or leaves that to the supervisor."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from tests.chaos.driver import STREAM
from tests.chaos.field import LEARNER, PARTITIONS, SESSION_SECONDS, Field
from tests.kafka import KafkaCluster
from tests.waiting import until

PATIENCE = 240.0
"""Seconds for what a busy machine does late and an idle one at once."""

MEANS: dict[str, str] = {
    "worker_killed": "SIGKILL of a worker at a random moment",
    "worker_written": "a worker kills itself (SIGKILL) once the broker has its answers and before the offsets are "
    "committed, in mid-transaction under exactly_once; it joins for that and is never brought back",
    "worker_stopped": "SIGSTOP of a worker for longer than its session, then SIGCONT",
    "worker_doubled": "SIGSTOP of a worker, another one started under its member id, then SIGCONT of the first",
    "worker_joined": "one more worker joins the group, answers, and leaves it by SIGTERM",
    "learner_killed": "SIGKILL of the learner at a random moment",
    "learner_torn": "the learner kills itself (SIGKILL) with half a file of the registry written",
    "learner_joined": "the learner kills itself (SIGKILL) just before a transaction of its database is committed",
    "learner_kept": "the learner kills itself (SIGKILL) just after a transaction of its database was committed",
    "learner_sent": "the learner kills itself (SIGKILL) with its outbox sent and not yet emptied",
    "learner_replaced": "SIGSTOP of the learner, a second one takes over, then SIGCONT of the first",
    "finetune_killed": "SIGKILL of the process that fine-tunes",
    "broker_killed": "SIGKILL of Kafka, of all its nodes, and a start on the same data after a while",
    "leader_killed": "SIGKILL of the node of three that leads a partition of events; another one leads it before the "
    "first starts on the same data",
    "network_cut": "a TCP proxy before the broker resets every connection and lets none be made",
    "network_slow": "a TCP proxy before the broker keeps every 16 KiB back, each way",
    "disk_full": "RLIMIT_FSIZE of 4 KiB on the learner or a worker while it runs (prlimit), then none",
    "database_locked": "another process's write lock on the learner's SQLite database",
    "registry_cut": "the newest weights in the registry cut to half their length, and a worker or the learner killed",
    "clock_stepped": "the wall clock of workers and learner stepped by up to two hours, either way (libfaketime)",
}


class Chaos:
    """Breaks a field, one fault after another, by a seed.

    Args:
        field: what is broken.
        seed: decides which, when and for how long.
    """

    def __init__(self, field: Field, seed: int) -> None:
        self.field = field
        self.chance = random.Random(seed)
        self.made: Counter[str] = Counter()
        self._joined = 0

    def kinds(self) -> list[str]:
        """What can be done on this machine."""
        lacking = set()
        if self.field.faketime is None:
            lacking.add("clock_stepped")
        if not isinstance(self.field.broker, KafkaCluster):
            lacking.add("leader_killed")
        return [kind for kind in MEANS if kind not in lacking]

    def break_things(self, kinds: Sequence[str], told: Callable[[str], None] = lambda line: None) -> None:
        """Make these faults in this order; after half of them everything may recover, the others come on top."""
        for number, kind in enumerate(kinds, 1):
            began = time.monotonic()
            getattr(self, kind)()
            self.made[kind] += 1
            if self.chance.random() < 0.5:
                self.field.wait_ready(PATIENCE)
            else:
                self.wait(0, 2)
            told(f"{number}/{len(kinds)} {kind} {time.monotonic() - began:.1f} s")

    def wait(self, least: float, most: float) -> None:
        """Let a random time pass."""
        threading.Event().wait(self.chance.uniform(least, most))

    def worker(self) -> str:
        """One of the workers."""
        return self.chance.choice(["w0", "w1"])

    # Workers

    def worker_killed(self) -> None:
        self.field.kill(self.worker())

    def worker_written(self) -> None:
        role = self._another()
        process = self.field.start(role, ("written", self.chance.randint(1, 4)))
        with self._ended_by_itself(role), contextlib.suppress(subprocess.TimeoutExpired):
            # Where it gets no partition, or no events, it is killed while it waits for them.
            process.wait(PATIENCE)

    def worker_stopped(self) -> None:
        process = self.field.process(self.worker())
        process.send_signal(signal.SIGSTOP)
        self.wait(SESSION_SECONDS + 0.5, SESSION_SECONDS + 3)
        process.send_signal(signal.SIGCONT)

    def worker_doubled(self) -> None:
        role = self.worker()
        self._alive(role)
        old = self.field.process(role)
        old.send_signal(signal.SIGSTOP)
        try:
            self.field.replace(role)
            self._alive(role)
            self.wait(0, 2)
        finally:
            old.send_signal(signal.SIGCONT)
        code = old.wait(PATIENCE)
        assert code == 1, f"a worker whose member id another one has ended with {code}, to be 1"

    def worker_joined(self) -> None:
        role = self._another()
        self.field.start(role)
        self._alive(role)
        self.wait(0.5, 3)
        process = self.field.release(role)
        process.terminate()
        code = process.wait(PATIENCE)
        assert code == 0, f"a worker that was told to end ended with {code}"

    # The learner

    def learner_killed(self) -> None:
        self.field.kill(LEARNER)

    def learner_torn(self) -> None:
        self._doomed_learner("torn")

    def learner_joined(self) -> None:
        self._doomed_learner("joined")

    def learner_kept(self) -> None:
        self._doomed_learner("kept")

    def learner_sent(self) -> None:
        self._doomed_learner("sent")

    def learner_replaced(self) -> None:
        self._alive(LEARNER)
        old = self.field.process(LEARNER)
        self._stop_between_transactions(old)
        try:
            self.field.replace(LEARNER)
            self._alive(LEARNER)
        finally:
            old.send_signal(signal.SIGCONT)
        code = old.wait(PATIENCE)
        assert code == 1, f"a learner that was superseded ended with {code}, to be 1"

    def finetune_killed(self) -> None:
        self._alive(LEARNER)
        self.field.deployment.ask(STREAM, "retrain", reason="to be killed")
        found: list[psutil.Process] = []

        def training() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.field.process(LEARNER).pid).children()
                found[:] = [child for child in children if "learner.training" in child.cmdline()]
            return bool(found) or not self.field.deployment.status(STREAM)["fine_tune"]["running"]

        until(training, seconds=PATIENCE, every=0.2)
        self.wait(0, 8)
        for child in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()

    # What they stand on

    def broker_killed(self) -> None:
        self.field.broker.kill()
        self.wait(0, 4)
        self.field.broker.start()

    def leader_killed(self) -> None:
        cluster = self.field.broker
        assert isinstance(cluster, KafkaCluster)
        topic = self.field.deployment.topics.name("telemetry")
        partition = self.chance.randrange(PARTITIONS)
        until(lambda: cluster.leader(topic, partition) > 0, seconds=PATIENCE, every=0.5)
        led = cluster.leader(topic, partition)
        cluster.nodes[led].kill()
        until(lambda: cluster.leader(topic, partition) not in (led, -1), seconds=PATIENCE, every=0.5)
        self.wait(0, 4)
        cluster.start()

    def network_cut(self) -> None:
        role = self.worker()
        served = self.field.ready(role)
        self.field.network.cut()
        try:
            if served and self.chance.random() < 0.5:
                # Whoever is on shift must see why nothing is answered.
                until(lambda: not self.field.ready(role), seconds=PATIENCE, every=0.2)
            self.wait(0.2, 6)
        finally:
            self.field.network.heal()

    def network_slow(self) -> None:
        self.field.network.slow(self.chance.uniform(0.05, 0.4))
        self.wait(2, 6)
        self.field.network.heal()

    def disk_full(self) -> None:
        process = self.field.process(self.chance.choice([LEARNER, LEARNER, "w0"]))
        if process.poll() is not None:
            return
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, hard))
        self.wait(1, 5)
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))

    def database_locked(self) -> None:
        connection = sqlite3.connect(self.field.directory / "learner.db", timeout=30, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            self.wait(1, 5)
            connection.execute("ROLLBACK")
        finally:
            connection.close()

    def registry_cut(self) -> None:
        with contextlib.closing(sqlite3.connect(self.field.directory / "learner.db", timeout=30)) as connection:
            query = "SELECT head FROM revisions WHERE head <> '' ORDER BY at DESC LIMIT 1"
            (head,) = connection.execute(query).fetchone() or ("",)
        newest = self.field.directory / "registry" / "blobs" / head[:2] / head[2:]
        if newest.is_file():
            os.truncate(newest, newest.stat().st_size // 2)
        self.field.kill(self.chance.choice([LEARNER, self.worker()]))

    def clock_stepped(self) -> None:
        self.field.set_clock(self.chance.randint(-7200, 7200))
        self.wait(0.5, 2)

    # How

    def _stop_between_transactions(self, learner: subprocess.Popen[bytes]) -> None:
        """SIGSTOP of a learner that holds no lock of SQLite: with one, nobody else leads until it goes on or ends."""
        while True:
            learner.send_signal(signal.SIGSTOP)
            try:
                with contextlib.closing(
                    sqlite3.connect(self.field.directory / "learner.db", timeout=1, isolation_level=None)
                ) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute("ROLLBACK")
                return
            except sqlite3.OperationalError:
                learner.send_signal(signal.SIGCONT)
                self.wait(0.05, 0.5)

    def _another(self) -> str:
        self._joined += 1
        return f"j{self._joined}"

    def _alive(self, role: str) -> None:
        until(lambda: self.field.ready(role), seconds=PATIENCE, every=0.2)

    def _doomed_learner(self, point: str) -> None:
        self.field.doom(self.field.process(LEARNER))
        nth = self.chance.randint(1, 12)
        with self.field._lock:
            process = self.field.process(LEARNER)
            self.field.doom(process)
            process.kill()
            process.wait()
            doomed = self.field.start(LEARNER, (point, nth))
        with contextlib.suppress(subprocess.TimeoutExpired):
            doomed.wait(PATIENCE)
        if doomed.poll() is None:
            self.field.kill(LEARNER)

    @contextlib.contextmanager
    def _ended_by_itself(self, role: str) -> Iterator[None]:
        """A process that is never brought back: nobody is to start it again once it ends."""
        process = self.field.release(role)
        try:
            yield
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def library_of_faketime(given: Path | None = None) -> Path | None:
    """Where libfaketime lies on this machine; None where it is not installed."""
    usual = [Path(f"/usr/lib/{place}/faketime/libfaketime.so.1") for place in ("x86_64-linux-gnu", "aarch64-linux-gnu")]
    usual += [Path("/usr/lib/faketime/libfaketime.so.1"), Path("/usr/local/lib/faketime/libfaketime.so.1")]
    return next((path for path in ([given] if given else usual) if path.is_file()), None)
