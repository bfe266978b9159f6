"""Does memory stay bounded, and does all drain, when something that trimtab stands on is slow, full or away?

One worker and one learner as they ship, on a real Kafka behind a TCP proxy and a real PostgreSQL, under a steady offer
of events and labels. One after another: the broker slow, the learner's disk full, the database away, the model slow.
For each, how much memory the process that feels it takes at most, what its `/readyz` says meanwhile, how far it falls
behind, and how long it takes to catch up; `trimtab audit` is the judge at the end. Ends with 1 where something did not
drain or a promise was broken. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from confluent_kafka import Producer
from rich.console import Console

from benchmarks import weights
from benchmarks.kafka import QUIET, REPOSITORY, BenchmarkFailed
from benchmarks.pace import Ear, Heard, Pace, wait_for
from benchmarks.report import Result, Row, machine, options, publish, versions
from benchmarks.soak import BLOCK, POOL, STREAM, audited, numbered
from stream.errors import TrimtabError
from stream.events import encode
from tests.chaos.proxy import Network, Proxy
from tests.deployment import Deployment, label
from tests.kafka import FULL_SPEED, KafkaBroker, KafkaFailed, KafkaUnavailable, free_ports
from tests.postgres import PostgresFailed, PostgresServer, PostgresUnavailable
from tests.scrape import Scrape

PACKAGES = ("trimtab", "torch", "confluent-kafka", "faust-streaming", "pydantic", "sqlalchemy", "psycopg")
LABELLED = 0.2
FULL_BYTES = 1
MODEL_SECONDS = 5.0
"""How long the slow model takes for one batch."""
PIECE_SECONDS = 0.5
"""How long the slow network keeps each 16 KiB back, each way."""
DRAIN_SECONDS = 600


@dataclass
class Felt:
    """What was seen of one process, from before the pressure until everything was drained."""

    memory: list[float] = field(default_factory=list)
    """Resident, MiB."""
    lag: list[float] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)
    """What `/readyz` said it waits for; empty where it was ready."""


class Site:
    """Broker, database, worker and learner; the processes may be replaced, and are looked at by role."""

    def __init__(self, made: Deployment, network: Network, server: PostgresServer) -> None:
        self.made, self.network, self.server = made, network, server
        self.ports = {"worker": made.worker_port, "learner": made.learner_port}
        self.processes = {role: made.start(role) for role in self.ports}
        self.ready("learner")
        self.ready("worker")

    def ready(self, role: str) -> None:
        """Wait until a process says that it is."""
        process = self.processes[role]

        def check() -> None:
            if process.poll() is not None:
                log = (self.made.directory / f"{role}.log").read_text(errors="replace")
                raise BenchmarkFailed(f"the {role} ended with {process.returncode}:\n{log[-3000:]}")

        wait_for(lambda: self.made.ready(self.ports[role]), 300, f"the {role}", check, every=0.3)

    def worker(self, *command: str) -> None:
        """Replace the worker by another one, in good order."""
        self.processes["worker"].terminate()
        if code := self.processes["worker"].wait(120):
            raise BenchmarkFailed(f"a worker that was told to end ended with {code}")
        with (self.made.directory / "worker.log").open("ab") as log:
            self.processes["worker"] = subprocess.Popen(
                [sys.executable, "-m", *command, "worker", "--config", str(self.made.settings)],
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.made.processes.append(self.processes["worker"])
        self.ready("worker")

    def look(self, role: str, felt: Felt) -> None:
        """One look at a process; what does not answer is not counted."""
        with suppress(psutil.Error):
            felt.memory.append(psutil.Process(self.processes[role].pid).memory_info().rss / 2**20)
        code, body = self.made.get(self.ports[role], "/readyz")
        waits = body.get("waiting_for", {}) if isinstance(body, dict) else {}
        said = "; ".join(f"{part}: {why}" for part, why in waits.items())
        felt.words[said if code else "no answer"] += 1
        with suppress(OSError):
            felt.lag.append(Scrape(self.ports[role]).total("trimtab_consumer_lag_events"))


# What presses: the role that feels it, by which means


@contextmanager
def slow_broker(site: Site) -> Iterator[None]:
    """The proxy keeps every 16 KiB back."""
    site.network.slow(PIECE_SECONDS)
    try:
        yield
    finally:
        site.network.heal()


@contextmanager
def disk_full(site: Site) -> Iterator[None]:
    """The learner can write to no file (RLIMIT_FSIZE of a byte), so the registry takes no head."""
    pid = site.processes["learner"].pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def database_away(site: Site) -> Iterator[None]:
    """PostgreSQL is shut down at once (SIGQUIT), and started again."""
    site.server.halt()
    try:
        yield
    finally:
        site.server.start()


@contextmanager
def slow_model(site: Site) -> Iterator[None]:
    """A worker whose model waits five seconds for each batch."""
    site.worker("benchmarks.pressure", "--as-slow-worker")
    try:
        yield
    finally:
        site.worker("deploy.cli")


PRESSURES = {
    "slow_broker": ("worker", slow_broker),
    "disk_full": ("learner", disk_full),
    "database_away": ("learner", database_away),
    "slow_model": ("worker", slow_model),
}


class Offer:
    """Events at a steady rate and labels for a share of the answers, in threads; a context."""

    def __init__(self, made: Deployment, rate: float) -> None:
        bootstrap = made.kafka.bootstrap
        self.pace = Pace(bootstrap, made.topics.name("telemetry"), rate)
        self.answered: set[bytes] = set()
        self.labelled = 0
        self.failed: list[BenchmarkFailed] = []
        self._labels = made.topics.name("labels")
        self._producer = Producer({"bootstrap.servers": bootstrap, **QUIET, "partitioner": "murmur2_random"})
        self._chance = np.random.default_rng(0)
        self._over = threading.Event()
        self._ear = Ear(bootstrap, made.topics.name("predictions"), self._hear)
        self._thread = threading.Thread(target=self._drive, name="driver", daemon=True)

    def __enter__(self) -> Offer:
        self._ear.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._ear.__exit__()

    def stop(self) -> None:
        """Publish no more events."""
        self._over.set()
        self._thread.join(90)
        if self.failed:
            raise self.failed[0]

    def flush(self) -> None:
        """Wait until the broker has every label."""
        if self._producer.flush(120):
            raise BenchmarkFailed("the broker did not take all labels")

    def _drive(self) -> None:
        try:
            self.pace.run(numbered(1), 86_400, self._over)
        except BenchmarkFailed as error:
            self.failed.append(error)

    def _hear(self, one: Heard) -> None:
        if one.key in self.answered:
            return
        self.answered.add(one.key)
        if self._chance.random() < LABELLED:
            event_id = one.key.decode()
            name = list(weights.CLASSES)[int(event_id.rpartition("-")[2]) % POOL % len(weights.CLASSES)]
            self._producer.produce(self._labels, value=encode(label(STREAM, event_id, name)), key=one.key)
            self._producer.poll(0)
            self.labelled += 1


def press(site: Site, offer: Offer, kind: str, calm: float, seconds: float) -> tuple[list[Row], Counter[str]]:
    """One pressure: its rows, and what `/readyz` said while it lasted, by how often.

    Raises:
        BenchmarkFailed: what waited was not worked off in ten minutes.
    """
    role, means = PRESSURES[kind]
    before, during, after = Felt(), Felt(), Felt()
    _watch(site, role, before, calm)
    with means(site):
        _watch(site, role, during, seconds)
        over = time.monotonic()

    def drained() -> bool:
        site.look(role, after)
        return (
            site.made.ready(site.ports[role])
            and bool(after.lag)
            # A share of a second's events is always on its way.
            and after.lag[-1] <= offer.pace.rate / 2
            and len(offer.pace.due) - len(offer.answered) <= offer.pace.rate
        )

    wait_for(drained, DRAIN_SECONDS, f"{kind}: draining", every=0.5)
    drain = time.monotonic() - over
    looks = during.words.total()
    numbers = [
        ("memory_before", max(before.memory), "MiB"),
        ("memory_most", max(during.memory + after.memory), "MiB"),
        ("behind_most", max(during.lag + after.lag), "events"),
        ("not_ready", 1 - during.words[""] / looks, "of the time"),
        ("drained_in", drain, "s"),
    ]
    return [Row(name=kind, mode=role, metric=metric, value=value, unit=unit) for metric, value, unit in numbers], (
        during.words
    )


def _watch(site: Site, role: str, felt: Felt, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        site.look(role, felt)
        time.sleep(0.25)


@contextmanager
def site_of(guarantee: str) -> Iterator[Site]:
    """A site of its own."""
    listens, tells, _ = free_ports()
    with tempfile.TemporaryDirectory(prefix="trimtab-pressure-") as directory:
        network = Network([Proxy(tells, listens)])
        server = PostgresServer()
        broker = KafkaBroker(Path(directory) / "kafka", java_options=FULL_SPEED, proxied=(listens, tells))
        made: Deployment | None = None
        try:
            broker.start()
            server.start()
            network.start()
            blocks: dict[str, Any] = {
                "kafka": {"bootstrap_servers": network.bootstrap},
                "worker": {"guarantee": guarantee, "batch_events": 64},
                "learner": {"store": server.database()},
            }
            made = Deployment(broker, f"b{uuid.uuid4().hex[:8]}-", Path(directory), {STREAM: BLOCK}, blocks)
            yield Site(made, network, server)
        except (KafkaUnavailable, KafkaFailed, PostgresUnavailable, PostgresFailed) as error:
            raise BenchmarkFailed(str(error)) from error
        finally:
            if made is not None:
                made.end()
            network.close()
            server.stop()
            broker.stop()


def run(chosen: argparse.Namespace, err: Console) -> tuple[list[Row], list[str]]:
    """All pressures, then the audit: rows, and what was broken."""
    rows: list[Row] = []
    with site_of(chosen.guarantee) as site:
        with Offer(site.made, chosen.rate) as offer:
            wait_for(lambda: bool(offer.answered), 120, "a first answer")
            for kind in chosen.only:
                made, words = press(site, offer, kind, chosen.calm, chosen.seconds)
                rows += made
                for said, count in words.most_common(3):
                    err.print(f"{kind}: {count} looks: {said or 'ready'}", highlight=False, markup=False)
            offer.stop()
            wait_for(lambda: len(offer.answered) >= len(offer.pace.due), DRAIN_SECONDS, "answering", every=0.5)
            offer.flush()
        wait_for(
            lambda: Scrape(site.ports["learner"]).total("trimtab_consumer_lag_events") == 0,
            DRAIN_SECONDS,
            "learning",
            every=1,
        )
        for process in site.processes.values():
            process.terminate()
        codes = [process.wait(120) for process in site.processes.values()]
        _, audit = audited(site.made)
        rows += [
            Row(name="all", mode="all", metric=metric, value=value, unit=unit)
            for metric, value, unit in (
                ("events", len(offer.pace.due), "events"),
                ("labels", offer.labelled, "labels"),
                ("audit_breaches", len(audit["breaches"]), "promises"),
            )
        ]
    return rows, audit["breaches"] + [f"a process ended with {code}" for code in codes if code]


def slow_worker(arguments: Sequence[str]) -> None:
    """`trimtab ARGUMENTS` with a model that waits before each batch."""
    from stream.worker import Classifier

    answer = Classifier.answer

    def _answer(self: Classifier, records: Any) -> Any:
        time.sleep(MODEL_SECONDS)
        return answer(self, records)

    Classifier.answer = _answer  # type: ignore[method-assign]
    sys.argv = ["trimtab", *arguments]
    from deploy.cli import main as trimtab

    trimtab()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.pressure"
    parser.add_argument("--only", nargs="+", choices=PRESSURES, default=list(PRESSURES))
    parser.add_argument("--rate", type=float, default=40.0, metavar="N", help="events a second (default 40)")
    parser.add_argument("--seconds", type=float, metavar="S", help="that each lasts (default 60, quick 15)")
    parser.add_argument("--calm", type=float, default=10.0, metavar="S", help="before each (default 10)")
    parser.add_argument("--guarantee", choices=("at_least_once", "exactly_once"), default="exactly_once")
    chosen = parser.parse_args(arguments)
    chosen.seconds = chosen.seconds or (15.0 if chosen.quick else 60.0)
    out, err = Console(), Console(stderr=True)
    before = machine()
    try:
        rows, broken = run(chosen, err)
    except (BenchmarkFailed, TrimtabError) as error:
        err.print(f"benchmarks.pressure: {error}", style="red", markup=False)
        return 1
    publish(Result(benchmark="pressure", machine=before, versions=versions(PACKAGES), rows=rows), chosen.json, out)
    for one in broken:
        err.print(f"BROKEN: {one}", style="red", markup=False)
    return 1 if broken else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-slow-worker"]:
        slow_worker(sys.argv[2:])
    else:
        sys.exit(main())
