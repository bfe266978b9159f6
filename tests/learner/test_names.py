"""Names that are nearly the same, and names that only look it."""

from __future__ import annotations

import pytest

from learner.names import Alike, alike, why_alike


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ("Power", "power", "case or space"),
        ("pump fault", "pump-fault", "case or space"),
        ("pump fault", "Pumpfault", "case or space"),
        ("ﬁlter", "filter", "case or space"),
        ("thermal", "termal", "one edit"),
        ("thermal", "thermel", "one edit"),
        ("thermal", "thremal", "one edit"),
        ("thermal", "theraml", "one edit"),
        ("thermal", "thermals", "one edit"),
        ("G1", "G2", None),
        ("storm 1", "storm 2", None),
        ("storm 1", "storm 11", None),
        ("camera a", "camera b", None),
        ("camera a", "Camera-A", "case or space"),
        ("a class", "A Clas", "one edit"),
        ("x-ray", "xray", "case or space"),
        ("on", "off", None),
        ("cat", "car", None),
        ("thermal", "thremla", None),
        ("power", "pointing", None),
        ("?", "!", None),
    ],
)
def test_two_names(one: str, other: str, why: str | None) -> None:
    """Every way of mistyping is found, and numbered and short names are left alone, either way round."""
    assert why_alike(one, other) == why
    assert why_alike(other, one) == why
    assert alike([one, other]) == ([] if why is None else [Alike(min(one, other), max(one, other), why)])


def test_ten_thousand_numbered_names_are_nobody_s_twin() -> None:
    """Invented names share most of their letters; looking for twins must not compare each with each."""
    assert alike(f"invented {at}" for at in range(10_000)) == []
