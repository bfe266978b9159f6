"""Does it stay as fast when there is more of everything: workers, streams, announced revisions, predictions indexed?

`workers`: events a second of 1, 2 and 4 workers of one group whose model only waits. `streams`: what an event costs a
worker that serves 1, 10 or 100 streams. `start`: until a worker's first answer after 100,000 announced revisions, and
after one. `index`: predictions and labels that the learner takes into a large join index, and into a small one. See
benchmarks/README.md for what is fair in that and what is not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from rich.console import Console

from benchmarks import store, weights
from benchmarks.forward import base_encoder, questions
from benchmarks.kafka import PARTITIONS, QUIET, BenchmarkFailed, Contestant, Kafka, Passage, running_kafka
from benchmarks.pace import wait_for
from benchmarks.report import Result, Row, machine, options, publish, versions
from learner.heads import DEFAULT_WIDTH, HeadSums, quantise, solve
from learner.registry import Pointer, Registry
from replay.store import LearnerStore
from stream.errors import TrimtabError
from stream.events import Event, Report, encode, utc_now
from stream.service import settle_collector

PARTS = ("workers", "streams", "start", "index")
PACKAGES = ("torch", "confluent-kafka", "faust-streaming", "pydantic", "sqlalchemy", "numpy")
WORKERS = (1, 2, 4)
STREAMS = (1, 10, 100)
MILLISECONDS = 4.0
"""That the waiting model takes for an event."""
BATCH = 512
FEW_ENTRIES = 10_000
STREAM = "probe"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    chosen = _arguments(arguments)
    out, err = Console(), Console(stderr=True)
    before = machine()
    rows: list[Row] = []
    try:
        if set(chosen.only) - {"index"}:
            with running_kafka(chosen.bootstrap) as kafka:
                for part, measure in (("workers", workers), ("streams", streams), ("start", starts)):
                    if part in chosen.only:
                        rows += measure(kafka, chosen, err)
        if "index" in chosen.only:
            rows += index(chosen, err)
    except (BenchmarkFailed, TrimtabError) as error:
        err.print(f"benchmarks.scale: {error}", style="red", markup=False)
        return 1
    publish(Result(benchmark="scale", machine=before, versions=versions(PACKAGES), rows=rows), chosen.json, out)
    return 0


# Workers


def workers(kafka: Kafka, chosen: argparse.Namespace, console: Console) -> list[Row]:
    """1, 2 and 4 workers in turn, as often as asked for."""
    rates: dict[int, list[float]] = {count: [] for count in WORKERS}
    for round_ in range(chosen.runs):
        for count in WORKERS if round_ % 2 == 0 else reversed(WORKERS):
            events = chosen.sleeping * count
            rates[count].append(_together(kafka, count, events))
            console.print(f"run {round_ + 1}: {count} workers, {rates[count][-1]:,.0f} events/s", highlight=False)
    middle = {count: statistics.median(found) for count, found in rates.items()}
    rows = []
    for count in WORKERS:
        mode = f"{count} workers" if count > 1 else "1 worker"
        rows.append(_row("workers", mode, "events_per_second", middle[count], "events/s"))
        if count > 1:
            rows.append(_row("workers", mode, "ratio_to_1_worker", middle[count] / middle[1], "ratio"))
    return rows


def _together(kafka: Kafka, count: int, total: int) -> float:
    """Events a second of a whole group, timed by its commits once every member has its partitions."""
    with ExitStack() as stack:
        config = _config(kafka, stack) | {"batch": 64, "milliseconds": MILLISECONDS}
        members = [stack.enter_context(Contestant("sleeper", "benchmarks.scaling", config)) for _ in range(count)]
        looking = stack.enter_context(_committed(kafka, config["group"], config["source"]))

        def check() -> None:
            for member in members:
                member.check()

        # Nothing is published before the partitions are shared out, so no member is timed alone.
        wait_for(lambda: _spread(kafka, config["group"]) == count, 240, "joining the group", check, every=0.3)
        each = total // PARTITIONS
        producer = Producer({"bootstrap.servers": kafka.bootstrap, **QUIET, "linger.ms": 20})
        for number in range(each):
            for partition in range(PARTITIONS):
                key, value = _notes(number * PARTITIONS + partition)
                producer.produce(config["source"], value=value, key=key, partition=partition)
            producer.poll(0)
        if producer.flush(60):
            raise BenchmarkFailed("the broker did not take all events")
        wait_for(lambda: looking() > 0, 120, "the first commit", check)
        first, begun = looking(), time.perf_counter()
        wait_for(lambda: looking() >= each * PARTITIONS, 600, "answering", check)
        return float(each * PARTITIONS - first) / (time.perf_counter() - begun)


def _spread(kafka: Kafka, group: str) -> int:
    """How many members of a group have partitions, all of them shared out; 0 while that is being settled."""
    shares = kafka.shares(group)
    return len([share for share in shares if share]) if sum(shares) == PARTITIONS else 0


@contextmanager
def _committed(kafka: Kafka, group: str, topic: str) -> Iterator[Callable[[], int]]:
    """A function that says how many events of a topic the group has committed."""
    places = [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
    asking = Consumer({"bootstrap.servers": kafka.bootstrap, **QUIET, "group.id": group, "enable.auto.commit": False})

    def look() -> int:
        try:
            return sum(max(0, place.offset) for place in asking.committed(places, timeout=30))
        except KafkaException:
            return 0

    with closing(asking):
        yield look


# Streams


def streams(kafka: Kafka, chosen: argparse.Namespace, console: Console) -> list[Row]:
    """The same events dealt out to 1, 10 and 100 streams, with a model that costs nothing and with MiniLM."""
    rows: list[Row] = []
    for model, total in (("null", chosen.notes), ("slot", chosen.questions)):
        found: dict[int, list[Passage]] = {count: [] for count in STREAMS}
        with tempfile.TemporaryDirectory(prefix="trimtab-registry-") as registry:
            pointers = _text_versions(registry, max(STREAMS)) if model == "slot" else []
            for round_ in range(chosen.runs):
                for count in STREAMS if round_ % 2 == 0 else reversed(STREAMS):
                    passage = _dealt_out(kafka, model, count, total, registry, pointers)
                    found[count].append(passage)
                    console.print(
                        f"run {round_ + 1}: {model}, {count} streams, {passage.rate:,.0f} events/s, "
                        f"{passage.cpu_per_event:,.1f} µs of processor time an event",
                        highlight=False,
                    )
        rate = {count: statistics.median(one.rate for one in all_) for count, all_ in found.items()}
        cpu = {count: statistics.median(one.cpu_per_event for one in all_) for count, all_ in found.items()}
        for count in STREAMS:
            mode = f"{count} streams" if count > 1 else "1 stream"
            name = "streams_null" if model == "null" else "streams_minilm"
            rows.append(_row(name, mode, "events_per_second", rate[count], "events/s"))
            rows.append(_row(name, mode, "cpu_per_event", cpu[count], "microseconds"))
            if count > 1:
                rows.append(_row(name, mode, "time_ratio_to_1_stream", rate[1] / rate[count], "ratio"))
                rows.append(_row(name, mode, "cpu_ratio_to_1_stream", cpu[count] / cpu[1], "ratio"))
    return rows


def _dealt_out(kafka: Kafka, model: str, count: int, total: int, registry: str, pointers: Sequence[Pointer]) -> Passage:
    names = [_stream(number) for number in range(count)]
    with ExitStack() as stack:
        config = _config(kafka, stack) | {"batch": BATCH, "registry": registry, "rules": [(n, "text") for n in names]}
        kafka.fill(config["versions"], [(pointer.key, pointer.encode()) for pointer in pointers[:count]])
        if model == "slot":
            texts = [report.text for report in questions(total)[0]]
        else:
            texts = ["please move 120 dollars from my savings account to checking"] * total
        kafka.fill(config["source"], (_report(names[n % count], n, text) for n, text in enumerate(texts)))
        contestant = stack.enter_context(Contestant(model, "benchmarks.scaling", config))
        passage = kafka.watch(config["group"], config["source"], total, contestant, look=0.05, patience=300)
        answered = kafka.count(config["predictions"], total)
        if answered != total:
            raise BenchmarkFailed(f"{answered} answers to {total} events of {count} streams")
        return passage


def _text_versions(url: str, count: int) -> list[Pointer]:
    """MiniLM for so many streams, each with a head of its own over the 150 classes."""
    registry, encoder = Registry(url), base_encoder("cpu")
    reports, labels = questions(600)
    embeddings = encoder.embed([report.text for report in reports])
    digest = registry.put_encoder(encoder.spec, encoder.files())
    sums = HeadSums(encoder.spec.dimension, encoder.spec.bound, DEFAULT_WIDTH)
    sums.add(quantise(embeddings, encoder.spec.bound), labels)
    head = solve(sums)
    assert head is not None
    found = []
    for number in range(count):
        tensors = head.tensors()
        made = Pointer(
            kind="champion",
            stream=_stream(number),
            version="v1",
            encoder=digest,
            head=registry.put_head(tensors),
            epoch=1,
            sequence=1,
            announced_at=utc_now(),
        )
        found.append(made)
    return found


def _stream(number: int) -> str:
    return f"stream-{number:03d}"


# Start


def starts(kafka: Kafka, chosen: argparse.Namespace, console: Console) -> list[Row]:
    """Workers started in turn after many announcements and after one."""
    took: dict[int, list[tuple[float, float]]] = {1: [], chosen.revisions: []}
    with tempfile.TemporaryDirectory(prefix="trimtab-registry-") as registry, ExitStack() as stack:
        maker = weights.Maker(Registry(registry), STREAM)
        made = maker.version(0, weights.DIMENSIONS[0])
        topics = {count: stack.enter_context(kafka.topic("versions", 1)) for count in took}
        for count, topic in topics.items():
            kafka.fill(topic, weights.announcements(made, maker, count))
        for round_ in range(chosen.runs):
            for count in took if round_ % 2 == 0 else reversed(took):
                took[count].append(_first_answer(kafka, topics[count], registry))
                seconds, cpu = took[count][-1]
                console.print(
                    f"run {round_ + 1}: after {count:,} announcements {seconds:.2f} s, {cpu:.2f} s of processor time",
                    highlight=False,
                )
    rows = []
    middle = {count: [statistics.median(one) for one in zip(*all_, strict=True)] for count, all_ in took.items()}
    for count, (seconds, cpu) in middle.items():
        mode = f"{count:,} announcements" if count > 1 else "1 announcement"
        rows.append(_row("start", mode, "first_answer", seconds, "s"))
        rows.append(_row("start", mode, "cpu", cpu, "s"))
    for at, metric in enumerate(("later_than_after_1", "more_cpu_than_after_1")):
        more = middle[chosen.revisions][at] - middle[1][at]
        rows.append(_row("start", f"{chosen.revisions:,} announcements", metric, more, "s"))
    return rows


def _first_answer(kafka: Kafka, announced: str, registry: str) -> tuple[float, float]:
    """Seconds, and processor time, from the start of a worker's process to its first commit."""
    with ExitStack() as stack:
        config = _config(kafka, stack) | {
            "versions": announced,
            "batch": BATCH,
            "registry": registry,
            "rules": [(STREAM, "telemetry", list(weights.CHANNELS))],
        }
        events: list[Event] = [weights.window(STREAM, f"e-{number}", number) for number in range(8)]
        kafka.fill(config["source"], [(event.event_id.encode(), encode(event)) for event in events])
        looking = stack.enter_context(_committed(kafka, config["group"], config["source"]))
        begun = time.perf_counter()
        contestant = stack.enter_context(Contestant("slot", "benchmarks.scaling", config))
        wait_for(lambda: looking() > 0, 300, "the first answer", contestant.check)
        return time.perf_counter() - begun, contestant.cpu_seconds()


# The learner's index


def index(chosen: argparse.Namespace, console: Console) -> list[Row]:
    """Predictions indexed and labels joined, in SQLite, by the size of the index."""
    rows: list[Row] = []
    small: dict[str, float] = {}
    settle_collector()  # as a learner's process does at its start
    with store.database("sqlite", None) as where, closing(LearnerStore(where)) as opened:
        bench = store.Bench(opened)
        filled = 0
        for entries in (min(FEW_ENTRIES, chosen.entries), chosen.entries):
            begun = time.perf_counter()
            bench.fill(max(0, entries - filled))
            console.print(f"{entries:,} entries, {time.perf_counter() - begun:,.0f} s", highlight=False)
            mode = f"{entries:,} entries"
            for name, act in (("index", bench.index), ("join", bench.join)):
                spent = [act(chosen.messages) for _ in range(chosen.runs)]
                rate = statistics.median(one.per_core for one in spent)
                clock = statistics.median(one.count / one.seconds for one in spent)
                rows.append(_row(name, mode, "per_core_second", rate, "messages/s"))
                rows.append(_row(name, mode, "per_second", clock, "messages/s"))
                if name in small:
                    rows.append(_row(name, mode, "cpu_ratio_to_small", small[name] / rate, "ratio"))
                small.setdefault(name, rate)
            filled = entries + chosen.messages * chosen.runs
    return rows


# What they share


def _config(kafka: Kafka, stack: ExitStack) -> dict[str, Any]:
    return {
        "bootstrap": kafka.bootstrap,
        "group": f"benchmark-{uuid.uuid4().hex[:8]}",
        "source": stack.enter_context(kafka.topic("events")),
        "predictions": stack.enter_context(kafka.topic("predictions")),
        "dead_letters": stack.enter_context(kafka.topic("dead-letters", 1)),
        "versions": stack.enter_context(kafka.topic("versions", 1)),
        "exactly_once": False,
    }


def _notes(number: int) -> tuple[bytes, bytes]:
    return _report("notes", number, "please move 120 dollars from my savings account to checking")


def _report(stream: str, number: int, text: str) -> tuple[bytes, bytes]:
    report = Report(event_id=f"e-{number:09d}", stream=stream, source="benchmark", observed_at=utc_now(), text=text)
    return report.event_id.encode(), encode(report)


def _row(name: str, mode: str, metric: str, value: float, unit: str) -> Row:
    return Row(name=name, mode=mode, metric=metric, value=value, unit=unit)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.scale"
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument(
        "--revisions", type=int, metavar="N", help="announced before a start (default 100000, quick 2000)"
    )
    parser.add_argument("--entries", type=int, metavar="N", help="of the large index (default 1000000, quick 20000)")
    parser.add_argument("--full", action="store_true", help="the large index has 10,000,000 entries")
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="a Kafka that runs already, instead of one of our own")
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    chosen.revisions = chosen.revisions or (2_000 if quick else 100_000)
    chosen.entries = chosen.entries or (20_000 if quick else 10_000_000 if chosen.full else 1_000_000)
    chosen.messages = 2_000 if quick else 20_000
    chosen.sleeping = 512 if quick else 4_096
    chosen.notes = 5_120 if quick else 200_000
    chosen.questions = 1_024 if quick else 3_072
    chosen.runs = 1 if quick else chosen.runs
    if min(chosen.revisions, chosen.runs) < 1 or chosen.revisions < 2 or chosen.entries < chosen.messages * chosen.runs:
        parser.error("--revisions is at least 2, --runs at least 1, and --entries at least what is measured with")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
