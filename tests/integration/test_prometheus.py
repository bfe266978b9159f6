"""A real Prometheus reads a real worker and a real learner: what is drawn and alerted on is there."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream.events import utc_now
from tests.conftest import missing
from tests.deployment import Deployment, label
from tests.integration.probe import FREQUENCIES, STREAM, deployed, publish, window
from tests.kafka import KafkaBroker, free_port
from tests.monitoring.queries import (
    PROMETHEUS,
    PanelQuery,
    annotation_expressions,
    listed,
    metric_names,
    panel_queries,
    queries_by_choice,
    rule_groups,
    rules,
    variable_queries,
)
from tests.scrape import Scrape
from tests.waiting import until

STREAMS: dict[str, Any] = {
    "probe": {**STREAM, "forgetting_budget": 0.25},
    "idle": STREAM,
}
BEFORE, AFTER = 270, 15
"""How many events of `probe` there are, each with its label, before and after the promotion."""

LAST = range(200, 205)
"""The numbers of the events after it, for each class."""

ONLY_WHERE_LEARNED = {
    "Accuracy and its estimate",
    "Accuracy by version",
    "Estimate where labels are late",
    "How wrong the estimate is",
    "Worst class forgotten",
    "Accuracy now",
    "Accuracy of what was served",
    "Forgetting, the worst 20 classes",
    "Forgetting over time",
    "Time since the last label",
    "Since the last promotion",
    "Replay store by class",
}
"""Panels that are rightly empty for a stream that has never had a label or a promotion."""


class Prometheus:
    """One server with our rules, which scrapes this deployment every second."""

    def __init__(self, directory: Path, deployment: Deployment) -> None:
        self.port = free_port()
        configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        configuration["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        # Computed every second as well, so that nothing waits for the five minutes of the slowest rules.
        rules = directory / "rules.yml"
        rules.write_text(yaml.safe_dump({"groups": [{**group, "interval": "1s"} for group in rule_groups()]}))
        configuration["rule_files"] = [str(rules)]
        targets = {"trimtab-worker": deployment.worker_port, "trimtab-learner": deployment.learner_port}
        for job in configuration["scrape_configs"]:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{targets.pop(job['job_name'])}"]}]
        assert not targets
        path = directory / "prometheus.yml"
        path.write_text(yaml.safe_dump(configuration))
        self.log = directory / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={path}",
                    f"--storage.tsdb.path={directory / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an API call; None where the server does not answer yet."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return None  # it listens, and still reads its storage
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None
        except OSError:
            return None
        assert found["status"] == "success", found
        return found["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an instant query gives now."""
        found = self.get("query", query=expression)
        return list(found["result"]) if found else []

    def value(self, expression: str) -> float:
        """The one number that a query gives; NaN where it gives no series."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else float("nan")


@pytest.fixture(scope="module")
def deployment(kafka: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A worker and a learner, and nothing to do yet."""
    with deployed(kafka, tmp_path_factory.mktemp("prometheus"), STREAMS) as made:
        made.start_both()
        yield made


@pytest.fixture(scope="module")
def prometheus(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen the processes quiet, then a load, so that every counter was seen to rise."""
    if shutil.which("prometheus") is None:
        missing("prometheus is not installed: apt-get install prometheus, or put it on the PATH")
    server = Prometheus(tmp_path_factory.mktemp("tsdb"), deployment)
    try:
        until(lambda: server.value('count(up{job=~"trimtab-.*"} == 1)') == 2)
        load(deployment)
        until(lambda: server.value('sum(trimtab_version_scored_total{stream="probe",version="v2"})') == 0)
        late = utc_now() + timedelta(seconds=90)
        deployment.label(*(label("probe", f"{name}-{number}", name, late) for name in FREQUENCIES for number in LAST))
        until(lambda: settled(deployment, server), every=0.5)
        yield server
    finally:
        server.process.terminate()
        server.process.wait(120)
        print(server.log.read_text()[-5_000:])


def load(deployment: Deployment) -> None:
    """A little of everything: events, labels, a bad one of each, a fine-tune, a promotion, a class that falls."""
    events = [window("probe", name, number) for name in FREQUENCIES for number in range(30)]
    ids = publish(deployment, events)
    late = utc_now() + timedelta(seconds=90)
    deployment.label(*(label("probe", event, event.partition("-")[0], late) for event in ids))
    until(lambda: deployment.status("probe")["scored"] == len(ids))
    # Again and again, because the estimate of the accuracy learns from some and is judged by those after.
    for start in (100, 120, 140):
        numbers = range(start, start + 20)
        ids = publish(deployment, [window("probe", name, number) for name in FREQUENCIES for number in numbers])
        deployment.label(*(label("probe", event, event.partition("-")[0], late) for event in ids))
        until(lambda scored=90 + 3 * (start - 80): deployment.status("probe")["scored"] == scored)
    deployment.kafka.produce(deployment.topics.name("telemetry"), [(b"torn", b"{", ())])
    deployment.kafka.produce(deployment.topics.name("labels"), [(b"torn", b"{", ())])
    until(lambda: len(deployment.records("dead_letters")) == 2)
    code, _ = deployment.ask("probe", "retrain", reason="for the panels")
    assert code == 202
    until(lambda: deployment.status("probe")["fine_tune"]["running"])
    until(lambda: "v2" in deployment.versions("probe"), seconds=240, every=0.5)
    until(lambda: not deployment.status("probe")["fine_tune"]["running"])
    if deployment.versions("probe")["v2"]["state"] != "promoted":
        code, answer = deployment.ask("probe", "promote", version="v2", force=True)
        assert code == 202, answer
    until(lambda: any(name.startswith("v2.") for name in serving(deployment)))
    publish(deployment, [window("probe", name, number) for name in FREQUENCIES for number in LAST])


def serving(deployment: Deployment) -> set[str]:
    """The revision that the worker answers `probe` with."""
    return set(Scrape(deployment.worker_port).by("trimtab_revision_info", "version", stream="probe"))


def settled(deployment: Deployment, server: Prometheus) -> bool:
    """Whether Prometheus has seen, twice, all that the processes now say."""
    predicted = Scrape(deployment.worker_port).total("trimtab_predictions_total")
    return (
        server.value("sum(trimtab_predictions_total offset 2s)") == predicted
        and server.value('sum(trimtab_scored_total{stream="probe"} offset 2s)') == BEFORE + AFTER
        and server.value('max(trimtab_last_promotion_timestamp_seconds{stream="probe"} offset 2s)') > 0
        and server.value('count(trimtab_forgetting_ratio{stream="probe"} offset 2s)') == 3
    )


def names_exposed(deployment: Deployment) -> set[str]:
    """Every sample name that the two processes expose."""
    return Scrape(deployment.worker_port).names() | Scrape(deployment.learner_port).names()


def test_the_rules_are_loaded_and_run(prometheus: Prometheus) -> None:
    """Prometheus refuses a whole file for a fault in one rule, and says so only in its log."""
    groups = prometheus.get("rules")["groups"]
    assert {g["name"]: len(g["rules"]) for g in groups} == {g["name"]: len(g["rules"]) for g in rule_groups()}
    loaded = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in loaded} == {"ok"}
    assert not [rule["name"] for rule in loaded if rule.get("state") == "firing"]


def test_every_metric_of_the_dashboard_and_the_rules_is_exposed(deployment: Deployment, prometheus: Prometheus) -> None:
    """A name that nobody exposes is an empty panel or an alert that never fires."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    expressions = [query.expression for query in panel_queries()] + annotation_expressions()
    expressions += [rule["expr"] for rule in rules()]
    wanted = set().union(*(metric_names(expression) for expression in expressions)) - recorded - {"up", "ALERTS"}
    # One that is only there once something unusual happened.
    rare = {"trimtab_unknown_fields_total", "trimtab_refused_versions_total"}
    assert wanted - names_exposed(deployment) <= rare

    def unrecorded() -> set[str]:
        return recorded - {series["metric"]["__name__"] for series in prometheus.query('{__name__=~"trimtab:.+"}')}

    until(lambda: not unrecorded())


def series(prometheus: Prometheus, query: PanelQuery) -> list[dict[str, Any]]:
    return prometheus.query(query.expression)


def without_data(prometheus: Prometheus, queries: Iterable[PanelQuery]) -> list[str]:
    """Each query that gives nothing, with the panel and the dashboard where someone would look for it."""
    return [
        f"{query.dashboard} / {query.panel} {query.ref}: {query.expression}"
        for query in queries
        if not series(prometheus, query)
    ]


@pytest.mark.parametrize("choice", ["default", "All"])
def test_every_panel_has_data(prometheus: Prometheus, choice: str) -> None:
    """A panel that says `No data` is read as `all is well`."""
    assert without_data(prometheus, queries_by_choice()[choice]) == []


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_panel_has_data_for_one_stream_and_one_version(prometheus: Prometheus, version: str) -> None:
    """Whoever looks at one stream must not be shown another one's numbers, or none."""
    queries = panel_queries({"stream": "probe", "version": version})
    assert without_data(prometheus, queries) == []
    for query in queries:
        found = [one["metric"] for one in series(prometheus, query)]
        assert {labels.get("stream", "probe") for labels in found} == {"probe"}, query
        if "$version" in query.raw:
            assert {labels.get("version", version) for labels in found} == {version}, query


def test_what_happened_is_marked_on_the_graphs(prometheus: Prometheus) -> None:
    """A curve that bends says little; that it bends where a version was swapped says what to do."""
    now = time.time()
    marked: dict[str, Any] = {}
    for expression in annotation_expressions():
        answer = prometheus.get("query_range", query=expression, start=str(now - 600), end=str(now), step="1")
        for one in answer["result"]:
            marked.setdefault(one["metric"].get("version") or one["metric"].get("outcome"), one["values"])
    assert {"v1", "v2", "promoted"} <= marked.keys()
    assert len(marked["v2"]) <= 61, "a swap is marked where it happened, and not ever after"


def test_a_stream_without_a_label_has_its_zeroes(prometheus: Prometheus) -> None:
    """A stream that is new shows noughts; only what no measurement has said yet is left out."""
    empty = {q.panel for q in panel_queries({"stream": "idle"}) if not series(prometheus, q)}
    assert empty == ONLY_WHERE_LEARNED


def test_the_variables_list_what_there_is(prometheus: Prometheus) -> None:
    """A variable without values empties every panel."""
    for name, query in variable_queries().items():
        chosen, wanted = listed(query)
        values = prometheus.get(f"label/{wanted}/values", **{"match[]": chosen})
        assert values, name
        if name == "stream":
            assert set(values) == {"idle", "probe"}
        if name == "version":
            assert set(values) == {"v1", "v2"}


def test_what_happened_is_what_is_shown(prometheus: Prometheus) -> None:
    """The numbers, and not only their names, must survive the way from the process to the panel."""
    assert prometheus.value('sum(trimtab_predictions_total{stream="probe"})') == BEFORE + AFTER
    assert prometheus.value('sum(trimtab_labels_total{stream="probe",outcome="learned"})') == BEFORE + AFTER
    assert prometheus.value("sum(trimtab_dead_letters_total)") == 2
    assert prometheus.value('sum(trimtab_versions_total{stream="probe",outcome="promoted"})') == 1
    assert prometheus.value('max by (stream) (trimtab_forgetting_budget_ratio{stream="probe"})') == 0.25
    assert prometheus.value('trimtab_label_delay_seconds_count{stream="probe"}') == BEFORE + AFTER
    by_version = 'sum by (version) (trimtab_version_predictions_total{stream="probe"})'
    assert {one["metric"]["version"]: one["value"][1] for one in prometheus.query(by_version)} == {
        "v1": str(BEFORE),
        "v2": str(AFTER),
    }
    assert prometheus.value('sum(trimtab_version_scored_total{stream="probe",version="v1"})') == BEFORE
    assert prometheus.value('min(trimtab:disk_free:ratio{place="database"})') > 0
    assert 85 < prometheus.value('trimtab_label_delay_seconds_sum{stream="probe"}') / (BEFORE + AFTER) < 400
    assert prometheus.value('trimtab_forgetting_ratio{stream="probe",class="slow"}') < 0.25
    assert prometheus.value('sum(trimtab_replay_examples{stream="probe"})') > 60
    (revision,) = prometheus.query('trimtab_revision_info{stream="probe",job="trimtab-worker"}')
    assert revision["metric"]["version"].startswith("v2.")
