"""The training process: `python -m learner.training JOB_DIR`, started by `learner.finetune.run_finetune`.

With `learner.strategies` the only importer of Avalanche and peft. One run trains the encoder with a linear
training head on one experience, in the order::

    read the snapshot and the state ▸ grow the head ▸ train (by the strategy) ▸ merge ▸ write the encoder
    ▸ load it again as a worker will ▸ embed every row with it ▸ write the state ▸ write result.json

Avalanche is built for one process that sees all experiences. Here each experience is a process, so what
its plugins would remember is put back by hand: `TrainingState`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.training.plugins import SupervisedPlugin
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from learner.encoders import Encoder, Payload, load_encoder
from learner.finetune import (
    RESULT_FILE,
    FineTuneFailed,
    FineTuneJob,
    FineTuneSettings,
    FineTuneSummary,
    Progress,
    ResultFile,
    file_digest,
)
from learner.heads import quantise
from learner.strategies import FineTuning, Named, merge_lora, strategy_of
from learner.telemetry import TelemetryModule
from replay.snapshot import BrokenSnapshot, read_snapshot
from stream.errors import TrimtabError

STATE_FORMAT = 1
MIN_HELD_OUT = 20
HEAD_SHARPNESS = 10.0
EMBED_ROWS = 256
HELD_OUT_ROWS = 128
LEARNING_RATES = {"text": 5e-5, "telemetry": 1e-3, "lora": 5e-4}

Report = Callable[[Progress], None]


class Row(NamedTuple):
    """One row of the snapshot; `part` says what a fine-tune may do with it."""

    event_id: str
    label: str
    payload: Payload
    part: Literal["new", "kept", "exam"]


@dataclass
class TrainingState:
    """What the next run needs so that it is the continuation of this one, and not a first run.

    Args:
        classes: the head's classes; new ones are appended, none is ever moved.
        experiences: how many runs came before (Avalanche's `clock.train_exp_counter`).
        iterations: training steps of all runs.
        encoder: the file digests of the encoder that this state belongs to.
        head: `weight` (C, d) and `bias` (C,), and by which `centre` (d,) and `sharpness` new rows are made.
        importances: what each weight mattered to earlier runs, for the strategies that hold weights.
        anchors: where they hold each of these weights.
        start: the weights from which GDumb trains anew in each run; empty before its first.
        moments: the optimizer's `NAME|exp_avg`, `NAME|exp_avg_sq` and `NAME|step`.
    """

    classes: list[str] = field(default_factory=list)
    experiences: int = 0
    iterations: int = 0
    encoder: dict[str, str] = field(default_factory=dict)
    head: Named = field(default_factory=dict)
    importances: Named = field(default_factory=dict)
    anchors: Named = field(default_factory=dict)
    start: Named = field(default_factory=dict)
    moments: Named = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write the state as safetensors and JSON; equal states give equal bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in _TENSOR_GROUPS:
            tensors = {key: value.detach().cpu().contiguous() for key, value in getattr(self, name).items()}
            save_file(tensors, directory / f"{name}.safetensors")
        scalars = {
            "format": STATE_FORMAT,
            "classes": self.classes,
            "experiences": self.experiences,
            "iterations": self.iterations,
            "encoder": self.encoder,
        }
        directory.joinpath("state.json").write_text(json.dumps(scalars, indent=2, sort_keys=True, ensure_ascii=False))

    @classmethod
    def load(cls, directory: Path) -> TrainingState:
        """Read what `save` wrote.

        Raises:
            FineTuneFailed: it is incomplete, or of a format that this version does not know.
        """
        try:
            scalars = json.loads(directory.joinpath("state.json").read_bytes())
            if scalars["format"] != STATE_FORMAT:
                raise FineTuneFailed(
                    f"the training state has format {scalars['format']}, this version reads {STATE_FORMAT}"
                )
            groups = {name: dict(load_file(directory / f"{name}.safetensors")) for name in _TENSOR_GROUPS}
            return cls(
                classes=list(scalars["classes"]),
                experiences=int(scalars["experiences"]),
                iterations=int(scalars["iterations"]),
                encoder=dict(scalars["encoder"]),
                **groups,
            )
        except (OSError, ValueError, KeyError) as error:
            raise FineTuneFailed(f"the training state in {directory} cannot be read: {error!r}") from None

    def grow_to(self, classes: Sequence[str]) -> TrainingState:
        """This state with rows of zeros for the classes that it does not have: no importance, no momentum."""
        new = [name for name in classes if name not in set(self.classes)]
        size, grown = len(self.classes), len(self.classes) + len(new)

        def pad(tensors: Named) -> Named:
            return {
                key: nn.functional.pad(value, (0, 0) * (value.dim() - 1) + (0, grown - size))
                if key.partition("|")[0] in _HEAD_PARAMETERS and value.dim() > 0
                else value
                for key, value in tensors.items()
            }

        return TrainingState(
            classes=[*self.classes, *new],
            experiences=self.experiences,
            iterations=self.iterations,
            encoder=self.encoder,
            head=self.head,
            importances=pad(self.importances),
            anchors=pad(self.anchors),
            start=self.start,
            moments=pad(self.moments),
        )

    def fits(self, module: nn.Module, dimension: int) -> bool:
        """Whether its tensors have the shapes of this encoder's weights and of a head on its embeddings."""
        shapes = {f"encoder.{name}": weight.shape for name, weight in module.named_parameters()}
        classes = len(self.classes)
        head = {"weight": (classes, dimension), "bias": (classes,), "centre": (dimension,), "sharpness": ()}
        shapes |= {f"head.{name}": torch.Size(head[name]) for name in ("weight", "bias")}
        begun = {name: value.shape for name, value in module.state_dict().items()}
        held = (*self.importances.items(), *self.anchors.items())
        return (
            {name: tuple(value.shape) for name, value in self.head.items()} == (head if classes else {})
            and all(value.shape == shapes.get(name) for name, value in held)
            and (not self.start or {name: value.shape for name, value in self.start.items()} == begun)
        )


_TENSOR_GROUPS = ("head", "importances", "anchors", "start", "moments")
_HEAD_PARAMETERS = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Trained:
    """What `train` leaves: the encoder's module is changed in place, the rest is here."""

    state: TrainingState
    summary: FineTuneSummary


class TrainingNet(nn.Module):
    """An encoder's module with a linear head, of which frozen parts stay as they serve (no dropout)."""

    def __init__(
        self, encoder: nn.Module, weight: Tensor, bias: Tensor, frozen: Sequence[nn.Module], bf16: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)
        self._frozen = list(frozen)
        self._bf16 = bf16

    def train(self, mode: bool = True) -> TrainingNet:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, batch: Tensor) -> Tensor:
        """Logits (B, C) in float32 for one collated batch."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self._bf16 and self.training):
            embedding: Tensor = self.encoder(batch)
        logits: Tensor = self.head(embedding.float())
        return logits


class Examples(ClassificationDataset):  # type: ignore[misc]
    """A list as Avalanche's dataset, which would look for transformations on the way to each item of each batch."""

    items: Sequence[tuple[Payload, int, int]] = ()

    def __getitem__(self, index: int) -> tuple[Payload, int, int]:
        return self.items[index]


class Course(SupervisedPlugin):  # type: ignore[misc]
    """Watches over one run: learning rates, time, progress, a loss that is a number, and the best weights.

    It must come first among the plugins, because what holds weights must measure and hold those that serve: the
    best ones, with LoRA's deltas merged.
    """

    def __init__(
        self,
        settings: FineTuneSettings,
        updates: int,
        examples: int,
        held_out: Sequence[tuple[Tensor, Tensor]],
        report: Report,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self.loss: float | None = None
        self.held_out_loss: float | None = None
        self.held_out_accuracy: float | None = None
        self.epochs = 0
        self.updates = 0
        self.ended: Literal["all_epochs", "early_stopping", "max_seconds"] = "all_epochs"
        self._settings = settings
        self._total_updates = updates
        self._total_examples = examples * settings.epochs
        self._held_out = held_out
        self._report = report
        self._clock = clock
        self._started = clock()
        self._reported = -1.0
        self._seen = 0
        self._best: Named = {}
        self._since_best = 0

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        scale = learning_rate_scale(self.updates, self._total_updates, self._settings.warmup_ratio)
        for group in strategy.optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        self.updates += 1

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        loss = float(strategy.loss.detach())
        if not np.isfinite(loss):
            raise FineTuneFailed(f"the loss became {loss} after {self.updates} updates; a lower learning rate may help")
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        # Replayed examples come on top of the experience's, whose number makes the epoch.
        self._seen += min(len(strategy.mb_y), self._settings.batch_size)
        elapsed = self._clock() - self._started
        if elapsed - self._reported >= 0.5 or self._seen >= self._total_examples:
            self._reported = elapsed
            left = elapsed / self._seen * max(0, self._total_examples - self._seen)
            done = min(self._seen, self._total_examples)
            self._report(
                Progress(phase="training", done=done, total=self._total_examples, loss=self.loss, seconds_left=left)
            )
        if elapsed >= self._settings.max_seconds and self.ended == "all_epochs":
            self.ended = "max_seconds"
            strategy.stop_training()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.epochs += 1
        if not self._held_out:
            return
        loss, accuracy = _evaluate(strategy.model, self._held_out)
        if self.held_out_loss is None or loss < self.held_out_loss:
            self.held_out_loss, self.held_out_accuracy, self._since_best = loss, accuracy, 0
            self._best = {n: p.detach().clone() for n, p in strategy.model.named_parameters() if p.requires_grad}
            return
        self._since_best += 1
        if 0 < self._settings.early_stopping_patience <= self._since_best and self.ended == "all_epochs":
            self.ended = "early_stopping"
            strategy.stop_training()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        weights = dict(strategy.model.named_parameters())
        with torch.no_grad():
            for name, value in self._best.items():
                weights[name].copy_(value)
        merge_lora(strategy.model.encoder)
        if self._settings.holds is not None:
            self._report(Progress(phase="importances", loss=self.loss))


def learning_rate_scale(update: int, total: int, warmup_ratio: float) -> float:
    """The share of the peak rate at an update (from 0): a linear rise, then a linear fall towards 0."""
    warmup = round(total * warmup_ratio)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return max(0.0, (total - update) / max(1, total - warmup))


def train(
    encoder: Encoder,
    rows: Sequence[Row],
    state: TrainingState,
    settings: FineTuneSettings,
    device: torch.device,
    report: Report = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train `encoder.module` in place on one experience.

    The experience is the new rows, or all trainable ones where none is new. A tenth of what is trained on is
    held out (none below 20 examples); after each epoch the loss on it decides whether these are the best
    weights so far, which are the ones kept.

    Raises:
        FineTuneFailed: no example, fewer than two classes to tell apart, or a loss that is not finite.
    """
    seed_everything(settings.seed)
    experience = [row for row in rows if row.part == "new"] or [row for row in rows if row.part == "kept"]
    memory = [row for row in rows if row.part == "kept"] if any(row.part == "new" for row in rows) else []
    if not settings.replays:
        memory = []
    if settings.starts_anew:
        # GDumb (Prabhu et al. 2020, section 3): a network without a past, and a memory that is all there is. Which
        # examples stay, and how evenly over the classes, is the replay store's policy.
        experience, memory = experience + memory, []
        state = TrainingState(experiences=state.experiences, iterations=state.iterations, start=state.start)
    state = state.grow_to(_order_of_appearance(experience + memory))
    if len(state.classes) < 2 or not experience:
        raise FineTuneFailed(
            f"there is nothing to tell apart: {len(experience)} examples to train on, "
            f"of {len(state.classes)} class{'es' * (len(state.classes) != 1)}; at least two classes are needed"
        )
    chance = np.random.default_rng(settings.seed)
    experience, held_out_new = hold_out(experience, chance)
    memory, held_out_kept = hold_out(memory, chance)
    held_out = held_out_new + held_out_kept

    if isinstance(encoder.module, TelemetryModule) and state.experiences == 0:
        _set_statistics(encoder.module, experience + memory)
    if settings.starts_anew:
        state.start = state.start or {name: value.clone() for name, value in encoder.module.state_dict().items()}
        encoder.module.load_state_dict(state.start)
    embeddings = encoder.embed([row.payload for row in experience + memory])
    head = _grown_head(embeddings, [row.label for row in experience + memory], state)
    frozen = _freeze(encoder.module, settings)
    bf16 = _computes_bf16(settings, encoder.spec.kind, device)
    if settings.training == "lora":
        _add_lora(encoder.module, settings)
    net = TrainingNet(encoder.module, head["weight"], head["bias"], frozen, bf16).to(device)

    index = {name: number for number, name in enumerate(state.classes)}
    steps = -(-len(experience) // settings.batch_size)
    updates = settings.epochs * -(-steps // settings.gradient_accumulation)
    held_out_batches = _batches(encoder, held_out, index, device)
    course = Course(settings, updates, len(experience), held_out_batches, report, clock)
    new, remembered = _dataset(encoder, experience, index, 0), None
    if memory:
        # ER-ACE's memory holds what is new as well.
        both = memory + experience if settings.strategy == "er_ace" else memory
        remembered = _dataset(encoder, both, index, len(experience))
    old = _old_logits(embeddings, state, device)
    strategy = strategy_of(settings, net, state.importances, state.anchors, len(experience), remembered, old)

    kind = "lora" if settings.training == "lora" else encoder.spec.kind
    learning_rate = settings.learning_rate or LEARNING_RATES[kind]
    optimizer = _optimizer(net, settings, learning_rate)
    loop = FineTuning(
        model=net,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=settings.batch_size,
        train_epochs=settings.epochs,
        device=device,
        plugins=[course, *strategy.plugins],
        evaluator=None,
    )
    # Without loggers its metrics go nowhere, and it would look for some to compute at every event of every batch.
    loop.plugins.remove(loop.evaluator)
    loop.accumulate = settings.gradient_accumulation
    loop.loss_of = strategy.loss
    loop.clock.train_exp_counter = state.experiences
    loop.clock.train_iterations = loop.clock.total_iterations = state.iterations
    # Avalanche clears the optimizer's state unless it believes that it has seen these weights before.
    loop.optimized_param_id = dict(net.named_parameters())
    _restore_moments(optimizer, net, state.moments)
    started = clock()
    loop.train(DatasetExperience(dataset=new), eval_streams=[])
    seconds = clock() - started
    net.eval()

    held = strategy.anchored
    after = TrainingState(
        classes=state.classes,
        experiences=loop.clock.train_exp_counter,
        iterations=loop.clock.train_iterations,
        head=head | {"weight": net.head.weight.detach().clone(), "bias": net.head.bias.detach().clone()},
        importances=held.importances if held else state.importances,
        anchors=held.anchors if held else state.anchors,
        start=state.start,
        moments=_moments(optimizer, net),
    )
    summary = FineTuneSummary(
        run=after.experiences,
        new=len(experience),
        replayed=len(memory),
        held_out=len(held_out),
        exam=sum(row.part == "exam" for row in rows),
        epochs=course.epochs,
        updates=course.updates,
        loss=course.loss,
        penalty=float(np.mean(strategy.added)) if strategy.added else 0.0,
        held_out_loss=course.held_out_loss,
        held_out_accuracy=course.held_out_accuracy,
        ended=course.ended,
        device=str(device),
        mixed_precision=bf16,
        train_seconds=seconds,
        embed_seconds=0.0,
    )
    return Trained(after, summary)


def carry_out(job: FineTuneJob, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
    """Do everything that `job` asks for, and write `result.json` last.

    Raises:
        FineTuneFailed: with the reason, when there can be no candidate.
    """
    report(Progress(phase="reading"))
    device = _device(job)
    rows = read_rows(job.snapshot)
    if not rows:
        raise FineTuneFailed("the snapshot has no examples")
    encoder = load_encoder(job.encoder, job.encoder_files, device)
    state, notes = _starting_state(job, encoder)
    trained = train(encoder, rows, state, job.settings, device, report, clock)

    report(Progress(phase="writing"))
    out = job.out
    _refuse_infinite(encoder.module)
    candidate = encoder.sealed()
    out.joinpath("encoder").mkdir(parents=True, exist_ok=True)
    for name, content in encoder.files().items():
        out.joinpath("encoder", name).write_bytes(content)

    # The rows are embedded by what was written, so that the exam judges exactly what a worker will load.
    served = load_encoder(candidate, {name: out / "encoder" / name for name in candidate.files}, device)
    started = clock()
    embeddings = _embed(served, rows, report, clock)
    save_arrays({"embeddings": embeddings}, out / "embeddings.safetensors")
    out.joinpath("events.json").write_text(json.dumps([row.event_id for row in rows], ensure_ascii=False))
    trained.state.encoder = candidate.files
    trained.state.save(out / "state")
    summary = trained.summary.model_copy(update={"notes": tuple(notes), "embed_seconds": clock() - started})
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    result = ResultFile(
        encoder=candidate,
        classes=tuple(trained.state.classes),
        summary=summary,
        files={str(path.relative_to(out)): file_digest(path) for path in paths},
    )
    for path in paths:
        _flush_to_disk(path)
    unfinished = out / f"{RESULT_FILE}.part"
    unfinished.write_text(result.model_dump_json(indent=2))
    _flush_to_disk(unfinished)
    unfinished.replace(out / RESULT_FILE)


def read_rows(path: Path) -> list[Row]:
    """The snapshot's rows in its own order, by event id.

    Raises:
        FineTuneFailed: the snapshot is not there, not whole, or altered.
    """
    try:
        snapshot = read_snapshot(path)
    except BrokenSnapshot as error:
        raise FineTuneFailed(f"the examples cannot be read: {error}") from None
    columns = (snapshot.dataset[name] for name in ("event_id", "label", "exam", "new"))
    return [
        Row(event_id, label, payload, "exam" if exam else "new" if new else "kept")
        for event_id, label, exam, new, payload in zip(*columns, snapshot.payloads(), strict=True)
    ]


def hold_out(rows: Sequence[Row], chance: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """Split off a tenth of `rows`, never a class's last two examples; nothing where there are few rows."""
    if len(rows) < MIN_HELD_OUT:
        return list(rows), []
    left = Counter(row.label for row in rows)
    taken: set[int] = set()
    for position in chance.permutation(len(rows)):
        if len(taken) == len(rows) // 10:
            break
        label = rows[position].label
        if left[label] > 2:
            left[label] -= 1
            taken.add(int(position))
    return (
        [row for position, row in enumerate(rows) if position not in taken],
        [row for position, row in enumerate(rows) if position in taken],
    )


def seed_everything(seed: int) -> None:
    """Make this process repeat itself: Avalanche's loaders and dropout draw from the global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _starting_state(job: FineTuneJob, encoder: Encoder) -> tuple[TrainingState, list[str]]:
    if job.state is None:
        return TrainingState(), []
    state = TrainingState.load(job.state)
    if state.encoder != job.encoder.files:
        return TrainingState(), ["the training state belongs to another encoder and was left aside"]
    if not state.fits(encoder.module, encoder.spec.dimension):
        return TrainingState(), ["the training state is of another size than the encoder and was left aside"]
    return state, []


def _order_of_appearance(rows: Sequence[Row]) -> list[str]:
    """The classes in an order that does not depend on the order of the rows."""
    return sorted({row.label for row in rows})


def _dataset(encoder: Encoder, rows: Sequence[Row], index: dict[str, int], first: int) -> ClassificationDataset:
    """The rows as Avalanche takes them, numbered from `first`."""
    targets = [index[row.label] for row in rows]

    def collate(items: Sequence[tuple[Payload, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        payloads, labels, numbers = zip(*items, strict=True)
        return encoder.collate(payloads), torch.tensor(labels), torch.tensor(numbers)

    items = [(row.payload, target, first + n) for n, (row, target) in enumerate(zip(rows, targets, strict=True))]
    dataset = Examples([items], data_attributes=[DataAttribute(targets, "targets")], collate_fn=collate)
    dataset.items = items
    return dataset


def _batches(
    encoder: Encoder, rows: Sequence[Row], index: dict[str, int], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """The rows collated once, like lengths together."""
    return [
        (
            encoder.collate([row.payload for row in part]).to(device),
            torch.tensor([index[row.label] for row in part], device=device),
        )
        for part in _parts(sorted(rows, key=_length), HELD_OUT_ROWS)
    ]


def _length(row: Row) -> int:
    return len(row.payload) if isinstance(row.payload, str) else row.payload.shape[1]


def _parts(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.no_grad()
def _evaluate(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean loss and accuracy; the net is left in training mode."""
    net.eval()
    loss = right = count = 0.0
    for inputs, targets in batches:
        logits = net(inputs)
        loss += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        right += float((logits.argmax(1) == targets).sum())
        count += len(targets)
    net.train()
    return loss / count, right / count


def _grown_head(embedded: NDArray[np.float32], names: Sequence[str], state: TrainingState) -> Named:
    """The training head: the state's rows, then for each new class the classifier by its mean embedding.

    A class's row is s (mu_k - c) with bias -s (|mu_k|^2 - |c|^2) / 2, the linear form of the nearest class mean,
    where s makes the logits of classes that lie one within-class spread apart differ by a few units. Centre c and
    sharpness s are those of the line's first run, for rows can only be compared that were measured alike: with its
    own centre, a run over one class would give it a row of zeros.
    """
    embeddings, labels = embedded.astype(np.float64), np.array(names)
    means = {str(name): embeddings[labels == name].mean(axis=0) for name in np.unique(labels)}
    known = len(state.head["bias"]) if state.head else 0
    if known:
        centre, sharpness = state.head["centre"].cpu().numpy(), float(state.head["sharpness"])
    else:
        centre = embeddings.mean(axis=0)
        within = float(
            np.mean([((e - means[str(name)]) ** 2).sum() for e, name in zip(embeddings, labels, strict=True)])
        )
        total = float(((embeddings - centre) ** 2).sum(axis=1).mean())
        # Beyond a spread of less than that (a class of one example has none) logits would lie so far apart that no
        # gradient is left to learn by; 150 classes of short questions have 0.55.
        sharpness = HEAD_SHARPNESS / max(within, 0.4 * total, 1e-12)
    weight = np.zeros((len(state.classes), embeddings.shape[1]))
    bias = np.zeros(len(state.classes))
    for number, name in enumerate(state.classes):
        if number >= known:
            weight[number] = sharpness * (means[name] - centre)
            bias[number] = -sharpness * ((means[name] ** 2).sum() - (centre**2).sum()) / 2
    grown = {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()}
    for key in ("weight", "bias") if known else ():
        grown[key][:known] = state.head[key]
    return grown | {"centre": torch.from_numpy(centre), "sharpness": torch.tensor(sharpness, dtype=torch.float64)}


def _old_logits(embeddings: NDArray[np.float32], state: TrainingState, device: torch.device) -> Tensor | None:
    """What the network says of each row before it is trained (n, K), for the classes that it was trained on."""
    if not state.head:
        return None
    weight, bias = state.head["weight"].to(device), state.head["bias"].to(device)
    return torch.from_numpy(embeddings).to(device) @ weight.T + bias


def _set_statistics(module: TelemetryModule, rows: Sequence[Row]) -> None:
    """Tell a telemetry network each channel's usual level and spread (median and quartiles), once in its line.

    Later runs keep them, because a head and EWC's anchors are only good for the scale they were learned on.
    """
    values = np.concatenate([row.payload for row in rows if not isinstance(row.payload, str)], axis=1)
    centre, scale = np.zeros(len(values)), np.ones(len(values))
    for channel, seen in enumerate(values):
        known = seen[~np.isnan(seen)].astype(np.float64)
        if len(known):
            low, centre[channel], high = np.quantile(known, (0.25, 0.5, 0.75))
            # Half of a channel that mostly rests is one value; then its deviation is the better scale.
            scale[channel] = (high - low) / 1.349 or known.std() or 1.0
    device = module.centre.device
    float32 = np.finfo(np.float32)
    scale = np.clip(scale, float32.tiny, float32.max)
    module.set_statistics(torch.from_numpy(centre).float().to(device), torch.from_numpy(scale).float().to(device))


def _freeze(module: nn.Module, settings: FineTuneSettings) -> list[nn.Module]:
    """Freeze what `settings` asks for; the modules that are frozen whole.

    The layers are the module's longest list of blocks; everything that comes before the first of them feeds
    them and is frozen too. A module without such a list has no lower layers, and is trained whole.
    """
    if settings.training != "frozen_layers" or settings.frozen_layers == 0:
        return []
    lists = [(name, found) for name, found in module.named_modules() if isinstance(found, nn.ModuleList)]
    if not lists:
        return []
    prefix, layers = max(lists, key=lambda pair: len(pair[1]))
    if settings.frozen_layers > len(layers):
        raise FineTuneFailed(f"frozen_layers is {settings.frozen_layers}, but the encoder has {len(layers)} layers")
    frozen_names = tuple(f"{prefix}.{number}." for number in range(settings.frozen_layers))
    lower = True
    for name, weight in module.named_parameters():
        inside = name.startswith(f"{prefix}.")
        lower = lower and not inside
        if lower or name.startswith(frozen_names):
            weight.requires_grad_(False)
    return [
        found
        for _, found in module.named_modules()
        if (weights := list(found.parameters())) and not any(weight.requires_grad for weight in weights)
    ]


def _add_lora(module: nn.Module, settings: FineTuneSettings) -> None:
    """Put low-rank deltas on attention's query and value (Hu et al. 2021, section 4.2), or on every linear layer
    where there is no attention; only the deltas are trained."""
    layers = {name for name, found in module.named_modules() if isinstance(found, nn.Linear)}
    attention = {name for name in layers if name.rpartition(".")[2] in ("query", "value", "q_proj", "v_proj")}
    targets = sorted(attention or layers)
    if not targets:
        raise FineTuneFailed("training 'lora' found no linear layer in the encoder")
    inject_adapter_in_model(
        LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=targets), module
    )


def _optimizer(net: TrainingNet, settings: FineTuneSettings, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over all weights, frozen ones too: Avalanche would add those itself, and AdamW leaves them alone."""
    head = {"params": list(net.head.parameters()), "peak": settings.head_learning_rate, "weight_decay": 0.0}
    encoder = {"params": list(net.encoder.parameters()), "peak": learning_rate}
    # Fused, one pass over the weights instead of a dozen.
    return torch.optim.AdamW([encoder, head], lr=learning_rate, weight_decay=settings.weight_decay, fused=True)


def _moments(optimizer: torch.optim.Optimizer, net: nn.Module) -> Named:
    """The optimizer's memory by the weight's name, of weights that outlive the run."""
    return {
        f"{name}|{key}": value.detach().clone()
        for name, weight in net.named_parameters()
        for key, value in sorted(optimizer.state.get(weight, {}).items())
        if isinstance(value, Tensor)
    }


def _restore_moments(optimizer: torch.optim.Optimizer, net: nn.Module, moments: Named) -> None:
    for name, weight in net.named_parameters():
        found = {
            key: moments[f"{name}|{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}|{key}" in moments
        }
        if len(found) == 3 and weight.requires_grad and found["exp_avg"].shape == weight.shape:
            optimizer.state[weight] = {key: value.to(weight.device, copy=True) for key, value in found.items()}


def _embed(encoder: Encoder, rows: Sequence[Row], report: Report, clock: Callable[[], float]) -> NDArray[np.int16]:
    parts: list[NDArray[np.int16]] = []
    started, done = clock(), 0
    for part in _parts(rows, EMBED_ROWS):
        embeddings = encoder.embed([row.payload for row in part])
        if not np.isfinite(embeddings).all():
            raise FineTuneFailed("the candidate gives embeddings that are not finite")
        parts.append(quantise(embeddings, encoder.spec.bound))
        done += len(part)
        left = (clock() - started) / done * (len(rows) - done)
        report(Progress(phase="embedding", done=done, total=len(rows), seconds_left=left))
    return np.concatenate(parts)


def _refuse_infinite(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FineTuneFailed(f"the candidate's weights are not finite ({name})")


def _device(job: FineTuneJob) -> torch.device:
    if job.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if job.device == "cuda" and not torch.cuda.is_available():
        raise FineTuneFailed("the settings ask for device 'cuda', and this machine has none")
    return torch.device(job.device)


def _computes_bf16(settings: FineTuneSettings, kind: str, device: torch.device) -> bool:
    if settings.mixed_precision != "auto":
        return settings.mixed_precision == "on"
    if kind == "telemetry":
        # A network this small gains nothing, and its statistics lose digits.
        return False
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _end_with_parent() -> None:
    """End this process, and what it started, as soon as stdin closes: only the parent holds its other end."""
    while os.read(0, 4096):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the training process; progress and refusals are JSON lines on the original stdout."""
    parser = argparse.ArgumentParser(prog="learner.training", description="Carry out one fine-tune.")
    parser.add_argument("directory", type=Path, help="the job's directory, with job.json in it")
    directory: Path = parser.parse_args(arguments).directory
    # Libraries print; their words belong in the log, not among the progress lines.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def report(progress: Progress) -> None:
        lines.write(progress.model_dump_json() + "\n")

    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    job = FineTuneJob.model_validate_json(directory.joinpath("job.json").read_bytes())
    torch.set_num_threads(job.settings.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    try:
        carry_out(job, report)
    except TrimtabError as error:
        lines.write(json.dumps({"refused": error.reason if isinstance(error, FineTuneFailed) else str(error)}) + "\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
