"""Latency, scale and soak, small: what they time and judge must be right before it is fast."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale, weights
from benchmarks.forward import STREAM as QUESTIONS
from benchmarks.latency import endless
from benchmarks.pace import Ear, Heard, Pace, latencies, wait_for
from benchmarks.soak import BROKEN_EVERY, POOL, STREAM, Watch, misanswered, programme
from learner.encoders import payload
from learner.heads import LinearHead
from learner.registry import Registry
from stream.events import Report, utc_now
from tests.kafka import KafkaBroker


def test_the_index_of_the_learner_is_measured_small_and_large(tmp_path: Path) -> None:
    """Programs read the ratio by these names; the part needs no Kafka."""
    file = tmp_path / "out.json"
    assert scale.main(["--quick", "--only", "index", "--entries", "12000", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rows = {(row["name"], row["mode"], row["metric"]): row["value"] for row in found["rows"]}
    for name in ("index", "join"):
        assert rows[name, "10,000 entries", "per_core_second"] > 0
        assert rows[name, "12,000 entries", "cpu_ratio_to_small"] > 0


def test_latency_is_counted_from_when_an_event_was_due(kafka: KafkaBroker) -> None:
    """An ear that missed an answer, or a clock that starts late, would make every worker look fast."""
    topic = kafka.create_topic(f"pace-{utc_now().timestamp()}")
    kafka.produce(topic, [("old", "before")])
    report = Report(event_id="x", stream=QUESTIONS, observed_at=utc_now(), text="hello")
    with Ear(kafka.bootstrap, topic) as ear:
        pace = Pace(kafka.bootstrap, topic, rate=200)
        count = pace.run(endless([report]), 0.2, threading.Event())
        wait_for(lambda: len(ear.heard) >= count, 30, "hearing")
    assert [one.key for one in ear.heard] == list(pace.due)
    assert (latencies(pace.due, ear.heard) > 0).all()


def test_an_answer_by_another_revision_than_it_names_is_found(tmp_path: Path) -> None:
    """The soak's own judge: it must see a half-swapped model, and a broken revision that answered."""
    plan = programme(Registry(str(tmp_path)), revisions=12, count=2, back=4)
    whole = [one.pointer for one in plan.announcements if one.pointer is not None]
    assert len(whole) == 2 + 12 + 4
    broken = [number for number, one in enumerate(plan.announcements) if one.pointer is None]
    assert broken == [number for number in range(len(plan.announcements)) if number % BROKEN_EVERY == BROKEN_EVERY - 1]
    assert {encoder.spec.dimension for encoder in plan.encoders.values()} == set(weights.DIMENSIONS)

    def answers(named: str, encoder: str, head: str) -> list[Heard]:
        """What a worker with this encoder and head would say under a revision's name."""
        pool = [payload(weights.window(STREAM, "e", number), weights.CHANNELS) for number in range(POOL)]
        served = LinearHead.from_tensors(plan.registry.head(head))
        labels, shares, _ = served.answer(plan.encoders[encoder].embed(pool), 5)
        found = []
        for number in range(POOL):
            said = dict(zip(labels[number], shares[number].tolist(), strict=True))
            answer = {"event_id": f"e0-{number:09d}", "model_version": named, "probabilities": said}
            found.append(Heard(0.0, b"", json.dumps(answer).encode()))
        return found

    first, second = whole[0], whole[1]
    assert first.head is not None
    assert second.head is not None
    assert misanswered(plan, answers(first.name, first.encoder, first.head)) == []
    assert misanswered(plan, answers(first.name, second.encoder, second.head)) != []
    assert len(misanswered(plan, answers("v1.1000001", first.encoder, first.head))) == POOL


def test_growth_is_told_from_noise() -> None:
    """A slope without its error makes a leak of every restless number, and of a leak an accident."""
    noise = np.random.default_rng(0).normal(0, 10, 400)
    watch = Watch(pid=0, port=0, every=1)
    watch.samples["restless"] = [(9.0 * n, 300 + noise[n]) for n in range(400)]
    watch.samples["leaks"] = [(9.0 * n, 300 + n / 4 + noise[n]) for n in range(400)]
    early, late, slope, error = watch.growth("restless")
    assert abs(slope) < 3 * error
    assert abs(late - early) < 10
    early, late, slope, error = watch.growth("leaks")
    assert slope == pytest.approx(100, abs=3 * error)
    assert slope > 10 * error
    assert late - early > 40
