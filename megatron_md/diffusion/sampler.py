"""Generation: fill a canvas of mask tokens in steps, with any callable as the denoiser.

Each step asks the denoiser for the open positions of the current block, proposes a token for each, and lets a strategy
choose which proposals to commit. Strategies are small functions in a registry. Shape letters: B rows, L positions of
the canvas (prompt and answer), K positions of the block, V vocabulary, N open positions of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_md.diffusion.registry import Registry

Denoiser = Callable[[torch.Tensor], torch.Tensor]

_POSITIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Choice:
    """What a strategy decides on.

    Attributes:
        is_open_BK: positions of the block that still hold the mask token.
        confidence_BK: the denoiser's probability of each proposed token (fp32); 0 where not open.
        quota_B: positions that a strategy with a fixed number per step is to commit in each row.
        step: number of this step within the block, from 0.
        steps: steps of the block.
        generator: source of randomness on the denoiser's device.
    """

    is_open_BK: torch.Tensor
    confidence_BK: torch.Tensor
    quota_B: torch.Tensor
    step: int
    steps: int
    generator: torch.Generator

    def uniforms_BK(self) -> torch.Tensor:
        """A fresh uniform for every position of the block, float64."""
        shape, device = self.is_open_BK.shape, self.is_open_BK.device
        return torch.rand(shape, dtype=torch.float64, device=device, generator=self.generator)


Strategy = Callable[[Choice], torch.Tensor]
_registry: Registry[Strategy] = Registry("sampling strategy")
register_strategy = _registry.register


@dataclass(frozen=True)
class SamplerConfig:
    """How to generate.

    Attributes:
        length: tokens to generate.
        steps: denoising steps over all blocks.
        block: tokens per block, filled from left to right one block after the other; `length` if None.
        strategy: name of a strategy: which proposals a step commits.
        temperature: 0 takes the likeliest token, 1 samples from the denoiser's distribution (MDLM's sampler is
            `ancestral` at 1).
        seed: of all random draws.
    """

    length: int
    steps: int
    block: int | None = None
    strategy: str = "low_confidence"
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, value in (("length", self.length), ("steps", self.steps), ("block", self.block_size)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        if self.block_size > self.length:
            raise ValueError(
                f"block {self.block_size} is longer than length {self.length}; make it at most {self.length}"
            )
        if self.length % self.block_size:
            raise ValueError(f"length {self.length} is not a multiple of block {self.block_size}")
        if self.steps % self.blocks:
            raise ValueError(
                f"steps {self.steps} is not a multiple of the {self.blocks} blocks (length {self.length} / block "
                f"{self.block_size})"
            )
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature}")
        _registry.get(self.strategy)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.length if self.block is None else self.block

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.length // self.block_size


@dataclass(frozen=True)
class SamplerStep:
    """What a callback is told after each step.

    Attributes:
        step: steps done so far, over all blocks.
        steps: steps in all.
        tokens_BL: the canvas (do not change it); open positions hold the mask token.
        is_committed_BL: positions that this step filled.
    """

    step: int
    steps: int
    tokens_BL: torch.Tensor
    is_committed_BL: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """A finished canvas.

    Attributes:
        tokens_BL: prompt and answer.
        forward_passes: how often the denoiser was called.
    """

    tokens_BL: torch.Tensor
    forward_passes: int


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    prompt_tokens_BP: torch.Tensor,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    on_step: Callable[[SamplerStep], None] | None = None,
) -> Sample:
    """Generate `config.length` tokens after each prompt.

    Args:
        denoiser: token ids [B, L] -> logits [B, L, V].
        prompt_tokens_BP: prompts of one length P (0 is allowed), on the denoiser's device.
        config: how.
        mask_token_id: fills the canvas at first, and is never generated.
        on_step: called after every step, for a terminal that shows the canvas.

    Raises:
        ValueError: a prompt contains the mask token, or the logits have no column for it.
    """
    if bool((prompt_tokens_BP == mask_token_id).any()):
        raise ValueError(f"the prompt contains the mask token ({mask_token_id})")
    rows, prompt_length = prompt_tokens_BP.shape
    canvas_BL = prompt_tokens_BP.new_full((rows, prompt_length + config.length), mask_token_id)
    canvas_BL[:, :prompt_length] = prompt_tokens_BP
    generator = torch.Generator(device=canvas_BL.device).manual_seed(config.seed)
    steps = config.steps // config.blocks
    forward_passes = 0
    for number in range(config.blocks):
        start = prompt_length + number * config.block_size
        block = slice(start, start + config.block_size)
        quota_BS = transfer_counts((canvas_BL[:, block] == mask_token_id).sum(dim=1), steps)
        logits_BKV: torch.Tensor | None = None
        for step in range(steps):
            is_open_BK = canvas_BL[:, block] == mask_token_id
            if not bool(is_open_BK.any()):
                break
            if logits_BKV is None:
                logits_BKV = denoiser(canvas_BL)[:, block]
                forward_passes += 1
            proposal_BK, confidence_BK = _propose(logits_BKV, is_open_BK, config.temperature, mask_token_id, generator)
            choice = Choice(is_open_BK, confidence_BK, quota_BS[:, step], step, steps, generator)
            is_committed_BK = _registry.get(config.strategy)(choice) & is_open_BK
            if bool(is_committed_BK.any()):
                canvas_BL[:, block] = torch.where(is_committed_BK, proposal_BK, canvas_BL[:, block])
                # Only a changed canvas needs another forward pass: the denoiser knows nothing of time.
                logits_BKV = None
            if on_step is not None:
                is_committed_BL = torch.zeros_like(canvas_BL, dtype=torch.bool)
                is_committed_BL[:, block] = is_committed_BK
                on_step(SamplerStep(number * steps + step + 1, config.steps, canvas_BL, is_committed_BL))
    return Sample(canvas_BL, forward_passes)


def transfer_counts(open_B: torch.Tensor, steps: int) -> torch.Tensor:
    """Positions to commit in each step, as even as possible, the larger numbers first: [B, steps].

    Row with n open positions: n // steps in every step and one more in the first n % steps (LLaDA's sampler).
    """
    extra_BS = torch.arange(steps, device=open_B.device)[None] < (open_B % steps)[:, None]
    return (open_B // steps)[:, None] + extra_BS.to(open_B.dtype)


def exclude_mask_token(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Logits [..., V] with the mask token's column at -inf, so that the softmax is over real tokens."""
    if not 0 <= mask_token_id < logits.shape[-1]:
        raise ValueError(f"mask token {mask_token_id} lies outside the {logits.shape[-1]} columns of the logits")
    logits = logits.clone()
    logits[..., mask_token_id] = -torch.inf
    return logits


def gumbel_scores(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
    """Logarithm of exp(logits) / (-log u)^T in float64: its argmax is a sample from softmax(logits / T).

    Args:
        logits: [..., V].
        temperature: T; 0 leaves the logits as they are.
        uniforms: u in [0, 1), float64, of the logits' shape.
    """
    if temperature == 0.0:
        return logits
    return logits.double() - temperature * torch.log(-torch.log(uniforms))


def ancestral_commit_probability(step: int, steps: int) -> float:
    """Chance 1 - s/t that an open position is committed between t = 1 - step/steps and s = t - 1/steps.

    The reverse step of MDLM (Sahoo et al. 2024): stay masked with s/t, else a token from the denoiser's distribution.
    """
    return 1.0 / (steps - step)


@register_strategy("low_confidence")
def low_confidence(choice: Choice) -> torch.Tensor:
    """Commit the proposals with the highest probability; those of low confidence stay masked (LLaDA)."""
    return _largest(choice.confidence_BK.double(), choice)


@register_strategy("random")
def random_order(choice: Choice) -> torch.Tensor:
    """Commit as many, at random positions."""
    return _largest(choice.uniforms_BK(), choice)


@register_strategy("ancestral")
def ancestral(choice: Choice) -> torch.Tensor:
    """Commit every open position independently with the reverse process's probability; all in the last step."""
    return choice.uniforms_BK() < ancestral_commit_probability(choice.step, choice.steps)


def _largest(score_BK: torch.Tensor, choice: Choice) -> torch.Tensor:
    """The `quota_B` open positions of each row with the largest scores; the leftmost among equals."""
    score_BK = score_BK.masked_fill(~choice.is_open_BK, -torch.inf)
    order_BK = torch.sort(score_BK, dim=1, descending=True, stable=True).indices
    is_chosen_BK = torch.arange(score_BK.shape[1], device=score_BK.device)[None] < choice.quota_B[:, None]
    return torch.zeros_like(choice.is_open_BK).scatter(1, order_BK, is_chosen_BK)


def _propose(
    logits_BKV: torch.Tensor,
    is_open_BK: torch.Tensor,
    temperature: float,
    mask_token_id: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each open position, and the denoiser's probability of it: ([B, K], fp32 [B, K])."""
    open_N = is_open_BK.nonzero()
    proposal_BK = torch.full_like(is_open_BK, mask_token_id, dtype=torch.long)
    confidence_BK = torch.zeros_like(is_open_BK, dtype=torch.float32)
    # A few positions at a time: float64 noise over a large vocabulary is big.
    for index_N in torch.split(open_N, _POSITIONS_AT_ONCE):
        row_N, column_N = index_N.unbind(dim=1)
        logits_NV = exclude_mask_token(logits_BKV[row_N, column_N].float(), mask_token_id)
        scores_NV = logits_NV
        if temperature > 0.0:
            noise_NV = torch.rand(logits_NV.shape, dtype=torch.float64, device=logits_NV.device, generator=generator)
            scores_NV = gumbel_scores(logits_NV, temperature, noise_NV)
        token_N = scores_NV.argmax(dim=-1)
        proposal_BK[row_N, column_N] = token_N
        confidence_BK[row_N, column_N] = logits_NV.softmax(dim=-1).gather(1, token_N[:, None])[:, 0]
    return proposal_BK, confidence_BK
