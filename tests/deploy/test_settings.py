"""The settings file: what is taken, what is refused and how, and that no secret is ever shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.settings import (
    InvalidSettings,
    Settings,
    TelemetryStream,
    TextStream,
    json_schema,
    load_settings,
    rules,
    settings_path,
    unreadable,
)
from stream.events import StreamRules

TIDE = "streams: {{tide: {{kind: telemetry, encoder: {{channels: [a, b], commands: {}}}}}}}"
SMALL = """
streams:
  intents:
    kind: text
"""

WHOLE = """
kafka: {bootstrap_servers: [a:1, b:2], timeout_seconds: 3}
topics: {prefix: night-, partitions: 8}
worker: {guarantee: exactly_once, batch_events: 64, member_id: w1, device: cpu}
learner: {memory: {horizon: 3 days}, http: {token: tell-nobody}}
control: {protected_by_acls: true}
streams:
  Night.Sky:
    kind: text
    topic: alerts
    labels: [burst, nothing]
    closed: true
    max_characters: 500
    replay: {policy: herding, size: 100}
    finetune: {strategy: ewc_replay, training: full, epochs: 2}
    triggers: {every_labels: 200, drift: true}
    encoder: {max_tokens: 64}
  storm:
    kind: telemetry
    max_steps: 300
    encoder: {channels: [kp, ap], seed: 7}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "trimtab.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(InvalidSettings) as refusal:
        load_settings(write(folder, text), environ or {})
    return list(refusal.value.problems)


def test_one_line_of_yaml_a_stream_is_enough(tmp_path: Path) -> None:
    """A newcomer's first file is short; everything else has a default that works on one machine."""
    settings = load_settings(write(tmp_path, SMALL), {})
    assert isinstance(settings.streams["intents"], TextStream)
    assert settings.event_topics == ["reports"]
    assert settings.worker.http.port == 0
    assert settings.learner.http.port == 6070
    assert rules(settings) == [StreamRules("intents", "text")]


def test_every_block_reaches_its_room(tmp_path: Path) -> None:
    """A key that is read but not passed on would be a silent lie."""
    settings = load_settings(write(tmp_path, WHOLE), {})
    assert settings.kafka.bootstrap_servers == "a:1,b:2"
    assert settings.worker.batch_events == 64
    assert settings.learner.memory.horizon.days == 3
    assert settings.learner.http.port == 6070
    sky, storm = settings.streams["Night.Sky"], settings.streams["storm"]
    assert isinstance(storm, TelemetryStream)
    assert (sky.replay.policy, sky.finetune.strategy, sky.triggers.every_labels) == ("herding", "ewc_replay", 200)
    assert settings.topic_of("Night.Sky") == "night-alerts"
    assert settings.event_topics == ["night-alerts", "night-telemetry"]
    assert settings.named_topics == ["alerts"]
    assert rules(settings) == [
        StreamRules("Night.Sky", "text", closed_labels=frozenset({"burst", "nothing"}), max_text_characters=500),
        StreamRules("storm", "telemetry", channels=("kp", "ap"), max_steps=300),
    ]


def test_all_problems_are_told_at_once_each_with_its_path(tmp_path: Path) -> None:
    """Mending a file one run at a time costs an evening."""
    found = problems(
        tmp_path,
        """
        worker: {guarantee: exactly, batch_events: many, http: {port: 99999}}
        learner: {memory: {horizon: soon}, store: ""}
        topics: {prefx: a}
        streams:
          a b: {kind: text}
          intents:
            kind: text
            replay: {polcy: herding, size: 0}
            drift: {clok: 3}
            encoder: {max_tokens: 4}
          storm: {kind: telemetri}
          tide: {kind: telemetry, encoder: {}}
          wind: {}
        """,
    )
    assert found == [
        "topics.prefx: unknown key; did you mean prefix?",
        "worker.batch_events: found 'many', allowed is a valid integer",
        "worker.guarantee: found 'exactly', allowed are 'at_least_once', 'exactly_once'",
        "worker.http.port: found 99999, allowed is at most 65535",
        "learner.store: found '', allowed is text with at least 1 character",
        "learner.memory.horizon: found 'soon', allowed is a number of seconds, or a duration such as '7 days' or PT12H",
        "streams.a b: the name 'a b' is not allowed; allowed is text like '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'",
        "streams.intents.replay.size: found 0, allowed is at least 1",
        "streams.intents.replay.polcy: unknown key; did you mean policy?",
        "streams.intents.drift.clok: unknown key; did you mean clock?",
        "streams.intents.encoder.max_tokens: found 4, allowed is at least 8",
        "streams.storm.kind: found 'telemetri', allowed are 'text', 'telemetry'; did you mean telemetry?",
        "streams.tide.encoder.channels: is missing",
        "streams.wind.kind: is missing; allowed are 'text', 'telemetry'",
    ]


def test_a_stream_may_take_events_that_lack_channels(tmp_path: Path) -> None:
    """The setting must reach the wire's rules, and be off where nobody asked for it."""
    file = tmp_path / "trimtab.yaml"
    for line, expected in (("", False), ("missing_channels: fill", True)):
        file.write_text(f"streams:\n  tide:\n    kind: telemetry\n    encoder: {{channels: [a]}}\n    {line}\n")
        (rule,) = rules(load_settings(file, {}))
        assert rule.fill_channels is expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "streams: is missing"),
        ("streams: {}", "streams: found none, allowed is at least one stream"),
        ("streams: 3", "streams: found 3, allowed is a valid dictionary"),
        ("- a", "found no mapping of names to blocks, such as `kafka:` and `streams:`"),
        ("a: b\na: c", "line 2, column 1: not YAML: 'a' is named twice"),
        ("a: [", "line 1, column 5: not YAML: expected the node content, but found '<stream end>'"),
        (SMALL + "    closed: true", "streams.intents: closed is true and labels is empty"),
        (SMALL + "    labels: [a, a]", "streams.intents.labels: a named twice"),
        (SMALL + "    labels: ['']", "streams.intents.labels: '': a class name has 1 to 128 characters, found 0"),
        (SMALL + "    topic: labels", "settings: streams.intents.topic is 'labels': that topic is not for events"),
        (SMALL + "worker: {http: {host: 0.0.0.0}}", "worker.http: host 0.0.0.0 is beyond loopback and needs a token"),
        (SMALL + "learner: {http: {host: 0.0.0.0}}", "learner.http: host 0.0.0.0 is beyond loopback"),
        (SMALL + "    finetune: {strategy: si, training: lora}", "streams.intents.finetune: strategy 'si' cannot"),
        (TIDE.format("[b, z]"), "streams.tide.encoder: z: no such channel"),
        (TIDE.format("[b, a]"), "streams.tide.encoder: every channel is a command, so none is measured"),
        (SMALL + "workers: {}", "workers: unknown key; did you mean worker?"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(tmp_path: Path, text: str, problem: str) -> None:
    """The reader of the message has the file open, not the code."""
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_a_missing_file_says_how_to_name_one(tmp_path: Path) -> None:
    """It is the first thing that goes wrong."""
    with pytest.raises(InvalidSettings, match="TRIMTAB_CONFIG"):
        load_settings(tmp_path / "absent.yaml", {})


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    """One image is run in many places; secrets and addresses come from outside."""
    settings = load_settings(
        write(tmp_path, WHOLE),
        {
            "TRIMTAB_KAFKA__BOOTSTRAP_SERVERS": "c:3",
            "TRIMTAB_STREAMS__NIGHT_SKY__REPLAY__SIZE": "5",
            "TRIMTAB_STREAMS__NIGHT_SKY__LABELS": "[x, y]",
            "TRIMTAB_STREAMS__NIGHT_SKY__TOPIC": "null",
            "TRIMTAB_WORKER__MEMBER_ID": "7",
            "TRIMTAB_LEARNER__HTTP__PORT": "0",
            "TRIMTAB_CONFIG": "unused.yaml",
            "HOME": "/root",
        },
    )
    sky = settings.streams["Night.Sky"]
    assert settings.kafka.bootstrap_servers == "c:3"
    assert settings.kafka.timeout_seconds == 3
    assert (sky.replay.size, sky.replay.policy, sky.labels) == (5, "herding", ("x", "y"))
    assert settings.topic_of("Night.Sky") == "night-reports"
    assert settings.worker.member_id == "7"
    assert settings.learner.http.port == 0


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    """A mistyped variable that is ignored is found only by the bill."""
    environ = {"TRIMTAB_WORKER__BATCH_EVENT": "3", "TRIMTAB_WORKER__BATCH_SECONDS": "-1", "TRIMTAB_LOGG": "x"}
    assert problems(tmp_path, SMALL, environ) == [
        "worker.batch_seconds: found '-1', allowed is at least 0 (from TRIMTAB_WORKER__BATCH_SECONDS)",
        "worker.batch_event: unknown key; did you mean batch_events? (from TRIMTAB_WORKER__BATCH_EVENT)",
        "logg: unknown key; did you mean log? (from TRIMTAB_LOGG)",
    ]


def test_the_file_is_named_by_argument_variable_or_habit() -> None:
    """In this order, so that a command line always has the last word."""
    assert settings_path(Path("a.yaml"), {"TRIMTAB_CONFIG": "b.yaml"}) == Path("a.yaml")
    assert settings_path(None, {"TRIMTAB_CONFIG": "b.yaml"}) == Path("b.yaml")
    assert settings_path(None, {}) == Path("trimtab.yaml")


SECRETS = """
kafka: {security_protocol: SASL_SSL, sasl_mechanism: PLAIN, sasl_username: me, sasl_password: hunter2}
worker: {http: {token: hunter2}}
learner: {http: {token: hunter2}}
control: {secret: hunter2}
"""


def test_no_secret_is_shown_by_the_settings(tmp_path: Path) -> None:
    """Settings are printed and logged by whoever looks for a fault."""
    settings = load_settings(write(tmp_path, SMALL + SECRETS), {})
    assert settings.kafka.password() == "hunter2"
    assert settings.control.key() == b"hunter2"
    for shown in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "hunter2" not in shown


@pytest.mark.parametrize(
    "wrong",
    [
        "kafka: {sasl_password: [hunter2]}",
        "kafka: {sasl_pasword: hunter2}",
        "kafka: hunter2\n  : :",
        "control: {secret: {hunter2: hunter2}}",
        "control: {secert: hunter2}",
        "worker: {http: {token: [hunter2], tokn: hunter2}}",
        "learner: [hunter2]",
        "passwort: hunter2",
    ],
)
def test_no_secret_is_shown_by_a_refusal(tmp_path: Path, wrong: str) -> None:
    """A mistake beside a password must not put the password into a log."""
    with pytest.raises(InvalidSettings) as refusal:
        load_settings(write(tmp_path, f"{SMALL}\n{wrong}\n"), {})
    assert "hunter2" not in str(refusal.value)


@given(
    content=st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["kind", "text", "encoder", "replay", "size", "streams", "x"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    )
)
def test_any_yaml_is_taken_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    """Whatever is in the file, nobody sees a traceback."""
    path = tmp_path_factory.mktemp("any") / "trimtab.yaml"
    path.write_text(json.dumps({"streams": {"s": content}}), encoding="utf-8")
    found: Settings | InvalidSettings
    try:
        found = load_settings(path, {})
    except InvalidSettings as refusal:
        found = refusal
    lines = found.problems if isinstance(found, InvalidSettings) else ("streams.s",)
    assert lines
    assert all(line.startswith("streams.s") for line in lines)


def test_what_this_machine_lacks_is_told(tmp_path: Path) -> None:
    """A path that is wrong should be told by a check, not by a restart at night."""
    text = f"""
kafka: {{security_protocol: SSL, ca_file: {tmp_path}/no.pem}}
control: {{secret_file: {tmp_path}/no.secret}}
learner: {{http: {{token_file: {tmp_path}/no.token}}}}
streams:
  a: {{kind: text, encoder: {{model: {tmp_path}}}}}
"""
    found = unreadable(load_settings(write(tmp_path, text), {}))
    assert [line.partition(" ")[0] for line in found] == [
        "kafka.ca_file:",
        "learner.http.token_file",
        "control.secret_file",
        "streams.a.encoder.model:",
    ]
    assert unreadable(load_settings(write(tmp_path, SMALL), {})) == []


@pytest.mark.parametrize("content", [b"", b" \n"], ids=["empty", "a line end"])
def test_a_secret_of_an_empty_file_is_told(tmp_path: Path, content: bytes) -> None:
    """A mount that failed leaves such a file: taken as no secret, it would open the door that it was to lock."""
    for name in ("http", "control"):
        (tmp_path / name).write_bytes(content)
    text = f"""
control: {{secret_file: {tmp_path}/control}}
learner: {{http: {{token_file: {tmp_path}/http}}}}
worker: {{http: {{token_file: {tmp_path}/http}}}}
streams: {{a: {{kind: text}}}}
"""
    assert unreadable(load_settings(write(tmp_path, text), {})) == [
        f"worker.http.token_file {tmp_path}/http: it is empty",
        f"learner.http.token_file {tmp_path}/http: it is empty",
        f"control.secret_file {tmp_path}/control: it is empty",
    ]


@pytest.mark.parametrize("variable", ["LEARNER__HTTP__TOKEN", "WORKER__HTTP__TOKEN", "CONTROL__SECRET"])
def test_an_empty_secret_of_the_environment_is_refused(tmp_path: Path, variable: str) -> None:
    """A variable that a script left empty must not be a secret that everybody knows."""
    with pytest.raises(InvalidSettings, match=variable):
        load_settings(write(tmp_path, SMALL), {f"TRIMTAB_{variable}": ""})


def test_the_schema_knows_every_block_and_no_machine() -> None:
    """Editors complete the file from it, and it is the same wherever it is made."""
    schema = json_schema()
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["additionalProperties"] is False
    assert sys.executable not in json.dumps(schema)


def test_settings_load_nothing_that_computes() -> None:
    """A worker and every command read the settings first, and must not wait seconds for what they do not use."""
    heavy = ("avalanche", "datasets", "torch", "transformers", "river", "sklearn", "pandas")
    code = f"import sys, deploy.settings; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
