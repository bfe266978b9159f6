"""Labels set aside, released, dropped; classes renamed and merged: each exactly, in one transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from learner.app import LearnerApp
from learner.control import Refused
from learner.curation import BURST, UNTRUSTED
from learner.encoders import Encoder, build_telemetry_encoder
from learner.heads import dequantise
from learner.online import EncoderShelf, OnlineLearner
from learner.trust import TrustSettings
from replay.store import Held
from stream.events import Record
from tests.learner.desk import CHANNELS, STREAM, Desk

CLASSES = [f"class {letter}" for letter in "abcdef"]
WATCHFUL = TrustSettings(every_labels=100, window=1_000)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(**options: Any) -> Desk:
        made.append(Desk(tmp_path / str(len(made)), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def honest(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    chance = np.random.default_rng(seed)
    return [(name, name, str(chance.choice(["ann", "bob"]))) for name in chance.choice(CLASSES, count)]


def flipped(rows: list[tuple[str, str, str]], share: float, seed: int = 1) -> list[tuple[str, str, str]]:
    """Bob says another class for this share of his events."""
    chance = np.random.default_rng(seed)
    return [
        (true, str(chance.choice([n for n in CLASSES if n != true])), who)
        if who == "bob" and chance.random() < share
        else (true, said, who)
        for true, said, who in rows
    ]


# Trust


def test_honest_labellers_change_nothing(desk: Callable[..., Desk]) -> None:
    """Whoever never lies must not notice that somebody watches: the same store and head, bit for bit."""
    watched, unwatched = desk(trust=WATCHFUL), desk()
    for one in (watched, unwatched):
        one.say(honest(600))
    assert watched.store.quarantined() == []
    assert watched.learner.sums == unwatched.learner.sums
    assert watched.curator.standings(STREAM)["bob"].judged > 100, "nothing was reviewed"


def test_a_labeller_who_turned_bad_is_set_aside_with_what_it_taught(desk: Callable[..., Desk]) -> None:
    """The lies are found, few honest labels go with them, and the head is as if they had never been said."""
    one = desk(trust=WATCHFUL)
    rows = honest(400) + flipped(honest(800, 2), 0.4)
    ids = one.say(rows)
    lies = {event for event, (true, said, _) in zip(ids, rows, strict=True) if true != said}
    aside = one.store.quarantined(limit=10_000)
    assert {row.label.labeller for row in aside} == {"bob"}
    assert {row.reason for row in aside} == {UNTRUSTED}
    assert len({row.label.event_id for row in aside} & lies) > 0.9 * len(lies)
    assert len({row.label.event_id for row in aside} - lies) < 0.05 * len(rows)
    (doubt,) = one.store.doubts(STREAM)
    assert doubt.labeller == "bob"
    assert "contradicted" in doubt.why
    assert one.head_due()


def test_a_burst_that_poisons_one_class_is_set_aside(desk: Callable[..., Desk]) -> None:
    """Fifty events of all classes named as one: these labels go, the labeller stays."""
    one = desk(trust=WATCHFUL)
    one.say(honest(400))
    chance = np.random.default_rng(5)
    poison = one.say([(str(chance.choice(CLASSES[1:])), CLASSES[0], "bob") for _ in range(60)])
    one.say(honest(100, 3))
    aside = one.store.quarantined()
    assert {row.reason for row in aside} == {BURST}
    assert {row.label.event_id for row in aside} <= set(poison)
    assert len(aside) > 50
    assert one.store.doubts(STREAM) == []
    assert one.head_due()


def test_a_new_class_is_no_burst(desk: Callable[..., Desk]) -> None:
    """A class that nobody knew comes at once and by one labeller; taking it for poison would forbid growth."""
    one = desk(trust=WATCHFUL)
    one.say(honest(400))
    one.say([("class new", "class new", "bob")] * 100 + honest(100, 3))
    assert one.store.quarantined() == []


def test_a_reviewed_store_does_not_depend_on_the_order(desk: Callable[..., Desk]) -> None:
    """The same messages in two orders, then a review: one store, one head."""
    rows = honest(300) + flipped(honest(300, 2), 0.5)
    heads = []
    for order in (1, -1):
        one = desk()
        made = [(one.event(true), said, who) for true, said, who in rows]
        records = [
            one.record(message)
            for answer, said, who in made
            for message in (answer, one.label(answer.event_id, said, who))
        ]
        one.step(records[::order])
        one.curator._trust = {STREAM: WATCHFUL}
        assert one.curator.review(STREAM) > 30
        heads.append((one.learner.sums, {row.label.event_id for row in one.store.quarantined()}))
    assert heads[0] == heads[1]


# Quarantine


def test_a_released_labeller_is_believed_and_its_labels_stay(desk: Callable[..., Desk]) -> None:
    """What a person let through is not set aside again by the next review."""
    one = desk(trust=WATCHFUL)
    one.say(honest(400) + flipped(honest(400, 2), 0.4))
    waiting = {row.label.event_id: row.label.label for row in one.store.quarantined(limit=10_000)}
    assert waiting
    message = one.curator.release(STREAM, Held(labeller="bob"))
    assert "bob is believed again" in message
    assert one.store.doubts(STREAM) == []
    assert one.store.quarantined() == []
    assert {event: one.learned()[event] for event in waiting} == waiting
    assert one.head_due()
    one.curator.review(STREAM)
    assert {row.label.event_id for row in one.store.quarantined()}.isdisjoint(waiting)


def test_a_released_label_is_joined_like_a_new_one(desk: Callable[..., Desk]) -> None:
    """A later label of the same labeller still counts, and one beyond the quota becomes a class."""
    one = desk(max_new_classes_a_day=1)
    first, second = one.say([("x", "x", "ann"), ("y", "y", "ann")])
    assert one.learned() == {first: "x"}
    one.step([one.label(second, "x", "ann", second=10_000)])
    assert "1 label released" in one.curator.release(STREAM, Held(label="y"))
    assert one.learned() == {first: "x", second: "x"}, "the later label counts"
    assert one.store.quarantined() == []
    with pytest.raises(Refused, match="no such label"):
        one.curator.release(STREAM, Held(label="y"))


def test_release_keeps_to_the_limit_of_all_classes(desk: Callable[..., Desk]) -> None:
    """`--all` after a flood of invented names must not make a class of each."""
    one = desk(max_classes=3, max_new_classes_a_day=1)
    one.say([(name, name, "ann") for name in ("p", "q", "r", "s", "t")])
    message = one.curator.release(STREAM, Held())
    assert message == "2 labels released; 2 stay, the stream has its 3 classes"
    assert set(one.store.classes(STREAM)) == {"p", "q", "r"}


def test_dropped_labels_are_gone(desk: Callable[..., Desk]) -> None:
    """Dropping is for good, and only for what was named."""
    one = desk(max_new_classes_a_day=1)
    one.say([(name, name, "ann") for name in ("p", "q", "r")])
    assert one.curator.drop(STREAM, Held(label="q")) == "1 label dropped"
    assert [row.label.label for row in one.store.quarantined()] == ["r"]
    with pytest.raises(Refused, match="no such label"):
        one.curator.drop(STREAM, Held(label="q"))


def test_the_page_says_what_waits_and_how_labellers_stand(desk: Callable[..., Desk]) -> None:
    """What the command line prints comes from here; a page reads on where the one before ended."""
    one = desk(trust=WATCHFUL)
    one.say(honest(400) + flipped(honest(400, 2), 0.4))
    app: Any = SimpleNamespace(
        parts=SimpleNamespace(store=one.store, curator=one.curator, learners={STREAM: one.learner})
    )
    page = LearnerApp._quarantine(app, STREAM, {"labeller": "bob", "limit": "5"})
    assert page["waiting"] == {UNTRUSTED: len(one.store.quarantined(limit=10_000))}
    assert len(page["labels"]) == 5
    assert {"id", "reason", "detail", "event_id", "label", "labeller", "labelled_at"} <= page["labels"][0].keys()
    rest = LearnerApp._quarantine(app, STREAM, {"after": str(page["labels"][-1]["id"])})
    assert len(rest["labels"]) == page["waiting"][UNTRUSTED] - 5
    standing = {row["labeller"]: row for row in page["labellers"]}
    assert standing["ann"]["believed"]
    assert not standing["bob"]["believed"]
    with pytest.raises(Refused, match="whole numbers"):
        LearnerApp._quarantine(app, STREAM, {"after": "x"})
    one.say([("class a", "Class A", "ann")])
    alike = {row["class"]: row["alike"] for row in LearnerApp._classes(app, STREAM)}
    assert alike["class a"] == ["Class A"]
    assert alike["class b"] == []


def test_no_field_of_a_label_stands_for_one_of_the_page(desk: Callable[..., Desk]) -> None:
    """A person releases by the id that is shown: a sender that names one would have other labels released."""
    one = desk(max_new_classes_a_day=0)
    forged = {
        "id": 7,
        "reason": "fine",
        "detail": "fine",
        "place": "here",
        "set_aside_at": "never",
        "more": float("inf"),
    }
    sent = one.record(one.label("e1", "new", "bob"))
    told = {**json.loads(sent.value or b""), **forged}
    one.step([sent._replace(value=json.dumps(told).encode())])
    app: Any = SimpleNamespace(
        parts=SimpleNamespace(store=one.store, curator=one.curator, learners={STREAM: one.learner})
    )
    (row,) = LearnerApp._quarantine(app, STREAM, {})["labels"]
    (held,) = one.store.quarantined()
    assert (row["id"], row["reason"], row["place"]) == (held.id, "class_quota", held.place)
    assert "more" not in row


def test_the_learner_lets_go_of_what_it_counted_beyond_the_bound(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small step at a time, until the index is as large as it may be, and no further."""
    one = desk()
    one.step([one.event("x") for _ in range(12)])
    monkeypatch.setattr("learner.app.PURGED_AT_ONCE", 3)
    one.store.settings = one.store.settings.model_copy(update={"index_size": 7})
    app: Any = SimpleNamespace(
        parts=SimpleNamespace(store=one.store, epoch=one.epoch), _clock=lambda: one.now, _indexed=12
    )
    assert [LearnerApp._purge_index(app) for _ in range(3)] == [True, False, False]
    assert (app._indexed, one.store.sizes()["served"]) == (7, 7)


# By hand


def test_a_label_given_by_hand_is_a_label_like_any_other(desk: Callable[..., Desk]) -> None:
    """It goes by the topic, so that whoever reads labels sees it, and it is learned, corrected and forgotten alike."""
    one = desk()
    first, second = one.event("class a", "class b"), one.event("class a")
    one.step([first, second])
    message = one.curator.label(STREAM, [first.event_id, "e99"], "  class a ", "ada")
    assert message == "2 events labelled 'class a' by ada; of 1 no answer is known yet, and its label waits for it"
    assert one.learned() == {}, "nothing is learned but what was read from the topic"
    sent = [out for out in one.store.outbox() if out.topic == "labels"]
    assert [out.key for out in sent] == [b"e0", b"e99"]
    one.step([Record("labels", 0, offset, out.key, out.value) for offset, out in enumerate(sent)])
    assert one.learned() == {first.event_id: "class a"}
    assert one.store.scores(STREAM)[0].label == "class a"
    for wrong in ("x" * 129, "a\nb", " "):
        with pytest.raises(Refused, match="label"):
            one.curator.label(STREAM, [second.event_id], wrong, "ada")


# Names


def test_a_merged_class_is_as_if_it_had_been_named_so(desk: Callable[..., Desk]) -> None:
    """Store, head, exam, scores and class list equal those of a stream that knew one name from the start."""
    mixed, plain = desk(), desk()
    for one in (mixed, plain):
        for half in (range(20), range(20, 40)):
            messages = []
            for at in half:
                name = "Powr" if one is mixed and at % 3 == 0 else "Power"
                answer, other = one.event("power", served=name if at > 20 else None), one.event("thermal", "thermal")
                messages += [answer, one.label(answer.event_id, name), other, one.label(other.event_id, "thermal")]
            one.step(messages)
    message = mixed.curator.rename(STREAM, "Powr", "Power", merge=True)
    assert "14 labelled events" in message
    for one in (mixed, plain):
        late = one.event("power", served="Powr" if one is mixed else "Power")
        one.step([late, one.label(late.event_id, "Powr" if one is mixed else "Power")])
        assert one.head_due()
    assert mixed.learner.sums == plain.learner.sums
    assert mixed.learned() == plain.learned()
    assert list(mixed.store.classes(STREAM)) == list(plain.store.classes(STREAM)) == ["Power", "thermal"]
    assert mixed.store.scores(STREAM) == plain.store.scores(STREAM)
    assert mixed.store.class_counts(STREAM, exam=True) == plain.store.class_counts(STREAM, exam=True)
    assert mixed.learner.serving.head is not None
    assert mixed.learner.serving.head.classes == ("Power", "thermal")


@pytest.mark.parametrize("seed", range(4))
def test_labels_in_any_order_among_renames_end_in_the_final_names(desk: Callable[..., Desk], seed: int) -> None:
    """A correction or a withdrawal that names a class as it was called once must hit what was learned of it."""
    chance, one = np.random.default_rng(seed), desk()
    letters = list("abcdefgh")
    said: dict[tuple[str, str], tuple[tuple[int, int], str | None]] = {}
    served: dict[str, str] = {}
    now: dict[str, str] = {}
    waiting: list[Any] = []
    for _ in range(120):
        labels = len(said)
        match chance.choice(["event", "label", "label", "label", "predict", "rename"]):
            case "event":
                answer = one.event(str(chance.choice(letters)), served=str(chance.choice(letters)))
                waiting.append(answer)
            case "label" if one.truth:
                event, who = str(chance.choice(list(one.truth))), str(chance.choice(["ann", "bob"]))
                name = None if chance.random() < 0.2 else str(chance.choice(letters))
                second, place = int(chance.integers(20)), one._next["labels"]
                one.step([one.label(event, name, who, second)])
                order = second, place
                if (event, who) not in said or said[event, who][0] < order:
                    said[event, who] = order, None if name is None else now.get(name, name)
            case "predict" if waiting:
                answer = waiting.pop(int(chance.integers(len(waiting))))
                served[answer.event_id] = now.get(str(answer.label), str(answer.label))
                one.step([answer])
            case "rename" if labels:
                old, new = (str(name) for name in chance.choice(letters, 2))
                try:
                    one.curator.rename(STREAM, old, new, merge=new in one.store.classes(STREAM))
                except Refused:
                    continue
                said = {key: (order, new if name == old else name) for key, (order, name) in said.items()}
                served = {event: new if name == old else name for event, name in served.items()}
                now.pop(new, None)
                now = {name: new if into == old else into for name, into in now.items()} | {old: new}
    final: dict[str, str] = {}
    for event in served:
        live = [(order[0], who, name) for (key, who), (order, name) in said.items() if key == event and name]
        if live:
            final[event] = max(live)[2]
    assert final
    assert one.learned() == final
    assert one.head_due()
    assert {row.event_id: (row.label, row.predicted) for row in one.store.scores(STREAM)} == {
        event: (name, served[event]) for event, name in final.items()
    }
    assert one.store.aliases(STREAM) == now


def test_a_merge_counts_votes_anew(desk: Callable[..., Desk]) -> None:
    """Two labellers who meant the same by two names outvote the third once the names are one."""
    one = desk(rule="majority")
    answer = one.event("x")
    one.step(
        [
            answer,
            one.label(answer.event_id, "pump fault", "ann", 1),
            one.label(answer.event_id, "Pump-fault", "bob", 2),
            one.label(answer.event_id, "valve", "eve", 3),
        ]
    )
    assert one.learned() == {answer.event_id: "valve"}
    one.curator.rename(STREAM, "Pump-fault", "pump fault", merge=True)
    assert one.learned() == {answer.event_id: "pump fault"}
    assert one.head_due()


def test_a_renamed_class_keeps_its_best_recall_and_follows_further(desk: Callable[..., Desk]) -> None:
    """Forgetting is measured against the class's own past; a second rename must not strand the first name."""
    one = desk()
    one.say([("x", "old", "ann")] * 3 + [("y", "other", "ann")])
    with one.store.transaction(one.epoch, one.now) as tx:
        tx.raise_best_recall(STREAM, {"old": 0.9})
    one.curator.rename(STREAM, "old", "newer", merge=False)
    one.curator.rename(STREAM, "newer", "newest", merge=False)
    assert one.store.best_recall(STREAM) == {"newest": 0.9}
    assert one.store.aliases(STREAM) == {"newer": "newest", "old": "newest"}
    one.say([("x", "old", "ann"), ("x", "newer", "ann")])
    assert set(one.learned().values()) == {"newest", "other"}
    one.curator.rename(STREAM, "newest", "old", merge=False)
    assert one.store.aliases(STREAM) == {"newer": "old", "newest": "old"}


@pytest.mark.parametrize(
    ("old", "new", "merge", "why"),
    [
        ("nothing", "x", True, "no class 'nothing'"),
        ("x", "y", False, "merge the two instead"),
        ("x", "z", True, "rename it instead"),
        ("x", "x", True, "the same"),
        ("x", " ", False, "1 to 128 characters"),
    ],
)
def test_renaming_refuses_what_it_cannot_mean(
    desk: Callable[..., Desk], old: str, new: str, merge: bool, why: str
) -> None:
    """A merge cannot be undone, so nothing is guessed."""
    one = desk()
    one.say([("x", "x", "ann"), ("y", "y", "ann")])
    with pytest.raises(Refused, match=why):
        one.curator.rename(STREAM, old, new, merge=merge)
    assert one.learned() == {"e0": "x", "e1": "y"}


# Bad input


def test_all_labels_withdrawn_leaves_a_stream_that_knows_nothing(desk: Callable[..., Desk]) -> None:
    """Not an error: the head has no class, the revision says so, and the next label begins anew."""
    one = desk()
    ids = one.say(honest(60))
    one.learner.announce(one.now)
    assert one.learner.serving.head is not None
    one.step([one.label(event, None, who, second=10_000) for event, (_, _, who) in zip(ids, honest(60), strict=True)])
    assert one.learner.sums.total == 0
    assert not one.learner.sums.gram.any()
    assert one.learned() == {}
    assert one.store.scores(STREAM) == []
    assert one.learner.announce(one.now)
    assert one.learner.serving.head is None
    one.say([("class a", "class a", "ann")])
    assert one.learner.announce(one.now)
    assert one.learner.serving.head is not None
    assert one.learner.serving.head.classes == ("class a",)


def test_a_thousand_classes_in_one_day(desk: Callable[..., Desk]) -> None:
    """The day's quota becomes classes, the rest waits with its reason, and the head answers for all it has."""
    one = desk()
    one.say([("x", f"name {at}", "ann") for at in range(1_000)], batch=500)
    assert len(one.learner.sums.counts) == 200
    assert one.store.quarantine_counts(STREAM) == {"class_quota": 800}
    assert one.learner.announce(one.now)
    head = one.learner.serving.head
    assert head is not None
    assert len(head.classes) == 200
    assert np.isfinite(head.weight).all()
    assert one.curator.release(STREAM, Held()) == "800 labels released"
    assert len(one.learner.sums.counts) == 1_000


def test_invented_names_cost_no_more_than_others(desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    """A labeller that invents a name for every label fills the quarantine to its bound, and nothing else."""
    one = desk(max_classes=50)
    asked: list[int] = []
    known = one.store.known_classes
    monkeypatch.setattr(one.store, "known_classes", lambda s, names: asked.append(len(names)) or known(s, names))
    monkeypatch.setattr(one.store, "classes", lambda stream: pytest.fail("a batch reads every class there is"))
    for start in range(0, 3_000, 500):
        one.step([one.label(f"e{at}", f"invented {at}") for at in range(start, start + 500)])
    assert max(asked) <= 500
    assert one.store.class_total(STREAM) == 50
    assert one.store.quarantine_counts(STREAM) == {"class_quota": 2_950}
    with one.store.transaction(one.epoch, one.now) as tx:
        assert tx.purge().quarantine == 1_950
    assert [row.label.label for row in one.store.quarantined(limit=1)] == ["invented 2000"]


def test_the_first_label_of_a_new_class_makes_it_answer_at_once(desk: Callable[..., Desk]) -> None:
    """No second label, no fine-tune, no restart: the next event like it is answered by its name."""
    one = desk()
    one.say([(name, name, "ann") for name in ("class a", "class b") for _ in range(30)])
    assert one.learner.announce(one.now)
    one.say([("never seen", "never seen", "ann")])
    assert one.learner.announce(one.now), "the guard knows that a young class may rise"
    asked = [one.event("never seen") for _ in range(10)]
    embedded = one.joiner.embedded(STREAM, {event.event_id: event.ref for event in asked})
    head, bound = one.learner.serving.head, one.learner.encoder.spec.bound
    assert head is not None
    found = head.predict(dequantise(np.stack(list(embedded.values())), bound))
    assert found.count("never seen") >= 8


def test_a_base_model_whose_size_changed_waits_for_a_fine_tune(desk: Callable[..., Desk], tmp_path: Path) -> None:
    """What was learned is in the old one's space: it goes on answering, and nothing of both sizes is mixed."""
    one = desk()
    one.say([(name, name, "ann") for name in ("class a", "class b") for _ in range(15)])
    assert one.learner.announce(one.now)
    before, sums = one.learner.serving, one.learner.sums.copy()

    def larger() -> Encoder:
        return build_telemetry_encoder(CHANNELS, 0, window=8, dimension=64, learned=4)

    plan = replace(one.learner.plan, base=larger)
    epoch = one.store.claim("again", one.now)
    registry = one.learner._registry
    again = OnlineLearner(plan, one.store, registry, EncoderShelf(registry, "cpu"), epoch, "versions", one.metrics)
    again.open(one.now)
    assert again.encoder.spec.dimension == 32
    assert again.sums == sums
    assert again.serving.encoder == before.encoder
    assert again.announce(one.now)
    assert again.serving.head is not None
    assert again.serving.head.dimension == 32
