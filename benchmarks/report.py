"""What every benchmark gives: one table for people, one JSON file for programs, and the same options.

The file is ``{"benchmark", "machine", "versions", "rows": [{"name", "mode"?, "metric", "value", "unit"}]}``.
Contestants stand under `name`, ratios of one to another under `metric` as `ratio_to_OTHER`. The machine is
described by what it can do; names of hosts, users and folders are never written.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table


class Row(BaseModel):
    """One number.

    Args:
        name: the contestant.
        mode: what is varied beside the contestant, such as the delivery guarantee.
        metric: what was measured, such as `events_per_second` or `ratio_to_quix`.
        value: the number.
        unit: such as `events/s`; `ratio` for a ratio.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    mode: str | None = None
    metric: str = Field(min_length=1)
    value: float = Field(allow_inf_nan=False)
    unit: str = Field(min_length=1)


class Result(BaseModel):
    """One benchmark's outcome: what the JSON file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    benchmark: str
    machine: Mapping[str, str | int | float | None]
    versions: Mapping[str, str]
    rows: Sequence[Row]

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        beside = path.with_name(path.name + ".part")
        # A row without a mode has no such key; what the machine lacks is null.
        rows = [row.model_dump(exclude_none=True) for row in self.rows]
        text = self.model_copy(update={"rows": []}).model_dump()
        beside.write_text(json.dumps({**text, "rows": rows}, indent=2) + "\n")
        beside.replace(path)

    def table(self) -> Table:
        """The rows, for people."""
        machine = self.machine
        table = Table(
            title=f"{self.benchmark} on {machine.get('processor')}, {machine.get('cores')} cores",
            caption=", ".join(f"{name} {version}" for name, version in self.versions.items()),
        )
        with_modes = any(row.mode for row in self.rows)
        for heading in ("name", *(["mode"] if with_modes else []), "metric"):
            table.add_column(heading)
        table.add_column("value", justify="right")
        table.add_column("unit")
        before: str | None = None
        for row in self.rows:
            if with_modes and row.mode != before and before is not None:
                table.add_section()
            before = row.mode
            mode = [row.mode or ""] if with_modes else []
            table.add_row(row.name, *mode, row.metric, _number(row.value), row.unit)
        return table


@dataclass(frozen=True, slots=True)
class Contest:
    """What contestants did, run after run, under one mode; turned into rows by medians.

    Args:
        mode: of the rows, None where there is only one.
        runs: events a second of every run, by contestant, in the order to be shown.
        cpu: processor time of the contestant's own process in microseconds an event, likewise; may be empty.
    """

    mode: str | None
    runs: Mapping[str, Sequence[float]]
    cpu: Mapping[str, Sequence[float]]

    def rows(self, against: Iterable[tuple[str, str]]) -> list[Row]:
        """Medians and spread of every contestant, then the ratios of medians of each pair (one, other)."""
        found: list[Row] = []
        middle = {name: statistics.median(values) for name, values in self.runs.items()}
        for name, values in self.runs.items():
            found.append(self._row(name, "events_per_second", middle[name], "events/s"))
            spread = (max(values) - min(values)) / middle[name]
            found.append(self._row(name, "spread", spread, "of the median"))
            if name in self.cpu:
                microseconds = statistics.median(self.cpu[name])
                found.append(self._row(name, "cpu_per_event", microseconds, "microseconds"))
        for one, other in against:
            if one in middle and other in middle:
                found.append(self._row(one, f"ratio_to_{other}", middle[one] / middle[other], "ratio"))
            if one in self.cpu and other in self.cpu:
                ratio = statistics.median(self.cpu[one]) / statistics.median(self.cpu[other])
                found.append(self._row(one, f"cpu_ratio_to_{other}", ratio, "ratio"))
        return found

    def _row(self, name: str, metric: str, value: float, unit: str) -> Row:
        return Row(name=name, mode=self.mode, metric=metric, value=value, unit=unit)


def machine() -> dict[str, str | int | float | None]:
    """What this machine is, and how busy it was: numbers taken on a busy one say little alone."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of installed packages; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def options(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes, for it to add its own to."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="far fewer events: shows that it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs of each contestant (default 3)")
    return parser


def publish(result: Result, file: Path | None, console: Console) -> None:
    """Print the table, and write the file where one is named."""
    console.print(result.table())
    if file is not None:
        result.write(file)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}"
