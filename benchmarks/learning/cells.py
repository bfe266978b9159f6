"""One contestant, one seed: the cell that is measured at a time, kept under a key, and never measured twice.

The key is a hash of the code that the contestant runs (its syntax, without comments and docstrings), of the
data, of the protocol and of all settings. A cell is measured in a process of its own, so that its peak memory
is its own and nothing is left of the one before.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks import report
from benchmarks.learning.live import EmbeddingCache, Live, merged
from benchmarks.learning.protocols import (
    Contestant,
    Outcome,
    class_incremental,
    drawn_classes,
    few_shot,
    first_part,
    prequential,
)
from benchmarks.learning.reading import Examples
from learner.finetune import Strategy

ROOT = Path(__file__).resolve().parents[2]
BOOSTED = "boosted trees"
CACHE = ROOT / ".cache" / "learning"

TRIMTAB, INSTANT = "trimtab", "instant_head"
RIVALS = ("joint", "train_once", "river", "no_change", "majority")
STRATEGIES: tuple[str, ...] = get_args(Strategy)
REFIT_EVERY = 500
"""Labels of a prequential stream after which the ceiling is fitted anew (fewer where the stream is short)."""
SHORT = 20
"""A stream is refitted at least so many times."""
REVISIONS = {"text": 500, "telemetry": 1_000}
"""Revisions of a prequential stream: a text's wide head takes 0.3 s to solve."""
UNWATCHED = 500
"""Labels between two looks at the triggers where nobody asks meanwhile; a head alone is revised when it is asked."""

COMMON = ("benchmarks/learning/protocols.py", "benchmarks/learning/scores.py", "learner/encoders.py")
CODE: Mapping[str, tuple[str, ...]] = {
    "trimtab": (
        *COMMON,
        "benchmarks/learning/live.py",
        "learner/*.py",
        "replay/*.py",
        "stream/events.py",
        "stream/join.py",
        "monitoring/drift.py",
        "deploy/settings.py",
        "deploy/wiring.py",
    ),
    "rival": (*COMMON, "benchmarks/learning/rivals.py"),
}
HEAD = ("guard", "recency")
"""Settings of a stream that rows of the instant head alone may vary."""
VERSIONS = ("numpy", "torch", "transformers", "scikit-learn", "river", "avalanche-lib")

Protocol = Literal["class-incremental", "few-shot", "prequential"]


@dataclass(frozen=True)
class Task:
    """What is asked of every contestant of one table.

    Args:
        name: of the table.
        protocol: who is shown what, when; see `protocols`.
        train, test: the data; the test part may be absent where the protocol is prequential.
        experiences: parts that the data is cut into.
        delay: events between an event and its label (prequential).
        shots: labels of each new class (few-shot).
        new_classes: how many classes are new (few-shot).
        in_order: experiences and examples as they stand in the data, and not drawn from the seed.
        seeds: how often all of it is done, with what.
        threads: CPU threads of a fine-tune, beyond the default; None leaves it.
    """

    name: str
    protocol: Protocol
    train: Examples
    test: Examples | None
    experiences: int = 10
    delay: int = 0
    shots: int = 5
    new_classes: int = 10
    in_order: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """The protocol's settings, as they enter a key."""
        return {
            "protocol": self.protocol,
            "experiences": self.experiences,
            "delay": self.delay,
            "shots": self.shots,
            "new_classes": self.new_classes,
            "in_order": self.in_order,
        }

    def run(self, contestant: Contestant, seed: int) -> Outcome:
        """Show it all to one contestant."""
        if self.protocol == "prequential":
            return prequential(self.train, self.test, contestant, experiences=self.experiences, delay=self.delay)
        assert self.test is not None
        if self.protocol == "few-shot":
            return few_shot(
                self.train, self.test, contestant, shots=self.shots, new_classes=self.new_classes, seed=seed
            )
        return class_incremental(
            self.train, self.test, contestant, experiences=self.experiences, seed=seed, in_order=self.in_order
        )


@dataclass(frozen=True)
class Entry:
    """One row of a table: who, and how set.

    Args:
        name: `trimtab`, `instant_head`, a strategy, or one of `RIVALS`.
        mode: what is varied beside the name, such as the size of the store; None where nothing is.
        overrides: settings of trimtab's stream that are not the defaults.
        variant: of a rival that comes in several; the best one is shown.
    """

    name: str
    mode: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)
    variant: str | None = None

    @property
    def is_trimtab(self) -> bool:
        """Whether it is the learner that ships, however set."""
        return self.name not in RIVALS

    @property
    def settings(self) -> dict[str, Any]:
        """The stream's settings that are not the defaults, a strategy's name among them."""
        if self.name in STRATEGIES:
            return merged(self.overrides, {"finetune": {"strategy": self.name}})
        return dict(self.overrides)

    @property
    def finetunes(self) -> bool:
        """Whether fine-tunes run."""
        return self.is_trimtab and self.name != INSTANT


Cell = dict[str, Any]
"""What was measured: JSON."""


def variants(task: Task, entry: Entry) -> list[str | None]:
    """The ways in which a rival comes on this data."""
    from benchmarks.learning import rivals

    if entry.name in ("joint", "train_once"):
        found = list(rivals.classifiers(task.train, lambda payloads: None, 0))
        # It grows a tree for each class at every step: minutes a fit, and no better with few examples of many classes.
        return [name for name in found if name != BOOSTED or len(task.train.classes) <= rivals.FEW_CLASSES]
    if entry.name == "river":
        return list(rivals.river_models(task.train, lambda payloads: None, 0))
    return [None]


def key(task: Task, entry: Entry, seed: int) -> str:
    """Names the measurement: equal keys, equal outcomes (but for seconds and memory)."""
    settings = {
        "code": code_digest(entry),
        "data": data_digest(task),
        "asked": task.asked,
        "name": entry.name if not entry.is_trimtab else "trimtab" if entry.finetunes else INSTANT,
        # To a head alone it makes no difference how a fine-tune, its exam and its replay are set.
        "settings": _spelled_out(entry)
        if entry.finetunes
        else {k: entry.settings[k] for k in HEAD if k in entry.settings},
        "variant": entry.variant,
        "seed": seed,
        **({"revise_after": _revise_after(task, entry)} if entry.is_trimtab else {}),
    }
    return sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def measure(task: Task, entry: Entry, seed: int, cache: Path | None, device: Literal["auto", "cpu", "cuda"]) -> Cell:
    """Run one contestant once, here and now."""
    embeddings = EmbeddingCache(None if cache is None else cache / "embeddings")
    contestant = _contestant(task, entry, seed, embeddings, device)
    began = time.perf_counter()
    try:
        with Memory() as memory:
            outcome = task.run(contestant, seed)
        seconds = time.perf_counter() - began
        details = contestant.details()
    finally:
        contestant.close()
    values = {name: float(value) for name, value in outcome.values.items() if not math.isnan(value)}
    values |= {"seconds": seconds, "peak_memory": memory.peak}
    return {
        "key": key(task, entry, seed),
        "table": task.name,
        "name": entry.name,
        "mode": entry.mode,
        "variant": entry.variant,
        "seed": seed,
        "values": {name: round(value, 4) for name, value in values.items()},
        "curve": [round(float(value), 2) for value in outcome.curve],
        "details": details,
        "code": code_digest(entry)[:12],
        "data": data_digest(task)[:12],
        "settings": entry.settings,
        "asked": task.asked,
        "device": _device(device),
        "machine": report.machine(),
        "versions": report.versions(VERSIONS),
    }


class Memory:
    """What this process and all it starts take beyond what it held before, in MiB: the greatest of many looks.

    The kernel's own peaks are of no use here: a child begins with its parent's.
    """

    seconds = 0.2

    def __enter__(self) -> Memory:
        self.peak = 0.0
        self._before = _resident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self._note()

    def _look(self) -> None:
        while not self._end.wait(self.seconds):
            self._note()

    def _note(self) -> None:
        self.peak = max(self.peak, _resident() - self._before)


def _resident() -> float:
    """MiB that this process and its descendants hold."""
    import psutil

    process = psutil.Process()
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += one.memory_info().rss
    return total / 2**20


def measure_apart(
    task: Task, entry: Entry, seed: int, cache: Path | None, device: Literal["auto", "cpu", "cuda"]
) -> Cell:
    """`measure` in a process of its own.

    Raises:
        RuntimeError: it came to nothing; the message is the reason.
    """
    # A server that has imported what every cell needs, and done nothing, gives each cell a fresh process at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.learning.cells", "benchmarks.learning.rivals"])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_measure_and_send, args=(there, task, entry, seed, cache, device))
    child.start()
    there.close()
    try:
        found: Cell | str = here.recv()
    except EOFError:
        child.join()
        found = f"the process ended with code {child.exitcode}"
    except BaseException:
        child.terminate()
        raise
    child.join()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


class Kept:
    """Cells on disk, by key.

    Args:
        folder: one JSON file each; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, name: str) -> Cell | None:
        """The cell of this key, if it was measured."""
        file = None if self._folder is None else self._folder / f"{name}.json"
        if file is None or not file.is_file():
            return None
        try:
            found: Cell = json.loads(file.read_text())
        except ValueError:
            return None
        return found

    def put(self, cell: Cell) -> None:
        """Keep a cell, whole or not at all."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{cell['key']}.json"
        part = file.with_suffix(".part")
        part.write_text(json.dumps(cell, indent=1) + "\n")
        part.replace(file)


@dataclass
class Runner:
    """Measures what is not measured yet, within a budget.

    Args:
        kept: where cells are looked up and kept.
        cache: where embeddings are kept; None keeps none.
        say: told of each cell.
        device: where trimtab computes.
        minutes: no cell begins after so long; None for no end.
        measure: how a cell is measured.
    """

    kept: Kept
    cache: Path | None
    say: Callable[[str], None] = lambda line: None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    minutes: float | None = None
    measure: Callable[..., Cell] = measure_apart
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.minutes is not None and time.monotonic() - self._began > self.minutes * 60

    def row(self, task: Task, entry: Entry) -> Iterator[Cell]:
        """The cells of one row, one a seed; where it comes in variants, of the one that is best with the first seed."""
        ways = variants(task, entry) if entry.variant is None else [entry.variant]
        first = [cell for way in ways if (cell := self._cell(task, _as(entry, way), task.seeds[0])) is not None]
        if not first or (self.over and len(first) < len(ways)):
            return  # the best is not known
        best = max(first, key=lambda cell: _merit(cell, task))
        others = {str(cell["variant"]): _merit(cell, task) for cell in first if cell is not best}
        yield {**best, "tried": others} if others else best
        for seed in task.seeds[1:]:
            cell = self._cell(task, _as(entry, best["variant"]), seed)
            if cell is not None:
                yield cell

    def _cell(self, task: Task, entry: Entry, seed: int) -> Cell | None:
        name = key(task, entry, seed)
        what = " ".join(filter(None, (task.name, entry.name, entry.mode, entry.variant, f"seed {seed}")))
        found = self.kept.get(name)
        if found is not None:
            self.say(f"{what}: known")
            # Rows of another name may be the same measurement, as a strategy and the default are.
            return {**found, "name": entry.name, "mode": entry.mode}
        if self.over:
            self.say(f"{what}: not run")
            return None
        try:
            cell = self.measure(task, entry, seed, self.cache, self.device)
        except RuntimeError as error:
            self.failures.append(f"{what}: {error}")
            self.say(f"{what}: failed: {error}")
            return None
        cell |= {"key": name, "code": code_digest(entry)[:12]}
        self.kept.put(cell)
        merit = _merit(cell, task)
        self.say(f"{what}: {merit:.3g} in {cell['values']['seconds']:.1f} s {_in_short(cell['details'])}")
        return cell


def code_digest(entry: Entry) -> str:
    """What the contestant runs, as its syntax says: comments, docstrings and layout do not count."""
    digest = sha256()
    for pattern in CODE["trimtab" if entry.is_trimtab else "rival"]:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(_syntax(file))
    return digest.hexdigest()


_SYNTAX: dict[Path, bytes] = {}
"""Read once: what is edited during a run is not what runs."""


def _syntax(file: Path) -> bytes:
    if file not in _SYNTAX:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = [
                    line
                    for line in node.body
                    if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
                ]
        _SYNTAX[file] = sha256(ast.dump(tree).encode()).digest()
    return _SYNTAX[file]


_DATA: dict[int, tuple[Examples, str]] = {}


def data_digest(task: Task) -> str:
    """The content of both parts."""
    digests = []
    for part in (task.train, task.test):
        if part is None:
            continue
        if id(part) not in _DATA:
            _DATA[id(part)] = part, part.digest  # the part is held, so its id stays its own
        digests.append(_DATA[id(part)][1])
    return sha256(" ".join(digests).encode()).hexdigest()


def _spelled_out(entry: Entry) -> dict[str, Any]:
    """All settings of the stream, so that a default that is named is the default."""
    from learner.exam import ExamSettings
    from learner.finetune import FineTuneSettings
    from replay.policy import ReplaySettings

    blocks = {"finetune": FineTuneSettings, "replay": ReplaySettings, "exam": ExamSettings}
    found = dict(entry.settings)
    for name, block in blocks.items():
        found[name] = block(**found.get(name, {})).model_dump(mode="json")
    return found


def _merit(cell: Cell, task: Task) -> float:
    """By what the best of several variants is chosen."""
    wanted = "macro_f1" if task.protocol == "prequential" else "final"
    return float(cell["values"].get(wanted, math.nan))


def _contestant(
    task: Task, entry: Entry, seed: int, cache: EmbeddingCache, device: Literal["auto", "cpu", "cuda"]
) -> Contestant:
    from benchmarks.learning import rivals

    train = task.train
    if entry.is_trimtab:
        overrides = entry.settings
        if task.threads is not None:
            overrides = merged(overrides, {"finetune": {"threads": task.threads}})
        return Live(
            train.kind,
            train.channels,
            train.steps,
            commands=train.commands,
            overrides=overrides,
            seed=seed,
            finetune=entry.finetunes,
            revise_after=_revise_after(task, entry),
            cache=cache,
            device=device,
        )
    embed = BaseEmbeddings(cache, device)
    match entry.name:
        case "majority":
            return rivals.Majority()
        case "no_change":
            return rivals.NoChange()
        case "river":
            return rivals.river_models(train, embed, seed)[str(entry.variant)]()
        case _:
            make, featurise = rivals.classifiers(train, embed, seed)[str(entry.variant)]
            n = len(train)
            every = 1 if task.protocol != "prequential" else max(1, min(REFIT_EVERY, n // SHORT))
            until = _first_part(task, seed) if entry.name == "train_once" else None
            return rivals.Refit(make, featurise, every, until)


def _revise_after(task: Task, entry: Entry) -> int:
    """Labels between two revisions of trimtab's head."""
    if task.protocol == "prequential":
        return max(1, len(task.train) // REVISIONS[task.train.kind])
    return UNWATCHED if entry.finetunes else len(task.train)


class BaseEmbeddings:
    """Embeddings of texts under the base encoder, for rivals; the encoder is built when it is first needed."""

    def __init__(self, cache: EmbeddingCache, device: str) -> None:
        self._cache, self._device = cache, device
        self._encoder: Any = None

    def __call__(self, payloads: Sequence[Any]) -> Any:
        import tempfile

        from deploy.wiring import device_of, text_model
        from learner.encoders import build_text_encoder
        from learner.registry import Registry

        if self._encoder is None:
            self._encoder = build_text_encoder(text_model("minilm"), device=device_of(self._device))
            with tempfile.TemporaryDirectory() as folder:
                # The digest under which a learner knows it, so that both read one cache.
                self._digest = Registry(folder).put_encoder(self._encoder.sealed(), self._encoder.files())
        found = self._cache.embed(self._digest, self._encoder, payloads)
        self._cache.keep(self._digest)
        return found


def _first_part(task: Task, seed: int) -> int:
    """How many labels belong to the first experience: what is trained once is trained on those."""
    train = task.train
    if task.protocol == "prequential":
        return max(1, len(train) // max(1, min(task.experiences, len(train) // 2)))
    if task.protocol == "few-shot":
        new = drawn_classes(train, task.new_classes, seed)
        return sum(label not in new for label in train.labels)
    return first_part(train, task.experiences, seed, task.in_order)


def _as(entry: Entry, variant: str | None) -> Entry:
    return Entry(entry.name, entry.mode, entry.overrides, variant)


def _measure_and_send(pipe: Any, *args: Any) -> None:
    import logging

    logging.disable(logging.WARNING)
    try:
        pipe.send(measure(*args))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send(f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})")
    pipe.close()


def _device(device: str) -> str:
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "cpu"


def _in_short(details: Mapping[str, Any]) -> str:
    shown = [f"{name} {value}" for name, value in details.items() if value and name not in ("failures", "fits")]
    return f"({', '.join(shown)})" if shown else ""
