"""A version made again from its lineage, and its weights compared with those that are served.

::

    marks of its run ▸ the examples, as they were given ▸ snapshot, held against the lineage's digest
    ▸ the parent's encoder, and the training state that it left ▸ fine-tune with the same settings and seed ▸ compare

No snapshot is kept of a run, for it holds examples: it is put together again from the store, and from the log where
the store has let go of an event. A training state is kept of the last run only: where a version went on from one, its
parent is made again first, and so on back to a run that began afresh; only from a parent that came out bit for bit is
gone on. What was forgotten or corrected since is not guessed at: such a version says that it cannot be made again.

On the same build of the packages, on a CPU with as many threads, the same bits come out. Elsewhere sums are rounded in
another order; then no weight may be off by more than `TOLERANCE` of the largest of its tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load as load_tensors

from learner.finetune import FineTuneJob, FineTuneResult, FineTuneSettings, FineTuneSummary, Progress, run_finetune
from learner.online import installed
from learner.registry import Registry, VersionManifest
from replay.history import History
from replay.snapshot import write_snapshot
from replay.store import Example, LearnerStore, Payload
from stream.errors import TrimtabError
from stream.events import Place

TOLERANCE = 0.01
"""Of the largest weight of a tensor, where another build rounds otherwise. A step in another direction is far more."""

ReadBack = Callable[[str, Mapping[str, Place]], Mapping[str, Payload]]
"""Events of a stream by id and place, as an encoder reads them; those that the log lost are absent."""


class CannotRebuild(TrimtabError):
    """The version cannot be made again; the message says why."""


@dataclass(frozen=True)
class Rebuilt:
    """What came of making a version again.

    Args:
        outcome: `same`, bit for bit; `near`, within the tolerance; or `other`.
        largest: the largest difference of a weight, as a share of the largest of its tensor.
        tensor: where that was.
        examples: how many it was trained on.
        proven: the snapshot's digest is that of the lineage.
        notes: what else is to be known.
        chain: the versions that were made again for it, first one first.
    """

    version: str
    outcome: Literal["same", "near", "other"]
    largest: float
    tensor: str
    examples: int
    proven: bool
    notes: tuple[str, ...]
    chain: tuple[str, ...]


class Rebuilder:
    """Makes versions again. It changes nothing but its own directory.

    Args:
        store: the learner's database.
        registry: where weights lie.
        kinds: `text` or `telemetry`, by stream.
        read_back: reads events that the store has let go of.
        directory: to work in; it will hold examples, and is the caller's to delete.
        told: what is being done, in a sentence.
        on_progress: told of each step of a fine-tune.
        train: carries out a fine-tune.
    """

    def __init__(
        self,
        store: LearnerStore,
        registry: Registry,
        kinds: Mapping[str, Literal["text", "telemetry"]],
        read_back: ReadBack,
        directory: Path,
        told: Callable[[str], None] = lambda what: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        train: Callable[[FineTuneJob, Callable[[Progress], None]], FineTuneResult] = run_finetune,
    ) -> None:
        self._store, self._registry, self._kinds, self._read_back = store, registry, kinds, read_back
        self._directory, self._told, self._on_progress, self._train = directory, told, on_progress, train

    def rebuild(self, stream: str, name: str) -> Rebuilt:
        """Make a version again and compare it.

        Raises:
            CannotRebuild: examples of it are gone, or something else that it was made from.
            FineTuneFailed: the fine-tune itself came to nothing.
            BrokenVersion: it, or what it was trained from, is not whole in the registry.
        """
        return self._make(stream, name)[0]

    def _make(self, stream: str, name: str) -> tuple[Rebuilt, FineTuneResult]:
        manifest = self._registry.verify(stream, name)
        run, summary = self._run_of(stream, manifest)
        before: Rebuilt | None = None
        state: Path | None = None
        assert manifest.parent is not None
        if summary.run > 1:
            self._told(f"{name} went on from the training state of {manifest.parent}, which is made again first")
            before, earlier = self._make(stream, manifest.parent)
            if before.outcome != "same":
                raise CannotRebuild(
                    f"{name} went on from the training state of {manifest.parent}, which did not come out bit for bit"
                )
            state = earlier.state
        rows, notes = self._rows(stream, name, run)
        work = self._directory / name
        digest = write_snapshot(rows, work / "snapshot", self._kinds[stream])
        proven = digest == manifest.lineage.snapshot
        if not proven:
            notes.append("the snapshot is not to the bit what it was: the exam or the replay seed has changed since")
        spec, files = self._registry.encoder(self._registry.version(stream, manifest.parent).encoder_digest)
        trained = sum(not row.exam for row in rows)
        self._told(f"making {name} again: {trained} examples, from {manifest.parent}, seed {manifest.lineage.seed}")
        result = self._train(
            FineTuneJob(
                stream=stream,
                directory=work,
                snapshot=work / "snapshot",
                encoder=spec,
                encoder_files=files,
                state=state,
                settings=FineTuneSettings.model_validate(manifest.lineage.settings["finetune"]),
                device="cuda" if summary.device.startswith("cuda") else "cpu",
            ),
            self._on_progress,
        )
        notes += _circumstances(manifest, summary, result)
        largest, tensor = self._compare(manifest, result)
        same = manifest.encoder.files == result.encoder.files
        outcome: Literal["same", "near", "other"] = "same" if same else "near" if largest <= TOLERANCE else "other"
        chain = (*(before.chain if before else ()), name)
        return Rebuilt(name, outcome, largest, tensor, trained, proven, tuple(notes), chain), result

    def _run_of(self, stream: str, manifest: VersionManifest) -> tuple[int, FineTuneSummary]:
        name = manifest.name
        if manifest.parent is None or "finetune" not in manifest.lineage.settings:
            raise CannotRebuild(f"{name} of stream {stream!r} is a base version: nothing was trained for it")
        row = next((row for row in self._store.versions(stream) if row.number == manifest.number), None)
        if row is None or row.run is None:
            raise CannotRebuild(f"the learner's database does not know of {name} of stream {stream!r}")
        if lost := row.detail.get("forgotten"):
            raise CannotRebuild(
                f"{name} cannot be made again: {lost} of the examples that it or its ancestors were trained on were "
                "forgotten, withdrawn or corrected since"
            )
        if manifest.lineage.settings.get("labels_changed_meanwhile"):
            raise CannotRebuild(f"{name} cannot be made again: labels that it was trained on were changed meanwhile")
        return row.run, FineTuneSummary.model_validate(manifest.lineage.settings["summary"])

    def _rows(self, stream: str, name: str, run: int) -> tuple[list[Example], list[str]]:
        given = History(self._store).given(stream, run)
        found = sum(not row.exam for row in given.rows)
        if found != given.trained or not found:
            raise CannotRebuild(
                f"{name} cannot be made again: of {given.trained} examples of its run {found} are still known"
            )
        wanted = {row.event_id: row.ref for row in given.rows if row.event_id in given.let_go}
        back = self._read_back(stream, wanted) if wanted else {}
        gone = [row.event_id for row in given.rows if row.event_id in wanted.keys() - back.keys() and not row.exam]
        if gone:
            raise CannotRebuild(
                f"{name} cannot be made again: the store and the log have let go of {len(gone)} of the {found} events "
                "that it was trained on"
            )
        rows = [
            replace(row, payload=back[row.event_id]) if row.event_id in back else row
            for row in given.rows
            if row.event_id not in wanted or row.event_id in back
        ]
        return rows, [f"{len(back)} events were read back from the log"] if back else []

    def _compare(self, manifest: VersionManifest, result: FineTuneResult) -> tuple[float, str]:
        """The largest difference of a weight, as a share of the largest of its tensor; infinite for another shape."""
        largest, where = 0.0, ""
        for file in sorted(name for name in manifest.encoder.files if name.endswith(".safetensors")):
            served = load_tensors(self._registry.read(manifest.encoder.files[file]))
            made = load_tensors(result.files[file].read_bytes()) if file in result.files else {}
            off, tensor = farthest(served, made)
            if off > largest:
                largest, where = off, tensor
        return largest, where


def farthest(served: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference of a weight, as a share of the largest of its tensor, and in which; infinite for
    another shape."""
    largest, where = 0.0, ""
    for tensor in sorted(served.keys() | made.keys()):
        if tensor not in served or tensor not in made or served[tensor].shape != made[tensor].shape:
            return float("inf"), tensor
        old, new = (side[tensor].astype(np.float64) for side in (served, made))
        off = float(np.abs(old - new).max(initial=0.0) / max(np.abs(old).max(initial=0.0), 1e-12))
        if off > largest:
            largest, where = off, tensor
    return largest, where


def _circumstances(manifest: VersionManifest, then: FineTuneSummary, result: FineTuneResult) -> list[str]:
    """What is otherwise than it was, and may be why weights differ."""
    now = result.summary
    notes = [
        f"{package} was {old}, and is {installed().get(package, 'not installed')}"
        for package, old in sorted(manifest.lineage.packages.items())
        if installed().get(package) != old
    ]
    if then.device != now.device:
        notes.append(f"it was trained on {then.device}, now on {now.device}")
    if "max_seconds" in (then.ended, now.ended):
        notes.append("its training was ended by the clock (finetune.max_seconds), which no seed repeats")
    if then.updates != now.updates:
        notes.append(f"it took {then.updates} steps, now {now.updates}")
    return notes
