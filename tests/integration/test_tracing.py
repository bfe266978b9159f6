"""One trace from the event through worker and learner, over real processes and a real collector's protocol."""

from __future__ import annotations

from pathlib import Path

from stream.events import encode
from tests.deployment import label
from tests.integration.probe import FREQUENCIES, STREAM, deployed, publish, window
from tests.kafka import KafkaBroker
from tests.otlp import collector
from tests.waiting import until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_trace_goes_from_the_event_through_worker_and_learner(kafka: KafkaBroker, tmp_path: Path) -> None:
    """Who asks where the time of one event went must see every process that had it, and the batches it was in."""
    # Its fine-tune is given up before it has begun to train.
    hasty = {**STREAM, "finetune": {**STREAM["finetune"], "kill_after_seconds": 0.01}}
    carried = (("traceparent", f"00-{TRACE}-{PARENT}-01".encode()),)
    with (
        collector() as found,
        deployed(kafka, tmp_path, {"probe": hasty}, {"tracing": {"endpoint": found.endpoint}}) as deployment,
    ):
        deployment.start_both()
        before = publish(deployment, [window("probe", name, 0) for name in FREQUENCIES])
        deployment.label(*(label("probe", event_id, event_id.partition("-")[0]) for event_id in before))
        until(lambda: deployment.status("probe")["labels_learned"] == len(before))
        code, asked = deployment.ask("probe", "retrain")
        assert code == 202, asked
        event = window("probe", "slow", 1)
        kafka.produce(deployment.topics.name("telemetry"), [(b"slow-1", encode(event), carried)])
        until(lambda: "slow-1" in deployment.answered())
        said = encode(label("probe", "slow-1", "slow"))
        kafka.produce(deployment.topics.name("labels"), [(b"slow-1", said, carried)])
        until(lambda: len(found.trace(TRACE)) == 3 and bool(found.named("fine-tune")))
        # A batch's own span ends after its events', and may come with the next export.
        batches = {link for span in found.trace(TRACE) for link in span.links}
        until(lambda: batches <= {(span.trace, span.id) for span in found.spans})
        (prediction,) = (record for record in deployment.records("predictions") if record.key == b"slow-1")
    spans = {span.name: span for span in found.trace(TRACE)}
    answer, joined, learned = spans["answer event"], spans["join event"], spans["learn event"]
    assert (answer.service, joined.service, learned.service) == ("trimtab-worker", *["trimtab-learner"] * 2)
    assert (answer.parent, joined.parent, learned.parent) == (PARENT, answer.id, PARENT)
    assert dict(prediction.headers)["traceparent"] == f"00-{TRACE}-{answer.id}-01".encode()
    ((batch, _),) = answer.links
    assert {span.name for span in found.trace(batch)} == {"answer", "decode", "predict", "produce", "commit"}
    ((batch, _),) = learned.links
    assert {span.name for span in found.trace(batch)} == {"join", "learn"}
    (run,) = found.named("fine-tune")
    assert (run.failed, run.attributes["trimtab.outcome"]) == (True, "failed")


def test_a_fine_tune_that_makes_a_version_is_one_trace_of_its_parts(kafka: KafkaBroker, tmp_path: Path) -> None:
    """Who asks why a retrain took an hour must see which part of it did, and what came of it."""
    with (
        collector() as found,
        deployed(kafka, tmp_path, {"probe": STREAM}, {"tracing": {"endpoint": found.endpoint}}) as deployment,
    ):
        deployment.start_both()
        events = publish(deployment, [window("probe", name, number) for name in FREQUENCIES for number in range(30)])
        deployment.label(*(label("probe", event_id, event_id.partition("-")[0]) for event_id in events))
        until(lambda: deployment.status("probe")["scored"] == len(events), seconds=120)
        code, asked = deployment.ask("probe", "retrain", reason="a test")
        assert code == 202, asked
        until(lambda: bool(found.named("fine-tune")), seconds=240)
        made = deployment.versions("probe")["v2"]["state"]
    (run,) = found.named("fine-tune")
    assert (run.service, run.parent, run.failed) == ("trimtab-learner", "", False)
    assert (run.attributes["trimtab.cause"], run.attributes["trimtab.stream"]) == ("hand", "probe")
    assert run.attributes["trimtab.outcome"] == made
    parts = [span for span in found.trace(run.trace) if span.parent == run.id]
    assert {span.name for span in parts} == {"prepare", "train", "embed", "examine", "conclude"}
    assert not any(span.failed for span in parts)
    assert sum(span.seconds for span in parts) <= run.seconds, "one after another"
