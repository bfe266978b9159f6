"""A short run of what `python -m benchmarks.chaos` does at length: real parts broken, nothing lost, nothing twice."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.driver import Plan
from tests.chaos.faults import Chaos
from tests.chaos.field import Field
from tests.chaos.judge import Verdict, judge
from tests.conftest import missing
from tests.kafka import KafkaUnavailable

FAULTS = [
    "worker_killed",
    "disk_full",
    "network_cut",
    "worker_written",
    "learner_torn",
    "broker_killed",
    "worker_stopped",
    "registry_cut",
]
SEED = 20_260_101


@pytest.mark.timeout(900)
def test_a_deployment_that_is_broken_again_and_again_loses_nothing(tmp_path: Path) -> None:
    """The promises of docs/guarantees.md, with processes, broker, network, disk and registry failing under them."""
    verdict = broken(Field(tmp_path, "exactly_once", seed=SEED), FAULTS)
    assert verdict.events > 100
    assert verdict.labels > 100


@pytest.mark.timeout(900)
def test_three_nodes_that_lose_a_leader_lose_nothing(tmp_path: Path) -> None:
    """What one node acknowledged must be with another when the first is gone, transactions that were open included."""
    verdict = broken(Field(tmp_path, "exactly_once", seed=SEED, nodes=3), ["leader_killed"] * 2)
    assert verdict.events > 50


def broken(field: Field, faults: list[str]) -> Verdict:
    """Break it, let it recover, and check that nothing is lost and nothing is twice."""
    try:
        with field:
            chaos = Chaos(field, SEED)
            chaos.break_things(faults)
            field.drain()
            field.settle()
            codes = field.stop_processes()
            verdict = judge(field)
    except KafkaUnavailable as lack:
        missing(str(lack))
    finally:
        for log in sorted(field.directory.glob("*.log")):
            sys.stdout.write(f"--- {log.name}\n{log.read_text(errors='replace')[-8_000:]}\n")
    assert chaos.made == Counter(faults)
    assert verdict.notes == []
    assert (verdict.lost, verdict.duplicated, verdict.labels_lost, verdict.head_differs) == (0, 0, 0, 0)
    assert (verdict.audit_code, verdict.audit["breaches"]) == (0, [])
    assert set(codes.values()) == {0}
    return verdict


def test_the_driver_tells_every_kind_of_story() -> None:
    """Labels that are only early, only once and only right would leave half of the promises untried."""
    plan, stories = Plan(seed=1, late_seconds=60), Counter[str]()
    for now in range(600):
        event, true = plan.event()
        told = sorted(plan.labels(event, true, now), key=lambda due: (due.label.labelled_at, due.at))
        names = [due.label.label for due in told]
        stories["unlabelled"] += not told
        stories["early"] += any(due.at < now for due in told)
        stories["late"] += any(due.at > now + 10 for due in told)
        stories["twice"] += len(names) != len(set(names))
        stories["corrected"] += names[:1] not in ([], [true])
        stories["withdrawn"] += names[-1:] == [None]
        stories["right"] += names == [true]
        stories["bad"] += plan.bad() is not None
    assert set(stories) == set(+stories), stories
