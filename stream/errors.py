"""Errors, arranged by what the process that meets one must do.

::

    TrimtabError
    ├── RetryLater          transient: rewind to the last offset commit and try again
    ├── DeadLetter          this one message is at fault: park its bytes, count it, go on
    └── Stop                nothing more may be done: end the process with a non-zero code
        ├── Misconfigured   the operator must change something; the message says what
        ├── Superseded      another process owns this work now
        └── OffsetGap       a commit would skip messages that were not answered

Callers branch on the reaction, never on where the error was raised.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a message is in dead letters; a bounded set, because it labels a metric."""

    MALFORMED_JSON = "malformed_json"
    SCHEMA_VERSION = "schema_version"
    INVALID_FIELD = "invalid_field"
    UNKNOWN_STREAM = "unknown_stream"
    NOT_FINITE = "not_finite"
    RAGGED = "ragged"
    MISSING_CHANNEL = "missing_channel"
    TEXT_TOO_LONG = "text_too_long"
    TOO_LARGE = "too_large"
    CLOSED_LABEL_SET = "closed_label_set"
    CLASS_NAME = "class_name"
    CLASS_QUOTA = "class_quota"
    MODEL_FAILED = "model_failed"


class TrimtabError(Exception):
    """Base of every error that trimtab raises on purpose."""


class RetryLater(TrimtabError):
    """A part outside this process is away for now; the work is repeated from the last commit."""


class DeadLetter(TrimtabError):
    """One message cannot be used, and repeating it would not help.

    Args:
        reason: the bounded cause that labels the metric and the `trimtab-reason` header.
        field: dotted path of the field at fault, empty when the whole message is.
        detail: a sentence for a person: what was found and what is allowed.
        event_id: the event's id when it could be read.
    """

    def __init__(self, reason: Reason, field: str, detail: str, event_id: str | None = None) -> None:
        self.reason = reason
        self.field = field
        self.detail = detail
        self.event_id = event_id
        where = f"{field}: " if field else ""
        which = f" (event {event_id})" if event_id else ""
        super().__init__(f"{reason}: {where}{detail}{which}")


class Stop(TrimtabError):
    """The process must end with a non-zero code; going on would break a promise."""


class Misconfigured(Stop):
    """The settings, the topics or the machine must be changed by the operator."""


class Superseded(Stop):
    """Another process owns this work now; nothing this one still holds may be written."""


class OffsetGap(Stop):
    """A commit does not follow the last one of its partition, so messages would be skipped."""
