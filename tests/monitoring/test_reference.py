"""docs/metrics.md is what the declarations say."""

from __future__ import annotations

from monitoring.reference import reference
from tests.monitoring.queries import PROMETHEUS
from tests.monitoring.test_rules import exposed


def test_the_page_of_metrics_is_up_to_date() -> None:
    """Whoever writes a query looks here first. To mend it: python -m monitoring.reference > docs/metrics.md"""
    assert (PROMETHEUS.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8") == reference()


def test_the_page_names_every_metric() -> None:
    """A kind of metric that the page overlooks would be there for nobody."""
    page = reference()
    ours = {name for name in exposed() if name.startswith("trimtab_")}
    assert [name for name in ours if f"`{name.removesuffix('_bucket')}`" not in page and name.endswith("_bucket")] == []
    plain = [name for name in ours if not name.endswith(("_bucket", "_sum", "_count"))]
    assert [name for name in plain if f"| `{name}` |" not in page] == []
