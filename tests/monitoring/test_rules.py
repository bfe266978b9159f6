"""Rules and dashboards: valid to the tools that load them, and naming only what is exposed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.metrics import Metrics
from tests.conftest import missing
from tests.monitoring.queries import (
    DASHBOARDS,
    PROMETHEUS,
    RULES,
    annotation_expressions,
    dashboards,
    listed,
    measured,
    metric_names,
    panel_queries,
    panels,
    queries_by_choice,
    rules,
    variable_queries,
)

FROM_PROMETHEUS = {"up", "ALERTS"}
TESTS = ("alerts_test.yml", "alerts_days_test.yml")


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run promtool beside the rules."""
    if shutil.which("promtool") is None:
        missing("promtool is not installed: apt-get install prometheus, or put it on the PATH")
    return subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=200, check=False
    )


def exposed() -> set[str]:
    """Every series name that a process can expose, with those of a histogram spelt out."""
    text = Metrics().render()[0].decode()
    names = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE):
        names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def alert_name(expression: str) -> str:
    """Which alert a test's query is about."""
    name = re.search(r'alertname="(\w+)"', expression)
    assert name is not None, expression
    return name[1]


def minutes(duration: str) -> int:
    """Minutes of a duration such as `90m` or `36h`."""
    return int(duration[:-1]) * {"m": 1, "h": 60}[duration[-1]]


ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def test_prometheus_takes_the_configuration() -> None:
    """A Prometheus that does not start watches nothing."""
    done = promtool("check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    """It refuses all rules for a fault in one."""
    done = promtool("check", "rules", *RULES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", TESTS)
def test_each_alert_fires_when_it_should_and_only_then(file: str) -> None:
    """The cases lie beside the rules, so that whoever changes a threshold can run them without Python."""
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    """An alert that always fires passes every test that only waits for it, and the other way round."""
    fires: set[str] = set()
    silent: set[str] = set()
    for file in TESTS:
        found = yaml.safe_load((PROMETHEUS / file).read_text())
        for case in found["tests"]:
            for check in case["promql_expr_test"]:
                # Between two evaluations nothing fires, so a silent case would say nothing.
                assert minutes(check["eval_time"]) % minutes(found["evaluation_interval"]) == 0, check
                (fires if check["exp_samples"] else silent).add(alert_name(check["expr"]))
    names = {rule["alert"] for rule in ALERTS}
    assert fires == names
    assert silent == names


@pytest.mark.parametrize("file", TESTS)
def test_what_an_alert_says_renders(file: str, tmp_path: Path) -> None:
    """A template that fails to expand says `error expanding` to whoever is woken by it.

    promtool shows the rendered text only of alerts that it did not expect, so none is expected here.
    """
    found = yaml.safe_load((PROMETHEUS / file).read_text())
    found["rule_files"] = [str(PROMETHEUS / name) for name in RULES]
    fired = 0
    for case in found["tests"]:
        checks = [check for check in case.pop("promql_expr_test") if check["exp_samples"]]
        case["alert_rule_test"] = [
            {"eval_time": check["eval_time"], "alertname": alert_name(check["expr"]), "exp_alerts": []}
            for check in checks
        ]
        fired += len(checks)
    (tmp_path / file).write_text(yaml.safe_dump(found))
    done = promtool("test", "rules", str(tmp_path / file))
    said = done.stdout + done.stderr
    assert said.count("got:[") >= fired, said
    assert "error expanding" not in said
    assert "<no value>" not in said
    assert "%!" not in said


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_can_be_acted_on(rule: dict[str, Any]) -> None:
    """At night one needs to know how bad it is, what it means, and what to do."""
    assert rule["for"]
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 60
    assert rule["annotations"]["runbook_url"].startswith("docs/runbook/")


def test_rules_name_only_what_is_exposed() -> None:
    """An alert on a metric that nobody exposes stays silent for ever."""
    known = exposed() | FROM_PROMETHEUS | RECORDED
    for rule in rules():
        names = metric_names(rule["expr"])
        assert names or rule["expr"].startswith("vector("), rule
        assert names <= known, f"{rule.get('alert') or rule['record']}: {names - known}"


@pytest.mark.parametrize("choice", ["default", "All"])
def test_panels_name_only_what_is_exposed(choice: str) -> None:
    """A panel without data looks like a calm night."""
    known = exposed() | FROM_PROMETHEUS | RECORDED
    queries = queries_by_choice()[choice]
    assert queries
    for query in queries:
        names = metric_names(query.expression)
        assert names, query
        assert names <= known, f"{query.panel}: {names - known}"
        assert "$" not in query.expression


def test_variables_and_annotations_name_only_what_is_exposed() -> None:
    """A variable without values empties every panel."""
    assert set(variable_queries()) == {"stream", "version", "instance"}
    for query in variable_queries().values():
        assert metric_names(listed(query)[0]) <= exposed()
    for expression in annotation_expressions():
        assert metric_names(expression) <= exposed() | FROM_PROMETHEUS | RECORDED


def test_every_metric_is_on_the_dashboard() -> None:
    """What is worth measuring is worth seeing, as it is or by what is recorded of it."""
    ours = {name for name in exposed() if name.startswith("trimtab_")}
    shown = measured(set().union(*(metric_names(query.expression) for query in panel_queries())))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours} <= families


def test_panel_queries_are_valid_promql(tmp_path: Path) -> None:
    """Grafana shows a parse error only to whoever opens the panel; promtool shows it here."""
    expressions = sorted(
        {query.expression for query in panel_queries()}
        | {query.expression for query in panel_queries({"stream": ["a b", "c+d"], "version": "v2", "instance": "w:1"})}
        | set(annotation_expressions())
    )
    group = {"name": "panels", "rules": [{"record": f"panel:{i}", "expr": each} for i, each in enumerate(expressions)]}
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [group]}))
    done = promtool("check", "rules", str(tmp_path / "panels.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_are_whole() -> None:
    """A file that Grafana half accepts loses panels without a word."""
    paths = sorted(DASHBOARDS.glob("*.json"))
    assert [path.stem for path in paths] == ["drift", "learning", "overview", "streams"]
    assert len({dashboard["uid"] for dashboard in dashboards()}) == len(paths)
    for dashboard in dashboards():
        assert dashboard["schemaVersion"] >= 39
        assert dashboard["uid"]
        variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
        for name in ("stream", "version"):
            assert variables[name]["multi"] is variables[name]["includeAll"] is True
            assert any(f"${name}" in target["expr"] for panel in panels(dashboard) for target in panel["targets"])
        marks = {each["name"] for each in dashboard["annotations"]["list"] if each.get("expr")}
        assert marks == {"Swaps", "Promotions and rollbacks", "Drifts", "Alarms"}
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(ids) == len(set(ids))
        cells: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            covered = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not covered & cells, f"{panel['title']} lies on another panel"
            cells |= covered
        for panel in panels(dashboard):
            assert panel["title"]
            assert panel["description"]
            assert panel["datasource"]["uid"] == "${datasource}"


def test_provisioning_names_the_same_data_source() -> None:
    """The dashboard's default data source must be the one that is provisioned."""
    provisioning = PROMETHEUS.parent / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    for dashboard in dashboards():
        (variable,) = (each for each in dashboard["templating"]["list"] if each["type"] == "datasource")
        assert variable["current"]["value"] == source["uid"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "trimtab.yml").read_text())["providers"]
    assert provider["type"] == "file"
