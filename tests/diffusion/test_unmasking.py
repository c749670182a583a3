"""What a step commits is what the peers' steps commit."""

from __future__ import annotations

from typing import Any

import torch

from megatron_md.diffusion.proposal import exclude
from megatron_md.diffusion.unmasking import (
    Choice,
    ancestral_commit_probability,
    largest,
    over_threshold,
    transfer_counts,
    within_factor,
)
from tests.diffusion.peer_vectors import vector


def test_transfer_counts_of_llada() -> None:
    case = vector("llada_num_transfer_tokens")
    for inputs, expected in zip(case["inputs"], case["expected"], strict=True):
        assert transfer_counts(torch.tensor(inputs["n_masked"]), inputs["steps"]).tolist() == expected


def test_ancestral_step_of_mdlm() -> None:
    case = vector("mdlm_ancestral_step_probs")
    logits = exclude(torch.tensor(case["inputs"]["logits"]), (4,))
    # From t = 0.8 to s = 0.6 is step 1 of 5.
    commit = ancestral_commit_probability(1, 5)
    probabilities = commit * logits.softmax(dim=-1)
    probabilities[..., 4] = 1.0 - commit
    for name in ("ddpm_normalised", "ddpm_cache_normalised"):
        expected = torch.tensor(case["expected"][name])
        torch.testing.assert_close(probabilities, expected, atol=case["tol"], rtol=0)


def choice_of(probability_BK: torch.Tensor, is_open_BK: torch.Tensor, **keys: Any) -> Choice:
    return Choice(
        is_open_BK=is_open_BK,
        probability_BK=probability_BK,
        margin_BK=probability_BK,
        negative_entropy_BK=probability_BK,
        quota_B=torch.tensor([2]),
        step=0,
        steps=8,
        generators=[torch.Generator()],
        **{"threshold": 0.9, "factor": 1.0, **keys},
    )


def test_parallel_decoding_of_fast_dllm() -> None:
    case = vector("fastdllm_transfer_index")
    probability_BK = torch.tensor(case["inputs"]["p_token0"])
    is_open_BK = torch.tensor(case["inputs"]["mask"]).bool()
    found = [
        over_threshold(choice_of(probability_BK, is_open_BK, threshold=0.9)),
        over_threshold(choice_of(probability_BK, is_open_BK, threshold=0.99)),
        within_factor(choice_of(probability_BK, is_open_BK, factor=1.0)),
        within_factor(choice_of(probability_BK, is_open_BK, factor=0.5)),
        largest(probability_BK, is_open_BK, torch.tensor([2])),
    ]
    assert [is_chosen.int().tolist() for is_chosen in found] == case["expected"]
