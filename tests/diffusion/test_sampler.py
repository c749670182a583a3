from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peer_vectors import vector

from megatron_md.diffusion.sampler import (
    Choice,
    SamplerConfig,
    SamplerStep,
    ancestral_commit_probability,
    exclude_mask_token,
    gumbel_scores,
    low_confidence,
    register_strategy,
    sample,
    transfer_counts,
)

MASK, VOCAB = 6, 7
STRATEGIES = ["low_confidence", "random", "ancestral"]


class Denoiser:
    """Fixed logits per position (the mask token's are the largest); counts its calls."""

    def __init__(self, length: int, *, seed: int = 0) -> None:
        self.logits_LV = 2.0 * torch.randn(length, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.logits_LV[:, MASK] = 50.0
        self.inputs: list[torch.Tensor] = []

    def __call__(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        self.inputs.append(tokens_BL.clone())
        return self.logits_LV.expand(len(tokens_BL), -1, -1)

    @property
    def best_L(self) -> torch.Tensor:
        return self.logits_LV[:, :MASK].argmax(dim=1)


def prompts(rows: int, length: int) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) % MASK


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("length", "steps", "block"), [(8, 8, None), (8, 3, None), (8, 16, 4), (12, 6, 4), (5, 1, None)]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_canvas_is_filled_with_real_tokens(
    strategy: str, length: int, steps: int, block: int | None, temperature: float
) -> None:
    denoiser, prompt = Denoiser(3 + length), prompts(2, 3)
    config = SamplerConfig(length, steps, block, strategy, temperature)
    result = sample(denoiser, prompt, config, mask_token_id=MASK)
    assert result.tokens_BL.shape == (2, 3 + length) and not (result.tokens_BL == MASK).any()
    assert torch.equal(result.tokens_BL[:, :3], prompt)
    assert result.forward_passes == len(denoiser.inputs) <= steps
    if temperature == 0.0:
        assert torch.equal(result.tokens_BL[:, 3:], denoiser.best_L[3:].expand(2, -1))


def test_low_confidence_commits_the_likeliest_first() -> None:
    denoiser, history = Denoiser(9), []
    config = SamplerConfig(length=8, steps=3)
    sample(denoiser, prompts(1, 1), config, mask_token_id=MASK, on_step=history.append)
    confidence_L = denoiser.logits_LV[1:, :MASK].softmax(dim=1).amax(dim=1)
    order = confidence_L.argsort(descending=True).tolist()
    committed = [step.is_committed_BL[0, 1:].nonzero()[:, 0].tolist() for step in history]
    assert committed == [sorted(order[:3]), sorted(order[3:6]), sorted(order[6:])]


def test_blocks_are_filled_from_left_to_right() -> None:
    denoiser = Denoiser(8)
    steps: list[tuple[int, int]] = []

    def watch(step: SamplerStep) -> None:
        steps.append((step.step, int((step.tokens_BL != MASK).sum())))
        committed = step.is_committed_BL[0].nonzero()[:, 0]
        assert set((committed // 4).tolist()) == {(step.step - 1) // 2} and step.steps == 4

    sample(denoiser, prompts(1, 0), SamplerConfig(8, 4, 4, "random"), mask_token_id=MASK, on_step=watch)
    assert steps == [(1, 2), (2, 4), (3, 6), (4, 8)]


def test_the_denoiser_sees_what_was_committed() -> None:
    denoiser = Denoiser(6)
    result = sample(denoiser, prompts(1, 2), SamplerConfig(4, 4), mask_token_id=MASK)
    for earlier, later in zip(denoiser.inputs, [*denoiser.inputs[1:], result.tokens_BL], strict=True):
        changed = earlier != later
        assert changed.sum() == 1 and (earlier[changed] == MASK).all()


def test_same_seed_same_sample() -> None:
    def draw(seed: int) -> torch.Tensor:
        config = SamplerConfig(20, 10, None, "ancestral", 1.0, seed)
        return sample(Denoiser(20), prompts(3, 0), config, mask_token_id=MASK).tokens_BL

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_ancestral_needs_no_pass_when_nothing_changed() -> None:
    denoiser = Denoiser(4)
    result = sample(denoiser, prompts(1, 0), SamplerConfig(4, 100, None, "ancestral"), mask_token_id=MASK)
    # Four positions change the canvas at most four times, and it takes one pass before each change.
    assert result.forward_passes <= 4


def test_ancestral_commits_uniformly_in_time() -> None:
    rows, steps = 4000, 5
    counts: list[float] = []
    config = SamplerConfig(4, steps, None, "ancestral")
    denoiser = Denoiser(4)
    sample(
        denoiser, prompts(rows, 0), config, mask_token_id=MASK, on_step=lambda s: counts.append(s.is_committed_BL.sum())
    )
    # Each position is committed in each of the steps with chance 1/5.
    for count in counts:
        assert abs(float(count) / (4 * rows) - 0.2) < 4 * math.sqrt(0.16 / (4 * rows))


def test_temperature_samples_from_the_softmax() -> None:
    denoiser, rows = Denoiser(1), 20_000
    for temperature in (0.5, 1.0, 2.0):
        config = SamplerConfig(1, 1, None, "random", temperature)
        tokens = sample(denoiser, prompts(rows, 0), config, mask_token_id=MASK).tokens_BL[:, 0]
        chance_V = (denoiser.logits_LV[0, :MASK] / temperature).softmax(dim=0)
        share_V = torch.bincount(tokens, minlength=MASK) / rows
        assert ((share_V - chance_V).abs() < 4 * (chance_V * (1 - chance_V) / rows).sqrt() + 1e-4).all()


def test_transfer_counts_of_llada() -> None:
    case = vector("llada_num_transfer_tokens")
    for inputs, expected in zip(case["inputs"], case["expected"], strict=True):
        assert transfer_counts(torch.tensor(inputs["n_masked"]), inputs["steps"]).tolist() == expected


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
    log_probs = exclude_mask_token(torch.tensor(inputs["logits"]), inputs["mask_id"]).log_softmax(dim=-1)
    expected = torch.tensor(case["expected"]["log_p_of_x0"])
    # x0 of the toy batch; visible positions have log-probability 0 by definition and are not predicted.
    x0_BL = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]])
    is_masked_BL = xt_BL == inputs["mask_id"]
    ours = log_probs.gather(2, x0_BL[..., None])[..., 0]
    torch.testing.assert_close(ours[is_masked_BL], expected[is_masked_BL], atol=case["tol"], rtol=0)
    assert (log_probs[..., inputs["mask_id"]] == -math.inf).all()


def test_ancestral_step_of_mdlm() -> None:
    case = vector("mdlm_ancestral_step_probs")
    logits = exclude_mask_token(torch.tensor(case["inputs"]["logits"]), 4)
    # From t = 0.8 to s = 0.6 is step 1 of 5.
    commit = ancestral_commit_probability(1, 5)
    probabilities = commit * logits.softmax(dim=-1)
    probabilities[..., 4] = 1.0 - commit
    for name in ("ddpm_normalised", "ddpm_cache_normalised"):
        expected = torch.tensor(case["expected"][name])
        torch.testing.assert_close(probabilities, expected, atol=case["tol"], rtol=0)


def test_confidence_of_the_greedy_proposal_is_its_probability() -> None:
    case = vector("dream_confidences")
    logits = torch.tensor(case["inputs"]["logits"])
    seen: list[Choice] = []

    @register_strategy("test_watching")
    def watching(choice: Choice) -> torch.Tensor:
        seen.append(choice)
        return low_confidence(choice)

    with_mask = torch.cat([logits, torch.zeros(3, 1)], dim=1)
    config = SamplerConfig(3, 1, strategy="test_watching")
    sample(lambda tokens: with_mask[None], torch.zeros(1, 0, dtype=torch.long), config, mask_token_id=3)
    expected = torch.tensor([case["expected"]["maskgit_plus"]])
    torch.testing.assert_close(seen[0].confidence_BK, expected, atol=case["tol"], rtol=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"block": 0}, "block must be at least 1"),
        ({"block": 16}, "block 16 is longer than length 8"),
        ({"block": 3}, "length 8 is not a multiple of block 3"),
        ({"block": 4, "steps": 5}, "steps 5 is not a multiple of the 2 blocks"),
        ({"strategy": "low_confidense"}, "unknown sampling strategy 'low_confidense'; did you mean 'low_confidence'"),
        ({"temperature": -1.0}, "temperature must be 0 or a positive number"),
        ({"temperature": math.nan}, "temperature must be 0 or a positive number"),
    ],
    ids=str,
)
def test_bad_configs_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**{"length": 8, "steps": 8, **keys})


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt contains the mask token"):
        sample(Denoiser(3), torch.tensor([[MASK]]), SamplerConfig(2, 2), mask_token_id=MASK)
    with pytest.raises(ValueError, match="mask token 9 lies outside the 7 columns"):
        sample(Denoiser(3), prompts(1, 1), SamplerConfig(2, 2), mask_token_id=9)
