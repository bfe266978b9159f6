"""A retrain that names strategy, range and dry run, by each way: what is said of it, what it makes, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from learner.control import SIGNATURE, ControlAnswer, ControlRequest, sign
from learner.finetune import Plan
from learner.registry import Registry
from stream.events import encode
from tests.deployment import Deployment, label
from tests.integration.probe import STREAM, deployed, publish, store_of, window
from tests.kafka import KafkaBroker
from tests.waiting import until
from trimtab import Client, Invalid, NotDone

SECRET = b"a test's secret"
DAY = datetime(2026, 3, 1, 8, tzinfo=UTC)
EVENING = datetime(2026, 3, 1, 20, tzinfo=UTC)


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A worker, and a learner that takes signed requests and has learned nothing yet."""
    control = {"control": {"secret": SECRET.decode()}}
    with deployed(kafka, tmp_path_factory.mktemp("retrain"), {"probe": STREAM}, control) as made:
        made.start_both()
        yield made


def by_topic(deployment: Deployment, request: ControlRequest) -> ControlAnswer:
    """Ask on the control topic; the answer that comes on the topic audit."""
    value = encode(request)
    deployment.kafka.produce(
        deployment.topics.name("control"), [(b"probe", value, ((SIGNATURE, sign(value, SECRET)),))]
    )
    found: list[ControlAnswer] = []

    def told() -> bool:
        answers = [ControlAnswer.model_validate_json(record.value or b"") for record in deployment.records("audit")]
        found[:] = [answer for answer in answers if answer.id == request.id]
        return bool(found)

    until(told)
    return found[0]


def cli(deployment: Deployment, *arguments: str) -> tuple[int, str]:
    """Exit code and all that a command said."""
    done = CliRunner().invoke(app, [*arguments, "--config", str(deployment.settings)])
    return done.exit_code, done.output


def teach(deployment: Deployment, names: tuple[str, ...], numbers: range, observed_at: datetime) -> None:
    """Events of these classes, answered, labelled and learned."""
    before = deployment.status("probe")["scored"]
    events = [window("probe", name, number, observed_at) for name in names for number in numbers]
    publish(deployment, events)
    deployment.label(*(label("probe", event.event_id, event.event_id.partition("-")[0]) for event in events))
    until(lambda: deployment.status("probe")["scored"] == before + len(events))


def runs(deployment: Deployment) -> list[dict[str, Any]]:
    """What the learner wrote of its fine-tunes, newest first."""
    with store_of(deployment) as store:
        return [{"state": run.state, **run.detail} for run in store.runs("probe")]


def ended(deployment: Deployment, request_id: str) -> str:
    """What became of the fine-tune that a request asked for."""
    with Client(deployment.settings) as client:
        until(lambda: client.request(request_id).state == "done", seconds=240)
        return str(client.request(request_id).run_state)


def test_before_anything_is_learned_a_retrain_is_refused(deployment: Deployment) -> None:
    """A run that cannot but fail is not worth waiting for; the dry run says the same as the retrain."""
    for dry_run in (True, False):
        code, answer = deployment.ask("probe", "retrain", dry_run=dry_run)
        assert (code, answer["accepted"]) == (409, False)
        assert "nothing to learn from yet" in answer["message"]
    assert runs(deployment) == []


def test_a_dry_run_says_the_same_by_each_way_and_trains_nothing(deployment: Deployment) -> None:
    """Whichever way is at hand at night must give the same numbers, and cost nothing."""
    teach(deployment, ("slow", "middle"), range(30), DAY)
    teach(deployment, ("slow", "fast"), range(30, 60), EVENING)
    named: dict[str, Any] = {"strategy": "ewc_replay", "observed_from": EVENING, "dry_run": True}
    answer = by_topic(deployment, ControlRequest(action="retrain", stream="probe", who="ann", **named))
    assert answer.accepted
    plan = answer.plan
    assert plan is not None
    with store_of(deployment) as store:
        evening = [row for row in store.examples("probe", exam=False) if row.observed_at >= EVENING]
        day = [row for row in store.examples("probe", exam=False) if row.observed_at < EVENING]
        exam = store.examples("probe", exam=True)
    assert set(plan.examples) == {"slow", "fast"}
    assert (plan.new, plan.memory, plan.left_out, plan.exam) == (len(evening), 0, len(day), len(exam))
    assert str(plan) == answer.message
    code, by_http = deployment.ask("probe", "retrain", **{**named, "observed_from": EVENING.isoformat()})
    assert (code, Plan.model_validate(by_http["plan"])) == (202, plan)
    with Client(deployment.settings) as client:
        assert client.retrain(**named).plan == plan
    code, said = cli(
        deployment,
        "retrain",
        "probe",
        "--strategy",
        "ewc_replay",
        "--observed-from",
        "2026-03-01T20:00:00",
        "--dry-run",
    )
    assert code == 0
    assert str(plan) in said
    assert runs(deployment) == []
    assert "v2" not in deployment.versions("probe")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"strategy": "ewcc"}, ["strategy", "'ewc_replay'", "'gdumb'"]),
        ({"observed_from": EVENING, "observed_to": DAY}, ["observed_to", "not after observed_from"]),
    ],
    ids=["strategy", "range"],
)
def test_a_wrong_value_is_refused_in_the_same_words_by_each_way(
    deployment: Deployment, fields: dict[str, Any], says: list[str]
) -> None:
    """The field, and what is allowed: the same line wherever it was typed."""
    sent = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in fields.items()}
    code, answer = deployment.ask("probe", "retrain", **sent)
    assert code == 400
    assert [word for word in says if word not in answer["error"]] == []
    options = [
        text
        for name, value in fields.items()
        for text in (
            f"--{name.replace('_', '-')}",
            f"{value:%Y-%m-%dT%H:%M:%S}" if isinstance(value, datetime) else value,
        )
    ]
    code, said = cli(deployment, "retrain", "probe", *options)
    assert (code, said.strip()) == (2, f"trimtab: {answer['error']}")
    with Client(deployment.settings) as client, pytest.raises(Invalid) as refusal:
        client.retrain(**fields)
    assert str(refusal.value) == answer["error"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"observed_from": EVENING + timedelta(days=1)}, "no example in the range"),
        ({"observed_from": DAY, "observed_to": DAY + timedelta(seconds=1)}, None),
        ({"observed_from": EVENING - timedelta(days=9), "observed_to": DAY}, "no example in the range"),
    ],
    ids=["later", "the day", "earlier"],
)
def test_a_range_without_enough_in_it_is_refused_before_it_costs_anything(
    deployment: Deployment, fields: dict[str, Any], why: str | None
) -> None:
    """A date that was mistyped is told at once, with the dates that there are."""
    with Client(deployment.settings) as client:
        if why is None:
            assert client.retrain(dry_run=True, **fields).accepted
            return
        for dry_run in (True, False):
            with pytest.raises(NotDone, match=why) as refusal:
                client.retrain(dry_run=dry_run, **fields)
            assert EVENING.isoformat() in refusal.value.answer.message
            assert client.request(refusal.value.answer.id).state == "refused"
    assert runs(deployment) == []


def test_what_was_named_on_the_topic_is_what_is_trained_and_can_be_made_again(deployment: Deployment) -> None:
    """From the message to a version whose lineage names strategy and range, and that comes out of them again."""
    request = ControlRequest(
        action="retrain", stream="probe", who="ann", reason="the new pump", strategy="ewc_replay", observed_from=EVENING
    )
    answer = by_topic(deployment, request)
    assert answer.accepted
    assert answer.retrain == request.named
    # A second person, while that one runs: what it would be is told, and what waits is named to a third.
    with Client(deployment.settings, who="bob") as bob, Client(deployment.settings, who="cyd") as cyd:
        until(lambda: bool(bob.status()["fine_tune"]["running"]))
        plan = bob.retrain(strategy="mas", dry_run=True).plan
        assert plan is not None
        assert "a fine-tune is running" in plan.begins
        waits = bob.retrain(strategy="mas", reason="another try")
        assert "folded into the next" in waits.message
        with pytest.raises(NotDone, match=r"bob's: strategy mas"):
            cyd.retrain()
        assert cyd.retrain(strategy="mas", dry_run=True).accepted
    assert ended(deployment, request.id) in ("promoted", "refused")
    lineage = Registry(str(deployment.directory / "registry")).version("probe", "v2").lineage
    named = {"strategy": "ewc_replay", "observed_from": "2026-03-01T20:00:00Z"}
    assert (lineage.strategy, lineage.settings["retrain"]) == ("ewc_replay", named)
    assert ended(deployment, waits.id) in ("promoted", "refused")
    assert [run.get("retrain") for run in runs(deployment)] == [{"strategy": "mas"}, named]
    code, said = cli(deployment, "versions", "rebuild", "probe", "v2", "--json")
    assert code == 0, said
    found = json.loads(said[said.index("{") :])
    assert (found["outcome"], found["proven"]) == ("same", True)
    code, said = cli(deployment, "versions", "show", "probe", "v2")
    assert "strategy ewc_replay, events observed from 2026-03-01T20:00:00+00:00" in said
