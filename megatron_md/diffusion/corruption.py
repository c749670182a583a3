"""Corruption: which positions of a row are masked, as a pure function of the seed and the row's number in the run.

Randomness is counter-based. Philox 4x64-10 (Salmon et al., SC 2011) maps a key and a 256-bit counter to four 64-bit
words; here the key is a hash of (seed, purpose), and the counter is (position // 4, three index words). Every number is
thus found without drawing those before it: no state to checkpoint, and no rank, micro-batch, row length or restart
changes it. The words come raw from numpy, whose bit generators are stable across versions and machines, and become
floats here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_md.batch import BoolArray, CleanBatch, CorruptedBatch, Int32Array, Int64Array
from megatron_md.diffusion.philox import philox_words

FloatArray = npt.NDArray[np.float64]

_SHORT_ROW = 64  # up to this length the words of many rows are drawn together
_ROWS_TOGETHER = 512  # keeps their arrays in the processor's cache
ONE_BELOW = float(np.nextafter(1.0, 0.0))


@lru_cache(maxsize=64)
def _key(seed: int, purpose: str) -> npt.NDArray[np.uint64]:
    """128 bits that depend on (seed, purpose)."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def random_words(seed: int, purpose: str, index: tuple[int, ...], count: int, start: int = 0) -> npt.NDArray[np.uint64]:
    """Words start .. start + count - 1 of the stream that (seed, purpose, index) names.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for; different purposes are independent.
        index: at most three integers in [0, 2^64) that number the stream.
        count: how many words.
        start: position of the first one in the stream.
    """
    assert len(index) <= 3
    block, skipped = divmod(start, 4)
    counter = np.array([block, *index, *([0] * (3 - len(index)))], dtype=np.uint64)
    generator = np.random.Philox(counter=counter, key=_key(seed, purpose))
    return generator.random_raw(skipped + count)[skipped:]


def uniforms(seed: int, purpose: str, index: int | tuple[int, ...], count: int, start: int = 0) -> FloatArray:
    """Uniforms in [0, 1), multiples of 2^-53, at positions start .. start + count - 1 of a stream.

    The first n of a row do not depend on how many are drawn. Arguments as for `random_words`.
    """
    return _as_uniforms(random_words(seed, purpose, index if isinstance(index, tuple) else (index,), count, start))


def uniforms_of_rows(seed: int, purpose: str, index_B: Int64Array, count: int) -> FloatArray:
    """`uniforms(seed, purpose, g, count)` of each row g: float64 [B, count]."""
    if count <= _SHORT_ROW:
        parts = range(0, len(index_B), _ROWS_TOGETHER)
        words = [philox_words(_key(seed, purpose), index_B[start : start + _ROWS_TOGETHER], count) for start in parts]
        return _as_uniforms(np.concatenate(words))
    return np.stack([uniforms(seed, purpose, g, count) for g in index_B.tolist()])


def _as_uniforms(words: npt.NDArray[np.uint64]) -> FloatArray:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=8)
def stratified_uniforms(
    seed: int, first_sample_index: int, global_batch_size: int, purpose: str = "mask_rate"
) -> FloatArray:
    """One uniform per row of a global batch, exactly one in each stratum [k/B, (k+1)/B): (permutation + jitter) / B.

    The permutation is keyed on (seed, first g, B) and the jitter on (seed, g). Every rank finds the same ones.

    Args:
        seed: the run's seed.
        first_sample_index: g of the batch's first row.
        global_batch_size: rows B of the global batch.
        purpose: separates independent uses.

    Returns:
        float64 [B], read-only (the last few batches are kept).
    """
    words = random_words(seed, f"{purpose}/strata", (first_sample_index, global_batch_size), global_batch_size)
    strata = np.argsort(words, kind="stable")
    jitter = uniforms(seed, f"{purpose}/jitter", 0, global_batch_size, start=first_sample_index)
    u = np.minimum((strata + jitter) / global_batch_size, ONE_BELOW)
    u.flags.writeable = False
    return u


def stratified_uniforms_of_rows(seed: int, batch: CleanBatch, purpose: str = "mask_rate") -> FloatArray:
    """`stratified_uniforms` of the global batch at this micro-batch's rows: float64 [B]."""
    position = batch.position
    row_B = batch.sample_index_B - position.first_sample_index
    assert np.all((row_B >= 0) & (row_B < position.global_batch_size)), "rows outside their global batch"
    u = stratified_uniforms(seed, position.first_sample_index, position.global_batch_size, purpose)
    return np.asarray(u[row_B], dtype=np.float64)


def is_below_rate(u_BL: FloatArray, mask_rate_B: FloatArray, is_maskable_BL: BoolArray) -> BoolArray:
    """The forward process: masked iff u < t (strictly) and maskable; t of each row, or [B, L] of each position.

    u does not depend on t: the positions masked at a lower rate are masked at every higher one.
    """
    rate_BL = mask_rate_B if mask_rate_B.ndim == 2 else mask_rate_B[:, None]
    return (u_BL < rate_BL) & is_maskable_BL


def mask_at_rate(
    seed: int, sample_index_B: Int64Array, mask_rate_B: FloatArray, is_maskable_BL: BoolArray
) -> BoolArray:
    """is_masked_BL with each maskable position of row g masked independently with probability t.

    Args:
        seed: the run's seed.
        sample_index_B: g of each row.
        mask_rate_B: t of each row, or [B, L] of each position.
        is_maskable_BL: positions that may be masked.
    """
    u_BL = uniforms_of_rows(seed, "is_masked", sample_index_B, is_maskable_BL.shape[1])
    return is_below_rate(u_BL, mask_rate_B, is_maskable_BL)


def mask_exact_count(
    seed: int,
    index: list[tuple[int, ...]],
    count_B: Int64Array,
    is_maskable_BL: BoolArray,
    purpose: str = "is_masked",
) -> BoolArray:
    """is_masked_BL with exactly count_B maskable positions of each row: those with the smallest uniforms.

    Args:
        seed: the run's seed.
        index: names each row's stream.
        count_B: how many to mask, at most the row's maskable positions.
        is_maskable_BL: positions that may be masked.
        purpose: separates independent uses.
    """
    is_masked_BL = np.zeros_like(is_maskable_BL)
    for row, (stream, count) in enumerate(zip(index, count_B.tolist(), strict=True)):
        maskable = np.flatnonzero(is_maskable_BL[row])
        assert 0 <= count <= len(maskable)
        if count > 0:
            u = uniforms(seed, purpose, stream, is_maskable_BL.shape[1])[maskable]
            is_masked_BL[row, maskable[np.argpartition(u, count - 1)[:count]]] = True
    return is_masked_BL


def assemble(
    batch: CleanBatch,
    *,
    tokens_BL: Int64Array,
    is_scored_BL: BoolArray,
    weights_B: FloatArray,
    denominator: int,
    mask_rate_B: FloatArray,
    sequence_N: Int64Array | None = None,
) -> CorruptedBatch:
    """The batch as the model sees it, with every scored position of a row at the row's weight.

    Args:
        batch: the clean rows.
        tokens_BL: the model's input.
        is_scored_BL: positions whose (clean) token is to be predicted.
        weights_B: weight of the cross-entropy in each row, or in each counted sequence.
        denominator: this micro-batch's share of the global count.
        mask_rate_B: the mask rate of each row.
        sequence_N: of `counted_sequences`: which of `weights_B` is that of each flat position; None: its row's.
    """
    length = tokens_BL.shape[1]
    positions_M = np.flatnonzero(is_scored_BL)
    sequence_M = positions_M // length if sequence_N is None else sequence_N[positions_M]
    return CorruptedBatch(
        tokens_BL=tokens_BL,
        positions_M=positions_M,
        targets_M=batch.tokens_BL.reshape(-1)[positions_M],
        weights_M=weights_B.astype(np.float32)[sequence_M],
        denominator=denominator,
        mask_rate_B=mask_rate_B.astype(np.float32),
    )


def counted_sequences(batch: CleanBatch) -> tuple[Int64Array, Int64Array]:
    """What counts as one sequence where sequences are counted: a row, or (under `counts_documents`) a document in it.

    Returns:
        The row of each sequence: int64 [S]; the sequence of each flat position: int64 [B * L].
    """
    rows, length = batch.tokens_BL.shape
    if not batch.counts_documents:
        return np.arange(rows), np.repeat(np.arange(rows), length)
    assert batch.cu_seqlens is not None, "rows that count documents know where they end"
    sizes = [np.diff(boundaries) for boundaries in batch.cu_seqlens]
    row_S = np.repeat(np.arange(rows), [len(own) for own in sizes])
    return row_S, np.repeat(np.arange(len(row_S)), np.concatenate(sizes))


def count_by(sequence_N: Int64Array, sequences: int, is_counted_BL: BoolArray) -> Int64Array:
    """How many of the counted positions each sequence has: int64 [S]."""
    return np.bincount(sequence_N[is_counted_BL.reshape(-1)], minlength=sequences).astype(np.int64)


def maskable_count(batch: CleanBatch) -> Int64Array:
    """Number of maskable tokens of each row: int64 [B]."""
    return np.asarray(np.count_nonzero(batch.is_maskable_BL, axis=1), dtype=np.int64)


def shift_right(tokens_BL: Int64Array, bos_token_id: int, cu_seqlens: Sequence[Int32Array] | None = None) -> Int64Array:
    """[BOS, x_0, ..., x_{L-2}] of each row, or of each document between the boundaries of `cu_seqlens`."""
    shifted_BL = np.empty_like(tokens_BL)
    shifted_BL[:, 0] = bos_token_id
    shifted_BL[:, 1:] = tokens_BL[:, :-1]
    for row, boundaries in enumerate(cu_seqlens or ()):
        shifted_BL[row, boundaries[:-1]] = bos_token_id
    return shifted_BL
