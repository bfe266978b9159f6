"""The contestants of `benchmarks.scale`, one a process: ``python -m benchmarks.scaling NAME CONFIG_JSON``.

`sleeper` is the worker with a model that waits and computes nothing; `null` one whose model answers at once; `slot` the
one that ships, with the revisions on `versions` and the weights in `registry`.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contestants import NullModel, run_worker
from stream.events import Event
from stream.model import Answer, Model


class Sleeper(NullModel):
    """Waits for every event as a model on another machine would, and needs no processor.

    Args:
        milliseconds: for an event.
    """

    def __init__(self, milliseconds: float) -> None:
        self._seconds, self._pause = milliseconds / 1000, threading.Event()

    def predict(self, stream: str, events: Sequence[Event]) -> list[Answer]:
        self._pause.wait(self._seconds * len(events))
        return super().predict(stream, events)


def slot(config: Mapping[str, Any]) -> Model:
    """The model of a worker that ships."""
    from learner.registry import Registry
    from learner.slot import Slot
    from monitoring.metrics import Metrics

    channels = {rule[0]: tuple(rule[2]) if len(rule) > 2 else () for rule in config["rules"]}
    return Slot(Registry(config["registry"]), channels, Metrics())


def main(name: str, config: Mapping[str, Any]) -> int:
    """Run one contestant until it is told to end."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    if name == "null":
        return run_worker(config)
    if name == "sleeper":
        return run_worker(config, lambda: Sleeper(config["milliseconds"]))
    import torch

    torch.set_num_threads(1)
    return run_worker(config, lambda: slot(config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
