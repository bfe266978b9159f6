"""Spans as a collector receives them: which trace they are in, what they link to, and that nothing waits for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitoring.tracing import LINKS, Tracing, TracingSettings
from tests.otlp import Collector, collector

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def headers(flags: str = "01", trace: str = TRACE) -> tuple[tuple[str, bytes], ...]:
    """Of an event in a trace."""
    return (("tenant", b"a"), ("traceparent", f"00-{trace}-{PARENT}-{flags}".encode()))


def opened(found: Collector, **settings: object) -> Tracing:
    return Tracing(TracingSettings(endpoint=found.endpoint, **settings), "worker", "1")  # type: ignore[arg-type]


def test_an_event_s_span_is_in_its_own_trace_and_linked_with_its_batch(tmp_path: Path) -> None:
    """A batch has many parents: whoever follows one event must find its batch, and whoever sees a batch its events."""
    (tmp_path / "token").write_text("a collector's token\n")
    with collector() as found:
        tracing = opened(found, token_file=tmp_path / "token")
        with tracing.batch("answer", [headers(), headers("00"), ()], size=3):
            with tracing.span("decode"):
                pass
            carried = tracing.event("answer event", headers(), place="here")
            assert tracing.event("answer event", headers("00")) is None, "its sender keeps no trace"
            assert tracing.event("answer event", ()) is None
        tracing.close()
    (batch,), (decode,), (event,) = found.named("answer"), found.named("decode"), found.named("answer event")
    assert (batch.parent, batch.links, batch.attributes) == ("", ((TRACE, PARENT),), {"size": 3})
    assert (decode.trace, decode.parent) == (batch.trace, batch.id)
    assert (event.trace, event.parent, event.links) == (TRACE, PARENT, ((batch.trace, batch.id),))
    assert event.attributes == {"place": "here"}
    assert carried == f"00-{TRACE}-{event.id}-01".encode()
    assert found.tokens == {"Bearer a collector's token"}
    assert {span.service for span in found.spans} == {"trimtab-worker"}


@pytest.mark.parametrize(
    "value", [b"", b"\xff\xfe", b"00-0-0-01", b"x" * 100_000, f"00-{'0' * 32}-{PARENT}-01".encode(), None]
)
def test_a_torn_traceparent_is_none(value: bytes | None) -> None:
    """It comes from strangers: it must neither stop an answer nor put it into a trace that is nobody's."""
    with collector() as found:
        tracing = opened(found)
        torn = (("traceparent", value), ("tracestate", b"\xff=,,"))
        with tracing.batch("answer", [torn]):  # type: ignore[list-item]
            assert tracing.event("answer event", torn) is None  # type: ignore[arg-type]
        tracing.close()
    assert [span.links for span in found.spans] == [()]


def test_an_error_and_a_large_batch_are_noted() -> None:
    """What failed is what traces are opened for; and no batch may make a span that no collector takes."""
    with collector() as found:
        tracing = opened(found)
        many = [headers(trace=f"{number:032x}") for number in range(1, LINKS + 11)]
        with pytest.raises(ValueError), tracing.batch("answer", many):
            raise ValueError("torn")
        with tracing.span("fine-tune"):
            tracing.note(failed=True, outcome="failed")
        tracing.close()
    (batch,), (run,) = found.named("answer"), found.named("fine-tune")
    assert (batch.failed, len(batch.links), batch.attributes["trimtab.events_not_linked"]) == (True, LINKS, 10)
    assert (run.failed, run.attributes) == (True, {"outcome": "failed"})


def test_a_share_of_batches_leaves_traced_events_whole() -> None:
    """A worker makes fifty batches a second; who traces one event of a thousand does not want them all."""
    with collector() as found:
        tracing = opened(found, share=0.0)
        with tracing.batch("answer", [headers()]), tracing.span("decode"):
            tracing.event("answer event", headers())
        tracing.close()
    assert [(span.name, span.trace, span.links) for span in found.spans] == [("answer event", TRACE, ())]


def test_a_collector_that_is_away_keeps_nobody_waiting_for_ever() -> None:
    """Tracing is the least of what a process does: it ends in time, and works, without a collector."""
    tracing = Tracing(TracingSettings(endpoint="http://127.0.0.1:9", timeout_seconds=0.1), "worker", "1")
    for _ in range(5_000):
        with tracing.span("decode"):
            pass
    tracing.close()
