"""Breaks a whole deployment, hundreds of times, and counts what was lost and what was done twice.

A real Kafka, two workers and a learner as they ship, a driver that publishes and remembers, and faults at random points
drawn from a seed. When everything has been answered and learned, `trimtab audit` and the driver's file are the judges.
Ends with 1 where a promise was broken. See `docs/guarantees.md` for what is promised.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.report import Result, Row, machine, options, publish, versions
from stream.batches import Guarantee
from tests.chaos.faults import MEANS, Chaos, library_of_faketime
from tests.chaos.field import Field
from tests.chaos.judge import Verdict, judge

PACKAGES = ("trimtab", "confluent-kafka", "faust-streaming", "torch", "pydantic")
MODES: tuple[Guarantee, ...] = ("at_least_once", "exactly_once")


def chosen(kinds: Sequence[str], count: int, seed: int) -> list[str]:
    """So many faults, each kind as often as the others give or take one, in an order drawn from the seed."""
    chance = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        found += chance.sample(kinds, len(kinds))
    return found[:count]


def run(
    directory: Path,
    guarantee: Guarantee,
    faults: int,
    seed: int,
    console: Console,
    *,
    faketime: Path | None = None,
    nodes: int = 1,
    kinds: Sequence[str] = (),
) -> tuple[list[Row], bool]:
    """One run under one guarantee: its rows, and whether every promise was kept.

    Args:
        nodes: of Kafka, 1 or 3.
        kinds: of faults; none for all that can be made.
    """
    began = time.monotonic()
    with Field(directory, guarantee, faketime=faketime, rate=8, late_seconds=90, seed=seed, nodes=nodes) as field:
        chaos = Chaos(field, seed)
        chaos.break_things(
            chosen(kinds or chaos.kinds(), faults, seed), lambda line: console.print(f"{guarantee}: {line}")
        )
        field.drain(600)
        field.settle()
        field.stop_processes()
        verdict = judge(field)
        seconds = time.monotonic() - began
        for one in field.ended:
            console.print(f"{guarantee}: {one.role} ended by itself with {one.code}: {one.last}")
    _tell(guarantee, chaos, verdict, console)
    return _rows(guarantee, chaos, verdict, len(field.ended), seconds), _kept(guarantee, verdict)


def _kept(guarantee: Guarantee, verdict: Verdict) -> bool:
    broken = verdict.lost or verdict.labels_lost or verdict.head_differs or verdict.audit_code
    return not (broken or (guarantee == "exactly_once" and verdict.duplicated))


def _tell(guarantee: Guarantee, chaos: Chaos, verdict: Verdict, console: Console) -> None:
    for kind, means in MEANS.items():
        if chaos.made[kind]:
            console.print(f"{guarantee}: {kind}, {chaos.made[kind]} times: {means}")
    undone = [kind for kind in MEANS if not chaos.made[kind]]
    console.print(f"{guarantee}: not done: {', '.join(undone) or 'none'}")
    for note in [*verdict.notes, *verdict.audit["breaches"]]:
        console.print(f"{guarantee}: BROKEN: {note}")


def _rows(guarantee: Guarantee, chaos: Chaos, verdict: Verdict, ended: int, seconds: float) -> list[Row]:
    audit = verdict.audit
    numbers: list[tuple[str, float, str]] = [
        ("faults", chaos.made.total(), "faults"),
        ("lost", verdict.lost + verdict.labels_lost, "messages"),
        ("duplicated", verdict.duplicated, "answers"),
        ("learned_twice", audit.get("learned_twice", 0), "events"),
        ("labels_not_learned", audit.get("labels_not_learned", 0), "labels"),
        ("head_differs", verdict.head_differs, "heads"),
        ("audit_breaches", len(audit["breaches"]), "promises"),
        ("ended_by_themselves", ended, "processes"),
        ("events", verdict.events, "messages"),
        ("labels", verdict.labels, "messages"),
        ("duration", seconds, "s"),
        *((f"faults_{kind}", chaos.made[kind], "faults") for kind in MEANS),
    ]
    return [Row(name="trimtab", mode=guarantee, metric=name, value=value, unit=unit) for name, value, unit in numbers]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--faults", type=int, metavar="N", help="faults in each mode (default 200; 20 with --quick)")
    parser.add_argument("--seed", type=int, default=1, help="decides what is sent and what is broken (default 1)")
    parser.add_argument("--mode", choices=MODES, action="append", help="one guarantee; both when not given")
    parser.add_argument("--faketime", type=Path, metavar="FILE", help="libfaketime.so.1, where it lies elsewhere")
    parser.add_argument("--nodes", type=int, choices=(1, 3), default=1, help="nodes of Kafka (default 1)")
    parser.add_argument("--only", choices=MEANS, action="append", help="one kind of fault; may be given again")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep logs, database and registry there")
    given = parser.parse_args(arguments)
    if "leader_killed" in (given.only or ()) and given.nodes == 1:
        parser.error("leader_killed needs --nodes 3")
    faults = given.faults or (20 if given.quick else 200)
    console = Console(stderr=True)
    rows: list[Row] = []
    kept = True
    with tempfile.TemporaryDirectory() as scratch:
        for guarantee in given.mode or MODES:
            directory = (given.keep or Path(scratch)) / guarantee
            made, whole = run(
                directory,
                guarantee,
                faults,
                given.seed,
                console,
                faketime=library_of_faketime(given.faketime),
                nodes=given.nodes,
                kinds=given.only or (),
            )
            rows += made
            kept = kept and whole
    publish(Result(benchmark="chaos", machine=machine(), versions=versions(PACKAGES), rows=rows), given.json, Console())
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
