"""A worker or a learner that kills itself with SIGKILL at one exact point, the nth time that it comes there.

Run as ``python -m tests.chaos.doomed POINT NTH COMMAND ...``, where the command is one of `trimtab`'s. A kill at a
random moment seldom meets the few microseconds in which it would hurt.

| point | where |
|---|---|
| `written` | the broker has the answers, their offsets are not committed: in mid-transaction under exactly once |
| `torn` | half of a file of the registry is written |
| `joined` | all effects of a transaction are made, it is not committed |
| `kept` | it is committed, and nothing that follows from it was done |
| `sent` | the broker has the outbox's messages, which still lie in the outbox |
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Doom:
    """Counts how often a point was reached."""

    def __init__(self, point: str, nth: int) -> None:
        self.point, self.left = point, nth

    def at(self, point: str, first: Callable[[], object] = lambda: None) -> None:
        """Do `first` and die, where it is time."""
        if point == self.point:
            self.left -= 1
            if self.left <= 0:
                first()
                os.kill(os.getpid(), signal.SIGKILL)


def worker(doom: Doom) -> None:
    from stream.batches import KafkaWriter, Outgoing

    produce = KafkaWriter._produce

    def _produce(self: KafkaWriter, messages: Sequence[Outgoing]) -> None:
        produce(self, messages)
        doom.at("written", self._producer.flush)

    KafkaWriter._produce = _produce  # type: ignore[method-assign]


def learner(doom: Doom) -> None:
    from learner import registry
    from replay.store import LearnerStore, Transaction

    write, transaction, delete = registry._write_local, LearnerStore.transaction, LearnerStore.delete_outbox

    def _write_local(target: Path, data: bytes, exclusive: bool) -> None:
        def tear() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(f"{registry._PART}torn").write_bytes(data[: len(data) // 2])

        doom.at("torn", tear)
        write(target, data, exclusive)

    @contextmanager
    def _transaction(self: LearnerStore, *arguments: Any, **options: Any) -> Iterator[Transaction]:
        with transaction(self, *arguments, **options) as tx:
            yield tx
            doom.at("joined")
        doom.at("kept")

    def _delete(self: LearnerStore, ids: Iterable[int]) -> None:
        doom.at("sent")
        delete(self, ids)

    registry._write_local = _write_local
    LearnerStore.transaction = _transaction  # type: ignore[method-assign]
    LearnerStore.delete_outbox = _delete  # type: ignore[method-assign]


if __name__ == "__main__":
    point, nth, *command = sys.argv[1:]
    {"worker": worker, "learner": learner}[command[0]](Doom(point, int(nth)))
    sys.argv = ["trimtab", *command]
    from deploy.cli import main

    main()
