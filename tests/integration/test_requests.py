"""What people ask for has an id: it is done once, however often it is sent, and can be asked about."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from learner.control import SIGNATURE, ControlAnswer, ControlRequest, sign
from stream.events import encode
from tests.deployment import Deployment, label
from tests.integration.probe import FREQUENCIES, STREAM, deployed, end, publish, store_of, window
from tests.kafka import KafkaBroker
from tests.waiting import until

SECRET = b"a test's secret"


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A learner that takes signed requests and has learned something; too little for an exam."""
    control = {"control": {"secret": SECRET.decode()}}
    with deployed(kafka, tmp_path_factory.mktemp("requests"), {"probe": STREAM}, control) as made:
        worker, _ = made.start_both()
        events = [window("probe", name, number) for name in FREQUENCIES for number in range(4)]
        publish(made, events)
        made.label(*(label("probe", event.event_id, event.event_id.partition("-")[0]) for event in events))
        until(lambda: made.status("probe")["labels_learned"] == len(events))
        end(worker)
        made.processes.remove(worker)
        yield made


def told(deployment: Deployment, request_id: str) -> list[ControlAnswer]:
    """What the audit topic says of a request; a learner killed before it noted what it sent says the same again."""
    values = dict.fromkeys(record.value or b"" for record in deployment.records("audit"))
    answers = [ControlAnswer.model_validate_json(value) for value in values]
    return [answer for answer in answers if answer.id == request_id]


def by_topic(deployment: Deployment, *values: bytes) -> None:
    """Put signed messages onto the control topic."""
    messages = [(b"probe", value, ((SIGNATURE, sign(value, SECRET)),)) for value in values]
    deployment.kafka.produce(deployment.topics.name("control"), messages)


def restart(deployment: Deployment) -> None:
    """Kill the learner and start it again."""
    learner = deployment.processes[-1]
    learner.send_signal(signal.SIGKILL)
    learner.wait()
    deployment.start("learner")
    until(lambda: deployment.ready(deployment.learner_port), seconds=120)


def test_a_request_sent_again_is_not_done_again_whichever_way_it_comes(deployment: Deployment) -> None:
    """Whoever got no answer asks again: that must not undo what somebody else did meanwhile."""
    _, first = deployment.ask("probe", "pause", id="night-1", reason="noise")
    assert first["accepted"]
    assert deployment.ask("probe", "resume", id="night-2")[1]["accepted"]
    assert deployment.ask("probe", "pause", id="night-1", reason="noise") == (202, first)
    restart(deployment)
    by_topic(
        deployment,
        encode(ControlRequest(id="night-1", action="pause", stream="probe", who="test", reason="noise")),
        encode(ControlRequest(id="night-3", action="resume", stream="probe")),
    )
    until(lambda: bool(told(deployment, "night-3")))
    assert len(told(deployment, "night-1")) == 1
    assert not deployment.status("probe")["paused"]
    code, other = deployment.ask("probe", "resume", id="night-1")
    assert (code, other["accepted"]) == (409, False)
    assert "another" in other["message"]


def test_what_became_of_a_request_can_be_asked(deployment: Deployment) -> None:
    """The topic gives no answer to whoever writes to it; the id must find it, also for a colleague next day."""
    by_topic(deployment, encode(ControlRequest(id="ask-1", action="rollback", stream="probe", version="v9", who="ann")))
    page = "/requests/ask-1"
    until(lambda: deployment.get(deployment.learner_port, page)[0] == 200)
    code, found = deployment.get(deployment.learner_port, page)
    assert (code, found["state"], found["who"], found["action"]) == (200, "refused", "ann", "rollback")
    assert "v9" in found["message"]
    assert "ask-1" in [one["id"] for one in deployment.get(deployment.learner_port, "/requests")[1]]
    code, none = deployment.get(deployment.learner_port, "/requests/nobody-asked")
    assert code == 404
    assert "nobody-asked" in none["error"]
    shown = CliRunner().invoke(app, ["asked", "ask-1", "--format", "json", "--config", str(deployment.settings)])
    assert json.loads(shown.stdout) == found


def test_a_retrain_is_followed_from_its_request_to_its_run(deployment: Deployment) -> None:
    """It takes minutes: whoever asked wants to know whether it waits, runs or came to nothing, and why."""
    assert deployment.ask("probe", "retrain", id="train-1")[1]["accepted"]
    page = "/requests/train-1"
    until(lambda: deployment.get(deployment.learner_port, page)[1]["state"] == "done", seconds=240)
    found = deployment.get(deployment.learner_port, page)[1]
    assert found["run_state"] == "refused"
    assert "the exam has 0 examples" in found["message"]


def test_what_an_ended_learner_had_accepted_is_done_by_the_next(deployment: Deployment) -> None:
    """A retrain that was accepted and then forgotten is waited for in vain."""
    named = {"strategy": "mas", "observed_from": "2020-03-01T00:00:00Z"}
    assert deployment.ask("probe", "retrain", id="train-2", **named)[1]["accepted"]
    until(lambda: deployment.get(deployment.learner_port, "/requests/train-2")[1]["state"] == "done", seconds=240)
    learner = deployment.processes[-1]
    learner.send_signal(signal.SIGKILL)
    learner.wait()
    # As a kill leaves it between what was accepted and its run, and between an effect and what is said of it.
    with sqlite3.connect(deployment.directory / "learner.db") as database:
        database.execute("UPDATE runs SET detail = '{}'")
        database.execute("UPDATE asked SET answer = NULL WHERE id = 'night-2'")
    database.close()
    deployment.start("learner")
    until(lambda: deployment.ready(deployment.learner_port), seconds=120)
    until(lambda: deployment.get(deployment.learner_port, "/requests/train-2")[1]["state"] == "done", seconds=240)
    until(lambda: len(told(deployment, "night-2")) == 2)
    assert told(deployment, "night-2")[-1].accepted
    with store_of(deployment) as store:
        assert store.runs("probe")[0].detail["retrain"] == named


def test_a_message_that_is_no_request_is_told_of_to_whoever_may_ask(deployment: Deployment) -> None:
    """A typing error in a script would else look like a learner that does nothing; strangers are told nothing."""
    wrong = {"id": "typo-1", "action": "retrain", "stream": "probe", "strategy": "ewcc", "who": "ann"}
    value = json.dumps(wrong).encode()
    topic = deployment.topics.name("control")
    deployment.kafka.produce(topic, [(b"probe", value.replace(b"typo-1", b"typo-0"), ())])
    by_topic(deployment, value, value)
    now = ControlRequest(action="resume", stream="probe")
    by_topic(deployment, encode(now))
    until(lambda: bool(told(deployment, now.id)))
    (answer,) = told(deployment, "typo-1")
    assert (answer.accepted, answer.action, answer.stream, answer.who) == (False, "retrain", "probe", "ann")
    assert answer.message.startswith("strategy: ")
    assert "'ewc_replay'" in answer.message
    assert deployment.get(deployment.learner_port, "/requests/typo-1")[1]["state"] == "refused"
    assert told(deployment, "typo-0") == []


@pytest.mark.parametrize(
    "fields",
    [
        {"who": "a\x00b"},
        {"reason": "x" * 1_001},
        {"id": "a\nb"},
        {"id": "x" * 101},
        {"action": "forget", "event_ids": ["a\x00b"]},
        {"action": "drop", "held": {"ids": [2**70]}},
        {"action": "drop", "held": {"labeller": "a\x00b"}},
    ],
    ids=str,
)
def test_what_no_database_can_hold_is_refused_and_the_topic_goes_on(
    deployment: Deployment, fields: dict[str, object]
) -> None:
    """One poisoned message must not keep everybody else's from being taken."""
    now = ControlRequest(action="resume", stream="probe")
    wrong = {"action": "pause", "stream": "probe", "issued_at": now.issued_at.isoformat(), **fields}
    by_topic(deployment, json.dumps(wrong).encode(), encode(now))
    until(lambda: bool(told(deployment, now.id)))
    assert not deployment.status("probe")["paused"]
    body = {name: value for name, value in wrong.items() if name not in ("action", "stream")}
    code, answer = deployment.ask("probe", str(wrong["action"]), **body)
    assert code == 400
    assert "U+0000" in answer["error"] or list(fields)[-1] in answer["error"]
