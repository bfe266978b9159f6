"""Fine-tuning as the rest of the system sees it: settings, a job, and the process that carries it out.

Training happens in a process of its own (`python -m learner.training JOB_DIR`), so that a crash, a leak or
an exhausted machine there cannot touch what is served, and so that this process never loads Avalanche.
A job's directory::

    JOB_DIR/
      job.json          what to do (`FineTuneJob`)
      log.txt           what the child wrote to stderr
      out/
        encoder/        the candidate encoder's files
        embeddings.safetensors, events.json     every snapshot row under the candidate
        state/          what the next run continues from (`learner.training.TrainingState`)
        result.json     written last, with the checksum of each file above: without it nothing is done
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from learner.spec import EncoderSpec
from stream.errors import TrimtabError

RESULT_FILE = "result.json"
LOG_LINES = 20

Strategy = Literal[
    "naive", "replay", "ewc", "si", "mas", "lwf", "ewc_replay", "si_replay", "mas_replay", "lwf_replay",
    "der", "er_ace", "gdumb", "agem",
]  # fmt: skip
Training = Literal["full", "frozen_layers", "lora"]
Phase = Literal["starting", "reading", "training", "importances", "embedding", "writing", "done"]


class FineTuneFailed(TrimtabError):
    """A fine-tune gave no candidate; whatever was served before is untouched.

    Args:
        reason: a sentence for a person.
        log: the last lines that the training process wrote to stderr, or nothing.
    """

    def __init__(self, reason: str, log: str = "") -> None:
        self.reason = reason
        self.log = log
        super().__init__(f"{reason}\n{log}" if log else reason)


class FineTuneStopped(FineTuneFailed):
    """The fine-tune was stopped because its owner asked for it."""


class FineTuneSettings(BaseModel):
    """How an encoder is trained on an experience.

    What each strategy does with what is new, and with the store's other examples (the memory):

    - `naive`: trains on what is new; `replay`: on as many of the memory in each batch besides.
    - `ewc`, `si`, `mas`: naive, with the weights that mattered in earlier runs held in place, and `lwf`: naive,
      with the old network's answers as second targets. Each with `_replay`: over the memory too.
    - `der`: DER++, replay that is held to the old network's answers on the memory.
    - `er_ace`: replay in which what is new does not push the old classes away.
    - `agem`: naive, with each update turned so that the memory's loss does not rise.
    - `gdumb`: goes back to the weights that its first run found, and trains them on everything at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy = "replay"
    training: Training = "frozen_layers"
    frozen_layers: int = Field(default=2, ge=0, description="lower layers, with the embeddings, that stay as they are")
    lora_rank: int = Field(default=8, ge=1, le=256)
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="peak rate of the encoder's weights; unset: 5e-5 for text, 1e-3 for telemetry, 5e-4 for lora",
    )
    head_learning_rate: float = Field(default=1e-3, gt=0, le=1, description="peak rate of the training head")
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    warmup_ratio: float = Field(default=0.1, ge=0, le=1, description="share of the steps with a rising rate")
    epochs: int = Field(default=4, ge=1, le=1000)
    batch_size: int = Field(default=16, ge=1, le=4096, description="new examples a step; replay adds as many")
    gradient_accumulation: int = Field(default=1, ge=1, le=1024, description="batches summed into one update")
    early_stopping_patience: int = Field(
        default=2, ge=0, description="epochs without a better held-out loss before the end; 0 trains all epochs"
    )
    mixed_precision: Literal["auto", "on", "off"] = Field(
        default="auto", description="bfloat16 in the encoder's forward pass; auto: where the machine computes in it"
    )
    penalty_weight: float = Field(
        default=1.0, ge=0, description="weight of the penalty of ewc, si and mas; importances have a mean of 1"
    )
    importance_decay: float = Field(
        default=0.9, ge=0, le=1, description="what a weight's importance keeps at each later run (ewc, si, mas)"
    )
    distillation_weight: float = Field(default=1.0, ge=0, description="weight of the old network's answers in lwf")
    distillation_temperature: float = Field(default=2.0, gt=0, le=100, description="softens both answers in lwf")
    der_alpha: float = Field(default=0.1, ge=0, description="weight of the old network's logits in der")
    der_beta: float = Field(default=0.5, ge=0, description="weight of the memory's labels in der")
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: int = Field(default=1, ge=1, le=256, description="CPU threads of the training process")
    nice: int = Field(default=10, ge=0, le=19, description="how far the training process steps back for others")
    max_seconds: float = Field(default=900.0, gt=0, description="training ends, with what it has, after this long")
    kill_after_seconds: float = Field(default=3600.0, gt=0, description="the whole process is given up after this long")

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        if self.training == "lora" and self.holds == "si":
            raise ValueError(
                f"strategy {self.strategy!r} cannot go with training 'lora': it follows the way of each weight, and "
                "under 'lora' the weights that serve are moved only once, when the run ends; 'ewc' and 'mas' can"
            )
        return self

    @property
    def replays(self) -> bool:
        """Whether the examples that are not new are trained on too."""
        return self.strategy.endswith("replay") or self.strategy in ("der", "er_ace", "gdumb", "agem")

    @property
    def holds(self) -> Literal["ewc", "si", "mas"] | None:
        """By whose measure of importance weights are held in place, if they are."""
        name = self.strategy.removesuffix("_replay")
        return name if name in ("ewc", "si", "mas") else None  # type: ignore[return-value]

    @property
    def starts_anew(self) -> bool:
        """Whether a run forgets what earlier ones trained."""
        return self.strategy == "gdumb"


class Retrain(BaseModel):
    """What a fine-tune by hand may name; what it leaves out is as the stream's settings have it.

    Args:
        strategy: in place of `finetune.strategy`.
        observed_from: train only on events that were observed from then on.
        observed_to: and before then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Strategy | None = None
    observed_from: AwareDatetime | None = None
    observed_to: AwareDatetime | None = None

    @property
    def ranged(self) -> bool:
        """Whether it names which events."""
        return self.observed_from is not None or self.observed_to is not None

    def covers(self, at: datetime) -> bool:
        """Whether an event that was observed then is among them."""
        after = self.observed_from is None or at >= self.observed_from
        return after and (self.observed_to is None or at < self.observed_to)

    def settings(self, of_stream: FineTuneSettings) -> FineTuneSettings:
        """The stream's settings with what is named here.

        Raises:
            ValidationError: the strategy cannot go with the others.
        """
        if self.strategy is None:
            return of_stream
        return FineTuneSettings.model_validate({**of_stream.model_dump(), "strategy": self.strategy})

    def __str__(self) -> str:
        said = [f"strategy {self.strategy}"] if self.strategy else []
        if self.ranged:
            said.append("events observed" + _between(self.observed_from, self.observed_to))
        return ", ".join(said) or "as the settings have it"


AS_SET = Retrain()
"""Names nothing."""


class Plan(BaseModel):
    """What a fine-tune would do if it began now.

    Args:
        strategy: by which it would train.
        observed_from, observed_to: of which events, where a range is named.
        examples: by class, how many it would be given.
        new: of these, what no run has trained on.
        memory: of these, what it would be given again.
        left_out: examples that no run has trained on and that are not in the range.
        exam: examples of the exam that its candidate would be asked.
        seconds: how long it should take: the median of the last runs; None before the first that came to an exam.
        begins: when it would begin.
        notes: what may keep its candidate from being promoted.
        refused: why it would be refused; empty where it would not.
    """

    model_config = ConfigDict(frozen=True)

    strategy: str
    observed_from: AwareDatetime | None = None
    observed_to: AwareDatetime | None = None
    examples: dict[str, int] = Field(default_factory=dict)
    new: int = 0
    memory: int = 0
    left_out: int = 0
    exam: int = 0
    seconds: float | None = None
    begins: str = ""
    notes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One sentence for a person."""
        if self.refused:
            return f"it would be refused: {'; '.join(self.refused)}"
        takes = "no run tells yet how long it takes" if self.seconds is None else f"about {self.seconds:.0f} s"
        given = f"{self.new + self.memory} examples of {len(self.examples)} classes"
        said = [
            f"{self.strategy} on {given}{_between(self.observed_from, self.observed_to)}",
            f"{self.new} of them new, {self.memory} of the memory",
            f"{self.exam} examples in the exam",
            takes,
            *([f"{self.left_out} new examples are not in the range and stay new"] if self.left_out else []),
            *self.notes,
            self.begins,
        ]
        return f"nothing was trained; it would be {'; '.join(said)}"


def _between(start: datetime | None, end: datetime | None) -> str:
    said = [f" from {start.isoformat()}"] if start else []
    return "".join([*said, f" before {end.isoformat()}"] if end else said)


class FineTuneJob(BaseModel):
    """One fine-tune, complete enough for another process to carry out.

    Args:
        stream: whose examples these are.
        directory: the job's own directory; made when missing, its `out/` is emptied.
        snapshot: what `replay.snapshot` wrote. Rows marked `exam` are only embedded; the rows marked `new` are
            the experience, or all the others where none is new.
        encoder: the encoder to start from.
        encoder_files: where each of its files lies.
        state: the `state/` of the run that made `encoder`, or None to begin afresh. A state that
            belongs to another encoder is left aside, and the result's notes say so.
        settings: how to train.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stream: str
    directory: Path
    snapshot: Path
    encoder: EncoderSpec
    encoder_files: dict[str, Path]
    state: Path | None = None
    settings: FineTuneSettings = FineTuneSettings()
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        # The child has another working directory.
        paths: dict[str, Any] = {
            "directory": self.directory.absolute(),
            "snapshot": self.snapshot.absolute(),
            "state": self.state and self.state.absolute(),
            "encoder_files": {name: path.absolute() for name, path in self.encoder_files.items()},
        }
        for name, value in paths.items():
            object.__setattr__(self, name, value)
        return self

    @property
    def out(self) -> Path:
        """Where the candidate is written."""
        return self.directory / "out"


class Progress(BaseModel):
    """How far a fine-tune has come: `done` of `total` examples in this phase.

    `loss` is the running mean of the training loss, with what the strategy adds to it.
    """

    model_config = ConfigDict(frozen=True)

    phase: Phase
    done: int = 0
    total: int = 0
    loss: float | None = None
    seconds_left: float | None = None


class FineTuneSummary(BaseModel):
    """What a fine-tune did, in numbers that are kept with the version.

    `new`, `replayed`, `held_out` and `exam` count examples; `penalty` is the mean of what the strategy added to the
    loss by penalty or distillation; `held_out_*` are of the training head; `run` counts the runs of the state's line,
    from 1.
    """

    model_config = ConfigDict(frozen=True)

    run: int
    new: int
    replayed: int
    held_out: int
    exam: int
    epochs: int
    updates: int
    loss: float | None
    penalty: float
    held_out_loss: float | None
    held_out_accuracy: float | None
    ended: Literal["all_epochs", "early_stopping", "max_seconds"]
    device: str
    mixed_precision: bool
    train_seconds: float
    embed_seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FineTuneResult:
    """A candidate that was read back and found whole.

    Args:
        encoder: the candidate's spec; its digests are those of `files`.
        files: the candidate's files by name.
        event_ids: the snapshot's rows in order, exam rows included.
        embeddings: int16 `(rows, d)`, quantised once, under the candidate, in that order.
        classes: the training head's classes in their lasting order.
        state: the directory that the next run of this encoder's line takes.
        summary: what was done.
        seconds: from the start of the process to the checked result.
    """

    encoder: EncoderSpec
    files: dict[str, Path]
    event_ids: tuple[str, ...]
    embeddings: NDArray[np.int16]
    classes: tuple[str, ...]
    state: Path
    summary: FineTuneSummary
    seconds: float

    def by_event(self) -> dict[str, NDArray[np.int16]]:
        """Each event's embedding."""
        return dict(zip(self.event_ids, self.embeddings, strict=True))


class ResultFile(BaseModel):
    """The form of `result.json`; `files` maps each path below `out/` to its sha256."""

    model_config = ConfigDict(frozen=True)

    encoder: EncoderSpec
    classes: tuple[str, ...]
    summary: FineTuneSummary
    files: dict[str, str]


def run_finetune(
    job: FineTuneJob,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    command: Sequence[str] | None = None,
) -> FineTuneResult:
    """Carry out `job` in a child process and return its checked candidate.

    Blocks until the end; `on_progress` and `should_stop` are called from this thread, `should_stop` at least
    four times a second. The child leads its own process group and ends with this process, even a killed one,
    because it watches a pipe that only this process holds.

    Args:
        job: what to do.
        on_progress: told of each step.
        should_stop: when it answers true the child and all it started are killed.
        command: the child's command line, to which the job's directory is added; the default trains.

    Raises:
        FineTuneStopped: `should_stop` answered true.
        FineTuneFailed: the child refused, crashed, was killed, ran past `kill_after_seconds`, or left
            a candidate that is incomplete, altered or not finite.
    """
    started = time.monotonic()
    job.out.joinpath(RESULT_FILE).unlink(missing_ok=True)
    shutil.rmtree(job.out, ignore_errors=True)
    job.directory.mkdir(parents=True, exist_ok=True)
    job.directory.joinpath("job.json").write_text(job.model_dump_json(indent=2))
    log = job.directory / "log.txt"
    on_progress(Progress(phase="starting"))
    with log.open("wb") as stderr:
        child = subprocess.Popen(
            [*(command or (sys.executable, "-m", "learner.training")), str(job.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=Path(__file__).resolve().parent.parent,
            env=_environment(job.settings),
            start_new_session=True,
        )
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, child.pid, job.settings.nice)
        refusal = _follow(child, job.settings.kill_after_seconds, on_progress, should_stop, log)
        code = child.wait()
    finally:
        _kill(child)
    if code != 0 or refusal is not None:
        raise FineTuneFailed(refusal or _ending(code), "" if refusal else _tail(log))
    result = read_result(job.out, time.monotonic() - started)
    on_progress(Progress(phase="done", done=len(result.event_ids), total=len(result.event_ids), seconds_left=0.0))
    return result


def read_result(out: Path, seconds: float = 0.0) -> FineTuneResult:
    """Read a finished job's `out/`, checking every file.

    Raises:
        FineTuneFailed: `result.json` or a file it names is missing, altered, or holds numbers that are not finite.
    """
    try:
        found = ResultFile.model_validate_json(out.joinpath(RESULT_FILE).read_bytes())
    except FileNotFoundError:
        raise FineTuneFailed(f"the fine-tune left no {RESULT_FILE}, so its candidate is incomplete") from None
    except ValidationError as error:
        raise FineTuneFailed(f"{RESULT_FILE} is not readable: {error.errors()[0]['msg']}") from None
    for name, expected in found.files.items():
        path = out / name
        if not path.resolve().is_relative_to(out.resolve()):
            raise FineTuneFailed(f"{RESULT_FILE} names {name}, which lies outside the job")
        if not path.is_file():
            raise FineTuneFailed(f"{name} is missing from the fine-tune's result")
        if file_digest(path) != expected:
            raise FineTuneFailed(f"{name} was altered after the fine-tune wrote it")
    try:
        files = {name: out / "encoder" / name for name in found.encoder.files}
        for name, path in files.items():
            if path.suffix == ".safetensors":
                _refuse_infinite(name, path)
        event_ids = tuple(json.loads(out.joinpath("events.json").read_bytes()))
        embeddings: NDArray[np.int16] = load_file(out / "embeddings.safetensors")["embeddings"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise FineTuneFailed(f"the fine-tune's result cannot be read: {error}") from None
    if embeddings.shape != (len(event_ids), found.encoder.dimension) or embeddings.dtype != np.int16:
        raise FineTuneFailed(
            f"the fine-tune gave embeddings of shape {embeddings.shape} for {len(event_ids)} events "
            f"of {found.encoder.dimension} dimensions"
        )
    return FineTuneResult(
        encoder=found.encoder,
        files=files,
        event_ids=event_ids,
        embeddings=embeddings,
        classes=found.classes,
        state=out / "state",
        summary=found.summary,
        seconds=seconds,
    )


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_infinite(name: str, path: Path) -> None:
    for key, tensor in load_file(path).items():
        if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
            raise FineTuneFailed(f"the candidate's weights are not finite ({key} in {name})")


def _environment(settings: FineTuneSettings) -> dict[str, str]:
    """The child's environment: ours without our own settings (some are secrets), with bounded threads, off the net."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRIMTAB_")}
    threads = str(settings.threads)
    return inherited | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def _follow(
    child: subprocess.Popen[bytes],
    limit: float,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    log: Path,
) -> str | None:
    """Pass the child's lines on until it closes its stdout; the sentence it refused with, if it did."""
    assert child.stdout is not None
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(child.stdout, lines), name="finetune-progress", daemon=True).start()
    deadline = time.monotonic() + limit
    refusal: str | None = None
    while True:
        if should_stop():
            raise FineTuneStopped("the fine-tune was stopped on request")
        if time.monotonic() > deadline:
            raise FineTuneFailed(f"the fine-tune did not end within {limit:g} s and was killed", _tail(log))
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            # A grandchild may hold the pipe open after the child has ended.
            if child.poll() is None:
                continue
            line = None
        if line is None:
            return refusal
        message = _message(line)
        if isinstance(message, Progress):
            on_progress(message)
        elif message is not None:
            refusal = message


def _read_lines(pipe: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    with pipe, contextlib.suppress(ValueError, OSError):
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _message(line: bytes) -> Progress | str | None:
    """One line of the child: progress, or a refusal in words; anything else is noise."""
    try:
        found: Any = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("refused"), str):
            return str(found["refused"])
        return Progress.model_validate(found)
    except ValueError:
        return None


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole process group; nothing in it needs a farewell, because `result.json` is written last."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert child.stdin is not None
    child.stdin.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"the fine-tune ended with exit code {code}"
    name = signal.Signals(-code).name if -code in {int(s) for s in signal.Signals} else f"signal {-code}"
    hint = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
    return f"the fine-tune was killed by {name}{hint}"


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError), log.open(errors="replace") as lines:
        return "".join(deque(lines, maxlen=LOG_LINES)).strip()
    return ""
