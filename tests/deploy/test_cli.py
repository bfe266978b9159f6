"""The command line: it reads well, it works on a real Kafka, and its errors are sentences."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import typer.main
from typer.testing import CliRunner, Result

from deploy.cli import app
from deploy.terminal import print_rows
from learner.control import SIGNATURE, ControlAnswer, ControlRequest, ControlSettings, Gate
from learner.exam import examine
from learner.registry import Lineage, Registry, VersionManifest
from learner.spec import EncoderSpec
from replay import schema
from stream.errors import DeadLetter, Reason, RetryLater
from stream.events import Label, Place, Prediction, Record, Report, dead_letter_headers, encode
from tests.kafka import KafkaBroker

COMMANDS = [
    [],
    ["worker"],
    ["learner"],
    ["broker"],
    ["demo"],
    ["publish"],
    ["init"],
    ["doctor"],
    ["predict"],
    ["predictions"],
    ["explain"],
    ["retrain"],
    ["pause"],
    ["resume"],
    ["rollback"],
    ["config"],
    ["config", "check"],
    ["config", "schema"],
    ["topics"],
    ["topics", "create"],
    ["requests"],
    ["asked"],
    ["quarantine"],
    *(["quarantine", name] for name in ("list", "show", "release", "drop")),
    ["classes"],
    *(["classes", name] for name in ("list", "rename", "merge")),
    ["labels"],
    *(["labels", name] for name in ("export", "import")),
    ["versions"],
    *(["versions", name] for name in ("list", "show", "diff", "rebuild", "export", "promote", "rollback", "prune")),
    ["dead-letters"],
    *(["dead-letters", name] for name in ("list", "show", "replay")),
]
AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def run(*arguments: str, input: bytes | None = None) -> Result:  # noqa: A002
    """Run the command line in this process; an exception that gets out of it fails the test."""
    result = CliRunner().invoke(app, list(arguments), input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def report(name: str, text: str = "hello") -> Report:
    return Report(event_id=name, stream="intents", observed_at=AT, text=text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, without settings from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRIMTAB_CONFIG", raising=False)
    return tmp_path


@pytest.fixture
def quiet(folder: Path) -> Path:
    """Settings whose Kafka and learner do not answer."""
    return settings(folder, f"127.0.0.1:{closed_port()}", "")


@pytest.fixture
def prefix(folder: Path, kafka: KafkaBroker, topics: Callable[[], str]) -> str:
    """Settings on the real Kafka, with topics of their own."""
    prefix = topics()
    settings(folder, kafka.bootstrap, prefix)
    created = run("topics", "create")
    assert created.exit_code == 0, created.output
    return prefix


def settings(folder: Path, bootstrap: str, prefix: str) -> Path:
    path = folder / "trimtab.yaml"
    path.write_text(
        f"""
kafka: {{bootstrap_servers: "{bootstrap}", timeout_seconds: 5}}
topics: {{prefix: "{prefix}", partitions: 2}}
learner: {{http: {{port: {closed_port()}, token: let-me-in}}}}
control: {{secret: sign-here}}
streams:
  intents: {{kind: text, max_characters: 50}}
  storm: {{kind: telemetry, encoder: {{channels: [kp]}}}}
""",
        encoding="utf-8",
    )
    return path


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


LIST_NOTHING = {
    *("worker", "learner", "broker", "demo", "init", "config check", "config schema", "topics create", "publish"),
    *("labels export", "labels import", "retrain", "label", "forget", "pause", "resume"),
    *("dead-letters show", "dead-letters replay", "quarantine show", "quarantine release", "quarantine drop"),
    *("classes rename", "classes merge", "versions promote", "versions rollback", "versions export"),
}
"""The commands that do something, or show one thing as it is; every other one tells programs what it tells people."""


def leaves(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with its whole name."""
    for name, child in getattr(found, "commands", {}).items():
        yield from leaves(child, (*path, name)) if hasattr(child, "commands") else [(" ".join((*path, name)), child)]


def test_every_command_that_lists_has_a_form_for_programs() -> None:
    """A new command must have it, or be written down as one that lists nothing; and its fields must be documented."""
    forms = {
        name: any("--format" in option.opts for option in command.params)
        for name, command in leaves(typer.main.get_command(app))
    }
    assert {name for name, form in forms.items() if not form} == LIST_NOTHING
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("\n## For programs\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `trimtab ([a-z -]+?)(?: [A-Z].*)?` \|", section, re.MULTILINE))
    assert documented == set(forms) - LIST_NOTHING


def test_a_list_that_is_cut_short_is_no_document(capsys: pytest.CaptureFixture[str]) -> None:
    """A program that got half of the rows and could parse them would take them for all."""

    def rows() -> Iterator[dict[str, str]]:
        yield {"class": "東京"}
        raise RetryLater("the broker went away")

    with pytest.raises(RetryLater):
        print_rows(rows(), "json")
    with pytest.raises(json.JSONDecodeError):
        json.loads(capsys.readouterr().out)
    print_rows([{"class": "東京"}, {"class": "half \ud83d"}], "json")
    out = capsys.readouterr().out
    assert "東京" in out
    assert json.loads(out) == [{"class": "東京"}, {"class": "half \ud83d"}]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_reads_well(command: list[str]) -> None:
    """The help is the manual that people have at hand."""
    result = run(*command, "--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert f"Usage: {' '.join(['root', *command])}" in text
    described = text.split("[OPTIONS]")[1]
    assert any(word[0].isupper() for word in described.split() if word.isalpha())


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    """A command line that takes seconds to say what it can do is not asked twice."""
    code = (
        "import sys\nfrom deploy.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'faust', 'kafka', 'confluent_kafka', 'pydantic', 'numpy', 'yaml', 'sqlalchemy')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stderr.strip() == "[]"


def test_config_check_tells_what_is_fine_and_what_is_not(folder: Path) -> None:
    """It is run before anything else, and by CI."""
    path = settings(folder, "kafka:9092", "")
    good = run("config", "check", str(path))
    assert (good.exit_code, "streams: intents (text), storm (telemetry)" in good.output) == (0, True)
    path.write_text("streams: {a: {kind: txt}}", encoding="utf-8")
    bad = run("config", "check", str(path))
    assert bad.exit_code == 2
    assert "streams.a.kind: found 'txt'" in bad.stderr


def test_config_schema_is_json(folder: Path) -> None:
    """An editor reads it as it is printed."""
    result = run("config", "schema")
    assert json.loads(result.stdout)["title"] == "trimtab.yaml"


@pytest.mark.parametrize(
    "command",
    [
        ["topics", "create"],
        ["publish", "trimtab.yaml", "--topic", "reports"],
        ["predictions"],
        ["dead-letters", "list"],
        ["dead-letters", "show", "0:0"],
        ["retrain", "intents", "--by-topic"],
        ["worker"],
        ["learner"],
    ],
    ids=" ".join,
)
def test_an_unreachable_broker_is_one_sentence(
    quiet: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback tells an operator nothing; this is the most common fault of all."""
    monkeypatch.setenv("TRIMTAB_KAFKA__TIMEOUT_SECONDS", "1")
    result = run(*command)
    assert result.exit_code == 1
    assert "no Kafka answers at 127.0.0.1" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        (["publish", "absent.jsonl", "-t", "labels"], 2, "there is no file absent.jsonl"),
        (["publish", "-", "-t", "predictions"], 2, "there are: labels, reports, telemetry"),
        (["worker", "-c", "absent.yaml"], 2, "there is no such file; name one with --config"),
        (["worker", "--pin", "intents"], 2, "give STREAM=VERSION"),
        (["worker", "--pin", "intents=v1.2"], 2, "needs --group and --predictions"),
        (["retrain", "intent"], 2, "did you mean intents?"),
        (["retrain", "intents"], 1, "no learner answers at http://127.0.0.1:"),
        (["forget", "e1"], 2, "unique within its stream only: give --stream, one of intents, storm"),
        (["explain", "e1"], 2, "unique within its stream only: give --stream, one of intents, storm"),
        (["explain", "e1", "--stream", "intents"], 1, "no learner answers at http://127.0.0.1:"),
        (["explain", "e1", "--stream", "intents", "--all"], 2, "run it where the learner's database can be read"),
        (["rollback", "intents", "--since", "yesterday"], 2, "no version such as v13, and no time such as 2026-03-01"),
        (["rollback", "intents", "--since", "v2"], 1, "stream 'intents' has had no version in service yet"),
        (["versions", "diff", "intents", "v1", "v2"], 2, "run it where the learner runs"),
        (["versions", "rebuild", "intents", "v2"], 2, "run it where the learner runs"),
        (["versions", "promote", "intents", "12"], 2, "version: "),
        (["versions", "show", "intents", "v9"], 1, "v9"),
        (["versions", "prune", "intents"], 2, "prune where the learner runs"),
        (["dead-letters", "show", "5"], 2, "give PARTITION:OFFSET"),
        (["dead-letters", "replay"], 2, "name the places"),
        (["predictions", "--stream", "strom"], 2, "did you mean storm?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence(quiet: Path, command: list[str], code: int, sentence: str) -> None:
    """With what to do about it, and an exit code that a script can tell from success."""
    result = run(*command)
    assert sentence in result.stderr
    assert result.exit_code == code
    assert "Traceback" not in result.output


def test_a_port_in_use_is_one_sentence(folder: Path) -> None:
    """Two brokers on one machine are an easy mistake."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("broker", "--port", str(taken.getsockname()[1]))
    assert result.exit_code in (1, 2)
    assert "port" in result.stderr
    assert "Traceback" not in result.output


def test_topics_are_created_once(prefix: str) -> None:
    """It is in every deployment's start, so a second run must be harmless."""
    assert "All topics are there" in run("topics", "create").output


def test_publish_sends_good_lines_and_names_bad_ones(prefix: str, folder: Path, kafka: KafkaBroker) -> None:
    """One bad line in a million must neither stop the rest nor go unnoticed."""
    good = [encode(report(f"e{i}")) for i in range(5)]
    lines = [*good[:2], b"{nonsense", b"", encode(report("long", "x" * 51)), *good[2:]]
    path = folder / "events.jsonl"
    path.write_bytes(b"\n".join(lines))
    result = run("publish", str(path), "--topic", "reports")
    assert result.exit_code == 1
    assert "Published 5 messages" in result.stderr
    assert "  line 3: " in result.stderr
    assert "  line 5: text: 51 characters, at most 50 are taken" in result.stderr
    found = kafka.consume_all(f"{prefix}reports")
    assert sorted(record.value or b"" for record in found) == sorted(good)
    assert all(record.key == json.loads(record.value or b"")["event_id"].encode() for record in found)


def test_publish_reads_standard_input_and_may_be_told_not_to_check(prefix: str, kafka: KafkaBroker) -> None:
    """To try the dead letters, somebody must be able to send one."""
    result = run("publish", "-", "-t", "labels", "--no-check", input=b'{"event_id": "a"}\n{nonsense\n')
    assert result.exit_code == 0
    found = {record.value: record.key for record in kafka.consume_all(f"{prefix}labels")}
    assert found == {b'{"event_id": "a"}': b"a", b"{nonsense": None}


def test_our_keys_land_where_the_other_producers_put_them(prefix: str, kafka: KafkaBroker) -> None:
    """Predictions and labels meet by partition; a publisher with another partitioner would part them."""
    labels = [Label(event_id=f"e{i}", stream="intents", label="a", labelled_at=AT) for i in range(40)]
    run("publish", "-", "-t", "labels", input=b"\n".join(map(encode, labels)))
    ours = {record.key: record.partition for record in kafka.consume_all(f"{prefix}labels")}
    kafka.produce(f"{prefix}predictions", [(label.event_id, b"x") for label in labels])
    theirs = {record.key: record.partition for record in kafka.consume_all(f"{prefix}predictions")}
    assert len(ours) == 40
    assert ours == theirs


def prediction(number: int, stream: str = "intents", label: str | None = "greet") -> Prediction:
    return Prediction(
        event_id=f"e{number}",
        stream=stream,
        label=label,
        probabilities={label: 0.75} if label else {},
        novelty=0.25,
        model_version="v1.2",
        ref=Place(topic="reports", partition=0, offset=number),
        observed_at=AT,
        predicted_at=AT,
    )


def test_predictions_are_printed_for_people_and_for_machines(prefix: str, kafka: KafkaBroker) -> None:
    """Watching the answers is how a newcomer sees that it works."""
    made = [prediction(0), prediction(1, label=None), prediction(2, "storm", "quiet")]
    messages = [(one.event_id, encode(one)) for one in made]
    kafka.produce(f"{prefix}predictions", [*messages[:2], ("x", b"{nonsense"), messages[2]])
    text = run("predictions")
    assert text.exit_code == 0
    assert "greet 0.75" in text.stdout
    assert "(nothing learned yet)" in text.stdout
    assert "malformed_json" in text.stderr
    lines = run("predictions", "--stream", "storm", "--format", "jsonl").stdout.splitlines()
    assert [Prediction.model_validate_json(line) for line in lines] == [made[2]]
    rows = json.loads(run("predictions", "--format", "json").stdout)
    assert {row["event_id"] for row in rows} == {one.event_id for one in made}


def test_predictions_follow_what_comes_later(prefix: str, kafka: KafkaBroker) -> None:
    """`--follow` must not end at the end of the log."""
    kafka.produce(f"{prefix}predictions", [("e0", encode(prediction(0)))])
    later = threading.Timer(0.7, lambda: kafka.produce(f"{prefix}predictions", [("e1", encode(prediction(1)))]))
    later.start()
    result = run("predictions", "--follow", "--limit", "2", "--format", "jsonl")
    later.join()
    assert {json.loads(line)["event_id"] for line in result.stdout.splitlines()} == {"e0", "e1"}


def test_dead_letters_are_listed_shown_and_sent_again(prefix: str, kafka: KafkaBroker) -> None:
    """After the settings are mended the very same bytes must get their second chance."""
    dead = f"{prefix}dead-letters"
    first = kafka.produce(f"{prefix}reports", [("e1", encode(report("e1", "x" * 51)), (("ce_id", b"7"),))])[0]
    wrong = kafka.produce(f"{prefix}reports", [("e2", b"{nonsense")])[0]
    large = kafka.produce(f"{prefix}reports", [("e3", encode(report("e3", "y" * 400_000)))])[0]
    refused = [
        (first, DeadLetter(Reason.TEXT_TOO_LONG, "text", "51 characters", "e1")),
        (wrong, DeadLetter(Reason.MALFORMED_JSON, "", "expected a string")),
        (large, DeadLetter(Reason.TEXT_TOO_LONG, "text", "400000 characters", "e3")),
    ]
    letters: list[tuple[Any, ...]] = []
    for record, why in refused:
        headers = tuple(dead_letter_headers(why, record, AT))
        if record is large:
            added = headers[len(record.headers) :]
            letters.append((None, b"", (*added, ("trimtab-by-reference", b"1"))))
        else:
            letters.append((record.key, record.value, headers))
    places = [f"{record.partition}:{record.offset}" for record in kafka.produce(dead, letters)]

    listed = json.loads(run("dead-letters", "list", "--format", "json").stdout)
    assert {one["place"] for one in listed} == set(places)
    assert {one["reason"] for one in listed} == {"text_too_long", "malformed_json"}
    assert "expected a string" in run("dead-letters", "list").stdout
    assert run("dead-letters", "list", "--reason", "ragged", "--format", "json").stdout == "[]\n"
    assert run("dead-letters", "list", "--reason", "ragged", "--format", "jsonl").stdout == ""
    assert "There are no dead letters for ragged" in run("dead-letters", "list", "--reason", "ragged").stdout

    shown = run("dead-letters", "show", places[0]).stdout
    assert "51 characters" in shown
    assert "ce_id: 7" in shown
    assert '"event_id": "e1"' in shown
    assert "trimtab-reason" not in shown
    assert '"event_id": "e3"' in run("dead-letters", "show", places[2]).stdout
    assert run("dead-letters", "show", "1:99999").exit_code == 1

    before = len(kafka.consume_all(f"{prefix}reports"))
    assert run("dead-letters", "replay", "--all", input=b"n\n").exit_code == 1
    assert len(kafka.consume_all(f"{prefix}reports")) == before
    again = run("dead-letters", "replay", "--all", "--reason", "text_too_long", "--yes")
    assert "Sent 2 messages again" in again.stdout
    run("dead-letters", "replay", places[1], "--yes")
    copies = kafka.consume_all(f"{prefix}reports")
    for record in (first, wrong, large):
        twins = [one for one in copies if (one.key, one.value) == (record.key, record.value)]
        assert len(twins) == 2
        assert twins[0].headers == twins[1].headers


class Learner(BaseHTTPRequestHandler):
    """A small learner that takes what it is asked, and refuses to promote."""

    asked: list[tuple[str, str | None, dict[str, Any]]]

    def do_POST(self) -> None:
        """Answer as the learner's pages do."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], body))
        action = self.path.rpartition("/")[2]
        good = action != "promote"
        answer = ControlAnswer(
            id=body["id"],
            action=action,
            stream="intents",
            accepted=good,
            message="begun" if good else "v3 is unknown",
            cleaned=("ledger: 1 row",) if action == "forget" else (),
            not_reached=("log: until its retention ends",) if action == "forget" else (),
        )
        self.send_response(202 if good else 409)
        self.end_headers()
        self.wfile.write(answer.model_dump_json().encode())

    def do_GET(self) -> None:
        """A page: one label in quarantine, or one class with a twin."""
        self.asked.append((self.path, self.headers["Authorization"], {}))
        waiting = {
            "id": 7,
            "reason": "labeller_untrusted",
            "detail": "contradicted",
            "labeller": "night shift",
            "label": "flare",
            "event_id": "e1",
            "labelled_at": "2024-05-01T00:00:00Z",
        }
        standing = {"labeller": "night shift", "believed": False, "since": "2024-05-01", "why": "contradicted"}
        counted = {"labels": 90, "judged": 80, "contradicted": 20, "excess": 0.21, "surely": 5.0}
        named = {"class": "Flare ", "labels_learned": 3, "recall": None, "scored": 0, "first_seen": "2024-05-01"}
        page: Any = {"waiting": {"labeller_untrusted": 1}, "labels": [waiting], "labellers": [{**standing, **counted}]}
        if self.path.endswith("/classes"):
            page = [{**named, "alike": ["flare"], "was": []}]
        if self.path.endswith("/requests"):
            place = {"topic": "reports", "partition": 2, "offset": 48121}
            asked = {"event_id": "e7", "why": "novel", "score": 0.91, "label": None, "model_version": "v0.0"}
            counts = {"per_day": 50, "left": 38, "open": 1, "answered": 11}
            page = {**counts, "requests": [{**asked, "ref": place, "asked_at": "2024-05-01T00:00:00Z"}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(page).encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def learner() -> Iterator[tuple[str, list[tuple[str, str | None, dict[str, Any]]]]]:
    asked: list[tuple[str, str | None, dict[str, Any]]] = []
    server = HTTPServer(("127.0.0.1", 0), type("One", (Learner,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_learner_is_asked_by_http_with_the_token(quiet: Path) -> None:
    """The answer must say what became of it, by its words and by the exit code."""
    with learner() as (url, asked):
        begun = run("retrain", "intents", "--learner", url, "--reason", "new season")
        refused = run("versions", "promote", "intents", "v3", "--learner", url, "--force")
        run("versions", "rollback", "intents", "v2.17", "--learner", url)
    assert (begun.exit_code, begun.stdout.strip()) == (0, "begun")
    assert (refused.exit_code, "v3 is unknown" in refused.stderr) == (1, True)
    assert [path for path, _, _ in asked] == [
        "/streams/intents/retrain",
        "/streams/intents/promote",
        "/streams/intents/rollback",
    ]
    assert {token for _, token, _ in asked} == {"Bearer let-me-in"}
    assert asked[0][2]["reason"] == "new season"
    assert asked[1][2]["force"] is True
    assert asked[2][2]["version"] == "v2.17"


def test_forgetting_says_what_was_reached_and_what_was_not(quiet: Path) -> None:
    """Whoever promised somebody to delete something must know what is left to do."""
    with learner() as (url, asked):
        done = run("forget", "e1", "e2", "--stream", "intents", "--learner", url)
    assert done.stdout.splitlines() == [
        "begun",
        "Cleaned: ledger: 1 row",
        "Not reached: log: until its retention ends",
    ]
    ((path, _, body),) = asked
    assert path == "/streams/intents/forget"
    assert body["event_ids"] == ["e1", "e2"]


def test_the_learner_is_asked_by_topic_with_a_signature(prefix: str, kafka: KafkaBroker) -> None:
    """Where HTTP does not reach, the same request goes by Kafka, and the learner's gate lets it through."""
    assert run("retrain", "intents", "--by-topic").exit_code == 0
    (record,) = kafka.consume_all(f"{prefix}control")
    gate = Gate(ControlSettings.model_validate({"secret": "sign-here"}))
    request = gate.admit(record.value or b"", dict(record.headers))
    assert isinstance(request, ControlRequest)
    assert (request.action, request.stream) == ("retrain", "intents")
    assert SIGNATURE in dict(record.headers)


@pytest.fixture
def registry(quiet: Path) -> Registry:
    """Five small versions of one stream, the last in service, and a store in which a prediction names the second."""
    registry = Registry("trimtab-data/registry", now=lambda: AT)
    spec = EncoderSpec(kind="text", dimension=8, bound=1.0, config={}, files={})
    for number in range(5):
        manifest = VersionManifest(
            stream="intents",
            created_at=AT,
            encoder=spec.model_copy(update={"bound": 1.0 + number}),
            classes=("a", "b"),
            lineage=Lineage(strategy="replay", seed=number),
        )
        registry.put_encoder(manifest.encoder, {})
        registry.set_champion("intents", registry.commit(manifest))
    engine = schema.connect("sqlite:///trimtab-data/learner.db")
    schema.METADATA.create_all(engine)
    row = {column.name: 0 for column in schema.served.columns if not column.nullable}
    row |= {"stream": "intents", "event_id": "e", "model_version": "v1.4", "ref_topic": "reports", "too_late": False}
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(sa.insert(schema.served), [row])
    engine.dispose()
    return registry


def test_versions_are_listed_and_shown(registry: Registry) -> None:
    """Somebody who rolls back at night must see what there is."""
    rows = json.loads(run("versions", "list", "--format", "json").stdout)
    assert [row["version"] for row in rows] == ["v5", "v4", "v3", "v2", "v1"]
    assert [row["version"] for row in rows if row["in_service"]] == ["v5"]
    assert "in service" in run("versions", "list", "intents").stdout
    assert "strategy replay, seed 2" in run("versions", "show", "intents", "v3").stdout
    registry.set_champion("intents", "v4", "v5 is worse than v4 on labels of class 'a'")
    rows = json.loads(run("versions", "list", "--format", "json").stdout)
    why = "v5 is worse than v4 on labels of class 'a'"
    assert {row["version"]: row["rolled_back"] for row in rows if row["rolled_back"]} == {"v5": why}
    assert f"rolled back by itself: {why}" in run("versions", "show", "intents", "v5").stdout


def test_a_version_is_accounted_for(registry: Registry) -> None:
    """Why it serves, or does not, must be read off without the log of the night when it was decided."""
    labels = ["a"] * 80 + ["b"] * 80
    verdict = examine(labels, labels, ["b"] * 60 + labels[60:])
    manifest = registry.version("intents", "v5").model_copy(update={"number": 0, "parent": "v5", "verdict": verdict})
    registry.commit(manifest)
    shown = run("versions", "show", "intents", "v6").stdout
    assert "it was never in service" in shown
    assert "class 'a' is worse: from 80 to 20 right of 80" in shown
    assert "in service from 2026-03-01 12:00:00 UTC, until" in run("versions", "show", "intents", "v4").stdout
    found = json.loads(run("versions", "show", "intents", "v6", "--format", "json").stdout)
    failed = [check["rule"] for check in found["checks"] if not check["passed"]]
    assert "no class is worse" in failed
    assert "accuracy has not fallen" in failed
    assert "enough examples" not in failed


def test_a_version_that_cannot_be_made_again_says_so(registry: Registry) -> None:
    """A rebuild that is needed one day must not be counted on."""
    engine = schema.connect("sqlite:///trimtab-data/learner.db")
    row = {"stream": "intents", "number": 4, "state": "promoted", "encoder": "", "head": "", "created_at": 0}
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(sa.insert(schema.versions), [{**row, "detail": {"forgotten": 2}}])
    engine.dispose()
    said = "not rebuildable: 2 examples forgotten"
    rows = json.loads(run("versions", "list", "--format", "json").stdout)
    assert {row["version"]: row["rebuildable"] for row in rows if row["rebuildable"]} == {"v4": said}
    assert said in run("versions", "list", "intents").stdout
    assert said in run("versions", "show", "intents", "v4").stdout
    assert said not in run("versions", "show", "intents", "v3").stdout


def test_pruning_asks_keeps_what_is_named_and_can_be_tried(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that an unexpired prediction names must survive the tidiest of operators."""
    monkeypatch.setenv("TRIMTAB_REGISTRY__KEEP_CHAMPIONS", "1")
    dry = run("versions", "prune", "intents", "--dry-run").stdout
    assert "would remove 2 versions" in dry
    (planned,) = json.loads(run("versions", "prune", "intents", "--dry-run", "--format", "json").stdout)
    assert (planned["versions"], planned["dry_run"]) == (["v2", "v3"], True)
    assert "v2, v3" in dry
    assert "keeps v1" in dry
    assert registry.pruned("intents", "v2") is None
    asked = run("versions", "prune", "intents", "--format", "json", input=b"n\n")
    assert (asked.exit_code, "remove 2 versions" in asked.stderr) == (1, True)
    assert "remove" not in asked.stdout
    done = run("versions", "prune", "intents", "--yes", "--format", "json")
    assert json.loads(done.stdout)[0]["versions"] == ["v2", "v3"]
    gone = [name for name in ("v1", "v2", "v3", "v4", "v5") if registry.pruned("intents", name) is not None]
    assert gone == ["v2", "v3"]


@pytest.mark.parametrize("number", ["x", "-1", "\u00b2", "9" * 5_000, "", str(2**63)])
def test_a_letter_whose_place_is_nonsense_is_still_a_letter(number: str) -> None:
    """Whoever may write to the topic could otherwise keep everybody from reading it, the console included."""
    from deploy.messages import letter

    headers = tuple((f"trimtab-{name}", number.encode()) for name in ("reason", "topic", "partition", "offset"))
    one = letter(Record("dead", 0, 3, None, b"?", headers))
    assert (one.original.partition, one.original.offset) == (0, 0)
    assert one.original.place.partition == 0


def test_a_record_of_another_make_is_still_a_letter() -> None:
    """Whatever somebody put on the topic, listing it must not fail."""
    from deploy.messages import letter

    strange = letter(Record("dead", 0, 3, None, b"?", (("trimtab-topic", b"x"),)))
    assert (strange.reason, strange.original.topic, strange.original.headers) == ("", "", (("trimtab-topic", b"x"),))


def test_quarantine_is_listed_with_its_reasons_and_the_labellers(quiet: Path) -> None:
    """Whoever is to decide needs the label, the reason and how its labeller stands, and the filters must arrive."""
    with learner() as (url, asked):
        listed = run("quarantine", "list", "intents", "--labeller", "night shift", "--learner", url)
        shown = run("quarantine", "show", "intents", "7", "--learner", url)
        missing = run("quarantine", "show", "intents", "8", "--learner", url)
    for word in ("7", "labeller_untrusted", "flare", "e1", "20 of 80", "+21.0%", "no, since 2024-05-01"):
        assert word in listed.stdout
    assert asked[0][0] == "/streams/intents/quarantine?labeller=night+shift&limit=100&after=0"
    assert json.loads(shown.stdout)["event_id"] == "e1"
    assert (missing.exit_code, "no label 8" in missing.stderr) == (1, True)


def test_open_requests_say_where_the_event_lies_and_what_is_left(quiet: Path) -> None:
    """A labeller needs the event; a script needs one object a line."""
    with learner() as (url, _):
        listed = run("requests", "intents", "--learner", url)
        lines = run("requests", "intents", "--format", "jsonl", "--learner", url)
    for word in ("e7", "novel", "0.910", "reports[2]@48121", "38 of 50", "answered: 11"):
        assert word in listed.stdout
    assert [json.loads(line)["event_id"] for line in lines.stdout.splitlines()] == ["e7"]


def test_labels_are_released_and_dropped_by_what_is_named(quiet: Path) -> None:
    """Nothing named must not mean everything."""
    with learner() as (url, asked):
        run("quarantine", "release", "intents", "7", "9", "--learner", url)
        run("quarantine", "drop", "intents", "--for", "label_burst", "--class", "flare", "--learner", url)
        nothing = run("quarantine", "drop", "intents", "--learner", url)
    assert [path for path, _, _ in asked] == ["/streams/intents/release", "/streams/intents/drop"]
    assert asked[0][2]["held"]["ids"] == [7, 9]
    assert asked[1][2]["held"] == {"ids": [], "labeller": None, "label": "flare", "reason": "label_burst", "all": False}
    assert (nothing.exit_code, "say which labels" in nothing.stderr) == (2, True)


def test_classes_are_listed_with_their_twins_and_merged_only_when_sure(quiet: Path) -> None:
    """A merge cannot be undone, so it is asked about first."""
    with learner() as (url, asked):
        listed = run("classes", "list", "intents", "--learner", url)
        unsure = run("classes", "merge", "intents", "Flare", "flare", "--learner", url)
        run("classes", "merge", "intents", "Flare", "flare", "--yes", "--learner", url)
        run("classes", "rename", "intents", "flare", "solar flare", "--learner", url)
    assert "flare" in listed.stdout
    assert unsure.exit_code != 0
    assert [path for path, _, _ in asked[1:]] == ["/streams/intents/merge", "/streams/intents/rename"]
    assert (asked[1][2]["old"], asked[1][2]["new"]) == ("Flare", "flare")
