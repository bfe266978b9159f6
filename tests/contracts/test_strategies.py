"""What every strategy promises, under whatever name the YAML asks for it; all on a network of a few hundred weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel

from learner.encoders import Encoder, build_telemetry_encoder, build_text_encoder
from learner.finetune import FineTuneFailed, FineTuneSettings, Strategy
from learner.training import Row, Trained, TrainingState, train

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
HOLDING = [name for name in STRATEGIES if FineTuneSettings(strategy=name).holds]
BUILDS_ON: dict[str, Strategy] = {
    name: "replay" if FineTuneSettings(strategy=name).replays else "naive"
    for name in STRATEGIES
    if name not in ("naive", "replay")
}
CHANNELS = ("bus_voltage", "wheel_speed")
WORDS = "solar wind quiet storm flare signal lost antenna fault power low high"
CPU = torch.device("cpu")

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Equal bits need an equal number of threads."""
    torch.set_num_threads(1)


def settings_of(strategy: Strategy, **changes: Any) -> FineTuneSettings:
    return FineTuneSettings.model_validate(
        {
            "strategy": strategy,
            "training": "full",
            "epochs": 2,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "head_learning_rate": 1e-2,
            "early_stopping_patience": 0,
        }
        | changes
    )


def telemetry_encoder() -> Encoder:
    return build_telemetry_encoder(CHANNELS, seed=3, window=16, dimension=48, learned=8)


def windows(classes: Sequence[int], each: int, part: Literal["new", "kept", "exam"], seed: int = 0) -> list[Row]:
    """Noisy sine windows (2, 16) whose period is the class."""
    chance = np.random.default_rng((seed, *classes))
    rows = []
    for number in range(each):
        for kind in classes:
            window = chance.normal(0, 0.8, (len(CHANNELS), 16)).astype(np.float32)
            window += 3 * np.sin(np.arange(16) / (1 + kind)).astype(np.float32)
            rows.append(Row(f"{part}-{kind}-{number}", f"period {kind}", window, part))
    return rows


def text_encoder(directory: Path) -> Encoder:
    """A random two-layer transformer with a word list."""
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


def texts(kinds: Sequence[str], part: Literal["new", "kept"] = "new") -> list[Row]:
    """Two telling words among three of chance, so that no class is so sure that gradients vanish."""
    sayings = {"storm": "storm flare", "outage": "antenna fault", "calm": "quiet low"}
    chance = np.random.default_rng(0)
    return [
        Row(f"{part}-{kind}-{number}", kind, f"{sayings[kind]} {' '.join(chance.choice(WORDS.split(), 3))}", part)
        for number in range(8)
        for kind in kinds
    ]


def recall(encoder: Encoder, trained: Trained, kind: int) -> float:
    """The share of fresh windows of a class that the trained network finds."""
    fresh = encoder.embed([row.payload for row in windows((kind,), 20, "exam", seed=77)])
    head = trained.state.head
    logits = torch.from_numpy(fresh) @ head["weight"].T + head["bias"]
    return float((logits.argmax(1) == trained.state.classes.index(f"period {kind}")).float().mean())


@cache
def _first_run(strategy: Strategy) -> tuple[Encoder, TrainingState]:
    encoder = telemetry_encoder()
    return encoder, train(encoder, windows((1, 2), 12, "new"), TrainingState(), settings_of(strategy), CPU).state


def first_run(strategy: Strategy) -> tuple[Encoder, TrainingState]:
    """An encoder that learned classes 1 and 2, and the state of that run; each caller's own."""
    return copy.deepcopy(_first_run(strategy))


SECOND = windows((3,), 12, "new") + windows((1, 2), 12, "kept")


def everything(encoder: Encoder, state: TrainingState) -> dict[str, torch.Tensor]:
    """All that a run leaves, by name."""
    groups = ("head", "importances", "anchors", "start", "moments")
    kept = {f"{group}/{name}": value for group in groups for name, value in getattr(state, group).items()}
    return kept | {f"encoder/{name}": value.clone() for name, value in encoder.module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_strategy
def test_it_learns_the_new_class(strategy: Strategy) -> None:
    """Whatever it does for the old ones, a strategy that does not learn what is new is of no use."""
    encoder, state = first_run(strategy)
    trained = train(encoder, SECOND, state, settings_of(strategy, epochs=6), CPU)
    assert recall(encoder, trained, 3) >= 0.9
    assert trained.state.experiences == 2


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if FineTuneSettings(strategy=name).replays])
def test_what_replays_keeps_the_old_classes(strategy: Strategy) -> None:
    """The memory is there for this; a strategy that is handed it and does not use it would go unseen."""
    encoder, state = first_run(strategy)
    trained = train(encoder, SECOND, state, settings_of(strategy, epochs=6), CPU)
    assert min(recall(encoder, trained, kind) for kind in (1, 2)) >= 0.9


@pytest.mark.parametrize(("strategy", "plain"), list(BUILDS_ON.items()))
def test_it_is_more_than_what_it_builds_on(strategy: Strategy, plain: Strategy) -> None:
    """A strategy built anew in each process is easily one that does nothing, which no accuracy would show."""
    ends = []
    for name in (strategy, plain):
        encoder, state = first_run(strategy)
        # The classes lie so far apart that the old and the new network are equally sure of them, unless softened.
        train(encoder, SECOND, state, settings_of(name, distillation_temperature=50), CPU)
        ends.append({name: value.clone() for name, value in encoder.module.state_dict().items()})
    assert not same(ends[0], ends[1])


@every_strategy
def test_a_restart_between_two_runs_changes_not_one_bit(strategy: Strategy, tmp_path: Path) -> None:
    """Each run is a process: what is not written down is gone, and every later version would depend on it."""
    ends = []
    for restart in (False, True):
        encoder, state = first_run(strategy)
        if restart:
            state.save(tmp_path)
            state = TrainingState.load(tmp_path)
        ends.append(everything(encoder, train(encoder, SECOND, state, settings_of(strategy), CPU).state))
    assert same(ends[0], ends[1])


@every_strategy
def test_a_seed_repeats(strategy: Strategy) -> None:
    """A version's lineage names its seed, which is only worth something if the seed gives it again."""
    ends = []
    for seed in (1, 1, 2):
        encoder, state = first_run(strategy)
        ends.append(everything(encoder, train(encoder, SECOND, state, settings_of(strategy, seed=seed), CPU).state))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@every_strategy
@pytest.mark.parametrize(("new", "kept"), [(1, 1), (1, 12)])
def test_a_batch_larger_than_the_data_ends(strategy: Strategy, new: int, kept: int) -> None:
    """A store smaller than a batch is how every stream begins; some loaders wait for ever for a batch to fill."""
    encoder, state = first_run(strategy)
    rows = windows((3, 4), new, "new") + windows((1, 2), kept, "kept")
    summary = train(encoder, rows, state, settings_of(strategy, batch_size=64, gradient_accumulation=4), CPU).summary
    assert summary.updates == 2
    assert summary.loss is not None


@every_strategy
@pytest.mark.parametrize("each", [12, 1])
def test_one_class_only(strategy: Strategy, each: int) -> None:
    """A class whose labels come in one burst, or one label alone: with nothing to compare it is refused in words,
    and with the classes of an earlier run, or of the memory, it is learned."""
    settings = settings_of(strategy)
    with pytest.raises(FineTuneFailed, match="at least two classes are needed"):
        train(telemetry_encoder(), windows((3,), each, "new"), TrainingState(), settings, CPU)
    encoder, state = first_run(strategy)
    trained = train(encoder, windows((3,), each, "new") + windows((1, 2), 12, "kept"), state, settings, CPU)
    assert sorted(trained.state.classes) == ["period 1", "period 2", "period 3"]
    assert all(bool(torch.isfinite(value).all()) for value in everything(encoder, trained.state).values())


@every_strategy
def test_no_examples_are_refused_in_words(strategy: Strategy) -> None:
    """All labels withdrawn, or all of them in the exam: that is no crash."""
    encoder, state = first_run(strategy)
    with pytest.raises(FineTuneFailed, match="0 examples to train on"):
        train(encoder, windows((1, 2), 3, "exam"), state, settings_of(strategy), CPU)


@every_strategy
def test_classes_grow_from_run_to_run(strategy: Strategy, tmp_path: Path) -> None:
    """Each run may bring new classes, and what is kept of the old ones must stay with their own rows."""
    encoder, state = first_run(strategy)
    for kinds, old in (((4, 3), (1, 2)), ((0,), (1, 2, 3, 4))):
        state.save(tmp_path)
        rows = windows(kinds, 24, "new") + windows(old, 24, "kept")
        trained = train(encoder, rows, TrainingState.load(tmp_path), settings_of(strategy, epochs=4), CPU)
        state = trained.state
        assert recall(encoder, trained, kinds[0]) >= 0.8
    assert sorted(state.classes) == [f"period {kind}" for kind in range(5)]
    assert state.head["weight"].shape == (5, 48)
    if strategy != "gdumb":
        assert state.classes == ["period 1", "period 2", "period 3", "period 4", "period 0"]
    for name in ("head.weight", "head.bias"):
        assert state.importances.get(name, state.head["weight"]).shape[0] == 5


@every_strategy
def test_accumulated_batches_go_with_it(strategy: Strategy) -> None:
    """Accumulation stands in for memory, and a strategy that touches gradients easily undoes it."""
    ends = []
    for batch, accumulation in ((8, 1), (4, 2)):
        encoder, state = first_run(strategy)
        # As much of the memory in one large batch as in two small ones; A-GEM asks one batch of it, so all there is.
        rows = windows((3, 4), 4, "new") + windows((1, 2), 2 if strategy == "agem" else 4, "kept")
        changes = {"batch_size": batch, "gradient_accumulation": accumulation, "epochs": 1, "learning_rate": 1e-3}
        summary = train(encoder, rows, state, settings_of(strategy, **changes), CPU).summary
        ends.append((summary.updates, {n: v.clone() for n, v in encoder.module.state_dict().items()}))
    assert ends[0][0] == ends[1][0]
    # ER-ACE compares the classes within a batch, so there a smaller batch is another loss.
    if strategy != "er_ace":
        assert all(torch.allclose(ends[0][1][name], ends[1][1][name], atol=2e-4) for name in ends[0][1])


@every_strategy
@pytest.mark.parametrize("training", ["frozen_layers", "lora"])
def test_only_what_may_move_moves(strategy: Strategy, training: str, tmp_path: Path) -> None:
    """Partial and low-rank training are chosen for what they leave alone, whatever the strategy."""
    changes: dict[str, Any] = {"training": training, "frozen_layers": 1, "lora_rank": 2, "mixed_precision": "off"}
    if training == "lora" and strategy in ("si", "si_replay"):
        with pytest.raises(ValidationError, match="follows the way of each weight"):
            settings_of(strategy, **changes)
        return
    encoder = text_encoder(tmp_path)
    settings = settings_of(strategy, **changes)
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    state = train(encoder, texts(["storm", "outage"]), TrainingState(), settings, CPU).state
    again = train(encoder, texts(["calm"]) + texts(["storm", "outage"], "kept"), state, settings, CPU)
    after = encoder.module.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    allowed = ".layer.1." if training == "frozen_layers" else ".attention.self."
    assert all(allowed in name for name in moved)
    if strategy in HOLDING:
        assert again.summary.penalty > 0
        assert any(allowed in name for name in again.state.importances)


@pytest.mark.parametrize("strategy", ["ewc", "mas"])
def test_lora_is_held_by_the_weights_that_serve(strategy: Strategy, tmp_path: Path) -> None:
    """Each run makes new deltas, so only the merged weight can be compared with what an earlier run left."""
    encoder = text_encoder(tmp_path)
    first = texts(["storm", "outage"])
    settings = settings_of(strategy, training="lora", lora_rank=2, learning_rate=0.01, mixed_precision="off")
    train(encoder, first, TrainingState(), settings, CPU)
    moved = []
    for weight in (0.0, 1000.0):
        encoder = text_encoder(tmp_path)
        state = train(encoder, first, TrainingState(), settings, CPU).state
        held = {name: value for name, value in state.importances.items() if name.startswith("encoder.")}
        assert held
        strict = settings.model_copy(update={"penalty_weight": weight, "epochs": 6})
        train(encoder, texts(["calm"]), state, strict, CPU)
        now = {f"encoder.{name}": value for name, value in encoder.module.named_parameters()}
        moved.append(sum(float((held[n] * (now[n] - state.anchors[n]).square()).sum().detach()) for n in held))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("strategy", HOLDING)
def test_importances_have_a_mean_of_one(strategy: Strategy) -> None:
    """One `penalty_weight` can only be right for all runs and strategies if importances are of one size."""
    _, state = first_run(strategy)
    total = sum(float(value.sum()) for value in state.importances.values())
    assert total / sum(value.numel() for value in state.importances.values()) == pytest.approx(1.0, rel=1e-4)
    assert all(float(value.min()) >= 0 for value in state.importances.values())


def test_logits_far_apart_are_no_reason_to_break() -> None:
    """A head of sure answers is what training ends with; er_ace's published loss is NaN there."""
    encoder, state = first_run("er_ace")
    state.head = {name: value * 1e4 for name, value in state.head.items()}
    trained = train(encoder, SECOND, state, settings_of("er_ace"), CPU)
    assert trained.summary.loss is not None


def test_gdumb_goes_back_to_where_it_began() -> None:
    """From scratch means from the weights of its first run, which only the state still has."""
    encoder, state = first_run("gdumb")
    frozen = settings_of("gdumb", learning_rate=1e-12, epochs=1)
    train(encoder, SECOND, state, frozen, CPU)
    now = encoder.module.state_dict()
    assert all(torch.allclose(now[name], value, atol=1e-6) for name, value in state.start.items())
    assert any(not torch.equal(value, first_run("gdumb")[0].module.state_dict()[n]) for n, value in state.start.items())
