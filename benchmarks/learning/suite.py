"""The tables of docs/learning.md: `python -m benchmarks.learning suite`.

Every table has its rows in the order in which a night is best spent: what costs seconds first, then trimtab as
it comes, then every strategy. A cell that is known is not measured again, so a night that was cut off goes on
where it ended; what was measured is in benchmarks/results, a file a table, and the page is made from those files alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.learning import outcome, page
from benchmarks.learning.cells import CACHE, INSTANT, ROOT, STRATEGIES, TRIMTAB, Cell, Entry, Kept, Runner, Task
from benchmarks.learning.reading import Columns, Examples, Unusable, read
from learner.encoders import Payload
from stream.errors import Misconfigured

DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"
WINDOW = 100
"""Samples in a telemetry window of SMAP and MSL."""
HELD_OUT_CHANNELS = 3
"""One channel in so many of each subsystem is never learned."""
ANOMALY_DELAY = 200
"""Windows after which an expert's mark is known, of all channels together."""
STORM_DAYS = 6_000
UNBOUNDED = 100_000_000
DUMMIES = ("majority", "no_change")
UNGUARDED: dict[str, Any] = {"guard": {"decline": False}}
"""Settings of a stream whose revisions are compared with the one before alone."""


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Args:
        load: reads the data from a folder; asked for only when a cell is to be measured.
        entries: the rows.
    """

    name: str
    load: Callable[[Path], Task]
    entries: Sequence[Entry]


def store(size: int) -> dict[str, Any]:
    """Settings of a replay store of so many examples."""
    return {"replay": {"size": size}}


def tables() -> dict[str, Table]:
    """All tables by name."""
    found = [
        Table(
            "clinc-class-incremental",
            clinc_class_incremental,
            [
                *(Entry(name) for name in (*DUMMIES, "train_once", "joint", INSTANT, "river")),
                Entry(TRIMTAB, "store 1,500", store(1_500)),
                Entry(TRIMTAB, "store unbounded", store(UNBOUNDED)),
                Entry(TRIMTAB, "store 300", store(300)),
                Entry(TRIMTAB, "store 0", store(1)),
                *(Entry(name, "store 1,500", store(1_500)) for name in STRATEGIES),
            ],
        ),
        Table(
            "clinc-few-shot",
            clinc_few_shot,
            [*(Entry(name) for name in (*DUMMIES, "train_once", "joint", INSTANT, "river")), Entry(TRIMTAB)],
        ),
        Table(
            "gcn-prequential",
            gcn_prequential,
            [
                *(Entry(name) for name in (*DUMMIES, "train_once", "joint", INSTANT, "river")),
                Entry(TRIMTAB, "store 5,000", store(5_000)),
                *(Entry(name, "store 5,000", store(5_000)) for name in STRATEGIES),
            ],
        ),
        *(
            Table(
                name,
                load,
                [
                    *(Entry(rival) for rival in (*DUMMIES, "train_once")),
                    Entry("joint", variant=ceiling),
                    *(Entry(rival) for rival in (INSTANT, "river")),
                    Entry(INSTANT, "not guarded against decline", UNGUARDED),
                    Entry(TRIMTAB),
                    *(Entry(strategy) for strategy in STRATEGIES),
                ],
            )
            for name, load, ceiling in (
                # Boosted trees for ten subsystems, fitted after each of 53 channels, would take an hour.
                ("smap-subsystem", smap_subsystem, "random forest"),
                ("smap-anomaly", smap_anomaly, None),
                ("storm", storm, None),
            )
        ),
    ]
    return {table.name: table for table in found}


# Data


def clinc_class_incremental(data: Path) -> Task:
    """CLINC150, 10 experiences of 15 classes."""
    train, test = _clinc(data)
    return Task("clinc-class-incremental", "class-incremental", train, test)


def clinc_few_shot(data: Path) -> Task:
    """CLINC150, 10 new classes from 5 labels each on top of 140, 10 draws."""
    train, test = _clinc(data)
    return Task("clinc-few-shot", "few-shot", train, test, shots=5, new_classes=10, seeds=tuple(range(10)))


def gcn_prequential(data: Path) -> Task:
    """GCN subjects in time order, labels 100 reports late."""
    columns = Columns(label="label", text="subject", time="time_utc")
    stream = read(data / "gcn_subjects_1997_2018.csv.gz", columns)
    return Task("gcn-prequential", "prequential", stream, None, delay=100)


def smap_subsystem(data: Path) -> Task:
    """Which subsystem a window is from; channel after channel, asked on channels that are never learned."""
    windows = _windows(data)
    channels: dict[str, list[str]] = {}
    for _, channel, _, _, _ in windows:
        members = channels.setdefault(channel[0], [])
        if channel not in members:
            members.append(channel)
    # A subsystem of one channel cannot be both learned and asked.
    held_out = {
        channel
        for members in channels.values()
        if len(members) > 1
        for channel in sorted(members)[1::HELD_OUT_CHANNELS]
    }
    told = {channel for members in channels.values() if len(members) > 1 for channel in members} - held_out
    return Task(
        "smap-subsystem",
        "class-incremental",
        _examples([(w[4], w[1][0], w[1]) for w in windows if w[1] in told]),
        replace(_examples([(w[4], w[1][0], w[1]) for w in windows if w[1] in held_out]), groups=()),
    )


def smap_anomaly(data: Path) -> Task:
    """Whether experts marked an anomaly in a window, in time order over all channels, marks late."""
    windows = [w for w in _windows(data) if w[2] == "test"]
    order = sorted(range(len(windows)), key=lambda place: (windows[place][3], windows[place][1]))
    rows = [(windows[p][4], "anomaly" if windows[p][0] else "nominal", "") for p in order]
    return Task("smap-anomaly", "prequential", replace(_examples(rows), groups=()), None, delay=ANOMALY_DELAY)


def storm(data: Path) -> Task:
    """Tomorrow's geomagnetic level, day after day; what a day was is known when it ends."""
    from deploy import demo_data
    from stream.events import Telemetry

    stream = demo_data.storm(seed=0, events=STORM_DAYS)
    events = [message for message in stream.messages if isinstance(message, Telemetry)]
    payloads: list[Payload] = [np.array(event.values, dtype=np.float32) for event in events]
    labels = [stream.truth[event.event_id] for event in events]
    return Task("storm", "prequential", Examples("telemetry", payloads, labels, stream.channels), None)


def _clinc(data: Path) -> tuple[Examples, Examples]:
    splits: dict[str, tuple[list[Payload], list[str]]] = {"train": ([], []), "test": ([], [])}
    with gzip.open(data / "clinc150.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["split"] in splits:
                texts, labels = splits[row["split"]]
                texts.append(row["text"])
                labels.append(row["label"])
    train, test = (Examples("text", texts, labels) for texts, labels in splits.values())
    return train, test


Window = tuple[bool, str, str, int, np.ndarray]
"""Whether it has an anomaly, channel, split, number within the channel, value and command bits (1 + bits, steps)."""


def _windows(data: Path) -> list[Window]:
    import pyarrow.parquet as pq

    table = pq.read_table(data / "nasa_smap_msl_telemetry.parquet").to_pandas()
    words = table["cmd_bits"].to_numpy(np.int64)
    used = [bit for bit in range(63) if bool((words >> bit & 1).any())]
    found: list[Window] = []
    for (channel, split), part in table.groupby(["channel", "split"], sort=False, observed=True):
        words = part["cmd_bits"].to_numpy(np.int64)
        values = np.stack([part["value"].to_numpy(np.float32), *(words >> bit & 1 for bit in used)]).astype(np.float32)
        marks = part["anomaly"].to_numpy() > 0
        for number in range(len(marks) // WINDOW):
            inside = slice(number * WINDOW, (number + 1) * WINDOW)
            found.append((bool(marks[inside].any()), str(channel), str(split), number, values[:, inside].copy()))
    return found


def _examples(rows: Sequence[tuple[np.ndarray, str, str]]) -> Examples:
    commands = tuple(f"bit{number}" for number in range(1, len(rows[0][0])))
    return Examples(
        "telemetry",
        [row[0] for row in rows],
        [row[1] for row in rows],
        ("value", *commands),
        commands,
        groups=[row[2] for row in rows],
    )


# Running


def main(arguments: Sequence[str]) -> int:
    """The command line of `suite`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning suite", description=__doc__)
    known = tables()
    parser.add_argument(
        "--only", metavar="NAMES", help=f"tables, or table/row, separated by commas: {', '.join(known)}"
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="no cell is begun after so long")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="only the first N seeds; the page says how many there are"
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="default: ../shared/data")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a fine-tune, not the default")
    parser.add_argument("--quick", action="store_true", help="one seed of each row, nothing written to results or docs")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from what is known")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False)
    runner = Runner(
        Kept(CACHE / "cells"),
        CACHE,
        say=lambda line: console.print(line, soft_wrap=True),
        device=options.device,
        minutes=0.0 if options.page else options.budget,
    )
    shown: dict[Entry, list[Cell]] = {}
    if not options.page:
        for table, entries in _chosen(known, options.only):
            try:
                task = table.load(options.data)
            except (OSError, Unusable, Misconfigured) as lack:
                console.print(f"{table.name}: not run: {lack}", soft_wrap=True)
                continue
            task = replace(task, threads=options.threads, seeds=task.seeds[: 1 if options.quick else options.seeds])
            rows: dict[Entry, list[Cell]] = {}
            for entry in entries:
                rows[entry] = list(runner.row(task, entry))
                if not options.quick:
                    keep(RESULTS, table.name, rows[entry])
            Console(width=150).print(outcome.table(task, rows, len(task.seeds)))
            shown.update({replace(e, mode=", ".join(filter(None, (table.name, e.mode)))): c for e, c in rows.items()})
    if options.json is not None:
        outcome.result("learning suite", shown).write(options.json)
    if not options.quick:
        page.write(ROOT / "docs", load(RESULTS), known)
    for failure in runner.failures:
        console.print(f"[red]{failure}", soft_wrap=True)
    return 1 if runner.failures else 0


def keep(folder: Path, table: str, cells: Sequence[Cell]) -> None:
    """Put cells into the table's result file, in place of older ones of the same row and seed."""
    if not cells:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"learning-{table}.json"
    before: list[Cell] = json.loads(file.read_text())["cells"] if file.is_file() else []
    replaced = {(cell["name"], cell["mode"], cell["seed"]) for cell in cells}
    # A row of which another variant is now the best has no seeds of the one before.
    rows = {(cell["name"], cell["mode"]): cell["variant"] for cell in cells}
    kept = [
        cell
        for cell in before
        if (cell["name"], cell["mode"], cell["seed"]) not in replaced
        and rows.get((cell["name"], cell["mode"]), cell["variant"]) == cell["variant"]
        and (rows.get((cell["name"], cell["mode"])) is None or cell["code"] == cells[0]["code"])
    ]
    whole = sorted([*kept, *cells], key=lambda cell: (cell["name"], cell["mode"] or "", cell["seed"]))
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"table": table, "cells": whole}, indent=1, sort_keys=True) + "\n")
    part.replace(file)


def load(folder: Path) -> dict[str, list[Cell]]:
    """By table, all cells that are kept."""
    found = {}
    for file in sorted(folder.glob("learning-*.json")):
        content = json.loads(file.read_text())
        found[content["table"]] = content["cells"]
    return found


def _chosen(known: dict[str, Table], only: str | None) -> Iterator[tuple[Table, list[Entry]]]:
    if not only:
        yield from ((table, list(table.entries)) for table in known.values())
        return
    wanted: dict[str, list[str]] = {}
    for part in filter(None, re.split(r"\s*,\s*", only)):
        name, _, row = part.partition("/")
        if name not in known:
            raise SystemExit(f"--only: there is no table {name!r}; there are {', '.join(known)}")
        wanted.setdefault(name, []).append(row)
    for name, rows in wanted.items():
        entries = [entry for entry in known[name].entries if "" in rows or entry.name in rows]
        if not entries:
            raise SystemExit(f"--only: table {name!r} has no row {rows[0]!r}")
        yield known[name], entries
