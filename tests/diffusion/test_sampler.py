from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_md.diffusion.names import strategies
from megatron_md.diffusion.proposal import guide, keep_top_p
from megatron_md.diffusion.sampler import SamplerStep, infill, sample
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.diffusion.unmasking import Choice
from tests.diffusion.peer_vectors import vector

MASK, EOS, VOCAB = 6, 5, 7
STRATEGIES = ["low_confidence", "random", "ancestral", "margin", "entropy", "threshold", "factor"]


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_with_its_own_seed_is_the_same_alone_and_in_a_batch(strategy: str) -> None:
    # Rows that are full at different times, in blocks: what another row still draws must not matter.
    canvas = torch.full((3, 12), MASK)
    canvas[1, 2:5], canvas[2, 1:] = 1, 2
    config = SamplerConfig(12, 8, 6, strategy, 1.0)
    seeds = [7, 8, 7]
    together = infill(Denoiser(12), canvas, config, mask_token_id=MASK, seeds=seeds)
    for row, seed in enumerate(seeds):
        alone = infill(Denoiser(12), canvas[row : row + 1], config, mask_token_id=MASK, seeds=[seed])
        assert torch.equal(together.tokens_BL[row], alone.tokens_BL[0])
        by_config = infill(Denoiser(12), canvas[row : row + 1], replace(config, seed=seed), mask_token_id=MASK)
        assert torch.equal(alone.tokens_BL, by_config.tokens_BL)
    other = infill(Denoiser(12), canvas[:1], config, mask_token_id=MASK, seeds=[9])
    assert not torch.equal(other.tokens_BL[0], together.tokens_BL[0])
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        infill(Denoiser(12), canvas, config, mask_token_id=MASK, seeds=[1, 2])


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


def test_threshold_needs_fewer_passes_where_the_denoiser_is_sure() -> None:
    denoiser = Denoiser(8)
    passes = []
    for threshold in (1.0, 0.5, 0.01):
        config = SamplerConfig(8, strategy="threshold", threshold=threshold)
        result = sample(denoiser, prompts(2, 0), config, mask_token_id=MASK)
        assert result.forward_passes == result.steps == int(result.fixed_step_BL.max())
        passes.append(result.forward_passes)
    assert passes[0] == 8 > passes[1] > passes[2] == 1


def test_strategies_look_at_their_own_confidence() -> None:
    # Position 0 has the likeliest token, 1 the largest margin, 2 the least entropy.
    p = torch.tensor([[0.50, 0.35, 0.05, 0.05, 0.05], [0.49, 0.13, 0.13, 0.13, 0.12], [0.499, 0.40, 0.101, 0, 0]])
    logits = torch.cat([p.log(), torch.zeros(3, 1)], dim=1)[None]
    for strategy, first in [("low_confidence", 0), ("margin", 1), ("entropy", 2)]:
        config = SamplerConfig(3, strategy=strategy)
        result = sample(lambda tokens: logits, prompts(1, 0), config, mask_token_id=5)
        assert int(result.fixed_step_BL[0].argmin()) == first


def test_fixed_steps_say_when_each_token_came() -> None:
    denoiser, history = Denoiser(9), []
    config = SamplerConfig(8, 4, 4, "random")
    result = sample(denoiser, prompts(2, 1), config, mask_token_id=MASK, on_step=history.append)
    for step in history:
        assert torch.equal(result.fixed_step_BL == step.step, step.is_committed_BL)
        # Nothing here depends on the canvas: the denoiser's probability of each token, without the mask token's.
        chance_BL = (
            denoiser.logits_LV[:, :MASK].softmax(dim=1).expand(2, -1, -1).gather(2, result.tokens_BL[..., None])[..., 0]
        )
        torch.testing.assert_close(step.probability_BL, chance_BL * step.is_committed_BL)
    assert (result.fixed_step_BL[:, 0] == 0).all() and result.steps == 4
    assert torch.bincount(result.fixed_step_BL[0]).tolist() == [1, 2, 2, 2, 2]


def test_infilling_keeps_what_is_given() -> None:
    denoiser = Denoiser(6)
    canvas = torch.tensor([[1, MASK, 2, MASK, MASK, 3], [MASK, 1, MASK, 4, 0, 0]])
    before = canvas.clone()
    result = infill(denoiser, canvas, SamplerConfig(6, 6, 3), mask_token_id=MASK)
    assert torch.equal(canvas, before)
    expected = torch.where(before == MASK, denoiser.best_L, before)
    assert torch.equal(result.tokens_BL, expected) and torch.equal(result.fixed_step_BL == 0, before != MASK)
    # The first block has one and two open positions in its rows, the second two and none.
    assert result.forward_passes == 4


@pytest.mark.parametrize("block", [None, 3])
def test_stop_ends_a_row_at_its_first_eos(block: int | None) -> None:
    denoiser = Denoiser(14)
    denoiser.logits_LV[:, EOS] = -30.0
    denoiser.logits_LV[[6, 9], EOS] = 30.0
    config = SamplerConfig(12, 12, block, eos="stop")
    result = sample(denoiser, prompts(1, 2), config, mask_token_id=MASK, eos_token_id=EOS)
    expected = torch.where(torch.arange(14) < 6, denoiser.best_L, EOS)
    expected[:2] = prompts(1, 2)[0]
    assert torch.equal(result.tokens_BL[0], expected) and (result.fixed_step_BL[0, 2:] > 0).all()
    kept = sample(denoiser, prompts(1, 2), SamplerConfig(12, 12, block), mask_token_id=MASK, eos_token_id=EOS)
    assert (kept.tokens_BL[0, 2:] != EOS).sum() == 10
    # In blocks the row is done with the second one; without them the sure tokens after it come before the end.
    assert result.forward_passes < kept.forward_passes == 12 if block else result.forward_passes <= 12


def test_stop_ignores_a_given_eos_and_leaves_given_tokens() -> None:
    denoiser = Denoiser(5)
    denoiser.logits_LV[:, EOS] = -30.0
    denoiser.logits_LV[2, EOS] = 30.0
    canvas = torch.tensor([[EOS, MASK, MASK, MASK, 3]])
    result = infill(denoiser, canvas, SamplerConfig(5, eos="stop"), mask_token_id=MASK, eos_token_id=EOS)
    assert result.tokens_BL.tolist() == [[EOS, int(denoiser.best_L[1]), EOS, EOS, 3]]


def test_suppress_never_generates_eos() -> None:
    denoiser = Denoiser(20)
    denoiser.logits_LV[:, EOS] = 30.0
    for eos, share in [("keep", 1.0), ("suppress", 0.0)]:
        config = SamplerConfig(20, temperature=1.0, eos=eos)
        result = sample(denoiser, prompts(3, 0), config, mask_token_id=MASK, eos_token_id=EOS)
        assert (result.tokens_BL == EOS).double().mean() == share


@pytest.mark.parametrize("number", range(6))
def test_eos_modes_are_those_of_llada(number: int) -> None:
    case = vector("llada_eos_modes")
    inputs, expected = case["inputs"], case["expected"][number]
    table_LV, shift_V = torch.tensor(inputs["logits"]), torch.tensor(inputs["shift"])
    mask, ends = inputs["mask"], {inputs["eos"], inputs["eot"]}

    def denoiser(tokens_BL: torch.Tensor) -> torch.Tensor:
        return table_LV + 0.1 * (tokens_BL != mask).sum(dim=1)[:, None, None] * shift_V

    keys = expected["keys"]
    config = SamplerConfig(
        keys["gen_length"],
        keys["steps"],
        keys["block_length"],
        eos="suppress" if keys.get("logits_eos_inf") else "keep",
        confidence_eos_eot_inf=keys.get("confidence_eos_eot_inf", False),
    )
    result = sample(
        denoiser,
        torch.tensor([inputs["prompt"]]),
        config,
        mask_token_id=mask,
        eos_token_id=inputs["eos"],
        eot_token_ids=[inputs["eot"]],
    )
    assert result.tokens_BL[0].tolist() == expected["tokens"]
    found = [(result.fixed_step_BL[0] == step).nonzero()[:, 0].tolist() for step in range(1, keys["steps"] + 1)]
    if config.confidence_eos_eot_inf:
        # Ends have no confidence, so that their order among each other is chance: torch.topk's there, leftmost here.
        is_end = [token in ends for token in expected["tokens"]]
        words = [[[at for at in step if not is_end[at]] for step in steps] for steps in (found, expected["committed"])]
        assert words[0] == words[1] and list(map(len, found)) == list(map(len, expected["committed"]))
    else:
        assert found == expected["committed"]


@pytest.mark.parametrize("strategy", ["low_confidence", "margin", "entropy", "threshold", "factor"])
def test_ends_of_turns_come_last_in_every_order_of_confidence(strategy: str) -> None:
    denoiser, eot = Denoiser(9), 4
    denoiser.logits_LV[:, [eot, EOS]] = -30.0
    denoiser.logits_LV[1, EOS] = denoiser.logits_LV[5, eot] = 30.0  # the surest of all
    config = SamplerConfig(8, strategy=strategy, threshold=1.0, factor=0.01, confidence_eos_eot_inf=True)
    result = sample(denoiser, prompts(1, 1), config, mask_token_id=MASK, eos_token_id=EOS, eot_token_ids=[eot])
    assert result.fixed_step_BL[0, [1, 5]].tolist() == [7, 8]
    assert result.tokens_BL[0, [1, 5]].tolist() == [EOS, eot]


def test_stop_ends_a_row_at_the_end_of_a_turn() -> None:
    denoiser, eot = Denoiser(6), 4
    denoiser.logits_LV[:, [eot, EOS]] = -30.0
    denoiser.logits_LV[2, eot] = 30.0
    config = SamplerConfig(6, block=2, eos="stop")
    result = sample(denoiser, prompts(1, 0), config, mask_token_id=MASK, eos_token_id=EOS, eot_token_ids=[eot])
    assert result.tokens_BL[0].tolist() == [*denoiser.best_L[:2].tolist(), eot, EOS, EOS, EOS]


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    for top_p, kept in [(0.4, 1), (0.5, 1), (0.51, 2), (0.7, 2), (0.95, 4)]:
        # 0.7 is reached by the first two up to rounding: take a bound just below.
        assert keep_top_p(logits, 1.0, top_p - 1e-6).isfinite().tolist() == [i < kept for i in range(4)]
    # At temperature 1/2 the first has 25/34 of the probability.
    assert keep_top_p(logits, 0.5, 0.73).isfinite().sum() == 1 and keep_top_p(logits, 0.5, 0.74).isfinite().sum() == 2


def test_top_p_samples_from_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log()
    config = SamplerConfig(1, temperature=1.0, top_p=0.75)
    tokens = sample(lambda t: logits.expand(len(t), 1, 5), prompts(20_000, 0), config, mask_token_id=4).tokens_BL
    share = torch.bincount(tokens[:, 0], minlength=5) / 20_000
    assert share[2:].sum() == 0 and abs(float(share[0]) - 5 / 8) < 5.5 * math.sqrt(15 / 64 / 20_000)


def test_guidance_moves_away_from_what_the_prompt_does_not_change() -> None:
    conditional, unconditional = torch.tensor([1.0, 2.0, -math.inf]), torch.tensor([3.0, 1.0, -math.inf])
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 2.0), torch.tensor([-3.0, 4.0, -math.inf]))
    inputs = []

    def denoiser(tokens_BL: torch.Tensor) -> torch.Tensor:
        inputs.append(tokens_BL.clone())
        logits = torch.zeros(*tokens_BL.shape, VOCAB)
        logits[..., 1] = 1.0  # likeliest either way
        logits[..., 2] = torch.where(tokens_BL[:, :1] == 3, 0.9, 0.0)  # what the prompt speaks for
        return logits

    for guidance, token, passes in [(0.0, 1, 4), (1.0, 2, 8)]:
        inputs.clear()
        config = SamplerConfig(4, guidance=guidance)
        result = sample(denoiser, torch.tensor([[3]]), config, mask_token_id=MASK)
        assert result.tokens_BL[0, 1:].tolist() == [token] * 4 and result.forward_passes == len(inputs) == passes
    assert inputs[1][0].tolist() == [MASK] * 5 and inputs[0][0, 0] == 3


def test_a_strategy_that_commits_nothing_still_fills_the_canvas() -> None:
    @strategies.register("test_reluctant")
    def reluctant(choice: Choice) -> torch.Tensor:
        return torch.zeros_like(choice.is_open_BK)

    result = sample(Denoiser(4), prompts(1, 0), SamplerConfig(4, strategy="test_reluctant"), mask_token_id=MASK)
    assert (result.fixed_step_BL == 4).all() and result.forward_passes == 1


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
        ({"strategy": "first_hitting", "steps": 4}, "first_hitting commits one token per step: steps must be"),
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 0.9}, "top_p 0.9 changes nothing at temperature 0"),
        ({"guidance": -1.0}, "guidance must be 0 or a positive number"),
        ({"threshold": 1.5}, r"threshold must be in \(0, 1\]"),
        ({"factor": 0.0}, "factor must be a positive number"),
        ({"eos": "ignore"}, "eos must be one of keep, stop, suppress, got 'ignore'"),
    ],
    ids=str,
)
def test_bad_configs_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**{"length": 8, "steps": 8, **keys})


@pytest.mark.parametrize(
    ("prompt", "keys", "more", "message"),
    [
        ([[MASK]], {}, {}, r"prompt contains the mask token \(6\)"),
        ([[0]], {}, {"mask_token_id": 9}, "token 9 lies outside the 7 columns"),
        ([[0, 1]], {}, {"max_length": 3}, "the prompt's 2 tokens and length 2 exceed the model's 3 positions"),
        ([[0]], {"eos": "stop"}, {}, "eos 'stop' needs an eos token id"),
        ([[0]], {"confidence_eos_eot_inf": True}, {}, "confidence_eos_eot_inf needs an eos token id"),
        ([[]], {"guidance": 1.0}, {}, "guidance needs a prompt"),
    ],
    ids=str,
)
def test_bad_input_is_refused(prompt: list[list[int]], keys: dict[str, Any], more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(
            Denoiser(4),
            torch.tensor(prompt, dtype=torch.long),
            SamplerConfig(2, **keys),
            **{"mask_token_id": MASK, **more},
        )


def test_bad_canvases_are_refused() -> None:
    with pytest.raises(ValueError, match="length 3 is not the 4 positions of the canvas"):
        infill(Denoiser(4), torch.full((1, 4), MASK), SamplerConfig(3), mask_token_id=MASK)
    with pytest.raises(ValueError, match="exceed the model's 3 positions"):
        infill(Denoiser(4), torch.full((1, 4), MASK), SamplerConfig(4), mask_token_id=MASK, max_length=3)
