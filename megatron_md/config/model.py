"""What is trained, each section with its checks: the model and its layout, the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from megatron_md.config.chat import ChatConfig
from megatron_md.config.schema import STRICT, Doc, Fraction, Listed, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from megatron_md.config import Config

MOST_RANDOM_STEPS = 10_000_000  # each of them is drawn before a run starts: seconds for a million


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
    context: Annotated[Listed, Doc("context-parallel size: rows are split along their length")] = 1
    distributed_optimizer: Annotated[bool, Doc("shard optimizer state over data-parallel ranks")] = True
    overlap_grad_reduce: Annotated[
        bool | None, Doc("overlap the gradient reduction with the backward pass; null: between several CUDA devices")
    ] = None
    overlap_param_gather: Annotated[
        bool | None,
        Doc("overlap the parameter gather with the forward pass; null: as overlap_grad_reduce, where it can"),
    ] = None
    vocab_multiple: Annotated[PositiveInt, Doc("pad the vocabulary to a multiple of this times tensor")] = 1
    timeout_seconds: Annotated[PositiveFloat, Doc("collective timeout of the process groups")] = 600.0

    @property
    def replica(self) -> int:
        """Processes that hold the model once: the smallest world."""
        return self.tensor * self.pipeline * self.context

    @property
    def row_slices(self) -> int:
        """In how many equal slices context and sequence parallelism cut a row: they divide its length."""
        return self.context * (self.tensor if self.sequence_parallel else 1)

    @property
    def row_unit(self) -> int:
        """What random row lengths are multiples of, the same for most layouts: `row_slices` divides it."""
        return math.lcm(2, self.tensor * self.context)

    def overlaps(self, by_default: bool) -> tuple[bool, bool]:
        """Whether gradient reduction and parameter gather are overlapped, where null means `by_default`."""
        reduce, gather = self.overlap_grad_reduce, self.overlap_param_gather
        reduce = by_default or bool(gather) if reduce is None else reduce
        return reduce, reduce and self.distributed_optimizer if gather is None else gather

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each."""
        yield from self._tensor_problems(run)
        yield from self._row_problems(run.data.seq_length)
        for name in ("distributed_optimizer", "overlap_grad_reduce") if self.overlap_param_gather else ():
            if getattr(self, name) is False:
                yield f"parallel.overlap_param_gather needs parallel.{name}"
        yield from self._pipeline_problems(run.model.layers)

    def _tensor_problems(self, run: Config) -> Iterator[str]:
        sizes = {"heads": run.model.heads, "kv_heads": run.model.kv_heads, "ffn": run.model.ffn}
        for name, size in sizes.items():
            if size is not None and size % self.tensor:
                yield f"parallel.tensor {self.tensor} does not divide model.{name} {size}"
        heads = run.model.heads // self.tensor
        if run.model.heads % self.tensor == 0 and heads % self.context:
            yield (
                f"parallel.context {self.context} does not divide the {heads} of model.heads {run.model.heads} that a "
                "tensor-parallel rank has, which attention shares out between context-parallel ranks"
            )

    def _row_problems(self, length: int) -> Iterator[str]:
        if self.sequence_parallel and self.tensor == 1:
            yield "parallel.sequence_parallel needs parallel.tensor > 1: it splits rows between tensor-parallel ranks"
        if not length % self.row_slices:
            return
        if not self.sequence_parallel:
            yield f"parallel.context {self.context} does not divide data.seq_length {length}"
            return
        tensor, by = f"parallel.tensor {self.tensor}", f" x parallel.context {self.context}" if self.context > 1 else ""
        yield f"{tensor}{by} does not divide data.seq_length {length}, which parallel.sequence_parallel splits"

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


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture."""

    __pydantic_config__ = STRICT

    manifest: Annotated[str, Doc("manifest of its shards")]
    weight: Annotated[
        NonNegativeFloat | list[tuple[NonNegativeInt, NonNegativeFloat]],
        Doc("its share of the rows next to the others' weights; [[g, weight], ...] from row g of the run on"),
    ]
    name: Annotated[str | None, Doc("what messages call it; the manifest's path if null")] = None
    max_tokens: Annotated[PositiveInt | None, Doc("as data.max_tokens, of this corpus")] = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or self.manifest

    def points(self) -> list[tuple[int, float]]:
        """From which row of the run on it has which weight."""
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    __pydantic_config__ = STRICT

    train: Annotated[
        str | list[CorpusConfig] | None,
        Doc("manifest of the training shards; or a mixture: [{manifest: ..., weight: ..., name: ...}, ...]"),
    ] = None
    valid: Annotated[str | None, Doc("manifest of the validation shards")] = None
    tokenizer: Annotated[str | None, Doc("SentencePiece model, or tokenizer.json of Hugging Face")] = None
    seq_length: Annotated[PositiveInt, Doc("tokens per row (L)")] = 256
    document_attention: Annotated[
        Literal["full", "within_document"],
        Doc("what a token attends to: the whole row, or its own document in the row only"),
    ] = "full"
    chat: Annotated[ChatConfig, Doc("rows of corpora of dialogues")] = field(default_factory=ChatConfig)
    max_tokens: Annotated[
        PositiveInt | None,
        Doc("train on documents of data.train with so many tokens in all, the same for every seed; null: on all"),
    ] = None
    window_shards: Annotated[PositiveInt, Doc("shards that are shuffled together (W)")] = 8
    prefetch: Annotated[NonNegativeInt, Doc("global batches prepared ahead by a background thread")] = 2
    cache_dir: Annotated[
        str | None, Doc("folder on a disk of the node for shards at URLs; megatron-md in the user's cache if null")
    ] = None
    cache_bytes: Annotated[PositiveInt, Doc("most bytes that the cache may hold")] = 20_000_000_000
    random_length_fraction: Annotated[
        Fraction, Doc("share of global batches whose rows are cut to one random length (LLaDA: 0.01)")
    ] = 0.0
    max_quarantined: Annotated[
        NonNegativeInt, Doc("damaged documents that a run goes on without; it stops when there are more")
    ] = 100

    def corpora(self) -> list[CorpusConfig]:
        """The training corpora; a single manifest is a mixture of one."""
        if self.train is None:
            return []
        if isinstance(self.train, str):
            return [CorpusConfig(self.train, 1.0, max_tokens=self.max_tokens)]
        return self.train

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each."""
        yield from self.chat.problems(run)
        names = [corpus.label for corpus in self.corpora()]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"data.train: two corpora are called {name!r}; give each of them its own name"
        if self.max_tokens is not None and isinstance(self.train, list):
            yield "data.max_tokens is for a single corpus: give each corpus of data.train a max_tokens of its own"
        if self.random_length_fraction and run.train.epochs is None and run.train.steps > MOST_RANDOM_STEPS:
            yield (
                f"train.steps {run.train.steps} is above {MOST_RANDOM_STEPS}, the most of which "
                "data.random_length_fraction counts the tokens; set one of them back"
            )
        if self.random_length_fraction and self.seq_length < run.parallel.row_unit:
            yield (
                f"data.random_length_fraction needs data.seq_length of at least {run.parallel.row_unit}, of which "
                "2 and parallel.tensor x parallel.context are divisors"
            )
