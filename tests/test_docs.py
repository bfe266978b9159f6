"""What the documents say must be true of the code: examples, commands, settings, metrics, paths and links."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from prometheus_client import CollectorRegistry

from deploy.cli import app
from deploy.settings import Settings, json_schema, load_settings, rules
from learner.control import ControlAnswer, ControlRequest
from learner.registry import Pointer
from monitoring.metrics import Metrics
from stream.errors import DeadLetter, Reason
from stream.events import Decoder, LabelRequest, Record, dead_letter_headers, utc_now
from stream.kafka import KINDS, Topics

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
ROOMS = ("deploy", "learner", "replay", "stream", "monitoring")

STREAMS = """
streams:
  notes: {kind: text}
  pump: {kind: telemetry, encoder: {channels: [pressure, flow]}}
"""
"""The streams that the examples of docs/wire.md belong to."""

MADE_BY_ITS_READER = {"deploy/docker/secrets"}
"""Paths that a page tells its reader to make."""


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str, mark: str) -> Iterator[tuple[str, str]]:
    """Fenced blocks under a comment such as `<!-- example: event -->`, with what the comment names."""
    pattern = rf"^ *<!-- {mark}: (\S+) -->\n( *)```\w+\n(.*?)^\2```"
    for found in re.finditer(pattern, text_of(page), re.DOTALL | re.MULTILINE):
        yield found[1], textwrap.dedent(found[3])


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    file = tmp_path / "trimtab.yaml"
    file.write_text(STREAMS)
    return load_settings(file, {})


def record(value: str) -> Record:
    return Record("reports", 0, 0, None, value.strip().encode())


# Examples


def test_every_example_of_the_wire_is_one(settings: Settings) -> None:
    """An integrator copies the example first and reads the table later."""
    counted: list[str] = []
    ignored: list[str] = []
    decoder = Decoder(rules(settings), lambda kind, count: ignored.append(kind))
    for kind, block in blocks("docs/wire.md", "example"):
        counted.append(kind)
        match kind:
            case "event":
                decoder.event(record(block))
            case "label":
                decoder.label(record(block))
            case "prediction":
                decoder.prediction(record(block))
            case "request":
                LabelRequest.model_validate_json(block)
            case "control":
                ControlRequest.model_validate_json(block)
            case "answer":
                ControlAnswer.model_validate_json(block)
            case "pointer":
                Pointer.decode(b"notes/champion", block.encode())
            case _:
                pytest.fail(f"nobody checks examples of {kind!r}")
    assert sorted(counted) == ["answer", "control", "event", "event", "label", "pointer", "prediction", "request"]
    assert not ignored, "an example has a field that is not read"


def test_the_readme_s_files_are_taken(tmp_path: Path) -> None:
    """A newcomer's first file must not be the first dead letter."""
    files = dict(blocks("README.md", "file"))
    assert set(files) == {"trimtab.yaml", "events.jsonl", "labels.jsonl", "more.jsonl"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    decoder = Decoder(rules(load_settings(tmp_path / "trimtab.yaml", {})))
    for name in ("events.jsonl", "more.jsonl"):
        for line in files[name].splitlines():
            decoder.event(record(line))
    for line in files["labels.jsonl"].splitlines():
        decoder.label(record(line))


def test_settings_in_the_documents_are_taken(tmp_path: Path) -> None:
    """A key that was renamed would be refused where it was copied from the page."""
    for page, kind in (("README.md", "streams"), ("docs/operations.md", "settings")):
        (block,) = (content for found, content in blocks(page, "example") if found == kind)
        content = yaml.safe_load(block)
        file = tmp_path / f"{kind}.yaml"
        file.write_text(yaml.safe_dump({"streams": content} if kind == "streams" else content))
        load_settings(file, {})


def test_the_snippet_for_control_is_python() -> None:
    """It is copied at night; what it imports must be there."""
    (snippet,) = (block for kind, block in blocks("docs/operations.md", "example") if kind == "python")
    compile(snippet, "docs/operations.md", "exec")
    for line in snippet.splitlines():
        if line.startswith("from ") and line.split()[1].partition(".")[0] in ROOMS:
            exec(line, {})


# Commands


def commands(found: click.Command, path: tuple[str, ...] = ("trimtab",)) -> Iterator[str]:
    if isinstance(found, click.Group) or hasattr(found, "commands"):
        for name, child in found.commands.items():  # type: ignore[union-attr]
            yield from commands(child, (*path, name))
    else:
        yield " ".join(path)


COMMANDS = set(commands(typer.main.get_command(app)))


def test_every_command_is_on_the_operations_page() -> None:
    """A command that nobody can find is not there."""
    page = text_of("docs/operations.md")
    assert [command for command in sorted(COMMANDS) if f"`{command}" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_is_there(page: Path) -> None:
    """What a page tells people to type must be something that can be typed."""
    first = {command.split()[1] for command in COMMANDS}
    groups = {command.split()[1] for command in COMMANDS if len(command.split()) > 2}
    shell = "\n".join(re.findall(r"^ *```sh\n(.*?)```", page.read_text(), re.DOTALL | re.MULTILINE))
    words = r"trimtab ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?"
    typed = re.findall(rf"(?:^ *|&& |learner ){words}", shell, re.MULTILINE) + re.findall(rf"`{words}", prose(page))
    wrong = [
        f"trimtab {name} {rest}".strip()
        for name, rest in typed
        if name not in first or (name in groups and rest and f"trimtab {name} {rest}" not in COMMANDS)
    ]
    assert wrong == []


# Names


def test_the_wire_names_every_topic_reason_and_header() -> None:
    """Whoever filters by a name takes it from this page."""
    page = text_of("docs/wire.md")
    topics = Topics()
    assert [kind for kind in KINDS if f"`{topics.name(kind)}`" not in page] == []
    reasons = re.findall(r"^\| `([a-z_]+)` \|", page.partition("| reason |")[2].partition("\n\n")[0], re.MULTILINE)
    assert reasons == [str(reason) for reason in Reason]
    refusal = DeadLetter(Reason.RAGGED, "values", "")
    headers = [name for name, _ in dead_letter_headers(refusal, record("{}"), utc_now())]
    assert [name for name in [*headers, "trimtab-by-reference", "trimtab-signature"] if f"`{name}`" not in page] == []


def test_every_module_has_its_line() -> None:
    """Whoever looks for a thing begins with this table."""
    listed = re.findall(r"^\|[^|]*\| `([a-z]+/[a-z_]+\.py)` \| \S", text_of("docs/architecture.md"), re.MULTILINE)
    there = [
        f"{room}/{path.name}"
        for room in ROOMS
        for path in sorted((REPOSITORY / room).glob("*.py"))
        if path.name != "__init__.py"
    ]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_in_the_documents_are_exposed(page: Path) -> None:
    """A query copied from a page must find something."""
    metrics = Metrics(CollectorRegistry())
    ends = ("", "_total", "_bucket", "_sum", "_count")
    exposed = {metric.name + end for metric in metrics.registry.collect() for end in ends}
    assert set(re.findall(r"\btrimtab_[a-z_]+", page.read_text())) - exposed == set()


def keys(schema: dict[str, Any], path: str) -> bool:
    """Whether a dotted key is in the settings' schema; an upper-case part stands for any stream's name."""
    definitions = schema["$defs"]
    here: list[dict[str, Any]] = [schema]
    for part in path.split("."):
        below: list[dict[str, Any]] = []
        for node in here:
            found = node.get("properties", {}).get(part)
            below += _resolved(found, definitions) if found is not None else []
            if part.isupper():
                for named in node.get("patternProperties", {}).values():
                    below += _resolved(named, definitions)
        here = below
    return bool(here)


def _resolved(node: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    options = [node, *node.get("oneOf", []), *node.get("anyOf", []), *node.get("allOf", [])]
    references = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
    return [*options, *(deeper for name in references for deeper in _resolved(definitions[name], definitions))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_named_in_the_documents_are_settings(page: Path) -> None:
    """A key that was renamed sends its reader into a refusal."""
    schema = json_schema()
    blocks_of = "|".join(schema["properties"])
    named = set(re.findall(rf"`((?:{blocks_of})(?:\.[A-Za-z_]+)+)[`:]", prose(page)))
    elsewhere = {f"{room}.{path.stem}" for room in ROOMS for path in (REPOSITORY / room).glob("*.py")} | {"learner.db"}
    assert [key for key in sorted(named - elsewhere) if not keys(schema, key)] == []


# Paths and links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_the_documents_exist(page: Path) -> None:
    """A file that was moved leaves its reader in the dark."""
    tops = "|".join((*ROOMS, "trimtab", "tests", "docs", "benchmarks"))
    named = set(re.findall(rf"(?<![\w/.:-])((?:{tops})/[\w./-]*\w)", prose(page)))
    assert [path for path in sorted(named - MADE_BY_ITS_READER) if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A link that leads nowhere is worse than none."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}
