"""Proposed tokens and confidences are those of the peers."""

from __future__ import annotations

import math

import torch

from megatron_md.diffusion.proposal import exclude, gumbel_scores, propose
from tests.diffusion.peer_vectors import vector


def test_gumbel_noise_of_llada() -> None:
    case = vector("gumbel_noise_T")
    logits = torch.tensor(case["inputs"]["logits"])
    uniforms = torch.full((3,), case["inputs"]["u"], dtype=torch.float64)
    for temperature, expected in zip(case["inputs"]["temperature"], case["expected"], strict=True):
        scores = gumbel_scores(logits, temperature, uniforms)
        if temperature == 0:
            assert scores.tolist() == expected
        else:
            assert scores.dtype == torch.float64
            torch.testing.assert_close(
                scores.exp(), torch.tensor(expected, dtype=torch.float64), atol=case["tol"], rtol=1e-7
            )


def test_excluded_mask_token_as_in_mdlm() -> None:
    case = vector("mdlm_subs_log_probs")
    inputs = case["inputs"]
    xt_BL = torch.tensor(inputs["xt"])
    log_probs = exclude(torch.tensor(inputs["logits"]), (inputs["mask_id"],)).log_softmax(dim=-1)
    expected = torch.tensor(case["expected"]["log_p_of_x0"])
    # x0 of the toy batch; visible positions have log-probability 0 by definition and are not predicted.
    x0_BL = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]])
    is_masked_BL = xt_BL == inputs["mask_id"]
    ours = log_probs.gather(2, x0_BL[..., None])[..., 0]
    torch.testing.assert_close(ours[is_masked_BL], expected[is_masked_BL], atol=case["tol"], rtol=0)
    assert (log_probs[..., inputs["mask_id"]] == -math.inf).all()


def test_confidences_of_dream() -> None:
    case = vector("dream_confidences")
    logits = torch.tensor([case["inputs"]["logits"]])
    found = propose(logits, torch.ones(1, 3, dtype=torch.bool), [torch.Generator()], excluded=())
    for name, ours in [
        ("maskgit_plus", found.probability_BK),
        ("topk_margin", found.margin_BK),
        ("neg_entropy", found.negative_entropy_BK),
    ]:
        torch.testing.assert_close(ours, torch.tensor([case["expected"][name]]), atol=case["tol"], rtol=0)
