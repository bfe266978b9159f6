"""Encoders: a batch of texts or telemetry windows in, one embedding each out.

Both kinds are one `torch.nn.Module` that takes one tensor, so the same object serves the worker, the
instant head and fine-tuning. What rebuilds an encoder is its `EncoderSpec` and its files
(safetensors and JSON, never pickle); a rebuilt encoder has the same bits as the one that was stored.

transformers takes seconds to import and tokenizers some memory, so both are imported where a text
encoder is built: a worker that serves only telemetry pays for neither.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from learner.spec import EncoderSpec, Precision, TelemetryConfig, TextConfig
from learner.telemetry import TelemetryModule, seeded, statistics_each
from stream.errors import Misconfigured
from stream.events import Event, Report

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Window = npt.NDArray[np.float32]
Payload = str | Window
"""What an encoder takes: a text, or a window (C, T) in the stream's channel order with NaN where missing."""

WEIGHTS, TOKENIZER, CONFIG = "weights.safetensors", "tokenizer.json", "config.json"
TEXT_BATCH_TOKENS = 1024
"""What one forward pass takes on a CPU. With 4,096, short questions took two fifths more time here on two cores."""
TEXT_BATCH_TOKENS_CUDA = 65_536
TELEMETRY_BATCH_VALUES = 1 << 18
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Encoder(Protocol):
    """A batch of payloads in, embeddings within the spec's bound out."""

    @property
    def spec(self) -> EncoderSpec:
        """The spec of the weights that the encoder was built or loaded with."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network: forward(what `collate` gives) -> (B, d) float."""
        ...

    def collate(self, payloads: Sequence[Payload]) -> Tensor:
        """One tensor: token ids (B, L) padded with 0, or windows (B, C, T) padded with NaN before their first step."""
        ...

    def embed(self, payloads: Sequence[Payload], *, repeatable: bool = False) -> npt.NDArray[np.float32]:
        """Embeddings (n, d) in the payloads' order, every component within the bound.

        Matrix kernels sum in another order for another batch size, so a payload's last bits depend on
        what it is batched with. Where they must not, as in an example that is learned and whose head
        must come out the same in any order of messages, `repeatable` embeds each payload by itself:
        slower, and always the same bits on one machine.
        """
        ...

    def files(self) -> dict[str, bytes]:
        """The files that rebuild the encoder as it is now, fine-tuned weights included."""
        ...

    def sealed(self) -> EncoderSpec:
        """The spec of the encoder as it is now: `spec` with the digests of `files()`."""
        ...


def payload(event: Event, channels: Sequence[str] = ()) -> Payload:
    """What an encoder reads of an event: its text, or its window in the order of `channels`.

    A channel that the event lacks is missing throughout; whether it may, the wire's rules decide before.
    """
    if isinstance(event, Report):
        return event.text
    values = np.array(event.values, dtype=np.float64)
    if tuple(event.channels) != tuple(channels):
        rows = {name: row for row, name in enumerate(event.channels)}
        absent = np.full(values.shape[1], math.nan)
        values = np.stack([values[rows[name]] if name in rows else absent for name in channels])
    return np.clip(values, -_FLOAT32_MAX, _FLOAT32_MAX).astype(np.float32)


def build_text_encoder(path: Path, *, max_tokens: int = 256, device: str | torch.device = "cpu") -> Encoder:
    """The base text encoder from a directory with a transformers model (safetensors) and its tokenizer.json.

    Raises:
        Misconfigured: a file is missing or is not what its name says.
    """
    for name in ("model.safetensors", TOKENIZER, CONFIG):
        if not (path / name).is_file():
            raise Misconfigured(f"the text model in {path} has no {name}")
    config = TextConfig(max_tokens=max_tokens)
    module, tokenizer = _text_parts(path / TOKENIZER, path / CONFIG, max_tokens)
    stored = safetensors.torch.load_file(path / "model.safetensors")
    wanted = module.state_dict()
    # A checkpoint may carry a pooling layer or a task's head, which mean pooling leaves unused.
    missing = [name for name in wanted if name.removeprefix("backbone.") not in stored]
    if missing:
        raise Misconfigured(f"{path / 'model.safetensors'} lacks {missing[0]} and {len(missing) - 1} more weights")
    _load(module, {name: stored[name.removeprefix("backbone.")] for name in wanted}, path)
    return TextEncoder(module, tokenizer, config, (path / TOKENIZER).read_bytes(), (path / CONFIG).read_bytes(), device)


def build_telemetry_encoder(
    channels: Sequence[str],
    seed: int,
    device: str | torch.device = "cpu",
    *,
    commands: Sequence[str] = (),
    window: int = 64,
    dimension: int = 256,
    learned: int = 32,
) -> Encoder:
    """The base telemetry encoder, from a seed and nothing else: no statistic of the data is needed yet.

    Args:
        channels: names in the order of a window's rows.
        commands: the channels among them that say what was done and mostly rest at 0.
        window: the usual number of time steps, which sets the scales that are looked at.
        dimension: d; half at most goes to statistics, the rest to commands, kernels and the trainable network.
        learned: components of the trainable network.

    Raises:
        Misconfigured: these do not fit together.
    """
    try:
        config = _plan(tuple(channels), tuple(commands), window=window, dimension=dimension, learned=learned, seed=seed)
    except ValueError as error:
        raise Misconfigured(str(error)) from error
    return TelemetryEncoder(seeded(config), config, device)


def load_encoder(
    spec: EncoderSpec,
    files: Mapping[str, Path],
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
) -> Encoder:
    """Rebuild the encoder that `spec` and its files describe, with the same bits.

    The caller has verified the files' digests. Nothing of the weights' size is allocated before their
    shapes are known to be the spec's.

    Args:
        precision: of a text encoder that is only to answer; telemetry is always float32.

    Raises:
        Misconfigured: int8 on a GPU, a file is missing, or its names, shapes or sizes are not those of the spec.
    """
    needed = (WEIGHTS, TOKENIZER, CONFIG) if spec.kind == "text" else (WEIGHTS,)
    for name in needed:
        if name not in files or not files[name].is_file():
            raise Misconfigured(f"the encoder's file {name} is missing")
    try:
        if spec.kind == "text":
            text = TextConfig.model_validate(spec.config)
            _check_shapes(_text_backbone(files[CONFIG], text.max_tokens, "meta"), files[WEIGHTS])
            module, tokenizer = _text_parts(files[TOKENIZER], files[CONFIG], text.max_tokens)
            _load(module, safetensors.torch.load_file(files[WEIGHTS]), files[WEIGHTS])
            _check_output(module, spec)
            encoder: Encoder = TextEncoder(
                module,
                tokenizer,
                text,
                files[TOKENIZER].read_bytes(),
                files[CONFIG].read_bytes(),
                device,
                spec,
                precision,
            )
        else:
            telemetry = TelemetryConfig.model_validate(spec.config)
            network = TelemetryModule(telemetry)
            _check_shapes(network, files[WEIGHTS])
            _load(network, safetensors.torch.load_file(files[WEIGHTS]), files[WEIGHTS])
            _check_output(network, spec)
            encoder = TelemetryEncoder(network, telemetry, device, spec)
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise Misconfigured(f"the encoder cannot be rebuilt: {error}") from error
    return encoder


class TextModule(nn.Module):
    """A transformer, mean pooling over the tokens that are not padding, length 1 (Reimers and Gurevych 2019)."""

    bound = 1.0

    def __init__(self, backbone: nn.Module, dimension: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.dimension = dimension

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L), 0 = padding -> (B, d) of length 1."""
        mask = ids != 0
        states: Tensor = self.backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weight = mask.to(states.dtype).unsqueeze(-1)
        pooled = (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        return nn.functional.normalize(pooled.float(), dim=1)


def _faster(module: TextModule, device: torch.device, precision: Precision) -> nn.Module:
    """The same network for answering only, its weights rounded; the module itself for float32."""
    if precision == "float32":
        return module
    if precision == "bfloat16":
        return copy.deepcopy(module).to(torch.bfloat16)
    if device.type != "cpu":
        raise Misconfigured("int8 is for the CPU; use bfloat16 on a GPU")
    with warnings.catch_warnings():
        # torch says that this moved to torchao, whose own is fast only where a C++ compiler is installed.
        warnings.simplefilter("ignore")
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        layers = {nn.Linear: per_channel_dynamic_qconfig}
        quantised: nn.Module = quantize_dynamic(module, layers, dtype=torch.qint8)  # type: ignore[no-untyped-call]
        return quantised


class TextEncoder:
    """A text encoder; see `Encoder`."""

    def __init__(
        self,
        module: TextModule,
        tokenizer: Tokenizer,
        config: TextConfig,
        tokenizer_file: bytes,
        config_file: bytes,
        device: str | torch.device,
        spec: EncoderSpec | None = None,
        precision: Precision = "float32",
    ) -> None:
        self.module = module.eval().to(device)
        self._answering = _faster(self.module, torch.device(device), precision)
        self._device = torch.device(device)
        self._tokenizer = tokenizer
        self._config = config
        self._fixed_files = {TOKENIZER: tokenizer_file, CONFIG: config_file}
        self.spec = spec or self.sealed()

    def collate(self, payloads: Sequence[Payload]) -> Tensor:
        return _pad_tokens(self._tokens(payloads))

    def embed(self, payloads: Sequence[Payload], *, repeatable: bool = False) -> npt.NDArray[np.float32]:
        out = np.empty((len(payloads), self.module.dimension), dtype=np.float32)
        tokens = self._tokens(payloads)
        budget = TEXT_BATCH_TOKENS_CUDA if self._device.type == "cuda" else TEXT_BATCH_TOKENS
        budget = 0 if repeatable else budget
        with torch.inference_mode():
            for rows in _batches([len(ids) for ids in tokens], budget):
                batch = _pad_tokens([tokens[row] for row in rows]).to(self._device, non_blocking=True)
                out[rows] = self._answering(batch).cpu().numpy()
        return np.clip(out, -1.0, 1.0, out=out)

    def files(self) -> dict[str, bytes]:
        return {WEIGHTS: _weights(self.module), **self._fixed_files}

    def sealed(self) -> EncoderSpec:
        return EncoderSpec(
            kind="text",
            dimension=self.module.dimension,
            bound=self.module.bound,
            config=self._config.model_dump(mode="json"),
            files=_digests(self.files()),
        )

    def _tokens(self, payloads: Sequence[Payload]) -> list[list[int]]:
        texts = [text for text in payloads if isinstance(text, str)]
        if len(texts) != len(payloads):
            raise ValueError("a text encoder takes texts")
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)] if texts else []


class TelemetryEncoder:
    """A telemetry encoder; see `Encoder`."""

    def __init__(
        self,
        module: TelemetryModule,
        config: TelemetryConfig,
        device: str | torch.device,
        spec: EncoderSpec | None = None,
    ) -> None:
        self.module = module.eval().to(device)
        self._device = torch.device(device)
        self._config = config
        self.spec = spec or self.sealed()

    def collate(self, payloads: Sequence[Payload]) -> Tensor:
        windows = self._windows(payloads)
        steps = max((window.shape[1] for window in windows), default=1)
        batch = torch.full((len(windows), len(self._config.channels), steps), math.nan)
        for row, window in enumerate(windows):
            batch[row, :, steps - window.shape[1] :] = torch.from_numpy(window)
        return batch

    def embed(self, payloads: Sequence[Payload], *, repeatable: bool = False) -> npt.NDArray[np.float32]:
        out = np.empty((len(payloads), self.module.dimension), dtype=np.float32)
        windows = self._windows(payloads)
        budget = 0 if repeatable else TELEMETRY_BATCH_VALUES // len(self._config.channels)
        with torch.inference_mode():
            for rows in _batches([window.shape[1] for window in windows], budget):
                batch = self.collate([windows[row] for row in rows]).to(self._device, non_blocking=True)
                out[rows] = self.module(batch).cpu().numpy()
        return np.clip(out, -self.module.bound, self.module.bound, out=out)

    def files(self) -> dict[str, bytes]:
        return {WEIGHTS: _weights(self.module)}

    def sealed(self) -> EncoderSpec:
        return EncoderSpec(
            kind="telemetry",
            dimension=self.module.dimension,
            bound=self.module.bound,
            config=self._config.model_dump(mode="json"),
            files=_digests(self.files()),
        )

    def _windows(self, payloads: Sequence[Payload]) -> list[Window]:
        windows = []
        for window in payloads:
            if isinstance(window, str) or window.ndim != 2 or window.shape[0] != len(self._config.channels):
                raise ValueError(f"this telemetry encoder takes windows of {len(self._config.channels)} channels")
            windows.append(np.ascontiguousarray(window, dtype=np.float32))
        return windows


def _plan(
    channels: tuple[str, ...], commands: tuple[str, ...], *, window: int, dimension: int, learned: int, seed: int
) -> TelemetryConfig:
    """Share out `dimension`: at most half to statistics and an eighth to commands, the rest to kernels.

    Raises:
        ValueError: `dimension` is too small, or `commands` do not leave a channel that measures.
    """
    if dimension < 2 * learned + 2:
        raise ValueError(f"{dimension} dimensions leave too little beside {learned} learned ones")
    switches = min(2 * len(commands), max(1, dimension // 8))
    measured = max(1, len(channels) - len(commands))
    statistics = min(measured * statistics_each(window), dimension // 2)
    return TelemetryConfig(
        channels=channels,
        commands=commands,
        window=window,
        statistics=statistics,
        switches=switches,
        kernels=max(0, dimension - statistics - switches - learned),
        learned=min(learned, dimension - statistics - switches),
        seed=seed,
    )


def _text_backbone(config_file: Path, max_tokens: int, device: str) -> TextModule:
    from transformers import AutoConfig, AutoModel

    try:
        values = json.loads(config_file.read_text())
        config = AutoConfig.for_model(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise Misconfigured(f"{config_file} does not describe a transformers model: {error}") from error
    if config.pad_token_id not in (0, None):
        raise Misconfigured(f"a text model pads with token 0, {config_file} says {config.pad_token_id}")
    # Random initial weights are overwritten at once; they must not move the process's generator.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        backbone = AutoModel.from_config(config)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    positions = getattr(config, "max_position_embeddings", max_tokens)
    if max_tokens > positions:
        raise Misconfigured(f"{config_file} has {positions} positions, too few for texts of {max_tokens} tokens")
    return TextModule(backbone, int(config.hidden_size))


def _text_parts(tokenizer_file: Path, config_file: Path, max_tokens: int) -> tuple[TextModule, Tokenizer]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # tokenizers raises bare Exception for any file that it cannot read
        raise Misconfigured(f"{tokenizer_file} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return _text_backbone(config_file, max_tokens, "cpu"), tokenizer


def _pad_tokens(tokens: Sequence[Sequence[int]]) -> Tensor:
    batch = np.zeros((len(tokens), max((len(ids) for ids in tokens), default=1)), dtype=np.int64)
    for row, ids in enumerate(tokens):
        batch[row, : len(ids)] = ids
    return torch.from_numpy(batch)


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Positions in batches of like length, none of more than `budget` once padded (but one at least)."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _weights(module: nn.Module) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    content: bytes = safetensors.torch.save(tensors)
    return content


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _check_shapes(module: nn.Module, weights: Path) -> None:
    """Compare the header of a weights file with a network, without reading a weight."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    with safetensors.safe_open(weights, framework="pt") as stored:
        found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    if found != wanted:
        name = next(name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name))
        raise Misconfigured(
            f"{weights} does not fit its spec: {name} is {found.get(name, 'absent')}, "
            f"expected {wanted.get(name, 'absent')}"
        )


def _check_output(module: TextModule | TelemetryModule, spec: EncoderSpec) -> None:
    if module.dimension != spec.dimension or module.bound != spec.bound:
        raise Misconfigured(
            f"the spec says {spec.dimension} dimensions within {spec.bound}, "
            f"its network gives {module.dimension} within {module.bound}"
        )


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise Misconfigured(f"{path} does not fit its spec: {error}") from error
