"""What an encoder is, apart from its weights and from the code that computes with it.

torch takes seconds to import. Whoever only reads settings, manifests or jobs needs the shape of an encoder and
not the encoder, so it is described here with pydantic alone, and the command line answers at once.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["float32", "bfloat16", "int8"]
"""How a text encoder multiplies where it only answers; weights are stored, trained and learned from in float32."""


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
        commands: those among them that say what was done (bits, counts, switches) and mostly rest at 0.
        window: the usual number of time steps; other lengths are taken too.
        statistics: components for levels, trends, flatness and spectrum of the measured channels; where
            there are more readings than components, a random projection.
        switches: likewise for the commands.
        kernels: number of fixed random convolution kernels, one component each.
        learned: components of the small trainable network.
        seed: of the random kernels, the projections and the initial weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: tuple[str, ...] = Field(min_length=1, max_length=1024)
    commands: tuple[str, ...] = ()
    window: int = Field(ge=1, le=10_000)
    statistics: int = Field(ge=1, le=8192)
    switches: int = Field(default=0, ge=0, le=8192)
    kernels: int = Field(ge=0, le=4096)
    learned: int = Field(ge=0, le=1024)
    seed: int

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if not set(self.commands) < set(self.channels):
            raise ValueError("commands are some of the channels, and at least one channel is not a command")
        if bool(self.commands) != bool(self.switches):
            raise ValueError("components for commands go with commands")
        return self

    @property
    def dimension(self) -> int:
        """d: statistics, switches, one component a kernel, and the learned ones."""
        return self.statistics + self.switches + self.kernels + self.learned
