"""The transport benchmark, small, on a real Kafka: what it times must be right before it is fast."""

from __future__ import annotations

import importlib.util
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks import transport
from benchmarks.contestants import ANSWER, RULES, encoded
from stream.events import Decoder, Prediction, Record
from tests.kafka import KafkaBroker


def test_every_contestant_answers_every_event_and_the_file_has_all_rows(kafka: KafkaBroker, tmp_path: Path) -> None:
    """A contestant that lost or repeated answers fails the run; the rest must find its numbers under fixed names."""
    contestants = ["worker", "bare"]
    if importlib.util.find_spec("quixstreams") is not None:
        contestants.append("quix")
    file = tmp_path / "out.json"
    few = ["--quick", "--events", "2000", "--batch", "200", "--runs", "1", "--bootstrap", kafka.bootstrap]
    assert transport.main([*few, "--json", str(file), "--contestants", *contestants]) == 0
    found = json.loads(file.read_text())
    assert found["benchmark"] == "transport"
    assert found["versions"]["confluent-kafka"]
    rows = {(row["name"], row["mode"], row["metric"]): row["value"] for row in found["rows"]}
    for mode in ("at_least_once", "exactly_once"):
        for name in contestants:
            assert rows[name, mode, "events_per_second"] > 0
        assert rows["worker", mode, "ratio_to_bare"] > 0
        assert ("worker", mode, "ratio_to_quix") in rows or "quix" not in contestants


def test_a_broker_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark is run by people; a traceback would say nothing to them."""
    assert transport.main(["--events", "10", "--contestants", "bare", "--bootstrap", "127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert "127.0.0.1:1" in said
    assert "Traceback" not in said


def test_what_all_write_is_a_full_prediction() -> None:
    """Contestants that write less than the worker would be measured at something easier."""
    key, value = next(transport.events(1))
    record = Record("events", 3, 7, key, value)
    event = Decoder(RULES).event(record)
    prediction = Prediction.model_validate_json(encoded(event, record, ANSWER, datetime.now(UTC)))
    assert prediction.event_id.encode() == key
    assert (prediction.ref.topic, prediction.ref.partition, prediction.ref.offset) == ("events", 3, 7)
    assert prediction.label == ANSWER.label
    assert len(prediction.probabilities) == 5
    assert prediction.observed_at == event.observed_at
