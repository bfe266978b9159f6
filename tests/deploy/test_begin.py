"""The first settings and the files that people have: read as they are, and refused by the line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.begin import Wish, check_file, guess, parsed, table_entries, written
from deploy.doctor import examine
from deploy.settings import InvalidSettings
from deploy.tables import read_rows, write_rows
from stream.errors import Misconfigured
from stream.events import Report, Telemetry
from tests.deploy.test_cli import run

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def file(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_a_csv_becomes_events_and_labels(tmp_path: Path) -> None:
    """Quotes, semicolons and empty cells are what real files are made of."""
    path = file(tmp_path, "notes.csv", 'Report;Class\n"a; b";x\nplain;\n;y\none;two;three\n')
    settings = parsed(written(Wish("text", "notes", topic="own", prefix="p-")))
    entries, topics = table_entries(path, settings, "notes", {})
    found = list(entries)
    assert topics == ("p-own", "p-labels")
    events = [entry.event for entry in found if isinstance(entry.event, Report)]
    assert [event.text for event in events] == ["a; b", "plain"]
    assert [entry.label and entry.label.label for entry in found[:2]] == ["x", None]
    assert [(entry.number, entry.why) for entry in found[2:]] == [
        (4, "Report: is empty"),
        (5, "3 cells for 2 columns"),
    ]


def test_the_same_file_again_brings_no_new_events(tmp_path: Path) -> None:
    """Whoever publishes a file twice must not teach it twice; two alike rows are two events all the same."""
    settings = parsed(written(Wish("text", "notes")))
    path = file(tmp_path, "notes.csv", "text,label\none,x\none,x\ntwo,y\n")
    first, again = ([e.event and e.event.event_id for e in table_entries(path, settings, "notes", {})[0]] for _ in "12")
    assert first == again
    assert len(set(first)) == 3


def test_rows_of_numbers_become_windows(tmp_path: Path) -> None:
    """A row is a time step: which rows are one event is said by its id."""
    path = file(tmp_path, "pump.csv", "event_id,p,q,label\nw1,1,2,\nw1,,3,ok\nw2,1,oops,bad\nw3,5,6,\n")
    seen = guess(file(tmp_path, "clean.csv", "event_id,p,q,label\nw1,1,2,ok\n"), {})
    assert (seen.kind, seen.stream, seen.channels) == ("telemetry", "clean", ("p", "q"))
    settings = parsed(written(Wish("telemetry", "pump", channels=seen.channels)))
    first, second, third = table_entries(path, settings, "pump", {})[0]
    assert isinstance(first.event, Telemetry)
    assert first.event.values == [[1.0, None], [2.0, 3.0]]
    assert first.label is not None
    assert first.label.label == "ok"
    assert (second.number, second.why) == (4, "q: 'oops' is no number")
    assert third.event is not None
    assert third.label is None


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_rows_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    """What one kind of file cannot hold would be lost between two tools."""
    rows = [{"a": 'x,"\n;', "b": "é"}, {"a": "1", "b": "2"}]
    assert write_rows(tmp_path / name, ["a", "b"], rows) == 2
    assert [dict(row.values) for row in read_rows(tmp_path / name)] == rows


def test_many_classes_raise_their_bound(tmp_path: Path) -> None:
    """With the default, two hundred classes a day, the rest of a first file would wait in quarantine."""
    path = file(tmp_path, "many.csv", "text,label\n" + "".join(f"text {n},class {n}\n" for n in range(300)))
    checked = check_file(path, parsed(written(Wish("text", "many"))), "many", {"text": "text", "label": "label"}, NOW)
    assert len(checked.classes) == 300
    settings = parsed(written(Wish("text", "many", classes=300)))
    assert settings.streams["many"].new_classes.per_day >= 300


def test_what_cannot_be_used_is_said() -> None:
    """A name with a space would be refused by every command after this one."""
    with pytest.raises(InvalidSettings, match="my stream"):
        written(Wish("text", "my stream"))
    with pytest.raises(Misconfigured, match=r"\.csv"):
        list(read_rows(Path("notes.xlsx")))


def test_init_asks_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered with Return alone, the questions must end in a file that works; a second time it is kept."""
    monkeypatch.chdir(tmp_path)
    file(tmp_path, "notes.csv", "text,label\none thing,x\nanother,y\n")
    answer = run("init", "--ask", input=b"notes.csv\n\n\n\n\n\n")
    assert answer.exit_code == 0, answer.output
    assert "2 events, 2 of them labelled, 2 classes" in answer.output
    assert run("config", "check").exit_code == 0
    again = run("init", "notes.csv")
    assert again.exit_code == 2
    assert "--force" in again.output


def test_doctor_says_what_is_wrong_and_how_to_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At three in the morning one command must name the one thing that is broken."""
    monkeypatch.chdir(tmp_path)
    assert run("doctor").exit_code == 1
    settings = written(Wish("text", "notes", bootstrap="127.0.0.1:9")).replace(
        "kafka:", "worker: {device: cuda}\nkafka:\n  timeout_seconds: 1"
    )
    file(tmp_path, "trimtab.yaml", settings)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    answer = run("doctor", "--format", "json")
    assert answer.exit_code == 1
    found = {one["check"]: one for one in json.loads(answer.stdout)}
    assert {check for check, line in found.items() if line["state"] == "wrong"} == {"broker", "gpu"}
    assert all(found[check]["mend"] for check in ("broker", "gpu"))
    (tmp_path / "trimtab-data").mkdir()
    (tmp_path / "trimtab-data" / "learner.db").write_bytes(b"this is no database, whatever its name says" * 100)
    assert next(f for f in examine(None) if f.check == "database").state == "wrong"
