"""Labels that come as a file, through a real Kafka and a real learner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deploy.tables import read_rows
from tests.deployment import Deployment
from tests.integration.probe import STREAM, check_head, deployed, publish, window
from tests.kafka import KafkaBroker
from tests.scrape import Scrape
from tests.waiting import until

REPOSITORY = Path(__file__).parents[2]


def command(deployment: Deployment, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments, "--config", str(deployment.settings)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def test_a_label_file_is_learned_once_however_often_it_is_imported(kafka: KafkaBroker, tmp_path: Path) -> None:
    """People import the same sheet again, with one line mended; only that line may teach anything."""
    sheet = tmp_path / "sheet.csv"
    with deployed(kafka, tmp_path, {"probe": STREAM}) as deployment:
        deployment.start_both()
        publish(deployment, [window("probe", name, number) for name in ("slow", "fast") for number in range(4)])

        def counted(outcome: str) -> float:
            return Scrape(deployment.learner_port).total("trimtab_labels_total", stream="probe", outcome=outcome)

        final = {f"{name}-{number}": name for name in ("slow", "fast") for number in range(4)}
        sheet.write_text("id,what\n" + "".join(f"{event},{name}\n" for event, name in final.items()) + "slow-9,\n")
        for repeated in (0, 8):
            answer = command(
                deployment, "labels", "import", str(sheet), "--column", "event_id=id", "--column", "label=what"
            )
            assert answer.returncode == 1
            assert "Of 9 rows" in answer.stdout
            assert "8 were published" in answer.stdout
            assert "line 10: what: is empty" in answer.stderr
            until(lambda: counted("learned") == 8)
            until(lambda due=repeated: counted("repeated") == due)  # type: ignore[misc]
        check_head(deployment, "probe", final)

        exported = tmp_path / "labels.parquet"
        assert command(deployment, "labels", "export", str(exported)).returncode == 0
        assert {row.values["event_id"]: row.values["label"] for row in read_rows(exported)} == final
        assert command(deployment, "labels", "import", str(exported)).returncode == 0
        until(lambda: counted("repeated") == 16)
        assert counted("corrected") == 0
        check_head(deployment, "probe", final)
