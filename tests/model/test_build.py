"""The real model on the meta device has the parameters that the estimates count from shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_md.config import ResolvedConfig, config_from_mapping, resolve
from megatron_md.model.build import apply_overrides, build_model, count_parameters, transformer_config
from megatron_md.parallel import World
from megatron_md.run import estimate as estimates

LLADA_8B = 8_015_581_184


def preset(name: str, vocab: int) -> ResolvedConfig:
    return resolve(config_from_mapping({"model": {"preset": name, "vocab": vocab}}))


@pytest.mark.parametrize(
    ("name", "vocab"), [("tiny", 8192), ("50m", 32000), ("1b", 32000), ("1b-aligned", 32000), ("8b", 126464)]
)
def test_every_preset_builds_and_is_counted_right(world: World, name: str, vocab: int) -> None:
    config = preset(name, vocab)
    with torch.device("meta"):
        chunks = build_model(config, torch.device("meta"), causal=False, mask_token_id=3, initialize=False)
    assert count_parameters(chunks) == estimates.parameter_count(config.model)


def test_8b_is_llada(world: World) -> None:
    with torch.device("meta"):
        chunks = build_model(
            preset("8b", 126464), torch.device("meta"), causal=False, mask_token_id=126336, initialize=False
        )
    assert count_parameters(chunks) == LLADA_8B
    assert len(list(chunks[0].parameters())) == 32 * 6 + 3  # llada's 291 tensors with q/k/v and gate/up fused


@pytest.mark.parametrize("causal", [False, True])
def test_attention_looks_where_it_should(small_config: ResolvedConfig, world: World, causal: bool) -> None:
    (model,) = build_model(small_config, world.device, causal=causal, mask_token_id=3)
    tokens = torch.arange(10, 26)[None]
    changed = tokens.clone()
    changed[0, 8] = 90
    positions = torch.arange(16)[None]
    with torch.no_grad():
        difference = (
            (model(tokens, positions, None) - model(changed, positions, None)).nan_to_num().abs().amax(dim=2)[0]
        )
    assert torch.all(difference[8:] > 0)
    assert torch.all(difference[:8] == 0) if causal else torch.all(difference[:8] > 0)


def test_the_mask_token_is_excluded_unless_kept(small_config: ResolvedConfig, world: World) -> None:
    tokens, positions = torch.arange(16)[None], torch.arange(16)[None]
    keep = replace(small_config, objective=replace(small_config.objective, mask_logit="keep"))
    for config, expected in ((small_config, True), (keep, False)):
        (model,) = build_model(config, world.device, causal=False, mask_token_id=3)
        logits = model(tokens, positions, None)
        assert logits.shape == (1, 16, 101)
        assert bool(torch.all(torch.isinf(logits[..., 3]))) == expected
        assert torch.all(torch.isfinite(logits[..., 4:]))


def test_every_extra_of_the_model_trains(small_config: ResolvedConfig, world: World) -> None:
    from megatron_md.model.head import Prediction

    extras = replace(
        small_config.model, position="learned", qk_norm=True, qkv_bias=True, tied=False, head_dim=12, kv_heads=4
    )
    (model,) = build_model(replace(small_config, model=extras), world.device, causal=False, mask_token_id=3)
    prediction = Prediction(torch.tensor([1, 20]), torch.tensor([7, 9]), torch.ones(2))
    output = model(torch.arange(32).view(2, 16), torch.arange(16).expand(2, 16), None, labels=prediction)
    output.loss.backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not names
    expected = estimates.parameter_count(extras)
    assert count_parameters([model]) == expected


def test_unknown_core_field_is_refused_by_name(small_config: ResolvedConfig, world: World) -> None:
    wrong = replace(small_config, megatron=replace(small_config.megatron, transformer={"num_layerz": 3}))
    with pytest.raises(ValueError, match=r"megatron\.transformer\.num_layerz: megatron-core's TransformerConfig"):
        transformer_config(wrong, world.device)


def test_a_core_field_that_a_key_of_ours_decides_is_refused(small_config: ResolvedConfig, world: World) -> None:
    layers = replace(small_config, megatron=replace(small_config.megatron, transformer={"num_layers": 3}))
    with pytest.raises(ValueError, match=r"megatron\.transformer\.num_layers: set model\.layers instead"):
        transformer_config(layers, world.device)
    odd = replace(small_config, megatron=replace(small_config.megatron, transformer={"recompute_granularity": "odd"}))
    with pytest.raises(ValueError, match="megatron-core refuses this model"):
        transformer_config(odd, world.device)


def test_known_core_field_is_passed_on(small_config: ResolvedConfig, world: World) -> None:
    known = replace(
        small_config, megatron=replace(small_config.megatron, transformer={"attention_softmax_in_fp32": False})
    )
    assert transformer_config(known, world.device).attention_softmax_in_fp32 is False
    assert apply_overrides({"num_layers": 2}, {}, type(transformer_config(known, world.device)), "x") == {
        "num_layers": 2
    }
