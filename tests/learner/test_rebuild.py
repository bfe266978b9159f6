"""A version is made again of what it was made of, or says why it cannot be; training itself is played.

That the same seed gives the same bits is tested in `test_finetune`; the whole, with a real training, in
`tests/integration/test_loop.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from learner.encoders import payload
from learner.finetune import FineTuneJob, FineTuneResult, Progress, Retrain
from learner.rebuild import CannotRebuild, Rebuilder, Rebuilt
from replay.snapshot import read_snapshot
from replay.store import Payload, StoreSettings
from stream.events import Decoder, Place, StreamRules
from stream.lookback import events_at
from tests.learner import loop as loop_module
from tests.learner.loop import CHANNELS, START, STREAM, SUMMARY, Loop, encoder

KINDS = ("leak", "calm", "surge")


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """v2 was trained on what came first, v3 on that and on what came then; more came since."""
    made = Loop(tmp_path, StoreSettings(exam_from=2, exam_one_in=3))
    for seed, numbers in ((1, range(8)), (2, range(8, 14))):
        made.teach(*(f"{kind}{number}" for kind in KINDS for number in numbers))
        assert made.run(monkeypatch, seed) in ("promoted", "refused")
        monkeypatch.setattr(loop_module, "SUMMARY", SUMMARY.model_copy(update={"run": 2}))
    made.teach(*(f"{kind}{number}" for kind in KINDS for number in range(14, 16)))
    yield made
    made.close()


def rebuild(loop: Loop, name: str, seeds: Mapping[str, int]) -> tuple[Rebuilt, list[FineTuneJob]]:
    """Made again by trainings that give the encoder of these seeds; and what they were asked for."""
    asked: list[FineTuneJob] = []

    def train(job: FineTuneJob, on_progress: Callable[[Progress], None]) -> FineTuneResult:
        asked.append(job)
        made = encoder(seeds[job.directory.name])
        files = {}
        job.out.mkdir(parents=True)
        for file, content in made.files().items():
            files[file] = job.out / file
            files[file].write_bytes(content)
        rows = read_snapshot(job.snapshot).dataset
        return FineTuneResult(
            encoder=made.sealed(),
            files=files,
            event_ids=tuple(rows["event_id"]),
            embeddings=np.empty((0, 0), np.int16),
            classes=KINDS,
            state=job.out / "state",
            summary=SUMMARY,
            seconds=0.0,
        )

    def read_back(stream: str, places: Mapping[str, Place]) -> dict[str, Payload]:
        decoder = Decoder([StreamRules(STREAM, "telemetry", CHANNELS)])
        found = events_at(loop.log.read, decoder, {(stream, event_id): place for event_id, place in places.items()})
        return {event_id: payload(event, CHANNELS) for (_, event_id), event in found.items()}

    work = loop.directory / f"rebuild-{name}-{len(list(loop.directory.iterdir()))}"
    made = Rebuilder(loop.store, loop.registry, {STREAM: "telemetry"}, read_back, work, train=train)
    return made.rebuild(STREAM, name), asked


def test_what_a_retrain_named_is_what_it_is_made_of_again(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version made by hand from one night's data must come out of that night's data again, and by its strategy."""
    night = START + timedelta(hours=8)
    loop.teach(*(f"{kind}{number}" for kind in KINDS[:2] for number in range(20, 26)), observed_at=night)
    named = Retrain(strategy="er_ace", observed_from=night, observed_to=night + timedelta(hours=1))
    assert loop.run(monkeypatch, 3, named=named) in ("promoted", "refused")
    lineage = loop.registry.version(STREAM, "v4").lineage
    assert lineage.strategy == "er_ace"
    assert lineage.settings["retrain"] == named.model_dump(mode="json")
    found, jobs = rebuild(loop, "v4", {"v2": 1, "v3": 2, "v4": 3})
    assert (found.outcome, found.proven) == ("same", True)
    assert [job.settings.strategy for job in jobs[:-1]] == ["replay"] * (len(jobs) - 1)
    assert jobs[-1].settings.strategy == "er_ace"
    rows = read_snapshot(jobs[-1].snapshot).dataset
    assert {at for at, exam in zip(rows["observed_at"], rows["exam"], strict=True) if not exam} == {night}


def test_it_is_made_of_what_it_was_made_of(loop: Loop) -> None:
    """What was learned since, and by which run first, must not find its way in; the digest of the lineage proves it."""
    found, (job,) = rebuild(loop, "v2", {"v2": 1})
    assert (found.outcome, found.largest, found.proven, found.chain) == ("same", 0.0, True, ("v2",))
    rows = read_snapshot(job.snapshot).dataset
    assert all(rows["new"][at] for at in range(len(rows)) if not rows["exam"][at])
    assert found.examples == sum(not exam for exam in rows["exam"])
    assert max(int(event_id.lstrip("abcdefghijklmnopqrstuvwxyz")) for event_id in rows["event_id"]) == 7
    other, _ = rebuild(loop, "v2", {"v2": 5})
    assert other.outcome == "other"
    assert other.largest > 0.01


def test_a_version_that_went_on_from_another_is_made_after_it(loop: Loop) -> None:
    """Its training state is kept nowhere; made of another state, weights would differ and nobody would know why."""
    found, jobs = rebuild(loop, "v3", {"v2": 1, "v3": 2})
    assert (found.outcome, found.proven, found.chain) == ("same", True, ("v2", "v3"))
    assert [job.state is None for job in jobs] == [True, False]
    rows = read_snapshot(jobs[1].snapshot).dataset
    assert {event_id for event_id, new in zip(rows["event_id"], rows["new"], strict=True) if not new}
    with pytest.raises(CannotRebuild, match="state of v2, which did not come out bit for bit"):
        rebuild(loop, "v3", {"v2": 5, "v3": 2})


def test_an_event_that_the_store_let_go_of_is_read_back(loop: Loop) -> None:
    """The replay policy forgets events; the log has them for its retention, and a version is not lost before."""
    trained = [row.event_id for row in loop.store.examples(STREAM, exam=False) if row.trained_in == 1]
    loop.evict(trained[0])
    found, _ = rebuild(loop, "v2", {"v2": 1})
    assert (found.outcome, found.proven) == ("same", True)
    assert found.notes[0] == "1 events were read back from the log"
    loop.log.events.clear()
    with pytest.raises(CannotRebuild, match="let go of 1 of the"):
        rebuild(loop, "v2", {"v2": 1})


def test_what_was_forgotten_or_corrected_is_not_guessed_at(loop: Loop) -> None:
    """A version made of other examples under the same name would be a lie about where the first came from."""
    trained = [row.event_id for row in loop.store.examples(STREAM, exam=False) if row.trained_in == 1]
    loop.label(trained[0], "another")
    with pytest.raises(CannotRebuild, match="1 of the examples that it or its ancestors were trained on"):
        rebuild(loop, "v2", {"v2": 1})
    with pytest.raises(CannotRebuild, match="a base version"):
        rebuild(loop, "v1", {})
