"""Fine-tuning: the parent's promises with small real children, the training in this process, and both together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel

from learner.encoders import Encoder, build_telemetry_encoder, build_text_encoder, load_encoder
from learner.finetune import (
    FineTuneFailed,
    FineTuneJob,
    FineTuneSettings,
    FineTuneStopped,
    Progress,
    file_digest,
    read_result,
    run_finetune,
)
from learner.heads import quantise
from learner.telemetry import TelemetryModule
from learner.training import Row, TrainingState, _set_statistics, carry_out, hold_out, learning_rate_scale, train
from replay.snapshot import write_snapshot
from replay.store import Example
from stream.events import Place

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CHANNELS = ("bus_voltage", "wheel_speed")
WORDS = "solar wind quiet storm flare signal lost antenna fault power low high"
START = datetime(2024, 3, 1, tzinfo=UTC)
TINY = FineTuneSettings(epochs=2, batch_size=8, strategy="ewc_replay", training="full", early_stopping_patience=0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Equal bits need an equal number of threads."""
    torch.set_num_threads(1)


def windows(classes: Sequence[int], each: int, part: Literal["new", "kept", "exam"], seed: int = 0) -> list[Row]:
    """Noisy sine windows (2, 16) whose period is the class."""
    chance = np.random.default_rng((seed, *classes))
    rows = []
    for number in range(each):
        for kind in classes:
            window = chance.normal(0, 0.5, (len(CHANNELS), 16)).astype(np.float32)
            window[0] += 3 * np.sin(np.arange(16) / (1 + kind)).astype(np.float32)
            rows.append(Row(f"{part}-{kind}-{number}", f"period {kind}", window, part))
    return rows


def telemetry_encoder() -> Encoder:
    return build_telemetry_encoder(CHANNELS, seed=3, window=16, dimension=48, learned=8)


def text_encoder(directory: Path) -> Encoder:
    """A random two-layer transformer with a word list, built as an installed model would be."""
    words = ["[PAD]", "[UNK]", *WORDS.split()]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(directory)
    return build_text_encoder(directory, max_tokens=16)


def texts(part: Literal["new", "kept", "exam"] = "new") -> list[Row]:
    return [
        Row(f"{part}-{number}", label, f"{text} {'low' if number % 2 else 'high'}", part)
        for number in range(12)
        for label, text in (("storm", "solar wind storm flare"), ("outage", "signal lost antenna fault"))
    ]


def weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_state(one: TrainingState, other: TrainingState) -> bool:
    scalars = ("classes", "experiences", "iterations", "encoder")
    groups = ("head", "importances", "anchors", "start", "moments")
    return all(getattr(one, name) == getattr(other, name) for name in scalars) and all(
        same(getattr(one, name), getattr(other, name)) for name in groups
    )


def write_job(directory: Path, rows: Sequence[Row], encoder: Encoder, **changes: Any) -> FineTuneJob:
    """A job on disk, as the learner makes it."""
    directory.mkdir(parents=True)
    examples = [
        Example(
            stream="battery",
            event_id=row.event_id,
            label=row.label,
            payload=row.payload,
            observed_at=START,
            labelled_at=START + timedelta(hours=1),
            ref=Place(topic="telemetry", partition=0, offset=number),
            priority=number,
            exam=row.part == "exam",
            trained_in=1 if row.part == "kept" else None,
            embedding=np.zeros(encoder.spec.dimension, dtype=np.int16),
            encoder="base",
        )
        for number, row in enumerate(rows)
    ]
    write_snapshot(examples, directory / "snapshot", encoder.spec.kind)
    spec, files = encoder.sealed(), directory / "encoder"
    files.mkdir()
    for name, content in encoder.files().items():
        (files / name).write_bytes(content)
    return FineTuneJob(
        stream="battery",
        directory=directory / "job",
        snapshot=directory / "snapshot",
        encoder=spec,
        encoder_files={name: files / name for name in spec.files},
        **{"settings": TINY, "device": "cpu", **changes},
    )


@pytest.fixture
def job(tmp_path: Path) -> FineTuneJob:
    """A job whose child is one of the small programs below, so its snapshot is never read."""
    encoder = telemetry_encoder()
    return FineTuneJob(
        stream="battery",
        directory=tmp_path / "job",
        snapshot=tmp_path / "snapshot",
        encoder=encoder.sealed(),
        encoder_files={},
        settings=TINY,
        device="cpu",
    )


def child(program: str) -> list[str]:
    return [sys.executable, "-c", program]


# --- the parent ---------------------------------------------------------------------------------------


def test_a_crash_is_reported_with_its_last_words(job: FineTuneJob) -> None:
    """An operator at night must see why, without looking for a log."""
    program = (
        "import sys\nfor n in range(50): print('line', n, file=sys.stderr)\nraise RuntimeError('the disk is full')"
    )
    with pytest.raises(FineTuneFailed) as failure:
        run_finetune(job, command=child(program))
    assert "exit code 1" in failure.value.reason
    assert "the disk is full" in failure.value.log
    assert "line 3\n" not in failure.value.log


def test_a_killed_child_is_reported_by_its_signal(job: FineTuneJob) -> None:
    """The kernel kills the largest process when memory ends, and a user must recognise that."""
    with pytest.raises(FineTuneFailed, match=r"SIGKILL.*out of memory"):
        run_finetune(job, command=child("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))


def test_a_refusal_is_passed_on_in_words(job: FineTuneJob) -> None:
    """What the child knows to be wrong is told as it said it, without a traceback."""
    program = 'import sys\nprint(\'{"refused": "nothing to tell apart"}\')\nsys.exit(2)'
    with pytest.raises(FineTuneFailed) as failure:
        run_finetune(job, command=child(program))
    assert str(failure.value) == "nothing to tell apart"


def test_stopping_kills_the_child_and_its_children(job: FineTuneJob) -> None:
    """A stopped fine-tune that lives on would take the worker's cores."""
    program = (
        "import subprocess, sys, time\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        'print(\'{"phase": "training", "done": %d}\' % inner.pid, flush=True)\n'
        "time.sleep(600)"
    )
    seen: list[Progress] = []
    with pytest.raises(FineTuneStopped):
        run_finetune(job, seen.append, lambda: len(seen) > 1, command=child(program))
    _wait_until_gone(seen[-1].done)


def test_a_child_that_hangs_is_given_up(job: FineTuneJob) -> None:
    """A fine-tune that never ends would hold back every later one."""
    patient = job.model_copy(update={"settings": TINY.model_copy(update={"kill_after_seconds": 0.5})})
    with pytest.raises(FineTuneFailed, match=r"did not end within 0.5 s"):
        run_finetune(patient, command=child("import time\ntime.sleep(600)"))


def test_a_clean_exit_without_a_result_is_no_candidate(job: FineTuneJob) -> None:
    """Only `result.json` makes a candidate; half a directory must never be promoted."""
    with pytest.raises(FineTuneFailed, match="incomplete"):
        run_finetune(job, command=child("pass"))


def test_what_an_earlier_try_left_is_not_taken_for_a_result(job: FineTuneJob, tmp_path: Path) -> None:
    """A job that is tried again in the same directory must not answer with the first try's candidate."""
    _fake_result(job.out, job)
    assert read_result(job.out).event_ids == ("a", "b")
    with pytest.raises(FineTuneFailed, match="incomplete"):
        run_finetune(job, command=child("pass"))


def test_noise_among_the_progress_lines_is_ignored(job: FineTuneJob) -> None:
    """Libraries print to stdout, and no such line may be read as progress or break the run."""
    program = "print('hello'); print('[1]'); print('{\"phase\": \"unheard of\"}'); print('{\"phase\": \"embedding\"}')"
    seen: list[Progress] = []
    with pytest.raises(FineTuneFailed):
        run_finetune(job, seen.append, command=child(program))
    assert [progress.phase for progress in seen] == ["starting", "embedding"]


def test_the_child_gets_no_secret_and_steps_back(job: FineTuneJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords come in through TRIMTAB_ variables, and training must leave the cores to the worker."""
    monkeypatch.setenv("TRIMTAB_KAFKA__SASL_PASSWORD", "hunter2")
    program = (
        "import os, sys, time\n"
        "while os.nice(0) < 10: time.sleep(0.01)\n"
        'sys.exit(f\'{[n for n in os.environ if n.startswith(chr(84) + "RIMTAB")]} {os.environ["OMP_NUM_THREADS"]}\')'
    )
    with pytest.raises(FineTuneFailed) as failure:
        run_finetune(job, command=child(program))
    assert failure.value.log == "[] 1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "encoder" / "weights.safetensors").write_bytes(b"x"), "altered"),
        (lambda out: (out / "state" / "state.json").unlink(), "missing"),
        (lambda out: (out / "result.json").write_text('{"encoder": 1}'), "not readable"),
    ],
)
def test_a_damaged_result_is_refused(job: FineTuneJob, damage: Callable[[Path], None], message: str) -> None:
    """A torn or altered candidate must never come near the exam."""
    _fake_result(job.out, job)
    damage(job.out)
    with pytest.raises(FineTuneFailed, match=message):
        read_result(job.out)


def test_weights_that_are_not_finite_are_refused(job: FineTuneJob) -> None:
    """A diverged network can still answer, and would answer the same to everything."""
    _fake_result(job.out, job, poison=True)
    with pytest.raises(FineTuneFailed, match="not finite"):
        read_result(job.out)


def test_the_learner_side_loads_neither_avalanche_nor_datasets() -> None:
    """Both take many seconds and much memory, which only the training process should pay."""
    program = "import sys, learner.finetune; print([m for m in ('avalanche', 'datasets', 'peft') if m in sys.modules])"
    done = subprocess.run(child(program), cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "wrong",
    [{"strategy": "si", "training": "lora"}, {"epochs": 0}, {"unknown": 1}, {"learning_rate": 0}, {"strategy": "gem"}],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    """A wrong setting must be found when the YAML is read, not after minutes of training."""
    with pytest.raises(ValidationError):
        FineTuneSettings.model_validate(wrong)


# --- training, in this process ------------------------------------------------------------------------


def test_a_run_repeats_with_its_seed() -> None:
    """A version's lineage names its seed, which is only worth something if the seed gives it again."""
    results = []
    for seed in (1, 1, 2):
        encoder = telemetry_encoder()
        trained = train(
            encoder, windows((1, 2, 3), 9, "new"), TrainingState(), TINY.model_copy(update={"seed": seed}), CPU
        )
        results.append((trained.state, weights(encoder)))
    assert same_state(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])
    assert not same(results[0][1], results[2][1])


def test_the_second_run_is_held_by_what_the_first_learned(tmp_path: Path) -> None:
    """A strategy built anew has no EWC penalty at all; it must come back with its importances and its clock."""
    encoder = telemetry_encoder()
    first = train(encoder, windows((1, 2), 12, "new"), TrainingState(), TINY, CPU)
    assert first.summary.penalty == 0.0
    first.state.save(tmp_path)
    restored = TrainingState.load(tmp_path)
    assert restored.experiences == 1
    more = windows((3, 4), 8, "new") + windows((1, 2), 12, "kept")
    second = train(encoder, more, restored, TINY, CPU)
    assert second.summary.penalty > 0.0
    assert second.summary.run == 2


def test_the_penalty_holds_weights_in_place() -> None:
    """The penalty must act on the weights, not only be counted."""
    moved = []
    for strength in (0.0, 1000.0):
        encoder = telemetry_encoder()
        settings = TINY.model_copy(update={"strategy": "ewc", "penalty_weight": strength, "epochs": 20})
        first = train(encoder, windows((1, 2), 12, "new"), TrainingState(), settings, CPU).state
        train(encoder, windows((3, 4), 12, "new"), first, settings, CPU)
        now = {f"encoder.{name}": weight for name, weight in encoder.module.named_parameters()}
        held = {name: value for name, value in first.importances.items() if name in now}
        assert held
        moved.append(sum(float((held[n] * (now[n] - first.anchors[n]).square()).sum().detach()) for n in held))
    assert moved[1] < 0.5 * moved[0]


def test_a_restart_between_two_runs_changes_not_one_bit(tmp_path: Path) -> None:
    """What is lost on the way to the disk would make every later version depend on when the learner restarted."""
    more = windows((3,), 8, "new") + windows((1, 2), 12, "kept")
    ends = []
    for restart in (False, True):
        encoder = telemetry_encoder()
        state = train(encoder, windows((1, 2), 12, "new"), TrainingState(), TINY, CPU).state
        if restart:
            state.save(tmp_path / "state")
            loaded = TrainingState.load(tmp_path / "state")
            assert same_state(state, loaded)
            loaded.save(tmp_path / "again")
            names = [path.name for path in (tmp_path / "state").iterdir()]
            assert all(file_digest(tmp_path / "state" / n) == file_digest(tmp_path / "again" / n) for n in names)
            state = loaded
        ends.append((train(encoder, more, state, TINY, CPU).state, weights(encoder)))
    assert same_state(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def test_the_optimizer_goes_on_where_it_was() -> None:
    """Avalanche clears the optimizer's moments at its first experience unless it is told otherwise."""
    encoder = telemetry_encoder()
    state = train(encoder, windows((1, 2), 12, "new"), TrainingState(), TINY, CPU).state
    steps = state.moments["head.weight|step"]
    more = windows((1, 2), 8, "new", seed=9)
    again = train(encoder, more, state, TINY, CPU).state
    assert float(again.moments["head.weight|step"]) == float(steps) + 2 * 2


def test_new_classes_are_appended_and_old_rows_stay() -> None:
    """A head whose rows moved would answer with the wrong names."""
    encoder = telemetry_encoder()
    state = train(encoder, windows((5, 2), 12, "new"), TrainingState(), TINY, CPU).state
    grown = state.grow_to(["period 2", "period 1"])
    assert grown.classes == ["period 2", "period 5", "period 1"]
    for name in ("head.weight", "head.bias"):
        assert torch.equal(grown.importances[name][:2], state.importances[name])
        assert not grown.importances[name][2:].any()
    assert grown.moments["head.weight|exp_avg"].shape[0] == 3
    gentle = TINY.model_copy(update={"learning_rate": 1e-9, "head_learning_rate": 1e-9, "epochs": 1})
    after = train(encoder, windows((1,), 4, "new") + windows((5, 2), 12, "kept"), state, gentle, CPU).state
    assert after.classes == ["period 2", "period 5", "period 1"]
    assert torch.allclose(after.head["weight"][:2], state.head["weight"], atol=1e-5)
    assert after.head["weight"][2].abs().sum() > 0


def test_exam_rows_are_never_trained_on() -> None:
    """An exam over examples that were trained on would promote what learned them by heart."""
    ends = []
    for exam in ([], windows((1, 2, 7), 9, "exam", seed=4)):
        encoder = telemetry_encoder()
        trained = train(encoder, [*exam, *windows((1, 2), 12, "new")], TrainingState(), TINY, CPU)
        ends.append((trained.state, weights(encoder), trained.summary))
    assert same_state(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])
    assert "period 7" not in ends[1][0].classes
    assert ends[1][2].exam == 27


@pytest.mark.parametrize(
    ("strategy", "matters"), [("naive", False), ("ewc", False), ("replay", True), ("ewc_replay", True)]
)
def test_only_replay_sees_what_the_store_kept(strategy: str, matters: bool) -> None:
    """Naming a strategy must decide what is trained on; a prefilled memory is easily never read."""
    ends = []
    for seed in (0, 1):
        encoder = telemetry_encoder()
        base = train(encoder, windows((1, 2), 12, "new"), TrainingState(), TINY, CPU).state
        settings = TINY.model_copy(update={"strategy": strategy})
        train(encoder, windows((3, 4), 12, "new") + windows((1, 2), 12, "kept", seed), base, settings, CPU)
        ends.append(weights(encoder))
    assert same(ends[0], ends[1]) is not matters


def test_nothing_new_trains_on_what_is_kept() -> None:
    """A retrain by hand, when no label came since the last one, must still do what it says."""
    trained = train(telemetry_encoder(), windows((1, 2), 12, "kept"), TrainingState(), TINY, CPU)
    assert trained.summary.new == 22
    assert trained.summary.replayed == 0


@pytest.mark.parametrize("rows", [windows((1,), 12, "new"), windows((1,), 1, "new"), windows((1, 2), 4, "exam"), []])
def test_fewer_than_two_classes_are_refused_in_words(rows: list[Row]) -> None:
    """A loss over one class is zero, and a run that does nothing must not look like one that worked."""
    with pytest.raises(FineTuneFailed, match="at least two classes are needed"):
        train(telemetry_encoder(), rows, TrainingState(), TINY, CPU)


@pytest.mark.parametrize(("new", "kept"), [(1, 0), (1, 1), (2, 1), (1, 30)])
def test_a_batch_larger_than_the_data_still_trains(new: int, kept: int) -> None:
    """Small streams exist, and some of Avalanche's loaders wait for ever for a batch that never fills."""
    settings = TINY.model_copy(update={"batch_size": 64, "gradient_accumulation": 4})
    rows = windows((1, 2), new, "new") + windows((3, 4), kept, "kept")
    trained = train(telemetry_encoder(), rows, TrainingState(), settings, CPU)
    assert trained.summary.updates == 2
    assert trained.summary.new == 2 * new


def test_accumulated_batches_make_the_update_of_one_large_batch() -> None:
    """Gradient accumulation stands in for memory; it must not change what is learned."""
    ends = []
    for batch, accumulation in ((8, 1), (4, 2)):
        encoder = telemetry_encoder()
        settings = TINY.model_copy(
            update={"strategy": "naive", "batch_size": batch, "gradient_accumulation": accumulation, "epochs": 1}
        )
        summary = train(encoder, windows((1, 2), 8, "new"), TrainingState(), settings, CPU).summary
        assert summary.updates == 2
        ends.append(weights(encoder))
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-5) for name in ends[0])


def test_frozen_layers_do_not_move(tmp_path: Path) -> None:
    """Freezing is what keeps the lower layers, and the time, where they were."""
    encoder = text_encoder(tmp_path)
    before = weights(encoder)
    settings = TINY.model_copy(update={"training": "frozen_layers", "frozen_layers": 1, "strategy": "replay"})
    train(encoder, texts(), TrainingState(), settings, CPU)
    after = weights(encoder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("backbone.encoder.layer.1.") for name in moved)


def test_more_frozen_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    """A number meant for a larger model would silently train nothing."""
    settings = TINY.model_copy(update={"training": "frozen_layers", "frozen_layers": 3})
    with pytest.raises(FineTuneFailed, match="has 2 layers"):
        train(text_encoder(tmp_path), texts(), TrainingState(), settings, CPU)


def test_lora_is_merged_into_plain_weights(tmp_path: Path) -> None:
    """What serves must not need peft, and only attention's weights may have changed."""
    encoder = text_encoder(tmp_path)
    before = weights(encoder)
    settings = TINY.model_copy(
        update={
            "training": "lora",
            "lora_rank": 2,
            "strategy": "replay",
            "learning_rate": 0.01,
            "mixed_precision": "off",
        }
    )
    train(encoder, texts(), TrainingState(), settings, CPU)
    after = weights(encoder)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".query.weight" in name or ".value.weight" in name for name in moved)


def test_early_stopping_keeps_the_best_weights() -> None:
    """Past the best point a run only learns its examples by heart."""
    reports: list[Progress] = []
    settings = TINY.model_copy(
        update={"epochs": 60, "early_stopping_patience": 1, "learning_rate": 0.05, "head_learning_rate": 0.05}
    )
    trained = train(telemetry_encoder(), windows((1, 2, 3), 10, "new"), TrainingState(), settings, CPU, reports.append)
    assert trained.summary.ended == "early_stopping"
    assert trained.summary.epochs < 60
    assert trained.summary.held_out == 3
    assert trained.summary.held_out_loss is not None


def test_a_run_out_of_time_ends_with_what_it_has() -> None:
    """A budget that is passed must give a candidate early, not none."""
    now = iter(range(10_000))
    settings = TINY.model_copy(update={"epochs": 500, "max_seconds": 20.0})
    trained = train(
        telemetry_encoder(), windows((1, 2), 12, "new"), TrainingState(), settings, CPU, clock=lambda: float(next(now))
    )
    assert trained.summary.ended == "max_seconds"
    assert trained.summary.updates < 30


def test_a_loss_that_is_not_a_number_ends_the_run() -> None:
    """Training on would only waste the night and give a network of NaN."""
    encoder = telemetry_encoder()
    with torch.no_grad():
        next(iter(encoder.module.parameters())).fill_(float("nan"))
    with pytest.raises(FineTuneFailed, match="the loss became nan"):
        train(encoder, windows((1, 2), 12, "new"), TrainingState(), TINY, CPU)


@pytest.mark.parametrize("known", ["another", "this"])
def test_a_state_of_another_size_is_left_aside(known: str, tmp_path: Path) -> None:
    """A base model that was replaced by a larger one has no use for what the smaller one's weights were worth, and
    no run may fail for it, tonight and every night after."""
    small = build_telemetry_encoder(CHANNELS, seed=3, window=16, dimension=40, learned=4)
    left = train(small, windows((1, 2), 8, "new"), TrainingState(), TINY, CPU).state
    job = write_job(tmp_path / "larger", windows((1, 2), 8, "new"), telemetry_encoder())
    left.encoder = job.encoder.files if known == "this" else small.sealed().files
    left.save(tmp_path / "state")
    carry_out(job.model_copy(update={"state": tmp_path / "state"}), lambda progress: None)
    summary = read_result(job.out).summary
    assert summary.run == 1
    assert len(summary.notes) == 1
    assert "was left aside" in summary.notes[0]


@pytest.mark.parametrize(("number", "rows"), [(3.4e38, 4), (1.4e-45, 200)])
def test_the_statistics_of_extreme_numbers_can_be_used(number: float, rows: int) -> None:
    """They are kept for good: one that float32 has as 0 or infinity would end this run and each one after it."""
    encoder = telemetry_encoder()
    assert isinstance(encoder.module, TelemetryModule)
    windows = np.zeros((rows, len(CHANNELS), 16), np.float32)
    if number > 1:
        windows[::2], windows[1::2] = number, -number
    else:
        windows[0, :, 0] = number
    _set_statistics(encoder.module, [Row(str(place), "one", window, "new") for place, window in enumerate(windows)])
    assert np.isfinite(encoder.embed(list(windows))).all()


@given(total=st.integers(1, 500), ratio=st.floats(0, 1))
def test_the_learning_rate_rises_then_falls(total: int, ratio: float) -> None:
    """No update may exceed the peak rate or go uphill, and there is exactly one summit."""
    scales = [learning_rate_scale(update, total, ratio) for update in range(total)]
    assert all(0 < scale <= 1 for scale in scales)
    summit = scales.index(max(scales))
    assert scales[: summit + 1] == sorted(scales[: summit + 1])
    assert scales[summit:] == sorted(scales[summit:], reverse=True)


@given(labels=st.lists(st.sampled_from("abcdefgh"), max_size=120), seed=st.integers(0, 99))
def test_holding_out_never_takes_a_class_away(labels: list[str], seed: int) -> None:
    """A class that is only held out would never be learned, and a row in both parts would flatter the loss."""
    rows = [Row(str(number), label, label, "new") for number, label in enumerate(labels)]
    trained, held_out = hold_out(rows, np.random.default_rng(seed))
    assert sorted(trained + held_out) == sorted(rows)
    assert len(held_out) <= len(rows) // 10
    left, whole = Counter(row.label for row in trained), Counter(labels)
    assert all(left[label] >= min(2, whole[label]) for label in whole)


# --- both together ------------------------------------------------------------------------------------


def test_two_real_runs_continue_one_another(tmp_path: Path) -> None:
    """The whole way: job on disk, own process, checked candidate; and what a run leaves is all the next one needs."""
    encoder = telemetry_encoder()
    first_rows = windows((1, 2), 12, "new") + windows((1, 2), 3, "exam")
    first_job = write_job(tmp_path / "first", first_rows, encoder)
    seen: list[Progress] = []
    first = run_finetune(first_job, seen.append)
    phases = [progress.phase for progress in seen]
    assert list(dict.fromkeys(phases)) == [
        "starting",
        "reading",
        "training",
        "importances",
        "writing",
        "embedding",
        "done",
    ]
    assert any(progress.loss is not None and progress.seconds_left is not None for progress in seen)
    assert set(first.event_ids) == {row.event_id for row in first_rows}
    assert first.encoder.files != first_job.encoder.files

    candidate = load_encoder(first.encoder, first.files, "cpu")
    by_id = {row.event_id: row.payload for row in first_rows}
    expected = quantise(candidate.embed([by_id[event_id] for event_id in first.event_ids]), candidate.spec.bound)
    assert np.array_equal(first.embeddings, expected)

    more = windows((3,), 12, "new") + windows((1, 2), 12, "kept")
    second = run_finetune(write_job(tmp_path / "second", more, candidate, state=first.state))
    assert second.summary.run == 2
    assert second.summary.penalty > 0.0
    assert second.summary.notes == ()
    assert second.classes == ("period 1", "period 2", "period 3")

    # The same two runs in this one process end in the same bits.
    here = train(encoder, sorted(first_rows), TrainingState(), TINY, CPU)
    here.state.encoder = first.encoder.files
    assert same_state(here.state, TrainingState.load(first.state))
    again = train(encoder, sorted(more), here.state, TINY, CPU)
    again.state.encoder = second.encoder.files
    assert same_state(again.state, TrainingState.load(second.state))


def test_the_training_process_dies_with_its_parent(tmp_path: Path) -> None:
    """A learner that is killed must not leave a process behind that trains for an hour."""
    settings = TINY.model_copy(update={"epochs": 1000, "strategy": "naive"})
    job = write_job(tmp_path / "long", windows((1, 2), 200, "new"), telemetry_encoder(), settings=settings)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    program = (
        "import os, sys, psutil\n"
        "from learner.finetune import FineTuneJob, run_finetune\n"
        f"job = FineTuneJob.model_validate_json(open({str(tmp_path / 'job.json')!r}).read())\n"
        "told = lambda p: p.phase == 'training' and print(psutil.Process().children()[0].pid, flush=True)\n"
        "run_finetune(job, told)\n"
    )
    parent = subprocess.Popen(child(program), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        trainer = int(parent.stdout.readline())
        assert psutil.pid_exists(trainer)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    _wait_until_gone(trainer)


def _wait_until_gone(pid: int) -> None:
    waiting = threading.Event()
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        waiting.wait(0.05)
    pytest.fail(f"process {pid} is still there")


def _fake_result(out: Path, job: FineTuneJob, poison: bool = False) -> None:
    """What a child leaves behind, made by hand."""
    encoder = telemetry_encoder()
    if poison:
        with torch.no_grad():
            next(iter(encoder.module.parameters())).view(-1)[0] = float("nan")
    (out / "encoder").mkdir(parents=True)
    for name, content in encoder.files().items():
        (out / "encoder" / name).write_bytes(content)
    (out / "events.json").write_text('["a", "b"]')
    save_file({"embeddings": np.zeros((2, encoder.spec.dimension), dtype=np.int16)}, out / "embeddings.safetensors")
    TrainingState().save(out / "state")
    summary = {
        "run": 1, "new": 2, "replayed": 0, "held_out": 0, "exam": 0, "epochs": 1, "updates": 1, "loss": 0.1,
        "penalty": 0.0, "held_out_loss": None, "held_out_accuracy": None, "ended": "all_epochs", "device": "cpu",
        "mixed_precision": False, "train_seconds": 1.0, "embed_seconds": 1.0,
    }  # fmt: skip
    files = {str(path.relative_to(out)): file_digest(path) for path in out.rglob("*") if path.is_file()}
    result = {"encoder": encoder.sealed().model_dump(), "classes": ["x", "y"], "summary": summary, "files": files}
    (out / "result.json").write_text(json.dumps(result))
