"""What learning costs, and whether the cost stays flat as there is more to learn.

`finetune`: samples a second of a whole fine-tune, beside a bare PyTorch loop over the same network, batches and
precision. `head`: the instant head's time and bytes for a label and for an event, as classes grow. `store`: what
adding an example to the learner's database costs, and reading it for a fine-tune, as the store grows. `names`: what a
labeller costs who invents a class for every label.
See benchmarks/README.md for what is fair in that and what is not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import nn

from benchmarks.learning.live import STREAM as LIVE
from benchmarks.learning.live import Live
from benchmarks.report import Result, Row, machine, options, publish, versions
from learner.encoders import Encoder, Payload, build_telemetry_encoder
from learner.finetune import FineTuneSettings
from learner.heads import DEFAULT_WIDTH, HeadSums, quantise, solve
from monitoring.metrics import Metrics
from replay.policy import ReplaySettings
from replay.store import Content, LearnerStore
from stream.errors import TrimtabError
from stream.events import Label, Place, Prediction
from stream.join import join, touched

PACKAGES = ("torch", "transformers", "avalanche-lib", "numpy", "scipy", "sqlalchemy")
PARTS = ("finetune", "head", "store", "names")
CLASSES = (10, 100, 1_000)
DIMENSION, BOUND = 384, 1.0
LABELS_AT_A_TIME = 256
MILLION = 1_000_000
STORES = (1_000, 10_000, 100_000)
ADDED = 2_000
BATCH = 500
"""Labels in one transaction."""
NAMES, DAYS = 100_000, 20
"""Invented class names, and the days they come on: more days than a stream needs to reach its most classes."""
START = datetime(2024, 1, 1, tzinfo=UTC)

STREAM = "cost"

T = TypeVar("T")
Say = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    chosen = _arguments(arguments)
    out, err = Console(), Console(stderr=True)
    before = machine()
    torch.set_num_threads(chosen.threads)
    rows: list[Row] = []

    def say(line: str) -> None:
        err.print(line, highlight=False, soft_wrap=True, markup=False)

    try:
        if "finetune" in chosen.only:
            rows += finetune(chosen, say)
        if "head" in chosen.only:
            rows += head(chosen, say)
        if "store" in chosen.only:
            rows += store(chosen, say)
        if "names" in chosen.only:
            rows += names(say, NAMES // 50 if chosen.quick else NAMES)
    except TrimtabError as error:
        err.print(f"benchmarks.learning_cost: {error}", style="red", markup=False)
        return 1
    publish(Result(benchmark="learning_cost", machine=before, versions=versions(PACKAGES), rows=rows), chosen.json, out)
    return 0


# --- fine-tune beside a bare loop ----------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What both contestants train: where the encoder comes from, and labelled payloads."""

    kind: str
    encoder: Callable[[], Encoder]
    payloads: Sequence[Payload]
    labels: Sequence[str]


class Readings:
    """A clock that remembers what processor time each of its readings stood at."""

    def __init__(self) -> None:
        self._readings: list[tuple[float, float]] = []

    def __call__(self) -> float:
        self._readings.append((time.perf_counter(), time.process_time()))
        return self._readings[-1][0]

    def cpu(self, seconds: float) -> float:
        """Processor time of the stretch of so many seconds that the last reading ended."""
        end, used = self._readings[-1]
        _, before = min(self._readings, key=lambda reading: abs(end - reading[0] - seconds))
        return used - before


def finetune(chosen: argparse.Namespace, say: Say) -> list[Row]:
    """Both contestants in turn over the same examples, half of them new and half replayed."""
    # Avalanche takes ten seconds to import, which the other parts need not wait for.
    from learner.training import Row as Example
    from learner.training import TrainingState, hold_out, train

    rows: list[Row] = []
    settings = FineTuneSettings(epochs=1 if chosen.quick else 2, early_stopping_patience=0)
    for lesson in (text_lesson(chosen.examples), telemetry_lesson(4 * chosen.examples)):
        half = len(lesson.labels) // 2
        examples = [
            Example(f"{number:06d}", label, payload, "new" if number < half else "kept")
            for number, (payload, label) in enumerate(zip(lesson.payloads, lesson.labels, strict=True))
        ]
        chance = np.random.default_rng(settings.seed)
        new, _ = hold_out(examples[:half], chance)
        kept, _ = hold_out(examples[half:], chance)
        index = {name: number for number, name in enumerate(sorted(set(lesson.labels)))}
        batches = [
            [(row.payload, index[row.label]) for row in batch]
            for _ in range(settings.epochs)
            for batch in _batches(new, kept, settings.batch_size, chance)
        ]
        samples = sum(map(len, batches))
        rates: dict[str, list[float]] = {"finetune": [], "bare": []}
        cpu: dict[str, list[float]] = {"finetune": [], "bare": []}
        bf16 = False
        for round_ in range(chosen.runs):
            for name in ("finetune", "bare") if round_ % 2 == 0 else ("bare", "finetune"):
                encoder, readings = lesson.encoder(), Readings()
                if name == "finetune":
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        trained = train(
                            encoder, examples, TrainingState(), settings, torch.device("cpu"), clock=readings
                        )
                    bf16, seconds = trained.summary.mixed_precision, trained.summary.train_seconds
                else:
                    seconds = bare(encoder, batches, len(index), settings, bf16, readings)
                rates[name].append(samples / seconds)
                cpu[name].append(readings.cpu(seconds) / samples)
                say(f"{lesson.kind}, run {round_ + 1} of {chosen.runs}: {name:<8} {samples / seconds:>9,.1f} samples/s")
        middle = {name: statistics.median(found) for name, found in rates.items()}
        used = {name: statistics.median(found) for name, found in cpu.items()}
        for name, found in rates.items():
            rows.append(_row(name, lesson.kind, "samples_per_second", middle[name], "samples/s"))
            rows.append(_row(name, lesson.kind, "spread", (max(found) - min(found)) / middle[name], "of the median"))
        rows.append(_row("finetune", lesson.kind, "ratio_to_bare", middle["finetune"] / middle["bare"], "ratio"))
        rows.append(_row("finetune", lesson.kind, "cpu_ratio_to_bare", used["finetune"] / used["bare"], "ratio"))
    return rows


def bare(
    encoder: Encoder,
    batches: Sequence[Sequence[tuple[Payload, int]]],
    classes: int,
    settings: FineTuneSettings,
    bf16: bool,
    clock: Callable[[], float],
) -> float:
    """Seconds of the least that trains the same network by batches like these, in the same precision."""
    network, head = encoder.module.train(), nn.Linear(encoder.spec.dimension, classes)
    for name, weight in network.named_parameters() if encoder.spec.kind == "text" else ():
        before, _, layer = name.partition(".layer.")
        if "embeddings" in before or int(layer.partition(".")[0]) < settings.frozen_layers:
            weight.requires_grad_(False)
    trained = [weight for weight in (*network.parameters(), *head.parameters()) if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=settings.weight_decay)
    started = clock()
    for batch in batches:
        payloads, targets = zip(*batch, strict=True)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            embedding = network(encoder.collate(payloads))
        nn.functional.cross_entropy(head(embedding.float()), torch.tensor(targets)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return clock() - started


def text_lesson(count: int) -> Lesson:
    """Short questions (CLINC150) for MiniLM."""
    from benchmarks.forward import base_encoder, questions

    reports, labels = questions(count)
    return Lesson("text", lambda: base_encoder("cpu"), [report.text for report in reports[:count]], labels[:count])


def telemetry_lesson(count: int) -> Lesson:
    """Noise of eight channels and a hundred steps, in ten classes by its level."""
    chance = np.random.default_rng(0)
    channels = [f"channel_{number}" for number in range(8)]
    kinds = [number % 10 for number in range(count)]
    payloads = [chance.normal(kind, 3.0, (len(channels), 100)).astype(np.float32) for kind in kinds]
    return Lesson(
        "telemetry",
        lambda: build_telemetry_encoder(channels, seed=0, window=100),
        payloads,
        [f"level {kind}" for kind in kinds],
    )


def _batches(new: Sequence[T], kept: Sequence[T], size: int, chance: np.random.Generator) -> Iterator[list[T]]:
    """An epoch: what is new once in batches of `size`, each with as many that are replayed."""
    memory: Iterator[list[T]] = iter(())
    for batch in _shuffled(new, size, chance):
        replayed = next(memory, None)
        if replayed is None:
            memory = _shuffled(kept, size, chance)
            replayed = next(memory)
        yield batch + replayed


def _shuffled(rows: Sequence[T], size: int, chance: np.random.Generator) -> Iterator[list[T]]:
    order = chance.permutation(len(rows))
    for start in range(0, len(rows), size):
        yield [rows[position] for position in order[start : start + size]]


# --- the instant head ----------------------------------------------------------------------------------


def head(chosen: argparse.Namespace, say: Say) -> list[Row]:
    """Time and bytes for a label and for an event at each number of classes, and the error after a million."""
    rows: list[Row] = []
    for classes in CLASSES:
        chance = np.random.default_rng(classes)
        names = [f"class {number:04d}" for number in range(classes)]
        q = quantise(chance.uniform(-BOUND, BOUND, (LABELS_AT_A_TIME, DIMENSION)), BOUND)
        sums = HeadSums(DIMENSION, BOUND, chosen.width)
        for start in range(0, classes, LABELS_AT_A_TIME):
            part = names[start : start + LABELS_AT_A_TIME]
            for _ in range(5):
                sums.add(q[: len(part)], part)
        labels = [names[int(chosen_)] for chosen_ in chance.integers(0, classes, LABELS_AT_A_TIME)]
        per_label = _repeated(lambda: sums.add(q, labels), chosen.seconds) / LABELS_AT_A_TIME  # noqa: B023
        per_revision = _repeated(lambda: solve(sums), chosen.seconds)  # noqa: B023
        served = solve(sums)
        assert served is not None
        events = chance.uniform(-BOUND, BOUND, (LABELS_AT_A_TIME, DIMENSION)).astype(np.float32)
        per_event = _repeated(lambda: served.answer(events, 5), chosen.seconds) / LABELS_AT_A_TIME  # noqa: B023
        kept, sent = float(sums.nbytes), float(sum(part.nbytes for part in served.tensors().values()))
        mode = str(classes)
        rows += [
            _row("head", mode, "microseconds_per_label", per_label * 1e6, "microseconds"),
            _row("head", mode, "microseconds_per_event", per_event * 1e6, "microseconds"),
            _row("head", mode, "milliseconds_per_revision", per_revision * 1e3, "milliseconds"),
            _row("head", mode, "bytes_kept", kept, "bytes"),
            _row("head", mode, "bytes_kept_per_class", kept / classes, "bytes"),
            _row("head", mode, "bytes_served", sent, "bytes"),
            _row("head", mode, "bytes_served_per_class", sent / classes, "bytes"),
        ]
        say(f"head, {classes} classes: {per_label * 1e6:,.1f} µs a label, {per_event * 1e6:,.1f} µs an event")
    error = error_after_million(*((32, 64) if chosen.quick else (DIMENSION, chosen.width)))
    say(f"head, after a million additions and subtractions: {error:g} off")
    return [*_with_ratios(rows), _row("head", None, "error_after_million", error, "quantisation steps")]


def error_after_million(dimension: int, width: int) -> float:
    """The largest difference between a head that was taught and untaught a million times and one that was not.

    Examples go in in one order and grouping and come out in others, until a thousand are left; a second head learns
    these alone.
    """
    chance = np.random.default_rng(0)
    pool = quantise(chance.uniform(-BOUND, BOUND, (20_000, dimension)), BOUND)
    labels = np.array([f"class {number % 150}" for number in range(len(pool))])
    stay = 1_000
    taught = chance.integers(0, len(pool), (MILLION + stay) // 2)
    sums, left = HeadSums(dimension, BOUND, width), HeadSums(dimension, BOUND, width)
    for part in np.split(taught, range(1_000, len(taught), 1_000)):
        sums.add(pool[part], labels[part].tolist())
    chance.shuffle(taught)
    for part in np.split(taught[stay:], range(777, len(taught) - stay, 777)):
        sums.subtract(pool[part], labels[part].tolist())
    left.add(pool[taught[:stay]], labels[taught[:stay]].tolist())
    found, due = sums.tensors(), left.tensors()
    if any(found[name].shape != due[name].shape for name in due):
        return float("inf")
    return max(float(np.abs(found[name].astype(np.float64) - due[name].astype(np.float64)).max()) for name in due)


# --- the store -----------------------------------------------------------------------------------------


def store(chosen: argparse.Namespace, say: Say) -> list[Row]:
    """Time to add an example, and to read one for a fine-tune, at each size of the store."""
    rows: list[Row] = []
    for size in (*STORES, *((MILLION,) if chosen.full else ())):
        if chosen.quick and size > 10_000:
            break
        with tempfile.TemporaryDirectory(prefix="trimtab-cost-") as folder:
            url = f"sqlite:///{folder}/learner.db"
            mode = str(size)
            with closing(LearnerStore(url, {STREAM: ReplaySettings(size=2 * size)})) as whole:
                filling = Filling(whole)
                filling.add(size)
                added = [filling.add(BATCH) / BATCH for _ in range(ADDED // BATCH)]
                members, count = _timed(lambda: len(whole.members(STREAM)))
                sampled, _ = _timed(lambda: len(whole.experience(STREAM)))
                filling.train()
            with closing(LearnerStore(url)) as bounded:
                kept = ReplaySettings().size
                some, found = _timed(lambda: len(bounded.experience(STREAM)))
            rows += [
                _row("store", mode, "microseconds_per_add", statistics.median(added) * 1e6, "microseconds"),
                _row("store", mode, "microseconds_per_member", members / count * 1e6, "microseconds"),
                _row("store", mode, "microseconds_per_sample", sampled / count * 1e6, "microseconds"),
            ]
            if found == kept:
                rows.append(_row("store", mode, f"milliseconds_per_{kept}_samples", some * 1e3, "milliseconds"))
            say(f"store of {size:,}: " + ", ".join(f"{r.value:,.1f} {r.metric}" for r in rows if r.mode == mode))
    return _with_ratios(rows)


class Filling:
    """Labelled events that enter a store as the learner enters them, one transaction a batch."""

    def __init__(self, store: LearnerStore) -> None:
        self._store = store
        self._epoch = store.claim("benchmark", START)
        self._count = 0
        self._chance = np.random.default_rng(0)

    def add(self, count: int) -> float:
        """Add so many examples; the seconds that it took."""
        seconds = 0.0
        for start in range(0, count, BATCH):
            batch = [self._event() for _ in range(min(BATCH, count - start))]
            predictions, labels, contents = map(list, zip(*batch, strict=True))
            begun = time.perf_counter()
            joined = join(self._store.known(touched(predictions, labels)), predictions, labels)
            with self._store.transaction(self._epoch, START) as tx:
                tx.record(joined)
                tx.reconcile(joined.changes, dict(contents))
            seconds += time.perf_counter() - begun
        return seconds

    def train(self) -> None:
        """Say that a run has trained on all that is there."""
        with self._store.transaction(self._epoch, START) as tx:
            run = tx.add_run(STREAM, "benchmark", state="promoted", detail={})
            tx.mark_trained(STREAM, run, [example.event_id for example in self._store.experience(STREAM)])

    def _event(self) -> tuple[tuple[Prediction, Place], tuple[Label, Place], tuple[tuple[str, str], Content]]:
        number = self._count
        self._count += 1
        # Ids of real events have no order, so neither have these.
        event_id = blake2b(str(number).encode(), digest_size=12).hexdigest()
        label = f"class {number % 100}"
        at = START + timedelta(milliseconds=number)
        embedding = self._chance.integers(-32_767, 32_767, DIMENSION).astype(np.int16)
        prediction = Prediction(
            event_id=event_id,
            stream=STREAM,
            label=label,
            probabilities={label: 1.0},
            novelty=0.0,
            model_version="v1.0",
            ref=Place(topic="reports", partition=0, offset=number),
            observed_at=at,
            predicted_at=at,
        )
        given = Label(event_id=event_id, stream=STREAM, label=label, labeller="benchmark", labelled_at=at)
        return (
            (prediction, Place(topic="predictions", partition=0, offset=number)),
            (given, Place(topic="labels", partition=0, offset=number)),
            ((STREAM, event_id), Content(f"what event {number} had to say", embedding, "encoder")),
        )


# --- invented names ------------------------------------------------------------------------------------


def names(say: Say, total: int) -> list[Row]:
    """What a learner with its default settings costs and holds, day after day, where every label is a new class."""
    rows: list[Row] = []
    a_day = total // DAYS
    chance = np.random.default_rng(0)
    live = Live("telemetry", ("flow",), 8, finetune=False, revise_after=a_day)
    metrics = Metrics()
    try:
        for day in range(1, DAYS + 1):
            places = range((day - 1) * a_day, day * a_day)
            windows: list[Payload] = list(chance.normal(0, 1, (a_day, 1, 8)).astype(np.float32))
            live.take(places, windows)
            begun = time.process_time()
            live.label(places, [f"invented {place}" for place in places])
            taken = time.process_time() - begun
            live.boundary()
            learner, kept = live.learning.learners[LIVE], live.learning.store
            with kept.transaction(live.learning.epoch, START + timedelta(days=day)) as tx:
                tx.purge()
            counts = {name: float(count) for name, count in kept.class_counts(LIVE, member_only=True).items()}
            metrics.set_bounded(metrics.replay_examples, LIVE, counts)
            mode = f"{day * a_day:,} names"
            rows += [
                _row("names", mode, "microseconds_per_label", taken / a_day * 1e6, "microseconds"),
                _row("names", mode, "classes", float(len(learner.sums.classes)), "classes"),
                _row("names", mode, "bytes_kept", float(learner.sums.nbytes), "bytes"),
                _row("names", mode, "series", float(metrics.render()[0].count(b'class="')), "series"),
                _row("names", mode, "waiting", float(sum(kept.quarantine_counts(LIVE).values())), "labels"),
            ]
            say(", ".join([mode, *(f"{row.value:,.0f} {row.metric}" for row in rows[-5:])]))
    finally:
        live.close()
    # The first days teach classes; what comes after the last class should cost the same for ever.
    full = [row for row in rows if row.mode == f"{a_day * (DAYS // 2):,} names"]
    return [*rows[:5], *full, *rows[-5:]]


# --- what all parts share ------------------------------------------------------------------------------


def _row(name: str, mode: str | None, metric: str, value: float, unit: str) -> Row:
    return Row(name=name, mode=mode, metric=metric, value=value, unit=unit)


def _with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with its ratio to the same metric at the smallest size after it."""
    found: list[Row] = []
    smallest: dict[str, Row] = {}
    for row in rows:
        found.append(row)
        first = smallest.setdefault(row.metric, row)
        if first is not row:
            found.append(
                _row(row.name, row.mode, f"{row.metric}_ratio_to_{first.mode}", row.value / first.value, "ratio")
            )
    return found


def _repeated(act: Callable[[], object], seconds: float) -> float:
    """The median seconds of one call, over as many as fit into `seconds`, five at least."""
    act()
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < seconds:
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def _timed(act: Callable[[], int]) -> tuple[float, int]:
    """The median seconds of three calls, and what they gave."""
    taken: list[float] = []
    count = 0
    for _ in range(3):
        begun = time.perf_counter()
        count = act()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken), count


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.learning_cost"
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument(
        "--width",
        type=int,
        default=DEFAULT_WIDTH,
        metavar="N",
        help="the head's random features (default: as it ships for texts)",
    )
    parser.add_argument("--full", action="store_true", help="a store of a million examples as well")
    parser.add_argument("--examples", type=int, metavar="N", help="questions to train on (default 640, quick 96)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the networks (default 1, as it ships)")
    chosen = parser.parse_args(arguments)
    chosen.examples = chosen.examples or (96 if chosen.quick else 640)
    chosen.seconds = 0.1 if chosen.quick else 2.0
    if min(chosen.examples // 40, chosen.runs, chosen.threads) < 1:
        parser.error("--runs and --threads are at least 1, --examples at least 40")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
