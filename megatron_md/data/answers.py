"""Which tokens of a dialogue are answers, as shards keep it: runs of tokens.

Each block of a chat corpus' tar has a member `KEY.answers.bin` beside its tokens and lengths: triples (document in the
block, start, stop) of little-endian uint32, in tokens of the document, ascending.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_md.batch import BoolArray, Int64Array

RUN_DTYPE = np.dtype([("document", "<u4"), ("start", "<u4"), ("stop", "<u4")])
RunTable = npt.NDArray[np.void]


def runs_of(is_answer: BoolArray) -> Int64Array:
    """Begin and end [runs, 2] of every run of True, ascending."""
    edges = np.flatnonzero(np.diff(is_answer, prepend=False, append=False))
    return edges.reshape(-1, 2)


def table_of(document: int, runs: Int64Array) -> RunTable:
    """The runs of document `document` of a block, as they are stored."""
    table = np.empty(len(runs), RUN_DTYPE)
    table["document"], table["start"], table["stop"] = document, runs[:, 0], runs[:, 1]
    return table


def runs_in(table: RunTable, tokens: int) -> Int64Array | None:
    """The runs [n, 2] of one document of `tokens` tokens; None where they cannot be its.

    They are at least one, not empty, apart from each other, ascending, and within the document.
    """
    runs = np.stack([table["start"], table["stop"]], axis=1).astype(np.int64)
    is_one = bool(len(table)) and bool((table["document"] == table["document"][0]).all())
    return runs if is_one and (np.diff(runs.ravel()) > 0).all() and runs[-1, 1] <= tokens else None
