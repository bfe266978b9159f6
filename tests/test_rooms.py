"""The rooms and who may import whom; the picture in docs/architecture.md stays true only if this holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ["trimtab", "deploy", "learner", "replay", "stream", "monitoring"]
"""From left to right: a room imports only rooms to its right."""


def imported(module: Path) -> set[str]:
    """Every top-level name that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide which room is meant"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_to_its_right(room: str) -> None:
    """A ring of rooms cannot be understood, tested or replaced one at a time."""
    allowed = set(ROOMS[ROOMS.index(room) :])
    for module in (REPOSITORY / room).rglob("*.py"):
        wrong = (imported(module) & set(ROOMS)) - allowed
        assert not wrong, f"{module.relative_to(REPOSITORY)} imports {sorted(wrong)}"


def test_a_worker_loads_nothing_that_only_learns() -> None:
    """They take ten seconds and hundreds of megabytes that a worker has no use for; nor for tracing that is off."""
    code = (
        "import sys, deploy.wiring, stream.worker, learner.slot\n"
        "print([name for name in ('avalanche', 'datasets', 'opentelemetry', 'pandas') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_nothing_is_unpickled() -> None:
    """Weights, offsets and messages come from outside; unpickling any of them would run their code."""
    for room in ROOMS:
        for module in (REPOSITORY / room).rglob("*.py"):
            assert not imported(module) & {"pickle", "dill", "joblib", "shelve"}, module
            assert "torch.load(" not in module.read_text(), module
