"""Events a second of the whole worker with MiniLM on this machine, beside the bare forward pass.

The worker reads short questions (CLINC150) from a real Kafka, tokenises, embeds, classifies among 150 classes
and writes full predictions; the bare pass tokenises and embeds the same texts at its best batch size. They run
in turn, each in a process of its own. The worker runs with each of its `precision`s, and what these cost in right
answers is shown beside. See benchmarks/README.md for what is fair in that and what is not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, get_args

from rich.console import Console

from benchmarks.forward import STREAM, base_encoder, questions, right_of
from benchmarks.kafka import REPOSITORY, BenchmarkFailed, Contestant, Kafka, Passage, running_kafka
from benchmarks.report import Contest, Result, Row, machine, options, publish, versions
from learner.encoders import load_encoder
from learner.heads import DEFAULT_WIDTH, HeadSums, quantise, solve
from learner.registry import Pointer, Registry
from learner.spec import Precision
from stream.batches import BatchSettings
from stream.errors import TrimtabError
from stream.events import Report, encode, utc_now

EVENTS, QUICK_EVENTS = 6_144, 1_024
TAUGHT = 600
"""Questions that the head is solved from; its cost does not depend on them."""
LEARNED, ASKED = 3_000, 3_000
"""Questions for the accuracy of each precision."""
BATCHES = (16, 32, 64, 128, 256)
PACKAGES = ("torch", "transformers", "tokenizers", "confluent-kafka", "faust-streaming", "pydantic", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    chosen = _arguments(arguments)
    out, err = Console(), Console(stderr=True)
    before = machine()
    workers = {_name(precision): precision for precision in chosen.precision}
    rates: dict[str, list[float]] = {name: [] for name in (*workers, "bare")}
    cpu: dict[str, list[float]] = {name: [] for name in rates}
    right: dict[str, float] = {}
    try:
        with ExitStack() as stack:
            registry = stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-registry-"))
            kafka = stack.enter_context(running_kafka(chosen.bootstrap))
            reports, labels = questions(max(chosen.events, TAUGHT))
            pointer = teach(registry, reports[:TAUGHT], labels[:TAUGHT], chosen.device)
            events = [(report.event_id.encode(), encode(report)) for report in reports[: chosen.events]]
            right = accuracies(registry, pointer, chosen)
            best = best_setting(chosen, err)
            with kafka.topic("events") as source, kafka.topic("versions", 1) as announced:
                kafka.fill(source, events)
                kafka.fill(announced, [(pointer.key, pointer.encode())])
                for round_ in range(chosen.runs):
                    for name in rates if round_ % 2 == 0 else reversed(rates):
                        if name == "bare":
                            once = bare(chosen, chosen.events, [best])[0]
                            rates[name].append(once["rate"])
                            cpu[name].append(once["cpu"])
                        else:
                            passage = work(kafka, source, announced, registry, chosen, workers[name])
                            rates[name].append(passage.rate)
                            cpu[name].append(passage.cpu_per_event)
                        err.print(
                            f"run {round_ + 1} of {chosen.runs}: {name:<15} {rates[name][-1]:>7,.1f} events/s, "
                            f"{cpu[name][-1]:,.0f} µs of processor time an event",
                            highlight=False,
                            soft_wrap=True,
                        )
    except (BenchmarkFailed, TrimtabError) as error:
        err.print(f"benchmarks.worker: {error}", style="red", markup=False)
        return 1
    rows = Contest(None, rates, cpu).rows([(name, "bare") for name in workers])
    rows += [Row(name=_name(name), metric="accuracy", value=value, unit="%") for name, value in right.items()]
    rows.append(Row(name="bare", metric="best_batch", value=best[0], unit="texts"))
    publish(Result(benchmark="worker", machine=before, versions=versions(PACKAGES), rows=rows), chosen.json, out)
    return 0


def teach(url: str, reports: Sequence[Report], labels: Sequence[str], device: str) -> Pointer:
    """Put the base encoder and a head into a registry; returns what is to be announced."""
    encoder = base_encoder(device)
    registry = Registry(url)
    embeddings = encoder.embed([report.text for report in reports])
    sums = HeadSums(encoder.spec.dimension, encoder.spec.bound, DEFAULT_WIDTH)
    sums.add(quantise(embeddings, encoder.spec.bound), labels)
    head = solve(sums)
    assert head is not None
    return Pointer(
        kind="champion",
        stream=STREAM,
        version="v1",
        encoder=registry.put_encoder(encoder.spec, encoder.files()),
        head=registry.put_head(head.tensors()),
        epoch=1,
        sequence=1,
        announced_at=utc_now(),
    )


def _name(precision: str) -> str:
    return "worker" if precision == "float32" else f"worker_{precision}"


def accuracies(url: str, pointer: Pointer, chosen: argparse.Namespace) -> dict[str, float]:
    """What each precision costs: a share of right answers, the head being taught in float32 as by the learner."""
    spec, files = Registry(url).encoder(pointer.encoder, "v1")
    wanted = dict.fromkeys(("float32", *chosen.precision))
    encoders = {name: load_encoder(spec, files, chosen.device, name) for name in wanted}
    return right_of(encoders, *((TAUGHT, 300) if chosen.quick else (LEARNED, ASKED)))


def best_setting(chosen: argparse.Namespace, console: Console) -> tuple[int, bool]:
    """The batch size, in order of arrival or of length, at which the bare pass is fastest."""
    settings = [(batch, by_length) for batch in BATCHES for by_length in (True, False)]
    if chosen.quick:
        settings = [(batch, True) for batch in BATCHES[1:-1]]
    found = max(bare(chosen, min(chosen.events, chosen.batch), settings), key=lambda one: float(one["rate"]))
    order = "by length" if found["by_length"] else "as they come"
    console.print(f"bare is fastest with {found['batch']} texts at a time, {order}", highlight=False, soft_wrap=True)
    return int(found["batch"]), bool(found["by_length"])


def bare(chosen: argparse.Namespace, texts: int, settings: Sequence[tuple[int, bool]]) -> list[dict[str, Any]]:
    """The bare forward pass, in a process of its own, once with every setting."""
    config = {
        "texts": texts,
        "window": chosen.batch,
        "settings": settings,
        "device": chosen.device,
        "threads": chosen.threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.forward", "bare", json.dumps(config)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BenchmarkFailed(f"bare ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def work(
    kafka: Kafka, source: str, announced: str, registry: str, chosen: argparse.Namespace, precision: str
) -> Passage:
    """The worker once through the events."""
    with ExitStack() as topics:
        predictions = topics.enter_context(kafka.topic("predictions"))
        group = f"benchmark-{uuid.uuid4().hex[:8]}"
        config = {
            "bootstrap": kafka.bootstrap,
            "group": group,
            "source": source,
            "predictions": predictions,
            "dead_letters": topics.enter_context(kafka.topic("dead-letters", 1)),
            "versions": announced,
            "exactly_once": False,
            "batch": chosen.batch,
            "registry": registry,
            "device": chosen.device,
            "precision": precision,
            "threads": chosen.threads,
        }
        with Contestant("worker", "benchmarks.forward", config) as contestant:
            passage = kafka.watch(group, source, chosen.events, contestant, look=0.1)
        count = kafka.count(predictions, chosen.events)
        if count != chosen.events:
            raise BenchmarkFailed(f"the worker wrote {count} predictions for {chosen.events} events")
        return passage


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.worker"
    usual = BatchSettings().batch_events
    parser.add_argument(
        "--events", type=int, metavar="N", help=f"events a run (default {EVENTS:,}, quick {QUICK_EVENTS:,})"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=usual,
        metavar="N",
        help=f"most events the worker reads at a time (default {usual})",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads of the network (default: torch's)")
    parser.add_argument(
        "--precision", nargs="+", choices=get_args(Precision), default=list(get_args(Precision)), help="(default: all)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="a Kafka that runs already, instead of one of our own")
    chosen = parser.parse_args(arguments)
    chosen.events = chosen.events or (QUICK_EVENTS if chosen.quick else EVENTS)
    if min(chosen.events, chosen.batch, chosen.runs) < 1:
        parser.error("--events, --batch and --runs are at least 1")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
