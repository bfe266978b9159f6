"""Which detector finds drift that was put into real streams at a known place: ``python -m benchmarks.drift``.

Every stream is told event by event as `learner.joining` tells it: answers at once, inputs and errors with the label.
See `benchmarks/README.md` for the rules, and `benchmarks.drift_streams` for the streams.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from river.drift import ADWIN, KSWIN, PageHinkley

from benchmarks.drift_streams import DATA, KINDS, Learner, Story, Told, World, worlds
from benchmarks.report import Result, Row, machine, options, publish, versions
from monitoring.drift import DriftMonitor, DriftSettings, Kind

EVERY = 10_000
"""Events in which a detector may be wrong once."""
PREFIX = 5_000
"""Events without drift on which detectors are tuned, and which are not scored."""
SETTLED = 1_000
"""The first of those, in which a model begins from nothing, are not tuned on."""
END = 12_000
WINDOW = 1_000
"""Events from a drift's first within which it counts as found."""
WATCHED: tuple[Kind, ...] = ("input", "prediction", "error")


class Detector(Protocol):
    """Says of each step of a stream whether it alarms."""

    def told(self, told: Told) -> bool: ...


class Trimtab:
    """The drift monitor, fed as the joiner feeds it."""

    def __init__(self, every: int) -> None:
        self._monitor = DriftMonitor(DriftSettings(false_alarms_every=every, warnings_every=every // 10))

    def told(self, told: Told) -> bool:
        monitor = self._monitor
        before = sum(monitor.drifts(kind) for kind in WATCHED)
        if told.label is not None:
            monitor.update("prediction", told.novelty, answer=told.label)
        if told.embedding is not None:
            monitor.update("input", told.embedding)
            monitor.update("error", float(told.wrong))
        return sum(monitor.drifts(kind) for kind in WATCHED) > before


class Three:
    """A detector for one number on each of three: the distance from the first inputs' mean, novelty, error.

    Args:
        make: builds it; told whether only a rise counts.
    """

    REFERENCE = 200

    def __init__(self, make: Callable[[bool], Any]) -> None:
        self._input, self._novelty, self._error = make(False), make(True), make(True)
        self._mean: Any = 0.0
        self._count, self._scale = 0, 1e-9

    def told(self, told: Told) -> bool:
        found = False
        if told.label is not None:
            found = _rises(self._novelty, told.novelty)
        if told.embedding is not None:
            distance = self._distance(told.embedding.astype(np.float64))
            if self._count >= self.REFERENCE:
                self._input.update(distance / self._scale)
                found = bool(self._input.drift_detected) or found
            found = _rises(self._error, float(told.wrong)) or found
        return found

    def _distance(self, point: Any) -> float:
        if self._count < self.REFERENCE:
            self._count += 1
            self._mean = self._mean + (point - self._mean) / self._count
        distance = float(np.linalg.norm(point - self._mean))
        if self._count < self.REFERENCE:
            self._scale = max(self._scale, distance)
        return distance


def _rises(detector: Any, value: float) -> bool:
    """Update, and say whether it found a rise; ADWIN does not say which way."""
    before = detector.estimation if isinstance(detector, ADWIN) else None
    detector.update(value)
    return bool(detector.drift_detected) and (before is None or detector.estimation > before)


class Chance:
    """Alarms with a fixed chance at every event: 1 is always, 0 never."""

    def __init__(self, chance: float, seed: int) -> None:
        self._chance, self._rng = chance, np.random.default_rng(seed)

    def told(self, told: Told) -> bool:
        return bool(self._rng.random() < self._chance)


@dataclass(frozen=True)
class Contestant:
    """A detector by name, and the settings that it may be tuned by, the most eager first.

    Args:
        make: builds one, from a setting and the number of the run.
    """

    name: str
    make: Callable[[float, int], Detector]
    grid: Sequence[float]


def contestants(*, quick: bool) -> list[Contestant]:
    """All of them; the dummies and the monitor as it comes have nothing to tune."""
    steps = slice(None, None, 3 if quick else 1)
    return [
        Contestant("trimtab", lambda every, run: Trimtab(int(every)), [EVERY]),
        # Asked to be wrong five times as seldom: to compare with rivals that turn out to be wrong less than asked.
        Contestant("trimtab_shy", lambda every, run: Trimtab(int(every)), [5 * EVERY]),
        Contestant(
            "trimtab_tuned", lambda every, run: Trimtab(int(every)), [10 ** (3 + e / 2) for e in range(9)][steps]
        ),
        Contestant(
            "adwin",
            lambda delta, run: Three(lambda rising: ADWIN(delta=delta, clock=8)),
            [10.0**-e for e in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 30, 40, 60)][steps],
        ),
        Contestant(
            "page_hinkley",
            lambda height, run: Three(lambda rising: PageHinkley(threshold=height, mode="up" if rising else "both")),
            [2.0**e for e in range(1, 14)][steps],
        ),
        Contestant(
            "kswin",
            lambda alpha, run: Three(lambda rising: KSWIN(alpha=alpha, seed=run)),
            [10.0**-e for e in (4, 5, 6, 7, 8, 9, 10, 11, 12, 14)][steps],
        ),
        Contestant("random", lambda chance, run: Chance(chance, run), [1 / EVERY]),
        Contestant("always", lambda chance, run: Chance(chance, run), [1.0]),
        Contestant("never", lambda chance, run: Chance(chance, run), [0.0]),
    ]


@dataclass(frozen=True)
class Run:
    """One run's stream: without drift from its beginning to its end, and with each kind of drift from `place` on."""

    place: int
    calm: Sequence[Told]
    drifting: Mapping[str, Sequence[Told]]


def tell(world: World, run: int, *, prefix: int = PREFIX, end: int = END, window: int = WINDOW) -> Run:
    """A run of a world: another order, and another place for the drift."""
    story, learner = Story(world, run), Learner(world)
    end = min(end, len(story))
    place = prefix + 200 + 300 * run
    calm = list(learner.watch(story.calm(0, place)))
    drifting = {kind: list(learner.copy().watch(story.drifting(kind, place, window, run))) for kind in world.kinds}
    return Run(place, [*calm, *learner.watch(story.calm(place, end))], drifting)


@dataclass
class Outcome:
    """What a contestant did in one world.

    Args:
        found: by kind, for each placement, events until the alarm, None where there was none in time.
        false: alarms without drift, after the prefix.
        events: how many events those were among.
        seconds: processor time of `fed` events.
    """

    found: dict[str, list[int | None]] = field(default_factory=lambda: defaultdict(list))
    false: int = 0
    events: int = 0
    seconds: float = 0.0
    fed: int = 0


def tune(contestant: Contestant, runs: Sequence[Run], prefix: int = PREFIX) -> float:
    """The most eager setting that alarms at most once in 10,000 events of the runs' prefixes; else the shyest."""
    allowed = len(runs) * (prefix - SETTLED) / EVERY
    for setting in contestant.grid[:-1]:
        alarms = 0
        for number, run in enumerate(runs):
            detector = contestant.make(setting, number)
            alarms += sum(detector.told(told) and at >= SETTLED for at, told in enumerate(run.calm[:prefix]))
            if alarms > allowed:
                break
        else:
            return setting
    return contestant.grid[-1]


def judge(contestant: Contestant, setting: float, runs: Sequence[Run], prefix: int = PREFIX) -> Outcome:
    """Run it over every run without drift, and from each place on with every kind of drift."""
    outcome, begun = Outcome(), time.process_time()
    for number, run in enumerate(runs):
        detector = contestant.make(setting, number)
        for at, told in enumerate(run.calm):
            if at == run.place:
                for kind, drifting in run.drifting.items():
                    twin = copy.deepcopy(detector)
                    first = next((step for step, seen in enumerate(drifting, 1) if twin.told(seen)), None)
                    outcome.found[kind].append(first)
                    outcome.fed += first or len(drifting)
            outcome.false += detector.told(told) and at >= prefix
        outcome.events += len(run.calm) - prefix
        outcome.fed += len(run.calm)
    outcome.seconds = time.process_time() - begun
    return outcome


def rows(outcomes: Mapping[str, Mapping[str, Outcome]]) -> list[Row]:
    """By contestant and world: recall and delay by kind and over all, false alarms, each world's own, and the cost."""
    made: list[Row] = []
    for name, by_world in outcomes.items():
        found: dict[str, list[int | None]] = {
            kind: [first for outcome in by_world.values() for first in outcome.found.get(kind, ())] for kind in KINDS
        }
        found["all"] = [first for firsts in found.values() for first in firsts]
        for mode, firsts in found.items():
            made += _found(name, mode, firsts)
        every = list(by_world.values())
        false = 1e4 * sum(outcome.false for outcome in every) / sum(outcome.events for outcome in every)
        made += [_false(name, mode, "false_alarms", false) for mode in ("none", "all")]
        for world, outcome in by_world.items():
            firsts = [first for kind in outcome.found.values() for first in kind]
            made.append(_recall(name, "all", f"recall_{world}", firsts))
            made.append(_false(name, "none", f"false_alarms_{world}", 1e4 * outcome.false / outcome.events))
        cost = 1e6 * sum(outcome.seconds for outcome in every) / sum(outcome.fed for outcome in every)
        made.append(Row(name=name, mode="all", metric="cpu_per_event", value=cost, unit="microseconds"))
    return made


def _found(name: str, mode: str, firsts: Sequence[int | None]) -> Iterable[Row]:
    if not firsts:
        return
    yield _recall(name, mode, "recall", firsts)
    delays = [first for first in firsts if first is not None]
    if delays:
        yield Row(name=name, mode=mode, metric="delay", value=statistics.median(delays), unit="events")


def _recall(name: str, mode: str, metric: str, firsts: Sequence[int | None]) -> Row:
    share = sum(first is not None for first in firsts) / len(firsts)
    return Row(name=name, mode=mode, metric=metric, value=share, unit=f"of {len(firsts)}")


def _false(name: str, mode: str, metric: str, value: float) -> Row:
    return Row(name=name, mode=mode, metric=metric, value=value, unit="per 10,000 events")


def in_time_order(world: World, settings: Mapping[str, float], field: Sequence[Contestant]) -> list[Row]:
    """Alarms on a stream as it came: the world changes in it, and nobody knows when."""
    story = Story(world, 0, shuffled=False)
    told = list(Learner(world).watch(story.calm(0, len(story))))
    made = []
    for contestant in field:
        detector = contestant.make(settings[contestant.name], 0)
        alarms = sum(detector.told(each) and at >= PREFIX for at, each in enumerate(told))
        value = 1e4 * alarms / (len(told) - PREFIX)
        made.append(_false(contestant.name, f"{world.name}_in_time_order", "alarms", value))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 where no data is there."""
    parser = options(__doc__ or "")
    parser.set_defaults(runs=10)
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="where the data sets lie")
    asked = parser.parse_args(arguments)
    console = Console()
    field, count = contestants(quick=asked.quick), 2 if asked.quick else asked.runs
    outcomes: dict[str, dict[str, Outcome]] = {contestant.name: {} for contestant in field}
    ordered: list[Row] = []
    described = machine()
    for world in worlds(asked.data):
        console.print(f"{world.name}: {len(world.base.labels):,} events; {count} runs")
        runs = [tell(world, run) for run in range(count)]
        settings = {}
        for contestant in field:
            settings[contestant.name] = tune(contestant, runs)
            outcomes[contestant.name][world.name] = judge(contestant, settings[contestant.name], runs)
            console.print(f"  {contestant.name} at {settings[contestant.name]:g}")
        if world.name == "gcn" and not asked.quick:
            ordered = in_time_order(world, settings, field)
    if not outcomes["trimtab"]:
        console.print(f"no data set lies in {asked.data}: name their folder with --data")
        return 2
    result = Result(
        benchmark="drift",
        machine=described,
        versions=versions(("trimtab", "river", "numpy", "torch")),
        rows=[*rows(outcomes), *ordered],
    )
    publish(result, asked.json, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
