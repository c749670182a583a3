"""Objectives: how a clean batch is corrupted, what is predicted where, and at which weight.

Every objective's loss is linear in the negative log-likelihoods, with weights that the host knows before the forward
pass: `sum_m weights_M[m] * nll_M[m] / global sum of denominator`. Third parties add theirs with
`@register_objective("name")` in a module that the config lists under `imports`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from megatron_md.batch import CleanBatch, CorruptedBatch, Int64Array
from megatron_md.config import ObjectiveConfig
from megatron_md.diffusion.blocks import block_numbers, next_tokens, size_at, with_clean_half
from megatron_md.diffusion.corruption import (
    FloatArray,
    assemble,
    count_by,
    counted_sequences,
    mask_at_rate,
    shift_right,
    stratified_uniforms,
)
from megatron_md.diffusion.names import objectives
from megatron_md.diffusion.pairs import Pairs, draw_masks, draw_rates, law_of_rates
from megatron_md.diffusion.schedule import MaskSchedule, parse_schedule
from megatron_md.diffusion.token_rates import parse_token_rate, rates_of_tokens
from megatron_md.diffusion.weighting import Normalise, Weighting
from megatron_md.errors import UserError

Metrics = dict[str, tuple[float | torch.Tensor, float]]


@runtime_checkable
class Objective(Protocol):
    """What the trainer asks of an objective.

    Attributes:
        name: its name in the config.
        causal: whether the denoiser must attend to the left only.
        metric_names: what `reduce` gives, in the order in which ranks send it to each other.
    """

    name: str
    causal: bool
    metric_names: tuple[str, ...]

    def corrupt(self, batch: CleanBatch) -> CorruptedBatch:
        """The micro-batch as the model sees it; a pure function of the seed and the rows' numbers."""

    def reduce(self, nll_M: torch.Tensor, corrupted: CorruptedBatch) -> Metrics:
        """(sum, count) of each metric; the trainer adds both over micro-batches and ranks, then divides.

        Args:
            nll_M: negative log-likelihood of each target in nats: fp32, detached.
            corrupted: the micro-batch that it belongs to.
        """


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective is built from.

    Attributes:
        config: the config's `objective` section.
        schedule: its mask schedule.
        seed: the run's seed.
        mask_token_id: the token that stands for a masked position.
        eos_token_id: the token at the end of a document, if the tokenizer has one.
        within_document: attention does not cross the boundaries in `CleanBatch.cu_seqlens`.
    """

    config: ObjectiveConfig
    schedule: MaskSchedule
    seed: int
    mask_token_id: int
    eos_token_id: int | None = None
    within_document: bool = False


register_objective = objectives.register


def build_objective(
    config: ObjectiveConfig,
    *,
    seed: int,
    mask_token_id: int,
    eos_token_id: int | None = None,
    within_document: bool = False,
) -> Objective:
    """The objective that the config names, given an `ObjectiveContext` and `config.options` as keywords.

    Raises:
        UserError: unknown name, options that the objective does not take, or a combination that makes no sense.
    """
    factory = objectives.get(config.name)
    schedule = parse_schedule(config.mask_schedule)
    context = ObjectiveContext(config, schedule, seed, mask_token_id, eos_token_id, within_document)
    try:
        inspect.signature(factory).bind(context, **config.options)
    except TypeError as error:
        raise UserError(f"objective.options of {config.name!r}: {error}") from None
    objective = factory(context, **config.options)
    if getattr(objective, "pairs", "none") != config.pairs:
        raise UserError(f"objective.pairs {config.pairs}: {config.name!r} does not draw rows in pairs; set none")
    if config.token_rate is not None and getattr(objective, "token_rate", None) is None:
        raise UserError(f"objective.token_rate: {config.name!r} knows no rates of single tokens; set null")
    return objective


MEAN_METRICS = ("masked_ce", "mean_mask_rate")


def mean_metrics(nll_M: torch.Tensor, corrupted: CorruptedBatch) -> Metrics:
    """`MEAN_METRICS`, which every objective reports: the cross-entropy in nats, and t."""
    return {
        "masked_ce": (nll_M.sum(dtype=torch.float64), float(len(corrupted.targets_M))),
        "mean_mask_rate": (float(corrupted.mask_rate_B.sum(dtype=np.float64)), float(len(corrupted.mask_rate_B))),
    }


@register_objective("masked_diffusion")
class MaskedDiffusion:
    """Mask each maskable position of a row with probability t and predict the tokens there.

    t is the schedule's inverse CDF at uniforms that are stratified over the global batch; rows may come in `pairs`, and
    tokens have rates of their own (`token_rates`). Weights and denominator: `weighting`.
    """

    name: str = "masked_diffusion"
    causal: bool = False
    metric_names: tuple[str, ...] = MEAN_METRICS
    default_normalise: ClassVar[Normalise] = "maskable"

    def __init__(self, context: ObjectiveContext) -> None:
        """Build from the config.

        Raises:
            UserError: see `Weighting` and `parse_token_rate`.
        """
        config = context.config
        self.schedule = context.schedule
        self.pairs: Pairs = config.pairs
        self.token_rate = parse_token_rate(config.token_rate)
        self.seed = context.seed
        self.mask_token_id = context.mask_token_id
        self.weighting = Weighting(
            law_of_rates(config),
            weight=config.weight,
            importance=config.importance,
            normalise=config.normalise or self.default_normalise,
            min_mask_rate=config.min_mask_rate,
        )

    def corrupt(self, batch: CleanBatch) -> CorruptedBatch:
        """Draw t and the masks of the rows; see `Objective.corrupt`."""
        progress = batch.position.progress
        drawn_B = draw_rates(self.seed, batch, self.schedule, self.pairs, self.weighting.min_mask_rate)
        mask_rate_B = self.weighting.floored(drawn_B)
        if self.token_rate is None:
            is_masked_BL, rate_BL = draw_masks(self.seed, batch, mask_rate_B, self.pairs), None
        else:
            rate_BL = rates_of_tokens(self.token_rate, batch.tokens_BL, mask_rate_B, self.weighting.min_mask_rate)
            is_masked_BL = mask_at_rate(self.seed, batch.sample_index_B, rate_BL, batch.is_maskable_BL)
        row_S, sequence_N = counted_sequences(batch)
        masked_S = count_by(sequence_N, len(row_S), is_masked_BL)
        maskable_S = count_by(sequence_N, len(row_S), batch.is_maskable_BL)
        corrupted = assemble(
            batch,
            tokens_BL=np.where(is_masked_BL, self.mask_token_id, batch.tokens_BL),
            is_scored_BL=is_masked_BL,
            weights_B=self.weighting.row_weights(drawn_B[row_S], masked_S, maskable_S, progress),
            denominator=self.weighting.denominator(masked_S, maskable_S),
            mask_rate_B=mask_rate_B,
            sequence_N=sequence_N,
        )
        if rate_BL is None or self.weighting.weight != "elbo":
            return corrupted
        # 1 / t becomes 1 / r of the token.
        ratio_M = (mask_rate_B[:, None] / rate_BL).reshape(-1)[corrupted.positions_M]
        return replace(corrupted, weights_M=corrupted.weights_M * ratio_M.astype(np.float32))

    def reduce(self, nll_M: torch.Tensor, corrupted: CorruptedBatch) -> Metrics:
        """`masked_ce` and `mean_mask_rate`; see `Objective.reduce`."""
        return mean_metrics(nll_M, corrupted)


@register_objective("masked_diffusion_sft")
class MaskedDiffusionSFT(MaskedDiffusion):
    """Masked diffusion of answers given prompts: the data marks prompts as not maskable, so they are never masked.

    Unless the config says how to normalise, the answers in a row (in packed rows: in each dialogue) count once in all,
    however long and however many they are (LLaDA's fine-tuning). All of a row has one mask rate.
    """

    name: str = "masked_diffusion_sft"
    default_normalise: ClassVar[Normalise] = "sequences"


@register_objective("block_diffusion")
class BlockDiffusion:
    """Mask each maskable position of a block with the block's probability t and predict the tokens there.

    t is the schedule's inverse CDF at uniforms that are stratified over the blocks of the global batch. Weights and
    denominator are those of `weighting`, with blocks in place of rows; where sequences are counted, each is divided by
    its own tokens. Rows of a single block are those of masked diffusion, to the bit. With `autoregressive_weight` the
    next-token loss of the clean half is added, over the same denominator.
    """

    name: str = "block_diffusion"
    causal: bool = False

    def __init__(self, context: ObjectiveContext) -> None:
        """Build from the config.

        Raises:
            UserError: see `Weighting`.
        """
        config = context.config
        self.stages, self.seed, self.mask_token_id = config.block_stages, context.seed, context.mask_token_id
        self.schedule, self.within_document = context.schedule, context.within_document
        self.autoregressive_weight = config.autoregressive_weight
        self.counts_sequences = config.normalise == "sequences"
        self.weighting = Weighting(
            context.schedule,
            weight=config.weight,
            importance=config.importance,
            normalise="masked" if config.normalise == "masked" else "maskable",
            min_mask_rate=config.min_mask_rate,
        )
        extra = ("autoregressive_ce",) if self.autoregressive_weight else ()
        self.metric_names: tuple[str, ...] = (*MEAN_METRICS, *extra)

    def corrupt(self, batch: CleanBatch) -> CorruptedBatch:
        """Draw t and the masks of the blocks; see `Objective.corrupt`."""
        rows, length = batch.tokens_BL.shape
        size = size_at(self.stages, batch.position.progress)
        blocks = -(-length // size)
        drawn_N = self.schedule.sample(self._uniforms(batch, blocks), batch.position.progress)
        rate_N = self.weighting.floored(drawn_N)
        number = block_numbers(rows, length, size)
        is_masked_BL = mask_at_rate(
            self.seed, batch.sample_index_B, rate_N[number].reshape(rows, length), batch.is_maskable_BL
        )
        masked_N = count_by(number, rows * blocks, is_masked_BL)
        maskable_N = count_by(number, rows * blocks, batch.is_maskable_BL)
        masked = assemble(
            batch,
            tokens_BL=np.where(is_masked_BL, self.mask_token_id, batch.tokens_BL),
            is_scored_BL=is_masked_BL,
            weights_B=self.weighting.row_weights(drawn_N, masked_N, maskable_N, batch.position.progress),
            denominator=self.weighting.denominator(masked_N, maskable_N),
            mask_rate_B=rate_N.reshape(rows, blocks).mean(axis=1),
            sequence_N=number,
        )
        weight_N = np.ones(batch.tokens_BL.size)
        if self.counts_sequences:
            row_S, sequence_N = counted_sequences(batch)
            maskable_S = count_by(sequence_N, len(row_S), batch.is_maskable_BL)
            weight_N = 1.0 / np.maximum(maskable_S, 1)[sequence_N]
            weights_M = (masked.weights_M * weight_N[masked.positions_M]).astype(np.float32)
            masked = replace(masked, weights_M=weights_M, denominator=int(np.count_nonzero(maskable_S)))
        is_predicted = self.autoregressive_weight > 0.0
        corrupted = with_clean_half(masked, batch, size, is_predicted=is_predicted)
        return self._with_next_tokens(corrupted, batch, weight_N) if is_predicted else corrupted

    def _with_next_tokens(self, corrupted: CorruptedBatch, batch: CleanBatch, weight_N: FloatArray) -> CorruptedBatch:
        """The rows, predicted in their clean half as well; `weight_N`: what a token counts, before its weight."""
        position_M, token_M = next_tokens(batch, within_document=self.within_document)
        weights_M = (self.autoregressive_weight * weight_N[token_M]).astype(np.float32)
        order = np.argsort(np.concatenate([corrupted.positions_M, position_M]))
        return replace(
            corrupted,
            positions_M=np.concatenate([corrupted.positions_M, position_M])[order],
            targets_M=np.concatenate([corrupted.targets_M, batch.tokens_BL.reshape(-1)[token_M]])[order],
            weights_M=np.concatenate([corrupted.weights_M, weights_M])[order],
        )

    def reduce(self, nll_M: torch.Tensor, corrupted: CorruptedBatch) -> Metrics:
        """`masked_ce`, `mean_mask_rate` over blocks, `autoregressive_ce` of clean halves; see `Objective.reduce`."""
        metrics = mean_metrics(nll_M, corrupted)
        if not self.autoregressive_weight:
            return metrics
        length = corrupted.tokens_BL.shape[1]
        is_clean_M = corrupted.positions_M % length >= length // 2
        clean, total = int(is_clean_M.sum()), metrics["masked_ce"][0]
        of_clean = (nll_M * torch.from_numpy(is_clean_M).to(nll_M.device)).sum(dtype=torch.float64)
        masked = (total - of_clean, float(len(nll_M) - clean))
        return {**metrics, "masked_ce": masked, "autoregressive_ce": (of_clean, float(clean))}

    def _uniforms(self, batch: CleanBatch, blocks: int) -> FloatArray:
        """One for each block of these rows, stratified over all blocks of the global batch."""
        position = batch.position
        first, size = position.first_sample_index, position.global_batch_size
        u = stratified_uniforms(self.seed, first * blocks, size * blocks).reshape(size, blocks)
        return np.asarray(u[batch.sample_index_B - first].reshape(-1))


@register_objective("autoregressive")
class Autoregressive:
    """The causal baseline: predict every maskable token from those to its left.

    The row (within documents: each of its documents) is shifted right behind a BOS token, so that the same tokens are
    scored as under masked diffusion. BOS is the mask token, which nothing else uses here. Every weight of masked
    diffusion is 1 at t = 1, where this objective stands; only `normalise` changes anything. Under `right_shift` the
    rows stay as they are, as causal models are trained elsewhere: the output at a position predicts the next token.
    """

    name: str = "autoregressive"
    causal: bool = True
    metric_names: tuple[str, ...] = MEAN_METRICS

    def __init__(self, context: ObjectiveContext) -> None:
        """Build from the config; the mask schedule, `weight` and `importance` do not matter."""
        self.bos_token_id = context.mask_token_id
        self.within_document = context.within_document
        self.right_shift = context.config.right_shift
        self.normalise: Normalise = context.config.normalise or "maskable"

    def corrupt(self, batch: CleanBatch) -> CorruptedBatch:
        """Shift the rows; see `Objective.corrupt`."""
        row_S, sequence_N = counted_sequences(batch)
        maskable_S = count_by(sequence_N, len(row_S), batch.is_maskable_BL)
        per_sequence = self.normalise == "sequences"
        weights_S = 1.0 / np.maximum(maskable_S, 1) if per_sequence else np.ones(len(maskable_S))
        return assemble(
            batch,
            tokens_BL=batch.tokens_BL if self.right_shift else self._shifted(batch),
            is_scored_BL=batch.is_maskable_BL,
            weights_B=weights_S,
            denominator=int(np.count_nonzero(maskable_S) if per_sequence else maskable_S.sum()),
            mask_rate_B=np.ones(len(batch.tokens_BL)),
            sequence_N=sequence_N,
        )

    def _shifted(self, batch: CleanBatch) -> Int64Array:
        return shift_right(batch.tokens_BL, self.bos_token_id, batch.cu_seqlens if self.within_document else None)

    def reduce(self, nll_M: torch.Tensor, corrupted: CorruptedBatch) -> Metrics:
        """`masked_ce` (the mean cross-entropy) and `mean_mask_rate` (1); see `Objective.reduce`."""
        return mean_metrics(nll_M, corrupted)
