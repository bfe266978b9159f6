"""How fast the learner's database takes predictions and examples, on SQLite and on PostgreSQL.

`index`: predictions through the learner's own step (decode, look up, join, one transaction) into a join index that has
`--entries` rows already, as a worker writes them. `join`: the labels of predictions that lie in the index, as far as
what the label does without its event: looked up, joined, scored. `add`: examples with their embeddings into the replay
store, its ledger and its exam. See benchmarks/README.md for what is fair in that and what is not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path

import numpy as np
import psutil
import sqlalchemy as sa
from prometheus_client import CollectorRegistry
from rich.console import Console

from benchmarks.report import Result, Row, machine, options, publish, versions
from learner.joining import Joiner, JoinTopics
from monitoring.metrics import Metrics
from replay.store import Content, LearnerStore
from stream.batches import Batch
from stream.errors import TrimtabError
from stream.events import Decoder, Label, Place, Prediction, Record, StreamRules, encode
from stream.join import join, touched
from stream.service import settle_collector
from tests.postgres import PostgresServer, PostgresUnavailable

PACKAGES = ("sqlalchemy", "psycopg", "pydantic", "numpy")
DATABASES = ("sqlite", "postgresql")
STREAM = "bench"
PREDICTIONS, LABELS = "predictions", "labels"
BATCH = 2_000
"""Messages in one transaction, as `learner.batches.batch_events` is by default."""
DIMENSION = 384
CLASSES = 100
START = datetime(2026, 1, 1, tzinfo=UTC)

Say = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    chosen = _arguments(arguments)
    out, err = Console(), Console(stderr=True)
    before = machine()
    rows: list[Row] = []

    def say(line: str) -> None:
        err.print(line, highlight=False, soft_wrap=True, markup=False)

    try:
        for kind in chosen.databases:
            with database(kind, chosen.url) as where:
                rows += measure(kind, where, chosen, say)
    except (TrimtabError, PostgresUnavailable) as error:
        err.print(f"benchmarks.store: {error}", style="red", markup=False)
        return 1
    publish(Result(benchmark="store", machine=before, versions=versions(PACKAGES), rows=rows), chosen.json, out)
    return 0


@contextmanager
def database(kind: str, url: str | None) -> Iterator[str]:
    """The URL of an empty database of this kind, on this machine's disk."""
    if kind == "postgresql" and url is not None:
        yield url
    elif kind == "postgresql":
        # As it is installed, flushing to the disk: a benchmark is no test.
        server = PostgresServer(safe=True)
        try:
            yield server.start().database()
        finally:
            server.stop()
    else:
        with tempfile.TemporaryDirectory(prefix="trimtab-store-") as folder:
            yield f"sqlite:///{folder}/learner.db"


@dataclass(frozen=True)
class Spent:
    """What so many messages took: seconds, and processor time of this process and of the database's server."""

    count: int
    seconds: float
    own: float
    server: float

    @property
    def per_core(self) -> float:
        """Messages in a second of processor time, the server's with it."""
        return self.count / max(self.own + self.server, 1e-9)


class Bench:
    """A store, a joiner over it, and messages that come one after another.

    Args:
        store: empty, or as another bench left it.
    """

    def __init__(self, store: LearnerStore) -> None:
        self._store = store
        self._epoch = store.claim("benchmark", START)
        self._count = self._labelled = 0
        self._chance = np.random.default_rng(0)
        self._joiner = Joiner(
            store,
            self._epoch,
            Decoder([StreamRules(STREAM, "text")]),
            _NoLog(),
            {},
            {},
            JoinTopics(PREDICTIONS, LABELS, "dead-letters"),
            {},
            Metrics(CollectorRegistry()),
            lambda: START,
        )
        self._server = _server_of(store)

    def index(self, count: int) -> Spent:
        """Predictions into the join index."""
        batches = [self._predicted(min(BATCH, count - start)) for start in range(0, count, BATCH)]
        return self._spent(count, lambda: [self._joiner.step(batch) for batch in batches])

    def fill(self, count: int) -> None:
        """As `index`, without the records being made beforehand."""
        for start in range(0, count, BATCH):
            self._joiner.step(self._predicted(min(BATCH, count - start)))

    def join(self, count: int) -> Spent:
        """Labels of predictions that lie in the index: what is known, what follows, scores and labels written."""
        batches = [self._labels(min(BATCH, count - start)) for start in range(0, count, BATCH)]

        def run() -> None:
            for labels in batches:
                known = self._store.known(touched([], labels))
                joined = join(known, [], labels)
                with self._store.transaction(self._epoch, START) as tx:
                    tx.record(joined)

        return self._spent(count, run)

    def add(self, count: int) -> Spent:
        """Examples that are learned: event, embedding, ledger, exam."""
        batches = [self._examples(min(BATCH, count - start)) for start in range(0, count, BATCH)]

        def run() -> None:
            for predictions, labels, contents in batches:
                joined = join(self._store.known(touched(predictions, labels)), predictions, labels)
                with self._store.transaction(self._epoch, START) as tx:
                    tx.record(joined)
                    tx.reconcile(joined.changes, contents)

        return self._spent(count, run)

    def _spent(self, count: int, run: Callable[[], object]) -> Spent:
        server = self._server.cpu_times() if self._server else None
        wall, own = time.perf_counter(), time.process_time()
        run()
        wall, own = time.perf_counter() - wall, time.process_time() - own
        if self._server is None or server is None:
            return Spent(count, wall, own, 0.0)
        after = self._server.cpu_times()
        return Spent(count, wall, own, after.user + after.system - server.user - server.system)

    def _predicted(self, count: int) -> Batch:
        first = self._count
        records = []
        for number in range(first, first + count):
            message, place = _prediction(number)
            value = encode(message)
            key = message.event_id.encode()
            records.append(Record(PREDICTIONS, 0, place.offset, key, value, (), 0))
        self._count += count
        return Batch(records, {}, {(PREDICTIONS, 0): first + count}, 1)

    def _labels(self, count: int) -> list[tuple[Label, Place]]:
        first = self._labelled
        self._labelled += count
        return [_label(number) for number in range(first, first + count)]

    def _examples(
        self, count: int
    ) -> tuple[list[tuple[Prediction, Place]], list[tuple[Label, Place]], dict[tuple[str, str], Content]]:
        numbers = range(self._count, self._count + count)
        self._count += count
        embeddings = self._chance.integers(-32_767, 32_767, (count, DIMENSION)).astype(np.int16)
        contents = {
            (STREAM, _event_id(number)): Content(f"what event {number} had to say", embedding, "encoder")
            for number, embedding in zip(numbers, embeddings, strict=True)
        }
        return [_prediction(number) for number in numbers], [_label(number) for number in numbers], contents


class _NoLog:
    def read(self, places: object) -> dict[Place, Record]:
        raise AssertionError("a prediction needs no event")


def _event_id(number: int) -> str:
    # Ids of real events have no order, so neither have these.
    return blake2b(str(number).encode(), digest_size=12).hexdigest()


def _prediction(number: int) -> tuple[Prediction, Place]:
    at = START + timedelta(milliseconds=number)
    made = Prediction(
        event_id=_event_id(number),
        stream=STREAM,
        label=f"class {number % CLASSES}",
        probabilities={f"class {(number + more) % CLASSES}": 0.9 / (more + 1) for more in range(5)},
        novelty=0.1,
        model_version="v1.1",
        ref=Place(topic="reports", partition=0, offset=number),
        observed_at=at,
        predicted_at=at,
    )
    return made, Place(topic=PREDICTIONS, partition=0, offset=number)


def _label(number: int) -> tuple[Label, Place]:
    at = START + timedelta(milliseconds=number)
    name = f"class {number % CLASSES}"
    made = Label(event_id=_event_id(number), stream=STREAM, label=name, labeller="bench", labelled_at=at)
    return made, Place(topic=LABELS, partition=0, offset=number)


def _server_of(store: LearnerStore) -> psutil.Process | None:
    """The server's process that answers this store, where it is one of this machine's."""
    if store._engine.dialect.name == "sqlite":
        return None
    with store._read() as connection:
        pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
    try:
        found = psutil.Process(pid)
        return found if "postgres" in found.name() else None
    except psutil.Error:
        return None


def measure(kind: str, where: str, chosen: argparse.Namespace, say: Say) -> list[Row]:
    """Every contest on one database, medians of `--runs`."""
    rows: list[Row] = []
    settle_collector()  # as a learner's process does at its start
    with closing(LearnerStore(where)) as store:
        bench = Bench(store)
        began = time.perf_counter()
        bench.fill(chosen.entries)
        say(f"{kind}: {chosen.entries:,} entries in {time.perf_counter() - began:,.0f} s")
        contests: dict[str, Callable[[int], Spent]] = {"index": bench.index, "join": bench.join, "add": bench.add}
        for name, act in contests.items():
            spent = [act(chosen.messages) for _ in range(chosen.runs)]
            rates = [each.count / each.seconds for each in spent]
            share = statistics.median(each.server / max(each.own + each.server, 1e-9) for each in spent)
            for metric, value, unit in (
                ("per_second", statistics.median(rates), "messages/s"),
                ("spread", (max(rates) - min(rates)) / statistics.median(rates), "of the median"),
                ("per_core_second", statistics.median(each.per_core for each in spent), "messages/s"),
                ("server_share", share, "of the time"),
            ):
                rows.append(Row(name=name, mode=kind, metric=metric, value=value, unit=unit))
            say(f"{kind}, {name}: {statistics.median(rates):,.0f} a second, {rows[-2].value:,.0f} a core second")
        size = _bytes(where, store)
        if size is not None:
            per = size / (chosen.entries + chosen.messages * chosen.runs * 2)
            rows.append(Row(name="disk", mode=kind, metric="bytes_per_entry", value=per, unit="bytes"))
    return rows


def _bytes(where: str, store: LearnerStore) -> float | None:
    if where.startswith("sqlite:///"):
        return float(sum(path.stat().st_size for path in Path(where.removeprefix("sqlite:///")).parent.iterdir()))
    with store._read() as connection:
        return float(connection.scalar(sa.text("SELECT pg_database_size(current_database())")) or 0)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.store"
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES, help="these alone")
    parser.add_argument("--url", help="of an empty PostgreSQL database; else a server is started for the run")
    parser.add_argument(
        "--entries",
        type=int,
        metavar="N",
        help="predictions that lie in the index before (default 1000000, quick 2000)",
    )
    parser.add_argument("--messages", type=int, metavar="N", help="of each contest, run (default 40000, quick 2000)")
    chosen = parser.parse_args(arguments)
    chosen.entries = chosen.entries or (2_000 if chosen.quick else 1_000_000)
    chosen.messages = chosen.messages or (2_000 if chosen.quick else 40_000)
    if min(chosen.entries, chosen.messages, chosen.runs) < 1 or chosen.messages * chosen.runs > chosen.entries:
        if not chosen.quick:
            parser.error("--entries is at least --messages times --runs, which are at least 1")
        chosen.entries = max(chosen.entries, chosen.messages * chosen.runs)
    return chosen


if __name__ == "__main__":
    sys.exit(main())
