"""The demo's numbers: recomputed by hand or by the definition, on messages in any order."""

from __future__ import annotations

import html
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from deploy.report import (
    BLOCK,
    Arrived,
    DemoReport,
    Examined,
    StreamRun,
    accuracy,
    assemble,
    first_predictions,
    forgetting,
    macro_f1,
    render,
    standing_labels,
    summarise,
    write_report,
)
from learner.exam import examine
from stream.events import Label, LabelRequest, Place, Prediction

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(second: float) -> datetime:
    return START + timedelta(seconds=second)


def answer(number: int, label: str | None, version: str = "v1.1", offset: int | None = None) -> Prediction:
    """The prediction of event `e<number>`, made at second `number`."""
    return Prediction(
        event_id=f"e{number}",
        stream="s",
        label=label,
        probabilities={label: 1.0} if label else {},
        novelty=0.0,
        model_version=version,
        ref=Place(topic="t", partition=0, offset=number if offset is None else offset),
        observed_at=at(number),
        predicted_at=at(number),
    )


def told(number: int, label: str | None, second: float, labelled: float | None = None) -> Arrived:
    """A label of event `e<number>` that arrives at a second."""
    made = Label(
        event_id=f"e{number}", stream="s", label=label, labelled_at=at(second if labelled is None else labelled)
    )
    return Arrived(made, at(second))


def run(
    predictions: Sequence[Prediction],
    labels: Sequence[Arrived],
    frozen: Sequence[Prediction] = (),
    events: Sequence[str] | None = None,
) -> StreamRun:
    ids = list(dict.fromkeys(one.event_id for one in predictions)) if events is None else events
    return StreamRun("s", "What is it?", "a test", ids, predictions, labels, frozen)


def test_each_rival_answers_from_what_had_arrived_by_then() -> None:
    """A baseline that saw the future, or was kept from the present, would make learning look bad or good."""
    predictions = [answer(i, label) for i, label in enumerate(["a", "a", "b", "b", "b"])]
    labels = [told(0, "a", 0.5), told(1, "b", 1.5), told(2, "b", 3.5), told(3, "a", 4.5), told(4, "b", 9)]
    report = summarise(run(predictions, labels))
    # no change answers: nothing, a, b, b, b; majority: nothing, a, a, a, b (a tie goes to the first name).
    assert report.accuracy == 3 / 5
    assert report.accuracy_no_change == 2 / 5
    assert report.accuracy_majority == 2 / 5
    assert report.accuracy_frozen is None


def test_a_repeat_is_no_news_and_a_correction_is() -> None:
    """Labels come twice; the last label that arrived must not jump back to an old one."""
    predictions = [answer(i, "x") for i in range(6)]
    repeat = told(0, "a", 0.5)
    labels = [
        repeat,
        told(1, "b", 1.5),
        Arrived(repeat.label, at(2.5)),
        told(2, "z", 20),
        told(3, "b", 21),
        told(0, "c", 3.5),
        told(4, "c", 22),
        told(5, "c", 23),
    ]
    report = summarise(run(predictions, labels))
    # Event 3 is answered b although a was repeated; events 4 and 5 are answered c, the correction.
    assert report.accuracy_no_change == pytest.approx(3 / 6)
    assert standing_labels(labels)["e0"] == "c"


def test_a_withdrawn_label_is_not_scored_and_an_own_label_is_not_peeked_at() -> None:
    """A label may come before a slow prediction; a rival that used it would always be right."""
    early = [told(0, "a", -1), told(1, "b", -0.5), told(2, "b", 0.5), told(2, None, 5)]
    report = summarise(run([answer(0, "a"), answer(1, "a"), answer(2, "a")], early))
    assert report.scored == 2
    # For e0 the last label of another event is b, for e1 it is b of e2.
    assert report.accuracy_no_change == 1 / 2


def test_the_frozen_model_is_the_served_one_until_they_part() -> None:
    """A twin that learned on the first wave and is then asked about it would be flattered."""
    versions = ["v0.0", "v1.1", "v1.2", "v1.3", "v2.0"]
    served = [answer(i, label, versions[i]) for i, label in enumerate([None, "a", "b", "b", "b"])]
    twin = [answer(i, label, "v1.2") for i, label in enumerate(["a", "b", "a", "a"])]
    labels = [told(i, label, 10 + i) for i, label in enumerate(["a", "a", "a", "b", "b"])]
    report = summarise(run(served, labels, twin))
    # Frozen: null, a (served), then a, a, and nothing for the fifth event, which the twin did not answer.
    assert report.accuracy_frozen == 2 / 5
    assert report.accuracy == 3 / 5


def test_the_frozen_model_is_also_judged_on_its_own_classes() -> None:
    """It cannot know a class that came later; both questions are fair, and each has its number."""
    served = [answer(i, label) for i, label in enumerate(["a", "b", "c", "a"])]
    twin = [answer(i, label) for i, label in enumerate(["a", "b", "a", "b"])]
    labels = [told(i, label, 10 + i) for i, label in enumerate(["a", "b", "c", "a"])]
    report = summarise(run(served, labels, twin))
    assert report.accuracy_frozen == 2 / 4
    assert report.accuracy_frozen_on_its_own_classes == 2 / 3
    assert report.accuracy_on_frozen_classes == 1.0
    assert any("classes that the frozen model knows" in sentence for sentence in report.words)


def test_lost_and_duplicated_are_counted_by_event_and_by_place() -> None:
    """They are the promise of the pipeline, so each is counted from what was consumed."""
    predictions = [answer(0, "a"), answer(0, "b"), answer(1, "a"), answer(1, "b", offset=7)]
    report = summarise(run(predictions, [told(0, "a", 5), told(1, "a", 6)], events=["e0", "e1", "e2"]))
    assert (report.events, report.predictions, report.lost, report.duplicated) == (3, 4, 1, 1)
    assert report.scored == 2
    assert report.accuracy == 1.0


def test_a_request_is_answered_by_a_label_that_came_after_it() -> None:
    """A label that was on its way anyway is no answer, and a repeated request is one."""
    predictions = [answer(number, "a") for number in range(3)]
    requests = [
        LabelRequest(
            event_id=one.event_id,
            stream="s",
            ref=one.ref,
            observed_at=one.observed_at,
            why="novel",
            score=0.9,
            label="a",
            model_version="v1.1",
            asked_at=at(5),
        )
        for one in predictions
    ]
    labels = [told(0, "a", 4), told(1, "b", 6), told(1, "a", 7), told(2, None, 8)]
    made = run(predictions, labels)
    made = StreamRun(made.name, made.question, made.source, made.events, predictions, labels, (), (0,), requests * 2)
    report = summarise(made)
    assert (report.requested, report.requests_answered) == (3, 1)


def test_the_exams_verdicts_are_shown_with_their_reasons() -> None:
    """Whether learning forgot something is what the exam is for; a refusal that is not told looks like a failure."""
    truth = ["calm"] * 40 + ["storm"] * 40 + ["<rare>"]
    kept = examine(truth, truth, truth)
    lost = examine(truth, truth, ["calm"] * 80 + ["<rare>"])
    made = run([answer(0, "calm")], [told(0, "calm", 1)])
    verdicts = [Examined.of("v2", kept), Examined.of("v3", lost)]
    report = report_of(replace(made, verdicts=verdicts))
    stream = report.streams["s"]
    assert [(one.version, one.passed, one.worse) for one in stream.verdicts] == [
        ("v2", True, []),
        ("v3", False, ["storm"]),
    ]
    assert (stream.verdicts[1].examples, stream.verdicts[1].candidate_accuracy) == (81, round(41 / 81, 4))
    assert stream.verdicts[1].reasons == lost.reasons
    assert stream.verdicts[0].unjudged == len(kept.unjudged) > 0
    page = render(report)
    assert "<td>v3</td><td>refused</td><td>81</td><td>100.0 %</td><td>50.6 %</td><td>1 class</td>" in page
    assert html.escape(f"v3: {'; '.join(lost.reasons)}") in page
    assert "No fine-tune came to its exam" in render(report_of(made))


def test_swaps_are_changes_of_version_not_of_revision() -> None:
    """A head moves many times a minute; a swap of the whole model is what the plot marks."""
    names = ["v0.0", "v1.0", "v1.5", "v2.0", "v2.1", "v1.6"]
    report = summarise(run([answer(i, "a", name) for i, name in enumerate(names)], [told(0, "a", 9)]))
    assert report.version_names == ["v1", "v2"]
    assert (report.versions, report.revisions, report.swaps) == (2, 5, 2)
    assert [(swap.event, swap.version) for swap in report.swapped] == [(4, "v2"), (6, "v1")]


@given(
    truth=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    data=st.data(),
)
def test_macro_f1_is_the_usual_one(truth: list[str], data: st.DataObject) -> None:
    """People compare it with what other tools print."""
    answers = data.draw(st.lists(st.sampled_from("abcd"), min_size=len(truth), max_size=len(truth)))
    assert macro_f1(truth, answers) == pytest.approx(f1_score(truth, answers, average="macro", zero_division=0))
    assert accuracy(truth, answers) == pytest.approx(
        sum(a == b for a, b in zip(truth, answers, strict=True)) / len(truth)
    )


def test_forgetting_is_the_fall_from_the_best_block_to_the_last() -> None:
    """A class that was known and is no longer must show, and one that only grew must not."""
    truth = ["old"] * (2 * BLOCK) + ["new"] * (2 * BLOCK) + ["rare"] * (BLOCK - 1)
    lost: list[str | None] = ["old"] * BLOCK + ["new"] * BLOCK
    grown: list[str | None] = [None] * BLOCK + ["new"] * BLOCK
    assert forgetting(truth, [*lost, *grown, *(["rare"] * (BLOCK - 1))]) == {"old": 1.0, "new": 0.0}


@given(seed=st.integers(0, 10_000))
def test_the_order_of_consuming_changes_nothing(seed: int) -> None:
    """Partitions are read in any order; the report must not depend on it."""
    made = example(seed)
    shuffled = random.Random(seed)
    predictions, labels, frozen = list(made.predictions), list(made.labels), list(made.frozen)
    for part in (predictions, labels, frozen):
        shuffled.shuffle(part)
    again = StreamRun(made.name, made.question, made.source, made.events, predictions, labels, frozen, made.waves)
    assert summarise(again) == summarise(made)


@given(seed=st.integers(0, 10_000))
def test_naive_rivals_agree_with_their_definition(seed: int) -> None:
    """The running counts are fast; the definition is slow and plain."""
    made = example(seed)
    truths = standing_labels(made.labels)
    scored = [one for one in first_predictions(made.predictions) if truths.get(one.event_id)]
    arriving = sorted(made.labels, key=lambda x: (x.at, x.label.labelled_at))
    hits = Counter[str]()
    for one in scored:
        known: dict[str, Arrived] = {}
        news: list[Arrived] = []
        for label in arriving:
            mine = label.label.event_id == one.event_id
            if label.at > one.predicted_at or mine or any(label.label == earlier.label for earlier in news):
                continue
            news.append(label)
            old = known.get(label.label.event_id)
            if old is None or old.label.labelled_at <= label.label.labelled_at:
                known[label.label.event_id] = label
        counts = Counter(label.label.label for label in known.values())
        best = min(counts, key=lambda name: (-counts[name], str(name))) if counts else None
        truth = truths[one.event_id]
        hits["majority"] += best == truth
        hits["no_change"] += bool(news) and news[-1].label.label == truth
    report = summarise(made)
    assert report.accuracy_majority == pytest.approx(hits["majority"] / len(scored))
    assert report.accuracy_no_change == pytest.approx(hits["no_change"] / len(scored))


def example(seed: int, events: int = 60) -> StreamRun:
    """A small run with late, repeated and corrected labels, a swap, and a frozen twin."""
    chance = random.Random(seed)
    predictions, labels, frozen = [], [], []
    for i in range(events):
        true = chance.choice("ab" if i < 30 else "abc")
        predictions.append(answer(i, chance.choice([true, true, "a", None]), f"v{1 + (i > 40)}.{i}"))
        frozen.append(answer(i, chance.choice("ab"), "v1.29"))
        late = i + 0.5 + chance.random() * 10
        if chance.random() < 0.1:
            labels.append(told(i, chance.choice("abc"), late - 0.25))
        labels.append(told(i, true, late))
        if chance.random() < 0.1:
            labels.append(Arrived(labels[-1].label, at(late + 3)))
    return StreamRun(
        "s<1>", "Is it & is it not?", "made up", [f"e{i}" for i in range(events)], predictions, labels, frozen, (0, 30)
    )


def report_of(*runs: StreamRun) -> DemoReport:
    return assemble(runs, seconds=12.34, dead_letters=2, broker="a small <broker>", generated_at=START)


def test_a_rival_that_wins_is_named() -> None:
    """The report is read by people who decide whether this is worth running."""
    days = ["a"] * 200 + ["b"] * 200
    predictions = [answer(i, "a") for i in range(400)]
    labels = [told(i, name, i + 0.5) for i, name in enumerate(days)]
    report = report_of(run(predictions, labels))
    stream = report.streams["s"]
    assert stream.accuracy_no_change == pytest.approx(398 / 400)
    assert stream.words[0].startswith("No change beats the served model, which has 50.0 %")
    assert report.words == [
        "On s, no change and no change that is told each label at once were right more often than the served model."
    ]
    assert "No change beats the served model" in render(report)


def test_a_difference_that_chance_explains_is_called_so() -> None:
    """Half a point on four hundred events is nothing, on either side."""
    predictions = [answer(i, "a" if i % 2 else "b") for i in range(20)]
    labels = [told(i, "a", i + 0.5) for i in range(20)]
    sentences = summarise(run(predictions, labels, [answer(i, "a" if i % 3 else "b") for i in range(20)])).words
    assert "chance explains" in sentences[0]


def test_nothing_labelled_is_said_and_not_divided_by() -> None:
    """A run that is stopped at once still ends in a report."""
    report = report_of(run([answer(0, None, "v0.0")], []), run([], [], events=[]))
    assert report.streams["s"].accuracy is None
    assert "nothing to say" in render(report)


class Page(HTMLParser):
    """Notes what a page would fetch, and whether its elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element opens."""
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content."""
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        """An element closes."""
        assert self.open.pop() == tag


def test_the_page_needs_no_network_and_escapes_what_it_shows(tmp_path: Path) -> None:
    """It is opened years later, from a mail, on a machine without a network."""
    data, path = write_report(report_of(example(1), run([], [], events=[])), tmp_path / "demo-report")
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text
    assert "s&lt;1&gt;" in text
    assert "a small &lt;broker&gt;" in text
    assert "s<1>" not in text
    assert "class='swap'" in text
    assert json.loads(data.read_text(encoding="utf-8"))["seconds"] == 12.3


def test_the_data_has_every_promised_number(tmp_path: Path) -> None:
    """Others read report.json by these names."""
    data, _ = write_report(report_of(example(2)), tmp_path)
    found = json.loads(data.read_text(encoding="utf-8"))
    assert {"lost", "duplicated", "dead_letters", "seconds", "broker"} <= set(found)
    stream = found["streams"]["s<1>"]
    assert {"events", "predictions", "labels", "forgetting", "versions", "swaps"} <= set(stream)
    for kind in ("accuracy", "macro_f1"):
        for rival in ("", "_frozen", "_frozen_on_its_own_classes", "_no_change", "_majority"):
            assert 0 <= stream[kind + rival] <= 1
    assert stream["swaps"] == 1
    assert stream["timeline"][-1]["event"] == 60
