"""When to fine-tune: by a fixed number of labels, or when it should be worth it? ``python -m benchmarks.triggers``.

The learner that ships runs over telemetry streams of ``benchmarks.learning`` without Kafka. Each row is one policy:
`never` fine-tunes, a run after every so many labels (`fixed`), and a run when it is expected to bring so many points of
accuracy a minute of training (`gain`; see `learner.gain`). What a policy costs is counted in gradient steps of its
runs, which do not depend on how busy the machine is; seconds stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.learning.live import LABELS_A_STEP, Live
from benchmarks.learning.reading import Unusable
from benchmarks.learning.suite import DATA, smap_anomaly, smap_subsystem, storm
from benchmarks.report import Result, Row, machine, options, publish, versions
from stream.errors import Misconfigured

STREAMS = {"subsystem": smap_subsystem, "anomaly": smap_anomaly, "storm": storm}
FIXED = (250, 500, 1_000, 2_000)
GAINS = (0.5, 2.0, 8.0, 32.0)
"""Points of accuracy a minute of training."""


def policies(quick: bool) -> dict[tuple[str, str | None], Mapping[str, Any]]:
    """Settings of `triggers` by row name and mode."""
    found: dict[tuple[str, str | None], Mapping[str, Any]] = {("never", None): {"every_labels": None}}
    for every in FIXED[-1:] if quick else FIXED:
        found["fixed", f"every {every:,}"] = {"every_labels": every}
    for gain in GAINS[-1:] if quick else GAINS:
        found["gain", f"{gain:g} points a minute"] = {"every_labels": None, "gain": gain}
    return found


def run(load: Any, data: Path, triggers: Mapping[str, Any], seed: int, quick: bool) -> dict[str, float]:
    """One policy over one stream with one seed."""
    task = load(data)
    train = task.train.take(range(min(1_500, len(task.train)))) if quick else task.train
    first = train.payloads[0]
    steps = 1 if isinstance(first, str) else first.shape[1]
    live = Live(
        "telemetry",
        train.channels,
        steps,
        commands=train.commands,
        overrides={"triggers": dict(triggers)},
        seed=seed,
        finetune=triggers.get("every_labels") is not None or triggers.get("gain") is not None,
        revise_after=LABELS_A_STEP,
        device="cpu",
    )
    try:
        outcome = replace(task, train=train).run(live, seed)
        told = live.details()
    finally:
        live.close()
    return {
        "accuracy": outcome.values["average"],
        "macro_f1": outcome.values["macro_f1"],
        "fine_tunes": float(told["fine_tunes"]),
        "promoted": float(told.get("fine_tunes_promoted", 0)),
        "updates": float(told["updates"]),
        "training_seconds": float(told["training_seconds"]),
    }


UNITS = {
    "accuracy": "%",
    "macro_f1": "macro-F1",
    "fine_tunes": "runs",
    "promoted": "runs",
    "updates": "gradient steps",
    "training_seconds": "s",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = options(__doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="default: ../shared/data")
    parser.add_argument("--only", nargs="+", choices=tuple(STREAMS), default=tuple(STREAMS), help="these streams alone")
    chosen = parser.parse_args(arguments)
    out = Console(stderr=True, highlight=False)
    before, rows = machine(), []
    for name in chosen.only:
        for (policy, mode), triggers in policies(chosen.quick).items():
            try:
                found = [
                    run(STREAMS[name], chosen.data, triggers, seed, chosen.quick)
                    for seed in range(1 if chosen.quick else chosen.runs)
                ]
            except (OSError, Unusable, Misconfigured) as lack:
                out.print(f"{name}: not run: {lack}", soft_wrap=True)
                break
            where = ", ".join(filter(None, (name, mode)))
            means = {metric: float(np.mean([values[metric] for values in found])) for metric in UNITS}
            rows += [Row(name=policy, mode=where, metric=m, value=v, unit=UNITS[m]) for m, v in means.items()]
            out.print(f"{policy}, {where}: " + ", ".join(f"{m} {v:,.3g}" for m, v in means.items()), soft_wrap=True)
    if not rows:
        return 1
    result = Result(benchmark="triggers", machine=before, versions=versions(["torch", "avalanche-lib"]), rows=rows)
    publish(result, chosen.json, Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
