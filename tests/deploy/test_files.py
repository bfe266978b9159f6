"""The ways in and out: what was said or learned comes out whole, and goes in again as it was."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from deploy.cli_files import LABEL_COLUMNS
from deploy.tables import columns_of, match_columns, read_labels, read_rows
from learner.encoders import build_telemetry_encoder
from learner.heads import HeadSums, solve
from learner.registry import Registry, VersionManifest
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


@pytest.fixture
def pump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Settings here, and a registry with one version of a telemetry stream."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trimtab.yaml").write_text(
        f"learner: {{store: 'sqlite:///{tmp_path}/learner.db'}}\nregistry: {{url: '{tmp_path}/registry'}}\n"
        "streams: {pump: {kind: telemetry, encoder: {channels: [flow]}}}\n"
    )
    registry, encoder = Registry(str(tmp_path / "registry")), build_telemetry_encoder(["flow"], 1, window=8)
    registry.put_encoder(encoder.spec, encoder.files())
    sums = HeadSums(encoder.spec.dimension, encoder.spec.bound)
    sums.add(np.ones((2, encoder.spec.dimension), np.int16), ["low", "high"])
    head = solve(sums)
    assert head is not None
    digest = registry.put_head(head.tensors())
    manifest = VersionManifest(stream="pump", created_at=NOW, encoder=encoder.spec, head=digest, classes=head.classes)
    registry.set_champion("pump", registry.commit(manifest))
    return registry


def test_a_version_is_written_as_a_folder(pump: Registry, tmp_path: Path) -> None:
    """The registry is enough where the database is elsewhere, and then the card must not pretend to know more."""
    answer = run("versions", "export", "pump", "v1", "parent/out")
    assert answer.exit_code == 0, answer.output
    assert "Wrote v1 of pump to parent/out: README.md" in answer.stdout
    assert "the card leaves out what only the database knows" in answer.stderr
    assert "## In service" not in Path("parent/out/README.md").read_text()
    assert not Path("learner.db").exists()
    store = LearnerStore(f"sqlite:///{tmp_path}/learner.db")
    batch = [prediction(f"e{n}", "low", ref=n, at=n, stream="pump", version="v1.3") for n in range(3)]
    batch += [label(f"e{n}", name, at=n, stream="pump") for n, name in enumerate(("low", "low", "high"))]
    Learner(store).step(batch)
    store.close()
    assert run("versions", "export", "pump", "v1", "again").exit_code == 0
    assert "3 had a label by" in Path("again/README.md").read_text()
    assert "| low | 3 | 0.667 |" in Path("again/README.md").read_text()


def test_what_cannot_be_handed_out_is_one_sentence(pump: Registry) -> None:
    """Whoever mistypes a name, or meets a damaged file, must read what to do and find no half of a folder."""
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    head = pump.open(pump.version("pump", "v1").head or "")
    for arguments, code, said in (
        (("pumps", "v1", "out"), 2, "did you mean pump?"),
        (("pump", "v9", "out"), 1, "known are v1 to v1; list them: `trimtab versions list`"),
        (("pump", "v1", "full"), 2, "nothing is overwritten"),
        (("pump", "v1", "full/notes.txt"), 2, "nothing is overwritten"),
    ):
        answer = run("versions", "export", *arguments)
        assert (answer.exit_code, said in answer.stderr) == (code, True), answer.stderr
    head.write_bytes(head.read_bytes()[:-8])
    torn = run("versions", "export", "pump", "v1", "out")
    assert torn.exit_code == 1
    assert "is altered" in torn.stderr
    assert f"delete {head} and restore it from a backup" in torn.stderr
    assert {path.name for path in Path().iterdir()} == {"full", "registry", "trimtab.yaml"}
    assert [path.name for path in Path("full").iterdir()] == ["notes.txt"]
