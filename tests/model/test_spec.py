"""Which attention a layer has; core's local layers stand for those of Transformer Engine, which may be missing."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_md.config import ResolvedConfig
from megatron_md.model.attention import SDPACoreAttention
from megatron_md.model.build import needs_own_attention, transformer_config
from megatron_md.model.spec import core_attention, layer_spec
from megatron_md.parallel import World
from tests.small_run import CONFIG, variant


@pytest.mark.parametrize("transformer_engine", [False, True])
@pytest.mark.parametrize("attention", [core_attention(100.0), None])
def test_the_attention_that_is_given_stands_in_any_layer(
    transformer_engine: bool,
    attention: ModuleSpec | None,
    small_config: ResolvedConfig,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stand_in(**keys: Any) -> Any:
        return gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm", **keys)

    monkeypatch.setattr(gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", stand_in)
    core = transformer_config(small_config, world.device)
    spec = layer_spec(core, causal=False, transformer_engine=transformer_engine, attention=attention)
    found = spec.submodules.self_attention.submodules.core_attention
    assert (found is attention) == (attention is not None)
    assert attention is None or (attention.module, attention.params) == (SDPACoreAttention, {"rotary_base": 100.0})


def test_rows_that_are_cut_meet_our_attention() -> None:
    assert not needs_own_attention(CONFIG) and needs_own_attention(variant(parallel={"context": 2}))
