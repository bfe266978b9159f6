"""Writes docs/metrics.md from the declarations: `python -m monitoring.reference > docs/metrics.md`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from monitoring.metrics import Metrics

_RULES = Path(__file__).parent / "prometheus"

_HEAD = """# Metrics

Written by `python -m monitoring.reference` from the declarations in `monitoring/metrics.py` and the rules in
`monitoring/prometheus/`; change them there. Every process also exposes the standard `process_` and `python_` metrics.
A histogram has `_bucket`, `_sum` and `_count`. What a label can say is bounded: classes are the worst 20 and `other`,
versions the ten used last, all else comes from the settings or the code.
"""


def reference() -> str:
    """The page: every metric, every recorded series, every alert."""
    lines = [_HEAD, "## Metrics of the processes\n", "| metric | kind | labels | |", "|---|---|---|---|"]
    declared = vars(Metrics(CollectorRegistry())).values()
    for metric in sorted((one for one in declared if isinstance(one, MetricWrapperBase)), key=_name):
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        lines.append(f"| `{_name(metric)}` | {metric._type} | {labels} | {metric._documentation} |")
    lines += ["", "## Recorded series\n", "| series | interval | from |", "|---|---|---|"]
    for group in _groups("recording.yml"):
        for rule in group["rules"]:
            labels = ", ".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
            series = rule["record"] + (f"{{{labels}}}" if labels else "")
            lines.append(f"| `{series}` | {group['interval']} | `{' '.join(rule['expr'].split())}` |")
    lines += ["", "## Alerts\n", "| alert | severity | after | page |", "|---|---|---|---|"]
    for group in _groups("alerts.yml"):
        for rule in group["rules"]:
            page = rule["annotations"]["runbook_url"].removeprefix("docs/")
            lines.append(
                f"| `{rule['alert']}` | {rule['labels']['severity']} | {rule['for']} | [{Path(page).stem}]({page}) |"
            )
    return "\n".join([*lines, ""])


def _name(metric: MetricWrapperBase) -> str:
    return str(metric._name) + ("_total" if metric._type == "counter" else "")


def _groups(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((_RULES / name).read_text())["groups"])


if __name__ == "__main__":
    sys.stdout.write(reference())
