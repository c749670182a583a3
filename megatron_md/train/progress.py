"""Where a run stands, and which global batch comes next."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megatron_md.batch import BatchPosition
from megatron_md.config import Config
from megatron_md.train.bad_numbers import RECORD, GuardState, Whole

if TYPE_CHECKING:
    from megatron_md.data.stream import RowStream


@dataclass(frozen=True)
class Progress:
    """Positions are integers, so that nothing drifts; the rest comes back from JSON to the bit.

    Records of older releases lack the guard.

    Attributes:
        step: optimizer steps done; one whose update was left out counts as well.
        next_sample_index: the sample_index that the next global batch starts at.
        tokens: tokens served so far.
        total_tokens: tokens of the whole run, frozen at its start (a curriculum's progress is tokens / total_tokens).
        jumps: [first, stop) ranges of g that no batch begins in: bad numbers came of them.
        guard: what the guard against bad numbers remembers.
    """

    __pydantic_config__ = RECORD

    step: Whole
    next_sample_index: Whole
    tokens: Whole
    total_tokens: Annotated[Whole, Field(gt=0)]
    jumps: tuple[tuple[Whole, Whole], ...] = ()
    guard: GuardState = field(default_factory=GuardState)

    @classmethod
    def start(cls, config: Config, stream: RowStream | None = None) -> Progress:
        """Progress of a run that has not begun.

        Args:
            config: the run, its steps counted.
            stream: its rows; where they are not to be had, they count as full ones.
        """
        assert config.train.epochs is None, "counted before"
        is_ragged = stream is not None and stream.is_ragged
        if not (config.data.random_length_fraction or is_ragged):
            return cls(0, 0, 0, rows_before(config, config.train.steps) * config.data.seq_length)
        rows = tokens = 0
        for step in range(config.train.steps):
            size = batch_size_at(config, step)
            tokens += size * row_length_at(config, rows, size, stream)
            rows += size
        return cls(0, 0, 0, tokens)

    def batch_position(self, config: Config) -> BatchPosition:
        """The global batch of the next step."""
        fraction = min(1.0, self.tokens / self.total_tokens)
        return BatchPosition(self.next_sample_index, batch_size_at(config, self.step), fraction)

    def row_length(self, config: Config, stream: RowStream | None = None) -> int:
        """Tokens per row of the next step's global batch; see `row_length_at`."""
        return row_length_at(config, self.next_sample_index, batch_size_at(config, self.step), stream)

    def after(self, config: Config, stream: RowStream | None = None) -> Progress:
        """Progress once the next step is done."""
        rows = batch_size_at(config, self.step)
        return replace(
            self,
            step=self.step + 1,
            next_sample_index=self._beyond_jumps(self.next_sample_index + rows),
            tokens=self.tokens + rows * self.row_length(config, stream),
        )

    def with_jumps(self, jumps: tuple[tuple[int, int], ...]) -> Progress:
        """The same place in the run, with these ranges of g to be left out from here on."""
        progress = replace(self, jumps=jumps)
        return replace(progress, next_sample_index=progress._beyond_jumps(self.next_sample_index))

    def _beyond_jumps(self, sample_index: int) -> int:
        for first, stop in sorted(self.jumps):
            if first <= sample_index < stop:
                sample_index = stop
        return sample_index


def batch_size_at(config: Config, step: int) -> int:
    """Global batch size of a step: constant, or rising by `increment` in equal stretches of the ramp."""
    full, ramp = config.train.global_batch_size, config.train.batch_ramp
    if ramp is None or step >= ramp.steps:
        return full
    rises = -(-(full - ramp.start) // ramp.increment)
    return min(full, ramp.start + ramp.increment * (step * rises // ramp.steps))


def rows_before(config: Config, step: int) -> int:
    """Rows of the global batches before `step`: the sum of `batch_size_at`, without going through the steps."""
    full, ramp = config.train.global_batch_size, config.train.batch_ramp
    if ramp is None:
        return step * full
    ramped = min(step, ramp.steps)
    rises = -(-(full - ramp.start) // ramp.increment)
    return ramped * ramp.start + ramp.increment * _sum_of_floors(ramped, rises, ramp.steps) + (step - ramped) * full


def _sum_of_floors(count: int, numerator: int, denominator: int, offset: int = 0) -> int:
    """Sum over i < count of (numerator * i + offset) // denominator, by the steps of Euclid's algorithm.

    The integer points under a line are counted by columns, then, with the axes exchanged, by rows.
    """
    total = 0
    while count:
        total += numerator // denominator * (count * (count - 1) // 2) + offset // denominator * count
        numerator, offset = numerator % denominator, offset % denominator
        count, offset = divmod(numerator * count + offset, denominator)
        numerator, denominator = denominator, numerator
    return total


def row_length_at(config: Config, first_sample_index: int, rows: int = 1, stream: RowStream | None = None) -> int:
    """Tokens per row of the global batch of so many rows that starts at this g.

    Of dialogues that of the longest in the batch, rounded up to a multiple of `Config.row_unit` or `data.seq_length`:
    every rank finds it in the corpus' indexes. Else `_drawn_length`.
    """
    if stream is None or not stream.is_ragged:
        return _drawn_length(config, first_sample_index)
    longest = int(stream.row_lengths(range(first_sample_index, first_sample_index + rows)).max())
    return min(config.data.seq_length, -(-longest // config.row_unit) * config.row_unit)


def _drawn_length(config: Config, first_sample_index: int) -> int:
    """Tokens per row of the global batch that starts at this g.

    `data.seq_length`; with probability `data.random_length_fraction` a random length instead, uniform over the
    multiples of `ParallelConfig.row_unit` (LLaDA, arXiv 2502.09992, cuts 1 % of its rows). One length for a whole
    global batch, as pipeline messages have one shape per step; a pure function of (seed, g).
    """
    if not config.data.random_length_fraction:
        return config.data.seq_length
    digest = hashlib.blake2b(f"{config.seed}/row_length/{first_sample_index}".encode(), digest_size=16).digest()
    choice, length = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    if choice >= config.data.random_length_fraction * 2**64:
        return config.data.seq_length
    unit = config.parallel.row_unit
    return unit * (1 + (length * (config.data.seq_length // unit) >> 64))
