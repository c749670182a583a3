"""Generation: fill the open positions of a canvas in steps, with any callable as the denoiser.

Each step asks the denoiser for the current block, proposes a token for each open position (proposal.py), and lets a
strategy choose which proposals to commit (unmasking.py). Shape letters: B rows, P prompt, L positions of the canvas
(prompt and answer), K positions of the block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from megatron_md.diffusion.names import strategies
from megatron_md.diffusion.proposal import guide, propose
from megatron_md.diffusion.sampler_config import SamplerConfig, check_fits
from megatron_md.diffusion.unmasking import Choice, transfer_counts
from megatron_md.errors import UserError

Denoiser = Callable[[torch.Tensor], torch.Tensor]


@runtime_checkable
class BlockDenoiser(Protocol):
    """A denoiser that is asked for one block after the other, so that it need not compute all of the canvas."""

    def of_block(self, canvas_BL: torch.Tensor, block: slice, *, is_guide: bool = False) -> torch.Tensor:
        """Logits [B, K, V] of a block; what lies before it does not change any more."""


@dataclass(frozen=True)
class SamplerStep:
    """What a callback is told after each step.

    Attributes:
        step: steps done so far, over all blocks.
        steps: the most that there can be.
        tokens_BL: the canvas (do not change it); open positions hold the mask token.
        is_committed_BL: positions that this step filled.
        probability_BL: the denoiser's probability of the token that it committed; 0 elsewhere, where a token was not
            proposed but follows from an `<eos>`, and where an `<eos>` was deferred (`confidence_eos_eot_inf`).
    """

    step: int
    steps: int
    tokens_BL: torch.Tensor
    is_committed_BL: torch.Tensor
    probability_BL: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """A finished canvas.

    Attributes:
        tokens_BL: prompt and answer.
        forward_passes: how often the denoiser was called.
        steps: steps done; fewer than configured where all rows were full before.
        fixed_step_BL: the step, from 1, that fixed each token; 0 for given ones.
    """

    tokens_BL: torch.Tensor
    forward_passes: int
    steps: int
    fixed_step_BL: torch.Tensor


OnStep = Callable[[SamplerStep], None]


def sample(
    denoiser: Denoiser,
    prompt_tokens_BP: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    eos_token_id: int | None = None,
    eot_token_ids: Sequence[int] = (),
    max_length: int | None = None,
    on_step: OnStep | None = None,
    seeds: Sequence[int] | None = None,
) -> Sample:
    """Generate `config.length` tokens after each prompt.

    Args:
        denoiser: token ids [B, L] -> logits [B, L, V].
        prompt_tokens_BP: prompts of one length P (0 is allowed), on the denoiser's device.
        config: how.
        mask_token_id: fills the canvas at first, and is never generated.
        eos_token_id: the token that `config.eos` is about.
        eot_token_ids: further tokens that end a text, as a chat template's end of a turn; `<eos>` may be among them.
        max_length: the model's context, checked before the first forward pass.
        on_step: called after every step, for a terminal that shows the canvas.
        seeds: one for each row instead of `config.seed`: a row then has the same draws alone and in any batch.

    Raises:
        UserError: a prompt contains the mask token or does not fit, the logits have no column for the mask token,
            `config` handles an `<eos>` that is not given, or guides where nothing is given.
    """
    if bool((prompt_tokens_BP == mask_token_id).any()):
        raise UserError(f"the prompt contains the mask token ({mask_token_id})")
    rows, prompt_length = prompt_tokens_BP.shape
    if max_length is not None:
        check_fits(prompt_length, config.length, max_length)
    canvas_BL = prompt_tokens_BP.new_full((rows, prompt_length + config.length), mask_token_id)
    canvas_BL[:, :prompt_length] = prompt_tokens_BP
    run = _Run(denoiser, canvas_BL, config, mask_token_id, eos_token_id, eot_token_ids, on_step, seeds)
    return run.fill(prompt_length)


def infill(
    denoiser: Denoiser,
    canvas_BL: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    eos_token_id: int | None = None,
    eot_token_ids: Sequence[int] = (),
    max_length: int | None = None,
    on_step: OnStep | None = None,
    seeds: Sequence[int] | None = None,
) -> Sample:
    """Fill the positions of a canvas that hold the mask token, wherever they lie; the others stay as they are.

    Blocks divide the whole canvas. Rows may have different open positions. Arguments as for `sample`.

    Raises:
        UserError: as for `sample`, or `config.length` is not the canvas' length.
    """
    length = canvas_BL.shape[1]
    if config.length != length:
        raise UserError(f"length {config.length} is not the {length} positions of the canvas to fill in")
    if max_length is not None:
        check_fits(0, length, max_length)
    run = _Run(denoiser, canvas_BL.clone(), config, mask_token_id, eos_token_id, eot_token_ids, on_step, seeds)
    return run.fill(0)


def fill_model_blocks(
    denoiser: BlockDenoiser,
    canvas_BL: torch.Tensor,
    config: SamplerConfig,
    size: int,
    *,
    mask_token_id: int,
    eos_token_id: int | None = None,
    eot_token_ids: Sequence[int] = (),
    on_step: OnStep | None = None,
    seeds: Sequence[int] | None = None,
) -> Sample:
    """Fill a canvas for a model of blocks of `size` tokens, which divide it from its first token on.

    Rows may be open from different places on. A block takes its share of `config.steps`, rounded up. Arguments as for
    `infill`, but for `config.length`: tokens that are wanted of each row.

    Raises:
        UserError: as for `sample`.
    """
    is_open_L = (canvas_BL == mask_token_id).any(dim=0).nonzero()
    first = int(is_open_L[0]) // size * size if len(is_open_L) else canvas_BL.shape[1]
    blocks = [slice(at, min(at + size, canvas_BL.shape[1])) for at in range(first, canvas_BL.shape[1], size)]
    steps = min(size, -(-config.total_steps * size // config.length))
    run = _Run(denoiser, canvas_BL.clone(), config, mask_token_id, eos_token_id, eot_token_ids, on_step, seeds)
    return run.fill_blocks(blocks, steps)


class _Run:
    """The one loop: a canvas on its way from masked to full."""

    def __init__(
        self,
        denoiser: Denoiser | BlockDenoiser,
        canvas_BL: torch.Tensor,
        config: SamplerConfig,
        mask_token_id: int,
        eos_token_id: int | None,
        eot_token_ids: Sequence[int],
        on_step: OnStep | None,
        seeds: Sequence[int] | None,
    ) -> None:
        if seeds is not None and len(seeds) != len(canvas_BL):
            raise UserError(f"{len(seeds)} seeds for {len(canvas_BL)} rows: give one for each row")
        if eos_token_id is None and (config.eos != "keep" or config.confidence_eos_eot_inf):
            what = "confidence_eos_eot_inf" if config.eos == "keep" else f"eos {config.eos!r}"
            raise UserError(f"{what} needs an eos token id")
        self.denoiser, self.canvas_BL, self.config, self.on_step = denoiser, canvas_BL, config, on_step
        self.mask_token_id, self.eos_token_id = mask_token_id, eos_token_id
        self.end_token_ids = tuple({*eot_token_ids, *(() if eos_token_id is None else (eos_token_id,))})
        self.deferred = self.end_token_ids if config.confidence_eos_eot_inf else ()
        self.excluded: tuple[int, ...] = (mask_token_id,)
        self.is_given_BL = canvas_BL != mask_token_id
        if config.guidance > 0.0 and not bool(self.is_given_BL.any()):
            raise UserError("guidance needs a prompt or other given tokens to do without")
        if config.eos == "suppress" and eos_token_id is not None:
            self.excluded += (eos_token_id,)
        self.fixed_step_BL = torch.zeros_like(canvas_BL, dtype=torch.long)
        self.generators = [
            torch.Generator(device=canvas_BL.device).manual_seed(seed)
            for seed in ([config.seed] if seeds is None else seeds)
        ]
        self.forward_passes = self.steps_done = self.most_steps = 0

    @torch.no_grad()
    def fill(self, start: int) -> Sample:
        """All blocks of the config's size, the first of which begins at `start`."""
        size, steps = self.config.block_size, self.config.total_steps // self.config.blocks
        firsts = range(start, self.canvas_BL.shape[1], size)
        return self.fill_blocks([slice(first, first + size) for first in firsts], steps)

    @torch.no_grad()
    def fill_blocks(self, blocks: Sequence[slice], steps: int) -> Sample:
        """Blocks from left to right, in at most so many steps each."""
        self.most_steps = steps * len(blocks)
        for block in blocks:
            self._fill_block(block, steps)
        return Sample(self.canvas_BL, self.forward_passes, self.steps_done, self.fixed_step_BL)

    def _fill_block(self, block: slice, steps: int) -> None:
        quota_BS = transfer_counts((self.canvas_BL[:, block] == self.mask_token_id).sum(dim=1), steps)
        logits_BKV: torch.Tensor | None = None
        for step in range(steps):
            is_open_BK = self.canvas_BL[:, block] == self.mask_token_id
            if not bool(is_open_BK.any()):
                break
            if logits_BKV is None:
                logits_BKV = self._logits(block)
            is_changed = self._step(block, logits_BKV, is_open_BK, quota_BS[:, step], step, steps)
            # Only a changed canvas needs another forward pass: the denoiser knows nothing of time.
            if is_changed:
                logits_BKV = None

    def _step(
        self,
        block: slice,
        logits_BKV: torch.Tensor,
        is_open_BK: torch.Tensor,
        quota_B: torch.Tensor,
        step: int,
        steps: int,
    ) -> bool:
        """Propose and commit once; whether the canvas changed."""
        config = self.config
        proposal = propose(
            logits_BKV,
            is_open_BK,
            self.generators,
            excluded=self.excluded,
            deferred=self.deferred,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        choice = Choice(
            is_open_BK=is_open_BK,
            probability_BK=proposal.probability_BK,
            margin_BK=proposal.margin_BK,
            negative_entropy_BK=proposal.negative_entropy_BK,
            quota_B=quota_B,
            step=step,
            steps=steps,
            threshold=config.threshold,
            factor=config.factor,
            generators=self.generators,
        )
        is_committed_BK = is_open_BK
        if step < steps - 1:
            is_committed_BK = strategies.get(config.strategy)(choice) & is_open_BK
        self.steps_done += 1
        is_committed_BL = torch.zeros_like(self.is_given_BL)
        is_committed_BL[:, block] = is_committed_BK
        self.canvas_BL[:, block] = torch.where(is_committed_BK, proposal.tokens_BK, self.canvas_BL[:, block])
        probability_BL = torch.zeros(self.canvas_BL.shape, dtype=torch.float32, device=self.canvas_BL.device)
        probability_BL[:, block] = proposal.probability_BK * is_committed_BK
        if config.eos == "stop":
            is_closed_BL = self._close_after_end()
            is_committed_BL |= is_closed_BL
            probability_BL[is_closed_BL] = 0.0
        self.fixed_step_BL[is_committed_BL] = self.steps_done
        if self.on_step is not None:
            self.on_step(SamplerStep(self.steps_done, self.most_steps, self.canvas_BL, is_committed_BL, probability_BL))
        return bool(is_committed_BL.any())

    def _logits(self, block: slice) -> torch.Tensor:
        """The denoiser's logits of the block, guided if wanted."""
        conditional_BKV = self._denoised(self.canvas_BL, block)
        if self.config.guidance == 0.0:
            return conditional_BKV
        without_given_BL = self.canvas_BL.masked_fill(self.is_given_BL, self.mask_token_id)
        unconditional_BKV = self._denoised(without_given_BL, block, is_guide=True)
        return guide(conditional_BKV.float(), unconditional_BKV.float(), self.config.guidance)

    def _denoised(self, canvas_BL: torch.Tensor, block: slice, *, is_guide: bool = False) -> torch.Tensor:
        self.forward_passes += 1
        if isinstance(self.denoiser, BlockDenoiser):
            return self.denoiser.of_block(canvas_BL, block, is_guide=is_guide)
        return self.denoiser(canvas_BL)[:, block]

    def _close_after_end(self) -> torch.Tensor:
        """Turn what follows a row's settled end into `<eos>` (but for given tokens); the positions that changed."""
        assert self.eos_token_id is not None
        is_settled_BL = (self.canvas_BL == self.mask_token_id).cumsum(dim=1) == 0
        is_ending_BL = torch.isin(self.canvas_BL, self.canvas_BL.new_tensor(self.end_token_ids))
        is_end_BL = is_settled_BL & is_ending_BL & ~self.is_given_BL
        is_after_BL = is_end_BL.long().cumsum(dim=1) - is_end_BL.long() > 0
        is_closed_BL = is_after_BL & ~self.is_given_BL & (self.canvas_BL != self.eos_token_id)
        self.canvas_BL[is_closed_BL] = self.eos_token_id
        return is_closed_BL
