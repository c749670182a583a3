"""Where a run stands, and which global batch comes next."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_md.batch import BatchPosition
from megatron_md.config import Config


@dataclass(frozen=True)
class Progress:
    """All integers, so that nothing drifts.

    Attributes:
        step: optimizer steps done.
        next_sample_index: the sample_index that the next global batch starts at.
        tokens: tokens served so far.
        total_tokens: tokens of the whole run, frozen at its start (a curriculum's progress is tokens / total_tokens).
    """

    step: int
    next_sample_index: int
    tokens: int
    total_tokens: int

    @classmethod
    def start(cls, config: Config) -> Progress:
        """Progress of a run that has not begun."""
        rows = sum(batch_size_at(config, step) for step in range(config.train.steps))
        return cls(0, 0, 0, rows * config.data.seq_length)

    def batch_position(self, config: Config) -> BatchPosition:
        """The global batch of the next step."""
        fraction = min(1.0, self.tokens / self.total_tokens)
        return BatchPosition(self.next_sample_index, batch_size_at(config, self.step), fraction)

    def after(self, config: Config) -> Progress:
        """Progress once the next step is done."""
        rows = batch_size_at(config, self.step)
        return replace(
            self,
            step=self.step + 1,
            next_sample_index=self.next_sample_index + rows,
            tokens=self.tokens + rows * config.data.seq_length,
        )


def batch_size_at(config: Config, step: int) -> int:
    """Global batch size of a step: constant, or rising by `increment` in equal stretches of the ramp."""
    full, ramp = config.train.global_batch_size, config.train.batch_ramp
    if ramp is None or step >= ramp.steps:
        return full
    rises = -(-(full - ramp.start) // ramp.increment)
    return min(full, ramp.start + ramp.increment * (step * rises // ramp.steps))
