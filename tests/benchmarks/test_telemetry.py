"""The telemetry benchmark asks fairly: held-out channels stay unseen, and what is known is what was labelled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import telemetry
from benchmarks.telemetry import Known, Windows


def windows(channels: int = 9, each: int = 12) -> Windows:
    """Three subsystems that differ by their frequency, each of a third of the channels, and one command bit."""
    chance = np.random.default_rng(0)
    values, source = [], []
    for number in range(channels):
        for _ in range(each):
            along = np.sin(np.arange(40) * (0.2 + 0.6 * (number % 3)) + chance.uniform(0, 6))
            values.append([along + chance.normal(0, 0.05, 40), chance.integers(0, 2, 40)])
            source.append("ABC"[number % 3] + f"-{number}")
    names = np.array(source)
    letters = np.array([name[0] for name in source])
    return Windows(np.array(values, np.float32), names, np.zeros(len(names), bool), letters, letters, 1)


def test_channels_asked_about_are_never_taught() -> None:
    """A window's neighbours in the same channel would give its subsystem away."""
    data = windows()
    taught, kept = telemetry.held_out(data, np.random.default_rng(1))
    assert not set(taught) & set(kept)
    assert set(taught) | set(kept) == set(data.source)
    assert Counter(name[0] for name in kept) == {"A": 1, "B": 1, "C": 1}


def test_subsystems_are_told_apart_and_dummies_are_not_flattered() -> None:
    """A benchmark in which the head fails an easy question, or a constant passes it, measures something else."""
    scores = telemetry.subsystem(windows(), seed=0, trees=5)
    assert scores["trimtab", "macro_f1"] > 0.9
    assert scores["majority", "macro_f1"] == pytest.approx(1 / 6)


def test_late_labels_are_late_for_everybody() -> None:
    """No-change sees the same delay as the others: right on a level that lasts longer than it, wrong on a shorter."""
    data = windows(each=4)
    truth = np.array(["on" if place // 3 % 2 else "off" for place in range(len(data.values))])
    scores = telemetry.live(data.values, truth, 0, commands=1, delay=2, every=100, trees=2)
    assert scores["no_change", "accuracy"] < 0.1
    scores = telemetry.live(data.values, truth, 0, commands=1, delay=5, every=100, trees=2)
    assert scores["no_change", "accuracy"] > 0.9


def test_known_rows_belong_to_their_payloads() -> None:
    """Rows that were mixed up would only look like a bad encoder."""
    payloads = [np.zeros((1, 2), np.float32) for _ in range(3)]
    known = Known(payloads, np.arange(3, dtype=np.float32)[:, None])
    assert known([payloads[2], payloads[0]]).tolist() == [[2.0], [0.0]]


def test_says_what_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the data a number would be an invention."""
    result = telemetry.main(["--quick", "--only", "subsystem", "--data", str(tmp_path / "absent")])
    assert result.rows == []
    assert "not run" in capsys.readouterr().out
