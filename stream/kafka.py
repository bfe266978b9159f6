"""How to reach Kafka, and which topics there are.

One `KafkaSettings` object speaks for every client in use: confluent-kafka on the hot path, kafka-python for
topics, Faust for its own small topics. Secrets are shown by none of its representations and leave it only
in what a client is given.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from stream.errors import Misconfigured, RetryLater

MASK = "**********"

TopicKind = Literal[
    "telemetry",
    "reports",
    "labels",
    "predictions",
    "label_requests",
    "control",
    "model_versions",
    "audit",
    "dead_letters",
]
KINDS: tuple[TopicKind, ...] = get_args(TopicKind)
WRITTEN: tuple[TopicKind, ...] = ("predictions", "label_requests", "model_versions", "audit", "dead_letters")
"""What trimtab writes to."""
MESSAGE_BYTES = 1_000_012
"""What the client library puts into one request for a partition, unless told otherwise, and a batch's own head."""


def _servers(found: object) -> object:
    return ",".join(str(part) for part in found) if isinstance(found, list | tuple) else found


def _secret(found: object) -> object:
    # A password of digits comes out of YAML as a number.
    return str(found) if isinstance(found, int | float) and not isinstance(found, bool) else found


class KafkaSettings(BaseModel):
    """The `kafka:` block: where the brokers are, and how a client proves who it is.

    Args:
        bootstrap_servers: `host:port`, several with commas between or as a list.
        security_protocol: as the brokers' listener has it.
        ca_file: PEM file of the authority that signed the brokers' certificates; the system's when left out.
        sasl_mechanism: how the password is proved; needed with a SASL protocol.
        sasl_username: the user; needed with a SASL protocol.
        sasl_password: the password itself, best from the environment.
        sasl_password_file: a file that holds it instead, such as a mounted secret; a line end is dropped.
        timeout_seconds: how long start-up checks and topic calls wait for a broker.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    bootstrap_servers: Annotated[str, BeforeValidator(_servers)] = "127.0.0.1:9092"
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    ca_file: Path | None = None
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        default=None, validate_default=True
    )
    sasl_username: str | None = Field(default=None, min_length=1, validate_default=True)
    sasl_password: Annotated[SecretStr | None, BeforeValidator(_secret)] = None
    sasl_password_file: Path | None = Field(default=None, validate_default=True)
    timeout_seconds: float = Field(default=15, ge=1, le=600, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _hide_secrets(cls, found: Any, build: ModelWrapValidatorHandler[KafkaSettings]) -> KafkaSettings:
        """Refuse as usual, but never with a password, or a mistyped key that may hold one, in the error."""
        try:
            return build(found)
        except ValidationError as refusal:
            raise ValidationError.from_exception_data(
                refusal.title, [_masked(dict(error)) for error in refusal.errors(include_url=False)], hide_input=True
            ) from None

    @field_validator("bootstrap_servers")
    @classmethod
    def _are_addresses(cls, servers: str) -> str:
        addresses = [part.strip() for part in servers.split(",")]
        for address in addresses:
            match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})", address)
            if match is None or not 0 < int(match[2]) < 65536:
                raise PydanticCustomError(
                    "address", "found {address}, allowed is host:port, such as kafka-1:9092", {"address": repr(address)}
                )
        return ",".join(addresses)

    @field_validator("ca_file")
    @classmethod
    def _needs_tls(cls, ca_file: Path | None, info: ValidationInfo) -> Path | None:
        protocol = info.data.get("security_protocol")
        if ca_file is not None and protocol in ("PLAINTEXT", "SASL_PLAINTEXT"):
            raise PydanticCustomError(
                "tls", "has no use with security_protocol {protocol}: choose SSL or SASL_SSL", {"protocol": protocol}
            )
        return ca_file

    @field_validator("sasl_mechanism", "sasl_username")
    @classmethod
    def _goes_with_sasl(cls, value: str | None, info: ValidationInfo) -> str | None:
        protocol = info.data.get("security_protocol", "")
        if protocol.startswith("SASL_") and value is None:
            raise PydanticCustomError("sasl", "is needed with security_protocol {protocol}", {"protocol": protocol})
        if protocol and not protocol.startswith("SASL_") and value is not None:
            raise PydanticCustomError(
                "sasl", "has no use with security_protocol {protocol}: choose SASL_SSL", {"protocol": protocol}
            )
        return value

    @field_validator("sasl_password_file")
    @classmethod
    def _one_password(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        protocol = info.data.get("security_protocol", "")
        secrets = (file is not None) + (info.data.get("sasl_password") is not None)
        if secrets == 2:
            raise PydanticCustomError("sasl", "give sasl_password or sasl_password_file, not both")
        if protocol.startswith("SASL_") and not secrets and "sasl_password" in info.data:
            raise PydanticCustomError(
                "sasl",
                "{protocol} needs a password: give sasl_password_file, or sasl_password in the environment",
                {"protocol": protocol},
            )
        if protocol and not protocol.startswith("SASL_") and secrets:
            raise PydanticCustomError(
                "sasl", "a password has no use with {protocol}: choose SASL_SSL", {"protocol": protocol}
            )
        return file

    def password(self) -> str | None:
        """The password in the clear, from where it was given; read from its file at each call.

        Raises:
            Misconfigured: the file cannot be read or is empty.
        """
        if self.sasl_password is not None:
            return self.sasl_password.get_secret_value()
        if self.sasl_password_file is None:
            return None
        try:
            text = self.sasl_password_file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise Misconfigured(f"kafka.sasl_password_file: cannot read {self.sasl_password_file}: {why}") from None
        if not text:
            raise Misconfigured(f"kafka.sasl_password_file: {self.sasl_password_file} is empty")
        return text

    def confluent(self) -> dict[str, Any]:
        """librdkafka connection properties. Raises `Misconfigured` where a named file cannot be read."""
        properties: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": self.security_protocol,
        }
        if self.ca_file is not None:
            properties["ssl.ca.location"] = str(self._readable_ca())
        if self.sasl_mechanism is not None:
            properties |= {
                "sasl.mechanism": self.sasl_mechanism,
                "sasl.username": self.sasl_username,
                "sasl.password": self.password(),
            }
        return properties

    def kafka_python(self) -> dict[str, Any]:
        """Keyword arguments of a kafka-python client. Raises as `confluent` does."""
        arguments: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers.split(","),
            "security_protocol": self.security_protocol,
        }
        if "SSL" in self.security_protocol.split("_"):
            arguments["ssl_context"] = self.ssl_context()
        if self.sasl_mechanism is not None:
            arguments |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.password(),
            }
        return arguments

    def faust_url(self) -> str:
        """The broker URL of a Faust app."""
        return ";".join(f"kafka://{address}" for address in self.bootstrap_servers.split(","))

    def faust_credentials(self) -> Any:
        """What a Faust app takes as `broker_credentials`: a `faust.auth.Credentials`, or None for PLAINTEXT.

        Raises as `confluent` does.
        """
        # Faust is for the processes that run an app; the command line and the producers do without it.
        from faust.auth import SASLCredentials, SSLCredentials

        context = self.ssl_context()
        if self.sasl_mechanism is not None:
            return SASLCredentials(
                username=self.sasl_username,
                password=self.password(),
                mechanism=self.sasl_mechanism,
                ssl_context=context,
            )
        return None if context is None else SSLCredentials(context=context)

    def ssl_context(self) -> ssl.SSLContext | None:
        """A context that checks the broker's certificate and its name, or None for a protocol without TLS."""
        if "SSL" not in self.security_protocol.split("_"):
            return None
        return ssl.create_default_context(cafile=None if self.ca_file is None else str(self._readable_ca()))

    def _readable_ca(self) -> Path:
        assert self.ca_file is not None
        try:
            ssl.create_default_context(cafile=str(self.ca_file))
        except ssl.SSLError:
            raise Misconfigured(f"kafka.ca_file: {self.ca_file} holds no certificate in PEM form") from None
        except OSError as error:
            raise Misconfigured(f"kafka.ca_file: cannot read {self.ca_file}: {error.strerror}") from None
        return self.ca_file


def _masked(error: dict[str, Any]) -> InitErrorDetails:
    """One of pydantic's findings, without an input that may hold a secret."""
    place = error["loc"]
    private = not place or place[0] == "sasl_password" or place[0] not in KafkaSettings.model_fields
    details: InitErrorDetails = {
        "type": PydanticCustomError(error["type"], error["msg"].replace("{", "{{").replace("}", "}}")),
        "loc": place,
        "input": MASK if private else error["input"],
    }
    return details


class Topics(BaseModel):
    """The `topics:` block: what every topic is called, and how it is laid out where trimtab creates it.

    Args:
        prefix: put before every name, so that several installations share a cluster.
        partitions: of every topic whose messages belong to events; `control` and `model_versions` have one.
        replication: copies of every partition; the brokers' own default when left out.
        retention_days: how long events, predictions, labels and dead letters stay; a label that comes later
            than its event's retention cannot be learned.
        audit_retention_days: how long the record of who changed what stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    prefix: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$", max_length=100)
    telemetry: str = Field(default="telemetry", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    reports: str = Field(default="reports", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    labels: str = Field(default="labels", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    predictions: str = Field(default="predictions", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    label_requests: str = Field(default="label-requests", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    control: str = Field(default="control", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    model_versions: str = Field(default="model-versions", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    audit: str = Field(default="audit", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    dead_letters: str = Field(default="dead-letters", pattern=r"^[A-Za-z0-9._-]{1,149}$")
    partitions: int = Field(default=4, ge=1, le=10_000)
    replication: int | None = Field(default=None, ge=1, le=100)
    retention_days: float = Field(default=14, gt=0, le=36_500, allow_inf_nan=False)
    audit_retention_days: float = Field(default=365, gt=0, le=36_500, allow_inf_nan=False)

    @model_validator(mode="after")
    def _names_differ(self) -> Topics:
        names = [getattr(self, kind) for kind in KINDS]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PydanticCustomError(
                "topics", "two kinds of messages share {names}: each needs its own topic", {"names": ", ".join(twice)}
            )
        return self

    def name(self, kind: TopicKind) -> str:
        """The whole name of a topic, with its prefix."""
        return self.prefix + str(getattr(self, kind))

    def event_topic(self, name: str) -> str:
        """The whole name of a topic that a stream names for its events, with the prefix."""
        return self.prefix + name

    def layouts(self, events: Iterable[str] = ()) -> list[TopicLayout]:
        """How every topic is created.

        Args:
            events: names, without the prefix, of topics that streams read beyond `telemetry` and `reports`.
        """
        kept = {"retention.ms": _milliseconds(self.retention_days)}
        if self.replication is not None and self.replication >= 3:
            kept["min.insync.replicas"] = "2"
        durable = {name: value for name, value in kept.items() if name != "retention.ms"}
        # Announcements come up to twice a second and the topic is read whole at every start: small segments that
        # close often keep what compaction may not touch yet to minutes.
        compacted = durable | {
            "cleanup.policy": "compact",
            "segment.ms": "600000",
            "segment.bytes": str(16 * 2**20),
            "min.cleanable.dirty.ratio": "0.1",
        }
        special = {
            "control": (1, kept),
            "model_versions": (1, compacted),
            "audit": (1, kept | {"retention.ms": _milliseconds(self.audit_retention_days)}),
        }
        found = []
        for kind in KINDS:
            partitions, config = special.get(kind, (self.partitions, kept))
            found.append(TopicLayout(self.name(kind), partitions, config))
        known = {layout.name for layout in found}
        more = sorted({self.event_topic(name) for name in events} - known)
        return found + [TopicLayout(name, self.partitions, kept) for name in more]


@dataclass(frozen=True, slots=True)
class TopicLayout:
    """A topic as it is created: its whole name, its partitions, its settings on the broker."""

    name: str
    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)


def check_broker(kafka: KafkaSettings) -> None:
    """Return once a broker answers; every other client retries in silence where this one says why.

    Raises:
        Misconfigured: the broker refuses us, or its certificate is not trusted; said as soon as it is known.
        RetryLater: nothing answered within `timeout_seconds`.
    """
    complaints: list[KafkaError] = []
    client = AdminClient(
        {**kafka.confluent(), "error_cb": complaints.append, "log_level": 0, "reconnect.backoff.max.ms": 1000}
    )
    deadline = time.monotonic() + kafka.timeout_seconds
    servers = kafka.bootstrap_servers
    while True:
        try:
            client.list_topics(timeout=min(0.5, kafka.timeout_seconds))
            return
        except KafkaException:
            client.poll(0)
        reasons = {complaint.code(): complaint.str() for complaint in complaints}
        if KafkaError._AUTHENTICATION in reasons:
            raise Misconfigured(
                f"Kafka at {servers} refuses user {kafka.sasl_username!r} with {kafka.sasl_mechanism}: check "
                "kafka.sasl_username, the password and kafka.sasl_mechanism"
            )
        if KafkaError._SSL in reasons:
            raise Misconfigured(
                f"no TLS connection to Kafka at {servers}: check kafka.ca_file and kafka.security_protocol "
                f"({_cause(reasons[KafkaError._SSL])})"
            )
        if time.monotonic() >= deadline:
            break
    causes = [_cause(text) for code, text in reasons.items() if code != KafkaError._ALL_BROKERS_DOWN]
    raise RetryLater(
        f"no Kafka answers at {servers} within {kafka.timeout_seconds:g} s: is it running, and are "
        f"kafka.bootstrap_servers and kafka.security_protocol ({kafka.security_protocol}) right?"
        + (f" ({'; '.join(causes)})" if causes else "")
    )


def _cause(text: str) -> str:
    """librdkafka's reason, without its own bookkeeping around it."""
    return re.sub(r" \(after \d+ms.*?\)|^\S+/\S+: ", "", text)


@contextmanager
def admin_client(kafka: KafkaSettings) -> Iterator[KafkaAdminClient]:
    """A kafka-python admin client on a broker that answers; its errors come out as ours.

    Raises:
        Misconfigured: as `check_broker`, or the user may not do what is asked.
        RetryLater: as `check_broker`, or the broker went away.
    """
    check_broker(kafka)
    milliseconds = int(kafka.timeout_seconds * 1000)
    try:
        client = KafkaAdminClient(
            **kafka.kafka_python(), bootstrap_timeout_ms=milliseconds, request_timeout_ms=milliseconds
        )
    except kafka_errors.KafkaError as error:
        raise _ours(kafka, error) from error
    try:
        yield client
    except kafka_errors.KafkaError as error:
        raise _ours(kafka, error) from error
    finally:
        client.close()


def _ours(kafka: KafkaSettings, error: kafka_errors.KafkaError) -> Misconfigured | RetryLater:
    if isinstance(error, kafka_errors.SaslAuthenticationFailedError | kafka_errors.AuthorizationError):
        who = kafka.sasl_username or "this client"
        return Misconfigured(f"Kafka at {kafka.bootstrap_servers} does not let {who} do this: {error}")
    return RetryLater(f"Kafka at {kafka.bootstrap_servers} did not do what was asked: {error}")


def create_topics(kafka: KafkaSettings, topics: Topics, events: Iterable[str] = ()) -> list[str]:
    """Create the topics that are missing, leave those that are there, check the whole, name the new ones.

    Args:
        kafka: where.
        topics: their names and layout.
        events: see `Topics.layouts`.

    Raises:
        Misconfigured: as `check_topics`, or the broker refuses a layout.
        RetryLater: no broker answers.
    """
    events = list(events)
    with admin_client(kafka) as client:
        there = set(client.list_topics())
        asked = {
            layout.name: {
                "num_partitions": layout.partitions,
                "replication_factor": -1 if topics.replication is None else topics.replication,
                "configs": dict(layout.config),
            }
            for layout in topics.layouts(events)
            if layout.name not in there
        }
        created = []
        answers = client.create_topics(asked, raise_errors=False)["topics"] if asked else []
        for answer in answers:
            error = kafka_errors.for_code(answer["error_code"])
            if error is kafka_errors.NoError:
                created.append(str(answer["name"]))
            elif error is kafka_errors.InvalidReplicationFactorError:
                raise Misconfigured(
                    f"topics.replication: Kafka cannot keep {topics.replication or 'its default number of'} copies of "
                    f"{answer['name']}: {answer['error_message']}"
                )
            elif issubclass(error, kafka_errors.AuthorizationError | kafka_errors.RetriableError):
                raise error(answer["error_message"])
            elif error is not kafka_errors.TopicAlreadyExistsError:  # which another process may have made just now
                raise Misconfigured(f"Kafka refuses topic {answer['name']}: {answer['error_message']}")
        if created:
            client.wait_for_topics(created, timeout_ms=int(kafka.timeout_seconds * 1000))
    check_topics(kafka, topics, events)
    return created


def check_topics(kafka: KafkaSettings, topics: Topics, events: Iterable[str] = ()) -> dict[str, int]:
    """Check that every topic is there and fits the others; returns the partitions of each by whole name.

    Raises:
        Misconfigured: with everything that is wrong, and how to mend each.
        RetryLater: no broker answers.
    """
    wanted = topics.layouts(events)
    versions, labels, predictions = topics.name("model_versions"), topics.name("labels"), topics.name("predictions")
    with admin_client(kafka) as client:
        names = {layout.name for layout in wanted}
        found = {
            topic["name"]: len(topic["partitions"]) for topic in client.describe_topics() if topic["name"] in names
        }
        written = [name for name in map(topics.name, WRITTEN) if name in found]
        configs = _configs(client, written)
    policy = configs.get(versions, {}).get("cleanup.policy")
    wrong = []
    missing = [layout.name for layout in wanted if layout.name not in found]
    if missing:
        wrong.append(
            f"missing on {kafka.bootstrap_servers}: {', '.join(missing)}. Create with `trimtab topics create`, "
            "or mend the names and the prefix under topics:"
        )
    if labels in found and predictions in found and found[labels] != found[predictions]:
        fewer, more = sorted((labels, predictions), key=lambda name: found[name])
        wrong.append(
            f"{labels} has {found[labels]} and {predictions} has {found[predictions]} as their number of partitions; "
            "both need the same, because predictions and labels meet by partition. With every worker, learner and "
            f"labeller stopped: `kafka-topics.sh --bootstrap-server {kafka.bootstrap_servers} --alter --topic {fewer} "
            f"--partitions {found[more]}`, or name a new topic under topics:"
        )
    if policy is not None and "compact" not in policy.split(","):
        wrong.append(
            f"{versions} has cleanup.policy={policy}; a worker reads the served version from it, so it must be "
            f"compacted: `kafka-configs.sh --bootstrap-server {kafka.bootstrap_servers} --alter --entity-type topics "
            f"--entity-name {versions} --add-config cleanup.policy=compact`"
        )
    for name in written:
        most = configs.get(name, {}).get("max.message.bytes")
        if most is not None and int(most) < MESSAGE_BYTES:
            wrong.append(
                f"{name} has max.message.bytes={most}; a dead letter, and what is written together, may be as large as "
                f"{MESSAGE_BYTES}: `kafka-configs.sh --bootstrap-server {kafka.bootstrap_servers} --alter "
                f"--entity-type topics --entity-name {name} --add-config max.message.bytes={MESSAGE_BYTES}`"
            )
    if wrong:
        raise Misconfigured("topics: " + "\ntopics: ".join(wrong))
    return found


def _configs(client: KafkaAdminClient, topics: Sequence[str]) -> dict[str, dict[str, str]]:
    """The topics' settings; none from a broker that does not tell, such as the embedded one."""
    resources = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics]
    told = client.describe_configs(resources, config_filter="all").get("topic", {}) if resources else {}
    return {
        topic: {name: str(one["value"]) for name, one in settings.items() if one.get("value") is not None}
        for topic, settings in told.items()
    }


def _milliseconds(days: float) -> str:
    return str(int(days * 86_400_000))
