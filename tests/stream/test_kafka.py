"""One block of settings for every client, and topics that fit each other: on a real Kafka, plain and secured."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiokafka  # type: ignore[import-untyped]
import faust
import pytest
from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped]
from confluent_kafka import Producer
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaConsumer, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from pydantic import BaseModel, ValidationError

from stream.errors import Misconfigured, RetryLater
from stream.kafka import KINDS, KafkaSettings, Topics, admin_client, check_broker, check_topics, create_topics
from tests.kafka import KafkaBroker, Sasl
from tests.waiting import until

SECURED = {"security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512", "sasl_username": "trimtab"}
PASSWORD = "correct-horse-battery"


class Outer(BaseModel):
    """As the whole settings file holds the block."""

    kafka: KafkaSettings


def settings_for(broker: KafkaBroker, **changed: Any) -> KafkaSettings:
    """The block that reaches a test broker."""
    found: dict[str, Any] = {"bootstrap_servers": broker.bootstrap, "timeout_seconds": 30}
    if broker.sasl is not None:
        found |= {
            "security_protocol": "SASL_SSL",
            "ca_file": broker.sasl.ca_file,
            "sasl_mechanism": broker.sasl.mechanism,
            "sasl_username": broker.sasl.username,
            "sasl_password": broker.sasl.password,
        }
    return KafkaSettings.model_validate(found | changed)


# Settings


@pytest.mark.parametrize(
    ("given", "servers", "url"),
    [
        ("kafka-1:9092", "kafka-1:9092", "kafka://kafka-1:9092"),
        ("a:1, b:2", "a:1,b:2", "kafka://a:1;kafka://b:2"),
        (["a:1", "[::1]:2"], "a:1,[::1]:2", "kafka://a:1;kafka://[::1]:2"),
    ],
)
def test_servers_are_a_text_or_a_list(given: object, servers: str, url: str) -> None:
    """YAML invites a list, Kafka's own files a comma; both must reach every client."""
    kafka = KafkaSettings.model_validate({"bootstrap_servers": given})
    assert kafka.confluent()["bootstrap.servers"] == servers
    assert kafka.kafka_python()["bootstrap_servers"] == servers.split(",")
    assert kafka.faust_url() == url
    assert kafka.faust_credentials() is None


@pytest.mark.parametrize("wrong", ["", "kafka", "kafka:0", "kafka:70000", "http://kafka:9092", "a:1,,b:2", 9092, None])
def test_an_address_without_a_port_is_refused(wrong: object) -> None:
    """Clients only retry for ever on such a thing, so it must be refused when the file is read."""
    with pytest.raises(ValidationError) as refused:
        Outer.model_validate({"kafka": {"bootstrap_servers": wrong}})
    assert [error["loc"] for error in refused.value.errors()] == [("kafka", "bootstrap_servers")]


@pytest.mark.parametrize(
    ("block", "key"),
    [
        ({"security_protocol": "SASL_SSL", "sasl_username": "u", "sasl_password": PASSWORD}, "sasl_mechanism"),
        ({**SECURED, "sasl_username": None, "sasl_password": PASSWORD}, "sasl_username"),
        (SECURED, "sasl_password_file"),
        ({**SECURED, "sasl_password": PASSWORD, "sasl_password_file": "/run/secrets/kafka"}, "sasl_password_file"),
        ({**SECURED, "sasl_password": PASSWORD, "sasl_mechanism": "GSSAPI"}, "sasl_mechanism"),
        ({"sasl_password": PASSWORD}, "sasl_password_file"),
        ({"sasl_username": "u"}, "sasl_username"),
        ({"security_protocol": "PLAINTEXT", "ca_file": "/ca.pem"}, "ca_file"),
        ({**SECURED, "sasl_pasword": PASSWORD, "sasl_password_file": "/run/secrets/kafka"}, "sasl_pasword"),
        ({**SECURED, "sasl_password": [PASSWORD]}, "sasl_password"),
    ],
)
def test_half_a_secret_is_refused_by_its_key_and_kept(block: dict[str, Any], key: str) -> None:
    """A half-filled block must not connect unprotected, and its refusal must not print the password."""
    with pytest.raises(ValidationError) as refused:
        Outer.model_validate({"kafka": block})
    assert ("kafka", key) in [error["loc"] for error in refused.value.errors()]
    assert PASSWORD not in str(refused.value) + repr(refused.value) + refused.value.json() + str(refused.value.errors())


@given(st.text(min_size=1, max_size=30).map(lambda text: PASSWORD + text))
def test_no_representation_shows_the_password(password: str) -> None:
    """Settings are logged at start and printed by `config check`; the password must not be."""
    kafka = KafkaSettings.model_validate({**SECURED, "security_protocol": "SASL_PLAINTEXT", "sasl_password": password})
    shown = f"{kafka} {kafka!r} {kafka.model_dump()} {kafka.model_dump_json()} {kafka.faust_credentials()!r}"
    assert PASSWORD not in shown
    assert PASSWORD not in json.dumps(Outer(kafka=kafka).model_dump(mode="json"))
    assert kafka.password() == kafka.confluent()["sasl.password"] == password
    assert kafka.kafka_python()["sasl_plain_password"] == kafka.faust_credentials().password == password


def test_a_password_of_digits_and_a_password_file(tmp_path: Path) -> None:
    """YAML reads 123456 as a number, and editors end a secret's file with a line end."""
    assert KafkaSettings.model_validate({**SECURED, "sasl_password": 123456}).password() == "123456"
    file = tmp_path / "password"
    kafka = KafkaSettings.model_validate({**SECURED, "sasl_password_file": file})
    with pytest.raises(Misconfigured, match=r"sasl_password_file: cannot read .*No such file"):
        kafka.confluent()
    file.write_text("\n")
    with pytest.raises(Misconfigured, match="is empty"):
        kafka.confluent()
    file.write_text(f" {PASSWORD}\r\n")
    assert kafka.password() == f" {PASSWORD}"


def test_an_unreadable_authority_is_named(tmp_path: Path) -> None:
    """A wrong path to the CA otherwise comes out as a certificate error far from its cause."""
    for content, words in ((None, "cannot read"), ("not a certificate", "no certificate in PEM form")):
        if content is not None:
            (tmp_path / "ca.pem").write_text(content)
        kafka = KafkaSettings(security_protocol="SSL", ca_file=tmp_path / "ca.pem")
        for use in (kafka.confluent, kafka.kafka_python, kafka.faust_credentials):
            with pytest.raises(Misconfigured, match=words):
                use()


# Clients


async def test_every_client_speaks_sasl_ssl(kafka_sasl: KafkaBroker, topics: Callable[[], str], tmp_path: Path) -> None:
    """One block drives them all; a client that forgot the CA or the password would fail only in production."""
    assert kafka_sasl.sasl is not None
    (tmp_path / "password").write_text(kafka_sasl.sasl.password + "\n")
    kafka = settings_for(kafka_sasl, sasl_password=None, sasl_password_file=tmp_path / "password")
    names = Topics(prefix=topics(), partitions=1)
    create_topics(kafka, names)
    topic = names.name("reports")

    confluent = Producer(kafka.confluent())
    confluent.produce(topic, b"confluent")
    assert confluent.flush(30) == 0

    python = KafkaProducer(**kafka.kafka_python())
    python.send(topic, b"kafka-python").get(30)
    python.close()

    app = faust.App(
        f"app-{uuid.uuid4().hex}",
        broker=kafka.faust_url(),
        broker_credentials=kafka.faust_credentials(),
        web_enabled=False,
    )
    await app.producer.start()
    await app.producer.send_and_wait(topic, None, b"faust", None, None, {})
    await app.producer.stop()

    direct = aiokafka.AIOKafkaConsumer(
        topic,
        bootstrap_servers=kafka.bootstrap_servers,
        auto_offset_reset="earliest",
        **credentials_to_aiokafka_auth(kafka.faust_credentials()),
    )
    await direct.start()
    read = [(await direct.getone()).value for _ in range(3)]
    await direct.stop()
    assert read == [b"confluent", b"kafka-python", b"faust"]

    consumer = KafkaConsumer(topic, auto_offset_reset="earliest", consumer_timeout_ms=20_000, **kafka.kafka_python())
    assert [next(consumer).value for _ in range(3)] == read
    consumer.close()
    assert [record.value for record in kafka_sasl.consume_all(topic)] == read


async def test_faust_without_the_password_is_refused(kafka_sasl: KafkaBroker) -> None:
    """The credentials must be what opened the door."""
    kafka = settings_for(kafka_sasl, sasl_password="wrong")
    client = AIOKafkaAdminClient(
        bootstrap_servers=kafka.bootstrap_servers, **credentials_to_aiokafka_auth(kafka.faust_credentials())
    )
    with pytest.raises(Exception, match=r"(?i)authentication|bootstrap"):
        await client.start()
    await client.close()


def test_a_refusal_says_which_setting(kafka_sasl: KafkaBroker, tmp_path: Path) -> None:
    """Every client retries a wrong password or CA in silence; the first check must say it, without the password."""
    with pytest.raises(
        Misconfigured, match=r"refuses user 'trimtab' with SCRAM-SHA-512.*kafka\.sasl_username"
    ) as refused:
        check_broker(settings_for(kafka_sasl, sasl_password=PASSWORD))
    assert PASSWORD not in str(refused.value)
    stranger = Sasl.create(tmp_path / "other").ca_file
    with pytest.raises(Misconfigured, match=r"check kafka\.ca_file"):
        create_topics(settings_for(kafka_sasl, ca_file=stranger), Topics())
    plain = KafkaSettings(bootstrap_servers=kafka_sasl.bootstrap, timeout_seconds=1)
    with pytest.raises(RetryLater, match=r"kafka\.security_protocol \(PLAINTEXT\) right\?"):
        check_broker(plain)


def test_an_absent_broker_is_one_sentence() -> None:
    """The commonest mistake of all: nothing listens, the name is unknown, or something else listens there."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        for address in (f"127.0.0.1:{deaf.getsockname()[1]}", "127.0.0.1:1", "no.such.host.invalid:9092"):
            kafka = KafkaSettings(bootstrap_servers=address, timeout_seconds=1)
            with pytest.raises(RetryLater, match=f"no Kafka answers at {address} within 1 s: is it running"):
                check_topics(kafka, Topics())


# Topics


def test_topics_are_made_once_and_as_planned(kafka: KafkaBroker, topics: Callable[[], str]) -> None:
    """Every process may create at start, so twice must be as good as once; announcements must be kept for ever."""
    settings, names = settings_for(kafka), Topics(prefix=topics(), partitions=3, retention_days=2)
    made = create_topics(settings, names, events=["alerts", "reports"])
    assert sorted(made) == sorted([*(names.name(kind) for kind in KINDS), names.event_topic("alerts")])
    assert create_topics(settings, names, events=["alerts"]) == []
    found = check_topics(settings, names, events=["alerts"])
    single = {names.name("control"), names.name("model_versions"), names.name("audit")}
    assert found == {name: 1 if name in single else 3 for name in made}
    with admin_client(settings) as client:
        asked = [["topic", names.name("model_versions")], ["topic", names.name("labels")]]
        told = client.describe_configs([_resource(*one) for one in asked], config_filter="all")["topic"]
    assert told[names.name("model_versions")]["cleanup.policy"]["value"] == "compact"
    assert told[names.name("labels")]["retention.ms"]["value"] == str(2 * 86_400_000)


def test_labels_and_predictions_need_equal_partitions(kafka: KafkaBroker, topics: Callable[[], str]) -> None:
    """They meet by partition, so unequal numbers would lose labels; the message must mend it, and it must work."""
    settings, names = settings_for(kafka), Topics(prefix=topics(), partitions=2)
    kafka.create_topic(names.name("labels"), partitions=1)
    with pytest.raises(Misconfigured) as refused:
        create_topics(settings, names)
    labels = names.name("labels")
    assert f"{labels} has 1 and {names.name('predictions')} has 2" in str(refused.value)
    assert f"--alter --topic {labels} --partitions 2" in str(refused.value)
    with admin_client(settings) as client:
        client.create_partitions({labels: 2})
    until(lambda: len(kafka.partitions(labels)) == 2)
    assert check_topics(settings, names)[labels] == 2


def test_everything_wrong_is_said_at_once(kafka: KafkaBroker, topics: Callable[[], str]) -> None:
    """One mistake a restart is a long evening; versions that expire would leave workers untaught."""
    settings, names = settings_for(kafka), Topics(prefix=topics())
    kafka.create_topic(names.name("model_versions"))
    with pytest.raises(Misconfigured) as refused:
        check_topics(settings, names, events=["alerts"])
    said = str(refused.value)
    assert "`trimtab topics create`" in said
    assert all(names.name(kind) in said for kind in KINDS)
    assert names.event_topic("alerts") in said
    assert f"--entity-name {names.name('model_versions')} --add-config cleanup.policy=compact" in said


def test_a_topic_that_takes_less_than_is_written_to_it_is_refused(
    kafka: KafkaBroker, topics: Callable[[], str]
) -> None:
    """The first large dead letter would stop the stream, a year later; the message must mend it, and it must work."""
    settings, names = settings_for(kafka), Topics(prefix=topics(), partitions=1)
    create_topics(settings, names)
    letters = names.name("dead_letters")

    def limit(size: str) -> None:
        with admin_client(settings) as client:
            client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, letters, {"max.message.bytes": size})])

    limit("100000")
    until(lambda: _refusal(settings, names) is not None)
    said = str(_refusal(settings, names))
    assert f"--entity-name {letters} --add-config max.message.bytes=" in said
    assert names.name("predictions") not in said
    limit(said.rpartition("max.message.bytes=")[2].rstrip("`"))
    until(lambda: _refusal(settings, names) is None)


def _refusal(settings: KafkaSettings, names: Topics) -> Misconfigured | None:
    try:
        check_topics(settings, names)
    except Misconfigured as refused:
        return refused
    return None


def test_a_layout_that_kafka_refuses_names_the_setting(kafka: KafkaBroker, topics: Callable[[], str]) -> None:
    """Three copies on one broker is what a first production file looks like on a laptop."""
    with pytest.raises(Misconfigured, match=r"topics\.replication: Kafka cannot keep 3 copies"):
        create_topics(settings_for(kafka), Topics(prefix=topics(), replication=3))


@pytest.mark.parametrize("block", [{"prefix": "a b"}, {"labels": ""}, {"reports": "labels"}, {"partitions": 0}])
def test_names_that_kafka_would_refuse_are_refused(block: dict[str, Any]) -> None:
    """A name is checked when the file is read, not when the first event is published."""
    with pytest.raises(ValidationError):
        Topics.model_validate(block)


def _resource(kind: str, name: str) -> Any:
    return ConfigResource(ConfigResourceType[kind.upper()], name)
