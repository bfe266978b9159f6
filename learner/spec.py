"""What an encoder is, apart from its weights and from the code that computes with it.

torch takes seconds to import. Whoever only reads settings, manifests or jobs needs the shape of an encoder and
not the encoder, so it is described here with pydantic alone, and the command line answers at once.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class EncoderSpec(BaseModel):
    """All that is needed, with the files it names, to rebuild an encoder.

    Args:
        kind: what it reads.
        dimension: d, the length of an embedding.
        bound: no component of an embedding is larger than this in absolute value.
        config: the shape of the network; see `TextConfig` and `TelemetryConfig`.
        files: SHA-256 (hex) of each file by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["text", "telemetry"]
    dimension: int = Field(ge=1, le=16_384)
    bound: float = Field(gt=0, allow_inf_nan=False)
    config: dict[str, Any]
    files: dict[str, str]


class TextConfig(BaseModel):
    """The shape of a text encoder: texts are cut to `max_tokens`, token 0 is padding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(ge=8, le=8192)
    pooling: Literal["mean"] = "mean"


class TelemetryConfig(BaseModel):
    """The shape of a telemetry encoder.

    Args:
        channels: names of the C channels, in the order of a window's rows.
        window: the usual number of time steps; other lengths are taken too.
        statistics: components for levels and trends; where there are more of them, a random projection.
        kernels: number of fixed random convolution kernels, each giving two components.
        learned: components of the small trainable network.
        seed: of the random kernels and the initial weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: tuple[str, ...] = Field(min_length=1, max_length=1024)
    window: int = Field(ge=1, le=10_000)
    statistics: int = Field(ge=1, le=8192)
    kernels: int = Field(ge=0, le=4096)
    learned: int = Field(ge=0, le=1024)
    seed: int

    @property
    def dimension(self) -> int:
        """d: statistics, two components a kernel, and the learned ones."""
        return self.statistics + 2 * self.kernels + self.learned
