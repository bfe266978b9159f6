"""The Python client against a real broker, worker and learner, and the README's examples of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from stream.events import Label, Report
from stream.service import free_port
from tests.deployment import REPOSITORY, Deployment
from tests.integration.probe import deployed
from tests.kafka import KafkaBroker
from tests.test_docs import blocks
from tests.waiting import until
from trimtab import AsyncClient, Client, Invalid, NotAllowed, NotDone, Unreachable

TOKEN = "a token of the test"


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The README's stream with what is learned there before the client's turn, and a learner that wants a token."""
    directory = tmp_path_factory.mktemp("client")
    (directory / "token").write_text(TOKEN)
    guarded = {"learner": {"http": {"token_file": str(directory / "token")}}}
    with deployed(kafka, directory, {"notes": {"kind": "text"}}, guarded) as made:
        made.start_both()
        files = dict(blocks("README.md", "file"))
        made.publish(*map(Report.model_validate_json, files["events.jsonl"].splitlines()))
        made.label(*map(Label.model_validate_json, files["labels.jsonl"].splitlines()))
        until(lambda: made.status("notes")["labels_learned"] == 6)
        yield made


@pytest.mark.parametrize("which", ["sync", "async"])
def test_the_readme_s_examples_run_as_they_are_written(deployment: Deployment, which: str) -> None:
    """Whoever copies them must get what they say: an answer, a retrain that stands somewhere, a refusal in words."""
    code = dict(blocks("README.md", "client"))[which]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=deployment.directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    if which == "sync":
        assert lines[1].split()[0] in ("accepted", "running", "done")
        assert "'v1'" in lines[1]
    else:
        assert "v9" in lines[1]


def test_a_label_is_learned_and_withdrawn(deployment: Deployment) -> None:
    """A label that goes nowhere would be noticed weeks later."""
    with Client(deployment.settings, who="ann") as client:
        events = [{"event_id": f"c{n}", "text": f"the mount lost target {n}"} for n in range(3)]
        assert client.publish(*events) == 3
        found = {one.event_id for one in client.predictions(follow=True, limit=3, stop=None)}
        assert found
        before = client.status()["labels_learned"]
        client.label("c0", "pointing")
        until(lambda: client.status()["labels_learned"] == before + 1)
        client.withdraw("c0")
        until(lambda: client.status()["labels_learned"] == before)


def test_each_act_can_be_asked_about(deployment: Deployment) -> None:
    """The same words as on the topic and the command line, and a second try does nothing twice."""
    with Client(deployment.settings, who="ann") as client:
        paused = client.pause(reason="noise", request_id="pause-1")
        assert client.status()["paused"]
        client.resume(request_id="resume-1")
        assert client.pause(reason="noise", request_id="pause-1") == paused
        assert not client.status()["paused"]
        assert (client.request("pause-1").state, client.request("pause-1").who) == ("done", "ann")
        with pytest.raises(NotDone, match="first version") as refusal:
            client.rollback(request_id="back-1")
        assert refusal.value.answer.id == "back-1"
        assert client.request("back-1").state == "refused"
        assert {"pause-1", "resume-1", "back-1"} <= {one.id for one in client.requests()}


def test_each_error_says_what_to_do(deployment: Deployment) -> None:
    """Whoever writes a first script meets these before anything works."""
    with Client(deployment.settings) as client:
        with pytest.raises(Invalid, match=r"event 2: text"):
            client.publish({"event_id": "x1", "text": "fine"}, {"event_id": "x2", "text": 7})
        with pytest.raises(Invalid, match="known: notes"):
            client.label("x1", "power", stream="nots")
        with pytest.raises(Invalid, match="nobody"):
            client.request("nobody")
        with pytest.raises(Invalid, match="pattern"):
            client.promote("twelve")
    with pytest.raises(NotAllowed, match="token"):
        Client(deployment.settings, token="wrong").pause()
    with pytest.raises(Unreachable, match="trimtab learner"):
        Client(deployment.settings, learner=f"http://127.0.0.1:{free_port()}").versions()
    assert "x1" not in deployment.answered()


def test_a_cancelled_reader_ends(deployment: Deployment) -> None:
    """A service that is shut down must not hang on a topic that is silent."""

    async def main() -> None:
        async with AsyncClient(deployment.settings) as client:

            async def follow() -> None:
                async for _ in client.predictions(event_id="nobody", follow=True):
                    pass

            reader = asyncio.create_task(follow())
            await asyncio.sleep(1)
            assert not reader.done()
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader

    asyncio.run(asyncio.wait_for(main(), 30))
