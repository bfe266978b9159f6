"""The demo: a broker, a learner, a worker and a frozen twin as real processes, on real data.

The twin is a second worker that serves, for good, the revision that was in service after the first wave of
classes. It reads the same events and answers on a topic of its own, so the report can say what learning
bought. Whatever is shown is computed from what was consumed from the prediction topics.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import webbrowser
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from confluent_kafka import Producer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from deploy import report as reporting
from deploy.broker import EmbeddedBroker
from deploy.console.front import Front, desktop
from deploy.demo_data import DemoStream, intents, interleave, rotation, storm
from learner.registry import Registry
from stream.batches import TopicTail
from stream.errors import Misconfigured, RetryLater
from stream.events import Event, Label, LabelRequest, Prediction, Record, Telemetry, encode, utc_now
from stream.kafka import KafkaSettings, TopicKind, Topics, create_topics
from stream.service import free_port

PREFIX = "demo-"
TWIN = "frozen"
PUBLISH_SECONDS = 105.0
"""How long the publishing is spread over; start-up, the twin's catching up and the report come on top."""
MOST_UNANSWERED = 200
LAST_PART, SLOWER = 0.75, 5.0
"""From this part on, publishing is slower by so much while a fine-tune runs, so that its version is seen at work."""
SLOW_SECONDS = 155.0
"""No fine-tune is waited for after this long, for the demo's own time is bounded."""
START_SECONDS = 120
DRAIN_SECONDS = 60
RECENT = 300


def demo_streams(seed: int) -> list[DemoStream]:
    """The streams, as much of each as two cores answer twice in the time there is."""
    start = datetime(2024, 1, 1, tzinfo=UTC)
    return [
        intents(seed=seed, start=start, classes_per_wave=(15, 10, 10), events_per_wave=420),
        storm(seed=seed, events=2_400),
        rotation(seed=seed, events=2_400),
    ]


def settings_of(
    streams: Sequence[DemoStream], directory: Path, bootstrap: str, ports: tuple[int, int]
) -> dict[str, Any]:
    """The demo's `trimtab.yaml`: what a user would write, with state in the demo's own folder."""
    blocks: dict[str, Any] = {}
    for stream in streams:
        if stream.kind == "text":
            blocks[stream.name] = {
                "kind": "text",
                "triggers": {"every_labels": 300},
                "finetune": {"strategy": "ewc_replay", "frozen_layers": 4, "epochs": 2, "max_seconds": 40, "nice": 2},
                "encoder": {"max_tokens": 64},
            }
        else:
            blocks[stream.name] = {
                "kind": "telemetry",
                "encoder": {"channels": list(stream.channels), "window": stream.steps, "dimension": 192},
                "labels": list(stream.levels),
                "closed": True,
                "prior": "empirical",
                "triggers": {"every_labels": None},
            }
    return {
        "kafka": {"bootstrap_servers": bootstrap},
        "topics": {"prefix": PREFIX, "partitions": 1},
        "registry": {"url": str(directory / "registry"), "cache_dir": str(directory / "cache")},
        "worker": {"http": {"port": ports[0]}, "threads": 1, "session_seconds": 4, "batch_events": 64},
        "learner": {
            "store": f"sqlite:///{directory}/learner.db",
            "jobs": str(directory / "jobs"),
            "http": {"port": ports[1]},
            "threads": 1,
            "batches": {"session_seconds": 4, "batch_seconds": 0.2},
            "console": {"workers": [f"http://127.0.0.1:{ports[0]}"], "twin": f"{TWIN}-predictions"},
        },
        "log": {"format": "json"},
        "streams": blocks,
    }


@dataclass
class Board:
    """What is shown while the demo runs, per stream, from consumed predictions alone."""

    stream: DemoStream
    events: int = 0
    labels: int = 0
    answers: dict[str, Prediction] = field(default_factory=dict)
    frozen: dict[str, Prediction] = field(default_factory=dict)
    arrived: list[str] = field(default_factory=list)
    no_change: dict[str, str | None] = field(default_factory=dict)
    majority: dict[str, str | None] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    swaps: int = 0
    last_swap: str = "–"
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=RECENT))

    def published(self, message: Event | Label) -> None:
        """Note what was known when an event went out, or that a label did."""
        if isinstance(message, Label):
            self.labels += 1
            if message.label is not None:
                self.arrived.append(message.label)
                self.counts[message.label] += 1
            return
        self.events += 1
        self.no_change[message.event_id] = self.arrived[-1] if self.arrived else None
        self.majority[message.event_id] = self.counts.most_common(1)[0][0] if self.counts else None

    def answered(self, prediction: Prediction) -> None:
        """Take a prediction of the worker in service."""
        if prediction.event_id not in self.answers:
            self.recent.append(prediction.event_id)
        self.answers[prediction.event_id] = prediction

    def shares(self) -> tuple[str, ...]:
        """Share right among the latest answers: served, frozen, no-change, majority."""
        ids = [i for i in self.recent if i in self.stream.truth]
        truth = self.stream.truth

        def share(given: Mapping[str, str | None]) -> str:
            both = [i for i in ids if i in given]
            return f"{sum(given[i] == truth[i] for i in both) / len(both):.3f}" if len(both) >= 20 else "–"

        served = {i: self.answers[i].label for i in ids}
        twin = {i: self.frozen[i].label for i in ids if i in self.frozen}
        return share(served), share(twin), share(self.no_change), share(self.majority)


class Demo:
    """One run.

    Args:
        folder: where the report goes; state and logs lie in `state` under it, and are begun anew.
        seed: of the data.
        console: where to draw.
    """

    def __init__(self, folder: Path, seed: int, console: Console) -> None:
        self.folder, self.console = folder.resolve(), console
        self.directory = self.folder / "state"
        self.streams = demo_streams(seed)
        self.boards = {stream.name: Board(stream) for stream in self.streams}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = (free_port(), free_port())
        self.topics = Topics(prefix=PREFIX, partitions=1)
        self.predictions: list[Prediction] = []
        self.twin_predictions: list[Prediction] = []
        self.published: list[Event | Label] = []
        self.labels: list[reporting.Arrived] = []
        self.requests: list[LabelRequest] = []
        self.dead_letters = 0
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._tuning = False
        self._failures: list[BaseException] = []

    def run(self, keep: bool) -> int:
        """Run it all; returns the exit code."""
        began = time.monotonic()
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            self._front = stack.enter_context(Front(self.ports[1]))
            self.console.print(f"The console is at {self._front.url}")
            if desktop():
                webbrowser.open(self._front.url)
            self._front.says = "The broker is starting."
            broker = stack.enter_context(EmbeddedBroker(log=self.directory / "broker.log"))
            stack.callback(self._end)
            self._start(broker.bootstrap)
            with self._threads(broker.bootstrap), Live(console=self.console, refresh_per_second=4) as live:
                publisher = threading.Thread(target=self._guarded, args=(self._publish, broker.bootstrap), daemon=True)
                publisher.start()
                deadline = time.monotonic() + PUBLISH_SECONDS * 3
                while publisher.is_alive() and time.monotonic() < deadline and not self._failures:
                    live.update(self._view(began))
                    self._check_processes()
                    slow = time.monotonic() - began > SLOW_SECONDS
                    self._tuning = not slow and any(self._status(n)["fine_tune"]["running"] for n in self.boards)
                    publisher.join(0.5)
                drained = time.monotonic() + DRAIN_SECONDS
                while not self._drained() and time.monotonic() < drained and not self._failures:
                    live.update(self._view(began, "waiting for the last answers"))
                    self._check_processes()
                    threading.Event().wait(0.25)
                live.update(self._view(began, "done"))
            if self._failures:
                raise self._failures[0]
            code = self._report(began)
            if keep:
                self._stay(broker.bootstrap)
        return code

    # Processes

    def _start(self, bootstrap: str) -> None:
        settings = settings_of(self.streams, self.directory, bootstrap, self.ports)
        file = self.folder / "trimtab.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        kafka = KafkaSettings(bootstrap_servers=bootstrap)
        with self.console.status("creating topics"):
            create_topics(kafka, self.topics, [f"{TWIN}-predictions"])
        self._front.says = "The learner and a worker are starting: torch and the text model are loaded once each."
        with self.console.status("starting the learner and a worker: torch and the text model are loaded once each"):
            self._spawn("learner", "learner")
            self._spawn("worker", "worker")
            self._await_ready("learner", self.ports[1])
            self._await_ready("worker", self.ports[0])

    def _spawn(self, name: str, *command: str) -> None:
        log = (self.directory / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *command, "--config", str(self.folder / "trimtab.yaml")],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )

    def _await_ready(self, name: str, port: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._check_processes()
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5),
            ):
                return
            threading.Event().wait(0.2)
        raise RetryLater(f"the {name} was not ready within {START_SECONDS} s; see {self.directory / name}.log")

    def _check_processes(self) -> None:
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                tail = (self.directory / f"{name}.log").read_text(errors="replace")[-1500:]
                raise Misconfigured(f"the {name} ended with code {process.returncode}; its last words:\n{tail}")

    def _end(self) -> None:
        self._ending.set()
        for process in list(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        for process in list(self.processes.values()):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _stay(self, bootstrap: str) -> None:
        self.console.print(
            Panel(
                f"console   http://127.0.0.1:{self.ports[1]}/console/\n"
                f"broker    {bootstrap}\nworker    http://127.0.0.1:{self.ports[0]}/metrics\n"
                f"learner   http://127.0.0.1:{self.ports[1]}/streams\nsettings  {self.folder / 'trimtab.yaml'}\n\n"
                f"try       trimtab predictions --follow --config {self.folder / 'trimtab.yaml'}\n"
                "Ctrl-C ends everything.",
                title="still running",
            )
        )
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                self._check_processes()
                threading.Event().wait(1)

    # Messages

    @contextlib.contextmanager
    def _threads(self, bootstrap: str) -> Iterator[None]:
        names: tuple[TopicKind, ...] = ("predictions", "labels", "label_requests", "model_versions", "dead_letters")
        readers = [
            threading.Thread(
                target=self._guarded, args=(self._read, bootstrap, self.topics.name(name), name), daemon=True
            )
            for name in names
        ]
        twin = f"{PREFIX}{TWIN}-predictions"
        readers.append(threading.Thread(target=self._guarded, args=(self._read, bootstrap, twin, TWIN), daemon=True))
        for reader in readers:
            reader.start()
        try:
            yield
        finally:
            self._ending.set()
            for reader in readers:
                reader.join(5)

    def _guarded(self, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._failures.append(error)

    def _publish(self, bootstrap: str) -> None:
        producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 5})
        messages = list(interleave(self.streams))
        pause = PUBLISH_SECONDS / len(messages)
        due, frozen = time.monotonic(), False
        held: deque[Label] = deque()
        for message in messages:
            due += pause * (SLOWER if self._tuning and len(self.published) > LAST_PART * len(messages) else 1)
            while not self._ending.is_set():
                self._release(held, producer)
                now = time.monotonic()
                if now >= due and self._unanswered() <= MOST_UNANSWERED:
                    break
                threading.Event().wait(min(0.02, max(0.001, due - now)))
            due = max(due, time.monotonic() - 1.0)  # a stop is not made up for by a rush
            if not frozen and self._first_wave_over():
                frozen = True
                self._freeze()
            if isinstance(message, Label):
                held.append(message)
            else:
                self._send(producer, message)
        while held and not self._ending.is_set():
            self._release(held, producer)
            threading.Event().wait(0.02)
        producer.flush(30)

    def _release(self, held: deque[Label], producer: Producer) -> None:
        """Send the labels whose events have been answered: a label comes after its answer, as it would in life."""
        for _ in range(len(held)):
            label = held.popleft()
            if label.event_id in self.boards[label.stream].answers:
                self._send(producer, label)
            else:
                held.append(label)

    def _send(self, producer: Producer, message: Event | Label) -> None:
        topic: TopicKind = "telemetry" if isinstance(message, Telemetry) else "reports"
        if isinstance(message, Label):
            topic = "labels"
        producer.produce(self.topics.name(topic), value=encode(message), key=message.event_id.encode())
        producer.poll(0)
        with self._lock:
            self.published.append(message)
            self.boards[message.stream].published(message)

    def _unanswered(self) -> int:
        return sum(board.events - len(board.answers) for board in self.boards.values())

    def _first_wave_over(self) -> bool:
        leading = next(board for board in self.boards.values() if len(board.stream.waves) > 1)
        return leading.events >= leading.stream.waves[1]

    def _freeze(self) -> None:
        """Start the twin on what is in service now."""
        pins = {name: str(self._status(name)["serving"]) for name in self.boards}
        arguments = [part for name, pin in pins.items() for part in ("--pin", f"{name}={pin}")]
        self._spawn(
            TWIN,
            "worker",
            *arguments,
            "--group",
            f"{PREFIX}{TWIN}",
            "--predictions",
            f"{PREFIX}{TWIN}-predictions",
            "--port",
            "0",
        )

    def _read(self, bootstrap: str, topic: str, kind: str) -> None:
        tail = TopicTail({"bootstrap.servers": bootstrap}, topic)
        try:
            tail.catch_up(lambda record: self._take(kind, record))
            while not self._ending.is_set():
                for record in tail.poll(0.1):
                    self._take(kind, record)
        finally:
            tail.close()

    def _take(self, kind: str, record: Record) -> None:
        with self._lock:
            self._note(kind, record)

    def _note(self, kind: str, record: Record) -> None:
        value = record.value or b""
        if kind == "dead_letters":
            self.dead_letters += 1
        elif kind == "labels":
            at = datetime.fromtimestamp(record.timestamp_ms / 1000, UTC)
            self.labels.append(reporting.Arrived(Label.model_validate_json(value), at))
        elif kind == "label_requests":
            self.requests.append(LabelRequest.model_validate_json(value))
        elif kind == "model_versions":
            pointer = json.loads(value)
            if pointer["kind"] == "champion":
                self._swapped(pointer)
        else:
            prediction = Prediction.model_validate_json(value)
            board = self.boards[prediction.stream]
            if kind == TWIN:
                self.twin_predictions.append(prediction)
                board.frozen[prediction.event_id] = prediction
            else:
                self.predictions.append(prediction)
                board.answered(prediction)

    def _swapped(self, pointer: Mapping[str, Any]) -> None:
        board = self.boards[pointer["stream"]]
        if pointer["version"] == "v1":
            return
        board.swaps += 1
        board.last_swap = f"{pointer['version']} @{board.events}"

    def _drained(self) -> bool:
        answered = all(len(board.answers) >= board.events for board in self.boards.values())
        twin = all(len(board.frozen) >= board.events for board in self.boards.values()) or TWIN not in self.processes
        return answered and twin

    # What is seen

    def _status(self, stream: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[1]}/streams/{stream}", timeout=60) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found

    def _view(self, began: float, state: str = "") -> Group:
        with self._lock:
            return self._drawn(began, state)

    def _drawn(self, began: float, state: str) -> Group:
        seconds = time.monotonic() - began
        table = Table(title="trimtab: answering, learning, never stopping", title_justify="left")
        for column in ("stream", "events", "labels", "served", "frozen", "no change", "majority"):
            table.add_column(column, justify="left" if column == "stream" else "right", no_wrap=True)
        table.add_column("version", no_wrap=True)
        table.add_column("swapped", no_wrap=True)
        for name, board in self.boards.items():
            served, frozen, no_change, majority = board.shares()
            version = self.boards[name].answers[board.recent[-1]].model_version if board.recent else "–"
            table.add_row(
                name,
                f"{board.events}/{board.stream.events}",
                str(board.labels),
                f"[bold]{served}[/bold]",
                frozen,
                no_change,
                majority,
                version,
                board.last_swap,
            )
        rate = len(self.predictions) / max(1.0, seconds)
        line = (
            f"{seconds:5.0f} s   {rate:6.0f} predictions/s   {self._unanswered()} waiting   "
            f"{self.dead_letters} dead letters   share right of the last {RECENT} answers   {state}"
        )
        return Group(table, line)

    def _report(self, began: float) -> int:
        """Write the report and sum it up; 1 where something was lost or no fine-tune was promoted."""
        registry = Registry(str(self.directory / "registry"))
        runs = [
            reporting.StreamRun(
                name=stream.name,
                question=stream.question,
                source=stream.source,
                events=[m.event_id for m in self.published if m.stream == stream.name and not isinstance(m, Label)],
                predictions=[p for p in self.predictions if p.stream == stream.name],
                labels=[arrived for arrived in self.labels if arrived.label.stream == stream.name],
                frozen=[p for p in self.twin_predictions if p.stream == stream.name],
                waves=stream.waves,
                requests=[one for one in self.requests if one.stream == stream.name],
                verdicts=[
                    reporting.Examined.of(version.name, version.verdict)
                    for version in registry.versions(stream.name)
                    if version.verdict is not None
                ],
            )
            for stream in self.streams
        ]
        made = reporting.assemble(
            runs,
            seconds=time.monotonic() - began,
            dead_letters=self.dead_letters,
            broker="the embedded broker, in memory: no claim about delivery rests on it",
            generated_at=utc_now(),
        )
        file, page = reporting.write_report(made, self.folder)
        self.console.print(self._summary(made))
        self.console.print(f"The report with its plots is {page}, its numbers are {file}.")
        promoted = any(stream.swaps for stream in made.streams.values())
        if not promoted:
            self.console.print("No fine-tuned version answered before the end; its state folder has the learner's log.")
        return 0 if promoted and not made.lost else 1

    def _summary(self, made: reporting.DemoReport) -> Group:
        table = Table(title="What learning bought: share right over the whole run", title_justify="left")
        for column in ("stream", "scored", "served", "frozen", "no change", "majority", "forgetting", "versions"):
            table.add_column(column, justify="left" if column == "stream" else "right", no_wrap=True)

        def share(value: float | None) -> str:
            return "–" if value is None else f"{value:.3f}"

        for name, stream in made.streams.items():
            table.add_row(
                name,
                str(stream.scored),
                f"[bold]{share(stream.accuracy)}[/bold]",
                share(stream.accuracy_frozen),
                share(stream.accuracy_no_change),
                share(stream.accuracy_majority),
                share(stream.forgetting),
                str(stream.versions),
            )
        counts = (
            f"{made.lost} lost, {made.duplicated} duplicated, {made.dead_letters} dead letters, {made.seconds:.0f} s, "
            f"on {made.broker}"
        )
        return Group(table, *made.words, counts)


def run(
    *, keep: bool = False, report: Path = Path("demo-report"), seed: int = 0, console: Console | None = None
) -> int:
    """Run the demo; returns the exit code: 0 where nothing was lost and at least one fine-tune was promoted."""
    return Demo(report, seed, console or Console()).run(keep)
