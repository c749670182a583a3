"""Which dialogues share a row, and which rows follow each other. Arithmetic only, no file is read here."""

from __future__ import annotations

import numpy as np

from megatron_md.batch import Int64Array
from megatron_md.data.packing import permutation

_POOL_GROUPS = 50  # groups whose rows are sorted by length together


def pack(sizes_D: Int64Array, capacity: int) -> tuple[Int64Array, Int64Array]:
    """Fill rows with whole documents: best fit decreasing (Johnson 1973), at most 11/9 of the fewest rows and one more.

    Each document, the largest first, goes into the fullest row that still takes it. Costs a few microseconds per
    document.

    Args:
        sizes_D: tokens of each document, at most `capacity`; those of equal size are taken in their order.
        capacity: tokens of a row.

    Returns:
        The documents [D], row by row, and where each row begins in them [R + 1].
    """
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the tokens that are left
    is_left = 0  # bit c: some row has exactly c tokens left
    row_D, rows = np.empty(len(sizes_D), dtype=np.int64), 0
    order = np.argsort(-sizes_D, kind="stable")
    for document, size in zip(order.tolist(), sizes_D[order].tolist(), strict=True):
        fitting = is_left >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = rows_with[left].pop()
            if not rows_with[left]:
                is_left ^= 1 << left
        else:
            row, left, rows = rows, capacity, rows + 1
        row_D[document] = row
        left -= size
        rows_with[left].append(row)
        is_left |= 1 << left
    return np.argsort(row_D, kind="stable"), np.searchsorted(np.sort(row_D), np.arange(rows + 1))


def group_by_length(order_R: Int64Array, lengths_R: Int64Array, group: int, *key: str | int) -> Int64Array:
    """The same rows, so that `group` of similar length follow each other.

    Rows are sorted within pools of 50 groups, and the groups of a pool are permuted.

    Args:
        order_R: numbers of the rows, permuted.
        lengths_R: tokens of each row, by its number.
        group: rows of a group.
        key: what the permutations depend on.
    """
    parts = []
    for number, start in enumerate(range(0, len(order_R), group * _POOL_GROUPS)):
        pool = order_R[start : start + group * _POOL_GROUPS]
        pool = pool[np.argsort(-lengths_R[pool], kind="stable")]
        whole = len(pool) // group
        parts += [
            pool[: whole * group].reshape(whole, group)[permutation(whole, "groups", *key, number)].ravel(),
            pool[whole * group :],
        ]
    return np.concatenate(parts)
