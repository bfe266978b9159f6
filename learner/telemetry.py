"""The telemetry network: windows of numbers in, one embedding each out.

The instant head can weigh many simple readings from the first label on, and a deep network is worth
nothing before it is trained. So most of an embedding is readings that need no training and no statistic
of the data; a small trainable network stands beside them for fine-tuning.

The file needs torch and nothing else, so that a copy of it can be handed out with the weights (`learner.handout`).
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from learner.spec import TelemetryConfig

TAPS, RAISED = 9, 3
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SMALLEST_BIAS, LARGEST_BIAS = 0.003, 1.0
"""Thresholds on levels are spread log-uniformly between these, because a channel's scale is unknown."""


class TelemetryModule(nn.Module):
    """Levels, shapes, spectrum, commands and a small trainable network over a window of numbers.

    No channel's scale need be known for an embedding to be finite and of use: levels are squashed by asinh,
    which is linear near zero and logarithmic far from it, orders of magnitude are logarithms, and shapes
    are measured in the window's own deviations. It is not indifferent to the unit, though: levels weigh
    most where values are of order 1. That ends with `centre` and `scale`, per-channel buffers that are 0
    and 1 until a fine-tune knows better (`set_statistics`). Four parts are concatenated:

    - statistics of each measured channel: the last value; over several stretches that all end with it
      level, spread, extremes and slope; quantiles and orders of magnitude of the whole window; how many
      distinct values there are and how often nothing moves; the variance of Haar wavelets, which is a
      spectrum in octaves (Percival 1995, "On estimation of the wavelet variance"), and autocorrelations;
    - the commands: on what share of the steps each was active, as a logarithm, and how long ago;
    - fixed convolution kernels of two weights with dilations, each pooled by the share of steps at which
      it exceeds its threshold (Dempster, Schmidt and Webb 2021, "MiniRocket"). MiniRocket takes its
      thresholds from training data. Here there is none yet: half of the kernels read the window brought to
      mean 0 and deviation 1, half the centred levels at thresholds of every order of magnitude;
    - a causal convolutional network, which fine-tuning trains.

    Every convolution looks back only, and steps before a window's first value are kept out of every
    pool, so NaN padding in front of a window changes nothing. A channel without any value gives zeros and
    the sign that it is absent.
    """

    bound = 16.0
    centre: Tensor
    scale: Tensor
    projection: Tensor | None
    switching: Tensor | None
    kernels: Tensor
    offsets: Tensor

    def __init__(self, config: TelemetryConfig) -> None:
        super().__init__()
        self.config = config
        self.dimension = config.dimension
        commands = set(config.commands)
        self._measured = [place for place, name in enumerate(config.channels) if name not in commands]
        self._commands = [place for place, name in enumerate(config.channels) if name in commands]
        channels, measured, window = len(config.channels), len(self._measured), config.window
        self._tails, self._lags, self._dilations = _tails(window), _lags(window), _dilations(window)
        readings, switched = measured * statistics_each(window), 2 * len(self._commands)
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("projection", _room(config.statistics, readings))
        self.register_buffer("switching", _room(config.switches, switched))
        self.register_buffer("kernels", torch.zeros(config.kernels, measured, TAPS))
        self.register_buffer("offsets", torch.zeros(config.kernels))
        hidden = max(config.learned, 1)
        self.conv1 = nn.Conv1d(3 * channels, hidden, 5)
        self.conv2 = nn.Conv1d(hidden, hidden, 5, dilation=max(1, min(4, window // 8)))
        self.out = nn.Linear(3 * hidden, config.learned)

    def set_statistics(self, centre: Tensor, scale: Tensor) -> None:
        """Set each channel's centre and scale (C,), as robust statistics of seen windows give them."""
        finite = bool(torch.isfinite(centre).all() and torch.isfinite(scale).all() and (scale > 0).all())
        if centre.shape != self.centre.shape or scale.shape != self.scale.shape or not finite:
            raise ValueError("centre and scale have one finite value a channel, and scales are positive")
        self.centre.copy_(centre)
        self.scale.copy_(scale)

    def draw(self) -> None:
        """Draw kernels and projections from torch's generator, which the caller has seeded."""
        for matrix in (self.projection, self.switching):
            if matrix is not None:
                matrix.copy_(torch.randn_like(matrix) / math.sqrt(matrix.shape[1]))
        patterns = list(itertools.combinations(range(TAPS), RAISED))
        measured = len(self._measured)
        for kernel, weights in enumerate(self.kernels):
            # As in ROCKET, a random subset of channels whose size is log-uniform.
            used = int(2 ** (torch.rand(()).item() * math.log2(measured + 1)))
            chosen = torch.randperm(measured)[: max(1, min(used, measured))].tolist()
            # As in MiniRocket, three weights of 2 and six of -1; here of length 1, shared by the channels.
            unit = 1.0 / math.sqrt((RAISED * 4 + TAPS - RAISED) * len(chosen))
            for channel in chosen:
                weights[channel] = -unit
                weights[channel, list(patterns[int(torch.randint(len(patterns), ()))])] = 2.0 * unit
            ratio = torch.rand(()).item()
            size = (
                0.3 + 0.7 * ratio if self._reads_shape(kernel) else SMALLEST_BIAS ** (1 - ratio) * LARGEST_BIAS**ratio
            )
            self.offsets[kernel] = torch.randn(()).item() * size

    def forward(self, windows: Tensor) -> Tensor:
        """Windows (B, C, T), NaN = missing -> (B, d) within the bound."""
        seen = ~torch.isnan(windows)
        filled, valid = _fill(torch.nan_to_num(windows), seen)
        # The largest number there is, in a unit that is small, is larger than that.
        x = torch.nan_to_num((filled - self.centre[:, None]) / self.scale[:, None])
        present = seen.any(dim=2)
        x = x * present[..., None]
        mask = valid[:, None]
        steps = valid.sum(dim=1).clamp(min=1.0)[:, None]
        level = torch.asinh(x) * mask
        mean = level.sum(dim=2, keepdim=True) / steps[..., None]
        centred = (level - mean) * mask
        spread = (centred.square().sum(dim=2, keepdim=True) / steps[..., None]).sqrt()
        # What is smaller than float32 can tell beside the level is rounding, not shape.
        shape = centred / (spread + 1e-5 * mean.abs() + 1e-20)
        missing = (~seen).to(level.dtype) * mask
        m = self._measured
        readings = [
            *self._stretches(level[:, m], shape[:, m], valid),
            *self._values(x[:, m], level[:, m], spread[:, m, 0], valid),
            *self._moves(level[:, m], shape[:, m], valid),
            *self._waves(shape[:, m], valid),
        ]
        absent = torch.where(present, missing.sum(dim=2) / steps, 1.0)[:, m]
        known = present[:, m, None] * torch.nan_to_num(torch.stack(readings, dim=2), posinf=0.0, neginf=0.0)
        parts = [_projected(torch.cat([known, absent[..., None]], dim=2).flatten(1), self.projection)]
        if self._commands:
            active = (filled[:, self._commands] != 0) * mask
            parts.append(_projected(self._switches(active, steps), self.switching))
        if self.config.kernels:
            parts.append(self._shares(centred[:, m], shape[:, m], valid))
        if self.config.learned:
            parts.append(self._learned(level, shape, missing, valid))
        return self.bound * torch.tanh(torch.cat(parts, dim=1) / self.bound)

    def _stretches(self, level: Tensor, shape: Tensor, valid: Tensor) -> list[Tensor]:
        """The last value, and level, spread, extremes and slope of every tail; (B, C) each."""
        last = shape[:, :, -1]
        previous = shape[:, :, -2] if shape.shape[2] > 1 else last
        readings = [level[:, :, -1], last, last - previous]
        for length in self._tails:
            mask = valid[:, None, -length:]
            hidden = mask == 0
            count = mask.sum(dim=2).clamp(min=1.0)
            tail = level[:, :, -length:]
            mean = tail.sum(dim=2) / count
            centred = (tail - mean[..., None]) * mask
            readings += [mean, (centred.square().sum(dim=2) / count).sqrt()]
            readings += [
                tail.masked_fill(hidden, math.inf).amin(dim=2),
                tail.masked_fill(hidden, -math.inf).amax(dim=2),
            ]
            time = torch.arange(1 - tail.shape[2], 1, device=level.device, dtype=level.dtype) / length
            clock = (time - ((time * mask).sum(dim=2) / count)[..., None]) * mask
            along = (clock * shape[:, :, -length:]).sum(dim=2)
            readings.append(0.5 * along / clock.square().sum(dim=2).clamp(min=1e-3))
        return readings

    def _values(self, x: Tensor, level: Tensor, spread: Tensor, valid: Tensor) -> list[Tensor]:
        """Orders of magnitude, quantiles and the number of distinct values; (B, C) each.

        The logarithm's floor lies far below any unit, for channels that never come near 1, where asinh
        would see only zero.
        """
        steps = valid.sum(dim=1).clamp(min=1.0)[:, None]
        mask = valid[:, None]
        size = (x.abs() * mask).sum(dim=2) / steps
        readings = [0.25 * torch.log(size + 1e-12), 0.25 * torch.log(spread + 1e-6)]
        order = level.masked_fill(mask == 0, math.inf).sort(dim=2).values
        for share in QUANTILES:
            place = ((steps - 1.0) * share).round().long()[..., None].expand(-1, level.shape[1], 1)
            readings.append(order.gather(2, place)[:, :, 0])
        rises = order.diff(dim=2)
        distinct = 1 + ((rises > 0) & torch.isfinite(rises)).sum(dim=2)
        return [*readings, 0.25 * torch.log(distinct.to(level.dtype))]

    def _moves(self, level: Tensor, shape: Tensor, valid: Tensor) -> list[Tensor]:
        """How often and how far one step differs from the next; (B, C) each."""
        pair = (valid[:, 1:] * valid[:, :-1])[:, None]
        pairs = pair.sum(dim=2).clamp(min=1.0)
        move, jump = shape.diff(dim=2).abs(), level.diff(dim=2).abs()
        shares = [((found * pair).sum(dim=2) / pairs) for found in (move == 0, move < 0.05, move > 1.0)]
        return [*shares, 0.25 * torch.log((jump * pair).sum(dim=2) / pairs + 1e-6)]

    def _waves(self, shape: Tensor, valid: Tensor) -> list[Tensor]:
        """Variance of the Haar wavelet and autocorrelation at every lag; (B, C) each.

        What does not fit into a short window is zero, as it is when that window is padded.
        """
        steps = valid.sum(dim=1).clamp(min=1.0)[:, None]
        mask = valid[:, None]
        sums = nn.functional.pad(shape.cumsum(dim=2), (1, 0))
        begun = nn.functional.pad(mask.cumsum(dim=2), (1, 0))
        readings = []
        for lag in self._lags:
            power = same = torch.zeros_like(shape[:, :, 0])
            if shape.shape[2] >= 2 * lag:
                wave = (sums[:, :, 2 * lag :] - 2.0 * sums[:, :, lag:-lag] + sums[:, :, : -2 * lag]) / lag
                whole = (begun[:, :, 2 * lag :] - begun[:, :, : -2 * lag] >= 2 * lag).to(shape.dtype)
                power = (wave.square() * whole).sum(dim=2) / whole.sum(dim=2).clamp(min=1.0)
            if shape.shape[2] > lag:
                same = (shape[:, :, lag:] * shape[:, :, :-lag]).sum(dim=2) / steps
            readings += [0.2 * torch.log(power + 1e-3), same]
        return readings

    def _switches(self, active: Tensor, steps: Tensor) -> Tensor:
        """Share of active steps and how lately each command (B, K, T) was active, (B, 2K)."""
        share = 0.25 * torch.log(active.sum(dim=2) / steps + 0.3 / self.config.window)
        age = torch.arange(active.shape[2] - 1, -1, -1, device=active.device)
        recent = 0.5 * (active * torch.exp(age * (-4.0 / self.config.window))).amax(dim=2)
        return torch.cat([share, recent], dim=1)

    def _shares(self, centred: Tensor, shape: Tensor, valid: Tensor) -> Tensor:
        """Share of the steps at which each kernel exceeds its threshold, (B, kernels).

        The factor brings them near the spread of the statistics: the head's shrinkage spares the
        directions that vary most.
        """
        mask = valid[:, None]
        steps = valid.sum(dim=1).clamp(min=1.0)[:, None]
        shares = []
        groups = 2 * len(self._dilations)
        for group in range(min(groups, len(self.kernels))):
            source = shape if self._reads_shape(group) else centred
            response = _causal(
                source, self.kernels[group::groups], self.offsets[group::groups], self._dilations[group // 2]
            )
            shares.append(2.0 * ((response > 0) * mask).sum(dim=2) / steps)
        return torch.cat(shares, dim=1)

    @staticmethod
    def _reads_shape(kernel: int) -> bool:
        return kernel % 2 == 1

    def _learned(self, level: Tensor, shape: Tensor, missing: Tensor, valid: Tensor) -> Tensor:
        """The trainable part, (B, learned)."""
        mask = valid[:, None]
        x = torch.cat([level / 4.0, shape, missing], dim=1)
        for conv in (self.conv1, self.conv2):
            x = nn.functional.gelu(_causal(x, conv.weight, conv.bias, conv.dilation[0])) * mask
        mean = x.sum(dim=2) / valid.sum(dim=1).clamp(min=1.0)[:, None]
        peak = torch.nan_to_num(x.masked_fill(mask == 0, -math.inf).amax(dim=2), neginf=0.0)
        learned: Tensor = self.out(torch.cat([x[:, :, -1], mean, peak], dim=1))
        return learned


def seeded(config: TelemetryConfig) -> TelemetryModule:
    """A telemetry network whose every random number comes from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = TelemetryModule(config)
        module.draw()
    return module


def statistics_each(window: int) -> int:
    """Readings that each measured channel gives."""
    return 3 + 5 * len(_tails(window)) + 2 + len(QUANTILES) + 1 + 4 + 2 * len(_lags(window)) + 1


def _tails(window: int) -> list[int]:
    """Lengths, in steps, of the tails that statistics look at; the last is the whole window."""
    return sorted({max(2, math.ceil(window / parts)) for parts in (27, 9, 3, 1)})


def _lags(window: int) -> list[int]:
    """Up to six octaves, while a wavelet of two lags still fits into the window."""
    return [2**octave for octave in range(6) if 2 ** (octave + 1) <= window]


def _dilations(window: int) -> list[int]:
    """Powers of two while a kernel still fits into the window."""
    most = max(1, (window - 1) // (TAPS - 1))
    return [2**power for power in range(int(math.log2(most)) + 1)]


def _room(components: int, readings: int) -> Tensor | None:
    """Where a random projection goes, if there are more readings than components for them."""
    return torch.zeros(components, readings) if components < readings else None


def _projected(readings: Tensor, matrix: Tensor | None) -> Tensor:
    return readings if matrix is None else readings @ matrix.T


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
