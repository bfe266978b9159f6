"""A whole deployment for a test: a settings file, a worker, a learner, and the topics between them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from stream.events import Event, Label, Prediction, Record, encode, utc_now
from stream.kafka import KafkaSettings, Topics, create_topics
from tests.kafka import KafkaBroker, free_ports
from tests.waiting import until

REPOSITORY = Path(__file__).parents[1]


class Deployment:
    """Processes of one test on one broker; `stop` ends them all.

    Args:
        kafka: the broker.
        prefix: put before every topic.
        directory: where settings, state and logs lie.
        streams: the `streams:` block.
        overrides: other blocks.
        partitions: of every topic.
    """

    def __init__(
        self,
        kafka: KafkaBroker,
        prefix: str,
        directory: Path,
        streams: Mapping[str, Any],
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        partitions: int = 2,
    ) -> None:
        self.kafka, self.directory = kafka, directory
        self.topics = Topics(prefix=prefix, partitions=partitions)
        self.learner_port, self.worker_port, _ = free_ports()
        self.processes: list[subprocess.Popen[bytes]] = []
        blocks: dict[str, Any] = {
            "kafka": {"bootstrap_servers": kafka.bootstrap},
            "topics": {"prefix": prefix, "partitions": partitions},
            "registry": {"url": str(directory / "registry"), "cache_dir": str(directory / "cache")},
            "worker": {"http": {"port": self.worker_port}, "threads": 1, "session_seconds": 6},
            "learner": {
                "store": f"sqlite:///{directory}/learner.db",
                "lease_seconds": 3,
                "jobs": str(directory / "jobs"),
                "http": {"port": self.learner_port},
                "threads": 1,
                "batches": {"session_seconds": 6, "batch_seconds": 0.05},
            },
            "log": {"format": "json"},
            "streams": dict(streams),
        }
        for block, values in (overrides or {}).items():
            blocks[block] = _merge(blocks.get(block, {}), values)
        self.store_url: str = blocks["learner"]["store"]
        self.settings = directory / "trimtab.yaml"
        self.settings.write_text(yaml.safe_dump(blocks))
        create_topics(KafkaSettings(**blocks["kafka"]), self.topics)

    # Processes

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start `trimtab COMMAND` with the settings file."""
        log = (self.directory / f"{command[0]}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *command, "--config", str(self.settings)],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self.processes.append(process)
        return process

    def start_both(self) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        """A worker and a learner, both ready."""
        learner, worker = self.start("learner"), self.start("worker")
        until(lambda: self.ready(self.learner_port) and self.ready(self.worker_port))
        return worker, learner

    def ready(self, port: int) -> bool:
        """Whether the process on `port` says that it is ready."""
        return self.get(port, "/readyz")[0] == 200

    def stop(self) -> None:
        """End every process, and show what they logged."""
        self.end()
        for log in sorted(self.directory.glob("*.log")):
            sys.stdout.write(f"--- {log.name}\n{log.read_text()[-20_000:]}\n")

    def end(self) -> None:
        """End every process."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    # HTTP

    def get(self, port: int, path: str) -> tuple[int, Any]:
        """Status and JSON of a page; 0 where nothing answers."""
        return _ask(urllib.request.Request(f"http://127.0.0.1:{port}{path}"))

    def status(self, stream: str) -> dict[str, Any]:
        """What the learner says of a stream, once it answers."""
        found: dict[str, Any] = self._told(f"/streams/{stream}")
        return found

    def versions(self, stream: str) -> dict[str, dict[str, Any]]:
        """The stream's versions by name."""
        return {row["version"]: row for row in self._told(f"/streams/{stream}/versions")}

    def _told(self, path: str) -> Any:
        """A page of the learner; one that is busy, or starts again, is asked until it answers."""
        answers: list[Any] = []

        def answered() -> bool:
            code, body = self.get(self.learner_port, path)
            if code == 200:
                answers.append(body)
            return bool(answers)

        until(answered)
        return answers[0]

    def ask(self, stream: str, action: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """A control call by HTTP."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.learner_port}/streams/{stream}/{action}",
            data=json.dumps({"who": "test", **fields}).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        return _ask(request)

    # Topics

    def publish(self, *events: Event) -> None:
        """Put events onto their topic."""
        for kind in ("reports", "telemetry"):
            chosen = [e for e in events if (kind == "reports") == hasattr(e, "text")]
            if chosen:
                messages = [(e.event_id.encode(), encode(e), ()) for e in chosen]
                self.kafka.produce(self.topics.name(kind), messages)

    def label(self, *labels: Label) -> None:
        """Put labels onto their topic."""
        self.kafka.produce(self.topics.name("labels"), [(la.event_id.encode(), encode(la), ()) for la in labels])

    def predictions(self) -> list[Prediction]:
        """Every prediction so far."""
        return [Prediction.model_validate_json(r.value or b"") for r in self.records("predictions")]

    def answered(self) -> dict[str, Prediction]:
        """The last prediction of every event."""
        return {p.event_id: p for p in self.predictions()}

    def records(self, kind: Any) -> list[Record]:
        """Everything on a topic, read committed."""
        return self.kafka.consume_all(self.topics.name(kind), isolation="read_committed")


def label(stream: str, event_id: str, name: str | None, at: datetime | None = None, labeller: str = "ops") -> Label:
    """A label made now, or at `at`."""
    return Label(event_id=event_id, stream=stream, label=name, labeller=labeller, labelled_at=at or utc_now())


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _ask(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            body = answer.read()
            return answer.status, json.loads(body) if body[:1] in b"{[" else body.decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except OSError:
        return 0, {}
