"""Events a second through the worker with a model that costs nothing, beside a bare loop and Quix Streams.

All three read the same events from a real Kafka, decode and encode alike, keep the same guarantee and commit
after as many events; they run in turn, each in a process of its own. See benchmarks/README.md for what is
fair in that and what is not.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import uuid
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks.kafka import REPOSITORY, BenchmarkFailed, Contestant, Kafka, Passage, running_kafka
from benchmarks.report import Contest, Result, Row, machine, options, publish
from stream.events import Report, encode, utc_now

CONTESTANTS = ("worker", "quix", "bare")
MODES = ("at_least_once", "exactly_once")
EVENTS, QUICK_EVENTS = 1_000_000, 50_000
BATCH_EVENTS = 2_000
AGAINST = (("worker", "quix"), ("worker", "bare"), ("quix", "bare"))
REQUIREMENTS = Path(__file__).with_name("transport-requirements.txt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    chosen = _arguments(arguments)
    out, err = Console(), Console(stderr=True)
    try:
        python = python_with_quix(err) if "quix" in chosen.contestants else sys.executable
        rows = []
        before = machine()
        with running_kafka(chosen.bootstrap) as kafka:
            for mode in chosen.modes:
                rows += contest(kafka, python, mode, chosen, err)
    except BenchmarkFailed as error:
        err.print(f"benchmarks.transport: {error}", style="red", markup=False)
        return 1
    found = json.loads(
        subprocess.run(
            [python, "-m", "benchmarks.contestants", "versions", "{}"], cwd=REPOSITORY, capture_output=True, check=True
        ).stdout
    )
    publish(Result(benchmark="transport", machine=before, versions=found, rows=rows), chosen.json, out)
    return 0


def contest(kafka: Kafka, python: str, mode: str, chosen: argparse.Namespace, console: Console) -> list[Row]:
    """Every contestant in turn, as many times as asked for, each beginning a round once; and its rows."""
    contestants: list[str] = chosen.contestants
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    # Whole batches, so that nobody ends by waiting for a last one to fill.
    total = -(-chosen.events // chosen.batch) * chosen.batch
    warm = -(-max(chosen.batch, total // 20) // chosen.batch) * chosen.batch
    with kafka.topic("warm") as warming, kafka.topic("events") as source:
        kafka.fill(warming, events(warm))
        kafka.fill(source, events(total))
        for name in contestants:
            run(kafka, python, name, mode, warming, warm, chosen.batch)
        for round_ in range(chosen.runs):
            for turn in range(len(contestants)):
                name = contestants[(round_ + turn) % len(contestants)]
                passage = run(kafka, python, name, mode, source, total, chosen.batch)
                rates[name].append(passage.rate)
                cpu[name].append(passage.cpu_per_event)
                console.print(
                    f"{mode}, run {round_ + 1} of {chosen.runs}: {name:<6} {passage.rate:>9,.0f} events/s, "
                    f"{passage.cpu_per_event:.1f} µs of processor time an event",
                    highlight=False,
                    soft_wrap=True,
                )
    return Contest(mode, rates, cpu).rows(AGAINST)


def run(kafka: Kafka, python: str, name: str, mode: str, source: str, total: int, batch: int) -> Passage:
    """One contestant once through the source, and a count of what it wrote.

    Raises:
        BenchmarkFailed: it ended, stood still, or did not write exactly one prediction an event.
    """
    with ExitStack() as topics:
        predictions = topics.enter_context(kafka.topic("predictions"))
        group = f"benchmark-{uuid.uuid4().hex[:8]}"
        config = {
            "bootstrap": kafka.bootstrap,
            "group": group,
            "source": source,
            "predictions": predictions,
            "dead_letters": topics.enter_context(kafka.topic("dead-letters", 1)),
            "versions": topics.enter_context(kafka.topic("versions", 1)),
            "exactly_once": mode == "exactly_once",
            "batch": batch,
        }
        with Contestant(name, "benchmarks.contestants", config, python) as contestant:
            passage = kafka.watch(group, source, total, contestant)
        count = kafka.count(predictions, total)
        if count != total:
            raise BenchmarkFailed(f"{name} wrote {count} predictions for {total} events ({mode})")
        return passage


def events(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Short reports, keyed by event id."""
    marker = "@@event-id@@"
    template = encode(
        Report(
            event_id=marker,
            stream="notes",
            source="benchmark",
            observed_at=utc_now(),
            text="please move 120 dollars from my savings account to checking",
        )
    )
    before, after = template.split(marker.encode())
    for number in range(count):
        key = b"e-%09d" % number
        yield key, before + key + after


def python_with_quix(console: Console) -> str:
    """An interpreter that has Quix Streams, by which then all contestants run.

    This one, where Quix Streams is installed; else that of an environment under `.cache`, made the first time.
    Quix Streams wants older releases of confluent-kafka and pydantic than trimtab is pinned to, so that the two
    share an environment only with those.

    Raises:
        BenchmarkFailed: the environment cannot be made.
    """
    if importlib.util.find_spec("quixstreams") is not None:
        return sys.executable
    name = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = REPOSITORY / ".cache" / "transport" / name
    python = folder / "bin" / "python"
    if python.is_file():
        return str(python)
    console.print("making an environment with Quix Streams, once; this takes about a minute", highlight=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
    try:
        venv.create(building, with_pip=True)
        pip = [str(building / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS)]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise BenchmarkFailed(
                f"Quix Streams cannot be installed; leave it out with --contestants worker bare\n{done.stderr[-2000:]}"
            )
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return str(python)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.transport"
    parser.add_argument(
        "--events", type=int, metavar="N", help=f"events a run (default {EVENTS:,}, quick {QUICK_EVENTS:,})"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=BATCH_EVENTS,
        metavar="N",
        help=f"events a commit, for all (default {BATCH_EVENTS:,})",
    )
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="a Kafka that runs already, instead of one of our own")
    chosen = parser.parse_args(arguments)
    chosen.events = chosen.events or (QUICK_EVENTS if chosen.quick else EVENTS)
    if min(chosen.events, chosen.batch, chosen.runs) < 1:
        parser.error("--events, --batch and --runs are at least 1")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
