"""Cells of several seeds become rows: for people a table, for programs the form that every benchmark has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks import report
from benchmarks.learning.cells import VERSIONS, Cell, Entry, Task
from benchmarks.learning.scores import UNITS, mean_and_deviation

SHOWN: Mapping[str, tuple[str, ...]] = {
    "class-incremental": ("final", "average", "forgetting", "backward_transfer", "worst_class", "macro_f1"),
    "few-shot": ("new_classes", "old_change", "final", "worst_class", "macro_f1"),
    "prequential": ("macro_f1", "average", "final", "forgetting", "backward_transfer", "worst_class"),
}
COST = ("seconds", "peak_memory")


def result(benchmark: str, rows: Mapping[Entry, Sequence[Cell]]) -> report.Result:
    """The JSON of all rows that were run: means over seeds, and each metric's deviation beside it."""
    found: list[report.Row] = []
    for entry, cells in rows.items():
        mode = mode_of(entry, cells)
        for metric, (mean, deviation) in summary(cells).items():
            unit = UNITS.get(metric, "0 to 1" if metric.endswith("macro_f1") else "%")
            found.append(report.Row(name=entry.name, mode=mode, metric=metric, value=round(mean, 4), unit=unit))
            if len(cells) > 1:
                found.append(
                    report.Row(
                        name=entry.name, mode=mode, metric=f"{metric}_deviation", value=round(deviation, 4), unit=unit
                    )
                )
        if cells:
            seeds = report.Row(name=entry.name, mode=mode, metric="seeds", value=len(cells), unit="runs")
            found.append(seeds)
    return report.Result(benchmark=benchmark, machine=report.machine(), versions=report.versions(VERSIONS), rows=found)


def table(task: Task, rows: Mapping[Entry, Sequence[Cell]], seeds: int) -> Table:
    """One line a contestant; what was not run says so."""
    shown = [*SHOWN[task.protocol], *COST]
    made = Table(title=f"{task.name}, {task.protocol}, {seeds} seed{'s' if seeds > 1 else ''}")
    made.add_column("name")
    made.add_column("how")
    for metric in shown:
        made.add_column(f"{metric.replace('_', ' ')}", justify="right")
    for entry, cells in rows.items():
        values = summary(cells)
        line = [text(metric, *values[metric]) if metric in values else "" for metric in shown]
        if not cells:
            line[0] = "not run"
        made.add_row(entry.name, mode_of(entry, cells) or "", *line)
    return made


def summary(cells: Sequence[Cell]) -> dict[str, tuple[float, float]]:
    """Mean and deviation over seeds, by metric."""
    metrics = list(dict.fromkeys(metric for cell in cells for metric in cell["values"]))
    return {
        metric: mean_and_deviation([cell["values"][metric] for cell in cells if metric in cell["values"]])
        for metric in metrics
    }


def mode_of(entry: Entry, cells: Sequence[Cell]) -> str | None:
    """What tells rows of one name apart, and which variant of a rival it was."""
    variant: Any = cells[0]["variant"] if cells else None
    return ", ".join(filter(None, (entry.mode, variant))) or None


def text(metric: str, mean: float, deviation: float) -> str:
    """A number with its deviation, as precise as it is worth."""
    if metric.endswith("macro_f1"):
        return f"{mean:.3f} ± {deviation:.3f}"
    if metric in COST:
        return f"{mean:,.0f}"
    return f"{mean:.1f} ± {deviation:.1f}"
