"""A whole deployment that is there to be broken: broker, network, workers, learner, and who restarts them.

Worker and learner reach the broker through a proxy; the driver and the judge go straight to it. A process that ends,
by a fault or by itself, is started again under its name, as a supervisor would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from tests.chaos.driver import STREAM
from tests.chaos.proxy import Network, Proxy
from tests.deployment import REPOSITORY, Deployment
from tests.integration.probe import STREAM as PROBE
from tests.kafka import KafkaBroker, KafkaCluster, free_port, free_ports
from tests.waiting import until

PARTITIONS = 4
SESSION_SECONDS = 3.0
LEARNER = "learner"


@dataclass(frozen=True)
class Ended:
    """A process that ended though no fault was meant to end it."""

    role: str
    code: int
    last: str


class Field:
    """Processes by role: `learner`, `w0`, `w1` and whatever joins.

    Args:
        directory: where everything lies.
        guarantee: the workers'.
        faketime: the library of libfaketime; None where it is not installed.
        rate: events a second.
        late_seconds: how late a late label may be.
        seed: of what is sent.
        nodes: of Kafka, 1 or 3.
    """

    def __init__(
        self,
        directory: Path,
        guarantee: str,
        *,
        faketime: Path | None = None,
        rate: float = 20,
        late_seconds: float = 10,
        seed: int = 0,
        nodes: int = 1,
    ) -> None:
        self.directory, self.guarantee, self.faketime = directory, guarantee, faketime
        proxied = [free_ports()[:2] for _ in range(nodes)]
        self.broker = (
            KafkaBroker(directory / "kafka", proxied=proxied[0])
            if nodes == 1
            else KafkaCluster(directory / "kafka", proxied=proxied)
        )
        self.network = Network([Proxy(tells, listens) for listens, tells in proxied])
        self.clock = directory / "clock"
        self.journal = directory / "journal.jsonl"
        self.ended: list[Ended] = []
        self.held: list[str] = []
        self._plan = {"rate": rate, "late_seconds": late_seconds, "seed": seed}
        self._ports: dict[str, int] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._all: list[subprocess.Popen[bytes]] = []
        self._doomed: set[int] = set()
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._driver: subprocess.Popen[bytes] | None = None
        self.deployment: Deployment

    def __enter__(self) -> Field:
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.broker.start()
        self.network.start()
        self.set_clock(0)
        overrides: dict[str, Mapping[str, Any]] = {
            "kafka": {"bootstrap_servers": self.network.bootstrap},
            "worker": {"guarantee": self.guarantee, "session_seconds": SESSION_SECONDS, "batch_events": 64},
            "learner": {"batches": {"session_seconds": SESSION_SECONDS, "batch_events": 64}},
        }
        prefix = f"t{uuid.uuid4().hex[:8]}-"
        self.deployment = Deployment(self.broker, prefix, self.directory, {STREAM: PROBE}, overrides, PARTITIONS)
        for role in (LEARNER, "w0", "w1"):
            self.start(role)
        self._watching.start()
        self.wait_ready()
        self._driver = self._popen("driver", [sys.executable, "-m", "tests.chaos.driver", json.dumps(self._said())])

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._watching.is_alive():
            self._watching.join(20)
        for process in self._all:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.network.close()
        self.broker.stop()

    # Processes

    def start(self, role: str, doom: tuple[str, int] | None = None) -> subprocess.Popen[bytes]:
        """Start the process of a role, which is then kept running; `doom` is where it is to kill itself."""
        with self._lock:
            port = self._ports.setdefault(role, free_port())
            if role == LEARNER:
                self.deployment.learner_port = port
            process = self._popen(role, self._command(role, port, doom))
            self._running[role] = process
            if doom:
                self._doomed.add(process.pid)
            return process

    def process(self, role: str) -> subprocess.Popen[bytes]:
        """What runs under a role."""
        with self._lock:
            return self._running[role]

    def kill(self, role: str) -> None:
        """End it by SIGKILL; it is started again."""
        process = self.process(role)
        self.doom(process)
        process.kill()

    def doom(self, process: subprocess.Popen[bytes]) -> None:
        """Its end is meant."""
        with self._lock:
            self._doomed.add(process.pid)

    def release(self, role: str) -> subprocess.Popen[bytes]:
        """Let go of a role: what runs under it is not started again once it ends."""
        with self._lock:
            process = self._running.pop(role)
            self._doomed.add(process.pid)
            return process

    def replace(self, role: str, port: int | None = None) -> subprocess.Popen[bytes]:
        """Start another process under a role beside the one that runs; returns the old one, which is let go of."""
        with self._lock:
            old = self.release(role)
            self._ports[role] = port or free_port()
            self.start(role)
            return old

    def ready(self, role: str) -> bool:
        """Whether it says that it is ready."""
        return self.deployment.ready(self._ports[role])

    def wait_ready(self, seconds: float = 240) -> None:
        """Wait until all that should run is ready."""
        until(lambda: all(self.ready(role) for role in list(self._running)), seconds=seconds, every=0.3)

    def set_clock(self, seconds: int) -> None:
        """Let the wall clock of workers and learner differ from the true one by so much, from now on."""
        beside = self.clock.with_suffix(".new")
        beside.write_text(f"{seconds:+d}\n")
        beside.replace(self.clock)

    def end_driver(self) -> int:
        """Let the driver send what is left; returns its exit code."""
        assert self._driver is not None
        self._driver.terminate()
        return self._driver.wait(400)

    def _command(self, role: str, port: int, doom: tuple[str, int] | None) -> list[str]:
        module = ["deploy.cli"] if doom is None else ["tests.chaos.doomed", doom[0], str(doom[1])]
        what = [LEARNER] if role == LEARNER else ["worker", "--member-id", role]
        config = ["--config", str(self.deployment.settings), "--port", str(port)]
        return [sys.executable, "-m", *module, *what, *config]

    def _popen(self, role: str, command: list[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.faketime is not None and role != "driver":
            environment |= {
                "LD_PRELOAD": str(self.faketime),
                "FAKETIME_TIMESTAMP_FILE": str(self.clock),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        with (self.directory / f"{role}.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self._all.append(process)
        return process

    def _said(self) -> dict[str, Any]:
        topics = self.deployment.topics
        return {
            "bootstrap": self.broker.bootstrap,
            "journal": str(self.journal),
            "events": topics.name("telemetry"),
            "labels": topics.name("labels"),
            **self._plan,
        }

    def _watch(self) -> None:
        while not self._over.wait(0.3):
            with self._lock:
                for role, process in list(self._running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    if process.pid not in self._doomed:
                        self.ended.append(Ended(role, code, self.last_words(role)))
                    self.start(role)

    def last_words(self, role: str) -> str:
        """What a role logged last that was worth a warning."""
        lines = (self.directory / f"{role}.log").read_text(errors="replace").splitlines()[-60:]
        bad = [line for line in lines if '"critical"' in line or '"error"' in line or "Error" in line]
        return (bad or lines or ["nothing"])[-1][:400]

    # Its end

    def drain(self, seconds: float = 240) -> None:
        """Heal what is broken, let everything be sent, answered and learned, and wait for it."""
        self.network.heal()
        self.set_clock(0)
        assert self.end_driver() == 0, "the driver could not send everything, so the run says nothing"
        self.wait_ready(seconds)
        until(lambda: self._answered() and self._joined(), seconds=seconds, every=1)

    def settle(self, seconds: float = 240) -> None:
        """Wait until the learner has announced and sent what it learned."""

        served: list[str] = []

        def still() -> bool:
            status = self.deployment.status(STREAM)
            fine = status["fine_tune"]
            if status["outbox"] or fine["running"] or fine["requested"]:
                served.clear()
            served.append(status["serving"])
            self.held = status["held"]
            return len(served) > 4 and len(set(served[-4:])) == 1

        until(still, seconds=seconds, every=0.6)

    def stop_processes(self) -> dict[str, int]:
        """End workers and learner in good order; returns their exit codes."""
        self._over.set()
        self._watching.join(20)
        for process in self._running.values():
            process.terminate()
        return {role: process.wait(240) for role, process in self._running.items()}

    def _answered(self) -> bool:
        topic = self.deployment.topics.name("telemetry")
        group = self.deployment.topics.prefix + "trimtab-worker"
        return self.broker.committed(group, topic) == {p: e for p, e in self.broker.end_offsets(topic).items() if e}

    def _joined(self) -> bool:
        """Whether the learner's offsets have passed the last message of each partition."""
        from replay.store import LearnerStore

        store = LearnerStore(f"sqlite:///{self.directory}/learner.db")
        try:
            offsets = store.offsets()
        finally:
            store.close()
        for kind in ("predictions", "labels"):
            topic = self.deployment.topics.name(kind)  # type: ignore[arg-type]
            stable = self.broker.end_offsets(topic, "read_committed")
            if stable != self.broker.end_offsets(topic):
                return False  # a transaction is open; the broker ends it when its time is over
            for partition, end in stable.items():
                if offsets.get((topic, partition), 0) < end and self._left(topic, partition, offsets):
                    return False
        return True

    def _left(self, topic: str, partition: int, offsets: Mapping[tuple[str, int], int]) -> bool:
        """Whether a message lies after the offset, and not markers of transactions alone."""
        consumer = Consumer(
            {
                **self.broker.client(),
                "group.id": f"judge-{uuid.uuid4().hex}",
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 20,
            }
        )
        try:
            consumer.assign([TopicPartition(topic, partition, offsets.get((topic, partition), 0))])
            message = consumer.poll(10)
            return message is None or message.error() is None
        finally:
            consumer.close()
