"""A real Apache Kafka for tests: one node or three, started from its jars, stopped or killed at will.

Needs Java 17 or later and, the first time, Maven: the jars named in `tests/kafka/pom.xml` are fetched once
into `.cache/kafka` under the repository. Import it as `tests.kafka`; plain `kafka` is kafka-python.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from stream.events import Headers, Record

REPOSITORY = Path(__file__).resolve().parent.parent
POM = Path(__file__).resolve().parent / "kafka" / "pom.xml"
START_SECONDS = 120.0
PATIENCE = 120.0
"""Seconds for an answer of a broker on a machine that is busy with others."""

FULL_SPEED = ("-Xmx512m",)
QUICK_START = (*FULL_SPEED, "-XX:TieredStopAtLevel=1")
"""Half the processor time to start, for a broker that lives for a test run; slower once it is warm."""

UNSETTLED = frozenset(
    {KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.COORDINATOR_NOT_AVAILABLE}
)
"""What a broker says of a group whose coordinator it does not know yet."""

Payload = bytes | str | None
Outgoing = tuple[Payload, Payload] | tuple[Payload, Payload, Iterable[tuple[str, bytes]]]
"""(key, value) or (key, value, headers) of a message to publish."""


class KafkaUnavailable(Exception):
    """This machine lacks what a real Kafka needs; the message says what to install."""


class KafkaFailed(Exception):
    """The broker did not come up; the message ends with its log."""


@dataclass(frozen=True)
class Sasl:
    """Users and certificates of a SASL_SSL listener, made for one run."""

    username: str
    password: str = field(repr=False)
    mechanism: Literal["SCRAM-SHA-256", "SCRAM-SHA-512"]
    ca_file: Path
    keystore: Path

    @classmethod
    def create(cls, directory: Path, mechanism: Literal["SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512") -> Sasl:
        """Make a certificate authority and a broker certificate for localhost and 127.0.0.1 with openssl.

        Raises:
            KafkaUnavailable: openssl is not installed.
        """
        if shutil.which("openssl") is None:
            raise KafkaUnavailable("openssl is not installed, so no certificates can be made for the TLS listener")
        directory.mkdir(parents=True, exist_ok=True)

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)

        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test-ca")
        openssl("req", *key, "-keyout", "broker.key", "-out", "broker.csr", "-subj", "/CN=localhost")
        (directory / "broker.ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl(
            "x509", "-req", "-in", "broker.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", "broker.ext", "-out", "broker.crt",
        )  # fmt: skip
        keystore = directory / "keystore.pem"
        keystore.write_text("".join((directory / name).read_text() for name in ("broker.key", "broker.crt", "ca.pem")))
        return cls("trimtab", uuid.uuid4().hex, mechanism, directory / "ca.pem", keystore)


class KafkaBroker:
    """One Kafka node, broker and controller in one; its ports and its data outlive `stop` and `kill`.

    Args:
        directory: where its settings, data and `broker.log` go; one broker a directory.
        sasl: publish a SASL_SSL listener for this user instead of a plain one.
        settings: lines of server.properties to add or change.
        java_options: options of the Java machine; a benchmark gives `FULL_SPEED`.
        proxied: ports (listens, tells) of one more plain listener, whose clients are told to come by the second port,
            where a proxy is to be.
        node: its number in a cluster.
        cluster: the ports of all nodes, in order, where it is one of several; see `KafkaCluster`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        sasl: Sasl | None = None,
        settings: Mapping[str, str] | None = None,
        java_options: Sequence[str] = QUICK_START,
        proxied: tuple[int, int] | None = None,
        node: int = 1,
        cluster: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        self.directory = directory
        self._node = node
        self._cluster = tuple(cluster)
        self._proxied = proxied
        self.sasl = sasl
        self.log = directory / "broker.log"
        self._settings = dict(settings or {})
        self._java_options = tuple(java_options)
        self._ports: tuple[int, int, int] | None = self._cluster[node - 1] if self._cluster else None
        self._formatted = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        """`host:port` for a client's bootstrap servers; the same again after a restart."""
        if self._ports is None:
            raise RuntimeError("the broker was never started")
        return f"localhost:{self._ports[0]}" if self.sasl else f"127.0.0.1:{self._ports[0]}"

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    def client(self) -> dict[str, str]:
        """What a confluent-kafka client needs to connect."""
        if self.sasl is None:
            return {"bootstrap.servers": self.bootstrap}
        return {
            "bootstrap.servers": self.bootstrap,
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.sasl.ca_file),
            "sasl.mechanism": self.sasl.mechanism,
            "sasl.username": self.sasl.username,
            "sasl.password": self.sasl.password,
        }

    # Life and death

    def start(self) -> KafkaBroker:
        """Start it, on the same data and ports when it ran before, and wait until it answers.

        Raises:
            KafkaUnavailable: Java or Maven is missing.
            KafkaFailed: it ended, or did not answer in time.
        """
        first = not self._formatted
        for attempt in range(3):
            try:
                self._await(self._begin())
                return self
            except KafkaFailed as failure:
                # A port can be taken between the moment it was found free and Kafka's own bind.
                if self._cluster or not (first and "Address already in use" in str(failure) and attempt < 2):
                    raise
                self._ports, self._formatted = None, False
        raise AssertionError("unreachable")

    def stop(self, seconds: float = 20) -> None:
        """End it in good order; kill it when that takes longer than `seconds`."""
        if self._process is None:
            return
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> KafkaBroker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What tests ask of it

    def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        """Create a topic, wait until it can be written to, and return its name."""
        admin = AdminClient(self.client())
        created = admin.create_topics([NewTopic(name, partitions, -1, config=dict(config or {}))])
        created[name].result(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while True:
            metadata = admin.list_topics(name, timeout=30).topics[name]
            led = [p for p in metadata.partitions.values() if p.leader >= 0]
            if metadata.error is None and len(led) == partitions:
                return name
            if time.monotonic() > deadline:
                raise TimeoutError(f"topic {name} has no leader: {metadata.error}")
            time.sleep(0.02)

    def delete_topic(self, *names: str) -> None:
        """Delete topics."""
        admin = AdminClient(self.client())
        for future in admin.delete_topics(list(names)).values():
            future.result(PATIENCE)

    def produce(
        self, topic: str, messages: Iterable[Outgoing], *, partition: int | None = None, timestamp_ms: int = 0
    ) -> list[Record]:
        """Publish messages, in order, and return them with the places they got.

        Args:
            topic: where to.
            messages: (key, value) or (key, value, headers); text is encoded as UTF-8.
            partition: put them all there, whatever their keys say.
            timestamp_ms: Kafka's record time, milliseconds since 1970; 0 is now.
        """
        producer = Producer({**self.client(), "partitioner": "murmur2_random", "linger.ms": 1, "acks": "all"})
        found: dict[int, Record] = {}
        sent: list[Headers] = []
        wrong: list[KafkaError] = []

        def delivered(index: int, error: KafkaError | None, message: Message) -> None:
            if error is not None:
                wrong.append(error)
            else:
                # A delivery report has no headers.
                found[index] = _record(message, sent[index])

        for index, outgoing in enumerate(messages):
            key, value = outgoing[0], outgoing[1]
            sent.append(tuple(outgoing[2]) if len(outgoing) == 3 else ())
            producer.produce(
                topic,
                value,
                key,
                partition=-1 if partition is None else partition,
                on_delivery=lambda error, message, index=index: delivered(index, error, message),
                timestamp=timestamp_ms,
                headers=list(sent[index]),
            )
            producer.poll(0)
        left = producer.flush(PATIENCE)
        if wrong or left:
            raise KafkaException(wrong[0] if wrong else KafkaError(KafkaError._TIMED_OUT))
        return [found[index] for index in range(len(sent))]

    def consume_all(
        self,
        topic: str,
        isolation: Literal["read_committed", "read_uncommitted"] = "read_committed",
        *,
        timeout: float = PATIENCE,
    ) -> list[Record]:
        """Everything in the topic now, by partition and then by offset."""
        return self._read(topic, isolation, None, timeout)

    def consume(
        self,
        topic: str,
        count: int,
        isolation: Literal["read_committed", "read_uncommitted"] = "read_committed",
        *,
        timeout: float = PATIENCE,
    ) -> list[Record]:
        """Wait until the topic holds at least `count` messages and return them as `consume_all` does.

        Raises:
            TimeoutError: fewer came; the message says how many.
        """
        return self._read(topic, isolation, count, timeout)

    def partitions(self, topic: str) -> list[int]:
        """The topic's partitions, in order."""
        found = AdminClient(self.client()).list_topics(topic, timeout=30).topics[topic]
        if found.error is not None:
            raise KafkaException(found.error)
        return sorted(found.partitions)

    def end_offsets(
        self, topic: str, isolation: Literal["read_committed", "read_uncommitted"] = "read_uncommitted"
    ) -> dict[int, int]:
        """Each partition's next offset; under `read_committed`, its last stable one."""
        return self._offsets(topic, OffsetSpec.latest(), isolation)

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Each partition's first offset that is still kept."""
        return self._offsets(topic, OffsetSpec.earliest(), "read_uncommitted")

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """The offsets that a consumer group has committed; partitions without one are left out."""
        # Asked through a consumer that joins nothing: the admin client (2.16) crashes when it is asked often.
        asker = Consumer({**self.client(), "group.id": group, "enable.auto.commit": False})
        asked = [TopicPartition(topic, p) for p in self.partitions(topic)]
        ends = time.monotonic() + PATIENCE
        try:
            while True:
                try:
                    answer = asker.committed(asked, timeout=30)
                    break
                except KafkaException as error:
                    # A new group's coordinator may still be loading its log.
                    if error.args[0].code() not in UNSETTLED or time.monotonic() > ends:
                        raise
                    time.sleep(0.1)
        finally:
            asker.close()
        return {place.partition: place.offset for place in answer if place.offset >= 0}

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Drop what lies before an offset at once, as the end of a retention time would."""
        admin = AdminClient(self.client())
        for future in admin.delete_records([TopicPartition(topic, partition, before)]).values():
            future.result(PATIENCE)

    # How

    def _offsets(self, topic: str, spec: OffsetSpec, isolation: str) -> dict[int, int]:
        level = IsolationLevel.READ_COMMITTED if isolation == "read_committed" else IsolationLevel.READ_UNCOMMITTED
        asked = {TopicPartition(topic, partition): spec for partition in self.partitions(topic)}
        # An admin client that is collected takes its unanswered futures with it.
        admin = AdminClient(self.client())
        answers = admin.list_offsets(asked, isolation_level=level)
        return {place.partition: future.result(PATIENCE).offset for place, future in answers.items()}

    def _read(self, topic: str, isolation: str, count: int | None, timeout: float) -> list[Record]:
        consumer = Consumer(
            {
                **self.client(),
                "group.id": f"read-{uuid.uuid4().hex}",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": isolation,
                "fetch.wait.max.ms": 50,
            }
        )
        found: list[Record] = []
        deadline = time.monotonic() + timeout
        try:
            waiting = set(self.partitions(topic))
            consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in waiting])
            while waiting if count is None else len(found) < count or waiting:
                if time.monotonic() > deadline:
                    wanted = "the end" if count is None else f"{count} messages"
                    raise TimeoutError(f"{topic}: {len(found)} messages read in {timeout:g} s, waiting for {wanted}")
                for message in consumer.consume(1000, timeout=0.1):
                    error = message.error()
                    if error is None:
                        found.append(_record(message))
                        if count is not None:
                            waiting.add(found[-1].partition)
                    elif error.code() == KafkaError._PARTITION_EOF:
                        waiting.discard(message.partition())
                    elif not error.retriable():
                        raise KafkaException(error)
        finally:
            consumer.close()
        return sorted(found, key=lambda record: (record.partition, record.offset))

    def _write_settings(self, ports: tuple[int, int, int]) -> None:
        public, internal, controller = ports
        client = "SASL_SSL" if self.sasl else "PLAINTEXT"
        host = "localhost" if self.sasl else "127.0.0.1"
        lines = {
            "process.roles": "broker,controller",
            "node.id": str(self._node),
            "controller.quorum.voters": ",".join(
                f"{node}@127.0.0.1:{its}" for node, (_, _, its) in enumerate(self._cluster or (ports,), 1)
            ),
            "listeners": f"CLIENT://127.0.0.1:{public},INTERNAL://127.0.0.1:{internal},"
            f"CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"CLIENT://{host}:{public},INTERNAL://127.0.0.1:{internal}",
            "inter.broker.listener.name": "INTERNAL",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": f"CLIENT:{client},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self.directory / "data"),
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "500",
            "auto.create.topics.enable": "false",
            # A killed node may register again only when its old session has ended.
            "broker.session.timeout.ms": "4000",
            "broker.heartbeat.interval.ms": "500",
            "num.network.threads": "2",
            "num.io.threads": "4",
            "log.cleaner.dedupe.buffer.size": "8388608",
        }
        if self._proxied:
            listens, tells = self._proxied
            lines["listeners"] += f",PROXIED://127.0.0.1:{listens}"
            lines["advertised.listeners"] += f",PROXIED://127.0.0.1:{tells}"
            lines["listener.security.protocol.map"] += ",PROXIED:PLAINTEXT"
        if self.sasl:
            lines |= {
                "sasl.enabled.mechanisms": self.sasl.mechanism,
                f"listener.name.client.{self.sasl.mechanism.lower()}.sasl.jaas.config": (
                    "org.apache.kafka.common.security.scram.ScramLoginModule required;"
                ),
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(self.sasl.keystore),
            }
        lines |= self._settings
        text = "".join(f"{name}={value}\n" for name, value in lines.items())
        (self.directory / "server.properties").write_text(text)
        (self.directory / "log4j2.properties").write_text(
            "status=error\nappender.out.type=Console\nappender.out.name=out\nappender.out.layout.type=PatternLayout\n"
            "appender.out.layout.pattern=%d %p %m (%c)%n\nrootLogger.level=warn\nrootLogger.appenderRef.out.ref=out\n"
        )

    def _java(self, libraries: Path, *arguments: str) -> list[str]:
        configuration = f"-Dlog4j2.configurationFile={self.directory / 'log4j2.properties'}"
        # Kafka must not outlive a test run that was killed.
        leash = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        return [*leash, "java", configuration, *self._java_options, "-cp", f"{libraries}/*", *arguments]

    def _format(self, libraries: Path) -> None:
        scram: list[str] = []
        if self.sasl:
            user = f"[name={self.sasl.username},password={self.sasl.password}]"
            scram = ["--add-scram", f"{self.sasl.mechanism}={user}"]
        shutil.rmtree(self.directory / "data", ignore_errors=True)
        done = subprocess.run(
            self._java(
                libraries, "kafka.tools.StorageTool", "format", "-t", "AAAAAAAAAAAAAAAAAAAAAQ",
                "-c", str(self.directory / "server.properties"), *scram,
            ),
            capture_output=True,
            timeout=START_SECONDS,
        )  # fmt: skip
        if done.returncode:
            raise KafkaFailed(f"kafka-storage format failed:\n{done.stdout.decode()}{done.stderr.decode()}")

    def _begin(self) -> int:
        """Start its process where none runs; returns how long its log was before."""
        if self.running:
            return self.log.stat().st_size
        libraries = jars()
        if not self._formatted:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._ports = self._ports or free_ports()
            self._write_settings(self._ports)
            self._format(libraries)
            self._formatted = True
        with self.log.open("ab") as log:
            before = log.tell()
            self._process = subprocess.Popen(
                self._java(libraries, "kafka.Kafka", str(self.directory / "server.properties")),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return before

    def _await(self, before: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            ended = self._process.poll()
            if ended is not None or time.monotonic() > deadline:
                self.kill()
                why = f"ended with code {ended}" if ended is not None else f"did not answer in {START_SECONDS:g} s"
                raise KafkaFailed(f"Kafka {why}:\n{self.log.read_bytes()[before:].decode(errors='replace')[-4000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        host, port = self.bootstrap.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            # The port opens a little before the node is unfenced and listed.
            return bool(AdminClient({**self.client(), "log_level": 0}).list_topics(timeout=2).brokers)
        except (OSError, KafkaException):
            return False


class KafkaCluster(KafkaBroker):
    """Three nodes, each broker and controller: every topic has three copies, and two must have what is acknowledged.

    Asked for its topics it answers as one broker does.

    Args:
        directory: where the nodes have theirs.
        proxied: for each node what `KafkaBroker` takes; None for no such listeners.
    """

    SIZE = 3

    def __init__(self, directory: Path, *, proxied: Sequence[tuple[int, int]] | None = None) -> None:
        super().__init__(directory)
        settings = {
            "default.replication.factor": "3",
            "min.insync.replicas": "2",
            "offsets.topic.replication.factor": "3",
            "transaction.state.log.replication.factor": "3",
            "transaction.state.log.min.isr": "2",
            "share.coordinator.state.topic.replication.factor": "3",
            "share.coordinator.state.topic.min.isr": "2",
        }
        ports = [free_ports() for _ in range(self.SIZE)]
        self.nodes = {
            node: KafkaBroker(
                directory / f"node-{node}",
                settings=settings,
                proxied=proxied[node - 1] if proxied else None,
                node=node,
                cluster=ports,
            )
            for node in range(1, self.SIZE + 1)
        }

    @property
    def bootstrap(self) -> str:
        return ",".join(node.bootstrap for node in self.nodes.values())

    @property
    def running(self) -> bool:
        return all(node.running for node in self.nodes.values())

    def start(self) -> KafkaCluster:
        """Start the nodes that do not run, all at once, since one alone has no majority, and wait for them."""
        begun = {node: node._begin() for node in self.nodes.values()}
        for node, before in begun.items():
            node._await(before)
        return self

    def stop(self, seconds: float = 20) -> None:
        # In good order a node hands its partitions over first, and the last one has nobody to hand them to.
        self.kill()

    def kill(self) -> None:
        for node in self.nodes.values():
            node.kill()

    def leader(self, topic: str, partition: int) -> int:
        """The number of the node that leads a partition; -1 while none does."""
        found = AdminClient({**self.client(), "log_level": 0}).list_topics(topic, timeout=30).topics[topic]
        return found.partitions[partition].leader if found.error is None else -1


def jars() -> Path:
    """The folder with Kafka's jars, fetched with Maven when it is not there yet.

    Raises:
        KafkaUnavailable: Java is missing or too old, or Maven is missing or cannot fetch them.
    """
    java = shutil.which("java")
    if java is None:
        raise KafkaUnavailable("a real Kafka needs Java 17 or later: no `java` on the PATH")
    stated = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60).stderr
    major = re.search(r'version "(\d+)', stated)
    if major is None or int(major[1]) < 17:
        raise KafkaUnavailable(f"a real Kafka needs Java 17 or later, found: {stated.strip() or 'nothing'}")
    cache = Path(os.environ.get("TRIMTAB_TEST_KAFKA_CACHE", REPOSITORY / ".cache" / "kafka"))
    folder = cache / hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    if folder.is_dir():
        return folder
    maven = shutil.which("mvn")
    if maven is None:
        raise KafkaUnavailable(f"a real Kafka needs Maven to fetch its jars into {cache}: no `mvn` on the PATH")
    cache.mkdir(parents=True, exist_ok=True)
    # Maven's own repository is not safe for two at a time, and whoever waited finds the jars there.
    with (cache / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as working:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        fetched = Path(working) / "libs"
        arguments = ["-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={fetched}"]
        done = subprocess.run([maven, *arguments], capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise KafkaUnavailable(f"Maven could not fetch Kafka's jars:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        try:
            fetched.rename(folder)
        except OSError:
            # Another run was faster.
            if not folder.is_dir():
                raise
    return folder


def free_port() -> int:
    """A port that nothing listens on, and that no outgoing connection takes before its process listens."""
    return free_ports()[0]


def free_ports() -> tuple[int, int, int]:
    """Three ports that nothing listens on, outside the range that outgoing connections are given.

    A port of that range could be taken by any client while the broker is down between two starts.
    """
    found: list[int] = []
    while len(found) < 3:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found[0], found[1], found[2]


def _record(message: Message, headers: Headers | None = None) -> Record:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    if topic is None or partition is None or offset is None:
        raise ValueError("the message has no place in the log")
    key, value = message.key(), message.value()
    return Record(
        topic=topic,
        partition=partition,
        offset=offset,
        key=_bytes(key),
        value=_bytes(value),
        headers=headers or tuple((name, _bytes(found) or b"") for name, found in message.headers() or []),
        timestamp_ms=message.timestamp()[1],
    )


def _bytes(found: bytes | str | None) -> bytes | None:
    return found.encode() if isinstance(found, str) else found
