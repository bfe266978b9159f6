"""The queries of the dashboards, as Grafana would send them, for tests with and without a Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2] / "monitoring"
DASHBOARDS = ROOT / "grafana" / "dashboards"
PROMETHEUS = ROOT / "prometheus"
RULES = ("recording.yml", "alerts.yml")
"""The rule files, in the order in which Prometheus is to read them."""

BUILT_IN = {"__rate_interval": "1m", "__interval": "15s", "__range": "15m", "__range_s": "900"}
"""What Grafana itself fills in, for a dashboard that shows the last 15 minutes."""

_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][a-zA-Z0-9_:]*")
_WORDS = frozenset(
    (
        "and",
        "or",
        "unless",
        "on",
        "ignoring",
        "group_left",
        "group_right",
        "by",
        "without",
        "offset",
        "bool",
        "inf",
        "nan",
    )
)


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One query of one panel.

    Args:
        dashboard: the dashboard's title.
        panel: the panel's title.
        ref: which of the panel's queries it is, such as A.
        raw: the query with its variables.
        expression: the query as Prometheus gets it.
        instant: it is asked for one moment, not for a range.
    """

    dashboard: str
    panel: str
    ref: str
    raw: str
    expression: str
    instant: bool


def dashboards() -> list[dict[str, Any]]:
    """Every provisioned dashboard."""
    return [json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))]


def panels(dashboard: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All panels that are not rows, also those within collapsed rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", [])
        else:
            yield panel


def panel_queries(values: Mapping[str, str | Sequence[str]] | None = None) -> list[PanelQuery]:
    """The queries of all panels of all dashboards, with their variables filled in.

    Args:
        values: the chosen value or values of a variable; one that is not named, or is `All`, stands at
            All where it has that, else at its default.
    """
    found = []
    for dashboard in dashboards():
        chosen = {**BUILT_IN, **_variables(dashboard, values or {})}
        for panel in panels(dashboard):
            for target in panel["targets"]:
                found.append(
                    PanelQuery(
                        dashboard["title"],
                        panel["title"],
                        target["refId"],
                        target["expr"],
                        substitute(target["expr"], chosen),
                        bool(target.get("instant")),
                    )
                )
    return found


def queries_by_choice() -> dict[str, list[PanelQuery]]:
    """Every panel's query with each variable at its default, and at All.

    The keys are `default` and `All`. A default that Grafana finds only when it loads the dashboard (the
    first value of a query) is not in the file; pass such values to `panel_queries`.
    """
    default: dict[str, str | Sequence[str]] = {}
    for dashboard in dashboards():
        for variable in dashboard["templating"]["list"]:
            default[variable["name"]] = variable["current"]["value"]
    return {"default": panel_queries(default), "All": panel_queries()}


def variable_queries() -> dict[str, str]:
    """The query that lists the values of each variable, by the variable's name."""
    return {
        variable["name"]: variable["query"]["query"]
        for dashboard in dashboards()
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    }


def listed(query: str, values: Mapping[str, str] | None = None) -> tuple[str, str]:
    """The series and the label that a variable's `label_values(series, label)` lists, with its variables filled in."""
    match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert match is not None, query
    return substitute(match[1], {"stream": ".*", **(values or {})}), match[2]


def rule_groups() -> list[dict[str, Any]]:
    """The groups of all rule files."""
    return [group for name in RULES for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"]]


def rules() -> list[dict[str, Any]]:
    """All rules, recording and alerting."""
    return [rule for group in rule_groups() for rule in group["rules"]]


def measured(names: Iterable[str]) -> set[str]:
    """The names, with each recorded series replaced by the metrics that it is computed from."""
    made: dict[str, set[str]] = {}
    for rule in rules():
        if "record" in rule:
            made.setdefault(rule["record"], set()).update(metric_names(rule["expr"]))
    found = set(names)
    while recorded := found & made.keys():
        found = (found - recorded).union(*(made[name] for name in recorded))
    return found


def annotation_expressions() -> list[str]:
    """The queries that mark moments on the graphs."""
    return [
        substitute(annotation["expr"], {**BUILT_IN, **_variables(dashboard, {})})
        for dashboard in dashboards()
        for annotation in dashboard["annotations"]["list"]
        if "expr" in annotation
    ]


def substitute(expression: str, values: Mapping[str, str]) -> str:
    """Fill in `$name`, `${name}` and `${name:format}`; raises KeyError for a variable that is not there."""
    return re.sub(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))", lambda match: values[match[1] or match[2]], expression)


def metric_names(expression: str) -> set[str]:
    """The metric names in a PromQL expression: names that are no function, keyword, label or duration."""
    bare = re.sub(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'", '""', expression)
    bare = re.sub(r"\{[^}]*\}", "{}", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    bare = re.sub(r"\boffset\s+\S+", "", bare)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    return {
        match[0]
        for match in _NAME.finditer(bare)
        if match[0].lower() not in _WORDS and not re.match(r"\s*\(", bare[match.end() :])
    }


def _variables(dashboard: Mapping[str, Any], values: Mapping[str, str | Sequence[str]]) -> dict[str, str]:
    chosen = {}
    for variable in dashboard["templating"]["list"]:
        name = variable["name"]
        wanted = values.get(name, "All")
        picked = [wanted] if isinstance(wanted, str) else list(wanted)
        if "$__all" in picked or picked == ["All"]:
            picked = [variable["allValue"]] if variable.get("includeAll") else [variable["current"]["value"]]
            chosen[name] = picked[0]
        else:
            chosen[name] = "|".join(re.escape(value).replace("\\", "\\\\") for value in picked)
    return chosen
