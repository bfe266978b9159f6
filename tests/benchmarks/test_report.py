"""Programs compare benchmark files of many machines and dates, so their form may not wander."""

from __future__ import annotations

import getpass
import io
import json
import socket
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from benchmarks.report import Contest, Result, Row, machine, options, publish, versions

RUNS = {"worker": [100.0, 300.0, 200.0], "quix": [50.0, 100.0, 400.0]}


def result(rows: list[Row]) -> Result:
    return Result(benchmark="transport", machine=machine(), versions=versions(["pydantic"]), rows=rows)


def test_the_file_has_the_one_form(tmp_path: Path) -> None:
    """A reader finds the same keys in every benchmark's file, and no key `mode` where there is none."""
    file = tmp_path / "out.json"
    rows = [
        Row(name="worker", mode="exactly_once", metric="events_per_second", value=5.0, unit="events/s"),
        Row(name="bare", metric="best_batch", value=64, unit="texts"),
    ]
    publish(result(rows), file, Console(quiet=True))
    found = json.loads(file.read_text())
    assert set(found) == {"benchmark", "machine", "versions", "rows"}
    assert found["benchmark"] == "transport"
    assert [set(row) for row in found["rows"]] == [
        {"name", "mode", "metric", "value", "unit"},
        {"name", "metric", "value", "unit"},
    ]
    assert found["versions"].keys() == {"python", "pydantic"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_medians_and_their_ratio_are_what_is_stated() -> None:
    """One slow run on a busy machine must not decide, and a ratio must follow from the rows beside it."""
    rows = {(row.name, row.metric): row for row in Contest("at_least_once", RUNS, {}).rows([("worker", "quix")])}
    assert rows["worker", "events_per_second"].value == 200
    assert rows["quix", "events_per_second"].value == 100
    assert rows["worker", "ratio_to_quix"].value == 2
    assert rows["worker", "spread"].value == 1
    assert {row.mode for row in rows.values()} == {"at_least_once"}
    assert ("worker", "cpu_per_event") not in rows


def test_a_contestant_that_was_left_out_has_no_ratio() -> None:
    """Where Quix Streams cannot be had, the rest is still told."""
    rows = Contest(None, {"worker": [1.0]}, {"worker": [20.0]}).rows([("worker", "quix"), ("worker", "bare")])
    assert [row.metric for row in rows] == ["events_per_second", "spread", "cpu_per_event"]


def test_the_machine_is_described_without_names() -> None:
    """A file that is passed on must not tell whose machine it was."""
    text = json.dumps(machine())
    assert machine()["cores"]
    for private in (socket.gethostname(), f"/{getpass.getuser()}", str(Path.cwd())):
        assert private not in text


def test_a_number_that_is_none_is_refused() -> None:
    """NaN and infinity are no JSON, and a benchmark that comes to them has failed."""
    with pytest.raises(ValidationError):
        Row(name="worker", metric="events_per_second", value=float("inf"), unit="events/s")


def test_the_table_shows_every_row() -> None:
    """People read the table; a number that is only in the file is lost to them."""
    console = Console(record=True, width=160, file=io.StringIO())
    rows = Contest("exactly_once", RUNS, {}).rows([("worker", "quix")])
    console.print(result(rows).table())
    shown = console.export_text()
    assert shown.count("exactly_once") == len(rows)
    assert "ratio_to_quix" in shown


def test_every_benchmark_takes_the_same_options(tmp_path: Path) -> None:
    """Whoever runs one can run them all."""
    chosen = options("x").parse_args(["--quick", "--json", str(tmp_path / "f.json")])
    assert (chosen.quick, chosen.json, chosen.runs) == (True, tmp_path / "f.json", 3)
