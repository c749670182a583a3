"""The real model on the meta device has the parameters that the estimates count from shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_md.config import Config, ResolvedConfig, config_from_mapping, resolve
from megatron_md.errors import UserError
from megatron_md.model import build
from megatron_md.model.build import (
    RESERVED,
    apply_overrides,
    build_model,
    count_parameters,
    settled_parameters,
    transformer_config,
    wrap_data_parallel,
)
from megatron_md.parallel import World
from megatron_md.run import estimate as estimates
from megatron_md.train.optimizer import build_optimizer
from tests.small_run import variant

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


@pytest.mark.parametrize(
    "key", ["num_moe_experts", "moe_router_topk", "mtp_num_layers", "window_size", "is_hybrid_model"]
)
def test_layers_that_are_not_built_are_refused(small_config: ResolvedConfig, world: World, key: str) -> None:
    asked = replace(small_config, megatron=replace(small_config.megatron, transformer={key: 4}))
    with pytest.raises(UserError, match=rf"megatron\.transformer\.{key}: such layers are not built here"):
        transformer_config(asked, world.device)


def test_fused_gradients_of_weights_need_their_extension(
    small_config: ResolvedConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = {"gradient_accumulation_fusion": True}
    asked = replace(small_config, megatron=replace(small_config.megatron, transformer=fused))
    with pytest.raises(UserError, match="gradient_accumulation_fusion needs NVIDIA's apex"):
        transformer_config(asked, world.device)
    monkeypatch.setattr(build, "find_spec", lambda name: name)
    assert transformer_config(asked, world.device).gradient_accumulation_fusion


def test_known_core_field_is_passed_on(small_config: ResolvedConfig, world: World) -> None:
    known = replace(
        small_config, megatron=replace(small_config.megatron, transformer={"attention_softmax_in_fp32": False})
    )
    assert transformer_config(known, world.device).attention_softmax_in_fp32 is False
    assert apply_overrides({"num_layers": 2}, {}, type(transformer_config(known, world.device)), "x") == {
        "num_layers": 2
    }


BF16: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
# A key of ours, a value that is not its default, and the fields of megatron-core's TransformerConfig that follow.
TRANSFORMER: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.layers": (6, {"num_layers": 6}),
    "model.hidden": (64, {"hidden_size": 64}),
    "model.heads": (8, {"num_attention_heads": 8}),
    "model.kv_heads": (4, {"num_query_groups": 4}),
    "model.head_dim": (12, {"kv_channels": 12}),
    "model.ffn": (80, {"ffn_hidden_size": 80}),
    "model.norm_eps": (1e-3, {"layernorm_epsilon": 1e-3}),
    "model.qk_norm": (True, {"qk_layernorm": True}),
    "model.qkv_bias": (True, {"add_qkv_bias": True}),
    "parallel.tensor": (2, {"tensor_model_parallel_size": 2}),
    "parallel.pipeline": (2, {"pipeline_model_parallel_size": 2}),
    "train.precision": ("bf16", BF16),
    "train.deterministic": (True, {"deterministic_mode": True}),
    "train.dropout": (0.25, {"hidden_dropout": 0.25}),
}
# Keys that core accepts only beside others.
TOGETHER: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "train.recompute=full": (
        {"train": {"recompute": "full"}},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "train.recompute=selective": ({"train": {"recompute": "selective"}}, {"recompute_granularity": "selective"}),
    "parallel.sequence_parallel": ({"parallel": {"tensor": 2, "sequence_parallel": True}}, {"sequence_parallel": True}),
    "parallel.virtual_pipeline": (
        {"model": {"layers": 4}, "parallel": {"pipeline": 2, "virtual_pipeline": 2}},
        {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False},
    ),
    "parallel.first_stage_layers": (
        {"model": {"layers": 4}, "parallel": {"pipeline": 2, "first_stage_layers": 1}},
        {"num_layers_in_first_pipeline_stage": 1},
    ),
    "parallel.last_stage_layers": (
        {"model": {"layers": 4}, "parallel": {"pipeline": 2, "last_stage_layers": 1}},
        {"num_layers_in_last_pipeline_stage": 1},
    ),
    "parallel.context": ({"parallel": {"context": 2}}, {"context_parallel_size": 2}),
}
DDP: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parallel.distributed_optimizer": ({"distributed_optimizer": False}, {"use_distributed_optimizer": False}),
    "parallel.overlap_grad_reduce": ({"overlap_grad_reduce": True}, {"overlap_grad_reduce": True}),
    "parallel.overlap_param_gather": (
        {"overlap_param_gather": True},
        {"overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
}
OPTIMIZER: dict[str, tuple[Any, str]] = {
    "optimizer.lr": (0.25, "lr"),
    "optimizer.weight_decay": (0.375, "weight_decay"),
    "optimizer.beta1": (0.5, "adam_beta1"),
    "optimizer.beta2": (0.625, "adam_beta2"),
    "optimizer.eps": (1e-5, "adam_eps"),
    "optimizer.clip_grad": (0.75, "clip_grad"),
}


def one_key(config: Config, key: str, value: Any) -> Config:
    section, name = key.split(".")
    return variant(config, **{section: {name: value}})


def assert_reaches(core: Any, untouched: Any, fields: dict[str, Any]) -> None:
    """The fields have their values, and did not have all of them before: the key is what has moved them."""
    assert {name: getattr(core, name) for name in fields} == fields
    assert {name: getattr(untouched, name) for name in fields} != fields


def test_every_key_reaches_the_transformer_config(small_config: Config, world: World) -> None:
    cases = {key: (one_key(small_config, key, value), fields) for key, (value, fields) in TRANSFORMER.items()}
    cases |= {key: (variant(small_config, **sections), fields) for key, (sections, fields) in TOGETHER.items()}
    untouched = transformer_config(small_config, world.device)
    for config, fields in cases.values():
        assert_reaches(transformer_config(config, world.device), untouched, fields)


def test_every_key_reaches_the_configs_of_data_parallelism_and_of_the_optimizer(
    small_config: Config, world: World
) -> None:
    def built(config: Config) -> tuple[Any, Any]:
        chunks = wrap_data_parallel(build_model(config, world.device, causal=False, mask_token_id=3), config)
        return chunks[0].ddp_config, build_optimizer(config, chunks).chained_optimizers[0].config

    ddp, core = built(small_config)
    for sections, fields in DDP.values():
        changed = built(variant(small_config, parallel=sections))
        assert_reaches(changed[0], ddp, fields)
    for key, (value, field) in OPTIMIZER.items():
        assert_reaches(built(one_key(small_config, key, value))[1], core, {field: value})
    assert_reaches(built(one_key(small_config, "train.precision", "bf16"))[1], core, {"bf16": True})
    passed = replace(small_config, megatron=replace(small_config.megatron, ddp={"grad_reduce_in_fp32": False}))
    assert_reaches(built(passed)[0], ddp, {"grad_reduce_in_fp32": False})


def test_no_key_that_decides_a_field_of_core_is_missing_from_the_tables() -> None:
    tables = {key.partition("=")[0] for key in (*TRANSFORMER, *TOGETHER, *DDP, *OPTIMIZER)}
    # Loss is summed per token whatever it is divided by: `calculate_per_token_loss` is the same for all its values.
    assert set(RESERVED.values()) - tables == {"objective.normalise"}


def test_parameters_are_gathered_ahead_again_after_an_error_among_settled_ones(
    small_config: Config, world: World
) -> None:
    overlap = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    config = variant(small_config, parallel=overlap)
    (chunk,) = wrap_data_parallel(build_model(config, world.device, causal=False, mask_token_id=3), config)
    hooks = len(chunk.remove_forward_pre_hook_handles)
    assert hooks > 0
    with pytest.raises(KeyError, match="planted"), settled_parameters([chunk]):
        assert not chunk.remove_forward_pre_hook_handles
        raise KeyError("planted")
    assert len(chunk.remove_forward_pre_hook_handles) == hooks


def test_fp8_is_asked_of_transformer_engine_and_refused_without_it(
    small_config: Config, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = one_key(small_config, "train.precision", "fp8")
    with pytest.raises(UserError, match=r"needs a CUDA device and Transformer Engine; set train.precision=bf16"):
        transformer_config(config, world.device)
    monkeypatch.setattr(build, "use_transformer_engine", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"A100-SXM4-80GB has no such products"):
        transformer_config(config, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    unfused = replace(config, megatron=replace(config.megatron, transformer={"apply_rope_fusion": False}))
    core = transformer_config(unfused, torch.device("cuda"))
    assert (core.fp8, core.fp8_recipe, core.bf16, core.fp8_param) == ("hybrid", "tensorwise", True, False)
