"""What a person may set, where it comes from, and how a mistake is told.

Everything is in one YAML file, whose blocks are the settings of the rooms that use them. A variable such as
`TRIMTAB_KAFKA__BOOTSTRAP_SERVERS` overrides `kafka.bootstrap_servers`. This is the only module that reads
the environment, and it does so only when `load_settings` or `settings_path` is called.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from learner.asking import AskingSettings
from learner.control import ControlSettings
from learner.exam import ExamSettings, GuardSettings
from learner.finetune import FineTuneSettings
from learner.heads import DEFAULT_WIDTH
from learner.recency import RecencySettings
from learner.shadow import ShadowSettings
from learner.spec import Precision
from learner.trust import TrustSettings
from monitoring.drift import DriftSettings
from monitoring.tracing import TracingSettings
from replay.policy import ReplaySettings
from replay.schema import StoreUrl, masked
from replay.store import StoreSettings
from stream.batches import BatchSettings
from stream.errors import DeadLetter, Misconfigured
from stream.events import StreamRules, class_name
from stream.kafka import KINDS, MASK, KafkaSettings, Topics
from stream.service import LOOPBACK, HttpSettings

PREFIX = "TRIMTAB_"
DEFAULT_PATH = Path("trimtab.yaml")
LEARNER_PORT = 6070

Device = Literal["auto", "cpu", "cuda"]
Guarantee = Literal["at_least_once", "exactly_once"]


class InvalidSettings(Misconfigured):
    """The settings cannot be used.

    Args:
        where: the file, or what else was read.
        problems: one line each, beginning with the key's path.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{where} cannot be used:", *(f"  {problem}" for problem in problems)]))


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def _safe_to_listen(http: HttpSettings) -> HttpSettings:
    if http.host not in LOOPBACK and http.token is None and http.token_file is None:
        raise PydanticCustomError(
            "token",
            "host {host} is beyond loopback and needs a token: give token_file, or token in the environment",
            {"host": http.host},
        )
    return http


class LogSettings(_Block):
    """How a process logs."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="the least that is logged")
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: for people on a terminal, else JSON lines"
    )


class RegistrySettings(_Block):
    """Where weights lie: one place that the learner writes and every worker reads."""

    url: str = Field(
        default="trimtab-data/registry",
        min_length=1,
        description="a directory, or anything fsspec reaches, such as s3://models/trimtab",
    )
    cache_dir: Path = Field(
        default=Path("trimtab-data/cache"), description="where weights of a distant registry are kept on this machine"
    )
    cache_gib: float = Field(default=8, gt=0, allow_inf_nan=False, description="most that the cache may hold, in GiB")
    keep_champions: int = Field(default=3, ge=0, description="champions before the present one that pruning leaves")
    keep_revisions: int = Field(default=100, ge=0, description="newest revisions whose weights pruning leaves")


class WorkerSettings(BatchSettings):
    """The process that answers events; as many replicas as the event topics have partitions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guarantee: Guarantee = Field(
        default="at_least_once",
        description="exactly_once: predictions and offsets in one Kafka transaction, so none is ever written twice",
    )
    group: str = Field(default="trimtab-worker", min_length=1, max_length=200, description="the consumer group")
    member_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="this replica's own lasting name in the group, so that it has its partitions back at once after "
        "a restart; each replica needs another",
    )
    device: Device = Field(default="auto", description="where the model computes; auto: a GPU where there is one")
    precision: Precision = Field(
        default="float32",
        description="of text models: bfloat16 or, on a CPU, int8 answer faster and a little less exactly; "
        "`python -m benchmarks.worker` shows both here",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of the model; torch's own if unset"
    )
    http: HttpSettings = Field(default=HttpSettings(), validate_default=False)

    _token_beyond_loopback = field_validator("http")(_safe_to_listen)


def _learner_port(found: object) -> object:
    return {"port": LEARNER_PORT, **found} if isinstance(found, dict) else found


class ConsoleSettings(_Block):
    """The console: the learner's web page, on the address of its HTTP."""

    enabled: bool = Field(default=True, description="whether the page is served")
    workers: tuple[Annotated[str, Field(pattern=r"^https?://[^\s/]+$", max_length=300)], ...] = Field(
        default=(),
        max_length=32,
        description="where workers answer, such as http://worker:6066: the page shows their rate, latency and silence",
    )
    twin: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,149}$",
        description="topic of a frozen twin's predictions, without the prefix, to compare with",
    )


class LearnerSettings(_Block):
    """The process that has all the state there is; a second one on the same store stands by."""

    store: StoreUrl = Field(
        default=StoreUrl("sqlite:///trimtab-data/learner.db"),
        description="the database, as an SQLAlchemy URL: sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME",
    )
    lease_seconds: float = Field(
        default=10.0,
        ge=1,
        le=3600,
        allow_inf_nan=False,
        description="a learner that gave no sign of life for so long is replaced by one that stands by, in seconds",
    )
    sharing: bool = Field(
        default=False,
        description="several learners share the database, which must be PostgreSQL: one leads, and the others join "
        "partitions of their own meanwhile instead of only standing by; the same for all of them",
    )
    memory: StoreSettings = StoreSettings()
    group: str = Field(default="trimtab-learner", min_length=1, max_length=200, description="the consumer group")
    member_id: str | None = Field(
        default=None, min_length=1, max_length=200, description="this learner's lasting name; a stand-by needs another"
    )
    batches: BatchSettings = BatchSettings(batch_events=2_000, batch_seconds=0.1)
    revision_seconds: float = Field(
        default=0.5, ge=0.5, le=3600, allow_inf_nan=False, description="shortest time between two revisions of a stream"
    )
    device: Device = Field(default="auto", description="where embeddings and fine-tunes compute")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of the embedding")
    jobs: Path = Field(default=Path("trimtab-data/jobs"), description="where fine-tunes work")
    http: Annotated[HttpSettings, BeforeValidator(_learner_port)] = HttpSettings(port=LEARNER_PORT)
    console: ConsoleSettings = ConsoleSettings()

    _token_beyond_loopback = field_validator("http")(_safe_to_listen)

    @model_validator(mode="after")
    def _one_process_has_a_file(self) -> Self:
        if self.sharing and self.store.startswith("sqlite"):
            raise PydanticCustomError("sharing", "sharing needs a PostgreSQL store; an SQLite file is one learner's")
        return self


class TextEncoderSettings(_Block):
    """The base model of a text stream."""

    model: Literal["minilm"] | Path = Field(
        default="minilm",
        description="minilm: all-MiniLM-L6-v2 as it is installed; or a directory with model.safetensors, config.json "
        "and tokenizer.json of a BERT-like model",
    )
    max_tokens: int = Field(default=256, ge=8, le=8192, description="a longer text is cut")


class TelemetryEncoderSettings(_Block):
    """The base model of a telemetry stream: it is drawn from a seed and needs no file."""

    channels: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        min_length=1, max_length=1024, description="the channels that every event carries, in the model's order"
    )
    commands: tuple[str, ...] = Field(
        default=(),
        description="those of the channels that say what was done (command bits, counts, switches) and mostly rest at "
        "0; at least one channel is none of them",
    )
    window: int = Field(default=64, ge=1, le=10_000, description="the usual number of time steps of an event")
    dimension: int = Field(default=256, ge=16, le=4096, description="components of an embedding")
    learned: int = Field(default=32, ge=0, le=1024, description="components that a fine-tune trains; fewer than half")
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("channels")
    @classmethod
    def _differ(cls, channels: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({channel for channel in channels if channels.count(channel) > 1})
        if twice:
            raise PydanticCustomError("twice", "{names} named twice", {"names": ", ".join(twice)})
        return channels

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        unknown = sorted(set(self.commands) - set(self.channels))
        if unknown:
            raise PydanticCustomError("commands", "{names}: no such channel", {"names": ", ".join(unknown)})
        if set(self.commands) == set(self.channels):
            raise PydanticCustomError("commands", "every channel is a command, so none is measured")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 2 * self.learned > self.dimension:
            raise PydanticCustomError(
                "learned",
                "learned is {learned}, allowed is at most half of dimension ({dimension})",
                {"learned": self.learned, "dimension": self.dimension},
            )
        return self


class NewClassSettings(_Block):
    """How fast a stream's label set may grow; labels beyond it wait in quarantine."""

    per_day: int = Field(default=200, ge=0, description="most new classes in a day")
    total: int = Field(default=1_000, ge=1, description="most classes of the stream")


class TriggerSettings(_Block):
    """What starts a fine-tune, apart from being asked for one. One that comes during a run is folded into the next."""

    every_labels: int | None = Field(default=1_000, ge=1, description="after so many new labels; null for never")
    every_seconds: float | None = Field(
        default=None, ge=1, allow_inf_nan=False, description="after so long, if anything new was learned"
    )
    drift: bool = Field(default=False, description="when a drift is found")
    forgetting: bool = Field(default=False, description="when a class fell below its best by the forgetting budget")
    gain: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="when a run should bring so many points of accuracy for a minute of training, such as 0.5; null "
        "for never. Use it with every_labels: null",
    )
    minimum_labels: int = Field(default=50, ge=1, description="no run before so many new labels, unless asked by hand")
    rest_seconds: float = Field(
        default=60, ge=0, allow_inf_nan=False, description="shortest time between two runs, unless asked by hand"
    )


class StreamSettings(_Block):
    """What text and telemetry streams have in common."""

    topic: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,149}$",
        description="topic of its events, without the prefix; topics.reports for text and topics.telemetry else",
    )
    labels: tuple[str, ...] = Field(default=(), description="labels known at the start, may be none")
    closed: bool = Field(default=False, description="true: no label beyond those is taken")
    new_classes: NewClassSettings = NewClassSettings()
    labellers: Literal["latest", "majority", "weighted"] = Field(
        default="latest",
        description="whose label counts when several labellers answer one event; weighted: majority by confidence",
    )
    trust: TrustSettings = TrustSettings()
    prior: Literal["uniform", "sqrt", "empirical"] = Field(
        default="sqrt",
        description="how much a frequent class is favoured: not at all, by the root of its frequency, or fully",
    )
    random_features: int = Field(
        default=0,
        ge=0,
        le=8_192,
        description="width of the instant head: random features of the embedding that it is linear in; 0 takes the "
        "embedding itself. More tells apart better; it costs width^2 * 8 bytes, and width^3 operations a revision",
    )
    replay: ReplaySettings = ReplaySettings()
    finetune: FineTuneSettings = FineTuneSettings()
    triggers: TriggerSettings = TriggerSettings()
    exam: ExamSettings = ExamSettings()
    guard: GuardSettings = GuardSettings()
    shadow: ShadowSettings = ShadowSettings()
    recency: RecencySettings | None = Field(
        default=None,
        description="let a head in which the newest labels count more answer where it turns out better on live labels; "
        "`{}` with the defaults, `null` never",
    )
    drift: DriftSettings = DriftSettings()
    label_requests: AskingSettings = AskingSettings()
    forgetting_budget: float = Field(
        default=0.1, gt=0, le=1, description="largest fall of a class's recall below its best before someone is told"
    )

    @field_validator("labels")
    @classmethod
    def _are_class_names(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        found = []
        for label in labels:
            try:
                found.append(class_name(label))
            except DeadLetter as refusal:
                raise PydanticCustomError(
                    "class_name", "{label}: {why}", {"label": repr(label), "why": refusal.detail}
                ) from None
        twice = sorted({label for label in found if found.count(label) > 1})
        if twice:
            raise PydanticCustomError("twice", "{names} named twice", {"names": ", ".join(twice)})
        return tuple(found)

    @model_validator(mode="after")
    def _label_set(self) -> Self:
        if self.closed and not self.labels:
            raise PydanticCustomError("closed", "closed is true and labels is empty, so no label could ever be taken")
        return self


class TextStream(StreamSettings):
    """A stream of reports."""

    kind: Literal["text"]
    encoder: TextEncoderSettings = TextEncoderSettings()
    random_features: int = Field(
        default=DEFAULT_WIDTH, ge=0, le=8_192, description="width of the instant head, as for every stream"
    )
    max_characters: int = Field(default=20_000, ge=1, le=1_000_000, description="a longer text is a dead letter")


class TelemetryStream(StreamSettings):
    """A stream of windows of numbers."""

    kind: Literal["telemetry"]
    encoder: TelemetryEncoderSettings
    max_steps: int = Field(default=10_000, ge=1, le=1_000_000, description="a longer window is a dead letter")
    missing_channels: Literal["refuse", "fill"] = Field(
        default="refuse",
        description="an event that lacks some of the channels is a dead letter, or is taken as if they had no values",
    )


AnyStream = Annotated[TextStream | TelemetryStream, Field(discriminator="kind")]
StreamKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Settings(BaseSettings):
    """All of `trimtab.yaml`. Relative paths are relative to where the process runs."""

    # Sources are named by `load_settings`; an object made in any other way reads nothing but its arguments.
    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())

    kafka: KafkaSettings = KafkaSettings()
    topics: Topics = Topics()
    registry: RegistrySettings = RegistrySettings()
    worker: WorkerSettings = WorkerSettings()
    learner: LearnerSettings = LearnerSettings()
    control: ControlSettings = ControlSettings()
    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    streams: dict[StreamKey, AnyStream] = Field(min_length=1, description="every stream by its name on the wire")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in."""
        return (init_settings,)

    @model_validator(mode="after")
    def _event_topics_are_for_events(self) -> Self:
        taken = {getattr(self.topics, kind): kind for kind in KINDS if kind not in ("telemetry", "reports")}
        wrong = {name: stream.topic for name, stream in self.streams.items() if stream.topic in taken}
        if wrong:
            raise PydanticCustomError(
                "topic",
                "{what}: that topic is not for events",
                {"what": "; ".join(f"streams.{name}.topic is {topic!r}" for name, topic in wrong.items())},
            )
        return self

    def topic_of(self, stream: str) -> str:
        """The whole name of the topic that a stream's events are on."""
        found = self.streams[stream]
        if found.topic is not None:
            return self.topics.event_topic(found.topic)
        return self.topics.name("reports" if found.kind == "text" else "telemetry")

    @property
    def event_topics(self) -> list[str]:
        """Whole names of all the topics that a worker reads."""
        return sorted({self.topic_of(name) for name in self.streams})

    @property
    def named_topics(self) -> list[str]:
        """Topics that streams name for themselves, without the prefix, as `create_topics` takes them."""
        return sorted({stream.topic for stream in self.streams.values() if stream.topic is not None})


def settings_path(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The file to read: `path`, or what `TRIMTAB_CONFIG` names, or `trimtab.yaml`."""
    named = (os.environ if environ is None else environ).get(f"{PREFIX}CONFIG")
    return path or (Path(named) if named else DEFAULT_PATH)


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of a file, with what the environment overrides.

    Args:
        path: the YAML file; see `settings_path`.
        environ: the environment; the process's own when not given.

    Raises:
        InvalidSettings: with every problem found, each in a line that begins with the key's path.
    """
    environ = os.environ if environ is None else environ
    path = settings_path(path, environ)
    content = _read(path)
    overrides = Overrides(environ, content)
    try:
        return Settings(**_merged(content, overrides()))
    except ValidationError as refusal:
        problems = [_problem(error, overrides.variables) for error in refusal.errors(include_url=False)]
        raise InvalidSettings(str(path), list(dict.fromkeys(problems))) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors and for people."""
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **Settings.model_json_schema(), "title": "trimtab.yaml"}


def rules(settings: Settings) -> list[StreamRules]:
    """What each stream accepts, as the wire's decoder takes it."""
    found = []
    for name, stream in settings.streams.items():
        closed = frozenset(stream.labels) if stream.closed else None
        if isinstance(stream, TextStream):
            found.append(StreamRules(name, "text", closed_labels=closed, max_text_characters=stream.max_characters))
        else:
            found.append(
                StreamRules(
                    name,
                    "telemetry",
                    channels=stream.encoder.channels,
                    closed_labels=closed,
                    max_steps=stream.max_steps,
                    fill_channels=stream.missing_channels == "fill",
                )
            )
    return found


def unreadable(settings: Settings) -> list[str]:
    """What the settings name and this machine lacks, one line each: secrets, certificates, models."""
    problems = []
    checks = {
        "kafka": settings.kafka.confluent,
        "worker": settings.worker.http.secret,
        "learner": settings.learner.http.secret,
        "control": settings.control.key,
    }
    for block, check in checks.items():
        try:
            check()
        except Misconfigured as lack:
            problems.append(str(lack) if str(lack).startswith(block) else f"{block}.{lack}")
    for name, stream in settings.streams.items():
        if isinstance(stream, TextStream) and isinstance(stream.encoder.model, Path):
            lacking = [
                file
                for file in ("model.safetensors", "config.json", "tokenizer.json")
                if not (stream.encoder.model / file).is_file()
            ]
            if lacking:
                problems.append(f"streams.{name}.encoder.model: {stream.encoder.model} has no {', '.join(lacking)}")
    return problems


class Overrides(PydanticBaseSettingsSource):
    """What the environment overrides, as nested mappings.

    `TRIMTAB_STREAMS__NIGHT_SKY__REPLAY__SIZE=500` is `streams.night-sky.replay.size`: two underscores go one
    level down, case does not matter, and a name that the file has is met with `_` for `-` or `.`. A value that
    is a list or a mapping is written as YAML (or JSON), and `null` unsets.

    Args:
        environ: the environment.
        content: the file, whose names are preferred.
    """

    def __init__(self, environ: Mapping[str, str], content: Mapping[str, Any]) -> None:
        super().__init__(Settings)
        self._environ = environ
        self._content = content
        self.variables: dict[tuple[str, ...], str] = {}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """What is overridden in one block; pydantic-settings asks for it."""
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Everything that is overridden. The variable of each key is in `variables` afterwards."""
        found: dict[str, Any] = {}
        for variable in sorted(self._environ):
            if not variable.upper().startswith(PREFIX) or variable.upper() == f"{PREFIX}CONFIG":
                continue
            keys: list[str] = []
            there: Any = self._content
            into = found
            parts = variable[len(PREFIX) :].lower().split("__")
            for depth, part in enumerate(parts):
                names = there if isinstance(there, Mapping) else {}
                key = next((str(name) for name in names if _plain(str(name)) == _plain(part)), part)
                there = names.get(key)
                keys.append(key)
                if depth == len(parts) - 1:
                    into[key] = _value(self._environ[variable])
                else:
                    if not isinstance(into.get(key), dict):
                        into[key] = {}
                    into = into[key]
            self.variables[tuple(keys)] = variable
        return found


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


def _value(text: str) -> Any:
    """A variable's value: text, which the settings turn into numbers, unless it is a list, a mapping or null."""
    if text.strip() == "null":
        return None
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML whose mappings may not name a key twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is named twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    """The file's content; nothing of it is repeated in an error, for it may hold secrets."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        advice = f"there is no such file; name one with --config or {PREFIX}CONFIG"
        raise InvalidSettings(str(path), [advice]) from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidSettings(str(path), [f"it cannot be read: {why}"]) from None
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InvalidSettings(str(path), [f"{where}not YAML: {error.problem or 'it cannot be read'}"]) from None
    except yaml.YAMLError as error:
        raise InvalidSettings(str(path), [f"not YAML: {error}"]) from None
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidSettings(str(path), ["found no mapping of names to blocks, such as `kafka:` and `streams:`"])
    return content


def _problem(error: ErrorDetails, variables: Mapping[tuple[str, ...], str]) -> str:
    """One of pydantic's findings as a line: the key's path, what was found, what is allowed."""
    place = _Place.of(error["loc"])
    kind, found = error["type"], _shown(_unsecret(error["input"]) if place.url else error["input"], place.secret)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        key = place.keys[-1]
        near = get_close_matches(key, place.siblings, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(place.siblings)}"
        line = f"{place.path}: unknown key; {hint}"
    elif kind == "union_tag_not_found":
        line = f"{place.path}.kind: is missing; allowed are 'text', 'telemetry'"
    elif kind == "union_tag_invalid":
        context = error.get("ctx", {})
        near = get_close_matches(str(context.get("tag")), ["text", "telemetry"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        line = f"{place.path}.kind: found {context.get('tag')!r}, allowed are 'text', 'telemetry'{hint}"
    elif kind in ("missing", "missing_argument"):
        line = f"{place.path}: is missing"
    elif kind == "too_short" and place.path == "streams":
        line = "streams: found none, allowed is at least one stream"
    else:
        line = f"{place.path}: {_sentence(error['msg'], found)}"
    if place.is_key:
        line = f"{place.path}: the name {place.keys[-1]!r} is not allowed; {_allowed(error['msg'])}"
    keys = tuple(place.keys)
    variable = next((name for known, name in variables.items() if known == keys[: len(known)]), None)
    return f"{line} (from {variable})" if variable else line


def _sentence(message: str, found: str) -> str:
    """Pydantic's message in the words `found …, allowed is …`; our own messages stay as they are."""
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    if " should " not in message:
        return message
    return f"found {found}, {_allowed(message)}"


def _allowed(message: str) -> str:
    wanted = message.removeprefix("Input should be ").partition(", unable to parse")[0]
    if wanted.startswith("a valid timedelta"):
        return "allowed is a number of seconds, or a duration such as '7 days' or PT12H"
    wanted = wanted.replace("String should have", "text with").replace("String should match pattern", "text like")
    wanted = wanted.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    wanted = wanted.replace("greater than", "more than").partition(" after validation")[0]
    plural = wanted.startswith("'") and " or " in wanted
    return f"allowed {'are' if plural else 'is'} {wanted.replace(' or ', ', ') if plural else wanted}"


def _unsecret(found: object) -> object:
    return masked(found) if isinstance(found, str) else found


def _shown(found: object, secret: bool) -> str:
    """What was found, as it may be shown: no secret, and no mapping or list, which may hold one."""
    if secret or found == MASK:
        return MASK
    if isinstance(found, Mapping):
        return "a mapping"
    if isinstance(found, list | tuple):
        return "a list"
    text = repr(found) if isinstance(found, str) else "nothing" if found is None else str(found)
    return text if len(text) <= 100 else f"{text[:97]}..."


class _Place:
    """Where in the settings an error lies.

    Args:
        keys: the path as it is written in the file, without what pydantic adds for unions.
        siblings: the keys that are allowed beside the last one.
        secret: whether the value there must not be shown.
        url: whether it is a URL, which is shown without its password.
        is_key: whether the fault is in the name of the key itself.
    """

    def __init__(self, keys: list[str], siblings: list[str], secret: bool, url: bool, is_key: bool) -> None:
        self.keys, self.siblings, self.secret, self.url, self.is_key = keys, siblings, secret, url, is_key

    @property
    def path(self) -> str:
        return ".".join(self.keys) or "settings"

    @classmethod
    def of(cls, loc: Sequence[int | str]) -> Self:
        """Follow a location of pydantic's down the settings' models."""
        keys: list[str] = []
        siblings: list[str] = []
        secret = url = is_key = False
        here: Any = Settings
        for part in loc:
            if part == "[key]":
                is_key = True
                continue
            options = list(_options(here))
            tagged = [option for option in options if _tag(option) == part]
            if tagged and len(options) > 1:
                here = tagged[0]
                continue
            named: dict[str, Any] = {}
            for option in options:
                named |= _fields(option)
            keys.append(str(part))
            siblings = sorted(named)
            if part in named:
                here = named[str(part)]
            else:
                inner = [typing.get_args(option)[-1] for option in options if typing.get_origin(option) is dict]
                here = inner[0] if inner else None
            secret = any(option is SecretStr for option in _options(here))
            url = any(option is StoreUrl for option in _options(here))
        # An error inside a union names the member that was tried, which is no key of the file.
        while len(keys) > 1 and keys[-1] in ("literal['minilm']", "path", "constrained-str", "int", "str"):
            keys.pop()
        return cls(keys, siblings, secret, url, is_key)


def _options(found: Any) -> Iterator[Any]:
    """The types that a value may have, without annotations, aliases and None."""
    origin = typing.get_origin(found)
    if origin is Annotated:
        yield from _options(typing.get_args(found)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(found):
            yield from _options(member)
    elif found is not None and found is not type(None):
        yield found


def _fields(model: Any) -> dict[str, Any]:
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    if is_dataclass(model) and isinstance(model, type):
        hints = typing.get_type_hints(model)
        return {field.name: hints[field.name] for field in fields(model)}
    return {}


def _tag(model: Any) -> object:
    kind = _fields(model).get("kind")
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Literal else None
