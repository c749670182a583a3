"""Low-rank adapters beside megatron-core's linear layers: y = W x + alpha / rank * B A x (arXiv 2106.09685), W frozen.

A layer's output is corrected after the layer has run, so that its own kernels, communication and names stay. Of an
adapter only the activations of width `rank` travel between tensor-parallel ranks:

                    A                    B                  A x                                gradients over TP
column-parallel     whole                split by outputs   gathered under SP, else copied     A: partial under SP
row-parallel        split by inputs      whole              summed, and scattered under SP     B: partial under SP
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_md.config import LoraConfig, ResolvedModel
from megatron_md.config.lora import LINEARS, AdaptedLinear, part_sizes


class Adapter(torch.nn.Module):
    """The adapters of one linear layer, one for each of its parts that has one.

    Parameters `A_q` [rank, in], `B_q` [out, rank], ...: this rank's rows or columns of them.
    """

    def __init__(
        self, linear: AdaptedLinear, keys: LoraConfig, model: ResolvedModel, core: TransformerConfig, like: torch.Tensor
    ) -> None:
        """Make the parameters, on the device and in the data type of `like`; they are filled elsewhere."""
        super().__init__()
        self.linear, self.dropout, self.scale = linear, keys.dropout, keys.alpha / keys.rank
        self.parts = linear.adapted(keys.targets)
        self.sequence_parallel = core.sequence_parallel
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.groups = model.key_heads // self.tp_group.size()
        sizes = part_sizes(model)
        self.widths = [sizes[part][1] // (1 if linear.is_row else self.tp_group.size()) for part in linear.parts]
        for part in self.parts:
            inputs, outputs = sizes[part]
            shapes = {"A": [keys.rank, inputs], "B": [outputs, keys.rank]}
            split, axis = ("A", 1) if linear.is_row else ("B", 0)
            shapes[split][axis] //= self.tp_group.size()
            for factor, shape in shapes.items():
                parameter = torch.nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
                if factor == split:
                    set_tensor_model_parallel_attributes(parameter, True, axis, 1)
                else:
                    # Each rank has the gradient of its slice of the sequence: megatron-core adds them up.
                    parameter.sequence_parallel = core.sequence_parallel  # type: ignore[attr-defined]
                self.register_parameter(f"{factor}_{part}", parameter)

    def forward(self, input_LBI: torch.Tensor) -> torch.Tensor:
        """What to add to the layer's output, which it has the shape of."""
        factors: list[torch.Tensor] = [self.get_parameter(f"A_{part}") for part in self.parts]
        input_LBI = F.dropout(input_LBI, self.dropout, self.training)
        low_LBR = F.linear(input_LBI, torch.cat(factors) if len(factors) > 1 else factors[0])
        parts = (self._exchanged(low_LBR) * self.scale).chunk(len(self.parts), dim=-1)
        found = {
            part: F.linear(low, self.get_parameter(f"B_{part}")) for part, low in zip(self.parts, parts, strict=True)
        }
        if len(self.linear.parts) == 1:
            return found[self.parts[0]]
        rows = parts[0].shape[:-1]
        whole = [
            found[part] if part in found else low_LBR.new_zeros(*rows, width)
            for part, width in zip(self.linear.parts, self.widths, strict=True)
        ]
        if self.linear.name != "qkv":
            return torch.cat(whole, dim=-1)
        # Query group by query group, as megatron-core keeps them.
        return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in whole], dim=-1).flatten(-2)

    def _exchanged(self, low_LBR: torch.Tensor) -> torch.Tensor:
        """A x for the rows that this rank's outputs are of."""
        if self.linear.is_row:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low_LBR, group=self.tp_group)
            return reduce_from_tensor_model_parallel_region(low_LBR, group=self.tp_group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low_LBR, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(low_LBR, group=self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As megatron-core's layers say where their shards lie."""
        assert metadata is not None, "megatron-core's layers pass it on"
        split = {f"A_{part}": 1 for part in self.parts} if self.linear.is_row else {f"B_{p}": 0 for p in self.parts}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            split,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded


def _hook(adapter: Adapter, eps: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def corrected(
        module: Any, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        (hidden_LBI,), (output_LBO, bias) = inputs, outputs
        norm = getattr(module, "layer_norm_weight", None)
        if norm is not None:
            # Transformer Engine's layer holds the norm before it, and keeps what comes out of it to itself.
            hidden_LBI = F.rms_norm(hidden_LBI, norm.shape, norm, eps)
        return output_LBO + adapter(hidden_LBI), bias

    return corrected


def attach_adapters(chunk: Any, keys: LoraConfig, model: ResolvedModel) -> None:
    """Freeze a model chunk, not wrapped yet, and put adapters beside its linear layers."""
    core = chunk.config
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for linear in LINEARS:
            if linear.adapted(keys.targets):
                parent = getattr(layer, linear.parent)
                module = getattr(parent, f"linear_{linear.name}")
                adapter = Adapter(linear, keys, model, core, module.weight)
                parent.add_module(f"lora_{linear.name}", adapter)
                module.register_forward_hook(_hook(adapter, core.layernorm_epsilon))
    if chunk.pre_process and core.recompute_granularity == "full":
        # A recomputed layer has gradients only where something that goes into it has.
        chunk.embedding.register_forward_hook(
            lambda module, inputs, output: output.requires_grad_() if torch.is_grad_enabled() else output
        )
