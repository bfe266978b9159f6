"""A frozen copy of the examples that a fine-tune sees, as a `datasets.Dataset` on disk.

A run trains on what was labelled when it began, whatever is labelled or corrected meanwhile. The digest
names the content alone, the same on every machine and in whatever order the rows came, so it can stand
in a version's lineage.

`datasets` takes a second and much memory to import, and a learner trains seldom: it is imported where a snapshot
is written or read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from replay.schema import micros
from replay.store import Example, Payload, pack
from stream.errors import TrimtabError

if TYPE_CHECKING:
    import datasets

SnapshotKind = Literal["text", "telemetry"]

_CARD = "snapshot.json"
_ROWS_A_WRITE = 512


class BrokenSnapshot(TrimtabError):
    """A snapshot is not there, not whole, or not what its digest says."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What `read_snapshot` found, proven against its digest.

    Args:
        dataset: one row an example, by event id: `event_id`, `label`, `priority`, `new` (no run has
            trained on it), `exam` (none ever may), `observed_at` (UTC, microseconds), and `text`, or
            `window` (float32, flattened; NaN is a missing value) with `shape` (channels, steps).
        digest: sha256 of the content, in hex.
    """

    dataset: datasets.Dataset
    kind: SnapshotKind
    digest: str

    def __len__(self) -> int:
        return len(self.dataset)

    def payloads(self) -> list[Payload]:
        """Every row's text, or its window as float32 (channels, steps)."""
        return [_payload(row, self.kind) for row in _rows(self.dataset)]


def write_snapshot(rows: Sequence[Example], path: Path, kind: SnapshotKind) -> str:
    """Write the examples to the folder `path`, which must not be there; returns the content's digest.

    The folder appears whole or not at all.

    Raises:
        FileExistsError: `path` is there already; a snapshot is never changed.
        ValueError: there are no examples, an event id comes twice, or a payload is not of this kind.
    """
    import datasets

    if path.exists():
        raise FileExistsError(f"{path} is there already; a snapshot is never changed")
    ordered = sorted(rows, key=lambda row: row.event_id)
    if not ordered:
        raise ValueError("there are no examples to train on")
    if len({row.event_id for row in ordered}) != len(ordered):
        raise ValueError("an event id comes twice in the snapshot")
    for row in ordered:
        if isinstance(row.payload, str) != (kind == "text"):
            raise ValueError(f"event {row.event_id!r} is not of kind {kind}")

    columns: dict[str, list[Any]] = {
        "event_id": [row.event_id for row in ordered],
        "label": [row.label for row in ordered],
        "priority": [row.priority for row in ordered],
        "new": [row.new for row in ordered],
        "exam": [row.exam for row in ordered],
        "observed_at": [row.observed_at for row in ordered],
    }
    if kind == "text":
        columns["text"] = [row.payload for row in ordered]
    else:
        windows = [np.asarray(row.payload, dtype=np.float32) for row in ordered]
        columns["window"] = [window.ravel() for window in windows]
        columns["shape"] = [list(window.shape) for window in windows]
    dataset = datasets.Dataset.from_dict(columns, features=_features(kind))

    digest = _digest(
        kind,
        (
            (row.event_id, row.label, row.priority, row.new, row.exam, micros(row.observed_at), row.payload)
            for row in ordered
        ),
    )
    building = path.with_name(f".{path.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _no_progress_bar():
        dataset.save_to_disk(building)
    card = {"kind": kind, "rows": len(ordered), "digest": digest}
    (building / _CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    building.rename(path)
    return digest


def read_snapshot(path: Path, digest: str | None = None) -> Snapshot:
    """Read a snapshot back and prove it against its own digest, and against `digest` when given.

    Raises:
        BrokenSnapshot: it is not there, not whole, altered, or another one than asked for.
    """
    import datasets

    try:
        card = json.loads((path / _CARD).read_text(encoding="utf-8"))
        kind: SnapshotKind = card["kind"]
        with _no_progress_bar():
            loaded = datasets.load_from_disk(path)
        if not isinstance(loaded, datasets.Dataset) or loaded.features != _features(kind):
            raise BrokenSnapshot(f"{path} does not hold the columns of a {kind} snapshot")
        found = _digest(
            kind,
            (
                (
                    row["event_id"],
                    row["label"],
                    row["priority"],
                    row["new"],
                    row["exam"],
                    micros(row["observed_at"]),
                    _payload(row, kind),
                )
                for row in _rows(loaded)
            ),
        )
    except BrokenSnapshot:
        raise
    except Exception as error:  # Arrow raises its own errors, by the kind of damage
        raise BrokenSnapshot(f"{path} cannot be read as a snapshot: {error}") from error
    if found != card["digest"]:
        raise BrokenSnapshot(f"{path} was altered: its content is {found[:12]}, its card says {card['digest'][:12]}")
    if digest is not None and digest != found:
        raise BrokenSnapshot(f"{path} is snapshot {found[:12]}, not {digest[:12]}")
    return Snapshot(loaded, kind, found)


def _features(kind: str) -> datasets.Features:
    import datasets

    columns = {
        "event_id": datasets.Value("string"),
        "label": datasets.Value("string"),
        "priority": datasets.Value("int64"),
        "new": datasets.Value("bool"),
        "exam": datasets.Value("bool"),
        "observed_at": datasets.Value("timestamp[us, tz=UTC]"),
    }
    if kind == "text":
        return datasets.Features({**columns, "text": datasets.Value("string")})
    window = datasets.List(datasets.Value("float32"))
    return datasets.Features({**columns, "window": window, "shape": datasets.List(datasets.Value("int32"), length=2)})


def _rows(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    # Windows come back as arrays: as lists they would be a Python float for every sample.
    numeric = dataset.with_format(
        "numpy", columns=[name for name in ("window", "shape") if name in dataset.column_names]
    )
    plain = dataset.remove_columns(numeric.format["columns"])
    for start in range(0, len(dataset), _ROWS_A_WRITE):
        stop = min(start + _ROWS_A_WRITE, len(dataset))
        batch = {**plain[start:stop], **(numeric[start:stop] if numeric.format["columns"] else {})}
        for index in range(stop - start):
            yield {name: values[index] for name, values in batch.items()}


def _payload(row: dict[str, Any], kind: SnapshotKind) -> Payload:
    if kind == "text":
        return str(row["text"])
    return np.asarray(row["window"], dtype=np.float32).reshape(tuple(int(side) for side in row["shape"]))


def _digest(kind: str, rows: Iterable[tuple[str, str, int, bool, bool, int, Payload]]) -> str:
    """sha256 over the rows, each field with its length before it."""
    digest = sha256(kind.encode())
    for event_id, label, priority, new, exam, observed_at, payload in rows:
        fields = (
            event_id.encode(),
            label.encode(),
            f"{priority} {new:d} {exam:d} {observed_at}".encode(),
            pack(payload),
        )
        for value in fields:
            digest.update(len(value).to_bytes(8, "big"))
            digest.update(value)
    return digest.hexdigest()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """`datasets` draws a bar for every save, in the middle of whatever the process shows."""
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
