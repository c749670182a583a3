"""Attention annealing: from a causal model's attention to a denoiser's, little by little over the start of a run.

A causal model that becomes a denoiser has never seen what lies to the right of a token. DiffuGPT (Gong et al. 2025,
arXiv 2410.17891) lets it see more and more of that: in its released code a pair of a query and a later key is open with
a probability that grows linearly to 1, drawn anew for each step and shared by the rows of a batch. So it is here, with
progress counted in tokens, and with random numbers that are a function of (seed, first row of the global batch, query,
key): no layout, restart or row length changes what is open.
"""

from __future__ import annotations

import numpy as np

from megatron_md.batch import BatchPosition, BoolArray
from megatron_md.diffusion.corruption import uniforms


def open_share(progress: float, until: float) -> float:
    """Share of the pairs (query, later key) that attention sees, in [0, 1].

    Args:
        progress: of the run in tokens, in [0, 1].
        until: progress from which on attention is bidirectional; 0: it always is.
    """
    return 1.0 if progress >= until else progress / until


def hidden_pairs(seed: int, position: BatchPosition, length: int, until: float) -> BoolArray | None:
    """The pairs that attention does not see in a global batch.

    Args:
        seed: the run's seed.
        position: the global batch.
        length: L of its rows.
        until: as in `open_share`.

    Returns:
        is_hidden_LL, by query and key: all later keys at progress 0, fewer and fewer then; None once there are none.
    """
    share = open_share(position.progress, until)
    if share == 1.0:
        return None
    is_hidden_LL = np.zeros((length, length), dtype=np.bool_)
    for query in range(length - 1):
        index = (position.first_sample_index, query)
        u = uniforms(seed, "attention_annealing", index, length - query - 1, start=query + 1)
        is_hidden_LL[query, query + 1 :] = u >= share
    return is_hidden_LL
