"""The laws of the samplers on sequences short enough to enumerate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_md.diffusion import proposal, unmasking
from megatron_md.diffusion.proposal import gumbel_scores
from megatron_md.diffusion.sampler import Sample, SamplerConfig, infill, sample
from tests.diffusion.toy_denoiser import ALARM_Z, ToyLaw, misfit_z

ROWS = 40_000


def draw(law: ToyLaw, config: SamplerConfig, rows: int = ROWS) -> Sample:
    return sample(law, torch.zeros(rows, 0, dtype=torch.long), config, mask_token_id=law.mask)


def exact_config(strategy: str, **keys: object) -> SamplerConfig:
    return SamplerConfig(3, strategy=strategy, temperature=1.0, seed=5, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["first_hitting", "random", "low_confidence", "margin", "entropy"])
def test_one_token_per_step_has_the_exact_law(strategy: str) -> None:
    law = ToyLaw.random(2, 3)
    result = draw(law, exact_config(strategy))
    assert result.forward_passes == 3
    if strategy == "low_confidence":
        # The order may follow the drawn token's own probability, and then likely sequences are favoured.
        assert misfit_z(law.counts(result.tokens_BL), law.law_X) > ALARM_Z
    else:
        assert misfit_z(law.counts(result.tokens_BL), law.law_X) < ALARM_Z


def test_blocks_one_token_at_a_time_have_the_exact_law() -> None:
    law = ToyLaw.random(2, 4)
    config = SamplerConfig(4, block=2, strategy="first_hitting", temperature=1.0)
    assert misfit_z(law.counts(draw(law, config).tokens_BL), law.law_X) < ALARM_Z


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_ancestral_has_its_own_law_and_not_the_exact_one(steps: int) -> None:
    law = ToyLaw.random(2, 3)
    counts = law.counts(draw(law, exact_config("ancestral", steps=steps)).tokens_BL)
    assert misfit_z(counts, law.ancestral_law(steps)) < ALARM_Z
    assert misfit_z(counts, law.law_X) > ALARM_Z


def test_a_wrong_commit_probability_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    law, config = ToyLaw.tied_bits(), SamplerConfig(2, 4, strategy="ancestral", temperature=1.0)
    assert misfit_z(law.counts(draw(law, config).tokens_BL), law.ancestral_law(4)) < ALARM_Z
    monkeypatch.setattr(unmasking, "ancestral_commit_probability", lambda step, steps: 1.0 / steps)
    counts = law.counts(draw(law, config).tokens_BL)
    assert misfit_z(counts, law.ancestral_law(4)) > ALARM_Z
    assert misfit_z(counts, law.ancestral_law(4, lambda step, steps: 1.0 / steps)) < ALARM_Z


def test_ancestral_approaches_the_exact_law() -> None:
    law = ToyLaw.random(2, 3)
    errors = [np.abs(law.ancestral_law(steps) - law.law_X).sum() for steps in (1, 4, 16, 64)]
    # The error falls as 1/T: two positions share a step with chance 1/T.
    assert errors[2] / errors[3] == pytest.approx(4.0, rel=0.1)
    assert errors[3] < 0.02 * errors[0]


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_two_tied_bits_go_wrong_once_in_2t(steps: int) -> None:
    law = ToyLaw.tied_bits()
    wrong = 1.0 / (2 * steps)
    assert law.ancestral_law(steps)[1:3].sum() == pytest.approx(wrong)
    config = SamplerConfig(2, steps, strategy="ancestral", temperature=1.0)
    seen = law.counts(draw(law, config).tokens_BL)[1:3].sum() / ROWS
    assert abs(seen - wrong) < ALARM_Z * math.sqrt(wrong * (1 - wrong) / ROWS)


def test_infilling_has_the_conditional_law() -> None:
    law = ToyLaw.random(2, 3)
    canvas = torch.tensor([law.mask, 1, law.mask]).expand(ROWS, -1)
    result = infill(law, canvas, exact_config("first_hitting"), mask_token_id=law.mask)
    conditional_X = np.where(law.tokens_XN[:, 1] == 1, law.law_X, 0.0)
    assert misfit_z(law.counts(result.tokens_BL), conditional_X / conditional_X.sum()) < ALARM_Z
    assert (result.fixed_step_BL[:, 1] == 0).all() and result.forward_passes == 2


def test_low_confidence_one_at_a_time_is_greedy() -> None:
    law = ToyLaw.random(3, 4, seed=3)
    canvas = [law.mask] * 4
    order = []
    for _ in range(4):
        state = law.states_SN.tolist().index(canvas)
        best = law.conditional_SNV[state].max(axis=1)
        best[np.array(canvas) != law.mask] = 0.0
        position = int(best.argmax())
        canvas[position] = int(law.conditional_SNV[state, position].argmax())
        order.append(position)
    result = draw(law, SamplerConfig(4), rows=2)
    assert result.tokens_BL.tolist() == [canvas, canvas]
    assert result.fixed_step_BL[0].argsort().tolist() == order


def tail_wins_z(scores: object, rows: int = 20_000) -> float:
    """How far a rare token's wins are from their law, when its uniform is drawn from the top 2^-20 only.

    Against a token of probability 1 - q the rare one wins iff -log u_rare < q/(1-q) (-log u): in the tail the chance is
    E[min(1, 1 - exp(-E q/(1-q)) / 2^-20)], E exponential.
    """
    generator = np.random.default_rng(1)
    q, tail = 2.0**-23, 2.0**-20
    u = torch.from_numpy(np.stack([generator.random(rows), 1.0 - tail * (1.0 - generator.random(rows))], axis=1))
    logits = torch.tensor([math.log1p(-q), math.log(q)], dtype=torch.float64).expand(rows, 2)
    wins = (scores(logits, 1.0, u).argmax(dim=1) == 1).double().mean().item()  # type: ignore[operator]
    need = -np.log(np.linspace(0.5, 199_999.5, 200_000) / 200_000) * q / (1 - q)
    chance = float(np.minimum(1.0, -np.expm1(-need) / tail).mean())
    return abs(wins - chance) / math.sqrt(chance * (1 - chance) / rows)


def test_gumbel_noise_reaches_the_tail_and_float32_does_not() -> None:
    def float32_scores(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
        # What torch.rand gives in float32: multiples of 2^-24 below 1.
        uniforms = ((uniforms * 2**24).floor() / 2**24).float()
        return logits.float() - temperature * torch.log(-torch.log(uniforms))

    assert tail_wins_z(gumbel_scores) < ALARM_Z
    assert tail_wins_z(float32_scores) > ALARM_Z


def test_the_sampler_draws_its_noise_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def watching(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor) -> torch.Tensor:
        seen.append(uniforms)
        return gumbel_scores(logits, temperature, uniforms)

    monkeypatch.setattr(proposal, "gumbel_scores", watching)
    draw(ToyLaw.random(2, 3), exact_config("random"), rows=100)
    for uniforms in seen:
        assert uniforms.dtype == torch.float64
        # A float32 number in disguise would be a multiple of 2^-24.
        assert ((uniforms * 2**24) % 1.0 != 0.0).double().mean() > 0.99
