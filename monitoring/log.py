"""Structured logs: one line an entry, with the event, its place in the log and the version it is about.

A module takes its logger with `get_logger(__name__)`, which does nothing until the first entry. Only a
main program calls `configure`; it is the one place in trimtab that changes the interpreter's logging.
Entries of the libraries (Faust, mode, the Kafka clients) leave in the same form by the same way, and
secrets are masked in all of them.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Format = Literal["auto", "json", "console"]
"""`json` is one object a line; `console` is for eyes; `auto` is `console` on a terminal and `json` elsewhere."""

MASK = "***"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# These tell of every connection and every assignment at INFO; a person reading at night wants none of it.
_CHATTY = ("kafka", "aiokafka", "rdkafka", "fsspec", "urllib3", "asyncio", "httpx", "alembic", "sqlalchemy")
_OURS = ("faust", "mode")

_SECRET_WORDS = frozenset(
    {"password", "passwd", "secret", "token", "authorization", "credential", "credentials", "hmac"}
)
_SECRET_PAIRS = ("api_key", "apikey", "private_key")
_IN_URL = re.compile(r"(?<=://)([^\s:/@]*):([^\s/@]+)@")
_IN_TEXT = re.compile(
    r"(?P<name>[\w.\-]*(?:password|passwd|secret|token|api[_.\-]?key)['\"]?\s*[=:]\s*)(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;)}\]]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9+/=._~\-]{6,}", re.IGNORECASE)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module; it may be taken on import, before `configure`."""
    return structlog.stdlib.get_logger(name)


def bound(
    *,
    event_id: str | None = None,
    stream: str | None = None,
    topic: str | None = None,
    partition: int | None = None,
    offset: int | None = None,
    version: str | None = None,
    **more: object,
) -> AbstractContextManager[None]:
    """Within the block, put what the work is about into every entry of this task or thread.

    What is None is left out, and what an outer block said of it stays.
    """
    about = {
        "event_id": event_id,
        "stream": stream,
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "version": version,
        **more,
    }
    return cast(
        AbstractContextManager[None],
        structlog.contextvars.bound_contextvars(**{key: value for key, value in about.items() if value is not None}),
    )


def configure(level: str = "info", format: Format = "auto", stream: TextIO | None = None) -> None:  # noqa: A002
    """Send every entry of this interpreter to one place in one form. Calling it again replaces the first call.

    A Faust or mode worker replaces the root handlers when it starts: make it with
    `override_logging=False, redirect_stdouts=False`.

    Args:
        level: debug, info, warning or error.
        format: see `Format`.
        stream: where to write; standard error by default, because standard output belongs to the commands.

    Raises:
        ValueError: the level or the format is not known.
    """
    if level.lower() not in LEVELS:
        raise ValueError(f"log level is one of {', '.join(LEVELS)}; found {level!r}")
    if format not in ("auto", "json", "console"):
        raise ValueError(f"log format is one of auto, json, console; found {format!r}")
    number = LEVELS[level.lower()]
    out = sys.stderr if stream is None else stream
    console = format == "console" or (format == "auto" and out.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                # Tracebacks become text before masking: a secret may stand in an exception's message.
                structlog.processors.format_exc_info,
                mask_secrets,
                *_last(console, out),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in _OURS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(number if number == logging.DEBUG else max(number, logging.WARNING))
    logging.captureWarnings(True)


def mask_secrets(logger: WrappedLogger, name: str, event_dict: EventDict) -> EventDict:
    """Structlog processor: replace secrets, in values by their key and in texts by their shape, with `***`."""
    return cast(MutableMapping[str, Any], _masked(event_dict))


def _last(console: bool, out: TextIO) -> list[Processor]:
    if console:
        return [structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    return [structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer(default=str)]


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return _masked_text(value)
    if isinstance(value, Mapping):
        return {
            key: MASK if _is_secret(str(key)) and not isinstance(item, bool | int | float | None) else _masked(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN
    if isinstance(value, bytes):
        return _masked_text(value.decode(errors="replace"))
    if isinstance(value, BaseException):
        return _masked_text(f"{type(value).__name__}: {value}")
    return value


def _is_secret(key: str) -> bool:
    words = re.split(r"[^a-z0-9]+", key.lower())
    return not _SECRET_WORDS.isdisjoint(words) or any(pair in "_".join(words) for pair in _SECRET_PAIRS)


def _masked_text(text: str) -> str:
    if "://" in text:
        text = _IN_URL.sub(rf"\1:{MASK}@", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    return _IN_TEXT.sub(rf"\g<name>{MASK}", text)
