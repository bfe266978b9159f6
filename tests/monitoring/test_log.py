"""Logs: one form for all, bound to what the work is about, and without secrets."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from monitoring.log import MASK, bound, configure, get_logger

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Logging belongs to the interpreter: put it back for the tests of other rooms."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class Log:
    """Standard error of a program that logs as JSON."""

    def __init__(self, level: str = "info") -> None:
        self.out = io.StringIO()
        configure(level, "json", self.out)

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


def test_an_entry_is_one_json_object_with_its_context() -> None:
    """Every entry must be found again by the event, its place in the log or the version."""
    log = Log()
    with bound(event_id="e1", topic="reports", partition=3, offset=17, version="v12.3456"):
        get_logger("stream.worker").info("predicted", label="quiet")
    get_logger("stream.worker").info("done")
    first, second = log.entries
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "message": "predicted",
        "level": "info",
        "logger": "stream.worker",
        "event_id": "e1",
        "topic": "reports",
        "partition": 3,
        "offset": 17,
        "version": "v12.3456",
        "label": "quiet",
    }
    assert "event_id" not in second


def test_an_inner_block_adds_and_gives_back() -> None:
    """A batch is bound to its partition, and each of its events to its offset."""
    log = Log()
    with bound(partition=3, offset=1):
        with bound(offset=2, version=None):
            get_logger("a").info("inner")
        get_logger("a").info("outer")
    assert [(entry["partition"], entry["offset"]) for entry in log.entries] == [(3, 2), (3, 1)]


async def test_tasks_do_not_see_each_other() -> None:
    """Two partitions in one event loop must not be told as one another's."""
    log = Log()

    async def work(partition: int) -> None:
        with bound(partition=partition):
            await asyncio.sleep(0)
            get_logger("a").info("work", mine=partition)

    await asyncio.gather(*(work(partition) for partition in range(5)))
    assert all(entry["partition"] == entry["mine"] for entry in log.entries)


def test_the_libraries_speak_in_the_same_form() -> None:
    """Half of what goes wrong at night is told by Faust or a Kafka client."""
    log = Log()
    with bound(partition=1):
        logging.getLogger("faust.app").warning("rebalance of %s", "group")
        logging.getLogger("mode.supervisors").info("restart", extra={"service": "worker"})
    logging.getLogger("kafka.conn").error("no broker")
    assert [(entry["logger"], entry["level"], entry["message"]) for entry in log.entries] == [
        ("faust.app", "warning", "rebalance of group"),
        ("mode.supervisors", "info", "restart"),
        ("kafka.conn", "error", "no broker"),
    ]
    assert log.entries[0]["partition"] == 1
    assert log.entries[1]["service"] == "worker"


def test_the_chatter_of_clients_is_left_out_unless_asked_for() -> None:
    """They tell of each connection at INFO; at DEBUG somebody wants to know."""
    for level, expected in (("info", 0), ("debug", 1)):
        log = Log(level)
        logging.getLogger("kafka.conn").info("connecting")
        assert len(log.entries) == expected


def test_handlers_of_libraries_do_not_print_twice() -> None:
    """Faust and mode bring handlers of their own."""
    logging.getLogger("faust").addHandler(logging.StreamHandler(io.StringIO()))
    log = Log()
    logging.getLogger("faust").error("once")
    assert len(log.entries) == 1
    assert not logging.getLogger("faust").handlers


def test_below_the_level_nothing_is_written() -> None:
    """Debugging entries carry whole events."""
    log = Log("warning")
    get_logger("a").info("no")
    get_logger("a").warning("yes")
    assert [entry["message"] for entry in log.entries] == ["yes"]


@pytest.mark.parametrize(
    "fields",
    [
        {"sasl_password": "hunter2"},
        {"sasl.password": "hunter2"},
        {"Authorization": "hunter2"},
        {"api-key": "hunter2"},
        {"control": {"hmac": b"hunter2", "all": [{"token": "hunter2"}]}},
        {"url": "postgresql://learner:hunter2@db/trimtab"},
        {"line": "sasl.password=hunter2, x=1"},
        {"line": '{"sasl_password": "hunter2"}'},
        {"line": "Authorization: Bearer hunter2hunter2"},
        {"error": ValueError("password=hunter2")},
        {"raw": b"secret: hunter2"},
        {"pair": ("token=hunter2", 1)},
    ],
)
@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_are_masked(fields: dict[str, Any], form: Any) -> None:
    """Logs are copied into tickets; no password may go with them, whichever way it came in."""
    out = io.StringIO()
    configure("info", form, out)
    get_logger("a").info("connecting", **fields)
    assert "hunter2" not in out.getvalue()
    assert MASK in out.getvalue()


def test_secrets_in_messages_and_tracebacks_are_masked() -> None:
    """Clients put their settings into what they raise."""
    log = Log()
    try:
        raise RuntimeError("cannot connect to kafka://me:hunter2@broker with password='hunter2 too'")
    except RuntimeError:
        get_logger("a").exception("failed with token=%s", "hunter2")
        logging.getLogger("kafka").exception("failed")
    ours, theirs = log.entries
    for entry in (ours, theirs):
        assert "RuntimeError" in entry["exception"]
        assert "hunter2@" not in entry["exception"]
        assert "kafka://me:***@broker" in entry["exception"]
    assert ours["message"] == f"failed with token={MASK}"


def test_what_is_no_secret_stays() -> None:
    """A log that masks numbers of tokens is of no use to whoever tunes an encoder."""
    log = Log()
    get_logger("a").info("ok", max_tokens=128, token_count=7, key="e1", url="http://host:9090/x", secret=None)
    entry = log.entries[0]
    assert (entry["max_tokens"], entry["token_count"], entry["key"]) == (128, 7, "e1")
    assert entry["url"] == "http://host:9090/x"
    assert entry["secret"] is None


def test_any_value_leaves_as_valid_json() -> None:
    """One entry that a log collector cannot read is lost when it is needed most."""
    log = Log()
    get_logger("a").info("odd", path=Path("/x"), nan=float("nan"), nested={1: {2, 3}}, text="a\nb\u2028")
    line = log.out.getvalue()
    assert line.count("\n") == 1
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert entry["path"] == "/x"


def test_a_warning_of_python_is_an_entry() -> None:
    """Deprecations of a client announce tomorrow's failure."""
    log = Log()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", UserWarning, stacklevel=1)
    assert "old" in log.entries[0]["message"]


def test_configuring_again_replaces_the_first() -> None:
    """A program that reads its settings after it began to log must not write all twice."""
    first = Log()
    second = Log()
    get_logger("a").info("x")
    assert not first.entries
    assert len(second.entries) == 1


@pytest.mark.parametrize(("level", "form"), [("loud", "json"), ("info", "xml")])
def test_unknown_levels_and_formats_are_refused(level: str, form: Any) -> None:
    """A mistyped level must not turn the logs off."""
    with pytest.raises(ValueError, match=r"is one of"):
        configure(level, form)


def test_importing_changes_nothing_and_logs_go_to_standard_error() -> None:
    """A library that configures logging on import takes it from its user; standard output is for the commands."""
    program = (
        "import logging; from monitoring.log import configure, get_logger; log = get_logger('a');"
        "assert not logging.getLogger().handlers; configure(); log.info('hello'); print('result')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    assert json.loads(done.stderr)["message"] == "hello"
