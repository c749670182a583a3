"""Mask schedules that have a name of their own, with where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_md.diffusion._schedule_base import MaskSchedule, parse_schedule, register_schedule
from megatron_md.errors import UserError


@dataclass(frozen=True)
class Preset:
    """A schedule as a config would spell it, and its source."""

    schedule: str | Mapping[str, Any]
    source: str

    def from_text(self, arguments: str) -> MaskSchedule:
        """The schedule; its name stands alone."""
        return self._alone(arguments)

    def from_mapping(self, options: Mapping[str, Any]) -> MaskSchedule:
        """The schedule; its name stands alone."""
        return self._alone(options)

    def _alone(self, more: object) -> MaskSchedule:
        if more:
            raise UserError(f"is the name of {self.schedule}, and takes nothing else: write that out instead")
        return parse_schedule(self.schedule)


PRESETS = {
    "llada": Preset("uniform:0,1", "all mask rates: LLaDA, arXiv 2502.09992, and most others"),
    "paper": Preset("uniform:0.45,0.55", "pretraining, and fine-tuning for likelihood: arXiv 2601.22450"),
    "window-uniform": Preset(
        {"name": "anneal", "from": "uniform:0.45,0.55", "to": "uniform:0,1", "over": [0.5, 1.0]},
        "pretraining, the best of eleven at equal FLOPs: docs/studies.md",
    ),
    "paper-generation": Preset("uniform:0.5,1", "fine-tuning for generation: arXiv 2601.22450"),
    "llada2-sft": Preset("uniform:0.3,0.8", "dFactory's default for fine-tuning LLaDA2.0; no ablation is published"),
    "bell": Preset(
        "logit_normal:0,1",
        "arXiv 2605.13026 argues for a bell; this one is that of Stable Diffusion 3 (arXiv 2403.03206), not theirs",
    ),
}
for _name, _preset in PRESETS.items():
    register_schedule(_name)(_preset)
