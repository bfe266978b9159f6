"""The databases that a store can lie in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.postgres import PostgresServer


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Each call gives the URL of a new, empty database; every promise below is kept on both kinds."""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.database
    return lambda: f"sqlite:///{tmp_path_factory.mktemp('store') / 'learner.db'}"


@pytest.fixture
def where(fresh: Callable[[], str]) -> str:
    """The URL of a database that a test opens as it likes, or more than once."""
    return fresh()
