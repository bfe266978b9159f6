"""Spans of what a batch and a fine-tune go through, sent by OTLP where an endpoint is set.

Without one there is no `Tracing`, OpenTelemetry is not imported, and the work asks once a batch whether there is one.
With one, a batch and its stages are spans of a trace of their own, which links to the traces of its events; and an
event that came with a `traceparent` whose sampled flag is set has a span in its own trace, which links back to the
batch. Spans name places in the log and no event ids, because traces outlive the events.

Parentage and flags: W3C Trace Context, level 1, sections 3.2 and 4. Links for batches: OpenTelemetry's semantic
conventions for messaging spans, "batch receiving".
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import Histogram
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

logger = logging.getLogger(__name__)

Headers = Iterable[tuple[str, bytes]]
Attribute = str | int | float | bool

LINKS = 128
"""Events of a batch that its span links to; more are left out, and counted in an attribute."""
PATH = "/v1/traces"
_BEGAN: ContextVar[int] = ContextVar("began")


class TracingSettings(BaseModel):
    """Where spans go; without an endpoint there are none."""

    model_config = ConfigDict(extra="forbid")

    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s]+$",
        description="OTLP over HTTP of a collector, such as http://collector:4318; unset, nothing is traced.",
    )
    token_file: Path | None = Field(default=None, description="File that holds a bearer token for the collector.")
    share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of batches and fine-tunes that are traced; events are where their traceparent says so.",
    )
    timeout_seconds: float = Field(
        default=5.0, gt=0, le=60, description="Longest time that sending may take, also at a process's end, in seconds."
    )


class Tracing:
    """Makes spans. Safe on any thread; a span's children are those made within it on its thread.

    Args:
        settings: with an endpoint.
        service: `worker` or `learner`.
        release: trimtab's version.

    Raises:
        ImportError: the extra `tracing` is not installed.
        OSError: the token's file cannot be read.
    """

    def __init__(self, settings: TracingSettings, service: str, release: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert settings.endpoint is not None
        token = settings.token_file.read_text().strip() if settings.token_file else ""
        resource = Resource.create(
            {
                "service.name": f"trimtab-{service}",
                "service.version": release,
                "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
            }
        )
        address = settings.endpoint.rstrip("/")
        exporter = OTLPSpanExporter(
            address if address.endswith(PATH) else address + PATH,
            headers={"Authorization": f"Bearer {token}"} if token else None,
            timeout=settings.timeout_seconds,
        )
        self._trace, self._context = trace, TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            ParentBased(TraceIdRatioBased(settings.share)),
            resource,
            shutdown_on_exit=False,
            span_limits=SpanLimits(max_links=LINKS),
        )
        # It sends on a thread of its own, and what it cannot hold it lets go: the work never waits for a collector.
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("trimtab", release)

    @contextmanager
    def batch(self, name: str, headers: Iterable[Headers], **attributes: Attribute) -> Iterator[None]:
        """A batch's span, the first of a trace of its own, with links to the events that are traced.

        Args:
            headers: of its messages.
        """
        began = _BEGAN.set(time.time_ns())
        try:
            traced = [found for each in headers if (found := self._parent(each)) is not None]
            if len(traced) > LINKS:
                attributes["trimtab.events_not_linked"] = len(traced) - LINKS
            links = [self._trace.Link(parent) for parent in traced[:LINKS]]
            with self._tracer.start_as_current_span(
                name,
                self._trace.set_span_in_context(self._trace.INVALID_SPAN),
                kind=self._trace.SpanKind.CONSUMER,
                attributes=attributes,
                links=links,
            ):
                yield
        finally:
            _BEGAN.reset(began)

    @contextmanager
    def span(self, name: str, **attributes: Attribute) -> Iterator[None]:
        """A span within the one that is open; an error that leaves it is noted in it."""
        with self._tracer.start_as_current_span(name, attributes=attributes):
            yield

    def note(self, *, failed: bool = False, **attributes: Attribute) -> None:
        """Add to the span that is open, and whether its work came to nothing."""
        span = self._trace.get_current_span()
        span.set_attributes(attributes)
        if failed:
            span.set_status(self._trace.StatusCode.ERROR)

    def event(self, name: str, headers: Headers, **attributes: Attribute) -> bytes | None:
        """One event's part in the batch that is open, from the batch's beginning until now, in the event's own trace.

        Returns:
            The `traceparent` that names it; None where the event is not traced.
        """
        parent = self._parent(headers)
        if parent is None:
            return None
        batch = self._trace.get_current_span().get_span_context()
        span = self._tracer.start_span(
            name,
            self._trace.set_span_in_context(self._trace.NonRecordingSpan(parent)),
            kind=self._trace.SpanKind.CONSUMER,
            attributes=attributes,
            links=[self._trace.Link(batch)] if batch.trace_flags.sampled else [],
            start_time=_BEGAN.get(time.time_ns()),
        )
        span.end()
        made = span.get_span_context()
        return f"00-{made.trace_id:032x}-{made.span_id:016x}-{made.trace_flags:02x}".encode()

    def close(self) -> None:
        """Send what is left; returns once it is sent, or was not taken in time."""
        self._provider.shutdown()

    def _parent(self, headers: Headers) -> SpanContext | None:
        """The trace that a message is part of, where it is one that is kept."""
        carried: dict[str, str] = {}
        for name, value in headers:
            if name in ("traceparent", "tracestate"):
                carried.setdefault(name, (value or b"").decode("ascii", errors="replace"))
        if "traceparent" not in carried:
            return None
        found = self._trace.get_current_span(self._context.extract(carried, context={})).get_span_context()  # type: ignore[arg-type]
        return found if found.is_valid and found.trace_flags.sampled else None


@contextmanager
def stage(seconds: Histogram, name: str, tracing: Tracing) -> Iterator[None]:
    """Time a stage and make a span of it."""
    with seconds.labels(name).time(), tracing.span(name):
        yield


def timed(seconds: Histogram, name: str, tracing: Tracing | None) -> AbstractContextManager[object]:
    """Time a stage, and make a span of it where there is tracing."""
    return seconds.labels(name).time() if tracing is None else stage(seconds, name, tracing)


def replaced(headers: tuple[tuple[str, bytes], ...], traceparent: bytes) -> tuple[tuple[str, bytes], ...]:
    """The headers of what follows from an event, under the event's span."""
    return tuple((name, traceparent if name == "traceparent" else value) for name, value in headers)
