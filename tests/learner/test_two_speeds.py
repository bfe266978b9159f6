"""Two speeds of learning, one model: labels go on arriving while a fine-tune runs, and neither undoes the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from learner import online
from learner.heads import dequantise
from replay.policy import ReplaySettings
from replay.store import StoreSettings
from tests.learner.loop import STREAM, Loop, embedding, encoder

Run = Callable[[Callable[[], None]], str | None]


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path, StoreSettings(exam_from=4, exam_one_in=3))
    made.teach(*(f"{kind}{n}" for kind in ("calm", "storm") for n in range(10)))
    made.learner.announce(made.now)
    yield made
    made.close()


@pytest.fixture
def run(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda meanwhile: loop.run(monkeypatch, 1, meanwhile)


def taught(loop: Loop, kind: str) -> str:
    """An event of the kind that the head was taught, and the exam was not given."""
    present = loop.store.present(STREAM)
    return min(event_id for event_id, (_, exam) in present.items() if event_id.startswith(kind) and not exam)


def answer(loop: Loop, event_id: str, seed: int = 1) -> str:
    """What the revision in service says of an event."""
    head = loop.learner.serving.head
    assert head is not None
    return head.predict(dequantise(embedding(event_id, seed)[None, :], encoder(seed).spec.bound))[0]


def promoted(loop: Loop) -> None:
    """The version in service has the new encoder, and exactly the head that the store makes under it."""
    assert loop.learner.version == "v2"
    assert loop.learner.sums == loop.rebuilt(1)
    examples = loop.store.examples(STREAM)
    assert {example.encoder for example in examples} == {loop.learner.encoder_digest}
    assert all((example.embedding == embedding(example.event_id, 1)).all() for example in examples)


def test_a_class_taught_during_a_run_is_known_after_it(loop: Loop, run: Run) -> None:
    """An operator who named a new fault a minute before the promotion must not have to do it again."""
    assert run(lambda: loop.teach("flare1", "flare2")) == "promoted"
    promoted(loop)
    assert loop.learner.sums.counts["flare"] == 2
    assert answer(loop, "flare1") == "flare"


def test_a_whole_class_with_an_exam_of_its_own_may_come_during_a_run(loop: Loop, run: Run) -> None:
    """The candidate is asked for it, as the champion is, because by then its head was taught it as well."""
    assert run(lambda: loop.teach(*(f"flare{n}" for n in range(12)))) == "promoted"
    promoted(loop)
    verdict = loop.registry.version(STREAM, "v2").verdict
    assert verdict is not None
    assert "flare" in {outcome.label for outcome in verdict.classes}


def test_a_correction_during_a_run_is_not_undone(loop: Loop, run: Run) -> None:
    """The encoder was trained on the wrong label, which is said; the head was not."""
    wrong = taught(loop, "calm")
    assert run(lambda: loop.label(wrong, "storm")) == "promoted"
    promoted(loop)
    assert loop.store.present(STREAM)[wrong][0] == "storm"
    (version,) = (version for version in loop.store.versions(STREAM) if version.number == 2)
    assert version.detail["forgotten"] == 1
    assert "trained on 1 labels that were corrected or withdrawn meanwhile" in version.detail["reasons"][-1]
    assert loop.registry.version(STREAM, "v2").lineage.settings["labels_changed_meanwhile"] == 1


def test_a_withdrawal_during_a_run_is_not_undone(loop: Loop, run: Run) -> None:
    """What a labeller takes back while a machine works on it must not come back when the machine is done."""
    taken = taught(loop, "calm")
    assert run(lambda: loop.label(taken, None)) == "promoted"
    promoted(loop)
    assert taken not in loop.store.present(STREAM)
    assert "labels_changed_meanwhile" in loop.registry.version(STREAM, "v2").lineage.settings


def test_a_class_that_was_withdrawn_during_a_run_is_gone(loop: Loop, run: Run) -> None:
    """A head from the snapshot would know it still, and the champion would be blamed for not knowing it."""
    loop.teach("flare1", "flare2")
    loop.learner.announce(loop.now)

    def withdraw() -> None:
        loop.label("flare1", None)
        loop.label("flare2", None)
        loop.learner.announce(loop.now)

    assert run(withdraw) == "promoted"
    promoted(loop)
    assert "flare" not in loop.learner.sums.counts


def test_examples_that_came_during_a_run_are_embedded_before_the_promotion(
    loop: Loop, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learners' thread must not stop learning to embed what the trainer's can."""
    given: list[set[str]] = []
    put = loop.learner.put_in_service

    def watched(manifest: object, embeddings: dict[str, object], *rest: object, **named: object) -> None:
        given.append(set(embeddings))
        put(manifest, embeddings, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.learner, "put_in_service", watched)
    assert run(lambda: loop.teach("calm20", "storm20")) == "promoted"
    assert given == [set(loop.store.present(STREAM))]
    promoted(loop)


def test_the_exam_asks_for_the_label_as_it_is_now(loop: Loop, run: Run) -> None:
    """An exam that still holds the wrong label blames whoever learned the right one."""
    present = loop.store.present(STREAM)
    examined = min(event_id for event_id, (_, exam) in present.items() if exam)
    right = "storm" if present[examined][0] == "calm" else "calm"
    run(lambda: loop.label(examined, None))
    verdict = loop.registry.version(STREAM, "v2").verdict
    assert verdict is not None
    now = [label for label, exam in loop.store.present(STREAM).values() if exam]
    assert verdict.n == len(now) == sum(exam for _, exam in present.values()) - 1
    assert right in {outcome.label for outcome in verdict.classes}


def test_a_candidate_knows_the_classes_that_its_snapshot_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head that goes into service is taught by the whole store; the one that is examined must be as well."""
    loop = Loop(tmp_path, StoreSettings(exam_from=4, exam_one_in=3), ReplaySettings(size=2))
    kinds = ("calm", "flare", "storm")
    loop.teach(*(f"{kind}{n}" for kind in kinds for n in range(8)))
    assert loop.run(monkeypatch, 1) == "promoted"
    loop.learner.announce(loop.now)
    loop.teach("calm20")
    assert {example.label for example in loop.store.experience(STREAM)} < set(kinds)
    assert loop.run(monkeypatch, 2) == "promoted"
    assert set(loop.learner.sums.counts) == set(kinds)
    assert loop.learner.sums == loop.rebuilt(2)
    loop.close()


def test_a_version_descends_from_the_encoder_it_was_trained_from(
    loop: Loop, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback during a run changes what is in service, not where the candidate's weights come from."""
    assert run(lambda: None) == "promoted"
    first = loop.registry.version(STREAM, "v1")
    loop.run(monkeypatch, 2, lambda: loop.learner.put_in_service(first, {}, "rollback", loop.now))
    assert loop.registry.version(STREAM, "v3").parent == "v2"


# The guard


def poison(loop: Loop, watched: bool) -> list[str]:
    """Calm events called storm, a few at a time; why the revision after one of these steps was held."""
    held: list[str] = []
    victims = [e for e, (_, exam) in loop.store.present(STREAM).items() if e.startswith("calm") and not exam]
    for start in range(0, len(victims) - 2, 2):
        for event_id in victims[start : start + 2]:
            loop.label(event_id, "storm")
        if not watched:
            loop.learner._best = None
        if not loop.learner.announce(loop.now):
            held += loop.learner.held
    return held


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """A stream whose exam is large enough to tell."""
    return Loop(tmp_path_factory.mktemp("grown"), StoreSettings(exam_from=4, exam_one_in=2))


@pytest.mark.parametrize("watched", [True, False])
def test_many_small_steps_down_are_seen(grown: Loop, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step passes the comparison with the one before; together they unlearn a class.

    The head is one that gives way slowly: with means shrunk together, two classes that hardly differ any more
    become one at a single step, which the comparison with the one before does see.
    """
    monkeypatch.setattr(online, "solve", partial(online.solve, pooled=False))
    grown.empty()
    grown.teach(*(f"{kind}{n}" for kind in ("calm", "storm") for n in range(40)))
    assert grown.learner.announce(grown.now)
    reasons = poison(grown, watched)
    assert any("'calm'" in reason and "since the best revision so far" in reason for reason in reasons) == watched
    assert bool(reasons) == watched, "the steps are too small for the comparison with the one before"


def test_learning_that_is_right_is_not_held(grown: Loop) -> None:
    """New classes come, and one day the same events are rightly called something else: each revision passes."""
    grown.empty()
    held: list[str] = []

    def step(*event_ids: str, label: str | None = None) -> None:
        grown.teach(*event_ids, label=label)
        if not grown.learner.announce(grown.now):
            held.extend(grown.learner.held)

    for first, kind in enumerate(("calm", "storm", "flare", "quiet")):
        for start in range(0, 24, 6):
            step(*(f"{kind}{n + first}" for n in range(start, start + 6)))
    assert held == []
    for start in range(100, 148, 6):
        step(*(f"calm{n}" for n in range(start, start + 6)), label="breeze")
    assert grown.learner.announce(grown.now) or grown.learner.held == []
    assert answer(grown, "calm500", seed=0) == "breeze"


def test_the_best_revision_is_remembered_over_a_restart(grown: Loop) -> None:
    """Otherwise each restart would make the decline so far the new standard."""
    grown.empty()
    grown.teach(*(f"{kind}{n}" for kind in ("calm", "storm") for n in range(12)))
    assert grown.learner.announce(grown.now)
    best = grown.learner._best
    assert best is not None
    grown.teach("storm50")
    grown.learner.announce(grown.now)
    grown.start()
    assert grown.learner._best is not None
    assert grown.learner._best[0] == best[0]
