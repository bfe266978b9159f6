"""Writes docs/learning.md and its plots from kept cells; nothing is measured here, and no figure is typed in.

The page's words are in `page.md` beside this file. A line `<!-- table: NAME -->` there becomes that table, and
`[[TABLE/ROW/METRIC]]` the row's mean, or 'not measured yet' (`[[TABLE/ROW@MODE/METRIC]]` where a row has modes).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.learning.cells import INSTANT, RIVALS, Cell, Entry
from benchmarks.learning.outcome import COST, SHOWN, mode_of, summary, text
from benchmarks.learning.scores import UNITS

if TYPE_CHECKING:
    from benchmarks.learning.suite import Table

TEMPLATE = Path(__file__).with_name("page.md")
NOT_YET = "not measured yet"
HEADINGS = {"macro_f1": "macro-F1", "peak_memory": "MiB", "new_classes": "new", "old_change": "old, change"}


def write(docs: Path, results: Mapping[str, Sequence[Cell]], tables: Mapping[str, Table]) -> None:
    """The page, and a plot for each table that has curves."""
    (docs / "learning.md").write_text(render(TEMPLATE.read_text(encoding="utf-8"), results, tables), encoding="utf-8")
    for name, cells in results.items():
        if name in tables:
            plot(docs / "images" / f"learning-{name}.svg", name, rows_of(tables[name].entries, cells))


def render(template: str, results: Mapping[str, Sequence[Cell]], tables: Mapping[str, Table]) -> str:
    """The page's text.

    Raises:
        KeyError: the template names a table that there is not.
    """
    rows = {name: rows_of(table.entries, results.get(name, ())) for name, table in tables.items()}

    def figure(found: re.Match[str]) -> str:
        name, row, metric = found[1], found[2], found[3]
        row, _, mode = row.partition("@")
        for entry, cells in rows[name].items():
            if entry.name == row and (not mode or entry.mode == mode):
                values = summary(cells)
                if metric in values:
                    unit = UNITS.get(metric, "")
                    number = text(metric, *values[metric]).partition(" ±")[0]
                    return f"{number} {unit}" if unit in ("%", "points") else number
        return NOT_YET

    page = re.sub(
        r"^<!-- table: (\S+) -->$", lambda found: _section(found[1], rows[found[1]]), template, flags=re.MULTILINE
    )
    return re.sub(r"\[\[([\w-]+)/([\w@,. -]+)/(\w+)\]\]", figure, page)


def rows_of(entries: Iterable[Entry], cells: Sequence[Cell]) -> dict[Entry, list[Cell]]:
    """Each row's cells, none where it was not run."""
    return {
        entry: [cell for cell in cells if (cell["name"], cell["mode"]) == (entry.name, entry.mode)] for entry in entries
    }


def plot(file: Path, name: str, rows: Mapping[Entry, Sequence[Cell]]) -> None:
    """Accuracy after each experience, a line a row, as a small SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "trimtab", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
        for entry, cells in rows.items():
            curves = [cell["curve"] for cell in cells if len(cell["curve"]) > 2]
            if not curves:
                continue
            length = min(map(len, curves))
            mean = [sum(curve[i] for curve in curves) / len(curves) for i in range(length)]
            label = entry.name + (f" ({entry.mode})" if entry.mode else "")
            style = "--" if entry.name in RIVALS else "-"
            axes.plot(range(1, length + 1), mean, style, label=label, linewidth=2 if style == "-" else 1.2)
        if axes.lines:
            axes.set(xlabel="experience", ylabel="accuracy, %", title=name, ylim=(0, 101))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _section(name: str, rows: Mapping[Entry, Sequence[Cell]]) -> str:
    cells = [cell for found in rows.values() for cell in found]
    if not cells:
        return f"Not run: `python -m benchmarks.learning suite --only {name}` runs it."
    shown = SHOWN[cells[0]["asked"]["protocol"]]
    columns = [*shown, *COST]
    heads = [HEADINGS.get(column, column.replace("_", " ")) for column in columns]
    lines = [
        "| row | how | " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for entry, found in rows.items():
        values = summary(found)
        numbers = [text(column, *values[column]) if column in values else "" for column in columns]
        if not found:
            numbers[0] = "not run"
        lines.append(f"| `{entry.name}` | {mode_of(entry, found) or ''} | " + " | ".join(numbers) + " |")
    curves = any(len(cell["curve"]) > 2 for cell in cells)
    drawn = f"\n\n![Accuracy after each experience](images/learning-{name}.svg)" if curves else ""
    return "\n".join(lines) + "\n\n" + _provenance(rows) + drawn


def _provenance(rows: Mapping[Entry, Sequence[Cell]]) -> str:
    """Where the numbers are from, in a line or two."""
    cells = [cell for found in rows.values() for cell in found]
    seeds = Counter(len(found) for found in rows.values() if found)
    codes = {
        "trimtab": sorted({cell["code"] for e, found in rows.items() if e.is_trimtab for cell in found}),
        "rivals": sorted({cell["code"] for e, found in rows.items() if not e.is_trimtab for cell in found}),
    }
    machines = sorted({f"{cell['machine']['processor']}, {cell['machine']['cores']} cores" for cell in cells})
    devices = sorted({cell["device"] for cell in cells})
    loads = [float(cell["machine"]["load_average_before"]) for cell in cells]
    tuned = [
        (entry, cell)
        for entry, found in rows.items()
        if entry.is_trimtab and entry.name != INSTANT
        for cell in found
        if cell["details"].get("fine_tunes")
    ]
    sentences = [
        "Seeds: " + ", ".join(f"{count} (rows: {rows_})" for count, rows_ in sorted(seeds.items())),
        f"data `{cells[0]['data']}`",
        *(f"code of {who} {', '.join(f'`{code}`' for code in found)}" for who, found in codes.items() if found),
        f"device {', '.join(devices)}",
        f"machine {'; '.join(machines)}, load average up to {max(loads):.0f}",
    ]
    if tuned:
        runs = sum(cell["details"]["fine_tunes"] for _, cell in tuned) / len(tuned)
        promoted = sum(cell["details"].get("fine_tunes_promoted", 0) for _, cell in tuned) / len(tuned)
        epochs = sum(cell["details"]["epochs"] for _, cell in tuned) / len(tuned)
        sentences.append(f"fine-tunes a run {runs:.1f}, promoted {promoted:.1f}, epochs each {epochs:.1f}")
    return "; ".join(sentences) + "."
