"""Unlearning: the head as if it never was, no trace in the database, and a word on what cannot be reached."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learner.unlearning import Erasure, forget
from replay.policy import ReplaySettings, eligible
from replay.store import StoreSettings
from tests.learner.loop import STREAM, Loop, embedding, window

POOR = StoreSettings(exam_from=10**6)
RICH = StoreSettings(exam_from=2, exam_one_in=2)
EVENTS = ("calm1", "calm2", "calm3", "storm1", "storm2", "storm3")


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path, POOR)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, tuple[Loop, Loop]]]:
    """By whether classes give to the exam: two loops that the property tests empty and use again."""
    made = {
        exam: (Loop(tmp_path_factory.mktemp("one"), rules), Loop(tmp_path_factory.mktemp("other"), rules))
        for exam, rules in ((False, POOR), (True, RICH))
    }
    yield made
    for pair in made.values():
        for one in pair:
            one.close()


def erase(loop: Loop, *event_ids: str) -> Erasure:
    return forget(event_ids, loop.learner, loop.trainer, loop.store, loop.now)


def traces(loop: Loop, event_id: str, seeds: tuple[int, ...] = (0,)) -> list[str]:
    """What of an event is found in the database's files."""
    content = loop.bytes()
    wanted = {"id": event_id.encode(), "window": window(event_id).tobytes()}
    wanted |= {f"embedding {seed}": embedding(event_id, seed).tobytes() for seed in seeds}
    return [name for name, value in wanted.items() if value in content]


def lines(places: tuple[str, ...], start: str) -> str:
    """The one line that begins so."""
    (found,) = (place for place in places if place.startswith(start))
    return found


OPERATIONS = st.one_of(
    st.tuples(st.just("teach"), st.sampled_from(EVENTS), st.sampled_from(["calm", "storm", "flare"])),
    st.tuples(st.just("label"), st.sampled_from(EVENTS), st.sampled_from(["calm", "storm", "flare", None])),
    st.tuples(st.sampled_from(["forget", "evict"]), st.sampled_from(EVENTS), st.none()),
    st.tuples(st.just("rebase"), st.sampled_from([0, 1]), st.none()),
    st.tuples(st.sampled_from(["save", "restart"]), st.none(), st.none()),
)


def carry_out(loop: Loop, operation: str, what: str | int | None, label: str | None) -> None:
    match operation:
        case "teach":
            loop.teach(str(what), label=label)
        case "label":
            loop.label(str(what), label)
        case "evict":
            loop.evict(str(what))
        case "forget":
            erase(loop, str(what))
        case "rebase":
            loop.rebase(int(what or 0))
        case "save":
            loop.learner.save(loop.now)
            loop.now += timedelta(minutes=2)
            loop.learner.save(loop.now)
        case "restart":
            loop.start()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    exam=st.booleans(),
    operations=st.lists(OPERATIONS, min_size=6, max_size=18),
    last=st.sampled_from(EVENTS),
)
def test_whatever_happened_a_forgotten_event_never_was(
    pairs: dict[bool, tuple[Loop, Loop]],
    exam: bool,
    operations: list[tuple[str, str | int | None, str | None]],
    last: str,
) -> None:
    """Taught, corrected, let go of, embedded anew and forgotten in any order: the head is that of the survivors."""
    told, spared = pairs[exam]
    told.empty()
    spared.empty()
    # Which examples enter the exam depends on which still have their event, so the two are tried apart.
    operations = [*(row for row in operations if not (exam and row[0] == "evict")), ("forget", last, None)]
    gone = {what for operation, what, _ in operations if operation == "forget"}
    for operation, what, label in operations:
        carry_out(told, operation, what, label)
        if what not in gone:
            carry_out(spared, operation, what, label)
    assert told.learner.sums == spared.learner.sums
    assert told.followed() == spared.followed()
    assert told.store.present(STREAM) == spared.store.present(STREAM)
    told.start()
    assert told.learner.sums == spared.learner.sums, "a restart must not bring back what the saved sums let go of"
    assert [(event, traces(told, str(event), (0, 1))) for event in sorted(map(str, gone))] == [
        (event, []) for event in sorted(map(str, gone))
    ]


def test_a_label_that_comes_later_does_not_bring_it_back(loop: Loop) -> None:
    """A labeller may be late, and a batch may be read again after a crash: neither knows of the request."""
    loop.teach("calm1", "storm1", "storm2")
    erase(loop, "storm1")
    loop.teach("storm1")
    loop.start()
    loop.label("storm1", "calm", labeller="bob")
    assert loop.learner.sums.counts == {"calm": 1, "storm": 1}
    assert loop.counted("forgotten") == 2
    assert traces(loop, "storm1") == []


def test_an_event_that_was_never_seen_can_be_forgotten_before_it_comes(loop: Loop) -> None:
    """The request may be faster than the stream."""
    assert "nothing was known of it" in erase(loop, "storm1").message
    loop.teach("storm1")
    assert loop.learner.sums.total == 0
    assert "1 forgotten before" in erase(loop, "storm1").message


def test_an_example_of_the_exam_is_forgotten_and_the_exam_filled_by_the_rule(tmp_path: Path) -> None:
    """The exam's examples are copies of events like any other, though no head ever added them."""
    loop = Loop(tmp_path, StoreSettings(exam_from=4, exam_one_in=2))
    loop.teach(*(f"calm{n}" for n in range(4)))
    exam = {event_id for event_id, (_, is_exam) in loop.store.present(STREAM).items() if is_exam}
    assert exam
    report = erase(loop, min(exam))
    assert lines(report.cleaned, "replay store and exam") == "replay store and exam: 1 row"
    assert not any(is_exam for _, is_exam in loop.store.present(STREAM).values()), "three labels are too few for it"
    assert loop.learner.sums == loop.rebuilt(0)
    assert traces(loop, min(exam)) == []
    loop.close()


def test_a_withdrawn_label_leaves_no_embedding_either(loop: Loop) -> None:
    """The ledger adds and subtracts; once sums are kept that hold both, neither row is of any use."""
    loop.teach("calm1", "calm2", "storm1")
    loop.learner.save(loop.now)
    loop.label("storm1", None)
    loop.label("calm2", "storm")
    assert "embedding 0" in traces(loop, "storm1")
    loop.now += timedelta(minutes=2)
    loop.learner.save(loop.now)
    loop.store.shed_deleted()
    assert traces(loop, "storm1") == ["id"], "the label's row stays, so that an older label does not come back"
    assert loop.followed() == loop.learner.sums
    before = loop.learner.sums
    loop.start()
    assert loop.learner.sums == before


def test_versions_trained_on_it_are_marked_and_those_made_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes a version again from its snapshot must learn that he cannot, and of how many examples."""
    loop = Loop(tmp_path, StoreSettings(exam_from=4, exam_one_in=3), ReplaySettings(size=100))
    loop.teach(*(f"{kind}{n}" for kind in ("calm", "storm") for n in range(12)))
    taught = sorted(event_id for event_id, (_, exam) in loop.store.present(STREAM).items() if not exam)
    assert loop.run(monkeypatch, 1) == "promoted"
    late = next(f"calm{n}" for n in range(20, 40) if not _eligible(loop, f"calm{n}"))
    loop.teach(late)
    assert loop.run(monkeypatch, 2) == "promoted"
    report = erase(loop, taught[0])
    assert marks(loop) == {1: 0, 2: 1, 3: 1}
    assert "v2, v3" in lines(report.not_reached, "encoder weights")
    assert f"`trimtab versions rollback {STREAM} v1`" in lines(report.not_reached, "encoder weights")
    erase(loop, late)
    assert marks(loop) == {1: 0, 2: 1, 3: 2}
    loop.label(taught[1], "storm" if taught[1].startswith("calm") else "calm")
    loop.label(taught[2], None)
    assert marks(loop) == {1: 0, 2: 3, 3: 4}, "a withdrawn or corrected label cannot be trained on again either"
    loop.label(taught[1], None)
    assert marks(loop) == {1: 0, 2: 3, 3: 4}, "an example counts once"
    assert loop.run(monkeypatch, 3) == "promoted"
    assert marks(loop) == {1: 0, 2: 3, 3: 4, 4: 4}, "its weights come from those of v3"
    loop.close()


def _eligible(loop: Loop, event_id: str) -> bool:
    return eligible(loop.store.settings.exam_seed, STREAM, event_id, loop.store.settings.exam_one_in)


def marks(loop: Loop) -> dict[int, int]:
    """How many examples each version has lost."""
    return {version.number: version.detail.get("forgotten", 0) for version in loop.store.versions(STREAM)}


def test_a_run_is_stopped_and_nothing_of_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on would bring the event back as weights, half an hour after it was promised to be gone."""
    loop = Loop(tmp_path, StoreSettings(exam_from=4, exam_one_in=3))
    loop.teach(*(f"{kind}{n}" for kind in ("calm", "storm") for n in range(12)))
    reports: list[Erasure] = []
    jobs = tmp_path / "jobs" / STREAM
    assert loop.run(monkeypatch, 1, lambda: reports.append(erase(loop, "calm3"))) == "stopped"
    assert "run 1 trained on it and is stopped" in lines(reports[0].cleaned, "fine-tunes")
    assert [path.name for path in (jobs / "run-1").iterdir()] == []
    assert marks(loop) == {1: 0}
    assert [wanted.causes[0][0] for wanted in loop.course.requested] == ["hand"], (
        "what was asked for is done without the event"
    )
    loop.course.requested.clear()
    seen: list[Erasure] = []
    assert loop.run(monkeypatch, 1, lambda: seen.append(erase(loop, "unseen1"))) == "promoted"
    assert lines(seen[0].cleaned, "fine-tunes").startswith("fine-tunes: none")
    assert (jobs / "state").exists()
    taught = min(event_id for event_id, (_, exam) in loop.store.present(STREAM).items() if not exam)
    assert lines(erase(loop, taught).cleaned, "strategy's state").endswith("a version was trained on it")
    assert not (jobs / "state").exists()
    loop.close()


def test_a_candidate_is_refused_when_the_event_is_forgotten_while_it_is_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then no process is left to stop."""
    loop = Loop(tmp_path, StoreSettings(exam_from=4, exam_one_in=3))
    loop.teach(*(f"{kind}{n}" for kind in ("calm", "storm") for n in range(12)))
    examine = loop.trainer._examine

    def examined(*args: object) -> object:
        erase(loop, "calm3")
        return examine(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.trainer, "_examine", examined)
    assert loop.run(monkeypatch, 1) == "stopped"
    assert [version.number for version in loop.store.versions(STREAM)] == [1]
    loop.close()


def test_past_the_retention_a_correction_is_counted_and_what_is_fixed_is_said(tmp_path: Path) -> None:
    """A labeller whose correction changes nothing should find it in a number, and a report must not promise it."""
    remembered = StoreSettings(
        exam_from=10**6, correction_horizon=timedelta(days=1), ledger_retention=timedelta(days=3)
    )
    loop = Loop(tmp_path, remembered, ReplaySettings(policy="reservoir", size=2))
    loop.teach(*(f"calm{n}" for n in range(4)))
    loop.learner.save(loop.now + timedelta(days=1))
    loop.learner._removed = True
    loop.now += timedelta(days=9)
    loop.learner.save(loop.now)
    with loop.store.transaction(loop.epoch, loop.now) as tx:
        assert tx.purge().examples == 2
    fixed = sorted({f"calm{n}" for n in range(4)} - set(loop.store.present(STREAM)))
    before = loop.learner.sums.copy()
    loop.label(fixed[0], "storm")
    loop.label(fixed[0], None)
    assert loop.counted("correction_too_late") == 2
    assert loop.learner.sums == before
    report = erase(loop, fixed[0])
    assert "cannot be told apart" in lines(report.not_reached, "instant head")
    loop.rebase(1)
    assert loop.learner.sums == loop.rebuilt(1)
    assert not any("told apart" in line for line in erase(loop, fixed[1]).not_reached)
    loop.close()


def test_a_pinned_revision_that_knows_it_is_named(loop: Loop) -> None:
    """What answers is what users see: a head that was pinned before still has it in its weights."""
    loop.teach("calm1", "calm2", "storm1", "storm2")
    assert loop.learner.announce(loop.now)
    loop.learner.pause(loop.now)
    name = loop.learner.serving.name
    report = erase(loop, "storm1")
    assert lines(report.not_reached, name).endswith("learning is paused; resume it")
    loop.learner.resume(loop.now)
    assert loop.learner.serving.name != name
    assert lines(erase(loop, "storm2").cleaned, "instant head").endswith(f"{loop.learner.serving.name} answers without")


def test_leftovers_of_a_killed_learner_are_swept_at_the_next_start(loop: Loop, tmp_path: Path) -> None:
    """A learner that was killed in the middle of a run leaves its snapshot on the disk."""
    job = tmp_path / "jobs" / STREAM / "run-7"
    (job / "snapshot").mkdir(parents=True)
    (job / "snapshot" / "data.arrow").write_bytes(window("calm1").tobytes())
    (job / "log.txt").write_text("killed\n")
    loop.trainer.start()
    loop.trainer.stop()
    assert [path.name for path in job.iterdir()] == ["log.txt"]
    shutil.rmtree(job)
