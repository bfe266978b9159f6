"""Snapshots: the same content has the same digest, and an altered one is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from replay.snapshot import BrokenSnapshot, SnapshotKind, read_snapshot, write_snapshot
from replay.store import Example, Payload
from stream.events import Place

AT = datetime(2024, 5, 1, 12, 30, 15, 123457, tzinfo=UTC)


def example(number: int, payload: Payload) -> Example:
    return Example(
        stream="s",
        event_id=f"e{number}",
        label="quiet" if number % 2 else "stürmisch",
        payload=payload,
        observed_at=AT + timedelta(seconds=number),
        labelled_at=AT,
        ref=Place(topic="t", partition=0, offset=number),
        priority=2**62 + number,
        exam=number == 4,
        trained_in=number if number % 3 else None,
        embedding=np.zeros(2, np.int16),
        encoder="e",
    )


def rows(kind: SnapshotKind) -> list[Example]:
    if kind == "text":
        return [example(number, f"text ☀ {number}") for number in range(5)]
    rng = np.random.default_rng(0)
    made = [rng.normal(size=(3, 4 + number)).astype(np.float32) for number in range(5)]
    made[2][1, 3] = np.nan
    return [example(number, window) for number, window in enumerate(made)]


@pytest.mark.parametrize("kind", ["text", "telemetry"])
def test_what_is_written_is_read_back(tmp_path: Path, kind: SnapshotKind) -> None:
    """A fine-tune must see what was observed, to the last bit and the missing values."""
    digest = write_snapshot(rows(kind), tmp_path / "a" / "snapshot", kind)
    snapshot = read_snapshot(tmp_path / "a" / "snapshot", digest)
    assert (len(snapshot), snapshot.kind, snapshot.digest) == (5, kind, digest)
    first = snapshot.dataset[0]
    assert (first["event_id"], first["label"], first["priority"], first["new"]) == ("e0", "stürmisch", 2**62, True)
    assert first["observed_at"] == AT
    assert list(snapshot.dataset["exam"]) == [False, False, False, False, True]
    assert list(snapshot.dataset["new"]) == [True, False, False, True, False]
    for payload, row in zip(snapshot.payloads(), rows(kind), strict=True):
        if isinstance(payload, str):
            assert payload == row.payload
        else:
            assert isinstance(row.payload, np.ndarray)
            np.testing.assert_array_equal(payload, row.payload)
            assert payload.dtype == np.float32


@pytest.mark.parametrize("kind", ["text", "telemetry"])
def test_the_digest_is_of_the_content_alone(tmp_path: Path, kind: SnapshotKind) -> None:
    """Lineage compares digests made by different learners at different times."""
    made = rows(kind)
    digest = write_snapshot(made, tmp_path / "a", kind)
    assert write_snapshot(made[::-1], tmp_path / "b", kind) == digest
    made[1] = replace(made[1], label="quiet ")
    assert write_snapshot(made, tmp_path / "c", kind) != digest


def test_an_altered_snapshot_is_refused(tmp_path: Path) -> None:
    """A version's lineage would name data that it was not made from."""
    write_snapshot(rows("text"), tmp_path / "a", "text")
    (file,) = (tmp_path / "a").glob("*.arrow")
    data = file.read_bytes()
    assert b"text" in data
    at = data.rindex("☀ 4".encode())
    file.write_bytes(data[: at + 4] + b"5" + data[at + 5 :])
    with pytest.raises(BrokenSnapshot, match="altered"):
        read_snapshot(tmp_path / "a")
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(BrokenSnapshot, match="cannot be read"):
        read_snapshot(tmp_path / "a")
    file.unlink()
    with pytest.raises(BrokenSnapshot):
        read_snapshot(tmp_path / "a")
    with pytest.raises(BrokenSnapshot):
        read_snapshot(tmp_path / "never")


def test_another_snapshot_than_asked_for_is_refused(tmp_path: Path) -> None:
    """A job folder left over from an earlier run must not be trained on."""
    write_snapshot(rows("text"), tmp_path / "a", "text")
    with pytest.raises(BrokenSnapshot, match="not 0123"):
        read_snapshot(tmp_path / "a", "0123")


def test_a_snapshot_is_written_once_and_whole(tmp_path: Path) -> None:
    """What a killed writer left behind is not a snapshot, and does not stand in the way."""
    (tmp_path / ".a.building").mkdir()
    (tmp_path / ".a.building" / "torn").write_text("torn")
    write_snapshot(rows("text"), tmp_path / "a", "text")
    assert not (tmp_path / "a" / "torn").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(FileExistsError):
        write_snapshot(rows("text"), tmp_path / "a", "text")


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    """Found here, and not minutes later in the training process."""
    with pytest.raises(ValueError, match="kind"):
        write_snapshot(rows("text"), tmp_path / "a", "telemetry")
    with pytest.raises(ValueError, match="twice"):
        write_snapshot([*rows("text"), rows("text")[0]], tmp_path / "b", "text")
    with pytest.raises(ValueError, match="no examples"):
        write_snapshot([], tmp_path / "c", "text")
