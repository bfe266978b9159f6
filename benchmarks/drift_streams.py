"""The streams of `benchmarks.drift`: real events, drift put in at a known place, and what the learner sees of it.

A `World` holds the embedded events of one data set. `Story` makes a stream of them: blocks of neighbours in a random
order, so that neighbours are as alike as they are in life and nothing else changes until drift is put in. `watch`
plays a story through an instant head as the learner would and yields what `learner.joining` tells the drift monitor.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from learner.encoders import Encoder, build_telemetry_encoder, build_text_encoder
from learner.heads import HeadSums, LinearHead, dequantise, quantise, solve

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "drift"

KINDS = ("abrupt", "gradual", "recurring", "class_shares", "new_class", "sensor_offset", "dead_channel")
DELAY = 100
"""Events between an answer and its label."""
REVISION_LABELS = 100
"""Labels between two solved heads."""
RAMP = 500
"""Events over which a gradual drift comes in, and for which a recurring one stays and stays away."""
SHARE = 0.3
"""Share of the events that a drift touches; of a new class, a third of that."""

Quantised = npt.NDArray[np.int16]


class Pool(NamedTuple):
    """Events in their own order: embeddings (n, d) as the ledger keeps them, and labels."""

    embeddings: Quantised
    labels: Sequence[str]


@dataclass(frozen=True)
class World:
    """One data set.

    Args:
        name: such as `clinc`.
        bound: of the encoder, to read the quantised embeddings by.
        base: what the stream consists of until it drifts.
        block: how many neighbours stay together when the base is put in another order.
        other: the same classes from another source.
        novel: events of classes that the base does not have.
        broken: by kind of drift, the base's events as a broken sensor would give them, and which of them it is on.
    """

    name: str
    bound: float
    base: Pool
    block: int
    other: Pool
    novel: Pool
    broken: dict[str, tuple[Quantised, npt.NDArray[np.bool_]]] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of drift that can be put into it."""
        return tuple(k for k in KINDS if k in self.broken or k not in ("sensor_offset", "dead_channel"))


class Event(NamedTuple):
    """One event of a story."""

    embedding: Quantised
    label: str


class Told(NamedTuple):
    """What the drift monitor is told at one step; `embedding` and `wrong` belong to an earlier event, labelled now."""

    label: str | None
    novelty: float
    embedding: Quantised | None
    wrong: bool


class Story:
    """A stream of a world's events, without drift until one is put in.

    Args:
        world: whose events.
        seed: another one is another order.
        shuffled: False tells the base as it came.
    """

    def __init__(self, world: World, seed: int, *, shuffled: bool = True) -> None:
        self.world, self._seed = world, seed
        count = len(world.base.labels)
        starts = np.arange(0, count, world.block)
        if shuffled:
            np.random.default_rng([seed, 1]).shuffle(starts)
        self._order = np.concatenate([np.arange(s, min(s + world.block, count)) for s in starts])

    def __len__(self) -> int:
        return len(self._order)

    def calm(self, start: int, end: int) -> list[Event]:
        """The events from one place to another, without drift."""
        base = self.world.base
        return [Event(base.embeddings[i], base.labels[i]) for i in self._order[start:end]]

    def drifting(self, kind: str, place: int, length: int, variant: int) -> list[Event]:
        """The events from `place` on, with drift from the first.

        Args:
            variant: an even one changes the events, an odd one what their labels mean, where a kind can be either.
        """
        world, rng = self.world, np.random.default_rng([self._seed, place, KINDS.index(kind)])
        base = world.base
        calm = iter(self._order[place:])
        if kind == "class_shares":
            names = sorted(set(base.labels))
            weight = dict(zip(names, np.exp(1.5 * rng.standard_normal(len(names))), strict=True))
            most = max(weight.values())
            # Thinning keeps neighbours together; the order goes round where it ends.
            turns = (i for _ in range(1000) for i in np.roll(self._order, -place))
            kept = (i for i in turns if rng.random() < weight[base.labels[i]] / most)
            return [Event(base.embeddings[i], base.labels[i]) for i, _ in zip(kept, range(length), strict=False)]
        if kind in world.broken:
            embeddings, touched = world.broken[kind]
            rows = [next(calm) for _ in range(length)]
            return [Event((embeddings if touched[i] else base.embeddings)[i], base.labels[i]) for i in rows]
        if kind == "new_class":
            foreign = self._from(world.novel, rng)
            return [
                next(foreign) if rng.random() < SHARE / 3 else Event(base.embeddings[i], base.labels[i])
                for i in (next(calm) for _ in range(length))
            ]
        foreign = self._from(world.other, rng)
        names = sorted(set(base.labels))
        after = dict(zip(names, np.roll(names, 1).tolist(), strict=True))
        events = []
        for step in range(length):
            event = Event(base.embeddings[i := next(calm)], base.labels[i])
            if rng.random() < SHARE * _strength(kind, step):
                event = next(foreign) if variant % 2 == 0 else Event(event.embedding, after[event.label])
            events.append(event)
        return events

    def _from(self, pool: Pool, rng: np.random.Generator) -> Iterator[Event]:
        start = int(rng.integers(len(pool.labels)))
        while True:
            yield Event(pool.embeddings[start], pool.labels[start])
            start = (start + 1) % len(pool.labels)


def _strength(kind: str, step: int) -> float:
    if kind == "gradual":
        return min(1.0, (step + 1) / RAMP)
    if kind == "recurring":
        return 1.0 if step // RAMP % 2 == 0 else 0.0
    return 1.0


class Learner:
    """An instant head that answers events and is taught their labels later, as the learner's is."""

    def __init__(self, world: World) -> None:
        self._bound = world.bound
        self._sums = HeadSums(world.base.embeddings.shape[1], world.bound)
        self._head: LinearHead | None = None
        self._waiting: list[tuple[Event, str | None]] = []
        self._untaught: list[Event] = []

    def copy(self) -> Learner:
        """One that goes on from here by itself."""
        twin = object.__new__(Learner)
        twin._bound, twin._head, twin._sums = self._bound, self._head, self._sums.copy()
        twin._waiting, twin._untaught = list(self._waiting), list(self._untaught)
        return twin

    def watch(self, events: Sequence[Event]) -> Iterator[Told]:
        """Answer each event, take in the label that has come meanwhile, and tell both."""
        for start in range(0, len(events), REVISION_LABELS):
            part = events[start : start + REVISION_LABELS]
            yield from self._watch(part)

    def _watch(self, events: Sequence[Event]) -> Iterator[Told]:
        labels: list[str | None] = [None] * len(events)
        novelty = [1.0] * len(events)
        if self._head is not None:
            points = dequantise(np.stack([e.embedding for e in events]), self._bound)
            answer = self._head.answer(points, 1)
            labels, novelty = [names[0] for names in answer.labels], answer.novelty.tolist()
        for event, label, new in zip(events, labels, novelty, strict=True):
            self._waiting.append((event, label))
            if len(self._waiting) <= DELAY:
                yield Told(label, new, None, False)
                continue
            taught, answered = self._waiting.pop(0)
            self._untaught.append(taught)
            yield Told(label, new, taught.embedding, answered != taught.label)
        if len(self._untaught) >= REVISION_LABELS:
            self._sums.add(np.stack([e.embedding for e in self._untaught]), [e.label for e in self._untaught])
            self._untaught.clear()
            self._head = solve(self._sums)


# Data


def worlds(data: Path = DATA) -> Iterator[World]:
    """The three worlds, those whose file is there."""
    for file, make in (
        ("clinc150.jsonl.gz", _clinc),
        ("gcn_subjects_1997_2018.csv.gz", _gcn),
        ("nasa_smap_msl_telemetry.parquet", _telemetry),
    ):
        if (data / file).exists():
            yield make(data / file)


def _clinc(file: Path) -> World:
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["label"] != "oos"]
    names = sorted({row["label"] for row in rows})
    held_out = set(np.random.default_rng(0).permutation(names)[:15].tolist())
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    # In the file all texts of a class lie together.
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    return _of_texts("clinc", [texts[i] for i in order], [labels[i] for i in order], held_out, block=1)


def _gcn(file: Path) -> World:
    import pandas as pd

    table = pd.read_csv(file)
    texts, labels = table["subject"].fillna("").tolist(), table["label"].astype(str).tolist()
    return _of_texts("gcn", texts, labels, {"gravitational_wave", "neutrino"}, block=40)


def _of_texts(name: str, texts: list[str], labels: list[str], held_out: set[str], block: int) -> World:
    encoder: list[Encoder] = []

    def embed(what: Sequence[str]) -> npt.NDArray[np.float32]:
        if not encoder:
            from deploy.wiring import text_model

            encoder.append(build_text_encoder(text_model("minilm")))
        return encoder[0].embed(what)

    embeddings = quantise(_cached(f"{name}", texts, embed), 1.0)
    base = [i for i, label in enumerate(labels) if label not in held_out]
    novel = [i for i, label in enumerate(labels) if label in held_out]
    # The same questions as another client sends them: the last two words in five are lost.
    cut = base[:: max(1, len(base) // 3000)]
    short = [" ".join(texts[i].split()[: max(1, round(0.6 * len(texts[i].split())))]) for i in cut]
    return World(
        name=name,
        bound=1.0,
        base=Pool(embeddings[base], [labels[i] for i in base]),
        block=block,
        other=Pool(quantise(_cached(f"{name}-cut", short, embed), 1.0), [labels[i] for i in cut]),
        novel=Pool(embeddings[novel], [labels[i] for i in novel]),
    )


WINDOW, STRIDE, PASS = 64, 40, 6


def _telemetry(file: Path) -> World:
    import pandas as pd

    table = pd.read_parquet(file)
    windows: dict[str, list[npt.NDArray[np.float32]]] = {"SMAP": [], "MSL": []}
    labels: dict[str, list[str]] = {"SMAP": [], "MSL": []}
    channels: list[str] = []
    for (craft, channel), rows in table.groupby(["spacecraft", "channel"], observed=True, sort=True):
        # How many commands were under way, beside the value.
        commands = np.array([int(bits).bit_count() for bits in rows["cmd_bits"]], dtype=np.float32)
        pair = np.stack([rows["value"].to_numpy(np.float32), commands])
        for start in range(0, pair.shape[1] - WINDOW + 1, STRIDE):
            windows[craft].append(pair[:, start : start + WINDOW])
            labels[craft].append(channel[0])
            if craft == "SMAP":
                channels.append(channel)
    smap, subsystem = np.stack(windows["SMAP"]), np.array(labels["SMAP"])
    encoder = build_telemetry_encoder(("value", "commands"), 0, window=WINDOW)

    def embed(what: npt.NDArray[np.float32]) -> Quantised:
        return quantise(encoder.embed(list(what)), encoder.spec.bound)

    novel = subsystem == "G"
    base = ~novel
    names = sorted(set(np.array(channels)[base]))
    drawn = np.random.default_rng(0).permutation(names)
    on = np.isin(np.array(channels)[base], drawn[: round(SHARE * len(names))])
    offset, dead = smap[base].copy(), smap[base].copy()
    offset[:, 0] += 0.5
    dead[:, 0] = 0.0
    msl = np.stack(windows["MSL"])
    common = np.isin(labels["MSL"], np.unique(subsystem[base]))
    return World(
        name="telemetry",
        bound=encoder.spec.bound,
        base=Pool(embed(smap[base]), subsystem[base].tolist()),
        block=PASS,
        other=Pool(embed(msl[common]), np.array(labels["MSL"])[common].tolist()),
        novel=Pool(embed(smap[novel]), subsystem[novel].tolist()),
        broken={"sensor_offset": (embed(offset), on), "dead_channel": (embed(dead), on)},
    )


def _cached(
    name: str, texts: Sequence[str], embed: Callable[[Sequence[str]], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """The texts' embeddings, kept under `.cache/` because they take minutes."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    file = CACHE / f"{name}-{digest}.npy"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = embed(texts)
        beside = file.with_suffix(".part.npy")
        np.save(beside, made)
        beside.replace(file)
    found: npt.NDArray[np.float32] = np.load(file)
    return found
