"""What a checkpoint holds of a model and its optimizer: tensors that know their place in the whole, on any layout.

megatron-core's optimizer formats are tied to the layout that wrote them (`dp_reshardable`), or gather the whole state
and misplace it where a rank's gradients lie in several padded buckets (`fully_reshardable`). Here each data-parallel
rank's share of a parameter, a range of its flattened elements, is written as the few rectangles of the global tensor
that it covers. No communication, no copy; a reader on another layout asks for its own rectangles.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.transformer.module import Float16Module

from megatron_md.checkpoint.directory import AVERAGE, Weights
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.storage import TensorReader
from megatron_md.config.lora import is_adapter
from megatron_md.model.build import state_dict_metadata
from megatron_md.model.initialize import sharded_tensors
from megatron_md.train.optimizer import optimizer_updates

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Cut elements `start` .. `stop - 1` of a row-major tensor into rectangles, in the order of their elements.

    Yields:
        (offset, size), each with one entry per axis: of a matrix at most a partial row, whole rows, a partial row.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield tuple([start][: len(shape)]), tuple([stop - start][: len(shape)])
        return
    row_size = math.prod(shape[1:])
    first, last = -(-start // row_size), stop // row_size
    if first > last:  # within one row
        yield from _within_row(shape, last, start, stop)
        return
    yield from _within_row(shape, first - 1, start, first * row_size)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _within_row(shape, last, last * row_size, stop)


def _within_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Rectangle]:
    begin = row * math.prod(shape[1:])
    for offset, size in rectangles(shape[1:], start - begin, stop - begin):
        yield (row, *offset), (1, *size)


@dataclass(frozen=True)
class OptimizerSlice:
    """The optimizer's state for a range of one parameter's flattened elements.

    Attributes:
        parameter: of the model, as this rank holds it.
        start: first element of the range.
        tensors: flat tensors of the range by name: `exp_avg`, `exp_avg_sq`, `ema` where an average of the weights is
            kept, and `fp32_param` where the model's own parameter has another dtype.
        shared: every data-parallel rank holds the same range.
    """

    parameter: torch.Tensor
    start: int
    tensors: dict[str, torch.Tensor]
    shared: bool


def optimizer_slices(optimizer: MegatronOptimizer) -> Iterator[OptimizerSlice]:
    """What this rank keeps for each parameter (views: writing into them changes the optimizer)."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        if isinstance(part, DistributedOptimizer):
            for bucket in _buckets(part):
                for parameter, ranges in bucket["param_map"].items():
                    tensors = part._get_main_param_and_optimizer_states(parameter)
                    yield _slice(parameter, ranges["param"].start, tensors, shared=False)
        else:
            for parameter, main in _main_parameters(part):
                yield _slice(parameter, 0, {"param": main, **part.optimizer.state[main]}, shared=True)


def _buckets(part: DistributedOptimizer) -> Iterator[dict[str, Any]]:
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            yield from buckets


def _main_parameters(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(model parameter, the one that is optimized) of an optimizer that is not distributed."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(models, mains, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for group in part.param_groups:
            yield from zip(group["params"], group["params"], strict=True)


def _slice(parameter: torch.Tensor, start: int, state: dict[str, torch.Tensor], *, shared: bool) -> OptimizerSlice:
    tensors = {name: value.detach().view(-1) for name, value in state.items() if name not in ("param", "step")}
    if state["param"].dtype != parameter.dtype:
        tensors["fp32_param"] = state["param"].detach().view(-1)
    return OptimizerSlice(parameter, start, tensors, shared)


def named_parameters(chunks: list[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters by their names in the whole model: layers are counted over all pipeline stages."""
    for chunk in chunks:
        network = unwrapped(chunk)
        network = network.module if isinstance(network, Float16Module) else network
        first = network.decoder.layers[0].layer_number - 1 if len(network.decoder.layers) else 0
        for name, parameter in network.named_parameters():
            # The second copy of tied weights, on the last stage.
            is_copy = name == "output_layer.weight" and getattr(parameter, "shared_embedding", False)
            name = "embedding.word_embeddings.weight" if is_copy else name
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{int(local) + first}.{rest}"
            yield name, parameter


@torch.no_grad()
def names_of_not_finite(chunks: list[Any], optimizer: MegatronOptimizer) -> list[str]:
    """This rank's weights and optimizer tensors in which a number is NaN or infinite."""
    names = {id(parameter): name for name, parameter in named_parameters(chunks)}
    held = [(name, parameter.detach()) for name, parameter in named_parameters(chunks) if parameter.requires_grad]
    for piece in optimizer_slices(optimizer):
        held += [(f"{kind} of {names[id(piece.parameter)]}", values) for kind, values in piece.tensors.items()]
    held = [(name, values) for name, values in held if values.numel() and values.is_floating_point()]
    # Both ends are NaN where any number is, and cannot overflow as a norm can.
    ends = torch.stack([torch.stack(values.aminmax()).double() for _, values in held])
    are_finite = ends.isfinite().all(dim=1).tolist()
    return [name for (name, _), is_finite in zip(held, are_finite, strict=True) if not is_finite]


def state_names(optimizer: MegatronOptimizer) -> list[str]:
    """Names of the optimizer's tensors per parameter: what two optimizers must share to exchange their states."""
    return sorted({name for piece in optimizer_slices(optimizer) for name in piece.tensors})


def _pieces(name: str, piece: OptimizerSlice, shard: ShardedTensor) -> Iterator[ShardedTensor]:
    """The part of a slice's tensor that lies in one global tensor, as rectangles."""
    values = piece.tensors[name]
    # A fused parameter (gate and up) is several global tensors; each is a run of its elements.
    offset_in_parameter = (shard.data.data_ptr() - piece.parameter.data_ptr()) // piece.parameter.element_size()
    start = max(piece.start - offset_in_parameter, 0)
    stop = min(piece.start + values.numel() - offset_in_parameter, shard.data.numel())
    leading = (1,) * shard.prepend_axis_num
    pipeline, tensor, data = shard.replica_id
    position = start + offset_in_parameter - piece.start
    for offset, size in rectangles(shard.local_shape, start, stop):
        count = math.prod(size)
        offsets = zip(shard.global_offset, (*[0] * len(leading), *offset), strict=True)
        yield ShardedTensor(
            key=f"optimizer.state.{name}.{shard.key}",
            data=values[position : position + count].view(*leading, *size),
            dtype=values.dtype,
            local_shape=(*leading, *size),
            global_shape=shard.global_shape,
            global_offset=tuple(base + more for base, more in offsets),
            axis_fragmentations=None,
            replica_id=(pipeline, tensor, data if piece.shared else 0),
            allow_shape_mismatch=shard.allow_shape_mismatch,
        )
        position += count


def optimizer_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], *, only: Collection[str] | None = None
) -> dict[str, Any]:
    """The optimizer's state as sharded tensors; loading into them fills the optimizer in place.

    Args:
        optimizer: of this rank.
        model: `model_state` of the same chunks.
        only: names of the tensors per parameter; all if None.
    """
    found: dict[int, Any] = {}
    for value in nested_values(model):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.data is not None:
            found[id(value.data)] = value
    shards = [
        tensor
        for piece in optimizer_slices(optimizer)
        for shard in sharded_tensors({"": found[id(piece.parameter)]})
        for name in piece.tensors
        if only is None or name in only
        for tensor in _pieces(name, piece, shard)
    ]
    return {"updates": optimizer_updates(optimizer), "state": {str(i): shard for i, shard in enumerate(shards)}}


def unwrapped(chunk: Any) -> Any:
    """The chunk without megatron-core's data-parallel wrapper, under whose names checkpoints are kept."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def has_adapters(chunks: list[Any]) -> bool:
    """Whether these are frozen weights with adapters beside them."""
    return any(is_adapter(name) for chunk in chunks for name, _ in chunk.named_parameters())


def model_state(chunks: list[Any], *, of_base: bool = False) -> dict[str, Any]:
    """Sharded state of the model chunks: of those with adapters the adapters alone, or all else (`of_base`)."""
    is_whole = not has_adapters(chunks)
    states = [unwrapped(chunk).sharded_state_dict(metadata=state_dict_metadata()) for chunk in chunks]
    return {
        f"model{number}": {name: value for name, value in state.items() if is_whole or is_adapter(name) is not of_base}
        for number, state in enumerate(states)
    }


def wanted_state(chunks: list[Any], *, of_base: bool = False) -> dict[str, Any]:
    """What is read of a checkpoint's `model_state`.

    All but the scales of fp8 arithmetic: what was converted, or written without Transformer Engine, has none.
    """
    state = model_state(chunks, of_base=of_base)
    return {
        key: {name: value for name, value in part.items() if not name.endswith("_extra_state")}
        for key, part in state.items()
    }


def load_model_state(chunks: list[Any], state: dict[str, Any]) -> None:
    """Put a loaded `wanted_state` into the model chunks."""
    for number, chunk in enumerate(chunks):
        network = unwrapped(chunk)
        # megatron-core's wrapper for bf16 does not say what was missing.
        network = network.module if isinstance(network, Float16Module) else network
        part = state[f"model{number}"]
        missing, unexpected = network.load_state_dict(part, strict=False)
        kinds = {is_adapter(name) for name in part}  # adapters are loaded apart from their base
        lost = [name for name in missing if not name.endswith("_extra_state") and is_adapter(name) in kinds]
        assert not unexpected and not lost, (lost, unexpected)


def load_model(chunks: list[Any], checkpoint: Path, base: Path | None = None, *, weights: Weights = "model") -> None:
    """Load weights only, on any layout.

    Args:
        chunks: model chunks, with or without the data-parallel wrapper.
        checkpoint: a complete checkpoint directory.
        base: the one with the weights that its adapters belong to, if it holds adapters.
        weights: `ema` takes, in place of those that were trained, their average.
    """
    if base is not None:
        load_base(chunks, base)
    state = wanted_state(chunks)
    if weights == "ema":
        with guarded(checkpoint):
            there = TensorReader(checkpoint).tensors
        for value in nested_values(state):
            if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and AVERAGE + value.key in there:
                value.key = AVERAGE + value.key
    load_model_state(chunks, read_state(state, checkpoint))


def load_base(chunks: list[Any], checkpoint: Path) -> None:
    """Load the weights that adapters belong to."""
    load_model_state(chunks, read_state(wanted_state(chunks, of_base=True), checkpoint))


def read_state(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Read what a sharded state asks for; its tensors are filled in place. Every rank calls this."""
    with guarded(checkpoint):
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint))
    return loaded


def layout() -> dict[str, int]:
    """The parallel sizes of this job, for the record."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
