"""Encoders: a batch of texts or telemetry windows in, one embedding each out.

Both kinds are one `torch.nn.Module` that takes one tensor, so the same object serves the worker, the
instant head and fine-tuning. What rebuilds an encoder is its `EncoderSpec` and its files
(safetensors and JSON, never pickle); a rebuilt encoder has the same bits as the one that was stored.

transformers takes seconds to import and tokenizers some memory, so both are imported where a text
encoder is built: a worker that serves only telemetry pays for neither.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from learner.spec import EncoderSpec, TelemetryConfig, TextConfig
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

    Raises:
        ValueError: the event lacks a channel; the wire's rules refuse such events before.
    """
    if isinstance(event, Report):
        return event.text
    values = np.array(event.values, dtype=np.float64)
    if tuple(event.channels) != tuple(channels):
        values = values[[event.channels.index(channel) for channel in channels]]
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
    window: int = 64,
    dimension: int = 256,
    learned: int = 32,
) -> Encoder:
    """The base telemetry encoder, from a seed and nothing else: no statistic of the data is needed yet.

    Args:
        channels: names in the order of a window's rows.
        window: the usual number of time steps, which sets the scales that are looked at.
        dimension: d; half at most goes to statistics, the rest to kernels and the trainable network.
        learned: components of the trainable network; one more where the rest is odd.
    """
    if dimension < 2 * learned + 2:
        raise Misconfigured(f"{dimension} dimensions leave too little beside {learned} learned ones")
    statistics = min(len(channels) * _statistics_each(window), dimension // 2)
    kernels = (dimension - statistics - learned) // 2
    config = TelemetryConfig(
        channels=tuple(channels),
        window=window,
        statistics=statistics,
        kernels=kernels,
        learned=dimension - statistics - 2 * kernels,
        seed=seed,
    )
    return TelemetryEncoder(_seeded(config), config, device)


def load_encoder(spec: EncoderSpec, files: Mapping[str, Path], device: str | torch.device = "cpu") -> Encoder:
    """Rebuild the encoder that `spec` and its files describe, with the same bits.

    The caller has verified the files' digests. Nothing of the weights' size is allocated before their
    shapes are known to be the spec's.

    Raises:
        Misconfigured: a file is missing, or its names, shapes or sizes are not those of the spec.
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
                module, tokenizer, text, files[TOKENIZER].read_bytes(), files[CONFIG].read_bytes(), device, spec
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
    ) -> None:
        self.module = module.eval().to(device)
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
                out[rows] = self.module(batch).cpu().numpy()
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


class TelemetryModule(nn.Module):
    """Levels, shapes and a small trainable network over a window of numbers of unknown scale.

    Nothing need be known of a channel's scale: levels are squashed by asinh, which is linear near zero
    and logarithmic far from it, orders of magnitude are logarithms, and trends are measured in the
    window's own deviations. `centre` and `scale` are per-channel buffers, 0 and 1 until a fine-tune
    knows better (`set_statistics`). Three parts are concatenated:

    - the last value, and over several stretches that all end with it level, spread, extremes, slope
      and order of magnitude;
    - fixed random kernels on each window brought to mean 0 and deviation 1, pooled by their maximum
      and by the share of positive values (Dempster, Petitjean and Webb 2020, "ROCKET"; 2021, "MiniRocket");
    - a causal convolutional network, which fine-tuning trains.

    Every convolution looks back only, and steps before a window's first value are kept out of every
    pool, so NaN padding in front of a window changes nothing.
    """

    bound = 16.0
    _taps = 9
    centre: Tensor
    scale: Tensor
    projection: Tensor | None
    kernels: Tensor
    offsets: Tensor

    def __init__(self, config: TelemetryConfig) -> None:
        super().__init__()
        self.config = config
        self.dimension = config.dimension
        channels, window = len(config.channels), config.window
        self._scales = _scales(window)
        raw = channels * _statistics_each(window)
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("projection", torch.zeros(config.statistics, raw) if config.statistics < raw else None)
        self._dilations = _dilations(window, self._taps)
        self.register_buffer("kernels", torch.zeros(config.kernels, channels, self._taps))
        self.register_buffer("offsets", torch.zeros(config.kernels))
        hidden = max(config.learned, 1)
        self.conv1 = nn.Conv1d(3 * channels, hidden, 5)
        self.conv2 = nn.Conv1d(hidden, hidden, 5, dilation=max(1, min(4, window // 8)))
        self.out = nn.Linear(3 * hidden, config.learned)

    def set_statistics(self, centre: Tensor, scale: Tensor) -> None:
        """Set each channel's centre and scale (C,), as robust statistics of seen windows give them."""
        if centre.shape != self.centre.shape or scale.shape != self.scale.shape or not bool((scale > 0).all()):
            raise ValueError("centre and scale have one finite value a channel, and scales are positive")
        self.centre.copy_(centre)
        self.scale.copy_(scale)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows (B, C, T), NaN = missing -> (B, d) within the bound."""
        x = (windows - self.centre[:, None]) / self.scale[:, None]
        seen = ~torch.isnan(x)
        x, valid = _fill(torch.nan_to_num(x), seen)
        level = torch.asinh(x)
        mask = valid[:, None]
        count = valid.sum(dim=1).clamp(min=1.0)[:, None]
        mean = (level * mask).sum(dim=2, keepdim=True) / count[..., None]
        centred = (level - mean) * mask
        spread = (centred.square().sum(dim=2, keepdim=True) / count[..., None]).sqrt()
        # What is smaller than float32 can tell beside the level is rounding, not shape.
        shape = centred / (spread + 1e-5 * mean.abs() + 1e-20)
        missing = (~seen).to(level.dtype) * mask
        parts = [self._statistics(x, level, shape, valid, missing)]
        if self.config.kernels:
            parts.append(self._shapes(shape, valid))
        if self.config.learned:
            parts.append(self._learned(level, shape, missing, valid))
        bound = self.bound
        return bound * torch.tanh(torch.cat(parts, dim=1) / bound)

    def _statistics(self, x: Tensor, level: Tensor, shape: Tensor, valid: Tensor, missing: Tensor) -> Tensor:
        """Levels at every scale, (B, statistics)."""
        last = shape[:, :, -1]
        previous = shape[:, :, -2] if shape.shape[2] > 1 else last
        absent = missing.sum(dim=2) / valid.sum(dim=1).clamp(min=1.0)[:, None]
        parts = [level[:, :, -1], last, last - previous, absent]
        for scale in self._scales:
            mask = valid[:, None, -scale:]
            hidden = mask == 0
            count = mask.sum(dim=2).clamp(min=1.0)
            tail, bend = level[:, :, -scale:], shape[:, :, -scale:]
            mean = (tail * mask).sum(dim=2) / count
            centred = (tail - mean[..., None]) * mask
            parts += [mean, (centred.square().sum(dim=2) / count).sqrt()]
            parts += [tail.masked_fill(hidden, math.inf).amin(dim=2), tail.masked_fill(hidden, -math.inf).amax(dim=2)]
            time = torch.arange(1 - tail.shape[2], 1, device=level.device, dtype=level.dtype) / scale
            clock = (time - ((time * mask).sum(dim=2) / count)[..., None]) * mask
            parts.append(0.5 * (clock * bend).sum(dim=2) / clock.square().sum(dim=2).clamp(min=1e-3))
            # The order of magnitude, for channels that never come near 1, where asinh would see only zero.
            size = (x[:, :, -scale:].abs() * mask).sum(dim=2) / count
            parts.append(0.25 * torch.log(size + 1e-12))
        features = torch.nan_to_num(torch.cat(parts, dim=1), posinf=0.0, neginf=0.0)
        return features if self.projection is None else features @ self.projection.T

    def _shapes(self, shape: Tensor, valid: Tensor) -> Tensor:
        """Share of positive values and maximum of every kernel, (B, 2 * kernels).

        Their factors bring both near the spread of the statistics: the head's shrinkage spares the
        directions that vary most, and raw maxima would drown the levels while examples are few.
        """
        shares, peaks = [], []
        count = valid.sum(dim=1).clamp(min=1.0)[:, None]
        hidden = valid[:, None] == 0
        for group, dilation in enumerate(self._dilations):
            kernels = self.kernels[group :: len(self._dilations)]
            if not len(kernels):
                continue
            response = _causal(shape, kernels, self.offsets[group :: len(self._dilations)], dilation)
            shares.append(2.0 * ((response > 0) & ~hidden).to(shape.dtype).sum(dim=2) / count)
            peaks.append(0.25 * response.masked_fill(hidden, -math.inf).amax(dim=2))
        return torch.nan_to_num(torch.cat([*shares, *peaks], dim=1), neginf=0.0)

    def _learned(self, level: Tensor, shape: Tensor, missing: Tensor, valid: Tensor) -> Tensor:
        """The trainable part, (B, learned)."""
        mask = valid[:, None]
        x = torch.cat([level / 4.0 * mask, shape, missing], dim=1)
        for conv in (self.conv1, self.conv2):
            x = nn.functional.gelu(_causal(x, conv.weight, conv.bias, conv.dilation[0])) * mask
        mean = x.sum(dim=2) / valid.sum(dim=1).clamp(min=1.0)[:, None]
        peak = torch.nan_to_num(x.masked_fill(mask == 0, -math.inf).amax(dim=2), neginf=0.0)
        learned: Tensor = self.out(torch.cat([x[:, :, -1], mean, peak], dim=1))
        return learned


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


def _seeded(config: TelemetryConfig) -> TelemetryModule:
    """A telemetry network whose every random number comes from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = TelemetryModule(config)
        channels = len(config.channels)
        if module.projection is not None:
            module.projection.copy_(torch.randn_like(module.projection) / math.sqrt(module.projection.shape[1]))
        for kernel in range(config.kernels):
            # As in ROCKET: weights of mean 0, on a random subset of channels whose size is log-uniform.
            used = int(2 ** (torch.rand(()).item() * math.log2(channels + 1)))
            chosen = torch.randperm(channels)[: max(1, min(used, channels))]
            taps = torch.randn(len(chosen), TelemetryModule._taps)
            taps = (taps - taps.mean(dim=1, keepdim=True)) / math.sqrt(taps.numel())
            module.kernels[kernel, chosen] = taps
            module.offsets[kernel] = torch.rand(()).item() * 2.0 - 1.0
    return module


def _scales(window: int) -> list[int]:
    """Lengths, in steps, of the tails that statistics look at; the last is the whole window."""
    return sorted({max(2, math.ceil(window / parts)) for parts in (27, 9, 3, 1)})


def _statistics_each(window: int) -> int:
    return 4 + 6 * len(_scales(window))


def _dilations(window: int, taps: int) -> list[int]:
    """Powers of two while a kernel still fits into the window."""
    most = max(1, (window - 1) // (taps - 1))
    return [2**power for power in range(int(math.log2(most)) + 1)]


def _fill(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Missing values filled from the last seen one, else from the first; and the mask (B, T) of steps to count.

    A step counts from the first on at which any channel was seen.
    """
    steps = torch.arange(x.shape[2], device=x.device)
    last = torch.where(seen, steps, -1).cummax(dim=2).values
    first = torch.where(seen, steps, x.shape[2] - 1).amin(dim=2, keepdim=True)
    source = torch.where(last >= 0, last, first)
    filled = x.gather(2, source)
    valid = seen.any(dim=1).cummax(dim=1).values.to(x.dtype)
    return filled, valid


def _causal(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padded = nn.functional.pad(x, ((weight.shape[2] - 1) * dilation, 0))
    return nn.functional.conv1d(padded, weight, bias, dilation=dilation)


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
