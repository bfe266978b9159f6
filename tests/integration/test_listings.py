"""What a command tells programs, from a whole deployment with something of everything in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from stream.events import Prediction
from tests.deployment import Deployment, label
from tests.integration.probe import STREAM, deployed, publish, window
from tests.kafka import KafkaBroker
from tests.waiting import until

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
ASKING = {"label_requests": {"per_day": 5, "novelty": 0.0}}


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Answers, a dead letter, a class beyond the quota, an event to be labelled, a request that was answered."""
    stream = {**STREAM, "new_classes": {"per_day": 2}, **ASKING}
    with deployed(kafka, tmp_path_factory.mktemp("listings"), {"probe": stream}) as made:
        made.start_both()
        publish(made, [window("probe", name, number) for name in ("slow", "fast") for number in range(4)])
        kafka.produce(made.topics.name("telemetry"), [(b"bad", b"{", ())])
        made.label(label("probe", "slow-0", "slow"), label("probe", "fast-0", "fast"))
        until(lambda: made.status("probe")["labels_learned"] == 2)
        made.label(label("probe", "slow-1", "third"))
        publish(made, [window("probe", "middle", 9)])
        assert made.ask("probe", "pause", reason="a test")[1]["accepted"]
        until(lambda: len(made.records("dead_letters")) == 1)
        until(lambda: bool(made.get(made.learner_port, "/streams/probe/quarantine")[1]["labels"]))
        until(lambda: bool(made.get(made.learner_port, "/streams/probe/requests")[1]["requests"]))
        yield made


def documented() -> dict[str, set[str]]:
    """By command, the fields that the page says a row has."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## For programs\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `trimtab ([a-z -]+?)(?: [A-Z].*)?` \| (.*) \|$", section, re.MULTILINE)
    return {name: set(re.findall(r"`([a-z_]+)`", fields)) for name, fields in rows}


def told(deployment: Deployment, form: str, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--format", form, "--config", str(deployment.settings)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["predictions"],
        ["dead-letters", "list"],
        ["versions", "list"],
        ["versions", "prune", "--dry-run"],
        ["requests", "probe"],
        ["asked"],
        ["quarantine", "list", "probe"],
        ["classes", "list", "probe"],
    ],
    ids=" ".join,
)
def test_a_listing_is_one_document_with_the_fields_that_are_documented(
    deployment: Deployment, command: list[str]
) -> None:
    """A script is written once, against the page; what it reads must be JSON and nothing else, under those names."""
    rows: list[dict[str, Any]] = json.loads(told(deployment, "json", *command))
    assert rows
    lines = [json.loads(line) for line in told(deployment, "jsonl", *command).splitlines()]
    assert [set(row) for row in lines] == [set(row) for row in rows]
    name = " ".join(word for word in command if not word.startswith("-") and word != "probe")
    wanted = set(Prediction.model_fields) if name == "predictions" else documented()[name]
    assert [set(row) for row in rows] == [wanted] * len(rows)


@pytest.mark.parametrize("flags", [["--json"], ["--format", "json"]])
def test_a_report_takes_either_word(deployment: Deployment, flags: list[str]) -> None:
    """Scripts that were written for the flag go on."""
    for command in (["audit"], ["explain", "slow-0"]):
        done = CliRunner().invoke(app, [*command, *flags, "--config", str(deployment.settings)])
        assert documented()[command[0]] <= set(json.loads(done.stdout)), command
