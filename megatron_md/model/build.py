"""Builds the denoiser. The only file that names megatron-core's model class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_md import cpu
from megatron_md.config import Config, ParallelConfig, ResolvedConfig
from megatron_md.config.lora import is_adapter
from megatron_md.errors import UserError
from megatron_md.model.head import Prediction, PredictionLoss, masked_cross_entropy, select_hidden
from megatron_md.model.initialize import initialize_weights
from megatron_md.model.lora import attach_adapters
from megatron_md.model.spec import block_spec, core_attention, use_transformer_engine


class Denoiser(GPTModel):
    """megatron-core's transformer with the head and loss at predicted positions only.

    `forward(tokens_BL, position_ids, None, labels=Prediction)` returns a `PredictionLoss` on the last pipeline stage;
    with `labels=None` it returns logits fp32 [B, L, vocab], gathered over tensor-parallel ranks, with
    -inf for tokens that can never be predicted. Other stages return hidden states. Under context parallelism tokens and
    positions are this rank's slice of the rows.
    """

    def __init__(self, *args: Any, real_vocab: int, excluded_tokens: tuple[int, ...], head_chunk: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.real_vocab = real_vocab
        self.head_chunk = head_chunk
        tp = self.pg_collection.tp
        rows = self.vocab_size // tp.size()
        self.first_token = rows * tp.rank()
        never = {*excluded_tokens, *range(real_vocab, self.vocab_size)}
        self.excluded_rows = sorted(t - self.first_token for t in never if 0 <= t - self.first_token < rows)
        self.excluded_tokens = excluded_tokens
        self._excluded: torch.Tensor | None = None
        if self.post_process:
            # The head runs inside the output layer's own call, so that megatron-core's hooks around that layer fire:
            # with overlapped parameter gathers they are what waits for its weight.
            self._project = self.output_layer.forward
            self.output_layer.forward = self._head

    def _excluded_on(self, device: torch.device) -> torch.Tensor:
        if self._excluded is None or self._excluded.device != device:
            self._excluded = torch.tensor(self.excluded_rows, dtype=torch.int64, device=device)
        return self._excluded

    def _postprocess(
        self, *, hidden_states: torch.Tensor, labels: Prediction | torch.Tensor | None = None, **unused: Any
    ) -> torch.Tensor | PredictionLoss:
        return self.output_layer(hidden_states, labels) if self.post_process else hidden_states

    def _head(
        self, hidden_LBH: torch.Tensor, prediction: Prediction | torch.Tensor | None
    ) -> torch.Tensor | PredictionLoss:
        """The loss of a prediction; logits [M, V] at flat positions, or of all [B, L, V]."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        if prediction is None:
            logits, _ = self._project(hidden_LBH, weight=weight, runtime_gather_output=True)
            return self._predicted(logits.transpose(0, 1))
        tp = self.pg_collection.tp
        positions_M = prediction if isinstance(prediction, torch.Tensor) else prediction.positions_M
        hidden_MH = select_hidden(hidden_LBH, positions_M, sequence_parallel=self.config.sequence_parallel, tp_group=tp)
        if isinstance(prediction, torch.Tensor):
            return self._predicted(gather_from_tensor_model_parallel_region(hidden_MH @ weight.t(), group=tp))
        return masked_cross_entropy(
            hidden_MH,
            weight,
            prediction,
            first_token=self.first_token,
            excluded=self._excluded_on(hidden_MH.device),
            chunk=self.head_chunk,
            tp_group=tp,
            is_weight_shared=tied and self.pre_process,
        )

    def _predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [..., V] of the vocabulary, -inf for what is never predicted."""
        never = torch.tensor(self.excluded_tokens, dtype=torch.int64, device=logits.device)
        return logits[..., : self.real_vocab].float().index_fill(-1, never, float("-inf"))


# Fields of megatron-core's configs that other keys of ours decide, so that nothing else goes by a wrong value.
RESERVED = {
    "num_layers": "model.layers", "hidden_size": "model.hidden", "num_attention_heads": "model.heads",
    "num_query_groups": "model.kv_heads", "kv_channels": "model.head_dim", "ffn_hidden_size": "model.ffn",
    "qk_layernorm": "model.qk_norm", "add_qkv_bias": "model.qkv_bias", "layernorm_epsilon": "model.norm_eps",
    "tensor_model_parallel_size": "parallel.tensor", "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline", "context_parallel_size": "parallel.context",
    "sequence_parallel": "parallel.sequence_parallel", "use_distributed_optimizer": "parallel.distributed_optimizer",
    "overlap_grad_reduce": "parallel.overlap_grad_reduce", "overlap_param_gather": "parallel.overlap_param_gather",
    "bf16": "train.precision", "fp16": "train.precision", "fp8": "train.precision", "params_dtype": "train.precision",
    "deterministic_mode": "train.deterministic", "lr": "optimizer.lr", "clip_grad": "optimizer.clip_grad",
    "cp_comm_type": "parallel.context", "hybrid_context_parallel": "parallel.context",
    "hierarchical_context_parallel_sizes": "parallel.context",
    "hidden_dropout": "train.dropout", "attention_dropout": "train.dropout",
    "weight_decay": "optimizer.weight_decay", "calculate_per_token_loss": "objective.normalise",
}  # fmt: skip


# Beginnings of fields that ask for what is not built here: our spec would train a plain transformer in their place.
UNSUPPORTED = (
    "moe_", "num_moe_experts", "expert_", "mtp_", "multi_latent_attention", "experimental_attention_variant", "dsa_",
    "mamba_", "is_hybrid_model", "heterogeneous_block_specs", "window_", "softmax_type", "fp8_param", "fp4",
)  # fmt: skip
WGRAD_EXTENSION = "fused_weight_gradient_mlp_cuda"


def apply_overrides(fields: dict[str, Any], overrides: dict[str, Any], target: type, section: str) -> dict[str, Any]:
    """Merge a user's `megatron.*` keys into the fields of one of megatron-core's dataclasses.

    Raises:
        UserError: a key is not a field of `target`, or another key of ours decides it.
    """
    known = {f.name for f in dataclasses.fields(target)}
    for key in overrides:
        if key not in known:
            raise UserError(f"megatron.{section}.{key}: megatron-core's {target.__name__} has no such field")
        if key in RESERVED:
            raise UserError(f"megatron.{section}.{key}: set {RESERVED[key]} instead")
        if key.startswith(UNSUPPORTED):
            raise UserError(f"megatron.{section}.{key}: such layers are not built here; leave it out")
    return {**fields, **overrides}


def transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """megatron-core's transformer configuration for a run.

    Raises:
        UserError: a field under `megatron.transformer` is unknown, or cannot be had here.
    """
    model = config.model
    bf16 = config.train.uses_bf16(device.type)
    dtype = torch.bfloat16 if bf16 else torch.float32
    fields: dict[str, Any] = dict(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.key_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=config.train.dropout,
        attention_dropout=0.0,
        # initialize.py fills the weights; construction must still run for the attributes that it sets.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        **_layout_fields(config.parallel),
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=use_transformer_engine(device),
        gradient_accumulation_fusion=find_spec(WGRAD_EXTENSION) is not None,
        persist_layer_norm=False,
        deterministic_mode=config.train.deterministic,
    )
    if config.train.precision == "fp8":
        _check_fp8(device)
        fields |= dict(fp8="hybrid", fp8_recipe="tensorwise")
    if config.train.recompute == "full":
        fields |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif config.train.recompute == "selective":
        fields |= dict(recompute_granularity="selective")
    if device.type == "cpu":
        fields |= cpu.CPU_TRANSFORMER_CONFIG
    fields = apply_overrides(fields, config.megatron.transformer, TransformerConfig, "transformer")
    if fields["gradient_accumulation_fusion"] and find_spec(WGRAD_EXTENSION) is None:
        raise UserError(
            f"megatron.transformer.gradient_accumulation_fusion needs NVIDIA's apex, built with its extension "
            f"{WGRAD_EXTENSION}, also beside Transformer Engine; leave it out, or build apex"
        )
    try:
        core = TransformerConfig(**fields)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"megatron-core refuses this model: {error}") from error
    if device.type == "cpu":
        cpu.assert_safe_transformer_config(core)
    return core


def _check_fp8(device: torch.device) -> None:
    if not use_transformer_engine(device):
        raise UserError("train.precision fp8 needs a CUDA device and Transformer Engine; set train.precision=bf16")
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"train.precision fp8: {name} has no such products; set train.precision=bf16")


def _layout_fields(layout: ParallelConfig) -> dict[str, Any]:
    """How the model is split, in the fields of megatron-core's configuration."""
    interleaved = layout.virtual_pipeline > 1
    return dict(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # a wait for the device after every exchange, for faults of old drivers
        deallocate_pipeline_outputs=True,
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """Initialisation that leaves a weight alone."""
    return weight


def padded_vocab(config: ResolvedConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to `parallel.vocab_multiple * parallel.tensor`."""
    unit = config.parallel.vocab_multiple * config.parallel.tensor
    return -(-config.model.vocab // unit) * unit


def state_dict_metadata() -> dict[str, Any]:
    """The metadata that megatron-core's `sharded_state_dict` methods take."""
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def needs_own_attention(config: Config) -> bool:
    """Whether a run hides tokens from each other, by documents, blocks or annealing, or cuts rows between ranks."""
    keys = config.objective
    is_whole = config.data.document_attention == "full" and not keys.block_stages and not keys.attention_annealing
    return not is_whole or config.parallel.context > 1


def _build_chunk(
    config: ResolvedConfig,
    core: TransformerConfig,
    device: torch.device,
    causal: bool,
    excluded: tuple[int, ...],
    stage: int,
) -> Denoiser:
    vp_stage = stage if config.parallel.virtual_pipeline > 1 else None
    transformer_engine = use_transformer_engine(device)
    # Transformer Engine's attention is faster, but takes whole rows with no pair hidden only.
    is_ours = not transformer_engine or needs_own_attention(config)
    # Its fused rotary embedding is the model's; our attention applies its own.
    in_attention = config.model.position == "rope" and is_ours
    encoding = {"learned": "learned_absolute", "rope": "none" if in_attention else "rope"}[config.model.position]
    return Denoiser(
        config=core,
        transformer_layer_spec=block_spec(
            core,
            causal=causal,
            transformer_engine=transformer_engine,
            attention=core_attention(config.model.rope_theta if in_attention else None) if is_ours else None,
            vp_stage=vp_stage,
        ),
        vocab_size=padded_vocab(config),
        max_sequence_length=config.model.max_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.model.tied,
        position_embedding_type=encoding,
        rotary_base=config.model.rope_theta,
        vp_stage=vp_stage,
        real_vocab=config.model.vocab,
        excluded_tokens=excluded,
        head_chunk=config.objective.head_chunk,
    )


def build_model(
    config: ResolvedConfig, device: torch.device, *, causal: bool, mask_token_id: int | None, initialize: bool = True
) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or one per virtual pipeline stage), on `device`, initialised from the seed.

    Args:
        config: the run.
        device: where the parameters live ("meta" builds shapes only).
        causal: causal attention for the autoregressive baseline.
        mask_token_id: excluded from prediction under `objective.mask_logit: exclude`; None excludes nothing.
        initialize: fill the weights; False where a checkpoint will.
    """
    core = transformer_config(config, device)
    exclude = config.objective.mask_logit == "exclude" and mask_token_id is not None
    excluded = (int(mask_token_id),) if exclude and mask_token_id is not None else ()
    stages = range(config.parallel.virtual_pipeline)
    chunks: list[torch.nn.Module] = [_build_chunk(config, core, device, causal, excluded, s).to(device) for s in stages]
    if config.lora is not None:
        for chunk in chunks:
            attach_adapters(chunk, config.lora, config.model)
    if initialize:
        draw_weights(config, chunks)
    if core.bf16:
        chunks = [Float16Module(core, chunk) for chunk in chunks]
    return chunks


def draw_weights(config: ResolvedConfig, chunks: list[Any], *, adapters_only: bool = False) -> None:
    """Fill this rank's model chunks, wrapped or not, from the run's seed."""
    depth = math.sqrt(2.0 * config.model.layers) if config.model.scaled_init else 1.0
    initialize_weights(
        unwrap_model(chunks),
        seed=config.seed,
        std=config.model.init_std,
        output_std=config.model.init_std / depth,
        vocab=config.model.vocab,
        metadata=state_dict_metadata(),
        is_drawn=is_adapter if adapters_only else lambda name: True,
    )


def wrap_data_parallel(chunks: list[Any], config: Config) -> list[Any]:
    """Wrap model chunks in megatron-core's data-parallel module and tell the pipeline schedule about it."""
    layout = config.parallel
    is_cuda = next(chunks[0].parameters()).device.type == "cuda"
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    # Over gloo the device that computes also carries the data.
    reduce_overlaps, gather_overlaps = layout.overlaps(by_default=is_cuda and replicas > 1)
    fields: dict[str, Any] = dict(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=reduce_overlaps,
        overlap_param_gather=gather_overlaps,
        use_distributed_optimizer=layout.distributed_optimizer,
        # The verdict on bad numbers falls between the gradient norm and the update, on all ranks at once.
        check_for_nan_in_grad=False,
    )
    ddp = DistributedDataParallelConfig(
        **apply_overrides(fields, config.megatron.ddp, DistributedDataParallelConfig, "ddp")
    )
    core = chunks[0].config
    wrapped = [
        DistributedDataParallel(core, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]
    if reduce_overlaps:
        core.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
        if layout.pipeline > 1:
            starts = [chunk.start_grad_sync for chunk in wrapped]
            core.grad_sync_func = starts if len(wrapped) > 1 else starts[0]
    if gather_overlaps and layout.pipeline > 1:
        gathers = [partial(chunk.start_param_sync) for chunk in wrapped]
        core.param_sync_func = gathers if len(wrapped) > 1 else gathers[0]
    return wrapped


@contextmanager
def settled_parameters(chunks: list[Any]) -> Iterator[None]:
    """Within it, parameters can be read: with `overlap_param_gather` they are stale between a step and a forward."""
    lazy = [chunk for chunk in chunks if isinstance(chunk, DistributedDataParallel) and chunk.use_forward_hook]
    for chunk in lazy:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in lazy:
            chunk.enable_forward_pre_hook()


def count_parameters(chunks: list[torch.nn.Module]) -> int:
    """Number of parameters that these chunks hold on this rank."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
