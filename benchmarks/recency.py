"""Should the newest labels count more? Heads alone, on streams in time order. ``python -m benchmarks.recency``.

Three heads on the same embeddings of the base encoder, each answering an event before its label comes, as late as in
the tables of ``benchmarks.learning``: `all_alike` is the instant head that ships, in `newest_more` the newest labels
count several times, and `race` answers with whichever of the two `learner.recency.Race` has in use. `no_change` stands
beside them. `mode` is the stream:

- `anomaly`: whether a window of SMAP or MSL holds an anomaly. Channels differ and anomalies come and go.
- `storm`: the geomagnetic level of the day to come.
- `anomaly_shuffled`, `storm_shuffled`: the same examples in an order drawn by chance, so that nothing drifts and the
  newest labels are any labels: what `newest_more` gains there is not owed to their being new.

The base encoder is drawn anew for each run, and the order of what is shuffled; `_deviation` is over runs. Heads are
solved anew about a thousand times a stream. All labels are learned; the learner keeps one in five for its exam.
How much the newest count, and the odds of the race, were chosen on `anomaly` and `storm` in their order, with the
encoder of the first run: the other runs and the shuffled streams are what they were not chosen on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console

from benchmarks.learning.cells import Task
from benchmarks.learning.protocols import prequential
from benchmarks.learning.reading import Unusable
from benchmarks.learning.rivals import NoChange, Rival
from benchmarks.learning.suite import DATA, smap_anomaly, storm
from benchmarks.report import Result, Row, machine, options, publish, versions
from benchmarks.telemetry import Known
from learner.encoders import Payload, build_telemetry_encoder
from learner.heads import HeadSums, LinearHead, quantise, solve
from learner.recency import Heat, Newest, Race, RecencySettings
from stream.errors import Misconfigured

STREAMS: dict[str, Callable[[Path], Task]] = {"anomaly": smap_anomaly, "storm": storm}
SOLVED = 1_000
"""Times that heads are solved on a stream, as in the tables of `benchmarks.learning`."""
QUICK = 1_000
"""Events of a stream with `--quick`."""

Heads = Literal["all_alike", "newest_more", "race"]
Found = dict[str, dict[str, float]]
"""By contestant and metric."""


class Racing(Rival):
    """Both heads on known embeddings; answers with the one that `heads` says.

    Args:
        embed: payloads in, embeddings (n, d) within `bound` out.
        dimension: d.
        heads: which head answers.
        every: labels between two times that heads are solved.
        settings: how many labels are the newest, and how much more they count.
    """

    def __init__(
        self, embed: Known, dimension: int, bound: float, heads: Heads, every: int, settings: RecencySettings
    ) -> None:
        super().__init__()
        self._embed, self._heads, self._every, self._settings = embed, heads, every, settings
        self._sums, self._newest = HeadSums(dimension, bound), Newest(dimension, bound)
        self._recent: OrderedDict[str, tuple[npt.NDArray[np.int16], str]] = OrderedDict()
        self._solved: dict[str, LinearHead | None] = {"plain": None, "newest": None}
        self._unsolved = 0
        self.race = Race(leader="newest" if heads == "newest_more" else "plain")
        self.answered = {"plain": 0, "newest": 0}

    def ask(self, payloads: Sequence[Payload]) -> Sequence[str | None]:
        self.answered[self.race.leader] += len(payloads)
        return self._answers(self.race.leader, payloads)

    def learn(self, positions: Sequence[int], payloads: Sequence[Payload], labels: Sequence[str]) -> None:
        if self._heads == "race":
            both = [self._answers(name, payloads) for name in ("plain", "newest")]
            heats = [
                Heat(label, plain == label, newest == label) for label, plain, newest in zip(labels, *both, strict=True)
            ]
            self.race = self.race.after(heats, self._settings.odds)
        q = quantise(self._embed(payloads), self._sums.bound)
        self._sums.add(q, labels)
        for position, row, label in zip(positions, q, labels, strict=True):
            self._recent[str(position)] = row, label
            if len(self._recent) > self._settings.labels:
                self._recent.popitem(last=False)
        self._unsolved += len(labels)
        if self._unsolved >= self._every:
            self._solve()

    def _solve(self) -> None:
        self._unsolved = 0
        if self._heads != "newest_more":
            self._solved["plain"] = solve(self._sums)
        if self._heads != "all_alike":
            self._newest.hold(self._recent)
            self._solved["newest"] = solve(self._newest.emphasised(self._sums, self._settings.weight))

    def _answers(self, name: str, payloads: Sequence[Payload]) -> Sequence[str | None]:
        head = self._solved[name]
        return [None] * len(payloads) if head is None or not payloads else list(head.predict(self._embed(payloads)))


def run(task: Task, seed: int, settings: RecencySettings, heads: Sequence[Heads]) -> Found:
    """All contestants over one stream, its encoder drawn from `seed`."""
    stream = task.train
    steps = int(stream.payloads[0].shape[1])  # type: ignore[union-attr]
    encoder = build_telemetry_encoder(stream.channels, seed, commands=stream.commands, window=steps)
    embed = Known(stream.payloads, encoder.embed(stream.payloads))
    every = max(1, len(stream) // SOLVED)
    found: Found = {}
    for name in heads:
        racing = Racing(embed, encoder.spec.dimension, encoder.spec.bound, name, every, settings)
        found[name] = _scores(task, racing)
        if name == "race":
            found[name]["newest_share"] = racing.answered["newest"] / len(stream)
            found[name]["changes"] = float(racing.race.changes)
    found["no_change"] = _scores(task, NoChange())
    return found


def _scores(task: Task, contestant: Rival) -> dict[str, float]:
    values = prequential(task.train, None, contestant, experiences=task.experiences, delay=task.delay).values
    return {"macro_f1": values["macro_f1"], "accuracy": values["average"]}


def shuffled(task: Task, seed: int) -> Task:
    """The same examples in an order drawn from `seed`."""
    order = np.random.default_rng(seed).permutation(len(task.train)).tolist()
    return replace(task, train=task.train.take(order))


UNITS = {"macro_f1": "macro-F1", "accuracy": "%", "newest_share": "of answers", "changes": "changes"}


def rows(mode: str, runs: Sequence[Found]) -> Iterator[Row]:
    """Means over runs, and deviations where there are several."""
    for name, values in runs[0].items():
        for metric in values:
            found = [one[name][metric] for one in runs]
            yield Row(name=name, mode=mode, metric=metric, value=float(np.mean(found)), unit=UNITS[metric])
            if len(found) > 1:
                spread = float(np.std(found, ddof=1))
                yield Row(name=name, mode=mode, metric=f"{metric}_deviation", value=spread, unit=UNITS[metric])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = options(__doc__ or "")
    parser.prog = "python -m benchmarks.recency"
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="default: ../shared/data")
    parser.add_argument("--only", nargs="+", choices=tuple(STREAMS), default=tuple(STREAMS), help="these streams alone")
    parser.add_argument("--newest", type=int, default=RecencySettings().labels, metavar="N", help="labels that are new")
    parser.add_argument(
        "--weight", type=int, default=RecencySettings().weight, metavar="N", help="how often each counts"
    )
    chosen = parser.parse_args(arguments)
    settings = RecencySettings(labels=chosen.newest, weight=chosen.weight)
    out = Console(stderr=True, highlight=False)
    before, found = machine(), list[Row]()
    for name in chosen.only:
        try:
            task = STREAMS[name](chosen.data)
        except (OSError, Unusable, Misconfigured) as lack:
            out.print(f"{name}: not run: {lack}", soft_wrap=True)
            continue
        if chosen.quick:
            task = replace(task, train=task.train.take(range(min(QUICK, len(task.train)))))
        seeds = range(1 if chosen.quick else chosen.runs)
        found += rows(name, [run(task, seed, settings, ("all_alike", "newest_more", "race")) for seed in seeds])
        mixed = [run(shuffled(task, seed), seed, settings, ("all_alike", "newest_more", "race")) for seed in seeds]
        found += rows(f"{name}_shuffled", mixed)
    if not found:
        return 1
    result = Result(benchmark="recency", machine=before, versions=versions(["numpy", "scipy", "torch"]), rows=found)
    publish(result, chosen.json, Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
