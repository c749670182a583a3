"""Which attention a layer has; core's local layers stand for those of Transformer Engine, which may be missing."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.models.gpt import gpt_layer_specs

from megatron_md.config import ResolvedConfig
from megatron_md.model.attention import SDPACoreAttention
from megatron_md.model.build import transformer_config
from megatron_md.model.spec import layer_spec
from megatron_md.parallel import World
from tests.small_run import variant


@pytest.mark.parametrize(("transformer_engine", "context"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_rows_that_are_cut_meet_our_attention_whatever_the_layers(
    transformer_engine: bool,
    context: int,
    small_config: ResolvedConfig,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stand_in(**keys: Any) -> Any:
        return gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm", **keys)

    monkeypatch.setattr(gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", stand_in)
    core = transformer_config(variant(small_config, parallel={"context": context}), world.device)
    spec = layer_spec(core, causal=False, transformer_engine=transformer_engine, rotary_base=100.0)
    attention = spec.submodules.self_attention.submodules.core_attention
    is_ours = getattr(attention, "module", None) is SDPACoreAttention
    assert is_ours == (not transformer_engine or context > 1)
    assert not is_ours or attention.params == {"rotary_base": 100.0}
