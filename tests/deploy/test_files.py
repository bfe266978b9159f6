"""Labels as files: what was said comes out, and goes in again as it was."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.cli_files import LABEL_COLUMNS
from deploy.tables import columns_of, match_columns, read_labels, read_rows
from replay.store import LearnerStore
from stream.events import Label
from tests.deploy.test_cli import run
from tests.replay.steps import NOW, STREAM, Learner, label, prediction

NAMES = ["Power ", 'naïve; "quoted"', "=1+1", "-", "two  blanks", "007", "true"]
LATER = datetime(2027, 1, 1, tzinfo=UTC)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Label]:
    """Settings here whose learner's database holds labels of every kind; returns them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trimtab.yaml").write_text(
        f"learner: {{store: 'sqlite:///{tmp_path}/learner.db'}}\nstreams: {{{STREAM}: {{kind: text}}}}\n"
    )
    batch = [prediction(f"e{n}", "x", ref=n, at=n) for n in range(len(NAMES))]
    batch += [label(f"e{n}", name, at=n, minute=n) for n, name in enumerate(NAMES)]
    batch += [label("e0", None, at=90, minute=50, labeller="bob"), label(" odd id ", "x", at=91, labeller="a,b")]
    store = LearnerStore(f"sqlite:///{tmp_path}/learner.db")
    Learner(store).step(batch)
    store.close()
    return [message for message, _ in batch if isinstance(message, Label)]


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.jsonl", "labels.parquet"])
def test_exported_labels_are_read_as_they_were_said(said: list[Label], name: str) -> None:
    """A name that came back changed by a blank would be taken for a correction of every label of its class."""
    answer = run("labels", "export", name)
    assert answer.exit_code == 0, answer.output
    assert f"Wrote {len(said)} labels of {STREAM}" in answer.output
    path = Path(name)
    assert columns_of(path) == list(LABEL_COLUMNS)
    entries = list(read_labels(read_rows(path), STREAM, match_columns(columns_of(path), {}), LATER))
    assert [entry.why for entry in entries] == [""] * len(said)

    def key(one: Label) -> tuple[str, str]:
        return one.event_id, one.labeller

    assert [entry.label for entry in entries] == sorted(said, key=key)


def test_a_bad_row_is_named_and_costs_only_itself(said: list[Label]) -> None:
    """Of ten thousand rows by many hands some are wrong; whoever imports them must be told which, and why."""
    Path("sheet.csv").write_text(
        "Event,class,labelled_at,confidence,withdrawn\n"
        "e1,x,2024-05-01,0.5,\n"
        "e2,,,,\n"
        ",x,,,\n"
        "e3,x,yesterday,,\n"
        "e4,x,,7,\n"
        "e5,x,,,maybe\n"
        "e6,x,,,true\n"
        "e7,,,,true\n"
        "e8,x\n"
    )
    answer = run("labels", "import", "sheet.csv", "--dry-run")
    assert answer.exit_code == 1
    assert "Of 9 rows of sheet.csv, 2 would be published to labels; 7 were refused." in answer.stdout
    for line in (
        "line 3: class: is empty",
        "line 4: Event: is empty",
        "line 5: labelled_at: 'yesterday' is no time",
        "line 6: confidence: ",
        "line 7: withdrawn: 'maybe' is neither true nor false",
        "line 8: withdrawn: is true beside a class",
        "line 10: 2 cells for 5 columns",
    ):
        assert line in answer.stderr


def test_what_is_not_there_is_one_sentence(said: list[Label]) -> None:
    """An export that made an empty database on the wrong machine would be taken for the truth."""
    Path("learner.db").rename("elsewhere.db")
    answer = run("labels", "export", "labels.csv")
    assert answer.exit_code == 2
    assert "run this where the learner runs" in answer.stderr
    assert not Path("labels.csv").exists()
    assert not Path("learner.db").exists()
    Path("bare.csv").write_text("id,text\n1,x\n")
    assert "no column is called label" in run("labels", "import", "bare.csv", "--dry-run").stderr


def test_a_label_without_a_time_was_given_when_its_file_was_changed(said: list[Label]) -> None:
    """With the time of the import instead, an old sheet would overrule every correction made since."""
    Path("sheet.csv").write_text("id,class\ne1,x\n")
    columns = match_columns(columns_of(Path("sheet.csv")), {})
    first, again = (next(read_labels(read_rows(Path("sheet.csv")), STREAM, columns, NOW)).label for _ in "12")
    assert first is not None
    assert first.labelled_at == NOW
    assert first == again
