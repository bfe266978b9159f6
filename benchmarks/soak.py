"""Is anything noticed of ten thousand swaps, and does anything grow in an hour?

`swaps`: a worker under a steady load while revisions, whole versions over two encoders and broken ones are announced to
it, in turns with nothing announced. Every answer is compared with what the revision that it names says of its event,
and `trimtab audit` is the judge of whether every event has one. `steady`: a worker and a learner under a steady load of
events and labels; memory, handles, threads, index and lag are looked at all the while. Ends with 1 where a promise was
broken. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from confluent_kafka import Producer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import weights
from benchmarks.kafka import QUIET, REPOSITORY, BenchmarkFailed, running_broker
from benchmarks.pace import Ear, Heard, Message, Pace, latencies, wait_for
from benchmarks.report import Result, Row, machine, options, publish, versions
from learner.encoders import Encoder, load_encoder, payload
from learner.heads import LinearHead
from learner.registry import Pointer, Registry
from replay.store import LearnerStore
from stream.errors import TrimtabError
from stream.events import encode
from tests.deployment import Deployment, label
from tests.kafka import KafkaBroker
from tests.scrape import Scrape

PACKAGES = ("trimtab", "torch", "confluent-kafka", "faust-streaming", "pydantic", "sqlalchemy")
STREAM = "probe"
BLOCK: dict[str, Any] = {
    "kind": "telemetry",
    "encoder": {"channels": list(weights.CHANNELS), "window": weights.STEPS, "dimension": 32, "learned": 8},
    "triggers": {"every_labels": None, "drift": False, "forgetting": False, "gain": None},
}
POOL = 60
"""Different windows that events have; an event's number, modulo this, says which."""
BROKEN_EVERY = 10
EDGE_SECONDS = 0.5
"""At both ends of a turn, that are counted to neither kind."""
SAME = 1e-3
"""Largest difference of a probability: what an event is batched with changes its last bits."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    chosen = _arguments(arguments)
    out, err = Console(), Console(stderr=True)
    before = machine()
    rows: list[Row] = []
    broken: list[str] = []
    try:
        with running_broker(chosen.bootstrap) as broker:
            for part, soak in (("swaps", swaps), ("steady", steady)):
                if part in chosen.only:
                    with _deployment(broker, part, chosen) as made:
                        rows += soak(made, chosen, broken, lambda line: err.print(line, highlight=False, markup=False))
    except (BenchmarkFailed, TrimtabError) as error:
        err.print(f"benchmarks.soak: {error}", style="red", markup=False)
        return 1
    publish(Result(benchmark="soak", machine=before, versions=versions(PACKAGES), rows=rows), chosen.json, out)
    for one in broken:
        err.print(f"BROKEN: {one}", style="red", markup=False)
    return 1 if broken else 0


Say = Callable[[str], None]


@contextmanager
def _deployment(broker: KafkaBroker, part: str, chosen: argparse.Namespace) -> Iterator[Deployment]:
    blocks: dict[str, Any] = {"worker": {"guarantee": chosen.guarantee}}
    if part == "steady":
        # What is kept for a time is due to go after the first eighth of the run; the learner lets go of it every hour.
        held = max(5.0, chosen.minutes * 60 / 8)
        memory = {"horizon": held, "correction_horizon": held, "ledger_retention": held, "quarantine_retention": held}
        blocks["learner"] = {"memory": memory | {"index_size": max(100, int(chosen.rate * held))}}
    with tempfile.TemporaryDirectory(prefix="trimtab-soak-") as directory:
        made = Deployment(broker, f"b{uuid.uuid4().hex[:8]}-", Path(directory), {STREAM: BLOCK}, blocks)
        try:
            yield made
        finally:
            made.end()


def _start(made: Deployment, command: str, port: int) -> subprocess.Popen[bytes]:
    process = made.start(command)

    def check() -> None:
        if process.poll() is not None:
            log = (made.directory / f"{command}.log").read_text(errors="replace")
            raise BenchmarkFailed(f"the {command} ended with {process.returncode}:\n{log[-3000:]}")

    wait_for(lambda: made.ready(port), 300, f"starting the {command}", check, every=0.3)
    return process


def numbered(seed: int) -> Iterator[Message]:
    """Endless events whose ids end in their number."""
    for number in itertools.count():
        event = weights.window(STREAM, f"e{seed}-{number:09d}", number % POOL)
        yield event.event_id.encode(), encode(event)


def audited(made: Deployment) -> tuple[int, dict[str, Any]]:
    """`trimtab audit` of a deployment: its exit code and what it found, `breaches` among it."""
    command = [sys.executable, "-m", "deploy.cli", "audit", "--json", "--config", str(made.settings)]
    asked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    found = json.loads(asked.stdout) if asked.stdout.startswith("{") else {"breaches": [asked.stderr[-2000:]]}
    return asked.returncode, found


# Processes watched


@dataclass
class Watch:
    """Looks at a process and its metrics every so often, in a thread of its own; a context."""

    pid: int
    port: int
    every: float
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """By what was looked at: (seconds since the start, value)."""

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._begun = time.perf_counter()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(40)

    def _look(self) -> None:
        process = psutil.Process(self.pid)
        while not self._over.wait(self.every):
            now = time.perf_counter() - self._begun
            try:
                self.samples["resident_memory"].append((now, process.memory_info().rss / 2**20))
                self.samples["file_handles"].append((now, process.num_fds()))
                self.samples["threads"].append((now, process.num_threads()))
                scrape = Scrape(self.port)
            except (psutil.Error, OSError):
                continue
            self.samples["lag"].append((now, scrape.total("trimtab_consumer_lag_events")))
            if indexed := scrape.total("trimtab_join_index_predictions"):  # a worker has none
                self.samples["index"].append((now, indexed))

    def last(self, what: str) -> float:
        """What was seen last; 0 before anything was."""
        return self.samples[what][-1][1] if self.samples.get(what) else 0.0

    def growth(self, what: str) -> tuple[float, float, float, float]:
        """Medians of the second and of the last quarter of the time; the slope an hour since the first quarter.

        The last number is the slope's standard error, as of looks that know nothing of each other.
        """
        found = np.array(self.samples[what])
        if len(found) < 8:
            raise BenchmarkFailed(f"{len(found)} looks at {what} are too few; let it run longer")
        quarter = len(found) // 4
        settled = found[quarter:]
        (slope, _), covariance = np.polyfit(settled[:, 0] / 3600, settled[:, 1], 1, cov=True)
        early, late = np.median(found[quarter : 2 * quarter, 1]), np.median(found[-quarter:, 1])
        return float(early), float(late), float(slope), float(np.sqrt(covariance[0, 0]))


UNITS = {"resident_memory": "MiB", "file_handles": "handles", "threads": "threads", "lag": "events", "index": "rows"}


def _growth_rows(watch: Watch, name: str, mode: str) -> list[Row]:
    rows = []
    for what in watch.samples:
        early, late, slope, error = watch.growth(what)
        rows.append(_row(name, mode, f"{what}_early", early, UNITS[what]))
        rows.append(_row(name, mode, f"{what}_late", late, UNITS[what]))
        rows.append(_row(name, mode, f"{what}_slope", slope, f"{UNITS[what]}/h"))
        rows.append(_row(name, mode, f"{what}_slope_error", error, f"{UNITS[what]}/h"))
    return rows


# Swaps


@dataclass(frozen=True)
class Announcement:
    """What is put on `model-versions`; `pointer` is None where it is broken and must be refused."""

    key: bytes
    value: bytes
    pointer: Pointer | None


@dataclass
class Programme:
    """Everything that is announced, in order, made beforehand so that nothing is computed while it is measured."""

    announcements: list[Announcement]
    encoders: dict[str, Encoder]
    """By digest."""
    registry: Registry

    @property
    def good(self) -> dict[str, Pointer]:
        """By name, what may answer."""
        return {one.pointer.name: one.pointer for one in self.announcements if one.pointer is not None}


def programme(registry: Registry, revisions: int, count: int, back: int) -> Programme:
    """`count` versions of distinct bytes with their revisions, then `back` promotions of one or another of them.

    Encoders of two dimensions take turns, so every promotion changes the encoder as well. Every tenth announcement is a
    broken one: a head with a flipped bit, one that is not there, one of the other dimension, an altered pointer.
    """
    maker, encoders = weights.Maker(registry, STREAM), {}
    announcements: list[Announcement] = []
    names: list[tuple[weights.Made, int]] = []
    heads: dict[int, str] = {}
    faults = itertools.cycle(_FAULTS)

    def announce(pointer: Pointer) -> None:
        announcements.append(Announcement(pointer.key, pointer.encode(), pointer))
        if len(announcements) % BROKEN_EVERY == BROKEN_EVERY - 1:
            announcements.append(next(faults)(registry, maker, pointer, heads))

    for number in range(count):
        dimension = weights.DIMENSIONS[number % len(weights.DIMENSIONS)]
        made = maker.version(number, dimension, names[-1][0].name if names else None)
        spec, files = registry.encoder(made.encoder)
        encoder = encoders[made.encoder] = load_encoder(spec, files)
        heads[dimension] = made.head
        announce(maker.pointer(made.name, made.encoder, made.head))
        last = revisions // count
        for revision in range(1, last + 1):
            head = maker.head(encoder, number * (last + 1) + revision)
            announce(maker.pointer(made.name, made.encoder, head, revision))
        names.append((made, last))
    for number in range(back):
        # A version that comes back goes on counting its revisions.
        at = number * 7 % count
        made, last = names[at]
        names[at] = made, last + 1
        announce(maker.pointer(made.name, made.encoder, made.head, last + 1))
    return Programme(announcements, encoders, registry)


def _flipped(registry: Registry, maker: weights.Maker, last: Pointer, heads: dict[int, str]) -> Announcement:
    assert last.head is not None
    content = registry.read(last.head)
    digest = registry.put(content + b" ")
    path = Path(registry._blob(digest))
    path.chmod(0o644)
    path.write_bytes(content + b"!")
    return _broken(maker, last, head=digest)


def _missing(registry: Registry, maker: weights.Maker, last: Pointer, heads: dict[int, str]) -> Announcement:
    return _broken(maker, last, head=uuid.uuid4().hex * 2)


def _misfit(registry: Registry, maker: weights.Maker, last: Pointer, heads: dict[int, str]) -> Announcement:
    own = registry.encoder(last.encoder)[0].dimension
    others = [head for dimension, head in heads.items() if dimension != own]
    return _broken(maker, last, head=others[0]) if others else _missing(registry, maker, last, heads)


def _altered(registry: Registry, maker: weights.Maker, last: Pointer, heads: dict[int, str]) -> Announcement:
    broken = _broken(maker, last, head=last.head or "")
    return Announcement(broken.key, broken.value.replace(b'"version": "v', b'"version": "v1', 1), None)


_FAULTS = (_flipped, _missing, _misfit, _altered)


def _broken(maker: weights.Maker, last: Pointer, head: str) -> Announcement:
    # Under a revision that no whole one has, so that an answer by it would be known.
    made = maker.pointer(last.version, last.encoder, head, last.revision + 1_000_000)
    return Announcement(made.key, made.encode(), None)


def swaps(made: Deployment, chosen: argparse.Namespace, broken: list[str], say: Say) -> list[Row]:
    """The swap soak: rows, and what was broken."""
    begun = time.monotonic()
    registry = Registry(str(made.directory / "registry"))
    plan = programme(registry, chosen.revisions, chosen.versions, chosen.swaps)
    good, bad = len(plan.good), sum(one.pointer is None for one in plan.announcements)
    say(f"swaps: {good:,} whole and {bad:,} broken announcements made in {time.monotonic() - begun:.0f} s")
    LearnerStore(made.store_url).close()  # the audit wants one; here nobody learns
    topic = made.topics.name("model_versions")
    first, *rest = plan.announcements
    made.kafka.produce(topic, [(first.key, first.value, ())])
    worker = _start(made, "worker", made.worker_port)
    turns: list[tuple[str, float, float]] = []
    pace = Pace(made.kafka.bootstrap, made.topics.name("telemetry"), chosen.rate)
    over, failed = threading.Event(), []

    def drive() -> None:
        try:
            pace.run(numbered(0), float("inf"), over)
        except BenchmarkFailed as error:
            failed.append(error)

    with (
        Ear(made.kafka.bootstrap, made.topics.name("predictions")) as ear,
        Watch(worker.pid, made.worker_port, 0.5) as watch,
    ):
        driver = threading.Thread(target=drive, name="driver", daemon=True)
        driver.start()
        try:
            wait_for(lambda: len(ear.heard) > 5 * chosen.rate, 300, "warming up")
            _take_turns(made, topic, rest, turns, chosen)
            wait_for(lambda: _announced(made) >= (good, bad), 300, "swapping", every=0.5)
        finally:
            over.set()
            driver.join(90)
        if failed:
            raise failed[0]
        wait_for(lambda: len({one.key for one in ear.heard}) >= len(pace.due), 300, "answering", every=0.5)
    swapped, refused = _announced(made)
    made.end()
    return _swap_rows(made, chosen, plan, pace, ear, watch, turns, (swapped, refused), (good, bad), broken)


def _announced(made: Deployment) -> tuple[int, int]:
    """Swaps, and refusals, that the worker counted."""
    scrape = Scrape(made.worker_port)
    return int(scrape.total("trimtab_swaps_total")), int(scrape.total("trimtab_refused_versions_total"))


def _take_turns(
    made: Deployment,
    topic: str,
    rest: Sequence[Announcement],
    turns: list[tuple[str, float, float]],
    chosen: argparse.Namespace,
) -> None:
    """Announce all there is at a steady rate, in turns with as long a time in which nothing is announced."""
    producer = Producer({"bootstrap.servers": made.kafka.bootstrap, **QUIET, "linger.ms": 0})
    pause, left = threading.Event(), iter(rest)
    each = max(1, int(chosen.window * chosen.per_second))
    while some := list(itertools.islice(left, each)):
        begun = time.perf_counter()
        pause.wait(chosen.window)
        turns.append(("without", begun, time.perf_counter()))
        begun = time.perf_counter()
        for number, one in enumerate(some):
            pause.wait(max(0.0, begun + number / chosen.per_second - time.perf_counter()))
            producer.produce(topic, value=one.value, key=one.key)
            producer.poll(0)
        if producer.flush(60):
            raise BenchmarkFailed("the broker did not take all announcements")
        turns.append(("with", begun, time.perf_counter()))


def _swap_rows(
    made: Deployment,
    chosen: argparse.Namespace,
    plan: Programme,
    pace: Pace,
    ear: Ear,
    watch: Watch,
    turns: Sequence[tuple[str, float, float]],
    counted: tuple[int, int],
    wanted: tuple[int, int],
    broken: list[str],
) -> list[Row]:
    waited = latencies(pace.due, ear.heard)
    due = np.array(list(pace.due.values()))
    by_kind: dict[str, list[np.ndarray]] = defaultdict(list)
    for kind, begin, end in turns:
        inside = (due >= begin + EDGE_SECONDS) & (due < end - EDGE_SECONDS)
        by_kind[kind].append(waited[inside])
    rows: list[Row] = []
    p99: dict[str, float] = {}
    for kind, found in by_kind.items():
        every = np.concatenate(found)
        if len(every) == 0:
            raise BenchmarkFailed("the turns are too short for any event to be counted")
        p99[kind] = float(np.quantile(every, 0.99))
        rows.append(_row("swaps", kind, "events", len(every), "events"))
        rows.append(_row("swaps", kind, "p50", float(np.quantile(every, 0.5)) * 1000, "ms"))
        rows.append(_row("swaps", kind, "p99", p99[kind] * 1000, "ms"))
    rows.append(_row("swaps", "with", "p99_ratio_to_without", p99["with"] / p99["without"], "ratio"))

    twice = sum(count - 1 for count in Counter(one.key for one in ear.heard).values())
    wrong = misanswered(plan, ear.heard)
    code, audit = audited(made)
    numbers = {
        "events": len(pace.due),
        "answered_twice": twice,
        "answered_by_no_whole_revision": len(wrong),
        "swaps": counted[0],
        "swaps_missed": wanted[0] - counted[0],
        "refused": counted[1],
        "refusals_missed": wanted[1] - counted[1],
        "audit_unanswered": audit.get("unanswered", -1),
        "audit_breaches": len(audit["breaches"]),
    }
    rows += [_row("swaps", "all", name, value, "") for name, value in numbers.items()]
    slope = watch.growth("resident_memory")[2]
    seconds = watch.samples["resident_memory"][-1][0]
    rows += _growth_rows(watch, "swaps", "all")
    rows.append(_row("swaps", "all", "memory_per_1000_swaps", slope / 3600 * seconds / counted[0] * 1000, "MiB"))
    if code or audit["breaches"]:
        broken += audit["breaches"] or ["the audit says no"]
    if audit.get("places") != len(pace.due):
        broken.append(f"the audit saw {audit.get('places')} events, {len(pace.due)} were sent")
    if twice and chosen.guarantee == "exactly_once":
        broken.append(f"{twice} events were answered twice")
    if wrong:
        broken.append(f"{len(wrong)} answers are not what their revision says: {'; '.join(wrong[:5])}")
    if counted != wanted:
        broken.append(f"{counted} announcements were taken and refused, {wanted} should have been")
    return rows


def misanswered(plan: Programme, heard: Sequence[Heard]) -> list[str]:
    """Answers that are not what the revision they name says of their event, computed anew from the registry."""
    pool = [payload(weights.window(STREAM, "pool", number), weights.CHANNELS) for number in range(POOL)]
    embedded = {digest: encoder.embed(pool) for digest, encoder in plan.encoders.items()}
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in heard:
        answer = json.loads(one.value)
        by_name[answer["model_version"]].append(answer)
    wrong: list[str] = []
    good = plan.good
    for name, answers in by_name.items():
        pointer = good.get(name)
        if pointer is None or pointer.head is None:
            wrong += [f"{answer['event_id']} by {name}, which must not answer" for answer in answers]
            continue
        head = LinearHead.from_tensors(plan.registry.head(pointer.head))
        labels, shares, _ = head.answer(embedded[pointer.encoder], len(weights.CLASSES))
        for answer in answers:
            number = int(answer["event_id"].rpartition("-")[2]) % POOL
            said = dict(zip(labels[number], shares[number].tolist(), strict=True))
            given = answer["probabilities"]
            if said.keys() != given.keys() or any(abs(said[c] - given[c]) > SAME for c in said):
                wrong.append(f"{answer['event_id']} by {name}: {given} instead of {said}")
    return wrong


# Steady


def steady(made: Deployment, chosen: argparse.Namespace, broken: list[str], say: Say) -> list[Row]:
    """The steady soak: rows, and what was broken."""
    learner = _start(made, "learner", made.learner_port)
    worker = _start(made, "worker", made.worker_port)
    chance = np.random.default_rng(0)
    names = list(weights.CLASSES)
    bootstrap = made.kafka.bootstrap
    rate = sustained(made, chosen.rate, min(20.0, chosen.minutes * 6), say)
    pace = Pace(bootstrap, made.topics.name("telemetry"), rate)
    labelled = 0
    over, failed = threading.Event(), []

    def labels() -> None:
        """A share of the events that were answered, a second or two later."""
        nonlocal labelled
        producer = Producer({"bootstrap.servers": bootstrap, **QUIET, "partitioner": "murmur2_random", "linger.ms": 5})
        done = 0
        while not over.wait(1.0):
            fresh = ear.heard[done:]
            done += len(fresh)
            for one in fresh:
                if chance.random() < chosen.labelled:
                    event_id = one.key.decode()
                    number = int(event_id.rpartition("-")[2]) % POOL
                    value = encode(label(STREAM, event_id, names[number % len(names)]))
                    producer.produce(made.topics.name("labels"), value=value, key=one.key)
                    labelled += 1
            producer.poll(0)
        producer.flush(30)

    def drive() -> None:
        try:
            pace.run(numbered(1), chosen.minutes * 60, over)
        except BenchmarkFailed as error:
            failed.append(error)

    every = min(5.0, chosen.minutes * 60 / 40)
    with (
        Ear(bootstrap, made.topics.name("predictions")) as ear,
        Watch(worker.pid, made.worker_port, every) as of_worker,
        Watch(learner.pid, made.learner_port, every) as of_learner,
        Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True)
        ) as bar,
    ):
        task = bar.add_task("steady", total=chosen.minutes * 60)
        threads = [threading.Thread(target=part, name="driver", daemon=True) for part in (drive, labels)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + chosen.minutes * 60 + 120
        while threads[0].is_alive() and time.monotonic() < until:
            threads[0].join(1)
            seen = ", ".join(
                f"{name} {watch.last('resident_memory'):.0f} MiB, lag {watch.last('lag'):.0f}"
                for name, watch in (("worker", of_worker), ("learner", of_learner))
            )
            bar.update(task, advance=1, description=f"{rate:g} events/s; {seen}")
        wait_for(lambda: len({one.key for one in ear.heard}) >= len(pace.due), 300, "answering", every=0.5)
        over.set()
        threads[1].join(60)
    if failed:
        raise failed[0]
    wait_for(lambda: Scrape(made.learner_port).total("trimtab_consumer_lag_events") == 0, 300, "learning", every=0.5)
    say(f"steady: {len(pace.due):,} events and {labelled:,} labels in {chosen.minutes:g} minutes")
    made.end()
    code, audit = audited(made)
    if code:
        broken += audit["breaches"] or ["the audit says no"]
    waited = latencies(pace.due, ear.heard)
    rows = [
        _row("steady", "all", "offered_rate", rate, "events/s"),
        _row("steady", "all", "events", len(pace.due), "events"),
        _row("steady", "all", "labels", labelled, "labels"),
        _row("steady", "all", "p99", float(np.quantile(waited, 0.99)) * 1000, "ms"),
        _row("steady", "all", "audit_breaches", len(audit["breaches"]), "promises"),
    ]
    for name, watch in (("worker", of_worker), ("learner", of_learner)):
        rows += _growth_rows(watch, "steady", name)
    return rows


def sustained(made: Deployment, rate: float, seconds: float, say: Say) -> float:
    """The rate, halved until a trial of so many seconds is answered within a quarter of that after its end.

    Raises:
        BenchmarkFailed: not even one event a second is.
    """
    for trial in itertools.count(2):
        pace = Pace(made.kafka.bootstrap, made.topics.name("telemetry"), rate)
        with Ear(made.kafka.bootstrap, made.topics.name("predictions")) as ear:
            pace.run(numbered(trial), seconds)
            ends = time.monotonic() + max(2.0, seconds / 4)
            while (left := len(pace.due.keys() - {one.key for one in ear.heard})) and time.monotonic() < ends:
                time.sleep(0.1)
            if not left:
                return rate
            say(f"steady: {left:,} of {len(pace.due):,} events wait after {seconds:g} s at {rate:g} a second; halved")
            # What is left over would be counted against the next trial.
            while pace.due.keys() - {one.key for one in ear.heard}:
                if time.monotonic() > ends + 300:
                    raise BenchmarkFailed(f"a trial at {rate:g} events a second was not answered in 300 s")
                time.sleep(0.5)
        rate /= 2
        if rate < 1:
            raise BenchmarkFailed("the worker does not keep up with one event a second")
    raise AssertionError("unreachable")


def _row(name: str, mode: str, metric: str, value: float, unit: str) -> Row:
    return Row(name=name, mode=mode, metric=metric, value=value, unit=unit or "of them")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.soak"
    parser.add_argument("--only", nargs="+", choices=("swaps", "steady"), default=["swaps", "steady"])
    parser.add_argument("--rate", type=float, metavar="N", help="events a second (default 100, quick 40)")
    parser.add_argument("--revisions", type=int, metavar="N", help="of all versions (default 10000, quick 60)")
    parser.add_argument("--versions", type=int, metavar="N", help="of distinct bytes (default 100, quick 6)")
    parser.add_argument("--swaps", type=int, metavar="N", help="promotions after that (default 1000, quick 20)")
    parser.add_argument("--per-second", type=float, default=20.0, metavar="N", help="announcements (default 20)")
    parser.add_argument("--window", type=float, metavar="S", help="length of a turn (default 10, quick 2)")
    parser.add_argument("--minutes", type=float, metavar="M", help="of the steady soak (default 60, quick 0.3)")
    parser.add_argument("--labelled", type=float, default=0.2, metavar="P", help="share that is labelled (default 0.2)")
    parser.add_argument("--guarantee", choices=("at_least_once", "exactly_once"), default="exactly_once")
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="a Kafka that runs already, instead of one of our own")
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    for name, small, usual in (
        ("rate", 40.0, 100.0),
        ("revisions", 60, 10_000),
        ("versions", 6, 100),
        ("swaps", 20, 1_000),
        ("window", 2.0, 10.0),
        ("minutes", 0.3, 60.0),
    ):
        if getattr(chosen, name) is None:
            setattr(chosen, name, small if quick else usual)
    if chosen.versions < 2 or chosen.revisions < chosen.versions or chosen.window <= 2 * EDGE_SECONDS:
        parser.error("--versions is at least 2, --revisions at least as many, --window more than a second")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
