"""Converted checkpoints go by the names of Transformer Engine's layers, and models in that form load them.

Transformer Engine itself is not run: a linear layer with the norm inside stands in for its `LayerNormLinear`, with the
parameters, names and extra state that megatron-core's `TELayerNormColumnParallelLinear` has.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.config import load_config
from tests.checkpoint.hf.test_convert import convert
from tests.checkpoint.hf_models import FAMILY_NAMES, shape_of, write_model
from tests.checkpoint.legs import SHARDED, leg, legs_config, uninterrupted
from tests.ranks import run_ranks

TOKENS_BL = torch.arange(40).view(2, 20) % 67


class NormedLinear(ColumnParallelLinear):
    """RMSNorm and a column-parallel linear layer in one module."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **keys: Any) -> None:
        super().__init__(input_size, output_size, config=config, **keys)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))

    def forward(self, x: torch.Tensor, *args: Any, **keys: Any) -> Any:
        return super().forward(torch.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), *args, **keys)

    def get_extra_state(self) -> Any:
        return torch.zeros(3)


def in_fused_form(spec: ModuleSpec) -> ModuleSpec:
    """Our local layer in Transformer Engine's form: no norms of their own, no renaming of keys."""
    parts = spec.submodules
    assert parts.sharded_state_dict_keys_map.keys() == {"input_layernorm.", "pre_mlp_layernorm."}
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    mlp = parts.mlp.keywords["submodules"] if isinstance(parts.mlp, partial) else parts.mlp.submodules
    parts.self_attention.submodules.linear_qkv = mlp.linear_fc1 = NormedLinear
    parts.sharded_state_dict_keys_map = {}
    return spec


def logits(run: Path, tensor: int, fused: bool) -> torch.Tensor:
    """On each rank: logits of a converted run's checkpoint, from layers of one of the two forms."""
    from megatron_md import parallel
    from megatron_md.checkpoint.state import load_model
    from megatron_md.model import spec as specs
    from megatron_md.model.build import build_model

    if fused:
        ours = specs.layer_spec
        specs.layer_spec = lambda core, **keys: in_fused_form(ours(core, **keys))  # this process ends with the test
    config = load_config(run / "config.yaml", [f"parallel.tensor={tensor}", "train.device=cpu"])
    with parallel.session(config), torch.no_grad():
        chunks: list[Any] = build_model(
            config, torch.device("cpu"), causal=False, mask_token_id=None, initialize=False
        )  # fmt: skip
        for parameter in chunks[0].parameters():
            parameter.fill_(torch.nan)
        load_model(chunks, run / "checkpoints/step_00000000")
        names = {name for name, _ in chunks[0].named_parameters()}
        assert any("linear_fc1.layer_norm_weight" in name for name in names) == fused
        found: torch.Tensor = chunks[0].eval()(TOKENS_BL, torch.arange(20).expand_as(TOKENS_BL), None)
        return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "tensor"),
    [("qwen3", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in FAMILY_NAMES)],
)
def test_layers_with_the_norm_inside_load_a_converted_checkpoint(family: str, tensor: int, tmp_path: Path) -> None:
    write_model(tmp_path / "hf", family, shape_of(family))
    convert(tmp_path / "hf", tmp_path / "run", family)
    apart, inside = (run_ranks(logits, tensor, tmp_path / "run", tensor, fused)[0] for fused in (False, True))
    assert inside.shape == (2, 20, 67) and inside.isfinite().all()
    torch.testing.assert_close(inside, apart)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_names_are_those_under_which_megatron_core_saves_its_local_layers(family: str) -> None:
    keys_map = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=True).submodules.sharded_state_dict_keys_map
    assert keys_map == {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    names = {rule.ours for rule in FAMILIES[family].rules}
    assert {f"decoder.layers.{name}weight" for name in keys_map.values()} <= names
    assert not any(old in name for name in names for old in keys_map)


def fused_leg(config: Any, run: Path, first: int, stop: int, save: bool) -> Any:
    """`leg`, from layers of the fused form."""
    from megatron_md.model import spec as specs

    ours = specs.layer_spec
    specs.layer_spec = lambda core, **keys: in_fused_form(ours(core, **keys))  # this process ends with the test
    return leg(config, run, first, stop, save)


@pytest.mark.distributed
@pytest.mark.parametrize("legs", [(leg, fused_leg), (fused_leg, leg)], ids=["into the fused form", "out of it"])
def test_a_run_resumes_in_the_other_form(legs: Any, tmp_path: Path) -> None:
    config = legs_config(SHARDED, tied=True)
    parts = [run_ranks(one, 1, config, tmp_path, 3 * n, 3 * n + 3, True)[0] for n, one in enumerate(legs)]
    whole = uninterrupted(1, json.dumps(SHARDED), True)
    np.testing.assert_allclose([*parts[0], *parts[1]], whole, rtol=1e-4)
