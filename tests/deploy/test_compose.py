"""How it ships: compose file, image and manifests must agree with the settings, with each other and with what is there.

No container engine is needed: files are parsed and compared.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.settings import Settings, load_settings

REPOSITORY = Path(__file__).parents[2]
DOCKER, KUBERNETES = REPOSITORY / "deploy/docker", REPOSITORY / "deploy/k8s"
MADE_BY_THE_OPERATOR = {"./deploy/docker/secrets/http-token", "./deploy/docker/secrets/control-secret"}
OURS = ("topics", "worker", "learner")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The compose file as podman-compose understands it; a dry run asks for no podman."""
    answer = subprocess.run(
        [sys.executable, "-m", "podman_compose", "--dry-run", "-f", "docker-compose.yml", "config"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = yaml.safe_load(answer.stdout)
    return found


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(DOCKER / "trimtab.yaml", {})


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Source by target."""
    return {volume.split(":")[1]: volume.split(":")[0] for volume in service.get("volumes", [])}


def prometheus_targets() -> dict[str, str]:
    jobs = yaml.safe_load((REPOSITORY / "monitoring/prometheus/prometheus.yml").read_text())["scrape_configs"]
    return {job["job_name"]: job["static_configs"][0]["targets"][0] for job in jobs}


def test_everything_mounted_is_there(compose: dict[str, Any]) -> None:
    """An engine makes a folder in place of a file that is missing, and the process says something else entirely."""
    for name, service in compose["services"].items():
        for source in mounts(service).values():
            if source.startswith("."):
                assert (REPOSITORY / source).exists(), f"{name}: {source}"
            else:
                assert source in compose["volumes"], f"{name}: {source}"
        for secret in service.get("secrets", []):
            assert secret in compose["secrets"], f"{name}: {secret}"
    assert {secret["file"] for secret in compose["secrets"].values()} == MADE_BY_THE_OPERATOR
    told = (REPOSITORY / "docs/operations.md").read_text()
    assert all(f"openssl rand -hex 32 > {file.removeprefix('./')}" in told for file in MADE_BY_THE_OPERATOR)
    assert (DOCKER / ".gitignore").read_text().split() == ["secrets/"]


def test_every_part_starts_after_what_it_needs(compose: dict[str, Any]) -> None:
    """A worker that starts before the topics are there would end at once, and the first look would be at an error."""
    services = compose["services"]
    assert set(services) == {"kafka", *OURS, "prometheus", "grafana"}
    assert services["topics"]["depends_on"]["kafka"]["condition"] == "service_healthy"
    for name in ("worker", "learner"):
        assert services[name]["depends_on"]["topics"]["condition"] == "service_completed_successfully"


def test_ports_and_paths_are_those_of_the_settings(compose: dict[str, Any], settings: Settings) -> None:
    """A health check on another port restarts a healthy process for ever; a wrong target shows an empty dashboard."""
    services, targets = compose["services"], prometheus_targets()
    for name, http in (("worker", settings.worker.http), ("learner", settings.learner.http)):
        assert http.host == "0.0.0.0"
        assert targets[f"trimtab-{name}"] == f"{name}:{http.port}"
        assert f"http://127.0.0.1:{http.port}/readyz" in services[name]["healthcheck"]["test"][-1]
        assert str(http.token_file) == "/run/secrets/http-token"
        assert "http-token" in services[name]["secrets"]
        assert mounts(services[name])["/etc/trimtab/trimtab.yaml"] == "./deploy/docker/trimtab.yaml"
        assert mounts(services[name])[settings.registry.url] == "registry"
    assert str(settings.control.secret_file) == "/run/secrets/control-secret"
    assert "control-secret" in services["learner"]["secrets"]
    state = Path(settings.learner.store.removeprefix("sqlite:///")).parent
    assert mounts(services["learner"])[str(state)] == "learner"
    assert settings.learner.jobs.is_relative_to(state)
    assert "ro" in next(v for v in services["worker"]["volumes"] if v.startswith("registry:")).split(":")


def test_kafka_is_where_the_settings_say(compose: dict[str, Any], settings: Settings) -> None:
    """An advertised name that clients do not know is the commonest fault of a Kafka in a container."""
    kafka = compose["services"]["kafka"]
    listeners = dict(part.split("://") for part in kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(","))
    assert listeners["INNER"] == settings.kafka.bootstrap_servers == kafka["healthcheck"]["test"][-1]
    assert f"{listeners['HOST']}:9092" in kafka["ports"]
    tested = re.search(r"<artifactId>kafka_2\.13</artifactId>\s*<version>([\d.]+)<", pom())
    assert tested is not None
    assert kafka["image"] == f"apache/kafka:{tested[1]}", "not the release that the tests run on"


def pom() -> str:
    return (REPOSITORY / "tests/kafka/pom.xml").read_text()


def test_grafana_finds_its_dashboard_and_prometheus(compose: dict[str, Any]) -> None:
    """A dashboard that is mounted elsewhere is an empty Grafana."""
    provisioning = REPOSITORY / "monitoring/grafana/provisioning"
    source = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    folder = yaml.safe_load((provisioning / "dashboards/trimtab.yml").read_text())["providers"][0]["options"]["path"]
    grafana = compose["services"]["grafana"]
    assert mounts(grafana)[folder] == "./monitoring/grafana/dashboards"
    assert mounts(grafana)["/etc/grafana/provisioning"] == "./monitoring/grafana/provisioning"
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (REPOSITORY / "monitoring/grafana/dashboards" / Path(home).relative_to(folder)).is_file()
    assert mounts(compose["services"]["prometheus"])["/etc/prometheus"] == "./monitoring/prometheus"


def test_nothing_of_ours_runs_as_root_or_reaches_the_network(compose: dict[str, Any]) -> None:
    """What reads messages from strangers should be able to do nothing else."""
    assert compose["networks"]["inner"]["internal"] is True
    for name in OURS:
        service = compose["services"][name]
        assert service["user"] == "10001:10001"
        assert service["read_only"] is True
        assert list(service["networks"]) == ["inner"]
        assert "ports" not in service
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)
    assert "HF_HUB_OFFLINE=1" in dockerfile


def test_the_image_gets_what_it_needs_and_no_more() -> None:
    """A room that is not copied is missing at run time; a secret that is copied stays in the image for good."""
    dockerfile = (DOCKER / "Dockerfile").read_text()
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()
    }
    assert {"trimtab", "deploy", "learner", "replay", "stream", "monitoring"} <= copied
    for name in copied:
        assert (REPOSITORY / name).exists(), name
        assert f"!{name}" in ignored, name
    assert ignored[0] == "*"
    assert ignored.index("deploy/docker/secrets") > ignored.index("!deploy")


# Kubernetes


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name, what the kustomization lists."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    found = [one for name in listed["resources"] for one in yaml.safe_load_all((KUBERNETES / name).read_text())]
    written = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml", "trimtab.yaml"}
    assert set(listed["resources"]) == written
    assert listed["configMapGenerator"][0]["files"] == ["trimtab.yaml"]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def test_manifests_agree_with_their_settings(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    """A probe on another port, or state outside a volume, is found out at the first restart."""
    settings = load_settings(KUBERNETES / "trimtab.yaml", {})
    assert settings.topics.replication == 3
    workloads = {"worker": ("Deployment", settings.worker.http), "learner": ("StatefulSet", settings.learner.http)}
    for name, (kind, http) in workloads.items():
        workload = manifests[kind, f"trimtab-{name}"]["spec"]
        pod = workload["template"]
        (container,) = pod["spec"]["containers"]
        assert container["args"] == [name]
        assert container["ports"] == [{"name": "http", "containerPort": http.port}]
        assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
        assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(http.port)
        assert pod["metadata"]["labels"] == workload["selector"]["matchLabels"]
        paths = {mount["mountPath"] for mount in container["volumeMounts"]}
        needed = ["/etc/trimtab", str(http.token_file), settings.registry.url]
        if name == "learner":
            state = settings.learner.store.removeprefix("sqlite:///")
            needed += [str(settings.control.secret_file), state, str(settings.learner.jobs)]
        for path in needed:
            assert any(Path(path).is_relative_to(mount) for mount in paths), f"{name}: {path} is in no volume"
        named = {volume["name"] for volume in pod["spec"]["volumes"]}
        named |= {claim["metadata"]["name"] for claim in workload.get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in container["volumeMounts"]} == named
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert manifests["StatefulSet", "trimtab-learner"]["spec"]["replicas"] == 1
    assert manifests["Service", "trimtab-learner"]["spec"]["ports"][0]["port"] == settings.learner.http.port
    assert manifests["Deployment", "trimtab-worker"]["spec"]["replicas"] <= settings.topics.partitions
    assert manifests["Job", "trimtab-topics"]["spec"]["template"]["spec"]["containers"][0]["args"] == [
        "topics",
        "create",
    ]
