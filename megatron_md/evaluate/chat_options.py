"""How to chat, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_md.diffusion.sampler_config import SamplerConfig


@dataclass(frozen=True)
class ChatOptions:
    """How to chat.

    Attributes:
        length: most tokens of an answer.
        sampler: the other keys of `SamplerConfig` that were given; the seed is that of the first answer.
        template: as `ChatTemplate.of` takes it; the run's own if None.
        system: system text, None for the template's.
        stream: show the canvas of an answer while it is filled.
    """

    length: int
    sampler: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    system: str | None = None
    stream: bool = False

    def config(self) -> SamplerConfig:
        """How answers are written: they end where the run ends them.

        Raises:
            UserError: the options contradict each other.
        """
        return SamplerConfig(**{"eos": "stop", **self.sampler, "length": self.length})
