"""The benchmark of learning: its arithmetic, its readers, its cells, and both protocols end to end in small."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.learning import outcome, page, rivals, suite
from benchmarks.learning.__main__ import main
from benchmarks.learning.cells import INSTANT, TRIMTAB, Cell, Entry, Kept, Runner, Task, key, measure
from benchmarks.learning.live import STREAM, Live
from benchmarks.learning.protocols import class_incremental, few_shot, prequential
from benchmarks.learning.reading import Columns, Examples, Unusable, hold_out, read
from benchmarks.learning.scores import accuracy, backward_transfer, by_class, forgetting, macro_f1, mean_and_deviation
from learner import online

NAN = math.nan


def blobs(count: int, classes: int = 4, seed: int = 0) -> Examples:
    """Points around as many corners as there are classes: easy, but not for who forgets."""
    chance = np.random.default_rng(seed)
    labels = chance.permutation([number % classes for number in range(count)])
    corners = np.random.default_rng(7).normal(0.0, 4.0, (classes, 3))
    points = corners[labels] + chance.normal(0.0, 0.4, (count, 3))
    payloads = [point.astype(np.float32)[:, None] for point in points]
    return Examples("telemetry", payloads, [f"c{label}" for label in labels], ("a", "b", "c"))


class Oracle(rivals.Rival):
    """Knows what it was taught, by heart, and writes down what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.learned: list[int] = []
        self.served: list[tuple[int, int]] = []

    def serve(self, positions: Sequence[int], payloads: Sequence[Any]) -> Sequence[str | None]:
        self.served += [(position, len(self.learned)) for position in positions]
        return super().serve(positions, payloads)

    def ask(self, payloads: Sequence[Any]) -> Sequence[str | None]:
        return [None] * len(payloads)

    def learn(self, positions: Sequence[int], payloads: Sequence[Any], labels: Sequence[str]) -> None:
        self.learned += positions


# Arithmetic


def test_forgetting_and_backward_transfer_are_the_papers() -> None:
    """Both by hand: groups fall from their best (90, 80) and from when they were new (90, 70) to 60 and 75."""
    matrix = np.array([[90.0, NAN, NAN], [85.0, 70.0, NAN], [70.0, 80.0, 95.0], [60.0, 75.0, 90.0]])[:, :3]
    assert forgetting(matrix[:, :2]) == pytest.approx(((90 - 60) + (80 - 75)) / 2)
    assert forgetting(matrix) == pytest.approx(((90 - 60) + (80 - 75) + (95 - 90)) / 3)
    assert backward_transfer(matrix) == pytest.approx(((60 - 90) + (75 - 70) + (90 - 95)) / 3)
    last_is_new = matrix[:3]
    assert forgetting(last_is_new) == pytest.approx(((90 - 70) + (70 - 80)) / 2), "the group learned last is not in it"
    assert backward_transfer(last_is_new) == pytest.approx(((70 - 90) + (80 - 70)) / 2)
    assert math.isnan(forgetting(np.array([[50.0]]))), "one experience cannot be forgotten"


def test_macro_f1_is_scikit_learn_s() -> None:
    """A rare class counts as much as a common one; an answer of no class is a miss and nothing else."""
    metrics = pytest.importorskip("sklearn.metrics")
    chance = np.random.default_rng(0)
    truth = chance.choice(["a", "b", "c"], 200, p=[0.8, 0.15, 0.05]).tolist()
    answers = chance.choice(["a", "b", "c", "never"], 200).tolist()
    assert macro_f1(truth, answers) == pytest.approx(
        metrics.f1_score(truth, answers, labels=["a", "b", "c"], average="macro", zero_division=0)
    )
    assert macro_f1(["a", "b"], [None, None]) == 0.0
    assert accuracy(["a", "b"], ["a", None]) == 50.0


def test_a_class_is_compared_only_where_there_is_enough_of_it() -> None:
    """One unlucky event in a month is no forgetting."""
    parts = [(["a"] * 4 + ["b"], ["a"] * 5), (["a"] * 4, ["a", "a", "x", "x"])]
    matrix = by_class(parts, minimum=2)
    assert matrix[:, 0].tolist() == [100.0, 50.0]
    assert np.isnan(matrix[:, 1]).all()
    assert mean_and_deviation([1.0, 3.0, NAN]) == (2.0, pytest.approx(math.sqrt(2)))


# Files


def test_every_form_of_a_file_is_read_alike(tmp_path: Path) -> None:
    """What a user has lies in one of these, and a number that is a class is the same class in all of them."""
    rows = [{"text": 'so "they", say\nit', "y": 1, "t": 2}, {"text": "älter", "y": 2, "t": 1}]
    (tmp_path / "a.csv").write_text('﻿text,y,t\n"so ""they"", say\nit",1.0,2\nälter,2,1\n', encoding="utf-8")
    (tmp_path / "b.tsv").write_text('text\ty\tt\n"so ""they"", say\nit"\t1\t2\nälter\t2\t1\n', encoding="utf-8")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [r["text"] for r in rows], "y": [1.0, 2.0], "t": [2, 1]}), tmp_path / "d.parquet")
    for name in ("a.csv", "b.tsv", "c.jsonl.gz", "d.parquet"):
        found = read(tmp_path / name, Columns(label="y", text="text", time="t"))
        assert list(found.payloads) == ["älter", 'so "they", say\nit'], name
        assert list(found.labels) == ["2", "1"], name


def test_what_is_missing_is_counted_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    """A hole in the data is the world's; a word in a column of numbers is a mistake with a place."""
    file = tmp_path / "x.csv"
    file.write_text("a,b,y\n1,?,up\n,,up\n3,inf,\n4,NA,down\n")
    found = read(file, Columns(label="y", features=("*",)))
    assert found.channels == ("a", "b")
    assert [payload[:, 0].tolist()[0] for payload in found.payloads if not isinstance(payload, str)] == [1.0, 4.0]
    assert all(np.isnan(payload[1, 0]) for payload in found.payloads if not isinstance(payload, str))
    assert len(found.notes) == 2
    file.write_text("a,b,y\n1,2,up\n3,four,down\n")
    with pytest.raises(Unusable, match=r"row 2 \(line 3\), column 'b': a number is expected, found 'four'"):
        read(file, Columns(label="y", features=("a,b",)))
    file.write_text("a,b,y\n1,2,up,\n")
    with pytest.raises(Unusable, match=r"row 1 \(line 2\): 4 values for 3 columns"):
        read(file, Columns(label="y", features=("a",)))
    file.write_text("a,b,y\n1,soon,up\n")
    with pytest.raises(Unusable, match="no column 'z'; it has 'a', 'b', 'y'"):
        read(file, Columns(label="z", features=("a",)))
    with pytest.raises(Unusable, match=r"column 'b': a time is expected"):
        read(file, Columns(label="y", features=("a",), time="b"))


def test_a_part_is_held_out_of_every_class_that_can_spare_it() -> None:
    """A class with one example is taught and never asked; nothing is both taught and asked."""
    examples = replace(blobs(40), labels=["only", *blobs(40).labels[1:]])
    train, test = hold_out(examples)
    assert len(train) + len(test) == 40
    assert "only" in train.labels
    assert "only" not in test.labels
    assert {label for label in examples.labels if label != "only"} == set(test.labels)
    taught = {payload.tobytes() for payload in train.payloads if not isinstance(payload, str)}
    assert not any(payload.tobytes() in taught for payload in test.payloads if not isinstance(payload, str))


# Protocols


def test_no_label_comes_before_it_is_due() -> None:
    """A delay that leaks is the oldest way to a good number."""
    oracle = Oracle()
    prequential(blobs(60), None, oracle, experiences=3, delay=7)
    assert [position for position, _ in oracle.served] == list(range(60))
    assert all(known == max(0, position - 7) for position, known in oracle.served)
    assert oracle.learned == list(range(60 - 1 - 7))


def test_every_example_is_taught_once_and_class_after_class() -> None:
    """What came in an earlier experience does not come again, and orders differ by seed."""
    train, test = blobs(80, classes=8), blobs(16, classes=8, seed=1)
    orders = []
    for seed in (0, 1):
        oracle = Oracle()
        class_incremental(train, test, oracle, experiences=4, seed=seed)
        assert sorted(oracle.learned) == list(range(80))
        classes = [train.labels[position] for position in oracle.learned]
        assert [len(set(classes[start : start + 20])) for start in range(0, 80, 20)] == [2, 2, 2, 2]
        orders.append(classes)
    assert orders[0] != orders[1]


def test_few_shot_shows_few() -> None:
    """The new classes have as many labels as asked for, and come last."""
    oracle = Oracle()
    train = blobs(90, classes=9)
    outcome = few_shot(train, blobs(18, classes=9, seed=1), oracle, shots=2, new_classes=3, seed=0)
    assert len(oracle.learned) == 60 + 3 * 2
    assert len({train.labels[p] for p in oracle.learned[-6:]} - {train.labels[p] for p in oracle.learned[:60]}) == 3
    assert outcome.values["old_change"] == 0.0


def task(**changes: Any) -> Task:
    return Task("probe", "prequential", blobs(100), None, experiences=4, delay=3, seeds=(0,), **changes)


def test_the_learner_itself_learns_a_stream() -> None:
    """Joined, stored, solved, announced and served without Kafka; far above the dummies."""
    cell = measure(task(), Entry(INSTANT), 0, None, "cpu")
    dummy = measure(task(), Entry("no_change"), 0, None, "cpu")
    assert cell["values"]["average"] > 85 > dummy["values"]["average"]
    assert cell["details"]["fine_tunes"] == 0
    again = measure(task(), Entry(INSTANT), 0, None, "cpu")
    unlike = {"seconds", "peak_memory"}
    assert {k: v for k, v in cell["values"].items() if k not in unlike} == {
        k: v for k, v in again["values"].items() if k not in unlike
    }


def test_who_asks_is_answered_from_all_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine, on which the learner rests after each solve, would else be measured as a worse learner."""
    monkeypatch.setattr(online, "SLOW_SOLVE", 0.0)
    monkeypatch.setattr(online, "SOLVE_SHARE", 1e-9)
    examples = blobs(40)
    late = [place for place, label in enumerate(examples.labels) if label == "c3"]
    live = Live("telemetry", examples.channels, finetune=False)
    try:
        for places in (sorted(set(range(40)) - set(late)), late):
            live.take(places, [examples.payloads[place] for place in places])
            live.label(places, [examples.labels[place] for place in places])
            answers = live.ask(examples.payloads)
        assert {answers[place] for place in late} == {"c3"}
    finally:
        live.close()


def test_two_labels_of_one_event_are_two_labellers() -> None:
    """Who contradicts whom is what trust is made of; the label given last counts."""
    live = Live("telemetry", ("a",), finetune=False)
    try:
        live.take([0], [np.zeros((1, 1), np.float32)])
        live.label([0, 0], ["up", "down"], ["ann", "bob"])
        assert live.ask([np.zeros((1, 1), np.float32)]) == ["down"]
        encoder = live.learning.learners[STREAM].encoder_digest
        claims = live.learning.store.claims(STREAM, encoder, 10)
        assert {claim.said.labeller for claim in claims} == {"ann", "bob"}
    finally:
        live.close()


def test_class_after_class_with_a_fine_tune() -> None:
    """The default's trigger, snapshot, child process, exam and promotion all happen within a run."""
    probe = Task("probe", "class-incremental", blobs(200), blobs(40, seed=1), experiences=2, seeds=(0,))
    settings = {"triggers": {"every_labels": 120}, "finetune": {"epochs": 1}}
    cell = measure(probe, Entry(TRIMTAB, overrides=settings), 0, None, "cpu")
    assert cell["details"]["fine_tunes"] == 1
    assert cell["details"]["failures"] == []
    assert cell["values"]["final"] > 90


# Cells, rows, pages


def fake(calls: list[str]) -> Any:
    def measure_nothing(task: Task, entry: Entry, seed: int, *rest: Any) -> Cell:
        calls.append(f"{entry.name}/{entry.variant}/{seed}")
        return {
            "key": key(task, entry, seed),
            "table": task.name,
            "name": entry.name,
            "mode": entry.mode,
            "variant": entry.variant,
            "seed": seed,
            "values": {"macro_f1": 0.5 + 0.1 * seed, "final": 50.0, "seconds": 1.0, "peak_memory": 2.0},
            "curve": [40.0, 50.0, 60.0],
            "details": {},
            "code": "c0de",
            "data": "da7a",
            "settings": {},
            "asked": task.asked,
            "device": "cpu",
            "machine": {"processor": "P", "cores": 2, "load_average_before": 0.0},
            "versions": {},
        }

    return measure_nothing


def test_a_night_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """What is known is not measured again; other data, another seed or other settings are."""
    calls: list[str] = []
    probe = replace(task(), seeds=(0, 1))

    def run(entry: Entry, which: Task = probe, minutes: float | None = None) -> list[Cell]:
        runner = Runner(Kept(tmp_path), None, minutes=minutes, measure=fake(calls))
        return list(runner.row(which, entry))

    assert run(Entry("majority"), minutes=0.0) == []
    assert calls == []
    assert [cell["seed"] for cell in run(Entry("majority"))] == [0, 1]
    assert [cell["seed"] for cell in run(Entry("majority"), minutes=0.0)] == [0, 1]
    assert len(calls) == 2
    run(Entry("majority"), replace(probe, train=blobs(101)))
    run(Entry(INSTANT))
    assert len(calls) == 6
    run(Entry(TRIMTAB, "store 2,000", {"replay": {"size": 2_000}}))
    run(Entry(TRIMTAB))
    assert len(calls) == 8, "a default that is named is the default"
    run(Entry(TRIMTAB, overrides={"replay": {"size": 7}}))
    assert len(calls) == 10


def test_of_several_rivals_the_best_is_shown(tmp_path: Path) -> None:
    """A weak opponent chosen by us would make any number look good."""
    calls: list[str] = []
    runner = Runner(Kept(tmp_path), None, measure=fake(calls))
    (cell,) = runner.row(task(), Entry("joint"))
    assert calls == ["joint/random forest/0", "joint/boosted trees/0"]
    assert set(cell["tried"]) | {cell["variant"]} == {"random forest", "boosted trees"}


def test_the_command_gives_the_one_form(tmp_path: Path) -> None:
    """Names and metrics are what programs look for."""
    file = tmp_path / "x.csv"
    examples = blobs(60)
    lines = [
        ",".join([*(f"{float(value):.3f}" for value in np.ravel(payload)), label])  # type: ignore[arg-type]
        for payload, label in zip(examples.payloads, examples.labels, strict=True)
    ]
    file.write_text("a,b,c,y\n" + "\n".join(lines) + "\n")
    out = tmp_path / "out.json"
    arguments = ["--protocol", "prequential", "--train", str(file), "--feature-columns", "a,b,c", "--label-column", "y"]
    more = ["--order", "given", "--seeds", "2", "--only", "majority,no_change", "--no-cache", "--json", str(out)]
    assert main([*arguments, *more]) == 0
    found = json.loads(out.read_text())
    rows = {(row["name"], row["metric"]): row["value"] for row in found["rows"]}
    assert rows["majority", "seeds"] == 2
    assert {"final", "average", "worst_class", "macro_f1", "seconds", "peak_memory"} <= {m for _, m in rows}
    assert main([*arguments[:-1], "z"]) == 2, "a column that is not there is a clear word, not a traceback"


def test_the_page_is_made_of_the_results() -> None:
    """A figure that was typed in, or a page that was not made anew, would be a claim without a run."""
    known = suite.tables()
    made = page.render(page.TEMPLATE.read_text(), suite.load(suite.RESULTS), known)
    assert (suite.ROOT / "docs" / "learning.md").read_text() == made
    assert set(suite.load(suite.RESULTS)) <= set(known)


def test_a_row_that_was_not_run_says_so(tmp_path: Path) -> None:
    """Silence would read as a row that there is not."""
    calls: list[str] = []
    runner = Runner(Kept(tmp_path), None, measure=fake(calls))
    entries = [Entry("majority"), Entry(TRIMTAB)]
    cells = list(runner.row(task(), entries[0]))
    tables = {"probe": suite.Table("probe", lambda data: task(), entries)}
    text = page.render(
        "<!-- table: probe -->\n[[probe/trimtab/macro_f1]] [[probe/majority/macro_f1]]", {"probe": cells}, tables
    )
    assert "| `majority` |  | 0.500 ± 0.000 |" in text
    assert "| `trimtab` |  | not run |" in text
    assert text.endswith("not measured yet 0.500")
    suite.keep(tmp_path / "results", "probe", cells)
    assert [cell["seed"] for cell in suite.load(tmp_path / "results")["probe"]] == [0]
    names = {row.name for row in outcome.result("x", {entries[0]: cells, entries[1]: []}).rows}
    assert names == {"majority"}
