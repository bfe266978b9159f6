"""The pages of real processes: who may act, what acts, and how a port that is taken is told."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deployment import REPOSITORY, Deployment
from tests.integration.probe import STREAM, deployed, logged
from tests.kafka import KafkaBroker, free_port
from tests.scrape import Scrape
from tests.waiting import until

TOKEN = "a token of the test"
JSON = {"Content-Type": "application/json"}
BEARER = {**JSON, "Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A learner that listens beyond loopback with a token, and two workers on one host."""
    directory = tmp_path_factory.mktemp("http")
    (directory / "token").write_text(TOKEN + "\n")
    beyond = {"http": {"host": "0.0.0.0", "token_file": str(directory / "token")}}
    with deployed(kafka, directory, {"probe": STREAM}, {"learner": beyond, "worker": {"http": {"port": 0}}}) as made:
        made.start("learner")
        made.start("worker")
        made.start("worker")
        until(lambda: made.ready(made.learner_port))
        yield made


def ask(port: int, method: str, path: str, body: bytes = b"{}", headers: dict[str, str] = JSON) -> tuple[int, Any]:
    """Status and JSON of one request, with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content[:1] in (b"{", b"[") else content.decode(errors="replace")
    finally:
        connection.close()


def requests_acted_on(deployment: Deployment) -> float:
    """How many requests the learner has taken or refused by their content."""
    return Scrape(deployment.learner_port).total("trimtab_control_total")


@pytest.mark.parametrize(
    "headers",
    [
        JSON,
        {**JSON, "Authorization": "Bearer wrong"},
        {**JSON, "Authorization": f"Basic {TOKEN} "},
        {**BEARER, "Authorization": "Bearer"},
    ],
    ids=["none", "wrong", "another scheme", "empty"],
)
def test_without_the_token_nobody_acts(deployment: Deployment, headers: dict[str, str]) -> None:
    """Whoever reaches the port of a learner could otherwise roll a model back."""
    before = requests_acted_on(deployment)
    code, body = ask(deployment.learner_port, "POST", "/streams/probe/pause", headers=headers)
    assert code == 401
    assert "token" in body["error"]
    assert requests_acted_on(deployment) == before


def test_with_the_token_one_acts(deployment: Deployment) -> None:
    """The refusals of the other tests mean nothing where the right token is refused too."""
    code, answer = ask(deployment.learner_port, "POST", "/streams/probe/pause", b'{"who": "test"}', BEARER)
    assert (code, answer["accepted"]) == (202, True)
    code, status = ask(deployment.learner_port, "GET", "/streams/probe")
    assert (code, status["paused"]) == (200, True)
    code, _ = ask(deployment.learner_port, "POST", "/streams/probe/resume", b"", BEARER)
    assert code == 202


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_request_that_a_foreign_web_page_could_send_does_not_act(deployment: Deployment, kind: str | None) -> None:
    """A browser sends these types across sites without asking, also to an address that only it can reach."""
    before = requests_acted_on(deployment)
    headers = {**BEARER, "Content-Type": kind} if kind else {"Authorization": BEARER["Authorization"]}
    code, _ = ask(deployment.learner_port, "POST", "/streams/probe/retrain", b'{"who": "x"}', headers)
    assert code == 415
    assert requests_acted_on(deployment) == before


@pytest.mark.parametrize("action", ["retrain", "promote", "rollback", "pause", "resume"])
def test_reading_a_page_never_acts(deployment: Deployment, action: str) -> None:
    """A link, a crawler or a prefetch must not change what is served."""
    before = requests_acted_on(deployment)
    for method in ("GET", "HEAD"):
        code, _ = ask(deployment.learner_port, method, f"/streams/probe/{action}", b"", BEARER)
        assert code in (404, 405)
    assert requests_acted_on(deployment) == before


def test_an_unknown_stream_is_said_to_be_unknown(deployment: Deployment) -> None:
    """A typing error must not look like success."""
    for page in ("", "/versions", "/classes"):
        code, body = ask(deployment.learner_port, "GET", f"/streams/nowhere{page}")
        assert code == 404
        assert "nowhere" in body["error"]
    code, answer = ask(deployment.learner_port, "POST", "/streams/nowhere/pause", b"{}", BEARER)
    assert code == 409
    assert "nowhere" in answer["message"]
    assert "probe" in answer["message"]


@pytest.mark.parametrize(
    "body",
    [b"{", b"[1]", b'"text"', b"7", b'{"version": "12"}', b'{"surprise": 1}', b"\xff", b"[" * 50_000],
    ids=["torn", "list", "text", "number", "version", "unknown key", "no text", "deep"],
)
def test_a_malformed_request_is_refused_in_words(deployment: Deployment, body: bytes) -> None:
    """An operator's script needs to know what is wrong with what it sends; a 500 says nothing."""
    code, answer = ask(deployment.learner_port, "POST", "/streams/probe/rollback", body, BEARER)
    assert code == 400
    assert answer["error"]


def test_an_unknown_action_is_refused(deployment: Deployment) -> None:
    """Only the actions that the audit knows may be asked for."""
    code, answer = ask(deployment.learner_port, "POST", "/streams/probe/destroy", b"{}", BEARER)
    assert code == 400
    assert "action" in answer["error"]


def test_two_workers_share_a_host(deployment: Deployment) -> None:
    """Port 0 gives each its own; two replicas on one machine are the usual first step."""

    def ports() -> set[int]:
        lines = [line for line in logged(deployment, "worker").splitlines() if "serving on http://" in line]
        return {int(line.partition("serving on http://127.0.0.1:")[2].partition('"')[0]) for line in lines}

    until(lambda: len(ports()) == 2 and all(deployment.ready(port) for port in ports()))
    assert all(process.poll() is None for process in deployment.processes)


@pytest.mark.parametrize("command", ["worker", "learner"])
def test_a_port_that_is_taken_is_one_clear_sentence(deployment: Deployment, command: str) -> None:
    """A traceback at three in the morning helps nobody."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1" if command == "worker" else "0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(deployment, command, "--port", str(port))
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "choose another port" in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("trimtab:")]) == 1


def test_listening_beyond_loopback_needs_a_token(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner must not open its controls to a network by a change of one line."""
    monkeypatch.setenv("TRIMTAB_LEARNER__HTTP__TOKEN_FILE", "null")
    done = run(deployment, "learner", "--port", str(free_port()))
    assert done.returncode == 2
    assert "needs a token" in done.stderr
    assert "Traceback" not in done.stderr


def run(deployment: Deployment, *command: str) -> subprocess.CompletedProcess[str]:
    """A command that is to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *command, "--config", str(deployment.settings)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
