"""A page for every alert, for someone who was woken by it and did not build this: whole, and true of the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from deploy.cli import app
from tests.monitoring.queries import PROMETHEUS, dashboards, panels, rules

REPOSITORY = PROMETHEUS.parents[1]
RUNBOOK = REPOSITORY / "docs" / "runbook"
PAGES = sorted(page for page in RUNBOOK.glob("*.md") if page.name != "README.md")
ALERTS = {rule["annotations"]["runbook_url"]: rule for rule in rules() if "alert" in rule}
SECTIONS = ["What it means", "What the user sees", "What to look at", "What to do"]
HTTP_PAGES = (
    "/livez",
    "/readyz",
    "/metrics",
    "/streams",
    "/streams/NAME",
    "/streams/NAME/versions",
    "/streams/NAME/classes",
)


def typed(page: Path) -> Iterator[list[str]]:
    """The words of each line to be typed."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        yield from (shlex.split(line) for line in block.splitlines())


def parse(words: list[str]) -> None:
    """Parse a command line as trimtab would, and run nothing; raises what would be its refusal."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            raise ValueError(f"no such command: {' '.join(words)}")
        command, rest = command.commands[rest[0]], rest[1:]
    with command.make_context(command.name, rest):
        pass


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    """A link that leads nowhere at 3 a.m. is worse than none; a page without its alert tells of what is no more."""
    assert {RUNBOOK / Path(url).name for url in ALERTS} == set(PAGES)
    assert len(ALERTS) == len([rule for rule in rules() if "alert" in rule])
    index = (RUNBOOK / "README.md").read_text()
    for url, rule in ALERTS.items():
        page = (REPOSITORY / url).read_text()
        assert f"`{rule['alert']}`, {rule['labels']['severity']}, " in page
        assert f"({Path(url).name}) | {rule['labels']['severity']} | `{rule['alert']}` |" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_says_the_same_things_in_the_same_order(page: Path) -> None:
    """Who reads half asleep looks for the fourth heading, and for what to type below it."""
    parts = re.split(r"^## (.+)\n", page.read_text(), flags=re.MULTILINE)
    assert parts[1::2][:4] == SECTIONS
    assert parts[1::2][4:] in ([], ["The threshold"])
    assert all(len(part.strip()) > 20 for part in parts[2::2])
    assert "```sh\n" in parts[8]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_on_a_page_would_be_taken(page: Path) -> None:
    """A command that is refused costs the minutes in which it is needed: names, options and values are parsed."""
    lines = list(typed(page))
    assert lines
    for words in lines:
        if words[0] == "curl":
            address = re.fullmatch(r"http://127\.0\.0\.1:(?:6066|6070)(/.*)", words[-1])
            assert address is not None, words
            assert address[1] in HTTP_PAGES
        else:
            assert words[0] == "trimtab", words
            parse(words)


def test_a_wrong_command_would_be_found() -> None:
    """The check above must be able to fail."""
    for wrong in ("trimtab versions lst", "trimtab retrain NAME --why x", "trimtab predictions --limit many"):
        with pytest.raises(Exception, match=r"(?i)no such|valid integer"):
            parse(wrong.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_panels_that_a_page_names_are_on_a_dashboard(page: Path) -> None:
    """`Look at X` sends its reader searching when X was renamed."""
    known = {panel["title"] for dashboard in dashboards() for panel in panels(dashboard)}
    known |= {row["title"] for dashboard in dashboards() for row in dashboard["panels"] if row["type"] == "row"}
    drift_kinds = {"Error", "Prediction", "Input"}
    stages = {"predict", "produce", "commit"}
    named = set(re.findall(r"(?<!\*)\*([A-Za-z][^*\n]*(?:\n[^*\n]+)?)\*(?!\*)", page.read_text()))
    assert {" ".join(name.split()) for name in named} <= known | drift_kinds | stages
