"""Block diffusion (Arriola et al. 2025, arXiv 2503.09573): masked diffusion within each block, given those before.

A row of N blocks of S tokens enters the model twice, as [x_t, x_0]: in the first half every block is masked at a rate
of its own, the second is clean. A masked position sees its own block of x_t and the blocks of x_0 before it, a clean
one x_0 up to its own block. So one forward pass predicts all blocks, each from clean text before it. S = L is masked
diffusion, which needs no clean half; S = 1 predicts every token from those to its left. The clean half may be trained
as well (Nemotron-Labs-Diffusion): to predict the next token, each seeing only what is to its left. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_md.batch import BoolArray, CleanBatch, CorruptedBatch, Int64Array
from megatron_md.config.objective import BlockStage
from megatron_md.diffusion.corruption import FloatArray


def block_numbers(rows: int, length: int, size: int) -> Int64Array:
    """The block of each flat position of rows [B, L], counted over all rows: int64 [B * L].

    Blocks divide rows from their first position on; the last one of a row may be shorter.
    """
    blocks = -(-length // size)
    number_BL = np.arange(rows)[:, None] * blocks + np.arange(length)[None] // size
    return np.asarray(number_BL.reshape(-1), dtype=np.int64)


def size_at(stages: Sequence[BlockStage], progress: float) -> int:
    """The block size at `progress` of the run, in [0, 1]: that of the first stage that ends later, or the last."""
    return next((stage.size for stage in stages if progress < stage.until), stages[-1].size)


def with_clean_half(
    masked: CorruptedBatch, batch: CleanBatch, size: int, *, is_predicted: bool = False
) -> CorruptedBatch:
    """The masked rows, [B, L], as a block model sees them: [x_t, x_0], predicted in the first half.

    Rows of a single block stay as they are, as nothing sees their clean half, unless it `is_predicted` itself.
    """
    length = batch.tokens_BL.shape[1]
    if size >= length and not is_predicted:
        return masked
    row_M, column_M = np.divmod(masked.positions_M, length)
    return replace(
        masked,
        tokens_BL=np.concatenate([masked.tokens_BL, batch.tokens_BL], axis=1),
        positions_M=row_M * 2 * length + column_M,
        block_size=size,
    )


def next_tokens(batch: CleanBatch, *, within_document: bool) -> tuple[Int64Array, Int64Array]:
    """What a causal clean half predicts: each maskable token at the place to its left, where there is one.

    Args:
        batch: the clean rows.
        within_document: no document's first token is predicted, as attention does not see what is before it.

    Returns:
        Flat positions in the rows [x_t, x_0], `b * 2L + L + l`, and flat positions `b * L + l + 1` of the tokens.
    """
    length = batch.tokens_BL.shape[1]
    is_scored_BL = batch.is_maskable_BL.copy()
    is_scored_BL[:, 0] = False
    if within_document and batch.cu_seqlens is not None:
        for is_scored_L, cuts in zip(is_scored_BL, batch.cu_seqlens, strict=True):
            is_scored_L[cuts[:-1]] = False
    token_M = np.flatnonzero(is_scored_BL)
    row_M, column_M = np.divmod(token_M, length)
    return row_M * 2 * length + length + column_M - 1, token_M


def exact_block_masks(
    counts_N: Int64Array, is_maskable_BL: BoolArray, u_BL: FloatArray, number: Int64Array
) -> BoolArray:
    """is_masked_BL with exactly `counts_N` maskable positions of each block: those with the smallest uniforms.

    Args:
        counts_N: how many of each block.
        is_maskable_BL: positions that may be masked.
        u_BL: a uniform for each position.
        number: `block_numbers`.
    """
    u = np.where(is_maskable_BL, u_BL, np.inf).reshape(-1)
    order = np.lexsort((u, number))
    first_N = np.searchsorted(number, np.arange(len(counts_N)))
    rank = np.empty(len(u), dtype=np.int64)
    rank[order] = np.arange(len(u)) - first_N[number[order]]
    return np.asarray((rank < counts_N[number]).reshape(is_maskable_BL.shape), dtype=np.bool_)
