"""The model: its shape, how it is split, and what goes to megatron-core as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PositiveFloat

from megatron_md.config.keys import STRICT, Doc, Listed, PositiveInt

if TYPE_CHECKING:
    from megatron_md.config.run import Config


@dataclass(frozen=True)
class ModelConfig:
    """The denoiser: a bidirectional transformer (RMSNorm, SwiGLU, no biases)."""

    __pydantic_config__ = STRICT

    preset: Annotated[str | None, Doc("named shape that the keys below override: tiny, 50m, 1b, 1b-aligned, 8b")] = None
    layers: Annotated[Listed, Doc("transformer layers")] = 4
    hidden: Annotated[PositiveInt, Doc("width of the residual stream")] = 128
    heads: Annotated[PositiveInt, Doc("attention heads")] = 2
    kv_heads: Annotated[PositiveInt | None, Doc("key/value heads of grouped-query attention; heads if null")] = None
    head_dim: Annotated[PositiveInt | None, Doc("width of one head; hidden / heads if null")] = None
    ffn: Annotated[PositiveInt, Doc("width of the feed-forward layer (of each of its gate and up halves)")] = 344
    tied: Annotated[bool, Doc("share the embedding with the output layer")] = True
    vocab: Annotated[PositiveInt | None, Doc("vocabulary size; the tokenizer's if null")] = None
    max_length: Annotated[PositiveInt | None, Doc("longest sequence; data.seq_length if null")] = None
    position: Annotated[Literal["rope", "learned"], Doc("position encoding")] = "rope"
    rope_theta: Annotated[PositiveFloat, Doc("base of the rotary frequencies")] = 10000.0
    norm_eps: Annotated[PositiveFloat, Doc("epsilon of RMSNorm")] = 1e-5
    qk_norm: Annotated[bool, Doc("RMSNorm on queries and keys")] = False
    qkv_bias: Annotated[bool, Doc("biases on the query, key and value projections (Qwen2, Dream)")] = False
    init_std: Annotated[PositiveFloat, Doc("standard deviation of the initial weights")] = 0.02
    scaled_init: Annotated[bool, Doc("divide the init of output projections by sqrt(2 * layers)")] = True

    @property
    def key_heads(self) -> int:
        """Key (or value) heads."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden // self.heads

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each."""
        if self.head_dim is None and self.hidden % self.heads:
            yield (
                f"model.heads {self.heads} does not divide model.hidden {self.hidden}; change one or set model.head_dim"
            )
        if self.heads % self.key_heads:
            yield f"model.kv_heads {self.kv_heads} does not divide model.heads {self.heads}"
        if self.position == "rope" and self.head_width % 2:
            yield (
                f"rotary positions need an even width per head, got {self.head_width}: "
                "change model.heads or model.head_dim"
            )
        if self.max_length is not None and self.max_length < run.data.seq_length:
            yield f"data.seq_length {run.data.seq_length} is longer than model.max_length {self.max_length}"


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split; data-parallel size is what remains of the world."""

    __pydantic_config__ = STRICT

    tensor: Annotated[Listed, Doc("tensor-parallel size")] = 1
    sequence_parallel: Annotated[bool, Doc("split activations along the sequence between tensor-parallel ranks")] = (
        False
    )
    pipeline: Annotated[Listed, Doc("pipeline-parallel size")] = 1
    virtual_pipeline: Annotated[Listed, Doc("model chunks per pipeline rank (interleaved schedule)")] = 1
    first_stage_layers: Annotated[PositiveInt | None, Doc("layers of the first pipeline stage; even split if null")] = (
        None
    )
    last_stage_layers: Annotated[PositiveInt | None, Doc("layers of the last pipeline stage; even split if null")] = (
        None
    )
    context: Annotated[Listed, Doc("context-parallel size")] = 1
    distributed_optimizer: Annotated[bool, Doc("shard optimizer state over data-parallel ranks")] = True
    overlap_grad_reduce: Annotated[bool, Doc("overlap the gradient reduction with the backward pass")] = False
    overlap_param_gather: Annotated[bool, Doc("overlap the parameter gather with the forward pass")] = False
    vocab_multiple: Annotated[PositiveInt, Doc("pad the vocabulary to a multiple of this times tensor")] = 1
    timeout_seconds: Annotated[PositiveFloat, Doc("collective timeout of the process groups")] = 600.0

    @property
    def replica(self) -> int:
        """Processes that hold the model once: the smallest world."""
        return self.tensor * self.pipeline * self.context

    @property
    def row_unit(self) -> int:
        """What random row lengths are multiples of, so that tensor and context parallelism can split them."""
        return math.lcm(self.tensor, 2 * self.context)

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each."""
        yield from self._tensor_problems(run)
        if self.context > 1:
            yield (
                f"parallel.context {self.context}: no attention backend here supports context parallelism yet; "
                "set parallel.context=1"
            )
        for name in ("distributed_optimizer", "overlap_grad_reduce") if self.overlap_param_gather else ():
            if not getattr(self, name):
                yield f"parallel.overlap_param_gather needs parallel.{name}"
        yield from self._pipeline_problems(run.model.layers)

    def _tensor_problems(self, run: Config) -> Iterator[str]:
        sizes = {"heads": run.model.heads, "kv_heads": run.model.kv_heads, "ffn": run.model.ffn}
        for name, size in sizes.items():
            if size is not None and size % self.tensor:
                yield f"parallel.tensor {self.tensor} does not divide model.{name} {size}"
        if not self.sequence_parallel:
            return
        if self.tensor == 1:
            yield "parallel.sequence_parallel needs parallel.tensor > 1: it splits rows between tensor-parallel ranks"
        if run.data.seq_length % self.tensor:
            yield (
                f"parallel.tensor {self.tensor} does not divide data.seq_length {run.data.seq_length}, "
                "which parallel.sequence_parallel splits"
            )

    def _pipeline_problems(self, layers: int) -> Iterator[str]:
        pipeline, chunks = self.pipeline, self.virtual_pipeline
        if chunks > 1 and pipeline == 1:
            yield f"parallel.virtual_pipeline {chunks} needs parallel.pipeline > 1"
        ends = {"first": self.first_stage_layers, "last": self.last_stage_layers}
        given = {name: count for name, count in ends.items() if count is not None}
        if not given:
            if layers % (pipeline * chunks):
                by = f"{pipeline} x parallel.virtual_pipeline {chunks}" if chunks > 1 else f"{pipeline}"
                way_out = " (or set first_stage_layers / last_stage_layers)" if chunks == 1 else ""
                yield f"parallel.pipeline {by} does not divide model.layers {layers}{way_out}"
            return
        names = " and ".join(f"parallel.{name}_stage_layers {count}" for name, count in given.items())
        rest, stages = layers - sum(given.values()), pipeline - len(given)
        if pipeline == 1 or stages < 0:
            yield f"{names} need parallel.pipeline > 1"
        elif rest < 0 or (stages == 0 and rest) or (stages and (rest % stages or rest < stages)):
            yield f"{names} leave {rest} of model.layers {layers} to {stages} other stage(s), which cannot share them"
        elif any(count % chunks for count in [*given.values(), rest // stages if stages else 0]):
            yield f"parallel.virtual_pipeline {chunks} does not divide the layers of every stage ({names})"


@dataclass(frozen=True)
class MegatronConfig:
    """Fields passed on to megatron-core's own configs, checked against their field names."""

    __pydantic_config__ = STRICT

    transformer: Annotated[dict[str, Any], Doc("fields of TransformerConfig")] = field(default_factory=dict)
    ddp: Annotated[dict[str, Any], Doc("fields of DistributedDataParallelConfig")] = field(default_factory=dict)
    optimizer: Annotated[dict[str, Any], Doc("fields of OptimizerConfig")] = field(default_factory=dict)
