"""How long an event waits for its answer, and a label for the answer that it changes.

The worker that ships, with MiniLM, reads events that come at random at half of the rate that it reaches at most; beside
it the bare forward pass of one batch. Then a whole deployment, worker and learner: a class that nobody knew is
labelled, and the clock runs until the first answer that names it. See benchmarks/README.md for what is fair in that and
what is not.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.forward import STREAM, questions
from benchmarks.kafka import BenchmarkFailed, Contestant, Kafka, running_broker
from benchmarks.pace import Ear, Heard, Message, Pace, latencies, wait_for
from benchmarks.report import Result, Row, machine, options, publish, versions
from benchmarks.worker import PACKAGES, TAUGHT, bare, best_setting, teach, work
from stream.batches import BatchSettings
from stream.errors import TrimtabError
from stream.events import Report, encode
from tests.deployment import Deployment, label
from tests.kafka import KafkaBroker

MODES = ("at_least_once", "exactly_once")
TOP_EVENTS = 3_072
"""Events by which the top rate is found."""
KNOWN_CLASSES, EACH = 20, 5
"""Classes that are known before the first trial, and labels of each; a trial labels as many."""
PROBE_SECONDS = 0.05
OTHER_LABELS = 10.0
"""Labels a second beside those of a trial, where it is `busy`."""
PATIENCE = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    chosen = _arguments(arguments)
    out, err = Console(), Console(stderr=True)
    before = machine()
    rows: list[Row] = []
    try:
        with running_broker(chosen.bootstrap) as broker:
            if "event" in chosen.only:
                rows += answers(broker, chosen, err)
            if "label" in chosen.only:
                rows += labels(broker, chosen, err)
    except (BenchmarkFailed, TrimtabError) as error:
        err.print(f"benchmarks.latency: {error}", style="red", markup=False)
        return 1
    publish(Result(benchmark="latency", machine=before, versions=versions(PACKAGES), rows=rows), chosen.json, out)
    return 0


# Event in, answer out


def answers(broker: KafkaBroker, chosen: argparse.Namespace, console: Console) -> list[Row]:
    """The latency under every guarantee, and the forward pass that it is compared with."""
    kafka = Kafka(broker.bootstrap)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="trimtab-registry-") as registry:
        reports, truth = questions(max(chosen.events, TAUGHT))
        pointer = teach(registry, reports[:TAUGHT], truth[:TAUGHT], "cpu")
        best = best_setting(chosen, console)
        full = chosen.batch / bare(chosen, chosen.events, [best])[0]["rate"]
        rows.append(_row("bare", None, "best_batch", best[0], "texts"))
        rows.append(_row("bare", None, "full_batch", full * 1000, "ms"))
        with kafka.topic("events") as source, kafka.topic("versions", 1) as announced:
            kafka.fill(source, [(report.event_id.encode(), encode(report)) for report in reports[: chosen.events]])
            kafka.fill(announced, [(pointer.key, pointer.encode())])
            top = work(kafka, source, announced, registry, chosen, "float32").rate
            console.print(f"at most {top:,.1f} events/s", highlight=False)
            rows.append(_row("worker", None, "top_rate", top, "events/s"))
            for mode in chosen.modes:
                rows += paced(kafka, announced, registry, reports, top / 2, full, mode, chosen, console)
    return rows


def paced(
    kafka: Kafka,
    announced: str,
    registry: str,
    reports: Sequence[Report],
    rate: float,
    full: float,
    mode: str,
    chosen: argparse.Namespace,
    console: Console,
) -> list[Row]:
    """The worker under events that come at `rate`; `full` is the bare pass of a full batch, in seconds."""
    with ExitStack() as stack:
        source, predictions, dead = (
            stack.enter_context(kafka.topic(name)) for name in ("events", "predictions", "dead-letters")
        )
        config = {
            "bootstrap": kafka.bootstrap,
            "group": f"benchmark-{uuid.uuid4().hex[:8]}",
            "source": source,
            "predictions": predictions,
            "dead_letters": dead,
            "versions": announced,
            "exactly_once": mode == "exactly_once",
            "batch": chosen.batch,
            "registry": registry,
            "device": chosen.device,
            "precision": "float32",
            "threads": chosen.threads,
        }
        contestant = stack.enter_context(Contestant("worker", "benchmarks.forward", config))
        ear = stack.enter_context(Ear(kafka.bootstrap, predictions))
        messages = endless(reports)

        def at(pace: Pace, seconds: float) -> None:
            pace.run(messages, seconds)
            due = set(pace.due)
            wait_for(lambda: due <= {one.key for one in ear.heard}, 120, "answering", contestant.check)

        at(Pace(kafka.bootstrap, source, max(1.0, rate / 10)), 2.0)  # joins the group, warms what is lazy
        at(Pace(kafka.bootstrap, source, rate, seed=1), min(2.0, chosen.seconds))
        ear.heard.clear()
        pace = Pace(kafka.bootstrap, source, rate, seed=2)
        at(pace, chosen.seconds)
        waited = latencies(pace.due, ear.heard)
        if len(ear.heard) != len(pace.due):
            raise BenchmarkFailed(f"{len(ear.heard)} answers to {len(pace.due)} events ({mode})")
    # All answers of one batch are stamped alike; this is the batch that an event is usually in.
    sizes = Counter(json.loads(one.value)["predicted_at"] for one in ear.heard)
    usual = sum(size * size for size in sizes.values()) / sum(sizes.values())
    p50, p99 = (float(np.quantile(waited, share)) for share in (0.5, 0.99))
    own = bare(chosen, 512, [(max(1, round(usual)), True)])[0]["rate"]
    console.print(f"{mode}: {rate:,.1f} events/s, p50 {p50 * 1000:,.1f} ms, p99 {p99 * 1000:,.1f} ms", highlight=False)
    return [
        _row("worker", mode, "offered", rate, "events/s"),
        _row("worker", mode, "events", len(waited), "events"),
        _row("worker", mode, "p50", p50 * 1000, "ms"),
        _row("worker", mode, "p99", p99 * 1000, "ms"),
        _row("worker", mode, "longest", float(waited.max()) * 1000, "ms"),
        _row("worker", mode, "p99_in_full_batches", p99 / full, "ratio"),
        _row("worker", mode, "usual_batch", usual, "events"),
        _row("bare", mode, "usual_batch", max(1, round(usual)) / own * 1000, "ms"),
        _row("worker", mode, "p99_in_usual_batches", p99 / (max(1, round(usual)) / own), "ratio"),
        _row("driver", mode, "sent_late_at_most", pace.late * 1000, "ms"),
    ]


def endless(reports: Sequence[Report]) -> Iterator[Message]:
    """The same questions over and over, each time under an id of its own."""
    for number, report in enumerate(itertools.cycle(reports)):
        again = report.model_copy(update={"event_id": f"e-{number:09d}"})
        yield again.event_id.encode(), encode(again)


# Label in, answer changed


class Trials:
    """A deployment that learns, and a question that is asked over and over meanwhile.

    Args:
        made: with worker and learner running.
        by_class: questions of each class, none of them published yet.
    """

    def __init__(self, made: Deployment, by_class: dict[str, list[Report]]) -> None:
        self._made, self._by_class = made, by_class
        self._names = sorted(by_class)
        self._number = itertools.count()
        self._lock = threading.Lock()
        self._answered: dict[str, tuple[float, str | None]] = {}
        topic = made.topics.name("predictions")
        self.ear = Ear(made.kafka.bootstrap, topic, self._take)

    def _take(self, heard: Heard) -> None:
        found = json.loads(heard.value)["label"]
        with self._lock:
            self._answered[heard.key.decode()] = heard.at, found

    def known(self) -> None:
        """Teach the first classes, and wait until they are answered."""
        for _ in range(KNOWN_CLASSES):
            name = self._names.pop(0)
            self._teach(name, self._asked(self._by_class[name][:EACH]))
        self._until_changed(name, time.perf_counter())

    def others(self, count: int) -> Iterator[tuple[str, str]]:
        """Answered events of the known classes, with their classes, to be labelled beside the trials."""
        known = sorted(set(self._by_class) - set(self._names))
        chosen = [(name, report) for name in known for report in self._by_class[name][EACH:]][:count]
        ids = self._asked([report for _, report in chosen])
        return iter(list(zip(ids, (name for name, _ in chosen), strict=True)))

    def one(self, chance: np.random.Generator) -> float | None:
        """One trial: seconds from the first label of a class to the first answer by it; None where none came."""
        name = self._names.pop(0)
        ids = self._asked(self._by_class[name][:EACH])
        # The learner has joined the answers by then, and is at no special point of its half second.
        threading.Event().wait(1.0 + float(chance.uniform(0, 0.5)))
        begun = time.perf_counter()
        self._teach(name, ids)
        return self._until_changed(name, begun)

    def _asked(self, reports: Sequence[Report]) -> list[str]:
        renamed = [report.model_copy(update={"event_id": f"q-{next(self._number):06d}"}) for report in reports]
        self._made.publish(*renamed)
        ids = [report.event_id for report in renamed]
        wait_for(lambda: self._has(ids), PATIENCE, "answering")
        return ids

    def _has(self, ids: Sequence[str]) -> bool:
        with self._lock:
            return all(one in self._answered for one in ids)

    def _teach(self, name: str, ids: Sequence[str]) -> None:
        self._made.label(*(label(STREAM, one, name) for one in ids))

    def _until_changed(self, name: str, begun: float) -> float | None:
        """Ask a question of the class until it is answered by its name."""
        probe = self._by_class[name][0]
        asked: list[str] = []
        pause = threading.Event()
        while time.perf_counter() < begun + PATIENCE:
            again = probe.model_copy(update={"event_id": f"p-{next(self._number):06d}"})
            self._made.publish(again)
            asked.append(again.event_id)
            pause.wait(PROBE_SECONDS)
            with self._lock:
                right = [self._answered[one][0] for one in asked if self._answered.get(one, (0, None))[1] == name]
            if right:
                return min(right) - begun
        return None


def labels(broker: KafkaBroker, chosen: argparse.Namespace, console: Console) -> list[Row]:
    """Trials with nothing else to learn, and with other labels coming in."""
    reports, truth = questions(chosen.questions)
    by_class: dict[str, list[Report]] = defaultdict(list)
    for report, name in zip(reports, truth, strict=True):
        by_class[name].append(report)
    whole = {name: found for name, found in by_class.items() if len(found) >= EACH}
    if len(whole) < KNOWN_CLASSES + 2 * chosen.trials:
        raise BenchmarkFailed(f"{len(whole)} classes are not enough for {chosen.trials} trials twice")
    quiet: dict[str, Any] = {"every_labels": None, "drift": False, "forgetting": False, "gain": None}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="trimtab-latency-") as directory, ExitStack() as stack:
        streams = {STREAM: {"kind": "text", "triggers": quiet}}
        made = Deployment(broker, f"b{uuid.uuid4().hex[:8]}-", Path(directory), streams)
        try:
            running = [made.start("learner"), made.start("worker")]
            wait_for(
                lambda: made.ready(made.learner_port) and made.ready(made.worker_port),
                300,
                "starting a worker and a learner",
                lambda: _alive(running, made),
            )
            trials = Trials(made, whole)
            stack.enter_context(trials.ear)
            trials.known()
            others = trials.others(int(OTHER_LABELS * chosen.trials * 4) + 1)
            chance = np.random.default_rng(0)
            for mode in ("quiet", "busy"):
                over = threading.Event()
                beside = threading.Thread(target=_label_others, args=(made, others, over), daemon=True)
                if mode == "busy":
                    beside.start()
                found = [trials.one(chance) for _ in range(chosen.trials)]
                over.set()
                if mode == "busy":
                    beside.join(10)
                rows += _trials(mode, found, console)
        finally:
            made.end()
    return rows


def _alive(running: Sequence[subprocess.Popen[bytes]], made: Deployment) -> None:
    if any(process.poll() is not None for process in running):
        logs = [file.read_text(errors="replace")[-2000:] for file in sorted(made.directory.glob("*.log"))]
        raise BenchmarkFailed("a process ended:\n" + "\n".join(logs))


def _label_others(made: Deployment, others: Iterator[tuple[str, str]], over: threading.Event) -> None:
    while not over.wait(1 / OTHER_LABELS):
        one = next(others, None)
        if one is None:
            return
        made.label(label(STREAM, *one))


def _trials(mode: str, found: Sequence[float | None], console: Console) -> list[Row]:
    took = [PATIENCE if one is None else one for one in found]
    p50, p95 = (float(np.quantile(took, share)) for share in (0.5, 0.95))
    console.print(f"label to changed answer, {mode}: p50 {p50:.2f} s, p95 {p95:.2f} s", highlight=False)
    return [
        _row("label", mode, "changed_p50", p50, "s"),
        _row("label", mode, "changed_p95", p95, "s"),
        _row("label", mode, "changed_longest", max(took), "s"),
        _row("label", mode, "trials", len(took), "trials"),
        _row("label", mode, "never_changed", found.count(None), "trials"),
    ]


def _row(name: str, mode: str | None, metric: str, value: float, unit: str) -> Row:
    return Row(name=name, mode=mode, metric=metric, value=value, unit=unit)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.latency"
    parser.add_argument("--seconds", type=float, metavar="S", help="of events in each mode (default 60, quick 5)")
    parser.add_argument("--trials", type=int, metavar="N", help="labels in each mode (default 50, quick 3)")
    parser.add_argument(
        "--batch",
        type=int,
        default=BatchSettings().batch_events,
        metavar="N",
        help=f"most events the worker reads at a time (default {BatchSettings().batch_events})",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads of the network (default: torch's)")
    parser.add_argument(
        "--only", nargs="+", choices=("event", "label"), default=["event", "label"], help="(default: both)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="guarantees (default: both)")
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="a Kafka that runs already, instead of one of our own")
    chosen = parser.parse_args(arguments)
    chosen.seconds = chosen.seconds or (5.0 if chosen.quick else 60.0)
    chosen.trials = chosen.trials or (3 if chosen.quick else 50)
    chosen.device = "cpu"
    chosen.events = chosen.batch * 2 if chosen.quick else TOP_EVENTS
    chosen.questions = 2_000 if chosen.quick else 8_000
    if min(chosen.seconds, chosen.trials, chosen.batch) <= 0:
        parser.error("--seconds, --trials and --batch are above 0")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
